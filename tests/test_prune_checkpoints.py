"""``prune.load_state_dict``: checkpoints of any state into models of any state."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from masked_modules import Net
from torch import nn
from torch.nn.utils import prune as torch_prune

from masked_ops import MaskedConv2d, prune


def as_dense(net: Net) -> Net:
    return net


def as_torch_pruned(net: Net) -> Net:
    torch_prune.random_unstructured(net.conv, "weight", 0.5)
    torch_prune.random_unstructured(net.block[0], "weight", 0.5)
    torch_prune.random_unstructured(net.block[0], "bias", 2)
    return net


def as_pruned(net: Net) -> Net:
    prune.random_unstructured(net.conv, "weight", 0.5)
    prune.random_unstructured(net.block[2], "weight", 0.5)
    return net


def as_masked_layers(net: Net) -> Net:
    net.conv = MaskedConv2d.from_dense(net.conv, (torch.rand(8, 3, 3, 3) > 0.5).float())
    return net


def as_removed(net: Net) -> Net:
    return prune.remove(as_pruned(net))


STATES = [as_dense, as_torch_pruned, as_pruned, as_masked_layers, as_removed]


@pytest.mark.parametrize("source", STATES)
@pytest.mark.parametrize("target", STATES)
@pytest.mark.parametrize("assign", [False, True])
def test_checkpoints_of_any_state_load_into_models_of_any_state(
    source: Callable[[Net], Net], target: Callable[[Net], Net], assign: bool
) -> None:
    torch.manual_seed(0)
    a, b, x = source(Net()), target(Net()), torch.randn(2, 3, 4, 4)
    state = a.state_dict()
    masks_before = {name: mask.clone() for name, mask in b.named_buffers()}
    given_keys = list(state)
    keys = prune.load_state_dict(b, state, assign=assign)
    assert not keys.missing_keys and not keys.unexpected_keys and list(state) == given_keys
    # Masks: the checkpoint's where it has one, and otherwise what was there.
    masks = dict(b.named_buffers())
    assert set(masks) == set(masks_before) | {name for name, _ in a.named_buffers()}
    for name, mask in masks.items():
        expected = dict(a.named_buffers()).get(name, masks_before.get(name))
        assert torch.equal(mask, expected)
        module = b.get_submodule(name.rpartition(".")[0])
        parameter = name.rpartition(".")[2].removesuffix("_mask")
        assert prune.is_pruned(module)
        assert torch.equal(getattr(module, parameter), getattr(module, f"{parameter}_orig") * mask)
    for name, values in a.state_dict().items():
        if name.removesuffix("_orig") in masks_before or name.endswith("_mask"):
            continue
        loaded = b.state_dict().get(name, b.state_dict().get(f"{name}_orig"))
        assert torch.equal(loaded, values)
    if set(masks_before) <= {name for name, _ in a.named_buffers()}:
        torch.testing.assert_close(b(x), a(x))
    prune.remove(b) if masks else None
    assert not prune.is_pruned(b)


def test_rewinding_keeps_the_masks() -> None:
    net = Net()
    start = copy.deepcopy(net.state_dict())
    prune.global_unstructured(net.pairs, prune.L1Unstructured, amount=0.5)
    masks = {name: mask.clone() for name, mask in net.named_buffers()}
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1)
    prune.load_state_dict(net, start)
    assert torch.equal(net.conv.weight, start["conv.weight"] * masks["conv.weight_mask"])
    prune.restore(net)
    assert all(torch.equal(parameter, start[name]) for name, parameter in net.named_parameters())


def test_loading_the_same_masks_keeps_the_rounds_and_other_masks_end_them() -> None:
    layer = prune.l1_unstructured(prune.l1_unstructured(nn.Linear(4, 3), "weight", 2), "weight", 2)
    (hook,) = layer._forward_pre_hooks.values()
    state = copy.deepcopy(layer.state_dict())
    prune.load_state_dict(layer, state)
    assert list(layer._forward_pre_hooks.values()) == [hook]
    state["weight_mask"] = torch.eye(3, 4)
    prune.load_state_dict(layer, state)
    (hook,) = layer._forward_pre_hooks.values()
    assert isinstance(hook, prune.CustomFromMask) and torch.equal(hook.mask, torch.eye(3, 4))
    prune.undo(layer, "weight")
    assert not prune.is_pruned(layer)


def test_masks_keep_the_dtype_of_the_checkpoint() -> None:
    state = {"weight_orig": torch.ones(2, 2), "weight_mask": torch.tensor([[True, False], [False, True]])}
    layer = nn.Linear(2, 2, bias=False)
    prune.load_state_dict(layer, state)
    assert layer.weight_mask.dtype == torch.bool
    state["weight_mask"] = torch.tensor([[0.5, 1.0], [0.0, 1.0]])  # would not survive in bool
    prune.load_state_dict(layer, state)
    assert layer.weight_mask.tolist() == [[0.5, 1], [0, 1]]


@pytest.mark.parametrize("prepare", [as_dense, as_torch_pruned, as_pruned])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: state.pop("conv.bias"),
        lambda state: state.update(surplus=torch.ones(1)),
        lambda state: state.update({"block.2.weight": torch.ones(9, 9)}),
        lambda state: state.update({"block.2.weight_mask": torch.ones(9, 9)}),
    ],
)
@pytest.mark.parametrize("assign", [False, True])
def test_a_checkpoint_that_does_not_fit_changes_nothing(
    prepare: Callable[[Net], Net], spoil: Callable[[dict[str, Any]], Any], assign: bool
) -> None:
    torch.manual_seed(0)
    net, state = prepare(Net()), as_pruned(Net()).state_dict()
    spoil(state)
    values = {name: (value, value.clone()) for name, value in (*net.named_parameters(), *net.named_buffers())}
    classes, hooks = [type(m) for m in net.modules()], [list(m._forward_pre_hooks.items()) for m in net.modules()]
    with pytest.raises(RuntimeError):
        prune.load_state_dict(net, state, assign=assign)
    after = dict((*net.named_parameters(), *net.named_buffers()))
    assert set(after) == set(values)
    assert all(after[name] is tensor and torch.equal(tensor, copied) for name, (tensor, copied) in values.items())
    assert [type(m) for m in net.modules()] == classes
    assert [list(m._forward_pre_hooks.items()) for m in net.modules()] == hooks


def test_not_strict() -> None:
    net = as_pruned(Net())
    keys = prune.load_state_dict(net, {"conv.weight": torch.ones(8, 3, 3, 3), "surplus": torch.ones(1)}, strict=False)
    assert keys.unexpected_keys == ["surplus"] and "block.0.weight" in keys.missing_keys
    assert "conv.weight_orig" not in keys.missing_keys and bool((net.conv.weight_orig == 1).all())
    with pytest.raises(TypeError, match="state_dict must be a mapping"):
        prune.load_state_dict(net, [("conv.weight", torch.ones(1))])


def test_a_shared_weight_that_the_checkpoint_has_once() -> None:
    """As safetensors' save_model writes it: each Parameter once, and the masks of all that hold it."""

    def tied() -> Any:
        model: Any = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5))
        model[1].weight = model[0].weight
        return model

    pruned, fresh = tied(), tied()
    prune.random_unstructured([(pruned[0], "weight"), (pruned[1], "weight")], amount=0.5)
    state = pruned.state_dict()
    del state["0.weight_orig"]
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.weight_orig"):
        prune.load_state_dict(fresh, state)
    assert not prune.is_pruned(fresh)
    keys = prune.load_state_dict(fresh, state, strict=False)
    assert keys.missing_keys == ["0.weight_orig"] and not keys.unexpected_keys
    assert fresh[0].weight_orig is fresh[1].weight_orig
    assert torch.equal(fresh[0].weight, pruned[0].weight) and torch.equal(fresh[1].weight, pruned[1].weight)


@pytest.mark.parametrize("before", [prune.load_state_dict, nn.Module.load_state_dict])
def test_a_checkpoint_that_was_assigned_once_is_copied_again(before: Any) -> None:
    checkpoint: Any = prune.l1_unstructured(nn.Linear(4, 2), "weight", amount=0.5).state_dict()
    before(prune.identity(nn.Linear(4, 2), "weight"), checkpoint, assign=True)
    layer: Any = nn.Linear(4, 2, dtype=torch.float64)
    weight, bias = layer.weight, layer.bias
    prune.load_state_dict(layer, checkpoint)
    assert layer.weight_orig is weight and layer.bias is bias
    assert torch.equal(weight, checkpoint["weight_orig"].double()) and checkpoint.keys() == layer.state_dict().keys()


def test_metadata_shared_modules_and_buffers_of_the_users() -> None:
    class Odd(nn.Module):
        """Its own ``attention_mask`` and ``attention_orig`` have nothing to do with pruning."""

        def __init__(self) -> None:
            super().__init__()
            self.one = self.two = nn.Linear(2, 2)
            self.norm = nn.BatchNorm1d(2)
            self.attention_orig = nn.Parameter(torch.ones(2))
            self.register_buffer("attention_mask", torch.zeros(2))

    a, b = Odd(), Odd()
    prune.l1_unstructured(a.one, "weight", 2)
    state = a.state_dict()
    assert isinstance(state, OrderedDict) and "two.weight_mask" in state
    prune.load_state_dict(b, state)
    assert b.one is b.two and torch.equal(b.two.weight, a.one.weight)
    assert isinstance(b.attention_orig, nn.Parameter) and not hasattr(b, "attention")
    # BatchNorm's counter came with version 2: a state of version 1 lacks it.
    del state["norm.num_batches_tracked"]
    with pytest.raises(RuntimeError, match=r"Missing key.*norm\.num_batches_tracked"):
        prune.load_state_dict(b, state)
    state._metadata["norm"]["version"] = 1
    assert not prune.load_state_dict(b, state).missing_keys


def test_a_model_on_the_meta_device_takes_a_pruned_checkpoint() -> None:
    state = as_pruned(Net()).state_dict()
    with torch.device("meta"):
        net = Net()
    prune.load_state_dict(net, state, assign=True)
    assert torch.equal(net.conv.weight, state["conv.weight_orig"] * state["conv.weight_mask"])
    assert net(torch.randn(1, 3, 4, 4)).shape == (1, 4)
