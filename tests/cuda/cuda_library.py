"""csrc/cuda as a library of its own, called through its C interface: on a GPU, and on the CPU by emulation."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from builds import built, compiler
from torch import Tensor

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parent.parent / "csrc" / "cuda"
LIBRARY = "library.so"
DTYPES = (
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
)  # in the order of masked_ops::cuda::Dtype


class UnsupportedError(RuntimeError):
    """The kernel refused before it launched anything."""


def _build(folder: Path, compile_: list[str], sources: dict[Path, list[str]], link: list[str], jobs: int) -> None:
    """Of sources, each with flags of its own."""

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.name}.o"
        command = [*compile_, *sources[source], "-c", str(source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{source.name}:\n{done.stdout}{done.stderr}"
        assert "warning" not in done.stderr, done.stderr
        return target

    with ThreadPoolExecutor(jobs) as pool:
        objects = [str(target) for target in pool.map(compile_one, sources)]
    subprocess.run([*link, *objects, "-o", str(folder / LIBRARY)], check=True)


def emulated() -> Path:
    """Every .cu file compiled as C++, on the model of a device beside this file."""
    sources = [Path(__file__), *HERE.glob("emulator.*"), *SOURCES.iterdir()]
    return built("emulated", sources, _build_emulated) / LIBRARY


def _build_emulated(folder: Path) -> None:
    flags = ["-std=c++20", "-fPIC", "-DMASKED_OPS_EMULATE", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
    flags += ["-Wno-maybe-uninitialized", f"-I{HERE}", f"-I{SOURCES}", "-x", "c++"]
    # The model is not what is tested; most of the time goes into its products.
    sources = {HERE / "emulator.cpp": ["-O3"]}
    checked = ["-O1", "-fsanitize=undefined", "-fno-sanitize-recover=undefined"]
    sources |= dict.fromkeys(sorted(SOURCES.glob("*.cu")), checked)
    jobs = int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))
    _build(folder, [*compiler(), *flags], sources, [*compiler(), "-shared", "-fsanitize=undefined"], jobs)


def native() -> Path:
    """Compiled for the GPU that is there."""
    major, minor = torch.cuda.get_device_capability()
    architecture = "90a" if (major, minor) == (9, 0) else f"{major}{minor}"
    sources = [Path(__file__), *SOURCES.iterdir()]
    return built(f"native-{architecture}", sources, functools.partial(_build_native, architecture)) / LIBRARY


def _build_native(architecture: str, folder: Path) -> None:
    flags = ["nvcc", "-std=c++17", "-O3", "-Xcompiler", "-fPIC"]
    flags += ["-gencode", f"arch=compute_{architecture},code=sm_{architecture}"]
    sources: dict[Path, list[str]] = {source: [] for source in sorted(SOURCES.glob("*.cu"))}
    _build(folder, flags, sources, ["nvcc", "-shared", "-cudart", "static"], 4)


class Library:
    """The C functions on tensors of one device; an error becomes an exception."""

    def __init__(self, path: Path, device: str) -> None:
        self.device = device
        self.emulated = device == "cpu"
        self._library = ctypes.CDLL(str(path))
        self._library.masked_ops_cuda_error_string.restype = ctypes.c_char_p
        self._kept: list[Any] = []  # memory with guards, for as long as a test runs

    def __call__(self, name: str, *arguments: Any) -> None:
        function = getattr(self._library, f"masked_ops_cuda_{name}")
        status = function(*map(_argument, arguments), None)
        if status == -1:
            raise UnsupportedError(name)
        if status:
            message = self._library.masked_ops_cuda_error_string(status)
            raise RuntimeError(f"{name}: error {status}: {message.decode()}")
        if not self.emulated:
            torch.cuda.synchronize()

    def size(self, name: str, *arguments: Any) -> int:
        function = getattr(self._library, f"masked_ops_cuda_{name}")
        function.restype = ctypes.c_size_t
        return int(function(*map(_argument, arguments)))

    def set_mode(self, lazy: bool, order: int) -> None:
        if self.emulated:
            self._library.emulator_set_mode(int(lazy), order)

    def set_device(self, capability: int = 90, multiprocessors: int = 132) -> None:
        if self.emulated:
            self._library.emulator_set_device(capability, multiprocessors)

    def bank_conflicts(self) -> int:
        """Of ldmatrix and stmatrix since it was last asked; on a GPU they are not counted."""
        if not self.emulated:
            return 0
        self._library.emulator_bank_conflicts.restype = ctypes.c_int64
        return int(self._library.emulator_bank_conflicts())

    def cluster(self) -> int:
        """Blocks of a cluster in the last launch; on a GPU that is not known."""
        return int(self._library.emulator_cluster()) if self.emulated else 0

    def empty(self, shape: tuple[int, ...] | int, dtype: torch.dtype, offset: int = 0) -> Tensor:
        """Poisoned memory, on the CPU with its end against a page that must not be touched.

        It is aligned to 16 bytes and ``offset`` bytes more.
        """
        shape = (shape,) if isinstance(shape, int) else shape
        count = torch.Size(shape).numel()
        size = count * dtype.itemsize
        if not self.emulated:
            whole = torch.full((size + 16 + offset,), 0xA5, dtype=torch.uint8, device=self.device)
            return whole[offset : offset + size].view(dtype).view(shape)
        page = mmap.PAGESIZE
        bytes_ = (size + offset + 15) // 16 * 16
        pages = (bytes_ + page - 1) // page + 1
        memory = mmap.mmap(-1, pages * page)
        start = (ctypes.c_char * (pages * page)).from_buffer(memory)
        self._kept.append((start, memory))
        _protect(ctypes.addressof(start) + (pages - 1) * page, page)
        first = (pages - 1) * page - bytes_ + offset
        if size == 0:
            return torch.empty(shape, dtype=dtype)
        raw = torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=first)
        raw.fill_(0xA5)
        return raw.view(dtype).view(shape)

    def put(self, tensor: Tensor, offset: int = 0) -> Tensor:
        """A copy in such memory."""
        to = self.empty(tuple(tensor.shape), tensor.dtype, offset)
        to.copy_(tensor)
        return to

    def free(self) -> None:
        self._kept.clear()


_libc = ctypes.CDLL(None, use_errno=True)


def _protect(address: int, size: int) -> None:
    assert _libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), 0) == 0


def _argument(value: Any) -> Any:
    if isinstance(value, Tensor):
        assert value.is_contiguous()
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, torch.dtype):
        return ctypes.c_int(DTYPES.index(value))
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, Small):
        return ctypes.c_int(int(value))
    return ctypes.c_int64(value) if isinstance(value, int) else value


class Small(int):
    """An argument that is an int in C; all other integers are int64_t."""


def has_nvcc() -> bool:
    return shutil.which("nvcc") is not None
