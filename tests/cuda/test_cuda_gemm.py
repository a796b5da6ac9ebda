"""The fused GEMMs: masks in fragment order, both directions, sides around the edges of tiles, all ways to be late."""

from __future__ import annotations

import ctypes

import pytest
import torch
from cuda_library import DTYPES, Library, UnsupportedError
from test_cuda_decode import small_integers
from test_cuda_passes import random_mask, words_of
from torch import Tensor

HALVES = (torch.bfloat16, torch.float16)
KERNELS = ("gemm_sm80", "gemm_sm90")
TILE = 64


class Gemm(ctypes.Structure):
    _fields_ = (
        ("dtype", ctypes.c_int),
        ("grad_input", ctypes.c_int),
        ("M", ctypes.c_int64),
        ("N", ctypes.c_int64),
        ("K", ctypes.c_int64),
        ("input", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("fragments", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
    )


def serves(cuda: Library, kernel: str) -> bool:
    if cuda.emulated:
        return True
    capability = torch.cuda.get_device_capability()
    return capability >= (8, 0) if kernel == "gemm_sm80" else capability == (9, 0)


def pack_fragments(cuda: Library, mask: Tensor, transposed: bool) -> Tensor:
    N, K = mask.shape
    fragments = cuda.empty(cuda.size("fragments_bytes", N, K, int(transposed)) // 4, torch.int32)
    cuda("pack_fragments", cuda.put(words_of(mask)), N, K, ctypes.c_int(transposed), fragments)
    return fragments


def gemm(
    cuda: Library,
    kernel: str,
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    grad_input: bool,
    split: bool = False,
) -> Tensor:
    M, (N, K) = input.shape[0], weight.shape
    x, w = cuda.put(input), cuda.put(weight)
    fragments = pack_fragments(cuda, mask, grad_input)
    b = None if bias is None else cuda.put(bias)
    output = cuda.empty((M, K if grad_input else N), input.dtype)
    pointers = [t.data_ptr() if t is not None else None for t in (x, w, fragments, b, output)]
    call = Gemm(DTYPES.index(input.dtype), grad_input, M, N, K, *pointers)
    if split:
        workspace = cuda.empty(cuda.size("gemm_workspace", ctypes.byref(call)), torch.uint8)
        assert workspace.numel() > 0
        call.workspace = workspace.data_ptr()
    cuda.bank_conflicts()
    cuda(kernel, ctypes.byref(call))
    assert cuda.bank_conflicts() == 0
    return output.cpu()


def expected(input: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, grad_input: bool) -> Tensor:
    w = torch.where(mask, weight, torch.zeros_like(weight)).double()
    output = input.double() @ (w if grad_input else w.T)
    return output if bias is None else output + bias.double()


def test_fragments(cuda: Library) -> None:
    """Every bit, by the layout of operand A of m16n8k16 in the PTX manual, and by prmt's rule for signs."""
    for N, K in [(1, 1), (64, 64), (65, 130), (200, 63)]:
        mask = random_mask(N, K)
        for transposed in (False, True):
            operand = mask.T if transposed else mask
            rows, cols = (-(-side // TILE) for side in operand.shape)
            padded = torch.zeros(rows * TILE, cols * TILE, dtype=torch.bool)
            padded[: operand.shape[0], : operand.shape[1]] = operand
            fragments = pack_fragments(cuda, mask, transposed).cpu().view(rows, cols, 128)
            for thread in range(128):
                warp, lane = divmod(thread, 32)
                for register in range(16):
                    k_step, quarter = divmod(register, 4)
                    row = warp * 16 + lane // 4 + (8 if quarter in (1, 3) else 0)
                    for half in range(2):
                        col = k_step * 16 + lane % 4 * 2 + half + (8 if quarter in (2, 3) else 0)
                        bit = 7 - register // 2 + 8 * (half + 2 * (register % 2))
                        got = fragments[:, :, thread] >> bit & 1
                        assert torch.equal(got.bool(), padded[row::TILE, col::TILE])


def check_exactly(
    cuda: Library, kernel: str, dtype: torch.dtype, sides: tuple[int, int, int], grad: bool, split: bool = False
) -> None:
    M, N, K = sides
    mask = random_mask(N, K, 0.5)
    input, weight = small_integers((M, N if grad else K), dtype), small_integers((N, K), dtype)
    bias = None if grad else small_integers((N,), dtype)
    weight[~mask] = float("nan")
    for b in (None, bias) if bias is not None else (None,):
        right = expected(input, weight, mask, b, grad).to(dtype)
        output = gemm(cuda, kernel, input, weight, mask, b, grad, split)
        assert torch.equal(output, right), (kernel, sides, grad)


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "grad_input"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_gemm_exactly(cuda: Library, kernel: str, dtype: torch.dtype, grad: bool) -> None:
    """Sums of small integers, everything late and threads in any order, on few multiprocessors and on many."""
    if not serves(cuda, kernel):
        pytest.skip(f"{kernel} is not for this GPU")
    cuda.set_mode(lazy=True, order=2)
    for sides in [(1, 8, 8), (64, 64, 64), (65, 136, 72), (127, 120, 192), (130, 56, 264), (257, 72, 136)]:
        for multiprocessors in (1, 132):
            cuda.set_device(90, multiprocessors)
            check_exactly(cuda, kernel, dtype, sides, grad)
    if not grad:  # N may be anything
        for N in (1, 7, 129, 191):
            check_exactly(cuda, kernel, dtype, (70, N, 72), grad)


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("lazy", [False, True], ids=["early", "late"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_gemm_in_any_order(cuda: Library, kernel: str, lazy: bool, order: int) -> None:
    """Many stages and, on few multiprocessors, several tiles a block; it does not show when copies and products end."""
    if not serves(cuda, kernel):
        pytest.skip(f"{kernel} is not for this GPU")
    cuda.set_mode(lazy, order)
    for multiprocessors, M in ((2, 70), (2, 160), (1, 250)):
        cuda.set_device(90, multiprocessors)
        check_exactly(cuda, kernel, torch.bfloat16, (M, 264, 264), False)
        check_exactly(cuda, kernel, torch.bfloat16, (M, 264, 264), True)


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "grad_input"])
def test_gemm_splits_a_long_contraction(cuda: Library, grad: bool) -> None:
    """Idle multiprocessors share the contraction of a tile, evenly or not."""
    if not serves(cuda, "gemm_sm90"):
        pytest.skip("gemm_sm90 is not for this GPU")
    for M, R, C in [(1, 8, 3200), (65, 136, 3112), (8, 72, 3704)]:
        sides = (M, C, R) if grad else (M, R, C)
        cuda.set_mode(lazy=True, order=2)
        check_exactly(cuda, "gemm_sm90", torch.float16, sides, grad, split=True)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_gemm_rounds_once(cuda: Library, kernel: str, dtype: torch.dtype) -> None:
    if not serves(cuda, kernel):
        pytest.skip(f"{kernel} is not for this GPU")
    mask, input, weight = random_mask(136, 520), torch.randn(100, 520).to(dtype), torch.randn(136, 520).to(dtype)
    right = expected(input, weight, mask, None, False)
    error = (gemm(cuda, kernel, input, weight, mask, None, False).double() - right).norm() / right.norm()
    assert error < {torch.bfloat16: 3e-3, torch.float16: 4e-4}[dtype]


@pytest.mark.parametrize("kernel", KERNELS)
def test_gemm_edges(cuda: Library, kernel: str) -> None:
    if not serves(cuda, kernel):
        pytest.skip(f"{kernel} is not for this GPU")

    def run(M: int, N: int, K: int, grad: bool, dtype: torch.dtype = torch.float16) -> Tensor:
        mask = torch.ones(N, K, dtype=torch.bool)
        input, weight = torch.ones(M, N if grad else K, dtype=dtype), torch.ones(N, K, dtype=dtype)
        return gemm(cuda, kernel, input, weight, mask, None, grad)

    assert run(0, 8, 8, False).shape == (0, 8) and run(3, 0, 8, False).shape == (3, 0)
    for M, N, K, grad, dtype in [
        (4, 8, 12, False, torch.float16),
        (4, 12, 8, True, torch.float16),
        (4, 8, 8, False, torch.float32),
    ]:
        with pytest.raises(UnsupportedError):
            run(M, N, K, grad, dtype)
    if cuda.emulated:
        cuda.set_device(75 if kernel == "gemm_sm80" else 100)
        with pytest.raises(UnsupportedError):
            run(4, 8, 8, False)
