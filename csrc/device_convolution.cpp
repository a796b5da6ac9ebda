#include "device_convolution.h"

#include <ATen/ops/empty.h>

#include "convolution_plan.h"
#include "device_compact.h"
#include "device_linear.h"
#include "masking.h"

namespace masked_ops::device {
namespace {

constexpr int64_t kChannels = 1;  // the dimension

// What torch refuses, or knows the shapes of.
bool trivial(const Geometry& geometry, at::IntArrayRef input) {
  const auto empty = [](at::IntArrayRef sizes) { return std::find(sizes.begin(), sizes.end(), 0) != sizes.end(); };
  return !geometry.consistent(input) || empty(input) || empty(geometry.weight) || empty(geometry.output_sizes(input));
}

// The plan of a masked convolution.
CompactPlan plan_of(Pass pass, const Geometry& geometry, at::IntArrayRef input, const at::Tensor& weight,
                    const at::Tensor& mask, bool wait) {
  const bool contiguous = weight.is_contiguous();
  const CompactCase of = CompactCase::convolution(pass, weight.scalar_type(), geometry, input, !contiguous);
  const char* why = any_kernel() ? obstacle(Kernel::kMaskCopy, weight.device()) : "no CUDA kernel is on";
  if (!why && capturing(weight.device())) why = "a graph is being captured, which has to read the mask itself";
  if (!why && geometry.groups > 1) why = "it has groups";
  const bool in_rows = contiguous || (suggests_channels_last(weight) && weight.is_non_overlapping_and_dense());
  if (!why && !in_rows) why = "the weight is neither contiguous nor channels last";
  at::Tensor in_order = mask;
  DevicePatternPtr pattern;
  if (!why && packable(mask.scalar_type())) {
    in_order = in_memory_order(weight, mask).second;
    pattern = device_pattern_of(in_order);
  }
  if (!why && !pattern) why = "the mask has no version, or a dtype of its own";
  if (!why && !(pattern->rows() == of.rows && pattern->cols() == of.order.others * of.order.taps)) {
    why = "the weight has sizes of one in an order of their own";
  }
  if (!why && !pattern->ready(in_order, /*kernels=*/true, wait)) why = "the mask is new";
  if (!why && !pattern->binary()) why = "the mask is soft";
  return {of, why, pattern, in_order, /*capture=*/false, wait};
}

std::optional<Compact> left_of(Pass pass, const Geometry& geometry, at::IntArrayRef input, const at::Tensor& weight,
                               const at::Tensor& mask) {
  if (compact_is_off() || trivial(geometry, input)) return {};
  return plan_of(pass, geometry, input, weight, mask, forced_path().has_value()).chosen("convolution", kChannels);
}

CompactPlan packed_plan_of(Pass pass, const Geometry& geometry, at::IntArrayRef input, at::ScalarType dtype,
                           const at::Tensor& bits, int64_t nnz) {
  CompactCase of = CompactCase::convolution(pass, dtype, geometry, input, /*weight_channels_last=*/false);
  of.packed = true;
  return plan_of_bits(of, geometry.groups > 1 ? "it has groups" : nullptr, bits, nnz);
}

std::optional<Compact> packed_left_of(Pass pass, const Geometry& geometry, at::IntArrayRef input, at::ScalarType dtype,
                                      const at::Tensor& bits, int64_t nnz) {
  if (compact_is_off() || trivial(geometry, input)) return {};
  return packed_plan_of(pass, geometry, input, dtype, bits, nnz).chosen("packed convolution", kChannels);
}

// The same convolution with a weight of another size.
Geometry with_weight(Geometry geometry, const at::Tensor& weight) {
  geometry.weight = weight.sizes();
  return geometry;
}

at::Tensor forward(const Compact& left, const Geometry& geometry, const at::Tensor& input, const at::Tensor& weight,
                   const std::optional<at::Tensor>& bias, at::MemoryFormat format) {
  const at::Tensor b = bias.value_or(at::Tensor()), left_bias = left.bias(b);
  const at::Tensor y = with_weight(geometry, weight)
                           .forward(left.input(input), weight, b.defined() ? std::optional(left_bias) : std::nullopt);
  return left.whole_output(y, b, format);
}

at::Tensor grad_input(const Compact& left, const Geometry& geometry, const at::Tensor& grad_output,
                      const at::Tensor& input, const at::Tensor& weight, at::MemoryFormat format) {
  at::DimVector sizes(input.sizes());
  sizes[kChannels] = geometry.transposed ? weight.size(0) : weight.size(1);
  const at::Tensor like = at::empty(sizes, input.options(), format);
  const at::Tensor dx = with_weight(geometry, weight).grad_input(left.output(grad_output), weight, like);
  return left.whole_input(dx, format);
}

at::Tensor grad_weight(const Compact& left, const Geometry& geometry, const at::Tensor& grad_output,
                       const at::Tensor& input, at::MemoryFormat format) {
  const at::Tensor dy = left.output(grad_output), x = left.input(input);
  at::DimVector sizes(geometry.weight);
  sizes[0] = (geometry.transposed ? x : dy).size(kChannels);
  sizes[1] = (geometry.transposed ? dy : x).size(kChannels);
  const at::Tensor like = at::empty(sizes, grad_output.options(), format);
  return with_weight(geometry, like).grad_weight(dy, x, like);
}

at::IntArrayRef kernel_of(const Geometry& geometry) { return geometry.weight.slice(2); }

}  // namespace

std::optional<at::Tensor> compact_convolution(const Geometry& geometry, const at::Tensor& input,
                                              const at::Tensor& weight, const at::Tensor& mask,
                                              const std::optional<at::Tensor>& bias) {
  if (bias && bias->defined() && !geometry.fits(*bias)) return {};
  const auto left = left_of(Pass::kForward, geometry, input.sizes(), weight, mask);
  if (!left) return {};
  return forward(*left, geometry, input, left->weight(weight), bias, result_format(input, weight, bias, geometry));
}

std::optional<at::Tensor> compact_convolution_grad_input(const Geometry& geometry, const at::Tensor& grad_output,
                                                         const at::Tensor& input, const at::Tensor& weight,
                                                         const at::Tensor& mask) {
  const auto left = left_of(Pass::kGradInput, geometry, input.sizes(), weight, mask);
  if (!left) return {};
  const at::MemoryFormat format = result_format(input, weight, std::nullopt, geometry);
  return grad_input(*left, geometry, grad_output, input, left->weight(weight), format);
}

std::optional<at::Tensor> compact_convolution_grad_weight(const Geometry& geometry, const at::Tensor& grad_output,
                                                          const at::Tensor& input, const at::Tensor& weight,
                                                          const at::Tensor& mask) {
  const auto left = left_of(Pass::kGradWeight, geometry, input.sizes(), weight, mask);
  if (!left) return {};
  const at::MemoryFormat format = result_format(input, weight, std::nullopt, geometry);
  const at::Tensor whole = at::empty(geometry.weight, grad_output.options(), format);
  left->whole_weight(grad_weight(*left, geometry, grad_output, input, format), whole);
  return whole;
}

const char* explain_compact_convolution(const Geometry& geometry, at::IntArrayRef input, const at::Tensor& weight,
                                        const at::Tensor& mask) {
  if (trivial(geometry, input)) return nullptr;
  const CompactPlan plan = plan_of(Pass::kForward, geometry, input, weight, mask, /*wait=*/true);
  return plan.chosen("convolution", kChannels) ? plan.option().reason : nullptr;
}

std::optional<at::Tensor> compact_packed_convolution(const Geometry& geometry, const at::Tensor& input,
                                                     const at::Tensor& values, const at::Tensor& bits,
                                                     const std::optional<at::Tensor>& bias) {
  if (bias && bias->defined() && !geometry.fits(*bias)) return {};
  const auto left = packed_left_of(Pass::kForward, geometry, input.sizes(), values.scalar_type(), bits, values.numel());
  if (!left) return {};
  const at::Tensor weight = at::empty(geometry.weight, input.options());  // of which the format is asked
  return forward(*left, geometry, input, left->weight_of_values(values, kernel_of(geometry)), bias,
                 result_format(input, weight, bias, geometry));
}

std::optional<at::Tensor> compact_packed_convolution_grad_input(const Geometry& geometry, const at::Tensor& grad_output,
                                                                const at::Tensor& input, const at::Tensor& values,
                                                                const at::Tensor& bits) {
  const auto left =
      packed_left_of(Pass::kGradInput, geometry, input.sizes(), values.scalar_type(), bits, values.numel());
  if (!left) return {};
  const at::Tensor weight = at::empty(geometry.weight, input.options());
  return grad_input(*left, geometry, grad_output, input, left->weight_of_values(values, kernel_of(geometry)),
                    result_format(input, weight, std::nullopt, geometry));
}

std::optional<at::Tensor> compact_packed_convolution_grad_values(const Geometry& geometry,
                                                                 const at::Tensor& grad_output, const at::Tensor& input,
                                                                 const at::Tensor& bits, int64_t nnz) {
  const auto left = packed_left_of(Pass::kGradWeight, geometry, input.sizes(), input.scalar_type(), bits, nnz);
  if (!left) return {};
  return grad_weight(*left, geometry, grad_output, input, at::MemoryFormat::Contiguous).contiguous().view({-1});
}

const char* explain_compact_packed_convolution(const Geometry& geometry, at::IntArrayRef input,
                                               const at::Tensor& values, const at::Tensor& bits) {
  if (trivial(geometry, input)) return nullptr;
  const CompactPlan plan = packed_plan_of(Pass::kForward, geometry, input, values.scalar_type(), bits, values.numel());
  return plan.chosen("packed convolution", kChannels) ? plan.option().reason : nullptr;
}

}  // namespace masked_ops::device
