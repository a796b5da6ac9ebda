"""Linear layers on few rows out of weights whose columns are gathered."""

from __future__ import annotations

import pytest
import torch
from cuda_library import Library
from laid_out import HALVES, UNIT, Kernel
from test_cuda_decode import small_integers, uneven_mask
from test_cuda_passes import random_mask
from torch import Tensor

SEGMENT, ROWS, WARP = 4096, 16, 32
GATHERED = Kernel("decode_gathered", ("gather", "fill_gathered"), ROWS, SEGMENT)
BATCH_UNITS = {2: 5, 4: 3}


def operands(batch: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Of a batch, step by step: the columns in its slots, and operand A, of 16 rows and those slots."""
    lines = batch[:128].view(16, 8)[:, [0, 4, 1, 5, 2, 6, 3, 7]].T.long()  # by step
    slots = torch.arange(16)
    phases = 2 * (torch.arange(8) % steps)[:, None] + slots // 8
    columns = lines * 16 + (slots & 8 | (slots ^ phases) & 7)
    positions = batch[128:256].view(torch.int32).long() & 0xFFFFFFFF
    values = batch[256:].view(torch.int16).view(-1, WARP, 2, 2, 2)  # of two groups: the lane, which, row / 8, half
    A = torch.zeros(8, ROWS, 16, dtype=torch.int16)
    for group in range(8 // steps):
        two, which = divmod(group, 2)
        shift = 16 * group if steps == 4 else group % 2 * 2 + group // 2 * 16
        for lane in range(WARP):
            for h in range(2):
                for half in range(2):
                    phase = int(positions[lane]) >> (shift + 4 * (2 * h + half)) & (2 * steps - 1)
                    slot = phase % 2 * 8 + lane % 4 * 2 + half
                    A[group * steps + phase // 2, lane // 4 + 8 * h, slot] = values[two, lane, which, h, half]
    return columns, A


def least_groups(mask: Tensor, steps: int) -> int:
    """Of a piece, which no packing can do without."""
    by_rows = -(-int(mask.sum(1).max()) // 8)
    kinds = [int(mask[:, k::16].any(0).sum()) for k in range(min(16, mask.shape[1]))]
    return max(by_rows, -(-max(kinds) // steps))


def test_columns_are_gathered_as_described(cuda: Library) -> None:
    """Every value once, in a slot of its column; few more groups than any packing needs."""
    kinds = set()
    cases = [(1, 8, 1.0), (16, 4096, 0.1), (16, 640, 0.3), (13, 96, 0.5), (19, 4096 + 72, 0.02), (5, 200, 0.9)]
    for N, K, density in cases:
        mask = random_mask(N, K, density)
        order = torch.randperm(N)
        weight = torch.zeros(N, K)
        weight[mask] = torch.arange(1, 1 + int(mask.sum())).float() % 32767 + 1
        order, pieces, data = (t.cpu() for t in GATHERED.lay_out(cuda, weight.to(torch.int16), mask, order))
        segments, end = -(-K // SEGMENT), 0
        got = torch.zeros(order.numel(), K)
        for number, (at, size, batches, kind) in enumerate(pieces.tolist()):
            strip, first = number // segments, number % segments * SEGMENT
            steps = kind & 0xFFFF
            rows = order[strip * ROWS :][:ROWS]
            here = torch.zeros(ROWS, min(K - first, SEGMENT), dtype=torch.bool)
            here[rows >= 0] = mask[rows[rows >= 0].long(), first : first + SEGMENT]
            assert at == end and size == batches * BATCH_UNITS[steps]
            end += size
            kinds.add(steps)
            for batch in range(batches):
                start = (at + batch * BATCH_UNITS[steps]) * UNIT
                columns, A = operands(data[start : start + BATCH_UNITS[steps] * UNIT], steps)
                for step in range(8):
                    for row, slot in A[step].nonzero().tolist():
                        place = strip * ROWS + row, first + int(columns[step, slot])
                        assert got[place] == 0 and rows[row] >= 0
                        got[place] = float(A[step, row, slot])
            for other in (2, 4):
                least = -(-least_groups(here, other) * other // 8) * BATCH_UNITS[other]
                assert other != steps or batches == 0 or least <= size <= 1.25 * least + 5, (K, density)
        assert end * UNIT == data.numel()
        right = torch.zeros_like(got)
        right[order >= 0] = weight[order[order >= 0].long()]
        assert torch.equal(got, right)
    assert kinds == {2, 4}


def test_pieces_that_are_full(cuda: Library) -> None:
    """As many bins as columns: each has one for itself."""
    for K in (SEGMENT, 72):
        mask = random_mask(ROWS, K, 0.7)
        mask[3] = True
        weight, input = small_integers((ROWS, K), torch.bfloat16), small_integers((9, K), torch.bfloat16)
        form = GATHERED.lay_out(cuda, weight, mask)
        batches, kind = form[1].cpu()[0, 2:].tolist()
        steps, start = kind & 0xFFFF, kind >> 16
        assert start == -(-K // 8) and start * steps <= batches * 8 <= -(-K // 64) * 8 * steps
        for M in (8, 9):
            assert GATHERED.is_exact(cuda, input[:M], form, weight, mask)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("M", [1, 7, 8, 9, 16, 17, 64])
def test_decode_exactly(cuda: Library, dtype: torch.dtype, M: int) -> None:
    """On sides around the edges of strips, words, lines and blocks; sums that round to themselves."""
    cuda.set_mode(lazy=True, order=2)
    sizes = [(1, 8, 1.0), (3, 56, 0.2), (16, 64, 0.05), (17, 72, 0.5), (33, 520, 0.1), (5, 264, 1.0)]
    for N, K, density in sizes:
        GATHERED.check(cuda, M, uneven_mask(N, K, density), dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("M", [3, 16])
def test_decode_long_rows(cuda: Library, dtype: torch.dtype, M: int) -> None:
    """More columns than a segment has, in each order in which threads can run; any order of the rows."""
    N = 11
    for K in (SEGMENT + 8, 2 * SEGMENT, 2 * SEGMENT + 1048):
        mask = random_mask(N, K, 0.02)
        mask[2] = random_mask(1, K, 0.2)[0]
        mask[:, SEGMENT : SEGMENT + 512] = random_mask(N, min(512, K - SEGMENT), 0.4)
        input, weight = small_integers((M, K), dtype), small_integers((N, K), dtype)
        form = GATHERED.lay_out(cuda, weight, mask, torch.randperm(N))
        for order in (0, 1, 2):
            cuda.set_mode(lazy=order == 1, order=order)
            assert GATHERED.is_exact(cuda, input, form, weight, mask)


@pytest.mark.parametrize(
    ("M", "N", "K", "cluster"),
    [
        (3, 2100, SEGMENT + 8, 1),  # two segments at once
        (16, 2100, SEGMENT + 8, 2),  # one, and a block for each
        (9, 17, 9 * SEGMENT, 5),  # two, one after the other
        (60, 17000, 40, 1),  # a warp takes several strips
        (9, 68000, 8, 1),
    ],
)
def test_blocks_share_the_work(cuda: Library, M: int, N: int, K: int, cluster: int) -> None:
    mask = random_mask(N, K, 0.001 if K > 40 else 0.1)
    input, weight, bias = (small_integers(shape, torch.float16) for shape in ((M, K), (N, K), (N,)))
    assert GATHERED.is_exact(cuda, input, GATHERED.lay_out(cuda, weight, mask), weight, mask, bias)
    if cuda.emulated:
        assert cuda.cluster() == cluster


def test_nothing_is_asked_for_beyond_the_end(cuda: Library) -> None:
    """More batches of a warp than are on their way to the L2 cache at first."""
    N, K = 2200, SEGMENT
    mask = torch.zeros(N, K, dtype=torch.bool)
    mask[:ROWS] = True
    input, weight = small_integers((7, K), torch.bfloat16), small_integers((N, K), torch.bfloat16)
    assert GATHERED.is_exact(cuda, input, GATHERED.lay_out(cuda, weight, mask), weight, mask)


@pytest.mark.parametrize("M", [8, 16])
def test_lookups_meet_no_bank_twice(cuda: Library, M: int) -> None:
    """Nor do the columns on their way to where they are looked up."""
    mask = random_mask(16, 1024, 0.3)
    input, weight = small_integers((M, 1024), torch.float16), small_integers((16, 1024), torch.float16)
    form = GATHERED.lay_out(cuda, weight, mask)
    cuda.bank_conflicts()
    assert GATHERED.is_exact(cuda, input, form, weight, mask)
    assert cuda.bank_conflicts() == 0


def test_edges(cuda: Library) -> None:
    GATHERED.check_edges(cuda, most_rows=64, unserved=12)
