#include "device.h"

#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Exception.h>
#include <dlfcn.h>
#include <link.h>

#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <set>

namespace masked_ops::device {
namespace {

constexpr std::array<const char*, kKernels> kNames = {"mask_copy", "packed",        "decode",         "gemm_sm80",
                                                      "gemm_sm90", "decode_sliced", "decode_gathered"};

// Kernels that have been right on a GPU, over bench/gpu_suite.py --phase correctness: an H200.
constexpr std::array<bool, kKernels> kConfirmed = {
    true, true, true, true, true, /*decode_sliced=*/false, /*decode_gathered=*/false};

constexpr int kMaxDevices = 64;

// --- the library ---

std::mutex mutex;  // of what follows
Loader loader;
Warner warner;
bool tried = false;
std::string reason;
std::atomic<const Api*> loaded{nullptr};

template <typename Function>
void find(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  TORCH_CHECK(function, "it lacks ", name);
}

// Never closed: kernels may run for as long as the process does.
const Api* open(const std::string& path) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  TORCH_CHECK(library, dlerror());
  auto* api = new Api;
#define MASKED_OPS_FIND(name) find(library, "masked_ops_cuda_" #name, api->name)
  MASKED_OPS_FIND(device_facts);
  MASKED_OPS_FIND(error_string);
  MASKED_OPS_FIND(pack_mask);
  MASKED_OPS_FIND(pack_bits);
  MASKED_OPS_FIND(row_offsets);
  MASKED_OPS_FIND(mask_copy);
  MASKED_OPS_FIND(compress);
  MASKED_OPS_FIND(expand);
  MASKED_OPS_FIND(decode_index_bytes);
  MASKED_OPS_FIND(decode_index);
  MASKED_OPS_FIND(decode_workspace);
  MASKED_OPS_FIND(decode);
  MASKED_OPS_FIND(slice);
  MASKED_OPS_FIND(fill_slices);
  MASKED_OPS_FIND(decode_sliced);
  MASKED_OPS_FIND(gather);
  MASKED_OPS_FIND(fill_gathered);
  MASKED_OPS_FIND(decode_gathered);
  MASKED_OPS_FIND(fragments_bytes);
  MASKED_OPS_FIND(pack_fragments);
  MASKED_OPS_FIND(gemm_sm80);
  MASKED_OPS_FIND(gemm_sm90);
#undef MASKED_OPS_FIND
  return api;
}

// --- what may be used ---

// MASKED_OPS_CUDA: 1 takes kernels that no GPU has confirmed, 0 takes none.
enum class Switch { kConfirmed, kAll, kNone };

Switch cuda_switch() {
  static const Switch value = [] {
    const char* text = std::getenv("MASKED_OPS_CUDA");
    if (!text || !*text) return Switch::kConfirmed;
    return std::strcmp(text, "0") == 0 ? Switch::kNone : Switch::kAll;
  }();
  return value;
}

constexpr bool any_confirmed() {
  for (const bool confirmed : kConfirmed) {
    if (confirmed) return true;
  }
  return false;
}

// The kernels that a forced path runs on.
bool forced(Kernel kernel) {
  const std::optional<Path> path = forced_path();
  if (!path) return false;
  switch (*path) {
    case Path::kMaskCopy:
      return kernel == Kernel::kMaskCopy;
    case Path::kCompact:
      return kernel == Kernel::kMaskCopy || kernel == Kernel::kPacked;
    case Path::kDecode:
      return kernel == Kernel::kDecode || kernel == Kernel::kPacked;
    case Path::kDecodeSliced:
      return kernel == Kernel::kDecodeSliced || kernel == Kernel::kPacked;
    case Path::kDecodeGathered:
      return kernel == Kernel::kDecodeGathered || kernel == Kernel::kPacked;
    case Path::kGemmSm80:
      return kernel == Kernel::kGemmSm80 || kernel == Kernel::kMaskCopy;
    case Path::kGemmSm90:
      return kernel == Kernel::kGemmSm90 || kernel == Kernel::kMaskCopy;
    default:
      return false;
  }
}

// An obstacle is a pointer that stays valid.
const char* intern(const std::string& text) {
  static std::mutex strings_mutex;
  static auto* strings = new std::set<std::string>;
  const std::lock_guard<std::mutex> lock(strings_mutex);
  return strings->insert(text).first->c_str();
}

struct Status {
  std::atomic<bool> known{false};
  const char* obstacle = nullptr;
};
Status statuses[kKernels][kMaxDevices];
std::mutex check_mutex;

const char* too_old(const Api& api, Kernel kernel, c10::Device device) {
  cuda::DeviceFacts facts{};
  const int error = api.device_facts(device.index(), &facts);
  if (error) return intern(std::string("the device cannot be asked: ") + api.error_string(error));
  if (kernel == Kernel::kGemmSm90 && facts.major != 9) return "it needs compute capability 9.0";
  const int64_t shared = kernel == Kernel::kDecodeSliced     ? cuda::kSlicedSharedBytes
                         : kernel == Kernel::kDecodeGathered ? cuda::kGatheredSharedBytes
                                                             : 0;
  if (facts.shared_bytes < shared) return "a block has too little shared memory for it";
  return facts.major < 8 ? "it needs compute capability 8.0 or newer" : nullptr;
}

// Sets *failure if the kernel is wrong.
const char* run_check(const Api& api, Kernel kernel, c10::Device device, std::string* failure) {
  if (const char* old = too_old(api, kernel, device)) return old;
  *failure = check(api, kernel, device);
  return failure->empty() ? nullptr : intern("its own check failed on this device: " + *failure);
}

void tell(Kernel kernel, c10::Device device, const std::string& failure) {
  const auto name = kNames[static_cast<size_t>(kernel)];
  Warner warn;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    warn = warner;
  }
  if (warn) {
    warn(c10::str("masked_ops does not use its CUDA kernel ", name, " on ", device,
                  ", since its own check failed there: ", failure, "; other ways serve"));
  }
}

}  // namespace

void set_loader(Loader fresh, Warner warn) {
  const std::lock_guard<std::mutex> lock(mutex);
  loader = std::move(fresh);
  warner = std::move(warn);
  tried = false;
}

const Api* api() {
  if (const Api* ready = loaded.load(std::memory_order_acquire)) return ready;
  Loader load;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    if (tried) return nullptr;
    load = loader;
  }
  // Outside the lock: the loader builds the library, for which it takes Python's lock.
  auto [path, why] = load ? load() : std::pair<std::string, std::string>("", "nothing loads it");
  const std::lock_guard<std::mutex> lock(mutex);
  if (tried || loaded.load()) return loaded.load();
  tried = true;
  if (!path.empty()) {
    try {
      loaded.store(open(path), std::memory_order_release);
    } catch (const c10::Error& error) {
      why = "the library of CUDA kernels cannot be loaded: " + std::string(error.what_without_backtrace());
    }
  }
  reason = why;
  return loaded.load();
}

std::string api_reason() {
  const std::lock_guard<std::mutex> lock(mutex);
  return reason;
}

bool any_kernel() {
  if (cuda_switch() == Switch::kNone) return false;
  return any_confirmed() || cuda_switch() == Switch::kAll || forced_path().has_value();
}

bool takes_unconfirmed() { return cuda_switch() == Switch::kAll; }

const char* obstacle(Kernel kernel, c10::Device device) {
  const auto index = static_cast<size_t>(kernel);
  if (cuda_switch() == Switch::kNone) return "MASKED_OPS_CUDA=0 turns the CUDA kernels off";
  if (!kConfirmed[index] && cuda_switch() != Switch::kAll && !forced(kernel)) {
    return "no GPU has confirmed this kernel yet; MASKED_OPS_CUDA=1 turns it on";
  }
  const Api* functions = api();
  if (!functions) return intern(api_reason());
  if (device.index() < 0 || device.index() >= kMaxDevices) return "it is a device of too high a number";
  Status& status = statuses[index][device.index()];
  if (!status.known.load(std::memory_order_acquire)) {
    if (capturing(device)) return "it was not used on this device before the graph that is being captured";
    std::string failure;
    {
      const std::lock_guard<std::mutex> lock(check_mutex);
      if (!status.known.load()) {
        status.obstacle = run_check(*functions, kernel, device, &failure);
        status.known.store(true, std::memory_order_release);
      }
    }
    if (!failure.empty()) tell(kernel, device, failure);  // unlocked, since it takes Python's lock
  }
  return status.obstacle;
}

std::vector<KernelState> states(c10::Device device) {
  std::vector<KernelState> result;
  for (int i = 0; i < kKernels; ++i) {
    const char* why = obstacle(static_cast<Kernel>(i), device);
    result.push_back({kNames[i], kConfirmed[i], why ? why : "ok"});
  }
  return result;
}

void forget_checks() {
  const std::lock_guard<std::mutex> lock(check_mutex);
  for (auto& row : statuses) {
    for (Status& status : row) status.known.store(false);
  }
}

// --- launching ---

c10::Stream current_stream(c10::Device device) { return c10::impl::VirtualGuardImpl(device.type()).getStream(device); }

namespace {

// A function of the CUDA runtime that torch has loaded, wherever that lies; null without one.
void* find_in_runtime(const char* name) {
  if (void* found = dlsym(RTLD_DEFAULT, name)) return found;
  std::string path;
  dl_iterate_phdr(
      [](dl_phdr_info* library, size_t, void* to) {
        if (!std::strstr(library->dlpi_name, "libcudart.so")) return 0;
        *static_cast<std::string*>(to) = library->dlpi_name;
        return 1;
      },
      &path);
  void* runtime = path.empty() ? nullptr : dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  return runtime ? dlsym(runtime, name) : nullptr;
}

// Torch tells from 2.12 on. Before, its CUDA runtime does.
template <typename Stream>
bool records(const Stream& stream) {
  if constexpr (requires { stream.is_capturing(); }) {
    return stream.is_capturing();
  } else {
    using IsCapturing = int (*)(void*, int*);
    static const auto is_capturing = reinterpret_cast<IsCapturing>(find_in_runtime("cudaStreamIsCapturing"));
    int status = 0;
    return !is_capturing || is_capturing(stream.native_handle(), &status) != 0 || status != 0;
  }
}

}  // namespace

bool capturing(c10::Device device) { return records(current_stream(device)); }

void check_launch(const char* kernel, int error) {
  if (error == 0) return;
  const Api* functions = api();
  TORCH_CHECK(false, "the CUDA kernel ", kernel,
              " could not be launched: ", functions ? functions->error_string(error) : "unknown error", " (error ",
              error, ")");
}

void SharedBuffer::fill(at::Tensor tensor, const c10::Stream& stream) {
  auto written = std::make_unique<c10::Event>(stream.device_type());
  written->record(stream);
  tensor_ = std::move(tensor);
  home_ = stream;
  written_ = std::move(written);
  settled_ = false;
}

const at::Tensor& SharedBuffer::on(const c10::Stream& stream) const {
  if (home_ && stream != *home_) {
    if (!settled_) written_->block(stream);
    c10::impl::VirtualGuardImpl(stream.device_type()).recordDataPtrOnStream(tensor_.storage().data_ptr(), stream);
  }
  return tensor_;
}

bool SharedBuffer::ask_settled() {
  settled_ = settled_ || written_->query();
  return settled_;
}

void SharedBuffer::wait() {
  if (!settled_) written_->synchronize();
  settled_ = true;
}

}  // namespace masked_ops::device
