// The linear family on a device.
#include "device_linear.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mm.h>

#include "checks.h"
#include "device_compact.h"
#include "device_pattern.h"
#include "device_tuning.h"
#include "masking.h"

namespace masked_ops::device {
namespace {

bool half_precision(const at::Tensor& t) { return t.scalar_type() == at::kHalf || t.scalar_type() == at::kBFloat16; }

// What the fused kernels ask of shapes and layouts, by cuda/api.h; null if they have it. factor is the weight, or for
// the gradient of the weight grad_output.
const char* misfit(Pass pass, const at::Tensor& factor, const at::Tensor& mask) {
  if (!half_precision(factor)) return "its kernel takes bfloat16 and float16 only";
  if (pass != Pass::kGradWeight && !(factor.is_contiguous() && is_aligned(factor))) {
    return "the weight is not contiguous and aligned";
  }
  if (mask.size(1) % 8 != 0) return "in_features is not a multiple of 8";
  if (pass != Pass::kForward && mask.size(0) % 8 != 0) return "out_features is not a multiple of 8";
  return nullptr;
}

// The path of a call, and the pattern that it needs. A mask that is new is not waited for, unless a path is forced.
// (Of the fused kernels only gemm_sm90 has the gradient of the weight; else it is torch's GEMM, masked in place.)
struct Plan {
  DevicePatternPtr pattern;
  std::optional<CompactPlan> compact;
  Choice choice{Path::kCopy, ""};

  // dtype is that of the product; factor may be a weight of another one.
  Plan(Pass pass, at::ScalarType dtype, int64_t M, const at::Tensor& factor, const at::Tensor& mask, bool explain) {
    if (!explain && !any_kernel() && !forced_path()) return;
    const c10::Device device = factor.device();
    const bool wait = explain || forced_path().has_value();
    const char* why = obstacle(Kernel::kMaskCopy, device);
    if (!why && capturing(device)) why = "a graph is being captured, which has to read the mask itself";
    if (!why && packable(mask.scalar_type())) pattern = device_pattern_of(mask);
    if (!why && !pattern) why = "the mask has no version, or a dtype of its own";
    if (!why && !pattern->ready(mask, /*kernels=*/true, wait)) why = "the mask is new";
    if (!why && !pattern->binary()) why = "the mask is soft";
    const char* fused = why ? why : misfit(pass, factor, mask);
    const char* sm80 = fused ? fused : obstacle(Kernel::kGemmSm80, device);
    const char* sm90 = fused ? fused : obstacle(Kernel::kGemmSm90, device);
    const char* packed = "it is for packed layers";
    CompactCase of = CompactCase::linear(pass, dtype, M, mask.size(0), mask.size(1));
    of.masks_for_free = !sm90;
    compact.emplace(of, why, pattern, mask, /*capture=*/false, wait);
    choice = choose_device("linear layer", pass, M, mask.numel(), {why, packed, sm80, sm90, packed, packed}, why,
                           compact->option());
    if (M == 0 || mask.numel() == 0) choice.path = Path::kCopy;  // nothing to compute; torch knows the shapes
  }

  // The path's own operands, if that is the compact one.
  std::optional<Compact> left() const { return choice.path == Path::kCompact ? compact->operands(-1) : std::nullopt; }

  bool fused() const { return choice.path == Path::kGemmSm80 || choice.path == Path::kGemmSm90; }

  // Undefined if the kernel does not serve this call after all, and is not forced.
  at::Tensor gemm(bool grad_input, const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias) const {
    const at::Tensor x = in_order(input), b = bias.defined() ? bias.contiguous() : bias;
    const at::Tensor fragments = pattern->fragments(current_stream(weight.device()), grad_input);
    const Kernel kernel = choice.path == Path::kGemmSm90 ? Kernel::kGemmSm90 : Kernel::kGemmSm80;
    const at::Tensor output = device::gemm(*api(), kernel, grad_input, x, weight, fragments, b);
    must_serve(output.defined());
    return output;
  }

  // Whether gemm_sm90 has written it.
  bool grad_weight(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& out) const {
    if (choice.path != Path::kGemmSm90) return false;
    const at::Tensor words = pattern->words(current_stream(out.device()));
    const bool served = words.defined() && gemm_grad_weight(*api(), in_order(grad_output), in_order(input), words, out);
    must_serve(served);
    return served;
  }

  void must_serve(bool served) const {
    TORCH_CHECK(served || !forced_path(), "path '", path_name(choice.path),
                "' cannot serve this linear layer: its kernel does not take this shape or alignment");
  }
};

}  // namespace

at::Tensor outer(const at::Tensor& grad_output, const at::Tensor& input) {
  return at::mm(as_matrix(grad_output, grad_output.size(-1)).t(), as_matrix(input, input.size(-1)).conj());
}

std::tuple<at::Tensor, at::Tensor> linear(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& mask,
                                          const at::Tensor& bias) {
  const at::ScalarType dtype = input.scalar_type();
  const Plan plan(Pass::kForward, dtype, rows_of(input), weight, mask, /*explain=*/false);
  if (plan.fused()) {
    if (const at::Tensor output = plan.gemm(false, input, weight, bias); output.defined()) return {output, {}};
  }
  if (const auto left = plan.left()) return {left->linear(input, left->weight(weight).to(dtype), bias), {}};
  const at::Tensor masked = masked_weight(weight, mask, dtype);
  return {at::linear(input, masked, bias.defined() ? std::optional(bias) : std::nullopt), masked};
}

std::optional<at::Tensor> compact_linear(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& mask,
                                         const at::Tensor& bias) {
  if (compact_is_off()) return {};
  const at::ScalarType dtype = input.scalar_type();
  const bool fits = input.dim() > 0 && input.size(-1) == weight.size(1) &&
                    (!bias.defined() || (bias.scalar_type() == dtype && bias.size(0) == weight.size(0)));
  if (!fits) return {};
  const auto left = Plan(Pass::kForward, dtype, rows_of(input), weight, mask, /*explain=*/false).left();
  return left ? std::optional(left->linear(input, left->weight(weight).to(dtype), bias)) : std::nullopt;
}

at::Tensor linear_grad_input(const at::Tensor& grad_output, const at::Tensor& weight, const at::Tensor& mask,
                             const at::Tensor& masked) {
  const at::ScalarType dtype = grad_output.scalar_type();
  if (!masked.defined()) {
    const Plan plan(Pass::kGradInput, dtype, rows_of(grad_output), weight, mask, /*explain=*/false);
    if (plan.fused()) {
      if (const at::Tensor dx = plan.gemm(true, grad_output, weight, at::Tensor()); dx.defined()) return dx;
    }
    if (const auto left = plan.left()) {
      const at::Tensor dx = at::matmul(left->output(grad_output), left->weight(weight).to(dtype).conj());
      return left->whole_input(dx, at::MemoryFormat::Contiguous);
    }
  }
  at::Tensor grad_input = empty_with_last_dim(grad_output, weight.size(1));
  at::Tensor rows = grad_input.view({rows_of(grad_output), weight.size(1)});
  const at::Tensor factor = masked.defined() ? masked : masked_weight(weight, mask, dtype);
  at::mm_out(rows, as_matrix(grad_output, weight.size(0)), factor.conj());
  return grad_input;
}

at::Tensor linear_grad_weight(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& mask,
                              at::Tensor grad_weight) {
  const Plan plan(Pass::kGradWeight, grad_output.scalar_type(), rows_of(grad_output), grad_output, mask, false);
  if (plan.grad_weight(grad_output, input, grad_weight)) return grad_weight;
  if (const auto left = plan.left()) {
    left->whole_weight(outer(left->output(grad_output), left->input(input)), grad_weight);
    return grad_weight;
  }
  at::mm_out(grad_weight, as_matrix(grad_output, mask.size(0)).t(), as_matrix(input, mask.size(1)).conj());
  mask_in_place(grad_weight, mask);
  return grad_weight;
}

at::Tensor linear_grad_weight_as(at::ScalarType dtype, const at::Tensor& grad_output, const at::Tensor& input,
                                 const at::Tensor& mask) {
  const Plan plan(Pass::kGradWeight, grad_output.scalar_type(), rows_of(grad_output), grad_output, mask, false);
  if (plan.choice.path == Path::kGemmSm90) {
    const at::Tensor grad_weight = at::empty(mask.sizes(), grad_output.options().dtype(dtype));
    if (plan.grad_weight(grad_output, input, grad_weight)) return grad_weight;
  }
  if (const auto left = plan.left()) {
    const at::Tensor grad_weight = at::empty(mask.sizes(), grad_output.options().dtype(dtype));
    left->whole_weight(outer(left->output(grad_output), left->input(input)).to(dtype), grad_weight);
    return grad_weight;
  }
  return masked_weight(outer(grad_output, input), mask, dtype);
}

std::tuple<std::string, std::string> explain_linear(Pass pass, const at::Tensor& weight, const at::Tensor& mask,
                                                    int64_t batch) {
  const Plan plan(pass, weight.scalar_type(), batch, weight, mask, /*explain=*/true);
  return {path_name(plan.choice.path), plan.choice.reason};
}

}  // namespace masked_ops::device
