// What each kernel file gives to the capability's table; see api.h for the contracts.
#pragma once

#include "api.h"
#include "simd.h"

namespace masked_ops::cpu::MASKED_OPS_CAPABILITY {

MaskFacts pack_mask(const Team&, Dtype, const void* mask, int64_t rows, int64_t cols, uint64_t* words);
void mask_copy(const Team&, size_t element_size, const void* weight, Bits, int64_t rows, int64_t cols, void* out);
void mask_multiply(const Team&, Dtype, const void* weight, const void* mask, int64_t n, void* out);

void linear(const Team&, int64_t M, int64_t N, int64_t K, const float* input, const float* weight, Bits,
            const float* bias, float* output);
void linear_grad_input(const Team&, int64_t M, int64_t N, int64_t K, const float* grad_output, const float* weight,
                       Bits, float* grad_input);
void linear_grad_weight(const Team&, int64_t M, int64_t N, int64_t K, const float* grad_output, const float* input,
                        Bits, float* grad_weight);

// gemv.cpp. linear and linear_grad_input where M <= tuning::kSmallRows.
void linear_small(const Team&, int64_t M, int64_t N, int64_t K, const float* input, const float* weight, Bits,
                  const float* bias, float* output);
void linear_grad_input_small(const Team&, int64_t M, int64_t N, int64_t K, const float* grad_output,
                             const float* weight, Bits, float* grad_input);

void row_offsets(const Team&, Bits, int64_t rows, int64_t cols, int64_t* offsets);
void compress(const Team&, size_t element_size, Bits, int64_t rows, int64_t cols, const int64_t* offsets,
              const void* dense, void* values);
void expand(const Team&, size_t element_size, Bits, int64_t rows, int64_t cols, const int64_t* offsets,
            const void* values, void* dense);

SparseIndex* make_index(const Team&, Bits, int64_t rows, int64_t cols, const int64_t* offsets, bool transposed);
void spmm(const Team&, const SparseIndex&, const float* values, int64_t M, const float* input, const float* bias,
          float* output);
void sddmm(const Team&, const SparseIndex&, int64_t M, const float* grad_output, const float* input,
           float* grad_values);
void row_columns(const Team&, Bits, int64_t rows, int64_t cols, const int64_t* offsets, uint16_t* columns);
void spmv(const Team&, const Rows&, const float* values, const float* x, const float* bias, float* y);
void spmv_transposed(const Team&, const Rows&, int64_t cols, const float* values, const float* dy, float* dx);
void sampled_outer(const Team&, const Rows&, const float* dy, const float* x, float* grad_values);

int64_t fma_loop(int64_t rounds);
void read_loop(const float* data, int64_t n);

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY
