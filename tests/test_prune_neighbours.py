"""``masked_ops.prune`` among others: what torch pruned, masked layers, classes that cannot be swapped, Lightning."""

from __future__ import annotations

import copy
import importlib.util
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune

import masked_ops
from masked_ops import MaskedLinear, prune


def zeros(mask: torch.Tensor) -> int:
    return int((mask == 0).sum())


# --- beside torch's own ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounds", [1, 2])
def test_modules_that_torch_pruned(rounds: int) -> None:
    def start() -> nn.Linear:
        torch.manual_seed(0)
        layer = nn.Linear(6, 4)
        for _ in range(rounds):
            torch_prune.l1_unstructured(layer, "weight", 4)
        return layer

    layer = start()
    assert prune.is_pruned(layer) and prune.is_pruned(nn.Sequential(layer))
    with torch.no_grad():
        layer.weight_orig.add_(1)  # torch's module.weight is stale now
    parameter, expected = layer.weight_orig, layer.weight_orig.detach() * layer.weight_mask
    prune.remove(layer, "weight")
    assert layer.weight is parameter and torch.equal(layer.weight, expected) and not layer._forward_pre_hooks

    layer = start()
    prune.l1_unstructured(layer, "weight", 4)
    (container,) = layer._forward_pre_hooks.values()
    assert zeros(layer.weight_mask) == 4 * (rounds + 1) and len(container) == rounds + 1
    assert isinstance(container, prune.PruningContainer) and "weight" not in vars(layer)
    prune.undo(layer, "weight")
    assert zeros(layer.weight_mask) == 4 * rounds
    prune.unprune(layer, "weight", 0)
    copy.deepcopy(layer)
    prune.remove(layer)
    assert type(layer) is nn.Linear and not layer._forward_pre_hooks

    layer = start()
    weight = layer.weight_orig.detach().clone()
    prune.restore(nn.Sequential(layer))
    assert type(layer) is nn.Linear and torch.equal(layer.weight, weight) and not layer._forward_pre_hooks


def test_the_round_of_torch_can_be_undone_if_it_is_the_only_one() -> None:
    layer = nn.Linear(6, 4)
    weight = layer.weight.detach().clone()
    torch_prune.l1_unstructured(layer, "weight", 4)
    prune.undo(layer, "weight")
    assert type(layer) is nn.Linear and torch.equal(layer.weight, weight)


def test_global_pruning_of_what_torch_pruned_sees_the_weights_of_now() -> None:
    layer = nn.Linear(2, 1, bias=False)
    torch_prune.identity(layer, "weight")
    with torch.no_grad():
        layer.weight_orig.copy_(torch.tensor([[1.0, 2.0]]))
        layer.weight_orig.copy_(torch.tensor([[3.0, 2.0]]))
    prune.global_unstructured([(layer, "weight")], prune.L1Unstructured, amount=1)
    assert layer.weight_mask.tolist() == [[1, 0]]


def test_pickles_of_torch_open_where_ours_is_installed() -> None:
    layer, x = nn.Linear(6, 4), torch.randn(2, 6)
    torch_prune.l1_unstructured(layer, "weight", 4)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    prune.install()
    try:
        again = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    finally:
        prune.uninstall()
    (hook,) = again._forward_pre_hooks.values()
    assert isinstance(hook, prune.L1Unstructured) and prune.is_pruned(again)
    with torch.no_grad():
        again.weight_orig.mul_(2)
    torch.testing.assert_close(again(x) - again.bias, 2 * (layer(x) - layer.bias))  # its hook goes on as torch's did
    prune.l1_unstructured(again, "weight", 4)
    assert type(again) is MaskedLinear and zeros(again.weight_mask) == 8


# --- masked layers that nobody pruned --------------------------------------------------------------------------------


@pytest.mark.parametrize("soft", [False, True])
def test_masked_layers_count_as_pruned(soft: bool) -> None:
    mask = torch.eye(3, 4) * (0.5 if soft else 1)
    layer = MaskedLinear(4, 3, mask=mask)
    assert prune.is_pruned(layer) and not layer._forward_pre_hooks
    prune.custom_from_mask(layer, "weight", torch.tensor([[0, 1, 1, 1]] * 3))
    assert layer.weight_mask[0, 0] == 0 and zeros(layer.weight_mask) == 10
    (hook,) = layer._forward_pre_hooks.values()
    assert isinstance(hook, prune.CustomFromMask)
    prune.undo(layer, "weight")  # the layer is as it was built
    assert torch.equal(layer.weight_mask, mask) and not layer._forward_pre_hooks and type(layer) is MaskedLinear
    prune.CustomFromMask.remove(layer, name="weight")
    assert type(layer) is nn.Linear and zeros(layer.weight) == 9


def test_pruning_a_masked_layer_counts_over_what_remains() -> None:
    layer = MaskedLinear(4, 3, mask=torch.tensor([[1, 1, 0, 0]] * 3))
    prune.l1_unstructured(layer, "weight", 0.5)
    assert zeros(layer.weight_mask) == 9
    prune.l1_unstructured(layer, "weight", 1.0)
    assert zeros(layer.weight_mask) == 12
    prune.restore(layer)
    assert type(layer) is nn.Linear


# --- where a class cannot be swapped ---------------------------------------------------------------------------------


def test_a_hook_serves_modules_whose_class_cannot_be_swapped() -> None:
    class Final(nn.Linear):
        def __init_subclass__(cls, **kwargs: Any) -> None:
            raise TypeError("no subclasses")

    layer, x = Final(6, 4), torch.randn(2, 6)
    weight = layer.weight.detach().clone()
    for _ in range(2):
        prune.l1_unstructured(layer, "weight", 6)
        # As with torch, the attribute is right at once, and again from the next forward on.
        assert torch.equal(layer.weight, weight * layer.weight_mask)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, weight * layer.weight_mask, layer.bias))
    prune.undo(layer, "weight")
    assert torch.equal(layer.weight, weight * layer.weight_mask) and zeros(layer.weight_mask) == 6
    prune.unprune(layer, "weight", ...)
    assert torch.equal(layer.weight, weight)
    state = {"weight_orig": weight, "weight_mask": torch.zeros(4, 6), "bias": torch.zeros(4)}
    prune.load_state_dict(layer, state)
    assert not layer.weight.any()
    prune.restore(layer, "weight")
    assert type(layer) is Final and torch.equal(layer.weight, weight) and not layer._forward_pre_hooks


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("by", ["our hook", "torch", "a method of its own"])
def test_what_a_hook_set_before_the_last_step_is_not_taken_for_the_weight(by: str) -> None:
    class Doubling(prune.L1Unstructured):
        def apply_mask(self, module: nn.Module) -> torch.Tensor:
            return 2 * super().apply_mask(module)

    class Final(nn.Linear):
        def __init_subclass__(cls, **kwargs: Any) -> None:
            raise TypeError("no subclasses")

    layer: Any = Final(4, 1) if by == "our hook" else nn.Linear(4, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    if by == "a method of its own":
        Doubling.apply(layer, "weight", 1)
    else:
        (prune if by == "our hook" else torch_prune).l1_unstructured(layer, "weight", 1)
    with torch.no_grad():
        layer.weight_orig.copy_(torch.tensor([[1.0, 9.0, 8.0, 7.0]]))
    expected = torch.tensor([[0.0, 9.0, 8.0, 7.0]]) * (2 if by == "a method of its own" else 1)
    assert torch.equal(prune.to_sparse(layer, "weight").to_dense(), expected)
    prune.l1_unstructured(layer, "weight", 1)
    assert layer.weight_mask.tolist() == [[0, 1, 1, 0]], "the least of now, not of then"


def test_a_scripted_submodule_is_left_alone() -> None:
    model = nn.Sequential(torch.jit.script(nn.Linear(3, 3)), nn.Linear(3, 2))
    prune.l1_unstructured(model[1], "weight", 2)
    assert prune.is_pruned(model)
    assert [layer.name for layer in masked_ops.report(model, torch.ones(1, 3))] == ["0.weight", "1.weight"]
    x, y = torch.ones(1, 3), model(torch.ones(1, 3))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    prune.restore(model)
    prune.load_state_dict(model, state)
    masked_ops.pack(model)
    torch.testing.assert_close(prune.remove(model)(x), y)
    with pytest.raises(TypeError, match="is a ScriptModule, which cannot be masked"):
        prune.l1_unstructured(model[0], "weight", 2)


def test_parametrized_modules() -> None:
    layer = nn.Linear(4, 3)
    parametrize.register_parametrization(layer, "weight", nn.Tanh())
    prune.l1_unstructured(layer, "bias", 1)
    assert zeros(layer.bias) == 1 and layer(torch.ones(1, 4)).shape == (1, 3)
    with pytest.raises((TypeError, ValueError)):
        prune.l1_unstructured(layer, "weight", 1)
    prune.l1_unstructured(layer.parametrizations.weight, "original", 5)
    assert zeros(layer.weight) == 5
    prune.remove(layer)
    assert not prune.is_pruned(layer) and zeros(layer.weight) == 5


# --- inference mode, compile -----------------------------------------------------------------------------------------


def test_a_model_pruned_in_inference_mode_trains() -> None:
    layer = nn.Linear(4, 3)
    with torch.inference_mode():
        for _ in range(2):
            prune.l1_unstructured(layer, "weight", 2)
        prune.global_unstructured([(layer, "bias")], prune.L1Unstructured, amount=1)
    layer(torch.ones(1, 4)).sum().backward()
    assert torch.equal(layer.weight_orig.grad, layer.weight_mask)
    layer.weight_mask.zero_()
    assert prune.undo(layer, "weight") is layer


def test_a_model_built_in_inference_mode() -> None:
    masks = []
    for inference in (False, True):
        torch.manual_seed(0)
        with torch.inference_mode(inference):
            layer: Any = nn.Linear(4, 3)
            prune.l1_unstructured(layer, "weight", 2)
            prune.random_structured(layer, "weight", amount=1, dim=0)
            prune.global_unstructured([(layer, "weight")], prune.L1Unstructured, amount=1)
            masks.append(layer.weight_mask)
            assert torch.equal(
                layer(torch.ones(1, 4)), nn.functional.linear(torch.ones(1, 4), layer.weight, layer.bias)
            )
    assert torch.equal(*masks)


def test_the_hook_compiles_away() -> None:
    """One graph, whatever pruning does between calls."""
    layer, x = nn.Linear(6, 4), torch.randn(2, 6)
    prune.l1_unstructured(layer, "weight", 6)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    prune.l1_unstructured(layer, "weight", 6)
    torch.testing.assert_close(compiled(x), layer(x))
    prune.undo(layer, "weight")
    torch.testing.assert_close(compiled(x), layer(x))
    torch.compiler.reset()


# --- hooks that keep forward -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("take_off", [prune.remove, prune.restore, prune.undo])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Linear(6, 4), (2, 6)), (nn.Conv2d(3, 4, 3), (2, 3, 5, 5)), (nn.ConvTranspose1d(3, 4, 3), (2, 3, 5))],
    ids=["linear", "conv2d", "conv_transpose1d"],
)
def test_a_forward_that_was_kept_while_the_layer_was_masked(layer: Any, shape: Any, take_off: Any) -> None:
    """As accelerate's hooks keep it, and call it in the place of the layer's own."""
    layer, x = copy.deepcopy(layer), torch.randn(shape)
    prune.random_unstructured(layer, "weight", amount=0.5)
    kept = layer.forward
    layer.forward = lambda *args: 2 * kept(*args)
    torch.testing.assert_close(layer(x), 2 * type(layer).forward(layer, x))
    take_off(layer)
    torch.testing.assert_close(layer(x), 2 * type(layer).forward(layer, x))
    assert type(layer).__module__.startswith("torch.nn")


@pytest.mark.parametrize("take_off", [prune.remove, masked_ops.unpack])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Linear(6, 4), (2, 6)), (nn.Conv2d(3, 4, 3), (2, 3, 5, 5)), (nn.ConvTranspose1d(3, 4, 3), (2, 3, 5))],
    ids=["linear", "conv2d", "conv_transpose1d"],
)
def test_a_forward_that_was_kept_while_the_layer_was_packed(layer: Any, shape: Any, take_off: Any) -> None:
    layer, x = copy.deepcopy(layer), torch.randn(shape)
    masked_ops.pack(prune.random_unstructured(layer, "weight", amount=0.5))
    kept, expected = layer.forward, layer(x)
    take_off(layer)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(kept(x), expected)


@pytest.mark.parametrize("kind", ["attention", "gru"])
def test_a_forward_that_was_kept_of_a_module_with_several_weights(kind: str) -> None:
    layer: Any = nn.GRU(4, 8) if kind == "gru" else nn.MultiheadAttention(8, 2)
    x = (torch.randn(3, 2, 4),) if kind == "gru" else (torch.randn(3, 2, 8),) * 3
    name = "weight_hh_l0" if kind == "gru" else "in_proj_weight"
    prune.random_unstructured(layer, name, amount=0.5)
    kept, expected = layer.forward, layer(*x)[0]
    prune.remove(layer, name)
    torch.testing.assert_close(kept(*x)[0], expected)


# --- install ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def installed() -> Iterator[None]:
    prune.install()
    yield
    prune.uninstall()


@pytest.mark.usefixtures("installed")
def test_install_serves_every_kind_of_import() -> None:
    import torch.nn.utils.prune as by_attribute
    from torch.nn.utils import prune as by_from
    from torch.nn.utils.prune import L1Unstructured, l1_unstructured

    assert by_attribute is by_from is prune is sys.modules["torch.nn.utils.prune"] is torch.nn.utils.prune
    assert L1Unstructured is prune.L1Unstructured and l1_unstructured is prune.l1_unstructured
    prune.install()
    prune.uninstall()
    prune.uninstall()
    assert torch.nn.utils.prune is torch_prune is sys.modules["torch.nn.utils.prune"]
    assert torch_prune.__name__ == "torch.nn.utils.prune"


def test_the_import_of_masked_ops_replaces_nothing(run_python: Any) -> None:
    code = """
import torch, masked_ops
import torch.nn.utils.prune as p
assert p.__name__ == "torch.nn.utils.prune" and masked_ops.prune.L1Unstructured is not p.L1Unstructured
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr


# --- Lightning -------------------------------------------------------------------------------------------------------

LIGHTNING = """
import logging, sys, warnings
warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)
import torch
from torch import nn

if sys.argv[1] == "masked_ops":
    from masked_ops import prune
    prune.install()
import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelPruning

class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(1, 8, 3), nn.Linear(8 * 36, 10)
    def forward(self, x):
        return self.linear(self.conv(x).relu().flatten(1))
    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])
    def validation_step(self, batch, index):
        self(batch[0])  # torch's callback prunes by the weights of the last forward
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

class Every(torch.nn.utils.prune.BasePruningMethod):
    PRUNING_TYPE = "unstructured"
    def __init__(self, amount):
        self.amount = amount
    def compute_mask(self, t, default_mask):
        mask = default_mask.clone()
        mask.view(-1)[:: round(1 / self.amount)] = 0
        return mask

each = dict(use_global_unstructured=False)
keep = dict(make_pruning_permanent=False, parameter_names=["weight"])
configurations = {
    "local": dict(pruning_fn="l1_unstructured", verbose=2, **each),
    "global": dict(pruning_fn="l1_unstructured"),
    "random": dict(pruning_fn="random_unstructured", **each, **keep),
    "structured": dict(pruning_fn="ln_structured", pruning_dim=0, pruning_norm=2, **each, **keep),
    "custom": dict(pruning_fn=Every, **keep),
    "ticket": dict(pruning_fn="l1_unstructured", use_lottery_ticket_hypothesis=True, resample_parameters=True, **keep),
}
results = {}
for name, arguments in configurations.items():
    torch.manual_seed(0)
    net = Net().double()
    data = torch.utils.data.TensorDataset(torch.randn(16, 1, 8, 8).double(), torch.randint(0, 10, (16,)))
    loader = torch.utils.data.DataLoader(data, batch_size=8)
    trainer = pl.Trainer(
        max_epochs=3, callbacks=[ModelPruning(amount=0.3, **arguments)], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
    )
    trainer.fit(net, loader, loader)
    trainer.save_checkpoint(sys.argv[2] + ".ckpt")
    saved = torch.load(sys.argv[2] + ".ckpt", weights_only=False)["state_dict"]
    results[name] = (type(net.conv).__name__, net.state_dict(), saved)
torch.save(results, sys.argv[2])
"""


@pytest.mark.skipif(
    importlib.util.find_spec("pytorch_lightning") is None, reason="pytorch-lightning, of the test extra, is missing"
)
def test_lightning_model_pruning(run_python: Any, tmp_path: Path) -> None:
    """Lightning's own callback on torch's module, and on ours in its place: the same training, the same checkpoints."""
    results = {}
    for library in ("torch", "masked_ops"):
        process = run_python(LIGHTNING, library, tmp_path / library)
        assert process.returncode == 0, process.stderr
        results[library] = torch.load(tmp_path / library, weights_only=True)
    classes = {name: ours[0] for name, ours in results["masked_ops"].items()}
    assert classes == dict.fromkeys(("local", "global"), "Conv2d") | dict.fromkeys(
        ("random", "structured", "custom", "ticket"), "MaskedConv2d"
    )
    for name, (_, *theirs) in results["torch"].items():
        for expected, state in zip(theirs, results["masked_ops"][name][1:], strict=True):
            assert list(state) == list(expected)
            for key, values in expected.items():
                torch.testing.assert_close(state[key], values, msg=f"{name}, {key}")
                if key.endswith("_mask") or (name in ("local", "global") and key == "linear.weight"):
                    assert zeros(state[key]) == zeros(values) > 0
