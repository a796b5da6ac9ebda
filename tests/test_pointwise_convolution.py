"""Convolutions of one tap as the products that they are: the masked GEMM of linear layers on images."""

from __future__ import annotations

import pytest
import torch
from generators import (
    LAYOUTS,
    compiled_only,
    every_capability,
    integers,
    mask_of,
    name_of,
    poisoned,
    running_on,
    spoiled,
)
from test_convolution import Problem, beside_copies, check_against_dense

import masked_ops
from masked_ops import _ops
from masked_ops._packed_class import bits_of

pytestmark = compiled_only

# Positions, outputs and inputs on both sides of the tiles; up to 16 positions have kernels of their own.
PROBLEMS = [
    Problem("conv1d", (3, 5, 17), (7, 5, 1)),
    Problem("conv1d", (5, 9), (6, 5, 1)),
    Problem("conv2d", (1, 65, 4, 4), (49, 65, 1, 1)),
    Problem("conv2d", (2, 49, 7, 7), (97, 49, 1, 1)),
    Problem("conv2d", (17, 33, 1, 1), (48, 33, 1, 1), {"dilation": 2}),
    Problem("conv2d", (3, 1, 5, 6), (17, 1, 1, 1)),
    Problem("conv2d", (3, 17, 5, 6), (1, 17, 1, 1)),
    # Of contiguous images: more than one block of depth, and one part of a plane.
    Problem("conv2d", (2, 200, 4, 5), (9, 200, 1, 1)),
    Problem("conv2d", (2, 9, 4, 5), (150, 9, 1, 1)),
    Problem("conv2d", (3, 7, 29, 31), (13, 7, 1, 1)),
    # Strips of several images; panels in several tasks.
    Problem("conv2d", (5, 7, 3, 11), (21, 7, 1, 1)),
    Problem("conv2d", (1, 130, 4, 5), (300, 130, 1, 1)),
    # Two images at a time, and one that is left.
    Problem("conv2d", (3, 7, 20, 20), (5, 7, 1, 1)),
    Problem("conv3d", (2, 9, 3, 4, 5), (8, 9, 1, 1, 1)),
    Problem("conv_transpose1d", (2, 5, 17), (5, 6, 1)),
    Problem("conv_transpose2d", (2, 33, 6, 7), (33, 49, 1, 1)),
    Problem("conv_transpose2d", (1, 9, 2, 3), (9, 17, 1, 1)),
    Problem("conv_transpose3d", (2, 6, 3, 2, 4), (6, 5, 1, 1, 1)),
]
every_problem = pytest.mark.parametrize("problem", PROBLEMS, ids=str)
FUSED_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@every_capability
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "unaligned"])
@every_problem
def test_exact_on_integers(problem: Problem, layout: str, capability: str) -> None:
    lay = LAYOUTS[layout]
    with running_on("fused", capability), poisoned():
        for dtype in FUSED_FLOATS:
            for pattern, biased in (("half", True), ("most", False), ("some rows", True), ("none", True)):
                mask = lay(mask_of(pattern, *problem.weight))
                weight = lay(spoiled(integers(*problem.weight, dtype=dtype), mask))
                bias = integers(problem.out_channels, dtype=dtype) if biased else None
                input = lay(integers(*problem.input, dtype=dtype))
                check_against_dense(problem, input, weight, mask, bias, pattern, name_of(dtype))


@pytest.mark.parametrize("format_of", ["input", "weight", "both", "neither"])
@pytest.mark.parametrize("function", ["conv2d", "conv_transpose2d", "conv3d"])
def test_memory_formats(function: str, format_of: str) -> None:
    """Those of torch's own results; of a gradient too that lies otherwise."""
    dimensions = 3 if function == "conv3d" else 2
    memory_format = torch.channels_last_3d if dimensions == 3 else torch.channels_last
    x, w = integers(*(2, 9, 5, 6, 4)[: 2 + dimensions]), integers(9, 9, *[1] * dimensions)
    mask = mask_of("half", *w.shape)
    x = x.contiguous(memory_format=memory_format) if format_of in ("input", "both") else x
    w = w.contiguous(memory_format=memory_format) if format_of in ("weight", "both") else w
    for fused, copies in beside_copies("fused", function, x, w, mask):
        assert [t.stride() for t in fused[:2]] == [t.stride() for t in copies[:2]]


def test_what_it_cannot_serve() -> None:
    x, w = torch.ones(2, 4, 5, 5), torch.ones(4, 4, 1, 1)
    one_tap = "it takes kernels of one tap, stride 1, no padding, one group"
    with running_on("fused"):
        for options in ({"stride": 2}, {"stride": (1, 2)}, {"padding": 1}, {"padding": (0, 1)}):
            with pytest.raises(RuntimeError, match=f"path 'fused' cannot serve this convolution: {one_tap}"):
                masked_ops.masked_conv2d(x, w, w, **options)
        for weight, groups in ((torch.ones(4, 2, 1, 1), 2), (torch.ones(4, 4, 1, 2), 1), (torch.ones(4, 4, 2, 1), 1)):
            with pytest.raises(RuntimeError, match=one_tap):
                masked_ops.masked_conv2d(x, weight, weight, groups=groups)
        with pytest.raises(RuntimeError, match=one_tap):
            masked_ops.masked_conv_transpose2d(x, w, w, output_padding=1, dilation=2)
        with pytest.raises(RuntimeError, match="the mask is soft"):
            masked_ops.masked_conv2d(x, w, w * 0.5)
        with pytest.raises(RuntimeError, match="its kernels take float32, bfloat16 and float16"):
            masked_ops.masked_conv2d(x.double(), w.double(), w)
        with pytest.raises(RuntimeError, match="a packed layer has no dense weight"):
            masked_ops.packed_conv2d(x, torch.ones(16), bits_of(w), (4, 4, 1, 1))


def test_choice() -> None:
    """Taken where nearly all weights remain: channels last where they outnumber the images, else on large planes."""
    geometry = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)

    def chosen(density: float, size: int, channels_last: bool = True) -> str:
        mask = torch.rand(512, 512, 1, 1) < density
        return _ops.explain_convolution(
            torch.ones(512, 512, 1, 1), mask, [8, 512, size, size], channels_last, *geometry
        )[0]

    portable = _ops._module.capability() == "DEFAULT"
    assert portable or chosen(0.95, 7) == chosen(0.95, 56, channels_last=False) == "fused"
    assert chosen(0.95, 56) != "fused"
    assert chosen(0.03, 7) == "sparse"
