"""Masks kept in one bit an entry: what the pruning methods remember of their rounds."""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import is_float8


def _pack(flags: Tensor) -> Tensor:
    """Bool tensor of any shape -> uint8 ``[ceil(n / 8)]`` on the CPU, first entry in the lowest bit."""
    flat = flags.detach().reshape(-1).to("cpu", torch.uint8)
    octets = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    return (octets << torch.arange(8, dtype=torch.uint8, device="cpu")).sum(1, dtype=torch.uint8)


def _unpack(bits: Tensor, shape: torch.Size) -> Tensor:
    octets = (bits.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8, device="cpu")) & 1
    return octets.view(-1)[: shape.numel()].view(shape).bool()


def _comparable(mask: Tensor) -> Tensor:
    """For float8, which torch promotes to no other dtype."""
    return mask.detach().float() if is_float8(mask.dtype) else mask.detach()


class PackedMask:
    """A copy of a mask: one bit an entry if it holds 0 and 1 only, as it is otherwise.

    It lies on the CPU, so that a model that was pruned on an accelerator can be unpickled where there is none.
    """

    def __init__(self, mask: Tensor) -> None:
        mask = mask.detach()
        self.shape = mask.shape
        self.dtype = mask.dtype
        # The values of a meta tensor cannot be looked at.
        binary = not mask.is_meta and bool(((mask == 0) | (mask == 1)).all())
        self.data = _pack(mask != 0) if binary else mask.clone() if mask.is_meta else mask.to("cpu", copy=True)
        self.binary = binary

    def unpack(self) -> Tensor:
        """The mask again, on the CPU, in its own dtype."""
        return _unpack(self.data, self.shape).to(self.dtype) if self.binary else self.data.clone()


class MaskChange:
    """What one round of pruning did to a mask, kept so that :meth:`revert` can take it back.

    Only the entries that the round changed are remembered: one bit each, plus their values where those were not all 1.
    """

    def __init__(self, before: Tensor, after: Tensor) -> None:
        changed = _comparable(before) != _comparable(after)
        values = before.detach()[changed]
        self.dtype, self.dtype_after = before.dtype, after.dtype
        self.shape = before.shape
        self.changed = _pack(changed)
        self.values = None if bool((values == 1).all()) else values.cpu()

    def revert(self, mask: Tensor) -> Tensor:
        """``mask`` with the changed entries as they were before the round, in the dtype of before the round.

        A floating-point mask of a module that was converted since (``half()``) keeps the dtype that it has now.
        """
        converted = self.dtype.is_floating_point and mask.dtype != getattr(self, "dtype_after", mask.dtype)
        reverted = mask.detach().to(mask.dtype if converted else self.dtype, copy=True)
        changed = _unpack(self.changed, self.shape).to(mask.device)
        if self.values is None:
            return torch.where(changed, torch.ones_like(reverted), reverted)
        reverted[changed] = self.values.to(reverted)
        return reverted
