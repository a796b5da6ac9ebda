// The microkernels of SpMM: a tile of an index times a block of packed input. Per segment, the sums are in registers:
// an entry costs one byte of index, a quarter of a load of values, and one aligned load per FMA.
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

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY
