// The state behind emulator.h: fibres, barriers, and what is under way.
#include <emulator.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <deque>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

uint8_t exchanged[2][kMaxCluster * 32][32 * 64];
int exchange_turn[kMaxCluster * 32];

namespace {

constexpr size_t kStack = 256 << 10, kShared = 228 << 10;
constexpr int kMaxThreads = 1024, kGroups = 256;

struct Meeting {
  int here;
  int turn;
};
struct Fibre {
  ucontext_t context;
  jmp_buf resume;
  std::unique_ptr<uint8_t[]> stack;
  bool started, finished;
  const Meeting* meeting;  // where it waits for this turn to end; null if it can go on
  int turn;

  bool waits() const { return meeting && meeting->turn == turn; }
};
struct Transfer {  // of the asynchronous proxy
  int block;       // of the cluster
  uint32_t to;
  std::vector<uint8_t> bytes;
  bool swizzled;
  uint32_t barrier;
};
struct AsyncCopy {
  uint32_t to;
  const void* from;
  bool there;
};
struct Wgmma {
  int N;
  bool bfloat, transposed_b;
  float* d;
  const uint32_t* a;
  uint32_t at_issue[4];
  uint64_t b;
};

bool is_lazy;
int order_mode;
std::string error;
std::vector<Fibre> fibres;
int current;
jmp_buf scheduler;
const std::function<void()>* body;
uint64_t happened;
Meeting meetings[kMaxCluster][kGroups];
size_t shared_bytes;
alignas(1024) uint8_t shared[kMaxCluster][kShared];
int cluster_blocks;
unsigned first_block;
int64_t bank_conflicts;
std::deque<Transfer> transfers;
std::vector<std::deque<std::vector<AsyncCopy>>> copies;  // by thread of the cluster: groups, the last one open
std::vector<std::deque<std::vector<Wgmma>>> products;
std::vector<char> fenced;

void enter() {
  (*body)();
  fibres[current].finished = true;
  progress();
  _longjmp(scheduler, 1);
}

__attribute__((noinline)) void run(int i) {
  current = i;
  threadIdx = dim3(unsigned(i) % blockDim.x);
  blockIdx.x = first_block + unsigned(i) / blockDim.x;
  Fibre& fibre = fibres[i];
  if (_setjmp(scheduler)) return;
  if (fibre.started) _longjmp(fibre.resume, 1);
  fibre.started = true;
  setcontext(&fibre.context);
}

__attribute__((noinline)) void prepare(Fibre& fibre) {
  getcontext(&fibre.context);
  fibre.context.uc_stack.ss_sp = fibre.stack.get();
  fibre.context.uc_stack.ss_size = kStack;
  fibre.context.uc_link = nullptr;
  fibre.started = fibre.finished = false;
  fibre.meeting = nullptr;
  makecontext(&fibre.context, enter, 0);
}

void deliver(const Transfer& transfer);

bool run_block() {
  const int threads = int(blockDim.x) * cluster_blocks;
  std::vector<int> order(threads);
  std::iota(order.begin(), order.end(), 0);
  if (order_mode == 1) std::reverse(order.begin(), order.end());
  static std::mt19937 random(1);
  std::memset(shared, 0xff, size_t(cluster_blocks) * kShared);
  std::memset(meetings, 0, sizeof meetings);
  std::memset(exchange_turn, 0, sizeof exchange_turn);
  transfers.clear();
  copies.assign(threads, std::deque<std::vector<AsyncCopy>>(1));
  products.assign(threads, std::deque<std::vector<Wgmma>>(1));
  fenced.assign(threads, 0);
  for (int i = 0; i < threads; ++i) prepare(fibres[i]);
  bool hold_back = order_mode == 2;
  for (;;) {
    const uint64_t before = happened;
    if (order_mode == 2) std::shuffle(order.begin(), order.end(), random);
    // At random, some warps stand still for a while, as long as others can go on.
    const uint64_t running = hold_back ? uint64_t(random()) << 32 | random() : ~uint64_t{0};
    bool all = true;
    for (int i : order) {
      if (fibres[i].finished) continue;
      all = false;
      if (!(running >> (i / 32 % 64) & 1) || fibres[i].waits()) continue;
      run(i);
      if (!error.empty()) return false;
    }
    if (all) break;
    const bool stuck = happened == before && !hold_back;
    hold_back = order_mode == 2 && happened != before;
    if (stuck) {
      if (transfers.empty()) {
        error = "deadlock: every thread waits";
        return false;
      }
      // Nothing else can happen. Transfers may arrive in any order.
      const size_t which = order_mode == 2 ? random() % transfers.size() : order_mode == 1 ? transfers.size() - 1 : 0;
      const Transfer transfer = transfers[which];
      transfers.erase(transfers.begin() + long(which));
      deliver(transfer);
    }
  }
  for (int i = 0; i < threads; ++i) {
    if (products[i].size() > 1 || !products[i].back().empty()) error = "a wgmma is still under way at the end";
    for (const auto& group : copies[i]) {
      if (!group.empty()) error = "a cp.async is still under way at the end";
    }
  }
  if (!transfers.empty()) error = "a bulk copy is still under way at the end";
  return error.empty();
}

}  // namespace

int rank() { return current / int(blockDim.x); }
uint8_t* shared_memory() { return shared[rank()]; }
bool lazy() { return is_lazy; }
void progress() { ++happened; }

void fail(const char* what) {
  error = what;
  _longjmp(scheduler, 1);
}

__attribute__((noinline)) void yield() {
  const int me = current;
  if (!_setjmp(fibres[me].resume)) _longjmp(scheduler, 1);
}

void meet(int group, int threads, const std::function<void()>& action) {
  Meeting& meeting = meetings[group == kCluster ? 0 : rank()][group];
  const int turn = meeting.turn;
  progress();
  if (++meeting.here == threads) {
    action();
    meeting.here = 0;
    ++meeting.turn;
    return;
  }
  fibres[current].meeting = &meeting;
  fibres[current].turn = turn;
  yield();
}

int launch(int cluster, dim3 grid, unsigned threads, size_t bytes, const std::function<void()>& kernel) {
  error.clear();
  if (threads == 0 || threads > kMaxThreads || bytes > (227 << 10) || grid.y > 65535 || grid.x == 0 || grid.y == 0 ||
      cluster > kMaxCluster || grid.x % cluster) {
    error = "a launch beyond the device's limits";
    return cudaErrorLaunchFailure;
  }
  while (fibres.size() < threads * size_t(cluster)) {
    fibres.push_back({{}, {}, std::unique_ptr<uint8_t[]>(new uint8_t[kStack]), false, false, nullptr, 0});
  }
  body = &kernel;
  shared_bytes = bytes;
  cluster_blocks = cluster;
  gridDim = grid;
  blockDim = dim3(threads);
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; x += unsigned(cluster)) {
      blockIdx = dim3(x, y);
      first_block = x;
      if (!run_block()) return cudaErrorLaunchFailure;
    }
  }
  return 0;
}

}  // namespace emulator

namespace masked_ops::cuda {

using namespace emulator;

uint8_t* shared_pointer(int block, uint32_t address, uint32_t alignment, uint32_t bytes) {
  if (address % alignment) fail("a misaligned address in shared memory");
  if (address + uint64_t(bytes) > shared_bytes) fail("an address beyond the shared memory");
  return shared[block] + address;
}
uint8_t* shared_pointer(uint32_t address, uint32_t alignment, uint32_t bytes) {
  return shared_pointer(rank(), address, alignment, bytes);
}

// Shared memory ends with the last thread of its block.
void must_live(int block) {
  const size_t first = size_t(block) * blockDim.x;
  for (size_t i = first; i < first + blockDim.x; ++i) {
    if (!fibres[i].finished) return;
  }
  error = "access to the shared memory of a block that has ended";
}

void count_bank_conflicts(const uint32_t* rows) {
  if (lane() != 0) return;
  for (int i = 0; i < 4; ++i) {
    unsigned groups = 0;
    for (int row = 0; row < 8; ++row) groups |= 1u << (rows[8 * i + row] / 16 % 8);
    bank_conflicts += 8 - __builtin_popcount(groups);
  }
}

// --- cp.async ---

namespace {
void perform(const AsyncCopy& copy) {
  uint8_t* to = shared_pointer(copy.to, 16, 16);
  if (copy.there) {
    std::memcpy(to, copy.from, 16);
  } else {
    std::memset(to, 0, 16);
  }
}
}  // namespace

void cp_async16(uint32_t to, const void* from, bool there) {
  if (there && reinterpret_cast<uintptr_t>(from) % 16) fail("a misaligned cp.async");
  const AsyncCopy copy{to, from, there};
  if (!lazy()) perform(copy);
  copies[current].back().push_back(copy);
}
void cp_async_commit() { copies[current].emplace_back(); }
void cp_async_wait_all_but(int groups) {
  auto& mine = copies[current];
  while (int(mine.size()) > groups + 1) {
    if (lazy()) {
      for (const AsyncCopy& copy : mine.front()) perform(copy);
    }
    mine.pop_front();
  }
}

// --- mbarrier ---

namespace {
struct alignas(8) Mbarrier {
  int32_t bytes;
  uint8_t arrivals, pending, parity, valid;
};
Mbarrier& mbarrier(int block, uint32_t address) {
  auto* barrier = reinterpret_cast<Mbarrier*>(shared_pointer(block, address, 8, 8));
  if (barrier->valid != 42) fail("an mbarrier that is not initialised");
  return *barrier;
}
void update(Mbarrier& barrier) {
  if (barrier.pending == 0 && barrier.bytes == 0) {
    barrier.parity ^= 1;
    barrier.pending = barrier.arrivals;
  }
  progress();
}
}  // namespace

void mbarrier_init(uint32_t address, int arrivals) {
  *reinterpret_cast<Mbarrier*>(shared_pointer(address, 8, 8)) = {0, uint8_t(arrivals), uint8_t(arrivals), 0, 42};
}
namespace {
void arrive(int block, uint32_t address, uint32_t bytes) {
  Mbarrier& barrier = mbarrier(block, address);
  if (barrier.pending == 0) fail("more arrivals at an mbarrier than it counts");
  barrier.bytes += int(bytes);
  --barrier.pending;
  update(barrier);
}
}  // namespace
void mbarrier_expect(uint32_t address, uint32_t bytes) { arrive(rank(), address, bytes); }
void mbarrier_arrive(uint32_t address) { arrive(rank(), address, 0); }
bool mbarrier_done(uint32_t address, uint32_t parity) { return mbarrier(rank(), address).parity != parity; }
void cluster_barrier() {
  meet(kCluster, int(blockDim.x) * cluster_blocks, [] {});
}
float4 load_shared_of(uint32_t block, uint32_t address) {
  if (int(block) >= cluster_blocks) fail("a load from a block beyond the cluster");
  must_live(int(block));
  float4 x;
  std::memcpy(&x, shared_pointer(int(block), address, 16, 16), 16);
  return x;
}

}  // namespace masked_ops::cuda

namespace emulator {
namespace {
void deliver(const Transfer& transfer) {
  using namespace masked_ops::cuda;
  must_live(transfer.block);
  for (size_t i = 0; i < transfer.bytes.size(); i += 16) {
    uint32_t to = transfer.to + uint32_t(i);
    if (transfer.swizzled) to ^= (to >> 7 & 7) << 4;
    std::memcpy(shared_pointer(transfer.block, to, 16, 16), transfer.bytes.data() + i, 16);
  }
  Mbarrier& barrier = mbarrier(transfer.block, transfer.barrier);
  barrier.bytes -= int(transfer.bytes.size());
  update(barrier);
}
void transfer(Transfer&& t) {
  if (lazy()) {
    transfers.push_back(std::move(t));
  } else {
    deliver(t);
  }
}
}  // namespace
}  // namespace emulator

namespace masked_ops::cuda {

void bulk_load(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  if (reinterpret_cast<uintptr_t>(from) % 16 || bytes % 16 || to % 16) fail("a misaligned bulk copy");
  const auto* begin = static_cast<const uint8_t*>(from);
  transfer({rank(), to, std::vector<uint8_t>(begin, begin + bytes), false, barrier});
}

void tma_load(uint32_t to, const TensorMap* map, uint32_t barrier, int col, int row) {
  if (to % 1024 || map->box_cols != 64 || map->box_rows > 256) fail("a tensor copy that does not fit its swizzle");
  std::vector<uint8_t> bytes(size_t(map->box_rows) * 128, 0);
  for (int r = 0; r < map->box_rows; ++r) {
    for (int c = 0; c < 64; ++c) {
      if (row + r < map->rows && col + c < map->cols) {
        std::memcpy(&bytes[size_t(r) * 128 + size_t(c) * 2],
                    static_cast<const uint8_t*>(map->base) + (row + r) * map->stride_bytes + (col + c) * 2, 2);
      }
    }
  }
  transfer({rank(), to, std::move(bytes), true, barrier});
}

// --- mma and wgmma ---

namespace {

float half_of(bool bfloat, uint32_t pair, int which) {
  const auto bits = uint16_t(pair >> (16 * which));
  return bfloat ? to_float<true>(bits) : to_float<false>(bits);
}

}  // namespace

void mma_m16n8k16(bool bfloat, float* d, const MmaOperands& mine) {
  const MmaOperands* all = exchange(mine);
  float a[2][16], b[2][16];  // this lane's rows of A and columns of B
  for (int k = 0; k < 16; ++k) {
    for (int i = 0; i < 2; ++i) {
      a[i][k] = half_of(bfloat, all[lane() / 4 * 4 + k % 8 / 2].a[i + 2 * (k / 8)], k % 2);
      b[i][k] = half_of(bfloat, all[(lane() % 4 * 2 + i) * 4 + k % 8 / 2].b[k / 8], k % 2);
    }
  }
  for (int i = 0; i < 4; ++i) {
    for (int k = 0; k < 16; ++k) d[i] += a[i / 2][k] * b[i % 2][k];
  }
}

// wgmma: D[64][N] += A[64][16] B[N][16]^T, A in registers, B in shared memory, swizzled by 128 bytes.

namespace {

// By the canonical layouts of the PTX manual. K-major: rows n of 128 bytes, eight and eight of them a stride apart.
// MN-major (transposed): rows k of 64 n, eight and eight of them a stride apart, and the next 64 n a leading offset.
float b_element(const Wgmma& op, uint32_t n, uint32_t k) {
  const auto field = [&](int bit) { return uint32_t(op.b >> bit & 0x3fff) << 4; };
  const uint32_t start = field(0), leading = field(16), stride = field(32);
  uint32_t address = start;
  if (op.transposed_b) {
    address += n / 64 * leading + n % 64 * 2 + k / 8 * stride + k % 8 * 128;
  } else {
    address += n / 8 * stride + n % 8 * 128 + k * 2;
  }
  address ^= (address >> 7 & 7) << 4;
  uint16_t bits;
  std::memcpy(&bits, shared_pointer(address, 2, 2), 2);
  return half_of(op.bfloat, bits, 0);
}

// One product of the four warps that begin at thread `first`.
void perform(const std::vector<const Wgmma*>& ops) {
  static float a[64][16], b[16][256], sums[64][256];
  const int N = ops[0]->N;
  // Element i of D that thread t has.
  const auto row_of = [](int t, int i) { return t / 32 * 16 + t % 32 / 4 + 8 * (i / 2 % 2); };
  const auto column_of = [](int t, int i) { return i / 4 * 8 + t % 4 * 2 + i % 2; };
  for (int t = 0; t < 128; ++t) {
    const Wgmma& op = *ops[t];
    if (op.b != ops[0]->b || op.N != N || op.transposed_b != ops[0]->transposed_b)
      fail("threads of a warpgroup differ in their wgmma");
    for (int i = 0; i < 4; ++i) {
      if (op.a[i] != op.at_issue[i]) fail("a register of A was written under a wgmma");
      for (int h = 0; h < 2; ++h) {
        a[t / 32 * 16 + t % 32 / 4 + 8 * (i % 2)][t % 4 * 2 + h + 8 * (i / 2)] = half_of(op.bfloat, op.a[i], h);
      }
    }
    for (int i = 0; i < N / 2; ++i) sums[row_of(t, i)][column_of(t, i)] = op.d[i];
  }
  for (int k = 0; k < 16; ++k) {
    for (int n = 0; n < N; ++n) b[k][n] = b_element(*ops[0], uint32_t(n), uint32_t(k));
  }
  for (int row = 0; row < 64; ++row) {
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < N; ++n) sums[row][n] += a[row][k] * b[k][n];
    }
  }
  for (int t = 0; t < 128; ++t) {
    for (int i = 0; i < N / 2; ++i) ops[t]->d[i] = sums[row_of(t, i)][column_of(t, i)];
  }
}

void perform_all_but(int groups) {
  const int first = current / 128 * 128;
  meet(kWarpgroups + int(threadIdx.x) / 128, 128, [&] {
    while (int(products[first].size()) > groups + 1) {
      const size_t count = products[first].front().size();
      for (size_t i = 0; i < count; ++i) {
        std::vector<const Wgmma*> ops;
        for (int t = 0; t < 128; ++t) {
          if (products[first + t].front().size() != count) fail("threads of a warpgroup differ in their wgmma");
          ops.push_back(&products[first + t].front()[i]);
        }
        perform(ops);
      }
      for (int t = 0; t < 128; ++t) products[first + t].pop_front();
    }
  });
}

}  // namespace

void wgmma_fence() { fenced[current] = 1; }
void wgmma_issue(int N, bool bfloat, bool transposed_b, float* d, const uint32_t* a, uint64_t b) {
  if (!fenced[current]) fail("a wgmma without a fence before it");
  if (b >> 46 != 1 << 16 || b >> 30 & 3 || b >> 14 & 3) fail("a descriptor that is not swizzled by 128 bytes");
  if ((b & 0x3f) >= (transposed_b ? 1 : 8)) fail("a descriptor that begins within a row, or in the middle of eight");
  products[current].back().push_back({N, bfloat, transposed_b, d, a, {a[0], a[1], a[2], a[3]}, b});
}
void wgmma_commit() {
  fenced[current] = 0;
  products[current].emplace_back();
  if (!lazy()) perform_all_but(0);
}
void wgmma_wait_all_but(int groups) { perform_all_but(groups); }

}  // namespace masked_ops::cuda

// --- the runtime: an H200, if nothing else is asked for ---

namespace {
int capability = 90, multiprocessors = 132;
}

int cudaDeviceGetAttribute(int* to, cudaDeviceAttr attribute, int) {
  const int values[] = {capability / 10, capability % 10, multiprocessors, 60 << 20, 227 << 10};
  *to = values[attribute];
  return 0;
}
void emulator_set_device(int new_capability, int new_multiprocessors) {
  capability = new_capability;
  multiprocessors = new_multiprocessors;
}
int cudaGetDevice(int* device) {
  *device = 0;
  return 0;
}
const char* cudaGetErrorString(cudaError_t) { return emulator_error(); }

void emulator_set_mode(int lazy, int order) {
  emulator::is_lazy = lazy != 0;
  emulator::order_mode = order;
}
int emulator_cluster() { return emulator::cluster_blocks; }
int64_t emulator_bank_conflicts() { return std::exchange(emulator::bank_conflicts, 0); }
const char* emulator_error() { return emulator::error.c_str(); }
