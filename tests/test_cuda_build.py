"""How the library of CUDA kernels is made, on a stand-in of a few lines; most of it needs no nvcc, and none a GPU."""

from __future__ import annotations

import ctypes
import os
import shutil
from pathlib import Path

import pytest
import torch

from masked_ops import _build, _cuda, _cuda_recipe
from masked_ops._build import BuildError
from masked_ops._cuda_recipe import CudaRecipe
from masked_ops._recipe import Recipe

SOURCES = {
    "cuda/api.h": '#pragma once\nextern "C" int answer(int* devices);\n',
    "cuda/answer.cu": """\
#include <cuda_runtime.h>
#include "api.h"
__global__ void kernel(float* x) { x[threadIdx.x] = 1; }
extern "C" int answer(int* devices) { return cudaGetDeviceCount(devices); }
""",
    "cuda/answer.cuh": "",
}
SETTINGS = ("CUDACXX", "CUDA_HOME", "CUDA_PATH", "MASKED_OPS_CUDA", "MASKED_OPS_NO_BUILD", "MASKED_OPS_SANITIZE")

needs_nvcc = pytest.mark.skipif(_cuda_recipe.nvcc() is None, reason="there is no nvcc")


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASKED_OPS_CACHE_DIR", str(tmp_path / "a cache"))
    monkeypatch.setattr(_build, "_PREBUILT", tmp_path / "no prebuilt library")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # what is built does not depend on this machine's


def make_recipe(folder: Path, changes: dict[str, str] | None = None, architectures: tuple[str, ...] = ("sm_80",)):
    for name, content in (SOURCES | (changes or {})).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return CudaRecipe("0", folder, architectures)


# Answers as nvcc does when it is asked for its version, and compiles nothing.
NVCC = "#!/bin/sh\necho 'nvcc: NVIDIA (R) Cuda compiler driver'\necho 'Cuda compilation tools, release {}'\nexit 1\n"


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "toolkit" / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    path.write_text(NVCC.format("13.0, V13.0.88"))
    path.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    return path


def test_architectures_follow_the_devices() -> None:
    def architectures(*capabilities: tuple[int, int]) -> tuple[str, ...]:
        return _cuda_recipe.cuda_recipe(capabilities).architectures

    assert architectures() == ("sm_80", "sm_90a")
    assert architectures((8, 0), (8, 6), (8, 9)) == ("sm_80",)
    assert architectures((9, 0)) == ("sm_90a",)
    assert architectures((8, 6), (9, 0)) == ("sm_80", "sm_90a")
    assert architectures((12, 0)) == ("sm_120",)
    assert _cuda_recipe.cuda_recipe([(9, 0)], ahead=True).architectures == ("sm_80", "sm_90a")
    with pytest.raises(BuildError, match=r"need compute capability 8\.0 or newer, the device has 7\.5"):
        architectures((7, 5))


@pytest.mark.usefixtures("stand_in")
def test_what_is_in_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = make_recipe(tmp_path / "a").key
    assert make_recipe(tmp_path / "elsewhere").key == key
    for name, content in SOURCES.items():
        assert make_recipe(tmp_path / name.replace("/", " "), {name: content + "//\n"}).key != key
    assert make_recipe(tmp_path / "a", architectures=("sm_90a",)).key != key
    assert CudaRecipe("1", tmp_path / "a", ("sm_80",)).key != key
    compiler = tmp_path / "another g++"
    shutil.copy(shutil.which("g++") or "", compiler)
    monkeypatch.setenv("CXX", f"'{compiler}'")
    assert make_recipe(tmp_path / "a").key != key


def test_the_release_of_nvcc_is_in_the_key(tmp_path: Path, stand_in: Path) -> None:
    key = make_recipe(tmp_path / "csrc").key
    stand_in.write_text(NVCC.format("13.1, V13.1.2"))
    os.utime(stand_in, (1, 1))
    assert make_recipe(tmp_path / "csrc").key != key


def test_the_cpu_library_depends_on_the_interface_alone(tmp_path: Path) -> None:
    def cpu(changes: dict[str, str]) -> str:
        return Recipe("0", make_recipe(tmp_path / "csrc", changes).source_root, ("default",), torch=False).key

    key = cpu({})
    assert cpu({"cuda/answer.cu": "// another kernel\n", "cuda/answer.cuh": "// and header\n"}) == key
    assert cpu({"cuda/api.h": "// another interface\n"}) != key


@needs_nvcc
@pytest.mark.usefixtures("capsys")
def test_a_library_is_built_and_loads_without_a_driver(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path / "csrc $HOME")
    library = _build.build(recipe)
    assert library.name == "libmasked_ops_cuda.so" and library.parent.name == recipe.folder_name
    loaded = ctypes.CDLL(str(library))
    devices = ctypes.c_int(-1)
    error = loaded.answer(ctypes.byref(devices))
    assert (error == 0) == (devices.value > 0), (error, devices)
    assert not hasattr(loaded, "cudaGetDeviceCount")  # torch has a runtime of its own
    record = _build.read_record(library.parent, recipe.library)
    assert record is not None and record["architectures"] == ["sm_80"] and "release" in record["compiler"]
    # One that was made for more devices than are here serves; one for other devices does not.
    assert _build.find_library(recipe) == library
    assert _build.find_library(make_recipe(tmp_path / "csrc $HOME", architectures=("sm_90a",))) is None


@needs_nvcc
def test_an_error_in_a_kernel_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BuildError, match=r"cannot be compiled: .*undefined_here"):
        _build.build(make_recipe(tmp_path / "csrc", {"cuda/answer.cu": "int x = undefined_here;\n"}))
    assert "compiling 1 files for sm_80" in capsys.readouterr().err


@pytest.mark.usefixtures("stand_in")
def test_an_nvcc_that_cannot_compile_is_named(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"nvcc.* cannot build .*install the CUDA toolkit"):
        _build.build(make_recipe(tmp_path / "csrc"))


def test_no_nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDACXX", str(tmp_path / "nvcc"))
    assert _cuda_recipe.nvcc() is None
    with pytest.raises(BuildError, match=r"there is no nvcc; install the CUDA toolkit and name it in CUDA_HOME, or"):
        _build.build(make_recipe(tmp_path / "csrc"))


def test_launchers_are_not_nvccs_host_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stand_in: Path) -> None:
    (tmp_path / "ccache").symlink_to(stand_in)
    monkeypatch.setenv("CXX", f"'{tmp_path}/ccache' g++ -m64")
    command = make_recipe(tmp_path / "csrc").compiler()
    assert command == [str(stand_in), "-ccbin", shutil.which("g++"), "-Xcompiler=-m64"]


def test_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _cuda_recipe.cuda_switch() is None
    monkeypatch.setenv("MASKED_OPS_CUDA", "0")
    assert _cuda_recipe.cuda_switch() is False
    monkeypatch.setenv("MASKED_OPS_CUDA", "1")
    assert _cuda_recipe.cuda_switch() is True


# --- loading ---------------------------------------------------------------------------------------------------------


def test_who_gets_the_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert _cuda.load() == ("", "this torch was built without CUDA")
    monkeypatch.setenv("MASKED_OPS_CUDA", "0")
    assert _cuda.load() == ("", "MASKED_OPS_CUDA=0 turns the CUDA kernels off")
    built = tmp_path / "library.so"
    monkeypatch.setattr(_build, "build", lambda recipe: built)
    monkeypatch.setenv("MASKED_OPS_CUDA", "1")
    assert _cuda.load() == (str(built), "")
    monkeypatch.delenv("MASKED_OPS_CUDA")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert _cuda.load() == (str(built), "")


def test_a_cuda_torch_without_nvcc_is_told_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDACXX", str(tmp_path / "nvcc"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.warns(RuntimeWarning, match="torch's own operations on CUDA devices: .*there is no nvcc; install"):
        path, reason = _cuda.load()
    assert path == "" and "there is no nvcc" in reason


def test_the_kernels_are_built_for_the_devices_that_can_run_them(monkeypatch: pytest.MonkeyPatch) -> None:
    capabilities = [(7, 5), (9, 0)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
    assert _cuda.recipe().architectures == ("sm_90a",)
    capabilities.pop()
    with pytest.raises(BuildError, match="need compute capability"):
        _cuda.recipe()
