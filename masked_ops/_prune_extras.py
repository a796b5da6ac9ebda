"""What :mod:`masked_ops.prune` offers beyond ``torch.nn.utils.prune``: recovery, sparse tensors, checkpoints."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.parameter import is_lazy

from . import nn
from ._masking import require_module
from ._packed_class import is_packed
from ._packing import convert_checkpoint
from ._pairs import M, Pairs, as_pairs, over_pairs
from ._pruning_methods import (
    FROM_DENSE,
    BasePruningMethod,
    PruningContainer,
    adopt,
    current_value,
    drop_hook,
    find_hook,
    pruned_parameters,
    refresh,
    replace_hook,
    require_pruned,
    round_from_mask,
)


@overload
def restore(module: M, name: str | None = None) -> M: ...
@overload
def restore(module: Pairs) -> list[Module]: ...
@over_pairs
def restore(module: Module, name: str | None = None) -> Module:
    """Take pruning back: ``module.<name>`` is a plain parameter again, with the values that were beneath the mask.

    Args:
        module: the module, or a list of (module, name) pairs.
        name: the parameter; None for all that is pruned in ``module`` and below.

    Returns:
        ``module``; for a list, its modules.

    Raises:
        ValueError: if that is not pruned, or is packed: the values are gone.

    Example:
        >>> layer = torch.nn.Linear(4, 2)
        >>> before = layer.weight.clone()
        >>> layer = prune.restore(prune.l1_unstructured(layer, "weight", amount=0.5), "weight")
        >>> torch.equal(layer.weight, before)
        True
    """
    if name is not None:
        require_pruned(module, name, "it can be restored")
    pairs = list(pruned_parameters(module)) if name is None else [(module, name)]
    if not pairs:
        raise ValueError(f"nothing in {type(module).__name__} is pruned, so there is nothing to restore")
    with nn.atomic([submodule for submodule, _ in pairs]):
        for submodule, pruned_name in pairs:
            _refuse_packed(submodule, pruned_name, "restored")
            adopt(submodule, pruned_name)
            nn.detach(submodule, pruned_name, apply_mask=False)
            drop_hook(submodule, pruned_name)
    return module


@overload
def undo(module: M, name: str | None = None) -> M: ...
@overload
def undo(module: Pairs) -> list[Module]: ...
@over_pairs
def undo(module: Module, name: str | None = None) -> Module:
    """Take back the last round of pruning of ``module.<name>``; the first round's undo is :func:`restore`.

    Entries that the round pruned come back with the values that ``<name>_orig`` holds now.

    Args:
        module: the module, or a list of (module, name) pairs.
        name: the parameter; None for all that is pruned in ``module`` and below, each its own last round, as after a
            round of :func:`global_unstructured`.

    Returns:
        ``module``; for a list, its modules.

    Raises:
        ValueError: if that is not pruned, or packed, or the last round left no record: a mask given to a masked
            module's constructor is no round, and torch's own functions keep no record.

    Example:
        >>> layer = prune.l1_unstructured(torch.nn.Linear(4, 2), "weight", amount=2)
        >>> int(prune.l1_unstructured(layer, "weight", amount=3).weight_mask.sum())
        3
        >>> int(prune.undo(layer, "weight").weight_mask.sum())
        6
    """
    if name is not None:
        require_pruned(module, name, "a round can be undone")
    pairs = list(pruned_parameters(module)) if name is None else [(module, name)]
    if not pairs:
        raise ValueError(f"nothing in {type(module).__name__} is pruned, so there is no round to undo")
    with nn.atomic([submodule for submodule, _ in pairs]):
        for submodule, pruned_name in pairs:
            _undo_round(submodule, pruned_name)
    return module


def _undo_round(module: Module, name: str) -> None:
    _refuse_packed(module, name, "taken back to what it was before a round")
    adopt(module, name)
    found = find_hook(module, name)
    rounds = () if not found else tuple(found[1]) if isinstance(found[1], PruningContainer) else (found[1],)
    change = getattr(rounds[-1], "_undo", None) if rounds else None
    if change is None:
        raise ValueError(f"the last round of pruning of {name!r} of {type(module).__name__} left no record to undo")
    if change == FROM_DENSE:
        nn.detach(module, name, apply_mask=False)
        drop_hook(module, name)
        return
    nn.set_mask(module, name, change.revert(getattr(module, f"{name}_mask")))
    if len(rounds) == 1:
        drop_hook(module, name)
    elif len(rounds) == 2 and isinstance(rounds[0], BasePruningMethod):
        replace_hook(module, name, rounds[0])
    else:
        replace_hook(module, name, PruningContainer(*rounds[:-1]))
    refresh(module, name)


@overload
def unprune(module: M, name: str, where: Any) -> M: ...
@overload
def unprune(module: Pairs, *, where: Any) -> list[Module]: ...
@over_pairs
def unprune(module: Module, name: str, where: Any) -> Module:
    """Revive chosen entries of ``module.<name>``: where they were pruned their mask becomes 1.

    Args:
        module: the module, or a list of (module, name) pairs.
        name: the parameter.
        where: a bool tensor of the parameter's shape, or whatever indexes a tensor of that shape: an integer, a slice,
            integer tensors, a tuple of these. For a list, one for all or a dict with one for each (module, name).

    Returns:
        ``module``; for a list, its modules.

    Raises:
        ValueError: if the parameter is not pruned.
        TypeError: if ``where`` is None, or a dict without an entry for one of the pairs.
        IndexError: if ``where`` does not fit.

    Example:
        >>> layer = prune.custom_from_mask(torch.nn.Linear(3, 2), "weight", mask=torch.zeros(2, 3))
        >>> prune.unprune(layer, "weight", where=0).weight_mask
        tensor([[1., 1., 1.],
                [0., 0., 0.]])
    """
    require_pruned(module, name, "entries can be revived")
    if where is None:  # which would index everything
        raise TypeError("where must be an index or a bool tensor for each parameter, got None")
    with nn.atomic([module]):
        adopt(module, name)
        mask = getattr(module, f"{name}_mask")
        chosen = torch.zeros(mask.shape, dtype=torch.bool, device=mask.device)
        chosen[where] = True
        nn.set_mask(module, name, torch.where(chosen & (mask == 0), torch.ones_like(mask), mask))
        refresh(module, name)
    return module


def _refuse_packed(module: Module, name: str, action: str) -> None:
    if name == "weight" and is_packed(module):
        raise ValueError(
            f"parameter {name!r} of {type(module).__name__} is packed and cannot be {action}: the pruned values are "
            "gone. prune.remove makes it dense and masked_ops.unpack masked, with zeros in their place"
        )


_SPARSE = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)


@overload
def to_sparse(
    module: Module, name: str = "weight", layout: torch.layout = ..., blocksize: tuple[int, int] | None = None
) -> Tensor: ...
@overload
def to_sparse(
    module: Pairs, *, layout: torch.layout = ..., blocksize: tuple[int, int] | None = None
) -> list[Tensor]: ...
def to_sparse(
    module: Module | Pairs,
    name: str = "weight",
    layout: torch.layout = torch.sparse_csr,
    blocksize: tuple[int, int] | None = None,
) -> Tensor | list[Tensor]:
    """The pruned parameter as a sparse tensor; the module stays as it is.

    Args:
        module: any module, pruned or not (after :func:`remove` the zeros are in the parameter itself), or a list of
            (module, name) pairs.
        name: the parameter. More than two dimensions (convolutions) are flattened to ``[first, rest]``.
        layout: ``torch.sparse_coo``, ``sparse_csr``, ``sparse_csc``, ``sparse_bsr`` or ``sparse_bsc``.
        blocksize: rows and columns of a block, for the last two; they must divide the matrix.

    Returns:
        A detached sparse matrix on the parameter's device, of its dtype, with an entry for each value that is not zero
        (each block that is not all zero); for a list, a list of these.

    Raises:
        ValueError: if ``layout`` or ``blocksize`` does not fit, or the parameter has fewer than two dimensions.

    Example:
        >>> layer = prune.l1_unstructured(torch.nn.Conv2d(2, 4, 3), "weight", amount=0.75)
        >>> sparse = prune.to_sparse(layer)
        >>> sparse.layout, tuple(sparse.shape), sparse.values().numel()
        (torch.sparse_csr, (4, 18), 18)
    """
    if layout not in _SPARSE:
        raise ValueError(f"layout must be one of {', '.join(map(str, _SPARSE))}, got {layout}")
    if not isinstance(module, Module):
        return [to_sparse(*pair, layout, blocksize) for pair in as_pairs(module)]
    weight = current_value(module, name)
    if not isinstance(weight, Tensor):
        raise TypeError(f"{type(module).__name__}.{name} must be a Tensor, got {type(weight).__name__}")
    if weight.dim() < 2:
        raise ValueError(f"{name} must have two dimensions or more, got shape {list(weight.shape)}")
    matrix = weight.detach().flatten(1)
    if layout not in (torch.sparse_bsr, torch.sparse_bsc):
        if blocksize is not None:
            raise ValueError(f"blocksize is for torch.sparse_bsr and torch.sparse_bsc, got {blocksize} for {layout}")
        return matrix.to_sparse(layout=layout)
    sizes = tuple(blocksize) if isinstance(blocksize, Sequence) else ()
    fits = (isinstance(n, int) and n > 0 and m % n == 0 for m, n in zip(matrix.shape, sizes, strict=False))
    if len(sizes) != 2 or not all(fits):
        raise ValueError(f"blocksize must be two numbers that divide {list(matrix.shape)}, got {blocksize}")
    return matrix.to_sparse(layout=layout, blocksize=blocksize)


def load_state_dict(model: Module, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
    """Load a dense, a torch-pruned, a masked or a packed checkpoint into a model that is in any of these states.

    Where the checkpoint has a mask the model gets it, as by :func:`custom_from_mask` if it was not pruned there. Where
    the model is masked and the checkpoint is dense, the values go beneath the mask, which stays: this rewinds a pruned
    model to earlier weights. To load a dense checkpoint as it is, call :func:`restore` first. What is packed in the
    model stays packed; what is packed in the checkpoint only becomes masked.

    Args:
        model: any module.
        state_dict: what ``model.state_dict()`` returned once.
        strict: as for ``Module.load_state_dict``: raise if keys are missing or left over.
        assign: as for ``Module.load_state_dict``: take the checkpoint's tensors instead of copying them.

    Returns:
        The named tuple ``(missing_keys, unexpected_keys)`` of ``Module.load_state_dict``.

    Raises:
        RuntimeError: as ``Module.load_state_dict``; the model is then as it was, values included.

    Example:
        >>> pruned = prune.l1_unstructured(torch.nn.Linear(4, 2), "weight", amount=0.5)
        >>> layer = torch.nn.Linear(4, 2)
        >>> prune.load_state_dict(layer, pruned.state_dict())
        <All keys matched successfully>
        >>> torch.equal(layer.weight, pruned.weight)
        True
    """
    require_module(model)
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must be a mapping of names to tensors, got {type(state_dict).__name__}")
    state = OrderedDict(state_dict)
    # The versions that Module.load_state_dict reads. It also writes into them, whether to assign: what one call leaves
    # there makes the next one with the same checkpoint assign too.
    if (metadata := getattr(state_dict, "_metadata", None)) is not None:
        state._metadata = {  # type: ignore[attr-defined]
            prefix: {key: value for key, value in entry.items() if key != "assign_to_params_buffers"}
            for prefix, entry in metadata.items()
        }
    modules = list(model.modules())
    with _Loading(modules, in_place=not assign):
        for module, name in pruned_parameters(model):
            if not (name == "weight" and is_packed(module)):
                adopt(module, name)
        for prefix, module in model.named_modules(remove_duplicate=False):
            _fit(module, f"{prefix}." if prefix else "", state)
        before = _masks_of(modules)
        keys = model.load_state_dict(state, strict=strict, assign=assign)
        for (module, name), old_mask in before.items():
            mask = getattr(module, f"{name}_mask")
            same = mask.is_meta or (not old_mask.is_meta and torch.equal(mask, old_mask.to(mask.device)))
            if find_hook(module, name) and not same:
                # The rounds that led to another mask are not this one's history.
                replace_hook(module, name, round_from_mask(name, mask))
            refresh(module, name)
    return keys


def _masks_of(modules: list[Module]) -> dict[tuple[Module, str], Tensor]:
    """Copies of the masks."""
    return {(m, name): getattr(m, f"{name}_mask").clone() for m in modules for name in nn.masked_names(m)}


def _fit(module: Module, prefix: str, state: dict[str, Any]) -> None:
    """Mask what is dense in ``module`` and pruned in ``state``; rename what is the other way round."""
    if isinstance(module, torch.jit.ScriptModule):  # never masked
        return
    convert_checkpoint(module, prefix, state)
    for name in nn.masked_names(module):
        dense, orig, mask = (f"{prefix}{name}{suffix}" for suffix in ("", "_orig", "_mask"))
        current = getattr(module, f"{name}_mask")
        if dense in state and orig not in state and mask not in state:
            state[orig], state[mask] = state.pop(dense), current
        elif isinstance(state.get(mask), Tensor) and not torch.can_cast(state[mask].dtype, current.dtype):
            # A soft mask would not survive in a bool buffer.
            module.register_buffer(f"{name}_mask", current.to(state[mask].dtype))
    for name, parameter in list(module._parameters.items()):
        loaded = state.get(f"{prefix}{name}_mask")
        if parameter is None or hasattr(module, f"{name}_mask"):
            continue
        if f"{prefix}{name}" in state or not isinstance(loaded, Tensor):
            continue
        if loaded.shape != parameter.shape:
            raise RuntimeError(
                f"size mismatch for {prefix}{name}_mask: {list(loaded.shape)} in the checkpoint, "
                f"{list(parameter.shape)} in the model"
            )
        nn.attach(module, name, loaded.to(parameter.device))
        replace_hook(module, name, round_from_mask(name, loaded))


class _Loading:
    """``nn.atomic`` that puts back the values of all parameters and buffers too.

    One context for both: an interrupt between the ends of two would undo the one and keep the other.
    """

    def __init__(self, modules: list[Module], in_place: bool) -> None:
        tensors = {id(t): t for m in modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None}
        self._kept = [(t, t.detach().clone()) for t in tensors.values() if in_place and not is_lazy(t)]
        self._structure = nn.atomic(modules)

    def __enter__(self) -> None:
        self._structure.__enter__()

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        if kind is None:
            return
        try:
            self._restore(kind, *error)
        except KeyboardInterrupt:
            self._restore(kind, *error)  # half of it would do harm; once more does none
            raise

    def _restore(self, *error: Any) -> None:
        self._structure.__exit__(*error)
        with torch.no_grad():
            for tensor, values in self._kept:
                tensor.detach().copy_(values)
