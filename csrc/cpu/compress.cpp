// Between a dense matrix and the values of its remaining weights, in memory order, one pass. The work is cut into words
// of 64 weights, as in mask.cpp; where a task's first value lies follows from its row's offset and the bits before it.
#include "kernels.h"
#include "simd_words.h"
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
const uint32_t* places_of(int64_t channels, int64_t taps) {
  uint32_t* const places = static_cast<uint32_t*>(scratch(Slot::kTable, size_t(channels * taps) * sizeof(uint32_t)));
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t t = 0; t < taps; ++t) places[c * taps + t] = uint32_t(t * channels + c);
  }
  return places;
}

// body(row, places of some remaining weights in the row, their number, position of the first one's value) for all of
// each row, which begins with one call of start(row). Many places at a time: loops of a few turns each end with a
// branch that is not foreseen (a convolution of 512 x 512 x 3 x 3 at 50%, one position: 0.61 ms by the bits, 0.41 by
// lists).
template <typename Start, typename Body>
void for_places(const Team& team, Bits bits, int64_t rows, int64_t cols, int64_t taps, const int64_t* offsets,
                const Start& start, const Body& body) {
  constexpr int64_t kWords = 16;
  const int64_t grain = max<int64_t>(tuning::kPassGrain / max<int64_t>(cols, 1), 1);
  const uint32_t* const places = places_of(cols / taps, taps);
  team.for_each(ceil_div(rows, grain), [&](int64_t task) {
    uint32_t left[(kWords + 1) * 64];
    for (int64_t row = task * grain; row < min(rows, (task + 1) * grain); ++row) {
      start(row);
      int64_t position = offsets[row];
      for (int64_t first = 0; first < bits.stride; first += kWords) {
        uint32_t* end = left;
        for (int64_t w = first; w < min(first + kWords, bits.stride); ++w) {
          end = compress64<false>(bits.row(row)[w], places + w * 64, end);
        }
        body(row, left, end - left, position);
        position += end - left;
      }
    }
  });
}

template <typename Element>
void compress_places(const Team& team, Bits bits, int64_t rows, int64_t cols, int64_t taps, const int64_t* offsets,
                     const void* dense, void* values) {
  const auto gather = [=](int64_t row, const uint32_t* places, int64_t n, int64_t position) {
    const Element* const from = static_cast<const Element*>(dense) + row * cols;
    Element* const to = static_cast<Element*>(values) + position;
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) {
      const Element a = from[places[i]], b = from[places[i + 1]], c = from[places[i + 2]], d = from[places[i + 3]];
      to[i] = a;
      to[i + 1] = b;
      to[i + 2] = c;
      to[i + 3] = d;
    }
    for (; i < n; ++i) to[i] = from[places[i]];
  };
  for_places(team, bits, rows, cols, taps, offsets, [](int64_t) {}, gather);
}

template <typename Element>
void expand_places(const Team& team, Bits bits, int64_t rows, int64_t cols, int64_t taps, const int64_t* offsets,
                   const void* values, void* dense) {
  const auto clear = [=](int64_t row) {
    std::memset(static_cast<Element*>(dense) + row * cols, 0, size_t(cols) * sizeof(Element));
  };
  const auto scatter = [=](int64_t row, const uint32_t* places, int64_t n, int64_t position) {
    const Element* const from = static_cast<const Element*>(values) + position;
    Element* const to = static_cast<Element*>(dense) + row * cols;
    for (int64_t i = 0; i < n; ++i) to[places[i]] = from[i];
  };
  for_places(team, bits, rows, cols, taps, offsets, clear, scatter);
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
  with_word(element_size, [&](auto element) {
    compress_elements<decltype(element)>(team, bits, rows, cols, offsets, dense, values);
  });
}

void expand(const Team& team, size_t element_size, Bits bits, int64_t rows, int64_t cols, const int64_t* offsets,
            const void* values, void* dense) {
  with_word(element_size,
            [&](auto element) { expand_elements<decltype(element)>(team, bits, rows, cols, offsets, values, dense); });
}

void compress_last(const Team& team, size_t element_size, Bits bits, int64_t rows, int64_t cols, int64_t taps,
                   const int64_t* offsets, const void* dense, void* values) {
  with_word(element_size, [&](auto element) {
    compress_places<decltype(element)>(team, bits, rows, cols, taps, offsets, dense, values);
  });
}

void expand_last(const Team& team, size_t element_size, Bits bits, int64_t rows, int64_t cols, int64_t taps,
                 const int64_t* offsets, const void* values, void* dense) {
  with_word(element_size, [&](auto element) {
    expand_places<decltype(element)>(team, bits, rows, cols, taps, offsets, values, dense);
  });
}

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY
