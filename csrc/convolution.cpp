// The convolution family: checks, shapes, allocation and choice of path. No arithmetic.
#include <ATen/native/ConvUtils.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <limits>

#include "checks.h"
#include "masking.h"
#include "ops.h"
#include "parallel.h"
#include "path.h"

namespace masked_ops {
namespace {

// A tensor of which an operation reads the sizes and the memory format and nothing else.
at::Tensor placeholder(at::IntArrayRef sizes, const at::Tensor& like) {
  return at::empty(sizes, like.options(), like.suggest_memory_format());
}

// Torch's backends differ in what they check: some cut numbers to 32 bits, and the backward operations of some read
// past the end of a grad_output that is too small. So all of it is checked here.
struct Geometry {
  at::IntArrayRef weight, stride, padding, dilation;
  bool transposed;
  at::IntArrayRef output_padding;
  int64_t groups;

  void check(at::IntArrayRef input) const {
    TORCH_CHECK(weight.size() >= 3, "weight must have at least 3 dimensions, got shape ", weight);
    TORCH_CHECK(input.size() == weight.size(), "input must have the ", weight.size(),
                " dimensions of weight, got shape ", input);
    check_numbers("stride", stride, 1);
    check_numbers("padding", padding, 0);
    check_numbers("dilation", dilation, 1);
    check_numbers("output_padding", output_padding, 0);
    TORCH_CHECK(groups >= 1 && groups <= weight[0], "groups must be at least 1 and at most ", weight[0],
                ", the first size of weight, got ", groups);
    for (size_t d = 2; d < weight.size(); ++d) {
      TORCH_CHECK(weight[d] >= 1, "weight must have a kernel of at least 1 in every dimension, got shape ", weight);
      output_size(input, d);
    }
  }

  at::DimVector output_sizes(at::IntArrayRef input) const {
    at::DimVector output = {input[0], transposed ? weight[1] * groups : weight[0]};
    for (size_t d = 2; d < weight.size(); ++d) output.push_back(output_size(input, d));
    return output;
  }

  void check(at::IntArrayRef input, at::IntArrayRef grad_output) const {
    check(input);
    const at::DimVector output = output_sizes(input);
    const bool empty = std::find(input.begin(), input.end(), 0) != input.end();
    TORCH_CHECK(empty || grad_output == output, "grad_output must have the shape of the output, ",
                at::IntArrayRef(output), ", got ", grad_output);
  }

  // Whether channels and groups fit each other.
  bool consistent(at::IntArrayRef input) const {
    return weight[0] % groups == 0 && input[1] == (transposed ? weight[0] : weight[1] * groups);
  }
  bool fits(const at::Tensor& bias) const {
    return bias.dim() == 1 && bias.size(0) == (transposed ? weight[1] * groups : weight[0]);
  }

  // As the kernels see it, the transposed one as the gradient that it is. For up to three dimensions.
  cpu::Convolution for_kernels(at::IntArrayRef input) const {
    const at::DimVector output = output_sizes(input);
    const at::IntArrayRef from = transposed ? at::IntArrayRef(output) : input, to = transposed ? input : output;
    cpu::Convolution c = {from[0], groups, from[1], to[1], {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {}, {1, 1, 1}};
    for (size_t d = 2, i = 5 - weight.size(); d < weight.size(); ++d, ++i) {
      c.input[i] = from[d];
      c.output[i] = to[d];
      c.kernel[i] = weight[d];
      c.stride[i] = static_cast<int64_t>(nth(stride, d));
      c.padding[i] = static_cast<int64_t>(nth(padding, d));
      c.dilation[i] = static_cast<int64_t>(nth(dilation, d));
    }
    return c;
  }

 private:
  __extension__ typedef __int128 Wide;

  void check_numbers(const char* name, at::IntArrayRef numbers, int64_t least) const {
    constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
    TORCH_CHECK(numbers.size() == 1 || numbers.size() + 2 == weight.size(), name, " must be one integer or ",
                weight.size() - 2, " of them, got ", numbers);
    for (const int64_t n : numbers) {
      TORCH_CHECK(n >= least, name, " must be at least ", least, ", got ", numbers);
      TORCH_CHECK(n <= kMost, name, " must be at most ", kMost, ", got ", numbers);
    }
  }

  static Wide nth(at::IntArrayRef numbers, size_t d) { return numbers[numbers.size() == 1 ? 0 : d - 2]; }

  int64_t output_size(at::IntArrayRef input, size_t d) const {
    const Wide extent = nth(dilation, d) * (weight[d] - 1) + 1, padded = input[d] + 2 * nth(padding, d);
    if (!transposed) {
      TORCH_CHECK(padded >= extent, "input with its padding must not be smaller than the dilated kernel, got shape ",
                  input, ", padding ", padding, ", dilation ", dilation, " and a weight of shape ", weight);
      return static_cast<int64_t>((padded - extent) / nth(stride, d) + 1);
    }
    const Wide size = (input[d] - 1) * nth(stride, d) - 2 * nth(padding, d) + extent + nth(output_padding, d);
    TORCH_CHECK(size >= 0, "padding must not be larger than the output, got padding ", padding,
                " for an input of shape ", input, " and a weight of shape ", weight);
    TORCH_CHECK(size <= std::numeric_limits<int64_t>::max(), "stride, dilation or output_padding are too large");
    return static_cast<int64_t>(size);
  }
};

at::MemoryFormat channels_last_of(int64_t dim) {
  return dim == 5 ? at::MemoryFormat::ChannelsLast3d : at::MemoryFormat::ChannelsLast;
}

bool suggests_channels_last(const at::Tensor& t) {
  return (t.dim() == 4 || t.dim() == 5) && t.suggest_memory_format() == channels_last_of(t.dim());
}

// A tensor as images in one of the two layouts that the kernels know.
class ImagesOf {
 public:
  explicit ImagesOf(const at::Tensor& t) : channels_last_(suggests_channels_last(t)) {
    tensor_ = t.contiguous(channels_last_ ? channels_last_of(t.dim()) : at::MemoryFormat::Contiguous);
  }
  cpu::Images<const float> input() const { return {tensor_.const_data_ptr<float>(), channels_last_}; }

 private:
  bool channels_last_;
  at::Tensor tensor_;
};

// The layout in which the kernels of torch and ours are fast, whatever torch's choice of a backend makes of it.
bool prefers_channels_last(const at::Tensor& images, const at::Tensor& weight) {
  return suggests_channels_last(images) || suggests_channels_last(weight);
}

// The layout of torch's own result: that of the backend it would choose.
at::MemoryFormat result_format(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                               const Geometry& of) {
  if (input.dim() < 4) return at::MemoryFormat::Contiguous;
  const auto numbers = [](at::IntArrayRef values) { return c10::fromIntArrayRefSlow(values); };
  const auto backend = at::native::select_conv_backend(input, weight, bias, numbers(of.stride), numbers(of.padding),
                                                       numbers(of.dilation), of.transposed, numbers(of.output_padding),
                                                       of.groups, at::OptionalSymIntArrayRef());
  return at::native::_determine_backend_memory_format(input, weight, backend);
}

// What the three operations share once the arguments are checked.
struct Plan {
  cpu::Convolution geometry = {};
  PatternPtr pattern;
  Path path;
  const char* reason;

  Plan(Pass pass, const Geometry& of, at::IntArrayRef input, bool channels_last, const at::Tensor& weight,
       const at::Tensor& mask, bool have_values = false) {
    const bool known = of.weight.size() <= 5 && of.consistent(input);
    if (known) geometry = of.for_kernels(input);
    pattern = try_pattern_of(mask);
    const auto empty = [](at::IntArrayRef sizes) { return std::find(sizes.begin(), sizes.end(), 0) != sizes.end(); };
    // Torch refuses what does not fit in its own words, and knows the shapes of nothing.
    const bool trivial = !known || empty(input) || empty(of.output_sizes(input)) || empty(of.weight);
    const Pass seen = !of.transposed || pass == Pass::kGradWeight ? pass
                      : pass == Pass::kForward                    ? Pass::kGradInput
                                                                  : Pass::kForward;
    const Choice choice =
        choose_convolution(seen, known ? &geometry : nullptr, channels_last, weight, pattern.get(), have_values);
    path = trivial ? Path::kCopy : choice.path;
    reason = choice.reason;
  }

  // The product with the weight, or the weight transposed, whichever the pass means.
  at::Tensor multiply(bool transposed, const at::Tensor& from, const at::Tensor& values, const at::Tensor& bias,
                      at::IntArrayRef sizes, at::MemoryFormat format) const {
    at::Tensor to = at::empty(sizes, from.options(), format);
    const auto index = pattern->conv_index(geometry, transposed);
    const cpu::Images<float> images = {to.mutable_data_ptr<float>(), format != at::MemoryFormat::Contiguous};
    index->kernels().conv_spmm(team(), geometry, index->get(), values.const_data_ptr<float>(), ImagesOf(from).input(),
                               bias.defined() ? bias.const_data_ptr<float>() : nullptr, images);
    return to;
  }

  cpu::Team team() const {
    const int64_t positions = geometry.batch * geometry.output[0] * geometry.output[1] * geometry.output[2];
    return team_for(positions * std::max<int64_t>(pattern->nnz(), geometry.out_channels));
  }
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
  const Plan plan(Pass::kForward, geometry, input.sizes(), prefers_channels_last(input, weight), weight, mask);
  if (plan.path == Path::kCopy || (has_bias && !geometry.fits(*bias))) {
    return {at::convolution(input, masked_weight(weight, mask), bias, stride, padding, dilation, transposed,
                            output_padding, groups),
            at::Tensor()};
  }
  const at::Tensor values = compress(weight, *plan.pattern);
  return {plan.multiply(transposed, input, values, has_bias ? bias->contiguous() : at::Tensor(),
                        geometry.output_sizes(input.sizes()), result_format(input, weight, bias, geometry)),
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
  const Plan plan(Pass::kGradInput, geometry, input_size, prefers_channels_last(grad_output, weight), weight, mask,
                  values.defined());
  const at::Tensor input = placeholder(input_size, grad_output);
  if (plan.path == Path::kCopy) {
    return std::get<0>(at::convolution_backward(grad_output, input, masked_weight(weight, mask), std::nullopt, stride,
                                                padding, dilation, transposed, output_padding, groups,
                                                {true, false, false}));
  }
  return plan.multiply(!transposed, grad_output, values.defined() ? values : compress(weight, *plan.pattern),
                       at::Tensor(), input_size, result_format(input, weight, std::nullopt, geometry));
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
  const Plan plan(Pass::kGradWeight, geometry, input.sizes(), prefers_channels_last(input, weight), weight, mask);
  if (plan.path == Path::kCopy) {
    const at::Tensor grad_weight =
        std::get<1>(at::convolution_backward(grad_output, input, weight, std::nullopt, stride, padding, dilation,
                                             transposed, output_padding, groups, {false, true, false}));
    return masked_weight(grad_weight, mask);
  }
  const at::Tensor values = at::empty({plan.pattern->nnz()}, grad_output.options());
  const auto index = plan.pattern->conv_index(plan.geometry, /*transposed=*/false);
  const ImagesOf dy(transposed ? input : grad_output), x(transposed ? grad_output : input);
  index->kernels().conv_sddmm(plan.team(), plan.geometry, index->get(), dy.input(), x.input(),
                              values.mutable_data_ptr<float>());
  const auto format = result_format(input, weight, std::nullopt, geometry);
  const at::Tensor grad_weight = at::empty(mask.sizes(), grad_output.options(), format);
  if (grad_weight.is_contiguous()) {
    expand_into(grad_weight, values, *plan.pattern);
    return grad_weight;
  }
  const at::Tensor in_order = at::empty(mask.sizes(), grad_output.options());
  expand_into(in_order, values, *plan.pattern);
  return grad_weight.copy_(in_order);
}

std::tuple<std::string, std::string> explain_convolution(const at::Tensor& weight, const at::Tensor& mask,
                                                         at::IntArrayRef input_size, bool channels_last,
                                                         at::IntArrayRef stride, at::IntArrayRef padding,
                                                         at::IntArrayRef dilation, bool transposed,
                                                         at::IntArrayRef output_padding, int64_t groups) {
  check_mask(weight, mask);
  if (const PatternPtr pattern = try_pattern_of(mask)) pattern->mark_reused();  // as explain_linear
  const Geometry geometry{weight.sizes(), stride, padding, dilation, transposed, output_padding, groups};
  geometry.check(input_size);
  const Plan plan(Pass::kForward, geometry, input_size, channels_last, weight, mask);
  return {path_name(plan.path), plan.reason};
}

}  // namespace masked_ops
