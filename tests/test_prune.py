"""``masked_ops.prune`` against ``torch.nn.utils.prune``: the same scenario on both, from the same seed.

What torch leaves behind is the expectation: masks and states to the bit, outputs and gradients, hooks, types of errors.
"""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Callable
from types import ModuleType
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn
from torch.nn.utils import prune as torch_prune

import masked_ops
from masked_ops import prune

BOTH = [pytest.param(torch_prune, id="torch"), pytest.param(prune, id="masked_ops")]

CLASSES = [
    name
    for name, value in vars(torch_prune).items()
    if inspect.isclass(value) and value.__module__ == torch_prune.__name__
]
FUNCTIONS = [
    name
    for name, value in vars(torch_prune).items()
    if inspect.isfunction(value) and value.__module__ == torch_prune.__name__
]


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_have_torch_names_and_parameters(name: str) -> None:
    theirs = inspect.signature(getattr(torch_prune, name)).parameters
    ours = inspect.signature(getattr(prune, name)).parameters
    assert list(ours) == list(theirs)
    for parameter in theirs:
        if theirs[parameter].default is not inspect.Parameter.empty:
            assert ours[parameter].default == theirs[parameter].default


@pytest.mark.parametrize("name", CLASSES)
def test_classes_derive_from_torch_classes(name: str) -> None:
    ours = getattr(prune, name)
    assert issubclass(ours, getattr(torch_prune, name)) and issubclass(ours, prune.BasePruningMethod)
    assert ours.__module__ == "masked_ops.prune" and ours.__name__ == name
    assert getattr(ours, "PRUNING_TYPE", None) == getattr(getattr(torch_prune, name), "PRUNING_TYPE", None)
    for method in ("__init__", "compute_mask"):
        assert list(inspect.signature(getattr(ours, method)).parameters) == list(
            inspect.signature(getattr(getattr(torch_prune, name), method)).parameters
        )


def test_torch_defines_the_names_that_these_tests_know() -> None:
    """A torch with further names should make somebody look here."""
    assert {"BasePruningMethod", "PruningContainer", "Identity", "RandomUnstructured", "L1Unstructured"} <= set(CLASSES)
    assert {"RandomStructured", "LnStructured", "CustomFromMask"} <= set(CLASSES) and len(CLASSES) == 8
    assert {"identity", "global_unstructured", "remove", "is_pruned", "_compute_norm"} <= set(FUNCTIONS)
    assert len(FUNCTIONS) == 15


# --- scenarios -------------------------------------------------------------------------------------------------------


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.linear = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm(self.conv(x)).mean((2, 3)))


def build_embedding() -> nn.Module:
    return nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 2))


MODULES: dict[str, tuple[Callable[[], nn.Module], Callable[[], torch.Tensor]]] = {
    "linear": (lambda: nn.Linear(6, 4), lambda: torch.randn(3, 6)),
    "linear, no bias": (lambda: nn.Linear(6, 4, bias=False), lambda: torch.randn(3, 6)),
    "linear, float64": (lambda: nn.Linear(6, 4).double(), lambda: torch.randn(3, 6).double()),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, groups=2), lambda: torch.randn(2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 6, 3, padding="same"), lambda: torch.randn(2, 3, 7, 7)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2), lambda: torch.randn(1, 2, 4, 4, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 4, 3, stride=2), lambda: torch.randn(2, 3, 4, 4)),
    "lstm": (lambda: nn.LSTM(4, 3), lambda: torch.randn(5, 2, 4)),
    "bilinear": (lambda: nn.Bilinear(3, 4, 5), lambda: torch.randn(2, 3)),
}


def weight_name(module: nn.Module) -> str:
    return "weight_ih_l0" if isinstance(module, nn.LSTM) else "weight"


def call(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    if isinstance(module, nn.Bilinear):
        return module(x, torch.ones(x.shape[0], module.in2_features))
    y = module(x)
    return y[0] if isinstance(y, tuple) else y


def hooks_of(module: nn.Module) -> list[Any]:
    return [
        [type(method).__name__ for method in hook]
        if isinstance(hook, torch_prune.PruningContainer)
        else type(hook).__name__
        for hook in module._forward_pre_hooks.values()
    ]


def observe(module: nn.Module, x: torch.Tensor | None = None) -> dict[str, Any]:
    """All that user code can see of a module; with ``x``, of a forward and backward too."""
    seen: dict[str, Any] = {"hooks": hooks_of(module)}
    if x is not None:
        module.zero_grad()
        output = call(module, x)
        output.square().sum().backward()
        seen["output"] = output.detach()
        seen["grads"] = {name: parameter.grad for name, parameter in module.named_parameters()}
    seen["state"] = {key: value.clone() for key, value in module.state_dict().items()}
    seen["keys"] = list(seen["state"])
    seen["parameters"] = [name for name, _ in module.named_parameters()]
    seen["buffers"] = [name for name, _ in module.named_buffers()]
    for name in ("weight", "bias", "weight_ih_l0"):
        if isinstance(getattr(module, name, None), torch.Tensor):
            value = getattr(module, name)
            seen[name] = value.detach().clone()
            seen[f"{name} is"] = (type(value), value.is_leaf, value.requires_grad, value.dtype, value.stride())
    return seen


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for key in theirs:
        if key in ("output", "grads"):
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=1e-4)
        elif key == "state":
            for name in theirs[key]:
                assert ours[key][name].dtype == theirs[key][name].dtype, name
                assert torch.equal(ours[key][name], theirs[key][name]), name
        elif isinstance(theirs[key], torch.Tensor):
            assert torch.equal(ours[key], theirs[key]), key
        else:
            assert ours[key] == theirs[key], key


def step(function: str, *args: Any, on: str | None = None, **kwargs: Any) -> Callable[[ModuleType, nn.Module], None]:
    def take(library: ModuleType, module: nn.Module) -> None:
        getattr(library, function)(module, on or weight_name(module), *args, **kwargs)

    return take


def scores(amount: float) -> Callable[[ModuleType, nn.Module], None]:
    def take(library: ModuleType, module: nn.Module) -> None:
        weight = getattr(module, weight_name(module))
        importance = torch.rand(weight.shape, dtype=weight.dtype)
        library.l1_unstructured(module, weight_name(module), amount, importance_scores=importance)

    return take


def half_mask(dtype: torch.dtype) -> Callable[[ModuleType, nn.Module], None]:
    def take(library: ModuleType, module: nn.Module) -> None:
        weight = getattr(module, weight_name(module))
        library.custom_from_mask(module, weight_name(module), (torch.rand(weight.shape) > 0.5).to(dtype))

    return take


def soft_mask(library: ModuleType, module: nn.Module) -> None:
    weight = getattr(module, weight_name(module))
    library.custom_from_mask(module, weight_name(module), torch.randint(0, 3, weight.shape) / 2)


SCENARIOS: dict[str, list[Callable[[ModuleType, nn.Module], None]]] = {
    "identity": [step("identity")],
    "random": [step("random_unstructured", 0.3)],
    "random count": [step("random_unstructured", amount=5)],
    "random, none": [step("random_unstructured", 0)],
    "random, all": [step("random_unstructured", 1.0)],
    "l1": [step("l1_unstructured", amount=0.4)],
    "l1 by scores": [scores(0.5)],
    "random structured": [step("random_structured", 0.5, 0)],
    "random structured, last": [step("random_structured", 1, -1)],
    "random structured, none": [step("random_structured", 0.0, 1)],
    "ln 2": [step("ln_structured", 0.5, 2, 0)],
    "ln 1": [step("ln_structured", amount=1, n=1, dim=1)],
    "ln inf": [step("ln_structured", amount=0.25, n=float("inf"), dim=-1)],
    "ln -inf": [step("ln_structured", amount=0.5, n=float("-inf"), dim=0)],
    "ln, none": [step("ln_structured", amount=0, n=2, dim=0)],
    "bool mask": [half_mask(torch.bool)],
    "integer mask": [half_mask(torch.int64)],
    "soft mask": [soft_mask],
    "l1 twice": [step("l1_unstructured", amount=0.25), step("l1_unstructured", amount=0.25)],
    "l1, l1 by scores": [step("l1_unstructured", amount=0.25), scores(0.25)],
    "random twice": [step("random_unstructured", 0.5), step("random_unstructured", 3)],
    "l1, ln": [step("l1_unstructured", amount=0.25), step("ln_structured", amount=1, n=2, dim=0)],
    "ln, random structured": [step("ln_structured", amount=1, n=2, dim=0), step("random_structured", 1, 0)],
    "ln twice": [step("ln_structured", amount=0.5, n=2, dim=0), step("ln_structured", amount=0.5, n=1, dim=0)],
    "structured, then entries": [step("random_structured", 1, 1), step("l1_unstructured", 0.5)],
    "masks": [half_mask(torch.bool), half_mask(torch.float32)],
    "soft, l1": [soft_mask, step("l1_unstructured", 1)],
    "identity, l1, identity": [step("identity"), step("l1_unstructured", 0.5), step("identity")],
    "four rounds": [
        step("l1_unstructured", amount=0.2),
        step("random_unstructured", 0.2),
        step("ln_structured", amount=1, n=2, dim=0),
        half_mask(torch.bool),
    ],
    "removed": [step("l1_unstructured", amount=0.5), step("remove")],
    "removed, pruned again": [step("l1_unstructured", amount=0.5), step("remove"), step("l1_unstructured", amount=0.6)],
    "three rounds, removed": [
        step("random_unstructured", 1),
        step("random_unstructured", 1),
        step("random_unstructured", 1),
        step("remove"),
    ],
}


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("kind", MODULES)
def test_scenarios(kind: str, scenario: str) -> None:
    build, build_input = MODULES[kind]
    seen: list[list[dict[str, Any]]] = []
    for library in (torch_prune, prune):
        torch.manual_seed(1)
        module, x = build(), build_input()
        observations = []
        for take in SCENARIOS[scenario]:
            take(library, module)
            observations += [observe(module), observe(module, x)]
        seen.append(observations)
    for theirs, ours in zip(*seen, strict=True):
        assert_same(ours, theirs)


@pytest.mark.parametrize("kind", ["linear", "conv2d", "bilinear"])
def test_two_parameters_of_one_module(kind: str) -> None:
    build, build_input = MODULES[kind]
    seen = []
    for library in (torch_prune, prune):
        torch.manual_seed(2)
        module, x = build(), build_input()
        observations = []
        for take in (
            step("l1_unstructured", 0.5),
            step("random_unstructured", 1, on="bias"),
            step("l1_unstructured", 1, on="weight"),
            step("remove", on="weight"),
            step("remove", on="bias"),
        ):
            take(library, module)
            observations.append(observe(module, x))
        seen.append(observations)
    for theirs, ours in zip(*seen, strict=True):
        assert_same(ours, theirs)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=2, max_size=4),
    rounds=st.lists(
        st.tuples(
            st.sampled_from(["random_unstructured", "l1_unstructured", "random_structured", "ln_structured"]),
            st.one_of(st.floats(0, 1), st.integers(0, 3)),
            st.integers(-4, 3),
            st.sampled_from([1, 2, 0.5, float("inf")]),
        ),
        min_size=1,
        max_size=4,
    ),
    seed=st.integers(0, 2**31),
)
def test_any_rounds_on_any_shape(shape: list[int], rounds: list[tuple[str, float, int, float]], seed: int) -> None:
    """Masks are torch's to the bit, and where torch raises so do we, with nothing changed."""
    modules = {}
    for library in (torch_prune, prune):
        torch.manual_seed(seed)
        modules[library] = nn.Module()
        modules[library].register_parameter("weight", nn.Parameter(torch.randn(shape)))
    for index, (function, amount, dim, n) in enumerate(rounds):
        arguments: dict[str, Any] = {"amount": amount}
        if function.endswith("_structured"):
            arguments["dim"] = dim
        if function == "ln_structured":
            arguments["n"] = n
        raised: dict[ModuleType, BaseException | None] = {}
        before = {key: value.clone() for key, value in modules[prune].state_dict().items()}
        for library, module in modules.items():
            torch.manual_seed(seed + index)
            try:
                getattr(library, function)(module, "weight", **arguments)
                raised[library] = None
            except Exception as error:
                raised[library] = error
        assert type(raised[prune]) is type(raised[torch_prune]), raised
        if raised[prune] is not None:
            after = modules[prune].state_dict()
            assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)
            return
        assert torch.equal(modules[prune].weight_mask, modules[torch_prune].weight_mask)
        assert torch.equal(modules[prune].weight, modules[torch_prune].weight)


# --- global pruning --------------------------------------------------------------------------------------------------


def pairs_of(model: nn.Module) -> list[tuple[nn.Module, str]]:
    return [(model.conv, "weight"), (model.linear, "weight"), (model.linear, "bias")]


def only_conv(model: nn.Module) -> dict[tuple[nn.Module, str], torch.Tensor]:
    return {(model.conv, "weight"): torch.rand_like(model.conv.weight)}


GLOBAL: dict[str, Callable[[ModuleType, nn.Module], None]] = {
    "l1": lambda p, m: p.global_unstructured(pairs_of(m), p.L1Unstructured, amount=0.3),
    "l1 count": lambda p, m: p.global_unstructured(tuple(pairs_of(m)), pruning_method=p.L1Unstructured, amount=40),
    "random": lambda p, m: p.global_unstructured(pairs_of(m), p.RandomUnstructured, amount=0.5),
    "scores": lambda p, m: p.global_unstructured(pairs_of(m), p.L1Unstructured, only_conv(m), amount=0.5),
    "identity": lambda p, m: p.global_unstructured(pairs_of(m), p.Identity),
}


@pytest.mark.parametrize("first", GLOBAL)
@pytest.mark.parametrize("second", [None, *GLOBAL])
@pytest.mark.parametrize("local", [False, True])
def test_global_pruning(first: str, second: str | None, local: bool) -> None:
    seen = []
    for library in (torch_prune, prune):
        torch.manual_seed(3)
        model, x = Both(), torch.randn(4, 3, 6, 6)
        if local:
            library.ln_structured(model.linear, "weight", amount=1, n=2, dim=0)
        assert GLOBAL[first](library, model) is None
        if second:
            GLOBAL[second](library, model)
        seen.append([observe(model, x), observe(model.conv), observe(model.linear)])
    for theirs, ours in zip(*seen, strict=True):
        assert_same(ours, theirs)


def test_global_pruning_mixes_dtypes_as_torch_does() -> None:
    masks = []
    for library in (torch_prune, prune):
        torch.manual_seed(4)
        a, b = nn.Linear(4, 4), nn.Linear(4, 4).double()
        library.global_unstructured([(a, "weight"), (b, "weight")], library.L1Unstructured, amount=0.5)
        masks.append((a.weight_mask, b.weight_mask))
    torch.testing.assert_close(masks[0], masks[1], rtol=0, atol=0)


# --- methods of the user's -------------------------------------------------------------------------------------------


def make_methods(base: type) -> dict[str, type]:
    class EveryOther(base):
        PRUNING_TYPE = "unstructured"

        def compute_mask(self, t: torch.Tensor, default_mask: torch.Tensor) -> torch.Tensor:
            mask = default_mask.clone()
            mask.view(-1)[::2] = 0
            return mask

    class InPlace(base):
        PRUNING_TYPE = "global"

        def compute_mask(self, t: torch.Tensor, default_mask: torch.Tensor) -> torch.Tensor:
            assert default_mask.is_contiguous()
            default_mask.view(-1)[:3] = 0
            return default_mask

    class Bool(base):
        PRUNING_TYPE = "unstructured"

        def __init__(self, threshold: float) -> None:
            self.threshold = threshold

        def compute_mask(self, scores: torch.Tensor, *, default_mask: torch.Tensor) -> torch.Tensor:
            return scores.abs() > self.threshold

    class FirstRows(base):
        PRUNING_TYPE = "structured"
        dim = 0

        def compute_mask(self, t: torch.Tensor, default_mask: torch.Tensor) -> torch.Tensor:
            mask = default_mask.clone()
            mask[:1] = 0
            return mask

        @classmethod
        def apply(cls, module: nn.Module, name: str) -> torch_prune.BasePruningMethod:
            return super().apply(module, name)

    return {cls.__name__: cls for cls in (EveryOther, InPlace, Bool, FirstRows)}


@pytest.mark.parametrize("name", ["EveryOther", "InPlace", "FirstRows"])
@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_methods_of_the_users(name: str, rounds: int, kind: str) -> None:
    build, build_input = MODULES[kind]
    seen = []
    for library in (torch_prune, prune):
        method = make_methods(library.BasePruningMethod)[name]
        torch.manual_seed(5)
        module, x = build(), build_input()
        for _ in range(rounds):
            applied = method.apply(module, "weight")
        assert applied is next(iter(module._forward_pre_hooks.values()))
        seen.append(observe(module, x))
    assert_same(seen[1], seen[0])


def test_a_mask_keeps_the_dtype_that_the_users_method_returned() -> None:
    for library in (torch_prune, prune):
        layer = nn.Linear(4, 3)
        make_methods(library.BasePruningMethod)["Bool"].apply(layer, "weight", threshold=0.2)
        assert layer.weight_mask.dtype == torch.bool
        assert torch.equal(layer.weight_mask, layer.weight_orig.abs() > 0.2)
        assert torch.equal(layer.weight == 0, ~layer.weight_mask)


@pytest.mark.parametrize("name", ["EveryOther", "InPlace", "FirstRows"])
def test_methods_derived_from_torch_go_on_where_ours_began(name: str) -> None:
    """A subclass of torch's class, written before anybody thought of masked_ops, on its own and through ours."""
    method = make_methods(torch_prune.BasePruningMethod)[name]
    layer = nn.Linear(4, 3)
    method.apply(layer, "weight")
    expected = layer.weight_mask.clone()
    prune.l1_unstructured(layer, "weight", amount=1)
    assert prune.is_pruned(layer) and int((expected - layer.weight_mask).sum()) == 1
    hook = next(iter(layer._forward_pre_hooks.values()))
    assert isinstance(hook, prune.PruningContainer) and isinstance(hook[0], method) and len(hook) == 2


def test_global_pruning_by_a_method_derived_from_torch() -> None:
    method = make_methods(torch_prune.BasePruningMethod)["EveryOther"]
    a, b = nn.Linear(4, 2), nn.Linear(3, 1)
    prune.global_unstructured([(a, "weight"), (b, "weight")], method)
    assert a.weight_mask.flatten().tolist() == [0, 1] * 4 and b.weight_mask.flatten().tolist() == [0, 1, 0]


def test_a_method_that_masks_in_its_own_way() -> None:
    """``apply_mask`` overridden: torch's own mechanics serve, and remove() asks the method."""
    seen = []
    for library in (torch_prune, prune):

        class Scaled(library.BasePruningMethod):
            PRUNING_TYPE = "global"

            def compute_mask(self, t: torch.Tensor, default_mask: torch.Tensor) -> torch.Tensor:
                default_mask[0] = 0
                return default_mask

            def apply_mask(self, module: nn.Module) -> torch.Tensor:
                return 2 * super().apply_mask(module)

        torch.manual_seed(6)
        layer, x = nn.Linear(4, 3), torch.randn(2, 4)
        Scaled.apply(layer, "weight")
        first = observe(layer, x)
        assert library.is_pruned(layer)
        with torch.no_grad():
            layer.weight_orig.add_(1)
        second = observe(layer, x)
        library.remove(layer, "weight")
        seen.append([first, second, observe(layer, x)])
    for theirs, ours in zip(*seen, strict=True):
        assert_same(ours, theirs)


def test_what_compute_mask_returns_is_broadcast_and_copied() -> None:
    class Rows(prune.BasePruningMethod):
        PRUNING_TYPE = "global"
        row = torch.tensor([[1.0], [0.0], [1.0]])

        def compute_mask(self, t: torch.Tensor, default_mask: torch.Tensor) -> torch.Tensor:
            return self.row

    layer = nn.Linear(4, 3)
    Rows.apply(layer, "weight")
    assert layer.weight_mask.shape == (3, 4) and layer.weight_mask.is_contiguous()
    layer.weight_mask.zero_()
    assert Rows.row.sum() == 2


# --- single methods --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", BOTH)
def test_methods_without_a_module(library: ModuleType) -> None:
    t = torch.tensor([[1.0, -2.0, 3.0], [-4.0, 5.0, -6.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert torch.equal(library.L1Unstructured(amount=2).prune(t, mask), torch.tensor([[0.0, 0, 0], [-4.0, 5.0, -6.0]]))
    by_scores = library.L1Unstructured(amount=2).prune(t, importance_scores=t.flip(0))
    assert torch.equal(by_scores, torch.tensor([[1.0, -2.0, 3.0], [0, 0, -6.0]]))
    assert torch.equal(library.LnStructured(1, 2, 0).prune(t), torch.tensor([[0.0, 0, 0], [-4.0, 5.0, -6.0]]))
    assert torch.equal(library.CustomFromMask(mask).prune(t), t * mask)
    assert torch.equal(library.CustomFromMask(mask).mask, mask)
    assert library.RandomStructured(1).dim == -1 and library.LnStructured(1, 2).dim == -1
    with pytest.raises(AssertionError):
        library.L1Unstructured(amount=2).prune(t, importance_scores=t[0])


@pytest.mark.parametrize("library", BOTH)
def test_containers(library: ModuleType) -> None:
    container = library.PruningContainer()
    container._tensor_name = "weight"
    methods = [library.L1Unstructured(amount=1), library.LnStructured(amount=1, n=2, dim=0)]
    for method in methods:
        method._tensor_name = "weight"
        container.add_pruning_method(method)
    assert len(container) == 2 and list(container) == methods and container[1] is methods[1]
    t, mask = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0, 1], [1, 1]])
    assert torch.equal(container.compute_mask(t, mask), torch.tensor([[0.0, 0], [1, 1]]))
    other = library.L1Unstructured(amount=1)
    other._tensor_name = "bias"
    with pytest.raises(ValueError):
        container.add_pruning_method(other)
    for wrong in (10, "weight"):
        with pytest.raises(TypeError):
            container.add_pruning_method(wrong)
    assert len(container) == 2


@pytest.mark.parametrize("library", BOTH)
def test_apply_returns_the_method_and_functions_the_module(library: ModuleType) -> None:
    layer = nn.Linear(4, 3)
    assert library.l1_unstructured(layer, "weight", 1) is layer
    (first,) = layer._forward_pre_hooks.values()
    second = library.RandomStructured.apply(layer, "weight", 1)
    assert isinstance(second, library.PruningContainer) and second[0] is first and second._tensor_name == "weight"
    assert list(layer._forward_pre_hooks.values()) == [second]
    assert library.L1Unstructured.apply(layer, "weight", 1) is second and len(second) == 3
    assert library.remove(layer, "weight") is layer and not layer._forward_pre_hooks


@pytest.mark.parametrize("library", BOTH)
def test_methods_that_are_removed_by_hand_leave_the_hook_to_their_caller(library: ModuleType) -> None:
    """The pattern of Lightning's callback."""
    layer = nn.Linear(4, 3)
    library.l1_unstructured(layer, "weight", 0.5)
    weight = layer.weight.detach().clone()
    (key,) = layer._forward_pre_hooks
    layer._forward_pre_hooks[key].remove(layer)
    assert key in layer._forward_pre_hooks
    del layer._forward_pre_hooks[key]
    assert torch.equal(layer.weight, weight) and isinstance(layer.weight, nn.Parameter)
    assert not library.is_pruned(layer) and list(layer.state_dict()) == ["bias", "weight"]


@pytest.mark.parametrize("library", BOTH)
def test_amounts(library: ModuleType) -> None:
    for bad in ("0.5", None, 1j, torch.tensor(0.5)):
        with pytest.raises(TypeError):
            library._validate_pruning_amount_init(bad)
    for bad in (-1, 1.01, -0.1, float("inf")):
        with pytest.raises(ValueError):
            library._validate_pruning_amount_init(bad)
    for amount, size, count in ((0.5, 5, 2), (0.5, 7, 4), (0.25, 10, 2), (3, 5, 3), (1.0, 5, 5), (True, 5, 1)):
        assert library._compute_nparams_toprune(amount, size) == count
    with pytest.raises(ValueError):
        library._validate_pruning_amount(6, 5)
    layer = nn.Linear(4, 3)
    library.l1_unstructured(layer, "weight", 0.25)
    library.l1_unstructured(layer, "weight", 0.25)  # of the nine that remain: round(2.25)
    assert int((layer.weight_mask == 0).sum()) == 5


# --- state -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", BOTH)
def test_the_parameter_is_the_same_object_throughout(library: ModuleType) -> None:
    layer = nn.Linear(4, 3)
    parameter = layer.weight
    parameter.grad = gradient = torch.ones_like(parameter)
    for _ in range(2):
        library.l1_unstructured(layer, "weight", 2)
        assert layer.weight_orig is parameter and layer.weight_orig.grad is gradient
    library.remove(layer, "weight")
    assert layer.weight is parameter and layer.weight.grad is gradient
    assert list(layer._parameters) == ["bias", "weight"]


@pytest.mark.parametrize("library", BOTH)
def test_an_old_mask_stays_what_it_was(library: ModuleType) -> None:
    """Pruning again makes a new buffer: graphs that wait for their backward keep the mask of their forward."""
    layer = nn.Linear(4, 3)
    library.l1_unstructured(layer, "weight", 2)
    first = layer.weight_mask
    loss = layer(torch.ones(1, 4)).sum()
    library.l1_unstructured(layer, "weight", 5)
    assert int(first.sum()) == 10 and int(layer.weight_mask.sum()) == 5
    loss.backward()
    assert torch.equal(layer.weight_orig.grad, first)


@pytest.mark.parametrize("library", BOTH)
def test_pickles(library: ModuleType) -> None:
    layer = nn.Linear(4, 3)
    library.l1_unstructured(layer, "weight", 2)
    library.ln_structured(layer, "weight", 1, 2, 0)
    again = pickle.loads(pickle.dumps(layer))
    assert isinstance(again, type(layer)) and hooks_of(again) == hooks_of(layer)
    assert torch.equal(again.weight, layer.weight) and library.is_pruned(again)
    library.remove(again, "weight")
    assert library.is_pruned(layer)


@pytest.mark.parametrize("library", BOTH)
def test_rnn_flat_weights(library: ModuleType) -> None:
    lstm = nn.LSTM(5, 4)
    library.l1_unstructured(lstm, "weight_hh_l0", 0.5)
    assert sum(isinstance(weight, nn.Parameter) for weight in lstm._flat_weights) == 3
    assert torch.equal(lstm._flat_weights[1], lstm.weight_hh_l0)
    library.remove(lstm, "weight_hh_l0")
    assert sum(isinstance(weight, nn.Parameter) for weight in lstm._flat_weights) == 4
    assert lstm._flat_weights[1] is lstm.weight_hh_l0


def test_states_load_both_ways() -> None:
    for source, target in ((torch_prune, prune), (prune, torch_prune)):
        a, b = Both(), Both()
        for model, library in ((a, source), (b, target)):
            library.l1_unstructured(model.conv, "weight", 0.5)
            library.random_unstructured(model.linear, "bias", 2)
        b.load_state_dict(a.state_dict())
        x = torch.randn(2, 3, 5, 5)
        torch.testing.assert_close(b.eval()(x), a.eval()(x))


# --- errors ----------------------------------------------------------------------------------------------------------


def prune_twice(library: ModuleType, layer: nn.Module, pruning_type: str) -> None:
    class Method(library.BasePruningMethod):
        PRUNING_TYPE = pruning_type

        def compute_mask(self, t: torch.Tensor, default_mask: torch.Tensor) -> torch.Tensor:
            return default_mask

    library.identity(layer, "weight")
    Method.apply(layer, "weight")


ERRORS: dict[str, Callable[[ModuleType, nn.Module], Any]] = {
    "amount of the wrong type": lambda p, m: p.l1_unstructured(m, "weight", "0.5"),
    "amount missing": lambda p, m: p.l1_unstructured(m, "weight"),
    "name missing": lambda p, m: p.l1_unstructured(m, amount=1),
    "fraction over 1": lambda p, m: p.random_unstructured(m, "weight", 1.5),
    "count below 0": lambda p, m: p.random_unstructured(m, "weight", -2),
    "count too large": lambda p, m: p.l1_unstructured(m, "weight", 1000),
    "channels too many": lambda p, m: p.ln_structured(m, "weight", 1000, 2, 0),
    "random channels too many": lambda p, m: p.random_structured(m, "weight", 1000, 0),
    "structured bias": lambda p, m: p.ln_structured(m, "bias", 1, 2, 0),
    "random structured bias": lambda p, m: p.random_structured(m, "bias", 1, 0),
    "no such dimension": lambda p, m: p.ln_structured(m, "weight", 1, 2, 2),
    "no such dimension from the end": lambda p, m: p.random_structured(m, "weight", 1, -3),
    "no such parameter": lambda p, m: p.l1_unstructured(m, "weights", 1),
    "scores of another shape": lambda p, m: p.l1_unstructured(m, "weight", 1, importance_scores=torch.ones(2, 2)),
    "mask of another shape": lambda p, m: p.custom_from_mask(m, "weight", torch.ones(2, 2)),
    "mask that would broadcast": lambda p, m: p.custom_from_mask(m, "weight", torch.ones(4)),
    "removing from the unpruned": lambda p, m: p.remove(m, "weight"),
    "removing from a container": lambda p, m: p.remove(nn.Sequential(p.identity(m, "weight")), "weight"),
    "removing what does not exist": lambda p, m: p.remove(m, "weights"),
    "None": lambda p, m: p.l1_unstructured(nn.Linear(2, 2, bias=False), "bias", 1),
    "structured without dim": lambda p, m: prune_twice(p, m, "structured"),
    "unknown PRUNING_TYPE": lambda p, m: prune_twice(p, m, "odd"),
    "global, not iterable": lambda p, m: p.global_unstructured(5, p.L1Unstructured, amount=1),
    "global, scores not a dict": lambda p, m: p.global_unstructured(
        [(m, "weight")], p.L1Unstructured, importance_scores=[m.weight], amount=1
    ),
    "global, structured": lambda p, m: p.global_unstructured([(m, "weight")], p.RandomStructured, amount=1),
    "global, by masks": lambda p, m: p.global_unstructured([(m, "weight")], p.CustomFromMask, mask=m.weight),
    "global, too many": lambda p, m: p.global_unstructured([(m, "weight")], p.L1Unstructured, amount=1000),
    "global, no parameters": lambda p, m: p.global_unstructured([], p.L1Unstructured, amount=1),
    "the base class": lambda p, m: p.BasePruningMethod.apply(m, "weight"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_have_torch_types_and_change_nothing(case: str) -> None:
    with pytest.raises(Exception) as theirs:
        ERRORS[case](torch_prune, nn.Linear(4, 3))
    layer = nn.Linear(4, 3)
    kept = layer.weight
    with pytest.raises(Exception) as ours:
        ERRORS[case](prune, layer)
    assert ours.type is theirs.type
    if not prune.is_pruned(layer):  # some cases prune first
        assert type(layer) is nn.Linear and layer.weight is kept and not layer._forward_pre_hooks
        assert list(layer.state_dict()) == ["weight", "bias"]


linear = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: prune.l1_unstructured(5, "weight", 1), "module must be a torch.nn.Module or a list"),
        (lambda: prune.l1_unstructured([nn.Linear(2, 2)], amount=1), r"\(module, name\) pair, got Linear"),
        (lambda: prune.l1_unstructured([("weight", 1)], amount=1), r"got \(str, int\)"),
        (lambda: prune.l1_unstructured(torch.ones(2), amount=1), "module must be a .* got Tensor"),
        (
            lambda: prune.l1_unstructured([(nn.Linear(2, 2), "weight")], name="weight", amount=1),
            "must not be given with",
        ),
        (lambda: prune.l1_unstructured(nn.Linear(2, 2), "weight", 1, [1.0]), "importance_scores must be a Tensor, got"),
        (
            lambda: prune.global_unstructured([(linear, "weight")], prune.L1Unstructured, {(linear, "weight"): 1}),
            "importance_scores must hold a Tensor for weight, got int",
        ),
        (lambda: prune.identity(nn.Linear(2, 2), 5), "name must be a str"),
        (lambda: prune.is_pruned([nn.Linear(2, 2)]), "module: torch.nn.Module expected, got list"),
        (lambda: prune.CustomFromMask.remove({}), "module: torch.nn.Module expected, got dict"),
        (lambda: prune.load_state_dict(None, {}), "module: torch.nn.Module expected, got NoneType"),
        (lambda: masked_ops.report(nn.Linear), "module: torch.nn.Module expected, got type"),
        (lambda: masked_ops.nn.masked_names(1), "module: torch.nn.Module expected, got int"),
        (lambda: masked_ops.nn.detach(None, "weight"), "module: torch.nn.Module expected, got NoneType"),
        (
            lambda: prune.identity(nn.Linear(2, 2, bias=False), "bias"),
            "'bias' of Linear cannot be masked: a Parameter expected, got NoneType",
        ),
        (
            lambda: prune.identity(nn.BatchNorm1d(2), "running_mean"),
            "'running_mean' of BatchNorm1d cannot be masked: a Parameter expected, got Tensor",
        ),
    ],
)
def test_errors_say_what_came_and_what_is_accepted(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call()


META, SPARSE = torch.ones(2, 3, device="meta"), torch.ones(2, 3).to_sparse()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: prune.l1_unstructured(m, "weight", 1, META), "have values, as weight on cpu has, got .* on meta"),
        (lambda m: prune.l1_unstructured(m, "weight", 1, SPARSE), "must be dense .* got torch.sparse_coo on cpu"),
        (
            lambda m: prune.global_unstructured([(m, "weight")], prune.L1Unstructured, {(m, "weight"): META}, amount=1),
            "have values, as weight on cpu has, got .* on meta",
        ),
        (lambda m: prune.custom_from_mask(m, "weight", META), "mask must have values, as the parameter on cpu has"),
    ],
)
def test_what_has_no_values_to_judge_by_is_refused(call: Callable[[Any], Any], message: str) -> None:
    """Torch silently prunes nothing by scores on the meta device."""
    layer = nn.Linear(3, 2)
    with pytest.raises(RuntimeError, match=message):
        call(layer)
    assert type(layer) is nn.Linear and list(layer.state_dict()) == ["weight", "bias"]


def test_a_sparse_mask_is_taken_as_torch_takes_it() -> None:
    layer = prune.custom_from_mask(nn.Linear(3, 2), "weight", torch.eye(2, 3).to_sparse())
    assert torch.equal(layer.weight_mask, torch.eye(2, 3))
