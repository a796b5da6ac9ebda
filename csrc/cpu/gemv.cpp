// Forward for a few rows of input: a few rows of the weight at a time, each a dot product with every row of input. A
// chunk's sums stay vectors, which wait in memory for the next chunk.
#include "gemv.h"

namespace masked_ops::cpu::MASKED_OPS_CAPABILITY {
namespace {

constexpr int L = Vec::kLanes;
constexpr RegisterTile kTile = {tuning::kSmallTile, tuning::kSmallRegisters};

using tuning::kTileChunk;
using tuning::kTilesChunk;

template <typename T>
struct Dots {
  static constexpr int64_t kMostFar = far_rows<T>(tuning::kMostFar);  // rows of input
  const float* x;                                                     // the chunk of the tile's operands
  int64_t begin, end;                                                 // elements of a row of the weight
  int64_t K;
  const T* weight;  // of the first row
  Bits bits;        // likewise
  const T* ahead;   // what is fetched ahead of the first row
  int64_t pace;     // elements that it moves by with every vector
  Vec* sums;        // [M][R], of the chunks before, unless this is the first; and for the next
  const T* bias;    // null for none
  T* y;             // [M][N]; if this is the last chunk
  int64_t N;

  template <int M, int R>
  void advance() {
    weight += R * K;
    bits.words += R * bits.stride;
    ahead += R * K;
    sums += M * R;
    bias += bias ? R : 0;
    y += R;
  }
};

// y[m][r] = x[m] . weight[r] + bias[r] for M rows of input and R rows of the weight.
template <int M, int R, bool kFar, typename T>
MASKED_OPS_INLINE void take_group(const Dots<T>& o) {
  constexpr int kStep = L * Operand<T>::kDepth;  // elements of a vector
  constexpr bool kWords = M == 1 && Vec::kWordVectors > 1;
  constexpr bool kPlain = kFar && tuning::kFarPlain;
  static_assert(kWords || !kPlain);
  constexpr int W = kWords ? Vec::kWordVectors : 1;
  constexpr int kSets = M * R == 1 ? W : 1;  // a single chain of sums would be slower than memory
  Vec sets[kSets][M][R] = {};
  Vec(&sum)[M][R] = sets[0];
  if (o.begin) copy_vectors<M * R>(o.sums, sum[0]);
  const int64_t K = o.K;
  const T* ahead = o.ahead;
  const float* x = o.x;
  for (int64_t k = o.begin; k < o.end; k += W * kStep, x += W * M * L, ahead += W * o.pace) {
    typename Operand<T>::Word words[R];
    if constexpr (kWords) {
      MASKED_OPS_UNROLL
      for (int r = 0; r < R; ++r) words[r] = Operand<T>::word(o.bits.row(r), k);
    }
    MASKED_OPS_UNROLL
    for (int j = 0; j < W; ++j) {
      const int64_t at = k + j * kStep;
      Vec w[R];
      MASKED_OPS_UNROLL
      for (int r = 0; r < R; ++r) {
        const T* const p = o.weight + r * K + at;
        if constexpr (kPlain) {
          w[r] = load_plain(Vec::signs(words[r], j), K - at, p);
        } else {
          w[r] = kWords ? Operand<T>::along(words[r], j, K - at, p) : Operand<T>::along(o.bits.row(r), at, K - at, p);
        }
      }
      MASKED_OPS_UNROLL
      for (int m = 0; m < M; ++m) {
        const Vec operand = in_register(Vec::load(x + (j * M + m) * L));
        MASKED_OPS_UNROLL
        for (int r = m * R / M; r < (m + 1) * R / M; ++r) {
          if (!kPlain && fetches_with<T>(j)) prefetch<kFar>(ahead + r * K + j * o.pace);
        }
        MASKED_OPS_UNROLL
        for (int r = 0; r < R; ++r) {
          Vec& s = sets[j % kSets][m][r];
          s = Operand<T>::multiply_add(operand, w[r], s);
        }
      }
    }
  }
  MASKED_OPS_UNROLL
  for (int i = 1; i < kSets; ++i) sum[0][0] = sum[0][0] + sets[i][0][0];
  if (o.end < K) return copy_vectors<M * R>(sum[0], o.sums);
  store_dots<M, R>(sum, o.bias, o.y, o.N);
}

template <typename T>
void forward(const Team& team, int64_t M, int64_t N, int64_t K, const T* input, const T* weight, Bits bits,
             const T* bias, T* output) {
  static constexpr KernelTable<Dots<T>, kTile> kKernels;
  constexpr int kDepth = Operand<T>::kDepth;
  const RowTiles tiles(M, kTile.rows);
  const int64_t most_by_row = kConverts<T> ? 1 : tuning::kMostByRow;
  const bool waits = tuning::kWaits && !kConverts<T> && (tiles.count == 1 || kDepth > 1);
  const Reading reading =
      Reading::of(M, N * K * int64_t{sizeof(T)}, ceil_div(K, kDepth), Dots<T>::kMostFar, most_by_row, waits);
  const int64_t chunk = reading.chunk<T>(tiles, kDepth, tiles.count == 1 ? kTileChunk : kTilesChunk);
  const Chunks chunks(M, ceil_div(K, kDepth), chunk);
  const int64_t height = reading.group_rows(kTile, tiles), width = chunks.width * kDepth;
  const int64_t most = groups_of_step(height * min(width, K) * int64_t{sizeof(T)}, reading.step());
  const int64_t waiting = reading.waits ? tuning::kWaitingRows : tuning::kWaitingSums / M;
  const int64_t block = K <= width ? N : max(waiting / height, int64_t{1}) * height;
  const int64_t grain = ceil_div(tuning::kSmallGrain, max<int64_t>(K, 1));
  const int64_t rows =
      ceil_div(max(grain, ceil_div(N, team.threads * tuning::kSmallTasks)), height) * height;  // of a task
  const int64_t tasks = ceil_div(N, rows);
  const int64_t workers = min<int64_t>(team.threads, tasks);
  TaskQueue queue(tasks, workers);
  // Each thread packs the input for itself: what another one has packed would come from that one's caches.
  team.for_each(workers, [&](int64_t number) {
    TaskQueue::Worker worker(queue, number);
    int64_t task = worker.take();
    if (task < 0) return;
    float* const x = static_cast<float*>(scratch(Slot::kPanelA, size_t(chunks.size()) * sizeof(float)));
    pack(chunks, tiles, K, input, x);
    Vec* const sums = static_cast<Vec*>(scratch(Slot::kAccumulator, size_t(min(block, rows) * M) * sizeof(Vec)));
    for (; task >= 0; task = worker.take()) {
      const int64_t first = task * rows, last = min(N, first + rows);
      Walk at = {height, 1, most, block, width, first, last, 0, K};
      Walk ahead = ahead_of(at, reading.ahead(), most * height * min(width, K) * int64_t{sizeof(T)});
      for (; !at.done(); at.advance()) {
        const int64_t n = at.row, k = at.column / kDepth, columns = chunks.size(k) * kDepth;
        const T* next = weight + n * K + at.column;
        if (!ahead.done()) {
          next = weight + ahead.row * K + ahead.column;
          if (reading.waits) fetch_bits(bits, ahead, columns);
          ahead.advance();
        }
        if (reading.by_row && M > 1) next = weight + n * K + at.column + tuning::kRowAhead / int64_t{sizeof(T)};
        if (reading.waits) wait_for(at, weight, K, bits, columns);
        for (int64_t t = 0; t < tiles.count; ++t) {
          const int64_t m = tiles.begin(t);
          const Dots<T> group = {chunks.at(x, k, m),
                                 at.column,
                                 min(at.column + columns, K),
                                 K,
                                 weight + n * K,
                                 {bits.row(n), bits.stride},
                                 next + columns / tiles.count * t,
                                 L * kDepth / tiles.count,
                                 sums + (n - at.top) * M + m * at.rows(),
                                 bias ? bias + n : nullptr,
                                 output + m * N + n,
                                 N};
          kKernels(reading.far, tiles.size(t), at.group_rows())(group, at.groups());
        }
      }
    }
  });
}

}  // namespace

void linear_small(const Team& team, Dtype dtype, int64_t M, int64_t N, int64_t K, const void* input, const void* weight,
                  Bits bits, const void* bias, void* output) {
  with_element(dtype, [&](auto element) {
    using T = decltype(element);
    forward(team, M, N, K, static_cast<const T*>(input), static_cast<const T*>(weight), bits,
            static_cast<const T*>(bias), static_cast<T*>(output));
  });
}

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY
