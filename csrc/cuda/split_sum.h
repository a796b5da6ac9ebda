// Adds up what the splits of a product have left in memory, always in the same order.
#pragma once

#include "device.h"
#include "numeric.h"
#include "tuning.h"

namespace masked_ops::cuda {

// output[m][r] = sum over s of partial[s][m][r], + bias[r] (may be null).
template <bool kBFloat>
__global__ void __launch_bounds__(tuning::kPassThreads)
    split_sum_kernel(const float* __restrict__ partial, int splits, int64_t outputs, Divider cols,
                     const uint16_t* __restrict__ bias, uint16_t* __restrict__ output) {
  const int64_t i = int64_t(blockIdx.x) * tuning::kPassThreads + threadIdx.x;
  if (i >= outputs) return;
  uint64_t col;
  cols(i, col);
  float sum = bias ? to_float<kBFloat>(bias[col]) : 0.f;
  for (int s = 0; s < splits; ++s) sum += partial[s * outputs + i];
  output[i] = uint16_t(round_pair<kBFloat>(sum, 0.f));
}

template <bool kBFloat>
int split_sum(const void* partial, int splits, int64_t rows, int64_t cols, const void* bias, void* output,
              void* stream) {
  const int64_t blocks = ceil_div<int64_t>(rows * cols, tuning::kPassThreads);
  if (blocks > INT32_MAX) return kUnsupported;
  return launch(split_sum_kernel<kBFloat>, uint32_t(blocks), tuning::kPassThreads, 0, stream,
                static_cast<const float*>(partial), splits, rows * cols, Divider::by(cols),
                static_cast<const uint16_t*>(bias), static_cast<uint16_t*>(output));
}

}  // namespace masked_ops::cuda
