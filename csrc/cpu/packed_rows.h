// Rows of a packed weight whose values are expanded on their way into registers, in the few-row kernels of packed
// weights. A row is read a vector at a time, beyond its last value: what lies there is the next row.
#pragma once

#include "gemv.h"

namespace masked_ops::cpu::MASKED_OPS_CAPABILITY {

// The last rows, which have too little behind them, are read from a copy that has room.
template <typename T>
class PackedRows {
 public:
  explicit PackedRows(const PackedWeight& w) : w_(w), values_(static_cast<const T*>(w.values)), tail_(w.rows) {
    constexpr int64_t kRead = Operand<T>::kRead;
    const int64_t total = w.offsets[w.rows];
    while (tail_ > 0 && w.offsets[tail_] + kRead > total) --tail_;
    const int64_t first = w.offsets[tail_], count = total - first;
    T* const copy = static_cast<T*>(scratch(Slot::kExpanded, size_t(count + kRead) * sizeof(T)));
    if (count > 0) std::memcpy(copy, values_ + first, size_t(count) * sizeof(T));
    copy_ = copy;
  }

  // Where each of some rows has its first value from a column on.
  void begin(int64_t row, int64_t rows, int64_t column, const T** at) const {
    for (int64_t r = row; r < row + rows; ++r, ++at) {
      *at = r < tail_ ? values_ + w_.offsets[r] : copy_ + (w_.offsets[r] - w_.offsets[tail_]);
      if (column > 0) *at += rank(r, column);
    }
  }

 private:
  int64_t rank(int64_t row, int64_t column) const {
    const int64_t block = column / kRankColumns;
    const uint64_t* const words = w_.bits.row(row);
    int64_t bits = w_.ranks[row * ceil_div(w_.cols, kRankColumns) + block];
    for (int64_t i = block * (kRankColumns / 64); i < column / 64; ++i) bits += __builtin_popcountll(words[i]);
    if (column % 64 > 0) bits += __builtin_popcountll(words[column / 64] << (64 - column % 64));
    return bits;
  }

  const PackedWeight& w_;
  const T *values_, *copy_;
  int64_t tail_;
};

// Whether values are fetched ahead, as in gemv.h's Reading.
template <typename T>
bool fetches_far(const PackedWeight& w) {
  return w.offsets[w.rows] * int64_t{sizeof(T)} > tuning::kFarValuesBytes && fetches_into_l2();
}

// Bytes from a group's values to those of the next group, about: rows are taken to be equally long.
template <int kRows, typename T>
MASKED_OPS_INLINE int64_t bytes_of_group(const T* const* row) {
  const auto address = [&](int r) { return int64_t(reinterpret_cast<uintptr_t>(row[r])); };
  return kRows > 1 ? (address(kRows - 1) - address(0)) / max(kRows - 1, 1) * kRows : tuning::kFarAhead;
}

// Fetches what a row of the next group has where this one has a word of bits; few words have more than two lines.
template <typename T>
MASKED_OPS_INLINE void fetch_values(const T* row, int64_t ahead) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(row) + uintptr_t(ahead);
  prefetch_l2(reinterpret_cast<const void*>(at));
  prefetch_l2(reinterpret_cast<const void*>(at + 64));
}

// body(row, rows of each group, groups): `rows` rows from `first` on in groups of equal height, the rest by units.
template <typename Body>
void for_groups(int64_t first, int64_t rows, int64_t height, int64_t unit, const Body& body) {
  const int64_t groups = rows / height, rest = rows % height;
  if (groups > 0) body(first, height, groups);
  if (rest > 0) body(first + groups * height, unit, ceil_div(rest, unit));
}

// Columns of operands, whole words of bits.
template <typename T>
int64_t padded_columns(const PackedWeight& w) {
  return w.bits.stride * 64 / Operand<T>::kDepth;
}

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY
