"""Prune a network that reads digits to 90%, by torch.nn.utils.prune and by masked_ops.prune, and compare the two.

    python examples/prune_digits.py [--quick] [--seed N] [--out FILE]

The data are the 1,797 scans of handwritten digits that come with scikit-learn. A small network is trained once; from
there on three copies go on side by side, batch by batch: one stays dense, one is pruned by torch's hooks, one by
masked_ops. Each round prunes the smallest of the weights left, over all layers (global L1), and trains on for a few
epochs. The copies take their steps in turns within one process, each as often first as last, and every step is timed.
At the end a fourth one joins them for a last round: the copy of masked_ops, packed.
"""

from __future__ import annotations

import argparse
import copy
import io
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # a picture in a file: no display is needed

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune as torch_prune
from tqdm import tqdm

import masked_ops
from masked_ops import prune

BATCH = 128


# --- data and network ------------------------------------------------------------------------------------------------


@dataclass
class Digits:
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch, shuffled; without the last, smaller batch, so that all steps take equally long."""
        for chosen in torch.randperm(len(self.train_images)).split(BATCH):
            if len(chosen) == BATCH:
                yield self.train_images[chosen], self.train_labels[chosen]


def load_data() -> Digits:
    """8x8 scans with values in [0, 1], every fifth of them for the test."""
    bunch: Any = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(bunch.target)
    test = torch.arange(len(images)) % 5 == 0
    return Digits(images[~test], labels[~test], images[test], labels[test])


def network(hidden: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, 10),
    )


# --- the three copies ------------------------------------------------------------------------------------------------


class Variant:
    """One copy of the network, and what was measured of it in each round."""

    def __init__(self, name: str, model: nn.Sequential, prune: Any = None) -> None:
        self.name = name
        self.model = model
        self.prune = prune  # torch.nn.utils.prune, masked_ops.prune, or None for the dense copy
        # Pruning keeps the Parameter objects: one optimizer serves through all rounds, momentum included.
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        self.accuracy: list[float] = []
        self.step_seconds: list[tuple[float, float, float]] = []  # quartiles

    @property
    def step_median(self) -> float:
        return self.step_seconds[-1][1]

    def prune_to(self, sparsity: float) -> None:
        """Prune the smallest weights left, over all layers, until ``sparsity`` of them are gone."""
        if self.prune is None:
            return
        layers = [(module, "weight") for module in self.model if hasattr(module, "weight")]
        weights = sum(module.weight.numel() for module, _ in layers)
        pruned = sum(int((module.weight_mask == 0).sum()) for module, _ in layers if self.prune.is_pruned(module))
        amount = round(sparsity * weights) - pruned
        self.prune.global_unstructured(layers, pruning_method=self.prune.L1Unstructured, amount=amount)

    def step(self, images: Tensor, labels: Tensor) -> None:
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(images), labels).backward()
        self.optimizer.step()

    @torch.no_grad()
    def outputs(self, images: Tensor) -> Tensor:
        return self.model(images)


def train(variants: list[Variant], data: Digits, epochs: int, label: str) -> None:
    """Train all on the same batches, each step timed, and test them."""
    seconds: dict[Variant, list[float]] = {variant: [] for variant in variants}
    order = list(variants)
    steps = epochs * (len(data.train_images) // BATCH)
    with tqdm(total=steps, desc=label, unit="batch", leave=False, disable=None) as bar:
        for _ in range(epochs):
            for images, labels in data.batches():
                for variant in order:
                    start = time.perf_counter()
                    variant.step(images, labels)
                    seconds[variant].append(time.perf_counter() - start)
                order.append(order.pop(0))
                bar.update()
    for variant in variants:
        low, median, high = statistics.quantiles(seconds[variant], n=4)
        variant.step_seconds.append((low, median, high))
        guesses = variant.outputs(data.test_images).argmax(1)
        variant.accuracy.append(float((guesses == data.test_labels).float().mean()))
    results = ", ".join(f"{v.name} {v.accuracy[-1]:.1%} and {1000 * v.step_median:.1f} ms" for v in variants)
    print(f"{label:>12}: {results}", flush=True)


# --- what is measured at the end -------------------------------------------------------------------------------------


def inference_seconds(variants: list[Variant], images: Tensor, calls: int) -> list[float]:
    """The median time of a call for each variant, in turns."""
    seconds: list[list[float]] = [[] for _ in variants]
    warm_up = 5
    with torch.inference_mode():
        for call in range(warm_up + calls):
            for variant, times in zip(variants, seconds, strict=True):
                start = time.perf_counter()
                variant.model(images)
                if call >= warm_up:
                    times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in seconds]


def bytes_saved_for_backward(model: nn.Module, images: Tensor) -> int:
    """What the graph of one forward keeps alive beside parameters, buffers and the input."""
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), images)}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        graph = model(images)  # alive until the end: no address is used twice
    assert graph.requires_grad
    return sum(saved.values())


def file_bytes(content: object) -> int:
    file = io.BytesIO()
    torch.save(content, file)
    return file.tell()


def print_table(variants: list[Variant], data: Digits, calls: int) -> None:
    one = inference_seconds(variants, data.test_images[:1], calls)
    all_ = inference_seconds(variants, data.test_images, calls)
    scans = f"{len(data.test_images)} scans"
    columns = {
        "": [variant.name for variant in variants],
        "accuracy": [f"{variant.accuracy[-1]:.1%}" for variant in variants],
        "training step": [f"{variant.step_median:.5f} s" for variant in variants],
        "inference, 1 scan": [f"{seconds:.6f} s" for seconds in one],
        f"inference, {scans}": [f"{seconds:.6f} s" for seconds in all_],
        "saved for backward": [
            f"{bytes_saved_for_backward(variant.model, data.train_images[:BATCH]) / 1e6:.2f} MB" for variant in variants
        ],
        "state_dict file": [f"{file_bytes(variant.model.state_dict()) / 1e6:.2f} MB" for variant in variants],
        "whole-model file": [f"{file_bytes(variant.model) / 1e6:.2f} MB" for variant in variants],
    }
    cells = [[title, *values] for title, values in columns.items()]
    widths = [max(map(len, column)) for column in cells]
    for row in zip(*cells, strict=True):
        name, *values = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join([name.strip().ljust(widths[0]), *values]))

    for index in range(2, len(variants)):
        ours, hook = variants[index], variants[1]
        print(
            f"{ours.name} takes {ours.step_median / hook.step_median:.2f} of the hook's time for a training step, "
            f"{one[index] / one[1]:.2f} for the inference of 1 scan, {all_[index] / all_[1]:.2f} for {scans}."
        )


def show_remove(variant: Variant, images: Tensor) -> None:
    """Make pruning permanent, and compare outputs before and after."""
    masked = variant.outputs(images)
    prune.remove(variant.model)
    dense = variant.outputs(images)
    torch.testing.assert_close(dense, masked, rtol=1e-4, atol=1e-4)
    kinds = ", ".join(dict.fromkeys(type(module).__name__ for module in variant.model if hasattr(module, "weight")))
    zeros = sum(int((p == 0).sum()) for p in variant.model.parameters())
    print(
        f"After remove() the layers are of class {kinds} again and hold {zeros:,} zeros; the outputs for "
        f"{len(images)} scans are the same: the largest difference is {float((dense - masked).abs().max()):.1e}, and "
        f"{int((dense.argmax(1) == masked.argmax(1)).sum())} answers of {len(images)} agree. "
        f"The state_dict file has {file_bytes(variant.model.state_dict()) / 1e6:.2f} MB."
    )


# --- the picture -----------------------------------------------------------------------------------------------------


def draw(variants: list[Variant], sparsities: list[float], out: Path) -> None:
    """Accuracy and step time against sparsity; below them the masks of the first layer, and of the first linear one."""
    figure = plt.figure(figsize=(11, 8.5), layout="constrained")
    figure.suptitle(
        f"Pruning a classifier of digits in rounds (masked_ops {masked_ops.__version__}, torch {torch.__version__}, "
        f"threads: {torch.get_num_threads()})"
    )
    above, below = figure.subfigures(2, 1, height_ratios=[1, 1], hspace=0.05)
    accuracy, steps = above.subplots(1, 2)
    draw_curves(variants, sparsities, accuracy, steps)
    above.legend(*accuracy.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)

    left, middle, right = below.subplots(1, 3)
    for variant, axes in zip(variants[1:], (left, middle), strict=True):
        layer = variant.model[0]
        pruned = int((layer.weight_mask == 0).sum())
        image = draw_filters(axes, layer.weight.detach()[:, 0], layer.weight_mask[:, 0])
        axes.set_title(f"First layer, {variant.name}\n{pruned} of {layer.weight.numel()} weights pruned (×)")
    below.colorbar(image, ax=(left, middle), shrink=0.7, aspect=30, location="bottom", label="weight")

    mask = variants[2].model[6].weight_mask
    share = float((mask == 0).float().mean())
    right.imshow(mask[:128, :128].numpy(), cmap="Greys", vmin=0, vmax=1, interpolation="nearest")
    right.set_title(f"First linear layer, masked_ops\n{share:.0%} pruned (white); a part")
    right.set(xlabel="input", ylabel="output")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
    plt.close(figure)


def draw_curves(variants: list[Variant], sparsities: list[float], accuracy: Any, steps: Any) -> None:
    percent = [100 * sparsity for sparsity in sparsities]
    styles: dict[str, dict[str, Any]] = {
        "dense": {"color": "#767676", "linestyle": "--", "label": "dense (never pruned)", "zorder": 3},
        "hook": {"color": "#d1495b", "linewidth": 5, "alpha": 0.6, "label": "hook (torch.nn.utils.prune)"},
        "masked_ops": {"color": "#00657a", "linewidth": 1.8, "marker": "o", "markersize": 5, "label": "masked_ops"},
    }
    for variant in variants:
        style = styles[variant.name]
        low, median, high = ([1000 * quartile for quartile in q] for q in zip(*variant.step_seconds, strict=True))
        accuracy.plot(percent, [100 * a for a in variant.accuracy], **style)
        steps.plot(percent, median, **style)
        steps.fill_between(percent, low, high, color=style["color"], alpha=0.15, linewidth=0)
    worst = min(100 * a for variant in variants for a in variant.accuracy)
    accuracy.set(title="Accuracy on the test scans", ylabel="%", ylim=(min(worst - 1, 95), 100.2))
    steps.set(title=f"Training step, batch of {BATCH}: median and quartiles", ylabel="ms", ylim=0)
    for axes in (accuracy, steps):
        axes.set_xlabel("weights pruned, %")
        axes.grid(alpha=0.3)


def draw_filters(axes: Any, weights: Tensor, masks: Tensor) -> Any:
    """Filters of one input channel in rows of four, a cross on each pruned weight; returns the image."""
    filters, height, width = weights.shape
    columns = 4
    rows = -(-filters // columns)
    canvas = torch.full((rows * (height + 1) - 1, columns * (width + 1) - 1), float("nan"))
    crosses = []
    for index in range(filters):
        top, left = index // columns * (height + 1), index % columns * (width + 1)
        canvas[top : top + height, left : left + width] = weights[index]
        crosses += [(left + x, top + y) for y, x in (masks[index] == 0).nonzero().tolist()]
    limit = float(weights.abs().max())
    image = axes.imshow(canvas.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit)
    if crosses:
        axes.scatter(*zip(*crosses, strict=True), marker="x", color="black", s=40, linewidths=1.3)
    axes.set_axis_off()
    return image


# --- the job ---------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a smaller network and a few steps: does it run at all?")
    parser.add_argument("--seed", type=int, default=0, help="of the first weights and the batches (default: 0)")
    parser.add_argument(
        "--out", type=Path, default=Path("out/prune_digits.png"), help="the picture (default: %(default)s)"
    )
    arguments = parser.parse_args()
    hidden, first_epochs, epochs, calls = (128, 10, 2, 5) if arguments.quick else (1024, 20, 5, 200)
    sparsities = [0.0, 0.5, 0.9] if arguments.quick else [0.0, 0.3, 0.5, 0.7, 0.8, 0.9]

    start = time.perf_counter()
    torch.manual_seed(arguments.seed)
    kernels = "compiled kernels" if masked_ops.is_available() else "no compiled kernels, plain torch instead"
    print(f"masked_ops {masked_ops.__version__} ({kernels}), torch {torch.__version__}, ", end="")
    print(f"threads: {torch.get_num_threads()}, seed: {arguments.seed}")
    data = load_data()
    dense = Variant("dense", network(hidden))
    train([dense], data, first_epochs, "first")
    variants = [
        Variant("dense", copy.deepcopy(dense.model)),
        Variant("hook", copy.deepcopy(dense.model), torch_prune),
        Variant("masked_ops", copy.deepcopy(dense.model), prune),
    ]
    for sparsity in sparsities:
        for variant in variants:
            variant.prune_to(sparsity)
        train(variants, data, epochs, f"{sparsity:.0%} pruned")

    draw(variants, sparsities, arguments.out)

    ours = variants[2]
    packed = Variant("packed", masked_ops.pack(copy.deepcopy(ours.model)))
    train([*variants, packed], data, epochs, "last")
    print(f"\nAt {sparsities[-1]:.0%}:")
    print_table([*variants, packed], data, calls)
    print(f"\n{masked_ops.report(ours.model, batch=data.train_images[:BATCH])}\n")
    show_remove(ours, data.test_images)
    print(f"Picture: {arguments.out}. All of this took {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    main()
