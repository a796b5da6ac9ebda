"""What the benchmarks share: interleaved timing, the facts of the machine, tables, and results as JSON.

Times of one machine differ from minute to minute by more than what is to be shown. So all contenders run in one
process, in turns, in both orders, and only ratios and differences within one run are to be compared. The minimum is
what the code takes when nothing disturbs it, the median what it takes on this machine as busy as it is.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

# The installed package is what users get; without one, the source tree.
try:
    import masked_ops
except ModuleNotFoundError as error:
    if error.name != "masked_ops":
        raise
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import masked_ops

from masked_ops import _ops

# Until a process has freed something large, glibc gives memory back to the system at every turn: page faults then
# outlast the arithmetic of a training step, of torch's layers and of ours alike, or not, by what ran before. Any
# process that trains has come past that.
_large = torch.empty(31 << 20, dtype=torch.uint8)
del _large


@dataclass(frozen=True)
class Timing:
    """Seconds per call."""

    minimum: float
    median: float
    calls: int
    """In all, over all samples."""


def interleaved(
    contenders: Mapping[str, Callable[[], object]], seconds: float = 1.0, sample: float = 1e-3, label: str = ""
) -> dict[str, Timing]:
    """Time functions against each other.

    Args:
        contenders: name -> function of no arguments.
        seconds: for all of them together, warm-up apart; each gets three samples at the least.
        sample: the least duration of one sample, which repeats a quick function.
        label: stands before the progress bar, which shows on terminals only.
    """
    counts = {name: _calls_in(function, sample) for name, function in contenders.items()}
    names = list(contenders)
    samples: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        with tqdm(desc=label, total=round(seconds, 1), unit="s", leave=False, disable=None, bar_format=_BAR) as bar:
            while (elapsed := time.perf_counter() - start) < seconds or len(samples[names[0]]) < 3:
                bar.update(min(elapsed, bar.total) - bar.n)
                for name in (*names, *reversed(names)):
                    samples[name].append(_time(contenders[name], counts[name]))
    finally:
        if collecting:
            gc.enable()
    return {
        name: Timing(min(values), statistics.median(values), len(values) * counts[name])
        for name, values in samples.items()
    }


_BAR = "{desc} {bar} {n:.1f}/{total:.1f} s"


def _time(function: Callable[[], object], calls: int) -> float:
    start = time.perf_counter_ns()
    for _ in range(calls):
        function()
    return (time.perf_counter_ns() - start) * 1e-9 / calls


def _calls_in(function: Callable[[], object], sample: float) -> int:
    """How many calls fill a sample; they warm up caches, the mask's pattern and torch's threads as well."""
    for _ in range(3):  # index structures are built from a mask's second use on
        function()
    calls = 1
    while (taken := _time(function, calls) * calls) < sample:
        calls = max(calls * 2, min(int(calls * sample / max(taken, 1e-9)), calls * 10))
    return calls


# --- timing on a device ----------------------------------------------------------------------------------------------


def compare(
    contenders: Mapping[str, Callable[[], object]], seconds: float, label: str, device: str
) -> dict[str, Timing]:
    """:func:`interleaved` on the CPU; on a CUDA device by its events, with the L2 cache emptied before each call."""
    if device == "cpu":
        return interleaved(contenders, seconds=seconds, label=label)
    l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    flush = torch.empty(4 * l2, dtype=torch.uint8, device=device)
    return interleaved_on_device({name: [function] for name, function in contenders.items()}, seconds, flush=flush)


def interleaved_on_device(
    contenders: Mapping[str, Sequence[Callable[[], object]]],
    seconds: float = 0.3,
    warm_up: int = 3,
    flush: torch.Tensor | None = None,
) -> dict[str, Timing]:
    """Time functions against each other on the current CUDA device, by events.

    Each contender is a sequence of functions that do the same on buffers of their own, together larger than the L2
    cache: they are called in turn, so that none finds its operands there. Without a CUDA device the host's clock
    serves, for dry runs.

    Args:
        contenders: name -> functions of no arguments.
        seconds: for all of them together, warm-up apart; each gets five samples at the least.
        warm_up: calls of every function before; a mask is packed within three.
        flush: written before each call, to empty the L2 cache where no buffers are rotated.
    """
    on_device = torch.cuda.is_available()
    for functions in contenders.values():
        for _ in range(warm_up):
            for function in functions:
                function()
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    start, turn = time.perf_counter(), 0
    while time.perf_counter() - start < seconds or turn < 5:
        pending = []
        if on_device:
            torch.cuda._sleep(4_000_000)  # about 2 ms, for the host to be ahead: else small calls show its own time
        for name in names if turn % 2 == 0 else reversed(names):
            function = contenders[name][turn % len(contenders[name])]
            if on_device:
                if flush is not None:
                    flush.zero_()
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                function()
                end.record()
                pending.append((name, begin, end))
            else:
                samples[name].append(_time(function, 1))
        if on_device:
            torch.cuda.synchronize()
        for name, begin, end in pending:
            samples[name].append(begin.elapsed_time(end) * 1e-3)
        turn += 1
    return {name: Timing(min(values), statistics.median(values), len(values)) for name, values in samples.items()}


def replayed_on_device(
    contenders: Mapping[str, Sequence[Callable[[], object]]], seconds: float = 0.3, rounds: int = 3
) -> dict[str, Timing]:
    """:func:`interleaved_on_device` with the functions of each contender captured in one CUDA graph, ``rounds`` times.

    The times are of the device alone, launches included, for calls so small that the host and the events around them
    would show. Without a CUDA device nothing is captured.
    """
    if not torch.cuda.is_available():
        return interleaved_on_device(contenders, seconds)
    replays: dict[str, Callable[[], object]] = {}
    for name, functions in contenders.items():
        for _ in range(2):  # what is made of packed bits has to be ready, and known to be, before a capture
            for _ in range(3):
                for function in functions:
                    function()
            torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(rounds):
                for function in functions:
                    function()
        replays[name] = graph.replay
    timings = interleaved_on_device({name: [replay] for name, replay in replays.items()}, seconds)
    calls = {name: rounds * len(functions) for name, functions in contenders.items()}
    return {
        name: Timing(t.minimum / calls[name], t.median / calls[name], t.calls * calls[name])
        for name, t in timings.items()
    }


def device_facts() -> dict[str, Any]:
    """Of the current CUDA device, and which kernels may be used on it; empty without one."""
    if not torch.cuda.is_available():
        return {}
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    module = _ops._module if masked_ops.is_available() else None
    return {
        "device": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        "kernels": {k: list(v) for k, v in module.cuda_kernels(torch.cuda.current_device()).items()} if module else {},
    }


def device_ceilings(dtype: torch.dtype = torch.bfloat16, side: int = 8192, copied: int = 4 << 30) -> dict[str, float]:
    """TFLOP/s of torch's largest GEMM on random data, and GB/s, read and written, of a copy within the device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    source = torch.empty(copied // 4, device=device, dtype=torch.float32).normal_()
    target = torch.empty_like(source)
    timings = interleaved_on_device({"gemm": [lambda: a @ b], "copy": [lambda: target.copy_(source)]})
    return {
        "peak_tflops": 2 * side**3 / timings["gemm"].median / 1e12,
        "copy_gb_per_s": 2 * source.nbytes / timings["copy"].median / 1e9,
    }


def peak_gflops(device: str, dtype: str) -> float:
    """The rate of multiply-adds out of registers with all of torch's threads; of a CUDA device, of a large GEMM."""
    if device != "cpu":
        return device_ceilings(getattr(torch, dtype))["peak_tflops"] * 1e3
    if _ops._module is None:
        return float("nan")
    _ops._module.peak_flops(0.05, dtype)
    return max(_ops._module.peak_flops(0.1, dtype) for _ in range(5)) / 1e9


def sets_beyond_l2(bytes_of_one: int) -> int:
    """How many sets of operands rotate, for their sum to be three times the L2 cache."""
    if not torch.cuda.is_available():
        return 2
    l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return max(2, min(16, -(-3 * l2 // max(bytes_of_one, 1))))


# --- the machine -----------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """The facts without which a time means nothing."""
    compiled = _ops._module if masked_ops.is_available() else None
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "masked_ops": masked_ops.__version__,
        "capability": compiled.capability() if compiled else None,
        "fallback": _ops.fallback_reason(),
        # Two virtual cores may lie near each other or far, which changes from minute to minute: far from each other
        # (150 ns and more) they have more bandwidth, and share work less well.
        "core_latency_ns": round(compiled.core_latency() * 1e9, 1) if compiled else None,
        "load": os.getloadavg()[0],
    }


def _cpu_name() -> str:
    facts = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    name = facts.get("model name", platform.processor() or platform.machine())
    # Virtual machines often hide the model, but not what tells its generation.
    return f"{name} (family {facts.get('cpu family', '?')}, model {facts.get('model', '?')})"


def print_machine(facts: Mapping[str, Any]) -> None:
    kernels = f"compiled for {facts['capability']}" if facts["capability"] else f"none: {facts['fallback']}"
    latency = "" if facts["core_latency_ns"] is None else f"{facts['core_latency_ns']:.0f} ns apart, "
    print(f"{facts['cpu']}, {facts['cores']} cores, {latency}{facts['threads']} threads, load {facts['load']:.1f}")
    print(f"masked_ops {facts['masked_ops']} (kernels {kernels}), torch {facts['torch']}, Python {facts['python']}")


# --- output ----------------------------------------------------------------------------------------------------------


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--json", type=Path, metavar="FILE", help="write the results there, too")
    result.add_argument("--threads", type=int, help="threads of torch; by default, as torch chooses")
    result.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    result.add_argument("--seconds", type=float, default=1.0, help="for each comparison (default: %(default)s)")
    return result


def main_with(
    benchmark: str, run: Callable[[argparse.Namespace], Sequence[Mapping[str, Any]]], args: argparse.Namespace
) -> None:
    """What is around ``run``, which measures: threads, device, facts, and the results as a file."""
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device != "cpu" and not torch.cuda.is_available():
        sys.exit("--device cuda: torch sees no CUDA device")
    torch.set_default_device(args.device)
    masked_ops.is_available()  # builds the kernels now, where somebody waits for them
    facts = machine() | (device_facts() if args.device != "cpu" else {})
    print_machine(facts)
    started = time.perf_counter()
    results = run(args)
    print(f"\n{time.perf_counter() - started:.0f} s")
    if args.json:
        write_json(args.json, benchmark, facts, results)


def table(rows: Iterable[Sequence[str]]) -> str:
    """Rows of cells, the first of which is the header; words to the left, numbers to the right."""
    lines = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    numeric = [all(re.match(r"[-+]?\d|-$|$", cell) for cell in column[1:]) for column in zip(*lines, strict=True)]

    def line(cells: Sequence[str]) -> str:
        aligned = zip(cells, widths, numeric, strict=True)
        return "  ".join(c.rjust(width) if right else c.ljust(width) for c, width, right in aligned).rstrip()

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([line(lines[0]), rule, *map(line, lines[1:])])


def write_json(path: Path, benchmark: str, facts: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> None:
    """``{"benchmark": ..., "machine": {...}, "results": [{...}, ...]}``; times in seconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"benchmark": benchmark, "machine": dict(facts), "results": [dict(result) for result in results]}
    path.write_text(json.dumps(content, indent=2) + "\n")
    print(f"results: {path}")
