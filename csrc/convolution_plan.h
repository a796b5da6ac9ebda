// What the masked and the packed convolutions share once their arguments are checked: the path, and the operations over
// a weight that is given by its remaining values.
#pragma once

#include "geometry.h"
#include "path.h"

namespace masked_ops {

// The layout in which the kernels of torch and ours are fast, whatever torch's choice of a backend makes of it.
inline bool prefers_channels_last(const at::Tensor& images, const at::Tensor& weight) {
  return suggests_channels_last(images) || suggests_channels_last(weight);
}

// The layout of torch's own result: that of the backend it would choose.
at::MemoryFormat result_format(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                               const Geometry& of);

struct ConvolutionPlan {
  const Geometry& of;
  PatternPtr pattern;  // null where there is none
  cpu::Convolution geometry = {};
  Path path;
  const char* reason;

  // `weight` has the dtype and the device of the weight: the weight, or, packed, its values.
  ConvolutionPlan(Pass pass, const Geometry& of, at::IntArrayRef input, bool channels_last, const at::Tensor& weight,
                  PatternPtr pattern, bool have_values = false, bool packed = false);

  // On the sparse path, in float32, bfloat16 and float16. values and bias (which may be undefined) are contiguous.
  at::Tensor forward(const at::Tensor& input, const at::Tensor& values, const at::Tensor& bias,
                     at::MemoryFormat format) const {
    return multiply(of.transposed, input, values, bias, of.output_sizes(input.sizes()), format);
  }
  at::Tensor grad_input(const at::Tensor& grad_output, const at::Tensor& values, at::IntArrayRef input_size,
                        at::MemoryFormat format) const {
    return multiply(!of.transposed, grad_output, values, at::Tensor(), input_size, format);
  }
  at::Tensor grad_values(const at::Tensor& grad_output, const at::Tensor& input) const;

 private:
  at::Tensor multiply(bool transposed, const at::Tensor& from, const at::Tensor& values, const at::Tensor& bias,
                      at::IntArrayRef sizes, at::MemoryFormat format) const;
};

}  // namespace masked_ops
