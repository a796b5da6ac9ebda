// Forward for a few rows of input: a few rows of the weight at a time, each a dot product with every row of input; both
// run along K.
#include "gemv.h"

namespace masked_ops::cpu::MASKED_OPS_CAPABILITY {
namespace {

constexpr int L = Vec::kLanes;

// Rows of the weight beside rows of input.
constexpr int weight_rows(int rows) { return min(tuning::kSmallSums / rows, 4); }
constexpr bool is_group(int weights) {
  for (int rows = 1; rows <= kMaxRows; ++rows) {
    if (weight_rows(rows) == weights) return true;
  }
  return weights == 1;
}

template <typename T>
struct Dots {
  const T* x;  // [M][K]
  int64_t K;
  const T* weight;  // of the first row
  Bits bits;        // likewise
  const T* ahead;   // the rows that come next, null if there are none to prefetch
  const T* bias;    // null for none
  T* y;             // [M][N]
  int64_t N;
};

// totals[i] = the sum of vector i's lanes; as many at a time as a vector has, where that is worth it.
template <int N>
MASKED_OPS_INLINE void sum_each(const Vec* sums, float* totals) {
  constexpr int kLeast = L / 2;
  MASKED_OPS_UNROLL
  for (int i = 0; i < N; i += L) {
    if (N - i < kLeast) {
      MASKED_OPS_UNROLL
      for (int j = i; j < N; ++j) totals[j] = sums[j].sum();
      return;
    }
    const auto at = [&](int j) { return j < N ? sums[j] : Vec::zero(); };
    Vec quads[L / 4];
    MASKED_OPS_UNROLL
    for (int q = 0; q < L / 4; ++q) {
      const int j = i + 4 * q;
      quads[q] = j < N ? sum_quads(at(j), at(j + 1), at(j + 2), at(j + 3)) : Vec::zero();
    }
    sum_across_quads(quads).storeu(totals + i);
  }
}

// y[m][r] = x[m] . weight[r] + bias[r] for M rows of input and R rows of the weight.
template <int M, int R, typename T>
__attribute__((noinline)) void dots(const Dots<T>& o) {
  constexpr int kStep = L * Operand<T>::kDepth;  // elements of a vector
  Vec sum[M][R];
  MASKED_OPS_UNROLL
  for (int m = 0; m < M; ++m) {
    MASKED_OPS_UNROLL
    for (int r = 0; r < R; ++r) sum[m][r] = Vec::zero();
  }
  const int64_t K = o.K, whole = K / kStep * kStep;
  const auto step = [&](int64_t k, auto tail) __attribute__((always_inline)) {
    Vec w[R];
    MASKED_OPS_UNROLL
    for (int r = 0; r < R; ++r) w[r] = Operand<T>::template along<M>(o.bits.row(r), k, K - k, o.weight + r * K + k);
    MASKED_OPS_UNROLL
    for (int m = 0; m < M; ++m) {
      const Vec x =
          decltype(tail)::value ? Operand<T>::along(K - k, o.x + m * K + k) : Operand<T>::along(o.x + m * K + k);
      MASKED_OPS_UNROLL
      for (int r = 0; r < R; ++r) sum[m][r] = Operand<T>::multiply_add(x, w[r], sum[m][r]);
    }
  };
  // Prefetches at first from these rows, then from the next.
  const int64_t ahead = o.ahead ? min(tuning::kBytesAhead / int64_t{sizeof(T)}, whole) : 0;
  int64_t k = 0;
  const auto run = [&](int64_t end, const T* next) __attribute__((always_inline)) {
    for (; k < end; k += kStep) {
      MASKED_OPS_UNROLL
      for (int r = 0; r < R; ++r) prefetch(next + r * K + k);
      step(k, Int<0>());
    }
  };
  if (ahead) {
    run(whole - ahead, o.weight + ahead);
    run(whole, o.ahead - (whole - ahead));
  } else {
    for (; k < whole; k += kStep) step(k, Int<0>());
  }
  if (k < K) step(k, Int<1>());
  float totals[ceil_div(M * R, L) * L];
  sum_each<M * R>(sum[0], totals);
  MASKED_OPS_UNROLL
  for (int m = 0; m < M; ++m) {
    MASKED_OPS_UNROLL
    for (int r = 0; r < R; ++r) store_float(totals[m * R + r] + (o.bias ? to_float(o.bias[r]) : 0), o.y + m * o.N + r);
  }
}

template <typename T>
void forward(const Team& team, int64_t M, int64_t N, int64_t K, const T* input, const T* weight, Bits bits,
             const T* bias, T* output) {
  const RowTiles tiles(M);
  const int64_t group = weight_rows(int(tiles.height));
  const int64_t rows = max(ceil_div(tuning::kSmallGrain, max<int64_t>(K, 1)), group) / group * group;  // of a task
  team.for_each(ceil_div(N, rows), [&](int64_t task) {
    const int64_t last = min(N, (task + 1) * rows);
    for (int64_t n = task * rows, group_rows = group; n < last; n += group_rows) {
      if (last - n < group) group_rows = 1;
      const int64_t next = n + 2 * group <= N ? n + group : -1;
      for (int64_t t = 0; t < tiles.count; ++t) {
        const int64_t m = tiles.begin(t);
        const Dots<T> o = {input + m * K,
                           K,
                           weight + n * K,
                           {bits.row(n), bits.stride},
                           t == 0 && next >= 0 ? weight + next * K : nullptr,
                           bias ? bias + n : nullptr,
                           output + m * N + n,
                           N};
        with_int<kMaxRows>(tiles.size(t), [&](auto height) {
          constexpr int kRows = decltype(height)::value;
          with_int<4>(group_rows, [&](auto weights) {  // the group fits the highest tile, and so the others
            constexpr int kGroup = decltype(weights)::value;
            if constexpr (is_group(kGroup) && kGroup * kRows <= tuning::kSmallSums) dots<kRows, kGroup>(o);
          });
        });
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
