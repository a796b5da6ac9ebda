// A linear layer for a few rows of input, where a weight is used too seldom to be worth packing: the weight streams by
// as it lies, its bits the predicate of the load, and what it meets is small enough for the caches.
//
// Forward takes a few rows of the weight at a time, each a dot product with every row of input: both run along K.
// grad_input takes a strip of columns, in it blocks of rows, in those tiles of columns that stay in registers down the
// block; or, for so few rows that a strip of the gradient stays in L1, four rows of the weight after the other. Both
// prefetch by hand: a strip's lines are a row apart, and a row's end is another row's beginning. grad_weight writes
// tiles of a few rows and vectors.
//
// Elements of 16 bits become operands (elements.h) as they are loaded.
#include "elements.h"
#include "kernels.h"
#include "tuning.h"

namespace masked_ops::cpu::MASKED_OPS_CAPABILITY {
namespace {

constexpr int L = Vec::kLanes;

// Rows of input that are taken at once, and rows of the weight or vectors of its columns beside them.
constexpr int kMaxRows = tuning::kSmallTile;
constexpr int weight_rows(int rows) { return min(tuning::kSmallSums / rows, 4); }
constexpr bool is_group(int weights) {
  for (int rows = 1; rows <= kMaxRows; ++rows) {
    if (weight_rows(rows) == weights) return true;
  }
  return weights == 1;
}
constexpr int weight_vectors(int rows) { return min(tuning::kSmallSums / rows, tuning::kSmallVectors); }

// Tiles of equal height, at most kMaxRows.
struct RowTiles {
  int64_t rows, count, height;
  explicit RowTiles(int64_t M) : rows(M), count(ceil_div(M, kMaxRows)), height(ceil_div(M, count)) {}
  int64_t begin(int64_t tile) const { return tile * height; }
  int64_t size(int64_t tile) const { return min(height, rows - tile * height); }
};

// kernel(Int<n>) for a number of rows, or of vectors, that is known only now.
template <int N, typename Kernel>
MASKED_OPS_INLINE void with_int(int64_t n, const Kernel& kernel) {
  if constexpr (N > 1) {
    if (n < N) return with_int<N - 1>(n, kernel);
  }
  kernel(Int<N>());
}

// --- forward ---------------------------------------------------------------------------------------------------------

template <typename T>
struct Dots {
  const T* x;  // [M][K]
  int64_t K;
  const T* weight;  // of the first row
  Bits bits;        // likewise
  const T* ahead;   // the rows that come next, null if there are none to prefetch
  const T* bias;    // null for none
  T* y;             // [M][N]
  int64_t N;
};

// totals[i] = the sum of vector i's lanes; as many at a time as a vector has, where that is worth it.
template <int N>
MASKED_OPS_INLINE void sum_each(const Vec* sums, float* totals) {
  constexpr int kLeast = L / 2;
  MASKED_OPS_UNROLL
  for (int i = 0; i < N; i += L) {
    if (N - i < kLeast) {
      MASKED_OPS_UNROLL
      for (int j = i; j < N; ++j) totals[j] = sums[j].sum();
      return;
    }
    const auto at = [&](int j) { return j < N ? sums[j] : Vec::zero(); };
    Vec quads[L / 4];
    MASKED_OPS_UNROLL
    for (int q = 0; q < L / 4; ++q) {
      const int j = i + 4 * q;
      quads[q] = j < N ? sum_quads(at(j), at(j + 1), at(j + 2), at(j + 3)) : Vec::zero();
    }
    sum_across_quads(quads).storeu(totals + i);
  }
}

// y[m][r] = x[m] . weight[r] + bias[r] for M rows of input and R rows of the weight.
template <int M, int R, typename T>
__attribute__((noinline)) void dots(const Dots<T>& o) {
  constexpr int kStep = L * Operand<T>::kDepth;  // elements of a vector
  Vec sum[M][R];
  MASKED_OPS_UNROLL
  for (int m = 0; m < M; ++m) {
    MASKED_OPS_UNROLL
    for (int r = 0; r < R; ++r) sum[m][r] = Vec::zero();
  }
  const int64_t K = o.K, whole = K / kStep * kStep;
  const auto step = [&](int64_t k, auto tail) __attribute__((always_inline)) {
    Vec w[R];
    MASKED_OPS_UNROLL
    for (int r = 0; r < R; ++r) w[r] = Operand<T>::along(o.bits.row(r), k, K - k, o.weight + r * K + k);
    MASKED_OPS_UNROLL
    for (int m = 0; m < M; ++m) {
      const Vec x =
          decltype(tail)::value ? Operand<T>::along(K - k, o.x + m * K + k) : Operand<T>::along(o.x + m * K + k);
      MASKED_OPS_UNROLL
      for (int r = 0; r < R; ++r) sum[m][r] = Operand<T>::multiply_add(x, w[r], sum[m][r]);
    }
  };
  // Prefetches at first from these rows, then from the next.
  const int64_t ahead = o.ahead ? min(tuning::kBytesAhead / int64_t{sizeof(T)}, whole) : 0;
  int64_t k = 0;
  const auto run = [&](int64_t end, const T* next) __attribute__((always_inline)) {
    for (; k < end; k += kStep) {
      MASKED_OPS_UNROLL
      for (int r = 0; r < R; ++r) prefetch(next + r * K + k);
      step(k, Int<0>());
    }
  };
  if (ahead) {
    run(whole - ahead, o.weight + ahead);
    run(whole, o.ahead - (whole - ahead));
  } else {
    for (; k < whole; k += kStep) step(k, Int<0>());
  }
  if (k < K) step(k, Int<1>());
  float totals[ceil_div(M * R, L) * L];
  sum_each<M * R>(sum[0], totals);
  MASKED_OPS_UNROLL
  for (int m = 0; m < M; ++m) {
    MASKED_OPS_UNROLL
    for (int r = 0; r < R; ++r) store_float(totals[m * R + r] + (o.bias ? to_float(o.bias[r]) : 0), o.y + m * o.N + r);
  }
}

// --- grad_input ------------------------------------------------------------------------------------------------------

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
  const T* w = o.weight;
  for (int64_t n = 0; n < o.rows; n += kDepth, w += kDepth * o.ldw) {
    Vec v[NV];
    MASKED_OPS_UNROLL
    for (int j = 0; j < NV; ++j) {
      Vec::Predicate lanes[kDepth] = {};
      MASKED_OPS_UNROLL
      for (int d = 0; d < kDepth; ++d) {
        const bool inside = (kFull || j * L < o.columns) && (d == 0 || n + d < o.rows);
        if (inside) lanes[d] = Vec::predicate(o.bits.row(n + d), o.column + j * L);
      }
      v[j] = Operand<T>::across(lanes, o.columns - j * L, w + j * L, o.ldw);
    }
    ahead.lines(ceil_div(kDepth * NV * L * int{sizeof(T)}, 64));
    MASKED_OPS_UNROLL
    for (int m = 0; m < M; ++m) {
      const Vec dy = Operand<T>::broadcast(o.rows - n, o.dy + m * o.ldy + n);
      MASKED_OPS_UNROLL
      for (int j = 0; j < NV; ++j) sum[m][j] = Operand<T>::multiply_add(dy, v[j], sum[m][j]);
    }
  }
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

// dx[m][strip] (+)= sum over R rows of dy[m][row] * weight[row][strip].
template <int M, int R, typename T>
__attribute__((noinline)) void axpy_rows(const Rows4<T>& o) {
  Vec dy[M][R];
  MASKED_OPS_UNROLL
  for (int m = 0; m < M; ++m) {
    MASKED_OPS_UNROLL
    for (int r = 0; r < R; ++r) dy[m][r] = Vec::set1(to_float(o.dy[m * o.ldy + r]));
  }
  const auto step = [&](int64_t k, auto predicate_of, auto tail) __attribute__((always_inline)) {
    Vec w[R];
    MASKED_OPS_UNROLL
    for (int r = 0; r < R; ++r) {
      const T* const from = o.weight + r * o.ldw + k;
      prefetch(from + o.ahead);
      w[r] = load_floats(predicate_of(r), o.columns - k, from);
    }
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
  int64_t k = 0;
  for (; k + 64 <= o.columns; k += 64) {  // a word of bits a row: loads are what limits this
    uint64_t words[R];
    MASKED_OPS_UNROLL
    for (int r = 0; r < R; ++r) words[r] = o.bits.row(r)[(o.column + k) / 64];
    MASKED_OPS_UNROLL
    for (int j = 0; j < 64; j += L) {
      step(k + j, [&](int r) __attribute__((always_inline)) { return Vec::predicate(words[r] >> j); }, Int<0>());
    }
  }
  const auto by_column = [&](int r)
                             __attribute__((always_inline)) { return Vec::predicate(o.bits.row(r), o.column + k); };
  for (; k + L <= o.columns; k += L) step(k, by_column, Int<0>());
  if (k < o.columns) step(k, by_column, Int<1>());
}

// --- grad_weight -----------------------------------------------------------------------------------------------------

template <typename T>
struct Outer {
  int64_t M;
  const T* dy;  // [M][ldy], at the tile's first row
  int64_t ldy;
  const T* x;  // [M][K], at the tile's first column
  int64_t K;
  Bits bits;  // of the tile's first row
  int64_t column, columns;
  T* dw;  // the tile's corner
};

// dw[r][tile] = masked(sum over m of dy[m][r] * x[m][tile]).
template <int R, bool kFull, typename T>
__attribute__((noinline)) void outer(const Outer<T>& o) {
  constexpr int NV = tuning::kOuterVectors;
  Vec sum[R][NV];
  MASKED_OPS_UNROLL
  for (int r = 0; r < R; ++r) {
    MASKED_OPS_UNROLL
    for (int j = 0; j < NV; ++j) sum[r][j] = Vec::zero();
  }
  for (int64_t m = 0; m < o.M; ++m) {
    const T* const from = o.x + m * o.K;
    Vec x[NV];
    MASKED_OPS_UNROLL
    for (int j = 0; j < NV; ++j) x[j] = kFull ? load_floats(from + j * L) : load_first(o.columns - j * L, from + j * L);
    MASKED_OPS_UNROLL
    for (int r = 0; r < R; ++r) {
      const Vec dy = Vec::set1(to_float(o.dy[m * o.ldy + r]));
      MASKED_OPS_UNROLL
      for (int j = 0; j < NV; ++j) sum[r][j] = fmadd(dy, x[j], sum[r][j]);
    }
  }
  MASKED_OPS_UNROLL
  for (int r = 0; r < R; ++r) {
    const uint64_t* const bits = o.bits.row(r);
    T* const to = o.dw + r * o.K;
    MASKED_OPS_UNROLL
    for (int j = 0; j < NV; ++j) {
      if (!kFull && j * L >= o.columns) break;
      const Vec v = sum[r][j].select(Vec::predicate(bits, o.column + j * L));
      kFull ? store_floats(v, to + j * L) : store_floats(v, o.columns - j * L, to + j * L);
    }
  }
}

template <typename T>
void forward(const Team& team, int64_t M, int64_t N, int64_t K, const T* input, const T* weight, Bits bits,
             const T* bias, T* output) {
  const RowTiles tiles(M);
  const int64_t group = weight_rows(int(tiles.height));
  const int64_t rows = max(ceil_div(tuning::kSmallGrain, max<int64_t>(K, 1)), group) / group * group;  // of a task
  team.for_each(ceil_div(N, rows), [&](int64_t task) {
    const int64_t last = min(N, (task + 1) * rows);
    for (int64_t n = task * rows, group_rows = group; n < last; n += group_rows) {
      if (last - n < group) group_rows = 1;
      const int64_t next = n + 2 * group <= N ? n + group : -1;
      for (int64_t t = 0; t < tiles.count; ++t) {
        const int64_t m = tiles.begin(t);
        const Dots<T> o = {input + m * K,
                           K,
                           weight + n * K,
                           {bits.row(n), bits.stride},
                           t == 0 && next >= 0 ? weight + next * K : nullptr,
                           bias ? bias + n : nullptr,
                           output + m * N + n,
                           N};
        with_int<kMaxRows>(tiles.size(t), [&](auto height) {
          constexpr int kRows = decltype(height)::value;
          with_int<4>(group_rows, [&](auto weights) {  // the group fits the highest tile, and so the others
            constexpr int kGroup = decltype(weights)::value;
            if constexpr (is_group(kGroup) && kGroup * kRows <= tuning::kSmallSums) dots<kRows, kGroup>(o);
          });
        });
      }
    }
  });
}

// One strip: columns [begin, end). sums [M][ld] begins at the strip.
template <typename T>
void take_strip(const RowTiles& tiles, int64_t N, int64_t K, const T* grad_output, const T* weight, Bits bits,
                int64_t begin, int64_t end, float* sums, int64_t ld) {
  const int64_t width = weight_vectors(int(tiles.height)) * L;  // of a tile
  for (int64_t n = 0; n < N; n += tuning::kSmallBlock) {
    const int64_t rows = min(tuning::kSmallBlock, N - n), next = n + tuning::kSmallBlock;
    Ahead<T> ahead(weight + next * K + begin, K, min(tuning::kSmallBlock, N - next), end - begin);
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
                            n > 0,
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
void take_strip_by_rows(int64_t M, int64_t N, int64_t K, const T* grad_output, const T* weight, Bits bits,
                        int64_t begin, int64_t end, float* sums, int64_t ld) {
  constexpr int64_t kRows = 4;
  for (int64_t n = 0; n < N; n += kRows) {
    const Rows4<T> o = {grad_output + n,
                        N,
                        weight + n * K + begin,
                        K,
                        n + 2 * kRows <= N ? kRows * K : 0,
                        {bits.row(n), bits.stride},
                        begin,
                        end - begin,
                        n > 0,
                        sums,
                        ld};
    with_int<tuning::kAxpyRows>(M, [&](auto height) {
      with_int<kRows>(min(kRows, N - n),
                      [&](auto rows) { axpy_rows<decltype(height)::value, decltype(rows)::value>(o); });
    });
  }
}

// Strips of equal width, a multiple of unit, as many for each thread.
int64_t strip_width(const Team& team, int64_t K, int64_t most, int64_t unit) {
  const int64_t strips = ceil_div(ceil_div(K, most), team.threads) * team.threads;
  return ceil_div(ceil_div(K, strips), unit) * unit;
}

template <typename T>
void grad_input(const Team& team, int64_t M, int64_t N, int64_t K, const T* grad_output, const T* weight, Bits bits,
                T* grad_input) {
  const RowTiles tiles(M);
  const bool by_rows = M <= tuning::kAxpyRows;
  const int64_t strip = by_rows ? strip_width(team, K, tuning::kAxpyStrip, 64)
                                : strip_width(team, K, tuning::kSmallStrip, weight_vectors(int(tiles.height)) * L);
  const auto take = [&](int64_t begin, int64_t end, float* sums, int64_t ld) {
    by_rows ? take_strip_by_rows(M, N, K, grad_output, weight, bits, begin, end, sums, ld)
            : take_strip(tiles, N, K, grad_output, weight, bits, begin, end, sums, ld);
  };
  team.for_each(ceil_div(K, strip), [&](int64_t task) {
    const int64_t begin = task * strip, end = min(K, begin + strip);
    if constexpr (kIsFloat<T>) {
      take(begin, end, grad_input + begin, K);
    } else {
      float* const sums = static_cast<float*>(scratch(Slot::kAccumulator, size_t(M * strip) * sizeof(float)));
      take(begin, end, sums, strip);
      for (int64_t m = 0; m < M; ++m) round_floats(sums + m * strip, end - begin, grad_input + m * K + begin);
    }
  });
}

template <typename T>
void grad_weight(const Team& team, int64_t M, int64_t N, int64_t K, const T* grad_output, const T* input, Bits bits,
                 T* grad_weight) {
  constexpr int64_t kRows = tuning::kOuterRows, kColumns = tuning::kOuterVectors * L;
  const int64_t rows = max(ceil_div(tuning::kSmallGrain, K), kRows) / kRows * kRows;  // of a task
  team.for_each(ceil_div(N, rows), [&](int64_t task) {
    const int64_t last = min(N, (task + 1) * rows);
    for (int64_t n = task * rows; n < last; n += kRows) {
      for (int64_t k = 0; k < K; k += kColumns) {
        const Outer<T> o = {M,
                            grad_output + n,
                            N,
                            input + k,
                            K,
                            {bits.row(n), bits.stride},
                            k,
                            min(kColumns, K - k),
                            grad_weight + n * K + k};
        with_int<kRows>(min(kRows, last - n), [&](auto height) {
          constexpr int kHeight = decltype(height)::value;
          o.columns == kColumns ? outer<kHeight, true>(o) : outer<kHeight, false>(o);
        });
      }
    }
  });
}

}  // namespace

void linear_small(const Team& team, Dtype dtype, int64_t M, int64_t N, int64_t K, const void* input, const void* weight,
                  Bits bits, const void* bias, void* output) {
  with_element(dtype, [&](auto element) {
    using T = decltype(element);
    forward(team, M, N, K, static_cast<const T*>(input), static_cast<const T*>(weight), bits,
            static_cast<const T*>(bias), static_cast<T*>(output));
  });
}

void linear_grad_input_small(const Team& team, Dtype dtype, int64_t M, int64_t N, int64_t K, const void* dy,
                             const void* weight, Bits bits, void* dx) {
  with_element(dtype, [&](auto element) {
    using T = decltype(element);
    grad_input(team, M, N, K, static_cast<const T*>(dy), static_cast<const T*>(weight), bits, static_cast<T*>(dx));
  });
}

void linear_grad_weight_small(const Team& team, Dtype dtype, int64_t M, int64_t N, int64_t K, const void* dy,
                              const void* x, Bits bits, void* dw) {
  with_element(dtype, [&](auto element) {
    using T = decltype(element);
    grad_weight(team, M, N, K, static_cast<const T*>(dy), static_cast<const T*>(x), bits, static_cast<T*>(dw));
  });
}

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY
