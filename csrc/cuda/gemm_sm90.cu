// Masked GEMM for Hopper, bf16 and fp16, accumulated in float: output^T = operand * input^T, so that the weight is
// wgmma's operand A, which may come out of registers, and is masked on its way there. For grad_weight, whose mask lies
// over the output, the operand is the layer's input and grad_output takes the place of the input.
//
// A block stays on its multiprocessor and takes tiles of 128 operand rows x kM input rows, 64 of the contraction at a
// time. One thread of the first warpgroup keeps a ring of stages filled: the operand's tile as two boxes of 64 x 64,
// the input's tile, and the mask in fragment order. The two other warpgroups have 64 operand rows each: ldmatrix (which
// transposes what is stored along the contraction), mask, wgmma, with the next fragments being made while the products
// of the last ones run. If there are few tiles, the blocks of a cluster share the contraction of one (sm90_epilogue.h).
#include "sm90_epilogue.h"
#include "wgmma.h"

namespace masked_ops::cuda {
namespace {

using namespace sm90;

[[maybe_unused]] constexpr int kRegistersLeft = 40, kRegistersTaken = 232;

template <int kM>
struct Ring {
  using L = Layout<kM>;
  uint32_t shared;
  int stage = 0;
  uint32_t parity = 0;

  MASKED_OPS_DEVICE uint32_t operand(int group) const { return shared + stage * L::kTiles + group * kBoxBytes; }
  MASKED_OPS_DEVICE uint32_t input() const { return shared + stage * L::kTiles + L::kOperand; }
  MASKED_OPS_DEVICE int masks(int group) const {  // from the beginning of shared memory
    return L::kMasks + stage * L::kMaskBytes + group * kFragmentTileBytes;
  }
  MASKED_OPS_DEVICE uint32_t full() const { return shared + L::kFull + 8 * stage; }
  MASKED_OPS_DEVICE uint32_t empty() const { return shared + L::kEmpty + 8 * stage; }
  MASKED_OPS_DEVICE void next() {
    if (++stage == L::kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

template <GemmMode kMode, int kM>
MASKED_OPS_DEVICE void load_tiles(const Operands& of, const Ring<kM>& ring, const Piece& piece, int c) {
#pragma unroll
  for (int group = 0; group < kConsumers; ++group) {
    const int r = piece.r + group * 64;
    if (kMode == kForward) {
      tma_load(ring.operand(group), &of.operand, ring.full(), c, r);
    } else {
      tma_load(ring.operand(group), &of.operand, ring.full(), r, c);
    }
  }
  if constexpr (kMode == kGradWeight) {
#pragma unroll
    for (int part = 0; part < kM / 64; ++part) {
      tma_load(ring.input() + part * kBoxBytes, &of.input, ring.full(), piece.m + part * 64, c);
    }
  } else {
    tma_load(ring.input(), &of.input, ring.full(), c, piece.m);
  }
}

template <GemmMode kMode, int kM>
MASKED_OPS_DEVICE void produce(const Operands& of, Ring<kM> ring, int rank) {
  const int64_t mask_rows = fragment_tiles(of.shape.R), mask_cols = fragment_tiles(of.shape.C);
  for (int i = blockIdx.x / of.splits; i < of.tiles; i += gridDim.x / of.splits) {
    const Piece piece = piece_of<kM>(of, i, rank);
    const int64_t mask_row = piece.r / kFragmentTile;
    for (int step = piece.first_step; step < piece.last_step; ++step) {
      // Beyond the mask no bits are needed: the weight's tile is zero there.
      int masks = 0;
      if (kMode != kGradWeight && step < mask_cols) masks = mask_row + 1 < mask_rows ? 2 : 1;
      mbarrier_wait(ring.empty(), ring.parity ^ 1);
      mbarrier_expect(ring.full(), Layout<kM>::kTiles + masks * kFragmentTileBytes);
      load_tiles<kMode>(of, ring, piece, step * kC);
#pragma unroll
      for (int group = 0; group < kConsumers; ++group) {
        if (group >= masks) break;
        bulk_load(ring.shared + ring.masks(group),
                  of.fragments + ((mask_row + group) * mask_cols + step) * kFragmentThreads, kFragmentTileBytes,
                  ring.full());
      }
      ring.next();
    }
  }
}

// The fragment of 64 x 64 of the operand, masked if it is the weight.
template <GemmMode kMode>
MASKED_OPS_DEVICE void load_fragment(uint32_t* to, uint32_t tile, const uint32_t* masks) {
  const int warp = threadIdx.x % kGroup / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll
  for (int k = 0; k < kC / 16; ++k) {
    if constexpr (kMode == kForward) {
      ldmatrix_x4<false>(to + 4 * k, tile + swizzled<kRow>(warp * 16 + lane % 16, k * 32 + lane / 16 * 16));
    } else {
      const int c = k * 16 + lane / 16 * 8 + lane % 8, r = warp * 16 + lane / 8 % 2 * 8;
      ldmatrix_x4<true>(to + 4 * k, tile + swizzled<kRow>(c, r * 2));
    }
  }
  if constexpr (kMode != kGradWeight) {
    const uint32_t mask = masks[threadIdx.x % kGroup];
    mask_step<0>(to, mask);
    mask_step<1>(to + 4, mask);
    mask_step<2>(to + 8, mask);
    mask_step<3>(to + 12, mask);
  }
}

// wgmma's description of the input's tile in shared memory, swizzled by 128 bytes, in which eight rows of 128 bytes are
// 1024 bytes from the next eight. Rows are rows of input; or, transposed, 64 of them lie in a row, of which there is
// one for each of the contraction, and the next 64 are a box away.
template <bool kTransposed>
[[maybe_unused]] MASKED_OPS_DEVICE uint64_t matrix_at(uint32_t address) {
  constexpr uint64_t kLeading = kTransposed ? kBoxBytes >> 4 : 1, kStride = 1024 >> 4;
  return uint64_t(address >> 4 & 0x3fff) | kLeading << 16 | kStride << 32 | uint64_t{1} << 62;
}

template <bool kBFloat, GemmMode kMode, int kM>
struct Consumer {
  static constexpr bool kTransposed = kMode == kGradWeight;
  Ring<kM> ring;
  int group;
  float sums[kM / 2];

  MASKED_OPS_DEVICE void load(uint32_t* fragment) const {
    mbarrier_wait(ring.full(), ring.parity);
    load_fragment<kMode>(fragment, ring.operand(group),
                         reinterpret_cast<const uint32_t*>(dynamic_shared + ring.masks(group)));
  }
  MASKED_OPS_DEVICE static void release(uint32_t empty) {
    __syncwarp();  // all lanes have read their masks
    if (threadIdx.x % kWarp == 0) mbarrier_arrive(empty);
  }
  // The products of one stage. While they run, the stage before is given back and the next fragment made.
  MASKED_OPS_DEVICE void step(uint32_t* now, uint32_t* next, uint32_t& before, bool more) {
    constexpr int kAdvance = kTransposed ? 16 * kRow : 16 * 2;  // bytes from 16 of the contraction to the next
    wgmma_fence();
    const uint64_t input = matrix_at<kTransposed>(ring.input());
#pragma unroll
    for (int k = 0; k < kC / 16; ++k) wgmma<kBFloat, kTransposed>(sums, now + 4 * k, input + k * (kAdvance >> 4));
    wgmma_commit();
    wgmma_wait<1>();
    if (before) release(before);
    before = ring.empty();
    ring.next();
    if (more) load(next);
  }
  MASKED_OPS_DEVICE void multiply(int steps, Epilogue<kBFloat, kMode, kM>& epilogue) {
    uint32_t even[16], odd[16], before = 0;
#pragma unroll
    for (int i = 0; i < kM / 2; ++i) sums[i] = 0.f;
    load(even);
    for (int i = 0; i < steps; i += 2) {
      step(even, odd, before, true);
      step(odd, even, before, i + 2 < steps);
    }
    epilogue.fetch();
    wgmma_wait<0>();
    wgmma_results(sums);
    release(before);
  }
};

template <bool kBFloat, GemmMode kMode, int kM>
__global__ void __launch_bounds__(kThreads, 1) gemm_sm90_kernel(const __grid_constant__ Operands of) {
#if defined(MASKED_OPS_EMULATE) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  Ring<kM> ring{shared_address(dynamic_shared)};
  if (threadIdx.x == 0) {
    prefetch_tensor_map(&of.operand);
    prefetch_tensor_map(&of.input);
    for (; ring.parity == 0; ring.next()) {
      mbarrier_init(ring.full(), 1);
      mbarrier_init(ring.empty(), kConsumers * kGroup / kWarp);
    }
    fence_mbarrier_init();
  }
  ring.parity = 0;
  __syncthreads();
  const int rank = int(cluster_rank());
  if (threadIdx.x < kGroup) {
    fewer_registers<kRegistersLeft>();
    if (threadIdx.x == 0) produce<kMode, kM>(of, ring, rank);
    __syncwarp();
    if (of.splits > 1) cluster_barrier();
  } else {
    more_registers<kRegistersTaken>();
    Consumer<kBFloat, kMode, kM> mine{ring, int(threadIdx.x) / kGroup - 1, {}};
    for (int i = blockIdx.x / of.splits; i < of.tiles; i += gridDim.x / of.splits) {
      const Piece piece = piece_of<kM>(of, i, rank);
      Epilogue<kBFloat, kMode, kM> epilogue{of, ring.shared, piece.m, piece.r, {}, {}};
      mine.multiply(piece.last_step - piece.first_step, epilogue);
      if (of.splits == 1) {
        epilogue.store(mine.sums);
      } else {  // and this is the only tile
        epilogue.share(mine.sums, rank);
        cluster_barrier();
        if (of.trade) {
          epilogue.store_traded(mine.sums, rank);
        } else {
          epilogue.store_shared(rank);
        }
      }
    }
  }
  if (of.splits > 1) cluster_barrier_after_reading();  // shared memory stays until nobody reads it
#endif
}

template <bool kBFloat, GemmMode kMode, int kM>
int run(const Gemm& g, const GemmShape& shape, int splits, int multiprocessors, void* stream) {
  const int64_t tiles = int64_t(ceil_div(shape.M, kM)) * ceil_div(shape.R, kR);
  if (tiles > INT32_MAX / tuning::kSm90Splits - multiprocessors) return kUnsupported;
  Operands of = {};
  const void* const operand = kMode == kGradWeight ? g.input : g.weight;
  const void* const input = kMode == kForward ? g.input : g.grad_output;
  const int64_t rows = kMode == kGradWeight ? g.M : g.N, input_cols = kMode == kForward ? g.K : g.N;
  if (encode_tensor_map(&of.operand, operand, rows, g.K, 64, 64, kBFloat) ||
      encode_tensor_map(&of.input, input, g.M, input_cols, kMode == kGradWeight ? 64 : kM, 64, kBFloat)) {
    return kUnsupported;
  }
  of.shape = shape;
  of.fragments = g.fragments;
  of.words = g.words;
  of.bias = kMode == kForward ? static_cast<const uint16_t*>(g.bias) : nullptr;
  of.output = g.output;
  of.tiles = int(tiles);
  of.splits = splits;
  of.wide = g.output_dtype == kFloat;
  of.trade = g.trade && splits == 2 && kM % 128 == 0;
  const int64_t blocks = splits > 1 ? tiles * splits : tiles < multiprocessors ? tiles : multiprocessors;
  return launch_clusters(splits, gemm_sm90_kernel<kBFloat, kMode, kM>, uint32_t(blocks), kThreads, Layout<kM>::kBytes,
                         stream, of);
}

template <bool kBFloat, GemmMode kMode>
int run(const Gemm& g, void* stream) {
  const GemmShape shape = GemmShape::of(g);
  const int multiprocessors = multiprocessor_count();
  if (multiprocessors == 0) return kUnsupported;
  Sm90Plan plan = sm90_plan(shape.M, shape.R, shape.C, multiprocessors);
  if (g.tile_rows > 0) {
    plan = {g.tile_rows, g.splits};
    if (!sm90_plan_fits(plan, shape.C)) return kUnsupported;
  }
  switch (plan.rows) {
    case 64:
      return run<kBFloat, kMode, 64>(g, shape, plan.splits, multiprocessors, stream);
    case 128:
      return run<kBFloat, kMode, 128>(g, shape, plan.splits, multiprocessors, stream);
    case 192:
      return run<kBFloat, kMode, 192>(g, shape, plan.splits, multiprocessors, stream);
    default:
      return run<kBFloat, kMode, 256>(g, shape, plan.splits, multiprocessors, stream);
  }
}

template <bool kBFloat>
int run(const Gemm& g, void* stream) {
  if (g.mode == kForward) return run<kBFloat, kForward>(g, stream);
  return g.mode == kGradInput ? run<kBFloat, kGradInput>(g, stream) : run<kBFloat, kGradWeight>(g, stream);
}

}  // namespace
}  // namespace masked_ops::cuda

int masked_ops_cuda_gemm_sm90(const masked_ops::cuda::Gemm* gemm, void* stream) {
  using namespace masked_ops::cuda;
  const Gemm& g = *gemm;
  if (!serves(g) || compute_capability() != 90) return kUnsupported;
  if (nothing_to_do(g)) return 0;
  if (GemmShape::of(g).C == 0) {  // a bias would have to be copied
    if (g.mode != kGradWeight) return kUnsupported;
    return zero(g.output, size_t(g.N) * g.K * (g.output_dtype == kFloat ? 4 : 2), stream);
  }
  return g.dtype == kBFloat16 ? run<true>(g, stream) : run<false>(g, stream);
}
