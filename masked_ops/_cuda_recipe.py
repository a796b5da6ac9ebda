"""What the library of CUDA kernels is made of: architectures, sources, flags, key; and where its compiler is.

It is a library by itself, which the other one loads: neither nvcc's absence nor another version of it touches the
kernels of the CPU. It sees no torch and no Python, and holds the CUDA runtime statically, so that it also loads where
there is no driver.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ._recipe import BuildError, LibraryRecipe, Object, compiler, enabled, identity, source_root

VARIABLE = "MASKED_OPS_CUDA"


def cuda_switch() -> bool | None:
    """What MASKED_OPS_CUDA says: 1 builds the kernels whatever torch is, and uses those that no GPU has confirmed;
    0 uses none; None, if it says nothing."""
    return enabled(VARIABLE) if os.environ.get(VARIABLE) else None


def torch_has_cuda() -> bool:
    """Whether torch was built for CUDA (and not for ROCm, which takes its place)."""
    import torch

    return torch.version.cuda is not None


# --- nvcc ------------------------------------------------------------------------------------------------------------


def _candidates() -> Iterator[Path]:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(variable):
            yield Path(home, "bin", "nvcc")
    if found := shutil.which("nvcc"):
        yield Path(found)
    yield Path("/usr/local/cuda/bin/nvcc")
    # The compiler's packages on PyPI share one folder; those for CUDA 12 have no nvcc.
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or () if spec else ():
        yield from sorted(Path(folder).glob("cu[0-9]*/bin/nvcc"), reverse=True)


def nvcc() -> Path | None:
    """The CUDA compiler: CUDACXX, that of CUDA_HOME or CUDA_PATH, on the PATH, in /usr/local/cuda, or from PyPI."""
    chosen = os.environ.get("CUDACXX")
    if chosen:
        found = shutil.which(chosen)
        return Path(found) if found else None
    return next((path for path in _candidates() if os.access(path, os.X_OK) and path.is_file()), None)


@functools.cache
def _release(path: Path, stamp: int) -> str:
    """nvcc's version line. It is asked, since the program that is called so may be a script beside any toolkit."""
    del stamp  # another file of the same name is asked again
    try:
        done = subprocess.run(
            [path, "--version"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"does not run: {error}"
    return CudaRecipe.version_line(done.stdout)


# --- recipe ----------------------------------------------------------------------------------------------------------

# Anything but these runs the code of the next lower one of its generation.
PORTABLE = ("sm_80", "sm_90a")
_NEWER = {10: "sm_100", 11: "sm_110", 12: "sm_120"}


def architecture(major: int, minor: int) -> str:
    """The architecture to compile for, for a device of this compute capability.

    Raises:
        BuildError: if the kernels do not run on it.
    """
    if major < 8:
        raise BuildError(f"the CUDA kernels need compute capability 8.0 or newer, the device has {major}.{minor}")
    if major == 8:
        return "sm_80"
    if major == 9:
        return "sm_90a"
    return _NEWER.get(major, f"sm_{major}0")


@dataclass(frozen=True)
class CudaRecipe(LibraryRecipe):
    """The kernels of CUDA: ``csrc/cuda/*.cu``, each compiled once for all architectures."""

    architectures: tuple[str, ...]

    library = "libmasked_ops_cuda.so"
    prebuilt = "cuda"
    folder_prefix = "cuda-"
    advice = (
        "install the CUDA toolkit and name it in CUDA_HOME, or pip install nvidia-cuda-nvcc nvidia-cuda-crt "
        "nvidia-nvvm nvidia-cuda-runtime nvidia-cuda-cccl"
    )
    probe = '#include <cuda_runtime.h>\nextern "C" __global__ void probe(float* x) { x[threadIdx.x] = 1; }\n'

    @functools.cached_property
    def sources(self) -> dict[str, bytes]:
        return self._read_sources((self.source_root / "cuda").rglob("*"))

    @functools.cached_property
    def requirements(self) -> dict[str, Any]:
        return self._common_requirements() | {"kind": "cuda"}

    def facts(self) -> dict[str, Any]:
        return {"architectures": list(self.architectures)}

    def rank(self, record: dict[str, Any]) -> int | None:
        return 0 if set(self.architectures) <= set(record["architectures"]) else None

    def _toolchain(self) -> dict[str, Any]:
        path = nvcc()
        release = _release(path, path.stat().st_mtime_ns) if path else None
        return {"nvcc": release, "host": identity(_host_compiler())}

    @property
    def targets(self) -> tuple[str, ...]:
        return self.architectures

    @functools.cached_property
    def objects(self) -> list[Object]:
        codes = [f"-gencode=arch={name.replace('sm_', 'compute_')},code={name}" for name in self.architectures]
        flags = ("-std=c++17", "-O3", "-lineinfo", *codes, "-Xcompiler", "-fPIC", "-DNDEBUG")
        return [
            Object((name,), f"{name.replace('/', '.')}.o", flags, name, 2.0 + 3.0 * len(codes))
            for name in self.sources
            if name.endswith(".cu")
        ]

    @property
    def link_flags(self) -> tuple[str, ...]:
        # The runtime's symbols stay inside: torch has a CUDA runtime of its own.
        return ("-shared", "-cudart", "static", "-Xlinker", "--exclude-libs,ALL", "-Xlinker", "--no-undefined")

    def compiler(self) -> list[str]:
        path, host = nvcc(), _host_compiler()
        return [str(path), "-ccbin", host[0], *(f"-Xcompiler={word}" for word in host[1:])] if path and host else []

    @staticmethod
    def version_line(output: str) -> str:
        return next((line for line in output.splitlines() if "release" in line), output.partition("\n")[0])


def _host_compiler() -> list[str]:
    """The C++ compiler without a launcher in front of it, which nvcc could not call."""
    command = compiler()
    launchers = ("ccache", "sccache", "distcc")
    if len(command) > 1 and os.path.basename(command[0]) in launchers:
        program = shutil.which(command[1])
        return [program, *command[2:]] if program else []
    return command


def cuda_recipe(capabilities: Iterable[tuple[int, int]] = (), *, ahead: bool = False) -> CudaRecipe:
    """The recipe for devices of these compute capabilities; without any, and ahead of time, for sm_80 and sm_90a."""
    from ._version import __version__

    names = set() if ahead else {architecture(*capability) for capability in capabilities}
    return CudaRecipe(__version__, source_root(), tuple(sorted(names or PORTABLE)))
