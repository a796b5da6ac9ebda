// Strips of positions: what their taps read, packed as [column][lanes] for the sparse kernels, and what they write.
//
// The positions of all images are numbered in one go; a strip is a run of them, cut into rows at the ends of the last
// axis. Where the lanes of each tap lie in the source is found once a strip and serves all channels.
#pragma once

#include "conv_geometry.h"
#include "sparse_tiles.h"

namespace masked_ops::cpu::MASKED_OPS_CAPABILITY {

// Where images lie in memory.
template <typename T>
struct Memory {
  T* data;
  bool channels_last;
  int64_t image, channel, pixel;  // strides

  Memory(Images<T> images, int64_t channels, const int64_t (&size)[3])
      : data(images.data), channels_last(images.channels_last), image(channels * size[0] * size[1] * size[2]) {
    channel = channels_last ? 1 : size[0] * size[1] * size[2];
    pixel = channels_last ? channels : 1;
  }
};

class Strip {
 public:
  static constexpr int L = Vec::kLanes;
  static constexpr int kMaxLanes = tuning::kMaxVectors * L;

  struct Row {  // positions that differ in the last axis alone
    int64_t lane, count;
    int64_t image, d, h, w;
  };

  Strip(const Phase& phase, int64_t first, int64_t lanes) : phase_(phase), lanes_(lanes) {
    const auto& axes = phase.axes;
    while (vectors_ * L < lanes) vectors_ *= 2;
    for (int64_t lane = 0; lane < lanes;) {
      const int64_t position = first + lane, line = position / axes[2].count, w = position % axes[2].count;
      const int64_t count = min(lanes - lane, axes[2].count - w), plane = line / axes[1].count;
      rows_[row_count_++] = {lane, count, plane / axes[0].count, plane % axes[0].count, line % axes[1].count, w};
      lane += count;
    }
  }

  const Phase& phase() const { return phase_; }
  int64_t lanes() const { return lanes_; }
  int64_t rows() const { return row_count_; }
  int vectors() const { return vectors_; }
  int64_t width() const { return vectors_ * L; }

  // Per tap and row, the lanes that lie in the source: body(tap, lane, count, offset of the first); the others follow
  // at step() pixels.
  template <typename Body>
  void for_runs(const Memory<const float>& source, const Body& body) const {
    const auto& axes = phase_.axes;
    int64_t tap = 0;
    for (int64_t i = 0; i < axes[0].taps; ++i) {
      for (int64_t j = 0; j < axes[1].taps; ++j) {
        for (int64_t k = 0; k < axes[2].taps; ++k, ++tap) {
          const int64_t first = axes[2].first(k), last = axes[2].last(k);
          for (int64_t r = 0; r < row_count_; ++r) {
            const Row& row = rows_[r];
            const int64_t d = row.d * axes[0].step + axes[0].at(i), h = row.h * axes[1].step + axes[1].at(j);
            const int64_t begin = max(first, row.w), end = min(last, row.w + row.count);
            if (d < 0 || d >= axes[0].size || h < 0 || h >= axes[1].size || begin >= end) continue;
            const int64_t w = begin * axes[2].step + axes[2].at(k);
            body(tap, row.lane + begin - row.w, end - begin,
                 row.image * source.image + ((d * axes[1].size + h) * axes[2].size + w) * source.pixel);
          }
        }
      }
    }
  }
  int64_t step() const { return phase_.axes[2].step; }

  // c[row][lanes] to the images' channels from `channel` on; reads whole vectors of rows.
  void store(const float* c, int64_t channel, int64_t rows, const Memory<float>& to) const {
    if (to.channels_last) {
      store_pixels(c, rows, to.data + channel, to);
    } else {
      store_lines(c, rows, to.data + channel * to.channel, to);
    }
  }

 private:
  int64_t target(const Row& row, const Memory<float>& to) const {
    const auto& axes = phase_.axes;
    const auto at = [&](int d, int64_t i) { return axes[d].to_first + i * axes[d].to_step; };
    const int64_t line = at(0, row.d) * axes[1].to_size + at(1, row.h);
    return row.image * to.image + (line * axes[2].to_size + at(2, row.w)) * to.pixel;
  }

  void store_lines(const float* c, int64_t rows, float* to, const Memory<float>& memory) const {
    const int64_t step = phase_.axes[2].to_step;
    for (int64_t r = 0; r < row_count_;) {
      const int64_t lane = rows_[r].lane, offset = target(rows_[r], memory);
      int64_t count = rows_[r++].count;
      while (step == 1 && r < row_count_ && target(rows_[r], memory) == offset + count) count += rows_[r++].count;
      for (int64_t i = 0; i < rows; ++i) {
        const float* const from = c + i * width() + lane;
        float* const out = to + i * memory.channel + offset;
        if (step > 1) {
          for (int64_t w = 0; w < count; ++w) out[w * step] = from[w];
          continue;
        }
        int64_t w = 0;
        for (; w + L <= count; w += L) Vec::loadu(from + w).storeu(out + w);
        if (w < count) Vec::loadu(Vec::first(count - w), from + w).storeu(Vec::first(count - w), out + w);
      }
    }
  }

  void store_pixels(const float* c, int64_t rows, float* to, const Memory<float>& memory) const {
    int64_t offsets[kMaxLanes];
    for (int64_t r = 0; r < row_count_; ++r) {
      const int64_t offset = target(rows_[r], memory);
      for (int64_t w = 0; w < rows_[r].count; ++w) {
        offsets[rows_[r].lane + w] = offset + w * phase_.axes[2].to_step * memory.pixel;
      }
    }
    for (int64_t j = 0; j < lanes_; j += L) {
      const int64_t valid = min<int64_t>(L, lanes_ - j);
      for (int64_t r = 0; r < rows; r += L) {
        const Vec::Predicate some = Vec::first(rows - r);
        Vec tile[L];
        MASKED_OPS_UNROLL
        for (int i = 0; i < L; ++i) tile[i] = Vec::load(c + (r + i) * width() + j);
        transpose(tile);
        for (int64_t i = 0; i < valid; ++i) tile[i].storeu(some, to + offsets[j + i] + r);
      }
    }
  }

  const Phase& phase_;
  int64_t lanes_;
  int vectors_ = 1;
  int64_t row_count_ = 0;
  Row rows_[kMaxLanes];
};

// Packs from NCHW. Per channel the vectors of all taps: those that lie whole in the source, then those that lie there
// in part or not at all, then what is added to these where rows meet in a vector.
class LinePacker {
 public:
  static constexpr int L = Vec::kLanes;

  static size_t bytes(const Strip& strip) {
    const size_t pieces = size_t(2 * strip.vectors() + most_added(strip));
    return size_t(strip.phase().taps()) * (pieces * sizeof(Piece) + 3 * sizeof(int32_t));
  }

  LinePacker(const Strip& strip, const Memory<const float>& source, void* memory)
      : source_(source), taps_(strip.phase().taps()), width_(strip.width()), vectors_(strip.vectors()) {
    lists_[0].pieces = static_cast<Piece*>(memory);
    lists_[1].pieces = lists_[0].pieces + taps_ * strip.vectors();
    lists_[2].pieces = lists_[1].pieces + taps_ * strip.vectors();
    lists_[0].ends = reinterpret_cast<int32_t*>(lists_[2].pieces + taps_ * most_added(strip));
    lists_[1].ends = lists_[0].ends + taps_;
    lists_[2].ends = lists_[1].ends + taps_;
    const bool each_lane = gather_overflows(strip);  // then a lane is a piece, and the step does not matter
    step_ = each_lane ? 1 : strip.step();
    ahead_ = ceil_div(tuning::kVectorsAhead, taps_ * vectors_) * source.channel;

    strip.for_runs(source, [&](int64_t tap, int64_t lane, int64_t count, int64_t offset) {
      close(tap, lane / L);
      for (int64_t done = 0; done < count;) {
        const int64_t at = lane + done, in_vector = at % L;
        const int64_t n = each_lane ? 1 : min(count - done, L - in_vector);
        add(tap, at / L,
            {offset + done * strip.step() - in_vector * step_, int32_t(tap * width_ + at - in_vector),
             ((1u << n) - 1) << in_vector});
        done += n;
      }
    });
    close(taps_, 0);
  }

  // packed[column][lanes] of columns [first, last), counted from (channel, tap 0).
  void pack(int64_t channel, int64_t first, int64_t last, float* packed) const {
    for (int64_t column = first; column < last;) {
      const int64_t c = column / taps_, tap = column % taps_, end = min(taps_, tap + last - column);
      const float* const in = source_.data + (channel + c) * source_.channel;
      float* const out = packed + (c * taps_ - first) * width_;
      if (step_ == 1) {
        pack_channel<false>(in, tap, end, out);
      } else {
        pack_channel<true>(in, tap, end, out);
      }
      column += end - tap;
    }
  }

 private:
  struct Piece {
    int64_t offset;  // of what lane 0 would read
    int32_t to;      // of the vector, in the channel's columns
    uint32_t lanes;
  };
  struct List {
    Piece* pieces;
    int32_t* ends;  // per tap
    int32_t count = 0;
  };

  static bool gather_overflows(const Strip& strip) { return strip.step() > int64_t{1} << 26; }
  static int64_t most_added(const Strip& strip) { return gather_overflows(strip) ? strip.lanes() : strip.rows(); }

  // The vectors before vector v of tap are done.
  void close(int64_t tap, int64_t v) {
    while (tap_ < tap || (tap_ < taps_ && vector_ < v)) {
      if (!open_) lists_[1].pieces[lists_[1].count++] = {0, int32_t(tap_ * width_ + vector_ * L), 0};
      open_ = false;
      if (++vector_ == vectors_) {
        for (List& list : lists_) list.ends[tap_] = list.count;
        vector_ = 0;
        ++tap_;
      }
    }
  }

  void add(int64_t tap, int64_t v, Piece piece) {
    close(tap, v);
    List& list = lists_[open_ ? 2 : piece.lanes == (1ull << L) - 1 ? 0 : 1];
    list.pieces[list.count++] = piece;
    open_ = true;
  }

  template <bool kGather>
  void pack_channel(const float* in, int64_t tap, int64_t end, float* out) const {
    const auto load = [&](const Piece& p) __attribute__((always_inline)) {
      return kGather ? Vec::gather(Vec::Predicate(p.lanes), in + p.offset, int(step_))
                     : Vec::loadu(Vec::Predicate(p.lanes), in + p.offset);
    };
    const auto each = [&](const List& list, const auto& body) __attribute__((always_inline)) {
      const Piece* const last = list.pieces + list.ends[end - 1];
      for (const Piece* p = list.pieces + (tap ? list.ends[tap - 1] : 0); p < last; ++p) body(*p);
    };
    each(lists_[0], [&](const Piece& p) __attribute__((always_inline)) {
      if (kGather) return load(p).store(out + p.to);
      prefetch(in + p.offset + ahead_);
      Vec::loadu(in + p.offset).store(out + p.to);
    });
    each(lists_[1], [&](const Piece& p) __attribute__((always_inline)) { load(p).store(out + p.to); });
    each(lists_[2],
         [&](const Piece& p) __attribute__((always_inline)) { (load(p) + Vec::load(out + p.to)).store(out + p.to); });
  }

  const Memory<const float>& source_;
  int64_t taps_, width_;
  int vectors_;
  int64_t step_, ahead_;
  List lists_[3];
  int64_t tap_ = 0, vector_ = 0;  // what comes next
  bool open_ = false;             // it has a piece
};

// Packs from channels last: of each tap L lanes by L channels at a time.
class PixelPacker {
 public:
  static constexpr int L = Vec::kLanes;

  static size_t bytes(const Strip& strip) { return size_t(strip.phase().taps() * strip.width()) * sizeof(int64_t); }

  PixelPacker(const Strip& strip, const Memory<const float>& source, void* memory)
      : source_(source), taps_(strip.phase().taps()), width_(strip.width()), offsets_(static_cast<int64_t*>(memory)) {
    for (int64_t i = 0; i < taps_ * width_; ++i) offsets_[i] = -1;
    strip.for_runs(source, [&](int64_t tap, int64_t lane, int64_t count, int64_t offset) {
      for (int64_t i = 0; i < count; ++i) offsets_[tap * width_ + lane + i] = offset + i * strip.step() * source.pixel;
    });
  }

  void pack(int64_t channel, int64_t first, int64_t last, float* packed) const {
    for (int64_t tap = 0; tap < taps_; ++tap) {
      const int64_t c0 = first > tap ? ceil_div(first - tap, taps_) : 0, c1 = ceil_div(last - tap, taps_);
      if (last <= tap || c0 >= c1) continue;
      for (int64_t j = 0; j < width_; j += L) {
        pack_vectors(offsets_ + tap * width_ + j, source_.data + channel + c0, c1 - c0,
                     packed + (c0 * taps_ + tap - first) * width_ + j);
      }
    }
  }

 private:
  void pack_vectors(const int64_t* offsets, const float* in, int64_t channels, float* out) const {
    const int64_t pitch = taps_ * width_;
    for (int64_t c = 0; c < channels; c += L) {
      const int64_t valid = min<int64_t>(L, channels - c);
      const Vec::Predicate some = Vec::first(valid);
      Vec tile[L];
      MASKED_OPS_UNROLL
      for (int i = 0; i < L; ++i) tile[i] = offsets[i] < 0 ? Vec::zero() : Vec::loadu(some, in + offsets[i] + c);
      transpose(tile);
      if (valid == L) {
        MASKED_OPS_UNROLL
        for (int i = 0; i < L; ++i) tile[i].store(out + (c + i) * pitch);
      } else {
        for (int i = 0; i < valid; ++i) tile[i].store(out + (c + i) * pitch);
      }
    }
  }

  const Memory<const float>& source_;
  int64_t taps_, width_;
  int64_t* offsets_;  // per tap and lane; negative beyond the source
};

// Calls body with the packer for the source, which keeps what it finds in memory that make(bytes) gives.
template <typename Make, typename Body>
MASKED_OPS_INLINE void with_packer(const Strip& strip, const Memory<const float>& source, const Make& make,
                                   const Body& body) {
  if (source.channels_last) {
    body(PixelPacker(strip, source, make(PixelPacker::bytes(strip))));
  } else {
    body(LinePacker(strip, source, make(LinePacker::bytes(strip))));
  }
}

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY
