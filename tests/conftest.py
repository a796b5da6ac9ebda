"""What all tests share: which ``masked_ops`` is tested, a seed, the number of threads, fresh interpreters."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch
from paths import ROOT, RunPython

# The installed package is what users get; without one, the source tree.
if importlib.util.find_spec("masked_ops") is None:
    sys.path.insert(0, str(ROOT))

# No deadline: machines that run tests are busy. CI draws the same examples each time, so that red can be repeated.
# The device is the same for all examples of a test.
hypothesis.settings.register_profile(
    "masked_ops",
    deadline=None,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.register_profile("ci", parent=hypothesis.settings.get_profile("masked_ops"), derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "masked_ops")


@pytest.fixture(autouse=True)
def same_start() -> Iterator[None]:
    """Every test starts from the same seed, threads, default dtype and grad mode, whatever the one before it did."""
    threads = torch.get_num_threads()
    dtype = torch.get_default_dtype()
    if HAS_CUDA:
        torch.manual_seed(0)
    else:  # for devices that are not there it writes down the whole stack each time, which takes a millisecond
        torch.default_generator.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(True)


# Where there is a GPU, its kernels are tested, also those that are off by default. (What wants one builds them.)
if torch.cuda.is_available():
    os.environ.setdefault("MASKED_OPS_CUDA", "1")

# A CUDA device, or the fake one of tests/fake_cuda.
HAS_CUDA = torch.cuda.is_available() or "MASKED_OPS_TEST_FAKE_CUDA" in os.environ


collect_ignore_glob = ["fake_cuda/*"]
if "MASKED_OPS_TEST_FAKE_CUDA" in os.environ:
    import fake_device

    fake_device.install()
    collect_ignore_glob = []


# Files are shared out whole, in the order in which they are collected: what takes longest begins first.
LONGEST = ("test_cuda_host.py", "test_cuda_gates.py", "test_build.py", "test_compile.py", "test_cuda_gemm.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Longest files first."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How much the fence has seen, where there is to be one (make fence); an error where it is not loaded."""
    from masked_ops import _recipe

    if _recipe.enabled("MASKED_OPS_FENCE"):
        fence = ctypes.CDLL(None)
        count, missed = (ctypes.c_long.in_dll(fence, name).value for name in ("fence_count", "fence_missed"))
        terminalreporter.write_line(f"fence: {count} allocations of this process were fenced, {missed} were not")


@pytest.fixture(params=("cpu", "cuda") if HAS_CUDA else ("cpu",))
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """The test runs once on each kind of device that is there: torch's factories make their tensors on it.

    What is about a capability of the CPU, or forces one of its paths, runs there alone, and so does what is marked
    with cpu_only and the reason.
    """
    if request.param == "cpu":
        yield "cpu"
        return
    if marker := request.node.get_closest_marker("cpu_only"):
        pytest.skip(*marker.args)
    from generators import CAPABILITIES

    chosen = request.node.callspec.params
    if chosen.get("path") not in (None, "copy") or chosen.get("capability") not in (None, CAPABILITIES[0]):
        pytest.skip("about the CPU's kernels")
    with torch.device("cuda"):
        yield "cuda"


@pytest.fixture(params=(False, True), ids=("into_l1", "into_l2"))
def fetching(request: pytest.FixtureRequest) -> Iterator[None]:
    """The CPU's kernels read large weights as on CPUs that fetch them into L1, and as on those that do into L2."""
    from generators import _module

    if _module is None:
        pytest.skip("plain torch serves: nothing was compiled")
    before = _module.set_fetches_into_l2(request.param)
    yield
    _module.set_fetches_into_l2(before)


@pytest.fixture(scope="session")
def run_python() -> RunPython:
    """``run_python(code, *arguments, timeout=120, **environment)`` runs code in a fresh interpreter on this masked_ops.

    An environment variable given as None is removed.
    """

    def run(
        code: str, *arguments: object, timeout: float = 120, **environment: object
    ) -> subprocess.CompletedProcess[str]:
        spec = importlib.util.find_spec("masked_ops")
        assert spec is not None and spec.origin is not None
        variables = {**os.environ, "PYTHONPATH": str(Path(spec.origin).parent.parent), **environment}
        return subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            env={name: str(value) for name, value in variables.items() if value is not None},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run
