// Builds a SparseIndex: count the weights of each tile's rows, lay the arrays out, fill them. Panels are independent.
#include "sparse_index.h"

#include <cstdlib>
#include <new>  // placement

#include "index_matrices.h"
#include "tuning.h"

namespace masked_ops::cpu::MASKED_OPS_CAPABILITY {
namespace {

using tuning::kPanelRows;
using Run = SparseIndex::Run;
using Segment = SparseIndex::Segment;
using Tile = SparseIndex::Tile;

constexpr int kMaxCount = 256;  // columns of the widest block

// What becomes of a row of a tile: a segment of its own, or, beside the rows that follow, one of a block's.
enum class Role : uint8_t { kAlone, kFirst, kFurther };

// The number of weights of each row of a tile, and its role.
struct Counts {
  static constexpr int kBlockRows = SparseIndex::kBlockRows;
  int64_t rows;
  uint16_t of[kPanelRows];
  Role role[kPanelRows];

  template <typename Matrix>
  Counts(const Matrix& matrix, Span range, ColumnBlock cols) : rows(range.last - range.first), role{} {
    matrix.count(range, cols, of);
    if constexpr (requires { matrix.same_columns(0, 0, cols); }) {
      for (int64_t r = 0; r + kBlockRows <= rows; ++r) {
        int same = 1;
        while (same < kBlockRows && of[r] > 0 && of[r + same] == of[r] &&
               matrix.same_columns(range.first + r, range.first + r + same, cols)) {
          ++same;
        }
        if (same < kBlockRows) continue;
        role[r] = Role::kFirst;
        for (int i = 1; i < kBlockRows; ++i) role[r + i] = Role::kFurther;
        r += kBlockRows - 1;
      }
    }
  }
};

// Rows alone and blocks of rows, by their number of weights.
struct Histogram {
  uint32_t alone[kMaxCount + 1] = {}, blocks[kMaxCount + 1] = {};

  explicit Histogram(const Counts& counts) {
    for (int64_t r = 0; r < counts.rows; ++r) {
      alone[counts.of[r]] += counts.role[r] == Role::kAlone;
      blocks[counts.of[r]] += counts.role[r] == Role::kFirst;
    }
  }

  Tile sizes() const {
    Tile sizes = {};
    for (int n = 1; n <= kMaxCount; ++n) {
      sizes.entry += int64_t{n} * (alone[n] + blocks[n]);
      sizes.segment += alone[n] + Counts::kBlockRows * blocks[n];
      sizes.run += (alone[n] > 0) + (blocks[n] > 0);
    }
    return sizes;
  }
};

// Runs and segments of a tile, shortest first; starts[r] is where the entries of row r begin.
void lay_out(const Counts& counts, Run* runs, Segment* segments, uint32_t* starts) {
  constexpr int kBlockRows = Counts::kBlockRows;
  struct Place {
    uint32_t segment, entry;
  };
  const Histogram histogram(counts);
  Place alone[kMaxCount + 1], blocks[kMaxCount + 1], next = {};
  for (int n = 1; n <= kMaxCount; ++n) {
    const auto take = [&](uint32_t segments_of_run, int rows) {
      if (segments_of_run) *runs++ = {uint16_t(n), uint16_t(segments_of_run), uint16_t(rows)};
      const Place place = next;
      next.segment += segments_of_run * uint32_t(rows);
      next.entry += segments_of_run * uint32_t(n);
      return place;
    };
    alone[n] = take(histogram.alone[n], 1);
    blocks[n] = take(histogram.blocks[n], kBlockRows);
  }
  for (int64_t r = 0; r < counts.rows; ++r) {
    const int n = counts.of[r];
    if (n == 0 || counts.role[r] == Role::kFurther) continue;
    const bool single = counts.role[r] == Role::kAlone;
    Place& place = single ? alone[n] : blocks[n];
    for (int i = 0; i < (single ? 1 : kBlockRows); ++i) {
      segments[place.segment++] = {uint32_t(r + i), place.entry};
      starts[r + i] = place.entry;
    }
    place.entry += uint32_t(n);
  }
}

// How the matrix is cut.
struct Shape {
  int64_t rows, cols, nnz, group_rows, panel_rows, panels, block_cols, blocks;

  // Panels end at words of bits if they are columns of the weight, and their values can be numbered with 32 bits if
  // they are rows.
  Shape(int64_t rows, int64_t cols, int64_t nnz, bool transposed, int threads)
      : Shape(rows, rows, cols, nnz, transposed,
              min<int64_t>(tuning::kTasksPerThread * threads, ceil_div(rows, tuning::kMinPanelRows))) {}

  Shape(int64_t rows, int64_t group_rows, int64_t cols, int64_t nnz, bool transposed, int64_t wanted)
      : rows(rows),
        cols(cols),
        nnz(nnz),
        group_rows(group_rows),
        block_cols(cpu::block_cols(double(nnz) / (double(rows) * double(cols)))) {
    const int64_t step = transposed ? 64 : 16;
    const int64_t limit = transposed ? tuning::transposed_panel_rows(block_cols) : kMaxIndexNnz / max<int64_t>(cols, 1);
    const int64_t most = min(tuning::kPanelRows, limit) / step * step;
    panel_rows = ceil_div(ceil_div(group_rows, max(ceil_div(group_rows, most), wanted)), step) * step;
    panels = rows / group_rows * ceil_div(group_rows, panel_rows);
    blocks = ceil_div(cols, block_cols);
  }

  void set_block_cols(int64_t columns) {
    block_cols = columns;
    blocks = ceil_div(cols, columns);
  }
  Span rows_of(int64_t panel) const {
    const int64_t per_group = ceil_div(group_rows, panel_rows);
    const int64_t group = panel / per_group * group_rows, row = panel % per_group * panel_rows;
    return {group + row, group + min(group_rows, row + panel_rows)};
  }
  ColumnBlock cols_of(int64_t block) const {
    return {{block * block_cols, min(cols, (block + 1) * block_cols)}, block_cols};
  }
};

// One piece of memory: the struct, then the arrays by falling alignment. The last array ends where the memory does, so
// that tests/fence.c sees what is read behind it.
struct Arrays {
  SparseIndex* index;
  int64_t* panel_values;
  Tile* tiles;
  Segment* segments;
  uint32_t* positions;
  Run* runs;
  uint8_t* columns;

  Arrays(const Shape& shape, Tile total, bool transposed) {
    size_t bytes = sizeof(SparseIndex);
    const auto take = [&](int64_t n, size_t size) {
      const size_t offset = bytes;
      bytes += size_t(n) * size;
      return offset;
    };
    const size_t column_bytes = size_t(total.entry + SparseIndex::kLookahead);
    const size_t at[] = {take(shape.panels, sizeof(int64_t)),
                         take(shape.panels * shape.blocks + 1, sizeof(Tile)),
                         take(total.segment + 1, sizeof(Segment)),
                         take(transposed ? total.entry : 0, sizeof(uint32_t)),
                         take(total.run, sizeof(Run)),
                         take(int64_t(-(bytes + column_bytes) % alignof(SparseIndex)), 1),
                         take(int64_t(column_bytes), 1)};
    char* const memory = static_cast<char*>(std::aligned_alloc(alignof(SparseIndex), bytes));
    if (!memory) throw OutOfMemory(bytes, "the index of a mask");
    panel_values = reinterpret_cast<int64_t*>(memory + at[0]);
    tiles = reinterpret_cast<Tile*>(memory + at[1]);
    segments = reinterpret_cast<Segment*>(memory + at[2]);
    positions = reinterpret_cast<uint32_t*>(memory + at[3]);
    runs = reinterpret_cast<Run*>(memory + at[4]);
    columns = reinterpret_cast<uint8_t*>(memory + at[6]);
    segments[total.segment] = {};
    std::memset(columns + total.entry, 0, SparseIndex::kLookahead);
    index = new (memory) SparseIndex{shape.rows,       shape.cols,   shape.group_rows, shape.panel_rows, shape.panels,
                                     shape.block_cols, shape.blocks, shape.nnz,        transposed,       bytes,
                                     panel_values,     tiles,        segments,         positions,        runs,
                                     columns};
  }
};

template <typename Matrix>
SparseIndex* build(const Team& team, const Shape& shape, const Matrix& matrix, bool transposed) {
  const int64_t tiles = shape.panels * shape.blocks;
  Tile* const starts = static_cast<Tile*>(scratch(Slot::kPanelA, size_t(tiles + 1) * sizeof(Tile)));
  team.for_each(shape.panels, [&](int64_t panel) {
    const Span rows = shape.rows_of(panel);
    for (int64_t block = 0; block < shape.blocks; ++block) {
      const Counts counts(matrix, rows, shape.cols_of(block));
      starts[panel * shape.blocks + block] = Histogram(counts).sizes();
    }
  });
  Tile total = {};
  for (int64_t tile = 0; tile <= tiles; ++tile) {
    const Tile sizes = tile < tiles ? starts[tile] : Tile{};
    starts[tile] = total;
    total = {total.entry + sizes.entry, total.segment + sizes.segment, total.run + sizes.run};
  }

  const Arrays arrays(shape, total, transposed);
  std::memcpy(arrays.tiles, starts, size_t(tiles + 1) * sizeof(Tile));
  team.for_each(shape.panels, [&](int64_t panel) {
    const Span rows = shape.rows_of(panel);
    const int64_t n = rows.last - rows.first;
    const int64_t panel_value = transposed ? 0 : matrix.offsets[rows.first];
    arrays.panel_values[panel] = panel_value;
    uint32_t entries[kPanelRows], values[kPanelRows];
    for (int64_t r = 0; r < n && !transposed; ++r) values[r] = uint32_t(matrix.offsets[rows.first + r] - panel_value);
    for (int64_t block = 0; block < shape.blocks; ++block) {
      const ColumnBlock cols = shape.cols_of(block);
      const Tile* const tile = arrays.tiles + panel * shape.blocks + block;
      if (tile[0].entry == tile[1].entry) continue;
      const Counts counts(matrix, rows, cols);
      lay_out(counts, arrays.runs + tile->run, arrays.segments + tile->segment, entries);
      matrix.fill(rows, cols, entries, arrays.columns + tile->entry, arrays.positions + tile->entry);
      matrix.number(cols, arrays.columns + tile->entry, tile[1].entry - tile->entry);
      if (transposed) continue;
      for (int64_t s = tile[0].segment; s < tile[1].segment; ++s) {
        Segment& segment = arrays.segments[s];
        segment.value = values[segment.row];
        values[segment.row] += counts.of[segment.row];
      }
    }
  });
  return arrays.index;
}

}  // namespace

SparseIndex* make_index(const Team& team, Bits bits, int64_t rows, int64_t cols, const int64_t* offsets,
                        bool transposed) {
  const int64_t nnz = offsets[rows];
  if (transposed) {
    if (nnz >= kMaxIndexNnz) return nullptr;
    return build(team, Shape(cols, rows, nnz, true, team.threads), Transposed{bits, offsets}, true);
  }
  if (cols > kMaxIndexSide) return nullptr;
  return build(team, Shape(rows, cols, nnz, false, team.threads), Plain{bits, offsets}, false);
}

SparseIndex* make_conv_index(const Team& team, Bits bits, const Convolution& c, const int64_t* offsets,
                             bool transposed) {
  const int64_t nnz = offsets[c.out_channels], taps = c.kernel[0] * c.kernel[1] * c.kernel[2];
  const int64_t into = c.in_channels / c.groups, out = c.out_channels / c.groups;
  // The tasks are strips; only where those are few, panels as well.
  const auto panels = [&](int64_t rows) { return min<int64_t>(team.threads, ceil_div(rows, tuning::kConvPanelRows)); };
  const auto most_columns = [&](const Shape& shape) {
    return c.kernel[1] > 1 ? tuning::banded_block_cols(shape.block_cols) : shape.block_cols;
  };
  if (!transposed) {
    if (into * taps > kMaxIndexSide) return nullptr;
    Shape shape(c.out_channels, out, into * taps, nnz, false, panels(out));
    const Phase phase = {{forward_axis(c, 0), forward_axis(c, 1), forward_axis(c, 2)}};
    const TapBlocks blocks = phase.blocks(most_columns(shape));
    shape.set_block_cols(blocks.columns);
    return build(team, shape, Plain{bits, offsets, &blocks}, false);
  }
  if (nnz >= kMaxIndexNnz) return nullptr;
  Shape shape(c.in_channels, into, out * taps, nnz, true, panels(into));
  // Wide enough for the blocks of every class of taps, each of which begins a block.
  shape.block_cols = min<int64_t>(max(most_columns(shape), taps), kMaxCount);
  shape.blocks = for_tap_classes(c, shape.block_cols, [](int64_t, int64_t, int64_t, const TapBlocks&, int64_t) {});
  shape.cols = shape.blocks * shape.block_cols;
  return build(team, shape, Flipped(bits, offsets, c), true);
}

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY
