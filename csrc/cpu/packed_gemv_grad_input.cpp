// grad_input of a packed weight for a few rows of input, which is expanded on its way into registers. The two ways of
// gemv_grad_input.cpp: from memory, or for very few rows of input, a few rows of the weight at a time are added to
// every row's sums by a factor of grad_output (axpys); from caches tiles of columns come, whose sums stay in registers
// down a block of rows.
#include "gemv_grad_input.h"
#include "packed_rows.h"

namespace masked_ops::cpu::MASKED_OPS_CAPABILITY {
namespace {

constexpr int L = Vec::kLanes;
constexpr RegisterTile kTile = {tuning::kMR, tuning::kSmallRegisters};

// Vectors of columns of the weight beside rows of input; whole vectors of operands.
template <typename T>
constexpr int tile_vectors(int rows) {
  constexpr int kDepth = Operand<T>::kDepth;
  return tuning::kDownVectors[rows - 1] / kDepth * kDepth;
}

template <typename T>
struct ExpandedTile {
  const T* dy;  // [M][ldy], from the block's first row of the weight on
  int64_t ldy, rows;
  const T** next;  // of each row the values from the tile on; and behind the last, tuning::kDownAhead more
  Bits bits;       // of the block's first row
  int64_t column, columns;
  bool accumulate;
  float* dx;  // [M][ldx], at the tile's first column
  int64_t ldx;
};

// dx[m][tile] (+)= sum over the block's rows of dy[m][row] * weight[row][tile].
// Unless kFull, the last vectors of the tile may be empty.
template <int M, bool kFull, typename T>
__attribute__((noinline)) void expanded_down(const ExpandedTile<T>& tile) {
  constexpr int kDepth = Operand<T>::kDepth, NV = tile_vectors<T>(M);
  const ExpandedTile<T> o = tile;  // which no store can change
  const auto valid = [&](int j) __attribute__((always_inline)) { return kFull ? L : o.columns - j * L; };
  Vec sum[M][NV] = {};
  if (o.accumulate) {
    MASKED_OPS_UNROLL
    for (int m = 0; m < M; ++m) {
      MASKED_OPS_UNROLL
      for (int j = 0; j < NV; ++j) {
        const float* const from = o.dx + m * o.ldx + j * L;
        sum[m][j] = kFull ? Vec::loadu(from) : Vec::loadu(Vec::first(valid(j)), from);
      }
    }
  }
  const T **next = o.next, *dy = o.dy;
  Bits bits = o.bits;
  const auto step = [&](auto rows) __attribute__((always_inline)) {
    constexpr int kRows = decltype(rows)::value;
    const T* in[kDepth];
    MASKED_OPS_UNROLL
    for (int d = 0; d < kDepth; ++d) in[d] = next[min(d, kRows - 1)];
    Vec v[NV / kDepth][kDepth] = {};
    MASKED_OPS_UNROLL
    for (int j = 0; j < NV; j += kDepth) {
      if (kFull || j * L < o.columns) {
        Operand<T>::expand_across(bits, kRows == kDepth, o.column + j * L, in, v[j / kDepth]);
      }
    }
    MASKED_OPS_UNROLL
    for (int d = 0; d < kRows; ++d) {
      prefetch(next[tuning::kDownAhead + d]);
      next[d] = in[d];
    }
    MASKED_OPS_UNROLL
    for (int m = 0; m < M; ++m) {
      const Vec factor = Operand<T>::broadcast(kRows, dy + m * o.ldy);
      MASKED_OPS_UNROLL
      for (int j = 0; j < NV; ++j) {
        sum[m][j] = Operand<T>::multiply_add(factor, v[j / kDepth][j % kDepth], sum[m][j]);
      }
    }
    next += kRows;
    bits.words += kRows * bits.stride;
    dy += kRows;
  };
  for (int64_t n = kDepth; n <= o.rows; n += kDepth) step(Int<kDepth>());
  if (o.rows % kDepth > 0) step(Int<1>());
  MASKED_OPS_UNROLL
  for (int m = 0; m < M; ++m) {
    MASKED_OPS_UNROLL
    for (int j = 0; j < NV; ++j) {
      float* const to = o.dx + m * o.ldx + j * L;
      kFull ? sum[m][j].storeu(to) : sum[m][j].storeu(Vec::first(valid(j)), to);
    }
  }
}

template <typename T>
void by_tiles(const Team& team, int64_t M, const PackedWeight& w, const T* grad_output, T* grad_input) {
  constexpr int64_t kRows = tuning::kDownRows;
  const int64_t N = w.rows, K = w.cols;
  const PackedRows<T> values(w);
  const RowTiles tiles(M, tuning::kDownTile);
  const int64_t unit = tile_vectors<T>(int(tiles.height)) * L;
  by_strips(team, M, K, unit, grad_input, [&](int64_t first, int64_t last, float* sums) {
    constexpr int64_t kRoom = kRows + tuning::kDownAhead + 1;
    const T** const all = static_cast<const T**>(scratch(Slot::kPlaces, size_t(kRoom * tiles.count) * sizeof(T*)));
    for (int64_t n = 0; n < N; n += kRows) {
      const int64_t rows = min(kRows, N - n);
      for (int64_t t = 0; t < tiles.count; ++t) {
        const T** const next = all + t * kRoom;
        values.begin(n, rows, first, next);
        for (int64_t i = rows; i < kRoom; ++i) next[i] = next[rows - 1];
        const int64_t m = tiles.begin(t), width = tile_vectors<T>(int(tiles.size(t))) * L;
        for (int64_t k = first; k < last; k += width) {
          const ExpandedTile<T> o = {
              grad_output + m * N + n, N, rows, next, {w.bits.row(n), w.bits.stride}, k, min(width, last - k), n > 0,
              sums + m * K + k,        K};
          with_int<tuning::kDownTile>(tiles.size(t), [&](auto height) {
            constexpr int kHeight = decltype(height)::value;
            o.columns == width ? expanded_down<kHeight, true>(o) : expanded_down<kHeight, false>(o);
          });
        }
      }
    }
  });
}

template <typename T>
struct ExpandedAxpys {
  static constexpr int64_t kMostFar = kTile.rows;
  const T* dy;  // [M][N], from the first row of the weight on
  int64_t N;
  int64_t rows;        // of the weight, from there to the end
  int64_t begin, end;  // columns, from a whole word on
  const T** next;      // of each row the values from here on
  Bits bits;           // of the first row
  float* dx;           // the chunk of the tile's sums

  template <int M, int R>
  void advance() {
    constexpr int64_t kRows = R * Operand<T>::kDepth;
    dy += kRows;
    rows -= kRows;
    next += kRows;
    bits.words += kRows * bits.stride;
  }
};

// dx[m] += sum over R rows of dy[m][r] * weight[r], of operands.
template <int M, int R, bool kFar, typename T>
MASKED_OPS_INLINE void take_group(const ExpandedAxpys<T>& o) {
  constexpr int kDepth = Operand<T>::kDepth;
  // The last row of the weight has another one beside it.
  const bool paired = R > 1 || kDepth == 1 || o.rows > 1;
  Vec dy[M][R];
  MASKED_OPS_UNROLL
  for (int m = 0; m < M; ++m) {
    MASKED_OPS_UNROLL
    for (int r = 0; r < R; ++r) {
      dy[m][r] = in_register(Operand<T>::broadcast(paired ? kDepth : 1, o.dy + m * o.N + r * kDepth));
    }
  }
  const T* in[R][kDepth];
  MASKED_OPS_UNROLL
  for (int r = 0; r < R; ++r) {
    MASKED_OPS_UNROLL
    for (int d = 0; d < kDepth; ++d) in[r][d] = o.next[r * kDepth + (paired ? d : 0)];
  }
  float* dx = o.dx;
  int64_t ahead = 0;
  if constexpr (kFar) ahead = bytes_of_group<R * kDepth>(in[0]);
  for (int64_t k = o.begin; k < o.end; k += 64) {
    if constexpr (kFar) {
      MASKED_OPS_UNROLL
      for (int r = 0; r < R * kDepth; ++r) fetch_values(in[r / kDepth][r % kDepth], ahead);
    }
    MASKED_OPS_UNROLL
    for (int j = 0; j < 64; j += L * kDepth, dx += M * L * kDepth) {
      if (j > 0 && k + j >= o.end) break;
      Vec w[R][kDepth];
      MASKED_OPS_UNROLL
      for (int r = 0; r < R; ++r) {
        const Bits bits = {o.bits.row(r * kDepth), o.bits.stride};
        Operand<T>::expand_across(bits, paired, k + j, in[r], w[r]);
      }
      MASKED_OPS_UNROLL
      for (int i = 0; i < kDepth * M; ++i) {
        Vec sum = Vec::load(dx + i * L);
        MASKED_OPS_UNROLL
        for (int r = 0; r < R; ++r) sum = Operand<T>::multiply_add(dy[i % M][r], w[r][i / M], sum);
        sum.store(dx + i * L);
      }
    }
  }
  MASKED_OPS_UNROLL
  for (int r = 0; r < R; ++r) {
    MASKED_OPS_UNROLL
    for (int d = 0; d < kDepth; ++d) {
      if (paired || d == 0) o.next[r * kDepth + d] = in[r][d];
    }
  }
}

// Threads share the rows, and their sums are added at the end.
template <typename T>
void by_rows(const Team& team, int64_t M, const PackedWeight& w, const T* grad_output, T* grad_input) {
  static constexpr KernelTable<ExpandedAxpys<T>, kTile> kKernels;
  constexpr int64_t kDepth = Operand<T>::kDepth;
  const int64_t N = w.rows, K = w.cols;
  const bool far = fetches_far<T>(w);
  const PackedRows<T> values(w);
  const RowTiles tiles(M, kTile.rows);
  // Sums of the columns as they lie: a vector of operands is as many columns, of each of its rows.
  const Chunks chunks(M, w.bits.stride * 64, M == 1 ? tuning::kRowChunk : tuning::kSumsChunk);
  const int64_t height = kTile.weights(int(tiles.height)) * kDepth;
  // Rows that all chunks pass before the next; they stay in L2.
  const int64_t block = max(tuning::kFewRowsPiece / (K * int64_t{sizeof(T)}) / height, int64_t{1}) * height;
  const int64_t parts = max(min<int64_t>(team.threads, N / tuning::kLeastExpandedRows), int64_t{1});
  const int64_t size = chunks.size();
  const auto begin = [&](int64_t part) { return part == parts ? N : N * part / parts / kDepth * kDepth; };
  float* const sums = static_cast<float*>(scratch(Slot::kPanelB, size_t(parts * size) * sizeof(float)));
  team.for_each(parts, [&](int64_t part) {
    float* const own = sums + part * size;
    for (int64_t i = 0; i < size; i += L) Vec::zero().store(own + i);
    const T** const next = static_cast<const T**>(scratch(Slot::kPlaces, size_t(block * tiles.count) * sizeof(T*)));
    const int64_t last = begin(part + 1);
    for (int64_t top = begin(part); top < last; top += block) {
      const int64_t count = min(block, last - top);
      for (int64_t t = 0; t < tiles.count; ++t) values.begin(top, count, 0, next + t * block);
      for (int64_t k = 0; k < chunks.columns; k += chunks.width) {
        for (int64_t t = 0; t < tiles.count; ++t) {
          const int64_t m = tiles.begin(t);
          for_groups(top, count, height, kDepth, [&](int64_t n, int64_t group_rows, int64_t groups) {
            const ExpandedAxpys<T> group = {grad_output + m * N + n,
                                            N,
                                            last - n,
                                            k,
                                            min(k + chunks.size(k), K),
                                            next + t * block + (n - top),
                                            {w.bits.row(n), w.bits.stride},
                                            chunks.at(own, k, m)};
            kKernels(far, tiles.size(t), group_rows / kDepth)(group, groups);
          });
        }
      }
    }
  });
  finish_sums(team, chunks, tiles, K, sums, parts, grad_input);
}

}  // namespace

void packed_linear_grad_input_small(const Team& team, Dtype dtype, int64_t M, const PackedWeight& weight,
                                    const void* dy, void* dx) {
  with_element(dtype, [&](auto element) {
    using T = decltype(element);
    if constexpr (Operand<T>::kExpands) {
      const auto take = [&](auto way) { way(team, M, weight, static_cast<const T*>(dy), static_cast<T*>(dx)); };
      if constexpr (tuning::kExpandedByRow < tuning::kExpandedGradRows) {
        const bool cached = weight.rows * weight.cols * int64_t{sizeof(T)} <= tuning::kCachedBytes;
        const bool tiles = cached && !too_far_for_tiles(team, weight.offsets[weight.rows] * int64_t{sizeof(T)});
        if (M > tuning::kExpandedByRow && tiles) return take(by_tiles<T>);
      }
      take(by_rows<T>);
    }
  });
}

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY
