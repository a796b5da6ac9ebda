// A linear layer for a few rows of input, where a weight is used too seldom to be worth packing: the weight streams by
// as it lies, its bits the predicate of the load. One file for each of the three products.
//
// Forward and grad_input take it in chunks of columns, so narrow that the operands (elements.h) of all rows of input,
// or the sums of their gradients, stay in L1 while a block of rows passes; and in a chunk a few rows at a time, as many
// as leave room in registers for what they are multiplied with. What comes next in that order is fetched ahead between
// the multiplications, evenly: memory is the limit, and idle whenever nothing is asked of it.
#pragma once

#include <type_traits>

#include "elements.h"
#include "kernels.h"
#include "tuning.h"

namespace masked_ops::cpu::MASKED_OPS_CAPABILITY {

// Rows of input that are taken at once, and rows (of operands) of the weight beside them: so many registers for their
// products' sums, or factors.
struct RegisterTile {
  int rows, registers;

  constexpr int weights(int height) const { return min(registers / (height + 1), 4); }
  constexpr bool has_group(int height, int count) const {
    for (int other = 1; other <= rows; ++other) {
      if (weights(other) == count) return (height + 1) * count <= registers;
    }
    return count == 1;
  }
};

// Lanes whose bits are set, of which a masked load needs the signs alone; what is converted is masked by all bits.
template <typename T>
using Lanes = std::conditional_t<kConverts<T>, Vec::Predicate, Vec::Signs>;
template <typename T>
MASKED_OPS_INLINE Lanes<T> lanes_at(const uint64_t* row, int64_t k) {
  if constexpr (kConverts<T>) return Vec::predicate(row, k);
  if constexpr (!kConverts<T>) return Vec::signs(row, k);
}

// Tiles of equal height.
struct RowTiles {
  int64_t rows, count, height;
  RowTiles(int64_t M, int64_t most) : rows(M), count(ceil_div(M, most)), height(ceil_div(M, count)) {}
  int64_t begin(int64_t tile) const { return tile * height; }
  int64_t size(int64_t tile) const { return min(height, rows - tile * height); }
};

// Rows of floats beside the weight, cut into chunks of equal width: in each the tiles, in each
// [columns / lanes][row][lane].
struct Chunks {
  static constexpr int64_t kWordLanes = Vec::kLanes * Vec::kWordVectors;
  int64_t rows, columns, width;  // columns: whole words of bits

  // A multiple of so many chunks, about.
  Chunks(int64_t M, int64_t columns, int64_t widest, int64_t multiple = 1)
      : rows(M),
        columns(ceil_div(columns, kWordLanes) * kWordLanes),
        width(ceil_div(ceil_div(columns, ceil_div(columns, widest * multiple) * multiple), 64) * 64) {}
  int64_t count() const { return ceil_div(columns, width); }
  int64_t size() const { return rows * columns; }
  int64_t size(int64_t k) const { return min(width, columns - k); }
  float* at(float* first, int64_t k, int64_t row) const { return first + k * rows + row * size(k); }
};

// The way through an area of a weight: down a block of rows in a chunk of columns, then the next chunk, then the next
// block. A step takes up to `most` groups of `group` rows each, or, where a block has fewer rows left, of `unit` rows.
struct Walk {
  int64_t group, unit, most, block, width;
  int64_t top, end;     // rows, from this block's first on
  int64_t left, right;  // columns
  int64_t row = top, column = left;

  bool done() const { return top >= end; }
  int64_t rows_left() const { return min(top + block, end) - row; }
  int64_t group_rows() const { return rows_left() < group ? unit : group; }
  int64_t groups() const { return most == 1 ? 1 : min(most, max<int64_t>(rows_left() / group_rows(), 1)); }
  int64_t rows() const { return groups() * group_rows(); }
  void advance() {
    row += rows();
    if (row < min(top + block, end)) return;
    column += width;
    if (column >= right) {
      column = left;
      top += block;
    }
    row = top;
  }
};

// Whether a line is fetched with vector j of a word.
template <typename T>
constexpr bool fetches_with(int j) {
  return j % max(64 / (Vec::kLanes * Operand<T>::kDepth * int{sizeof(T)}), 1) == 0;
}

// The step of a walk whose columns are fetched, so many bytes ahead, while those of `from` are used.
inline Walk ahead_of(Walk from, int64_t ahead, int64_t bytes_of_step) {
  for (int64_t i = max<int64_t>(ahead / bytes_of_step, 1); i > 0 && !from.done(); --i) from.advance();
  return from;
}

// Groups of a step, of which each has so many bytes: short rows, many of them.
inline int64_t groups_of_step(int64_t bytes, int64_t step = tuning::kSmallStep) {
  return max<int64_t>(step / max<int64_t>(bytes, 1), 1);
}

// Columns, of operands, of a chunk of a single row of input.
template <typename T>
int64_t row_chunk(bool cached) {
  return cached ? tuning::kCachedRowBytes / (Operand<T>::kDepth * int64_t{sizeof(T)}) : tuning::kRowChunk;
}

// The most rows of input, of operands, of a weight of T that is far.
template <typename T>
constexpr int64_t far_rows(int64_t most) {
  return tuning::kFarPlain && !kIsFloat<T> ? 0 : most;
}

// A vector of a row of a weight that is read plainly.
template <typename T>
MASKED_OPS_INLINE Vec load_plain(Vec::Signs m, int64_t valid, const T* p) {
  return valid >= Vec::kLanes ? load_floats(p).select(m) : load_floats(m, valid, p);
}

// How a weight is read.
//
// Where the CPU wants it (fetches_into_l2), one that does not stay in L2 is fetched there well ahead (far), in the
// order of its groups, from as many pages at once as a group has rows. With AVX2 (kFarPlain) that is a single row of
// input over long rows of floats alone, and the hardware fetches them: vectors are loaded whole and masked afterwards.
//
// Elsewhere it is fetched into L1. A row or two of input leave time to spare: from memory, one row of the weight at a
// time, as the hardware expects it. With more rows of input the order is another, and prefetches are dropped where too
// many lines are on their way: loads are not, so a step waits for all of its lines at once before it multiplies with
// the first. From caches, several rows have shorter chains.
struct Reading {
  bool far, cached, by_row, waits;

  // The weight has so many bytes and its rows so many columns of operands; most_far and most_by_row rows of input.
  static Reading of(int64_t M, int64_t bytes, int64_t columns, int64_t most_far, int64_t most_by_row, bool waits) {
    const bool far = bytes > tuning::kFarBytes && columns >= tuning::kFarColumns && M <= most_far && fetches_into_l2();
    const bool cached = bytes <= tuning::kCachedBytes;
    const bool by_row = !far && !cached && (M == 1 || (M <= most_by_row && columns <= tuning::kRowChunk));
    return {far, cached, by_row, waits && !far && !cached && !by_row};
  }
  bool plain() const { return far && tuning::kFarPlain; }
  // Of operands, of which `depth` rows of the weight are one.
  int64_t group_rows(const RegisterTile& tile, const RowTiles& tiles, int64_t depth = 1) const {
    if (far && !cached && tiles.rows == 1) return tuning::kFarRows / depth;
    return by_row ? 1 : tile.weights(int(tiles.height));
  }
  // Columns of a chunk, of operands of so many elements of T along a row.
  template <typename T>
  int64_t chunk(const RowTiles& tiles, int64_t depth, int64_t otherwise) const {
    if (plain() || (tiles.rows == 1 && far && !cached)) return tuning::kFarRowBytes / (depth * int64_t{sizeof(T)});
    if (tiles.rows == 1) return row_chunk<T>(cached);
    if (by_row) return tuning::kRowChunk;
    if (!waits) return otherwise;
    return min(max(tuning::kWaitingFloats / tiles.rows, tuning::kLeastWaiting), tuning::kMostWaiting);
  }
  int64_t step() const { return waits ? tuning::kWaitingStep : tuning::kSmallStep; }
  int64_t ahead() const { return far ? tuning::kFarAhead : tuning::kSmallAhead; }
};

// Loads each line of some rows, and does nothing with it.
template <typename T>
MASKED_OPS_INLINE void wait_for(const T* first, int64_t ld, int64_t rows, int64_t columns) {
  constexpr int64_t kLine = 64 / sizeof(T), kLines = 8;
  const auto load = [](const T* p) __attribute__((always_inline)) {
    static_cast<void>(*reinterpret_cast<const volatile uint8_t*>(p));
  };
  for (int64_t r = 0; r < rows; ++r, first += ld) {
    int64_t k = 0;
    for (; k + (kLines - 1) * kLine < columns; k += kLines * kLine) {
      MASKED_OPS_UNROLL
      for (int i = 0; i < kLines; ++i) load(first + k + i * kLine);
    }
    for (; k < columns; k += kLine) load(first + k);
  }
}

// Fetches the bits of a step.
inline void fetch_bits(const Bits& bits, const Walk& step, int64_t columns) {
  for (int64_t r = step.row; r < step.row + step.rows(); ++r) {
    for (int64_t k = 0; k < columns; k += 512) prefetch(bits.row(r) + (step.column + k) / 64);
  }
}

// Waits for the bits and the weights of a step.
template <typename T>
MASKED_OPS_INLINE void wait_for(const Walk& step, const T* weight, int64_t K, const Bits& bits, int64_t columns) {
  const int64_t valid = min(columns, K - step.column);
  wait_for(bits.row(step.row) + step.column / 64, bits.stride, step.rows(), ceil_div(valid, 64));
  wait_for(weight + step.row * K + step.column, K, step.rows(), valid);
}

// The operands of the rows of input.
template <typename T>
void pack(const Chunks& chunks, const RowTiles& tiles, int64_t K, const T* input, float* x) {
  constexpr int kDepth = Operand<T>::kDepth, L = Vec::kLanes;
  for (int64_t k = 0; k < chunks.columns; k += chunks.width) {
    for (int64_t t = 0; t < tiles.count; ++t) {
      const int64_t first = tiles.begin(t), rows = tiles.size(t);
      for (int64_t m = 0; m < rows; ++m) {
        const T* const from = input + (first + m) * K;
        float* to = chunks.at(x, k, first) + m * L;
        for (int64_t at = k * kDepth, end = (k + chunks.size(k)) * kDepth; at < end; at += L * kDepth, to += rows * L) {
          Operand<T>::along(K - at, from + at).store(to);
        }
      }
    }
  }
}

// Of sums between registers and memory.
template <int N>
MASKED_OPS_INLINE void copy_vectors(const Vec* from, Vec* to) {
  MASKED_OPS_UNROLL
  for (int i = 0; i < N; ++i) to[i] = from[i];
}

// A matrix [M][columns] as operands (elements.h), [ceil(M / depth)][ld].
struct Operands {
  const float* at;
  int64_t ld;
};

inline Operands operands_of(Slot, const float* matrix, int64_t, int64_t columns) { return {matrix, columns}; }

template <typename T>
Operands operands_of(Slot slot, const T* matrix, int64_t M, int64_t columns) {
  constexpr int kDepth = Operand<T>::kDepth;
  const int64_t ld = ceil_div(columns, Vec::kLanes) * Vec::kLanes;
  float* const packed = static_cast<float*>(scratch(slot, size_t(ceil_div(M, kDepth) * ld) * sizeof(float)));
  for (int64_t m = 0; m < M; m += kDepth) {
    for (int64_t j = 0; j < columns; j += Vec::kLanes) {
      Vec::Predicate lanes[kDepth] = {};
      for (int d = 0; d < kDepth && m + d < M; ++d) lanes[d] = Vec::first(columns - j);
      Operand<T>::across(lanes, columns - j, matrix + m * columns + j, columns).store(packed + m / kDepth * ld + j);
    }
  }
  return {packed, ld};
}

// totals[i] = the sum of vector i's lanes; as many at a time as a vector has, where that is worth it.
template <int N>
MASKED_OPS_INLINE void sum_each(const Vec* sums, float* totals) {
  constexpr int L = Vec::kLanes, kLeast = L / 2;
  MASKED_OPS_UNROLL
  for (int i = 0; i < N; i += L) {
    if (N - i < kLeast) {
      MASKED_OPS_UNROLL
      for (int j = i; j < N; ++j) totals[j] = sums[j].sum();
      return;
    }
    const auto at = [&](int j) { return j < N ? sums[j] : Vec::zero(); };
    Vec quads[L / 4];
    MASKED_OPS_UNROLL
    for (int q = 0; q < L / 4; ++q) {
      const int j = i + 4 * q;
      quads[q] = j < N ? sum_quads(at(j), at(j + 1), at(j + 2), at(j + 3)) : Vec::zero();
    }
    sum_across_quads(quads).storeu(totals + i);
  }
}

// y[m][r] = the sum of the lanes of sum[m][r], and bias[r].
template <int M, int R, typename T>
MASKED_OPS_INLINE void store_dots(const Vec (&sum)[M][R], const T* bias, T* y, int64_t N) {
  constexpr int L = Vec::kLanes;
  float totals[ceil_div(M * R, L) * L];
  sum_each<M * R>(sum[0], totals);
  if (bias) {
    MASKED_OPS_UNROLL
    for (int i = 0; i < M * R; ++i) totals[i] += to_float(bias[i % R]);
  }
  MASKED_OPS_UNROLL
  for (int m = 0; m < M; ++m) {
    if constexpr (kIsFloat<T>) {
      std::memcpy(y + m * N, totals + m * R, R * sizeof(float));
      continue;
    }
    MASKED_OPS_UNROLL
    for (int r = 0; r < R; ++r) store_float(totals[m * R + r], y + m * N + r);
  }
}

// The kernel of M rows of input and groups of R rows of the weight. A Group holds its operands: take_group<M, R, kFar>,
// which stands beside it, is the product of one, and advance<M, R> goes to the next.
template <int M, int R, bool kFar, typename Group>
__attribute__((noinline)) void take_groups(const Group& first, int64_t groups) {
  Group group = first;  // which no store can change
  for (;;) {
    take_group<M, R, kFar>(group);
    if (--groups == 0) return;
    group.template advance<M, R>();
  }
}

// take_groups for each pair of heights that there is; far for up to Group::kMostFar rows of input.
template <typename Group, RegisterTile kTile>
struct KernelTable {
  using Function = void (*)(const Group& first, int64_t groups);
  static constexpr int kMost = max(4, tuning::kFarRows);
  Function at[2][kTile.rows][kMost] = {};

  constexpr KernelTable() { fill<kTile.rows, kMost>(); }
  template <int M, int R>
  constexpr void fill() {
    constexpr bool kNear = kTile.has_group(M, R), kFar = kNear || (M == 1 && R == tuning::kFarRows);
    if constexpr (kNear) at[false][M - 1][R - 1] = take_groups<M, R, false, Group>;
    if constexpr (kFar && M <= Group::kMostFar) at[true][M - 1][R - 1] = take_groups<M, R, true, Group>;
    if constexpr (R > 1) {
      fill<M, R - 1>();
    } else if constexpr (M > 1) {
      fill<M - 1, kMost>();
    }
  }
  Function operator()(bool far, int64_t rows, int64_t weights) const { return at[far][rows - 1][weights - 1]; }
};

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY
