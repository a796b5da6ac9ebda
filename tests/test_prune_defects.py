"""What is broken in ``torch.nn.utils.prune`` (2.13), once each, and right here."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from interrupts import interrupted
from torch import nn
from torch.nn import functional as F

from masked_ops import prune


def pruned_linear() -> nn.Linear:
    return prune.l1_unstructured(nn.Linear(6, 4), "weight", amount=0.5)


def small_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5)
    )


def pruned_net() -> nn.Sequential:
    net = small_net()
    prune.l1_unstructured([(net[0], "weight"), (net[4], "weight")], amount=0.5)
    return net


# --- copies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before a forward", "after a forward", "after a backward"])
def test_deepcopy(when: str) -> None:
    net, x = pruned_net(), torch.randn(2, 3, 4, 4)
    if when != "before a forward":
        loss = net(x).sum()
    if when == "after a backward":
        loss.backward()
    twin = copy.deepcopy(net)
    assert prune.is_pruned(twin) and type(twin[0]) is type(net[0])
    torch.testing.assert_close(twin.eval()(x), net.eval()(x))
    with torch.no_grad():
        twin[0].weight_orig.zero_()
        twin[4].weight_mask.zero_()
    assert bool(net[0].weight.any()) and bool(net[4].weight.any())
    prune.undo(twin[4], "weight")  # the copy's method objects are its own
    assert prune.is_pruned(net[4]) and not prune.is_pruned(twin[4])


def test_averaged_models() -> None:
    net, x = pruned_net(), torch.randn(2, 3, 4, 4)
    average = torch.optim.swa_utils.AveragedModel(net)
    weights = [net[4].weight_orig.detach().clone()]
    average.update_parameters(net)
    for _ in range(2):
        with torch.no_grad():
            net[4].weight_orig.add_(1)
        weights.append(net[4].weight_orig.detach().clone())
        average.update_parameters(net)
    expected = torch.stack(weights).mean(0)
    torch.testing.assert_close(average.module[4].weight_orig, expected)
    torch.testing.assert_close(average.module[4].weight, expected * net[4].weight_mask)
    assert average(x).shape == (2, 5)


def test_fusing_convolution_and_batch_norm() -> None:
    net, x = pruned_net(), torch.randn(2, 3, 4, 4)
    net(x)  # statistics
    net.eval()
    fused = torch.nn.utils.fusion.fuse_conv_bn_eval(net[0], net[1])
    torch.testing.assert_close(fused(x), net[1](net[0](x)))


# --- a weight that is never stale -----------------------------------------------------------------------------------


def load(layer: nn.Module) -> None:
    layer.load_state_dict({key: torch.full_like(value, 2) for key, value in layer.state_dict().items()})


def train(layer: nn.Module) -> None:
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    layer(torch.ones(1, 6)).sum().backward()
    optimizer.step()


def write_data(layer: nn.Module) -> None:
    layer.weight_orig.data.fill_(3)


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "load_state_dict": load,
    "optimizer.step": train,
    "to(dtype)": lambda layer: layer.to(torch.float64),
    "half": lambda layer: layer.half(),
    "to(device)": lambda layer: layer.to("meta"),
    "write to .data": write_data,
    "write to the mask": lambda layer: layer.weight_mask.zero_(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_weight_is_never_stale(change: str) -> None:
    layer = pruned_linear()
    layer(torch.ones(1, 6))
    CHANGES[change](layer)
    assert layer.weight.dtype == layer.weight_orig.dtype and layer.weight.device == layer.weight_orig.device
    if not layer.weight.is_meta:
        assert torch.equal(layer.weight, layer.weight_orig * layer.weight_mask)


def test_a_penalty_on_the_weight_after_inference_has_its_gradient() -> None:
    layer = pruned_linear()
    with torch.no_grad():
        layer(torch.ones(1, 6))
    layer.weight.square().sum().backward()
    torch.testing.assert_close(layer.weight_orig.grad, 2 * layer.weight_orig.detach() * layer.weight_mask)


# --- all or nothing --------------------------------------------------------------------------------------------------


def fingerprint(model: nn.Module) -> list[Any]:
    """Everything that a failed call could have changed, by identity and by value."""
    seen: list[Any] = []
    for module in model.modules():
        seen.append((type(module), sorted(vars(module))))
        for key, hook in module._forward_pre_hooks.items():
            seen.append((key, id(hook), sorted(vars(hook)), len(getattr(hook, "_pruning_methods", ()))))
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            seen.append((name, id(tensor), None if tensor is None else tensor.tolist()))
    return seen


class Failing(prune.BasePruningMethod):
    PRUNING_TYPE = "unstructured"

    def compute_mask(self, t: torch.Tensor, default_mask: torch.Tensor) -> torch.Tensor:
        default_mask.view(-1)[0] = 0
        raise ValueError("no mask")


FAILURES: dict[str, Callable[[nn.Sequential], Any]] = {
    "first round": lambda net: prune.l1_unstructured(net[1], "weight", 1000),
    "second round": lambda net: prune.l1_unstructured(net[0], "weight", 1000),
    "compute_mask, first round": lambda net: Failing.apply(net[1], "weight"),
    "compute_mask, second round": lambda net: Failing.apply(net[0], "weight"),
    "scores": lambda net: prune.l1_unstructured(net[0], "weight", 1, importance_scores=torch.ones(1)),
    "mask": lambda net: prune.custom_from_mask(net[0], "weight", torch.ones(1)),
    "bias of None": lambda net: prune.l1_unstructured(net[1], "bias", 1),
    "last of a list": lambda net: prune.l1_unstructured([(net[0], "weight"), (net[1], "weight")], amount=13),
    "global": lambda net: prune.global_unstructured([(net[0], "weight"), (net[1], "weight")], Failing),
    "remove, last of a list": lambda net: prune.remove([(net[0], "weight"), (net[1], "weight")]),
    "undo, last of a list": lambda net: prune.undo([(net[0], "weight"), (net[1], "weight")]),
    "unprune": lambda net: prune.unprune(net[0], "weight", where=99),
}


def two_layers() -> nn.Sequential:
    torch.default_generator.manual_seed(0)  # torch.manual_seed takes longer than all the rest here
    net = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3, bias=False))
    prune.l1_unstructured(net[0], "weight", amount=2)
    return net


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failed_call_leaves_everything(failure: str) -> None:
    net = two_layers()
    before = fingerprint(net)
    with pytest.raises((ValueError, TypeError, AssertionError, IndexError)):
        FAILURES[failure](net)
    assert fingerprint(net) == before
    prune.remove(net[0], "weight")  # torch raises here after a failed second round
    assert type(net[0]) is nn.Linear and not prune.is_pruned(net)


CALLS: dict[str, Callable[[nn.Sequential], Any]] = {
    "first round": lambda net: prune.l1_unstructured(net[1], "weight", 2),
    "second round": lambda net: prune.ln_structured(net[0], "weight", 1, 2, 0),
    "list": lambda net: prune.l1_unstructured([(net[0], "weight"), (net[1], "weight")], amount=2),
    "global": lambda net: prune.global_unstructured([(m, "weight") for m in net], prune.L1Unstructured, amount=4),
    "remove": lambda net: prune.remove(net),
    "restore": lambda net: prune.restore(net),
    "undo": lambda net: prune.undo(net[0], "weight"),
    "unprune": lambda net: prune.unprune(net[0], "weight", where=slice(None)),
    "load_state_dict": lambda net: prune.load_state_dict(net, CHECKPOINT),
}
CHECKPOINT = {
    "0.weight": torch.ones(4, 6),
    "0.bias": torch.zeros(4),
    "1.weight_orig": torch.ones(3, 4),
    "1.weight_mask": torch.eye(3, 4),
}


def outcome(net: nn.Module) -> list[Any]:
    """What the fingerprints of two networks with the same past have in common."""
    hooks = [[type(hook) for hook in module._forward_pre_hooks.values()] for module in net.modules()]
    return [hooks, [type(module) for module in net.modules()], {k: v.tolist() for k, v in net.state_dict().items()}]


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("call", CALLS)
def test_an_interrupt_at_any_line_leaves_everything(call: str, rounds: int) -> None:
    """Or, from the moment when all is done, leaves everything done."""

    def start() -> nn.Sequential:
        net = two_layers()
        return net if rounds == 1 else prune.identity(net[0], "weight") and net

    complete = start()
    CALLS[call](complete)
    interrupts = undone = 0
    while True:
        net = start()
        before = fingerprint(net)
        if not interrupted(interrupts + 1, lambda net=net: CALLS[call](net)):
            break
        interrupts += 1
        if fingerprint(net) == before:
            undone += 1
        else:
            assert outcome(net) == outcome(complete)
    assert undone > 20 and interrupts - undone < 10


# --- attention -------------------------------------------------------------------------------------------------------


def masked_twin(module: nn.Module) -> nn.Module:
    """The dense module that a pruned one must equal."""
    return prune.remove(copy.deepcopy(module))


def compare_training(module: nn.Module, names: list[str], run: Callable[[nn.Module], torch.Tensor]) -> None:
    """Three steps, with an inference in between, as the dense twin with its gradients masked by hand."""
    twin = masked_twin(module)
    for _ in range(3):
        for model in (module, twin):
            model.train()
            model.zero_grad()
            run(model).square().sum().backward()
        for name in names:
            mask = module.get_buffer(f"{name}_mask")
            expected = twin.get_parameter(name).grad
            assert expected is not None
            expected.mul_(mask)
            torch.testing.assert_close(module.get_parameter(f"{name}_orig").grad, expected)
        for model in (module, twin):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.sub_(0.1 * parameter.grad)
            model.eval()
        with torch.inference_mode():
            torch.testing.assert_close(run(module), run(twin))


@pytest.mark.parametrize(
    "names", [["out_proj.weight"], ["in_proj_weight"], ["out_proj.weight", "in_proj_weight", "in_proj_bias"]]
)
def test_multihead_attention(names: list[str]) -> None:
    torch.manual_seed(0)
    attention, x = nn.MultiheadAttention(8, 2, batch_first=True).double(), torch.randn(2, 5, 8).double()
    for name in names:
        owner, _, last = name.rpartition(".")
        prune.l1_unstructured(attention.get_submodule(owner), last, amount=0.5)
    compare_training(attention, names, lambda model: model(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize(
    "names",
    [
        ["self_attn.out_proj.weight"],
        ["linear1.weight", "linear2.weight", "self_attn.out_proj.weight", "self_attn.in_proj_weight"],
    ],
)
def test_transformer_encoder_layer(names: list[str]) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, dropout=0.0, batch_first=True).double()
    x = torch.randn(2, 5, 8).double()
    for name in names:
        owner, _, last = name.rpartition(".")
        prune.l1_unstructured(layer.get_submodule(owner), last, amount=0.5)
    compare_training(layer, names, lambda model: model(x))


# --- threads ---------------------------------------------------------------------------------------------------------


def test_inference_in_other_threads_loses_no_gradient() -> None:
    """torch's hook sets module.weight for all threads: without a graph, if another thread infers."""
    layer, x = pruned_linear(), torch.randn(3, 6)
    mask = layer.weight_mask
    expected = (x.sum(0) * mask).clone()
    stop = threading.Event()

    def infer() -> None:
        with torch.no_grad():
            while not stop.is_set():
                layer(x)

    threads = [threading.Thread(target=infer) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(300):
            layer.zero_grad()
            layer(x).sum().backward()
            assert layer.weight_orig.grad is not None
            torch.testing.assert_close(layer.weight_orig.grad, expected)
    finally:
        stop.set()
        for thread in threads:
            thread.join()


# --- inputs that torch refuses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "step",
    [
        lambda m: prune.l1_unstructured(m, "weight", 0.5),
        lambda m: prune.random_unstructured(m, "weight", 0.5),
        lambda m: prune.ln_structured(m, "weight", 0.5, 2, 0),
        lambda m: prune.random_structured(m, "weight", 1, 1),
        lambda m: prune.global_unstructured([(m, "weight"), (m, "bias")], prune.L1Unstructured, amount=0.5),
    ],
)
def test_channels_last_weights(step: Callable[[nn.Module], Any]) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
    plain = nn.Conv2d(3, 8, 3)
    plain.load_state_dict(conv.state_dict())
    plain.weight.data = plain.weight.data.contiguous()
    for module in (conv, plain):
        for seed in range(2):  # the second round too
            torch.manual_seed(seed)
            step(module)
    assert torch.equal(conv.weight_mask, plain.weight_mask)
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(conv(x), plain(x))
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    prune.remove(conv)
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 3), (5, 4, 3, 2), (4, 3, 2, 2, 2)])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_frobenius_and_nuclear_norms(shape: tuple[int, ...], dim: int) -> None:
    torch.manual_seed(0)
    t = torch.randn(shape)
    channels = list(t.movedim(dim, 0))
    frobenius = torch.stack([channel.flatten().norm() for channel in channels])
    nuclear = torch.stack([torch.linalg.svdvals(channel.reshape(channel.shape[0], -1)).sum() for channel in channels])
    torch.testing.assert_close(prune._compute_norm(t, "fro", dim), frobenius)
    torch.testing.assert_close(prune._compute_norm(t, "nuc", dim), nuclear)
    for n, norms in (("fro", frobenius), ("nuc", nuclear)):
        module = nn.Module()
        module.weight = nn.Parameter(t.clone())
        prune.ln_structured(module, "weight", amount=1, n=n, dim=dim)
        pruned = [int(i) for i, channel in enumerate(module.weight_mask.movedim(dim, 0)) if not channel.any()]
        assert pruned == [int(norms.argmin())]


def test_global_pruning_of_a_generator() -> None:
    net = small_net()
    prune.global_unstructured(((m, "weight") for m in net if hasattr(m, "weight")), prune.L1Unstructured, amount=0.5)
    assert all(prune.is_pruned(net[i]) for i in (0, 1, 4))


def test_an_empty_container_takes_a_method() -> None:
    method = prune.L1Unstructured(1)
    method._tensor_name = "weight"
    container = prune.PruningContainer()
    container.add_pruning_method(method)
    assert container._tensor_name == "weight" and list(container) == [method]
    assert list(prune.PruningContainer(method, method)) == [method, method]


# --- memory and checkpoints ------------------------------------------------------------------------------------------


def test_iterative_global_pruning_costs_bits() -> None:
    """In torch every round keeps the mask of the whole model alive, in float, at every layer."""
    net = nn.Sequential(nn.Linear(100, 200), nn.Linear(200, 100))
    pairs = [(layer, "weight") for layer in net]

    def saved_bytes() -> int:
        buffer = io.BytesIO()
        torch.save(net, buffer)
        return len(buffer.getvalue())

    prune.global_unstructured(pairs, prune.L1Unstructured, amount=0.1)
    first = saved_bytes()
    for _ in range(10):
        prune.global_unstructured(pairs, prune.L1Unstructured, amount=0.1)
    entries = sum(layer.weight.numel() for layer in net)
    assert saved_bytes() - first < 10 * (2 * entries / 8 + 4096)
    for layer in net:
        assert layer.weight_mask.untyped_storage().nbytes() == layer.weight_mask.nbytes
        (hook,) = layer._forward_pre_hooks.values()
        assert len(hook) == 11


def test_state_dicts_load_with_weights_only(tmp_path: Any) -> None:
    net = pruned_net()
    prune.l1_unstructured(net[0], "weight", 0.5)
    torch.save(net.state_dict(), tmp_path / "state.pt")
    again = pruned_net()
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(again[0].weight, net[0].weight) and torch.equal(again[0].weight_mask, net[0].weight_mask)


def test_whole_models_pickle_after_a_forward() -> None:
    net, x = pruned_net(), torch.randn(2, 3, 4, 4)
    net(x).sum()
    again = pickle.loads(pickle.dumps(net))
    torch.testing.assert_close(again.eval()(x), net.eval()(x))
    assert F.linear(torch.ones(1, 128), again[4].weight).shape == (1, 5)
