"""Without MASKED_OPS_CUDA: the kernels that a GPU has confirmed serve, and another only where it is forced."""

from __future__ import annotations

import pytest
import torch
from fake_device import FakeCuda
from test_kernels import case, expected_step, packed, same, settle, step

import masked_ops
from masked_ops import _ops


def test_the_kernels_serve(cuda: FakeCuda) -> None:
    assert _ops._module is not None
    states = _ops._module.cuda_kernels(0)
    for name in ("decode_sliced", "decode_gathered"):
        confirmed, state = states.pop(name)
        assert not confirmed and state.startswith("no GPU has confirmed this kernel yet")
    assert set(states.values()) == {(True, "ok")}
    x, weight, mask, bias, dy = case(16, 64, 64, torch.bfloat16)
    settle(mask, weight)
    before = {name: cuda.calls(name) for name in ("mask_copy", "gemm_sm90", "decode")}
    assert same(step(x, weight, mask, bias, dy), expected_step(x, weight, mask, bias, dy))
    masked_ops.apply_mask(weight, mask)
    masked_ops.packed_linear(x, *packed(weight, mask), 64)
    assert {name: cuda.calls(name) - count for name, count in before.items()} == {
        "mask_copy": 1,
        "gemm_sm90": 3,
        "decode": 1,
    }


@pytest.mark.parametrize("path", ["decode_sliced", "decode_gathered"])
def test_an_unconfirmed_kernel(cuda: FakeCuda, path: str) -> None:
    x, weight, mask, bias, dy = case(4, 1024, 1024, torch.bfloat16)
    values, bits = packed(weight, mask)
    before = cuda.calls(path)
    for _ in range(4):
        masked_ops.packed_linear(x, values, bits, 1024)
    assert cuda.calls(path) == before
    with masked_ops.use_path(path):
        y = masked_ops.packed_linear(x, values, bits, 1024, bias)
    assert cuda.calls(path) > before and same([y], expected_step(x, weight, mask, bias, dy)[:1])


def test_the_compact_path_is_unmeasured(cuda: FakeCuda) -> None:
    weight, mask = torch.ones(2048, 4096, dtype=torch.bfloat16, device="cuda"), torch.ones(2048, 4096, device="cuda")
    mask[::2] = 0
    assert _ops.explain_linear(weight, mask, 8192)[0] == "mask_copy"
    x, small, pruned, bias, dy = case(4, 64, 64, torch.bfloat16)
    pruned[::2] = 0
    with masked_ops.use_path("compact"):
        assert same(step(x, small, pruned, bias, dy), expected_step(x, small, pruned, bias, dy))
