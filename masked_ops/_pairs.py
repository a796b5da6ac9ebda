"""Functions of a module and a parameter's name that take a list of such pairs too."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from torch import Tensor
from torch.nn import Module

from . import nn
from ._packing import keep_ties

M = TypeVar("M", bound=Module)
Pairs = Iterable[tuple[Module, str]]
TensorOrDict = Tensor | Mapping[tuple[Module, str], Tensor]


def as_pairs(parameters: Any) -> list[tuple[Module, str]]:
    """``parameters`` as a list of (module, name) pairs.

    Raises:
        TypeError: if it is anything else.
    """
    if not isinstance(parameters, Iterable) or isinstance(parameters, (Tensor, str, bytes, Mapping)):
        raise TypeError(
            f"module must be a torch.nn.Module or a list of (module, name) pairs, got {type(parameters).__name__}"
        )
    pairs = list(parameters)
    for pair in pairs:
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2):
            raise TypeError(f"each entry of the list must be a (module, name) pair, got {type(pair).__name__}")
        if not (isinstance(pair[0], Module) and isinstance(pair[1], str)):
            kinds = ", ".join(type(item).__name__ for item in pair)
            raise TypeError(f"each entry of the list must be a (module, name) pair, got ({kinds})")
    return [(module, name) for module, name in pairs]


def over_pairs(function: Callable[..., Module]) -> Callable[..., Any]:
    """Let ``function(module, name, ...)`` take a list of (module, name) pairs: all of them, or none if one fails.

    An argument that is a dict with such pairs as keys (scores, masks) gives each call its own entry.
    """

    @functools.wraps(function)
    def wrapper(module: Module | Pairs, *args: Any, **kwargs: Any) -> Module | list[Module]:
        if isinstance(module, Module):
            return function(module, *args, **kwargs)
        pairs = as_pairs(module)
        if "name" in kwargs:
            raise TypeError(f"name must not be given with a list of (module, name) pairs, got {kwargs['name']!r}")
        calls = [
            ([*pair, *(_entry(value, pair) for value in args)], {key: _entry(kwargs[key], pair) for key in kwargs})
            for pair in pairs
        ]
        with nn.atomic([submodule for submodule, _ in pairs]), keep_ties():
            for own_args, own_kwargs in calls:
                function(*own_args, **own_kwargs)
        return [submodule for submodule, _ in pairs]

    return wrapper


def _entry(value: Any, pair: tuple[Module, str]) -> Any:
    return value.get(pair) if isinstance(value, Mapping) else value
