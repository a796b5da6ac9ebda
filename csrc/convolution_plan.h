// What the masked and the packed convolutions share once their arguments are checked: the path, and the operations over
// a weight that is given by its remaining values.
#pragma once

#include "geometry.h"
#include "path.h"

namespace masked_ops {

// Torch's rule for the layout of a result, given the other operand's.
inline bool result_is_channels_last(const at::Tensor& images, const at::Tensor& weight) {
  return suggests_channels_last(images) || suggests_channels_last(weight);
}

struct ConvolutionPlan {
  const Geometry& of;
  PatternPtr pattern;  // null where there is none
  cpu::Convolution geometry = {};
  Path path;
  const char* reason;

  // `weight` has the dtype and the device of the weight: the weight, or, packed, its values.
  ConvolutionPlan(Pass pass, const Geometry& of, at::IntArrayRef input, bool channels_last, const at::Tensor& weight,
                  PatternPtr pattern, bool have_values = false, bool packed = false);

  // On the sparse path. values and bias (which may be undefined) are contiguous.
  at::Tensor forward(const at::Tensor& input, const at::Tensor& values, const at::Tensor& bias,
                     bool channels_last) const {
    return multiply(of.transposed, input, values, bias, of.output_sizes(input.sizes()), channels_last);
  }
  at::Tensor grad_input(const at::Tensor& grad_output, const at::Tensor& values, at::IntArrayRef input_size,
                        bool channels_last) const {
    return multiply(!of.transposed, grad_output, values, at::Tensor(), input_size, channels_last);
  }
  at::Tensor grad_values(const at::Tensor& grad_output, const at::Tensor& input) const;

 private:
  at::Tensor multiply(bool transposed, const at::Tensor& from, const at::Tensor& values, const at::Tensor& bias,
                      at::IntArrayRef sizes, bool channels_last) const;
  cpu::Team team() const;
};

}  // namespace masked_ops
