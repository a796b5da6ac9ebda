// A linear layer on up to 64 rows of input, out of weights in tiles (tiles.h), bf16 and fp16, on the tensor cores.
//
// A warp takes 64 rows of the weight and a part of the contraction. It lays out operand A in registers, place by place
// (tile_slots.h), and multiplies it with the input, of which a lane has four neighbouring columns straight from memory.
// What the parts of a block, and of the blocks of a cluster, have of the same rows is added up at the end, always in
// the same order. While a tile is at work the next one is on its way to registers, and the one after that to the L2
// cache.
//
// Per tile that is 64 turns of shared memory and some 570 instructions whatever its density, and a turn for each strict
// value of a lane: less than the time its bytes take from memory from a density of .3 on.
#include "gemm_tiles.h"
#include "numeric.h"
#include "ptx.h"
#include "tile_slots.h"
#include "tiles.h"
#include "tuning.h"

namespace masked_ops::cuda {
namespace {

constexpr int64_t kMostTiledColumns = 1 << 25;  // 32 rows of input are 2^31 bytes
constexpr int kSums = kTileSide + 4;            // floats of a row of input, padded for the banks

struct TiledDecode {
  int64_t M, N, K;
  const uint16_t* input;
  const TilePiece* pieces;
  const uint8_t* data;
  const uint16_t* bias;
  uint16_t* output;
  int log_groups, splits;  // groups of rows of a block, a power of 2; blocks that share them
};

template <int kM>
struct Shape {
  // Sums and input of 32 rows take more registers than there are for 512 threads.
  static constexpr int kThreads = kM == 32 ? 256 : 512, kWarps = kThreads / kWarp;
  static constexpr int kSlotsBytes = kWarps * kWarpSlots * kSlotBytes, kSumsBytes = kWarps * kM * kSums * 4;
  static constexpr int kBytes = kSlotsBytes > kSumsBytes ? kSlotsBytes : kSumsBytes;
  static_assert(kBytes <= kTilesSharedBytes);
};

// Operand B of a tile's products: of row l / 4 of each eight rows of input, the lane's four columns in each 16.
template <int kM>
struct Input {
  static constexpr int kEights = kM / 8, kSteps = kTileSide / 16;
  uint2 columns[kSteps][kEights];

  // rows: of input, from the lane's first on; first: of the lane's columns.
  MASKED_OPS_DEVICE void load(const uint8_t* input, int rows, int K, int first) {
#pragma unroll
    for (int e = 0; e < kEights; ++e) {
      const uint8_t* const row = input + (uint32_t(e * 16) * uint32_t(K) + 2 * uint32_t(first));
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        const bool there = e * 8 < rows && first + k * 16 < K;
        columns[k][e] = there ? __ldg(reinterpret_cast<const uint2*>(row + k * 32)) : make_uint2(0, 0);
      }
    }
  }
};

template <int kDtype, int kM>
struct Products {
  static constexpr int kEights = kM / 8, kSteps = kTileSide / 16, kRows = kTileSide / 16;
  float sums[kRows][kEights][4] = {};

  MASKED_OPS_DEVICE void multiply(int row, const uint32_t (&a)[4], const uint2 (&columns)[kEights]) {
#pragma unroll
    for (int e = 0; e < kEights; ++e) {
      mma_m16n8k16<kDtype == kBFloat16>(sums[row][e], a, columns[e].x, columns[e].y);
    }
  }
  template <int kRow = 0>
  MASKED_OPS_DEVICE void add_rows(uint32_t bits, uint32_t turned, uint32_t one, uint32_t& place,
                                  const uint2 (&columns)[kEights]) {
    uint32_t a[4];
    expand_byte<kRow, kSlotBytes>(a, bits, turned, one, place);
    multiply(kRow, a, columns);
    if constexpr (kRow + 1 < kRows) add_rows<kRow + 1>(bits, turned, one, place, columns);
  }
  MASKED_OPS_DEVICE void add_sparse(const Slots& slots, uint4 all_bits, const Input<kM>& input) {
    uint32_t place = shared_address(dynamic_shared) + slots.first;
    const uint32_t one = blockDim.y;  // which the compiler does not know
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      const uint32_t bits = k == 0 ? all_bits.x : k == 1 ? all_bits.y : k == 2 ? all_bits.z : all_bits.w;
      add_rows(bits, select_bytes<0x0123>(bits, 0), one, place, input.columns[k]);
    }
  }
  MASKED_OPS_DEVICE void add_dense(const uint8_t* words, const Input<kM>& input) {
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      uint4 a[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        a[r] = __ldcs(reinterpret_cast<const uint4*>(words) + (k * kRows + r) * kWarp);
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) multiply(r, {a[r].x, a[r].y, a[r].z, a[r].w}, input.columns[k]);
    }
  }
  // To [row of input][row of the weight]; a lane's eight places of each row of input are in banks of their own.
  MASKED_OPS_DEVICE void leave(float* to) const {
    const int lane = int(threadIdx.x % kWarp);
#pragma unroll
    for (int r = 0; r < kTileSide / 16; ++r) {
#pragma unroll
      for (int e = 0; e < kEights; ++e) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          to[(e * 8 + lane % 4 * 2 + i % 2) * kSums + r * 16 + lane / 4 + i / 2 * 8] = sums[r][e][i];
        }
      }
    }
  }
};

template <int kDtype>
MASKED_OPS_DEVICE void store(const TiledDecode& decode, int64_t m, int64_t row, float sum) {
  if (m >= decode.M || row >= decode.N) return;
  const float bias = decode.bias ? to_float<kDtype == kBFloat16>(decode.bias[row]) : 0.f;
  decode.output[m * decode.N + row] = uint16_t(round_pair<kDtype == kBFloat16>(bias + sum, 0.f));
}

// Blocks [splits x rows of the weight][rows of input].
template <int kDtype, int kM, bool kCluster>
__global__ void __launch_bounds__(Shape<kM>::kThreads, 1)
    decode_tiles_kernel(const __grid_constant__ TiledDecode decode) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  constexpr bool kServes = false;  // it asks for a Hopper's shared memory, and clusters
#else
  constexpr bool kServes = true;
#endif
  if (!kServes) return;
  using S = Shape<kM>;
  const int groups = 1 << decode.log_groups, parts = S::kWarps >> decode.log_groups;
  const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  const int splits = kCluster ? decode.splits : 1, split = kCluster ? int(blockIdx.x) % splits : 0;
  const int64_t first_group = int64_t(blockIdx.x) / splits * groups, group = first_group + warp % groups;
  const int64_t first_m = int64_t(blockIdx.y) * kM;
  const int tiles = int(tiles_of(decode.K)), all = splits * parts, part = split * parts + (warp >> decode.log_groups);
  const int from = tiles * part / all, to = group < groups_of(decode.N) ? tiles * (part + 1) / all : from;
  const TilePiece* const pieces = decode.pieces + group * tiles;
  const auto piece = [&](int i) {
    const uint2 words = i < to ? __ldg(reinterpret_cast<const uint2*>(pieces + i)) : make_uint2(0, 0);
    return Tile{words.x, words.y};
  };
  const auto* const rows = reinterpret_cast<const uint8_t*>(decode.input + (first_m + lane / 4) * decode.K);
  const int rows_left = int(decode.M - first_m) - lane / 4;
  const Slots slots;
  Products<kDtype, kM> products;
  Ahead here, next;
  Tile now = piece(from), soon = piece(from + 1), later = piece(from + 2);
  const Stream stream = {decode.data + int64_t(now.at) * kTileUnit, now.at};
  here.load(stream, now);
  stream.prefetch(soon);
#pragma unroll 1
  for (int i = from; i < to; ++i) {
    stream.prefetch(later);
    const Tile last = piece(i + 3);
    if (!now.dense() && !now.empty()) slots.fill(here, stream, now);
    Input<kM> input;
    if (!now.empty()) input.load(rows, rows_left, int(decode.K), i * int(kTileSide) + lane % 4 * 4);
    next.load(stream, soon);
    if (now.dense()) {
      products.add_dense(stream.at(now, lane * 16), input);
    } else if (!now.empty()) {
      products.add_sparse(slots, here.bits, input);
    }
    here = next, now = soon, soon = later, later = last;
  }

  float* const sums = reinterpret_cast<float*>(dynamic_shared);
  __syncthreads();  // the sums lie where values were
  products.leave(sums + warp * kM * kSums);
  __syncthreads();
  // Of each group those of part 0 become the block's.
#pragma unroll 1
  for (int i = threadIdx.x; i < groups * kM * kTileSide; i += S::kThreads) {
    const int r = i % kTileSide, m = i / kTileSide % kM, g = i / kTileSide / kM;
    float* const first = sums + (g * kM + m) * kSums + r;
    float sum = *first;
#pragma unroll 1
    for (int p = 1; p < parts; ++p) sum += first[p * groups * kM * kSums];
    if constexpr (kCluster) {
      *first = sum;
    } else {
      store<kDtype>(decode, first_m + m, (first_group + g) * kTileSide + r, sum);
    }
  }
  if constexpr (kCluster) {
    cluster_barrier();
    const uint32_t address = shared_address(sums);
#pragma unroll 1
    for (int i = int(cluster_rank()) * S::kThreads + int(threadIdx.x); i < groups * kM * kTileSide / 4;
         i += splits * S::kThreads) {
      const int r = i * 4 % kTileSide, m = i * 4 / kTileSide % kM, g = i * 4 / kTileSide / kM;
      float4 sum = {};
#pragma unroll 1
      for (int s = 0; s < splits; ++s) {
        const float4 x = load_shared_of(s, address + ((g * kM + m) * kSums + r) * 4);
        sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
      }
      const int64_t row = (first_group + g) * kTileSide + r;
      store<kDtype>(decode, first_m + m, row, sum.x);
      store<kDtype>(decode, first_m + m, row + 1, sum.y);
      store<kDtype>(decode, first_m + m, row + 2, sum.z);
      store<kDtype>(decode, first_m + m, row + 3, sum.w);
    }
    cluster_barrier_after_reading();
  }
}

// So many groups of rows in a block, and so many blocks for a contraction, that all is done first; time is counted in
// tiles of a warp. Beginning and adding up take about two, a cluster's barriers and reading some more; and blocks with
// one group of rows each read all of the input.
template <int kM>
void deal_out(TiledDecode& decode) {
  constexpr int kWarps = Shape<kM>::kWarps;
  const int64_t groups = groups_of(decode.N), tiles = tiles_of(decode.K), by_rows = ceil_div<int64_t>(decode.M, kM);
  double best = 0;
  for (int log_groups = 0; log_groups <= 2; ++log_groups) {
    for (int splits = 1; splits <= tuning::kSm90Splits; splits *= 2) {
      const int64_t blocks = ceil_div<int64_t>(groups, 1 << log_groups) * by_rows;
      const int64_t rounds = ceil_div<int64_t>(blocks, sm90_clusters(tuning::kDecodeMultiprocessors, splits));
      const int64_t steps = ceil_div<int64_t>(tiles, splits * (kWarps >> log_groups));
      const double input = double(kM) * double(tiles * kTileSide) * 2 / splits / tuning::kTileBytesOfInput;
      const double cluster = splits > 1 ? 1 + splits / 4. : 0;
      const double time = double(rounds) * (double(steps) + input + 2 + cluster);
      if (best > 0 && time >= best) continue;
      best = time, decode.log_groups = log_groups, decode.splits = splits;
    }
  }
}

template <int kDtype, int kM>
int run(TiledDecode decode, void* stream) {
  deal_out<kM>(decode);
  const int64_t blocks = ceil_div<int64_t>(groups_of(decode.N), 1 << decode.log_groups) * decode.splits;
  if (blocks > INT32_MAX) return kUnsupported;
  const dim3 grid(uint32_t(blocks), uint32_t(ceil_div<int64_t>(decode.M, kM)));
  const auto kernel =
      decode.splits > 1 ? decode_tiles_kernel<kDtype, kM, true> : decode_tiles_kernel<kDtype, kM, false>;
  return launch_clusters(decode.splits, kernel, grid, Shape<kM>::kThreads, Shape<kM>::kBytes, stream, decode);
}

template <int kDtype>
int run(const TiledDecode& decode, void* stream) {
  if (decode.M <= 8) return run<kDtype, 8>(decode, stream);
  return decode.M <= 16 ? run<kDtype, 16>(decode, stream) : run<kDtype, 32>(decode, stream);
}

}  // namespace
}  // namespace masked_ops::cuda

int masked_ops_cuda_decode_tiles(int dtype, int64_t M, int64_t N, int64_t K, const void* input,
                                 const masked_ops::cuda::TilePiece* pieces, const void* data, const void* bias,
                                 void* output, void* stream) {
  using namespace masked_ops::cuda;
  if (dtype != kBFloat16 && dtype != kHalf) return kUnsupported;
  if (M > 64 || K % 4 != 0 || K > kMostTiledColumns || !is_aligned(input, 8) || !is_aligned(data, 16) ||
      !is_aligned(pieces, 8)) {
    return kUnsupported;
  }
  if (M == 0 || N == 0) return 0;
  const TiledDecode decode{M,
                           N,
                           K,
                           static_cast<const uint16_t*>(input),
                           pieces,
                           static_cast<const uint8_t*>(data),
                           static_cast<const uint16_t*>(bias),
                           static_cast<uint16_t*>(output),
                           0,
                           1};
  return dtype == kHalf ? run<kHalf>(decode, stream) : run<kBFloat16>(decode, stream);
}
