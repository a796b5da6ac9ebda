// Convolutions in which every input channel is a group, by kernels that mask the few weights of a channel as they read
// them. With several outputs a group, images whose channels lie last are copied.
#pragma once

#include "geometry.h"
#include "pattern.h"

namespace masked_ops {

// Null if the kernels can serve the convolution; else why they cannot.
const char* depthwise_obstacle(const cpu::Convolution& c);

class DepthwiseConvolution {
 public:
  // `geometry` is that of the kernels, a transposed convolution the other way round.
  DepthwiseConvolution(const Geometry& of, const cpu::Convolution& geometry, const Pattern& pattern)
      : of_(of), geometry_(geometry), pattern_(pattern) {}

  // The weight has its pruned weights as they are. The results lie in the format that is named.
  at::Tensor forward(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                     at::MemoryFormat format) const;
  at::Tensor grad_input(const at::Tensor& grad_output, const at::Tensor& weight, at::IntArrayRef input_size,
                        at::MemoryFormat format) const;
  at::Tensor grad_weight(const at::Tensor& grad_output, const at::Tensor& input, at::MemoryFormat format) const;

 private:
  at::Tensor multiply(bool transposed, const at::Tensor& images, const at::Tensor& weight, const at::Tensor& bias,
                      at::IntArrayRef sizes, at::MemoryFormat format) const;
  at::MemoryFormat layout_for(at::MemoryFormat format) const;  // that of the kernels
  cpu::Team team() const;

  const Geometry& of_;
  const cpu::Convolution& geometry_;
  const Pattern& pattern_;
};

}  // namespace masked_ops
