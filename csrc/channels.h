// What a mask leaves of the channels of a convolution.
#pragma once

#include "pattern.h"

namespace masked_ops {

// What is left of a weight [rows][others / groups][kernel] without its pruned channels: those of its first dimension,
// and those of the other side (of an input, or, transposed, of an output). With more than one group only whole groups
// are left out, since those that stay must have as many channels each.
struct Channels {
  std::vector<int64_t> rows, others;            // that are left, ascending
  std::vector<int64_t> row_slots, other_slots;  // of all: the place among those that are left, or -1
  int64_t groups;                               // at least one
  PatternPtr pattern;                           // of what is left; null if nothing can be left out

  size_t bytes() const { return 16 * (row_slots.size() + other_slots.size()) + (pattern ? pattern->bytes() : 0); }
};

// In a row of the pattern, the `kernel` weights of a channel follow each other, or, channels_last, the channels of a
// weight do; groups are of whole rows.
Channels channels_of(const Pattern& pattern, int64_t kernel, int64_t groups, bool channels_last);

}  // namespace masked_ops
