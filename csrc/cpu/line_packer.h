// Packs strips of contiguous images: see packed_channel.h.
//
// Where the lanes of each vector lie in the source is found once a strip and serves all channels.
#pragma once

#include "lanes.h"
#include "packed_channel.h"

namespace masked_ops::cpu::MASKED_OPS_CAPABILITY {

// Packs from NCHW. A vector is put together of as many loads as it has runs, for all channels in turn.
template <typename T>
class LinePacker {
 public:
  static constexpr int L = Vec::kLanes;

  static size_t bytes(const Strip& strip, const PackedChannel& packed) {
    const int64_t lanes = gather_overflows(strip) ? L : min<int64_t>(L, strip.runs());
    return size_t(packed.vectors) * (size_t(lanes) * sizeof(Piece) + 2 * sizeof(Vector));
  }

  LinePacker(const Strip& strip, const PackedChannel& packed, const Memory<const T>& source, void* memory)
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
    const T* const in = source_.data + first * source_.channel;
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
    uint32_t lanes;  // one bit each; with a step of two, of the 2 L elements that it passes
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
  void pack_channels(const T* in, int64_t channels, float* out) const {
    const int step = int(step_);
    const auto load = [=](Piece p, const T* x) __attribute__((always_inline)) {
      if constexpr (kStep == 1) return load_lanes(p.lanes, x + p.offset);
      if constexpr (kStep == 2) return load_even_lanes(p.lanes, x + p.offset);
      return gather_lanes(p.lanes, x + p.offset, step);
    };
    const int64_t ahead = ahead_;
    const auto fetch = [=](Piece p, const T* x) __attribute__((always_inline)) {
      if constexpr (kStep == 1) prefetch(x + p.offset + __builtin_ctz(p.lanes) + ahead);
    };
    for (int64_t c = 0; c < channels; ++c, in += source_.channel, out += packed_.channel) {
      clear(out);
      for_vectors(kWhole, [=, this](Vector v) __attribute__((always_inline)) {
        const int64_t offset = pieces_[v.first].offset;
        for_rows(v, in + offset, out, [=](const T* x) __attribute__((always_inline)) {
          prefetch(x + ahead);
          return load_floats(x);
        });
      });
      for_vectors(kOne, [=, this](Vector v) __attribute__((always_inline)) {
        const Piece p = pieces_[v.first];
        for_rows(v, in, out, [=](const T* x) __attribute__((always_inline)) {
          fetch(p, x);
          return load(p, x);
        });
      });
      for_vectors(kTwo, [=, this](Vector v) __attribute__((always_inline)) {
        const Piece p = pieces_[v.first], q = pieces_[v.first + 1];
        for_rows(v, in, out, [=](const T* x) __attribute__((always_inline)) {
          fetch(p, x);
          fetch(q, x);
          return load(p, x) + load(q, x);
        });
      });
      for_vectors(kMany, [=, this](Vector v) __attribute__((always_inline)) {
        const Piece* const pieces = pieces_ + v.first;
        for_rows(v, in, out, [=](const T* x) __attribute__((always_inline)) {
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
  MASKED_OPS_INLINE void for_rows(Vector v, const T* in, float* out, const Load& load) const {
    const int64_t stride = stride_, row = packed_.row, first = v.rows.first;
    const T* x = in + first * stride;
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

  const Memory<const T>& source_;
  const PackedChannel& packed_;
  const int64_t stride_;
  bool cut_ = false;  // some rows lie beyond the source
  Vector* vectors_;   // those of kind k from begin_[k] on
  Piece* pieces_;
  int64_t begin_[kKinds + 1] = {};
  int64_t step_, ahead_;
};

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY
