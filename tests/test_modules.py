"""The masked layers, and masked parameters of any module, against dense torch modules that hold the masked values."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from masked_modules import (
    OwnForward,
    PlainLinear,
    ScaledLinear,
    StandardizedConv,
    counted,
    linear,
    make,
    make_dense,
    mask_and_reference,
    output,
    random_mask,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune

import masked_ops
from masked_ops import functional, prune
from masked_ops.nn import attach, detach, masked_names, path_of

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
    [
        (torch.ones(6, 5), ValueError),
        (torch.ones(6), ValueError),
        (torch.ones(()), ValueError),
        (torch.ones(5, 6).to_sparse(), ValueError),
        ([1, 0], TypeError),
    ],
    ids=["transposed", "row", "scalar", "sparse", "list"],
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
    assert masked_ops.MaskedConv1d(1, 0, 1).sparsity == 0
    with FakeTensorMode():
        assert repr(masked_ops.MaskedLinear(6, 5)) == "MaskedLinear(in_features=6, out_features=5, bias=True)"


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


@pytest.mark.parametrize("own", [nn.Parameter(torch.ones(2)), torch.ones(2), nn.ReLU()], ids=lambda own: type(own))
def test_a_parameter_buffer_or_child_of_the_users_own_wins(own: Any) -> None:
    class Sparse(nn.Linear):
        def __init__(self) -> None:
            super().__init__(6, 5)
            if isinstance(own, (nn.Parameter, nn.Module)):
                self.sparsity = own
            else:
                self.register_buffer("sparsity", own)

    module: Any = Sparse()
    attach(module, "weight", torch.eye(6)[:5])
    assert module.sparsity is own
    masked_ops.pack(module)
    assert module.sparsity is own


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


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("packed", [False, True], ids=["masked", "packed"])
def test_nested_tensors(packed: bool) -> None:
    """An encoder makes them of a padded batch in evaluation."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2)
    dense = copy.deepcopy(encoder).eval()
    for name in ("linear1", "self_attn.out_proj"):
        for model in (encoder, dense):
            torch.manual_seed(1)
            prune.random_unstructured(model.layers[1].get_submodule(name), "weight", amount=0.5)
    prune.remove(dense)
    if packed:
        masked_ops.pack(encoder)
    encoder.eval()
    padding = torch.tensor([[False, False, False], [False, False, True]])
    with torch.no_grad():
        torch.testing.assert_close(*(m(torch.ones(2, 3, 8), src_key_padding_mask=padding) for m in (encoder, dense)))
    layer, same = encoder.layers[1].linear1, dense.layers[1].linear1
    for layout in (torch.strided, torch.jagged):
        parts = torch.nested.nested_tensor([torch.randn(2, 8), torch.randn(3, 8)], layout=layout)
        outputs = [[part.clone() for part in module(parts).unbind()] for module in (layer, same)]
        torch.testing.assert_close(*outputs)
        for module in (layer, same):
            module(parts).unbind()[1].sum().backward()
        torch.testing.assert_close(layer.bias.grad, same.bias.grad)
        left = layer.weight.detach() != 0
        gradient = layer.weight_values.grad if packed else layer.weight_orig.grad[left]
        torch.testing.assert_close(gradient, same.weight.grad[left])


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
