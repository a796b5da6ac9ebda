// The linear family: checks, shapes, allocation and choice of path. No arithmetic.
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mm.h>
#include <c10/util/Exception.h>

#include "masking.h"
#include "ops.h"
#include "parallel.h"
#include "path.h"

namespace masked_ops {
namespace {

void check_same_kind(const char* name, const at::Tensor& tensor, const char* other_name, const at::Tensor& other) {
  TORCH_CHECK(tensor.device() == other.device(), name, " must be on the device of ", other_name, ", ", other.device(),
              ", got ", tensor.device());
  TORCH_CHECK(tensor.scalar_type() == other.scalar_type(), name, " must have the dtype of ", other_name, ", ",
              other.scalar_type(), ", got ", tensor.scalar_type());
}

void check_last_dim(const char* name, const at::Tensor& tensor, const char* other_name, int64_t size) {
  TORCH_CHECK(tensor.dim() > 0 && tensor.size(-1) == size, name, " must have ", size, " features in its last dimension, as ",
              other_name, " has, got shape ", tensor.sizes());
}

// What the three operations share once the arguments are checked: M, N, K and the path.
struct Plan {
  int64_t M, N, K;
  PatternPtr pattern;
  Path path;

  Plan(int64_t rows, int64_t out_features, int64_t in_features, const at::Tensor& weight_like, const at::Tensor& mask)
      : M(rows), N(out_features), K(in_features), pattern(try_pattern_of(mask)) {
    path = choose_linear(M, weight_like, pattern.get()).path;
    if (M == 0 || N == 0 || K == 0) path = Path::kCopy;  // nothing to compute; torch knows the shapes
  }
  cpu::Team team() const { return team_for(M * N * K); }
};

int64_t rows_of(const at::Tensor& t) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < t.dim(); ++i) rows *= t.size(i);
  return rows;
}

at::Tensor with_last_dim(const at::Tensor& like, int64_t size) {
  at::DimVector sizes(like.sizes());
  sizes.back() = size;
  return at::empty(sizes, like.options());
}

at::Tensor as_matrix(const at::Tensor& t, int64_t cols) { return t.reshape({rows_of(t), cols}); }

}  // namespace

at::Tensor apply_mask(const at::Tensor& weight, const at::Tensor& mask) {
  check_mask(weight, mask);
  return masked_weight(weight, mask);
}

at::Tensor linear(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& mask,
                  const std::optional<at::Tensor>& bias) {
  check_mask(weight, mask);
  check_same_kind("input", input, "weight", weight);
  TORCH_CHECK(weight.dim() == 1 || weight.dim() == 2, "weight must have 1 or 2 dimensions, got shape ", weight.sizes());
  check_last_dim("input", input, "weight", weight.size(-1));
  const bool has_bias = bias && bias->defined();
  if (has_bias) check_same_kind("bias", *bias, "weight", weight);
  // Anything but a vector of N goes to torch, which broadcasts it or says what is wrong.
  const bool plain = weight.dim() == 2 && (!has_bias || (bias->dim() == 1 && bias->size(0) == weight.size(0)));
  if (!plain) return at::linear(input, masked_weight(weight, mask), bias);

  const Plan plan(rows_of(input), weight.size(0), weight.size(1), weight, mask);
  if (plan.path == Path::kCopy) return at::linear(input, masked_weight(weight, mask), bias);
  at::Tensor output = with_last_dim(input, plan.N);
  const at::Tensor x = input.contiguous();
  const at::Tensor b = has_bias ? bias->contiguous() : at::Tensor();
  cpu::kernels().linear(plan.team(), plan.M, plan.N, plan.K, x.const_data_ptr<float>(), weight.const_data_ptr<float>(),
                        plan.pattern->bits(), has_bias ? b.const_data_ptr<float>() : nullptr,
                        output.mutable_data_ptr<float>());
  return output;
}

at::Tensor linear_grad_input(const at::Tensor& grad_output, const at::Tensor& weight, const at::Tensor& mask) {
  check_mask(weight, mask);
  check_same_kind("grad_output", grad_output, "weight", weight);
  TORCH_CHECK(weight.dim() == 2, "weight must have 2 dimensions, got shape ", weight.sizes());
  check_last_dim("grad_output", grad_output, "weight", weight.size(0));

  const Plan plan(rows_of(grad_output), weight.size(0), weight.size(1), weight, mask);
  if (plan.path == Path::kCopy) {
    at::Tensor grad_input = with_last_dim(grad_output, plan.K);
    at::Tensor rows = grad_input.view({plan.M, plan.K});
    at::mm_out(rows, as_matrix(grad_output, plan.N), masked_weight(weight, mask).conj());
    return grad_input;
  }
  at::Tensor grad_input = with_last_dim(grad_output, plan.K);
  const at::Tensor dy = grad_output.contiguous();
  cpu::kernels().linear_grad_input(plan.team(), plan.M, plan.N, plan.K, dy.const_data_ptr<float>(),
                                   weight.const_data_ptr<float>(), plan.pattern->bits(),
                                   grad_input.mutable_data_ptr<float>());
  return grad_input;
}

at::Tensor linear_grad_weight(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& mask) {
  TORCH_CHECK(mask.dim() == 2, "mask must have 2 dimensions, got shape ", mask.sizes());
  check_same_kind("input", input, "grad_output", grad_output);
  check_last_dim("grad_output", grad_output, "mask", mask.size(0));
  check_last_dim("input", input, "mask", mask.size(1));
  TORCH_CHECK(grad_output.sizes().slice(0, grad_output.dim() - 1) == input.sizes().slice(0, input.dim() - 1),
              "grad_output and input must agree in all but their last dimension, got shapes ", grad_output.sizes(),
              " and ", input.sizes());

  at::Tensor grad_weight = at::empty(mask.sizes(), grad_output.options());
  check_mask(grad_weight, mask);
  const Plan plan(rows_of(grad_output), mask.size(0), mask.size(1), grad_weight, mask);
  if (plan.path == Path::kCopy) {
    at::mm_out(grad_weight, as_matrix(grad_output, plan.N).t(), as_matrix(input, plan.K).conj());
    return masked_weight(grad_weight, mask);
  }
  const at::Tensor dy = grad_output.contiguous(), x = input.contiguous();
  cpu::kernels().linear_grad_weight(plan.team(), plan.M, plan.N, plan.K, dy.const_data_ptr<float>(),
                                    x.const_data_ptr<float>(), plan.pattern->bits(),
                                    grad_weight.mutable_data_ptr<float>());
  return grad_weight;
}

std::tuple<std::string, std::string> explain_linear(const at::Tensor& weight, const at::Tensor& mask, int64_t batch) {
  check_mask(weight, mask);
  const PatternPtr pattern = try_pattern_of(mask);
  const Choice choice = choose_linear(batch, weight, pattern.get());
  return {path_name(choice.path), choice.reason};
}

}  // namespace masked_ops
