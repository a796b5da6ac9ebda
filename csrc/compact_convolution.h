// Convolutions without the channels that the mask leaves nothing of: the channels that are left are moved together,
// convolved by torch, and moved apart again.
#pragma once

#include "channels.h"
#include "geometry.h"

namespace masked_ops {

class CompactConvolution {
 public:
  // Of a weight that is channels_last or contiguous, and the pattern of the mask as a matrix in that order.
  CompactConvolution(const Geometry& whole, PatternPtr pattern, bool weight_channels_last);

  // The weight that is left, from a dense one and from its values; and the gradients of both from that of what is left.
  at::Tensor left_of(const at::Tensor& weight) const;
  at::Tensor left_of_values(const at::Tensor& values) const;
  at::Tensor whole_of(const at::Tensor& left) const;
  at::Tensor values_of(const at::Tensor& left) const;

  // Over the weight that is left; the result is in the format.
  at::Tensor forward(const at::Tensor& input, const at::Tensor& left, const std::optional<at::Tensor>& bias,
                     at::MemoryFormat format) const;
  at::Tensor grad_input(const at::Tensor& grad_output, const at::Tensor& left, at::IntArrayRef input_size,
                        at::MemoryFormat format) const;
  at::Tensor grad_weight(const at::Tensor& grad_output, const at::Tensor& input) const;

 private:
  Geometry geometry() const;  // of what is left
  bool rows_only() const { return channels_->pattern->cols() == pattern_->cols(); }
  at::Tensor empty_weight(at::IntArrayRef size, const at::TensorOptions& options) const;
  at::Tensor in_order(const at::Tensor& weight) const;
  void mask_rows(const at::Tensor& from, const std::vector<int64_t>& slots, const Pattern& mask,
                 const at::Tensor& to) const;
  const std::vector<int64_t>& inputs() const { return whole_.transposed ? channels_->rows : channels_->others; }
  const std::vector<int64_t>& outputs() const { return whole_.transposed ? channels_->others : channels_->rows; }

  const Geometry& whole_;
  PatternPtr pattern_;
  std::shared_ptr<const Channels> channels_;
  bool channels_last_;
  at::DimVector left_size_;
};

}  // namespace masked_ops
