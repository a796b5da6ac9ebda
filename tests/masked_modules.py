"""What the tests of modules share: masked modules beside dense ones, and classes as users write them."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import masked_ops
from masked_ops.nn import attach


def make(kind: str, *args: Any, **kwargs: Any) -> Any:
    return getattr(masked_ops, f"Masked{kind}")(*args, **kwargs)


def make_dense(kind: str, *args: Any, **kwargs: Any) -> Any:
    return getattr(nn, kind)(*args, **kwargs)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.block = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.conv(x).mean((2, 3)))

    @property
    def pairs(self) -> list[tuple[nn.Module, str]]:
        return [(self.conv, "weight"), (self.block[0], "weight"), (self.block[2], "weight")]


def random_mask(like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Zeros and ones, at least one of each."""
    mask = torch.randint(0, 2, like.shape).to(dtype)
    mask.view(-1)[:2] = torch.tensor([0, 1]).to(dtype)
    return mask


def linear(mask: Tensor | None = None) -> Any:
    return masked_ops.MaskedLinear(6, 5, mask=random_mask(torch.empty(5, 6)) if mask is None else mask)


def mask_and_reference(module: nn.Module, *names: str) -> tuple[Any, nn.Module]:
    """``module`` with masked parameters, and a dense copy whose parameters hold the masked values."""
    reference = copy.deepcopy(module)
    for name in names:
        mask = random_mask(getattr(module, name))
        attach(module, name, mask)
        getattr(reference, name).data.mul_(mask)
    return module, reference


def output(module: nn.Module, *inputs: Any) -> Tensor:
    result = module(*inputs)
    return result[0] if isinstance(result, tuple) else result


class OwnForward(nn.Module):
    """Registers its parameter under a name of its own, and reads it twice."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(6, 5))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return (x @ self.kernel).relu() @ self.kernel.T


class ScaledLinear(nn.Linear):
    """Calls torch's forward through super()."""

    def __init__(self, in_features: int, out_features: int, scale: float = 2.0) -> None:
        super().__init__(in_features, out_features)
        self.scale = scale

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.scale

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale={self.scale}"


class PlainLinear(nn.Linear):
    """Keeps everything of torch's."""


class StandardizedConv(nn.Conv2d):
    """Changes the weight in ``_conv_forward``."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight - weight.mean(), bias)


class Stateful(nn.Linear):
    """Says itself what of it is pickled."""

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "cache": "dropped"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.restored = True


class Reduced(nn.Linear):
    """Says itself how it is constructed."""

    def __reduce__(self) -> Any:
        return (type(self), (self.in_features, self.out_features), self.__getstate__())


class RefusesSubclasses(nn.Module):
    def __init_subclass__(cls) -> None:
        raise RuntimeError("final")

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class RefusesAssignment(nn.Linear):
    def __setattr__(self, name: str, value: Any) -> None:
        if name == "__class__":
            raise TypeError("not this one")
        super().__setattr__(name, value)


@contextlib.contextmanager
def counted(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> Iterator[list[tuple[Any, ...]]]:
    calls: list[tuple[Any, ...]] = []
    function = getattr(owner, name)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return function(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, wrapper)
        yield calls


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x
