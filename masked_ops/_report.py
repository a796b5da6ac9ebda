"""What pruning did to a model, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor
from torch.nn import Linear, Module
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from . import _ops, nn
from ._masked_class import count_nonzero, is_sharded
from ._masking import require_module
from ._packed_class import is_packed, sparsity_of
from ._pruning_methods import pruned_names


@dataclass(frozen=True)
class LayerReport:
    """One parameter of a model: a weight, or whatever is pruned."""

    name: str
    """As in ``named_parameters()`` before pruning: ``"conv1.weight"``."""
    kind: str
    """The class of its module before pruning: ``"Conv2d"``."""
    shape: tuple[int, ...]
    nnz: int
    """Weights that the mask keeps; without a mask, values that are not zero."""
    sparsity: float
    """``1 - nnz / numel``."""
    parameter_bytes: int
    """Of the Parameter, of which a packed layer holds ``nnz`` values; 0 for one that an earlier layer holds too."""
    mask_bytes: int
    """Of the mask, or of a packed layer's bits."""
    path: str
    """What a call runs on: ``"dense"``, a path of the kernels, ``"live"`` or ``"hook"``."""
    reason: str
    dense_flops: int | None
    """Floating-point operations of the dense layer in one call of the model; None if not known."""
    remaining_flops: float | None
    """The share of ``dense_flops`` that the weights left need; None where nothing is known to be multiplied."""


class Report(Sequence[LayerReport]):
    """The layers of a model, as a sequence of :class:`LayerReport`; ``str()`` gives a table."""

    def __init__(self, layers: Sequence[LayerReport]) -> None:
        self._layers = tuple(layers)

    @overload
    def __getitem__(self, index: int) -> LayerReport: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[LayerReport, ...]: ...
    def __getitem__(self, index: int | slice) -> LayerReport | tuple[LayerReport, ...]:
        return self._layers[index]

    def __len__(self) -> int:
        return len(self._layers)

    def __iter__(self) -> Iterator[LayerReport]:
        return iter(self._layers)

    @property
    def nnz(self) -> int:
        return sum(layer.nnz for layer in self)

    @property
    def sparsity(self) -> float:
        entries = sum(math.prod(layer.shape) for layer in self)
        return 1 - self.nnz / entries if entries else 0.0

    @property
    def parameter_bytes(self) -> int:
        return sum(layer.parameter_bytes for layer in self)

    @property
    def mask_bytes(self) -> int:
        return sum(layer.mask_bytes for layer in self)

    @property
    def remaining_flops(self) -> float | None:
        """The share of the dense operations that remain, over the linear layers and convolutions; None if not known."""
        layers = [layer for layer in self if layer.remaining_flops is not None]
        if any(layer.dense_flops is None for layer in layers):
            return None
        dense = sum(layer.dense_flops or 0 for layer in layers)
        return (
            sum((layer.dense_flops or 0) * (layer.remaining_flops or 0) for layer in layers) / dense if dense else None
        )

    def __str__(self) -> str:
        reasons = list(dict.fromkeys(layer.reason for layer in self))
        header = ("layer", "kind", "shape", "sparsity", "nnz", "weight", "mask", "FLOPs left", "path")
        rows = [
            (
                layer.name,
                layer.kind,
                "x".join(map(str, layer.shape)) or "scalar",
                f"{layer.sparsity:.1%}",
                f"{layer.nnz:,}",
                _bytes(layer.parameter_bytes),
                _bytes(layer.mask_bytes),
                _share(layer.remaining_flops),
                f"{layer.path} [{reasons.index(layer.reason) + 1}]",
            )
            for layer in self
        ]
        totals = (
            "total",
            "",
            "",
            f"{self.sparsity:.1%}",
            f"{self.nnz:,}",
            _bytes(self.parameter_bytes),
            _bytes(self.mask_bytes),
            _share(self.remaining_flops),
            "",
        )
        widths = [max(map(len, column)) for column in zip(header, *rows, totals, strict=True)]

        def line(cells: Sequence[str]) -> str:
            # Words to the left, numbers to the right.
            aligned = (
                cell.rjust(width) if 3 <= index <= 7 else cell.ljust(width)
                for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
            )
            return "  ".join(aligned).rstrip()

        rule = "-" * len(line(["-" * width for width in widths]))
        notes = [f"[{number}] {reason}" for number, reason in enumerate(reasons, 1)]
        if self.remaining_flops is None and any(layer.remaining_flops is not None for layer in self):
            notes.append("The total of FLOPs depends on the sizes within the model: give an example input as batch.")
        return "\n".join([line(header), rule, *map(line, rows), rule, line(totals), *notes])

    __repr__ = __str__


def report(model: Module, batch: int | Tensor | tuple[Any, ...] | Mapping[str, Any] = 1) -> Report:
    """What pruning did to each layer of a model, and how its kernels will run.

    Listed are all pruned parameters, and of the others those with two dimensions or more.

    Args:
        model: any module, pruned or not.
        batch: the rows of input of each linear layer and the samples of each convolution, for which the path is
            chosen. Or an example input (a tensor, a tuple of the arguments of ``model``, or a dict of arguments by
            name): the model is run on it once, without gradients and in evaluation mode, to learn the sizes within.

    Returns:
        A sequence of frozen dataclasses :class:`LayerReport`, which prints as a table.

    Raises:
        TypeError: if ``model`` is not a module, or ``batch`` neither a number nor an example.
        ValueError: if ``batch`` is below 1, or a mask has no values (meta device).

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> model[0] = prune.l1_unstructured(model[0], "weight", amount=0.75)
        >>> table = masked_ops.report(model, batch=32)
        >>> [(layer.name, layer.nnz, layer.remaining_flops) for layer in table]
        [('0.weight', 8, 0.25), ('2.weight', 8, 1.0)]
        >>> table.remaining_flops
        0.4
    """
    require_module(model)
    if isinstance(batch, Mapping):
        calls = _measure(model, (), batch)
    elif isinstance(batch, (Tensor, tuple)):
        calls = _measure(model, batch if isinstance(batch, tuple) else (batch,), {})
    elif isinstance(batch, bool) or not isinstance(batch, int):
        raise TypeError(f"batch must be an integer or an example input, got {type(batch).__name__}")
    elif batch < 1:
        raise ValueError(f"batch must be 1 or more, got {batch}")
    else:
        # The positions of a convolution depend on the size of its input.
        calls = {m: _Call(batch, batch if _is_linear(m) else None) for m in model.modules()}

    layers = []
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        pruned = pruned_names(module)
        label = f"{prefix}." if prefix else ""
        if is_packed(module):
            layers.append(_describe_packed(f"{label}weight", module, calls.get(module), seen))
        parameters = dict(module._parameters.items())  # a ScriptModule's are no dict
        names = [name.removesuffix("_orig") if name.removesuffix("_orig") in pruned else name for name in parameters]
        for name in names:
            parameter = parameters.get(f"{name}_orig" if name in pruned else name)
            if parameter is not None and (name in pruned or parameter.dim() >= 2):
                layers.append(_describe(f"{label}{name}", module, name, parameter, calls.get(module), seen))
                seen.add(id(parameter))
    return Report(layers)


class _Call(NamedTuple):
    """How a layer is called."""

    batch: int
    positions: int | None  # at which its weight is applied, over all calls
    input_size: tuple[int, ...] | None = None  # of a convolution, as far as it is known
    channels_last: bool = False


# Of an image, where the path of a convolution is asked for without one: the third of ResNet's four stages.
_USUAL_SIZE = 14


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _describe(
    label: str,
    module: Module,
    name: str,
    parameter: Tensor,
    call: _Call | None,
    seen: set[int],
) -> LayerReport:
    mask = getattr(module, f"{name}_mask") if name in pruned_names(module) else None
    values = parameter if mask is None else mask
    if values.is_meta:
        raise ValueError(f"{label} is on the meta device: it has no values to report")
    nnz = count_nonzero(values)
    entries = parameter.numel()
    density = nnz / entries if entries else 1.0
    positions = call.positions if call else None
    path, reason = _path(module, name, parameter, mask, call)
    multiplies = name == "weight" and _multiplies(module)
    return LayerReport(
        name=label,
        kind=_kind(module),
        shape=tuple(parameter.shape),
        nnz=nnz,
        sparsity=1 - density,
        parameter_bytes=0 if id(parameter) in seen else entries * parameter.element_size(),
        mask_bytes=0 if mask is None else mask.numel() * mask.element_size(),
        path=path,
        reason=reason,
        dense_flops=2 * entries * positions if multiplies and positions is not None else None,
        remaining_flops=None if not multiplies or call is None else 1.0 if mask is None else density,
    )


def _is_linear(module: Module) -> bool:
    return isinstance(module, Linear) or nn.is_matmul(module)


def _multiplies(module: Module) -> bool:
    return _is_linear(module) or isinstance(module, _ConvNd)


def _kind(module: Module) -> str:
    cls: type[Module] = getattr(type(module), "_masked_dense", type(module))
    return getattr(cls, "_packed_dense", cls).__name__


def _describe_packed(label: str, module: Any, call: _Call | None, seen: set[int]) -> LayerReport:
    values, bits, shape = module.weight_values, module.weight_bits, module._packed_shape()
    if values.is_meta:
        raise ValueError(f"{label} is on the meta device: it has no values to report")
    entries = math.prod(shape)
    positions = call.positions if call else None
    path, reason = "packed", "not called by the example input"
    if is_sharded(values):
        reason = "sharded: chosen within forward, where the values are whole"
    elif call is not None and _is_linear(module):
        path, reason = _ops.explain_packed_linear(values, bits, shape[1], call.batch, nn.is_matmul(module))
    elif call is not None:
        path, reason = _explain_convolution(_ops.explain_packed_convolution, module, (values, bits, shape), call)
    report = LayerReport(
        name=label,
        kind=_kind(module),
        shape=shape,
        nnz=values.numel(),
        sparsity=sparsity_of(values.numel(), shape),
        parameter_bytes=0 if id(values) in seen else values.numel() * values.element_size(),
        mask_bytes=bits.numel(),
        path=path,
        reason=reason,
        dense_flops=None if positions is None else 2 * entries * positions,
        remaining_flops=None if call is None else values.numel() / entries if entries else 1.0,
    )
    seen.add(id(values))
    return report


def _path(module: Module, name: str, parameter: Tensor, mask: Tensor | None, call: _Call | None) -> tuple[str, str]:
    if mask is None:
        return "dense", "not pruned"
    if name not in nn.masked_names(module):
        return "hook", "pruned by torch.nn.utils.prune: pruning it again with masked_ops takes it over"
    path = nn.path_of(module, name)
    if path == "fused":
        if is_sharded(parameter):
            return path, "sharded: chosen within forward, where the weight is whole"
        if call is None:
            return path, "not called by the example input"
        if isinstance(module, _ConvNd):
            return _explain_convolution(_ops.explain_convolution, module, (parameter, mask), call)
        return _ops.explain_linear(parameter, mask, call.batch, nn.is_matmul(module))
    if path == "hook":
        return path, "the class cannot be swapped: masked in Python before each forward"
    if name == "weight" and _multiplies(module):
        return path, "the module has its own forward: masked in one pass when the weight is read"
    return path, "no fused kernel for this parameter: masked in one pass when it is read"


def _explain_convolution(
    explain: Callable[..., tuple[str, str]], module: _ConvNd, weight: tuple[Any, ...], call: _Call
) -> tuple[str, str]:
    extents = [d * (k - 1) + 1 for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    size = call.input_size or (call.batch, module.in_channels, *(max(_USUAL_SIZE, extent) for extent in extents))
    # The halves of padding='same' differ by one at most, which says nothing about the path.
    padding = [(e - 1) // 2 for e in extents] if module.padding == "same" else module.padding
    path, reason = explain(
        *weight,
        size,
        call.channels_last,
        module.stride,
        [0] * len(extents) if padding == "valid" else padding,
        module.dilation,
        module.transposed,
        module.output_padding,
        module.groups,
    )
    if call.input_size is None and path not in ("copy", "reference"):
        reason += f"; for inputs of {' x '.join(map(str, size[2:]))}: give report() an example of yours"
    return path, reason


def _measure(model: Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[Module, _Call]:
    """What the linear layers and convolutions that are called have to do."""
    measured: dict[Module, _Call] = {}

    def hook(module: Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        input = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if input is None or not isinstance(output, Tensor):
            return  # a forward of the user's own
        size, channels_last = None, False
        if _is_linear(module):
            batch = positions = math.prod(input.shape[:-1])
        else:
            spatial = len(module.kernel_size)  # type: ignore[arg-type]
            batch = math.prod(input.shape[: -spatial - 1])
            sizes = input if isinstance(module, _ConvTransposeNd) else output
            positions = batch * math.prod(sizes.shape[-spatial:])
            size = (batch, *input.shape[-spatial - 1 :])
            channels_last = not input.is_contiguous() and input.movedim(-spatial - 1, -1).is_contiguous()
        before = measured[module].positions or 0 if module in measured else 0
        measured[module] = _Call(batch, before + positions, size, channels_last)

    modes = [(module, module.training) for module in model.modules()]
    layers = [module for module, _ in modes if _multiplies(module)]
    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in layers]
    try:
        model.eval()
        with torch.no_grad():
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    return measured
