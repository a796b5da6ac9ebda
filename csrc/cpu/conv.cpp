// Sparse convolution: im2col strip by strip, then the tiles of spmm.cpp and sddmm.cpp.
//
// A task takes a strip of positions through all blocks of columns; of each it packs the strip's input into L1 and
// multiplies all rows with it, whose sums, [row][lanes], stay in L2. Nothing that it keeps grows with the batch.
#include "im2col.h"
#include "kernels.h"

namespace masked_ops::cpu::MASKED_OPS_CAPABILITY {
namespace {

constexpr int L = Vec::kLanes;

// Panels [first, last) in runs of one group each: body(group, first, last).
template <typename Body>
void for_groups(const SparseIndex& index, int64_t first, int64_t last, const Body& body) {
  const int64_t per_group = index.panels_of_group();
  while (first < last) {
    const int64_t group = first / per_group, end = min(last, (group + 1) * per_group);
    body(group, first, end);
    first = end;
  }
}

int64_t rows_between(const SparseIndex& index, int64_t first, int64_t last) {
  return index.row_of(last - 1) + index.rows_of(last - 1) - index.row_of(first);
}

// The matrix of a phase: which channels of the source and blocks of the index it has.
struct Columns {
  int64_t channels;  // of a group
  int64_t columns, first_block, block_cols;

  Columns(const Convolution& c, const SparseIndex& index, const Phase& phase)
      : channels((index.transposed ? c.out_channels : c.in_channels) / c.groups),
        columns(channels * phase.taps()),
        first_block(phase.first_block),
        block_cols(index.block_cols) {}

  // body(block of the index, first and last of its columns counted from the phase's first).
  template <typename Body>
  void for_blocks(const Body& body) const {
    for (int64_t j = 0; j < columns; j += block_cols) {
      body(first_block + j / block_cols, j, min(columns, j + block_cols));
    }
  }
};

bool has_entries(const SparseIndex& index, int64_t block, int64_t first_panel, int64_t last_panel) {
  for (int64_t panel = first_panel; panel < last_panel; ++panel) {
    const SparseIndex::Tile* const tile = index.tiles + panel * index.blocks + block;
    if (tile[0].entry < tile[1].entry) return true;
  }
  return false;
}

float* block_of_input(const SparseIndex& index, int64_t width) {
  return static_cast<float*>(scratch(Slot::kPanelA, size_t(index.block_cols * width) * sizeof(float)));
}

// The values in the order of a transposed index's entries.
const float* in_order(const Team& team, const SparseIndex& index, const float* values) {
  const int64_t tiles = index.panels * index.blocks, n = index.tiles[tiles].entry;
  float* const ordered = static_cast<float*>(scratch(Slot::kValues, size_t(n) * sizeof(float)));
  team.for_each(ceil_div(n, tuning::kPassGrain), [&](int64_t task) {
    const int64_t last = min(n, (task + 1) * tuning::kPassGrain);
    for (int64_t i = task * tuning::kPassGrain; i < last; ++i) ordered[i] = values[index.positions[i]];
  });
  return ordered;
}

struct Multiplication {
  const SparseIndex& index;
  const float* values;  // in order, if the index is transposed
  const float* bias;
  Memory<const float> from;
  Memory<float> to;

  void run(const Strip& strip, const Columns& columns, int64_t first_panel, int64_t last_panel) const {
    with_packer(
        strip, from, [](size_t bytes) { return scratch(Slot::kPanelB, bytes); },
        [&](const auto& packer) { run(strip, packer, columns, first_panel, last_panel); });
  }

 private:
  template <typename Packer>
  void run(const Strip& strip, const Packer& packer, const Columns& columns, int64_t first_panel,
           int64_t last_panel) const {
    for_groups(index, first_panel, last_panel, [&](int64_t group, int64_t first, int64_t last) {
      const int64_t row = index.row_of(first), rows = rows_between(index, first, last), width = strip.width();
      float* const c =
          static_cast<float*>(scratch(Slot::kAccumulator, size_t(ceil_div(rows, L) * L * width) * sizeof(float)));
      start_from_bias(bias ? bias + row : nullptr, rows, width, c);
      columns.for_blocks([&](int64_t block, int64_t begin, int64_t end) {
        if (!has_entries(index, block, first, last)) return;
        float* const x = block_of_input(index, width);
        packer.pack(group * columns.channels, begin, end, x);
        for (int64_t panel = first; panel < last; ++panel) {
          const int64_t tile = panel * index.blocks + block;
          const float* const v = values + (index.transposed ? index.tiles[tile].entry : index.panel_values[panel]);
          multiply_tile(index, tile, strip.vectors(), v, x, c + (index.row_of(panel) - row) * width);
        }
      });
      strip.store(c, row, rows, to);
    });
  }
};

// Lanes of a strip: half as many as there can be if there are not enough strips to share them evenly.
int64_t width_for(int64_t positions, int threads) {
  constexpr int64_t kWidest = tuning::kMaxVectors * L;
  return positions < 4 * threads * kWidest ? kWidest / 2 : kWidest;
}

// Into how many ranges of panels each strip is split, so that there are tasks for all threads.
int64_t splits_for(int64_t strips, int64_t panels, int threads) {
  return strips >= 2 * threads ? 1 : min<int64_t>(panels, ceil_div(2 * threads, strips));
}

struct Sampling {
  const SparseIndex& index;
  const Phase& phase;
  const Phase& output;  // of which every position reads itself
  Columns columns;
  Memory<const float> input, grad_output;

  // Adds what positions [first, last) give to the panels' results, or sets it if they are the first.
  void run(int64_t first, int64_t last, int64_t first_panel, int64_t last_panel, float* results) const {
    constexpr int64_t kWidth = tuning::kMaxVectors * L;
    for (int64_t at = first; at < last; at += kWidth) {
      const Strip x_strip(phase, at, min(kWidth, last - at)), dy_strip(output, at, min(kWidth, last - at));
      const auto of_x = [](size_t bytes) { return scratch(Slot::kPanelB, bytes); };
      const auto of_dy = [](size_t bytes) { return scratch(Slot::kPieces, bytes); };
      with_packer(x_strip, input, of_x, [&](const auto& x_packer) {
        with_packer(dy_strip, grad_output, of_dy, [&](const auto& dy_packer) {
          for_groups(index, first_panel, last_panel, [&](int64_t group, int64_t begin, int64_t end) {
            run_group(x_strip, x_packer, dy_packer, group, begin, end, results, at > first);
          });
        });
      });
    }
  }

 private:
  template <typename XPacker, typename DyPacker>
  void run_group(const Strip& strip, const XPacker& x_packer, const DyPacker& dy_packer, int64_t group, int64_t first,
                 int64_t last, float* results, bool accumulate) const {
    const int64_t row = index.row_of(first), rows = rows_between(index, first, last), width = strip.width();
    float* const dy = static_cast<float*>(scratch(Slot::kAccumulator, size_t(rows * width) * sizeof(float)));
    dy_packer.pack(row, 0, rows, dy);
    columns.for_blocks([&](int64_t block, int64_t begin, int64_t end) {
      if (!has_entries(index, block, first, last)) return;
      float* const x = block_of_input(index, width);
      x_packer.pack(group * columns.channels, begin, end, x);
      for (int64_t panel = first; panel < last; ++panel) {
        sample_tile(index, panel * index.blocks + block, strip.vectors(), x, dy + (index.row_of(panel) - row) * width,
                    results + index.panel_values[panel], accumulate);
      }
    });
  }
};

Axis identity_axis(const Convolution& c, int d) {
  return {c.output[d], 1, c.output[d], 1, 0, 0, c.output[d], 0, 1, 0, 1};
}

}  // namespace

void conv_spmm(const Team& team, const Convolution& c, const SparseIndex& index, const float* values,
               Images<const float> input, const float* bias, Images<float> output) {
  const bool transposed = index.transposed;
  const Memory<const float> from(input, transposed ? c.out_channels : c.in_channels, transposed ? c.output : c.input);
  const Memory<float> to(output, transposed ? c.in_channels : c.out_channels, transposed ? c.input : c.output);
  const Multiplication multiplication = {index, transposed ? in_order(team, index, values) : values, bias, from, to};
  for_phases(c, transposed, index.block_cols, [&](const Phase& phase) {
    const int64_t positions = c.batch * phase.positions(), width = width_for(positions, team.threads);
    const int64_t strips = ceil_div(positions, width), splits = splits_for(strips, index.panels, team.threads);
    const Columns columns(c, index, phase);
    team.for_each(strips * splits, [&](int64_t task) {
      const int64_t first = task / splits * width, split = task % splits;
      const Strip strip(phase, first, min(width, positions - first));
      multiplication.run(strip, columns, index.panels * split / splits, index.panels * (split + 1) / splits);
    });
  });
}

void conv_sddmm(const Team& team, const Convolution& c, const SparseIndex& index, Images<const float> grad_output,
                Images<const float> input, float* grad_values) {
  constexpr int64_t kWidth = tuning::kMaxVectors * L;
  const Phase output = {{identity_axis(c, 0), identity_axis(c, 1), identity_axis(c, 2)}};
  const Phase phase = {{forward_axis(c, 0), forward_axis(c, 1), forward_axis(c, 2)}};
  const Sampling sampling = {index,
                             phase,
                             output,
                             Columns(c, index, phase),
                             Memory<const float>(input, c.in_channels, c.input),
                             Memory<const float>(grad_output, c.out_channels, c.output)};

  // Ranges of positions have results of their own, which are added up in their order: the sums do not depend on who
  // computed what.
  const int64_t nnz = index.tiles[index.panels * index.blocks].entry;
  const int64_t positions = c.batch * phase.positions(), strips = ceil_div(positions, kWidth);
  const int64_t most = max<int64_t>(tuning::kPartialBytes / int64_t{sizeof(float)} / max<int64_t>(nnz, 1), 1);
  const int64_t parts = min(min<int64_t>(strips, 2 * team.threads), most);
  const int64_t splits = splits_for(parts, index.panels, team.threads);
  float* const partial = static_cast<float*>(scratch(Slot::kValues, size_t((parts - 1) * nnz) * sizeof(float)));
  team.for_each(parts * splits, [&](int64_t task) {
    const int64_t part = task / splits, split = task % splits;
    const int64_t first = strips * part / parts * kWidth, last = min(positions, strips * (part + 1) / parts * kWidth);
    sampling.run(first, last, index.panels * split / splits, index.panels * (split + 1) / splits,
                 part ? partial + (part - 1) * nnz : grad_values);
  });
  if (parts == 1) return;
  team.for_each(ceil_div(nnz, tuning::kPassGrain), [&](int64_t task) {
    const int64_t last = min(nnz, (task + 1) * tuning::kPassGrain);
    for (int64_t part = 0; part + 1 < parts; ++part) {
      for (int64_t i = task * tuning::kPassGrain; i < last; ++i) grad_values[i] += partial[part * nnz + i];
    }
  });
}

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY
