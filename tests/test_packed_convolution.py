"""Packed convolutions: the family of operations, and the modules against the masked and the dense ones."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from generators import (
    LAYOUTS,
    PACKED_PATHS,
    PATTERNS,
    assert_exact,
    every_capability,
    every_float,
    integers,
    mask_of,
    poisoned,
    refuses,
    running_on,
)
from test_convolution import PROBLEMS, TORCHS, Problem
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

import masked_ops
from masked_ops import _ops, prune, reference
from masked_ops._packed_class import bits_of

OURS: dict[str, Callable[..., Tensor]] = {name: getattr(masked_ops, f"packed_{name}") for name in TORCHS}

# --- the family ------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    problem: Problem
    mask: Tensor
    values: Tensor
    input: Tensor
    bias: Tensor | None

    @property
    def bits(self) -> Tensor:
        return bits_of(self.mask)

    def dense(self, values: Tensor) -> Tensor:
        """The weight, differentiable in its values."""
        return torch.zeros(self.mask.shape, dtype=values.dtype).masked_scatter(self.mask, values)

    def call(self, input: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        ours = OURS[self.problem.function]
        return ours(input, values, self.bits, self.problem.weight, bias, **self.problem.options)

    def torchs(self, input: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        return TORCHS[self.problem.function](input, self.dense(values), bias, **self.problem.options)


def case_of(problem: Problem, n: int, dtype: torch.dtype) -> Case:
    """The n-th: its pattern, its layouts, with or without a bias."""
    mask = mask_of(list(PATTERNS)[n % len(PATTERNS)], *problem.weight)
    layouts = [list(LAYOUTS.values())[n // step % len(LAYOUTS)] for step in (1, 3)]
    return Case(
        problem,
        mask,
        layouts[0](integers(int(mask.sum()), dtype=dtype)),
        layouts[1](integers(*problem.input, dtype=dtype)),
        integers(problem.out_channels, dtype=dtype) if n % 3 else None,
    )


@functools.cache
def cases(dtype: torch.dtype) -> list[Case]:
    torch.manual_seed(5)
    return [case_of(problem, n, dtype) for n, problem in enumerate(PROBLEMS * 2)]


def check_case(case: Case) -> None:
    """Output and gradients equal torch's over the dense weight, in float64."""
    leaves = (case.input, case.values, case.bias)
    ours = [None if t is None else t.detach().requires_grad_() for t in leaves]
    theirs = [None if t is None else t.detach().double().requires_grad_() for t in leaves]
    y, expected = case.call(*ours), case.torchs(*theirs)
    assert y.dtype == case.input.dtype
    assert_exact(y, expected, case.problem)
    grad = integers(*y.shape, dtype=y.dtype)
    grads = torch.autograd.grad(y, [t for t in ours if t is not None], grad)
    wanted = torch.autograd.grad(expected, [t for t in theirs if t is not None], grad.double())
    for name, actual, exact in zip(("input", "values", "bias"), grads, wanted, strict=False):
        assert actual.dtype == case.input.dtype
        assert_exact(actual, exact, f"grad_{name}", case.problem)


@every_capability
@every_float
@pytest.mark.parametrize("path", [None, *PACKED_PATHS])
def test_values_and_gradients_are_exact_on_integers(path: str | None, dtype: torch.dtype, capability: str) -> None:
    served = 0
    with running_on(path, capability), poisoned():
        for case in cases(dtype):
            try:
                check_case(case)
            except RuntimeError as error:
                if not refuses(path, error):
                    raise
                continue
            served += 1
    if path in (None, "copy", "reference"):
        assert served == len(cases(dtype))


@every_float
def test_reference_is_exact(dtype: torch.dtype) -> None:
    for case in cases(dtype)[::3]:
        n = len(case.problem.weight) - 2
        if isinstance(case.problem.options.get("padding"), str):
            continue
        geometry = geometry_of(case.problem)
        batched = case.input if case.input.dim() == n + 2 else case.input[None]
        x, values = batched.double().requires_grad_(), case.values.double().requires_grad_()
        y = torch.ops.aten.convolution(
            x, case.dense(values), case.bias if case.bias is None else case.bias.double(), *geometry
        )
        grad = integers(*y.shape, dtype=dtype)
        expected = (y, *torch.autograd.grad(y, (x, values), grad.double()))
        size, nnz = list(case.problem.weight), len(case.values)
        actual = (
            reference.packed_convolution(batched, case.values, case.bits, size, case.bias, *geometry),
            reference.packed_convolution_grad_input(grad, case.values, case.bits, size, list(x.shape), *geometry),
            reference.packed_convolution_grad_values(grad, batched, case.bits, size, nnz, *geometry),
        )
        for name, ours, exact in zip(("output", "input", "values"), actual, expected, strict=True):
            assert_exact(ours, exact, name, case.problem)


def geometry_of(problem: Problem) -> tuple[Any, ...]:
    n = len(problem.weight) - 2

    def numbers(name: str, default: int) -> list[int]:
        value = problem.options.get(name, default)
        return list(value) if isinstance(value, tuple) else [value] * n

    return (
        numbers("stride", 1),
        numbers("padding", 0),
        numbers("dilation", 1),
        problem.transposed,
        numbers("output_padding", 0),
        problem.options.get("groups", 1),
    )


DERIVED = [
    Problem("conv2d", (2, 4, 5, 4), (4, 2, 3, 2), {"stride": (2, 1), "padding": 1, "groups": 2}),
    Problem("conv_transpose1d", (2, 4, 3), (4, 3, 2), {"stride": 2, "output_padding": 1}),
]


@pytest.mark.parametrize("pattern", ["half", "none", "all"])
@pytest.mark.parametrize("problem", DERIVED, ids=str)
def test_derivatives(problem: Problem, pattern: str) -> None:
    mask = mask_of(pattern, *problem.weight)
    bits, nnz, size = bits_of(mask), int(mask.sum()), list(problem.weight)
    geometry = geometry_of(problem)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    x, values, bias = leaf(*problem.input), leaf(nnz), leaf(problem.out_channels)
    y = _ops.packed_convolution(x, values, bits, size, bias, *geometry)
    g, sizes = leaf(*y.shape), list(x.shape)
    for function, inputs in (
        (lambda x, v, b: _ops.packed_convolution(x, v, bits, size, b, *geometry), (x, values, bias)),
        (lambda x, v: _ops.packed_convolution(x, v, bits, size, None, *geometry), (x, values)),
        (lambda g, v: _ops.packed_convolution_grad_input(g, v, bits, size, sizes, *geometry), (g, values)),
        (lambda g, x: _ops.packed_convolution_grad_values(g, x, bits, size, nnz, *geometry), (g, x)),
    ):
        assert gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)
        assert gradgradcheck(function, inputs, check_batched_grad=True)


def test_edited_bits_count_at_once() -> None:
    mask = mask_of("half", 8, 3, 3, 3)
    bits, x, values = bits_of(mask), integers(2, 3, 5, 5), integers(int(mask.sum()))
    for _ in range(3):
        weight = torch.zeros(8, 3, 3, 3).masked_scatter(mask, values)
        for _ in range(2):
            assert_exact(masked_ops.packed_conv2d(x, values, bits, mask.shape), F.conv2d(x, weight))
        mask = mask.flip(0)
        bits.copy_(bits_of(mask))


@pytest.mark.parametrize("function", ["conv2d", "conv_transpose2d", "conv3d"])
def test_memory_format_is_that_of_the_dense_operation(function: str) -> None:
    shape, size = (
        (2, 8, 6, 6, 6)[: 5 if function == "conv3d" else 4],
        (8, 8, 3, 3, 3)[: 5 if function == "conv3d" else 4],
    )
    memory_format = torch.channels_last_3d if function == "conv3d" else torch.channels_last
    mask = mask_of("half", *size)
    values = integers(int(mask.sum())).requires_grad_()
    x = integers(*shape).contiguous(memory_format=memory_format).requires_grad_()
    weight = torch.zeros(size).masked_scatter(mask, values.detach())
    y = OURS[function](x, values, bits_of(mask), size, padding=1)
    expected = TORCHS[function](x, weight, padding=1)
    assert y.stride() == expected.stride()
    assert_exact(y, expected)
    ours, theirs = (torch.autograd.grad(out, x, torch.ones_like(out))[0] for out in (y, expected))
    assert ours.stride() == theirs.stride()


SIZE = (4, 3, 1, 3)
BITS = torch.full((4, 2), 1, dtype=torch.uint8)  # the first of each eight weights of a row of 9: bit 8 is the last one
ERRORS: dict[str, tuple[dict, str]] = {
    "input channels": ({"input": torch.ones(2, 2, 5, 5)}, "3 channels"),
    "input rank": ({"input": torch.ones(5, 5)}, "input must have 4 dimensions, or 3 without a batch"),
    "input dtype": ({"input": torch.ones(2, 3, 5, 5).double()}, "input must have the dtype of weight_values"),
    "no input": ({"input": None}, "input must be a Tensor"),
    "too few values": ({"weight_values": torch.ones(7)}, "weight_values must hold one value for each of the 8 bits"),
    "too many values": ({"weight_values": torch.ones(9)}, "weight_values must hold one value for each of the 8 bits"),
    "values of two dimensions": ({"weight_values": torch.ones(4, 2)}, "weight_values must be"),
    "values of integers": ({"weight_values": torch.ones(8).int()}, "weight_values must be"),
    "bits of another dtype": ({"weight_bits": BITS.int()}, r"weight_bits must be uint8 of shape \[4, 2\]"),
    "bits of one dimension": ({"weight_bits": BITS[0]}, r"weight_bits must be uint8 of shape \[4, 2\]"),
    "bits of too few rows": ({"weight_bits": BITS[:3]}, r"weight_bits must be uint8 of shape \[4, 2\]"),
    "bits too narrow": ({"weight_bits": BITS[:, :1]}, "weight_bits must be uint8 of shape"),
    "bits beyond the kernel": ({"weight_bits": BITS * 2}, "weight_bits must have zero bits beyond the 9 columns"),
    "size of too few numbers": ({"weight_size": (4, 3, 3)}, r"weight_size must have 4 numbers, got \[4, 3, 3\]"),
    "size negative": ({"weight_size": (4, -3, 1, -3)}, "weight_size must not be negative"),
    "size beyond 64 bits": ({"weight_size": (4, 2**40, 1, 2**40)}, "weight_size must be that of a tensor"),
    "size near 64 bits": ({"weight_size": (1, 2**62, 1, 1)}, "weight_bits must be uint8 of shape"),
    "size without a kernel": (
        {"weight_size": (4, 3, 0, 3), "weight_bits": BITS[:, :0], "weight_values": torch.ones(0)},
        "a kernel of at least 1",
    ),
    "bias": ({"bias": torch.ones(5)}, "bias"),
    "bias dtype": ({"bias": torch.ones(4).double()}, "bias must have the dtype of weight_values"),
    "stride": ({"stride": 0}, "stride must be at least 1"),
    "stride of three numbers": ({"stride": (1, 1, 1)}, "stride must be one integer or 2 of them"),
    "padding": ({"padding": "full"}, "padding must be integers, 'valid' or 'same'"),
    "padding and stride": ({"padding": "same", "stride": 2}, "padding='same' is not supported for strided"),
    "groups": ({"groups": 0}, "groups must be at least 1"),
    "kernel beyond the input": ({"input": torch.ones(2, 3, 5, 2)}, "must not be smaller than the dilated kernel"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_bad_input(name: str) -> None:
    bad, message = ERRORS[name]
    arguments = {
        "input": torch.ones(2, 3, 5, 5),
        "weight_values": torch.ones(8),
        "weight_bits": BITS,
        "weight_size": SIZE,
        "bias": torch.ones(4),
    }
    masked_ops.packed_conv2d(**arguments)
    with pytest.raises((RuntimeError, TypeError), match=message):
        masked_ops.packed_conv2d(**arguments | bad)


@pytest.mark.parametrize("shape", [(2, 4, 3, 4), (1, 4, 5, 3), (2, 3, 5, 3), (2, 4, 15)])
def test_grad_output_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    """Torch would read past its end."""
    geometry = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)
    for call in (
        lambda g: _ops.packed_convolution_grad_input(g, torch.ones(8), BITS, SIZE, [2, 3, 5, 5], *geometry),
        lambda g: _ops.packed_convolution_grad_values(g, torch.ones(2, 3, 5, 5), BITS, SIZE, 8, *geometry),
    ):
        call(torch.ones(2, 4, 5, 3))
        with pytest.raises(RuntimeError, match=r"grad_output must have the shape of the output, \[2, 4, 5, 3\]"):
            call(torch.ones(shape))


# --- the modules -----------------------------------------------------------------------------------------------------

# Of every class: the arguments of its constructor, for inputs of 4 channels.
LAYERS: dict[str, tuple[str, tuple, dict[str, Any]]] = {
    "Conv1d": ("Conv1d", (4, 6, 3), {"stride": 2, "padding": 1}),
    "Conv1d reflect": ("Conv1d", (4, 6, 4), {"padding": "same", "padding_mode": "reflect"}),
    "Conv2d": ("Conv2d", (4, 6, (3, 2)), {"padding": (1, 0), "dilation": (1, 2), "bias": False}),
    "Conv2d same": ("Conv2d", (4, 6, 4), {"padding": "same"}),
    "Conv2d valid": ("Conv2d", (4, 6, 3), {"padding": "valid"}),
    "Conv2d circular": ("Conv2d", (4, 6, 3), {"padding": 1, "padding_mode": "circular"}),
    "Conv2d replicate": ("Conv2d", (4, 6, 3), {"padding": 1, "padding_mode": "replicate", "stride": 2}),
    "Conv2d depthwise": ("Conv2d", (4, 4, 3), {"groups": 4}),
    "Conv3d": ("Conv3d", (4, 6, 2), {"groups": 2}),
    "ConvTranspose1d": ("ConvTranspose1d", (4, 6, 3), {"stride": 2, "output_padding": 1}),
    "ConvTranspose2d": ("ConvTranspose2d", (4, 6, 3), {"stride": 2, "groups": 2, "dilation": 2}),
    "ConvTranspose3d": ("ConvTranspose3d", (4, 6, 2), {"padding": 1, "bias": False}),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def masked_layer(name: str, pattern: str = "half", dtype: torch.dtype = torch.float32) -> Any:
    """Of small integers, those beneath the mask included."""
    kind, arguments, options = LAYERS[name]
    layer = getattr(masked_ops, f"Masked{kind}")(*arguments, **options, dtype=dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(integers(*parameter.shape))
    layer.set_mask(mask_of(pattern, *layer.weight_orig.shape, dtype=dtype))
    return layer


def packed_layer(name: str = "Conv2d", pattern: str = "half", **options: Any) -> Any:
    return masked_ops.pack(masked_layer(name, pattern, **options))


def images(name: str, dtype: torch.dtype = torch.float32, batch: tuple[int, ...] = (2,)) -> Tensor:
    return integers(*batch, 4, *[6] * int(LAYERS[name][0][-2]), dtype=dtype)


def class_of(name: str, prefix: str) -> type[nn.Module]:
    return getattr(nn if prefix == "" else masked_ops, prefix + LAYERS[name][0])


def run(layer: Any, x: Tensor, *arguments: Any) -> list[Tensor]:
    """The output and the gradients of input, weight and bias, the weight's as values."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = layer(x, *arguments)
    y.backward(torch.arange(y.numel()).view_as(y).to(y) % 5 - 2)
    weight = getattr(layer, "weight_values", getattr(layer, "weight_orig", None))
    results = [y, x.grad, layer.weight.grad if weight is None else weight.grad]
    return results if layer.bias is None else [*results, layer.bias.grad]


@every_layer
@pytest.mark.parametrize("pattern", ["half", "none", "all", "some rows", "one column"])
def test_layers_are_those_that_they_stand_for(name: str, pattern: str) -> None:
    masked = masked_layer(name, pattern)
    mask = masked.weight_mask != 0
    packed = class_of(name, "Packed").from_masked(masked)
    dense = packed.to_dense()
    assert type(packed) is class_of(name, "Packed") and type(dense) is class_of(name, "")
    assert packed.weight_bits.shape == (len(mask), -(-mask[0].numel() // 8)) and packed.sparsity == masked.sparsity
    assert torch.equal(packed.weight, masked.weight) and torch.equal(packed.weight_values, masked.weight[mask])
    for x in (
        images(name),
        images(name, batch=()),
        images(name, batch=(0,)),
        images(name).transpose(-1, -2) if images(name).dim() > 3 else images(name),
        images(name).contiguous(memory_format=torch.channels_last) if images(name).dim() == 4 else images(name),
    ):
        if LAYERS[name][2].get("padding_mode") == "circular" and not x.numel():
            continue  # which torch refuses
        ours, maskeds, denses = (run(layer, x) for layer in (packed, masked, dense))
        for index, (a, b, c) in enumerate(zip(ours, maskeds, denses, strict=True)):
            if index == 2:
                b, c = b[mask], c[mask]
            assert torch.equal(a, b) and torch.equal(a, c), (x.shape, index)
        assert ours[0].stride() == denses[0].stride()


@every_layer
def test_there_and_back(name: str) -> None:
    layer = masked_layer(name)
    layer.eval()
    module, mask, weight = layer, layer.weight_mask.clone(), layer.weight.detach().clone()
    assert masked_ops.pack(layer) is module
    assert list(layer.state_dict()) == (["bias"] if layer.bias is not None else []) + ["weight_values", "weight_bits"]
    assert f"nnz={int(mask.sum())}" in repr(layer) and repr(layer).startswith(f"Packed{LAYERS[name][0]}(4, ")
    masked_ops.unpack(layer)
    assert type(layer) is class_of(name, "Masked") and not layer.training
    assert torch.equal(layer.weight_mask, mask) and torch.equal(layer.weight_orig, weight)
    masked_ops.freeze(layer)
    assert not any(p.requires_grad for p in layer.parameters())
    prune.remove(layer)
    assert type(layer) is class_of(name, "") and torch.equal(layer.weight, weight)


@every_layer
def test_constructor(name: str) -> None:
    kind, arguments, options = LAYERS[name]
    torch.manual_seed(0)
    layer = getattr(masked_ops, f"Packed{kind}")(*arguments, **options)
    torch.manual_seed(0)
    dense = getattr(nn, kind)(*arguments, **options)
    assert layer.sparsity == 0
    for tensor, expected in ((layer.weight, dense.weight), (layer.bias, dense.bias)):
        assert (tensor is None and expected is None) or torch.equal(tensor, expected)
    mask = mask_of("half", *dense.weight.shape)
    layer = getattr(masked_ops, f"Packed{kind}")(*arguments, **options, mask=mask, dtype=torch.float64)
    assert layer.weight_values.shape == (int(mask.sum()),) and torch.equal(layer.weight != 0, mask)
    torch.manual_seed(1)
    layer.reset_parameters()
    torch.manual_seed(1)
    dense.double().reset_parameters()
    assert torch.equal(layer.weight, dense.weight * mask)
    for bad, error in ((mask[:2], ValueError), (mask * 0.5, ValueError), ([1], TypeError)):
        with pytest.raises(error, match="mask: "):
            getattr(masked_ops, f"Packed{kind}")(*arguments, **options, mask=bad)


def test_output_size() -> None:
    masked = masked_layer("ConvTranspose2d")
    packed = masked_ops.PackedConvTranspose2d.from_masked(masked)
    x = images("ConvTranspose2d")
    assert torch.equal(packed(x, [16, 15]), masked(x, [16, 15])) and packed(x, [16, 15]).shape[-2:] == (16, 15)
    with pytest.raises(ValueError, match="requested an output size"):
        packed(x, [99, 99])


@every_float
def test_dtypes(dtype: torch.dtype) -> None:
    for name in ("Conv2d", "ConvTranspose1d"):
        masked = masked_layer(name, dtype=dtype)
        packed = class_of(name, "Packed").from_masked(masked)
        x = images(name, dtype)
        ours, theirs = (run(layer, x) for layer in (packed, masked))
        theirs[2] = theirs[2][masked.weight_mask != 0]
        for a, b in zip(ours, theirs, strict=True):
            assert a.dtype == dtype and torch.equal(a, b)


class OwnConv(nn.Conv2d):
    """Changes the weight in ``_conv_forward``."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight - weight.mean(), bias)


class Named(nn.Conv2d):
    """Keeps torch's forward."""

    def __init__(self, *args: Any, name: str = "unnamed") -> None:
        super().__init__(*args)
        self.name = name


class Head(masked_ops.MaskedConv2d):
    """A user's subclass of a masked layer."""


def test_subclasses() -> None:
    model: Any = nn.Sequential(
        OwnConv(4, 4, 3, 1, 1), Named(4, 4, 3, 1, 1), Head(4, 4, 3, mask=mask_of("half", 4, 4, 3, 3))
    )
    prune.random_unstructured([(model[0], "weight"), (model[1], "weight"), (model[1], "bias")], amount=0.5)
    x = torch.randn(2, 4, 6, 6)
    expected = model(x)
    masked_ops.pack(model)
    kinds = [type(layer).__name__ for layer in model]
    assert kinds == ["MaskedOwnConv", "MaskedPackedNamed", "PackedHead"]
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(x), expected)
    assert model[1].name == "unnamed" and isinstance(model[2], (Head, masked_ops.PackedConv2d))
    masked_ops.unpack(model)
    torch.testing.assert_close(model(x), expected)
    assert type(model[2]) is Head
    prune.remove(model)
    assert type(model[0]) is OwnConv and type(model[1]) is Named
    torch.testing.assert_close(model(x), expected)


def test_what_cannot_be_packed_is_named() -> None:
    soft = masked_layer("Conv2d")
    soft.set_mask(soft.weight_mask * 0.5)
    resized = masked_layer("Conv2d")
    resized.out_channels = 5
    for layer, message in ((soft, "its mask is soft"), (resized, r"states are \(5, 4, 3, 2\), but the weight has")):
        with pytest.raises(ValueError, match=message):
            masked_ops.pack(nn.Sequential(layer))
        assert type(layer) is masked_ops.MaskedConv2d
    with pytest.raises(TypeError, match=r"torch\.nn\.Conv2d expected, got Linear"):
        masked_ops.PackedConv2d.from_masked(nn.Linear(2, 2))


@pytest.mark.parametrize("source", ["dense", "masked", "packed"])
@pytest.mark.parametrize("target", ["dense", "masked", "packed"])
@pytest.mark.parametrize("name", ["Conv2d", "ConvTranspose3d"])
def test_every_checkpoint_loads_into_every_model(source: str, target: str, name: str) -> None:
    forms = {"dense": prune.remove, "masked": lambda m: m, "packed": masked_ops.pack}

    def make(form: str, pattern: str) -> Any:
        layer = masked_layer(name, pattern)
        with torch.no_grad():
            layer.weight_orig.add_(3)  # none is 0
        prune.identity(layer, "weight")
        return nn.Sequential(forms[form](layer))

    checkpoint, model = make(source, "half"), make(target, "tenth")
    beneath = model[0].weight.detach() != 0
    data = io.BytesIO()
    torch.save(checkpoint.state_dict(), data)
    data.seek(0)
    keys = prune.load_state_dict(model, torch.load(data, weights_only=True))
    assert not keys.missing_keys and not keys.unexpected_keys
    kept = source == "dense" and target != "dense"
    assert torch.equal(model[0].weight, checkpoint[0].weight * beneath if kept else checkpoint[0].weight)
    assert isinstance(model[0], class_of(name, "Packed")) == (target == "packed")
    run(model[0], images(name))


def test_a_checkpoint_of_another_density() -> None:
    layer, source = packed_layer(pattern="tenth"), packed_layer(pattern="most")
    values = layer.weight_values
    layer.load_state_dict(source.state_dict())
    assert layer.weight_values is values and torch.equal(layer.weight, source.weight)
    run(layer, images("Conv2d"))
    state = source.state_dict()
    state["weight_bits"] = state["weight_bits"][:, :1]
    with pytest.raises(RuntimeError, match=r"weight_bits must be torch.uint8 of shape \(6, 3\)"):
        layer.load_state_dict(state)


def test_tied_convolutions_stay_tied() -> None:
    model = nn.Sequential(*(masked_ops.MaskedConv2d(4, 4, 3, padding=1) for _ in range(2)))
    model[1].weight_orig = model[0].weight_orig
    for layer in model:
        layer.set_mask(mask_of("diagonal", 4, 4, 3, 3))
    masked_ops.pack(model)
    assert model[0].weight_values is model[1].weight_values
    masked_ops.unpack(model)
    assert model[0].weight_orig is model[1].weight_orig


@pytest.mark.parametrize("call", [prune.l1_unstructured, prune.ln_structured])
def test_pruning_unpacks_first(call: Callable[..., Any]) -> None:
    options = {"n": 2, "dim": 0} if call is prune.ln_structured else {}
    layers = [masked_layer("Conv2d"), None]
    layers[1] = masked_ops.PackedConv2d.from_masked(layers[0])
    for layer in layers:
        call(layer, "weight", amount=2, **options)
    assert type(layers[1]) is masked_ops.MaskedConv2d
    assert torch.equal(layers[1].weight_mask, layers[0].weight_mask)


@every_layer
def test_inside_the_rest_of_torch(name: str) -> None:
    layer, x = packed_layer(name), images(name)
    expected = run(layer, x)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    layer.zero_grad()
    y = compiled(x)
    y.backward(torch.arange(y.numel()).view_as(y) % 5 - 2.0)
    assert torch.equal(y, expected[0]) and torch.equal(layer.weight_values.grad, expected[2])
    assert y.stride() == expected[0].stride()
    program = torch.export.export(layer, (x,))
    assert torch.equal(program.module()(x), expected[0]) and "weight_values" in program.state_dict
    assert torch.equal(torch.fx.symbolic_trace(nn.Sequential(layer))(x), expected[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = layer(x)
    assert low.dtype == torch.bfloat16 and torch.equal(low, expected[0].bfloat16())
    values = torch.stack([layer.weight_values.detach(), integers(*layer.weight_values.shape)])

    def call(values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight_values": values}, x)

    outputs = torch.vmap(call)(values)
    for output, one in zip(outputs, values, strict=True):
        assert torch.equal(output, call(one))
    grads = torch.vmap(torch.func.grad(lambda v: call(v).sum()))(values)
    for grad, one in zip(grads, values, strict=True):
        assert torch.equal(grad, torch.autograd.grad(call(one.requires_grad_()).sum(), one)[0])
    meta = copy.deepcopy(layer).to("meta")
    assert meta(x.to("meta")).shape == expected[0].shape and meta.weight.shape == layer.weight.shape


def test_memory_that_shrinks_with_the_density() -> None:
    layer = prune.l1_unstructured(nn.Conv2d(64, 64, 3), "weight", amount=0.9)
    masked_ops.pack(layer)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.randn(1, 64, 5, 5)).sum().backward()
    optimizer.step()
    nnz = round(64 * 64 * 9 * 0.1)
    state = optimizer.state[layer.weight_values]
    assert {layer.weight_values.numel(), layer.weight_values.grad.numel(), state["exp_avg"].numel()} == {nnz}
    assert layer.weight_bits.nbytes == 64 * 64 * 9 // 8


def test_report() -> None:
    model = masked_ops.pack(nn.Sequential(masked_layer("Conv2d same"), nn.ReLU()))
    (row,) = masked_ops.report(model, images("Conv2d same"))
    layer: Any = model[0]
    nnz = layer.weight_values.numel()
    assert (row.name, row.kind, row.shape, row.nnz) == ("0.weight", "Conv2d", (6, 4, 4, 4), nnz)
    assert (row.parameter_bytes, row.mask_bytes) == (nnz * 4, 6 * 8)
    assert row.dense_flops == 2 * 6 * 4 * 16 * 2 * 36 and row.remaining_flops == nnz / (6 * 4 * 16)
    geometry = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    explained = _ops.explain_packed_convolution(
        layer.weight_values, layer.weight_bits, row.shape, (2, 4, 6, 6), False, *geometry
    )
    assert (row.path, row.reason) == explained
