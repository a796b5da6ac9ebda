// SDDMM: the remaining weights' entries of grad_output^T * input, as values in row-major order.
//
// Both operands are packed into tiles [features][lanes]. A task takes a panel of rows through all blocks of columns
// (see sparse_index.h): a row of grad_output is in registers while the segment's entries are taken, the block of input
// in L1. As many dot products as a vector has lanes are summed across at a time. Values of 16 bits are summed as floats
// and rounded at the end.
#include "kernels.h"
#include "sparse_tiles.h"

namespace masked_ops::cpu::MASKED_OPS_CAPABILITY {
namespace {

constexpr int L = Vec::kLanes;

using Run = SparseIndex::Run;
using Segment = SparseIndex::Segment;

// What all runs of a tile have in common (see spmm_tile.cpp).
struct Operands {
  const Segment* segments;  // the tile's first
  const float* x;           // the block of input
  int64_t pitch;
  const float* dy;  // the panel's [row][lanes]
  int64_t dy_row;   // from a row to the next, and from its first vector to its fifth
  int64_t dy_upper;
  float* results;  // segment.value counts from here
  bool accumulate;
  Ahead ahead;  // from the first segment on
};

template <int NV, Layout kLayout>
MASKED_OPS_INLINE Vec dot(const Vec (&dy)[NV], InputBlock<NV, kLayout> x, uint8_t number) {
  const float* const column = x.column(number);
  Vec sum = dy[0] * x.load(column, 0);
  MASKED_OPS_UNROLL
  for (int j = 1; j < NV; ++j) sum = fmadd(dy[j], x.load(column, j), sum);
  return sum;
}

// N <= L entries of each segment of a run, beginning with its entry `first`. Columns and segments are loaded one
// segment ahead (see spmm_tile.cpp).
template <int NV, Layout kLayout, int N>
__attribute__((noinline)) void dots(const Run& run, const uint8_t* columns, const Segment* at, int64_t first,
                                    const Operands& operands) {
  constexpr int kWords = (N + 7) / 8;
  const Operands o = operands;
  const int64_t stride = run.count, further = run.rows - 1, segments = int64_t{run.segments} * run.rows;
  float* const results = o.results + first;
  columns += first;
  Ahead ahead = o.ahead;
  ahead.skip(at - o.segments);
  if (first > 0) ahead.share = 0;
  uint64_t words[kWords];
  MASKED_OPS_UNROLL
  for (int w = 0; w < kWords; ++w) words[w] = load_ahead(columns + 8 * w);
  const auto valid = Vec::first(N);
  const InputBlock<NV, kLayout> x = {o.x, o.pitch};
  Segment next = at[0];
  for (int64_t s = 0; s < segments; ++s) {
    const float* const row = o.dy + next.row * o.dy_row;
    float* const to = results + next.value;
    next = at[s + 1];
    if (kLayout == Layout::kPlanes) ahead.prefetch_at<x.kPiece>(s);
    Vec dy[NV];
    MASKED_OPS_UNROLL
    for (int j = 0; j < NV; ++j) dy[j] = Vec::load(j < 4 ? row + j * L : row + o.dy_upper + (j - 4) * L);
    if ((s & further) == further) columns += stride;
    Vec quads[L / 4];
    uint64_t word = 0;
    MASKED_OPS_UNROLL
    for (int q = 0; q < L / 4; ++q) {
      if (q % 2 == 0 && q / 2 < kWords) {
        word = words[q / 2];
        words[q / 2] = load_ahead(columns + 4 * q);
      }
      Vec sum[4];
      MASKED_OPS_UNROLL
      for (int i = 0; i < 4; ++i) {
        sum[i] = 4 * q + i < N ? dot(dy, x, uint8_t(word)) : Vec::zero();
        word >>= 8;
      }
      quads[q] = 4 * q < N ? sum_quads(sum[0], sum[1], sum[2], sum[3]) : Vec::zero();
    }
    Vec result = sum_across_quads(quads);
    if (o.accumulate) result = result + Vec::loadu(valid, to);
    result.storeu(valid, to);
  }
}

using Dots = void (*)(const Run&, const uint8_t* columns, const Segment* at, int64_t first, const Operands&);

template <int NV, Layout kLayout>
struct DotsTable {
  Dots dots_of[L + 1];

  constexpr DotsTable() : dots_of{} { fill<L>(); }
  template <int N>
  constexpr void fill() {
    dots_of[N] = dots<NV, kLayout, N>;
    if constexpr (N > 1) fill<N - 1>();
  }
};

template <int NV, Layout kLayout>
void sample(const SparseIndex& index, int64_t tile, const Operands& o) {
  static constexpr DotsTable<NV, kLayout> table;
  const uint8_t* columns = index.columns + index.tiles[tile].entry;
  const Segment* at = o.segments;
  for (int64_t r = index.tiles[tile].run; r < index.tiles[tile + 1].run; ++r) {
    const Run& run = index.runs[r];
    for (int64_t first = 0; first < run.count; first += L) {
      table.dots_of[min<int64_t>(L, run.count - first)](run, columns, at, first, o);
    }
    columns += run.count * run.segments;
    at += run.segments * run.rows;
  }
}

Operands operands(const SparseIndex& index, int64_t tile, const float* x, int64_t pitch, const float* dy,
                  int64_t dy_row, float* results, bool accumulate, Ahead ahead) {
  return {index.segments + index.tiles[tile].segment, x, pitch, dy, dy_row, 4 * L, results, accumulate, ahead};
}

template <Layout kLayout>
void sample_pitched(const SparseIndex& index, int64_t tile, int vectors, const Operands& o) {
  vectors == 7 ? sample<7, kLayout>(index, tile, o) : sample<8, kLayout>(index, tile, o);
}

}  // namespace

void sample_tile(const SparseIndex& index, int64_t tile, int vectors, const float* x, const float* dy, float* results,
                 bool accumulate, int64_t dy_tile) {
  Operands o = operands(index, tile, x, 0, dy, (dy_tile ? 4 : vectors) * L, results, accumulate, {});
  if (dy_tile) o.dy_upper = dy_tile;
  with_vectors(vectors, [&](auto nv) { sample<decltype(nv)::value, Layout::kPacked>(index, tile, o); });
}

void sample_banded(const SparseIndex& index, int64_t tile, int vectors, const float* x, int64_t pitch, const float* dy,
                   float* results, bool accumulate) {
  sample_pitched<Layout::kBanded>(index, tile, vectors,
                                  operands(index, tile, x, pitch, dy, vectors * L, results, accumulate, {}));
}

void sample_planes(const SparseIndex& index, int64_t tile, int vectors, const float* x, int64_t pitch, const float* dy,
                   float* results, bool accumulate, Ahead ahead) {
  sample_pitched<Layout::kPlanes>(index, tile, vectors,
                                  operands(index, tile, x, pitch, dy, pitch, results, accumulate, ahead));
}

namespace {

// grad_output and input of the rows that are taken at a time, packed.
struct Packed {
  Tiles tiles;  // of input
  const float* x;
  const float* dy;
  bool halves;  // dy is in tiles of four vectors

  // From a row's fourth vector of dy to its fifth, if they are in two tiles.
  int64_t dy_tile(int64_t rows, int64_t tile) const { return halves && tiles.vectors_of(tile) == 8 ? 4 * L * rows : 0; }
};

// The rows that are taken at a time.
int64_t chunk_of(const SparseIndex& index) {
  return rows_at_a_time(index, max<int64_t>(max(index.rows, index.cols), 1), tuning::kMaxVectors * L);
}

void sample_packed(const Team& team, const SparseIndex& index, const Packed& packed, float* sums, bool accumulate) {
  const Tiles tiles = packed.tiles;
  // A task is a panel, or some of its blocks where panels are few: every entry is one task's.
  const int64_t parts = min(ceil_div(tuning::kTasksPerThread * team.threads, index.panels), index.blocks);
  team.for_each(index.panels * parts, [&](int64_t task) {
    const int64_t panel = task / parts, part = task % parts;
    float* const results = sums + index.panel_values[panel];
    for (int64_t t = 0; t < tiles.count(); ++t) {
      const int64_t lanes = tiles.vectors_of(t) * L, dy_tile = packed.dy_tile(index.rows, t);
      const float* const x_tile = packed.x + tiles.offset(t, index.cols);
      const float* const dy_panel =
          packed.dy + tiles.offset(t, index.rows) + panel * index.panel_rows * (dy_tile ? 4 * L : lanes);
      for (int64_t block = part * index.blocks / parts; block < (part + 1) * index.blocks / parts; ++block) {
        const int64_t tile = panel * index.blocks + block;
        prefetch_tile(index, tile + 1);
        sample_tile(index, tile, tiles.vectors_of(t), x_tile + block * index.block_cols * lanes, dy_panel, results,
                    accumulate || t > 0, dy_tile);
      }
    }
  });
}

template <typename T>
float* packed_tiles(const Team& team, Slot slot, const T* matrix, Tiles tiles, int64_t depth) {
  float* const packed = static_cast<float*>(scratch(slot, tiles.offset(tiles.count(), depth) * sizeof(float)));
  pack_tiles(team, matrix, tiles, depth, packed);
  return packed;
}

template <typename T>
void sample_all(const Team& team, const SparseIndex& index, int64_t M, const T* grad_output, const T* input,
                T* grad_values) {
  const int64_t nnz = index.nnz, chunk = chunk_of(index);
  float* sums;
  if constexpr (kIsFloat<T>) {
    sums = grad_values;
  } else {
    sums = static_cast<float*>(scratch(Slot::kValues, nnz * sizeof(float)));
  }
  for (int64_t m = 0; m < M; m += chunk) {
    const Tiles tiles = {min(chunk, M - m), tuning::kMaxVectors};
    const float* const x = packed_tiles(team, Slot::kPanelA, input + m * index.cols, tiles, index.cols);
    const float* const dy = packed_tiles(team, Slot::kPanelB, grad_output + m * index.rows, tiles, index.rows);
    sample_packed(team, index, {tiles, x, dy, false}, sums, m > 0);
  }
  if constexpr (!kIsFloat<T>) {
    team.for_each(ceil_div(nnz, tuning::kPassGrain), [&](int64_t task) {
      const int64_t first = task * tuning::kPassGrain;
      round_floats(sums + first, min(tuning::kPassGrain, nnz - first), grad_values + first);
    });
  }
}

// Whether tiles of grad_output that are packed for SpMM, so many vectors wide, serve SDDMM: where they are its own, or
// halves of its own.
bool share_tiles(Tiles tiles, int vectors) {
  const int last = tiles.vectors_of(tiles.count() - 1);
  const int64_t half = 4 * L;
  return vectors == 8 || (vectors == 4 && (last <= 4 || tiles.lanes(tiles.count() - 1) - half > half / 2));
}

}  // namespace

void sddmm(const Team& team, const SparseIndex& index, Dtype dtype, int64_t M, const void* grad_output,
           const void* input, void* grad_values) {
  with_element(dtype, [&](auto element) {
    using T = decltype(element);
    sample_all(team, index, M, static_cast<const T*>(grad_output), static_cast<const T*>(input),
               static_cast<T*>(grad_values));
  });
}

void sparse_gradients(const Team& team, const SparseIndex& index, const SparseIndex& transposed, const float* values,
                      int64_t M, const float* grad_output, const float* input, float* grad_input, float* grad_values,
                      float* grad_bias) {
  const int64_t N = index.rows, K = index.cols, chunk = chunk_of(index);
  const int vectors = tile_vectors(transposed);
  for (int64_t m = 0; m < M; m += chunk) {
    const Tiles tiles = {min(chunk, M - m), tuning::kMaxVectors}, narrow = {tiles.M, vectors};
    const bool shared = share_tiles(tiles, vectors);
    const float* const rows = grad_output + m * N;
    float* dy = static_cast<float*>(scratch(Slot::kPanelB, narrow.offset(narrow.count(), N) * sizeof(float)));
    if (grad_bias) {
      pack_and_add_up_tiles(team, rows, narrow, N, dy, grad_bias, m > 0);
    } else {
      pack_tiles(team, rows, narrow, N, dy);
    }
    spmm_packed(team, transposed, values, narrow, dy, grad_input + m * K);
    if (!shared) dy = packed_tiles(team, Slot::kPanelB, rows, tiles, N);
    const float* const x = packed_tiles(team, Slot::kPanelA, input + m * K, tiles, K);
    sample_packed(team, index, {tiles, x, dy, shared && vectors == 4}, grad_values, m > 0);
  }
}

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY
