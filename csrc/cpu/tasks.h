// How the threads of a team share tasks.
#pragma once

#include <cstdint>

#include "inline.h"

namespace masked_ops::cpu {

// Tasks [0, tasks), of which each worker has a share of neighbours. It takes these in order, then what others have
// left: at the next call, the caches of a thread have what it read and wrote at this one, and a thread that is late or
// slow does less.
class TaskQueue {
 public:
  MASKED_OPS_INLINE TaskQueue(int64_t tasks, int64_t workers)
      : tasks_(tasks), shares_(workers < kMostShares ? workers : kMostShares) {
    for (int64_t i = 0; i < shares_; ++i) share_[i].next = begin(i);
  }
  TaskQueue(const TaskQueue&) = delete;
  TaskQueue& operator=(const TaskQueue&) = delete;

  class Worker {
   public:
    MASKED_OPS_INLINE Worker(TaskQueue& queue, int64_t number)
        : queue_(queue), share_(number % queue.shares_), left_(queue.shares_) {}
    // The next task; -1 if there is none.
    MASKED_OPS_INLINE int64_t take() {
      for (; left_ > 0; --left_, share_ = (share_ + 1) % queue_.shares_) {
        const int64_t task = __atomic_fetch_add(&queue_.share_[share_].next, 1, __ATOMIC_RELAXED);
        if (task < queue_.begin(share_ + 1)) return task;
      }
      return -1;
    }

   private:
    TaskQueue& queue_;
    int64_t share_, left_;
  };

 private:
  static constexpr int64_t kMostShares = 64;
  struct alignas(64) Share {
    int64_t next;
  };
  MASKED_OPS_INLINE int64_t begin(int64_t share) const { return tasks_ * share / shares_; }

  int64_t tasks_, shares_;
  Share share_[kMostShares];
};

}  // namespace masked_ops::cpu
