"""How a parameter of a live module becomes a masked one, and back: what ``nn`` and ``prune`` stand on.

``attach(module, "weight", mask)`` moves the Parameter to ``weight_orig``, registers the mask as the buffer
``weight_mask`` and swaps the class of the module for one on which ``weight`` is a live property (``_masked_class``).
Where a class cannot be swapped, a forward-pre-hook sets the attribute before each call, as torch's own pruning does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter, is_lazy
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod

from . import _ops, functional
from ._masked_class import Masked, MaskedRNNBase, is_sharded, mask_name, masked_class, orig_name


def masked_names(module: nn.Module) -> tuple[str, ...]:
    """The names of the masked parameters of ``module`` itself, in the order in which they were attached.

    Example:
        >>> masked_names(masked_ops.MaskedLinear(3, 2))
        ('weight',)
    """
    require_module(module)
    return (*_live_names(module), *_hooks(module))


def attach(module: nn.Module, name: str, mask: Tensor) -> None:
    """Mask the parameter ``name`` of ``module``, in place.

    The Parameter becomes ``<name>_orig`` (the same object) and a copy of ``mask`` the persistent buffer
    ``<name>_mask``; ``module.<name>`` is computed from both when it is read. A failed call leaves the module as it was.

    Args:
        module: any module but a ScriptModule; a lazy one only after its first call, a sharded one not any more.
        name: a floating-point or complex Parameter of ``module`` itself.
        mask: of the parameter's shape; any dtype, which the buffer keeps.

    Raises:
        AttributeError: if there is no ``name``.
        TypeError: if an argument is of a type that cannot be masked.
        ValueError: if the parameter is masked already, or shape or state do not permit it.

    Example:
        >>> module = torch.nn.Linear(3, 2)
        >>> attach(module, "bias", torch.tensor([1, 0]))
        >>> list(module.state_dict()), module.bias[1].item()
        (['weight', 'bias_orig', 'bias_mask'], 0.0)
    """
    param = _maskable(module, name)
    mask = _own(mask, param)
    _ops.load()  # from here on the module may be compiled: torch.compile needs the kernels
    with atomic([module]):
        live = name in getattr(type(module), "_masked_names", ()) or _swap(module, name)
        parameters = module._parameters
        parameters[orig_name(name)] = parameters.pop(name)
        module._buffers[mask_name(name)] = mask
        if isinstance(module, MaskedRNNBase):
            vars(module).pop("_flat_weights", None)  # a property now
        if not live:
            hook = _MaskHook(name)
            module.register_forward_pre_hook(hook)
            hook(module)


def detach(module: nn.Module, name: str, *, apply_mask: bool = True) -> None:
    """Undo :func:`attach`: the same Parameter object is ``<name>`` again, and the class the one that it was.

    Args:
        module: the module.
        name: the masked parameter.
        apply_mask: keep the zeros of the mask in the Parameter; otherwise the values beneath the mask are back.

    Raises:
        ValueError: if ``name`` is not masked, or was parametrized or sharded since.

    Example:
        >>> module = masked_ops.MaskedLinear(3, 2)
        >>> detach(module, "weight")
        >>> module
        Linear(in_features=3, out_features=2, bias=True)
    """
    _require_masked(module, name)
    _refuse_sharded(module)
    param, mask = module._parameters.get(orig_name(name)), module._buffers.get(mask_name(name))
    if param is None or mask is None:
        raise ValueError(
            f"'{name}' of {type(module).__name__} cannot be unmasked while something else computes "
            f"'{orig_name(name)}' or '{mask_name(name)}' (a parametrization, for one): remove that first"
        )
    with atomic([module]):
        if apply_mask:
            with torch.inference_mode(False), torch.no_grad():
                param.data = functional.apply_mask(param.detach(), mask)
        del module._parameters[orig_name(name)], module._buffers[mask_name(name)]
        module._non_persistent_buffers_set.discard(mask_name(name))
        hook = _hooks(module).get(name)
        if hook is not None:
            del module._forward_pre_hooks[hook]
            vars(module).pop(name, None)
        setattr(module, name, param)
        _swap_back(module)
        if isinstance(module, nn.RNNBase) and not isinstance(module, MaskedRNNBase):
            module._init_flat_weights()


def set_mask(module: nn.Module, name: str, mask: Tensor) -> None:
    """Replace the mask of a masked parameter.

    Its values go into the buffer in place if the dtype is the same, so that references to the buffer and its version
    counter stay right; otherwise the buffer is replaced.

    Args:
        module: the module.
        name: the masked parameter.
        mask: of the parameter's shape.

    Raises:
        TypeError: if ``mask`` is not a tensor.
        ValueError: if ``name`` is not masked or the shape differs.

    Example:
        >>> module = masked_ops.MaskedLinear(3, 2)
        >>> set_mask(module, "weight", torch.zeros(2, 3))
        >>> module.weight.count_nonzero().item()
        0
    """
    _require_masked(module, name)
    old = module._buffers.get(mask_name(name))
    if old is None:
        raise ValueError(f"'{mask_name(name)}' of {type(module).__name__} cannot be set: something else computes it")
    param = getattr(module, orig_name(name))
    new = _own(mask, param, like=old if is_sharded(param) else param)
    writable = torch.is_inference_mode_enabled() or not old.is_inference()
    if writable and (old.shape, old.dtype, old.device) == (new.shape, new.dtype, new.device):
        with torch.no_grad():
            old.copy_(new)
    else:
        module._buffers[mask_name(name)] = new


def path_of(module: nn.Module, name: str) -> str:
    """Which mechanism serves a masked parameter: ``"fused"``, ``"live"`` (the property alone) or ``"hook"``.

    A module with a ``forward`` of its own counts as live, although a ``super().forward(input)`` in it is fused.

    Example:
        >>> path_of(masked_ops.MaskedLinear(3, 2), "weight")
        'fused'
    """
    _require_masked(module, name)
    if name in _hooks(module):
        return "hook"
    return "fused" if name == "weight" and isinstance(module, Masked) and module._masked_fuses() else "live"


# --- the transaction -------------------------------------------------------------------------------------------------


def atomic(
    modules: Iterable[nn.Module], *others: Callable[[], Callable[[], None]]
) -> contextlib.AbstractContextManager[None]:
    """Whatever is raised within, KeyboardInterrupt included, the ``modules`` are afterwards what they were before.

    Covers, of each module itself (not of its children): class, attributes, parameters, buffers, hooks, the parameters'
    ``.data``, ``.grad`` and ``requires_grad``, the values of the masks, and the attributes of the pruning methods among
    the hooks. ``others`` take a snapshot each of something else, and return what brings it back.

    Example:
        >>> module = torch.nn.Linear(3, 2)
        >>> with contextlib.suppress(ValueError), atomic([module]):
        ...     attach(module, "weight", torch.zeros(2, 3))
        ...     attach(module, "bias", torch.zeros(3))  # not its shape
        >>> masked_names(module)
        ()
    """
    return _Atomic(modules, others)


class _Atomic:
    # Not a generator: one that is interrupted between the body and its last step would restore when it is collected.

    def __init__(self, modules: Iterable[nn.Module], others: tuple[Callable[[], Callable[[], None]], ...]) -> None:
        self._modules = {id(module): module for module in modules}.values()
        self._others = others

    def __enter__(self) -> None:
        self._undo = [*map(_snapshot, self._modules), *(take() for take in self._others)]

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        if kind is None:
            return
        try:
            self._restore()
        except KeyboardInterrupt:
            self._restore()  # to restore once more does no harm; half of it would
            raise

    def _restore(self) -> None:
        for restore in self._undo:
            restore()


def _snapshot(module: nn.Module) -> Callable[[], None]:
    cls, attributes = type(module), dict(vars(module))
    containers = [(value, value.copy()) for value in attributes.values() if isinstance(value, (dict, set, list))]
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, BasePruningMethod):
            containers.append((vars(hook), vars(hook).copy()))
    params = [
        (param, param.data, param.grad, param.requires_grad)
        for param in module._parameters.values()
        if param is not None and not is_lazy(param)
    ]
    buffers = [module._buffers.get(mask_name(name)) for name in masked_names(module)]
    masks = [(mask, mask.clone()) for mask in buffers if mask is not None]

    def restore() -> None:
        if type(module) is not cls:  # or a class that refuses the assignment would keep the rest from coming back
            module.__class__ = cls
        _refill(vars(module), attributes)
        for container, content in containers:
            _refill(container, content)
        for param, values, grad, requires_grad in params:
            if param.grad is not grad:
                param.grad = None  # lest one of another shape meet the values
            param.data = values
            param.grad = grad
            param.requires_grad_(requires_grad)
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


# --- checks ----------------------------------------------------------------------------------------------------------


def require_module(module: object) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: torch.nn.Module expected, got {type(module).__name__}")


def _require_masked(module: nn.Module, name: str) -> None:
    _refuse_packed(module, name)
    if name not in masked_names(module):
        masked = ", ".join(map(repr, masked_names(module))) or "nothing"
        raise ValueError(f"'{name}' of {type(module).__name__} is not masked; {masked} is")


def _refuse_packed(module: nn.Module, name: str) -> None:
    if name == "weight" and hasattr(type(module), "_packed_dense") and hasattr(module, "weight_bits"):
        raise ValueError(f"'{name}' of {type(module).__name__} is packed; masked_ops.unpack makes it a masked one")


def _refuse_sharded(module: nn.Module) -> None:
    params = (param for param in module._parameters.values() if param is not None)
    if getattr(module, "_is_fsdp_managed_module", False) or any(is_sharded(param) for param in params):
        raise ValueError(
            f"{type(module).__name__} is sharded: attach and remove masks before sharding (fully_shard), "
            "or in an unsharded model into which the full state_dict was loaded"
        )


# Or of which torch cannot compute with one: an exponent alone, and two to a byte.
_WITHOUT_ZERO = {getattr(torch, name, None) for name in ("float8_e8m0fnu", "float4_e2m1fn_x2")}


def _maskable(module: nn.Module, name: str) -> Parameter:
    """The Parameter ``name`` of ``module``, after every check that needs no mask."""
    require_module(module)
    kind = type(module).__name__
    if isinstance(module, torch.jit.ScriptModule):
        raise TypeError(
            f"module: {kind} is a ScriptModule, which cannot be masked; mask the module before scripting it"
        )
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) and hasattr(module, "_initialize_hook"):
        raise ValueError(f"module: {kind} is not initialized; call it once before masking it")
    _refuse_sharded(module)
    _refuse_packed(module, name)
    if name in masked_names(module):
        raise ValueError(f"'{name}' of {kind} is masked already; set_mask replaces its mask")
    if parametrize.is_parametrized(module, name):
        raise ValueError(
            f"'{name}' of {kind} is parametrized; mask the parameter 'original' of module.parametrizations.{name}"
        )
    param = getattr(module, name)
    if not isinstance(param, Parameter):
        # Such as those from which torch.nn.utils.weight_norm computes a weight.
        others = [repr(other) for other in module._parameters if other.startswith(f"{name}_")]
        hint = f"; mask what it may be computed from, {' or '.join(others)}" if others else ""
        raise TypeError(f"'{name}' of {kind} cannot be masked: a Parameter expected, got {type(param).__name__}{hint}")
    if name not in module._parameters:
        own = next((other for other, tensor in module._parameters.items() if tensor is param), None)
        where = f"its own name is '{own}'" if own else f"it belongs to another module that {kind} wraps"
        raise TypeError(f"'{name}' of {kind} cannot be masked: {where}")
    if not (param.is_floating_point() or param.is_complex()) or param.dtype in _WITHOUT_ZERO:
        raise TypeError(f"'{name}' of {kind} cannot be masked: a floating-point dtype expected, got {param.dtype}")
    for other in (orig_name(name), mask_name(name)):
        if hasattr(module, other):
            raise ValueError(f"'{name}' of {kind} cannot be masked: the module has an attribute '{other}' already")
    return param


def _own(mask: Tensor, param: Tensor, like: Tensor | None = None) -> Tensor:
    """A copy of ``mask``, in the memory format and on the device of ``like`` (by default, of ``param``)."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask: a tensor expected, got {type(mask).__name__}")
    if mask.shape != param.shape:
        raise ValueError(f"mask: the parameter's shape {tuple(param.shape)} expected, got {tuple(mask.shape)}")
    if param.is_meta != mask.is_meta:
        raise ValueError(
            f"mask: a meta tensor has no values; the parameter is on '{param.device}' and the mask on '{mask.device}'"
        )
    if mask.layout != torch.strided:
        raise ValueError(f"mask: a dense tensor expected, got {mask.layout}; its to_dense() makes it one")
    # An inference tensor could not be written to later.
    with torch.inference_mode(False), torch.no_grad():
        return torch.empty_like((param if like is None else like).detach(), dtype=mask.dtype).copy_(mask)


# --- the class of the module -----------------------------------------------------------------------------------------


def _live_names(module: nn.Module) -> tuple[str, ...]:
    names: tuple[str, ...] = getattr(type(module), "_masked_names", ())
    return tuple(name for name in names if hasattr(module, mask_name(name)))


def _swap(module: nn.Module, name: str) -> bool:
    """Give ``module`` the class on which ``name`` is a property; False if its class cannot be swapped."""
    cls = type(module)
    if parametrize.is_parametrized(module):
        return False  # remove_parametrizations will put the class that is below its own in place again
    dense: type[nn.Module] = vars(cls).get("_masked_dense", cls)
    names = (*getattr(cls, "_masked_names", ()), name)
    try:
        module.__class__ = masked_class(dense, names)
    except Exception:  # whatever a class raises that does not want to be subclassed
        return False
    return True


def _swap_back(module: nn.Module) -> None:
    """Drop the properties that are no longer needed, unless somebody else's class is on top of them."""
    dense: type[nn.Module] | None = vars(type(module)).get("_masked_dense")
    if dense is not None:
        left = _live_names(module)
        below = set(getattr(dense, "_masked_names", ()))
        module.__class__ = dense if set(left) <= below else masked_class(dense, left)


# --- torch's mechanics, where the class cannot be swapped -------------------------------------------------------------


class _MaskHook:
    """Forward-pre-hook that sets the masked parameter as an attribute; stale between calls, as torch's own."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, module: nn.Module, args: Any = ()) -> None:
        orig, mask = getattr(module, orig_name(self.name)), getattr(module, mask_name(self.name))
        setattr(module, self.name, functional.apply_mask(orig, mask))


def _hooks(module: nn.Module) -> dict[str, int]:
    """Parameter name -> id of the hook that masks it."""
    return {hook.name: key for key, hook in module._forward_pre_hooks.items() if isinstance(hook, _MaskHook)}
