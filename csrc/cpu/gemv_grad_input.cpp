// grad_input for a few rows of input. From memory, the weight comes a few rows at a time, each added to every row's
// sums by a factor of grad_output, which stays in a register (axpys); threads share the rows, and their sums are added
// at the end. From caches, where that is faster (tuning.h), tiles of columns come, whose sums stay in registers down a
// block of rows (sum_down): no sum is stored for each few products, which costs more than the order of memory gains.
#include "gemv_grad_input.h"

#include "pack.h"

namespace masked_ops::cpu::MASKED_OPS_CAPABILITY {
namespace {

constexpr int L = Vec::kLanes;
constexpr RegisterTile kTile = {tuning::kMR, tuning::kSmallRegisters};

struct Area {
  int64_t first, last;  // rows of the weight
  int64_t begin, end;   // columns
};

// Vectors of columns of the weight beside rows of input.
constexpr int tile_vectors(int rows) { return tuning::kDownVectors[rows - 1]; }

template <typename T>
struct Tile {
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
__attribute__((noinline)) void sum_down(const Tile<T>& tile) {
  constexpr int kDepth = Operand<T>::kDepth, NV = tile_vectors(M);
  const Tile<T> o = tile;  // which no store can change
  Vec sum[M][NV];
  const auto valid = [&](int j) __attribute__((always_inline)) { return Vec::first(o.columns - j * L); };
  if (o.accumulate) {
    const float* row = o.dx;
    MASKED_OPS_UNROLL
    for (int m = 0; m < M; ++m, row += o.ldx) {
      MASKED_OPS_UNROLL
      for (int j = 0; j < NV; ++j) sum[m][j] = kFull ? Vec::loadu(row + j * L) : Vec::loadu(valid(j), row + j * L);
    }
  } else {
    MASKED_OPS_UNROLL
    for (int m = 0; m < M; ++m) {
      MASKED_OPS_UNROLL
      for (int j = 0; j < NV; ++j) sum[m][j] = Vec::zero();
    }
  }
  constexpr int kLines = ceil_div(NV * L * int{sizeof(T)}, 64);  // of a row of the weight
  const T *w = o.weight, *dy = o.dy;
  const uint64_t* bits = o.bits.row(0);
  const auto step = [&](auto rows) __attribute__((always_inline)) {
    constexpr int kRows = decltype(rows)::value;
    Vec v[NV];
    const Vec first = Operand<T>::broadcast(kRows, dy);
    constexpr int kPaired = Operand<T>::kHasAcrossTwo && kFull && kRows == kDepth ? NV / 2 * 2 : 0;
    if constexpr (kPaired > 0) {
      MASKED_OPS_UNROLL
      for (int j = 0; j < kPaired; j += 2) {
        uint32_t two[kDepth];
        MASKED_OPS_UNROLL
        for (int d = 0; d < kDepth; ++d) {
          two[d] = Operand<T>::predicate_of_two(bits + d * o.bits.stride, o.column + j * L);
        }
        Vec pair[2];
        Operand<T>::across_two(two, w + j * L, o.ldw, pair);
        v[j] = pair[0];
        v[j + 1] = pair[1];
      }
    }
    constexpr int kWord = kFull && !kConverts<T> && NV % Vec::kWordVectors == 0 ? Vec::kWordVectors : 1;  // vectors
    Vec::Word words[kDepth] = {};
    MASKED_OPS_UNROLL
    for (int j = kPaired; j < NV; ++j) {
      Lanes<T> lanes[kDepth] = {};
      MASKED_OPS_UNROLL
      for (int d = 0; d < kRows; ++d) {
        const uint64_t* const row = bits + d * o.bits.stride;
        const int64_t column = o.column + j * L;
        if constexpr (kWord > 1) {
          if (j % kWord == 0) words[d] = Vec::word(row, column);
          lanes[d] = Vec::signs(words[d], j % kWord);
        } else if (kFull || j * L < o.columns) {
          lanes[d] = lanes_at<T>(row, column);
        }
      }
      v[j] = Operand<T>::across(lanes, o.columns - j * L, w + j * L, o.ldw);
      if (M == 1) sum[0][j] = in_register(Operand<T>::multiply_add(first, v[j], sum[0][j]));
    }
    MASKED_OPS_UNROLL
    for (int i = 0; i < kDepth * kLines; ++i) {
      prefetch(w + (tuning::kDownAhead + i / kLines) * o.ldw + i % kLines * (64 / int{sizeof(T)}));
    }
    MASKED_OPS_UNROLL
    for (int m = M == 1 ? 1 : 0; m < M; ++m) {
      const Vec factor = Operand<T>::broadcast(kRows, dy + m * o.ldy);
      MASKED_OPS_UNROLL
      for (int j = 0; j < NV; ++j) sum[m][j] = Operand<T>::multiply_add(factor, v[j], sum[m][j]);
    }
    w += kRows * o.ldw;
    bits += kRows * o.bits.stride;
    dy += kRows;
  };
  for (int64_t n = kDepth; n <= o.rows; n += kDepth) step(Int<kDepth>());
  if (o.rows % kDepth > 0) step(Int<1>());
  float* row = o.dx;
  MASKED_OPS_UNROLL
  for (int m = 0; m < M; ++m, row += o.ldx) {
    MASKED_OPS_UNROLL
    for (int j = 0; j < NV; ++j) kFull ? sum[m][j].storeu(row + j * L) : sum[m][j].storeu(valid(j), row + j * L);
  }
}

template <typename T>
struct Axpys {
  static constexpr int64_t kMostFar = far_rows<T>(tuning::kMostFarSums) * Operand<T>::kDepth;  // rows of input
  const float* dy;     // operands [rows of the weight][kTile.rows], from the first one on
  int64_t rows;        // of the weight, from there to the end
  int64_t begin, end;  // columns
  int64_t K;
  const T* weight;  // of the first row
  Bits bits;        // likewise
  const T* ahead;   // what is fetched ahead of the first row
  int64_t pace;     // columns that it moves by with every vector
  float* dx;        // the chunk of the tile's sums

  template <int M, int R>
  void advance() {
    constexpr int64_t kRows = R * Operand<T>::kDepth;
    dy += R * kTile.rows;
    rows -= kRows;
    weight += kRows * K;
    bits.words += kRows * bits.stride;
    ahead += kRows * K;
  }
};

// dx[m] += sum over R rows of dy[m][r] * weight[r], of operands.
template <int M, int R, bool kFar, typename T>
MASKED_OPS_INLINE void take_group(const Axpys<T>& o) {
  constexpr int kDepth = Operand<T>::kDepth;
  constexpr bool kWords = M == 1 && Vec::kWordVectors > 1;
  constexpr bool kPlain = kFar && tuning::kFarPlain;
  static_assert(kWords || !kPlain);
  constexpr int W = kWords ? Vec::kWordVectors : 1;
  Vec dy[M][R];
  MASKED_OPS_UNROLL
  for (int m = 0; m < M; ++m) {
    MASKED_OPS_UNROLL
    for (int r = 0; r < R; ++r) {
      dy[m][r] = in_register(Vec::set1(o.dy[r * kTile.rows + m]));
    }
  }
  const int64_t K = o.K;
  const bool paired = (R - 1) * kDepth + 1 < o.rows;  // the last row of the weight has another one beside it
  const T* ahead = o.ahead;
  float* dx = o.dx;
  for (int64_t k = o.begin; k < o.end; k += W * L, dx += W * M * L, ahead += W * o.pace) {
    Vec::Word words[R][kDepth] = {};
    MASKED_OPS_UNROLL
    for (int r = 0; r < R; ++r) {
      MASKED_OPS_UNROLL
      for (int d = 0; d < kDepth; ++d) {
        if (kWords) words[r][d] = Vec::word(o.bits.row(r * kDepth + d), k);
      }
    }
    MASKED_OPS_UNROLL
    for (int j = 0; j < W; ++j) {
      const int64_t at = k + j * L;
      Vec w[R];
      MASKED_OPS_UNROLL
      for (int r = 0; r < R; ++r) {
        std::conditional_t<kWords, Vec::Signs, Lanes<T>> lanes[kDepth] = {};
        MASKED_OPS_UNROLL
        for (int d = 0; d < kDepth; ++d) {
          if (d == 0 || r < R - 1 || paired) {
            if constexpr (kWords) {
              lanes[d] = Vec::signs(words[r][d], j);
            } else {
              lanes[d] = lanes_at<T>(o.bits.row(r * kDepth + d), at);
            }
          }
        }
        const T* const p = o.weight + r * kDepth * K + at;
        if constexpr (kPlain) {
          w[r] = load_plain(lanes[0], K - at, p);
        } else {
          w[r] = Operand<T>::across(lanes, K - at, p, K);
        }
      }
      MASKED_OPS_UNROLL
      for (int m = 0; m < M; ++m) {
        float* const to = dx + (j * M + m) * L;
        Vec sum = Vec::load(to);
        MASKED_OPS_UNROLL
        for (int r = m * R / M * kDepth; r < (m + 1) * R / M * kDepth; ++r) {
          if (!kPlain && fetches_with<T>(j)) prefetch<kFar>(ahead + r * K + j * o.pace);
        }
        MASKED_OPS_UNROLL
        for (int r = 0; r < R; ++r) sum = Operand<T>::multiply_add(dy[m][r], w[r], sum);
        sum.store(to);
      }
    }
  }
}

// grad_output of rows [first, last) of the weight, as panels of operands [row][kTile.rows], one for each tile.
struct Factors {
  float* at;
  int64_t first, pitch;
};

template <typename T>
Factors factors_of(const RowTiles& tiles, int64_t N, const T* grad_output, int64_t first, int64_t last) {
  constexpr int kDepth = Operand<T>::kDepth;
  const int64_t depth = ceil_div(last - first, kDepth), pitch = ceil_div(depth, kDepthOfA) * kDepthOfA * kTile.rows;
  float* const at = static_cast<float*>(scratch(Slot::kPanelA, size_t(tiles.count * pitch) * sizeof(float)));
  for (int64_t t = 0; t < tiles.count; ++t) {
    pack_row_panel(grad_output, N, tiles.begin(t), tiles.size(t), first / kDepth, depth, at + t * pitch);
  }
  return {at, first, pitch};
}

// sums, laid out in chunks, += grad_output * weight over an area of the weight: chunk by chunk down all rows, or down
// blocks of them.
template <typename T>
void take_area(const Chunks& chunks, const RowTiles& tiles, int64_t N, int64_t K, const Factors& factors,
               const T* weight, Bits bits, const Reading& reading, bool all_rows, const Area& area, float* sums) {
  static constexpr KernelTable<Axpys<T>, kTile> kKernels;
  constexpr int kDepth = Operand<T>::kDepth;
  const int64_t group = reading.group_rows(kTile, tiles, kDepth) * kDepth;
  const int64_t block = all_rows ? N : ceil_div(tuning::kSmallBlock, group) * group;
  const int64_t most = groups_of_step(group * min(chunks.width, K) * int64_t{sizeof(T)});
  Walk at = {group, kDepth, most, block, chunks.width, area.first, area.last, area.begin, area.end};
  Walk ahead = ahead_of(at, reading.ahead(), most * group * min(chunks.width, K) * int64_t{sizeof(T)});
  for (; !at.done(); at.advance()) {
    const int64_t n = at.row, k = at.column, columns = chunks.size(k);
    const T* next = weight + n * K + k;
    if (!ahead.done()) {
      next = weight + ahead.row * K + ahead.column;
      ahead.advance();
    }
    if (reading.by_row && tiles.rows > 1) next = weight + n * K + k + tuning::kRowAhead / int64_t{sizeof(T)};
    for (int64_t t = 0; t < tiles.count; ++t) {
      const Axpys<T> of_group = {factors.at + t * factors.pitch + (n - factors.first) / kDepth * kTile.rows,
                                 area.last - n,
                                 k,
                                 k + columns,
                                 K,
                                 weight + n * K,
                                 {bits.row(n), bits.stride},
                                 next + columns / tiles.count * t,
                                 L / tiles.count,
                                 chunks.at(sums, k, tiles.begin(t))};
      kKernels(reading.far, tiles.size(t), at.group_rows() / kDepth)(of_group, at.groups());
    }
  }
}

template <typename T>
void by_tiles(const Team& team, int64_t M, int64_t N, int64_t K, const T* grad_output, const T* weight, Bits bits,
              T* grad_input) {
  const RowTiles tiles(M, tuning::kDownTile);
  const int64_t width = tile_vectors(int(tiles.height)) * L;
  by_strips(team, M, K, width, grad_input, [&](int64_t first, int64_t last, float* sums) {
    for (int64_t n = 0; n < N; n += tuning::kDownRows) {
      for (int64_t k = first; k < last; k += width) {
        for (int64_t t = 0; t < tiles.count; ++t) {
          const int64_t m = tiles.begin(t);
          const Tile<T> o = {grad_output + m * N + n,
                             N,
                             min(tuning::kDownRows, N - n),
                             weight + n * K + k,
                             K,
                             {bits.row(n), bits.stride},
                             k,
                             min(width, last - k),
                             n > 0,
                             sums + m * K + k,
                             K};
          with_int<tuning::kDownTile>(tiles.size(t), [&](auto height) {
            constexpr int kRows = decltype(height)::value;
            o.columns == tile_vectors(kRows) * L ? sum_down<kRows, true>(o) : sum_down<kRows, false>(o);
          });
        }
      }
    }
  });
}

// By rows.
template <typename T>
void by_rows(const Team& team, int64_t M, int64_t N, int64_t K, const T* grad_output, const T* weight, Bits bits,
             T* grad_input) {
  // From memory, or if it is read plainly, the weight comes in the order of its rows, of which every thread has a part;
  // from caches in chunks, whose sums no other thread has.
  const int64_t threads = team.threads;
  const Reading reading = Reading::of(M, N * K * int64_t{sizeof(T)}, K, Axpys<T>::kMostFar,
                                      kIsFloat<T> ? tuning::kMostByRow : 1, /*waits=*/false);
  const bool cached = reading.cached && !reading.plain();
  const int64_t most_parts = max(min(threads, N / tuning::kLeastPartRows), int64_t{1});
  const RowTiles tiles(M, kTile.rows);
  const Chunks chunks(M, K, reading.chunk<T>(tiles, 1, tuning::kSumsChunk),
                      cached || most_parts < threads ? threads : 1);
  const bool by_chunks = most_parts == 1 || (cached && chunks.count() >= threads);
  const int64_t parts = by_chunks ? 1 : most_parts, size = chunks.size();
  const int64_t strips = by_chunks ? chunks.count() : 1, strip = by_chunks ? chunks.width : chunks.columns;
  const auto begin = [&](int64_t part) {
    constexpr int64_t kDepth = Operand<T>::kDepth;
    return part == parts ? N : N * part / parts / kDepth * kDepth;
  };
  float* const sums = static_cast<float*>(scratch(Slot::kPanelB, size_t(parts * size) * sizeof(float)));
  const int64_t workers = min(threads, parts * strips);
  TaskQueue queue(parts * strips, workers);
  team.for_each(workers, [&](int64_t number) {
    TaskQueue::Worker worker(queue, number);
    Factors factors = {nullptr, -1, 0};
    for (int64_t task; (task = worker.take()) >= 0;) {
      const int64_t part = task / strips, left = task % strips * strip, right = min(left + strip, chunks.columns);
      const Area area = {begin(part), begin(part + 1), left, right};
      if (factors.first != area.first) factors = factors_of(tiles, N, grad_output, area.first, area.last);
      float* const own = sums + part * size;
      for (int64_t i = left * M; i < right * M; i += L) Vec::zero().store(own + i);
      take_area(chunks, tiles, N, K, factors, weight, bits, reading, cached || by_chunks, area, own);
      if (by_chunks) finish_chunk(chunks, tiles, left, K, sums, parts, grad_input);
    }
  });
  if (!by_chunks) finish_sums(team, chunks, tiles, K, sums, parts, grad_input);
}

// Rows of input up to which this is faster than the GEMM.
template <typename T>
int64_t most_rows(const Team& team, int64_t N, int64_t K) {
  const int64_t pitch = K * int64_t{sizeof(T)};
  if (too_far_for_tiles(team, N * pitch)) {
    return kConverts<T> ? tuning::kSmallRowsFarConverted : tuning::kSmallRowsFar;
  }
  if (N * pitch > tuning::kCachedBytes) return kIsFloat<T> ? tuning::kSmallRowsFloat : tuning::kSmallRows;
  if (kConverts<T>) return tuning::kDownMostConverted;
  return pitch % 4096 == 0 ? tuning::kDownMostApart : tuning::kDownMost;
}

}  // namespace

bool takes_grad_input_small(const Team& team, Dtype dtype, int64_t M, int64_t N, int64_t K) {
  bool takes = false;
  with_element(dtype, [&](auto element) { takes = M <= most_rows<decltype(element)>(team, N, K); });
  return takes;
}

void linear_grad_input_small(const Team& team, Dtype dtype, int64_t M, int64_t N, int64_t K, const void* dy,
                             const void* weight, Bits bits, void* dx) {
  with_element(dtype, [&](auto element) {
    using T = decltype(element);
    const int64_t bytes = N * K * int64_t{sizeof(T)};
    const int64_t least = kConverts<T> ? tuning::kDownColumnsConverted : tuning::kDownColumns * team.threads;
    const int64_t most = kConverts<T> ? tuning::kDownBytesConverted : tuning::kDownBytes;
    const bool tiles =
        M > tuning::kAxpyRows / Operand<T>::kDepth && K >= least && bytes <= most && !too_far_for_tiles(team, bytes);
    const bool short_rows = M <= tuning::kShortTile && kIsFloat<T> && K <= tuning::kDownShort &&
                            bytes <= tuning::kDownShortBytes && K >= tile_vectors(int(M)) * L * team.threads;
    (tiles || short_rows ? by_tiles<T> : by_rows<T>)(team, M, N, K, static_cast<const T*>(dy),
                                                     static_cast<const T*>(weight), bits, static_cast<T*>(dx));
  });
}

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY
