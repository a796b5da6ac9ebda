// The convolution family: checks, shapes, allocation and choice of path. No arithmetic.
#include <ATen/ops/empty.h>

#include "checks.h"
#include "geometry.h"
#include "masking.h"
#include "ops.h"
#include "path.h"

namespace masked_ops {

at::Tensor convolution(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& mask,
                       const std::optional<at::Tensor>& bias, at::IntArrayRef stride, at::IntArrayRef padding,
                       at::IntArrayRef dilation, bool transposed, at::IntArrayRef output_padding, int64_t groups) {
  check_mask(weight, mask);
  check_same_kind("input", input, "weight", weight);
  if (bias && bias->defined()) check_same_kind("bias", *bias, "weight", weight);
  const Geometry geometry{weight.sizes(), stride, padding, dilation, transposed, output_padding, groups};
  geometry.check(input.sizes());
  choose_convolution(weight, nullptr);
  return geometry.forward(input, masked_weight(weight, mask), bias);
}

at::Tensor convolution_grad_input(const at::Tensor& grad_output, const at::Tensor& weight, const at::Tensor& mask,
                                  at::IntArrayRef input_size, at::IntArrayRef stride, at::IntArrayRef padding,
                                  at::IntArrayRef dilation, bool transposed, at::IntArrayRef output_padding,
                                  int64_t groups) {
  check_mask(weight, mask);
  check_same_kind("grad_output", grad_output, "weight", weight);
  const Geometry geometry{weight.sizes(), stride, padding, dilation, transposed, output_padding, groups};
  geometry.check(input_size, grad_output.sizes());
  choose_convolution(weight, nullptr);
  return geometry.grad_input(grad_output, masked_weight(weight, mask), input_size);
}

at::Tensor convolution_grad_weight(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& mask,
                                   at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                                   bool transposed, at::IntArrayRef output_padding, int64_t groups) {
  const at::Tensor weight = at::empty(mask.sizes(), grad_output.options(), mask.suggest_memory_format());
  check_mask(weight, mask);
  check_same_kind("input", input, "grad_output", grad_output);
  const Geometry geometry{mask.sizes(), stride, padding, dilation, transposed, output_padding, groups};
  geometry.check(input.sizes(), grad_output.sizes());
  choose_convolution(weight, nullptr);
  return masked_weight(geometry.grad_weight(grad_output, input, weight), mask);
}

std::tuple<std::string, std::string> explain_convolution(const at::Tensor& weight, const at::Tensor& mask,
                                                         int64_t /*batch*/) {
  check_mask(weight, mask);
  const PatternPtr pattern = try_pattern_of(mask);
  const Choice choice = choose_convolution(weight, pattern.get());
  return {path_name(choice.path), choice.reason};
}

}  // namespace masked_ops
