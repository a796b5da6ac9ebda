#include "sparse.h"

#include "parallel.h"

namespace masked_ops {
namespace {

cpu::Team team_of(const Pattern& pattern, int64_t M) { return team_for(M * pattern.nnz()); }

// One row fills no vector of lanes.
bool takes_vector(const Pattern& pattern, int64_t M) { return M == 1 && pattern.has_row_columns(); }

}  // namespace

void sparse_linear(const Pattern& pattern, const at::Tensor& values, int64_t M, const at::Tensor& x,
                   const at::Tensor& bias, const at::Tensor& y) {
  const float* const b = bias.defined() ? bias.const_data_ptr<float>() : nullptr;
  if (takes_vector(pattern, M)) {
    cpu::kernels().spmv(team_of(pattern, M), pattern.row_columns(), values.const_data_ptr<float>(),
                        x.const_data_ptr<float>(), b, y.mutable_data_ptr<float>());
    return;
  }
  const auto index = pattern.index(/*transposed=*/false);
  index->kernels().spmm(team_of(pattern, M), index->get(), values.const_data_ptr<float>(), M, x.const_data_ptr<float>(),
                        b, y.mutable_data_ptr<float>());
}

void sparse_grad_input(const Pattern& pattern, const at::Tensor& values, int64_t M, const at::Tensor& dy,
                       const at::Tensor& dx) {
  if (takes_vector(pattern, M)) {
    cpu::kernels().spmv_transposed(team_of(pattern, M), pattern.row_columns(), pattern.cols(),
                                   values.const_data_ptr<float>(), dy.const_data_ptr<float>(),
                                   dx.mutable_data_ptr<float>());
    return;
  }
  const auto index = pattern.index(/*transposed=*/true);
  index->kernels().spmm(team_of(pattern, M), index->get(), values.const_data_ptr<float>(), M,
                        dy.const_data_ptr<float>(), nullptr, dx.mutable_data_ptr<float>());
}

void sparse_grad_values(const Pattern& pattern, int64_t M, const at::Tensor& dy, const at::Tensor& x,
                        const at::Tensor& grad_values) {
  if (takes_vector(pattern, M)) {
    cpu::kernels().sampled_outer(team_of(pattern, M), pattern.row_columns(), dy.const_data_ptr<float>(),
                                 x.const_data_ptr<float>(), grad_values.mutable_data_ptr<float>());
    return;
  }
  const auto index = pattern.index(/*transposed=*/false);
  index->kernels().sddmm(team_of(pattern, M), index->get(), M, dy.const_data_ptr<float>(), x.const_data_ptr<float>(),
                         grad_values.mutable_data_ptr<float>());
}

}  // namespace masked_ops
