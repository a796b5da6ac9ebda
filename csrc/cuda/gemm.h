// What gemm_sm80 and gemm_sm90 share. All modes compute output[m][r] = sum over c of input[m][c] * operand[r][c]:
//   forward      input is the input,          operand the masked weight:   m = m, r = n, c = k
//   grad_input   input is grad_output,        operand its transpose:       m = m, r = k, c = n
//   grad_weight  input is grad_output^T,      operand the input^T:         m = n, r = k, c = m; the output is masked
#pragma once

#include "device.h"
#include "fragments.h"
#include "ptx.h"

namespace masked_ops::cuda {

struct GemmShape {
  int M, R, C;

  static GemmShape of(const Gemm& g) {
    if (g.mode == kGradWeight) return {int(g.N), int(g.K), int(g.M)};
    return g.mode == kGradInput ? GemmShape{int(g.M), int(g.K), int(g.N)} : GemmShape{int(g.M), int(g.N), int(g.K)};
  }
};

// Whether the arguments are served, on a device that fits.
inline bool serves(const Gemm& g) {
  constexpr int64_t kMaxSide = int64_t{1} << 31;
  if (g.dtype != kHalf && g.dtype != kBFloat16) return false;
  if (g.output_dtype != g.dtype && !(g.mode == kGradWeight && g.output_dtype == kFloat)) return false;
  if (g.M >= kMaxSide - 256 || g.N >= kMaxSide - 256 || g.K >= kMaxSide - 256) return false;
  if (g.K % 8 != 0 || (g.mode != kForward && g.N % 8 != 0)) return false;
  if (g.mode != kGradInput && !is_aligned(g.input, 16)) return false;
  if (g.mode != kForward && !is_aligned(g.grad_output, 16)) return false;
  return is_aligned(g.output, 16) &&
         (g.mode == kGradWeight || (is_aligned(g.weight, 16) && is_aligned(g.fragments, 16)));
}

inline bool nothing_to_do(const Gemm& g) {
  const GemmShape shape = GemmShape::of(g);
  return shape.M == 0 || shape.R == 0;
}

// Of the current device; 0 if it is not known.
inline int multiprocessor_count() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  return cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) == cudaSuccess ? count : 0;
}

// The current device's compute capability, as 10 major + minor; 0 if it is not known.
inline int compute_capability() {
  int device = 0, major = 0, minor = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess) {
    return 0;
  }
  return 10 * major + minor;
}

// Masks registers 4 kStep to 4 kStep + 3 of a fragment.
template <int kStep>
MASKED_OPS_DEVICE void mask_step(uint32_t* registers, uint32_t word) {
  const uint32_t first = word << (2 * kStep), second = word << (2 * kStep + 1);
  registers[0] &= permute<0x9988>(first);
  registers[1] &= permute<0xbbaa>(first);
  registers[2] &= permute<0x9988>(second);
  registers[3] &= permute<0xbbaa>(second);
}

}  // namespace masked_ops::cuda
