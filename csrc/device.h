// The seam to the CUDA kernels: whether they are there, which of them may be used on a device, and how they are
// launched. No CUDA header is needed: the kernels are C functions out of a library of their own, and streams, events
// and guards are torch's for any device.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/Event.h>
#include <c10/core/Stream.h>

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "cuda/api.h"
#include "path.h"

namespace masked_ops::device {

// What can be switched on and checked by itself. Each name is the one that report() and use_path know.
enum class Kernel { kMaskCopy, kPacked, kDecode, kGemmSm80, kGemmSm90, kDecodeSliced, kDecodeGathered };
inline constexpr int kKernels = 7;

// The functions of cuda/api.h.
struct Api {
  decltype(&masked_ops_cuda_device_facts) device_facts;
  decltype(&masked_ops_cuda_error_string) error_string;
  decltype(&masked_ops_cuda_pack_mask) pack_mask;
  decltype(&masked_ops_cuda_pack_bits) pack_bits;
  decltype(&masked_ops_cuda_row_offsets) row_offsets;
  decltype(&masked_ops_cuda_mask_copy) mask_copy;
  decltype(&masked_ops_cuda_compress) compress;
  decltype(&masked_ops_cuda_expand) expand;
  decltype(&masked_ops_cuda_decode_index_bytes) decode_index_bytes;
  decltype(&masked_ops_cuda_decode_index) decode_index;
  decltype(&masked_ops_cuda_decode_workspace) decode_workspace;
  decltype(&masked_ops_cuda_decode) decode;
  decltype(&masked_ops_cuda_slice) slice;
  decltype(&masked_ops_cuda_fill_slices) fill_slices;
  decltype(&masked_ops_cuda_decode_sliced) decode_sliced;
  decltype(&masked_ops_cuda_gather) gather;
  decltype(&masked_ops_cuda_fill_gathered) fill_gathered;
  decltype(&masked_ops_cuda_decode_gathered) decode_gathered;
  decltype(&masked_ops_cuda_fragments_bytes) fragments_bytes;
  decltype(&masked_ops_cuda_pack_fragments) pack_fragments;
  decltype(&masked_ops_cuda_gemm_sm80) gemm_sm80;
  decltype(&masked_ops_cuda_gemm_sm90) gemm_sm90;
};

// --- the library ---

// How to come by the library when the first kernel is wanted: its path, or an empty path and the reason. And how to
// warn. Both are Python's.
using Loader = std::function<std::pair<std::string, std::string>()>;
using Warner = std::function<void(const std::string&)>;
void set_loader(Loader loader, Warner warner);
// The library's functions, loading it if that was not tried yet; null if there are none.
const Api* api();
// Why there are none; empty if there are, or nothing was tried yet.
std::string api_reason();

// --- what may be used ---

// Why the kernel may not be used on the device, null if it may: there is no library, no GPU has confirmed the kernel
// (and neither MASKED_OPS_CUDA=1 nor use_path asks for it), the device is too old, or the kernel's own check failed. It
// is checked at its first use on a device, which synchronises that once.
const char* obstacle(Kernel kernel, c10::Device device);

// Whether anything but torch's own operations may come into question: false at no cost where no kernel is on.
bool any_kernel();

// Whether what no GPU has confirmed may be chosen: MASKED_OPS_CUDA=1.
bool takes_unconfirmed();

struct KernelState {
  std::string name;
  bool confirmed;     // by a GPU, in this version of the project
  std::string state;  // "ok", or the obstacle
};
std::vector<KernelState> states(c10::Device device);
void forget_checks();  // for tests

// The check itself (device_check.cpp): a few small cases against torch's operations; empty if all are right.
std::string check(const Api& api, Kernel kernel, c10::Device device);

// --- launching ---

c10::Stream current_stream(c10::Device device);

// Whether the current stream records a graph, or that cannot be told: then nothing may be read back or kept.
bool capturing(c10::Device device);

// Makes the device current and knows its stream, for as long as it lives.
class Launch {
 public:
  explicit Launch(c10::Device device) : guard_(device), stream_(current_stream(device)) {}
  void* stream() const { return stream_.native_handle(); }
  const c10::Stream& torch_stream() const { return stream_; }

 private:
  c10::OptionalDeviceGuard guard_;
  c10::Stream stream_;
};

// Throws if a kernel could not be launched.
void check_launch(const char* kernel, int error);

// A buffer on a device that is written once, on one stream, and then read on any. Not thread-safe.
class SharedBuffer {
 public:
  // After the writing was put into stream.
  void fill(at::Tensor tensor, const c10::Stream& stream);
  bool defined() const { return tensor_.defined(); }
  size_t bytes() const { return tensor_.defined() ? tensor_.nbytes() : 0; }
  // For reading on stream: which waits for the writing, as the memory does for the stream.
  const at::Tensor& on(const c10::Stream& stream) const;
  // Whether the writing is known to be over: asks the device, or does not.
  bool ask_settled();
  bool settled() const { return settled_; }
  void wait();

 private:
  at::Tensor tensor_;
  std::optional<c10::Stream> home_;
  std::unique_ptr<c10::Event> written_;
  bool settled_ = false;
};

}  // namespace masked_ops::device
