// What the torch side may call: raw pointers and sizes in, nothing thrown but OutOfMemory.
//
// Every kernel is compiled once per capability into a namespace of that name; a Kernels table collects its entry
// points, and kernels() is the table in use. No file below cpu/ knows of tensors, OpenMP or torch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>

#include "inline.h"

namespace masked_ops::cpu {

// Runs body(context, i) for every i in [0, tasks), on the threads that torch owns; returns when all are done. Tasks may
// run one after the other on one thread, so they never wait for each other.
struct Team {
  int threads;  // how many tasks can run at once
  void (*run)(int64_t tasks, void* context, void (*body)(void* context, int64_t task));

  template <typename Body>
  MASKED_OPS_INLINE void for_each(int64_t tasks, const Body& body) const {
    run(tasks, const_cast<void*>(static_cast<const void*>(&body)),
        [](void* context, int64_t task) { (*static_cast<const Body*>(context))(task); });
  }
};

// To Python a RuntimeError, as where torch has no memory.
class OutOfMemory : public std::exception {
 public:
  OutOfMemory(size_t bytes, const char* purpose);
  const char* what() const noexcept override;

 private:
  char message_[160];
};

// Memory that is reused from call to call: one block per thread and slot, aligned to a page, growing only.
enum class Slot {
  kPanelA,
  kPanelB,
  kAccumulator,
  kValues,
  kPlaces,
  kMorePlaces,
  kPieces,
  kTable,
  kExpanded,
  kPart,
  kCount
};
void* scratch(Slot slot, size_t bytes);  // contents undefined; throws OutOfMemory
void release_scratch();                  // of the calling thread

// One bit per weight, row-major; rows are padded with zero bits to whole 64-bit words, so that a kernel may use the
// bits of any aligned group of lanes as a predicate without looking at the tail.
struct Bits {
  const uint64_t* words;
  int64_t stride;  // words per row
  MASKED_OPS_INLINE const uint64_t* row(int64_t i) const { return words + i * stride; }
};

enum class Dtype : int8_t { kByte, kInt8, kInt16, kInt32, kInt64, kHalf, kBFloat16, kFloat, kDouble };

struct MaskFacts {
  int64_t nnz;
  bool binary;  // every value is 0 or 1
};

// Where the remaining weights of a mask lie, in the order in which spmm and sddmm take them; see sparse_index.h.
struct SparseIndex;
// What an index can address; make_index returns null beyond.
inline constexpr int64_t kMaxIndexSide = int64_t{1} << 28, kMaxIndexNnz = int64_t{1} << 32;

// A convolution of weight [out_channels][in_channels / groups][kernel]; a transposed one is the gradient of this one
// with respect to its input, with input and output, and so the channels, the other way round. Sizes of depth, height
// and width: what has fewer dimensions has leading ones of size 1 (stride and dilation 1, padding 0).
struct Convolution {
  int64_t batch, groups;
  int64_t in_channels, out_channels;  // of all groups
  int64_t input[3], output[3], kernel[3], stride[3], padding[3], dilation[3];
};

// Whether planes of contiguous images lie whole 4 KB apart, in the same few sets of L1, and meet so many weights that
// the sparse kernels are faster with a packed copy: batch 8, copy over planes, forward, at 50, 80 and 90%: 64 -> 256
// channels of 32 x 32 0.47, 0.81, 1.23; 64 -> 64 0.61, 1.12, 1.57; 64 -> 64 of 64 x 64 0.73, 1.03, 1.41.
MASKED_OPS_INLINE bool planes_collide(const Convolution& c, double nnz) {
  const int64_t most_channels = c.in_channels > c.out_channels ? c.in_channels : c.out_channels;
  return c.input[0] * c.input[1] * c.input[2] % 1024 == 0 && nnz >= 14 * double(most_channels);
}

// [batch][channels][depth][height][width], or [batch][depth][height][width][channels] if channels_last.
template <typename T>
struct Images {
  T* data;
  bool channels_last;
};

// Strides of the depthwise kernels.
inline constexpr int kMaxDepthwiseStride = 8;

// The remaining weights by rows: those of row i from offsets[i] to offsets[i + 1], and the column of each; columns has
// kColumnsPadding numbers more, so that whole vectors of them can be read.
struct Rows {
  int64_t count;
  const int64_t* offsets;
  const uint16_t* columns;
};
inline constexpr int64_t kMaxColumns = int64_t{1} << 16, kColumnsPadding = 16;

// A weight as the values of its remaining entries, in row-major order; and how many a row has before each multiple of
// kRankColumns columns, [rows][ceil(cols / kRankColumns)].
struct PackedWeight {
  int64_t rows, cols;
  Bits bits;
  const int64_t* offsets;  // of each row's first value; and their number
  const uint32_t* ranks;   // for grad_input alone
  const void* values;
};
inline constexpr int64_t kRankColumns = 192;
// What a thread keeps of a packed weight, or beside it, at most; grad_input of many rows
// needs kRankColumns columns of it.
inline constexpr int64_t kMostPieceBytes = int64_t{8} << 20;

struct Kernels {
  const char* capability;
  int lanes;       // floats of a vector
  bool bf16_dots;  // whether bfloat16 is multiplied as it is, at twice the rate of float, and not converted first

  // mask.cpp. Bits of mask[rows][cols] (contiguous), set where the value is not zero.
  MaskFacts (*pack_mask)(const Team&, Dtype, const void* mask, int64_t rows, int64_t cols, uint64_t* words);
  // out[rows][cols] = bit ? weight : 0, bitwise copies of elements of 1, 2, 4, 8 or 16 bytes; out may be weight.
  void (*mask_copy)(const Team&, size_t element_size, const void* weight, Bits, int64_t rows, int64_t cols, void* out);
  // out[i] = mask[i] == 0 ? 0 : weight[i] * mask[i]; floating dtypes.
  void (*mask_multiply)(const Team&, Dtype, const void* weight, const void* mask, int64_t n, void* out);

  // gemm.cpp, with weight [N][K] under its bits, all row-major and contiguous. Here and in spmm.cpp and sddmm.cpp the
  // elements are float, bfloat16 or half; sums are floats, and rounded once.
  // output[M][N] = input[M][K] * masked(weight)^T + bias[N] (may be null)
  void (*linear)(const Team&, Dtype, int64_t M, int64_t N, int64_t K, const void* input, const void* weight, Bits,
                 const void* bias, void* output);
  // grad_input[M][K] = grad_output[M][N] * masked(weight)
  void (*linear_grad_input)(const Team&, Dtype, int64_t M, int64_t N, int64_t K, const void* grad_output,
                            const void* weight, Bits, void* grad_input);
  // grad_weight[N][K] = masked(grad_output[M][N]^T * input[M][K])
  void (*linear_grad_weight)(const Team&, Dtype, int64_t M, int64_t N, int64_t K, const void* grad_output,
                             const void* input, Bits, void* grad_weight);

  // compress.cpp. The remaining weights of dense[rows][cols] are values[nnz] in row-major order, those of row i from
  // offsets[i] to offsets[i + 1]. Elements of 2, 4 or 8 bytes.
  void (*row_offsets)(const Team&, Bits, int64_t rows, int64_t cols, int64_t* offsets);
  void (*compress)(const Team&, size_t element_size, Bits, int64_t rows, int64_t cols, const int64_t* offsets,
                   const void* dense, void* values);
  // The inverse; the pruned weights become zero.
  void (*expand)(const Team&, size_t element_size, Bits, int64_t rows, int64_t cols, const int64_t* offsets,
                 const void* values, void* dense);
  // The same of a convolution's weight with its channels last: bits and values are in the order (channel, tap), dense
  // in the order (tap, channel). At most 2^31 columns.
  void (*compress_last)(const Team&, size_t element_size, Bits, int64_t rows, int64_t cols, int64_t taps,
                        const int64_t* offsets, const void* dense, void* values);
  void (*expand_last)(const Team&, size_t element_size, Bits, int64_t rows, int64_t cols, int64_t taps,
                      const int64_t* offsets, const void* values, void* dense);

  // sparse_index.cpp. Serves spmm and sddmm with weight[rows][cols], or, transposed, spmm with weight^T. Null if the
  // matrix is beyond what an index can address: 2^28 rows or columns; transposed, 2^32 remaining weights.
  SparseIndex* (*make_index)(const Team&, Bits, int64_t rows, int64_t cols, const int64_t* offsets, bool transposed);

  // spmm.cpp. output[M][N] = input[M][K] * weight^T + bias[N] (may be null), the weight given by its values. With a
  // transposed index, output[M][K] = input[M][N] * weight.
  void (*spmm)(const Team&, const SparseIndex&, Dtype, const void* values, int64_t M, const void* input,
               const void* bias, void* output);
  // The same from a dense weight[N][K], contiguous, under its bits, whose remaining weights become values[nnz] on the
  // way; offsets as for compress. The index is not transposed.
  void (*compress_spmm)(const Team&, const SparseIndex&, Dtype, Bits, const int64_t* offsets, const void* weight,
                        void* values, int64_t M, const void* input, const void* bias, void* output);
  // sddmm.cpp. grad_values[nnz] = the remaining weights' entries of grad_output[M][N]^T * input[M][K].
  void (*sddmm)(const Team&, const SparseIndex&, Dtype, int64_t M, const void* grad_output, const void* input,
                void* grad_values);
  // Of the two indices of a weight[N][K], spmm with the transposed one and sddmm, and grad_bias[N] = the sum of
  // grad_output's rows unless it is null: grad_output is packed once. Float.
  void (*sparse_gradients)(const Team&, const SparseIndex&, const SparseIndex& transposed, const float* values,
                           int64_t M, const float* grad_output, const float* input, float* grad_input,
                           float* grad_values, float* grad_bias);

  // conv.cpp, for a weight [out_channels][in_channels / groups * kernel] of which bits, offsets and values are those of
  // a matrix. The index depends on channels, groups, kernel, stride and dilation; null if the matrix is beyond what it
  // can address. Scratch is bounded and does not grow with the batch.
  SparseIndex* (*make_conv_index)(const Team&, Bits, const Convolution&, const int64_t* offsets, bool transposed);
  // output = convolution of input + bias[out_channels] (may be null), images of the dtype. With a transposed index the
  // gradient with respect to the input: from images like output to images like input, with bias[in_channels].
  void (*conv_spmm)(const Team&, const Convolution&, const SparseIndex&, Dtype, const float* values,
                    Images<const void> input, const float* bias, Images<void> output);
  // grad_values[nnz] = the remaining weights' gradient; the index is not transposed.
  void (*conv_sddmm)(const Team&, const Convolution&, const SparseIndex&, Dtype, Images<const void> grad_output,
                     Images<const void> input, float* grad_values);

  // pointwise_planes.cpp: the three operations of gemm.cpp on images [batch][K or N][positions], contiguous, with
  // weight [N][K] under its bits; float.
  void (*pointwise)(const Team&, int64_t batch, int64_t positions, int64_t N, int64_t K, const float* input,
                    const float* weight, Bits, const float* bias, float* output);
  void (*pointwise_grad_input)(const Team&, int64_t batch, int64_t positions, int64_t N, int64_t K,
                               const float* grad_output, const float* weight, Bits, const float* bias,
                               float* grad_input);
  void (*pointwise_grad_weight)(const Team&, int64_t batch, int64_t positions, int64_t N, int64_t K,
                                const float* grad_output, const float* input, Bits, float* grad_weight);

  // depthwise_planes.cpp and depthwise_last.cpp, for a weight [out_channels][1][kernel] under its bits, of at most two
  // dimensions, where every input channel is a group; channels last, one output channel a group. Input and output lie
  // alike. Scratch is as many rows of an image as a tile of results reads.
  // output = convolution of input + bias[out_channels] (may be null)
  void (*depthwise)(const Team&, const Convolution&, const float* weight, Bits, Images<const float> input,
                    const float* bias, float* output);
  // The gradient with respect to the input + bias[in_channels].
  void (*depthwise_grad_input)(const Team&, const Convolution&, const float* weight, Bits,
                               Images<const float> grad_output, const float* bias, float* grad_input);
  // grad_weight[out_channels][1][kernel], masked
  void (*depthwise_grad_weight)(const Team&, const Convolution&, Bits, Images<const float> grad_output,
                                const float* input, float* grad_weight);

  // channels.cpp. out[outer][out_channels][inner] of in[outer][in_channels][inner]: channel c is channel slots[c], or,
  // where that is negative, fill[c] throughout (zero if fill is null). Elements of 2, 4 or 8 bytes.
  void (*select_channels)(const Team&, size_t element_size, int64_t outer, int64_t in_channels, int64_t out_channels,
                          int64_t inner, const int64_t* slots, const void* in, const void* fill, void* out);

  // spmv.cpp: spmm and sddmm of one row, over the columns of the remaining weights in row-major order, for matrices of
  // at most kMaxColumns columns.
  void (*row_columns)(const Team&, Bits, int64_t rows, int64_t cols, const int64_t* offsets, uint16_t* columns);
  // y[rows] = weight * x + bias (may be null)
  void (*spmv)(const Team&, const Rows&, int64_t cols, Dtype, const void* values, const void* x, const void* bias,
               void* y);
  // dx[cols] = weight^T * dy
  void (*spmv_transposed)(const Team&, const Rows&, int64_t cols, Dtype, const void* values, const void* dy, void* dx);
  // grad_values[nnz] = the remaining weights' entries of dy * x^T
  void (*sampled_outer)(const Team&, const Rows&, int64_t cols, Dtype, const void* dy, const void* x,
                        void* grad_values);

  // packed_gemm.cpp. linear and its gradients of a packed weight with many values, in float, half or bfloat16.
  void (*row_ranks)(const Team&, Bits, int64_t rows, int64_t cols, uint32_t* ranks);
  void (*packed_linear)(const Team&, Dtype, int64_t M, const PackedWeight&, const void* input, const void* bias,
                        void* output);
  void (*packed_linear_grad_input)(const Team&, Dtype, int64_t M, const PackedWeight&, const void* grad_output,
                                   void* grad_input);
  // Whether grad_input of so many rows expands the weight in registers, and so needs no piece of it.
  bool (*expands_grad_input)(Dtype, int64_t M);
  void (*packed_linear_grad_values)(const Team&, Dtype, int64_t M, const PackedWeight&, const void* grad_output,
                                    const void* input, void* grad_values);

  // limits.cpp, for benchmarks: multiply-adds of the dtype out of registers, returning how many operations it did; and
  // n floats read.
  int64_t (*fma_loop)(Dtype, int64_t rounds);
  void (*read_loop)(const float* data, int64_t n);
};

// dispatch.cpp
const Kernels& kernels();                     // the table in use: the best that is linked and that the CPU runs
const Kernels* const* available_kernels();    // those that this CPU runs, best first, ended by null
bool select_kernels(const char* capability);  // false if it is not available
// Whether this CPU reads what comes from beyond L2 fastest if it is fetched into L2, and not into L1; and, for tests,
// to have it so or not, returning what was. AMD family 19h (measured on Zen 4). Zen 5 is faster the other way, others
// were not measured.
bool fetches_into_l2();
bool set_fetches_into_l2(bool);
void free_index(SparseIndex* index);
size_t index_bytes(const SparseIndex& index);

}  // namespace masked_ops::cpu
