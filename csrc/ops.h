// The operations below autograd, as register.cpp binds them to CPU and CUDA.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <tuple>

namespace masked_ops {

at::Tensor apply_mask(const at::Tensor& weight, const at::Tensor& mask, std::optional<at::ScalarType> dtype);

at::Tensor linear(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& mask,
                  const std::optional<at::Tensor>& bias);
at::Tensor linear_grad_input(const at::Tensor& grad_output, const at::Tensor& weight, const at::Tensor& mask);
at::Tensor linear_grad_weight(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& mask);
// by_input: of a weight [K, N], whose product is another one's gradient of the input.
std::tuple<std::string, std::string> explain_linear(const at::Tensor& weight, const at::Tensor& mask, int64_t batch,
                                                    bool by_input);

// The same three for the autograd node of an eager call: what forward compressed (undefined unless the sparse path was
// taken) serves both gradients.
std::tuple<at::Tensor, at::Tensor> linear_with_values(const at::Tensor& input, const at::Tensor& weight,
                                                      const at::Tensor& mask, const std::optional<at::Tensor>& bias);
at::Tensor linear_grad_input_with_values(const at::Tensor& grad_output, const at::Tensor& weight,
                                         const at::Tensor& mask, const at::Tensor& values);
// As packed_linear_gradients.
std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_gradients(const at::Tensor& grad_output, const at::Tensor& input,
                                                                const at::Tensor& weight, const at::Tensor& mask,
                                                                const at::Tensor& values, bool of_bias);

// The packed family: values[nnz] are the weights whose bit is set, in row-major order; bits is uint8
// [N][ceil(in_features / 8)] in little bit order.
at::Tensor packed_linear(const at::Tensor& input, const at::Tensor& values, const at::Tensor& bits, int64_t in_features,
                         const std::optional<at::Tensor>& bias);
at::Tensor packed_linear_grad_input(const at::Tensor& grad_output, const at::Tensor& values, const at::Tensor& bits,
                                    int64_t in_features);
at::Tensor packed_linear_grad_values(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& bits,
                                     int64_t nnz);
// Both gradients for the node of an eager call, whose arguments forward has checked; and that of the bias, if it is
// wanted and comes cheap on the way, else undefined.
std::tuple<at::Tensor, at::Tensor, at::Tensor> packed_linear_gradients(const at::Tensor& grad_output,
                                                                       const at::Tensor& input,
                                                                       const at::Tensor& values, const at::Tensor& bits,
                                                                       bool of_bias);
at::Tensor unpack_values(const at::Tensor& values, const at::Tensor& bits, int64_t in_features);
at::Tensor pack_values(const at::Tensor& weight, const at::Tensor& bits, int64_t nnz);
std::tuple<std::string, std::string> explain_packed_linear(const at::Tensor& values, const at::Tensor& bits,
                                                           int64_t in_features, int64_t batch, bool by_input);

at::Tensor convolution(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& mask,
                       const std::optional<at::Tensor>& bias, at::IntArrayRef stride, at::IntArrayRef padding,
                       at::IntArrayRef dilation, bool transposed, at::IntArrayRef output_padding, int64_t groups);
at::Tensor convolution_grad_input(const at::Tensor& grad_output, const at::Tensor& weight, const at::Tensor& mask,
                                  at::IntArrayRef input_size, at::IntArrayRef stride, at::IntArrayRef padding,
                                  at::IntArrayRef dilation, bool transposed, at::IntArrayRef output_padding,
                                  int64_t groups);
at::Tensor convolution_grad_weight(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& mask,
                                   at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                                   bool transposed, at::IntArrayRef output_padding, int64_t groups);

// As linear_with_values.
std::tuple<at::Tensor, at::Tensor> convolution_with_values(const at::Tensor& input, const at::Tensor& weight,
                                                           const at::Tensor& mask,
                                                           const std::optional<at::Tensor>& bias,
                                                           at::IntArrayRef stride, at::IntArrayRef padding,
                                                           at::IntArrayRef dilation, bool transposed,
                                                           at::IntArrayRef output_padding, int64_t groups);
// Those of the gradients that are asked for; values are what forward gave, and may be undefined.
std::tuple<at::Tensor, at::Tensor> convolution_gradients(const at::Tensor& grad_output, const at::Tensor& input,
                                                         const at::Tensor& weight, const at::Tensor& mask,
                                                         const at::Tensor& values, bool of_input, bool of_weight,
                                                         at::IntArrayRef stride, at::IntArrayRef padding,
                                                         at::IntArrayRef dilation, bool transposed,
                                                         at::IntArrayRef output_padding, int64_t groups);
std::tuple<std::string, std::string> explain_convolution(const at::Tensor& weight, const at::Tensor& mask,
                                                         at::IntArrayRef input_size, bool channels_last,
                                                         at::IntArrayRef stride, at::IntArrayRef padding,
                                                         at::IntArrayRef dilation, bool transposed,
                                                         at::IntArrayRef output_padding, int64_t groups);

// The packed convolutions: as packed_linear over the weight of size weight_size flattened to [weight_size[0]][the
// rest].
at::Tensor packed_convolution(const at::Tensor& input, const at::Tensor& values, const at::Tensor& bits,
                              at::IntArrayRef weight_size, const std::optional<at::Tensor>& bias,
                              at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                              bool transposed, at::IntArrayRef output_padding, int64_t groups);
at::Tensor packed_convolution_grad_input(const at::Tensor& grad_output, const at::Tensor& values,
                                         const at::Tensor& bits, at::IntArrayRef weight_size,
                                         at::IntArrayRef input_size, at::IntArrayRef stride, at::IntArrayRef padding,
                                         at::IntArrayRef dilation, bool transposed, at::IntArrayRef output_padding,
                                         int64_t groups);
at::Tensor packed_convolution_grad_values(const at::Tensor& grad_output, const at::Tensor& input,
                                          const at::Tensor& bits, at::IntArrayRef weight_size, int64_t nnz,
                                          at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                                          bool transposed, at::IntArrayRef output_padding, int64_t groups);
std::tuple<std::string, std::string> explain_packed_convolution(const at::Tensor& values, const at::Tensor& bits,
                                                                at::IntArrayRef weight_size, at::IntArrayRef input_size,
                                                                bool channels_last, at::IntArrayRef stride,
                                                                at::IntArrayRef padding, at::IntArrayRef dilation,
                                                                bool transposed, at::IntArrayRef output_padding,
                                                                int64_t groups);

}  // namespace masked_ops
