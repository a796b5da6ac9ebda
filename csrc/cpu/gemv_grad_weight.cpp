// grad_weight for a few rows of input, masked as it is written: tiles of a few rows and vectors, or row by row.
#include "gemv.h"

namespace masked_ops::cpu::MASKED_OPS_CAPABILITY {
namespace {

constexpr int L = Vec::kLanes;

template <typename T>
struct Outer {
  int64_t steps;  // rows of both operands
  Operands dy;    // from the tile's first row on
  Operands x;     // from the tile's first column on
  Bits bits;      // of the tile's first row
  int64_t column, columns;
  T* dw;  // the tile's corner
  int64_t ldw;
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
  const float *from = o.x.at, *factors = o.dy.at;
  for (int64_t s = 0; s < o.steps; ++s, from += o.x.ld, factors += o.dy.ld) {
    Vec x[NV];
    MASKED_OPS_UNROLL
    for (int j = 0; j < NV; ++j) x[j] = kFull ? Vec::loadu(from + j * L) : load_first(o.columns - j * L, from + j * L);
    MASKED_OPS_UNROLL
    for (int r = 0; r < R; ++r) {
      const Vec dy = Vec::set1(factors[r]);
      MASKED_OPS_UNROLL
      for (int j = 0; j < NV; ++j) sum[r][j] = Operand<T>::multiply_add(dy, x[j], sum[r][j]);
    }
  }
  MASKED_OPS_UNROLL
  for (int r = 0; r < R; ++r) {
    const uint64_t* const bits = o.bits.row(r);
    T* const to = o.dw + r * o.ldw;
    if constexpr (kFull && kStoresTwo<T>) {
      static_assert(NV % 2 == 0);
      MASKED_OPS_UNROLL
      for (int j = 0; j < NV; j += 2) {
        store_two(Operand<T>::predicate_of_two(bits, o.column + j * L), {sum[r][j], sum[r][j + 1]}, to + j * L);
      }
      continue;
    }
    MASKED_OPS_UNROLL
    for (int j = 0; j < NV; ++j) {
      if (!kFull && j * L >= o.columns) break;
      const Vec v = sum[r][j].select(Vec::signs(bits, o.column + j * L));
      kFull ? store_floats(v, to + j * L) : store_floats(v, o.columns - j * L, to + j * L);
    }
  }
}

// dw = masked(sum over m of dy[m] * x[m]): a row, for so few m that the call of a tile would outlast it.
template <int kSteps, typename T>
MASKED_OPS_INLINE void outer_row(const Outer<T>& o) {
  Vec dy[kSteps];
  MASKED_OPS_UNROLL
  for (int s = 0; s < kSteps; ++s) dy[s] = Vec::set1(o.dy.at[s * o.dy.ld]);
  for (int64_t k = 0; k < o.columns; k += 64) {
    const uint64_t word = o.bits.words[k / 64];
    const auto sum_at = [&](int j, auto tail) __attribute__((always_inline)) {
      const int64_t left = o.columns - k - j;
      Vec sum = Vec::zero();
      MASKED_OPS_UNROLL
      for (int s = 0; s < kSteps; ++s) {
        const float* const x = o.x.at + s * o.x.ld + k + j;
        sum = Operand<T>::multiply_add(dy[s], decltype(tail)::value ? load_first(left, x) : Vec::loadu(x), sum);
      }
      return sum;
    };
    const auto step = [&](int j, auto tail) __attribute__((always_inline)) {
      const int64_t left = o.columns - k - j;
      Vec sum = sum_at(j, tail);
      sum = sum.select(Vec::signs(word, o.bits.words + k / 64, j));
      decltype(tail)::value ? store_floats(sum, left, o.dw + k + j) : store_floats(sum, o.dw + k + j);
    };
    if (o.columns - k >= 64) {
      if constexpr (kStoresTwo<T>) {
        MASKED_OPS_UNROLL
        for (int j = 0; j < 64; j += 2 * L) {
          store_two(uint32_t(word >> j), {sum_at(j, Int<0>()), sum_at(j + L, Int<0>())}, o.dw + k + j);
        }
        continue;
      }
      MASKED_OPS_UNROLL
      for (int j = 0; j < 64; j += L) step(j, Int<0>());
    } else {
      for (int j = 0; k + j < o.columns; j += L) step(j, Int<1>());
    }
  }
}

// One row by a call of its own, and so many by one: short rows are to share it, bfloat16's long ones are a tenth faster
// alone.
template <int kSteps, typename T>
__attribute__((noinline)) void outer_alone(const Outer<T>& operands) {
  const Outer<T> o = operands;  // which no store can change
  outer_row<kSteps>(o);
}
template <int kSteps, typename T>
__attribute__((noinline)) void outer_rows(const Outer<T>& first, int64_t rows) {
  Outer<T> o = first;
  for (;;) {
    const Outer<T> row = o;
    outer_row<kSteps>(row);
    if (--rows == 0) return;
    ++o.dy.at;
    o.bits.words += o.bits.stride;
    o.dw += o.ldw;
  }
}

template <typename T>
void grad_weight(const Team& team, int64_t M, int64_t N, int64_t K, const T* grad_output, const T* input, Bits bits,
                 T* grad_weight) {
  constexpr int64_t kRows = tuning::kOuterRows, kColumns = tuning::kOuterVectors * L;
  const Operands dy = operands_of(Slot::kPanelA, grad_output, M, N), x = operands_of(Slot::kPanelB, input, M, K);
  const int64_t steps = ceil_div(M, Operand<T>::kDepth);
  const auto tile = [&](int64_t n, int64_t k, int64_t columns) {
    return Outer<T>{steps, {dy.at + n, dy.ld},  {x.at + k, x.ld},        {bits.row(n), bits.stride},
                    k,     min(columns, K - k), grad_weight + n * K + k, K};
  };
  const int64_t rows = max(ceil_div(tuning::kSmallGrain, K), kRows) / kRows * kRows;  // of a task
  team.for_each(ceil_div(N, rows), [&](int64_t task) {
    const int64_t last = min(N, (task + 1) * rows);
    constexpr int kByRow = kStoresTwo<T>       ? tuning::kOuterByRowStoresTwo
                           : kRoundsInSteps<T> ? tuning::kOuterByRowRounded
                                               : tuning::kOuterByRow;
    if (steps <= kByRow) {
      const bool alone = kStoresTwo<T> && K > tuning::kShortOuterRow;
      for (int64_t n = task * rows; n < last; n += alone ? 1 : rows) {
        with_int<kByRow>(steps, [&](auto s) {
          constexpr int kSteps = decltype(s)::value;
          alone ? outer_alone<kSteps>(tile(n, 0, K)) : outer_rows<kSteps>(tile(n, 0, K), last - n);
        });
      }
      return;
    }
    for (int64_t n = task * rows; n < last; n += kRows) {
      for (int64_t k = 0; k < K; k += kColumns) {
        const Outer<T> o = tile(n, k, kColumns);
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
