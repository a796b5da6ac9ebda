// The depthwise convolution that most layers have, on contiguous images, and its gradients: kernels of 3 x 3, stride 1,
// padding 1, so that planes keep their size, and rows of at most a few vectors. The others: depthwise_planes.cpp.
//
// Rows are read and written in the order of memory: each is loaded once, shifted by a column to both sides in
// registers, and meets three rows of results. (Several short rows in a vector, with a load for each row of the kernel,
// took as long: 8 x 8 to 5 x 5, 14 to 9 ns a plane.)
#include "depthwise.h"
#include "kernels.h"

namespace masked_ops::cpu::MASKED_OPS_CAPABILITY {
namespace {

constexpr int L = Vec::kLanes;
constexpr int kTaps = 9;

// What the taps of a row of the kernel read for a vector.
struct Shifted {
  Vec taps[3];
};

// Planes whose rows are NV vectors, the last of which may lack some lanes.
template <int NV>
struct Rows {
  int64_t height, width;
  Vec::Predicate last;

  Rows(int64_t height, int64_t width) : height(height), width(width), last(Vec::first(width - (NV - 1) * L)) {}

  MASKED_OPS_INLINE void load(const float* from, Vec (&row)[NV]) const {
    MASKED_OPS_UNROLL
    for (int j = 0; j < NV; ++j) row[j] = j == NV - 1 ? Vec::loadu(last, from + j * L) : Vec::loadu(from + j * L);
  }
  MASKED_OPS_INLINE void store(const Vec (&row)[NV], float* to) const {
    MASKED_OPS_UNROLL
    for (int j = 0; j < NV; ++j) j == NV - 1 ? row[j].storeu(last, to + j * L) : row[j].storeu(to + j * L);
  }
  static MASKED_OPS_INLINE Shifted shifted(const Vec (&row)[NV], int j) {
    const Vec previous = j > 0 ? row[max(j - 1, 0)] : Vec::zero();
    const Vec next = j < NV - 1 ? row[min(j + 1, NV - 1)] : Vec::zero();
    return {{shift_up(previous, row[j]), row[j], shift_down(row[j], next)}};
  }
};

// body(rows) for those of a plane.
template <typename Body>
MASKED_OPS_INLINE void with_rows(int64_t height, int64_t width, const Body& body) {
  with_int<tuning::kRowVectors>(ceil_div(width, L), [&](auto NV) { body(Rows<decltype(NV)::value>(height, width)); });
}

// The weights that remain, and zeros.
struct Weights {
  alignas(64) float at[(kTaps + L - 1) / L * L];

  MASKED_OPS_INLINE Weights(const float* weight, uint64_t bits) {
    MASKED_OPS_UNROLL
    for (int t = 0; t < kTaps; t += L) Vec::loadu(Vec::predicate(bits >> t), weight + t).store(at + t);
  }
  // By row and column, as the results meet them.
  MASKED_OPS_INLINE void broadcast(bool turned, Vec (&w)[3][3]) const {
    const float* from = turned ? at + kTaps - 1 : at;
    const int64_t step = turned ? -1 : 1;
    MASKED_OPS_UNROLL
    for (int t = 0; t < kTaps; ++t, from += step) w[t / 3][t % 3] = Vec::set1(*from);
  }
};

// A plane.
template <int NV>
__attribute__((noinline)) void multiply(const Rows<NV> rows, const float* from, const Weights& weights, bool turned,
                                        float bias, float* to) {
  Vec w[3][3];
  weights.broadcast(turned, w);
  const Vec start = Vec::set1(bias);
  Vec sums[3][NV];  // of three rows of results
  const auto add = [&](Vec(&above)[NV], Vec(&here)[NV], Vec(&below)[NV]) __attribute__((always_inline)) {
    Vec row[NV];
    rows.load(from, row);
    MASKED_OPS_UNROLL
    for (int j = 0; j < NV; ++j) {
      const Shifted v = rows.shifted(row, j);
      below[j] = start;
      MASKED_OPS_UNROLL
      for (int i = 0; i < 3; ++i) {
        above[j] = fmadd(v.taps[i], w[2][i], above[j]);
        here[j] = fmadd(v.taps[i], w[1][i], here[j]);
        below[j] = fmadd(v.taps[i], w[0][i], below[j]);
      }
    }
    from += rows.width;
  };
  const auto store = [&](const Vec(&row)[NV]) __attribute__((always_inline)) {
    rows.store(row, to);
    to += rows.width;
  };
  MASKED_OPS_UNROLL
  for (int j = 0; j < NV; ++j) sums[0][j] = sums[2][j] = start;
  add(sums[2], sums[0], sums[1]);
  for (int64_t left = rows.height;;) {
    if (--left == 0) return store(sums[0]);
    add(sums[0], sums[1], sums[2]);
    store(sums[0]);
    if (--left == 0) return store(sums[1]);
    add(sums[1], sums[2], sums[0]);
    store(sums[1]);
    if (--left == 0) return store(sums[2]);
    add(sums[2], sums[0], sums[1]);
    store(sums[2]);
  }
}

struct Sums {
  Vec taps[3][3];

  MASKED_OPS_INLINE void load(const float* from) {
    MASKED_OPS_UNROLL
    for (int t = 0; t < kTaps; ++t) taps[t / 3][t % 3] = Vec::load(from + t * L);
  }
  MASKED_OPS_INLINE void store(float* to) const {
    MASKED_OPS_UNROLL
    for (int t = 0; t < kTaps; ++t) taps[t / 3][t % 3].store(to + t * L);
  }
};

// totals[tap][lane] += the products of grad_output and what the taps read, of a plane.
template <int NV>
__attribute__((noinline)) void correlate(const Rows<NV> rows, const float* from, const float* grad_output,
                                         float* totals) {
  Sums sums;
  sums.load(totals);
  Vec g[3][NV];  // three rows of grad_output
  int64_t left = rows.height;
  const auto add = [&](const Vec(&above)[NV], const Vec(&here)[NV], Vec(&below)[NV]) __attribute__((always_inline)) {
    Vec row[NV];
    rows.load(from, row);
    grad_output += rows.width;
    if (left > 1) {
      rows.load(grad_output, below);
    } else {
      MASKED_OPS_UNROLL
      for (int j = 0; j < NV; ++j) below[j] = Vec::zero();
    }
    MASKED_OPS_UNROLL
    for (int j = 0; j < NV; ++j) {
      const Shifted v = rows.shifted(row, j);
      MASKED_OPS_UNROLL
      for (int i = 0; i < 3; ++i) {
        sums.taps[0][i] = fmadd(v.taps[i], below[j], sums.taps[0][i]);
        sums.taps[1][i] = fmadd(v.taps[i], here[j], sums.taps[1][i]);
        sums.taps[2][i] = fmadd(v.taps[i], above[j], sums.taps[2][i]);
      }
    }
    from += rows.width;
  };
  MASKED_OPS_UNROLL
  for (int j = 0; j < NV; ++j) g[2][j] = Vec::zero();
  rows.load(grad_output, g[0]);
  for (;;) {
    add(g[2], g[0], g[1]);
    if (--left == 0) break;
    add(g[0], g[1], g[2]);
    if (--left == 0) break;
    add(g[1], g[2], g[0]);
    if (--left == 0) break;
  }
  sums.store(totals);
}

}  // namespace

bool is_3x3(const Convolution& c) {
  for (int d = 1; d < 3; ++d) {
    if (c.kernel[d] != 3 || c.stride[d] != 1 || c.padding[d] != 1 || c.dilation[d] != 1) return false;
  }
  return c.input[2] <= tuning::kRowVectors * L;
}

void depthwise_3x3(const Team& team, const Convolution& c, bool turned, const float* weight, Bits bits,
                   const float* source, const float* bias, float* results) {
  const int64_t floats = c.input[1] * c.input[2];
  const int64_t channels = c.out_channels, factor = channels / c.in_channels, planes = c.batch * channels;
  const int64_t tasks = min(planes, tuning::kDepthwiseTasks * team.threads);
  with_rows(c.input[1], c.input[2], [&](const auto& rows) {
    team.for_each(tasks, [&](int64_t task) {
      const int64_t first = planes * task / tasks, last = planes * (task + 1) / tasks;
      int64_t channel = first % channels;
      for (int64_t plane = first; plane < last; ++plane, channel = channel + 1 < channels ? channel + 1 : 0) {
        const float* const from = source + (factor > 1 ? plane / factor : plane) * floats;
        const Weights w(weight + channel * kTaps, bits.row(channel)[0]);
        multiply(rows, from, w, turned, bias ? bias[channel] : 0, results + plane * floats);
      }
    });
  });
}

void depthwise_3x3_grad_weight(const Team& team, const Convolution& c, Bits bits, const float* grad_output,
                               const float* input, float* grad_weight) {
  const int64_t floats = c.input[1] * c.input[2];
  const int64_t channels = c.out_channels, factor = channels / c.in_channels;
  const int64_t tasks = min(channels, tuning::kDepthwiseTasks * team.threads);
  // A channel is one thread's: its sums have one order.
  const auto correlate_channels = [&](const auto& rows, int64_t first, int64_t last) {
    const size_t bytes = size_t((last - first) * kTaps * L) * sizeof(float);
    float* const totals = static_cast<float*>(scratch(Slot::kAccumulator, bytes));  // [channel][tap][lane]
    std::memset(totals, 0, bytes);
    for (int64_t image = 0; image < c.batch; ++image) {
      for (int64_t channel = first; channel < last; ++channel) {
        if (bits.row(channel)[0] == 0) continue;
        const int64_t plane = image * channels + channel;
        correlate(rows, input + plane / factor * floats, grad_output + plane * floats,
                  totals + (channel - first) * kTaps * L);
      }
    }
    for (int64_t i = first * kTaps; i < last * kTaps; ++i) {
      const bool left = bits.row(i / kTaps)[0] >> (i % kTaps) & 1;
      grad_weight[i] = left ? Vec::load(totals + (i - first * kTaps) * L).sum() : 0;
    }
  };
  with_rows(c.input[1], c.input[2], [&](const auto& rows) {
    team.for_each(
        tasks, [&](int64_t task) { correlate_channels(rows, channels * task / tasks, channels * (task + 1) / tasks); });
  });
}

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY
