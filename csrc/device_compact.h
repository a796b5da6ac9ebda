// The compact path on a device: torch's own operation over what a mask leaves once its empty rows and columns (of a
// convolution: channels) are left out. Operands are gathered, the result is put in its place.
#pragma once

#include "device_pattern.h"
#include "geometry.h"
#include "path.h"

namespace masked_ops::device {

// An operation, as the choice of this path and its operands see it.
struct CompactCase {
  Pass pass;
  at::ScalarType dtype;
  int64_t rows;  // of the weight
  RowOrder order;
  int64_t inputs, outputs, products;  // rows of input, of output, and those that each weight is multiplied with
  bool rows_are_inputs = false;       // as those of a transposed convolution are
  bool packed = false;                // there is no dense weight
  bool masks_for_free = false;        // what else would serve masks on the way, without a pass
  bool few_rows = false;              // a kernel for few rows would serve

  static CompactCase linear(Pass pass, at::ScalarType dtype, int64_t M, int64_t N, int64_t K);
  // weight_channels_last says how the weight lies whose mask it is.
  static CompactCase convolution(Pass pass, at::ScalarType dtype, const Geometry& geometry, at::IntArrayRef input,
                                 bool weight_channels_last);

  // Whether that takes less time than the whole operation, by arithmetic (device_tuning.h).
  bool pays(const DeviceChannels::Left& left) const;
};

// What is left of operands, and back. The features of input and output lie in dimension dim: the last one of a linear
// layer, 1 of a convolution.
class Compact {
 public:
  Compact(const CompactCase& of, const DeviceChannels::Left& left, DeviceChannels::Places places, int64_t dim)
      : case_(of), left_(left), places_(std::move(places)), dim_(dim) {}

  at::Tensor input(const at::Tensor& input) const;
  at::Tensor output(const at::Tensor& grad_output) const;
  at::Tensor bias(const at::Tensor& bias) const;  // may be undefined
  at::Tensor weight(const at::Tensor& weight) const;
  // Out of the values of a packed weight, all of which are left; the result has this kernel.
  at::Tensor weight_of_values(const at::Tensor& values, at::IntArrayRef kernel) const;

  // The output of a linear layer, whole, over what is left of its weight.
  at::Tensor linear(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias) const;

  // An output of the operation over what is left, as the whole one has it: where nothing is left the bias, if defined.
  at::Tensor whole_output(const at::Tensor& output, const at::Tensor& bias, at::MemoryFormat format) const;
  at::Tensor whole_input(const at::Tensor& grad_input, at::MemoryFormat format) const;
  // Into `to`, all of it; grad_weight is the caller's own.
  void whole_weight(const at::Tensor& grad_weight, at::Tensor to) const;

 private:
  const at::Tensor& input_places() const { return case_.rows_are_inputs ? places_.rows : places_.others; }
  const at::Tensor& output_places() const { return case_.rows_are_inputs ? places_.others : places_.rows; }
  int64_t all_inputs() const { return case_.rows_are_inputs ? case_.rows : case_.order.others; }
  int64_t all_outputs() const { return case_.rows_are_inputs ? case_.order.others : case_.rows; }

  CompactCase case_;
  DeviceChannels::Left left_;
  DeviceChannels::Places places_;
  int64_t dim_;
};

// Why the path is not to be taken whatever the mask is; null if it may be. To be asked before anything else is done.
const char* compact_is_off();

// Whether and why the path can serve, and what it needs. `why` is an obstacle that is known already. The pattern is
// ready, of a mask that is passed in the order of the weight's memory, or of packed bits; wait makes known what is not.
class CompactPlan {
 public:
  CompactPlan(const CompactCase& of, const char* why, DevicePatternPtr pattern, const at::Tensor& mask, bool capture,
              bool wait);

  const DeviceCompact& option() const { return option_; }
  // Nothing if, in a capture, it is not there.
  std::optional<Compact> operands(int64_t dim) const;
  // For an operation that has no other path of its own: nothing if this one is not to be taken. Throws if it is forced
  // and cannot serve.
  std::optional<Compact> chosen(const char* operation, int64_t dim) const;

 private:
  CompactCase case_;
  DevicePatternPtr pattern_;
  at::Tensor mask_;
  bool capture_;
  std::shared_ptr<DeviceChannels> channels_;
  std::optional<DeviceChannels::Left> left_;
  DeviceCompact option_;
};

// That of packed bits, which are checked against the number of values (device_packed.cpp).
CompactPlan plan_of_bits(const CompactCase& of, const char* why, const at::Tensor& bits, int64_t nnz);

}  // namespace masked_ops::device
