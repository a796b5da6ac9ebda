"""torch.compile, torch.export, autocast, inference mode, opcheck; also as the first thing that a process runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from generators import (
    assert_exact,
    compiled_only,
    every_float,
    integers,
    mask_of,
    masked,
    normal,
    run_each_in_a_process,
)
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

import masked_ops
from masked_ops import _ops
from masked_ops._packed_class import bits_of

# Torch's own, of which there are many on these ways.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
]

# --- opcheck ---------------------------------------------------------------------------------------------------------


def _samples() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    def leaf(*shape: int, dtype: torch.dtype = torch.float32, like: Callable[[Tensor], Tensor] = lambda t: t) -> Tensor:
        return like(normal(*shape, dtype=dtype)).detach().requires_grad_()

    def channels_last(t: Tensor) -> Tensor:
        return t.contiguous(memory_format=torch.channels_last)

    def transposed(t: Tensor) -> Tensor:
        return t.transpose(-1, -2).contiguous().transpose(-1, -2)

    mask = mask_of("half", 4, 3)
    kernel = mask_of("half", 4, 2, 3, 2)
    forward = ([2, 1], [1, 0], [1, 2], False, [0, 0], 2)
    back = ([2, 1], [1, 0], [1, 1], True, [1, 0], 2)
    line = ([1], [1], [1], False, [0], 1)
    samples: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "linear": (_ops.linear, (leaf(2, 3), leaf(4, 3), mask, leaf(4))),
        "linear, no bias": (_ops.linear, (leaf(2, 3), leaf(4, 3), mask, None)),
        "linear, inference": (_ops.linear, (normal(2, 3), normal(4, 3), mask, normal(4))),
        "linear, frozen weight": (_ops.linear, (leaf(2, 3), normal(4, 3), mask, None)),
        "linear, soft": (_ops.linear, (leaf(2, 3), leaf(4, 3), mask * 0.5, leaf(4))),
        "linear, 1-D": (_ops.linear, (leaf(3), leaf(4, 3), mask, leaf(4))),
        "linear, 4-D": (_ops.linear, (leaf(2, 2, 2, 3), leaf(4, 3), mask, leaf(4))),
        "linear, 1-D weight": (_ops.linear, (leaf(2, 3), leaf(3), mask[0], None)),
        "linear, wide bias": (_ops.linear, (leaf(2, 3), leaf(4, 3), mask, leaf(2, 4))),
        "linear, transposed": (
            _ops.linear,
            (leaf(2, 3, like=transposed), leaf(4, 3, like=transposed), transposed(mask), leaf(4)),
        ),
        "linear, transposed 3-D": (_ops.linear, (leaf(2, 5, 3, like=transposed), leaf(4, 3), mask, leaf(4))),
        "linear, bfloat16": (
            _ops.linear,
            (leaf(2, 3, dtype=torch.bfloat16), leaf(4, 3, dtype=torch.bfloat16), mask, None),
        ),
        "linear, empty": (_ops.linear, (leaf(0, 3), leaf(4, 3), mask, leaf(4))),
        "linear_grad_input": (_ops.linear_grad_input, (leaf(2, 4), leaf(4, 3), mask)),
        "linear_grad_input, 1-D": (_ops.linear_grad_input, (leaf(4), leaf(4, 3), mask)),
        "linear_grad_input, 3-D": (_ops.linear_grad_input, (leaf(2, 2, 4, like=transposed), leaf(4, 3), mask * 2.0)),
        "linear_grad_weight": (_ops.linear_grad_weight, (leaf(2, 4), leaf(2, 3), mask)),
        "linear_grad_weight, 1-D": (_ops.linear_grad_weight, (leaf(4), leaf(3), mask)),
        "linear_grad_weight, 3-D": (
            _ops.linear_grad_weight,
            (leaf(2, 2, 4), leaf(2, 2, 3, like=transposed), transposed(mask)),
        ),
        "linear_grad_weight, soft": (_ops.linear_grad_weight, (leaf(2, 4), leaf(2, 3), transposed(mask * 0.5))),
    }
    for name, like in {"": lambda t: t, ", channels_last": channels_last}.items():
        for soft in (1, 0.5):
            full_name = name + (", soft" if soft != 1 else "")
            m = like(kernel * soft) if soft != 1 else like(kernel)
            samples |= {
                f"convolution{full_name}": (
                    _ops.convolution,
                    (leaf(2, 4, 5, 4, like=like), leaf(4, 2, 3, 2, like=like), m, leaf(4), *forward),
                ),
                f"convolution, transposed{full_name}": (
                    _ops.convolution,
                    (leaf(2, 4, 5, 4, like=like), leaf(4, 2, 3, 2, like=like), m, leaf(4), *back),
                ),
                f"convolution_grad_input{full_name}": (
                    _ops.convolution_grad_input,
                    (leaf(2, 4, 3, 2, like=like), leaf(4, 2, 3, 2, like=like), m, [2, 4, 5, 4], *forward),
                ),
                f"convolution_grad_weight{full_name}": (
                    _ops.convolution_grad_weight,
                    (leaf(2, 4, 3, 2, like=like), leaf(2, 4, 5, 4, like=like), m, *forward),
                ),
            }
    bits = torch.tensor([[0b101], [0], [0b111]], dtype=torch.uint8)
    kernel_bits, kept = bits_of(kernel), int(kernel.sum())
    samples |= {
        "packed_linear": (_ops.packed_linear, (leaf(2, 3), leaf(5), bits, 3, leaf(3))),
        "packed_linear, no bias, 3-D": (_ops.packed_linear, (leaf(2, 2, 3), leaf(5), bits, 3, None)),
        "packed_linear, 1-D": (_ops.packed_linear, (leaf(3), leaf(5), bits, 3, leaf(3))),
        "packed_linear_grad_input": (_ops.packed_linear_grad_input, (leaf(2, 3), leaf(5), bits, 3)),
        "packed_linear_grad_values": (_ops.packed_linear_grad_values, (leaf(2, 3), leaf(2, 3), bits, 5)),
        "packed_convolution": (
            _ops.packed_convolution,
            (leaf(2, 4, 5, 4), leaf(kept), kernel_bits, [4, 2, 3, 2], leaf(4), *forward),
        ),
        "packed_convolution, channels_last, transposed": (
            _ops.packed_convolution,
            (leaf(2, 4, 5, 4, like=channels_last), leaf(kept), kernel_bits, [4, 2, 3, 2], None, *back),
        ),
        "packed_convolution_grad_input": (
            _ops.packed_convolution_grad_input,
            (leaf(2, 4, 3, 2), leaf(kept), kernel_bits, [4, 2, 3, 2], [2, 4, 5, 4], *forward),
        ),
        "packed_convolution_grad_values": (
            _ops.packed_convolution_grad_values,
            (leaf(2, 4, 3, 2), leaf(2, 4, 5, 4, like=channels_last), kernel_bits, [4, 2, 3, 2], kept, *forward),
        ),
        "unpack_values": (_ops.unpack_values, (leaf(5), bits, 3)),
        "pack_values": (_ops.pack_values, (leaf(3, 3), bits, 5)),
        "convolution, weight channels_last": (
            _ops.convolution,
            (leaf(2, 4, 5, 4), leaf(4, 2, 3, 2, like=channels_last), kernel, leaf(4), *forward),
        ),
        "convolution, mask channels_last": (
            _ops.convolution,
            (leaf(2, 4, 5, 4), leaf(4, 2, 3, 2), channels_last(kernel), None, *forward),
        ),
        "convolution_grad_input, grad_output channels_last": (
            _ops.convolution_grad_input,
            (leaf(2, 4, 3, 2, like=channels_last), leaf(4, 2, 3, 2), kernel, [2, 4, 5, 4], *forward),
        ),
        "convolution_grad_weight, mask channels_last": (
            _ops.convolution_grad_weight,
            (leaf(2, 4, 3, 2), leaf(2, 4, 5, 4), channels_last(kernel), *forward),
        ),
        "packed_convolution_grad_input, grad_output channels_last": (
            _ops.packed_convolution_grad_input,
            (leaf(2, 4, 3, 2, like=channels_last), leaf(kept), kernel_bits, [4, 2, 3, 2], [2, 4, 5, 4], *forward),
        ),
        "convolution, 1-D": (
            _ops.convolution,
            (leaf(2, 3, 7), leaf(4, 3, 2), mask_of("half", 4, 3, 2), None, *line),
        ),
        "convolution, 1-D, transposed weight": (
            _ops.convolution,
            (leaf(2, 3, 7), leaf(4, 3, 2, like=transposed), mask_of("half", 4, 3, 2), None, *line),
        ),
        "convolution, 1-D, transposed soft weight": (
            _ops.convolution,
            (leaf(2, 3, 7), leaf(4, 3, 2, like=transposed), mask_of("half", 4, 3, 2) * 0.5, None, *line),
        ),
        "convolution_grad_input, 1-D, transposed weight": (
            _ops.convolution_grad_input,
            (leaf(2, 4, 8), leaf(4, 3, 2, like=transposed), mask_of("half", 4, 3, 2), [2, 3, 7], *line),
        ),
        "apply_mask": (_ops.apply_mask, (leaf(4, 3), mask)),
        "apply_mask, cast": (_ops.apply_mask, (leaf(4, 3), mask), {"dtype": torch.bfloat16}),
        "apply_mask, soft": (_ops.apply_mask, (leaf(4, 3), mask * 0.5)),
        "apply_mask, transposed": (_ops.apply_mask, (leaf(4, 3, like=transposed), mask)),
        "apply_mask, mask transposed": (_ops.apply_mask, (leaf(4, 3), transposed(mask) * 0.5)),
        "apply_mask, sliced": (_ops.apply_mask, (normal(4, 8)[:, ::2].requires_grad_(), mask_of("half", 4, 4))),
        "apply_mask, sliced and transposed": (
            _ops.apply_mask,
            (normal(8, 4)[::2].t().requires_grad_(), mask_of("half", 4, 4)),
        ),
        "apply_mask, expanded": (_ops.apply_mask, (normal(1, 3).expand(4, 3).requires_grad_(), mask)),
        "apply_mask, bfloat16, soft": (
            _ops.apply_mask,
            (leaf(4, 3, dtype=torch.bfloat16), transposed(mask) * 0.5),
        ),
        "apply_mask, 0-D": (_ops.apply_mask, (torch.tensor(2.0, requires_grad=True), torch.tensor(1))),
    }
    return samples


@pytest.mark.parametrize("name", _samples())
def test_opcheck(name: str) -> None:
    op, arguments, *keywords = _samples()[name]
    torch.library.opcheck(op, arguments, *keywords)


def test_opcheck_leaves_no_operation_out() -> None:
    checked = {op for op, *_ in _samples().values()}
    defined = {getattr(_ops, schema.partition("(")[0]) for schema in _ops._SCHEMAS if not schema.startswith("explain_")}
    assert checked == defined


# --- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _linear_problem(dtype: torch.dtype = torch.float32) -> tuple[Callable[..., Tensor], Callable[..., Tensor], list]:
    """Ours, torch's, and [input, weight, mask, bias]."""
    return (
        lambda x, w, m, b: torch.relu(masked_ops.masked_linear(x, w, m, b)) * 2,
        lambda x, w, m, b: torch.relu(F.linear(x, w * m, b)) * 2,
        [integers(3, 5, dtype=dtype), integers(4, 5, dtype=dtype), mask_of("half", 4, 5), integers(4, dtype=dtype)],
    )


PROBLEMS: dict[str, Callable[[], tuple[Callable[..., Tensor], Callable[..., Tensor], list]]] = {
    "linear": _linear_problem,
    "linear, soft": lambda: (
        *_linear_problem()[:2],
        [t * 3 if i == 2 else t for i, t in enumerate(_linear_problem()[2])],
    ),
    "linear, bfloat16": lambda: _linear_problem(torch.bfloat16),
    "conv2d": lambda: (
        lambda x, w, m, b: masked_ops.masked_conv2d(x, w, m, b, stride=2, padding=1),
        lambda x, w, m, b: F.conv2d(x, w * m, b, stride=2, padding=1),
        [integers(3, 4, 7, 7), integers(6, 4, 3, 3), mask_of("half", 6, 4, 3, 3), integers(6)],
    ),
    "conv2d, channels_last": lambda: (
        lambda x, w, m, b: masked_ops.masked_conv2d(x, w, m, b, padding=1).relu(),
        lambda x, w, m, b: F.conv2d(x, w * m, b, padding=1).relu(),
        [
            integers(3, 4, 7, 7).contiguous(memory_format=torch.channels_last),
            integers(6, 4, 3, 3).contiguous(memory_format=torch.channels_last),
            mask_of("half", 6, 4, 3, 3).contiguous(memory_format=torch.channels_last),
            integers(6),
        ],
    ),
    "conv1d, same, no batch": lambda: (
        lambda x, w, m, b: masked_ops.masked_conv1d(x, w, m, b, padding="same"),
        lambda x, w, m, b: F.conv1d(x, w * m, b, padding="same"),
        [integers(4, 9), integers(6, 4, 4), mask_of("half", 6, 4, 4), integers(6)],
    ),
    "conv_transpose2d": lambda: (
        lambda x, w, m, b: masked_ops.masked_conv_transpose2d(x, w, m, b, stride=2, output_padding=1, groups=2),
        lambda x, w, m, b: F.conv_transpose2d(x, w * m, b, stride=2, output_padding=1, groups=2),
        [integers(3, 4, 5, 4), integers(4, 3, 3, 3), mask_of("half", 4, 3, 3, 3), integers(6)],
    ),
    "apply_mask": lambda: (
        lambda x, w, m, b: masked_ops.apply_mask(w, m) * x + b,
        lambda x, w, m, b: w * m * x + b,
        [integers(4, 5), integers(4, 5), mask_of("half", 4, 5), integers(1)],
    ),
}


def check_compiled(compiled: Callable[..., Tensor], dense: Callable[..., Tensor], tensors: list) -> None:
    """Values and gradients of a compiled function equal those of eager torch."""
    results = []
    for function in (compiled, dense):
        x, w, b = (tensors[i].clone().requires_grad_() for i in (0, 1, 3))
        y = function(x, w, tensors[2], b)
        y.backward(torch.ones_like(y))
        results.append((y, x.grad, w.grad, b.grad))
    for actual, expected in zip(*results, strict=True):
        assert_exact(actual, expected)
        assert actual.dtype == expected.dtype
        assert actual.stride() == expected.stride()
    with torch.no_grad():
        assert_exact(compiled(*tensors), dense(*tensors))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_compile(name: str, dynamic: bool) -> None:
    ours, dense, tensors = PROBLEMS[name]()
    check_compiled(torch.compile(ours, fullgraph=True, dynamic=dynamic, backend="aot_eager"), dense, tensors)


@pytest.mark.parametrize("contiguous", [False, True], ids=["", "input contiguous"])
@pytest.mark.parametrize("name", ["linear", "conv2d, channels_last"])
def test_compile_with_inductor(name: str, contiguous: bool) -> None:
    """Which relies on the strides that the fakes promise. Without a bias: its gradient alone would need a compiler."""
    x, w, m, _ = PROBLEMS[name]()[2]
    if contiguous:  # as the first layer of a model that is channels last gets it
        x = x.contiguous()
    function = masked_ops.masked_linear if name == "linear" else masked_ops.masked_conv2d
    results = []
    for f in (torch.compile(function, fullgraph=True), function):
        leaves = [t.clone().requires_grad_() for t in (x, w)]
        y = f(*leaves, m)
        results.append((y, *torch.autograd.grad(y, leaves, torch.ones_like(y))))
    for actual, expected in zip(*results, strict=True):
        assert_exact(actual, expected)


@pytest.mark.parametrize("memory_planning", [False, True], ids=["", "memory_planning"])
def test_inductor_leaves_masks_alone(memory_planning: bool) -> None:
    """It would compute the second mask in the memory of the first, in the same tensor, and no version counter moves."""

    def ours(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        y = masked_ops.masked_linear(x, first, first > 0)
        return masked_ops.masked_linear(y, second, second > 0)

    def dense(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        return F.linear(F.linear(x, first.clamp(min=0)), second.clamp(min=0))

    options = {"memory_planning": memory_planning, "fx_graph_cache": False}
    compiled = torch.compile(ours, fullgraph=True, options=options)
    with torch.no_grad():
        for _ in range(2):
            tensors = integers(3, 64), integers(64, 64), integers(64, 64)
            assert_exact(compiled(*tensors), dense(*tensors))


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_mask_that_is_viewed_in_a_compiled_function_may_change(backend: str) -> None:
    """Inductor's views have version counters of their own."""
    compiled = torch.compile(
        lambda x, w, m: masked_ops.masked_linear(x, w, m.view(w.shape)), fullgraph=True, backend=backend
    )
    x, w, m = integers(3, 64), integers(32, 64), mask_of("half", 32 * 64)
    with torch.no_grad():
        for _ in range(3):
            assert_exact(compiled(x, w, m), F.linear(x, w * m.view(w.shape)))
            m.logical_not_()


def test_dynamic_batch_compiles_once() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    ours, dense, (_, w, m, b) = _linear_problem()
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend=counter)
    for batch in (3, 2, 7, 64, 100):
        check_compiled(compiled, dense, [integers(batch, 5), w, m, b])
    assert counter.frame_count == 2  # with gradients and without


@pytest.mark.parametrize("name", ["conv2d", "conv_transpose2d"])
def test_dynamic_image_size_compiles_once(name: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    ours, dense, (_, w, m, b) = PROBLEMS[name]()
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend=counter)
    for size in ((2, 4, 7, 9), (5, 4, 11, 13), (9, 4, 12, 15)):  # sizes that are equal would be taken for one
        check_compiled(compiled, dense, [integers(*size), w, m, b])
    assert counter.frame_count == 2


class Layer(nn.Module):
    """The least that a masked layer is: a parameter and a buffer."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(integers(*mask.shape))
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        return masked_ops.masked_linear(x, self.weight, self.mask)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.uint8])
def test_new_mask_values_need_no_recompilation(dtype: torch.dtype) -> None:
    layer = Layer(mask_of("half", 4, 5, dtype=dtype))
    x = integers(3, 5)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)

    def check() -> None:
        y = compiled(x)
        layer.weight.grad = None
        y.sum().backward()
        assert_exact(y, F.linear(x, layer.weight * layer.mask))
        assert_exact(layer.weight.grad, x.sum(0).expand(4, 5) * layer.mask)

    check()
    frames = counter.frame_count
    with torch._dynamo.config.patch(error_on_recompile=True):
        layer.mask.copy_(mask_of("few", 4, 5))
        check()
        layer.mask[0] = 1
        check()
        layer.mask.zero_()
        check()
        if dtype == torch.float32:
            layer.mask.fill_(2)  # binary becomes soft: another path, the same graph
            check()
        layer.load_state_dict({"weight": layer.weight.detach().clone(), "mask": mask_of("half", 4, 5, dtype=dtype)})
        check()
        layer.mask = mask_of("tenth", 4, 5, dtype=dtype)
        check()
    assert counter.frame_count == frames


def test_compiled_training_step() -> None:
    """Forward, backward and the optimizer's steps give what eager gives, mask by mask."""
    layers = [Layer(mask_of("all", 4, 5)) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    forwards = [torch.compile(layers[0], fullgraph=True, backend="aot_eager"), layers[1]]
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.5, momentum=0.5) for layer in layers]
    for pattern in ("all", "half", "tenth"):
        mask = mask_of(pattern, 4, 5)
        x = integers(3, 5)
        for layer, forward, optimizer in zip(layers, forwards, optimizers, strict=True):
            layer.mask.copy_(mask)
            optimizer.zero_grad()
            forward(x).pow(2).sum().backward()
            optimizer.step()
        assert torch.equal(layers[0].weight, layers[1].weight)


def test_transforms_inside_compile() -> None:
    x, w, mask = normal(3, 5), normal(4, 5), mask_of("half", 4, 5)

    def grads(x: Tensor, w: Tensor) -> Tensor:
        return torch.func.vmap(
            torch.func.grad(lambda w, x: masked_ops.masked_linear(x, w, mask).pow(2).sum()), (None, 0)
        )(w, x)

    torch.testing.assert_close(torch.compile(grads, fullgraph=True, backend="aot_eager")(x, w), grads(x, w))


def test_checkpointing_inside_compile() -> None:
    ours, dense, tensors = _linear_problem()
    compiled = torch.compile(
        lambda *a: torch.utils.checkpoint.checkpoint(ours, *a, use_reentrant=False),
        fullgraph=True,
        backend="aot_eager",
    )
    check_compiled(compiled, dense, tensors)


def test_errors_inside_compile_are_those_of_bad_input() -> None:
    compiled = torch.compile(masked_ops.masked_linear, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="mask must have the shape of weight"):
        compiled(torch.ones(2, 3), torch.ones(4, 3), torch.ones(3, 4))
    with pytest.raises(Exception, match="input"):
        compiled(torch.ones(2, 5), torch.ones(4, 3), torch.ones(4, 3))


# --- torch.export ----------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv_weight = nn.Parameter(integers(4, 3, 3, 3))
        self.register_buffer("conv_mask", mask_of("half", 4, 3, 3, 3))
        self.linear_weight = nn.Parameter(integers(5, 4))
        self.linear_bias = nn.Parameter(integers(5))
        self.register_buffer("linear_mask", mask_of("half", 5, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = masked_ops.masked_conv2d(x, self.conv_weight, self.conv_mask, padding=1).relu().sum((2, 3))
        return masked_ops.masked_linear(x, self.linear_weight, self.linear_mask, self.linear_bias)


def _export(net: nn.Module) -> torch.export.ExportedProgram:
    return torch.export.export(
        net, (integers(2, 3, 6, 6),), dynamic_shapes={"x": {0: torch.export.Dim("batch", min=1, max=1024)}}
    )


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_export(mode: Callable[[], Any]) -> None:
    net = Net()
    with mode():
        program = _export(net)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {"masked_ops.convolution.default", "masked_ops.linear.default"} <= targets
    for batch in (2, 1, 7):
        x = integers(batch, 3, 6, 6)
        assert_exact(program.module()(x), net(x))
    program.run_decompositions()


def test_exported_program_trains() -> None:
    net = Net()
    module = _export(net).module()
    x = integers(4, 3, 6, 6)
    module(x).pow(2).sum().backward()
    net(x).pow(2).sum().backward()
    for name, parameter in net.named_parameters():
        assert_exact(module.get_parameter(name).grad, parameter.grad)
        assert parameter.grad.any()


# --- as the first thing that a process runs --------------------------------------------------------------------------

PREAMBLE = """
import torch, masked_ops
from masked_ops import _ops
from torch.nn import functional as F
torch.manual_seed(3)
x, w, b, m = torch.randn(3, 5), torch.randn(4, 5), torch.randn(4), torch.rand(4, 5) < 0.5

def check(y, x=x, w=w, b=b):
    expected = F.linear(x, w * m, b)
    torch.testing.assert_close(y, expected)
    if w.requires_grad:
        tensors = [t for t in (x, w, b) if t.requires_grad]
        torch.testing.assert_close(
            torch.autograd.grad(y.sin().sum(), tensors), torch.autograd.grad(expected.sin().sum(), tensors)
        )
"""
GRAD = "x.requires_grad_(), w.requires_grad_(), b.requires_grad_()\n"

FIRST_THINGS = {
    "an operation": GRAD + "check(torch.ops.masked_ops.linear(x, w, m, b))",
    "an operation, inference": "check(torch.ops.masked_ops.linear(x, w, m, b))",
    "an operation in inference mode": """
with torch.inference_mode():
    check(torch.ops.masked_ops.linear(x, w, m, b))
""",
    "a function": GRAD + "check(masked_ops.masked_linear(x, w, m, b))",
    "a compiled function": GRAD
    + """
check(torch.compile(masked_ops.masked_linear, fullgraph=True, backend="aot_eager")(x, w, m, b))
""",
    "a compiled function, inference": """
with torch.no_grad():
    check(torch.compile(masked_ops.masked_linear, fullgraph=True, backend="aot_eager")(x, w, m, b))
""",
    "a compiled function, dynamic": GRAD
    + """
check(torch.compile(masked_ops.masked_linear, fullgraph=True, dynamic=True, backend="aot_eager")(x, w, m, b))
""",
    "a compiled operation": GRAD
    + """
check(torch.compile(lambda *a: torch.ops.masked_ops.linear(*a), fullgraph=True, backend="aot_eager")(x, w, m, b))
""",
    "a compiled operation, inference": """
check(torch.compile(lambda *a: torch.ops.masked_ops.linear(*a), fullgraph=True, backend="aot_eager")(x, w, m, b))
""",
    "a compiled training step": """
layer = torch.nn.Linear(5, 4)
w, b = layer.weight, layer.bias
@torch.compile(fullgraph=True, backend="aot_eager")
def loss(x):
    return masked_ops.masked_linear(x, w, m, b).sin()
y = loss(x)
expected = F.linear(x, w * m, b).sin()
torch.testing.assert_close(y, expected)
torch.testing.assert_close(torch.autograd.grad(y.sum(), (w, b)), torch.autograd.grad(expected.sum(), (w, b)))
""",
    "a compiled convolution": """
x, w, m = x.view(1, 3, 5).requires_grad_(), w[:, :3].reshape(4, 3, 1).requires_grad_(), m[:, :3].reshape(4, 3, 1)
y = torch.compile(masked_ops.masked_conv1d, fullgraph=True, backend="aot_eager")(x, w, m)
expected = F.conv1d(x, w * m)
torch.testing.assert_close(y, expected)
torch.testing.assert_close(
    torch.autograd.grad(y.sin().sum(), (x, w)), torch.autograd.grad(expected.sin().sum(), (x, w))
)
""",
    "a gradient in torch.func": """
g = torch.func.grad(lambda w: masked_ops.masked_linear(x, w, m, b).sum())(w)
torch.testing.assert_close(g, x.sum(0).expand(4, 5) * m)
""",
    "a tangent of an operation": """
y, t = torch.func.jvp(lambda w: torch.ops.masked_ops.linear(x, w, m, b), (w,), (w,))
torch.testing.assert_close(t, F.linear(x, w * m))
""",
    "an operation in vmap": """
y = torch.func.vmap(lambda x: torch.ops.masked_ops.linear(x, w, m, b))(x)
torch.testing.assert_close(y, F.linear(x, w * m, b))
""",
    "an operation under autocast": """
with torch.autocast("cpu", torch.bfloat16):
    y = torch.ops.masked_ops.linear(x, w.requires_grad_(), m, b)
assert y.dtype == torch.bfloat16
y.sum().backward()
torch.testing.assert_close(w.grad, x.sum(0).expand(4, 5) * m, rtol=0.02, atol=0.02)
""",
    "a gradient operation": """
torch.testing.assert_close(torch.ops.masked_ops.linear_grad_weight(x[:, :4], x, m), (x[:, :4].t() @ x) * m)
""",
    "a meta tensor": """
assert masked_ops.masked_linear(*(t.to("meta") for t in (x, w, m, b))).shape == (3, 4)
assert torch.ops.masked_ops.linear(*(t.to("meta") for t in (x, w, m, b))).device.type == "meta"
""",
    "an export": """
class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.b = torch.nn.Parameter(w), torch.nn.Parameter(b)
        self.register_buffer("m", m)
    def forward(self, x):
        return masked_ops.masked_linear(x, self.w, self.m, self.b)
module = torch.export.export(Layer(), (x,)).module()
check(module(x), w=module.w, b=module.b)
""",
    "eight threads": GRAD
    + """
import threading
ys = [None] * 8
def work(i):
    ys[i] = masked_ops.masked_linear(x, w, m, b)
threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
[t.start() for t in threads], [t.join() for t in threads]
for y in ys:
    check(y)
""",
}


FIRST_WITHOUT_A_LIBRARY = (
    "an operation",
    "a function",
    "a compiled function",
    "a compiled operation",
    "a gradient in torch.func",
    "an operation under autocast",
    "an export",
    "eight threads",
)


@pytest.fixture(scope="module")
def first_things(request: pytest.FixtureRequest, tmp_path_factory: Any) -> dict[str, dict[str, tuple[int, str]]]:
    """What came of each, with the compiled library and without."""
    run_python = request.getfixturevalue("run_python")
    snippets = {name: PREAMBLE + code + "\nassert _ops._loaded is not False" for name, code in FIRST_THINGS.items()}
    fallback = {
        name: PREAMBLE + FIRST_THINGS[name] + "\nassert _ops._loaded is False" for name in FIRST_WITHOUT_A_LIBRARY
    }
    nothing = {"MASKED_OPS_NO_BUILD": 1, "MASKED_OPS_REQUIRE_BUILD": None}
    folder = tmp_path_factory.mktemp("first")
    return {
        "library": run_each_in_a_process(snippets, run_python, folder, compiling=True),
        "fallback": run_each_in_a_process(
            fallback, run_python, folder, compiling=True, MASKED_OPS_CACHE_DIR=folder / "c", **nothing
        ),
    }


@compiled_only
@pytest.mark.parametrize("first", FIRST_THINGS)
def test_first_thing_in_a_process(first: str, first_things: dict) -> None:
    status, output = first_things["library"][first]
    assert status == 0, output


@pytest.mark.parametrize("first", FIRST_WITHOUT_A_LIBRARY)
def test_first_thing_in_a_process_without_a_library(first: str, first_things: dict) -> None:
    status, output = first_things["fallback"][first]
    assert status == 0, output
    assert output.count("runs on plain torch") == 1


LOAD = """
import sys, torch, masked_ops
program = torch.export.load(sys.argv[1])
inputs = torch.load(sys.argv[2])
assert masked_ops._ops._loaded is None
module = program.module()
if "train" in sys.argv:
    y = module(inputs["x"])
    y.pow(2).sum().backward()
    for name, grad in inputs["grads"].items():
        assert torch.equal(module.get_parameter(name).grad, grad), name
    torch.optim.SGD(module.parameters(), lr=1).step()
    assert not torch.equal(module(inputs["x"]), y)
else:
    with torch.inference_mode():
        y = module(inputs["x"])
assert torch.equal(y.detach(), inputs["y"])
assert masked_ops._ops._loaded is True
"""


@compiled_only
@pytest.mark.parametrize("use", ["train", "infer"])
def test_exported_program_in_a_fresh_process(use: str, run_python: Any, tmp_path: Any) -> None:
    net = Net()
    program = _export(net)
    torch.export.save(program, tmp_path / "net.pt2")
    x = integers(3, 3, 6, 6)
    y = net(x)
    y.pow(2).sum().backward()
    grads = {name: parameter.grad for name, parameter in net.named_parameters()}
    torch.save({"x": x, "y": y.detach(), "grads": grads}, tmp_path / "inputs.pt")
    done = run_python(LOAD, tmp_path / "net.pt2", tmp_path / "inputs.pt", use, OMP_NUM_THREADS=1)
    assert done.returncode == 0, done.stderr


# --- autocast --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("soft", [1, 2])
def test_autocast(dtype: torch.dtype, soft: int) -> None:
    """As torch's linear and convolution: computed in the lower precision, gradients in the parameter's."""
    kernel = mask_of("half", 6, 4, 3, 3, dtype=torch.float32) * soft
    matrix = mask_of("half", 5, 6, dtype=torch.float32) * soft
    results = []
    for convolve, linear in (
        (
            lambda x, w: masked_ops.masked_conv2d(x, w, kernel),
            lambda x, w, b: masked_ops.masked_linear(x, w, matrix, b),
        ),
        (lambda x, w: F.conv2d(x, w * kernel), lambda x, w, b: F.linear(x, w * matrix, b)),
    ):
        torch.manual_seed(5)
        x, k, w, b = (integers(*s).requires_grad_() for s in ((2, 4, 5, 5), (6, 4, 3, 3), (5, 6), (5,)))
        with torch.autocast("cpu", dtype):
            hidden = convolve(x, k)
            y = linear(hidden.mean((2, 3)), w, b)
        assert hidden.dtype == y.dtype == dtype
        y.float().pow(2).sum().backward()
        results.append((hidden, y, x.grad, k.grad, w.grad, b.grad))
        assert all(leaf.grad.dtype == torch.float32 for leaf in (x, k, w, b))
    eps = torch.finfo(dtype).eps  # sums in the lower precision, which torch rounds in another order
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=4 * eps, atol=4 * eps * expected.abs().max().item())


def test_autocast_casts_weights_once_and_masks_never() -> None:
    """The cast of a leaf is cached for the region, a mask's is not: pruning inside the region counts at once."""
    w, mask, x = integers(4, 5).requires_grad_(), torch.ones(4, 5), integers(3, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert_exact(masked_ops.masked_linear(x, w, mask), F.linear(x, w))
        mask[0] = 0
        mask[1] = 3
        assert_exact(masked_ops.masked_linear(x, w, mask), F.linear(x, w * mask))
        with torch.autocast("cpu", enabled=False):
            assert masked_ops.masked_linear(x, w, mask).dtype == torch.float32
        # apply_mask stands for weight * mask, which autocast leaves alone.
        assert masked_ops.apply_mask(w, mask).dtype == torch.float32


@pytest.mark.skipif("fused" not in _ops.paths(), reason="nothing was compiled")
@pytest.mark.parametrize("path", ["fused", "sparse"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_takes_the_kernels(path: str, dtype: torch.dtype) -> None:
    """Forward and backward, on a path that refuses what it has no kernels for."""
    w, mask, x = integers(40, 50).requires_grad_(), mask_of("half", 40, 50), integers(30, 50).requires_grad_()
    with masked_ops.use_path(path):
        with torch.autocast("cpu", dtype):
            y = masked_ops.masked_linear(x, w, mask)
        assert y.dtype == dtype
        y.sum().backward()
    assert_exact(y, F.linear(x, w * mask))
    assert_exact(x.grad, (w * mask).sum(0).expand(30, 50))
    assert_exact(w.grad, mask * x.sum(0))


def test_autocast_accepts_what_it_makes_equal() -> None:
    """Inputs of other dtypes than the weight's are fine under autocast, as in torch."""
    w, mask = integers(4, 5), mask_of("half", 4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        y = masked_ops.masked_linear(integers(3, 5, dtype=torch.bfloat16), w, mask, integers(4))
    assert y.dtype == torch.bfloat16


def test_autocast_inside_compile() -> None:
    x, w, mask = integers(3, 5), integers(4, 5), mask_of("half", 4, 5)

    def f(x: Tensor, w: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return masked_ops.masked_linear(x, w, mask)

    y = torch.compile(f, fullgraph=True, backend="aot_eager")(x, w.requires_grad_())
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert_exact(w.grad, x.sum(0).expand(4, 5) * mask)


# --- inference mode --------------------------------------------------------------------------------------------------


@every_float
def test_inference_mode(dtype: torch.dtype) -> None:
    mask, w = mask_of("half", 4, 5), integers(4, 5, dtype=dtype)
    x = integers(3, 5, dtype=dtype)
    expected = F.linear(x, masked(w, mask))
    with torch.inference_mode():
        y = masked_ops.masked_linear(x, w, mask)
        assert y.is_inference()
        assert_exact(y, expected)
        x, w, mask = x.clone(), w.clone(), mask.clone()
        assert mask.is_inference()
        for _ in range(2):
            assert_exact(masked_ops.masked_linear(x, w, mask), expected)
            assert_exact(masked_ops.apply_mask(w, mask), w * mask)
            assert_exact(masked_ops.masked_conv1d(x[..., None], w[..., None], mask[..., None])[..., 0], expected)
    assert_exact(masked_ops.masked_linear(x, w, mask), expected)


def test_inference_tensors_cannot_be_saved_for_backward() -> None:
    with torch.inference_mode():
        mask = torch.ones(4, 5)
    w = torch.ones(4, 5, requires_grad=True)
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        masked_ops.masked_linear(torch.ones(3, 5), w, mask)
    with torch.no_grad():
        masked_ops.masked_linear(torch.ones(3, 5), w, mask)
