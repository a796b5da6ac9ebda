// Depthwise convolutions of up to two dimensions on contiguous images (the others: depthwise_last.cpp), and their
// gradients: each channel by itself, by the taps that its mask leaves.
//
// A vector holds neighbouring results of a row. What a tap reads for it is loaded from the image as it lies, beyond the
// border under a mask; and where the stride allows, a tile of rows loads it once for a run of taps below each other.
// The gradient with respect to the input is the product with the taps turned round. For a stride beyond 1 it reads
// grad_output with zeros between its elements, which a plane of scratch memory holds.
#include "depthwise.h"
#include "kernels.h"

namespace masked_ops::cpu::MASKED_OPS_CAPABILITY {
namespace {

constexpr int L = Vec::kLanes;

// Taps below each other; the weights of the pruned ones are 0.
struct Run {
  int64_t offset;  // of what the first reads for a result, in floats
  int32_t y, x;    // its row and column of the kernel, as the results meet them
  int32_t taps;
  float weights[kRunTaps];
};

struct Plane {
  int64_t source[2], result[2];
  int64_t stride[2];
  int64_t spread[2];  // zeros between elements of the source, and 1
  int64_t padding[2];

  int64_t source_floats() const { return source[0] * source[1]; }
  int64_t result_floats() const { return result[0] * result[1]; }
  bool is_spread() const { return spread[0] > 1 || spread[1] > 1; }
  // The same over a source that has its zeros.
  Plane filled() const {
    Plane plane = *this;
    for (int d = 0; d < 2; ++d) {
      plane.source[d] = (source[d] - 1) * spread[d] + 1;
      plane.spread[d] = 1;
    }
    return plane;
  }
  void fill(const float* from, float* to) const {
    const int64_t pitch = filled().source[1];
    for (int64_t y = 0; y < source[0]; ++y, to += spread[0] * pitch) {
      for (int64_t x = 0; x < source[1]; ++x) to[x * spread[1]] = from[y * source[1] + x];
    }
  }
};

Plane forward_plane(const Convolution& c) {
  return {{c.input[1], c.input[2]},
          {c.output[1], c.output[2]},
          {c.stride[1], c.stride[2]},
          {1, 1},
          {c.padding[1], c.padding[2]}};
}

Plane backward_plane(const Convolution& c) {
  const auto padding = [&](int d) { return (c.kernel[d] - 1) * c.dilation[d] - c.padding[d]; };
  return {{c.output[1], c.output[2]},
          {c.input[1], c.input[2]},
          {1, 1},
          {c.stride[1], c.stride[2]},
          {padding(1), padding(2)}};
}

int64_t taps_of(const Convolution& c) { return c.kernel[1] * c.kernel[2]; }

// The kernel over a plane: what is the same for all channels.
struct Window {
  Plane plane;
  int64_t kernel[2], dilation[2];
  bool turned, is_large;
  // For each tile of rows of results and row of the kernel, which of the source's rows that follow each other (a stride
  // apart) are inside; for each vector of a row and column of the kernel, which of its elements are.
  const uint32_t* rows;
  const uint64_t* lanes;

  Window(const Plane& plane, const Convolution& c, bool turned)
      : plane(plane), kernel{c.kernel[1], c.kernel[2]}, dilation{c.dilation[1], c.dilation[2]}, turned(turned) {
    is_large = c.batch * c.in_channels * plane.source_floats() >= tuning::kManyFloats;
    const int64_t height = plane.result[0], width = plane.result[1];
    int64_t row_count = 0;
    for (int64_t left = height; left > 0; left -= tile_of(left)) row_count += kernel[0];
    const int64_t lane_count = ceil_div(width, L) * kernel[1];
    const size_t bytes = size_t(lane_count) * sizeof(uint64_t) + size_t(row_count) * sizeof(uint32_t);
    uint64_t* const to_lanes = static_cast<uint64_t*>(scratch(Slot::kTable, bytes));
    uint32_t* const to_rows = reinterpret_cast<uint32_t*>(to_lanes + lane_count);
    uint32_t* to = to_rows;
    for (int64_t first = 0; first < height; first += tile_of(height - first)) {
      for (int64_t tap = 0; tap < kernel[0]; ++tap) *to++ = uint32_t(inside(first, tap, 0, plane.stride[0]));
    }
    for (int64_t i = 0; i < lane_count; ++i) {
      // Of a stride of 2, whole vectors are loaded.
      to_lanes[i] = inside(i / kernel[1] * L, i % kernel[1], 1, plane.stride[1] == 2 ? 1 : plane.stride[1]);
    }
    rows = to_rows;
    lanes = to_lanes;
  }

  int64_t source(int64_t result, int64_t tap, int d) const {
    return result * plane.stride[d] + tap * dilation[d] - plane.padding[d];
  }
  int64_t place(int64_t y, int64_t x) const {
    const int64_t place = y * kernel[1] + x;
    return turned ? kernel[0] * kernel[1] - 1 - place : place;
  }

  // The taps of a channel in runs, those without any that is left apart; returns how many. How long a run is depends
  // on its place alone: what a processor can foresee. Without weights, their places alone.
  int64_t list_runs(const uint64_t* bits, const float* weight, Run* runs) const {
    const int64_t longest = plane.stride[0] == 1 && plane.stride[1] == 1 && dilation[0] == 1 ? kRunTaps : 1;
    Run* run = runs;
    for (int64_t x = 0; x < kernel[1]; ++x) {
      for (int64_t y = 0; y < kernel[0]; y += longest) {
        *run = {source(0, y, 0) * plane.source[1] + source(0, x, 1), int32_t(y), int32_t(x), 0, {}};
        bool any = false;
        for (; run->taps < min(longest, kernel[0] - y); ++run->taps) {
          const int64_t at = place(y + run->taps, x);
          const bool left = bits[at / 64] >> (at % 64) & 1;
          run->weights[run->taps] = weight && left ? weight[at] : 0;
          any |= left;
        }
        run += any;
      }
    }
    return run - runs;
  }

 private:
  // Bit i: whether what a tap reads for a result, and i steps further, lies in the source. As many bits as are used.
  uint64_t inside(int64_t result, int64_t tap, int d, int64_t step) const {
    uint64_t bits = 0;
    int64_t at = source(result, tap, d);
    for (int i = 0; i < 32; ++i, at += step) bits |= uint64_t(uint64_t(at) < uint64_t(plane.source[d])) << i;
    return bits;
  }
};

// A vector that a tap reads: every stride-th column, the elements that are inside.
template <int kStride>
struct LoadColumns {
  uint64_t inside;
  int stride;
  MASKED_OPS_INLINE Vec operator()(const float* p) const {
    if constexpr (kStride == 1) return Vec::loadu(Vec::predicate(inside), p);
    if constexpr (kStride == 2) return Vec::load_even(uint32_t(inside), p);
    return Vec::gather(Vec::predicate(inside), p, stride);
  }
};

// body(Int<stride>()); 0 for the large ones.
template <typename Body>
MASKED_OPS_INLINE void with_stride(int64_t stride, const Body& body) {
  if (stride == 1) {
    body(Int<1>());
  } else if (stride == 2) {
    body(Int<2>());
  } else {
    body(Int<0>());
  }
}

// body(Int<taps>()) for a run's.
template <int kStride, typename Body>
MASKED_OPS_INLINE void with_taps(int64_t taps, const Body& body) {
  if constexpr (kStride == 1) {
    with_int<kRunTaps>(taps, body);
  } else {
    body(Int<1>());
  }
}

// What is read some time later: planes follow each other.
constexpr int64_t kAhead = tuning::kStreamAhead / int64_t{sizeof(float)};

// R rows of results, a tile from row y on, which begin with the bias, or, if that is null, with what they are.
template <int R, int kStride>
__attribute__((noinline)) void multiply_rows(const Window& window, const uint32_t* rows, int64_t y, const float* source,
                                             const Run* runs, const Run* end, const float* bias, float* to) {
  const Plane& plane = window.plane;
  const int64_t width = plane.result[1], step = plane.stride[0] * plane.source[1];
  const uint64_t* lanes = window.lanes;
  source += y * step;
  to += y * width;
  for (int64_t left = width; left > 0; left -= L) {
    if (window.is_large) prefetch_rows<R>(source + kAhead, step);
    Vec sums[R];
    if (bias) {
      MASKED_OPS_UNROLL
      for (int r = 0; r < R; ++r) sums[r] = Vec::set1(*bias);
    } else {
      load_rows(to, width, LoadSome{Vec::first(left)}, sums);
    }
    for (const Run* run = runs; run < end; ++run) {
      const LoadColumns<kStride> load = {lanes[run->x], int(plane.stride[1])};
      const auto multiply = [&](auto T) __attribute__((always_inline)) {
        constexpr int kTaps = decltype(T)::value;
        Vec weights[kTaps];
        MASKED_OPS_UNROLL
        for (int t = 0; t < kTaps; ++t) weights[t] = Vec::set1(run->weights[t]);
        multiply_run(source + run->offset, step, rows[run->y], load, weights, sums);
      };
      with_taps<kStride>(run->taps, multiply);
    }
    store_rows(sums, left, to, width);
    source += L * plane.stride[1];
    lanes += window.kernel[1];
    to += L;
  }
}

// body(which rows are inside, the first, Int<rows>(), Int<stride>()) for each tile.
template <typename Body>
MASKED_OPS_INLINE void for_tiles(const Window& window, const Body& body) {
  const int64_t height = window.plane.result[0];
  with_stride(window.plane.stride[1], [&](auto stride) {
    const uint32_t* rows = window.rows;
    for (int64_t y = 0; y < height; y += tile_of(height - y), rows += window.kernel[0]) {
      with_tile(tile_of(height - y), [&](auto R) { body(rows, y, R, stride); });
    }
  });
}

// Planes by tasks: neighbouring channels, in the order of memory; small planes of all images, so that the runs of a
// channel are listed once.
struct Tasks {
  int64_t of_channels, of_images, channel_blocks, count;

  Tasks(const Team& team, int64_t channels, int64_t images, int64_t floats) {
    of_images = floats >= tuning::kLargePlane ? 1 : images;
    const int64_t wanted = max<int64_t>(tuning::kDepthwiseTasks * team.threads * of_images / images, 1);
    of_channels = max<int64_t>(tuning::kPassGrain / (of_images * floats), 1);
    of_channels = min(of_channels, ceil_div(channels, wanted));
    channel_blocks = ceil_div(channels, of_channels);
    count = channel_blocks * ceil_div(images, of_images);
  }
};

// results[image][c] = bias[c] + sum over the sources of c; of a channel, all of its results, or sources, are
// neighbours.
void multiply(const Team& team, const Convolution& c, const Plane& plane, bool turned, const float* weight, Bits bits,
              const float* source, const float* bias, float* results) {
  const int64_t factor = c.out_channels / c.in_channels, channels = turned ? c.in_channels : c.out_channels;
  const int64_t sources = turned ? c.out_channels : c.in_channels, fan_in = turned ? factor : 1;
  const int64_t kernel = taps_of(c);
  const Window window(plane.filled(), c, turned);
  const Tasks tasks(team, channels, c.batch, plane.source_floats() + plane.result_floats());
  team.for_each(tasks.count, [&](int64_t task) {
    const int64_t first = task % tasks.channel_blocks * tasks.of_channels;
    const int64_t first_image = task / tasks.channel_blocks * tasks.of_images;
    // For each channel of the block and each of its sources its runs, and how many they are.
    const int64_t lists = (min(first + tasks.of_channels, channels) - first) * fan_in;
    Run* const runs = static_cast<Run*>(scratch(Slot::kValues, size_t(lists * kernel + 1) * sizeof(Run)));
    int64_t* const counts = static_cast<int64_t*>(scratch(Slot::kPlaces, size_t(lists) * sizeof(int64_t)));
    for (int64_t i = 0; i < lists; ++i) {
      const int64_t row = first * fan_in + i;
      counts[i] = window.list_runs(bits.row(row), weight + row * kernel, runs + i * kernel);
    }
    float* spread = nullptr;
    if (plane.is_spread()) {
      const size_t bytes = size_t(window.plane.source_floats()) * sizeof(float);
      spread = static_cast<float*>(scratch(Slot::kPanelB, bytes));
      std::memset(spread, 0, bytes);
    }
    for (int64_t image = first_image; image < min(first_image + tasks.of_images, c.batch); ++image) {
      for (int64_t i = 0; i < lists; ++i) {
        const int64_t row = first * fan_in + i, channel = row / fan_in;
        const float zero = 0, *const begin = i % fan_in ? nullptr : bias ? bias + channel : &zero;
        const float* from = source + (image * sources + (turned ? row : row / factor)) * plane.source_floats();
        if (spread && counts[i]) {
          plane.fill(from, spread);
          from = spread;
        }
        float* const to = results + (image * channels + channel) * plane.result_floats();
        const Run *const first_run = runs + i * kernel, *const end = first_run + counts[i];
        for_tiles(window, [&](const uint32_t* rows, int64_t y, auto R, auto stride) {
          multiply_rows<decltype(R)::value, decltype(stride)::value>(window, rows, y, from, first_run, end, begin, to);
        });
      }
    }
  });
}

// totals[run][tap][lane] += products of R rows of grad_output, from row y on, and what the taps read for them.
template <int R, int kStride>
__attribute__((noinline)) void correlate_rows(const Window& window, const uint32_t* rows, int64_t y,
                                              const float* source, const Run* runs, const Run* end,
                                              const float* grad_output, float* totals) {
  const Plane& plane = window.plane;
  const int64_t width = plane.result[1], step = plane.stride[0] * plane.source[1];
  const uint64_t* lanes = window.lanes;
  source += y * step;
  grad_output += y * width;
  for (int64_t left = width; left > 0; left -= L) {
    // Beyond the results both are zero.
    const Vec::Predicate wanted = Vec::first(left);
    const uint64_t elements = kStride == 2 ? (uint64_t{1} << min<int64_t>(2 * left, 32)) - 1 : uint64_t{wanted};
    if (window.is_large) {
      prefetch_rows<R>(source + kAhead, step);
      prefetch_rows<R>(grad_output + kAhead, width);
    }
    Vec results[R];
    load_rows(grad_output, width, LoadSome{wanted}, results);
    float* sums = totals;
    for (const Run* run = runs; run < end; ++run, sums += kRunTaps * L) {
      const LoadColumns<kStride> load = {lanes[run->x] & elements, int(plane.stride[1])};
      const auto correlate = [&](auto T) __attribute__((always_inline)) {
        correlate_run<R, decltype(T)::value>(source + run->offset, step, rows[run->y], load, results, sums, L);
      };
      with_taps<kStride>(run->taps, correlate);
    }
    source += L * plane.stride[1];
    lanes += window.kernel[1];
    grad_output += L;
  }
}

}  // namespace

void depthwise(const Team& team, const Convolution& c, const float* weight, Bits bits, Images<const float> input,
               const float* bias, float* output) {
  if (input.channels_last) return depthwise_last(team, c, weight, bits, input.data, bias, output);
  if (is_3x3(c)) return depthwise_3x3(team, c, /*turned=*/false, weight, bits, input.data, bias, output);
  multiply(team, c, forward_plane(c), /*turned=*/false, weight, bits, input.data, bias, output);
}

void depthwise_grad_input(const Team& team, const Convolution& c, const float* weight, Bits bits,
                          Images<const float> grad_output, const float* bias, float* grad_input) {
  if (grad_output.channels_last) {
    return depthwise_last_grad_input(team, c, weight, bits, grad_output.data, bias, grad_input);
  }
  if (is_3x3(c) && c.out_channels == c.in_channels) {
    return depthwise_3x3(team, c, /*turned=*/true, weight, bits, grad_output.data, bias, grad_input);
  }
  multiply(team, c, backward_plane(c), /*turned=*/true, weight, bits, grad_output.data, bias, grad_input);
}

void depthwise_grad_weight(const Team& team, const Convolution& c, Bits bits, Images<const float> grad_output,
                           const float* input, float* grad_weight) {
  if (grad_output.channels_last) {
    return depthwise_last_grad_weight(team, c, bits, grad_output.data, input, grad_weight);
  }
  if (is_3x3(c)) return depthwise_3x3_grad_weight(team, c, bits, grad_output.data, input, grad_weight);
  const Plane plane = forward_plane(c);
  const Window window(plane, c, /*turned=*/false);
  const int64_t factor = c.out_channels / c.in_channels, kernel = taps_of(c);
  const Tasks tasks(team, c.out_channels, c.batch, plane.source_floats() + plane.result_floats());
  // A channel is one thread's: its sums have one order.
  team.for_each(tasks.channel_blocks, [&](int64_t task) {
    const int64_t first = task * tasks.of_channels, count = min(tasks.of_channels, c.out_channels - first);
    Run* const runs = static_cast<Run*>(scratch(Slot::kValues, size_t(count * kernel + 1) * sizeof(Run)));
    int64_t* const counts = static_cast<int64_t*>(scratch(Slot::kPlaces, size_t(count) * sizeof(int64_t)));
    const size_t bytes = size_t(count * kernel * kRunTaps * L) * sizeof(float);
    float* const totals = static_cast<float*>(scratch(Slot::kAccumulator, bytes));  // [channel][run][tap][lane]
    std::memset(totals, 0, bytes);
    for (int64_t i = 0; i < count; ++i) {
      counts[i] = window.list_runs(bits.row(first + i), nullptr, runs + i * kernel);
    }
    for (int64_t image = 0; image < c.batch; ++image) {
      for (int64_t i = 0; i < count; ++i) {
        const int64_t channel = first + i;
        const float* const x = input + (image * c.in_channels + channel / factor) * plane.source_floats();
        const float* const g = grad_output.data + (image * c.out_channels + channel) * plane.result_floats();
        const Run* const of_channel = runs + i * kernel;
        for_tiles(window, [&](const uint32_t* rows, int64_t y, auto R, auto stride) {
          correlate_rows<decltype(R)::value, decltype(stride)::value>(
              window, rows, y, x, of_channel, of_channel + counts[i], g, totals + i * kernel * kRunTaps * L);
        });
      }
    }
    float* const to = grad_weight + first * kernel;
    std::memset(to, 0, size_t(count * kernel) * sizeof(float));
    for (int64_t i = 0; i < count; ++i) {
      const uint64_t* const row = bits.row(first + i);
      for (int64_t j = i * kernel; j < i * kernel + counts[i]; ++j) {
        for (int t = 0; t < runs[j].taps; ++t) {
          const int64_t place = window.place(runs[j].y + t, runs[j].x);
          if (!(row[place / 64] >> (place % 64) & 1)) continue;
          to[i * kernel + place] = Vec::load(totals + (j * kRunTaps + t) * L).sum();
        }
      }
    }
  });
}

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY
