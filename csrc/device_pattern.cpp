#include "device_pattern.h"

#include <ATen/Context.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/nonzero_static.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstring>

#include "device_tuning.h"

namespace masked_ops::device {
namespace {

constexpr int kFirstPatience = 2, kMostPatience = 64;
constexpr int64_t kFacts = sizeof(cuda::MaskFacts) / sizeof(int64_t);

// Packed bits as bool [rows][8 * bytes].
at::Tensor all_bits(const at::Tensor& bits) {
  const at::Tensor shifts = at::arange(8, bits.options());
  return bits.unsqueeze(-1).bitwise_right_shift(shifts).bitwise_and(1).flatten(1).to(at::kBool);
}

// By torch's own operations: where the mask is not 0, and a cuda::MaskFacts without the live rows and columns.
std::pair<at::Tensor, at::Tensor> keep_and_facts(const at::Tensor& mask, int64_t cols) {
  at::Tensor keep, soft, stray;
  const at::Tensor none = at::zeros({}, at::TensorOptions(at::kLong).device(mask.device()));
  if (cols >= 0) {
    const at::Tensor all = all_bits(mask);
    keep = all.narrow(1, 0, cols).contiguous();
    soft = none;
    stray = all.narrow(1, cols, all.size(1) - cols).any().to(at::kLong);
  } else {
    keep = mask.ne(0).contiguous();
    soft = keep.logical_and(mask.ne(1)).any().to(at::kLong);
    stray = none;
  }
  return {keep, at::stack({keep.sum(), soft, none, none, stray})};
}

}  // namespace

DevicePattern::DevicePattern(const at::Tensor& mask, int64_t cols, int patience)
    : rows_(mask.dim() > 1 ? mask.size(0) : 1),
      cols_(cols >= 0 ? cols
            : rows_   ? mask.numel() / rows_
                      : 0),
      bits_(cols >= 0),
      patience_(patience) {}

bool DevicePattern::ready(const at::Tensor& mask, bool kernels, bool wait) const {
  bool grown = false;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (started_ && with_words_ != kernels) {
      if (captured()) return false;
      started_ = ready_ = false;  // the other form is wanted now
      for (SharedBuffer* buffer : {&keep_, &words_, &offsets_, &index_, &fragments_[0], &fragments_[1], &places_}) {
        *buffer = SharedBuffer();
      }
      for (FormBuffers& form : forms_) form = FormBuffers();
      channels_.reset();
    }
    if (!started_) {
      if (++uses_ < patience_ && !wait) return false;
      try {
        start(mask, kernels);
        grown = true;
      } catch (const c10::OutOfMemoryError&) {
        if (wait) throw;
        uses_ = 0;  // the call can do without; another time, perhaps
        return false;
      }
    }
    if (!ready_ && !finish(wait)) return false;
  }
  if (grown) trim_cache();
  return true;
}

bool DevicePattern::known() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return ready_;
}

bool DevicePattern::started() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return started_;
}

void DevicePattern::start(const at::Tensor& mask, bool kernels) const {
  const Launch launch(mask.device());
  const at::Tensor values = mask.contiguous();
  at::Tensor facts;
  if (kernels) {
    const Packed packed = bits_ ? pack_bits(*api(), values, cols_) : pack_mask(*api(), values, rows_, cols_);
    words_.fill(packed.words, launch.torch_stream());
    facts = packed.facts;
  } else {
    at::Tensor keep;
    std::tie(keep, facts) = keep_and_facts(values, bits_ ? cols_ : -1);
    keep_.fill(keep, launch.torch_stream());
  }
  // Pinned memory, to which the copy does not wait for what it copies.
  host_facts_ = at::empty({kFacts}, at::TensorOptions(at::kLong).pinned_memory(at::hasCUDA()));
  host_facts_.copy_(facts, /*non_blocking=*/true);
  facts_.fill(facts, launch.torch_stream());
  with_words_ = kernels;
  started_ = true;
}

bool DevicePattern::finish(bool wait) const {
  if (wait) facts_.wait();
  if (!facts_.ask_settled()) return false;
  cuda::MaskFacts facts;
  std::memcpy(&facts, host_facts_.const_data_ptr<int64_t>(), sizeof(facts));
  nnz_ = facts.nnz;
  binary_ = facts.soft == 0;
  stray_ = facts.stray;
  live_rows_ = facts.live_rows;
  live_cols_ = facts.live_cols;
  (with_words_ ? words_ : keep_).ask_settled();  // they were written before the facts
  host_facts_.reset();
  ready_ = true;
  return true;
}

at::Tensor DevicePattern::keep(const c10::Stream& stream) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return with_words_ ? at::Tensor() : keep_.on(stream);
}

at::Tensor DevicePattern::words(const c10::Stream& stream) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return with_words_ ? words_.on(stream) : at::Tensor();
}

double DevicePattern::share_left() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return with_words_ && nnz_ > 0 ? double(live_rows_ * live_cols_) / double(rows_ * cols_) : 1;
}

std::shared_ptr<DeviceChannels> DevicePattern::channels(const RowOrder& order) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!with_words_ || nnz_ == 0 || (live_rows_ == rows_ && live_cols_ == cols_)) return nullptr;
  if (channels_ && channels_->order() == order) return channels_;
  if (channels_ && captured()) return nullptr;  // a graph reads what is there
  const int64_t others = order.taps == 1 ? live_cols_ : live_cols_ == cols_ ? order.others : -1;
  channels_ = std::make_shared<DeviceChannels>(order, rows_, live_rows_, others, nnz_);
  return channels_;
}

at::Tensor DevicePattern::keep_of(const at::Tensor& mask) const {
  if (bits_) return all_bits(mask).narrow(1, 0, cols_).contiguous();
  return mask.ne(0).contiguous().view({rows_, cols_});
}

at::Tensor DevicePattern::derived(SharedBuffer& slot, const c10::Stream& stream, bool capture,
                                  const std::function<at::Tensor()>& make) const {
  at::Tensor result;
  bool grown = false;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!slot.defined()) {
      if (capture) return {};
      const at::Tensor made = make();
      if (!made.defined()) return {};
      slot.fill(made, stream);
      grown = true;
    }
    if (!capture) {
      slot.ask_settled();
    } else if (slot.settled()) {
      mark_captured();
    } else {
      return {};
    }
    result = slot.on(stream);
  }
  if (grown) trim_cache();
  return result;
}

at::Tensor DevicePattern::offsets(const c10::Stream& stream, bool capture) const {
  return derived(offsets_, stream, capture, [&] { return row_offsets(*api(), words_.on(stream), rows_, cols_); });
}

at::Tensor DevicePattern::decode_index(const c10::Stream& stream, bool capture) const {
  const at::Tensor begins = offsets(stream, capture);
  if (!begins.defined()) return {};
  return derived(index_, stream, capture,
                 [&] { return device::decode_index(*api(), words_.on(stream), rows_, cols_, nnz_, begins); });
}

at::Tensor DevicePattern::fragments(const c10::Stream& stream, bool transposed) const {
  return derived(fragments_[transposed], stream, /*capture=*/false,
                 [&] { return device::fragments(*api(), words_.on(stream), rows_, cols_, transposed); });
}

namespace {

// That are worth it.
int64_t most_bytes(Form form, int64_t nnz) {
  return int64_t((form == Form::kSlices ? cuda::kMostSlicedBytes : cuda::kMostGatheredBytes) * double(nnz));
}

}  // namespace

DevicePattern::LaidOut DevicePattern::laid_out(Form which, const at::Tensor& values, const c10::Stream& stream,
                                               bool capture, bool now) const {
  const at::Tensor begins = offsets(stream, capture);
  if (!begins.defined() || values.is_inference()) return {};
  LaidOut result{};
  bool grown = false;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    FormBuffers& form = forms_[static_cast<size_t>(which)];
    const uint32_t version = values.unsafeGetTensorImpl()->version_counter().current_version();
    const auto* const storage = values.storage().unsafeGetStorageImpl();
    const bool seen = form.seen && form.seen->storage._unsafe_get_target() == storage &&
                      form.seen->data == values.const_data_ptr() && form.seen->version == version;
    if (!seen) {
      if (capture || (form.data.defined() && captured())) return {};  // a graph may read what is there
      form.data = SharedBuffer();
      form.seen = {values.storage().getWeakStorageImpl(), values.const_data_ptr(), version};
      if (!now) return {};
    }
    if (!form.data.defined()) {
      if (capture) return {};
      if (!form.pieces.defined()) {
        const Layout layout = lay_out(*api(), which, words_.on(stream), begins, rows_, cols_);
        form.order.fill(layout.order, stream);
        form.pieces.fill(layout.pieces, stream);
        form.data_bytes = layout.bytes;
      }
      if (!now && form.data_bytes > most_bytes(which, nnz_)) return {};
    }
    const Layout layout{form.order.on(stream), form.pieces.on(stream), form.data_bytes};
    if (!form.data.defined()) {
      form.data.fill(fill(*api(), which, layout, words_.on(stream), begins, cols_, values), stream);
      if (!captured()) index_ = SharedBuffer();  // decode's, made anew if it is wanted
      grown = true;
    }
    for (SharedBuffer* buffer : form.buffers()) {
      if (!buffer->defined()) continue;
      if (!capture) {
        buffer->ask_settled();
      } else if (!buffer->settled()) {
        return {};
      }
    }
    if (capture) mark_captured();
    result = {layout, form.data.on(stream)};
  }
  if (grown) trim_cache();
  return result;
}

bool DevicePattern::form_has_room(Form form) const {
  int64_t most;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (forms_[static_cast<size_t>(form)].data.defined()) return true;
    most = most_bytes(form, nnz_);
  }
  return cache_has_room(most);
}

bool DevicePattern::index_has_room() const {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (index_.defined()) return true;
  }
  return cache_has_room(int64_t(api()->decode_index_bytes(rows_, cols_, nnz_)));
}

at::Tensor DevicePattern::places(const c10::Stream& stream, bool capture) const {
  return derived(places_, stream, capture,
                 [&] { return at::nonzero_static(keep_.on(stream).flatten(), nnz_).squeeze(1); });
}

size_t DevicePattern::bytes() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return sizeof(*this) + facts_.bytes() + keep_.bytes() + words_.bytes() + offsets_.bytes() + index_.bytes() +
         fragments_[0].bytes() + fragments_[1].bytes() + places_.bytes() + forms_[0].bytes() + forms_[1].bytes() +
         (channels_ ? channels_->bytes() : 0);
}

namespace {

DevicePatternPtr pattern_of(const at::Tensor& tensor, int64_t cols) {
  if (tensor.is_inference()) return nullptr;
  return std::static_pointer_cast<const DevicePattern>(cached_of(tensor, cols, [&](const Cached* stale) {
    int patience = kFirstPatience;
    if (const auto* before = static_cast<const DevicePattern*>(stale)) {
      patience = before->started() ? std::min(2 * before->patience(), kMostPatience) : before->patience();
    }
    return std::make_shared<const DevicePattern>(tensor, cols, patience);
  }));
}

}  // namespace

DevicePatternPtr device_pattern_of(const at::Tensor& mask) { return pattern_of(mask, -1); }
DevicePatternPtr device_pattern_of_bits(const at::Tensor& bits, int64_t cols) { return pattern_of(bits, cols); }

}  // namespace masked_ops::device
