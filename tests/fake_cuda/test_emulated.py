"""The kernels themselves, emulated (tests/cuda), below the host code: their own checks, and a step on every path."""

from __future__ import annotations

import pytest
import torch
from fake_device import FakeCuda
from test_kernels import case, expected_step, packed, same, step

import masked_ops
from masked_ops import _ops


def test_own_checks(cuda: FakeCuda) -> None:
    assert _ops._module is not None
    states = _ops._module.cuda_kernels(0)
    assert {name: state for name, (_, state) in states.items()} == dict.fromkeys(states, "ok")


@pytest.mark.parametrize("path", ["mask_copy", "gemm_sm80", "gemm_sm90"])
def test_a_step(cuda: FakeCuda, path: str) -> None:
    for M, N, K, dtype in ((5, 24, 136, torch.bfloat16), (65, 72, 64, torch.float16)):
        x, weight, mask, bias, dy = case(M, N, K, dtype)
        with masked_ops.use_path(path):
            assert same(step(x, weight, mask, bias, dy), expected_step(x, weight, mask, bias, dy)), (M, N, K)


def test_packed(cuda: FakeCuda) -> None:
    for M, N, K, dtype in ((4, 33, 304, torch.bfloat16), (9, 20, 72, torch.float16), (17, 8, 70, torch.float32)):
        x, weight, mask, bias, dy = case(M, N, K, dtype)
        values, bits = packed(weight, mask)
        for path in ("decode_gathered",) * (dtype != torch.float32) + ("decode_sliced",) * (M <= 4):
            with masked_ops.use_path(path):
                y = masked_ops.packed_linear(x, values, bits, K, bias)
            assert same([y], expected_step(x, weight, mask, bias, dy)[:1]), path
        with masked_ops.use_path("decode"):
            y = masked_ops.packed_linear(x, values, bits, K, bias)
            grad = _ops.packed_linear_grad_values(dy, x, bits, values.numel())
        expected = expected_step(x, weight, mask, bias, dy)
        assert same([y, grad], [expected[0], expected[2][mask.cpu() != 0]])
