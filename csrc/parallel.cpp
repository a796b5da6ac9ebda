#include "parallel.h"

#include <ATen/Parallel.h>

#include <algorithm>

#include "cpu/tasks.h"

namespace masked_ops {
namespace {

// Waking torch's threads takes 2 to 4 us, in which one core does about this much.
constexpr int64_t kSerialOperations = 1 << 17;

// Of products, the multiplications that take as long: of few rows, whose weights are read once, and of more, which wait
// for the threads several times. Two cores far from each other, as two virtual ones may be, ask for more still: 128
// rows with 128 x 64 weights take 9.9 us on one thread, and on two 7.2 or 14; with 256 x 128, 35, and 21 or 30.
constexpr int64_t kFewRows = 16, kMultiplicationsOfFew = 2, kMultiplications = 8;

void run_serial(int64_t tasks, void* context, void (*body)(void*, int64_t)) {
  for (int64_t task = 0; task < tasks; ++task) body(context, task);
}

void run_parallel(int64_t tasks, void* context, void (*body)(void*, int64_t)) {
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), tasks);
  if (threads <= 1) return run_serial(tasks, context, body);
  cpu::TaskQueue queue(tasks, threads);
  at::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t number = first; number < last; ++number) {
      cpu::TaskQueue::Worker worker(queue, number);
      for (int64_t task; (task = worker.take()) >= 0;) body(context, task);
    }
  });
}

}  // namespace

cpu::Team team_for(int64_t operations) {
  if (operations < kSerialOperations || at::in_parallel_region()) return {1, run_serial};
  const int threads = at::get_num_threads();
  return threads > 1 ? cpu::Team{threads, run_parallel} : cpu::Team{1, run_serial};
}

cpu::Team team_for_product(int64_t M, int64_t weights, int64_t further) {
  const int64_t rows = M <= kFewRows ? std::max<int64_t>(M / kMultiplicationsOfFew, 1) : M / kMultiplications;
  return team_for(rows * weights + further);
}

}  // namespace masked_ops
