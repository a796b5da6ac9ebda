"""How an optimizer goes on when Parameters are replaced by others: packing a model, and unpacking it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import Parameter
from torch.optim import Optimizer

# What these keep, or how they step, depends on the Parameters' shapes.
_BY_SHAPE = tuple(getattr(torch.optim, name) for name in ("Adafactor", "LBFGS", "Muon") if hasattr(torch.optim, name))


class Replaced(NamedTuple):
    """A Parameter in another's place, and what brings a tensor from the old one's shape to the new one's."""

    old: Parameter
    new: Parameter
    names: tuple[str, str]  # within their module, old and new
    convert: Callable[[Tensor], Tensor]


def check_optimizer(optimizer: object) -> None:
    """Raise unless it is one that can be carried over, as far as that can be told before."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer: torch.optim.Optimizer expected, got {type(optimizer).__name__}")
    kind = type(optimizer)
    if isinstance(optimizer, _BY_SHAPE):
        raise ValueError(
            f"optimizer: {kind.__name__} goes by the shapes of its Parameters, which change: build it anew"
        )
    if kind.__module__.startswith("torch.distributed."):  # a shell around another one that has Parameters of its own
        raise ValueError(f"optimizer: {kind.__name__} has shared out its Parameters, which change: build it anew")


def snapshot(optimizer: Optimizer) -> Callable[[], None]:
    """What makes the groups and the state of ``optimizer`` again what they are now."""
    lists = [
        (value, value.copy()) for group in optimizer.param_groups for value in group.values() if type(value) is list
    ]
    state = dict(optimizer.state)

    def restore() -> None:
        for value, content in lists:
            value[:] = content
        optimizer.state.clear()
        optimizer.state.update(state)

    return restore


def carry(optimizer: Optimizer, replaced: list[Replaced]) -> None:
    """Put the new Parameters in the old ones' places in ``optimizer``, and their state, in the new shapes.

    Raises:
        ValueError: if it has none of the old Parameters, or state that has no place in the new ones. The optimizer may
            be left half done then.
    """
    of_old = {change.old: change for change in replaced}
    there = 0
    for group in optimizer.param_groups:
        for i, param in enumerate(group["params"]):
            if change := of_old.get(param):
                there += 1
                group["params"][i] = change.new
                names, (old, new) = group.get("param_names"), change.names
                if names and names[i].endswith(old):  # or it is from before the pruning, or the user's own
                    names[i] = names[i].removesuffix(old) + new
    if replaced and not there:
        raise ValueError(f"optimizer: {type(optimizer).__name__} has none of the weights that are replaced")
    with torch.inference_mode(False), torch.no_grad():
        for change in replaced:
            if change.old in optimizer.state:
                optimizer.state[change.new] = _state(optimizer.state.pop(change.old), change)


def _state(old: dict[str, Any], change: Replaced) -> dict[str, Any]:
    return {key: _converted(key, value, change) for key, value in old.items()}


def _converted(key: str, value: Any, change: Replaced) -> Any:
    if not isinstance(value, Tensor) or (value.dim() == 0 and change.old.dim() > 0):
        return value  # the number of steps, say
    if value.shape != change.old.shape:
        raise ValueError(
            f"optimizer: its state '{key}' has the shape {tuple(value.shape)} for a weight of "
            f"{tuple(change.old.shape)}, and so cannot be brought along: build the optimizer anew"
        )
    return change.convert(value)
