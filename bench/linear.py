"""Masked and packed linear layers against torch: forward passes and training steps over shapes and sparsities.

    python bench/linear.py                                  # bench/shapes/linear.txt, 50 to 99% sparsity, float32
    python bench/linear.py --shapes my.txt --sparsity 0.9 --dtype bfloat16 --threads 1

Each line of a shapes file is ``M N K``. The contenders of a line run interleaved in this process:

    hook    F.linear(x, weight * mask), as torch.nn.utils.prune has it
    dense   F.linear(x, weight), the layer before it was pruned
    csr     torch.sparse_csr @ x (forward only)
    live    masked_linear on the dense weight_orig and its mask
    packed  packed_linear on the remaining values

A step is forward and all gradients, with ``.grad`` set to None before it. GF/s count the remaining weights alone; the
share is that of the machine's FMA peak or, where M is 8 or less, of its memory bandwidth over the bytes that the path
has to read: both are measured in the same run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _harness import interleaved, machine, parser, print_machine, table, write_json
from torch import Tensor
from torch.nn import functional as F

import masked_ops
from masked_ops import _ops

HERE = Path(__file__).resolve().parent
SMALL_M = 8


def read_shapes(path: Path) -> Iterator[tuple[int, int, int]]:
    for line in path.read_text().splitlines():
        fields = line.partition("#")[0].split()
        if fields:
            M, N, K = map(int, fields)
            yield M, N, K


def packed_bits(mask: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(mask.bool().numpy(), axis=1, bitorder="little"))


def limits() -> dict[str, float]:
    """The FMA peak in GF/s and the read bandwidth in GB/s, with all of torch's threads."""
    module = _ops._module
    if module is None:
        return {"peak_gflops": float("nan"), "read_gb_per_s": float("nan")}
    module.peak_flops(0.05)
    return {
        "peak_gflops": max(module.peak_flops(0.1) for _ in range(5)) / 1e9,
        "read_gb_per_s": max(module.read_bandwidth(512 << 20) for _ in range(3)) / 1e9,
    }


def contenders(
    M: int, N: int, K: int, sparsity: float, dtype: torch.dtype, step: bool
) -> tuple[dict[str, Callable[[], object]], int, dict[str, str]]:
    torch.manual_seed(0)
    x = torch.randn(M, K, dtype=dtype, requires_grad=step)
    weight = torch.randn(N, K, dtype=dtype, requires_grad=step)
    bias = torch.randn(N, dtype=dtype, requires_grad=step)
    mask = (torch.rand(N, K) >= sparsity).to(dtype)
    bits = packed_bits(mask)
    values = weight.detach()[mask.bool()].requires_grad_(step)
    dy = torch.randn(M, N, dtype=dtype)

    def maybe_step(forward: Callable[[], Tensor], *leaves: Tensor) -> Callable[[], object]:
        if not step:
            return forward

        def run() -> None:
            for leaf in leaves:
                leaf.grad = None
            forward().backward(dy)

        return run

    calls = {
        "hook": maybe_step(lambda: F.linear(x, weight * mask, bias), x, weight, bias),
        "dense": maybe_step(lambda: F.linear(x, weight, bias), x, weight, bias),
        "live": maybe_step(lambda: masked_ops.masked_linear(x, weight, mask, bias), x, weight, bias),
        "packed": maybe_step(lambda: masked_ops.packed_linear(x, values, bits, K, bias), x, values, bias),
    }
    if not step and dtype == torch.float32:
        csr = (weight * mask).to_sparse_csr()
        calls["csr"] = lambda: (csr @ x.t()).t() + bias
    calls["live"](), calls["live"]()
    paths = {
        "live": _ops.explain_linear(weight, mask, M)[0],
        "packed": _ops.explain_packed_linear(values, bits, K, M)[0],
    }
    return calls, int(mask.count_nonzero()), paths


def bytes_read(kind: str, N: int, K: int, nnz: int, size: int) -> float:
    """What a forward pass at small M has to read: the weights as they are stored, and the bits."""
    if kind in ("hook", "dense"):
        return N * K * size
    return (nnz if kind == "packed" else N * K) * size + N * K / 8


def run(args: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    most = torch.get_num_threads()
    for threads in args.thread_counts or [most]:
        torch.set_num_threads(threads)
        bounds = limits()
        print(f"\n{threads} threads: FMA peak {bounds['peak_gflops']:.0f} GF/s, read {bounds['read_gb_per_s']:.0f} GB/s")
        for name in args.dtype:
            dtype = getattr(torch, name)
            for M, N, K in read_shapes(args.shapes):
                for step in (False, True) if args.passes == "both" else (args.passes == "step",):
                    lines = [["M N K", "pass", "sparsity", "layer", "path", "ms", "GF/s", "share", "x hook", "x dense", "x csr"]]
                    for sparsity in args.sparsity:
                        calls, nnz, paths = contenders(M, N, K, sparsity, dtype, step)
                        timings = interleaved(calls, seconds=args.seconds, label=f"{M} {N} {K} {sparsity:.0%}")
                        for kind, timing in timings.items():
                            flops = 2 * M * (nnz if kind not in ("hook", "dense") else N * K) * (3 if step else 1)
                            rate = flops / timing.minimum / 1e9
                            share = rate / bounds["peak_gflops"]
                            if M <= SMALL_M and not step:
                                size = torch.finfo(dtype).bits // 8
                                share = bytes_read(kind, N, K, nnz, size) / timing.minimum / 1e9 / bounds["read_gb_per_s"]
                            ratios = {
                                other: timings[other].minimum / timing.minimum
                                for other in ("hook", "dense", "csr")
                                if other in timings
                            }
                            rows.append(
                                {
                                    "M": M, "N": N, "K": K, "dtype": name, "threads": threads,
                                    "pass": "step" if step else "forward", "sparsity": sparsity, "layer": kind,
                                    "path": paths.get(kind, ""), "minimum_s": timing.minimum, "median_s": timing.median,
                                    "gflops": rate, "share": share, "nnz": nnz, **bounds,
                                    **{f"x_{other}": ratio for other, ratio in ratios.items()},
                                }
                            )  # fmt: skip
                            lines.append(
                                [f"{M} {N} {K}", "step" if step else "forward", f"{sparsity:.0%}", kind, paths.get(kind, ""),
                                 f"{timing.minimum * 1e3:.3f}", f"{rate:.0f}", f"{share:.0%}",
                                 *(f"{ratios[other]:.2f}" if other in ratios else "" for other in ("hook", "dense", "csr"))]
                            )  # fmt: skip
                    print(table(lines), flush=True)
    torch.set_num_threads(most)
    return rows


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--shapes", type=Path, default=HERE / "shapes" / "linear.txt")
    options.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.8, 0.9, 0.95, 0.99])
    options.add_argument("--dtype", nargs="+", default=["float32"], choices=["float32", "bfloat16", "float64"])
    options.add_argument("--passes", choices=["forward", "step", "both"], default="both")
    options.add_argument("--thread-counts", type=int, nargs="+", help="measure with each of these")
    args = options.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    started = time.perf_counter()
    facts = machine()
    print_machine(facts)
    rows = run(args)
    print(f"\n{time.perf_counter() - started:.0f} s")
    if args.json:
        write_json(args.json, "linear", facts, rows)


if __name__ == "__main__":
    main()
