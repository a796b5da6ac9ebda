// Depthwise convolutions of up to two dimensions on images with their channels last, and their gradients, where each
// channel has one result.
//
// A vector holds neighbouring channels of a position. A tile of positions of a row loads once for a run of taps that
// follow each other; what lies beyond the border is left out. The masked weight is laid out as [tap][channel] before.
#include "conv_geometry.h"
#include "depthwise.h"
#include "kernels.h"

namespace masked_ops::cpu::MASKED_OPS_CAPABILITY {
namespace {

constexpr int L = Vec::kLanes;
using tuning::kDepthwiseTile;
constexpr int kMaxStride = kMaxDepthwiseStride;

// Taps of a row of the kernel whose sources follow each other.
struct Run {
  int64_t from;     // what the first reads for a position, in floats from where the position itself is in the first row
  int64_t weights;  // of the first, in the table; those of the others follow a step each
  int32_t tap, taps;
};

// A tile of positions: where what its runs read, and its results, lie.
struct Tile {
  const Run *runs, *end;
  const uint32_t* inside;  // [tap]: bit i, whether what it reads for position i is inside
  const float* source;
  int64_t step, weight_step;
  const float *table, *bias;
  float* to;
  int64_t to_step;
  bool is_large;  // as Grids'
  int64_t ahead;  // from source to the first row that the next row of results is the first to read
  int64_t rows_ahead, row_floats, vectors;  // such rows; of each and for each vector of results, what it reads anew
};

MASKED_OPS_INLINE void prefetch_vectors(const float* from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) prefetch_l2(from + i * L);
}

// Of what the next row of results reads first, the part of these channels if all were shared out in the order of
// memory.
template <int R>
MASKED_OPS_INLINE void prefetch_ahead(const Tile& tile, int64_t c) {
  if (!tile.is_large) return;
  const float* const from = tile.source + tile.ahead + c * R * tile.vectors;
  for (int64_t row = 0; row < tile.rows_ahead; ++row) prefetch_vectors(from + row * tile.row_floats, R * tile.vectors);
}

// Results that read the source alike lie on grids: all of a forward pass on one; of a gradient, those that agree in
// their remainders by the stride (see conv_geometry.h).
struct Grids {
  int64_t channels, kernel_width;
  int64_t pitch;          // of the table
  bool is_large;          // do images and results leave the caches before they are read again?
  int64_t remainders[2];  // of rows and columns
  Axis rows[kMaxStride], columns[kMaxStride];
  int64_t apart[kMaxStride];           // see taps_apart
  const uint32_t* inside[kMaxStride];  // [tile][tap]

  Grids(const Convolution& c, bool transposed) : channels(c.in_channels), kernel_width(c.kernel[2]) {
    pitch = ceil_div(channels, L) * L;
    is_large = c.batch * channels * c.input[1] * c.input[2] >= tuning::kManyFloats;
    int64_t bits = 0;
    for (int d = 0; d < 2; ++d) {
      remainders[d] = transposed ? min(c.stride[d + 1], c.input[d + 1]) : 1;
      for (int64_t i = 0; i < remainders[d]; ++i) {
        (d ? columns : rows)[i] = transposed ? backward_axis(c, d + 1, i) : forward_axis(c, d + 1);
      }
    }
    for (int64_t i = 0; i < remainders[1]; ++i) {
      apart[i] = taps_apart(columns[i]);
      for (int64_t left = columns[i].count; left > 0; left -= tile_of(left)) bits += columns[i].taps;
    }
    uint32_t* to = static_cast<uint32_t*>(scratch(Slot::kPlaces, size_t(bits) * sizeof(uint32_t)));
    for (int64_t i = 0; i < remainders[1]; ++i) {
      inside[i] = to;
      for (int64_t first = 0; first < columns[i].count; first += tile_of(columns[i].count - first)) {
        for (int64_t t = 0; t < columns[i].taps; ++t) *to++ = inside_of(columns[i], first, t);
      }
    }
  }

  // body(tile, Int<positions>(), its first one) for the tiles of a row over a source, without table and results.
  template <typename Body>
  void for_tiles(int64_t y, int64_t column, const float* source, Run* runs, const Body& body) const {
    const Axis& x = columns[column];
    const Axis& of_rows = rows[y % remainders[0]];
    Tile tile = {};
    tile.runs = runs;
    tile.end = runs + list_runs(of_rows, y / remainders[0], x, apart[column], runs);
    tile.inside = inside[column];
    tile.source = source;
    tile.step = x.step * channels;
    tile.rows_ahead = of_rows.step;
    tile.row_floats = x.size * channels;
    tile.vectors = x.step;
    const int64_t last_row = y / remainders[0] * of_rows.step + max(of_rows.at(0), of_rows.at(of_rows.taps - 1));
    tile.is_large = is_large;
    tile.ahead = (last_row + 1) * tile.row_floats;
    tile.weight_step = (x.shift_step < 0 ? -1 : 1) * apart[column] * x.tap_period * pitch;
    for (int64_t position = 0; position < x.count;) {
      const int64_t positions = tile_of(x.count - position);
      with_tile(positions, [&](auto R) { body(tile, R, position); });
      tile.inside += x.taps;
      tile.source += positions * tile.step;
      position += positions;
    }
  }

 private:
  int64_t list_runs(const Axis& y, int64_t row, const Axis& x, int64_t apart, Run* runs) const {
    const bool descending = x.shift_step < 0;
    const int64_t longest = apart ? kRunTaps * apart : x.taps;
    Run* run = runs;
    for (int64_t ty = 0; ty < y.taps; ++ty) {
      const int64_t source_row = row * y.step + y.at(ty), table_row = y.first_tap + ty * y.tap_period;
      if (source_row < 0 || source_row >= y.size) continue;
      for (int64_t k = 0; k < min(apart ? apart : x.taps, x.taps); ++k) {
        for (int64_t i = k; i < x.taps; i += longest, ++run) {
          const int64_t tx = descending ? x.taps - 1 - i : i;
          *run = {(source_row * x.size + x.at(tx)) * channels,
                  (table_row * kernel_width + x.first_tap + tx * x.tap_period) * pitch, int32_t(tx),
                  apart ? int32_t(min<int64_t>(kRunTaps, ceil_div(x.taps - i, apart))) : 1};
        }
      }
    }
    return run - runs;
  }
  // Taps so far apart read a position further on than the first for the same result; 0 if none do.
  static int64_t taps_apart(const Axis& x) {
    const int64_t distance = x.shift_step < 0 ? -x.shift_step : x.shift_step;
    return distance > 0 && x.step % distance == 0 ? x.step / distance : 0;
  }
  static uint32_t inside_of(const Axis& x, int64_t position, int64_t tap) {
    uint32_t bits = 0;
    for (int i = 0; i < kDepthwiseTile + kRunTaps - 1; ++i) {
      bits |= uint32_t(uint64_t((position + i) * x.step + x.at(tap)) < uint64_t(x.size)) << i;
    }
    return bits;
  }
};

// In the channels of a vector, of which n are left.
template <int R, typename Load>
MASKED_OPS_INLINE void multiply_vector(const Tile& tile, int64_t c, const Load& load, int64_t n) {
  Vec sums[R];
  MASKED_OPS_UNROLL
  for (int r = 0; r < R; ++r) sums[r] = tile.bias ? load(tile.bias + c) : Vec::zero();
  for (const Run* run = tile.runs; run < tile.end; ++run) {
    const auto multiply = [&](auto T) __attribute__((always_inline)) {
      constexpr int kTaps = decltype(T)::value;
      Vec weights[kTaps];
      MASKED_OPS_UNROLL
      for (int t = 0; t < kTaps; ++t) weights[t] = Vec::load(tile.table + c + run->weights + t * tile.weight_step);
      multiply_run(tile.source + c + run->from, tile.step, tile.inside[run->tap], load, weights, sums);
    };
    with_int<kRunTaps>(run->taps, multiply);
  }
  store_rows(sums, n, tile.to + c, tile.to_step);
}

template <int R>
__attribute__((noinline)) void multiply_tile(const Tile& tile, int64_t channels) {
  int64_t c = 0;
  for (; c + L <= channels; c += L) {
    prefetch_ahead<R>(tile, c);
    multiply_vector<R>(tile, c, LoadAll(), L);
  }
  if (c < channels) multiply_vector<R>(tile, c, LoadSome{Vec::first(channels - c)}, channels - c);
}

int64_t taps_of(const Convolution& c) { return c.kernel[1] * c.kernel[2]; }

// The masked weight as [tap][channel].
const float* table_of(const Convolution& c, const float* weight, Bits bits) {
  const int64_t taps = taps_of(c), pitch = ceil_div(c.in_channels, L) * L;
  float* const table = static_cast<float*>(scratch(Slot::kTable, size_t(taps * pitch) * sizeof(float)));
  for (int64_t channel = 0; channel < c.in_channels; ++channel) {
    const uint64_t* const row = bits.row(channel);
    for (int64_t t = 0; t < taps; ++t) {
      table[t * pitch + channel] = row[t / 64] >> (t % 64) & 1 ? weight[channel * taps + t] : 0;
    }
  }
  return table;
}

void multiply(const Team& team, const Convolution& c, bool transposed, const float* weight, Bits bits,
              const float* source, const float* bias, float* results) {
  const float* const table = table_of(c, weight, bits);
  const Grids grids(c, transposed);
  const int64_t channels = c.in_channels;
  const auto &from_size = transposed ? c.output : c.input, &to_size = transposed ? c.input : c.output;
  const int64_t rows = c.batch * to_size[1], image_floats = from_size[1] * from_size[2] * channels;
  const int64_t tasks = min(rows, tuning::kDepthwiseTasks * team.threads);
  team.for_each(tasks, [&](int64_t task) {
    Run* const runs = static_cast<Run*>(scratch(Slot::kValues, size_t(taps_of(c)) * sizeof(Run)));
    for (int64_t i = rows * task / tasks; i < rows * (task + 1) / tasks; ++i) {
      const int64_t image = i / to_size[1], y = i % to_size[1];
      for (int64_t column = 0; column < grids.remainders[1]; ++column) {
        const Axis& x = grids.columns[column];
        float* const to = results + (i * to_size[2] + x.to_first) * channels;
        const int64_t to_step = x.to_step * channels;
        const auto body = [&](Tile& tile, auto R, int64_t position) {
          tile.table = table;
          tile.bias = bias;
          tile.to = to + position * to_step;
          tile.to_step = to_step;
          multiply_tile<decltype(R)::value>(tile, channels);
        };
        grids.for_tiles(y, column, source + image * image_floats, runs, body);
      }
    }
  });
}

// sums[tap][channel] += products of R positions of grad_output and what the taps read for them.
template <int R, typename Load>
MASKED_OPS_INLINE void correlate_vector(const Tile& tile, int64_t c, const Load& load, const float* grad_output,
                                        int64_t channels, float* sums) {
  Vec results[R];
  load_rows(grad_output + c, channels, load, results);
  for (const Run* run = tile.runs; run < tile.end; ++run) {
    const auto correlate = [&](auto T) __attribute__((always_inline)) {
      correlate_run<R, decltype(T)::value>(tile.source + c + run->from, tile.step, tile.inside[run->tap], load, results,
                                           sums + c + run->weights, tile.weight_step);
    };
    with_int<kRunTaps>(run->taps, correlate);
  }
}

template <int R>
__attribute__((noinline)) void correlate_tile(const Tile& tile, const float* grad_output, int64_t channels,
                                              int64_t row_floats, float* sums) {
  int64_t c = 0;
  for (; c + L <= channels; c += L) {
    prefetch_ahead<R>(tile, c);
    if (tile.is_large) prefetch_vectors(grad_output + row_floats + c * R, R);
    correlate_vector<R>(tile, c, LoadAll(), grad_output, channels, sums);
  }
  if (c < channels) {
    correlate_vector<R>(tile, c, LoadSome{Vec::first(channels - c)}, grad_output, channels, sums);
  }
}

}  // namespace

void depthwise_last(const Team& team, const Convolution& c, const float* weight, Bits bits, const float* input,
                    const float* bias, float* output) {
  multiply(team, c, /*transposed=*/false, weight, bits, input, bias, output);
}

void depthwise_last_grad_input(const Team& team, const Convolution& c, const float* weight, Bits bits,
                               const float* grad_output, const float* bias, float* grad_input) {
  multiply(team, c, /*transposed=*/true, weight, bits, grad_output, bias, grad_input);
}

void depthwise_last_grad_weight(const Team& team, const Convolution& c, Bits bits, const float* grad_output,
                                const float* input, float* grad_weight) {
  const Grids grids(c, /*transposed=*/false);
  const int64_t channels = c.in_channels, taps = taps_of(c), floats = taps * grids.pitch;
  const int64_t rows = c.batch * c.output[1], image_floats = c.input[1] * c.input[2] * channels;
  const int64_t row_floats = c.output[2] * channels;
  const int64_t tasks = min(rows, tuning::kDepthwiseTasks * team.threads);
  // Sums of a task by themselves: they have one order.
  float* const sums = static_cast<float*>(scratch(Slot::kAccumulator, size_t(tasks * floats) * sizeof(float)));
  team.for_each(tasks, [&](int64_t task) {
    Run* const runs = static_cast<Run*>(scratch(Slot::kValues, size_t(taps) * sizeof(Run)));
    float* const of_task = sums + task * floats;
    std::memset(of_task, 0, size_t(floats) * sizeof(float));
    for (int64_t i = rows * task / tasks; i < rows * (task + 1) / tasks; ++i) {
      const float* const g = grad_output + i * row_floats;
      const auto body = [&](const Tile& tile, auto R, int64_t position) {
        correlate_tile<decltype(R)::value>(tile, g + position * channels, channels, row_floats, of_task);
      };
      grids.for_tiles(i % c.output[1], 0, input + i / c.output[1] * image_floats, runs, body);
    }
  });
  for (int64_t task = 1; task < tasks; ++task) {
    for (int64_t i = 0; i < floats; i += L) (Vec::load(sums + i) + Vec::load(sums + task * floats + i)).store(sums + i);
  }
  for (int64_t channel = 0; channel < channels; ++channel) {
    const uint64_t* const row = bits.row(channel);
    for (int64_t t = 0; t < taps; ++t) {
      grad_weight[channel * taps + t] = row[t / 64] >> (t % 64) & 1 ? sums[t * grids.pitch + channel] : 0;
    }
  }
}

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY
