"""Fit the constants by which masked_ops chooses a path for linear layers, and check the choices that they make.

    python bench/fit_cost_model.py --minutes 6              # measure, fit, say how well the constants choose
    python bench/fit_cost_model.py --minutes 6 --write      # the same, and rewrite csrc/cpu/costs.h
    python bench/fit_cost_model.py --json FILE              # in parts: each run adds its cells to the file's
    python bench/fit_cost_model.py --samples FILE --write   # fit the cells of a file
    python bench/fit_cost_model.py --check --minutes 6      # only check the constants that are built in
    python bench/fit_cost_model.py --dtype bfloat16         # one dtype only
    python bench/fit_cost_model.py --packed                 # of packed layers
    python bench/fit_cost_model.py --rows 1 2 4 8 12 16     # only constants of few rows: 1, or 2 to 16, or more
    MASKED_OPS_CAPABILITY=avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 python bench/fit_cost_model.py \
        --dtype float32 bfloat16 float16                    # for CPUs with AVX2; --packed as well

Cells are drawn at random, others for a check than for a fit, from a grid of M 1..2048, N and K 64..4096, sparsity
0..0.99 and one and all threads, for each dtype until its share of the time is up. In each cell every path that can
serve is timed against the others and against dense torch, interleaved, and the minimum of each counts.

The model of a path and pass is a sum of non-negative terms, in nanoseconds:

    call + memory * N * K
         + (mac * M * nnz + dense * M * N * K + weight * N * K
            + value * nnz + io * M * (N + K) + block * M * N * B) / threads

where B is the number of blocks that the sparse kernels cut K into. There is one set of constants for M <= 16, where
weights are read once and come from memory, and one for M > 16; packed layers have another for M = 1, which has a sparse
kernel of its own (with AVX-512 it takes 16 others as long as two). Their products of few rows and little work have one
thread. Only the terms that a path has are fitted: a dense path knows no nnz. Sets of which no cell was measured stay as
they are.
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
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _harness  # noqa: F401  (settles the allocator)
import numpy as np
import torch
from scipy.optimize import nnls
from torch.nn import functional as F
from tqdm import tqdm

import masked_ops
from masked_ops import _ops

SMALL_M = 16
SERIAL_OPERATIONS = 1 << 17  # kSerialOperations in csrc/parallel.cpp
SIZES = (f"M <= {SMALL_M}", f"M > {SMALL_M}")
PACKED_SIZES = ("M = 1", *SIZES)  # of which the first has a sparse kernel of its own
TERMS = ("call", "mac", "dense", "weight", "memory", "value", "io", "block")
PASSES = ("forward", "grad_input", "grad_weight")
PATH_TERMS = {
    "copy": ("call", "dense", "weight", "memory", "io"),
    "fused": ("call", "dense", "weight", "memory", "io"),
    "sparse": ("call", "mac", "weight", "memory", "value", "io", "block"),
}
PACKED_TERMS = {
    "copy": ("call", "dense", "weight", "memory", "value", "io"),
    "fused": ("call", "dense", "weight", "memory", "value", "io"),
    "sparse": ("call", "mac", "value", "io", "block"),
}
PathTerms = dict[str, tuple[str, ...]]
DTYPES = ("float32", "bfloat16", "float16")
COSTS_H = Path(__file__).resolve().parent.parent / "csrc" / "cpu" / "costs.h"

Cell = tuple[int, int, int, float, int]  # M, N, K, sparsity, threads
Samples = dict[Cell, dict[str, dict[str, float]]]  # nanoseconds by pass and contender

ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 64, 128, 256, 512, 1024, 2048)


def grid(dtype: str, rows: list[int], threads: list[int], seed: int) -> list[Cell]:
    # Beyond, torch's own float16 takes seconds, and its bfloat16 where there is no AVX-512.
    slow = dtype == "float16" or (dtype == "bfloat16" and not _ops._module.capability().startswith("AVX512"))
    most = 16 * 1024 * 1024 if slow else 512 * 4096 * 4096
    features = (64, 128, 256, 512, 768, 1024, 2048, 3072, 4096)
    sparsities = (0.0, 0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
    cells = [
        cell
        for cell in itertools.product(rows, features, features, sparsities, threads)
        if cell[0] * cell[1] * cell[2] <= most
    ]
    random.Random(seed).shuffle(cells)
    return cells


def forced(path: str, call: Callable[[], Any]) -> Callable[[], Any]:
    """The call, on this path."""

    def run() -> None:
        before = _ops._module.set_path(path)
        call()
        _ops._module.set_path(before)

    return run


def interleaved_minima(contenders: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Seconds a call takes at best, each contender called in turn, in both orders, until the time is up.

    Each round begins with another one, so that none is ever called twice in a row: that one would find its operands in
    the caches, and a large layer gets few rounds.
    """
    best = dict.fromkeys(contenders, float("inf"))
    names = list(contenders)
    deadline = time.perf_counter() + seconds
    rounds = 0
    while rounds < 4 or (time.perf_counter() < deadline and rounds < 200):
        first = rounds // 2 % len(names)
        turn = names[first:] + names[:first]
        for name in turn if rounds % 2 == 0 else turn[1::-1] + turn[:1:-1]:
            start = time.perf_counter()
            contenders[name]()
            best[name] = min(best[name], time.perf_counter() - start)
        rounds += 1
    return best


def measure(name: str, cell: Cell, seconds: float, packed: bool) -> dict[str, dict[str, float]]:
    """Per pass, nanoseconds of each path and of dense torch."""
    M, N, K, sparsity, threads = cell
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    dtype = getattr(torch, name)
    x, w, dy = (torch.randn(shape).to(dtype) for shape in ((M, K), (N, K), (M, N)))
    mask = (torch.rand(N, K) >= sparsity).float()

    # Each pair enters the dispatcher the same way: forward as users call it, the gradients, which backward calls from
    # C++, by their operators, whose Python wrapper takes half a microsecond more than that of dy @ w.
    mm = torch.ops.aten.mm.default
    calls = {
        "forward": (lambda: masked_ops.masked_linear(x, w, mask), lambda: F.linear(x, w)),
        "grad_input": (lambda: _ops.linear_grad_input(dy, w, mask), lambda: mm(dy, w)),
        "grad_weight": (lambda: _ops.linear_grad_weight(dy, x, mask), lambda: mm(dy.t(), x)),
    }
    if packed:
        padded = np.packbits(mask.bool().numpy(), axis=1, bitorder="little")
        bits, values = torch.from_numpy(padded), w[mask.bool()]
        calls = {
            "forward": (lambda: masked_ops.packed_linear(x, values, bits, K), calls["forward"][1]),
            "grad_input": (
                lambda: _ops.packed_linear_grad_input(dy, values, bits, K),
                calls["grad_input"][1],
            ),
            "grad_weight": (
                lambda: _ops.packed_linear_grad_values(dy, x, bits, len(values)),
                calls["grad_weight"][1],
            ),
        }
    results = {}
    for operation, (ours, dense) in calls.items():
        contenders: dict[str, Callable[[], Any]] = {"dense": dense, "auto": ours}
        contenders |= {path: forced(path, ours) for path in PATH_TERMS}
        ours()  # from the second use on, a mask has its index
        best = interleaved_minima(contenders, seconds / len(PASSES))
        results[operation] = {contender: value * 1e9 for contender, value in best.items()}
    return results


def features(cell: Cell, path: str, path_terms: PathTerms) -> list[float]:
    M, N, K, sparsity, threads = cell
    nnz = N * K * (1 - sparsity)
    if path_terms is PACKED_TERMS and M <= SMALL_M and path != "copy":  # as LinearCosts::packed_threads
        operations = max(M // 2, 1) * (nnz if path == "sparse" else N * K)
        threads = threads if operations >= SERIAL_OPERATIONS else 1
    block_columns = 64 if 1 - sparsity >= 0.25 else 128 if 1 - sparsity >= 0.07 else 256  # as in sparse_index.h
    value = {
        "call": 1.0,
        "mac": M * nnz / threads,
        "dense": M * N * K / threads,
        "weight": N * K / threads,
        "memory": N * K,
        "value": nnz / threads,
        "io": M * (N + K) / threads,
        "block": M * N * -(-K // block_columns) / threads,
    }
    return [value[term] for term in path_terms[path]]


Costs = dict[tuple[str, str, str], dict[str, float]]


def size_of(cell: Cell, path_terms: PathTerms) -> str:
    if cell[0] > SMALL_M:
        return SIZES[-1]
    return PACKED_SIZES[0] if path_terms is PACKED_TERMS and cell[0] == 1 else SIZES[0]


def fit(samples: Samples, path_terms: PathTerms) -> Costs:
    """Non-negative least squares on relative errors; they count less, the further a path is from the choice."""
    costs: Costs = {}
    for path, terms in path_terms.items():
        for name, size in itertools.product(PASSES, PACKED_SIZES):
            rows, ones = [], []
            for cell, results in samples.items():
                if size_of(cell, path_terms) == size:
                    took = results[name][path]
                    best_other = min(results[name][other] for other in PATH_TERMS if other != path)
                    counts = math.exp(-abs(math.log(took / best_other)) / 0.6) + 0.04
                    rows.append([counts * f / took for f in features(cell, path, path_terms)])
                    ones.append(counts)
            if rows:
                solution, _ = nnls(np.array(rows), np.array(ones))
                costs[path, name, size] = dict(zip(terms, solution.tolist(), strict=True))
    return costs


def predict(costs: Costs, cell: Cell, name: str, path: str, path_terms: PathTerms) -> float:
    constants = costs[path, name, size_of(cell, path_terms)].values()
    return sum(c * f for c, f in zip(constants, features(cell, path, path_terms), strict=True))


def assess(samples: Samples, chosen: Callable[[Cell, str], str]) -> None:
    """How often the chosen path is within 10% of the best, and how it stands to dense torch."""
    for name in PASSES:
        near = below = 0
        worst: tuple[float, Cell | None] = (float("inf"), None)
        losses = []
        for cell, results in samples.items():
            took = results[name][chosen(cell, name)]
            best = best_path(results[name])
            near += took <= 1.1 * best
            losses.append(took / best)
            ratio = results[name]["dense"] / took
            below += ratio < 0.97
            worst = min(worst, (ratio, cell), key=lambda pair: pair[0])
        n = len(samples)
        print(
            f"{name:12} within 10% of the best: {near / n:6.1%} of {n} cells; average loss {np.mean(losses) - 1:.1%}; "
            f"below 0.97 of dense torch: {below} ({below / n:.1%}), worst {worst[0]:.2f} at {worst[1]}"
        )


def write(dtype: str, costs: Costs, packed: bool) -> None:
    source = COSTS_H.read_text()
    capability = _ops._module.capability()
    section = dtype if capability.startswith("AVX512") else f"{dtype}, {capability}"
    section += ", packed" if packed else ""
    found = re.search(f"(?<=// {section}: begin\n).*(?=    // {section}: end\n)", source, flags=re.DOTALL)
    if not found:
        sys.exit(f"{COSTS_H} has no costs of {section}")
    rows = iter(re.findall(r"\{([^{}]*)\},\s*// \w+, M", found[0]))
    lines = []
    for path in PATH_TERMS:
        lines.append(f"    {{  // {path}")
        for name in PASSES:
            for size in PACKED_SIZES if packed else SIZES:
                numbers = next(rows)
                if constants := costs.get((path, name, size)):
                    numbers = ", ".join(f"{constants.get(term, 0.0):.3g}" for term in TERMS)
                lines.append(f"        {{{numbers}}},  // {name}, {size}")
        lines.append("    },")
    body = "\n".join(lines) + "\n"
    COSTS_H.write_text(source[: found.start()] + body + source[found.end() :])
    if formatter := shutil.which("clang-format"):
        subprocess.run([formatter, "-i", str(COSTS_H)], check=True)
    print(f"wrote {COSTS_H}, {section}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--minutes", type=float, default=6)
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS, choices=ROWS, metavar="M", help="of the input")
    parser.add_argument("--packed", action="store_true", help="packed layers; their cells are apart")
    parser.add_argument("--write", action="store_true", help="rewrite csrc/cpu/costs.h")
    parser.add_argument("--check", action="store_true", help="assess the constants that are built in, fit nothing")
    parser.add_argument("--json", type=Path, help="keep the measurements, and add to those that are there")
    parser.add_argument("--samples", type=Path, help="fit measurements that were kept, measure nothing")
    args = parser.parse_args()
    if not masked_ops.is_available():
        sys.exit("the compiled kernels are not available; python -m masked_ops says why")
    if not args.check and any(_ops._module.torch_rate(dtype) == 2 for dtype in args.dtype if dtype != "float32"):
        sys.exit("the tables are of CPUs without matrix units (AMX), to which kTileSpeedup is added: only --check here")

    before = args.samples or (args.json if args.json and args.json.exists() else None)
    kept = json.loads(before.read_text()) if before else {}
    for dtype in args.dtype:
        key = f"{dtype}, packed" if args.packed else dtype
        samples = {tuple(cell): results for cell, results in kept.get(key, [])}
        if not args.samples:
            seed = 1 if args.check else 0
            sample(samples, dtype, args.rows, 60 * args.minutes / len(args.dtype), seed, args.packed)
            kept[key] = [[cell, results] for cell, results in samples.items()]
            if args.json:
                args.json.parent.mkdir(parents=True, exist_ok=True)
                args.json.write_text(json.dumps(kept))
        print(f"\n{key}: {len(samples)} cells")
        if args.check:
            assess(samples, lambda cell, name: "auto")
            if not args.samples:
                misses = measure_misses_again(dtype, samples, args.packed)
                print(f"\n{key}: after the {misses} cells with a miss were measured once more")
                assess(samples, lambda cell, name: "auto")
            continue
        costs = fit_and_assess(samples, PACKED_TERMS if args.packed else PATH_TERMS)
        if args.write:
            write(dtype, costs, args.packed)


def sample(samples: Samples, dtype: str, rows: list[int], seconds: float, seed: int, packed: bool) -> None:
    """Add cells that are not there yet, until the time is up."""
    most = torch.get_num_threads()
    deadline = time.perf_counter() + seconds
    with tqdm(desc=dtype, total=round(seconds), unit="s", disable=not sys.stderr.isatty()) as bar:
        for cell in grid(dtype, rows, sorted({1, most}), seed):
            started = time.perf_counter()
            if started > deadline:
                break
            if cell in samples:
                continue
            samples[cell] = measure(dtype, cell, 0.15, packed)
            bar.set_postfix(cells=len(samples))
            bar.update(round(time.perf_counter() - started, 2))
    torch.set_num_threads(most)


def measure_misses_again(dtype: str, samples: Samples, packed: bool) -> int:
    """Lower the minima of all contenders where one choice was slow; the number of such cells."""
    most = torch.get_num_threads()
    misses = [
        cell
        for cell, results in samples.items()
        if any(times["auto"] > min(times["dense"] / 0.97, 1.1 * best_path(times)) for times in results.values())
    ]
    for cell in tqdm(misses, desc=f"{dtype}, again", disable=not sys.stderr.isatty()):
        again = measure(dtype, cell, 0.9, packed)
        for name, times in samples[cell].items():
            for contender in times:
                times[contender] = min(times[contender], again[name][contender])
    torch.set_num_threads(most)
    return len(misses)


def best_path(times: dict[str, float]) -> float:
    return min(times[path] for path in PATH_TERMS)


def fit_and_assess(samples: Samples, path_terms: PathTerms) -> Costs:
    by_cell = list(samples)
    held_out = {cell: samples[cell] for cell in by_cell[::4]}
    fitted = fit({cell: samples[cell] for cell in by_cell if cell not in held_out}, path_terms)
    print("on the quarter of the cells that was held out:")
    assess(held_out, lambda cell, name: min(PATH_TERMS, key=lambda path: predict(fitted, cell, name, path, path_terms)))
    costs = fit(samples, path_terms)
    errors = defaultdict(list)
    for cell, results in samples.items():
        for path, name in itertools.product(PATH_TERMS, PASSES):
            errors[path].append(abs(np.log(predict(costs, cell, name, path, path_terms) / results[name][path])))
    print(
        "typical error of the model:", ", ".join(f"{path} {np.expm1(np.median(e)):.0%}" for path, e in errors.items())
    )
    for (path, name, size), constants in costs.items():
        print(f"{path:7} {name:12} {size:7} ", {k: float(f"{v:.3g}") for k, v in constants.items()})
    return costs


if __name__ == "__main__":
    main()
