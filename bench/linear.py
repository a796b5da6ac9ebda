"""Masked and packed linear layers against torch: forward passes and training steps over shapes and sparsities.

    python bench/linear.py                                  # bench/shapes/linear.txt, 50 to 99% sparsity, float32
    python bench/linear.py --shapes my.txt --sparsity 0.9 --dtype bfloat16 --threads 1
    python bench/linear.py --device cuda --dtype bfloat16

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

import argparse
import itertools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _harness import compare, device_ceilings, main_with, parser, peak_gflops, table
from torch import Tensor
from torch.nn import functional as F

import masked_ops
from masked_ops import _ops

HERE = Path(__file__).resolve().parent
SMALL_M = 8
DENSE = ("hook", "dense")


def read_shapes(path: Path) -> Iterator[tuple[int, int, int]]:
    for line in path.read_text().splitlines():
        fields = line.partition("#")[0].split()
        if fields:
            M, N, K = map(int, fields)
            yield M, N, K


def packed_bits(mask: Tensor) -> Tensor:
    bits = torch.from_numpy(np.packbits(mask.bool().cpu().numpy(), axis=1, bitorder="little"))
    return bits.to(mask.device)


def limits(device: str, dtype: str) -> dict[str, float]:
    """The peak of the dtype's multiply-adds in GF/s and the read bandwidth in GB/s, with all of torch's threads.

    Of a CUDA device the rate of a large GEMM of this dtype, and the bandwidth of a copy within the device.
    """
    if device != "cpu":
        measured = device_ceilings(getattr(torch, dtype))
        return {"peak_gflops": measured["peak_tflops"] * 1e3, "read_gb_per_s": measured["copy_gb_per_s"]}
    module = _ops._module
    bandwidth = max(module.read_bandwidth(512 << 20) for _ in range(3)) / 1e9 if module else float("nan")
    return {"peak_gflops": peak_gflops(device, dtype), "read_gb_per_s": bandwidth}


@dataclass(frozen=True)
class Case:
    M: int
    N: int
    K: int
    sparsity: float
    dtype: str
    step: bool
    device: str = "cpu"

    def contenders(self) -> tuple[dict[str, Callable[[], object]], int, dict[str, str]]:
        """The calls by name, the number of remaining weights, and the paths that ours take."""
        torch.manual_seed(0)
        M, N, K, dtype = self.M, self.N, self.K, getattr(torch, self.dtype)
        x = torch.randn(M, K, dtype=dtype, requires_grad=self.step)
        weight = torch.randn(N, K, dtype=dtype, requires_grad=self.step)
        bias = torch.randn(N, dtype=dtype, requires_grad=self.step)
        mask = (torch.rand(N, K) >= self.sparsity).to(dtype)
        bits = packed_bits(mask)
        values = weight.detach()[mask.bool()].requires_grad_(self.step)
        dy = torch.randn(M, N, dtype=dtype)

        def call(forward: Callable[[], Tensor], weight_like: Tensor) -> Callable[[], object]:
            if not self.step:
                return forward

            def run() -> None:
                x.grad = bias.grad = weight_like.grad = None
                forward().backward(dy)

            return run

        calls = {
            "hook": call(lambda: F.linear(x, weight * mask, bias), weight),
            "dense": call(lambda: F.linear(x, weight, bias), weight),
            "live": call(lambda: masked_ops.masked_linear(x, weight, mask, bias), weight),
            "packed": call(lambda: masked_ops.packed_linear(x, values, bits, K, bias), values),
        }
        if not self.step and dtype == torch.float32:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that sparse CSR is in beta
                csr = (weight * mask).to_sparse_csr()
            calls["csr"] = lambda: (csr @ x.t()).t() + bias
        paths = {
            "live": _ops.explain_linear(weight, mask, M)[0],
            "packed": _ops.explain_packed_linear(values, bits, K, M)[0],
        }
        return calls, int(mask.count_nonzero()), paths

    def share(self, kind: str, nnz: int, seconds: float, bounds: dict[str, float]) -> float:
        """Of the FMA peak or, where the weights are read for a few rows only, of the memory's bandwidth."""
        weights = self.N * self.K if kind in DENSE else nnz
        if self.M > SMALL_M or self.step:
            return 2 * self.M * weights * (3 if self.step else 1) / seconds / 1e9 / bounds["peak_gflops"]
        size = torch.finfo(getattr(torch, self.dtype)).bits // 8
        stored = nnz if kind in ("packed", "csr") else self.N * self.K
        bits = 0 if kind in DENSE else self.N * self.K / 8
        return (stored * size + bits) / seconds / 1e9 / bounds["read_gb_per_s"]

    def measure(self, seconds: float, bounds: dict[str, float]) -> list[dict[str, Any]]:
        calls, nnz, paths = self.contenders()
        label = f"{self.M} {self.N} {self.K} {self.sparsity:.0%}"
        timings = compare(calls, seconds, label, self.device)
        rows = []
        for kind, timing in timings.items():
            weights = self.N * self.K if kind in DENSE else nnz
            row = {**asdict(self), "layer": kind, "path": paths.get(kind, ""), "nnz": nnz}
            row |= {"minimum_s": timing.minimum, "median_s": timing.median}
            row["gflops"] = 2 * self.M * weights * (3 if self.step else 1) / timing.minimum / 1e9
            row["share"] = self.share(kind, nnz, timing.minimum, bounds)
            for other in ("hook", "dense", "csr"):
                if other in timings:
                    row[f"x_{other}"] = timings[other].minimum / timing.minimum
            rows.append(row)
        return rows


HEADER = ("M N K", "pass", "sparsity", "layer", "path", "ms", "median", "GF/s", "share", "x hook", "x dense", "x csr")


def line(row: dict[str, Any]) -> list[str]:
    return [
        f"{row['M']} {row['N']} {row['K']}",
        "step" if row["step"] else "forward",
        f"{row['sparsity']:.0%}",
        row["layer"],
        row["path"],
        f"{row['minimum_s'] * 1e3:.3f}",
        f"{row['median_s'] * 1e3:.3f}",
        f"{row['gflops']:.0f}",
        f"{row['share']:.0%}",
        *(f"{row[key]:.2f}" if key in row else "" for key in ("x_hook", "x_dense", "x_csr")),
    ]


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = []
    most = torch.get_num_threads()
    steps = {"forward": (False,), "step": (True,), "both": (False, True)}[args.passes]
    shapes = list(read_shapes(args.shapes))
    for threads in args.thread_counts or [most]:
        torch.set_num_threads(threads)
        bounds_of = {dtype: limits(args.device, dtype) for dtype in args.dtype}
        for dtype, bounds in bounds_of.items():
            peaks = f"peak {bounds['peak_gflops']:.0f} GF/s, read {bounds['read_gb_per_s']:.0f} GB/s"
            print(f"\n{args.device if args.device != 'cpu' else f'{threads} threads'}, {dtype}: {peaks}")
        for dtype, (M, N, K), step in itertools.product(args.dtype, shapes, steps):
            rows, bounds = [], bounds_of[dtype]
            for sparsity in args.sparsity:
                rows += Case(M, N, K, sparsity, dtype, step, args.device).measure(args.seconds, bounds)
            results += [{**row, "threads": threads, **bounds} for row in rows]
            print(table([HEADER, *map(line, rows)]), flush=True)
    torch.set_num_threads(most)
    return results


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--shapes", type=Path, default=HERE / "shapes" / "linear.txt")
    options.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.8, 0.9, 0.95, 0.99])
    options.add_argument(
        "--dtype", nargs="+", default=["float32"], choices=["float32", "bfloat16", "float16", "float64"]
    )
    options.add_argument("--passes", choices=["forward", "step", "both"], default="both")
    options.add_argument("--thread-counts", type=int, nargs="+", help="measure with each of these")
    main_with("linear", run, options.parse_args())


if __name__ == "__main__":
    main()
