// How fast torch multiplies elements of 16 bits, which depends on more of the CPU than our kernels make use of.
#pragma once

#include <c10/core/ScalarType.h>

namespace masked_ops {

enum class Rate {
  kConverted,    // the CPU has no arithmetic for them: bfloat16 no faster than float32, float16 far slower
  kDotProducts,  // at twice the rate of float32
  kTiles,        // in matrix units (AMX)
};

// Of bfloat16 or float16 on this CPU, by what it reports.
Rate torch_rate(at::ScalarType dtype);
// For tests: choose as on another CPU. Returns what was.
Rate set_torch_rate(at::ScalarType dtype, Rate rate);

}  // namespace masked_ops
