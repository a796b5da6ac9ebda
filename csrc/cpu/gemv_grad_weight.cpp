// grad_weight for a few rows of input, masked as it is written: tiles of a few rows and vectors, or row by row.
#include "gemv.h"

namespace masked_ops::cpu::MASKED_OPS_CAPABILITY {
namespace {

constexpr int L = Vec::kLanes;

template <typename T>
struct Outer {
  int64_t M;
  const T* dy;  // [M][ldy], at the tile's first row
  int64_t ldy;
  const T* x;  // [M][K], at the tile's first column
  int64_t K;
  Bits bits;  // of the tile's first row
  int64_t column, columns;
  T* dw;  // the tile's corner
};

// dw[r][tile] = masked(sum over m of dy[m][r] * x[m][tile]).
template <int R, bool kFull, typename T>
__attribute__((noinline)) void outer(const Outer<T>& o) {
  constexpr int NV = tuning::kOuterVectors;
  Vec sum[R][NV];
  MASKED_OPS_UNROLL
  for (int r = 0; r < R; ++r) {
    MASKED_OPS_UNROLL
    for (int j = 0; j < NV; ++j) sum[r][j] = Vec::zero();
  }
  for (int64_t m = 0; m < o.M; ++m) {
    const T* const from = o.x + m * o.K;
    Vec x[NV];
    MASKED_OPS_UNROLL
    for (int j = 0; j < NV; ++j) x[j] = kFull ? load_floats(from + j * L) : load_first(o.columns - j * L, from + j * L);
    MASKED_OPS_UNROLL
    for (int r = 0; r < R; ++r) {
      const Vec dy = Vec::set1(to_float(o.dy[m * o.ldy + r]));
      MASKED_OPS_UNROLL
      for (int j = 0; j < NV; ++j) sum[r][j] = fmadd(dy, x[j], sum[r][j]);
    }
  }
  MASKED_OPS_UNROLL
  for (int r = 0; r < R; ++r) {
    const uint64_t* const bits = o.bits.row(r);
    T* const to = o.dw + r * o.K;
    MASKED_OPS_UNROLL
    for (int j = 0; j < NV; ++j) {
      if (!kFull && j * L >= o.columns) break;
      const Vec v = sum[r][j].select(Vec::predicate(bits, o.column + j * L));
      kFull ? store_floats(v, to + j * L) : store_floats(v, o.columns - j * L, to + j * L);
    }
  }
}

// dw[k] = masked(sum over m of dy[m] * x[m][k]): a row, for so few m that the call of a tile would outlast it.
template <int M, typename T>
void outer_row(const Outer<T>& o) {
  Vec dy[M];
  MASKED_OPS_UNROLL
  for (int m = 0; m < M; ++m) dy[m] = Vec::set1(to_float(o.dy[m * o.ldy]));
  for (int64_t k = 0; k < o.K; k += 64) {
    const uint64_t word = o.bits.words[k / 64];
    const auto step = [&](int j, auto tail) __attribute__((always_inline)) {
      const int64_t left = o.K - k - j;
      Vec sum = Vec::zero();
      MASKED_OPS_UNROLL
      for (int m = 0; m < M; ++m) {
        const T* const from = o.x + m * o.K + k + j;
        sum = fmadd(dy[m], decltype(tail)::value ? load_first(left, from) : load_floats(from), sum);
      }
      sum = sum.select(Vec::predicate(word >> j));
      decltype(tail)::value ? store_floats(sum, left, o.dw + k + j) : store_floats(sum, o.dw + k + j);
    };
    if (o.K - k >= 64) {
      MASKED_OPS_UNROLL
      for (int j = 0; j < 64; j += L) step(j, Int<0>());
    } else {
      for (int j = 0; k + j < o.K; j += L) step(j, Int<1>());
    }
  }
}

template <typename T>
void grad_weight(const Team& team, int64_t M, int64_t N, int64_t K, const T* grad_output, const T* input, Bits bits,
                 T* grad_weight) {
  constexpr int64_t kRows = tuning::kOuterRows, kColumns = tuning::kOuterVectors * L;
  const int64_t rows = max(ceil_div(tuning::kSmallGrain, K), kRows) / kRows * kRows;  // of a task
  team.for_each(ceil_div(N, rows), [&](int64_t task) {
    const int64_t last = min(N, (task + 1) * rows);
    if (M <= tuning::kOuterByRow) {
      for (int64_t n = task * rows; n < last; ++n) {
        const Outer<T> o = {M, grad_output + n, N, input, K, {bits.row(n), bits.stride}, 0, K, grad_weight + n * K};
        with_int<tuning::kOuterByRow>(M, [&](auto height) { outer_row<decltype(height)::value>(o); });
      }
      return;
    }
    for (int64_t n = task * rows; n < last; n += kRows) {
      for (int64_t k = 0; k < K; k += kColumns) {
        const Outer<T> o = {M,
                            grad_output + n,
                            N,
                            input + k,
                            K,
                            {bits.row(n), bits.stride},
                            k,
                            min(kColumns, K - k),
                            grad_weight + n * K + k};
        with_int<kRows>(min(kRows, last - n), [&](auto height) {
          constexpr int kHeight = decltype(height)::value;
          o.columns == kColumns ? outer<kHeight, true>(o) : outer<kHeight, false>(o);
        });
      }
    }
  });
}

}  // namespace

void linear_grad_weight_small(const Team& team, Dtype dtype, int64_t M, int64_t N, int64_t K, const void* dy,
                              const void* x, Bits bits, void* dw) {
  with_element(dtype, [&](auto element) {
    using T = decltype(element);
    grad_weight(team, M, N, K, static_cast<const T*>(dy), static_cast<const T*>(x), bits, static_cast<T*>(dw));
  });
}

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY
