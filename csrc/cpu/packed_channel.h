// What the taps of a strip read, as it is packed for the sparse kernels: [column][lanes].
#pragma once

#include "sparse_tiles.h"
#include "strips.h"

namespace masked_ops::cpu::MASKED_OPS_CAPABILITY {

// Where the vectors of a channel lie in what is packed of a strip: by the numbers of the taps (see TapBlocks).
//
// Dense strips: for each tap the strip's vectors. Banded strips: for each slot, a tap of the first axis, a class of the
// middle one's and a tap of the last, a vector, and that of the next row of positions one row further; taps of a class
// begin at different rows.
struct PackedChannel {
  static constexpr int L = Vec::kLanes;
  const TapBlocks& blocks;
  int strip_vectors;
  int64_t vectors;  // of banded strips, in a row
  int64_t rows;
  int64_t first_row, row_step, class_step;  // banded strips, in rows of the source: where the first row of the first
                                            // class lies from the strip's first position; from row to row; from class
                                            // to class
  int64_t row, channel;                     // floats from one to the next

  // Not sharing rows, a banded strip has one tap: a channel's rows follow each other.
  PackedChannel(const Phase& phase, const TapBlocks& blocks, const Cut& cut, int strip_vectors)
      : blocks(blocks),
        strip_vectors(cut.banded ? 1 : strip_vectors),
        rows(1),
        first_row(0),
        row_step(phase.axes[1].step),
        class_step(phase.axes[1].shift_step) {
    const bool shared = blocks.pitch > 0;
    row = (shared ? blocks.pitch : 1) * this->strip_vectors * L;
    if (cut.banded) {
      const Axis& h = phase.axes[1];
      rows = cut.vectors + blocks.span() - 1;
      first_row = min(h.at(0), h.at(h.taps - 1));
    }
    vectors = (cut.banded ? blocks.slots() : phase.taps()) * this->strip_vectors;
    channel = (shared ? blocks.slots() * this->strip_vectors : vectors * rows) * L;
  }

  // From a channel's first float to that of a vector in the first row.
  int64_t place(int64_t vector) const {
    const int64_t tap = vector / strip_vectors;
    return ((rows > 1 ? tap : blocks.number(tap)) * strip_vectors + vector % strip_vectors) * L;
  }
  // Of channels in a block.
  size_t bytes(int64_t channels) const {
    const int64_t of_rows = (rows > 1 ? rows : blocks.span()) * row;
    return size_t(blocks.pitch ? of_rows : channels * channel) * sizeof(float);
  }
};

// Calls body(vector, lane, count, offset) for the lanes of each vector of a packed channel that lie in the source,
// which follow each other at step() pixels from the offset on; of banded strips for the first row.
template <typename T, typename Body>
void for_runs(const Strip& strip, const PackedChannel& packed, const Memory<T>& source, const Body& body) {
  constexpr int L = Vec::kLanes;
  const auto& axes = strip.phase().axes;
  const int64_t taps_of_h = strip.banded() ? packed.blocks.classes : axes[1].taps;
  int64_t first_vector = 0;
  for (int64_t i = 0; i < axes[0].taps; ++i) {
    for (int64_t j = 0; j < taps_of_h; ++j) {
      for (int64_t k = 0; k < axes[2].taps; ++k) {
        const int64_t first = axes[2].first(k), last = axes[2].last(k);
        for (int64_t n = 0; n < strip.runs(); ++n) {
          const Strip::Row& row = strip.row(n);
          const int64_t d = row.d * axes[0].step + axes[0].at(i);
          const int64_t from_h = strip.banded() ? packed.first_row + j * packed.class_step : axes[1].at(j);
          const int64_t h = row.h * axes[1].step + from_h;
          const bool outside = !strip.banded() && (h < 0 || h >= axes[1].size);
          const int64_t end = min(last, row.w + row.count);
          if (d < 0 || d >= axes[0].size || outside) continue;
          for (int64_t w = max(first, row.w); w < end;) {
            const int64_t lane = row.lane + w - row.w, count = min(end - w, L - lane % L);
            const int64_t line = (d * axes[1].size + h) * axes[2].size;
            body(first_vector + lane / L, lane % L, count,
                 row.image * source.image + (line + w * axes[2].step + axes[2].at(k)) * source.pixel);
            w += count;
          }
        }
        first_vector += strip.banded() ? 1 : strip.vectors();
      }
    }
  }
}

// The rows of a vector of a banded strip's packed channels that lie in the source; of a dense strip, one.
struct SourceRows {
  int32_t first, last;

  SourceRows(const Strip& strip, const PackedChannel& packed, int64_t vector) : first(0), last(int32_t(packed.rows)) {
    if (!strip.banded()) return;
    const int64_t of_class = vector / packed.blocks.taps[2] % packed.blocks.classes, step = packed.row_step;
    const int64_t h = strip.row(0).h * step + packed.first_row + of_class * packed.class_step;
    const int64_t below = strip.phase().axes[1].size - h;  // rows from h to the end of the source
    first = int32_t(min(h < 0 ? ceil_div(-h, step) : 0, packed.rows));
    last = int32_t(max<int64_t>(min(below > 0 ? ceil_div(below, step) : 0, packed.rows), first));
  }
};

// From a row of a banded strip's packed channels to the next, in the source.
template <typename T>
int64_t row_stride(const Strip& strip, const PackedChannel& packed, const Memory<T>& source) {
  return strip.banded() ? packed.row_step * strip.phase().axes[2].size * source.pixel : 0;
}

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY
