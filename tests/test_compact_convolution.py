"""Convolutions whose mask prunes whole channels: the compact path, which leaves them out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from generators import (
    FLOATS,
    LAYOUTS,
    assert_exact,
    compiled_only,
    every_capability,
    integers,
    poisoned,
    running_on,
    spoiled,
)
from test_convolution import TORCHS, Problem, beside_copies, check_against_dense
from torch import Tensor

import masked_ops
from masked_ops import _ops
from masked_ops._packed_class import bits_of

pytestmark = compiled_only

PROBLEMS = [
    Problem("conv1d", (3, 5, 17), (6, 5, 3), {"padding": 1}),
    Problem("conv2d", (2, 5, 9, 8), (7, 5, 3, 3), {"padding": 1}),
    Problem("conv2d", (5, 9, 8), (7, 5, 3, 2), {"stride": 2}),
    Problem("conv2d", (2, 33, 5, 5), (17, 33, 1, 1)),
    Problem("conv2d", (2, 6, 9, 9), (9, 2, 3, 3), {"padding": 1, "groups": 3}),
    Problem("conv2d", (2, 8, 9, 9), (16, 1, 3, 3), {"stride": 2, "groups": 8}),
    Problem("conv2d", (1, 5, 3, 3), (6, 5, 3, 3)),
    Problem("conv3d", (2, 5, 4, 5, 4), (6, 5, 2, 3, 2), {"padding": (1, 0, 1)}),
    Problem("conv_transpose1d", (2, 5, 7), (5, 6, 3), {"stride": 2, "output_padding": 1}),
    Problem("conv_transpose2d", (2, 5, 5, 6), (5, 6, 3, 3), {"stride": 2, "padding": 1}),
    Problem("conv_transpose2d", (2, 6, 5, 4), (6, 2, 2, 3), {"groups": 3, "dilation": 2}),
    Problem("conv_transpose3d", (2, 5, 3, 4, 2), (5, 6, 3, 2, 2), {"stride": (1, 2, 2)}),
]
every_problem = pytest.mark.parametrize("problem", PROBLEMS, ids=str)


def thinned(mask: Tensor) -> Tensor:
    """Half of what is left, but one of each channel at least."""
    return mask & ((torch.rand(mask.shape) < 0.5) | (torch.arange(mask[0, 0].numel()).view(mask[0, 0].shape) == 0))


def rows_left(mask: Tensor, groups: int, left: list[int]) -> Tensor:
    keep = torch.zeros(len(mask), dtype=torch.bool)
    keep[left] = True
    if groups > 1:  # whole groups
        keep = keep.unflatten(0, (groups, -1))[:, :1].expand(groups, len(mask) // groups).flatten()
    return mask & keep.view(-1, *[1] * (mask.dim() - 1))


def others_left(mask: Tensor, left: list[int]) -> Tensor:
    keep = torch.zeros(mask.shape[1], dtype=torch.bool)
    keep[left] = True
    return mask & keep.view(1, -1, *[1] * (mask.dim() - 2))


# Name -> what is left of a mask of ones, given the groups. Of more than one group only whole ones can be left out.
STRUCTURES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "some rows": lambda mask, groups: thinned(rows_left(mask, groups, [0, 2, 3])),
    "the last row": lambda mask, groups: rows_left(mask, groups, [len(mask) // groups * (groups - 1)]),
    "all rows but the first": lambda mask, groups: thinned(
        rows_left(mask, groups, list(range(len(mask) // groups if groups > 1 else 1, len(mask))))
    ),
    "some others": lambda mask, groups: others_left(rows_left(mask, groups, [0, 3]), [mask.shape[1] - 1]),
    "others alone": lambda mask, groups: others_left(mask, [0]) if groups == 1 else rows_left(mask, groups, [0]),
    "some of both": lambda mask, groups: thinned(
        others_left(rows_left(mask, groups, [0, 2, 3]), [i for i in (0, 2) if i < mask.shape[1]])
    ),
    "nothing": lambda mask, groups: mask & False,
}


def structured(problem: Problem, structure: str) -> Tensor:
    return STRUCTURES[structure](torch.ones(problem.weight, dtype=torch.bool), problem.options.get("groups", 1))


@every_capability
@pytest.mark.parametrize("structure", STRUCTURES)
@every_problem
def test_masked_convolutions_are_exact_on_integers(problem: Problem, structure: str, capability: str) -> None:
    mask = structured(problem, structure)
    with running_on("compact", capability), poisoned():
        for dtype, bias in ((torch.float32, True), (torch.float32, False), (FLOATS[len(structure) % 4], True)):
            weight = spoiled(integers(*problem.weight, dtype=dtype), mask)
            b = integers(problem.out_channels, dtype=dtype) if bias else None
            check_against_dense(problem, integers(*problem.input, dtype=dtype), weight, mask, b, structure)


@pytest.mark.parametrize("structure", STRUCTURES)
@every_problem
def test_packed_convolutions_are_exact_on_integers(problem: Problem, structure: str) -> None:
    mask = structured(problem, structure)
    leaves = [integers(*problem.input), integers(int(mask.sum())), integers(problem.out_channels)]
    ours, theirs = ([t.to(dtype).requires_grad_() for t in leaves] for dtype in (torch.float32, torch.float64))
    call = getattr(masked_ops, f"packed_{problem.function}")
    with running_on("compact"), poisoned():
        y = call(ours[0], ours[1], bits_of(mask), problem.weight, ours[2], **problem.options)
        weight = torch.zeros(problem.weight, dtype=torch.float64).masked_scatter(mask, theirs[1])
        expected = TORCHS[problem.function](theirs[0], weight, theirs[2], **problem.options)
        grad = integers(*y.shape)
        grads = torch.autograd.grad(y, ours, grad)
    assert_exact(y, expected, structure)
    for actual, wanted in zip(grads, torch.autograd.grad(expected, theirs, grad.double()), strict=True):
        assert_exact(actual, wanted, structure)


@pytest.mark.parametrize("format_of", ["input", "weight", "mask", "all"])
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("function", ["conv2d", "conv_transpose2d", "conv3d"])
def test_memory_formats(function: str, structure: str, format_of: str) -> None:
    dimensions = 3 if function == "conv3d" else 2
    problem = Problem(function, (2, 6, 5, 6, 4)[: 2 + dimensions], (6, 6, 3, 2, 3)[: 2 + dimensions], {"padding": 1})
    memory_format = torch.channels_last_3d if dimensions == 3 else torch.channels_last
    x, w, mask = integers(*problem.input), integers(*problem.weight), structured(problem, structure)
    w = spoiled(w, mask)
    x = x.contiguous(memory_format=memory_format) if format_of in ("input", "all") else x
    w = w.contiguous(memory_format=memory_format) if format_of in ("weight", "all") else w
    mask = mask.contiguous(memory_format=memory_format) if format_of in ("mask", "all") else mask
    for ours, copies in beside_copies("compact", function, x, w, mask, padding=1):
        assert [t.stride() for t in ours] == [t.stride() for t in copies]


@pytest.mark.parametrize("layout", ["transposed", "expanded", "sliced"])
def test_weights_of_other_layouts(layout: str) -> None:
    problem = PROBLEMS[1]
    mask = structured(problem, "some of both")
    with running_on("compact"), poisoned():
        weight, bias = LAYOUTS[layout](integers(*problem.weight)), LAYOUTS[layout](integers(7))
        check_against_dense(problem, LAYOUTS[layout](integers(*problem.input)), weight, LAYOUTS[layout](mask), bias)


def test_what_it_cannot_serve() -> None:
    x, w = torch.ones(2, 4, 5, 5), torch.ones(4, 2, 3, 3)
    one_of_a_group = torch.ones(4, 2, 3, 3)
    one_of_a_group[1] = 0
    with running_on("compact"):
        for mask, message in (
            (torch.ones(4, 2, 3, 3), "it has no pruned group"),
            (one_of_a_group, "it has no pruned group"),
            (one_of_a_group * 0.5, "the mask is soft"),
        ):
            with pytest.raises(RuntimeError, match=f"path 'compact' cannot serve this convolution: {message}"):
                masked_ops.masked_conv2d(x, w, mask, groups=2)
        with pytest.raises(RuntimeError, match="cannot serve this packed convolution: it has no pruned channel"):
            masked_ops.packed_conv2d(x, torch.ones(144), bits_of(torch.ones(4, 4, 3, 3)), (4, 4, 3, 3))
        with pytest.raises(RuntimeError, match="consistent sizes"):
            masked_ops.masked_conv2d(x, torch.ones(4, 3, 3, 3), torch.zeros(4, 3, 3, 3))


def test_a_mask_that_is_edited() -> None:
    x, w, mask = integers(2, 4, 5, 5), integers(6, 4, 3, 3), torch.ones(6, 4, 3, 3, dtype=torch.bool)
    with running_on("compact"):
        for row, channel in ((0, None), (3, None), (None, 2), (None, 0), (5, 3)):
            if row is not None:
                mask[row] = False
            if channel is not None:
                mask[:, channel] = False
            assert_exact(masked_ops.masked_conv2d(x, w, mask), TORCHS["conv2d"](x, w * mask))


def test_a_mask_for_different_numbers_of_groups() -> None:
    w = integers(8, 2, 3, 3)
    mask = torch.rand(w.shape) < 0.7
    mask[:4] = False
    for groups in (1, 2, 4, 1, 2):
        x = integers(2, 2 * groups, 7, 6)
        expected = torch.nn.functional.conv2d(x, w * mask, groups=groups)
        with running_on("compact"):
            assert_exact(masked_ops.masked_conv2d(x, w, mask, groups=groups), expected, groups)


def test_what_is_kept_is_counted() -> None:
    mask = torch.ones(64, 64, 3, 3)
    mask[::2] = 0
    masked_ops.clear_cache()
    x, w = torch.ones(1, 64, 4, 4), torch.ones(64, 64, 3, 3)
    with running_on("copy"):
        masked_ops.masked_conv2d(x, w, mask)
    before = masked_ops.cache_info()["bytes"]
    with running_on("compact"):
        masked_ops.masked_conv2d(x, w, mask)
    assert masked_ops.cache_info()["bytes"] - before >= 32 * 64 * 9 // 8


@pytest.mark.parametrize(("transposed", "rows"), [(False, True), (False, False), (True, True), (True, False)])
def test_choice(transposed: bool, rows: bool) -> None:
    """Half of the channels pruned pays where there is much to compute, from the second use of a mask on."""
    geometry = ([1, 1], [1, 1], [1, 1], transposed, [0, 0], 1)
    served = {}
    for size, pruned in ((28, 64), (28, 1), (1, 64)):
        mask = torch.ones(128, 128, 3, 3)
        (mask if rows else mask.transpose(0, 1))[:pruned] = 0
        x, w = torch.randn(2, 128, size, size), torch.randn(128, 128, 3, 3)
        outputs = []
        for path in (None, None, "copy", "compact"):
            with running_on(path):
                outputs.append(_ops.convolution(x, w, mask, None, *geometry))
        first, second, copied, compacted = outputs
        assert torch.equal(first, copied)
        # Each path sums in an order of its own, by which it can be told.
        served[size, pruned] = "copy" if torch.equal(second, copied) else "compact"
        if torch.equal(copied, compacted):
            served[size, pruned] = "either"
    assert served[28, 64] in ("compact", "either") and served[28, 1] in ("copy", "either")
    assert served[1, 64] in ("copy", "either")
