// Lines of memory that the hardware would not foresee, to be brought into L2 while something else is computed.
#pragma once

#include "sparse_tiles.h"

namespace masked_ops::cpu::MASKED_OPS_CAPABILITY {

class LineList {
 public:
  // For tiles that have at most so many segments together.
  explicit LineList(int64_t segments)
      : lines_(static_cast<const float**>(scratch(Slot::kLines, size_t(kMost + segments) * sizeof(float*)))) {}

  void clear() { count_ = 0; }
  // Those at the offsets from base, then a step further, and so on; what is too much is left out.
  void add(const float* base, const int64_t* offsets, int64_t count, int64_t step, int64_t repeats) {
    repeats = min(repeats, (kMost - count_) / max<int64_t>(count, 1));
    for (int64_t r = 0; r < repeats; ++r, base += step) {
      for (int64_t i = 0; i < count; ++i) lines_[count_++] = base + offsets[i];
    }
  }
  // All of them, spread over the segments; from is where each segment finds a line besides.
  Ahead over(int64_t segments, const float* from) {
    if (count_ == 0 || segments == 0) return {from};
    const int64_t due = ceil_div(count_, segments);
    while (count_ < segments * due) lines_[count_++] = from;
    return {from, lines_, due};
  }

 private:
  static constexpr int64_t kMost = 4096;
  const float** lines_;
  int64_t count_ = 0;
};

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY
