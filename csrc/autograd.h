// The Autograd kernels, with the signatures of the operations themselves.
#pragma once

#include <ATen/core/Tensor.h>

namespace masked_ops {

at::Tensor apply_mask_autograd(const at::Tensor& weight, const at::Tensor& mask, std::optional<at::ScalarType> dtype);

at::Tensor linear_autograd(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& mask,
                           const std::optional<at::Tensor>& bias);
at::Tensor linear_grad_input_autograd(const at::Tensor& grad_output, const at::Tensor& weight, const at::Tensor& mask);
at::Tensor linear_grad_weight_autograd(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& mask);

at::Tensor convolution_autograd(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& mask,
                                const std::optional<at::Tensor>& bias, c10::SymIntArrayRef stride,
                                c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation, bool transposed,
                                c10::SymIntArrayRef output_padding, c10::SymInt groups);
at::Tensor convolution_grad_input_autograd(const at::Tensor& grad_output, const at::Tensor& weight,
                                           const at::Tensor& mask, c10::SymIntArrayRef input_size,
                                           c10::SymIntArrayRef stride, c10::SymIntArrayRef padding,
                                           c10::SymIntArrayRef dilation, bool transposed,
                                           c10::SymIntArrayRef output_padding, c10::SymInt groups);
at::Tensor convolution_grad_weight_autograd(const at::Tensor& grad_output, const at::Tensor& input,
                                            const at::Tensor& mask, c10::SymIntArrayRef stride,
                                            c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation, bool transposed,
                                            c10::SymIntArrayRef output_padding, c10::SymInt groups);

at::Tensor packed_linear_autograd(const at::Tensor& input, const at::Tensor& values, const at::Tensor& bits,
                                  c10::SymInt in_features, const std::optional<at::Tensor>& bias);
at::Tensor packed_linear_grad_input_autograd(const at::Tensor& grad_output, const at::Tensor& values,
                                             const at::Tensor& bits, c10::SymInt in_features);
at::Tensor packed_linear_grad_values_autograd(const at::Tensor& grad_output, const at::Tensor& input,
                                              const at::Tensor& bits, c10::SymInt nnz);
at::Tensor packed_convolution_autograd(const at::Tensor& input, const at::Tensor& values, const at::Tensor& bits,
                                       c10::SymIntArrayRef weight_size, const std::optional<at::Tensor>& bias,
                                       c10::SymIntArrayRef stride, c10::SymIntArrayRef padding,
                                       c10::SymIntArrayRef dilation, bool transposed,
                                       c10::SymIntArrayRef output_padding, c10::SymInt groups);
at::Tensor packed_convolution_grad_input_autograd(const at::Tensor& grad_output, const at::Tensor& values,
                                                  const at::Tensor& bits, c10::SymIntArrayRef weight_size,
                                                  c10::SymIntArrayRef input_size, c10::SymIntArrayRef stride,
                                                  c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation,
                                                  bool transposed, c10::SymIntArrayRef output_padding,
                                                  c10::SymInt groups);
at::Tensor packed_convolution_grad_values_autograd(const at::Tensor& grad_output, const at::Tensor& input,
                                                   const at::Tensor& bits, c10::SymIntArrayRef weight_size,
                                                   c10::SymInt nnz, c10::SymIntArrayRef stride,
                                                   c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation,
                                                   bool transposed, c10::SymIntArrayRef output_padding,
                                                   c10::SymInt groups);
at::Tensor unpack_values_autograd(const at::Tensor& values, const at::Tensor& bits, c10::SymInt in_features);
at::Tensor pack_values_autograd(const at::Tensor& weight, const at::Tensor& bits, c10::SymInt nnz);

// Under CUDA's autocast: input and bias are cast already, weight is not. Whether it serves, for a weight that is
// trained and masked as it is cast; and the call.
bool takes_linear_autocast(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& mask,
                           const std::optional<at::Tensor>& bias);
at::Tensor linear_autocast(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& mask,
                           const std::optional<at::Tensor>& bias);

// The operations through the dispatcher.
at::Tensor call_apply_mask(const at::Tensor& weight, const at::Tensor& mask, std::optional<at::ScalarType> dtype);
at::Tensor call_linear(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& mask,
                       const std::optional<at::Tensor>& bias);
at::Tensor call_linear_grad_input(const at::Tensor& grad_output, const at::Tensor& weight, const at::Tensor& mask);
at::Tensor call_packed_linear(const at::Tensor& input, const at::Tensor& values, const at::Tensor& bits,
                              c10::SymInt in_features, const std::optional<at::Tensor>& bias);
at::Tensor call_packed_linear_grad_input(const at::Tensor& grad_output, const at::Tensor& values,
                                         const at::Tensor& bits, c10::SymInt in_features);
at::Tensor call_convolution(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& mask,
                            const std::optional<at::Tensor>& bias, c10::SymIntArrayRef stride,
                            c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation, bool transposed,
                            c10::SymIntArrayRef output_padding, c10::SymInt groups);

at::Tensor call_packed_convolution(const at::Tensor& input, const at::Tensor& values, const at::Tensor& bits,
                                   c10::SymIntArrayRef weight_size, const std::optional<at::Tensor>& bias,
                                   c10::SymIntArrayRef stride, c10::SymIntArrayRef padding,
                                   c10::SymIntArrayRef dilation, bool transposed, c10::SymIntArrayRef output_padding,
                                   c10::SymInt groups);

}  // namespace masked_ops
