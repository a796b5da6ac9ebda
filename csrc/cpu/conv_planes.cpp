// Convolutions of one tap, where planes of pixels lie in memory as the sparse kernels take them: NCHW, of whole
// vectors.
//
// Nothing is packed and no sums are stored apart: a strip is a run of pixels of an image, the columns of its block of
// input are planes, and so are the rows of its sums. What the kernels would wait for is that neighbouring columns lie a
// plane apart: the lines of the next block, or of the next strip, are brought into L2 while one is multiplied.
#include "conv_tasks.h"
#include "kernels.h"
#include "sparse_tiles.h"

namespace masked_ops::cpu::MASKED_OPS_CAPABILITY {
namespace {

constexpr int L = Vec::kLanes;

// The channels of one side's images, cut into strips of 7 or 8 vectors.
struct Planes {
  int64_t channels, groups, pixels;
  int vectors;

  Planes(const Convolution& c, int64_t channels)
      : channels(channels),
        groups(c.groups),
        pixels(c.input[0] * c.input[1] * c.input[2]),
        vectors(pixels % (8 * L) == 0 ? 8 : 7) {}

  int64_t width() const { return vectors * L; }
  int64_t strips() const { return pixels / width(); }  // of an image
  // Of a strip's pixels in a group's first channel.
  int64_t offset(int64_t strip, int64_t group) const {
    return (strip / strips() * channels + group * (channels / groups)) * pixels + strip % strips() * width();
  }
};

// body(block, its input, what is to be fetched meanwhile) for the blocks of a strip that have entries. Next is where
// the strip after it begins, null if there is none.
template <typename Body>
void for_blocks(const SparseIndex& index, const Planes& planes, const float* x, const float* next, Span panels,
                const Body& body) {
  static constexpr int64_t kOffsets[] = {0, 16, 32, 48, 64, 80, 96, 112};
  const int64_t channels = planes.channels / planes.groups, plane = planes.pixels;
  for (int64_t block = 0; block < index.blocks; ++block) {
    const int64_t segments = segments_of(index, block, panels), after = (block + 1) * index.block_cols;
    if (segments == 0) continue;
    const bool more = after < channels;
    const int64_t fetched = more || next ? min(index.block_cols, more ? channels - after : channels) : 0;
    Lines lines(more ? x + after * plane : next, kOffsets, ceil_div(planes.width(), Lines::kFloats), plane, fetched,
                segments);
    body(block, x + block * index.block_cols * plane, lines);
  }
}

}  // namespace

bool planes_serve(const Convolution& c, Images<const float> from, Images<const float> to) {
  for (int d = 0; d < 3; ++d) {
    if (c.kernel[d] != 1 || c.stride[d] != 1 || c.padding[d] != 0) return false;
  }
  const auto aligned = [](const float* p) { return reinterpret_cast<uintptr_t>(p) % (L * sizeof(float)) == 0; };
  const int64_t pixels = c.input[0] * c.input[1] * c.input[2];
  return !from.channels_last && !to.channels_last && aligned(from.data) && aligned(to.data) &&
         (pixels % (8 * L) == 0 || pixels % (7 * L) == 0);
}

void planes_spmm(const Team& team, const Convolution& c, const SparseIndex& index, const float* values,
                 const float* input, const float* bias, float* output) {
  const Planes from(c, index.transposed ? c.out_channels : c.in_channels);
  const Planes to(c, index.transposed ? c.in_channels : c.out_channels);
  const float* const ordered = in_order(team, index, values);
  const int64_t plane = to.pixels;
  const auto multiply = [&](int64_t strip, bool last, int64_t group, Span panels) {
    float* const y = output + to.offset(strip, 0);
    for (int64_t row = index.row_of(panels.first), end = row + rows_of(index, panels); row < end; ++row) {
      const Vec value = bias ? Vec::set1(bias[row]) : Vec::zero();
      for (int64_t j = 0; j < to.width(); j += L) value.store(y + row * plane + j);
    }
    const float* const x = input + from.offset(strip, group);
    const float* const next = last ? nullptr : input + from.offset(strip + 1, group);
    for_blocks(index, from, x, next, panels, [&](int64_t block, const float* of_block, Lines& lines) {
      for (int64_t panel = panels.first; panel < panels.last; ++panel) {
        const int64_t tile = panel * index.blocks + block;
        multiply_planes(index, tile, to.vectors, values_of(index, ordered, tile), of_block, plane,
                        y + index.row_of(panel) * plane, {of_block, &lines});
      }
    });
  };
  for_strips(team, c.batch * to.strips(), index.panels, [&](Span strips, Span all_panels) {
    for (int64_t s = strips.first; s < strips.last; ++s) {
      for_groups(index, all_panels,
                 [&](int64_t group, Span panels) { multiply(s, s + 1 == strips.last, group, panels); });
    }
  });
}

void planes_sddmm(const Team& team, const Convolution& c, const SparseIndex& index, const float* grad_output,
                  const float* input, float* grad_values) {
  const Planes from(c, c.in_channels), to(c, c.out_channels);
  add_up_strips(team, c.batch * to.strips(), index, grad_values, [&](Span strips, Span all_panels, float* results) {
    for (int64_t s = strips.first; s < strips.last; ++s) {
      const float* const dy = grad_output + to.offset(s, 0);
      for_groups(index, all_panels, [&](int64_t group, Span panels) {
        const float* const x = input + from.offset(s, group);
        const float* const next = s + 1 == strips.last ? nullptr : input + from.offset(s + 1, group);
        for_blocks(index, from, x, next, panels, [&](int64_t block, const float* of_block, Lines& lines) {
          for (int64_t panel = panels.first; panel < panels.last; ++panel) {
            sample_planes(index, panel * index.blocks + block, to.vectors, of_block, to.pixels,
                          dy + index.row_of(panel) * to.pixels, results + index.panel_values[panel], s > strips.first,
                          &lines);
          }
        });
      });
    }
  });
}

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY
