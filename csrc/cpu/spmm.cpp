// SpMM: output = input * weight^T + bias, the weight given by an index and its values.
//
// The input is packed into tiles [K][lanes], whose blocks of columns fit L1 (see sparse_index.h). A task takes a panel
// of rows through all blocks; the panel's part of the output, [row][lanes], stays in L2 and begins as the bias. Per
// segment, the sums are in registers: an entry costs one byte of index, a quarter of a load of values, and one aligned
// load per FMA. At the end the panel is transposed into the output. Elements of 16 bits become floats on the way in,
// the values all at once, and are rounded on the way out.
//
// The values of a dense weight are compressed by slices of rows between the blocks of the panel before, so that reading
// memory and computing alternate within a thread and overlap between threads (128, 768 -> 3072 at 90%: 0.45 ms for 0.56
// with a pass of its own).
#include "kernels.h"
#include "sparse_tiles.h"

namespace masked_ops::cpu::MASKED_OPS_CAPABILITY {
namespace {

constexpr int L = Vec::kLanes;

// Sets of sums per segment, so that eight FMAs do not wait for each other.
template <int NV>
constexpr int kSets = NV >= 7   ? 1
                      : NV == 4 ? 2
                                : 4;

using Segment = SparseIndex::Segment;

// What all runs of a tile have in common. Where a run begins goes in registers: a struct that is written by fields and
// copied by vectors stalls each call, and a run has a few hundred cycles.
struct Operands {
  const Segment* segments;  // the tile's first
  const float* values;
  const float* x;  // the block of input
  int64_t pitch;
  float* c;            // the panel's [row][lanes]
  const float* start;  // of each of the panel's rows, if nothing is in c
  bool streams;
  Ahead ahead;  // from the first segment on

  MASKED_OPS_INLINE Ahead ahead_of(const Segment* at) const {
    Ahead result = ahead;
    result.skip(at - segments);
    return result;
  }
};

MASKED_OPS_INLINE Vec broadcast(Vec quad, int element) {
  switch (element) {
    case 0:
      return quad.element<0>();
    case 1:
      return quad.element<1>();
    case 2:
      return quad.element<2>();
    default:
      return quad.element<3>();
  }
}

template <int NV>
struct Sums {
  Vec sum[kSets<NV>][NV];

  MASKED_OPS_INLINE Sums() {
    MASKED_OPS_UNROLL
    for (int s = 0; s < kSets<NV>; ++s) {
      MASKED_OPS_UNROLL
      for (int j = 0; j < NV; ++j) sum[s][j] = Vec::zero();
    }
  }

  // Adds N <= 8 entries: their columns are the bytes of word, their values v[0..N).
  template <int N, Layout kLayout>
  MASKED_OPS_INLINE void add(uint64_t word, const float* v, InputBlock<NV, kLayout> x) {
    Vec quad;
    MASKED_OPS_UNROLL
    for (int i = 0; i < N; ++i) {
      const bool whole = i / 4 * 4 + 4 <= N;
      if (whole && i % 4 == 0) quad = Vec::quad(v + i);
      const Vec value = whole ? broadcast(quad, i % 4) : Vec::set1(v[i]);
      const float* const column = x.column(uint8_t(word));
      word >>= 8;
      MASKED_OPS_UNROLL
      for (int j = 0; j < NV; ++j) sum[i % kSets<NV>][j] = fmadd(value, x.load(column, j), sum[i % kSets<NV>][j]);
    }
  }

  // To what is there, or to start, which is to be there.
  MASKED_OPS_INLINE void add_to(float* c, const float* start, bool streams) const {
    const auto store = [&](auto before, auto streamed) __attribute__((always_inline)) {
      MASKED_OPS_UNROLL
      for (int j = 0; j < NV; ++j) {
        Vec total = sum[0][j];
        MASKED_OPS_UNROLL
        for (int s = 1; s < kSets<NV>; ++s) total = total + sum[s][j];
        total = total + before(j);
        streamed.value ? total.stream(c + j * L) : total.store(c + j * L);
      }
    };
    if (start) {
      const Vec value = Vec::set1(*start);
      const auto before = [&](int) __attribute__((always_inline)) { return value; };
      streams ? store(before, Int<1>()) : store(before, Int<0>());
    } else {
      store([&](int j) __attribute__((always_inline)) { return Vec::load(c + j * L); }, Int<0>());
    }
  }
};

// A run of segments of N entries. The columns of a segment are loaded while the one before it is computed.
template <int NV, Layout kLayout, int N>
__attribute__((noinline)) void short_run(int64_t segments, const uint8_t* columns, const Segment* at,
                                         const Operands& operands) {
  constexpr int kWords = (N + 7) / 8;
  const Operands o = operands;
  const Ahead ahead = o.ahead_of(at);
  const InputBlock<NV, kLayout> x = {o.x, o.pitch};
  uint64_t words[kWords];
  MASKED_OPS_UNROLL
  for (int w = 0; w < kWords; ++w) words[w] = load_ahead(columns + 8 * w);
  Segment next = at[0];
  for (int64_t s = 0; s < segments; ++s) {
    const uint32_t row = next.row;
    const float* const v = o.values + next.value;
    next = at[s + 1];
    columns += N;
    ahead.prefetch_at<x.kPiece>(s);
    MASKED_OPS_UNROLL
    for (int i = 0; i < N; i += 16) prefetch(v + N + i + tuning::kValuesAhead);
    Sums<NV> sums;
    MASKED_OPS_UNROLL
    for (int w = 0; w < kWords; ++w) {
      const uint64_t word = words[w];
      words[w] = load_ahead(columns + 8 * w);
      if (8 * w + 8 <= N) {
        sums.template add<8, kLayout>(word, v + 8 * w, x);
      } else {
        sums.template add<N % 8, kLayout>(word, v + 8 * w, x);
      }
    }
    sums.add_to(o.c + row * x.row_pitch(), o.start ? o.start + row : nullptr, kLayout == Layout::kPlanes && o.streams);
  }
}

// A run of segments of count entries, kRest of them beyond the last whole octet.
template <int NV, Layout kLayout, int kRest>
__attribute__((noinline)) void long_run(int64_t segments, int count, const uint8_t* columns, const Segment* at,
                                        const Operands& operands) {
  const Operands o = operands;
  const Ahead ahead = o.ahead_of(at);
  const InputBlock<NV, kLayout> x = {o.x, o.pitch};
  uint64_t word = load_ahead(columns);
  Segment next = at[0];
  for (int64_t s = 0; s < segments; ++s) {
    const uint32_t row = next.row;
    const float* v = o.values + next.value;
    next = at[s + 1];
    ahead.prefetch_at<x.kPiece>(s);
    Sums<NV> sums;
    for (int i = 0; i < count / 8; ++i) {
      const uint64_t now = word;
      word = load_ahead(columns += 8);
      prefetch(v + count + tuning::kValuesAhead);
      sums.template add<8, kLayout>(now, v, x);
      v += 8;
    }
    if (kRest) {
      const uint64_t now = word;
      word = load_ahead(columns += kRest);
      sums.template add<kRest, kLayout>(now, v, x);
    }
    sums.add_to(o.c + row * x.row_pitch(), o.start ? o.start + row : nullptr, kLayout == Layout::kPlanes && o.streams);
  }
}

// A run of blocks of rows that share their columns: of a tile's vectors N from J on, each loaded once for all rows.
template <int NV, Layout kLayout, int J, int N>
__attribute__((noinline)) void block_run(int64_t blocks, int count, const uint8_t* columns, const Segment* at,
                                         const Operands& operands) {
  constexpr int kRows = SparseIndex::kBlockRows;
  const Operands o = operands;
  const Ahead ahead = o.ahead_of(at);
  const InputBlock<NV, kLayout> x = {o.x, o.pitch};
  for (int64_t b = 0; b < blocks; ++b, columns += count) {
    const uint32_t first = at[b * kRows].row;
    float* const c = o.c + first * x.row_pitch() + J * L;
    const float* v[kRows];
    Vec sum[kRows][N];
    MASKED_OPS_UNROLL
    for (int r = 0; r < kRows; ++r) {
      v[r] = o.values + at[b * kRows + r].value;
      if (J == 0) ahead.prefetch_at<x.kPiece>(b * kRows + r);
      MASKED_OPS_UNROLL
      for (int j = 0; j < N; ++j) {
        sum[r][j] = o.start ? Vec::set1(o.start[first + r]) : Vec::load(c + r * x.row_pitch() + j * L);
      }
    }
    const auto add = [&](uint8_t number, auto value_of) __attribute__((always_inline)) {
      const float* const column = x.column(number);
      Vec part[N];
      MASKED_OPS_UNROLL
      for (int j = 0; j < N; ++j) part[j] = x.load(column, J + j);
      MASKED_OPS_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const Vec value = value_of(r);
        MASKED_OPS_UNROLL
        for (int j = 0; j < N; ++j) sum[r][j] = fmadd(value, part[j], sum[r][j]);
      }
    };
    int i = 0;
    for (; i + 4 <= count; i += 4) {
      uint32_t word;
      std::memcpy(&word, columns + i, sizeof(word));
      Vec quad[kRows];
      MASKED_OPS_UNROLL
      for (int r = 0; r < kRows; ++r) {
        quad[r] = Vec::quad(v[r] + i);
        prefetch(v[r] + count + i + tuning::kValuesAhead);
      }
      MASKED_OPS_UNROLL
      for (int e = 0; e < 4; ++e) {
        add(uint8_t(word >> (8 * e)), [&](int r) __attribute__((always_inline)) { return broadcast(quad[r], e); });
      }
    }
    for (; i < count; ++i) {
      add(columns[i], [&](int r) __attribute__((always_inline)) { return Vec::set1(v[r][i]); });
    }
    MASKED_OPS_UNROLL
    for (int r = 0; r < kRows; ++r) {
      MASKED_OPS_UNROLL
      for (int j = 0; j < N; ++j) sum[r][j].store(c + r * x.row_pitch() + j * L);
    }
  }
}

// All vectors, as many at a time as leave their sums in registers.
template <int NV, Layout kLayout, int J = 0>
void block_runs(int64_t blocks, int count, const uint8_t* columns, const Segment* at, const Operands& o) {
  if constexpr (J < NV) {
    constexpr int N = min(tuning::kBlockVectors, NV - J);
    block_run<NV, kLayout, J, N>(blocks, count, columns, at, o);
    block_runs<NV, kLayout, J + N>(blocks, count, columns, at, o);
  }
}

using ShortRun = void (*)(int64_t segments, const uint8_t* columns, const Segment* at, const Operands&);
using LongRun = void (*)(int64_t segments, int count, const uint8_t* columns, const Segment* at, const Operands&);

template <int NV, Layout kLayout>
struct RunTable {
  // Runs of up to so many entries are unrolled whole: 24 for 8 gain 10% at 95% and 128 or 64 rows. Narrower tiles have
  // deeper blocks and longer runs, and convolutions wait for other things: nothing to be measured for half of the
  // file's compilation.
  static constexpr int kShort = kLayout == Layout::kPacked && NV >= 4 ? 24 : 8;

  ShortRun short_runs[kShort + 1];
  LongRun long_runs[8];

  constexpr RunTable() : short_runs{}, long_runs{} { fill<kShort>(); }

  template <int N>
  constexpr void fill() {
    short_runs[N] = short_run<NV, kLayout, N>;
    if constexpr (N <= 8) long_runs[N - 1] = long_run<NV, kLayout, N - 1>;
    if constexpr (N > 1) fill<N - 1>();
  }
};

template <int NV, Layout kLayout>
void multiply(const SparseIndex& index, int64_t tile, const Operands& o) {
  static constexpr RunTable<NV, kLayout> table;
  const uint8_t* columns = index.columns + index.tiles[tile].entry;
  const Segment* at = o.segments;
  for (int64_t r = index.tiles[tile].run; r < index.tiles[tile + 1].run; ++r) {
    const int count = index.runs[r].count, segments = index.runs[r].segments;
    if (index.runs[r].rows > 1) {
      block_runs<NV, kLayout>(segments, count, columns, at, o);
    } else if (count <= table.kShort) {
      table.short_runs[count](segments, columns, at, o);
    } else {
      table.long_runs[count % 8](segments, count, columns, at, o);
    }
    columns += count * segments;
    at += segments * index.runs[r].rows;
  }
}

}  // namespace

void multiply_tile(const SparseIndex& index, int64_t tile, int vectors, const float* values, const float* x, Target to,
                   Ahead ahead) {
  const Operands o = {index.segments + index.tiles[tile].segment, values, x, 0, to.c, to.start, to.streams, ahead};
  with_vectors(vectors, [&](auto nv) { multiply<decltype(nv)::value, Layout::kPacked>(index, tile, o); });
}

namespace {

template <Layout kLayout>
void multiply_pitched(const SparseIndex& index, int64_t tile, int vectors, const float* values, const float* x,
                      int64_t pitch, Target to, Ahead ahead) {
  const Operands o = {index.segments + index.tiles[tile].segment, values, x, pitch, to.c, to.start, to.streams, ahead};
  vectors == 7 ? multiply<7, kLayout>(index, tile, o) : multiply<8, kLayout>(index, tile, o);
}

}  // namespace

void multiply_banded(const SparseIndex& index, int64_t tile, int vectors, const float* values, const float* x,
                     int64_t pitch, Target to, Ahead ahead) {
  multiply_pitched<Layout::kBanded>(index, tile, vectors, values, x, pitch, to, ahead);
}

void multiply_planes(const SparseIndex& index, int64_t tile, int vectors, const float* values, const float* x,
                     int64_t pitch, Target to, Ahead ahead) {
  multiply_pitched<Layout::kPlanes>(index, tile, vectors, values, x, pitch, to, ahead);
}

namespace {

// output[lane][r] = c[r][lane] for the valid lanes of a tile.
template <typename T>
void store_output(const float* c, int64_t rows, int64_t width, int64_t lanes, T* output, int64_t ld) {
  for (int64_t j = 0; j < lanes; j += L) {
    const int64_t valid = min<int64_t>(L, lanes - j);
    for (int64_t r = 0; r < rows; r += L) {
      const int64_t columns = min<int64_t>(L, rows - r);
      Vec tile[L];
      MASKED_OPS_UNROLL
      for (int i = 0; i < L; ++i) tile[i] = Vec::load(c + (r + i) * width + j);
      transpose(tile);
      T* const to = output + j * ld + r;
      if (columns == L && valid == L) {
        MASKED_OPS_UNROLL
        for (int i = 0; i < L; ++i) store_floats(tile[i], to + i * ld);
      } else {
        for (int64_t i = 0; i < valid; ++i) store_floats(tile[i], columns, to + i * ld);
      }
    }
  }
}

const float* gather_values(const SparseIndex& index, int64_t tile, const float* values) {
  const int64_t first = index.tiles[tile].entry, n = index.tiles[tile + 1].entry - first;
  const uint32_t* const positions = index.positions + first;
  float* const gathered = static_cast<float*>(scratch(Slot::kValues, n * sizeof(float)));
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {  // two positions a load: loads are what limits this
    uint64_t pair[2];
    std::memcpy(pair, positions + i, sizeof(pair));
    const float a = values[uint32_t(pair[0])], b = values[pair[0] >> 32];
    const float c = values[uint32_t(pair[1])], d = values[pair[1] >> 32];
    gathered[i] = a;
    gathered[i + 1] = b;
    gathered[i + 2] = c;
    gathered[i + 3] = d;
  }
  for (; i < n; ++i) gathered[i] = values[positions[i]];
  return gathered;
}

// Rows of a dense weight that become values while another panel is multiplied: a slice with each of its blocks.
struct Slices {
  const DenseWeight* weight = nullptr;  // null for none
  int64_t first, last;                  // rows

  int64_t begin(int64_t block, int64_t blocks) const { return first + (last - first) * block / blocks; }
  void compress(int64_t block, int64_t blocks) const {
    compress_rows(*weight, begin(block, blocks), begin(block + 1, blocks));
  }
};

// Runs fetch the values that a row has in the next block; this does so for the first block. It loads: of so many
// prefetches at once most would be dropped.
void touch_first_values(const SparseIndex& index, int64_t tile, const float* values) {
  const SparseIndex::Segment* at = index.segments + index.tiles[tile].segment;
  for (int64_t r = index.tiles[tile].run; r < index.tiles[tile + 1].run; ++r) {
    const SparseIndex::Run run = index.runs[r];
    for (int64_t s = 0; s < int64_t{run.segments} * run.rows; ++s, ++at) {
      const volatile float* const v = values + at->value;
      static_cast<void>(v[0]);
      static_cast<void>(v[run.count - 1]);
    }
  }
}

// One panel of the output for tiles [first, last) of the packed input x.
template <typename T>
void multiply_panel(const SparseIndex& index, const float* values, const Slices& slices, int64_t panel, Tiles tiles,
                    int64_t first, int64_t last, const float* x, const T* bias, T* output) {
  const int64_t row = panel * index.panel_rows, rows = min(index.panel_rows, index.rows - row);
  const int64_t padded = ceil_div(rows, L) * L;
  float* const c =
      static_cast<float*>(scratch(Slot::kAccumulator, (last - first) * padded * tiles.width() * sizeof(float)));
  const auto c_of = [&](int64_t t) { return c + (t - first) * padded * tiles.width(); };
  const auto x_of = [&](int64_t t, int64_t block) {
    return x + tiles.offset(t, index.cols) + block * index.block_cols * tiles.vectors_of(t) * L;
  };
  for (int64_t t = first; t < last; ++t) {
    start_from_bias(bias ? bias + row : nullptr, rows, tiles.vectors_of(t) * L, c_of(t));
  }
  if (!index.transposed && index.nnz >= tuning::kManyValues)
    touch_first_values(index, panel * index.blocks, values + index.panel_values[panel]);
  for (int64_t block = 0; block < index.blocks; ++block) {
    const int64_t tile = panel * index.blocks + block;
    if (slices.weight) slices.compress(block, index.blocks);
    if (index.tiles[tile].entry == index.tiles[tile + 1].entry) continue;
    const float* const v = index.transposed ? gather_values(index, tile, values) : values + index.panel_values[panel];
    for (int64_t t = first; t < last; ++t) {
      const Ahead ahead = {t + 1 < last ? x_of(t + 1, block) : x_of(first, block + 1)};
      multiply_tile(index, tile, tiles.vectors_of(t), v, x_of(t, block), {c_of(t)}, ahead);
    }
  }
  for (int64_t t = first; t < last; ++t) {
    store_output(c_of(t), rows, tiles.vectors_of(t) * L, tiles.lanes(t), output + t * tiles.width() * index.rows + row,
                 index.rows);
  }
}

// The most tiles of input that a task takes.
int64_t tiles_per_task(const SparseIndex& index, int64_t width) {
  return max<int64_t>(tuning::kPanelFloats / index.panel_rows / width, 1);
}

// The rows of input that are taken at a time, packed.
template <typename T>
const float* pack_input(const Team& team, const SparseIndex& index, Tiles tiles, const T* input) {
  float* const x = static_cast<float*>(scratch(Slot::kPanelA, tiles.offset(tiles.count(), index.cols) * sizeof(float)));
  pack_tiles(team, input, tiles, index.cols, x);
  return x;
}

template <typename T>
void multiply_packed(const Team& team, const SparseIndex& index, const float* values, Tiles tiles, const float* x,
                     const T* bias, T* output) {
  const int64_t wanted = ceil_div(int64_t{team.threads}, index.panels);
  const int64_t per_task = min(tiles_per_task(index, tiles.width()), ceil_div(tiles.count(), wanted));
  const int64_t groups = ceil_div(tiles.count(), per_task);
  team.for_each(index.panels * groups, [&](int64_t task) {
    const int64_t panel = task / groups, first = task % groups * per_task;
    multiply_panel(index, values, {}, panel, tiles, first, min(tiles.count(), first + per_task), x, bias, output);
  });
}

template <typename T>
void multiply_all(const Team& team, const SparseIndex& index, const T* all_values, int64_t M, const T* input,
                  const T* bias, T* output) {
  const float* const values = as_floats(team, Slot::kPanelB, all_values, index.nnz);
  const int vectors = tile_vectors(index);
  const int64_t chunk = rows_at_a_time(index, max<int64_t>(index.cols, 1), vectors * L);
  for (int64_t m = 0; m < M; m += chunk) {
    const Tiles tiles = {min(chunk, M - m), vectors};
    const float* const x = pack_input(team, index, tiles, input + m * index.cols);
    multiply_packed(team, index, values, tiles, x, bias, output + m * index.rows);
  }
}

// Each thread multiplies a panel while it compresses the next that it will take.
void compress_and_multiply(const Team& team, const SparseIndex& index, const DenseWeight& weight, int64_t M,
                           const float* input, const float* bias, float* output) {
  const Tiles tiles = {M, tile_vectors(index)};
  const float* const x = pack_input(team, index, tiles, input);
  TaskQueue queue(index.panels, team.threads);
  const auto rows_of = [&](int64_t panel) {
    const int64_t row = panel * index.panel_rows;
    return Slices{&weight, row, min(index.rows, row + index.panel_rows)};
  };
  team.for_each(team.threads, [&](int64_t number) {
    TaskQueue::Worker worker(queue, number);
    int64_t panel = worker.take();
    if (panel >= 0) rows_of(panel).compress(0, 1);
    for (int64_t next; panel >= 0; panel = next) {
      next = worker.take();
      const Slices slices = next >= 0 ? rows_of(next) : Slices{};
      multiply_panel(index, weight.values, slices, panel, tiles, 0, tiles.count(), x, bias, output);
    }
  });
}

}  // namespace

void spmm(const Team& team, const SparseIndex& index, Dtype dtype, const void* values, int64_t M, const void* input,
          const void* bias, void* output) {
  with_element(dtype, [&](auto element) {
    using T = decltype(element);
    multiply_all(team, index, static_cast<const T*>(values), M, static_cast<const T*>(input),
                 static_cast<const T*>(bias), static_cast<T*>(output));
  });
}

void spmm_packed(const Team& team, const SparseIndex& index, const float* values, Tiles tiles, const float* x,
                 float* output) {
  multiply_packed<float>(team, index, values, tiles, x, nullptr, output);
}

void compress_spmm(const Team& team, const SparseIndex& index, Dtype dtype, Bits bits, const int64_t* offsets,
                   const void* weight, void* values, int64_t M, const void* input, const void* bias, void* output) {
  // Where a panel is one task, and each thread has one.
  const int64_t width = tile_vectors(index) * L;
  if (dtype == Dtype::kFloat && M <= tiles_per_task(index, width) * width && index.panels >= team.threads) {
    const DenseWeight dense = {bits, index.cols, offsets, static_cast<const float*>(weight),
                               static_cast<float*>(values)};
    return compress_and_multiply(team, index, dense, M, static_cast<const float*>(input),
                                 static_cast<const float*>(bias), static_cast<float*>(output));
  }
  compress(team, dtype == Dtype::kFloat ? 4 : 2, bits, index.rows, index.cols, offsets, weight, values);
  spmm(team, index, dtype, values, M, input, bias, output);
}

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY
