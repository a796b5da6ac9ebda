// What each kernel file gives to the capability's table; see api.h for the contracts.
#pragma once

#include "api.h"
#include "simd.h"
#include "tasks.h"

namespace masked_ops::cpu::MASKED_OPS_CAPABILITY {

MaskFacts pack_mask(const Team&, Dtype, const void* mask, int64_t rows, int64_t cols, uint64_t* words);
void mask_copy(const Team&, size_t element_size, const void* weight, Bits, int64_t rows, int64_t cols, void* out);
void mask_multiply(const Team&, Dtype, const void* weight, const void* mask, int64_t n, void* out);

void linear(const Team&, Dtype, int64_t M, int64_t N, int64_t K, const void* input, const void* weight, Bits,
            const void* bias, void* output);
void linear_grad_input(const Team&, Dtype, int64_t M, int64_t N, int64_t K, const void* grad_output, const void* weight,
                       Bits, void* grad_input);
void linear_grad_weight(const Team&, Dtype, int64_t M, int64_t N, int64_t K, const void* grad_output, const void* input,
                        Bits, void* grad_weight);

// gemv*.cpp. linear and its gradients for a few rows (gemm.cpp decides; what decides about grad_input stands with it).
bool takes_grad_input_small(const Team&, Dtype, int64_t M, int64_t N, int64_t K);
void linear_small(const Team&, Dtype, int64_t M, int64_t N, int64_t K, const void* input, const void* weight, Bits,
                  const void* bias, void* output);
void linear_grad_input_small(const Team&, Dtype, int64_t M, int64_t N, int64_t K, const void* grad_output,
                             const void* weight, Bits, void* grad_input);
void linear_grad_weight_small(const Team&, Dtype, int64_t M, int64_t N, int64_t K, const void* grad_output,
                              const void* input, Bits, void* grad_weight);

void row_offsets(const Team&, Bits, int64_t rows, int64_t cols, int64_t* offsets);
void compress(const Team&, size_t element_size, Bits, int64_t rows, int64_t cols, const int64_t* offsets,
              const void* dense, void* values);
// compress.cpp. Rows [first, last) of a dense weight become values; offsets as for compress.
struct DenseWeight {
  Bits bits;
  int64_t cols;
  const int64_t* offsets;
  const float* data;
  float* values;
};
void compress_rows(const DenseWeight&, int64_t first, int64_t last);
void expand(const Team&, size_t element_size, Bits, int64_t rows, int64_t cols, const int64_t* offsets,
            const void* values, void* dense);
void compress_last(const Team&, size_t element_size, Bits, int64_t rows, int64_t cols, int64_t taps,
                   const int64_t* offsets, const void* dense, void* values);
void expand_last(const Team&, size_t element_size, Bits, int64_t rows, int64_t cols, int64_t taps,
                 const int64_t* offsets, const void* values, void* dense);

SparseIndex* make_index(const Team&, Bits, int64_t rows, int64_t cols, const int64_t* offsets, bool transposed);
void spmm(const Team&, const SparseIndex&, Dtype, const void* values, int64_t M, const void* input, const void* bias,
          void* output);
void compress_spmm(const Team&, const SparseIndex&, Dtype, Bits, const int64_t* offsets, const void* weight,
                   void* values, int64_t M, const void* input, const void* bias, void* output);
void sddmm(const Team&, const SparseIndex&, Dtype, int64_t M, const void* grad_output, const void* input,
           void* grad_values);
void sparse_gradients(const Team&, const SparseIndex&, const SparseIndex& transposed, const float* values, int64_t M,
                      const float* grad_output, const float* input, float* grad_input, float* grad_values,
                      float* grad_bias);
void row_columns(const Team&, Bits, int64_t rows, int64_t cols, const int64_t* offsets, uint16_t* columns);
void spmv(const Team&, const Rows&, int64_t cols, Dtype, const void* values, const void* x, const void* bias, void* y);
void spmv_transposed(const Team&, const Rows&, int64_t cols, Dtype, const void* values, const void* dy, void* dx);
void sampled_outer(const Team&, const Rows&, int64_t cols, Dtype, const void* dy, const void* x, void* grad_values);

void row_ranks(const Team&, Bits, int64_t rows, int64_t cols, uint32_t* ranks);
void packed_linear(const Team&, Dtype, int64_t M, const PackedWeight&, const void* input, const void* bias,
                   void* output);
bool expands_grad_input(Dtype, int64_t M);
void packed_linear_grad_input(const Team&, Dtype, int64_t M, const PackedWeight&, const void* grad_output,
                              void* grad_input);
void packed_linear_grad_values(const Team&, Dtype, int64_t M, const PackedWeight&, const void* grad_output,
                               const void* input, void* grad_values);

// packed_gemv*.cpp. packed_linear and its gradients for a few rows (packed_gemm.cpp decides).
void packed_linear_small(const Team&, Dtype, int64_t M, const PackedWeight&, const void* input, const void* bias,
                         void* output);
void packed_linear_grad_input_small(const Team&, Dtype, int64_t M, const PackedWeight&, const void* grad_output,
                                    void* grad_input);
// Whether the gradient is compressed in registers.
bool compresses_grad_values(Dtype, int64_t M, const PackedWeight&);
void packed_linear_grad_values_small(const Team&, Dtype, int64_t M, const PackedWeight&, const void* grad_output,
                                     const void* input, void* grad_values);

SparseIndex* make_conv_index(const Team&, Bits, const Convolution&, const int64_t* offsets, bool transposed);
void conv_spmm(const Team&, const Convolution&, const SparseIndex&, Dtype, const float* values,
               Images<const void> input, const float* bias, Images<void> output);
void conv_sddmm(const Team&, const Convolution&, const SparseIndex&, Dtype, Images<const void> grad_output,
                Images<const void> input, float* grad_values);

// conv_planes.cpp. Whether it serves between such images, and conv_spmm and conv_sddmm of what it serves.
bool planes_serve(const Convolution&, int64_t nnz, Images<const float> from, Images<const float> to);
void planes_spmm(const Team&, const Convolution&, const SparseIndex&, const float* values, const float* input,
                 const float* bias, float* output);
void planes_sddmm(const Team&, const Convolution&, const SparseIndex&, const float* grad_output, const float* input,
                  float* grad_values);

void pointwise(const Team&, int64_t batch, int64_t positions, int64_t N, int64_t K, const float* input,
               const float* weight, Bits, const float* bias, float* output);
void pointwise_grad_input(const Team&, int64_t batch, int64_t positions, int64_t N, int64_t K, const float* grad_output,
                          const float* weight, Bits, const float* bias, float* grad_input);
void pointwise_grad_weight(const Team&, int64_t batch, int64_t positions, int64_t N, int64_t K,
                           const float* grad_output, const float* input, Bits, float* grad_weight);

void depthwise(const Team&, const Convolution&, const float* weight, Bits, Images<const float> input, const float* bias,
               float* output);
void depthwise_grad_input(const Team&, const Convolution&, const float* weight, Bits, Images<const float> grad_output,
                          const float* bias, float* grad_input);
void depthwise_grad_weight(const Team&, const Convolution&, Bits, Images<const float> grad_output, const float* input,
                           float* grad_weight);
// depthwise_3x3.cpp. What it serves of them: the gradient with respect to the input is the product with the taps turned
// round.
bool is_3x3(const Convolution&);
void depthwise_3x3(const Team&, const Convolution&, bool turned, const float* weight, Bits, const float* source,
                   const float* bias, float* results);
void depthwise_3x3_grad_weight(const Team&, const Convolution&, Bits, const float* grad_output, const float* input,
                               float* grad_weight);
// depthwise_last.cpp. The same where the images have their channels last.
void depthwise_last(const Team&, const Convolution&, const float* weight, Bits, const float* input, const float* bias,
                    float* output);
void depthwise_last_grad_input(const Team&, const Convolution&, const float* weight, Bits, const float* grad_output,
                               const float* bias, float* grad_input);
void depthwise_last_grad_weight(const Team&, const Convolution&, Bits, const float* grad_output, const float* input,
                                float* grad_weight);

void select_channels(const Team&, size_t element_size, int64_t outer, int64_t in_channels, int64_t out_channels,
                     int64_t inner, const int64_t* slots, const void* in, const void* fill, void* out);

int64_t fma_loop(Dtype, int64_t rounds);
void read_loop(const float* data, int64_t n);

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY
