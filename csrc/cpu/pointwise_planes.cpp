// Convolutions of one tap on contiguous images, where a channel of an image is a plane of positions: for each image,
// products of the masked weight with the matrix [channels][positions] that it is, read where it lies.
//
// Forward and the gradient with respect to the input: the weight, or its transpose, is packed into panels [k][kMR] with
// its mask as the predicate of the loads; a block of columns of the image stays in L1 while all panels pass. The
// gradient with respect to the weight is dot products of planes: both operands are loaded along the positions, so that
// neither has to be transposed.
#include "kernels.h"
#include "tuning.h"

namespace masked_ops::cpu::MASKED_OPS_CAPABILITY {
namespace {

constexpr int L = Vec::kLanes;
using tuning::kMR;
using tuning::kNR;
using tuning::kNV;

// The masked weight, or its transpose, as a left operand of M rows and K columns: blocks of K, in each the panels.
struct Packed {
  int64_t M, K, block, panels;
  float* data;

  Packed(int64_t M, int64_t K) : M(M), K(K), panels(ceil_div(M, kMR)) {
    block = ceil_div(ceil_div(K, ceil_div(K, tuning::kPlaneDepth)), 64) * 64;  // whole words of bits
    data = static_cast<float*>(scratch(Slot::kPanelA, size_t(panels * kMR * K) * sizeof(float)));
  }
  int64_t depth(int64_t k0) const { return min(block, K - k0); }
  float* panel(int64_t k0, int64_t i) const { return data + (k0 * panels + i * depth(k0)) * kMR; }
};

// Of a weight [M][K]: vectors of depths, as many as fill one with the rows of a panel, are transposed.
void pack_rows(const Packed& packed, const float* weight, Bits bits, int64_t first_panel, int64_t last_panel) {
  constexpr int kParts = L / kMR;
  static_assert(kParts == 1 || kParts == 2);
  for (int64_t k0 = 0; k0 < packed.K; k0 += packed.block) {
    const int64_t depth = packed.depth(k0);
    for (int64_t panel = first_panel; panel < last_panel; ++panel) {
      const int64_t m0 = panel * kMR, rows = min<int64_t>(kMR, packed.M - m0);
      float* const to = packed.panel(k0, panel);
      for (int64_t k = 0; k < depth; k += kParts * L) {
        Vec tile[L];  // a vector of each row, then the next vector of each row
        MASKED_OPS_UNROLL
        for (int i = 0; i < L; ++i) {
          const int64_t row = m0 + i % kMR, at = k0 + k + i / kMR * L;
          tile[i] = i % kMR < rows && at < packed.K
                        ? Vec::loadu(Vec::predicate(bits.row(row), at), weight + row * packed.K + at)
                        : Vec::zero();
        }
        transpose(tile);
        float* const columns = to + k * kMR;
        if (depth - k >= kParts * L) {
          MASKED_OPS_UNROLL
          for (int i = 0; i < L; ++i) {
            kParts == 1 ? tile[i].store(columns + i * kMR)
                        : tile[i].store_halves(columns + i * kMR, columns + (L + i) * kMR);
          }
        } else {
          alignas(64) float whole[L][L];
          MASKED_OPS_UNROLL
          for (int i = 0; i < L; ++i) tile[i].store(whole[i]);
          for (int64_t i = 0; i < depth - k; ++i) {
            std::memcpy(columns + i * kMR, whole[i % L] + i / L * kMR, kMR * sizeof(float));
          }
        }
      }
    }
  }
}

// Of a weight [K][M].
void pack_columns(const Packed& packed, const float* weight, Bits bits, int64_t first_panel, int64_t last_panel) {
  for (int64_t k = 0; k < packed.K; ++k) {
    const int64_t k0 = k / packed.block * packed.block;
    for (int64_t panel = first_panel; panel < last_panel; ++panel) {
      const int64_t m0 = panel * kMR;
      const Vec::Predicate lanes = Vec::first(min<int64_t>(kMR, packed.M - m0));
      const Vec::Predicate left = Vec::predicate(bits.row(k)[m0 / 64] >> (m0 % 64)) & lanes;
      Vec::loadu(left, weight + k * packed.M + m0).storeu(Vec::first(kMR), packed.panel(k0, panel) + (k - k0) * kMR);
    }
  }
}

// pack(first panel, last panel) in parallel, panels in groups.
template <typename Pack>
void pack_panels(const Team& team, const Packed& packed, const Pack& pack) {
  const int64_t group = max<int64_t>(tuning::kPassGrain / (kMR * packed.K), 8);
  team.for_each(ceil_div(packed.panels, group),
                [&](int64_t task) { pack(task * group, min((task + 1) * group, packed.panels)); });
}

// A tile of the result: rows of a panel by the columns of NV vectors.
struct Tile {
  const float *A, *B;
  int64_t depth, pitch;  // pitch of the image and of the result: positions
  const float* next;     // of the block of columns that follows; null if somebody else prefetches it
  int64_t rows, columns;
  bool first;  // of the blocks of depth
  const float* bias;
  float* C;
};

// Of a full one the lanes of the last vector take no register.
template <int NV, bool kFull>
__attribute__((noinline)) void multiply_tile(const Tile& tile) {
  const Vec::Predicate lanes = Vec::first(tile.columns - (NV - 1) * L);
  const int64_t pitch = tile.pitch;
  Vec c[kMR][NV];
  MASKED_OPS_UNROLL
  for (int i = 0; i < kMR; ++i) {
    const bool inside = i < tile.rows;
    MASKED_OPS_UNROLL
    for (int j = 0; j < NV; ++j) {
      c[i][j] = tile.first ? (tile.bias && inside ? Vec::set1(tile.bias[i]) : Vec::zero())
                           : Vec::loadu(inside ? Vec::first(tile.columns - j * L) : Vec::Predicate(0),
                                        tile.C + i * pitch + j * L);
    }
  }
  const float *A = tile.A, *B = tile.B, *next = tile.next;
  const auto step = [&] {
    Vec b[NV];
    MASKED_OPS_UNROLL
    for (int j = 0; j < NV; ++j) b[j] = !kFull && j == NV - 1 ? Vec::loadu(lanes, B + j * L) : Vec::loadu(B + j * L);
    MASKED_OPS_UNROLL
    for (int i = 0; i < kMR; ++i) {
      const Vec a = Vec::set1(A[i]);
      MASKED_OPS_UNROLL
      for (int j = 0; j < NV; ++j) c[i][j] = fmadd(a, b[j], c[i][j]);
    }
    A += kMR;
    B += pitch;
  };
  if (next) {
    for (int64_t k = 0; k < tile.depth; ++k, next += pitch) {
      for (int j = 0; j < kNR; j += 64 / sizeof(float)) prefetch(next + j);
      step();
    }
  } else {
    for (int64_t k = 0; k < tile.depth; ++k) step();
  }
  float* row = tile.C;
  MASKED_OPS_UNROLL
  for (int i = 0; i < kMR; ++i, row += pitch) {
    if (i >= tile.rows) break;
    MASKED_OPS_UNROLL
    for (int j = 0; j < NV; ++j) {
      !kFull&& j == NV - 1 ? c[i][j].storeu(lanes, row + j * L) : c[i][j].storeu(row + j * L);
    }
  }
}

template <bool kFull>
void multiply(const Tile& tile, int64_t vectors) {
  static_assert(kNV == 3);
  if (vectors == 3) {
    multiply_tile<3, kFull>(tile);
  } else if (vectors == 2) {
    multiply_tile<2, kFull>(tile);
  } else {
    multiply_tile<1, kFull>(tile);
  }
}

// to[image][M][positions] = A * from[image][K][positions] + bias[M]
void multiply(const Team& team, const Packed& A, int64_t batch, int64_t positions, const float* from, const float* bias,
              float* to) {
  // Blocks of columns of equal width, in whole vectors; rows are split where there are few.
  const int64_t vectors = ceil_div(positions, L), blocks = ceil_div(vectors, kNV);
  const int64_t splits = max<int64_t>(min(A.panels / 8, ceil_div(4 * team.threads, batch * blocks)), 1);
  team.for_each(batch * blocks * splits, [&](int64_t task) {
    const int64_t split = task % splits, block = task / splits % blocks, image = task / splits / blocks;
    const int64_t column = vectors * block / blocks * L, end = min(vectors * (block + 1) / blocks * L, positions);
    const float* const B = from + image * A.K * positions + column;
    for (int64_t k0 = 0; k0 < A.K; k0 += A.block) {
      const bool last = k0 + A.block >= A.K;
      const int64_t first_panel = A.panels * split / splits;
      for (int64_t panel = first_panel; panel < A.panels * (split + 1) / splits; ++panel) {
        const int64_t m = panel * kMR;
        Tile tile = {};
        tile.A = A.panel(k0, panel);
        tile.B = B + k0 * positions;
        tile.depth = A.depth(k0);
        tile.pitch = positions;
        if (panel == first_panel) tile.next = last ? B + (end - column) : tile.B + A.block * positions;
        tile.rows = min<int64_t>(kMR, A.M - m);
        tile.columns = end - column;
        tile.first = k0 == 0;
        tile.bias = bias ? bias + m : nullptr;
        tile.C = to + (image * A.M + m) * positions + column;
        tile.columns % L ? multiply<false>(tile, ceil_div(tile.columns, L)) : multiply<true>(tile, tile.columns / L);
      }
    }
  });
}

// Positions [first, last) of some images.
struct Chunk {
  int64_t first_image, images, first, last;
};

constexpr int kDotRows = 4;
#if defined(__AVX512F__)
constexpr int kDotColumns = 6;
#else
constexpr int kDotColumns = 3;
#endif

// Planes of positions of some images, from a channel on.
struct Planes {
  const float* data;
  int64_t image;  // floats from image to image
};

// sums[j][i] = dot product of plane i of dy and plane j of x over the chunk; what lies kDotColumns planes further is
// prefetched.
template <int I, int J>
MASKED_OPS_INLINE void dot_planes(const Chunk& chunk, int64_t positions, Planes dy, Planes x, bool prefetches,
                                  Vec (&sums)[J][I]) {
  MASKED_OPS_UNROLL
  for (int j = 0; j < J; ++j) {
    MASKED_OPS_UNROLL
    for (int i = 0; i < I; ++i) sums[j][i] = Vec::zero();
  }
  const int64_t pitch = opaque(positions);
  const auto add = [&](const float* g, const float* v, const auto& load) __attribute__((always_inline)) {
    // The fewer stay in registers.
    if constexpr (I < J) {
      Vec rows[I];
      MASKED_OPS_UNROLL
      for (int i = 0; i < I; ++i) rows[i] = load(g + i * pitch);
      MASKED_OPS_UNROLL
      for (int j = 0; j < J; ++j) {
        const Vec column = load(v + j * pitch);
        MASKED_OPS_UNROLL
        for (int i = 0; i < I; ++i) sums[j][i] = fmadd(rows[i], column, sums[j][i]);
      }
    } else {
      Vec columns[J];
      MASKED_OPS_UNROLL
      for (int j = 0; j < J; ++j) columns[j] = load(v + j * pitch);
      MASKED_OPS_UNROLL
      for (int i = 0; i < I; ++i) {
        const Vec row = load(g + i * pitch);
        MASKED_OPS_UNROLL
        for (int j = 0; j < J; ++j) sums[j][i] = fmadd(row, columns[j], sums[j][i]);
      }
    }
  };
  const auto load_all = [](const float* p) __attribute__((always_inline)) { return Vec::loadu(p); };
  for (int64_t image = chunk.first_image; image < chunk.first_image + chunk.images; ++image) {
    const float *g = dy.data + image * dy.image + chunk.first, *v = x.data + image * x.image + chunk.first;
    int64_t left = chunk.last - chunk.first;
    if (prefetches) {
      for (; left >= L; left -= L, g += L, v += L) {
        for (int j = 0; j < J; ++j) prefetch_l2(v + (kDotColumns + j) * pitch);
        add(g, v, load_all);
      }
    }
    for (; left >= L; left -= L, g += L, v += L) add(g, v, load_all);
    if (left) {
      const Vec::Predicate lanes = Vec::first(left);
      add(g, v, [&](const float* p) __attribute__((always_inline)) { return Vec::loadu(lanes, p); });
    }
  }
}

// to[i][j] (+)= the sum over the lanes of sums[j][i].
template <int I, int J>
MASKED_OPS_INLINE void add_sums(const Vec (&sums)[J][I], bool first, float* to, int64_t pitch) {
  constexpr int kQuads = L / 4;
  float across[(J + kQuads) * 4];
  if constexpr (I == 4) {
    MASKED_OPS_UNROLL
    for (int j = 0; j < J; j += kQuads) {
      Vec quads[kQuads];
      MASKED_OPS_UNROLL
      for (int q = 0; q < kQuads; ++q) {
        quads[q] = j + q < J ? sum_quads(sums[j + q][0], sums[j + q][1], sums[j + q][2], sums[j + q][3]) : Vec::zero();
      }
      sum_across_quads(quads).storeu(across + j * 4);
    }
  } else {
    for (int j = 0; j < J; ++j) across[j * 4] = sums[j][0].sum();
  }
  for (int i = 0; i < I; ++i, to += pitch) {
    for (int j = 0; j < J; ++j) to[j] = first ? across[j * 4 + i] : to[j] + across[j * 4 + i];
  }
}

template <int I, int J>
__attribute__((noinline)) void correlate_tile(const Chunk& chunk, int64_t positions, Planes dy, Planes x,
                                              bool prefetches, bool first, float* to, int64_t pitch) {
  static_assert(I == 4 || I == 1);
  Vec sums[J][I];
  dot_planes(chunk, positions, dy, x, prefetches, sums);
  add_sums(sums, first, to, pitch);
}

}  // namespace

void pointwise(const Team& team, int64_t batch, int64_t positions, int64_t N, int64_t K, const float* input,
               const float* weight, Bits bits, const float* bias, float* output) {
  const Packed A(N, K);
  pack_panels(team, A, [&](int64_t first, int64_t last) { pack_rows(A, weight, bits, first, last); });
  multiply(team, A, batch, positions, input, bias, output);
}

void pointwise_grad_input(const Team& team, int64_t batch, int64_t positions, int64_t N, int64_t K,
                          const float* grad_output, const float* weight, Bits bits, const float* bias,
                          float* grad_input) {
  const Packed A(K, N);
  pack_panels(team, A, [&](int64_t first, int64_t last) { pack_columns(A, weight, bits, first, last); });
  multiply(team, A, batch, positions, grad_output, bias, grad_input);
}

void pointwise_grad_weight(const Team& team, int64_t batch, int64_t positions, int64_t N, int64_t K,
                           const float* grad_output, const float* input, Bits bits, float* grad_weight) {
  // Large planes in equal parts, small ones several images at a time.
  const int64_t vectors = ceil_div(positions, L);
  const int64_t part = ceil_div(vectors, ceil_div(positions, tuning::kPlaneChunk)) * L;
  const int64_t images = max<int64_t>(min(tuning::kPlaneChunk / positions, batch), 1);
  // A block of planes of grad_output stays in L2 while the planes of the input pass. The larger side is shared out.
  const int64_t chunk_bytes = min(part, positions) * images * int64_t{sizeof(float)};
  const int64_t rows = max<int64_t>(tuning::kPlaneBytes / chunk_bytes / kDotRows, 1) * kDotRows;
  const bool by_rows = N > K;
  const int64_t panels = by_rows ? ceil_div(N, kDotRows) : ceil_div(K, kDotColumns);
  const int64_t tasks = min(panels, int64_t{2} * team.threads);
  team.for_each(tasks, [&](int64_t task) {
    const int64_t begin = panels * task / tasks, end = panels * (task + 1) / tasks;
    const int64_t first_row = by_rows ? begin * kDotRows : 0, last_row = by_rows ? min(end * kDotRows, N) : N;
    const int64_t first_column = by_rows ? 0 : begin * kDotColumns;
    const int64_t last_column = by_rows ? K : min(end * kDotColumns, K);
    const auto correlate = [&](const Chunk& chunk, int64_t n0, int64_t k, auto J) {
      constexpr int kColumns = decltype(J)::value;
      const bool first = chunk.first_image == 0 && chunk.first == 0;
      const int64_t last = min(n0 + rows, last_row);
      const Planes x = {input + k * positions, K * positions};
      for (int64_t n = n0; n < last;) {
        const Planes dy = {grad_output + n * positions, N * positions};
        float* const to = grad_weight + n * K + k;
        if (last - n >= kDotRows) {
          correlate_tile<kDotRows, kColumns>(chunk, positions, dy, x, n == first_row, first, to, K);
          n += kDotRows;
        } else {
          correlate_tile<1, kColumns>(chunk, positions, dy, x, false, first, to, K);
          ++n;
        }
      }
    };
    for (int64_t image = 0; image < batch; image += images) {
      for (int64_t p = 0; p < positions; p += part) {
        const Chunk chunk = {image, min(images, batch - image), p, min(p + part, positions)};
        for (int64_t n0 = first_row; n0 < last_row; n0 += rows) {
          int64_t k = first_column;
          for (; k + kDotColumns <= last_column; k += kDotColumns) correlate(chunk, n0, k, Int<kDotColumns>());
          for (; k < last_column; ++k) correlate(chunk, n0, k, Int<1>());
        }
      }
    }
  });
  mask_copy(team, sizeof(float), grad_weight, bits, N, K, grad_weight);
}

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY
