"""With MASKED_OPS_CUDA=1: every kernel may be used, and is."""

from __future__ import annotations

import contextlib
import copy
import gc
import warnings

import pytest
import torch
from fake_device import FakeCuda
from torch import Tensor, nn
from torch.nn import functional as F

import masked_ops
from masked_ops import _ops, prune, report

HALF = (torch.bfloat16, torch.float16)
FLOATS = (*HALF, torch.float32, torch.float64)
MASKS = (torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64)


def whole(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cuda") -> Tensor:
    """-1, 0 and 1, whose sums of products are exact."""
    return torch.randint(-1, 2, shape).to(device, dtype)


def binary(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cuda") -> Tensor:
    return (torch.rand(shape) < 0.4).to(device, dtype)


def step(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, dy: Tensor) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, *([] if bias is None else [bias]))]
    y = masked_ops.masked_linear(leaves[0], leaves[1], mask, leaves[2] if bias is not None else None)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def expected_step(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, dy: Tensor) -> list[Tensor]:
    cpu = [None if t is None else t.detach().cpu().double() for t in (x, weight, mask, bias, dy)]
    x, weight, mask, bias, dy = cpu
    masked = weight * mask
    y = F.linear(x, masked, bias)
    grads = [dy @ masked, (dy.flatten(0, -2).t() @ x.flatten(0, -2)) * mask]
    return [y, *grads, *([] if bias is None else [dy.flatten(0, -2).sum(0)])]


def same(actual: list[Tensor], expected: list[Tensor]) -> bool:
    return all(a.is_cuda and torch.equal(a.cpu().double(), e) for a, e in zip(actual, expected, strict=True))


def case(M: int, N: int, K: int, dtype: torch.dtype, mask: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    return (
        whole(M, K, dtype=dtype),
        whole(N, K, dtype=dtype),
        binary(N, K, dtype=mask),
        whole(N, dtype=dtype),
        whole(M, N, dtype=dtype),
    )


def settle(mask: Tensor, weight: Tensor) -> None:
    """Uses enough for the mask to be packed."""
    for _ in range(3):
        masked_ops.apply_mask(weight, mask)


# --- linear ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [None, "copy", "mask_copy"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_linear_of_any_size(cuda: FakeCuda, path: str | None, dtype: torch.dtype) -> None:
    for M, N, K in ((1, 1, 1), (3, 65, 63), (5, 64, 130), (70, 9, 129), (0, 4, 5), (4, 0, 5), (4, 5, 0)):
        x, weight, mask, bias, dy = case(M, N, K, dtype)
        with masked_ops.use_path(path):
            for _ in range(3):  # new, being packed, known
                assert same(step(x, weight, mask, bias, dy), expected_step(x, weight, mask, bias, dy)), (M, N, K)
                assert same(step(x, weight, mask, None, dy), expected_step(x, weight, mask, None, dy)), (M, N, K)


@pytest.mark.parametrize("path", ["gemm_sm90", "gemm_sm80"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_fused_gemm(cuda: FakeCuda, path: str, dtype: torch.dtype) -> None:
    before = cuda.calls(path)
    with masked_ops.use_path(path):
        for M, N, K in ((1, 8, 8), (64, 72, 136), (7, 64, 64)):
            x, weight, mask, bias, dy = case(M, N, K, dtype)
            assert same(step(x, weight, mask, bias, dy), expected_step(x, weight, mask, bias, dy)), (M, N, K)
        three = whole(2, 3, 64, dtype=dtype)
        y = masked_ops.masked_linear(three, weight, mask, bias)
        assert torch.equal(y.cpu().double(), F.linear(*(t.cpu().double() for t in (three, weight * mask, bias))))
        assert masked_ops.masked_linear(whole(0, 64, dtype=dtype), weight, mask).shape == (0, 64)
    assert cuda.calls(path) - before == (3 if path == "gemm_sm90" else 2) * 3 + 1


def test_the_fused_gemm_is_chosen(cuda: FakeCuda) -> None:
    x, weight, mask, bias, dy = case(128, 64, 64, torch.bfloat16)
    settle(mask, weight)
    before = {name: cuda.calls(name) for name in ("gemm_sm90", "gemm_sm80", "mask_copy")}
    assert same(step(x, weight, mask, bias, dy), expected_step(x, weight, mask, bias, dy))
    calls = {name: cuda.calls(name) - count for name, count in before.items()}
    assert calls == {"gemm_sm90": 3, "gemm_sm80": 0, "mask_copy": 0}
    assert _ops.explain_linear(weight, mask, 128)[0] == "gemm_sm90"
    assert _ops.explain_linear(weight, mask, 1)[0] == "gemm_sm90"
    assert _ops.explain_linear(weight, mask, 1 << 20)[0] == "mask_copy"
    assert _ops.explain_linear(weight.float(), mask, 128)[0] == "mask_copy"
    assert _ops.explain_linear(weight[:, :63], mask[:, :63], 128)[0] == "mask_copy"
    assert _ops.explain_linear(weight, mask / 2, 128) == ("copy", "the mask is soft")


def test_what_a_forced_path_refuses(cuda: FakeCuda) -> None:
    x, weight, mask, _, _ = case(8, 8, 12, torch.bfloat16)
    for path, arguments, reason in (
        ("gemm_sm90", (x, weight, mask), "not a multiple of 8"),
        ("gemm_sm90", (x.float(), weight.float(), mask), "bfloat16 and float16 only"),
        ("gemm_sm80", (x[:, :8], weight[:, :8], mask[:, :8]), "not contiguous"),
        ("mask_copy", (x, weight, mask / 2), "the mask is soft"),
        ("decode", (x, weight, mask), "for packed layers"),
        ("fused", (x, weight, mask), "not in CPU memory"),
        ("sparse", (x, weight, mask), "not in CPU memory"),
    ):
        with masked_ops.use_path(path), pytest.raises(RuntimeError, match=f"path '{path}' cannot serve.*{reason}"):
            masked_ops.masked_linear(*arguments)
    with masked_ops.use_path("gemm_sm90"), pytest.raises(RuntimeError, match="it has no convolution kernel"):
        masked_ops.masked_conv1d(whole(1, 1, 4), whole(1, 1, 2), binary(1, 1, 2))
    with masked_ops.use_path("mask_copy"), pytest.raises(RuntimeError, match="the weight is in CPU memory"):
        masked_ops.masked_linear(torch.ones(1, 2), torch.ones(3, 2), torch.ones(3, 2))


@pytest.mark.parametrize("mask_dtype", MASKS, ids=str)
def test_masks_of_any_dtype(cuda: FakeCuda, mask_dtype: torch.dtype) -> None:
    for dtype in FLOATS:
        x, weight, mask, bias, dy = case(4, 33, 70, dtype, mask_dtype)
        for _ in range(3):
            assert same(step(x, weight, mask, bias, dy), expected_step(x, weight, mask, bias, dy))


def test_a_pruned_weight_counts_as_absent(cuda: FakeCuda) -> None:
    weight = whole(9, 70)
    for mask in (binary(9, 70), binary(9, 70, dtype=torch.bool), binary(9, 70) * 2):
        spoiled = torch.where(mask != 0, weight, torch.full_like(weight, float("nan")))
        for _ in range(3):
            assert torch.equal(masked_ops.apply_mask(spoiled, mask).cpu(), (weight * mask).cpu())


def test_soft_masks(cuda: FakeCuda) -> None:
    x, weight, mask, bias, dy = case(4, 33, 70, torch.float32)
    soft = mask * torch.randint(0, 4, mask.shape).cuda()
    for _ in range(3):
        assert same(step(x, weight, soft, bias, dy), expected_step(x, weight, soft, bias, dy))


def test_layouts(cuda: FakeCuda) -> None:
    layouts = {
        "contiguous": lambda t: t,
        "transposed": lambda t: t.t().contiguous().t(),
        "cut": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
        "expanded": lambda t: t[:1].expand(t.shape),
        "unaligned": lambda t: torch.cat([t.flatten(), t.flatten()[:1]])[1:].view(t.shape),
    }
    for path in (None, "mask_copy", "gemm_sm90"):
        for name, of_weight in layouts.items():
            for other, of_mask in layouts.items():
                x, weight, mask, bias, dy = case(4, 16, 72, torch.bfloat16)
                weight, mask = of_weight(weight), of_mask(mask)
                if path == "gemm_sm90" and name != "contiguous":
                    continue
                with masked_ops.use_path(path):
                    for _ in range(3):
                        result = step(of_mask(x), weight, mask, bias, of_mask(dy))
                        expected = expected_step(of_mask(x), weight, mask, bias, of_mask(dy))
                        assert same(result, expected), (path, name, other)


def test_the_masked_weight_lies_as_the_weight_does(cuda: FakeCuda) -> None:
    """Whether the mask is new, known or soft, and whatever its own layout; also an expanded weight, which has none."""
    for of_weight in (lambda t: t[:1].expand(t.shape), lambda t: t[:, :1].expand(t.shape), lambda t: t.t()):
        for soft in (1, 2):
            weight, mask = of_weight(whole(6, 6)), (binary(6, 6) * soft).t()
            for _ in range(4):
                result = masked_ops.apply_mask(weight, mask)
                assert result.stride() == torch.empty_like(weight).stride()
                assert torch.equal(result.cpu(), (weight * mask).cpu())


# --- convolution -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [None, "copy", "mask_copy"])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
def test_convolution(cuda: FakeCuda, path: str | None, dimensions: int, transposed: bool) -> None:
    name = f"conv_transpose{dimensions}d" if transposed else f"conv{dimensions}d"
    ours, theirs = getattr(masked_ops, f"masked_{name}"), getattr(F, name)
    x, weight, bias = whole(2, 4, *[6] * dimensions), whole(4, 2, *[3] * dimensions), whole(4)
    groups = 2
    mask = binary(*weight.shape)
    if dimensions == 2:
        weight = weight.to(memory_format=torch.channels_last)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    cpu = [t.detach().cpu().requires_grad_() for t in leaves]
    plain = theirs(cpu[0], cpu[1] * mask.cpu(), cpu[2], groups=groups)
    dy = whole(*plain.shape)
    wanted = torch.autograd.grad(plain, cpu, dy.cpu())
    with masked_ops.use_path(path):
        for _ in range(3):
            y = ours(x, weight, mask, bias, groups=groups)
            grads = torch.autograd.grad(y, leaves, dy)
            assert torch.equal(y.cpu(), plain)
            assert all(torch.equal(a.cpu(), b) for a, b in zip(grads, wanted, strict=True))
    one = [1] * dimensions
    geometry = one, [0] * dimensions, one, transposed, [0] * dimensions, groups
    assert _ops.explain_convolution(weight, mask, x.shape, False, *geometry)[0] == "mask_copy"


# --- packed ----------------------------------------------------------------------------------------------------------


def packed(weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    flags = F.pad(mask.cpu().to(torch.uint8), (0, -mask.shape[1] % 8)).view(mask.shape[0], -1, 8)
    bits = (flags << torch.arange(8, dtype=torch.uint8)).sum(2, dtype=torch.uint8)
    return weight[mask != 0], bits.to(weight.device)


FORMS = {"decode_sliced": ("slice", "fill_slices"), "decode_gathered": ("gather", "fill_gathered")}


def frozen_case(M: int, density: float, dtype: torch.dtype) -> tuple[Tensor, ...]:
    x, weight, mask, bias, dy = case(M, 1024, 1024, dtype)
    return x, weight, (torch.rand(mask.shape) < density).to(mask), bias, dy


@pytest.mark.parametrize(
    ("path", "M", "density"), [("decode_sliced", 4, 0.1), ("decode_gathered", 5, 0.1), ("decode_gathered", 1, 0.4)]
)
def test_values_that_are_laid_out(cuda: FakeCuda, path: str, M: int, density: float) -> None:
    """Frozen values are laid out at their second use, and anew when others come."""
    x, weight, mask, bias, dy = frozen_case(M, density, torch.bfloat16)
    values, bits = packed(weight, mask)
    masked_ops.packed_linear(x, values, bits, 1024)

    def calls(capture: bool = False) -> list[int]:
        names = ("decode", path, *FORMS[path])
        before = [cuda.calls(name) for name in names]
        with cuda.capture() if capture else contextlib.nullcontext():
            y = masked_ops.packed_linear(x, values, bits, 1024, bias)
        assert same([y], expected_step(x, weight, mask, bias, dy)[:1])
        return [cuda.calls(name) - count for name, count in zip(names, before, strict=True)]

    assert calls() == [0, 1, 1, 1]
    assert calls() == [0, 1, 0, 0]
    held = masked_ops.cache_info()["bytes"]
    values.mul_(2)
    weight.mul_(2)
    assert calls() == [1, 0, 0, 0] and masked_ops.cache_info()["bytes"] != held
    assert calls() == [0, 1, 0, 1] and masked_ops.cache_info()["bytes"] == held
    values.requires_grad_()
    assert calls() == [1, 0, 0, 0]
    values.requires_grad_(False)
    of_few = "decode_sliced" if density < 0.2 else "decode_gathered"
    for rows, chosen in ((4, of_few), (5, "decode_gathered"), (64, "decode_gathered"), (65, "copy")):
        assert _ops.explain_packed_linear(values, bits, 1024, rows)[0] == chosen
    assert calls(capture=True) == [0, 1, 0, 0]
    values.add_(0)  # of which the graph knows nothing: what it reads stays
    for capture in (False, False, True):
        assert calls(capture) == [1, 0, 0, 0]


def test_both_forms_of_the_same_values(cuda: FakeCuda) -> None:
    x, weight, mask, bias, dy = frozen_case(9, 0.1, torch.float16)
    values, bits = packed(weight, mask)
    expected = expected_step(x, weight, mask, bias, dy)[0]
    for _ in range(3):
        assert same([masked_ops.packed_linear(x, values, bits, 1024, bias)], [expected])
        assert same([masked_ops.packed_linear(x[:2], values, bits, 1024, bias)], [expected[:2]])
    before = {name: cuda.calls(name) for name in ("decode_sliced", "decode_gathered", "fill_slices", "fill_gathered")}
    for rows in (9, 2):
        masked_ops.packed_linear(x[:rows], values, bits, 1024, bias)
    assert [cuda.calls(name) - count for name, count in before.items()] == [1, 1, 0, 0]


@pytest.mark.parametrize(
    ("path", "M", "K", "refusal"),
    [("decode_sliced", 4, 1023, "in_features is odd"), ("decode_gathered", 9, 1020, "in_features is no multiple of 8")],
)
def test_what_is_not_worth_laying_out(cuda: FakeCuda, path: str, M: int, K: int, refusal: str) -> None:
    x, _, mask, _, _ = frozen_case(M, 0.1, torch.bfloat16)
    odd = mask.repeat(2, 1)[:, :K].contiguous()
    mask.zero_()
    mask[:, ::32] = binary(1024, 32)  # all in one lane's columns, and no block of them
    of_pieces = FORMS[path][0]
    for m, k in ((mask, 1024), (mask[:, :32].contiguous(), 32), (odd, K)):
        values, bits = packed(whole(*m.shape).bfloat16(), m)
        before = cuda.calls(path), cuda.calls(of_pieces)
        for _ in range(3):
            masked_ops.packed_linear(x[:, :k], values, bits, k)
        served = m is mask and path == "decode_gathered"  # whose model here is even
        assert (cuda.calls(path) > before[0]) == served, k
        assert cuda.calls(of_pieces) == before[1] + (m is mask)
    with masked_ops.use_path(path):
        with pytest.raises(RuntimeError, match=refusal):
            masked_ops.packed_linear(x[:, :K], values, bits, K)
        with pytest.raises(RuntimeError, match="bfloat16 and float16 only"):
            masked_ops.packed_linear(x[:, :K].float(), values.float(), bits, K)


@pytest.mark.parametrize("path", [None, "copy", "decode"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_packed_linear(cuda: FakeCuda, path: str | None, dtype: torch.dtype) -> None:
    if path == "decode" and dtype == torch.float64:
        pytest.skip("decode takes no float64")
    before = cuda.calls("decode")
    calls = 0
    for M, N, K in ((1, 1, 1), (3, 65, 63), (64, 9, 130), (65, 8, 64), (0, 4, 5)):
        x, weight, mask, bias, dy = case(M, N, K, dtype)
        if path == "decode" and M == 65:
            continue
        values, bits = packed(weight, mask)
        expected = expected_step(x, weight, mask, bias, dy)
        leaves = [x.requires_grad_(), values.requires_grad_(), bias.requires_grad_()]
        with masked_ops.use_path(path):
            for _ in range(2):
                y = masked_ops.packed_linear(leaves[0], leaves[1], bits, K, leaves[2])
                grads = torch.autograd.grad(y, leaves, dy)
                wanted = [expected[0], expected[1], expected[2][mask.cpu() != 0], expected[3]]
                assert same([y.detach(), *grads], wanted), (M, N, K)
        calls += 2 * (0 < M <= 64)
    assert cuda.calls("decode") - before == (0 if path == "copy" or dtype == torch.float64 else calls)


@pytest.mark.parametrize("transposed", [False, True])
def test_packed_convolution(cuda: FakeCuda, transposed: bool) -> None:
    name = "conv_transpose2d" if transposed else "conv2d"
    ours, theirs = getattr(masked_ops, f"packed_{name}"), getattr(F, name)
    x, weight, bias = whole(2, 4, 6, 5), whole(4, 2, 3, 3), whole(4)
    mask = binary(*weight.shape)
    values, bits = packed(weight.flatten(1), mask.flatten(1))
    leaves = [t.requires_grad_() for t in (x, values, bias)]
    cpu = [t.detach().cpu().requires_grad_() for t in (x, weight, bias)]
    plain = theirs(cpu[0], cpu[1] * mask.cpu(), cpu[2], groups=2)
    dy = whole(*plain.shape)
    wanted = list(torch.autograd.grad(plain, cpu, dy.cpu()))
    wanted[1] = wanted[1][mask.cpu() != 0]
    y = ours(x, values, bits, weight.shape, bias, groups=2)
    assert torch.equal(y.cpu(), plain)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(torch.autograd.grad(y, leaves, dy), wanted, strict=True))
    one = [1, 1]
    assert (
        _ops.explain_packed_convolution(
            values, bits, weight.shape, x.shape, False, one, [0, 0], one, transposed, [0, 0], 2
        )[0]
        == "copy"
    )


def test_packed_bits_are_checked(cuda: FakeCuda) -> None:
    x, weight, mask, _, _ = case(2, 5, 11, torch.float32)
    values, bits = packed(weight, mask)
    with pytest.raises(RuntimeError, match="one value for each of the"):
        masked_ops.packed_linear(x, values[1:], bits, 11)
    stray = bits.clone()
    stray[3, 1] |= 128
    with pytest.raises(RuntimeError, match="zero bits beyond the 11 columns"):
        masked_ops.packed_linear(x, values, stray, 11)
    with pytest.raises(RuntimeError, match=r"weight_bits must be on the device of weight_values, cuda:0, got cpu"):
        masked_ops.packed_linear(x, values, bits.cpu(), 11)
    with torch.inference_mode():
        y = masked_ops.packed_linear(x, values.clone(), bits.clone(), 11)
    assert torch.equal(y.cpu(), F.linear(x.cpu(), (weight * mask).cpu()))


# --- waiting, streams, graphs ----------------------------------------------------------------------------------------


def test_no_call_waits_for_the_device(cuda: FakeCuda) -> None:
    x, weight, mask, bias, dy = case(128, 64, 64, torch.bfloat16)
    step(x, weight, mask, bias, dy)  # the kernels' own checks
    fresh = mask.clone()
    image, kernel = whole(1, 2, 5, 5), whole(3, 2, 3, 3).requires_grad_()
    kernel_mask = binary(3, 2, 3, 3)
    before = cuda.synchronisations
    for _ in range(4):
        step(x, weight, fresh, bias, dy)
    for _ in range(4):
        masked_ops.masked_conv2d(image, kernel, kernel_mask).sum().backward()
    assert cuda.synchronisations == before
    # A forced path, a report and packed bits may wait, once.
    values, bits = packed(weight, fresh)
    before = cuda.synchronisations
    for _ in range(3):
        masked_ops.packed_linear(x, values, bits, 64)
    assert cuda.synchronisations - before <= 1


def test_a_mask_is_read_itself_until_its_bits_are_there(cuda: FakeCuda) -> None:
    x, weight, mask, bias, dy = case(4, 33, 70, torch.float32)
    expected = expected_step(x, weight, mask, bias, dy)
    step(x, weight, mask.clone(), bias, dy)
    with cuda.late_events():
        before = cuda.calls("mask_copy"), cuda.calls("pack_mask")
        for _ in range(3):
            assert same(step(x, weight, mask, bias, dy), expected)
        assert (cuda.calls("mask_copy"), cuda.calls("pack_mask")) == (before[0], before[1] + 1)
    assert same(step(x, weight, mask, bias, dy), expected)
    assert cuda.calls("mask_copy") == before[0] + 2  # forward keeps its masked weight for the gradient of the input


def test_a_bool_mask_takes_one_pass_from_the_first_use_on(cuda: FakeCuda) -> None:
    """Which keeps the bits of a NaN that a product would not."""
    weight = torch.full((5, 8), 0x7F81, dtype=torch.int16).view(torch.bfloat16).cuda()
    mask = binary(5, 8).bool()
    allocated = cuda.allocated
    result = masked_ops.apply_mask(weight, mask)
    assert cuda.allocated - allocated <= 2, "the result, and a zero"
    assert torch.equal(result.cpu().view(torch.int16), torch.where(mask.cpu(), 0x7F81, 0).short())


def test_a_mask_that_is_always_rewritten_is_not_packed_in_vain(cuda: FakeCuda) -> None:
    _, weight, mask, _, _ = case(4, 33, 70, torch.float32)
    before = cuda.calls("pack_mask")
    for i in range(100):
        mask.copy_(binary(33, 70))
        for _ in range(3):
            assert torch.equal(masked_ops.apply_mask(weight, mask).cpu(), (weight * mask).cpu()), i
    assert cuda.calls("pack_mask") - before <= 2
    settle(mask, weight)
    for _ in range(70):
        masked_ops.apply_mask(weight, mask)
    assert cuda.calls("pack_mask") - before <= 3  # once it stands, it is


def test_changes_of_a_mask_are_seen(cuda: FakeCuda) -> None:
    _, weight, mask, _, _ = case(4, 33, 70, torch.float32)
    for _ in range(10):
        settle(mask, weight)
        mask.copy_(binary(33, 70))
        assert torch.equal(masked_ops.apply_mask(weight, mask).cpu(), (weight * mask).cpu())
        mask[0, 0] = 1 - mask[0, 0]
        assert torch.equal(masked_ops.apply_mask(weight, mask).cpu(), (weight * mask).cpu())


def test_the_cache_dies_with_the_mask(cuda: FakeCuda) -> None:
    _, weight, mask, _, _ = case(4, 64, 640, torch.float32)
    settle(mask, weight)
    info = masked_ops.cache_info()
    assert info["entries"] == 1 and info["bytes"] > 64 * 640 / 8
    del mask
    gc.collect()
    assert masked_ops.cache_info()["entries"] == 0


def test_bits_are_read_on_other_streams(cuda: FakeCuda) -> None:
    x, weight, mask, bias, dy = case(128, 64, 64, torch.bfloat16)
    expected = expected_step(x, weight, mask, bias, dy)
    settle(mask, weight)
    recorded, waited = cuda.recorded_on_streams, cuda.waits_of_streams
    with cuda.stream(5):
        masked_ops.apply_mask(weight, mask)
        assert (cuda.recorded_on_streams - recorded, cuda.waits_of_streams - waited) == (1, 0)
        with cuda.late_events(), torch.no_grad():
            masked_ops.masked_linear(x, weight, mask)  # makes the fragments, on this stream
    with cuda.stream(6), cuda.late_events(), torch.no_grad():
        recorded, waited = cuda.recorded_on_streams, cuda.waits_of_streams
        y = masked_ops.masked_linear(x, weight, mask, bias)
        assert cuda.waits_of_streams - waited == 1 and cuda.recorded_on_streams > recorded
    assert torch.equal(y.cpu().double(), expected[0])


def test_a_graph_reads_the_mask_itself(cuda: FakeCuda) -> None:
    x, weight, mask, bias, dy = case(128, 64, 64, torch.bfloat16)
    expected = expected_step(x, weight, mask, bias, dy)
    known, new = mask.clone(), mask.clone()
    settle(known, weight)
    step(x, weight, known, bias, dy)
    other = whole(1, 2, 5), whole(3, 2, 3), binary(3, 2, 3)
    before = [cuda.calls(name) for name in ("mask_copy", "gemm_sm90", "pack_mask")]
    with cuda.capture():
        for m in (known, new, new.bool()):
            results = [masked_ops.masked_linear(x, weight, m, bias)]
            results.append(_ops.linear_grad_input(dy, weight, m))
            results.append(_ops.linear_grad_weight(dy, x, m))
            masked_ops.masked_conv1d(*other)
    assert [cuda.calls(name) for name in ("mask_copy", "gemm_sm90", "pack_mask")] == before
    assert same(results, expected[:3])
    with cuda.capture(), masked_ops.use_path("gemm_sm90"), pytest.raises(RuntimeError, match="graph is being captured"):
        masked_ops.masked_linear(x, weight, known)


def test_packed_layers_in_a_graph(cuda: FakeCuda) -> None:
    x, weight, mask, bias, dy = case(4, 64, 64, torch.bfloat16)
    values, bits = packed(weight, mask)
    expected = expected_step(x, weight, mask, bias, dy)
    with cuda.capture():  # not met before: torch's own operations
        y = masked_ops.packed_linear(x, values, bits, 64, bias)
        dx = _ops.packed_linear_grad_input(dy, values, bits, 64)
        grad = _ops.packed_linear_grad_values(dy, x, bits, values.numel())
    assert same([y, dx, grad], [*expected[:2], expected[2][mask.cpu() != 0]])
    for _ in range(2):
        masked_ops.packed_linear(x, values, bits, 64)
    before = cuda.calls("decode")
    with cuda.capture():
        y = masked_ops.packed_linear(x, values, bits, 64, bias)
    assert same([y], expected[:1]) and cuda.calls("decode") == before + 1
    # The graph reads the index at every replay: it outlives the cache's memory of it, but not the bits.
    freed = cuda.freed
    masked_ops.clear_cache()
    assert masked_ops.cache_info()["entries"] == 0 and cuda.freed == freed
    del bits
    masked_ops.cache_info()
    assert cuda.freed > freed + 1


# --- devices, failures -----------------------------------------------------------------------------------------------


def test_several_devices(cuda: FakeCuda) -> None:
    x, weight, mask, bias, dy = (t.to("cuda:1") for t in case(128, 64, 64, torch.bfloat16))
    for _ in range(3):
        results = step(x, weight, mask, bias, dy)
    assert same(results, expected_step(x, weight, mask, bias, dy))
    assert all(result.device == torch.device("cuda:1") for result in results)
    assert _ops.explain_linear(weight, mask, 128)[0] == "mask_copy"
    with masked_ops.use_path("gemm_sm90"), pytest.raises(RuntimeError, match=r"needs compute capability 9\.0"):
        masked_ops.masked_linear(x, weight, mask)
    with pytest.raises(RuntimeError, match="mask must be on the device of weight, cuda:1, got cuda:0"):
        masked_ops.masked_linear(x, weight, mask.to("cuda:0"))


def test_a_launch_that_fails_is_told_and_leaves_all_whole(cuda: FakeCuda) -> None:
    x, weight, mask, bias, dy = case(4, 33, 70, torch.float32)
    settle(mask, weight)
    with (
        cuda.failing("mask_copy", 2),
        pytest.raises(RuntimeError, match=r"mask_copy could not be launched: out of mem"),
    ):
        masked_ops.masked_linear(x, weight, mask)
    assert same(step(x, weight, mask, bias, dy), expected_step(x, weight, mask, bias, dy))
    other = mask.clone()
    with cuda.failing("pack_mask", 999), pytest.raises(RuntimeError, match=r"pack_mask could not be launched.*999"):
        settle(other, weight)
    assert same(step(x, weight, other, bias, dy), expected_step(x, weight, other, bias, dy))


def test_what_a_kernel_does_not_take_goes_another_way(cuda: FakeCuda) -> None:
    x, weight, mask, bias, dy = case(128, 64, 64, torch.bfloat16)
    settle(mask, weight)
    with cuda.failing("gemm_sm90", -1):
        assert same(step(x, weight, mask, bias, dy), expected_step(x, weight, mask, bias, dy))
        with masked_ops.use_path("gemm_sm90"), pytest.raises(RuntimeError, match="does not take this shape"):
            masked_ops.masked_linear(x, weight, mask)
    values, bits = packed(weight, mask)
    with cuda.failing("decode", -1):
        y = masked_ops.packed_linear(x[:4], values, bits, 64)
    assert torch.equal(y.cpu(), F.linear(x[:4].cpu(), (weight * mask.bfloat16()).cpu()))


def test_out_of_memory(cuda: FakeCuda) -> None:
    x, weight, mask, bias, dy = case(4, 64, 64, torch.float32)
    expected = expected_step(x, weight, mask, bias, dy)
    for _ in range(3):
        with cuda.memory(2048), pytest.raises(torch.OutOfMemoryError):
            masked_ops.masked_linear(x, weight, mask)
        assert same(step(x, weight, mask, bias, dy), expected)
    # Without room for the bits, a call does without them.
    other = mask.clone()
    masked_ops.masked_linear(x, weight, other)
    before = cuda.calls("pack_mask")
    with cuda.memory(64 * 64 * 4):
        y = masked_ops.masked_linear(x, weight, other, bias)
    assert torch.equal(y.cpu().double(), expected[0]) and cuda.calls("pack_mask") >= before


@pytest.mark.parametrize("kernel", ["mask_copy", "gemm_sm90", "decode"])
def test_a_kernel_that_is_wrong_is_not_used(cuda: FakeCuda, kernel: str) -> None:
    module = _ops._module
    assert module is not None
    x, weight, mask, bias, dy = case(128, 64, 64, torch.bfloat16)
    values, bits = packed(weight, mask)
    module.cuda_forget()
    try:
        with cuda.failing(kernel, 0), warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for _ in range(3):
                assert same(step(x, weight, mask, bias, dy), expected_step(x, weight, mask, bias, dy))
                y = masked_ops.packed_linear(x[:4], values, bits, 64)
                assert torch.equal(y.cpu(), F.linear(x[:4].cpu(), (weight * mask.bfloat16()).cpu()))
        assert [kernel in str(w.message) for w in told] == [True], [str(w.message) for w in told]
        assert "its own check failed" in module.cuda_kernels(0)[kernel][1]
        forced = kernel if kernel != "decode" else "gemm_sm90"
        if kernel != "decode":
            with masked_ops.use_path(forced), pytest.raises(RuntimeError, match="its own check failed on this device"):
                masked_ops.masked_linear(x, weight, mask)
    finally:
        module.cuda_forget()
    assert {state for _, state in module.cuda_kernels(0).values()} == {"ok"}


# --- the rest of the package -----------------------------------------------------------------------------------------


def test_autocast(cuda: FakeCuda) -> None:
    x, weight, mask, bias, dy = case(4, 16, 64, torch.float32)
    gemms = cuda.calls("gemm_sm90")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    filters, filter_mask = whole(3, 2, 3).requires_grad_(), binary(3, 2, 3)
    try:
        for _ in range(3):
            y = masked_ops.masked_linear(x, weight.requires_grad_(), mask, bias)
            image = masked_ops.masked_conv1d(whole(1, 2, 5), filters, filter_mask)
            before = cuda.calls("mask_copy")
            torch.autograd.grad(image.sum(), filters)
            assert cuda.calls("mask_copy") == before + 1
        assert cuda.calls("gemm_sm90") == gemms, "the weight is cast as it is masked, for torch's product"
        before = cuda.calls("mask_copy")
        y = masked_ops.masked_linear(x, weight.requires_grad_(), mask, bias)
        assert cuda.calls("mask_copy") == before + 1
        for bad, message in (((x[:, :5], weight, mask), "input must have 64 features"), ((x, weight, mask.T), "shape")):
            with pytest.raises(RuntimeError, match=message):
                masked_ops.masked_linear(*bad)
        with torch.no_grad():
            inferred = masked_ops.masked_linear(x, weight, mask, bias)
        assert same([inferred], [y.detach().cpu().double()])
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.clear_autocast_cache()
    assert y.dtype == image.dtype == torch.bfloat16
    before = cuda.calls("mask_copy"), cuda.calls("gemm_sm90")
    (grad,) = torch.autograd.grad(y, weight, dy.bfloat16())
    assert grad.dtype == torch.float32
    assert (cuda.calls("mask_copy"), cuda.calls("gemm_sm90")) == (before[0], before[1] + 1), "in float at once"
    assert torch.equal(y.detach().cpu().double(), expected_step(x, weight, mask, bias, dy)[0])
    assert torch.equal(grad.cpu().double(), expected_step(x, weight, mask, bias, dy)[2])


def test_autocast_gradients(cuda: FakeCuda) -> None:
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        for path, (M, N, K) in (
            (None, (4, 16, 64)),
            ("mask_copy", (4, 16, 64)),
            (None, (70, 9, 64)),
            (None, (0, 8, 8)),
        ):
            x, weight, mask, bias, dy = case(M, N, K, torch.float32)
            settle(mask, weight)
            leaves = [t.requires_grad_() for t in (x, weight, bias)]
            with masked_ops.use_path(path):
                y = masked_ops.masked_linear(x, weight, mask, bias)
                fused = cuda.calls("gemm_sm90")
                grads = torch.autograd.grad(y, leaves, dy.bfloat16(), retain_graph=True)
                assert cuda.calls("gemm_sm90") - fused == (path is None and N % 8 == 0 and M > 0)
                recorded = torch.autograd.grad(y, leaves, dy.bfloat16(), create_graph=True)
            for some in (grads, recorded):
                assert same([y.detach(), *some], expected_step(x, weight, mask, bias, dy)), (path, M, N, K)
                assert all(g.dtype == torch.float32 for g in some)
            twice = torch.autograd.grad(recorded[1].sum(), x, allow_unused=True)[0]
            rows = (dy.cpu() @ mask.cpu()) if M else torch.zeros(M, K)
            assert torch.equal(twice.cpu(), rows)
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.clear_autocast_cache()


def test_double_backward_and_transforms(cuda: FakeCuda) -> None:
    x, weight, mask, bias, _ = case(3, 5, 4, torch.float64)
    leaves = tuple(t.requires_grad_() for t in (x, weight, bias))

    def f(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return masked_ops.masked_linear(x, weight, mask, bias)

    assert torch.autograd.gradcheck(f, leaves)
    assert torch.autograd.gradgradcheck(f, leaves)
    grads = torch.func.grad(lambda w: f(x, w, bias).pow(2).sum())(weight)
    (expected,) = torch.autograd.grad(F.linear(x, weight * mask, bias).pow(2).sum(), weight)
    assert torch.allclose(grads, expected)


def test_modules_and_pruning(cuda: FakeCuda) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 64), nn.Linear(64, 10))
    twin = copy.deepcopy(model)
    model.cuda()
    for m in (model, twin):
        prune.l1_unstructured([(m[0], "weight"), (m[3], "weight")], amount=0.5)
        prune.ln_structured(m[4], "weight", amount=0.25, n=2, dim=0)
    images, labels = torch.randn(8, 1, 8, 8), torch.randint(10, (8,))
    for m, device in ((model, "cuda"), (twin, "cpu")):
        optimizer = torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9)
        for _ in range(4):
            optimizer.zero_grad()
            F.cross_entropy(m(images.to(device)), labels.to(device)).backward()
            optimizer.step()
    for (name, ours), theirs in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        assert ours.is_cuda and torch.allclose(ours.cpu(), theirs, atol=1e-5), name
    table = report(model, batch=images.cuda())
    assert [layer.path for layer in table] == ["mask_copy", "mask_copy", "mask_copy"]
    output = model(images.cuda())
    masked_ops.pack(model)
    assert torch.allclose(model(images.cuda()), output, atol=1e-5)
    assert report(model, batch=8)[1].path == "decode"
    masked_ops.unpack(model)
    prune.remove(model)
    assert torch.allclose(model(images.cuda()), output, atol=1e-5)
