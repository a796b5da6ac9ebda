// Pieces of memory that the hardware would not foresee, to be brought into L2 while something else is computed.
#pragma once

#include "sparse_tiles.h"

namespace masked_ops::cpu::MASKED_OPS_CAPABILITY {

class PieceList {
 public:
  PieceList() : pieces_(static_cast<const float**>(scratch(Slot::kPieces, kMost * sizeof(float*)))) {}

  void clear() { count_ = 0; }
  // Those at the offsets from base, then a step further, and so on; what is too much is left out.
  template <typename T>
  void add(const T* base, const int64_t* offsets, int64_t count, int64_t step, int64_t repeats) {
    repeats = min(repeats, (kMost - count_) / max<int64_t>(count, 1));
    for (int64_t r = 0; r < repeats; ++r, base += step) {
      for (int64_t i = 0; i < count; ++i) pieces_[count_++] = reinterpret_cast<const float*>(base + offsets[i]);
    }
  }
  // All of them, spread over the segments.
  Ahead over(int64_t segments) const {
    return {nullptr, pieces_, segments > 0 ? ceil_div(count_ << Ahead::kFraction, segments) : 0};
  }

 private:
  static constexpr int64_t kMost = 4096;
  const float** pieces_;
  int64_t count_ = 0;
};

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY
