// Convolutions of one tap on contiguous images, where a channel of an image is a plane of positions: for each image,
// products of the masked weight, or its transpose, with the matrix [channels][positions] that it is.
//
// The weight is packed into panels [k][kMR] with its mask as the predicate of the loads; a block of columns of the
// image stays in L1 while all panels pass. Planes of whole vectors are read and written where they lie. Of others, the
// positions of all images are taken in one go, and packed. (The gradient with respect to the weight:
// pointwise_grad_weight.cpp.)
#include "kernels.h"
#include "tuning.h"

namespace masked_ops::cpu::MASKED_OPS_CAPABILITY {
namespace {

constexpr int L = Vec::kLanes;
using tuning::kMR;
using tuning::kNR;
using tuning::kNV;
constexpr int64_t kWordPanels = 64 / kMR;  // that a word of bits covers

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

// Of a weight [K][M]: the columns of a word of bits at a time.
void pack_columns(const Packed& packed, const float* weight, Bits bits, int64_t first_panel, int64_t last_panel) {
  constexpr int kParts = L / kMR;
  for (int64_t word = first_panel / kWordPanels; word * kWordPanels < last_panel; ++word) {
    for (int64_t k = 0; k < packed.K; ++k) {
      const int64_t k0 = k / packed.block * packed.block, m0 = word * 64;
      const uint64_t* const left = bits.row(k) + word;
      for (int j = 0; j < 64 && m0 + j < packed.M; j += L) {
        const int64_t panel = (m0 + j) / kMR;
        const Vec v = Vec::loadu(Vec::predicate(*left, left, j), weight + k * packed.M + m0 + j);
        float* const to = packed.panel(k0, panel) + (k - k0) * kMR;
        if (kParts == 1) {
          v.store(to);
        } else if (panel + 1 < last_panel) {
          v.store_halves(to, packed.panel(k0, panel + 1) + (k - k0) * kMR);
        } else {
          v.storeu(Vec::first(kMR), to);
        }
      }
    }
  }
}

// pack(first panel, last panel) in parallel, panels in groups.
template <typename Pack>
void pack_panels(const Team& team, const Packed& packed, const Pack& pack) {
  const int64_t group = ceil_div(tuning::kPassGrain, kWordPanels * kMR * packed.K) * kWordPanels;
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
void multiply(const Tile& tile) {
  const int64_t vectors = ceil_div(tile.columns, L);
  tile.columns % L ? multiply<false>(tile, vectors) : multiply<true>(tile, vectors);
}

// A times planes that are read and written where they lie.
void multiply_planes(const Team& team, const Packed& A, int64_t batch, int64_t positions, const float* from,
                     const float* bias, float* to) {
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
        multiply(tile);
      }
    }
  });
}

// Positions of all images, kNR of them, as runs that lie in one image each.
struct Strip {
  struct Run {
    int64_t lane, count, image, position;
  };
  Run runs[kNR];
  int64_t count = 0, columns = 0;

  Strip(int64_t strip, int64_t batch, int64_t positions) {
    const int64_t first = strip * kNR, last = min(first + kNR, batch * positions);
    for (int64_t p = first; p < last;) {
      const int64_t position = p % positions, n = min(positions - position, last - p);
      runs[count++] = {p - first, n, p / positions, position};
      p += n;
    }
    columns = last - first;
  }

  // to[i][lane] = the plane i of each run's image, for planes [first, last) of channels.
  void pack(const float* images, int64_t channels, int64_t positions, int64_t first, int64_t last, float* to) const {
    for_rows(channels, positions, first, last, [=](int64_t offset, int64_t i, Vec::Predicate lanes) {
      Vec::loadu(lanes, images + offset).storeu(lanes, to + i);
    });
  }
  // The inverse, for all channels.
  void unpack(const float* from, int64_t channels, int64_t positions, int64_t first, int64_t last,
              float* images) const {
    for_rows(channels, positions, first, last, [=](int64_t offset, int64_t i, Vec::Predicate lanes) {
      Vec::loadu(lanes, from + i).storeu(lanes, images + offset);
    });
  }

 private:
  // body(offset in the images, place in [row][kNR], lanes)
  template <typename Body>
  MASKED_OPS_INLINE void for_rows(int64_t channels, int64_t positions, int64_t first, int64_t last,
                                  const Body& body) const {
    for (int64_t r = 0; r < count; ++r) {
      const Run run = runs[r];
      for (int64_t j = 0; j < run.count; j += L) {
        const Vec::Predicate lanes = Vec::first(run.count - j);
        int64_t offset = (run.image * channels + first) * positions + run.position + j, i = run.lane + j;
        for (int64_t row = first; row < last; ++row, offset += positions, i += kNR) body(offset, i, lanes);
      }
    }
  }
};

// The same for planes that are no whole vectors: the strip's results, [m][kNR], stay in L2 until they are whole.
void multiply_strips(const Team& team, const Packed& A, int64_t batch, int64_t positions, const float* from,
                     const float* bias, float* to) {
  const int64_t strips = ceil_div(batch * positions, kNR);
  const int64_t splits = max<int64_t>(min(A.panels / 8, ceil_div(4 * team.threads, strips)), 1);
  team.for_each(strips * splits, [&](int64_t task) {
    const Strip strip(task / splits, batch, positions);
    const int64_t split = task % splits, first = A.panels * split / splits, last = A.panels * (split + 1) / splits;
    float* const B = static_cast<float*>(scratch(Slot::kPanelB, size_t(A.block * kNR) * sizeof(float)));
    float* const C =
        static_cast<float*>(scratch(Slot::kAccumulator, size_t((last - first) * kMR * kNR) * sizeof(float)));
    for (int64_t k0 = 0; k0 < A.K; k0 += A.block) {
      strip.pack(from, A.K, positions, k0, k0 + A.depth(k0), B);
      for (int64_t panel = first; panel < last; ++panel) {
        const int64_t m = panel * kMR;
        const Tile tile = {A.panel(k0, panel),
                           B,
                           A.depth(k0),
                           kNR,
                           nullptr,
                           min<int64_t>(kMR, A.M - m),
                           strip.columns,
                           k0 == 0,
                           bias ? bias + m : nullptr,
                           C + (panel - first) * kMR * kNR};
        multiply(tile);
      }
    }
    strip.unpack(C, A.M, positions, first * kMR, min(last * kMR, A.M), to);
  });
}

// to[image][M][positions] = A * from[image][K][positions] + bias[M]
void multiply(const Team& team, const Packed& A, int64_t batch, int64_t positions, const float* from, const float* bias,
              float* to) {
  const auto kernel = positions % L ? multiply_strips : multiply_planes;
  kernel(team, A, batch, positions, from, bias, to);
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

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY
