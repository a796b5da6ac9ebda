"""Linear layers on few rows out of weights in slices."""

from __future__ import annotations

import pytest
import torch
from cuda_library import Library
from laid_out import HALVES, UNIT, Kernel
from test_cuda_decode import small_integers, uneven_mask
from test_cuda_passes import random_mask

SEGMENT, ROWS = 8192, 8
SLICES = Kernel("decode_sliced", ("slice", "fill_slices"), ROWS, SEGMENT)


def test_slices_are_as_described(cuda: Library) -> None:
    """Every value once, in a strict step only in its own lane; and as few bytes as any number of strict steps gives."""
    for N, K, density in [(1, 2, 1.0), (8, 600, 0.3), (13, 96, 0.5), (11, 8192 + 70, 0.02), (9, 16384, 0.01)]:
        mask = random_mask(N, K, density)
        mask[N // 2, : K // 2] = True
        order = torch.randperm(N)
        weight = torch.zeros(N, K)
        weight[mask] = torch.arange(1, 1 + int(mask.sum())).float()
        order, pieces, data = (t.cpu() for t in SLICES.lay_out(cuda, weight.to(torch.int16), mask, order))
        segments = -(-K // SEGMENT)
        got = torch.zeros(N, K)
        for number, (at, size, strict, loose) in enumerate(pieces.tolist()):
            rows, first = order[number // segments * ROWS :][:ROWS].tolist(), number % segments * SEGMENT
            assert size == 3 * strict + 4 * loose
            place = at * UNIT
            for step in range(strict + loose):
                values = data[place : place + 512].view(torch.int16).view(32, ROWS)
                width = 1 if step < strict else 2
                columns = data[place + 512 : place + 512 + 256 * width]
                columns = columns if width == 1 else columns.view(torch.uint16)
                columns = columns.view(32, ROWS).long()
                if width == 1:
                    columns = columns * 32 + torch.arange(32)[:, None]
                for r, row in enumerate(rows):
                    lanes = values[:, r].nonzero()[:, 0]
                    assert row >= 0 or lanes.numel() == 0
                    assert bool((got[row, first + columns[lanes, r]] == 0).all())
                    got[row, first + columns[lanes, r]] = values[lanes, r].float()
                place += 512 + 256 * width
            assert place == (at + size) * UNIT
            block = torch.zeros(ROWS, SEGMENT)
            for r, row in enumerate(rows):
                if row >= 0:
                    block[r, : K - first] = mask[row, first : first + SEGMENT].float()
            counts = block.view(ROWS, -1, 32).sum(1)
            over = [(counts - s).clamp(min=0).sum(1) for s in range(int(counts.max()) + 1)]
            assert size == min(3 * s + 4 * int((o / 32).ceil().max()) for s, o in enumerate(over))
        assert torch.equal(got, weight)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("M", [1, 2, 3, 4])
def test_decode_exactly(cuda: Library, dtype: torch.dtype, M: int) -> None:
    """On sides around the edges of slices, lanes and blocks; sums that round to themselves."""
    cuda.set_mode(lazy=True, order=2)
    sizes = [(1, 2, 1.0), (3, 254, 0.2), (8, 256, 0.05), (65, 258, 0.5), (130, 520, 0.1), (17, 800, 1.0)]
    for N, K, density in sizes:
        mask = uneven_mask(N, K, density)
        mask[N // 3] = (torch.arange(K) % 32 < 2) | mask[N // 3]  # more than its slice's strict steps take
        SLICES.check(cuda, M, mask, dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("M", [1, 2, 4])
def test_decode_long_rows(cuda: Library, dtype: torch.dtype, M: int) -> None:
    """More columns than are staged at once, in each order in which threads can run; any order of the rows."""
    N = 11
    for K in (8192, 16384, 16384 + 8192 + 66):
        mask = random_mask(N, K, 0.03)
        mask[2] = random_mask(1, K, 0.4)[0]
        input, weight = small_integers((M, K), dtype), small_integers((N, K), dtype)
        form = SLICES.lay_out(cuda, weight, mask, torch.randperm(N))
        for order in (0, 1, 2):
            cuda.set_mode(lazy=order == 1, order=order)
            assert SLICES.is_exact(cuda, input, form, weight, mask)


@pytest.mark.parametrize(("M", "N"), [(1, 34000), (3, 17000)])
def test_several_rounds(cuda: Library, M: int, N: int) -> None:
    """So many rows that a warp takes several slices."""
    K = 34
    mask = random_mask(N, K, 0.1)
    input, weight = small_integers((M, K), torch.bfloat16), small_integers((N, K), torch.bfloat16)
    assert SLICES.is_exact(cuda, input, SLICES.lay_out(cuda, weight, mask), weight, mask)


def test_edges(cuda: Library) -> None:
    SLICES.check_edges(cuda, most_rows=4, unserved=3)
