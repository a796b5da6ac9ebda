#include "parallel.h"

#include <ATen/Parallel.h>

#include <atomic>

namespace masked_ops {
namespace {

// Waking torch's threads takes 2 to 4 us, in which one core does about this much.
constexpr int64_t kSerialOperations = 1 << 17;

void run_serial(int64_t tasks, void* context, void (*body)(void*, int64_t)) {
  for (int64_t task = 0; task < tasks; ++task) body(context, task);
}

// Tasks are handed out one by one: cores that are busy with something else take fewer.
void run_parallel(int64_t tasks, void* context, void (*body)(void*, int64_t)) {
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), tasks);
  if (threads <= 1) return run_serial(tasks, context, body);
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) body(context, task);
  });
}

}  // namespace

cpu::Team team_for(int64_t operations) {
  if (operations < kSerialOperations || at::in_parallel_region()) return {1, run_serial};
  const int threads = at::get_num_threads();
  return threads > 1 ? cpu::Team{threads, run_parallel} : cpu::Team{1, run_serial};
}

}  // namespace masked_ops
