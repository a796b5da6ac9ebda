// What the paths of a linear layer cost on this kind of machine, for the choice among them: nanoseconds, fitted by
// bench/fit_cost_model.py on two Zen 5 cores with AVX-512; those of packed weights (of AVX-512, M <= 16) on two Zen 4
// cores. Ratios matter, and they move little from machine to machine: on Zen 4, whose AVX-512 products
// take twice as long, the path that is chosen is within 10% of the best in 93 to 98% of 762 fresh cells, by pass and
// dtype.
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

// Nanoseconds for an element of a packed weight to be laid out densely without vectors.
inline constexpr double kExpandCost = 0.6;

// By how much of its part a product with weights in blocks of rows takes less (forward, grad_input, grad_weight): 128,
// 768 -> 3072 and 512, 3072 -> 768 at 30 to 90%: 0.86 to 0.96 of the time, 0.97 to 1.18 and 0.79 to 0.95.
inline constexpr double kRowBlockGain[3] = {0.1, 0, 0.15};

// How much faster torch multiplies 16-bit floats in matrix units (AMX) than the tables say, which are of CPUs with dot
// products; ours use the vectors there as well. An estimate, for none was measured: a core multiplies 16 times as much
// in them a cycle, of which about half arrives, and where they are, vectors do somewhat less than where the tables are
// from.
inline constexpr double kTileSpeedup = 8;

// [path: copy, fused, sparse][pass: forward, grad_input, grad_weight, each for M <= 16 and for M > 16]
inline constexpr int64_t kSmallM = 16;
using CostTable = Cost[3][6];
// The same for M = 1, which has a sparse kernel of its own, for other M <= 16 and for M > 16.
using PackedCostTable = Cost[3][9];
// Of AVX-512.
inline constexpr CostTable kFloatCosts = {
    // float32: begin
    {
        // copy
        {2.15e+03, 0, 0.023, 0, 0.105, 0, 0, 0},         // forward, M <= 16
        {2.91e+03, 0, 0.0184, 0, 0.179, 0, 0, 0},        // forward, M > 16
        {2.71e+03, 0, 0.0263, 0, 0.0955, 0, 0, 0},       // grad_input, M <= 16
        {3.43e+03, 0, 0.0184, 0, 0.2, 0, 0, 0},          // grad_input, M > 16
        {3.16e+03, 0, 0.0189, 0.0167, 0.0914, 0, 0, 0},  // grad_weight, M <= 16
        {3.74e+03, 0, 0.0191, 0, 0.0824, 0, 0.0696, 0},  // grad_weight, M > 16
    },
    {
        // fused
        {1.53e+03, 0, 0.00914, 0.027, 0.00685, 0, 0, 0},      // forward, M <= 16
        {2.28e+03, 0, 0.00771, 0.0399, 0.0329, 0, 0.028, 0},  // forward, M > 16
        {2.1e+03, 0, 0.00661, 0.0301, 0.00675, 0, 0, 0},      // grad_input, M <= 16
        {2.81e+03, 0, 0.00784, 0, 0.0239, 0, 0.0219, 0},      // grad_input, M > 16
        {1.86e+03, 0, 0.00839, 0.0263, 0.00748, 0, 0, 0},     // grad_weight, M <= 16
        {2.84e+03, 0, 0.00799, 0, 0.0179, 0, 0.0418, 0},      // grad_weight, M > 16
    },
    {
        // sparse
        {2.25e+03, 0, 0, 0.082, 0.0113, 0.283, 0, 0.16},               // forward, M <= 16
        {2.52e+03, 0.00646, 0, 0.0325, 0.049, 0.0965, 0.079, 0.156},   // forward, M > 16
        {2.99e+03, 0, 0, 0.0686, 0.0193, 0.539, 0, 0.118},             // grad_input, M <= 16
        {3.36e+03, 0.00886, 0, 0.0232, 0.0561, 0.321, 0.0817, 0.103},  // grad_input, M > 16
        {2.85e+03, 0, 0, 0.0425, 0.0162, 0.443, 0, 0.161},             // grad_weight, M <= 16
        {3.08e+03, 0.00953, 0, 0.0218, 0.0392, 0.159, 0.0732, 0.111},  // grad_weight, M > 16
    },
    // float32: end
};

// Of packed weights, on AVX-512.
inline constexpr PackedCostTable kFloatPackedCosts = {
    // float32, packed: begin
    {
        // copy
        {3.57e+03, 0, 0.0185, 0, 0.12, 0.0378, 0, 0},      // forward, M = 1
        {3.01e+03, 0, 0.0205, 0, 0.229, 0, 0, 0},          // forward, M <= 16
        {2.79e+03, 0, 0.019, 0, 0.17, 0, 0.00702, 0},      // forward, M > 16
        {4.4e+03, 0, 0.0264, 0, 0.121, 0.0367, 0, 0},      // grad_input, M = 1
        {4.18e+03, 0, 0.0184, 0, 0.235, 0.0111, 0, 0},     // grad_input, M <= 16
        {3.15e+03, 0, 0.0188, 0, 0.232, 0, 0, 0},          // grad_input, M > 16
        {5.91e+03, 0, 0.0583, 0, 0.125, 0.0273, 0, 0},     // grad_weight, M = 1
        {5.86e+03, 0, 0.0171, 0.125, 0.118, 0.051, 0, 0},  // grad_weight, M <= 16
        {4.45e+03, 0, 0.0195, 0, 0.104, 0, 0.0743, 0},     // grad_weight, M > 16
    },
    {
        // fused
        {2.22e+03, 0, 0.0468, 0, 0.00809, 0.021, 0.263, 0},          // forward, M = 1
        {2.24e+03, 0, 0.0245, 0.0071, 0.0123, 0.0409, 0.0504, 0},    // forward, M <= 16
        {2.41e+03, 0, 0.00844, 0.00645, 0.0865, 0.0297, 0.0108, 0},  // forward, M > 16
        {3.27e+03, 0, 0.0531, 0, 0.00896, 0.0147, 0, 0},             // grad_input, M = 1
        {3.3e+03, 0, 0.0243, 0, 0.0238, 0.0241, 0.0279, 0},          // grad_input, M <= 16
        {2.73e+03, 0, 0.00861, 0, 0.094, 0, 0, 0},                   // grad_input, M > 16
        {3.54e+03, 0, 0.072, 0, 0.0169, 0.0133, 0, 0},               // grad_weight, M = 1
        {3.37e+03, 0, 0.0235, 0.031, 0.0119, 0.0335, 0, 0},          // grad_weight, M <= 16
        {3.73e+03, 0, 0.00867, 0.0157, 0.0575, 0.0448, 0.0143, 0},   // grad_weight, M > 16
    },
    {
        // sparse
        {2.45e+03, 0.205, 0, 0, 0, 0, 0, 2.41},              // forward, M = 1
        {2.71e+03, 0, 0, 0, 0, 0.445, 0.0695, 0.455},        // forward, M <= 16
        {2.22e+03, 0.00527, 0, 0, 0, 0.135, 0.0857, 0.225},  // forward, M > 16
        {3.35e+03, 0.534, 0, 0, 0, 0, 0, 0.964},             // grad_input, M = 1
        {3.46e+03, 0, 0, 0, 0, 0.886, 0, 0.49},              // grad_input, M <= 16
        {3.07e+03, 0.00792, 0, 0, 0, 0.415, 0.0638, 0.181},  // grad_input, M > 16
        {3.69e+03, 0.31, 0, 0, 0, 0, 0, 2.25},               // grad_weight, M = 1
        {3.89e+03, 0, 0, 0, 0, 0.836, 0, 0.368},             // grad_weight, M <= 16
        {3.48e+03, 0.00811, 0, 0, 0, 0.241, 0.0727, 0.178},  // grad_weight, M > 16
    },
    // float32, packed: end
};
inline constexpr PackedCostTable kBFloat16PackedCosts = {
    // bfloat16, packed: begin
    {
        // copy
        {1.94e+04, 0, 0.114, 0, 0.00941, 0.04, 0, 0},              // forward, M = 1
        {1.76e+04, 0, 0.0114, 0.0475, 0.0536, 0.0351, 0, 0},       // forward, M <= 16
        {1.38e+04, 0, 0.00421, 0.0427, 0.0285, 0.0181, 0, 0},      // forward, M > 16
        {1.93e+04, 0, 0.148, 0, 0.00871, 0.0391, 0, 0},            // grad_input, M = 1
        {1.99e+04, 0, 0.0118, 0.0698, 0.0523, 0.0388, 0, 0},       // grad_input, M <= 16
        {1.39e+04, 0, 0.00427, 0.0443, 0.0421, 0.0271, 0, 0},      // grad_input, M > 16
        {2.33e+04, 0, 0.0882, 0, 0.0237, 0.0443, 0, 0},            // grad_weight, M = 1
        {2.38e+04, 0, 0.00978, 0.0292, 0.0453, 0.0594, 0.215, 0},  // grad_weight, M <= 16
        {1.55e+04, 0, 0.00434, 0.021, 0.0286, 0.0144, 0.044, 0},   // grad_weight, M > 16
    },
    {
        // fused
        {1.74e+03, 0, 0.0323, 0, 0.000695, 0.0089, 2.15, 0},        // forward, M = 1
        {2.39e+03, 0, 0.011, 0.0168, 0.00465, 0.026, 0.331, 0},     // forward, M <= 16
        {2.46e+03, 0, 0.00414, 0.0313, 0.0255, 0.0209, 0.0115, 0},  // forward, M > 16
        {3.19e+03, 0, 0.0324, 0, 0.00908, 0.00734, 0.0214, 0},      // grad_input, M = 1
        {3.21e+03, 0, 0.0124, 0.00332, 0.017, 0.0203, 0.217, 0},    // grad_input, M <= 16
        {3.15e+03, 0, 0.00425, 0, 0.0483, 0.0334, 0.00115, 0},      // grad_input, M > 16
        {3.54e+03, 0, 0.0497, 0, 0.00089, 0.0114, 0.591, 0},        // grad_weight, M = 1
        {3.7e+03, 0, 0.0108, 0.00796, 0.0148, 0.0138, 0.254, 0},    // grad_weight, M <= 16
        {3.48e+03, 0, 0.00418, 0.0202, 0.0284, 0.0138, 0.0214, 0},  // grad_weight, M > 16
    },
    {
        // sparse
        {2.75e+03, 0.215, 0, 0, 0, 0, 0.736, 1.11},          // forward, M = 1
        {2.71e+03, 0, 0, 0, 0, 0.598, 0, 0.342},             // forward, M <= 16
        {2.36e+03, 0.00766, 0, 0, 0, 0.214, 0.0744, 0.106},  // forward, M > 16
        {3.17e+03, 0.499, 0, 0, 0, 0, 0.451, 0.526},         // grad_input, M = 1
        {3.55e+03, 0, 0, 0, 0, 1.07, 0, 0.211},              // grad_input, M <= 16
        {3.26e+03, 0.0101, 0, 0, 0, 0.489, 0.0725, 0.073},   // grad_input, M > 16
        {3.71e+03, 0.295, 0, 0, 0, 0, 1.03, 0.959},          // grad_weight, M = 1
        {4.04e+03, 0, 0, 0, 0, 0.898, 0.00419, 0.26},        // grad_weight, M <= 16
        {3.44e+03, 0.0107, 0, 0, 0, 0.306, 0.0637, 0.0695},  // grad_weight, M > 16
    },
    // bfloat16, packed: end
};
inline constexpr PackedCostTable kHalfPackedCosts = {
    // float16, packed: begin
    {
        // copy
        {5.32e+03, 0, 0.0993, 0, 0.0465, 0.00404, 0, 0},  // forward, M = 1
        {7.73e+03, 0, 0.104, 0, 0.0398, 0, 0, 0},         // forward, M <= 16
        {1.71e+04, 0, 0.0729, 0, 0, 0, 0, 0},             // forward, M > 16
        {2.59e+03, 0, 0, 0.0986, 0.634, 0, 0, 0},         // grad_input, M = 1
        {0, 0, 0.62, 0, 0.707, 0, 0, 0},                  // grad_input, M <= 16
        {0, 0, 0.374, 0, 6.63, 0, 0, 0},                  // grad_input, M > 16
        {4.66e+03, 0, 0, 0.0163, 0.824, 0.00128, 0, 0},   // grad_weight, M = 1
        {4.78e+03, 0, 0.311, 0, 0.781, 0, 0, 0},          // grad_weight, M <= 16
        {6.38e+03, 0, 0.232, 0, 2.5, 0, 0, 0},            // grad_weight, M > 16
    },
    {
        // fused
        {2.08e+03, 0, 0.0514, 0, 0.011, 0.0031, 1.02, 0},          // forward, M = 1
        {2.43e+03, 0, 0.0221, 0.00397, 0.0229, 0.0208, 0.513, 0},  // forward, M <= 16
        {2.53e+03, 0, 0.00727, 0.0211, 0.0663, 0, 0.133, 0},       // forward, M > 16
        {2.94e+03, 0, 0.0356, 0, 0.0279, 0.0306, 0.407, 0},        // grad_input, M = 1
        {2.83e+03, 0, 0.0294, 0, 0.0309, 0.0295, 0.145, 0},        // grad_input, M <= 16
        {2.82e+03, 0, 0.00888, 0, 0.0808, 0.0193, 0.0689, 0},      // grad_input, M > 16
        {3.37e+03, 0, 0.031, 0, 0.0282, 0.026, 0.519, 0},          // grad_weight, M = 1
        {3.51e+03, 0, 0.023, 0, 0.0302, 0.00898, 0.219, 0},        // grad_weight, M <= 16
        {3.34e+03, 0, 0.00763, 0, 0.0345, 0.0801, 0.154, 0},       // grad_weight, M > 16
    },
    {
        // sparse
        {2.67e+03, 0.165, 0, 0, 0, 0, 0, 3.16},             // forward, M = 1
        {2.59e+03, 0, 0, 0, 0, 0.54, 0.118, 0.385},         // forward, M <= 16
        {1.84e+03, 0.00468, 0, 0, 0, 0.191, 0.12, 0.172},   // forward, M > 16
        {2.92e+03, 0.511, 0, 0, 0, 0, 0, 1.79},             // grad_input, M = 1
        {2.87e+03, 0, 0, 0, 0, 1.08, 0, 0.715},             // grad_input, M <= 16
        {2.25e+03, 0.0063, 0, 0, 0, 0.463, 0.0286, 0.338},  // grad_input, M > 16
        {3.68e+03, 0.277, 0, 0, 0, 0, 0, 2.6},              // grad_weight, M = 1
        {3.75e+03, 0, 0, 0, 0, 0.946, 0, 0.416},            // grad_weight, M <= 16
        {3.18e+03, 0.00703, 0, 0, 0, 0.313, 0.07, 0.186},   // grad_weight, M > 16
    },
    // float16, packed: end
};

// Of AVX2 and of any CPU. Measured on a Zen 3, but for those of grad_input in 16 bits, of packed weights with M <= 16
// (Zen 4) and of other packed ones (Zen 5), there with torch held to the like (ATEN_CPU_CAPABILITY and
// ONEDNN_MAX_CPU_ISA). Elements of 16 bits are converted, which takes more for results in bfloat16 than in float16;
// without AVX2 float's costs serve for all.
inline constexpr CostTable kFloatCostsAvx2 = {
    // float32, AVX2: begin
    {
        // copy
        {6.97e+03, 0, 0.0399, 0, 0.348, 0, 0, 0},      // forward, M <= 16
        {6.27e+03, 0, 0.0325, 0, 0.489, 0, 0, 0},      // forward, M > 16
        {7.45e+03, 0, 0.0351, 0, 0.4, 0, 0, 0},        // grad_input, M <= 16
        {8.03e+03, 0, 0.0333, 0, 0.437, 0, 0, 0},      // grad_input, M > 16
        {1.01e+04, 0, 0.0293, 0.043, 0.367, 0, 0, 0},  // grad_weight, M <= 16
        {1.16e+04, 0, 0.0355, 0, 0.359, 0, 0, 0},      // grad_weight, M > 16
    },
    {
        // fused
        {4.06e+03, 0, 0.0435, 0, 0.079, 0, 0, 0},      // forward, M <= 16
        {4.52e+03, 0, 0.0296, 0, 0.217, 0, 0, 0},      // forward, M > 16
        {3.44e+03, 0, 0.0446, 0, 0.0966, 0, 0, 0},     // grad_input, M <= 16
        {6.2e+03, 0, 0.0297, 0, 0.265, 0, 0.076, 0},   // grad_input, M > 16
        {4.04e+03, 0, 0.0398, 0, 0.102, 0, 0, 0},      // grad_weight, M <= 16
        {6.94e+03, 0, 0.0291, 0, 0.165, 0, 0.288, 0},  // grad_weight, M > 16
    },
    {
        // sparse
        {4.39e+03, 0, 0, 0.0573, 0.0919, 0.815, 0, 1.68},     // forward, M <= 16
        {3.97e+03, 0.03, 0, 0, 0.256, 0, 0.233, 0.616},       // forward, M > 16
        {4.15e+03, 0, 0, 0.0238, 0.121, 2.09, 0, 1.14},       // grad_input, M <= 16
        {5.16e+03, 0.0294, 0, 0, 0.29, 0.419, 0.181, 0.767},  // grad_input, M > 16
        {4.71e+03, 0, 0, 0.0942, 0.135, 1.16, 0, 1.31},       // grad_weight, M <= 16
        {5.86e+03, 0.0395, 0, 0, 0.209, 0, 0.152, 0.789},     // grad_weight, M > 16
    },
    // float32, AVX2: end
};

inline constexpr CostTable kHalfCostsAvx2 = {
    // float16, AVX2: begin
    {
        // copy
        {1.54e+04, 0, 0.21, 0.31, 0.158, 0, 0, 0},  // forward, M <= 16
        {5.39e+04, 0, 0.214, 0, 0, 0, 0, 0},        // forward, M > 16
        {0, 0, 0.705, 0, 0.742, 0, 0, 0},           // grad_input, M <= 16
        {0, 0, 0.513, 0, 8.2, 0, 0, 0},             // grad_input, M > 16
        {7.03e+03, 0, 0.532, 0, 1.5, 0, 0, 0},      // grad_weight, M <= 16
        {0, 0, 0.485, 0, 4.63, 0, 0, 0},            // grad_weight, M > 16
    },
    {
        // fused
        {5.33e+03, 0, 0.0479, 0, 0.0558, 0, 0.275, 0},  // forward, M <= 16
        {4.09e+03, 0, 0.0271, 0, 0.339, 0, 0.721, 0},   // forward, M > 16
        {2.8e+03, 0, 0.0327, 0, 0.0621, 0, 0, 0},       // grad_input, M <= 16
        {3.02e+03, 0, 0.0188, 0, 0.229, 0, 0.223, 0},   // grad_input, M > 16
        {5.19e+03, 0, 0.0486, 0, 0.0822, 0, 0.103, 0},  // grad_weight, M <= 16
        {3.16e+03, 0, 0.033, 0, 0.398, 0, 0.446, 0},    // grad_weight, M > 16
    },
    {
        // sparse
        {5.48e+03, 0, 0, 0.0324, 0.083, 0.8, 0, 1.71},          // forward, M <= 16
        {3.84e+03, 0.0331, 0, 0, 0.29, 0.108, 0.531, 0.379},    // forward, M > 16
        {2.61e+03, 0.0264, 0, 0, 0.0877, 0.821, 0, 0.726},      // grad_input, M <= 16
        {1.54e+03, 0.0297, 0, 0, 0.345, 0.0011, 0, 0.337},      // grad_input, M > 16
        {6.41e+03, 0.0728, 0, 0.00746, 0.159, 0.683, 0, 1.26},  // grad_weight, M <= 16
        {2.25e+03, 0.0546, 0, 0, 0.464, 0.115, 0.36, 0.347},    // grad_weight, M > 16
    },
    // float16, AVX2: end
};

inline constexpr CostTable kBFloat16CostsAvx2 = {
    // bfloat16, AVX2: begin
    {
        // copy
        {1.52e+04, 0, 0.247, 0.352, 0.139, 0, 0, 0},  // forward, M <= 16
        {4.76e+04, 0, 0.262, 0, 0, 0, 0, 0},          // forward, M > 16
        {546, 0, 0.742, 0, 0.803, 0, 0, 0},           // grad_input, M <= 16
        {0, 0, 0.27, 0, 23.6, 0, 0, 0},               // grad_input, M > 16
        {8.93e+03, 0, 0.125, 0, 0.93, 0, 0, 0},       // grad_weight, M <= 16
        {25.3, 0, 0.0863, 0, 1.77, 0, 1.38, 0},       // grad_weight, M > 16
    },
    {
        // fused
        {4.97e+03, 0, 0.0476, 0.0161, 0.0517, 0, 0.418, 0},   // forward, M <= 16
        {3.11e+03, 0, 0.0282, 0, 0.326, 0, 0.727, 0},         // forward, M > 16
        {2.86e+03, 0, 0.0291, 0.00247, 0.0504, 0, 0.266, 0},  // grad_input, M <= 16
        {3.33e+03, 0, 0.0183, 0, 0.149, 0, 0.302, 0},         // grad_input, M > 16
        {6.3e+03, 0, 0.0507, 0.0926, 0.0975, 0, 0, 0},        // grad_weight, M <= 16
        {4.96e+03, 0, 0.0287, 0, 0.39, 0, 0.381, 0},          // grad_weight, M > 16
    },
    {
        // sparse
        {5.02e+03, 0, 0, 0.0632, 0.0671, 0.778, 0, 1.73},        // forward, M <= 16
        {2.59e+03, 0.032, 0, 0, 0.293, 0.184, 0.674, 0.418},     // forward, M > 16
        {2.88e+03, 0.0479, 0, 0, 0.0621, 0.828, 0.31, 0.139},    // grad_input, M <= 16
        {1.77e+03, 0.022, 0, 0, 0.188, 0.752, 0.28, 0.171},      // grad_input, M > 16
        {6.71e+03, 0.052, 0, 0.0331, 0.128, 0.866, 0, 0.868},    // grad_weight, M <= 16
        {5.46e+03, 0.0438, 0, 0, 0.368, 0.0855, 0.0481, 0.491},  // grad_weight, M > 16
    },
    // bfloat16, AVX2: end
};

// Of packed weights, on AVX2.
inline constexpr PackedCostTable kFloatPackedCostsAvx2 = {
    // float32, AVX2, packed: begin
    {
        // copy
        {3.36e+03, 0, 0, 0.0255, 0.153, 0.00264, 0, 0},    // forward, M = 1
        {2.99e+03, 0, 0.0223, 0, 0.233, 0, 0, 0},          // forward, M <= 16
        {2.73e+03, 0, 0.0226, 0, 0.361, 0, 0, 0},          // forward, M > 16
        {4.32e+03, 0, 0.0176, 0, 0.154, 0.023, 0, 0},      // grad_input, M = 1
        {3.79e+03, 0, 0.0205, 0, 0.255, 0, 0, 0},          // grad_input, M <= 16
        {4.07e+03, 0, 0.022, 0, 0.375, 0, 0, 0},           // grad_input, M > 16
        {5.64e+03, 0, 0.0175, 0, 0.147, 0.0847, 0, 0},     // grad_weight, M = 1
        {5.88e+03, 0, 0.0215, 0.09, 0.105, 0.0729, 0, 0},  // grad_weight, M <= 16
        {5.67e+03, 0, 0.0232, 0, 0.102, 0.198, 0, 0},      // grad_weight, M > 16
    },
    {
        // fused
        {2.16e+03, 0, 0.0475, 0, 0.0201, 0.0311, 0.467, 0},    // forward, M = 1
        {2.27e+03, 0, 0.0269, 0, 0.0228, 0.0499, 0, 0},        // forward, M <= 16
        {2.9e+03, 0, 0.0215, 0, 0.201, 0.134, 0, 0},           // forward, M > 16
        {3.12e+03, 0, 0.0288, 0, 0.0409, 0.0269, 0.25, 0},     // grad_input, M = 1
        {3.15e+03, 0, 0.0319, 0, 0.0246, 0.0193, 0.00606, 0},  // grad_input, M <= 16
        {4.12e+03, 0, 0.0208, 0, 0.265, 0.0295, 0, 0},         // grad_input, M > 16
        {3.69e+03, 0, 0.0499, 0, 0.0295, 0.0366, 0, 0},        // grad_weight, M = 1
        {3.45e+03, 0, 0.0266, 0.0127, 0.0288, 0.033, 0, 0},    // grad_weight, M <= 16
        {4.51e+03, 0, 0.021, 0.0833, 0.101, 0, 0, 0},          // grad_weight, M > 16
    },
    {
        // sparse
        {2.19e+03, 0.224, 0, 0, 0, 0, 0.325, 1.65},         // forward, M = 1
        {2.58e+03, 0, 0, 0, 0, 0.362, 0, 0.511},            // forward, M <= 16
        {2.9e+03, 0.0177, 0, 0, 0, 0.212, 0.0614, 0.37},    // forward, M > 16
        {3.12e+03, 0.539, 0, 0, 0, 0, 0, 1.31},             // grad_input, M = 1
        {2.94e+03, 0, 0, 0, 0, 0.826, 0, 0.478},            // grad_input, M <= 16
        {3.88e+03, 0.0197, 0, 0, 0, 0.772, 0.0266, 0.367},  // grad_input, M > 16
        {3.64e+03, 0.381, 0, 0, 0, 0, 0, 1.73},             // grad_weight, M = 1
        {3.67e+03, 0, 0, 0, 0, 0.77, 0, 0.372},             // grad_weight, M <= 16
        {3.76e+03, 0.0199, 0, 0, 0, 0.18, 0.0277, 0.465},   // grad_weight, M > 16
    },
    // float32, AVX2, packed: end
};

inline constexpr PackedCostTable kHalfPackedCostsAvx2 = {
    // float16, AVX2, packed: begin
    {
        // copy
        {6.57e+03, 0, 0.168, 0, 0.0174, 0, 0.304, 0},    // forward, M = 1
        {7.41e+03, 0, 0.102, 0, 0.0681, 0.00374, 0, 0},  // forward, M <= 16
        {2.62e+04, 0, 0.0985, 0, 0, 0, 0.0354, 0},       // forward, M > 16
        {2.78e+03, 0, 0, 0, 0.733, 0, 0, 0},             // grad_input, M = 1
        {690, 0, 0.62, 0, 0.674, 0, 0, 0},               // grad_input, M <= 16
        {0, 0, 0.503, 0, 7.05, 0, 0, 0},                 // grad_input, M > 16
        {4.9e+03, 0, 0, 0.0381, 0.79, 0.0493, 0, 0},     // grad_weight, M = 1
        {5.87e+03, 0, 0.303, 0, 0.762, 0, 0.117, 0},     // grad_weight, M <= 16
        {0, 0, 0.26, 0, 3.32, 0, 1.11, 0},               // grad_weight, M > 16
    },
    {
        // fused
        {2.3e+03, 0, 0.0636, 0, 0.0087, 0.00628, 0.459, 0},      // forward, M = 1
        {2.22e+03, 0, 0.0262, 0, 0.0247, 0.0187, 0.571, 0},      // forward, M <= 16
        {4.38e+03, 0, 0.0224, 0.0397, 0.114, 0.0375, 0.109, 0},  // forward, M > 16
        {2.95e+03, 0, 0.0574, 0, 0.02, 0.0226, 0, 0},            // grad_input, M = 1
        {2.71e+03, 0, 0.0294, 0, 0.0352, 0.0428, 0.266, 0},      // grad_input, M <= 16
        {3.86e+03, 0, 0.0189, 0, 0.275, 0, 0.248, 0},            // grad_input, M > 16
        {3.25e+03, 0, 0.069, 0, 0.0135, 0.0195, 0.959, 0},       // grad_weight, M = 1
        {3.24e+03, 0, 0.028, 0, 0.0354, 0.0371, 0.239, 0},       // grad_weight, M <= 16
        {4.87e+03, 0, 0.021, 0, 0.163, 0.0168, 0.171, 0},        // grad_weight, M > 16
    },
    {
        // sparse
        {3.24e+03, 0.142, 0, 0, 0, 0, 1.19, 3.4},          // forward, M = 1
        {2.48e+03, 0, 0, 0, 0, 0.493, 0.0987, 0.452},      // forward, M <= 16
        {2.43e+03, 0.0154, 0, 0, 0, 0.369, 0.239, 0.258},  // forward, M > 16
        {2.95e+03, 0.482, 0, 0, 0, 0, 0.139, 1.49},        // grad_input, M = 1
        {2.76e+03, 0, 0, 0, 0, 1.04, 0, 0.464},            // grad_input, M <= 16
        {2.5e+03, 0.0156, 0, 0, 0, 0.802, 0.124, 0.567},   // grad_input, M > 16
        {3.36e+03, 0.355, 0, 0, 0, 0, 0.841, 1.52},        // grad_weight, M = 1
        {3.47e+03, 9.98e-05, 0, 0, 0, 0.945, 0, 0.312},    // grad_weight, M <= 16
        {3.83e+03, 0.0203, 0, 0, 0, 0.717, 0.134, 0.483},  // grad_weight, M > 16
    },
    // float16, AVX2, packed: end
};

inline constexpr PackedCostTable kBFloat16PackedCostsAvx2 = {
    // bfloat16, AVX2, packed: begin
    {
        // copy
        {6.38e+03, 0, 0.161, 0, 0.0232, 0, 1.53, 0},          // forward, M = 1
        {7.86e+03, 0, 0.0951, 0.0296, 0.0452, 0.0205, 0, 0},  // forward, M <= 16
        {1.82e+04, 0, 0.0992, 0, 0, 0, 0, 0},                 // forward, M > 16
        {3.26e+03, 0, 0, 0, 0.773, 0, 0, 0},                  // grad_input, M = 1
        {2.57e+03, 0, 0.679, 0, 0.669, 0, 0, 0},              // grad_input, M <= 16
        {0, 0, 0.592, 0, 6.69, 0, 0, 0},                      // grad_input, M > 16
        {5.09e+03, 0, 0, 0.0478, 0.309, 0.037, 0.47, 0},      // grad_weight, M = 1
        {5.73e+03, 0, 0.0543, 0, 0.346, 0, 0, 0},             // grad_weight, M <= 16
        {4.99e+03, 0, 0.0418, 0, 0.745, 0, 0.542, 0},         // grad_weight, M > 16
    },
    {
        // fused
        {2.04e+03, 0, 0.0685, 0, 0.011, 0.00555, 1.52, 0},         // forward, M = 1
        {2.52e+03, 0, 0.0275, 0.00714, 0.0213, 0.0244, 0.586, 0},  // forward, M <= 16
        {4.02e+03, 0, 0.0188, 0, 0.222, 0.0968, 0.252, 0},         // forward, M > 16
        {3.02e+03, 0, 0.0624, 0, 0.0212, 0.0313, 0, 0},            // grad_input, M = 1
        {2.75e+03, 0, 0.0313, 0, 0.0364, 0.0398, 0.312, 0},        // grad_input, M <= 16
        {3.14e+03, 0, 0.0149, 0, 0.34, 0, 0.512, 0},               // grad_input, M > 16
        {3.37e+03, 0, 0.139, 0, 0.0195, 0.01, 0.769, 0},           // grad_weight, M = 1
        {3.54e+03, 0, 0.0254, 0.0745, 0.0528, 0.0111, 0.308, 0},   // grad_weight, M <= 16
        {4.17e+03, 0, 0.0177, 0, 0.234, 0, 0.255, 0},              // grad_weight, M > 16
    },
    {
        // sparse
        {3.28e+03, 0.134, 0, 0, 0, 0, 1.56, 3.66},         // forward, M = 1
        {2.49e+03, 0, 0, 0, 0, 0.479, 0.107, 0.464},       // forward, M <= 16
        {3.53e+03, 0.0158, 0, 0, 0, 0.408, 0.19, 0.279},   // forward, M > 16
        {2.97e+03, 0.495, 0, 0, 0, 0, 0.0601, 1.57},       // grad_input, M = 1
        {2.74e+03, 0, 0, 0, 0, 1.04, 0, 0.503},            // grad_input, M <= 16
        {2.38e+03, 0.017, 0, 0, 0, 1.06, 0.344, 0.305},    // grad_input, M > 16
        {3.45e+03, 0.365, 0, 0, 0, 0, 0.806, 1.62},        // grad_weight, M = 1
        {3.68e+03, 0, 0, 0, 0, 0.935, 0, 0.307},           // grad_weight, M <= 16
        {4.73e+03, 0.0202, 0, 0, 0, 0.496, 0.108, 0.266},  // grad_weight, M > 16
    },
    // bfloat16, AVX2, packed: end
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
        {1.33e+04, 0, 0.00385, 0.0662, 0.0195, 0, 0, 0},       // forward, M <= 16
        {1.42e+04, 0, 0.00411, 0.047, 0.0292, 0, 0, 0},        // forward, M > 16
        {1.22e+04, 0, 0.00518, 0.0711, 0.0274, 0, 0, 0},       // grad_input, M <= 16
        {1.4e+04, 0, 0.00416, 0.0377, 0.0496, 0, 0, 0},        // grad_input, M > 16
        {1.41e+04, 0, 0.00371, 0.0476, 0.0248, 0, 0, 0},       // grad_weight, M <= 16
        {1.48e+04, 0, 0.00421, 0.0154, 0.0393, 0, 0.0417, 0},  // grad_weight, M > 16
    },
    {
        // fused
        {1.77e+03, 0, 0.00457, 0.0154, 0.00255, 0, 0.0564, 0},  // forward, M <= 16
        {2.29e+03, 0, 0.00383, 0.0173, 0.015, 0, 0.0237, 0},    // forward, M > 16
        {2.17e+03, 0, 0.0038, 0.0184, 0.0077, 0, 0, 0},         // grad_input, M <= 16
        {2.8e+03, 0, 0.00384, 0, 0.0196, 0, 0.0178, 0},         // grad_input, M > 16
        {2.19e+03, 0, 0.00351, 0.0186, 0.00593, 0, 0, 0},       // grad_weight, M <= 16
        {2.76e+03, 0, 0.0039, 0, 0.0144, 0, 0.0291, 0},         // grad_weight, M > 16
    },
    {
        // sparse
        {2.48e+03, 0.0051, 0, 0.0349, 0.00883, 0.3, 0.0355, 0.0764},     // forward, M <= 16
        {2.48e+03, 0.00837, 0, 0.00881, 0.0312, 0.179, 0.0798, 0.0725},  // forward, M > 16
        {2.87e+03, 0.0112, 0, 0.0249, 0.0154, 0.485, 0.0799, 0.0483},    // grad_input, M <= 16
        {3.14e+03, 0.0108, 0, 0, 0.0401, 0.331, 0.0861, 0.0329},         // grad_input, M > 16
        {2.96e+03, 0.0127, 0, 0.039, 0.00921, 0.327, 0.0179, 0.0328},    // grad_weight, M <= 16
        {3.07e+03, 0.0116, 0, 0.0114, 0.0309, 0.18, 0.0697, 0.036},      // grad_weight, M > 16
    },
    // bfloat16: end
};

inline constexpr CostTable kHalfCosts = {
    // float16: begin
    {
        // copy
        {4.63e+03, 0, 0.0758, 0.0154, 0.00806, 0, 0, 0},  // forward, M <= 16
        {1.59e+04, 0, 0.0737, 0, 0, 0, 0, 0},             // forward, M > 16
        {0, 0, 0.508, 0, 0.244, 0, 0, 0},                 // grad_input, M <= 16
        {0, 0, 0.368, 0, 5.87, 0, 0, 0},                  // grad_input, M > 16
        {4.13e+03, 0, 0.259, 0, 0.489, 0, 0, 0},          // grad_weight, M <= 16
        {487, 0, 0.219, 0, 2.71, 0, 0.76, 0},             // grad_weight, M > 16
    },
    {
        // fused
        {2.07e+03, 0, 0.00815, 0.0133, 0.00597, 0, 0.121, 0},  // forward, M <= 16
        {2.52e+03, 0, 0.00679, 0, 0.0601, 0, 0.125, 0},        // forward, M > 16
        {2.13e+03, 0, 0.0097, 0, 0.022, 0, 0.019, 0},          // grad_input, M <= 16
        {2.84e+03, 0, 0.00792, 0, 0.0413, 0, 0.076, 0},        // grad_input, M > 16
        {2.1e+03, 0, 0.0081, 0.0117, 0.0139, 0, 0.0249, 0},    // grad_weight, M <= 16
        {2.91e+03, 0, 0.00733, 0, 0.0268, 0, 0.148, 0},        // grad_weight, M > 16
    },
    {
        // sparse
        {2.39e+03, 0, 0, 0.0279, 0.0122, 0.274, 0.0633, 0.206},         // forward, M <= 16
        {1.99e+03, 0.00588, 0, 0, 0.0665, 0.132, 0.12, 0.0894},         // forward, M > 16
        {2.57e+03, 0.00327, 0, 0.00745, 0.0345, 0.536, 0.0926, 0.185},  // grad_input, M <= 16
        {2.48e+03, 0.00986, 0, 0, 0.104, 0.195, 0.0406, 0.135},         // grad_input, M > 16
        {2.76e+03, 0.00681, 0, 0.0236, 0.0214, 0.36, 0.0492, 0.095},    // grad_weight, M <= 16
        {2.67e+03, 0.00892, 0, 0, 0.0648, 0.221, 0.0902, 0.0627},       // grad_weight, M > 16
    },
    // float16: end
};

// The paths of a convolution, fitted by bench/fit_convolution_costs.py over layers of ResNet, MobileNetV2 and U-Net.
// MACs are those of the dense convolution, in the direction of the kernels (see Convolution), of torch's with whole
// blocks of the result's channels; packed counts what im2col reads, by vectors of channels where they lie last, images
// what is read and written.
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
// The same of one tap and channels last, down to kFullDensity: 64 -> 64 on 56 x 56 at 50% was expected to need 0.92 of
// dense, and needed 1.27.
inline constexpr double kPixelMargin = 0.88;
// How much more sparse ones cost with vectors of four floats, where torch's, held to SSE4.1, take 4.2 times as long as
// with AVX-512: on 27 layers 2.4 to 3.7 times from 80% on, and 4.2 to 5.6 times at 50%. In units of torch's costs.
inline constexpr double kPortableConvCost = 1.2;

// Convolutions without their pruned channels: the block of channels that torch's kernels round up to, nanoseconds for
// an element moved on one thread, and for the calls; and the share of the dense operation below which it is taken.
inline constexpr int64_t kChannelBlock = 16;
inline constexpr double kMoveCost = 0.3, kCompactConvolutionCall = 1e4;
inline constexpr double kCompactMargin = 0.93;

// How much faster torch convolves in float16 than in float32 where the CPU has no arithmetic for it: the four stages of
// ResNet took 170 to 240 ms, in float32 4.
inline constexpr double kHalfConvSpeedup = 1.0 / 20;
// What 16-bit images cost the sparse kernels besides, where torch has no arithmetic for them either: nanoseconds for an
// element on one thread, and for the calls.
inline constexpr double kConvertCost = 0.1, kConvertCall = 5e3;

// Contiguous images of one tap that the sparse kernels and the masked GEMM both take as they lie: the share of
// remaining weights below which sparse is faster. At 0.7, five layers of 28 x 28 and 56 x 56 need 0.93 to 1.07 of the
// GEMM's time in forward, 0.94 to 1.04 in grad_input and 0.78 to 1.08 in grad_weight; at 0.5, 256 -> 64 channels of 56
// x 56 need 0.75, 0.68 and 0.8. The same of planes that lie whole 4 KB apart: 16 -> 64, 32 -> 64 and 64 -> 16 channels
// of 32 x 32 need 0.6 to 0.9 at 0.2, 0.5 to 1.3 at 0.35, and 0.7 to 1.7 at 0.5.
inline constexpr double kSparsePlaneDensity = 0.65, kFarPlaneDensity = 0.3;

// Depthwise convolutions: where their own kernels are taken, by the times of torch's over theirs, batch 8, forward,
// grad_input and grad_weight. Contiguous, 3 x 3 that keeps the size: 144 channels of 56 x 56 4.1, 4.7, 4.8; 512 of 14 x
// 14 2.9, 3.1, 2.3; 960 of 7 x 7 2.2, 2.5, 1.4, of 2 x 2 1.8, 1.8, 17, of one position 0.9, 0.8, 9. Others: 144 of 56 x
// 56, stride 2, 2.0, 1.8, 1.9; 240 of 28 x 28, 5 x 5 and stride 2, 0.9, 0.9, 10. Channels last, in the same order: 1.0,
// 1.2, 1.0; 1.2, 1.15, 0.97; 1.4, 2.2, 1.0 and 1.3, 1.0, 8.7; over masking, then torch's, in batches of 1, 8 and 32 of
// the first two 1.0 to 2.2 but for grad_weight, where torch shares out images: of one image 1.2 to 2.5 (32 channels of
// 112 x 112 to 960 of 7 x 7), of 8 and 32 from 0.8 to 1.6.
inline constexpr int64_t kSmallKernel = 9, kLeastWidth = 8;
// Narrower planes: where all together are so small. On Zen 4, AVX-512 and AVX2, forward and grad_input: 5 x 5 on 7 x 7,
// 256 planes 3.4, 3.6 and 2.5, 2.9, 240 2.7, 2.4 and 2.8, 2.3, 960 1.2, 1.3 and 1.2, 1.4, 7680 1.1, 1.8 and 0.9, 0.9; 3
// x 3 from 14 x 14 to 7 x 7, 144 planes 2.9, 3.0 and 2.7, 2.5, 576 1.8, 2.2 and 1.6, 1.6, 4608 1.1, 1.5 and 0.7, 0.8.
inline constexpr int64_t kFewResults = int64_t{1} << 15;

// Convolutions of one tap by the masked GEMM: but where that is hardly ever slower (may_fuse), it is considered where
// there are so many weights for each element of the images, input and output together: below, torch is ahead by up to
// three times.
inline constexpr double kFusedWeights = 0.3;
inline constexpr double kFullDensity = 0.25;
struct ConvCosts {
  ConvCost dense[3][2][3];   // [kernel of one tap, of more, depthwise][NCHW, channels last][forward, grad_input,
                             // grad_weight]
  ConvCost fused[2][3];      // [NCHW, channels last], of one tap
  ConvCost sparse[2][3][3];  // [density of kFullDensity or more, less][NCHW that is packed, channels last, NCHW of one
                             // tap that is not]
};

// Of AVX-512.
inline constexpr ConvCosts kFloatConvCosts = {
    // float32 convolution: begin
    {
        // dense
        {
            // one tap
            {
                {9.04e+03, 0, 0.0088, 0.255, 0, 0, 0.21},    // forward
                {1.31e+04, 0, 0.009, 0.294, 0, 0, 0.202},    // grad_input
                {7.79e+03, 0, 0.00936, 0.453, 0, 0, 0.174},  // grad_weight
            },
            {
                {1.17e+04, 0, 0.00773, 0.565, 0, 0, 0.0583},  // forward
                {1.72e+04, 0, 0.00798, 0.289, 0, 0, 0.0485},  // grad_input
                {1.03e+04, 0, 0.00883, 0.513, 0, 0, 0.0752},  // grad_weight
            },
        },
        {
            // more taps
            {
                {1.59e+04, 0, 0.00786, 0.401, 0, 0, 0.323},  // forward
                {1.18e+04, 0, 0.00771, 0.698, 0, 0, 0.403},  // grad_input
                {1.94e+04, 0, 0.00888, 0.528, 0, 0, 0.196},  // grad_weight
            },
            {
                {2.38e+04, 0, 0.00699, 0.366, 0, 0, 0.159},   // forward
                {2.46e+04, 0, 0.00712, 0.337, 0, 0, 0.224},   // grad_input
                {2.08e+04, 0, 0.00828, 0.876, 0, 0, 0.0768},  // grad_weight
            },
        },
        {
            // depthwise
            {
                {0, 0, 0.0762, 0, 0, 0, 0},       // forward
                {0, 0, 0.104, 6.08, 0, 0, 0},     // grad_input
                {693, 0, 0.0559, 12.4, 0, 0, 0},  // grad_weight
            },
            {
                {0, 0, 0.0375, 7.87, 0, 0, 0},  // forward
                {0, 0, 0.0357, 10.6, 0, 0, 0},  // grad_input
                {0, 0, 0.0404, 2.52, 0, 0, 0},  // grad_weight
            },
        },
    },
    {
        // fused
        {
            {5.93e+03, 0, 0.00877, 0.304, 0, 0, 0.0322},  // forward
            {6.96e+03, 0, 0.00905, 0.389, 0, 0, 0.0296},  // grad_input
            {5.55e+03, 0, 0.00928, 0.411, 0, 0, 0.0781},  // grad_weight
        },
        {
            {1.44e+04, 0, 0.00814, 0.0559, 0, 0, 0},        // forward
            {1.15e+04, 0, 0.00799, 0.0169, 0, 0, 0.0606},   // grad_input
            {1.11e+04, 0, 0.00837, 0.0216, 0, 0, 0.00603},  // grad_weight
        },
    },
    {
        // sparse
        {
            {
                {7.87e+03, 0.00853, 0, 0.29, 0, 0, 0.309},            // forward
                {8.85e+03, 0.00981, 0, 0.537, 0.198, 0.0652, 0.213},  // grad_input
                {7.76e+03, 0.0124, 0, 0.397, 0, 0, 0.222},            // grad_weight
            },
            {
                {6.7e+03, 0.00856, 0, 0.37, 0, 0.066, 0.112},          // forward
                {8.07e+03, 0.00974, 0, 0.482, 0.491, 0.0659, 0.0951},  // grad_input
                {7.77e+03, 0.0122, 0, 0.348, 0.351, 0.0351, 0.0948},   // grad_weight
            },
            {
                {4.83e+03, 0.0073, 0, 1.39, 0, 0.0322, 0.0721},   // forward
                {7.72e+03, 0.0103, 0, 0.151, 0, 0.109, 0.00893},  // grad_input
                {5.89e+03, 0.0103, 0, 1.54, 0, 0, 0.0781},        // grad_weight
            },
        },
        {
            {
                {8.86e+03, 0.0143, 0, 0.13, 0.0794, 0, 0.293},       // forward
                {1.02e+04, 0.0132, 0, 0.173, 0.375, 0.0629, 0.232},  // grad_input
                {9.16e+03, 0.0163, 0, 0.195, 0, 0, 0.23},            // grad_weight
            },
            {
                {7.77e+03, 0.0127, 0, 0.13, 0.101, 0.0361, 0.142},   // forward
                {9.26e+03, 0.0137, 0, 0.134, 0.28, 0.0425, 0.129},   // grad_input
                {8.34e+03, 0.0165, 0, 0.115, 0.182, 0.0286, 0.113},  // grad_weight
            },
            {
                {5.02e+03, 0.00972, 0, 0.0252, 1.27, 0.0281, 0.0755},  // forward
                {6.52e+03, 0.0143, 0, 0.00671, 0, 0.00926, 0.0618},    // grad_input
                {6.4e+03, 0.0148, 0, 0.0363, 0, 0.0416, 0.0624},       // grad_weight
            },
        },
    },
    // float32 convolution: end
};

// Of AVX2, torch's held to it.
inline constexpr ConvCosts kFloatConvCostsAvx2 = {
    // float32 convolution, AVX2: begin
    {
        // dense
        {
            // one tap
            {
                {6.13e+03, 0, 0.0173, 0.413, 0, 0, 0.226},  // forward
                {1.08e+04, 0, 0.0172, 0.414, 0, 0, 0.235},  // grad_input
                {5.43e+03, 0, 0.0178, 0.4, 0, 0, 0.202},    // grad_weight
            },
            {
                {9.94e+03, 0, 0.0157, 0.489, 0, 0, 0.0477},  // forward
                {1.42e+04, 0, 0.016, 0.315, 0, 0, 0.0264},   // grad_input
                {8.37e+03, 0, 0.0173, 0.531, 0, 0, 0.0832},  // grad_weight
            },
        },
        {
            // more taps
            {
                {1.35e+04, 0, 0.0161, 0.546, 0, 0, 0.325},  // forward
                {844, 0, 0.0138, 0.884, 0, 0, 0.892},       // grad_input
                {1.62e+04, 0, 0.0192, 0.564, 0, 0, 0.299},  // grad_weight
            },
            {
                {1.6e+04, 0, 0.0149, 0.585, 0, 0, 0.187},    // forward
                {1.55e+04, 0, 0.0141, 0.721, 0, 0, 0.243},   // grad_input
                {1.27e+04, 0, 0.0194, 0.925, 0, 0, 0.0383},  // grad_weight
            },
        },
        {
            // depthwise
            {
                {1.17e+04, 0, 0.0659, 11.6, 0, 0, 0},  // forward
                {0, 0, 0.0809, 17.8, 0, 0, 0},         // grad_input
                {3.47e+04, 0, 0.0505, 2.67, 0, 0, 0},  // grad_weight
            },
            {
                {2.18e+04, 0, 0.0443, 0, 0, 0, 0},     // forward
                {0, 0, 0.0452, 4.86, 0, 0, 0},         // grad_input
                {3.86e+03, 0, 0.0451, 5.45, 0, 0, 0},  // grad_weight
            },
        },
    },
    {
        // fused
        {
            {9.02e+03, 0, 0.0166, 0.427, 0, 0, 0.0224},  // forward
            {1.01e+04, 0, 0.0169, 0.732, 0, 0, 0.0212},  // grad_input
            {7.04e+03, 0, 0.0166, 0.37, 0, 0, 0.0603},   // grad_weight
        },
        {
            {1.57e+04, 0, 0.0166, 0.0531, 0, 0, 0},      // forward
            {1.41e+04, 0, 0.0165, 0.0338, 0, 0, 0},      // grad_input
            {3.36e+03, 0, 0.0164, 0.0444, 0, 0, 0.149},  // grad_weight
        },
    },
    {
        // sparse
        {
            {
                {8.41e+03, 0.0192, 0, 0.613, 0, 0.113, 0.209},       // forward
                {9.22e+03, 0.0186, 0, 0.635, 0.556, 0.0782, 0.296},  // grad_input
                {8.14e+03, 0.0221, 0, 1.06, 0, 0, 0.364},            // grad_weight
            },
            {
                {8e+03, 0.0187, 0, 0.689, 0.0063, 0.0853, 0.13},     // forward
                {1.06e+04, 0.0184, 0, 0.991, 0.174, 0.0799, 0.14},   // grad_input
                {9.15e+03, 0.0218, 0, 1.18, 0.0848, 0.0444, 0.176},  // grad_weight
            },
            {
                {6.49e+03, 0.0182, 0, 0.297, 0, 0.0341, 0.0489},  // forward
                {7.89e+03, 0.0176, 0, 0.377, 0, 0.169, 0.0154},   // grad_input
                {6.42e+03, 0.0196, 0, 2.05, 0, 0.0263, 0.0861},   // grad_weight
            },
        },
        {
            {
                {1.17e+04, 0.0169, 0, 0, 1.28, 0.026, 0.562},       // forward
                {1.35e+04, 0.02, 0, 0.0266, 1.61, 0.0925, 0.346},   // grad_input
                {1.11e+04, 0.026, 0, 0.472, 0.414, 0.0109, 0.369},  // grad_weight
            },
            {
                {8.48e+03, 0.0199, 0, 0.186, 0.342, 0.0832, 0.171},  // forward
                {1.16e+04, 0.0217, 0, 0.122, 0.807, 0.0808, 0.147},  // grad_input
                {8.85e+03, 0.0273, 0, 0.468, 0.136, 0.0388, 0.194},  // grad_weight
            },
            {
                {5.22e+03, 0.0116, 0, 0, 0, 0.116, 0.09},             // forward
                {6.75e+03, 0.0159, 0, 0.0314, 2.16, 0.0117, 0.0871},  // grad_input
                {6.82e+03, 0.0204, 0, 0, 0, 0.162, 0.0623},           // grad_weight
            },
        },
    },
    // float32 convolution, AVX2: end
};

// Where the CPU multiplies 16-bit floats.
inline constexpr ConvCosts kBFloat16ConvCosts = {
    // bfloat16 convolution: begin
    {
        // dense
        {
            // one tap
            {
                {5.26e+04, 0, 0.00407, 0.328, 0, 0, 0.308},  // forward
                {4.97e+04, 0, 0.00403, 0.377, 0, 0, 0.32},   // grad_input
                {4.48e+04, 0, 0.00497, 0.5, 0, 0, 0.342},    // grad_weight
            },
            {
                {3.03e+04, 0, 0.0041, 0.477, 0, 0, 0.0139},   // forward
                {3.06e+04, 0, 0.0041, 0.408, 0, 0, 0.0155},   // grad_input
                {3.19e+04, 0, 0.00521, 0.522, 0, 0, 0.0638},  // grad_weight
            },
        },
        {
            // more taps
            {
                {4.62e+04, 0, 0.00393, 0.311, 0, 0, 0.334},  // forward
                {5.02e+04, 0, 0.00427, 0.388, 0, 0, 0.333},  // grad_input
                {4.61e+04, 0, 0.00492, 0.523, 0, 0, 0.358},  // grad_weight
            },
            {
                {3.17e+04, 0, 0.00368, 0.342, 0, 0, 0.145},  // forward
                {3.4e+04, 0, 0.00397, 0.376, 0, 0, 0.121},   // grad_input
                {3.66e+04, 0, 0.00498, 0.816, 0, 0, 0.105},  // grad_weight
            },
        },
        {
            // depthwise
            {
                {5.16e+04, 0, 0.0815, 0, 0, 0, 0},     // forward
                {5.1e+04, 0, 0.0859, 0, 0, 0, 0},      // grad_input
                {3.37e+04, 0, 0.0922, 2.18, 0, 0, 0},  // grad_weight
            },
            {
                {2.91e+04, 0, 0.0182, 1.93, 0, 0, 0},  // forward
                {2.34e+04, 0, 0.0234, 2.73, 0, 0, 0},  // grad_input
                {0, 0, 0.0476, 10.9, 0, 0, 0},         // grad_weight
            },
        },
    },
    {
        // fused
        {
            {1.48e+03, 0, 0.00424, 0.102, 0, 0, 0.749},   // forward
            {0, 0, 0.00344, 0.109, 0, 0, 0.753},          // grad_input
            {3.53e+03, 0, 0.00355, 0.0874, 0, 0, 0.669},  // grad_weight
        },
        {
            {1.38e+04, 0, 0.00425, 0.0374, 0, 0, 0.00793},  // forward
            {1.14e+04, 0, 0.00382, 0.0315, 0, 0, 0.125},    // grad_input
            {7.59e+03, 0, 0.00381, 0.0612, 0, 0, 0.101},    // grad_weight
        },
    },
    {
        // sparse
        {
            {
                {1.4e+04, 0.00988, 0, 0.273, 0, 0.0193, 0.193},  // forward
                {1.81e+04, 0.0106, 0, 0, 1.08, 0.0437, 0.138},   // grad_input
                {1.06e+04, 0.0128, 0, 0.278, 0.197, 0, 0.176},   // grad_weight
            },
            {
                {8.74e+03, 0.00984, 0, 0.422, 0, 0.0737, 0.0812},   // forward
                {1.17e+04, 0.0103, 0, 0.187, 1.05, 0.0518, 0.092},  // grad_input
                {1.08e+04, 0.0129, 0, 0.34, 0.398, 0.0391, 0.083},  // grad_weight
            },
            {
                {8.81e+03, 0.0082, 0, 1.88, 0, 0.0639, 0.121},   // forward
                {1.04e+04, 0.00946, 0, 1.75, 0, 0.104, 0.0852},  // grad_input
                {1.06e+04, 0.0112, 0, 2.1, 0, 0, 0.173},         // grad_weight
            },
        },
        {
            {
                {1.21e+04, 0.0124, 0, 0.128, 0, 0.0202, 0.245},     // forward
                {1.37e+04, 0.0117, 0, 0.12, 0.463, 0.0459, 0.262},  // grad_input
                {1.41e+04, 0.0151, 0, 0.125, 0.31, 0, 0.215},       // grad_weight
            },
            {
                {9.74e+03, 0.0126, 0, 0.154, 0.0476, 0.0536, 0.0962},  // forward
                {1.23e+04, 0.0122, 0, 0.0788, 1.19, 0.0431, 0.1},      // grad_input
                {1.02e+04, 0.0153, 0, 0.117, 0.672, 0.0344, 0.0981},   // grad_weight
            },
            {
                {8.78e+03, 0.0109, 0, 0.448, 0.486, 0.0999, 0.112},  // forward
                {1.04e+04, 0.0108, 0, 0.415, 0, 0.0959, 0.113},      // grad_input
                {1.03e+04, 0.0118, 0, 0.316, 2.3, 0.00203, 0.187},   // grad_weight
            },
        },
    },
    // bfloat16 convolution: end
};

}  // namespace masked_ops::cpu
