"""The operations as torch sees them: schemas, fakes, the plain-torch fallback, and the loader of the compiled library.

Schemas and fakes exist from ``import masked_ops`` on. The compiled kernels arrive with the first real use: ``load()``
builds them if need be. Until then, and where nothing can be compiled, the Python kernels registered here serve: under
the alias keys ``Autograd`` and ``CompositeExplicitAutograd``, which the library's own registrations (under
``CPU``, ``AutogradCPU`` and so on) outrank without replacing them, so that no call ever meets a gap.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from . import _build, _cuda, _inductor, reference

_GEOMETRY = (
    "SymInt[] stride, SymInt[] padding, SymInt[] dilation, bool transposed, SymInt[] output_padding, SymInt groups"
)
_MASKED = "Tensor weight, Tensor mask"
_PACKED = "Tensor weight_values, Tensor weight_bits, SymInt in_features"
_PACKED_CONV = "Tensor weight_values, Tensor weight_bits, SymInt[] weight_size"
_SCHEMAS = (
    f"apply_mask({_MASKED}, *, ScalarType? dtype=None) -> Tensor",
    f"linear(Tensor input, {_MASKED}, Tensor? bias=None) -> Tensor",
    f"linear_grad_input(Tensor grad_output, {_MASKED}) -> Tensor",
    "linear_grad_weight(Tensor grad_output, Tensor input, Tensor mask) -> Tensor",
    f"explain_linear({_MASKED}, int batch, bool by_input=False) -> (str, str)",
    f"convolution(Tensor input, {_MASKED}, Tensor? bias, {_GEOMETRY}) -> Tensor",
    f"convolution_grad_input(Tensor grad_output, {_MASKED}, SymInt[] input_size, {_GEOMETRY}) -> Tensor",
    f"convolution_grad_weight(Tensor grad_output, Tensor input, Tensor mask, {_GEOMETRY}) -> Tensor",
    f"explain_convolution({_MASKED}, SymInt[] input_size, bool channels_last, {_GEOMETRY}) -> (str, str)",
    f"packed_linear(Tensor input, {_PACKED}, Tensor? bias=None) -> Tensor",
    f"packed_linear_grad_input(Tensor grad_output, {_PACKED}) -> Tensor",
    "packed_linear_grad_values(Tensor grad_output, Tensor input, Tensor weight_bits, SymInt nnz) -> Tensor",
    f"packed_convolution(Tensor input, {_PACKED_CONV}, Tensor? bias, {_GEOMETRY}) -> Tensor",
    f"packed_convolution_grad_input(Tensor grad_output, {_PACKED_CONV}, SymInt[] input_size, {_GEOMETRY}) -> Tensor",
    "packed_convolution_grad_values"
    f"(Tensor grad_output, Tensor input, Tensor weight_bits, SymInt[] weight_size, SymInt nnz, {_GEOMETRY}) -> Tensor",
    f"unpack_values({_PACKED}) -> Tensor",
    "pack_values(Tensor weight, Tensor weight_bits, SymInt nnz) -> Tensor",
    "explain_packed_linear(Tensor weight_values, Tensor weight_bits, int in_features, int batch, bool by_input=False)"
    " -> (str, str)",
    f"explain_packed_convolution({_PACKED_CONV}, SymInt[] input_size, bool channels_last, {_GEOMETRY}) -> (str, str)",
)

_library = torch.library.Library("masked_ops", "DEF")
for _schema in _SCHEMAS:
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))

linear = torch.ops.masked_ops.linear.default
linear_grad_input = torch.ops.masked_ops.linear_grad_input.default
linear_grad_weight = torch.ops.masked_ops.linear_grad_weight.default
convolution = torch.ops.masked_ops.convolution.default
convolution_grad_input = torch.ops.masked_ops.convolution_grad_input.default
convolution_grad_weight = torch.ops.masked_ops.convolution_grad_weight.default
apply_mask = torch.ops.masked_ops.apply_mask.default
packed_linear = torch.ops.masked_ops.packed_linear.default
packed_linear_grad_input = torch.ops.masked_ops.packed_linear_grad_input.default
packed_linear_grad_values = torch.ops.masked_ops.packed_linear_grad_values.default
packed_convolution = torch.ops.masked_ops.packed_convolution.default
packed_convolution_grad_input = torch.ops.masked_ops.packed_convolution_grad_input.default
packed_convolution_grad_values = torch.ops.masked_ops.packed_convolution_grad_values.default
unpack_values = torch.ops.masked_ops.unpack_values.default
pack_values = torch.ops.masked_ops.pack_values.default


class _Direct(NamedTuple):
    """How Python's functions call the operations: by torch.ops, or past it where the compiled kernels serve.

    All arguments are positional. Dynamo, which knows no functions of libraries, is to be shown the operations. The
    convolutions take the numbers as their callers gave them; they and the products by input return None for what they
    leave to torch.ops.
    """

    linear: Callable[..., Tensor] = linear
    packed_linear: Callable[..., Tensor] = packed_linear
    convolution: Callable[..., Tensor | None] = lambda *_: None
    packed_convolution: Callable[..., Tensor | None] = lambda *_: None
    matmul: Callable[..., Tensor | None] = lambda *_: None
    packed_matmul: Callable[..., Tensor | None] = lambda *_: None


direct = _Direct()

# Every operation that computes, in the order of the schemas.
OPERATIONS = (
    linear,
    linear_grad_input,
    linear_grad_weight,
    convolution,
    convolution_grad_input,
    convolution_grad_weight,
    apply_mask,
    packed_linear,
    packed_linear_grad_input,
    packed_linear_grad_values,
    packed_convolution,
    packed_convolution_grad_input,
    packed_convolution_grad_values,
    unpack_values,
    pack_values,
)


# --- the compiled library --------------------------------------------------------------------------------------------

_lock = threading.RLock()
_loaded: bool | None = None  # None until the first load(); then whether the compiled kernels serve
_module: ModuleType | None = None
_fallback_reason: str | None = None


def _reset_lock() -> None:
    """A child forked while another thread was loading must not wait for that thread for ever."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_lock)


def load() -> bool:
    """Load the compiled kernels, building them at the first use; True if they serve, False on the fallback."""
    return _load() if _loaded is None else _loaded


# What torch.compiler.assume_constant_result sets, without its import of all of Dynamo: load() runs while Dynamo traces.
load._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _load() -> bool:
    global _loaded, _module, _fallback_reason, direct
    with _lock:
        if _loaded is None:
            try:
                library = _build.build()
                module, capability = _build.load_library(library), _build.capability_of(library)
            except _build.BuildError as error:
                if os.environ.get("MASKED_OPS_REQUIRE_BUILD", "0") not in ("", "0"):
                    raise
                _fallback_reason = str(error)
                _loaded = False
                warnings.warn(
                    f"masked_ops runs on plain torch, right but without its kernels' speed: {error}",
                    RuntimeWarning,
                    stacklevel=3,
                )
            else:
                # A library of several capabilities starts with the best that the CPU has by name.
                module.set_capability(capability.upper())
                path = os.environ.get("MASKED_OPS_PATH")
                if path:
                    module.set_path(path)
                for name in ("MASKED_OPS_CACHE_BYTES", "MASKED_OPS_RESULT_BYTES"):
                    limit = os.environ.get(name)
                    if limit and not re.fullmatch("-?[0-9]+", limit):
                        raise ValueError(f"{name} takes a number of bytes, got {limit!r}")
                module.set_cuda_loader(_cuda.load, _cuda.warn)
                module.set_boxed(linear, packed_linear)
                direct = _Direct(**{name: getattr(module, name) for name in _Direct._fields})
                _module, _loaded = module, True
                for op in OPERATIONS:  # the Python dispatcher, which is on while torch traces, remembers kernels
                    op._dispatch_cache.clear()
        return _loaded


def is_available() -> bool:
    """Whether the compiled kernels serve; builds and loads them if that was not tried yet.

    Example:
        >>> isinstance(masked_ops.is_available(), bool)
        True
    """
    return load()


def fallback_reason() -> str | None:
    """Why plain torch serves in place of the compiled kernels; None if it does not, or nothing was loaded yet."""
    return _fallback_reason


def _compiled() -> ModuleType | None:
    return _module if load() else None


# --- paths and cache -------------------------------------------------------------------------------------------------


def paths() -> tuple[str, ...]:
    """The names that :func:`use_path` takes."""
    module = _compiled()
    return tuple(module.paths()) if module else ("reference",)


@contextlib.contextmanager
def use_path(name: str | None) -> Iterator[None]:
    """Force every masked operation onto one path, by its name in ``report()``; None lets the cost model choose.

    A call that the path cannot serve raises ``RuntimeError``. The setting is the process's, not the thread's; the
    environment variable ``MASKED_OPS_PATH`` sets it from the start.

    Raises:
        ValueError: if there is no path of that name.

    Example:
        >>> with masked_ops.use_path("copy"):
        ...     y = masked_ops.masked_linear(torch.ones(1, 2), torch.ones(3, 2), torch.ones(3, 2))
    """
    module = _compiled()
    if name is not None and name not in paths():
        raise ValueError(f"path must be one of {', '.join(paths())}, got {name!r}")
    if module is None:
        yield
        return
    before = module.set_path(name)
    try:
        yield
    finally:
        module.set_path(before)


def cache_info() -> dict[str, int]:
    """What is cached of the masks seen: ``entries``, ``bytes``, ``limit_bytes``, ``hits``, ``misses``, ``repacks``.

    And ``kept_result_bytes``: the memory of results of 8 MB and more that are no more, kept for the next ones of their
    sizes on the CPU. At most 256 MiB, or the environment's MASKED_OPS_RESULT_BYTES.

    Example:
        >>> masked_ops.clear_cache()
        >>> masked_ops.cache_info()["entries"]
        0
    """
    module = _compiled()
    if module is None:
        return dict.fromkeys(("entries", "bytes", "limit_bytes", "hits", "misses", "repacks", "kept_result_bytes"), 0)
    return dict(module.cache_info())


def clear_cache() -> None:
    """Forget everything derived from masks; needed only after a write that torch cannot see (``mask.data``, numpy).

    Frees what is kept for results as well.

    Example:
        >>> mask = torch.ones(1, 2)
        >>> masked_ops.masked_linear(torch.ones(1, 2), torch.ones(1, 2), mask)
        tensor([[2.]])
        >>> mask.data[0, 0] = 0
        >>> masked_ops.clear_cache()
        >>> masked_ops.masked_linear(torch.ones(1, 2), torch.ones(1, 2), mask)
        tensor([[1.]])
    """
    module = _compiled()
    if module is not None:
        module.clear_cache()


def explain_linear(weight: Tensor, mask: Tensor, batch: int, by_input: bool = False) -> tuple[str, str]:
    """The path that ``linear`` takes for ``batch`` rows of input, and why; or, of a weight ``[K, N]`` that is stored by
    its inputs, the one that ``masked_matmul`` takes."""
    module = _compiled()
    if module is None:
        return "reference", _fallback_reason or "no compiled kernels"
    path, reason = torch.ops.masked_ops.explain_linear(weight.detach(), mask, batch, by_input)
    return path, reason


def explain_packed_linear(
    weight_values: Tensor, weight_bits: Tensor, in_features: int, batch: int, by_input: bool = False
) -> tuple[str, str]:
    """As ``explain_linear``, for ``packed_linear`` and ``packed_matmul``."""
    return _explain_packed("linear", weight_values, weight_bits, in_features, batch, by_input)


def explain_packed_convolution(
    weight_values: Tensor,
    weight_bits: Tensor,
    weight_size: Sequence[int],
    input_size: Sequence[int],
    channels_last: bool,
    *geometry: Any,
) -> tuple[str, str]:
    """The path that ``packed_convolution`` takes for an input of this size and layout, and why."""
    return _explain_packed("convolution", weight_values, weight_bits, weight_size, input_size, channels_last, *geometry)


def _explain_packed(family: str, weight_values: Tensor, *arguments: Any) -> tuple[str, str]:
    module = _compiled()
    if module is None or not (weight_values.is_cpu or weight_values.is_cuda):
        return "reference", _fallback_reason or "no compiled kernels for this device"
    path, reason = getattr(torch.ops.masked_ops, f"explain_packed_{family}")(weight_values.detach(), *arguments)
    return path, reason


def explain_convolution(
    weight: Tensor, mask: Tensor, input_size: Sequence[int], channels_last: bool, *geometry: Any
) -> tuple[str, str]:
    """The path that ``convolution`` takes for an input of this size and layout, and why."""
    module = _compiled()
    if module is None:
        return "reference", _fallback_reason or "no compiled kernels"
    path, reason = torch.ops.masked_ops.explain_convolution(weight.detach(), mask, input_size, channels_last, *geometry)
    return path, reason


# --- kernels in Python -----------------------------------------------------------------------------------------------


def _until_loaded(op: Any, plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The kernel behind the alias keys: loads the library and calls again, or computes in plain torch."""

    def kernel(*args: Any, **kwargs: Any) -> Tensor:
        # Once it is loaded, the library outranks this function: what still arrives (other devices, sparse or quantized
        # tensors) is not for the library, and would come back here for ever.
        if _loaded is None and load():
            return op(*args, **kwargs)
        return plain(*args, **kwargs)

    return kernel


for _op in OPERATIONS:
    _name = _op._opname
    _plain = getattr(reference, _name)
    for _key in ("Autograd", "CompositeExplicitAutograd"):
        _library.impl(_name, _until_loaded(_op, _plain), _key)
    for _key in ("FuncTorchBatched", "Batched"):
        _library.impl(_name, _plain, _key)


# --- fake kernels ----------------------------------------------------------------------------------------------------


def _fake(name: str) -> Callable[[Callable[..., Tensor]], None]:
    """Registers the fake of an operation."""

    def register(function: Callable[..., Tensor]) -> None:
        @functools.wraps(function)
        def fake(*args: Any, **kwargs: Any) -> Tensor:
            _inductor.tell(OPERATIONS)
            return function(*args, **kwargs)

        torch.library.register_fake(f"masked_ops::{name}", fake, lib=_library)

    return register


@_fake("linear")
def _(input: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None = None) -> Tensor:
    reference.check_linear(input, weight, mask, bias)
    return input.new_empty(input.shape[:-1] + weight.shape[:-1])


@_fake("linear_grad_input")
def _(grad_output: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    reference.check_linear_grad_input(grad_output, weight, mask)
    return grad_output.new_empty(grad_output.shape[:-1] + weight.shape[1:])


@_fake("linear_grad_weight")
def _(grad_output: Tensor, input: Tensor, mask: Tensor) -> Tensor:
    reference.check_linear_grad_weight(grad_output, input, mask)
    return grad_output.new_empty(mask.shape)


def _in_format(weight: Tensor) -> Tensor:
    """As Geometry::in_format: of one dimension, results are contiguous, however the weight lies."""
    return weight.contiguous() if weight.dim() == 3 else weight


def _empty(like: Tensor, size: Sequence[int], layout_of: Tensor) -> Tensor:
    """A tensor that convolutions are to see in the memory format of another."""
    format = suggest_memory_format(layout_of) if len(size) == layout_of.dim() else torch.contiguous_format
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=format)


@_fake("convolution")
def _(input: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
    reference.check_convolution(input, weight, mask, bias, *geometry)
    return torch.ops.aten.convolution(input, _in_format(weight), bias, *geometry)


@_fake("convolution_grad_input")
def _(grad_output: Tensor, weight: Tensor, mask: Tensor, input_size: list[int], *geometry: Any) -> Tensor:
    reference.check_mask(weight, mask)
    reference.check_same_kind("grad_output", grad_output, "weight", weight)
    input, weight = _empty(grad_output, input_size, grad_output), _in_format(weight)
    return torch.ops.aten.convolution_backward(grad_output, input, weight, None, *geometry, [True, False, False])[0]


@_fake("convolution_grad_weight")
def _(grad_output: Tensor, input: Tensor, mask: Tensor, *geometry: Any) -> Tensor:
    reference.check_same_kind("input", input, "grad_output", grad_output)
    weight = _empty(grad_output, mask.shape, mask)
    reference.check_mask(weight, mask)
    return torch.ops.aten.convolution_backward(grad_output, input, weight, None, *geometry, [False, True, False])[1]


@_fake("apply_mask")
def _(weight: Tensor, mask: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    reference.check_mask(weight, mask)
    reference.check_cast(weight, dtype)
    return torch.empty_like(weight, dtype=dtype)


@_fake("packed_linear")
def _(
    input: Tensor, weight_values: Tensor, weight_bits: Tensor, in_features: int, bias: Tensor | None = None
) -> Tensor:
    return input.new_empty(input.shape[:-1] + weight_bits.shape[:1])


@_fake("packed_linear_grad_input")
def _(grad_output: Tensor, weight_values: Tensor, weight_bits: Tensor, in_features: int) -> Tensor:
    return grad_output.new_empty((*grad_output.shape[:-1], in_features))


@_fake("packed_linear_grad_values")
def _(grad_output: Tensor, input: Tensor, weight_bits: Tensor, nnz: int) -> Tensor:
    return grad_output.new_empty((nnz,))


@_fake("packed_convolution")
def _(
    input: Tensor,
    weight_values: Tensor,
    weight_bits: Tensor,
    weight_size: list[int],
    bias: Tensor | None,
    *geometry: Any,
) -> Tensor:
    reference.check_packed_convolution(weight_values, weight_bits, weight_size, *geometry)
    return torch.ops.aten.convolution(input, weight_values.new_empty(weight_size), bias, *geometry)


@_fake("packed_convolution_grad_input")
def _(
    grad_output: Tensor,
    weight_values: Tensor,
    weight_bits: Tensor,
    weight_size: list[int],
    input_size: list[int],
    *geometry: Any,
) -> Tensor:
    reference.check_packed_convolution(weight_values, weight_bits, weight_size, *geometry)
    weight, input = weight_values.new_empty(weight_size), _empty(grad_output, input_size, grad_output)
    return torch.ops.aten.convolution_backward(grad_output, input, weight, None, *geometry, [True, False, False])[0]


@_fake("packed_convolution_grad_values")
def _(
    grad_output: Tensor, input: Tensor, weight_bits: Tensor, weight_size: list[int], nnz: int, *geometry: Any
) -> Tensor:
    return grad_output.new_empty((nnz,))


@_fake("unpack_values")
def _(weight_values: Tensor, weight_bits: Tensor, in_features: int) -> Tensor:
    return weight_values.new_empty((weight_bits.shape[0], in_features))


@_fake("pack_values")
def _(weight: Tensor, weight_bits: Tensor, nnz: int) -> Tensor:
    return weight.new_empty((nnz,))
