"""With room for the bits of a few masks and little else (MASKED_OPS_CACHE_BYTES)."""

from __future__ import annotations

import torch
from fake_device import FakeCuda
from test_kernels import case, expected_step, packed, same

import masked_ops
from masked_ops import _ops


def test_what_there_is_no_room_for_is_not_made(cuda: FakeCuda) -> None:
    """Neither a form of the values nor the index, which would push each other out at every call."""
    limit = masked_ops.cache_info()["limit_bytes"]
    assert limit == 4 << 20
    layers = [case(4, 1024, 1024, torch.bfloat16) for _ in range(3)]
    stored = [packed(weight, mask) for _, weight, mask, _, _ in layers]
    names = ("slice", "gather", "fill_slices", "fill_gathered", "decode_index", "pack_bits")
    for turn in range(4):
        if turn == 2:
            before = [cuda.calls(name) for name in names]
        for (x, weight, mask, bias, dy), (values, bits) in zip(layers, stored, strict=True):
            y = masked_ops.packed_linear(x, values, bits, 1024, bias)
            assert same([y], expected_step(x, weight, mask, bias, dy)[:1])
    assert [cuda.calls(name) for name in names] == before
    assert masked_ops.cache_info()["bytes"] <= limit
    paths = [_ops.explain_packed_linear(values, bits, 1024, 4) for values, bits in stored]
    assert len({path for path, _ in paths}) > 1
    assert all(reason.endswith("MASKED_OPS_CACHE_BYTES is reached") for path, reason in paths if path == "copy")
