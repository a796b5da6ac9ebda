"""Passes over a mask or a weight: bits, masked copies, remaining values."""

from __future__ import annotations

import ctypes

import pytest
import torch
from cuda_library import DTYPES, Library, Small, UnsupportedError
from torch import Tensor

FLAT = [(1, 1), (1, 63), (3, 64), (2, 65), (5, 1), (7, 147), (33, 130), (1, 4099), (9, 256), (300, 2)]
FACTS = ("nnz", "soft", "live_rows", "live_cols", "stray")


def random_mask(rows: int, cols: int, density: float = 0.4) -> Tensor:
    return torch.rand(rows, cols) < density


def words_of(mask: Tensor) -> Tensor:
    """The bits of a boolean matrix as the kernels want them: int64 [rows][ceil(cols / 64)]."""
    rows, cols = mask.shape
    stride = -(-cols // 64)
    padded = torch.zeros(rows, stride * 64, dtype=torch.bool)
    padded[:, :cols] = mask
    weights = torch.tensor([1 << i for i in range(63)] + [-(1 << 63)], dtype=torch.int64)
    return (padded.view(rows, stride, 64).long() * weights).sum(-1)


def facts_of(mask: Tensor, soft: bool = False, stray: bool = False) -> dict[str, int]:
    return {
        "nnz": int(mask.sum()),
        "soft": int(soft),
        "live_rows": int(mask.any(1).sum()),
        "live_cols": int(mask.any(0).sum()),
        "stray": int(stray),
    }


def same_bytes(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.cpu().contiguous().view(torch.uint8), b.cpu().contiguous().view(torch.uint8))


def pack(cuda: Library, name: str, *source: object, rows: int, cols: int) -> tuple[Tensor, Tensor, dict[str, int]]:
    stride = -(-cols // 64)
    words, live = cuda.empty((rows, stride), torch.int64), cuda.empty(stride, torch.int64)
    facts = cuda.empty(5, torch.int64)
    cuda(name, *source, rows, cols, words, live, facts)
    return words.cpu(), live.cpu(), dict(zip(FACTS, facts.tolist(), strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pack_mask(cuda: Library, dtype: torch.dtype) -> None:
    for rows, cols in FLAT:
        mask = random_mask(rows, cols)
        mask[:, cols // 2] = False
        mask[rows // 3] = False
        words, live, facts = pack(cuda, "pack_mask", dtype, cuda.put(mask.to(dtype)), rows=rows, cols=cols)
        assert torch.equal(words, words_of(mask))
        assert torch.equal(live, words_of(mask.any(0, keepdim=True))[0])
        assert facts == facts_of(mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pack_soft_mask(cuda: Library, dtype: torch.dtype) -> None:
    """Zeros of either sign are pruned, whatever is not 0 or 1 stays and is told."""
    odd = [2] if not dtype.is_floating_point else [0.5, -1.0, float("nan"), float("inf"), torch.finfo(dtype).tiny]
    for value in odd:
        mask = torch.ones(3, 70, dtype=dtype)
        mask[1, 69] = value
        mask[2, 1] = -0.0 if dtype.is_floating_point else 0
        words, _, facts = pack(cuda, "pack_mask", dtype, cuda.put(mask), rows=3, cols=70)
        assert torch.equal(words, words_of(mask != 0))
        assert facts["soft"] != 0 and facts["nnz"] == 209


def test_pack_mask_of_nothing(cuda: Library) -> None:
    for rows, cols in [(0, 5), (5, 0), (0, 0)]:
        mask = torch.empty(rows, cols)
        _, _, facts = pack(cuda, "pack_mask", mask.dtype, cuda.put(mask), rows=rows, cols=cols)
        assert facts == dict.fromkeys(FACTS, 0)


def test_pack_bits(cuda: Library) -> None:
    for rows, cols in FLAT:
        mask = random_mask(rows, cols)
        words = words_of(mask)
        bits = words.view(torch.uint8).view(rows, -1)[:, : -(-cols // 8)].clone()
        got, live, facts = pack(cuda, "pack_bits", cuda.put(bits), rows=rows, cols=cols)
        assert torch.equal(got, words)
        assert torch.equal(live, words_of(mask.any(0, keepdim=True))[0])
        assert facts == facts_of(mask)
        if cols % 8:
            bits[-1, -1] |= 1 << (cols % 8)
            got, _, facts = pack(cuda, "pack_bits", cuda.put(bits), rows=rows, cols=cols)
            assert torch.equal(got, words) and facts == facts_of(mask, stray=True)


def test_row_offsets(cuda: Library) -> None:
    cuda.set_mode(lazy=False, order=2)
    for rows, cols in [*FLAT, (0, 3), (3, 0), (1023, 5), (1024, 5), (1025, 5), (2500, 3)]:
        mask = random_mask(rows, cols)
        offsets = cuda.empty(rows + 1, torch.int64)
        cuda("row_offsets", cuda.put(words_of(mask)), rows, cols, offsets)
        assert offsets.tolist() == [0, *mask.sum(1).cumsum(0).tolist()]


# --- mask_copy -------------------------------------------------------------------------------------------------------


class Task(ctypes.Structure):
    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("words", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
    )


COPIES = [torch.int8, torch.int16, torch.float32, torch.float64, torch.complex128]  # in the order of CopyKind
CAST = {  # from and to
    5: (torch.float32, torch.bfloat16),
    6: (torch.float32, torch.float16),
    7: (torch.bfloat16, torch.float32),
    8: (torch.float16, torch.float32),
}


def dtypes_of(kind: int) -> tuple[torch.dtype, torch.dtype]:
    return CAST[kind] if kind in CAST else (COPIES[kind], COPIES[kind])


def random_bits(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Any bit pattern, NaN and Inf among them."""
    size = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(0, 256, (size,), dtype=torch.uint8).view(dtype).view(shape)


def mask_copy(cuda: Library, kind: int, tasks: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    array = (Task * max(len(tasks), 1))()
    for task, (weight, words, out) in zip(array, tasks, strict=False):
        task.weight, task.words, task.out = weight.data_ptr(), words.data_ptr(), out.data_ptr()
        task.rows, task.cols = weight.shape
    cuda("mask_copy", Small(kind), array, len(tasks))


def masked(weight: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.where(mask, weight.to(dtype), torch.zeros((), dtype=dtype))


@pytest.mark.parametrize("offsets", [(0, 0), (16, 32), (0, 1), (1, 0)], ids=str)
@pytest.mark.parametrize("kind", range(9))
def test_mask_copy(cuda: Library, kind: int, offsets: tuple[int, int]) -> None:
    """Every size, element and alignment; what lies around out stays as it is."""
    for rows, cols in [*FLAT, (130, 64), (17, 1024), (65, 129), (1, 9000)]:
        mask = random_mask(rows, cols)
        dtype, to = dtypes_of(kind)
        weight = (torch.randn(rows, cols) * 1e5).to(dtype) if kind in CAST else random_bits((rows, cols), dtype)
        if kind in CAST:
            weight[0, 0] = float("inf")
            weight[-1, -1] = 1e-40 if dtype is not torch.float16 else 6e-8  # the least of its subnormals
            weight[~mask] = float("nan")
        w = cuda.put(weight, offsets[0] * (dtype.itemsize if offsets[0] < 16 else 1))
        around = cuda.empty(rows * cols + 64, to, offsets[1] * (to.itemsize if offsets[1] < 16 else 1))
        out = around[32:-32].view(rows, cols)
        mask_copy(cuda, kind, [(w, cuda.put(words_of(mask)), out)])
        assert same_bytes(out, masked(weight, mask, to))
        assert (torch.cat([around[:32], around[-32:]]).view(torch.uint8) == 0xA5).all()


@pytest.mark.parametrize("kind", range(5))
def test_mask_copy_in_place(cuda: Library, kind: int) -> None:
    for rows, cols in [(7, 147), (33, 130), (9, 256)]:
        mask, weight = random_mask(rows, cols), random_bits((rows, cols), COPIES[kind])
        out = cuda.put(weight)
        mask_copy(cuda, kind, [(out, cuda.put(words_of(mask)), out)])
        assert same_bytes(out, masked(weight, mask, weight.dtype))


@pytest.mark.parametrize("kind", [1, 2, 5, 7])
def test_mask_copy_of_many(cuda: Library, kind: int) -> None:
    """More tasks than fit a launch, of unlike sizes and alignments, some of them empty."""
    dtype, to = dtypes_of(kind)
    tasks, expected = [], []
    for i in range(150):
        rows, cols = [(0, 4), (3, 0), (5, 64), (1, 1), (40, 190), (2, 4096)][i % 6]
        mask, weight = random_mask(rows, cols), torch.randn(rows, cols).to(dtype)
        skew = dtype.itemsize if i % 7 == 3 else 0
        tasks.append((cuda.put(weight, skew), cuda.put(words_of(mask)), cuda.empty((rows, cols), to)))
        expected.append(masked(weight, mask, to))
    mask_copy(cuda, kind, tasks)
    for (_, _, out), right in zip(tasks, expected, strict=True):
        assert same_bytes(out, right)


def test_mask_copy_refuses(cuda: Library) -> None:
    mask_copy(cuda, 0, [])
    with pytest.raises(UnsupportedError):
        mask_copy(cuda, 9, [])


# --- compress and expand ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", COPIES, ids=str)
def test_compress_and_expand(cuda: Library, dtype: torch.dtype) -> None:
    for rows, cols in [*FLAT, (3, 2047), (3, 2048), (2, 2049), (1, 4200)]:
        for density in (0.0, 0.1, 1.0) if cols > 1000 else (0.4,):
            mask, dense = random_mask(rows, cols, density), random_bits((rows, cols), dtype)
            words, offsets = cuda.put(words_of(mask)), cuda.put(torch.tensor([0, *mask.sum(1).cumsum(0).tolist()]))
            values = cuda.empty(int(mask.sum()), dtype)
            cuda("compress", Small(dtype.itemsize), words, rows, cols, offsets, cuda.put(dense), values)
            assert same_bytes(values, dense[mask])
            back = cuda.empty((rows, cols), dtype)
            cuda("expand", Small(dtype.itemsize), words, rows, cols, offsets, values, back)
            assert same_bytes(back, masked(dense, mask, dtype))
    with pytest.raises(UnsupportedError):
        cuda("expand", Small(3), words, rows, cols, offsets, values, back)
