// The gradient of convolutions of one tap on contiguous images with respect to the weight: dot products of planes. Both
// operands are loaded along the positions, so that neither has to be transposed.
#include "kernels.h"
#include "tuning.h"

namespace masked_ops::cpu::MASKED_OPS_CAPABILITY {
namespace {

constexpr int L = Vec::kLanes;

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
