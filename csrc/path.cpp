#include "path.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <limits>

#include "device_tuning.h"
#include "path_costs.h"

namespace masked_ops {
namespace {

constexpr std::array<const char*, kCpuPaths + kDevicePaths> kNames = {
    "copy",   "fused",     "compact",   "sparse",        "mask_copy",
    "decode", "gemm_sm80", "gemm_sm90", "decode_sliced", "decode_gathered"};

std::atomic<int> forced{-1};

}  // namespace

Choice obey(const char* operation, const Obstacles& obstacles, Choice chosen) {
  const std::optional<Path> path = forced_path();
  if (!path) return chosen;
  const auto index = static_cast<size_t>(*path);
  const char* obstacle = index < kCpuPaths ? obstacles[index] : "the weight is in CPU memory";
  TORCH_CHECK(!obstacle, "path '", path_name(*path), "' cannot serve this ", operation, ": ", obstacle);
  return {*path, "forced by use_path"};
}

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

Choice choose_linear(Pass pass, int64_t rows, const at::Tensor& weight, const Pattern* pattern, bool have_values) {
  const char* obstacle = nullptr;
  if (!weight.is_cpu()) {
    obstacle = "the weight is not in CPU memory";
  } else if (!has_kernels(weight.scalar_type())) {
    obstacle = kOtherDtype;
  } else if (!weight.is_contiguous()) {
    obstacle = "the weight is not contiguous";
  } else if (!pattern || !pattern->binary()) {
    obstacle = "the mask is soft";
  }
  Choice choice = {Path::kCopy, obstacle};
  if (!obstacle) {
    const LinearCosts costs = {pass, rows, weight.scalar_type()};
    double least = std::numeric_limits<double>::infinity();
    const auto consider = [&](Path path, double nanoseconds, const char* reason) {
      if (nanoseconds < least) {
        least = nanoseconds;
        choice = {path, reason};
      }
    };
    consider(Path::kCopy, costs.of(Path::kCopy, *pattern),
             in_tiles(weight.scalar_type()) ? "torch's GEMM, in matrix units, over the masked weight"
                                            : "torch's GEMM over the masked weight");
    consider(Path::kFused, costs.of(Path::kFused, *pattern), "masked GEMM: most weights remain");
    if (pattern->reused() && pattern->live_rows() * pattern->live_cols() < pattern->rows() * pattern->cols()) {
      consider(Path::kCompact, costs.of_compact(*pattern), "masked GEMM without the empty rows and columns");
    }
    // An index is worth its making from the second use of a mask on.
    if (pattern->reused() && pattern->indexable()) {
      const bool compresses = pass != Pass::kGradInput || !have_values;
      consider(Path::kSparse, costs.of(Path::kSparse, *pattern, compresses), "SpMM: few weights remain");
    }
  }
  const char* no_index = obstacle || pattern->indexable() ? obstacle : kTooLarge;
  return obey("linear layer", {nullptr, obstacle, obstacle, no_index}, choice);
}

Choice choose_packed_linear(Pass pass, int64_t rows, const at::Tensor& values, const Pattern& pattern) {
  const char* obstacle = !has_kernels(values.scalar_type()) ? kOtherDtype : !pattern.indexable() ? kTooLarge : nullptr;
  Choice choice = {Path::kCopy, obstacle};
  if (!obstacle) {
    const LinearCosts costs = {pass, rows, values.scalar_type()};
    const double sparse = costs.of_packed(Path::kSparse, pattern), copy = costs.of_packed(Path::kCopy, pattern);
    const int64_t columns = std::min(pattern.cols(), cpu::kRankColumns);
    const bool fits = pass != Pass::kGradInput ||
                      cpu::kernels().expands_grad_input(dtype_of(values.scalar_type()), rows) ||
                      pattern.rows() * columns * values.element_size() <= cpu::kMostPieceBytes;
    const double fused = fits ? costs.of_packed(Path::kFused, pattern) : std::numeric_limits<double>::infinity();
    choice = sparse < std::min(fused, copy) ? Choice{Path::kSparse, "SpMM: few weights remain"}
             : fused < copy                 ? Choice{Path::kFused, "masked GEMM: most weights remain"}
             : in_tiles(values.scalar_type())
                 ? Choice{Path::kCopy, "torch's GEMM, in matrix units, over the unpacked weight"}
                 : Choice{Path::kCopy, "torch's GEMM over the unpacked weight"};
  }
  return obey("packed linear layer", {nullptr, obstacle, "a packed layer has no dense weight", obstacle}, choice);
}

Choice choose_device(const char* operation, Pass pass, int64_t rows, int64_t weights, const DeviceObstacles& obstacles,
                     const char* copy_reason, const DeviceCompact& compact) {
  const auto obstacle = [&](Path path) { return obstacles[static_cast<size_t>(path) - kCpuPaths]; };
  if (const std::optional<Path> path = forced_path()) {
    if (*path == Path::kCopy) return {*path, "forced by use_path"};
    const bool on_device = static_cast<int>(*path) >= kCpuPaths;
    const char* why = on_device                 ? obstacle(*path)
                      : *path == Path::kCompact ? compact.obstacle
                                                : "the weight is not in CPU memory";
    TORCH_CHECK(!why, "path '", path_name(*path), "' cannot serve this ", operation, ": ", why);
    return {*path, "forced by use_path"};
  }
  if (!compact.obstacle && compact.pays) return {Path::kCompact, compact.reason};
  for (const Path path : {Path::kDecodeSliced, Path::kDecodeGathered}) {
    if (!obstacle(path)) return {path, "few rows: the frozen weights, laid out for it"};
  }
  if (!obstacle(Path::kDecode)) return {Path::kDecode, "few rows: the remaining weights are read once"};
  const bool of_weight = pass == Pass::kGradWeight;
  const char* const in_load = "masked GEMM: the mask rides in the load of the weight";
  if (!obstacle(Path::kGemmSm90) && cuda::prefers_gemm_sm90(rows, weights)) {
    return {Path::kGemmSm90, of_weight ? "masked GEMM: the mask rides in the store of the gradient" : in_load};
  }
  if (!of_weight && !obstacle(Path::kGemmSm80) && rows <= cuda::kMostFusedRowsSm80) return {Path::kGemmSm80, in_load};
  if (!obstacle(Path::kMaskCopy)) return {Path::kMaskCopy, "masked in one pass, then torch's own operation"};
  return {Path::kCopy, copy_reason};
}

}  // namespace masked_ops
