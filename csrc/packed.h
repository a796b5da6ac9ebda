// What the packed families share: a weight that is its remaining values and one bit a weight.
#pragma once

#include <ATen/core/Tensor.h>

#include "pattern.h"

namespace masked_ops {

// Throws unless weight_bits can be those of a matrix of `rows` (none: any) and `cols`, on the device of `other`, whose
// dtype a packed weight can have.
void check_bits(const at::Tensor& bits, std::optional<int64_t> rows, int64_t cols, const char* other_name,
                const at::Tensor& other);
// Their pattern, on the CPU; throws unless they hold nnz bits.
PatternPtr checked_pattern(const at::Tensor& bits, int64_t cols, int64_t nnz);
// Throws unless weight_values can be such.
void check_values(const at::Tensor& values);

// The dense weight as the matrix [pattern.rows()][pattern.cols()].
at::Tensor expand(const at::Tensor& values, const Pattern& pattern);

}  // namespace masked_ops
