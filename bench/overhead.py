"""What a call costs before any arithmetic: masked, dense and hook on layers too small to be about anything else.

    python bench/overhead.py [--json FILE]

functions   masked_linear(x, w, m, b) against F.linear(x, w * m, b), which is what the hook of torch.nn.utils.prune
            computes, and against F.linear(x, w, b); and the same of conv2d.
modules     torch's layer, the same pruned by torch.nn.utils.prune, pruned by masked_ops.prune, and masked_ops's own.

Times are microseconds a call, on one thread if --threads says nothing else. "inference" runs under
torch.inference_mode, "forward" records the graph, "step" is a forward and the gradients of all parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from _harness import Timing, interleaved, machine, masked_ops, parser, print_machine, table, write_json
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune as torch_prune

LIMIT = 1.5e-6  # seconds that a masked function may add to the same over w * m
MODES = ("inference", "forward", "step")

Call = Callable[[], object]


class Layer(NamedTuple):
    name: str
    input: tuple[int, ...]
    weight: tuple[int, ...]

    def function(self) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return F.linear if len(self.weight) == 2 else F.conv2d

    def masked_function(self) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        return masked_ops.masked_linear if len(self.weight) == 2 else masked_ops.masked_conv2d

    def module(self) -> nn.Module:
        outputs, inputs, *kernel = self.weight
        return nn.Conv2d(inputs, outputs, (kernel[0], kernel[1])) if kernel else nn.Linear(inputs, outputs)

    def masked_module(self, mask: Tensor) -> nn.Module:
        outputs, inputs, *kernel = self.weight
        if kernel:
            return masked_ops.MaskedConv2d(inputs, outputs, kernel, mask=mask)
        return masked_ops.MaskedLinear(inputs, outputs, mask=mask)


LAYERS = (
    Layer("linear 1, 8 -> 8", (1, 8), (8, 8)),
    Layer("linear 1, 64 -> 64", (1, 64), (64, 64)),
    Layer("linear 16, 64 -> 64", (16, 64), (64, 64)),
    Layer("conv2d 1x1, 16 -> 16 @ 4", (1, 16, 4, 4), (16, 16, 1, 1)),
    Layer("conv2d 3x3, 16 -> 16 @ 4", (1, 16, 6, 6), (16, 16, 3, 3)),
)


def in_mode(mode: str, forward: Callable[[], Tensor], leaves: list[Tensor]) -> Call:
    with torch.no_grad():
        gradient = torch.randn_like(forward())
    return (lambda: torch.autograd.grad(forward(), leaves, gradient)) if mode == "step" else forward


def functions(mode: str, layer: Layer) -> dict[str, Call]:
    dense, masked = layer.function(), layer.masked_function()
    x = torch.randn(layer.input)
    w = torch.randn(layer.weight, requires_grad=True)
    b = torch.randn(layer.weight[0], requires_grad=True)
    m = (torch.rand_like(w) < 0.1).float()
    forwards: dict[str, Callable[[], Tensor]] = {
        "F(x, w, b)": lambda: dense(x, w, b),
        "F(x, w * m, b)": lambda: dense(x, w * m, b),
        "masked_ops(x, w, m, b)": lambda: masked(x, w, m, b),
    }
    return {name: in_mode(mode, forward, [w, b]) for name, forward in forwards.items()}


def modules(mode: str, layer: Layer) -> dict[str, Call]:
    x = torch.randn(layer.input)
    mask = (torch.rand(layer.weight) < 0.1).float()
    layers: dict[str, Any] = {
        "torch.nn": layer.module(),
        "torch's prune": torch_prune.custom_from_mask(layer.module(), "weight", mask),
        "masked_ops.prune": masked_ops.prune.custom_from_mask(layer.module(), "weight", mask),
        "masked_ops": layer.masked_module(mask),
    }
    return {
        name: in_mode(mode, lambda module=module: module(x), list(module.parameters()))
        for name, module in layers.items()
    }


def rows_of(times: dict[str, Timing], baseline: str, mode: str, size: str) -> list[list[str]]:
    base = times[baseline]
    return [
        [
            size,
            mode,
            name,
            *(f"{value * 1e6:.2f}" for value in (timing.minimum, timing.median)),
            *(
                "" if name == baseline else f"{difference * 1e6:+.2f}"
                for difference in (timing.minimum - base.minimum, timing.median - base.median)
            ),
        ]
        for name, timing in times.items()
    ]


def main() -> None:
    arguments = parser(__doc__).parse_args()
    torch.set_num_threads(arguments.threads or 1)
    torch.manual_seed(0)
    facts = machine()
    print_machine(facts)

    results = []
    for title, contenders, baseline in (
        ("functions", functions, "F(x, w * m, b)"),
        ("modules", modules, "torch.nn"),
    ):
        header = ["layer", "mode", title, "min", "median", f"min over {baseline}", "median"]
        cells = [header]
        for layer in LAYERS:
            for mode in MODES:
                calls = contenders(mode, layer)
                with torch.inference_mode(mode == "inference"):
                    times = interleaved(calls, arguments.seconds, label=f"{layer.name}, {mode}")
                cells += rows_of(times, baseline, mode, layer.name)
                results += [
                    {"group": title, "layer": layer.name, "mode": mode, "contender": name}
                    | {"minimum": timing.minimum, "median": timing.median}
                    for name, timing in times.items()
                ]
        print(f"\n{table(cells)}")

    over = {(r["layer"], r["mode"], r["contender"]): r["minimum"] for r in results if r["group"] == "functions"}
    worst = max(
        over[layer.name, mode, "masked_ops(x, w, m, b)"] - over[layer.name, mode, "F(x, w * m, b)"]
        for layer in LAYERS
        for mode in MODES
    )
    verdict = "within" if worst <= LIMIT else "ABOVE"
    print(
        f"\nmasked_ops over the hook's function, the worst of these: {worst * 1e6:+.2f} µs, "
        f"{verdict} the limit of {LIMIT * 1e6:.1f} µs"
    )
    if arguments.json:
        write_json(arguments.json, "overhead", facts, results)


if __name__ == "__main__":
    main()
