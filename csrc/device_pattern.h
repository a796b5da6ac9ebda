// What is known of a mask, or of packed bits, on a device. Nothing here makes the host wait for the device: a mask is
// packed at its second use, the facts come back while other work goes on, and until they are here the calls read the
// mask itself. (A path that is forced, a report, and new packed bits are waited for, once.)
#pragma once

#include <array>
#include <mutex>
#include <optional>

#include "device_channels.h"
#include "device_ops.h"
#include "pattern.h"

namespace masked_ops::device {

class DevicePattern final : public Cached {
 public:
  // Of a packable mask (cols -1), a matrix as for Pattern; or of packed bits uint8 [rows][ceil(cols / 8)]. patience is
  // the use from which on it is worth packing: it grows with every rewriting, so that a mask that is written before
  // every step is not packed in vain.
  DevicePattern(const at::Tensor& mask, int64_t cols, int patience);

  int64_t rows() const { return rows_; }
  int64_t cols() const { return cols_; }

  // One more use of this version of the mask, which is passed again. Whether the facts below are known; wait makes
  // them. kernels says whether the words are wanted, or torch's own operations do with keep().
  bool ready(const at::Tensor& mask, bool kernels, bool wait) const;
  // The same without a use: nothing is asked of the device.
  bool known() const;

  // Once ready:
  bool binary() const { return binary_; }
  int64_t nnz() const { return nnz_; }
  int64_t stray() const { return stray_; }
  // The share of the mask that is left without its empty rows and columns; 1 if that was not counted.
  double share_left() const;
  // Which rows and channels are left; null if all are, or none is, or the words were not wanted.
  std::shared_ptr<DeviceChannels> channels(const RowOrder& order) const;
  // Where the mask, which is passed again, is not 0: a bool matrix.
  at::Tensor keep_of(const at::Tensor& mask) const;

  // Where the mask is not 0: a bool tensor of the mask's shape, contiguous; undefined if the words were wanted.
  at::Tensor keep(const c10::Stream& stream) const;
  // The bits; undefined if keep was wanted.
  at::Tensor words(const c10::Stream& stream) const;

  // Made when first asked for, out of the words. Undefined if it cannot be made, and in a capture if it was not made
  // and settled before.
  at::Tensor offsets(const c10::Stream& stream, bool capture) const;
  at::Tensor decode_index(const c10::Stream& stream, bool capture) const;
  at::Tensor fragments(const c10::Stream& stream, bool transposed) const;
  // These values laid out, data undefined if they are not: that is done at their second use, or now, and kept until
  // others come. Unless now, only if that takes little memory.
  struct LaidOut {
    Layout layout;
    at::Tensor data;
  };
  LaidOut laid_out(Form form, const at::Tensor& values, const c10::Stream& stream, bool capture, bool now) const;
  // Whether it is there, or may be without anything else being forgotten: more than there is room for would be made
  // anew at every use.
  bool form_has_room(Form form) const;
  bool index_has_room() const;
  // Where the remaining weights lie in the flat matrix: int64 [nnz], out of keep.
  at::Tensor places(const c10::Stream& stream, bool capture) const;

  int patience() const { return patience_; }
  bool started() const;

  bool same_bits(const Cached&) const override { return false; }
  size_t bytes() const override;

 private:
  void start(const at::Tensor& mask, bool kernels) const;
  bool finish(bool wait) const;
  at::Tensor derived(SharedBuffer& slot, const c10::Stream& stream, bool capture,
                     const std::function<at::Tensor()>& make) const;

  int64_t rows_, cols_;
  bool bits_;  // packed bits, not a mask
  int patience_;

  mutable std::mutex mutex_;  // of what follows
  mutable int uses_ = 0;
  mutable bool started_ = false, ready_ = false;
  mutable bool with_words_ = false;
  mutable at::Tensor host_facts_;  // int64, as cuda::MaskFacts
  mutable SharedBuffer facts_, keep_, words_, offsets_, index_, fragments_[2], places_;
  struct ValuesSeen {
    c10::weak_intrusive_ptr<c10::StorageImpl> storage;
    const void* data;
    uint32_t version;
  };
  struct FormBuffers {
    SharedBuffer order, pieces, data;
    int64_t data_bytes = 0;
    std::optional<ValuesSeen> seen;  // what is, or may be next time, in data

    std::array<SharedBuffer*, 3> buffers() { return {&order, &pieces, &data}; }
    size_t bytes() const { return order.bytes() + pieces.bytes() + data.bytes(); }
  };
  mutable FormBuffers forms_[kForms];
  mutable std::shared_ptr<DeviceChannels> channels_;
  mutable bool binary_ = false;
  mutable int64_t nnz_ = 0, stray_ = 0, live_rows_ = 0, live_cols_ = 0;
};

using DevicePatternPtr = std::shared_ptr<const DevicePattern>;

// Out of the cache, or new to it. Null for inference tensors, which have no version: what is known of them may be old.
DevicePatternPtr device_pattern_of(const at::Tensor& mask);
DevicePatternPtr device_pattern_of_bits(const at::Tensor& bits, int64_t cols);

}  // namespace masked_ops::device
