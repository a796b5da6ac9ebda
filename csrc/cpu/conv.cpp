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

// The columns of a phase.
struct Columns {
  TapBlocks blocks;
  int64_t channels;  // of a group
  int64_t taps, columns, first_block;

  Columns(const Convolution& c, const SparseIndex& index, const Phase& phase)
      : blocks(phase.blocks(index.block_cols)),
        channels((index.transposed ? c.out_channels : c.in_channels) / c.groups),
        taps(phase.taps()),
        columns(channels * taps),
        first_block(phase.first_block) {}

  // body(block of the index, first and last of its columns counted from the phase's first).
  template <typename Body>
  void for_blocks(const Body& body) const {
    for (int64_t j = 0; j < columns; j += blocks.columns) {
      body(first_block + j / blocks.columns, j, min(columns, j + blocks.columns));
    }
  }

  // Packs the channels of a group that columns [begin, end) belong to.
  template <typename Packer>
  const float* pack(const Packer& packer, int64_t group, int64_t begin, int64_t end) const {
    const int64_t first = begin / taps, last = ceil_div(end, taps);
    const PackedChannel& packed = packer.packed();
    float* const x = static_cast<float*>(scratch(Slot::kPanelA, packed.bytes(last - first)));
    packer.pack(group * channels + first, group * channels + last, x);
    return x + (begin - first * taps) * (packed.channel / taps);
  }
};

bool has_entries(const SparseIndex& index, int64_t block, int64_t first_panel, int64_t last_panel) {
  for (int64_t panel = first_panel; panel < last_panel; ++panel) {
    const SparseIndex::Tile* const tile = index.tiles + panel * index.blocks + block;
    if (tile[0].entry < tile[1].entry) return true;
  }
  return false;
}

// The values in the order of a transposed index's entries.
const float* in_order(const Team& team, const SparseIndex& index, const float* values) {
  const int64_t n = index.nnz;
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

  // Strips [first, last).
  void run(const Cut& cut, const Columns& columns, int64_t first, int64_t last, int64_t first_panel,
           int64_t last_panel) const {
    for (int64_t s = first; s < last; ++s) {
      const Strip strip(cut, s);
      with_packer(cut, columns.blocks, strip, from, Slot::kPlaces,
                  [&](const auto& packer) { run(strip, packer, columns, first_panel, last_panel); });
    }
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
        const float* const x = columns.pack(packer, group, begin, end);
        for (int64_t panel = first; panel < last; ++panel) {
          const int64_t tile = panel * index.blocks + block;
          const float* const v = values + (index.transposed ? index.tiles[tile].entry : index.panel_values[panel]);
          float* const sums = c + (index.row_of(panel) - row) * width;
          if (strip.banded()) {
            multiply_banded(index, tile, strip.vectors(), v, x, packer.packed().row, sums);
          } else {
            multiply_tile(index, tile, strip.vectors(), v, x, sums);
          }
        }
      });
      strip.store(c, row, rows, to);
    });
  }
};

// Into how many ranges of panels each strip is split, so that no thread waits for long. Each packs the strip anew.
int64_t splits_for(int64_t strips, int64_t panels, int threads) {
  int64_t splits = 1;
  while (splits < panels && double(ceil_div(strips * splits, threads) * threads) > 1.1 * double(strips * splits)) {
    ++splits;
  }
  return splits;
}

struct Sampling {
  const SparseIndex& index;
  const Cut& cut;     // of the positions of the output
  const Cut& output;  // the same, each of which reads itself
  const TapBlocks& itself;
  const Columns& columns;
  Memory<const float> input, grad_output;

  // Adds what strips [first, last) give to the panels' results, or sets it if they are the first.
  void run(int64_t first, int64_t last, int64_t first_panel, int64_t last_panel, float* results) const {
    for (int64_t s = first; s < last; ++s) {
      const Strip x_strip(cut, s), dy_strip(output, s);
      with_packer(cut, columns.blocks, x_strip, input, Slot::kPlaces, [&](const auto& x_packer) {
        with_packer(output, itself, dy_strip, grad_output, Slot::kMorePlaces, [&](const auto& dy_packer) {
          for_groups(index, first_panel, last_panel, [&](int64_t group, int64_t begin, int64_t end) {
            run_group(x_strip, x_packer, dy_packer, group, begin, end, results, s > first);
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
    dy_packer.pack(row, row + rows, dy);
    columns.for_blocks([&](int64_t block, int64_t begin, int64_t end) {
      if (!has_entries(index, block, first, last)) return;
      const float* const x = columns.pack(x_packer, group, begin, end);
      for (int64_t panel = first; panel < last; ++panel) {
        const int64_t tile = panel * index.blocks + block;
        const float* const dy_panel = dy + (index.row_of(panel) - row) * width;
        float* const to = results + index.panel_values[panel];
        if (strip.banded()) {
          sample_banded(index, tile, strip.vectors(), x, x_packer.packed().row, dy_panel, to, accumulate);
        } else {
          sample_tile(index, tile, strip.vectors(), x, dy_panel, to, accumulate);
        }
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
    const Columns columns(c, index, phase);
    const Cut cut(phase, columns.blocks, c.batch, team.threads);
    const int64_t strips = cut.strips(), splits = splits_for(strips, index.panels, team.threads);
    // Neighbours share lines of memory: they are one task, as far as there are enough of them.
    const int64_t parts = min(strips, tuning::kStripTasks * team.threads);
    team.for_each(parts * splits, [&](int64_t task) {
      const int64_t part = task / splits, split = task % splits;
      multiplication.run(cut, columns, strips * part / parts, strips * (part + 1) / parts,
                         index.panels * split / splits, index.panels * (split + 1) / splits);
    });
  });
}

void conv_sddmm(const Team& team, const Convolution& c, const SparseIndex& index, Images<const float> grad_output,
                Images<const float> input, float* grad_values) {
  const Phase output = {{identity_axis(c, 0), identity_axis(c, 1), identity_axis(c, 2)}};
  const Phase phase = {{forward_axis(c, 0), forward_axis(c, 1), forward_axis(c, 2)}};
  const Columns columns(c, index, phase);
  const Cut cut(phase, columns.blocks, c.batch, team.threads);
  Cut of_output = cut;
  of_output.phase = &output;
  const TapBlocks itself = output.blocks(1);
  const Sampling sampling = {index,
                             cut,
                             of_output,
                             itself,
                             columns,
                             Memory<const float>(input, c.in_channels, c.input),
                             Memory<const float>(grad_output, c.out_channels, c.output)};

  // Ranges of positions have results of their own, which are added up in their order: the sums do not depend on who
  // computed what.
  const int64_t nnz = index.nnz;
  const int64_t strips = cut.strips();
  const int64_t most = max<int64_t>(tuning::kPartialBytes / int64_t{sizeof(float)} / max<int64_t>(nnz, 1), 1);
  const int64_t parts = min(min<int64_t>(strips, 2 * team.threads), most);
  const int64_t splits = splits_for(parts, index.panels, team.threads);
  float* const partial = static_cast<float*>(scratch(Slot::kValues, size_t((parts - 1) * nnz) * sizeof(float)));
  team.for_each(parts * splits, [&](int64_t task) {
    const int64_t part = task / splits, split = task % splits;
    sampling.run(strips * part / parts, strips * (part + 1) / parts, index.panels * split / splits,
                 index.panels * (split + 1) / splits, part ? partial + (part - 1) * nnz : grad_values);
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
