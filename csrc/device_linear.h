// The families on a device; arguments are checked by then. What is done here is choice, allocation and launch.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <tuple>

#include "path.h"

namespace masked_ops::device {

// As masked_cast; and in place, for a gradient that is the caller's own.
at::Tensor masked_weight(const at::Tensor& weight, const at::Tensor& mask, at::ScalarType dtype);
void mask_in_place(const at::Tensor& weight, const at::Tensor& mask);
// Whether masked_weight would turn this one into 16-bit floats in a single pass, and the gradient back. Arguments are
// not checked yet.
bool casts_while_masking(const at::Tensor& weight, const at::Tensor& mask);
// Whether a good part of a convolution's channels is known to be pruned, so that the compact path comes into question,
// which takes a weight that is cast before.
bool leaves_channels_out(const at::Tensor& weight, const at::Tensor& mask);

// weight has two dimensions, bias is undefined or a vector of N. The second result is the masked weight if one was
// made, as the hook keeps it: it saves the gradient of the input from making another.
std::tuple<at::Tensor, at::Tensor> linear(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& mask,
                                          const at::Tensor& bias);
// The same by the compact path, of a weight that may have another dtype than the input: nothing if another path is
// better, or the arguments do not fit each other.
std::optional<at::Tensor> compact_linear(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& mask,
                                         const at::Tensor& bias);
// The weight may have another dtype than grad_output, here and below.
at::Tensor linear_grad_input(const at::Tensor& grad_output, const at::Tensor& weight, const at::Tensor& mask,
                             const at::Tensor& masked);
// The rows of grad_output, transposed, times those of the input, conjugated.
at::Tensor outer(const at::Tensor& grad_output, const at::Tensor& input);
// Into grad_weight, which is the result.
at::Tensor linear_grad_weight(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& mask,
                              at::Tensor grad_weight);
// The same in another dtype, as a weight has it that autocast has cast.
at::Tensor linear_grad_weight_as(at::ScalarType dtype, const at::Tensor& grad_output, const at::Tensor& input,
                                 const at::Tensor& mask);
std::tuple<std::string, std::string> explain_linear(Pass pass, const at::Tensor& weight, const at::Tensor& mask,
                                                    int64_t batch);
// Of a convolution, and of whatever else masks the weight first.
std::tuple<std::string, std::string> explain_copy(const at::Tensor& weight, const at::Tensor& mask,
                                                  const char* operation);

at::Tensor packed_linear(const at::Tensor& input, const at::Tensor& values, const at::Tensor& bits, int64_t in_features,
                         const at::Tensor& bias);
at::Tensor packed_linear_grad_input(const at::Tensor& grad_output, const at::Tensor& values, const at::Tensor& bits,
                                    int64_t in_features);
at::Tensor packed_linear_grad_values(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& bits,
                                     int64_t nnz);
at::Tensor unpack_values(const at::Tensor& values, const at::Tensor& bits, int64_t in_features);
at::Tensor pack_values(const at::Tensor& weight, const at::Tensor& bits, int64_t nnz);
std::tuple<std::string, std::string> explain_packed_linear(Pass pass, const at::Tensor& values, const at::Tensor& bits,
                                                           int64_t in_features, int64_t batch);

}  // namespace masked_ops::device
