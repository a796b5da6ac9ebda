// Four floats at a time, for AVX2 and AVX-512.
#pragma once

#include <immintrin.h>

#include "basics.h"

namespace masked_ops::cpu::MASKED_OPS_CAPABILITY {

// Four floats from anywhere: a load and a shuffle for each, in less than half of the time of the gather instructions.
MASKED_OPS_INLINE __m128 gather_quad(const float* p, const uint16_t* columns) {
  uint64_t c;
  std::memcpy(&c, columns, sizeof(c));
  __m128 v = _mm_load_ss(p + uint16_t(c));
  v = _mm_insert_ps(v, _mm_load_ss(p + uint16_t(c >> 16)), 0x10);
  v = _mm_insert_ps(v, _mm_load_ss(p + uint16_t(c >> 32)), 0x20);
  return _mm_insert_ps(v, _mm_load_ss(p + (c >> 48)), 0x30);
}
template <int kLane>
MASKED_OPS_INLINE void store_lane(__m128 v, float* p) {
  const int bits = _mm_extract_ps(v, kLane);
  std::memcpy(p, &bits, sizeof(bits));
}
MASKED_OPS_INLINE void scatter_quad(__m128 v, float* p, const uint16_t* columns) {
  uint64_t c;
  std::memcpy(&c, columns, sizeof(c));
  _mm_store_ss(p + uint16_t(c), v);
  store_lane<1>(v, p + uint16_t(c >> 16));
  store_lane<2>(v, p + uint16_t(c >> 32));
  store_lane<3>(v, p + (c >> 48));
}

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY
