"""What a call costs before any arithmetic: masked, dense and hook on layers too small to be about anything else.

    python bench/overhead.py [--json FILE]

functions   masked_linear(x, w, m, b) against F.linear(x, w * m, b), which is what the hook of torch.nn.utils.prune
            computes, and against F.linear(x, w, b).
modules     nn.Linear, the same pruned by torch.nn.utils.prune, pruned by masked_ops.prune, and a MaskedLinear.

Times are microseconds a call, on one thread if --threads says nothing else. "inference" runs under
torch.inference_mode, "forward" records the graph, "step" is a forward and the gradients of all parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from _harness import Timing, interleaved, machine, masked_ops, parser, print_machine, table, write_json
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune as torch_prune

LIMIT = 1.5e-6  # seconds that masked_linear may add to F.linear(x, w * m, b)
LAYERS = ((1, 8, 8), (1, 64, 64), (16, 64, 64))  # M, N, K
MODES = ("inference", "forward", "step")

Call = Callable[[], object]


def in_mode(mode: str, forward: Callable[[], Tensor], leaves: list[Tensor], gradient: Tensor) -> Call:
    return (lambda: torch.autograd.grad(forward(), leaves, gradient)) if mode == "step" else forward


def functions(mode: str, rows: int, out_features: int, in_features: int) -> dict[str, Call]:
    x, gradient = torch.randn(rows, in_features), torch.randn(rows, out_features)
    w = torch.randn(out_features, in_features, requires_grad=True)
    b = torch.randn(out_features, requires_grad=True)
    m = (torch.rand_like(w) < 0.1).float()
    forwards: dict[str, Callable[[], Tensor]] = {
        "F.linear(x, w, b)": lambda: F.linear(x, w, b),
        "F.linear(x, w * m, b)": lambda: F.linear(x, w * m, b),
        "masked_linear(x, w, m, b)": lambda: masked_ops.masked_linear(x, w, m, b),
    }
    return {name: in_mode(mode, forward, [w, b], gradient) for name, forward in forwards.items()}


def modules(mode: str, rows: int, out_features: int, in_features: int) -> dict[str, Call]:
    x, gradient = torch.randn(rows, in_features), torch.randn(rows, out_features)
    mask = (torch.rand(out_features, in_features) < 0.1).float()
    layers: dict[str, Any] = {
        "nn.Linear": nn.Linear(in_features, out_features),
        "torch's prune": torch_prune.custom_from_mask(nn.Linear(in_features, out_features), "weight", mask),
        "masked_ops.prune": masked_ops.prune.custom_from_mask(nn.Linear(in_features, out_features), "weight", mask),
        "MaskedLinear": masked_ops.MaskedLinear(in_features, out_features, mask=mask),
    }
    return {
        name: in_mode(mode, lambda layer=layer: layer(x), list(layer.parameters()), gradient)
        for name, layer in layers.items()
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
        ("functions", functions, "F.linear(x, w * m, b)"),
        ("modules", modules, "nn.Linear"),
    ):
        header = ["M, N, K", "mode", title, "min", "median", f"min over {baseline}", "median"]
        cells = [header]
        for size in LAYERS:
            for mode in MODES:
                calls = contenders(mode, *size)
                with torch.inference_mode(mode == "inference"):
                    times = interleaved(calls, arguments.seconds, label=f"{title}, {size}, {mode}")
                cells += rows_of(times, baseline, mode, ", ".join(map(str, size)))
                results += [
                    {"group": title, "M": size[0], "N": size[1], "K": size[2], "mode": mode, "contender": name}
                    | {"minimum": timing.minimum, "median": timing.median}
                    for name, timing in times.items()
                ]
        print(f"\n{table(cells)}")

    over = {
        (r["M"], r["N"], r["K"], r["mode"], r["contender"]): r["minimum"] for r in results if r["group"] == "functions"
    }
    worst = max(
        over[(*size, mode, "masked_linear(x, w, m, b)")] - over[(*size, mode, "F.linear(x, w * m, b)")]
        for size in LAYERS
        for mode in MODES
    )
    verdict = "within" if worst <= LIMIT else "ABOVE"
    print(
        f"\nmasked_linear over F.linear(x, w * m, b), the worst of these: {worst * 1e6:+.2f} µs, "
        f"{verdict} the limit of {LIMIT * 1e6:.1f} µs"
    )
    if arguments.json:
        write_json(arguments.json, "overhead", facts, results)


if __name__ == "__main__":
    main()
