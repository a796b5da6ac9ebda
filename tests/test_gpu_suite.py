"""The cases of bench/gpu_suite.py: those of its correctness phase on a GPU, the others in their dry form anywhere."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from generators import compiled_only
from paths import ROOT

from masked_ops import _cuda_recipe

sys.path.insert(0, str(ROOT / "bench"))
try:
    import gpu_suite
except ImportError as error:
    pytest.skip(f"bench is not there, or lacks a package: {error}", allow_module_level=True)

CASES = {case.name: case for case in gpu_suite.all_cases()}
ON_A_GPU = [name for name, case in CASES.items() if case.phase == "correctness" and "sanitizer" not in name]
DECIDE = ["laid-out-is-right", "decide-decode", "decide-gemm", "decide-convolutions"]
DRY = [
    *ON_A_GPU,
    "copies",
    "linear",
    "decode",
    "amp-steps",
    *DECIDE,
    "convolution-steps",
    "transformer-step",
]


@compiled_only
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.skipif(_cuda_recipe.nvcc() is None, reason="there is no nvcc")
@pytest.mark.parametrize("name", ON_A_GPU)
def test_on_a_gpu(name: str) -> None:
    rows = list(CASES[name].run(False))
    assert rows and all(row["ok"] for row in rows), rows


@compiled_only
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", DRY)
def test_dry(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_suite, "DRY_SECONDS", 0.0)
    rows = list(CASES[name].run(True))
    assert rows and all(row.get("ok", True) for row in rows), rows
    json.dumps(rows)
    assert gpu_suite.short([{"name": name, **row} for row in rows])


@compiled_only
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Each case in a process; what a case found before it failed is kept; the budget is kept."""
    monkeypatch.setenv("MASKED_OPS_CUDA", "1")
    file = tmp_path / "found.json"
    arguments = ["gpu_suite.py", "--phase", "timing", "--only", "copies", "--dry", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", [*arguments, "--budget-s", "60"])
    assert gpu_suite.main() == 0
    found = json.loads(file.read_text())
    assert found["machine"]["dry"] and found["results"][0]["name"] == "copies"
    assert "ceilings: " in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*arguments, "--budget-s", "3"])
    assert gpu_suite.main() == 1
    assert "FAILED copies: not run" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["gpu_suite.py", "--phase", "timing"])
    with pytest.raises(SystemExit):
        gpu_suite.main()
    assert "there is no CUDA device" in capsys.readouterr().err
