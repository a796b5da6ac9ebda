// Strips: how the positions of a phase are cut into the lanes that the sparse kernels take at a time, and where those
// lie in the images that they are stored to.
#pragma once

#include "conv_geometry.h"
#include "elements.h"
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

// How the positions of a phase are cut into strips.
//
// Dense: the positions of all images are numbered in one go, and a strip is a run of them. Banded: the columns of all
// images are, a strip's vectors are runs of them, and each vector is one row below the one before it. Then a vector of
// the source serves all taps of the middle axis.
struct Cut {
  const Phase* phase;
  int64_t batch;
  int vectors;  // of a strip: kWide, kOdd or kNarrow; fewer in the last dense one
  bool banded;

  static constexpr int L = Vec::kLanes;
  static constexpr int kWide = 8, kOdd = 7, kNarrow = 4;

  // Narrow: even if there are positions for wide strips, unless their vectors are rows.
  Cut(const Phase& of, const TapBlocks& blocks, bool narrow, int64_t batch, int threads)
      : phase(&of), batch(batch), banded(false) {
    const int64_t positions = batch * of.positions();
    const bool wide = !narrow && positions >= 4 * threads * kWide * L;
    vectors = positions > kNarrow * L && wide ? kWide : kNarrow;
    if (blocks.pitch == 0) return;
    double least = 1.25 * double(positions) / L;  // what it may cost in lanes that are none
    constexpr int kVectors[] = {kWide, kOdd};
    for (const int v : kVectors) {
      const int64_t strips = columns() * ceil_div(of.axes[1].count, v);
      if (strips < threads || double(strips * v) >= least) continue;
      least = double(strips * v);
      vectors = v;
      banded = true;
    }
  }

  int64_t lanes() const { return vectors * L; }
  int64_t across() const { return batch * phase->axes[0].count * phase->axes[2].count; }
  int64_t columns() const { return ceil_div(across(), L); }  // of banded strips
  int64_t strips() const {
    return banded ? columns() * ceil_div(phase->axes[1].count, vectors) : ceil_div(batch * phase->positions(), lanes());
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

  Strip(const Cut& cut, int64_t strip) : phase_(*cut.phase), vectors_(cut.vectors), banded_(cut.banded) {
    const auto& axes = phase_.axes;
    if (banded_) {
      const int64_t first = strip % cut.columns() * L, h = strip / cut.columns() * vectors_;
      const int64_t lanes = min<int64_t>(L, cut.across() - first), bands = min<int64_t>(vectors_, axes[1].count - h);
      for (int64_t lane = 0; lane < lanes;) {
        const int64_t plane = (first + lane) / axes[2].count, w = (first + lane) % axes[2].count;
        const int64_t count = min(lanes - lane, axes[2].count - w);
        rows_[row_count_++] = {lane, count, plane / axes[0].count, plane % axes[0].count, h, w};
        lane += count;
      }
      runs_ = row_count_;
      for (int64_t r = runs_; r < runs_ * bands; ++r) {
        rows_[row_count_++] = rows_[r - runs_];
        rows_[r].lane += L;
        rows_[r].h += 1;
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
    runs_ = row_count_;
    for (vectors_ = 1; vectors_ * L < lanes;) vectors_ *= 2;
  }

  const Phase& phase() const { return phase_; }
  bool banded() const { return banded_; }
  int64_t runs() const { return runs_; }  // rows; if banded, of the first vector
  const Row& row(int64_t i) const { return rows_[i]; }
  int vectors() const { return vectors_; }
  int64_t width() const { return vectors_ * L; }
  int64_t step() const { return phase_.axes[2].step; }

  // Where the lines are that hold the strip's pixels in images that it is stored to: offsets from a channel of NCHW, or
  // from some channels of each pixel.
  static constexpr int64_t kMostLines = 2 * kMaxLanes;
  template <typename T>
  int64_t lines(const Memory<T>& in, int64_t* offsets) const {
    int64_t count = 0;
    for (int64_t r = 0; r < row_count_; ++r) {
      const int64_t offset = target(rows_[r], in), step = phase_.axes[2].to_step * in.pixel;
      const int64_t apart = max<int64_t>(Ahead::kFloats / step, 1);
      for (int64_t w = 0; w < rows_[r].count; w += apart) offsets[count++] = offset + w * step;
      if (apart > 1 && rows_[r].count > 1) offsets[count++] = offset + (rows_[r].count - 1) * step;
    }
    return count;
  }

  // c[row][lanes] to the images' channels from `channel` on; reads whole vectors of rows. Streamed, whole lines of
  // floats go past the caches.
  template <typename T>
  void store(const float* c, int64_t channel, int64_t rows, const Memory<T>& to, bool streams) const {
    if (to.channels_last) {
      store_pixels(c, rows, to.data + channel, to, streams);
    } else {
      store_lines(c, rows, to.data + channel * to.channel, to, streams);
    }
  }

 private:
  template <typename T>
  int64_t target(const Row& row, const Memory<T>& to) const {
    const auto& axes = phase_.axes;
    const auto at = [&](int d, int64_t i) { return axes[d].to_first + i * axes[d].to_step; };
    const int64_t line = at(0, row.d) * axes[1].to_size + at(1, row.h);
    return row.image * to.image + (line * axes[2].to_size + at(2, row.w)) * to.pixel;
  }

  // Whether whole lines can go past the caches.
  template <typename T>
  static MASKED_OPS_INLINE bool can_stream(const T* p) {
    return kIsFloat<T> && reinterpret_cast<uintptr_t>(p) % (L * sizeof(float)) == 0;
  }
  static MASKED_OPS_INLINE void stream(Vec x, float* p) { x.stream(p); }
  template <typename T>
  static MASKED_OPS_INLINE void stream(Vec, T*) {}

  template <typename T>
  void store_lines(const float* c, int64_t rows, T* to, const Memory<T>& memory, bool streams) const {
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
        T* const out = to + i * memory.channel + offset;
        if (step > 1) {
          store_apart(from, count, step, out);
          continue;
        }
        int64_t w = 0;
        if (streams && can_stream(out)) {
          for (; w + L <= count; w += L) stream(Vec::loadu(from + w), out + w);
        }
        for (; w + L <= count; w += L) store_floats(Vec::loadu(from + w), out + w);
        if (w < count) store_floats(Vec::loadu(Vec::first(count - w), from + w), count - w, out + w);
      }
    }
  }

  // out[i * step] = from[i].
  template <typename T>
  static void store_apart(const float* from, int64_t count, int64_t step, T* out) {
    if constexpr (kIsFloat<T>) {
      if (step == 2) {
        for (int64_t w = 0; w < count; w += L) {
          Vec::loadu(Vec::first(count - w), from + w).store_even(Vec::first(count - w), out + 2 * w);
        }
        return;
      }
    }
    for (int64_t w = 0; w < count; ++w) store_float(from[w], out + w * step);
  }

  template <typename T>
  void store_pixels(const float* c, int64_t rows, T* to, const Memory<T>& memory, bool streams) const {
    int64_t offsets[kMaxLanes];
    for (int64_t& offset : offsets) offset = -1;
    for (int64_t r = 0; r < row_count_; ++r) {
      const int64_t offset = target(rows_[r], memory);
      for (int64_t w = 0; w < rows_[r].count; ++w) {
        offsets[rows_[r].lane + w] = offset + w * phase_.axes[2].to_step * memory.pixel;
      }
    }
    const bool whole_lines = streams && can_stream(to) && memory.pixel % L == 0;
    for (int64_t j = 0; j < width(); j += L) {
      for (int64_t r = 0; r < rows; r += L) {
        Vec tile[L];
        MASKED_OPS_UNROLL
        for (int i = 0; i < L; ++i) tile[i] = Vec::load(c + (r + i) * width() + j);
        transpose(tile);
        const bool streamed = whole_lines && rows - r >= L;
        for (int i = 0; i < L; ++i) {
          T* const out = to + offsets[j + i] + r;
          if (offsets[j + i] >= 0) streamed ? stream(tile[i], out) : store_floats(tile[i], rows - r, out);
        }
      }
    }
  }

  const Phase& phase_;
  int vectors_;
  bool banded_;
  int64_t row_count_ = 0, runs_ = 0;
  Row rows_[kMaxLanes];
};

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY
