// SDDMM: the remaining weights' entries of grad_output^T * input, as values in row-major order.
//
// Each thread packs both operands into tiles [features][lanes]. A task takes a panel of rows through all blocks of
// columns (see sparse_index.h): a row of grad_output is in registers while the segment's entries are taken, the block
// of input in L1. As many dot products as a vector has lanes are summed across at a time. Values of 16 bits are summed
// as floats and rounded at the end.
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
  int64_t dy_row;   // from a row to the next
  float* results;   // segment.value counts from here
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
    for (int j = 0; j < NV; ++j) dy[j] = Vec::load(row + j * L);
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
    store_first<N>(result, to);
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
  return {index.segments + index.tiles[tile].segment, x, pitch, dy, dy_row, results, accumulate, ahead};
}

template <Layout kLayout>
void sample_pitched(const SparseIndex& index, int64_t tile, int vectors, const Operands& o) {
  vectors == 7 ? sample<7, kLayout>(index, tile, o) : sample<8, kLayout>(index, tile, o);
}

}  // namespace

void sample_tile(const SparseIndex& index, int64_t tile, int vectors, const float* x, const float* dy, float* results,
                 bool accumulate) {
  const Operands o = operands(index, tile, x, 0, dy, vectors * L, results, accumulate, {});
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

// The rows that are taken at a time.
int64_t chunk_of(const SparseIndex& index) {
  return rows_at_a_time(index, max<int64_t>(max(index.rows, index.cols), 1), tuning::kMaxVectors * L);
}

// sums[r] (+)= all lanes of dy[r], which has whole vectors of rows.
void add_up_rows(const float* dy, int64_t rows, int vectors, float* sums, bool accumulate) {
  for (int64_t r = 0; r < rows; r += L) {
    Vec quads[L / 4];
    for (int q = 0; q < L / 4; ++q) {
      Vec sum[4];
      for (int i = 0; i < 4; ++i) {
        const float* const row = dy + (r + 4 * q + i) * vectors * L;
        sum[i] = Vec::load(row);
        for (int j = 1; j < vectors; ++j) sum[i] = sum[i] + Vec::load(row + j * L);
      }
      quads[q] = sum_quads(sum[0], sum[1], sum[2], sum[3]);
    }
    const auto valid = Vec::first(rows - r);
    Vec total = sum_across_quads(quads);
    if (accumulate) total = total + Vec::loadu(valid, sums + r);
    store_floats(total, rows - r, sums + r);
  }
}

// What is sampled for some rows of input and grad_output, and how it is cut into tasks: panels of rows of the weight,
// or some of their blocks where panels are few. Every entry is one task's.
template <typename T>
struct Sampling {
  const SparseIndex& index;
  Tiles tiles;
  const T* grad_output;
  const T* input;
  float* sums;
  float* grad_bias;  // null if it is not wanted
  bool accumulate;

  int64_t parts(int threads) const {
    const int64_t wanted =
        max(ceil_div(tuning::kTasksPerThread * threads, index.panels), index.cols > index.rows ? int64_t{threads} : 1);
    return min(wanted, index.blocks);
  }
  int64_t tasks(int threads) const { return index.panels * parts(threads); }

  // The tasks that fall to one thread.
  void work(int threads, TaskQueue& queue, int64_t number) const {
    OwnTiles<T> x(Slot::kPanelA, input, tiles, index.cols, index.block_cols);
    const int64_t padded = ceil_div(min(index.panel_rows, index.rows), L) * L;
    float* const dy = static_cast<float*>(scratch(Slot::kPanelB, padded * tiles.width() * sizeof(float)));
    TaskQueue::Worker worker(queue, number);
    const int64_t of_panel = parts(threads);
    for (int64_t task; (task = worker.take()) >= 0;) {
      const int64_t panel = task % index.panels, part = task / index.panels;
      const int64_t row = panel * index.panel_rows, rows = min(index.panel_rows, index.rows - row);
      for (int64_t t = 0; t < tiles.count(); ++t) {
        const int vectors = tiles.vectors_of(t);
        const bool adds = accumulate || t > 0;
        pack_tile(grad_output + t * tiles.width() * index.rows + row, index.rows, tiles.lanes(t), vectors, rows, dy);
        if (grad_bias && part == 0) add_up_rows(dy, rows, vectors, grad_bias + row, adds);
        for (int64_t block = part * index.blocks / of_panel; block < (part + 1) * index.blocks / of_panel; ++block) {
          const int64_t tile = panel * index.blocks + block;
          prefetch_tile(index, tile + 1);
          sample_tile(index, tile, vectors, x.block(t, block), dy, sums + index.panel_values[panel], adds);
        }
      }
    }
  }
};

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
    const Sampling<T> sampling = {index,   tiles, grad_output + m * index.rows, input + m * index.cols, sums,
                                  nullptr, m > 0};
    TaskQueue queue(sampling.tasks(team.threads), team.threads);
    team.for_each(team.threads, [&](int64_t number) { sampling.work(team.threads, queue, number); });
  }
  if constexpr (!kIsFloat<T>) {
    team.for_each(ceil_div(nnz, tuning::kPassGrain), [&](int64_t task) {
      const int64_t first = task * tuning::kPassGrain;
      round_floats(sums + first, min(tuning::kPassGrain, nnz - first), grad_values + first);
    });
  }
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
  const int64_t chunk = chunk_of(index), threads = team.threads;
  for (int64_t m = 0; m < M; m += chunk) {
    const int64_t rows = min(chunk, M - m);
    const Tiles tiles = {rows, tile_vectors(transposed)};
    const float *const dy = grad_output + m * index.rows, *const x = input + m * index.cols;
    const Sampling<float> sampling = {index, {rows, tuning::kMaxVectors}, dy, x, grad_values, grad_bias, m > 0};
    TaskQueue products(spmm_tasks(transposed, tiles, team.threads), threads);
    TaskQueue samples(sampling.tasks(team.threads), threads);
    team.for_each(threads, [&](int64_t number) {
      spmm_worker(transposed, values, tiles, dy, grad_input + m * index.cols, team.threads, products, number);
      sampling.work(team.threads, samples, number);
    });
  }
}

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY
