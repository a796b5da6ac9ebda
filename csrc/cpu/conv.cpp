// Sparse convolution: im2col strip by strip, then the tiles of spmm_tile.cpp and sddmm.cpp.
//
// A task takes a strip of positions through all blocks of columns; of each it packs the strip's input into L1 and
// multiplies all rows with it, whose sums, [row][lanes], stay in L2. Nothing that it keeps grows with the batch. Images
// of 16 bits become floats as they are packed, and sums are rounded as they are stored.
#include "conv_tasks.h"
#include "im2col.h"
#include "kernels.h"
#include "piece_list.h"

namespace masked_ops::cpu::MASKED_OPS_CAPABILITY {
namespace {

constexpr int L = Vec::kLanes;

// The columns of a phase.
struct Columns {
  TapBlocks blocks;
  int64_t channels;  // of a group
  int64_t taps, columns, first_block;

  Columns(const Convolution& c, const SparseIndex& index, const Phase& phase)
      : blocks(phase.blocks(index.block_cols)),
        channels((index.transposed ? c.out_channels : c.in_channels) / c.groups),
        taps(phase.taps()),
        columns(channels * taps),
        first_block(phase.first_block) {}

  int64_t count() const { return ceil_div(columns, blocks.columns); }
  int64_t widest() const { return min(columns, blocks.columns); }

  // body(block of the index, first and last of its columns counted from the phase's first).
  template <typename Body>
  void for_blocks(const Body& body) const {
    for (int64_t j = 0; j < columns; j += blocks.columns) {
      body(first_block + j / blocks.columns, j, min(columns, j + blocks.columns));
    }
  }

  // Packs the channels of a group that columns [begin, end) belong to.
  template <typename Packer>
  const float* pack(const Packer& packer, int64_t group, int64_t begin, int64_t end) const {
    const int64_t first = begin / taps, last = ceil_div(end, taps);
    const PackedChannel& packed = packer.packed();
    float* const x = static_cast<float*>(scratch(Slot::kPanelA, packed.bytes(last - first)));
    packer.pack(group * channels + first, group * channels + last, x);
    return x + (begin - first * taps) * (packed.channel / taps);
  }
};

// Adds the lines of a strip's pixels in some channels of images that it is stored to, or that lie like those.
template <typename T>
void add_lines(PieceList& list, const Strip& strip, const Memory<T>& in, int64_t channel, int64_t channels) {
  constexpr int64_t kElements = Ahead::kFloats * int64_t{sizeof(float) / sizeof(T)};  // of a line
  int64_t offsets[Strip::kMostLines];
  const int64_t count = strip.lines(in, offsets);
  const T* const base = in.data + channel * in.channel;
  if (in.channels_last) {
    list.add(base, offsets, count, kElements, ceil_div(channels + kElements - 1, kElements));
  } else {
    list.add(base, offsets, count, in.channel, channels);
  }
}

template <typename T>
struct Multiplication {
  const SparseIndex& index;
  const float* values;  // in order, if the index is transposed
  Memory<const T> from;
  Memory<T> to;
  bool fetches_input, fetches_output;  // ahead of their use; input only if a position reads the pixel that it is
  bool streams;                        // the output

  void run(const Cut& cut, const Columns& columns, const Starts& starts, Span strips, Span panels) const {
    for (int64_t s = strips.first; s < strips.last; ++s) {
      const Strip strip(cut, s), next(cut, min(s + 1, strips.last - 1));
      with_packer(cut, columns.blocks, strip, from, Slot::kPlaces,
                  [&](const auto& packer) { run(strip, next, packer, columns, starts, panels); });
    }
    if (streams) end_streams();
  }

 private:
  template <typename Packer>
  void run(const Strip& strip, const Strip& next, const Packer& packer, const Columns& columns, const Starts& starts,
           Span all_panels) const {
    for_groups(index, all_panels, [&](int64_t group, Span panels) {
      const int64_t row = index.row_of(panels.first), rows = rows_of(index, panels), width = strip.width();
      float* const c =
          static_cast<float*>(scratch(Slot::kAccumulator, size_t(ceil_div(rows, L) * L * width) * sizeof(float)));
      for (int64_t panel = panels.first; panel < panels.last; ++panel) {
        starts.set_others(index, panel, strip.vectors(), width, c + (index.row_of(panel) - row) * width);
      }
      PieceList lines;
      columns.for_blocks([&](int64_t block, int64_t begin, int64_t end) {
        const int64_t segments = segments_of(index, block, panels);
        if (segments == 0) return;
        const float* const x = columns.pack(packer, group, begin, end);
        lines.clear();
        const bool last = end == columns.columns;
        if (fetches_input) {
          const int64_t first = last ? 0 : end, left = columns.channels - first;
          add_lines(lines, last ? next : strip, from, group * columns.channels + first,
                    min(columns.blocks.columns, left));
        }
        if (fetches_output && last) add_lines(lines, strip, to, row, rows);
        Ahead ahead = lines.over(segments);
        for (int64_t panel = panels.first; panel < panels.last; ++panel) {
          const int64_t tile = panel * index.blocks + block;
          const float* const v = values_of(index, values, tile);
          const Target sums = {c + (index.row_of(panel) - row) * width, starts.of(index, panel, block)};
          if (strip.banded()) {
            multiply_banded(index, tile, strip.vectors(), v, x, packer.packed().row, sums, ahead);
          } else {
            multiply_tile(index, tile, strip.vectors(), v, x, sums, ahead);
          }
          ahead.skip(segments_of(index, block, {panel, panel + 1}));
        }
      });
      strip.store(c, row, rows, to, streams);
    });
  }
};

template <typename T>
struct Sampling {
  const SparseIndex& index;
  const Cut& cut;     // of the positions of the output
  const Cut& output;  // the same, each of which reads itself
  const TapBlocks& itself;
  const Columns& columns;
  Memory<const T> input, grad_output;

  // Sets the panels' results to what the strips give.
  void run(Span strips, Span all_panels, float* results) const {
    for (int64_t s = strips.first; s < strips.last; ++s) {
      const Strip x_strip(cut, s), dy_strip(output, s);
      with_packer(cut, columns.blocks, x_strip, input, Slot::kPlaces, [&](const auto& x_packer) {
        with_packer(output, itself, dy_strip, grad_output, Slot::kMorePlaces, [&](const auto& dy_packer) {
          for_groups(index, all_panels, [&](int64_t group, Span panels) {
            run_group(x_strip, x_packer, dy_packer, group, panels, results, s > strips.first);
          });
        });
      });
    }
  }

 private:
  template <typename XPacker, typename DyPacker>
  void run_group(const Strip& strip, const XPacker& x_packer, const DyPacker& dy_packer, int64_t group, Span panels,
                 float* results, bool accumulate) const {
    const int64_t row = index.row_of(panels.first), rows = rows_of(index, panels), width = strip.width();
    float* const dy = static_cast<float*>(scratch(Slot::kAccumulator, size_t(rows * width) * sizeof(float)));
    dy_packer.pack(row, row + rows, dy);
    columns.for_blocks([&](int64_t block, int64_t begin, int64_t end) {
      if (segments_of(index, block, panels) == 0) return;
      const float* const x = columns.pack(x_packer, group, begin, end);
      for (int64_t panel = panels.first; panel < panels.last; ++panel) {
        const int64_t tile = panel * index.blocks + block;
        const float* const dy_panel = dy + (index.row_of(panel) - row) * width;
        float* const to = results + index.panel_values[panel];
        if (strip.banded()) {
          sample_banded(index, tile, strip.vectors(), x, x_packer.packed().row, dy_panel, to, accumulate);
        } else {
          sample_tile(index, tile, strip.vectors(), x, dy_panel, to, accumulate);
        }
      }
    });
  }
};

Axis identity_axis(const Convolution& c, int d) {
  return {c.output[d], 1, c.output[d], 1, 0, 0, c.output[d], 0, 1, 0, 1};
}

template <typename T>
void multiply_images(const Team& team, const Convolution& c, const SparseIndex& index, const float* values,
                     Images<const T> input, const float* bias, Images<T> output) {
  if constexpr (kIsFloat<T>) {
    if (planes_serve(c, index.nnz, input, {output.data, output.channels_last})) {
      return planes_spmm(team, c, index, values, input.data, bias, output.data);
    }
  }
  const bool transposed = index.transposed;
  const Memory<const T> from(input, transposed ? c.out_channels : c.in_channels, transposed ? c.output : c.input);
  const Memory<T> to(output, transposed ? c.in_channels : c.out_channels, transposed ? c.input : c.output);
  // With one tap, memory is what limits if few weights meet an element.
  const bool pointwise = is_pointwise(c), few = index.nnz < tuning::kFewProducts * max(c.in_channels, c.out_channels);
  const bool streams = kIsFloat<T> && c.batch * to.image * int64_t{sizeof(T)} >= tuning::kStreamedStripBytes;
  const Multiplication<T> multiplication = {
      index,   in_order(team, index, values),          from,
      to,      pointwise && few && from.channels_last, !streams && (few || !pointwise),
      streams,
  };
  for_phases(c, transposed, index.block_cols, [&](const Phase& phase) {
    const Columns columns(c, index, phase);
    const bool narrow = columns.widest() > (few && pointwise ? tuning::kFewWideColumns : tuning::kMostWideColumns);
    const Cut cut(phase, columns.blocks, narrow, c.batch, team.threads);
    const Starts starts(index, {columns.first_block, columns.first_block + columns.count()}, bias);
    for_strips(team, cut.strips(), index.panels,
               [&](Span strips, Span panels) { multiplication.run(cut, columns, starts, strips, panels); });
  });
}

template <typename T>
void correlate_images(const Team& team, const Convolution& c, const SparseIndex& index, Images<const T> grad_output,
                      Images<const T> input, float* grad_values) {
  if constexpr (kIsFloat<T>) {
    if (planes_serve(c, index.nnz, input, grad_output)) {
      return planes_sddmm(team, c, index, grad_output.data, input.data, grad_values);
    }
  }
  const Phase output = {{identity_axis(c, 0), identity_axis(c, 1), identity_axis(c, 2)}};
  const Phase phase = {{forward_axis(c, 0), forward_axis(c, 1), forward_axis(c, 2)}};
  const Columns columns(c, index, phase);
  const Cut cut(phase, columns.blocks, columns.widest() > tuning::kMostWideColumns, c.batch, team.threads);
  Cut of_output = cut;
  of_output.phase = &output;
  const TapBlocks itself = output.blocks(1);
  const Sampling<T> sampling = {index,
                                cut,
                                of_output,
                                itself,
                                columns,
                                Memory<const T>(input, c.in_channels, c.input),
                                Memory<const T>(grad_output, c.out_channels, c.output)};

  add_up_strips(team, cut.strips(), index, grad_values,
                [&](Span strips, Span panels, float* results) { sampling.run(strips, panels, results); });
}

template <typename T>
Images<const T> images_of(Images<const void> images, T) {
  return {static_cast<const T*>(images.data), images.channels_last};
}

}  // namespace

void conv_spmm(const Team& team, const Convolution& c, const SparseIndex& index, Dtype dtype, const float* values,
               Images<const void> input, const float* bias, Images<void> output) {
  with_element(dtype, [&](auto element) {
    using T = decltype(element);
    multiply_images<T>(team, c, index, values, images_of(input, element), bias,
                       {static_cast<T*>(output.data), output.channels_last});
  });
}

void conv_sddmm(const Team& team, const Convolution& c, const SparseIndex& index, Dtype dtype,
                Images<const void> grad_output, Images<const void> input, float* grad_values) {
  with_element(dtype, [&](auto element) {
    using T = decltype(element);
    correlate_images<T>(team, c, index, images_of(grad_output, element), images_of(input, element), grad_values);
  });
}

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY
