"""The pruning methods: torch's classes, on modules that keep their masks by :mod:`masked_ops.nn`.

Each class derives from torch's class of the same name first, for its ``compute_mask`` and the signature of its
``apply``, and from :class:`BasePruningMethod` here, where those ``apply`` end. ``isinstance`` and ``issubclass``
against torch's classes therefore hold, for all who look for a method among ``module._forward_pre_hooks``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.utils import prune as torch_prune

from . import functional, nn
from ._mask_bits import MaskChange, PackedMask
from ._masking import _maskable as maskable
from ._masking import _refuse_sharded as refuse_sharded
from ._masking import require_module
from ._packed_class import is_packed
from ._packing import keep_ties, make_dense, unpack_weight
from .reference import is_float8

FROM_DENSE = "dense"  # what a method remembers, in place of a MaskChange, of a round before which there was no mask


def find_hook(module: Module, name: str) -> tuple[int, torch_prune.BasePruningMethod] | None:
    """The pruning method of ``module.<name>`` among the forward pre-hooks, ours or torch's, with its key.

    Raises:
        AssertionError: if there are several, which only a registration by hand can bring about.
    """
    found = [
        (key, hook)
        for key, hook in module._forward_pre_hooks.items()
        if isinstance(hook, torch_prune.BasePruningMethod) and getattr(hook, "_tensor_name", None) == name
    ]
    if len(found) > 1:
        raise AssertionError(
            f"{type(module).__name__} has {len(found)} pruning hooks for {name!r}; combine them in a PruningContainer"
        )
    return found[0] if found else None


def drop_hook(module: Module, name: str) -> None:
    """Take the pruning method of ``module.<name>`` out of the forward pre-hooks, if one is there."""
    found = find_hook(module, name)
    if found:
        del module._forward_pre_hooks[found[0]]
        module._forward_pre_hooks_with_kwargs.pop(found[0], None)


def replace_hook(module: Module, name: str, method: torch_prune.BasePruningMethod) -> None:
    """Make ``method`` the pruning method of ``module.<name>``, the last of the hooks as torch does."""
    drop_hook(module, name)
    module.register_forward_pre_hook(method)


def pruned_names(module: Module) -> tuple[str, ...]:
    """The pruned parameters of one module, a packed one and those that torch's own functions pruned included."""
    masked = nn.masked_names(module) + (("weight",) if is_packed(module) else ())
    hooked = (
        getattr(hook, "_tensor_name", None) or ""
        for hook in module._forward_pre_hooks.values()
        if isinstance(hook, torch_prune.BasePruningMethod)
    )
    # A hook without a mask is left over from method.remove(module).
    return masked + tuple(name for name in hooked if name not in masked and f"{name}_mask" in module._buffers)


def pruned_parameters(module: Module) -> Iterator[tuple[Module, str]]:
    """``(submodule, name)`` for every pruned parameter in ``module`` and below."""
    require_module(module)
    for submodule in module.modules():
        for name in pruned_names(submodule):
            yield submodule, name


def adopt(module: Module, name: str) -> None:
    """Make masked what is packed or was pruned by torch's own functions; ``module.<name>`` is then of now."""
    if name == "weight" and is_packed(module):
        unpack_weight(module)
        replace_hook(module, name, round_from_mask(name, getattr(module, f"{name}_mask")))
        return
    if name in nn.masked_names(module):
        refresh(module, name)
        return
    if name not in pruned_names(module):
        return
    found = find_hook(module, name)
    mask = module._buffers.pop(f"{name}_mask")
    assert found is not None and mask is not None
    delattr(module, name)
    module.register_parameter(name, module._parameters.pop(f"{name}_orig"))
    nn.attach(module, name, mask)
    # A container of ours, whose remove() and __call__ know masked modules.
    rounds = tuple(found[1]) if isinstance(found[1], torch_prune.PruningContainer) else (found[1],)
    rounds[0]._undo = FROM_DENSE
    replace_hook(module, name, PruningContainer(*rounds))


def refresh(module: Module, name: str) -> None:
    """Where a hook sets ``module.<name>`` before each forward, set it now: weight or mask may have changed."""
    if name in module.__dict__:
        setattr(module, name, _masked(module, name))


def current_value(module: Module, name: str) -> Any:
    """``module.<name>``, and where a hook sets it before each forward, what the hook would make of it now."""
    if name not in module.__dict__ or name not in pruned_names(module):
        return getattr(module, name)
    found = find_hook(module, name)
    if found:
        return found[1].apply_mask(module)
    return _masked(module, name)


def _masked(module: Module, name: str) -> Tensor:
    return functional.apply_mask(getattr(module, f"{name}_orig"), getattr(module, f"{name}_mask"))


def round_from_mask(name: str, mask: Tensor) -> CustomFromMask:
    """The method that stands for a mask which came from elsewhere, a checkpoint for instance."""
    method = CustomFromMask(mask)
    method._tensor_name = name
    method._undo = FROM_DENSE
    return method


def take_round(
    module: Module, name: str, method: torch_prune.BasePruningMethod, importance_scores: Tensor | None = None
) -> torch_prune.BasePruningMethod:
    """Prune ``module.<name>`` once more by ``method``; returns the method that is now in charge, a container from the
    second round on. A failure of any kind, an interrupt included, leaves the module as it was.
    """
    check_prunable(module, name)
    # Masks are kept, and an inference tensor could neither be saved for backward nor changed in place later.
    with nn.atomic([module]), torch.inference_mode(False):
        adopt(module, name)
        method._tensor_name = name
        parameter = getattr(module, name)
        scores = parameter if importance_scores is None else importance_scores
        require_scores(scores, parameter, name)
        again = name in nn.masked_names(module)
        in_charge = (_next_round if again else _first_round)(module, name, method, parameter, for_compute_mask(scores))
        replace_hook(module, name, in_charge)
        refresh(module, name)
    return in_charge


def _first_round(
    module: Module, name: str, method: torch_prune.BasePruningMethod, parameter: Tensor, scores: Tensor
) -> torch_prune.BasePruningMethod:
    mask = method.compute_mask(scores, default_mask=for_compute_mask(mask_of(module, name, parameter)))
    nn.attach(module, name, _checked(mask, parameter))
    method._undo = FROM_DENSE  # type: ignore[attr-defined]
    return method


def _next_round(
    module: Module, name: str, method: torch_prune.BasePruningMethod, parameter: Tensor, scores: Tensor
) -> torch_prune.BasePruningMethod:
    found = find_hook(module, name)
    if found and isinstance(found[1], torch_prune.PruningContainer):
        container = found[1]
    else:
        container = PruningContainer(*found[1:] if found else ())
    container.add_pruning_method(method)
    before = getattr(module, f"{name}_mask").detach()
    default_mask = for_compute_mask(before.clone(memory_format=torch.contiguous_format))
    computed = _checked(container.compute_mask(scores, default_mask=default_mask), parameter)
    mask = torch.empty_like(parameter, dtype=computed.dtype, requires_grad=False).copy_(computed)
    # A new buffer, as torch's: who holds the old mask, a graph before its backward included, keeps its values.
    module.register_buffer(f"{name}_mask", mask)
    method._undo = None if mask.is_meta else MaskChange(before, mask)  # type: ignore[attr-defined]
    # A masked layer that nobody pruned has its first round now.
    return container if found else method


def require_pruned(module: Module, name: str, action: str) -> None:
    if name not in pruned_names(module):
        raise ValueError(f"parameter {name!r} of {type(module).__name__} must be pruned before {action}")


def require_scores(scores: Any, parameter: Tensor, name: str) -> None:
    if not isinstance(scores, Tensor):
        raise TypeError(f"importance_scores must be a Tensor, got {type(scores).__name__}")
    if scores.shape != parameter.shape:
        raise AssertionError(
            f"importance_scores must have the shape of {name}, {list(parameter.shape)}, got {list(scores.shape)}"
        )
    require_values(scores, parameter, name)


def require_values(scores: Tensor, parameter: Tensor, name: str) -> None:
    """Raise if a parameter that has values cannot be judged by ``scores``; torch then prunes nothing."""
    if scores.layout != torch.strided or (scores.is_meta and not parameter.is_meta):
        raise RuntimeError(
            f"importance_scores must be dense and have values, as {name} on {parameter.device} has, "
            f"got {scores.layout} on {scores.device}"
        )


def for_compute_mask(tensor: Tensor) -> Tensor:
    """Contiguous, for ``compute_mask`` may ``view(-1)``; float8, which torch neither sorts nor sums, as float32."""
    if tensor.is_inference():  # of a model that was built in inference mode: nothing differentiates through it
        tensor = tensor.detach()
    return (tensor.float() if is_float8(tensor.dtype) else tensor).contiguous()


def mask_of(module: Module, name: str, parameter: Tensor) -> Tensor:
    """The mask of ``module.<name>``; ones where it is not pruned."""
    if name in pruned_names(module):
        return getattr(module, f"{name}_mask").detach()
    return torch.ones(parameter.shape, dtype=parameter.dtype, device=parameter.device)


def check_prunable(module: Module, name: str) -> None:
    """Raise what tells the caller why ``module.<name>`` cannot be pruned, if it cannot."""
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, got {type(name).__name__}")
    if isinstance(module, Module) and name in pruned_names(module):
        refuse_sharded(module)
    else:
        maskable(module, name)


def _checked(mask: Any, parameter: Tensor) -> Tensor:
    """What ``compute_mask`` returned, expanded to the shape of the parameter."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"compute_mask must return a Tensor, got {type(mask).__name__}")
    if is_float8(parameter.dtype) and mask.dtype == torch.float32:  # for_compute_mask's
        mask = mask.to(parameter.dtype)
    try:
        return mask.detach().expand(parameter.shape)
    except RuntimeError:
        raise RuntimeError(
            f"compute_mask must return a mask of shape {list(parameter.shape)}, got {list(mask.shape)}"
        ) from None


class BasePruningMethod(torch_prune.BasePruningMethod):
    """Base class of pruning methods; as ``torch.nn.utils.prune.BasePruningMethod``.

    A subclass sets ``PRUNING_TYPE`` (``"unstructured"``, ``"structured"``, which needs an attribute ``dim``, or
    ``"global"``) and writes ``compute_mask(self, t, default_mask)``, which returns a mask of the shape of ``t``. Both
    arguments are given by keyword or in this order; ``default_mask`` is dense, contiguous and the method's to write to.
    A subclass that overrides ``apply_mask`` or ``__call__`` says itself what a masked weight is; its modules are pruned
    by torch's own mechanics, a Python hook before each forward.

    Example:
        >>> class Checkerboard(prune.BasePruningMethod):
        ...     PRUNING_TYPE = "unstructured"
        ...
        ...     def compute_mask(self, t, default_mask):
        ...         default_mask.view(-1)[::2] = 0
        ...         return default_mask
        >>> layer = torch.nn.Linear(3, 2)
        >>> method = Checkerboard.apply(layer, "weight")
        >>> layer.weight_mask
        tensor([[0., 1., 0.],
                [1., 0., 1.]])
    """

    _tensor_name: str | None = None  # type: ignore[assignment]
    _undo: MaskChange | str | None = None  # what the round did to the mask: a MaskChange, FROM_DENSE, or not known

    def __call__(self, module: Module, inputs: Any) -> None:
        """Nothing for a module that masks by itself; where torch pruned it, refresh ``module.<name>`` as torch does."""
        if self._tensor_name in module.__dict__ and self._tensor_name not in nn.masked_names(module):
            setattr(module, self._tensor_name, self.apply_mask(module))

    def apply_mask(self, module: Module) -> Tensor:
        """The masked parameter of ``module`` that this method prunes."""
        if self._tensor_name is None:
            raise AssertionError(f"{type(self).__name__} has not been applied to a module")
        return functional.apply_mask(
            getattr(module, f"{self._tensor_name}_orig"), getattr(module, f"{self._tensor_name}_mask")
        )

    @classmethod
    def apply(
        cls, module: Module, name: str, *args: Any, importance_scores: Tensor | None = None, **kwargs: Any
    ) -> torch_prune.BasePruningMethod:
        """Prune ``module.<name>`` by ``cls(*args, **kwargs)``; as torch's, but a failure leaves the module as it was.

        Returns:
            The method now among the module's forward pre-hooks; from the second round on, a PruningContainer.
        """
        overridden = (
            cls.apply_mask is not BasePruningMethod.apply_mask or cls.__call__ is not BasePruningMethod.__call__
        )
        # From the second round on a container masks, in torch too, and the override no longer counts.
        if overridden and name not in pruned_names(module):
            with nn.atomic([module]):
                return super().apply(module, name, *args, importance_scores=importance_scores, **kwargs)
        return take_round(module, name, cls(*args, **kwargs), importance_scores)

    def prune(self, t: Tensor, default_mask: Tensor | None = None, importance_scores: Tensor | None = None) -> Tensor:
        """``t`` masked by this method, no module involved.

        Args:
            t: the tensor to prune.
            default_mask: the mask of earlier rounds, of the shape of ``t``; ones if None.
            importance_scores: what to judge by in the place of ``t``; of its shape.

        Raises:
            AssertionError: if ``importance_scores`` has another shape.

        Example:
            >>> prune.L1Unstructured(amount=1).prune(torch.tensor([1.0, -3.0, 2.0]))
            tensor([ 0., -3.,  2.])
        """
        scores = t if importance_scores is None else importance_scores
        require_scores(scores, t, "t")
        if default_mask is None:
            default_mask = torch.ones(t.shape, dtype=t.dtype, device=t.device)
        mask = self.compute_mask(for_compute_mask(scores), default_mask=for_compute_mask(default_mask))
        return torch.where(mask == 0, 0, t * mask.to(t.dtype) if is_float8(t.dtype) else t * mask)

    def remove(self: Any = None, module: Any = None, name: str | None = None) -> None:
        """Make pruning permanent: the parameter is a plain one again, its pruned entries zero.

        ``method.remove(module)``, as torch's, does it for the parameter that the method prunes, and leaves the hook to
        its caller. Called on the class, ``CustomFromMask.remove(module, name="weight")`` does it for ``name`` (None:
        whatever is pruned) in ``module`` and every module below, whichever method pruned it, hooks included.

        Raises:
            ValueError: called on the class, if nothing of that name is pruned there; called on a method, if it prunes
                another parameter.
            AssertionError: called on a method that has not been applied.

        Example:
            >>> model = torch.nn.Sequential(prune.l1_unstructured(torch.nn.Linear(4, 2), "weight", amount=0.5))
            >>> prune.CustomFromMask.remove(model, name="weight")
            >>> prune.is_pruned(model)
            False
        """
        if isinstance(self, Module):  # called on the class: the arguments are one place further left
            if isinstance(module, str) and name is None:
                name = module
            remove_below(self, name)
        elif self is None:
            remove_below(module, name)
        elif not isinstance(self, torch_prune.BasePruningMethod):
            raise TypeError(f"module: torch.nn.Module expected, got {type(self).__name__}")
        elif self._tensor_name is None:
            raise AssertionError(f"{type(self).__name__} has not been applied to a module")
        elif name not in (None, self._tensor_name):
            raise ValueError(f"this {type(self).__name__} prunes {self._tensor_name!r}, got name={name!r}")
        elif self._tensor_name in nn.masked_names(module):
            with nn.atomic([module]):
                nn.detach(module, self._tensor_name)
        elif self._tensor_name == "weight" and is_packed(module):
            make_dense(module)
        else:
            with nn.atomic([module]):
                torch_prune.BasePruningMethod.remove(self, module)


def remove_below(module: Module, name: str | None) -> None:
    """Make pruning permanent for ``name`` (None: every name) in ``module`` and below."""
    pairs = [pair for pair in pruned_parameters(module) if name in (None, pair[1])]
    if not pairs:
        what = "nothing" if name is None else f"no {name!r}"
        raise ValueError(f"{what} in {type(module).__name__} is pruned, so there is no pruning to remove")
    with nn.atomic([submodule for submodule, _ in pairs]), keep_ties():
        for submodule, pruned_name in pairs:
            remove_one(submodule, pruned_name)


def remove_one(module: Module, name: str) -> None:
    """Make pruning of ``module.<name>`` permanent and drop its hook."""
    found = find_hook(module, name)
    if name == "weight" and is_packed(module):
        make_dense(module)
    elif found:
        found[1].remove(module)
    else:
        nn.detach(module, name)
    drop_hook(module, name)


class PruningContainer(torch_prune.PruningContainer, BasePruningMethod):
    """The methods of successive rounds on one parameter; as ``torch.nn.utils.prune.PruningContainer``.

    Example:
        >>> container = prune.PruningContainer()
        >>> container.add_pruning_method(prune.L1Unstructured(amount=2))
        >>> len(container)
        1
    """

    def __init__(self, *args: torch_prune.BasePruningMethod) -> None:
        self._pruning_methods = ()
        for method in args:
            self.add_pruning_method(method)

    def add_pruning_method(self, method: torch_prune.BasePruningMethod | None) -> None:
        """Append ``method``, which must prune the parameter that the container prunes.

        Raises:
            TypeError: if ``method`` is not a pruning method.
            ValueError: if it prunes a parameter of another name.
        """
        if self._tensor_name is None and isinstance(method, torch_prune.BasePruningMethod):
            self._tensor_name = getattr(method, "_tensor_name", None)
        super().add_pruning_method(method)


class Identity(torch_prune.Identity, BasePruningMethod):  # type: ignore[misc]
    """Prunes nothing, but attaches a mask; as ``torch.nn.utils.prune.Identity``."""


class RandomUnstructured(torch_prune.RandomUnstructured, BasePruningMethod):  # type: ignore[misc]
    """Prunes entries at random; as ``torch.nn.utils.prune.RandomUnstructured``."""


class L1Unstructured(torch_prune.L1Unstructured, BasePruningMethod):  # type: ignore[misc]
    """Prunes the entries of least magnitude; as ``torch.nn.utils.prune.L1Unstructured``."""


class RandomStructured(torch_prune.RandomStructured, BasePruningMethod):  # type: ignore[misc]
    """Prunes channels along ``dim`` at random; as ``torch.nn.utils.prune.RandomStructured``."""


class LnStructured(torch_prune.LnStructured, BasePruningMethod):  # type: ignore[misc]
    """Prunes the channels along ``dim`` of least ``n``-norm; as ``torch.nn.utils.prune.LnStructured``.

    ``n='fro'`` and ``n='nuc'`` work for tensors of every rank: the first is the 2-norm of all entries of a channel, the
    second the nuclear norm of the channel as a matrix, its first dimension against all others.
    """

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        torch_prune._validate_structured_pruning(t)
        torch_prune._validate_pruning_dim(t, self.dim)
        channels = t.shape[self.dim]
        pruned = torch_prune._compute_nparams_toprune(self.amount, channels)
        torch_prune._validate_pruning_amount(pruned, channels)
        if pruned == 0:
            return default_mask
        norm = compute_norm(t, self.n, self.dim)
        # The complement of "the least": ties are broken by which channels topk keeps.
        kept = norm.topk(channels - pruned, largest=True).indices
        mask = torch.zeros_like(t).index_fill_(self.dim, kept, 1)
        return mask.mul_(default_mask.to(mask.dtype))


class CustomFromMask(torch_prune.CustomFromMask, BasePruningMethod):  # type: ignore[misc]
    """Prunes by a given mask; as ``torch.nn.utils.prune.CustomFromMask``.

    The method keeps a copy of a binary mask in one bit an entry: rounds of global pruning, each of which leaves one of
    these at every layer, cost next to no memory.
    """

    @property
    def mask(self) -> Tensor:
        """A copy of the mask that was given, on the CPU."""
        return self._packed.unpack()

    @mask.setter
    def mask(self, mask: Tensor) -> None:
        if not isinstance(mask, Tensor):
            raise TypeError(f"mask must be a Tensor, got {type(mask).__name__}")
        self._packed = PackedMask(mask if mask.layout == torch.strided else mask.to_dense())

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        mask = self.mask
        if mask.shape != default_mask.shape:
            raise AssertionError(
                f"mask must have the shape of the parameter, {list(default_mask.shape)}, got {list(mask.shape)}"
            )
        if mask.is_meta and not default_mask.is_meta:
            raise RuntimeError(
                f"mask must have values, as the parameter on {default_mask.device} has, got a meta tensor"
            )
        return default_mask * mask.to(default_mask)


def compute_norm(t: Tensor, n: float | str, dim: int) -> Tensor:
    """The ``n``-norm of each channel of ``t`` along ``dim``; as torch's, and ``'fro'`` and ``'nuc'`` for every rank."""
    others = [d for d in range(t.dim()) if d != dim % t.dim()]
    if n == "fro" and len(others) != 2:
        return torch.linalg.vector_norm(t, 2, dim=others)
    if n == "nuc" and len(others) != 2:
        matrices = t.movedim(dim, 0)
        matrices = matrices.flatten(2) if len(others) > 2 else matrices.reshape(t.shape[dim], 1, -1)
        return torch.linalg.matrix_norm(matrices, "nuc")
    return torch_prune._compute_norm(t, n, dim)
