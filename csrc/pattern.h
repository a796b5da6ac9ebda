// What is known of a mask: its bits, whether it is binary, and the index structures of the sparse kernels.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <memory>
#include <mutex>
#include <tuple>
#include <vector>

#include "cpu/api.h"
#include "pattern_cache.h"

namespace masked_ops {

// The kernels' name of a dtype that is packable.
cpu::Dtype dtype_of(at::ScalarType dtype);

// The index of one orientation, owned; it belongs to the kernels that made it.
class Index {
 public:
  Index(const cpu::Kernels& kernels, cpu::SparseIndex* index) : kernels_(&kernels), index_(index) {}
  ~Index() { cpu::free_index(index_); }
  Index(const Index&) = delete;
  Index& operator=(const Index&) = delete;
  const cpu::Kernels& kernels() const { return *kernels_; }
  const cpu::SparseIndex& get() const { return *index_; }
  size_t bytes() const { return cpu::index_bytes(*index_); }

 private:
  const cpu::Kernels* kernels_;
  cpu::SparseIndex* index_;
};

class Pattern;
struct Channels;

// What is left of a mask without its empty rows and columns.
struct Compact {
  at::Tensor rows, cols;  // the others, int64, ascending
  std::shared_ptr<const Pattern> pattern;
};

// Does not change once it is made, so that any thread can read it while another replaces it in the cache; the index
// structures are added when first asked for.
class Pattern final : public Cached {
 public:
  // A mask of any rank is the matrix [sizes[0]][the rest]; of one or no dimension, one row.
  explicit Pattern(const at::Tensor& mask);
  // From packed bits: uint8 [rows][ceil(cols / 8)], little bit order. Throws if a bit beyond cols is set.
  Pattern(const at::Tensor& bits, int64_t cols);
  // The rows and columns that are listed, of another.
  Pattern(const Pattern& whole, at::IntArrayRef rows, at::IntArrayRef cols);

  int64_t rows() const { return rows_; }
  int64_t cols() const { return cols_; }
  int64_t nnz() const { return nnz_; }
  bool binary() const { return binary_; }
  double density() const { return rows_ * cols_ ? double(nnz_) / double(rows_ * cols_) : 0.0; }
  cpu::Bits bits() const { return {words_.data(), stride_}; }
  bool same_bits(const Cached& other) const override {
    const auto* pattern = dynamic_cast<const Pattern*>(&other);
    return pattern && binary_ == pattern->binary_ && words_ == pattern->words_;
  }

  std::unique_lock<std::mutex> locked() const override { return std::unique_lock<std::mutex>(mutex_); }

  // Rows and columns that hold a remaining weight; and which columns do, as bits.
  int64_t live_rows() const { return live_rows_; }
  int64_t live_cols() const { return live_cols_; }
  std::vector<uint64_t> live_col_bits() const;
  // The share of the remaining weights that lie in blocks of rows that an index takes together (sparse_index.h).
  double blocked() const { return nnz_ ? double(blocked_) / double(nnz_) : 0.0; }
  bool any_in_rows(int64_t first, int64_t count) const;

  // Where each row begins among the remaining weights in row-major order; rows + 1 numbers.
  const int64_t* offsets() const;
  // The remaining weights by rows, for one row of input.
  bool has_row_columns() const { return cols_ <= cpu::kMaxColumns; }
  cpu::Rows row_columns() const;
  // How many a row has before each multiple of cpu::kRankColumns columns.
  const uint32_t* ranks() const;
  // Whether an index can address the matrix.
  bool indexable() const {
    return rows_ < cpu::kMaxIndexSide && cols_ < cpu::kMaxIndexSide && nnz_ < cpu::kMaxIndexNnz;
  }
  // The index for the kernels in use: of the weight as it lies, or of its transpose.
  std::shared_ptr<const Index> index(bool transposed) const;
  // The same for a convolution with this weight; kept for the last geometry that was asked for.
  std::shared_ptr<const Index> conv_index(const cpu::Convolution& geometry, bool transposed) const;
  std::shared_ptr<const Compact> compact() const;
  // What is left of the channels of a convolution's weight, see channels.h; kept for what was asked for last.
  std::shared_ptr<const Channels> channels(int64_t kernel, int64_t groups, bool channels_last = false) const;

  size_t bytes() const override;

 private:
  // What decides on the index of a convolution.
  using ConvKey = std::array<int64_t, 12>;
  struct ConvIndex {
    ConvKey key;
    std::shared_ptr<const Index> index;
  };
  static ConvKey conv_key(const cpu::Convolution& geometry);

  void count_live();
  void count_blocked();

  int64_t rows_, cols_, stride_;
  int64_t nnz_ = 0, live_rows_ = 0, live_cols_ = 0, blocked_ = 0;
  bool binary_ = true;
  std::vector<uint64_t> words_;

  mutable std::mutex mutex_;  // of what follows
  mutable std::vector<int64_t> offsets_;
  mutable std::vector<uint16_t> columns_;
  mutable std::vector<uint32_t> ranks_;
  mutable std::shared_ptr<const Index> indices_[2];
  mutable ConvIndex conv_indices_[2];
  mutable std::shared_ptr<const Compact> compact_;
  mutable std::shared_ptr<const Channels> channels_;
  mutable std::tuple<int64_t, int64_t, bool> channels_key_;
};

using PatternPtr = std::shared_ptr<const Pattern>;

// Whether the pattern of a mask of this dtype can be taken; the others (complex, quantized, 8-bit floats) are soft.
bool packable(at::ScalarType dtype);

// The pattern of a packable mask in CPU memory, out of the cache where that is possible: inference tensors have no
// version counter, and theirs is made anew.
PatternPtr pattern_of(const at::Tensor& mask);

// A view of the mask whose version is the mask's: below autograd torch gives a view a counter of its own, by which no
// edit of the mask would be seen.
at::Tensor with_version_of(const at::Tensor& mask, at::Tensor view);

// The same of packed bits.
PatternPtr pattern_of_bits(const at::Tensor& bits, int64_t cols);

}  // namespace masked_ops
