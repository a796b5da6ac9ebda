"""Linear layers on few rows out of weights in tiles."""

from __future__ import annotations

import pytest
import torch
from cuda_library import Library
from laid_out import HALVES, Form, Kernel
from test_cuda_decode import small_integers, uneven_mask
from test_cuda_passes import random_mask
from torch import Tensor

SIDE, UNIT, WARP = 64, 128, 32
TILES = Kernel("decode_tiles", ("tile", "fill_tiles"), unit=UNIT, size=0)


def tiled(cuda: Library, weight: Tensor, mask: Tensor) -> Form:
    """The pieces and the data."""
    N, K = mask.shape
    pieces = cuda.empty((-(-N // SIDE) * -(-K // SIDE), 2), torch.int32)
    return TILES.lay_out(cuda, weight, mask, pieces)


def lane_of(row: int, column: int) -> int:
    return row % 8 * 4 + column % 16 // 4


def place_of(row: int, column: int) -> int:
    """Where mma.m16n8k16 has it, whose contraction takes 0, 1, 8 and 9 for a lane's four neighbours."""
    word = column // 16 * 16 + row // 16 * 4 + column % 4 // 2 * 2 + row // 8 % 2
    return 2 * word + column % 2


def values_of(tile: Tensor, batches: int, loose: int) -> tuple[Tensor, list[dict[int, int]]]:
    """The bits [lane][place] of a sparse tile, and each lane's values by their number."""
    bits = tile[: 4 * UNIT].view(WARP, 16, 1) >> torch.arange(8, dtype=torch.uint8) & 1
    strict = tile[4 * UNIT :][: 2 * UNIT * batches].view(torch.int16).view(batches, WARP, 4)
    values = [dict(enumerate(strict[:, lane].flatten().tolist())) for lane in range(WARP)]
    for entry in tile[(4 + 2 * batches) * UNIT :].view(torch.int32).tolist():
        slot, value = entry >> 16 & 0xFFFF, entry & 0xFFFF
        assert slot % 4 == 0 and slot // 128 >= 4 * batches
        assert values[slot % 128 // 4].setdefault(slot // 128, value) == value
    assert tile.numel() == (4 + 2 * batches + loose) * UNIT
    return bits.flatten(1).bool(), values


def test_tiles_are_as_described(cuda: Library) -> None:
    """Every value at its place, and as little as any number of batches gives."""
    lanes = torch.tensor([[lane_of(r, c) for c in range(SIDE)] for r in range(SIDE)])
    places = torch.tensor([[place_of(r, c) for c in range(SIDE)] for r in range(SIDE)])
    assert (lanes * 128 + places).unique().numel() == SIDE * SIDE
    kinds = set()
    for N, K, density in [
        (1, 4, 1.0),
        (64, 64, 0.3),
        (65, 1200, 0.1),
        (130, 96, 1.0),
        (70, 64 * 33, 0.02),
        (64, 640, 0.7),
    ]:
        mask = random_mask(N, K, density)
        mask[N // 2] = True
        mask[:, K // 2] = False
        mask[:, 128:192] = False
        if N == 64:  # all places of one lane, and no more
            mask[:, :SIDE] = lanes == 13
        weight = torch.zeros(N, K)
        weight[mask] = torch.arange(1, 1 + int(mask.sum())).float() % 32768
        pieces, data = (t.cpu() for t in tiled(cuda, weight.to(torch.int16), mask))
        across, end = -(-K // SIDE), 0
        for number, (at, counts) in enumerate(pieces.tolist()):
            batches, loose = counts & 0xFFFF, counts >> 16
            rows, columns = number // across * SIDE, number % across * SIDE
            block, here = torch.zeros(SIDE, SIDE), torch.zeros(SIDE, SIDE, dtype=torch.bool)
            part = weight[rows : rows + SIDE, columns : columns + SIDE]
            block[: part.shape[0], : part.shape[1]] = part
            here[: part.shape[0], : part.shape[1]] = mask[rows : rows + SIDE, columns : columns + SIDE]
            count = torch.zeros(WARP, dtype=torch.long).index_add_(0, lanes.flatten(), here.flatten().long())
            overs = {b: -(-int((count - 4 * b).clamp(min=0).sum()) // WARP) for b in range(33)}
            best = min(overs, key=lambda b: 2 * b + 2 * overs[b])
            assert at == end
            if batches == 0xFFFF:
                kinds.add("dense")
                assert loose == 0 and (int(count.max()) > 96 or 4 + 2 * best + overs[best] > 64)
                end = at + 64
                words = data[at * UNIT : end * UNIT].view(torch.int16).view(16, WARP, 8)
                assert torch.equal(words[places // 8, lanes, places % 8].float(), block)
                continue
            if batches == loose == 0:
                kinds.add("empty")
                assert not here.any()
                continue
            kinds.add("sparse")
            assert int(count.max()) <= 96
            end = at + 4 + 2 * batches + loose
            assert 2 * batches + 2 * loose == 2 * best + 2 * overs[best] and loose == overs[batches]
            bits, values = values_of(data[at * UNIT : end * UNIT], batches, loose)
            assert torch.equal(bits[lanes, places], here)
            for lane in range(WARP):
                for i, place in enumerate(bits[lane].nonzero()[:, 0].tolist()):
                    assert values[lane][i] == block[(lanes == lane) & (places == place)]
        assert end * UNIT == data.numel()
    assert kinds == {"dense", "sparse", "empty"}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("M", [1, 7, 8, 9, 16, 17, 32, 33, 64])
def test_decode_exactly(cuda: Library, dtype: torch.dtype, M: int) -> None:
    """On sides around the edges of tiles and blocks, few and many weights of a tile; sums that round to themselves."""
    cuda.set_mode(lazy=True, order=2)
    sizes = [(1, 4, 1.0), (3, 60, 0.2), (64, 64, 0.1), (65, 68, 0.5), (70, 520, 0.05), (130, 260, 1.0)]
    for N, K, density in sizes:
        mask = uneven_mask(N, K, density)
        mask[N // 3] |= torch.arange(K) % 16 < 4  # more than its tile's strict batches take
        TILES.check(cuda, tiled, M, mask, dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("M", [8, 13, 32])
def test_several_tiles_of_a_warp(cuda: Library, dtype: torch.dtype, M: int) -> None:
    """Tiles of which each finds what the one before has left, in each order in which threads can run."""
    N, K = 40, 64 * 50 + 4
    mask = random_mask(N, K, 0.1)
    mask[:, 640:1280] = random_mask(N, 640, 0.6)
    mask[:, 1920:2304] = False
    mask[:, 2304:2560] = True
    input, weight = small_integers((M, K), dtype), small_integers((N, K), dtype)
    form = tiled(cuda, weight, mask)
    for order in (0, 1, 2):
        cuda.set_mode(lazy=order == 1, order=order)
        assert TILES.is_exact(cuda, input, form, weight, mask)


@pytest.mark.parametrize(("groups", "tiles", "cluster"), [(41, 3, 1), (41, 64, 2), (3, 160, 8)])
def test_blocks_share_a_contraction(cuda: Library, groups: int, tiles: int, cluster: int) -> None:
    """Where rows are few."""
    N, K = 64 * groups - 63, 64 * tiles
    mask = random_mask(N, K, 0.02)
    input, weight, bias = (small_integers(shape, torch.bfloat16) for shape in ((3, K), (N, K), (N,)))
    assert TILES.is_exact(cuda, input, tiled(cuda, weight, mask), weight, mask, bias)
    if cuda.emulated:
        assert cuda.cluster() == cluster


def test_several_groups_of_a_block(cuda: Library) -> None:
    """Many rows, few columns."""
    N, K = 64 * 200 + 3, 64 * 3
    mask = random_mask(N, K, 0.05)
    input, weight = small_integers((20, K), torch.float16), small_integers((N, K), torch.float16)
    assert TILES.is_exact(cuda, input, tiled(cuda, weight, mask), weight, mask)


def test_edges(cuda: Library) -> None:
    TILES.check_edges(cuda, tiled, unserved=6)
