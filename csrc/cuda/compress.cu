// Dense weight to its remaining values and back.
#include "device.h"
#include "remaining.h"
#include "tuning.h"

namespace masked_ops::cuda {
namespace {

struct alignas(16) Element16 {
  uint32_t words[4];
};

template <typename Element>
__global__ void __launch_bounds__(tuning::kPassThreads, tuning::kPassBlocks)
    compress_kernel(Pieces pieces, const Element* __restrict__ dense, Element* __restrict__ values) {
  for_columns(pieces, [&](int64_t row, int64_t col, bool set, int64_t position) {
    if (set) values[position] = dense[row * pieces.cols + col];
  });
}

template <typename Element>
__global__ void __launch_bounds__(tuning::kPassThreads, tuning::kPassBlocks)
    expand_kernel(Pieces pieces, const Element* __restrict__ values, Element* __restrict__ dense) {
  for_columns(pieces, [&](int64_t row, int64_t col, bool set, int64_t position) {
    dense[row * pieces.cols + col] = set ? values[position] : Element{};
  });
}

template <typename Element, bool kExpand>
int run(const uint64_t* words, int64_t rows, int64_t cols, const int64_t* offsets, const void* from, void* to,
        void* stream) {
  if (rows == 0 || cols == 0) return 0;
  const Pieces pieces = Pieces::of(words, offsets, rows, cols);
  if (pieces.blocks() > INT32_MAX) return kUnsupported;
  return launch(kExpand ? expand_kernel<Element> : compress_kernel<Element>, uint32_t(pieces.blocks()),
                tuning::kPassThreads, 0, stream, pieces, static_cast<const Element*>(from), static_cast<Element*>(to));
}

template <bool kExpand>
int run(int element_size, const uint64_t* words, int64_t rows, int64_t cols, const int64_t* offsets, const void* from,
        void* to, void* stream) {
  switch (element_size) {
    case 1:
      return run<uint8_t, kExpand>(words, rows, cols, offsets, from, to, stream);
    case 2:
      return run<uint16_t, kExpand>(words, rows, cols, offsets, from, to, stream);
    case 4:
      return run<uint32_t, kExpand>(words, rows, cols, offsets, from, to, stream);
    case 8:
      return run<uint64_t, kExpand>(words, rows, cols, offsets, from, to, stream);
    case 16:
      return run<Element16, kExpand>(words, rows, cols, offsets, from, to, stream);
    default:
      return kUnsupported;
  }
}

}  // namespace
}  // namespace masked_ops::cuda

int masked_ops_cuda_compress(int element_size, const uint64_t* words, int64_t rows, int64_t cols,
                             const int64_t* offsets, const void* dense, void* values, void* stream) {
  return masked_ops::cuda::run<false>(element_size, words, rows, cols, offsets, dense, values, stream);
}

int masked_ops_cuda_expand(int element_size, const uint64_t* words, int64_t rows, int64_t cols, const int64_t* offsets,
                           const void* values, void* dense, void* stream) {
  return masked_ops::cuda::run<true>(element_size, words, rows, cols, offsets, values, dense, stream);
}
