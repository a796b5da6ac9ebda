"""``torch.nn.utils.prune``, name for name, on layers that mask inside their kernels.

Replace ``from torch.nn.utils import prune`` by ``from masked_ops import prune``, or call :func:`install` before
whatever imports torch's module. Masks are those of torch for the same seed, and so are ``weight_orig``,
``weight_mask``, the keys of the state_dict and the types of errors. What differs:

* ``module.weight`` is never stale, and a pruned model can be copied and pickled at any time. A further round judges the
  weights as they are; torch judges them as they were in the last forward, before the optimizer's last step.
* A call that fails, or is interrupted, leaves the model as it was.
* Every function takes a module and a name, or a list of ``(module, name)`` pairs.
* :func:`remove`, :func:`restore` and :func:`undo` without a name act on everything below a module.
* New: :func:`restore`, :func:`undo`, :func:`unprune`, :func:`to_sparse`, :func:`load_state_dict`, :func:`install`.
* A layer that :func:`masked_ops.pack` packed counts as pruned: pruning it once more makes it a masked one first.

Pruning changes the class of a module to a subclass of what it was, until the last mask is gone. Code that asks for
``type(m) is nn.Linear``, as ``torch.ao.quantization.quantize_dynamic`` does, therefore wants :func:`remove` first.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.utils import parameters_to_vector
from torch.nn.utils import prune as torch_prune

from . import nn
from ._packing import keep_ties
from ._pairs import M, Pairs, TensorOrDict, as_pairs, over_pairs
from ._prune_extras import load_state_dict, restore, to_sparse, undo, unprune
from ._pruning_methods import (
    BasePruningMethod,
    CustomFromMask,
    Identity,
    L1Unstructured,
    LnStructured,
    PruningContainer,
    RandomStructured,
    RandomUnstructured,
    adopt,
    check_prunable,
    compute_norm,
    for_compute_mask,
    mask_of,
    pruned_parameters,
    remove_below,
    remove_one,
    require_pruned,
    require_values,
)

__all__ = [
    "BasePruningMethod",
    "CustomFromMask",
    "Identity",
    "L1Unstructured",
    "LnStructured",
    "PruningContainer",
    "RandomStructured",
    "RandomUnstructured",
    "custom_from_mask",
    "global_unstructured",
    "identity",
    "install",
    "is_pruned",
    "l1_unstructured",
    "ln_structured",
    "load_state_dict",
    "random_structured",
    "random_unstructured",
    "remove",
    "restore",
    "to_sparse",
    "undo",
    "uninstall",
    "unprune",
]

# Pickles name a class by its module: this one is public and stays where it is.
for _method in (
    BasePruningMethod,
    CustomFromMask,
    Identity,
    L1Unstructured,
    LnStructured,
    PruningContainer,
    RandomStructured,
    RandomUnstructured,
):
    _method.__module__ = __name__


# Private in torch as well, and imported by others all the same.
_compute_norm = compute_norm
_compute_nparams_toprune = torch_prune._compute_nparams_toprune
_validate_pruning_amount = torch_prune._validate_pruning_amount
_validate_pruning_amount_init = torch_prune._validate_pruning_amount_init
_validate_pruning_dim = torch_prune._validate_pruning_dim
_validate_structured_pruning = torch_prune._validate_structured_pruning


# --- as torch's ------------------------------------------------------------------------------------------------------


@overload
def identity(module: M, name: str) -> M: ...
@overload
def identity(module: Pairs) -> list[Module]: ...
@over_pairs
def identity(module: Module, name: str) -> Module:
    """Attach a mask of ones to ``module.<name>``; as ``torch.nn.utils.prune.identity``.

    Returns:
        ``module``; for a list of (module, name) pairs, its modules.

    Raises:
        AttributeError: if there is no attribute ``name``.
        TypeError: if it is not a parameter, None included.

    Example:
        >>> layer = prune.identity(torch.nn.Linear(3, 2), "bias")
        >>> layer.bias_mask
        tensor([1., 1.])
    """
    Identity.apply(module, name)
    return module


@overload
def random_unstructured(module: M, name: str, amount: float) -> M: ...
@overload
def random_unstructured(module: Pairs, *, amount: float) -> list[Module]: ...
@over_pairs
def random_unstructured(module: Module, name: str, amount: float) -> Module:
    """Prune entries of ``module.<name>`` at random; as ``torch.nn.utils.prune.random_unstructured``.

    Args:
        module: the module, or a list of (module, name) pairs, to each of which ``amount`` applies.
        name: the parameter.
        amount: an integer counts entries; another real number is the fraction, in [0, 1], of those not pruned yet.

    Returns:
        ``module``; for a list, its modules.

    Raises:
        TypeError: if ``amount`` is not a real number.
        ValueError: if it is out of range.

    Example:
        >>> layer = prune.random_unstructured(torch.nn.Linear(3, 2), "weight", amount=2)
        >>> int(layer.weight_mask.sum())
        4
    """
    RandomUnstructured.apply(module, name, amount)
    return module


@overload
def l1_unstructured(module: M, name: str, amount: float, importance_scores: Tensor | None = None) -> M: ...
@overload
def l1_unstructured(module: Pairs, *, amount: float, importance_scores: TensorOrDict | None = None) -> list[Module]: ...
@over_pairs
def l1_unstructured(module: Module, name: str, amount: float, importance_scores: Tensor | None = None) -> Module:
    """Prune the entries of ``module.<name>`` of least magnitude; as ``torch.nn.utils.prune.l1_unstructured``.

    Args:
        module: the module, or a list of (module, name) pairs, to each of which ``amount`` applies.
        name: the parameter.
        amount: an integer counts entries; another real number is the fraction, in [0, 1], of those not pruned yet.
        importance_scores: what to judge by in the parameter's place, of its shape; for a list, a dict with a tensor for
            each (module, name), where a pair that is absent is judged by its parameter.

    Returns:
        ``module``; for a list, its modules.

    Raises:
        TypeError: if ``amount`` is not a real number.
        ValueError: if it is out of range.
        AssertionError: if ``importance_scores`` has another shape.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Linear(5, 2))
        >>> modules = prune.l1_unstructured([(model[0], "weight"), (model[1], "weight")], amount=0.5)
        >>> [int(m.weight_mask.sum()) for m in modules]
        [10, 5]
    """
    L1Unstructured.apply(module, name, amount=amount, importance_scores=importance_scores)
    return module


@overload
def random_structured(module: M, name: str, amount: float, dim: int) -> M: ...
@overload
def random_structured(module: Pairs, *, amount: float, dim: int) -> list[Module]: ...
@over_pairs
def random_structured(module: Module, name: str, amount: float, dim: int) -> Module:
    """Prune channels of ``module.<name>`` along ``dim`` at random; as ``torch.nn.utils.prune.random_structured``.

    Args:
        module: the module, or a list of (module, name) pairs, to each of which ``amount`` applies.
        name: the parameter, of two dimensions at least.
        amount: an integer counts channels; another real number is the fraction, in [0, 1], of those not pruned yet.
        dim: the dimension along which channels lie.

    Returns:
        ``module``; for a list, its modules.

    Raises:
        TypeError: if ``amount`` is not a real number.
        ValueError: if it is out of range, or the parameter has fewer than two dimensions.
        IndexError: if the parameter has no dimension ``dim``.

    Example:
        >>> layer = prune.random_structured(torch.nn.Conv2d(3, 4, 2), "weight", amount=1, dim=0)
        >>> int((layer.weight_mask.sum((1, 2, 3)) == 0).sum())
        1
    """
    RandomStructured.apply(module, name, amount, dim)
    return module


@overload
def ln_structured(
    module: M, name: str, amount: float, n: float | str, dim: int, importance_scores: Tensor | None = None
) -> M: ...
@overload
def ln_structured(
    module: Pairs, *, amount: float, n: float | str, dim: int, importance_scores: TensorOrDict | None = None
) -> list[Module]: ...
@over_pairs
def ln_structured(
    module: Module,
    name: str,
    amount: float,
    n: float | str,
    dim: int,
    importance_scores: Tensor | None = None,
) -> Module:
    """Prune the channels of ``module.<name>`` along ``dim`` of least norm; as ``torch.nn.utils.prune.ln_structured``.

    Args:
        module: the module, or a list of (module, name) pairs, to each of which ``amount`` applies.
        name: the parameter, of two dimensions at least.
        amount: an integer counts channels; another real number is the fraction, in [0, 1], of those not pruned yet.
        n: the order of the norm: a number, ``inf``, ``-inf``, ``'fro'`` or ``'nuc'``.
        dim: the dimension along which channels lie.
        importance_scores: what to judge by in the parameter's place, of its shape; for a list, a dict with a tensor for
            each (module, name).

    Returns:
        ``module``; for a list, its modules.

    Raises:
        TypeError: if ``amount`` is not a real number.
        ValueError: if it is out of range, or the parameter has fewer than two dimensions.
        IndexError: if the parameter has no dimension ``dim``.
        AssertionError: if ``importance_scores`` has another shape.

    Example:
        >>> layer = prune.ln_structured(torch.nn.Conv2d(3, 4, 2), "weight", amount=0.5, n=2, dim=0)
        >>> int((layer.weight_mask.sum((1, 2, 3)) == 0).sum())
        2
    """
    LnStructured.apply(module, name, amount, n, dim, importance_scores=importance_scores)
    return module


@overload
def custom_from_mask(module: M, name: str, mask: Tensor) -> M: ...
@overload
def custom_from_mask(module: Pairs, *, mask: TensorOrDict) -> list[Module]: ...
@over_pairs
def custom_from_mask(module: Module, name: str, mask: Tensor) -> Module:
    """Prune ``module.<name>`` by a mask; as ``torch.nn.utils.prune.custom_from_mask``.

    Args:
        module: the module, or a list of (module, name) pairs.
        name: the parameter.
        mask: of the parameter's shape and any dtype, multiplied with the mask that is there. For a list, one for all or
            a dict with one for each (module, name).

    Returns:
        ``module``; for a list, its modules.

    Raises:
        AssertionError: if ``mask`` has another shape.

    Example:
        >>> layer = prune.custom_from_mask(torch.nn.Linear(5, 3), "bias", mask=torch.tensor([0, 1, 0]))
        >>> layer.bias_mask
        tensor([0., 1., 0.])
    """
    CustomFromMask.apply(module, name, mask)
    return module


def global_unstructured(
    parameters: Pairs,
    pruning_method: Callable[..., torch_prune.BasePruningMethod],
    importance_scores: dict[tuple[Module, str], Tensor] | None = None,
    **kwargs: Any,
) -> None:
    """Prune many parameters as if they were one long vector; as ``torch.nn.utils.prune.global_unstructured``.

    Args:
        parameters: iterable of (module, name) pairs.
        pruning_method: a class with ``PRUNING_TYPE = "unstructured"``.
        importance_scores: what to judge by in the place of a parameter, of its shape, for each (module, name) in it.
        kwargs: for ``pruning_method``, as ``amount``.

    Raises:
        TypeError: if ``parameters`` is not iterable, ``importance_scores`` not a dict, the method not unstructured, or
            the parameters lie on several devices.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(10, 4), torch.nn.Linear(4, 1))
        >>> prune.global_unstructured([(m, "weight") for m in model], prune.L1Unstructured, amount=10)
        >>> sum(int((m.weight_mask == 0).sum()) for m in model)
        10
    """
    if not isinstance(parameters, Iterable):
        raise TypeError(f"parameters must be an iterable of (module, name) pairs, got {type(parameters).__name__}")
    pairs = as_pairs(parameters)
    scores_of = {} if importance_scores is None else importance_scores
    if not isinstance(scores_of, dict):
        raise TypeError(f"importance_scores must be a dict, got {type(scores_of).__name__}")

    with nn.atomic([module for module, _ in pairs]), keep_ties(), torch.inference_mode(False):
        scores, masks = [], []
        for module, name in pairs:
            check_prunable(module, name)
            adopt(module, name)
            parameter = getattr(module, name).detach()
            score = scores_of.get((module, name), parameter)
            if not isinstance(score, Tensor):
                raise TypeError(f"importance_scores must hold a Tensor for {name}, got {type(score).__name__}")
            if score.numel() != parameter.numel():
                raise AssertionError(
                    f"importance_scores must have the shape of {name}, {list(parameter.shape)}, got {list(score.shape)}"
                )
            require_values(score, parameter, name)
            scores.append(for_compute_mask(score))
            masks.append(for_compute_mask(mask_of(module, name, parameter)))
        container = PruningContainer()
        container._tensor_name = "parameters"
        method = pruning_method(**kwargs)
        method._tensor_name = container._tensor_name
        if method.PRUNING_TYPE != "unstructured":  # type: ignore[attr-defined]
            raise TypeError(
                f'pruning_method must have PRUNING_TYPE "unstructured", got {pruning_method} of type '
                f"{method.PRUNING_TYPE!r}"  # type: ignore[attr-defined]
            )
        container.add_pruning_method(method)
        mask = container.compute_mask(parameters_to_vector(scores), parameters_to_vector(masks))
        parts = mask.split([part.numel() for part in masks])
        for (module, name), before, part in zip(pairs, masks, parts, strict=True):
            custom_from_mask(module, name, mask=part.view(before.shape))


@overload
def remove(module: M, name: str | None = None) -> M: ...
@overload
def remove(module: Pairs) -> list[Module]: ...
@over_pairs
def remove(module: Module, name: str | None = None) -> Module:
    """Make pruning permanent: ``module.<name>`` is a plain parameter again, with zeros where it was pruned.

    As ``torch.nn.utils.prune.remove``. The Parameter is the object it always was (a new one, if the module was packed)
    and the module has the class it had.
    Nothing holds pruned entries at zero any more: an optimizer with momentum moves them at its next step.

    Args:
        module: the module, or a list of (module, name) pairs.
        name: the parameter; None for all that is pruned in ``module`` and below.

    Returns:
        ``module``; for a list, its modules.

    Raises:
        ValueError: if that is not pruned.

    Example:
        >>> model = torch.nn.Sequential(prune.random_unstructured(torch.nn.Linear(4, 2), "weight", amount=0.5))
        >>> model = prune.remove(model)
        >>> type(model[0]) is torch.nn.Linear, int((model[0].weight == 0).sum())
        (True, 4)
    """
    if name is None:
        remove_below(module, None)
        return module
    require_pruned(module, name, "pruning can be removed; without a name, remove(module) acts on all modules below")
    with nn.atomic([module]):
        remove_one(module, name)
    return module


def is_pruned(module: Module) -> bool:
    """Whether anything in ``module`` or below is pruned, by us or by torch; as ``torch.nn.utils.prune.is_pruned``.

    Example:
        >>> layer = torch.nn.Linear(4, 2)
        >>> prune.is_pruned(layer), prune.is_pruned(prune.identity(layer, "weight"))
        (False, True)
    """
    return next(pruned_parameters(module), None) is not None


# --- in torch's place ------------------------------------------------------------------------------------------------

_PLACE = "torch.nn.utils.prune"


def install() -> None:
    """Put this module in the place of ``torch.nn.utils.prune``, for code that imports that one.

    Call it before such code is imported: what was imported from torch's module earlier stays torch's.

    Example:
        >>> prune.install()
        >>> import torch.nn.utils.prune as torch_prune
        >>> torch_prune is prune
        True
        >>> prune.uninstall()
    """
    sys.modules[_PLACE] = torch.nn.utils.prune = sys.modules[__name__]


def uninstall() -> None:
    """Take :func:`install` back.

    Example:
        >>> prune.uninstall()
        >>> torch.nn.utils.prune is prune
        False
    """
    sys.modules[_PLACE] = torch.nn.utils.prune = torch_prune
