"""Fit the constants by which masked_ops chooses a path for convolutions, and check the choices that they make.

    python bench/fit_convolution_costs.py --minutes 8            # measure, fit, say how well the constants choose
    python bench/fit_convolution_costs.py --minutes 8 --write    # the same, and rewrite csrc/cpu/costs.h
    python bench/fit_convolution_costs.py --check --minutes 8    # only check the constants that are built in
    python bench/fit_convolution_costs.py --minutes 1 --json measured.json    # as often as one likes: it goes on
    python bench/fit_convolution_costs.py --dtype bfloat16   # the costs of another dtype
    MASKED_OPS_CAPABILITY=avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 \\
        python bench/fit_convolution_costs.py                # for CPUs with AVX2

Cells are drawn at random, others for a check than for a fit, from the layers of bench/shapes/convolution.txt, batch 1,
8 and 32, sparsity 0 to 0.95 and both layouts, until the time is up. In each cell every path that can serve is timed
against the others and against dense torch, interleaved, and the minimum of each counts. The terms are those of ConvCost
in csrc/cpu/costs.h. Depthwise convolutions in float32 are checked too, but their own kernels are chosen by rules
(path_convolution.cpp).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from convolution import HERE, Shape, read_shapes
from fit_cost_model import COSTS_H, forced, interleaved_minima
from scipy.optimize import nnls

import masked_ops
from masked_ops import _ops

PASSES = ("forward", "grad_input", "grad_weight")
TERMS = ("call", "mac", "dense", "weight", "value", "packed", "images")
PATH_TERMS = {
    "copy": ("call", "dense", "weight", "images", "fresh"),
    "fused": ("call", "dense", "weight", "images", "fresh"),
    "sparse": ("call", "mac", "weight", "value", "packed", "images", "fresh"),
}
MOST_FULL = 0.75  # sparsity: as the blocks of a sparse index (sparse_index.h)
FULL, FULL_MARGIN, PIXEL_MARGIN = 0.4, 0.75, 0.88  # kMostDensity, kMostMargin, kPixelMargin
USUAL_ERROR = 0.15
FRESH_FLOATS = 8 << 20
FUSED_WEIGHTS = 0.3  # kFusedWeights
PACKED_ROWS = 8.0  # kPackedRows
PATHS = (*PATH_TERMS, "compact")
KINDS = ("one tap", "more taps", "depthwise")
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Setting:
    threads: int
    dtype: str


Cell = tuple[Shape, int, float, bool]  # shape, batch, sparsity, channels_last
Samples = dict[Cell, dict[str, dict[str, float]]]


def grid() -> list[Cell]:
    cells = [
        cell
        for cell in itertools.product(
            read_shapes(HERE / "shapes" / "convolution.txt"), (1, 8, 32), (0.0, 0.5, 0.8, 0.9, 0.95), (False, True)
        )
        if cell[1] * cell[0][0] * cell[0][3] ** 2 <= 16 << 20
    ]
    random.Random(0).shuffle(cells)
    return cells


def measure(cell: Cell, seconds: float, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Per pass, nanoseconds of each path, of the choice, of dense torch, and of the pass that masks a weight."""
    (C, O, kernel, size, stride, groups), batch, sparsity, last = cell  # noqa: E741
    torch.manual_seed(0)
    geometry = ([stride] * 2, [kernel // 2] * 2, [1, 1], False, [0, 0], groups)
    memory_format = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(batch, C, size, size).to(dtype).contiguous(memory_format=memory_format)
    w = torch.randn(O, C // groups, kernel, kernel).to(dtype).contiguous(memory_format=memory_format)
    mask = (torch.rand(w.shape) >= sparsity).to(dtype).contiguous(memory_format=memory_format)
    dy = torch.randn_like(torch.ops.aten.convolution(x, w, None, *geometry))

    def backward(of_input: bool) -> Callable[[], Any]:
        outputs = [of_input, not of_input, False]
        return lambda: torch.ops.aten.convolution_backward(dy, x, w, None, *geometry, outputs)

    calls: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "forward": (
            lambda: _ops.convolution(x, w, mask, None, *geometry),
            lambda: torch.ops.aten.convolution(x, w, None, *geometry),
        ),
        "grad_input": (
            lambda: _ops.convolution_grad_input(dy, w, mask, list(x.shape), *geometry),
            backward(of_input=True),
        ),
        "grad_weight": (lambda: _ops.convolution_grad_weight(dy, x, mask, *geometry), backward(of_input=False)),
    }
    results = {}
    for name, (ours, dense) in calls.items():
        contenders: dict[str, Callable[[], Any]] = {"dense": dense, "auto": ours}
        for _ in range(2):  # from the second use on, a mask has its index
            ours()
        for path in PATHS:
            try:
                with masked_ops.use_path(path):
                    ours()
            except RuntimeError:  # it cannot serve
                continue
            contenders[path] = forced(path, ours)
        contenders["pass"] = lambda: masked_ops.apply_mask(w, mask)
        best = interleaved_minima(contenders, seconds / len(PASSES))
        results[name] = {contender: value * 1e9 for contender, value in best.items()}
    return results


def features(cell: Cell, name: str, path: str, of: Setting) -> list[float]:
    (C, O, kernel, size, stride, groups), batch, sparsity, last = cell  # noqa: E741
    out = (size + 2 * (kernel // 2) - kernel) // stride + 1
    positions, weights = batch * out * out, O * (C // groups) * kernel**2
    packed = O if name == "grad_input" else C  # channels that im2col reads, see path_convolution.cpp
    if last:
        packed = groups * -(-packed // groups // 16) * 16
    elif stride > 1 and name != "grad_input":
        packed *= 2
    result = {"forward": positions * O, "grad_input": batch * size**2 * C, "grad_weight": 0}[name]
    computed = positions * weights
    if path == "copy" and groups < C and name != "grad_weight":  # torch's kernels fill blocks of the result's channels
        computed *= in_blocks((O if name == "forward" else C) // groups, 16)
    if path == "copy" and 1 < groups < C and name == "grad_weight":
        computed *= in_blocks(C // groups, 16) * (1 if last else in_blocks(O // groups, 16))
    if path == "fused" and name == "grad_weight" and not last and of.dtype == "float32":  # whole vectors of a plane
        computed *= in_blocks(out**2, 16)
    value = {
        "call": 1.0,
        "mac": positions * weights * (1 - sparsity) / of.threads,
        "dense": computed / of.threads,
        "weight": weights / of.threads,
        "value": weights * (1 - sparsity) / of.threads,
        "packed": positions * packed_taps(cell, name) * packed / of.threads,
        "images": (positions * O + batch * size * size * C) / of.threads,
        # A large result is fresh memory, whose page faults all paths have in common: not among the constants.
        "fresh": result if result >= FRESH_FLOATS else 0,
    }
    return [value[term] for term in PATH_TERMS[path]]


def in_blocks(n: int, block: int) -> float:
    """What is computed of n for one of it, in whole blocks."""
    return -(-n // block) * block / n


def packed_taps(cell: Cell, name: str) -> float:
    """Taps of a position for which im2col reads, see path_convolution.cpp."""
    kernel, stride = cell[0][2], cell[0][4]
    if (name == "grad_input" and stride > 1) or kernel <= stride:
        return kernel**2
    return kernel * min(kernel, stride * (1 + (kernel - 1) // stride / PACKED_ROWS))


def layout_of(cell: Cell) -> int:
    """Contiguous images that are packed, channels last, contiguous ones that the sparse kernels take as they lie."""
    (C, O, kernel, size, stride, groups), _, sparsity, last = cell  # noqa: E741
    if last:
        return 1
    collide = size**2 % 1024 == 0 and (1 - sparsity) * C * O / groups >= 14 * max(C, O)  # planes_collide in api.h
    lanes = 8 if _ops._module.capability() == "AVX2" else 16
    whole = size**2 % (7 * lanes) == 0 or size**2 % (8 * lanes) == 0
    return 2 if kernel == stride == 1 and whole and not collide else 0


def kind_of(cell: Cell) -> int:
    return 2 if cell[0][5] == cell[0][0] else int(cell[0][2] > 1)


def key_of(path: str, cell: Cell, name: str) -> tuple[Any, ...]:
    """Of the constants that a cell shares with others."""
    if path == "copy":
        return path, kind_of(cell), cell[3], name
    return (path, cell[2] > MOST_FULL, layout_of(cell), name) if path == "sparse" else (path, cell[3], name)


def may_fuse(cell: Cell, name: str, of: Setting) -> bool:
    """See path_convolution.cpp."""
    (C, O, kernel, size, stride, groups), batch, _, last = cell  # noqa: E741
    if not kernel == stride == groups == 1:
        return False
    if not last if of.dtype == "float32" else last and name == "grad_weight" and O < C:
        return True
    return FUSED_WEIGHTS * batch * size**2 * (C + O) <= C * O


def no_sparse(cell: Cell, name: str, of: Setting) -> bool:
    """Whether the sparse path is not considered, see loses_in_groups in path_convolution.cpp."""
    groups = cell[0][5]
    return of.dtype != "float32" and groups > 1 and (kind_of(cell) == 2 or name != "grad_weight")


Costs = dict[tuple[Any, ...], dict[str, float]]


def fit(samples: Samples, of: Setting) -> Costs:
    """Non-negative least squares on relative errors.

    They count less, the further a path is from the choice, and, from the second of three turns on, where they are
    large: such a cell was disturbed.
    """
    systems: dict[tuple[Any, ...], tuple[list[list[float]], list[float]]] = {}
    for cell, results in samples.items():
        for name, path in itertools.product(PASSES, PATH_TERMS):
            times = {p: results[name][p] for p in PATH_TERMS if p in results[name]}
            if path not in times or (path == "fused" and not may_fuse(cell, name, of)):
                continue
            if path == "sparse" and (kind_of(cell) == 2 or no_sparse(cell, name, of)):
                continue
            took = times.pop(path)
            counts = math.exp(-abs(math.log(took / min(times.values()))) / 0.6) + 0.04
            rows, ones = systems.setdefault(key_of(path, cell, name), ([], []))
            rows.append([counts * f / took for f in features(cell, name, path, of)])
            ones.append(counts)
    costs: Costs = {}
    for key, (rows, ones) in systems.items():
        A, b = np.array(rows), np.array(ones)
        solution, _ = nnls(A, b)
        for _ in range(2):
            doubt = np.sqrt(np.maximum(1, np.abs(A @ solution - b) / b / USUAL_ERROR))
            solution, _ = nnls(A / doubt[:, None], b / doubt)
        costs[key] = dict(zip(PATH_TERMS[key[0]], solution.tolist(), strict=True))
    return costs


def expected(costs: Costs, path: str, cell: Cell, name: str, of: Setting) -> float:
    constants = costs[key_of(path, cell, name)]
    return sum(c * f for c, f in zip(constants.values(), features(cell, name, path, of), strict=True))


def predict(costs: Costs, cell: Cell, results: dict[str, float], name: str, of: Setting) -> str:
    """As choose_convolution in csrc/path_convolution.cpp does; where it has rules of its own, what it took."""
    if kind_of(cell) == 2 and of.dtype == "float32":
        return "auto"
    serve = {path for path in PATH_TERMS if path in results}
    if not may_fuse(cell, name, of):
        serve -= {"fused"}
    if no_sparse(cell, name, of):
        serve -= {"sparse"}
    pixels = cell[3] and cell[0][2] == 1 and cell[2] <= MOST_FULL
    margin = FULL_MARGIN if cell[2] < FULL else PIXEL_MARGIN if pixels else 1.0

    def nanoseconds(path: str) -> float:
        return expected(costs, path, cell, name, of) / (margin if path == "sparse" else 1.0)

    return min(serve, key=nanoseconds)


def assess(samples: Samples, chosen: Callable[[Cell, dict[str, float], str], str]) -> None:
    """How often the chosen path is within 10% of the best, and which cells break the promise to be no slower than dense
    torch: below 0.97 of it from batch 8, or, below, by more than the pass that masks the weight."""
    for name in PASSES:
        near, broken = 0, []
        for cell, of_passes in samples.items():
            results = of_passes[name]
            path = chosen(cell, results, name)
            best = min((p for p in PATHS if p in results), key=lambda p: results[p])
            near += results[path] <= 1.1 * results[best]
            if results[path] * 0.97 > results["dense"] + (results["pass"] if cell[1] < 8 else 0):
                broken.append((results["dense"] / results[path], cell, path, best, results["dense"] / results[best]))
        print(
            f"{name:12} within 10% of the best: {near / len(samples):6.1%} of {len(samples)} cells; slower than dense "
            f"torch: {len(broken)}"
        )
        for ratio, (shape, batch, sparsity, last), path, best, best_ratio in sorted(broken):
            layout = "channels last" if last else "contiguous"
            print(
                f"    {ratio:.2f} {' '.join(map(str, shape))}, batch {batch}, {sparsity:.0%}, {layout}: took {path}; "
                f"best {best}, {best_ratio:.2f}"
            )


def write(costs: Costs, dtype: str) -> None:
    def numbers(key: tuple[Any, ...]) -> str:
        return "{" + ", ".join(f"{costs[key].get(term, 0.0):.3g}" for term in TERMS) + "}"

    def rows(key: tuple[Any, ...], indent: str) -> str:
        return "".join(f"{indent}{numbers((*key, name))},  // {name}\n" for name in PASSES)

    body = "    {\n        // dense\n"
    for kind, title in enumerate(KINDS):
        body += f"        {{\n            // {title}\n"
        for last in (False, True):
            body += "            {\n" + rows(("copy", kind, last), "                ") + "            },\n"
        body += "        },\n"
    body += "    },\n    {\n        // fused\n"
    for last in (False, True):
        body += "        {\n" + rows(("fused", last), "            ") + "        },\n"
    body += "    },\n    {\n        // sparse\n"
    for few in (False, True):
        body += "        {\n"
        for layout in range(3):
            body += "            {\n" + rows(("sparse", few, layout), "                ") + "            },\n"
        body += "        },\n"
    body += "    },\n"
    capability = _ops._module.capability()
    section = f"{dtype} convolution" + ("" if capability.startswith("AVX512") else f", {capability}")
    begin, end = f"// {section}: begin\n", f"    // {section}: end\n"
    source = COSTS_H.read_text()
    source, count = re.subn(f"{begin}.*{end}", lambda _: begin + body + end, source, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"{COSTS_H} must hold the markers {begin.strip()} and {end.strip()} once")
    COSTS_H.write_text(source)
    if formatter := shutil.which("clang-format"):
        subprocess.run([formatter, "-i", str(COSTS_H)], check=True)
    print(f"wrote {COSTS_H}, {section}")


def sample(samples: Samples, minutes: float, seconds: float, dtype: str, check: bool) -> None:
    """Measures cells that are not among the samples; for a check from the other end."""
    deadline = time.perf_counter() + 60 * minutes
    for cell in reversed(grid()) if check else grid():
        if time.perf_counter() > deadline:
            break
        if cell not in samples:
            samples[cell] = measure(cell, seconds, getattr(torch, dtype))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--seconds", type=float, default=0.15, help="for each cell (default: %(default)s)")
    parser.add_argument("--write", action="store_true", help="rewrite csrc/cpu/costs.h")
    parser.add_argument("--check", action="store_true", help="assess the constants that are built in, fit nothing")
    parser.add_argument(
        "--json", type=Path, nargs="+", default=[], help="measurements: go on from them, keep all in the first"
    )
    args = parser.parse_args()
    if not masked_ops.is_available():
        sys.exit("the compiled kernels are not available; python -m masked_ops says why")
    of = Setting(torch.get_num_threads(), args.dtype)

    samples: Samples = {}
    for file in filter(Path.exists, args.json):
        samples |= {(tuple(cell[0]), *cell[1:]): results for cell, results in json.loads(file.read_text())}
    sample(samples, args.minutes, args.seconds, of.dtype, args.check)
    if args.json:
        args.json[0].parent.mkdir(parents=True, exist_ok=True)
        args.json[0].write_text(json.dumps(list(samples.items())))
    print(f"{len(samples)} cells")

    if args.check:
        assess(samples, lambda cell, results, name: "auto")
        return
    held_out = {cell: samples[cell] for cell in list(samples)[::4]}
    fitted = fit({cell: results for cell, results in samples.items() if cell not in held_out}, of)
    print("on the quarter of the cells that was held out:")
    assess(held_out, lambda cell, results, name: predict(fitted, cell, results, name, of))
    costs = fit(samples, of)
    for key, constants in costs.items():
        print(*key, {term: float(f"{value:.3g}") for term, value in constants.items()})
    if args.write:
        write(costs, of.dtype)


if __name__ == "__main__":
    main()
