// A linear layer for a few rows of input, where a weight is used too seldom to be worth packing: the weight streams by
// as it lies, its bits the predicate of the load, and what it meets is small enough for the caches.
//
// Forward takes a few rows of the weight at a time, each a dot product with every row of input: both run along K.
// grad_input takes a strip of columns, in it blocks of rows, in those tiles of columns that stay in registers down the
// block. Both prefetch by hand: a strip's lines are a row apart, and a row's end is another row's beginning.
#include "kernels.h"
#include "tuning.h"

namespace masked_ops::cpu::MASKED_OPS_CAPABILITY {
namespace {

constexpr int L = Vec::kLanes;

// Rows of input that are taken at once, and rows of the weight or vectors of its columns beside them.
constexpr int kMaxRows = tuning::kSmallTile;
constexpr int weight_rows(int rows) { return min(tuning::kSmallSums / rows, 4); }
constexpr int weight_vectors(int rows) { return min(tuning::kSmallSums / rows, tuning::kSmallVectors); }

// Tiles of equal height, at most kMaxRows.
struct RowTiles {
  int64_t rows, count, height;
  explicit RowTiles(int64_t M) : rows(M), count(ceil_div(M, kMaxRows)), height(ceil_div(M, count)) {}
  int64_t begin(int64_t tile) const { return tile * height; }
  int64_t size(int64_t tile) const { return min(height, rows - tile * height); }
};

// kernel(Int<n>) for a number of rows, or of vectors, that is known only now.
template <int N, typename Kernel>
MASKED_OPS_INLINE void with_int(int64_t n, const Kernel& kernel) {
  if constexpr (N > 1) {
    if (n < N) return with_int<N - 1>(n, kernel);
  }
  kernel(Int<N>());
}

// --- forward ---------------------------------------------------------------------------------------------------------

struct Dots {
  const float* x;  // [M][K]
  int64_t K;
  const float* weight;  // of the first row
  Bits bits;            // likewise
  const float* ahead;   // the rows that come next, null if there are none to prefetch
  const float* bias;    // null for none
  float* y;             // [M][N]
  int64_t N;
};

// y[m][r] = x[m] . weight[r] + bias[r] for M rows of input and R rows of the weight.
template <int M, int R>
__attribute__((noinline)) void dots(const Dots& o) {
  Vec sum[M][R];
  MASKED_OPS_UNROLL
  for (int m = 0; m < M; ++m) {
    MASKED_OPS_UNROLL
    for (int r = 0; r < R; ++r) sum[m][r] = Vec::zero();
  }
  const int64_t K = o.K, whole = K / L * L;
  const auto step = [&](int64_t k, auto tail) __attribute__((always_inline)) {
    Vec w[R];
    MASKED_OPS_UNROLL
    for (int r = 0; r < R; ++r) w[r] = Vec::loadu(Vec::predicate(o.bits.row(r), k), o.weight + r * K + k);
    MASKED_OPS_UNROLL
    for (int m = 0; m < M; ++m) {
      const Vec x =
          decltype(tail)::value ? Vec::loadu(Vec::first(K - k), o.x + m * K + k) : Vec::loadu(o.x + m * K + k);
      MASKED_OPS_UNROLL
      for (int r = 0; r < R; ++r) sum[m][r] = fmadd(x, w[r], sum[m][r]);
    }
  };
  // Prefetches at first from these rows, then from the next.
  const int64_t ahead = o.ahead ? min(tuning::kFloatsAhead, whole) : 0;
  int64_t k = 0;
  const auto run = [&](int64_t end, const float* next) __attribute__((always_inline)) {
    for (; k < end; k += L) {
      MASKED_OPS_UNROLL
      for (int r = 0; r < R; ++r) prefetch(next + r * K + k);
      step(k, Int<0>());
    }
  };
  if (ahead) {
    run(whole - ahead, o.weight + ahead);
    run(whole, o.ahead - (whole - ahead));
  } else {
    for (; k < whole; k += L) step(k, Int<0>());
  }
  if (k < K) step(k, Int<1>());
  MASKED_OPS_UNROLL
  for (int m = 0; m < M; ++m) {
    MASKED_OPS_UNROLL
    for (int r = 0; r < R; ++r) o.y[m * o.N + r] = sum[m][r].sum() + (o.bias ? o.bias[r] : 0);
  }
}

// --- grad_input ------------------------------------------------------------------------------------------------------

// What a block of rows of the weight prefetches of the next: its lines, row by row.
class Ahead {
 public:
  Ahead(const float* first, int64_t ld, int64_t rows, int64_t columns)
      : row_(first), at_(first), ld_(ld), rows_(rows), columns_(columns) {}

  MASKED_OPS_INLINE void lines(int n) {
    if (rows_ <= 0) return;
    for (int i = 0; i < n; ++i) prefetch(at_ + i * kLine);
    at_ += n * kLine;
    if (at_ >= row_ + columns_) {
      at_ = row_ += ld_;
      --rows_;
    }
  }

 private:
  static constexpr int kLine = 64 / sizeof(float);
  const float *row_, *at_;
  int64_t ld_, rows_, columns_;
};

struct Axpys {
  const float* dy;  // [M][ldy], from the block's first row of the weight on
  int64_t ldy, rows;
  const float* weight;  // of the block's first row, at the tile's first column
  int64_t ldw;
  Bits bits;  // of the block's first row
  int64_t column, columns;
  bool accumulate;
  float* dx;  // [M][ldw], at the tile's first column
};

// dx[m][tile] (+)= sum over the block's rows of dy[m][row] * weight[row][tile].
template <int M, int NV>
__attribute__((noinline)) void axpys(const Axpys& o, Ahead& ahead) {
  Vec sum[M][NV];
  const auto valid = [&](int j) { return Vec::first(o.columns - j * L); };
  MASKED_OPS_UNROLL
  for (int m = 0; m < M; ++m) {
    MASKED_OPS_UNROLL
    for (int j = 0; j < NV; ++j) {
      sum[m][j] = o.accumulate ? Vec::loadu(valid(j), o.dx + m * o.ldw + j * L) : Vec::zero();
    }
  }
  const float* w = o.weight;
  for (int64_t n = 0; n < o.rows; ++n, w += o.ldw) {
    const uint64_t* const bits = o.bits.row(n);
    Vec v[NV];
    MASKED_OPS_UNROLL
    for (int j = 0; j < NV; ++j) v[j] = Vec::loadu(Vec::predicate(bits, o.column + j * L), w + j * L);
    ahead.lines(ceil_div(NV * L * int{sizeof(float)}, 64));
    MASKED_OPS_UNROLL
    for (int m = 0; m < M; ++m) {
      const Vec dy = Vec::set1(o.dy[m * o.ldy + n]);
      MASKED_OPS_UNROLL
      for (int j = 0; j < NV; ++j) sum[m][j] = fmadd(dy, v[j], sum[m][j]);
    }
  }
  MASKED_OPS_UNROLL
  for (int m = 0; m < M; ++m) {
    MASKED_OPS_UNROLL
    for (int j = 0; j < NV; ++j) sum[m][j].storeu(valid(j), o.dx + m * o.ldw + j * L);
  }
}

}  // namespace

void linear_small(const Team& team, int64_t M, int64_t N, int64_t K, const float* input, const float* weight, Bits bits,
                  const float* bias, float* output) {
  const RowTiles tiles(M);
  const int64_t group = weight_rows(int(tiles.height));
  const int64_t rows = max(ceil_div(tuning::kSmallGrain, max<int64_t>(K, 1)), group) / group * group;  // of a task
  team.for_each(ceil_div(N, rows), [&](int64_t task) {
    const int64_t last = min(N, (task + 1) * rows);
    for (int64_t n = task * rows; n < last; n += group) {
      const int64_t next = n + 2 * group <= N ? n + group : -1;
      for (int64_t t = 0; t < tiles.count; ++t) {
        const int64_t m = tiles.begin(t);
        const Dots o = {input + m * K,
                        K,
                        weight + n * K,
                        {bits.row(n), bits.stride},
                        t == 0 && next >= 0 ? weight + next * K : nullptr,
                        bias ? bias + n : nullptr,
                        output + m * N + n,
                        N};
        with_int<kMaxRows>(tiles.size(t), [&](auto height) {
          constexpr int kRows = decltype(height)::value;
          with_int<4>(min(group, last - n), [&](auto weights) {
            if constexpr (decltype(weights)::value * kRows <= tuning::kSmallSums) {
              dots<kRows, decltype(weights)::value>(o);
            }
          });
        });
      }
    }
  });
}

void linear_grad_input_small(const Team& team, int64_t M, int64_t N, int64_t K, const float* grad_output,
                             const float* weight, Bits bits, float* grad_input) {
  const RowTiles tiles(M);
  const int64_t width = weight_vectors(int(tiles.height)) * L;  // of a tile
  const int64_t wanted = ceil_div(ceil_div(K, tuning::kSmallStrip), team.threads) * team.threads;
  const int64_t strip = ceil_div(ceil_div(K, wanted), width) * width;
  team.for_each(ceil_div(K, strip), [&](int64_t task) {
    const int64_t begin = task * strip, end = min(K, begin + strip);
    for (int64_t n = 0; n < N; n += tuning::kSmallBlock) {
      const int64_t rows = min(tuning::kSmallBlock, N - n), next = n + tuning::kSmallBlock;
      Ahead ahead(weight + next * K + begin, K, min(tuning::kSmallBlock, N - next), end - begin);
      for (int64_t k = begin; k < end; k += width) {
        Ahead none(nullptr, 0, 0, 0);
        for (int64_t t = 0; t < tiles.count; ++t) {
          const int64_t m = tiles.begin(t);
          const Axpys o = {grad_output + m * N + n,
                           N,
                           rows,
                           weight + n * K + k,
                           K,
                           {bits.row(n), bits.stride},
                           k,
                           min(width, end - k),
                           n > 0,
                           grad_input + m * K + k};
          with_int<kMaxRows>(tiles.size(t), [&](auto height) {
            constexpr int kRows = decltype(height)::value;
            with_int<tuning::kSmallVectors>(ceil_div(o.columns, L), [&](auto vectors) {
              if constexpr (decltype(vectors)::value * kRows <= tuning::kSmallSums) {
                axpys<kRows, decltype(vectors)::value>(o, t == 0 ? ahead : none);
              }
            });
          });
        }
      }
    }
  });
}

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY
