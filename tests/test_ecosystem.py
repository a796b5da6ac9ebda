"""Masked modules inside the rest of torch: a masked model runs beside a dense one that holds the same values."""

from __future__ import annotations

import copy
import io
import multiprocessing
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from masked_modules import random_mask
from ranks import Check, assert_passed, name_of, run_in_two_processes, share
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import masked_ops
from masked_ops.nn import attach, detach, masked_names, path_of, set_mask


def masked(module: nn.Module, *names: str) -> Any:
    for name in names:
        attach(module, name, random_mask(getattr(module, name)))
    return module


def dense_copy(model: nn.Module) -> Any:
    """A dense model whose parameters hold the masked values."""
    model = copy.deepcopy(model)
    for module in model.modules():
        for name in masked_names(module):
            detach(module, name)
    return model


class OwnForward(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + input @ self.weight.T


class Encoder(nn.Module):
    """Fused, live and recurrent parameters in one model."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding="same")
        self.rnn = nn.GRU(8, 8, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        x = self.rnn(x)[0]
        return self.head(self.norm(x))


def masked_encoder() -> Any:
    model = Encoder()
    masked(model.embed, "weight")
    masked(model.conv, "weight")
    masked(model.rnn, "weight_hh_l0", "bias_ih_l0")
    masked(model.norm, "weight")
    masked(model.head, "weight", "bias")
    return model


MODULES = [
    pytest.param(lambda: masked_ops.MaskedLinear(6, 5), (3, 6), id="linear"),
    pytest.param(lambda: masked(nn.Linear(6, 5), "weight", "bias"), (3, 6), id="linear-bias"),
    pytest.param(lambda: masked_ops.MaskedConv1d(4, 5, 3, padding="same"), (3, 4, 8), id="conv1d-same"),
    pytest.param(
        lambda: masked_ops.MaskedConv2d(4, 6, 3, padding=1, padding_mode="circular", groups=2),
        (3, 4, 6, 6),
        id="conv2d",
    ),
    pytest.param(lambda: masked_ops.MaskedConvTranspose2d(4, 5, 3, stride=2), (3, 4, 5, 5), id="conv_transpose2d"),
    pytest.param(lambda: masked(nn.LayerNorm(6), "weight"), (3, 6), id="layernorm"),
    pytest.param(lambda: masked(OwnForward(6, 5), "weight"), (3, 6), id="own-forward"),
]
modules = pytest.mark.parametrize(("factory", "shape"), MODULES)


def with_random_masks(module: Any) -> Any:
    for name in masked_names(module):
        set_mask(module, name, random_mask(getattr(module, name)))
    return module


def same_gradients(module: nn.Module, reference: nn.Module) -> None:
    """The gradients of a masked model are those of the dense one, masked."""
    expected = dict(reference.named_parameters())
    buffers = dict(module.named_buffers())
    for name, param in module.named_parameters():
        dense = name.removesuffix("_orig")
        mask = buffers.get(f"{dense}_mask")
        grad = expected[dense].grad
        assert param.grad is not None and grad is not None, name
        torch.testing.assert_close(param.grad, grad if mask is None else grad * mask, msg=lambda m, n=name: f"{n}: {m}")


# --- compilation -----------------------------------------------------------------------------------------------------


@modules
def test_compile_without_breaks_or_recompiles(factory: Any, shape: Any) -> None:
    torch._dynamo.reset()
    module = with_random_masks(factory())
    frames = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=frames, fullgraph=True)
    name = masked_names(module)[0]
    buffer = f"{name}_mask"

    def check() -> None:
        x = torch.randn(shape)
        reference = dense_copy(module)
        module.zero_grad(), reference.zero_grad()
        out, expected = compiled(x), reference(x)
        torch.testing.assert_close(out, expected)
        grad = torch.randn_like(out)
        out.backward(grad)
        expected.backward(grad)
        same_gradients(module, reference)

    check()
    with torch.no_grad():
        getattr(module, buffer).view(-1)[::2] = 0  # written in place
    check()
    set_mask(module, name, random_mask(getattr(module, name)))
    check()
    setattr(module, buffer, random_mask(getattr(module, name)))  # another tensor
    check()
    assert frames.frame_count == 1


def test_compile_with_dynamic_shapes() -> None:
    torch._dynamo.reset()
    frames = CompileCounterWithBackend("aot_eager")
    model = nn.Sequential(masked_ops.MaskedConv2d(3, 4, 3), nn.Flatten(2), masked_ops.MaskedLinear(16, 5))
    compiled = torch.compile(model, backend=frames, fullgraph=True, dynamic=True)
    for batch in (2, 3, 7):
        x = torch.randn(batch, 3, 6, 6)
        torch.testing.assert_close(compiled(x), model(x))
    assert frames.frame_count == 1


def test_compile_sees_masks_come_and_go() -> None:
    torch._dynamo.reset()
    frames = CompileCounterWithBackend("aot_eager")
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU())
    compiled = torch.compile(model, backend=frames, fullgraph=True)
    x, counts = torch.randn(2, 6), []
    for step in ("", "attach", "detach", "attach", "detach"):
        if step == "attach":
            masked(model[0], "weight")
        elif step == "detach":
            detach(model[0], "weight")
        torch.testing.assert_close(compiled(x), model(x))
        counts.append(frames.frame_count)
    assert counts == [1, 2, 2, 2, 2]


@pytest.mark.parametrize("strict", [True, False])
@modules
def test_export(factory: Any, shape: Any, strict: bool) -> None:
    module = with_random_masks(factory())
    x = torch.randn(shape)
    batch = {0: torch.export.Dim("batch", min=2, max=64)}
    program = torch.export.export(module, (x,), dynamic_shapes=(batch,), strict=strict)
    name = masked_names(module)[0]
    assert f"{name}_orig" in program.graph_signature.inputs_to_parameters.values()
    assert f"{name}_mask" in program.graph_signature.inputs_to_buffers.values()
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for inputs in (x, torch.randn(5, *shape[1:])):
        torch.testing.assert_close(loaded(inputs), module(inputs))


def test_export_of_recurrent_and_attention_modules() -> None:
    rnn = masked(nn.LSTM(4, 3), "weight_ih_l0")
    attention = masked(nn.MultiheadAttention(4, 2), "in_proj_weight")
    masked(attention.out_proj, "weight")
    x = torch.randn(5, 2, 4)
    for module, inputs in ((rnn, (x,)), (attention, (x, x, x))):
        program = torch.export.export(module, inputs)
        torch.testing.assert_close(program.module()(*inputs)[0], module(*inputs)[0])
        assert any(name.endswith("_orig") for name in program.graph_signature.inputs_to_parameters.values())


# Not for a forward of its own: torch.fx bakes in what that computes from parameters alone, of a dense module as well.
@pytest.mark.parametrize(("factory", "shape"), MODULES[:-1])
def test_fx_symbolic_trace(factory: Any, shape: Any) -> None:
    module = with_random_masks(factory())
    model = nn.Sequential(module, nn.ReLU())
    traced = torch.fx.symbolic_trace(model)
    set_mask(module, "weight", random_mask(module.weight))
    x = torch.randn(shape)
    torch.testing.assert_close(traced(x), model(x))


def test_jit_trace() -> None:
    model = nn.Sequential(
        with_random_masks(masked_ops.MaskedConv2d(3, 4, 3)), masked(nn.BatchNorm2d(4), "weight")
    ).eval()
    x = torch.randn(2, 3, 5, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, x)
    torch.testing.assert_close(traced(x), model(x))


FUNCTIONS = ("linear", "packed_linear", "convolution", "packed_convolution")


def function_calls() -> dict[str, Callable[[Tensor], Tensor]]:
    """Calls of one input whose operations Python does not reach by way of torch.ops."""
    mask = random_mask(torch.empty(4, 9))
    packed = masked_ops.pack(with_random_masks(masked_ops.MaskedLinear(9, 4)))
    values = packed.weight_values.detach()  # torch.jit.trace takes no constants that require a gradient
    return {
        "linear": lambda x: masked_ops.masked_linear(x, x[:4] + 0.0, mask),
        "packed_linear": lambda x: masked_ops.packed_linear(x, values, packed.weight_bits, 9),
        "convolution": lambda x: masked_ops.masked_conv1d(
            x[None], (x[:4] + 0.0).view(4, 3, 3), mask.view(4, 3, 3), padding=1, groups=2
        ),
        "packed_convolution": lambda x: masked_ops.packed_conv1d(
            x[None], values, packed.weight_bits, (4, 3, 3), padding=1, groups=2
        ),
    }


@pytest.mark.parametrize("name", FUNCTIONS)
def test_jit_trace_of_functions(name: str) -> None:
    call = function_calls()[name]
    x, other = torch.randn(6, 9), torch.randn(6, 9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(call, x)
    assert f"masked_ops::{name}" in str(traced.graph)
    torch.testing.assert_close(traced(other), call(other))


class Named(Tensor):
    """A subclass that notes the operations which it takes part in."""

    seen: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(str(func))
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("name", FUNCTIONS)
def test_torch_functions_see_the_operations(name: str) -> None:
    call, x = function_calls()[name], torch.randn(6, 9)
    expected = call(x)
    Named.seen.clear()
    result = call(x.as_subclass(Named))
    assert type(result) is Named
    assert f"masked_ops.{name}.default" in Named.seen
    torch.testing.assert_close(result.as_subclass(Tensor), expected)

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    seen: list[str] = []
    with Mode():
        torch.testing.assert_close(call(x), expected)
    assert f"masked_ops.{name}.default" in seen


@pytest.mark.parametrize("bad", [None, 3, "x", [1.0]], ids=repr)
def test_arguments_of_a_wrong_type_are_refused_by_torch(bad: Any) -> None:
    ones = torch.ones(2, 2)
    for at in range(4):
        arguments = [ones, ones, ones, torch.ones(2)]
        arguments[at] = bad
        if at == 3 and bad is None:
            continue
        with pytest.raises((RuntimeError, TypeError)) as direct:
            masked_ops.masked_linear(*arguments)
        with pytest.raises((RuntimeError, TypeError)) as boxed:
            torch.ops.masked_ops.linear(*arguments)
        assert str(direct.value).partition("\n")[0] == str(boxed.value).partition("\n")[0]


# --- modes -----------------------------------------------------------------------------------------------------------


def test_autocast() -> None:
    model = masked_encoder()
    reference = dense_copy(model)
    tokens = torch.randint(0, 11, (2, 5))
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = model(tokens), reference(tokens)
    assert out.dtype is expected.dtype is torch.bfloat16
    torch.testing.assert_close(out, expected, rtol=0.02, atol=0.02)
    out.float().sum().backward()
    assert all(param.grad is not None and param.grad.dtype is torch.float32 for param in model.parameters())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference(mode: Any) -> None:
    model = masked_encoder().eval()
    reference = dense_copy(model)
    tokens = torch.randint(0, 11, (2, 5))
    with mode():
        torch.testing.assert_close(model(tokens), reference(tokens))
        assert not model.head.weight.requires_grad
    model(tokens).sum().backward()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(use_reentrant: bool) -> None:
    model = masked_encoder()
    reference = dense_copy(model)
    tokens = torch.randint(0, 11, (2, 5))
    for m in (model, reference):
        x = m.embed(tokens)
        x = checkpoint(m.conv, x.transpose(1, 2), use_reentrant=use_reentrant).transpose(1, 2)
        x = checkpoint(m.rnn, x, use_reentrant=use_reentrant)[0]
        checkpoint(m.head, m.norm(x), use_reentrant=use_reentrant).square().sum().backward()
    same_gradients(model, reference)


def test_eight_threads_infer_while_one_trains() -> None:
    """torch's pruning shares module.weight between threads and loses gradients without an error."""
    torch.set_num_threads(1)
    model = masked_encoder()
    tokens = torch.randint(0, 11, (1, 2))
    expected = model(tokens).detach()
    stop = threading.Event()
    wrong: list[str] = []

    def infer() -> None:
        while not stop.is_set():
            with torch.no_grad():
                if not torch.allclose(model(tokens), expected, atol=1e-5):
                    wrong.append("output")

    threads = [threading.Thread(target=infer) for _ in range(8)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(150):
            model.zero_grad()
            model(tokens).square().sum().backward()
            wrong += [name for name, param in model.named_parameters() if param.grad is None]
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not wrong


def _in_child(model: nn.Module, tokens: Tensor, expected: Tensor) -> None:
    torch.set_num_threads(1)  # as the workers of a DataLoader do
    torch.testing.assert_close(model(tokens), expected)
    if not torch.backends.cuda.is_built():  # a torch for CUDA may refuse to go backward in a child, whatever the layers
        model(tokens).sum().backward()
    model.head.set_mask(torch.zeros(3, 8))  # type: ignore[union-attr, operator]
    assert not model.head.weight.any()  # type: ignore[union-attr, operator]


def test_fork_after_use() -> None:
    torch.set_num_threads(1)
    model = masked_encoder()
    tokens = torch.randint(0, 11, (2, 5))
    model(tokens).sum().backward()
    child = multiprocessing.get_context("fork").Process(target=_in_child, args=(model, tokens, model(tokens).detach()))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert model.head.weight.any()


@pytest.mark.parametrize("cls", [nn.Embedding, nn.EmbeddingBag])
def test_sparse_gradients(cls: Any) -> None:
    module = masked(cls(7, 4, sparse=True), "weight")
    reference = dense_copy(module)
    tokens = torch.tensor([[1, 2, 1]])
    for m in (module, reference):
        m(tokens).square().sum().backward()
    grad = module.weight_orig.grad
    assert grad.is_sparse
    torch.testing.assert_close(grad.to_dense(), reference.weight.grad.to_dense() * module.weight_mask)
    torch.optim.SparseAdam(module.parameters()).step()


# --- functional ------------------------------------------------------------------------------------------------------


@modules
def test_functional_call(factory: Any, shape: Any) -> None:
    module, other = with_random_masks(factory()), with_random_masks(factory())
    x = torch.randn(shape)
    state = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    torch.testing.assert_close(torch.func.functional_call(module, state, (x,)), other(x))
    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in before.items())


@modules
def test_func_transforms(factory: Any, shape: Any) -> None:
    module = with_random_masks(factory()).double()
    reference = dense_copy(module)
    x = torch.randn(shape, dtype=torch.float64)
    parameters, buffers = dict(module.named_parameters()), dict(module.named_buffers())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(module, (parameters, buffers), (x.unsqueeze(0),)).square().sum()

    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    reference(x).square().sum().backward()
    for param in module.parameters():
        param.grad = None
    for name, param in module.named_parameters():
        param.grad = grads[name].sum(0)
    same_gradients(module, reference)

    tangents = {name: torch.randn_like(param) for name, param in parameters.items()}
    _, derivative = torch.func.jvp(lambda p: loss(p, x[0]), (parameters,), (tangents,))
    grads = torch.func.grad(loss)(parameters, x[0])
    expected = torch.stack([(grads[name] * tangents[name]).sum() for name in grads]).sum()
    torch.testing.assert_close(derivative, expected)


def test_an_ensemble_under_vmap() -> None:
    models = [
        nn.Sequential(with_random_masks(masked_ops.MaskedLinear(6, 5)), masked(nn.LayerNorm(5), "weight"))
        for _ in range(3)
    ]
    parameters, buffers = torch.func.stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")
    x = torch.randn(2, 6)
    out = torch.func.vmap(lambda p, b: torch.func.functional_call(base, (p, b), (x,)))(parameters, buffers)
    torch.testing.assert_close(out, torch.stack([model(x) for model in models]))


# --- what copies and rewrites models ---------------------------------------------------------------------------------


def test_averaged_models() -> None:
    model = masked_encoder()
    tokens = torch.randint(0, 11, (2, 5))
    model(tokens).sum().backward()
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5), use_buffers=False
    )
    first = model.head.weight_orig.detach().clone()
    average.update_parameters(model)
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    average.update_parameters(model)
    mean = (first + model.head.weight_orig) / 2
    torch.testing.assert_close(average.module.head.weight_orig, mean)
    torch.testing.assert_close(average.module.head.weight, mean * model.head.weight_mask)
    assert type(average.module.rnn) is type(model.rnn)
    average(tokens)


def test_fusing_batchnorm() -> None:
    conv, norm = masked(nn.Conv2d(3, 4, 3, bias=False), "weight"), nn.BatchNorm2d(4)
    norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    model = nn.Sequential(conv, norm).eval()
    fused = nn.utils.fuse_conv_bn_eval(conv, norm)
    x = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(fused(x), model(x))
    assert type(fused) is masked_ops.MaskedConv2d and torch.equal(fused.weight == 0, conv.weight == 0)
    linear, norm1d = masked(nn.Linear(4, 3), "weight").eval(), nn.BatchNorm1d(3).eval()
    norm1d.running_mean.normal_()  # type: ignore[union-attr]
    y = torch.randn(2, 4)
    torch.testing.assert_close(nn.utils.fuse_linear_bn_eval(linear, norm1d)(y), norm1d(linear(y)))


def test_replicas_of_data_parallel() -> None:
    """What torch.nn.parallel.replicate does to a module, without the devices."""
    tokens = torch.randint(0, 11, (2, 5))
    model = masked_encoder()
    replica: Any = model._replicate_for_data_parallel()
    for key, child in model.named_children():
        twin = child._replicate_for_data_parallel()
        for name, param in child._parameters.items():
            setattr(twin, name, param.clone())
        for name, buffer in child._buffers.items():
            setattr(twin, name, buffer.clone())
        setattr(replica, key, twin)
    out = replica(tokens)
    torch.testing.assert_close(out, model(tokens))
    out.sum().backward()
    assert all(param.grad is not None for param in model.parameters())
    assert path_of(replica.head, "weight") == "fused" and not list(replica.parameters())


@pytest.mark.parametrize("swap", [True, False])
def test_conversions_of_whole_models(swap: bool) -> None:
    model = masked_encoder()
    tokens = torch.randint(0, 11, (2, 5))
    expected = model(tokens).detach()
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        model.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    torch.testing.assert_close(model(tokens), expected.double())
    model.float().share_memory()
    torch.testing.assert_close(model(tokens), expected)


def test_safetensors(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model, other = masked_encoder(), masked_encoder()
    safetensors.save_model(model, tmp_path / "model.safetensors")
    missing, unexpected = safetensors.load_model(other, tmp_path / "model.safetensors")
    assert not missing and not unexpected
    tokens = torch.randint(0, 11, (2, 5))
    torch.testing.assert_close(other(tokens), model(tokens))


# --- two processes ---------------------------------------------------------------------------------------------------


def _steps(model: nn.Module, tokens: Tensor, steps: int = 3) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(tokens).square().mean().backward()
        optimizer.step()


def _tokens() -> Tensor:
    return torch.randint(0, 11, (4, 5), generator=torch.Generator().manual_seed(3))


def _full_state(model: nn.Module) -> dict[str, Tensor]:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=False))


def _assert_same_state(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(state) == list(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(state[name], tensor, msg=lambda m, n=name: f"{n}: {m}")


def check_ddp_trains_as_one_process(model: nn.Module) -> None:
    reference = copy.deepcopy(model)
    _steps(DistributedDataParallel(model), share(_tokens()))
    _steps(reference, _tokens())
    _assert_same_state(model.state_dict(), reference.state_dict())


def check_ddp_broadcasts_masks(model: nn.Module) -> None:
    head: Any = model.head
    expected = head.weight_mask.clone()
    if dist.get_rank() == 1:
        head.set_mask(torch.zeros(3, 8))
    wrapped = DistributedDataParallel(model)
    assert torch.equal(head.weight_mask, expected), "at construction"
    if dist.get_rank() == 0:
        head.set_mask(1 - expected)
    wrapped(_tokens())
    assert torch.equal(head.weight_mask, 1 - expected), "at each forward"
    assert torch.equal(head.weight, head.weight_orig * head.weight_mask)


def check_ddp_masks_come_and_go(model: nn.Module) -> None:
    reference = copy.deepcopy(model)
    wrapped = DistributedDataParallel(model)
    for replica, forward, tokens in ((model, wrapped, share(_tokens())), (reference, reference, _tokens())):
        head: Any = replica.head
        _steps(forward, tokens)
        detach(head, "weight")
        detach(replica.embed, "weight")  # type: ignore[arg-type]
        _steps(forward, tokens)
        attach(head, "weight", torch.eye(3, 8))
        _steps(forward, tokens)
    _assert_same_state(model.state_dict(), reference.state_dict())


def _fully_shard(model: Encoder, **kwargs: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for module in (model.conv, model.rnn, model.head):  # embed and norm fall to the root
        fully_shard(module, mesh=mesh, **kwargs)
    fully_shard(model, mesh=mesh, **kwargs)


def check_fsdp_trains_as_one_process(model: Any) -> None:
    reference = copy.deepcopy(model)
    _fully_shard(model)
    _steps(model, share(_tokens()))
    _steps(reference, _tokens())
    _assert_same_state(_full_state(model), reference.state_dict())


def check_fsdp_weight_is_right_outside_forward(model: Any) -> None:
    reference = copy.deepcopy(model)
    _fully_shard(model)
    for after in (False, True):
        for path, name in (("head", "weight"), ("head", "bias"), ("embed", "weight"), ("rnn", "weight_hh_l0")):
            weight = getattr(model.get_submodule(path), name)
            if not (after and path == "embed"):  # the root's parameters stay whole after forward
                assert weight.placements == (dist.tensor.Shard(0),)
                weight = weight.full_tensor()
            torch.testing.assert_close(weight, getattr(reference.get_submodule(path), name))
        model(share(_tokens()))
    weight = model.head.weight
    weight.square().sum().backward()
    torch.testing.assert_close(model.head.weight_orig.grad.full_tensor(), 2 * reference.head.weight.detach())
    if dist.get_rank() == 0:
        assert model.head.weight.to_local().shape == (2, 8), "one rank alone may read it"
    assert "sparsity" in repr(model) and model.head.sparsity == reference.head.sparsity


def check_fsdp_refuses_what_it_cannot_do(model: Any) -> None:
    _fully_shard(model)
    state = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    model(_tokens())  # the root's parameters (embed, norm) are plain tensors now, and yet not to be touched
    for module, call in (
        (model.head, lambda: detach(model.head, "weight")),
        (model.embed, lambda: detach(model.embed, "weight")),
        (model.conv, lambda: attach(model.conv, "bias", torch.ones(8))),
        (model.norm, lambda: attach(model.norm, "bias", torch.ones(8))),
    ):
        cls = type(module)
        with pytest.raises(ValueError, match="is sharded"):
            call()
        assert type(module) is cls
    assert {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()} == state


def check_fsdp_takes_new_masks(model: Any) -> None:
    _fully_shard(model)
    model(_tokens())
    new = torch.eye(3, 8)
    model.head.set_mask(new)
    torch.testing.assert_close(model.head.weight.full_tensor(), model.head.weight_orig.full_tensor() * new)
    model.head.set_mask(torch.zeros(3, 8, dtype=torch.bool))
    out = model(_tokens())
    torch.testing.assert_close(out, out[:1, :1].expand_as(out), msg="only the bias is left")


def check_fsdp_mixed_precision(model: Any) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    reference = copy.deepcopy(model)
    _fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    out = model(_tokens())
    assert out.dtype is torch.bfloat16 and model.head.weight_mask.dtype is torch.float32
    torch.testing.assert_close(out.float(), reference(_tokens()), rtol=0.05, atol=0.05)
    out.float().square().mean().backward()
    assert all(param.grad is not None and param.grad.dtype is torch.float32 for param in model.parameters())
    assert model.head.weight.dtype is torch.float32


def check_fsdp_from_meta(model: Any) -> None:
    source = copy.deepcopy(model)
    model.to("meta")
    _fully_shard(model)
    model.to_empty(device="cpu")
    assert model.head.weight_mask.all(), "a mask without values starts as ones"
    model.head.reset_parameters()
    assert model.head.weight_orig.full_tensor().abs().max() <= 8**-0.5
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    set_model_state_dict(model, source.state_dict(), options=StateDictOptions(full_state_dict=True))
    torch.testing.assert_close(model(_tokens()), source(_tokens()))


def check_tensor_parallel(model: Any) -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    torch.manual_seed(0)
    layer, x = masked(nn.Linear(6, 8), "weight"), torch.randn(3, 6)
    reference = copy.deepcopy(layer)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    parallelize_module(layer, mesh, ColwiseParallel(use_local_output=False))
    assert layer.weight_orig.to_local().shape == (4, 6)
    out: Any = layer(x)
    torch.testing.assert_close(out.full_tensor(), reference(x))
    out.square().sum().backward()
    reference(x).square().sum().backward()
    torch.testing.assert_close(layer.weight_orig.grad.full_tensor(), reference.weight_orig.grad)


CHECKS: list[Check] = [
    check_ddp_trains_as_one_process,
    check_ddp_broadcasts_masks,
    check_ddp_masks_come_and_go,
    check_fsdp_trains_as_one_process,
    check_fsdp_weight_is_right_outside_forward,
    check_fsdp_refuses_what_it_cannot_do,
    check_fsdp_takes_new_masks,
    check_fsdp_mixed_precision,
    check_fsdp_from_meta,
    check_tensor_parallel,
]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    torch.manual_seed(0)
    run_in_two_processes(CHECKS, folder, (masked_encoder(),))
    return folder


@pytest.mark.parametrize("check", CHECKS, ids=name_of)
def test_two_processes(check: Check, two_processes: Path) -> None:
    assert_passed(check, two_processes)
