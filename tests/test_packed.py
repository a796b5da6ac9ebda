"""Packed layers, against the masked and the dense modules that they stand for."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from interrupts import interrupted
from ranks import Check, assert_passed, name_of, run_in_two_processes, share
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune

import masked_ops
from masked_ops import PackedLinear, prune
from masked_ops.nn import attach, masked_names, set_mask

# --- helpers ---------------------------------------------------------------------------------------------------------


def integers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Sums of products of these are exact in every floating dtype."""
    return torch.randint(-2, 3, shape).to(dtype)


def single(rows: int, cols: int) -> Tensor:
    mask = torch.zeros(rows, cols)
    mask[rows // 2, cols - 1] = 1
    return mask


PATTERNS: dict[str, Callable[[int, int], Tensor]] = {
    "half": lambda rows, cols: (torch.rand(rows, cols) < 0.5).float(),
    "few": lambda rows, cols: (torch.rand(rows, cols) < 0.05).float(),
    "none": torch.zeros,
    "all": torch.ones,
    "single": single,
    "row": lambda rows, cols: (torch.arange(rows) == rows - 1).float()[:, None].repeat(1, cols),
    "column": lambda rows, cols: (torch.arange(cols) == cols - 1).float().repeat(rows, 1),
    "diagonal": lambda rows, cols: torch.eye(max(rows, cols))[:rows, :cols],
}
patterns = pytest.mark.parametrize("pattern", PATTERNS)
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def masked_linear(rows: int = 5, cols: int = 11, pattern: str = "half", **kwargs: Any) -> Any:
    """A masked layer of small integers, what is beneath the mask included."""
    layer = masked_ops.MaskedLinear(cols, rows, mask=PATTERNS[pattern](rows, cols), **kwargs)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(integers(*parameter.shape))
    return layer


def packed_linear(*args: Any, **kwargs: Any) -> Any:
    return masked_ops.pack(masked_linear(*args, **kwargs))


def pruned_linear(rows: int = 5, cols: int = 11, amount: float = 0.5) -> Any:
    return prune.random_unstructured(nn.Linear(cols, rows), "weight", amount=amount)


def network() -> nn.Sequential:
    """A convolution and two linear layers, all pruned; all are packed."""
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 5))
    prune.random_unstructured([(net[0], "weight"), (net[3], "weight"), (net[5], "weight")], amount=0.5)
    return net


def image() -> Tensor:
    return torch.randn(4, 2, 4, 4)


def saved(state: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def loaded(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=True)


class Scaled(nn.Linear):
    """Keeps torch's forward, and has more to its state and its constructor."""

    def __init__(self, in_features: int, out_features: int, scale: float = 2.0) -> None:
        super().__init__(in_features, out_features)
        self.scale = scale

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale={self.scale}, rows={len(self.weight)}"

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 3)
        self.was_reset = True
        self.bias = nn.Parameter(torch.full((self.out_features,), 7.0))


class Gain(nn.Linear):
    """A forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class Head(masked_ops.MaskedLinear):
    """A user's subclass of a masked layer."""


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


# --- the form --------------------------------------------------------------------------------------------------------


def test_form() -> None:
    mask = torch.tensor([[1, 0, 1, 1, 0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0, 0, 1, 1, 0]])
    layer = masked_ops.MaskedLinear(10, 2, mask=mask)
    layer.weight_orig.data = torch.arange(20.0).view(2, 10)
    masked_ops.pack(layer)
    assert layer.weight_values.tolist() == [0, 2, 3, 9, 17, 18]
    assert layer.weight_bits.tolist() == [[0b00001101, 0b10], [0b10000000, 0b01]]
    assert layer.weight_bits.dtype == torch.uint8


@patterns
@pytest.mark.parametrize("cols", [1, 7, 8, 9, 16, 17])
def test_packing_loses_nothing_that_the_mask_keeps(pattern: str, cols: int) -> None:
    layer = masked_linear(5, cols, pattern)
    mask, weight = layer.weight_mask, layer.weight.detach()
    packed = PackedLinear.from_masked(layer)
    assert packed.weight_values.numel() == int(mask.sum())
    assert packed.weight_bits.shape == (5, (cols + 7) // 8)
    assert torch.equal(packed.weight, weight)
    unpacked = packed.to_masked()
    assert torch.equal(unpacked.weight_orig, weight) and torch.equal(unpacked.weight_mask, mask)
    dense = packed.to_dense()
    assert (
        type(dense) is nn.Linear
        and torch.equal(dense.weight, weight)
        and list(dense.state_dict()) == ["bias", "weight"]
    )
    assert packed.sparsity == pytest.approx(layer.sparsity)


@pytest.mark.parametrize(("rows", "cols"), [(0, 3), (3, 0), (0, 0)])
def test_nothing_to_keep(rows: int, cols: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's, of initializing nothing
        layer = masked_ops.pack(masked_ops.MaskedLinear(cols, rows))
        again = PackedLinear(cols, rows)
    for packed in (layer, again):
        assert packed(torch.ones(2, cols)).shape == (2, rows) and packed.sparsity == 0
        assert packed.to_masked().weight.shape == (rows, cols)


def test_a_weight_of_any_layout_is_packed() -> None:
    layer = masked_linear()
    expected = layer.weight.detach().clone()
    layer.weight_orig.data = layer.weight_orig.data.t().contiguous().t()
    layer.weight_mask = layer.weight_mask.t().contiguous().t()
    assert torch.equal(masked_ops.pack(layer).weight, expected)
    conv: Any = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    expected = prune.l1_unstructured(conv, "weight", amount=0.5).weight.detach()
    assert not conv.weight_mask.is_contiguous()
    assert torch.equal(masked_ops.pack(conv).weight, expected)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float64])
def test_the_dtype_of_the_mask_does_not_matter(dtype: torch.dtype) -> None:
    layer = masked_linear()
    expected = layer.weight.detach()
    set_mask(layer, "weight", layer.weight_mask.to(dtype))
    assert torch.equal(masked_ops.pack(layer).weight, expected)


def test_what_lies_beneath_the_mask_has_no_part() -> None:
    layer = masked_linear()
    expected = layer(torch.ones(1, 11))
    layer.weight_orig.data[layer.weight_mask == 0] = float("nan")
    assert torch.equal(masked_ops.pack(layer)(torch.ones(1, 11)), expected)


# --- values and gradients --------------------------------------------------------------------------------------------


@patterns
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
def test_values_and_gradients(pattern: str, bias: bool) -> None:
    masked = masked_linear(9, 21, pattern, bias=bias)
    packed, dense = PackedLinear.from_masked(masked), masked.to_dense()
    for shape in [(21,), (1, 21), (6, 21), (2, 3, 21), (0, 21)]:
        x = integers(*shape)
        outputs, grads = [], []
        for layer in (packed, masked, dense):
            layer.zero_grad()
            own = x.clone().requires_grad_()
            output = layer(own)
            output.backward(torch.arange(output.numel()).view_as(output).float() % 5 - 2)
            outputs.append(output)
            weight_grad = layer.weight.grad if layer is dense else None
            if layer is masked:
                weight_grad = layer.weight_orig.grad
            if layer is packed:
                assert layer.weight_values.grad.shape == layer.weight_values.shape
                weight_grad = torch.zeros(9, 21).masked_scatter(masked.weight_mask.bool(), layer.weight_values.grad)
            grads.append((own.grad, weight_grad * masked.weight_mask, layer.bias.grad if bias else torch.zeros(1)))
        assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
        for packeds, maskeds, denses in zip(*grads, strict=True):
            assert torch.equal(packeds, maskeds) and torch.equal(packeds, denses)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_floating_dtype(dtype: torch.dtype) -> None:
    masked = masked_linear(dtype=dtype)
    packed = PackedLinear.from_masked(masked)
    x = integers(3, 11, dtype=dtype).requires_grad_()
    out = packed(x)
    assert out.dtype == dtype and torch.equal(out, masked(x))
    out.sum().backward()
    assert packed.weight_values.grad.dtype == dtype
    assert torch.equal(packed.weight_values.grad, x.sum(0).expand(5, 11)[masked.weight_mask != 0])


def test_higher_derivatives() -> None:
    layer = packed_linear(3, 4, dtype=torch.float64)
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    values = layer.weight_values.detach().requires_grad_()

    def call(x: Tensor, values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight_values": values}, x).pow(3)

    assert torch.autograd.gradgradcheck(call, (x, values))


def test_training_is_that_of_the_masked_layer() -> None:
    masked, x, target = network(), image(), torch.randn(4, 5)
    packed = masked_ops.pack(copy.deepcopy(masked))
    for net in (masked, packed):
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            (net(x) - target).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(packed(x), masked(x))
    for index in (3, 5):
        torch.testing.assert_close(packed[index].weight, masked[index].weight)


# --- the weight ------------------------------------------------------------------------------------------------------


def load(layer: Any) -> None:
    layer.load_state_dict({**layer.state_dict(), "weight_values": torch.full_like(layer.weight_values, 2)})


def train(layer: Any) -> None:
    layer(torch.ones(1, 11)).sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.5).step()


def write_bits(layer: Any) -> None:
    layer.weight_bits.copy_(layer.weight_bits.flip(0))


CHANGES: dict[str, Callable[[Any], Any]] = {
    "load_state_dict": load,
    "optimizer.step": train,
    "to(dtype)": lambda layer: layer.to(torch.float64),
    "write to .data": lambda layer: layer.weight_values.data.fill_(3),
    "replace .data": lambda layer: setattr(layer.weight_values, "data", torch.ones_like(layer.weight_values)),
    "write to the bits": write_bits,
}


@pytest.mark.parametrize("state", ["packed", "frozen"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen_at_once(change: str, state: str) -> None:
    layer, x = packed_linear(), integers(2, 11)
    layer(x)
    if state == "frozen":
        masked_ops.freeze(layer)
        layer(x)
    if change == "optimizer.step":
        layer.requires_grad_()  # thaws
    before = layer.weight.detach().clone()
    CHANGES[change](layer)
    weight = layer.weight
    assert weight.dtype == layer.weight_values.dtype
    assert change == "to(dtype)" or not torch.equal(weight, before)
    places = torch.zeros(5, 11, dtype=torch.bool)
    for row in range(5):
        for col in range(11):
            places[row, col] = bool(layer.weight_bits[row, col // 8] >> (col % 8) & 1)
    assert torch.equal(weight[places], layer.weight_values) and not weight[~places].any()
    x = x.to(weight.dtype)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, layer.bias))


def test_the_weight_is_differentiable() -> None:
    layer = packed_linear()
    with torch.no_grad():
        layer(torch.ones(1, 11))
    (layer.weight * torch.arange(55.0).view(5, 11)).sum().backward()
    kept = layer.to_masked().weight_mask != 0
    assert torch.equal(layer.weight_values.grad, torch.arange(55.0).view(5, 11)[kept])


@pytest.mark.parametrize(
    "value", [nn.Parameter(torch.ones(5, 11)), torch.ones(5, 11), None], ids=["param", "tensor", "none"]
)
def test_the_weight_cannot_be_assigned_to(value: Any) -> None:
    layer = packed_linear()
    before = fingerprint(layer)
    with pytest.raises(TypeError, match="'weight' of PackedLinear, which is packed: write to 'weight_values'"):
        layer.weight = value
    with pytest.raises(AttributeError, match="cannot delete 'weight' of PackedLinear, which is packed"):
        del layer.weight
    with pytest.raises(TypeError, match="packed"):
        layer.register_parameter("weight", value)
    assert fingerprint(layer) == before


def test_errors_behind_the_weight_are_told() -> None:
    layer = packed_linear()
    del layer.weight_values
    with pytest.raises(RuntimeError, match=r"PackedLinear\.weight cannot be computed: .*'weight_values'"):
        _ = layer.weight
    layer = packed_linear()
    layer.weight_bits.fill_(0)
    with pytest.raises(RuntimeError, match="weight_values must hold one value for each"):
        layer(torch.ones(1, 11))


# --- the layer -------------------------------------------------------------------------------------------------------


def test_constructor() -> None:
    torch.manual_seed(0)
    layer = PackedLinear(6, 4)
    torch.manual_seed(0)
    dense = nn.Linear(6, 4)
    assert torch.equal(layer.weight, dense.weight) and torch.equal(layer.bias, dense.bias)
    mask = torch.eye(4, 6)
    layer = PackedLinear(6, 4, bias=False, dtype=torch.float64, mask=mask)
    assert layer.weight_values.shape == (4,) and layer.weight.dtype == torch.float64
    assert torch.equal(layer.weight != 0, mask != 0)
    assert list(layer.state_dict()) == ["weight_values", "weight_bits"]
    assert repr(layer) == "PackedLinear(in_features=6, out_features=4, bias=False, nnz=4, sparsity=0.8333)"


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        ([[1, 0]], TypeError, "mask: a tensor expected, got list"),
        (torch.ones(2, 4), ValueError, r"the weight's shape \(4, 2\) expected, got \(2, 4\)"),
        (torch.full((4, 2), 0.5), ValueError, "zeros and ones expected"),
        (torch.full((4, 2), float("nan")), ValueError, "zeros and ones expected"),
        (torch.ones(4, 2, device="meta"), ValueError, "a meta tensor has no values"),
    ],
)
def test_constructor_refuses(mask: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PackedLinear(2, 4, mask=mask)


def test_conversions_are_independent_copies() -> None:
    masked = pruned_linear()
    packed = PackedLinear.from_masked(masked)
    assert type(masked) is masked_ops.MaskedLinear and type(packed) is PackedLinear
    back, dense = packed.to_masked(), packed.to_dense()
    assert type(back) is masked_ops.MaskedLinear and type(dense) is nn.Linear
    assert not dense._forward_pre_hooks
    with torch.no_grad():
        for layer in (masked, back, dense):
            for parameter in layer.parameters():
                parameter.zero_()
    assert packed.weight_values.all() and packed.bias.all()
    with pytest.raises(TypeError, match=r"torch\.nn\.Linear expected, got Conv1d"):
        PackedLinear.from_masked(nn.Conv1d(1, 1, 1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="nothing to pack in Linear"):
        PackedLinear.from_masked(nn.Linear(2, 2))


def test_reset_parameters() -> None:
    layer = packed_linear()
    values, bias = layer.weight_values, layer.bias
    torch.manual_seed(1)
    layer.reset_parameters()
    dense = nn.Linear(11, 5)
    torch.manual_seed(1)
    dense.reset_parameters()
    assert layer.weight_values is values and layer.bias is bias
    assert torch.equal(layer.weight, torch.where(layer.weight != 0, dense.weight, 0)) and torch.equal(bias, dense.bias)


def test_an_attribute_of_the_users_own_wins() -> None:
    layer = packed_linear()
    layer.sparsity = "mine"
    assert layer.sparsity == "mine" and masked_ops.unpack(layer).sparsity == "mine"


# --- pack and unpack -------------------------------------------------------------------------------------------------


def test_pack_turns_the_same_object() -> None:
    model = network()
    calls = []
    model[3].register_forward_hook(lambda *args: calls.append(args))
    model[3].eval()
    before = [(id(m), m.training) for m in model.modules()]
    biases = [model[index].bias for index in (0, 3, 5)]
    x = image()
    expected = model(x)
    assert masked_ops.pack(model) is model
    assert [(id(m), m.training) for m in model.modules()] == before
    assert [type(m) for m in model] == [
        masked_ops.PackedConv2d,
        nn.ReLU,
        nn.Flatten,
        PackedLinear,
        nn.ReLU,
        PackedLinear,
    ]
    assert all(model[index].bias is bias for index, bias in zip((0, 3, 5), biases, strict=True))
    assert list(model[3].state_dict()) == ["bias", "weight_values", "weight_bits"]
    assert not model[3]._forward_pre_hooks and not model[0]._forward_pre_hooks
    calls.clear()
    torch.testing.assert_close(model(x), expected)
    assert len(calls) == 1
    assert masked_ops.unpack(model) is model
    assert [id(m) for m in model.modules()] == [key for key, _ in before]
    assert list(model[3].state_dict()) == ["bias", "weight_orig", "weight_mask"]
    torch.testing.assert_close(model(x), expected)
    assert len(calls) == 2
    hooks = list(model[3]._forward_pre_hooks.values())
    assert [type(hook) for hook in hooks] == [prune.CustomFromMask]
    prune.remove(model)
    assert [type(m) for m in model] == [nn.Conv2d, nn.ReLU, nn.Flatten, nn.Linear, nn.ReLU, nn.Linear]
    torch.testing.assert_close(model(x), expected)


def test_requires_grad_and_gradients_are_kept() -> None:
    layer = masked_linear()
    layer.bias.requires_grad_(False)
    layer(integers(3, 11)).sum().backward()
    weight_grad, mask = layer.weight_orig.grad, layer.weight_mask
    masked_ops.pack(layer)
    assert layer.weight_values.requires_grad and not layer.bias.requires_grad
    assert torch.equal(layer.weight_values.grad, weight_grad[mask != 0])
    masked_ops.unpack(layer)
    assert torch.equal(layer.weight_orig.grad, weight_grad)
    layer.weight_orig.requires_grad_(False)
    layer.weight_orig.grad = None
    masked_ops.pack(layer)
    assert not layer.weight_values.requires_grad and layer.weight_values.grad is None
    assert not masked_ops.unpack(layer).weight_orig.requires_grad


def test_packing_under_inference_mode_leaves_a_layer_that_trains() -> None:
    layer = masked_linear()
    with torch.inference_mode():
        masked_ops.pack(layer)
        out = layer(torch.ones(1, 11))
    assert out.is_inference() and not layer.weight_values.is_inference() and not layer.weight_bits.is_inference()
    train(layer)
    with torch.inference_mode():
        masked_ops.unpack(layer)
    train(layer)


def test_pruned_by_torch() -> None:
    layer: Any = torch_prune.random_unstructured(nn.Linear(11, 5), "weight", amount=0.5)
    x = torch.randn(2, 11)
    expected = layer(x)
    masked_ops.pack(layer)
    assert type(layer) is PackedLinear and "weight" not in vars(layer)
    torch.testing.assert_close(layer(x), expected)


def test_what_has_no_packed_kernel_stays() -> None:
    gain: Any = prune.random_unstructured(Gain(4, 3), "weight", amount=0.5)
    patched: Any = pruned_linear()
    patched.forward = lambda input: input
    cplx: Any = nn.Linear(4, 3, dtype=torch.complex64)
    attach(cplx, "weight", torch.eye(3, 4))
    float8: Any = nn.Linear(8, 4).to(torch.float8_e4m3fn)
    attach(float8, "weight", torch.eye(4, 8))
    others = [
        gain,
        patched,
        cplx,
        float8,
        nn.Linear(2, 2),
        nn.Conv1d(2, 2, 2),
        prune.identity(nn.Embedding(3, 4), "weight"),
    ]
    before = fingerprint(nn.ModuleList(others))
    masked_ops.pack(nn.ModuleList([*others, pruned_linear()]))
    assert fingerprint(nn.ModuleList(others)) == before
    with pytest.raises(ValueError, match=r"nothing to pack in ModuleList: .* got none"):
        masked_ops.pack(nn.ModuleList(others))
    assert fingerprint(nn.ModuleList(others)) == before


def test_subclasses() -> None:
    layer: Any = Scaled(11, 5)
    layer.weight.data.copy_(integers(5, 11))
    prune.custom_from_mask(layer, "weight", PATTERNS["half"](5, 11))
    x = integers(2, 11)
    expected, nnz = layer(x), int(layer.weight_mask.sum())
    masked_ops.pack(layer)
    cls = type(layer)
    assert cls.__name__ == "PackedScaled" and isinstance(layer, (Scaled, PackedLinear)) and layer.scale == 2
    assert torch.equal(layer(x), expected)
    assert repr(layer).count("nnz") == 1 and f"scale=2.0, rows=5, nnz={nnz}" in repr(layer)
    layer.bias.data.zero_()
    layer.reset_parameters()
    assert layer.was_reset and layer.weight_values.eq(3).all() and layer.bias.eq(7).all()
    other: Any = masked_ops.pack(prune.identity(Scaled(2, 2), "weight"))
    assert type(other) is cls
    built: Any = cls(3, 2, scale=5.0)
    assert built.scale == 5 and built.weight_values.shape == (6,) and built(torch.ones(1, 3)).shape == (1, 2)
    masked_ops.unpack(layer)
    assert type(prune.remove(layer)) is Scaled


def test_subclasses_of_the_masked_layer() -> None:
    layer: Any = Head(4, 3, mask=torch.eye(3, 4))
    masked_ops.pack(layer)
    assert isinstance(layer, (Head, PackedLinear)) and layer.sparsity == 0.75
    expected = layer.weight.sum(1)[None] + layer.bias
    dense: Any = layer.to_dense()
    assert isinstance(dense.weight, nn.Parameter) and not isinstance(dense, PackedLinear)
    for twin in (layer, dense, pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(twin(torch.ones(1, 4)), expected)
    assert type(layer)(2, 2)(torch.ones(1, 2)).shape == (1, 2)
    assert type(masked_ops.unpack(layer)) is Head and masked_names(layer) == ("weight",)


def test_user_classes_are_not_kept_alive() -> None:
    class Local(nn.Linear):
        pass

    layer = masked_ops.pack(prune.identity(Local(2, 2), "weight"))
    dead = weakref.ref(Local)
    del Local, layer
    gc.collect()
    assert dead() is None


def test_a_masked_bias_stays_masked() -> None:
    layer: Any = Scaled(11, 5)
    prune.random_unstructured([(layer, "weight"), (layer, "bias")], amount=0.4)
    x = torch.randn(2, 11)
    expected = layer(x)
    masked_ops.pack(layer)
    assert masked_names(layer) == ("bias",) and "nnz=33" in repr(layer) and "bias_sparsity=0.4" in repr(layer)
    torch.testing.assert_close(layer(x), expected)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(twin) is type(layer)
        torch.testing.assert_close(twin(x), expected)
    prune.remove(layer, "bias")
    assert type(layer).__name__ == "PackedScaled" and masked_names(layer) == ()
    prune.random_unstructured(layer, "bias", amount=2)  # the weight stays packed
    assert isinstance(layer, PackedLinear) and masked_names(layer) == ("bias",)
    expected = layer(x)
    masked_ops.unpack(layer)
    assert set(masked_names(layer)) == {"weight", "bias"} and not isinstance(layer, PackedLinear)
    torch.testing.assert_close(layer(x), expected)
    masked_ops.pack(layer)
    prune.remove(layer)
    assert type(layer) is Scaled
    torch.testing.assert_close(layer(x), expected)


def soft(layer: Any) -> None:
    set_mask(layer, "weight", torch.full((5, 7), 0.5))


def shrink(layer: Any) -> None:
    layer.weight_orig = nn.Parameter(torch.ones(5, 7))
    layer.out_features = 4


def parametrized(layer: Any) -> None:
    parametrize.register_parametrization(layer, "bias", Doubled())


UNPACKABLE = [
    pytest.param(
        lambda layer: setattr(layer, "weight_bits", 8), "'5' .* an attribute 'weight_bits' already", id="taken"
    ),
    pytest.param(soft, "'5' cannot be packed: its mask is soft", id="soft"),
    pytest.param(parametrized, "'5' is parametrized", id="parametrized"),
    pytest.param(
        lambda layer: parametrize.register_parametrization(layer, "weight_orig", Doubled()),
        "'5' is parametrized",
        id="orig",
    ),
    pytest.param(lambda layer: layer.to("meta"), "'5' cannot be packed: on the meta device", id="meta"),
    pytest.param(shrink, r"'5' cannot be packed: .* are \(4, 7\), but the weight has shape \(5, 7\)", id="shape"),
]


@pytest.mark.parametrize(("spoil", "message"), UNPACKABLE)
@pytest.mark.parametrize("call", [masked_ops.pack, masked_ops.freeze], ids=["pack", "freeze"])
def test_pack_refuses_and_changes_nothing(spoil: Callable[[Any], object], message: str, call: Any) -> None:
    model = network()
    spoil(model[5])
    before = fingerprint(model)
    with pytest.raises(ValueError, match=message):
        call(model)
    assert fingerprint(model) == before


def test_what_is_no_model_or_has_nothing() -> None:
    for call in (masked_ops.pack, masked_ops.unpack, masked_ops.freeze):
        with pytest.raises(TypeError, match=r"model: torch\.nn\.Module expected, got list"):
            call([])  # type: ignore[type-var]
    with pytest.raises(ValueError, match="nothing to pack in Linear"):
        masked_ops.pack(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="got packed ones only"):
        masked_ops.pack(packed_linear())
    with pytest.raises(ValueError, match="nothing in Linear is packed"):
        masked_ops.unpack(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="nothing to freeze in Linear"):
        masked_ops.freeze(nn.Linear(2, 2))


def test_a_model_that_is_packed_in_part() -> None:
    model = network()
    masked_ops.pack(model[5])
    values = model[5].weight_values
    masked_ops.pack(model)
    assert isinstance(model[3], PackedLinear) and model[5].weight_values is values


class MyPacked(PackedLinear):
    """What packing did not make it does not unpack."""


def test_unpack_refuses_and_changes_nothing() -> None:
    for last in (MyPacked(2, 2), parametrize.register_parametrization(packed_linear(), "bias", Doubled())):
        model = nn.Sequential(packed_linear(), last)
        before = fingerprint(model)
        for call in (masked_ops.unpack, prune.remove, lambda m: prune.identity([(m[0], "weight"), (m[1], "weight")])):
            with pytest.raises(ValueError, match="cannot be unpacked: its class is not one that packing made, or"):
                call(model)
            assert fingerprint(model) == before
        assert last(torch.ones(1, last.in_features)).shape == (1, last.out_features)


# --- ties ------------------------------------------------------------------------------------------------------------


def tied(mask: Tensor | None = None) -> Any:
    """Three layers, of which the outer two share their weight."""
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    prune.custom_from_mask(model[0], "weight", torch.eye(4))
    prune.identity(model[1], "weight")
    prune.custom_from_mask(model[2], "weight", torch.eye(4) if mask is None else mask)
    return model


def test_tied_weights_stay_tied() -> None:
    model, x = tied(), torch.randn(2, 4)
    expected = model(x)
    masked_ops.pack(model)
    assert model[0].weight_values is model[2].weight_values is not model[1].weight_values
    assert len(list(model.parameters())) == 5
    torch.testing.assert_close(model(x), expected)
    model = copy.deepcopy(model)
    assert model[0].weight_values is model[2].weight_values
    model.load_state_dict(masked_ops.pack(tied(torch.eye(4))).state_dict())
    assert model[0].weight_values is model[2].weight_values
    masked_ops.unpack(model)
    assert model[0].weight_orig is model[2].weight_orig is not model[1].weight_orig


def remove_class(model: Any) -> None:
    prune.CustomFromMask.remove(model, "weight")


def remove_pairs(model: Any) -> None:
    prune.remove([(model[0], "weight"), (model[2], "weight")])


@pytest.mark.parametrize("remove", [prune.remove, remove_class, remove_pairs])
def test_tied_weights_stay_tied_in_removal(remove: Any) -> None:
    model = masked_ops.pack(tied())
    remove(model)
    assert model[0].weight is model[2].weight and type(model[0]) is nn.Linear


def test_tied_weights_stay_tied_in_pruning() -> None:
    for again in (
        lambda pairs: prune.l1_unstructured(pairs, amount=2),
        lambda pairs: prune.global_unstructured(pairs, prune.L1Unstructured, amount=2),
    ):
        model = masked_ops.pack(tied())
        again([(model[0], "weight"), (model[2], "weight")])
        assert model[0].weight_orig is model[2].weight_orig
    model = masked_ops.pack(tied())
    prune.l1_unstructured(model[0], "weight", amount=2)
    assert isinstance(model[2], PackedLinear), "one alone leaves the other as it is"


def test_a_tie_under_two_masks_is_refused() -> None:
    model = tied(mask=torch.ones(4, 4))
    before = fingerprint(model)
    with pytest.raises(ValueError, match="'0' and '2' cannot be packed: they share a weight under different masks"):
        masked_ops.pack(model)
    assert fingerprint(model) == before


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("convert", [masked_ops.pack, masked_ops.freeze])
def test_a_weight_that_is_an_embedding_too_stays_masked(convert: Any, pruned: bool) -> None:
    """The head of most language models."""
    model: Any = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5))
    model[2].weight = model[0].weight
    mask = torch.rand(5, 4) < 0.5
    for module in (model[2], model[0])[: 1 + pruned]:
        prune.custom_from_mask(module, "weight", mask)
    with pytest.raises(ValueError, match="nothing to"):
        convert(model)
    prune.random_unstructured(model[1], "weight", amount=0.5)
    tokens = torch.arange(5)
    expected = model(tokens)
    assert convert(model) is model and isinstance(model[1], PackedLinear) and type(model[2]) is masked_ops.MaskedLinear
    assert model[2].weight_orig is getattr(model[0], "weight_orig" if pruned else "weight")
    torch.testing.assert_close(model(tokens), expected)


# --- all or nothing --------------------------------------------------------------------------------------------------


def fingerprint(model: nn.Module) -> list[Any]:
    """Everything that a failed call could have changed, by identity and by value."""
    seen: list[Any] = []
    for module in model.modules():
        seen.append((type(module), sorted(vars(module)), list(module._parameters), list(module._buffers)))
        for key, hook in module._forward_pre_hooks.items():
            seen.append((key, id(hook), sorted(vars(hook)), len(getattr(hook, "_pruning_methods", ()))))
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                values = [] if tensor.is_meta else tensor.tolist()
                grad = None if tensor.grad is None else (id(tensor.grad), tensor.grad.tolist())
                seen.append((name, id(tensor), tensor.shape, values, tensor.requires_grad, grad))
    return seen


def two_masked() -> Any:
    model = nn.Sequential(pruned_linear(2, 3), pruned_linear(2, 2))
    model(torch.ones(1, 3)).sum().backward()
    return model


def two_packed() -> Any:
    model = masked_ops.pack(nn.Sequential(pruned_linear(2, 3), pruned_linear(2, 2)))
    model(torch.ones(1, 3)).sum().backward()
    return model


def pairs_of(model: Any) -> list[tuple[nn.Module, str]]:
    return [(model[0], "weight"), (model[1], "weight")]


OTHER = masked_ops.pack(nn.Sequential(pruned_linear(2, 3, 0.2), pruned_linear(2, 2, 0.2))).state_dict()

ATOMIC: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
    "pack": (two_masked, masked_ops.pack),
    "unpack": (two_packed, masked_ops.unpack),
    "freeze": (two_masked, masked_ops.freeze),
    "remove": (two_packed, prune.remove),
    "prune": (two_packed, lambda m: prune.l1_unstructured(pairs_of(m), amount=1)),
    "unprune": (two_packed, lambda m: prune.unprune(pairs_of(m), where=0)),
    "load_state_dict": (two_packed, lambda m: prune.load_state_dict(m, OTHER)),
}


@pytest.mark.parametrize("action", ATOMIC)
def test_an_interrupt_at_any_line_leaves_all_or_nothing(action: str) -> None:
    make, call = ATOMIC[action]
    call(make())  # what is done once only (a class that is made, an import) is done
    original = make()
    done = copy.deepcopy(original)
    call(done)
    line, outcomes = 1, set()
    while True:
        model = copy.deepcopy(original)
        before = fingerprint(model)
        if not interrupted(line, lambda model=model: call(model)):
            break
        if fingerprint(model) == before:
            outcomes.add("nothing")
        else:
            outcomes.add("all")
            assert [type(m) for m in model] == [type(m) for m in done], f"line {line}"
            assert model.state_dict().keys() == done.state_dict().keys(), f"line {line}"
            for key, tensor in done.state_dict().items():
                assert torch.equal(model.state_dict()[key], tensor), f"line {line}: {key}"
            assert {p.requires_grad for p in model.parameters()} == {p.requires_grad for p in done.parameters()}
        line += 1
    assert line > 20 and "nothing" in outcomes


# --- prune -----------------------------------------------------------------------------------------------------------

ROUNDS: dict[str, Callable[[Any], object]] = {
    "identity": lambda m: prune.identity(m, "weight"),
    "random_unstructured": lambda m: prune.random_unstructured(m, "weight", amount=2),
    "l1_unstructured": lambda m: prune.l1_unstructured(m, "weight", amount=2),
    "random_structured": lambda m: prune.random_structured(m, "weight", amount=1, dim=0),
    "ln_structured": lambda m: prune.ln_structured(m, "weight", amount=1, n=2, dim=0),
    "custom_from_mask": lambda m: prune.custom_from_mask(m, "weight", mask=torch.eye(5, 11)),
    "global_unstructured": lambda m: prune.global_unstructured([(m, "weight")], prune.L1Unstructured, amount=2),
}


@pytest.mark.parametrize("name", ROUNDS)
def test_pruning_unpacks_first(name: str) -> None:
    masked: Any = pruned_linear()
    packed = PackedLinear.from_masked(masked)
    assert prune.is_pruned(packed)
    for layer in (masked, packed):
        torch.manual_seed(1)
        ROUNDS[name](layer)
    assert type(packed) is masked_ops.MaskedLinear
    assert torch.equal(packed.weight_mask, masked.weight_mask) and torch.equal(packed.weight, masked.weight)
    (hook,) = packed._forward_pre_hooks.values()
    assert isinstance(hook, prune.PruningContainer) and isinstance(hook[0], prune.CustomFromMask) and len(hook) == 2
    prune.undo(packed, "weight")
    assert torch.equal(packed.weight_mask != 0, masked_ops.pack(packed).weight != 0)


def test_a_round_that_fails_leaves_the_layer_packed() -> None:
    layer = packed_linear()
    before = fingerprint(layer)
    for call, error in (
        (lambda: prune.l1_unstructured(layer, "weight", amount=1000), ValueError),
        (lambda: prune.custom_from_mask(layer, "weight", mask=torch.ones(2, 2)), AssertionError),
        (lambda: prune.unprune(layer, "weight", where=1000), IndexError),
        (lambda: prune.l1_unstructured(layer, "nothing", amount=1), AttributeError),
        (lambda: prune.global_unstructured([(layer, "weight")], prune.LnStructured, amount=1, n=2), TypeError),
    ):
        with pytest.raises(error):
            call()
        assert fingerprint(layer) == before


@pytest.mark.parametrize(
    "remove",
    [
        lambda m: prune.remove(m, "weight"),
        prune.remove,
        lambda m: prune.remove([(m, "weight")]),
        lambda m: prune.CustomFromMask.remove(m, name="weight"),
    ],
)
def test_remove_makes_it_dense(remove: Callable[[Any], object]) -> None:
    layer = packed_linear()
    layer(integers(2, 11)).sum().backward()
    weight, bias, grad = layer.weight.detach(), layer.bias, layer.weight_values.grad
    remove(layer)
    assert type(layer) is nn.Linear and list(layer.state_dict()) == ["bias", "weight"] and not prune.is_pruned(layer)
    assert torch.equal(layer.weight, weight) and layer.bias is bias and isinstance(layer.weight, nn.Parameter)
    assert layer.weight.grad.count_nonzero() == grad.count_nonzero()


def test_the_method_of_a_round_still_removes() -> None:
    layer: Any = nn.Linear(4, 3)
    method = prune.L1Unstructured.apply(layer, "weight", 3)
    masked_ops.pack(layer)
    method.remove(layer)
    assert type(layer) is nn.Linear and int((layer.weight == 0).sum()) == 3


def test_restore_and_undo_are_refused() -> None:
    model = nn.Sequential(pruned_linear(4, 4), masked_ops.pack(pruned_linear(4, 4)))
    before = fingerprint(model)
    for call in (
        lambda: prune.restore(model[1], "weight"),
        lambda: prune.restore(model),
        lambda: prune.undo(model[1], "weight"),
        lambda: prune.undo([(model[0], "weight"), (model[1], "weight")]),
    ):
        with pytest.raises(ValueError, match=r"is packed and cannot be .*: the pruned values are gone"):
            call()
        assert fingerprint(model) == before


def test_unprune_revives_zeros() -> None:
    layer = packed_linear(pattern="none")
    prune.unprune(layer, "weight", where=0)
    assert layer.weight_mask[0].all() and not layer.weight_mask[1:].any() and not layer.weight_orig.any()


def test_to_sparse() -> None:
    layer = packed_linear()
    assert torch.equal(prune.to_sparse(layer).to_dense(), layer.weight)


def test_masking_by_hand_says_what_to_do() -> None:
    layer = packed_linear()
    for call in (
        lambda: attach(layer, "weight", torch.ones(5, 11)),
        lambda: masked_ops.MaskedLinear.from_dense(layer),
        lambda: set_mask(layer, "weight", torch.ones(5, 11)),
    ):
        with pytest.raises(ValueError, match=r"'weight' of PackedLinear is packed; masked_ops\.unpack makes it"):
            call()
    with pytest.raises(ValueError, match=r"while its weight is packed: masked_ops\.unpack makes it"):
        layer.set_mask(torch.ones(5, 11))
    layer.bias.data.zero_()
    masked_ops.unpack(layer).set_mask(torch.zeros(5, 11))  # type: ignore[operator]
    assert not layer(torch.ones(1, 11)).any()


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("same_size", [True, False], ids=["same-nnz", "other-nnz"])
@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_load_state_dict(same_size: bool, assign: bool) -> None:
    source = packed_linear(pattern="diagonal")
    layer: Any = packed_linear(pattern="row" if not same_size else "diagonal")
    values, bits, storage = layer.weight_values, layer.weight_bits, layer.weight_values.data_ptr()
    layer(integers(1, 11)).sum().backward()
    values.requires_grad_(False)
    keys = layer.load_state_dict(loaded(saved(source.state_dict())), assign=assign)
    assert not keys.missing_keys and not keys.unexpected_keys
    assert torch.equal(layer.weight, source.weight) and torch.equal(layer.weight_bits, source.weight_bits)
    assert not layer.weight_values.requires_grad and isinstance(layer.weight_values, nn.Parameter)
    if not assign:
        assert layer.weight_values is values and layer.weight_bits is bits
        assert (values.data_ptr() == storage) == same_size and (values.grad is None) != same_size
    layer.requires_grad_()
    train(layer)
    assert layer.weight_values.grad.shape == (5,)


def test_loading_another_size_in_the_midst_of_training() -> None:
    layer, x = packed_linear(pattern="all"), integers(2, 11)
    out = layer(x)  # its graph holds on to the Parameter
    layer.load_state_dict(packed_linear(pattern="row").state_dict())
    layer(x).sum().backward()
    assert layer.weight_values.grad.shape == (11,)
    del out


BITS = torch.zeros(5, 2, dtype=torch.uint8)
BROKEN: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "count": ({"weight_values": torch.ones(4)}, "as many bits set as there are values: 5 are set, got 4 values"),
    "padding": (
        {"weight_bits": BITS + torch.tensor([[0, 8]], dtype=torch.uint8)},
        "weight_bits must have no bit set beyond the 11 columns",
    ),
    "shape": (
        {"weight_bits": BITS[:, :1]},
        r"must be torch.uint8 of shape \(5, 2\), got torch.uint8 of shape \(5, 1\)",
    ),
    "dtype": ({"weight_bits": BITS.int()}, r"must be torch.uint8 of shape \(5, 2\), got torch.int32"),
    "dimensions": ({"weight_values": torch.ones(5, 1)}, r"weight_values must have one dimension, got shape \(5, 1\)"),
    "bits alone": ({"weight_values": None}, "5 are set, got 11 values"),
    "values alone": ({"weight_bits": None}, "11 are set, got 5 values"),
}


@pytest.mark.parametrize("fault", BROKEN)
@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize("whole", [False, True], ids=["Module", "prune"])
def test_a_checkpoint_that_does_not_fit_changes_nothing(fault: str, assign: bool, whole: bool) -> None:
    model = nn.Sequential(packed_linear(pattern="row"))
    state = nn.Sequential(packed_linear(pattern="diagonal")).state_dict()
    state["0.bias"] = model[0].bias.detach().clone()
    for name, tensor in BROKEN[fault][0].items():
        state[f"0.{name}"] = tensor
        if tensor is None:
            del state[f"0.{name}"]
    before = fingerprint(model)
    with pytest.raises(RuntimeError, match=f"0.*{BROKEN[fault][1]}") as raised:
        strict = "alone" not in fault
        (prune.load_state_dict if whole else nn.Module.load_state_dict)(model, state, strict=strict, assign=assign)
    assert "0.weight_" in str(raised.value) and "Missing" not in str(raised.value)
    after = fingerprint(model)
    if assign and not whole:  # torch assigned the bias
        after = [entry for entry in after if entry[0] != "bias"]
        before = [entry for entry in before if entry[0] != "bias"]
    assert after == before


def test_strict_errors_name_the_keys() -> None:
    model = nn.Sequential(packed_linear())
    for state, messages in (
        ({}, ['"0.weight_values"', '"0.weight_bits"', "Missing"]),
        ({**model.state_dict(), "0.weight_mask": torch.ones(1)}, ['Unexpected key(s) in state_dict: "0.weight_mask"']),
        (
            nn.Sequential(nn.Linear(11, 5)).state_dict(),
            ["'0.weight' is not packed", "masked_ops.prune.load_state_dict"],
        ),
        (nn.Sequential(pruned_linear()).state_dict(), ["'0.weight_orig' is not packed", "masked_ops.prune."]),
        ({**model.state_dict(), "0.weight_values": [1.0]}, ["0.weight_values", "expected torch.Tensor"]),
    ):
        with pytest.raises(RuntimeError) as raised:
            model.load_state_dict(state)
        for message in messages:
            assert message in str(raised.value)
    keys = model.load_state_dict({"0.weight_values": torch.zeros_like(model[0].weight_values)}, strict=False)
    assert keys.missing_keys == ["0.bias", "0.weight_bits"] and not model[0].weight.any()


FORMS: dict[str, Callable[[Any], Any]] = {
    "dense": prune.remove,
    "torch": lambda m: torch_prune.custom_from_mask(prune.remove(m, "weight"), "weight", mask=torch.eye(5, 11)),
    "masked": lambda m: m,
    "packed": masked_ops.pack,
}


@pytest.mark.parametrize("source", FORMS)
@pytest.mark.parametrize("target", FORMS)
@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_every_checkpoint_loads_into_every_model(source: str, target: str, assign: bool) -> None:
    def make(form: str, mask: Tensor) -> Any:
        layer: Any = nn.Linear(11, 5)
        layer.weight.data.copy_(integers(5, 11).add(3))  # none is 0
        return nn.Sequential(FORMS[form](prune.custom_from_mask(layer, "weight", mask=mask)))

    checkpoint = make(source, torch.eye(5, 11))
    model = make(target, torch.ones(5, 11).tril())
    mask = model[0].weight.detach() != 0
    values = checkpoint[0].weight.detach().clone()
    state = loaded(saved(checkpoint.state_dict()))
    keys = prune.load_state_dict(model, state, assign=assign)
    assert not keys.missing_keys and not keys.unexpected_keys
    assert state.keys() == checkpoint.state_dict().keys(), "the caller's dict is as it was"
    # A dense checkpoint goes beneath the mask that is there.
    expected = values * mask if source == "dense" else values
    if target == "torch" and source == "dense":
        expected = values * torch.eye(5, 11)
    assert torch.equal(model[0].weight, expected)
    assert isinstance(model[0], PackedLinear) == (target == "packed")
    assert prune.is_pruned(model) == ((source, target) != ("dense", "dense"))
    out = model(integers(2, 11))
    out.sum().backward()


def test_a_soft_mask_does_not_load_into_a_packed_layer() -> None:
    model = nn.Sequential(packed_linear(), packed_linear())
    source = nn.Sequential(masked_linear(pattern="row"), masked_linear())
    set_mask(source[1], "weight", torch.full((5, 11), 0.5))
    before = fingerprint(model)
    with pytest.raises(RuntimeError, match=r"1\.weight_mask has values other than 0 and 1"):
        prune.load_state_dict(model, source.state_dict())
    assert fingerprint(model) == before


def test_a_failure_after_a_layer_was_resized_changes_nothing() -> None:
    source = nn.Sequential(packed_linear(), nn.Linear(5, 5))
    model = nn.Sequential(packed_linear(pattern="row"), nn.Linear(5, 4))
    model(integers(1, 11)).sum().backward()
    before = fingerprint(model)
    with pytest.raises(RuntimeError, match=r"size mismatch for 1\.weight"):
        prune.load_state_dict(model, source.state_dict())
    assert fingerprint(model) == before


@pytest.mark.parametrize("form", ["dense", "masked", "packed"])
def test_a_checkpoint_of_other_sizes_changes_nothing(form: str) -> None:
    layer: Any = pruned_linear(6, 11)
    source, model = nn.Sequential(FORMS[form](layer)), nn.Sequential(packed_linear())
    model(integers(1, 11)).sum().backward()
    before = fingerprint(model)
    with pytest.raises(RuntimeError, match=r"0\.weight"):
        prune.load_state_dict(model, source.state_dict())
    assert fingerprint(model) == before


def test_sizes_at_a_tenth() -> None:
    dense = nn.Linear(1024, 1024)
    packed = masked_ops.pack(prune.l1_unstructured(copy.deepcopy(dense), "weight", amount=0.9))
    assert len(saved(packed.state_dict())) <= 0.14 * len(saved(dense.state_dict()))
    states = []
    for layer in (dense, packed):
        optimizer = torch.optim.Adam(layer.parameters())
        layer(torch.randn(2, 1024)).sum().backward()
        optimizer.step()
        states.append(len(saved(optimizer.state_dict())))
    assert states[1] <= 0.11 * states[0]
    assert packed.weight_values.grad.numel() == packed.weight_values.numel() == round(1024 * 1024 * 0.1)


def test_safetensors(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    source, model = masked_ops.pack(network()), masked_ops.pack(network())
    safetensors.save_file(source.state_dict(), tmp_path / "model.safetensors")
    model.load_state_dict(safetensors.load_file(tmp_path / "model.safetensors"))
    x = image()
    assert torch.equal(model(x), source(x))


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("make", [packed_linear, lambda: masked_ops.pack(prune.identity(Scaled(11, 5), "weight"))])
def test_pickle_and_copy(make: Callable[[], Any], protocol: int) -> None:
    layer, x = make(), integers(2, 11)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer, protocol))):
        assert type(twin) is type(layer) and list(twin.state_dict()) == list(layer.state_dict())
        assert torch.equal(twin(x), layer(x)) and twin.weight_values is not layer.weight_values
        with torch.no_grad():
            twin.weight_values.zero_()
        assert layer.weight_values.any()
        masked_ops.unpack(twin)
        assert not isinstance(layer, masked_ops.MaskedLinear)


# --- conversions -----------------------------------------------------------------------------------------------------


def test_conversion_of_dtype() -> None:
    layer, x = packed_linear(), integers(2, 11)
    expected = layer(x)
    for convert, dtype in (
        (lambda m: m.double(), torch.float64),
        (lambda m: m.half(), torch.float16),
        (lambda m: m.to(torch.bfloat16), torch.bfloat16),
        (lambda m: m.type(torch.float32), torch.float32),  # converts every buffer, too
    ):
        values = layer.weight_values
        convert(layer)
        assert layer.weight_values is values and values.dtype == dtype and layer.weight_bits.dtype == torch.uint8
        assert torch.equal(layer(x.to(dtype)), expected.to(dtype))


def test_meta() -> None:
    layer = packed_linear()
    state = layer.state_dict()
    layer.to("meta")
    assert layer.weight.shape == (5, 11) and layer(torch.ones(2, 11, device="meta")).shape == (2, 5)
    assert "nnz" in repr(layer)
    layer.load_state_dict(state, assign=True)
    assert torch.equal(layer.weight_values, state["weight_values"])
    layer(torch.ones(1, 11))
    built = PackedLinear(11, 5, device="meta")
    built.load_state_dict(state, assign=True)
    assert torch.equal(built.weight, layer.weight)


@pytest.mark.parametrize("nnz", [0, 1, 10, 11, 12, 30, 55])
def test_memory_for_what_had_none(nnz: int) -> None:
    layer = PackedLinear(11, 5, mask=(torch.arange(55) < nnz).view(5, 11))
    bits = layer.weight_bits.clone()
    layer.to("meta").to_empty(device="cpu")
    assert torch.equal(layer.weight_bits, bits)
    layer.reset_parameters()
    assert layer(torch.ones(1, 11)).isfinite().all()


def test_skip_init() -> None:
    layer = nn.utils.skip_init(PackedLinear, 11, 5)
    layer.load_state_dict(packed_linear().state_dict())
    assert layer(torch.ones(1, 11)).shape == (1, 5)


# --- inside the rest of torch ----------------------------------------------------------------------------------------


def test_compile() -> None:
    from torch._dynamo import testing

    torch._dynamo.reset()
    layer, x = packed_linear(), integers(3, 11)
    graphs = testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=graphs)
    reads = torch.compile(lambda m: m.weight * 2, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        layer.zero_grad()
        compiled(x).sum().backward()
        grad = layer.weight_values.grad
        layer.zero_grad()
        layer(x).sum().backward()
        assert torch.equal(grad, layer.weight_values.grad) and torch.equal(compiled(x), layer(x))
        assert torch.equal(reads(layer), layer.weight * 2)
        with torch.no_grad():
            layer.weight_values.add_(1)
            layer.weight_bits.copy_(layer.weight_bits.flip(0))
    assert graphs.frame_count == 1
    masked_ops.unpack(layer)
    assert torch.equal(compiled(x), layer(x))
    masked_ops.pack(layer)
    assert torch.equal(compiled(x), layer(x))


def test_export_and_symbolic_trace() -> None:
    model, x = masked_ops.pack(nn.Sequential(pruned_linear(), nn.ReLU())), torch.randn(2, 11)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x))
    assert "0.weight_values" in program.state_dict
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x))


def test_autocast() -> None:
    layer, x = packed_linear(), integers(2, 11)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16 and torch.equal(out, layer(x).bfloat16())
    out.float().sum().backward()
    assert layer.weight_values.grad.dtype == torch.float32


def test_functional_call_and_transforms() -> None:
    layers = [packed_linear() for _ in range(3)]
    for layer in layers[1:]:
        layer.load_state_dict(layers[0].state_dict())
        layer.weight_values.data.copy_(integers(*layer.weight_values.shape))
    x = integers(2, 11)
    params, buffers = torch.func.stack_module_state(layers)

    def call(params: Any, buffers: Any) -> Tensor:
        return torch.func.functional_call(layers[0], (params, buffers), x)

    out = torch.vmap(call)(params, buffers)
    assert torch.equal(out, torch.stack([layer(x) for layer in layers]))
    grads = torch.vmap(torch.func.grad(lambda p, b: call(p, b).sum()))(params, buffers)
    for index, layer in enumerate(layers):
        layer(x).sum().backward()
        assert torch.equal(grads["weight_values"][index], layer.weight_values.grad)


@pytest.mark.parametrize("use_buffers", [False, True])
def test_averaged_model(use_buffers: bool) -> None:
    model = masked_ops.pack(network())
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=use_buffers)
    weights = []
    for _ in range(3):
        with torch.no_grad():
            model[5].weight_values.add_(1)
        weights.append(model[5].weight.detach())
        average.update_parameters(model)
    torch.testing.assert_close(average.module[5].weight, torch.stack(weights).mean(0))
    assert average(image()).shape == (4, 5)


def test_replica_of_data_parallel() -> None:
    layer, x = packed_linear(), integers(2, 11)
    replica = layer._replicate_for_data_parallel()
    replica._parameters = {}
    for name, parameter in layer._parameters.items():
        vars(replica)[name] = parameter.detach().clone()  # as torch.nn.parallel.replicate sets them
    assert torch.equal(replica(x), layer(x)) and torch.equal(replica.weight, layer.weight)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_transformer_layer(training: bool) -> None:
    encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).train(training)
    dense = copy.deepcopy(encoder)
    for name in ("self_attn.out_proj", "linear1", "linear2"):
        module = prune.random_unstructured(encoder.get_submodule(name), "weight", amount=0.5)
        dense.get_submodule(name).weight.data.copy_(module.weight.detach())
    masked_ops.pack(encoder)
    assert all(isinstance(encoder.get_submodule(name), PackedLinear) for name in ("self_attn.out_proj", "linear1"))
    x = torch.randn(2, 3, 8)
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(encoder(x), dense(x))
    if training:
        encoder(x).square().sum().backward()
        dense(x).square().sum().backward()
        for name in ("self_attn.out_proj", "linear1", "linear2"):
            layer: Any = encoder.get_submodule(name)
            expected = dense.get_submodule(name).weight.grad[layer.weight != 0]
            torch.testing.assert_close(layer.weight_values.grad, expected)


# --- freeze ----------------------------------------------------------------------------------------------------------


def test_freeze() -> None:
    model, x = network(), image()
    model[1].train()
    expected = model(x)
    assert masked_ops.freeze(model) is model
    assert isinstance(model[3], PackedLinear) and isinstance(model[5], PackedLinear)
    assert not any(p.requires_grad for p in model.parameters()) and model.training
    out = model(x)
    torch.testing.assert_close(out, expected)
    assert not out.requires_grad
    masked_ops.freeze(model)  # once more
    model.requires_grad_()
    model(x).sum().backward()
    assert model[3].weight_values.grad is not None


class Interrupted(nn.Sequential):
    def requires_grad_(self, requires_grad: bool = True) -> Any:
        super().requires_grad_(requires_grad)
        raise KeyboardInterrupt


@pytest.mark.parametrize("make", [masked_linear, packed_linear])
def test_an_interrupt_leaves_nothing_half_frozen(make: Callable[[], Any]) -> None:
    model = Interrupted(make(), nn.BatchNorm1d(5))
    model[1].bias.requires_grad = False
    before = fingerprint(model)
    with pytest.raises(KeyboardInterrupt):
        masked_ops.freeze(model)
    assert fingerprint(model) == before


def test_freezing_what_is_packed_keeps_its_values() -> None:
    layer = packed_linear()
    values = layer.weight_values
    masked_ops.freeze(layer)
    assert layer.weight_values is values and not values.requires_grad


# --- report ----------------------------------------------------------------------------------------------------------


def test_report() -> None:
    model = masked_ops.pack(network())
    rows = {row.name: row for row in masked_ops.report(model, batch=4)}
    assert list(rows) == ["0.weight", "3.weight", "5.weight"]
    row = rows["3.weight"]
    assert (row.kind, row.shape, row.nnz, row.sparsity) == ("Linear", (7, 12), 42, 0.5)
    assert (row.parameter_bytes, row.mask_bytes) == (42 * 4, 7 * 2)
    assert row.dense_flops == 2 * 84 * 4 and row.remaining_flops == 0.5
    layer: Any = model[3]
    explained = masked_ops._ops.explain_packed_linear(layer.weight_values, layer.weight_bits, 12, 4)
    assert (row.path, row.reason) == explained and "3.weight" in str(masked_ops.report(model, image()))
    shared = masked_ops.pack(tied())
    assert [row.parameter_bytes for row in masked_ops.report(shared)] == [16, 64, 0]
    with pytest.raises(ValueError, match=r"0\.weight is on the meta device"):
        masked_ops.report(shared.to("meta"))


# --- two processes ---------------------------------------------------------------------------------------------------


def _train(model: nn.Module, x: Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def check_ddp(model: Any, x: Tensor) -> None:
    reference = copy.deepcopy(model)
    if dist.get_rank() == 1:
        with torch.no_grad():
            model[0].weight_values.zero_()
            model[0].weight_bits.copy_(model[0].weight_bits.flip(0))
    parallel = nn.parallel.DistributedDataParallel(model)
    _train(parallel, share(x))
    _train(reference, x)
    for key, tensor in reference.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], tensor)


def check_fsdp(model: Any, x: Tensor) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
    from torch.distributed.fsdp import fully_shard

    options = StateDictOptions(full_state_dict=True)
    reference, source = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    masked = fully_shard(copy.deepcopy(masked_ops.unpack(copy.deepcopy(model)))[0], mesh=mesh)
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    _train(model, share(x))
    _train(reference, x)
    full = get_model_state_dict(model, options=options)
    for key, tensor in reference.state_dict().items():
        torch.testing.assert_close(full[key], tensor)
    for refused, message in (
        (lambda: model[0].weight, "cannot be read while 'weight_values' is sharded"),
        (lambda: masked_ops.unpack(model), "is sharded"),
        (lambda: prune.remove(model), "is sharded"),
        (lambda: prune.l1_unstructured(model[0], "weight", amount=1), "is sharded"),
        (lambda: masked_ops.pack(masked), "cannot be packed: .* is sharded"),
        (lambda: set_model_state_dict(model, _smaller(source), options=options), "cannot be resized"),
    ):
        with pytest.raises((RuntimeError, ValueError), match=message):
            refused()
    set_model_state_dict(model, dict(source), options=options)  # which fills the dict that it gets with shards
    reference.load_state_dict(source)
    torch.testing.assert_close(model(x), reference(x))
    assert model[0].sparsity == reference[0].sparsity and "nnz" in repr(model)
    assert [row.nnz for row in masked_ops.report(model)] == [row.nnz for row in masked_ops.report(reference)]


def _smaller(state: Any) -> Any:
    bits = torch.zeros_like(state["0.weight_bits"])
    return {**state, "0.weight_values": torch.zeros(0), "0.weight_bits": bits}


CHECKS: list[Check] = [check_ddp, check_fsdp]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    model = masked_ops.pack(nn.Sequential(pruned_linear(7, 9), pruned_linear(5, 7)))
    run_in_two_processes(CHECKS, folder, (model, torch.randn(4, 9)))
    return folder


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
@pytest.mark.parametrize("check", CHECKS, ids=name_of)
def test_two_processes(check: Check, two_processes: Path) -> None:
    assert_passed(check, two_processes)
