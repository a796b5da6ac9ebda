// Builds a SparseIndex: count the weights of each tile's rows, lay the arrays out, fill them. Panels are independent.
#include "sparse_index.h"

#include <cstdlib>
#include <new>

#include "kernels.h"
#include "tuning.h"

namespace masked_ops::cpu::MASKED_OPS_CAPABILITY {
namespace {

using tuning::kPanelRows;
using Run = SparseIndex::Run;
using Segment = SparseIndex::Segment;
using Tile = SparseIndex::Tile;

constexpr int kMaxCount = 256;  // columns of the widest block

template <typename Body>
MASKED_OPS_INLINE void for_bits(uint64_t word, const Body& body) {
  for (; word; word &= word - 1) body(__builtin_ctzll(word));
}

struct Range {
  int64_t first, last;
};

// A weight as it is: rows are rows, a block is a range of words in each.
struct Plain {
  Bits bits;
  const int64_t* offsets;

  void count(Range rows, Range cols, uint16_t* counts) const {
    for (int64_t r = rows.first; r < rows.last; ++r) {
      int64_t n = 0;
      for (int64_t w = cols.first / 64; w < ceil_div(cols.last, 64); ++w) n += __builtin_popcountll(bits.row(r)[w]);
      *counts++ = uint16_t(n);
    }
  }

  // Entries of row r go to starts[r] and on.
  void fill(Range rows, Range cols, uint32_t* starts, uint8_t* columns, uint32_t*) const {
    for (int64_t r = rows.first; r < rows.last; ++r) {
      uint8_t* to = columns + *starts++;
      for (int64_t w = cols.first / 64; w < ceil_div(cols.last, 64); ++w) {
        for_bits(bits.row(r)[w], [&](int i) { *to++ = uint8_t(w * 64 + i - cols.first); });
      }
    }
  }
};

// Its transpose: rows are columns of the weight, a panel is a range of words in each of its rows.
struct Transposed {
  Bits bits;
  const int64_t* offsets;

  void count(Range rows, Range cols, uint16_t* counts) const {
    for (int64_t r = rows.first; r < rows.last; ++r) counts[r - rows.first] = 0;
    for (int64_t c = cols.first; c < cols.last; ++c) {
      for (int64_t w = rows.first / 64; w < ceil_div(rows.last, 64); ++w) {
        for_bits(bits.row(c)[w], [&](int i) { ++counts[w * 64 + i - rows.first]; });
      }
    }
  }

  void fill(Range rows, Range cols, uint32_t* starts, uint8_t* columns, uint32_t* positions) const {
    for (int64_t c = cols.first; c < cols.last; ++c) {
      int64_t position = offsets[c];
      for (int64_t w = 0; w < rows.first / 64; ++w) position += __builtin_popcountll(bits.row(c)[w]);
      for (int64_t w = rows.first / 64; w < ceil_div(rows.last, 64); ++w) {
        for_bits(bits.row(c)[w], [&](int i) {
          const uint32_t entry = starts[w * 64 + i - rows.first]++;
          columns[entry] = uint8_t(c - cols.first);
          positions[entry] = uint32_t(position++);
        });
      }
    }
  }
};

// Rows of a tile by their number of weights.
struct Histogram {
  uint32_t rows[kMaxCount + 1] = {};

  Histogram(const uint16_t* counts, int64_t n) {
    for (int64_t r = 0; r < n; ++r) ++rows[counts[r]];
  }

  Tile sizes() const {
    Tile sizes = {};
    for (int n = 1; n <= kMaxCount; ++n) {
      sizes.entry += int64_t{n} * rows[n];
      sizes.segment += rows[n];
      sizes.run += rows[n] > 0;
    }
    return sizes;
  }
};

// Runs and segments of a tile, shortest first; starts[r] is where the entries of row r begin.
void lay_out(const uint16_t* counts, int64_t n, Run* runs, Segment* segments, uint32_t* starts) {
  const Histogram histogram(counts, n);
  uint32_t segment[kMaxCount + 1], entry[kMaxCount + 1];
  uint32_t next_segment = 0, next_entry = 0;
  for (int count = 1; count <= kMaxCount; ++count) {
    const uint32_t rows = histogram.rows[count];
    if (rows) *runs++ = {uint16_t(count), uint16_t(rows)};
    segment[count] = next_segment;
    entry[count] = next_entry;
    next_segment += rows;
    next_entry += rows * uint32_t(count);
  }
  for (int64_t r = 0; r < n; ++r) {
    const int count = counts[r];
    if (count == 0) continue;
    segments[segment[count]++] = {uint32_t(r), entry[count]};
    starts[r] = entry[count];
    entry[count] += uint32_t(count);
  }
}

struct Shape {
  int64_t rows, cols, panel_rows, panels, block_cols, blocks;

  // Panels end at words of bits if they are columns of the weight, and their values can be numbered with 32 bits if
  // they are rows.
  Shape(int64_t rows, int64_t cols, int64_t nnz, bool transposed, int threads)
      : rows(rows), cols(cols), block_cols(tuning::block_cols(double(nnz) / (double(rows) * double(cols)))) {
    const int64_t step = transposed ? 64 : 16;
    const int64_t limit = transposed ? tuning::transposed_panel_rows(block_cols) : kMaxIndexNnz / max<int64_t>(cols, 1);
    const int64_t most = min(tuning::kPanelRows, limit) / step * step;
    const int64_t wanted = min<int64_t>(tuning::kTasksPerThread * threads, ceil_div(rows, tuning::kMinPanelRows));
    panel_rows = ceil_div(ceil_div(rows, max(ceil_div(rows, most), wanted)), step) * step;
    panels = ceil_div(rows, panel_rows);
    blocks = ceil_div(cols, block_cols);
  }
  Range rows_of(int64_t panel) const { return {panel * panel_rows, min(rows, (panel + 1) * panel_rows)}; }
  Range cols_of(int64_t block) const { return {block * block_cols, min(cols, (block + 1) * block_cols)}; }
};

// One piece of memory: the struct, then the arrays by falling alignment.
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
    const size_t at[] = {take(shape.panels, sizeof(int64_t)),
                         take(shape.panels * shape.blocks + 1, sizeof(Tile)),
                         take(total.segment + 1, sizeof(Segment)),
                         take(transposed ? total.entry : 0, sizeof(uint32_t)),
                         take(total.run, sizeof(Run)),
                         take(total.entry + SparseIndex::kLookahead, 1)};
    char* const memory = static_cast<char*>(std::malloc(bytes));
    if (!memory) throw std::bad_alloc();
    panel_values = reinterpret_cast<int64_t*>(memory + at[0]);
    tiles = reinterpret_cast<Tile*>(memory + at[1]);
    segments = reinterpret_cast<Segment*>(memory + at[2]);
    positions = reinterpret_cast<uint32_t*>(memory + at[3]);
    runs = reinterpret_cast<Run*>(memory + at[4]);
    columns = reinterpret_cast<uint8_t*>(memory + at[5]);
    segments[total.segment] = {};
    std::memset(columns + total.entry, 0, SparseIndex::kLookahead);
    index =
        new (memory) SparseIndex{shape.rows, shape.cols, shape.panel_rows, shape.panels, shape.block_cols, shape.blocks,
                                 transposed, bytes,      panel_values,     tiles,        segments,         positions,
                                 runs,       columns};
  }
};

template <typename Matrix>
SparseIndex* build(const Team& team, const Shape& shape, const Matrix& matrix, bool transposed) {
  const int64_t tiles = shape.panels * shape.blocks;
  Tile* const starts = static_cast<Tile*>(scratch(Slot::kPanelA, size_t(tiles + 1) * sizeof(Tile)));
  team.for_each(shape.panels, [&](int64_t panel) {
    const Range rows = shape.rows_of(panel);
    uint16_t counts[kPanelRows];
    for (int64_t block = 0; block < shape.blocks; ++block) {
      matrix.count(rows, shape.cols_of(block), counts);
      starts[panel * shape.blocks + block] = Histogram(counts, rows.last - rows.first).sizes();
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
    const Range rows = shape.rows_of(panel);
    const int64_t n = rows.last - rows.first;
    const int64_t panel_value = transposed ? 0 : matrix.offsets[rows.first];
    arrays.panel_values[panel] = panel_value;
    uint16_t counts[kPanelRows];
    uint32_t entries[kPanelRows], values[kPanelRows];
    for (int64_t r = 0; r < n && !transposed; ++r) values[r] = uint32_t(matrix.offsets[rows.first + r] - panel_value);
    for (int64_t block = 0; block < shape.blocks; ++block) {
      const Range cols = shape.cols_of(block);
      const Tile* const tile = arrays.tiles + panel * shape.blocks + block;
      if (tile[0].entry == tile[1].entry) continue;
      matrix.count(rows, cols, counts);
      lay_out(counts, n, arrays.runs + tile->run, arrays.segments + tile->segment, entries);
      matrix.fill(rows, cols, entries, arrays.columns + tile->entry, arrays.positions + tile->entry);
      if (transposed) continue;
      for (int64_t s = tile[0].segment; s < tile[1].segment; ++s) {
        Segment& segment = arrays.segments[s];
        segment.value = values[segment.row];
        values[segment.row] += counts[segment.row];
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

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY
