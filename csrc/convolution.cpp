// The convolution family: checks, shapes, allocation and choice of path. No arithmetic.
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>

#include "checks.h"
#include "masking.h"
#include "ops.h"
#include "path.h"

namespace masked_ops {
namespace {

// A tensor of which an operation reads the sizes and the memory format and nothing else.
at::Tensor placeholder(at::IntArrayRef sizes, const at::Tensor& like) {
  return at::empty(sizes, like.options(), like.suggest_memory_format());
}

}  // namespace

at::Tensor convolution(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& mask,
                       const std::optional<at::Tensor>& bias, at::IntArrayRef stride, at::IntArrayRef padding,
                       at::IntArrayRef dilation, bool transposed, at::IntArrayRef output_padding, int64_t groups) {
  check_mask(weight, mask);
  check_same_kind("input", input, "weight", weight);
  if (bias && bias->defined()) check_same_kind("bias", *bias, "weight", weight);
  TORCH_CHECK(input.dim() == weight.dim(), "input must have the ", weight.dim(), " dimensions of weight, got shape ",
              input.sizes());
  choose_convolution(weight, nullptr);
  return at::convolution(input, masked_weight(weight, mask), bias, stride, padding, dilation, transposed,
                         output_padding, groups);
}

at::Tensor convolution_grad_input(const at::Tensor& grad_output, const at::Tensor& weight, const at::Tensor& mask,
                                  at::IntArrayRef input_size, at::IntArrayRef stride, at::IntArrayRef padding,
                                  at::IntArrayRef dilation, bool transposed, at::IntArrayRef output_padding,
                                  int64_t groups) {
  check_mask(weight, mask);
  check_same_kind("grad_output", grad_output, "weight", weight);
  choose_convolution(weight, nullptr);
  const at::Tensor input = placeholder(input_size, grad_output);
  return std::get<0>(at::convolution_backward(grad_output, input, masked_weight(weight, mask), std::nullopt, stride,
                                              padding, dilation, transposed, output_padding, groups,
                                              {true, false, false}));
}

at::Tensor convolution_grad_weight(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& mask,
                                   at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                                   bool transposed, at::IntArrayRef output_padding, int64_t groups) {
  const at::Tensor weight = at::empty(mask.sizes(), grad_output.options(), mask.suggest_memory_format());
  check_mask(weight, mask);
  check_same_kind("input", input, "weight", weight);
  choose_convolution(weight, nullptr);
  const at::Tensor grad_weight =
      std::get<1>(at::convolution_backward(grad_output, input, weight, std::nullopt, stride, padding, dilation,
                                           transposed, output_padding, groups, {false, true, false}));
  return masked_weight(grad_weight, mask);
}

std::tuple<std::string, std::string> explain_convolution(const at::Tensor& weight, const at::Tensor& mask,
                                                         int64_t /*batch*/) {
  check_mask(weight, mask);
  const PatternPtr pattern = try_pattern_of(mask);
  const Choice choice = choose_convolution(weight, pattern.get());
  return {path_name(choice.path), choice.reason};
}

}  // namespace masked_ops
