"""``masked_ops.report``: the figures, the paths, the table."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune
from torch.utils.flop_counter import FlopCounterMode

import masked_ops
from masked_ops import _ops, prune


class OwnForward(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input @ self.weight.t()


def small_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2, stride=2), nn.Flatten(), nn.Linear(256, 5)
    )


def by_name(report: Any) -> dict[str, Any]:
    return {layer.name: layer for layer in report}


def test_figures_of_each_layer() -> None:
    net = small_net()
    prune.l1_unstructured(net[0], "weight", amount=0.75)
    prune.custom_from_mask(net[4], "bias", torch.tensor([1, 0, 0, 1, 1], dtype=torch.bool))
    report = masked_ops.report(net, batch=4)
    assert [layer.name for layer in report] == ["0.weight", "2.weight", "4.weight", "4.bias"]
    first = report[0]
    assert (first.kind, first.shape, first.nnz, first.sparsity) == ("Conv2d", (8, 3, 3, 3), 54, 0.75)
    assert (first.parameter_bytes, first.mask_bytes, first.remaining_flops) == (864, 864, 0.25)
    dense = report[1]
    assert (dense.kind, dense.nnz, dense.mask_bytes, dense.path) == ("ConvTranspose2d", 128, 0, "dense")
    assert dense.remaining_flops == 1.0
    bias = report[3]
    assert (bias.nnz, bias.sparsity, bias.remaining_flops, bias.path) == (3, 0.4, None, "live")
    assert report.nnz == 54 + 128 + 1280 + 3
    assert report.parameter_bytes == 4 * (216 + 128 + 1280 + 5)
    assert report.sparsity == pytest.approx(1 - report.nnz / 1629)
    assert report.remaining_flops is None  # the size of the image is not known
    assert isinstance(report[1:], tuple) and len(report[1:]) == 3


def test_layers_are_frozen_dataclasses() -> None:
    (layer,) = masked_ops.report(nn.Linear(3, 2))
    assert dataclasses.is_dataclass(layer) and dataclasses.asdict(layer)["name"] == "weight"
    with pytest.raises(dataclasses.FrozenInstanceError):
        layer.nnz = 1


def test_zeros_of_a_removed_mask_count() -> None:
    layer = prune.remove(prune.l1_unstructured(nn.Linear(4, 4), "weight", amount=12))
    (row,) = masked_ops.report(layer)
    assert (row.nnz, row.sparsity, row.path, row.remaining_flops) == (4, 0.75, "dense", 1.0)


def test_a_tied_parameter_takes_its_bytes_once() -> None:
    net = nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 7, bias=False))
    net[1].weight = net[0].weight
    assert [row.parameter_bytes for row in masked_ops.report(net)] == [84, 0]
    prune.l1_unstructured(net[1], "weight", amount=0.5)
    assert [row.parameter_bytes for row in masked_ops.report(net)] == [84, 0]


def test_flops_are_those_that_torch_counts() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = small_net()[:3]
            self.grouped = nn.Conv1d(4, 6, 3, groups=2, stride=2)
            self.twice = nn.Linear(7, 7)

        def forward(self, x: torch.Tensor, scale: float) -> torch.Tensor:
            x = self.grouped(self.features(x).flatten(2)) * scale
            return self.twice(self.twice(x[..., :7]))

    net, x = Net(), torch.randn(2, 3, 4, 4)
    with FlopCounterMode(display=False) as counter:
        net(x, 0.5)
    dense = masked_ops.report(net, (x, 0.5))
    assert sum(row.dense_flops for row in dense) == counter.get_total_flops()
    assert dense.remaining_flops == 1.0

    prune.ln_structured(net.twice, "weight", amount=4, n=2, dim=0)
    prune.l1_unstructured(net.features[0], "weight", amount=0.5)
    pruned = by_name(masked_ops.report(net, (x, 0.5)))
    saved = 4 / 7 * pruned["twice.weight"].dense_flops + 0.5 * pruned["features.0.weight"].dense_flops
    expected = 1 - saved / counter.get_total_flops()
    assert masked_ops.report(net, (x, 0.5)).remaining_flops == pytest.approx(expected)


def test_the_example_input_leaves_no_trace() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout())
    net[2].eval()
    state = {key: value.clone() for key, value in net.state_dict().items()}
    seed = torch.get_rng_state()
    masked_ops.report(net, torch.randn(3, 4, generator=torch.Generator()))
    with pytest.raises(RuntimeError):
        masked_ops.report(net, torch.randn(3, 5, generator=torch.Generator()))
    assert [module.training for module in net.modules()] == [True, True, True, False]
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert not net[0]._forward_hooks and net[0].weight.grad is None
    assert torch.equal(torch.get_rng_state(), seed)


def test_paths_are_asked_for_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, tuple[int, ...], bool, Any]] = []

    def explain(kind: str) -> Any:
        def answer(weight: torch.Tensor, mask: torch.Tensor, size: Any, *_: object) -> tuple[str, str]:
            asked.append((kind, tuple(weight.shape), torch.equal(mask, torch.zeros_like(mask)), size))
            return f"{kind} path", f"why {kind}"

        return answer

    monkeypatch.setattr(_ops, "explain_linear", explain("linear"))
    monkeypatch.setattr(_ops, "explain_convolution", explain("convolution"))
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Linear(2, 3))
    for layer in net:
        prune.custom_from_mask(layer, "weight", torch.zeros_like(layer.weight))
    report = masked_ops.report(net, batch=64)
    assert asked == [("convolution", (2, 1, 3, 3), True, (64, 1, 14, 14)), ("linear", (3, 2), True, 64)]
    assert [(row.path, row.reason) for row in report] == [
        ("convolution path", "why convolution; for inputs of 14 x 14: give report() an example of yours"),
        ("linear path", "why linear"),
    ]
    asked.clear()
    masked_ops.report(net, torch.randn(5, 1, 4, 4))  # the linear layer sees 5 x 2 x 2 rows of 2
    assert [size for *_, size in asked] == [(5, 1, 4, 4), 20]
    asked.clear()
    masked_ops.report(net, torch.randn(1, 4, 4))  # no batch dimension
    assert [size for *_, size in asked] == [(1, 1, 4, 4), 4]


def test_reasons_of_the_other_paths() -> None:
    parametrized = nn.Linear(3, 3)
    parametrize.register_parametrization(parametrized, "weight", nn.Identity())
    net = nn.ModuleDict(
        {
            "embedding": prune.l1_unstructured(nn.Embedding(5, 3), "weight", 4),
            "own": prune.l1_unstructured(OwnForward(3, 3), "weight", 4),
            "torch": torch_prune.l1_unstructured(nn.Linear(3, 3), "weight", 4),
            "hook": prune.l1_unstructured(parametrized, "bias", 1),
            "direct": masked_ops.MaskedLinear(3, 3),
        }
    )
    rows = by_name(masked_ops.report(net))
    assert rows["embedding.weight"].path == "live" and "no fused kernel" in rows["embedding.weight"].reason
    assert rows["own.weight"].path == "live" and "its own forward" in rows["own.weight"].reason
    assert rows["torch.weight"].path == "hook" and "torch.nn.utils.prune" in rows["torch.weight"].reason
    assert rows["hook.bias"].path == "hook" and "cannot be swapped" in rows["hook.bias"].reason
    assert rows["direct.weight"].nnz == 9 and rows["direct.weight"].mask_bytes == 36
    assert [rows[f"{key}.weight"].kind for key in ("embedding", "own", "torch")] == [
        "Embedding",
        "OwnForward",
        "Linear",
    ]


def test_a_model_without_weights() -> None:
    report = masked_ops.report(nn.ReLU())
    assert len(report) == 0 and report.sparsity == 0 and report.remaining_flops is None and "total" in str(report)


def test_a_sharded_model(run_python: Any) -> None:
    code = """
import torch, masked_ops
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard

store = distributed.TCPStore("localhost", 0, is_master=True)
distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
layer = masked_ops.prune.l1_unstructured(nn.Linear(8, 4), "weight", amount=0.5)
fully_shard(layer, mesh=distributed.device_mesh.init_device_mesh("cpu", (1,)))
(row,) = masked_ops.report(layer, batch=2)
assert (row.nnz, row.path) == (16, "fused") and row.reason.startswith("sharded"), row
distributed.destroy_process_group()
"""
    process = run_python(code)
    assert process.returncode == 0, process.stderr


def test_arguments_by_name() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(1, 2, 3), prune.identity(nn.Linear(2, 2), "weight")

        def forward(self, *, images: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
            return self.fc(input=self.conv(input=images).mean((2, 3))) * scale

    by_name = masked_ops.report(Net(), {"images": torch.ones(5, 1, 4, 4), "scale": 2.0})
    assert [layer.dense_flops for layer in by_name] == [2 * 18 * 5 * 4, 2 * 4 * 5]


def test_a_forward_that_returns_more_than_a_tensor() -> None:
    class Pair(nn.Conv2d):
        def forward(self, scale: float, x: torch.Tensor) -> Any:
            return super().forward(x) * scale, scale

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = prune.identity(Pair(1, 2, 3), "weight")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(0.5, x)[0]

    (layer,) = masked_ops.report(Net(), torch.ones(1, 1, 4, 4))
    assert layer.path == "live" and layer.dense_flops is None


def test_a_layer_that_the_example_does_not_reach() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(2, 2), prune.identity(nn.Linear(2, 2), "weight")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    report = masked_ops.report(Net(), torch.ones(1, 2))
    assert report[1].dense_flops is None and report[1].remaining_flops is None
    assert report[1].reason == "not called by the example input" and report.remaining_flops == 1.0


def test_the_table() -> None:
    net = small_net()
    prune.l1_unstructured(net[0], "weight", amount=0.75)
    text = str(masked_ops.report(net, torch.randn(2, 3, 4, 4)))
    lines = text.splitlines()
    assert lines[0].split() == ["layer", "kind", "shape", "sparsity", "nnz", "weight", "mask", "FLOPs", "left", "path"]
    assert lines[2].split()[:6] == ["0.weight", "Conv2d", "8x3x3x3", "75.0%", "54", "864"]
    assert lines[6].split()[:3] == ["total", "10.0%", "1,462"]
    # Columns line up: every cell ends or begins where its heading does.
    for heading in ("sparsity", "nnz", "weight", "mask", "FLOPs left"):
        end = lines[0].index(heading) + len(heading)
        assert all(line[end - 1] not in " " and line[end : end + 2] in ("  ", "") for line in lines[2:5])
    assert all(len(line) <= 120 for line in lines)
    assert lines[7].startswith("[1] ") and "give an example input" not in text
    assert "give an example input" in str(masked_ops.report(net))
    assert repr(masked_ops.report(net)) == str(masked_ops.report(net))


@pytest.mark.parametrize(
    "bytes_, text", [(0, "0 B"), (1023, "1023 B"), (2048, "2 KiB"), (5 << 20, "5 MiB"), (3 << 30, "3 GiB")]
)
def test_bytes(bytes_: int, text: str) -> None:
    assert masked_ops._report._bytes(bytes_) == text


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        (0, ValueError, "1 or more, got 0"),
        ("8", TypeError, "got str"),
        (True, TypeError, "got bool"),
        (1.5, TypeError, "got float"),
    ],
)
def test_errors(batch: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        masked_ops.report(nn.Linear(2, 2), batch=batch)


def test_a_model_without_values() -> None:
    with pytest.raises(ValueError, match=r"1\.weight is on the meta device"):
        masked_ops.report(nn.Sequential(nn.ReLU(), nn.Linear(2, 2, device="meta")))
