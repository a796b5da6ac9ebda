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

struct Phase {
  Axis axes[3];
  int64_t first_block = 0;

  int64_t positions() const { return axes[0].count * axes[1].count * axes[2].count; }
  int64_t taps() const { return axes[0].taps * axes[1].taps * axes[2].taps; }
};

MASKED_OPS_INLINE int64_t gcd(int64_t a, int64_t b) {
  while (b) {
    const int64_t rest = a % b;
    a = b;
    b = rest;
  }
  return a;
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

// Calls body(class of depth, of height, of width, first block) in the order of the transposed matrix's columns; returns
// the number of blocks.
template <typename Body>
int64_t for_tap_classes(const Convolution& c, int64_t block_cols, const Body& body) {
  int64_t block = 0;
  for (int64_t d = 0; d < tap_classes(c, 0); ++d) {
    for (int64_t h = 0; h < tap_classes(c, 1); ++h) {
      for (int64_t w = 0; w < tap_classes(c, 2); ++w) {
        body(d, h, w, block);
        const int64_t taps = taps_of_class(c, 0, d) * taps_of_class(c, 1, h) * taps_of_class(c, 2, w);
        block += ceil_div(c.out_channels / c.groups * taps, block_cols);
      }
    }
  }
  return block;
}

// Calls body(phase) for each phase that has positions, those that no tap reaches included.
template <typename Body>
void for_phases(const Convolution& c, bool transposed, int64_t block_cols, const Body& body) {
  if (!transposed) {
    return body(Phase{{forward_axis(c, 0), forward_axis(c, 1), forward_axis(c, 2)}});
  }
  for (int64_t d = 0; d < min(c.stride[0], c.input[0]); ++d) {
    for (int64_t h = 0; h < min(c.stride[1], c.input[1]); ++h) {
      for (int64_t w = 0; w < min(c.stride[2], c.input[2]); ++w) {
        Phase phase = {{backward_axis(c, 0, d), backward_axis(c, 1, h), backward_axis(c, 2, w)}};
        if (phase.taps() > 0) {
          for_tap_classes(c, block_cols, [&](int64_t i, int64_t j, int64_t k, int64_t block) {
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
