"""Draw what a benchmark measured, and put its table into the README.

python bench/plot.py bench/results/linear.json            # writes linear.png and linear-roofline.png beside it
python bench/plot.py bench/results/convolution.json       # writes convolution.png beside it
python bench/plot.py bench/results/model.json             # writes model.png beside it
python bench/plot.py bench/results/model.json --readme    # and the table between the README's markers
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Row = dict[str, Any]
README = Path(__file__).resolve().parent.parent / "README.md"
COLORS = {"hook": "#888888", "dense": "#444444", "csr": "#c98a1b", "live": "#2a6fbb", "packed": "#b3312c"}
LABELS = {"live": "masked_linear", "packed": "packed_linear", "csr": "torch CSR", "dense": "dense", "hook": "hook"}


def shape(row: Row) -> tuple[int, int, int]:
    return row["M"], row["N"], row["K"]


def speedups(rows: list[Row], target: Path) -> None:
    """Times the hook, against sparsity: a column for each shape, forward above and step below."""
    shapes = sorted({shape(row) for row in rows})
    figure, axes = plt.subplots(2, len(shapes), figsize=(3.4 * len(shapes), 6), sharex=True, squeeze=False)
    for column, which in enumerate(shapes):
        for ax, step in zip(axes[:, column], (False, True), strict=True):
            here = [row for row in rows if shape(row) == which and row["step"] == step]
            for layer in ("packed", "live", "dense", "csr"):
                points = sorted((row["sparsity"], row["x_hook"]) for row in here if row["layer"] == layer)
                if points:
                    ax.plot(*zip(*points, strict=True), "o-", ms=3.5, color=COLORS[layer], label=LABELS[layer])
            ax.axhline(1, color=COLORS["hook"], lw=1)
            ax.set_yscale("log")
            ax.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g×"))
            ax.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
            ax.grid(True, which="both", alpha=0.2)
            ax.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, decimals=0))
        axes[0, column].set_title(f"M={which[0]}, {which[2]}→{which[1]}")
        axes[1, column].set_xlabel("sparsity")
    axes[0, 0].set_ylabel("forward, times the hook's speed")
    axes[1, 0].set_ylabel("step, times the hook's speed")
    axes[0, 0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(target, dpi=150)
    plt.close(figure)
    print(target)


def intensity(row: Row) -> float:
    """Operations for each byte that a float32 forward pass must move: input, output, weights as they are stored."""
    M, N, K = shape(row)
    weights = row["nnz"] if row["layer"] == "packed" else N * K
    bits = 0 if row["layer"] in ("hook", "dense") else N * K / 8
    useful = N * K if row["layer"] in ("hook", "dense") else row["nnz"]
    return 2 * M * useful / (4 * (weights + M * (N + K)) + bits)


def roofline(rows: list[Row], target: Path) -> None:
    """Operations on remaining weights a second, under the two bounds that were measured in the same run."""
    forward = [row for row in rows if not row["step"] and row["layer"] != "csr"]
    peak = max(row["peak_gflops"] for row in forward)
    read = max(row["read_gb_per_s"] for row in forward)
    figure, ax = plt.subplots(figsize=(7, 5))
    xs = [2**e for e in range(-4, 9)]
    ax.plot(xs, [min(peak, read * x) for x in xs], color="black", lw=1.2, label=f"{peak:.0f} GF/s, {read:.0f} GB/s")
    for layer in ("hook", "dense", "live", "packed"):
        points = [(intensity(row), row["gflops"]) for row in forward if row["layer"] == layer]
        ax.scatter(*zip(*points, strict=True), s=22, color=COLORS[layer], alpha=0.8, label=LABELS[layer])
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xlabel("operations per byte from memory (weights that stay in a cache may exceed the slope)")
    ax.set_ylabel("GF/s on the remaining weights")
    ax.grid(True, which="both", alpha=0.2)
    ax.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(target, dpi=150)
    plt.close(figure)
    print(target)


def milliseconds(row: Row | None) -> str:
    return "" if row is None else f"{row['minimum_s'] * 1e3:.3g}"


def markdown(rows: list[Row]) -> str:
    lines = [
        "| M, N, K | | sparsity | hook | dense | masked_linear | packed_linear | packed, × hook | × dense |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for which in sorted({shape(row) for row in rows}):
        for step in (False, True):
            for sparsity in sorted({row["sparsity"] for row in rows}):
                cell = {
                    row["layer"]: row
                    for row in rows
                    if shape(row) == which and row["step"] == step and row["sparsity"] == sparsity
                }
                if not cell:
                    continue
                times = [milliseconds(cell.get(layer)) for layer in ("hook", "dense", "live", "packed")]
                ratios = [f"{cell['packed'][key]:.1f}" for key in ("x_hook", "x_dense")]
                name = ", ".join(map(str, which))
                lines.append(
                    " | ".join(["| " + name, "step" if step else "forward", f"{sparsity:.0%}", *times, *ratios]) + " |"
                )
    return "\n".join(lines) + "\n"


def convolution_table(rows: list[Row]) -> str:
    """The better layout of each; and ours in each layout against the dense layer in the same one, for the worst."""
    sparsities = sorted({row["sparsity"] for row in rows})
    lines = [
        "| layer | | hook | dense | " + " | ".join(f"masked_conv2d {s:.0%}" for s in sparsities) + " |",
        "|---" * (4 + len(sparsities)) + "|",
    ]
    means: dict[tuple[bool, float], list[Row]] = {}
    for which in dict.fromkeys(tuple(row[k] for k in CONVOLUTION) for row in rows):
        for step in (False, True):
            here = [row for row in rows if tuple(row[k] for k in CONVOLUTION) == which and row["step"] == step]
            best: dict[tuple[str, float], Row] = {}
            for row in sorted(here, key=lambda row: -row["minimum_s"]):
                best[row["layer"].removesuffix("_last"), row["sparsity"]] = row
            times = [
                f"{min(row['minimum_s'] for (k, _), row in best.items() if k == kind) * 1e3:.3g}"
                for kind in ("hook", "dense")
            ]
            cells = [f"{milliseconds(best['live', s])} ({best['live', s]['x_hook']:.1f}×)" for s in sparsities]
            C, O, kernel, size, _, _ = which  # noqa: E741
            name = f"{C}→{O}, {kernel}×{kernel} at {size}"
            lines.append(" | ".join([f"| {name}", "step" if step else "forward", *times, *cells]) + " |")
            for s in sparsities:
                means.setdefault((step, s), []).append(best["live", s])
    for title, pick in (("3×3, × hook", 3), ("1×1, × hook", 1)):
        for step in (False, True):
            of = [
                statistics.geometric_mean([row["x_hook"] for row in means[step, s] if row["kernel"] == pick])
                for s in sparsities
            ]
            passes = "step" if step else "forward"
            lines.append(f"| {title}, mean | {passes} | 1 | | " + " | ".join(f"{x:.1f}×" for x in of) + " |")
    worst = [
        min(row["x_dense_same"] for row in rows if row["sparsity"] == s and row["layer"].startswith("live"))
        for s in sparsities
    ]
    lines.append("| worst, × dense in the same layout | | | 1 | " + " | ".join(f"{x:.2f}×" for x in worst) + " |")
    return "\n".join(lines) + "\n"


def model_table(rows: list[Row]) -> str:
    """Milliseconds of the better layout of each."""
    lines = ["| | hook | dense | masked_ops | × hook |", "|---|---|---|---|---|"]
    for model, step in dict.fromkeys((row["model"], row["step"]) for row in rows):
        best = {
            kind: min(
                row["minimum_s"] * 1e3
                for row in rows
                if (row["model"], row["step"]) == (model, step) and row["layer"].removesuffix("_last") == kind
            )
            for kind in ("hook", "dense", "live")
        }
        name = f"{MODELS[model]}, {'training step' if step else 'inference'}"
        ratio = best["hook"] / best["live"]
        lines.append(f"| {name} | " + " | ".join(f"{ms:.3g}" for ms in best.values()) + f" | {ratio:.1f} |")
    return "\n".join(lines) + "\n"


MODELS = {"resnet18": "ResNet-18, 224²", "encoder": "6-layer encoder"}


def convolutions(rows: list[Row], target: Path) -> None:
    """Times the better hook, against sparsity: a column for each layer, forward above and step below."""
    layers = list(dict.fromkeys(tuple(row[k] for k in CONVOLUTION) for row in rows))
    figure, axes = plt.subplots(2, len(layers), figsize=(3.4 * len(layers), 6), sharex=True, squeeze=False)
    lines = {"live": "-", "live_last": "--", "dense": "-", "dense_last": "--"}
    for column, which in enumerate(layers):
        for ax, step in zip(axes[:, column], (False, True), strict=True):
            for layer, style in lines.items():
                points = sorted(
                    (row["sparsity"], row["x_hook"])
                    for row in rows
                    if tuple(row[k] for k in CONVOLUTION) == which and row["step"] == step and row["layer"] == layer
                )
                color = COLORS[layer.removesuffix("_last")]
                label = layer.replace("live", "masked_conv2d").replace("_last", ", channels last")
                if points:
                    ax.plot(*zip(*points, strict=True), style, marker="o", ms=3.5, color=color, label=label)
            ax.axhline(1, color=COLORS["hook"], lw=1)
            ax.grid(True, alpha=0.2)
            ax.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, decimals=0))
        C, O, kernel, size, stride, groups = which  # noqa: E741
        axes[0, column].set_title(
            f"{C}→{O}, {kernel}x{kernel} at {size}"
            + f", stride {stride}" * (stride > 1)
            + f", groups {groups}" * (groups > 1)
        )
        axes[1, column].set_xlabel("sparsity")
    axes[0, 0].set_ylabel("forward, times the hook's speed")
    axes[1, 0].set_ylabel("step, times the hook's speed")
    axes[0, 0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(target, dpi=150)
    plt.close(figure)
    print(target)


CONVOLUTION = ("C", "O", "kernel", "size", "stride", "groups")


def models(rows: list[Row], target: Path) -> None:
    """Milliseconds of each model and pass, the better layout of each kind of layers."""
    cells = list(dict.fromkeys((row["model"], row["batch"], row["sparsity"]) for row in rows))
    figure, axes = plt.subplots(1, 2 * len(cells), figsize=(3.2 * 2 * len(cells), 3.4), squeeze=False)
    for n, cell in enumerate(cells):
        for ax, step in zip(axes[0, 2 * n : 2 * n + 2], (False, True), strict=True):
            best: dict[str, float] = {}
            for row in rows:
                if (row["model"], row["batch"], row["sparsity"]) == cell and row["step"] == step:
                    kind = row["layer"].removesuffix("_last")
                    best[kind] = min(best.get(kind, float("inf")), row["minimum_s"] * 1e3)
            ax.bar(list(best), list(best.values()), color=[COLORS[kind] for kind in best])
            for i, value in enumerate(best.values()):
                ax.annotate(f"{value:.3g}", (i, value), ha="center", va="bottom", fontsize=8)
            ax.set_title(f"{cell[0]}, batch {cell[1]}, {cell[2]:.0%}: {'step' if step else 'inference'}", fontsize=9)
    axes[0, 0].set_ylabel("ms")
    figure.tight_layout()
    figure.savefig(target, dpi=150)
    plt.close(figure)
    print(target)


def write_readme(benchmark: str, table: str) -> None:
    begin, end = (f"<!-- bench/{benchmark}.py: {which} -->\n" for which in ("begin", "end"))
    text, count = re.subn(f"{begin}.*?{end}", lambda _: begin + table + end, README.read_text(), flags=re.S)
    if count != 1:
        raise SystemExit(f"{README} must hold the markers {begin.strip()} and {end.strip()} once")
    README.write_text(text)
    print(README)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--readme", action="store_true")
    args = parser.parse_args()
    content = json.loads(args.results.read_text())
    benchmark, rows = content["benchmark"], content["results"]
    picture = args.results.with_suffix(".png")
    if benchmark == "linear":
        rows = [row for row in rows if row["dtype"] == "float32"]
        most = max(row["threads"] for row in rows)
        rows = [row for row in rows if row["threads"] == most]
        roofline(rows, args.results.with_name(args.results.stem + "-roofline.png"))
    draw, table = {
        "linear": (speedups, markdown),
        "convolution": (convolutions, convolution_table),
        "model": (models, model_table),
    }[benchmark]
    draw(rows, picture)
    if args.readme:
        write_readme(benchmark, table(rows))


if __name__ == "__main__":
    main()
