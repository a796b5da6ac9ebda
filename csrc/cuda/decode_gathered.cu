// A linear layer on up to 64 rows of input, out of weights whose columns are gathered (gathered.h), bf16 and fp16, on
// the tensor cores.
//
// A block keeps the input of two planes in shared memory, transposed: a plane is eight rows of one segment, 16 bytes a
// column, so that a byte of a lane's lines, put into the lane's address, is a column's address. For 16 rows of input
// the two planes are of one segment, and the blocks of a cluster share the segments; for eight they are of two. Operand
// A is made out of a lane's values and their positions: a byte of eight bits says in which phases a value is wanted,
// and its sign, moved to each phase, is the mask. Some warps share a strip; what they and the blocks of a cluster have
// is added up at the end, always in the same order.
//
// Per step that is four products of bits, nine instructions of the adders' and two to four turns of shared memory, and
// a step holds some 26 values at density .1: less than the time that its bytes take from memory, which are asked for
// (into the L2 cache) before the input is.
#include "gathered.h"
#include "gemm_tiles.h"
#include "numeric.h"
#include "ptx.h"
#include "tuning.h"

namespace masked_ops::cuda {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / kWarp, kPlanes = 2;
constexpr uint32_t kPlaneBytes = kGatherColumns * 16;
constexpr int64_t kMostGatheredColumns = 1 << 27;  // eight rows of input are 2^31 bytes
constexpr int kFar = 8;                            // batches that a warp has under way to the L2 cache

struct GatheredDecode {
  int64_t M, N, K;
  const uint16_t* input;
  const int32_t* order;
  const GatheredPiece* pieces;
  const uint8_t* data;
  const uint16_t* bias;
  uint16_t* output;
  int log_parts, rounds, splits;  // warps of a strip, a power of 2; strips of a warp; blocks that share the segments

  MASKED_OPS_BOTH int parts() const { return 1 << log_parts; }
  MASKED_OPS_BOTH int at_once() const { return kWarps >> log_parts; }  // strips of a block
};

template <int kM>
constexpr int kSegments = kPlanes * 8 / kM;  // whose planes are there

// What a warp has of a piece, unless there is no such strip.
struct Batches {
  const uint8_t* first;
  int count, steps;

  MASKED_OPS_DEVICE Batches(const GatheredDecode& of, int strip, int segment, int part) {
    const bool there = strip < int(strips_of(of.N));
    const int64_t number = int64_t(there ? strip : 0) * gather_segments(of.K) + segment;
    const uint4 words = __ldg(reinterpret_cast<const uint4*>(of.pieces) + number);
    const uint32_t from = words.z * part >> of.log_parts, to = words.z * (part + 1) >> of.log_parts;
    count = there ? int(to - from) : 0;
    steps = int(words.w & 0xffff);
    first = of.data + (int64_t(words.x) + from * batch_units(steps)) * kGatherUnit;
  }
  MASKED_OPS_DEVICE void prefetch() const {
    const int ahead = count < kFar ? count : kFar, end = ahead * int(batch_units(steps)) * int{kGatherUnit};
#pragma unroll 1
    for (int i = int(threadIdx.x % kWarp) * 128; i < end; i += kWarp * 128) prefetch_l2(first + i);
  }
};

// Where a lane's part of a batch lies in it.
template <int kM>
struct Places {
  uint32_t lines, positions, values;

  MASKED_OPS_DEVICE Places() {
    const uint32_t lane = threadIdx.x % kWarp;
    lines = computed(lane % kSlots * kBatchSteps + (kM == 8 ? lane / kSlots * 4 : 0));
    positions = computed(kLinesBytes + lane * 4);
    values = computed(kLinesBytes + kPositionsBytes + lane * 16);
  }
};

// A batch in registers. With eight rows of input ldmatrix brings two steps at once, the second one by the upper lanes.
template <int kSteps, int kM>
struct Batch {
  using Of = BatchOf<kSteps>;
  static constexpr int kLines = kM / 8;
  uint4 values[Of::kWords];
  uint32_t positions, lines[kLines];

  MASKED_OPS_DEVICE void load(const uint8_t* from, const Places<kM>& at) {
    if constexpr (kLines == 2) {
      const uint2 both = __ldcs(reinterpret_cast<const uint2*>(from + at.lines));
      lines[0] = both.x, lines[1] = both.y;
    } else {
      lines[0] = __ldcs(reinterpret_cast<const uint32_t*>(from + at.lines));
    }
    positions = __ldcs(reinterpret_cast<const uint32_t*>(from + at.positions));
#pragma unroll
    for (int i = 0; i < Of::kWords; ++i) {
      values[i] = __ldcs(reinterpret_cast<const uint4*>(from + at.values) + i * (kTwoGroupsBytes / 16));
    }
  }
  // Of a group: bit p of byte 2 h + e says whether half e of row l / 4 + 8 h belongs to phase p.
  template <int kGroup>
  MASKED_OPS_DEVICE uint32_t phases() const {
    const uint32_t nibbles = positions >> Of::shift(kGroup);
    return select_bytes(0x08040201, 0x80402010, kSteps == 4 ? nibbles : nibbles & 0x3333);
  }
};

template <int kDtype, int kM>
struct Products {
  static constexpr int kEights = kM / 8;
  float sums[kEights][4] = {};
  uint32_t table, bases[4];
  int line;  // that the lane asks for of two batches
  Places<kM> places;

  MASKED_OPS_DEVICE Products() : table(shared_address(dynamic_shared)) {
    const int lane = int(threadIdx.x % kWarp), upper = lane / kSlots;
    line = computed(lane * 128);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      bases[i] = kM == 8 ? slot_column(lane % kSlots, 2 * i + upper) * 16
                         : slot_column(lane % kSlots, i) * 16 + upper * kPlaneBytes;
    }
  }
  // The input's columns of step kStep of a batch, which is step kOfGroup of its group; or of it and the next one.
  template <int kSteps, int kStep, int kOfGroup>
  MASKED_OPS_DEVICE void look_up(uint32_t (&columns)[4], const Batch<kSteps, kM>& batch, uint32_t planes) const {
    const uint32_t lines = batch.lines[kM == 8 ? 0 : kStep % 2];
    // The byte becomes the address's second.
    const uint32_t place = select_bytes<0x7604 | kStep / 2 << 4>(lines, bases[kM == 8 ? kOfGroup / 2 : kOfGroup]);
    ldmatrix_x4<true>(columns, planes + place);
  }
  template <int kSteps, int kStep = 0>
  MASKED_OPS_DEVICE void add(const Batch<kSteps, kM>& batch, uint32_t planes, uint32_t phases, uint32_t (&columns)[4]) {
    constexpr int kGroup = kStep / kSteps, kOfGroup = kStep % kSteps;
    if constexpr (kOfGroup == 0) phases = batch.template phases<kGroup>();
    if constexpr (kM == 16 || kStep % 2 == 0) look_up<kSteps, kStep, kOfGroup>(columns, batch, planes);
    const uint4 two = batch.values[kGroup / 2];
    const uint32_t row = kGroup % 2 ? two.z : two.x, row_8 = kGroup % 2 ? two.w : two.y;
    const uint32_t even = phases << (7 - 2 * kOfGroup), odd = phases << (6 - 2 * kOfGroup);
    const uint32_t a[4] = {row & permute<0x9988>(even), row_8 & permute<0xbbaa>(even), row & permute<0x9988>(odd),
                           row_8 & permute<0xbbaa>(odd)};
    if constexpr (kM == 8) {
      mma_m16n8k16<kDtype == kBFloat16>(sums[0], a, columns[kStep % 2 * 2], columns[kStep % 2 * 2 + 1]);
    } else {
      mma_m16n8k16<kDtype == kBFloat16>(sums[0], a, columns[0], columns[1]);
      mma_m16n8k16<kDtype == kBFloat16>(sums[1], a, columns[2], columns[3]);
    }
    if constexpr (kStep + 1 < kBatchSteps) add<kSteps, kStep + 1>(batch, planes, phases, columns);
  }
  template <int kSteps>
  MASKED_OPS_DEVICE void add(const Batches& of, uint32_t planes) {
    constexpr int kBytes = BatchOf<kSteps>::kBytes;
    const uint8_t* from = of.first;
    Batch<kSteps, kM> even, odd;
    uint32_t columns[4];
    if (of.count > 0) even.load(from, places);
#pragma unroll 1
    for (int left = of.count; left > 0; left -= 2, from += 2 * kBytes) {
      if (line < 2 * kBytes && line < (left - kFar) * kBytes) prefetch_l2(from + (kFar * kBytes + line));
      if (left > 1) odd.load(from + kBytes, places);
      add(even, planes, 0, columns);
      if (left > 2) even.load(from + 2 * kBytes, places);
      if (left > 1) add(odd, planes, 0, columns);
    }
  }
  // Of the segment whose planes are the first or the second.
  MASKED_OPS_DEVICE void add(const Batches& of, int segment) {
    const uint32_t planes = table + segment * kPlaneBytes;
    if (of.steps == 4) {
      add<4>(of, planes);
    } else {
      add<2>(of, planes);
    }
  }
  // To [row of the strip][row of input].
  MASKED_OPS_DEVICE void leave(float* to) {
    const int lane = int(threadIdx.x % kWarp);
#pragma unroll
    for (int e = 0; e < kEights; ++e) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        to[(lane / 4 + i / 2 * 8) * kM + e * 8 + lane % 4 * 2 + i % 2] = sums[e][i];
        sums[e][i] = 0.f;
      }
    }
  }
};

// Brings segments [begin, end) to the planes, zeros up to a multiple of 32 columns and for rows beyond M: stmatrix
// transposes 32 columns of eight rows, for which a lane has eight columns of one row. It takes its two words after its
// number by 4 first, so that what is stored at once lies in different banks. meanwhile() is for the time until what was
// asked for first is there.
template <int kM, typename Meanwhile>
MASKED_OPS_DEVICE void stage(const GatheredDecode& decode, int64_t first_m, int begin, int end,
                             const Meanwhile& meanwhile) {
  const int lane = int(threadIdx.x % kWarp), turn = lane % 4;
  const int64_t from = begin * kGatherColumns, to_end = end * kGatherColumns;
  const int all = int((to_end < decode.K ? to_end : decode.K) - from);
  const int blocks = ceil_div(all, 32) * (kM / 8);
  // Where the row of a matrix goes whose address this lane gives: it is in matrix lane / 8.
  const int pair = lane % 8 / 2, to = pair * 8 + (lane / 8 + pair) % 4 * 2 + lane % 2;
  constexpr int kLoads = 8;  // under way
#pragma unroll 1
  for (int from_block = int(threadIdx.x / kWarp); from_block < blocks; from_block += kLoads * kWarps) {
    uint4 x[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int block = from_block + i * kWarps, column = block / (kM / 8) * 32 + turn * 8;
      const int64_t m = first_m + block % (kM / 8) * 8 + lane / 4;
      x[i] = make_uint4(0, 0, 0, 0);
      if (m < decode.M && column < all) {
        x[i] = __ldg(reinterpret_cast<const uint4*>(decode.input + (m * decode.K + from + column)));
      }
    }
    if (from_block < kWarps) meanwhile();
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int block = from_block + i * kWarps, first = block / (kM / 8) * 32;
      if (block >= blocks) break;  // all of the warp
      if (turn & 1) x[i] = make_uint4(x[i].y, x[i].z, x[i].w, x[i].x);
      if (turn & 2) x[i] = make_uint4(x[i].z, x[i].w, x[i].x, x[i].y);
      const uint32_t words[4] = {x[i].x, x[i].y, x[i].z, x[i].w};
      const uint32_t plane = shared_address(dynamic_shared) + block % (kM / 8) * kPlaneBytes;
      stmatrix_x4<true>(plane + uint32_t(first + to) * 16, words);
    }
  }
}

template <int kDtype>
MASKED_OPS_DEVICE void store(const GatheredDecode& decode, int64_t m, int32_t row, float sum) {
  if (m >= decode.M) return;
  const float bias = decode.bias ? to_float<kDtype == kBFloat16>(decode.bias[row]) : 0.f;
  decode.output[m * decode.N + row] = uint16_t(round_pair<kDtype == kBFloat16>(bias + sum, 0.f));
}

// Blocks [splits x strips][rows of input].
template <int kDtype, int kM, bool kCluster>
__global__ void __launch_bounds__(kThreads, 1) decode_gathered_kernel(const __grid_constant__ GatheredDecode decode) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  constexpr bool kServes = false;  // it asks for a Hopper's shared memory, stmatrix, and clusters
#else
  constexpr bool kServes = true;
#endif
  if constexpr (kServes) {
    constexpr int kOutputs = kStripRows * kM;
    float* const partial = reinterpret_cast<float*>(dynamic_shared + kPlanes * kPlaneBytes);  // of each warp
    const int warp = int(threadIdx.x) / kWarp, part = warp % decode.parts(), mine = warp >> decode.log_parts;
    const int splits = kCluster ? decode.splits : 1, split = kCluster ? int(blockIdx.x) % splits : 0;
    const int block = int(blockIdx.x) / splits, blocks = int(gridDim.x) / splits, strips = int(strips_of(decode.N));
    const int segments = int(gather_segments(decode.K));
    const int first = segments * split / splits, last = segments * (split + 1) / splits;
    const int64_t first_m = int64_t(blockIdx.y) * kM;
    // Neighbours are about as long: they are dealt out over blocks.
    const auto strip_of = [&](int round, int i) { return (round * decode.at_once() + i) * blocks + block; };
    // Of output i of the block's strips: its row of the weight, if there is one, and where part 0 has its sum.
    const auto row_of = [&](int round, int i) {
      const int strip = strip_of(round, i / kOutputs);
      return strip < strips ? decode.order[int64_t(strip) * kStripRows + i % kOutputs / kM] : -1;
    };
    const auto sum_of = [&](int i) { return partial + ((i / kOutputs << decode.log_parts) * kOutputs + i % kOutputs); };
    Products<kDtype, kM> products;
#pragma unroll 1
    for (int round = 0; round < decode.rounds; ++round) {
      const int strip = strip_of(round, mine);
#pragma unroll 1
      for (int segment = first; segment < last; segment += kSegments<kM>) {
        const int end = segment + kSegments<kM> < last ? segment + kSegments<kM> : last;
        const auto prefetch = [&] {
          const Batches here(decode, strip, segment, part), next(decode, strip, end - 1, part);
          here.prefetch();
          if (end - segment > 1) next.prefetch();
        };
        if (round == 0 || last - first > kSegments<kM>) {
          if (round > 0 || segment > first) __syncthreads();  // nobody reads the columns any more
          stage<kM>(decode, first_m, segment, end, prefetch);
          __syncthreads();
        } else {
          prefetch();
        }
#pragma unroll 1
        for (int s = segment; s < end; ++s) products.add(Batches(decode, strip, s, part), s - segment);
      }
      products.leave(partial + warp * kOutputs);
      __syncthreads();
      // Of each strip those of part 0 become the block's.
#pragma unroll 1
      for (int i = int(threadIdx.x); i < decode.at_once() * kOutputs; i += kThreads) {
        float* const first_part = sum_of(i);
        float sum = *first_part;
#pragma unroll 1
        for (int p = 1; p < decode.parts(); ++p) sum += first_part[p * kOutputs];
        if constexpr (kCluster) {
          *first_part = sum;
        } else {
          const int32_t row = row_of(round, i);
          if (row >= 0) store<kDtype>(decode, first_m + i % kM, row, sum);
        }
      }
      if constexpr (kCluster) {
        cluster_barrier();
#pragma unroll 1
        for (int i = (split * kThreads + int(threadIdx.x)) * 4; i < decode.at_once() * kOutputs;
             i += splits * kThreads * 4) {
          const int32_t row = row_of(round, i);
          if (row < 0) continue;
          const uint32_t address = shared_address(sum_of(i));
          float4 sum = {};
#pragma unroll 1
          for (int s = 0; s < splits; ++s) {
            const float4 x = load_shared_of(s, address);
            sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
          }
          const int64_t m = first_m + i % kM;
          store<kDtype>(decode, m, row, sum.x);
          store<kDtype>(decode, m + 1, row, sum.y);
          store<kDtype>(decode, m + 2, row, sum.z);
          store<kDtype>(decode, m + 3, row, sum.w);
        }
        cluster_barrier_after_reading();
      } else if (round + 1 < decode.rounds) {
        __syncthreads();  // before the sums are written anew
      }
    }
  }
}

// So many warps of a strip and blocks of the segments that all are done first. Time is counted in pieces of a warp, at
// density .1 (by the model in bench/results/gpu-predictions.md): staging a plane takes a twentieth, and adding up over
// a cluster a little more.
template <int kM>
int64_t deal_out(GatheredDecode& decode) {
  const int64_t strips = strips_of(decode.N), segments = gather_segments(decode.K);
  const int64_t by_rows = ceil_div<int64_t>(decode.M, kM);
  double best = 0;
  for (int splits = 1; splits <= tuning::kSm90Splits && splits <= segments; ++splits) {
    const int64_t at_once = sm90_clusters(tuning::kDecodeMultiprocessors, splits) / by_rows;
    const int64_t clusters = at_once > 1 ? at_once : 1, of_block = ceil_div<int64_t>(segments, splits);
    for (int log_parts = 0; 1 << log_parts <= kWarps; ++log_parts) {
      const int64_t rounds = ceil_div<int64_t>(strips, clusters * (kWarps >> log_parts));
      const int64_t stagings = of_block > kSegments<kM> ? rounds : 1;
      const double work = double(rounds * of_block) / (1 << log_parts);
      const double time = work + double(stagings * of_block * (kM / 8)) / 20 + (splits > 1 ? double(rounds) / 16 : 0);
      if (best > 0 && time >= best) continue;
      best = time, decode.log_parts = log_parts, decode.rounds = int(rounds), decode.splits = splits;
    }
  }
  return ceil_div<int64_t>(strips, int64_t(decode.rounds) * decode.at_once()) * decode.splits;
}

template <int kDtype, int kM>
int run(GatheredDecode decode, void* stream) {
  const int64_t blocks = deal_out<kM>(decode);
  if (blocks > INT32_MAX || decode.N > INT32_MAX) return kUnsupported;
  const dim3 grid(uint32_t(blocks), uint32_t(ceil_div<int64_t>(decode.M, kM)));
  const auto kernel =
      decode.splits > 1 ? decode_gathered_kernel<kDtype, kM, true> : decode_gathered_kernel<kDtype, kM, false>;
  constexpr size_t kBytes = kPlanes * kPlaneBytes + kWarps * kStripRows * kM * sizeof(float);
  static_assert(kBytes <= kGatheredSharedBytes);
  return launch_clusters(decode.splits, kernel, grid, kThreads, kBytes, stream, decode);
}

template <int kDtype>
int run(const GatheredDecode& decode, void* stream) {
  return decode.M <= 8 ? run<kDtype, 8>(decode, stream) : run<kDtype, 16>(decode, stream);
}

}  // namespace
}  // namespace masked_ops::cuda

int masked_ops_cuda_decode_gathered(int dtype, int64_t M, int64_t N, int64_t K, const void* input, const int32_t* order,
                                    const masked_ops::cuda::GatheredPiece* pieces, const void* data, const void* bias,
                                    void* output, void* stream) {
  using namespace masked_ops::cuda;
  if (dtype != kBFloat16 && dtype != kHalf) return kUnsupported;
  if (M > 64 || K % 8 != 0 || K > kMostGatheredColumns || !is_aligned(input, 16) || !is_aligned(data, 16) ||
      !is_aligned(pieces, 16)) {
    return kUnsupported;
  }
  if (M == 0 || N == 0) return 0;
  const GatheredDecode decode{M,
                              N,
                              K,
                              static_cast<const uint16_t*>(input),
                              order,
                              pieces,
                              static_cast<const uint8_t*>(data),
                              static_cast<const uint16_t*>(bias),
                              static_cast<uint16_t*>(output),
                              0,
                              0,
                              1};
  return dtype == kHalf ? run<kHalf>(decode, stream) : run<kBFloat16>(decode, stream);
}
