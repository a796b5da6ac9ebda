"""Every operation in plain torch: the oracle of the tests, and what runs where nothing can be compiled.

Each function has the name and the arguments of an operation of ``torch.ops.masked_ops`` and is differentiable through
torch's own operations, so that it works under every transform (``vmap``, forward AD, ``torch.compile``) by itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# --- checks: those of the compiled operations, for the fallback and for the fake kernels -----------------------------


def check_tensors(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {tensor!r}")


def check_dense(name: str, tensor: Tensor) -> None:
    torch._check(tensor.layout == torch.strided, lambda: f"{name} must be dense, got layout {tensor.layout}")


def check_mask(weight: Tensor, mask: Tensor) -> None:
    check_tensors(weight=weight, mask=mask)
    check_dense("mask", mask)
    torch._check(
        weight.is_floating_point() or weight.is_complex(),
        lambda: f"weight must have a floating-point dtype, got {weight.dtype}",
    )
    torch._check(
        mask.shape == weight.shape,
        lambda: f"mask must have the shape of weight, {list(weight.shape)}, got {list(mask.shape)}",
    )
    torch._check(
        mask.device == weight.device,
        lambda: f"mask must be on the device of weight, {weight.device}, got {mask.device}",
    )


def check_cast(weight: Tensor, dtype: torch.dtype | None) -> None:
    if dtype is not None:
        torch._check(
            dtype.is_complex if weight.is_complex() else dtype.is_floating_point,
            lambda: (
                f"dtype must be {'complex' if weight.is_complex() else 'a floating-point one'} as the weight's, "
                f"{weight.dtype}, got {dtype}"
            ),
        )


def check_same_kind(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    torch._check(
        tensor.device == other.device,
        lambda: f"{name} must be on the device of {other_name}, {other.device}, got {tensor.device}",
    )
    # Plain torch casts where autocast is on.
    autocast = torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
    torch._check(
        autocast or tensor.dtype == other.dtype,
        lambda: f"{name} must have the dtype of {other_name}, {other.dtype}, got {tensor.dtype}",
    )


def check_last_dim(name: str, tensor: Tensor, other_name: str, size: int) -> None:
    torch._check(
        tensor.dim() > 0 and tensor.shape[-1] == size,
        lambda: (
            f"{name} must have {size} features in its last dimension, as {other_name} has, "
            f"got shape {list(tensor.shape)}"
        ),
    )


def check_linear(input: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None) -> None:
    check_tensors(input=input)
    check_mask(weight, mask)
    check_dense("weight", weight)
    check_same_kind("input", input, "weight", weight)
    torch._check(weight.dim() in (1, 2), lambda: f"weight must have 1 or 2 dimensions, got shape {list(weight.shape)}")
    if input.is_nested:  # and has no sizes; torch checks those of its parts
        return
    check_last_dim("input", input, "weight", weight.shape[-1])
    if bias is None:
        return
    check_same_kind("bias", bias, "weight", weight)
    output = (*input.shape[:-1], *weight.shape[:-1])
    torch._check(
        bias.dim() <= len(output)
        and all(size in (1, wanted) for size, wanted in zip(bias.shape[::-1], output[::-1], strict=False)),
        lambda: f"bias must broadcast to the output, {list(output)}, got shape {list(bias.shape)}",
    )


def check_linear_grad_input(grad_output: Tensor, weight: Tensor, mask: Tensor) -> None:
    check_tensors(grad_output=grad_output)
    check_mask(weight, mask)
    check_dense("weight", weight)
    check_same_kind("grad_output", grad_output, "weight", weight)
    torch._check(weight.dim() == 2, lambda: f"weight must have 2 dimensions, got shape {list(weight.shape)}")
    check_last_dim("grad_output", grad_output, "weight", weight.shape[0])


def check_linear_grad_weight(grad_output: Tensor, input: Tensor, mask: Tensor) -> None:
    check_tensors(grad_output=grad_output, input=input, mask=mask)
    torch._check(mask.dim() == 2, lambda: f"mask must have 2 dimensions, got shape {list(mask.shape)}")
    torch._check(
        mask.device == grad_output.device,
        lambda: f"mask must be on the device of grad_output, {grad_output.device}, got {mask.device}",
    )
    check_same_kind("input", input, "grad_output", grad_output)
    check_last_dim("grad_output", grad_output, "mask", mask.shape[0])
    check_last_dim("input", input, "mask", mask.shape[1])
    torch._check(
        grad_output.shape[:-1] == input.shape[:-1],
        lambda: (
            "grad_output and input must agree in all but their last dimension, "
            f"got shapes {list(grad_output.shape)} and {list(input.shape)}"
        ),
    )


_MOST = 2**31 - 1  # of a number in a convolution: some of torch's backends cut them to 32 bits


def check_geometry(
    weight_shape: Sequence[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> None:
    for name, numbers, least in (
        ("stride", stride, 1),
        ("padding", padding, 0),
        ("dilation", dilation, 1),
        ("output_padding", output_padding, 0),
    ):
        for number in numbers:
            torch._check(number >= least, lambda: f"{name} must be at least {least}, got {numbers}")  # noqa: B023
            torch._check(number <= _MOST, lambda: f"{name} must be at most {_MOST}, got {numbers}")  # noqa: B023
    torch._check(
        all(size >= 1 for size in weight_shape[2:]),
        lambda: f"weight must have a kernel of at least 1 in every dimension, got shape {list(weight_shape)}",
    )
    torch._check(groups >= 1, lambda: f"groups must be at least 1, got {groups}")


def check_convolution(input: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, *geometry: Any) -> None:
    check_tensors(input=input)
    check_mask(weight, mask)
    check_dense("weight", weight)
    check_same_kind("input", input, "weight", weight)
    if bias is not None:
        check_same_kind("bias", bias, "weight", weight)
    check_geometry(weight.shape, *geometry)


def check_grad_output(
    grad_output: Tensor, input_size: Sequence[int], weight_shape: Sequence[int], *geometry: Any
) -> None:
    """Torch reads past the end of a grad_output that is too small."""
    check_geometry(weight_shape, *geometry)
    input, weight = (torch.empty(size, device="meta") for size in (input_size, weight_shape))
    wanted = torch.ops.aten.convolution(input, weight, None, *geometry).shape
    torch._check(
        input.numel() == 0 or grad_output.shape == wanted,
        lambda: f"grad_output must have the shape of the output, {list(wanted)}, got {list(grad_output.shape)}",
    )


def check_packed_convolution(
    weight_values: Tensor, weight_bits: Tensor, weight_size: Sequence[int], *geometry: Any
) -> None:
    check_tensors(weight_values=weight_values, weight_bits=weight_bits)
    torch._check(
        len(weight_size) >= 3 and all(size >= 0 for size in weight_size),
        lambda: f"weight_size must have at least 3 numbers, none of them negative, got {list(weight_size)}",
    )
    torch._check(
        weight_values.dim() == 1 and weight_values.is_floating_point(),
        lambda: (
            "weight_values must be a floating-point tensor of one dimension, "
            f"got {weight_values.dtype} of shape {list(weight_values.shape)}"
        ),
    )
    check_geometry(weight_size, *geometry)


# --- operations ------------------------------------------------------------------------------------------------------


class _Masking(torch.autograd.Function):
    """A derivative that takes sparse gradients, as those of torch's masked_fill and where do not."""

    @staticmethod
    def forward(weight: Tensor, mask: Tensor) -> Tensor:
        if weight.layout is torch.sparse_coo:  # a gradient
            indices = weight._indices()
            return torch.sparse_coo_tensor(
                indices,
                _masked(weight._values(), mask[tuple(indices)]),
                weight.shape,
                is_coalesced=weight.is_coalesced(),
                check_invariants=False,
            )
        return _masked(weight, mask)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return _Masking.apply(grad_output, mask.conj()), None

    @staticmethod
    def jvp(ctx: Any, weight: Tensor, mask: None) -> Tensor:
        return _Masking.apply(weight, ctx.saved_tensors[0])


def is_float8(dtype: torch.dtype) -> bool:
    """Whether torch can do little more with it than multiply, compare and cast."""
    return dtype.is_floating_point and dtype.itemsize == 1


def _masked(weight: Tensor, mask: Tensor) -> Tensor:
    if is_float8(weight.dtype):  # of which torch has no masked_fill; its zero has no bits
        product = weight * mask.to(weight.dtype)
        return product.view(torch.uint8).masked_fill_(~mask.bool(), 0).view(weight.dtype)
    if mask.dtype == torch.bool:
        return weight.masked_fill(~mask, 0)
    # The weight first: it decides on the memory format.
    return (weight * mask).masked_fill_(~mask.bool(), 0)


def apply_mask(weight: Tensor, mask: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """``where(mask == 0, 0, weight * mask)``, the mask taken in the weight's dtype; then in ``dtype``."""
    check_mask(weight, mask)
    check_cast(weight, dtype)
    mask = mask.detach()
    if mask.dtype != torch.bool:
        mask = mask.to(weight.dtype)
    if torch._C._are_functorch_transforms_active():  # below which no autograd.Function can be called
        masked = _masked(weight, mask)
    else:
        masked = _Masking.apply(weight, mask)
    return masked if dtype is None else masked.to(dtype)


def linear(input: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None = None) -> Tensor:
    check_linear(input, weight, mask, bias)
    return F.linear(input, apply_mask(weight, mask), bias)


def linear_grad_input(grad_output: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    check_linear_grad_input(grad_output, weight, mask)
    return torch.matmul(grad_output, apply_mask(weight, mask).conj())


def linear_grad_weight(grad_output: Tensor, input: Tensor, mask: Tensor) -> Tensor:
    check_linear_grad_weight(grad_output, input, mask)
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
    geometry = (stride, padding, dilation, transposed, output_padding, groups)
    check_convolution(input, weight, mask, bias, *geometry)
    return torch.ops.aten.convolution(input, apply_mask(weight, mask), bias, *geometry)


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
    geometry = (stride, padding, dilation, transposed, output_padding, groups)
    check_tensors(grad_output=grad_output)
    check_mask(weight, mask)
    check_dense("weight", weight)
    check_same_kind("grad_output", grad_output, "weight", weight)
    check_grad_output(grad_output, input_size, weight.shape, *geometry)
    masked = apply_mask(weight, mask)
    # Only the input's sizes are read; an expanded scalar has them without the memory.
    input = grad_output.new_zeros(()).expand(input_size)
    grads = torch.ops.aten.convolution_backward(grad_output, input, masked, None, *geometry, [True, False, False])
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
    geometry = (stride, padding, dilation, transposed, output_padding, groups)
    check_tensors(grad_output=grad_output, input=input, mask=mask)
    check_same_kind("input", input, "grad_output", grad_output)
    check_grad_output(grad_output, input.shape, mask.shape, *geometry)
    weight = grad_output.new_zeros(()).expand(mask.shape)
    grads = torch.ops.aten.convolution_backward(grad_output, input, weight, None, *geometry, [False, True, False])
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


def _dense_kernel(weight_values: Tensor, weight_bits: Tensor, weight_size: Sequence[int]) -> Tensor:
    return unpack_values(weight_values, weight_bits, math.prod(weight_size[1:])).view(weight_size)


def packed_convolution(
    input: Tensor,
    weight_values: Tensor,
    weight_bits: Tensor,
    weight_size: list[int],
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> Tensor:
    geometry = (stride, padding, dilation, transposed, output_padding, groups)
    check_packed_convolution(weight_values, weight_bits, weight_size, *geometry)
    weight = _dense_kernel(weight_values, weight_bits, weight_size)
    return torch.ops.aten.convolution(input, weight, bias, *geometry)


def packed_convolution_grad_input(
    grad_output: Tensor,
    weight_values: Tensor,
    weight_bits: Tensor,
    weight_size: list[int],
    input_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> Tensor:
    geometry = (stride, padding, dilation, transposed, output_padding, groups)
    check_packed_convolution(weight_values, weight_bits, weight_size, *geometry)
    check_grad_output(grad_output, input_size, weight_size, *geometry)
    weight = _dense_kernel(weight_values, weight_bits, weight_size)
    input = grad_output.new_zeros(()).expand(input_size)
    grads = torch.ops.aten.convolution_backward(grad_output, input, weight, None, *geometry, [True, False, False])
    return grads[0]


def packed_convolution_grad_values(
    grad_output: Tensor,
    input: Tensor,
    weight_bits: Tensor,
    weight_size: list[int],
    nnz: int,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> Tensor:
    geometry = (stride, padding, dilation, transposed, output_padding, groups)
    check_same_kind("input", input, "grad_output", grad_output)
    check_grad_output(grad_output, input.shape, weight_size, *geometry)
    weight = grad_output.new_zeros(()).expand(weight_size)
    grads = torch.ops.aten.convolution_backward(grad_output, input, weight, None, *geometry, [False, True, False])
    # No flatten: the older vmap, behind is_grads_batched, has no rule for it.
    rows = grads[1].reshape(weight_size[0], math.prod(weight_size[1:]))
    return pack_values(rows, weight_bits, nnz)
