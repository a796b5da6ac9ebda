"""masked_matmul, and the layers of other libraries that keep their weight as [in, out]."""

from __future__ import annotations

import copy
import io
import pickle
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from generators import assert_exact, compiled_only, integers, mask_of, masked, name_of, normal, spoiled
from torch import Tensor, nn

import masked_ops
from masked_ops import _ops, prune
from masked_ops._packed_class import bits_of
from masked_ops.nn import masked_names, path_of

pytestmark = pytest.mark.usefixtures("device")

SIZES = ((), (1,), (3,), (17,), (200,), (2, 3), (0,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("pattern", ["most", "few", "all", "none"])
def test_exact_on_integers(pattern: str, dtype: torch.dtype) -> None:
    for n, (size, (K, N)) in enumerate((s, d) for s in SIZES for d in ((1, 1), (33, 20), (16, 65))):
        mask = mask_of(pattern, K, N, dtype=torch.bool if n % 2 else dtype)
        x, grad = integers(*size, K, dtype=dtype), integers(*size, N, dtype=dtype)
        w = spoiled(integers(K, N, dtype=dtype), mask)
        bias = integers(N, dtype=dtype) if n % 3 else None
        for _ in range(2):  # a mask is known from its second use on
            leaves = [t.clone().requires_grad_() for t in (x, w)]
            y = masked_ops.masked_matmul(*leaves, mask, bias)
            y.backward(grad)
            dense = [t.double().clone().requires_grad_() for t in (x, masked(w, mask))]
            expected = dense[0] @ dense[1] + (0 if bias is None else bias.double())
            expected.backward(grad.double())
            assert y.dtype is dtype
            assert_exact(y.detach().double(), expected.detach(), size, K, N)
            assert_exact(leaves[0].grad.double(), dense[0].grad, size, K, N)
            assert_exact(leaves[1].grad.double(), masked(dense[1].grad, mask), size, K, N)

            bits, values = bits_of(mask != 0), w[mask != 0].requires_grad_()
            leaf = x.clone().requires_grad_()
            y = masked_ops.packed_matmul(leaf, values, bits, N, bias)
            y.backward(grad)
            assert_exact(y.detach().double(), expected.detach(), size, K, N)
            assert_exact(leaf.grad.double(), dense[0].grad, size, K, N)
            assert_exact(values.grad.double(), dense[1].grad[mask != 0], size, K, N)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=name_of)
def test_gradients_of_any_order(dtype: torch.dtype, soft: bool) -> None:
    mask = torch.rand(5, 4) if soft else torch.rand(5, 4) < 0.5
    leaves = [torch.randn(*size, dtype=dtype, requires_grad=True) for size in ((2, 3, 5), (5, 4), (4,))]

    def run(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return masked_ops.masked_matmul(x, w, mask, b)

    assert torch.autograd.gradcheck(run, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(run, leaves)


def test_under_autocast_compile_and_vmap() -> None:
    x, w, bias = normal(6, 40), normal(40, 24).requires_grad_(), normal(24)
    mask = mask_of("few", 40, 24)
    with torch.autocast(x.device.type, torch.bfloat16):
        y = masked_ops.masked_matmul(x, w, mask, bias)
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y.float(), x @ masked(w, mask) + bias, rtol=0.03, atol=0.1)
    y.float().sum().backward()
    assert w.grad is not None and w.grad.dtype is torch.float32 and not w.grad[~mask].any()
    with torch.autocast(x.device.type, torch.bfloat16):  # double is left alone
        assert masked_ops.masked_matmul(x.double(), w.double(), mask).dtype is torch.float64

    bits, values = bits_of(mask), w.detach()[mask].requires_grad_()
    with torch.autocast(x.device.type, torch.bfloat16):
        packed = masked_ops.packed_matmul(x, values, bits, 24, bias)
    torch.testing.assert_close(packed, y.detach())
    packed.float().sum().backward()
    torch.testing.assert_close(values.grad, w.grad[mask])

    expected = masked_ops.masked_matmul(x, w, mask, bias)
    compiled = torch.compile(masked_ops.masked_matmul, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, w, mask, bias), expected)
    compiled = torch.compile(masked_ops.packed_matmul, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, values, bits, 24, bias), expected)
    mapped = torch.func.vmap(masked_ops.masked_matmul, (0, None, None, None))
    torch.testing.assert_close(mapped(x, w, mask, bias), expected)


def test_errors_name_the_argument() -> None:
    x, w = torch.ones(2, 3), torch.ones(3, 4)
    for arguments, message in (
        ((x.T, w, w), r"input must have 3 features in its last dimension, as weight has, got shape \[3, 2\]"),
        ((torch.tensor(1.0), w, w), "input must have 3 features"),
        ((x, w, w.T), "mask must have the shape"),
        ((x.double(), w, w), "input"),
        ((x, w[0], w[0]), "weight must have 2 dimensions"),
        ((x, w.int(), w), "floating"),
        ((x, w, w, torch.ones(3)), "size of tensor"),
    ):
        with pytest.raises(RuntimeError, match=message):
            masked_ops.masked_matmul(*arguments)
    for call, operands in ((masked_ops.masked_matmul, (w,)), (masked_ops.packed_matmul, (bits_of(w != 0), 4))):
        with pytest.raises(TypeError, match=r"weight.* must be a Tensor, got None"):
            call(x, None, *operands)
    with pytest.raises(RuntimeError, match="input must have 3 features"):
        masked_ops.packed_matmul(x.T, torch.ones(12), bits_of(w != 0), 4)


# --- modules ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def Conv1D() -> Iterator[type[nn.Module]]:  # noqa: N802
    """A class as transformers has one, which its installation may lack."""
    name = "transformers.pytorch_utils"
    module = types.ModuleType(name)

    class Conv1D(nn.Module):
        def __init__(self, nf: int, nx: int) -> None:
            super().__init__()
            self.nf, self.nx = nf, nx
            self.weight = nn.Parameter(torch.randn(nx, nf))
            self.bias = nn.Parameter(torch.randn(nf))

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.bias, x.reshape(-1, self.nx), self.weight).view(*x.shape[:-1], self.nf)

    Conv1D.__module__, Conv1D.__qualname__ = name, "Conv1D"
    vars(module)["Conv1D"] = Conv1D
    before = {key: sys.modules.get(key) for key in ("transformers", name)}
    sys.modules.setdefault("transformers", types.ModuleType("transformers"))
    sys.modules[name] = module
    yield Conv1D
    for key, value in before.items():
        if value is None:
            del sys.modules[key]
        else:
            sys.modules[key] = value


def test_conv1d_of_transformers_is_fused(Conv1D: Any) -> None:
    model = nn.Sequential(Conv1D(24, 16), nn.GELU(), Conv1D(8, 24))
    dense = copy.deepcopy(model)
    layers = [(layer, "weight") for layer in model if not isinstance(layer, nn.GELU)]
    prune.global_unstructured(layers, pruning_method=prune.L1Unstructured, amount=0.8)
    assert [path_of(layer, "weight") for layer, _ in layers] == ["fused", "fused"]
    assert all(isinstance(layer, Conv1D) and type(layer).__name__ == "MaskedConv1D" for layer, _ in layers)
    with torch.no_grad():
        for layer, twin in zip((model[0], model[2]), (dense[0], dense[2]), strict=True):
            twin.weight.copy_(layer.weight)

    x = torch.randn(2, 5, 16)
    for _ in range(2):
        model.zero_grad(), dense.zero_grad()
        torch.testing.assert_close(model(x), dense(x))
        model(x).square().sum().backward(), dense(x).square().sum().backward()
        for layer, twin in zip((model[0], model[2]), (dense[0], dense[2]), strict=True):
            torch.testing.assert_close(layer.weight_orig.grad, twin.weight.grad * layer.weight_mask)
            torch.testing.assert_close(layer.bias.grad, twin.bias.grad)

    listed = masked_ops.report(model, batch=10)
    assert [layer.kind for layer in listed] == ["Conv1D", "Conv1D"]
    assert listed[0].dense_flops == 2 * 16 * 24 * 10 and listed[0].path != "live"
    assert masked_ops.report(model, batch=x)[0].dense_flops == listed[0].dense_flops

    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), _saved(model)):
        assert [type(a) for a in twin] == [type(a) for a in model]
        assert torch.equal(twin(x), model(x))
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(traced(x), dense(x))

    masked_ops.pack(model)
    assert [type(layer).__name__ for layer in model] == ["PackedConv1D", "GELU", "PackedConv1D"]
    assert model[0].weight_values.numel() == listed[0].nnz
    of_packed = masked_ops.report(model, batch=10)
    assert [(layer.kind, layer.nnz, layer.dense_flops) for layer in of_packed] == [
        (layer.kind, layer.nnz, layer.dense_flops) for layer in listed
    ]
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), masked_ops.freeze(_saved(model))):
        assert [type(a) for a in twin] == [type(a) for a in model]
        torch.testing.assert_close(twin(x), dense(x))
    masked_ops.unpack(model)
    torch.testing.assert_close(model(x), dense(x))

    forward = model[0].forward
    prune.remove(model)
    assert [type(layer) for layer in model] == [Conv1D, nn.GELU, Conv1D]
    torch.testing.assert_close(model(x), dense(x))
    torch.testing.assert_close(forward(x), dense[0](x))  # kept by a hook of accelerate's, say


@pytest.mark.cpu_only("about paths of the CPU's")
@compiled_only
def test_report_asks_for_the_product_by_input(Conv1D: Any) -> None:
    """Not for a linear layer's: of some shapes that takes another path."""
    layer = Conv1D(64, 256)
    differ = 0
    for amount in (0.95, 0.9, 0.8, 0.6, 0.5):
        pruned = prune.random_unstructured(copy.deepcopy(layer), "weight", amount)
        packed = masked_ops.pack(copy.deepcopy(pruned))
        for batch in (1, 4, 32, 128):
            weight, mask = pruned.weight_orig, pruned.weight_mask
            path = _ops.explain_linear(weight, mask, batch, True)
            of_bits = _ops.explain_packed_linear(packed.weight_values, packed.weight_bits, 64, batch, True)
            differ += path != _ops.explain_linear(weight, mask, batch)
            for module, expected in ((pruned, path), (packed, of_bits)):
                (listed,) = (layer for layer in masked_ops.report(module, batch) if layer.name == "weight")
                assert (listed.path, listed.reason) == expected
    assert differ


def _saved(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_subclasses_and_biases_of_conv1d(Conv1D: Any) -> None:
    class Twice(Conv1D):  # calls the fused forward
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class OwnProduct(Conv1D):
        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    x = torch.randn(3, 6)
    for cls in (Conv1D, Twice, OwnProduct):
        layer, dense = cls(4, 6), cls(4, 6)
        prune.random_unstructured(layer, "weight", 0.5)
        prune.random_unstructured(layer, "bias", 2)
        assert path_of(layer, "weight") == ("fused" if cls is Conv1D else "live")
        assert set(masked_names(layer)) == {"weight", "bias"}
        with torch.no_grad():
            dense.weight.copy_(layer.weight), dense.bias.copy_(layer.bias)
        torch.testing.assert_close(layer(x), dense(x))
        if cls is Conv1D:
            packed = masked_ops.pack(copy.deepcopy(layer))
            torch.testing.assert_close(packed(x), dense(x))
            prune.remove(packed, "weight")
            torch.testing.assert_close(packed(x), dense(x))
        else:
            with pytest.raises(ValueError, match="nothing to pack"):
                masked_ops.pack(copy.deepcopy(layer))
        prune.remove(layer, "bias")
        torch.testing.assert_close(layer(x), dense(x))
        prune.remove(layer, "weight")
        assert type(layer) is cls
        torch.testing.assert_close(layer(x), dense(x))
