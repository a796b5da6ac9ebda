// The packed linear family: the weight is its remaining values and their bits, and no dense weight exists. And what the
// packed convolutions share with it.
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>

#include "checks.h"
#include "device_linear.h"
#include "masking.h"
#include "memory.h"
#include "ops.h"
#include "packed.h"
#include "parallel.h"
#include "path.h"
#include "sparse.h"

namespace masked_ops {
namespace {

// The path; the copy path where there is nothing to compute: torch knows the shapes.
Path path_for(Pass pass, int64_t M, const at::Tensor& values, const Pattern& pattern) {
  const Path path = choose_packed_linear(pass, M, values, pattern).path;
  return M > 0 && pattern.rows() > 0 && pattern.cols() > 0 ? path : Path::kCopy;
}

// What the kernels see of a packed weight.
cpu::PackedWeight weight_of(const Pattern& pattern, const at::Tensor& values, bool with_ranks = false) {
  return {
      pattern.rows(),         pattern.cols(), pattern.bits(), pattern.offsets(), with_ranks ? pattern.ranks() : nullptr,
      values.const_data_ptr()};
}

cpu::Team team_for_fused(const Pattern& pattern, int64_t M) {
  return team_for_product(M, pattern.rows() * pattern.cols());
}

void check_weight(const at::Tensor& values, const at::Tensor& bits, int64_t in_features) {
  check_values(values);
  TORCH_CHECK(in_features >= 0, "in_features must not be negative, got ", in_features);
  check_bits(bits, std::nullopt, in_features, "weight_values", values);
}

}  // namespace

void check_bits(const at::Tensor& bits, std::optional<int64_t> rows, int64_t cols, const char* other_name,
                const at::Tensor& other) {
  check_defined("weight_bits", bits);
  TORCH_CHECK(other.is_floating_point() && other.element_size() > 1, other_name,
              " must be float16, bfloat16, float32 or float64 where weights are packed, got ", other.scalar_type());
  TORCH_CHECK(bits.device() == other.device(), "weight_bits must be on the device of ", other_name, ", ",
              other.device(), ", got ", bits.device());
  const int64_t bytes = cols / 8 + (cols % 8 != 0);
  TORCH_CHECK(bits.scalar_type() == at::kByte && bits.dim() == 2 && bits.size(0) == rows.value_or(bits.size(0)) &&
                  bits.size(1) == bytes,
              "weight_bits must be uint8 of shape [", rows ? std::to_string(*rows) : "out_features", ", ", bytes,
              "], got ", bits.scalar_type(), " of shape ", bits.sizes());
}

PatternPtr checked_pattern(const at::Tensor& bits, int64_t cols, int64_t nnz) {
  PatternPtr pattern = pattern_of_bits(bits, cols);
  TORCH_CHECK(pattern->nnz() == nnz, "weight_values must hold one value for each of the ", pattern->nnz(),
              " bits set in weight_bits, got ", nnz);
  return pattern;
}

void check_values(const at::Tensor& values) {
  check_defined("weight_values", values);
  TORCH_CHECK(values.dim() == 1 && values.is_floating_point(),
              "weight_values must be a floating-point tensor of one dimension, got ", values.scalar_type(),
              " of shape ", values.sizes());
}

at::Tensor expand(const at::Tensor& values, const Pattern& pattern) {
  at::Tensor weight = empty_result({pattern.rows(), pattern.cols()}, values.options());
  expand_into(weight, values, pattern);
  return weight;
}

at::Tensor packed_linear(const at::Tensor& input, const at::Tensor& values, const at::Tensor& bits, int64_t in_features,
                         const std::optional<at::Tensor>& bias) {
  check_defined("input", input);
  check_weight(values, bits, in_features);
  check_same_kind("input", input, "weight_values", values);
  check_last_dim("input", input, "weight_bits", in_features);
  const bool has_bias = bias && bias->defined();
  if (has_bias) {
    check_same_kind("bias", *bias, "weight_values", values);
    TORCH_CHECK(bias->dim() == 1 && bias->size(0) == bits.size(0), "bias must have shape [", bits.size(0), "], got ",
                bias->sizes());
  }
  if (values.is_cuda()) return device::packed_linear(input, values, bits, in_features, has_bias ? *bias : at::Tensor());
  const PatternPtr pattern = checked_pattern(bits, in_features, values.numel());
  const int64_t M = rows_of(input);
  const Path path = path_for(Pass::kForward, M, values, *pattern);
  if (path == Path::kCopy) return at::linear(input, expand(values, *pattern), bias);
  at::Tensor output = empty_with_last_dim(input, pattern->rows());
  const at::Tensor x = input.contiguous(), v = values.contiguous();
  const at::Tensor b = has_bias ? bias->contiguous() : at::Tensor();
  if (path == Path::kFused) {
    cpu::kernels().packed_linear(team_for_fused(*pattern, M), dtype_of(v.scalar_type()), M, weight_of(*pattern, v),
                                 x.const_data_ptr(), has_bias ? b.const_data_ptr() : nullptr,
                                 output.mutable_data_ptr());
  } else {
    sparse_linear(*pattern, v, M, x, b, output);
  }
  return output;
}

at::Tensor packed_linear_grad_input(const at::Tensor& grad_output, const at::Tensor& values, const at::Tensor& bits,
                                    int64_t in_features) {
  check_weight(values, bits, in_features);
  check_same_kind("grad_output", grad_output, "weight_values", values);
  check_last_dim("grad_output", grad_output, "weight_bits", bits.size(0));
  if (values.is_cuda()) return device::packed_linear_grad_input(grad_output, values, bits, in_features);
  const int64_t M = rows_of(grad_output);
  at::Tensor grad_input = empty_with_last_dim(grad_output, in_features);
  const PatternPtr pattern = checked_pattern(bits, in_features, values.numel());
  const Path path = path_for(Pass::kGradInput, M, values, *pattern);
  if (path == Path::kCopy) {
    at::Tensor rows = grad_input.view({M, in_features});
    at::mm_out(rows, as_matrix(grad_output, pattern->rows()), expand(values, *pattern));
    return grad_input;
  }
  const at::Tensor dy = grad_output.contiguous(), v = values.contiguous();
  if (path == Path::kFused) {
    cpu::kernels().packed_linear_grad_input(team_for_fused(*pattern, M), dtype_of(v.scalar_type()), M,
                                            weight_of(*pattern, v, /*with_ranks=*/true), dy.const_data_ptr(),
                                            grad_input.mutable_data_ptr());
  } else {
    sparse_grad_input(*pattern, v, M, dy, grad_input);
  }
  return grad_input;
}

at::Tensor packed_linear_grad_values(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& bits,
                                     int64_t nnz) {
  TORCH_CHECK(input.dim() > 0, "input must have at least one dimension");
  check_bits(bits, std::nullopt, input.size(-1), "input", input);
  check_same_kind("input", input, "grad_output", grad_output);
  check_last_dim("grad_output", grad_output, "weight_bits", bits.size(0));
  check_same_rows(grad_output, input);
  if (input.is_cuda()) return device::packed_linear_grad_values(grad_output, input, bits, nnz);
  const int64_t M = rows_of(input);
  const PatternPtr pattern = checked_pattern(bits, input.size(-1), nnz);
  at::Tensor values = empty_result({nnz}, grad_output.options());
  const Path path = path_for(Pass::kGradWeight, M, values, *pattern);
  if (path == Path::kCopy) {
    return compress(as_matrix(grad_output, pattern->rows()).t().mm(as_matrix(input, pattern->cols())), *pattern);
  }
  const at::Tensor dy = grad_output.contiguous(), x = input.contiguous();
  if (path == Path::kFused) {
    cpu::kernels().packed_linear_grad_values(team_for_fused(*pattern, M), dtype_of(x.scalar_type()), M,
                                             weight_of(*pattern, values), dy.const_data_ptr(), x.const_data_ptr(),
                                             values.mutable_data_ptr());
  } else {
    sparse_grad_values(*pattern, M, dy, x, values);
  }
  return values;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> packed_linear_gradients(const at::Tensor& grad_output,
                                                                       const at::Tensor& input,
                                                                       const at::Tensor& values, const at::Tensor& bits,
                                                                       bool of_bias) {
  const int64_t in_features = input.size(-1), M = rows_of(grad_output);
  const PatternPtr pattern = values.is_cuda() ? nullptr : checked_pattern(bits, in_features, values.numel());
  if (!pattern || path_for(Pass::kGradInput, M, values, *pattern) != Path::kSparse ||
      path_for(Pass::kGradWeight, M, values, *pattern) != Path::kSparse) {
    return {packed_linear_grad_input(grad_output, values, bits, in_features),
            packed_linear_grad_values(grad_output, input, bits, values.numel()), at::Tensor()};
  }
  at::Tensor grad_input = empty_with_last_dim(grad_output, in_features);
  at::Tensor grad_values = empty_result({values.numel()}, values.options());
  const at::Tensor grad_bias = sparse_gradients(*pattern, values.contiguous(), M, grad_output.contiguous(),
                                                input.contiguous(), grad_input, grad_values, of_bias);
  return {grad_input, grad_values, grad_bias};
}

at::Tensor unpack_values(const at::Tensor& values, const at::Tensor& bits, int64_t in_features) {
  check_weight(values, bits, in_features);
  if (values.is_cuda()) return device::unpack_values(values, bits, in_features);
  return expand(values, *checked_pattern(bits, in_features, values.numel()));
}

at::Tensor pack_values(const at::Tensor& weight, const at::Tensor& bits, int64_t nnz) {
  TORCH_CHECK(weight.dim() == 2 && weight.is_floating_point(), "weight must be a floating-point matrix, got ",
              weight.scalar_type(), " of shape ", weight.sizes());
  check_bits(bits, weight.size(0), weight.size(1), "weight", weight);
  if (weight.is_cuda()) return device::pack_values(weight, bits, nnz);
  return compress(weight, *checked_pattern(bits, weight.size(1), nnz));
}

std::tuple<std::string, std::string> explain_packed_linear(const at::Tensor& values, const at::Tensor& bits,
                                                           int64_t in_features, int64_t batch, bool by_input) {
  check_weight(values, bits, in_features);
  const Pass pass = by_input ? Pass::kGradInput : Pass::kForward;
  if (values.is_cuda()) return device::explain_packed_linear(pass, values, bits, in_features, batch);
  const PatternPtr pattern = checked_pattern(bits, in_features, values.numel());
  const Choice choice = choose_packed_linear(pass, batch, values, *pattern);
  return {path_name(choice.path), choice.reason};
}

}  // namespace masked_ops
