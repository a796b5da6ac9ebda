// The convolution family: checks, shapes, allocation and choice of path. No arithmetic.
#include <ATen/ops/empty.h>

#include "checks.h"
#include "convolution_plan.h"
#include "device_linear.h"
#include "masking.h"
#include "ops.h"

namespace masked_ops {

std::tuple<at::Tensor, at::Tensor> convolution_with_values(const at::Tensor& input, const at::Tensor& weight,
                                                           const at::Tensor& mask,
                                                           const std::optional<at::Tensor>& bias,
                                                           at::IntArrayRef stride, at::IntArrayRef padding,
                                                           at::IntArrayRef dilation, bool transposed,
                                                           at::IntArrayRef output_padding, int64_t groups) {
  check_mask(weight, mask);
  check_same_kind("input", input, "weight", weight);
  const bool has_bias = bias && bias->defined();
  if (has_bias) check_same_kind("bias", *bias, "weight", weight);
  const Geometry geometry{weight.sizes(), stride, padding, dilation, transposed, output_padding, groups};
  geometry.check(input.sizes());
  const bool channels_last = prefers_channels_last(input, weight);
  const ConvolutionPlan plan(Pass::kForward, geometry, input.sizes(), channels_last, weight, try_pattern_of(mask));
  if (plan.path == Path::kCopy || (has_bias && !geometry.fits(*bias))) {
    return {geometry.forward(input, masked_weight(weight, mask), bias), at::Tensor()};
  }
  const at::Tensor values = compress(weight, *plan.pattern);
  return {plan.forward(input, values, has_bias ? bias->contiguous() : at::Tensor(),
                       result_format(input, weight, bias, geometry)),
          values};
}

at::Tensor convolution(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& mask,
                       const std::optional<at::Tensor>& bias, at::IntArrayRef stride, at::IntArrayRef padding,
                       at::IntArrayRef dilation, bool transposed, at::IntArrayRef output_padding, int64_t groups) {
  return std::get<0>(convolution_with_values(input, weight, mask, bias, stride, padding, dilation, transposed,
                                             output_padding, groups));
}

at::Tensor convolution_grad_input_with_values(const at::Tensor& grad_output, const at::Tensor& weight,
                                              const at::Tensor& mask, const at::Tensor& values,
                                              at::IntArrayRef input_size, at::IntArrayRef stride,
                                              at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed,
                                              at::IntArrayRef output_padding, int64_t groups) {
  check_mask(weight, mask);
  check_same_kind("grad_output", grad_output, "weight", weight);
  const Geometry geometry{weight.sizes(), stride, padding, dilation, transposed, output_padding, groups};
  geometry.check(input_size, grad_output.sizes());
  const bool channels_last = prefers_channels_last(grad_output, weight);
  const ConvolutionPlan plan(Pass::kGradInput, geometry, input_size, channels_last, weight, try_pattern_of(mask),
                             values.defined());
  if (plan.path == Path::kCopy) return geometry.grad_input(grad_output, masked_weight(weight, mask), input_size);
  const at::Tensor input = Geometry::placeholder(input_size, grad_output);
  return plan.grad_input(grad_output, values.defined() ? values : compress(weight, *plan.pattern), input_size,
                         result_format(input, weight, std::nullopt, geometry));
}

at::Tensor convolution_grad_input(const at::Tensor& grad_output, const at::Tensor& weight, const at::Tensor& mask,
                                  at::IntArrayRef input_size, at::IntArrayRef stride, at::IntArrayRef padding,
                                  at::IntArrayRef dilation, bool transposed, at::IntArrayRef output_padding,
                                  int64_t groups) {
  return convolution_grad_input_with_values(grad_output, weight, mask, at::Tensor(), input_size, stride, padding,
                                            dilation, transposed, output_padding, groups);
}

at::Tensor convolution_grad_weight(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& mask,
                                   at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                                   bool transposed, at::IntArrayRef output_padding, int64_t groups) {
  const at::Tensor weight = at::empty(mask.sizes(), grad_output.options(), mask.suggest_memory_format());
  check_mask(weight, mask);
  check_same_kind("input", input, "grad_output", grad_output);
  const Geometry geometry{mask.sizes(), stride, padding, dilation, transposed, output_padding, groups};
  geometry.check(input.sizes(), grad_output.sizes());
  const ConvolutionPlan plan(Pass::kGradWeight, geometry, input.sizes(), prefers_channels_last(input, weight), weight,
                             try_pattern_of(mask));
  if (plan.path == Path::kCopy) return masked_own(geometry.grad_weight(grad_output, input, weight), mask);
  const at::Tensor values = plan.grad_values(grad_output, input);
  const auto format = result_format(input, weight, std::nullopt, geometry);
  const at::Tensor grad_weight = at::empty(mask.sizes(), grad_output.options(), format);
  expand_into(grad_weight, values, *plan.pattern);
  return grad_weight;
}

std::tuple<std::string, std::string> explain_convolution(const at::Tensor& weight, const at::Tensor& mask,
                                                         at::IntArrayRef input_size, bool channels_last,
                                                         at::IntArrayRef stride, at::IntArrayRef padding,
                                                         at::IntArrayRef dilation, bool transposed,
                                                         at::IntArrayRef output_padding, int64_t groups) {
  check_mask(weight, mask);
  if (weight.is_cuda()) return device::explain_copy(weight, mask, "convolution");
  if (const PatternPtr pattern = try_pattern_of(mask)) pattern->mark_reused();  // as explain_linear
  const Geometry geometry{weight.sizes(), stride, padding, dilation, transposed, output_padding, groups};
  geometry.check(input_size);
  const ConvolutionPlan plan(Pass::kForward, geometry, input_size, channels_last, weight, try_pattern_of(mask));
  return {path_name(plan.path), plan.reason};
}

}  // namespace masked_ops
