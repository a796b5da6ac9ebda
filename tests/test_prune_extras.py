"""What ``masked_ops.prune`` adds to torch's module: lists, recovery, sparse tensors."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from masked_modules import Net
from torch import nn
from torch.nn.utils import prune as torch_prune

import masked_ops
from masked_ops import MaskedLinear, prune
from masked_ops._mask_bits import MaskChange, PackedMask


def dense_state(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in net.named_parameters()}


def assert_dense(net: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """``net`` was never pruned, for all that can be seen."""
    assert not prune.is_pruned(net)
    assert {name for name, _ in net.named_parameters()} == set(state) and not list(net.buffers())
    for module in net.modules():
        assert not module._forward_pre_hooks and type(module).__module__.startswith(("torch.nn", Net.__module__))
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter, state[name]), name


def zeros(mask: torch.Tensor) -> int:
    return int((mask == 0).sum())


# --- the two examples that the project grew from ---------------------------------------------------------------------


def test_a_list_of_pairs_and_remove_on_the_class() -> None:
    class MyModel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(3, 16, kernel_size=3)

    def prune_model(model: MyModel, amount: float) -> None:
        parameters = [
            (model.conv1, "weight"),
        ]
        prune.l1_unstructured(parameters, amount=amount)

    model = MyModel()
    prune_model(model, amount=0.2)
    assert zeros(model.conv1.weight_mask) == round(0.2 * 432)
    weight = model.conv1.weight.detach().clone()
    prune.CustomFromMask.remove(model.conv1, name="weight")
    assert type(model.conv1) is nn.Conv2d and torch.equal(model.conv1.weight, weight)
    assert isinstance(model.conv1.weight, nn.Parameter) and not model.conv1._forward_pre_hooks


def test_remove_on_the_class_of_a_whole_model() -> None:
    net = Net()
    prune.global_unstructured(net.pairs, prune.L1Unstructured, amount=0.5)
    prune.random_unstructured(net.conv, "bias", 2)
    prune.CustomFromMask.remove(net, name="weight")
    assert prune.is_pruned(net) and [name for name, _ in net.named_buffers()] == ["conv.bias_mask"]
    assert zeros(torch.cat([module.weight.flatten() for module, _ in net.pairs])) == 144
    with pytest.raises(ValueError, match="no 'weight' in Net is pruned"):
        prune.CustomFromMask.remove(net, name="weight")
    prune.BasePruningMethod.remove(net)
    assert not prune.is_pruned(net)
    with pytest.raises(ValueError, match="nothing in Net is pruned"):
        prune.CustomFromMask.remove(net)


@pytest.mark.parametrize(
    "call",
    [
        lambda m: prune.CustomFromMask.remove(m, "weight"),
        lambda m: prune.CustomFromMask.remove(m, name="weight"),
        lambda m: prune.CustomFromMask.remove(module=m, name="weight"),
        lambda m: prune.L1Unstructured.remove(m),
        lambda m: prune.PruningContainer.remove(m, "weight"),
        lambda m: prune.remove(m, "weight"),
        lambda m: prune.remove(module=m, name="weight"),
        lambda m: prune.remove(m),
        lambda m: prune.remove([(m, "weight")]),
    ],
)
@pytest.mark.parametrize("rounds", [1, 3])
def test_every_way_to_remove(call: Callable[[nn.Module], Any], rounds: int) -> None:
    layer = nn.Linear(4, 3)
    parameter = layer.weight
    for _ in range(rounds):
        prune.l1_unstructured(layer, "weight", 2)
    call(layer)
    assert type(layer) is nn.Linear and layer.weight is parameter and not layer._forward_pre_hooks
    assert zeros(layer.weight) == 2 * rounds


def test_remove_on_an_instance_is_torch_own() -> None:
    layer = nn.Linear(4, 3)
    method = prune.L1Unstructured.apply(layer, "weight", 5)
    with pytest.raises(ValueError, match="this L1Unstructured prunes 'weight', got name='bias'"):
        method.remove(layer, name="bias")
    method.remove(layer, name="weight")
    assert type(layer) is nn.Linear and list(layer._forward_pre_hooks.values()) == [method]
    assert not prune.is_pruned(layer)
    layer(torch.ones(1, 4))  # the hook that is left does nothing
    with pytest.raises(AssertionError, match="has not been applied"):
        prune.L1Unstructured(1).remove(layer)
    prune.l1_unstructured(layer, "weight", 2)  # nor is it in the way
    assert len(layer._forward_pre_hooks) == 1 and zeros(layer.weight_mask) == 2


# --- lists -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "one_by_one, as_list",
    [
        (lambda m, n: prune.identity(m, n), lambda p: prune.identity(p)),
        (lambda m, n: prune.l1_unstructured(m, n, 0.5), lambda p: prune.l1_unstructured(p, amount=0.5)),
        (lambda m, n: prune.l1_unstructured(m, n, 2), lambda p: prune.l1_unstructured(p, 2)),
        (lambda m, n: prune.random_unstructured(m, n, 0.5), lambda p: prune.random_unstructured(p, amount=0.5)),
        (lambda m, n: prune.random_structured(m, n, 1, 0), lambda p: prune.random_structured(p, amount=1, dim=0)),
        (lambda m, n: prune.ln_structured(m, n, 1, 2, 0), lambda p: prune.ln_structured(p, amount=1, n=2, dim=0)),
    ],
)
@pytest.mark.parametrize("kind", [list, tuple, iter])
def test_lists(one_by_one: Callable[..., Any], as_list: Callable[..., Any], kind: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    a, b = Net(), Net()
    b.load_state_dict(a.state_dict())
    torch.manual_seed(1)
    for module, name in a.pairs:
        one_by_one(module, name)
    torch.manual_seed(1)
    assert as_list(kind(b.pairs)) == [module for module, _ in b.pairs]
    assert all(torch.equal(m.weight_mask, n.weight_mask) for (m, _), (n, _) in zip(a.pairs, b.pairs, strict=True))


def test_lists_with_an_argument_for_each_pair() -> None:
    net = Net()
    masks = {(module, name): (torch.rand_like(module.weight) > 0.5).float() for module, name in net.pairs}
    prune.custom_from_mask(net.pairs, mask=masks)
    assert all(torch.equal(module.weight_mask, masks[module, "weight"]) for module, _ in net.pairs)
    prune.restore(net)
    scores = {net.pairs[0]: -net.conv.weight.detach().abs()}
    prune.l1_unstructured(net.pairs, amount=1, importance_scores=scores)
    assert net.conv.weight_mask.argmin() == net.conv.weight_orig.abs().argmin()
    prune.unprune(net.pairs, where={pair: slice(None) for pair in net.pairs})
    assert all(bool(module.weight_mask.all()) for module, _ in net.pairs)
    with pytest.raises(TypeError, match="mask must be a Tensor, got NoneType"):
        prune.custom_from_mask(net.pairs, mask={net.pairs[0]: torch.ones(8, 3, 3, 3)})


def test_an_empty_list_is_no_work() -> None:
    assert prune.l1_unstructured([], amount=1) == [] and prune.remove([]) == []


# --- recovery --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounds", [1, 2])
def test_restore(rounds: int) -> None:
    net, x = Net(), torch.randn(2, 3, 4, 4)
    state, expected = dense_state(net), net(x)
    for _ in range(rounds):
        prune.global_unstructured(net.pairs, prune.L1Unstructured, amount=0.4)
        prune.random_unstructured(net.conv, "bias", 1)
    parameter = net.conv.weight_orig
    assert prune.restore(net.conv, "bias") is net.conv and prune.is_pruned(net.conv)
    assert prune.restore(net.pairs[:1]) == [net.conv] and net.conv.weight is parameter
    assert prune.restore(net) is net
    assert_dense(net, state)
    assert torch.equal(net(x), expected)
    for call in (lambda: prune.restore(net), lambda: prune.restore(net.conv, "weight")):
        with pytest.raises(ValueError, match="pruned"):
            call()


def test_restored_values_are_those_of_now() -> None:
    layer = prune.l1_unstructured(nn.Linear(4, 3), "weight", 6)
    with torch.no_grad():
        layer.weight_orig.fill_(7)
    prune.restore(layer, "weight")
    assert bool((layer.weight == 7).all())


STEPS: list[Callable[[nn.Module], Any]] = [
    lambda m: prune.l1_unstructured(m, "weight", 0.2),
    lambda m: prune.random_unstructured(m, "weight", 0.3),
    lambda m: prune.ln_structured(m, "weight", 0.3, 2, 0),
    lambda m: prune.identity(m, "weight"),
    lambda m: prune.custom_from_mask(m, "weight", torch.randint(0, 3, m.weight.shape) / 2),
    lambda m: prune.custom_from_mask(m, "weight", torch.rand(m.weight.shape) > 0.3),
    lambda m: prune.global_unstructured([(m, "weight")], prune.L1Unstructured, amount=0.3),
]


def seen(module: nn.Module) -> Any:
    if not prune.is_pruned(module):
        return type(module), module.weight.tolist(), len(module._forward_pre_hooks)
    (hook,) = module._forward_pre_hooks.values()
    rounds = [type(method) for method in hook] if isinstance(hook, prune.PruningContainer) else type(hook)
    return type(module), module.weight_mask.tolist(), module.weight_mask.dtype, rounds


@settings(max_examples=40, deadline=None)
@given(
    steps=st.lists(st.sampled_from(STEPS), min_size=1, max_size=5),
    conv=st.booleans(),
    copied=st.sampled_from([None, copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))]),
    seed=st.integers(0, 1000),
)
def test_undo_walks_back_round_by_round(
    steps: list[Callable[[nn.Module], Any]], conv: bool, copied: Any, seed: int
) -> None:
    torch.manual_seed(seed)
    module: nn.Module = nn.Conv2d(2, 5, 2) if conv else nn.Linear(6, 5)
    history = [seen(module)]
    for step in steps:
        step(module)
        history.append(seen(module))
    keys = list(module.state_dict())
    assert keys == ["bias", "weight_orig", "weight_mask"]  # nothing that undo needs is among them
    if copied:
        module = copied(module)
    while history:
        assert seen(module) == history.pop()
        if history:
            assert prune.undo(module, "weight") is module
    with pytest.raises(ValueError, match="must be pruned before a round can be undone"):
        prune.undo(module, "weight")


def test_undo_of_a_global_round_and_pruning_on() -> None:
    net = Net()
    prune.global_unstructured(net.pairs, prune.L1Unstructured, amount=0.2)
    first = [module.weight_mask.clone() for module, _ in net.pairs]
    prune.global_unstructured(net.pairs, prune.L1Unstructured, amount=0.2)
    second = [module.weight_mask.clone() for module, _ in net.pairs]
    assert prune.undo(net.pairs) == [module for module, _ in net.pairs]
    assert all(torch.equal(module.weight_mask, mask) for (module, _), mask in zip(net.pairs, first, strict=True))
    prune.global_unstructured(net.pairs, prune.L1Unstructured, amount=0.2)
    assert all(torch.equal(module.weight_mask, mask) for (module, _), mask in zip(net.pairs, second, strict=True))
    assert prune.undo(net) is net
    assert all(torch.equal(module.weight_mask, mask) for (module, _), mask in zip(net.pairs, first, strict=True))
    assert not prune.is_pruned(prune.undo(net))
    with pytest.raises(ValueError, match="nothing in Net is pruned"):
        prune.undo(net)


def test_undo_of_a_model_undoes_all_or_nothing() -> None:
    model = nn.Sequential(nn.Linear(3, 2), MaskedLinear(2, 2))
    prune.l1_unstructured(model[0], "weight", 1)
    prune.identity(model[0], "bias")
    with pytest.raises(ValueError, match="left no record"):
        prune.undo(model)
    assert len(list(model[0].buffers())) == 2
    prune.l1_unstructured(model[1], "weight", 1)
    prune.undo(model)
    assert type(model[0]) is nn.Linear and model[1].weight_mask.all()


def test_undo_revives_the_values_of_now_and_leaves_what_others_did() -> None:
    layer = prune.custom_from_mask(nn.Linear(2, 1, bias=False), "weight", torch.tensor([[1, 0]]))
    layer.weight_mask.fill_(1)  # somebody edits the mask between the rounds
    prune.custom_from_mask(layer, "weight", torch.tensor([[0, 1]]))
    with torch.no_grad():
        layer.weight_orig.copy_(torch.tensor([[5.0, 6.0]]))
    prune.undo(layer, "weight")
    assert layer.weight.tolist() == [[5, 6]]


@pytest.mark.parametrize("soft", [False, True])
def test_undo_after_a_conversion_keeps_the_dtype(soft: bool) -> None:
    layer = nn.Linear(4, 2)
    before = torch.tensor([[0.5 if soft else 1.0, 1, 0, 0], [1, 1, 1, 1]])
    prune.custom_from_mask(layer, "weight", before)
    prune.custom_from_mask(layer, "weight", torch.zeros(2, 4))
    prune.undo(layer.double(), "weight")
    assert layer.weight_mask.dtype == torch.float64 and torch.equal(layer.weight_mask, before.double())
    layer.set_mask(before.bool())
    prune.l1_unstructured(layer, "weight", 1)
    prune.undo(layer.half(), "weight")
    assert layer.weight_mask.dtype == torch.bool and torch.equal(layer.weight_mask, before.bool())


def test_undo_needs_a_record() -> None:
    layer = MaskedLinear(3, 2, mask=torch.eye(2, 3))
    with pytest.raises(ValueError, match="left no record"):
        prune.undo(layer, "weight")
    assert prune.is_pruned(layer)
    torch_prune.l1_unstructured(torch_pruned := nn.Linear(3, 2), "weight", 1)
    torch_prune.l1_unstructured(torch_pruned, "weight", 1)
    with pytest.raises(ValueError, match="left no record"):
        prune.undo(torch_pruned, "weight")
    assert type(torch_pruned) is nn.Linear and torch_prune.is_pruned(torch_pruned)


WHERE: dict[str, Callable[[], tuple[Any, torch.Tensor]]] = {
    "row": lambda: (1, torch.tensor([[0, 0, 0], [1, 1, 1]])),
    "slice": lambda: (slice(0, 1), torch.tensor([[1, 1, 1], [0, 0, 0]])),
    "tuple": lambda: ((0, 2), torch.tensor([[0, 0, 1], [0, 0, 0]])),
    "ellipsis": lambda: (..., torch.ones(2, 3)),
    "indices": lambda: ((torch.tensor([0, 1]), torch.tensor([1, 2])), torch.tensor([[0, 1, 0], [0, 0, 1]])),
    "bool": lambda: (torch.eye(2, 3).bool(), torch.eye(2, 3)),
    "nothing": lambda: (torch.zeros(2, 3, dtype=torch.bool), torch.zeros(2, 3)),
}


@pytest.mark.parametrize("kind", WHERE)
def test_unprune(kind: str) -> None:
    where, chosen = WHERE[kind]()
    layer = nn.Linear(3, 2)
    weight = layer.weight.detach().clone()
    prune.custom_from_mask(layer, "weight", torch.tensor([[0.5, 0, 1], [0, 1, 0]]))
    before, buffer = layer.weight_mask.clone(), layer.weight_mask
    assert prune.unprune(layer, "weight", where) is layer
    expected = torch.where((chosen == 1) & (before == 0), 1.0, before)
    assert torch.equal(layer.weight_mask, expected) and layer.weight_mask is buffer
    torch.testing.assert_close(layer.weight, weight * expected)


def test_unprune_errors_change_nothing() -> None:
    layer = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="must be pruned before entries can be revived"):
        prune.unprune(layer, "weight", 0)
    prune.l1_unstructured(layer, "weight", 3)
    mask = layer.weight_mask.clone()
    for where in (5, torch.ones(3, 2, dtype=torch.bool), torch.ones(2, 3), (0, 0, 0)):
        with pytest.raises(IndexError):
            prune.unprune(layer, "weight", where)
    # As an index None would mean everything, and a dict has it for a pair that it lacks.
    other = prune.l1_unstructured(nn.Linear(3, 2), "weight", 3)
    pairs: list[tuple[nn.Module, str]] = [(layer, "weight"), (other, "weight")]
    for missing in (None, {pairs[0]: 0}):
        with pytest.raises(TypeError, match="where must be an index or a bool tensor for each parameter, got None"):
            prune.unprune(pairs, where=missing)
    assert torch.equal(layer.weight_mask, mask)


def test_rounds_after_unprune() -> None:
    layer = prune.l1_unstructured(nn.Linear(4, 3), "weight", 6)
    prune.unprune(layer, "weight", ...)
    prune.l1_unstructured(layer, "weight", 0.5)  # of all twelve again
    assert zeros(layer.weight_mask) == 6
    prune.undo(layer, "weight")
    assert zeros(layer.weight_mask) == 0 and prune.is_pruned(layer)


def test_restore_beneath_an_optimizer_that_decays_weights() -> None:
    """Masked weights get no gradient, yet what the optimizer does on its own reaches them; restore shows it."""
    layer = prune.custom_from_mask(nn.Linear(2, 1, bias=False), "weight", torch.tensor([[1, 0]]))
    before = layer.weight_orig.detach().clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, weight_decay=0.5)
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    prune.restore(layer, "weight")
    torch.testing.assert_close(layer.weight[0, 1], before[0, 1] * 0.95)


# --- bits ------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 5), max_size=3),
    dtype=st.sampled_from([torch.bool, torch.int64, torch.float32, torch.bfloat16]),
    soft=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_masks_in_bits(shape: list[int], dtype: torch.dtype, soft: bool, seed: int) -> None:
    torch.manual_seed(seed)
    before = (torch.randint(0, 3, shape) / (2 if soft else 1)).clamp(max=1).to(dtype)
    after = before * (torch.rand(shape) > 0.5).to(dtype)
    packed = PackedMask(before)
    assert torch.equal(packed.unpack(), before) and packed.unpack().dtype == dtype
    change = MaskChange(before, after)
    assert torch.equal(change.revert(after.float()), before)
    if not before.dtype.is_floating_point or not soft:
        assert packed.data.nbytes == change.changed.nbytes == -(-before.numel() // 8) and change.values is None


def test_a_method_keeps_its_mask_to_itself() -> None:
    mask = torch.tensor([1.0, 0.0])
    method = prune.CustomFromMask(mask)
    mask.fill_(1)
    assert method.mask.tolist() == [1, 0]
    assert prune.CustomFromMask(torch.tensor([0.5, 0.0])).mask.tolist() == [0.5, 0]


FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
ROUNDS: tuple[Callable[[nn.Module], Any], ...] = (
    lambda m: prune.l1_unstructured(m, "weight", amount=0.25),
    lambda m: prune.random_unstructured(m, "weight", amount=5),
    lambda m: prune.ln_structured(m, "weight", amount=1, n=2, dim=0),
    lambda m: prune.random_structured(m, "weight", amount=1, dim=1),
    lambda m: prune.custom_from_mask(m, "weight", torch.arange(32).view(4, 8) % 2),
    lambda m: prune.global_unstructured([(m, "weight"), (m, "bias")], prune.L1Unstructured, amount=4),
    lambda m: prune.identity(m, "weight"),
)


@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
def test_float8(dtype: torch.dtype) -> None:
    """Torch computes next to nothing with it, and its own pruning by magnitude raises."""
    for first, second in zip(ROUNDS, (*ROUNDS[1:], ROUNDS[0]), strict=True):
        layer: Any = nn.Linear(8, 4).to(dtype)
        layer.weight.data.view(-1)[3] = float("nan")
        exact = copy.deepcopy(layer).float()
        for prune_once in (first, second):
            prune_once(layer)
            mask = layer.weight_mask
            expected = torch.where(mask == 0, 0, exact.weight)
            torch.testing.assert_close(layer.weight.float(), expected, rtol=0, atol=0, equal_nan=True)
            assert layer.sparsity == 1 - float((mask != 0).float().mean())
            entry = next(entry for entry in masked_ops.report(layer, batch=2) if entry.name == "weight")
            assert entry.nnz == int((mask != 0).sum())
        prune.unprune(layer, "weight", where=0)
        prune.undo(layer, "weight")
        layer.set_mask(layer.weight_mask.bool())
        expected = torch.where(layer.weight_mask, exact.weight, 0)
        fresh = prune.load_state_dict(copy.deepcopy(exact).to(dtype), layer.state_dict())
        assert not fresh.missing_keys
        prune.remove(layer)
        assert layer.weight.dtype == dtype
        torch.testing.assert_close(layer.weight.float(), expected, rtol=0, atol=0, equal_nan=True)
    halved = prune.L1Unstructured(amount=1).prune(torch.tensor([1.0, -3.0, 2.0]).to(dtype))
    assert halved.dtype == dtype and halved.tolist() == [0, -3, 2]
    with pytest.raises(TypeError, match=r"floating-point dtype expected, got torch\.float8_e8m0fnu"):
        prune.identity(nn.Linear(8, 4).to(torch.float8_e8m0fnu), "weight")  # which has no zero


def test_a_default_device_does_not_matter() -> None:
    """``torch.set_default_device``: what is made on the way lies where the parameters do."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Conv2d(2, 3, 1))
    same = copy.deepcopy(model)
    pairs: dict[nn.Module, list[tuple[nn.Module, str]]] = {m: [(layer, "weight") for layer in m] for m in (model, same)}
    image, rows = torch.randn(1, 2, 4, 4), torch.randn(2, 6)
    with torch.device("meta"):
        prune.global_unstructured(pairs[model], prune.L1Unstructured, amount=0.5)
        prune.ln_structured(pairs[model], amount=1, n=2, dim=0)
        prune.l1_unstructured(pairs[model], amount=0.5)
        prune.undo(model)
        pickle.loads(pickle.dumps(model))
        prune.load_state_dict(model, model.state_dict())
        outputs = model[0](rows), model[1](image)
        masked_ops.report(model, batch=1)
        masked_ops.pack(model)
        outputs += model[0](rows), model[1](image)
        masked_ops.unpack(model)
    prune.global_unstructured(pairs[same], prune.L1Unstructured, amount=0.5)
    prune.ln_structured(pairs[same], amount=1, n=2, dim=0)
    for layer, other in zip(model, same, strict=True):
        assert torch.equal(layer.weight_mask, other.weight_mask)
    for out, expected in zip(outputs, (same[0](rows), same[1](image)) * 2, strict=True):
        torch.testing.assert_close(out, expected)


def test_pruning_without_values() -> None:
    layer = prune.identity(nn.Linear(3, 2, device="meta"), "weight")
    prune.custom_from_mask(layer, "weight", torch.ones(2, 3, device="meta"))
    assert layer.weight_mask.is_meta and prune.is_pruned(layer)
    with pytest.raises(ValueError, match="left no record"):
        prune.undo(layer, "weight")
    prune.remove(layer)
    assert type(layer) is nn.Linear


# --- sparse tensors --------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("layout", "blocksize"),
    [
        (torch.sparse_coo, None),
        (torch.sparse_csr, None),
        (torch.sparse_csc, None),
        (torch.sparse_bsr, (2, 3)),
        (torch.sparse_bsc, (4, 1)),
        (torch.sparse_bsr, [8, 6]),
    ],
)
@pytest.mark.parametrize(
    "build", [lambda: nn.Linear(6, 8), lambda: nn.Conv2d(6, 8, 3), lambda: nn.ConvTranspose1d(8, 6, 2)]
)
def test_to_sparse(build: Callable[[], nn.Module], layout: torch.layout, blocksize: Any, dtype: torch.dtype) -> None:
    module = prune.l1_unstructured(build().to(dtype), "weight", amount=0.8)
    sparse = prune.to_sparse(module, layout=layout, blocksize=blocksize)
    assert sparse.layout == layout and sparse.dtype == dtype and not sparse.requires_grad
    assert torch.equal(sparse.to_dense(), module.weight.detach().flatten(1))
    kept = int(module.weight_mask.sum())
    assert sparse.values().numel() == kept if blocksize is None else sparse.values().numel() >= kept
    assert prune.is_pruned(module)
    prune.remove(module)
    assert torch.equal(prune.to_sparse(module, "weight", layout, blocksize).to_dense(), sparse.to_dense())


@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta")
def test_to_sparse_of_a_list() -> None:
    net = Net()
    prune.l1_unstructured(net.pairs, amount=0.5)
    for sparse, (module, _) in zip(prune.to_sparse(net.pairs, layout=torch.sparse_csc), net.pairs, strict=True):
        assert sparse.layout == torch.sparse_csc and torch.equal(sparse.to_dense(), module.weight.flatten(1))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"layout": torch.strided}, ValueError, "layout must be one of torch.sparse_coo.*got torch.strided"),
        ({"layout": torch.sparse_bsr}, ValueError, r"divide \[4, 6\], got None"),
        ({"layout": torch.sparse_bsr, "blocksize": (3, 3)}, ValueError, r"got \(3, 3\)"),
        ({"layout": torch.sparse_bsc, "blocksize": (0, 1)}, ValueError, r"got \(0, 1\)"),
        ({"layout": torch.sparse_bsc, "blocksize": (2,)}, ValueError, r"got \(2,\)"),
        ({"layout": torch.sparse_bsc, "blocksize": 2}, ValueError, r"divide \[4, 6\], got 2"),
        ({"layout": torch.sparse_bsc, "blocksize": (2.0, 2.0)}, ValueError, r"divide \[4, 6\], got \(2.0, 2.0\)"),
        ({"blocksize": (2, 2)}, ValueError, "blocksize is for torch.sparse_bsr"),
        ({"name": "bias"}, ValueError, r"two dimensions or more, got shape \[4\]"),
        ({"name": "in_features"}, TypeError, "Linear.in_features must be a Tensor, got int"),
    ],
)
def test_to_sparse_errors(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        prune.to_sparse(nn.Linear(6, 4), **arguments)


def test_what_is_public() -> None:
    assert masked_ops.prune is prune
    assert all(hasattr(prune, name) for name in prune.__all__)
