#include "compact_convolution.h"

#include <ATen/ops/empty.h>

#include <cstring>

#include "masking.h"
#include "memory.h"
#include "parallel.h"

namespace masked_ops {
namespace {

using Slots = std::vector<int64_t>;

at::MemoryFormat format_of(const at::Tensor& t) {
  return suggests_channels_last(t) ? channels_last_of(t.dim()) : at::MemoryFormat::Contiguous;
}

// images with channel c being channel slots[c] of theirs; where that is negative, fill[c], or zero.
at::Tensor select(const at::Tensor& images, const Slots& slots, const at::Tensor& fill, at::MemoryFormat format) {
  const at::Tensor from = images.contiguous(format), values = fill.defined() ? fill.contiguous() : fill;
  const auto channels = static_cast<int64_t>(slots.size());
  at::DimVector sizes(images.sizes());
  sizes[1] = channels;
  at::Tensor to = empty_result(sizes, images.options(), format);
  int64_t positions = 1;
  for (int64_t d = 2; d < images.dim(); ++d) positions *= images.size(d);
  const bool channels_last = format != at::MemoryFormat::Contiguous;
  const int64_t outer = images.size(0) * (channels_last ? positions : 1), inner = channels_last ? 1 : positions;
  cpu::kernels().select_channels(team_for(to.numel()), images.element_size(), outer, images.size(1), channels, inner,
                                 slots.data(), from.const_data_ptr(),
                                 values.defined() ? values.const_data_ptr() : nullptr, to.data_ptr());
  return to;
}

at::Tensor together(const at::Tensor& images, const Slots& left) {
  if (static_cast<int64_t>(left.size()) == images.size(1)) return images;
  return select(images, left, at::Tensor(), format_of(images));
}

at::Tensor apart(const at::Tensor& images, const Slots& slots, const at::Tensor& fill, at::MemoryFormat format) {
  if (static_cast<int64_t>(slots.size()) == images.size(1)) return images.contiguous(format);
  return select(images, slots, fill, format);
}

at::Tensor without_channels(const at::Tensor& like, at::IntArrayRef sizes) {
  at::DimVector none(sizes);
  none[1] = 0;
  return at::empty(none, like.options());
}

// body(row) for each row, in parallel.
template <typename Body>
void for_each_row(int64_t rows, int64_t cols, const Body& body) {
  constexpr int64_t kElements = 1 << 14;
  const int64_t grain = std::max<int64_t>(kElements / std::max<int64_t>(cols, 1), 1);
  team_for(rows * cols).for_each((rows + grain - 1) / grain, [&](int64_t task) {
    for (int64_t row = task * grain; row < std::min(rows, (task + 1) * grain); ++row) body(row);
  });
}

}  // namespace

CompactConvolution::CompactConvolution(const Geometry& whole, PatternPtr pattern, bool weight_channels_last)
    : whole_(whole), pattern_(std::move(pattern)), channels_last_(weight_channels_last), left_size_(whole.weight) {
  int64_t kernel = 1;
  for (const int64_t n : whole.weight.slice(2)) kernel *= n;
  channels_ = pattern_->channels(kernel, whole.groups, weight_channels_last);
  left_size_[0] = static_cast<int64_t>(channels_->rows.size());
  left_size_[1] = static_cast<int64_t>(channels_->others.size()) / channels_->groups;
}

Geometry CompactConvolution::geometry() const {
  Geometry geometry = whole_;
  geometry.weight = left_size_;
  geometry.groups = channels_->groups;
  return geometry;
}

at::Tensor CompactConvolution::empty_weight(at::IntArrayRef size, const at::TensorOptions& options) const {
  const auto dim = static_cast<int64_t>(size.size());
  return at::empty(size, options, channels_last_ ? channels_last_of(dim) : at::MemoryFormat::Contiguous);
}

// As the matrix that the pattern is of.
at::Tensor CompactConvolution::in_order(const at::Tensor& weight) const {
  return channels_last_ ? weight.contiguous(channels_last_of(weight.dim())).movedim(1, -1) : weight.contiguous();
}

// Row i of `to` is row slots[i] of `from` under the mask, or zero where that is negative.
void CompactConvolution::mask_rows(const at::Tensor& from, const Slots& slots, const Pattern& mask,
                                   const at::Tensor& to) const {
  const size_t element = from.element_size(), bytes = element * static_cast<size_t>(mask.cols());
  const char* const in = static_cast<const char*>(from.const_data_ptr());
  char* const out = static_cast<char*>(to.data_ptr());
  for_each_row(mask.rows(), mask.cols(), [&](int64_t i) {
    char* const row = out + static_cast<size_t>(i) * bytes;
    if (slots[i] < 0) {
      std::memset(row, 0, bytes);
    } else {
      cpu::kernels().mask_copy(team_for(0), element, in + static_cast<size_t>(slots[i]) * bytes,
                               {mask.bits().row(i), mask.bits().stride}, 1, mask.cols(), row);
    }
  });
}

at::Tensor CompactConvolution::left_of(const at::Tensor& weight) const {
  if (!rows_only()) return left_of_values(compress(in_order(weight), *pattern_));
  const at::Tensor left = empty_weight(left_size_, weight.options());
  mask_rows(in_order(weight), channels_->rows, *channels_->pattern, in_order(left));
  return left;
}

at::Tensor CompactConvolution::whole_of(const at::Tensor& left) const {
  const at::Tensor whole = empty_weight(whole_.weight, left.options());
  if (rows_only()) {
    mask_rows(in_order(left), channels_->row_slots, *pattern_, in_order(whole));
  } else {
    expand_into(in_order(whole), values_of(left), *pattern_);
  }
  return whole;
}

at::Tensor CompactConvolution::left_of_values(const at::Tensor& values) const {
  const at::Tensor left = empty_weight(left_size_, values.options());
  expand_into(in_order(left), values, *channels_->pattern);
  return left;
}

at::Tensor CompactConvolution::values_of(const at::Tensor& left) const {
  return compress(in_order(left), *channels_->pattern);
}

at::Tensor CompactConvolution::forward(const at::Tensor& input, const at::Tensor& left,
                                       const std::optional<at::Tensor>& bias, at::MemoryFormat format) const {
  const Slots& slots = whole_.transposed ? channels_->other_slots : channels_->row_slots;
  const at::Tensor fill = bias ? *bias : at::Tensor();
  if (channels_->rows.empty()) {
    return select(without_channels(input, whole_.output_sizes(input.sizes())), slots, fill, format);
  }
  std::optional<at::Tensor> left_bias;
  if (fill.defined()) left_bias = together(fill.unsqueeze(0), outputs()).squeeze(0);
  return apart(geometry().forward(together(input, inputs()), left, left_bias), slots, fill, format);
}

at::Tensor CompactConvolution::grad_input(const at::Tensor& grad_output, const at::Tensor& left,
                                          at::IntArrayRef input_size, at::MemoryFormat format) const {
  const Slots& slots = whole_.transposed ? channels_->row_slots : channels_->other_slots;
  if (channels_->rows.empty()) return select(without_channels(grad_output, input_size), slots, at::Tensor(), format);
  at::DimVector left_input(input_size);
  left_input[1] = static_cast<int64_t>(inputs().size());
  return apart(geometry().grad_input(together(grad_output, outputs()), left, left_input), slots, at::Tensor(), format);
}

at::Tensor CompactConvolution::grad_weight(const at::Tensor& grad_output, const at::Tensor& input) const {
  const at::Tensor like = empty_weight(left_size_, input.options());
  if (channels_->rows.empty()) return like;
  return geometry().grad_weight(together(grad_output, outputs()), together(input, inputs()), like);
}

}  // namespace masked_ops
