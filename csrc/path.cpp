#include "path.h"

#include <c10/util/Exception.h>

#include <array>
#include <atomic>
#include <cstring>
#include <limits>

#include "cpu/costs.h"
#include "parallel.h"

namespace masked_ops {
namespace {

constexpr std::array<const char*, 4> kNames = {"copy", "fused", "compact", "sparse"};

std::atomic<int> forced{-1};

constexpr const char* kTooLarge = "the weight is larger than an index can address";

// Why a path cannot serve, null where it can; the copy path always can.
using Obstacles = std::array<const char*, kNames.size()>;

// Obeys a forced path; else takes what the cost model chose.
Choice obey(const char* operation, const Obstacles& obstacles, Choice chosen) {
  const std::optional<Path> path = forced_path();
  if (!path) return chosen;
  const char* obstacle = obstacles[static_cast<size_t>(*path)];
  TORCH_CHECK(!obstacle, "path '", path_name(*path), "' cannot serve this ", operation, ": ", obstacle);
  return {*path, "forced by use_path"};
}

double cost(Path path, Pass pass, int64_t M, int64_t N, int64_t K, int64_t nnz, int threads,
            bool reads_dense_weight = true) {
  const int row = path == Path::kSparse ? 2 : path == Path::kFused ? 1 : 0;
  cpu::Cost c = cpu::kCosts[row][2 * static_cast<int>(pass) + (M > cpu::kSmallM)];
  if (!reads_dense_weight) c.weight = 0;
  const double fresh = path == Path::kCopy && N * K > cpu::kFreshWeights ? cpu::kFreshCost * double(N * K) : 0;
  return c(M, N, K, nnz, threads) + fresh;
}

double cost(Path path, Pass pass, int64_t M, const Pattern& pattern, int threads, bool reads_dense_weight = true) {
  return cost(path, pass, M, pattern.rows(), pattern.cols(), pattern.nnz(), threads, reads_dense_weight);
}

double compact_cost(Pass pass, int64_t M, const Pattern& pattern, int threads) {
  const int64_t N = pattern.live_rows(), K = pattern.live_cols();
  const int64_t moved = 2 * N * K + M * (N + K + pattern.rows() + pattern.cols());
  return cost(Path::kFused, pass, M, N, K, pattern.nnz(), threads) + cpu::kGatherCost * double(moved) / threads +
         cpu::kCompactCall;
}

bool portable() { return std::strcmp(cpu::kernels().capability, "DEFAULT") == 0; }

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

Choice choose_linear(Pass pass, int64_t rows, const at::Tensor& weight, const Pattern* pattern, bool have_values) {
  const char* obstacle = nullptr;
  if (!weight.is_cpu()) {
    obstacle = "the weight is not in CPU memory";
  } else if (weight.scalar_type() != at::kFloat) {
    obstacle = "its kernels take float32 only";
  } else if (!weight.is_contiguous()) {
    obstacle = "the weight is not contiguous";
  } else if (!pattern || !pattern->binary()) {
    obstacle = "the mask is soft";
  }
  Choice choice = {Path::kCopy, obstacle};
  if (!obstacle) {
    const int threads = team_for(rows * pattern->nnz()).threads;
    double least = std::numeric_limits<double>::infinity();
    const auto consider = [&](Path path, double nanoseconds, const char* reason) {
      if (nanoseconds < least) {
        least = nanoseconds;
        choice = {path, reason};
      }
    };
    consider(Path::kCopy, cost(Path::kCopy, pass, rows, *pattern, threads), "torch's GEMM over the masked weight");
    // The portable kernel has a quarter of the vector width that torch's own GEMM finds at run time.
    if (!portable()) {
      consider(Path::kFused, cost(Path::kFused, pass, rows, *pattern, threads), "masked GEMM: most weights remain");
      if (pattern->reused() && pattern->live_rows() * pattern->live_cols() < pattern->rows() * pattern->cols()) {
        consider(Path::kCompact, compact_cost(pass, rows, *pattern, threads),
                 "masked GEMM without the empty rows and columns");
      }
    }
    // An index is worth its making from the second use of a mask on.
    if (pattern->reused() && pattern->indexable()) {
      const bool compresses = pass != Pass::kGradInput || !have_values;
      consider(Path::kSparse, cost(Path::kSparse, pass, rows, *pattern, threads, compresses),
               "SpMM: few weights remain");
    }
  }
  const char* no_index = obstacle || pattern->indexable() ? obstacle : kTooLarge;
  return obey("linear layer", {nullptr, obstacle, obstacle, no_index}, choice);
}

Choice choose_packed_linear(Pass pass, int64_t rows, const at::Tensor& values, const Pattern& pattern) {
  const char* obstacle = values.scalar_type() != at::kFloat ? "its kernels take float32 only"
                         : !pattern.indexable()             ? kTooLarge
                                                            : nullptr;
  Choice choice = {Path::kCopy, obstacle};
  if (!obstacle) {
    const int threads = team_for(rows * pattern.nnz()).threads;
    const bool sparse = cost(Path::kSparse, pass, rows, pattern, threads, /*reads_dense_weight=*/false) <
                        cost(Path::kCopy, pass, rows, pattern, threads);
    choice = sparse ? Choice{Path::kSparse, "SpMM: few weights remain"}
                    : Choice{Path::kCopy, "torch's GEMM over the unpacked weight"};
  }
  const char* no_weight = "a packed layer has no dense weight";
  return obey("packed linear layer", {nullptr, no_weight, no_weight, obstacle}, choice);
}

Choice choose_convolution(const at::Tensor&, const Pattern*) {
  const char* obstacle = "it has no convolution kernel";
  return obey("convolution", {nullptr, obstacle, obstacle, obstacle},
              {Path::kCopy, "torch's convolution over the masked weight"});
}

Choice choose_packed_convolution() {
  const char* obstacle = "it has no convolution kernel";
  return obey("packed convolution", {nullptr, obstacle, obstacle, obstacle},
              {Path::kCopy, "torch's convolution over the unpacked weight"});
}

}  // namespace masked_ops
