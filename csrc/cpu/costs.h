// What the paths of a linear layer cost on this kind of machine, for the choice among them: nanoseconds, fitted by
// bench/fit_cost_model.py on two Zen 5 cores with AVX-512. Ratios matter, and they move little from machine to machine.
#pragma once

#include <cstdint>

namespace masked_ops::cpu {

// call + (mac * M * nnz + dense * M * N * K + weight * N * K + value * nnz + io * M * (N + K) + block * M * N) /
// threads
struct Cost {
  float call, mac, dense, weight, value, io, block;

  double operator()(int64_t M, int64_t N, int64_t K, int64_t nnz, int threads) const {
    const double m = double(M), n = double(N), k = double(K), z = double(nnz);
    return call + (m * (mac * z + dense * n * k + io * (n + k) + block * n) + weight * n * k + value * z) / threads;
  }
};

// The compact path gathers and scatters: nanoseconds for an element moved, and for the calls themselves.
inline constexpr double kGatherCost = 0.5, kCompactCall = 8e3;

// [path: copy, fused, sparse][pass: forward, grad_input, grad_weight, each for M <= 16 and for M > 16]
inline constexpr int64_t kSmallM = 16;
inline constexpr Cost kCosts[3][6] = {
    // fitted: begin
    {
        // copy
        {2e3, 0, 0.01, 0.6, 0, 0.1, 0},  // forward, M <= 16
        {2e3, 0, 0.01, 0.6, 0, 0.1, 0},  // forward, M > 16
        {2e3, 0, 0.01, 0.6, 0, 0.1, 0},  // grad_input, M <= 16
        {2e3, 0, 0.01, 0.6, 0, 0.1, 0},  // grad_input, M > 16
        {2e3, 0, 0.01, 0.6, 0, 0.1, 0},  // grad_weight, M <= 16
        {2e3, 0, 0.01, 0.6, 0, 0.1, 0},  // grad_weight, M > 16
    },
    {
        // fused
        {2e3, 0, 0.0048, 0.1, 0, 0.1, 0},  // forward, M <= 16
        {2e3, 0, 0.0048, 0.1, 0, 0.1, 0},  // forward, M > 16
        {2e3, 0, 0.0048, 0.1, 0, 0.1, 0},  // grad_input, M <= 16
        {2e3, 0, 0.0048, 0.1, 0, 0.1, 0},  // grad_input, M > 16
        {2e3, 0, 0.0048, 0.1, 0, 0.1, 0},  // grad_weight, M <= 16
        {2e3, 0, 0.0048, 0.1, 0, 0.1, 0},  // grad_weight, M > 16
    },
    {
        // sparse
        {2e3, 0.009, 0, 0.1, 0.1, 0.1, 0.1},  // forward, M <= 16
        {2e3, 0.009, 0, 0.1, 0.1, 0.1, 0.1},  // forward, M > 16
        {2e3, 0.009, 0, 0.1, 0.1, 0.1, 0.1},  // grad_input, M <= 16
        {2e3, 0.009, 0, 0.1, 0.1, 0.1, 0.1},  // grad_input, M > 16
        {2e3, 0.009, 0, 0.1, 0.1, 0.1, 0.1},  // grad_weight, M <= 16
        {2e3, 0.009, 0, 0.1, 0.1, 0.1, 0.1},  // grad_weight, M > 16
    },
    // fitted: end
};

}  // namespace masked_ops::cpu
