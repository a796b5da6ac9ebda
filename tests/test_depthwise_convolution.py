"""Convolutions in which every input channel is a group, by their own kernels, in both layouts."""

from __future__ import annotations

import itertools

import pytest
import torch
from generators import (
    LAYOUTS,
    PATTERNS,
    assert_accurate,
    assert_exact,
    compiled_only,
    every_capability,
    integers,
    mask_of,
    normal,
    poisoned,
    running_on,
    spoiled,
)
from test_convolution import Problem, check_against_dense
from torch import Tensor
from torch.nn import functional as F

import masked_ops
from masked_ops import _ops

pytestmark = compiled_only


def problems() -> list[Problem]:
    """Sizes around tiles of 8 results and vectors of 4 to 16 lanes; kernels even and odd, strides, paddings beyond the
    kernel, dilations; channels around vectors."""
    sizes = ((1, 1), (7, 8), (8, 15), (9, 16), (15, 17), (16, 31), (17, 33), (5, 56), (6, 3), (4, 65))
    kernels = ((3, 3), (1, 1), (2, 2), (5, 5), (3, 1), (1, 4), (7, 7), (6, 3))
    channels = itertools.cycle((3, 16, 17, 1, 8, 33, 5))
    numbers = itertools.cycle(itertools.product((1, 2, 3, (2, 1), (1, 8)), (1, 0, 3, (2, 5)), (1, 2, (1, 3), (3, 1))))
    found = []
    for n, (kernel, size) in enumerate(itertools.product(kernels, sizes)):
        stride, padding, dilation = next(numbers)
        C = next(channels)
        options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": C}
        weight = (C, 1, *kernel)
        if n % 5 == 4:
            weight = (2 * C, 1, *kernel)
        try:
            F.conv2d(torch.zeros(1, C, *size), torch.zeros(weight), None, **options)  # type: ignore[arg-type]
        except RuntimeError:  # a kernel larger than its input
            options["padding"] = tuple(3 * k for k in kernel)
        found.append(Problem("conv2d", (2, C, *size), weight, options))
    # 3 x 3 that keeps the size: rows of one vector to four, and one more column.
    heights, factors = itertools.cycle((1, 2, 3, 4, 5, 7, 14)), itertools.cycle((1, 1, 2))
    for width in (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 24, 25, 31, 32, 33, 48, 49, 63, 64, 65):
        C = next(channels)
        options = {"padding": 1, "groups": C}
        found.append(Problem("conv2d", (3, C, next(heights), width), (C * next(factors), 1, 3, 3), options))
    return [
        *found,
        # Whole tiles of 14 rows and of 14 positions; planes that are read in the order of memory.
        Problem("conv2d", (2, 17, 28, 14), (17, 1, 3, 3), {"padding": 1, "groups": 17}),
        Problem("conv2d", (2, 16, 15, 56), (16, 1, 5, 5), {"padding": 2, "groups": 16}),
        Problem("conv2d", (2, 18, 28, 57), (18, 1, 3, 3), {"padding": 1, "stride": 2, "groups": 18}),
        Problem("conv2d", (1, 2, 260, 61), (2, 1, 3, 3), {"padding": 1, "groups": 2}),
        Problem("conv2d", (1, 2, 515, 130), (2, 1, 5, 5), {"padding": 2, "stride": 2, "groups": 2}),
        Problem("conv2d", (1, 2, 3, 3000), (2, 1, 3, 3), {"padding": 1, "groups": 2}),
        # So many numbers that they are prefetched.
        Problem("conv2d", (2, 152, 59, 60), (152, 1, 3, 3), {"padding": 1, "stride": (2, 1), "groups": 152}),
        Problem("conv1d", (2, 4, 70), (4, 1, 3), {"padding": 1, "groups": 4}),
        Problem("conv1d", (4, 70), (12, 1, 9), {"padding": 20, "stride": 3, "dilation": 2, "groups": 4}),
        Problem("conv_transpose2d", (2, 5, 6, 7), (5, 1, 3, 3), {"stride": 2, "output_padding": 1, "groups": 5}),
        Problem("conv_transpose2d", (2, 18, 7, 5), (18, 1, 4, 3), {"padding": 1, "groups": 18}),
        Problem("conv_transpose2d", (2, 5, 6, 20), (5, 1, 3, 3), {"padding": 1, "groups": 5}),
        Problem("conv_transpose1d", (2, 6, 9), (6, 1, 4), {"stride": 3, "padding": 2, "groups": 6}),
    ]


PROBLEMS = problems()


def poison_scratch() -> None:
    """Leave sums in what the kernels keep from call to call; no NaN, which would have torch compute grad_weight."""
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.full((1, 40, 20, 20), 7.0).contiguous(memory_format=memory_format)
        w = torch.full((40, 1, 7, 7), 7.0)
        numbers = ([1, 1], [3, 3], [1, 1], False, [0, 0], 40)
        with running_on("fused"):
            _ops.convolution(x, w, torch.ones_like(w), None, *numbers)
            _ops.convolution_grad_weight(x, x, torch.ones_like(w), *numbers)


@every_capability
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_exact_on_integers(layout: str, capability: str) -> None:
    lay = LAYOUTS[layout]
    for n, problem in enumerate(PROBLEMS):
        mask = mask_of(list(PATTERNS)[n % len(PATTERNS)], *problem.weight)
        x, w = lay(integers(*problem.input)), spoiled(integers(*problem.weight), mask)
        bias = integers(problem.out_channels) if n % 2 else None
        with running_on(None, capability):
            poison_scratch()
        with running_on("fused", capability), poisoned():
            check_against_dense(problem, x, w, mask, bias)


@every_capability
@pytest.mark.parametrize("kernel", [3, 5])
def test_grad_weight_is_written_whole(kernel: int, capability: str) -> None:
    """Into memory that holds numbers: of NaN, torch would compute it."""
    x, grad = integers(2, 17, 9, 18), integers(2, 17, 9, 18)
    mask = mask_of("most", 17, 1, kernel, kernel)
    numbers = ([1, 1], [kernel // 2] * 2, [1, 1], False, [0, 0], 17)
    with running_on("copy"):
        expected = _ops.convolution_grad_weight(grad, x, mask, *numbers)
    with running_on("fused", capability):
        for _ in range(5):
            freed = [torch.full(mask.shape, 7.0) for _ in range(8)]
            del freed
            assert_exact(_ops.convolution_grad_weight(grad, x, mask, *numbers), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    lay = LAYOUTS[layout]
    for factor in (1, 2):
        problem = Problem("conv2d", (2, 5, 9, 18), (5 * factor, 1, 3, 3), {"padding": 1, "groups": 5})
        mask = lay(mask_of("half", *problem.weight))
        x, w, bias = (lay(integers(*shape)) for shape in (problem.input, problem.weight, (5 * factor,)))
        with running_on("fused"), poisoned():
            check_against_dense(problem, x, w, mask, bias)


@pytest.mark.parametrize("format_of", ["input", "weight", "both", "neither"])
def test_memory_formats(format_of: str) -> None:
    """Those of torch's own results; of a gradient too that lies otherwise."""
    x, w = integers(2, 9, 5, 6), integers(9, 1, 3, 3)
    mask = mask_of("half", *w.shape)
    x = x.contiguous(memory_format=torch.channels_last) if format_of in ("input", "both") else x
    w = w.to(memory_format=torch.channels_last) if format_of in ("weight", "both") else w
    results = []
    for path in ("fused", "copy"):
        leaves = [t.clone().requires_grad_() for t in (x, w)]
        with running_on(path), poisoned():
            y = masked_ops.masked_conv2d(*leaves, mask, groups=9)
            grad = torch.arange(y.numel()).view(y.shape) % 3 - 1.0
            for g in (grad, grad.contiguous(memory_format=torch.channels_last)):
                results.append((y, *torch.autograd.grad(y, leaves, g, retain_graph=True)))
    for fused, copies in zip(results[:2], results[2:], strict=True):
        for actual, expected in zip(fused, copies, strict=True):
            assert_exact(actual, expected)
        assert [t.stride() for t in fused[:2]] == [t.stride() for t in copies[:2]]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_as_accurate_as_torch(memory_format: torch.memory_format) -> None:
    mask = mask_of("most", 20, 1, 5, 5)
    x = normal(4, 20, 30, 30).contiguous(memory_format=memory_format)
    tensors = [x, normal(20, 1, 5, 5) * mask, normal(20)]
    results = []
    for convert in (lambda t: t, lambda t: t, Tensor.double):
        leaves = [convert(t).detach().requires_grad_() for t in tensors]
        with running_on(None if results else "fused"):
            if results:
                y = F.conv2d(*leaves, padding=2, groups=20)
            else:
                y = masked_ops.masked_conv2d(leaves[0], leaves[1], mask, leaves[2], padding=2, groups=20)
            grads = list(torch.autograd.grad(y, leaves, torch.ones_like(y)))
        grads[1] = grads[1] * mask
        results.append((y, *grads))
    for ours, torchs, exact in zip(*results, strict=True):
        assert_accurate(ours, torchs, exact)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_an_inf_reaches_only_what_meets_it(memory_format: torch.memory_format) -> None:
    """In the corner of an image: the taps that would read beyond it stay finite."""
    x, grad = (torch.ones(2, 17, 5, 21).contiguous(memory_format=memory_format) for _ in range(2))
    mask = torch.ones(17, 1, 3, 3)
    for tensor, place in ((x, (0, 3, 0, 0)), (x, (1, 16, 4, 20)), (grad, (0, 3, 0, 0)), (grad, (1, 16, 4, 20))):
        tensor[place] = float("inf")
        arguments = grad, x, mask, [1, 1], [1, 1], [1, 1], False, [0, 0], 17
        with running_on("fused"):
            actual = _ops.convolution_grad_weight(*arguments)
        with running_on("copy"):
            expected = _ops.convolution_grad_weight(*arguments)
        assert expected.isfinite().sum() > expected.numel() // 2
        assert torch.equal(actual.isfinite(), expected.isfinite())
        tensor[place] = 1


def test_what_it_cannot_serve() -> None:
    x, w = torch.ones(2, 4, 5, 5), torch.ones(4, 1, 3, 3)
    of_one_group = torch.ones(4, 4, 3, 3)
    cases = [
        (x, of_one_group, {}, "it takes kernels of one tap, stride 1, no padding, one group; or a group for every"),
        (x, torch.ones(4, 2, 3, 3), {"groups": 2}, "or a group for every input channel"),
        (x, w, {"groups": 4, "stride": 9}, "strides up to 8"),
        (x, w, {"groups": 4, "dilation": 33, "padding": 99}, "over at most 64 positions"),
        (torch.ones(2, 4, 2, 5, 5), w[:, :, None], {"groups": 4}, "at most two dimensions"),
    ]
    with running_on("fused"):
        for input, weight, options, message in cases:
            conv = masked_ops.masked_conv3d if input.dim() == 5 else masked_ops.masked_conv2d
            with pytest.raises(RuntimeError, match=f"path 'fused' cannot serve this convolution: .*{message}"):
                conv(input, weight, weight, **options)  # type: ignore[arg-type]
        with pytest.raises(RuntimeError, match="the mask is soft"):
            masked_ops.masked_conv2d(x, w, w * 0.5, groups=4)
        with pytest.raises(RuntimeError, match="its depthwise kernels take float32 only"):
            masked_ops.masked_conv2d(x.half(), w.half(), w, groups=4)


def test_choice() -> None:
    def chosen(shape: tuple[int, ...], groups: int, channels_last: bool = False, size: int = 28, batch: int = 8) -> str:
        w = torch.ones(shape)
        numbers = ([1, 1], [1, 1], [1, 1], False, [0, 0], groups)
        channels = groups * shape[1]
        return _ops.explain_convolution(w, w, [batch, channels, size, size], channels_last, *numbers)[0]

    usual = "copy" if _ops._module.capability() == "DEFAULT" else "fused"
    assert chosen((32, 1, 3, 3), 32) == chosen((32, 1, 3, 3), 32, True) == chosen((64, 1, 3, 3), 32) == usual
    assert chosen((32, 1, 5, 5), 32, True, 112) == chosen((64, 1, 3, 3), 32, False, 7) == usual
    assert chosen((32, 32, 3, 3), 1) == chosen((64, 1, 3, 3), 32, True) == "copy"
    assert chosen((32, 1, 3, 3), 32, False, 7) == chosen((32, 1, 3, 3), 32, True, 112) == usual
    assert chosen((32, 1, 5, 5), 32, False, 7) == chosen((3, 1, 3, 3), 3) == usual
    assert chosen((3, 1, 3, 3), 3, True) == "copy"  # a vector of few channels
    assert chosen((32, 1, 5, 5), 32, False, 7, 64) == "copy"  # never sparse


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("threads", [1, 2])
def test_same_bits_from_run_to_run(threads: int, memory_format: torch.memory_format) -> None:
    torch.set_num_threads(threads)
    x = torch.randn(4, 32, 28, 28).contiguous(memory_format=memory_format)
    w, mask = torch.randn(32, 1, 3, 3), mask_of("most", 32, 1, 3, 3)
    geometry = ([1, 1], [1, 1], [1, 1], False, [0, 0], 32)
    with running_on("fused"):
        for op, arguments in (
            (_ops.convolution, (x, w, mask, None)),
            (_ops.convolution_grad_input, (x, w, mask, list(x.shape))),
            (_ops.convolution_grad_weight, (x, x, mask)),
        ):
            results = [op(*arguments, *geometry) for _ in range(3)]
            assert all(torch.equal(result, results[0]) for result in results)
