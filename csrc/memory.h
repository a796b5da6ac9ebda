// Where large results lie.
#pragma once

#include <ATen/core/Tensor.h>

namespace masked_ops {

// A fresh tensor, on huge pages where the system has them and the tensor is large; its contents are untouched.
at::Tensor on_huge_pages(at::Tensor fresh);

}  // namespace masked_ops
