"""The mechanism: classes and their identity, copies and pickles, parametrizations, refusals, and the transaction."""

from __future__ import annotations

import copy
import doctest
import gc
import io
import pickle
import threading
import types
import warnings
import weakref
from typing import Any

import pytest
import torch
from interrupts import interrupted
from masked_modules import (
    Doubled,
    PlainLinear,
    Reduced,
    RefusesAssignment,
    RefusesSubclasses,
    ScaledLinear,
    Stateful,
    counted,
    linear,
    mask_and_reference,
    random_mask,
)
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune

import masked_ops
from masked_ops import _masking, functional
from masked_ops import nn as masked_nn
from masked_ops.nn import atomic, attach, detach, masked_names, path_of, set_mask

# --- user classes ----------------------------------------------------------------------------------------------------


def test_subclasses_that_keep_forward_are_fused() -> None:
    module, reference = mask_and_reference(PlainLinear(6, 5), "weight")
    assert isinstance(module, (masked_ops.MaskedLinear, PlainLinear)) and path_of(module, "weight") == "fused"
    torch.testing.assert_close(module(torch.ones(1, 6)), reference(torch.ones(1, 6)))


def test_super_forward_is_the_fused_one(monkeypatch: pytest.MonkeyPatch) -> None:
    module, reference = mask_and_reference(ScaledLinear(6, 5), "weight")
    x = torch.randn(2, 6)
    with counted(monkeypatch, functional, "masked_linear") as calls:
        torch.testing.assert_close(module(x), reference(x))
    assert len(calls) == 1 and path_of(module, "weight") == "live"


def test_a_conv_forward_of_its_own_is_respected() -> None:
    class Derived(masked_ops.MaskedConv2d):
        def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return super()._conv_forward(input, weight - weight.mean(), bias)

    layer: Any = Derived(2, 3, 3)
    layer.set_mask(random_mask(layer.weight))
    weight = layer.weight - layer.weight.mean()
    x = torch.randn(1, 2, 5, 5)
    torch.testing.assert_close(layer(x), nn.functional.conv2d(x, weight, layer.bias))
    assert path_of(layer, "weight") == "live"


def test_a_forward_of_the_instance_is_respected() -> None:
    module, reference = mask_and_reference(nn.Linear(6, 5), "weight")
    module.forward = types.MethodType(lambda self, x: nn.functional.linear(x, self.weight), module)
    x = torch.randn(2, 6)
    torch.testing.assert_close(module(x), reference(x) - reference.bias)
    assert path_of(module, "weight") == "live"


def test_subclasses_of_the_named_layers() -> None:
    class Derived(masked_ops.MaskedLinear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + 1

        def extra_repr(self) -> str:
            return f"{super().extra_repr()}, mine"

    layer: Any = Derived(6, 5, mask=torch.eye(5, 6))
    attach(layer, "bias", torch.tensor([1, 0, 0, 0, 0]))
    assert masked_names(layer) == ("weight", "bias")
    assert layer.extra_repr() == "in_features=6, out_features=5, bias=True, sparsity=0.8333, mine, bias_sparsity=0.8"
    x = torch.randn(2, 6)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias) + 1)
    detach(layer, "bias")
    assert type(layer) is Derived
    # A class that is masked by itself cannot be swapped for one that is not: it then does what a dense one does.
    param = layer.weight_orig
    detach(layer, "weight")
    assert type(layer) is Derived and layer.weight is param and list(layer.state_dict()) == ["bias", "weight"]
    assert layer.sparsity == 0 and "sparsity" not in repr(layer)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias) + 1)
    layer.weight = nn.Parameter(torch.zeros(5, 6))
    with pytest.raises(TypeError, match="cannot assign"):
        layer.weight = torch.zeros(5, 6)
    attach(layer, "weight", torch.ones(5, 6))
    assert type(layer) is Derived and path_of(layer, "weight") == "live"


def test_constructing_the_class_of_a_masked_module() -> None:
    module: Any = ScaledLinear(6, 5)
    attach(module, "weight", torch.zeros(5, 6))
    twin = type(module)(6, 5, scale=3.0)
    assert masked_names(twin) == ("weight",) and twin.sparsity == 0 and twin.scale == 3.0
    norm: Any = nn.LayerNorm(4)
    attach(norm, "weight", torch.zeros(4))
    assert type(norm)(4)(torch.ones(1, 4)).shape == (1, 4)


def test_class_names_and_identity() -> None:
    def masked(module: nn.Module, *names: str) -> type:
        for name in names:
            attach(module, name, torch.ones_like(getattr(module, name)))
        return type(module)

    assert masked(nn.Linear(2, 2), "weight") is masked_ops.MaskedLinear
    assert issubclass(masked(nn.Linear(2, 2), "weight", "bias"), masked_ops.MaskedLinear)
    assert issubclass(masked(nn.Linear(2, 2), "bias", "weight"), masked_ops.MaskedLinear)
    assert masked(PlainLinear(2, 2), "weight") is masked(PlainLinear(3, 3), "weight")
    assert masked(nn.Embedding(2, 2), "weight").__name__ == "MaskedEmbedding"
    module = nn.Linear(2, 2)
    masked(module, "bias", "weight")
    assert masked_names(module) == ("bias", "weight")
    detach(module, "bias")
    assert type(module) is masked_ops.MaskedLinear


def test_threads_that_race_agree_on_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    class Local(nn.Linear):
        pass

    modules = [Local(2, 2) for _ in range(4)]
    together = threading.Barrier(len(modules))
    new_class = types.new_class

    def slow(*args: Any) -> type:
        together.wait(60)  # all have found nothing
        made = new_class(*args)
        together.wait(60)  # all have made a class of their own
        return made

    monkeypatch.setattr(types, "new_class", slow)
    threads = [threading.Thread(target=attach, args=(module, "weight", torch.ones(2, 2))) for module in modules]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not together.broken and len({type(module) for module in modules}) == 1


def test_user_classes_are_not_kept_alive() -> None:
    class Local(nn.Linear):
        pass

    module: Any = Local(2, 2)
    attach(module, "weight", torch.ones(2, 2))
    classes = weakref.ref(Local), weakref.ref(type(module))
    detach(module, "weight")
    del module, Local
    gc.collect()
    assert [ref() for ref in classes] == [None, None]


# --- copies and pickles ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("cls", [nn.Linear, PlainLinear, ScaledLinear, Stateful, Reduced])
def test_pickle(cls: Any, protocol: int) -> None:
    module, _ = mask_and_reference(cls(6, 5), "weight", "bias")
    twin = pickle.loads(pickle.dumps(module, protocol))
    assert type(twin) is type(module) and masked_names(twin) == ("weight", "bias")
    x = torch.randn(2, 6)
    torch.testing.assert_close(twin(x), module(x))
    if cls is Stateful:
        assert twin.cache == "dropped" and twin.restored
    detach(twin, "weight")
    detach(twin, "bias")
    assert type(twin) is cls


def test_torch_save_of_whole_modules() -> None:
    model = nn.Sequential(linear(), nn.ReLU(), PlainLinear(5, 2))
    attach(model[2], "weight", torch.ones(2, 5))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    assert [type(module) for module in twin] == [type(module) for module in model]
    torch.testing.assert_close(twin(torch.ones(1, 6)), model(torch.ones(1, 6)))


def test_local_classes_pickle_as_badly_as_ever() -> None:
    class Local(nn.Linear):
        pass

    module: Any = Local(6, 5)
    with pytest.raises((pickle.PicklingError, AttributeError)) as plain:
        pickle.dumps(module)
    attach(module, "weight", torch.ones(5, 6))
    with pytest.raises(type(plain.value), match="Local"):
        pickle.dumps(module)
    assert type(copy.deepcopy(module)) is type(module)


class Outer:
    class Nested(nn.Linear):
        pass


def test_nested_classes_pickle() -> None:
    module: Any = Outer.Nested(6, 5)
    attach(module, "weight", torch.ones(5, 6))
    assert type(pickle.loads(pickle.dumps(module))) is type(module)


def test_copies_are_independent() -> None:
    layer = linear()
    layer(torch.ones(1, 6)).sum().backward()
    twin = copy.deepcopy(layer)
    twin.set_mask(torch.zeros(5, 6))
    twin.weight_orig.data.zero_()
    assert layer.weight.any() and layer.weight_mask.any()
    shallow = copy.copy(layer)
    assert shallow.weight_orig is layer.weight_orig and type(shallow) is type(layer)


# --- other people's classes and parametrizations ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["weight_orig", "weight_mask", "bias"])
def test_parametrized_after_masking(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = linear()
    x = torch.randn(2, 6)
    expected = nn.functional.linear(
        x,
        layer.weight.detach() * (2 if name.startswith("weight") else 1),
        layer.bias.detach() * (2 if name == "bias" else 1),
    )
    dense = layer(x)
    parametrize.register_parametrization(layer, name, Doubled())
    with counted(monkeypatch, functional, "masked_linear") as fused:
        torch.testing.assert_close(layer(x), expected)
    assert len(fused) == 1
    torch.testing.assert_close(layer.weight * 1, layer.weight_orig * layer.weight_mask)
    assert masked_names(layer) == ("weight",) and path_of(layer, "weight") == "fused"
    torch.testing.assert_close(copy.deepcopy(layer)(x), expected)
    if name == "bias":
        # The class of the parametrization is on top and stays; what is below does without the mask.
        attach(copy.deepcopy(layer), "weight_orig", torch.ones(5, 6))
        detach(layer, "weight")
        torch.testing.assert_close(layer(x), expected)
        parametrize.remove_parametrizations(layer, name)
        torch.testing.assert_close(layer(x), expected)
        assert isinstance(layer.weight, nn.Parameter)
    else:
        state = layer.state_dict()
        with pytest.raises(ValueError, match="something else computes"):
            detach(layer, "weight")
        if name == "weight_mask":
            with pytest.raises(ValueError, match="something else computes"):
                layer.set_mask(torch.ones(5, 6))
        assert list(layer.state_dict()) == list(state)
        parametrize.remove_parametrizations(layer, name, leave_parametrized=False)
        torch.testing.assert_close(layer(x), dense)
        detach(layer, "weight")
        torch.testing.assert_close(layer(x), dense)
        assert type(layer) is nn.Linear


def test_weight_norm() -> None:
    layer = linear()
    with pytest.raises(ValueError, match="weight"):
        nn.utils.parametrizations.weight_norm(layer, "weight")
    nn.utils.parametrizations.weight_norm(layer, "weight_orig")
    expected = layer(torch.ones(1, 6))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        old = linear(layer.weight_mask)
        old.load_state_dict({**old.state_dict(), "bias": layer.bias})
        old.weight_orig.data.copy_(layer.weight_orig)
        with pytest.raises(KeyError, match="weight"):  # torch's own; nothing has changed by then
            nn.utils.weight_norm(old, "weight")
        nn.utils.weight_norm(old, "weight_orig")
        other = nn.utils.weight_norm(nn.Linear(6, 5))
    torch.testing.assert_close(old(torch.ones(1, 6)), expected)
    with pytest.raises(ValueError, match="something else computes"):
        detach(old, "weight")
    with pytest.raises(TypeError, match="mask what it may be computed from, 'weight_g' or 'weight_v'"):
        attach(other, "weight", torch.ones(5, 6))
    attach(other, "weight_v", torch.zeros(5, 6))
    assert not other.weight_v.any()


def test_parametrized_before_masking_takes_the_hook() -> None:
    module: Any = parametrize.register_parametrization(nn.Linear(6, 5), "bias", Doubled())
    cls, param = type(module), module.weight
    mask = random_mask(param)
    with pytest.raises(ValueError, match=r"module\.parametrizations\.bias"):
        attach(module, "bias", torch.ones(5))
    attach(module, "weight", mask)
    assert type(module) is cls and path_of(module, "weight") == "hook" and masked_names(module) == ("weight",)
    x = torch.randn(2, 6)
    expected = nn.functional.linear(x, param.detach() * mask, module.bias)
    torch.testing.assert_close(module(x), expected)
    module(x).sum().backward()
    assert torch.equal(param.grad == 0, mask == 0)
    set_mask(module, "weight", 1 - mask)
    torch.testing.assert_close(module(x), nn.functional.linear(x, param.detach() * (1 - mask), module.bias))
    set_mask(module, "weight", mask)
    parametrize.remove_parametrizations(module, "bias")
    torch.testing.assert_close(module(x), expected)
    detach(module, "weight")
    assert type(module) is nn.Linear and module.weight is param and not module._forward_pre_hooks
    assert "weight" not in vars(module)
    torch.testing.assert_close(module(x), expected)


def test_a_parametrized_tensor_is_masked_at_its_original() -> None:
    module: Any = parametrize.register_parametrization(nn.Linear(6, 5), "weight", Doubled())
    parametrization = module.parametrizations.weight
    attach(parametrization, "original", torch.zeros(5, 6))
    assert not module.weight.any()
    detach(parametrization, "original")
    assert type(parametrization) is parametrize.ParametrizationList


@pytest.mark.parametrize("factory", [RefusesSubclasses, lambda: RefusesAssignment(4, 4)])
def test_classes_that_refuse_take_the_hook(factory: Any) -> None:
    if factory is RefusesSubclasses:
        module: Any = RefusesSubclasses()
    else:
        module = factory()
    cls = type(module)
    mask = random_mask(module.weight)
    attach(module, "weight", mask)
    assert type(module) is cls and path_of(module, "weight") == "hook"
    x = torch.randn(2, 4)
    expected = module(x)
    assert torch.equal(module.weight == 0, mask == 0)
    twin = pickle.loads(pickle.dumps(module)) if not expected.requires_grad else module
    torch.testing.assert_close(twin(x), expected)
    detach(module, "weight")
    torch.testing.assert_close(module(x), expected)
    assert not module._forward_pre_hooks


def test_classes_that_refuse_everything_stay_as_they_are() -> None:
    class Frozen(nn.Linear):
        def __setattr__(self, name: str, value: Any) -> None:
            if "frozen" in vars(self):
                raise TypeError(f"not {name}")
            super().__setattr__(name, value)

    module = Frozen(4, 4)
    vars(module)["frozen"] = True
    before = fingerprint(module)
    with pytest.raises(TypeError, match="not weight"):
        attach(module, "weight", torch.eye(4))
    assert fingerprint(module) == before


def test_recurrent_modules_on_the_hook() -> None:
    module: Any = parametrize.register_parametrization(nn.GRU(4, 3), "bias_ih_l0", Doubled())
    mask = random_mask(module.weight_hh_l0)
    attach(module, "weight_hh_l0", mask)
    x = torch.randn(5, 2, 4)
    out = module(x)[0]
    assert torch.equal(module._flat_weights[1] == 0, mask == 0)
    detach(module, "weight_hh_l0")
    assert module._flat_weights[1] is module.weight_hh_l0
    torch.testing.assert_close(module(x)[0], out)


# --- what is refused -------------------------------------------------------------------------------------------------


def script() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(nn.Linear(6, 5))


class Renamed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.ones(5, 6))

    @property
    def weight(self) -> nn.Parameter:
        return self.kernel


def with_attribute(name: str) -> nn.Module:
    module = nn.Linear(6, 5)
    module.register_buffer(name, torch.ones(1))
    return module


REFUSED = [
    pytest.param(lambda: "text", "weight", TypeError, "torch.nn.Module expected, got str", id="no-module"),
    pytest.param(script, "weight", TypeError, "ScriptModule", id="script"),
    pytest.param(lambda: nn.LazyLinear(5), "weight", ValueError, "call it once", id="lazy"),
    pytest.param(linear, "weight", ValueError, "masked already", id="masked"),
    pytest.param(lambda: nn.Linear(6, 5), "wait", AttributeError, "no attribute 'wait'", id="missing"),
    pytest.param(lambda: nn.Linear(6, 5, bias=False), "bias", TypeError, "got NoneType", id="none"),
    pytest.param(lambda: nn.BatchNorm1d(5), "running_mean", TypeError, "a Parameter expected, got Tensor", id="buffer"),
    pytest.param(lambda: nn.Sequential(nn.Linear(6, 5)), "0", TypeError, "got Linear", id="child"),
    pytest.param(lambda: torch.compile(nn.Linear(6, 5)), "weight", TypeError, "OptimizedModule wraps", id="compiled"),
    pytest.param(Renamed, "weight", TypeError, "Renamed cannot be masked: its own name is 'kernel'", id="property"),
    pytest.param(lambda: with_attribute("weight_orig"), "weight", ValueError, "'weight_orig' already", id="orig-taken"),
    pytest.param(lambda: with_attribute("weight_mask"), "weight", ValueError, "'weight_mask' already", id="mask-taken"),
    pytest.param(
        lambda: nn.ParameterDict({"w": nn.Parameter(torch.ones(5, 6, dtype=torch.int64), requires_grad=False)}),
        "w",
        TypeError,
        "floating-point",
        id="integers",
    ),
]


@pytest.mark.parametrize(("factory", "name", "error", "message"), REFUSED)
def test_attach_refuses(factory: Any, name: str, error: type[Exception], message: str) -> None:
    module = factory()
    state = vars(module).copy() if isinstance(module, nn.Module) else None
    with pytest.raises(error, match=message):
        attach(module, name, torch.ones(5, 6))
    if state is not None:
        assert vars(module) == state


def test_what_is_not_masked_cannot_be_changed() -> None:
    module = nn.Linear(6, 5)
    for call in (
        lambda: detach(module, "weight"),
        lambda: set_mask(module, "weight", torch.ones(5, 6)),
        lambda: path_of(module, "weight"),
    ):
        with pytest.raises(ValueError, match="'weight' of Linear is not masked; nothing is"):
            call()


def test_a_lazy_module_can_be_masked_once_it_was_called() -> None:
    module: Any = nn.LazyConv2d(3, 2)
    module(torch.ones(1, 2, 4, 4))
    attach(module, "weight", torch.zeros(3, 2, 2, 2))
    assert type(module) is masked_ops.MaskedConv2d and module.in_channels == 2


# --- the transaction -------------------------------------------------------------------------------------------------


def fingerprint(module: nn.Module) -> Any:
    """All that a half-done change could show."""
    tensors = {
        name: (id(tensor), tensor.data_ptr(), tensor.tolist())
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]
    }
    containers = {
        key: list(value) if isinstance(value, (dict, list)) else value.copy()
        for key, value in vars(module).items()
        if isinstance(value, (dict, list, set))
    }
    return (
        type(module),
        list(vars(module)),
        tensors,
        containers,
        [dict(vars(h)) for h in module._forward_pre_hooks.values()],
    )


CHANGES = [
    pytest.param(lambda: nn.Linear(2, 2), lambda m: attach(m, "weight", torch.eye(2)), id="attach"),
    pytest.param(lambda: nn.LSTM(2, 1), lambda m: attach(m, "bias_ih_l0", torch.zeros(4)), id="attach-recurrent"),
    pytest.param(
        lambda: parametrize.register_parametrization(nn.Linear(2, 2), "bias", Doubled()),
        lambda m: attach(m, "weight", torch.eye(2)),
        id="attach-hook",
    ),
    pytest.param(lambda: masked_ops.MaskedLinear(2, 2, mask=torch.eye(2)), lambda m: detach(m, "weight"), id="detach"),
    pytest.param(
        lambda: masked_ops.MaskedLinear(2, 2), lambda m: m.set_mask(torch.eye(2, dtype=torch.bool)), id="set_mask"
    ),
]


@pytest.mark.parametrize(("factory", "change"), CHANGES)
def test_an_interrupt_at_any_line_leaves_all_or_nothing(factory: Any, change: Any) -> None:
    change(factory())  # what is done once only (a class that is made, an import) is done
    original = factory()
    line, outcomes = 1, set()
    while True:
        module = copy.deepcopy(original)
        before = fingerprint(module)
        done = copy.deepcopy(original)
        change(done)
        if not interrupted(line, lambda module=module: change(module), everywhere=True):
            break
        if fingerprint(module) == before:
            outcomes.add("nothing")
        else:
            assert type(module) is type(done) and module.state_dict().keys() == done.state_dict().keys()
            for key, tensor in done.state_dict().items():
                assert torch.equal(module.state_dict()[key], tensor), f"line {line}: {key}"
            assert masked_names(module) == masked_names(done)
            outcomes.add("all")
        line += 1
    assert line > 20 and "nothing" in outcomes


def test_atomic_restores_everything_of_several_modules() -> None:
    modules: list[Any] = [linear(), nn.LSTM(4, 3), nn.Conv1d(1, 1, 1)]
    method = torch_prune.PruningContainer()
    modules[2].register_forward_pre_hook(method)
    modules[0].kept = [1, 2]
    before = [fingerprint(module) for module in modules]
    with pytest.raises(KeyboardInterrupt), atomic(modules):
        modules[0].set_mask(torch.zeros(5, 6))
        detach(modules[0], "weight")
        modules[0].kept.append(3)
        modules[0].extra = nn.ReLU()
        attach(modules[1], "weight_ih_l0", torch.zeros(12, 4))
        modules[1](torch.randn(1, 1, 4))
        method.add_pruning_method(None)
        modules[2].weight.data = torch.zeros(1, 1, 1)
        modules[2].register_forward_hook(print)
        raise KeyboardInterrupt
    assert [fingerprint(module) for module in modules] == before


def test_an_interrupt_while_restoring_leaves_nothing_half_done() -> None:
    original = nn.Sequential(linear(), nn.LSTM(2, 1))

    def fail(modules: list[Any]) -> None:
        with atomic(modules):
            modules[0].set_mask(torch.zeros(5, 6))
            detach(modules[0], "weight")
            attach(modules[1], "bias_ih_l0", torch.zeros(4))
            raise ZeroDivisionError

    line = 1
    while True:
        modules = list(copy.deepcopy(original))
        before = [fingerprint(module) for module in modules]
        try:
            more = interrupted(line, lambda modules=modules: fail(modules), start="restore", everywhere=True)
        except ZeroDivisionError:
            more = False
        assert [fingerprint(module) for module in modules] == before, f"line {line}"
        if not more:
            break
        line += 1
    assert line > 50


def test_atomic_lets_a_change_that_succeeds_stand() -> None:
    module = nn.Linear(6, 5)
    with atomic([module, module]):
        attach(module, "weight", torch.zeros(5, 6))
    assert masked_names(module) == ("weight",)


@pytest.mark.parametrize("module", [masked_nn, _masking], ids=lambda module: module.__name__)
def test_examples_in_docstrings(module: types.ModuleType) -> None:
    result = doctest.testmod(module, extraglobs={"torch": torch, "masked_ops": masked_ops})
    assert result.attempted > 10 and not result.failed
