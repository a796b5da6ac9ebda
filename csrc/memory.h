// Where large results lie, and what lives no longer than a call.
#pragma once

#include <ATen/core/Tensor.h>

namespace masked_ops {

// A fresh tensor, on huge pages where the system has them and the tensor is large; its contents are untouched.
at::Tensor on_huge_pages(at::Tensor fresh);

// A tensor in memory that the thread keeps for the next one: fresh memory would have its pages mapped anew at every
// call, which outlasts a pass over it. Up to 64 MB are kept a thread; what is larger, or asked for while another one
// lives, is fresh. Whoever still holds the tensor at the end keeps its memory.
class Scratch {
 public:
  // Of the shape and the strides of `like`, which is dense and in CPU memory.
  explicit Scratch(const at::Tensor& like);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  const at::Tensor& tensor() const { return tensor_; }

 private:
  at::Tensor tensor_;
};

void release_kept();  // of the calling thread

}  // namespace masked_ops
