"""Bad input: torch's kind of error that names the argument, nothing changed, never a crash."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from generators import (
    PATHS,
    SANITIZED,
    assert_exact,
    compiled_only,
    integers,
    mask_of,
    run_each_in_a_process,
    running_on,
)
from torch import Tensor
from torch.nn import functional as F

import masked_ops
from masked_ops import _ops
from masked_ops._packed_class import bits_of

ones = torch.ones
BAD = (RuntimeError, TypeError, ValueError)


def meta(*shape: int) -> Tensor:
    return ones(*shape, device="meta")


# --- linear ----------------------------------------------------------------------------------------------------------

# input [2, 3], weight [4, 3], mask [4, 3], bias [4], with what is bad in their place; and what the message says.
LINEAR: dict[str, tuple[dict[str, Any], str]] = {
    "input of other features": ({"input": ones(2, 5)}, r"input must have 3 features.*got shape \[2, 5\]"),
    "input of no dimension": ({"input": ones(())}, r"input must have 3 features.*got shape \[\]"),
    "input of another dtype": (
        {"input": ones(2, 3).double()},
        "input must have the dtype of weight, .*[Ff]loat.*, got",
    ),
    "input of integers": ({"input": ones(2, 3).int()}, "input must have the dtype of weight"),
    "weight of three dimensions": (
        {"weight": ones(4, 3, 1), "mask": ones(4, 3, 1)},
        r"weight must have 1 or 2 dimensions, got shape \[4, 3, 1\]",
    ),
    "weight of no dimension": ({"weight": ones(()), "mask": ones(())}, "weight must have 1 or 2 dimensions"),
    "weight of integers": ({"weight": ones(4, 3).int()}, "weight must have a floating-point dtype, got .*[Ii]nt"),
    "weight of bool": ({"weight": ones(4, 3).bool()}, "weight must have a floating-point dtype, got .*[Bb]ool"),
    "all of integers": (
        {"input": ones(2, 3).int(), "weight": ones(4, 3).int(), "bias": ones(4).int()},
        "weight must have a floating-point dtype",
    ),
    "mask transposed": ({"mask": ones(3, 4)}, r"mask must have the shape of weight, \[4, 3\], got \[3, 4\]"),
    "mask that would broadcast": ({"mask": ones(1, 3)}, r"mask must have the shape of weight.*got \[1, 3\]"),
    "mask of one dimension": ({"mask": ones(3)}, r"mask must have the shape of weight.*got \[3\]"),
    "mask of no dimension": ({"mask": ones(())}, r"mask must have the shape of weight.*got \[\]"),
    "mask flattened": ({"mask": ones(12)}, "mask must have the shape of weight"),
    "mask sparse": ({"mask": ones(4, 3).to_sparse()}, "mask must be dense"),
    "mask compressed": ({"mask": ones(4, 3).to_sparse_csr()}, "mask must be dense"),
    "weight sparse": ({"weight": ones(4, 3).to_sparse()}, "weight must be dense"),
    "bias of another size": ({"bias": ones(5)}, r"bias must broadcast to the output, \[2, 4\], got shape \[5\]"),
    "bias of too many dimensions": ({"bias": ones(3, 2, 4)}, r"bias must broadcast.*got shape \[3, 2, 4\]"),
    "bias of another dtype": ({"bias": ones(4).double()}, "bias must have the dtype of weight"),
    "input on another device": ({"input": meta(2, 3)}, "input must be on the device of weight, cpu, got meta"),
    "weight on another device": ({"weight": meta(4, 3)}, "mask must be on the device of weight, meta, got cpu"),
    "mask on another device": ({"mask": meta(4, 3)}, "mask must be on the device of weight, cpu, got meta"),
    "bias on another device": ({"bias": meta(4)}, "bias must be on the device of weight, cpu, got meta"),
    "input None": ({"input": None}, "input must be a [Tt]ensor"),
    "weight None": ({"weight": None}, "weight must be a [Tt]ensor"),
    "mask None": ({"mask": None}, "mask must be a [Tt]ensor"),
    "input a list": ({"input": [1.0, 2.0, 3.0]}, "'input'"),
    "mask a number": ({"mask": 1}, "'mask'"),
    "bias a number": ({"bias": 1}, "'bias'"),
}


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "grad"])
@pytest.mark.parametrize("name", LINEAR)
def test_linear(name: str, grad: bool) -> None:
    bad, message = LINEAR[name]
    arguments: dict[str, Any] = {"input": ones(2, 3), "weight": ones(4, 3), "mask": ones(4, 3), "bias": ones(4)} | bad
    if grad:
        for argument, value in arguments.items():
            if argument != "mask" and isinstance(value, Tensor) and value.is_floating_point():
                arguments[argument] = value.detach().requires_grad_()
    with pytest.raises(BAD, match=message):
        masked_ops.masked_linear(**arguments)
    with pytest.raises(BAD, match=message):
        torch.func.vmap(lambda x: masked_ops.masked_linear(x, *list(arguments.values())[1:]), randomness="same")(
            torch.stack([arguments["input"]] * 2)
        ) if isinstance(arguments["input"], Tensor) else masked_ops.masked_linear(**arguments)


@pytest.mark.parametrize("name", [name for name in LINEAR if "device" not in name and "sparse" not in name])
def test_linear_on_meta(name: str) -> None:
    """The fake kernels refuse what the real ones refuse: tracing finds the mistake."""
    bad, message = LINEAR[name]
    if any(isinstance(value, Tensor) and value.layout != torch.strided for value in bad.values()):
        return
    arguments = {"input": ones(2, 3), "weight": ones(4, 3), "mask": ones(4, 3), "bias": ones(4)} | bad
    with pytest.raises(BAD, match=message):
        masked_ops.masked_linear(**{k: v.to("meta") if isinstance(v, Tensor) else v for k, v in arguments.items()})


LINEAR_GRADS: dict[str, tuple[Callable[[], Tensor], str]] = {
    "grad_input, features": (
        lambda: _ops.linear_grad_input(ones(2, 5), ones(4, 3), ones(4, 3)),
        "grad_output must have 4 features",
    ),
    "grad_input, no dimension": (
        lambda: _ops.linear_grad_input(ones(()), ones(4, 3), ones(4, 3)),
        "grad_output must have 4 features",
    ),
    "grad_input, weight of one dimension": (
        lambda: _ops.linear_grad_input(ones(2, 4), ones(3), ones(3)),
        "weight must have 2 dimensions",
    ),
    "grad_input, mask": (
        lambda: _ops.linear_grad_input(ones(2, 4), ones(4, 3), ones(3, 4)),
        "mask must have the shape of weight",
    ),
    "grad_input, dtype": (
        lambda: _ops.linear_grad_input(ones(2, 4).double(), ones(4, 3), ones(4, 3)),
        "grad_output must have the dtype of weight",
    ),
    "grad_input, device": (
        lambda: _ops.linear_grad_input(meta(2, 4), ones(4, 3), ones(4, 3)),
        "grad_output must be on the device of weight",
    ),
    "grad_weight, features": (
        lambda: _ops.linear_grad_weight(ones(2, 4), ones(2, 5), ones(4, 3)),
        "input must have 3 features",
    ),
    "grad_weight, rows": (
        lambda: _ops.linear_grad_weight(ones(2, 4), ones(3, 3), ones(4, 3)),
        "grad_output and input must agree in all but their last dimension",
    ),
    "grad_weight, ranks": (
        lambda: _ops.linear_grad_weight(ones(2, 1, 4), ones(2, 3), ones(4, 3)),
        "grad_output and input must agree in all but their last dimension",
    ),
    "grad_weight, no dimension": (
        lambda: _ops.linear_grad_weight(ones(()), ones(2, 3), ones(4, 3)),
        "grad_output must have 4 features",
    ),
    "grad_weight, mask of one dimension": (
        lambda: _ops.linear_grad_weight(ones(2, 4), ones(2, 3), ones(3)),
        "mask must have 2 dimensions",
    ),
    "grad_weight, dtype": (
        lambda: _ops.linear_grad_weight(ones(2, 4), ones(2, 3).double(), ones(4, 3)),
        "input must have the dtype of grad_output",
    ),
    "grad_weight, integers": (
        lambda: _ops.linear_grad_weight(ones(2, 4).int(), ones(2, 3).int(), ones(4, 3)),
        "must have a floating-point dtype",
    ),
    "grad_weight, device": (
        lambda: _ops.linear_grad_weight(ones(2, 4), ones(2, 3), meta(4, 3)),
        "mask must be on the device of",
    ),
    "apply_mask, shape": (lambda: masked_ops.apply_mask(ones(4, 3), ones(3, 4)), "mask must have the shape of weight"),
    "apply_mask, integers": (
        lambda: masked_ops.apply_mask(ones(4, 3).int(), ones(4, 3)),
        "weight must have a floating-point dtype",
    ),
    "apply_mask, dtype": (
        lambda: masked_ops.apply_mask(ones(4, 3), ones(4, 3), dtype=torch.int32),
        "dtype must be a floating-point one as the weight's",
    ),
    "apply_mask, real of complex": (
        lambda: masked_ops.apply_mask(ones(4, 3) * 1j, ones(4, 3), dtype=torch.float32),
        "dtype must be complex as the weight's",
    ),
    "apply_mask, device": (
        lambda: masked_ops.apply_mask(ones(4, 3), meta(4, 3)),
        "mask must be on the device of weight",
    ),
    "apply_mask, meta weight": (
        lambda: masked_ops.apply_mask(meta(4, 3), ones(4, 3)),
        "mask must be on the device of weight",
    ),
    "apply_mask, None": (lambda: masked_ops.apply_mask(ones(4, 3), None), "mask must be a [Tt]ensor"),
    "apply_mask, weight None": (lambda: masked_ops.apply_mask(None, ones(4, 3)), "weight must be a [Tt]ensor"),
    "explain_linear, mask": (lambda: _ops.explain_linear(ones(4, 3), ones(3, 4), 1), "mask must have the shape"),
}


@pytest.mark.parametrize("name", LINEAR_GRADS)
def test_other_linear_operations(name: str) -> None:
    call, message = LINEAR_GRADS[name]
    with pytest.raises(BAD, match=message):
        call()


# --- convolution -----------------------------------------------------------------------------------------------------

# input [2, 4, 6, 6], weight [6, 4, 3, 3] (transposed: [4, 6, 3, 3]), mask, bias [6].
CONVOLUTION: dict[str, tuple[dict[str, Any], str]] = {
    "input of too few dimensions": ({"input": ones(6, 6)}, r"input must have 4 dimensions, or 3 without a batch"),
    "input of too many dimensions": ({"input": ones(1, 1, 4, 6, 6)}, "input must have 4 dimensions"),
    "input of other channels": ({"input": ones(2, 5, 6, 6)}, r"input\[2, 5, 6, 6\] to have 4 channels"),
    "input of another dtype": ({"input": ones(2, 4, 6, 6).double()}, "input must have the dtype of weight"),
    "weight of too few dimensions": (
        {"weight": ones(6, 4, 3)},
        r"weight must have 4 dimensions, got shape \[6, 4, 3\]",
    ),
    "weight of integers": ({"weight": "integers"}, "weight must have a floating-point dtype"),
    "weight without a kernel": ({"weight": "no kernel"}, "weight must have a kernel"),
    "mask of another kernel": ({"mask": "smaller"}, "mask must have the shape of weight"),
    "mask flattened": ({"mask": "flat"}, "mask must have the shape of weight"),
    "bias of another size": ({"bias": ones(5)}, "bias"),
    "bias of two dimensions": ({"bias": ones(1, 6)}, "bias"),
    "bias of another dtype": ({"bias": ones(6).double()}, "bias must have the dtype of weight"),
    "stride zero": ({"stride": 0}, "stride"),
    "stride negative": ({"stride": (1, -1)}, "stride"),
    "stride of three": ({"stride": (1, 1, 1)}, r"stride must be one integer or 2 of them, got \[1, 1, 1\]"),
    "stride of none": ({"stride": ()}, "stride must be one integer or 2 of them"),
    "stride a float": ({"stride": 1.5}, "stride"),
    "stride None": ({"stride": None}, "stride"),
    "stride beyond 32 bits": ({"stride": 2**32 + 1}, "stride must be at most 2147483647"),
    "stride beyond 64 bits": ({"stride": 2**64}, "stride"),
    "padding negative": ({"padding": -1}, "padding"),
    "padding beyond 32 bits": ({"padding": 2**40}, "padding must be at most 2147483647"),
    "padding near 64 bits": ({"padding": 2**63 - 1}, "padding must be at most 2147483647"),
    "padding unknown": ({"padding": "full"}, "padding"),
    "dilation zero": ({"dilation": 0}, "dilation"),
    "dilation negative": ({"dilation": (-1, 1)}, "dilation"),
    "dilation beyond 32 bits": ({"dilation": 2**32 + 1}, "dilation must be at most 2147483647"),
    "dilation near 64 bits": ({"dilation": 2**63 - 1}, "dilation must be at most 2147483647"),
    "groups zero": ({"groups": 0}, "groups"),
    "groups negative": ({"groups": -2}, "groups"),
    "groups near 64 bits": ({"groups": 2**62}, "groups"),
    "groups a float": ({"groups": 2.0}, "groups"),
    "input on another device": ({"input": meta(2, 4, 6, 6)}, "input must be on the device of weight"),
    "mask on another device": ({"mask": "meta"}, "mask must be on the device of weight"),
    "bias on another device": ({"bias": meta(6)}, "bias must be on the device of weight"),
    "mask sparse": ({"mask": "sparse"}, "mask must be dense"),
    "mask None": ({"mask": None}, "mask must be a [Tt]ensor"),
    "weight None": ({"weight": None}, "weight must be a [Tt]ensor"),
    "input None": ({"input": None}, "input must be a [Tt]ensor"),
}
ONLY_DENSE: dict[str, tuple[dict[str, Any], str]] = {
    "kernel larger than the input": ({"input": ones(2, 4, 2, 2)}, "input"),
    "dilated kernel larger than the input": ({"dilation": 5}, "input"),
    "groups that do not divide": ({"groups": 4}, "groups"),
    "same padding with a stride": ({"padding": "same", "stride": 2}, "padding='same' is not supported for strided"),
}
ONLY_TRANSPOSED: dict[str, tuple[dict[str, Any], str]] = {
    "output_padding as large as the stride": ({"output_padding": 2, "stride": 2}, "output.padding"),
    "output_padding negative": ({"output_padding": -1}, "output_padding"),
    "output_padding of three": ({"output_padding": (0, 0, 0)}, "output_padding must be one integer or 2 of them"),
    "output_padding beyond 32 bits": ({"output_padding": 2**40}, "output_padding must be at most 2147483647"),
    "padding larger than the output": ({"padding": 100}, "padding"),
    "padding by name": ({"padding": "same"}, "padding"),
    "groups that do not divide": ({"groups": 3}, "groups"),
}


def _convolution_arguments(transposed: bool, bad: dict[str, Any]) -> dict[str, Any]:
    shape = (4, 6, 3, 3) if transposed else (6, 4, 3, 3)
    special = {
        "integers": ones(shape).int(),
        "no kernel": ones(*shape[:2], 0, 3),
        "smaller": ones(*shape[:3], 1),
        "flat": ones(shape).flatten(1),
        "meta": meta(*shape),
        "sparse": ones(shape).to_sparse(),
    }
    bad = {k: special.get(v, v) if isinstance(v, str) and k in ("weight", "mask") else v for k, v in bad.items()}
    arguments = {"input": ones(2, 4, 6, 6), "weight": ones(shape), "bias": ones(6)} | bad
    if "mask" not in bad:
        arguments["mask"] = ones(shape) if arguments["weight"] is None else torch.ones_like(arguments["weight"])
    return arguments


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "grad"])
@pytest.mark.parametrize(
    ("transposed", "name"),
    [
        *itertools.product([False], {**CONVOLUTION, **ONLY_DENSE}),
        *itertools.product([True], {**CONVOLUTION, **ONLY_TRANSPOSED}),
    ],
)
def test_convolution(transposed: bool, name: str, grad: bool, dtype: torch.dtype) -> None:
    """In float64 too: torch takes another way there, which checks other things."""
    bad, message = {**CONVOLUTION, **(ONLY_TRANSPOSED if transposed else ONLY_DENSE)}[name]
    arguments = _convolution_arguments(transposed, bad)
    if dtype == torch.float64:
        if "dtype" in name:
            return
        arguments = {
            k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in arguments.items()
        }
    if grad:
        for argument in ("input", "weight", "bias"):
            if isinstance(arguments[argument], Tensor) and arguments[argument].is_floating_point():
                arguments[argument].requires_grad_()
    function = masked_ops.masked_conv_transpose2d if transposed else masked_ops.masked_conv2d
    with pytest.raises(BAD, match=message):
        function(**arguments)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_a_bias_that_does_not_fit_on_any_path(path: str, transposed: bool) -> None:
    """The kernels would read behind its end."""
    suffix = "conv_transpose2d" if transposed else "conv2d"
    for taps, groups in ((1, 1), (3, 1), (3, 6)):
        w = ones(6, 6 // groups, taps, taps)
        mask = ones(*w.shape)
        mask[0] = 0
        bits, values = bits_of(mask), ones(int(mask.sum()))
        for shape in ((), (0,), (1,), (5,), (7,), (6, 1), (1, 6)):
            for packed in (False, True):
                with running_on(path), pytest.raises(BAD):
                    if packed:
                        getattr(masked_ops, f"packed_{suffix}")(
                            ones(2, 6, 5, 5), values, bits, w.shape, ones(*shape), groups=groups
                        )
                    else:
                        getattr(masked_ops, f"masked_{suffix}")(ones(2, 6, 5, 5), w, mask, ones(*shape), groups=groups)


def test_what_torch_accepts_is_accepted() -> None:
    """Odd, but no mistakes."""
    x, w, mask = integers(2, 4, 6, 6), integers(6, 4, 3, 3), mask_of("half", 6, 4, 3, 3)
    for options in ({"stride": 2**31 - 1}, {"padding": 50}, {"padding": "same", "dilation": 3}, {"stride": (1, 10**6)}):
        assert_exact(masked_ops.masked_conv2d(x, w, mask, **options), F.conv2d(x, w * mask, **options))
    assert masked_ops.masked_conv2d(x[:0], w, mask).shape == (0, 6, 4, 4)
    assert masked_ops.masked_linear(integers(2, 0), integers(4, 0), torch.ones(4, 0)).shape == (2, 4)
    many = torch.ones(2**40, 0)  # rows, of which not even the number of weights is to be counted
    assert masked_ops.apply_mask(many, many).shape == many.shape
    assert masked_ops.masked_linear(torch.ones(0, 0), many, many).shape == (0, 2**40)
    sparse = integers(2, 3).to_sparse()
    weight = integers(4, 3)
    assert_exact(masked_ops.masked_linear(sparse, weight, torch.ones(4, 3)), F.linear(sparse.to_dense(), weight))


@compiled_only
@pytest.mark.skipif(SANITIZED, reason="the sanitizer ends the process")
def test_no_memory_for_what_is_known_of_a_mask() -> None:
    bits = torch.zeros(1, 8, dtype=torch.uint8).expand(2**44, 8)
    message = f"^masked_ops: can't allocate memory: {2**47} bytes for the bits of a mask$"
    for function in (masked_ops.packed_linear, _ops.packed_linear):
        with pytest.raises(RuntimeError, match=message):
            function(torch.ones(1, 64), torch.ones(0), bits, 64)


def test_failed_call_changes_nothing() -> None:
    x, w, mask = integers(2, 3), integers(4, 3), mask_of("half", 4, 3)
    before = x.clone(), w.clone(), mask.clone(), masked_ops.cache_info()["entries"]
    for bad, _ in LINEAR.values():
        with pytest.raises(BAD):
            masked_ops.masked_linear(**{"input": x, "weight": w, "mask": mask} | bad)
    assert torch.equal(x, before[0]) and torch.equal(w, before[1]) and torch.equal(mask, before[2])
    assert_exact(masked_ops.masked_linear(x, w, mask), F.linear(x, w * mask))


# --- never a crash ---------------------------------------------------------------------------------------------------

# What follows calls the operations below the public functions with every bad thing there is. Whether each is refused or
# served does not matter here: the process must live. Each snippet prints what it does next, to name the culprit.

_HOSTILE = """
import itertools, os, resource, torch
from masked_ops import _ops
if not os.environ.get("MASKED_OPS_SANITIZE"):  # whose shadow memory is larger than any limit
    limit = 2**35 + (2**43 + 2**34 if os.environ.get("MASKED_OPS_FENCE") else 0)  # what the fence reserves
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
ones = lambda *shape: torch.ones(shape, dtype=torch.{dtype})
calls = survived = 0
def attempt(label, function, *arguments):
    global calls, survived
    print(label, flush=True)
    calls += 1
    try:
        result = function(*arguments)
        if isinstance(result, torch.Tensor) and result.numel() < 1 << 20:
            result.clone()
        survived += 1
    except RecursionError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError, OverflowError, NotImplementedError, MemoryError):
        pass
"""

_HOSTILE_LINEAR = """
shapes = [(), (0,), (3,), (4,), (2, 3), (2, 4), (4, 3), (3, 4), (0, 3), (0, 4), (4, 0), (2, 2, 3), (2, 2, 4), (4, 3, 1)]
tensors = [ones(*shape) for shape in shapes]
tensors += [ones(1).expand(2**43)]
tensors += [ones(1, 1).expand(*shape) for shape in [(2**42, 3), (2**31, 2**31), (2**43, 4)]]
for op in (_ops.linear, _ops.linear_grad_input, _ops.linear_grad_weight):
    for a, b in itertools.product(tensors, tensors):
        for m in {id(t): t for t in (b, tensors[6], tensors[-1])}.values():
            attempt(f"{op} {tuple(a.shape)} {tuple(b.shape)} {tuple(m.shape)}", op, a, b, m)
for a, m in itertools.product(tensors, tensors):
    attempt(f"apply_mask {tuple(a.shape)} {tuple(m.shape)}", _ops.apply_mask, a, m)
    attempt(f"explain {tuple(a.shape)} {tuple(m.shape)}", _ops.explain_linear, a, m, -1)
    attempt(f"bias {tuple(a.shape)}", _ops.linear, ones(2, 3), ones(4, 3), ones(4, 3), a)
"""

_HOSTILE_CONVOLUTION = """
x, w, m, dy = ones(2, 4, 6, 6), ones(6, 4, 3, 3), ones(6, 4, 3, 3), ones(2, 6, 4, 4)
big = 2**63 - 1
lists = [[], [0, 0], [-1, 1], [1], [1, 1, 1], [2, 2]]
lists += [[2**31, 2**31], [2**32, 2**32], [2**40, 1], [2**62, 2**62], [big, big], [-big, 1]]
good = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)
geometries = [good]
for i in (0, 1, 2, 4):
    geometries += [(*good[:i], bad, *good[i + 1:]) for bad in lists]
for op, groups in itertools.product(([0, 0], [5, 5]), (-1, 0, 1, 2, 3, 7, 2**31, big)):
    geometries.append((*good[:4], op, groups))
for geometry in geometries:
    for transposed in (False, True):
        g = (*geometry[:3], transposed, *geometry[4:])
        attempt(f"convolution {g}", _ops.convolution, x, w, m, None, *g)
        attempt(f"grad_input {g}", _ops.convolution_grad_input, dy, w, m, [2, 4, 6, 6], *g)
        attempt(f"grad_weight {g}", _ops.convolution_grad_weight, dy, x, m, *g)
sizes = [[], [2], [2, 4, 6], [2, 4, 6, 6, 6], [2, 4, 5, 5], [2, 4, 60, 60], [2, 4, -6, 6], [-2, 4, 6, 6], [3, 4, 6, 6]]
sizes += [[1, 4, 6, 6], [0, 4, 6, 6], [2, 5, 6, 6], [2, 0, 6, 6], [2**40, 4, 6, 6], [2**62, 2**62, 6, 6], [big] * 4]
for size, transposed in itertools.product(sizes, (False, True)):
    g = (*good[:3], transposed, *good[4:])
    attempt(f"input_size {size} {transposed}", _ops.convolution_grad_input, dy, w, m, size, *g)
shapes = [(), (2,), (2, 6, 4), (2, 6, 4, 4, 1), (2, 5, 4, 4), (2, 6, 9, 9), (2, 6, 1, 1), (2, 6, 4, 5), (3, 6, 4, 4)]
shapes += [(1, 6, 4, 4), (0, 6, 4, 4), (2, 0, 4, 4), (2, 6, 0, 4)]
shapes += [(2, 4, 6, 6), (0, 4, 6, 6), (2, 4, 1, 1), (2, 4, 0, 0), (2, 4, 60, 60)]
for shape, transposed in itertools.product(shapes, (False, True)):
    g = (*good[:3], transposed, *good[4:])
    t = ones(*shape)
    attempt(f"input {shape} {transposed}", _ops.convolution, t, w, m, None, *g)
    attempt(f"bias {shape} {transposed}", _ops.convolution, x, w, m, t, *g)
    attempt(f"grad_output for input {shape} {transposed}", _ops.convolution_grad_input, t, w, m, [2, 4, 6, 6], *g)
    attempt(f"grad_output for weight {shape} {transposed}", _ops.convolution_grad_weight, t, x, m, *g)
    attempt(f"input for weight {shape} {transposed}", _ops.convolution_grad_weight, dy, t, m, *g)
shapes = [(), (6,), (6, 4), (6, 4, 3), (6, 5, 3, 3), (5, 4, 3, 3), (6, 4, 4, 4), (6, 4, 9, 9), (6, 4, 3, 3, 1)]
kernels = [ones(*shape) for shape in [*shapes, (6, 4, 0, 0), (0, 4, 3, 3), (6, 0, 3, 3)]]
kernels += [ones(1).expand(*shape) for shape in [(2**40, 4, 3, 3), (6, 4, 2**29, 2**29), (6, 2**59, 1, 1)]]
for k, transposed in itertools.product(kernels, (False, True)):
    g = (*good[:3], transposed, *good[4:])
    attempt(f"weight {tuple(k.shape)} {transposed}", _ops.convolution, x, k, k, None, *g)
    attempt(f"weight for input {tuple(k.shape)} {transposed}", _ops.convolution_grad_input, dy, k, k, [2, 4, 6, 6], *g)
    attempt(f"mask for weight {tuple(k.shape)} {transposed}", _ops.convolution_grad_weight, dy, x, k, *g)
"""

_HOSTILE_REST = """
import masked_ops
w = ones(4, 3)
quantized = torch.quantize_per_tensor(torch.ones(4, 3), 0.1, 0, torch.quint8)
nested = torch.nested.nested_tensor([torch.ones(4, 3), torch.ones(2, 3)])
odd = [None, 1, 1.5, "mask", [1.0], object(), quantized, nested, ones(4, 3).to_sparse(), ones(4, 3).to_sparse_csr()]
odd += [ones(4, 4).to_mkldnn(), ones(4, 3).to("meta"), ones(4, 3).to(torch.float8_e4m3fn), ones(4, 3).cfloat()]
odd += [ones(4, 3).to(torch.uint16), ones(4, 3).to(torch.uint64), ones(4, 3).to(torch.float8_e4m3fn).to("meta")]
for grad in (False, True):
    leaf = w.clone().requires_grad_(grad)
    for a in odd:
        attempt(f"linear {type(a)}", _ops.linear, a, leaf, ones(4, 3))
        attempt(f"linear weight {type(a)}", _ops.linear, ones(2, 3).requires_grad_(grad), a, ones(4, 3))
        attempt(f"linear mask {type(a)}", _ops.linear, ones(2, 3), leaf, a)
        attempt(f"linear both {type(a)}", _ops.linear, ones(2, 3), a, a)
        attempt(f"linear bias {type(a)}", _ops.linear, ones(2, 3), leaf, ones(4, 3), a)
        attempt(f"apply_mask {type(a)}", _ops.apply_mask, a, a)
        attempt(f"apply_mask mask {type(a)}", _ops.apply_mask, leaf, a)
        attempt(f"grad_input {type(a)}", _ops.linear_grad_input, a, leaf, ones(4, 3))
        attempt(f"grad_weight {type(a)}", _ops.linear_grad_weight, a, leaf, a)
        attempt(f"conv {type(a)}", masked_ops.masked_conv1d, a, a, a, a)
        attempt(f"explain {type(a)}", _ops.explain_linear, leaf, a, 1)
        where = ((2, 3), False, [1], [0], [1], False, [0], 1)
        attempt(f"explain_convolution {type(a)}", _ops.explain_convolution, leaf, a, *where)
        attempt(f"vmap {type(a)}", torch.func.vmap(lambda x: _ops.linear(x, leaf, a)), ones(2, 3))
"""

SNIPPETS = {
    f"{family}, {dtype}": _HOSTILE.replace("{dtype}", dtype)
    + code
    + f"\nassert calls > 100 or {family == 'rest'} and calls > 50, calls\nassert survived, 'nothing was served'\n"
    for family, code in (
        ("linear", _HOSTILE_LINEAR),
        ("convolution", _HOSTILE_CONVOLUTION),
        ("rest", _HOSTILE_REST),
    )
    for dtype in (("float32", "float64", "bfloat16") if family != "rest" else ("float32",))
}


@pytest.fixture(scope="module")
def hostile(request: pytest.FixtureRequest, tmp_path_factory: Any) -> dict[str, tuple[int, str]]:
    return run_each_in_a_process(SNIPPETS, request.getfixturevalue("run_python"), tmp_path_factory.mktemp("hostile"))


@pytest.mark.parametrize("name", SNIPPETS)
def test_hostile_input_does_not_crash(name: str, hostile: dict[str, tuple[int, str]]) -> None:
    status, output = hostile[name]
    assert status == 0, f"exit status {status} at: {output[-3000:]}"
