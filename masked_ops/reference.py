"""Every operation in plain torch: the oracle of the tests, and what runs where nothing can be compiled.

Each function has the name and the arguments of an operation of ``torch.ops.masked_ops`` and is differentiable through
torch's own operations, so that it works under every transform (``vmap``, forward AD, ``torch.compile``) by itself.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def _check_mask(weight: Tensor, mask: Tensor) -> None:
    if not (weight.is_floating_point() or weight.is_complex()):
        raise RuntimeError(f"weight must have a floating-point dtype, got {weight.dtype}")
    if mask.shape != weight.shape:
        raise RuntimeError(f"mask must have the shape of weight, {list(weight.shape)}, got {list(mask.shape)}")
    if mask.device != weight.device:
        raise RuntimeError(f"mask must be on the device of weight, {weight.device}, got {mask.device}")


def apply_mask(weight: Tensor, mask: Tensor) -> Tensor:
    """``where(mask == 0, 0, weight * mask)``, the mask taken in the weight's dtype."""
    _check_mask(weight, mask)
    factor = mask.detach().to(weight.dtype)
    if weight.layout is torch.sparse_coo:  # a gradient; torch.where takes no sparse tensors
        indices = weight._indices()
        values = apply_mask(weight._values(), factor[tuple(indices)])
        return torch.sparse_coo_tensor(
            indices, values, weight.shape, is_coalesced=weight.is_coalesced(), check_invariants=False
        )
    return torch.where(factor == 0, 0, weight * factor)


def linear(input: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(input, apply_mask(weight, mask), bias)


def linear_grad_input(grad_output: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    return torch.matmul(grad_output, apply_mask(weight, mask).conj())


def linear_grad_weight(grad_output: Tensor, input: Tensor, mask: Tensor) -> Tensor:
    rows = list(range(grad_output.dim() - 1))
    return apply_mask(torch.tensordot(grad_output, input.conj(), (rows, rows)), mask)


def convolution(
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> Tensor:
    masked = apply_mask(weight, mask)
    return torch.ops.aten.convolution(
        input, masked, bias, stride, padding, dilation, transposed, output_padding, groups
    )


def convolution_grad_input(
    grad_output: Tensor,
    weight: Tensor,
    mask: Tensor,
    input_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> Tensor:
    masked = apply_mask(weight, mask)
    # Only the input's sizes are read; an expanded scalar has them without the memory.
    input = grad_output.new_zeros(()).expand(input_size)
    grads = torch.ops.aten.convolution_backward(
        grad_output,
        input,
        masked,
        None,
        stride,
        padding,
        dilation,
        transposed,
        output_padding,
        groups,
        [True, False, False],
    )
    return grads[0]


def convolution_grad_weight(
    grad_output: Tensor,
    input: Tensor,
    mask: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> Tensor:
    weight = grad_output.new_zeros(()).expand(mask.shape)
    grads = torch.ops.aten.convolution_backward(
        grad_output,
        input,
        weight,
        None,
        stride,
        padding,
        dilation,
        transposed,
        output_padding,
        groups,
        [False, True, False],
    )
    return apply_mask(grads[1], mask)


def _mask_of(weight_bits: Tensor, in_features: int) -> Tensor:
    """The bits as a bool matrix ``[N, in_features]``."""
    if weight_bits.dtype != torch.uint8 or weight_bits.dim() != 2 or weight_bits.shape[1] != (in_features + 7) // 8:
        raise RuntimeError(
            f"weight_bits must be uint8 of shape [out_features, {(in_features + 7) // 8}], "
            f"got {weight_bits.dtype} of shape {list(weight_bits.shape)}"
        )
    shifts = torch.arange(8, dtype=torch.uint8, device=weight_bits.device)
    return ((weight_bits.unsqueeze(-1) >> shifts) & 1).flatten(1)[:, :in_features].to(torch.bool)


def unpack_values(weight_values: Tensor, weight_bits: Tensor, in_features: int) -> Tensor:
    mask = _mask_of(weight_bits, in_features)
    flat = mask.flatten()
    # Pruned places read the zero behind the values. By index rather than masked_scatter, which vmap does not know.
    place = torch.where(flat, flat.cumsum(0) - 1, weight_values.shape[0])
    padded = torch.cat([weight_values, weight_values.new_zeros(1)])
    return padded.index_select(0, place).view(mask.shape)


def pack_values(weight: Tensor, weight_bits: Tensor, nnz: int) -> Tensor:
    places = _mask_of(weight_bits, weight.shape[1]).flatten().nonzero().squeeze(1)
    return weight.reshape(-1).index_select(0, places)


def packed_linear(
    input: Tensor, weight_values: Tensor, weight_bits: Tensor, in_features: int, bias: Tensor | None = None
) -> Tensor:
    return F.linear(input, unpack_values(weight_values, weight_bits, in_features), bias)


def packed_linear_grad_input(
    grad_output: Tensor, weight_values: Tensor, weight_bits: Tensor, in_features: int
) -> Tensor:
    return torch.matmul(grad_output, unpack_values(weight_values, weight_bits, in_features))


def packed_linear_grad_values(grad_output: Tensor, input: Tensor, weight_bits: Tensor, nnz: int) -> Tensor:
    rows = list(range(grad_output.dim() - 1))
    return pack_values(torch.tensordot(grad_output, input, (rows, rows)), weight_bits, nnz)
