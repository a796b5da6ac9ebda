"""The masked layers and the mechanism under them, against dense torch modules that hold the masked values."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import pickle
import sys
import threading
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune

import masked_ops
from masked_ops import functional
from masked_ops import nn as masked_nn
from masked_ops.nn import atomic, attach, detach, masked_names, path_of, set_mask

# --- helpers ---------------------------------------------------------------------------------------------------------

# Masked class, arguments, keywords, shape of an input.
LAYERS = [
    pytest.param("Linear", (6, 5), {}, (3, 6), id="linear"),
    pytest.param("Linear", (6, 5), {"bias": False}, (2, 3, 6), id="linear-nobias"),
    pytest.param("Conv1d", (4, 6, 3), {"stride": 2, "padding": 1}, (2, 4, 9), id="conv1d"),
    pytest.param("Conv1d", (4, 6, 4), {"padding": "same", "dilation": 2}, (2, 4, 9), id="conv1d-same"),
    pytest.param("Conv2d", (4, 6, 3), {}, (2, 4, 7, 7), id="conv2d"),
    pytest.param("Conv2d", (4, 6, 3), {"padding": "valid", "bias": False}, (4, 7, 7), id="conv2d-valid-nobatch"),
    pytest.param("Conv2d", (4, 6, (3, 2)), {"padding": (1, 2), "groups": 2}, (2, 4, 7, 7), id="conv2d-groups"),
    pytest.param("Conv2d", (4, 6, 3), {"padding": 1, "padding_mode": "reflect"}, (2, 4, 7, 7), id="conv2d-reflect"),
    pytest.param("Conv2d", (4, 6, 3), {"padding": 2, "padding_mode": "circular"}, (2, 4, 7, 7), id="conv2d-circular"),
    pytest.param("Conv2d", (4, 6, 2), {"padding": "same", "padding_mode": "replicate"}, (2, 4, 5, 5), id="conv2d-both"),
    pytest.param("Conv3d", (2, 3, 2), {"padding": 1}, (2, 2, 4, 4, 4), id="conv3d"),
    pytest.param("ConvTranspose1d", (4, 6, 3), {"stride": 2}, (2, 4, 5), id="conv_transpose1d"),
    pytest.param(
        "ConvTranspose2d",
        (4, 6, 3),
        {"stride": 2, "padding": 1, "output_padding": 1, "groups": 2},
        (2, 4, 5, 5),
        id="conv_transpose2d",
    ),
    pytest.param("ConvTranspose3d", (2, 3, 2), {"dilation": 2}, (2, 2, 3, 3, 3), id="conv_transpose3d"),
]
layers = pytest.mark.parametrize(("kind", "args", "kwargs", "shape"), LAYERS)
KINDS = ["Linear", "Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"]


def make(kind: str, *args: Any, **kwargs: Any) -> Any:
    return getattr(masked_ops, f"Masked{kind}")(*args, **kwargs)


def make_dense(kind: str, *args: Any, **kwargs: Any) -> Any:
    return getattr(nn, kind)(*args, **kwargs)


def random_mask(like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Zeros and ones, at least one of each."""
    mask = torch.randint(0, 2, like.shape).to(dtype)
    mask.view(-1)[:2] = torch.tensor([0, 1]).to(dtype)
    return mask


def linear(mask: Tensor | None = None) -> Any:
    return masked_ops.MaskedLinear(6, 5, mask=random_mask(torch.empty(5, 6)) if mask is None else mask)


def mask_and_reference(module: nn.Module, *names: str) -> tuple[Any, nn.Module]:
    """``module`` with masked parameters, and a dense copy whose parameters hold the masked values."""
    reference = copy.deepcopy(module)
    for name in names:
        mask = random_mask(getattr(module, name))
        attach(module, name, mask)
        getattr(reference, name).data.mul_(mask)
    return module, reference


def output(module: nn.Module, *inputs: Any) -> Tensor:
    result = module(*inputs)
    return result[0] if isinstance(result, tuple) else result


class OwnForward(nn.Module):
    """Registers its parameter under a name of its own, and reads it twice."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(6, 5))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return (x @ self.kernel).relu() @ self.kernel.T


class ScaledLinear(nn.Linear):
    """Calls torch's forward through super()."""

    def __init__(self, in_features: int, out_features: int, scale: float = 2.0) -> None:
        super().__init__(in_features, out_features)
        self.scale = scale

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.scale

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale={self.scale}"


class PlainLinear(nn.Linear):
    """Keeps everything of torch's."""


class StandardizedConv(nn.Conv2d):
    """Changes the weight in ``_conv_forward``."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight - weight.mean(), bias)


class Stateful(nn.Linear):
    """Says itself what of it is pickled."""

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "cache": "dropped"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.restored = True


class Reduced(nn.Linear):
    """Says itself how it is constructed."""

    def __reduce__(self) -> Any:
        return (type(self), (self.in_features, self.out_features), self.__getstate__())


class RefusesSubclasses(nn.Module):
    def __init_subclass__(cls) -> None:
        raise RuntimeError("final")

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class RefusesAssignment(nn.Linear):
    def __setattr__(self, name: str, value: Any) -> None:
        if name == "__class__":
            raise TypeError("not this one")
        super().__setattr__(name, value)


# Every kind of module that has no fused kernel: factory, name of the parameter, inputs.
LIVE = [
    pytest.param(lambda: nn.Linear(6, 5), "bias", lambda: (torch.randn(3, 6),), id="linear-bias"),
    pytest.param(lambda: nn.Embedding(7, 4), "weight", lambda: (torch.tensor([[1, 2], [6, 1]]),), id="embedding"),
    pytest.param(
        lambda: nn.EmbeddingBag(7, 4, mode="max"), "weight", lambda: (torch.tensor([[1, 2], [6, 1]]),), id="bag"
    ),
    pytest.param(lambda: nn.LayerNorm(6), "weight", lambda: (torch.randn(3, 6),), id="layernorm"),
    pytest.param(lambda: nn.BatchNorm1d(6), "weight", lambda: (torch.randn(3, 6),), id="batchnorm"),
    pytest.param(lambda: nn.PReLU(6), "weight", lambda: (torch.randn(3, 6),), id="prelu"),
    pytest.param(lambda: nn.Bilinear(3, 4, 5), "weight", lambda: (torch.randn(2, 3), torch.randn(2, 4)), id="bilinear"),
    pytest.param(lambda: nn.RNN(4, 3), "weight_ih_l0", lambda: (torch.randn(5, 2, 4),), id="rnn"),
    pytest.param(
        lambda: nn.LSTM(4, 6, 2, bidirectional=True, proj_size=3),
        "weight_hr_l1_reverse",
        lambda: (torch.randn(5, 2, 4),),
        id="lstm",
    ),
    pytest.param(lambda: nn.GRU(4, 3), "bias_hh_l0", lambda: (torch.randn(5, 2, 4),), id="gru"),
    pytest.param(lambda: nn.LSTMCell(4, 3), "weight_hh", lambda: (torch.randn(2, 4),), id="lstm-cell"),
    pytest.param(lambda: nn.MultiheadAttention(4, 2), "in_proj_weight", lambda: (torch.randn(5, 2, 4),) * 3, id="mha"),
    pytest.param(OwnForward, "kernel", lambda: (torch.randn(3, 6),), id="own-forward"),
    pytest.param(lambda: StandardizedConv(2, 3, 3), "weight", lambda: (torch.randn(1, 2, 5, 5),), id="_conv_forward"),
]
live = pytest.mark.parametrize(("factory", "name", "inputs"), LIVE)


@contextlib.contextmanager
def counted(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> Iterator[list[tuple[Any, ...]]]:
    calls: list[tuple[Any, ...]] = []
    function = getattr(owner, name)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return function(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, wrapper)
        yield calls


# --- the named layers ------------------------------------------------------------------------------------------------


@layers
def test_layer_computes_what_a_dense_one_does(kind: str, args: Any, kwargs: Any, shape: Any) -> None:
    torch.manual_seed(1)
    layer = make(kind, *args, **kwargs)
    torch.manual_seed(1)
    dense = make_dense(kind, *args, **kwargs)
    assert torch.equal(layer.weight_orig, dense.weight), "the same seed gives the same weights"
    mask = random_mask(dense.weight)
    layer.set_mask(mask)
    dense.weight.data.mul_(mask)

    x, y = torch.randn(shape, requires_grad=True), torch.randn(0)
    y = x.detach().clone().requires_grad_()
    out, expected = layer(x), dense(y)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    out.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(layer.weight_orig.grad, dense.weight.grad * mask)
    if layer.bias is not None:
        torch.testing.assert_close(layer.bias.grad, dense.bias.grad)
    assert path_of(layer, "weight") == "fused"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "Transpose" in kind])
def test_output_size(kind: str) -> None:
    layer = make(kind, 2, 3, 3, stride=2)
    size = [2 * 5 + 2] * int(kind[-2])
    assert list(layer(torch.randn(1, 2, *([5] * len(size))), output_size=size).shape[2:]) == size
    with pytest.raises(ValueError, match="requested an output size"):
        layer(torch.randn(1, 2, *([5] * len(size))), output_size=[1] * len(size))
    layer.padding_mode = "circular"
    with pytest.raises(ValueError, match="padding mode"):
        layer(torch.randn(1, 2, *([5] * len(size))))


@pytest.mark.parametrize("kind", KINDS)
def test_fused_forward_masks_within_the_kernel(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args, x = ((2, 3), torch.randn(1, 2)) if kind == "Linear" else ((2, 3, 2), torch.randn(1, 2, *[4] * int(kind[-2])))
    layer = make(kind, *args)
    op = f"masked_{kind.lower().replace('transpose', '_transpose')}"
    with counted(monkeypatch, functional, op) as calls, counted(monkeypatch, functional, "apply_mask") as masked:
        layer(x)
    assert len(calls) == 1 and not masked
    assert calls[0][1] is layer.weight_orig and calls[0][2] is layer.weight_mask


def test_forward_reads_its_operands_without_module_getattr(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = linear()
    with counted(monkeypatch, nn.Module, "__getattr__") as calls:
        layer(torch.randn(2, 6))
    assert not calls


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_built_directly_the_mask_is_ones_in_the_dtype_of_the_weight(dtype: torch.dtype) -> None:
    layer = masked_ops.MaskedConv2d(2, 3, 2, dtype=dtype, device="cpu")
    assert layer.weight_mask.dtype is dtype and layer.weight_mask.shape == (3, 2, 2, 2) and layer.weight_mask.all()
    assert isinstance(layer.weight_orig, nn.Parameter) and not isinstance(layer.weight, nn.Parameter)
    assert type(layer) is masked_ops.MaskedConv2d and masked_names(layer) == ("weight",)
    assert layer(torch.ones(1, 2, 3, 3, dtype=dtype)).dtype is dtype


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_is_that_of_torch_prune(kind: str) -> None:
    args = (4, 6) if kind == "Linear" else (4, 6, 2)
    ours, theirs = make(kind, *args), make_dense(kind, *args)
    mask = random_mask(theirs.weight)
    torch_prune.custom_from_mask(theirs, "weight", mask)
    assert list(ours.state_dict()) == list(theirs.state_dict()) == ["bias", "weight_orig", "weight_mask"]
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.weight_mask, mask) and torch.equal(ours.weight, theirs.weight)
    ours.set_mask(1 - mask)
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(theirs.weight_mask, 1 - mask)


def test_state_dict_of_a_pruned_bias_has_the_order_of_torch_prune() -> None:
    ours, theirs = nn.Linear(6, 5), nn.Linear(6, 5)
    for name in ("bias", "weight"):
        attach(ours, name, random_mask(getattr(ours, name)))
        torch_prune.identity(theirs, name)
        assert list(ours.state_dict()) == list(theirs.state_dict())
    for name in ("weight", "bias"):
        detach(ours, name)
        torch_prune.remove(theirs, name)
        assert list(ours.state_dict()) == list(theirs.state_dict())


@pytest.mark.parametrize("weights_only", [True, False])
def test_state_dict_survives_torch_save(weights_only: bool) -> None:
    layer, other, file = linear(), linear(), io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=weights_only))
    assert torch.equal(other.weight, layer.weight)


def test_load_state_dict_by_assignment() -> None:
    layer = masked_ops.MaskedLinear(6, 5, device="meta")
    source = linear()
    layer.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(layer.weight, source.weight) and isinstance(layer.weight_orig, nn.Parameter)
    assert list(layer.state_dict()) == ["bias", "weight_orig", "weight_mask"]
    torch.testing.assert_close(layer(torch.ones(1, 6)), source(torch.ones(1, 6)))


@pytest.mark.parametrize("how", ["to_empty", "skip_init"])
def test_a_mask_that_had_no_values_starts_as_ones(how: str) -> None:
    if how == "skip_init":
        layer: Any = nn.utils.skip_init(masked_ops.MaskedLinear, 64, 64)
    else:
        layer = nn.Sequential(masked_ops.MaskedLinear(64, 64, device="meta"))
        assert "sparsity" not in repr(layer)
        layer = layer.to_empty(device="cpu")[0]
    assert torch.equal(layer.weight_mask, torch.ones(64, 64))
    layer.reset_parameters()
    assert layer.weight_orig.abs().max() <= 1 / 8


def test_meta_and_real_tensors_do_not_mix() -> None:
    with pytest.raises(ValueError, match="meta"):
        masked_ops.MaskedLinear(6, 5, device="meta", mask=torch.ones(5, 6))
    with pytest.raises(ValueError, match="meta"):
        linear().set_mask(torch.ones(5, 6, device="meta"))
    assert masked_ops.MaskedLinear(6, 5, device="meta")(torch.empty(2, 6, device="meta")).shape == (2, 5)


def test_conversion_takes_the_mask_along() -> None:
    layer = linear(random_mask(torch.empty(5, 6)))
    pruned = layer.weight == 0
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        layer.to(dtype)
        assert layer.weight_mask.dtype is dtype and layer.weight.dtype is dtype
        assert torch.equal(layer.weight == 0, pruned)
    layer = linear(random_mask(torch.empty(5, 6), torch.bool)).half()
    assert layer.weight_mask.dtype is torch.bool and layer.weight.dtype is torch.float16


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.float64])
def test_mask_keeps_its_dtype(dtype: torch.dtype) -> None:
    mask = random_mask(torch.empty(5, 6), dtype)
    layer = linear(mask)
    assert layer.weight_mask.dtype is dtype and torch.equal(layer.weight_mask, mask)
    x = torch.randn(2, 6)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight_orig * mask.to(x.dtype), layer.bias))


def test_mask_is_copied() -> None:
    mask = torch.ones(10, 6)[::2].requires_grad_()
    layer = linear(mask)
    with torch.no_grad():
        mask.zero_()
    assert layer.weight_mask.all() and not layer.weight_mask.requires_grad
    assert layer.weight_mask.untyped_storage().nbytes() == 4 * 30, "a view would keep its base alive"


def test_a_binary_mask_selects_and_a_soft_one_multiplies() -> None:
    layer = linear(torch.tensor([[0.0, 1.0, 0.5, 1.0, 1.0, 1.0]]).expand(5, 6))
    layer.weight_orig.data[:, 0] = float("nan")
    assert torch.equal(layer.weight[:, 0], torch.zeros(5))
    assert torch.equal(layer.weight[:, 2], layer.weight_orig[:, 2] / 2)
    assert layer(torch.ones(1, 6)).isfinite().all()
    weight = layer.weight.detach()
    detach(layer, "weight")
    assert torch.equal(layer.weight, weight)


def test_set_mask_writes_in_place_if_the_dtype_is_the_same() -> None:
    layer = linear()
    buffer, version = layer.weight_mask, layer.weight_mask._version
    layer.set_mask(torch.zeros(5, 6))
    assert layer.weight_mask is buffer and buffer._version > version and layer.sparsity == 1
    layer.set_mask(torch.ones(5, 6, dtype=torch.bool))
    assert layer.weight_mask.dtype is torch.bool and layer.sparsity == 0


def test_set_mask_of_a_module_built_for_inference() -> None:
    with torch.inference_mode():
        layer = linear(torch.ones(5, 6))
        assert not layer.weight_mask.is_inference()
        layer.double()
    assert layer.weight_mask.is_inference()
    layer.set_mask(torch.zeros(5, 6, dtype=torch.float64))
    assert layer.sparsity == 1 and not layer.weight_mask.is_inference()


@pytest.mark.parametrize(
    ("mask", "error"),
    [(torch.ones(6, 5), ValueError), (torch.ones(6), ValueError), (torch.ones(()), ValueError), ([1, 0], TypeError)],
    ids=["transposed", "row", "scalar", "list"],
)
def test_a_mask_that_does_not_fit_changes_nothing(mask: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"mask: .* expected, got"):
        masked_ops.MaskedLinear(6, 5, mask=mask)
    layer = linear()
    before = layer.weight_mask.clone()
    with pytest.raises(error, match=r"mask: .* expected, got"):
        layer.set_mask(mask)
    assert torch.equal(layer.weight_mask, before)


def test_sparsity_and_repr() -> None:
    layer = linear(torch.eye(5, 6))
    assert layer.sparsity == pytest.approx(25 / 30)
    assert repr(layer) == "MaskedLinear(in_features=6, out_features=5, bias=True, sparsity=0.8333)"
    attach(layer, "bias", torch.tensor([1, 1, 0, 0, 0]))
    assert repr(layer).endswith("bias=True, sparsity=0.8333, bias_sparsity=0.6)")
    scaled = ScaledLinear(6, 5)
    attach(scaled, "weight", torch.eye(5, 6))
    assert repr(scaled) == "MaskedScaledLinear(in_features=6, out_features=5, bias=True, scale=2.0, sparsity=0.8333)"
    empty = masked_ops.MaskedLinear(0, 5)
    assert empty.sparsity == 0


def test_an_attribute_of_the_users_own_wins() -> None:
    class Sparse(nn.Linear):
        def __init__(self) -> None:
            super().__init__(6, 5)
            self.sparsity = "mine"

        def set_mask(self) -> str:
            return "mine"

    module: Any = Sparse()
    attach(module, "weight", torch.zeros(5, 6))
    assert module.sparsity == "mine" and module.set_mask() == "mine"


# --- dense and back --------------------------------------------------------------------------------------------------


@layers
def test_from_dense_and_to_dense(kind: str, args: Any, kwargs: Any, shape: Any) -> None:
    dense = make_dense(kind, *args, **kwargs)
    mask = random_mask(dense.weight)
    state = list(dense.state_dict())
    layer = getattr(masked_ops, f"Masked{kind}").from_dense(dense, mask)
    assert layer.weight_orig is dense.weight and layer.bias is dense.bias
    assert type(layer) is getattr(masked_ops, f"Masked{kind}")
    assert type(dense) is getattr(nn, kind) and list(dense.state_dict()) == state, "the dense module stays as it is"
    again = layer.to_dense()
    assert type(again) is getattr(nn, kind) and isinstance(again.weight, nn.Parameter)
    assert again.weight.data_ptr() != dense.weight.data_ptr() and torch.equal(again.weight, dense.weight * mask)
    x = torch.randn(shape)
    torch.testing.assert_close(again(x), layer(x))
    assert masked_names(layer) == ("weight",)


def test_from_dense_keeps_the_users_class() -> None:
    dense = ScaledLinear(6, 5, scale=3.0)
    layer: Any = masked_ops.MaskedLinear.from_dense(dense)
    assert isinstance(layer, ScaledLinear) and isinstance(layer, masked_ops.MaskedLinear) and layer.scale == 3.0
    assert type(layer.to_dense()) is ScaledLinear

    class Derived(masked_ops.MaskedLinear):
        pass

    assert type(Derived.from_dense(nn.Linear(6, 5))) is Derived
    with pytest.raises(ValueError, match="Derived can extend"):
        Derived.from_dense(dense)


def test_from_dense_shares_no_containers() -> None:
    dense = nn.Linear(6, 5)
    layer = masked_ops.MaskedLinear.from_dense(dense)
    layer.register_forward_hook(lambda *args: None)
    layer.extra = nn.ReLU()
    layer.eval()
    assert not dense._forward_hooks and not dense._modules and dense.training


def test_from_dense_refuses() -> None:
    with pytest.raises(TypeError, match=r"torch\.nn\.Linear expected, got Conv1d"):
        masked_ops.MaskedLinear.from_dense(nn.Conv1d(1, 1, 1))
    with pytest.raises(ValueError, match="masked already"):
        masked_ops.MaskedLinear.from_dense(linear())
    with pytest.raises(ValueError, match="parameter's shape"):
        masked_ops.MaskedLinear.from_dense(nn.Linear(6, 5), torch.ones(6, 5))
    parametrized = parametrize.register_parametrization(nn.Linear(6, 5), "bias", nn.Identity())
    with pytest.raises(ValueError, match="can extend"):
        masked_ops.MaskedLinear.from_dense(parametrized)


def test_to_dense_drops_masks_and_pruning_methods() -> None:
    layer = linear()
    attach(layer, "bias", torch.zeros(5))
    method = torch_prune.Identity()
    method._tensor_name = "weight"
    layer.register_forward_pre_hook(method)
    layer.register_forward_pre_hook(print)
    dense: Any = layer.to_dense()
    assert list(dense.state_dict()) == ["weight", "bias"] and not dense.bias.any()
    assert list(dense._forward_pre_hooks.values()) == [print]
    assert masked_names(layer) == ("weight", "bias") and method in layer._forward_pre_hooks.values()


# --- weight is live --------------------------------------------------------------------------------------------------


def test_weight_is_never_stale() -> None:
    layer = linear()
    for change in (
        lambda: layer.weight_orig.data.normal_(),
        lambda: torch.optim.SGD(layer.parameters(), 0.1).step(),
        lambda: layer.load_state_dict(linear().state_dict()),
        lambda: layer.weight_mask.zero_(),
        lambda: layer.double(),
    ):
        layer(torch.ones(1, 6, dtype=layer.weight.dtype)).sum().backward()
        change()
        assert torch.equal(layer.weight, layer.weight_orig * layer.weight_mask)


def test_a_penalty_on_weight_has_a_gradient_after_inference() -> None:
    layer = linear()
    with torch.no_grad():
        layer(torch.ones(1, 6))
    layer.weight.square().sum().backward()
    torch.testing.assert_close(layer.weight_orig.grad, 2 * layer.weight.detach())


def test_channels_last_weights_keep_their_format() -> None:
    conv = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
    strides = conv.weight.stride()
    attach(conv, "weight", random_mask(conv.weight))
    for tensor in (conv.weight_mask, conv.weight, conv.to_dense().weight):  # type: ignore[operator]
        assert tensor.stride() == strides
    detach(conv, "weight")
    assert conv.weight.stride() == strides


ASSIGNMENTS = [
    pytest.param(lambda m: nn.Parameter(torch.ones(5, 6)), None, "", id="parameter"),
    pytest.param(lambda m: nn.Parameter(torch.ones(6, 5)), ValueError, r"\(5, 6\).*\(6, 5\)", id="other-shape"),
    pytest.param(lambda m: torch.ones(5, 6), TypeError, "which becomes 'weight_orig'", id="tensor"),
    pytest.param(lambda m: m.weight, TypeError, "which becomes 'weight_orig'", id="itself"),
    pytest.param(lambda m: None, TypeError, "cannot assign 'NoneType'", id="none"),
    pytest.param(lambda m: nn.Buffer(torch.ones(5, 6)), (KeyError, TypeError), "weight", id="buffer"),
]


@pytest.mark.parametrize(("value", "error", "message"), ASSIGNMENTS)
@pytest.mark.parametrize("how", ["built", "attached"])
def test_assigning_weight(value: Callable[[Any], Any], error: Any, message: str, how: str) -> None:
    module: Any = linear() if how == "built" else PlainLinear(6, 5)
    if how == "attached":
        attach(module, "weight", random_mask(module.weight))
    before, dictionary = module.state_dict(keep_vars=True), dict(vars(module))
    new = value(module)
    if error is None:
        module.weight = new
        assert module.weight_orig is new and torch.equal(module.weight, module.weight_mask)
    else:
        with pytest.raises(error, match=message):
            module.weight = new
        assert all(module.state_dict(keep_vars=True)[key] is tensor for key, tensor in before.items())
    assert list(module.state_dict()) == ["bias", "weight_orig", "weight_mask"] and list(vars(module)) == list(
        dictionary
    )


def test_deleting_weight() -> None:
    layer = linear()
    with pytest.raises(AttributeError, match="remove its mask first"):
        del layer.weight
    assert layer.weight.shape == (5, 6)


def test_errors_behind_weight_are_told() -> None:
    layer = linear()
    layer.weight_mask = None
    with pytest.raises(RuntimeError, match=r"MaskedLinear\.weight cannot be computed"):
        _ = layer.weight
    layer = linear()
    del layer.weight_orig
    with pytest.raises(RuntimeError, match="no attribute 'weight_orig'"):
        _ = layer.weight
    with pytest.raises(AttributeError, match="no attribute 'wait'"):
        _ = layer.wait


# --- reset_parameters ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_reset_parameters_initializes_what_is_beneath_the_mask(kind: str) -> None:
    args = (4, 6) if kind == "Linear" else (4, 6, 2)
    layer, dense = make(kind, *args), make_dense(kind, *args)
    mask = random_mask(layer.weight)
    layer.set_mask(mask)
    param = layer.weight_orig
    torch.manual_seed(2)
    layer.reset_parameters()
    torch.manual_seed(2)
    dense.reset_parameters()
    assert layer.weight_orig is param and torch.equal(param, dense.weight) and torch.equal(layer.bias, dense.bias)
    assert torch.equal(layer.weight_mask, mask)


def test_reset_parameters_of_other_modules() -> None:
    class Replaces(nn.Linear):
        def reset_parameters(self) -> None:
            self.weight = nn.Parameter(torch.full((5, 6), 3.0))
            self.was_reset = True

    module: Any = Replaces(6, 5)
    del module.was_reset
    mask = random_mask(module.weight)
    attach(module, "weight", mask)
    module.weight_orig.data.zero_()
    module.reset_parameters()
    assert module.was_reset and list(module.state_dict()) == ["bias", "weight_orig", "weight_mask"]
    assert torch.equal(module.weight_orig, torch.full((5, 6), 3.0)) and torch.equal(module.weight_mask, mask)

    attention: Any = nn.MultiheadAttention(4, 2)
    attach(attention, "in_proj_weight", torch.ones(12, 4))
    before = attention.in_proj_weight_orig.clone()
    attention._reset_parameters()
    assert not torch.equal(attention.in_proj_weight_orig, before)

    lstm: Any = nn.LSTM(4, 3)
    attach(lstm, "weight_ih_l0", torch.ones(12, 4))
    before = lstm.weight_ih_l0_orig.clone()
    lstm.reset_parameters()
    assert not torch.equal(lstm.weight_ih_l0_orig, before) and "_flat_weights" not in vars(lstm)

    embedding: Any = nn.Embedding(5, 3, padding_idx=1)
    attach(embedding, "weight", torch.ones(5, 3))
    embedding.reset_parameters()
    assert not embedding.weight_orig[1].any() and embedding.weight_orig[0].any()

    norm: Any = nn.LayerNorm(4)
    attach(norm, "weight", torch.tensor([1, 0, 1, 0]))
    norm.weight_orig.data.zero_()
    norm.reset_parameters()
    assert norm.weight_orig.tolist() == [1, 1, 1, 1]


def test_modules_without_reset_parameters_get_none() -> None:
    module = OwnForward()
    attach(module, "kernel", torch.ones(6, 5))
    assert not hasattr(module, "reset_parameters")


# --- any parameter of any module -------------------------------------------------------------------------------------


@live
def test_live_parameters(factory: Any, name: str, inputs: Any) -> None:
    module = factory()
    cls, keys, param = type(module), list(vars(module)), getattr(module, name)
    module.train()
    param.grad = torch.ones_like(param)
    module, reference = mask_and_reference(module, name)
    mask = getattr(module, f"{name}_mask").clone()
    assert masked_names(module) == (name,) and path_of(module, name) == "live" and isinstance(module, cls)
    assert getattr(module, f"{name}_orig") is param and (param.grad == 1).all()

    xs = inputs()
    out, expected = output(module, *xs), output(reference, *xs)
    torch.testing.assert_close(out, expected)
    param.grad = None
    grad = torch.randn_like(out)
    out.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(param.grad, getattr(reference, name).grad * mask)

    grad = param.grad
    detach(module, name)
    assert type(module) is cls and getattr(module, name) is param and param.grad is grad
    assert sorted(vars(module)) == sorted(keys) and masked_names(module) == ()
    assert list(module._parameters)[-1] == name, "torch's remove puts it last"
    assert torch.equal(param == 0, mask == 0)
    xs = inputs()
    torch.testing.assert_close(output(module, *xs), output(reference, *xs))


@live
def test_live_parameters_copy_and_pickle(factory: Any, name: str, inputs: Any) -> None:
    module, _ = mask_and_reference(factory(), name)
    xs = inputs()
    for before in (True, False):
        if not before:
            output(module, *xs)
        for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert type(twin) is type(module) and masked_names(twin) == (name,)
            assert list(twin.state_dict()) == list(module.state_dict())
            twin.train(module.training)
            torch.testing.assert_close(output(twin, *xs), output(module, *xs))
            assert getattr(twin, f"{name}_orig") is not getattr(module, f"{name}_orig")


def test_detach_without_applying_the_mask() -> None:
    layer = linear(torch.zeros(5, 6))
    param, values = layer.weight_orig, layer.weight_orig.clone()
    detach(layer, "weight", apply_mask=False)
    assert type(layer) is nn.Linear and layer.weight is param and torch.equal(layer.weight, values)


def test_detach_under_inference_mode_leaves_a_parameter_that_trains() -> None:
    layer = linear()
    with torch.inference_mode():
        detach(layer, "weight")
    layer(torch.ones(1, 6)).sum().backward()
    assert layer.weight.grad is not None


def test_a_mask_that_is_not_saved_leaves_no_trace() -> None:
    layer = linear()
    layer.register_buffer("weight_mask", layer.weight_mask, persistent=False)
    assert list(layer.state_dict()) == ["bias", "weight_orig"]
    detach(layer, "weight")
    assert not layer._non_persistent_buffers_set


def test_hooks_are_left_alone() -> None:
    module: Any = nn.Linear(6, 5)
    calls: list[str] = []
    module.register_forward_pre_hook(lambda *args: calls.append("pre"))
    module.register_forward_hook(lambda *args: calls.append("post"))
    attach(module, "weight", torch.ones(5, 6))
    module(torch.ones(1, 6))
    detach(module, "weight")
    module(torch.ones(1, 6))
    assert calls == ["pre", "post"] * 2


def test_an_optimizer_keeps_its_parameter() -> None:
    module: Any = nn.Linear(6, 5)
    optimizer = torch.optim.Adam(module.parameters())
    mask = random_mask(module.weight)
    for step in range(4):
        if step == 1:
            attach(module, "weight", mask)
        if step == 3:
            detach(module, "weight")
        before = module.weight.detach().clone()
        optimizer.zero_grad()
        module(torch.randn(3, 6)).sum().backward()
        optimizer.step()
        assert not torch.equal(module.weight, before)
    assert optimizer.param_groups[0]["params"][0] is module.weight


def test_tied_parameters_are_masked_one_by_one() -> None:
    a: Any = nn.Linear(4, 6, bias=False)
    b: Any = nn.Embedding(6, 4)
    b.weight = a.weight
    attach(a, "weight", torch.zeros(6, 4))
    assert a.weight_orig is b.weight and b.weight.any() and not a.weight.any()


def test_complex_parameters() -> None:
    module: Any = nn.Module()
    module.register_parameter("w", nn.Parameter(torch.tensor([1 + 1j, 2j])))
    attach(module, "w", torch.tensor([True, False]))
    assert module.w.tolist() == [1 + 1j, 0]


def test_masked_batchnorm_keeps_its_statistics() -> None:
    module, reference = mask_and_reference(nn.BatchNorm1d(6), "weight", "bias")
    x = torch.randn(8, 6)
    for m in (module, reference):
        m.train()(x)
        m.eval()
    assert torch.equal(module.running_mean, reference.running_mean) and module.num_batches_tracked == 1
    torch.testing.assert_close(module(x), reference(x))


def test_attributes_set_in_forward_stay() -> None:
    module, _ = mask_and_reference(OwnForward(), "kernel")
    module(torch.randn(2, 6))
    assert module.calls == 1


# --- recurrent modules -----------------------------------------------------------------------------------------------

RECURRENT = [nn.RNN, nn.LSTM, nn.GRU]


@pytest.mark.parametrize("cls", RECURRENT)
def test_flat_weights_are_right_before_during_and_after(cls: Any) -> None:
    module = cls(4, 3)

    def parameters() -> int:
        return sum(isinstance(weight, nn.Parameter) for weight in module._flat_weights)

    attach(module, "weight_ih_l0", random_mask(module.weight_ih_l0))
    assert parameters() == 3
    attach(module, "bias_hh_l0", random_mask(module.bias_hh_l0))
    assert parameters() == 2
    module(torch.randn(5, 2, 4))
    assert torch.equal(module._flat_weights[0], module.weight_ih_l0)
    assert torch.equal(module.all_weights[0][0], module.weight_ih_l0)
    module.double()
    assert all(weight.dtype is torch.float64 for weight in module._flat_weights)
    module.weight_hh_l0 = nn.Parameter(torch.zeros_like(module.weight_hh_l0))
    assert module._flat_weights[1] is module.weight_hh_l0
    module.flatten_parameters()
    for name in ("weight_ih_l0", "bias_hh_l0"):
        detach(module, name)
    assert type(module) is cls and parameters() == 4 and vars(module)["_flat_weights"][0] is module.weight_ih_l0
    assert len(module._flat_weight_refs) == 4 and module._flat_weight_refs[0]() is module.weight_ih_l0


@pytest.mark.parametrize("cls", [*RECURRENT, nn.MultiheadAttention])
def test_each_parameter_is_masked_once_a_forward(cls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = cls(4, 4)
    names = [name for name, _ in module.named_parameters(recurse=False)]
    for name in names:
        attach(module, name, random_mask(getattr(module, name)))
    xs = (torch.randn(5, 2, 4),) * (3 if cls is nn.MultiheadAttention else 1)
    with counted(monkeypatch, functional, "apply_mask") as calls:
        module(*xs)
    assert len(calls) == len(names)


def test_recurrent_modules_with_a_forward_of_their_own() -> None:
    class Reversed(nn.LSTM):
        def forward(self, input: Tensor, hx: Any = None) -> Any:
            self.seen = input.shape
            return super().forward(input.flip(0), hx)

    module, reference = mask_and_reference(Reversed(4, 3), "weight_hh_l0")
    x = torch.randn(5, 2, 4)
    torch.testing.assert_close(module(x)[0], reference(x)[0])
    assert module.seen == x.shape


def test_packed_sequences() -> None:
    module, reference = mask_and_reference(nn.GRU(4, 3, batch_first=True), "weight_ih_l0", "weight_hh_l0")
    packed = nn.utils.rnn.pack_sequence([torch.randn(5, 4), torch.randn(2, 4)])
    torch.testing.assert_close(module(packed)[0].data, reference(packed)[0].data)


# --- attention -------------------------------------------------------------------------------------------------------


def transformer_layer() -> tuple[nn.TransformerEncoderLayer, nn.TransformerEncoderLayer]:
    layer: Any = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    reference = copy.deepcopy(layer)
    for path, name in [
        ("self_attn", "in_proj_weight"),
        ("self_attn", "in_proj_bias"),
        ("self_attn.out_proj", "weight"),
        ("linear1", "weight"),
        ("linear2", "bias"),
        ("norm1", "weight"),
    ]:
        module = layer.get_submodule(path)
        mask = random_mask(getattr(module, name))
        attach(module, name, mask)
        getattr(reference.get_submodule(path), name).data.mul_(mask)
    return layer, reference


def test_transformer_layer_in_training_and_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, reference = transformer_layer()
    x = torch.randn(2, 5, 8)
    for _ in range(2):  # torch's pruning raises "backward a second time" here
        out, expected = layer(x), reference(x)
        torch.testing.assert_close(out, expected)
        out.sum().backward()
        expected.sum().backward()
    attention: Any = layer.self_attn
    torch.testing.assert_close(
        attention.out_proj.weight_orig.grad,
        reference.self_attn.out_proj.weight.grad * attention.out_proj.weight_mask,
    )
    layer.eval(), reference.eval()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), counted(monkeypatch, torch, "_transformer_encoder_layer_fwd") as native:
            torch.testing.assert_close(layer(x), reference(x))
            assert len(native) == 2, "both on torch's native path"
    torch.testing.assert_close(layer(x), reference(x))


@pytest.mark.parametrize("grad", [True, False], ids=["python", "native"])
def test_attention_output_projection(grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = nn.MultiheadAttention(8, 2, batch_first=True)
    reference = copy.deepcopy(module)
    mask = random_mask(module.out_proj.weight)
    attach(module.out_proj, "weight", mask)
    reference.out_proj.weight.data.mul_(mask)
    assert isinstance(module.out_proj, nn.modules.linear.NonDynamicallyQuantizableLinear)
    assert type(module.out_proj).__name__ == "MaskedNonDynamicallyQuantizableLinear"
    x = torch.randn(2, 5, 8)
    if not grad:
        module.eval(), reference.eval()
    with torch.set_grad_enabled(grad), counted(monkeypatch, torch, "_native_multi_head_attention") as native:
        for a, b in zip(module(x, x, x), reference(x, x, x), strict=True):
            torch.testing.assert_close(a, b)
    assert len(native) == (0 if grad else 2)
    detach(module.out_proj, "weight")
    assert type(module.out_proj) is nn.modules.linear.NonDynamicallyQuantizableLinear


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


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


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
    torch.testing.assert_close(old(torch.ones(1, 6)), expected)
    with pytest.raises(ValueError, match="something else computes"):
        detach(old, "weight")


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


def interrupted(line: int, function: Callable[[], object], start: str | None = None) -> bool:
    """Run ``function`` and raise KeyboardInterrupt at the ``line``-th line that it executes; False if it has fewer.

    With ``start``, lines count from the first call of a function of this name on.
    """
    count = 0

    def trace(frame: Any, event: str, arg: Any) -> Any:
        nonlocal count, start
        if frame.f_code.co_name == start:
            start = None
        if event == "line" and start is None:
            count += 1
            if count == line:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(previous)
    return False


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
        if not interrupted(line, lambda module=module: change(module)):
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
            more = interrupted(line, lambda modules=modules: fail(modules), start="restore")
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


def test_the_interface_is_importable_from_nn() -> None:
    for name in ("attach", "detach", "masked_names", "set_mask", "atomic", "path_of"):
        assert name in masked_nn.__all__ and callable(getattr(masked_nn, name))
