// The packed convolution family: as packed.cpp, over a weight [O][C/g][kernel] that is flattened to a matrix.
#include <ATen/ops/empty.h>

#include "checks.h"
#include "compact_convolution.h"
#include "convolution_plan.h"
#include "device_convolution.h"
#include "device_linear.h"
#include "masking.h"
#include "ops.h"
#include "packed.h"

namespace masked_ops {
namespace {

// The columns of the weight as a matrix; throws unless the sizes can be those of one.
int64_t columns_of(at::IntArrayRef weight_size) {
  TORCH_CHECK(weight_size.size() >= 3, "weight_size must have at least 3 numbers, got ", weight_size);
  int64_t cols = 1, entries;
  for (const int64_t n : weight_size) TORCH_CHECK(n >= 0, "weight_size must not be negative, got ", weight_size);
  bool overflows = false;
  for (const int64_t n : weight_size.slice(1)) overflows |= __builtin_mul_overflow(cols, n, &cols);
  overflows |= __builtin_mul_overflow(cols, weight_size[0], &entries);
  TORCH_CHECK(!overflows, "weight_size must be that of a tensor, got ", weight_size);
  return cols;
}

struct PackedWeight {
  PatternPtr pattern;  // null on CUDA, where the weight is always unpacked
  at::IntArrayRef size;
  const at::Tensor& bits;
  int64_t cols;

  PackedWeight(const at::Tensor& bits, at::IntArrayRef size, int64_t nnz, const char* other_name,
               const at::Tensor& other)
      : size(size), bits(bits), cols(columns_of(size)) {
    check_bits(bits, size[0], cols, other_name, other);
    if (!bits.is_cuda()) pattern = checked_pattern(bits, cols, nnz);
  }
  at::Tensor dense(const at::Tensor& values) const {
    return (pattern ? expand(values, *pattern) : device::unpack_values(values, bits, cols)).view(size);
  }
  CompactConvolution compact(const Geometry& geometry) const {
    return {geometry, pattern, /*weight_channels_last=*/false};
  }
  at::MemoryFormat result_format(const at::Tensor& input, const std::optional<at::Tensor>& bias,
                                 const Geometry& geometry) const {
    return masked_ops::result_format(input, at::empty(size, input.options()), bias, geometry);
  }
  ConvolutionPlan plan(Pass pass, const Geometry& geometry, at::IntArrayRef input_size, bool channels_last,
                       const at::Tensor& values) const {
    return {pass, geometry, input_size, channels_last, values, pattern, /*have_values=*/true, /*packed=*/true};
  }
};

}  // namespace

at::Tensor packed_convolution(const at::Tensor& input, const at::Tensor& values, const at::Tensor& bits,
                              at::IntArrayRef weight_size, const std::optional<at::Tensor>& bias,
                              at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                              bool transposed, at::IntArrayRef output_padding, int64_t groups) {
  check_values(values);
  const PackedWeight weight(bits, weight_size, values.numel(), "weight_values", values);
  check_same_kind("input", input, "weight_values", values);
  if (bias && bias->defined()) check_same_kind("bias", *bias, "weight_values", values);
  const Geometry geometry{weight_size, stride, padding, dilation, transposed, output_padding, groups};
  geometry.check(input.sizes());
  if (input.is_cuda()) {
    if (const auto y = device::compact_packed_convolution(geometry, input, values, bits, bias)) return *y;
  }
  const bool channels_last = suggests_channels_last(input), has_bias = bias && bias->defined();
  const ConvolutionPlan plan = weight.plan(Pass::kForward, geometry, input.sizes(), channels_last, values);
  if (plan.path == Path::kCopy || (has_bias && !geometry.fits(*bias))) {
    return geometry.forward(input, weight.dense(values), bias);
  }
  const at::MemoryFormat format = weight.result_format(input, bias, geometry);
  if (plan.path == Path::kCompact) {
    const CompactConvolution compact = weight.compact(geometry);
    return compact.forward(input, compact.left_of_values(values), bias, format);
  }
  return plan.forward(input, values.contiguous(), has_bias ? bias->contiguous() : at::Tensor(), format);
}

at::Tensor packed_convolution_grad_input(const at::Tensor& grad_output, const at::Tensor& values,
                                         const at::Tensor& bits, at::IntArrayRef weight_size,
                                         at::IntArrayRef input_size, at::IntArrayRef stride, at::IntArrayRef padding,
                                         at::IntArrayRef dilation, bool transposed, at::IntArrayRef output_padding,
                                         int64_t groups) {
  check_values(values);
  const PackedWeight weight(bits, weight_size, values.numel(), "weight_values", values);
  check_same_kind("grad_output", grad_output, "weight_values", values);
  const Geometry geometry{weight_size, stride, padding, dilation, transposed, output_padding, groups};
  geometry.check(input_size, grad_output.sizes());
  const at::Tensor input = Geometry::placeholder(input_size, grad_output);
  if (values.is_cuda()) {
    const auto dx = device::compact_packed_convolution_grad_input(geometry, grad_output, input, values, bits);
    if (dx) return *dx;
  }
  const bool channels_last = suggests_channels_last(grad_output);
  const ConvolutionPlan plan = weight.plan(Pass::kGradInput, geometry, input_size, channels_last, values);
  if (plan.path == Path::kCopy) return geometry.grad_input(grad_output, weight.dense(values), input);
  const at::MemoryFormat format = weight.result_format(input, std::nullopt, geometry);
  if (plan.path == Path::kCompact) {
    const CompactConvolution compact = weight.compact(geometry);
    return compact.grad_input(grad_output, compact.left_of_values(values), input_size, format);
  }
  return plan.grad_input(grad_output, values.contiguous(), input_size, format);
}

at::Tensor packed_convolution_grad_values(const at::Tensor& grad_output, const at::Tensor& input,
                                          const at::Tensor& bits, at::IntArrayRef weight_size, int64_t nnz,
                                          at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                                          bool transposed, at::IntArrayRef output_padding, int64_t groups) {
  const PackedWeight weight(bits, weight_size, nnz, "grad_output", grad_output);
  check_same_kind("input", input, "grad_output", grad_output);
  const Geometry geometry{weight_size, stride, padding, dilation, transposed, output_padding, groups};
  geometry.check(input.sizes(), grad_output.sizes());
  if (input.is_cuda()) {
    const auto dv = device::compact_packed_convolution_grad_values(geometry, grad_output, input, bits, nnz);
    if (dv) return *dv;
  }
  const ConvolutionPlan plan =
      weight.plan(Pass::kGradWeight, geometry, input.sizes(), suggests_channels_last(input), grad_output);
  if (plan.path == Path::kSparse) return plan.grad_values(grad_output, input);
  if (plan.path == Path::kCompact) {
    const CompactConvolution compact = weight.compact(geometry);
    return compact.values_of(compact.grad_weight(grad_output, input));
  }
  const at::Tensor like = at::empty(weight_size, grad_output.options());
  const at::Tensor dense = geometry.grad_weight(grad_output, input, like);
  return weight.pattern ? compress(dense, *weight.pattern) : device::pack_values(dense.flatten(1), bits, nnz);
}

std::tuple<std::string, std::string> explain_packed_convolution(const at::Tensor& values, const at::Tensor& bits,
                                                                at::IntArrayRef weight_size, at::IntArrayRef input_size,
                                                                bool channels_last, at::IntArrayRef stride,
                                                                at::IntArrayRef padding, at::IntArrayRef dilation,
                                                                bool transposed, at::IntArrayRef output_padding,
                                                                int64_t groups) {
  check_values(values);
  const PackedWeight weight(bits, weight_size, values.numel(), "weight_values", values);
  if (weight.pattern) weight.pattern->mark_reused();  // as explain_linear
  const Geometry geometry{weight_size, stride, padding, dilation, transposed, output_padding, groups};
  geometry.check(input_size);
  if (values.is_cuda()) {
    const char* compact = device::explain_compact_packed_convolution(geometry, input_size, values, bits);
    if (compact) return {path_name(Path::kCompact), compact};
  }
  const ConvolutionPlan plan = weight.plan(Pass::kForward, geometry, input_size, channels_last, values);
  return {path_name(plan.path), plan.reason};
}

}  // namespace masked_ops
