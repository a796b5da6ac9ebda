// Torch's own convolutions over a dense weight, and the operands over which they are right.
#include "geometry.h"

#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>

#include "convolution_plan.h"

namespace masked_ops {
namespace {

// Without elements, torch calls no kernel.
bool have_elements(at::TensorList tensors) {
  return std::all_of(tensors.begin(), tensors.end(), [](const at::Tensor& t) { return t.numel() > 0; });
}

// Whether some tap of the kernel meets nothing but padding, in one of the dimensions.
bool has_idle_taps(const cpu::Convolution& c) {
  for (int d = 0; d < 3; ++d) {
    if (c.padding[d] == 0) continue;  // then the first result meets all of them
    for (int64_t k = 0; k < c.kernel[d]; ++k) {
      const int64_t start = k * c.dilation[d] - c.padding[d];  // the position of the first result
      const int64_t result = start < 0 ? (-start + c.stride[d] - 1) / c.stride[d] : 0;
      if (result >= c.output[d] || start + result * c.stride[d] >= c.input[d]) return true;
    }
  }
  return false;
}

// In float32, with strides that no one takes for channels last, as contiguous() leaves them with a single channel.
at::Tensor plain_floats(const at::Tensor& t) {
  at::DimVector strides(t.sizes());
  int64_t stride = 1;
  for (int64_t d = t.dim(); d-- > 0; stride *= t.size(d)) strides[d] = stride;
  return t.to(at::kFloat).contiguous().as_strided(t.sizes(), strides);
}

at::Tensor rounded(const at::Tensor& t, at::MemoryFormat format) {
  return t.defined() ? at::empty(t.sizes(), t.options().dtype(at::kBFloat16), format).copy_(t) : t;
}

}  // namespace

// In bfloat16 oneDNN crashes or is wrong where taps are idle: in forward channels last (brg_conv_fwd:avx512_core_bf16),
// in the gradient of the weight in both layouts (jit_bf16:avx512_core_bf16). That gradient also reads memory that
// nobody wrote where the kernel is deeper than the images. In float32 it is right, contiguous: channels last it crashes
// too where no tap is of use.
bool Geometry::wants_floats(at::IntArrayRef input, at::TensorList operands, bool of_weight) const {
  if (operands[0].scalar_type() != at::kBFloat16 || !operands[0].is_cpu() || !have_elements(operands)) return false;
  if (weight.size() > 5 || !consistent(input)) return false;
  const cpu::Convolution c = for_kernels(input);
  const bool deeper = (c.kernel[0] - 1) * c.dilation[0] + 1 > c.input[0];
  return (of_weight && deeper) || has_idle_taps(c);
}

// In float32, channels last, with AVX2: for the gradient of the weight of one tap, oneDNN (jit_1x1:avx2) first copies
// the positions that the stride does not pass over, whole blocks of 8 channels of them, into a workspace that has room
// for the channels that there are. It has nothing to copy if it gets these positions alone.
bool Geometry::wants_unit_stride(at::TensorList operands) const {
  constexpr int64_t kBlock = 8;
  const auto all = [](at::IntArrayRef numbers, int64_t n) {
    return std::all_of(numbers.begin(), numbers.end(), [n](int64_t i) { return i == n; });
  };
  return groups == 1 && weight[1] < kBlock && weight.size() <= 5 && all(weight.slice(2), 1) && !all(stride, 1) &&
         all(padding, 0) && operands[0].scalar_type() == at::kFloat && operands[0].is_cpu() &&
         have_elements(operands) && std::any_of(operands.begin(), operands.end(), suggests_channels_last);
}

at::Tensor Geometry::forward(const at::Tensor& input, const at::Tensor& dense,
                             const std::optional<at::Tensor>& bias) const {
  const auto convolve = [&](const at::Tensor& x, const at::Tensor& w, const std::optional<at::Tensor>& b) {
    return at::convolution(x, w, b, stride, padding, dilation, transposed, output_padding, groups);
  };
  if (!wants_floats(input.sizes(), {input, dense}, /*of_weight=*/false)) return convolve(input, in_format(dense), bias);
  std::optional<at::Tensor> b = bias;
  if (b && b->defined()) b = b->to(at::kFloat);
  return rounded(convolve(plain_floats(input), plain_floats(dense), b), result_format(input, dense, bias, *this));
}

std::tuple<at::Tensor, at::Tensor> Geometry::backward(const at::Tensor& grad_output, const at::Tensor& input,
                                                      const at::Tensor& like, bool of_input, bool of_weight) const {
  const auto differentiate = [&](const at::Tensor& dy, const at::Tensor& x, const at::Tensor& w, at::IntArrayRef s,
                                 at::IntArrayRef more, bool dx, bool dw) {
    auto [grad_input, grad_weight, grad_bias] = at::convolution_backward(dy, x, w, std::nullopt, s, padding, dilation,
                                                                         transposed, more, groups, {dx, dw, false});
    return std::tuple(std::move(grad_input), std::move(grad_weight));
  };
  if (wants_floats(input.sizes(), {grad_output, input, like}, of_weight)) {
    const at::MemoryFormat format = result_format(input, like, std::nullopt, *this);
    const auto [grad_input, grad_weight] =
        differentiate(plain_floats(grad_output), plain_floats(input), plain_floats(like), stride, output_padding,
                      of_input, of_weight);
    return {rounded(grad_input, format), rounded(grad_weight, format)};
  }
  if (of_weight && wants_unit_stride({grad_output, input, like})) {
    at::Tensor images = transposed ? grad_output : input;
    const at::IntArrayRef results = (transposed ? input : grad_output).sizes();
    for (int64_t d = 2; d < images.dim(); ++d) {
      const auto step = static_cast<int64_t>(nth(stride, d));
      images = images.slice(d, 0, (results[d] - 1) * step + 1, step);
    }
    const at::DimVector ones(weight.size() - 2, 1), zeros(weight.size() - 2, 0);
    return {of_input ? std::get<0>(backward(grad_output, input, like, true, false)) : at::Tensor(),
            std::get<1>(differentiate(transposed ? images : grad_output, transposed ? input : images, like, ones, zeros,
                                      false, true))};
  }
  return differentiate(grad_output, input, like, stride, output_padding, of_input, of_weight);
}

}  // namespace masked_ops
