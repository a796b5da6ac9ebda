#include "channels.h"

#include <algorithm>

namespace masked_ops {
namespace {

struct Sides {
  std::vector<bool> rows, others;  // which are left
};

Sides left_by_channel(const Pattern& pattern, int64_t others, const std::vector<int64_t>& other_of) {
  Sides left{std::vector<bool>(pattern.rows()), std::vector<bool>(others)};
  for (int64_t row = 0; row < pattern.rows(); ++row) left.rows[row] = pattern.any_in_rows(row, 1);
  const std::vector<uint64_t> any = pattern.live_col_bits();
  for (int64_t col = 0; col < pattern.cols(); ++col) {
    if (any[col / 64] >> (col % 64) & 1) left.others[other_of[col]] = true;
  }
  return left;
}

Sides left_by_group(const Pattern& pattern, int64_t others, int64_t groups) {
  const int64_t rows_of_group = pattern.rows() / groups;
  Sides left{std::vector<bool>(pattern.rows()), std::vector<bool>(others * groups)};
  for (int64_t group = 0; group < groups; ++group) {
    if (!pattern.any_in_rows(group * rows_of_group, rows_of_group)) continue;
    std::fill_n(left.rows.begin() + group * rows_of_group, rows_of_group, true);
    std::fill_n(left.others.begin() + group * others, others, true);
  }
  return left;
}

void number(const std::vector<bool>& left, std::vector<int64_t>& list, std::vector<int64_t>& slots) {
  for (size_t i = 0; i < left.size(); ++i) {
    slots.push_back(left[i] ? static_cast<int64_t>(list.size()) : -1);
    if (left[i]) list.push_back(static_cast<int64_t>(i));
  }
}

}  // namespace

Channels channels_of(const Pattern& pattern, int64_t kernel, int64_t groups, bool channels_last) {
  const int64_t others = pattern.cols() / kernel;
  std::vector<int64_t> other_of(pattern.cols());
  for (int64_t col = 0; col < pattern.cols(); ++col) other_of[col] = channels_last ? col % others : col / kernel;
  const Sides left = groups == 1 ? left_by_channel(pattern, others, other_of) : left_by_group(pattern, others, groups);
  Channels channels;
  number(left.rows, channels.rows, channels.row_slots);
  number(left.others, channels.others, channels.other_slots);
  channels.groups = std::max<int64_t>(static_cast<int64_t>(channels.rows.size()) * groups / pattern.rows(), 1);
  if (channels.rows.size() < left.rows.size() || channels.others.size() < left.others.size()) {
    std::vector<int64_t> cols;
    for (int64_t col = 0; col < pattern.cols(); ++col) {
      if (groups > 1 || left.others[other_of[col]]) cols.push_back(col);
    }
    channels.pattern = std::make_shared<const Pattern>(pattern, channels.rows, cols);
  }
  return channels;
}

}  // namespace masked_ops
