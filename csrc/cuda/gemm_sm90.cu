// Masked GEMM for Hopper, bf16 and fp16, accumulated in float: output^T = masked operand * input^T, so that the weight
// is wgmma's operand A, which may come out of registers, and is masked on its way there.
//
// A block stays on its multiprocessor and takes tiles of 128 operand rows x kM input rows, 64 of the contraction at a
// time. One thread of the first warpgroup keeps a ring of stages filled: the weight's tile as two boxes of 64 x 64, the
// input's tile (of which each block of a cluster loads its part for all of them), and the mask in fragment order. The
// two other warpgroups have 64 operand rows each: ldmatrix (which transposes for grad_input), mask, wgmma, with the
// next fragments being made while the products of the last ones run. At the end stmatrix turns the sums round through
// shared memory, so that whole lines of the output are written.
#include "gemm.h"
#include "gemm_tiles.h"
#include "numeric.h"
#include "split_sum.h"
#include "swizzle.h"
#include "tensor_map.h"
#include "wgmma.h"

namespace masked_ops::cuda {
namespace {

constexpr int kConsumers = 2, kGroup = 128, kThreads = kGroup * (1 + kConsumers);
constexpr int kR = kSm90R, kC = kSm90C, kCluster = tuning::kSm90Cluster;
constexpr int kBoxBytes = 64 * kC * 2;  // one warpgroup's part of a weight's tile
constexpr int kRow = kC * 2;            // bytes of a row of every tile
[[maybe_unused]] constexpr int kRegistersLeft = 40, kRegistersTaken = 232;

struct Operands {
  TensorMap weight, input;
  GemmShape shape;
  const uint32_t* fragments;
  const uint16_t* bias;
  uint16_t* output;
  float* partial;             // [splits][M][R], if the contraction is split
  int splits, steps, pieces;  // pieces of a cluster, one tile for each of its blocks
};

// A tile, and the steps over the contraction that are taken: always an even number, so that the last may be zeros.
struct Piece {
  int m, r, first_step, last_step, split;
};
template <int kM>
[[maybe_unused]] MASKED_OPS_DEVICE Piece piece_of(const Operands& of, int piece, int rank) {
  const int m_tiles = ceil_div(of.shape.M, kM), split = piece % of.splits, tile = piece / of.splits;
  const int first = split * of.steps, all = ceil_div(of.shape.C, 2 * kC) * 2;
  const int r = (tile / m_tiles * kCluster + rank) * kR;
  return {tile % m_tiles * kM, r, first, first + of.steps < all ? first + of.steps : all, split};
}

// Where things are in shared memory. Tiles first: the swizzle wants them aligned to 1024 bytes.
template <int kM>
struct Layout {
  static constexpr int kWeight = kConsumers * kBoxBytes, kInput = kM * kRow, kTiles = kWeight + kInput;
  static constexpr int kStages = 192 * 1024 / kTiles;
  static constexpr int kOut = kStages * kTiles;                 // 64 x 64 of the output for each consumer
  static constexpr int kMasks = kOut + kConsumers * kBoxBytes;  // of each stage and consumer
  static constexpr int kFull = kMasks + kStages * kConsumers * kFragmentTileBytes, kEmpty = kFull + 8 * kStages;
  static constexpr int kBytes = kEmpty + 8 * kStages;
  static_assert(kBytes <= 227 * 1024);
};

template <int kM>
struct Ring {
  using L = Layout<kM>;
  uint32_t shared;
  int stage = 0;
  uint32_t parity = 0;

  MASKED_OPS_DEVICE uint32_t weight(int group) const { return shared + stage * L::kTiles + group * kBoxBytes; }
  MASKED_OPS_DEVICE uint32_t input() const { return shared + stage * L::kTiles + L::kWeight; }
  MASKED_OPS_DEVICE int masks(int group) const {  // from the beginning of shared memory
    return L::kMasks + (stage * kConsumers + group) * kFragmentTileBytes;
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

template <bool kGradInput, int kM>
MASKED_OPS_DEVICE void produce(const Operands& of, Ring<kM> ring, int rank) {
  using L = Layout<kM>;
  constexpr int kPart = kM / kCluster;  // rows of the input that this block loads
  const int64_t mask_rows = fragment_tiles(of.shape.R), mask_cols = fragment_tiles(of.shape.C);
  for (int i = blockIdx.x / kCluster; i < of.pieces; i += gridDim.x / kCluster) {
    const Piece piece = piece_of<kM>(of, i, rank);
    const int64_t mask_row = piece.r / kFragmentTile;
    for (int step = piece.first_step; step < piece.last_step; ++step) {
      const int c = step * kC;
      // Beyond the mask no bits are needed: the weight's tile is zero there.
      int masks = 0;
      if (step < mask_cols && mask_row < mask_rows) masks = mask_row + 1 < mask_rows ? 2 : 1;
      mbarrier_wait(ring.empty(), ring.parity ^ 1);  // in all blocks that the input goes to
      mbarrier_expect(ring.full(), L::kTiles + masks * kFragmentTileBytes);
#pragma unroll
      for (int group = 0; group < kConsumers; ++group) {
        if (kGradInput) {
          tma_load(ring.weight(group), &of.weight, ring.full(), piece.r + group * 64, c);
        } else {
          tma_load(ring.weight(group), &of.weight, ring.full(), c, piece.r + group * 64);
        }
        if (group < masks) {
          bulk_load(ring.shared + ring.masks(group),
                    of.fragments + ((mask_row + group) * mask_cols + step) * kFragmentThreads, kFragmentTileBytes,
                    ring.full());
        }
      }
      const uint32_t part = ring.input() + rank * kPart * kRow;
      if constexpr (kCluster == 1) {
        tma_load(part, &of.input, ring.full(), c, piece.m);
      } else {
        tma_load_shared(part, &of.input, ring.full(), c, piece.m + rank * kPart, (1 << kCluster) - 1);
      }
      ring.next();
    }
  }
}

// The fragment of 64 x 64 of the operand, masked.
template <bool kGradInput>
MASKED_OPS_DEVICE void load_fragment(uint32_t* to, uint32_t tile, const uint32_t* masks) {
  const int warp = threadIdx.x % kGroup / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll
  for (int k = 0; k < kC / 16; ++k) {
    if constexpr (kGradInput) {
      const int c = k * 16 + lane / 16 * 8 + lane % 8, r = warp * 16 + lane / 8 % 2 * 8;
      ldmatrix_x4<true>(to + 4 * k, tile + swizzled<kRow>(c, r * 2));
    } else {
      ldmatrix_x4<false>(to + 4 * k, tile + swizzled<kRow>(warp * 16 + lane % 16, k * 32 + lane / 16 * 16));
    }
  }
  const uint32_t mask = masks[threadIdx.x % kGroup];
  mask_step<0>(to, mask);
  mask_step<1>(to + 4, mask);
  mask_step<2>(to + 8, mask);
  mask_step<3>(to + 12, mask);
}

// wgmma's description of a tile in shared memory: rows of 128 bytes, eight of them 1024 bytes from the next eight,
// swizzled by 128 bytes.
[[maybe_unused]] MASKED_OPS_DEVICE uint64_t matrix_at(uint32_t address) {
  return uint64_t(address >> 4 & 0x3fff) | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

template <bool kBFloat, bool kGradInput, int kM>
struct Consumer {
  Ring<kM> ring;
  int group;
  float sums[kM / 2];

  MASKED_OPS_DEVICE void load(uint32_t* fragment) const {
    mbarrier_wait(ring.full(), ring.parity);
    load_fragment<kGradInput>(fragment, ring.weight(group),
                              reinterpret_cast<const uint32_t*>(dynamic_shared + ring.masks(group)));
  }
  MASKED_OPS_DEVICE static void release(uint32_t empty) {
    const int lane = threadIdx.x % kWarp;
    if (kCluster == 1) {
      if (lane == 0) mbarrier_arrive(empty);
    } else {
      if (lane < kCluster) mbarrier_arrive_at(empty, lane);
    }
  }
  // The products of one stage. While they run, the stage before is given back and the next fragment made.
  MASKED_OPS_DEVICE void step(uint32_t* now, uint32_t* next, uint32_t& before, bool more) {
    wgmma_fence();
    const uint64_t input = matrix_at(ring.input());
#pragma unroll
    for (int k = 0; k < kC / 16; ++k) wgmma<kBFloat>(sums, now + 4 * k, input + k * (16 * 2 >> 4));
    wgmma_commit();
    wgmma_wait<1>();
    if (before) release(before);
    before = ring.empty();
    ring.next();
    if (more) load(next);
  }
  MASKED_OPS_DEVICE void multiply(int steps) {
    uint32_t even[16], odd[16], before = 0;
#pragma unroll
    for (int i = 0; i < kM / 2; ++i) sums[i] = 0.f;
    load(even);
    for (int i = 0; i < steps; i += 2) {
      step(even, odd, before, true);
      step(odd, even, before, i + 2 < steps);
    }
    wgmma_wait<0>();
    wgmma_results(sums);
    release(before);
  }
  // Of one split, as they are; eight lanes write a sector.
  MASKED_OPS_DEVICE void store_partial(const Operands& to, const Piece& piece) const {
    const int lane = threadIdx.x % kWarp, r = piece.r + group * 64 + threadIdx.x % kGroup / kWarp * 16 + lane / 4;
    float* const out = to.partial + int64_t(piece.split) * to.shape.M * to.shape.R;
#pragma unroll
    for (int i = 0; i < kM / 2; ++i) {
      const int m = piece.m + i / 4 * 8 + lane % 4 * 2 + i % 2, row = r + i / 2 % 2 * 8;
      if (m < to.shape.M && row < to.shape.R) out[int64_t(m) * to.shape.R + row] = sums[i];
    }
  }
  // Sums i of each of the kM / 8 products of 8 input rows: operand rows lane / 4 and, for i of 2 and 3, 8 more.
  MASKED_OPS_DEVICE void store(const Operands& to, int first_m, int first_r) {
    const int thread = threadIdx.x % kGroup, warp = thread / kWarp, lane = thread % kWarp;
    const int R = to.shape.R, r = first_r + group * 64;
    if (r >= R) return;
    float bias[2] = {};
    if (to.bias) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = r + warp * 16 + lane / 4 + i * 8;
        if (row < R) bias[i] = to_float<kBFloat>(to.bias[row]);
      }
    }
    uint8_t* const tile = dynamic_shared + Layout<kM>::kOut + group * kBoxBytes;
    const uint32_t address = ring.shared + Layout<kM>::kOut + group * kBoxBytes;
#pragma unroll
    for (int part = 0; part < kM / 64; ++part) {  // 64 input rows
      named_barrier(1 + group, kGroup);           // the part before has been read
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        uint32_t pairs[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* sum = sums + (part * 8 + j + i / 2) * 4 + i % 2 * 2;
          pairs[i] = round_pair<kBFloat>(sum[0] + bias[i % 2], sum[1] + bias[i % 2]);
        }
        const int m = (j + lane / 16) * 8 + lane % 8, byte = (warp * 16 + lane / 8 % 2 * 8) * 2;
        stmatrix_x4<true>(address + swizzled<kRow>(m, byte), pairs);
      }
      named_barrier(1 + group, kGroup);
#pragma unroll
      for (int i = 0; i < 64 * 8 / kGroup; ++i) {
        const int m = (i * kGroup + thread) / 8, col = thread % 8 * 8, row = first_m + part * 64 + m;
        if (row >= to.shape.M || r + col >= R) continue;
        const uint8_t* from = tile + swizzled<kRow>(m, col * 2);
        uint16_t* out = to.output + int64_t(row) * R + r + col;
        if (R % 8 == 0) {
          *reinterpret_cast<uint4*>(out) = *reinterpret_cast<const uint4*>(from);
        } else {
#pragma unroll 1
          for (int e = 0; e < 8 && r + col + e < R; ++e) out[e] = reinterpret_cast<const uint16_t*>(from)[e];
        }
      }
    }
  }
};

template <bool kBFloat, bool kGradInput, int kM>
__global__ void __launch_bounds__(kThreads, 1) gemm_sm90_kernel(const __grid_constant__ Operands of) {
#if defined(MASKED_OPS_EMULATE) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  Ring<kM> ring{shared_address(dynamic_shared)};
  if (threadIdx.x == 0) {
    for (; ring.parity == 0; ring.next()) {
      mbarrier_init(ring.full(), 1);
      mbarrier_init(ring.empty(), kCluster * kConsumers * kGroup / kWarp);
    }
    fence_mbarrier_init();
  }
  ring.parity = 0;
  const int rank = kCluster == 1 ? 0 : cluster_rank();
  if (kCluster == 1) {
    __syncthreads();
  } else {
    cluster_barrier();
  }
  if (threadIdx.x < kGroup) {
    fewer_registers<kRegistersLeft>();
    if (threadIdx.x == 0) produce<kGradInput, kM>(of, ring, rank);
    __syncwarp();
  } else {
    more_registers<kRegistersTaken>();
    Consumer<kBFloat, kGradInput, kM> mine{ring, int(threadIdx.x) / kGroup - 1, {}};
    for (int i = blockIdx.x / kCluster; i < of.pieces; i += gridDim.x / kCluster) {
      const Piece piece = piece_of<kM>(of, i, rank);
      mine.multiply(piece.last_step - piece.first_step);
      if (of.partial) {
        mine.store_partial(of, piece);
      } else {
        mine.store(of, piece.m, piece.r);
      }
    }
  }
  if (kCluster > 1) cluster_barrier();  // shared memory stays until nobody writes to it or arrives in it
#endif
}

template <bool kBFloat, bool kGradInput, int kM>
int run(const Gemm& g, const GemmShape& shape, const Sm90Plan& plan, int multiprocessors, void* stream) {
  const int64_t pieces = int64_t(ceil_div(shape.M, kM)) * ceil_div(shape.R, kR * kCluster) * plan.splits;
  if (pieces > INT32_MAX / kCluster - multiprocessors) return kUnsupported;
  Operands of = {};
  if (encode_tensor_map(&of.weight, g.weight, g.N, g.K, 64, kC, kBFloat) ||
      encode_tensor_map(&of.input, g.input, shape.M, shape.C, kM / kCluster, kC, kBFloat)) {
    return kUnsupported;
  }
  of.shape = shape;
  of.fragments = g.fragments;
  of.bias = static_cast<const uint16_t*>(g.bias);
  of.output = static_cast<uint16_t*>(g.output);
  of.partial = plan.splits > 1 ? static_cast<float*>(g.workspace) : nullptr;
  of.splits = plan.splits;
  of.steps = plan.steps;
  of.pieces = int(pieces);
  const int at_once = multiprocessors < kCluster ? 1 : multiprocessors / kCluster;
  const int clusters = pieces < at_once ? int(pieces) : at_once;
  const int error = launch_clusters(kCluster, gemm_sm90_kernel<kBFloat, kGradInput, kM>, uint32_t(clusters * kCluster),
                                    kThreads, Layout<kM>::kBytes, stream, of);
  if (error || plan.splits == 1) return error;
  return split_sum<kBFloat>(g.workspace, plan.splits, shape.M, shape.R, g.bias, g.output, stream);
}

template <bool kBFloat, bool kGradInput>
int run(const Gemm& g, void* stream) {
  const GemmShape shape = GemmShape::of(g);
  const int multiprocessors = multiprocessor_count();
  if (multiprocessors == 0) return kUnsupported;
  const Sm90Plan plan = sm90_plan(shape.M, shape.R, shape.C, multiprocessors, g.workspace != nullptr);
  if (plan.rows == 64) return run<kBFloat, kGradInput, 64>(g, shape, plan, multiprocessors, stream);
  if (plan.rows == 128) return run<kBFloat, kGradInput, 128>(g, shape, plan, multiprocessors, stream);
  return run<kBFloat, kGradInput, 256>(g, shape, plan, multiprocessors, stream);
}

bool takes(const Gemm& g) { return serves(g) && GemmShape::of(g).C > 0 && compute_capability() == 90; }

}  // namespace
}  // namespace masked_ops::cuda

size_t masked_ops_cuda_gemm_workspace(const masked_ops::cuda::Gemm* gemm) {
  using namespace masked_ops::cuda;
  const GemmShape shape = GemmShape::of(*gemm);
  const int multiprocessors = multiprocessor_count();
  if (nothing_to_do(*gemm) || shape.C == 0 || multiprocessors == 0 || compute_capability() != 90) return 0;
  return sm90_workspace(shape.M, shape.R, sm90_plan(shape.M, shape.R, shape.C, multiprocessors, true));
}

int masked_ops_cuda_gemm_sm90(const masked_ops::cuda::Gemm* gemm, void* stream) {
  using namespace masked_ops::cuda;
  const Gemm& g = *gemm;
  if (!takes(g)) return kUnsupported;
  if (nothing_to_do(g)) return 0;
  if (g.dtype == kBFloat16) return g.grad_input ? run<true, true>(g, stream) : run<true, false>(g, stream);
  return g.grad_input ? run<false, true>(g, stream) : run<false, false>(g, stream);
}
