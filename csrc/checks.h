// Argument checks and shapes that the families share. Messages name the argument, what came and what is accepted.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

namespace masked_ops {

inline void check_defined(const char* name, const at::Tensor& tensor) {
  TORCH_CHECK_TYPE(tensor.defined(), name, " must be a Tensor, got None");
}

inline void check_same_kind(const char* name, const at::Tensor& tensor, const char* other_name,
                            const at::Tensor& other) {
  TORCH_CHECK(tensor.device() == other.device(), name, " must be on the device of ", other_name, ", ", other.device(),
              ", got ", tensor.device());
  TORCH_CHECK(tensor.scalar_type() == other.scalar_type(), name, " must have the dtype of ", other_name, ", ",
              other.scalar_type(), ", got ", tensor.scalar_type());
}

inline void check_last_dim(const char* name, const at::Tensor& tensor, const char* other_name,
                           const c10::SymInt& size) {
  TORCH_CHECK(tensor.dim() > 0 && tensor.sym_size(-1) == size, name, " must have ", size,
              " features in its last dimension, as ", other_name, " has, got shape ", tensor.sym_sizes());
}

inline void check_same_rows(const at::Tensor& grad_output, const at::Tensor& input) {
  TORCH_CHECK(grad_output.sizes().slice(0, grad_output.dim() - 1) == input.sizes().slice(0, input.dim() - 1),
              "grad_output and input must agree in all but their last dimension, got shapes ", grad_output.sizes(),
              " and ", input.sizes());
}

inline int64_t rows_of(const at::Tensor& t) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < t.dim(); ++i) rows *= t.size(i);
  return rows;
}

inline at::Tensor as_matrix(const at::Tensor& t, int64_t cols) { return t.reshape({rows_of(t), cols}); }

// What masked_linear takes, whichever way it then goes.
void check_linear(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& mask,
                  const std::optional<at::Tensor>& bias);

// Uninitialised, of the sizes of like but for the last one.
at::Tensor empty_with_last_dim(const at::Tensor& like, int64_t size);

}  // namespace masked_ops
