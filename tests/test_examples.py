"""The examples and the benchmarks run, from any folder, and show what they say they show."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from paths import ROOT

import masked_ops


def run(folder: Path, script: str, *arguments: str) -> str:
    """What the script prints, started in ``folder``."""
    result = subprocess.run(
        [sys.executable, ROOT / script, *arguments],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": str(Path(masked_ops.__file__).parent.parent),
            # Two threads in each of several processes wait for each other, where a machine runs other tests as well.
            "OMP_NUM_THREADS": "1",
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == "", "no warnings, and progress bars are for terminals"
    return result.stdout


def test_prune_digits(tmp_path: Path) -> None:
    output = run(tmp_path, "examples/prune_digits.py", "--quick", "--seed", "1")
    cells = r" +([\d.]+)% +[\d.]+ s +[\d.]+ s +[\d.]+ s +([\d.]+) MB +([\d.]+) MB +([\d.]+) MB$"
    rows = {}
    for name in ("dense", "hook", "masked_ops", "packed"):
        match = re.search(f"^{name}{cells}", output, re.MULTILINE)
        assert match, output
        rows[name] = dict(zip(("accuracy", "saved", "state", "model"), map(float, match.groups()), strict=True))
    dense, hook, ours, packed = rows.values()
    assert all(row["accuracy"] > 80 for row in rows.values())
    assert dense["saved"] <= ours["saved"] < hook["saved"]
    assert dense["state"] < ours["state"] == hook["state"]
    assert packed["model"] < dense["model"] < ours["model"] < hook["model"]

    assert re.search(r"^total +90\.0%", output, re.MULTILINE), output
    assert "of class Conv2d, Linear again" in output
    assert "360 answers of 360 agree" in output
    assert (tmp_path / "out" / "prune_digits.png").read_bytes().startswith(b"\x89PNG")


def test_overhead_benchmark(tmp_path: Path) -> None:
    """That it runs; what it measures depends on what else the machine does, and is not judged here."""
    output = run(tmp_path, "bench/overhead.py", "--seconds", "0.001", "--json", "results/overhead.json")
    assert "masked_ops over the hook's function" in output
    content = json.loads((tmp_path / "results" / "overhead.json").read_text())
    assert content["machine"]["masked_ops"] == masked_ops.__version__
    assert content["machine"]["threads"] == 1
    contenders = {result["contender"] for result in content["results"]}
    assert {"masked_ops(x, w, m, b)", "torch's prune", "masked_ops.prune"} <= contenders
    assert all(0 < result["minimum"] <= result["median"] for result in content["results"])
