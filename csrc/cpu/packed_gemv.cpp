// Forward of a packed weight for a few rows of input, many weights remaining: what gemv.cpp is for a dense weight. The
// values of a row are expanded under its bits on their way into registers and multiplied there. Where the next value
// lies follows from the bits alone, so that no load waits for another.
#include "packed_rows.h"

namespace masked_ops::cpu::MASKED_OPS_CAPABILITY {
namespace {

constexpr int L = Vec::kLanes;
constexpr RegisterTile kTile = {tuning::kSmallTile, tuning::kSmallRegisters};

template <typename T>
struct ExpandedDots {
  static constexpr int64_t kMostFar = kTile.rows;
  const float* x;      // the chunk of the tile's operands
  int64_t begin, end;  // columns, from a whole word on
  bool last;           // of all chunks
  const T** next;      // of each row the values from here on
  Bits bits;           // of the first row
  Vec* sums;           // [M][R], of the chunks before, unless this is the first; and for the next
  const T* bias;       // null for none
  T* y;                // [M][N]; if this is the last chunk
  int64_t N;

  template <int M, int R>
  void advance() {
    next += R;
    bits.words += R * bits.stride;
    sums += M * R;
    bias += bias ? R : 0;
    y += R;
  }
};

// y[m][r] = x[m] . weight[r] + bias[r] for M rows of input and R rows of the weight.
template <int M, int R, bool kFar, typename T>
MASKED_OPS_INLINE void take_group(const ExpandedDots<T>& o) {
  constexpr int kStep = L * Operand<T>::kDepth;  // elements of a vector
  Vec sum[M][R] = {};
  if (o.begin) copy_vectors<M * R>(o.sums, sum[0]);
  const T* in[R];
  MASKED_OPS_UNROLL
  for (int r = 0; r < R; ++r) in[r] = o.next[r];
  const float* x = o.x;
  int64_t ahead = 0;
  if constexpr (kFar) ahead = bytes_of_group<R>(in);
  for (int64_t k = o.begin; k < o.end; k += 64) {
    if constexpr (kFar) {
      MASKED_OPS_UNROLL
      for (int r = 0; r < R; ++r) fetch_values(in[r], ahead);
    }
    MASKED_OPS_UNROLL
    for (int j = 0; j < 64; j += kStep, x += M * L) {
      if (j > 0 && k + j >= o.end) break;
      Vec w[R];
      MASKED_OPS_UNROLL
      for (int r = 0; r < R; ++r) w[r] = Operand<T>::expand(o.bits.row(r), k + j, in[r]);
      MASKED_OPS_UNROLL
      for (int m = 0; m < M; ++m) {
        const Vec operand = in_register(Vec::load(x + m * L));
        MASKED_OPS_UNROLL
        for (int r = 0; r < R; ++r) sum[m][r] = Operand<T>::multiply_add(operand, w[r], sum[m][r]);
      }
    }
  }
  if (o.last) return store_dots<M, R>(sum, o.bias, o.y, o.N);
  MASKED_OPS_UNROLL
  for (int r = 0; r < R; ++r) o.next[r] = in[r];
  copy_vectors<M * R>(sum[0], o.sums);
}

template <typename T>
void forward(const Team& team, int64_t M, const PackedWeight& w, const T* input, const T* bias, T* output) {
  static constexpr KernelTable<ExpandedDots<T>, kTile> kKernels;
  constexpr int64_t kDepth = Operand<T>::kDepth;
  const int64_t N = w.rows, K = w.cols;
  const bool far = fetches_far<T>(w);
  const PackedRows<T> values(w);
  const RowTiles tiles(M, kTile.rows);
  const int64_t widest = M == 1 ? tuning::kRowChunk : tiles.count == 1 ? tuning::kTileChunk : tuning::kTilesChunk;
  const Chunks chunks(M, padded_columns<T>(w), widest);
  const int64_t height = kTile.weights(int(tiles.height));
  const int64_t grain = max(ceil_div(tuning::kSmallGrain, K), ceil_div(N, team.threads * tuning::kSmallTasks));
  const int64_t rows = ceil_div(grain, height) * height;  // of a task
  // Rows that all chunks, and all tiles of each, pass before the next.
  const int64_t waiting = chunks.count() > 1 ? tuning::kWaitingSums / M : rows;
  const int64_t again = tiles.count > 1 ? tuning::kFewRowsPiece / (K * int64_t{sizeof(T)}) : rows;
  const int64_t block = min(max(min(waiting, again) / height, int64_t{1}) * height, rows);
  const int64_t tasks = ceil_div(N, rows), workers = min<int64_t>(team.threads, tasks);
  TaskQueue queue(tasks, workers);
  // Each thread packs the input for itself, as in gemv.cpp.
  team.for_each(workers, [&](int64_t number) {
    TaskQueue::Worker worker(queue, number);
    int64_t task = worker.take();
    if (task < 0) return;
    float* const x = static_cast<float*>(scratch(Slot::kPanelA, size_t(chunks.size()) * sizeof(float)));
    pack(chunks, tiles, K, input, x);
    Vec* const sums = static_cast<Vec*>(scratch(Slot::kAccumulator, size_t(block * M) * sizeof(Vec)));
    const T** const next = static_cast<const T**>(scratch(Slot::kPlaces, size_t(block * tiles.count) * sizeof(T*)));
    for (; task >= 0; task = worker.take()) {
      const int64_t last = min(N, (task + 1) * rows);
      for (int64_t top = task * rows; top < last; top += block) {
        const int64_t count = min(block, last - top);
        for (int64_t t = 0; t < tiles.count; ++t) values.begin(top, count, 0, next + t * block);
        for (int64_t k = 0; k < chunks.columns; k += chunks.width) {
          const int64_t end = k + chunks.size(k);
          for (int64_t t = 0; t < tiles.count; ++t) {
            const int64_t m = tiles.begin(t), tile_rows = tiles.size(t);
            for_groups(top, count, height, 1, [&](int64_t n, int64_t group_rows, int64_t groups) {
              const ExpandedDots<T> group = {chunks.at(x, k, m),
                                             k * kDepth,
                                             min(end * kDepth, K),
                                             end == chunks.columns,
                                             next + t * block + (n - top),
                                             {w.bits.row(n), w.bits.stride},
                                             sums + block * m + (n - top) * tile_rows,
                                             bias ? bias + n : nullptr,
                                             output + m * N + n,
                                             N};
              kKernels(far, tile_rows, group_rows)(group, groups);
            });
          }
        }
      }
    }
  });
}

}  // namespace

void packed_linear_small(const Team& team, Dtype dtype, int64_t M, const PackedWeight& weight, const void* input,
                         const void* bias, void* output) {
  with_element(dtype, [&](auto element) {
    using T = decltype(element);
    if constexpr (Operand<T>::kExpands) {
      forward(team, M, weight, static_cast<const T*>(input), static_cast<const T*>(bias), static_cast<T*>(output));
    }
  });
}

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY
