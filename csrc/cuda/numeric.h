// 16-bit floats, without cuda_fp16.h and cuda_bf16.h, which take longer to compile than all kernels.
#pragma once

#include "bits.h"
#include "device.h"

namespace masked_ops::cuda {

#ifndef MASKED_OPS_EMULATE

// Two floats, given by their bits, rounded to nearest even; the first in the low half.
template <bool kBFloat>
MASKED_OPS_DEVICE uint32_t round_pair(uint32_t low, uint32_t high) {
  uint32_t pair;
  if constexpr (kBFloat) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(__uint_as_float(high)), "f"(__uint_as_float(low)));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(__uint_as_float(high)), "f"(__uint_as_float(low)));
  }
  return pair;
}

template <bool kBFloat>
MASKED_OPS_DEVICE float to_float(uint16_t bits) {
  if constexpr (kBFloat) return __uint_as_float(uint32_t(bits) << 16);
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}

#endif

template <bool kBFloat>
MASKED_OPS_DEVICE uint32_t round_pair(float low, float high) {
  return round_pair<kBFloat>(__float_as_uint(low), __float_as_uint(high));
}

}  // namespace masked_ops::cuda
