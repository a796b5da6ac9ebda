"""Memory of training with Adam: dense, under torch.nn.utils.prune, masked and packed.

    python bench/memory.py
    python bench/memory.py --sparsity 0.5 0.9 --json out.json

A stack of linear layers (768 -> 3072 -> 768, four times) is trained with 128 rows. Counted are the bytes of all tensors
that live at the end of a forward pass: parameters and masks, gradients of the step before, the optimizer's state, and
what autograd keeps for backward beyond those. The checkpoint is what torch.save makes of the state_dict. No times: this
one may run beside anything.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable

import torch
from _harness import machine, parser, print_machine, table, write_json
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

import masked_ops
from masked_ops import prune

BATCH, FEATURES, HIDDEN, BLOCKS = 128, 768, 3072, 4


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes of each storage, so that what is shared counts once."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def build(prepare: Callable[[nn.Module, list[nn.Linear]], object]) -> nn.Sequential:
    torch.manual_seed(0)
    pairs = [(nn.Linear(FEATURES, HIDDEN), nn.Linear(HIDDEN, FEATURES)) for _ in range(BLOCKS)]
    model = nn.Sequential(*[module for up, down in pairs for module in (up, nn.ReLU(), down)])
    prepare(model, [module for module in model if isinstance(module, nn.Linear)])
    return model


def measure(model: nn.Sequential) -> dict[str, int]:
    optimizer = torch.optim.Adam(model.parameters())
    x = torch.randn(BATCH, FEATURES)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(x).square().mean()
    parts = {
        "parameters, masks": [*model.parameters(), *model.buffers()],
        "gradients": [p.grad for p in model.parameters() if p.grad is not None],
        "optimizer": [t for state in optimizer.state.values() for t in state.values()],
        "for backward": [t for t in saved if t.layout == torch.strided],
    }
    seen: dict[int, int] = {}
    result = {}
    for name, tensors in parts.items():
        fresh = {at: size for at, size in storages(tensors).items() if at not in seen}
        seen |= fresh
        result[name] = sum(fresh.values())
    result["together"] = sum(result.values())
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    result["checkpoint"] = len(file.getvalue())
    return result


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.9])
    args = options.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    facts = machine()
    print_machine(facts)
    results = []
    for sparsity in args.sparsity:

        def masked(model: nn.Module, layers: list[nn.Linear], amount: float = sparsity) -> None:
            prune.l1_unstructured([(layer, "weight") for layer in layers], amount=amount)

        def hook(model: nn.Module, layers: list[nn.Linear], amount: float = sparsity) -> None:
            for layer in layers:
                torch_prune.l1_unstructured(layer, "weight", amount=amount)

        def packed(model: nn.Module, layers: list[nn.Linear], masked: Callable[..., None] = masked) -> None:
            masked(model, layers)
            masked_ops.pack(model)

        contenders = {"dense": lambda model, layers: None, "hook": hook, "masked": masked, "packed": packed}
        measured = {name: measure(build(prepare)) for name, prepare in contenders.items()}
        head = ["MiB", *measured["dense"], "x hook", "checkpoint x dense"]
        rows = [head]
        for name, parts in measured.items():
            share = parts["together"] / measured["hook"]["together"]
            file = parts["checkpoint"] / measured["dense"]["checkpoint"]
            rows.append([name, *[f"{size / 2**20:.1f}" for size in parts.values()], f"{share:.3f}", f"{file:.3f}"])
            results.append({"contender": name, "sparsity": sparsity, **parts})
        print(f"\nsparsity {sparsity:.0%}")
        print(table(rows))
    if args.json:
        write_json(args.json, "memory", facts, results)


if __name__ == "__main__":
    main()
