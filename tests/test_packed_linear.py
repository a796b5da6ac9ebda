"""The packed linear family: the remaining weights and one bit a weight in place of a dense weight."""

from __future__ import annotations

import ctypes
import itertools
import mmap
from typing import NamedTuple

import pytest
import torch
from generators import (
    CUDA_PATHS,
    FLOATS,
    LARGE_SHAPES,
    LAYOUTS,
    PACKED_LINEAR_PATHS,
    PATHS,
    PATTERNS,
    SHAPES,
    assert_exact,
    compiled_only,
    every_capability,
    every_float,
    integers,
    mask_of,
    name_of,
    normal,
    on_each_device,
    poison_scratch,
    poisoned,
    refuses,
    running_on,
    serves_linear,
)
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

import masked_ops
from masked_ops import _ops, reference

pytestmark = pytest.mark.usefixtures("device")


def bits_of(mask: Tensor) -> Tensor:
    """uint8 [N, ceil(K / 8)], little bit order."""
    padded = F.pad(mask.to(torch.uint8), (0, -mask.shape[1] % 8))
    powers = 2 ** torch.arange(8)
    return (padded.unflatten(1, (-1, 8)) * powers).sum(2).to(torch.uint8)


class Case(NamedTuple):
    name: str
    mask: Tensor
    bits: Tensor
    values: Tensor
    input: Tensor
    bias: Tensor | None
    grad_output: Tensor
    dense: Tensor  # what is packed

    def calls(self) -> dict[str, tuple]:
        K = self.mask.shape[1]
        return {
            "packed_linear": (self.input, self.values, self.bits, K, self.bias),
            "packed_linear_grad_input": (self.grad_output, self.values, self.bits, K),
            "packed_linear_grad_values": (self.grad_output, self.input, self.bits, len(self.values)),
            "unpack_values": (self.values, self.bits, K),
            "pack_values": (self.dense, self.bits, len(self.values)),
        }

    def exact(self) -> dict[str, Tensor]:
        weight = torch.zeros(self.mask.shape, dtype=torch.float64)
        weight[self.mask] = self.values.double()
        x, g = self.input.double(), self.grad_output.double()
        y = x @ weight.t()
        return {
            "packed_linear": y if self.bias is None else y + self.bias.double(),
            "packed_linear_grad_input": g @ weight,
            "packed_linear_grad_values": (g.t() @ x)[self.mask],
            "unpack_values": weight,
            "pack_values": self.dense.double()[self.mask],
        }


@on_each_device
def cases(dtype: torch.dtype) -> list[tuple[Case, dict[str, Tensor]]]:
    torch.manual_seed(4)
    result = []
    for n, (M, N, K) in enumerate([*SHAPES[::5], *LARGE_SHAPES, (0, 4, 9), (3, 0, 9), (3, 4, 0)]):
        pattern = list(PATTERNS)[n % len(PATTERNS)]
        layouts = [list(LAYOUTS)[n // step % len(LAYOUTS)] for step in (1, 3, 5)]
        mask = mask_of(pattern, N, K)
        result.append(
            Case(
                f"{M}x{N}x{K} {pattern} {layouts}",
                mask,
                bits_of(mask),
                LAYOUTS[layouts[0]](integers(int(mask.sum()), dtype=dtype)),
                LAYOUTS[layouts[1]](integers(M, K, dtype=dtype)),
                integers(N, dtype=dtype) if n % 3 else None,
                LAYOUTS[layouts[2]](integers(M, N, dtype=dtype)),
                integers(N, K, dtype=dtype),
            )
        )
    return [(case, case.exact()) for case in result]


@every_capability
@every_float
@pytest.mark.parametrize("path", [None, *PACKED_LINEAR_PATHS])
def test_family_is_exact_on_integers(path: str | None, dtype: torch.dtype, capability: str) -> None:
    served = 0
    with running_on(path, capability), poisoned():
        for case, exact in cases(dtype):
            calls = case.calls()
            for op, expected in exact.items():
                try:
                    result = getattr(_ops, op)(*calls[op])
                except RuntimeError as error:
                    if not refuses(path, error):
                        raise
                    continue
                assert_exact(result, expected, op, case.name)
                served += 1
    assert served or path not in (None, "copy")


def before_no_memory(source: Tensor) -> Tensor:
    """A copy, behind which is a page that nobody may read."""
    size = source.numel() * source.element_size()
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(address + pages), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    copy = torch.frombuffer(memory, dtype=source.dtype, count=source.numel(), offset=pages - size)
    return copy.copy_(source.flatten()).view(source.shape)


@every_capability
@every_float
@pytest.mark.parametrize("cols", [64, 127, 200])
def test_words_of_every_kind_are_packed_and_unpacked(
    cols: int, dtype: torch.dtype, capability: str, device: str
) -> None:
    """A word at a time moves its elements in other ways where they are few, or none is among the last."""
    if device != "cpu":
        return
    torch.manual_seed(6)
    column = torch.arange(cols)
    ends = [column <= last for last in (0, 6, 7, 8, 55, 56, 62, 63)]
    begins = [column >= first for first in (1, 7, 8, 55, 56, 57, 63)]
    drawn = [torch.rand(cols) < density for density in (0, 0.02, 0.1, 0.15, 0.2, 0.3, 0.6, 0.9, 1) for _ in range(5)]
    rows = torch.stack([*ends, *begins, *drawn])
    weight = torch.randint(1, 256, rows.shape).to(dtype)
    for mask in (rows, rows.flip(0), rows[-1:], *rows[:8].unbind()[2:5]):
        mask = mask.view(-1, cols)
        dense = before_no_memory(weight[: len(mask)])
        with running_on(None, capability), poisoned():
            values = _ops.pack_values(dense, bits_of(mask), int(mask.sum()))
            assert torch.equal(values, dense[mask])
            unpacked = _ops.unpack_values(before_no_memory(values), bits_of(mask), cols)
        assert torch.equal(unpacked, torch.where(mask, dense, 0))


# More than is laid out densely at once: the piece of few rows of input and of many, and more rows than are taken at a
# time, with one dtype.
PIECES = (
    ((3, 1100, 1000), FLOATS),
    ((40, 1000, 1100), FLOATS),
    ((2050, 740, 720), (torch.float32,)),
)


@every_capability
@pytest.mark.parametrize(("shape", "dtype"), [(shape, dtype) for shape, dtypes in PIECES for dtype in dtypes])
def test_masked_gemm_takes_a_large_weight_in_pieces(
    shape: tuple[int, int, int], dtype: torch.dtype, capability: str, device: str
) -> None:
    if device != "cpu" or not serves_linear("fused", dtype):
        return
    torch.manual_seed(5)
    M, N, K = shape
    mask = mask_of("half", N, K)
    values = integers(int(mask.sum()), dtype=dtype)
    case = Case(
        "",
        mask,
        bits_of(mask),
        values,
        integers(M, K, dtype=dtype),
        integers(N, dtype=dtype),
        integers(M, N, dtype=dtype),
        integers(N, K, dtype=dtype),
    )
    calls = case.calls()
    exact = case.exact()
    with running_on("fused", capability), poisoned():
        for op in ("packed_linear", "packed_linear_grad_input", "packed_linear_grad_values"):
            assert_exact(getattr(_ops, op)(*calls[op]), exact[op], op, str(shape))


# Around the edges of what is expanded or compressed in registers: rows of the weight that are taken together and the
# last, which are read from a copy; vectors, words, tiles and chunks of columns; weights whose parts threads share.
FEW_ROWS = (
    (1, 1),
    (3, 16),
    (5, 17),
    (8, 31),
    (9, 33),
    (2, 63),
    (4, 64),
    (13, 65),
    (6, 97),
    (33, 130),
    (21, 193),
    (70, 300),
    (50, 1100),
    (31, 1600),
    (300, 70),
)
LONG_ROWS = ((7, 4100), (5, 8300), (40, 4097))


def between_nans(values: Tensor) -> Tensor:
    """Contiguous, and NaN before and behind."""
    nans = torch.full((100,), float("nan"), dtype=values.dtype)
    return torch.cat([nans, values, nans])[100 : 100 + len(values)]


@on_each_device
def few_rows_cases(dtype: torch.dtype) -> list[tuple[Case, dict[str, Tensor]]]:
    torch.manual_seed(6)
    patterns = ("half", "most", "all", "some rows", "none", "tenth", "diagonal", "one row", "two of four", "single")
    shapes = [(M, *sides) for M in (*range(1, 18), 24, 25) for sides in FEW_ROWS]
    shapes += [(M, *sides) for M in (1, 2, 5, 12, 16) for sides in LONG_ROWS]
    # Compressed in registers, of 16 bits, if a row has many values.
    shapes += [(M, *sides) for M in (31, 32, 33, 63, 64, 65) for sides in ((33, 130), (21, 193), (50, 1100))]
    result = []
    for i, (M, N, K) in enumerate(shapes):
        pattern = patterns[(i + i // len(FEW_ROWS)) % len(patterns)]
        mask = mask_of(pattern, N, K)
        case = Case(
            f"{M}x{N}x{K} {pattern}",
            mask,
            bits_of(mask),
            between_nans(integers(int(mask.sum()), dtype=dtype)),
            integers(M, K, dtype=dtype),
            integers(N, dtype=dtype),
            integers(M, N, dtype=dtype),
            integers(N, K, dtype=dtype),
        )
        result.append((case, case.exact()))
    return result


@pytest.mark.cpu_only("about a path of the CPU's")
@every_capability
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("threads", [1, 3])
def test_few_rows_against_many_weights(threads: int, dtype: torch.dtype, capability: str) -> None:
    torch.set_num_threads(threads)
    with running_on("fused", capability), poisoned():
        poison_scratch()
        for case, exact in few_rows_cases(dtype):
            calls = case.calls()
            x, values, bits, K, bias = calls["packed_linear"]
            for op in ("packed_linear", "packed_linear_grad_input", "packed_linear_grad_values"):
                assert_exact(getattr(_ops, op)(*calls[op]), exact[op], op, case.name)
            unbiased = exact["packed_linear"] - bias.double()
            assert_exact(_ops.packed_linear(x, values, bits, K), unbiased, case.name)


@pytest.mark.cpu_only("about a path of the CPU's")
@pytest.mark.usefixtures("fetching")
@every_capability
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=name_of)
def test_few_rows_against_values_beyond_l2(dtype: torch.dtype, capability: str) -> None:
    """See kFarBytes and kDownBytesFar in tuning.h: all heights of tiles, alone and beside others."""
    torch.set_num_threads(2)
    N, K = (6 << 20) // (dtype.itemsize * 1100), 1100
    mask = mask_of("half", N, K)
    values = between_nans(integers(int(mask.sum()), dtype=dtype))
    assert values.nbytes > 5 << 19
    bits, weight = bits_of(mask), torch.zeros(N, K).masked_scatter(mask, values.float())
    x, g = integers(25, K, dtype=dtype), integers(25, N, dtype=dtype)
    y, dx = x.float() @ weight.t(), g.float() @ weight  # sums of small integers are exact
    with running_on("fused", capability), poisoned():
        for M in (*range(1, 18), 20, 23, 24, 25):
            assert_exact(_ops.packed_linear(x[:M], values, bits, K), y[:M].to(dtype), M)
            assert_exact(_ops.packed_linear_grad_input(g[:M], values, bits, K), dx[:M].to(dtype), M)


@pytest.mark.cpu_only("about a choice for the CPU")
@compiled_only
@every_capability
def test_grad_input_of_a_tall_weight(capability: str) -> None:
    """Of many rows the masked GEMM would lay out a piece of more than 8 MB; few are expanded in registers."""
    if capability == "DEFAULT":
        pytest.skip("has no few-row kernels")
    N, K = 14000, 192
    mask = torch.rand(N, K) < 0.75
    values, bits = normal(int(mask.sum())), bits_of(mask)
    for M, few in ((2, True), (8, True), (64, False)):
        g = normal(M, N)
        results = []
        for path in (None, "fused", "sparse"):
            with running_on(path, capability):
                results.append(_ops.packed_linear_grad_input(g, values, bits, K))
        chosen, fused, sparse = results
        assert (torch.equal(chosen, fused), torch.equal(sparse, fused)) == (few, False), M


@pytest.mark.cpu_only("about memory of the CPU's")
@every_capability
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mprotect"), reason="needs memory that cannot be read")
def test_nothing_is_read_behind_the_values(dtype: torch.dtype, capability: str) -> None:
    torch.manual_seed(7)
    memory = mmap.mmap(-1, 64 * mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    guard = ctypes.c_void_p(address + 63 * mmap.PAGESIZE)
    assert ctypes.CDLL(None).mprotect(guard, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    with running_on("fused", capability):
        for pattern, (M, N, K) in itertools.product(
            ("half", "all", "tenth", "single", "some rows"),
            ((1, 9, 130), (2, 4, 64), (5, 33, 300), (8, 1, 16), (16, 70, 97)),
        ):
            mask = mask_of(pattern, N, K)
            nnz = int(mask.sum())
            if nnz == 0:
                continue
            values = torch.frombuffer(memory, dtype=dtype, count=nnz, offset=63 * mmap.PAGESIZE - nnz * dtype.itemsize)
            values.copy_(integers(nnz, dtype=dtype))
            x, g = integers(M, K, dtype=dtype), integers(M, N, dtype=dtype)
            weight = torch.zeros(N, K, dtype=torch.float64).masked_scatter(mask, values.double())
            bits = bits_of(mask)
            assert_exact(_ops.packed_linear(x, values, bits, K), x.double() @ weight.t(), pattern)
            assert_exact(_ops.packed_linear_grad_input(g, values, bits, K), g.double() @ weight, pattern)


def test_paths_that_read_a_dense_weight_are_refused(device: str) -> None:
    case = next(case for case, _ in cases(torch.float32) if case.mask.any())
    of_cuda = {path for path in CUDA_PATHS if not path.startswith("decode")}
    for path in set(PATHS) - set(PACKED_LINEAR_PATHS) if device == "cpu" else of_cuda:
        with masked_ops.use_path(path), pytest.raises(RuntimeError, match="a packed layer has no dense weight"):
            _ops.packed_linear(*case.calls()["packed_linear"])


@every_float
def test_reference_is_exact(dtype: torch.dtype) -> None:
    for case, exact in cases(dtype)[::3]:
        calls = case.calls()
        for op, expected in exact.items():
            assert_exact(getattr(reference, op)(*calls[op]), expected, op, case.name)


@pytest.mark.parametrize("pattern", ["half", "none", "all"])
def test_derivatives(pattern: str) -> None:
    mask = mask_of(pattern, 4, 11)
    bits, nnz = bits_of(mask), int(mask.sum())

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    for function, inputs in (
        (lambda x, v, b: _ops.packed_linear(x, v, bits, 11, b), (leaf(2, 11), leaf(nnz), leaf(4))),
        (lambda x, v: _ops.packed_linear(x, v, bits, 11), (leaf(2, 3, 11), leaf(nnz))),
        (lambda g, v: _ops.packed_linear_grad_input(g, v, bits, 11), (leaf(2, 4), leaf(nnz))),
        (lambda g, x: _ops.packed_linear_grad_values(g, x, bits, nnz), (leaf(2, 4), leaf(2, 11))),
        (lambda v: _ops.unpack_values(v, bits, 11), (leaf(nnz),)),
        (lambda w: _ops.pack_values(w, bits, nnz), (leaf(4, 11),)),
    ):
        assert gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)
        assert gradgradcheck(function, inputs, check_batched_grad=True)


@every_float
def test_gradients(dtype: torch.dtype) -> None:
    for lead in ((), (3,), (2, 5)):
        mask = mask_of("tenth", 64, 96)
        x, b = integers(*lead, 96, dtype=dtype).requires_grad_(), integers(64, dtype=dtype).requires_grad_()
        values = integers(int(mask.sum()), dtype=dtype).requires_grad_()
        y = masked_ops.packed_linear(x, values, bits_of(mask), 96, b)
        exact = [t.detach().double().requires_grad_() for t in (x, values, b)]
        weight = torch.zeros(64, 96, dtype=torch.float64).masked_scatter(mask, exact[1])
        expected = F.linear(exact[0], weight, exact[2])
        assert_exact(y, expected)
        grad = integers(*y.shape, dtype=dtype)
        grads = torch.autograd.grad(y, (x, values, b), grad)
        for actual, wanted in zip(grads, torch.autograd.grad(expected, exact, grad.double()), strict=True):
            assert_exact(actual, wanted, lead)


@pytest.mark.cpu_only("about a path of the CPU's")
@every_capability
@pytest.mark.parametrize("density", [0.01, 0.05, 0.15, 0.5])  # tiles of grad_output of 8, 2, 4 and 8 vectors
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_in_one_go(packed: bool, density: float, capability: str) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(3)
    # Rows around the edges of tiles, on every capability; at last more than are taken at a time.
    shapes = [(M, 70, 300) for M in (2, 8, 17, 25, 33, 48, 49, 64, 65, 96, 97, 100, 128, 130, 161, 200)]
    with running_on("sparse", capability), poisoned():
        for M, N, K in (*shapes, (300, 4096, 5), (300, 20, 4096)):
            mask = torch.rand(N, K) < density
            x, b, g = integers(M, K).requires_grad_(), integers(N).requires_grad_(), integers(M, N)
            weight = integers(N, K) * mask
            leaf = (weight[mask] if packed else weight).clone().requires_grad_()
            if packed:
                y = masked_ops.packed_linear(x, leaf, bits_of(mask), K, b)
            else:
                y = masked_ops.masked_linear(x, leaf, mask, b)
            grad_input, grad_weight, grad_bias = torch.autograd.grad(y, (x, leaf, b), g)
            exact = g.double().t() @ x.detach().double() * mask
            assert_exact(grad_input, g.double() @ weight.double(), M)
            assert_exact(grad_weight, exact[mask] if packed else exact, M)
            assert_exact(grad_bias, g.sum(0), M)


def test_edited_bits_count_at_once() -> None:
    mask = mask_of("half", 8, 24)
    bits = bits_of(mask)
    x, values = integers(3, 24), integers(int(mask.sum()))
    for _ in range(3):
        weight = torch.zeros(8, 24).masked_scatter(mask, values)
        for _ in range(2):
            assert_exact(masked_ops.packed_linear(x, values, bits, 24), x @ weight.t())
        mask = mask.flip(0)
        bits.copy_(bits_of(mask))


ONES = torch.ones
BITS = torch.full((4, 2), 1, dtype=torch.uint8)  # the first of each eight weights of [4, 9]: but bit 8 is the last one
ERRORS: dict[str, tuple[dict, str]] = {
    "input features": ({"input": ONES(2, 8)}, "input must have 9 features"),
    "input dtype": ({"input": ONES(2, 9).double()}, "input must have the dtype of weight_values"),
    "too few values": ({"weight_values": ONES(7)}, "weight_values must hold one value for each of the 8 bits"),
    "too many values": ({"weight_values": ONES(9)}, "weight_values must hold one value for each of the 8 bits"),
    "values of two dimensions": ({"weight_values": ONES(4, 2)}, "weight_values must be"),
    "values of integers": ({"weight_values": ONES(8).int()}, "weight_values must be"),
    "values of a byte each": (
        {"input": ONES(2, 9).to(torch.float8_e5m2), "weight_values": ONES(8).to(torch.float8_e5m2)},
        "weight_values must be float16, bfloat16, float32 or float64 where weights are packed, got Float8_e5m2",
    ),
    "bits of another dtype": ({"weight_bits": BITS.int()}, "weight_bits must be uint8"),
    "bits of one dimension": ({"weight_bits": BITS[0]}, "weight_bits must be uint8"),
    "bits too narrow": ({"weight_bits": BITS[:, :1]}, "weight_bits must be uint8 of shape"),
    "bits beyond the features": ({"weight_bits": BITS * 2}, "weight_bits must have zero bits beyond the 9 columns"),
    "in_features": ({"in_features": 8}, "weight_bits must be uint8 of shape"),
    "in_features negative": ({"in_features": -1}, "in_features must not be negative"),
    "in_features near 64 bits": ({"in_features": 2**63 - 1}, "weight_bits must be uint8 of shape"),
    "bias": ({"bias": ONES(5)}, "bias must have shape"),
    "bias dtype": ({"bias": ONES(4).double()}, "bias must have the dtype of weight_values"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_bad_input(name: str) -> None:
    bad, message = ERRORS[name]
    bits = BITS.to(ONES(0).device)
    arguments = {"input": ONES(2, 9), "weight_values": ONES(8), "weight_bits": bits, "in_features": 9, "bias": ONES(4)}
    bad = {key: value.to(bits.device) if isinstance(value, Tensor) else value for key, value in bad.items()}
    masked_ops.packed_linear(**arguments)
    with pytest.raises(RuntimeError, match=message):
        masked_ops.packed_linear(**arguments | bad)


@compiled_only
@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.int8], ids=name_of)
def test_dtypes_of_other_sizes(dtype: torch.dtype) -> None:
    """Kernels move 2, 4 or 8 bytes."""
    mask = mask_of("half", 4, 9)
    bits, nnz = bits_of(mask), int(mask.sum())
    with pytest.raises(RuntimeError, match="input must be float16, bfloat16, float32 or float64"):
        _ops.packed_linear_grad_values(ONES(2, 4).to(dtype), ONES(2, 9).to(dtype), bits, nnz)
    with pytest.raises(RuntimeError, match="weight must be"):
        _ops.pack_values(ONES(4, 9).to(dtype), bits, nnz)
    with pytest.raises(RuntimeError, match="weight_values must be"):
        _ops.unpack_values(ONES(nnz).to(dtype), bits, 9)


@pytest.mark.parametrize("name", ["input", "weight_values", "weight_bits"])
@pytest.mark.parametrize("grad", [False, True])
def test_none_is_no_tensor(name: str, grad: bool) -> None:
    arguments = {"input": ONES(2, 9), "weight_values": ONES(8).requires_grad_(grad), "weight_bits": BITS}
    with pytest.raises(TypeError, match=f"{name} must be a Tensor, got None"):
        masked_ops.packed_linear(**arguments | {name: None}, in_features=9)


def test_dtypes_are_those_of_the_dense_layer() -> None:
    mask = mask_of("half", 4, 9)
    for dtype in FLOATS:
        y = masked_ops.packed_linear(ONES(2, 9, dtype=dtype), ONES(int(mask.sum()), dtype=dtype), bits_of(mask), 9)
        assert y.dtype == dtype
        assert_exact(y, mask.sum(1).expand(2, 4))
