"""Masked 2d convolutions against torch: forward passes and training steps over layers and sparsities.

    python bench/convolution.py                       # bench/shapes/convolution.txt, 50 to 95% sparsity, batch 8
    python bench/convolution.py --shapes my.txt --sparsity 0.9 --batch 1 --threads 1
    python bench/convolution.py --device cuda --dtype bfloat16 --batch 64

Each line of a shapes file is ``C O kernel size stride groups``. The contenders of a line run interleaved
in this process:

    hook        conv2d(x, weight * mask), as torch.nn.utils.prune has it
    hook_last   the same on channels_last tensors
    dense       conv2d(x, weight), the layer before it was pruned
    dense_last  the same on channels_last tensors
    live        masked_conv2d on the dense weight_orig and its mask
    live_last   the same on channels_last tensors

A step is forward and all gradients, with ``.grad`` set to None before it. GF/s count the remaining weights alone; the
share is that of the machine's FMA peak, measured in the same run. ``x hook`` and ``x dense`` are against the better
layout of the two, ``x same`` is against dense torch in the same layout.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from _harness import compare, main_with, parser, peak_gflops, table
from torch import Tensor
from torch.nn import functional as F

import masked_ops
from masked_ops import _ops

HERE = Path(__file__).resolve().parent

Shape = tuple[int, int, int, int, int, int]


def read_shapes(path: Path) -> Iterator[Shape]:
    for line in path.read_text().splitlines():
        fields = line.partition("#")[0].split()
        if fields:
            C, O, kernel, size, stride, groups = map(int, fields)  # noqa: E741
            yield C, O, kernel, size, stride, groups


@dataclass(frozen=True)
class Case:
    C: int
    O: int  # noqa: E741
    kernel: int
    size: int
    stride: int
    groups: int
    batch: int
    sparsity: float
    step: bool
    dtype: str = "float32"
    device: str = "cpu"

    def contenders(self) -> tuple[dict[str, Callable[[], object]], int, dict[str, str]]:
        """The calls by name, the number of multiplications with a remaining weight, and the paths that ours take."""
        torch.manual_seed(0)
        shape = (self.O, self.C // self.groups, self.kernel, self.kernel)
        dtype = getattr(torch, self.dtype)
        x = torch.randn(self.batch, self.C, self.size, self.size, dtype=dtype)
        weight = torch.randn(shape, dtype=dtype)
        mask = (torch.rand(shape) >= self.sparsity).to(dtype)
        options: dict[str, Any] = {"stride": self.stride, "padding": self.kernel // 2, "groups": self.groups}
        dy = torch.randn_like(F.conv2d(x, weight, **options))
        calls: dict[str, Callable[[], object]] = {}
        paths = {}
        for suffix, memory_format in (("", torch.contiguous_format), ("_last", torch.channels_last)):
            xs, ws, masks, dys = (t.contiguous(memory_format=memory_format) for t in (x, weight, mask, dy))
            if self.step:
                xs, ws = xs.clone().requires_grad_(), ws.clone().requires_grad_()

            def call(
                forward: Callable[[], Tensor], xs: Tensor = xs, ws: Tensor = ws, dys: Tensor = dys
            ) -> Callable[[], object]:
                if not self.step:
                    return forward

                def run() -> None:
                    xs.grad = ws.grad = None
                    forward().backward(dys)

                return run

            calls[f"hook{suffix}"] = call(lambda x=xs, w=ws, m=masks: F.conv2d(x, w * m, **options))
            calls[f"dense{suffix}"] = call(lambda x=xs, w=ws: F.conv2d(x, w, **options))
            calls[f"live{suffix}"] = call(lambda x=xs, w=ws, m=masks: masked_ops.masked_conv2d(x, w, m, **options))
            geometry = ([self.stride] * 2, [self.kernel // 2] * 2, [1, 1], False, [0, 0], self.groups)
            paths[f"live{suffix}"] = _ops.explain_convolution(ws, masks, x.shape, suffix != "", *geometry)[0]
        positions = dy.numel() // self.O
        return calls, positions * int(mask.count_nonzero()), paths

    def measure(self, seconds: float, peak: float) -> list[dict[str, Any]]:
        calls, macs, paths = self.contenders()
        timings = compare(calls, seconds, f"{self.name} {self.sparsity:.0%}", self.device)
        best = {kind: min(timings[kind].minimum, timings[f"{kind}_last"].minimum) for kind in ("hook", "dense")}
        rows = []
        for layer, timing in timings.items():
            flops = 2 * macs * (3 if self.step else 1)
            row = {**asdict(self), "layer": layer, "path": paths.get(layer, "")}
            row |= {"minimum_s": timing.minimum, "median_s": timing.median}
            row["gflops"] = flops / timing.minimum / 1e9
            row["share"] = row["gflops"] / peak
            row |= {f"x_{kind}": best[kind] / timing.minimum for kind in best}
            row["x_hook_same"] = timings["hook_last" if layer.endswith("_last") else "hook"].minimum / timing.minimum
            row["x_dense_same"] = timings["dense_last" if layer.endswith("_last") else "dense"].minimum / timing.minimum
            rows.append(row)
        return rows

    @property
    def name(self) -> str:
        stride = f" stride {self.stride}" if self.stride > 1 else ""
        groups = f" groups {self.groups}" if self.groups > 1 else ""
        return f"{self.C}-{self.O} {self.kernel}x{self.kernel} @{self.size}{stride}{groups}"


HEADER = ("layer", "batch", "pass", "sparsity", "call", "path", "ms", "median", "GF/s", "share")
HEADER += ("x hook", "x dense", "x same")


def line(row: dict[str, Any]) -> list[str]:
    fields = Case.__dataclass_fields__
    return [
        Case(**{name: row[name] for name in fields}).name,
        str(row["batch"]),
        "step" if row["step"] else "forward",
        f"{row['sparsity']:.0%}",
        row["layer"],
        row["path"],
        f"{row['minimum_s'] * 1e3:.3f}",
        f"{row['median_s'] * 1e3:.3f}",
        f"{row['gflops']:.0f}",
        f"{row['share']:.0%}",
        f"{row['x_hook']:.2f}",
        f"{row['x_dense']:.2f}",
        f"{row['x_dense_same']:.2f}",
    ]


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """The geometric mean over the 3x3 layers of stride 1, of the better of our layouts against theirs."""
    lines = []
    cells: dict[tuple[bool, float, int], dict[str, dict[str, float]]] = {}
    for row in rows:
        if row["kernel"] == 3 and row["stride"] == 1 and row["groups"] == 1 and row["layer"].startswith("live"):
            key = row["step"], row["sparsity"], row["batch"]
            layer = cells.setdefault(key, {}).setdefault(f"{row['C']} {row['O']} {row['size']}", {})
            for kind in ("x_hook", "x_dense"):
                layer[kind] = max(layer.get(kind, 0.0), row[kind])
    for (step, sparsity, batch), layers in sorted(cells.items()):
        means = {
            kind: math.exp(sum(math.log(layer[kind]) for layer in layers.values()) / len(layers))
            for kind in ("x_hook", "x_dense")
        }
        lines.append(
            f"3x3 {'step' if step else 'forward'} at {sparsity:.0%}, batch {batch}: geometric mean of {len(layers)} "
            f"layers, better layouts: {means['x_hook']:.2f} x hook, {means['x_dense']:.2f} x dense"
        )
    return lines


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = []
    threads = torch.get_num_threads()
    peak = peak_gflops(args.device, args.dtype)
    print(f"\n{args.device if args.device != 'cpu' else f'{threads} threads'}, {args.dtype}: peak {peak:.0f} GF/s")
    steps = {"forward": (False,), "step": (True,), "both": (False, True)}[args.passes]
    for batch, shape, step in itertools.product(args.batch, read_shapes(args.shapes), steps):
        rows = []
        for sparsity in args.sparsity:
            rows += Case(*shape, batch, sparsity, step, args.dtype, args.device).measure(args.seconds, peak)
        results += [{**row, "threads": threads, "peak_gflops": peak} for row in rows]
        print(table([HEADER, *map(line, rows)]), flush=True)
    print("\n".join(summary(results)))
    return results


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--shapes", type=Path, default=HERE / "shapes" / "convolution.txt")
    options.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.8, 0.9, 0.95])
    options.add_argument("--batch", type=int, nargs="+", default=[8])
    options.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16", "float64"])
    options.add_argument("--passes", choices=["forward", "step", "both"], default="both")
    main_with("convolution", run, options.parse_args())


if __name__ == "__main__":
    main()
