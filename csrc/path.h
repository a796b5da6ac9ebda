// Which way a call takes. The one place that decides; linear.cpp and convolution.cpp ask and obey.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "pattern.h"

namespace masked_ops {

enum class Path {
  kCopy,     // mask the weight in one pass, then torch's own dense operation; serves everything
  kFused,    // masked GEMM, or depthwise kernels: the mask rides in the load of the weight
  kCompact,  // without the empty rows and columns of the mask, then as kFused
  kSparse,   // SpMM and SDDMM over the remaining weights
  // On CUDA devices alone, from here on:
  kMaskCopy,  // as kCopy, but out of the mask's bits
  kDecode,    // few rows against the remaining weights of a packed layer
  kGemmSm80,  // masked GEMM on tensor cores
  kGemmSm90,
  kDecodeSliced,    // as kDecode, with the values laid out for it
  kDecodeGathered,  // the same for more rows, on tensor cores
};

// Which of a family's three operations; their break-even points differ.
enum class Pass { kForward, kGradInput, kGradWeight };

struct Choice {
  Path path;
  const char* reason;
};

const char* path_name(Path path);
std::vector<std::string> path_names();

// The path that use_path forces; none lets the cost model choose.
std::optional<Path> forced_path();
void force_path(std::optional<Path> path);
std::optional<Path> path_by_name(const std::string& name);

// For linear and both of its gradients: rows is M, weight is [N][K] (or anything of its dtype and layout), pattern is
// null if the mask is not in CPU memory or cannot be packed; have_values says that the weight is compressed already.
// Throws if the forced path cannot serve.
Choice choose_linear(Pass pass, int64_t rows, const at::Tensor& weight, const Pattern* pattern,
                     bool have_values = false);
// For the packed family, whose weight is its values alone; the copy path expands them in memory, the fused one in the
// caches.
Choice choose_packed_linear(Pass pass, int64_t rows, const at::Tensor& values, const Pattern& pattern);
// For convolution, as choose_linear. Pass and geometry are as the kernels see them, a transposed convolution the other
// way round; the geometry is null if it is not for them. A packed weight is its values, and has them.
Choice choose_convolution(Pass pass, const cpu::Convolution* geometry, bool channels_last, const at::Tensor& weight,
                          const Pattern* pattern, bool have_values = false, bool packed = false);

// The same on a device, for so many rows of input and weights. obstacles says of each path of a device (in the order of
// Path) why it cannot serve, null if it can; copy_reason is that of the copy path. The compact path serves there too,
// and is taken where it pays.
inline constexpr int kDevicePaths = 6;
using DeviceObstacles = std::array<const char*, kDevicePaths>;
struct DeviceCompact {
  const char* obstacle;
  bool pays = false;
  const char* reason = "";
};
Choice choose_device(const char* operation, Pass pass, int64_t rows, int64_t weights, const DeviceObstacles& obstacles,
                     const char* copy_reason, const DeviceCompact& compact);

}  // namespace masked_ops
