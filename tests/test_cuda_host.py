"""The host side of the CUDA kernels, on a fake device (tests/fake_cuda), in processes of their own.

In each process torch believes in two CUDA devices, whose memory is the CPU's. The tests there drive dispatch, autograd,
the choice of path, the cache, streams, capture and errors through the real host code, down to csrc/cuda/api.h.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builds import built, compiler
from generators import compiled_only
from paths import ROOT

import masked_ops

pytestmark = [
    compiled_only,
    pytest.mark.skipif(torch.backends.cuda.is_built(), reason="the fake device is for a torch without CUDA"),
]

HERE = Path(__file__).resolve().parent / "fake_cuda"
sys.path[:0] = [str(HERE), str(HERE.parent / "cuda")]
import cuda_library  # noqa: E402
import fake_device  # noqa: E402


@pytest.fixture(scope="module")
def device() -> Path:
    csrc = ROOT / "csrc"
    sources = [Path(__file__), *HERE.glob("*.cpp"), *csrc.glob("*.h"), *csrc.glob("cuda/*.h")]
    return built("fake_cuda", sources, build)


def build(folder: Path) -> None:
    home = Path(torch.__file__).parent
    libraries = [str(home / "lib" / f"lib{name}.so") for name in ("torch_cpu", "c10")]
    command = [*compiler(), "-std=c++20", "-fPIC", "-shared"]
    device = ["-O1", "-isystem", str(home / "include"), str(HERE / "fake_device.cpp"), *libraries]
    kernels = ["-O3", f"-I{ROOT / 'csrc'}", str(HERE / "fake_kernels.cpp")]
    device += [f"-Wl,-rpath,{home / 'lib'}", "-o", str(folder / fake_device.DEVICE)]
    kernels += ["-o", str(folder / fake_device.KERNELS)]
    for running in [subprocess.Popen([*command, *arguments]) for arguments in (device, kernels)]:
        assert running.wait() == 0


def run(device: Path, *tests: Path | str, **variables: str) -> None:
    package = Path(masked_ops.__file__).parent.parent
    variables |= {"MASKED_OPS_TEST_FAKE_CUDA": str(device), "PYTHONPATH": f"{HERE}{os.pathsep}{package}"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "fake_device", "-p", "no:cacheprovider", *map(str, tests)]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-4000:]}"


@pytest.mark.parametrize(
    ("tests", "switch"),
    [("test_kernels.py", "1"), ("test_compact.py", "1"), ("test_default.py", ""), ("test_off.py", "0")],
    ids=["on", "compact", "default", "off"],
)
def test_on_a_fake_device(device: Path, tests: str, switch: str) -> None:
    run(device, HERE / tests, MASKED_OPS_CUDA=switch)


def test_with_little_room(device: Path) -> None:
    run(device, HERE / "test_little_room.py", MASKED_OPS_CUDA="1", MASKED_OPS_CACHE_BYTES=str(4 << 20))


slow = pytest.mark.skipif(
    not {"CI", "MASKED_OPS_CUDA_CHECK"} & os.environ.keys(), reason="takes a minute: make cuda-check"
)


@slow
def test_with_emulated_kernels(device: Path) -> None:
    library = cuda_library.emulated()
    run(device, HERE / "test_emulated.py", MASKED_OPS_CUDA="1", MASKED_OPS_TEST_EMULATED=str(library))


@slow
def test_what_a_gpu_would_run(device: Path) -> None:
    """The tests of the operations that run on each kind of device that is there."""
    files = [
        HERE.parent / f"test_{name}.py" for name in ("apply_mask", "autograd", "convolution", "linear", "packed_linear")
    ]
    run(device, "-k", "cuda", *files, MASKED_OPS_CUDA="1")
