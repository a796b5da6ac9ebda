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

// A copy of more bytes than this is fresh memory, whose page faults outlast the pass itself and do not share among
// threads (1, 4096 -> 4096: 21 ms of which 17): nanoseconds a byte, on top of what was fitted.
inline constexpr int64_t kFreshBytes = int64_t{1} << 22;
inline constexpr double kFreshCost = 0.25;

// [path: copy, fused, sparse][pass: forward, grad_input, grad_weight, each for M <= 16 and for M > 16]
inline constexpr int64_t kSmallM = 16;
using CostTable = Cost[3][6];
inline constexpr CostTable kFloatCosts = {
    // float32: begin
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
    // float32: end
};

// For CPUs that multiply bfloat16.
inline constexpr CostTable kBFloat16Costs = {
    // bfloat16: begin
    {
        // copy
        {1.43e+04, 0, 0.00371, 0.109, 0, 0, 0},        // forward, M <= 16
        {1.43e+04, 0, 0.00432, 0.0927, 0, 0, 0},       // forward, M > 16
        {1.32e+04, 0, 0.00346, 0.126, 0, 0, 0},        // grad_input, M <= 16
        {1.37e+04, 0, 0.00439, 0.107, 0, 0, 0},        // grad_input, M > 16
        {1.38e+04, 0, 0.00165, 0.117, 0, 0, 0},        // grad_weight, M <= 16
        {1.46e+04, 0, 0.00466, 0.0673, 0, 0.0206, 0},  // grad_weight, M > 16
    },
    {
        // fused
        {2.44e+03, 0, 0.00236, 0.0956, 0, 0.0334, 0},  // forward, M <= 16
        {2.94e+03, 0, 0.00389, 0.0448, 0, 0.0355, 0},  // forward, M > 16
        {2.21e+03, 0, 0.00261, 0.0884, 0, 0, 0},       // grad_input, M <= 16
        {2.83e+03, 0, 0.0039, 0.042, 0, 0.0314, 0},    // grad_input, M > 16
        {1.96e+03, 0, 0.00274, 0.0787, 0, 0, 0},       // grad_weight, M <= 16
        {2.7e+03, 0, 0.00424, 0.0392, 0, 0.0287, 0},   // grad_weight, M > 16
    },
    {
        // sparse
        {3.53e+03, 0, 0, 0.0692, 0.364, 0.0526, 0},          // forward, M <= 16
        {2.45e+03, 0.0112, 0, 0.0816, 0.134, 0.113, 0},      // forward, M > 16
        {3.07e+03, 0, 0, 0.0641, 0.763, 0, 0.117},           // grad_input, M <= 16
        {2.37e+03, 0.012, 0, 0.0736, 0.53, 0.0929, 0.0711},  // grad_input, M > 16
        {3.8e+03, 0, 0, 0.0952, 0.476, 0, 0},                // grad_weight, M <= 16
        {2.36e+03, 0.0138, 0, 0.0951, 0.182, 0.117, 0},      // grad_weight, M > 16
    },
    // bfloat16: end
};

inline constexpr CostTable kHalfCosts = {
    // float16: begin
    {
        // copy
        {6.13e+03, 0, 0.0779, 0.0316, 0, 0.0889, 0},  // forward, M <= 16
        {1.77e+04, 0, 0.0791, 0, 0, 0.528, 0},        // forward, M > 16
        {0, 0, 0.586, 0.366, 0, 0, 0},                // grad_input, M <= 16
        {0, 0, 0.435, 4.94, 0, 0, 0},                 // grad_input, M > 16
        {6.71e+03, 0, 0.276, 0.482, 0, 0, 0},         // grad_weight, M <= 16
        {1.23e+04, 0, 0.292, 0.144, 0, 0, 0},         // grad_weight, M > 16
    },
    {
        // fused
        {2.81e+03, 0, 0.00397, 0.175, 0, 0.0277, 0},   // forward, M <= 16
        {2.97e+03, 0, 0.00697, 0.1, 0, 0.0701, 0},     // forward, M > 16
        {2.72e+03, 0, 0.00472, 0.115, 0, 0, 0},        // grad_input, M <= 16
        {3.15e+03, 0, 0.0086, 0.0333, 0, 0.00951, 0},  // grad_input, M > 16
        {2.25e+03, 0, 0.00579, 0.0748, 0, 0.0114, 0},  // grad_weight, M <= 16
        {2.5e+03, 0, 0.00807, 0.0288, 0, 0.0563, 0},   // grad_weight, M > 16
    },
    {
        // sparse
        {3.35e+03, 0, 0, 0.0664, 0.375, 0.0626, 0},           // forward, M <= 16
        {3.29e+03, 0.00985, 0, 0.0718, 0.18, 0.105, 0.0015},  // forward, M > 16
        {3.12e+03, 0, 0, 0.0668, 0.774, 0.0166, 0},           // grad_input, M <= 16
        {3.09e+03, 0.0114, 0, 0.067, 0.512, 0.089, 0.00948},  // grad_input, M > 16
        {3.23e+03, 0, 0, 0.0913, 0.526, 0.0488, 0},           // grad_weight, M <= 16
        {3.36e+03, 0.0131, 0, 0.0954, 0.222, 0.082, 0},       // grad_weight, M > 16
    },
    // float16: end
};

// The paths of a convolution, fitted by bench/fit_convolution_costs.py. MACs are those of the dense convolution, in the
// direction of the kernels (see Convolution); packed counts what im2col makes, images what is read and written.
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
        {{1e4, 0, 0.0087, 0.2, 0, 0, 0.1}, {1e4, 0, 0.0087, 0.2, 0, 0, 0.1}, {1e4, 0, 0.0087, 0.2, 0, 0, 0.1}},
        {{1e4, 0, 0.0087, 0.2, 0, 0, 0.1}, {1e4, 0, 0.0087, 0.2, 0, 0, 0.1}, {1e4, 0, 0.0087, 0.2, 0, 0, 0.1}},
    },
    {
        // more taps
        {{1e4, 0, 0.0087, 0.2, 0, 0, 0.1}, {1e4, 0, 0.0087, 0.2, 0, 0, 0.1}, {1e4, 0, 0.0087, 0.2, 0, 0, 0.1}},
        {{1e4, 0, 0.0087, 0.2, 0, 0, 0.1}, {1e4, 0, 0.0087, 0.2, 0, 0, 0.1}, {1e4, 0, 0.0087, 0.2, 0, 0, 0.1}},
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
    {{1e4, 0.018, 0, 0.2, 0.2, 0.1, 0.3}, {1e4, 0.018, 0, 0.2, 0.5, 0.1, 0.3}, {1e4, 0.02, 0, 0.2, 0.2, 0.1, 0.3}},
    {{1e4, 0.018, 0, 0.2, 0.2, 0.2, 0.3}, {1e4, 0.018, 0, 0.2, 0.5, 0.2, 0.3}, {1e4, 0.02, 0, 0.2, 0.2, 0.2, 0.3}},
    // sparse convolution: end
};

}  // namespace masked_ops::cpu
