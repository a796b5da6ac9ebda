"""Masked convolutions and the closed family of convolution operations: geometry, layouts, dtypes, masks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from generators import (
    FLOATS,
    LAYOUTS,
    MASK_DTYPES,
    PATHS,
    PATTERNS,
    assert_accurate,
    assert_exact,
    assert_exact_sums,
    compiled_only,
    every_capability,
    every_float,
    integers,
    mask_of,
    masked,
    name_of,
    normal,
    past_function_modes,
    poisoned,
    refuses,
    running_on,
    spoiled,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import masked_ops
from masked_ops import _ops, reference

pytestmark = pytest.mark.usefixtures("device")

OURS: dict[str, Callable[..., Tensor]] = {
    name: getattr(masked_ops, f"masked_{name}")
    for name in ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
}
TORCHS: dict[str, Callable[..., Tensor]] = {name: getattr(F, name) for name in OURS}


class Problem(NamedTuple):
    """Which function, the shapes of input and weight, and the rest of the arguments."""

    function: str
    input: tuple[int, ...]
    weight: tuple[int, ...]
    options: dict[str, Any] = {}  # noqa: RUF012

    @property
    def transposed(self) -> bool:
        return "transpose" in self.function

    @property
    def out_channels(self) -> int:
        return self.weight[1] * self.options.get("groups", 1) if self.transposed else self.weight[0]

    def __str__(self) -> str:
        options = ", ".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.function} {list(self.input)} {list(self.weight)} {options}"


PROBLEMS = [
    Problem("conv1d", (3, 4, 17), (6, 4, 3)),
    Problem("conv1d", (4, 9), (6, 4, 5), {"padding": 2}),
    Problem("conv1d", (2, 6, 33), (9, 2, 4), {"stride": 3, "padding": 1, "groups": 3}),
    Problem("conv1d", (2, 3, 11), (5, 3, 4), {"padding": "same", "dilation": 3}),
    Problem("conv2d", (2, 3, 9, 8), (7, 3, 3, 3), {"padding": 1}),
    Problem("conv2d", (3, 9, 8), (7, 3, 3, 3)),
    Problem("conv2d", (2, 16, 7, 7), (32, 16, 1, 1)),
    Problem("conv2d", (8, 17, 14, 14), (33, 17, 3, 3), {"padding": 1}),
    Problem("conv2d", (2, 8, 12, 9), (8, 8, 3, 2), {"stride": (2, 3), "padding": (0, 1), "dilation": (2, 1)}),
    Problem("conv2d", (2, 8, 9, 9), (8, 1, 3, 3), {"padding": 1, "groups": 8}),
    Problem("conv2d", (2, 8, 9, 9), (16, 1, 3, 3), {"stride": 2, "groups": 8}),
    Problem("conv2d", (2, 6, 9, 9), (4, 3, 5, 5), {"padding": 4, "groups": 2}),
    Problem("conv2d", (2, 3, 6, 7), (4, 3, 2, 4), {"padding": "same"}),
    Problem("conv2d", (2, 3, 6, 7), (4, 3, 3, 3), {"padding": "valid"}),
    Problem("conv2d", (1, 3, 32, 32), (8, 3, 7, 7), {"stride": 2, "padding": 3}),
    Problem("conv2d", (0, 3, 6, 6), (4, 3, 3, 3)),
    Problem("conv3d", (2, 3, 5, 6, 4), (4, 3, 2, 3, 3), {"padding": (1, 0, 1)}),
    Problem("conv3d", (4, 5, 6, 4), (4, 2, 3, 3, 1), {"groups": 2, "stride": 2}),
    Problem("conv3d", (1, 2, 4, 4, 4), (3, 2, 2, 2, 2), {"padding": "same"}),
    Problem("conv_transpose1d", (2, 4, 7), (4, 3, 3)),
    Problem("conv_transpose1d", (4, 7), (4, 2, 3), {"stride": 2, "padding": 1, "output_padding": 1, "groups": 2}),
    Problem("conv_transpose2d", (2, 4, 5, 6), (4, 3, 3, 3), {"stride": 2, "padding": 1, "output_padding": 1}),
    Problem("conv_transpose2d", (2, 6, 5, 4), (6, 2, 2, 3), {"stride": (2, 1), "groups": 3, "dilation": 2}),
    Problem("conv_transpose2d", (4, 5, 6), (4, 1, 4, 4), {"groups": 4}),
    Problem("conv_transpose3d", (2, 3, 3, 4, 2), (3, 4, 3, 2, 2), {"stride": (1, 2, 2), "padding": (1, 0, 0)}),
    Problem("conv_transpose3d", (4, 3, 3, 3), (4, 2, 2, 2, 2), {"output_padding": 1, "stride": 2, "groups": 2}),
]
every_problem = pytest.mark.parametrize("problem", PROBLEMS, ids=str)


def check_against_dense(
    problem: Problem,
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    *context: object,
) -> None:
    """Output and gradients equal torch's over the masked weight, in float64."""
    ours = [None if t is None else t.detach().requires_grad_() for t in (input, weight, bias)]
    theirs = [None if t is None else t.detach().double().requires_grad_() for t in (input, weight, bias)]
    dense = masked(torch.where(mask != 0, theirs[1], 0), mask)
    y = OURS[problem.function](ours[0], ours[1], mask, ours[2], **problem.options)
    expected = TORCHS[problem.function](theirs[0], dense, theirs[2], **problem.options)
    assert_exact_sums(y, expected, problem, *context)
    grad = integers(*y.shape, dtype=y.dtype)
    grads = torch.autograd.grad(y, [t for t in ours if t is not None], grad)
    wanted = torch.autograd.grad(expected, [t for t in theirs if t is not None], grad.double())
    for name, actual, exact in zip(("input", "weight", "bias"), grads, wanted, strict=False):
        assert actual.dtype == input.dtype
        assert_exact_sums(actual, exact, f"grad_{name}", problem, *context)


def beside_copies(
    path: str, function: str, x: Tensor, w: Tensor, mask: Tensor, **options: Any
) -> list[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]:
    """Output and gradients of a path and of ``copy``, which are equal: for a contiguous gradient, and channels last."""
    channels_last = torch.channels_last_3d if x.dim() == 5 else torch.channels_last
    results: dict[str, list[tuple[Tensor, ...]]] = {path: [], "copy": []}
    for name, of_path in results.items():
        leaves = [t.clone().requires_grad_() for t in (x, w)]
        with running_on(name), poisoned():
            y = OURS[function](*leaves, mask, **options)
            grad = torch.arange(y.numel()).view(y.shape) % 3 - 1.0
            for g in (grad, grad.contiguous(memory_format=channels_last)):
                of_path.append((y, *torch.autograd.grad(y, leaves, g, retain_graph=True)))
    pairs = list(zip(*results.values(), strict=True))
    for ours, copies in pairs:
        for actual, expected in zip(ours, copies, strict=True):
            assert_exact(actual, expected)
    return pairs


@every_float
@every_problem
def test_values_and_gradients_are_exact_on_integers(problem: Problem, dtype: torch.dtype) -> None:
    with poisoned():
        for n, pattern in enumerate(PATTERNS):
            mask = mask_of(pattern, *problem.weight, dtype=MASK_DTYPES[n % len(MASK_DTYPES)])
            weight = spoiled(integers(*problem.weight, dtype=dtype), mask)
            bias = integers(problem.out_channels, dtype=dtype) if n % 2 else None
            check_against_dense(problem, integers(*problem.input, dtype=dtype), weight, mask, bias, pattern)


@every_capability
@pytest.mark.parametrize("path", [None, *PATHS])
def test_paths_and_capabilities(path: str | None, capability: str) -> None:
    """A path serves some problems; what it serves is right."""
    served = 0
    with running_on(path, capability), poisoned():
        for n, problem in enumerate(PROBLEMS * 2):
            mask = mask_of(list(PATTERNS)[n % len(PATTERNS)], *problem.weight)
            weight, bias = spoiled(integers(*problem.weight), mask), integers(problem.out_channels)
            try:
                check_against_dense(problem, integers(*problem.input), weight, mask, bias)
                served += 1
            except RuntimeError as error:
                if not refuses(path, error):
                    raise
    if path in (None, "copy", "reference"):
        assert served == 2 * len(PROBLEMS)


LAYOUT_PROBLEMS = [
    Problem("conv1d", (2, 4, 15), (6, 2, 3), {"groups": 2, "padding": 1}),
    Problem("conv2d", (2, 4, 6, 7), (6, 4, 3, 2), {"stride": (1, 2), "padding": 1}),
    Problem("conv3d", (2, 2, 4, 5, 4), (3, 2, 2, 2, 3)),
    Problem("conv_transpose2d", (2, 4, 4, 5), (4, 3, 3, 2), {"stride": 2}),
]


@every_float
@pytest.mark.parametrize("problem", LAYOUT_PROBLEMS, ids=str)
def test_layouts(problem: Problem, dtype: torch.dtype) -> None:
    with poisoned():
        for n, (of_weight, lay) in enumerate(LAYOUTS.items()):
            for k, of_mask in enumerate(LAYOUTS):
                of_input = list(LAYOUTS)[(n + k) % len(LAYOUTS)]
                mask = LAYOUTS[of_mask](mask_of("half", *problem.weight))
                weight = lay(integers(*problem.weight, dtype=dtype))
                if not of_weight.startswith("expanded"):
                    weight.copy_(spoiled(weight, mask))
                input = LAYOUTS[of_input](integers(*problem.input, dtype=dtype))
                bias = LAYOUTS[of_input](integers(problem.out_channels, dtype=dtype))
                check_against_dense(problem, input, weight, mask, bias, of_input, of_weight, of_mask)


@pytest.mark.parametrize("format_of", ["input", "weight", "both", "neither"])
@pytest.mark.parametrize("function", ["conv2d", "conv_transpose2d", "conv3d"])
def test_memory_format_is_that_of_the_dense_operation(function: str, format_of: str) -> None:
    shape = (2, 8, 6, 6, 6)[: 5 if function == "conv3d" else 4]
    kernel = (8, 8, 3, 3, 3)[: len(shape)]
    memory_format = torch.channels_last_3d if function == "conv3d" else torch.channels_last
    x, w, mask = integers(*shape), integers(*kernel), mask_of("half", *kernel)
    x = x.contiguous(memory_format=memory_format) if format_of in ("input", "both") else x
    w = w.contiguous(memory_format=memory_format) if format_of in ("weight", "both") else w
    ours, theirs = ([t.clone().requires_grad_() for t in (x, w)] for _ in range(2))
    y = OURS[function](*ours, mask, padding=1)
    expected = TORCHS[function](theirs[0], theirs[1] * mask, padding=1)
    assert y.stride() == expected.stride()
    grad = torch.randn_like(y)
    y.backward(grad)
    expected.backward(grad)
    assert ours[0].grad.stride() == theirs[0].grad.stride()
    torch.testing.assert_close(ours[0].grad, theirs[0].grad)
    torch.testing.assert_close(ours[1].grad, theirs[1].grad)


@pytest.mark.parametrize("path", PATHS)
def test_of_one_dimension_results_are_contiguous(path: str) -> None:
    """However the weight lies, and whichever path is taken: the fakes promise it."""
    x, w, g = integers(2, 5, 9), integers(6, 3, 5).transpose(1, 2), integers(2, 6, 7)
    mask = mask_of("some rows", 6, 5, 3)
    mask[0], mask[1] = False, True  # a channel is pruned, another is not
    with running_on(path):
        try:
            y = masked_ops.masked_conv1d(x, w, mask)
            grad_input = _ops.convolution_grad_input(g, w, mask, [2, 5, 9], [1], [0], [1], False, [0], 1)
        except RuntimeError as error:
            assert refuses(path, error)
            return
    assert_exact(y, F.conv1d(x, w * mask))
    assert y.is_contiguous() and grad_input.is_contiguous()


@every_float
@pytest.mark.parametrize(
    "problem", [p for p in PROBLEMS if 0 not in p.input and p.options.get("padding") != "same"], ids=str
)
def test_as_accurate_as_torch(problem: Problem, dtype: torch.dtype) -> None:
    mask = mask_of("half", *problem.weight)
    input, weight = normal(*problem.input, dtype=dtype), normal(*problem.weight, dtype=dtype)
    bias = normal(problem.out_channels, dtype=dtype)
    results = []
    for convert in (lambda t: t, lambda t: t, torch.Tensor.double):
        x, w, b = (convert(t.detach()).requires_grad_() for t in (input, weight, bias))
        if not results:
            y = OURS[problem.function](x, w, mask, b, **problem.options)
        else:
            y = TORCHS[problem.function](x, masked(w, mask), b, **problem.options)
        grad = torch.ones_like(y)
        results.append((y, *torch.autograd.grad(y, (x, w, b), grad)))
    for name, ours, torchs, exact in zip(("output", "input", "weight", "bias"), *results, strict=True):
        assert_accurate(ours, torchs, exact, name, problem)


@every_float
@pytest.mark.parametrize("mask_dtype", MASK_DTYPES, ids=name_of)
def test_masks_of_every_dtype(mask_dtype: torch.dtype, dtype: torch.dtype) -> None:
    problem = Problem("conv2d", (2, 4, 6, 7), (6, 4, 3, 2), {"padding": 1})
    binary = mask_of("half", *problem.weight, dtype=mask_dtype)
    input, weight = integers(*problem.input, dtype=dtype), integers(*problem.weight, dtype=dtype)
    check_against_dense(problem, input, spoiled(weight, binary), binary, None, "binary")
    if mask_dtype != torch.bool:
        check_against_dense(problem, input, weight, binary * 3, None, "soft")


def test_options_as_numbers_and_sequences() -> None:
    x, w, mask = integers(2, 4, 7, 9), integers(4, 4, 3, 3), mask_of("half", 4, 4, 3, 3)
    expected = F.conv2d(x, masked(w, mask), None, 2, 1, 1, 1)
    for stride in (2, (2,), [2], (2, 2), torch.Size([2, 2])):
        for padding in (1, (1,), [1, 1]):
            assert_exact_sums(masked_ops.masked_conv2d(x, w, mask, None, stride, padding, 1, 1), expected)


def test_arguments_stand_in_torchs_order() -> None:
    """Mask after weight, the rest by position as in torch: dilation before groups, but for transposed ones after."""
    x, w, mask, bias = integers(2, 4, 7, 7), integers(6, 2, 3, 3), mask_of("half", 6, 2, 3, 3), integers(6)
    y = masked_ops.masked_conv2d(x, w, mask, bias, 2, 1, 2, 2)
    assert_exact_sums(y, F.conv2d(x, masked(w, mask), bias, 2, 1, 2, 2))
    w, mask = integers(4, 3, 3, 3), mask_of("half", 4, 3, 3, 3)
    assert_exact_sums(
        masked_ops.masked_conv_transpose2d(x, w, mask, bias, 2, 1, 1, 2, 3),
        F.conv_transpose2d(x, masked(w, mask), bias, 2, 1, 1, 2, 3),
    )


def test_no_channels() -> None:
    """An input without channels has an output of torch's, and a bias with a gradient of zero."""
    x, w, bias = torch.ones(2, 0, 6, 6), torch.ones(6, 0, 3, 3), torch.ones(6)
    results = []
    for convolve in (
        lambda x, w, b: F.conv2d(x, w * torch.ones_like(w), b),
        lambda x, w, b: masked_ops.masked_conv2d(x, w, torch.ones_like(w), b),
    ):
        leaves = [t.clone().requires_grad_() for t in (x, w, bias)]
        y = convolve(*leaves)
        y.sum().backward()
        results.append([y, *(leaf.grad for leaf in leaves)])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


# --- the closed family -----------------------------------------------------------------------------------------------


def family_arguments(problem: Problem) -> tuple[dict[str, tuple], Tensor, Tensor, Tensor]:
    """The three operations with the arguments that the problem means, and its tensors with gradient in float64."""
    n = len(problem.weight) - 2
    options = problem.options

    def numbers(name: str, default: int) -> list[int]:
        value = options.get(name, default)
        return list(value) if isinstance(value, tuple) else [value] * n

    batched = problem.input if len(problem.input) == n + 2 else (1, *problem.input)
    geometry = (
        numbers("stride", 1),
        numbers("padding", 0),
        numbers("dilation", 1),
        problem.transposed,
        numbers("output_padding", 0),
        options.get("groups", 1),
    )
    mask = mask_of("half", *problem.weight)
    x, w = integers(*batched), spoiled(integers(*problem.weight), mask)
    exact_x = x.double().requires_grad_()
    exact_w = torch.where(mask, w, 0).double().requires_grad_()
    y = torch.ops.aten.convolution(exact_x, exact_w, None, *geometry)
    grad = integers(*y.shape)
    gx, gw = torch.autograd.grad(y, (exact_x, exact_w), grad.double())
    calls = {
        "convolution": (x, w, mask, None, *geometry),
        "convolution_grad_input": (grad, w, mask, list(x.shape), *geometry),
        "convolution_grad_weight": (grad, x, mask, *geometry),
    }
    return calls, y.detach(), gx, gw * mask


@pytest.mark.parametrize("implementation", [_ops, reference], ids=["ops", "reference"])
@pytest.mark.parametrize("problem", [p for p in PROBLEMS if not isinstance(p.options.get("padding"), str)], ids=str)
def test_family(problem: Problem, implementation: Any) -> None:
    calls, *exact = family_arguments(problem)
    with poisoned():
        for (op, arguments), expected in zip(calls.items(), exact, strict=True):
            assert_exact_sums(getattr(implementation, op)(*arguments), expected, op)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    n = draw(st.integers(1, 3))
    small = st.integers(1, 3)
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    transposed = draw(st.booleans())
    kernel = [draw(small) for _ in range(n)]
    space = [draw(st.integers(1, 9)) for _ in range(n)]
    options: dict[str, Any] = {
        name: draw(st.tuples(*[values] * n) | values)
        for name, values in {"stride": small, "padding": st.integers(0, 2), "dilation": st.integers(1, 2)}.items()
    }
    into, out = draw(small) * groups, draw(small)
    options["groups"] = groups
    if transposed:
        options["output_padding"] = draw(st.integers(0, 1))
        weight = (into, out, *kernel)
    else:
        weight = (out * groups, into // groups, *kernel)
    batch = draw(st.sampled_from([(), (1,), (3,)]))
    return Problem(f"conv{'_transpose' * transposed}{n}d", (*batch, into, *space), tuple(weight), options)


@settings(max_examples=100)
@given(problems(), st.sampled_from(FLOATS), st.integers(0, 2**32), st.sampled_from(list(PATTERNS)))
def test_any_geometry(problem: Problem, dtype: torch.dtype, seed: int, pattern: str) -> None:
    torch.manual_seed(seed)
    mask = mask_of(pattern, *problem.weight)
    input, weight = integers(*problem.input, dtype=dtype), spoiled(integers(*problem.weight, dtype=dtype), mask)
    bias = integers(problem.out_channels, dtype=dtype)
    with poisoned():
        for convert in (torch.Tensor.double, torch.Tensor.clone):
            x, w = convert(input).requires_grad_(), convert(torch.zeros_like(weight)).requires_grad_()
            try:
                y = TORCHS[problem.function](x, w, **problem.options)
                torch.autograd.grad(y, (x, w), torch.ones_like(y))  # cuDNN goes forward to no output, but not back
            except RuntimeError:
                assume(False)
        check_against_dense(problem, input, weight, mask, bias)


@compiled_only
@pytest.mark.parametrize("threads", [1, 2])
def test_same_bits_from_run_to_run(threads: int) -> None:
    torch.set_num_threads(threads)
    calls, *_ = family_arguments(Problem("conv2d", (8, 17, 14, 14), (33, 17, 3, 3), {"padding": (1, 1)}))
    for op, arguments in calls.items():
        results = [getattr(_ops, op)(*arguments) for _ in range(3)]
        assert all(torch.equal(result, results[0]) for result in results), op


@compiled_only
def test_threads_share_no_scratch() -> None:
    """Weights are masked into memory that a thread keeps: neither another thread nor the next layer may see it."""
    layers = []
    for channels in (4, 9, 6):
        x, w, mask = integers(2, 5, 9, 9), integers(channels, 5, 3, 3), mask_of("half", channels, 5, 3, 3)
        dense = (w * mask).double().requires_grad_()
        y = F.conv2d(x.double(), dense)
        layers.append((x, w, mask, y.detach(), torch.autograd.grad(y, dense, torch.ones_like(y))[0] * mask))
    failures: list[BaseException] = []

    def run(first: int) -> None:
        try:
            for i in range(60):
                x, w, mask, expected, expected_grad = layers[(first + i) % len(layers)]
                weight = w.clone().requires_grad_()
                y = masked_ops.masked_conv2d(x, weight, mask)
                assert_exact_sums(y, expected)
                assert_exact_sums(torch.autograd.grad(y, weight, torch.ones_like(y))[0], expected_grad)
        except BaseException as error:
            failures.append(error)

    with running_on("copy"):
        threads = [threading.Thread(target=run, args=(n,)) for n in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


# --- past torch.ops --------------------------------------------------------------------------------------------------

PLAIN = (2, 1, (1, 1), 1, False, 0)  # stride, padding, dilation, groups, transposed, output_padding


class Subclass(Tensor):
    """What has a say in every call that it takes part in."""


LEFT_TO_TORCH_OPS = [
    ("n", 3),
    ("n", 0),
    ("n", True),
    ("input", torch.ones(3, 5, 5)),
    ("input", torch.ones(2, 3, 5, 5).as_subclass(Subclass)),
    ("weight", torch.ones(4, 3, 3)),
    ("weight", torch.ones(4, 3, 3, 3, dtype=torch.cfloat)),
    ("mask", None),
    ("bias", 1.0),
    *(
        (name, value)
        for name in ("stride", "padding", "dilation")
        for value in ("same", (1,), (1, 1, 1), 1.0, True, -1)
    ),
    ("stride", (2**31, 1)),
    ("stride", 2**70),
    ("groups", (1,)),
    ("groups", True),
    ("transposed", 0),
    ("output_padding", torch.tensor(0)),
]


@compiled_only
@pytest.mark.parametrize(("name", "value"), LEFT_TO_TORCH_OPS)
def test_unusual_arguments_take_the_way_of_torch_ops(name: str, value: Any) -> None:
    names = ("n", "input", "weight", "mask", "bias", "stride", "padding", "dilation", "groups", "transposed")
    ones = torch.ones(4, 3, 3, 3)
    arguments = dict(
        zip((*names, "output_padding"), (2, torch.ones(2, 3, 5, 5), ones, ones, None, *PLAIN), strict=True)
    )
    bits = torch.full((4, 4), 255, dtype=torch.uint8)
    bits[:, 3] = 7
    whole = {"weight_values": torch.ones(108), "weight_bits": bits, "weight_size": ones.shape}
    packed = {"n": 2, "input": arguments["input"], **whole, **dict(list(arguments.items())[4:])}
    masked_ops.is_available()
    with past_function_modes():
        assert _ops.direct.convolution(*arguments.values()) is not None
        assert _ops.direct.convolution(*(arguments | {name: value}).values()) is None
        assert _ops.direct.convolution(*list(arguments.values())[1:]) is None
        assert _ops.direct.packed_convolution(*packed.values()) is not None
        if name not in ("weight", "mask"):
            assert _ops.direct.packed_convolution(*(packed | {name: value}).values()) is None
        for size in (4, (4, 3, 3), (4, 3, 3, 3.0), torch.tensor([4, 3, 3, 3])):
            assert _ops.direct.packed_convolution(*(packed | {"weight_size": size}).values()) is None


@compiled_only
def test_function_modes_take_the_way_of_torch_ops() -> None:
    ones = torch.ones(4, 3, 3, 3)
    masked_ops.is_available()
    with torch.device(ones.device):
        assert _ops.direct.convolution(2, torch.ones(2, 3, 5, 5), ones, ones, None, *PLAIN) is None


@compiled_only
@pytest.mark.parametrize("stride", [2, (2, 2), [2, 2], torch.Size((2, 2))], ids=repr)
def test_numbers_past_torch_ops(stride: Any) -> None:
    x, w, mask, bias = integers(2, 3, 9, 8), integers(4, 3, 3, 2), integers(4, 3, 3, 2) > 0, integers(4)
    masked_ops.is_available()
    with past_function_modes():
        out = _ops.direct.convolution(2, x, w, mask, bias, stride, (1, 0), [1, 2], 1, False, 0)
        assert out is not None
        y = _ops.direct.convolution(2, out, w, mask, None, stride, (1, 0), 1, 1, True, (1, 0))
        assert y is not None
    assert_exact_sums(out, F.conv2d(x, w * mask, bias, 2, (1, 0), (1, 2)))
    assert_exact_sums(y, F.conv_transpose2d(out, w * mask, None, 2, (1, 0), (1, 0)))
