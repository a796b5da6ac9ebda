// SpMM: output = input * weight^T + bias, the weight given by an index and its values.
//
// The input is packed into tiles [K][lanes], whose blocks of columns fit L1 (see sparse_index.h). A task takes a panel
// of rows through all blocks; the panel's part of the output, [row][lanes], stays in L2 and begins as the bias. Per
// segment, the sums are in registers: an entry costs one byte of index, a quarter of a load of values, and one aligned
// load per FMA. At the end the panel is transposed into the output. Elements of 16 bits become floats on the way in,
// the values all at once, and are rounded on the way out.
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

struct Operands {
  const uint8_t* columns;
  const SparseIndex::Segment* segments;
  const float* values;
  const float* x;        // the block's [block_cols][lanes]
  const int32_t* table;  // or where its columns are
  float* c;              // the panel's [row][lanes]
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
  template <int N, bool kTable>
  MASKED_OPS_INLINE void add(uint64_t word, const float* v, const float* x, const int32_t* table) {
    Vec quad;
    MASKED_OPS_UNROLL
    for (int i = 0; i < N; ++i) {
      const bool whole = i / 4 * 4 + 4 <= N;
      if (whole && i % 4 == 0) quad = Vec::quad(v + i);
      const Vec value = whole ? broadcast(quad, i % 4) : Vec::set1(v[i]);
      const float* row = row_of<NV, kTable>(x, table, uint8_t(word));
      word >>= 8;
      MASKED_OPS_UNROLL
      for (int j = 0; j < NV; ++j) sum[i % kSets<NV>][j] = fmadd(value, Vec::load(row + j * L), sum[i % kSets<NV>][j]);
    }
  }

  MASKED_OPS_INLINE void add_to(float* c) const {
    MASKED_OPS_UNROLL
    for (int j = 0; j < NV; ++j) {
      Vec total = sum[0][j];
      MASKED_OPS_UNROLL
      for (int s = 1; s < kSets<NV>; ++s) total = total + sum[s][j];
      (total + Vec::load(c + j * L)).store(c + j * L);
    }
  }
};

// A run of segments of N entries. The columns of a segment are loaded while the one before it is computed.
template <int NV, bool kTable, int N>
__attribute__((noinline)) void short_run(int64_t segments, Operands o) {
  constexpr int kWords = (N + 7) / 8;
  uint64_t words[kWords];
  MASKED_OPS_UNROLL
  for (int w = 0; w < kWords; ++w) words[w] = load_ahead(o.columns + 8 * w);
  SparseIndex::Segment next = o.segments[0];
  for (int64_t s = 0; s < segments; ++s) {
    float* const c = o.c + int64_t{next.row} * (NV * L);
    const float* const v = o.values + next.value;
    next = o.segments[s + 1];
    o.columns += N;
    MASKED_OPS_UNROLL
    for (int i = 0; i < N; i += 16) prefetch_l2(v + N + i + 12);
    Sums<NV> sums;
    MASKED_OPS_UNROLL
    for (int w = 0; w < kWords; ++w) {
      const uint64_t word = words[w];
      words[w] = load_ahead(o.columns + 8 * w);
      if (8 * w + 8 <= N) {
        sums.template add<8, kTable>(word, v + 8 * w, o.x, o.table);
      } else {
        sums.template add<N % 8, kTable>(word, v + 8 * w, o.x, o.table);
      }
    }
    sums.add_to(c);
  }
}

// A run of segments of count entries, kRest of them beyond the last whole octet.
template <int NV, bool kTable, int kRest>
__attribute__((noinline)) void long_run(int64_t segments, int count, Operands o) {
  uint64_t word = load_ahead(o.columns);
  SparseIndex::Segment next = o.segments[0];
  for (int64_t s = 0; s < segments; ++s) {
    float* const c = o.c + int64_t{next.row} * (NV * L);
    const float* v = o.values + next.value;
    next = o.segments[s + 1];
    Sums<NV> sums;
    for (int i = 0; i < count / 8; ++i) {
      const uint64_t now = word;
      word = load_ahead(o.columns += 8);
      prefetch_l2(v + count + 12);
      sums.template add<8, kTable>(now, v, o.x, o.table);
      v += 8;
    }
    if (kRest) {
      const uint64_t now = word;
      word = load_ahead(o.columns += kRest);
      sums.template add<kRest, kTable>(now, v, o.x, o.table);
    }
    sums.add_to(c);
  }
}

using ShortRun = void (*)(int64_t segments, Operands);
using LongRun = void (*)(int64_t segments, int count, Operands);

// Runs of up to kShort entries are unrolled whole.
constexpr int kShort = 24;

template <int NV, bool kTable>
struct RunTable {
  ShortRun short_runs[kShort + 1];
  LongRun long_runs[8];

  constexpr RunTable() : short_runs{}, long_runs{} { fill<kShort>(); }

  template <int N>
  constexpr void fill() {
    short_runs[N] = short_run<NV, kTable, N>;
    if constexpr (N <= 8) long_runs[N - 1] = long_run<NV, kTable, N - 1>;
    if constexpr (N > 1) fill<N - 1>();
  }
};

template <int NV, bool kTable>
void multiply(const SparseIndex& index, int64_t tile, Operands o) {
  static constexpr RunTable<NV, kTable> table;
  for (int64_t r = index.tiles[tile].run; r < index.tiles[tile + 1].run; ++r) {
    const int count = index.runs[r].count, segments = index.runs[r].segments;
    if (count <= kShort) {
      table.short_runs[count](segments, o);
    } else {
      table.long_runs[count % 8](segments, count, o);
    }
    o.columns += int64_t{count} * segments;
    o.segments += segments;
  }
}

}  // namespace

void multiply_tile(const SparseIndex& index, int64_t tile, int vectors, const float* values, const float* x, float* c) {
  const SparseIndex::Tile begin = index.tiles[tile];
  const Operands operands = {index.columns + begin.entry, index.segments + begin.segment, values, x, nullptr, c};
  with_vectors(vectors, [&](auto nv) { multiply<decltype(nv)::value, false>(index, tile, operands); });
}

void multiply_tile(const SparseIndex& index, int64_t tile, int vectors, const float* values, const float* x,
                   const int32_t* table, float* c) {
  const SparseIndex::Tile begin = index.tiles[tile];
  const Operands operands = {index.columns + begin.entry, index.segments + begin.segment, values, x, table, c};
  with_conv_vectors(vectors, [&](auto nv) { multiply<decltype(nv)::value, true>(index, tile, operands); });
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

// One panel of the output for tiles [first, last) of the packed input x.
template <typename T>
void multiply_panel(const SparseIndex& index, const float* values, int64_t panel, Tiles tiles, int64_t first,
                    int64_t last, const float* x, const T* bias, T* output) {
  const int64_t row = panel * index.panel_rows, rows = min(index.panel_rows, index.rows - row);
  const int64_t padded = ceil_div(rows, L) * L;
  float* const c =
      static_cast<float*>(scratch(Slot::kAccumulator, (last - first) * padded * tiles.width() * sizeof(float)));
  const auto c_of = [&](int64_t t) { return c + (t - first) * padded * tiles.width(); };
  for (int64_t t = first; t < last; ++t) {
    start_from_bias(bias ? bias + row : nullptr, rows, tiles.vectors_of(t) * L, c_of(t));
  }
  for (int64_t block = 0; block < index.blocks; ++block) {
    const int64_t tile = panel * index.blocks + block;
    if (index.tiles[tile].entry == index.tiles[tile + 1].entry) continue;
    const float* const v = index.transposed ? gather_values(index, tile, values) : values + index.panel_values[panel];
    for (int64_t t = first; t < last; ++t) {
      const int vectors = tiles.vectors_of(t);
      const float* const x_block = x + tiles.offset(t, index.cols) + block * index.block_cols * vectors * L;
      multiply_tile(index, tile, vectors, v, x_block, c_of(t));
    }
  }
  for (int64_t t = first; t < last; ++t) {
    store_output(c_of(t), rows, tiles.vectors_of(t) * L, tiles.lanes(t), output + t * tiles.width() * index.rows + row,
                 index.rows);
  }
}

template <typename T>
void multiply_all(const Team& team, const SparseIndex& index, const T* all_values, int64_t M, const T* input,
                  const T* bias, T* output) {
  const float* const values =
      as_floats(team, Slot::kPanelB, all_values, index.tiles[index.panels * index.blocks].entry);
  const int vectors = tile_vectors(index);
  const int64_t width = vectors * L;
  const int64_t chunk =
      max<int64_t>(tuning::kPackedBytes / int64_t{sizeof(float)} / max<int64_t>(index.cols, 1) / width, 1) * width;
  for (int64_t m = 0; m < M; m += chunk) {
    const Tiles tiles = {min(chunk, M - m), vectors};
    float* const x =
        static_cast<float*>(scratch(Slot::kPanelA, tiles.offset(tiles.count(), index.cols) * sizeof(float)));
    pack_tiles(team, input + m * index.cols, tiles, index.cols, x);

    const int64_t per_task = max<int64_t>(tuning::kPanelFloats / index.panel_rows / width, 1);
    const int64_t groups = ceil_div(tiles.count(), per_task);
    team.for_each(index.panels * groups, [&](int64_t task) {
      const int64_t panel = task / groups, first = task % groups * per_task;
      multiply_panel(index, values, panel, tiles, first, min(tiles.count(), first + per_task), x, bias,
                     output + m * index.rows);
    });
  }
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

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY
