// The sparse path of the linear family, masked and packed: which kernel takes a product with the remaining weights.
#pragma once

#include <ATen/core/Tensor.h>

#include "pattern.h"

namespace masked_ops {

// Contiguous tensors of one dtype that has kernels: x [M][K], y and dy [M][N], dx [M][K], values and grad_values [nnz];
// M, N, K > 0.

// y = x * weight^T + bias, which may be undefined.
void sparse_linear(const Pattern& pattern, const at::Tensor& values, int64_t M, const at::Tensor& x,
                   const at::Tensor& bias, const at::Tensor& y);
// The same of a dense weight, contiguous; its values, which are compressed on the way.
at::Tensor sparse_linear_of_dense(const Pattern& pattern, const at::Tensor& weight, int64_t M, const at::Tensor& x,
                                  const at::Tensor& bias, const at::Tensor& y);
// dx = dy * weight
void sparse_grad_input(const Pattern& pattern, const at::Tensor& values, int64_t M, const at::Tensor& dy,
                       const at::Tensor& dx);
// grad_values = the remaining weights' entries of dy^T * x
void sparse_grad_values(const Pattern& pattern, int64_t M, const at::Tensor& dy, const at::Tensor& x,
                        const at::Tensor& grad_values);

// Both; and the sum of dy's rows, [N], if that is wanted and comes cheap on the way, else undefined.
at::Tensor sparse_gradients(const Pattern& pattern, const at::Tensor& values, int64_t M, const at::Tensor& dy,
                            const at::Tensor& x, const at::Tensor& dx, const at::Tensor& grad_values, bool of_bias);

}  // namespace masked_ops
