#include "pointwise_convolution.h"

#include <ATen/ops/empty.h>

#include "memory.h"
#include "parallel.h"

namespace masked_ops {
namespace {

// [positions][channels]; a copy unless the images lie so.
at::Tensor positions_of(const at::Tensor& images) {
  return images.movedim(1, -1).contiguous().view({-1, images.size(1)});
}

}  // namespace

bool is_pointwise(const cpu::Convolution& c) {
  bool pointwise = c.groups == 1;
  for (int d = 0; d < 3; ++d) {
    pointwise = pointwise && c.kernel[d] == 1 && c.stride[d] == 1 && c.padding[d] == 0 && c.input[d] == c.output[d];
  }
  return pointwise;
}

bool PointwiseConvolution::by_planes(const at::Tensor& images, at::MemoryFormat format) {
  return format == at::MemoryFormat::Contiguous && images.scalar_type() == at::kFloat;
}

// With the weight, or its transpose.
at::Tensor PointwiseConvolution::multiply(bool transposed, const at::Tensor& images, const at::Tensor& weight,
                                          const at::Tensor& bias, at::MemoryFormat format) const {
  const int64_t M = rows(), N = pattern_.rows(), K = pattern_.cols(), channels = transposed ? K : N;
  at::DimVector sizes(images.sizes());
  sizes[1] = channels;
  const at::Tensor result = empty_result(sizes, images.options(), format), in_order = result.movedim(1, -1);
  if (by_planes(images, format)) {
    const at::Tensor from = images.contiguous(), w = weight.contiguous();
    const at::Tensor b = bias.defined() ? bias.contiguous() : bias;
    const auto kernel = transposed ? cpu::kernels().pointwise_grad_input : cpu::kernels().pointwise;
    kernel(team_for_product(M, N * K), geometry_.batch, positions(), N, K, from.const_data_ptr<float>(),
           w.const_data_ptr<float>(), pattern_.bits(), b.defined() ? b.const_data_ptr<float>() : nullptr,
           result.mutable_data_ptr<float>());
    return result;
  }
  const bool direct = in_order.is_contiguous();
  const at::Tensor y = direct ? in_order.view({M, channels}) : at::empty({M, channels}, images.options());
  const at::Tensor x = positions_of(images), w = weight.reshape({N, K}).contiguous();
  const cpu::Dtype dtype = dtype_of(weight.scalar_type());
  const cpu::Team team = team_for_product(M, N * K);
  if (transposed) {
    cpu::kernels().linear_grad_input(team, dtype, M, N, K, x.const_data_ptr(), w.const_data_ptr(), pattern_.bits(),
                                     y.mutable_data_ptr());
    if (bias.defined()) y.add_(bias);
  } else {
    const at::Tensor b = bias.defined() ? bias.contiguous() : bias;
    cpu::kernels().linear(team, dtype, M, N, K, x.const_data_ptr(), w.const_data_ptr(), pattern_.bits(),
                          b.defined() ? b.const_data_ptr() : nullptr, y.mutable_data_ptr());
  }
  if (!direct) in_order.copy_(y.view(in_order.sizes()));
  return result;
}

at::Tensor PointwiseConvolution::forward(const at::Tensor& input, const at::Tensor& weight,
                                         const std::optional<at::Tensor>& bias, at::MemoryFormat format) const {
  return multiply(of_.transposed, input, weight, bias ? *bias : at::Tensor(), format);
}

at::Tensor PointwiseConvolution::grad_input(const at::Tensor& grad_output, const at::Tensor& weight, at::IntArrayRef,
                                            at::MemoryFormat format) const {
  return multiply(!of_.transposed, grad_output, weight, at::Tensor(), format);
}

at::Tensor PointwiseConvolution::grad_weight(const at::Tensor& grad_output, const at::Tensor& input,
                                             at::MemoryFormat format) const {
  const int64_t M = rows(), N = pattern_.rows(), K = pattern_.cols();
  if (by_planes(input, format)) {
    const at::Tensor dy = (of_.transposed ? input : grad_output).contiguous();
    const at::Tensor x = (of_.transposed ? grad_output : input).contiguous();
    const at::Tensor grad_weight = at::empty(of_.weight, grad_output.options());
    cpu::kernels().pointwise_grad_weight(team_for_product(M, N * K), geometry_.batch, positions(), N, K,
                                         dy.const_data_ptr<float>(), x.const_data_ptr<float>(), pattern_.bits(),
                                         grad_weight.mutable_data_ptr<float>());
    return grad_weight;
  }
  const at::Tensor dy = positions_of(of_.transposed ? input : grad_output);
  const at::Tensor x = positions_of(of_.transposed ? grad_output : input);
  // Of one tap, all formats have the same order in memory.
  const at::Tensor grad_weight = at::empty(of_.weight, grad_output.options(), format);
  cpu::kernels().linear_grad_weight(team_for_product(M, N * K), dtype_of(grad_output.scalar_type()), M, N, K,
                                    dy.const_data_ptr(), x.const_data_ptr(), pattern_.bits(),
                                    grad_weight.mutable_data_ptr());
  return grad_weight;
}

}  // namespace masked_ops
