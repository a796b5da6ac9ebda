#include "masking.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mul.h>
#include <c10/util/Exception.h>
#include <c10/util/SmallVector.h>

#include <algorithm>
#include <numeric>
#include <tuple>

#include "checks.h"
#include "device_linear.h"
#include "geometry.h"
#include "memory.h"
#include "parallel.h"

namespace masked_ops {
namespace {

// Kernels can mask a weight that is dense in CPU memory; they walk memory, so that it and the mask are seen in the
// weight's order, in which it is contiguous.
struct InOrder {
  at::Tensor weight, mask;
  PatternPtr pattern;  // of the mask in this order; null if kernels cannot

  InOrder(const at::Tensor& dense, const at::Tensor& mask_of_it) : weight(dense), mask(mask_of_it) {
    const bool strided = weight.is_cpu() && weight.layout() == at::kStrided && packable(mask.scalar_type());
    if (!strided || !weight.is_non_overlapping_and_dense()) return;
    std::tie(weight, mask) = in_memory_order(weight, mask);
    pattern = pattern_of(mask);
  }
  bool binary() const { return pattern && pattern->binary(); }
  bool all_remain() const { return binary() && pattern->nnz() == weight.numel(); }
  void copy_to(void* out) const {
    cpu::kernels().mask_copy(team_for(weight.numel()), weight.element_size(), weight.const_data_ptr(), pattern->bits(),
                             pattern->rows(), pattern->cols(), out);
  }
};

}  // namespace

std::pair<at::Tensor, at::Tensor> in_memory_order(const at::Tensor& weight, const at::Tensor& mask) {
  if (weight.is_contiguous()) return {weight, mask};
  c10::SmallVector<int64_t, 5> order(weight.dim());  // from the slowest to the fastest
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return weight.stride(a) > weight.stride(b); });
  return {weight.permute(order), with_version_of(mask, mask.permute(order))};
}

void check_mask(const at::Tensor& weight, const at::Tensor& mask) {
  check_defined("weight", weight);
  check_defined("mask", mask);
  TORCH_CHECK(weight.layout() == at::kStrided, "weight must be dense, got layout ", weight.layout());
  TORCH_CHECK(mask.layout() == at::kStrided, "mask must be dense, got layout ", mask.layout());
  TORCH_CHECK(weight.is_floating_point() || weight.is_complex(), "weight must have a floating-point dtype, got ",
              weight.scalar_type());
  TORCH_CHECK(mask.sym_sizes() == weight.sym_sizes(), "mask must have the shape of weight, ", weight.sym_sizes(),
              ", got ", mask.sym_sizes());
  TORCH_CHECK(mask.device() == weight.device(), "mask must be on the device of weight, ", weight.device(), ", got ",
              mask.device());
}

PatternPtr try_pattern_of(const at::Tensor& mask) {
  return mask.is_cpu() && mask.layout() == at::kStrided && packable(mask.scalar_type()) ? pattern_of(mask) : nullptr;
}

at::Tensor masked_weight_composite(const at::Tensor& weight, const at::Tensor& mask) {
  const at::Tensor factor = mask.detach().to(weight.scalar_type());
  return weight.mul(factor).masked_fill_(factor.eq(0), 0);  // the weight first: it decides on the memory format
}

void zero_where_zero(const at::Tensor& product, const at::Tensor& factor) {
  // masked_fill takes no float8, whose zero has no bits.
  const at::Tensor bits = c10::isFloat8Type(product.scalar_type()) ? product.view(at::kByte) : product;
  bits.masked_fill_(factor.eq(0), 0);
}

at::Tensor masked_weight_by_torch(const at::Tensor& weight, const at::Tensor& mask) {
  const at::Tensor factor = mask.to(weight.scalar_type());
  at::Tensor out = at::empty_like(weight);  // a product would lie as the mask does where the weight is expanded
  zero_where_zero(at::mul_out(out, weight, factor), factor);
  return out;
}

at::Tensor masked_own(const at::Tensor& weight, const at::Tensor& mask) {
  if (weight.is_cuda()) {
    device::mask_in_place(weight, mask);
    return weight;
  }
  const InOrder order(weight, mask);
  if (order.all_remain()) return weight;
  if (!order.binary()) return masked_weight(weight, mask);
  order.copy_to(weight.data_ptr());
  return weight;
}

void check_cast(const at::Tensor& weight, at::ScalarType dtype) {
  TORCH_CHECK(weight.is_complex() ? c10::isComplexType(dtype) : c10::isFloatingType(dtype), "dtype must be ",
              weight.is_complex() ? "complex" : "a floating-point one", " as the weight's, ", weight.scalar_type(),
              ", got ", dtype);
}

at::Tensor masked_cast(const at::Tensor& weight, const at::Tensor& mask, at::ScalarType dtype) {
  if (dtype == weight.scalar_type()) return masked_weight(weight, mask);
  if (weight.is_cuda() && weight.layout() == at::kStrided) return device::masked_weight(weight, mask, dtype);
  return masked_weight(weight, mask).to(dtype);
}

MaskedForCall::MaskedForCall(const at::Tensor& weight, const at::Tensor& mask) {
  const InOrder order(weight, mask);
  if (order.all_remain()) {
    masked_ = weight;
  } else if (order.binary()) {
    order.copy_to(scratch_.emplace(weight).tensor().data_ptr());
  } else {
    masked_ = masked_weight(weight, mask);
  }
}

at::Tensor masked_weight(const at::Tensor& weight, const at::Tensor& mask) {
  if (weight.is_cuda() && weight.layout() == at::kStrided) {
    return device::masked_weight(weight, mask, weight.scalar_type());
  }
  if (!weight.is_cpu() || weight.layout() != at::kStrided || !packable(mask.scalar_type())) {
    return masked_weight_by_torch(weight, mask);
  }
  const at::Tensor dense = weight.is_non_overlapping_and_dense() ? weight : weight.clone();
  const InOrder order(dense, mask);
  at::Tensor out = empty_result_like(dense);
  if (order.binary()) {
    order.copy_to(out.data_ptr());
    return out;
  }
  const at::Tensor& w = order.weight;
  const at::Tensor factor = order.mask.to(w.scalar_type()).contiguous();
  if (w.scalar_type() == at::kFloat || w.scalar_type() == at::kDouble) {
    cpu::kernels().mask_multiply(team_for(w.numel()),
                                 w.scalar_type() == at::kFloat ? cpu::Dtype::kFloat : cpu::Dtype::kDouble,
                                 w.const_data_ptr(), factor.const_data_ptr(), w.numel(), out.data_ptr());
  } else {
    at::Tensor in_order = out.as_strided(w.sizes(), w.strides());
    zero_where_zero(at::mul_out(in_order, w, factor), factor);
  }
  return out;
}

namespace {

// The taps of a weight [O][C][kernel] that lies in memory as [O][kernel][C]; 0 if it does not, or nothing depends on
// it.
int64_t taps_if_channels_last(const at::Tensor& weight, const Pattern& pattern) {
  if (weight.is_contiguous() || weight.dim() < 4 || weight.dim() > 5 || pattern.cols() > cpu::kMaxIndexSide) return 0;
  if (!weight.is_contiguous(channels_last_of(weight.dim()))) return 0;
  return pattern.cols() / weight.size(1);
}

}  // namespace

at::Tensor compress(const at::Tensor& weight, const Pattern& pattern) {
  at::Tensor values = empty_result({pattern.nnz()}, weight.options());
  const cpu::Team team = team_for(weight.numel());
  if (const int64_t taps = taps_if_channels_last(weight, pattern)) {
    cpu::kernels().compress_last(team, weight.element_size(), pattern.bits(), pattern.rows(), pattern.cols(), taps,
                                 pattern.offsets(), weight.const_data_ptr(), values.data_ptr());
    return values;
  }
  const at::Tensor from = weight.contiguous();
  cpu::kernels().compress(team, from.element_size(), pattern.bits(), pattern.rows(), pattern.cols(), pattern.offsets(),
                          from.const_data_ptr(), values.data_ptr());
  return values;
}

at::Tensor remaining(const at::Tensor& values, const at::Tensor& weight, const Pattern& pattern) {
  return values.defined() && values.numel() == pattern.nnz() ? values : compress(weight, pattern);
}

void expand_into(const at::Tensor& weight, const at::Tensor& values, const Pattern& pattern) {
  const at::Tensor from = values.contiguous();
  const cpu::Team team = team_for(weight.numel());
  if (const int64_t taps = taps_if_channels_last(weight, pattern)) {
    cpu::kernels().expand_last(team, weight.element_size(), pattern.bits(), pattern.rows(), pattern.cols(), taps,
                               pattern.offsets(), from.const_data_ptr(), weight.data_ptr());
    return;
  }
  cpu::kernels().expand(team, weight.element_size(), pattern.bits(), pattern.rows(), pattern.cols(), pattern.offsets(),
                        from.const_data_ptr(), weight.data_ptr());
}

}  // namespace masked_ops
