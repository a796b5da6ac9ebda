// The packed linear family on a device: decode for few rows, else the weight is unpacked for torch's GEMM.
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include "checks.h"
#include "device_compact.h"
#include "device_linear.h"
#include "device_pattern.h"
#include "device_tuning.h"

namespace masked_ops::device {
namespace {

constexpr const char* kOperation = "packed linear layer";
constexpr int64_t kFeatures = -1;  // their dimension
constexpr const char* kNoRoom = "MASKED_OPS_CACHE_BYTES leaves no room for it";

// The bits of a call: known, checked against the number of values, and in the form that the kernels or torch want. New
// bits are waited for, once. In a graph that is captured, bits that were not used before it are read by torch's own
// operations, which cannot check them.
class Bits {
 public:
  Bits(const at::Tensor& bits, int64_t cols, int64_t nnz)
      : bits_(bits), cols_(cols), nnz_(nnz), stream_(current_stream(bits.device())) {
    capture_ = capturing(bits.device());
    why_ = any_kernel() ? obstacle(Kernel::kPacked, bits.device()) : "";
    if (!capture_) {
      // Inference tensors have no version: their bits are taken anew.
      pattern_ = device_pattern_of_bits(bits, cols);
      if (!pattern_) pattern_ = std::make_shared<const DevicePattern>(bits, cols, 1);
      pattern_->ready(bits, kernels(), /*wait=*/true);
      TORCH_CHECK(pattern_->stray() == 0, "weight_bits must have zero bits beyond the ", cols, " columns");
      TORCH_CHECK(pattern_->nnz() == nnz, "weight_values must hold one value for each of the ", pattern_->nnz(),
                  " bits set in weight_bits, got ", nnz);
    } else if (const auto known = device_pattern_of_bits(bits, cols); known && known->known()) {
      pattern_ = known;
    }
  }

  int64_t rows() const { return bits_.size(0); }

  CompactPlan compact(const CompactCase& of, const char* why = nullptr) const {
    if (!why && why_) why = *why_ ? why_ : "MASKED_OPS_CUDA=0 turns the CUDA kernels off";
    if (!why && !pattern_) why = "the layer was not used before the graph that is being captured";
    return {of, why, pattern_, bits_, capture_, /*wait=*/true};
  }
  CompactPlan compact(Pass pass, at::ScalarType dtype, int64_t M) const {
    CompactCase of = CompactCase::linear(pass, dtype, M, rows(), cols_);
    of.packed = true;
    of.few_rows = pass == Pass::kForward && M <= cuda::kMostDecodeRows && dtype != at::kDouble;
    return compact(of);
  }

  at::Tensor expand(const at::Tensor& values) const {
    if (const auto [words, offsets] = words_and_offsets(); offsets.defined()) {
      return device::expand(*api(), values, words, offsets, rows(), cols_);
    }
    at::Tensor weight = at::zeros({rows(), cols_}, values.options());
    if (const at::Tensor places = places_or_none(); places.defined()) {
      weight.view({-1}).index_copy_(0, places, values);
      return weight;
    }
    return weight.masked_scatter_(keep(), values);
  }

  at::Tensor compress(const at::Tensor& weight) const {
    if (const auto [words, offsets] = words_and_offsets(); offsets.defined()) {
      return device::compress(*api(), weight, words, offsets, nnz_);
    }
    const at::Tensor flat = weight.reshape({-1});
    if (const at::Tensor places = places_or_none(); places.defined()) return flat.index_select(0, places);
    // The pruned weights all go to one place behind the values.
    const at::Tensor kept = keep().flatten();
    const at::Tensor place = at::where(kept, kept.cumsum(0).sub_(1), at::Scalar(nnz_));
    return at::empty({nnz_ + 1}, weight.options()).scatter_(0, place, flat).narrow(0, 0, nnz_);
  }

  // Why no kernel for few rows can serve.
  const char* few_rows_obstacle(const at::Tensor& values, int64_t rows) const {
    const at::ScalarType dtype = values.scalar_type();
    if (why_) return *why_ ? why_ : obstacle(Kernel::kDecode, bits_.device());
    if (!pattern_) return "the layer was not used before the graph that is being captured";
    if (rows > cuda::kMostDecodeRows) return "it takes at most 64 rows";
    if (dtype != at::kFloat && dtype != at::kHalf && dtype != at::kBFloat16) {
      return "its kernel takes float32, bfloat16 and float16 only";
    }
    return obstacle(Kernel::kDecode, bits_.device());
  }

  const char* decode_obstacle(const at::Tensor& values, int64_t rows) const {
    if (const char* why = few_rows_obstacle(values, rows)) return why;
    return forced_path() || pattern_->index_has_room() ? nullptr : kNoRoom;
  }

  // Why the kernel for values in this form cannot serve, or, unless it is forced, is not worth it.
  const char* form_obstacle(Form form, const at::Tensor& values, int64_t rows) const {
    const at::ScalarType dtype = values.scalar_type();
    const bool sliced = form == Form::kSlices;
    if (const char* why = few_rows_obstacle(values, rows)) return why;
    if (dtype == at::kFloat) return "its kernel takes bfloat16 and float16 only";
    if (sliced && rows > cuda::kMostSlicedRows) return "it takes at most 4 rows";
    if (sliced && cols_ % 2 != 0) return "in_features is odd";
    if (!sliced && cols_ % 8 != 0) return "in_features is no multiple of 8";
    if (!forced_path()) {
      if (values.requires_grad()) return "it is for frozen values";
      const int64_t weights = bits_.size(0) * cols_;
      if (sliced && double(nnz_) > cuda::kMostSlicedDensity * double(weights))
        return "it is slower for so many weights";
      if (weights < cuda::kLeastLaidOutWeights) return "the weight is small";
    }
    if (const char* why = obstacle(sliced ? Kernel::kDecodeSliced : Kernel::kDecodeGathered, bits_.device()))
      return why;
    return forced_path() || pattern_->form_has_room(form) ? nullptr : kNoRoom;
  }

  // Undefined if the values are not laid out, or the kernel does not serve this call after all.
  at::Tensor decode(Form form, const at::Tensor& input, const at::Tensor& values, const at::Tensor& bias) const {
    if (!values.is_contiguous()) return {};
    const auto [layout, data] = pattern_->laid_out(form, values, stream_, capture_, /*now=*/forced_path().has_value());
    if (!data.defined()) return {};
    return device::decode(*api(), form, in_order(input), layout, data, rows(),
                          bias.defined() ? bias.contiguous() : bias);
  }

  // Undefined if the kernel does not serve this call after all.
  at::Tensor decode(const at::Tensor& input, const at::Tensor& values, const at::Tensor& bias) const {
    const at::Tensor index = pattern_->decode_index(stream_, capture_);
    if (!index.defined()) return {};
    return device::decode(*api(), in_order(input), in_order(values), index, rows(),
                          bias.defined() ? bias.contiguous() : bias);
  }

 private:
  bool kernels() const { return why_ == nullptr; }

  std::pair<at::Tensor, at::Tensor> words_and_offsets() const {
    if (!pattern_ || !kernels()) return {};
    const at::Tensor words = pattern_->words(stream_);
    return {words, words.defined() ? pattern_->offsets(stream_, capture_) : at::Tensor()};
  }

  at::Tensor places_or_none() const {
    return pattern_ && !pattern_->words(stream_).defined() ? pattern_->places(stream_, capture_) : at::Tensor();
  }

  at::Tensor keep() const {
    const at::Tensor shifts = at::arange(8, bits_.options());
    const at::Tensor all = bits_.unsqueeze(-1).bitwise_right_shift(shifts).bitwise_and(1).flatten(1);
    return all.narrow(1, 0, cols_).to(at::kBool);
  }

  at::Tensor bits_;
  int64_t cols_, nnz_;
  c10::Stream stream_;
  bool capture_ = false;
  const char* why_ = nullptr;  // the kernels cannot serve
  DevicePatternPtr pattern_;   // null in a capture that meets bits for the first time
};

Choice choose(Pass pass, const Bits& bits, const CompactPlan& compact, const at::Tensor& values, int64_t rows) {
  const char* dense = "a packed layer has no dense weight";
  const char* backward = pass == Pass::kForward ? nullptr : "its kernel serves forward only";
  const char* decode = backward ? backward : bits.decode_obstacle(values, rows);
  return choose_device(
      kOperation, pass, rows, values.numel(),
      {dense, decode, dense, dense, backward ? backward : bits.form_obstacle(Form::kSlices, values, rows),
       backward ? backward : bits.form_obstacle(Form::kGathered, values, rows)},
      decode == kNoRoom ? "torch's GEMM over the unpacked weight: MASKED_OPS_CACHE_BYTES is reached"
                        : "torch's GEMM over the unpacked weight",
      compact.option());
}

}  // namespace

at::Tensor packed_linear(const at::Tensor& input, const at::Tensor& values, const at::Tensor& bits, int64_t in_features,
                         const at::Tensor& bias) {
  const Bits known(bits, in_features, values.numel());
  const int64_t M = rows_of(input);
  const CompactPlan compact = known.compact(Pass::kForward, values.scalar_type(), M);
  const Choice choice = choose(Pass::kForward, known, compact, values, M);
  if (choice.path == Path::kCompact) {
    if (const auto left = compact.operands(kFeatures)) {
      return left->linear(input, left->weight_of_values(values, {}), bias);
    }
  }
  const bool laid_out = choice.path == Path::kDecodeSliced || choice.path == Path::kDecodeGathered;
  if ((laid_out || choice.path == Path::kDecode) && M > 0 && known.rows() > 0 && in_features > 0) {
    const Form form = choice.path == Path::kDecodeGathered ? Form::kGathered : Form::kSlices;
    at::Tensor output;
    if (laid_out) output = known.decode(form, input, values, bias);
    const bool other = !laid_out || !forced_path();  // until the values are laid out
    if (!output.defined() && other) output = known.decode(input, values, bias);
    if (output.defined()) return output;
    TORCH_CHECK(!forced_path(), "path '", path_name(choice.path),
                "' cannot serve this packed linear layer: its kernel does not take it");
  }
  return at::linear(input, known.expand(values), bias.defined() ? std::optional(bias) : std::nullopt);
}

at::Tensor packed_linear_grad_input(const at::Tensor& grad_output, const at::Tensor& values, const at::Tensor& bits,
                                    int64_t in_features) {
  const Bits known(bits, in_features, values.numel());
  const int64_t M = rows_of(grad_output);
  if (const auto left = known.compact(Pass::kGradInput, values.scalar_type(), M).chosen(kOperation, kFeatures)) {
    const at::Tensor dx = at::matmul(left->output(grad_output), left->weight_of_values(values, {}));
    return left->whole_input(dx, at::MemoryFormat::Contiguous);
  }
  at::Tensor grad_input = empty_with_last_dim(grad_output, in_features);
  at::Tensor rows = grad_input.view({M, in_features});
  at::mm_out(rows, as_matrix(grad_output, known.rows()), known.expand(values));
  return grad_input;
}

at::Tensor packed_linear_grad_values(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& bits,
                                     int64_t nnz) {
  const Bits known(bits, input.size(-1), nnz);
  const CompactPlan compact = known.compact(Pass::kGradWeight, input.scalar_type(), rows_of(input));
  if (const auto left = compact.chosen(kOperation, kFeatures)) {
    return outer(left->output(grad_output), left->input(input)).view({-1});
  }
  return known.compress(outer(grad_output, input));
}

CompactPlan plan_of_bits(const CompactCase& of, const char* why, const at::Tensor& bits, int64_t nnz) {
  return Bits(bits, of.order.others * of.order.taps, nnz).compact(of, why);
}

at::Tensor unpack_values(const at::Tensor& values, const at::Tensor& bits, int64_t in_features) {
  return Bits(bits, in_features, values.numel()).expand(values);
}

at::Tensor pack_values(const at::Tensor& weight, const at::Tensor& bits, int64_t nnz) {
  return Bits(bits, weight.size(1), nnz).compress(weight);
}

std::tuple<std::string, std::string> explain_packed_linear(Pass pass, const at::Tensor& values, const at::Tensor& bits,
                                                           int64_t in_features, int64_t batch) {
  const Bits known(bits, in_features, values.numel());
  const CompactPlan compact = known.compact(pass, values.scalar_type(), batch);
  const Choice choice = choose(pass, known, compact, values, batch);
  return {path_name(choice.path), choice.reason};
}

}  // namespace masked_ops::device
