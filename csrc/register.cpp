// The table of contents: which function serves which operation under which dispatch key, and the Python module with
// what is no operation. The schemas stand in masked_ops/_ops.py, where they exist before this library is loaded.
#include <ATen/Parallel.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/ones.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>

#include <atomic>
#include <chrono>
#include <limits>
#include <thread>

#include "autograd.h"
#include "checks.h"
#include "device.h"
#include "device_linear.h"
#include "device_ops.h"
#include "memory.h"
#include "ops.h"
#include "path.h"
#include "pattern.h"
#include "register_direct.h"
#include "torch_rate.h"

namespace py = pybind11;

namespace masked_ops {
namespace {

// Autocast as torch's linear and convolution have it: lower precision for all but the mask, which is never cast.
template <c10::DeviceType kDevice>
struct Autocast {
  static at::Tensor cast(const at::Tensor& t) {
    return at::autocast::cached_cast(at::autocast::get_autocast_dtype(kDevice), t, kDevice);
  }
  static std::optional<at::Tensor> cast(const std::optional<at::Tensor>& t) {
    return t ? std::optional<at::Tensor>(cast(*t)) : std::nullopt;
  }
  static constexpr c10::DispatchKey kKey =
      kDevice == c10::kCUDA ? c10::DispatchKey::AutocastCUDA : c10::DispatchKey::AutocastCPU;

  // Whether masking, casting and, in backward, both again are one pass each; else it is better to cast the weight
  // first, which autocast remembers while the weight does not change.
  static bool casts_while_masking(const at::Tensor& weight, const at::Tensor& mask) {
    const bool trains = c10::GradMode::is_enabled() && weight.defined() && weight.requires_grad();
    return kDevice == c10::kCUDA && trains && device::casts_while_masking(weight, mask);
  }
  static at::Tensor masked_and_cast(const at::Tensor& weight, const at::Tensor& mask) {
    return call_apply_mask(weight, mask, at::autocast::get_autocast_dtype(kDevice));
  }

  static at::Tensor linear(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& mask,
                           const std::optional<at::Tensor>& bias) {
    c10::impl::ExcludeDispatchKeyGuard below(kKey);
    if (casts_while_masking(weight, mask)) {
      const auto x = cast(input);
      const auto b = cast(bias);
      if (takes_linear_autocast(x, weight, mask, b)) return linear_autocast(x, weight, mask, b);
      const at::Tensor masked = masked_and_cast(weight, mask);
      check_linear(x, masked, mask, b);
      return at::linear(x, masked, b);
    }
    return call_linear(cast(input), cast(weight), mask, cast(bias));
  }
  static at::Tensor packed_linear(const at::Tensor& input, const at::Tensor& values, const at::Tensor& bits,
                                  c10::SymInt in_features, const std::optional<at::Tensor>& bias) {
    c10::impl::ExcludeDispatchKeyGuard below(kKey);
    return call_packed_linear(cast(input), cast(values), bits, in_features, cast(bias));
  }
  static at::Tensor convolution(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& mask,
                                const std::optional<at::Tensor>& bias, c10::SymIntArrayRef stride,
                                c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation, bool transposed,
                                c10::SymIntArrayRef output_padding, c10::SymInt groups) {
    c10::impl::ExcludeDispatchKeyGuard below(kKey);
    if (casts_while_masking(weight, mask) && !device::leaves_channels_out(weight, mask)) {
      return at::convolution_symint(cast(input), masked_and_cast(weight, mask), cast(bias), stride, padding, dilation,
                                    transposed, output_padding, groups);
    }
    return call_convolution(cast(input), cast(weight), mask, cast(bias), stride, padding, dilation, transposed,
                            output_padding, groups);
  }
  static at::Tensor packed_convolution(const at::Tensor& input, const at::Tensor& values, const at::Tensor& bits,
                                       c10::SymIntArrayRef weight_size, const std::optional<at::Tensor>& bias,
                                       c10::SymIntArrayRef stride, c10::SymIntArrayRef padding,
                                       c10::SymIntArrayRef dilation, bool transposed,
                                       c10::SymIntArrayRef output_padding, c10::SymInt groups) {
    c10::impl::ExcludeDispatchKeyGuard below(kKey);
    return call_packed_convolution(cast(input), cast(values), bits, weight_size, cast(bias), stride, padding, dilation,
                                   transposed, output_padding, groups);
  }
};

template <c10::DeviceType kDevice>
void register_autocast(torch::Library& m) {
  m.impl("linear", &Autocast<kDevice>::linear);
  m.impl("packed_linear", &Autocast<kDevice>::packed_linear);
  m.impl("convolution", &Autocast<kDevice>::convolution);
  m.impl("packed_convolution", &Autocast<kDevice>::packed_convolution);
}

void register_backend(torch::Library& m) {
  m.impl("apply_mask", &apply_mask);
  m.impl("linear", &linear);
  m.impl("linear_grad_input", &linear_grad_input);
  m.impl("linear_grad_weight", &linear_grad_weight);
  m.impl("convolution", &convolution);
  m.impl("convolution_grad_input", &convolution_grad_input);
  m.impl("convolution_grad_weight", &convolution_grad_weight);
  m.impl("explain_linear", &explain_linear);
  m.impl("explain_convolution", &explain_convolution);
}

void register_packed(torch::Library& m) {
  m.impl("packed_linear", &packed_linear);
  m.impl("packed_linear_grad_input", &packed_linear_grad_input);
  m.impl("packed_linear_grad_values", &packed_linear_grad_values);
  m.impl("unpack_values", &unpack_values);
  m.impl("pack_values", &pack_values);
  m.impl("explain_packed_linear", &explain_packed_linear);
  m.impl("packed_convolution", &packed_convolution);
  m.impl("packed_convolution_grad_input", &packed_convolution_grad_input);
  m.impl("packed_convolution_grad_values", &packed_convolution_grad_values);
  m.impl("explain_packed_convolution", &explain_packed_convolution);
}

void register_autograd(torch::Library& m) {
  m.impl("apply_mask", &apply_mask_autograd);
  m.impl("linear", &linear_autograd);
  m.impl("linear_grad_input", &linear_grad_input_autograd);
  m.impl("linear_grad_weight", &linear_grad_weight_autograd);
  m.impl("convolution", &convolution_autograd);
  m.impl("convolution_grad_input", &convolution_grad_input_autograd);
  m.impl("convolution_grad_weight", &convolution_grad_weight_autograd);
  m.impl("packed_linear", &packed_linear_autograd);
  m.impl("packed_linear_grad_input", &packed_linear_grad_input_autograd);
  m.impl("packed_linear_grad_values", &packed_linear_grad_values_autograd);
  m.impl("packed_convolution", &packed_convolution_autograd);
  m.impl("packed_convolution_grad_input", &packed_convolution_grad_input_autograd);
  m.impl("packed_convolution_grad_values", &packed_convolution_grad_values_autograd);
  m.impl("unpack_values", &unpack_values_autograd);
  m.impl("pack_values", &pack_values_autograd);
}

std::vector<std::string> capabilities() {
  std::vector<std::string> names;
  for (auto table = cpu::available_kernels(); *table; ++table) names.emplace_back((*table)->capability);
  return names;
}

std::optional<std::string> set_path(const std::optional<std::string>& name) {
  const std::optional<Path> before = forced_path();
  std::optional<Path> path;
  if (name) {
    path = path_by_name(*name);
    if (!path) {
      std::string names;
      for (const std::string& known : path_names()) names += (names.empty() ? "" : ", ") + known;
      throw py::value_error("path must be one of " + names + ", got '" + *name + "'");
    }
  }
  force_path(path);
  return before ? std::optional<std::string>(path_name(*before)) : std::nullopt;
}

// For benchmarks: floating-point operations a second out of registers, on all threads.
double peak_flops(double seconds, const std::string& name) {
  const cpu::Dtype dtype = name == "bfloat16" ? cpu::Dtype::kBFloat16 : cpu::Dtype::kFloat;
  const py::gil_scoped_release release;
  std::atomic<int64_t> operations{0};
  const auto start = std::chrono::steady_clock::now();
  const auto elapsed = [&] { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(); };
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
    while (elapsed() < seconds) operations += cpu::kernels().fma_loop(dtype, 10000);
  });
  return double(operations) / elapsed();
}

at::ScalarType half_dtype(const std::string& name) {
  TORCH_CHECK(name == "bfloat16" || name == "float16", "dtype is bfloat16 or float16, got ", name);
  return name == "bfloat16" ? at::kBFloat16 : at::kHalf;
}

int rate_of(const std::string& dtype) { return static_cast<int>(torch_rate(half_dtype(dtype))); }

int set_rate(const std::string& dtype, int rate) {
  TORCH_CHECK(rate >= 0 && rate <= 2, "rate is 0, 1 or 2, got ", rate);
  return static_cast<int>(set_torch_rate(half_dtype(dtype), static_cast<Rate>(rate)));
}

// For benchmarks: bytes a second that all threads read from memory; of three passes over a buffer, the best.
double read_bandwidth(int64_t bytes) {
  const py::gil_scoped_release release;
  const at::Tensor buffer = at::ones({bytes / 4});
  const float* data = buffer.const_data_ptr<float>();
  double best = 0;
  for (int pass = 0; pass < 3; ++pass) {
    const auto start = std::chrono::steady_clock::now();
    at::parallel_for(0, buffer.numel(), 1,
                     [&](int64_t first, int64_t last) { cpu::kernels().read_loop(data + first, last - first); });
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    best = std::max(best, double(bytes) / elapsed.count());
  }
  return best;
}

// For benchmarks: seconds until one core sees what another has written, at best. Of two cores that are virtual, it
// tells whether they are near each other now.
double core_latency() {
  const py::gil_scoped_release release;
  constexpr int kRounds = 20, kTurns = 1000;
  std::atomic<int> turn{0};
  const auto wait_for = [&](int mine) {
    for (int tries = 0; turn.load(std::memory_order_acquire) != mine; ++tries) {
      if (tries > 100000) std::this_thread::yield();  // there is one core only
    }
  };
  std::thread other([&] {
    for (int i = 0; i < kRounds * kTurns; ++i) {
      wait_for(1);
      turn.store(0, std::memory_order_release);
    }
  });
  double best = std::numeric_limits<double>::infinity();
  for (int round = 0; round < kRounds; ++round) {
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < kTurns; ++i) {
      turn.store(1, std::memory_order_release);
      wait_for(0);
    }
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    best = std::min(best, elapsed.count() / (2 * kTurns));
  }
  other.join();
  return best;
}

py::dict cache_info_dict() {
  const CacheInfo info = cache_info();
  py::dict result;
  result["entries"] = info.entries;
  result["bytes"] = info.bytes;
  result["limit_bytes"] = info.limit_bytes;
  result["hits"] = info.hits;
  result["misses"] = info.misses;
  result["repacks"] = info.repacks;
  result["kept_result_bytes"] = kept_result_bytes();
  return result;
}

// load() gives (path, reason), of which one is empty; warn() takes a message. They are held for ever: the library's own
// end comes after Python's.
void set_cuda_loader(const py::object& load, const py::object& warn) {
  const auto* loader = new py::object(load);
  const auto* warner = new py::object(warn);
  device::set_loader(
      [loader] {
        const py::gil_scoped_acquire gil;
        return (*loader)().cast<std::pair<std::string, std::string>>();
      },
      [warner](const std::string& message) {
        const py::gil_scoped_acquire gil;
        (*warner)(message);
      });
}

// What of the CUDA kernels may be used on a device: name -> (confirmed, "ok" or why not).
py::dict cuda_kernels(int index) {
  std::vector<device::KernelState> states;
  {
    const py::gil_scoped_release release;
    states = device::states(c10::Device(c10::kCUDA, static_cast<c10::DeviceIndex>(index)));
  }
  py::dict result;
  for (const auto& state : states) result[py::str(state.name)] = py::make_tuple(state.confirmed, state.state);
  return result;
}

}  // namespace
}  // namespace masked_ops

// Backend keys rather than the alias keys Autograd and CompositeExplicitAutograd: those hold the Python fallback, which
// a registration under a backend key outranks without replacing it.
TORCH_LIBRARY_IMPL(masked_ops, CPU, m) {
  masked_ops::register_backend(m);
  masked_ops::register_packed(m);
}
TORCH_LIBRARY_IMPL(masked_ops, CUDA, m) {
  masked_ops::register_backend(m);
  masked_ops::register_packed(m);
}
TORCH_LIBRARY_IMPL(masked_ops, AutogradCPU, m) { masked_ops::register_autograd(m); }
TORCH_LIBRARY_IMPL(masked_ops, AutogradCUDA, m) { masked_ops::register_autograd(m); }
TORCH_LIBRARY_IMPL(masked_ops, AutogradMeta, m) { masked_ops::register_autograd(m); }
TORCH_LIBRARY_IMPL(masked_ops, AutocastCPU, m) { masked_ops::register_autocast<c10::kCPU>(m); }
TORCH_LIBRARY_IMPL(masked_ops, AutocastCUDA, m) { masked_ops::register_autocast<c10::kCUDA>(m); }

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of masked_ops, and what steers them.";
  masked_ops::define_direct(m);
  m.def("paths", &masked_ops::path_names, "Names of the paths.");
  m.def("set_path", &masked_ops::set_path, py::arg("name") = py::none(), "Force a path; returns the one before.");
  m.def("cache_info", &masked_ops::cache_info_dict,
        "Counters of the cache of mask patterns, and what is kept for results.");
  m.def(
      "clear_cache",
      [] {
        masked_ops::clear_cache();
        masked_ops::release_kept_results();
      },
      "Forget all mask patterns, and free the memory that is kept for results.");
  m.def("capabilities", &masked_ops::capabilities, "Capabilities built in that this CPU runs, best first.");
  m.def("capability", [] { return std::string(masked_ops::cpu::kernels().capability); }, "The one in use.");
  m.def("set_capability", &masked_ops::cpu::select_kernels, py::arg("name"), "Use another; False if not available.");
  m.def("set_fetches_into_l2", &masked_ops::cpu::set_fetches_into_l2, py::arg("wanted"),
        "For tests: read large weights like CPUs that want it so, or like the others; returns what was.");
  m.def("torch_rate", &masked_ops::rate_of, py::arg("dtype"),
        "What torch's products in bfloat16 or float16 use: 0, no arithmetic of the CPU's; 1, dot products; 2, matrix "
        "units.");
  m.def("set_torch_rate", &masked_ops::set_rate, py::arg("dtype"), py::arg("rate"),
        "For tests: expect the same as on another CPU; returns what was.");
  m.def("peak_flops", &masked_ops::peak_flops, py::arg("seconds"), py::arg("dtype") = "float32",
        "The machine's FMA rate, for benchmarks.");
  m.def("read_bandwidth", &masked_ops::read_bandwidth, py::arg("bytes"), "Its memory's, for benchmarks.");
  m.def("core_latency", &masked_ops::core_latency, "Seconds from core to core, for benchmarks.");
  m.def("set_cuda_loader", &masked_ops::set_cuda_loader, py::arg("load"), py::arg("warn"),
        "Who comes by the CUDA kernels' library, and who tells of those that are wrong.");
  m.def(
      "cuda_reason",
      [] {
        const py::gil_scoped_release release;
        return masked_ops::device::api() ? std::string() : masked_ops::device::api_reason();
      },
      "Why there are no CUDA kernels; empty if there are.");
  m.def("cuda_kernels", &masked_ops::cuda_kernels, py::arg("device"), "Name -> (confirmed by a GPU, 'ok' or why not).");
  m.def("set_cuda_gemm_plan", &masked_ops::device::set_gemm_plan, py::arg("tile_rows") = 0, py::arg("splits") = 0,
        py::arg("trade") = false, "How gemm_sm90 cuts its products, for benchmarks; without arguments, as it chooses.");
  m.def("cuda_forget", &masked_ops::device::forget_checks, "Check the CUDA kernels anew; for tests.");
  m.def(
      "release_scratch",
      [] {
        masked_ops::cpu::release_scratch();
        masked_ops::release_kept_scratch();
      },
      "Free the calling thread's scratch memory.");
}
