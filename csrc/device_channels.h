// Which rows and channels a mask on a device leaves: what the compact path there works on. It is made by torch's own
// operations and without waiting: the rows are counted with the mask's other facts, the channels arrive later.
#pragma once

#include <functional>
#include <mutex>
#include <optional>

#include "device.h"

namespace masked_ops::device {

// How the columns of a mask are those of channels: [others][taps], or, channels_last, [taps][others]. The weight of a
// linear layer has one tap.
struct RowOrder {
  int64_t others, taps = 1;
  bool channels_last = false;
  bool operator==(const RowOrder&) const = default;
};

class DeviceChannels {
 public:
  // rows hold a remaining weight, of all_rows; others is the number of those that do if it is known, else negative.
  DeviceChannels(RowOrder order, int64_t all_rows, int64_t rows, int64_t others, int64_t nnz)
      : order_(order), all_rows_(all_rows), rows_(rows), nnz_(nnz), others_(others) {}

  const RowOrder& order() const { return order_; }

  // Where the mask is not 0: bool, the mask's matrix. It is asked for when something has to be made of it.
  using MakeKeep = std::function<at::Tensor()>;

  struct Left {
    int64_t rows, others;  // how many hold a remaining weight
    bool full;             // and nothing else
  };
  // Nothing while it is not known; wait makes it known.
  std::optional<Left> left(const MakeKeep& keep, const c10::Stream& stream, bool capture, bool wait);

  struct Places {
    at::Tensor rows, others;  // int64, ascending; undefined if all are left
    at::Tensor drop;          // bool, the mask of what is left without them, inverted; undefined if it is full
  };
  // Once it is known how many are left. Nothing in a capture, if they were not made and settled before.
  std::optional<Places> places(const MakeKeep& keep, const c10::Stream& stream, bool capture);

  size_t bytes() const;

 private:
  at::Tensor by_channel(const at::Tensor& keep) const;  // [rows][others][taps]
  void start(const at::Tensor& keep, const c10::Stream& stream);
  void place(const at::Tensor& keep, const c10::Stream& stream);
  bool full() const { return nnz_ == rows_ * others_ * order_.taps; }

  const RowOrder order_;
  const int64_t all_rows_, rows_, nnz_;

  mutable std::mutex mutex_;  // of what follows
  int64_t others_;
  at::Tensor host_others_;  // until it is known
  SharedBuffer count_, row_places_, other_places_, drop_;
  bool placed_ = false;
};

}  // namespace masked_ops::device
