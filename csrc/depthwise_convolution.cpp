#include "depthwise_convolution.h"

#include <ATen/ops/empty.h>

#include <cmath>

#include "masking.h"
#include "memory.h"
#include "parallel.h"

namespace masked_ops {
namespace {

constexpr const char* kOneTap =
    "it takes kernels of one tap, stride 1, no padding, one group; or a group for every input channel";
// Kernels copy as many rows of an image as a tile of results reads.
constexpr int64_t kMostReach = 64;

}  // namespace

const char* depthwise_obstacle(const cpu::Convolution& c) {
  if (c.groups != c.in_channels) return kOneTap;
  if (c.input[0] != 1 || c.output[0] != 1 || c.kernel[0] != 1 || c.stride[0] != 1 || c.padding[0] != 0) {
    return "it takes at most two dimensions with a group for every input channel";
  }
  for (int d = 1; d < 3; ++d) {
    if (c.stride[d] > cpu::kMaxDepthwiseStride) return "it takes strides up to 8 with a group for every input channel";
    if ((c.kernel[d] - 1) * c.dilation[d] > kMostReach) return "it takes kernels that reach over at most 64 positions";
  }
  return nullptr;
}

cpu::Team DepthwiseConvolution::team() const {
  const cpu::Convolution& c = geometry_;
  return team_for(c.batch * c.out_channels * c.output[1] * c.output[2] * c.kernel[1] * c.kernel[2]);
}

at::MemoryFormat DepthwiseConvolution::layout_for(at::MemoryFormat format) const {
  return geometry_.out_channels == geometry_.in_channels ? format : at::MemoryFormat::Contiguous;
}

// With the weight, or its transpose.
at::Tensor DepthwiseConvolution::multiply(bool transposed, const at::Tensor& images, const at::Tensor& weight,
                                          const at::Tensor& bias, at::IntArrayRef sizes,
                                          at::MemoryFormat format) const {
  const at::MemoryFormat layout = layout_for(format);
  const at::Tensor result = empty_result(sizes, images.options(), layout);
  const at::Tensor from = images.contiguous(layout), w = weight.contiguous();
  const at::Tensor b = bias.defined() ? bias.contiguous() : bias;
  const auto kernel = transposed ? cpu::kernels().depthwise_grad_input : cpu::kernels().depthwise;
  kernel(team(), geometry_, w.const_data_ptr<float>(), pattern_.bits(),
         {from.const_data_ptr<float>(), layout != at::MemoryFormat::Contiguous},
         b.defined() ? b.const_data_ptr<float>() : nullptr, result.mutable_data_ptr<float>());
  return result.contiguous(format);
}

at::Tensor DepthwiseConvolution::forward(const at::Tensor& input, const at::Tensor& weight,
                                         const std::optional<at::Tensor>& bias, at::MemoryFormat format) const {
  return multiply(of_.transposed, input, weight, bias ? *bias : at::Tensor(), of_.output_sizes(input.sizes()), format);
}

at::Tensor DepthwiseConvolution::grad_input(const at::Tensor& grad_output, const at::Tensor& weight,
                                            at::IntArrayRef input_size, at::MemoryFormat format) const {
  return multiply(!of_.transposed, grad_output, weight, at::Tensor(), input_size, format);
}

at::Tensor DepthwiseConvolution::grad_weight(const at::Tensor& grad_output, const at::Tensor& input,
                                             at::MemoryFormat format) const {
  const at::MemoryFormat layout = layout_for(format);
  const at::Tensor dy = (of_.transposed ? input : grad_output).contiguous(layout);
  const at::Tensor x = (of_.transposed ? grad_output : input).contiguous(layout);
  // Of one channel, all formats have the same order in memory.
  at::Tensor grad_weight = at::empty(of_.weight, grad_output.options(), format);
  cpu::kernels().depthwise_grad_weight(team(), geometry_, pattern_.bits(),
                                       {dy.const_data_ptr<float>(), layout != at::MemoryFormat::Contiguous},
                                       x.const_data_ptr<float>(), grad_weight.mutable_data_ptr<float>());
  // Padding is multiplied: if it meets an Inf, a weight that did not would be NaN. Then torch computes all of it.
  if (std::isfinite(grad_weight.sum().item<float>())) return grad_weight;
  expand_into(grad_weight, compress(of_.grad_weight(grad_output, input, grad_weight), pattern_), pattern_);
  return grad_weight;
}

}  // namespace masked_ops
