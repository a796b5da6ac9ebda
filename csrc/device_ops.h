// The CUDA kernels on tensors: allocation and launch. Whoever calls has asked device::obstacle, and has tensors of the
// right dtypes, shapes and layouts.
#pragma once

#include "device.h"

namespace masked_ops::device {

int cuda_dtype(at::ScalarType dtype);
// How mask_copy turns one dtype into the other; -1 if it cannot.
int copy_kind(at::ScalarType from, at::ScalarType to);

// To 16 bytes.
bool is_aligned(const at::Tensor& t);
// As the kernels that multiply take it: contiguous and aligned.
at::Tensor in_order(const at::Tensor& t);

// What is taken of a mask at once; none of it is known to the host yet.
struct Packed {
  at::Tensor words;      // int64 [rows][words_per_row]
  at::Tensor live_cols;  // int64 [words_per_row]
  at::Tensor facts;      // int64, a cuda::MaskFacts
};
Packed pack_mask(const Api& api, const at::Tensor& mask, int64_t rows, int64_t cols);  // contiguous, packable
Packed pack_bits(const Api& api, const at::Tensor& bits, int64_t cols);                // contiguous uint8 [rows][...]

// int64 [rows + 1].
at::Tensor row_offsets(const Api& api, const at::Tensor& words, int64_t rows, int64_t cols);

// out = bit ? weight : 0 over memory in order, as the kind says; out may be weight if nothing is cast.
void mask_copy(const Api& api, int kind, const at::Tensor& weight, const at::Tensor& words, int64_t rows, int64_t cols,
               const at::Tensor& out);

at::Tensor expand(const Api& api, const at::Tensor& values, const at::Tensor& words, const at::Tensor& offsets,
                  int64_t rows, int64_t cols);
at::Tensor compress(const Api& api, const at::Tensor& weight, const at::Tensor& words, const at::Tensor& offsets,
                    int64_t nnz);

// Undefined if the mask cannot be indexed.
at::Tensor decode_index(const Api& api, const at::Tensor& words, int64_t N, int64_t K, int64_t nnz,
                        const at::Tensor& offsets);
// The output, or undefined if the kernel does not serve this call.
at::Tensor decode(const Api& api, const at::Tensor& input, const at::Tensor& values, const at::Tensor& index, int64_t N,
                  const at::Tensor& bias);

// A weight laid out for one of the kernels decode_sliced and decode_gathered (cuda/api.h).
enum class Form { kSlices, kGathered };
inline constexpr int kForms = 2;
// What a mask says of it.
struct Layout {
  at::Tensor order;  // of the rows
  at::Tensor pieces;
  int64_t bytes;  // of the data
};
// The device is waited for.
Layout lay_out(const Api& api, Form form, const at::Tensor& words, const at::Tensor& offsets, int64_t N, int64_t K);
// The data: values must be contiguous, of 16 bits.
at::Tensor fill(const Api& api, Form form, const Layout& layout, const at::Tensor& words, const at::Tensor& offsets,
                int64_t K, const at::Tensor& values);
// The output, or undefined if the kernel does not serve this call.
at::Tensor decode(const Api& api, Form form, const at::Tensor& input, const Layout& layout, const at::Tensor& data,
                  int64_t N, const at::Tensor& bias);

at::Tensor fragments(const Api& api, const at::Tensor& words, int64_t N, int64_t K, bool transposed);
// The output, or undefined if the kernel does not serve this call. input is [M][K], or for grad_input [M][N].
at::Tensor gemm(const Api& api, Kernel kernel, bool grad_input, const at::Tensor& input, const at::Tensor& weight,
                const at::Tensor& fragments, const at::Tensor& bias);
// The plan of all of gemm_sm90's products from now on, to measure it (bench/gpu_suite.py); 0: as it chooses.
void set_gemm_plan(int tile_rows, int splits, bool trade);
// out[N][K] = masked(grad_output[M][N]^T * input[M][K]), of their dtype or float; false if the kernel does not serve
// this call. Only gemm_sm90 has it.
bool gemm_grad_weight(const Api& api, const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& words,
                      const at::Tensor& out);

}  // namespace masked_ops::device
