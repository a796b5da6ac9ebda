#include "device_ops.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>

#include <atomic>

#include "checks.h"

namespace masked_ops::device {
namespace {

at::Tensor empty_on(c10::Device device, at::IntArrayRef sizes, at::ScalarType dtype) {
  return at::empty(sizes, at::TensorOptions(dtype).device(device));
}

const uint64_t* words_of(const at::Tensor& words) {
  return reinterpret_cast<const uint64_t*>(words.const_data_ptr<int64_t>());
}

uint64_t* mutable_words_of(const at::Tensor& words) {
  return reinterpret_cast<uint64_t*>(words.mutable_data_ptr<int64_t>());
}

static_assert(sizeof(cuda::MaskFacts) % sizeof(int64_t) == 0);

Packed room_for(c10::Device device, int64_t rows, int64_t cols) {
  const int64_t per_row = cuda::words_per_row(cols);
  return {empty_on(device, {rows, per_row}, at::kLong), empty_on(device, {per_row}, at::kLong).zero_(),
          empty_on(device, {sizeof(cuda::MaskFacts) / sizeof(int64_t)}, at::kLong).zero_()};
}

cuda::MaskFacts* facts_of(const Packed& packed) {
  return reinterpret_cast<cuda::MaskFacts*>(packed.facts.mutable_data_ptr<int64_t>());
}

const void* data_or_null(const at::Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; }

}  // namespace

int cuda_dtype(at::ScalarType dtype) {
  switch (dtype) {
    case at::kBool:
    case at::kByte:
      return cuda::kByte;
    case at::kChar:
      return cuda::kInt8;
    case at::kShort:
      return cuda::kInt16;
    case at::kInt:
      return cuda::kInt32;
    case at::kLong:
      return cuda::kInt64;
    case at::kHalf:
      return cuda::kHalf;
    case at::kBFloat16:
      return cuda::kBFloat16;
    case at::kFloat:
      return cuda::kFloat;
    case at::kDouble:
      return cuda::kDouble;
    default:
      TORCH_INTERNAL_ASSERT(false, "no CUDA kernel takes dtype ", dtype);
  }
}

int copy_kind(at::ScalarType from, at::ScalarType to) {
  if (from == at::kFloat && to == at::kBFloat16) return cuda::kFloatToBFloat16;
  if (from == at::kFloat && to == at::kHalf) return cuda::kFloatToHalf;
  if (from == at::kBFloat16 && to == at::kFloat) return cuda::kBFloat16ToFloat;
  if (from == at::kHalf && to == at::kFloat) return cuda::kHalfToFloat;
  if (from != to) return -1;
  switch (c10::elementSize(from)) {
    case 1:
      return cuda::kCopy1;
    case 2:
      return cuda::kCopy2;
    case 4:
      return cuda::kCopy4;
    case 8:
      return cuda::kCopy8;
    default:
      TORCH_INTERNAL_ASSERT(c10::elementSize(from) == 16);
      return cuda::kCopy16;
  }
}

bool is_aligned(const at::Tensor& t) { return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0; }

at::Tensor in_order(const at::Tensor& t) {
  const at::Tensor given = t.contiguous();
  return is_aligned(given) ? given : given.clone();
}

Packed pack_mask(const Api& api, const at::Tensor& mask, int64_t rows, int64_t cols) {
  const Launch launch(mask.device());
  const Packed packed = room_for(mask.device(), rows, cols);
  check_launch("pack_mask", api.pack_mask(cuda_dtype(mask.scalar_type()), mask.const_data_ptr(), rows, cols,
                                          mutable_words_of(packed.words), mutable_words_of(packed.live_cols),
                                          facts_of(packed), launch.stream()));
  return packed;
}

Packed pack_bits(const Api& api, const at::Tensor& bits, int64_t cols) {
  const Launch launch(bits.device());
  const int64_t rows = bits.size(0);
  const Packed packed = room_for(bits.device(), rows, cols);
  check_launch("pack_bits", api.pack_bits(bits.const_data_ptr<uint8_t>(), rows, cols, mutable_words_of(packed.words),
                                          mutable_words_of(packed.live_cols), facts_of(packed), launch.stream()));
  return packed;
}

at::Tensor row_offsets(const Api& api, const at::Tensor& words, int64_t rows, int64_t cols) {
  const Launch launch(words.device());
  at::Tensor offsets = empty_on(words.device(), {rows + 1}, at::kLong);
  if (rows == 0 || cols == 0) return offsets.zero_();
  check_launch("row_offsets",
               api.row_offsets(words_of(words), rows, cols, offsets.mutable_data_ptr<int64_t>(), launch.stream()));
  return offsets;
}

void mask_copy(const Api& api, int kind, const at::Tensor& weight, const at::Tensor& words, int64_t rows, int64_t cols,
               const at::Tensor& out) {
  const Launch launch(weight.device());
  const cuda::MaskCopyTask task = {weight.const_data_ptr(), words_of(words), out.data_ptr(), rows, cols};
  check_launch("mask_copy", api.mask_copy(kind, &task, 1, launch.stream()));
}

at::Tensor expand(const Api& api, const at::Tensor& values, const at::Tensor& words, const at::Tensor& offsets,
                  int64_t rows, int64_t cols) {
  const Launch launch(values.device());
  const at::Tensor from = values.contiguous();
  at::Tensor weight = at::empty({rows, cols}, values.options());
  check_launch("expand", api.expand(static_cast<int>(from.element_size()), words_of(words), rows, cols,
                                    offsets.const_data_ptr<int64_t>(), from.const_data_ptr(), weight.data_ptr(),
                                    launch.stream()));
  return weight;
}

at::Tensor compress(const Api& api, const at::Tensor& weight, const at::Tensor& words, const at::Tensor& offsets,
                    int64_t nnz) {
  const Launch launch(weight.device());
  const at::Tensor from = weight.contiguous();
  at::Tensor values = at::empty({nnz}, weight.options());
  check_launch("compress", api.compress(static_cast<int>(from.element_size()), words_of(words), from.size(0),
                                        from.size(1), offsets.const_data_ptr<int64_t>(), from.const_data_ptr(),
                                        values.data_ptr(), launch.stream()));
  return values;
}

at::Tensor decode_index(const Api& api, const at::Tensor& words, int64_t N, int64_t K, int64_t nnz,
                        const at::Tensor& offsets) {
  const Launch launch(words.device());
  const size_t bytes = api.decode_index_bytes(N, K, nnz);
  if (bytes == 0) return {};
  at::Tensor index = empty_on(words.device(), {static_cast<int64_t>(bytes)}, at::kByte);
  check_launch("decode_index", api.decode_index(words_of(words), N, K, nnz, offsets.const_data_ptr<int64_t>(),
                                                index.data_ptr(), launch.stream()));
  return index;
}

at::Tensor decode(const Api& api, const at::Tensor& input, const at::Tensor& values, const at::Tensor& index, int64_t N,
                  const at::Tensor& bias) {
  const Launch launch(input.device());
  const int64_t K = input.size(-1), M = rows_of(input);
  const int dtype = cuda_dtype(input.scalar_type());
  at::Tensor output = empty_with_last_dim(input, N);
  const size_t bytes = api.decode_workspace(dtype, M, N, K);
  const at::Tensor workspace =
      bytes ? empty_on(input.device(), {static_cast<int64_t>(bytes)}, at::kByte) : at::Tensor();
  const int error = api.decode(dtype, M, N, K, values.numel(), input.const_data_ptr(), values.const_data_ptr(),
                               index.const_data_ptr(), data_or_null(bias), output.data_ptr(),
                               bytes ? workspace.data_ptr() : nullptr, launch.stream());
  if (error == cuda::kUnsupported) return {};
  check_launch("decode", error);
  return output;
}

namespace {

const cuda::SlicedPiece* slices_of(const Layout& layout) {
  static_assert(sizeof(cuda::SlicedPiece) == 4 * sizeof(int32_t));
  return reinterpret_cast<const cuda::SlicedPiece*>(layout.pieces.const_data_ptr<int32_t>());
}
const cuda::GatheredPiece* gathered_of(const Layout& layout) {
  static_assert(sizeof(cuda::GatheredPiece) == 4 * sizeof(int32_t));
  return reinterpret_cast<const cuda::GatheredPiece*>(layout.pieces.const_data_ptr<int32_t>());
}

int64_t pieces_of(int64_t whole, int64_t piece) { return (whole + piece - 1) / piece; }

// Long rows first, and -1 up to a multiple of the rows of a piece.
at::Tensor by_length(const at::Tensor& offsets, int64_t N, int64_t rows) {
  const at::Tensor counts = offsets.narrow(0, 1, N).sub(offsets.narrow(0, 0, N));
  at::Tensor order = at::full({pieces_of(N, rows) * rows}, -1, offsets.options().dtype(at::kInt));
  order.narrow(0, 0, N).copy_(counts.argsort(0, /*descending=*/true));
  return order;
}

// at of each piece out of size (cuda/api.h); and the length of all.
int64_t begin_pieces(const at::Tensor& pieces) {
  if (pieces.numel() == 0) return 0;
  const at::Tensor sizes = pieces.select(1, 1).to(at::kLong), ends = sizes.cumsum(0);
  pieces.select(1, 0).copy_(ends.sub(sizes));
  return ends.select(0, -1).item<int64_t>();
}

}  // namespace

Layout lay_out(const Api& api, Form form, const at::Tensor& words, const at::Tensor& offsets, int64_t N, int64_t K) {
  const Launch launch(words.device());
  const bool gathered = form == Form::kGathered;
  const int64_t rows = gathered ? cuda::kStripRows : cuda::kSliceRows;
  const int64_t count = pieces_of(N, rows) * pieces_of(K, gathered ? cuda::kGatherColumns : cuda::kSliceColumns);
  Layout layout{by_length(offsets, N, rows), at::zeros({count, 4}, words.options().dtype(at::kInt)), 0};
  const int32_t* const order = layout.order.const_data_ptr<int32_t>();
  if (gathered) {
    check_launch("gather", api.gather(words_of(words), N, K, order,
                                      const_cast<cuda::GatheredPiece*>(gathered_of(layout)), launch.stream()));
  } else {
    check_launch("slice", api.slice(words_of(words), N, K, order, const_cast<cuda::SlicedPiece*>(slices_of(layout)),
                                    launch.stream()));
  }
  layout.bytes = begin_pieces(layout.pieces) * (gathered ? cuda::kGatherUnit : cuda::kSliceUnit);
  return layout;
}

at::Tensor fill(const Api& api, Form form, const Layout& layout, const at::Tensor& words, const at::Tensor& offsets,
                int64_t K, const at::Tensor& values) {
  const Launch launch(values.device());
  at::Tensor data = empty_on(values.device(), {layout.bytes}, at::kByte);
  const int64_t N = offsets.numel() - 1, *const begins = offsets.const_data_ptr<int64_t>();
  const void* const from = values.const_data_ptr();
  const int32_t* const order = layout.order.const_data_ptr<int32_t>();
  if (form == Form::kGathered) {
    check_launch("fill_gathered", api.fill_gathered(words_of(words), N, K, begins, order, gathered_of(layout), from,
                                                    data.data_ptr(), launch.stream()));
  } else {
    check_launch("fill_slices", api.fill_slices(words_of(words), N, K, begins, order, slices_of(layout), from,
                                                data.data_ptr(), launch.stream()));
  }
  return data;
}

at::Tensor decode(const Api& api, Form form, const at::Tensor& input, const Layout& layout, const at::Tensor& data,
                  int64_t N, const at::Tensor& bias) {
  const Launch launch(input.device());
  at::Tensor output = empty_with_last_dim(input, N);
  const int dtype = cuda_dtype(input.scalar_type());
  const int64_t M = rows_of(input), K = input.size(-1);
  const bool gathered = form == Form::kGathered;
  const void* const from = input.const_data_ptr();
  const int32_t* const order = layout.order.const_data_ptr<int32_t>();
  const int error = gathered
                        ? api.decode_gathered(dtype, M, N, K, from, order, gathered_of(layout), data.const_data_ptr(),
                                              data_or_null(bias), output.data_ptr(), launch.stream())
                        : api.decode_sliced(dtype, M, N, K, from, order, slices_of(layout), data.const_data_ptr(),
                                            data_or_null(bias), output.data_ptr(), launch.stream());
  if (error == cuda::kUnsupported) return {};
  check_launch(gathered ? "decode_gathered" : "decode_sliced", error);
  return output;
}

at::Tensor fragments(const Api& api, const at::Tensor& words, int64_t N, int64_t K, bool transposed) {
  const Launch launch(words.device());
  const size_t bytes = api.fragments_bytes(N, K, transposed);
  at::Tensor result = empty_on(words.device(), {static_cast<int64_t>((bytes + 3) / 4)}, at::kInt);
  check_launch("pack_fragments",
               api.pack_fragments(words_of(words), N, K, transposed,
                                  reinterpret_cast<uint32_t*>(result.mutable_data_ptr<int32_t>()), launch.stream()));
  return result;
}

namespace {

std::atomic<int> plan_rows{0}, plan_splits{0}, plan_trade{0};

void take_plan(cuda::Gemm& call) {
  call.tile_rows = plan_rows.load(std::memory_order_relaxed);
  call.splits = plan_splits.load(std::memory_order_relaxed);
  call.trade = plan_trade.load(std::memory_order_relaxed);
}

}  // namespace

void set_gemm_plan(int tile_rows, int splits, bool trade) {
  plan_rows = tile_rows;
  plan_splits = splits;
  plan_trade = trade;
}

at::Tensor gemm(const Api& api, Kernel kernel, bool grad_input, const at::Tensor& input, const at::Tensor& weight,
                const at::Tensor& fragments, const at::Tensor& bias) {
  const Launch launch(input.device());
  cuda::Gemm call = {};
  call.mode = grad_input ? cuda::kGradInput : cuda::kForward;
  call.dtype = call.output_dtype = cuda_dtype(input.scalar_type());
  call.M = rows_of(input);
  call.N = weight.size(0);
  call.K = weight.size(1);
  at::Tensor output = empty_with_last_dim(input, grad_input ? call.K : call.N);
  (grad_input ? call.grad_output : call.input) = input.const_data_ptr();
  call.weight = weight.const_data_ptr();
  call.fragments = reinterpret_cast<const uint32_t*>(fragments.const_data_ptr<int32_t>());
  call.bias = data_or_null(bias);
  call.output = output.data_ptr();
  take_plan(call);
  const bool sm90 = kernel == Kernel::kGemmSm90;
  const int error = sm90 ? api.gemm_sm90(&call, launch.stream()) : api.gemm_sm80(&call, launch.stream());
  if (error == cuda::kUnsupported) return {};
  check_launch(sm90 ? "gemm_sm90" : "gemm_sm80", error);
  return output;
}

bool gemm_grad_weight(const Api& api, const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& words,
                      const at::Tensor& out) {
  const Launch launch(input.device());
  cuda::Gemm call = {};
  call.mode = cuda::kGradWeight;
  call.dtype = cuda_dtype(input.scalar_type());
  call.output_dtype = cuda_dtype(out.scalar_type());
  call.M = rows_of(input);
  call.N = out.size(0);
  call.K = out.size(1);
  call.input = input.const_data_ptr();
  call.grad_output = grad_output.const_data_ptr();
  call.words = words_of(words);
  call.output = out.data_ptr();
  take_plan(call);
  const int error = api.gemm_sm90(&call, launch.stream());
  if (error != cuda::kUnsupported) check_launch("gemm_sm90", error);
  return error == 0;
}

}  // namespace masked_ops::device
