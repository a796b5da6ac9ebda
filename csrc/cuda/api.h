// What the torch side may call: pointers into device memory, sizes, a stream. Needs neither CUDA's headers nor torch's.
//
// Every function that takes a stream (a cudaStream_t; null is the default stream) puts its work there and returns at
// once; the caller has made the pointers' device current. It returns 0, kUnsupported before anything is launched, or
// the cudaError_t of a failed launch. Sizes must not be negative; where a size is zero there is nothing to do and no
// pointer is read. No function allocates, synchronises or keeps state, so that all of them may be captured in a graph.
//
// Left out: cuBLASLt's DRELU epilogue, which would mask grad_weight inside its GEMM, took 196 us where the plain GEMM
// takes 91 (an H200, 4096x4096, 2,048 rows).
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#define MASKED_OPS_BOTH __host__ __device__ __forceinline__
#else
#define MASKED_OPS_BOTH inline
#endif

namespace masked_ops::cuda {

// The kernel does not serve this shape, alignment, dtype or device: take another path.
inline constexpr int kUnsupported = -1;

// In the order of cpu::Dtype.
enum Dtype : int { kByte, kInt8, kInt16, kInt32, kInt64, kHalf, kBFloat16, kFloat, kDouble };

struct DeviceFacts {
  int major, minor;  // compute capability
  int multiprocessors;
  int64_t l2_bytes;
  int64_t shared_bytes;  // what a block may have
};

// In device memory.
struct MaskFacts {
  int64_t nnz;
  int64_t soft;       // not 0 if a value is neither 0 nor 1
  int64_t live_rows;  // that hold a remaining weight
  int64_t live_cols;
  int64_t stray;  // pack_bits: not 0 if a bit beyond the last column is set
};

// Bits are those of cpu::Bits: one bit per weight of a row-major matrix [rows][cols], each row padded with zero bits to
// words_per_row(cols) words.
MASKED_OPS_BOTH constexpr int64_t words_per_row(int64_t cols) { return cols / 64 + (cols % 64 != 0); }

// What mask_copy does to an element: copies its bytes, rounds a float, or widens to one.
enum CopyKind : int {
  kCopy1,
  kCopy2,
  kCopy4,
  kCopy8,
  kCopy16,
  kFloatToBFloat16,
  kFloatToHalf,
  kBFloat16ToFloat,
  kHalfToFloat
};

struct MaskCopyTask {
  const void* weight;  // [rows][cols], contiguous
  const uint64_t* words;
  void* out;  // [rows][cols], contiguous; may be weight if nothing is cast, and may not overlap it otherwise
  int64_t rows, cols;
};

// The fused GEMMs; all matrices are row-major and contiguous.
enum GemmMode : int {
  kForward,     // output[M][N] = input[M][K] * masked(weight[N][K])^T + bias[N]
  kGradInput,   // output[M][K] = grad_output[M][N] * masked(weight[N][K])
  kGradWeight,  // output[N][K] = masked(grad_output[M][N]^T * input[M][K])
};

// A weight in slices: decode_sliced's, see cuda/sliced.h. A slice is kSliceRows rows, in the order of a list that names
// each row once and ends with -1 for those that there are not; a piece is what a slice has in kSliceColumns columns.
inline constexpr int64_t kSliceRows = 8, kSliceColumns = 8192;
struct SlicedPiece {
  uint32_t at, size;       // its first step among all data, and its length, in units of kSliceUnit bytes
  uint32_t strict, loose;  // steps
};
inline constexpr int64_t kSliceUnit = 256;
inline constexpr int64_t kSlicedSharedBytes = 132 << 10;  // that a block of decode_sliced may take
inline constexpr int64_t kMostSlicedRows = 4;             // of input

// A weight whose columns are gathered: decode_gathered's, see cuda/gathered.h. A strip is kStripRows rows, in an order
// as of slices; a piece is what a strip has in kGatherColumns columns.
inline constexpr int64_t kStripRows = 16, kGatherColumns = 4096;
struct GatheredPiece {
  uint32_t at, size;      // its first batch among all data, and its length, in units of kGatherUnit bytes
  uint32_t batches;       // of eight steps
  uint16_t steps, start;  // of a group; groups with which packing begins
};
inline constexpr int64_t kGatherUnit = 256;
inline constexpr int64_t kGatheredSharedBytes = 164 << 10;  // that a block of decode_gathered may take

// Only what its mode reads needs to be there.
struct Gemm {
  int mode;
  int dtype;         // kHalf or kBFloat16: of all matrices and the bias
  int output_dtype;  // the same; kGradWeight may also write kFloat
  int64_t M, N, K;
  const void* input;
  const void* grad_output;
  const void* weight;
  const void* bias;           // kForward; may be null
  const uint32_t* fragments;  // of the mask, from pack_fragments with transposed = (mode == kGradInput)
  const uint64_t* words;      // of the mask, for kGradWeight
  void* output;
  // gemm_sm90's plan (gemm_tiles.h), to measure others than the one that it takes for 0.
  int tile_rows, splits;
  int trade;  // two splits each add up half of the sums out of their registers
};

}  // namespace masked_ops::cuda

extern "C" {

// --- device.cu ---

int masked_ops_cuda_device_facts(int device, masked_ops::cuda::DeviceFacts* facts);
// cudaGetErrorString; of kUnsupported too.
const char* masked_ops_cuda_error_string(int error);

// --- pack.cu: once per mask ---

// mask[rows][cols] (contiguous) to words; a bit is set where the value is not zero. Also writes *facts, and to
// live_cols[words_per_row(cols)] the bits of the columns that hold a remaining weight.
int masked_ops_cuda_pack_mask(int dtype, const void* mask, int64_t rows, int64_t cols, uint64_t* words,
                              uint64_t* live_cols, masked_ops::cuda::MaskFacts* facts, void* stream);
// The same from bits[rows][ceil(cols / 8)], little bit order.
int masked_ops_cuda_pack_bits(const uint8_t* bits, int64_t rows, int64_t cols, uint64_t* words, uint64_t* live_cols,
                              masked_ops::cuda::MaskFacts* facts, void* stream);
// offsets[rows + 1]: where each row begins among the remaining weights in row-major order.
int masked_ops_cuda_row_offsets(const uint64_t* words, int64_t rows, int64_t cols, int64_t* offsets, void* stream);

// --- mask_copy.cu ---

// out = bit ? weight : 0 for every task, all of one CopyKind; 64 tasks go into one launch. tasks is in host memory and
// may go once the function has returned. Every size and alignment is served; 16-byte aligned pointers go fastest.
int masked_ops_cuda_mask_copy(int kind, const masked_ops::cuda::MaskCopyTask* tasks, int64_t count, void* stream);

// --- compress.cu: elements of 1, 2, 4, 8 or 16 bytes ---

// values[nnz] = the remaining weights of dense[rows][cols] in row-major order; and back, with zeros elsewhere.
int masked_ops_cuda_compress(int element_size, const uint64_t* words, int64_t rows, int64_t cols,
                             const int64_t* offsets, const void* dense, void* values, void* stream);
int masked_ops_cuda_expand(int element_size, const uint64_t* words, int64_t rows, int64_t cols, const int64_t* offsets,
                           const void* values, void* dense, void* stream);

// --- decode.cu: few rows of input, weight[N][K] as its remaining values in row-major order ---

// The index of a mask: for every value its column, 16 bits, and where each row's segments of 256 columns begin. 0 if it
// cannot be addressed (nearly 2^32 remaining weights).
size_t masked_ops_cuda_decode_index_bytes(int64_t N, int64_t K, int64_t nnz);
int masked_ops_cuda_decode_index(const uint64_t* words, int64_t N, int64_t K, int64_t nnz, const int64_t* offsets,
                                 void* index, void* stream);
// Bytes of device memory that decode needs for a call; often 0.
size_t masked_ops_cuda_decode_workspace(int dtype, int64_t M, int64_t N, int64_t K);
// output[M][N] = input[M][K] * weight^T + bias[N] (may be null), for kFloat, kBFloat16 and kHalf, all accumulated in
// float. Unsupported: M > 64, and pointers that are not aligned to 16 bytes (bias and output may be).
int masked_ops_cuda_decode(int dtype, int64_t M, int64_t N, int64_t K, int64_t nnz, const void* input,
                           const void* values, const void* index, const void* bias, void* output, void* workspace,
                           void* stream);

// --- sliced.cu, decode_sliced.cu: the same out of values that were laid out for it, kHalf and kBFloat16 ---

// pieces[ceil(N / kSliceRows)][ceil(K / kSliceColumns)]: all but at, which the caller adds up from size. order has
// ceil(N / kSliceRows) * kSliceRows entries; neighbours should have about as many weights.
int masked_ops_cuda_slice(const uint64_t* words, int64_t N, int64_t K, const int32_t* order,
                          masked_ops::cuda::SlicedPiece* pieces, void* stream);
// data: of all pieces, aligned to 16 bytes; values in row-major order, 16 bits each.
int masked_ops_cuda_fill_slices(const uint64_t* words, int64_t N, int64_t K, const int64_t* offsets,
                                const int32_t* order, const masked_ops::cuda::SlicedPiece* pieces, const void* values,
                                void* data, void* stream);
// As decode; also unsupported: M > kMostSlicedRows and an odd K. A column that holds an infinity or NaN may make any
// output of its row of input NaN, as a dense layer does.
int masked_ops_cuda_decode_sliced(int dtype, int64_t M, int64_t N, int64_t K, const void* input, const int32_t* order,
                                  const masked_ops::cuda::SlicedPiece* pieces, const void* data, const void* bias,
                                  void* output, void* stream);

// --- gathered.cu, decode_gathered.cu: the same for more rows of input ---

// pieces[ceil(N / kStripRows)][ceil(K / kGatherColumns)]: all but at, which the caller adds up from size. order has
// ceil(N / kStripRows) * kStripRows entries; neighbours should have about as many weights.
int masked_ops_cuda_gather(const uint64_t* words, int64_t N, int64_t K, const int32_t* order,
                           masked_ops::cuda::GatheredPiece* pieces, void* stream);
// data: of all pieces, aligned to 16 bytes; values in row-major order, 16 bits each.
int masked_ops_cuda_fill_gathered(const uint64_t* words, int64_t N, int64_t K, const int64_t* offsets,
                                  const int32_t* order, const masked_ops::cuda::GatheredPiece* pieces,
                                  const void* values, void* data, void* stream);
// As decode, on Hopper and newer, and with decode_sliced's remark; also unsupported: a K that is no multiple of 8.
int masked_ops_cuda_decode_gathered(int dtype, int64_t M, int64_t N, int64_t K, const void* input, const int32_t* order,
                                    const masked_ops::cuda::GatheredPiece* pieces, const void* data, const void* bias,
                                    void* output, void* stream);

// --- fragments.cu, gemm_sm80.cu, gemm_sm90.cu ---

// The mask in the order in which the tensor cores' operands lie in registers: of weight, or, transposed, of weight^T.
size_t masked_ops_cuda_fragments_bytes(int64_t N, int64_t K, int transposed);
int masked_ops_cuda_pack_fragments(const uint64_t* words, int64_t N, int64_t K, int transposed, uint32_t* fragments,
                                   void* stream);
// Unsupported: another device, another dtype, a pointer but bias not aligned to 16 bytes, K (and but for kForward also
// N) not a multiple of 8, a side of nearly 2^31; kGradWeight in gemm_sm80.
int masked_ops_cuda_gemm_sm80(const masked_ops::cuda::Gemm* gemm, void* stream);  // compute capability 8.0 or more
int masked_ops_cuda_gemm_sm90(const masked_ops::cuda::Gemm* gemm, void* stream);  // 9.0

}  // extern "C"
