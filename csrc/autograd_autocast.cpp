// A linear layer under CUDA's autocast, in one node: the weight is masked and cast in one pass, as torch's product
// wants it, and its gradient comes back masked and in the dtype of the weight, out of the product itself where a kernel
// does that.
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/tensordot.h>

#include "autograd.h"
#include "autograd_common.h"
#include "checks.h"
#include "device_linear.h"

namespace masked_ops {
namespace {

struct LinearAutocast : torch::autograd::Function<LinearAutocast> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& weight, const Tensor& mask,
                        const OptionalTensor& bias) {
    at::AutoDispatchBelowADInplaceOrView below;
    const bool has_bias = bias && bias->defined();
    ctx->saved_data["has_bias"] = has_bias;
    if (const auto output = device::compact_linear(input, weight, mask, has_bias ? *bias : Tensor())) {
      ctx->save_for_backward({input, weight, mask, Tensor()});
      return *output;
    }
    const Tensor masked = call_apply_mask(weight, mask, input.scalar_type());
    check_linear(input, masked, mask, bias);
    ctx->save_for_backward({input, weight, mask, needs_grad(input) ? masked : Tensor()});
    return at::linear(input, masked, bias);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &dy = grads[0], &input = saved[0], &weight = saved[1], &mask = saved[2], &masked = saved[3];
    variable_list result(4);
    const bool here = records_nothing() && computes_here(dy, input, weight, mask);
    if (ctx->needs_input_grad(0)) {
      if (here) {
        at::AutoDispatchBelowADInplaceOrView below;
        result[0] = device::linear_grad_input(dy, weight, mask, masked);
      } else {
        result[0] = at::matmul(dy, call_apply_mask(weight, mask, dy.scalar_type()));
      }
    }
    if (ctx->needs_input_grad(1)) {
      if (here) {
        at::AutoDispatchBelowADInplaceOrView below;
        result[1] = device::linear_grad_weight_as(weight.scalar_type(), dy, input, mask);
      } else {
        const std::vector<int64_t> rows = all_but(dy.dim() - 1, dy.dim());
        result[1] = call_apply_mask(at::tensordot(dy, input, rows, rows), mask, weight.scalar_type());
      }
    }
    if (ctx->saved_data["has_bias"].toBool() && ctx->needs_input_grad(3)) result[3] = sum_to_last_dim(dy);
    return result;
  }
};

}  // namespace

bool takes_linear_autocast(const Tensor& input, const Tensor& weight, const Tensor& mask, const OptionalTensor& bias) {
  const bool plain = weight.dim() == 2 && (!bias || !bias->defined() || bias->dim() == 1);
  return plain && !takes_composite(input, weight, bias) && computes_here(input, weight, mask);
}

Tensor linear_autocast(const Tensor& input, const Tensor& weight, const Tensor& mask, const OptionalTensor& bias) {
  return LinearAutocast::apply(input, weight, mask, bias);
}

}  // namespace masked_ops
