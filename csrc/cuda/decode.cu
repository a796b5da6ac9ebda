// A linear layer on few rows of input, out of the remaining weights: M <= 8 here, more rows in decode_mma.cu.
//
// Eight lanes take a row of the weight, eight remaining weights a lane and step, and look the input up in shared
// memory, where the M values of a column lie together. A warp takes four rows, or some neighbouring segments of them;
// what the warps of a block have of the same rows is summed at the end, always in the same order.
#include "decode.h"

#include "ptx.h"
#include "remaining.h"
#include "tuning.h"

namespace masked_ops::cuda {
namespace {

__global__ void __launch_bounds__(tuning::kPassThreads, tuning::kPassBlocks)
    decode_index_kernel(Pieces pieces, int64_t segments, uint32_t* __restrict__ begins, uint8_t* __restrict__ columns) {
  for_columns(pieces, [&](int64_t row, int64_t col, bool set, int64_t position) {
    if (col % kSegment == 0) begins[row * segments + col / kSegment] = uint32_t(position);
    if (set) columns[position] = uint8_t(col % kSegment);
    if (row + 1 == pieces.rows && col + 1 == pieces.cols) begins[pieces.rows * segments] = uint32_t(position + set);
  });
}

constexpr int kWarps = tuning::kGatherThreads / kWarp;
constexpr int64_t kMaxNnz = UINT32_MAX - 64;       // a position may run ahead of the last
constexpr int kLanes = 8, kRows = kWarp / kLanes;  // lanes of a row, rows of a warp

template <typename Storage, int kM>
struct alignas(kM * sizeof(Storage)) Column {
  Storage of[kM];
};

// input[m][k] to column[k], zeros beyond M and K.
template <typename Storage, int kM>
MASKED_OPS_DEVICE void stage_input(Column<Storage, kM>* to, const Storage* input, int64_t rows, int64_t K,
                                   int64_t first, int64_t last) {
  for (int64_t k = first + threadIdx.x; k < last; k += tuning::kGatherThreads) {
    Column<Storage, kM> column;
#pragma unroll
    for (int m = 0; m < kM; ++m) column.of[m] = k < K && m < rows ? input[m * K + k] : Storage{};
    to[k - first] = column;
  }
}

// What a lane has of its row: the remaining weights of some neighbouring segments, kPerLane at a time, of which the
// next kAhead are on their way.
template <int kDtype, int kM>
struct Gather {
  using V = Value<kDtype>;
  using Storage = typename V::Storage;
  static constexpr int64_t kStaged = tuning::kGatherInputBytes / (kM * sizeof(Storage)) / kSegment;  // segments
  static constexpr int kPerLane = 8, kAhead = kM * sizeof(Storage) < 16 ? tuning::kGatherAhead : 1,
                       kStep = kPerLane * kLanes;

  const Decode& decode;
  int64_t segments, row;
  int lane;  // of the row
  float sums[kM] = {};
  uint32_t from = 0, to = 0, segment_end = 0;
  const uint32_t* begins = nullptr;  // of the segment after
  Group<kDtype, kPerLane> groups[kAhead];

  MASKED_OPS_DEVICE Gather(const Decode& of, int64_t row, int lane)
      : decode(of), segments(DecodeIndex::segments(of.K)), row(row), lane(lane) {}
  MASKED_OPS_DEVICE uint32_t first_position() const { return from / kPerLane * kPerLane + lane * kPerLane; }
  MASKED_OPS_DEVICE void load(Group<kDtype, kPerLane>& group, uint32_t position) const {
    if (position < to) group.load(decode.values, decode.index, position, decode.nnz);
  }
  // Segments first to last - 1.
  MASKED_OPS_DEVICE void begin(int64_t first, int64_t last) {
    from = to = 0;
    if (row < decode.N && first < last) {
      begins = decode.index.begins + row * segments + first + 1;
      from = begins[-1], segment_end = begins[0], to = begins[last - first - 1];
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) load(groups[i], first_position() + i * kStep);
  }
  // input: of segment first.
  MASKED_OPS_DEVICE void add(const Column<Storage, kM>* input) {
    for (uint32_t position = first_position(); position < to;) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const Group<kDtype, kPerLane> group = groups[i];
        load(groups[i], position + kAhead * kStep);
#pragma unroll
        for (int e = 0; e < kPerLane; ++e) {
          if (position + e - from < to - from) {  // unsigned: not before from either
            while (position + e >= segment_end) {
              segment_end = *++begins;
              input += kSegment;
            }
            const Column<Storage, kM> column = input[group.column(e)];
            const float value = V::widen(group.value(e));
#pragma unroll
            for (int m = 0; m < kM; ++m) sums[m] += value * V::widen(column.of[m]);
          }
        }
        position += kStep;
      }
    }
  }
};

template <int kDtype, int kM>
__global__ void __launch_bounds__(tuning::kGatherThreads, tuning::kGatherBlocks)
    decode_gather_kernel(const __grid_constant__ Decode decode, int splits) {
  using G = Gather<kDtype, kM>;
  using Storage = typename G::Storage;
  auto* staged = reinterpret_cast<Column<Storage, kM>*>(dynamic_shared);
  __shared__ float partial[kWarps][kRows * kM];
  const int groups = kWarps / splits, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int group = warp % groups, split = warp / groups;
  const int64_t first_row = int64_t(blockIdx.x) * groups * kRows, first_m = int64_t(blockIdx.y) * kM;
  const Storage* input = static_cast<const Storage*>(decode.input) + first_m * decode.K;
  G gather(decode, first_row + group * kRows + lane / kLanes, lane % kLanes);
  for (int64_t stage = 0; stage < gather.segments; stage += G::kStaged) {
    const int64_t count = gather.segments - stage < G::kStaged ? gather.segments - stage : G::kStaged;
    const int64_t first = count * split / splits, last = count * (split + 1) / splits;
    gather.begin(stage + first, stage + last);
    __syncthreads();
    stage_input<Storage, kM>(staged, input, decode.M - first_m, decode.K, stage * kSegment, (stage + count) * kSegment);
    __syncthreads();
    gather.add(staged + first * kSegment);
  }
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) {
      gather.sums[m] += __shfl_xor_sync(kAllLanes, gather.sums[m], step);
    }
    if (lane % kLanes == 0) partial[warp][m * kRows + lane / kLanes] = gather.sums[m];
  }
  __syncthreads();
  const int rows = groups * kRows;
  for (int i = threadIdx.x; i < rows * kM; i += tuning::kGatherThreads) {
    const int m = i / rows, r = i % rows;
    const int64_t row = first_row + r;
    if (row >= decode.N || first_m + m >= decode.M) continue;
    float sum = decode.bias ? G::V::widen(static_cast<const Storage*>(decode.bias)[row]) : 0.f;
    for (int s = 0; s < splits; ++s) sum += partial[s * groups + r / kRows][m * kRows + r % kRows];
    static_cast<Storage*>(decode.output)[(first_m + m) * decode.N + row] = G::V::round(sum);
  }
}

template <int kDtype, int kM>
int gather(const Decode& decode) {
  using G = Gather<kDtype, kM>;
  const int64_t segments = DecodeIndex::segments(decode.K), warps = ceil_div<int64_t>(decode.N, kRows);
  int splits = 1;
  while (splits < kWarps && splits < segments && ceil_div<int64_t>(warps * splits, kWarps) < tuning::kDecodeBlocks) {
    splits *= 2;
  }
  // One step back from where there would be more blocks than run at once.
  if (splits > 1 && ceil_div<int64_t>(warps * splits, kWarps) > tuning::kDecodeBlocks) splits /= 2;
  const int64_t blocks = ceil_div<int64_t>(warps * splits, kWarps);
  if (blocks > INT32_MAX) return kUnsupported;
  const int64_t staged = G::kStaged < segments ? G::kStaged : segments;
  return launch(decode_gather_kernel<kDtype, kM>, dim3(uint32_t(blocks), uint32_t(ceil_div<int64_t>(decode.M, kM))),
                tuning::kGatherThreads, size_t(staged) * kSegment * sizeof(Column<typename G::Storage, kM>),
                decode.stream, decode, splits);
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

bool takes_mma(int dtype, int64_t M) { return M > 8 && dtype != kFloat; }

template <int kDtype>
int gather_some(const Decode& decode) {
  if (decode.M == 1) return gather<kDtype, 1>(decode);
  if (decode.M == 2) return gather<kDtype, 2>(decode);
  // 16 bytes a column at most: what one load from shared memory takes.
  return decode.M <= 4 ? gather<kDtype, 4>(decode) : gather<kDtype, kDtype == kFloat ? 4 : 8>(decode);
}

}  // namespace
}  // namespace masked_ops::cuda

size_t masked_ops_cuda_decode_index_bytes(int64_t N, int64_t K, int64_t nnz) {
  using namespace masked_ops::cuda;
  return nnz > kMaxNnz ? 0 : DecodeIndex::bytes(N, K, nnz);
}

int masked_ops_cuda_decode_index(const uint64_t* words, int64_t N, int64_t K, int64_t nnz, const int64_t* offsets,
                                 void* index, void* stream) {
  using namespace masked_ops::cuda;
  if (nnz > kMaxNnz) return kUnsupported;
  if (N == 0 || K == 0) return 0;
  const DecodeIndex to = DecodeIndex::of(index, N, K);
  const Pieces pieces = Pieces::of(words, offsets, N, K);
  if (pieces.blocks() > INT32_MAX) return kUnsupported;
  return launch(decode_index_kernel, uint32_t(pieces.blocks()), tuning::kPassThreads, 0, stream, pieces,
                DecodeIndex::segments(K), const_cast<uint32_t*>(to.begins), const_cast<uint8_t*>(to.columns));
}

size_t masked_ops_cuda_decode_workspace(int dtype, int64_t M, int64_t N, int64_t K) {
  using namespace masked_ops::cuda;
  return takes_mma(dtype, M) ? decode_mma_workspace(M, N, K) : 0;
}

int masked_ops_cuda_decode(int dtype, int64_t M, int64_t N, int64_t K, int64_t nnz, const void* input,
                           const void* values, const void* index, const void* bias, void* output, void* workspace,
                           void* stream) {
  using namespace masked_ops::cuda;
  if (dtype != kFloat && dtype != kBFloat16 && dtype != kHalf) return kUnsupported;
  if (M > 64 || nnz > kMaxNnz || !aligned(input) || !aligned(values) || !aligned(index)) return kUnsupported;
  if (M == 0 || N == 0) return 0;
  const Decode decode{M, N, K, nnz, input, values, DecodeIndex::of(index, N, K), bias, output, workspace, stream};
  if (takes_mma(dtype, M)) return decode_mma(dtype, decode);
  if (dtype == kFloat) return gather_some<kFloat>(decode);
  return dtype == kHalf ? gather_some<kHalf>(decode) : gather_some<kBFloat16>(decode);
}
