// The matrices that a SparseIndex is built of, as its building reads them: how many weights a row has in a block of
// columns, and which. All have offsets, of the weight's rows.
#pragma once

#include "conv_geometry.h"
#include "kernels.h"

namespace masked_ops::cpu::MASKED_OPS_CAPABILITY {

template <typename Body>
MASKED_OPS_INLINE void for_bits(uint64_t word, const Body& body) {
  for (; word; word &= word - 1) body(__builtin_ctzll(word));
}

struct Span {
  int64_t first, last;
};

struct ColumnBlock : Span {
  int64_t width;  // of all blocks but the last
};

// A weight as it is: rows are rows.
struct Plain {
  Bits bits;
  const int64_t* offsets;
  const TapBlocks* blocks = nullptr;  // of a convolution

  // Calls body(word, column of its first bit) for the words of columns [first, last) of a row.
  template <typename Body>
  void for_words(int64_t row, Span cols, const Body& body) const {
    for (int64_t w = cols.first / 64; w < ceil_div(cols.last, 64); ++w) {
      uint64_t word = bits.row(row)[w];
      if (w * 64 < cols.first) word &= ~uint64_t{0} << (cols.first - w * 64);
      if (w * 64 + 64 > cols.last) word &= ~uint64_t{0} >> (w * 64 + 64 - cols.last);
      body(word, w * 64);
    }
  }

  void count(Span rows, ColumnBlock cols, uint16_t* counts) const {
    for (int64_t r = rows.first; r < rows.last; ++r) {
      int64_t n = 0;
      for_words(r, cols, [&](uint64_t word, int64_t) { n += __builtin_popcountll(word); });
      *counts++ = uint16_t(n);
    }
  }

  bool same_columns(int64_t row, int64_t other, ColumnBlock cols) const {
    uint64_t differ = 0;
    for_words(row, cols, [&](uint64_t word, int64_t column) {
      uint64_t others = bits.row(other)[column / 64];
      if (column < cols.first) others &= ~uint64_t{0} << (cols.first - column);
      if (column + 64 > cols.last) others &= ~uint64_t{0} >> (column + 64 - cols.last);
      differ |= word ^ others;
    });
    return differ == 0;
  }

  // Entries of row r go to starts[r] and on.
  void fill(Span rows, ColumnBlock cols, uint32_t* starts, uint8_t* columns, uint32_t*) const {
    for (int64_t r = rows.first; r < rows.last; ++r) {
      uint8_t* to = columns + *starts++;
      for_words(r, cols, [&](uint64_t word, int64_t column) {
        for_bits(word, [&](int i) { *to++ = uint8_t(column + i - cols.first); });
      });
    }
  }

  void number(ColumnBlock, uint8_t* columns, int64_t n) const {
    if (blocks) blocks->number(columns, n);
  }
};

// Its transpose: rows are columns of the weight, a panel is a range of words in each of its rows.
struct Transposed {
  Bits bits;
  const int64_t* offsets;

  void count(Span rows, ColumnBlock cols, uint16_t* counts) const {
    for (int64_t r = rows.first; r < rows.last; ++r) counts[r - rows.first] = 0;
    for (int64_t c = cols.first; c < cols.last; ++c) {
      for (int64_t w = rows.first / 64; w < ceil_div(rows.last, 64); ++w) {
        for_bits(bits.row(c)[w], [&](int i) { ++counts[w * 64 + i - rows.first]; });
      }
    }
  }

  void fill(Span rows, ColumnBlock cols, uint32_t* starts, uint8_t* columns, uint32_t* positions) const {
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

  void number(ColumnBlock, uint8_t*, int64_t) const {}
};

// The matrix of a convolution's gradient with respect to its input: rows are input channels, columns are (output
// channel of the row's group, tap), by the phases of conv_geometry.h.
class Flipped {
 public:
  Flipped(Bits bits, const int64_t* offsets, const Convolution& c)
      : offsets(offsets),
        bits_(bits),
        c_(c),
        into_(c.in_channels / c.groups),
        out_(c.out_channels / c.groups),
        taps_(c.kernel[0] * c.kernel[1] * c.kernel[2]) {}

  const int64_t* offsets;

  void count(Span rows, ColumnBlock cols, uint16_t* counts) const {
    for (int64_t r = rows.first; r < rows.last; ++r) counts[r - rows.first] = 0;
    for_entries(rows, cols, [&](int64_t row, int64_t, int64_t) { ++counts[row - rows.first]; });
  }

  void fill(Span rows, ColumnBlock cols, uint32_t* starts, uint8_t* columns, uint32_t* positions) const {
    for_entries(rows, cols, [&](int64_t row, int64_t column, int64_t position) {
      const uint32_t entry = starts[row - rows.first]++;
      columns[entry] = uint8_t(column);
      positions[entry] = uint32_t(position);
    });
  }

  void number(ColumnBlock cols, uint8_t* columns, int64_t n) const { class_of(cols).blocks.number(columns, n); }

 private:
  // The columns of one class of taps: one for each (output channel, tap of the class).
  struct Class {
    TapBlocks blocks;
    int64_t first_block, taps;
    int64_t begin[3], period[3], count[3];

    // Which of the class's taps a tap of the kernel is; -1 if it is none.
    int64_t number_of(int64_t tap, const int64_t* kernel) const {
      const int64_t at[3] = {tap / kernel[2] / kernel[1], tap / kernel[2] % kernel[1], tap % kernel[2]};
      int64_t number = 0;
      for (int d = 0; d < 3; ++d) {
        if (at[d] < begin[d] || (at[d] - begin[d]) % period[d]) return -1;
        number = number * count[d] + (at[d] - begin[d]) / period[d];
      }
      return number;
    }
  };

  // All columns of a block belong to one class.
  Class class_of(ColumnBlock cols) const {
    Class result = {{1, 1, 1, 1, 0, 1}, 0, 1, {}, {}, {}};
    for_tap_classes(c_, cols.width, [&](int64_t i, int64_t j, int64_t k, const TapBlocks& blocks, int64_t first) {
      if (first * cols.width > cols.first) return;
      result = {blocks, first, 1, {i, j, k}, {}, {}};
      for (int d = 0; d < 3; ++d) {
        result.period[d] = tap_period(c_, d);
        result.count[d] = taps_of_class(c_, d, result.begin[d]);
        result.taps *= result.count[d];
      }
    });
    return result;
  }

  // body(row, column in its block, position of the value) for the entries of a tile, by rising columns.
  template <typename Body>
  void for_entries(Span rows, ColumnBlock cols, const Body& body) const {
    const Class of = class_of(cols);
    const int64_t begin = (cols.first / cols.width - of.first_block) * of.blocks.columns;
    const int64_t group = rows.first / into_, end = begin + of.blocks.columns;
    const int64_t first_bit = rows.first % into_ * taps_, last_bit = first_bit + (rows.last - rows.first) * taps_;
    for (int64_t o = begin / of.taps; o < min(out_, ceil_div(end, of.taps)); ++o) {
      const int64_t weight_row = group * out_ + o;
      const uint64_t* const words = bits_.row(weight_row);
      int64_t position = offsets[weight_row];
      for (int64_t w = 0; w < first_bit / 64; ++w) position += __builtin_popcountll(words[w]);
      for (int64_t w = first_bit / 64; w < ceil_div(last_bit, 64); ++w) {
        for_bits(words[w], [&](int i) {
          const int64_t bit = w * 64 + i - first_bit, value = position++;
          if (bit < 0 || bit >= last_bit - first_bit) return;
          const int64_t number = of.number_of(bit % taps_, c_.kernel);
          const int64_t col = o * of.taps + number;
          if (number >= 0 && col >= begin && col < end) body(rows.first + bit / taps_, col - begin, value);
        });
      }
    }
  }

  Bits bits_;
  const Convolution& c_;
  int64_t into_, out_, taps_;
};

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY
