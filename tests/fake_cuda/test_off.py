"""With MASKED_OPS_CUDA=0: no kernel is used, not even by force, and torch's own operations serve."""

from __future__ import annotations

import pytest
import torch
from fake_device import FakeCuda
from test_kernels import binary, case, expected_step, packed, same, settle, step, whole

import masked_ops
from masked_ops import _ops

KERNELS = ("mask_copy", "pack_mask", "pack_bits", "decode", "expand", "gemm_sm90", "gemm_sm80")


def test_nothing_is_loaded_and_all_is_right(cuda: FakeCuda) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for mask_dtype in (torch.bool, torch.uint8, torch.float32):
            x, weight, mask, bias, dy = case(70, 33, 72, dtype, mask_dtype)
            for _ in range(4):
                assert same(step(x, weight, mask, bias, dy), expected_step(x, weight, mask, bias, dy))
            for soft in (mask.to(dtype) * 2, mask.to(dtype) / 2):
                for _ in range(3):
                    assert same(step(x, weight, soft, bias, dy), expected_step(x, weight, soft, bias, dy))
    spoiled = torch.where(mask != 0, weight, torch.full_like(weight, float("inf")))
    for _ in range(3):
        assert torch.equal(masked_ops.apply_mask(spoiled, mask).cpu(), (weight * mask).cpu())
    assert not any(cuda.calls(name) for name in KERNELS)
    path, reason = _ops.explain_linear(weight, mask, 8)
    assert path == "copy" and reason == "MASKED_OPS_CUDA=0 turns the CUDA kernels off"
    geometry = [1], [0], [1], False, [0], 1
    assert _ops.explain_convolution(whole(2, 2, 3), binary(2, 2, 3), [8, 2, 5], False, *geometry) == (path, reason)


def test_packed(cuda: FakeCuda) -> None:
    for M, N, K in ((1, 1, 1), (3, 65, 63), (70, 9, 130), (0, 4, 5)):
        x, weight, mask, bias, dy = case(M, N, K, torch.float32)
        values, bits = packed(weight, mask)
        expected = expected_step(x, weight, mask, bias, dy)
        leaves = [x.requires_grad_(), values.requires_grad_(), bias.requires_grad_()]
        for _ in range(2):
            y = masked_ops.packed_linear(leaves[0], leaves[1], bits, K, leaves[2])
            grads = torch.autograd.grad(y, leaves, dy)
            wanted = [expected[0], expected[1], expected[2][mask.cpu() != 0], expected[3]]
            assert same([y.detach(), *grads], wanted), (M, N, K)
    with pytest.raises(RuntimeError, match="one value for each of the"):
        masked_ops.packed_linear(torch.zeros(1, 5, device="cuda"), values.detach()[1:], bits, 5)
    assert _ops.explain_packed_linear(values.detach(), bits, 5, 1)[0] == "copy"


def test_no_call_waits_for_the_device(cuda: FakeCuda) -> None:
    x, weight, mask, bias, dy = case(16, 64, 64, torch.bfloat16)
    before = cuda.synchronisations
    for _ in range(5):
        step(x, weight, mask, bias, dy)
    assert cuda.synchronisations == before
    values, bits = packed(weight, mask)
    before = cuda.synchronisations
    for _ in range(3):
        masked_ops.packed_linear(x, values, bits, 64)
    assert cuda.synchronisations - before <= 1


def test_a_mask_is_read_itself_until_what_is_known_is_there(cuda: FakeCuda) -> None:
    _, weight, mask, _, _ = case(4, 33, 70, torch.float32)
    with cuda.late_events():
        settle(mask, weight)
        assert torch.equal(masked_ops.apply_mask(weight, mask).cpu(), (weight * mask).cpu())
    settle(mask, weight)
    assert masked_ops.cache_info()["bytes"] > 33 * 70
    mask.copy_(binary(33, 70))
    assert torch.equal(masked_ops.apply_mask(weight, mask).cpu(), (weight * mask).cpu())


def test_graphs(cuda: FakeCuda) -> None:
    x, weight, mask, bias, dy = case(16, 64, 64, torch.bfloat16)
    expected = expected_step(x, weight, mask, bias, dy)
    values, bits = packed(weight, mask)
    settle(mask, weight)
    for _ in range(2):
        with cuda.capture():
            for m in (mask, mask.clone(), mask.bool()):
                results = [masked_ops.masked_linear(x, weight, m, bias), _ops.linear_grad_weight(dy, x, m)]
            results.append(masked_ops.packed_linear(x, values, bits, 64, bias))
            grad = _ops.packed_linear_grad_values(dy, x, bits, values.numel())
        assert same([*results, grad], [expected[0], expected[2], expected[0], expected[2][mask.cpu() != 0]])
        for _ in range(2):
            masked_ops.packed_linear(x, values, bits, 64, bias)


def test_no_path_can_be_forced(cuda: FakeCuda) -> None:
    x, weight, mask, bias, dy = case(16, 64, 64, torch.bfloat16)
    for path in (None, "copy"):
        with masked_ops.use_path(path):
            for _ in range(3):
                assert same(step(x, weight, mask, bias, dy), expected_step(x, weight, mask, bias, dy))
    mask[::2] = 0
    for path in ("mask_copy", "gemm_sm90", "compact"):
        with (
            masked_ops.use_path(path),
            pytest.raises(RuntimeError, match="MASKED_OPS_CUDA=0 turns the CUDA kernels off"),
        ):
            masked_ops.masked_linear(x, weight, mask)
    with masked_ops.use_path("fused"), pytest.raises(RuntimeError, match="not in CPU memory"):
        masked_ops.masked_linear(x, weight, mask)
    assert _ops.explain_linear(weight, mask, 8)[0] == "copy"
