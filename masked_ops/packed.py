"""Packed layers: what is left of a pruned weight, and nothing else.

A packed linear layer or convolution keeps the weights that were not pruned, ``weight_values``, and one bit for each
place, ``weight_bits``. Forward and all gradients work on these alone, so that parameters, gradients, the state of the
optimizer and checkpoints shrink with the density.

    prune.global_unstructured([(m, "weight") for m in layers], prune.L1Unstructured, amount=0.9)
    masked_ops.pack(model)
    optimizer = torch.optim.Adam(model.parameters())  # over the new, short Parameters; or pack(model, optimizer)
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from . import functional
from . import nn as masked_nn
from ._carry import Replaced, carry, check_optimizer, snapshot
from ._masked_class import Sparsity, as_it_is_now
from ._masking import _refuse_sharded
from ._packed_class import (
    BITS,
    VALUES,
    Packed,
    can_be_packed,
    gather,
    is_packed,
    packs,
    packs_named,
    scatter,
    shape_when_packed,
    sparsity_of,
)
from ._packing import compress, install, is_binary, keep_all, keep_ties
from ._pruning_methods import adopt, drop_hook, pruned_names

__all__ = [
    "PackedConv1d",
    "PackedConv2d",
    "PackedConv3d",
    "PackedConvTranspose1d",
    "PackedConvTranspose2d",
    "PackedConvTranspose3d",
    "PackedLinear",
    "freeze",
    "pack",
    "unpack",
]

_M = TypeVar("_M", bound=nn.Module)
_W = TypeVar("_W", bound="_PackedWeight")
_Ints = int | tuple[int, ...]


def _sparsity(module: Any) -> float:
    return sparsity_of(module.weight_values.numel(), module._packed_shape())


class _PackedWeight(Packed):
    """What the packed layers have in common."""

    weight: Any
    bias: Any
    weight_values: nn.Parameter
    weight_bits: Tensor

    sparsity: float = Sparsity(_sparsity)  # type: ignore[assignment]
    """The fraction of the weight that is pruned."""

    def _pack_under(self, mask: Tensor | None) -> None:
        """The end of a constructor."""
        weight = self._parameters.get("weight", self._parameters.get("weight_orig"))  # of a masked layer's subclass
        assert weight is not None
        install(self, *(keep_all(weight) if mask is None else compress(weight, _checked(mask, weight))))

    @classmethod
    def from_masked(cls: type[_W], module: nn.Module) -> _W:
        """An independent packed copy of a layer with a masked weight; :func:`pack` packs a module in place.

        Raises:
            TypeError: if ``module`` is not of the torch class behind this one.
            ValueError: as :func:`pack`.

        Example:
            >>> masked = masked_ops.MaskedLinear(4, 2, mask=torch.eye(4)[:2])
            >>> masked_ops.PackedLinear.from_masked(masked).weight_values.shape
            torch.Size([2])
        """
        if not isinstance(module, cls._packed_dense):
            raise TypeError(f"module: torch.nn.{cls._packed_dense.__name__} expected, got {type(module).__name__}")
        twin: Any = pack(copy.deepcopy(module))
        return twin

    def to_masked(self) -> nn.Module:
        """An independent masked copy, pruned weights 0; :func:`unpack` unpacks a module in place.

        Example:
            >>> masked_ops.PackedLinear(4, 2, mask=torch.eye(4)[:2]).to_masked()
            MaskedLinear(in_features=4, out_features=2, bias=True, sparsity=0.75)
        """
        return unpack(copy.deepcopy(self))

    def to_dense(self) -> nn.Module:
        """An independent dense copy, pruned weights 0; ``prune.remove`` makes a module dense in place.

        Example:
            >>> masked_ops.PackedLinear(4, 2, mask=torch.eye(4)[:2]).to_dense()
            Linear(in_features=4, out_features=2, bias=True)
        """
        masked: Any = self.to_masked()
        dense: nn.Module = masked.to_dense()
        return dense


@packs(nn.Linear)
class PackedLinear(_PackedWeight, nn.Linear):
    """A linear layer that holds only the weights that its mask keeps: :class:`torch.nn.Linear` plus ``mask``.

    ``weight`` is scattered from ``weight_values`` when it is read; it is differentiable, and cannot be assigned to.
    Loading a checkpoint with another mask changes the size of ``weight_values``: the Parameter stays the same object
    and gets other ``data``, so that an optimizer's state must be loaded as well or built anew.

    Args:
        in_features: K, the size of each input.
        out_features: N, the size of each output.
        bias: whether to add a learned bias.
        device: as for torch's class.
        dtype: as for torch's class.
        mask: ``[N, K]``, any dtype, of zeros and ones; where it is 0 there is no weight. By default ones.

    Shape:
        input ``[..., K]``, output ``[..., N]``, ``weight_values`` ``[nnz]`` in row-major order, ``weight_bits`` uint8
        ``[N, ceil(K / 8)]``, the lowest bit first, ``bias`` ``[N]``.

    Raises:
        TypeError: if ``mask`` is not a tensor.
        ValueError: if its shape is not the weight's, or it has other values than 0 and 1.

    Example:
        >>> layer = masked_ops.PackedLinear(4, 2, mask=torch.tensor([[1, 0, 0, 1], [0, 1, 0, 0]]))
        >>> layer
        PackedLinear(in_features=4, out_features=2, bias=True, nnz=3, sparsity=0.625)
        >>> list(layer.state_dict())
        ['bias', 'weight_values', 'weight_bits']
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        mask: Tensor | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._pack_under(mask)

    in_features: int
    out_features: int

    def _packed_shape(self) -> tuple[int, ...]:
        return self.out_features, self.in_features

    def forward(self, input: Tensor) -> Tensor:
        if not isinstance(self, Packed):
            return as_it_is_now(self, input)
        values, bits, bias = self._packed_operands()
        return functional.packed_linear(input, values, bits, self.in_features, bias)


@packs_named("transformers.pytorch_utils", "Conv1D")
class _PackedMatmul(_PackedWeight):
    """Layers that keep their weight as ``[in, out]``: ``x @ weight + bias``."""

    nx: int
    nf: int

    def _packed_shape(self) -> tuple[int, ...]:
        return self.nx, self.nf

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(self, Packed):
            return as_it_is_now(self, x)
        values, bits, bias = self._packed_operands()
        return functional.packed_matmul(x, values, bits, self.nf, bias)


class _PackedConv(_PackedWeight):
    _packed_op: ClassVar[str]

    in_channels: int
    out_channels: int
    groups: int
    kernel_size: Any

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _Ints,
        stride: _Ints = 1,
        padding: str | _Ints = 0,
        dilation: _Ints = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        mask: Tensor | None = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        self._pack_under(mask)

    def _packed_shape(self) -> tuple[int, ...]:
        return self.out_channels, self.in_channels // self.groups, *self.kernel_size

    def forward(self, input: Tensor) -> Tensor:
        if not isinstance(self, Packed):
            return as_it_is_now(self, input)
        values, bits, bias = self._packed_operands()
        input, padding = masked_nn.pad(self, input)
        return masked_nn.convolve(
            self._packed_op,
            input,
            values,
            bits,
            self._packed_shape(),
            bias,
            self.stride,
            padding,
            self.dilation,
            self.groups,
        )


class _PackedConvTranspose(_PackedWeight):
    _packed_op: ClassVar[str]

    in_channels: int
    out_channels: int
    groups: int
    kernel_size: Any
    _output_padding: Callable[..., list[int]]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _Ints,
        stride: _Ints = 1,
        padding: _Ints = 0,
        output_padding: _Ints = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: _Ints = 1,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        mask: Tensor | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            output_padding,
            groups,
            bias,
            dilation,
            padding_mode,
            device,
            dtype,
        )
        self._pack_under(mask)

    def _packed_shape(self) -> tuple[int, ...]:
        return self.in_channels, self.out_channels // self.groups, *self.kernel_size

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        if not isinstance(self, Packed):
            return as_it_is_now(self, input, output_size)
        values, bits, bias = self._packed_operands()
        output_padding = self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, len(self.kernel_size), self.dilation
        )
        return masked_nn.convolve(
            self._packed_op,
            input,
            values,
            bits,
            self._packed_shape(),
            bias,
            self.stride,
            self.padding,
            output_padding,
            self.groups,
            self.dilation,
        )


@packs(nn.Conv1d)
class PackedConv1d(_PackedConv, nn.Conv1d):
    """A 1-dimensional convolution that holds only the weights that are left: :class:`torch.nn.Conv1d` plus ``mask``.

    Takes all arguments of torch's class, every padding mode and ``padding="same"`` included. What is said of
    :class:`PackedLinear` holds here too.

    Args:
        mask: ``[out_channels, in_channels / groups, k]``, any dtype, of zeros and ones; by default ones.

    Shape:
        input and output as those of torch's class; ``weight_values`` ``[nnz]`` in row-major order, ``weight_bits``
        uint8 ``[out_channels, ceil(K / 8)]`` for the K weights of a row of ``weight.flatten(1)``, the lowest bit first.

    Raises:
        TypeError: if ``mask`` is not a tensor.
        ValueError: if its shape is not the weight's, or it has other values than 0 and 1.

    Example:
        >>> layer = masked_ops.PackedConv1d(1, 2, kernel_size=2, bias=False, mask=torch.zeros(2, 1, 2))
        >>> layer
        PackedConv1d(1, 2, kernel_size=(2,), stride=(1,), bias=False, nnz=0, sparsity=1)
        >>> layer(torch.ones(1, 1, 3)).count_nonzero()
        tensor(0)
    """

    _packed_op = "packed_conv1d"


@packs(nn.Conv2d)
class PackedConv2d(_PackedConv, nn.Conv2d):
    """A 2-dimensional convolution that holds only the weights that are left: :class:`torch.nn.Conv2d` plus ``mask``.

    Takes all arguments of torch's class, every padding mode and ``padding="same"`` included. What is said of
    :class:`PackedLinear` holds here too.

    Args:
        mask: ``[out_channels, in_channels / groups, kH, kW]``, any dtype, of zeros and ones; by default ones.

    Shape:
        input and output as those of torch's class; ``weight_values`` ``[nnz]`` in row-major order, ``weight_bits``
        uint8 ``[out_channels, ceil(K / 8)]`` for the K weights of a row of ``weight.flatten(1)``, the lowest bit first.

    Raises:
        TypeError: if ``mask`` is not a tensor.
        ValueError: if its shape is not the weight's, or it has other values than 0 and 1.

    Example:
        >>> layer = masked_ops.PackedConv2d(1, 2, kernel_size=2, bias=False, mask=torch.zeros(2, 1, 2, 2))
        >>> layer
        PackedConv2d(1, 2, kernel_size=(2, 2), stride=(1, 1), bias=False, nnz=0, sparsity=1)
        >>> layer(torch.ones(1, 1, 3, 3)).count_nonzero()
        tensor(0)
    """

    _packed_op = "packed_conv2d"


@packs(nn.Conv3d)
class PackedConv3d(_PackedConv, nn.Conv3d):
    """A 3-dimensional convolution that holds only the weights that are left: :class:`torch.nn.Conv3d` plus ``mask``.

    Takes all arguments of torch's class, every padding mode and ``padding="same"`` included. What is said of
    :class:`PackedLinear` holds here too.

    Args:
        mask: ``[out_channels, in_channels / groups, kD, kH, kW]``, any dtype, of zeros and ones; by default ones.

    Shape:
        input and output as those of torch's class; ``weight_values`` ``[nnz]`` in row-major order, ``weight_bits``
        uint8 ``[out_channels, ceil(K / 8)]`` for the K weights of a row of ``weight.flatten(1)``, the lowest bit first.

    Raises:
        TypeError: if ``mask`` is not a tensor.
        ValueError: if its shape is not the weight's, or it has other values than 0 and 1.

    Example:
        >>> layer = masked_ops.PackedConv3d(1, 2, kernel_size=2, bias=False, mask=torch.zeros(2, 1, 2, 2, 2))
        >>> layer
        PackedConv3d(1, 2, kernel_size=(2, 2, 2), stride=(1, 1, 1), bias=False, nnz=0, sparsity=1)
        >>> layer(torch.ones(1, 1, 3, 3, 3)).count_nonzero()
        tensor(0)
    """

    _packed_op = "packed_conv3d"


@packs(nn.ConvTranspose1d)
class PackedConvTranspose1d(_PackedConvTranspose, nn.ConvTranspose1d):
    """A 1-dimensional transposed convolution of the weights left: :class:`torch.nn.ConvTranspose1d` plus ``mask``.

    Takes all arguments of torch's class; ``forward`` takes ``output_size`` as well. What is said of
    :class:`PackedLinear` holds here too.

    Args:
        mask: ``[in_channels, out_channels / groups, k]``, any dtype, of zeros and ones; by default ones.

    Shape:
        input and output as those of torch's class; ``weight_values`` ``[nnz]`` in row-major order, ``weight_bits``
        uint8 ``[in_channels, ceil(K / 8)]`` for the K weights of a row of ``weight.flatten(1)``, the lowest bit first.

    Raises:
        TypeError: if ``mask`` is not a tensor.
        ValueError: if its shape is not the weight's, or it has other values than 0 and 1.

    Example:
        >>> layer = masked_ops.PackedConvTranspose1d(1, 2, kernel_size=2, bias=False, mask=torch.zeros(1, 2, 2))
        >>> layer
        PackedConvTranspose1d(1, 2, kernel_size=(2,), stride=(1,), bias=False, nnz=0, sparsity=1)
        >>> layer(torch.ones(1, 1, 3)).count_nonzero()
        tensor(0)
    """

    _packed_op = "packed_conv_transpose1d"


@packs(nn.ConvTranspose2d)
class PackedConvTranspose2d(_PackedConvTranspose, nn.ConvTranspose2d):
    """A 2-dimensional transposed convolution of the weights left: :class:`torch.nn.ConvTranspose2d` plus ``mask``.

    Takes all arguments of torch's class; ``forward`` takes ``output_size`` as well. What is said of
    :class:`PackedLinear` holds here too.

    Args:
        mask: ``[in_channels, out_channels / groups, kH, kW]``, any dtype, of zeros and ones; by default ones.

    Shape:
        input and output as those of torch's class; ``weight_values`` ``[nnz]`` in row-major order, ``weight_bits``
        uint8 ``[in_channels, ceil(K / 8)]`` for the K weights of a row of ``weight.flatten(1)``, the lowest bit first.

    Raises:
        TypeError: if ``mask`` is not a tensor.
        ValueError: if its shape is not the weight's, or it has other values than 0 and 1.

    Example:
        >>> layer = masked_ops.PackedConvTranspose2d(1, 2, kernel_size=2, bias=False, mask=torch.zeros(1, 2, 2, 2))
        >>> layer
        PackedConvTranspose2d(1, 2, kernel_size=(2, 2), stride=(1, 1), bias=False, nnz=0, sparsity=1)
        >>> layer(torch.ones(1, 1, 3, 3)).count_nonzero()
        tensor(0)
    """

    _packed_op = "packed_conv_transpose2d"


@packs(nn.ConvTranspose3d)
class PackedConvTranspose3d(_PackedConvTranspose, nn.ConvTranspose3d):
    """A 3-dimensional transposed convolution of the weights left: :class:`torch.nn.ConvTranspose3d` plus ``mask``.

    Takes all arguments of torch's class; ``forward`` takes ``output_size`` as well. What is said of
    :class:`PackedLinear` holds here too.

    Args:
        mask: ``[in_channels, out_channels / groups, kD, kH, kW]``, any dtype, of zeros and ones; by default ones.

    Shape:
        input and output as those of torch's class; ``weight_values`` ``[nnz]`` in row-major order, ``weight_bits``
        uint8 ``[in_channels, ceil(K / 8)]`` for the K weights of a row of ``weight.flatten(1)``, the lowest bit first.

    Raises:
        TypeError: if ``mask`` is not a tensor.
        ValueError: if its shape is not the weight's, or it has other values than 0 and 1.

    Example:
        >>> layer = masked_ops.PackedConvTranspose3d(1, 2, kernel_size=2, bias=False, mask=torch.zeros(1, 2, 2, 2, 2))
        >>> layer
        PackedConvTranspose3d(1, 2, kernel_size=(2, 2, 2), stride=(1, 1, 1), bias=False, nnz=0, sparsity=1)
        >>> layer(torch.ones(1, 1, 3, 3, 3)).count_nonzero()
        tensor(0)
    """

    _packed_op = "packed_conv_transpose3d"


def _checked(mask: Tensor, weight: Tensor) -> Tensor:
    """``mask`` on the device of ``weight``, if a constructor can take it."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask: a tensor expected, got {type(mask).__name__}")
    if mask.shape != weight.shape:
        raise ValueError(f"mask: the weight's shape {tuple(weight.shape)} expected, got {tuple(mask.shape)}")
    if mask.is_meta or weight.is_meta:
        raise ValueError(
            f"mask: a meta tensor has no values; the parameter is on '{weight.device}' and the mask on '{mask.device}'"
        )
    if not is_binary(mask, weight.dtype):
        raise ValueError("mask: zeros and ones expected, got other values; a masked layer takes such a soft mask")
    return mask.to(weight.device)


# --- models ----------------------------------------------------------------------------------------------------------


def pack(model: _M, optimizer: Optimizer | None = None) -> _M:
    """Keep of the masked layers in ``model`` only what is not pruned: turn each into a packed one, in place.

    Packed are linear layers and convolutions, transposed ones included: ``MaskedLinear`` and its like, and pruned
    instances of torch's classes, of the ``Conv1D`` of transformers (a linear layer whose weight is ``[in, out]``), and
    of subclasses that keep their ``forward``, ``model`` itself included. All else
    stays as it is: layers that are not pruned, other pruned parameters (a bias, an embedding), layers with a
    ``forward`` of their own or a weight that is also an embedding's, complex and float8 weights.
    :func:`masked_ops.report` lists who is what.

    A packed module is the same object with the same hooks, but its ``weight_values`` is a new Parameter: pass the
    optimizer, or build it afterwards, and so ``DistributedDataParallel`` and the like. ``requires_grad`` and the values
    of a gradient are kept. The values beneath the mask are gone, and with them the rounds that ``prune.undo`` could
    take back; ``prune.is_pruned`` stays True. Modules that share weight and mask share the packed weight.

    Args:
        model: any module; what :mod:`torch.nn.utils.prune` pruned counts too.
        optimizer: one from before, to go on: the new Parameters take the old ones' places in its groups, and its state
            (momentum, averages) is kept for the values that are left. Not Adafactor, LBFGS or Muon.

    Returns:
        ``model``. If a call fails, it and ``optimizer`` are as they were: all of its layers are packed, or none.

    Raises:
        TypeError: if ``model`` is not a module, or ``optimizer`` not an optimizer.
        ValueError: if there is nothing to pack, or a layer that cannot be: with a soft mask (values other than 0 and
            1), sharded, parametrized, on the meta device, or with a weight that another layer has under another mask;
            or if ``optimizer`` has none of the weights, or state of another shape than theirs.

    Example:
        >>> model = torch.nn.Sequential(prune.l1_unstructured(torch.nn.Linear(8, 4), "weight", amount=0.75))
        >>> masked_ops.pack(model)
        Sequential(
          (0): PackedLinear(in_features=8, out_features=4, bias=True, nnz=8, sparsity=0.75)
        )
    """
    _require_module(model)
    with _atomic(_candidates(model), optimizer):
        replaced = _pack(model)
        if not replaced:
            packed = any(is_packed(module) for module in model.modules())
            raise ValueError(
                f"nothing to pack in {type(model).__name__}: linear layers or convolutions with a masked weight of "
                f"their own expected, got {'packed ones only' if packed else 'none'}"
            )
        if optimizer is not None:
            carry(optimizer, replaced)
    return model


def unpack(model: _M, optimizer: Optimizer | None = None) -> _M:
    """Turn every packed layer in ``model`` into a masked one, in place, with zeros beneath the mask.

    It has a new Parameter ``weight_orig``, and a ``weight_mask`` in its dtype, and counts as pruned by
    ``prune.CustomFromMask``. ``prune.remove`` makes a packed layer dense without this step.

    Args:
        model: any module.
        optimizer: one from before, to go on, as :func:`pack` takes it; its state is zero beneath the mask.

    Returns:
        ``model``. If a call fails, it and ``optimizer`` are as they were.

    Raises:
        TypeError: if ``model`` is not a module, or ``optimizer`` not an optimizer.
        ValueError: if nothing in it is packed, or a layer was sharded or parametrized since; or if ``optimizer`` has
            none of the weights, or state of another shape than theirs.

    Example:
        >>> masked_ops.unpack(masked_ops.PackedLinear(8, 4))
        MaskedLinear(in_features=8, out_features=4, bias=True, sparsity=0)
    """
    _require_module(model)
    packed: list[Any] = [module for module in model.modules() if is_packed(module)]
    if not packed:
        raise ValueError(f"nothing in {type(model).__name__} is packed")
    with _atomic(packed, optimizer), keep_ties():
        replaced = {}
        for module in packed:
            old, bits, shape = getattr(module, VALUES), getattr(module, BITS), module._packed_shape()
            adopt(module, "weight")
            replaced[old] = Replaced(
                old, module.weight_orig, (VALUES, "weight_orig"), partial(scatter, bits=bits, shape=shape)
            )
        if optimizer is not None:
            carry(optimizer, list(replaced.values()))
    return model


def freeze(model: _M) -> _M:
    """Make ``model`` ready for inference, in place: masked layers packed, and nothing requires a gradient.

    What :func:`pack` leaves masked stays masked. Values that are written to ``weight_values`` later, in whatever way,
    take part in the next call. The training mode of layers like dropout is left alone: that is ``model.eval()``'s.
    ``model.requires_grad_()`` thaws the model.

    In evaluation ``torch.nn.TransformerEncoderLayer`` takes a path of its own that needs dense weights, and so scatters
    the packed ones at every call; ``torch.backends.mha.set_fastpath_enabled(False)`` keeps it off that.

    Returns:
        ``model``. If a call fails, it is as it was.

    Raises:
        TypeError: if ``model`` is not a module.
        ValueError: as :func:`pack`, but layers that are packed already are welcome.

    Example:
        >>> layer = masked_ops.freeze(prune.l1_unstructured(torch.nn.Linear(8, 4), "weight", amount=0.75))
        >>> [name for name, parameter in layer.named_parameters() if parameter.requires_grad]
        []
    """
    _require_module(model)
    with masked_nn.atomic(model.modules()):
        if not _pack(model) and not any(is_packed(module) for module in model.modules()):
            raise ValueError(
                f"nothing to freeze in {type(model).__name__}: linear layers or convolutions with a packed weight, or "
                "a masked one of their own, expected"
            )
        model.requires_grad_(False)
    return model


def _atomic(modules: Iterable[Any], optimizer: Optimizer | None) -> contextlib.AbstractContextManager[None]:
    if optimizer is None:
        return masked_nn.atomic(modules)
    check_optimizer(optimizer)
    return masked_nn.atomic(modules, partial(snapshot, optimizer))


def _require_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: torch.nn.Module expected, got {type(model).__name__}")


def _candidates(model: nn.Module) -> list[Any]:
    """The modules in ``model`` that are packed unless they compute their weight themselves."""
    return [m for m in model.modules() if can_be_packed(m) and not is_packed(m) and "weight" in pruned_names(m)]


_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _pack(model: nn.Module) -> list[Replaced]:
    """Pack what there is. A failure leaves it half done."""
    labels = {module: name or type(module).__name__ for name, module in model.named_modules()}
    layers: list[Any] = []
    for module in _candidates(model):
        if parametrize.is_parametrized(module):
            raise ValueError(f"'{labels[module]}' is parametrized: remove the parametrizations before packing it")
        adopt(module, "weight")
        if masked_nn.path_of(module, "weight") == "fused" and module.weight_orig.dtype in _DTYPES:
            _require_packable(labels[module], module)
            layers.append(module)
    replaced = []
    for group in _groups(layers, labels):
        weight = group[0].weight_orig
        values, bits = compress(weight, group[0].weight_mask)
        for module in group:
            install(module, values, bits)
            drop_hook(module, "weight")
        replaced.append(
            Replaced(weight, values, ("weight_orig", VALUES), partial(gather, bits=bits, nnz=values.numel()))
        )
    return replaced


def _require_packable(label: str, module: Any) -> None:
    try:
        _refuse_sharded(module)
    except ValueError as error:
        raise ValueError(f"'{label}' cannot be packed: {error}") from None
    weight, mask = module.weight_orig, module.weight_mask
    shape = shape_when_packed(module)
    for name in (VALUES, BITS):
        if hasattr(module, name):
            raise ValueError(f"'{label}' cannot be packed: it has an attribute '{name}' already")
    if type(weight) is not nn.Parameter:
        raise ValueError(f"'{label}' cannot be packed: a plain Parameter expected, got {type(weight).__name__}")
    if tuple(weight.shape) != shape:
        raise ValueError(
            f"'{label}' cannot be packed: the sizes that it states are {shape}, "
            f"but the weight has shape {tuple(weight.shape)}"
        )
    if mask.is_meta:
        raise ValueError(f"'{label}' cannot be packed: on the meta device its mask has no values")
    if not is_binary(mask, weight.dtype):
        raise ValueError(
            f"'{label}' cannot be packed: its mask is soft, it has values other than 0 and 1 "
            "(prune.remove multiplies them into the weight)"
        )


def _groups(layers: list[Any], labels: dict[nn.Module, str]) -> Iterable[list[Any]]:
    """The layers, those that share a weight together; without those whose weight something else holds too."""
    groups: dict[nn.Parameter, list[Any]] = {}
    for layer in layers:
        groups.setdefault(layer.weight_orig, []).append(layer)
    chosen = set(layers)
    for module in labels:
        for name, parameter in module._parameters.items():
            if not (module in chosen and name == "weight_orig"):
                groups.pop(parameter, None)  # type: ignore[arg-type]
    for first, *others in groups.values():
        for layer in others:
            if not torch.equal(first.weight_mask != 0, layer.weight_mask != 0):
                names = f"'{labels[first]}' and '{labels[layer]}'"
                raise ValueError(f"{names} cannot be packed: they share a weight under different masks")
    return groups.values()
