"""Checks that run in two processes at once, as ranks of one gloo group."""

from __future__ import annotations

import copy
import os
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

Check = Callable[..., None]


def name_of(check: Check) -> str:
    return check.__name__.removeprefix("check_")


def share(x: torch.Tensor) -> torch.Tensor:
    """This rank's half of a batch."""
    return x.chunk(2)[dist.get_rank()]


def _rank(rank: int, folder: str, checks: Sequence[Check], arguments: tuple[Any, ...]) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for check in checks:
        try:
            check(*copy.deepcopy(arguments))
            failure = ""
        except BaseException:  # pytest's failures are no Exceptions
            failure = traceback.format_exc()
        Path(folder, f"{check.__name__}.{rank}").write_text(failure)
        if failure:
            break  # the other rank may wait for this one in a collective for ever
    dist.destroy_process_group()
    # fully_shard's modules lie in cycles that hold the group. When it is the interpreter's end that frees them, torch
    # aborts the process now and then ("terminate called without an active exception"), without masked_ops too.
    os._exit(0)


def run_in_two_processes(
    checks: Sequence[Check], folder: Path, arguments: tuple[Any, ...], limit_s: float = 240
) -> None:
    """Runs all checks on copies of ``arguments``, which get there by pickle; each rank leaves a report on each."""
    context = torch.multiprocessing.spawn(_rank, (str(folder), checks, arguments), nprocs=2, join=False)
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline and not context.join(timeout=0.2):
        if any(file.read_text() for file in folder.glob("check_*")):
            break
    for process in context.processes:
        process.kill()


def assert_passed(check: Check, folder: Path) -> None:
    for rank in range(2):
        report = folder / f"{check.__name__}.{rank}"
        assert report.exists(), f"rank {rank} did not get this far"
        assert not report.read_text(), report.read_text()
