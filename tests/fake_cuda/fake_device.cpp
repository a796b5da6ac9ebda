// A CUDA device for a torch that has none, on the CPU's memory: devices, streams, events, capture and an allocator that
// can be told what to do, and every operation that torch would run there run on the CPU instead. With it the host side
// of the CUDA kernels is tested for real: dispatch, autograd, guards, the cache, what is waited for and what is not.
//
// Not modelled: that work is asynchronous. A test says when an event is over, and counts what would have waited.
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/conj_physical.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <set>
#include <string>

namespace {

constexpr int kDevices = 2;

thread_local c10::DeviceIndex current_device = 0;
thread_local c10::StreamId current_streams[kDevices];

std::atomic<int64_t> synchronisations, waits_of_streams, recorded_on_streams, allocated, freed;
std::atomic<int64_t> allocation_limit{-1}, until_failure{0};
std::atomic<int64_t> captured_stream{-1};  // of device 0
std::atomic<bool> events_are_late;

struct Event {
  c10::Stream stream;
  std::atomic<bool> over;
};

bool captures(const c10::Stream& stream) { return stream.device_index() == 0 && stream.id() == captured_stream; }

void synchronise(const char* what) {
  const c10::Stream stream(c10::Stream::UNSAFE, {c10::kCUDA, current_device}, current_streams[current_device]);
  TORCH_CHECK(!captures(stream), "fake CUDA: ", what, " synchronises while a graph is being captured");
  ++synchronisations;
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::kCUDA; }
  c10::Device exchangeDevice(c10::Device device) const override {
    const c10::Device before = getDevice();
    setDevice(device);
    return before;
  }
  c10::Device getDevice() const override { return {c10::kCUDA, current_device}; }
  void setDevice(c10::Device device) const override {
    TORCH_CHECK(device.index() < kDevices, "fake CUDA: no device ", device);
    if (device.has_index()) current_device = device.index();
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.has_index()) current_device = device.index();
  }
  c10::Stream getStream(c10::Device device) const override {
    const auto index = device.has_index() ? device.index() : current_device;
    return c10::Stream(c10::Stream::UNSAFE, {c10::kCUDA, index}, current_streams[index]);
  }
  c10::Stream getDefaultStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    const c10::Stream before = getStream(stream.device());
    current_streams[stream.device_index()] = stream.id();
    return before;
  }
  void* getStreamNativeHandle(const c10::Stream stream) const override {
    return reinterpret_cast<void*>(static_cast<uintptr_t>(stream.id()));
  }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override { synchronise("a stream"); }
  void synchronizeDevice(const c10::DeviceIndex) const override { synchronise("a device"); }
  bool isStreamCapturing(const c10::Stream& stream) const override { return captures(stream); }

  void record(void** event, const c10::Stream& stream, const c10::DeviceIndex, const c10::EventFlag) const override {
    delete static_cast<Event*>(*event);
    *event = new Event{stream, !events_are_late};
  }
  void block(void*, const c10::Stream& stream) const override {
    TORCH_CHECK(!captures(stream), "fake CUDA: a stream that is captured waits for an event from outside");
    ++waits_of_streams;
  }
  bool queryEvent(void* event) const override {
    TORCH_CHECK(captured_stream < 0, "fake CUDA: an event is queried while a graph is being captured");
    return !event || static_cast<Event*>(event)->over || !events_are_late;
  }
  void synchronizeEvent(void*) const override { synchronise("an event"); }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override { delete static_cast<Event*>(event); }
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override { ++recorded_on_streams; }
};

// Memory comes as NaN in every floating dtype.
struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    TORCH_CHECK_WITH(OutOfMemoryError, allocation_limit < 0 || static_cast<int64_t>(bytes) <= allocation_limit,
                     "fake CUDA out of memory: ", bytes, " bytes");
    const c10::Device device(c10::kCUDA, current_device);
    if (bytes == 0) return {nullptr, device};
    TORCH_CHECK_WITH(OutOfMemoryError, until_failure <= 0 || --until_failure > 0, "fake CUDA out of memory, once");
    void* memory = std::aligned_alloc(512, (bytes + 511) / 512 * 512);
    std::memset(memory, 0xff, bytes);
    ++allocated;
    return {memory, memory, &release, device};
  }
  static void release(void* memory) {
    ++freed;
    std::free(memory);
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};

Allocator allocator;

// --- the same memory, as a tensor of the other device ---

at::Tensor with_storage(c10::Storage storage, c10::DispatchKey key, const at::Tensor& like) {
  at::Tensor t = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype());
  t.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return t;
}

at::Tensor same_memory(const at::Tensor& t, c10::Device device) {
  auto* owner = new c10::Storage(t.storage());
  c10::DataPtr data(
      const_cast<void*>(t.storage().data()), owner, [](void* held) { delete static_cast<c10::Storage*>(held); },
      device);
  c10::Storage storage(c10::Storage::use_byte_size_t(), t.storage().nbytes(), std::move(data), nullptr, false);
  return with_storage(storage, device.is_cpu() ? c10::DispatchKey::CPU : c10::DispatchKey::CUDA, t);
}

// An empty tensor may be an output that is yet to get its size: it comes as one that can be resized.
at::Tensor on_cpu(const at::Tensor& t) {
  if (!t.defined() || !t.is_cuda()) return t;
  if (t.numel() > 0) return same_memory(t, c10::kCPU);
  return at::empty_strided(t.sizes(), t.strides(), t.options().device(c10::kCPU));
}

void take_memory(const at::Tensor& t, const at::Tensor& from) {
  auto* to = t.unsafeGetTensorImpl();
  to->set_storage_keep_dtype(same_memory(from, t.device()).storage());
  to->set_sizes_and_strides(from.sizes(), from.strides(), from.storage_offset());
}

c10::IValue to_cpu(const c10::IValue& value, std::optional<c10::Device>& device) {
  const auto convert = [&](const at::Tensor& t) {
    if (t.defined() && t.is_cuda()) device = t.device();
    const at::Tensor there = on_cpu(t);
    return t.defined() && t.is_conj() ? at::conj_physical(there) : there;  // the memory does not say so
  };
  if (value.isTensor()) return convert(value.toTensor());
  if (value.isTensorList()) {
    std::vector<at::Tensor> tensors;
    for (const at::Tensor& t : value.toTensorVector()) tensors.push_back(convert(t));
    return tensors;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> tensors;
    for (const std::optional<at::Tensor>& t : value.toOptionalTensorVector()) {
      tensors.push_back(t ? std::optional(convert(*t)) : std::nullopt);
    }
    return tensors;
  }
  if (value.isDevice()) {
    const c10::Device named = value.toDevice();
    if (!named.is_cuda()) return value;
    device = named.has_index() ? named : c10::Device(c10::kCUDA, current_device);
    return c10::Device(c10::kCPU);
  }
  return value;
}

// Those that wait for the device, on a real one.
const std::set<std::string> kSynchronising = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal",
                                              "aten::masked_select"};

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  if (kSynchronising.count(schema.name())) synchronise(schema.name().c_str());
  const size_t count = schema.arguments().size(), begin = stack->size() - count;
  const std::vector<c10::IValue> originals(stack->begin() + static_cast<ptrdiff_t>(begin), stack->end());
  std::optional<c10::Device> device;
  for (size_t i = 0; i < count; ++i) (*stack)[begin + i] = to_cpu(originals[i], device);
  const std::vector<c10::IValue> given(stack->begin() + static_cast<ptrdiff_t>(begin), stack->end());
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  for (size_t i = 0; i < count; ++i) {
    const auto* alias = schema.arguments()[i].alias_info();
    if (!alias || !alias->isWrite() || !given[i].isTensor()) continue;
    const at::Tensor& before = originals[i].toTensor();
    if (before.defined() && before.numel() == 0 && before.is_cuda()) take_memory(before, given[i].toTensor());
  }
  const size_t first = stack->size() - schema.returns().size();
  for (size_t i = 0; i < schema.returns().size(); ++i) {
    c10::IValue& result = (*stack)[first + i];
    const auto* alias = schema.returns()[i].alias_info();
    bool is_argument = false;
    for (size_t a = 0; alias && alias->isWrite() && a < count && !is_argument; ++a) {  // else it is a view
      const auto* argument = schema.arguments()[a].alias_info();
      if (argument && *argument == *alias) result = originals[a], is_argument = true;
    }
    const c10::Device to = device.value_or(c10::Device(c10::kCUDA, current_device));
    if (is_argument) continue;
    if (result.isTensor() && result.toTensor().defined()) {
      result = same_memory(result.toTensor(), to);
    } else if (result.isTensorList()) {
      std::vector<at::Tensor> tensors;
      for (const at::Tensor& t : result.toTensorVector()) tensors.push_back(same_memory(t, to));
      result = tensors;
    }
  }
}

c10::DeviceIndex index_of(std::optional<at::Device> device) {
  return device && device->has_index() ? device->index() : current_device;
}

at::Tensor empty(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  const c10::DeviceGuard guard(c10::Device(c10::kCUDA, index_of(device)));
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &allocator,
                                   c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                   dtype.value_or(at::get_default_dtype_as_scalartype()), format);
}

at::Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>) {
  const c10::DeviceGuard guard(c10::Device(c10::kCUDA, index_of(device)));
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &allocator,
                                           c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                           dtype.value_or(at::get_default_dtype_as_scalartype()));
}

// torch's own has no memory.
at::Tensor efficient_zeros(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype,
                           std::optional<at::Layout> layout, std::optional<at::Device> device,
                           std::optional<bool> pin_memory) {
  return empty(size, dtype, layout, device, pin_memory, std::nullopt).zero_();
}

at::Tensor& copy_(at::Tensor& self, const at::Tensor& from, bool non_blocking) {
  if (self.device() != from.device() && !non_blocking) synchronise("a copy between devices");
  on_cpu(self).copy_(on_cpu(from));
  return self;
}

const at::Tensor& resize_(const at::Tensor& self, c10::SymIntArrayRef size, std::optional<at::MemoryFormat>) {
  const at::IntArrayRef sizes = C10_AS_INTARRAYREF_SLOW(size);
  TORCH_CHECK(self.numel() == 0 || self.sizes() == sizes, "fake CUDA: resize_");
  if (self.sizes() != sizes) {
    const at::Tensor fresh = at::empty(sizes, self.options());
    self.unsafeGetTensorImpl()->set_storage_keep_dtype(fresh.storage());
    self.unsafeGetTensorImpl()->set_sizes_and_strides(fresh.sizes(), fresh.strides(), 0);
  }
  return self;
}

at::Tensor as_strided(const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                      std::optional<c10::SymInt> offset) {
  return at::native::as_strided_tensorimpl(
      self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
      offset ? std::optional<int64_t>(offset->guard_int(__FILE__, __LINE__)) : std::nullopt);
}

at::Tensor view(const at::Tensor& self, c10::SymIntArrayRef size) {
  return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size));
}

at::Tensor reshape_alias(const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

void record_stream(at::Tensor&, c10::Stream) { ++recorded_on_streams; }

}  // namespace

namespace at {

// What autograd's engine and pinned memory ask for.
struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  void init() const override {}
  DeviceIndex deviceCount() const override { return kDevices; }
  DeviceIndex current_device() const override { return ::current_device; }
  DeviceIndex getCurrentDevice() const override { return ::current_device; }
  void setCurrentDevice(DeviceIndex device) const override { ::current_device = device; }
  DeviceIndex exchangeDevice(DeviceIndex device) const override { return std::exchange(::current_device, device); }
  DeviceIndex maybeExchangeDevice(DeviceIndex device) const override { return exchangeDevice(device); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(c10::kCPU); }
};

REGISTER_CUDA_HOOKS(CUDAHooks)

}  // namespace at

C10_REGISTER_GUARD_IMPL(CUDA, Guard)
REGISTER_ALLOCATOR(c10::kCUDA, &allocator)

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }
TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_efficientzerotensor", &efficient_zeros);
  m.impl("copy_", &copy_);
  m.impl("resize_", &resize_);
  m.impl("as_strided", &as_strided);
  m.impl("view", &view);
  m.impl("_reshape_alias", &reshape_alias);
  m.impl("record_stream", &record_stream);
  // Their composites ask cuDNN.
  m.impl("convolution", torch::CppFunction::makeFromBoxedFunction<&fallback>());
  m.impl("convolution_backward", torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

extern "C" {
int64_t fake_synchronisations() { return synchronisations; }
int64_t fake_waits_of_streams() { return waits_of_streams; }
int64_t fake_recorded_on_streams() { return recorded_on_streams; }
int64_t fake_allocated() { return allocated; }
int64_t fake_freed() { return freed; }
void fake_limit_allocations(int64_t bytes) { allocation_limit = bytes; }
void fake_fail_allocation(int64_t number) { until_failure = number; }
void fake_capture(int64_t stream) { captured_stream = stream; }
void fake_late_events(int late) { events_are_late = late; }
void fake_set_stream(int device, int64_t stream) { current_streams[device] = stream; }
int fake_current_device() { return current_device; }
}
