"""An optimizer from before goes on after ``pack`` and ``unpack``, as if nothing had happened."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from interrupts import interrupted
from torch import Tensor, nn

import masked_ops
from masked_ops import prune

Make = Callable[[Any], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.05),
    "SGD, momentum": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=0.1),
    "Adam": lambda params: torch.optim.Adam(params, lr=0.01, amsgrad=True),
    "Adam, fused": lambda params: torch.optim.Adam(params, lr=0.01, fused=True),
    "AdamW, foreach": lambda params: torch.optim.AdamW(params, lr=0.01, foreach=True),
    "NAdam": lambda params: torch.optim.NAdam(params, lr=0.01),
    "RAdam": lambda params: torch.optim.RAdam(params, lr=0.01),
    "Adamax": lambda params: torch.optim.Adamax(params, lr=0.01),
    "Adadelta": lambda params: torch.optim.Adadelta(params, lr=0.5),
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=0.05),
    "ASGD": lambda params: torch.optim.ASGD(params, lr=0.05, t0=1),
    "RMSprop": lambda params: torch.optim.RMSprop(params, lr=0.01, momentum=0.5, centered=True),
    "Rprop": lambda params: torch.optim.Rprop(params, lr=0.01),
}
X, Y = torch.randn(16, 2, 4, 4, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 5


def network() -> Any:
    """A convolution, a tied pair of linear layers, a layer that is not pruned."""
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12), nn.Linear(12, 5)
    )
    net[4].weight = net[2].weight
    masks = (torch.rand(3, 2, 3, 3) < 0.5), (torch.rand(12, 12) < 0.5)
    for layer, mask in ((net[0], masks[0]), (net[2], masks[1]), (net[4], masks[1])):
        prune.custom_from_mask(layer, "weight", mask)
    return net.double()


def train(net: Any, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(X.double()), Y).backward()
        optimizer.step()


def outputs(net: Any) -> Tensor:
    with torch.no_grad():
        return net(X.double())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on(name: str) -> None:
    masked = network()
    optimizer = OPTIMIZERS[name](masked.parameters())
    train(masked, optimizer)
    net, carried = copy.deepcopy((masked, optimizer))
    for change in (masked_ops.pack, masked_ops.unpack):
        assert change(net, carried) is net
        held = {p for group in carried.param_groups for p in group["params"]}
        assert held == set(net.parameters()) and set(carried.state) <= held
        train(masked, optimizer)
        train(net, carried)
        torch.testing.assert_close(outputs(net), outputs(masked))
    assert not isinstance(net[0], masked_ops.PackedConv2d)


def test_groups_and_names_keep_their_order() -> None:
    net = network()
    groups = [
        {"params": list(net[5].named_parameters()), "lr": 0.5},
        {"params": [*net[:2].named_parameters("a"), *net[2].named_parameters("b")]},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    before = [list(group["params"]) for group in optimizer.param_groups]
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    masked_ops.pack(net, optimizer)
    assert optimizer.param_groups[1]["param_names"] == ["a.0.bias", "a.0.weight_values", "b.bias", "b.weight_values"]
    assert optimizer.param_groups[0]["params"] == before[0] and optimizer.param_groups[0]["lr"] == 0.5
    assert optimizer.param_groups[1]["params"][1] is net[0].weight_values
    assert optimizer.param_groups[1]["params"][3] is net[2].weight_values is net[4].weight_values
    optimizer.step()
    scheduler.step()
    masked_ops.unpack(net, optimizer)
    assert optimizer.param_groups[1]["param_names"] == ["a.0.bias", "a.0.weight_orig", "b.bias", "b.weight_orig"]
    assert optimizer.param_groups[1]["params"][3] is net[2].weight_orig is net[4].weight_orig


def test_names_from_before_the_pruning_stay() -> None:
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.SGD([("fc.weight", layer.weight), ("fc.bias", layer.bias)], lr=0.1)
    prune.l1_unstructured(layer, "weight", amount=0.5)
    for change in (masked_ops.pack, masked_ops.unpack):
        change(layer, optimizer)
        assert optimizer.param_groups[0]["param_names"] == ["fc.weight", "fc.bias"]
        assert set(optimizer.param_groups[0]["params"]) == set(layer.parameters())


def test_state_and_gradients_are_those_of_what_is_left() -> None:
    layer = prune.custom_from_mask(nn.Linear(3, 2), "weight", torch.tensor([[1, 0, 1], [0, 1, 0]]))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    layer(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    momentum = optimizer.state[layer.weight_orig]["momentum_buffer"]
    masked_ops.pack(layer, optimizer)
    values: Any = layer.weight_values
    assert torch.equal(optimizer.state[values]["momentum_buffer"], momentum[layer.weight != 0])
    masked_ops.unpack(layer, optimizer)
    assert torch.equal(optimizer.state[layer.weight_orig]["momentum_buffer"], momentum * layer.weight_mask)


def adafactor(net: Any) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(net.parameters())


class Odd(torch.optim.SGD):
    """Keeps a number for each row."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param]["rows"] = torch.ones(param.shape[0])


class Shared(torch.optim.SGD):
    __module__ = "torch.distributed.optim.shared"


REFUSED: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "no optimizer": (
        lambda net: net.parameters(),
        TypeError,
        "optimizer: torch.optim.Optimizer expected, got generator",
    ),
    "another model's": (lambda net: torch.optim.SGD(network().parameters()), ValueError, "has none of the weights"),
    "LBFGS": (lambda net: torch.optim.LBFGS(net.parameters()), ValueError, "LBFGS goes by the shapes"),
    "shared out": (lambda net: Shared(net.parameters()), ValueError, "Shared has shared out its Parameters"),
    "Adafactor": (adafactor, ValueError, "Adafactor goes by the shapes"),
    "state of another shape": (
        lambda net: Odd(net.parameters()),
        ValueError,
        r"state 'rows' has the shape \(3,\) for a weight of \(3, 2, 3, 3\)",
    ),
}


def contents(net: Any, optimizer: Any) -> list[Any]:
    state = [(id(param), sorted(state), list(map(id, state.values()))) for param, state in optimizer.state.items()]
    groups = [(list(map(id, group["params"])), group.get("param_names")) for group in optimizer.param_groups]
    return [[type(m) for m in net], list(map(id, net.parameters())), sorted(state), groups]


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_go_on_is_refused_and_changes_nothing(case: str) -> None:
    make, kind, message = REFUSED[case]
    net = network()
    optimizer = make(net)
    if case == "state of another shape":
        optimizer.step()
    whole = isinstance(optimizer, torch.optim.Optimizer)
    before = contents(net, optimizer) if whole else None
    with pytest.raises(kind, match=message):
        masked_ops.pack(net, optimizer)
    assert not whole or contents(net, optimizer) == before
    assert isinstance(net[0], masked_ops.MaskedConv2d)
    masked_ops.pack(net)
    with pytest.raises(kind, match=message.replace(r"\(3, 2, 3, 3\)", r"\(")):
        masked_ops.unpack(net, make(net) if case != "state of another shape" else stepped(make(net)))
    assert isinstance(net[0], masked_ops.PackedConv2d)


def stepped(optimizer: Any) -> Any:
    for group in optimizer.param_groups:
        for param in group["params"]:
            optimizer.state[param]["rows"] = torch.ones(3)
    return optimizer


@pytest.mark.parametrize("change", [masked_ops.pack, masked_ops.unpack])
def test_an_interrupt_leaves_both_or_neither(change: Any) -> None:
    net = network()
    optimizer = torch.optim.SGD(net.named_parameters(), lr=0.1, momentum=0.9)
    train(net, optimizer, 1)
    if change is masked_ops.unpack:
        masked_ops.pack(net, optimizer)
    change(*copy.deepcopy((net, optimizer)))  # what is done once only is done
    line, changed = 1, 0
    while True:
        model, its = copy.deepcopy((net, optimizer))
        before = contents(model, its)
        if not interrupted(line, lambda model=model, its=its: change(model, its)):
            break
        if contents(model, its) != before:
            changed += 1
            held = {param for group in its.param_groups for param in group["params"]}
            assert held == set(model.parameters()) == set(its.state), f"line {line}"
            assert type(model[0]) is not type(net[0])
        line += 1
    assert line > 20 and changed < line / 2
