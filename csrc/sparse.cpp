#include "sparse.h"

#include <ATen/ops/empty.h>

#include "masking.h"
#include "memory.h"
#include "parallel.h"

namespace masked_ops {
namespace {

// For a product of M rows with the remaining weights, by themselves or compressed on the way.
cpu::Team sparse_team(const Pattern& pattern, int64_t M, bool compresses) {
  return team_for_product(M, pattern.nnz(), compresses ? pattern.rows() * pattern.cols() : 0);
}

// One row fills no vector of lanes.
bool takes_vector(const Pattern& pattern, int64_t M) { return M == 1 && pattern.has_row_columns(); }

}  // namespace

void sparse_linear(const Pattern& pattern, const at::Tensor& values, int64_t M, const at::Tensor& x,
                   const at::Tensor& bias, const at::Tensor& y) {
  const void* const b = bias.defined() ? bias.const_data_ptr() : nullptr;
  if (takes_vector(pattern, M)) {
    cpu::kernels().spmv(sparse_team(pattern, M, false), pattern.row_columns(), pattern.cols(),
                        dtype_of(x.scalar_type()), values.const_data_ptr(), x.const_data_ptr(), b,
                        y.mutable_data_ptr());
    return;
  }
  const auto index = pattern.index(/*transposed=*/false);
  index->kernels().spmm(sparse_team(pattern, M, false), index->get(), dtype_of(x.scalar_type()),
                        values.const_data_ptr(), M, x.const_data_ptr(), b, y.mutable_data_ptr());
}

at::Tensor sparse_linear_of_dense(const Pattern& pattern, const at::Tensor& weight, int64_t M, const at::Tensor& x,
                                  const at::Tensor& bias, const at::Tensor& y) {
  if (takes_vector(pattern, M)) {
    const at::Tensor values = compress(weight, pattern);
    sparse_linear(pattern, values, M, x, bias, y);
    return values;
  }
  at::Tensor values = empty_result({pattern.nnz()}, weight.options());
  const auto index = pattern.index(/*transposed=*/false);
  index->kernels().compress_spmm(sparse_team(pattern, M, true), index->get(), dtype_of(x.scalar_type()), pattern.bits(),
                                 pattern.offsets(), weight.const_data_ptr(), values.mutable_data_ptr(), M,
                                 x.const_data_ptr(), bias.defined() ? bias.const_data_ptr() : nullptr,
                                 y.mutable_data_ptr());
  return values;
}

void sparse_grad_input(const Pattern& pattern, const at::Tensor& values, int64_t M, const at::Tensor& dy,
                       const at::Tensor& dx) {
  if (takes_vector(pattern, M)) {
    cpu::kernels().spmv_transposed(sparse_team(pattern, M, false), pattern.row_columns(), pattern.cols(),
                                   dtype_of(dy.scalar_type()), values.const_data_ptr(), dy.const_data_ptr(),
                                   dx.mutable_data_ptr());
    return;
  }
  const auto index = pattern.index(/*transposed=*/true);
  index->kernels().spmm(sparse_team(pattern, M, false), index->get(), dtype_of(dy.scalar_type()),
                        values.const_data_ptr(), M, dy.const_data_ptr(), nullptr, dx.mutable_data_ptr());
}

void sparse_grad_values(const Pattern& pattern, int64_t M, const at::Tensor& dy, const at::Tensor& x,
                        const at::Tensor& grad_values) {
  if (takes_vector(pattern, M)) {
    cpu::kernels().sampled_outer(sparse_team(pattern, M, false), pattern.row_columns(), pattern.cols(),
                                 dtype_of(dy.scalar_type()), dy.const_data_ptr(), x.const_data_ptr(),
                                 grad_values.mutable_data_ptr());
    return;
  }
  const auto index = pattern.index(/*transposed=*/false);
  index->kernels().sddmm(sparse_team(pattern, M, false), index->get(), dtype_of(dy.scalar_type()), M,
                         dy.const_data_ptr(), x.const_data_ptr(), grad_values.mutable_data_ptr());
}

at::Tensor sparse_gradients(const Pattern& pattern, const at::Tensor& values, int64_t M, const at::Tensor& dy,
                            const at::Tensor& x, const at::Tensor& dx, const at::Tensor& grad_values, bool of_bias) {
  const auto index = pattern.index(/*transposed=*/false), transposed = pattern.index(/*transposed=*/true);
  if (takes_vector(pattern, M) || dy.scalar_type() != at::kFloat || &index->kernels() != &transposed->kernels()) {
    sparse_grad_input(pattern, values, M, dy, dx);
    sparse_grad_values(pattern, M, dy, x, grad_values);
    return {};
  }
  const at::Tensor grad_bias = of_bias ? at::empty({pattern.rows()}, dy.options()) : at::Tensor();
  index->kernels().sparse_gradients(
      sparse_team(pattern, M, false), index->get(), transposed->get(), values.const_data_ptr<float>(), M,
      dy.const_data_ptr<float>(), x.const_data_ptr<float>(), dx.mutable_data_ptr<float>(),
      grad_values.mutable_data_ptr<float>(), of_bias ? grad_bias.mutable_data_ptr<float>() : nullptr);
  return grad_bias;
}

}  // namespace masked_ops
