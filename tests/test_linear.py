"""masked_linear and the closed family of linear operations: values, layouts, dtypes, masks, determinism, threads."""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import os
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from generators import (
    CAPABILITIES,
    DEEP_SHAPES,
    FLOATS,
    INTEGERS,
    LARGE_SHAPES,
    LAYOUTS,
    MASK_DTYPES,
    PATHS,
    PATTERNS,
    SHAPES,
    assert_accurate,
    assert_exact,
    compiled_only,
    every_capability,
    every_float,
    every_path_and_float,
    integers,
    mask_of,
    masked,
    name_of,
    normal,
    on_each_device,
    poison_scratch,
    poisoned,
    refuses,
    run_each_in_a_process,
    running_on,
    serves_linear,
    spoiled,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import RunPython
from torch import Tensor
from torch.nn import functional as F

import masked_ops
from masked_ops import _ops, _recipe, reference

pytestmark = pytest.mark.usefixtures("device")

# --- values ----------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    name: str
    input: Tensor
    weight: Tensor
    mask: Tensor
    bias: Tensor | None
    grad_output: Tensor
    masked_weight: Tensor

    def calls(self) -> dict[str, tuple]:
        """The operations of the family with their arguments."""
        return {
            "linear": (self.input, self.weight, self.mask, self.bias),
            "linear_grad_input": (self.grad_output, self.weight, self.mask),
            "linear_grad_weight": (self.grad_output, self.input, self.mask),
        }

    def exact(self) -> dict[str, Tensor]:
        """Their results, by torch in float64."""
        x, w, g = self.input.double(), self.masked_weight.double(), self.grad_output.double()
        y = x @ w.t()
        return {
            "linear": y if self.bias is None else y + self.bias.double(),
            "linear_grad_input": g @ w,
            "linear_grad_weight": (g.t() @ x) * (self.mask != 0),
        }

    def by_torch(self) -> dict[str, Tensor]:
        """Their results, by torch in the dtype of the case."""
        return {
            "linear": F.linear(self.input, self.masked_weight, self.bias),
            "linear_grad_input": self.grad_output @ self.masked_weight,
            "linear_grad_weight": (self.grad_output.t() @ self.input) * (self.mask != 0),
        }


def make_case(shape: tuple[int, int, int], n: int, values, dtype: torch.dtype) -> Case:
    """The n-th case: the pattern, the layouts, the mask's dtype and whether there is a bias go round with n."""
    M, N, K = shape
    pattern = list(PATTERNS)[n % len(PATTERNS)]
    layouts = [list(LAYOUTS)[n // step % len(LAYOUTS)] for step in (1, 3, 5)]
    mask = LAYOUTS[layouts[0]](mask_of(pattern, N, K, dtype=MASK_DTYPES[n % len(MASK_DTYPES)]))
    weight = values(N, K, dtype=dtype)
    return Case(
        f"{M}x{N}x{K} {pattern}, mask {layouts[0]}, input {layouts[1]}, grad_output {layouts[2]}",
        LAYOUTS[layouts[1]](values(M, K, dtype=dtype)),
        spoiled(weight, mask),
        mask,
        values(N, dtype=dtype) if n % 3 else None,
        LAYOUTS[layouts[2]](values(M, N, dtype=dtype)),
        torch.where(mask != 0, weight, 0),
    )


@on_each_device
def integer_cases(dtype: torch.dtype) -> list[tuple[Case, dict[str, Tensor]]]:
    torch.manual_seed(1)
    shapes = [*SHAPES, *LARGE_SHAPES, *(DEEP_SHAPES if dtype.itemsize >= 4 else ())]
    cases = [make_case(shape, n, integers, dtype) for n, shape in enumerate(shapes)]
    return [(case, case.exact()) for case in cases]


@on_each_device
def normal_cases(dtype: torch.dtype) -> list[tuple[Case, dict[str, Tensor], dict[str, Tensor]]]:
    torch.manual_seed(2)
    cases = [make_case(shape, n, normal, dtype) for n, shape in enumerate([*SHAPES[::11], *LARGE_SHAPES])]
    return [(case, case.exact(), case.by_torch()) for case in cases]


def call(path: str | None, op: str, arguments: tuple) -> Tensor | None:
    """The result of an operation, or None if the forced path says that it cannot serve."""
    try:
        return getattr(_ops, op)(*arguments)
    except RuntimeError as error:
        if not refuses(path, error):
            raise
        return None


@every_capability
@every_path_and_float
def test_family_is_exact_on_integers(path: str | None, dtype: torch.dtype, capability: str) -> None:
    served = set()
    torch.set_num_threads(max(torch.get_num_threads(), 2))
    with running_on(path, capability), poisoned():
        poison_scratch()
        for case, exact in integer_cases(dtype):
            for op, arguments in case.calls().items():
                result = call(path, op, arguments)
                if result is not None:
                    assert result.dtype == dtype
                    assert_exact(result, exact[op], op, case.name)
                    served.add(op)
    assert "linear" in served


@every_capability
@every_path_and_float
def test_family_is_as_accurate_as_torch(path: str | None, dtype: torch.dtype, capability: str) -> None:
    with running_on(path, capability), poisoned():
        for case, exact, by_torch in normal_cases(dtype):
            for op, arguments in case.calls().items():
                result = call(path, op, arguments)
                if result is not None:
                    assert_accurate(result, by_torch[op], exact[op], op, case.name)


@pytest.mark.cpu_only("about a path of the CPU's")
@pytest.mark.usefixtures("fetching")
@every_capability
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=name_of)
def test_few_rows_against_a_weight_from_memory(dtype: torch.dtype, capability: str) -> None:
    """Beyond what the caches are taken to hold, the order is another one: see kCachedBytes in tuning.h."""
    for columns, rows in ((4100, (1, 2, 6, 7, 8, 16, 24)), (4090, (2,))):
        check_few_rows((16 << 20) // (dtype.itemsize * columns) + 5, columns, rows, dtype, capability)


@pytest.mark.cpu_only("about a path of the CPU's")
@pytest.mark.usefixtures("fetching")
@every_capability
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=name_of)
def test_few_rows_against_a_weight_beyond_l2(dtype: torch.dtype, capability: str) -> None:
    """See kFarBytes and kDownBytesFar in tuning.h: all heights up to kMostFar, or kMostFarSums pairs, and the next one,
    and then those where grad_input ends to go by rows."""
    torch.set_num_threads(2)
    rows = (*range(1, 14), 16, 17, 20, 21, 24, 25)
    for columns, some in ((1100, rows), (17000, (1, 2))):  # the second of more than a chunk of kFarRowBytes
        check_few_rows((9 << 19) // (dtype.itemsize * columns) + 5, columns, some, dtype, capability)


@pytest.mark.cpu_only("about a path of the CPU's")
@every_capability
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=name_of)
def test_few_rows_against_a_weight_from_caches(dtype: torch.dtype, capability: str) -> None:
    """Tiles of all heights, whole ones and narrower, down blocks of rows whose masks have nothing in common."""
    for columns in (1100, 452):  # more than kDownBytes of AVX2 and less
        check_few_rows(517, columns, range(1, 27), dtype, capability)


@functools.lru_cache(maxsize=2)  # what follows each other is of one dtype
def few_rows_problem(N: int, K: int, rows: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Mask, weight, input, grad_output, and what both give."""
    mask = mask_of("half", N, K)
    weight = spoiled(integers(N, K, dtype=dtype), mask)
    x, g = integers(rows, K, dtype=dtype), integers(rows, N, dtype=dtype)
    dense = torch.where(mask, weight, 0).float()  # sums of small integers are exact
    return mask, weight, x, g, x.float() @ dense.t(), g.float() @ dense


def check_few_rows(N: int, K: int, rows: Collection[int], dtype: torch.dtype, capability: str) -> None:
    mask, weight, x, g, y, dx = few_rows_problem(N, K, max(rows), dtype)
    with running_on("fused", capability), poisoned():
        for M in rows:
            assert_exact(_ops.linear(x[:M], weight, mask), y[:M].to(dtype), "linear", M)
            assert_exact(_ops.linear_grad_input(g[:M], weight, mask), dx[:M].to(dtype), "linear_grad_input", M)


@pytest.mark.cpu_only("about a path of the CPU's")
@pytest.mark.parametrize("shape", ((17, 1700, 3712), (130, 3400, 3744), (128, 3400, 3745)), ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=name_of)
def test_gradient_of_a_large_weight(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    """From kStreamedBytes of tuning.h on it goes past the caches, if its rows are whole lines."""
    M, N, K = shape
    mask = mask_of("half", N, K)
    x, g = integers(M, K, dtype=dtype), integers(M, N, dtype=dtype)
    with running_on("fused", None), poisoned():
        result = _ops.linear_grad_weight(g, x, mask)
    assert_exact(result, torch.where(mask, g.float().t() @ x.float(), 0).to(dtype), "linear_grad_weight", shape)


@compiled_only
@pytest.mark.cpu_only("about an index of the CPU's")
@every_capability
def test_rows_that_fill_a_block_at_the_end_of_the_index(capability: str) -> None:
    """The columns of a segment are read ahead, also behind the last one: the sanitizers see whether there is room."""
    for K in (252, 253, 255, 256, 512):
        mask = mask_of("one row", 40, K)
        x, g = integers(5, K), integers(5, 40)
        with running_on("sparse", capability), poisoned():
            assert_exact(_ops.linear_grad_weight(g, x, mask), (g.t().double() @ x.double()) * mask, K)
            weight = spoiled(integers(40, K), mask)
            assert_exact(_ops.linear(x, weight, mask), x.double() @ masked(weight, mask).t().double(), K)
            assert_exact(_ops.linear_grad_input(g, weight, mask), g.double() @ masked(weight, mask).double(), K)


HALVES = (torch.bfloat16, torch.float16)


@every_capability
@pytest.mark.parametrize("dtype", HALVES, ids=name_of)
@pytest.mark.parametrize("path", [path for path in PATHS if path != "copy"])
def test_sums_are_rounded_once(path: str, dtype: torch.dtype, capability: str) -> None:
    """Along 3701 depths the sums go up to 5500, where 16 bits hold no odd number, and back to 3 or 0."""
    depth = 3701
    steps = torch.full((depth,), 3.0).index_fill_(0, torch.arange(depth // 2 + 1, depth), -3.0).to(dtype)
    half = torch.rand(17, depth // 2 + 1) < 0.8
    mask = torch.cat([half, half[:, :-1].flip(1)], 1)
    weight = spoiled(steps.expand(17, depth), mask)
    expected = 3.0 * half[:, -1]
    with running_on(path, capability), poisoned():
        for M in (1, 9, 40):
            ones = torch.ones(M, depth, dtype=dtype)
            assert_exact(_ops.linear(ones, weight, mask), expected.expand(M, 17), M)
            across = _ops.linear_grad_input(ones, weight.t().contiguous(), mask.t().contiguous())
            assert_exact(across, expected.expand(M, 17), M)
        square = mask_of("half", 40, 50)
        gradient = _ops.linear_grad_weight(torch.ones(depth, 40, dtype=dtype), steps[:, None].repeat(1, 50), square)
        assert_exact(gradient, 3 * square)


@every_capability
@pytest.mark.parametrize("dtype", HALVES, ids=name_of)
@pytest.mark.parametrize("path", [path for path in PATHS if path != "copy"])
def test_every_number_of_16_bits(path: str, dtype: torch.dtype, capability: str) -> None:
    """Each goes in and comes out as it is, and a sum is rounded to the nearest, ties to even."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)[:, None]
    biases = torch.tensor([0.0, 1.0, -3.0, 1000.0, 0.0078125], dtype=dtype)
    with running_on(path, capability), poisoned():
        y = _ops.linear(numbers, torch.ones(5, 1, dtype=dtype), torch.ones(5, 1), biases)
        expected = (numbers.float() + biases.float()).to(dtype)
        if dtype == torch.bfloat16:  # its instructions take subnormal numbers as zero
            subnormal = expected.abs() < torch.finfo(torch.float32).tiny
            assert (y[subnormal].float().abs() <= expected[subnormal].float().abs()).all()
            y, expected = y[~subnormal], expected[~subnormal]
        torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)


@compiled_only
@pytest.mark.cpu_only("about the CPU's kernels")
@every_capability
def test_what_each_path_serves(capability: str) -> None:
    """Nothing above is left out that should be there: copy takes all, the kernels what they have an element for."""
    everything = {1, 4, 64}
    with running_on(capability=capability):
        for path, dtype in itertools.product((None, "copy"), FLOATS):
            assert serves_linear(path, dtype) == serves_linear(path, dtype, soft=True) == everything
        for path, dtype in itertools.product(PATHS, FLOATS):
            if path != "copy":
                assert serves_linear(path, dtype) == (everything if dtype != torch.float64 else set()), (path, dtype)


@compiled_only
@pytest.mark.cpu_only("about the CPU's kernels")
@pytest.mark.skipif(
    os.environ.get("MASKED_OPS_BUILD_CAPABILITIES") != "all",
    reason="MASKED_OPS_BUILD_CAPABILITIES is not all",
)
def test_every_capability_of_this_cpu_is_built() -> None:
    """The parametrisation by capability means nothing if the library holds one only."""
    usable = [name.upper() for name in _recipe.usable_capabilities()]
    assert list(CAPABILITIES) == usable


@every_float
def test_reference_is_exact(dtype: torch.dtype) -> None:
    for case, exact in integer_cases(dtype)[::7]:
        for op, arguments in case.calls().items():
            assert_exact(getattr(reference, op)(*arguments), exact[op], op, case.name)


# --- as a differentiable function ------------------------------------------------------------------------------------


def check_against_dense(
    input: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, *context: object, exact: bool = True
) -> None:
    """Output and gradients equal those of F.linear over the masked weight, in float64."""
    tensors = [input, weight, bias]
    ours = [None if t is None else t.detach().requires_grad_() for t in tensors]
    theirs = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
    # NaN below a zero of the mask is no part of the weight: the definition in float64 must not meet it either.
    dense = masked(torch.where(mask != 0, theirs[1], 0), mask)
    y = masked_ops.masked_linear(ours[0], ours[1], mask, ours[2])
    expected = F.linear(theirs[0], dense, theirs[2])
    compare = assert_exact if exact else torch.testing.assert_close
    compare(y, expected, *context)
    grad = integers(*y.shape, dtype=y.dtype)
    ours_required = [t for t in ours if t is not None]
    theirs_required = [t for t in theirs if t is not None]
    grads = torch.autograd.grad(y, ours_required, grad)
    expected_grads = torch.autograd.grad(expected, theirs_required, grad.double())
    for name, actual, wanted in zip(("input", "weight", "bias"), grads, expected_grads, strict=False):
        assert actual.dtype == input.dtype
        compare(actual, wanted, f"grad_{name}", *context)


@every_path_and_float
def test_layouts(path: str | None, dtype: torch.dtype) -> None:
    served = 0
    with running_on(path), poisoned():
        for n, (of_weight, of_mask) in enumerate(itertools.product(LAYOUTS, LAYOUTS)):
            of_input = list(LAYOUTS)[n // 3 % len(LAYOUTS)]
            of_bias = list(LAYOUTS)[n // 5 % len(LAYOUTS)]
            mask = LAYOUTS[of_mask](mask_of("half", 19, 37, dtype=MASK_DTYPES[n % len(MASK_DTYPES)]))
            weight = LAYOUTS[of_weight](integers(19, 37, dtype=dtype))
            if not of_weight.startswith("expanded"):
                weight.copy_(spoiled(weight, mask))
            input = LAYOUTS[of_input](integers(*[(11, 37), (3, 5, 37), (2, 3, 2, 37), (37,)][n % 4], dtype=dtype))
            bias = LAYOUTS[of_bias](integers(19, dtype=dtype))
            try:
                check_against_dense(input, weight, mask, bias, of_input, of_weight, of_mask, of_bias)
                served += 1
            except RuntimeError as error:
                if not refuses(path, error):
                    raise
    assert served


@pytest.mark.parametrize("path", [None, *PATHS])
@pytest.mark.parametrize(
    "shape",
    [(0, 4, 3), (2, 0, 3), (2, 4, 0), (0, 0, 0), (0, 4, 0), (2, 0, 0), (0, 0, 3)],
    ids=lambda shape: "x".join(map(str, shape)),
)
def test_zero_sizes(shape: tuple[int, int, int], path: str | None) -> None:
    M, N, K = shape
    with running_on(path), poisoned():
        for bias in (None, integers(N)):
            check_against_dense(integers(M, K), integers(N, K), mask_of("half", N, K), bias, shape)
            check_against_dense(integers(3, M, 2, K), integers(N, K), torch.ones(N, K), bias, shape)
        assert_exact(_ops.linear_grad_input(integers(M, N), integers(N, K), torch.ones(N, K)), torch.zeros(M, K))
        assert_exact(_ops.linear_grad_weight(integers(M, N), integers(M, K), torch.ones(N, K)), torch.zeros(N, K))


@every_float
def test_ranks(dtype: torch.dtype) -> None:
    weight, mask, bias = integers(5, 7, dtype=dtype), mask_of("half", 5, 7), integers(5, dtype=dtype)
    for lead in [(), (1,), (3,), (2, 3), (1, 2, 1), (2, 1, 3, 2), (0,), (2, 0, 3)]:
        check_against_dense(integers(*lead, 7, dtype=dtype), weight, mask, bias, lead)
        check_against_dense(integers(*lead, 7, dtype=dtype), weight, mask, None, lead)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)], ids=str)
def test_weight_of_one_dimension(lead: tuple[int, ...]) -> None:
    check_against_dense(integers(*lead, 7), integers(7), mask_of("half", 1, 7)[0], None)


@pytest.mark.parametrize("shape", [(), (1,), (1, 5), (3, 5), (3, 1)], ids=str)
def test_bias_that_broadcasts(shape: tuple[int, ...]) -> None:
    check_against_dense(integers(3, 7), integers(5, 7), mask_of("half", 5, 7), integers(*shape))


# --- masks -----------------------------------------------------------------------------------------------------------


@every_float
@pytest.mark.parametrize("mask_dtype", MASK_DTYPES, ids=name_of)
def test_binary_mask_of_every_dtype_selects(mask_dtype: torch.dtype, dtype: torch.dtype) -> None:
    mask = mask_of("half", 33, 70, dtype=mask_dtype)
    check_against_dense(
        integers(9, 70, dtype=dtype), spoiled(integers(33, 70, dtype=dtype), mask), mask, integers(33, dtype=dtype)
    )


@every_float
@pytest.mark.parametrize("mask_dtype", [*INTEGERS, *FLOATS], ids=name_of)
def test_soft_mask_of_every_dtype_multiplies(mask_dtype: torch.dtype, dtype: torch.dtype) -> None:
    values = [0.0, 1.0, 2.0] if mask_dtype == torch.uint8 else [0.0, 1.0, 2.0, -1.0]
    if mask_dtype.is_floating_point:
        values.append(0.5)
    mask = torch.tensor(values)[torch.randint(len(values), (33, 70))].to(mask_dtype)
    problem = integers(9, 70, dtype=dtype), integers(33, 70, dtype=dtype), mask, integers(33, dtype=dtype)
    for path in (None, *PATHS):
        if serves_linear(path, dtype, soft=True):
            with running_on(path), poisoned():
                check_against_dense(*problem, path)


@pytest.mark.parametrize("where", ["first", "middle", "last"])
@pytest.mark.parametrize("value", [2.0, -1.0, 0.5, 1 + 2**-23, float("nan"), float("inf"), 5e-324])
def test_one_soft_value_makes_a_mask_soft(value: float, where: str) -> None:
    weight = integers(50, 67) * 2 + 1
    mask = mask_of("half", 50, 67, dtype=torch.float64)
    mask.view(-1)[{"first": 0, "middle": 1717, "last": -1}[where]] = value
    x = integers(3, 67)
    torch.testing.assert_close(
        masked_ops.masked_linear(x, weight, mask), F.linear(x, masked(weight, mask)), equal_nan=True
    )


def test_negative_zero_prunes() -> None:
    mask = torch.tensor([[1.0, -0.0, 0.0, 1.0]])
    weight = torch.tensor([[1.0, float("nan"), float("inf"), 2.0]])
    for dtype in FLOATS:
        assert masked_ops.masked_linear(torch.ones(1, 4), weight, mask.to(dtype)).item() == 3.0


def test_soft_mask_prunes_where_it_is_zero_too() -> None:
    """where(mask == 0, 0, weight * mask): what lies below a zero has no effect, soft or not."""
    mask = torch.tensor([[0.5, 0.0, 1.0]])
    weight = torch.tensor([[4.0, float("nan"), 1.0]])
    assert masked_ops.masked_linear(torch.ones(1, 3), weight, mask).item() == 3.0


def test_mask_is_taken_in_the_dtype_of_the_weight() -> None:
    weight, x = torch.ones(1, 2, dtype=torch.float16), torch.ones(1, 2, dtype=torch.float16)
    tiny = torch.tensor([[1.0, 1e-12]])  # 0 in float16
    assert masked_ops.masked_linear(x, weight, tiny).item() == 1.0
    weight = torch.tensor([[1.0, float("nan")]], dtype=torch.float16)
    assert masked_ops.masked_linear(x, weight, tiny).item() == 1.0


# --- hypothesis ------------------------------------------------------------------------------------------------------


@st.composite
def problems(draw: st.DrawFn) -> tuple:
    lead = draw(st.lists(st.integers(0, 20), min_size=0, max_size=3))
    N, K = draw(st.integers(0, 130)), draw(st.integers(0, 130))
    dtype = draw(st.sampled_from(FLOATS))
    torch.manual_seed(draw(st.integers(0, 2**32)))
    density = draw(st.sampled_from([0.0, 0.02, 0.1, 0.5, 0.9, 1.0]) | st.floats(0, 1))
    mask = (torch.rand(N, K) < density).to(draw(st.sampled_from(MASK_DTYPES)))
    if draw(st.booleans()) and mask.dtype not in (torch.bool, torch.uint8):
        mask = mask * integers(N, K).to(mask.dtype)
    mask = draw(st.sampled_from(list(LAYOUTS.values())))(mask)
    # An expanded weight would have one value below zeros and ones of the mask alike.
    of_weight = draw(st.sampled_from([LAYOUTS[name] for name in LAYOUTS if "expanded" not in name]))
    of_input, of_bias = (draw(st.sampled_from(list(LAYOUTS.values()))) for _ in range(2))
    return (
        of_input(integers(*lead, K, dtype=dtype)),
        of_weight(spoiled(integers(N, K, dtype=dtype), mask)),
        mask,
        of_bias(integers(N, dtype=dtype)) if draw(st.booleans()) else None,
    )


@settings(max_examples=100)
@given(problems(), st.sampled_from([None, *PATHS]), st.sampled_from(CAPABILITIES))
def test_any_shape(problem: tuple, path: str | None, capability: str) -> None:
    with running_on(path, capability), poisoned():
        try:
            check_against_dense(*problem)
        except RuntimeError as error:
            if not refuses(path, error):
                raise


# --- determinism and threads -----------------------------------------------------------------------------------------


@every_capability
@pytest.mark.parametrize("path", [None, *PATHS])
@pytest.mark.parametrize("threads", [1, 2])
def test_same_bits_from_run_to_run(threads: int, path: str | None, capability: str) -> None:
    """Call by call on a forced path. The chosen path may change with a mask's second use, the same way each run."""
    torch.set_num_threads(threads)
    with running_on(path, capability):
        for n, shape in enumerate([(130, 200, 100), (64, 1700, 130), (3, 500, 900)]):
            case = make_case(shape, 5 + n, normal, torch.float32)
            runs = []
            for _ in range(3):
                masked_ops.clear_cache()
                runs.append([call(path, op, case.calls()[op]) for op in case.calls() for _ in range(3)])
            if path is not None:
                runs += [[calls[i - i % 3] for i in range(len(calls))] for calls in runs]
            for run in runs[1:]:
                for first, again in zip(runs[0], run, strict=True):
                    assert (first is None) == (again is None)
                    assert first is None or torch.equal(again, first), case.name


@pytest.mark.cpu_only("its threads are the CPU's")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("threads", [3, 70])
def test_any_number_of_threads(threads: int, path: str) -> None:
    """As many as share the tasks, fewer tasks than threads, and more threads than have shares of their own."""
    torch.set_num_threads(threads)
    with running_on(path), poisoned():
        for n, shape in enumerate(
            [(130, 200, 300), (129, 1700, 130), (577, 100, 300), (9, 900, 700), (2, 70, 3000), (1, 2050, 512)]
        ):
            case = make_case(shape, 5 + n, integers, torch.float32)
            for op, exact in case.exact().items():
                for _ in range(2):
                    if (result := call(path, op, case.calls()[op])) is not None:
                        assert_exact(result, exact, case.name, op)


COUNT_THREADS = """
import os, torch, masked_ops
masked_ops.is_available()
torch.set_num_threads(1)
x, w, m = torch.randn(256, 512), torch.randn(512, 512), torch.rand(512, 512) < 0.5
before = len(os.listdir("/proc/self/task"))
torch.set_num_threads({threads})
with masked_ops.use_path("fused"):
    y = masked_ops.masked_linear(x, w, m)
    torch.ops.masked_ops.linear_grad_input(y, w, m), torch.ops.masked_ops.linear_grad_weight(y, x, m)
assert len(os.listdir("/proc/self/task")) - before == {threads} - 1
"""


@compiled_only
@pytest.mark.cpu_only("about the CPU's threads")
def test_number_of_threads_is_respected(run_python: RunPython, tmp_path: Path) -> None:
    """The calling thread works too: n threads are n - 1 more than there were."""
    code = {f"{threads} threads": COUNT_THREADS.format(threads=threads) for threads in (1, 2, 3)}
    for name, (status, output) in run_each_in_a_process(code, run_python, tmp_path, OMP_NUM_THREADS=None).items():
        assert status == 0, (name, output)


@compiled_only
@pytest.mark.cpu_only("about the CPU's threads")
def test_inside_a_parallel_region_of_somebody_else() -> None:
    """Called by each thread of an OpenMP team, an operation runs on that thread alone, and is right."""
    runtime = _recipe.openmp_runtime()
    if runtime is None or "gomp" not in runtime.name:
        pytest.skip("torch does not use the OpenMP runtime of GCC, whose entry point this test calls")
    x, w, mask = normal(128, 256), normal(192, 256), mask_of("half", 192, 256)
    with running_on("fused"):
        expected = masked_ops.masked_linear(x, w, mask)
        results: list[Tensor] = []

        @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
        def body(_: int) -> None:
            results.append(masked_ops.masked_linear(x, w, mask))
            results.append(_ops.linear_grad_weight(results[-1], x, mask))

        ctypes.CDLL(str(runtime)).GOMP_parallel(body, None, 2, 0)
        assert len(results) == 4
        assert sum(torch.equal(r, expected) for r in results) == 2
        gradient = _ops.linear_grad_weight(expected, x, mask)
        assert sum(torch.equal(r, gradient) for r in results) == 2


@compiled_only
@pytest.mark.cpu_only("about memory that the CPU's kernels keep")
def test_results_do_not_depend_on_what_scratch_memory_held() -> None:
    """A small problem after a large one of NaN, on the same threads and memory."""
    case = make_case((7, 9, 11), 0, integers, torch.float32)
    with running_on("fused"):
        for size in (300, 1000):
            big = torch.full((size, size), math.nan)
            _ops.linear(big, big, torch.ones(size, size))
            _ops.linear_grad_weight(big, big, torch.ones(size, size))
            for op, arguments in case.calls().items():
                assert_exact(getattr(_ops, op)(*arguments), case.exact()[op], op)
