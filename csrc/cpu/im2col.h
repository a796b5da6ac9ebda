// What the taps of a strip read, packed as [column][lanes] for the sparse kernels.
//
// Where the lanes of each vector lie in the source is found once a strip and serves all channels.
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
template <typename Body>
void for_runs(const Strip& strip, const PackedChannel& packed, const Memory<const float>& source, const Body& body) {
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
inline int64_t row_stride(const Strip& strip, const PackedChannel& packed, const Memory<const float>& source) {
  return strip.banded() ? packed.row_step * strip.phase().axes[2].size * source.pixel : 0;
}

// Packs from NCHW. A vector is put together of as many loads as it has runs, for all channels in turn.
class LinePacker {
 public:
  static constexpr int L = Vec::kLanes;

  static size_t bytes(const Strip& strip, const PackedChannel& packed) {
    const int64_t lanes = gather_overflows(strip) ? L : min<int64_t>(L, strip.runs());
    return size_t(packed.vectors) * (size_t(lanes) * sizeof(Piece) + 2 * sizeof(Vector));
  }

  LinePacker(const Strip& strip, const PackedChannel& packed, const Memory<const float>& source, void* memory)
      : source_(source),
        packed_(packed),
        stride_(row_stride(strip, packed, source)),
        vectors_(static_cast<Vector*>(memory)) {
    const bool each_lane = gather_overflows(strip);  // then a lane is a piece, and the step does not matter
    const int64_t vectors = packed.vectors, step = strip.step();
    Vector* const in_order = vectors_ + vectors;
    pieces_ = reinterpret_cast<Piece*>(in_order + vectors);
    step_ = each_lane ? 1 : step;
    ahead_ = ceil_div(tuning::kVectorsAhead, max<int64_t>(vectors * packed.rows, 1)) * source.channel;
    for (int64_t v = 0; v < vectors; ++v) {
      const SourceRows rows(strip, packed, v);
      in_order[v] = {int32_t(packed.place(v)), 0, 0, kNone, rows};
      cut_ |= rows.first > 0 || rows.last < packed.rows;
    }
    int32_t pieces = 0;
    for_runs(strip, packed, source, [&](int64_t vector, int64_t lane, int64_t count, int64_t offset) {
      Vector& v = in_order[vector];
      if (v.count == 0) v.first = pieces;
      for (int64_t i = 0; i < count; i += each_lane ? 1 : count) {
        uint32_t bits = ((1u << (each_lane ? 1 : count)) - 1) << (lane + i);
        if (step_ == 2) bits = spread(bits);
        const int64_t of_lane_0 = offset + i * step - (lane + i) * step_;
        if (v.count > 0 && pieces_[pieces - 1].offset == of_lane_0) {  // a row that follows the one before in memory
          pieces_[pieces - 1].lanes |= bits;
        } else {
          pieces_[pieces++] = {of_lane_0, bits};
          ++v.count;
        }
      }
      const bool whole = step_ == 1 && v.count == 1 && pieces_[v.first].lanes == (1u << L) - 1;
      v.kind = whole ? kWhole : Kind(min(v.count, int32_t{kMany}));
    });
    // By kind.
    int64_t of_kind[kKinds] = {};
    for (int64_t v = 0; v < vectors; ++v) ++of_kind[in_order[v].kind];
    for (int kind = 0; kind < kKinds; ++kind) begin_[kind + 1] = begin_[kind] + of_kind[kind];
    for (int64_t v = vectors; v-- > 0;) vectors_[begin_[in_order[v].kind] + --of_kind[in_order[v].kind]] = in_order[v];
  }

  const PackedChannel& packed() const { return packed_; }

  // Channels [first, last), one after the other.
  void pack(int64_t first, int64_t last, float* packed) const {
    const float* const in = source_.data + first * source_.channel;
    switch (step_) {
      case 1:
        return pack_channels<1>(in, last - first, packed);
      case 2:
        return pack_channels<2>(in, last - first, packed);
      default:
        return pack_channels<0>(in, last - first, packed);
    }
  }

 private:
  struct Piece {
    int64_t offset;  // of what lane 0 would read
    uint32_t lanes;  // one bit each; with a step of two, of the 2 L floats that it passes
  };
  enum Kind : int32_t { kNone, kOne, kTwo, kMany, kWhole, kKinds };  // by its number of pieces
  struct Vector {
    int32_t to, first, count;  // first and number of its pieces
    Kind kind;
    SourceRows rows;
  };

  // Bit i to bit 2 i.
  static uint32_t spread(uint32_t bits) {
    uint32_t result = 0;
    for (int i = 0; i < L; ++i) result |= (bits >> i & 1) << (2 * i);
    return result;
  }

  static bool gather_overflows(const Strip& strip) { return strip.step() > int64_t{1} << 26; }

  // kStep: 1, 2, or 0 for any.
  template <int kStep>
  void pack_channels(const float* in, int64_t channels, float* out) const {
    const int step = int(step_);
    const auto load = [=](Piece p, const float* x) __attribute__((always_inline)) {
      if constexpr (kStep == 1) return Vec::loadu(Vec::Predicate(p.lanes), x + p.offset);
      if constexpr (kStep == 2) return Vec::load_even(p.lanes, x + p.offset);
      return Vec::gather(Vec::Predicate(p.lanes), x + p.offset, step);
    };
    const int64_t ahead = ahead_;
    const auto fetch = [=](Piece p, const float* x) __attribute__((always_inline)) {
      if constexpr (kStep == 1) prefetch(x + p.offset + __builtin_ctz(p.lanes) + ahead);
    };
    for (int64_t c = 0; c < channels; ++c, in += source_.channel, out += packed_.channel) {
      clear(out);
      for_vectors(kWhole, [=, this](Vector v) __attribute__((always_inline)) {
        const int64_t offset = pieces_[v.first].offset;
        for_rows(v, in + offset, out, [=](const float* x) __attribute__((always_inline)) {
          prefetch(x + ahead);
          return Vec::loadu(x);
        });
      });
      for_vectors(kOne, [=, this](Vector v) __attribute__((always_inline)) {
        const Piece p = pieces_[v.first];
        for_rows(v, in, out, [=](const float* x) __attribute__((always_inline)) {
          fetch(p, x);
          return load(p, x);
        });
      });
      for_vectors(kTwo, [=, this](Vector v) __attribute__((always_inline)) {
        const Piece p = pieces_[v.first], q = pieces_[v.first + 1];
        for_rows(v, in, out, [=](const float* x) __attribute__((always_inline)) {
          fetch(p, x);
          fetch(q, x);
          return load(p, x) + load(q, x);
        });
      });
      for_vectors(kMany, [=, this](Vector v) __attribute__((always_inline)) {
        const Piece* const pieces = pieces_ + v.first;
        for_rows(v, in, out, [=](const float* x) __attribute__((always_inline)) {
          Vec sum = load(pieces[0], x);
          for (int i = 1; i < v.count; ++i) sum = sum + load(pieces[i], x);
          return sum;
        });
      });
    }
  }

  template <typename Body>
  MASKED_OPS_INLINE void for_vectors(Kind kind, const Body& body) const {
    const int64_t last = begin_[kind + 1];
    for (int64_t v = begin_[kind]; v < last; ++v) body(vectors_[v]);
  }

  // A vector of all rows.
  template <typename Load>
  MASKED_OPS_INLINE void for_rows(Vector v, const float* in, float* out, const Load& load) const {
    const int64_t stride = stride_, row = packed_.row, first = v.rows.first;
    const float* x = in + first * stride;
    float* to = out + v.to + first * row;
    for (int64_t rows = v.rows.last - first; rows > 0; --rows, x += stride, to += row) load(x).store(to);
  }

  // What lies beyond the source: vectors that have no piece, and rows.
  void clear(float* out) const {
    for (int64_t v = 0; v < begin_[kNone + 1]; ++v) {
      for (int64_t r = 0; r < packed_.rows; ++r) Vec::zero().store(out + vectors_[v].to + r * packed_.row);
    }
    if (!cut_) return;
    for (int64_t v = begin_[kNone + 1]; v < begin_[kKinds]; ++v) {
      const SourceRows rows = vectors_[v].rows;
      for (int64_t r = 0; r < packed_.rows; ++r) {
        if (r < rows.first || r >= rows.last) Vec::zero().store(out + vectors_[v].to + r * packed_.row);
      }
    }
  }

  const Memory<const float>& source_;
  const PackedChannel& packed_;
  const int64_t stride_;
  bool cut_ = false;  // some rows lie beyond the source
  Vector* vectors_;   // those of kind k from begin_[k] on
  Piece* pieces_;
  int64_t begin_[kKinds + 1] = {};
  int64_t step_, ahead_;
};

// Packs from channels last: L lanes by L channels at a time.
class PixelPacker {
 public:
  static constexpr int L = Vec::kLanes;

  static size_t bytes(const Strip&, const PackedChannel& packed) {
    return size_t(packed.vectors) * (L * sizeof(int64_t) + sizeof(Vector));
  }

  PixelPacker(const Strip& strip, const PackedChannel& packed, const Memory<const float>& source, void* memory)
      : source_(source),
        packed_(packed),
        stride_(row_stride(strip, packed, source)),
        offsets_(static_cast<int64_t*>(memory)) {
    vectors_ = reinterpret_cast<Vector*>(offsets_ + packed.vectors * L);
    for (int64_t i = 0; i < packed.vectors * L; ++i) offsets_[i] = kOutside;
    for (int64_t v = 0; v < packed.vectors; ++v) vectors_[v] = {0, SourceRows(strip, packed, v)};
    for_runs(strip, packed, source, [&](int64_t vector, int64_t lane, int64_t count, int64_t offset) {
      int64_t* const to = offsets_ + vector * L + lane;
      for (int64_t i = 0; i < count; ++i) to[i] = offset + i * strip.step() * source.pixel;
      vectors_[vector].lanes += count;
    });
  }

  const PackedChannel& packed() const { return packed_; }

  void pack(int64_t first, int64_t last, float* packed) const {
    for (int64_t c = first; c < last; c += L, packed += L * packed_.channel) {
      const int64_t valid = min<int64_t>(L, last - c);
      for (int64_t v = 0; v < packed_.vectors; ++v) {
        const int64_t lanes = vectors_[v].lanes;
        const SourceRows rows = vectors_[v].rows;
        const bool few = valid <= 4, whole = lanes == L;
        const int64_t* const offsets = offsets_ + v * L;
        float* out = packed + packed_.place(v);
        for (int64_t r = 0; r < packed_.rows; ++r, out += packed_.row) {
          const float* const in = source_.data + c + r * stride_;
          if (lanes == 0 || r < rows.first || r >= rows.last) {
            for (int64_t i = 0; i < valid; ++i) Vec::zero().store(out + i * packed_.channel);
          } else if (few) {
            whole ? pack_few<true>(in, offsets, valid, out) : pack_few<false>(in, offsets, valid, out);
          } else {
            whole&& valid == L ? pack_vector<true>(in, offsets, L, out) : pack_vector<false>(in, offsets, valid, out);
          }
        }
      }
    }
  }

 private:
  static constexpr int64_t kOutside = INT64_MIN;
  struct Vector {
    int64_t lanes;  // how many lie in the source
    SourceRows rows;
  };

  // kWhole: all lanes lie in the source, and there are as many channels.
  template <bool kWhole>
  void pack_vector(const float* in, const int64_t* offsets, int64_t channels, float* out) const {
    const Vec::Predicate some = Vec::first(channels);
    const int64_t step = packed_.channel;
    Vec tile[L];
    MASKED_OPS_UNROLL
    for (int i = 0; i < L; ++i) {
      if (kWhole) {
        tile[i] = Vec::loadu(in + offsets[i]);
      } else {
        tile[i] = offsets[i] == kOutside ? Vec::zero() : Vec::loadu(some, in + offsets[i]);
      }
    }
    transpose(tile);
    if (kWhole || channels == L) {
      MASKED_OPS_UNROLL
      for (int i = 0; i < L; ++i) tile[i].store(out + i * step);
    } else {
      for (int i = 0; i < channels; ++i) tile[i].store(out + i * step);
    }
  }

  // The same for up to four channels; kWhole: all lanes lie in the source.
  template <bool kWhole>
  void pack_few(const float* in, const int64_t* offsets, int64_t channels, float* out) const {
    alignas(16) static constexpr float kZeros[4] = {};
    const int64_t step = packed_.channel;
    Vec tile[4];
    MASKED_OPS_UNROLL
    for (int i = 0; i < 4; ++i) {
      const float* places[L / 4];
      MASKED_OPS_UNROLL
      for (int q = 0; q < L / 4; ++q) {
        const int64_t offset = offsets[4 * q + i];
        places[q] = kWhole || offset != kOutside ? in + offset : kZeros;
      }
      tile[i] = Vec::quads(places, int(channels));
    }
    transpose_quads(tile);
    for (int i = 0; i < channels; ++i) tile[i].store(out + i * step);
  }

  const Memory<const float>& source_;
  const PackedChannel& packed_;
  const int64_t stride_;
  int64_t* offsets_;  // of each lane, those of banded strips for the first row
  Vector* vectors_;
};

// Calls body with the packer for the source, which keeps what it finds in the slot.
template <typename Body>
MASKED_OPS_INLINE void with_packer(const Cut& cut, const TapBlocks& blocks, const Strip& strip,
                                   const Memory<const float>& source, Slot slot, const Body& body) {
  const PackedChannel packed(strip.phase(), blocks, cut, strip.vectors());
  if (source.channels_last) {
    body(PixelPacker(strip, packed, source, scratch(slot, PixelPacker::bytes(strip, packed))));
  } else {
    body(LinePacker(strip, packed, source, scratch(slot, LinePacker::bytes(strip, packed))));
  }
}

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY
