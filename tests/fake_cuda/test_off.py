"""With MASKED_OPS_CUDA=0: no kernel is used, not even by force."""

from __future__ import annotations

import pytest
import torch
from fake_device import FakeCuda
from test_kernels import case, expected_step, same, step

import masked_ops
from masked_ops import _ops


def test_off(cuda: FakeCuda) -> None:
    x, weight, mask, bias, dy = case(16, 64, 64, torch.bfloat16)
    for path in (None, "copy"):
        with masked_ops.use_path(path):
            for _ in range(3):
                assert same(step(x, weight, mask, bias, dy), expected_step(x, weight, mask, bias, dy))
    for path in ("mask_copy", "gemm_sm90"):
        with (
            masked_ops.use_path(path),
            pytest.raises(RuntimeError, match="MASKED_OPS_CUDA=0 turns the CUDA kernels off"),
        ):
            masked_ops.masked_linear(x, weight, mask)
    with masked_ops.use_path("fused"), pytest.raises(RuntimeError, match="not in CPU memory"):
        masked_ops.masked_linear(x, weight, mask)
    assert _ops.explain_linear(weight, mask, 8)[0] == "copy"
