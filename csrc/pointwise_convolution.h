// Convolutions of one tap that meets each position once: the products of a linear layer whose rows are the positions.
// On contiguous images in float32 their planes are multiplied as they lie; other images whose channels do not lie
// together are copied.
#pragma once

#include "geometry.h"
#include "pattern.h"

namespace masked_ops {

bool is_pointwise(const cpu::Convolution& c);

class PointwiseConvolution {
 public:
  // `geometry` is that of the kernels, a transposed convolution the other way round.
  PointwiseConvolution(const Geometry& of, const cpu::Convolution& geometry, const Pattern& pattern)
      : of_(of), geometry_(geometry), pattern_(pattern) {}

  // The weight has its pruned weights as they are. The results lie in the format that is named.
  at::Tensor forward(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                     at::MemoryFormat format) const;
  at::Tensor grad_input(const at::Tensor& grad_output, const at::Tensor& weight, at::IntArrayRef input_size,
                        at::MemoryFormat format) const;
  at::Tensor grad_weight(const at::Tensor& grad_output, const at::Tensor& input, at::MemoryFormat format) const;

 private:
  int64_t rows() const { return geometry_.batch * positions(); }
  int64_t positions() const { return geometry_.output[0] * geometry_.output[1] * geometry_.output[2]; }
  static bool by_planes(const at::Tensor& images, at::MemoryFormat format);
  at::Tensor multiply(bool transposed, const at::Tensor& images, const at::Tensor& weight, const at::Tensor& bias,
                      at::MemoryFormat format) const;

  const Geometry& of_;
  const cpu::Convolution& geometry_;
  const Pattern& pattern_;
};

}  // namespace masked_ops
