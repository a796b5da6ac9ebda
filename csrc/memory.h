// Where large results lie, and what lives no longer than a call.
#pragma once

#include <ATen/core/Tensor.h>

namespace masked_ops {

// As at::empty. From 8 MB on, on a CPU, in the memory of a result of this size that is no more, if one is kept, and on
// huge pages where the system has them.
at::Tensor empty_result(at::IntArrayRef sizes, const at::TensorOptions& options,
                        at::MemoryFormat format = at::MemoryFormat::Contiguous);
// Of the shape and the strides of `like`, which is dense.
at::Tensor empty_result_like(const at::Tensor& like);

// The memory of results that are no more, kept for the next ones: at most MASKED_OPS_RESULT_BYTES, 256 MiB unless set.
int64_t kept_result_bytes();
void release_kept_results();

// A tensor in memory that the thread keeps for the next one, warm in its caches. What is as large as a large result is
// one, and what is asked for while another one lives is fresh. Whoever still holds the tensor at the end keeps its
// memory.
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

void release_kept_scratch();  // of the calling thread

}  // namespace masked_ops
