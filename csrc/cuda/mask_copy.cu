// Masked weight in one pass: 16 bytes a load, the mask's bits a byte at a time, the cast on the way. A launch takes
// many weights. A block takes kCopyUnroll * kCopyThreads chunks of one weight, which lies contiguous whatever its rows
// are; rows matter for the bits alone, and not even for these if cols is a multiple of 64.
#include "bits.h"
#include "device.h"
#include "numeric.h"
#include "tuning.h"

namespace masked_ops::cuda {
namespace {

struct Task {
  const void* weight;
  const uint64_t* words;
  void* out;
  int64_t elements;
  Divider cols;         // magic 0: rows end at a word's end
  uint32_t last_block;  // one past
};

// A launch's parameters. One weight alone has a kernel of its own: 64 bytes come to a small launch sooner than 4 KB.
template <int kTasks>
struct Batch {
  Task tasks[kTasks];
  int count;
};
using FullBatch = Batch<tuning::kCopyTasks>;
static_assert(sizeof(FullBatch) <= 4096, "what every driver takes as kernel parameters");

constexpr int64_t kBlockChunks = tuning::kCopyThreads * tuning::kCopyUnroll;

constexpr bool widens(CopyKind kind) { return kind == kBFloat16ToFloat || kind == kHalfToFloat; }
constexpr int bytes_in(CopyKind kind) { return kind <= kCopy16 ? 1 << kind : widens(kind) ? 2 : 4; }
constexpr int bytes_out(CopyKind kind) { return kind <= kCopy16 ? 1 << kind : widens(kind) ? 4 : 2; }

template <int kBytes>
struct Chunk {
  uint32_t words[(kBytes + 3) / 4];
};

// Plain loads: with the hint that the weight is read once (ld.global.cs) the pass took 0.90 of a plain copy's rate on
// an H200, without it 0.94 to 0.97.
template <int kBytes>
MASKED_OPS_DEVICE Chunk<kBytes> load(const void* from) {
  Chunk<kBytes> chunk;
  if constexpr (kBytes == 16) {
    const uint4 v = *static_cast<const uint4*>(from);
    chunk.words[0] = v.x, chunk.words[1] = v.y, chunk.words[2] = v.z, chunk.words[3] = v.w;
  } else if constexpr (kBytes == 8) {
    const uint2 v = *static_cast<const uint2*>(from);
    chunk.words[0] = v.x, chunk.words[1] = v.y;
  } else if constexpr (kBytes == 4) {
    chunk.words[0] = *static_cast<const uint32_t*>(from);
  } else if constexpr (kBytes == 2) {
    chunk.words[0] = *static_cast<const uint16_t*>(from);
  } else {
    chunk.words[0] = *static_cast<const uint8_t*>(from);
  }
  return chunk;
}

// Not streaming: the product that comes next reads it.
template <int kBytes>
MASKED_OPS_DEVICE void store(void* to, const Chunk<kBytes>& chunk) {
  if constexpr (kBytes == 16) {
    *static_cast<uint4*>(to) = make_uint4(chunk.words[0], chunk.words[1], chunk.words[2], chunk.words[3]);
  } else if constexpr (kBytes == 8) {
    *static_cast<uint2*>(to) = make_uint2(chunk.words[0], chunk.words[1]);
  } else if constexpr (kBytes == 4) {
    *static_cast<uint32_t*>(to) = chunk.words[0];
  } else if constexpr (kBytes == 2) {
    *static_cast<uint16_t*>(to) = uint16_t(chunk.words[0]);
  } else {
    *static_cast<uint8_t*>(to) = uint8_t(chunk.words[0]);
  }
}

// kElements neighbours of one kind, in and out.
template <CopyKind kind, int kElements>
struct Elements {
  static constexpr int kIn = bytes_in(kind);
  static constexpr int kOut = bytes_out(kind);

  MASKED_OPS_DEVICE static Chunk<kElements * kOut> masked(const Chunk<kElements * kIn>& in, uint32_t bits) {
    Chunk<kElements * kOut> out;
    if constexpr (kind <= kCopy16) {
      constexpr int kWords = (kElements * kIn + 3) / 4;
#pragma unroll
      for (int i = 0; i < kWords; ++i) out.words[i] = in.words[i] & spread_bits<kIn>(bits >> (i * 4 / kIn));
    } else if constexpr (kIn < kOut) {
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        const uint16_t half = uint16_t(in.words[i / 2] >> (i % 2 * 16));
        out.words[i] = __float_as_uint(to_float<kind == kBFloat16ToFloat>(half)) & spread_bits<4>(bits >> i);
      }
    } else {
      constexpr bool kBFloat = kind == kFloatToBFloat16;
#pragma unroll
      for (int i = 0; i < kElements; i += 2) {
        const uint32_t high = i + 1 < kElements ? in.words[i + 1] : 0;
        out.words[i / 2] = round_pair<kBFloat>(in.words[i], high) & spread_bits<2>(bits >> i);
      }
    }
    return out;
  }
};

// Rows end at a word's end, and bits are numbered as elements are.
template <int kElements>
MASKED_OPS_DEVICE uint32_t flat_bits(const Task& task, int64_t element) {
  const uint8_t* bytes = reinterpret_cast<const uint8_t*>(task.words) + element / 8;
  if constexpr (kElements == 16) return *reinterpret_cast<const uint16_t*>(bytes);
  return uint32_t(*bytes) >> (element % 8);
}

template <int kElements>
MASKED_OPS_DEVICE uint32_t row_bits(const Task& task, int64_t element) {
  uint64_t col;
  const int64_t row = task.cols(element, col), cols = task.cols.divisor, stride = words_per_row(cols);
  const uint64_t* words = task.words + row * stride;
  uint32_t bits = bits_of_row(words, stride, col, kElements);
  // A row ends with zeros; the next ones fill them.
#pragma unroll 1
  for (int64_t have = cols - int64_t(col); have < kElements; have += cols) {
    words += stride;
    bits |= uint32_t(*words) << have;
  }
  return bits;
}

template <int kTasks>
MASKED_OPS_DEVICE int task_of(const Batch<kTasks>& batch, uint32_t block) {
  if (kTasks == 1) return 0;
  int low = 0, high = batch.count - 1;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (block < batch.tasks[middle].last_block) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

template <CopyKind kind, int kElements, int kTasks>
__global__ void __launch_bounds__(tuning::kCopyThreads) mask_copy_kernel(const __grid_constant__ Batch<kTasks> batch) {
  using E = Elements<kind, kElements>;
  const int index = task_of(batch, blockIdx.x);
  const Task& task = batch.tasks[index];
  const uint32_t first_block = index ? batch.tasks[index - 1].last_block : 0;
  const int64_t first = (blockIdx.x - first_block) * kBlockChunks + threadIdx.x;
  const int64_t chunks = task.elements / kElements;
  const uint8_t* weight = static_cast<const uint8_t*>(task.weight);
  uint8_t* out = static_cast<uint8_t*>(task.out);
  Chunk<kElements * E::kIn> in[tuning::kCopyUnroll];
  uint32_t bits[tuning::kCopyUnroll];
#pragma unroll
  for (int u = 0; u < tuning::kCopyUnroll; ++u) {
    const int64_t chunk = first + u * tuning::kCopyThreads;
    if (chunk < chunks) in[u] = load<kElements * E::kIn>(weight + chunk * kElements * E::kIn);
  }
  if (task.cols.magic == 0) {
#pragma unroll
    for (int u = 0; u < tuning::kCopyUnroll; ++u) {
      const int64_t chunk = first + u * tuning::kCopyThreads;
      if (chunk < chunks) bits[u] = flat_bits<kElements>(task, chunk * kElements);
    }
  } else {
#pragma unroll
    for (int u = 0; u < tuning::kCopyUnroll; ++u) {
      const int64_t chunk = first + u * tuning::kCopyThreads;
      if (chunk < chunks) bits[u] = row_bits<kElements>(task, chunk * kElements);
    }
  }
#pragma unroll
  for (int u = 0; u < tuning::kCopyUnroll; ++u) {
    const int64_t chunk = first + u * tuning::kCopyThreads;
    if (chunk < chunks) store<kElements * E::kOut>(out + chunk * kElements * E::kOut, E::masked(in[u], bits[u]));
  }
  // What does not fill a chunk, in the last block, which has at most one chunk less than it could.
  const int64_t rest = chunks * kElements + threadIdx.x;
  if (kElements > 1 && blockIdx.x + 1 == task.last_block && rest < task.elements) {
    using One = Elements<kind, 1>;
    const uint32_t bit = task.cols.magic == 0 ? flat_bits<1>(task, rest) : row_bits<1>(task, rest);
    store<One::kOut>(out + rest * One::kOut, One::masked(load<One::kIn>(weight + rest * One::kIn), bit));
  }
}

template <CopyKind kind, int kElements>
int copy_batch(const FullBatch& batch, uint32_t blocks, void* stream) {
  if (batch.count == 1) {
    const Batch<1> one = {{batch.tasks[0]}, 1};
    return launch(mask_copy_kernel<kind, kElements, 1>, blocks, tuning::kCopyThreads, 0, stream, one);
  }
  return launch(mask_copy_kernel<kind, kElements, tuning::kCopyTasks>, blocks, tuning::kCopyThreads, 0, stream, batch);
}

template <CopyKind kind>
int copy_batch(FullBatch& batch, bool vector, void* stream) {
  constexpr int kVector = 16 / (bytes_in(kind) > bytes_out(kind) ? bytes_in(kind) : bytes_out(kind));
  uint32_t blocks = 0;
  for (int i = 0; i < batch.count; ++i) {
    const int64_t chunks = ceil_div<int64_t>(batch.tasks[i].elements, vector ? kVector : 1);
    const int64_t wanted = blocks + ceil_div(chunks, kBlockChunks);
    if (wanted > INT32_MAX) return kUnsupported;
    batch.tasks[i].last_block = blocks = uint32_t(wanted);
  }
  return vector ? copy_batch<kind, kVector>(batch, blocks, stream) : copy_batch<kind, 1>(batch, blocks, stream);
}

template <CopyKind kind>
int copy_all(const MaskCopyTask* tasks, int64_t count, void* stream) {
  FullBatch batch;
  bool vector = true;
  batch.count = 0;
  for (int64_t i = 0; i < count; ++i) {
    const MaskCopyTask& from = tasks[i];
    const int64_t elements = from.rows * from.cols;
    if (elements > 0) {
      const bool fits = is_aligned(from.weight, 16) && is_aligned(from.out, 16);
      // A weight that lies askew goes into a launch of its own kind.
      if (batch.count && (batch.count == tuning::kCopyTasks || fits != vector)) {
        if (const int error = copy_batch<kind>(batch, vector, stream)) return error;
        batch.count = 0;
      }
      vector = fits;
      Task& task = batch.tasks[batch.count++];
      task = {from.weight, from.words, from.out, elements, Divider::by(from.cols), 0};
      if (from.cols % 64 == 0) task.cols.magic = 0;
    }
  }
  return batch.count ? copy_batch<kind>(batch, vector, stream) : 0;
}

}  // namespace
}  // namespace masked_ops::cuda

int masked_ops_cuda_mask_copy(int kind, const masked_ops::cuda::MaskCopyTask* tasks, int64_t count, void* stream) {
  using namespace masked_ops::cuda;
  switch (kind) {
    case kCopy1:
      return copy_all<kCopy1>(tasks, count, stream);
    case kCopy2:
      return copy_all<kCopy2>(tasks, count, stream);
    case kCopy4:
      return copy_all<kCopy4>(tasks, count, stream);
    case kCopy8:
      return copy_all<kCopy8>(tasks, count, stream);
    case kCopy16:
      return copy_all<kCopy16>(tasks, count, stream);
    case kFloatToBFloat16:
      return copy_all<kFloatToBFloat16>(tasks, count, stream);
    case kFloatToHalf:
      return copy_all<kFloatToHalf>(tasks, count, stream);
    case kBFloat16ToFloat:
      return copy_all<kBFloat16ToFloat>(tasks, count, stream);
    case kHalfToFloat:
      return copy_all<kHalfToFloat>(tasks, count, stream);
    default:
      return kUnsupported;
  }
}
