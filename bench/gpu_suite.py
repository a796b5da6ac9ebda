"""Everything that is to be known of the CUDA kernels on a GPU, in phases that each fit a few minutes.

    python bench/gpu_suite.py --phase correctness --budget-s 420 --json bench/results/gpu-correctness.json
    python bench/gpu_suite.py --phase timing      --budget-s 540 --json bench/results/gpu-timing.json
    python bench/gpu_suite.py --phase profile     --budget-s 360 --json bench/results/gpu-profile.json
    python bench/gpu_suite.py --phase decide      --budget-s 420 --json bench/results/gpu-decide.json
    python bench/gpu_suite.py --phase timing --dry      # every case at a tiny size on the CPU

The kernels are built first. Then each case runs in a process of its own with a time limit (those of the correctness
phase --jobs at a time); what it found is in the JSON file at once, and a short table comes last. MASKED_OPS_CUDA=1 is
set: kernels that no GPU has confirmed are used. What is expected stands in bench/results/gpu-predictions.md, written
before the first run.

The phase decide is for what no GPU has decided yet: whether decode_sliced and decode_gathered are right and how fast,
which plan of gemm_sm90 is best for few rows, what a masked copy of a small weight costs, and where it pays to leave
out what is pruned whole. Its table says what was asked and what a model expects.

Contenders of the timings: hook (multiply by the mask, then dense: torch.nn.utils.prune), dense, copy (torch's own
operations mask), mask_copy, gemm_sm90 and gemm_sm80 where they serve, and packed (decode, or unpack and multiply).
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from _harness import (
    device_ceilings,
    device_facts,
    interleaved_on_device,
    machine,
    replayed_on_device,
    sets_beyond_l2,
    table,
    write_json,
)
from torch import Tensor, nn
from torch.nn import functional as F

import masked_ops
from masked_ops import _ops, prune

HERE = Path(__file__).resolve().parent
Row = dict[str, Any]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PATHS = ("mask_copy", "gemm_sm90", "gemm_sm80")
DRY_SECONDS, SECONDS = 0.02, 0.3  # of a comparison
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


@dataclass(frozen=True)
class Case:
    name: str
    phase: str
    seconds: float  # the limit
    run: Callable[[bool], Iterator[Row]]  # of whether it is a dry run


# --- what cases share ------------------------------------------------------------------------------------------------


def uniform_mask(shape: Sequence[int], density: float, dtype: torch.dtype) -> Tensor:
    return (torch.rand(*shape, device=DEVICE) < density).to(dtype)


def packed(weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    flags = F.pad(mask.to(torch.uint8), (0, -mask.shape[1] % 8)).view(mask.shape[0], -1, 8)
    bits = (flags << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(2, dtype=torch.uint8)
    return weight[mask != 0], bits


def serves(path: str, weight: Tensor, mask: Tensor, rows: int) -> str | None:
    """Why a path cannot serve here; None if it does."""
    try:
        with masked_ops.use_path(path), torch.no_grad():
            masked_ops.masked_linear(weight.new_zeros(rows, weight.shape[1]), weight, mask)
    except RuntimeError as error:
        if "cannot serve" not in str(error):
            raise
        return str(error).partition("cannot serve")[2].partition("\n")[0]
    return None


def timed(calls: dict[str, list[Callable[[], object]]], dry: bool, seconds: float = SECONDS) -> dict[str, Any]:
    return interleaved_on_device(calls, DRY_SECONDS if dry else seconds)


class poisoned:  # noqa: N801 (reads as a statement)
    """All memory that torch hands out holds NaN."""

    def __enter__(self) -> None:
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True

    def __exit__(self, *_: object) -> None:
        torch.use_deterministic_algorithms(False)


# --- correctness -----------------------------------------------------------------------------------------------------


def facts(dry: bool) -> Iterator[Row]:
    """What the device is, and what each kernel's own check says."""
    known = device_facts()
    for name, (confirmed, state) in known.get("kernels", {}).items():
        expected = state == "ok" or "needs compute capability" in state
        yield {"check": f"own check of {name}", "ok": expected, "detail": state, "confirmed": confirmed}
    from masked_ops import __main__ as main

    yield {"check": "python -m masked_ops", "ok": main.self_test(), "detail": "", **known}


SIZES = ((1, 1, 1), (3, 7, 9), (64, 64, 64), (65, 127, 129), (17, 200, 136), (130, 257, 264), (300, 1024, 520))
LARGE_SIZES = (
    (2048, 4096, 4096),
    (4096, 1024, 3072),
    (1, 8192, 8192),
    (511, 4104, 1032),
    (64, 4096, 4096),
    (512, 4096, 4096),
)


def linear_is_right(path: str, dtype: torch.dtype) -> Callable[[bool], Iterator[Row]]:
    """Forward and both gradients against float64, over sizes and masks, with poisoned outputs."""

    def run(dry: bool) -> Iterator[Row]:
        worst, cases, refused = 0.0, 0, set()
        for M, N, K in SIZES[:5] if dry else (*SIZES, *LARGE_SIZES):
            for density in (0.0, 0.1, 0.5, 1.0):
                x, weight = (torch.randn(*shape, device=DEVICE, dtype=dtype) for shape in ((M, K), (N, K)))
                bias, dy = (torch.randn(*shape, device=DEVICE, dtype=dtype) for shape in ((N,), (M, N)))
                mask = uniform_mask((N, K), density, dtype)
                name = "copy" if dry else path
                if why := serves(name, weight, mask, M):
                    refused.add(why)
                    continue
                leaves = [t.requires_grad_() for t in (x, weight, bias)]
                exact = [t.detach().double().requires_grad_() for t in leaves]
                wanted = F.linear(exact[0], exact[1] * mask.double(), exact[2])
                wanted_grads = torch.autograd.grad(wanted, exact, dy.double())
                plain = F.linear(leaves[0], leaves[1] * mask, leaves[2])
                plain_grads = torch.autograd.grad(plain, leaves, dy)
                try:
                    with masked_ops.use_path(name), poisoned():
                        y = masked_ops.masked_linear(leaves[0], leaves[1], mask, leaves[2])
                        grads = torch.autograd.grad(y, leaves, dy)
                except RuntimeError as error:
                    if "cannot serve" not in str(error):
                        raise
                    refused.add("in backward")
                    continue
                triples = zip((y, *grads), (plain, *plain_grads), (wanted, *wanted_grads), strict=True)
                for ours, torchs, right in (tuple(t.detach() for t in triple) for triple in triples):
                    scale = right.abs().max().clamp(min=1e-30)
                    rounding = torch.finfo(dtype).eps * scale
                    error = (ours.double() - right).abs().max()
                    allowed = torch.maximum((torchs.double() - right).abs().max(), rounding)
                    worst = max(worst, float("inf") if not bool(error.isfinite()) else float(error / allowed))
                if bool((grads[1][mask == 0] != 0).any()):
                    worst = float("inf")
                cases += 1
        yield {
            "check": f"linear, {path}",
            "ok": worst < 8 and (cases > 0 or bool(refused)),
            "detail": f"{cases} cases, error {worst:.2f} of torch's; refused: {'; '.join(sorted(refused)) or 'none'}",
        }

    return run


def packed_is_right(dtype: torch.dtype) -> Callable[[bool], Iterator[Row]]:
    def run(dry: bool) -> Iterator[Row]:
        worst = 0.0
        for N, K in ((1, 1), (65, 129), (257, 264)) if dry else ((1, 1), (65, 129), (257, 264), (4096, 4096)):
            for density in (0.0, 0.1, 0.5, 1.0):
                for M in (1, 2, 5, 16, 33, 64, 65):
                    x, weight = (torch.randn(*shape, device=DEVICE, dtype=dtype) for shape in ((M, K), (N, K)))
                    mask = uniform_mask((N, K), density, dtype)
                    values, bits = packed(weight, mask)
                    with poisoned():
                        y = masked_ops.packed_linear(x, values, bits, K)
                    right = F.linear(x.double(), (weight * mask).double())
                    plain = F.linear(x, weight * mask)
                    rounding = torch.finfo(dtype).eps * right.abs().max().clamp(min=1e-30)
                    allowed = torch.maximum((plain.double() - right).abs().max(), rounding)
                    error = (y.double() - right).abs().max()
                    worst = max(worst, float(error / allowed) if bool(error.isfinite()) else float("inf"))
        yield {"check": "packed linear", "ok": worst < 8, "detail": f"error {worst:.2f} of torch's"}

    return run


LAID_OUT = ("decode_sliced", "decode_gathered")
LAID_OUT_SIZES = ((1, 8), (65, 136), (257, 264), (4096, 4096), (1000, 11008), (300, 8192 * 2 + 72), (70000, 64))


def laid_out_is_right(path: str, dtype: torch.dtype) -> Callable[[bool], Iterator[Row]]:
    """Frozen values, against float64 with poisoned outputs; then the same bits again and again."""

    def run(dry: bool) -> Iterator[Row]:
        worst, changed, refused = 0.0, 0, ""
        for N, K in LAID_OUT_SIZES[:3] if dry else LAID_OUT_SIZES:
            for density in (0.0, 0.03, 0.5, 1.0):
                weight, bias = torch.randn(N, K, device=DEVICE, dtype=dtype), torch.randn(N, device=DEVICE, dtype=dtype)
                mask = uniform_mask((N, K), density, dtype)
                mask[: N // 2, : K // 3 : 32] = 1  # uneven, so that there are loose steps
                values, bits = packed(weight, mask)
                for M in (1, 2, 3, 4) if path == "decode_sliced" else (1, 3, 8, 9, 16, 33, 64):
                    x = torch.randn(M, K, device=DEVICE, dtype=dtype)
                    try:
                        with masked_ops.use_path("copy" if dry else path), poisoned():
                            ys = [masked_ops.packed_linear(x, values, bits, K, bias) for _ in range(4 if dry else 20)]
                    except RuntimeError as error:
                        if "cannot serve" not in str(error):
                            raise
                        refused = str(error)
                        continue
                    changed += sum(int((y != ys[0]).sum()) for y in ys[1:])
                    right = F.linear(x.double(), (weight * mask).double(), bias.double())
                    plain = F.linear(x, weight * mask, bias)
                    rounding = torch.finfo(dtype).eps * right.abs().max().clamp(min=1e-30)
                    allowed = torch.maximum((plain.double() - right).abs().max(), rounding)
                    error = (ys[0].double() - right).abs().max()
                    worst = max(worst, float(error / allowed) if bool(error.isfinite()) else float("inf"))
        ok = worst < 8 and changed == 0 and not refused
        yield {
            "check": f"{path} {dtype}",
            "ok": ok,
            "detail": refused or f"error {worst:.2f} of torch's; {changed} elements changed",
        }

    return run


def convolutions_are_right(dry: bool) -> Iterator[Row]:
    for channels_last in (False, True):
        x = torch.randn(2, 8, 9, 9, device=DEVICE, dtype=torch.float64)
        weight, mask = torch.randn(6, 8, 3, 3, device=DEVICE, dtype=torch.float64), None
        mask = uniform_mask(weight.shape, 0.3, torch.float64)
        if channels_last:
            x, weight = (t.to(memory_format=torch.channels_last) for t in (x, weight))
        leaves = [x.requires_grad_(), weight.requires_grad_()]
        worst = 0.0
        for _ in range(3):
            y, plain = masked_ops.masked_conv2d(x, weight, mask), F.conv2d(x, weight * mask)
            dy = torch.randn_like(plain)
            pairs = zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(plain, leaves, dy), strict=True)
            worst = max(float((a - b).detach().abs().max()) for a, b in ((y, plain), *pairs))
        yield {"check": f"convolution, channels_last {channels_last}", "ok": worst < 1e-10, "detail": f"{worst:.2g}"}


def without(shape: Sequence[int], cut: str, dtype: torch.dtype) -> Tensor:
    """A mask without every other row, or every other one of its second dimension; "loose" prunes more besides."""
    mask = torch.ones(*shape, device=DEVICE, dtype=dtype)
    if "loose" in cut:
        mask *= uniform_mask(shape, 0.6, dtype)
        mask[1], mask[:, 1] = 1, 1
    if "rows" in cut:
        mask[::2] = 0
    if "columns" in cut:
        mask[:, ::2] = 0
    return mask


def compact_is_right(dry: bool) -> Iterator[Row]:
    """Without pruned rows, columns and channels, against float64 with poisoned outputs."""
    for cut in ("rows", "columns", "loose rows and columns"):
        worst = 0.0
        for name, call in (("linear", F.linear), ("conv2d", F.conv2d), ("conv_transpose2d", F.conv_transpose2d)):
            ours = getattr(masked_ops, f"masked_{name}")
            for channels_last in (False, True) if name != "linear" else (False,):
                shapes = ((70, 33), (65, 33)) if name == "linear" else ((2, 34, 9, 9), (34, 34, 3, 3))
                x, weight = (torch.randn(*s, device=DEVICE, dtype=torch.float64) for s in shapes)
                if channels_last:
                    x, weight = (t.to(memory_format=torch.channels_last) for t in (x, weight))
                bias = torch.randn(shapes[1][0], device=DEVICE, dtype=torch.float64)
                mask, leaves = without(shapes[1], cut, torch.float64), [x, weight, bias]
                if dry:
                    leaves = [t.float() for t in leaves]  # for the CPU's own compact path
                leaves = [t.requires_grad_() for t in leaves]
                plain = call(leaves[0], leaves[1] * mask.to(leaves[1].dtype), leaves[2])
                dy = torch.randn_like(plain)
                with masked_ops.use_path("compact"), poisoned():
                    y = ours(leaves[0], leaves[1], mask, leaves[2])
                    grads = torch.autograd.grad(y, leaves, dy)
                for a, b in zip((y, *grads), (plain, *torch.autograd.grad(plain, leaves, dy)), strict=True):
                    error = float((a - b).detach().abs().max())
                    worst = max(worst, error if math.isfinite(error) else math.inf)
        yield {"check": f"compact, no {cut}", "ok": worst < (1e-3 if dry else 1e-10), "detail": f"{worst:.2g}"}


def repeats_are_equal(path: str) -> Callable[[bool], Iterator[Row]]:
    """1,000 times the same bits."""

    def run(dry: bool) -> Iterator[Row]:
        M, N, K = (8, 64, 64) if dry else (192, 1032, 520)
        x, weight = (torch.randn(*s, device=DEVICE).bfloat16().requires_grad_() for s in ((M, K), (N, K)))
        dy, mask = torch.randn(M, N, device=DEVICE).bfloat16(), uniform_mask((N, K), 0.3, torch.bfloat16)
        name = "copy" if dry else path
        if why := serves(name, weight, mask, M):
            yield {"check": f"1,000 repeats, {path}", "ok": "needs compute capability" in why, "detail": why}
            return
        first: list[Tensor] | None = None
        changed = torch.zeros((), device=DEVICE, dtype=torch.int64)
        with masked_ops.use_path(name):
            for _ in range(10 if dry else 1000):
                y = masked_ops.masked_linear(x, weight, mask)
                results = [y.detach(), *torch.autograd.grad(y, (x, weight), dy)]
                first = first or results
                for a, b in zip(results, first, strict=True):
                    changed += (a != b).sum()
        yield {"check": f"1,000 repeats, {path}", "ok": int(changed) == 0, "detail": f"{int(changed)} elements changed"}

    return run


def graphs_and_streams(dry: bool) -> Iterator[Row]:
    M, N, K = 128, 256, 512
    x, weight = torch.randn(M, K, device=DEVICE).bfloat16(), torch.randn(N, K, device=DEVICE).bfloat16()
    mask = uniform_mask((N, K), 0.3, torch.bfloat16)
    values, bits = packed(weight, mask)

    def call() -> list[Tensor]:
        return [masked_ops.masked_linear(x, weight, mask), masked_ops.packed_linear(x[:4], values, bits, K)]

    def expected() -> list[Tensor]:
        return [F.linear(x, weight * mask), F.linear(x[:4], first_masked)]

    first_masked = weight * mask
    if DEVICE == "cpu":
        ok = all(torch.allclose(a, b, rtol=0.02, atol=0.5) for a, b in zip(call(), expected(), strict=True))
        yield {"check": "the calls of graphs and streams", "ok": ok, "detail": "dry"}
        return
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    ok = True
    for i in range(20):
        x.normal_()
        mask.copy_(uniform_mask((N, K), 0.1 + 0.04 * i, torch.bfloat16))  # the graph has to see it
        if i % 5 == 0:
            masked_ops.clear_cache()  # and to keep what it reads
        graph.replay()
        ok = ok and all(torch.allclose(a, b, rtol=0.02, atol=0.5) for a, b in zip(captured, expected(), strict=True))
    yield {"check": "a graph, its mask rewritten between replays", "ok": ok, "detail": "20 replays"}

    mask, streams, ok = uniform_mask((N, K), 0.3, torch.bfloat16), [torch.cuda.Stream() for _ in range(4)], True
    first_masked = weight * mask
    values, bits = packed(weight, mask)
    torch.cuda.synchronize()
    for _ in range(50):
        results = []
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(call())
        torch.cuda.synchronize()
        for r in results:
            ok = ok and all(torch.allclose(a, b, rtol=0.02, atol=0.5) for a, b in zip(r, expected(), strict=True))
        masked_ops.clear_cache()
    yield {"check": "four streams, the cache cleared between", "ok": ok, "detail": "50 rounds"}
    if torch.cuda.device_count() > 1:
        there = [t.to("cuda:1") for t in (x, weight, mask)]
        right = torch.allclose(masked_ops.masked_linear(*there).cpu(), expected()[0].cpu(), rtol=0.02, atol=0.5)
        yield {"check": "another device", "ok": right and torch.cuda.current_device() == 0, "detail": ""}


def no_synchronisation(dry: bool) -> Iterator[Row]:
    x, weight = (torch.randn(*s, device=DEVICE).bfloat16().requires_grad_() for s in ((128, 512), (256, 512)))
    mask = uniform_mask((256, 512), 0.3, torch.bfloat16)
    device_facts()  # the kernels' own checks, which wait
    for _ in range(3):
        masked_ops.masked_linear(x, weight, mask).sum().backward()
    if DEVICE == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        for m in (mask, mask.clone(), mask.bool()):
            for _ in range(5):
                masked_ops.masked_linear(x, weight, m).sum().backward()
        ok, detail = True, ""
    except RuntimeError as error:
        ok, detail = False, str(error)
    finally:
        if DEVICE == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    yield {"check": "no call waits for the device", "ok": ok, "detail": detail}


def out_of_memory(dry: bool) -> Iterator[Row]:
    if DEVICE == "cpu":
        yield {"check": "out of memory", "ok": True, "detail": "dry: nothing was tried"}
        return
    weight = torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16)
    mask, x = uniform_mask(weight.shape, 0.3, torch.bfloat16), torch.randn(4, 8192, device=DEVICE).bfloat16()
    right = masked_ops.masked_linear(x, weight, mask)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (16 << 20)) / total)
    told = False
    try:
        with masked_ops.use_path("copy"):
            masked_ops.masked_linear(x, weight, mask)
    except torch.OutOfMemoryError:
        told = True
    torch.cuda.set_per_process_memory_fraction(1.0)
    ok = told and torch.allclose(masked_ops.masked_linear(x, weight, mask), right, rtol=0.02, atol=1)
    yield {"check": "out of memory leaves all whole", "ok": ok, "detail": "" if told else "no error came"}


def sanitizer(tool: str) -> Callable[[bool], Iterator[Row]]:
    """compute-sanitizer over the kernels' own checks, which are tiny."""

    def run(dry: bool) -> Iterator[Row]:
        program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        if dry or not os.path.exists(program):
            yield {"check": f"compute-sanitizer {tool}", "ok": True, "detail": "not there" if not dry else "dry"}
            return
        code = "import masked_ops; masked_ops.is_available(); print(masked_ops._ops._module.cuda_kernels(0))"
        command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", code]
        if tool == "memcheck":
            command[1:1] = ["--report-api-errors", "no"]  # torch asks whether things are so
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        last = [line for line in done.stdout.splitlines() if "ERROR SUMMARY" in line or "RACECHECK SUMMARY" in line]
        told = [line.strip(" =") for line in done.stdout.splitlines() if "hazard" in line or "Invalid" in line]
        detail = "; ".join(last + told[:8]) or done.stdout[-300:]
        yield {"check": f"compute-sanitizer {tool}", "ok": done.returncode == 0, "detail": detail}

    return run


# --- timing ----------------------------------------------------------------------------------------------------------


def timed_rows(case: str, timings: dict[str, Any], flops: float, moved: float, **about: Any) -> Iterator[Row]:
    for name, timing in timings.items():
        row = {"case": case, **about, "layer": name, "us": timing.median * 1e6, "least_us": timing.minimum * 1e6}
        if flops:
            row["tflops"] = flops / timing.median / 1e12
        if moved:
            row["gb_per_s"] = moved / timing.median / 1e9
        for other in ("hook", "dense"):
            if other in timings:
                row[f"x_{other}"] = timings[other].median / timing.median
        yield row


def ceilings(dry: bool) -> Iterator[Row]:
    measured = device_ceilings(torch.float32, 128, 1 << 20) if dry else device_ceilings()
    yield {"case": "ceilings", **measured}


def mask_copies(dry: bool) -> Iterator[Row]:
    """A masked copy against a plain one."""
    side = 64 if dry else 8192
    for name, dtype in DTYPES.items():
        weight = torch.randn(side, side, device=DEVICE, dtype=dtype)
        mask, out = uniform_mask((side, side), 0.5, dtype), torch.empty_like(weight)
        calls: dict[str, list[Callable[[], object]]] = {
            "plain copy": [lambda w=weight, o=out: o.copy_(w)],
            "hook": [lambda w=weight, m=mask: w * m],
            "apply_mask": [lambda w=weight, m=mask: masked_ops.apply_mask(w, m)],
        }
        moved = (2 * weight.element_size() + 1 / 8) * weight.numel()
        yield from timed_rows("mask_copy", timed(calls, dry), 0, moved, dtype=name, N=side, K=side)


def linear_timings(N: int, K: int, density: float) -> Callable[[bool], Iterator[Row]]:
    """bf16, over rows of input: forward of every path, and training steps."""

    def run(dry: bool) -> Iterator[Row]:
        n, k = (64, 64) if dry else (N, K)
        dtype = torch.float32 if dry else torch.bfloat16
        count = sets_beyond_l2(2 * n * k)
        weights = [torch.randn(n, k, device=DEVICE, dtype=dtype) for _ in range(count)]
        masks = [uniform_mask((n, k), density, dtype) for _ in range(count)]
        stored = [packed(w, m) for w, m in zip(weights, masks, strict=True)]
        for M in (1, 16) if dry else (1, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192):
            x, dy = torch.randn(M, k, device=DEVICE, dtype=dtype), torch.randn(M, n, device=DEVICE, dtype=dtype)
            about = {"M": M, "N": n, "K": k, "density": density}
            sets = range(count)

            def on(path: str, i: int, x: Tensor = x) -> object:
                with masked_ops.use_path(path):
                    return masked_ops.masked_linear(x, weights[i], masks[i])

            calls: dict[str, list[Callable[[], object]]] = {
                "hook": [lambda i=i, x=x: F.linear(x, weights[i] * masks[i]) for i in sets],
                "dense": [lambda i=i, x=x: F.linear(x, weights[i]) for i in sets],
                "live": [lambda i=i, x=x: masked_ops.masked_linear(x, weights[i], masks[i]) for i in sets],
            }
            for path in PATHS:
                if serves(path, weights[0], masks[0], M) is None:
                    calls[path] = [lambda i=i, path=path: on(path, i) for i in sets]
            calls["packed"] = [lambda i=i, x=x: masked_ops.packed_linear(x, *stored[i], k) for i in sets]
            with torch.no_grad():
                timings = timed(calls, dry)
            paths = {"live": _ops.explain_linear(weights[0], masks[0], M)[0]}
            for row in timed_rows("forward", timings, 2 * M * n * k, 2 * n * k if M <= 64 else 0, **about):
                yield row | {"path": paths.get(row["layer"], "")}
            if M < 64 and not dry:
                continue
            for row in steps(x, dy, weights, masks, about, dry):
                yield row

    return run


def decode_timings(density: float) -> Callable[[bool], Iterator[Row]]:
    """Packed layers on few rows, bf16, in a CUDA graph as generation runs them; the weights come from memory."""

    def run(dry: bool) -> Iterator[Row]:
        side, dtype = (64, torch.float32) if dry else (8192, torch.bfloat16)
        count = sets_beyond_l2(int(4 * density * side * side))
        weights = [torch.randn(side, side, device=DEVICE, dtype=dtype) for _ in range(count)]
        stored = [packed(w, uniform_mask((side, side), density, dtype)) for w in weights]
        weights = weights[: sets_beyond_l2(2 * side * side)]
        for M in (1, 16) if dry else (1, 2, 4, 8, 16, 32, 64):
            x = torch.randn(M, side, device=DEVICE, dtype=dtype)
            calls: dict[str, list[Callable[[], object]]] = {
                "dense": [lambda w=w, x=x: F.linear(x, w) for w in weights],
                "packed": [lambda s=s, x=x: masked_ops.packed_linear(x, *s, side) for s in stored],
            }
            with torch.no_grad():
                timings = replayed_on_device(calls, DRY_SECONDS if dry else SECONDS)
            about = {"M": M, "N": side, "K": side, "density": density}
            yield from timed_rows("decode", timings, 2 * M * side * side, 2 * side * side, **about)

    return run


def steps(x: Tensor, dy: Tensor, weights: list[Tensor], masks: list[Tensor], about: Row, dry: bool) -> Iterator[Row]:
    leaves = [w.detach().requires_grad_() for w in weights]
    inputs = x.detach().requires_grad_()

    def step(forward: Callable[[Tensor, int], Tensor], i: int) -> object:
        return torch.autograd.grad(forward(inputs, i), (inputs, leaves[i]), dy)

    ways: dict[str, Callable[[Tensor, int], Tensor]] = {
        "hook": lambda t, i: F.linear(t, leaves[i] * masks[i]),
        "dense": lambda t, i: F.linear(t, leaves[i]),
        "live": lambda t, i: masked_ops.masked_linear(t, leaves[i], masks[i]),
    }
    calls = {name: [lambda f=f, i=i: step(f, i) for i in range(len(leaves))] for name, f in ways.items()}
    yield from timed_rows("step", timed(calls, dry), 6 * x.numel() * dy.shape[1], 0, **about)


def amp_steps(dry: bool) -> Iterator[Row]:
    """Masters in float32 under autocast to bf16."""
    side = 64 if dry else 4096
    for M in (8,) if dry else (64, 512, 2048):
        weights = [torch.randn(side, side, device=DEVICE, requires_grad=True) for _ in range(2)]
        masks = [uniform_mask((side, side), 0.1, torch.float32) for _ in range(2)]
        x, dy = torch.randn(M, side, device=DEVICE).bfloat16(), torch.randn(M, side, device=DEVICE).bfloat16()

        def step(forward: Callable[[int], Tensor], i: int, dy: Tensor = dy) -> object:
            with torch.autocast(DEVICE, dtype=torch.bfloat16):
                y = forward(i)
            return torch.autograd.grad(y, weights[i], dy)  # noqa: B023

        ways: dict[str, Callable[[int], Tensor]] = {
            "hook": lambda i, x=x: F.linear(x, weights[i] * masks[i]),  # noqa: B023
            "dense": lambda i, x=x: F.linear(x, weights[i]),  # noqa: B023
            "live": lambda i, x=x: masked_ops.masked_linear(x, weights[i], masks[i]),  # noqa: B023
        }
        calls = {name: [lambda f=f, i=i: step(f, i) for i in range(2)] for name, f in ways.items()}
        timings = timed(calls, dry)
        yield from timed_rows("AMP step", timings, 4 * M * side * side, 0, M=M, N=side, K=side, density=0.1)


CONVOLUTIONS = (
    (64, 64, 3, 56),
    (128, 128, 3, 28),
    (256, 256, 3, 14),
    (512, 512, 3, 7),
    (256, 64, 1, 56),
    (2048, 512, 1, 7),
)


def convolution_steps(dry: bool) -> Iterator[Row]:
    for c_in, c_out, kernel, size in CONVOLUTIONS[:2] if dry else CONVOLUTIONS:
        batch, dtype = (1, torch.float32) if dry else (64, torch.bfloat16)
        if dry:
            c_in, c_out, size = 4, 4, 8
        form = torch.channels_last
        x = torch.randn(batch, c_in, size, size, device=DEVICE, dtype=dtype).to(memory_format=form).requires_grad_()
        weight = torch.randn(c_out, c_in, kernel, kernel, device=DEVICE, dtype=dtype).to(memory_format=form)
        weight.requires_grad_()
        mask = uniform_mask(weight.shape, 0.1, dtype).to(memory_format=form)
        padding = kernel // 2
        dy = torch.randn_like(F.conv2d(x, weight, padding=padding))

        def step(y: Tensor, x: Tensor = x, weight: Tensor = weight, dy: Tensor = dy) -> object:
            return torch.autograd.grad(y, (x, weight), dy)

        calls: dict[str, list[Callable[[], object]]] = {
            "hook": [lambda x=x, w=weight, m=mask, p=padding, s=step: s(F.conv2d(x, w * m, padding=p))],
            "dense": [lambda x=x, w=weight, p=padding, s=step: s(F.conv2d(x, w, padding=p))],
            "live": [lambda x=x, w=weight, m=mask, p=padding, s=step: s(masked_ops.masked_conv2d(x, w, m, padding=p))],
        }
        flops = 6 * dy.numel() * weight[0].numel()
        about = {"shape": f"{batch}x{c_in}x{size}x{size} -> {c_out}, {kernel}x{kernel}"}
        yield from timed_rows("convolution step", timed(calls, dry), flops, 0, **about)


# --- what is to be decided -------------------------------------------------------------------------------------------

# Of layers whose values are laid out, 8192x8192, by density and rows of input: how many times as fast as dense is
# asked, and the microseconds that are expected of each kernel (bench/results/gpu-predictions.md).
ASKED = {(0.1, 1): 3, (0.1, 16): 3, **{(0.25, M): 1.6 for M in (1, 2, 4, 8, 16)}} | {
    (0.5, M): 1.05 for M in (1, 2, 4, 8, 16)
}
EXPECTED_US = {
    "decode_sliced": {
        0.1: {1: 9.5, 2: 10, 4: 10.5},
        0.25: {1: 17, 2: 18, 4: 18.5},
        0.5: {1: 30, 2: 31, 4: 31},
    },
    "decode_gathered": {
        0.1: {1: 10.2, 2: 10.4, 4: 10.4, 8: 10.4, 16: 10.7, 32: 16, 64: 27},
        0.25: {1: 16.5, 2: 16.5, 4: 16.5, 8: 16.5, 16: 16.8, 32: 19, 64: 32},
        0.5: {1: 26.5, 2: 26.5, 4: 26.5, 8: 26.5, 16: 27, 32: 29, 64: 51},
    },
}


def decode_decisions(side: int, density: float) -> Callable[[bool], Iterator[Row]]:
    """As decode_timings, with both kernels."""

    def run(dry: bool) -> Iterator[Row]:
        n, dtype = (64, torch.float32) if dry else (side, torch.bfloat16)
        count = sets_beyond_l2(int(3 * density * n * n))
        weights = [torch.randn(n, n, device=DEVICE, dtype=dtype) for _ in range(count)]
        stored = [packed(w, uniform_mask((n, n), density, dtype)) for w in weights]
        weights = weights[: sets_beyond_l2(2 * n * n)]

        def on(path: str, s: tuple[Tensor, Tensor], x: Tensor) -> object:
            with masked_ops.use_path("sparse" if dry else path):
                return masked_ops.packed_linear(x, *s, n)

        for M in (1, 16) if dry else (1, 2, 4, 8, 16, 32, 64) if side == 8192 else (1, 8, 16):
            x = torch.randn(M, n, device=DEVICE, dtype=dtype)
            calls: dict[str, list[Callable[[], object]]] = {"dense": [lambda w=w, x=x: F.linear(x, w) for w in weights]}
            for path in ("decode", *LAID_OUT):
                if path == "decode_sliced" and M > 4:
                    continue
                calls[path] = [lambda s=s, x=x, path=path: on(path, s, x) for s in stored]
            with torch.no_grad():
                timings = replayed_on_device(calls, DRY_SECONDS if dry else SECONDS)
            about = {"M": M, "N": n, "K": n, "density": density}
            for row in timed_rows("decode", timings, 0, 0, **about):
                if row["layer"] in LAID_OUT and n == 8192:
                    row |= {"asked": ASKED.get((density, M)), "expected_us": EXPECTED_US[row["layer"]][density][M]}
                yield row

    return run


def in_a_row(calls: dict[str, list[Callable[[], object]]], dry: bool) -> dict[str, Any]:
    """Per call, all of a contender's between two events: less of what events cost, where a call cannot be captured."""
    whole = {name: [lambda functions=functions: [f() for f in functions]] for name, functions in calls.items()}
    timings = timed(whole, dry)  # type: ignore[arg-type]
    return {
        name: replace(t, minimum=t.minimum / len(calls[name]), median=t.median / len(calls[name]))
        for name, t in timings.items()
    }


PLANS = tuple((rows, splits, False) for rows in (64, 128, 192, 256) for splits in (1, 2, 3, 4, 8)) + tuple(
    (rows, 2, True) for rows in (128, 256)
)


def gemm_plans(dry: bool) -> Iterator[Row]:
    """gemm_sm90 as it chooses and with every plan of one wave or a little more, forward."""
    assert masked_ops.is_available() and _ops._module is not None
    set_plan = _ops._module.set_cuda_gemm_plan
    side, dtype = (64, torch.float32) if dry else (4096, torch.bfloat16)
    sets = range(sets_beyond_l2(2 * side * side))
    weights = [torch.randn(side, side, device=DEVICE, dtype=dtype) for _ in sets]
    masks = [uniform_mask((side, side), 0.1, dtype) for _ in sets]

    def on(plan: tuple[int, int, bool], x: Tensor, i: int) -> object:
        set_plan(*plan)
        try:
            with masked_ops.use_path("copy" if dry else "gemm_sm90"):
                return masked_ops.masked_linear(x, weights[i], masks[i])
        finally:
            set_plan()

    for M in (8,) if dry else (64, 128, 256, 512):
        x = torch.randn(M, side, device=DEVICE, dtype=dtype)
        calls: dict[str, list[Callable[[], object]]] = {
            "dense": [lambda i=i, x=x: F.linear(x, weights[i]) for i in sets],
            "gemm_sm90": [lambda i=i, x=x: on((0, 0, False), x, i) for i in sets],
        }
        for rows, splits, trade in PLANS:
            blocks = -(-M // rows) * -(-side // 128) * splits
            if rows < M + 64 and 64 <= blocks <= 256:
                name = f"{rows} rows, {splits} splits" + ", trading" * trade
                calls[name] = [lambda i=i, x=x, plan=(rows, splits, trade): on(plan, x, i) for i in sets]
        with torch.no_grad():
            right = F.linear(x.double(), (weights[0] * masks[0]).double())
            rounding = 2 * torch.finfo(dtype).eps * right.abs().max()
            ours = [name for name in calls if name != "dense"]
            wrong = [name for name in ours if not bool(((calls[name][0]() - right).abs() <= rounding).all())]
            yield {"check": f"plans of gemm_sm90, {M} rows", "ok": not wrong, "detail": ", ".join(wrong) or len(ours)}
            timings = in_a_row(calls, dry)
        for row in timed_rows("gemm_sm90", timings, 2 * M * side * side, 0, M=M, N=side, K=side, density=0.1):
            yield row | ({"asked": 0.9} if row["layer"] == "gemm_sm90" else {})


def small_copies(dry: bool) -> Iterator[Row]:
    """The weights of small convolutions: the masked copy is what a step of theirs differs in from the hook's."""
    for c_out, c_in, kernel in ((64, 64, 3), (512, 512, 3), (64, 256, 1)):
        dtype = torch.float32 if dry else torch.bfloat16
        weight = torch.randn(c_out, c_in, kernel, kernel, device=DEVICE, dtype=dtype)
        weight, mask = (t.to(memory_format=torch.channels_last) for t in (weight, (weight > 1).to(dtype)))
        calls: dict[str, list[Callable[[], object]]] = {
            "hook": [lambda w=weight, m=mask: w * m] * 8,
            "apply_mask": [lambda w=weight, m=mask: masked_ops.apply_mask(w, m)] * 8,
        }
        with torch.no_grad():
            timings = in_a_row(calls, dry)
        yield from timed_rows("small masked copy", timings, 0, 0, shape=f"{c_out}x{c_in}x{kernel}x{kernel}")


# What is expected of a step without half of the rows: of linear layers by rows of input, of a convolution.
EXPECTED_COMPACT_US = {
    ("linear", 2048): 243,
    ("linear", 8192): 720,
    ("convolution", 512): 260,
    ("convolution", 256): 190,
}


def expecting(row: Row, us: float | None) -> Row:
    return row | {"expected_us": us} if us and row["layer"] == "compact" else row


def compact_decisions(dry: bool) -> Iterator[Row]:
    """Half of the rows pruned: steps of linear layers and convolutions, and packed layers, bf16."""
    dtype = torch.float32 if dry else torch.bfloat16
    side = 64 if dry else 4096
    for M in (16,) if dry else (2048, 8192):
        x, dy = (torch.randn(M, side, device=DEVICE, dtype=dtype).requires_grad_() for _ in range(2))
        weight, mask = torch.randn(side, side, device=DEVICE, dtype=dtype), without((side, side), "rows", dtype)
        about = {"M": M, "N": side, "K": side, "density": 0.5}
        for row in compact_steps("linear step", F.linear, masked_ops.masked_linear, x, weight, mask, dy, about, dry):
            yield expecting(row, None if dry else EXPECTED_COMPACT_US["linear", M])
    for channels, size in ((8, 4),) if dry else ((512, 14), (256, 28)):
        form, batch = torch.channels_last, 1 if dry else 64
        x = torch.randn(batch, channels, size, size, device=DEVICE, dtype=dtype).to(memory_format=form).requires_grad_()
        weight = torch.randn(channels, channels, 3, 3, device=DEVICE, dtype=dtype).to(memory_format=form)
        mask = without(weight.shape, "rows", dtype).to(memory_format=form)
        about = {"shape": f"{batch}x{channels}x{size}x{size}, 3x3", "density": 0.5}
        calls = (functools.partial(f, padding=1) for f in (F.conv2d, masked_ops.masked_conv2d))
        for row in compact_steps("convolution step", *calls, x, weight, mask, torch.randn_like(x), about, dry):
            yield expecting(row, None if dry else EXPECTED_COMPACT_US["convolution", channels])
    weights = [torch.randn(side, side, device=DEVICE, dtype=dtype) for _ in range(sets_beyond_l2(side * side))]
    stored = [packed(w, without((side, side), "rows", dtype)) for w in weights]
    for M in (1, 16, 2048) if not dry else (1, 16):
        x = torch.randn(M, side, device=DEVICE, dtype=dtype)

        def on(path: str, s: tuple[Tensor, Tensor], x: Tensor = x) -> object:
            with masked_ops.use_path(path):
                return masked_ops.packed_linear(x, *s, side)

        calls = {"dense": [lambda w=w, x=x: F.linear(x, w) for w in weights]}
        for path in ("copy",) if dry else ("decode", "compact") if M <= 64 else ("copy", "compact"):
            calls[path] = [lambda s=s, path=path: on(path, s) for s in stored]
        with torch.no_grad():
            timings = replayed_on_device(calls, DRY_SECONDS if dry else SECONDS)
        yield from timed_rows("packed", timings, 0, 0, M=M, N=side, K=side, density=0.5)


def compact_steps(
    case: str, plain: Any, ours: Any, x: Tensor, weight: Tensor, mask: Tensor, dy: Tensor, about: Row, dry: bool
) -> Iterator[Row]:
    leaf = weight.requires_grad_()

    def step(forward: Callable[[], Tensor]) -> object:
        return torch.autograd.grad(forward(), (x, leaf), dy)

    def on(path: str) -> object:
        with masked_ops.use_path(path):
            return step(lambda: ours(x, leaf, mask))

    calls: dict[str, list[Callable[[], object]]] = {
        "hook": [lambda: step(lambda: plain(x, leaf * mask))],
        "dense": [lambda: step(lambda: plain(x, leaf))],
        "whole": [lambda: on("copy" if dry else "mask_copy")],
        "compact": [lambda: on("compact")],
    }
    yield from timed_rows(case, timed(calls, dry), 0, 0, **about)


# --- profile ---------------------------------------------------------------------------------------------------------

# One row of input and eight in turn.
PROFILED_DECODE = """import gpu_suite
x=torch.randn(ROWS,8192,device='cuda').bfloat16();w=torch.randn(8192,8192,device='cuda').bfloat16()
v,b=gpu_suite.packed(w,(torch.rand_like(w)<.1).bfloat16())
with masked_ops.use_path('PATH'):
 for i in range(6):
  if i == 3: profiler.start()
  masked_ops.packed_linear(x[:1],v,b,8192);masked_ops.packed_linear(x,v,b,8192)"""
PROFILED = {  # the first calls check the kernels and pack the mask
    "mask_copy": "w=torch.randn(8192,8192,device='cuda').bfloat16();m=(torch.rand_like(w)<.5).bfloat16()\n"
    "for i in range(6):\n if i == 3: profiler.start()\n masked_ops.apply_mask(w,m)",
    "gemm_sm90": "x=torch.randn(2048,4096,device='cuda').bfloat16();w=torch.randn(4096,4096,device='cuda').bfloat16()\n"
    "m=(torch.rand_like(w)<.5).bfloat16()\n"
    "with masked_ops.use_path('gemm_sm90'):\n"
    " for i in range(6):\n  if i == 3: profiler.start()\n  masked_ops.masked_linear(x,w,m)",
    "decode_gather": PROFILED_DECODE.replace("PATH", "decode").replace("ROWS", "8"),
    "decode_sliced": PROFILED_DECODE.replace("PATH", "decode_sliced").replace("ROWS", "4"),
    "decode_gathered": PROFILED_DECODE.replace("PATH", "decode_gathered").replace("ROWS", "16"),
}
METRICS = (
    "gpu__time_duration.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed,"
    "sm__throughput.avg.pct_of_peak_sustained_elapsed,sm__warps_active.avg.pct_of_peak_sustained_active,"
    "smsp__issue_active.avg.pct_of_peak_sustained_active,"
    "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum,l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum"
)


def profiled(kernel: str) -> Callable[[bool], Iterator[Row]]:
    def run(dry: bool) -> Iterator[Row]:
        program = shutil.which("ncu")
        if dry or program is None:
            yield {"case": f"ncu {kernel}", "detail": "dry" if dry else "there is no ncu"}
            return
        code = "import torch, masked_ops\nfrom torch.cuda import profiler\nmasked_ops.is_available()\n"
        code += f"{PROFILED[kernel]}\ntorch.cuda.synchronize()"
        command = [program, "--clock-control", "none", "--csv", "--metrics", METRICS, "--profile-from-start", "off"]
        command += ["--kernel-name", f"regex:.*{kernel}.*", "--launch-count", "3", sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=HERE)
        lines = [line for line in done.stdout.splitlines() if line.startswith('"')]
        yield {"case": f"ncu {kernel}", "detail": "\n".join(lines[-16:]) or done.stdout[-500:] + done.stderr[-500:]}

    return run


class Block(nn.Module):
    """Of a vision transformer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads = max(width // 64, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def training_step(kind: str) -> Callable[[bool], Iterator[Row]]:
    def make(dry: bool) -> tuple[nn.Module, Tensor]:
        if kind == "transformer":
            width, depth, batch, tokens = (64, 1, 2, 4) if dry else (768, 12, 64, 196)
            model = nn.Sequential(*(Block(width) for _ in range(depth)))
            return model.to(DEVICE), torch.randn(batch, tokens, width, device=DEVICE)
        import torchvision

        size, batch = (32, 2) if dry else (224, 64)
        network = torchvision.models.resnet18() if dry else torchvision.models.resnet50()
        images = torch.randn(batch, 3, size, size, device=DEVICE)
        return network.to(DEVICE), images.to(memory_format=torch.channels_last)

    def run(dry: bool) -> Iterator[Row]:
        try:
            make(True)
        except ImportError as error:
            yield {"case": f"{kind} step", "detail": str(error)}
            return
        calls: dict[str, list[Callable[[], object]]] = {}
        for name in ("hook", "dense", "live"):
            torch.manual_seed(0)
            model, x = make(dry)
            chosen = [(m, "weight") for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
            package = {"hook": torch.nn.utils.prune, "live": prune}.get(name)
            for module, parameter in chosen if package else ():
                package.l1_unstructured(module, parameter, amount=0.9)
            if kind == "resnet":
                model.to(memory_format=torch.channels_last)  # torch cannot prune it afterwards
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

            def step(model: nn.Module = model, x: Tensor = x, optimizer: Any = optimizer) -> object:
                with torch.autocast(DEVICE, dtype=torch.bfloat16):
                    y = model(x)
                y.float().pow(2).mean().backward()
                optimizer.step()
                return optimizer.zero_grad()

            calls[name] = [step]
        timings = timed(calls, dry, seconds=8)
        yield from timed_rows(f"{kind} step", timings, 0, 0, density=0.1)

    return run


def one_after_another(*runs: Callable[[bool], Iterator[Row]]) -> Callable[[bool], Iterator[Row]]:
    """In one process, which takes longer to start than most of them to run."""
    return lambda dry: (row for run in runs for row in run(dry))


# --- the suite -------------------------------------------------------------------------------------------------------


def all_cases() -> list[Case]:
    cases = [Case("facts", "correctness", 120, facts)]
    for path in PATHS:
        for name in ("bf16", "fp16", *(("fp32",) if path == "mask_copy" else ())):
            cases.append(Case(f"linear-{path}-{name}", "correctness", 90, linear_is_right(path, DTYPES[name])))
    for name in ("bf16", "fp16", "fp32"):
        cases.append(Case(f"packed-{name}", "correctness", 90, packed_is_right(DTYPES[name])))
    cases.append(Case("convolutions", "correctness", 60, convolutions_are_right))
    cases += [Case(f"repeats-{path}", "correctness", 60, repeats_are_equal(path)) for path in PATHS]
    cases.append(Case("compact", "correctness", 60, compact_is_right))
    cases.append(Case("graphs-and-streams", "correctness", 60, graphs_and_streams))
    cases.append(Case("no-synchronisation", "correctness", 60, no_synchronisation))
    cases.append(Case("out-of-memory", "correctness", 60, out_of_memory))
    cases += [Case(f"sanitizer-{tool}", "correctness", 150, sanitizer(tool)) for tool in ("memcheck", "racecheck")]

    cases.append(Case("copies", "timing", 60, one_after_another(ceilings, mask_copies)))
    shapes = ((4096, 4096, 0.1), (4096, 4096, 0.5), (8192, 8192, 0.1), (3072, 768, 0.1))
    cases.append(Case("linear", "timing", 150, one_after_another(*(linear_timings(*shape) for shape in shapes))))
    decodes = [decode_timings(density) for density in (0.1, 0.25, 0.5)]
    cases.append(Case("decode", "timing", 60, one_after_another(*decodes)))
    cases.append(Case("amp-steps", "timing", 60, amp_steps))
    cases.append(Case("convolution-steps", "timing", 60, convolution_steps))

    laid_out = [laid_out_is_right(path, DTYPES[name]) for path in LAID_OUT for name in ("bf16", "fp16")]
    cases.append(Case("laid-out-is-right", "decide", 150, one_after_another(*laid_out)))
    decisions = [decode_decisions(8192, density) for density in EXPECTED_US["decode_gathered"]]
    cases.append(Case("decide-decode", "decide", 150, one_after_another(*decisions, decode_decisions(4096, 0.1))))
    cases.append(Case("decide-gemm", "decide", 60, gemm_plans))
    cases.append(Case("decide-compact", "decide", 60, one_after_another(compact_is_right, compact_decisions)))
    cases.append(Case("decide-convolutions", "decide", 60, one_after_another(small_copies, convolution_steps)))

    cases += [Case(f"{kind}-step", "profile", 120, training_step(kind)) for kind in ("transformer", "resnet")]
    cases += [Case(f"ncu-{kernel}", "profile", 90, profiled(kernel)) for kernel in PROFILED]
    return cases


def run_one(case: Case, dry: bool) -> None:
    """In the child: one line of JSON for each row."""
    torch.manual_seed(0)
    for row in case.run(dry):
        print("ROW " + json.dumps(row), flush=True)


def run_in_a_process(case: Case, seconds: float, dry: bool) -> list[Row]:
    command = [sys.executable, __file__, "--case", case.name, *(["--dry"] if dry else [])]
    started = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
        output, failed = done.stdout, f"exit code {done.returncode}: {done.stderr[-1500:]}" if done.returncode else ""
    except subprocess.TimeoutExpired as error:
        output = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        failed = f"stopped after {seconds:.0f} s"
    rows = [json.loads(line[4:]) for line in output.splitlines() if line.startswith("ROW ")]
    if failed:
        rows.append({"failed": failed})
    took = round(time.perf_counter() - started, 1)
    return [{"name": case.name, **row, "seconds": took} for row in rows]


def short(rows: list[Row]) -> str:
    """The table: failures first, then what a phase is about."""
    lines = [f"FAILED {row['name']}: {row['failed']}" for row in rows if "failed" in row]
    checks = [row for row in rows if "check" in row]
    lines += [f"{'ok    ' if row['ok'] else 'WRONG '} {row['check']}: {row['detail']}" for row in checks]
    lines += [f"{row['case']}: {row['detail']}" for row in rows if "detail" in row and "case" in row]
    lines += [
        f"ceilings: {row['peak_tflops']:.0f} TFLOP/s, {row['copy_gb_per_s']:.0f} GB/s"
        for row in rows
        if "peak_tflops" in row
    ]
    timed = [row for row in rows if "us" in row]
    if timed:
        header = ("case", "M N K", "density", "layer", "us", "TF/s", "GB/s", "x hook", "x dense", "asked", "expected")
        lines.append(table([header, *map(cells, timed)]))
    return "\n".join(lines)


def cells(row: Row) -> list[str]:
    size = row.get("shape") or " ".join(str(row[key]) for key in ("M", "N", "K") if key in row)
    path = f" ({row['path']})" if row.get("path") else ""
    return [
        row["case"],
        f"{size} {row.get('dtype', '')}".strip(),
        f"{row['density']:.2f}" if "density" in row else "",
        row["layer"] + path,
        f"{row['us']:.1f}",
        *(f"{row[key]:.0f}" if key in row else "" for key in ("tflops", "gb_per_s")),
        *(f"{row[key]:.2f}" if key in row else "" for key in ("x_hook", "x_dense")),
        f"{row['asked']:g}" if row.get("asked") else "",
        f"{row['expected_us']:g} us" if "expected_us" in row else "",
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phase", choices=["correctness", "timing", "decide", "profile"], default="correctness")
    parser.add_argument("--budget-s", type=float, default=420, help="end within this time (default: %(default)s)")
    parser.add_argument("--dry", action="store_true", help="tiny sizes; runs without a GPU")
    parser.add_argument("--only", metavar="NAMES", help="cases whose name holds one of these, separated by commas")
    parser.add_argument("--jobs", type=int, default=4, help="cases that run at once, where nothing is timed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="what was found so far is there after each case")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.setdefault("MASKED_OPS_CUDA", "1")
    cases = all_cases()
    if args.case:
        run_one(next(case for case in cases if case.name == args.case), args.dry)
        return 0
    if DEVICE == "cpu" and not args.dry:
        parser.error("there is no CUDA device; --dry runs the cases at tiny sizes on the CPU")
    end = time.perf_counter() + args.budget_s
    started = time.perf_counter()
    available = masked_ops.is_available()  # the build, outside of every case's limit
    if DEVICE == "cuda" and available:
        assert _ops._module is not None
        print("CUDA kernels:", _ops._module.cuda_reason() or "built", flush=True)
    about = {**machine(), **device_facts(), "phase": args.phase, "dry": args.dry}
    print(f"built and loaded in {time.perf_counter() - started:.0f} s", flush=True)
    wanted = (args.only or "").split(",")
    chosen = [c for c in cases if c.phase == args.phase and any(name in c.name for name in wanted)]
    rows: list[Row] = []

    def one(case: Case) -> list[Row]:
        left = end - time.perf_counter() - 2
        if left < 5:
            return [{"name": case.name, "failed": "not run: the time was up"}]
        return run_in_a_process(case, min(case.seconds, left), args.dry)

    with ThreadPoolExecutor(args.jobs if args.phase == "correctness" else 1) as pool:
        for case, found in zip(chosen, pool.map(one, chosen), strict=True):
            rows += found
            print(f"{case.name}: {rows[-1].get('seconds', 0)} s", flush=True)
            if args.json:
                write_json(args.json, "gpu_suite", about, rows)
    print(short(rows), flush=True)
    return int(any("failed" in row or row.get("ok") is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
