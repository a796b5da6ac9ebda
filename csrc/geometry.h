// What a convolution is besides its tensors: the numbers, checked against each other and against the shapes; and
// torch's own operations with them.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <limits>

#include "cpu/api.h"

namespace masked_ops {

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

  // Torch's own operations over a dense weight, with operands over which torch is right (geometry.cpp).
  at::Tensor forward(const at::Tensor& input, const at::Tensor& dense, const std::optional<at::Tensor>& bias) const;
  at::Tensor grad_input(const at::Tensor& grad_output, const at::Tensor& dense, at::IntArrayRef input_size) const {
    return grad_input(grad_output, dense, placeholder(input_size, grad_output));
  }
  at::Tensor grad_input(const at::Tensor& grad_output, const at::Tensor& dense, const at::Tensor& input) const {
    return std::get<0>(backward(grad_output, input, in_format(dense), true, false));
  }
  // In the memory format of `like`, a weight whose values are not read.
  at::Tensor grad_weight(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& like) const {
    return std::get<1>(backward(grad_output, input, like, false, true));
  }
  // Those with respect to the input and to the weight.
  std::tuple<at::Tensor, at::Tensor> gradients(const at::Tensor& grad_output, const at::Tensor& input,
                                               const at::Tensor& dense) const {
    return backward(grad_output, input, in_format(dense), true, true);
  }

  // Of one dimension, results are contiguous on every path: torch's would lie as a weight that is permuted does.
  static at::Tensor in_format(const at::Tensor& weight) { return weight.dim() == 3 ? weight.contiguous() : weight; }

  // A tensor of which an operation reads the sizes and the memory format and nothing else.
  static at::Tensor placeholder(at::IntArrayRef sizes, const at::Tensor& like) {
    return at::empty(sizes, like.options(), like.suggest_memory_format());
  }

 private:
  __extension__ typedef __int128 Wide;

  std::tuple<at::Tensor, at::Tensor> backward(const at::Tensor& grad_output, const at::Tensor& input,
                                              const at::Tensor& like, bool of_input, bool of_weight) const;
  bool wants_floats(at::IntArrayRef input, at::TensorList operands, bool of_weight) const;
  bool wants_unit_stride(at::TensorList operands) const;

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

inline at::MemoryFormat channels_last_of(int64_t dim) {
  return dim == 5 ? at::MemoryFormat::ChannelsLast3d : at::MemoryFormat::ChannelsLast;
}

inline bool suggests_channels_last(const at::Tensor& t) {
  return (t.dim() == 4 || t.dim() == 5) && t.suggest_memory_format() == channels_last_of(t.dim());
}

}  // namespace masked_ops
