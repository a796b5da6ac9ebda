"""Packed layers: what is left of a pruned weight, and nothing else.

A packed linear layer keeps the weights that were not pruned, ``weight_values``, and one bit for each place,
``weight_bits``. Forward and all gradients work on these alone, so that parameters, gradients, the state of the
optimizer and checkpoints shrink with the density.

    prune.global_unstructured([(m, "weight") for m in linears], prune.L1Unstructured, amount=0.9)
    masked_ops.pack(model)
    optimizer = torch.optim.Adam(model.parameters())  # over the new, short Parameters
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from . import functional
from . import nn as masked_nn
from ._masking import _refuse_sharded
from ._packed_class import BITS, VALUES, Packed, can_be_packed, is_packed, packs, sparsity_of
from ._packing import compress, install, is_binary, keep_all, keep_ties
from ._pruning_methods import adopt, drop_hook, pruned_names

__all__ = ["PackedLinear", "freeze", "pack", "unpack"]

_M = TypeVar("_M", bound=nn.Module)


class _Sparsity:
    """A non-data descriptor: an attribute ``sparsity`` that a user's own module sets wins over it."""

    def __get__(self, module: Any, owner: type | None = None) -> Any:
        if module is None:
            return self
        rows, cols = module._packed_shape()
        return sparsity_of(module.weight_values.numel(), rows * cols)


@packs(nn.Linear)
class PackedLinear(Packed, nn.Linear):
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

    weight: Any
    weight_values: nn.Parameter
    weight_bits: Tensor

    sparsity: float = _Sparsity()  # type: ignore[assignment]
    """The fraction of the weight that is pruned."""

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
        weight = self._parameters.get("weight", self._parameters.get("weight_orig"))  # of a masked layer's subclass
        assert weight is not None
        install(self, *(keep_all(weight) if mask is None else compress(weight, _checked(mask, weight))))

    def _packed_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def forward(self, input: Tensor) -> Tensor:
        # The values are read on every call, of a frozen layer too: whatever is written to them is seen.
        try:
            # Module.__getattr__ would cost 0.45 µs for each of the three.
            parameters = self._parameters
            values, bits, bias = parameters["weight_values"], self._buffers["weight_bits"], parameters["bias"]
        except KeyError:
            # Parametrized, or an attribute of a replica (DataParallel), or a bias that is masked.
            values, bits, bias = self.weight_values, self.weight_bits, self.bias
        return functional.packed_linear(input, values, bits, self.in_features, bias)  # type: ignore[arg-type]

    @staticmethod
    def from_masked(module: nn.Linear) -> PackedLinear:
        """An independent packed copy of a linear layer with a masked weight; :func:`pack` packs a module in place.

        Raises:
            TypeError: if ``module`` is no linear layer.
            ValueError: as :func:`pack`.

        Example:
            >>> masked = masked_ops.MaskedLinear(4, 2, mask=torch.eye(4)[:2])
            >>> masked_ops.PackedLinear.from_masked(masked).weight_values.shape
            torch.Size([2])
        """
        if not isinstance(module, nn.Linear):
            raise TypeError(f"module: torch.nn.Linear expected, got {type(module).__name__}")
        twin: Any = pack(copy.deepcopy(module))
        return twin

    def to_masked(self) -> nn.Linear:
        """An independent masked copy, pruned weights 0; :func:`unpack` unpacks a module in place.

        Example:
            >>> masked_ops.PackedLinear(4, 2, mask=torch.eye(4)[:2]).to_masked()
            MaskedLinear(in_features=4, out_features=2, bias=True, sparsity=0.75)
        """
        return unpack(copy.deepcopy(self))

    def to_dense(self) -> nn.Linear:
        """An independent dense copy, pruned weights 0; ``prune.remove`` makes a module dense in place.

        Example:
            >>> masked_ops.PackedLinear(4, 2, mask=torch.eye(4)[:2]).to_dense()
            Linear(in_features=4, out_features=2, bias=True)
        """
        masked: Any = self.to_masked()
        return masked.to_dense()


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
        raise ValueError("mask: zeros and ones expected, got other values; a MaskedLinear takes such a soft mask")
    return mask.to(weight.device)


# --- models ----------------------------------------------------------------------------------------------------------


def pack(model: _M) -> _M:
    """Keep of the masked linear layers in ``model`` only what is not pruned: turn each into a packed one, in place.

    Packed are ``MaskedLinear`` and pruned instances of ``nn.Linear`` and of subclasses that keep its ``forward``,
    ``model`` itself included. All else stays as it is: layers that are not pruned, other pruned parameters (of
    convolutions, a bias), linear layers with a ``forward`` of their own. :func:`masked_ops.report` lists who is what.

    A packed module is the same object with the same hooks, but its ``weight_values`` is a new Parameter: build the
    optimizer, ``DistributedDataParallel`` and the like after it. ``requires_grad`` and the values of a gradient are
    kept. The values beneath the mask are gone, and with them the rounds that ``prune.undo`` could take back;
    ``prune.is_pruned`` stays True. Modules that share weight and mask share the packed weight.

    Args:
        model: any module; what :mod:`torch.nn.utils.prune` pruned counts too.

    Returns:
        ``model``. If a call fails, it is as it was: all of its layers are packed, or none.

    Raises:
        TypeError: if ``model`` is not a module.
        ValueError: if there is nothing to pack, or a layer that cannot be: with a soft mask (values other than 0 and
            1), sharded, parametrized, on the meta device, or with a weight that others share under another mask.

    Example:
        >>> model = torch.nn.Sequential(prune.l1_unstructured(torch.nn.Linear(8, 4), "weight", amount=0.75))
        >>> masked_ops.pack(model)
        Sequential(
          (0): PackedLinear(in_features=8, out_features=4, bias=True, nnz=8, sparsity=0.75)
        )
    """
    _require_module(model)
    with masked_nn.atomic(_candidates(model)):
        if not _pack(model):
            packed = any(is_packed(module) for module in model.modules())
            raise ValueError(
                f"nothing to pack in {type(model).__name__}: linear layers with a masked weight expected, "
                f"got {'packed ones only' if packed else 'none'}"
            )
    return model


def unpack(model: _M) -> _M:
    """Turn every packed layer in ``model`` into a masked one, in place, with zeros beneath the mask.

    It has a new Parameter ``weight_orig``, and a ``weight_mask`` in its dtype, and counts as pruned by
    ``prune.CustomFromMask``. ``prune.remove`` makes a packed layer dense without this step.

    Returns:
        ``model``. If a call fails, it is as it was.

    Raises:
        TypeError: if ``model`` is not a module.
        ValueError: if nothing in it is packed, or a layer was sharded or parametrized since.

    Example:
        >>> masked_ops.unpack(masked_ops.PackedLinear(8, 4))
        MaskedLinear(in_features=8, out_features=4, bias=True, sparsity=0)
    """
    _require_module(model)
    packed = [module for module in model.modules() if is_packed(module)]
    if not packed:
        raise ValueError(f"nothing in {type(model).__name__} is packed")
    with masked_nn.atomic(packed), keep_ties():
        for module in packed:
            adopt(module, "weight")
    return model


def freeze(model: _M) -> _M:
    """Make ``model`` ready for inference, in place: masked linear layers packed, and nothing requires a gradient.

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
                f"nothing to freeze in {type(model).__name__}: linear layers with a packed or masked weight expected"
            )
        model.requires_grad_(False)
    return model


def _require_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: torch.nn.Module expected, got {type(model).__name__}")


def _candidates(model: nn.Module) -> list[Any]:
    """The modules in ``model`` that are packed unless they compute their weight themselves."""
    return [m for m in model.modules() if can_be_packed(m) and not is_packed(m) and "weight" in pruned_names(m)]


def _pack(model: nn.Module) -> bool:
    """Pack what there is; False if that is nothing. A failure leaves it half done."""
    labels = {module: name or type(module).__name__ for name, module in model.named_modules()}
    layers: list[Any] = []
    for module in _candidates(model):
        if parametrize.is_parametrized(module):
            raise ValueError(f"'{labels[module]}' is parametrized: remove the parametrizations before packing it")
        adopt(module, "weight")
        if masked_nn.path_of(module, "weight") == "fused" and not module.weight_orig.is_complex():
            _require_packable(labels[module], module)
            layers.append(module)
    for group in _groups(layers, labels):
        form = compress(group[0].weight_orig, group[0].weight_mask)
        for module in group:
            install(module, *form)
            drop_hook(module, "weight")
    return bool(layers)


def _require_packable(label: str, module: Any) -> None:
    try:
        _refuse_sharded(module)
    except ValueError as error:
        raise ValueError(f"'{label}' cannot be packed: {error}") from None
    weight, mask = module.weight_orig, module.weight_mask
    shape = module.out_features, module.in_features
    for name in (VALUES, BITS):
        if hasattr(module, name):
            raise ValueError(f"'{label}' cannot be packed: it has an attribute '{name}' already")
    if type(weight) is not nn.Parameter:
        raise ValueError(f"'{label}' cannot be packed: a plain Parameter expected, got {type(weight).__name__}")
    if tuple(weight.shape) != shape:
        raise ValueError(
            f"'{label}' cannot be packed: out_features and in_features are {shape}, "
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
    """The layers, those that share a weight together."""
    groups: dict[nn.Parameter, list[Any]] = {}
    for layer in layers:
        groups.setdefault(layer.weight_orig, []).append(layer)
    chosen = set(layers)
    for module, label in labels.items():
        for name, parameter in module._parameters.items():
            if parameter in groups and not (module in chosen and name == "weight_orig"):
                raise ValueError(
                    f"'{labels[groups[parameter][0]]}' cannot be packed: it shares its weight with '{name}' of "
                    f"'{label}', which cannot be"
                )
    for first, *others in groups.values():
        for layer in others:
            if not torch.equal(first.weight_mask != 0, layer.weight_mask != 0):
                names = f"'{labels[first]}' and '{labels[layer]}'"
                raise ValueError(f"{names} cannot be packed: they share a weight under different masks")
    return groups.values()
