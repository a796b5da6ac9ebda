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
MODES = ("forward", "grad_input", "grad_weight")  # in the order of masked_ops::cuda::GemmMode
TILE = 64


class Gemm(ctypes.Structure):
    _fields_ = (
        ("mode", ctypes.c_int),
        ("dtype", ctypes.c_int),
        ("output_dtype", ctypes.c_int),
        ("M", ctypes.c_int64),
        ("N", ctypes.c_int64),
        ("K", ctypes.c_int64),
        ("input", ctypes.c_void_p),
        ("grad_output", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("fragments", ctypes.c_void_p),
        ("words", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
        ("tile_rows", ctypes.c_int),
        ("splits", ctypes.c_int),
        ("trade", ctypes.c_int),
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
    mode: str,
    operands: dict[str, Tensor],
    mask: Tensor,
    dtype: torch.dtype | None = None,
    plan: tuple[int, int, int] = (0, 0, 0),  # rows of a tile, splits, whether they trade
) -> Tensor:
    """The kernel on input, weight and maybe bias; on grad_output and weight; or on grad_output and input."""
    N, K = mask.shape
    given = {name: cuda.put(tensor) for name, tensor in operands.items()}
    M, half = next((t.shape[0], t.dtype) for name, t in operands.items() if name in ("input", "grad_output"))
    if mode == "grad_weight":
        given["words"] = cuda.put(words_of(mask))
    else:
        given["fragments"] = pack_fragments(cuda, mask, mode == "grad_input")
    shape = {"forward": (M, N), "grad_input": (M, K), "grad_weight": (N, K)}[mode]
    output = cuda.empty(shape, dtype or half)
    call = Gemm(MODES.index(mode), DTYPES.index(half), DTYPES.index(output.dtype), M, N, K)
    for name, tensor in {**given, "output": output}.items():
        setattr(call, name, tensor.data_ptr())
    call.tile_rows, call.splits, call.trade = plan
    cuda.bank_conflicts()
    cuda(kernel, ctypes.byref(call))
    assert cuda.bank_conflicts() == 0
    return output.cpu()


def expected(mode: str, operands: dict[str, Tensor], mask: Tensor) -> Tensor:
    of = {name: tensor.double() for name, tensor in operands.items()}
    if mode == "grad_weight":
        product = of["grad_output"].T @ of["input"]
        return torch.where(mask, product, torch.zeros_like(product))
    weight = torch.where(mask, of["weight"], torch.zeros_like(of["weight"]))
    output = of["grad_output"] @ weight if mode == "grad_input" else of["input"] @ weight.T
    return output + of["bias"] if "bias" in of else output


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
    cuda: Library,
    kernel: str,
    mode: str,
    dtype: torch.dtype,
    sides: tuple[int, int, int],
    plan: tuple[int, int, int] = (0, 0, 0),
) -> None:
    """Sums of small integers, and whatever is pruned poisoned."""
    M, N, K = sides
    mask = random_mask(N, K, 0.5)
    shapes = {"input": (M, K), "grad_output": (M, N), "weight": (N, K), "bias": (N,)}
    names = {
        "forward": ("input", "weight", "bias"),
        "grad_input": ("grad_output", "weight"),
        "grad_weight": ("grad_output", "input"),
    }[mode]
    operands = {name: small_integers(shapes[name], dtype) for name in names}
    if mode == "grad_weight":
        mask[N // 2] = mask[:, K // 3] = False
        operands["grad_output"][:, N // 2] = float("nan")
        operands["input"][:, K // 3] = float("inf")
        operands["input"][::2, K // 3] = -1.0  # pruned sums are negative, infinite and not a number
    else:
        operands["weight"][~mask] = float("nan")
    variants = [(operands, dtype)]
    if mode == "forward":
        variants.append(({name: operands[name] for name in ("input", "weight")}, dtype))
    if mode == "grad_weight":
        variants.append((operands, torch.float32))
    for given, output_dtype in variants:
        right = expected(mode, given, mask).to(output_dtype)
        output = gemm(cuda, kernel, mode, given, mask, output_dtype, plan)
        assert torch.equal(output, right), (kernel, mode, sides, output_dtype)
        if mode == "grad_weight":
            assert not output[~mask].signbit().any()


def skip_unless_served(cuda: Library, kernel: str, mode: str = "forward") -> None:
    if mode == "grad_weight" and kernel == "gemm_sm80":
        pytest.skip("gemm_sm80 leaves grad_weight to torch")
    if not serves(cuda, kernel):
        pytest.skip(f"{kernel} is not for this GPU")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_gemm_exactly(cuda: Library, kernel: str, dtype: torch.dtype, mode: str) -> None:
    """Everything late and threads in any order, on few multiprocessors and on many."""
    skip_unless_served(cuda, kernel, mode)
    cuda.set_mode(lazy=True, order=2)
    for sides in [(1, 8, 8), (64, 64, 64), (65, 136, 72), (127, 120, 192), (130, 56, 264), (257, 72, 136)]:
        for multiprocessors in (1, 132):
            cuda.set_device(90, multiprocessors)
            check_exactly(cuda, kernel, mode, dtype, sides)
    if mode == "forward":  # N may be anything
        for N in (1, 7, 129, 191):
            check_exactly(cuda, kernel, mode, dtype, (70, N, 72))
    if mode == "grad_weight":  # and here M
        for M, N, K in [(8, 192, 56), (63, 200, 64), (128, 256, 8), (129, 264, 128), (255, 128, 120)]:
            check_exactly(cuda, kernel, mode, dtype, (M, N, K))


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("lazy", [False, True], ids=["early", "late"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_gemm_in_any_order(cuda: Library, kernel: str, lazy: bool, order: int) -> None:
    """Many stages and, on few multiprocessors, several tiles a block; it does not show when copies and products end."""
    skip_unless_served(cuda, kernel)
    cuda.set_mode(lazy, order)
    for multiprocessors, M in ((2, 70), (2, 160), (1, 250)):
        cuda.set_device(90, multiprocessors)
        check_exactly(cuda, kernel, "forward", torch.bfloat16, (M, 264, 264))
        check_exactly(cuda, kernel, "grad_input", torch.bfloat16, (M, 264, 264))
    if kernel == "gemm_sm90":
        check_exactly(cuda, kernel, "grad_weight", torch.bfloat16, (264, 160, 264))


@pytest.mark.parametrize("mode", MODES)
def test_gemm_splits_a_long_contraction(cuda: Library, mode: str) -> None:
    """Idle multiprocessors share the contraction of a tile as a cluster, evenly or not."""
    skip_unless_served(cuda, "gemm_sm90")
    for order, multiprocessors, splits, (rows, R, C) in [
        (2, 2, 2, (8, 8, 776)),  # tiles of 64 rows of input
        (0, 3, 3, (64, 72, 520)),
        (0, 4, 4, (16, 72, 392)),
        (2, 8, 8, (64, 120, 1032)),
        (1, 8, 8, (136, 8, 1544)),  # of 192
        (1, 3, 3, (136, 128, 1032)),
        (2, 2, 2, (136, 128, 1288)),
        (2, 4, 2, (200, 8, 1032)),  # of 128
        (1, 2, 2, (248, 64, 2056)),  # of 256
        (2, 3, 3, (200, 64, 1032)),
    ]:
        cuda.set_mode(lazy=True, order=order)
        cuda.set_device(90, multiprocessors)
        sides = {"forward": (rows - 1, R, C), "grad_input": (rows - 3, C, R), "grad_weight": (C - 5, rows, R)}[mode]
        check_exactly(cuda, "gemm_sm90", mode, torch.float16, sides)
        assert cuda.cluster() in (splits, 0), (mode, sides)
    if mode == "forward":  # N may be anything
        cuda.set_device(90, 28)
        check_exactly(cuda, "gemm_sm90", mode, torch.bfloat16, (50, 131, 1032))
        assert cuda.cluster() in (8, 0)


def test_gemm_takes_any_plan(cuda: Library) -> None:
    """With more clusters than run at once, too."""
    skip_unless_served(cuda, "gemm_sm90")
    M, N, K = 130, 264, 1032
    mask = random_mask(N, K, 0.5)
    operands = {"input": small_integers((M, K), torch.bfloat16), "weight": small_integers((N, K), torch.bfloat16)}
    right = expected("forward", operands, mask).bfloat16()
    for rows, splits in [(64, 1), (64, 3), (128, 4), (192, 2), (256, 8)]:
        output = gemm(cuda, "gemm_sm90", "forward", operands, mask, plan=(rows, splits, 1))
        assert torch.equal(output, right) and cuda.cluster() in (splits, 0)
    for rows, splits in [(32, 1), (320, 1), (64, 0), (64, 5), (64, 16)]:
        with pytest.raises(UnsupportedError):
            gemm(cuda, "gemm_sm90", "forward", operands, mask, plan=(rows, splits, 0))
    with pytest.raises(UnsupportedError):  # two pairs of steps
        half = {name: tensor[:, :136].contiguous() for name, tensor in operands.items()}
        gemm(cuda, "gemm_sm90", "forward", half, mask[:, :136].contiguous(), plan=(64, 3, 0))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows", [128, 256])
def test_splits_trade_their_sums(cuda: Library, mode: str, rows: int) -> None:
    skip_unless_served(cuda, "gemm_sm90")
    for order, sides in enumerate([(rows // 2 - 1, 264, 136), (rows + 1, 136, 520), (2 * rows - 3, 72, 264)]):
        cuda.set_mode(lazy=True, order=order)
        M, R, C = sides
        sides = {"forward": (M, R, C), "grad_input": (M, C, R), "grad_weight": (C, M // 8 * 8, R)}[mode]
        check_exactly(cuda, "gemm_sm90", mode, torch.bfloat16, sides, plan=(rows, 2, 1))
        assert cuda.cluster() in (2, 0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_gemm_rounds_once(cuda: Library, kernel: str, dtype: torch.dtype, mode: str) -> None:
    skip_unless_served(cuda, kernel, mode)
    mask = random_mask(136, 520)
    shapes = {"input": (100, 520), "grad_output": (100, 136), "weight": (136, 520)}
    names = {"forward": ("input", "weight"), "grad_input": ("grad_output", "weight")}.get(
        mode, ("grad_output", "input")
    )
    operands = {name: torch.randn(shapes[name]).to(dtype) for name in names}
    right = expected(mode, operands, mask)
    wide = [torch.float32] if mode == "grad_weight" else []
    for output_dtype in [dtype, *wide]:
        error = (gemm(cuda, kernel, mode, operands, mask, output_dtype).double() - right).norm() / right.norm()
        assert error < {torch.bfloat16: 3e-3, torch.float16: 4e-4, torch.float32: 1e-6}[output_dtype]


@pytest.mark.parametrize("kernel", KERNELS)
def test_gemm_edges(cuda: Library, kernel: str) -> None:
    skip_unless_served(cuda, kernel)

    def run(mode: str, M: int, N: int, K: int, dtype: torch.dtype = torch.float16) -> Tensor:
        shapes = {"input": (M, K), "grad_output": (M, N), "weight": (N, K)}
        del shapes[{"forward": "grad_output", "grad_input": "input", "grad_weight": "weight"}[mode]]
        operands = {name: torch.ones(shape, dtype=dtype) for name, shape in shapes.items()}
        return gemm(cuda, kernel, mode, operands, torch.ones(N, K, dtype=torch.bool))

    assert run("forward", 0, 8, 8).shape == (0, 8) and run("forward", 3, 0, 8).shape == (3, 0)
    assert run("grad_input", 0, 8, 8).shape == (0, 8) and run("grad_input", 3, 8, 0).shape == (3, 0)
    unsupported = [
        ("forward", 4, 8, 12, torch.float16),
        ("grad_input", 4, 12, 8, torch.float16),
        ("forward", 4, 8, 8, torch.float32),
    ]
    if kernel == "gemm_sm80":
        unsupported += [("grad_weight", 4, 8, 8, torch.float16)]
    else:
        assert run("grad_weight", 4, 0, 8).shape == (0, 8) and run("grad_weight", 4, 8, 0).shape == (8, 0)
        assert torch.equal(run("grad_weight", 0, 24, 8), torch.zeros(24, 8, dtype=torch.float16))
        unsupported += [("grad_weight", 4, 12, 8, torch.float16), ("grad_weight", 4, 8, 12, torch.float16)]
    for case in unsupported:
        with pytest.raises(UnsupportedError):
            run(*case)
    if cuda.emulated:
        cuda.set_device(75 if kernel == "gemm_sm80" else 100)
        with pytest.raises(UnsupportedError):
            run("forward", 4, 8, 8)
