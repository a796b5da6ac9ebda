// Packs strips of images whose channels lie last: see packed_channel.h.
#pragma once

#include "lanes.h"
#include "packed_channel.h"

namespace masked_ops::cpu::MASKED_OPS_CAPABILITY {

// Packs from channels last: L lanes by L channels at a time.
template <typename T>
class PixelPacker {
 public:
  static constexpr int L = Vec::kLanes;

  static size_t bytes(const Strip&, const PackedChannel& packed) {
    return size_t(packed.vectors) * (L * sizeof(int64_t) + sizeof(Vector));
  }

  PixelPacker(const Strip& strip, const PackedChannel& packed, const Memory<const T>& source, void* memory)
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
          const T* const in = source_.data + c + r * stride_;
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
  void pack_vector(const T* in, const int64_t* offsets, int64_t channels, float* out) const {
    const Vec::Predicate some = Vec::first(channels);
    const int64_t step = packed_.channel;
    Vec tile[L];
    MASKED_OPS_UNROLL
    for (int i = 0; i < L; ++i) {
      if (kWhole) {
        tile[i] = load_floats(in + offsets[i]);
      } else {
        tile[i] = offsets[i] == kOutside ? Vec::zero() : load_floats(some, channels, in + offsets[i]);
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
  void pack_few(const T* in, const int64_t* offsets, int64_t channels, float* out) const {
    static constexpr T kZeros[4] = {};
    const int64_t step = packed_.channel;
    Vec tile[4];
    MASKED_OPS_UNROLL
    for (int i = 0; i < 4; ++i) {
      const T* places[L / 4];
      MASKED_OPS_UNROLL
      for (int q = 0; q < L / 4; ++q) {
        const int64_t offset = offsets[4 * q + i];
        places[q] = kWhole || offset != kOutside ? in + offset : kZeros;
      }
      tile[i] = load_quads(places, int(channels));
    }
    transpose_quads(tile);
    for (int i = 0; i < channels; ++i) tile[i].store(out + i * step);
  }

  const Memory<const T>& source_;
  const PackedChannel& packed_;
  const int64_t stride_;
  int64_t* offsets_;  // of each lane, those of banded strips for the first row
  Vector* vectors_;
};

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY
