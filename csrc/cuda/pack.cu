// Once per mask: values to bits, what is to be known of them, and where the rows begin. Sums are of integers, so that
// their order, which atomics leave open, does not show.
#include "bits.h"
#include "device.h"
#include "tuning.h"

namespace masked_ops::cuda {
namespace {

constexpr int kWarps = tuning::kPassThreads / kWarp;

// A 16-bit float, told apart from zero and one by its bits; kOne is 1.0.
template <uint16_t kOne>
struct Half {
  uint16_t bits;
};
template <typename T>
MASKED_OPS_DEVICE bool is_zero(T x) {
  return x == T(0);
}
template <typename T>
MASKED_OPS_DEVICE bool is_one(T x) {
  return x == T(1);
}
template <uint16_t kOne>
MASKED_OPS_DEVICE bool is_zero(Half<kOne> x) {
  return (x.bits & 0x7fff) == 0;
}
template <uint16_t kOne>
MASKED_OPS_DEVICE bool is_one(Half<kOne> x) {
  return x.bits == kOne;
}

MASKED_OPS_DEVICE void add(int64_t* to, int64_t n) {
  if (n) atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(n));
}

// Most words find the bits of the rows before them already there.
MASKED_OPS_DEVICE void mark_live(uint64_t* live_col, uint64_t word) {
  if (word & ~*static_cast<volatile uint64_t*>(live_col)) {
    atomicOr(reinterpret_cast<unsigned long long*>(live_col), static_cast<unsigned long long>(word));
  }
}

// A warp takes kPackUnroll words; lane l reads the values 32 h + l, next to those of its neighbours.
template <typename T>
__global__ void __launch_bounds__(tuning::kPassThreads)
    pack_kernel(const T* __restrict__ mask, int64_t total, int64_t cols, Divider stride, uint64_t* __restrict__ words,
                uint64_t* live_cols, MaskFacts* facts) {
  constexpr int U = tuning::kPackUnroll;
  const int lane = threadIdx.x % kWarp;
  const int64_t first = (int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp) * U;
  T values[U][2];
  bool there[U][2];
#pragma unroll
  for (int u = 0; u < U; ++u) {
    uint64_t in_row;
    const int64_t row = stride(first + u, in_row);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t col = int64_t(in_row) * 64 + h * 32 + lane;
      there[u][h] = first + u < total && col < cols;
      if (there[u][h]) values[u][h] = mask[row * cols + col];
    }
  }
  int64_t nnz = 0;
  bool soft = false;
#pragma unroll
  for (int u = 0; u < U; ++u) {
    uint32_t half[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const bool set = there[u][h] && !is_zero(values[u][h]);
      half[h] = __ballot_sync(kAllLanes, set);
      if (set && !is_one(values[u][h])) soft = true;
    }
    const uint64_t word = uint64_t(half[1]) << 32 | half[0];
    if (lane == 0 && first + u < total) {
      uint64_t in_row;
      stride(first + u, in_row);
      words[first + u] = word;
      mark_live(live_cols + in_row, word);
      nnz += __popcll(word);
    }
  }
  const bool any_soft = __ballot_sync(kAllLanes, soft) != 0;
  if (lane == 0) {
    add(&facts->nnz, nnz);
    if (any_soft) facts->soft = 1;
  }
}

// A thread takes a word.
__global__ void __launch_bounds__(tuning::kPassThreads)
    pack_bits_kernel(const uint8_t* __restrict__ bits, int64_t total, int64_t cols, Divider stride,
                     uint64_t* __restrict__ words, uint64_t* live_cols, MaskFacts* facts) {
  const int64_t i = int64_t(blockIdx.x) * tuning::kPassThreads + threadIdx.x;
  uint64_t word = 0;
  if (i < total) {
    uint64_t in_row;
    const int64_t row = stride(i, in_row), bytes = ceil_div<int64_t>(cols, 8), first = int64_t(in_row) * 8;
    for (int b = 0; b < 8 && first + b < bytes; ++b) word |= uint64_t(bits[row * bytes + first + b]) << (8 * b);
    const int64_t left = cols - int64_t(in_row) * 64;
    const uint64_t valid = left < 64 ? (uint64_t{1} << left) - 1 : ~uint64_t{0};
    if (word & ~valid) facts->stray = 1;
    word &= valid;
    words[i] = word;
    mark_live(live_cols + in_row, word);
  }
  const int64_t nnz = warp_sum<int64_t>(__popcll(word));
  if (threadIdx.x % kWarp == 0) add(&facts->nnz, nnz);
}

// A warp takes a row; the first block also takes live_cols.
__global__ void __launch_bounds__(tuning::kPassThreads)
    live_kernel(const uint64_t* __restrict__ words, int64_t rows, int64_t stride,
                const uint64_t* __restrict__ live_cols, MaskFacts* facts) {
  const int lane = threadIdx.x % kWarp;
  const int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  bool live = false;
  if (row < rows) {
    for (int64_t w = lane; w < stride && !live; w += kWarp) live = words[row * stride + w] != 0;
  }
  const bool any = __ballot_sync(kAllLanes, live) != 0;
  if (lane == 0) add(&facts->live_rows, any);
  if (blockIdx.x == 0) {
    int64_t cols = 0;
    for (int64_t w = threadIdx.x; w < stride; w += tuning::kPassThreads) cols += __popcll(live_cols[w]);
    cols = warp_sum(cols);
    if (lane == 0) add(&facts->live_cols, cols);
  }
}

// A warp counts a row.
__global__ void __launch_bounds__(tuning::kPassThreads)
    row_counts_kernel(const uint64_t* __restrict__ words, int64_t rows, int64_t stride, int64_t* __restrict__ offsets) {
  const int lane = threadIdx.x % kWarp;
  const int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  int64_t count = 0;
  if (row < rows) {
    for (int64_t w = lane; w < stride; w += kWarp) count += __popcll(words[row * stride + w]);
  }
  count = warp_sum(count);
  if (lane == 0 && row < rows) offsets[row + 1] = count;
}

constexpr int kScanThreads = 1024;

// One block: counts to running sums, in place.
__global__ void __launch_bounds__(kScanThreads) scan_kernel(int64_t rows, int64_t* offsets) {
  __shared__ int64_t of_warp[kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int64_t before = 0;
  if (threadIdx.x == 0) offsets[0] = 0;
  for (int64_t base = 0; base < rows; base += kScanThreads) {
    const int64_t row = base + threadIdx.x;
    int64_t sum = row < rows ? offsets[row + 1] : 0;
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const int64_t other = __shfl_up_sync(kAllLanes, sum, step);
      if (lane >= step) sum += other;
    }
    if (lane == kWarp - 1) of_warp[warp] = sum;
    __syncthreads();
    int64_t total = 0;
    for (int w = 0; w < kWarp; ++w) {
      if (w == warp) sum += before + total;
      total += of_warp[w];
    }
    if (row < rows) offsets[row + 1] = sum;
    before += total;
    __syncthreads();
  }
}

// Calls pack(blocks) between the clearing of the facts and the count of what lives.
template <typename Pack>
int pack_all(const uint64_t* words, int64_t rows, int64_t cols, uint64_t* live_cols, MaskFacts* facts, void* stream,
             const Pack& pack) {
  if (const int error = zero(facts, sizeof(MaskFacts), stream)) return error;
  if (rows == 0 || cols == 0) return 0;
  const int64_t stride = words_per_row(cols), blocks = ceil_div<int64_t>(rows, kWarps);
  if (rows * stride > INT32_MAX) return kUnsupported;
  if (const int error = zero(live_cols, stride * sizeof(uint64_t), stream)) return error;
  if (const int error = pack(rows * stride, Divider::by(stride))) return error;
  return launch(live_kernel, uint32_t(blocks), tuning::kPassThreads, 0, stream, words, rows, stride, live_cols, facts);
}

template <typename T>
int pack(const void* mask, int64_t rows, int64_t cols, uint64_t* words, uint64_t* live_cols, MaskFacts* facts,
         void* stream) {
  return pack_all(words, rows, cols, live_cols, facts, stream, [&](int64_t total, Divider stride) {
    const int64_t blocks = ceil_div<int64_t>(total, kWarps * tuning::kPackUnroll);
    return launch(pack_kernel<T>, uint32_t(blocks), tuning::kPassThreads, 0, stream, static_cast<const T*>(mask), total,
                  cols, stride, words, live_cols, facts);
  });
}

}  // namespace
}  // namespace masked_ops::cuda

int masked_ops_cuda_pack_mask(int dtype, const void* mask, int64_t rows, int64_t cols, uint64_t* words,
                              uint64_t* live_cols, masked_ops::cuda::MaskFacts* facts, void* stream) {
  using namespace masked_ops::cuda;
  switch (dtype) {
    case kByte:
      return pack<uint8_t>(mask, rows, cols, words, live_cols, facts, stream);
    case kInt8:
      return pack<int8_t>(mask, rows, cols, words, live_cols, facts, stream);
    case kInt16:
      return pack<int16_t>(mask, rows, cols, words, live_cols, facts, stream);
    case kInt32:
      return pack<int32_t>(mask, rows, cols, words, live_cols, facts, stream);
    case kInt64:
      return pack<int64_t>(mask, rows, cols, words, live_cols, facts, stream);
    case kHalf:
      return pack<Half<0x3c00>>(mask, rows, cols, words, live_cols, facts, stream);
    case kBFloat16:
      return pack<Half<0x3f80>>(mask, rows, cols, words, live_cols, facts, stream);
    case kFloat:
      return pack<float>(mask, rows, cols, words, live_cols, facts, stream);
    case kDouble:
      return pack<double>(mask, rows, cols, words, live_cols, facts, stream);
    default:
      return kUnsupported;
  }
}

int masked_ops_cuda_pack_bits(const uint8_t* bits, int64_t rows, int64_t cols, uint64_t* words, uint64_t* live_cols,
                              masked_ops::cuda::MaskFacts* facts, void* stream) {
  using namespace masked_ops::cuda;
  return pack_all(words, rows, cols, live_cols, facts, stream, [&](int64_t total, Divider stride) {
    return launch(pack_bits_kernel, uint32_t(ceil_div<int64_t>(total, tuning::kPassThreads)), tuning::kPassThreads, 0,
                  stream, bits, total, cols, stride, words, live_cols, facts);
  });
}

int masked_ops_cuda_row_offsets(const uint64_t* words, int64_t rows, int64_t cols, int64_t* offsets, void* stream) {
  using namespace masked_ops::cuda;
  const int64_t blocks = ceil_div<int64_t>(rows, kWarps);
  if (blocks > INT32_MAX) return kUnsupported;
  if (rows > 0) {
    const int error = launch(row_counts_kernel, uint32_t(blocks), tuning::kPassThreads, 0, stream, words, rows,
                             words_per_row(cols), offsets);
    if (error) return error;
  }
  return launch(scan_kernel, 1, kScanThreads, 0, stream, rows, offsets);
}
