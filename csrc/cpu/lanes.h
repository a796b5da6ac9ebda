// Vectors of floats from elements of which some lanes alone may be touched, or which lie apart; for packing images.
#pragma once

#include "elements.h"

namespace masked_ops::cpu::MASKED_OPS_CAPABILITY {

// Lane i is p[i], where lanes has a bit; the others are zero and their memory is not touched.
MASKED_OPS_INLINE Vec load_lanes(uint32_t lanes, const float* p) { return Vec::loadu(Vec::Predicate(lanes), p); }
// Lane i is p[2 * i], where elements has a bit at 2 * i; other bits are not set.
MASKED_OPS_INLINE Vec load_even_lanes(uint32_t elements, const float* p) { return Vec::load_even(elements, p); }
// Lane i is p[i * step], where lanes has a bit.
MASKED_OPS_INLINE Vec gather_lanes(uint32_t lanes, const float* p, int step) {
  return Vec::gather(Vec::Predicate(lanes), p, step);
}
// Four elements from each place, of which the first n are read; the others are zero.
MASKED_OPS_INLINE Vec load_quads(const float* const (&places)[Vec::kLanes / 4], int n) { return Vec::quads(places, n); }

// Of 16 bits, one by one.
template <typename T, typename At>
MASKED_OPS_INLINE Vec collect(uint32_t lanes, const At& at) {
  T some[Vec::kLanes] = {};
  for (; lanes; lanes &= lanes - 1) {
    const int lane = __builtin_ctz(lanes);
    some[lane] = at(lane);
  }
  return load_floats(some);
}

template <typename T>
MASKED_OPS_INLINE Vec load_lanes(uint32_t lanes, const T* p) {
#if defined(__AVX512F__)
  return load_floats(Vec::Predicate(lanes), Vec::kLanes, p);
#else
  return collect<T>(lanes, [=](int lane) __attribute__((always_inline)) { return p[lane]; });
#endif
}
template <typename T>
MASKED_OPS_INLINE Vec load_even_lanes(uint32_t elements, const T* p) {
#if defined(__AVX512F__)
  const __m512i pairs = _mm512_maskz_loadu_epi16(elements, p);
  return floats_of(_mm512_cvtepi32_epi16(pairs), T());
#else
  uint32_t lanes = 0;
  for (int i = 0; i < Vec::kLanes; ++i) lanes |= (elements >> (2 * i) & 1) << i;
  return collect<T>(lanes, [=](int lane) __attribute__((always_inline)) { return p[2 * lane]; });
#endif
}
template <typename T>
MASKED_OPS_INLINE Vec gather_lanes(uint32_t lanes, const T* p, int step) {
  return collect<T>(lanes, [=](int lane) __attribute__((always_inline)) { return p[int64_t{lane} * step]; });
}
template <typename T>
MASKED_OPS_INLINE Vec load_quads(const T* const (&places)[Vec::kLanes / 4], int n) {
#if defined(__AVX512F__)
  const __mmask8 some = __mmask8((1u << n) - 1);
  const auto quad = [=](const T* p) __attribute__((always_inline)) { return _mm_maskz_loadu_epi16(some, p); };
  const __m128i low = _mm_unpacklo_epi64(quad(places[0]), quad(places[1]));
  const __m128i high = _mm_unpacklo_epi64(quad(places[2]), quad(places[3]));
  return floats_of(_mm256_set_m128i(high, low), T());
#else
  T some[Vec::kLanes] = {};
  for (int q = 0; q < Vec::kLanes / 4; ++q) {
    for (int i = 0; i < n; ++i) some[4 * q + i] = places[q][i];
  }
  return load_floats(some);
#endif
}

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY
