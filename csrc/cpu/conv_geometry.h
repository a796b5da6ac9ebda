// Convolutions as the sparse kernels see them: a row of a matrix, whose columns are (channel, tap), times what the taps
// of a position read from the source.
//
// Forward is one phase: all positions of the output, all taps. The gradient with respect to the input is a gather, too:
// a position of the input is reached by those taps alone for which the stride divides (position + padding - tap *
// dilation). Positions that agree in that remainder are a phase; the columns of the transposed matrix are sorted by the
// phases' taps, each beginning a block, so that a phase multiplies with a range of blocks.
#pragma once

#include "api.h"
#include "simd.h"

namespace masked_ops::cpu::MASKED_OPS_CAPABILITY {

// Along one dimension, position i < count lies at to_first + i * to_step, and its tap t < taps reads the source at
// i * step + shift + t * shift_step, which is zero outside of [0, size).
struct Axis {
  int64_t count, taps;
  int64_t size, step, shift, shift_step;
  int64_t to_size, to_first, to_step;
  int64_t first_tap, tap_period;  // tap t is first_tap + t * tap_period of the kernel

  // Positions whose tap t lies in the source: [first, last).
  int64_t first(int64_t t) const { return clamp(ceiling(-at(t), step)); }
  int64_t last(int64_t t) const { return max(clamp(ceiling(size - at(t), step)), first(t)); }
  int64_t at(int64_t t) const { return shift + t * shift_step; }

 private:
  int64_t clamp(int64_t i) const { return min(max<int64_t>(i, 0), count); }
  static int64_t ceiling(int64_t a, int64_t b) { return a >= 0 ? (a + b - 1) / b : -(-a / b); }
};

MASKED_OPS_INLINE int64_t gcd(int64_t a, int64_t b) {
  while (b) {
    const int64_t rest = a % b;
    a = b;
    b = rest;
  }
  return a;
}

// How the columns of a phase, (channel, tap), are cut into blocks, and what number, a byte, each has in its block:
// where its vectors lie in the packed input.
//
// A block is of whole channels, if one fits. For strips whose vectors are rows (see strips.h), taps of the middle axis
// can share what is packed: those of a class, which read rows of the source that lie whole steps of positions apart.
// Then a number is (row that the tap reads, channel, slot: tap of the first axis, class, tap of the last), so that for
// all columns the next vector is one row, pitch numbers, further.
struct TapBlocks {
  static constexpr int64_t kNumbers = 256;
  static constexpr int64_t kLeastShared = 64;  // columns of a block below which sharing is not worth it

  int64_t taps[3];
  int64_t classes;     // of the taps of the middle axis; one if they do not share rows
  int64_t rows_apart;  // from a tap of a class to its next, in rows of positions; may be negative
  int64_t columns;     // of a block
  int64_t pitch = 0;   // 0 if taps do not share rows

  // Blocks of at most most_columns, or of one channel; the same for most_columns = columns.
  TapBlocks(int64_t of_d, int64_t of_h, int64_t of_w, int64_t of_classes, int64_t rows_apart, int64_t most_columns)
      : taps{of_d, of_h, of_w}, classes(1), rows_apart(rows_apart) {
    const int64_t all = of_d * of_h * of_w;
    if (all == 0) {
      columns = 1;
      return;
    }
    int64_t channels = all <= kNumbers ? max(most_columns / all, int64_t{1}) : 0;
    if (of_h > of_classes && rows_apart != 0) {
      classes = of_classes;
      const int64_t shared = kNumbers / (slots() * span());
      if (shared * all >= kLeastShared) {
        channels = min(channels, shared);
        pitch = channels * slots();
      } else {
        classes = 1;
      }
    }
    columns = channels > 0 ? channels * all : min(most_columns, kNumbers);
  }

  int64_t slots() const { return taps[0] * classes * taps[2]; }  // of a channel in a row
  int64_t of_class() const { return ceil_div(taps[1], classes); }
  int64_t span() const { return (of_class() - 1) * (rows_apart < 0 ? -rows_apart : rows_apart) + 1; }  // rows of all

  // Of a column, counted from the first of its block.
  int64_t number(int64_t column) const {
    if (pitch == 0) return column;
    const int64_t h = column / taps[2] % taps[1], tap = h / classes;
    const int64_t slot = (column / (taps[1] * taps[2]) * classes + h % classes) * taps[2] + column % taps[2];
    return (rows_apart < 0 ? tap - (of_class() - 1) : tap) * rows_apart * pitch + slot;
  }
  void number(uint8_t* of_columns, int64_t n) const {
    if (pitch == 0) return;
    uint8_t numbers[kNumbers];
    for (int64_t j = 0; j < columns; ++j) numbers[j] = uint8_t(number(j));
    for (int64_t i = 0; i < n; ++i) of_columns[i] = numbers[of_columns[i]];
  }
};

struct Phase {
  Axis axes[3];
  int64_t first_block = 0;

  TapBlocks blocks(int64_t most_columns) const {
    const Axis& h = axes[1];
    const int64_t shared = gcd(h.step, h.shift_step < 0 ? -h.shift_step : h.shift_step);
    return {axes[0].taps, h.taps, axes[2].taps, h.step / shared, h.shift_step / shared, most_columns};
  }
  int64_t positions() const { return axes[0].count * axes[1].count * axes[2].count; }
  int64_t taps() const { return axes[0].taps * axes[1].taps * axes[2].taps; }
};

// One tap, that of the position itself.
inline bool is_pointwise(const Convolution& c) {
  for (int d = 0; d < 3; ++d) {
    if (c.kernel[d] != 1 || c.stride[d] != 1 || c.padding[d] != 0) return false;
  }
  return true;
}

inline Axis forward_axis(const Convolution& c, int d) {
  return {c.output[d], c.kernel[d], c.input[d], c.stride[d], -c.padding[d], c.dilation[d], c.output[d], 0, 1, 0, 1};
}

// Taps that differ by a multiple of this reach the same positions.
inline int64_t tap_period(const Convolution& c, int d) { return c.stride[d] / gcd(c.stride[d], c.dilation[d]); }
inline int64_t tap_classes(const Convolution& c, int d) { return min(tap_period(c, d), c.kernel[d]); }
inline int64_t taps_of_class(const Convolution& c, int d, int64_t tap_class) {
  return ceil_div(c.kernel[d] - tap_class, tap_period(c, d));
}

// The axis of the positions first + i * stride of the input.
inline Axis backward_axis(const Convolution& c, int d, int64_t first) {
  const int64_t stride = c.stride[d], period = tap_period(c, d);
  Axis axis = {ceil_div(c.input[d] - first, stride), 0, c.output[d], 1, 0, 0, c.input[d], first, stride, 0, period};
  for (int64_t k = 0; k < tap_classes(c, d); ++k) {
    const int64_t distance = first + c.padding[d] - k * c.dilation[d];
    if (distance % stride) continue;
    axis.taps = taps_of_class(c, d, k);
    axis.shift = distance / stride;
    axis.shift_step = -(period * c.dilation[d] / stride);
    axis.first_tap = k;
  }
  return axis;
}

// Calls body(class of depth, of height, of width, its blocks, the first of them) in the order of the transposed
// matrix's columns; returns the number of blocks.
template <typename Body>
int64_t for_tap_classes(const Convolution& c, int64_t most_columns, const Body& body) {
  const int64_t rows_apart = -(tap_period(c, 1) * c.dilation[1] / c.stride[1]);
  int64_t block = 0;
  for (int64_t d = 0; d < tap_classes(c, 0); ++d) {
    for (int64_t h = 0; h < tap_classes(c, 1); ++h) {
      for (int64_t w = 0; w < tap_classes(c, 2); ++w) {
        const int64_t taps[3] = {taps_of_class(c, 0, d), taps_of_class(c, 1, h), taps_of_class(c, 2, w)};
        const TapBlocks blocks(taps[0], taps[1], taps[2], 1, rows_apart, most_columns);
        body(d, h, w, blocks, block);
        block += ceil_div(c.out_channels / c.groups * taps[0] * taps[1] * taps[2], blocks.columns);
      }
    }
  }
  return block;
}

// Calls body(phase) for each phase that has positions, those that no tap reaches included.
template <typename Body>
void for_phases(const Convolution& c, bool transposed, int64_t most_columns, const Body& body) {
  if (!transposed) {
    return body(Phase{{forward_axis(c, 0), forward_axis(c, 1), forward_axis(c, 2)}});
  }
  for (int64_t d = 0; d < min(c.stride[0], c.input[0]); ++d) {
    for (int64_t h = 0; h < min(c.stride[1], c.input[1]); ++h) {
      for (int64_t w = 0; w < min(c.stride[2], c.input[2]); ++w) {
        Phase phase = {{backward_axis(c, 0, d), backward_axis(c, 1, h), backward_axis(c, 2, w)}};
        if (phase.taps() > 0) {
          for_tap_classes(c, most_columns, [&](int64_t i, int64_t j, int64_t k, const TapBlocks&, int64_t block) {
            const Axis* const axes = phase.axes;
            if (axes[0].first_tap == i && axes[1].first_tap == j && axes[2].first_tap == k) phase.first_block = block;
          });
        }
        body(phase);
      }
    }
  }
}

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY
