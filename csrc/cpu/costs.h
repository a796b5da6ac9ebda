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

// A copy of more weights than this is fresh memory, whose page faults outlast the pass itself and do not share among
// threads (1, 4096 -> 4096: 21 ms of which 17): nanoseconds a weight, on top of what was fitted.
inline constexpr int64_t kFreshWeights = int64_t{1} << 20;
inline constexpr double kFreshCost = 1;

// [path: copy, fused, sparse][pass: forward, grad_input, grad_weight, each for M <= 16 and for M > 16]
inline constexpr int64_t kSmallM = 16;
inline constexpr Cost kCosts[3][6] = {
    // fitted: begin
    {
        // copy
        {2.59e+03, 0, 0.0266, 0.164, 0, 0, 0},  // forward, M <= 16
        {4.05e+03, 0, 0.02, 0.226, 0, 0, 0},    // forward, M > 16
        {2.31e+03, 0, 0.0295, 0.157, 0, 0, 0},  // grad_input, M <= 16
        {3.66e+03, 0, 0.02, 0.252, 0, 0, 0},    // grad_input, M > 16
        {2.56e+03, 0, 0.0204, 0.184, 0, 0, 0},  // grad_weight, M <= 16
        {4.37e+03, 0, 0.0208, 0.13, 0, 0, 0},   // grad_weight, M > 16
    },
    {
        // fused
        {2.38e+03, 0, 0.00536, 0.199, 0, 0, 0},         // forward, M <= 16
        {3.51e+03, 0, 0.00838, 0.0943, 0, 0.0354, 0},   // forward, M > 16
        {2.18e+03, 0, 0.00582, 0.135, 0, 0, 0},         // grad_input, M <= 16
        {3.49e+03, 0, 0.00869, 0.0436, 0, 0.00809, 0},  // grad_input, M > 16
        {1.83e+03, 0, 0.00632, 0.0948, 0, 0, 0},        // grad_weight, M <= 16
        {3.2e+03, 0, 0.00915, 0.0258, 0, 0.000573, 0},  // grad_weight, M > 16
    },
    {
        // sparse
        {3.37e+03, 0, 0, 0.116, 0.334, 0, 0},                 // forward, M <= 16
        {2.21e+03, 0.0123, 0, 0.125, 0.0955, 0.145, 0.0123},  // forward, M > 16
        {2.83e+03, 0, 0, 0.11, 0.703, 0, 0},                  // grad_input, M <= 16
        {2.08e+03, 0.0134, 0, 0.107, 0.549, 0.123, 0.0595},   // grad_input, M > 16
        {3.46e+03, 0, 0, 0.0955, 0.505, 0, 0},                // grad_weight, M <= 16
        {2.05e+03, 0.0157, 0, 0.0886, 0.156, 0.151, 0.0122},  // grad_weight, M > 16
    },
    // fitted: end
};

// The paths of a convolution. Set by hand after the four 3x3 stages of ResNet, three 1x1 layers and one of stride 2 at
// batch 8 and 90 and 95% (within a quarter of each); bench/fit_convolution_costs.py fits them over the whole grid. MACs
// are those of the dense convolution, in the direction of the kernels (see Convolution); packed counts what im2col
// makes, images what is read and written.
struct ConvCost {
  float call, mac, dense, weight, value, packed, images;

  double operator()(double macs, double weights, double nnz, double packed_floats, double image_floats,
                    int threads) const {
    return call + (mac * macs * (nnz / weights) + dense * macs + weight * weights + value * nnz +
                   packed * packed_floats + images * image_floats) /
                      threads;
  }
};

// Sparse is taken when it is expected to need less than this share of the dense operation: the model's error is about
// that large, and not to be slower than dense is a promise.
inline constexpr double kConvMargin = 0.85;

// [kernel of one tap, of more, grouped][NCHW, channels last][forward, grad_input, grad_weight]
inline constexpr ConvCost kDenseConvCosts[3][2][3] = {
    // dense convolution: begin
    {
        // one tap
        {{1e4, 0, 0.0087, 0.2, 0, 0, 0.35}, {1e4, 0, 0.0087, 0.2, 0, 0, 0.35}, {1e4, 0, 0.0087, 0.2, 0, 0, 0.5}},
        {{1e4, 0, 0.0087, 0.2, 0, 0, 0.13}, {1e4, 0, 0.0087, 0.2, 0, 0, 0.1}, {1e4, 0, 0.0087, 0.2, 0, 0, 0.2}},
    },
    {
        // more taps
        {{1e4, 0, 0.0087, 0.2, 0, 0, 0.1}, {1e4, 0, 0.0087, 0.2, 0, 0, 0.1}, {1e4, 0, 0.0087, 0.2, 0, 0, 0.15}},
        {{1e4, 0, 0.0087, 0.2, 0, 0, 0.05}, {1e4, 0, 0.0087, 0.2, 0, 0, 0.05}, {1e4, 0, 0.0087, 0.2, 0, 0, 0.15}},
    },
    {
        // grouped
        {{1e4, 0, 0.0087, 0.2, 0, 0, 0.1}, {1e4, 0, 0.0087, 0.2, 0, 0, 0.1}, {1e4, 0, 0.0087, 0.2, 0, 0, 0.1}},
        {{1e4, 0, 0.0087, 0.2, 0, 0, 0.1}, {1e4, 0, 0.0087, 0.2, 0, 0, 0.1}, {1e4, 0, 0.0087, 0.2, 0, 0, 0.1}},
    },
    // dense convolution: end
};

// [NCHW, channels last][forward, grad_input, grad_weight]
inline constexpr ConvCost kSparseConvCosts[2][3] = {
    // sparse convolution: begin
    {{1e4, 0.018, 0, 0.2, 0.2, 0.1, 0.2}, {1e4, 0.018, 0, 0.2, 0.5, 0.1, 0.2}, {1e4, 0.02, 0, 0.2, 0.2, 0.1, 0.25}},
    {{1e4, 0.018, 0, 0.2, 0.2, 0.1, 0.32}, {1e4, 0.018, 0, 0.2, 0.5, 0.1, 0.32}, {1e4, 0.02, 0, 0.2, 0.2, 0.1, 0.35}},
    // sparse convolution: end
};

}  // namespace masked_ops::cpu
