"""How a parameter of a live module becomes a masked one, and back: the mechanism under ``nn`` and ``prune``.

``attach(module, "weight", mask)`` moves the Parameter to ``weight_orig``, registers the mask as the buffer ``weight_mask``
and swaps the class of the module for a subclass on which ``weight`` is a property: masked, differentiable and computed
when it is read. The subclass of a class ``X`` has the bases ``(X, stand-in)``. The stand-in of a torch class (such as
``MaskedLinear`` for ``nn.Linear``) subclasses that torch class alone, so that it comes right before it in the method
resolution order: a user's ``forward`` that ends in ``super().forward(input)`` ends in the fused one.

Where a class cannot be swapped, a forward-pre-hook sets the attribute before every call, as ``torch.nn.utils.prune`` does.
"""

from __future__ import annotations

import contextlib
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter, is_lazy
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod

from . import _ops, functional

_M = TypeVar("_M", bound="type[Masked]")


def _orig(name: str) -> str:
    return f"{name}_orig"


def _mask(name: str) -> str:
    return f"{name}_mask"


# --- the property ----------------------------------------------------------------------------------------------------


def _masked_property(name: str) -> Any:
    orig_name, mask_name = _orig(name), _mask(name)

    # Plain getattr, and the mask first: within a constructor nothing is masked yet, a parametrized weight_orig is a
    # property, and the replicas of DataParallel hold their parameters as attributes.
    def get(self: nn.Module) -> Tensor:
        mask = getattr(self, mask_name, None)
        if mask is None:
            return self.__dict__[name] if name in self.__dict__ else self.__getattr__(name)
        try:
            return _masked_value(getattr(self, orig_name), mask)
        except AttributeError as error:
            # Module.__getattr__ would replace it by "no attribute 'weight'".
            raise RuntimeError(f"{type(self).__name__}.{name} cannot be computed: {error}") from error

    def set_(self: nn.Module, value: object) -> None:
        if getattr(self, mask_name, None) is None:
            self.__dict__[name] = value
            return
        raise TypeError(
            f"cannot assign '{torch.typename(value)}' to the masked parameter '{name}': it is computed from "
            f"'{orig_name}' and '{mask_name}' (torch.nn.Parameter expected, which becomes '{orig_name}')"
        )

    def delete(self: nn.Module) -> None:
        if getattr(self, mask_name, None) is None:
            del self.__dict__[name]
            return
        raise AttributeError(f"cannot delete the masked parameter '{name}': remove its mask first")

    return property(get, set_, delete, f"``{orig_name}`` under ``{mask_name}``, computed when it is read.")


def _masked_value(orig: Tensor, mask: Tensor) -> Tensor:
    if _is_sharded(orig):
        return _masked_dtensor(orig, mask)
    return functional.apply_mask(orig, mask)


def _is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, without the import of torch.distributed."""
    return type(tensor) not in (Parameter, Tensor) and hasattr(tensor, "device_mesh")


def _masked_dtensor(orig: Any, mask: Tensor) -> Tensor:
    """A sharded parameter (FSDP2 outside forward) under a mask that every rank holds in full."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh, placements = orig.device_mesh, orig.placements
    # Replicate -> Shard takes the local part, without communication: one rank alone may read the weight.
    whole = DTensor.from_local(mask, mesh, [Replicate()] * mesh.ndim, run_check=False)
    local = functional.apply_mask(orig.to_local(), whole.redistribute(placements=placements).to_local())
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=orig.shape, stride=orig.stride())


# --- the classes -----------------------------------------------------------------------------------------------------


class Masked(nn.Module):
    """What every class with masked parameters derives from; it comes before ``nn.Module`` in their resolution order."""

    _masked_dense: ClassVar[type[nn.Module]] = nn.Module  # what the class becomes when its masks are gone
    _masked_names: ClassVar[tuple[str, ...]] = ()  # the parameters that have a property, in the order of attaching

    def _masked_fuses(self) -> bool:
        """Whether a call runs the fused kernels on ``weight``."""
        return False

    def register_parameter(self, name: str, param: Parameter | None) -> None:
        """``module.weight = Parameter(...)`` ends here, and goes beneath the mask."""
        mask = vars(self).get("_buffers", {}).get(_mask(name)) if name in type(self)._masked_names else None
        if mask is not None:
            if param is None or param.shape != mask.shape:
                got = None if param is None else f"one of shape {tuple(param.shape)}"
                raise ValueError(
                    f"'{name}' is masked: a Parameter of its mask's shape {tuple(mask.shape)} expected, got {got}"
                )
            name = _orig(name)
        super().register_parameter(name, param)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        masks = [_mask(name) for name in masked_names(self)]
        meta = [mask for mask in masks if (buffer := self._buffers.get(mask)) is not None and buffer.is_meta]
        super()._apply(fn, recurse)
        for mask in meta:
            # A mask without values that gets memory (to_empty, skip_init) starts as ones, rather than as noise.
            if (buffer := self._buffers[mask]) is not None and not buffer.is_meta:
                buffer.fill_(1)
        return self


class _DenseForward(Masked):
    """Base of stand-ins for torch modules that read their parameters often; each is masked once a forward."""

    _masked_torch: ClassVar[type[nn.Module]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        values = {name: getattr(self, name) for name in masked_names(self)}
        return self._masked_torch.forward(_dense_view(self, values, self._masked_dense), *args, **kwargs)


_stand_ins: dict[type[nn.Module], tuple[type[Masked], tuple[str, ...]]] = {}


def stands_in_for(torch_class: type[nn.Module], *names: str) -> Callable[[_M], _M]:
    """Class decorator: where the parameters ``names`` of a ``torch_class`` are masked, the decorated class is a base."""

    def decorate(cls: _M) -> _M:
        cls._masked_dense = torch_class
        cls._masked_names = names
        for key, value in _overrides(torch_class, names).items():
            setattr(cls, key, value)
        _stand_ins[torch_class] = (cls, names)
        return cls

    return decorate


def _overrides(dense: type[nn.Module], names: tuple[str, ...]) -> dict[str, Any]:
    """What a masked class puts before all that ``dense`` has."""
    namespace: dict[str, Any] = {name: _masked_property(name) for name in names}

    def extra_repr(self: Masked) -> str:
        parts = [_dense_view(self, _originals(self, names), dense).extra_repr()]
        for name in names:
            mask = getattr(self, _mask(name), None)
            if mask is not None and not mask.is_meta:
                label = "sparsity" if name == "weight" else f"{name}_sparsity"
                parts.append(f"{label}={sparsity(mask):.4g}")
        return ", ".join(part for part in parts if part)

    namespace["extra_repr"] = extra_repr
    for method in ("reset_parameters", "_reset_parameters"):
        if callable(getattr(dense, method, None)):
            namespace[method] = _on_orig(dense, names, method)
    return namespace


def _originals(module: nn.Module, names: tuple[str, ...]) -> dict[str, Tensor]:
    return {name: getattr(module, _orig(name)) for name in names if hasattr(module, _mask(name))}


def _on_orig(dense: type[nn.Module], names: tuple[str, ...], method: str) -> Callable[[Masked], None]:
    """``dense.method`` (it initializes ``self.weight``) for a module whose ``weight`` is a temporary."""

    def reset(self: Masked) -> None:
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
                self._parameters[_orig(name)] = param
        kept = ("_parameters", "_flat_weights", "_flat_weight_refs")
        vars(self).update({key: value for key, value in vars(view).items() if key not in kept})

    reset.__name__ = method
    reset.__doc__ = getattr(dense, method).__doc__
    return reset


def _dense_view(module: Masked, values: dict[str, Tensor], dense: type[nn.Module]) -> Any:
    """A throw-away module of the class ``dense`` over the state of ``module``, with ``values`` as parameters."""
    view: Any = object.__new__(dense)
    hidden = {_orig(name) for name in values}
    vars(view).update(vars(module))
    parameters = {name: param for name, param in module._parameters.items() if name not in hidden}
    view._parameters = {**parameters, **values}
    if isinstance(view, nn.RNNBase):
        flat = [getattr(view, name, None) for name in view._flat_weights_names]
        view._flat_weights = flat
        view._flat_weight_refs = [None if weight is None else weakref.ref(weight) for weight in flat]
    return view


def masked_class(dense: type[nn.Module], names: tuple[str, ...]) -> type[Masked]:
    """The class of a ``dense`` module whose parameters ``names`` are masked; one and the same for the same arguments."""
    base: type[Masked] = Masked
    for torch_class, (stand_in, needed) in _stand_ins.items():
        if issubclass(dense, torch_class) and set(needed) <= set(names):
            base = stand_in
            if dense is torch_class and names == needed:
                return stand_in
    if issubclass(base, dense):
        bases: tuple[type[nn.Module], ...] = (base,)
    elif issubclass(dense, base):
        bases = (dense,)
    else:
        bases = (dense, base)

    # The classes are found among the subclasses that Python lists, weakly: they die with their last module, and keep no
    # user class alive. The list is in the order of definition, so that threads that raced agree on the first.
    def existing() -> type[Masked] | None:
        for cls in type.__subclasses__(bases[0]):
            if vars(cls).get("_masked_key") == (dense, names):
                return cls
        return None

    if (found := existing()) is not None:
        return found
    inherited = getattr(dense, "_masked_names", ())
    namespace = _overrides(dense, tuple(name for name in names if name not in inherited))
    namespace |= {
        "__module__": __name__,
        "__doc__": f"{dense.__name__} with masked {', '.join(names)}.",
        "__reduce_ex__": _reduce_ex,
        "_masked_dense": dense,
        "_masked_names": names,
        "_masked_key": (dense, names),
    }
    made: Any = types.new_class(f"Masked{dense.__name__}", bases, {}, lambda space: space.update(namespace))
    return existing() or made


def _reduce_ex(self: Any, protocol: Any) -> Any:
    """Pickle as the dense class does, its constructor replaced by one that swaps the class: ours cannot be imported."""
    cls = type(self)
    dense = next(klass for klass in cls.__mro__ if "_masked_key" in vars(klass))._masked_dense
    reduced = dense.__reduce_ex__(self, protocol)
    if cls._masked_dense is not dense or "_masked_key" not in vars(cls) or not isinstance(reduced, tuple):
        return reduced
    constructor, arguments, *state = reduced
    constructor, *arguments = (dense if item is cls else item for item in (constructor, *arguments))
    return (_rebuild, (dense, cls._masked_names, constructor, *arguments), *state)


def _rebuild(dense: type[nn.Module], names: tuple[str, ...], constructor: Callable[..., Any], *arguments: Any) -> Any:
    """Importable constructor of pickled modules; what follows (their state) has the parameters and the masks."""
    module = constructor(*arguments)
    if type(module) is dense:
        module.__class__ = masked_class(dense, names)
    return module


def sparsity(mask: Tensor) -> float:
    """The fraction of zeros in ``mask``; 0 for an empty one."""
    return 1 - int(torch.count_nonzero(mask)) / mask.numel() if mask.numel() else 0.0


# --- torch's mechanics, where the class cannot be swapped ----------------------------------------------------------------


class _MaskHook:
    """Forward-pre-hook that sets the masked parameter as an attribute: stale between calls, as torch's own."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, module: nn.Module, args: Any = ()) -> None:
        orig, mask = getattr(module, _orig(self.name)), getattr(module, _mask(self.name))
        setattr(module, self.name, functional.apply_mask(orig, mask))


def _hooks(module: nn.Module) -> dict[str, int]:
    """Parameter name -> hook id of the parameters that a hook masks."""
    return {hook.name: key for key, hook in module._forward_pre_hooks.items() if isinstance(hook, _MaskHook)}


# --- the interface ---------------------------------------------------------------------------------------------------


def masked_names(module: nn.Module) -> tuple[str, ...]:
    """The names of the masked parameters of ``module`` itself, in the order in which they were attached."""
    names = [name for name in getattr(type(module), "_masked_names", ()) if hasattr(module, _mask(name))]
    return (*names, *_hooks(module))


def attach(module: nn.Module, name: str, mask: Tensor) -> None:
    """Mask the parameter ``name`` of ``module``, in place.

    The Parameter becomes ``<name>_orig`` (the same object), a copy of ``mask`` the persistent buffer ``<name>_mask``, and
    ``module.<name>`` is computed from both when it is read. On failure the module is what it was.

    Args:
        module: any module but a ScriptModule; lazy ones only after their first call, sharded ones never.
        name: a floating-point or complex Parameter of ``module`` itself.
        mask: of the parameter's shape; any dtype, which the buffer keeps.

    Raises:
        AttributeError: if there is no ``name``.
        TypeError: if an argument is of a type that cannot be masked.
        ValueError: if the parameter is masked already, or shape or state do not permit it.
    """
    param = _maskable(module, name)
    mask = _own(mask, param)
    _ops.load()
    with atomic([module]):
        live = name in getattr(type(module), "_masked_names", ()) or _swap(module, name)
        parameters = module._parameters
        parameters[_orig(name)] = parameters.pop(name)
        module._buffers[_mask(name)] = mask
        module._non_persistent_buffers_set.discard(_mask(name))
        if isinstance(module, _RNNBase):
            vars(module).pop("_flat_weights", None)
        if not live:
            hook = _MaskHook(name)
            module.register_forward_pre_hook(hook)
            hook(module)


def detach(module: nn.Module, name: str, *, apply_mask: bool = True) -> None:
    """Undo :func:`attach`: the same Parameter object is ``<name>`` again, and the class the one that it was.

    Args:
        module: the module.
        name: the masked parameter.
        apply_mask: keep zeros where the mask has them; otherwise the values beneath the mask come back.

    Raises:
        ValueError: if ``name`` is not masked, or parametrized or sharded since.
    """
    _require_masked(module, name)
    _refuse_sharded(module)
    param, mask = module._parameters.get(_orig(name)), module._buffers.get(_mask(name))
    if param is None or mask is None:
        raise ValueError(
            f"'{name}' of {type(module).__name__} cannot be unmasked while '{_orig(name)}' or '{_mask(name)}' is "
            "parametrized or replaced by another tensor: take that back first"
        )
    with atomic([module]):
        if apply_mask:
            with torch.inference_mode(False), torch.no_grad():
                param.data = functional.apply_mask(param.detach(), mask)
        del module._parameters[_orig(name)], module._buffers[_mask(name)]
        hook = _hooks(module).get(name)
        if hook is not None:
            del module._forward_pre_hooks[hook]
            vars(module).pop(name, None)
        setattr(module, name, param)
        _swap_back(module)
        if isinstance(module, nn.RNNBase) and not isinstance(module, Masked):
            module._init_flat_weights()


def set_mask(module: nn.Module, name: str, mask: Tensor) -> None:
    """Replace the mask of a masked parameter.

    Its values go into the buffer in place where the dtype is the same, so that references to it and its version counter
    stay right; a mask of another dtype replaces the buffer.

    Args:
        module: the module.
        name: the masked parameter.
        mask: of the parameter's shape.

    Raises:
        TypeError: if ``mask`` is not a tensor.
        ValueError: if ``name`` is not masked or the shape differs.
    """
    _require_masked(module, name)
    old = module._buffers.get(_mask(name))
    if old is None:
        raise ValueError(f"'{_mask(name)}' of {type(module).__name__} is no buffer (any more): it cannot be set")
    param = getattr(module, _orig(name))
    new = _own(mask, param, old if _is_sharded(param) else None)
    writable = torch.is_inference_mode_enabled() or not old.is_inference()
    if writable and (old.shape, old.dtype, old.device) == (new.shape, new.dtype, new.device):
        with torch.no_grad():
            old.copy_(new)
    else:
        module._buffers[_mask(name)] = new


def path_of(module: nn.Module, name: str) -> str:
    """Which mechanism serves a masked parameter: ``"fused"``, ``"live"`` (the property alone) or ``"hook"``.

    A module with a ``forward`` of its own counts as live, although a ``super().forward(input)`` in it is fused.
    """
    _require_masked(module, name)
    if name in _hooks(module):
        return "hook"
    return "fused" if name == "weight" and isinstance(module, Masked) and module._masked_fuses() else "live"


@contextlib.contextmanager
def atomic(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Whatever is raised within, KeyboardInterrupt included, ``modules`` are afterwards what they were before.

    Covers, of each module itself (not of its children): class, attributes, parameters, buffers, hooks, the parameters'
    ``.data``, the values of the masks, and the attributes of pruning methods among the hooks.
    """
    undo = [_snapshot(module) for module in {id(module): module for module in modules}.values()]
    try:
        yield
    except BaseException:
        while undo:
            # Restoring twice does no harm; a second Ctrl-C half way would.
            with contextlib.suppress(KeyboardInterrupt):
                undo[-1]()
                undo.pop()
        raise


def _snapshot(module: nn.Module) -> Callable[[], None]:
    cls = type(module)
    attributes = dict(vars(module))
    containers = [(value, value.copy()) for value in attributes.values() if isinstance(value, (dict, set, list))]
    methods = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, BasePruningMethod)]
    containers += [(vars(method), vars(method).copy()) for method in methods]
    data = [(param, param.data) for param in module._parameters.values() if param is not None and not is_lazy(param)]
    buffers = [module._buffers.get(_mask(name)) for name in masked_names(module)]
    masks = [(mask, mask.clone()) for mask in buffers if mask is not None]

    def restore() -> None:
        module.__class__ = cls
        _refill(vars(module), attributes)
        for container, content in containers:
            _refill(container, content)
        for param, values in data:
            param.data = values
        for mask, values in masks:
            if not mask.is_meta and not torch.equal(mask, values):
                mask.copy_(values)

    return restore


def _refill(container: Any, content: Any) -> None:
    if isinstance(container, list):
        container[:] = content
    else:
        container.clear()
        container.update(content)


# --- helpers of the interface ------------------------------------------------------------------------------------------


def _require_masked(module: nn.Module, name: str) -> None:
    if name not in masked_names(module):
        raise ValueError(f"'{name}' of {type(module).__name__} is not masked; masked are: {masked_names(module)}")


def _refuse_sharded(module: nn.Module) -> None:
    params = (param for param in module._parameters.values() if param is not None)
    if getattr(module, "_is_fsdp_managed_module", False) or any(_is_sharded(param) for param in params):
        raise ValueError(
            f"{type(module).__name__} is sharded: masks can be attached and removed before fully_shard only "
            "(load a full state_dict into an unsharded model to do it later)"
        )


def _maskable(module: nn.Module, name: str) -> Parameter:
    """The Parameter ``name`` of ``module``, after all checks that need no mask."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: torch.nn.Module expected, got {type(module).__name__}")
    kind = type(module).__name__
    if isinstance(module, torch.jit.ScriptModule):
        raise TypeError(f"module: a ScriptModule ({kind}) cannot be masked; mask the module before scripting it")
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) and hasattr(module, "_initialize_hook"):
        raise ValueError(f"module: {kind} is not initialized; call it once before masking it")
    _refuse_sharded(module)
    if name in masked_names(module):
        raise ValueError(f"'{name}' of {kind} is masked already; set_mask replaces its mask")
    if parametrize.is_parametrized(module, name):
        raise ValueError(
            f"'{name}' of {kind} is parametrized; mask the parameter 'original' of module.parametrizations.{name}"
        )
    param = getattr(module, name)
    if not isinstance(param, Parameter):
        raise TypeError(f"'{name}' of {kind} cannot be masked: a Parameter expected, got {type(param).__name__}")
    if name not in module._parameters:
        raise TypeError(f"'{name}' of {kind} cannot be masked: it belongs to another module that {kind} wraps")
    if not (param.is_floating_point() or param.is_complex()):
        raise TypeError(f"'{name}' of {kind} cannot be masked: a floating-point dtype expected, got {param.dtype}")
    for other in (_orig(name), _mask(name)):
        if hasattr(module, other):
            raise ValueError(f"'{name}' of {kind} cannot be masked: the module has an attribute '{other}' already")
    return param


def _own(mask: Tensor, param: Tensor, like: Tensor | None = None) -> Tensor:
    """A copy of ``mask`` that shares nothing with it, in the memory format and on the device of ``like``."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask: a tensor expected, got {type(mask).__name__}")
    if mask.shape != param.shape:
        raise ValueError(f"mask: the parameter's shape {tuple(param.shape)} expected, got {tuple(mask.shape)}")
    if param.is_meta != mask.is_meta:
        raise ValueError(
            f"mask: a meta tensor has no values; parameter on '{param.device}' and mask on '{mask.device}' do not match"
        )
    # An inference tensor could not be written to later.
    with torch.inference_mode(False), torch.no_grad():
        return torch.empty_like(param.detach() if like is None else like, dtype=mask.dtype).copy_(mask)


def _swap(module: nn.Module, name: str) -> bool:
    """Give ``module`` the class on which ``name`` is a property; False if its class cannot be swapped."""
    cls = type(module)
    if parametrize.is_parametrized(module):
        return False  # remove_parametrizations puts the class below its own in place again
    ours = "_masked_dense" in vars(cls)
    dense: type[nn.Module] = vars(cls)["_masked_dense"] if ours else cls
    names = (*getattr(cls, "_masked_names", ()), name)
    try:
        module.__class__ = masked_class(dense, names)
    except Exception:  # whatever a class raises that does not want to be subclassed
        return False
    return True


def _swap_back(module: nn.Module) -> None:
    """Drop the properties that are not needed any more, unless somebody else's class is on top."""
    cls = type(module)
    if "_masked_dense" not in vars(cls):
        return
    dense: type[nn.Module] = vars(cls)["_masked_dense"]
    left = tuple(name for name in cls._masked_names if hasattr(module, _mask(name)))  # type: ignore[attr-defined]
    module.__class__ = dense if set(left) <= set(getattr(dense, "_masked_names", ())) else masked_class(dense, left)


# --- stand-ins without a public name -------------------------------------------------------------------------------------


@stands_in_for(nn.MultiheadAttention)
class _MultiheadAttention(_DenseForward, nn.MultiheadAttention):
    _masked_torch = nn.MultiheadAttention


class _RNNBase(_DenseForward):
    """Keeps ``_flat_weights``, the list from which torch's RNNs read their parameters, live."""

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, value: object) -> None:
        """torch caches the list, wherever it may have changed."""

    def _init_flat_weights(self) -> None:
        """Not to be cached."""

    def _update_flat_weights(self) -> None:
        """Never out of date."""


@stands_in_for(nn.RNN)
class _RNN(_RNNBase, nn.RNN):
    _masked_torch = nn.RNN


@stands_in_for(nn.LSTM)
class _LSTM(_RNNBase, nn.LSTM):
    _masked_torch = nn.LSTM


@stands_in_for(nn.GRU)
class _GRU(_RNNBase, nn.GRU):
    _masked_torch = nn.GRU
