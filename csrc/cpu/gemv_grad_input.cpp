// grad_input for a few rows of input. An area of the weight, a strip of columns or a share of the rows, goes by in
// blocks of rows, in those tiles of columns whose sums stay in registers down the block; or, for so few rows of input
// that a strip of the gradient stays in L1, four rows after the other. Both prefetch by hand: a strip's lines are a row
// apart, and a row's end is another row's beginning.
#include "gemv.h"

namespace masked_ops::cpu::MASKED_OPS_CAPABILITY {
namespace {

constexpr int L = Vec::kLanes;

// Vectors of columns of the weight beside rows of input.
constexpr int weight_vectors(int rows) { return min(tuning::kSmallSums / rows, tuning::kSmallVectors); }

// What a block of rows of the weight prefetches of the next: its lines, row by row.
template <typename T>
class Ahead {
 public:
  Ahead(const T* first, int64_t ld, int64_t rows, int64_t columns)
      : row_(first), at_(first), ld_(ld), rows_(rows), columns_(columns) {}

  MASKED_OPS_INLINE void lines(int n) {
    if (rows_ <= 0) return;
    for (int i = 0; i < n; ++i) prefetch(at_ + i * kLine);
    at_ += n * kLine;
    if (at_ >= row_ + columns_) {
      at_ = row_ += ld_;
      --rows_;
    }
  }

 private:
  static constexpr int kLine = 64 / sizeof(T);
  const T *row_, *at_;
  int64_t ld_, rows_, columns_;
};

template <typename T>
struct Axpys {
  const T* dy;  // [M][ldy], from the block's first row of the weight on
  int64_t ldy, rows;
  const T* weight;  // of the block's first row, at the tile's first column
  int64_t ldw;
  Bits bits;  // of the block's first row
  int64_t column, columns;
  bool accumulate;
  float* dx;  // [M][ldx], at the tile's first column
  int64_t ldx;
};

// dx[m][tile] (+)= sum over the block's rows of dy[m][row] * weight[row][tile].
// Unless kFull, the last vectors of the tile may be empty.
template <int M, bool kFull, typename T>
__attribute__((noinline)) void axpys(const Axpys<T>& o, Ahead<T>& ahead) {
  constexpr int kDepth = Operand<T>::kDepth, NV = weight_vectors(M);
  Vec sum[M][NV];
  const auto valid = [&](int j) { return Vec::first(o.columns - j * L); };
  MASKED_OPS_UNROLL
  for (int m = 0; m < M; ++m) {
    MASKED_OPS_UNROLL
    for (int j = 0; j < NV; ++j) {
      sum[m][j] = o.accumulate ? Vec::loadu(valid(j), o.dx + m * o.ldx + j * L) : Vec::zero();
    }
  }
  const auto step = [&](int64_t n, auto rows) __attribute__((always_inline)) {
    constexpr int kRows = decltype(rows)::value;
    const T* const w = o.weight + n * o.ldw;
    Vec v[NV];
    MASKED_OPS_UNROLL
    for (int j = 0; j < NV; ++j) {
      Vec::Predicate lanes[kDepth] = {};
      MASKED_OPS_UNROLL
      for (int d = 0; d < kRows; ++d) {
        if (kFull || j * L < o.columns) lanes[d] = Vec::predicate(o.bits.row(n + d), o.column + j * L);
      }
      v[j] = Operand<T>::across(lanes, o.columns - j * L, w + j * L, o.ldw);
    }
    ahead.lines(ceil_div(kDepth * NV * L * int{sizeof(T)}, 64));
    MASKED_OPS_UNROLL
    for (int m = 0; m < M; ++m) {
      const Vec dy = Operand<T>::broadcast(kRows, o.dy + m * o.ldy + n);
      MASKED_OPS_UNROLL
      for (int j = 0; j < NV; ++j) sum[m][j] = Operand<T>::multiply_add(dy, v[j], sum[m][j]);
    }
  };
  int64_t n = 0;
  for (; n + kDepth <= o.rows; n += kDepth) step(n, Int<kDepth>());
  if (n < o.rows) step(n, Int<1>());
  MASKED_OPS_UNROLL
  for (int m = 0; m < M; ++m) {
    MASKED_OPS_UNROLL
    for (int j = 0; j < NV; ++j) sum[m][j].storeu(valid(j), o.dx + m * o.ldx + j * L);
  }
}

template <typename T>
struct Rows4 {
  const T* dy;  // [M][ldy], from the first of the rows on
  int64_t ldy;
  const T* weight;     // of the first row, at the strip's first column
  int64_t ldw, ahead;  // ahead: elements to what is prefetched
  Bits bits;           // of the first row
  int64_t column, columns;
  bool accumulate;
  float* dx;  // [M][ldx], at the strip's first column
  int64_t ldx;
};

// dx[m][strip] (+)= sum over R rows of dy[m][row] * weight[row][strip]. The column is a multiple of 64.
template <int M, int R, typename T>
__attribute__((noinline)) void axpy_rows(const Rows4<T>& operands) {
  const Rows4<T> o = operands;  // which no store can change
  Vec dy[M][R];
  const T* weight[R];
  const uint64_t* bits[R];
  MASKED_OPS_UNROLL
  for (int r = 0; r < R; ++r) {
    weight[r] = o.weight + r * o.ldw;
    bits[r] = o.bits.row(r) + o.column / 64;
    MASKED_OPS_UNROLL
    for (int m = 0; m < M; ++m) dy[m][r] = Vec::set1(to_float(o.dy[m * o.ldy + r]));
  }
  const auto step = [&](int64_t k, auto predicate_of, auto tail) __attribute__((always_inline)) {
    Vec w[R];
    MASKED_OPS_UNROLL
    for (int r = 0; r < R; ++r) w[r] = load_floats(predicate_of(r), o.columns - k, weight[r] + k);
    const auto valid = Vec::first(o.columns - k);
    MASKED_OPS_UNROLL
    for (int m = 0; m < M; ++m) {
      float* const to = o.dx + m * o.ldx + k;
      Vec sum = !o.accumulate ? Vec::zero() : decltype(tail)::value ? Vec::loadu(valid, to) : Vec::loadu(to);
      MASKED_OPS_UNROLL
      for (int r = 0; r < R; ++r) sum = fmadd(dy[m][r], w[r], sum);
      decltype(tail)::value ? sum.storeu(valid, to) : sum.storeu(to);
    }
  };
  constexpr int kLine = 64 / sizeof(T);
  int64_t k = 0;
  for (; k + 64 <= o.columns; k += 64) {
    uint64_t words[R];
    MASKED_OPS_UNROLL
    for (int r = 0; r < R; ++r) words[r] = bits[r][k / 64];
    MASKED_OPS_UNROLL
    for (int j = 0; j < 64; j += L) {
      MASKED_OPS_UNROLL
      for (int r = 0; r < R; ++r) {
        if (j % kLine == 0) prefetch(weight[r] + k + j + o.ahead);
      }
      const auto by_word = [&](int r)
                               __attribute__((always_inline)) { return Vec::predicate(words[r], bits[r] + k / 64, j); };
      step(k + j, by_word, Int<0>());
    }
  }
  const auto by_column = [&](int r) __attribute__((always_inline)) { return Vec::predicate(bits[r], k); };
  for (; k + L <= o.columns; k += L) step(k, by_column, Int<0>());
  if (k < o.columns) step(k, by_column, Int<1>());
}

struct Area {
  int64_t first, last;  // rows of the weight
  int64_t begin, end;   // columns
};

// sums [M][ld] begins at the area's first column.
template <typename T>
void take_area(const RowTiles& tiles, int64_t N, int64_t K, const T* grad_output, const T* weight, Bits bits,
               const Area& area, float* sums, int64_t ld) {
  const auto [first, last, begin, end] = area;
  const int64_t width = weight_vectors(int(tiles.height)) * L;  // of a tile
  for (int64_t n = first; n < last; n += tuning::kSmallBlock) {
    const int64_t rows = min(tuning::kSmallBlock, last - n), next = n + tuning::kSmallBlock;
    Ahead<T> ahead(weight + next * K + begin, K, min(tuning::kSmallBlock, last - next), end - begin);
    for (int64_t k = begin; k < end; k += width) {
      Ahead<T> none(nullptr, 0, 0, 0);
      for (int64_t t = 0; t < tiles.count; ++t) {
        const int64_t m = tiles.begin(t);
        const Axpys<T> o = {grad_output + m * N + n,
                            N,
                            rows,
                            weight + n * K + k,
                            K,
                            {bits.row(n), bits.stride},
                            k,
                            min(width, end - k),
                            n > first,
                            sums + m * ld + k - begin,
                            ld};
        with_int<kMaxRows>(tiles.size(t), [&](auto height) {
          constexpr int kRows = decltype(height)::value;
          Ahead<T>& lines = t == 0 ? ahead : none;
          o.columns == weight_vectors(kRows) * L ? axpys<kRows, true>(o, lines) : axpys<kRows, false>(o, lines);
        });
      }
    }
  }
}

// The same by rows, for M <= kAxpyRows.
template <typename T>
void take_area_by_rows(int64_t M, int64_t N, int64_t K, const T* grad_output, const T* weight, Bits bits,
                       const Area& area, float* sums, int64_t ld) {
  const auto [first, last, begin, end] = area;
  constexpr int64_t kRows = 4;
  for (int64_t n = first; n < last; n += kRows) {
    const Rows4<T> o = {grad_output + n,
                        N,
                        weight + n * K + begin,
                        K,
                        n + 2 * kRows <= last ? kRows * K : 0,
                        {bits.row(n), bits.stride},
                        begin,
                        end - begin,
                        n > first,
                        sums,
                        ld};
    with_int<tuning::kAxpyRows>(M, [&](auto height) {
      with_int<kRows>(min(kRows, last - n),
                      [&](auto rows) { axpy_rows<decltype(height)::value, decltype(rows)::value>(o); });
    });
  }
}

// Strips of equal width, a multiple of unit, as many for each thread.
int64_t strip_width(const Team& team, int64_t K, int64_t most, int64_t unit) {
  const int64_t strips = ceil_div(ceil_div(K, most), team.threads) * team.threads;
  return ceil_div(ceil_div(K, strips), unit) * unit;
}

void add(float* sums, const float* more, int64_t n) {
  for (int64_t i = 0; i < n; i += L) {
    const auto valid = Vec::first(n - i);
    (Vec::loadu(valid, sums + i) + Vec::loadu(valid, more + i)).storeu(valid, sums + i);
  }
}

template <typename T>
void grad_input(const Team& team, int64_t M, int64_t N, int64_t K, const T* grad_output, const T* weight, Bits bits,
                T* grad_input) {
  const RowTiles tiles(M);
  const bool by_rows = M <= tuning::kAxpyRows;
  // Narrow weights are cut into rows, whose sums are added.
  const int64_t parts =
      K <= tuning::kSmallStrip ? max(min<int64_t>(team.threads, N / tuning::kLeastPartRows), int64_t{1}) : 1;
  const int64_t strip = parts > 1 ? K
                        : by_rows ? strip_width(team, K, tuning::kAxpyStrip, 64)
                                  : strip_width(team, K, tuning::kSmallStrip, weight_vectors(int(tiles.height)) * L);
  const int64_t strips = ceil_div(K, strip);
  const bool in_place = kIsFloat<T> && parts == 1;
  float* const sums =  // [part][M][K]
      in_place ? reinterpret_cast<float*>(grad_input)
               : static_cast<float*>(scratch(Slot::kPanelB, size_t(parts * M * K) * sizeof(float)));
  team.for_each(parts * strips, [&](int64_t task) {
    const int64_t part = task / strips, begin = task % strips * strip;
    const Area area = {N * part / parts, N * (part + 1) / parts, begin, min(K, begin + strip)};
    float* const to = sums + part * M * K + begin;
    by_rows ? take_area_by_rows(M, N, K, grad_output, weight, bits, area, to, K)
            : take_area(tiles, N, K, grad_output, weight, bits, area, to, K);
  });
  for (int64_t part = 1; part < parts; ++part) add(sums, sums + part * M * K, M * K);
  if (!in_place) round_floats(sums, M * K, grad_input);
}

}  // namespace

void linear_grad_input_small(const Team& team, Dtype dtype, int64_t M, int64_t N, int64_t K, const void* dy,
                             const void* weight, Bits bits, void* dx) {
  with_element(dtype, [&](auto element) {
    using T = decltype(element);
    grad_input(team, M, N, K, static_cast<const T*>(dy), static_cast<const T*>(weight), bits, static_cast<T*>(dx));
  });
}

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY
