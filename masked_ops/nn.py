"""Drop-in layers with a masked weight: ``MaskedLinear`` and the convolutions.

Each subclasses its torch class and takes its constructor's arguments. It holds the Parameter ``weight_orig`` and the
persistent buffer ``weight_mask``, as a module pruned by ``torch.nn.utils.prune`` does, so that a checkpoint of either
loads in the other. ``weight`` is computed from both when it is read: masked, differentiable, never stale; ``forward``
does not read it, the mask is applied within the kernels.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from . import functional
from ._masking import (
    Masked,
    atomic,
    attach,
    detach,
    masked_names,
    path_of,
    set_mask,
    sparsity,
    stands_in_for,
)

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


class _Sparsity:
    """``sparsity`` as a non-data descriptor, so that an attribute of this name of a user's own module wins."""

    def __get__(self, module: Any, owner: type | None = None) -> Any:
        return self if module is None else sparsity(module.weight_mask)


class _MaskedWeight(Masked):
    """What the layers with a fused ``weight`` have in common."""

    _masked_op: ClassVar[Callable[..., Tensor]]
    weight_orig: nn.Parameter
    weight_mask: Tensor

    sparsity: float = _Sparsity()  # type: ignore[assignment]

    def _masked_operands(self) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """``weight_orig``, ``weight_mask`` and ``bias``; None where there is no mask (any more)."""
        try:
            parameters = self._parameters
            # Module.__getattr__ would cost 0.45 µs for each of them.
            return parameters["weight_orig"], self._buffers["weight_mask"], parameters["bias"]  # type: ignore[return-value]
        except KeyError:
            # Parametrized, masked (the bias), or an attribute in a replica of DataParallel.
            mask = getattr(self, "weight_mask", None)
            return None if mask is None else (self.weight_orig, mask, self.bias)

    def set_mask(self, mask: Tensor) -> None:
        """Replace the mask of ``weight``."""
        set_mask(self, "weight", mask)

    @classmethod
    def from_dense(cls: type[_W], module: nn.Module, mask: Tensor | None = None) -> _W:
        """A masked module that shares the Parameters of a dense one."""
        raise NotImplementedError

    def to_dense(self) -> nn.Module:
        """A dense copy."""
        dense = copy.deepcopy(self)
        for name in masked_names(dense):
            detach(dense, name)
        return dense


@stands_in_for(nn.Linear, "weight")
class MaskedLinear(_MaskedWeight, nn.Linear):
    """Linear layer."""

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
        operands = self._masked_operands()
        if operands is None:
            return super().forward(input)
        weight, mask, bias = operands
        return functional.masked_linear(input, weight, mask, bias)

    def _masked_fuses(self) -> bool:
        return type(self).forward is MaskedLinear.forward and "forward" not in vars(self)


_ = (inspect, F, _ConvNd)
