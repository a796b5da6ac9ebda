// weight∘mask as a tensor: what apply_mask returns, and the first half of the copy path; and as the values that remain.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <utility>

#include "memory.h"
#include "pattern.h"

namespace masked_ops {

// Throws, naming the argument, unless the mask fits the weight: shape, device, a dtype that can be multiplied.
void check_mask(const at::Tensor& weight, const at::Tensor& mask);

// where(mask == 0, 0, weight * mask) with the mask in the weight's dtype, in the memory format of weight. One pass for
// binary masks (a pruned weight counts as absent) and for soft ones in float32 and float64.
at::Tensor masked_weight(const at::Tensor& weight, const at::Tensor& mask);

// The same, then in another dtype: in one pass where there is a kernel for it.
at::Tensor masked_cast(const at::Tensor& weight, const at::Tensor& mask, at::ScalarType dtype);
void check_cast(const at::Tensor& weight, at::ScalarType dtype);

// The same for a tensor that is the caller's own, and is no longer: where that is possible it is masked in place.
at::Tensor masked_own(const at::Tensor& weight, const at::Tensor& mask);

// The same for the time of a call of torch's, in scratch memory where that is possible.
class MaskedForCall {
 public:
  MaskedForCall(const at::Tensor& weight, const at::Tensor& mask);
  const at::Tensor& weight() const { return scratch_ ? scratch_->tensor() : masked_; }

 private:
  std::optional<Scratch> scratch_;
  at::Tensor masked_;
};

// Both with the dimensions in the order in which the weight, which is dense, has them in memory, where it is
// contiguous.
std::pair<at::Tensor, at::Tensor> in_memory_order(const at::Tensor& weight, const at::Tensor& mask);

// masked_weight by torch's own differentiable operations.
at::Tensor masked_weight_composite(const at::Tensor& weight, const at::Tensor& mask);

// masked_weight by torch's own operations below autograd, for any device and dtype.
at::Tensor masked_weight_by_torch(const at::Tensor& weight, const at::Tensor& mask);

// product = 0 where factor is 0, for float8 too; below autograd.
void zero_where_zero(const at::Tensor& product, const at::Tensor& factor);

// The pattern where there is one: a packable mask in CPU memory; else null.
PatternPtr try_pattern_of(const at::Tensor& mask);

// The remaining weights in row-major order, [nnz]; and back, zeros elsewhere, into a weight that is contiguous or, with
// all of its dimensions, channels last.
at::Tensor compress(const at::Tensor& weight, const Pattern& pattern);
// The same where forward may have kept them as `values` (else undefined). Those are of another number once the mask was
// changed in a way that torch does not count: then, or the kernels would read behind their end, they are made anew.
at::Tensor remaining(const at::Tensor& values, const at::Tensor& weight, const Pattern& pattern);
void expand_into(const at::Tensor& weight, const at::Tensor& values, const Pattern& pattern);

}  // namespace masked_ops
