"""The classes of modules with masked parameters.

A masked parameter ``weight`` is a property of the module's class: computed from ``weight_orig`` and ``weight_mask``
when it is read. The class of a masked ``X`` is made on demand, with the bases ``(X, stand-in)``. The stand-in of a
torch class (``MaskedLinear`` for ``nn.Linear``) derives from that class alone and so comes right before it in the
method resolution order: a user's ``forward`` that calls ``super().forward(input)`` gets the fused one.
"""

from __future__ import annotations

import contextlib
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from . import functional
from .reference import is_float8

_M = TypeVar("_M", bound="type[Masked]")
_T = TypeVar("_T")
_ABSENT = object()


def orig_name(name: str) -> str:
    return f"{name}_orig"


def mask_name(name: str) -> str:
    return f"{name}_mask"


def count_nonzero(tensor: Tensor) -> int:
    return int(torch.count_nonzero(tensor != 0 if is_float8(tensor.dtype) else tensor))


def sparsity(mask: Tensor) -> float:
    """The fraction of zeros in ``mask``; 0 for an empty one."""
    return 1 - count_nonzero(mask) / mask.numel() if mask.numel() else 0.0


class Sparsity:
    """A descriptor of a property ``sparsity`` that gives way to whatever a user's own module calls so.

    It has no ``__set__``, so that an attribute of the instance wins; parameters, buffers and children are none.
    """

    def __init__(self, compute: Callable[[Any], float]) -> None:
        self._compute = compute

    def __get__(self, module: Any, owner: type | None = None) -> Any:
        if module is None:
            return self
        for held in (module._parameters, module._buffers, module._modules):
            if "sparsity" in held:
                return held["sparsity"]
        return self._compute(module)


def as_it_is_now(module: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a module by its class: its ``forward`` was bound when it had another, and kept, as accelerate's hooks do."""
    return type(module).forward(module, *args, **kwargs)


# --- the property ----------------------------------------------------------------------------------------------------


def _masked_property(name: str) -> Any:
    orig, mask = orig_name(name), mask_name(name)

    # Plain getattr, and the mask first: within a constructor nothing is masked yet, a parametrized weight_orig is a
    # property itself, and the replicas of DataParallel hold their parameters as attributes.
    def get(self: nn.Module) -> Any:
        mask_tensor: Any = getattr(self, mask, _ABSENT)
        if mask_tensor is _ABSENT:
            return self.__dict__[name] if name in self.__dict__ else self.__getattr__(name)
        try:
            if mask_tensor is None:
                raise AttributeError(f"'{mask}' is None")
            return masked_value(getattr(self, orig), mask_tensor)
        except AttributeError as error:
            # Module.__getattr__ would replace it by "no attribute 'weight'".
            raise RuntimeError(f"{type(self).__name__}.{name} cannot be computed: {error}") from error

    def set_(self: nn.Module, value: object) -> None:
        if not hasattr(self, mask):
            self.__dict__[name] = value
            return
        raise TypeError(
            f"cannot assign '{torch.typename(value)}' to the masked parameter '{name}' "
            f"(torch.nn.Parameter expected, which becomes '{orig}'; a tensor of values goes into {orig}.data)"
        )

    def delete(self: nn.Module) -> None:
        if not hasattr(self, mask):
            del self.__dict__[name]
            return
        raise AttributeError(f"cannot delete the masked parameter '{name}': remove its mask first")

    return property(get, set_, delete, f"``{orig}`` under ``{mask}``, computed when it is read.")


def masked_value(orig: Tensor, mask: Tensor) -> Tensor:
    """What reading a masked parameter gives."""
    if is_sharded(orig):
        return _masked_dtensor(orig, mask)
    return functional.apply_mask(orig, mask)


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, without importing torch.distributed."""
    return type(tensor) not in (Parameter, Tensor) and hasattr(tensor, "device_mesh")


def _masked_dtensor(orig: Any, mask: Tensor) -> Tensor:
    """A sharded parameter (FSDP2 outside forward, tensor parallel) under a mask that every rank holds in full."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh, placements = orig.device_mesh, orig.placements
    # Replicate -> Shard takes the local part, without communication: one rank alone may read the weight.
    whole: Any = (
        mask if is_sharded(mask) else DTensor.from_local(mask, mesh, [Replicate()] * mesh.ndim, run_check=False)
    )
    local = functional.apply_mask(orig.to_local(), whole.redistribute(placements=placements).to_local())
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=orig.shape, stride=orig.stride())


# --- the classes -----------------------------------------------------------------------------------------------------


class Masked(nn.Module):
    """Base of every class with masked parameters; right before ``nn.Module`` in their method resolution order."""

    _masked_dense: ClassVar[type[nn.Module]] = nn.Module  # what the class becomes when its masks are gone
    _masked_names: ClassVar[tuple[str, ...]] = ()  # the parameters that have a property, in the order of attaching
    _masked_on_demand: ClassVar[bool] = False  # made by _meet: no module has it under its name

    def _masked_fuses(self) -> bool:
        """Whether a call runs the fused kernels on ``weight``."""
        return False

    def register_parameter(self, name: str, param: Parameter | None) -> None:
        """``module.weight = Parameter(...)`` ends here, and goes beneath the mask."""
        mask = vars(self).get("_buffers", {}).get(mask_name(name)) if name in self._masked_names else None
        if mask is not None:
            if param is None or param.shape != mask.shape:
                got = None if param is None else f"one of shape {tuple(param.shape)}"
                raise ValueError(
                    f"'{name}' is masked: a Parameter of its mask's shape {tuple(mask.shape)} expected, got {got}"
                )
            name = orig_name(name)
        super().register_parameter(name, param)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        buffers = [self._buffers.get(mask_name(name)) for name in self._masked_names]
        super()._apply(fn, recurse)
        for name, before in zip(self._masked_names, buffers, strict=True):
            after = self._buffers.get(mask_name(name))
            # A mask without values that gets memory (to_empty, skip_init) starts as ones rather than as noise.
            if before is not None and before.is_meta and after is not None and not after.is_meta:
                after.fill_(1)
        return self


_stand_ins: dict[type[nn.Module], tuple[type[Masked], tuple[str, ...]]] = {}


def stands_in_for(torch_class: type[nn.Module], *names: str) -> Callable[[_M], _M]:
    """Class decorator: the decorated class is a base where the parameters ``names`` of a ``torch_class`` are masked."""

    def decorate(cls: _M) -> _M:
        _stand_ins[torch_class] = (_made_stand_in(cls, torch_class, names), names)
        return cls

    return decorate


def _made_stand_in(cls: _M, dense: type[nn.Module], names: tuple[str, ...]) -> _M:
    cls._masked_dense = dense
    cls._masked_names = names
    for key, value in _overrides(dense, names).items():
        setattr(cls, key, value)
    return cls


_named: dict[tuple[str, str], tuple[type[Masked], tuple[str, ...]]] = {}


def stands_in_for_named(module: str, name: str, *names: str) -> Callable[[_M], _M]:
    """The same for a class of another library, which is not imported: the stand-in is made when it is met."""

    def decorate(cls: _M) -> _M:
        _named[module, name] = (cls, names)
        return cls

    return decorate


def stands_in_as(dense: type[nn.Module], base: type[Masked]) -> bool:
    """Whether the named class ``dense``, or one that it derives from, has ``base`` in its stand-in."""
    return any(found is base for _, (found, _) in named_among(dense, _named))


def _meet(dense: type[nn.Module]) -> None:
    """Make the stand-ins of the named classes that ``dense`` is or derives from."""
    for cls, (base, names) in named_among(dense, _named):
        if cls not in _stand_ins:
            namespace = {"__module__": cls.__module__, "_masked_on_demand": True}
            made = new_class(f"Masked{cls.__name__}", (base, cls), namespace)
            # Threads that made one each agree on the first.
            _stand_ins.setdefault(cls, (_made_stand_in(made, cls, names), names))


def named_among(dense: type[nn.Module], named: dict[tuple[str, str], _T]) -> Iterator[tuple[type[nn.Module], _T]]:
    """The classes that ``dense`` is or derives from whose module and name are in ``named``, and what is said there."""
    for cls in dense.__mro__:
        if (found := named.get((cls.__module__, cls.__qualname__))) is not None:
            yield cls, found


def new_class(name: str, bases: tuple[type[nn.Module], ...], namespace: dict[str, Any]) -> Any:
    return types.new_class(name, bases, {}, lambda space: space.update(namespace))


def masked_class(dense: type[nn.Module], names: tuple[str, ...]) -> type[Masked]:
    """The class of a ``dense`` module whose parameters ``names`` are masked; the same one for the same arguments."""
    _meet(dense)
    base: type[Masked] = Masked
    for torch_class, (stand_in, needed) in list(_stand_ins.items()):
        if issubclass(dense, torch_class) and set(needed) <= set(names):
            base = stand_in
            if dense is torch_class and names == needed and not stand_in._masked_on_demand:
                return stand_in
    if issubclass(base, dense):
        bases: tuple[type[nn.Module], ...] = (base,)
    elif issubclass(dense, base):
        bases = (dense,)
    else:
        bases = (dense, base)

    # The cache is Python's own list of subclasses. It is weak: a class dies with its last module, and keeps no user
    # class alive. It is in the order of definition: threads that raced to make a class agree on the first.
    def existing() -> Any:
        for cls in type.__subclasses__(bases[0]):
            if vars(cls).get("_made_by") == (masked_class, dense, names):
                return cls
        return None

    if (found := existing()) is not None:
        return found
    inherited = getattr(dense, "_masked_names", ())
    namespace = {
        **_overrides(dense, tuple(name for name in names if name not in inherited)),
        "__module__": dense.__module__,  # torch.fx and Dynamo tell torch's own modules from others by it
        "__doc__": f"{dense.__name__} with masked {', '.join(names)}.",
        "__reduce_ex__": _reduce_ex,
        "_masked_dense": dense,
        "_masked_names": names,
        "_made_by": (masked_class, dense, names),
    }
    made: type[Masked] = new_class(f"Masked{dense.__name__}", bases, namespace)
    return existing() or made


def _overrides(dense: type[nn.Module], names: tuple[str, ...]) -> dict[str, Any]:
    """What a masked class puts before all that ``dense`` has."""
    namespace: dict[str, Any] = {name: _masked_property(name) for name in names}

    def extra_repr(self: nn.Module) -> str:
        parts = [_dense_view(self, _originals(self, names), dense).extra_repr()]
        for name in names:
            mask = getattr(self, mask_name(name), None)
            label = "sparsity" if name == "weight" else f"{name}_sparsity"
            with contextlib.suppress(RuntimeError):  # a mask without values: meta, fake, batched by vmap
                parts += [] if mask is None else [f"{label}={sparsity(mask):.4g}"]
        return ", ".join(part for part in parts if part)

    namespace["extra_repr"] = extra_repr
    for method in ("reset_parameters", "_reset_parameters"):
        if callable(getattr(dense, method, None)):
            namespace[method] = _on_originals(dense, names, method)
    return namespace


def _originals(module: nn.Module, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(module, orig_name(name)) for name in names if hasattr(module, mask_name(name))}


def _on_originals(dense: type[nn.Module], names: tuple[str, ...], method: str) -> Callable[[nn.Module], None]:
    """``dense.method``, which initializes ``self.weight``, for a module whose ``weight`` is a temporary."""

    def reset(self: nn.Module) -> None:
        originals = _originals(self, names)
        if not originals:
            getattr(dense, method)(self)
            return
        view = _dense_view(self, originals, dense)
        getattr(view, method)()
        # The method may have replaced a parameter or set an attribute, rather than filled in place.
        for name, param in view._parameters.items():
            if name not in originals:
                self._parameters[name] = param
            elif param is not originals[name]:
                self._parameters[orig_name(name)] = param
        kept = ("_parameters", "_flat_weights")
        vars(self).update({key: value for key, value in vars(view).items() if key not in kept})

    reset.__name__ = method
    reset.__doc__ = getattr(dense, method).__doc__
    return reset


def _dense_view(module: nn.Module, values: dict[str, Tensor], dense: type[nn.Module]) -> Any:
    """A throw-away module of the class ``dense`` over the state of ``module``, with ``values`` as parameters."""
    view: Any = object.__new__(dense)
    vars(view).update(vars(module))
    hidden = {orig_name(name) for name in values}
    view._parameters = {name: param for name, param in module._parameters.items() if name not in hidden} | values
    if isinstance(view, nn.RNNBase):
        view._flat_weights = [getattr(view, name, None) for name in view._flat_weights_names]
    return view


def _reduce_ex(self: Any, protocol: Any) -> Any:
    """Pickle as the dense class does, with a constructor that swaps the class: a class made here cannot be imported."""
    cls = type(self)
    made: Any = next(klass for klass in cls.__mro__ if "_made_by" in vars(klass))
    dense: Any = made
    steps: list[tuple[Any, ...]] = []  # from the class that can be imported to this one: a packed one may be masked too
    while "_made_by" in vars(dense):
        maker, dense, *arguments = vars(dense)["_made_by"]
        steps.insert(0, (maker, *arguments))
    reduced = dense.__reduce_ex__(self, protocol)
    if cls is not made or not isinstance(reduced, tuple):
        return reduced  # somebody else's class on top: theirs to deal with
    constructor, arguments, *state = reduced
    constructor, *arguments = (dense if item is cls else item for item in (constructor, *arguments))
    return (_rebuild, (dense, tuple(steps), constructor, *arguments), *state)


def _rebuild(dense: type[nn.Module], steps: Any, constructor: Callable[..., Any], *arguments: Any) -> Any:
    """The constructor of a pickled module, whose state comes after it."""
    module = constructor(*arguments)
    if type(module) is dense:
        for maker, *rest in steps:
            module.__class__ = maker(type(module), *rest)
    return module


# --- torch modules that read their parameters more than once a forward -----------------------------------------------


class _DenseForward(Masked):
    """Runs torch's own forward on a throw-away dense module with the masked values, so that each is computed once."""

    _masked_torch: ClassVar[type[nn.Module]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, Masked):
            return as_it_is_now(self, *args, **kwargs)
        view = object.__new__(self._masked_dense)
        vars(view).update(vars(self))
        vars(view).update(self._masked_attributes())
        return self._masked_torch.forward(view, *args, **kwargs)

    def _masked_attributes(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._masked_names if hasattr(self, mask_name(name))}


@stands_in_for(nn.MultiheadAttention)
class _MultiheadAttention(_DenseForward, nn.MultiheadAttention):
    _masked_torch = nn.MultiheadAttention


class MaskedRNNBase(_DenseForward):
    """Keeps ``_flat_weights``, the list from which torch's recurrent modules read their parameters, live."""

    _flat_weights_names: list[str]

    def _masked_attributes(self) -> dict[str, Any]:
        weights = {name: getattr(self, name, None) for name in self._flat_weights_names}
        flat = list(weights.values())
        refs = [None if weight is None else weakref.ref(weight) for weight in flat]
        return {**weights, "_flat_weights": flat, "_flat_weight_refs": refs}

    # RNNBase's read and write the list, of a replica before that has its parameters.
    __setattr__ = nn.Module.__setattr__
    _replicate_for_data_parallel = nn.Module._replicate_for_data_parallel

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, value: object) -> None:
        """Torch renews the list wherever it may have changed; it is never out of date here."""


@stands_in_for(nn.RNN)
class _RNN(MaskedRNNBase, nn.RNN):
    _masked_torch = nn.RNN


@stands_in_for(nn.LSTM)
class _LSTM(MaskedRNNBase, nn.LSTM):
    _masked_torch = nn.LSTM


@stands_in_for(nn.GRU)
class _GRU(MaskedRNNBase, nn.GRU):
    _masked_torch = nn.GRU
