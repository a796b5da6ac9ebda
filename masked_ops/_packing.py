"""How a masked weight of a live module becomes a packed one, and back: what ``packed`` and ``prune`` stand on."""

from __future__ import annotations

import contextlib
import weakref
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter
from torch.nn.utils import parametrize

from ._masked_class import masked_class
from ._masking import _refuse_sharded, atomic, attach, masked_names
from ._packed_class import (
    BITS,
    VALUES,
    Packed,
    bits_of,
    bits_problem,
    count_bits,
    gather,
    is_packed,
    matrix_shape,
    packed_class,
    scatter,
    set_leading,
)


def is_binary(mask: Tensor, dtype: torch.dtype) -> bool:
    """Whether a mask selects weights of ``dtype`` rather than scales them."""
    factor = mask.to(dtype)
    return bool(((factor == 0) | (factor == 1)).all())


def compress(weight: Parameter, mask: Tensor) -> tuple[Parameter, Tensor]:
    """``weight_values`` and ``weight_bits`` of a weight under a binary mask; the gradient is compressed too."""
    with torch.inference_mode(False), torch.no_grad():
        bits = bits_of(mask.to(weight.dtype))
        nnz = count_bits(bits)
        values = Parameter(gather(weight.detach(), bits, nnz), requires_grad=weight.requires_grad)
        if weight.grad is not None:
            values.grad = gather(weight.grad, bits, nnz)
    return values, bits


def keep_all(weight: Parameter) -> tuple[Parameter, Tensor]:
    """:func:`compress` of a weight of which nothing is pruned; on the meta device too."""
    with torch.inference_mode(False), torch.no_grad():
        rows, cols = matrix_shape(weight.shape)
        bits = torch.empty(rows, (cols + 7) // 8, dtype=torch.uint8, device=weight.device)
        set_leading(bits, weight.numel(), weight.shape)
        return Parameter(weight.detach().flatten(), requires_grad=weight.requires_grad), bits


def install(module: nn.Module, values: Parameter, bits: Tensor) -> None:
    """Replace the weight of ``module``, masked or within a constructor dense, by its packed form."""
    with atomic([module]):
        cls = type(module)
        if not isinstance(module, Packed):
            others = tuple(name for name in masked_names(module) if name != "weight")
            packed = packed_class(vars(cls).get("_masked_dense", cls))
            module.__class__ = masked_class(packed, others) if others else packed
        for name in ("weight", "weight_orig"):
            module._parameters.pop(name, None)
        module._buffers.pop("weight_mask", None)
        module._non_persistent_buffers_set.discard("weight_mask")
        module._parameters[VALUES] = values
        module._buffers[BITS] = bits


def make_dense(module: nn.Module) -> None:
    """Turn a packed weight into a plain Parameter with zeros where nothing was kept.

    Raises:
        ValueError: if the weight was parametrized or sharded since, or the class is not one that packing made.
    """
    _refuse_sharded(module)
    values, bits = module._parameters.get(VALUES), module._buffers.get(BITS)
    cls = _unpacked_class(type(module))
    if values is None or bits is None or cls is None or parametrize.is_parametrized(module):
        raise ValueError(
            f"{type(module).__name__} cannot be unpacked: its class is not one that packing made, or something else "
            f"computes '{VALUES}' (a parametrization, for one), which must be removed first"
        )
    shape = module._packed_shape()  # type: ignore[operator]
    made = _made_before()
    if id(values) not in made:
        with torch.inference_mode(False), torch.no_grad():
            weight = Parameter(scatter(values.detach(), bits, shape), requires_grad=values.requires_grad)
            if values.grad is not None:
                weight.grad = scatter(values.grad, bits, shape)
        made[id(values)] = values, weight
    with atomic([module]):
        module.__class__ = cls
        del module._parameters[VALUES], module._buffers[BITS]
        module._non_persistent_buffers_set.discard(BITS)
        module._parameters["weight"] = made[id(values)][1]


def unpack_weight(module: nn.Module) -> None:
    """Turn a packed weight into a masked one, with zeros beneath the mask; raises as :func:`make_dense`."""
    with atomic([module]):
        values, bits = getattr(module, VALUES), getattr(module, BITS)
        make_dense(module)
        with torch.inference_mode(False), torch.no_grad():
            mask = scatter(torch.ones_like(values), bits, module._parameters["weight"].shape)  # type: ignore[union-attr]
        attach(module, "weight", mask)


def _unpacked_class(cls: type[nn.Module]) -> type[nn.Module] | None:
    """What a class was made of before packing, its masked parameters kept; None if packing did not make it."""
    dense: type[nn.Module] | None = vars(cls).get("_packed_dense")
    if dense is not None:
        return dense
    below: type[nn.Module] | None = vars(cls).get("_masked_dense")
    dense = None if below is None else vars(below).get("_packed_dense")
    return None if dense is None else masked_class(dense, cls._masked_names)  # type: ignore[attr-defined]


# --- ties ------------------------------------------------------------------------------------------------------------


def keep_ties() -> contextlib.AbstractContextManager[None]:
    """Modules that share ``weight_values`` and are unpacked within come to share the weight."""
    return _Ties()


class _Ties:
    def __init__(self) -> None:
        self.made: dict[int, tuple[Parameter, Parameter]] = {}  # with the values: a live object's id stays its own

    def __enter__(self) -> None:
        _ties.set(weakref.ref(self))

    def __exit__(self, *error: object) -> None:
        _ties.set(None)


# Weak: what an interrupt kept from its last step is gone all the same when its "with" is.
_ties: ContextVar[weakref.ref[_Ties] | None] = ContextVar("masked_ops_ties", default=None)


def _made_before() -> dict[int, tuple[Parameter, Parameter]]:
    reference = _ties.get()
    ties = None if reference is None else reference()
    return {} if ties is None else ties.made


# --- checkpoints -----------------------------------------------------------------------------------------------------


def convert_checkpoint(module: nn.Module, prefix: str, state: dict[str, Any]) -> None:
    """Bring what ``state`` holds of the weight of ``module`` from dense, masked or packed to what the module is.

    Raises:
        RuntimeError: if the checkpoint does not fit.
    """
    dense, orig, mask, values, bits = (prefix + name for name in ("weight", "weight_orig", "weight_mask", VALUES, BITS))

    def all_tensors(*keys: str) -> bool:
        return all(isinstance(state.get(key), Tensor) for key in keys)

    if is_packed(module):
        shape, own = module._packed_shape(), getattr(module, BITS)  # type: ignore[operator]
        if values in state or bits in state:
            return
        if all_tensors(orig, mask):
            _require_shape(orig, state[orig], shape)
            _require_shape(mask, state[mask], shape)
            if not is_binary(state[mask], state[orig].dtype):
                raise RuntimeError(
                    f"{mask} has values other than 0 and 1, which a packed module cannot hold: unpack it first "
                    "(masked_ops.unpack)"
                )
            weight = state.pop(orig)
            own = bits_of(state.pop(mask).to(weight))
        elif all_tensors(dense):
            _require_shape(dense, state[dense], shape)
            weight = state.pop(dense)
            own = own.to(weight.device)
        else:
            return
        state[values], state[bits] = gather(weight.detach(), own, count_bits(own)), own
        return
    param = module._parameters.get("weight_orig", module._parameters.get("weight"))
    if param is None or param.dim() < 2 or not all_tensors(values, bits):
        return
    if state[values].dim() != 1:
        raise RuntimeError(f"{values} must have one dimension, got shape {tuple(state[values].shape)}")
    problem = bits_problem(state[bits], state[values].numel(), param.shape)
    if problem is not None:
        raise RuntimeError(f"{bits} {problem}")
    with torch.no_grad():
        kept, places = state.pop(values).detach(), state.pop(bits)
        places = places.to(kept.device)
        state[orig], state[mask] = (scatter(t, places, param.shape) for t in (kept, torch.ones_like(kept)))


def _require_shape(key: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise RuntimeError(
            f"size mismatch for {key}: {list(tensor.shape)} in the checkpoint, {list(shape)} in the model"
        )
