// The convolution families on a device. Torch's own operations serve, over a weight that is masked or unpacked first;
// here is the compact path, which leaves out what that would compute for nothing. Arguments are checked by then;
// nothing comes back where another path is better.
#pragma once

#include <optional>

#include "geometry.h"

namespace masked_ops::device {

std::optional<at::Tensor> compact_convolution(const Geometry& geometry, const at::Tensor& input,
                                              const at::Tensor& weight, const at::Tensor& mask,
                                              const std::optional<at::Tensor>& bias);
// Reads of the input the sizes and the memory format.
std::optional<at::Tensor> compact_convolution_grad_input(const Geometry& geometry, const at::Tensor& grad_output,
                                                         const at::Tensor& input, const at::Tensor& weight,
                                                         const at::Tensor& mask);
// Reads of the weight the dtype and the memory format.
std::optional<at::Tensor> compact_convolution_grad_weight(const Geometry& geometry, const at::Tensor& grad_output,
                                                          const at::Tensor& input, const at::Tensor& weight,
                                                          const at::Tensor& mask);
// Why forward goes that way, null if it does not.
const char* explain_compact_convolution(const Geometry& geometry, at::IntArrayRef input, const at::Tensor& weight,
                                        const at::Tensor& mask);

// Of a packed weight, which has the geometry's sizes.
std::optional<at::Tensor> compact_packed_convolution(const Geometry& geometry, const at::Tensor& input,
                                                     const at::Tensor& values, const at::Tensor& bits,
                                                     const std::optional<at::Tensor>& bias);
std::optional<at::Tensor> compact_packed_convolution_grad_input(const Geometry& geometry, const at::Tensor& grad_output,
                                                                const at::Tensor& input, const at::Tensor& values,
                                                                const at::Tensor& bits);
std::optional<at::Tensor> compact_packed_convolution_grad_values(const Geometry& geometry,
                                                                 const at::Tensor& grad_output, const at::Tensor& input,
                                                                 const at::Tensor& bits, int64_t nnz);
const char* explain_compact_packed_convolution(const Geometry& geometry, at::IntArrayRef input,
                                               const at::Tensor& values, const at::Tensor& bits);

}  // namespace masked_ops::device
