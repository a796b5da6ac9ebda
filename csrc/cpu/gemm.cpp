// Masked GEMM: C[M][N] = A^T B over packed panels, where one operand is a masked weight or the result is masked.
//
// Packed A (all of K, shared by the team) is cut into panels of kMR rows, B into panels of kNR columns. A task takes
// one panel of B through K in blocks of kKC: pack the block, then run the microkernel down the rows of A, so that the
// block of B comes from L2, the panel of A from L1 or L2, and the C tile from registers.
#include "kernels.h"
#include "pack.h"

namespace masked_ops::cpu::MASKED_OPS_CAPABILITY {
namespace {

using tuning::kMR;
using tuning::kNR;
using tuning::kNV;

struct Tile {
  float* C;  // the tile's corner
  int64_t ldc;
  int64_t columns;       // valid ones, at most kNR
  bool accumulate;       // add to C: not the first block of K
  const float* bias;     // added when not accumulating; null for none
  const uint64_t* bits;  // of the tile's first row, set on the last block of K if C is to be masked; else null
  int64_t bits_stride;   // words
  int64_t column;        // of the tile's corner in its row of bits
};

template <int MR, int NV>
__attribute__((noinline)) void microkernel(int64_t depth, const float* A, const float* B, const Tile& tile) {
  constexpr int L = Vec::kLanes;
  Vec c[MR][NV];
  MASKED_OPS_UNROLL
  for (int i = 0; i < MR; ++i) {
    MASKED_OPS_UNROLL
    for (int j = 0; j < NV; ++j) c[i][j] = Vec::zero();
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec b[NV];
    MASKED_OPS_UNROLL
    for (int j = 0; j < NV; ++j) b[j] = Vec::load(B + j * L);
    MASKED_OPS_UNROLL
    for (int i = 0; i < MR; ++i) {
      const Vec a = Vec::set1(A[i]);
      MASKED_OPS_UNROLL
      for (int j = 0; j < NV; ++j) c[i][j] = fmadd(a, b[j], c[i][j]);
    }
    A += kMR;
    B += kNR;
  }
  MASKED_OPS_UNROLL
  for (int j = 0; j < NV; ++j) {
    const auto valid = Vec::first(tile.columns - j * L);
    const Vec bias = tile.bias ? Vec::loadu(valid, tile.bias + j * L) : Vec::zero();
    MASKED_OPS_UNROLL
    for (int i = 0; i < MR; ++i) {
      float* p = tile.C + i * tile.ldc + j * L;
      Vec v = c[i][j] + (tile.accumulate ? Vec::loadu(valid, p) : bias);
      if (tile.bits) v = v.select(Vec::predicate(tile.bits + i * tile.bits_stride, tile.column + j * L));
      v.storeu(valid, p);
    }
  }
}

template <int NV, int MR = kMR>
void run_microkernel(int64_t rows, int64_t depth, const float* A, const float* B, const Tile& tile) {
  if constexpr (MR > 1) {
    if (rows < MR) return run_microkernel<NV, MR - 1>(rows, depth, A, B, tile);
  }
  microkernel<MR, NV>(depth, A, B, tile);
}

using Microkernel = void (*)(int64_t rows, int64_t depth, const float* A, const float* B, const Tile& tile);

Microkernel microkernel_for(int64_t columns) {
  static_assert(kNV <= 3);
  const int64_t vectors = ceil_div(columns, Vec::kLanes);
  if (vectors == 1) return run_microkernel<1>;
  if (vectors == 2) return run_microkernel<2>;
  return run_microkernel<kNV>;
}

// pack_A(m0, rows, k0, depth, A): depths [k0, k0 + depth) of one panel of A, which lies at A.
// pack_B(n0, columns, k0, depth, B): one block of one panel of B.
template <typename PackA, typename PackB>
void gemm(const Team& team, int64_t M, int64_t N, int64_t K, const PackA& pack_A, const PackB& pack_B,
          const float* bias, const Bits* mask, float* C) {
  const int64_t blocks = ceil_div(K, tuning::kKC);
  const int64_t block = ceil_div(ceil_div(K, blocks), 64) * 64;
  const int64_t chunk = max<int64_t>(ceil_div(tuning::kPanelABytes, K * int64_t{sizeof(float)} * kMR), 8) * kMR;
  const int64_t panels = ceil_div(N, kNR);

  for (int64_t m0 = 0; m0 < M; m0 += chunk) {
    const int64_t rows = min(chunk, M - m0);
    const int64_t row_panels = ceil_div(rows, kMR);
    float* const A = static_cast<float*>(scratch(Slot::kPanelA, row_panels * K * kMR * sizeof(float)));
    team.for_each(row_panels * blocks, [&](int64_t task) {
      const int64_t panel = task / blocks, k0 = task % blocks * block;
      if (k0 >= K) return;
      const int64_t m = panel * kMR;
      pack_A(m0 + m, min<int64_t>(kMR, rows - m), k0, min(block, K - k0), A + panel * K * kMR);
    });

    const int64_t wanted = ceil_div(int64_t{4} * team.threads, panels);
    const int64_t splits = team.threads == 1 ? 1 : max<int64_t>(min(wanted, rows / tuning::kMinRowsPerTask), 1);
    const int64_t split = ceil_div(row_panels, splits);  // in panels of A
    team.for_each(panels * splits, [&](int64_t task) {
      const int64_t n0 = task / splits * kNR, columns = min<int64_t>(kNR, N - n0);
      const int64_t first = task % splits * split, last = min(first + split, row_panels);
      if (first >= last) return;
      float* const B = static_cast<float*>(scratch(Slot::kPanelB, block * kNR * sizeof(float)));
      const Microkernel run = microkernel_for(columns);
      for (int64_t k0 = 0; k0 < K; k0 += block) {
        const int64_t depth = min(block, K - k0);
        pack_B(n0, columns, k0, depth, B);
        for (int64_t panel = first; panel < last; ++panel) {
          const int64_t m = m0 + panel * kMR;
          Tile tile = {C + m * N + n0, N, columns, k0 > 0, bias ? bias + n0 : nullptr, nullptr, 0, n0};
          if (mask && k0 + depth == K) {
            tile.bits = mask->row(m);
            tile.bits_stride = mask->stride;
          }
          run(min<int64_t>(kMR, m0 + rows - m), depth, A + (panel * K + k0) * kMR, B, tile);
        }
      }
    });
  }
}

}  // namespace

void linear(const Team& team, int64_t M, int64_t N, int64_t K, const float* input, const float* weight, Bits bits,
            const float* bias, float* output) {
  gemm(
      team, M, N, K,
      [=](int64_t m0, int64_t rows, int64_t k0, int64_t depth, float* A) {
        pack_row_panel(input, K, m0, rows, k0, depth, A);
      },
      [=](int64_t n0, int64_t columns, int64_t k0, int64_t depth, float* B) {
        pack_rows(weight, K, bits, n0, columns, k0, depth, B);
      },
      bias, nullptr, output);
}

void linear_grad_input(const Team& team, int64_t M, int64_t N, int64_t K, const float* grad_output, const float* weight,
                       Bits bits, float* grad_input) {
  gemm(
      team, M, K, N,
      [=](int64_t m0, int64_t rows, int64_t k0, int64_t depth, float* A) {
        pack_row_panel(grad_output, N, m0, rows, k0, depth, A);
      },
      [=](int64_t c0, int64_t columns, int64_t k0, int64_t depth, float* B) {
        pack_columns(weight, K, bits, c0, columns, k0, depth, B);
      },
      nullptr, nullptr, grad_input);
}

void linear_grad_weight(const Team& team, int64_t M, int64_t N, int64_t K, const float* grad_output, const float* input,
                        Bits bits, float* grad_weight) {
  gemm(
      team, N, K, M,
      [=](int64_t n0, int64_t columns, int64_t k0, int64_t depth, float* A) {
        pack_column_panel(grad_output, N, n0, columns, k0, depth, A);
      },
      [=](int64_t c0, int64_t columns, int64_t k0, int64_t depth, float* B) {
        pack_columns(input, K, c0, columns, k0, depth, B);
      },
      nullptr, &bits, grad_weight);
}

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY
