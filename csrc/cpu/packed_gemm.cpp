// The masked GEMM of a packed weight. For a few rows of input it is expanded on its way into registers, and its
// gradient compressed there (packed_gemv*.cpp); for more, a piece of it at a time, which stays in the caches, is laid
// out densely and multiplied by the kernels for dense weights. The pieces are the tasks of the team: rows of the
// weight, or, for the gradient of the input, which sums over rows, columns of it. A small weight is one piece, which
// the team multiplies. It takes over from SpMM where many weights remain.
#include "elements.h"
#include "kernels.h"
#include "simd_words.h"
#include "tuning.h"

namespace masked_ops::cpu::MASKED_OPS_CAPABILITY {
namespace {

static_assert(kRankColumns % 64 == 0 && kRankColumns % tuning::kNR == 0);

// A task's own team.
constexpr Team kAlone = {1, [](int64_t tasks, void* context, void (*body)(void*, int64_t)) {
                           for (int64_t i = 0; i < tasks; ++i) body(context, i);
                         }};

// The position of the first value of a row from a multiple of kRankColumns columns on.
MASKED_OPS_INLINE int64_t position(const PackedWeight& w, int64_t row, int64_t column) {
  if (column == 0) return w.offsets[row];
  if (column >= w.cols) return w.offsets[row + 1];
  return w.offsets[row] + w.ranks[row * ceil_div(w.cols, kRankColumns) + column / kRankColumns];
}

// out[r][c] of rows [row, row + rows) and columns [column, column + columns), both multiples of kRankColumns or ends.
template <typename Element>
void expand_piece(const PackedWeight& w, int64_t row, int64_t rows, int64_t column, int64_t columns, Element* out) {
  const Element *const values = static_cast<const Element*>(w.values), *const end = values + w.offsets[w.rows];
  for (int64_t r = row; r < row + rows; ++r, out += columns) {
    const uint64_t* words = w.bits.row(r) + column / 64;
    const Element* in = values + position(w, r, column);
    if (columns < w.cols && r + tuning::kPiecesAhead < w.rows) {
      const int64_t ahead = r + tuning::kPiecesAhead, last = position(w, ahead, column + columns);
      for (int64_t i = position(w, ahead, column); i < last; i += 64 / sizeof(Element)) prefetch(values + i);
    }
    int64_t c = 0;
    for (; c + 64 <= columns; c += 64, ++words) {
      if (columns == w.cols) prefetch(in + tuning::kBytesAhead / sizeof(Element));
      in = end - in >= 64 ? expand64<false>(*words, in, out + c) : expand64<true>(*words, in, out + c);
    }
    for (int64_t i = 0; c + i < columns; ++i) out[c + i] = *words >> i & 1 ? *in++ : Element{};
  }
}

// The values of rows [row, row + rows) out of a dense matrix of these rows.
template <typename Element>
void compress_piece(const PackedWeight& w, int64_t row, int64_t rows, const Element* dense, Element* values) {
  Element *out = values + w.offsets[row], *const end = values + w.offsets[row + rows];
  for (int64_t r = row; r < row + rows; ++r, dense += w.cols) {
    for (int64_t i = 0; i < w.bits.stride; ++i) {
      const uint64_t word = w.bits.row(r)[i];
      out =
          end - out >= 64 ? compress64<false>(word, dense + i * 64, out) : compress64<true>(word, dense + i * 64, out);
    }
  }
}

// to[m][0..columns) = from[m][0..columns)
template <typename Element>
void copy_columns(int64_t rows, int64_t columns, const Element* from, int64_t ld_from, Element* to, int64_t ld_to) {
  for (int64_t m = 0; m < rows; ++m, from += ld_from, to += ld_to) {
    std::memcpy(to, from, size_t(columns) * sizeof(Element));
  }
}

// Rows of a weight, or columns of one with so many rows, that make a piece: whole panels of B.
int64_t piece(const Team& team, int64_t M, int64_t side, int64_t element_bytes, int64_t other, int64_t multiple) {
  const int64_t bytes = M <= tuning::kSmallRows ? tuning::kFewRowsPiece : tuning::kPiece;
  const int64_t fit = bytes / max<int64_t>(other * element_bytes, 1);
  const int64_t share = ceil_div(side, team.threads * tuning::kPiecesPerThread);
  const int64_t most = tuning::kDirectColumns / multiple * multiple;
  return min(max(min(fit, share) / multiple, int64_t{1}) * multiple, most);
}

template <typename T>
T* room(Slot slot, int64_t elements) {
  return static_cast<T*>(scratch(slot, size_t(elements) * sizeof(T)));
}

template <typename Element>
struct PackedProduct {
  const Team& team;
  Dtype dtype;
  int64_t M;
  const PackedWeight& w;

  // Rows of input that are taken at a time, so that what becomes a part of the output stays in the caches.
  static constexpr int64_t kRows = tuning::kDirectRows;

  // All of a small weight, or of one that has no piece for each thread and is not large.
  bool is_whole(int64_t side, int64_t piece) const {
    const int64_t bytes = w.rows * w.cols * int64_t{sizeof(Element)};
    return bytes <= tuning::kWholeWeight || (bytes <= kMostPieceBytes && side <= piece * (team.threads - 1));
  }
  Element* whole() const {
    Element* const weight = room<Element>(Slot::kExpanded, w.rows * w.cols);
    expand(team, sizeof(Element), w.bits, w.rows, w.cols, w.offsets, w.values, weight);
    return weight;
  }

  void forward(const Element* input, const Element* bias, Element* output) const {
    const int64_t N = w.rows, K = w.cols, height = piece(team, M, N, sizeof(Element), K, tuning::kNR);
    if (is_whole(N, height)) return linear(team, dtype, M, N, K, input, whole(), w.bits, bias, output);
    team.for_each(ceil_div(N, height), [&](int64_t task) {
      const int64_t n = task * height, rows = min(height, N - n);
      Element* const weight = room<Element>(Slot::kExpanded, rows * K);
      expand_piece(w, n, rows, 0, K, weight);
      Element* const part = room<Element>(Slot::kPart, min(M, kRows) * rows);
      for (int64_t m = 0; m < M; m += kRows) {
        const int64_t count = min(kRows, M - m);
        linear(kAlone, dtype, count, rows, K, input + m * K, weight, {w.bits.row(n), w.bits.stride},
               bias ? bias + n : nullptr, part);
        copy_columns(count, rows, part, rows, output + m * N + n, N);
      }
    });
  }

  void grad_input(const Element* grad_output, Element* grad_input) const {
    const int64_t N = w.rows, K = w.cols, width = piece(team, M, K, sizeof(Element), N, kRankColumns);
    if (is_whole(K, width)) {
      return linear_grad_input(team, dtype, M, N, K, grad_output, whole(), w.bits, grad_input);
    }
    team.for_each(ceil_div(K, width), [&](int64_t task) {
      const int64_t k = task * width, columns = min(width, K - k);
      Element* const weight = room<Element>(Slot::kExpanded, N * columns);
      expand_piece(w, 0, N, k, columns, weight);
      Element* const part = room<Element>(Slot::kPart, min(M, kRows) * columns);
      for (int64_t m = 0; m < M; m += kRows) {
        const int64_t count = min(kRows, M - m);
        linear_grad_input(kAlone, dtype, count, N, columns, grad_output + m * N, weight,
                          {w.bits.words + k / 64, w.bits.stride}, part);
        copy_columns(count, columns, part, columns, grad_input + m * K + k, K);
      }
    });
  }

  void grad_values(const Element* grad_output, const Element* input, Element* values) const {
    const int64_t N = w.rows, K = w.cols;
    const int64_t fit = kMostPieceBytes / (M * int64_t{sizeof(Element)}) / tuning::kMR * tuning::kMR;
    const int64_t height = min(piece(team, M, N, sizeof(Element), K, tuning::kMR), max<int64_t>(fit, tuning::kMR));
    if (is_whole(N, height)) {
      Element* const weight = room<Element>(Slot::kExpanded, N * K);
      linear_grad_weight(team, dtype, M, N, K, grad_output, input, w.bits, weight);
      return compress(team, sizeof(Element), w.bits, N, K, w.offsets, weight, values);
    }
    team.for_each(ceil_div(N, height), [&](int64_t task) {
      const int64_t n = task * height, rows = min(height, N - n);
      Element* const part = room<Element>(Slot::kPart, M * rows);
      copy_columns(M, rows, grad_output + n, N, part, rows);
      Element* const weight = room<Element>(Slot::kExpanded, rows * K);
      linear_grad_weight(kAlone, dtype, M, rows, K, part, input, {w.bits.row(n), w.bits.stride}, weight);
      compress_piece(w, n, rows, weight, values);
    });
  }
};

// Whether the weight is expanded in registers, forward.
template <typename T>
bool in_registers(int64_t M, int64_t K) {
  const bool short_rows = !kIsFloat<T> && K <= tuning::kExpandedShortRows * M;
  return Operand<T>::kExpands && M <= tuning::kExpandedRows && !short_rows;
}
template <typename Body>
void with_moved(Dtype dtype, const Body& body) {
  dtype == Dtype::kFloat ? body(uint32_t()) : body(uint16_t());
}

}  // namespace

void row_ranks(const Team& team, Bits bits, int64_t rows, int64_t cols, uint32_t* ranks) {
  constexpr int64_t kWords = kRankColumns / 64;
  const int64_t blocks = ceil_div(cols, kRankColumns), grain = max<int64_t>(tuning::kPassGrain / bits.stride, 1);
  team.for_each(ceil_div(rows, grain), [&](int64_t task) {
    for (int64_t r = task * grain; r < min(rows, (task + 1) * grain); ++r) {
      uint32_t rank = 0;
      for (int64_t w = 0; w < bits.stride; ++w) {
        if (w % kWords == 0) ranks[r * blocks + w / kWords] = rank;
        rank += uint32_t(__builtin_popcountll(bits.row(r)[w]));
      }
    }
  });
}

void packed_linear(const Team& team, Dtype dtype, int64_t M, const PackedWeight& weight, const void* input,
                   const void* bias, void* output) {
  bool small = false;
  with_element(dtype, [&](auto element) { small = in_registers<decltype(element)>(M, weight.cols); });
  if (small) return packed_linear_small(team, dtype, M, weight, input, bias, output);
  with_moved(dtype, [&](auto element) {
    using Element = decltype(element);
    PackedProduct<Element>{team, dtype, M, weight}.forward(
        static_cast<const Element*>(input), static_cast<const Element*>(bias), static_cast<Element*>(output));
  });
}

bool expands_grad_input(Dtype dtype, int64_t M) {
  bool expands = false;
  with_element(dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int64_t kMost = kConverts<T> ? tuning::kExpandedGradRowsConverted : tuning::kExpandedGradRows;
    expands = Operand<T>::kExpands && M <= kMost;
  });
  return expands;
}

void packed_linear_grad_input(const Team& team, Dtype dtype, int64_t M, const PackedWeight& weight,
                              const void* grad_output, void* grad_input) {
  if (expands_grad_input(dtype, M))
    return packed_linear_grad_input_small(team, dtype, M, weight, grad_output, grad_input);
  with_moved(dtype, [&](auto element) {
    using Element = decltype(element);
    PackedProduct<Element>{team, dtype, M, weight}.grad_input(static_cast<const Element*>(grad_output),
                                                              static_cast<Element*>(grad_input));
  });
}

void packed_linear_grad_values(const Team& team, Dtype dtype, int64_t M, const PackedWeight& weight,
                               const void* grad_output, const void* input, void* grad_values) {
  if (compresses_grad_values(dtype, M, weight))
    return packed_linear_grad_values_small(team, dtype, M, weight, grad_output, input, grad_values);
  with_moved(dtype, [&](auto element) {
    using Element = decltype(element);
    PackedProduct<Element>{team, dtype, M, weight}.grad_values(static_cast<const Element*>(grad_output),
                                                               static_cast<const Element*>(input),
                                                               static_cast<Element*>(grad_values));
  });
}

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY
