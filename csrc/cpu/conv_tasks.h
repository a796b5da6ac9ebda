// How strips of positions and panels of rows are shared among threads.
#pragma once

#include "sparse_index.h"
#include "tuning.h"

namespace masked_ops::cpu::MASKED_OPS_CAPABILITY {

struct Span {
  int64_t first, last;
};

// Panels in runs of one group each: body(group, panels).
template <typename Body>
void for_groups(const SparseIndex& index, Span panels, const Body& body) {
  const int64_t per_group = index.panels_of_group();
  for (int64_t first = panels.first; first < panels.last;) {
    const int64_t group = first / per_group, end = min(panels.last, (group + 1) * per_group);
    body(group, Span{first, end});
    first = end;
  }
}

inline int64_t rows_of(const SparseIndex& index, Span panels) {
  return index.row_of(panels.last - 1) + index.rows_of(panels.last - 1) - index.row_of(panels.first);
}

// Of the panels' tiles in a block.
inline int64_t segments_of(const SparseIndex& index, int64_t block, Span panels) {
  int64_t segments = 0;
  for (int64_t panel = panels.first; panel < panels.last; ++panel) {
    const SparseIndex::Tile* const tile = index.tiles + panel * index.blocks + block;
    segments += tile[1].segment - tile[0].segment;
  }
  return segments;
}

// The values in the order of the index.
inline const float* in_order(const Team& team, const SparseIndex& index, const float* values) {
  if (!index.transposed) return values;
  const int64_t n = index.nnz;
  float* const ordered = static_cast<float*>(scratch(Slot::kValues, size_t(n) * sizeof(float)));
  team.for_each(ceil_div(n, tuning::kPassGrain), [&](int64_t task) {
    const int64_t last = min(n, (task + 1) * tuning::kPassGrain);
    for (int64_t i = task * tuning::kPassGrain; i < last; ++i) ordered[i] = values[index.positions[i]];
  });
  return ordered;
}

// Of these, what a tile's segments count from.
inline const float* values_of(const SparseIndex& index, const float* ordered, int64_t tile) {
  return ordered + (index.transposed ? index.tiles[tile].entry : index.panel_values[tile / index.blocks]);
}

// Where the sums of rows begin: with a panel's first tile that has entries, the rows of it that have none apart.
class Starts {
 public:
  // For the blocks of a phase and values in the order of rows, or zero if null.
  Starts(const SparseIndex& index, Span blocks, const float* values) {
    const int64_t panels = index.panels, rows = index.rows;
    values_ = static_cast<float*>(scratch(Slot::kTable, size_t(2 * rows + 2 * panels + 1) * sizeof(int32_t)));
    without_ = reinterpret_cast<int32_t*>(values_ + rows);
    first_of_ = without_ + rows;
    block_of_ = first_of_ + panels + 1;
    for (int64_t row = 0; row < rows; ++row) values_[row] = values ? values[row] : 0;
    int32_t count = 0;
    for (int64_t panel = 0; panel < panels; ++panel) {
      const SparseIndex::Tile* const tiles = index.tiles + panel * index.blocks;
      int64_t block = blocks.first;
      while (block < blocks.last && tiles[block].entry == tiles[block + 1].entry) ++block;
      block_of_[panel] = int32_t(block);
      first_of_[panel] = count;
      bool has[tuning::kPanelRows];
      std::memset(has, 0, size_t(index.rows_of(panel)));
      if (block < blocks.last) {
        for (int64_t s = tiles[block].segment; s < tiles[block + 1].segment; ++s) has[index.segments[s].row] = true;
      }
      for (int64_t row = 0; row < index.rows_of(panel); ++row) {
        if (!has[row]) without_[count++] = int32_t(row);
      }
    }
    first_of_[panels] = count;
  }

  // What the panel's sums in this block start from; null if they are there already.
  const float* of(const SparseIndex& index, int64_t panel, int64_t block) const {
    return block == block_of_[panel] ? values_ + index.row_of(panel) : nullptr;
  }
  // Sets the rows of a panel that its first tile does not.
  void set_others(const SparseIndex& index, int64_t panel, int vectors, int64_t pitch, float* c) const {
    for (int32_t i = first_of_[panel]; i < first_of_[panel + 1]; ++i) {
      const Vec value = Vec::set1(values_[index.row_of(panel) + without_[i]]);
      for (int j = 0; j < vectors; ++j) value.store(c + without_[i] * pitch + j * Vec::kLanes);
    }
  }

 private:
  float* values_;
  int32_t *without_, *first_of_, *block_of_;  // the rows without entries, panel by panel
};

// Into how many ranges of panels each strip is split, so that no thread waits for long. Each packs the strip anew.
inline int64_t splits_for(int64_t strips, int64_t panels, int threads) {
  int64_t splits = 1;
  while (splits < panels && double(ceil_div(strips * splits, threads) * threads) > 1.1 * double(strips * splits)) {
    ++splits;
  }
  return splits;
}

// body(strips, panels) for all of both. Neighbours share lines of memory: they are one task, as far as there are enough
// of them. A thread, whose tasks follow each other, has the values of its panels in L2 from strip to strip.
template <typename Body>
void for_strips(const Team& team, int64_t strips, int64_t panels, const Body& body) {
  const int64_t splits = splits_for(strips, panels, team.threads);
  const int64_t parts = min(strips, tuning::kStripTasks * team.threads);
  team.for_each(parts * splits, [&](int64_t task) {
    const int64_t part = task % parts, split = task / parts;
    body(Span{strips * part / parts, strips * (part + 1) / parts},
         Span{panels * split / splits, panels * (split + 1) / splits});
  });
}

// grad_values = the sum over all strips of what body(strips, panels, results) sets. Ranges of strips have results of
// their own, which are added up in their order: the sums do not depend on who computed what.
template <typename Body>
void add_up_strips(const Team& team, int64_t strips, const SparseIndex& index, float* grad_values, const Body& body) {
  const int64_t nnz = index.nnz, panels = index.panels;
  const int64_t most = max<int64_t>(tuning::kPartialBytes / int64_t{sizeof(float)} / max<int64_t>(nnz, 1), 1);
  const int64_t parts = min(min<int64_t>(strips, 2 * team.threads), most);
  const int64_t splits = splits_for(parts, panels, team.threads);
  float* const partial = static_cast<float*>(scratch(Slot::kValues, size_t((parts - 1) * nnz) * sizeof(float)));
  team.for_each(parts * splits, [&](int64_t task) {
    const int64_t part = task % parts, split = task / parts;
    body(Span{strips * part / parts, strips * (part + 1) / parts},
         Span{panels * split / splits, panels * (split + 1) / splits}, part ? partial + (part - 1) * nnz : grad_values);
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
