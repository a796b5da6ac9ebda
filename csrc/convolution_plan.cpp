#include "convolution_plan.h"

#include <ATen/native/ConvUtils.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <cmath>

#include "cpu/costs.h"
#include "masking.h"
#include "memory.h"
#include "parallel.h"

namespace masked_ops {
namespace {

// A tensor as images in one of the two layouts that the kernels know.
class ImagesOf {
 public:
  explicit ImagesOf(const at::Tensor& t) : channels_last_(suggests_channels_last(t)) {
    tensor_ = t.contiguous(channels_last_ ? channels_last_of(t.dim()) : at::MemoryFormat::Contiguous);
  }
  cpu::Images<const void> input() const { return {tensor_.const_data_ptr(), channels_last_}; }

 private:
  bool channels_last_;
  at::Tensor tensor_;
};

}  // namespace

at::MemoryFormat result_format(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                               const Geometry& of) {
  // Every backend for the CPU asks for this first; to find which one it is takes half a microsecond.
  if (input.dim() < 4 || !prefers_channels_last(input, weight)) return at::MemoryFormat::Contiguous;
  const auto numbers = [](at::IntArrayRef values) { return c10::fromIntArrayRefSlow(values); };
  const auto backend = at::native::select_conv_backend(input, weight, bias, numbers(of.stride), numbers(of.padding),
                                                       numbers(of.dilation), of.transposed, numbers(of.output_padding),
                                                       of.groups, at::OptionalSymIntArrayRef());
  return at::native::_determine_backend_memory_format(input, weight, backend);
}

ConvolutionPlan::ConvolutionPlan(Pass pass, const Geometry& of, at::IntArrayRef input, bool channels_last,
                                 const at::Tensor& weight, PatternPtr of_mask, bool have_values, bool packed)
    : of(of), pattern(std::move(of_mask)) {
  const bool known = of.weight.size() <= 5 && of.consistent(input);
  if (known) geometry = of.for_kernels(input);
  const auto empty = [](at::IntArrayRef sizes) { return std::find(sizes.begin(), sizes.end(), 0) != sizes.end(); };
  // Torch refuses what does not fit in its own words, and knows the shapes of nothing.
  const bool trivial = !known || empty(input) || empty(of.output_sizes(input)) || empty(of.weight);
  const Pass seen = !of.transposed || pass == Pass::kGradWeight ? pass
                    : pass == Pass::kForward                    ? Pass::kGradInput
                                                                : Pass::kForward;
  const Choice choice =
      choose_convolution(seen, known ? &geometry : nullptr, channels_last, weight, pattern.get(), have_values, packed);
  path = trivial ? Path::kCopy : choice.path;
  reason = choice.reason;
}

namespace {

cpu::Team team_of(const cpu::Convolution& c, const Pattern& pattern) {
  const int64_t positions = c.batch * c.output[0] * c.output[1] * c.output[2];
  return team_for(positions * std::max<int64_t>(pattern.nnz(), c.out_channels));
}

}  // namespace

at::Tensor ConvolutionPlan::multiply(bool transposed, const at::Tensor& from, const at::Tensor& values,
                                     const at::Tensor& bias, at::IntArrayRef sizes, at::MemoryFormat format) const {
  const at::Tensor to = empty_result(sizes, from.options(), format);
  const at::Tensor weights = values.to(at::kFloat), start = bias.defined() ? bias.to(at::kFloat) : bias;
  const auto index = pattern->conv_index(geometry, transposed);
  index->kernels().conv_spmm(team_of(geometry, *pattern), geometry, index->get(), dtype_of(from.scalar_type()),
                             weights.const_data_ptr<float>(), ImagesOf(from).input(),
                             start.defined() ? start.const_data_ptr<float>() : nullptr,
                             {to.mutable_data_ptr(), suggests_channels_last(to)});
  return to;
}

at::Tensor ConvolutionPlan::grad_values(const at::Tensor& grad_output, const at::Tensor& input) const {
  const ImagesOf dy(of.transposed ? input : grad_output), x(of.transposed ? grad_output : input);
  const at::Tensor values = at::empty({pattern->nnz()}, grad_output.options().dtype(at::kFloat));
  const auto index = pattern->conv_index(geometry, /*transposed=*/false);
  index->kernels().conv_sddmm(team_of(geometry, *pattern), geometry, index->get(), dtype_of(grad_output.scalar_type()),
                              dy.input(), x.input(), values.mutable_data_ptr<float>());
  // A vector that runs beyond the images multiplies zeros by what lies there of the input. If that is Inf or NaN, a
  // weight that never met it would be NaN: then torch computes all of it.
  if (std::isfinite(values.sum().item<float>())) return values.to(grad_output.scalar_type());
  const at::Tensor weight = at::empty(of.weight, grad_output.options());
  return compress(of.grad_weight(grad_output, input, weight), *pattern);
}

}  // namespace masked_ops
