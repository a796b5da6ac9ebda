"""What the tests of the operations draw on: paths and capabilities, shapes, masks, layouts, poison, comparisons."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import masked_ops
from masked_ops import _ops, _recipe

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
MASK_DTYPES = (torch.bool, *INTEGERS, *FLOATS)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- paths and capabilities ------------------------------------------------------------------------------------------

# Asked for while tests are collected: a path or capability that is new in the library is tested like the others.
# (Those of CUDA devices have tests of their own: fake_cuda, test_gpu_suite.py.)
CUDA_PATHS = ("mask_copy", "decode", "gemm_sm80", "gemm_sm90", "decode_sliced", "decode_gathered")
PATHS: tuple[str, ...] = tuple(path for path in _ops.paths() if path not in CUDA_PATHS)
# Of packed layers, which have no dense weight to read.
PACKED_LINEAR_PATHS: tuple[str, ...] = tuple(path for path in PATHS if path != "compact")
PACKED_PATHS: tuple[str, ...] = tuple(path for path in PACKED_LINEAR_PATHS if path != "fused")
_module = _ops._module
CAPABILITIES: tuple[str, ...] = tuple(_module.capabilities()) if _module else ("none",)

SANITIZED = _recipe.enabled("MASKED_OPS_SANITIZE")
FENCED = _recipe.enabled("MASKED_OPS_FENCE")

compiled_only = pytest.mark.skipif(_module is None, reason="plain torch serves: nothing was compiled")

every_capability = pytest.mark.parametrize("capability", CAPABILITIES)
every_float = pytest.mark.parametrize("dtype", FLOATS, ids=name_of)


@contextlib.contextmanager
def running_on(path: str | None = None, capability: str | None = None) -> Iterator[None]:
    """Force a path and a capability; None leaves them as they are."""
    before = _module.capability() if _module else "none"
    if capability is not None and _module:
        assert _module.set_capability(capability)
    try:
        with masked_ops.use_path(path):
            yield
    finally:
        if _module:
            _module.set_capability(before)


def refuses(path: str | None, error: RuntimeError) -> bool:
    """Whether ``error`` says that a forced path cannot serve this call; the chosen path and copy serve every call."""
    return path not in (None, "copy", "reference") and f"path '{path}' cannot serve" in str(error)


def serves_linear(path: str | None, dtype: torch.dtype, *, soft: bool = False) -> set[int]:
    """The numbers of rows, of 1, 4 and 64, for which the path serves a sparse linear layer of this dtype."""
    mask = torch.zeros(64, 96)
    mask[::5, ::2] = 2 if soft else 1
    rows = set()
    for M in (1, 4, 64):
        with running_on(path):
            try:
                _ops.linear(torch.zeros(M, 96, dtype=dtype), torch.zeros(64, 96, dtype=dtype), mask)
                rows.add(M)
            except RuntimeError as error:
                if not refuses(path, error):
                    raise
    return rows


# Path and dtype together, without the pairs that cannot be; path None is the cost model's own choice.
every_path_and_float = pytest.mark.parametrize(
    ("path", "dtype"),
    [
        pytest.param(path, dtype, id=f"{path or 'chosen'}-{name_of(dtype)}")
        for path in (None, *PATHS)
        for dtype in FLOATS
        if serves_linear(path, dtype)
    ],
)


def past_function_modes() -> contextlib.AbstractContextManager[None]:
    """Call as users do: without the mode by which the device fixture has torch's factories make tensors on a device."""
    return torch._C.DisableTorchFunction()


# --- shapes ----------------------------------------------------------------------------------------------------------

# On both sides of every tile, vector and word: 4, 8 and 16 lanes, 6 and 8 rows, 8, 16 and 48 columns, 64 bits.
EDGES = (1, 2, 5, 6, 7, 8, 9, 15, 16, 17, 31, 33, 47, 48, 49, 63, 64, 65, 95, 96, 97)


def _latin_square(sizes: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
    """Triples in which each pair of sizes stands once in each pair of places."""
    n = len(sizes)
    for i, j in itertools.product(range(n), range(n)):
        yield sizes[i], sizes[j], sizes[(i + j) % n]


# (M, N, K) around the edges, then: more than one block of depth (768) in each of the three products, rows enough to be
# split among threads, or into blocks (3001; 300 and 260 with more than one block of depth, of 16 bits too; above 512
# columns rows are packed), a last row panel of one row, more rows than one chunk of packed A holds at such a depth, or
# than are taken as they lie at a time (2048); few rows of input beside several tasks, strips
# and blocks of the weight, or beside a weight so narrow that its rows are split; one panel of a sparse weight for all
# threads; more columns than 16 bits can number.
SHAPES = tuple(_latin_square(EDGES))
LARGE_SHAPES = (
    (5, 49, 1700),
    (9, 1700, 50),
    (1700, 17, 33),
    (769, 65, 769),
    (257, 97, 300),
    (200, 48, 130),
    (130, 200, 100),
    (3001, 50, 500),
    (3001, 500, 50),
    (1, 700, 1300),
    (3, 130, 1100),
    (13, 97, 600),
    (7, 300, 70),
    (2, 700, 130),
    (400, 30, 700),
    (300, 50, 1100),
    (300, 530, 900),
    (260, 520, 1090),
)
DEEP_SHAPES = ((1, 3, 66000), (73, 3, 66000), (73, 66000, 3), (66000, 73, 3))
if "MASKED_OPS_TEST_FAKE_CUDA" in os.environ:  # a quarter of them: the tiles are the CPU's
    SHAPES, LARGE_SHAPES, DEEP_SHAPES = SHAPES[::4], LARGE_SHAPES[::4], DEEP_SHAPES[::4]


# --- masks -----------------------------------------------------------------------------------------------------------


def _random(density: float) -> Callable[[int, int], Tensor]:
    return lambda rows, cols: torch.rand(rows, cols) < density


def _single(rows: int, cols: int) -> Tensor:
    mask = torch.zeros(rows * cols, dtype=torch.bool)
    if rows * cols:
        mask[torch.randint(rows * cols, ())] = True
    return mask.view(rows, cols)


def _rows(rows: int, cols: int) -> Tensor:
    return (torch.rand(rows, 1) < 0.5).repeat(1, cols)


def _columns(rows: int, cols: int) -> Tensor:
    return (torch.rand(1, cols) < 0.5).repeat(rows, 1)


def _one_row(rows: int, cols: int) -> Tensor:
    return (torch.arange(rows)[:, None] == rows - 1).repeat(1, cols)


def _one_column(rows: int, cols: int) -> Tensor:
    return (torch.arange(cols) == cols - 1).repeat(rows, 1)


def _blocks(rows: int, cols: int) -> Tensor:
    coarse = torch.rand(-(-rows // 16), -(-cols // 16)) < 0.5
    return coarse.repeat_interleave(16, 0)[:rows].repeat_interleave(16, 1)[:, :cols].contiguous()


def _rows_of_four(rows: int, cols: int) -> Tensor:
    """Four rows that follow each other share their columns, from any row on, but for a few that differ."""
    start = int(torch.randint(4, ()))
    mask = (torch.rand((rows + 6) // 4 + 1, cols) < 0.3).repeat_interleave(4, 0)[start : start + rows]
    return mask ^ ((torch.rand(rows, 1) < 0.1) & (torch.rand(rows, cols) < 0.2))


def _two_of_four(rows: int, cols: int) -> Tensor:
    scores = torch.rand(rows, -(-cols // 4), 4)
    return (scores.argsort(-1).argsort(-1) < 2).view(rows, -1)[:, :cols].contiguous()


PATTERNS: dict[str, Callable[[int, int], Tensor]] = {
    "half": _random(0.5),
    "none": _random(0.0),
    "all": _random(1.0),
    "single": _single,
    "all but one": lambda rows, cols: ~_single(rows, cols),
    "few": _random(0.02),
    "tenth": _random(0.1),
    "most": _random(0.95),
    "some rows": _rows,
    "some columns": _columns,
    "one row": _one_row,
    "one column": _one_column,
    "diagonal": lambda rows, cols: torch.arange(rows)[:, None] == torch.arange(cols),
    "blocks": _blocks,
    "rows of four": _rows_of_four,
    "two of four": _two_of_four,
}


def mask_of(pattern: str, *shape: int, dtype: torch.dtype = torch.bool) -> Tensor:
    """A binary mask; of more than two dimensions, seen as the matrix [first][the rest]."""
    rows = shape[0]
    cols = torch.Size(shape[1:]).numel()
    return PATTERNS[pattern](rows, cols).reshape(shape).to(dtype)


# --- values ----------------------------------------------------------------------------------------------------------


def integers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """-1, 0 and 1: sums of thousands of their products are exact in every floating dtype but for a vanishing chance."""
    return torch.randint(-1, 2, shape, dtype=dtype)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def spoiled(weight: Tensor, mask: Tensor) -> Tensor:
    """``weight`` with NaN and infinities below the zeros of ``mask``: a pruned weight counts as absent."""
    bad = torch.tensor([float("nan"), float("inf"), -float("inf")], dtype=weight.dtype)
    in_turn = bad.repeat(weight.numel() // 3 + 1)[: weight.numel()].view(weight.shape)
    return torch.where(mask != 0, weight, in_turn)


def masked(weight: Tensor, mask: Tensor) -> Tensor:
    """The definition: where(mask == 0, 0, weight * mask), the mask taken in the weight's dtype."""
    factor = mask.detach().to(weight.dtype)
    return torch.where(factor == 0, torch.zeros((), dtype=weight.dtype), weight * factor)


# --- layouts ---------------------------------------------------------------------------------------------------------


def _transposed(t: Tensor) -> Tensor:
    """The last two dimensions (or the only one) lie in memory the other way round."""
    return t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() > 1 else _sliced(t)


def _sliced(t: Tensor) -> Tensor:
    """Every other element of a larger tensor, from an odd offset on; what lies between is NaN, or 0 in integers."""
    if t.dim() == 0:
        return t
    filler = float("nan") if t.is_floating_point() else 0
    around = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 3), filler, dtype=t.dtype)
    view = around[..., 3 : 3 + 2 * t.shape[-1] : 2]
    view.copy_(t)
    return view


def _cut(t: Tensor) -> Tensor:
    """Rows of a wider matrix: unit stride in a row, a gap of NaN between rows, no alignment."""
    if t.dim() == 0:
        return t
    filler = float("nan") if t.is_floating_point() else 0
    around = torch.full((*t.shape[:-1], t.shape[-1] + 6), filler, dtype=t.dtype)
    view = around[..., 1 : 1 + t.shape[-1]]
    view.copy_(t)
    return view


def _unaligned(t: Tensor) -> Tensor:
    """Contiguous, but off the alignment that allocators give."""
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)


def _expanded(t: Tensor) -> Tensor:
    """The first row stands for all: stride 0. Other values than those of ``t``."""
    return t[:1].expand(t.shape) if t.dim() and t.shape[0] else t


def _expanded_last(t: Tensor) -> Tensor:
    return t[..., :1].expand(t.shape) if t.dim() and t.shape[-1] else t


def _channels_last(t: Tensor) -> Tensor:
    return t.movedim(1, -1).contiguous().movedim(-1, 1) if t.dim() > 2 else t


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.contiguous(),
    "transposed": _transposed,
    "sliced": _sliced,
    "cut": _cut,
    "unaligned": _unaligned,
    "expanded": _expanded,
    "expanded last": _expanded_last,
    "channels_last": _channels_last,
}


# --- poison ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """All memory that torch hands out holds NaN, so that an element which is not written shows."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(deterministic)


def poison_scratch() -> None:
    """Leave NaN in the memory that kernels keep from call to call."""
    dirty = torch.full((256, 256), float("nan"))
    for op in (_ops.linear, _ops.linear_grad_input, _ops.linear_grad_weight):
        op(dirty, dirty, torch.ones(256, 256))


# --- cases ---------------------------------------------------------------------------------------------------------


def on_each_device(cases: Callable[[torch.dtype], list]) -> Callable[[torch.dtype], list]:
    """Remembers the cases of a dtype on the device where torch's factories make them.

    Of one dtype at a time under the fence, which has no room for the tensors of all.
    """

    @functools.lru_cache(maxsize=1 if FENCED else None)
    def remembered(_: torch.device, dtype: torch.dtype) -> list:
        return cases(dtype)

    return lambda dtype: remembered(torch.empty(0).device, dtype)


# --- comparison ------------------------------------------------------------------------------------------------------


def assert_exact(actual: Tensor, expected: Tensor, *context: object) -> None:
    """Equal values (``expected`` in any dtype), NaN nowhere."""
    assert actual.shape == expected.shape, (context, actual.shape, expected.shape)
    if torch.equal(actual.to(expected.dtype), expected):
        return
    wrong = (actual.to(expected.dtype) != expected).nonzero()
    raise AssertionError(f"{context}: {len(wrong)} of {actual.numel()} elements are wrong, first {wrong[:8].tolist()}")


def assert_exact_sums(actual: Tensor, expected: Tensor, *context: object) -> None:
    """assert_exact for convolutions of integers. On a CUDA device each result has to be nearest to the right integer:
    cuDNN may transform what it multiplies (Winograd, Fourier) and rounds then, but a term too much or too few is 1 off.
    """
    if actual.is_cuda:
        near = (actual.to(expected.dtype) - expected).abs() < 0.25  # false for NaN
        actual = torch.where(near, expected, actual.to(expected.dtype))
    assert_exact(actual, expected, *context)


def assert_accurate(actual: Tensor, torchs: Tensor, exact: Tensor, *context: object, factor: float = 8) -> None:
    """The error against ``exact`` (float64) is within ``factor`` of torch's own, or of one rounding of the result."""
    assert actual.shape == exact.shape and actual.dtype == torchs.dtype, (context, actual.shape, exact.shape)
    assert actual.isfinite().all(), context
    if not actual.numel():
        return
    error = (actual.double() - exact).abs().max()
    torchs_error = (torchs.double() - exact).abs().max()
    rounding = torch.finfo(actual.dtype).eps * exact.abs().max()
    limit = factor * torch.maximum(torchs_error, rounding)
    assert error <= limit, f"{context}: error {error:.3g}, torch's own {torchs_error:.3g}, one rounding {rounding:.3g}"


# --- other processes -------------------------------------------------------------------------------------------------

_FORK = """
import json, os, sys, textwrap, time, traceback
import torch, masked_ops
if len(sys.argv) > 3:
    import torch._dynamo, torch.export
snippets, results = json.load(open(sys.argv[1])), {}
for name, snippet in snippets.items():
    assert masked_ops._ops._loaded is None
    log = os.open(sys.argv[2], os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    child = os.fork()
    if child == 0:
        os.dup2(log, 1), os.dup2(log, 2)
        try:
            exec(textwrap.dedent(snippet), {})
            sys.stdout.flush()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
    for _ in range(1200):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.05)
    else:
        os.kill(child, 9)
        _, status = os.waitpid(child, 0)
    results[name] = os.waitstatus_to_exitcode(status), open(sys.argv[2], errors="replace").read()
    os.close(log)
json.dump(results, sys.stdout)
"""


def run_each_in_a_process(
    snippets: dict[str, str], run_python: Any, folder: Path, *, compiling: bool = False, **environment: object
) -> dict[str, tuple[int, str]]:
    """Each snippet's exit status (negative: the signal that ended it) and output.

    Each has a process of its own, in which torch and masked_ops are imported (and, with ``compiling``, what
    torch.compile needs, which takes longer) and nothing was built, loaded or run: forked from one such process, since
    importing torch is most of a small test's time. GPUs are hidden from them: a forked process can have none that the
    process before it may have asked for.
    """
    (folder / "snippets.json").write_text(json.dumps(snippets))
    arguments = folder / "snippets.json", folder / "output", *(["compiling"] if compiling else [])
    variables = {"OMP_NUM_THREADS": 1, "CUDA_VISIBLE_DEVICES": "", **environment}
    done = run_python(_FORK, *arguments, timeout=600, **variables)
    assert done.returncode == 0, done.stderr
    results: dict[str, tuple[int, str]] = json.loads(done.stdout)
    assert results.keys() == snippets.keys()
    return results
