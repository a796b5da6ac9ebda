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

// How the positions of a phase are cut into strips. Dense: lanes are positions, through the ends of rows and images.
// Aligned: a strip is a few rows of one plane, each padded to whole vectors; then taps that read the same source row
// for different rows of positions share what is packed of it.
struct Cut {
  const Phase* phase;
  int64_t batch;
  int vectors;    // of a strip: kWide, kOdd or kNarrow
  int64_t pitch;  // lanes of a row if aligned, else 0

  static constexpr int kWide = 8, kOdd = 7, kNarrow = 4;

  Cut(const Phase& of, int64_t batch, int threads) : phase(&of), batch(batch) {
    constexpr int L = Vec::kLanes;
    const auto& axes = of.axes;
    const int64_t positions = batch * of.positions();
    vectors = positions > kNarrow * L && positions >= 4 * threads * kWide * L ? kWide : kNarrow;
    pitch = 0;
    // Worth it if taps share rows, and if the padding costs little.
    const int64_t padded = ceil_div(axes[2].count, L) * L;
    if (axes[1].taps < 2 || axes[1].step != 1) return;
    double least = 1.25 * double(positions) / L;
    constexpr int kVectors[] = {kWide, kOdd};
    for (const int v : kVectors) {
      if (v * L % padded) continue;
      const int64_t strips = batch * axes[0].count * ceil_div(axes[1].count, v * L / padded);
      if (strips < 4 * threads || double(strips * v) >= least) continue;
      least = double(strips * v);
      vectors = v;
      pitch = padded;
    }
  }

  int64_t lanes() const { return vectors * Vec::kLanes; }
  int64_t rows() const { return lanes() / pitch; }  // if aligned
  int64_t strips_of_plane() const { return ceil_div(phase->axes[1].count, rows()); }
  int64_t strips() const {
    return pitch ? batch * phase->axes[0].count * strips_of_plane() : ceil_div(batch * phase->positions(), lanes());
  }
};

class Strip {
 public:
  static constexpr int L = Vec::kLanes;
  static constexpr int kMaxLanes = Cut::kWide * L;

  struct Row {  // positions that differ in the last axis alone
    int64_t lane, count;
    int64_t image, d, h, w;
  };

  Strip(const Cut& cut, int64_t strip) : phase_(*cut.phase), vectors_(cut.vectors) {
    const auto& axes = phase_.axes;
    if (cut.pitch) {
      const int64_t plane = strip / cut.strips_of_plane(), h = strip % cut.strips_of_plane() * cut.rows();
      while (row_count_ < min(cut.rows(), axes[1].count - h)) {
        rows_[row_count_] = {row_count_ * cut.pitch, axes[2].count,  plane / axes[0].count,
                             plane % axes[0].count,  h + row_count_, 0};
        ++row_count_;
      }
      return;
    }
    const int64_t first = strip * cut.lanes(), lanes = min(cut.lanes(), cut.batch * phase_.positions() - first);
    for (int64_t lane = 0; lane < lanes;) {
      const int64_t position = first + lane, line = position / axes[2].count, w = position % axes[2].count;
      const int64_t count = min(lanes - lane, axes[2].count - w), plane = line / axes[1].count;
      rows_[row_count_++] = {lane, count, plane / axes[0].count, plane % axes[0].count, line % axes[1].count, w};
      lane += count;
    }
    if (lanes <= Cut::kNarrow * L) vectors_ = Cut::kNarrow;
  }

  const Phase& phase() const { return phase_; }
  int64_t rows() const { return row_count_; }
  const Row& row(int64_t i) const { return rows_[i]; }
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
      while (step == 1 && r < row_count_ && rows_[r].lane == lane + count &&
             target(rows_[r], memory) == offset + count) {
        count += rows_[r++].count;
      }
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
    for (int64_t& offset : offsets) offset = -1;
    for (int64_t r = 0; r < row_count_; ++r) {
      const int64_t offset = target(rows_[r], memory);
      for (int64_t w = 0; w < rows_[r].count; ++w) {
        offsets[rows_[r].lane + w] = offset + w * phase_.axes[2].to_step * memory.pixel;
      }
    }
    for (int64_t j = 0; j < width(); j += L) {
      for (int64_t r = 0; r < rows; r += L) {
        const Vec::Predicate some = Vec::first(rows - r);
        Vec tile[L];
        MASKED_OPS_UNROLL
        for (int i = 0; i < L; ++i) tile[i] = Vec::load(c + (r + i) * width() + j);
        transpose(tile);
        for (int i = 0; i < L; ++i) {
          if (offsets[j + i] >= 0) tile[i].storeu(some, to + offsets[j + i] + r);
        }
      }
    }
  }

  const Phase& phase_;
  int vectors_;
  int64_t row_count_ = 0;
  Row rows_[kMaxLanes];
};

// Where a strip's taps find their lanes in what is packed of a channel. Dense strips: tap by tap. Aligned strips: the
// source's rows one below the other, once for each tap of the first and the last axis; the taps of the middle one
// begin at different rows.
struct PackedChannel {
  int64_t width, pitch;     // lanes of a strip, and of its rows
  int64_t rows, first_row;  // aligned strips: source rows, and where the first lies from the strip's first position
  int64_t floats;

  PackedChannel(const Phase& phase, int64_t width, int64_t pitch) : width(width), pitch(pitch) {
    const Axis& h = phase.axes[1];
    const int64_t last = h.at(h.taps - 1);
    first_row = min(h.at(0), last);
    rows = pitch ? width / pitch + max(h.at(0), last) - first_row : 0;
    floats = pitch ? phase.axes[0].taps * phase.axes[2].taps * rows * pitch : phase.taps() * width;
  }

  int64_t offset(const Phase& phase, int64_t tap) const {
    if (!pitch) return tap * width;
    const int64_t of_w = phase.axes[2].taps, of_h = phase.axes[1].taps;
    const int64_t w = tap % of_w, h = tap / of_w % of_h, d = tap / of_w / of_h;
    return ((d * of_w + w) * rows + phase.axes[1].at(h) - first_row) * pitch;
  }
};

// Packs from NCHW: per channel the vectors that lie whole in the source, then the others.
class LinePacker {
 public:
  static constexpr int L = Vec::kLanes;

  static size_t bytes(const Strip& strip, const PackedChannel& packed) {
    const int64_t vectors = packed.floats / L, lanes = gather_overflows(strip) ? strip.width() : strip.rows();
    return size_t(2 * vectors + strip.phase().taps() * lanes + 1) * sizeof(Piece);
  }

  LinePacker(const Strip& strip, const PackedChannel& packed, const Memory<const float>& source, void* memory)
      : source_(source), packed_(packed), whole_(static_cast<Piece*>(memory)), others_(whole_ + packed.floats / L) {
    const bool each_lane = gather_overflows(strip);  // then a lane is a piece, and the step does not matter
    step_ = each_lane ? 1 : strip.step();
    ahead_ = ceil_div(tuning::kVectorsAhead * L, max<int64_t>(packed.floats, 1)) * source.channel;
    int64_t next = 0;  // vector, of which all before are done
    const auto run = [&](int64_t to, int64_t count, int64_t offset) {
      for (int64_t done = 0; done < count;) {
        const int64_t lane = to % L, n = each_lane ? 1 : min(count - done, L - lane);
        add(next, to / L, {offset + done * strip.step() - lane * step_, int32_t(to - lane), ((1u << n) - 1) << lane});
        done += n;
        to += n;
      }
    };
    if (packed.pitch) {
      for_source_rows(strip, run);
    } else {
      strip.for_runs(source, [&](int64_t tap, int64_t lane, int64_t count, int64_t offset) {
        run(tap * packed.width + lane, count, offset);
      });
    }
    close(next, packed.floats / L);
    others_[other_count_].to = 0;
  }

  // Channels [first, last), one after the other.
  void pack(int64_t first, int64_t last, float* packed) const {
    const float* in = source_.data + first * source_.channel;
    for (int64_t c = first; c < last; ++c, in += source_.channel, packed += packed_.floats) {
      if (step_ == 1) {
        pack_channel<false>(in, packed);
      } else {
        pack_channel<true>(in, packed);
      }
    }
  }

 private:
  struct Piece {
    int64_t offset;  // of what lane 0 would read
    int32_t to;      // of the vector; negative if it adds to the vector of the piece before
    uint32_t lanes;
  };

  static bool gather_overflows(const Strip& strip) { return strip.step() > int64_t{1} << 26; }

  // An aligned strip's rows of source: run(where it is packed, count, offset of the first).
  template <typename Run>
  void for_source_rows(const Strip& strip, const Run& run) const {
    const auto& axes = strip.phase().axes;
    const Strip::Row& row = strip.row(0);
    for (int64_t i = 0; i < axes[0].taps; ++i) {
      const int64_t d = row.d * axes[0].step + axes[0].at(i);
      if (d < 0 || d >= axes[0].size) continue;
      for (int64_t k = 0; k < axes[2].taps; ++k) {
        const int64_t first = axes[2].first(k), count = axes[2].last(k) - first;
        const int64_t w = first * axes[2].step + axes[2].at(k);
        for (int64_t r = 0; r < packed_.rows; ++r) {
          const int64_t h = row.h + packed_.first_row + r;
          if (h < 0 || h >= axes[1].size) continue;
          run(((i * axes[2].taps + k) * packed_.rows + r) * packed_.pitch + first, count,
              row.image * source_.image + (d * axes[1].size + h) * axes[2].size + w);
        }
      }
    }
  }

  // Vectors that nothing was added to are zero.
  void close(int64_t& next, int64_t vector) {
    for (; next < vector; ++next) others_[other_count_++] = {0, int32_t(next * L), 0};
  }

  void add(int64_t& next, int64_t vector, Piece piece) {
    close(next, vector);
    if (next > vector) {
      piece.to = -1;
    } else {
      ++next;
    }
    if (piece.lanes == (1ull << L) - 1) {
      whole_[whole_count_++] = piece;
    } else {
      others_[other_count_++] = piece;
    }
  }

  template <bool kGather>
  void pack_channel(const float* in, float* out) const {
    const auto load = [&](const Piece& p) __attribute__((always_inline)) {
      return kGather ? Vec::gather(Vec::Predicate(p.lanes), in + p.offset, int(step_))
                     : Vec::loadu(Vec::Predicate(p.lanes), in + p.offset);
    };
    for (const Piece* p = whole_; p < whole_ + whole_count_; ++p) {
      if (!kGather) prefetch(in + p->offset + ahead_);
      (kGather ? load(*p) : Vec::loadu(in + p->offset)).store(out + p->to);
    }
    for (const Piece *p = others_, *last = others_ + other_count_; p < last;) {
      const int64_t to = p->to;
      Vec v = load(*p);
      while ((++p)->to < 0) v = v + load(*p);
      v.store(out + to);
    }
  }

  const Memory<const float>& source_;
  const PackedChannel& packed_;
  Piece* whole_;
  Piece* others_;
  int64_t whole_count_ = 0, other_count_ = 0;
  int64_t step_, ahead_;
};

// Packs from channels last: L lanes by L channels at a time.
class PixelPacker {
 public:
  static constexpr int L = Vec::kLanes;

  static size_t bytes(const Strip&, const PackedChannel& packed) { return size_t(packed.floats) * sizeof(int64_t); }

  PixelPacker(const Strip& strip, const PackedChannel& packed, const Memory<const float>& source, void* memory)
      : source_(source), packed_(packed), offsets_(static_cast<int64_t*>(memory)) {
    for (int64_t i = 0; i < packed.floats; ++i) offsets_[i] = -1;
    strip.for_runs(source, [&](int64_t tap, int64_t lane, int64_t count, int64_t offset) {
      int64_t* const to = offsets_ + packed.offset(strip.phase(), tap) + lane;
      for (int64_t i = 0; i < count; ++i) to[i] = offset + i * strip.step() * source.pixel;
    });
  }

  void pack(int64_t first, int64_t last, float* packed) const {
    for (int64_t c = first; c < last; c += L, packed += L * packed_.floats) {
      const int64_t valid = min<int64_t>(L, last - c);
      const Vec::Predicate some = Vec::first(valid);
      const float* const in = source_.data + c;
      for (int64_t j = 0; j < packed_.floats; j += L) {
        const int64_t* const offsets = offsets_ + j;
        Vec tile[L];
        MASKED_OPS_UNROLL
        for (int i = 0; i < L; ++i) tile[i] = offsets[i] < 0 ? Vec::zero() : Vec::loadu(some, in + offsets[i]);
        transpose(tile);
        float* const out = packed + j;
        if (valid == L) {
          MASKED_OPS_UNROLL
          for (int i = 0; i < L; ++i) tile[i].store(out + i * packed_.floats);
        } else {
          for (int i = 0; i < valid; ++i) tile[i].store(out + i * packed_.floats);
        }
      }
    }
  }

 private:
  const Memory<const float>& source_;
  const PackedChannel& packed_;
  int64_t* offsets_;  // of each lane; negative beyond the source
};

// Calls body with the packer for the source, which keeps what it finds in the slot.
template <typename Body>
MASKED_OPS_INLINE void with_packer(const Strip& strip, const PackedChannel& packed, const Memory<const float>& source,
                                   Slot slot, const Body& body) {
  if (source.channels_last) {
    body(PixelPacker(strip, packed, source, scratch(slot, PixelPacker::bytes(strip, packed))));
  } else {
    body(LinePacker(strip, packed, source, scratch(slot, LinePacker::bytes(strip, packed))));
  }
}

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY
