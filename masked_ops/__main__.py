"""``python -m masked_ops``: what was built, for which capability, and whether it works."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

import masked_ops
from masked_ops import _build, _cuda, _ops, _recipe, functional
from masked_ops._packed_class import bits_of


def main() -> int:
    """Print the facts and run the self-test; 0 if the operations work, with or without their kernels."""
    parser = argparse.ArgumentParser(
        prog="python -m masked_ops",
        description="Shows what was built and whether it works; builds the kernels if that was not done yet.",
    )
    parser.parse_args()
    print(f"masked_ops {masked_ops.__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # the fallback's reason is printed
            available = masked_ops.is_available()
    except _build.BuildError as error:
        show("kernels", f"none, and MASKED_OPS_REQUIRE_BUILD is set: {error}")
        return 1
    for label, value in facts(available):
        show(label, value)
    return 0 if self_test() else 1


def show(label: str, value: str) -> None:
    print(f"  {label:<14}{value}")


def facts(available: bool) -> Iterator[tuple[str, str]]:
    """What serves, and from where."""
    if available:
        module = _ops._module
        assert module is not None and module.__file__ is not None
        library = Path(module.__file__)
        record = _build.read_record(library.parent) or {}
        yield "kernels", f"compiled; {module.capability()} in use, built in: {', '.join(module.capabilities())}"
        yield "library", f"{library} ({library.stat().st_size / 1e6:.1f} MB)"
        yield "compiler", f"{record.get('compiler', 'unknown')} ({record.get('seconds', 0):.0f} s)"
        rates = ("converted", "dot products", "matrix units")
        yield "torch's GEMM", ", ".join(f"{name}: {rates[module.torch_rate(name)]}" for name in ("bfloat16", "float16"))
        yield from _cuda.facts(module)
    else:
        yield "kernels", "none; plain torch serves: right, but without their speed"
        yield "because", str(_ops.fallback_reason())
        yield "library", "none" if sys.platform != "linux" else f"would be in {_build.cache_root()}"
    limit = os.environ.get("MASKED_OPS_CAPABILITY")
    yield "capability", _build.capability() + (f" (MASKED_OPS_CAPABILITY is {limit})" if limit else "")
    runtime = _recipe.openmp_runtime()
    yield "threads", f"{torch.get_num_threads()}" + (f" ({runtime.name})" if runtime else "")


# --- self-test -------------------------------------------------------------------------------------------------------


def self_test() -> bool:
    """Every operation, forward and backward, against plain torch on whole numbers, where both must be exact."""
    started = time.perf_counter()
    failed = []
    count = 0
    with masked_ops.use_path(None):
        for name, check in checks():
            count += 1
            try:
                if not check():
                    failed.append(f"{name}: wrong result")
            except Exception as error:
                failed.append(f"{name}: {type(error).__name__}: {error}")
    seconds = time.perf_counter() - started
    if failed:
        show("self-test", f"{len(failed)} of {count} checks FAILED in {seconds:.1f} s")
        for line in failed:
            show("", line)
    else:
        show("self-test", f"{count} checks passed in {seconds:.1f} s")
    return not failed


Shapes = tuple[tuple[int, ...], ...]


def checks() -> Iterator[tuple[str, Callable[[], bool]]]:
    devices = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    for device in ("cpu", *devices):
        for name, check in checks_on(device):
            yield (name if device == "cpu" else f"{name}, {device}"), check


def checks_on(device: str) -> Iterator[tuple[str, Callable[[], bool]]]:
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        for kind in ("binary", "soft"):
            for batch in (1, 19):
                matrices: Shapes = ((batch, 37), (21, 37), (21,))
                check = partial(agree, functional.masked_linear, F.linear, matrices, dtype, kind, device)
                yield f"linear, {name}, {kind} mask, {batch} rows", check
        yield (
            f"packed_linear, {name}",
            partial(agree, packed_linear, F.linear, ((19, 37), (21, 37), (21,)), dtype, "binary", device),
        )
    for dimensions in (1, 2, 3):
        images: Shapes = ((2, 4, *[6] * dimensions), (4, 4, *[3] * dimensions), (4,))
        for operation in (f"conv{dimensions}d", f"conv_transpose{dimensions}d"):
            ours, theirs = getattr(functional, f"masked_{operation}"), getattr(F, operation)
            yield operation, partial(agree, ours, theirs, images, torch.float32, "binary", device)


def packed_linear(input: Tensor, weight: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
    """masked_linear by way of the packed weight."""
    values = weight[mask != 0]
    return functional.packed_linear(input, values, bits_of(mask), mask.shape[1], bias)


def agree(
    ours: Callable[..., Tensor],
    theirs: Callable[..., Tensor],
    shapes: Shapes,
    dtype: torch.dtype,
    kind: str,
    device: str,
) -> bool:
    """Whether results and gradients are the same to the bit.

    On a CUDA device to the nearest whole number, since cuDNN may transform what it multiplies, and rounds then.
    """
    generator = torch.Generator().manual_seed(0)

    def whole(low: int, high: int, shape: tuple[int, ...]) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=generator).to(device, dtype)

    # Small enough for each sum to be a whole number that bfloat16 has.
    leaves = [whole(-1, 1, shape).requires_grad_() for shape in shapes]
    input, weight, bias = leaves
    mask = whole(0, 1 if kind == "binary" else 2, shapes[1])
    ours(input, weight, mask, bias)  # the first use of a mask: the second one may take another path
    mine = ours(input, weight, mask, bias)
    plain = theirs(input, weight * mask, bias)
    gradient = whole(-1, 1, tuple(plain.shape))
    pairs = zip(torch.autograd.grad(mine, leaves, gradient), torch.autograd.grad(plain, leaves, gradient), strict=True)
    if device == "cpu":
        return all(torch.equal(a, b) for a, b in ((mine, plain), *pairs))
    return all(torch.equal(a.round(), b.round()) for a, b in ((mine, plain), *pairs))


if __name__ == "__main__":
    sys.exit(main())
