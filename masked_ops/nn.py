"""Drop-in layers with a masked weight: ``MaskedLinear`` and the convolutions.

Each subclasses its torch class and takes the arguments of its constructor. It holds the Parameter ``weight_orig`` and
the persistent buffer ``weight_mask``, as a module pruned by ``torch.nn.utils.prune`` does, so that a checkpoint of
either loads in the other. ``weight`` is computed from both when it is read: masked, differentiable, never stale.
``forward`` does not read it: the mask is applied within the kernels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.prune import BasePruningMethod

from . import functional
from ._masked_class import (
    Masked,
    Sparsity,
    as_it_is_now,
    is_sharded,
    sparsity,
    stands_in_as,
    stands_in_for,
    stands_in_for_named,
)
from ._masking import atomic, attach, detach, masked_names, path_of, set_mask

__all__ = [
    "MaskedConv1d",
    "MaskedConv2d",
    "MaskedConv3d",
    "MaskedConvTranspose1d",
    "MaskedConvTranspose2d",
    "MaskedConvTranspose3d",
    "MaskedLinear",
    "atomic",
    "attach",
    "detach",
    "masked_names",
    "path_of",
    "set_mask",
]

_Ints = int | tuple[int, ...]
_W = TypeVar("_W", bound="_MaskedWeight")


def _sparsity(module: Any) -> float:
    mask = getattr(module, "weight_mask", None)
    return 0.0 if mask is None else sparsity(mask)


class _MaskedWeight(Masked):
    """What the layers with a fused ``weight`` have in common."""

    weight: Any
    bias: Any
    weight_orig: nn.Parameter
    weight_mask: Tensor

    sparsity: float = Sparsity(_sparsity)  # type: ignore[assignment]
    """The fraction of the weight that is pruned, counted from the mask at every read (one pass over it)."""

    def _masked_operands(self) -> tuple[Any, Any, Any] | None:
        """``weight_orig``, ``weight_mask`` and ``bias``; None where torch is to read ``weight``."""
        try:
            # Module.__getattr__ would cost 0.45 µs for each of the three.
            parameters, mask = self._parameters, self._buffers["weight_mask"]
            if type(mask) is not Tensor and mask is not None and is_sharded(mask):
                return None  # tensor parallel: the operations have no sharding rules
            return parameters["weight_orig"], mask, parameters["bias"]
        except KeyError:
            # Parametrized, or an attribute of a replica (DataParallel), or a bias that is masked too.
            mask = getattr(self, "weight_mask", None)
            return None if mask is None else (self.weight_orig, mask, self.bias)

    def _masked_fuses(self) -> bool:
        fused: tuple[Any, ...] = (MaskedLinear, _MaskedConv, _MaskedConvTranspose, _MaskedMatmul)
        return type(self).forward in [layer.forward for layer in fused] and "forward" not in vars(self)

    def set_mask(self, mask: Tensor) -> None:
        """Replace the mask.

        Args:
            mask: of the weight's shape. Its values are copied into ``weight_mask`` if the dtype is the same; otherwise
                the buffer is replaced and keeps the mask's dtype (a bool mask takes a quarter of a float one's memory).

        Raises:
            TypeError: if ``mask`` is not a tensor.
            ValueError: if its shape is not the weight's.

        Example:
            >>> layer = masked_ops.MaskedLinear(4, 2)
            >>> layer.set_mask(torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0]]))
            >>> layer.sparsity
            0.625
        """
        set_mask(self, "weight", mask)

    @classmethod
    def from_dense(cls: type[_W], module: nn.Module, mask: Tensor | None = None) -> _W:
        """A masked module that shares the Parameters, buffers and children of a dense one, which stays as it is.

        Args:
            module: an instance of the torch class behind this one, or of a subclass of it (the result then derives from
                that subclass). To mask a module in place use :mod:`masked_ops.prune`.
            mask: of the weight's shape; ones by default.

        Raises:
            TypeError: if ``module`` is of another class.
            ValueError: if it is masked already, or its class cannot be extended (parametrized, for one).

        Example:
            >>> dense = torch.nn.Linear(4, 2)
            >>> layer = masked_ops.MaskedLinear.from_dense(dense, mask=torch.zeros(2, 4))
            >>> layer.weight_orig is dense.weight
            True
        """
        if not isinstance(module, cls._masked_dense):
            expected = f"torch.nn.{cls._masked_dense.__name__}"
            raise TypeError(f"module: {expected} expected, got {type(module).__name__}")
        if masked_names(module):
            raise ValueError(f"module: {type(module).__name__} is masked already; copy.deepcopy copies it")
        twin: Any = object.__new__(cls if type(module) is cls._masked_dense else type(module))
        for key, value in vars(module).items():
            vars(twin)[key] = copy.copy(value) if isinstance(value, (dict, set, list)) else value
        attach(twin, "weight", torch.ones_like(twin.weight) if mask is None else mask)
        if not isinstance(twin, cls):
            raise ValueError(f"module: a class that {cls.__name__} can extend expected, got {type(module).__name__}")
        return twin

    def to_dense(self) -> nn.Module:
        """An independent dense copy whose weight holds the pruned values; the class is the one behind this one.

        Example:
            >>> layer = masked_ops.MaskedLinear(4, 2, mask=torch.zeros(2, 4))
            >>> layer.to_dense()
            Linear(in_features=4, out_features=2, bias=True)
        """
        dense = copy.deepcopy(self)
        names = masked_names(dense)
        for name in names:
            detach(dense, name)
        for key, hook in list(dense._forward_pre_hooks.items()):
            if isinstance(hook, BasePruningMethod) and hook._tensor_name in names:
                del dense._forward_pre_hooks[key]
        return dense


@stands_in_for(nn.Linear, "weight")
class MaskedLinear(_MaskedWeight, nn.Linear):
    """A linear layer with a masked weight: :class:`torch.nn.Linear` plus ``mask``.

    Args:
        in_features: K, the size of each input.
        out_features: N, the size of each output.
        bias: whether to add a learned bias.
        device: as for torch's class.
        dtype: as for torch's class.
        mask: ``[N, K]``, any dtype, copied; by default ones in the weight's dtype. Where it is 0 the weight is pruned;
            a mask with values other than 0 and 1 multiplies.

    Shape:
        input ``[..., K]``, output ``[..., N]``, ``weight_orig`` and ``weight_mask`` ``[N, K]``, ``bias`` ``[N]``.

    Raises:
        TypeError: if ``mask`` is not a tensor.
        ValueError: if its shape is not the weight's.

    Example:
        >>> layer = masked_ops.MaskedLinear(4, 2, mask=torch.tensor([[1, 0, 0, 1], [0, 1, 0, 0]]))
        >>> layer
        MaskedLinear(in_features=4, out_features=2, bias=True, sparsity=0.625)
        >>> list(layer.state_dict())
        ['bias', 'weight_orig', 'weight_mask']
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
        attach(self, "weight", torch.ones_like(self.weight) if mask is None else mask)

    def forward(self, input: Tensor) -> Tensor:
        if not isinstance(self, Masked):
            return as_it_is_now(self, input)
        operands = self._masked_operands()
        if operands is None:
            return super().forward(input)
        weight, mask, bias = operands
        return functional.masked_linear(input, weight, mask, bias)


@stands_in_for_named("transformers.pytorch_utils", "Conv1D", "weight")
class _MaskedMatmul(_MaskedWeight):
    """Layers that keep their weight as ``[in, out]``: ``x @ weight + bias``."""

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(self, Masked):
            return as_it_is_now(self, x)
        operands = self._masked_operands()
        if operands is None:
            return super().forward(x)
        weight, mask, bias = operands
        return functional.masked_matmul(x, weight, mask, bias)


def is_matmul(module: nn.Module) -> bool:
    """Whether it is a layer, masked or not, that multiplies by a weight ``[in, out]``."""
    return stands_in_as(type(module), _MaskedMatmul)


@torch.fx.wrap  # a node of its own in a symbolic trace, as a torch.nn module is: it asks for the input's rank
def convolve(op: str, *args: Any) -> Tensor:
    return getattr(functional, op)(*args)


def pad(module: Any, input: Tensor) -> tuple[Tensor, Any]:
    """The input of a convolution, padded if its mode is not the function's own; and what is left of the padding."""
    if module.padding_mode == "zeros":
        return input, module.padding
    return F.pad(input, module._reversed_padding_repeated_twice, mode=module.padding_mode), 0


class _MaskedConv(_MaskedWeight):
    _masked_op: ClassVar[str]
    _masked_torch: ClassVar[type[_ConvNd]]

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
        attach(self, "weight", torch.ones_like(self.weight) if mask is None else mask)

    def forward(self, input: Tensor) -> Tensor:
        if not isinstance(self, Masked):
            return as_it_is_now(self, input)
        operands = self._masked_operands()
        if operands is None or not self._calls_torch_conv():
            return super().forward(input)
        weight, mask, bias = operands
        input, padding = pad(self, input)
        return convolve(self._masked_op, input, weight, mask, bias, self.stride, padding, self.dilation, self.groups)

    def _calls_torch_conv(self) -> bool:
        """A subclass may change what becomes of the weight by a ``_conv_forward`` of its own."""
        cls: type[Any] = type(self)
        return cls._conv_forward is self._masked_torch._conv_forward

    def _masked_fuses(self) -> bool:
        return super()._masked_fuses() and self._calls_torch_conv()


class _MaskedConvTranspose(_MaskedWeight):
    _masked_op: ClassVar[str]
    _output_padding: Callable[..., list[int]]
    kernel_size: Any

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
        attach(self, "weight", torch.ones_like(self.weight) if mask is None else mask)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        if not isinstance(self, Masked):
            return as_it_is_now(self, input, output_size)
        operands = self._masked_operands()
        if operands is None or self.padding_mode != "zeros":  # torch raises for the latter
            return super().forward(input, output_size)
        weight, mask, bias = operands
        output_padding = self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, len(self.kernel_size), self.dilation
        )
        return convolve(
            self._masked_op,
            input,
            weight,
            mask,
            bias,
            self.stride,
            self.padding,
            output_padding,
            self.groups,
            self.dilation,
        )


@stands_in_for(nn.Conv1d, "weight")
class MaskedConv1d(_MaskedConv, nn.Conv1d):
    """A 1-dimensional convolution with a masked weight: :class:`torch.nn.Conv1d` plus ``mask``.

    Takes all arguments of torch's class, every padding mode and ``padding="same"`` included.

    Args:
        mask: ``[out_channels, in_channels / groups, k]``, any dtype, copied; by default ones.

    Shape:
        input ``[N, in_channels, L]`` or ``[in_channels, L]``, output as that of torch's class;
        ``weight_orig`` and ``weight_mask`` as ``mask``.

    Raises:
        TypeError: if ``mask`` is not a tensor.
        ValueError: if its shape is not the weight's.

    Example:
        >>> layer = masked_ops.MaskedConv1d(1, 2, kernel_size=2, bias=False, mask=torch.zeros(2, 1, 2))
        >>> layer
        MaskedConv1d(1, 2, kernel_size=(2,), stride=(1,), bias=False, sparsity=1)
        >>> layer(torch.ones(1, 1, 3)).count_nonzero()
        tensor(0)
    """

    _masked_op = "masked_conv1d"
    _masked_torch = nn.Conv1d


@stands_in_for(nn.Conv2d, "weight")
class MaskedConv2d(_MaskedConv, nn.Conv2d):
    """A 2-dimensional convolution with a masked weight: :class:`torch.nn.Conv2d` plus ``mask``.

    Takes all arguments of torch's class, every padding mode and ``padding="same"`` included.

    Args:
        mask: ``[out_channels, in_channels / groups, kH, kW]``, any dtype, copied; by default ones.

    Shape:
        input ``[N, in_channels, H, W]`` or ``[in_channels, H, W]``, output as that of torch's class;
        ``weight_orig`` and ``weight_mask`` as ``mask``.

    Raises:
        TypeError: if ``mask`` is not a tensor.
        ValueError: if its shape is not the weight's.

    Example:
        >>> layer = masked_ops.MaskedConv2d(1, 2, kernel_size=2, bias=False, mask=torch.zeros(2, 1, 2, 2))
        >>> layer
        MaskedConv2d(1, 2, kernel_size=(2, 2), stride=(1, 1), bias=False, sparsity=1)
        >>> layer(torch.ones(1, 1, 3, 3)).count_nonzero()
        tensor(0)
    """

    _masked_op = "masked_conv2d"
    _masked_torch = nn.Conv2d


@stands_in_for(nn.Conv3d, "weight")
class MaskedConv3d(_MaskedConv, nn.Conv3d):
    """A 3-dimensional convolution with a masked weight: :class:`torch.nn.Conv3d` plus ``mask``.

    Takes all arguments of torch's class, every padding mode and ``padding="same"`` included.

    Args:
        mask: ``[out_channels, in_channels / groups, kD, kH, kW]``, any dtype, copied; by default ones.

    Shape:
        input ``[N, in_channels, D, H, W]`` or ``[in_channels, D, H, W]``, output as that of torch's class;
        ``weight_orig`` and ``weight_mask`` as ``mask``.

    Raises:
        TypeError: if ``mask`` is not a tensor.
        ValueError: if its shape is not the weight's.

    Example:
        >>> layer = masked_ops.MaskedConv3d(1, 2, kernel_size=2, bias=False, mask=torch.zeros(2, 1, 2, 2, 2))
        >>> layer
        MaskedConv3d(1, 2, kernel_size=(2, 2, 2), stride=(1, 1, 1), bias=False, sparsity=1)
        >>> layer(torch.ones(1, 1, 3, 3, 3)).count_nonzero()
        tensor(0)
    """

    _masked_op = "masked_conv3d"
    _masked_torch = nn.Conv3d


@stands_in_for(nn.ConvTranspose1d, "weight")
class MaskedConvTranspose1d(_MaskedConvTranspose, nn.ConvTranspose1d):
    """A 1-dimensional transposed convolution with a masked weight: :class:`torch.nn.ConvTranspose1d` plus ``mask``.

    Takes all arguments of torch's class; ``forward`` takes ``output_size`` as well.

    Args:
        mask: ``[in_channels, out_channels / groups, k]``, any dtype, copied; by default ones.

    Shape:
        input ``[N, in_channels, L]`` or ``[in_channels, L]``, output as that of torch's class;
        ``weight_orig`` and ``weight_mask`` as ``mask``.

    Raises:
        TypeError: if ``mask`` is not a tensor.
        ValueError: if its shape is not the weight's.

    Example:
        >>> layer = masked_ops.MaskedConvTranspose1d(1, 2, kernel_size=2, bias=False, mask=torch.zeros(1, 2, 2))
        >>> layer(torch.ones(1, 1, 3)).count_nonzero()
        tensor(0)
    """

    _masked_op = "masked_conv_transpose1d"


@stands_in_for(nn.ConvTranspose2d, "weight")
class MaskedConvTranspose2d(_MaskedConvTranspose, nn.ConvTranspose2d):
    """A 2-dimensional transposed convolution with a masked weight: :class:`torch.nn.ConvTranspose2d` plus ``mask``.

    Takes all arguments of torch's class; ``forward`` takes ``output_size`` as well.

    Args:
        mask: ``[in_channels, out_channels / groups, kH, kW]``, any dtype, copied; by default ones.

    Shape:
        input ``[N, in_channels, H, W]`` or ``[in_channels, H, W]``, output as that of torch's class;
        ``weight_orig`` and ``weight_mask`` as ``mask``.

    Raises:
        TypeError: if ``mask`` is not a tensor.
        ValueError: if its shape is not the weight's.

    Example:
        >>> layer = masked_ops.MaskedConvTranspose2d(1, 2, kernel_size=2, bias=False, mask=torch.zeros(1, 2, 2, 2))
        >>> layer(torch.ones(1, 1, 3, 3)).count_nonzero()
        tensor(0)
    """

    _masked_op = "masked_conv_transpose2d"


@stands_in_for(nn.ConvTranspose3d, "weight")
class MaskedConvTranspose3d(_MaskedConvTranspose, nn.ConvTranspose3d):
    """A 3-dimensional transposed convolution with a masked weight: :class:`torch.nn.ConvTranspose3d` plus ``mask``.

    Takes all arguments of torch's class; ``forward`` takes ``output_size`` as well.

    Args:
        mask: ``[in_channels, out_channels / groups, kD, kH, kW]``, any dtype, copied; by default ones.

    Shape:
        input ``[N, in_channels, D, H, W]`` or ``[in_channels, D, H, W]``, output as that of torch's class;
        ``weight_orig`` and ``weight_mask`` as ``mask``.

    Raises:
        TypeError: if ``mask`` is not a tensor.
        ValueError: if its shape is not the weight's.

    Example:
        >>> layer = masked_ops.MaskedConvTranspose3d(1, 2, kernel_size=2, bias=False, mask=torch.zeros(1, 2, 2, 2, 2))
        >>> layer(torch.ones(1, 1, 3, 3, 3)).count_nonzero()
        tensor(0)
    """

    _masked_op = "masked_conv_transpose3d"
