// What is known of a mask: its bits, and whether it is binary. Derived once and cached for as long as the mask lives and
// its version counter stands still.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <vector>

#include "cpu/api.h"

namespace masked_ops {

// Immutable, so that it can be read by any thread while another replaces it in the cache.
class Pattern {
 public:
  // A mask of any rank is the matrix [sizes[0]][the rest]; of one or no dimension, one row.
  explicit Pattern(const at::Tensor& mask);

  int64_t rows() const { return rows_; }
  int64_t cols() const { return cols_; }
  int64_t nnz() const { return nnz_; }
  bool binary() const { return binary_; }
  double density() const { return rows_ * cols_ ? double(nnz_) / double(rows_ * cols_) : 0.0; }
  cpu::Bits bits() const { return {words_.data(), stride_}; }
  size_t bytes() const { return sizeof(*this) + words_.size() * sizeof(uint64_t); }
  bool same_bits(const Pattern& other) const { return binary_ == other.binary_ && words_ == other.words_; }

 private:
  int64_t rows_, cols_, stride_;
  int64_t nnz_ = 0;
  bool binary_ = true;
  std::vector<uint64_t> words_;
};

using PatternPtr = std::shared_ptr<const Pattern>;

// Whether the pattern of a mask of this dtype can be taken; the others (complex, quantized, 8-bit floats) are soft.
bool packable(at::ScalarType dtype);

// The pattern of a packable mask in CPU memory, out of the cache where that is possible: inference tensors have no
// version counter, and theirs is made anew.
PatternPtr pattern_of(const at::Tensor& mask);

struct CacheInfo {
  int64_t entries = 0;
  int64_t bytes = 0;
  int64_t limit_bytes = 0;
  int64_t hits = 0;
  int64_t misses = 0;   // masks not seen before, and those that cannot be cached
  int64_t repacks = 0;  // masks seen before in another version
};

CacheInfo cache_info();
void clear_cache();

}  // namespace masked_ops
