"""The classes of modules with a packed weight, and the form in which it is kept.

What a mask keeps of a weight ``[N, K]`` is the Parameter ``weight_values`` ``[nnz]``, in row-major order. Where it
belongs says the buffer ``weight_bits``, uint8 ``[N, ceil(K / 8)]``: entry (n, k) of the mask is bit ``k % 8`` of byte
``[n, k // 8]``, the lowest bit first; bits beyond K are 0. ``weight`` is a property that scatters when it is read.
A weight of more dimensions is the matrix ``weight.flatten(1)``.

The class of a packed ``X`` is made on demand, as that of a masked one is (``_masked_class``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import Parameter

from . import _ops
from ._masked_class import _dense_view, _reduce_ex, is_sharded, named_among, new_class

_P = TypeVar("_P", bound="type[Packed]")

VALUES = "weight_values"
BITS = "weight_bits"


# --- the form --------------------------------------------------------------------------------------------------------


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a weight of this shape."""
    return shape[0], math.prod(shape[1:])


def bits_of(mask: Tensor) -> Tensor:
    """The bits of a mask, one where it is not 0."""
    rows, cols = matrix_shape(mask.shape)
    width = (cols + 7) // 8
    octets = F.pad((mask != 0).to(torch.uint8).reshape(rows, cols), (0, 8 * width - cols)).view(rows, width, 8)
    return (octets << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(-1, dtype=torch.uint8)


def bits_problem(bits: Tensor, nnz: int, shape: Sequence[int]) -> str | None:
    """What keeps ``bits`` from placing ``nnz`` values in a weight of ``shape``, as the end of a sentence about them."""
    rows, cols = matrix_shape(shape)
    expected = (rows, (cols + 7) // 8)
    if bits.dtype != torch.uint8 or tuple(bits.shape) != expected:
        return f"must be torch.uint8 of shape {expected}, got {bits.dtype} of shape {tuple(bits.shape)}"
    if bits.is_meta:
        return None
    if cols % 8 and bool((bits[:, -1] >> cols % 8).any()):
        return f"must have no bit set beyond the {cols} columns of the weight"
    ones = count_bits(bits)
    return None if ones == nnz else f"must have as many bits set as there are values: {ones} are set, got {nnz} values"


def count_bits(bits: Tensor) -> int:
    """How many bits are set: counted in pairs, then in nibbles, then in bytes."""
    pairs = bits - ((bits >> 1) & 0x55)
    nibbles = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return int(((nibbles + (nibbles >> 4)) & 0x0F).sum())


def set_leading(bits: Tensor, nnz: int, shape: Sequence[int]) -> None:
    """Make ``bits`` those of a mask whose first ``nnz`` entries are 1."""
    cols = matrix_shape(shape)[1]
    full, rest = divmod(nnz, cols) if cols else (0, 0)
    first = torch.arange(cols, device=bits.device)[None]
    bits.zero_()
    bits[:full] = bits_of(first >= 0)
    if rest:
        bits[full] = bits_of(first < rest)[0]


def scatter(values: Tensor, bits: Tensor, shape: Sequence[int]) -> Tensor:
    """The dense weight; differentiable in ``values``."""
    _ops.load()
    return _ops.unpack_values(values, bits, matrix_shape(shape)[1]).view(shape)


def gather(weight: Tensor, bits: Tensor, nnz: int) -> Tensor:
    """The entries of ``weight`` whose bit is set; differentiable."""
    _ops.load()
    return _ops.pack_values(weight.reshape(matrix_shape(weight.shape)), bits, nnz)


# --- the classes -----------------------------------------------------------------------------------------------------


class Packed(nn.Module):
    """Base of every class with a packed weight."""

    _packed_dense: ClassVar[type[nn.Module]] = nn.Module  # what the class becomes when it is unpacked
    _packed_on_demand: ClassVar[bool] = False  # made by _meet: no module has it under its name

    def _packed_shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        raise NotImplementedError

    def _packed_operands(self) -> tuple[Any, Any, Any]:
        """``weight_values``, ``weight_bits`` and ``bias``, for ``forward``."""
        # They are read on every call, of a frozen layer too: whatever is written to the values is seen.
        try:
            # Module.__getattr__ would cost 0.45 µs for each of the three.
            parameters = self._parameters
            return parameters[VALUES], self._buffers[BITS], parameters["bias"]
        except KeyError:
            # Parametrized, or an attribute of a replica (DataParallel), or a bias that is masked.
            return getattr(self, VALUES), getattr(self, BITS), self.bias

    def set_mask(self, mask: Tensor) -> None:
        """Refused: packed values fit one mask; ``masked_ops.unpack`` makes a masked module, whose mask can be set."""
        raise ValueError(
            f"the mask of {type(self).__name__} cannot be set while its weight is packed: masked_ops.unpack makes it a "
            "masked one, and masked_ops.pack a packed one again"
        )

    def register_parameter(self, name: str, param: Parameter | None) -> None:
        """``module.weight = Parameter(...)`` ends here."""
        if name == "weight" and is_packed(self):
            raise TypeError(_cannot("assign a Parameter to", self))
        super().register_parameter(name, param)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = self._buffers.get(BITS)
        super()._apply(fn, recurse)
        after = self._buffers.get(BITS)
        if before is None or after is None:
            return self
        if after.dtype != torch.uint8:  # module.type(dtype) converts every buffer
            self._buffers[BITS] = after = after.to(torch.uint8)
        if before.is_meta and not after.is_meta:
            # What gets memory only now (to_empty, skip_init) has noise for values, but not for bits: they must agree.
            set_leading(after, getattr(self, VALUES).numel(), self._packed_shape())
        return self

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        keys = prefix + VALUES, prefix + BITS
        refused: tuple[str, ...] = ()
        if is_packed(self) and any(key in state_dict for key in keys):
            problem = self._make_room(state_dict, keys, local_metadata.get("assign_to_params_buffers", False))
            if problem is not None:
                # Neither is loaded: one without the other is a module that cannot run.
                refused = keys
                error_msgs.append(problem)
                state_dict = {key: value for key, value in state_dict.items() if key not in keys}
        elif strict and is_packed(self):
            other = next((key for key in (f"{prefix}weight_orig", f"{prefix}weight") if key in state_dict), None)
            if other is not None:
                error_msgs.append(
                    f"'{other}' is not packed, but the module is: masked_ops.prune.load_state_dict converts it"
                )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        missing_keys[:] = [key for key in missing_keys if key not in refused]

    def _make_room(self, state_dict: Any, keys: tuple[str, str], assign: bool) -> str | None:
        """Give ``weight_values`` the size that it has in a checkpoint; else what is wrong with the latter."""
        values_key, bits_key = keys
        own = getattr(self, VALUES)
        values, bits = state_dict.get(values_key, own), state_dict.get(bits_key, getattr(self, BITS))
        if not (isinstance(values, Tensor) and isinstance(bits, Tensor)):
            return None  # torch says so itself
        if values.dim() != 1:
            return f"{values_key} must have one dimension, got shape {tuple(values.shape)}"
        problem = bits_problem(bits, values.numel(), self._packed_shape())
        if problem is not None:
            return f"{bits_key} {problem}"
        if values.shape == own.shape:
            return None
        if is_sharded(own) or VALUES not in self._parameters:
            return f"{values_key} has {values.numel()} values and the module {own.numel()}, which cannot be resized"
        if assign:
            empty = torch.empty_like(values, dtype=own.dtype, device="meta")
            self._parameters[VALUES] = Parameter(empty, requires_grad=own.requires_grad)
        else:
            room = own.data.new_empty(values.shape)
            own.grad = None
            # A graph that is still alive holds the node that accumulates the gradient, and the node the old size. Torch
            # makes a new one only where the type changes.
            own.data = room.new_empty(0, dtype=torch.float16 if own.dtype == torch.float32 else torch.float32)
            own.data = room
        return None


def is_packed(module: nn.Module) -> bool:
    """Whether ``module`` itself has a packed weight."""
    return isinstance(module, Packed) and hasattr(module, BITS)


_packed_classes: dict[type[nn.Module], type[Packed]] = {}


def packs(torch_class: type[nn.Module]) -> Callable[[_P], _P]:
    """Class decorator: a ``torch_class`` becomes the decorated class when it is packed."""

    def decorate(cls: _P) -> _P:
        _packed_classes[torch_class] = _made_packed(cls, torch_class)
        return cls

    return decorate


def _made_packed(cls: _P, dense: type[nn.Module]) -> _P:
    cls._packed_dense = dense
    for key, value in _overrides(dense).items():
        setattr(cls, key, value)
    return cls


_named: dict[tuple[str, str], type[Packed]] = {}


def packs_named(module: str, name: str) -> Callable[[_P], _P]:
    """The same for a class of another library, which is not imported: its packed class is made when it is met."""

    def decorate(cls: _P) -> _P:
        _named[module, name] = cls
        return cls

    return decorate


def _meet(dense: type[nn.Module]) -> None:
    """Make the packed classes of the named ones that ``dense`` is or derives from."""
    for cls, base in named_among(dense, _named):
        if cls not in _packed_classes:
            namespace = {"__module__": cls.__module__, "_packed_on_demand": True}
            made = new_class(f"Packed{cls.__name__}", (base, cls), namespace)
            _packed_classes.setdefault(cls, _made_packed(made, cls))  # threads that made one each agree on the first


def can_be_packed(module: nn.Module) -> bool:
    """Whether there are kernels for a packed ``module``."""
    _meet(type(module))
    return isinstance(module, tuple(_packed_classes))


def _base_of(dense: type[nn.Module]) -> type[Packed]:
    _meet(dense)
    return next(cls for torch_class, cls in list(_packed_classes.items()) if issubclass(dense, torch_class))


def shape_when_packed(module: nn.Module) -> tuple[int, ...]:
    """The shape that the weight of ``module``, not packed yet, must have by the module's own numbers."""
    return _base_of(type(module))._packed_shape(module)  # type: ignore[arg-type]


def packed_class(dense: type[nn.Module]) -> type[Packed]:
    """The class of a ``dense`` module that is packed; the same one for the same argument."""
    base = _base_of(dense)
    if dense is base._packed_dense and not base._packed_on_demand:
        return base
    # Right before torch's class, for whoever calls super(); but before all that a subclass of a masked layer inherits.
    bases: tuple[type[nn.Module], ...] = (base, dense) if hasattr(dense, "_masked_dense") else (dense, base)
    if dense is base._packed_dense:
        bases = (base,)

    # A weak cache on which threads agree: see masked_class.
    def existing() -> Any:
        for cls in type.__subclasses__(bases[0]):
            if vars(cls).get("_made_by") == (packed_class, dense):
                return cls
        return None

    if (found := existing()) is not None:
        return found
    namespace = {
        **_overrides(dense),
        "__module__": dense.__module__,
        "__doc__": f"{dense.__name__} with a packed weight.",
        "__reduce_ex__": _reduce_ex,
        "_packed_dense": dense,
        "_made_by": (packed_class, dense),
    }
    made: type[Packed] = new_class(f"Packed{dense.__name__}", bases, namespace)
    return existing() or made


# --- what a packed class puts before all that the dense one has ------------------------------------------------------


def _cannot(action: str, module: nn.Module) -> str:
    return (
        f"cannot {action} 'weight' of {type(module).__name__}, which is packed: write to '{VALUES}', or unpack the "
        "module first (masked_ops.unpack)"
    )


def _get_weight(self: nn.Module) -> Any:
    if not hasattr(self, BITS):  # within a constructor
        return self.__dict__["weight"] if "weight" in self.__dict__ else self.__getattr__("weight")
    try:
        values: Any = getattr(self, VALUES)
        if is_sharded(values):
            raise RuntimeError(f"'weight' of {type(self).__name__} cannot be read while '{VALUES}' is sharded")
        return scatter(values, getattr(self, BITS), self._packed_shape())  # type: ignore[operator]
    except AttributeError as error:
        # Module.__getattr__ would replace it by "no attribute 'weight'".
        raise RuntimeError(f"{type(self).__name__}.weight cannot be computed: {error}") from error


def _set_weight(self: nn.Module, value: object) -> None:
    if is_packed(self):
        raise TypeError(_cannot(f"assign '{torch.typename(value)}' to", self))
    self.__dict__["weight"] = value


def _delete_weight(self: nn.Module) -> None:
    if is_packed(self):
        raise AttributeError(_cannot("delete", self))
    del self.__dict__["weight"]


def _overrides(dense: type[nn.Module]) -> dict[str, Any]:
    def extra_repr(self: Packed) -> str:
        if not is_packed(self):
            return dense.extra_repr(self)
        # A user's extra_repr may read the weight, and call super()'s.
        view = self if dense in _packed_classes else _dense_view(self, {"weight": _get_weight(self)}, dense)
        nnz = getattr(self, VALUES).numel()
        parts = [dense.extra_repr(view), f"nnz={nnz}", f"sparsity={sparsity_of(nnz, self._packed_shape()):.4g}"]
        return ", ".join(part for part in parts if part)

    namespace: dict[str, Any] = {
        "weight": property(_get_weight, _set_weight, _delete_weight, f"``{VALUES}`` scattered, at every read."),
        "extra_repr": extra_repr,
    }
    initialize = getattr(dense, "reset_parameters", None)
    if callable(initialize):

        def reset_parameters(self: Packed) -> None:
            if not is_packed(self):
                initialize(self)
                return
            values: Any = getattr(self, VALUES)
            view = _dense_view(self, {"weight": Parameter(values.new_empty(self._packed_shape()))}, dense)
            view.reset_parameters()
            with torch.no_grad():
                values.copy_(gather(view._parameters.pop("weight"), getattr(self, BITS), values.numel()))
            # The method may have replaced another parameter or set an attribute, rather than filled in place.
            self._parameters.update(view._parameters)
            vars(self).update({key: value for key, value in vars(view).items() if key != "_parameters"})

        reset_parameters.__doc__ = initialize.__doc__
        namespace["reset_parameters"] = reset_parameters
    return namespace


def sparsity_of(nnz: int, shape: Sequence[int]) -> float:
    """The fraction of zeros in a weight of this shape; 0 for an empty one."""
    entries = math.prod(shape)
    return 1 - nnz / entries if entries else 0.0
