// A linear layer for a few rows of input, where a weight is used too seldom to be worth packing: the weight streams by
// as it lies, its bits the predicate of the load, and what it meets is small enough for the caches.
//
// Forward takes a few rows of the weight at a time, each a dot product with every row of input: both run along K.
// grad_input takes a strip of columns, in it blocks of rows, in those tiles of columns that stay in registers down the
// block; or, where input is so narrow that a strip of its gradient stays in L1, four rows after four. Both prefetch by
// hand: a strip's lines are a row apart, and a row's end is another row's beginning. grad_weight writes tiles of a few
// rows and vectors.
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

struct Rows4 {
  const float* dy;  // [M][ldy], from the first of the rows on
  int64_t ldy;
  const float* weight;  // of the first row, at the strip's first column
  int64_t ldw, ahead;   // ahead: floats to what is prefetched
  Bits bits;            // of the first row
  int64_t column, columns;
  bool accumulate;
  float* dx;  // [M][ldw], at the strip's first column
};

// dx[m][strip] (+)= sum over R rows of dy[m][row] * weight[row][strip].
template <int M, int R>
__attribute__((noinline)) void axpy_rows(const Rows4& o) {
  Vec dy[M][R];
  MASKED_OPS_UNROLL
  for (int m = 0; m < M; ++m) {
    MASKED_OPS_UNROLL
    for (int r = 0; r < R; ++r) dy[m][r] = Vec::set1(o.dy[m * o.ldy + r]);
  }
  const auto step = [&](int64_t k, auto tail) __attribute__((always_inline)) {
    Vec w[R];
    MASKED_OPS_UNROLL
    for (int r = 0; r < R; ++r) {
      prefetch(o.weight + r * o.ldw + k + o.ahead);
      w[r] = Vec::loadu(Vec::predicate(o.bits.row(r), o.column + k), o.weight + r * o.ldw + k);
    }
    const auto valid = Vec::first(o.columns - k);
    MASKED_OPS_UNROLL
    for (int m = 0; m < M; ++m) {
      float* const to = o.dx + m * o.ldw + k;
      Vec sum = !o.accumulate ? Vec::zero() : decltype(tail)::value ? Vec::loadu(valid, to) : Vec::loadu(to);
      MASKED_OPS_UNROLL
      for (int r = 0; r < R; ++r) sum = fmadd(dy[m][r], w[r], sum);
      decltype(tail)::value ? sum.storeu(valid, to) : sum.storeu(to);
    }
  };
  int64_t k = 0;
  for (; k + L <= o.columns; k += L) step(k, Int<0>());
  if (k < o.columns) step(k, Int<1>());
}

// --- grad_weight -----------------------------------------------------------------------------------------------------

struct Outer {
  int64_t M;
  const float* dy;  // [M][ldy], at the tile's first row
  int64_t ldy;
  const float* x;  // [M][K], at the tile's first column
  int64_t K;
  Bits bits;  // of the tile's first row
  int64_t column, columns;
  float* dw;  // the tile's corner
};

// dw[r][tile] = masked(sum over m of dy[m][r] * x[m][tile]).
template <int R, int NV>
__attribute__((noinline)) void outer(const Outer& o) {
  Vec sum[R][NV];
  MASKED_OPS_UNROLL
  for (int r = 0; r < R; ++r) {
    MASKED_OPS_UNROLL
    for (int j = 0; j < NV; ++j) sum[r][j] = Vec::zero();
  }
  const auto valid = [&](int j) { return Vec::first(o.columns - j * L); };
  const bool full = o.columns == NV * L;
  for (int64_t m = 0; m < o.M; ++m) {
    const float* const from = o.x + m * o.K;
    Vec x[NV];
    MASKED_OPS_UNROLL
    for (int j = 0; j < NV; ++j) x[j] = full ? Vec::loadu(from + j * L) : Vec::loadu(valid(j), from + j * L);
    MASKED_OPS_UNROLL
    for (int r = 0; r < R; ++r) {
      const Vec dy = Vec::set1(o.dy[m * o.ldy + r]);
      MASKED_OPS_UNROLL
      for (int j = 0; j < NV; ++j) sum[r][j] = fmadd(dy, x[j], sum[r][j]);
    }
  }
  MASKED_OPS_UNROLL
  for (int r = 0; r < R; ++r) {
    const uint64_t* const bits = o.bits.row(r);
    float* const to = o.dw + r * o.K;
    MASKED_OPS_UNROLL
    for (int j = 0; j < NV; ++j) {
      const Vec v = sum[r][j].select(Vec::predicate(bits, o.column + j * L));
      full ? v.storeu(to + j * L) : v.storeu(valid(j), to + j * L);
    }
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

namespace {

// Strips of columns of equal width, a multiple of `unit`; every thread has the same number of them.
int64_t strip_width(const Team& team, int64_t K, int64_t most, int64_t unit) {
  const int64_t wanted = ceil_div(ceil_div(K, most), team.threads) * team.threads;
  return ceil_div(ceil_div(K, wanted), unit) * unit;
}

void grad_input_by_rows(const Team& team, int64_t M, int64_t N, int64_t K, const float* grad_output,
                        const float* weight, Bits bits, float* grad_input) {
  constexpr int64_t kRows = 4;
  const int64_t strip = strip_width(team, K, tuning::kAxpyStrip, L);
  team.for_each(ceil_div(K, strip), [&](int64_t task) {
    const int64_t k = task * strip;
    for (int64_t n = 0; n < N; n += kRows) {
      const int64_t ahead = n + 2 * kRows <= N ? kRows * K : 0;
      const Rows4 o = {grad_output + n,   N,     weight + n * K + k, K, ahead, {bits.row(n), bits.stride}, k,
                       min(strip, K - k), n > 0, grad_input + k};
      with_int<tuning::kAxpyRows>(M, [&](auto height) {
        with_int<kRows>(min(kRows, N - n),
                        [&](auto rows) { axpy_rows<decltype(height)::value, decltype(rows)::value>(o); });
      });
    }
  });
}

}  // namespace

void linear_grad_input_small(const Team& team, int64_t M, int64_t N, int64_t K, const float* grad_output,
                             const float* weight, Bits bits, float* grad_input) {
  if (M <= tuning::kAxpyRows) return grad_input_by_rows(team, M, N, K, grad_output, weight, bits, grad_input);
  const RowTiles tiles(M);
  const int64_t width = weight_vectors(int(tiles.height)) * L;  // of a tile
  const int64_t strip = strip_width(team, K, tuning::kSmallStrip, width);
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

void linear_grad_weight_small(const Team& team, int64_t M, int64_t N, int64_t K, const float* grad_output,
                              const float* input, Bits bits, float* grad_weight) {
  constexpr int kRows = tuning::kOuterRows, kVectors = tuning::kOuterVectors;
  const int64_t rows = max<int64_t>(ceil_div(tuning::kSmallGrain, K), kRows) / kRows * kRows;  // of a task
  team.for_each(ceil_div(N, rows), [&](int64_t task) {
    const int64_t last = min(N, (task + 1) * rows);
    for (int64_t n = task * rows; n < last; n += kRows) {
      for (int64_t k = 0; k < K; k += kVectors * L) {
        const Outer o = {M,
                         grad_output + n,
                         N,
                         input + k,
                         K,
                         {bits.row(n), bits.stride},
                         k,
                         min<int64_t>(kVectors * L, K - k),
                         grad_weight + n * K + k};
        with_int<kRows>(min<int64_t>(kRows, last - n), [&](auto height) {
          with_int<kVectors>(ceil_div(o.columns, L),
                             [&](auto vectors) { outer<decltype(height)::value, decltype(vectors)::value>(o); });
        });
      }
    }
  });
}

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY
