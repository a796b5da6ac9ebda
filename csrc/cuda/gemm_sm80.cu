// Masked GEMM for Ampere and Ada (and whatever came later), bf16 and fp16, accumulated in float.
//
// A block has kM x 128 of the output and goes through the contraction 64 at a time, three stages of cp.async deep.
// Eight warps, 2 x 4, have kM / 2 x 32 each. The weight is operand B of mma.m16n8k16; its registers are masked between
// ldmatrix and the product, by a word per lane, strip of 16 rows and 64 columns. For grad_input the weight's tile lies
// in shared memory as in the weight and is transposed by ldmatrix.
#include "gemm.h"
#include "numeric.h"
#include "swizzle.h"
#include "tuning.h"

namespace masked_ops::cuda {
namespace {

constexpr int kThreads = 256, kStages = 3;
constexpr int kR = 128, kC = 64;
constexpr int kWarpR = 32;

template <int kM>
struct Stage {
  static constexpr int kInput = 0, kWeight = kM * kC * 2, kMask = kWeight + kR * kC * 2;
  static constexpr int kBytes = kMask + kR / kFragmentTile * kFragmentTileBytes;
};

struct Operands {
  GemmShape shape;
  const uint16_t* input;
  const uint16_t* weight;
  const uint32_t* fragments;
  const uint16_t* bias;
  uint16_t* output;
};

// kRows rows of kCols elements, from element (row, col) of a matrix [rows][cols], zeros beyond it.
template <int kRows, int kCols>
MASKED_OPS_DEVICE void load_tile(uint32_t to, const uint16_t* from, int rows, int cols, int row, int col) {
  constexpr int kChunks = kCols / 8;
#pragma unroll
  for (int i = 0; i < kRows * kChunks / kThreads; ++i) {
    const int chunk = i * kThreads + threadIdx.x, r = chunk / kChunks, c = chunk % kChunks * 8;
    const bool there = row + r < rows && col + c < cols;
    const uint16_t* source = there ? from + int64_t(row + r) * cols + col + c : from;
    cp_async16(to + swizzled<kCols * 2>(r, c * 2), source, there);
  }
}

template <bool kGradInput, int kM>
MASKED_OPS_DEVICE void load_stage(uint32_t to, const Operands& of, int m, int r, int c) {
  using S = Stage<kM>;
  const GemmShape& shape = of.shape;
  load_tile<kM, kC>(to + S::kInput, of.input, shape.M, shape.C, m, c);
  if constexpr (kGradInput) {
    load_tile<kC, kR>(to + S::kWeight, of.weight, shape.C, shape.R, c, r);
  } else {
    load_tile<kR, kC>(to + S::kWeight, of.weight, shape.R, shape.C, r, c);
  }
  constexpr int kTileChunks = kFragmentTileBytes / 16;
  if (threadIdx.x < kR / kFragmentTile * kTileChunks) {
    const int tile = r / kFragmentTile + threadIdx.x / kTileChunks;
    const bool there = tile < fragment_tiles(shape.R);
    const int64_t word = (there ? tile : 0) * fragment_tiles(shape.C) + c / kFragmentTile;
    cp_async16(to + S::kMask + threadIdx.x * 16, of.fragments + word * kFragmentThreads + threadIdx.x % kTileChunks * 4,
               there);
  }
}

// Registers 4 kStep to 4 kStep + 3 of the fragment of the strip of 16 rows at `row` of the operand.
template <bool kGradInput, int kStep>
MASKED_OPS_DEVICE void load_operand(uint32_t* to, uint32_t tile, int row, int lane) {
  if constexpr (kGradInput) {
    const int c = kStep * 16 + lane / 16 * 8 + lane % 8, r = row + lane / 8 % 2 * 8;
    ldmatrix_x4<true>(to, tile + swizzled<kR * 2>(c, r * 2));
  } else {
    ldmatrix_x4<false>(to, tile + swizzled<kC * 2>(row + lane % 16, kStep * 32 + lane / 16 * 16));
  }
}

template <bool kBFloat, bool kGradInput, int kM>
struct Warp {
  static constexpr int kWarpM = kM / 2, kTilesM = kWarpM / 16, kStrips = kWarpR / 16;
  int lane, m, r;  // where its part of the block's tile begins
  float sums[kTilesM][2 * kStrips][4];

  template <int kStep>
  MASKED_OPS_DEVICE void step(uint32_t stage, const uint32_t (&masks)[kStrips]) {
    uint32_t a[kTilesM][4], b[kStrips][4];
#pragma unroll
    for (int i = 0; i < kStrips; ++i) {
      load_operand<kGradInput, kStep>(b[i], stage + Stage<kM>::kWeight, r + i * 16, lane);
    }
#pragma unroll
    for (int i = 0; i < kTilesM; ++i) {
      const int row = m + i * 16 + lane % 16, byte = kStep * 32 + lane / 16 * 16;
      ldmatrix_x4<false>(a[i], stage + Stage<kM>::kInput + swizzled<kC * 2>(row, byte));
    }
#pragma unroll
    for (int j = 0; j < kStrips; ++j) {
      mask_step<kStep>(b[j], masks[j]);
#pragma unroll
      for (int i = 0; i < kTilesM; ++i) {
        mma_m16n8k16<kBFloat>(sums[i][2 * j], a[i], b[j][0], b[j][2]);
        mma_m16n8k16<kBFloat>(sums[i][2 * j + 1], a[i], b[j][1], b[j][3]);
      }
    }
  }
  MASKED_OPS_DEVICE void multiply(const uint8_t* stage) {
    uint32_t masks[kStrips];
#pragma unroll
    for (int i = 0; i < kStrips; ++i) {
      masks[i] = *reinterpret_cast<const uint32_t*>(stage + Stage<kM>::kMask + ((r / 16 + i) * kWarp + lane) * 4);
    }
    const uint32_t address = shared_address(stage);
    step<0>(address, masks);
    step<1>(address, masks);
    step<2>(address, masks);
    step<3>(address, masks);
  }
  // The warp's part of output, whose tile begins at (first_m, first_r).
  MASKED_OPS_DEVICE void store(const Operands& to, int first_m, int first_r) const {
    const int R = to.shape.R;
#pragma unroll
    for (int j = 0; j < 2 * kStrips; ++j) {
      const int col = first_r + r + j * 8 + lane % 4 * 2;
      if (col >= R) continue;
      const bool two = col + 1 < R;
      float bias[2] = {};
      if (to.bias) {
        bias[0] = to_float<kBFloat>(to.bias[col]);
        if (two) bias[1] = to_float<kBFloat>(to.bias[col + 1]);
      }
#pragma unroll
      for (int i = 0; i < 2 * kTilesM; ++i) {
        const int row = first_m + m + i * 8 + lane / 4;
        if (row >= to.shape.M) continue;
        const float* sum = sums[i / 2][j] + i % 2 * 2;
        const uint32_t pair = round_pair<kBFloat>(sum[0] + bias[0], sum[1] + bias[1]);
        uint16_t* out = to.output + int64_t(row) * R + col;
        if (R % 2 == 0) {
          *reinterpret_cast<uint32_t*>(out) = pair;
        } else {
          out[0] = uint16_t(pair);
          if (two) out[1] = uint16_t(pair >> 16);
        }
      }
    }
  }
};

template <bool kBFloat, bool kGradInput, int kM>
__global__ void __launch_bounds__(kThreads, 1) gemm_sm80_kernel(const __grid_constant__ Operands of) {
  constexpr int kBytes = Stage<kM>::kBytes;
  const int m_tiles = ceil_div(of.shape.M, kM), c_tiles = ceil_div(of.shape.C, kC);
  const int m = int(blockIdx.x) % m_tiles * kM, r = int(blockIdx.x) / m_tiles * kR;
  const int warp = threadIdx.x / kWarp;
  using W = Warp<kBFloat, kGradInput, kM>;
  W mine{int(threadIdx.x % kWarp), warp / 4 * W::kWarpM, warp % 4 * kWarpR, {}};
  const uint32_t shared = shared_address(dynamic_shared);
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) {
    if (stage < c_tiles) load_stage<kGradInput, kM>(shared + stage * kBytes, of, m, r, stage * kC);
    cp_async_commit();
  }
  int read = 0, write = kStages - 1;
  for (int tile = 0; tile < c_tiles; ++tile) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // the tile is there for all, and nobody reads the stage that is filled next
    const int next = tile + kStages - 1;
    if (next < c_tiles) load_stage<kGradInput, kM>(shared + write * kBytes, of, m, r, next * kC);
    cp_async_commit();
    mine.multiply(dynamic_shared + read * kBytes);
    if (++read == kStages) read = 0;
    if (++write == kStages) write = 0;
  }
  mine.store(of, m, r);
}

template <bool kBFloat, bool kGradInput, int kM>
int run(const Operands& of, void* stream) {
  const int64_t blocks = int64_t(ceil_div(of.shape.M, kM)) * ceil_div(of.shape.R, kR);
  if (blocks > INT32_MAX) return kUnsupported;
  return launch(gemm_sm80_kernel<kBFloat, kGradInput, kM>, uint32_t(blocks), kThreads, kStages * Stage<kM>::kBytes,
                stream, of);
}

template <bool kBFloat, bool kGradInput>
int run(const Operands& of, void* stream) {
  return of.shape.M <= 64 ? run<kBFloat, kGradInput, 64>(of, stream) : run<kBFloat, kGradInput, 128>(of, stream);
}

}  // namespace
}  // namespace masked_ops::cuda

int masked_ops_cuda_gemm_sm80(const masked_ops::cuda::Gemm* gemm, void* stream) {
  using namespace masked_ops::cuda;
  const Gemm& g = *gemm;
  if (g.mode == kGradWeight || !serves(g) || compute_capability() < 80) return kUnsupported;
  if (nothing_to_do(g)) return 0;
  const bool grad_input = g.mode == kGradInput;
  const Operands of{GemmShape::of(g),
                    static_cast<const uint16_t*>(grad_input ? g.grad_output : g.input),
                    static_cast<const uint16_t*>(g.weight),
                    g.fragments,
                    static_cast<const uint16_t*>(grad_input ? nullptr : g.bias),
                    static_cast<uint16_t*>(g.output)};
  if (g.dtype == kBFloat16) return grad_input ? run<true, true>(of, stream) : run<true, false>(of, stream);
  return grad_input ? run<false, true>(of, stream) : run<false, false>(of, stream);
}
