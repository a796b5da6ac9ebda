// The convolution family: checks, shapes, allocation and choice of path. No arithmetic.
#include <ATen/ops/empty.h>

#include "checks.h"
#include "compact_convolution.h"
#include "convolution_plan.h"
#include "depthwise_convolution.h"
#include "device_convolution.h"
#include "device_linear.h"
#include "masking.h"
#include "ops.h"
#include "pointwise_convolution.h"

namespace masked_ops {
namespace {

// In the order of the weight.
CompactConvolution compact_of(const ConvolutionPlan& plan, const at::Tensor& weight, const at::Tensor& mask) {
  const bool channels_last = suggests_channels_last(weight);
  return {plan.of, channels_last ? pattern_of(with_version_of(mask, mask.movedim(1, -1))) : plan.pattern,
          channels_last};
}

// body(the kernels of the fused path that serve the convolution)
template <typename Body>
auto with_fused(const ConvolutionPlan& plan, const Body& body) {
  if (is_pointwise(plan.geometry)) return body(PointwiseConvolution(plan.of, plan.geometry, *plan.pattern));
  return body(DepthwiseConvolution(plan.of, plan.geometry, *plan.pattern));
}

// Both gradients, once the arguments are checked.
class Gradients {
 public:
  Gradients(const Geometry& geometry, const at::Tensor& mask)
      : geometry_(geometry), mask_(mask), pattern_(try_pattern_of(mask)) {}

  // Reads the shape and the layout of the input alone; values may be undefined.
  at::Tensor of_input(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& weight,
                      const at::Tensor& values) const {
    if (const auto dx = compact_on_device(Pass::kGradInput, grad_output, input, weight)) return *dx;
    return of_input(plan_of_input(grad_output, input, weight, values), grad_output, input, weight, values);
  }
  // Reads the dtype and the layout of the weight alone.
  at::Tensor of_weight(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& weight) const {
    if (const auto dw = compact_on_device(Pass::kGradWeight, grad_output, input, weight)) return *dw;
    return of_weight(plan_of_weight(input, weight), grad_output, input, weight);
  }
  // In one call of torch's where it computes both, as it does for a dense layer.
  std::tuple<at::Tensor, at::Tensor> of_both(const at::Tensor& grad_output, const at::Tensor& input,
                                             const at::Tensor& weight, const at::Tensor& values) const {
    if (auto dx = compact_on_device(Pass::kGradInput, grad_output, input, weight)) {
      return {*dx, of_weight(grad_output, input, weight)};
    }
    if (auto dw = compact_on_device(Pass::kGradWeight, grad_output, input, weight)) {
      return {of_input(grad_output, input, weight, values), *dw};
    }
    const ConvolutionPlan of_x = plan_of_input(grad_output, input, weight, values);
    const ConvolutionPlan of_w = plan_of_weight(input, weight);
    if (of_x.path != Path::kCopy || of_w.path != Path::kCopy) {
      return {of_input(of_x, grad_output, input, weight, values), of_weight(of_w, grad_output, input, weight)};
    }
    const auto [grad_input, grad_weight] =
        geometry_.gradients(grad_output, input, MaskedForCall(weight, mask_).weight());
    return {grad_input, masked_own(grad_weight, mask_)};
  }

 private:
  std::optional<at::Tensor> compact_on_device(Pass pass, const at::Tensor& grad_output, const at::Tensor& input,
                                              const at::Tensor& weight) const {
    if (!weight.is_cuda()) return {};
    return pass == Pass::kGradInput
               ? device::compact_convolution_grad_input(geometry_, grad_output, input, weight, mask_)
               : device::compact_convolution_grad_weight(geometry_, grad_output, input, weight, mask_);
  }
  ConvolutionPlan plan_of_input(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& weight,
                                const at::Tensor& values) const {
    const bool channels_last = prefers_channels_last(grad_output, weight);
    return {Pass::kGradInput, geometry_, input.sizes(), channels_last, weight, pattern_, values.defined()};
  }
  ConvolutionPlan plan_of_weight(const at::Tensor& input, const at::Tensor& weight) const {
    return {Pass::kGradWeight, geometry_, input.sizes(), prefers_channels_last(input, weight), weight, pattern_};
  }

  at::Tensor of_input(const ConvolutionPlan& plan, const at::Tensor& grad_output, const at::Tensor& input,
                      const at::Tensor& weight, const at::Tensor& values) const {
    if (plan.path == Path::kCopy) {
      return geometry_.grad_input(grad_output, MaskedForCall(weight, mask_).weight(), input);
    }
    const at::MemoryFormat format = result_format(input, weight, std::nullopt, geometry_);
    if (plan.path == Path::kFused) {
      return with_fused(
          plan, [&](const auto& fused) { return fused.grad_input(grad_output, weight, input.sizes(), format); });
    }
    if (plan.path == Path::kCompact) {
      const CompactConvolution compact = compact_of(plan, weight, mask_);
      return compact.grad_input(grad_output, compact.left_of(weight), input.sizes(), format);
    }
    return plan.grad_input(grad_output, remaining(values, weight, *plan.pattern), input.sizes(), format);
  }

  at::Tensor of_weight(const ConvolutionPlan& plan, const at::Tensor& grad_output, const at::Tensor& input,
                       const at::Tensor& weight) const {
    if (plan.path == Path::kCopy) return masked_own(geometry_.grad_weight(grad_output, input, weight), mask_);
    const at::MemoryFormat format = result_format(input, weight, std::nullopt, geometry_);
    if (plan.path == Path::kFused) {
      return with_fused(plan, [&](const auto& fused) { return fused.grad_weight(grad_output, input, format); });
    }
    const at::Tensor grad_weight = at::empty(mask_.sizes(), grad_output.options(), format);
    if (plan.path == Path::kCompact) {
      const CompactConvolution compact = compact_of(plan, grad_weight, mask_);
      return compact.whole_of(compact.grad_weight(grad_output, input));
    }
    expand_into(grad_weight, plan.grad_values(grad_output, input), *plan.pattern);
    return grad_weight;
  }

  const Geometry& geometry_;
  const at::Tensor& mask_;
  PatternPtr pattern_;
};

}  // namespace

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
  if (weight.is_cuda()) {
    if (const auto y = device::compact_convolution(geometry, input, weight, mask, bias)) return {*y, at::Tensor()};
  }
  const bool channels_last = prefers_channels_last(input, weight);
  const ConvolutionPlan plan(Pass::kForward, geometry, input.sizes(), channels_last, weight, try_pattern_of(mask));
  if (plan.path == Path::kCopy || (has_bias && !geometry.fits(*bias))) {
    return {geometry.forward(input, MaskedForCall(weight, mask).weight(), bias), at::Tensor()};
  }
  const at::MemoryFormat format = result_format(input, weight, bias, geometry);
  if (plan.path == Path::kFused) {
    const auto forward = [&](const auto& fused) { return fused.forward(input, weight, bias, format); };
    return {with_fused(plan, forward), at::Tensor()};
  }
  if (plan.path == Path::kCompact) {
    const CompactConvolution compact = compact_of(plan, weight, mask);
    return {compact.forward(input, compact.left_of(weight), bias, format), at::Tensor()};
  }
  const at::Tensor values = compress(weight, *plan.pattern);
  return {plan.forward(input, values, has_bias ? bias->contiguous() : at::Tensor(), format), values};
}

at::Tensor convolution(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& mask,
                       const std::optional<at::Tensor>& bias, at::IntArrayRef stride, at::IntArrayRef padding,
                       at::IntArrayRef dilation, bool transposed, at::IntArrayRef output_padding, int64_t groups) {
  return std::get<0>(convolution_with_values(input, weight, mask, bias, stride, padding, dilation, transposed,
                                             output_padding, groups));
}

at::Tensor convolution_grad_input(const at::Tensor& grad_output, const at::Tensor& weight, const at::Tensor& mask,
                                  at::IntArrayRef input_size, at::IntArrayRef stride, at::IntArrayRef padding,
                                  at::IntArrayRef dilation, bool transposed, at::IntArrayRef output_padding,
                                  int64_t groups) {
  check_mask(weight, mask);
  check_same_kind("grad_output", grad_output, "weight", weight);
  const Geometry geometry{weight.sizes(), stride, padding, dilation, transposed, output_padding, groups};
  geometry.check(input_size, grad_output.sizes());
  const at::Tensor input = Geometry::placeholder(input_size, grad_output);
  return Gradients(geometry, mask).of_input(grad_output, input, weight, at::Tensor());
}

at::Tensor convolution_grad_weight(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& mask,
                                   at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                                   bool transposed, at::IntArrayRef output_padding, int64_t groups) {
  const at::Tensor weight = at::empty(mask.sizes(), grad_output.options(), mask.suggest_memory_format());
  check_mask(weight, mask);
  check_same_kind("input", input, "grad_output", grad_output);
  const Geometry geometry{mask.sizes(), stride, padding, dilation, transposed, output_padding, groups};
  geometry.check(input.sizes(), grad_output.sizes());
  return Gradients(geometry, mask).of_weight(grad_output, input, weight);
}

std::tuple<at::Tensor, at::Tensor> convolution_gradients(const at::Tensor& grad_output, const at::Tensor& input,
                                                         const at::Tensor& weight, const at::Tensor& mask,
                                                         const at::Tensor& values, bool of_input, bool of_weight,
                                                         at::IntArrayRef stride, at::IntArrayRef padding,
                                                         at::IntArrayRef dilation, bool transposed,
                                                         at::IntArrayRef output_padding, int64_t groups) {
  check_mask(weight, mask);
  check_same_kind("grad_output", grad_output, "weight", weight);
  const Geometry geometry{weight.sizes(), stride, padding, dilation, transposed, output_padding, groups};
  geometry.check(input.sizes(), grad_output.sizes());
  const Gradients gradients(geometry, mask);
  if (of_input && of_weight) return gradients.of_both(grad_output, input, weight, values);
  return {of_input ? gradients.of_input(grad_output, input, weight, values) : at::Tensor(),
          of_weight ? gradients.of_weight(grad_output, input, weight) : at::Tensor()};
}

std::tuple<std::string, std::string> explain_convolution(const at::Tensor& weight, const at::Tensor& mask,
                                                         at::IntArrayRef input_size, bool channels_last,
                                                         at::IntArrayRef stride, at::IntArrayRef padding,
                                                         at::IntArrayRef dilation, bool transposed,
                                                         at::IntArrayRef output_padding, int64_t groups) {
  check_mask(weight, mask);
  const Geometry geometry{weight.sizes(), stride, padding, dilation, transposed, output_padding, groups};
  geometry.check(input_size);
  if (weight.is_cuda()) {
    const char* compact = device::explain_compact_convolution(geometry, input_size, weight, mask);
    if (compact) return {path_name(Path::kCompact), compact};
    return device::explain_copy(weight, mask, "convolution");
  }
  if (const PatternPtr pattern = try_pattern_of(mask)) pattern->mark_reused();  // as explain_linear
  const ConvolutionPlan plan(Pass::kForward, geometry, input_size, channels_last, weight, try_pattern_of(mask));
  return {path_name(plan.path), plan.reason};
}

}  // namespace masked_ops
