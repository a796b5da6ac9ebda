// What the choices of linear layers and of convolutions share.
#pragma once

#include <limits>

#include "cpu/costs.h"
#include "parallel.h"
#include "path.h"
#include "torch_rate.h"

namespace masked_ops {

inline constexpr int kCpuPaths = static_cast<int>(Path::kMaskCopy);

inline bool has_kernels(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf;
}

inline constexpr const char* kOtherDtype = "its kernels take float32, bfloat16 and float16";
inline constexpr const char* kTooLarge = "the weight is larger than an index can address";

// Why a path cannot serve, null where it can; the copy path always can.
using Obstacles = std::array<const char*, kCpuPaths>;

// Obeys a forced path; else takes what the cost model chose.
Choice obey(const char* operation, const Obstacles& obstacles, Choice chosen);

inline bool in_tiles(at::ScalarType dtype) { return dtype != at::kFloat && torch_rate(dtype) == Rate::kTiles; }

// Vectors of four floats, a quarter of what torch's own kernels may find at run time.
inline bool portable() { return cpu::kernels().lanes == 4; }

// What the paths of one operation of the linear family cost, with M rows, in a dtype that has kernels.
struct LinearCosts {
  Pass pass;
  int64_t M;
  at::ScalarType dtype;
  int threads = team_for(std::numeric_limits<int64_t>::max()).threads;

  double of(Path path, int64_t N, int64_t K, int64_t nnz, bool reads_dense_weight = true, double blocked = 0) const {
    cpu::Cost c = (*tables(path).live)[row_of(path)][2 * static_cast<int>(pass) + (M > cpu::kSmallM)];
    if (!reads_dense_weight) c.weight = c.memory = 0;
    return of(path, c, N, K, nnz, blocked, threads);
  }

  double of(Path path, const Pattern& pattern, bool reads_dense_weight = true) const {
    return of(path, pattern.rows(), pattern.cols(), pattern.nnz(), reads_dense_weight, pattern.blocked());
  }

  // Of a packed weight, which the copy path lays out in memory and the masked GEMM in the caches.
  double of_packed(Path path, const Pattern& pattern) const {
    if (!portable()) {
      const int size = M == 1 ? 0 : M <= cpu::kSmallM ? 1 : 2;
      const cpu::Cost& c = (*tables(path).packed)[row_of(path)][3 * static_cast<int>(pass) + size];
      return of(path, c, pattern.rows(), pattern.cols(), pattern.nnz(), pattern.blocked(),
                packed_threads(path, pattern));
    }
    const double expanded = double(pattern.rows() * pattern.cols()) * cpu::kExpandCost / threads;
    return of(path, pattern, /*reads_dense_weight=*/false) + (path == Path::kSparse ? 0 : expanded);
  }

  double of_compact(const Pattern& pattern) const {
    const int64_t N = pattern.live_rows(), K = pattern.live_cols();
    const int64_t moved = 2 * N * K + M * (N + K + pattern.rows() + pattern.cols());
    return of(Path::kFused, N, K, pattern.nnz()) + cpu::kGatherCost * double(moved) / threads + cpu::kCompactCall;
  }

 private:
  struct Tables {
    const cpu::CostTable* live;
    const cpu::PackedCostTable* packed;
  };
  Tables tables(Path path) const {
    if (portable()) return {&cpu::kFloatCostsPortable, nullptr};
    if (cpu::kernels().lanes == 8) {
      if (dtype == at::kFloat) return {&cpu::kFloatCostsAvx2, &cpu::kFloatPackedCostsAvx2};
      if (dtype == at::kHalf) return {&cpu::kHalfCostsAvx2, &cpu::kHalfPackedCostsAvx2};
      return {&cpu::kBFloat16CostsAvx2, &cpu::kBFloat16PackedCostsAvx2};
    }
    if (dtype == at::kFloat || as_float(path)) return {&cpu::kFloatCosts, &cpu::kFloatPackedCosts};
    if (with_dots(path)) return {&cpu::kBFloat16Costs, &cpu::kBFloat16PackedCosts};
    return {&cpu::kHalfCosts, &cpu::kHalfPackedCosts};
  }
  // Where the CPU has no arithmetic for bfloat16, torch's product is no faster than for float32. (The one of float16 is
  // far slower; our kernels convert both alike.)
  bool as_float(Path path) const {
    return path == Path::kCopy && dtype == at::kBFloat16 && torch_rate(dtype) == Rate::kConverted;
  }
  bool with_dots(Path path) const {
    if (path == Path::kCopy) return torch_rate(dtype) != Rate::kConverted;
    return dtype == at::kBFloat16 && cpu::kernels().bf16_dots;
  }

  static int row_of(Path path) { return path == Path::kSparse ? 2 : path == Path::kFused ? 1 : 0; }
  // A few rows of a small product stay on one thread (team_for_fused, sparse_team): of the sparse path those with few
  // values, whatever the size of the weight. The constants for more rows were fitted without that.
  int packed_threads(Path path, const Pattern& pattern) const {
    if (M > cpu::kSmallM || path == Path::kCopy) return threads;
    return team_for_product(M, path == Path::kSparse ? pattern.nnz() : pattern.rows() * pattern.cols()).threads;
  }
  double of(Path path, cpu::Cost c, int64_t N, int64_t K, int64_t nnz, double blocked, int of_threads) const {
    // (Of one row torch takes dot products.)
    if (path == Path::kCopy && M > 1 && in_tiles(dtype)) c.dense /= cpu::kTileSpeedup;
    c.mac *= float(1 - cpu::kRowBlockGain[static_cast<int>(pass)] * blocked);
    return c(M, N, K, nnz, of_threads);
  }
};

}  // namespace masked_ops
