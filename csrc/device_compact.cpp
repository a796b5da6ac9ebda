#include "device_compact.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "device_tuning.h"

namespace masked_ops::device {
namespace {

// The slices at these places of a dimension; all if they are undefined.
at::Tensor take(const at::Tensor& t, int64_t dim, const at::Tensor& places) {
  if (!places.defined()) return t;
  if (dim == 1 && suggests_channels_last(t)) return t.movedim(1, -1).index_select(-1, places).movedim(-1, 1);
  return t.index_select(dim, places);
}

// t with `size` slices in the dimension, at other places than these the fill, or zero.
at::Tensor spread(const at::Tensor& t, int64_t dim, const at::Tensor& places, int64_t size, const at::Tensor& fill,
                  at::MemoryFormat format) {
  if (!places.defined()) return t.contiguous(format);
  at::DimVector sizes(t.sizes());
  dim = dim < 0 ? dim + t.dim() : dim;
  sizes[static_cast<size_t>(dim)] = size;
  at::Tensor whole = at::empty(sizes, t.options(), format);
  if (fill.defined()) {
    at::DimVector along(t.dim(), 1);
    along[static_cast<size_t>(dim)] = size;
    whole.copy_(fill.view(along));
  } else {
    whole.zero_();
  }
  return whole.index_copy_(dim, places, t);
}

// What is left of something, and all of it.
struct Share {
  double left, whole;
  bool cut() const { return left < whole; }
  Share operator*(double factor) const { return {left * factor, whole * factor}; }
};

// Bytes that are read and written, and the calls for it.
struct Moves {
  double bytes = 0, calls = 0;
  void add(double more_bytes, int more_calls) {
    bytes += more_bytes;
    calls += more_calls;
  }
  void gather(const Share& operand) {
    if (operand.cut()) add(2 * operand.left, 1);
  }
  void scatter(const Share& result) {  // after a fill
    if (result.cut()) add(result.whole + 2 * result.left, 2);
  }
  double time() const { return bytes / cuda::kMoveBytes + calls * cuda::kCall; }
};

}  // namespace

CompactCase CompactCase::linear(Pass pass, at::ScalarType dtype, int64_t M, int64_t N, int64_t K) {
  return {.pass = pass, .dtype = dtype, .rows = N, .order = {K}, .inputs = M, .outputs = M, .products = M};
}

CompactCase CompactCase::convolution(Pass pass, at::ScalarType dtype, const Geometry& geometry, at::IntArrayRef input,
                                     bool weight_channels_last) {
  const at::DimVector output = geometry.output_sizes(input);
  const auto positions = [](at::IntArrayRef sizes) { return sizes[0] * c10::multiply_integers(sizes.slice(2)); };
  const int64_t in = positions(input), out = positions(output);
  return {.pass = pass,
          .dtype = dtype,
          .rows = geometry.weight[0],
          .order = {geometry.weight[1], c10::multiply_integers(geometry.weight.slice(2)), weight_channels_last},
          .inputs = in,
          .outputs = out,
          .products = geometry.transposed ? in : out,
          .rows_are_inputs = geometry.transposed};
}

bool CompactCase::pays(const DeviceChannels::Left& left) const {
  const double size = double(c10::elementSize(dtype)), taps = double(order.taps);
  const Share of_rows = {double(left.rows), double(rows)}, of_others = {double(left.others), double(order.others)};
  const Share input = (rows_are_inputs ? of_rows : of_others) * (size * double(inputs));
  const Share output = (rows_are_inputs ? of_others : of_rows) * (size * double(outputs));
  const Share weight = {size * of_rows.left * of_others.left * taps, size * of_rows.whole * of_others.whole * taps};
  const auto product = [&](double weight_bytes) {
    const double flops = dtype == at::kDouble ? cuda::kDoubleFlops : cuda::kFlops;
    return std::max(2 * double(products) * weight_bytes / size / flops, weight_bytes / cuda::kReadBytes);
  };
  Moves moves, others;  // besides the product: of this path, and of what else would serve
  if (pass != Pass::kGradInput) moves.gather(input);
  if (pass != Pass::kForward) moves.gather(output);
  if (pass != Pass::kGradWeight) moves.scatter(pass == Pass::kForward ? output : input);
  if (packed) {
    others.add(weight.left + weight.whole, 1);  // unpacks, or packs; what is left is a matrix as it is
  } else {
    if (pass == Pass::kGradWeight) moves.scatter(weight);
    if (pass != Pass::kGradWeight && of_rows.cut()) moves.gather(weight);
    if (pass != Pass::kGradWeight && of_others.cut()) moves.gather(weight);
    if (!left.full) moves.add(2 * weight.left, 1);
    if (!masks_for_free) others.add(2 * weight.whole, 1);
  }
  double whole = product(weight.whole) + others.time();
  if (few_rows) whole = std::min(whole, cuda::kDecode + weight.left / size / cuda::kDecodeValues);
  return product(weight.left) + moves.time() < cuda::kCompactMargin * whole;
}

at::Tensor Compact::input(const at::Tensor& input) const { return take(input, dim_, input_places()); }
at::Tensor Compact::output(const at::Tensor& grad_output) const { return take(grad_output, dim_, output_places()); }
at::Tensor Compact::bias(const at::Tensor& bias) const {
  return bias.defined() ? take(bias, 0, output_places()) : bias;
}

at::Tensor Compact::weight(const at::Tensor& weight) const {
  at::Tensor left = take(take(weight, 0, places_.rows), 1, places_.others);
  if (places_.drop.defined()) left.masked_fill_(places_.drop.view(left.sizes()), 0);
  return left;
}

at::Tensor Compact::weight_of_values(const at::Tensor& values, at::IntArrayRef kernel) const {
  at::DimVector sizes = {left_.rows, left_.others};
  sizes.append(kernel.begin(), kernel.end());
  return values.view(sizes);
}

at::Tensor Compact::linear(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias) const {
  const at::Tensor left_bias = this->bias(bias);
  const at::Tensor output =
      at::linear(this->input(input), weight, bias.defined() ? std::optional(left_bias) : std::nullopt);
  return whole_output(output, bias, at::MemoryFormat::Contiguous);
}

at::Tensor Compact::whole_output(const at::Tensor& output, const at::Tensor& bias, at::MemoryFormat format) const {
  return spread(output, dim_, output_places(), all_outputs(), bias, format);
}

at::Tensor Compact::whole_input(const at::Tensor& grad_input, at::MemoryFormat format) const {
  return spread(grad_input, dim_, input_places(), all_inputs(), at::Tensor(), format);
}

void Compact::whole_weight(const at::Tensor& grad_weight, at::Tensor to) const {
  at::Tensor left = grad_weight;
  if (places_.drop.defined()) left.masked_fill_(places_.drop.view(left.sizes()), 0);
  if (places_.rows.defined() && places_.others.defined()) {
    at::DimVector sizes(to.sizes());
    sizes[0] = left_.rows;
    left = at::zeros(sizes, left.options()).index_copy_(1, places_.others, left);
  }
  to.zero_();
  if (places_.rows.defined()) {
    to.index_copy_(0, places_.rows, left);
  } else {
    to.index_copy_(1, places_.others, left);
  }
}

const char* compact_is_off() {
  if (forced_path()) return forced_path() == Path::kCompact ? nullptr : "another path is forced";
  return takes_unconfirmed() ? nullptr : "no GPU has measured it yet; MASKED_OPS_CUDA=1 turns it on";
}

CompactPlan::CompactPlan(const CompactCase& of, const char* why, DevicePatternPtr pattern, const at::Tensor& mask,
                         bool capture, bool wait)
    : case_(of), pattern_(std::move(pattern)), mask_(mask), capture_(capture) {
  if (!why) why = compact_is_off();
  if (!why) {
    channels_ = pattern_->channels(case_.order);
    if (!channels_) why = "the mask has no empty row or column, or nothing else";
  }
  if (!why) {
    try {
      left_ =
          channels_->left([this] { return pattern_->keep_of(mask_); }, current_stream(mask_.device()), capture_, wait);
    } catch (const c10::OutOfMemoryError&) {
      if (wait) throw;
    }
    if (!left_) {
      why = "the mask is new";
    } else if (left_->rows == case_.rows && left_->others == case_.order.others) {
      why = "it has no pruned channel";
    } else if (case_.packed && !left_->full) {
      why = "more is pruned than whole rows and columns, and a packed layer has no dense weight";
    }
  }
  option_ = {why, !why && case_.pays(*left_),
             case_.order.taps > 1 ? "torch's convolution without the pruned channels"
                                  : "torch's GEMM without the empty rows and columns"};
}

std::optional<Compact> CompactPlan::chosen(const char* operation, int64_t dim) const {
  const bool forced = forced_path() == Path::kCompact;
  TORCH_CHECK(!forced || !option_.obstacle, "path 'compact' cannot serve this ", operation, ": ", option_.obstacle);
  return !option_.obstacle && (forced || option_.pays) ? operands(dim) : std::nullopt;
}

std::optional<Compact> CompactPlan::operands(int64_t dim) const {
  const c10::Stream stream = current_stream(mask_.device());
  const auto keep = [this] { return pattern_->keep_of(mask_); };
  std::optional<DeviceChannels::Places> places;
  try {
    places = channels_->places(keep, stream, capture_);
  } catch (const c10::OutOfMemoryError&) {
    if (forced_path()) throw;  // else other paths serve
  }
  if (!places) return {};
  if (capture_) pattern_->mark_captured();
  return Compact(case_, *left_, std::move(*places), dim);
}

}  // namespace masked_ops::device
