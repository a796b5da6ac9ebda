// The linear family: checks, shapes, allocation and choice of path. No arithmetic.
#include <ATen/ExpandUtils.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mm.h>

#include "checks.h"
#include "device_linear.h"
#include "masking.h"
#include "memory.h"
#include "ops.h"
#include "parallel.h"
#include "path.h"
#include "sparse.h"

namespace masked_ops {
namespace {

// What the three operations share once the arguments are checked: M, N, K, the pattern and the path.
struct Plan {
  int64_t M, N, K;
  PatternPtr pattern;
  Path path;
  cpu::Dtype dtype = {};  // of the kernels, where the path has any

  Plan(Pass pass, int64_t rows, const at::Tensor& weight, const at::Tensor& mask, bool have_values = false)
      : M(rows), N(weight.size(0)), K(weight.size(1)), pattern(try_pattern_of(mask)) {
    path = choose_linear(pass, M, weight, pattern.get(), have_values).path;
    if (M == 0 || N == 0 || K == 0) path = Path::kCopy;  // nothing to compute; torch knows the shapes
    if (path != Path::kCopy) dtype = dtype_of(weight.scalar_type());
  }
  cpu::Team team() const { return team_for_product(M, N * K); }
};

// The compact path: each operation on what is left of its operands without the empty rows and columns of the mask. What
// belongs to those is the bias, or zero.
struct CompactPlan {
  const Compact& compact;
  int64_t M;
  cpu::Dtype dtype;

  int64_t N() const { return compact.pattern->rows(); }
  int64_t K() const { return compact.pattern->cols(); }
  cpu::Team team() const { return team_for_product(M, N() * K()); }
  at::Tensor live_out(const at::Tensor& matrix) const { return matrix.index_select(1, compact.rows); }
  at::Tensor live_in(const at::Tensor& matrix) const { return matrix.index_select(1, compact.cols); }
  at::Tensor live(const at::Tensor& weight) const {
    const at::Tensor rows = N() < weight.size(0) ? weight.index_select(0, compact.rows) : weight;
    return K() < weight.size(1) ? rows.index_select(1, compact.cols) : rows;
  }

  void forward(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& y) const {
    if (bias.defined()) {
      y.copy_(bias.expand_as(y));
    } else {
      y.zero_();
    }
    if (N() == 0) return;
    const at::Tensor live_x = live_in(x), live_weight = live(weight), live_y = at::empty({M, N()}, y.options());
    const at::Tensor live_bias = bias.defined() ? bias.index_select(0, compact.rows) : bias;
    cpu::kernels().linear(team(), dtype, M, N(), K(), live_x.const_data_ptr(), live_weight.const_data_ptr(),
                          compact.pattern->bits(), bias.defined() ? live_bias.const_data_ptr() : nullptr,
                          live_y.mutable_data_ptr());
    y.index_copy_(1, compact.rows, live_y);
  }

  void grad_input(const at::Tensor& dy, const at::Tensor& weight, const at::Tensor& dx) const {
    dx.zero_();
    if (N() == 0) return;
    const at::Tensor live_dy = live_out(dy), live_weight = live(weight), live_dx = at::empty({M, K()}, dx.options());
    cpu::kernels().linear_grad_input(team(), dtype, M, N(), K(), live_dy.const_data_ptr(), live_weight.const_data_ptr(),
                                     compact.pattern->bits(), live_dx.mutable_data_ptr());
    dx.index_copy_(1, compact.cols, live_dx);
  }

  void grad_weight(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& dw) const {
    dw.zero_();
    if (N() == 0) return;
    const at::Tensor live_dy = live_out(dy), live_x = live_in(x), live_dw = at::empty({N(), K()}, dw.options());
    cpu::kernels().linear_grad_weight(team(), dtype, M, N(), K(), live_dy.const_data_ptr(), live_x.const_data_ptr(),
                                      compact.pattern->bits(), live_dw.mutable_data_ptr());
    dw.index_put_({compact.rows.unsqueeze(1), compact.cols}, live_dw);
  }
};

}  // namespace

at::Tensor empty_with_last_dim(const at::Tensor& like, int64_t size) {
  at::DimVector sizes(like.sizes());
  sizes.back() = size;
  return empty_result(sizes, like.options());
}

void check_linear(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& mask,
                  const std::optional<at::Tensor>& bias) {
  check_defined("input", input);
  check_mask(weight, mask);
  check_same_kind("input", input, "weight", weight);
  TORCH_CHECK(weight.dim() == 1 || weight.dim() == 2, "weight must have 1 or 2 dimensions, got shape ",
              weight.sym_sizes());
  check_last_dim("input", input, "weight", weight.sym_size(-1));
  if (!bias || !bias->defined()) return;
  check_same_kind("bias", *bias, "weight", weight);
  at::SymDimVector output(input.sym_sizes().slice(0, input.dim() - 1));
  if (weight.dim() == 2) output.push_back(weight.sym_size(0));
  TORCH_CHECK(at::is_expandable_to(bias->sym_sizes(), output), "bias must broadcast to the output, ",
              c10::SymIntArrayRef(output), ", got shape ", bias->sym_sizes());
}

at::Tensor apply_mask(const at::Tensor& weight, const at::Tensor& mask, std::optional<at::ScalarType> dtype) {
  check_mask(weight, mask);
  if (!dtype) return masked_weight(weight, mask);
  check_cast(weight, *dtype);
  return masked_cast(weight, mask, *dtype);
}

std::tuple<at::Tensor, at::Tensor> linear_with_values(const at::Tensor& input, const at::Tensor& weight,
                                                      const at::Tensor& mask, const std::optional<at::Tensor>& bias) {
  check_linear(input, weight, mask, bias);
  const bool has_bias = bias && bias->defined();
  // Anything but a vector of N goes to torch, which broadcasts it.
  const bool plain = weight.dim() == 2 && (!has_bias || (bias->dim() == 1 && bias->size(0) == weight.size(0)));
  if (!plain) return {at::linear(input, masked_weight(weight, mask), bias), at::Tensor()};
  if (weight.is_cuda()) return device::linear(input, weight, mask, has_bias ? *bias : at::Tensor());

  const Plan plan(Pass::kForward, rows_of(input), weight, mask);
  if (plan.path == Path::kCopy) return {at::linear(input, masked_weight(weight, mask), bias), at::Tensor()};
  at::Tensor output = empty_with_last_dim(input, plan.N), values;
  const at::Tensor x = input.contiguous();
  const at::Tensor b = has_bias ? bias->contiguous() : at::Tensor();
  if (plan.path == Path::kCompact) {
    const auto compact = plan.pattern->compact();
    CompactPlan{*compact, plan.M, plan.dtype}.forward(as_matrix(x, plan.K), weight, b, output.view({plan.M, plan.N}));
  } else if (plan.path == Path::kSparse) {
    values = sparse_linear_of_dense(*plan.pattern, weight, plan.M, x, b, output);
  } else {
    cpu::kernels().linear(plan.team(), plan.dtype, plan.M, plan.N, plan.K, x.const_data_ptr(), weight.const_data_ptr(),
                          plan.pattern->bits(), has_bias ? b.const_data_ptr() : nullptr, output.mutable_data_ptr());
  }
  return {output, values};
}

at::Tensor linear(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& mask,
                  const std::optional<at::Tensor>& bias) {
  return std::get<0>(linear_with_values(input, weight, mask, bias));
}

at::Tensor linear_grad_input_with_values(const at::Tensor& grad_output, const at::Tensor& weight,
                                         const at::Tensor& mask, const at::Tensor& values) {
  check_mask(weight, mask);
  check_same_kind("grad_output", grad_output, "weight", weight);
  TORCH_CHECK(weight.dim() == 2, "weight must have 2 dimensions, got shape ", weight.sizes());
  check_last_dim("grad_output", grad_output, "weight", weight.size(0));
  if (weight.is_cuda()) return device::linear_grad_input(grad_output, weight, mask, values);

  const Plan plan(Pass::kGradInput, rows_of(grad_output), weight, mask, values.defined());
  at::Tensor grad_input = empty_with_last_dim(grad_output, plan.K);
  if (plan.path == Path::kCopy) {
    at::Tensor rows = grad_input.view({plan.M, plan.K});
    at::mm_out(rows, as_matrix(grad_output, plan.N), masked_weight(weight, mask).conj());
    return grad_input;
  }
  const at::Tensor dy = grad_output.contiguous();
  if (plan.path == Path::kCompact) {
    const auto compact = plan.pattern->compact();
    CompactPlan{*compact, plan.M, plan.dtype}.grad_input(as_matrix(dy, plan.N), weight,
                                                         grad_input.view({plan.M, plan.K}));
  } else if (plan.path == Path::kSparse) {
    sparse_grad_input(*plan.pattern, remaining(values, weight, *plan.pattern), plan.M, dy, grad_input);
  } else {
    cpu::kernels().linear_grad_input(plan.team(), plan.dtype, plan.M, plan.N, plan.K, dy.const_data_ptr(),
                                     weight.const_data_ptr(), plan.pattern->bits(), grad_input.mutable_data_ptr());
  }
  return grad_input;
}

at::Tensor linear_grad_input(const at::Tensor& grad_output, const at::Tensor& weight, const at::Tensor& mask) {
  return linear_grad_input_with_values(grad_output, weight, mask, at::Tensor());
}

at::Tensor linear_grad_weight(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& mask) {
  TORCH_CHECK(mask.dim() == 2, "mask must have 2 dimensions, got shape ", mask.sizes());
  check_same_kind("input", input, "grad_output", grad_output);
  check_last_dim("grad_output", grad_output, "mask", mask.size(0));
  check_last_dim("input", input, "mask", mask.size(1));
  check_same_rows(grad_output, input);

  at::Tensor grad_weight = empty_result(mask.sizes(), grad_output.options());
  check_mask(grad_weight, mask);
  if (mask.is_cuda()) return device::linear_grad_weight(grad_output, input, mask, grad_weight);
  const Plan plan(Pass::kGradWeight, rows_of(grad_output), grad_weight, mask);
  if (plan.path == Path::kCopy) {
    at::mm_out(grad_weight, as_matrix(grad_output, plan.N).t(), as_matrix(input, plan.K).conj());
    return masked_weight(grad_weight, mask);
  }
  const at::Tensor dy = grad_output.contiguous(), x = input.contiguous();
  if (plan.path == Path::kCompact) {
    const auto compact = plan.pattern->compact();
    CompactPlan{*compact, plan.M, plan.dtype}.grad_weight(as_matrix(dy, plan.N), as_matrix(x, plan.K), grad_weight);
  } else if (plan.path == Path::kSparse) {
    const at::Tensor values = empty_result({plan.pattern->nnz()}, grad_output.options());
    sparse_grad_values(*plan.pattern, plan.M, dy, x, values);
    expand_into(grad_weight, values, *plan.pattern);
  } else {
    cpu::kernels().linear_grad_weight(plan.team(), plan.dtype, plan.M, plan.N, plan.K, dy.const_data_ptr(),
                                      x.const_data_ptr(), plan.pattern->bits(), grad_weight.mutable_data_ptr());
  }
  return grad_weight;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_gradients(const at::Tensor& grad_output, const at::Tensor& input,
                                                                const at::Tensor& weight, const at::Tensor& mask,
                                                                const at::Tensor& values, bool of_bias) {
  const Plan plan(Pass::kGradInput, rows_of(grad_output), weight, mask, /*have_values=*/true);
  if (plan.path != Path::kSparse || Plan(Pass::kGradWeight, plan.M, weight, mask).path != Path::kSparse) {
    return {linear_grad_input_with_values(grad_output, weight, mask, values),
            linear_grad_weight(grad_output, input, mask), at::Tensor()};
  }
  at::Tensor grad_input = empty_with_last_dim(grad_output, plan.K);
  at::Tensor grad_weight = empty_result(mask.sizes(), grad_output.options());
  const at::Tensor grad_values = empty_result({plan.pattern->nnz()}, grad_output.options());
  const at::Tensor grad_bias =
      sparse_gradients(*plan.pattern, remaining(values, weight, *plan.pattern), plan.M, grad_output.contiguous(),
                       input.contiguous(), grad_input, grad_values, of_bias);
  expand_into(grad_weight, grad_values, *plan.pattern);
  return {grad_input, grad_weight, grad_bias};
}

std::tuple<std::string, std::string> explain_linear(const at::Tensor& weight, const at::Tensor& mask, int64_t batch,
                                                    bool by_input) {
  check_mask(weight, mask);
  const Pass pass = by_input ? Pass::kGradInput : Pass::kForward;
  if (weight.is_cuda()) return device::explain_linear(pass, weight, mask, batch);
  const PatternPtr pattern = try_pattern_of(mask);
  if (pattern) pattern->mark_reused();  // the answer is about a layer that is called again and again
  const Choice choice = choose_linear(pass, batch, weight, pattern.get());
  return {path_name(choice.path), choice.reason};
}

}  // namespace masked_ops
