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
// Of AVX-512.
inline constexpr CostTable kFloatCosts = {
    // float32: begin
    {
        // copy
        {1.92e+03, 0, 0.021, 0, 0.112, 0, 0, 0},        // forward, M <= 16
        {2.78e+03, 0, 0.0186, 0, 0.167, 0, 0.0896, 0},  // forward, M > 16
        {2.47e+03, 0, 0.0235, 0, 0.103, 0, 0, 0},       // grad_input, M <= 16
        {3.22e+03, 0, 0.0187, 0, 0.221, 0, 0.0673, 0},  // grad_input, M > 16
        {2.73e+03, 0, 0.0191, 0, 0.112, 0, 0, 0},       // grad_weight, M <= 16
        {3.49e+03, 0, 0.0193, 0, 0.116, 0, 0.142, 0},   // grad_weight, M > 16
    },
    {
        // fused
        {1.69e+03, 0, 0.0109, 0, 0.0244, 0, 0.0098, 0},    // forward, M <= 16
        {2.38e+03, 0, 0.00791, 0, 0.0719, 0, 0.093, 0},    // forward, M > 16
        {2.03e+03, 0, 0.00881, 0.0094, 0.0253, 0, 0, 0},   // grad_input, M <= 16
        {3.27e+03, 0, 0.00817, 0, 0.0355, 0, 0.0547, 0},   // grad_input, M > 16
        {1.85e+03, 0, 0.00769, 0.00116, 0.0363, 0, 0, 0},  // grad_weight, M <= 16
        {2.91e+03, 0, 0.00887, 0, 0.0275, 0, 0.0232, 0},   // grad_weight, M > 16
    },
    {
        // sparse
        {2.29e+03, 0, 0, 0.0571, 0.0309, 0.259, 0, 0.218},             // forward, M <= 16
        {2.3e+03, 0.00672, 0, 0, 0.0987, 0.0512, 0.134, 0.152},        // forward, M > 16
        {2.75e+03, 0.00108, 0, 0.0348, 0.0472, 0.547, 0.0659, 0.116},  // grad_input, M <= 16
        {3.02e+03, 0.00926, 0, 0, 0.0992, 0.259, 0.114, 0.127},        // grad_input, M > 16
        {2.47e+03, 0.00372, 0, 0.0029, 0.0603, 0.431, 0, 0.199},       // grad_weight, M <= 16
        {2.66e+03, 0.00915, 0, 0, 0.0889, 0.0495, 0.109, 0.206},       // grad_weight, M > 16
    },
    // float32: end
};

// Of AVX2 and of any CPU, measured on the same machine with torch held to the like (ATEN_CPU_CAPABILITY and
// ONEDNN_MAX_CPU_ISA). They serve for all dtypes: elements of 16 bits are converted.
inline constexpr CostTable kFloatCostsAvx2 = {
    // float32, AVX2: begin
    {
        // copy
        {1.9e+03, 0, 0.0217, 0, 0.117, 0, 0, 0},         // forward, M <= 16
        {3.06e+03, 0, 0.0186, 0, 0.161, 0, 0, 0},        // forward, M > 16
        {2.4e+03, 0, 0.0251, 0, 0.108, 0, 0, 0},         // grad_input, M <= 16
        {3.31e+03, 0, 0.0186, 0, 0.192, 0, 0, 0},        // grad_input, M > 16
        {2.98e+03, 0, 0.0189, 0.00566, 0.108, 0, 0, 0},  // grad_weight, M <= 16
        {3.61e+03, 0, 0.0191, 0, 0.112, 0, 0.0616, 0},   // grad_weight, M > 16
    },
    {
        // fused
        {1.56e+03, 0, 0.021, 0.0165, 0.0112, 0, 0.337, 0},  // forward, M <= 16
        {2.57e+03, 0, 0.0155, 0, 0.0928, 0, 0.118, 0},      // forward, M > 16
        {1.95e+03, 0, 0.0236, 0.0149, 0.0241, 0, 0, 0},     // grad_input, M <= 16
        {3.03e+03, 0, 0.016, 0, 0.0497, 0, 0.0521, 0},      // grad_input, M > 16
        {1.76e+03, 0, 0.0211, 0.032, 0.0188, 0, 0, 0},      // grad_weight, M <= 16
        {2.75e+03, 0, 0.0162, 0, 0.0515, 0, 0.0766, 0},     // grad_weight, M > 16
    },
    {
        // sparse
        {1.64e+03, 0.00316, 0, 0.00574, 0.0278, 0.463, 0, 0.866},  // forward, M <= 16
        {2.14e+03, 0.016, 0, 0, 0.086, 0.321, 0.0979, 0.137},      // forward, M > 16
        {1.96e+03, 0.0348, 0, 0, 0.0421, 0.627, 0, 0.521},         // grad_input, M <= 16
        {2.8e+03, 0.0173, 0, 0, 0.0744, 0.669, 0.0697, 0.135},     // grad_input, M > 16
        {1.9e+03, 0.0213, 0, 0.337, 0.0279, 0.828, 0, 0.0977},     // grad_weight, M <= 16
        {2.97e+03, 0.0169, 0, 0.0488, 0.234, 0.336, 0.158, 0.28},  // grad_weight, M > 16
    },
    // float32, AVX2: end
};

inline constexpr CostTable kFloatCostsPortable = {
    // float32, DEFAULT: begin
    {
        // copy
        {2.27e+03, 0, 0.0312, 0, 0.121, 0, 0, 0},              // forward, M <= 16
        {2.54e+03, 0, 0.0189, 0, 0.259, 0, 0, 0},              // forward, M > 16
        {2.57e+03, 0, 0.0384, 0, 0.122, 0, 0, 0},              // grad_input, M <= 16
        {3.13e+03, 0, 0.0191, 0, 0.301, 0, 0, 0},              // grad_input, M > 16
        {3.15e+03, 0, 0.0191, 0.00815, 0.131, 0, 0.00363, 0},  // grad_weight, M <= 16
        {3.67e+03, 0, 0.0205, 0, 0.168, 0, 0, 0},              // grad_weight, M > 16
    },
    {
        // fused
        {1.84e+03, 0, 0.0554, 0.0684, 0.0239, 0, 0.000425, 0},  // forward, M <= 16
        {3.42e+03, 0, 0.0445, 0.148, 0.239, 0, 0.187, 0},       // forward, M > 16
        {2.03e+03, 0, 0.0735, 0.015, 0.0657, 0, 0, 0},          // grad_input, M <= 16
        {4.65e+03, 0, 0.0446, 0.00402, 0.179, 0, 0.0757, 0},    // grad_input, M > 16
        {1.99e+03, 0, 0.0646, 0.0325, 0.0279, 0, 0, 0},         // grad_weight, M <= 16
        {3.67e+03, 0, 0.0462, 0, 0.192, 0, 0.0635, 0},          // grad_weight, M > 16
    },
    {
        // sparse
        {2.02e+03, 0.0512, 0, 0.0366, 0.0235, 0.736, 0, 0.369},  // forward, M <= 16
        {2.97e+03, 0.0377, 0, 0, 0.0191, 0.946, 0.141, 0.41},    // forward, M > 16
        {2.4e+03, 0.0855, 0, 0, 0.0581, 0.912, 0, 0.17},         // grad_input, M <= 16
        {3.23e+03, 0.0362, 0, 0, 0.0518, 1.28, 0.175, 0.446},    // grad_input, M > 16
        {2.33e+03, 0.079, 0, 0.238, 0.0282, 1.21, 0, 0.251},     // grad_weight, M <= 16
        {3.45e+03, 0.0716, 0, 0, 0.2, 0.379, 0.222, 0.202},      // grad_weight, M > 16
    },
    // float32, DEFAULT: end
};

// The following are of AVX-512.

// For CPUs that multiply bfloat16.
inline constexpr CostTable kBFloat16Costs = {
    // bfloat16: begin
    {
        // copy
        {1.35e+04, 0, 0.00379, 0.0584, 0.0344, 0, 0, 0},       // forward, M <= 16
        {1.61e+04, 0, 0.00435, 0.0157, 0.0585, 0, 0, 0},       // forward, M > 16
        {1.43e+04, 0, 0.00419, 0.0705, 0.0334, 0, 0, 0},       // grad_input, M <= 16
        {1.66e+04, 0, 0.00443, 0.00309, 0.0809, 0, 0, 0},      // grad_input, M > 16
        {1.58e+04, 0, 0.00339, 0.0376, 0.0431, 0, 0.0326, 0},  // grad_weight, M <= 16
        {1.77e+04, 0, 0.0046, 0, 0.0615, 0, 0.0352, 0},        // grad_weight, M > 16
    },
    {
        // fused
        {2.19e+03, 0, 0.00533, 0.000167, 0.0147, 0, 0.104, 0},  // forward, M <= 16
        {2.46e+03, 0, 0.00392, 0, 0.0332, 0, 0.0752, 0},        // forward, M > 16
        {2.29e+03, 0, 0.00694, 0.0133, 0.0156, 0, 0.0113, 0},   // grad_input, M <= 16
        {3.21e+03, 0, 0.00398, 0, 0.028, 0, 0.0707, 0},         // grad_input, M > 16
        {2.38e+03, 0, 0.00321, 0.026, 0.0156, 0, 0, 0},         // grad_weight, M <= 16
        {3.46e+03, 0, 0.00423, 0, 0.0337, 0, 0.0631, 0},        // grad_weight, M > 16
    },
    {
        // sparse
        {2.56e+03, 0, 0, 0.0268, 0.028, 0.299, 0.0113, 0.219},         // forward, M <= 16
        {2.3e+03, 0.00817, 0, 0, 0.0565, 0.146, 0.0728, 0.107},        // forward, M > 16
        {3.03e+03, 0.00339, 0, 0.0247, 0.0312, 0.494, 0.0769, 0.148},  // grad_input, M <= 16
        {3.1e+03, 0.00954, 0, 0, 0.0537, 0.311, 0.0819, 0.0948},       // grad_input, M > 16
        {3.13e+03, 0.0162, 0, 0.0534, 0.0257, 0.315, 0, 0.0753},       // grad_weight, M <= 16
        {2.99e+03, 0.0107, 0, 0, 0.0576, 0.169, 0.0688, 0.135},        // grad_weight, M > 16
    },
    // bfloat16: end
};

inline constexpr CostTable kHalfCosts = {
    // float16: begin
    {
        // copy
        {4.7e+03, 0, 0.0781, 0, 0.0329, 0, 0, 0},  // forward, M <= 16
        {2.09e+04, 0, 0.0769, 0, 0, 0, 0, 0},      // forward, M > 16
        {0, 0, 0.521, 0, 0.196, 0, 0, 0},          // grad_input, M <= 16
        {0, 0, 0.374, 0, 5.4, 0, 0, 0},            // grad_input, M > 16
        {3.31e+03, 0, 0.269, 0, 0.512, 0, 0, 0},   // grad_weight, M <= 16
        {0, 0, 0.219, 0, 2.63, 0, 1.13, 0},        // grad_weight, M > 16
    },
    {
        // fused
        {2.26e+03, 0, 0.0101, 0.00365, 0.0159, 0, 0.0907, 0},  // forward, M <= 16
        {2.01e+03, 0, 0.00656, 0, 0.0935, 0, 0.192, 0},        // forward, M > 16
        {2.2e+03, 0, 0.0127, 0, 0.0274, 0, 0, 0},              // grad_input, M <= 16
        {2.12e+03, 0, 0.00855, 0, 0.0726, 0, 0.106, 0},        // grad_input, M > 16
        {2.14e+03, 0, 0.00755, 0, 0.0386, 0, 0.0239, 0},       // grad_weight, M <= 16
        {2.16e+03, 0, 0.00749, 0, 0.0609, 0, 0.199, 0},        // grad_weight, M > 16
    },
    {
        // sparse
        {2.41e+03, 0, 0, 0.00984, 0.0448, 0.26, 0.0468, 0.285},       // forward, M <= 16
        {1.86e+03, 0.0082, 0, 0, 0.127, 0.0146, 0.102, 0.0897},       // forward, M > 16
        {2.47e+03, 0.0116, 0, 0, 0.0693, 0.419, 0, 0.402},            // grad_input, M <= 16
        {1.64e+03, 0.0118, 0, 0, 0.149, 0.16, 0.0647, 0.149},         // grad_input, M > 16
        {2.82e+03, 0.0129, 0, 0.00784, 0.0668, 0.359, 0.0369, 0.13},  // grad_weight, M <= 16
        {1.97e+03, 0.0113, 0, 0, 0.132, 0.041, 0.142, 0.0628},        // grad_weight, M > 16
    },
    // float16: end
};

// The paths of a convolution, fitted by bench/fit_convolution_costs.py over layers of ResNet, MobileNetV2 and U-Net.
// MACs are those of the dense convolution, in the direction of the kernels (see Convolution); packed counts what im2col
// reads, by vectors of channels where they lie last, images what is read and written.
inline constexpr int64_t kPackedVector = 16;
inline constexpr double kPackedRows = 8;  // of a strip whose rows of taps share what is packed
struct ConvCost {
  float call, mac, dense, weight, value, packed, images;

  double operator()(double macs, double weights, double nnz, double packed_floats, double image_floats,
                    int threads) const {
    return call + (mac * macs * (nnz / weights) + dense * macs + weight * weights + value * nnz +
                   packed * packed_floats + images * image_floats) /
                      threads;
  }
};

// With more weights than this, between the densities that were measured, sparse is taken when it is expected to need
// less than this share of the others: 512 -> 512 on 14 x 14 at 90% was expected to need 0.9 of dense, and needed 1.2.
inline constexpr double kMostDensity = 0.6, kMostMargin = 0.75;
// How much more sparse ones cost with vectors of four floats, where torch's, held to SSE4.1, take 4.2 times as long as
// with AVX-512: on 27 layers 2.4 to 3.7 times from 80% on, and 4.2 to 5.6 times at 50%. In units of torch's costs.
inline constexpr double kPortableConvCost = 1.2;

// Convolutions without their pruned channels: the block of channels that torch's kernels round up to, nanoseconds for
// an element moved on one thread, and for the calls; and the share of the dense operation below which it is taken.
inline constexpr int64_t kChannelBlock = 16;
inline constexpr double kMoveCost = 0.3, kCompactConvolutionCall = 1e4;
inline constexpr double kCompactMargin = 0.93;

// How much faster torch convolves in 16 bits where the CPU has arithmetic for them: bfloat16, batch 8, 3 x 3 and 1 x 1,
// 1.6 to 2.5 times. And in float16 where it has none: the four stages of ResNet took 170 to 240 ms, in float32 4.
inline constexpr double k16BitConvSpeedup = 2.5, kHalfConvSpeedup = 1.0 / 20;
// The sparse kernels take 16-bit images as floats, so many bytes of them at a time, at nanoseconds for an element on
// one thread, and for the calls.
inline constexpr int64_t kConvertedBytes = int64_t{16} << 20;
inline constexpr double kConvertCost = 0.1, kConvertCall = 5e3;

// Contiguous images of one tap that the sparse kernels and the masked GEMM both take as they lie: the share of
// remaining weights below which sparse is faster. At 0.7, five layers of 28 x 28 and 56 x 56 need 0.93 to 1.07 of the
// GEMM's time in forward, 0.94 to 1.04 in grad_input and 0.78 to 1.08 in grad_weight; at 0.5, 256 -> 64 channels of 56
// x 56 need 0.75, 0.68 and 0.8.
inline constexpr double kSparsePlaneDensity = 0.65;

// Depthwise convolutions: where their own kernels are taken, by the times of torch's over theirs, batch 8, forward,
// grad_input and grad_weight. Contiguous, 3 x 3 that keeps the size: 144 channels of 56 x 56 4.1, 4.7, 4.8; 512 of 14 x
// 14 2.9, 3.1, 2.3; 960 of 7 x 7 2.2, 2.5, 1.4, of 2 x 2 1.8, 1.8, 17, of one position 0.9, 0.8, 9. Others: 144 of 56 x
// 56, stride 2, 2.0, 1.8, 1.9; 240 of 28 x 28, 5 x 5 and stride 2, 0.9, 0.9, 10. Channels last, in the same order: 1.0,
// 1.2, 1.0; 1.2, 1.15, 0.97; 1.4, 2.2, 1.0 and 1.3, 1.0, 8.7; over masking, then torch's, in batches of 1, 8 and 32 of
// the first two 1.0 to 2.2 but for grad_weight.
inline constexpr int64_t kSmallKernel = 9, kLeastWidth = 8;

// [kernel of one tap, of more, grouped][NCHW, channels last][forward, grad_input, grad_weight]
// Contiguous, the costs of a call of sparse ones and of torch's with more taps are not fitted but measured, on layers
// of 16 channels: the layers of the fit are all large, and called sparse 12 us and torch nothing.
inline constexpr ConvCost kDenseConvCosts[3][2][3] = {
    // dense convolution: begin
    {
        // one tap
        {
            {4.09e+04, 0, 0.00952, 0.153, 0, 0, 0.18},   // forward
            {3.13e+04, 0, 0.00926, 0.364, 0, 0, 0.244},  // grad_input
            {2.66e+04, 0, 0.0101, 0.432, 0, 0, 0.162},   // grad_weight
        },
        {
            {2.06e+04, 0, 0.0084, 0.518, 0, 0, 0.0561},   // forward
            {1.54e+04, 0, 0.00832, 0.373, 0, 0, 0.0837},  // grad_input
            {0, 0, 0.00937, 0.644, 0, 0, 0.169},          // grad_weight
        },
    },
    {
        // more taps
        {
            {5e+03, 0, 0.00859, 0.444, 0, 0, 0.381},  // forward
            {5e+03, 0, 0.0075, 0.878, 0, 0, 1.01},    // grad_input
            {5e+03, 0, 0.00853, 0.768, 0, 0, 0.557},  // grad_weight
        },
        {
            {0, 0, 0.00751, 0.568, 0, 0, 0.248},  // forward
            {0, 0, 0.00754, 0.599, 0, 0, 0.325},  // grad_input
            {0, 0, 0.00832, 1.12, 0, 0, 0.534},   // grad_weight
        },
    },
    {
        // grouped
        {
            {0, 0, 0.106, 0, 0, 0, 0},    // forward
            {0, 0, 0.123, 0, 0, 0, 0},    // grad_input
            {0, 0, 0.11, 2.17, 0, 0, 0},  // grad_weight
        },
        {
            {0, 0, 0.0476, 12.1, 0, 0, 0},  // forward
            {0, 0, 0.0542, 10.1, 0, 0, 0},  // grad_input
            {0, 0, 0.0473, 8.65, 0, 0, 0},  // grad_weight
        },
    },
    // dense convolution: end
};

// Convolutions of one tap by the masked GEMM, [NCHW, channels last][forward, grad_input, grad_weight]. Channels last,
// it is considered where there are so many weights for each element of the images, input and output together: below,
// torch is ahead by up to three times.
inline constexpr double kFusedWeights = 0.3;
// On AVX2, where torch's take 1.8 times as long, contiguous ones take 1.9, and up to 2.5: 256 -> 64 on 56 x 56 1.3
// times as fast as torch, 512 -> 512 on 28 x 28 0.85, 256 -> 1024 on 14 x 14 0.87 and 0.7.
inline constexpr double kAvx2FusedConvCost = 1.3;
inline constexpr ConvCost kFusedConvCosts[2][3] = {
    // fused convolution: begin
    {
        {0, 0, 0.00846, 0.287, 0, 0, 0.0913},  // forward
        {0, 0, 0.00847, 0.638, 0, 0, 0.0978},  // grad_input
        {0, 0, 0.00983, 0.458, 0, 0, 0.0944},  // grad_weight
    },
    {
        {1.21e+04, 0, 0.0091, 0.0499, 0, 0, 0.0448},  // forward
        {0, 0, 0.00787, 0.0523, 0, 0, 0.288},         // grad_input
        {0, 0, 0.00826, 0.0557, 0, 0, 0.259},         // grad_weight
    },
    // fused convolution: end
};

// [this density or more, less][NCHW that is packed, channels last, NCHW of one tap that is not][forward, grad_input,
// grad_weight]
inline constexpr double kFullDensity = 0.25;
inline constexpr ConvCost kSparseConvCosts[2][3][3] = {
    // sparse convolution: begin
    {
        {
            {3e+03, 0.00906, 0, 0.367, 0, 0.131, 0.0635},     // forward
            {3e+03, 0.011, 0, 0.804, 0.133, 0.0788, 0.0951},  // grad_input
            {3e+03, 0.013, 0, 0.622, 0, 0.156, 0.0388},       // grad_weight
        },
        {
            {0, 0.00959, 0, 0.43, 0, 0.0525, 0.159},     // forward
            {0, 0.0107, 0, 0.871, 0.27, 0.0772, 0.139},  // grad_input
            {0, 0.0131, 0, 0.956, 0, 0.117, 0.143},      // grad_weight
        },
    },
    {
        {
            {3e+03, 0.0226, 0, 0.247, 0, 0.163, 0.0605},      // forward
            {3e+03, 0.0185, 0, 0.238, 0.668, 0.0586, 0.152},  // grad_input
            {0, 0.0302, 0, 0.341, 0.138, 0.135, 0.0835},      // grad_weight
        },
        {
            {0, 0.0137, 0, 0.219, 0, 0.0764, 0.184},    // forward
            {0, 0.0138, 0, 0.26, 0.024, 0.0486, 0.19},  // grad_input
            {0, 0.0193, 0, 0.231, 0, 0.0869, 0.15},     // grad_weight
        },
    },
    // sparse convolution: end
};

}  // namespace masked_ops::cpu
