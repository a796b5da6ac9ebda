"""Fit the constants by which masked_ops chooses a path for convolutions, and check the choices that they make.

    python bench/fit_convolution_costs.py --minutes 6            # measure, fit, say how well the constants choose
    python bench/fit_convolution_costs.py --minutes 6 --write    # the same, and rewrite csrc/cpu/costs.h
    python bench/fit_convolution_costs.py --check --minutes 6    # only check the constants that are built in

Cells are drawn at random, from the same seed, from the layers of bench/shapes/convolution.txt, batch 1, 8 and 32,
sparsity 0 to 0.95 and both layouts, until the time is up. In each cell both paths are timed against each other and
against dense torch, interleaved, and the minimum of each counts. The terms are those of ConvCost in csrc/cpu/costs.h.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
import sys
import time
from collections.abc import Callable
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
DENSE_TERMS = ("call", "dense", "weight", "images")
SPARSE_TERMS = ("call", "mac", "weight", "value", "packed", "images")
KINDS = ("one tap", "more taps", "grouped")
MARGIN = 0.85  # kConvMargin

Cell = tuple[Shape, int, float, bool]  # shape, batch, sparsity, channels_last
Samples = dict[Cell, dict[str, dict[str, float]]]


def grid() -> list[Cell]:
    cells = [
        cell
        for cell in itertools.product(
            read_shapes(HERE / "shapes" / "convolution.txt"), (1, 8, 32), (0.0, 0.5, 0.8, 0.9, 0.95), (False, True)
        )
        if cell[1] * cell[0][0] * cell[0][3] ** 2 <= 32 << 20
    ]
    random.Random(0).shuffle(cells)
    return cells


def measure(cell: Cell, seconds: float) -> dict[str, dict[str, float]]:
    """Per pass, nanoseconds of each path, of the choice, and of dense torch."""
    (C, O, kernel, size, stride, groups), batch, sparsity, last = cell  # noqa: E741
    torch.manual_seed(0)
    geometry = ([stride] * 2, [kernel // 2] * 2, [1, 1], False, [0, 0], groups)
    memory_format = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(batch, C, size, size).contiguous(memory_format=memory_format)
    w = torch.randn(O, C // groups, kernel, kernel).contiguous(memory_format=memory_format)
    mask = (torch.rand(w.shape) >= sparsity).float().contiguous(memory_format=memory_format)
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
        contenders = {"dense": dense, "auto": ours, "copy": forced("copy", ours), "sparse": forced("sparse", ours)}
        ours()  # from the second use on, a mask has its index
        best = interleaved_minima(contenders, seconds / len(PASSES))
        results[name] = {contender: value * 1e9 for contender, value in best.items()}
    return results


def features(cell: Cell, name: str, terms: tuple[str, ...], threads: int) -> list[float]:
    (C, O, kernel, size, stride, groups), batch, sparsity, last = cell  # noqa: E741
    out = (size + 2 * (kernel // 2) - kernel) // stride + 1
    positions, taps, weights = batch * out * out, kernel**2, O * (C // groups) * kernel**2
    packed = O if name == "grad_input" else C  # channels that im2col reads, see path.cpp
    if last:
        packed = groups * -(-packed // groups // 16) * 16
    elif stride > 1 and name != "grad_input":
        packed *= 2
    value = {
        "call": 1.0,
        "mac": positions * weights * (1 - sparsity) / threads,
        "dense": positions * weights / threads,
        "weight": weights / threads,
        "value": weights * (1 - sparsity) / threads,
        "packed": positions * taps * packed / threads,
        "images": (positions * O + batch * size * size * C) / threads,
    }
    return [value[term] for term in terms]


def kind_of(cell: Cell) -> int:
    return 2 if cell[0][5] > 1 else int(cell[0][2] > 1)


def solve(samples: Samples, name: str, path: str, terms: tuple[str, ...], threads: int) -> dict[str, float]:
    """Non-negative least squares on relative errors."""
    rows = [
        [f / results[name][path] for f in features(cell, name, terms, threads)] for cell, results in samples.items()
    ]
    if not rows:
        return dict.fromkeys(terms, 0.0)
    solution, _ = nnls(np.array(rows), np.ones(len(rows)))
    return dict(zip(terms, solution.tolist(), strict=True))


Costs = dict[tuple[Any, ...], dict[str, float]]


def fit(samples: Samples, threads: int) -> Costs:
    costs: Costs = {}
    for last, name in itertools.product((False, True), PASSES):
        here = {cell: results for cell, results in samples.items() if cell[3] == last}
        costs["sparse", last, name] = solve(here, name, "sparse", SPARSE_TERMS, threads)
        for kind in range(3):
            of_kind = {cell: results for cell, results in here.items() if kind_of(cell) == kind}
            costs["copy", kind, last, name] = solve(of_kind, name, "copy", DENSE_TERMS, threads)
    return costs


def predict(costs: Costs, cell: Cell, name: str, threads: int) -> str:
    def cost(key: tuple[Any, ...], terms: tuple[str, ...]) -> float:
        return sum(c * f for c, f in zip(costs[key].values(), features(cell, name, terms, threads), strict=True))

    sparse = cost(("sparse", cell[3], name), SPARSE_TERMS)
    return "sparse" if sparse < MARGIN * cost(("copy", kind_of(cell), cell[3], name), DENSE_TERMS) else "copy"


def assess(samples: Samples, chosen: Callable[[Cell, str], str]) -> None:
    """How often the chosen path is within 10% of the best, and how it stands to dense torch."""
    for name in PASSES:
        near = below = from_8 = 0
        worst: tuple[float, Cell | None] = (float("inf"), None)
        for cell, results in samples.items():
            took = results[name][chosen(cell, name)]
            near += took <= 1.1 * min(results[name]["copy"], results[name]["sparse"])
            if cell[1] < 8:
                continue
            from_8 += 1
            ratio = results[name]["dense"] / took
            below += ratio < 0.97
            worst = min(worst, (ratio, cell), key=lambda pair: pair[0])
        print(
            f"{name:12} within 10% of the best: {near / len(samples):6.1%} of {len(samples)} cells; from batch 8 below "
            f"0.97 of dense torch: {below} of {from_8}, worst {worst[0]:.2f} at {worst[1]}"
        )


def write(costs: Costs) -> None:
    def numbers(key: tuple[Any, ...]) -> str:
        return "{" + ", ".join(f"{costs[key].get(term, 0.0):.3g}" for term in TERMS) + "}"

    def row(key: tuple[Any, ...], indent: str) -> str:
        return "".join(f"{indent}    {numbers((*key, name))},  // {name}\n" for name in PASSES)

    dense = sparse = ""
    for kind, title in enumerate(KINDS):
        dense += f"    {{\n        // {title}\n"
        for last in (False, True):
            dense += "        {\n" + row(("copy", kind, last), "        ") + "        },\n"
        dense += "    },\n"
    for last in (False, True):
        sparse += "    {\n" + row(("sparse", last), "    ") + "    },\n"
    source = COSTS_H.read_text()
    for which, body in (("dense", dense), ("sparse", sparse)):
        begin, end = f"// {which} convolution: begin\n", f"    // {which} convolution: end\n"
        source, count = re.subn(f"{begin}.*{end}", lambda _, t=begin + body + end: t, source, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"{COSTS_H} must hold the markers {begin.strip()} and {end.strip()} once")
    COSTS_H.write_text(source)
    print(f"wrote {COSTS_H}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=6)
    parser.add_argument("--seconds", type=float, default=0.15, help="for each cell (default: %(default)s)")
    parser.add_argument("--skip", type=int, default=0, help="cells to leave out at first")
    parser.add_argument("--write", action="store_true", help="rewrite csrc/cpu/costs.h")
    parser.add_argument("--check", action="store_true", help="assess the constants that are built in, fit nothing")
    parser.add_argument("--json", type=Path, help="keep the measurements")
    parser.add_argument("--samples", type=Path, nargs="+", help="fit measurements that were kept, measure nothing")
    args = parser.parse_args()
    if not masked_ops.is_available():
        sys.exit("the compiled kernels are not available; python -m masked_ops says why")
    threads = torch.get_num_threads()

    samples: Samples = {}
    if args.samples:
        for file in args.samples:
            samples |= {(tuple(cell[0]), *cell[1:]): results for cell, results in json.loads(file.read_text())}
    else:
        deadline = time.perf_counter() + 60 * args.minutes
        for cell in grid()[args.skip :]:
            if time.perf_counter() > deadline:
                break
            samples[cell] = measure(cell, args.seconds)
        print(f"{len(samples)} cells")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(list(samples.items())))

    if args.check:
        assess(samples, lambda cell, name: "auto")
        return
    held_out = {cell: samples[cell] for cell in list(samples)[::4]}
    fitted = fit({cell: results for cell, results in samples.items() if cell not in held_out}, threads)
    print("on the quarter of the cells that was held out:")
    assess(held_out, lambda cell, name: predict(fitted, cell, name, threads))
    costs = fit(samples, threads)
    for key, constants in costs.items():
        print(*key, {term: float(f"{value:.3g}") for term, value in constants.items()})
    if args.write:
        write(costs)


if __name__ == "__main__":
    main()
