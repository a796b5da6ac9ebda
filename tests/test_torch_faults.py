"""Convolutions over which torch 2.13 crashes or is wrong: ours are right on every path.

In processes of their own, which may crash: each prints what is wrong.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from generators import compiled_only, run_each_in_a_process
from paths import RunPython

# Of a layer's arguments, and the sizes of the images.
IN_BFLOAT16 = {
    "no column meets an image": (
        {"i": 3, "o": 1, "kernel_size": 1, "stride": 2, "padding": 1, "dilation": 2},
        (2, 3, 2, 1),
    ),
    "none, in groups": (
        {"i": 32, "o": 4, "kernel_size": (3, 1), "stride": (1, 3), "padding": 1, "dilation": (2, 3), "groups": 2},
        (2, 32, 3, 2),
    ),
    "a column of one": (
        {"i": 4, "o": 1, "kernel_size": (1, 3), "stride": (1, 2), "padding": (0, 1), "dilation": (3, 1)},
        (2, 4, 8, 1),
    ),
    "a row of one channel each": (
        {"i": 4, "o": 64, "kernel_size": (3, 2), "stride": (1, 2), "padding": 1, "groups": 4},
        (2, 4, 13, 1),
    ),
    "one channel": (
        {"i": 1, "o": 3, "kernel_size": (2, 1), "stride": 3, "padding": (2, 1), "dilation": (1, 3)},
        (2, 1, 5, 2),
    ),
    "large kernel": ({"i": 64, "o": 128, "kernel_size": 5, "stride": (2, 4), "padding": 2, "groups": 2}, (2, 64, 7, 2)),
    "transposed": (
        {"transposed": True, "i": 4, "o": 12, "kernel_size": 3, "stride": (1, 2), "padding": 1, "groups": 4},
        (3, 4, 5, 1),
    ),
    "transposed, 3d": (
        {
            "transposed": True,
            "i": 9,
            "o": 24,
            "kernel_size": (2, 3, 1),
            "stride": (1, 1, 3),
            "padding": (1, 0, 1),
            "dilation": (2, 1, 3),
            "groups": 3,
        },
        (3, 9, 2, 7, 2),
    ),
    "3d": ({"i": 8, "o": 4, "kernel_size": (2, 1, 2), "padding": (1, 0, 1), "dilation": (1, 1, 2)}, (3, 8, 1, 8, 1)),
    "depth, in groups": (
        {
            "i": 4,
            "o": 8,
            "kernel_size": (3, 1, 3),
            "stride": (2, 4, 1),
            "padding": (6, 0, 2),
            "dilation": (6, 2, 1),
            "groups": 4,
        },
        (2, 4, 1, 3, 3),
    ),
    "deeper than the images": ({"i": 16, "o": 16, "kernel_size": 3, "padding": 1}, (2, 16, 2, 5, 5)),
    "deeper, dilated": (
        {"i": 16, "o": 8, "kernel_size": (2, 1, 1), "padding": (1, 0, 0), "dilation": (2, 1, 1)},
        (2, 16, 2, 5, 5),
    ),
}
FEW_CHANNELS = {
    "3 channels": ({"i": 3, "o": 8, "kernel_size": 1, "stride": 2}, (32, 3, 32, 32)),
    "7 channels, an odd end": ({"i": 7, "o": 8, "kernel_size": 1, "stride": (2, 3)}, (32, 7, 31, 33)),
    "3d": ({"i": 3, "o": 8, "kernel_size": 1, "stride": (1, 2, 2)}, (8, 3, 2, 32, 32)),
    "transposed": (
        {"transposed": True, "i": 8, "o": 3, "kernel_size": 1, "stride": 2, "output_padding": 1},
        (32, 8, 16, 16),
    ),
}

CHECK = """
import copy
import itertools

import torch
import masked_ops

torch.manual_seed(0)
dtype, (options, size) = torch.DTYPE, CASE
kind = ("ConvTranspose" if options.pop("transposed", False) else "Conv") + f"{len(size) - 2}d"
dense = getattr(torch.nn, kind)(options.pop("i"), options.pop("o"), **options, dtype=torch.float64)
draw = lambda shape: torch.randint(-1, 2, tuple(shape)).double()
last = lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1)
poison = lambda: [torch.full((1 << 20,), 1e30) for _ in range(4)] and None  # some of it is read
with torch.no_grad():
    for p in dense.parameters():
        p.copy_(draw(p.shape))
mask = torch.rand(dense.weight.shape) < 0.9
x = draw(size)
x64 = x.clone().requires_grad_()
plain = getattr(torch.nn.functional, kind.lower().replace("transpose", "_transpose"))
names = ("stride", "padding", "output_padding", "groups", "dilation")
arguments = {n: getattr(dense, n) for n in names if n != "output_padding" or "Trans" in kind}
w64 = (dense.weight.detach() * mask).requires_grad_()
y64 = plain(x64, w64, dense.bias.detach(), **arguments)
g = draw(y64.shape)
y64.backward(g)
for lies, packed, path in itertools.product(itertools.product((False, True), repeat=3), (False, True), ("copy", None)):
    of_x, of_w, of_g = lies
    module = getattr(masked_ops, "Masked" + kind).from_dense(copy.deepcopy(dense).to(dtype), mask=mask)
    if of_w:
        module.weight_orig.data = last(module.weight_orig.data)
    if packed:
        masked_ops.pack(module_ := torch.nn.Sequential(module))
        module = module_[0]
    images, dy = (last(t.to(dtype)) if l else t.to(dtype) for t, l in ((x, of_x), (g, of_g)))
    for of_input, of_weight in ((True, True), (True, False), (False, True)):
        leaf = images.detach().requires_grad_(of_input)
        module.requires_grad_(of_weight)
        parameter = module.weight_values if packed else module.weight_orig
        parameter.grad = None
        with masked_ops.use_path(path):
            poison()
            y = module(leaf)
            poison()
            y.backward(dy)
        results = {"output": (y, y64)}
        if of_input:
            results["grad_input"] = (leaf.grad, x64.grad)
        if of_weight:
            theirs = w64.grad.flatten(1)[mask.flatten(1)] if packed else w64.grad * mask
            results["grad_weight"] = (parameter.grad, theirs)
        for name, (ours, right) in results.items():
            if not torch.equal(ours.double(), right.to(dtype).double()):
                print(name, lies, packed, path)
print("done")
"""


def check(
    cases: dict[str, tuple[dict[str, Any], tuple[int, ...]]],
    dtype: str,
    run_python: RunPython,
    folder: Path,
    **variables: object,
) -> None:
    code = {name: CHECK.replace("DTYPE", dtype).replace("CASE", repr(case)) for name, case in cases.items()}
    for name, result in run_each_in_a_process(code, run_python, folder, OMP_NUM_THREADS=None, **variables).items():
        assert list(result) == [0, "done\n"], (name, *result)


@compiled_only
@pytest.mark.cpu_only("torch's convolutions for the CPU")
def test_bfloat16_where_taps_meet_padding_alone_or_the_kernel_is_deep(run_python: RunPython, tmp_path: Path) -> None:
    check(IN_BFLOAT16, "bfloat16", run_python, tmp_path)


@compiled_only
@pytest.mark.cpu_only("torch's convolutions for the CPU")
@pytest.mark.parametrize("isa", ["AVX2", None])
def test_one_tap_with_a_stride_over_few_channels(run_python: RunPython, tmp_path: Path, isa: str | None) -> None:
    variables = {"ONEDNN_MAX_CPU_ISA": isa, "ATEN_CPU_CAPABILITY": "avx2"} if isa else {}
    check(FEW_CHANNELS, "float32", run_python, tmp_path, **variables)
