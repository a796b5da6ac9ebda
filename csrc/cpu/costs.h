// What the paths of a linear layer cost on this kind of machine, for the choice among them: nanoseconds, fitted by
// bench/fit_cost_model.py on two Zen 5 cores with AVX-512. Ratios matter, and they move little from machine to machine.
#pragma once

#include <cstdint>

#include "sparse_index.h"

namespace masked_ops::cpu {

// call + memory * N * K
//      + (mac * M * nnz + dense * M * N * K + weight * N * K + value * nnz + io * M * (N + K) + block * M * N * B) /
//        threads
// where B is the number of blocks that a sparse index cuts K into; memory is what the threads share.
struct Cost {
  float call, mac, dense, weight, memory, value, io, block;

  double operator()(int64_t M, int64_t N, int64_t K, int64_t nnz, int threads) const {
    const double m = double(M), n = double(N), k = double(K), z = double(nnz);
    const int64_t columns = block_cols(z / (n * k));
    const double blocks = double((K + columns - 1) / columns);
    const double shared =
        m * (mac * z + dense * n * k + io * (n + k) + block * n * blocks) + weight * n * k + value * z;
    return call + memory * n * k + shared / threads;
  }
};

// The compact path gathers and scatters: nanoseconds for an element moved, and for the calls themselves.
inline constexpr double kGatherCost = 0.5, kCompactCall = 8e3;

// A copy of this many bytes is fresh memory (see memory.cpp), whose page faults outlast the pass itself and do not
// share among threads (67 MB: 3.4 ms on huge pages, of which the pass takes 1.4): nanoseconds a byte, on top of what
// was fitted.
inline constexpr int64_t kFreshBytes = int64_t{32} << 20;
inline constexpr double kFreshCost = 0.03;

// [path: copy, fused, sparse][pass: forward, grad_input, grad_weight, each for M <= 16 and for M > 16]
inline constexpr int64_t kSmallM = 16;
using CostTable = Cost[3][6];
inline constexpr CostTable kFloatCosts = {
    // float32: begin
    {
        // copy
        {2.59e+03, 0, 0.0266, 0.164, 0, 0, 0, 0},  // forward, M <= 16
        {4.05e+03, 0, 0.02, 0.226, 0, 0, 0, 0},    // forward, M > 16
        {2.31e+03, 0, 0.0295, 0.157, 0, 0, 0, 0},  // grad_input, M <= 16
        {3.66e+03, 0, 0.02, 0.252, 0, 0, 0, 0},    // grad_input, M > 16
        {2.56e+03, 0, 0.0204, 0.184, 0, 0, 0, 0},  // grad_weight, M <= 16
        {4.37e+03, 0, 0.0208, 0.13, 0, 0, 0, 0},   // grad_weight, M > 16
    },
    {
        // fused
        {2.38e+03, 0, 0.00536, 0.199, 0, 0, 0, 0},         // forward, M <= 16
        {3.51e+03, 0, 0.00838, 0.0943, 0, 0, 0.0354, 0},   // forward, M > 16
        {2.18e+03, 0, 0.00582, 0.135, 0, 0, 0, 0},         // grad_input, M <= 16
        {3.49e+03, 0, 0.00869, 0.0436, 0, 0, 0.00809, 0},  // grad_input, M > 16
        {1.83e+03, 0, 0.00632, 0.0948, 0, 0, 0, 0},        // grad_weight, M <= 16
        {3.2e+03, 0, 0.00915, 0.0258, 0, 0, 0.000573, 0},  // grad_weight, M > 16
    },
    {
        // sparse
        {3.37e+03, 0, 0, 0.116, 0, 0.334, 0, 0},                 // forward, M <= 16
        {2.21e+03, 0.0123, 0, 0.125, 0, 0.0955, 0.145, 0.0123},  // forward, M > 16
        {2.83e+03, 0, 0, 0.11, 0, 0.703, 0, 0},                  // grad_input, M <= 16
        {2.08e+03, 0.0134, 0, 0.107, 0, 0.549, 0.123, 0.0595},   // grad_input, M > 16
        {3.46e+03, 0, 0, 0.0955, 0, 0.505, 0, 0},                // grad_weight, M <= 16
        {2.05e+03, 0.0157, 0, 0.0886, 0, 0.156, 0.151, 0.0122},  // grad_weight, M > 16
    },
    // float32: end
};

// For CPUs that multiply bfloat16.
inline constexpr CostTable kBFloat16Costs = {
    // bfloat16: begin
    {
        // copy
        {1.44e+04, 0, 0.00277, 0.126, 0, 0, 0, 0},        // forward, M <= 16
        {1.43e+04, 0, 0.00432, 0.0927, 0, 0, 0, 0},       // forward, M > 16
        {1.33e+04, 0, 0.0028, 0.141, 0, 0, 0, 0},         // grad_input, M <= 16
        {1.37e+04, 0, 0.00439, 0.107, 0, 0, 0, 0},        // grad_input, M > 16
        {1.45e+04, 0, 0.00222, 0.124, 0, 0, 0, 0},        // grad_weight, M <= 16
        {1.46e+04, 0, 0.00466, 0.0673, 0, 0, 0.0206, 0},  // grad_weight, M > 16
    },
    {
        // fused
        {2.39e+03, 0, 0.00576, 0.0221, 0, 0, 0.139, 0},   // forward, M <= 16
        {2.94e+03, 0, 0.00389, 0.0448, 0, 0, 0.0355, 0},  // forward, M > 16
        {2e+03, 0, 0.00822, 0.0365, 0, 0, 0.0244, 0},     // grad_input, M <= 16
        {2.83e+03, 0, 0.0039, 0.042, 0, 0, 0.0314, 0},    // grad_input, M > 16
        {1.92e+03, 0, 0.00288, 0.0824, 0, 0, 0, 0},       // grad_weight, M <= 16
        {2.7e+03, 0, 0.00424, 0.0392, 0, 0, 0.0287, 0},   // grad_weight, M > 16
    },
    {
        // sparse
        {3.26e+03, 0.0058, 0, 0.0754, 0, 0.283, 0.0616, 0},     // forward, M <= 16
        {2.45e+03, 0.0112, 0, 0.0816, 0, 0.134, 0.113, 0},      // forward, M > 16
        {3.07e+03, 0.0199, 0, 0.0699, 0, 0.528, 0, 0.0638},     // grad_input, M <= 16
        {2.37e+03, 0.012, 0, 0.0736, 0, 0.53, 0.0929, 0.0711},  // grad_input, M > 16
        {3.34e+03, 0.0109, 0, 0.1, 0, 0.361, 0, 0},             // grad_weight, M <= 16
        {2.36e+03, 0.0138, 0, 0.0951, 0, 0.182, 0.117, 0},      // grad_weight, M > 16
    },
    // bfloat16: end
};

inline constexpr CostTable kHalfCosts = {
    // float16: begin
    {
        // copy
        {6.69e+03, 0, 0.0806, 0.029, 0, 0, 0.0137, 0},  // forward, M <= 16
        {1.77e+04, 0, 0.0791, 0, 0, 0, 0.528, 0},       // forward, M > 16
        {0, 0, 0.617, 0.263, 0, 0, 0, 0},               // grad_input, M <= 16
        {0, 0, 0.435, 4.94, 0, 0, 0, 0},                // grad_input, M > 16
        {6.79e+03, 0, 0.282, 0.456, 0, 0, 0, 0},        // grad_weight, M <= 16
        {1.23e+04, 0, 0.292, 0.144, 0, 0, 0, 0},        // grad_weight, M > 16
    },
    {
        // fused
        {2.9e+03, 0, 0.0103, 0.0226, 0, 0, 0.0954, 0},    // forward, M <= 16
        {2.97e+03, 0, 0.00697, 0.1, 0, 0, 0.0701, 0},     // forward, M > 16
        {2.18e+03, 0, 0.0119, 0.0331, 0, 0, 0, 0},        // grad_input, M <= 16
        {3.15e+03, 0, 0.0086, 0.0333, 0, 0, 0.00951, 0},  // grad_input, M > 16
        {2.31e+03, 0, 0.00613, 0.0708, 0, 0, 0.0285, 0},  // grad_weight, M <= 16
        {2.5e+03, 0, 0.00807, 0.0288, 0, 0, 0.0563, 0},   // grad_weight, M > 16
    },
    {
        // sparse
        {3.54e+03, 0.0106, 0, 0.0661, 0, 0.232, 0.094, 0},       // forward, M <= 16
        {3.29e+03, 0.00985, 0, 0.0718, 0, 0.18, 0.105, 0.0015},  // forward, M > 16
        {3.16e+03, 0.0214, 0, 0.0667, 0, 0.473, 0.0779, 0},      // grad_input, M <= 16
        {3.09e+03, 0.0114, 0, 0.067, 0, 0.512, 0.089, 0.00948},  // grad_input, M > 16
        {3.19e+03, 0.0134, 0, 0.0854, 0, 0.328, 0.19, 0},        // grad_weight, M <= 16
        {3.36e+03, 0.0131, 0, 0.0954, 0, 0.222, 0.082, 0},       // grad_weight, M > 16
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
