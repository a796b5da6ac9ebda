"""Masked linear layers and convolutions as functions: torch's own signatures with ``mask`` after ``weight``.

``masked_X(input, weight, mask, ...)`` returns what ``F.X(input, where(mask == 0, 0, weight * mask), ...)`` returns,
with its gradients; ``grad_weight`` is masked and the mask gets no gradient. ``mask`` has exactly the shape of
``weight`` and any dtype. If all of its values are 0 or 1 it is binary, and the fused kernels run: a pruned weight
counts as absent, whatever it holds, Inf and NaN included. Any other mask is soft and multiplies.

``packed_X`` is the same of a weight that is stored as the values that are left and one bit a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import _ops, reference

__all__ = [
    "apply_mask",
    "masked_conv1d",
    "masked_conv2d",
    "masked_conv3d",
    "masked_conv_transpose1d",
    "masked_conv_transpose2d",
    "masked_conv_transpose3d",
    "masked_linear",
    "masked_matmul",
    "packed_conv1d",
    "packed_conv2d",
    "packed_conv3d",
    "packed_conv_transpose1d",
    "packed_conv_transpose2d",
    "packed_conv_transpose3d",
    "packed_linear",
    "packed_matmul",
]

_IntOrInts = int | Sequence[int]


def apply_mask(weight: Tensor, mask: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """The masked weight, ``where(mask == 0, 0, weight * mask)``, in one pass.

    Args:
        weight: floating-point or complex tensor of any shape and layout.
        mask: tensor of the same shape and device, any dtype; taken in the weight's dtype.
        dtype: of the result, floating-point or complex as the weight's; by default the weight's own. The masked weight
            is cast, on CUDA devices in the same pass.

    Returns:
        A tensor like ``weight``, in its memory format; differentiable in ``weight``.

    Raises:
        RuntimeError: if the shapes or devices differ or ``weight`` or ``dtype`` is not a floating-point one.

    Example:
        >>> w = torch.tensor([1.0, -2.0, float("inf")])
        >>> masked_ops.apply_mask(w, torch.tensor([1, 1, 0]))
        tensor([ 1., -2.,  0.])
    """
    _ops.load()
    return _ops.apply_mask(weight, mask, dtype=dtype)


def masked_linear(input: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None = None) -> Tensor:
    """Linear layer with a masked weight; :func:`torch.nn.functional.linear` with ``mask`` after ``weight``.

    Args:
        input: ``[..., K]``, floating point.
        weight: ``[N, K]`` (or ``[K]``), of the input's dtype.
        mask: the shape of ``weight``, any dtype.
        bias: ``[N]`` or None.

    Returns:
        ``[..., N]``, of the input's dtype.

    Raises:
        RuntimeError: as ``F.linear`` for arguments that do not fit; naming ``mask`` if its shape or device differs.

    Example:
        >>> x, w = torch.ones(2, 3), torch.tensor([[1.0, 2.0, 3.0]])
        >>> masked_ops.masked_linear(x, w, torch.tensor([[1, 0, 1]]))
        tensor([[4.],
                [4.]])
    """
    _ops.load()
    if torch.compiler.is_dynamo_compiling():
        return _ops.linear(input, weight, mask, bias)
    return _ops.direct.linear(input, weight, mask, bias)


def masked_matmul(input: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None = None) -> Tensor:
    """Linear layer whose masked weight is stored as ``[K, N]``: ``input @ (weight under mask) + bias``.

    That is how ``transformers.pytorch_utils.Conv1D`` (GPT-2) stores its weight. Nothing is transposed: the product is
    the one that gives a linear layer's gradient of its input, and runs on the same kernels.

    Args:
        input: ``[..., K]``, floating point.
        weight: ``[K, N]``, of the input's dtype.
        mask: the shape of ``weight``, any dtype.
        bias: ``[N]`` or None.

    Returns:
        ``[..., N]``, of the input's dtype.

    Raises:
        RuntimeError: for arguments that do not fit; naming ``mask`` if its shape or device differs.

    Example:
        >>> x, w = torch.ones(2, 3), torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
        >>> masked_ops.masked_matmul(x, w, torch.tensor([[1, 0], [0, 1], [1, 1]]))
        tensor([[ 6., 10.],
                [ 6., 10.]])
    """
    _ops.load()
    reference.check_tensors(weight=weight)
    dtype = _autocast_dtype(weight) if weight.is_cuda else None
    if weight.is_complex() or dtype is not None:
        # The gradient of a complex product takes a conjugate. Under CUDA's autocast one pass masks and casts.
        out = torch.matmul(input, _ops.apply_mask(weight, mask, dtype=dtype))
        return out if bias is None else out + (bias if dtype is None else bias.to(dtype))
    return _by_input(_ops.direct.matmul, _ops.linear_grad_input, input, (weight, mask), bias)


def packed_matmul(
    input: Tensor,
    weight_values: Tensor,
    weight_bits: Tensor,
    out_features: int,
    bias: Tensor | None = None,
) -> Tensor:
    """:func:`masked_matmul` of a weight ``[K, N]`` that is stored as its remaining values and one bit a weight.

    Args:
        input: ``[..., K]``, floating point.
        weight_values: ``[nnz]``, the weights whose bit is set, in row-major order, of the input's dtype.
        weight_bits: uint8 ``[K, ceil(out_features / 8)]``, little bit order; bits beyond ``out_features`` are 0.
        out_features: N, the columns of the weight.
        bias: ``[N]`` or None.

    Returns:
        ``[..., N]``, of the input's dtype; differentiable in ``input``, ``weight_values`` and ``bias``.

    Raises:
        RuntimeError: naming the argument that does not fit.

    Example:
        >>> bits = torch.tensor([[0b101], [0b010]], dtype=torch.uint8)
        >>> values = torch.tensor([10.0, 20.0, 30.0])
        >>> masked_ops.packed_matmul(torch.tensor([[1.0, 2.0]]), values, bits, 3)
        tensor([[10., 60., 20.]])
    """
    _ops.load()
    reference.check_tensors(weight_values=weight_values)
    operands = (weight_values, weight_bits, out_features)
    return _by_input(_ops.direct.packed_matmul, _ops.packed_linear_grad_input, input, operands, bias)


def _autocast_dtype(weight: Tensor) -> torch.dtype | None:
    """What autocast has a product with ``weight`` computed in. Not that of the input, which torch.fx may trace."""
    kind = weight.device.type
    casts = weight.is_floating_point() and weight.dtype is not torch.float64 and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if casts else None


def _by_input(
    direct: Callable[..., Tensor | None],
    gradient: Callable[..., Tensor],
    input: Tensor,
    weight: tuple[Any, ...],
    bias: Tensor | None,
) -> Tensor:
    """A product that is the gradient of a linear layer's input, plus a bias."""
    try:
        if not torch.compiler.is_dynamo_compiling():
            out = direct(input, *weight, bias)
            if out is not None:
                return out
        dtype = _autocast_dtype(weight[0])
        if dtype is not None:
            input, weight = input.to(dtype), (weight[0].to(dtype), *weight[1:])
            bias = None if bias is None else bias.to(dtype)
        out = gradient(input, *weight)
        return out if bias is None else out + bias
    except RuntimeError as error:
        if type(error) is not RuntimeError or "grad_output" not in str(error):
            raise
        raise RuntimeError(str(error).replace("grad_output", "input")) from None


def packed_linear(
    input: Tensor,
    weight_values: Tensor,
    weight_bits: Tensor,
    in_features: int,
    bias: Tensor | None = None,
) -> Tensor:
    """Linear layer whose weight is stored as its remaining values and one bit a weight.

    Args:
        input: ``[..., in_features]``, floating point.
        weight_values: ``[nnz]``, the weights whose bit is set, in row-major order, of the input's dtype.
        weight_bits: uint8 ``[N, ceil(in_features / 8)]``, little bit order; bits beyond ``in_features`` are 0.
        in_features: K, the columns of the weight.
        bias: ``[N]`` or None.

    Returns:
        ``[..., N]``, of the input's dtype; differentiable in ``input``, ``weight_values`` and ``bias``.

    Raises:
        RuntimeError: naming the argument that does not fit.

    Example:
        >>> bits = torch.tensor([[0b101]], dtype=torch.uint8)
        >>> masked_ops.packed_linear(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([10.0, 100.0]), bits, 3)
        tensor([[310.]])
    """
    _ops.load()
    if torch.compiler.is_dynamo_compiling():
        return _ops.packed_linear(input, weight_values, weight_bits, in_features, bias)
    return _ops.direct.packed_linear(input, weight_values, weight_bits, in_features, bias)


def _expand(name: str, value: _IntOrInts, n: int) -> list[int]:
    """One int or ``n`` of them, as a list of ``n``."""
    if isinstance(value, Sequence):
        values = list(value)
        if len(values) == 1:
            return values * n
        if len(values) != n:
            raise RuntimeError(f"{name} must be one integer or {n} of them, got {values}")
        return values
    return [value] * n


def _check_rank(n: int, input: Tensor) -> None:
    if input.dim() not in (n + 1, n + 2):
        raise RuntimeError(
            f"input must have {n + 2} dimensions, or {n + 1} without a batch, got shape {list(input.shape)}"
        )


def _conv(
    n: int,
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    stride: _IntOrInts,
    padding: str | _IntOrInts,
    dilation: _IntOrInts,
    groups: int,
    transposed: bool = False,
    output_padding: _IntOrInts = 0,
) -> Tensor:
    _ops.load()
    numbers = (stride, padding, dilation, groups, transposed, output_padding)
    if not torch.compiler.is_dynamo_compiling():
        out = _ops.direct.convolution(n, input, weight, mask, bias, *numbers)
        if out is not None:
            return out
    if not (isinstance(input, Tensor) and isinstance(weight, Tensor)):
        reference.check_tensors(input=input, weight=weight)
    if weight.dim() != n + 2:
        raise RuntimeError(f"weight must have {n + 2} dimensions, got shape {list(weight.shape)}")
    _check_rank(n, input)
    op: Callable[..., Tensor] = _ops.convolution
    operands: tuple[Any, ...] = (weight, mask)
    if weight.is_complex():
        op, operands = _complex_conv, (_ops.apply_mask(weight, mask),)
    return _convolve(op, n, input, operands, bias, weight.shape, *numbers)


def _packed_conv(
    n: int,
    input: Tensor,
    weight_values: Tensor,
    weight_bits: Tensor,
    weight_size: Sequence[int],
    bias: Tensor | None,
    stride: _IntOrInts,
    padding: str | _IntOrInts,
    dilation: _IntOrInts,
    groups: int,
    transposed: bool = False,
    output_padding: _IntOrInts = 0,
) -> Tensor:
    _ops.load()
    numbers = (stride, padding, dilation, groups, transposed, output_padding)
    if not torch.compiler.is_dynamo_compiling():
        out = _ops.direct.packed_convolution(n, input, weight_values, weight_bits, weight_size, bias, *numbers)
        if out is not None:
            return out
    if not isinstance(input, Tensor):
        reference.check_tensors(input=input)
    if len(weight_size) != n + 2:
        raise RuntimeError(f"weight_size must have {n + 2} numbers, got {list(weight_size)}")
    _check_rank(n, input)
    operands = (weight_values, weight_bits, weight_size)
    return _convolve(_ops.packed_convolution, n, input, operands, bias, weight_size, *numbers)


def _convolve(
    op: Callable[..., Tensor],
    n: int,
    input: Tensor,
    operands: tuple[Any, ...],
    bias: Tensor | None,
    weight_size: Sequence[int],
    stride: _IntOrInts,
    padding: str | _IntOrInts,
    dilation: _IntOrInts,
    groups: int,
    transposed: bool,
    output_padding: _IntOrInts,
) -> Tensor:
    """``op``, one of the convolutions, with the numbers as it takes them and a batch; ``operands`` are the weight."""
    stride = _expand("stride", stride, n)
    dilation = _expand("dilation", dilation, n)
    if isinstance(padding, str):
        if transposed:
            raise TypeError(f"padding of a transposed convolution must be integers, got {padding!r}")
        input, padding = _pad_by_name(input, weight_size, padding, stride, dilation)
    else:
        padding = _expand("padding", padding, n)
    output_padding = _expand("output_padding", output_padding, n)
    geometry = (stride, padding, dilation, transposed, output_padding, groups)
    batched = input.dim() == n + 2
    out = op(input if batched else input.unsqueeze(0), *operands, bias, *geometry)
    return out if batched else out.squeeze(0)


def _complex_conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> Tensor:
    """Over a masked weight, by torch's functions: they take real and imaginary parts apart, its operation cannot."""
    n = len(stride)
    if transposed:
        conv_transpose = getattr(F, f"conv_transpose{n}d")
        return conv_transpose(input, weight, bias, stride, padding, output_padding, groups, dilation)
    return getattr(F, f"conv{n}d")(input, weight, bias, stride, padding, dilation, groups)


def _pad_by_name(
    input: Tensor, weight_size: Sequence[int], padding: str, stride: list[int], dilation: list[int]
) -> tuple[Tensor, list[int]]:
    """``'valid'`` and ``'same'`` as numbers; an odd total goes to the right, where torch puts it."""
    if padding == "valid":
        return input, [0] * len(stride)
    if padding != "same":
        raise RuntimeError(f"padding must be integers, 'valid' or 'same', got {padding!r}")
    if any(s != 1 for s in stride):
        raise RuntimeError(f"padding='same' is not supported for strided convolutions, got stride {stride}")
    total = [d * (k - 1) for d, k in zip(dilation, weight_size[2:], strict=True)]
    left = [t // 2 for t in total]
    if any(t % 2 for t in total):
        extra = [side for t in reversed(total) for side in (0, t % 2)]
        input = F.pad(input, extra)
    return input, left


def masked_conv1d(
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None = None,
    stride: _IntOrInts = 1,
    padding: str | _IntOrInts = 0,
    dilation: _IntOrInts = 1,
    groups: int = 1,
) -> Tensor:
    """1-D convolution with a masked weight; :func:`torch.nn.functional.conv1d` with ``mask`` after ``weight``.

    Args:
        input: ``[B, C, L]`` or ``[C, L]``.
        weight: ``[O, C / groups, k]``, of the input's dtype.
        mask: the shape of ``weight``, any dtype.
        bias: ``[O]`` or None.
        stride, padding, dilation, groups: as in ``F.conv1d``.

    Returns:
        ``[B, O, L']`` or ``[O, L']``, of the input's dtype.

    Raises:
        RuntimeError: as ``F.conv1d``; naming ``mask`` if its shape or device differs from the weight's.

    Example:
        >>> x, w = torch.ones(1, 1, 4), torch.tensor([[[1.0, 5.0]]])
        >>> masked_ops.masked_conv1d(x, w, torch.tensor([[[1, 0]]]))
        tensor([[[1., 1., 1.]]])
    """
    return _conv(1, input, weight, mask, bias, stride, padding, dilation, groups)


def masked_conv2d(
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None = None,
    stride: _IntOrInts = 1,
    padding: str | _IntOrInts = 0,
    dilation: _IntOrInts = 1,
    groups: int = 1,
) -> Tensor:
    """2-D convolution with a masked weight; :func:`torch.nn.functional.conv2d` with ``mask`` after ``weight``.

    Args:
        input: ``[B, C, H, W]`` or ``[C, H, W]``, contiguous or channels_last.
        weight: ``[O, C / groups, kH, kW]``, of the input's dtype.
        mask: the shape of ``weight``, any dtype.
        bias: ``[O]`` or None.
        stride, padding, dilation, groups: as in ``F.conv2d``.

    Returns:
        ``[B, O, H', W']`` or ``[O, H', W']``, of the input's dtype.

    Raises:
        RuntimeError: as ``F.conv2d``; naming ``mask`` if its shape or device differs from the weight's.

    Example:
        >>> x, w = torch.ones(1, 1, 3, 3), torch.ones(1, 1, 2, 2)
        >>> masked_ops.masked_conv2d(x, w, torch.eye(2).view(1, 1, 2, 2))
        tensor([[[[2., 2.],
                  [2., 2.]]]])
    """
    return _conv(2, input, weight, mask, bias, stride, padding, dilation, groups)


def masked_conv3d(
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None = None,
    stride: _IntOrInts = 1,
    padding: str | _IntOrInts = 0,
    dilation: _IntOrInts = 1,
    groups: int = 1,
) -> Tensor:
    """3-D convolution with a masked weight; :func:`torch.nn.functional.conv3d` with ``mask`` after ``weight``.

    Args:
        input: ``[B, C, D, H, W]`` or ``[C, D, H, W]``.
        weight: ``[O, C / groups, kD, kH, kW]``, of the input's dtype.
        mask: the shape of ``weight``, any dtype.
        bias: ``[O]`` or None.
        stride, padding, dilation, groups: as in ``F.conv3d``.

    Returns:
        ``[B, O, D', H', W']`` or ``[O, D', H', W']``, of the input's dtype.

    Raises:
        RuntimeError: as ``F.conv3d``; naming ``mask`` if its shape or device differs from the weight's.

    Example:
        >>> x, w = torch.ones(1, 2, 3, 3, 3), torch.ones(4, 2, 3, 3, 3)
        >>> masked_ops.masked_conv3d(x, w, torch.zeros_like(w)).shape
        torch.Size([1, 4, 1, 1, 1])
    """
    return _conv(3, input, weight, mask, bias, stride, padding, dilation, groups)


def masked_conv_transpose1d(
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None = None,
    stride: _IntOrInts = 1,
    padding: _IntOrInts = 0,
    output_padding: _IntOrInts = 0,
    groups: int = 1,
    dilation: _IntOrInts = 1,
) -> Tensor:
    """Transposed 1-D convolution with a masked weight; :func:`torch.nn.functional.conv_transpose1d` plus ``mask``.

    Args:
        input: ``[B, C, L]`` or ``[C, L]``.
        weight: ``[C, O / groups, k]``, of the input's dtype.
        mask: the shape of ``weight``, any dtype.
        bias: ``[O]`` or None.
        stride, padding, output_padding, groups, dilation: as in ``F.conv_transpose1d``.

    Returns:
        ``[B, O, L']`` or ``[O, L']``, of the input's dtype.

    Raises:
        RuntimeError: as ``F.conv_transpose1d``; naming ``mask`` if its shape or device differs from the weight's.

    Example:
        >>> x, w = torch.ones(1, 1, 2), torch.tensor([[[1.0, 5.0]]])
        >>> masked_ops.masked_conv_transpose1d(x, w, torch.tensor([[[1, 0]]]))
        tensor([[[1., 1., 0.]]])
    """
    return _conv(1, input, weight, mask, bias, stride, padding, dilation, groups, True, output_padding)


def masked_conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None = None,
    stride: _IntOrInts = 1,
    padding: _IntOrInts = 0,
    output_padding: _IntOrInts = 0,
    groups: int = 1,
    dilation: _IntOrInts = 1,
) -> Tensor:
    """Transposed 2-D convolution with a masked weight; :func:`torch.nn.functional.conv_transpose2d` plus ``mask``.

    Args:
        input: ``[B, C, H, W]`` or ``[C, H, W]``, contiguous or channels_last.
        weight: ``[C, O / groups, kH, kW]``, of the input's dtype.
        mask: the shape of ``weight``, any dtype.
        bias: ``[O]`` or None.
        stride, padding, output_padding, groups, dilation: as in ``F.conv_transpose2d``.

    Returns:
        ``[B, O, H', W']`` or ``[O, H', W']``, of the input's dtype.

    Raises:
        RuntimeError: as ``F.conv_transpose2d``; naming ``mask`` if its shape or device differs from the weight's.

    Example:
        >>> x, w = torch.ones(1, 1, 1, 1), torch.full((1, 1, 2, 2), 3.0)
        >>> masked_ops.masked_conv_transpose2d(x, w, torch.eye(2).view(1, 1, 2, 2))
        tensor([[[[3., 0.],
                  [0., 3.]]]])
    """
    return _conv(2, input, weight, mask, bias, stride, padding, dilation, groups, True, output_padding)


def masked_conv_transpose3d(
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None = None,
    stride: _IntOrInts = 1,
    padding: _IntOrInts = 0,
    output_padding: _IntOrInts = 0,
    groups: int = 1,
    dilation: _IntOrInts = 1,
) -> Tensor:
    """Transposed 3-D convolution with a masked weight; :func:`torch.nn.functional.conv_transpose3d` plus ``mask``.

    Args:
        input: ``[B, C, D, H, W]`` or ``[C, D, H, W]``.
        weight: ``[C, O / groups, kD, kH, kW]``, of the input's dtype.
        mask: the shape of ``weight``, any dtype.
        bias: ``[O]`` or None.
        stride, padding, output_padding, groups, dilation: as in ``F.conv_transpose3d``.

    Returns:
        ``[B, O, D', H', W']`` or ``[O, D', H', W']``, of the input's dtype.

    Raises:
        RuntimeError: as ``F.conv_transpose3d``; naming ``mask`` if its shape or device differs from the weight's.

    Example:
        >>> x, w = torch.ones(1, 2, 3, 3, 3), torch.ones(2, 4, 3, 3, 3)
        >>> masked_ops.masked_conv_transpose3d(x, w, torch.zeros_like(w)).shape
        torch.Size([1, 4, 5, 5, 5])
    """
    return _conv(3, input, weight, mask, bias, stride, padding, dilation, groups, True, output_padding)


def packed_conv1d(
    input: Tensor,
    weight_values: Tensor,
    weight_bits: Tensor,
    weight_size: Sequence[int],
    bias: Tensor | None = None,
    stride: _IntOrInts = 1,
    padding: str | _IntOrInts = 0,
    dilation: _IntOrInts = 1,
    groups: int = 1,
) -> Tensor:
    """1-D convolution whose weight is stored as its remaining values and one bit a weight.

    Args:
        input: ``[B, C, L]`` or ``[C, L]``.
        weight_values: ``[nnz]``, the weights whose bit is set, in row-major order, of the input's dtype.
        weight_bits: uint8 ``[O, ceil(K / 8)]`` for the K weights of a row of ``weight.flatten(1)``, little bit
            order; bits beyond K are 0.
        weight_size: that of the weight, ``[O, C / groups, k]``.
        bias: ``[O]`` or None.
        stride, padding, dilation, groups: as in ``F.conv1d``.

    Returns:
        ``[B, O, L']`` or ``[O, L']``, of the input's dtype;
        differentiable in ``input``, ``weight_values`` and ``bias``.

    Raises:
        RuntimeError: naming the argument that does not fit.

    Example:
        >>> bits = torch.tensor([[0b01]], dtype=torch.uint8)
        >>> masked_ops.packed_conv1d(torch.ones(1, 1, 4), torch.tensor([3.0]), bits, (1, 1, 2))
        tensor([[[3., 3., 3.]]])
    """
    return _packed_conv(1, input, weight_values, weight_bits, weight_size, bias, stride, padding, dilation, groups)


def packed_conv2d(
    input: Tensor,
    weight_values: Tensor,
    weight_bits: Tensor,
    weight_size: Sequence[int],
    bias: Tensor | None = None,
    stride: _IntOrInts = 1,
    padding: str | _IntOrInts = 0,
    dilation: _IntOrInts = 1,
    groups: int = 1,
) -> Tensor:
    """2-D convolution whose weight is stored as its remaining values and one bit a weight.

    Args:
        input: ``[B, C, H, W]`` or ``[C, H, W]``, contiguous or channels_last.
        weight_values: ``[nnz]``, the weights whose bit is set, in row-major order, of the input's dtype.
        weight_bits: uint8 ``[O, ceil(K / 8)]`` for the K weights of a row of ``weight.flatten(1)``, little bit
            order; bits beyond K are 0.
        weight_size: that of the weight, ``[O, C / groups, kH, kW]``.
        bias: ``[O]`` or None.
        stride, padding, dilation, groups: as in ``F.conv2d``.

    Returns:
        ``[B, O, H', W']`` or ``[O, H', W']``, of the input's dtype;
        differentiable in ``input``, ``weight_values`` and ``bias``.

    Raises:
        RuntimeError: naming the argument that does not fit.

    Example:
        >>> bits = torch.tensor([[0b1001]], dtype=torch.uint8)
        >>> masked_ops.packed_conv2d(torch.ones(1, 1, 3, 3), torch.tensor([1.0, 2.0]), bits, (1, 1, 2, 2))
        tensor([[[[3., 3.],
                  [3., 3.]]]])
    """
    return _packed_conv(2, input, weight_values, weight_bits, weight_size, bias, stride, padding, dilation, groups)


def packed_conv3d(
    input: Tensor,
    weight_values: Tensor,
    weight_bits: Tensor,
    weight_size: Sequence[int],
    bias: Tensor | None = None,
    stride: _IntOrInts = 1,
    padding: str | _IntOrInts = 0,
    dilation: _IntOrInts = 1,
    groups: int = 1,
) -> Tensor:
    """3-D convolution whose weight is stored as its remaining values and one bit a weight.

    Args:
        input: ``[B, C, D, H, W]`` or ``[C, D, H, W]``.
        weight_values: ``[nnz]``, the weights whose bit is set, in row-major order, of the input's dtype.
        weight_bits: uint8 ``[O, ceil(K / 8)]`` for the K weights of a row of ``weight.flatten(1)``, little bit
            order; bits beyond K are 0.
        weight_size: that of the weight, ``[O, C / groups, kD, kH, kW]``.
        bias: ``[O]`` or None.
        stride, padding, dilation, groups: as in ``F.conv3d``.

    Returns:
        ``[B, O, D', H', W']`` or ``[O, D', H', W']``, of the input's dtype;
        differentiable in ``input``, ``weight_values`` and ``bias``.

    Raises:
        RuntimeError: naming the argument that does not fit.

    Example:
        >>> bits = torch.zeros(4, 7, dtype=torch.uint8)
        >>> masked_ops.packed_conv3d(torch.ones(1, 2, 3, 3, 3), torch.zeros(0), bits, (4, 2, 3, 3, 3)).shape
        torch.Size([1, 4, 1, 1, 1])
    """
    return _packed_conv(3, input, weight_values, weight_bits, weight_size, bias, stride, padding, dilation, groups)


def packed_conv_transpose1d(
    input: Tensor,
    weight_values: Tensor,
    weight_bits: Tensor,
    weight_size: Sequence[int],
    bias: Tensor | None = None,
    stride: _IntOrInts = 1,
    padding: _IntOrInts = 0,
    output_padding: _IntOrInts = 0,
    groups: int = 1,
    dilation: _IntOrInts = 1,
) -> Tensor:
    """Transposed 1-D convolution whose weight is stored as its remaining values and one bit a weight.

    Args:
        input: ``[B, C, L]`` or ``[C, L]``.
        weight_values: ``[nnz]``, the weights whose bit is set, in row-major order, of the input's dtype.
        weight_bits: uint8 ``[C, ceil(K / 8)]`` for the K weights of a row of ``weight.flatten(1)``, little bit
            order; bits beyond K are 0.
        weight_size: that of the weight, ``[C, O / groups, k]``.
        bias: ``[O]`` or None.
        stride, padding, output_padding, groups, dilation: as in ``F.conv_transpose1d``.

    Returns:
        ``[B, O, L']`` or ``[O, L']``, of the input's dtype;
        differentiable in ``input``, ``weight_values`` and ``bias``.

    Raises:
        RuntimeError: naming the argument that does not fit.

    Example:
        >>> bits = torch.tensor([[0b01]], dtype=torch.uint8)
        >>> masked_ops.packed_conv_transpose1d(torch.ones(1, 1, 2), torch.tensor([3.0]), bits, (1, 1, 2))
        tensor([[[3., 3., 0.]]])
    """
    return _packed_conv(
        1, input, weight_values, weight_bits, weight_size, bias, stride, padding, dilation, groups, True, output_padding
    )


def packed_conv_transpose2d(
    input: Tensor,
    weight_values: Tensor,
    weight_bits: Tensor,
    weight_size: Sequence[int],
    bias: Tensor | None = None,
    stride: _IntOrInts = 1,
    padding: _IntOrInts = 0,
    output_padding: _IntOrInts = 0,
    groups: int = 1,
    dilation: _IntOrInts = 1,
) -> Tensor:
    """Transposed 2-D convolution whose weight is stored as its remaining values and one bit a weight.

    Args:
        input: ``[B, C, H, W]`` or ``[C, H, W]``, contiguous or channels_last.
        weight_values: ``[nnz]``, the weights whose bit is set, in row-major order, of the input's dtype.
        weight_bits: uint8 ``[C, ceil(K / 8)]`` for the K weights of a row of ``weight.flatten(1)``, little bit
            order; bits beyond K are 0.
        weight_size: that of the weight, ``[C, O / groups, kH, kW]``.
        bias: ``[O]`` or None.
        stride, padding, output_padding, groups, dilation: as in ``F.conv_transpose2d``.

    Returns:
        ``[B, O, H', W']`` or ``[O, H', W']``, of the input's dtype;
        differentiable in ``input``, ``weight_values`` and ``bias``.

    Raises:
        RuntimeError: naming the argument that does not fit.

    Example:
        >>> bits = torch.tensor([[0b1001]], dtype=torch.uint8)
        >>> masked_ops.packed_conv_transpose2d(torch.ones(1, 1, 1, 1), torch.tensor([1.0, 2.0]), bits, (1, 1, 2, 2))
        tensor([[[[1., 0.],
                  [0., 2.]]]])
    """
    return _packed_conv(
        2, input, weight_values, weight_bits, weight_size, bias, stride, padding, dilation, groups, True, output_padding
    )


def packed_conv_transpose3d(
    input: Tensor,
    weight_values: Tensor,
    weight_bits: Tensor,
    weight_size: Sequence[int],
    bias: Tensor | None = None,
    stride: _IntOrInts = 1,
    padding: _IntOrInts = 0,
    output_padding: _IntOrInts = 0,
    groups: int = 1,
    dilation: _IntOrInts = 1,
) -> Tensor:
    """Transposed 3-D convolution whose weight is stored as its remaining values and one bit a weight.

    Args:
        input: ``[B, C, D, H, W]`` or ``[C, D, H, W]``.
        weight_values: ``[nnz]``, the weights whose bit is set, in row-major order, of the input's dtype.
        weight_bits: uint8 ``[C, ceil(K / 8)]`` for the K weights of a row of ``weight.flatten(1)``, little bit
            order; bits beyond K are 0.
        weight_size: that of the weight, ``[C, O / groups, kD, kH, kW]``.
        bias: ``[O]`` or None.
        stride, padding, output_padding, groups, dilation: as in ``F.conv_transpose3d``.

    Returns:
        ``[B, O, D', H', W']`` or ``[O, D', H', W']``, of the input's dtype;
        differentiable in ``input``, ``weight_values`` and ``bias``.

    Raises:
        RuntimeError: naming the argument that does not fit.

    Example:
        >>> bits = torch.zeros(2, 14, dtype=torch.uint8)
        >>> x = torch.ones(1, 2, 3, 3, 3)
        >>> masked_ops.packed_conv_transpose3d(x, torch.zeros(0), bits, (2, 4, 3, 3, 3)).shape
        torch.Size([1, 4, 5, 5, 5])
    """
    return _packed_conv(
        3, input, weight_values, weight_bits, weight_size, bias, stride, padding, dilation, groups, True, output_padding
    )
