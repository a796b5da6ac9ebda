#include "path.h"

#include <c10/util/Exception.h>

#include <array>
#include <atomic>
#include <cstring>

namespace masked_ops {
namespace {

constexpr std::array<const char*, 2> kNames = {"copy", "fused"};

std::atomic<int> forced{-1};

// Obeys a forced path. why_not_fused is null where the fused path can serve.
Choice obey(const char* operation, const char* why_not_fused, Choice chosen) {
  const std::optional<Path> path = forced_path();
  if (!path) return chosen;
  TORCH_CHECK(*path == Path::kCopy || !why_not_fused, "path '", path_name(*path), "' cannot serve this ", operation,
              ": ", why_not_fused);
  return {*path, "forced by use_path"};
}

}  // namespace

const char* path_name(Path path) { return kNames[static_cast<size_t>(path)]; }

std::vector<std::string> path_names() { return {kNames.begin(), kNames.end()}; }

std::optional<Path> path_by_name(const std::string& name) {
  for (size_t i = 0; i < kNames.size(); ++i) {
    if (name == kNames[i]) return static_cast<Path>(i);
  }
  return std::nullopt;
}

std::optional<Path> forced_path() {
  const int path = forced.load(std::memory_order_relaxed);
  return path < 0 ? std::nullopt : std::optional<Path>(static_cast<Path>(path));
}

void force_path(std::optional<Path> path) { forced.store(path ? static_cast<int>(*path) : -1); }

Choice choose_linear(int64_t /*rows*/, const at::Tensor& weight, const Pattern* pattern) {
  const char* why_not_fused = nullptr;
  if (!weight.is_cpu()) {
    why_not_fused = "the weight is not in CPU memory";
  } else if (weight.scalar_type() != at::kFloat) {
    why_not_fused = "its kernel takes float32 only";
  } else if (!weight.is_contiguous()) {
    why_not_fused = "the weight is not contiguous";
  } else if (!pattern || !pattern->binary()) {
    why_not_fused = "the mask is soft";
  }
  Choice choice = {Path::kCopy, why_not_fused};
  if (!why_not_fused) {
    // The portable kernel has a quarter of the vector width that torch's own GEMM finds at run time.
    choice = std::strcmp(cpu::kernels().capability, "DEFAULT") == 0
                 ? Choice{Path::kCopy, "torch's GEMM is faster than the portable kernel"}
                 : Choice{Path::kFused, "binary float32 mask"};
  }
  return obey("linear layer", why_not_fused, choice);
}

Choice choose_convolution(const at::Tensor&, const Pattern*) {
  return obey("convolution", "it has no convolution kernel",
              {Path::kCopy, "torch's convolution over the masked weight"});
}

}  // namespace masked_ops
