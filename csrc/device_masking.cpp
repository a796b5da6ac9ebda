// weight∘mask on a device.
#include <ATen/ops/empty_like.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include "device_compact.h"
#include "device_linear.h"
#include "device_pattern.h"
#include "device_tuning.h"
#include "masking.h"

namespace masked_ops::device {
namespace {

// What a mask that holds 0 and 1 only is known by: its bits for the kernel, or where it is not 0 for torch. Neither, if
// that is not known: then torch's operations read the mask. So must a graph that is captured, since the mask may have
// changed when it is replayed; a bool mask can be read as it is.
struct Known {
  at::Tensor words, keep;
  DevicePatternPtr pattern;  // of the words

  explicit Known(const at::Tensor& mask) {
    if (forced_path() == Path::kCopy || !packable(mask.scalar_type())) return;
    const c10::Device device = mask.device();
    const bool force = forced_path() == Path::kMaskCopy, records = capturing(device);
    const char* why = any_kernel() ? obstacle(Kernel::kMaskCopy, device) : "";
    if (force && !why && records) why = "a graph is being captured, which has to read the mask itself";
    TORCH_CHECK(!force || !why, "path 'mask_copy' cannot serve: ", why);
    if (mask.scalar_type() == at::kBool && (why || records)) {
      keep = mask;
      return;
    }
    if (records) return;
    const DevicePatternPtr known = device_pattern_of(mask);
    TORCH_CHECK(!force || known, "path 'mask_copy' cannot serve: the mask is an inference tensor");
    if (!known || !known->ready(mask, /*kernels=*/!why, /*wait=*/force)) {
      if (mask.scalar_type() == at::kBool) keep = mask;
      return;
    }
    TORCH_CHECK(!force || known->binary(), "path 'mask_copy' cannot serve: the mask is soft");
    if (!known->binary()) return;
    const c10::Stream stream = current_stream(device);
    if (why) {
      keep = known->keep(stream);
    } else {
      words = known->words(stream);
      pattern = known;
    }
  }

  bool none() const { return !words.defined() && !keep.defined(); }

  // out = weight∘mask, both contiguous; out may be weight. False if that takes more than one pass.
  bool apply(const at::Tensor& weight, at::Tensor out) const {
    if (!words.defined()) {
      at::where_out(out, keep, weight.to(out.scalar_type()), at::zeros({}, out.options()));
      return true;
    }
    const int kind = copy_kind(weight.scalar_type(), out.scalar_type());
    if (kind >= 0) mask_copy(*api(), kind, weight, words, pattern->rows(), pattern->cols(), out);
    return kind >= 0;
  }
};

}  // namespace

at::Tensor masked_weight(const at::Tensor& weight, const at::Tensor& mask, at::ScalarType dtype) {
  const at::Tensor dense = weight.is_non_overlapping_and_dense() ? weight : weight.clone();
  const auto [weight_in_order, mask_in_order] = in_memory_order(dense, mask);
  const Known known(mask_in_order);
  if (known.none()) return masked_weight_by_torch(weight, mask).to(dtype);
  at::Tensor out = at::empty_like(dense, dense.options().dtype(dtype));
  if (known.apply(weight_in_order, out.as_strided(weight_in_order.sizes(), weight_in_order.strides()))) return out;
  return masked_weight(weight, mask, weight.scalar_type()).to(dtype);
}

void mask_in_place(const at::Tensor& weight, const at::Tensor& mask) {
  if (weight.is_non_overlapping_and_dense()) {
    const auto [weight_in_order, mask_in_order] = in_memory_order(weight, mask);
    if (const Known known(mask_in_order); !known.none()) {
      known.apply(weight_in_order, weight_in_order);
      return;
    }
  }
  const at::Tensor factor = mask.to(weight.scalar_type());
  zero_where_zero(weight.mul_(factor), factor);
}

bool casts_while_masking(const at::Tensor& weight, const at::Tensor& mask) {
  if (!any_kernel() || !weight.is_cuda() || weight.scalar_type() != at::kFloat || !mask.defined()) return false;
  if (mask.device() != weight.device() || mask.sym_sizes() != weight.sym_sizes() || !packable(mask.scalar_type())) {
    return false;
  }
  if (forced_path() && forced_path() != Path::kMaskCopy) return false;
  return !obstacle(Kernel::kMaskCopy, weight.device()) && !capturing(weight.device());
}

bool leaves_channels_out(const at::Tensor& weight, const at::Tensor& mask) {
  if (compact_is_off() || !weight.is_non_overlapping_and_dense()) return false;
  const DevicePatternPtr pattern = device_pattern_of(in_memory_order(weight, mask).second);
  return pattern && pattern->known() && pattern->share_left() < cuda::kMostShareLeft;
}

std::tuple<std::string, std::string> explain_copy(const at::Tensor& weight, const at::Tensor& mask,
                                                  const char* operation) {
  const c10::Device device = weight.device();
  const char* why = obstacle(Kernel::kMaskCopy, device);
  if (!why) {
    const DevicePatternPtr pattern = packable(mask.scalar_type()) ? device_pattern_of(mask) : nullptr;
    if (!pattern) {
      why = "the mask has no version, or a dtype of its own";
    } else if (!pattern->ready(mask, /*kernels=*/true, /*wait=*/true) || !pattern->binary()) {
      why = "the mask is soft";
    }
  }
  const char* not_fused = "it has no kernel of its own";
  const Choice choice = choose_device(operation, Pass::kForward, 0, 0,
                                      {why, not_fused, not_fused, not_fused, not_fused, not_fused}, why, {not_fused});
  return {path_name(choice.path), choice.reason};
}

}  // namespace masked_ops::device
