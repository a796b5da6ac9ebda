"""The compact path on a device, with MASKED_OPS_CUDA=1: pruned rows, columns and channels are left out."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import pytest
import torch
from fake_device import FakeCuda
from test_kernels import FLOATS, expected_step, packed, same, settle, step, whole
from torch import Tensor
from torch.nn import functional as F

import masked_ops
from masked_ops import _ops


def structured(shape: tuple[int, ...], cut: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """A mask without some rows, others (its second dimension), or both; "loose" prunes more besides."""
    mask = torch.ones(shape)
    if "loose" in cut:
        mask[torch.rand(shape) < 0.4] = 0
        mask[1], mask[:, 1] = 1, 1  # what is left is known
    if "rows" in cut:
        mask[::2] = 0
    if "others" in cut:
        mask[:, ::2] = 0
    return mask.to("cuda", dtype)


CUTS = ("rows", "others", "rows and others", "loose rows", "loose others", "loose rows and others")


def linear_case(M: int, N: int, K: int, cut: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    x, weight, bias, dy = whole(M, K, dtype=dtype), whole(N, K, dtype=dtype), whole(N, dtype=dtype), whole(M, N)
    return x, weight, structured((N, K), cut), bias, dy.to(dtype)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_linear(cuda: FakeCuda, cut: str, dtype: torch.dtype) -> None:
    for M, N, K in ((1, 2, 3), (3, 65, 63), (70, 9, 129)):
        x, weight, mask, bias, dy = linear_case(M, N, K, cut, dtype)
        weight = torch.where(mask != 0, weight, torch.full_like(weight, math.nan))
        wanted = expected_step(x, weight.nan_to_num(0), mask, bias, dy)
        for of_weight in (lambda t: t, lambda t: t.t().contiguous().t()):
            with masked_ops.use_path("compact"):
                for b in (bias, None):
                    assert same(step(x, of_weight(weight), mask, b, dy)[1:3], wanted[1:3])
                y = masked_ops.masked_linear(x, of_weight(weight), mask, bias)
                assert same([y], wanted[:1])
                assert same([masked_ops.masked_linear(x[0], weight, mask, bias)], [wanted[0][0]])
                cube = torch.stack([x, x], 1)
                assert same([masked_ops.masked_linear(cube, weight, mask, bias)], [torch.stack([wanted[0]] * 2, 1)])


def test_complex_numbers(cuda: FakeCuda) -> None:
    x, weight, mask, _, _ = linear_case(3, 8, 9, "loose rows and others", torch.complex64)
    x, weight = (torch.complex(t.real, whole(*t.shape)).requires_grad_() for t in (x, weight))
    cpu = [t.detach().cpu().requires_grad_() for t in (x, weight)]
    wanted = F.linear(cpu[0], cpu[1] * mask.cpu())
    with masked_ops.use_path("compact"):
        y = masked_ops.masked_linear(x, weight, mask)
        grads = torch.autograd.grad(y, (x, weight), torch.ones_like(y) * (1 + 2j))
        alone = _ops.linear_grad_input(torch.ones_like(y), weight.detach(), mask)
    assert torch.equal(y.cpu(), wanted)
    assert torch.equal(alone.cpu(), torch.ones_like(wanted) @ (cpu[1].detach() * mask.cpu()).conj())
    plain = torch.autograd.grad(wanted, cpu, torch.ones_like(wanted) * (1 + 2j))
    assert all(torch.equal(a.cpu(), b) for a, b in zip(grads, plain, strict=True))


def convolution(
    dimensions: int, transposed: bool, channels_last: bool, cut: str, batch: int = 2
) -> tuple[str, Tensor, Tensor, Tensor, Tensor]:
    name = f"conv_transpose{dimensions}d" if transposed else f"conv{dimensions}d"
    x = whole(batch, 7, *[6] * dimensions)
    weight, bias = whole(7, 5, *[3] * dimensions) if transposed else whole(5, 7, *[3] * dimensions), whole(5)
    if channels_last:
        form = torch.channels_last if dimensions == 2 else torch.channels_last_3d
        x, weight = x.to(memory_format=form), weight.to(memory_format=form)
    return name, x, weight, structured(tuple(weight.shape), cut), bias


KINDS = [(d, t, last) for d, t, last in product((1, 2, 3), (False, True), (False, True)) if d > 1 or not last]


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize(("dimensions", "transposed", "channels_last"), KINDS)
def test_convolution(cuda: FakeCuda, dimensions: int, transposed: bool, channels_last: bool, cut: str) -> None:
    name, x, weight, mask, bias = convolution(dimensions, transposed, channels_last, cut)
    ours, theirs = getattr(masked_ops, f"masked_{name}"), getattr(F, name)
    for layout in (mask, mask.to(memory_format=torch.contiguous_format), mask.bool()):
        for b in (bias, None):
            leaves = [t.requires_grad_() for t in (x, weight, *([] if b is None else [b]))]
            cpu = [t.detach().cpu().requires_grad_() for t in leaves]
            plain = theirs(cpu[0], cpu[1] * mask.cpu(), *cpu[2:], stride=2, padding=1)
            dy = whole(*plain.shape)
            wanted = torch.autograd.grad(plain, cpu, dy.cpu(), retain_graph=True)
            with masked_ops.use_path("compact"):
                y = ours(*leaves[:2], layout, *leaves[2:], stride=2, padding=1)
                grads = torch.autograd.grad(y, leaves, dy, retain_graph=True)
                alone = [torch.autograd.grad(y, leaf, dy, retain_graph=True)[0] for leaf in leaves]
            assert torch.equal(y.cpu(), plain)
            for some in (grads, alone):
                assert all(torch.equal(a.cpu(), w) for a, w in zip(some, wanted, strict=True))


def test_packed_linear(cuda: FakeCuda) -> None:
    for cut, dtype in product(CUTS, FLOATS):
        x, weight, mask, bias, dy = linear_case(9, 20, 37, cut, dtype)
        values, bits = packed(weight, mask)
        wanted = expected_step(x, weight, mask, bias, dy)
        wanted[2] = wanted[2][mask.cpu() != 0]
        leaves = [t.requires_grad_() for t in (x, values, bias)]
        with masked_ops.use_path("compact"):
            if "loose" in cut:
                with pytest.raises(RuntimeError, match="path 'compact' cannot serve this packed linear layer: more"):
                    masked_ops.packed_linear(x, values, bits, 37)
                continue
            expanded = cuda.calls("expand"), cuda.calls("compress")
            y = masked_ops.packed_linear(leaves[0], leaves[1], bits, 37, leaves[2])
            assert same([y.detach(), *torch.autograd.grad(y, leaves, dy)], wanted), (cut, dtype)
            assert (cuda.calls("expand"), cuda.calls("compress")) == expanded


def test_the_same_bits_of_weights_of_other_sizes(cuda: FakeCuda) -> None:
    mask = structured((6, 4, 3, 3), "others")
    weight, x = whole(6, 4, 3, 3), whole(2, 4, 5, 5)
    values, bits = packed(weight.flatten(1), mask.flatten(1))
    masked = (weight * mask).cpu()
    with masked_ops.use_path("compact"):
        for _ in range(2):
            y = masked_ops.packed_linear(x.flatten()[:36], values, bits, 36)
            assert torch.equal(y.cpu(), F.linear(x.flatten()[:36].cpu(), masked.flatten(1)))
            y = masked_ops.packed_conv2d(x, values, bits, (6, 4, 3, 3))
            assert torch.equal(y.cpu(), F.conv2d(x.cpu(), masked))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("cut", ["rows", "others", "rows and others"])
def test_packed_convolution(cuda: FakeCuda, transposed: bool, cut: str) -> None:
    name, x, weight, mask, bias = convolution(2, transposed, False, cut)
    ours, theirs = getattr(masked_ops, f"packed_{name}"), getattr(F, name)
    values, bits = packed(weight.flatten(1), mask.flatten(1))
    for form in (torch.contiguous_format, torch.channels_last):
        leaves = [t.requires_grad_() for t in (x.to(memory_format=form), values, bias)]
        cpu = [t.detach().cpu().requires_grad_() for t in (x, weight, bias)]
        plain = theirs(cpu[0], cpu[1] * mask.cpu(), cpu[2], stride=2)
        dy = whole(*plain.shape).to(memory_format=form)
        wanted = list(torch.autograd.grad(plain, cpu, dy.cpu()))
        wanted[1] = wanted[1][mask.cpu() != 0]
        with masked_ops.use_path("compact"):
            y = ours(leaves[0], leaves[1], bits, weight.shape, leaves[2], stride=2)
            grads = torch.autograd.grad(y, leaves, dy)
        assert torch.equal(y.cpu(), plain)
        assert all(torch.equal(a.cpu(), w) for a, w in zip(grads, wanted, strict=True))


# --- choice ----------------------------------------------------------------------------------------------------------


def path_of(shape: tuple[int, int], cut: str, rows: int, dtype: torch.dtype) -> str:
    return _ops.explain_linear(whole(*shape, dtype=dtype), structured(shape, cut), rows)[0]


def test_it_is_chosen_where_it_saves_much(cuda: FakeCuda) -> None:
    large, small, half = (2048, 4096), (64, 64), torch.bfloat16
    assert path_of(large, "rows", 8192, half) == "compact"
    assert path_of(large, "others", 8192, half) == "compact"
    assert path_of(large, "loose rows and others", 8192, half) == "compact"
    assert path_of(large, "rows", 8192, torch.float64) == "compact"
    assert path_of(large, "loose", 8192, half) != "compact"
    assert path_of(large, "rows", 16, half) == "gemm_sm90"
    assert path_of(small, "rows", 128, half) == "gemm_sm90"
    one_row = torch.ones(large, device="cuda")
    one_row[7] = 0
    assert _ops.explain_linear(whole(*large, dtype=half), one_row, 8192)[0] == "mask_copy"

    geometry = [1, 1], [1, 1], [1, 1], False, [0, 0], 1
    for cut, size, path in (("rows", 28, "compact"), ("rows and others", 28, "compact"), ("rows", 2, "mask_copy")):
        weight = whole(512, 512, 3, 3, dtype=half)
        mask = structured(tuple(weight.shape), cut)
        assert _ops.explain_convolution(weight, mask, [64, 512, size, size], False, *geometry)[0] == path
        values, bits = packed(weight.flatten(1), mask.flatten(1))
        arguments = values, bits, weight.shape, [64, 512, size, size], False, *geometry
        assert _ops.explain_packed_convolution(*arguments)[0] == ("compact" if size > 2 else "copy")

    weight = whole(256, 256, 3, 3, dtype=half)
    geometry = [2, 2], [0, 0], [1, 1], True, [0, 0], 1
    for size, path in ((7, "mask_copy"), (20, "compact")):  # by the positions of the input, which are fewer
        arguments = weight, structured(tuple(weight.shape), "rows"), [64, 256, size, size], False
        assert _ops.explain_convolution(*arguments, *geometry)[0] == path

    weight, mask = whole(*large, dtype=half), structured(large, "rows")
    values, bits = packed(weight, mask)
    for rows in (8192, 512):
        assert _ops.explain_packed_linear(values, bits, large[1], rows)[0] == "compact"
    mask[:-64] = 0
    values, bits = packed(weight, mask)
    assert _ops.explain_packed_linear(values, bits, large[1], 1)[0].startswith("decode")


def large_case(cut: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    return linear_case(2048, 1024, 1024, cut, dtype)


@pytest.mark.parametrize("cut", ["rows and others", "loose rows and others"])
def test_it_is_taken_once_the_mask_is_known(cuda: FakeCuda, cut: str) -> None:
    x, weight, mask, bias, dy = large_case(cut)
    wanted = expected_step(x, weight, mask, bias, dy)
    copies = []
    for _ in range(4):
        before = cuda.calls("mask_copy")
        assert same(step(x, weight, mask, bias, dy), wanted)
        copies.append(cuda.calls("mask_copy") - before)
    assert copies[-2:] == [0, 0], copies
    # A mask that changes is followed, and one without an empty row leaves the path.
    mask[::32] = 1
    x, dy = x[:8].contiguous(), dy[:8].contiguous()
    for value in (None, 1, 0):
        if value is not None:
            mask.fill_(value)
        wanted = expected_step(x, weight, mask, bias, dy)
        with masked_ops.use_path(None if value is not None else "compact"):
            for _ in range(3):
                assert same(step(x, weight, mask, bias, dy), wanted), value


def image_case(cut: str) -> tuple[Tensor, ...]:
    x, weight = whole(96, 256, 6, 6, dtype=torch.float64), whole(512, 256, 3, 3, dtype=torch.float64)
    return x.requires_grad_(), weight.requires_grad_(), structured(tuple(weight.shape), cut)


def convolve(x: Tensor, weight: Tensor, mask: Tensor) -> list[Tensor]:
    y = masked_ops.masked_conv2d(x, weight, mask)
    return [y, *torch.autograd.grad(y.sum(), (x, weight))]


def test_convolutions_wait_for_nothing(cuda: FakeCuda) -> None:
    """How many channels are left arrives later than how many rows."""
    x, weight, mask = image_case("loose rows and others")
    masked = (weight * mask).detach().cpu()
    plain = F.conv2d(x.detach().cpu(), masked)
    settle(mask, weight)
    before, copies = cuda.synchronisations, cuda.calls("mask_copy")
    with cuda.late_events():
        found = [convolve(x, weight, mask) for _ in range(2)]
    assert cuda.calls("mask_copy") > copies
    copies = cuda.calls("mask_copy")
    found += [convolve(x, weight, mask) for _ in range(2)]
    assert (cuda.synchronisations, cuda.calls("mask_copy")) == (before, copies)
    with masked_ops.use_path("copy"):
        wanted = [t.cpu() for t in convolve(x, weight, mask)]
    assert torch.equal(wanted[0], plain)
    for results in found:
        assert all(torch.equal(ours.cpu(), theirs) for ours, theirs in zip(results, wanted, strict=True))


def test_what_it_needs_is_remembered_and_forgotten(cuda: FakeCuda) -> None:
    x, weight, mask, bias, dy = large_case("loose rows and others")
    settle(mask, weight)
    held = masked_ops.cache_info()["bytes"]
    for _ in range(3):
        step(x, weight, mask, bias, dy)
    assert masked_ops.cache_info()["bytes"] - held == 512 * 512 + 8 * (512 + 512)
    del mask
    assert masked_ops.cache_info()["bytes"] == 0


def test_graphs(cuda: FakeCuda) -> None:
    x, weight, mask, bias, dy = large_case("rows and others")
    wanted = expected_step(x, weight, mask, bias, dy)
    for _ in range(3):
        step(x, weight, mask, bias, dy)
    with cuda.capture():  # reads the mask itself
        y = masked_ops.masked_linear(x, weight, mask, bias)
    assert same([y], wanted[:1])
    with cuda.capture(), masked_ops.use_path("compact"), pytest.raises(RuntimeError, match="graph is being captured"):
        masked_ops.masked_linear(x, weight, mask)
    masked_ops.clear_cache()
    values, bits = packed(weight, mask)
    expanded = cuda.calls("expand")
    with cuda.capture():
        y = masked_ops.packed_linear(x, values, bits, 1024, bias)
    assert same([y], wanted[:1])
    for _ in range(2):
        masked_ops.packed_linear(x, values, bits, 1024, bias)
    with cuda.capture():
        y = masked_ops.packed_linear(x, values, bits, 1024, bias)
        grad = _ops.packed_linear_grad_values(dy, x, bits, values.numel())
    assert same([y, grad], [wanted[0], wanted[2][mask.cpu() != 0]]) and cuda.calls("expand") == expanded
    freed = cuda.freed
    masked_ops.clear_cache()
    assert masked_ops.cache_info()["entries"] == 0 and cuda.freed == freed, "the graph reads the places at every replay"
    other = bits.clone()
    for _ in range(2):
        with masked_ops.use_path("copy"):
            masked_ops.packed_linear(x, values, other, 1024)
    with cuda.late_events():
        masked_ops.packed_linear(x, values, other, 1024)
        with cuda.capture():  # cannot wait for the places
            y = masked_ops.packed_linear(x, values, other, 1024, bias)
    assert same([y], wanted[:1])


def test_streams(cuda: FakeCuda) -> None:
    x, weight, mask, bias, dy = large_case("loose rows and others")
    wanted = expected_step(x, weight, mask, bias, dy)
    settle(mask, weight)
    with cuda.stream(5), cuda.late_events():
        assert same([masked_ops.masked_linear(x, weight, mask, bias)], wanted[:1])
    with cuda.stream(6), cuda.late_events():
        waited, recorded = cuda.waits_of_streams, cuda.recorded_on_streams
        assert same([masked_ops.masked_linear(x, weight, mask, bias)], wanted[:1])
        assert (cuda.waits_of_streams - waited, cuda.recorded_on_streams - recorded) == (3, 3)


def test_out_of_memory(cuda: FakeCuda) -> None:
    """Whichever allocation fails: an error, or a right result where only what would be remembered found no room."""
    x, weight, mask, bias, _ = large_case("loose rows and others")
    wanted = F.linear(*(t.cpu().double() for t in (x, weight * mask, bias)))
    settle(mask, weight)
    before = cuda.allocated
    masked_ops.masked_linear(x, weight, mask, bias)
    failed, served = [], []
    for number in range(1, cuda.allocated - before + 1):
        masked_ops.clear_cache()
        settle(mask, weight)
        copies = cuda.calls("mask_copy")
        with cuda.no_memory_once(number):
            try:
                y = masked_ops.masked_linear(x, weight, mask, bias)
                served.append(number)
                assert cuda.calls("mask_copy") == copies + 1, "another path"
            except torch.OutOfMemoryError:
                failed.append(number)
                y = masked_ops.masked_linear(x, weight, mask, bias)
        assert torch.equal(y.cpu(), wanted), number
    assert served and failed and max(served) < min(failed)


def autocast_gradients(call: Callable[..., Tensor], leaves: list[Tensor], *rest: Tensor) -> list[Tensor]:
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        y = call(*leaves[:2], *rest, *leaves[2:])
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.clear_autocast_cache()
    assert y.dtype == torch.bfloat16
    return [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))]


def test_autocast(cuda: FakeCuda) -> None:
    """The weight of a linear layer is gathered before it is rounded; that of a convolution is rounded before."""
    x, weight, mask, bias, _ = linear_case(40, 64, 96, "loose rows")  # so few that sums stay exact
    bias *= 0
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    settle(mask, weight)
    before = cuda.calls("mask_copy")
    with masked_ops.use_path("compact"):
        results = autocast_gradients(masked_ops.masked_linear, leaves, mask)
    assert cuda.calls("mask_copy") == before
    with masked_ops.use_path("copy"):
        wanted = autocast_gradients(masked_ops.masked_linear, leaves, mask)
    assert same(results, [t.cpu().double() for t in wanted])
    assert results[2].dtype == torch.float32
    with masked_ops.use_path("compact"):
        for bad in (whole(2), whole(65)):
            with pytest.raises(RuntimeError, match="bias must broadcast to the output"):
                autocast_gradients(masked_ops.masked_linear, [*leaves[:2], bad], mask)
        one = autocast_gradients(masked_ops.masked_linear, [*leaves[:2], whole(1).requires_grad_()], mask)[0]
    assert torch.equal(one - one[-1, 0], results[0]), "a bias that is broadcast takes another path"

    image, filters = whole(2, 12, 7, 7).requires_grad_(), whole(16, 12, 3, 3).requires_grad_()
    filter_mask = structured(tuple(filters.shape), "rows")
    settle(filter_mask, filters)
    before = cuda.calls("mask_copy")
    with masked_ops.use_path("compact"):
        results = autocast_gradients(masked_ops.masked_conv2d, [image, filters], filter_mask)
    assert cuda.calls("mask_copy") == before
    with masked_ops.use_path("copy"):
        wanted = autocast_gradients(masked_ops.masked_conv2d, [image, filters], filter_mask)
    assert all(
        torch.allclose(a.cpu().float(), b.cpu().float(), rtol=0.02) for a, b in zip(results, wanted, strict=True)
    )
    assert results[2].dtype == torch.float32


def test_what_it_refuses(cuda: FakeCuda) -> None:
    x, weight, mask, _, _ = linear_case(4, 8, 9, "rows")
    image, filters = whole(1, 4, 5, 5), whole(6, 2, 3, 3)
    grouped = structured((6, 2, 3, 3), "rows")
    strided = whole(6, 3, 4, 2).transpose(2, 3)
    for function, arguments, options, reason in (
        (masked_ops.masked_linear, (x, weight, mask / 2), {}, "the mask is soft"),
        (masked_ops.masked_linear, (x, weight, torch.ones_like(mask)), {}, "no empty row or column"),
        (masked_ops.masked_linear, (x, weight, torch.zeros_like(mask)), {}, "or nothing else"),
        (masked_ops.masked_conv2d, (image, filters, grouped), {"groups": 2}, "it has groups"),
        (masked_ops.masked_conv2d, (whole(1, 3, 5, 5), strided, torch.ones_like(strided)), {}, "neither contiguous"),
    ):
        with masked_ops.use_path("compact"), pytest.raises(RuntimeError, match=f"path 'compact' cannot.*{reason}"):
            function(*arguments, **options)
    taps = torch.ones(6, 2, 3, 3, device="cuda")
    taps[..., 1] = 0  # empty columns, and no pruned channel
    with masked_ops.use_path("compact"), pytest.raises(RuntimeError, match="it has no pruned channel"):
        masked_ops.masked_conv2d(image[:, :2], filters, taps)
    ungrouped = structured((6, 4, 3, 3), "rows")
    with masked_ops.use_path("compact"):
        for bias in (whole(1), whole(7)):
            with pytest.raises(RuntimeError, match="cannot serve"):
                masked_ops.masked_conv2d(image, whole(6, 4, 3, 3), ungrouped, bias)
        assert masked_ops.masked_linear(whole(0, 9), weight, mask).shape == (0, 8)
        assert masked_ops.masked_linear(whole(0, 9), weight, mask, whole(1)).shape == (0, 8)
    values, bits = packed(weight, mask)
    for path in ("compact", None):
        with masked_ops.use_path(path):
            assert masked_ops.packed_linear(whole(0, 9), values, bits, 9, whole(8)).shape == (0, 8)
            assert _ops.packed_linear_grad_input(whole(0, 8), values, bits, 9).shape == (0, 9)
            grad = _ops.packed_linear_grad_values(whole(0, 8), whole(0, 9), bits, len(values))
            assert grad.shape == values.shape and not grad.any()


def test_channels_of_size_one(cuda: FakeCuda) -> None:
    """Whose strides say nothing of their order."""
    for shape in ((1, 6, 3, 3), (6, 1, 3, 3), (6, 4, 1, 1), (6, 4, 1, 3), (6, 4, 3, 1), (1, 6, 1, 3)):
        x = whole(2, shape[1], 5, 5)
        weight = whole(*shape).to(memory_format=torch.channels_last)
        mask = structured(shape, "rows" if shape[0] > 1 else "others")
        plain = F.conv2d(x.cpu(), (weight * mask).cpu())
        for given in (weight, weight.contiguous(), weight.as_strided(shape, (1, *weight.stride()[1:]))[:]):
            if not torch.equal(given, weight):
                continue
            with masked_ops.use_path(None):
                for _ in range(3):
                    assert torch.equal(masked_ops.masked_conv2d(x, given, mask).cpu(), plain), shape
            try:
                with masked_ops.use_path("compact"):
                    y = masked_ops.masked_conv2d(x, given, mask)
            except RuntimeError as error:
                assert "order of their own" in str(error) or "neither contiguous" in str(error)
            else:
                assert torch.equal(y.cpu(), plain), shape


def test_rows_that_come_and_go_are_followed(cuda: FakeCuda) -> None:
    x, weight, mask, bias, dy = large_case("rows")
    for i in range(2):
        weight.mul_(-1)
        mask[i] = 1 - mask[i]
        wanted = expected_step(x, weight, mask, bias, dy)
        for _ in range(3):
            assert same(step(x, weight, mask, bias, dy), wanted), i
