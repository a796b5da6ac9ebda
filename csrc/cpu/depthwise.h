// What the depthwise kernels of both layouts share: runs of taps. Where the sources of neighbouring results lie as far
// apart as those of neighbouring taps (stride and dilation 1), a vector that is loaded once serves all taps of a run.
#pragma once

#include "simd.h"
#include "tuning.h"

namespace masked_ops::cpu::MASKED_OPS_CAPABILITY {

constexpr int kRunTaps = 3;

// The first n bits.
constexpr uint32_t first_bits(int n) { return (1u << n) - 1; }

// Neighbouring results are taken in tiles: whole ones while two remain or none would be left over, then those of half
// the size or less, as equal as can be. Each size is a kernel.
MASKED_OPS_INLINE int64_t tile_of(int64_t left) {
  constexpr int64_t kWhole = tuning::kDepthwiseTile, kHalf = kWhole / 2;
  if (left >= kWhole + kHalf || left == kWhole) return kWhole;
  return left > kWhole ? kHalf : ceil_div(left, ceil_div(left, kHalf));
}
// body(Int<size>()) for the size of a tile.
template <typename Body>
MASKED_OPS_INLINE void with_tile(int64_t size, const Body& body) {
  constexpr int kWhole = tuning::kDepthwiseTile;
  if (size == kWhole) return body(Int<kWhole>());
  with_int<kWhole / 2>(size, body);
}

// add(i, t, the vector i + t steps from `from`) for i < R and t < T, where bit i + t says that there is one.
// A border lies in the first two or the last two, unless the padding is wide: those alone are asked one by one.
template <int R, int T, typename Load, typename Add>
MASKED_OPS_INLINE void for_run(const float* from, int64_t step, uint32_t inside, const Load& load, const Add& add) {
  constexpr int kVectors = R + T - 1, kEdge = 2;
  constexpr uint32_t kMiddle = kVectors > 2 * kEdge ? first_bits(kVectors - 2 * kEdge) << kEdge : 0;
  const auto rows = [&](auto middle_is_inside) __attribute__((always_inline)) {
    const float* p = from;
    const int64_t floats = opaque(step);
    MASKED_OPS_UNROLL
    for (int r = 0; r < kVectors; ++r, p += floats) {
      const bool is_middle = kMiddle >> r & 1;
      if (!(decltype(middle_is_inside)::value && is_middle) && !(inside >> r & 1)) continue;
      const Vec v = in_register(load(p));
      MASKED_OPS_UNROLL
      for (int t = 0; t < T; ++t) {
        if (r - t >= 0 && r - t < R) add(r - t, t, v);
      }
    }
  };
  (~inside & kMiddle) == 0 ? rows(Int<1>()) : rows(Int<0>());
}

// sums[i] += weights[t] * the vector that it reads
template <int R, int T, typename Load>
MASKED_OPS_INLINE void multiply_run(const float* from, int64_t step, uint32_t inside, const Load& load,
                                    const Vec (&weights)[T], Vec (&sums)[R]) {
  for_run<R, T>(from, step, inside, load,
                [&](int i, int t, Vec v) __attribute__((always_inline)) { sums[i] = fmadd(v, weights[t], sums[i]); });
}

// sums[t] += results[i] * the vector that it reads, summed over i; sums are pitch floats apart.
template <int R, int T, typename Load>
MASKED_OPS_INLINE void correlate_run(const float* from, int64_t step, uint32_t inside, const Load& load,
                                     const Vec (&results)[R], float* sums, int64_t pitch) {
  Vec acc[2][T];  // two for each, for the latency
  MASKED_OPS_UNROLL
  for (int t = 0; t < T; ++t) {
    acc[0][t] = Vec::load(sums + t * pitch);
    acc[1][t] = Vec::zero();
  }
  for_run<R, T>(from, step, inside, load, [&](int i, int t, Vec v) __attribute__((always_inline)) {
    acc[i % 2][t] = fmadd(v, results[i], acc[i % 2][t]);
  });
  MASKED_OPS_UNROLL
  for (int t = 0; t < T; ++t) (acc[0][t] + acc[1][t]).store(sums + t * pitch);
}

// R vectors, a step apart.
template <int R, typename Load>
MASKED_OPS_INLINE void load_rows(const float* from, int64_t step, const Load& load, Vec (&rows)[R]) {
  const int64_t floats = opaque(step);
  MASKED_OPS_UNROLL
  for (int r = 0; r < R; ++r, from += floats) rows[r] = load(from);
}
// Their first n lanes.
template <int R>
MASKED_OPS_INLINE void store_rows(const Vec (&rows)[R], int64_t n, float* to, int64_t step) {
  const int64_t floats = opaque(step);
  if (n >= Vec::kLanes) {
    MASKED_OPS_UNROLL
    for (int r = 0; r < R; ++r, to += floats) rows[r].storeu(to);
  } else {
    const Vec::Predicate lanes = Vec::first(n);
    MASKED_OPS_UNROLL
    for (int r = 0; r < R; ++r, to += floats) rows[r].storeu(lanes, to);
  }
}
template <int R>
MASKED_OPS_INLINE void prefetch_rows(const float* from, int64_t step) {
  const int64_t floats = opaque(step);
  MASKED_OPS_UNROLL
  for (int r = 0; r < R; ++r, from += floats) prefetch_l2(from);
}

// How a vector is loaded: all of its lanes, or some.
struct LoadAll {
  MASKED_OPS_INLINE Vec operator()(const float* p) const { return Vec::loadu(p); }
};
struct LoadSome {
  Vec::Predicate lanes;
  MASKED_OPS_INLINE Vec operator()(const float* p) const { return Vec::loadu(lanes, p); }
};

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY
