"""Derivatives: of any order, forward and reverse, under torch.func, only where needed, and never of the mask."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from generators import (
    assert_exact,
    compiled_only,
    every_path_and_float,
    integers,
    mask_of,
    masked,
    normal,
    running_on,
    serves_linear,
    spoiled,
)
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import masked_ops
from masked_ops import _ops

pytestmark = pytest.mark.usefixtures("device")

double = partial(normal, dtype=torch.float64)


def _linear(soft: bool) -> dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]]:
    mask = mask_of("half", 4, 3, dtype=torch.float64) * (0.5 if soft else 1)
    rows = mask[0]
    return {
        "linear": (lambda x, w, b: _ops.linear(x, w, mask, b), (double(2, 3), double(4, 3), double(4))),
        "linear, no bias": (lambda x, w: _ops.linear(x, w, mask, None), (double(2, 3), double(4, 3))),
        "linear, 1-D input": (lambda x, w, b: _ops.linear(x, w, mask, b), (double(3), double(4, 3), double(4))),
        "linear, 3-D input": (lambda x, w, b: _ops.linear(x, w, mask, b), (double(2, 2, 3), double(4, 3), double(4))),
        "linear, 1-D weight": (lambda x, w: _ops.linear(x, w, rows, None), (double(2, 3), double(3))),
        "linear, scalar bias": (lambda x, w, b: _ops.linear(x, w, mask, b), (double(2, 3), double(4, 3), double(1))),
        "linear_grad_input": (lambda g, w: _ops.linear_grad_input(g, w, mask), (double(2, 4), double(4, 3))),
        "linear_grad_input, 3-D": (lambda g, w: _ops.linear_grad_input(g, w, mask), (double(2, 2, 4), double(4, 3))),
        "linear_grad_weight": (lambda g, x: _ops.linear_grad_weight(g, x, mask), (double(2, 4), double(2, 3))),
        "linear_grad_weight, 1-D": (lambda g, x: _ops.linear_grad_weight(g, x, mask), (double(4), double(3))),
        "linear_grad_weight, 3-D": (
            lambda g, x: _ops.linear_grad_weight(g, x, mask),
            (double(2, 2, 4), double(2, 2, 3)),
        ),
        "apply_mask": (lambda w: _ops.apply_mask(w, mask), (double(4, 3),)),
        "apply_mask, dtype": (lambda w: _ops.apply_mask(w, mask, dtype=torch.float64), (double(4, 3),)),
    }


def _convolution(soft: bool) -> dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]]:
    mask = mask_of("half", 4, 2, 2, 1, dtype=torch.float64) * (0.5 if soft else 1)
    forward = ([2, 1], [1, 0], [1, 2], False, [0, 0], 2)
    transposed = ([2, 1], [1, 0], [1, 1], True, [1, 0], 2)
    return {
        "convolution": (
            lambda x, w, b: _ops.convolution(x, w, mask, b, *forward),
            (double(2, 4, 3, 2), double(4, 2, 2, 1), double(4)),
        ),
        "convolution, transposed": (
            lambda x, w, b: _ops.convolution(x, w, mask, b, *transposed),
            (double(2, 4, 2, 2), double(4, 2, 2, 1), double(4)),
        ),
        "convolution_grad_input": (
            lambda g, w: _ops.convolution_grad_input(g, w, mask, [2, 4, 3, 2], *forward),
            (double(2, 4, 2, 2), double(4, 2, 2, 1)),
        ),
        "convolution_grad_input, transposed": (
            lambda g, w: _ops.convolution_grad_input(g, w, mask, [2, 4, 2, 2], *transposed),
            (double(2, 4, 3, 2), double(4, 2, 2, 1)),
        ),
        "convolution_grad_weight": (
            lambda g, x: _ops.convolution_grad_weight(g, x, mask, *forward),
            (double(2, 4, 2, 2), double(2, 4, 3, 2)),
        ),
        "convolution_grad_weight, transposed": (
            lambda g, x: _ops.convolution_grad_weight(g, x, mask, *transposed),
            (double(2, 4, 3, 2), double(2, 4, 2, 2)),
        ),
    }


FAMILY = [*_linear(False), *_convolution(False)]


@pytest.mark.parametrize("soft", [False, True], ids=["binary", "soft"])
@pytest.mark.parametrize("name", FAMILY)
def test_derivatives_of_every_operation(name: str, soft: bool) -> None:
    function, tensors = {**_linear(soft), **_convolution(soft)}[name]
    inputs = tuple(t.requires_grad_() for t in tensors)
    assert gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    assert gradgradcheck(function, inputs, check_batched_grad=True, check_fwd_over_rev=True, check_rev_over_rev=True)


@pytest.mark.parametrize("name", ["conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d"])
def test_derivatives_of_functions(name: str) -> None:
    """The batch-less and 'same' ways, whose views and padding lie outside the operations."""
    n = int(name[-2])
    kernel = (2, 2, *(3, 2, 1)[:n])
    mask = mask_of("half", *kernel)
    options = {} if "transpose" in name else {"padding": "same"}
    function = getattr(masked_ops, f"masked_{name}")
    inputs = double(2, *(4, 2, 2)[:n]).requires_grad_(), double(*kernel).requires_grad_(), double(2).requires_grad_()
    check = partial(function, **options)
    assert gradcheck(lambda x, w, b: check(x, w, mask, b), inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(lambda x, w, b: check(x, w, mask, b), inputs)


# --- on each path ----------------------------------------------------------------------------------------------------


@every_path_and_float
def test_double_backward_on_every_path(path: str | None, dtype: torch.dtype) -> None:
    """Against torch's own in float64. With M = 1, 4 and 64, of which a path serves one at least."""
    N, K = 64, 96
    for M in sorted(serves_linear(path, dtype)):
        mask = mask_of("tenth", N, K)
        weight = integers(N, K, dtype=dtype)
        tensors = integers(M, K, dtype=dtype), spoiled(weight, mask), integers(N, dtype=dtype)
        grad, v, u = integers(M, N, dtype=dtype), integers(M, K, dtype=dtype), integers(N, K, dtype=dtype)

        def second(linear: Callable[..., Tensor], tensors: tuple, probes: tuple) -> list[Tensor]:
            x, w, b, g = (t.detach().requires_grad_() for t in tensors)
            y = linear(x, w, b)
            gx, gw, gb = torch.autograd.grad(y, (x, w, b), g, create_graph=True)
            # Probes on both gradients, so that each operation of the family is differentiated in each argument.
            return [gx, gw, gb, *torch.autograd.grad((gx * probes[0]).sum() + (gw * probes[1]).sum(), (x, w, g))]

        exact = second(
            lambda x, w, b, mask=mask: F.linear(x, masked(w, mask), b),
            tuple(t.double() for t in (tensors[0], weight * mask, tensors[2], grad)),
            (v.double(), u.double()),
        )
        with running_on(path):
            try:
                actual = second(
                    lambda x, w, b, mask=mask: masked_ops.masked_linear(x, w, mask, b), (*tensors, grad), (v, u)
                )
            except RuntimeError as error:
                # A path may serve the forward operation alone.
                if path in (None, "copy", "fused", "reference") or "cannot serve" not in str(error):
                    raise
                continue
        for a, e in zip(actual, exact, strict=True):
            assert_exact(a, e, path, M)


@compiled_only
@pytest.mark.parametrize("path", ["copy", "sparse"])
@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_batched_gradients_on_paths_that_keep_values(name: str, path: str) -> None:
    """A batch of gradients comes as a wrapper, which has no memory that a kernel could read."""
    x, w = (integers(4, 6), integers(5, 6)) if name == "linear" else (integers(2, 6, 5, 5), integers(5, 6, 3, 3))
    mask = mask_of("half", *w.shape)
    function = getattr(masked_ops, f"masked_{name}")
    with running_on(path):
        leaves = [t.clone().requires_grad_() for t in (x, w)]
        y = function(*leaves, mask)
        dy = integers(3, *y.shape)
        batched = torch.autograd.grad(y, leaves, dy, is_grads_batched=True, retain_graph=True)
        for i in range(3):
            for together, alone in zip(batched, torch.autograd.grad(y, leaves, dy[i], retain_graph=True), strict=True):
                assert_exact(together[i], alone)


# --- what is computed ------------------------------------------------------------------------------------------------


class Recorder(TorchDispatchMode):
    """The operations of this package that run, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "masked_ops":
            self.seen.append(func._opname)
        return func(*args, **(kwargs or {}))


@compiled_only
@pytest.mark.parametrize("needed", ["".join(c) for n in range(1, 4) for c in itertools.combinations("xwb", n)])
@pytest.mark.parametrize("family", ["linear", "convolution"])
def test_only_needed_gradients_are_computed(family: str, needed: str) -> None:
    shape = (4, 3) if family == "linear" else (4, 3, 1, 1)
    x, w, b = torch.randn(2, 3, *shape[2:]), torch.randn(shape), torch.randn(4)
    mask = torch.ones(shape)
    for name, tensor in zip("xwb", (x, w, b), strict=True):
        tensor.requires_grad_(name in needed)
    function = masked_ops.masked_linear if family == "linear" else masked_ops.masked_conv2d
    with Recorder() as recorder:
        y = function(x, w, mask, b)
        forward = recorder.seen[:]
        y.sum().backward()
    assert forward == [family]
    expected = {f"{family}_grad_{name}" for key, name in (("x", "input"), ("w", "weight")) if key in needed}
    assert sorted(recorder.seen[1:]) == sorted(expected)
    assert [t.grad is not None for t in (x, w, b)] == [name in needed for name in "xwb"]


@pytest.mark.parametrize("soft", [1, 2])
def test_mask_gets_no_gradient(soft: int) -> None:
    mask = (torch.ones(4, 3) * soft).requires_grad_()
    x, w = torch.randn(2, 3), torch.randn(4, 3)
    assert not masked_ops.masked_linear(x, w, mask).requires_grad
    assert not masked_ops.apply_mask(w, mask).requires_grad
    assert not masked_ops.masked_conv2d(x.view(2, 3, 1, 1), w.view(4, 3, 1, 1), mask.view(4, 3, 1, 1)).requires_grad
    w.requires_grad_()
    y = masked_ops.masked_linear(x, w, mask)
    assert torch.autograd.grad(y.sum(), mask, allow_unused=True) == (None,)
    assert torch.func.grad(lambda m: masked_ops.masked_linear(x, w, m).sum())(mask.detach()).eq(0).all()
    _, tangent = torch.func.jvp(lambda m: masked_ops.masked_linear(x, w, m), (mask.detach(),), (torch.ones(4, 3),))
    assert tangent.eq(0).all()


def test_no_graph_without_need() -> None:
    x, w, mask = torch.randn(2, 3), torch.randn(4, 3), torch.ones(4, 3)
    assert masked_ops.masked_linear(x, w, mask).grad_fn is None
    w.requires_grad_()
    with torch.no_grad():
        assert masked_ops.masked_linear(x, w, mask).grad_fn is None
    assert masked_ops.masked_linear(x, w, mask).grad_fn is not None


@compiled_only
@pytest.mark.parametrize("of_input", [True, False])
@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_backward_keeps_no_masked_weight(name: str, of_input: bool, device: str) -> None:
    """What is saved is the input, the weight and the mask themselves: no copy of the weight's size.

    (On a CUDA device a linear layer keeps the masked weight that was made there, as README says, but not where hooks
    take what is saved, as those here do.)
    """
    shape = (4, 3) if name == "linear" else (4, 3, 1, 1)
    x, w = torch.randn(2, 3, *shape[2:], requires_grad=of_input), torch.randn(shape, requires_grad=True)
    mask = mask_of("half", *shape)
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = getattr(masked_ops, f"masked_{name}")(x, w, mask, torch.randn(4))
    known = {t.data_ptr() for t in (x, w, mask)}
    assert known <= {t.data_ptr() for t in saved}
    assert {t.data_ptr() for t in saved} <= known and len(saved) <= 4
    y.sum().backward()


def test_write_between_forward_and_backward_is_an_error() -> None:
    """As for the dense layer; a mask that pruning replaced is no exception."""
    for index in range(3):
        x, w = torch.randn(2, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
        mask = torch.ones(4, 3)
        y = masked_ops.masked_linear(x, w, mask)
        with torch.no_grad():
            (x, w, mask)[index].mul_(0.5)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_graph_can_be_kept_and_is_freed() -> None:
    x, w = torch.randn(2, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    y = masked_ops.masked_linear(x, w, torch.ones(4, 3)).sum()
    y.backward(retain_graph=True)
    first = w.grad.clone()
    y.backward()
    assert torch.equal(w.grad, 2 * first)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.backward()


def test_hooks_see_masked_gradients() -> None:
    mask = mask_of("half", 4, 3)
    w = torch.randn(4, 3, requires_grad=True)
    seen: list[Tensor] = []
    w.register_hook(seen.append)
    masked_ops.masked_linear(torch.randn(2, 3), w, mask).sum().backward()
    assert (seen[0][~mask] == 0).all()
    assert torch.equal(seen[0], w.grad)


def test_gradients_that_are_expanded_or_undefined() -> None:
    """sum() sends back an expanded scalar; an output that is not used sends nothing."""
    x, w = integers(3, 5).requires_grad_(), integers(4, 5).requires_grad_()
    mask = mask_of("half", 4, 5)
    masked_ops.masked_linear(x, w, mask).sum().backward()
    assert_exact(w.grad, x.detach().sum(0).expand(4, 5) * mask)
    y = masked_ops.masked_linear(x, w, mask)
    z = masked_ops.masked_linear(x, w, mask)
    torch.autograd.backward([y, z], [torch.ones_like(y), torch.zeros_like(z)])
    assert_exact(w.grad, 2 * x.detach().sum(0).expand(4, 5) * mask)


def test_materialized_zero_gradient_in_double_backward() -> None:
    """Only one of the first gradients is differentiated: the other's is undefined."""
    x, w, g = (t.requires_grad_() for t in (double(2, 3), double(4, 3), double(2, 4)))
    mask = mask_of("half", 4, 3)
    gx, gw = torch.autograd.grad(masked_ops.masked_linear(x, w, mask), (x, w), g, create_graph=True)
    assert torch.autograd.grad(gx.sum(), x, allow_unused=True, retain_graph=True) == (None,)
    (ggw,) = torch.autograd.grad(gx.sum(), w, retain_graph=True)
    torch.testing.assert_close(ggw, g.detach().sum(0)[:, None].expand(4, 3) * mask)
    (ggx,) = torch.autograd.grad(gw.sum(), x)
    torch.testing.assert_close(ggx, g.detach() @ mask.double())


# --- torch.func ------------------------------------------------------------------------------------------------------


def _functions() -> dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[Tensor, ...]]]:
    """Ours, torch's over the masked weight, and the tensors both take."""
    linear_mask = mask_of("half", 4, 3).double()
    conv_mask = mask_of("half", 3, 2, 2, 2)
    return {
        "linear": (
            lambda x, w, b: masked_ops.masked_linear(x, w, linear_mask, b),
            lambda x, w, b: F.linear(x, w * linear_mask, b),
            (double(5, 3), double(4, 3), double(4)),
        ),
        "conv2d": (
            lambda x, w, b: masked_ops.masked_conv2d(x, w, conv_mask, b, padding=1),
            lambda x, w, b: F.conv2d(x, w * conv_mask, b, padding=1),
            (double(2, 2, 3, 3), double(3, 2, 2, 2), double(3)),
        ),
        "conv_transpose2d": (
            lambda x, w, b: masked_ops.masked_conv_transpose2d(x, w, conv_mask, b, stride=2),
            lambda x, w, b: F.conv_transpose2d(x, w * conv_mask, b, stride=2),
            (double(2, 3, 3, 2), double(3, 2, 2, 2), double(2)),
        ),
        "apply_mask": (
            lambda w: masked_ops.apply_mask(w, conv_mask),
            lambda w: w * conv_mask,
            (double(3, 2, 2, 2),),
        ),
    }


TRANSFORMS: dict[str, Callable[..., Any]] = {
    "grad": lambda f, ts: torch.func.grad(lambda *a: f(*a).pow(3).sum(), tuple(range(len(ts))))(*ts),
    "vjp": lambda f, ts: (lambda y, pull: pull(torch.sin(y)))(*torch.func.vjp(f, *ts)),
    "jvp": lambda f, ts: torch.func.jvp(f, ts, tuple(torch.cos(t) for t in ts)),
    "jacrev": lambda f, ts: torch.func.jacrev(f, tuple(range(len(ts))))(*ts),
    "jacfwd": lambda f, ts: torch.func.jacfwd(f, tuple(range(len(ts))))(*ts),
    "hessian": lambda f, ts: torch.func.hessian(lambda *a: f(*a).pow(3).sum(), tuple(range(len(ts))))(*ts),
    "vmap": lambda f, ts: torch.func.vmap(f)(*(torch.stack([t, -t, t * 2]) for t in ts)),
    "vmap over the first": lambda f, ts: torch.func.vmap(f, (1, *[None] * (len(ts) - 1)))(
        torch.stack([ts[0], -ts[0]], 1), *ts[1:]
    ),
    "vmap of vmap": lambda f, ts: torch.func.vmap(torch.func.vmap(f))(*(t.expand(2, 3, *t.shape) for t in ts)),
    "gradients of each sample": lambda f, ts: torch.func.vmap(
        torch.func.grad(lambda *a: f(*a).pow(2).sum(), tuple(range(len(ts))))
    )(*(torch.stack([t, -t]) for t in ts)),
    "jvp of grad": lambda f, ts: torch.func.jvp(
        torch.func.grad(lambda *a: f(*a).pow(3).sum()), ts, tuple(torch.cos(t) for t in ts)
    ),
    "linearize": lambda f, ts: torch.func.linearize(f, *ts)[1](*(torch.cos(t) for t in ts)),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", _functions())
def test_transforms(name: str, transform: str) -> None:
    ours, theirs, tensors = _functions()[name]
    torch.testing.assert_close(TRANSFORMS[transform](ours, tensors), TRANSFORMS[transform](theirs, tensors))


def test_vmap_over_masks() -> None:
    """A batch of masks: an ensemble of pruned layers."""
    x, w, masks = double(5, 3), double(4, 3), torch.rand(6, 4, 3) < 0.5
    actual = torch.func.vmap(masked_ops.masked_linear, (None, None, 0))(x, w, masks)
    torch.testing.assert_close(actual, torch.einsum("mk,enk->emn", x, w * masks))
    grads = torch.func.vmap(torch.func.grad(lambda w, m: masked_ops.masked_linear(x, w, m).pow(2).sum()), (None, 0))(
        w, masks
    )
    assert (grads[~masks] == 0).all()
    torch.testing.assert_close(torch.func.vmap(masked_ops.apply_mask, (None, 0))(w, masks), w * masks)


def test_per_sample_gradients_of_functional_call() -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(double(4, 3))
            self.register_buffer("mask", mask_of("half", 4, 3))

        def forward(self, x: Tensor) -> Tensor:
            return masked_ops.masked_linear(x, self.weight, self.mask)

    layer, samples = Layer(), double(6, 3)

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(layer, parameters, (sample,)).pow(2).sum()

    parameters = {"weight": layer.weight.detach()}
    grads = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, samples)["weight"]
    for sample, grad in zip(samples, grads, strict=True):
        layer.zero_grad()
        layer(sample).pow(2).sum().backward()
        torch.testing.assert_close(grad, layer.weight.grad)


def test_forward_mode_with_duals() -> None:
    mask = mask_of("half", 4, 3)
    x, w, tx, tw = double(2, 3), double(4, 3), double(2, 3), double(4, 3)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual
        y = masked_ops.masked_linear(dual(x, tx), dual(w, tw), mask)
        tangent = torch.autograd.forward_ad.unpack_dual(y).tangent
    torch.testing.assert_close(tangent, tx @ (w * mask).t() + x @ (tw * mask).t())


@compiled_only
def test_transforms_leave_the_compiled_path_to_later_calls(device: str) -> None:
    """The composite serves inside a transform; afterwards, calls reach the kernels as if none had been used.

    Seen from three sides: the graph holds this package's node, the cache of masks is asked, and a forced path that
    cannot serve float64 refuses it.
    """
    mask = mask_of("half", 4, 3)
    x, w = double(2, 3), double(4, 3)

    def loss(w: Tensor) -> Tensor:
        return masked_ops.masked_linear(x, w, mask).sum()

    def looked_up() -> int:
        info = masked_ops.cache_info()
        return info["hits"] + info["misses"]

    before = looked_up()
    torch.func.hessian(loss)(w)
    torch.func.vmap(torch.func.grad(loss))(w.expand(2, 4, 3))
    torch.func.jvp(loss, (w,), (w,))
    with pytest.raises(ZeroDivisionError):
        torch.func.grad(lambda w: 1 / 0)(w)
    assert looked_up() == before

    assert "masked_ops" in masked_ops.masked_linear(x, w.requires_grad_(), mask).grad_fn.name()
    before = looked_up()
    masked_ops.masked_linear(x, w.detach(), mask)
    assert looked_up() > before
    path = "fused" if device == "cpu" else "gemm_sm90"
    with running_on(path), pytest.raises(RuntimeError, match=f"path '{path}' cannot serve"):
        masked_ops.masked_linear(x, w.detach(), mask)
    with running_on("fused" if device == "cpu" else "copy"):
        assert_exact(
            masked_ops.masked_linear(x.float().round(), w.detach().float().round(), mask),
            F.linear(x.round(), w.detach().round() * mask),
        )


# --- checkpointing, threads ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant: bool) -> None:
    mask1, mask2 = mask_of("half", 6, 3), mask_of("half", 2, 6)
    w1, w2 = double(6, 3).requires_grad_(), double(2, 6).requires_grad_()
    x = double(5, 3).requires_grad_()

    def block(x: Tensor) -> Tensor:
        return masked_ops.masked_linear(torch.relu(masked_ops.masked_linear(x, w1, mask1)), w2, mask2)

    expected = torch.autograd.grad(block(x).pow(2).sum(), (x, w1, w2))
    # The reentrant way runs a backward of its own, and refuses torch.autograd.grad.
    checkpoint(block, x, use_reentrant=use_reentrant).pow(2).sum().backward()
    for leaf, grad in zip((x, w1, w2), expected, strict=True):
        torch.testing.assert_close(leaf.grad, grad)


@pytest.mark.parametrize("operation", ["linear", "convolution"])
def test_a_checkpoint_may_take_another_path_when_it_is_run_again(operation: str) -> None:
    """From its second use on a mask may take the sparse path, which has values to keep for backward."""
    linear = operation == "linear"
    call = masked_ops.masked_linear if linear else masked_ops.masked_conv2d
    w = torch.randn((64, 48) if linear else (64, 48, 3, 3)).requires_grad_()
    x = torch.randn((64, 48) if linear else (4, 48, 8, 8)).requires_grad_()
    mask = torch.rand(w.shape) < 0.05

    def block(x: Tensor, mask: Tensor) -> Tensor:
        return torch.sigmoid(call(x, w, mask))  # which saves something as well: checkpoints stop at the last

    expected = torch.autograd.grad(torch.sigmoid(call(x, w * mask, torch.ones_like(mask))).sum(), (x, w))
    for _ in range(3):
        x.grad = w.grad = None
        checkpoint(block, x, mask, use_reentrant=False).sum().backward()
        for leaf, grad in zip((x, w), expected, strict=True):
            torch.testing.assert_close(leaf.grad, grad, rtol=1e-4, atol=1e-4)


def test_backward_in_other_threads() -> None:
    """Several threads run their own forward and backward over one weight and one mask."""
    w, mask = double(64, 96), mask_of("half", 64, 96)
    inputs = [double(8, 96) for _ in range(4)]
    expected = [torch.autograd.grad(F.linear(x, v := w.clone().requires_grad_()).sum(), v)[0] for x in inputs]
    results: list[Tensor | None] = [None] * len(inputs)

    def work(i: int) -> None:
        for _ in range(20):
            v = w.clone().requires_grad_()
            masked_ops.masked_linear(inputs[i], v, mask).sum().backward()
            results[i] = v.grad

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for actual, grad in zip(results, expected, strict=True):
        torch.testing.assert_close(actual, grad * mask)
