// Convolutions of one tap, where planes of pixels lie in memory as the sparse kernels take them: NCHW, of whole
// vectors.
//
// Nothing is packed and no sums are stored apart: a strip is a run of pixels of an image, the columns of its block of
// input are planes, and so are the rows of its sums. Neighbours lie a plane apart, which the hardware does not foresee:
// what the next block reads and the next strip writes is brought into L2 while one is multiplied (64 -> 256 channels of
// 56 x 56 at 90%: 1.0 ms without the latter, 0.63 with it).
#include "conv_geometry.h"
#include "conv_tasks.h"
#include "kernels.h"
#include "piece_list.h"

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
  int64_t of_group() const { return channels / groups; }
  // Of a strip's pixels in a group's first channel.
  int64_t offset(int64_t strip, int64_t group) const {
    return (strip / strips() * channels + group * of_group()) * pixels + strip % strips() * width();
  }
  // Adds a strip's pixels in so many channels, a piece each.
  void add_pieces(PieceList& list, const float* from, int64_t of_channels) const {
    static constexpr int64_t kOffset = 0;
    list.add(from, &kOffset, 1, pixels, of_channels);
  }
};

// body(block, its input, what is to be fetched meanwhile) for the blocks of a strip that have entries. Next is where
// the strip after it begins, null if there is none; there, the panels' rows of the product begin at next_product.
template <typename Body>
void for_blocks(const SparseIndex& index, const Planes& planes, const Planes& product, const float* x,
                const float* next, const float* next_product, Span panels, const Body& body) {
  PieceList pieces;
  const int64_t rows = rows_of(index, panels);
  for (int64_t block = 0; block < index.blocks; ++block) {
    const int64_t segments = segments_of(index, block, panels), after = (block + 1) * index.block_cols;
    if (segments == 0) continue;
    const bool more = after < planes.of_group();
    pieces.clear();
    if (more || next) {
      planes.add_pieces(pieces, more ? x + after * planes.pixels : next,
                        min(index.block_cols, planes.of_group() - (more ? after : 0)));
    }
    if (next_product) {  // a share of the rows with each block
      const int64_t first = rows * block / index.blocks, last = rows * (block + 1) / index.blocks;
      product.add_pieces(pieces, next_product + first * product.pixels, last - first);
    }
    const float* const of_block = x + block * index.block_cols * planes.pixels;
    body(block, of_block, pieces.over(segments));
  }
}

}  // namespace

bool planes_serve(const Convolution& c, int64_t nnz, Images<const float> from, Images<const float> to) {
  const auto aligned = [](const float* p) { return reinterpret_cast<uintptr_t>(p) % (L * sizeof(float)) == 0; };
  const int64_t pixels = c.input[0] * c.input[1] * c.input[2];
  return is_pointwise(c) && !planes_collide(c, double(nnz)) && !from.channels_last && !to.channels_last &&
         aligned(from.data) && aligned(to.data) && (pixels % (8 * L) == 0 || pixels % (7 * L) == 0);
}

void planes_spmm(const Team& team, const Convolution& c, const SparseIndex& index, const float* values,
                 const float* input, const float* bias, float* output) {
  const Planes from(c, index.transposed ? c.out_channels : c.in_channels);
  const Planes to(c, index.transposed ? c.in_channels : c.out_channels);
  const float* const ordered = in_order(team, index, values);
  const Starts starts(index, {0, index.blocks}, bias);
  const int64_t plane = to.pixels;
  const int64_t results = c.batch * to.channels * plane;
  const bool streams = index.blocks == 1 && results * int64_t{sizeof(float)} >= tuning::kStreamedBytes;
  const auto multiply = [&](int64_t strip, bool last, int64_t group, Span panels) {
    float* const y = output + to.offset(strip, 0);
    const auto y_of = [&](int64_t panel) { return y + index.row_of(panel) * plane; };
    for (int64_t panel = panels.first; panel < panels.last; ++panel) {
      starts.set_others(index, panel, to.vectors, plane, y_of(panel));
    }
    const float* const x = input + from.offset(strip, group);
    const float* const next = last ? nullptr : input + from.offset(strip + 1, group);
    const float* const next_y =
        last || streams ? nullptr : output + to.offset(strip + 1, 0) + index.row_of(panels.first) * plane;
    for_blocks(index, from, to, x, next, next_y, panels, [&](int64_t block, const float* of_block, Ahead ahead) {
      for (int64_t panel = panels.first; panel < panels.last; ++panel) {
        const int64_t tile = panel * index.blocks + block;
        multiply_planes(index, tile, to.vectors, values_of(index, ordered, tile), of_block, plane,
                        {y_of(panel), starts.of(index, panel, block), streams}, ahead);
        ahead.skip(segments_of(index, block, {panel, panel + 1}));
      }
    });
  };
  for_strips(team, c.batch * to.strips(), index.panels, [&](Span strips, Span all_panels) {
    for (int64_t s = strips.first; s < strips.last; ++s) {
      for_groups(index, all_panels,
                 [&](int64_t group, Span panels) { multiply(s, s + 1 == strips.last, group, panels); });
    }
    if (streams) end_streams();
  });
}

void planes_sddmm(const Team& team, const Convolution& c, const SparseIndex& index, const float* grad_output,
                  const float* input, float* grad_values) {
  const Planes from(c, c.in_channels), to(c, c.out_channels);
  const auto sample = [&](int64_t strip, bool first, bool last, int64_t group, Span panels, float* results) {
    const float* const dy = grad_output + to.offset(strip, 0);
    const float* const x = input + from.offset(strip, group);
    const float* const next = last ? nullptr : input + from.offset(strip + 1, group);
    const float* const next_dy =
        last ? nullptr : grad_output + to.offset(strip + 1, 0) + index.row_of(panels.first) * to.pixels;
    for_blocks(index, from, to, x, next, next_dy, panels, [&](int64_t block, const float* of_block, Ahead ahead) {
      for (int64_t panel = panels.first; panel < panels.last; ++panel) {
        sample_planes(index, panel * index.blocks + block, to.vectors, of_block, to.pixels,
                      dy + index.row_of(panel) * to.pixels, results + index.panel_values[panel], !first, ahead);
        ahead.skip(segments_of(index, block, {panel, panel + 1}));
      }
    });
  };
  add_up_strips(team, c.batch * to.strips(), index, grad_values, [&](Span strips, Span all_panels, float* results) {
    for (int64_t s = strips.first; s < strips.last; ++s) {
      for_groups(index, all_panels, [&](int64_t group, Span panels) {
        sample(s, s == strips.first, s + 1 == strips.last, group, panels, results);
      });
    }
  });
}

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY
