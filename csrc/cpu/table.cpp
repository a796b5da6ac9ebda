// The capability's kernels, in the order of api.h: one line here for each new one.
#include "elements.h"
#include "kernels.h"

namespace masked_ops::cpu::MASKED_OPS_CAPABILITY {

extern const Kernels table;
const Kernels table = {
    .capability = MASKED_OPS_STRING(MASKED_OPS_CAPABILITY),
    .lanes = Vec::kLanes,
    .bf16_dots = Operand<BFloat16>::kDepth == 2,
    .pack_mask = pack_mask,
    .mask_copy = mask_copy,
    .mask_multiply = mask_multiply,
    .linear = linear,
    .linear_grad_input = linear_grad_input,
    .linear_grad_weight = linear_grad_weight,
    .row_offsets = row_offsets,
    .compress = compress,
    .expand = expand,
    .compress_last = compress_last,
    .expand_last = expand_last,
    .make_index = make_index,
    .spmm = spmm,
    .compress_spmm = compress_spmm,
    .sddmm = sddmm,
    .sparse_gradients = sparse_gradients,
    .make_conv_index = make_conv_index,
    .conv_spmm = conv_spmm,
    .conv_sddmm = conv_sddmm,
    .pointwise = pointwise,
    .pointwise_grad_input = pointwise_grad_input,
    .pointwise_grad_weight = pointwise_grad_weight,
    .depthwise = depthwise,
    .depthwise_grad_input = depthwise_grad_input,
    .depthwise_grad_weight = depthwise_grad_weight,
    .select_channels = select_channels,
    .row_columns = row_columns,
    .spmv = spmv,
    .spmv_transposed = spmv_transposed,
    .sampled_outer = sampled_outer,
    .row_ranks = row_ranks,
    .packed_linear = packed_linear,
    .packed_linear_grad_input = packed_linear_grad_input,
    .expands_grad_input = expands_grad_input,
    .packed_linear_grad_values = packed_linear_grad_values,
    .fma_loop = fma_loop,
    .read_loop = read_loop,
};

}  // namespace masked_ops::cpu::MASKED_OPS_CAPABILITY
