"""The sparse kernels of convolutions, forced: every geometry and layout, on every capability, exact on integers."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from generators import (
    CAPABILITIES,
    assert_exact,
    compiled_only,
    every_capability,
    integers,
    name_of,
    normal,
    poisoned,
    running_on,
    spoiled,
)
from torch import Tensor
from torch.nn import functional as F

import masked_ops
from masked_ops import _ops

pytestmark = [compiled_only]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DENSITIES = (0.0, 0.03, 0.1, 0.3, 0.7, 1.0)
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class Problem(NamedTuple):
    """A call of ``aten::convolution``."""

    input: tuple[int, ...]
    weight: tuple[int, ...]
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    transposed: bool
    output_padding: list[int]
    groups: int

    @property
    def geometry(self) -> tuple[Any, ...]:
        return self[2:]

    @property
    def out_channels(self) -> int:
        return self.weight[1] * self.groups if self.transposed else self.weight[0]


def conv(
    input: tuple[int, ...],
    weight: tuple[int, ...],
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
    transposed: bool = False,
) -> Problem:
    n = len(weight) - 2
    return Problem(input, weight, [stride] * n, [padding] * n, [dilation] * n, transposed, [0] * n if n else [], groups)


def check(problem: Problem, density: float, *, layout: int, bias: bool, dtype: torch.dtype = torch.float32) -> None:
    """Output and gradients equal those of float64; bits of ``layout``: channels last for input, gradient, weight."""
    x, mask = integers(*problem.input, dtype=dtype), torch.rand(problem.weight) < density
    weight = spoiled(integers(*problem.weight, dtype=dtype), mask)
    b = integers(problem.out_channels, dtype=dtype) if bias else None
    exact_x, exact_w = x.double().requires_grad_(), torch.where(mask, weight, 0).double().requires_grad_()
    exact = torch.ops.aten.convolution(exact_x, exact_w, None if b is None else b.double(), *problem.geometry)
    dy = integers(*exact.shape, dtype=dtype)
    wanted = torch.autograd.grad(exact, (exact_x, exact_w), dy.double())
    if x.dim() in CHANNELS_LAST:
        x, dy, weight = (
            t.contiguous(memory_format=CHANNELS_LAST[x.dim()]) if layout >> i & 1 else t
            for i, t in enumerate((x, dy, weight))
        )
    calls = {
        "output": (_ops.convolution, (x, weight, mask, b)),
        "grad_input": (_ops.convolution_grad_input, (dy, weight, mask, list(x.shape))),
        "grad_weight": (_ops.convolution_grad_weight, (dy, x, mask)),
    }
    for (name, (op, arguments)), expected in zip(
        calls.items(), (exact.detach(), wanted[0], wanted[1] * mask), strict=True
    ):
        actual = op(*arguments, *problem.geometry)
        assert_exact(actual, expected.to(dtype), name, problem, density, layout)


def random_problems(count: int) -> Iterator[Problem]:
    draw = random.Random(0)
    while count:
        n = draw.choice((1, 2, 2, 2, 3))
        transposed = draw.random() < 0.4
        groups = draw.choice((1, 1, 1, 2, 3, 8))

        def each(low: int, high: int, n: int = n) -> list[int]:
            return [draw.randint(low, high) for _ in range(n)]

        kernel, stride, dilation = each(1, (7, 7, 4)[n - 1]), each(1, 3), each(1, 3)
        if draw.random() < 0.4:
            stride = [1] * n
        padding = [draw.randint(0, 2 * k) for k in kernel]
        output_padding = [draw.randint(0, max(s, d) - 1) * transposed for s, d in zip(stride, dilation, strict=True)]
        size = each(1, draw.choice(((9, 90), (6, 20, 34), (5, 9))[n - 1]))
        into, out = draw.choice((1, 2, 5, 17, 40)), draw.choice((1, 3, 8, 33))
        weight = (into * groups, out, *kernel) if transposed else (out * groups, into, *kernel)
        problem = Problem(
            (draw.choice((1, 2, 3, 9)), into * groups, *size),
            weight,
            stride,
            padding,
            dilation,
            transposed,
            output_padding,
            groups,
        )
        try:
            y = torch.ops.aten.convolution(
                torch.empty(problem.input, device="meta"), torch.empty(weight, device="meta"), None, *problem.geometry
            )
        except RuntimeError:
            continue
        if y.numel() > 0 and max(y.numel(), torch.Size(problem.input).numel()) < 200_000:
            count -= 1
            yield problem


@every_capability
def test_random_geometries(capability: str) -> None:
    """A third of the draws for each capability: all three together see them all."""
    draw = random.Random(1)
    cases = [(p, draw.choice(DENSITIES), draw.randrange(8), draw.random() < 0.5) for p in random_problems(180)]
    with running_on("sparse", capability), poisoned():
        for problem, density, layout, bias in cases[CAPABILITIES.index(capability) :: len(CAPABILITIES)]:
            check(problem, density, layout=layout, bias=bias, dtype=draw.choice(DTYPES))


# Around the edges of what the kernels cut: vectors of 4, 8 and 16 lanes, through the ends of images; strips of 4, 7 and
# 8 vectors, which are rows where taps share them; blocks of 64 to 256 columns, panels of 16 to 512 rows, all taps of a
# kernel.
EDGES = [
    *(conv((4, 3, h, w), (5, 3, 3, 3), padding=1) for h, w in [(8, 14), (7, 15), (9, 16), (16, 17), (15, 28), (4, 56)]),
    *(conv((16, 2, 14, w), (3, 2, 3, 3), padding=1) for w in (14, 15, 16, 28, 31, 32, 56, 63)),
    *(conv((16, 2, h, 14), (3, 2, 3, 3), padding=p) for h, p in [(7, 1), (8, 1), (13, 1), (15, 2), (22, 0), (29, 3)]),
    *(conv((n, 3, h, w), (4, 3, 3, 3), padding=1) for n, h, w in [(9, 7, 7), (33, 8, 5), (17, 15, 3), (5, 14, 13)]),
    *(conv((9, c, 6, 7), (o, c, 1, 1)) for c, o in [(63, 15), (64, 16), (65, 17), (127, 64), (257, 65), (130, 513)]),
    *(conv((5, c, 5, 5), (17, c, 3, 3), padding=1) for c in (7, 14, 15, 28, 29, 57, 130)),
    # Strides, where taps share rows by classes: kernels beyond and within a step, rows above and below the image.
    *(conv((8, c, h, w), (4, c, k, k), stride=2, padding=k // 2) for c, k, h, w in [(3, 7, 33, 32), (5, 3, 28, 30)]),
    *(conv((16, 2, h, 29), (3, 2, 5, 3), stride=2, padding=p) for h, p in [(14, 0), (29, 4), (31, 7)]),
    *(conv((16, 3, 31, 27), (4, 3, 5, 2), stride=s, padding=3, dilation=d) for s, d in [(2, 2), (2, 3), (3, 1)]),
    conv((9, 22, 15, 14), (5, 22, 3, 3), stride=2, padding=1),
    # One tap, planes of 7 and 8 vectors of 4, 8 and 16 lanes, and of nearly so many pixels: strips, blocks, panels.
    *(conv((3, 5, 4, w), (6, 5, 1, 1)) for w in (7, 8, 13, 14, 15, 16, 27, 28, 32, 56, 64)),
    *(conv((2, c, 8, 14), (o, c, 1, 1)) for c, o in [(1, 1), (127, 65), (257, 17), (130, 530)]),
    # Planes whole 4 KB apart, with few and with many weights.
    *(conv((1, c, 32, 32), (o, c, 1, 1)) for c, o in [(3, 5), (66, 40)]),
    conv((3, 12, 7, 32), (9, 4, 1, 1), groups=3),
    conv((3, 9, 16, 16), (9, 5, 1, 1), transposed=True),
    conv((5, 3, 112), (4, 3, 1)),
    conv((2, 3, 2, 8, 7), (4, 3, 1, 1, 1)),
    conv((20, 4, 30, 30), (6, 4, 2, 5), padding=2),
    conv((16, 3, 28, 28), (4, 3, 5, 5), padding=2, dilation=2),
    conv((16, 3, 14, 14), (4, 3, 3, 3), padding=3, dilation=3),
    conv((16, 8, 14, 14), (8, 1, 3, 3), padding=1, groups=8),
    conv((16, 6, 28, 28), (9, 2, 3, 3), padding=1, groups=3),
    conv((2, 3, 40, 40), (3, 3, 17, 17), padding=8),
    conv((2, 1, 700), (2, 1, 300), padding=150),
    conv((1, 2, 5), (3, 2, 9), padding=20),
    conv((3, 2, 4, 4), (2, 2, 1, 1), stride=3, padding=2),
    conv((3, 4, 9, 9), (4, 5, 1, 1), stride=3, transposed=True),
    conv((9, 6, 14, 14), (6, 7, 3, 3), padding=1, transposed=True),
    conv((9, 6, 7, 7), (6, 7, 4, 4), stride=2, padding=1, transposed=True),
    conv((2, 4, 5, 9, 14), (4, 4, 3, 3, 3), padding=1),
    conv((2, 2, 3), (2, 2, 2), stride=2**31 - 1),
]


@every_capability
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("layout", [0, 7], ids=["contiguous", "channels_last"])
def test_edges(layout: int, dtype: torch.dtype, capability: str) -> None:
    with running_on("sparse", capability), poisoned():
        for problem, density in zip(EDGES, itertools.cycle((0.3, 0.1, 0.9))):
            check(problem, density, layout=layout, bias=layout == 0, dtype=dtype)


@every_capability
def test_more_positions_than_one_part(capability: str) -> None:
    """Several ranges of positions, whose gradients are added up; several panels in tasks of their own."""
    with running_on("sparse", capability), poisoned():
        check(conv((33, 3, 33, 33), (40, 3, 3, 3), padding=1), 0.3, layout=0, bias=True)
        check(conv((1, 300, 3, 3), (530, 300, 1, 1)), 0.05, layout=0, bias=True)


def test_every_padding_mode_of_a_layer() -> None:
    for mode, padding in itertools.product(("zeros", "circular", "reflect"), ("same", "valid", 1, (2, 0))):
        layer = masked_ops.MaskedConv2d(3, 4, (4, 3), padding=padding, padding_mode=mode, bias=True)
        layer.weight_mask.bernoulli_(0.3)
        x = normal(2, 3, 9, 8)
        expected = layer(x)
        with running_on("sparse"):
            torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("transposed", [False, True])
def test_second_derivatives(transposed: bool) -> None:
    mask = torch.rand(3, 3, 3, 3) < 0.4
    x, w = normal(2, 3, 5, 6).requires_grad_(), normal(3, 3, 3, 3).requires_grad_()
    g, h = normal(2, 3, 5, 6), normal(3, 3, 3, 3)
    geometry = ([1, 1], [1, 1], [1, 1], transposed, [0, 0], 1)
    results = []
    for ours in (True, False):
        with running_on("sparse" if ours else None):
            if ours:
                y = _ops.convolution(x, w, mask, None, *geometry)
            else:
                y = torch.ops.aten.convolution(x, w * mask, None, *geometry)
            first = torch.autograd.grad(y, (x, w), g, create_graph=True)
            results.append((*first, *torch.autograd.grad(first[0].mul(g).sum() + first[1].mul(h).sum(), (x, w))))
    for ours_, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours_, theirs, rtol=1e-4, atol=1e-5)


@every_capability
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_only_weights_that_met_it_get_an_infinite_gradient(value: float, capability: str) -> None:
    """Vectors run beyond the images, where the gradient of the output is zero and the input may be Inf."""
    with running_on(capability=capability, path="sparse"):
        for height, width, padding, kernel, batch in itertools.product(
            (5, 14, 20), (9, 14, 17), (0, 1), (1, 3), (1, 3)
        ):
            weight, mask = integers(8, 4, kernel, kernel).requires_grad_(), torch.rand(8, 4, kernel, kernel) < 0.3
            for where in ((0, 0, 0, 0), (-1, 3, -1, -1), (-1, 2, -1, 0)):
                x = integers(batch, 4, height, width)
                x[where] = value
                y = masked_ops.masked_conv2d(x, weight, mask, padding=padding)
                dy = integers(*y.shape)
                (actual,) = torch.autograd.grad(y, weight, dy)
                z = F.conv2d(x.double(), weight.double() * mask, padding=padding)
                (expected,) = torch.autograd.grad(z, weight, dy.double())
                torch.testing.assert_close(actual, expected.where(mask, 0), equal_nan=True)


def test_the_weight_may_change_between_forward_and_backward() -> None:
    """Values that forward compressed are those of forward; torch refuses what was changed in place."""
    mask, geometry = torch.rand(4, 3, 3, 3) < 0.4, ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    x, w = normal(2, 3, 6, 6).requires_grad_(), normal(4, 3, 3, 3).requires_grad_()
    with running_on("sparse"):
        y = _ops.convolution(x, w, mask, None, *geometry)
        with torch.no_grad():
            w.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_same_bits_from_run_to_run(threads: int) -> None:
    torch.set_num_threads(threads)
    x, w, mask = normal(9, 7, 14, 14), normal(40, 7, 3, 3), torch.rand(40, 7, 3, 3) < 0.2
    geometry = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    dy = normal(9, 40, 14, 14)
    with running_on("sparse"):
        for op, arguments in (
            (_ops.convolution, (x, w, mask, None)),
            (_ops.convolution_grad_input, (dy, w, mask, list(x.shape))),
            (_ops.convolution_grad_weight, (dy, x, mask)),
        ):
            first, *others = (op(*arguments, *geometry) for _ in range(4))
            assert all(torch.equal(first, other) for other in others)


def test_layout_of_the_result_is_that_of_the_copy_path() -> None:
    draw = random.Random(2)
    for problem in random_problems(60):
        x, w, mask = normal(*problem.input), normal(*problem.weight), torch.rand(problem.weight) < 0.3
        dy = torch.ops.aten.convolution(x, w, None, *problem.geometry)
        if x.dim() in CHANNELS_LAST:
            x, w, dy = (
                t.contiguous(memory_format=CHANNELS_LAST[x.dim()]) if draw.random() < 0.5 else t for t in (x, w, dy)
            )
        strides = []
        for path in ("sparse", "copy"):
            with running_on(path):
                y = _ops.convolution(x, w, mask, None, *problem.geometry)
                dx = _ops.convolution_grad_input(dy, w, mask, list(x.shape), *problem.geometry)
                dw = _ops.convolution_grad_weight(dy, x, mask, *problem.geometry)
                strides.append((y.stride(), dx.stride(), *(dw.stride(d) for d in range(dw.dim()) if dw.size(d) > 1)))
        assert strides[0] == strides[1], (problem, x.stride(), w.stride(), dy.stride())


def test_scratch_does_not_grow_with_the_batch() -> None:
    """Nothing but the result is allocated by torch, and its allocator sees no more for a larger batch."""
    w, mask = normal(16, 16, 3, 3), torch.rand(16, 16, 3, 3) < 0.1
    geometry = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)

    def resident_after(batch: int) -> int:
        x = torch.zeros(batch, 16, 28, 28)
        with running_on("sparse"):
            y = _ops.convolution(x, w, mask, None, *geometry)
            _ops.convolution_grad_input(y, w, mask, list(x.shape), *geometry)
            _ops.convolution_grad_weight(y, x, mask, *geometry)
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[1])
        return pages * 4096 - 4 * 3 * x.numel()

    small = resident_after(8)
    assert resident_after(256) - small < 24 << 20


def test_choice_of_path() -> None:
    """Sparse where few weights of a large convolution remain, else copy; what is named serves."""
    for density, expected in ((0.05, "sparse"), (1.0, "copy")):
        mask = torch.rand(128, 128, 3, 3) < density
        w = normal(128, 128, 3, 3)
        path, reason = _ops.explain_convolution(w, mask, (8, 128, 28, 28), False, [1], [1], [1], False, [0], 1)
        assert path == expected and reason
    soft = torch.rand(8, 8, 3, 3) + 0.5
    assert _ops.explain_convolution(soft, soft, (8, 8, 9, 9), False, [1], [1], [1], False, [0], 1) == (
        "copy",
        "the mask is soft",
    )
    with (
        running_on("sparse"),
        pytest.raises(RuntimeError, match=r"path 'sparse' cannot serve this convolution: .*soft"),
    ):
        masked_ops.masked_conv2d(normal(1, 8, 9, 9), soft, soft)
    with running_on("sparse"), pytest.raises(RuntimeError, match="float32, bfloat16 and float16"):
        masked_ops.masked_conv2d(normal(1, 8, 9, 9).double(), soft.double(), (soft > 1).double())


def test_chosen_path_is_right() -> None:
    x, w, b = (normal(*s).requires_grad_() for s in ((8, 64, 14, 14), (64, 64, 3, 3), (64,)))
    mask = (torch.rand(64, 64, 3, 3) < 0.05).float()
    for _ in range(3):  # an index is built from a mask's second use on
        y = masked_ops.masked_conv2d(x, w, mask, b, padding=1)
        expected = F.conv2d(x, w * mask, b, padding=1)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        ours, theirs = (torch.autograd.grad(t, (x, w, b), torch.ones_like(t)) for t in (y, expected))
        for a, e in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-3)


@every_capability
def test_planes_that_are_not_aligned(capability: str) -> None:
    """Kernels of one tap work on the images in place only where vectors are aligned."""
    mask, geometry = torch.rand(5, 4, 1, 1) < 0.5, ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)
    w = integers(5, 4, 1, 1)
    for size, offset in itertools.product(((8, 14), (16, 16)), (1, 2, 4, 8)):
        x = integers(2 * 4 * size[0] * size[1] + offset)[offset:].view(2, 4, *size)
        dy = integers(2 * 5 * size[0] * size[1] + offset)[offset:].view(2, 5, *size)
        exact = torch.ops.aten.convolution(x.double(), (w * mask).double(), None, *geometry)
        exact_x = torch.ops.aten.convolution(dy.double(), (w * mask).double().transpose(0, 1), None, *geometry)
        exact_w = torch.einsum("nohw,nihw->oi", dy.double(), x.double()).view(w.shape) * mask
        with running_on("sparse", capability), poisoned():
            assert_exact(_ops.convolution(x, w, mask, None, *geometry), exact)
            assert_exact(_ops.convolution_grad_input(dy, w, mask, list(x.shape), *geometry), exact_x)
            assert_exact(_ops.convolution_grad_weight(dy, x, mask, *geometry), exact_w)


@every_capability
@pytest.mark.parametrize("channels", [(3, 200), (200, 3)])
def test_results_that_go_past_the_caches(capability: str, channels: tuple[int, int]) -> None:
    """26 MB of them, of forward or grad_input."""
    into, out = channels
    with running_on("sparse", capability), poisoned():
        check(conv((1, into, 128, 256), (out, into, 1, 1)), 0.4, layout=0, bias=True)


@every_capability
@pytest.mark.parametrize("layout", [0, 7], ids=["contiguous", "channels_last"])
def test_results_of_strips_that_go_past_the_caches(capability: str, layout: int) -> None:
    """34 MB of them, whose lines are whole in every other row."""
    with running_on("sparse", capability), poisoned():
        check(conv((1, 2, 150, 281), (208, 2, 1, 2)), 0.5, layout=layout, bias=True)


def test_unusual_layouts_of_the_operands() -> None:
    mask, geometry = torch.rand(6, 4, 3, 2) < 0.4, ([1, 2], [1, 1], [1, 1], False, [0, 0], 1)
    w = integers(6, 4, 3, 2)
    whole = integers(2, 5, 9, 14)
    views: list[Tensor] = [whole[:, 1:, 1:7, ::2], whole[:, 1:].transpose(2, 3), whole[:, 1:2].expand(2, 4, 9, 14)]
    with running_on("sparse"), poisoned():
        for x in views:
            for weight in (w, w.transpose(2, 3).contiguous().transpose(2, 3)):
                y = _ops.convolution(x, weight, mask, None, *geometry)
                assert_exact(y, torch.ops.aten.convolution(x.double(), (w * mask).double(), None, *geometry))
