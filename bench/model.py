"""Whole networks, pruned at random, against torch's hook: inference and training steps.

    python bench/model.py                                  # both models at 90%
    python bench/model.py --models resnet18 --sparsity 0.9 0.95 --batch 8
    python bench/model.py --device cuda --amp --batch 64

ResNet-18 (224 x 224) and a transformer encoder of the size of MiniLM (6 layers of 384 features, 12 heads, 1536 within,
128 tokens) are defined here, with random weights. All convolutions and linear layers are pruned, each to the given
sparsity at random. Contenders, each of them in channels_last as well (``_last``) if the model has convolutions:

    hook     pruned by torch.nn.utils.prune
    dense    not pruned
    live     pruned by masked_ops.prune

A step is forward and backward of a loss, with ``.grad`` set to None before it; without an optimizer. With ``--amp``,
forward is under autocast to bfloat16.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Callable
from typing import Any

import torch
from _harness import compare, main_with, parser, table
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from masked_ops import prune


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, as in He et al. 2015, https://arxiv.org/abs/1512.03385."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(into, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.shortcut = nn.Sequential()
        if stride > 1 or into != out:
            self.shortcut = nn.Sequential(nn.Conv2d(into, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def resnet18() -> nn.Module:
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    blocks = [
        BasicBlock(64, 64, 1),
        BasicBlock(64, 64, 1),
        *(BasicBlock(c // 2 if i == 0 else c, c, 2 - i) for c in (128, 256, 512) for i in range(2)),
    ]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))


class EncoderLayer(nn.Module):
    """Attention and feed-forward of plain linear layers, so that every one of them can be pruned."""

    def __init__(self, width: int, heads: int, within: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, within), nn.Linear(within, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        attended = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = self.norm1(x + self.out(attended))
        return self.norm2(x + self.down(nn.functional.gelu(self.up(x))))


def encoder() -> nn.Module:
    return nn.Sequential(*(EncoderLayer(384, 12, 1536) for _ in range(6)))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet18": (resnet18, (3, 224, 224)),
    "encoder": (encoder, (128, 384)),
}


def prunable(model: nn.Module) -> list[tuple[nn.Module, str]]:
    return [(m, "weight") for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]


def contenders(name: str, sparsity: float, batch: int, step: bool, amp: bool) -> dict[str, Callable[[], object]]:
    torch.manual_seed(0)
    build, shape = MODELS[name]
    dense = build().train(step)
    x = torch.randn(batch, *shape)

    def call(model: nn.Module, x: Tensor) -> Callable[[], object]:
        def autocast() -> torch.autocast:
            return torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=amp)

        def infer() -> None:
            with torch.inference_mode(), autocast():
                model(x)

        def train() -> None:
            for parameter in model.parameters():
                parameter.grad = None
            with autocast():
                y = model(x)
            y.square().mean().backward()

        return train if step else infer

    formats = {"": torch.contiguous_format}
    if len(shape) == 3:
        formats["_last"] = torch.channels_last
    calls = {}
    for suffix, memory_format in formats.items():
        # Torch prunes no tensor in channels_last, and lets no model be copied that it has pruned.
        models = {kind: copy.deepcopy(dense) for kind in ("hook", "dense", "live")}
        for (hooked, parameter), (live, _) in zip(prunable(models["hook"]), prunable(models["live"]), strict=True):
            torch_prune.random_unstructured(hooked, parameter, amount=sparsity)
            prune.custom_from_mask(live, parameter, hooked.weight_mask)
        input = x.contiguous(memory_format=memory_format)
        for kind, model in models.items():
            calls[f"{kind}{suffix}"] = call(model.to(memory_format=memory_format), input)
    return calls


def measure(name: str, sparsity: float, batch: int, step: bool, args: argparse.Namespace) -> list[dict[str, Any]]:
    calls = contenders(name, sparsity, batch, step, args.amp)
    timings = compare(calls, args.seconds, f"{name} {sparsity:.0%}", args.device)
    best = {
        kind: min(t.minimum for key, t in timings.items() if key.removesuffix("_last") == kind)
        for kind in ("hook", "dense")
    }
    return [
        {
            "model": name,
            "batch": batch,
            "sparsity": sparsity,
            "step": step,
            "amp": args.amp,
            "device": args.device,
            "layer": layer,
            "minimum_s": timing.minimum,
            "median_s": timing.median,
            **{f"x_{kind}": best[kind] / timing.minimum for kind in best},
        }
        for layer, timing in timings.items()
    ]


HEADER = ("model", "batch", "pass", "sparsity", "layers", "ms", "median", "x hook", "x dense")


def line(row: dict[str, Any]) -> list[str]:
    return [
        row["model"],
        str(row["batch"]),
        "step" if row["step"] else "inference",
        f"{row['sparsity']:.0%}",
        row["layer"],
        f"{row['minimum_s'] * 1e3:.1f}",
        f"{row['median_s'] * 1e3:.1f}",
        f"{row['x_hook']:.2f}",
        f"{row['x_dense']:.2f}",
    ]


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = []
    for name, batch, step in itertools.product(args.models, args.batch, (False, True)):
        rows = []
        for sparsity in args.sparsity:
            rows += measure(name, sparsity, batch, step, args)
        results += [{**row, "threads": torch.get_num_threads()} for row in rows]
        print(table([HEADER, *map(line, rows)]), flush=True)
    return results


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    options.add_argument("--sparsity", type=float, nargs="+", default=[0.9])
    options.add_argument("--batch", type=int, nargs="+", default=[8])
    options.add_argument("--amp", action="store_true", help="forward under autocast to bfloat16")
    main_with("model", run, options.parse_args())


if __name__ == "__main__":
    main()
