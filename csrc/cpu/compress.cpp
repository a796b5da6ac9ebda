// Between a dense matrix and the values of its remaining weights, in memory order, one pass. The work is cut into words
// of 64 weights, as in mask.cpp; where a task's first value lies follows from its row's offset and the bits before it.
#include "kernels.h"
#include "tuning.h"

namespace masked_ops::cpu::MASKED_OPS_CAPABILITY {
namespace {

MASKED_OPS_INLINE int64_t count(const uint64_t* words, int64_t n) {
  int64_t bits = 0;
  for (int64_t w = 0; w < n; ++w) bits += __builtin_popcountll(words[w]);
  return bits;
}

// The position among the values of the first weight of word w, counted over all rows.
MASKED_OPS_INLINE int64_t position(Bits bits, const int64_t* offsets, int64_t w) {
  const int64_t row = w / bits.stride;
  return offsets[row] + count(bits.row(row), w % bits.stride);
}

// body(word, row, column of its first weight) for each word of a task.
template <typename Body>
MASKED_OPS_INLINE void for_words(int64_t first, int64_t last, int64_t stride, const Body& body) {
  int64_t row = first / stride, w = first % stride;
  for (int64_t i = first; i < last; ++i) {
    body(row, w);
    if (++w == stride) {
      w = 0;
      ++row;
    }
  }
}

template <typename Element>
void compress_words(Bits bits, int64_t cols, const Element* dense, int64_t first, int64_t last, Element* out,
                    const Element* end) {
  constexpr int64_t kLine = 64 / sizeof(Element);
  for_words(first, last, bits.stride, [&](int64_t row, int64_t w) {
    const uint64_t word = bits.row(row)[w];
    const Element* in = dense + row * cols + w * 64;
    MASKED_OPS_UNROLL
    for (int64_t i = 0; i < 64; i += kLine) prefetch(in + tuning::kStreamAhead / sizeof(Element) + i);
    out = end - out >= 64 ? compress64<false>(word, in, out) : compress64<true>(word, in, out);
  });
}

template <typename Element>
void expand_words(Bits bits, int64_t cols, Element* dense, int64_t first, int64_t last, const Element* in,
                  const Element* end) {
  for_words(first, last, bits.stride, [&](int64_t row, int64_t w) {
    const uint64_t word = bits.row(row)[w];
    Element* out = dense + row * cols + w * 64;
    const int64_t n = min<int64_t>(64, cols - w * 64);
    if (n == 64) {
      in = end - in >= 64 ? expand64<false>(word, in, out) : expand64<true>(word, in, out);
    } else {
      for (int64_t i = 0; i < n; ++i) out[i] = word >> i & 1 ? *in++ : Element{};
    }
  });
}

// body(first word, last word, position of the first value, position of the last value's end) for each task.
template <typename Body>
void for_each_piece(const Team& team, Bits bits, int64_t rows, const int64_t* offsets, const Body& body) {
  const int64_t total = rows * bits.stride, grain = tuning::kPassGrain / 64;
  team.for_each(ceil_div(total, grain), [&](int64_t task) {
    const int64_t first = task * grain, last = min(total, first + grain);
    body(first, last, position(bits, offsets, first), last == total ? offsets[rows] : position(bits, offsets, last));
  });
}

// Where column j, (channel, tap), is in a row that has its channels last.
const int32_t* places_of(int64_t channels, int64_t taps) {
  int32_t* const places = static_cast<int32_t*>(scratch(Slot::kTable, size_t(channels * taps) * sizeof(int32_t)));
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t t = 0; t < taps; ++t) places[c * taps + t] = int32_t(t * channels + c);
  }
  return places;
}

// body(row, place of the weight in the row, position of the value) for the remaining weights of each row, which begin
// with one call of start(row).
template <typename Start, typename Body>
void for_places(const Team& team, Bits bits, int64_t rows, int64_t cols, int64_t taps, const int64_t* offsets,
                const Start& start, const Body& body) {
  const int64_t grain = max<int64_t>(tuning::kPassGrain / max<int64_t>(cols, 1), 1);
  const int32_t* const places = places_of(cols / taps, taps);
  team.for_each(ceil_div(rows, grain), [&](int64_t task) {
    for (int64_t row = task * grain; row < min(rows, (task + 1) * grain); ++row) {
      start(row);
      int64_t i = offsets[row];
      for (int64_t w = 0; w < bits.stride; ++w) {
        for (uint64_t word = bits.row(row)[w]; word; word &= word - 1) {
          body(row, places[w * 64 + __builtin_ctzll(word)], i++);
        }
      }
    }
  });
}

template <typename Element>
void compress_places(const Team& team, Bits bits, int64_t rows, int64_t cols, int64_t taps, const int64_t* offsets,
                     const void* dense, void* values) {
  const Element* const from = static_cast<const Element*>(dense);
  Element* const to = static_cast<Element*>(values);
  for_places(
      team, bits, rows, cols, taps, offsets, [](int64_t) {},
      [=](int64_t row, int64_t place, int64_t i) { to[i] = from[row * cols + place]; });
}

template <typename Element>
void expand_places(const Team& team, Bits bits, int64_t rows, int64_t cols, int64_t taps, const int64_t* offsets,
                   const void* values, void* dense) {
  const Element* const from = static_cast<const Element*>(values);
  Element* const to = static_cast<Element*>(dense);
  for_places(
      team, bits, rows, cols, taps, offsets,
      [=](int64_t row) { std::memset(to + row * cols, 0, size_t(cols) * sizeof(Element)); },
      [=](int64_t row, int64_t place, int64_t i) { to[row * cols + place] = from[i]; });
}

template <typename Element>
void compress_elements(const Team& team, Bits bits, int64_t rows, int64_t cols, const int64_t* offsets,
                       const void* dense, void* values) {
  for_each_piece(team, bits, rows, offsets, [=](int64_t first, int64_t last, int64_t begin, int64_t end) {
    Element* const out = static_cast<Element*>(values);
    compress_words(bits, cols, static_cast<const Element*>(dense), first, last, out + begin, out + end);
  });
}

template <typename Element>
void expand_elements(const Team& team, Bits bits, int64_t rows, int64_t cols, const int64_t* offsets,
                     const void* values, void* dense) {
  for_each_piece(team, bits, rows, offsets, [=](int64_t first, int64_t last, int64_t begin, int64_t) {
    const Element* const in = static_cast<const Element*>(values);
    expand_words(bits, cols, static_cast<Element*>(dense), first, last, in + begin, in + offsets[rows]);
  });
}

}  // namespace

void row_offsets(const Team& team, Bits bits, int64_t rows, int64_t cols, int64_t* offsets) {
  const int64_t grain = max<int64_t>(tuning::kPassGrain / max<int64_t>(cols, 1), 1);
  team.for_each(ceil_div(rows, grain), [&](int64_t task) {
    for (int64_t i = task * grain; i < min(rows, (task + 1) * grain); ++i) {
      offsets[i + 1] = count(bits.row(i), bits.stride);
    }
  });
  offsets[0] = 0;
  for (int64_t i = 0; i < rows; ++i) offsets[i + 1] += offsets[i];
}

void compress_rows(const DenseWeight& w, int64_t first, int64_t last) {
  compress_words(w.bits, w.cols, w.data, first * w.bits.stride, last * w.bits.stride, w.values + w.offsets[first],
                 w.values + w.offsets[last]);
}

void compress(const Team& team, size_t element_size, Bits bits, int64_t rows, int64_t cols, const int64_t* offsets,
              const void* dense, void* values) {
  switch (element_size) {
    case 2:
      return compress_elements<uint16_t>(team, bits, rows, cols, offsets, dense, values);
    case 4:
      return compress_elements<uint32_t>(team, bits, rows, cols, offsets, dense, values);
    default:
      return compress_elements<uint64_t>(team, bits, rows, cols, offsets, dense, values);
  }
}

void expand(const Team& team, size_t element_size, Bits bits, int64_t rows, int64_t cols, const int64_t* offsets,
            const void* values, void* dense) {
  switch (element_size) {
    case 2:
      return expand_elements<uint16_t>(team, bits, rows, cols, offsets, values, dense);
    case 4:
      return expand_elements<uint32_t>(team, bits, rows, cols, offsets, values, dense);
    default:
      return expand_elements<uint64_t>(team, bits, rows, cols, offsets, values, dense);
  }
}

void compress_last(const Team& team, size_t element_size, Bits bits, int64_t rows, int64_t cols, int64_t taps,
                   const int64_t* offsets, const void* dense, void* values) {
  const auto pass = element_size == 2   ? compress_places<uint16_t>
                    : element_size == 4 ? compress_places<uint32_t>
                                        : compress_places<uint64_t>;
  pass(team, bits, rows, cols, taps, offsets, dense, values);
}

void expand_last(const Team& team, size_t element_size, Bits bits, int64_t rows, int64_t cols, int64_t taps,
                 const int64_t* offsets, const void* values, void* dense) {
  const auto pass = element_size == 2   ? expand_places<uint16_t>
                    : element_size == 4 ? expand_places<uint32_t>
                                        : expand_places<uint64_t>;
  pass(team, bits, rows, cols, taps, offsets, values, dense);
}

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY
