#include "device_channels.h"

#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/nonzero_static.h>

#include "pattern_cache.h"

namespace masked_ops::device {

at::Tensor DeviceChannels::by_channel(const at::Tensor& keep) const {
  const int64_t rows = keep.size(0);
  return order_.channels_last ? keep.view({rows, order_.taps, order_.others}).transpose(1, 2)
                              : keep.view({rows, order_.others, order_.taps});
}

void DeviceChannels::start(const at::Tensor& keep, const c10::Stream& stream) {
  const at::Tensor count = by_channel(keep).any(2).any(0).sum();
  host_others_ = at::empty({}, at::TensorOptions(at::kLong).pinned_memory(at::hasCUDA()));
  host_others_.copy_(count, /*non_blocking=*/true);
  count_.fill(count, stream);
}

std::optional<DeviceChannels::Left> DeviceChannels::left(const MakeKeep& keep, const c10::Stream& stream, bool capture,
                                                         bool wait) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (others_ < 0) {
    if (capture) return {};
    if (!count_.defined()) start(keep(), stream);
    if (wait) count_.wait();
    if (!count_.ask_settled()) return {};
    others_ = *host_others_.const_data_ptr<int64_t>();
    host_others_.reset();
  }
  return Left{rows_, others_, full()};
}

void DeviceChannels::place(const at::Tensor& keep, const c10::Stream& stream) {
  at::Tensor left = by_channel(keep), rows, others;
  if (rows_ < all_rows_) rows = at::nonzero_static(left.any(2).any(1), rows_).squeeze(1);
  if (others_ < order_.others) others = at::nonzero_static(left.any(2).any(0), others_).squeeze(1);
  if (!full()) {
    if (rows.defined()) left = left.index_select(0, rows);
    if (others.defined()) left = left.index_select(1, others);
    drop_.fill(left.logical_not().contiguous(), stream);
  }
  if (rows.defined()) row_places_.fill(rows, stream);
  if (others.defined()) other_places_.fill(others, stream);
  placed_ = true;
}

std::optional<DeviceChannels::Places> DeviceChannels::places(const MakeKeep& keep, const c10::Stream& stream,
                                                             bool capture) {
  Places result;
  bool grown = false;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!placed_) {
      if (capture) return {};
      place(keep(), stream);
      grown = true;
    }
    const auto read = [&](SharedBuffer& buffer, at::Tensor& to) {
      if (!buffer.defined()) return true;
      if (!capture) buffer.ask_settled();
      if (capture && !buffer.settled()) return false;
      to = buffer.on(stream);
      return true;
    };
    const bool settled =
        read(row_places_, result.rows) && read(other_places_, result.others) && read(drop_, result.drop);
    if (!settled) return {};
  }
  if (grown) trim_cache();
  return result;
}

size_t DeviceChannels::bytes() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return count_.bytes() + row_places_.bytes() + other_places_.bytes() + drop_.bytes();
}

}  // namespace masked_ops::device
