#include "pattern.h"

#include <ATen/ops/tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <exception>

#include "channels.h"
#include "cpu/sparse_index.h"
#include "parallel.h"

namespace masked_ops {

cpu::Dtype dtype_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kBool:
    case at::kByte:
      return cpu::Dtype::kByte;
    case at::kChar:
      return cpu::Dtype::kInt8;
    case at::kShort:
      return cpu::Dtype::kInt16;
    case at::kInt:
      return cpu::Dtype::kInt32;
    case at::kLong:
      return cpu::Dtype::kInt64;
    case at::kHalf:
      return cpu::Dtype::kHalf;
    case at::kBFloat16:
      return cpu::Dtype::kBFloat16;
    case at::kFloat:
      return cpu::Dtype::kFloat;
    case at::kDouble:
      return cpu::Dtype::kDouble;
    default:
      TORCH_INTERNAL_ASSERT(false, "no kernel takes dtype ", dtype);
  }
}

namespace {

// n zeros; without memory for them, the error that the kernels have for it.
template <typename T>
std::vector<T> zeros(int64_t n, const char* purpose) {
  try {
    return std::vector<T>(static_cast<size_t>(n));
  } catch (const std::exception&) {  // too many for the memory, or for any
    throw cpu::OutOfMemory(static_cast<size_t>(n) * sizeof(T), purpose);
  }
}

std::vector<uint64_t> zero_words(int64_t n) { return zeros<uint64_t>(n, "the bits of a mask"); }

}  // namespace

Pattern::Pattern(const at::Tensor& mask) {
  const at::Tensor values = mask.contiguous();
  rows_ = mask.dim() > 1 ? mask.size(0) : 1;
  cols_ = rows_ ? mask.numel() / rows_ : 0;
  stride_ = (cols_ + 63) / 64;
  words_ = zero_words(rows_ * stride_);
  const cpu::MaskFacts facts = cpu::kernels().pack_mask(team_for(values.numel()), dtype_of(values.scalar_type()),
                                                        values.const_data_ptr(), rows_, cols_, words_.data());
  nnz_ = facts.nnz;
  binary_ = facts.binary;
  count_live();
}

Pattern::Pattern(const at::Tensor& bits, int64_t cols)
    : rows_(bits.size(0)), cols_(cols), stride_(cols / 64 + (cols % 64 != 0)), words_(zero_words(rows_ * stride_)) {
  const at::Tensor values = bits.contiguous();
  const int64_t bytes = values.size(1);
  const uint8_t* from = values.const_data_ptr<uint8_t>();
  for (int64_t row = 0; row < rows_ && cols > 0; ++row) {
    uint64_t* words = words_.data() + row * stride_;
    std::copy_n(from + row * bytes, bytes, reinterpret_cast<uint8_t*>(words));
    for (int64_t i = 0; i < stride_; ++i) nnz_ += __builtin_popcountll(words[i]);
    TORCH_CHECK(cols % 64 == 0 || words[stride_ - 1] >> (cols % 64) == 0, "weight_bits must have zero bits beyond the ",
                cols, " columns of the weight, but row ", row, " has others");
  }
  count_live();
}

Pattern::Pattern(const Pattern& whole, at::IntArrayRef rows, at::IntArrayRef cols)
    : rows_(static_cast<int64_t>(rows.size())),
      cols_(static_cast<int64_t>(cols.size())),
      stride_((cols_ + 63) / 64),
      words_(zero_words(rows_ * stride_)),
      nnz_(whole.nnz_) {
  for (int64_t i = 0; i < rows_; ++i) {
    const uint64_t* from = whole.bits().row(rows[i]);
    uint64_t* to = words_.data() + i * stride_;
    if (cols_ == whole.cols_) {
      std::copy_n(from, stride_, to);
      continue;
    }
    for (int64_t j = 0; j < cols_; ++j) to[j / 64] |= (from[cols[j] / 64] >> (cols[j] % 64) & 1) << (j % 64);
  }
  count_live();
}

std::vector<uint64_t> Pattern::live_col_bits() const {
  std::vector<uint64_t> any = zero_words(stride_);
  for (int64_t row = 0; row < rows_; ++row) {
    const uint64_t* words = bits().row(row);
    for (int64_t i = 0; i < stride_; ++i) any[i] |= words[i];
  }
  return any;
}

bool Pattern::any_in_rows(int64_t first, int64_t count) const {
  uint64_t any = 0;
  for (int64_t i = 0; i < count * stride_; ++i) any |= bits().row(first)[i];
  return any != 0;
}

void Pattern::count_live() {
  if (nnz_ == 0) return;  // and there may be any number of rows, if none has a column
  for (int64_t row = 0; row < rows_; ++row) live_rows_ += any_in_rows(row, 1);
  for (const uint64_t word : live_col_bits()) live_cols_ += __builtin_popcountll(word);
  count_blocked();
}

// As sparse_index.cpp finds them, but for the ends of its panels.
void Pattern::count_blocked() {
  constexpr int64_t kRows = cpu::SparseIndex::kBlockRows;
  const int64_t width = cpu::block_cols(density()) / 64;
  for (int64_t first = 0; first < stride_; first += width) {
    const int64_t words = std::min(width, stride_ - first);
    for (int64_t row = 0; row + kRows <= rows_; ++row) {
      const uint64_t* const block = bits().row(row) + first;
      int64_t same = 1;
      while (same < kRows && std::equal(block, block + words, block + same * stride_)) ++same;
      if (same < kRows) continue;
      for (int64_t i = 0; i < words; ++i) blocked_ += kRows * __builtin_popcountll(block[i]);
      row += kRows - 1;
    }
  }
}

std::shared_ptr<const Compact> Pattern::compact() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!compact_) {
    std::vector<int64_t> rows, cols;
    for (int64_t row = 0; row < rows_; ++row) {
      if (any_in_rows(row, 1)) rows.push_back(row);
    }
    const std::vector<uint64_t> any = live_col_bits();
    for (int64_t col = 0; col < cols_; ++col) {
      if (any[col / 64] >> (col % 64) & 1) cols.push_back(col);
    }
    const auto tensor = [](const std::vector<int64_t>& v) { return at::tensor(v, at::kLong); };
    compact_ = std::make_shared<const Compact>(
        Compact{tensor(rows), tensor(cols), std::make_shared<const Pattern>(*this, rows, cols)});
  }
  return compact_;
}

std::shared_ptr<const Channels> Pattern::channels(int64_t kernel, int64_t groups, bool channels_last) const {
  const std::tuple key(kernel, groups, channels_last);
  std::shared_ptr<const Channels> result;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (channels_ && channels_key_ == key) return channels_;
    channels_ = std::make_shared<const Channels>(channels_of(*this, kernel, groups, channels_last));
    channels_key_ = key;
    result = channels_;
  }
  trim_cache();
  return result;
}

const int64_t* Pattern::offsets() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (offsets_.empty()) {
    offsets_ = zeros<int64_t>(rows_ + 1, "the rows of a mask");
    cpu::kernels().row_offsets(team_for(rows_ * stride_), bits(), rows_, cols_, offsets_.data());
  }
  return offsets_.data();
}

cpu::Rows Pattern::row_columns() const {
  const int64_t* const starts = offsets();
  bool grown = false;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (columns_.empty()) {
      columns_ = zeros<uint16_t>(nnz_ + cpu::kColumnsPadding, "the columns of a mask");
      cpu::kernels().row_columns(team_for(rows_ * stride_), bits(), rows_, cols_, starts, columns_.data());
      grown = true;
    }
  }
  if (grown) trim_cache();
  return {rows_, starts, columns_.data()};
}

const uint32_t* Pattern::ranks() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (ranks_.empty()) {
    const int64_t parts = (cols_ + cpu::kRankColumns - 1) / cpu::kRankColumns;
    ranks_ = zeros<uint32_t>(rows_ * parts, "the parts of a mask's rows");
    cpu::kernels().row_ranks(team_for(rows_ * stride_), bits(), rows_, cols_, ranks_.data());
  }
  return ranks_.data();
}

std::shared_ptr<const Index> Pattern::index(bool transposed) const {
  const int64_t* starts = offsets();
  std::shared_ptr<const Index> result;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::shared_ptr<const Index>& slot = indices_[transposed];
    const cpu::Kernels& kernels = cpu::kernels();
    if (slot && &slot->kernels() == &kernels) return slot;
    slot = std::make_shared<const Index>(
        kernels, kernels.make_index(team_for(rows_ * cols_), bits(), rows_, cols_, starts, transposed));
    result = slot;
  }
  trim_cache();
  return result;
}

Pattern::ConvKey Pattern::conv_key(const cpu::Convolution& c) {
  ConvKey key = {c.in_channels, c.out_channels, c.groups};
  for (size_t d = 0; d < 3; ++d) {
    key[3 + d] = c.kernel[d];
    key[6 + d] = c.stride[d];
    key[9 + d] = c.dilation[d];
  }
  return key;
}

std::shared_ptr<const Index> Pattern::conv_index(const cpu::Convolution& geometry, bool transposed) const {
  const int64_t* starts = offsets();
  const ConvKey key = conv_key(geometry);
  std::shared_ptr<const Index> result;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    ConvIndex& slot = conv_indices_[transposed];
    const cpu::Kernels& kernels = cpu::kernels();
    if (slot.index && &slot.index->kernels() == &kernels && slot.key == key) return slot.index;
    result = std::make_shared<const Index>(
        kernels, kernels.make_conv_index(team_for(rows_ * cols_), bits(), geometry, starts, transposed));
    slot = {key, result};
  }
  trim_cache();
  return result;
}

size_t Pattern::bytes() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  size_t sum = sizeof(*this) + words_.size() * sizeof(uint64_t) + offsets_.size() * sizeof(int64_t) +
               columns_.size() * sizeof(uint16_t) + ranks_.size() * sizeof(uint32_t);
  for (const auto& index : indices_) {
    if (index) sum += index->bytes();
  }
  for (const auto& slot : conv_indices_) {
    if (slot.index) sum += slot.index->bytes();
  }
  if (compact_) sum += compact_->pattern->bytes() + 8 * static_cast<size_t>(live_rows_ + live_cols_);
  if (channels_) sum += channels_->bytes();
  return sum;
}

bool packable(at::ScalarType dtype) {
  return at::isIntegralType(dtype, /*includeBool=*/true)
             ? dtype <= at::kLong || dtype == at::kBool
             : dtype == at::kHalf || dtype == at::kBFloat16 || dtype == at::kFloat || dtype == at::kDouble;
}

// A storage is in CPU memory for good: what the cache holds of it is a Pattern.
PatternPtr pattern_of(const at::Tensor& mask) {
  return std::static_pointer_cast<const Pattern>(
      cached_of(mask, -1, [&](const Cached*) { return std::make_shared<const Pattern>(mask); }));
}

at::Tensor with_version_of(const at::Tensor& mask, at::Tensor view) {
  if (!mask.is_inference()) {
    view.unsafeGetTensorImpl()->set_version_counter(mask.unsafeGetTensorImpl()->version_counter());
  }
  return view;
}

PatternPtr pattern_of_bits(const at::Tensor& bits, int64_t cols) {
  return std::static_pointer_cast<const Pattern>(
      cached_of(bits, cols, [&](const Cached*) { return std::make_shared<const Pattern>(bits, cols); }));
}

}  // namespace masked_ops
