"""Linear layers on few rows out of the remaining weights."""

from __future__ import annotations

import pytest
import torch
from cuda_library import Library, UnsupportedError
from test_cuda_passes import random_mask, words_of
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEGMENT = 256


def small_integers(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randint(-2, 3, shape).to(dtype)


def uneven_mask(N: int, K: int, density: float) -> Tensor:
    """A row is empty, and two in parts."""
    mask = random_mask(N, K, density)
    mask[N // 2] = False
    mask[0, : K // 2] = False
    mask[-1, K // 3 :] = False
    return mask


def make_index(cuda: Library, mask: Tensor) -> Tensor:
    (N, K), nnz = mask.shape, int(mask.sum())
    index = cuda.empty(cuda.size("decode_index_bytes", N, K, nnz), torch.uint8)
    offsets = torch.tensor([0, *mask.sum(1).cumsum(0).tolist()])
    cuda("decode_index", cuda.put(words_of(mask)), N, K, nnz, cuda.put(offsets), index)
    return index


def decode(cuda: Library, input: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None) -> Tensor:
    (M, K), N = input.shape, weight.shape[0]
    values = cuda.put(weight[mask])
    workspace = cuda.empty(cuda.size("decode_workspace", input.dtype, M, N, K), torch.uint8)
    output = cuda.empty((M, N), input.dtype)
    b = None if bias is None else cuda.put(bias)
    index = make_index(cuda, mask)
    cuda("decode", input.dtype, M, N, K, values.numel(), cuda.put(input), values, index, b, output, workspace)
    return output.cpu()


def expected(input: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None) -> Tensor:
    output = input.double() @ torch.where(mask, weight, torch.zeros_like(weight)).double().T
    return output if bias is None else output + bias.double()


def test_index(cuda: Library) -> None:
    for N, K in [(1, 1), (3, 255), (2, 256), (5, 257), (4, 600), (33, 64)]:
        for density in (0.0, 0.3, 1.0):
            mask = random_mask(N, K, density)
            index = make_index(cuda, mask).cpu()
            segments = -(-K // SEGMENT)
            padded = torch.zeros(N, segments * SEGMENT, dtype=torch.bool)
            padded[:, :K] = mask
            counts = padded.view(N * segments, SEGMENT).sum(1)
            begins = index[: 4 * (N * segments + 1)].view(torch.int32)
            assert begins.tolist() == [0, *counts.cumsum(0).tolist()]
            columns = index[-(-(4 * (N * segments + 1)) // 16) * 16 :].view(torch.uint16)
            assert columns.tolist() == mask.nonzero()[:, 1].tolist() + [0] * (-int(mask.sum()) % 8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M", [1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 33, 64])
def test_decode_exactly(cuda: Library, dtype: torch.dtype, M: int) -> None:
    """Every number of rows, on sides around the edges of segments, warps and blocks; sums that round to themselves.

    Copies are as late as they may be.
    """
    cuda.set_mode(lazy=True, order=2)
    sizes = [(1, 1, 1.0), (3, 255, 0.2), (4, 256, 0.05), (65, 257, 0.5), (66, 520, 0.1), (66, 520, 0.4), (17, 800, 1.0)]
    for N, K, density in sizes:
        mask = uneven_mask(N, K, density)
        input, weight, bias = (small_integers(shape, dtype) for shape in ((M, K), (N, K), (N,)))
        weight[~mask] = float("nan")
        for b in (None, bias):
            right = expected(input, weight, mask, b)
            assert torch.equal(decode(cuda, input, weight, mask, b), right.to(dtype)), (N, K)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M", [1, 8, 16, 20])
def test_decode_long_rows(cuda: Library, dtype: torch.dtype, M: int) -> None:
    """More columns than are staged at once, in each order in which threads can run."""
    N, K = 9, 26000 if M == 1 else 13000 if M == 8 and dtype != torch.float32 else 6500
    mask = random_mask(N, K, 0.3)
    input, weight = torch.randn(M, K).to(dtype), torch.randn(N, K).to(dtype)
    right = expected(input, weight, mask, None)
    for order in (0, 1, 2):
        cuda.set_mode(lazy=False, order=order)
        output = decode(cuda, input, weight, mask, None).double()
        error = (output - right).norm() / right.norm()
        assert error < {torch.float32: 1e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4}[dtype]


def test_decode_several_segments_a_block(cuda: Library) -> None:
    """So many columns that not every segment has a block to itself."""
    cuda.set_mode(lazy=False, order=2)
    M, N, K = 9, 300, 60000
    mask = random_mask(N, K, 0.002)
    input, weight = small_integers((M, K), torch.float16), small_integers((N, K), torch.float16)
    assert torch.equal(decode(cuda, input, weight, mask, None), expected(input, weight, mask, None).half())


def test_decode_edges(cuda: Library) -> None:
    bias = torch.randn(5)
    nothing = torch.empty(5, 0)
    assert torch.equal(decode(cuda, torch.empty(2, 0), nothing, nothing.bool(), bias), bias.expand(2, 5))
    assert decode(cuda, torch.empty(0, 4), torch.ones(5, 4), torch.ones(5, 4).bool(), None).shape == (0, 5)
    empty = torch.zeros(5, 4, dtype=torch.bool)
    half = torch.randn(12, 4).half()
    assert torch.equal(decode(cuda, half, torch.ones(5, 4).half(), empty, bias.half()), bias.half().expand(12, 5))
    for M, dtype in [(65, torch.float32), (1, torch.float64)]:
        with pytest.raises(UnsupportedError):
            decode(cuda, torch.ones(M, 4, dtype=dtype), torch.ones(5, 4, dtype=dtype), empty, None)
    assert cuda.size("decode_index_bytes", 5, 65536, 4) > 0
    assert cuda.size("decode_index_bytes", 5, 65537, 4) == 0  # a column is 16 bits
