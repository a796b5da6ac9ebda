"""What the C++ library is made of: capability, sources, flags, and the key that tells one library from another.

Nothing here runs a program or imports torch before its facts are asked for.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import sys
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

_PACKAGE = Path(__file__).resolve().parent


class BuildError(RuntimeError):
    """The library cannot be built or loaded; the message says why, and what to do about it."""


def enabled(variable: str) -> bool:
    """Whether an environment variable is set, to anything but 0."""
    return os.environ.get(variable, "0") not in ("", "0")


# --- capability ------------------------------------------------------------------------------------------------------

# Per capability, best first: what the CPU must report (as in /proc/cpuinfo) and the compiler flag that relies on it.
# Never -march=native: GCC 12 takes a Zen 5 for a Zen 3, without AVX-512, and unlike machines share home folders.
_AVX2 = {
    "avx2": "-mavx2",
    "fma": "-mfma",
    "f16c": "-mf16c",
    "bmi1": "-mbmi",
    "bmi2": "-mbmi2",
    "popcnt": "-mpopcnt",
    "abm": "-mlzcnt",
}
_AVX512 = _AVX2 | {
    "avx512f": "-mavx512f",
    "avx512bw": "-mavx512bw",
    "avx512dq": "-mavx512dq",
    "avx512vl": "-mavx512vl",
}
CAPABILITIES: dict[str, dict[str, str]] = {"avx512": _AVX512, "avx2": _AVX2, "default": {}}
# Used where the building machine has it, and then needed by the library; never part of a build ahead of time.
_EXTRAS: dict[str, dict[str, str]] = {
    "avx512": {"avx512_bf16": "-mavx512bf16", "avx512_vbmi2": "-mavx512vbmi2"},
    "avx2": {},
    "default": {},
}


@functools.cache
def cpu_flags() -> frozenset[str]:
    """The instruction sets that the CPU reports and the kernel allows; empty where they are unknown."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        for line in lines:
            if line.startswith("flags"):
                return frozenset(line.partition(":")[2].split())
    return frozenset()


def usable_capabilities() -> list[str]:
    """The capabilities that may be used in this process, best first."""
    names = list(CAPABILITIES)
    limit = os.environ.get("MASKED_OPS_CAPABILITY")
    if limit:
        names = names[names.index(_checked(limit, "MASKED_OPS_CAPABILITY")) :]
    return [name for name in names if cpu_flags().issuperset(CAPABILITIES[name])]


def capability() -> str:
    """The best capability that the CPU has: "avx512", "avx2" or "default"; MASKED_OPS_CAPABILITY lowers it."""
    return usable_capabilities()[0]


def _checked(name: str, variable: str) -> str:
    name = name.strip().lower()
    if name not in CAPABILITIES:
        raise BuildError(f"{variable} takes {', '.join(CAPABILITIES)}, got {name!r}")
    return name


# --- flags -----------------------------------------------------------------------------------------------------------

_COMMON_FLAGS = (
    "-std=c++20",
    "-fPIC",
    "-fvisibility=hidden",
    "-fvisibility-inlines-hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-DNDEBUG",
)
_TORCH_FLAGS = ("-O2",)
_KERNEL_FLAGS = ("-O3", "-ffp-contract=fast")
_LINK_FLAGS = ("-shared", "-Wl,--as-needed", "-Wl,-O1", "-Wl,-z,relro,-z,now")
# vptr would need the type information of torch's hidden classes.
_SANITIZE_FLAGS = (
    "-O1",
    "-g",
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined",
    "-fno-sanitize=vptr",
    "-fno-sanitize-recover=undefined",
)
_FENCE_FLAGS = ("-g", "-DMASKED_OPS_FENCE")


def _checking_flags() -> tuple[str, ...]:
    sanitize = _SANITIZE_FLAGS if enabled("MASKED_OPS_SANITIZE") else ()
    return sanitize + (_FENCE_FLAGS if enabled("MASKED_OPS_FENCE") else ())


# torch's headers take longer to read than most of the files that include them: files that need the same headers are
# compiled as one, which halves the time of the first build. By the first word of the file's name; all others are
# "core".
_JOINT = {"autograd": "autograd", "register": "autograd"}
_JOINT_SECONDS = {"autograd": 21.0, "core": 10.0}

# --- recipe ----------------------------------------------------------------------------------------------------------


class Object(NamedTuple):
    """One run of the compiler."""

    sources: tuple[str, ...]  # below source_root; more than one are compiled as one
    name: str  # of the object file
    flags: tuple[str, ...]
    label: str
    seconds: float  # a rough guess, for the order and for the time that is announced


@dataclass(frozen=True)
class LibraryRecipe(ABC):
    """What goes into one library: the kernels of the CPU (``Recipe``), or those of CUDA (``CudaRecipe``)."""

    version: str
    source_root: Path

    library: ClassVar[str]  # its file's name
    prebuilt: ClassVar[str]  # where a build ahead of time lies within the package
    probe: ClassVar[str]  # the source of a tiny library that the compiler must be able to make
    advice: ClassVar[str]  # where it is not
    folder_prefix: ClassVar[str] = ""

    def _read_sources(self, paths: Iterable[Path]) -> dict[str, bytes]:
        chosen = sorted(path for path in paths if path.suffix in {".cpp", ".h", ".cu", ".cuh"})
        return {path.relative_to(self.source_root).as_posix(): path.read_bytes() for path in chosen}

    @functools.cached_property
    @abstractmethod
    def sources(self) -> dict[str, bytes]:
        """Every source and header by its path below ``source_root``."""

    @functools.cached_property
    @abstractmethod
    def requirements(self) -> dict[str, Any]:
        """What a library must share with this process to be the right one; all else is only how it was compiled."""

    def _common_requirements(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for name, content in self.sources.items():
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
        return {
            "version": self.version,
            "sources": digest.hexdigest(),
            "machine": f"{sys.platform} {platform.machine()}",
        }

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What the library's record says beside its requirements; ``rank`` reads it."""

    @abstractmethod
    def rank(self, record: dict[str, Any]) -> int | None:
        """How good a library of these requirements and this record is here (0 is best); None if it cannot be used."""

    @abstractmethod
    def _toolchain(self) -> dict[str, Any]:
        """What else decides the library's bits."""

    @functools.cached_property
    def key(self) -> str:
        """Equal keys mean equal libraries."""
        facts = {
            "requirements": self.requirements,
            "objects": [(item.name, item.sources, item.flags) for item in self.objects],
            "link": self.link_flags,
            "libc": os.confstr("CS_GNU_LIBC_VERSION"),
            **self._toolchain(),
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def folder_name(self) -> str:
        return f"{self.version}-{self.folder_prefix}{self.key}"

    @property
    @abstractmethod
    def targets(self) -> tuple[str, ...]:
        """What it is compiled for, as the user is told."""

    @functools.cached_property
    @abstractmethod
    def objects(self) -> list[Object]:
        """The object files in the order of linking."""

    @property
    @abstractmethod
    def link_flags(self) -> tuple[str, ...]: ...

    @abstractmethod
    def compiler(self) -> list[str]:
        """The compiler's command; empty if there is none."""

    @staticmethod
    def version_line(output: str) -> str:
        """Of what the compiler says of its version, the line that tells it."""
        return output.partition("\n")[0]


@dataclass(frozen=True)
class Recipe(LibraryRecipe):
    """The kernels of the CPU, and all that sees torch.

    ``csrc/*.cpp`` sees torch and is compiled once, for any CPU of the platform, several files together.
    ``csrc/cpu/*.cpp`` sees no torch and is compiled once per capability, into a namespace of that name
    (``MASKED_OPS_CAPABILITY``), or once for any CPU if its first line says ``capability: none``. New files are found by
    themselves. Of ``csrc/cuda`` it takes the interface.
    """

    capabilities: tuple[str, ...]
    extras: frozenset[str] = frozenset()
    torch: bool = True  # whether the sources see torch

    library = "libmasked_ops.so"
    prebuilt = "."
    advice = "install g++ 11 or newer (apt-get install g++), or name another compiler in CXX"
    probe = """\
#if defined(__clang__) ? __clang_major__ < 14 : __GNUC__ < 11
#error "masked_ops needs GCC 11 or Clang 14, or a newer one"
#endif
#include <bit>
#include <concepts>
#include <vector>
template <std::integral T> std::vector<T> probe(T x) { return {std::bit_ceil(x)}; }
template std::vector<unsigned> probe(unsigned);
"""

    @functools.cached_property
    def sources(self) -> dict[str, bytes]:
        cuda, interface = self.source_root / "cuda", self.source_root / "cuda" / "api.h"
        paths = self.source_root.rglob("*")
        return self._read_sources(path for path in paths if cuda not in path.parents or path == interface)

    @functools.cached_property
    def requirements(self) -> dict[str, Any]:
        facts = self._common_requirements()
        facts["python"] = str(sysconfig.get_config_var("SOABI"))
        facts["sanitize"] = enabled("MASKED_OPS_SANITIZE")
        facts["fence"] = enabled("MASKED_OPS_FENCE")
        if self.torch:
            import torch

            runtime = openmp_runtime()
            facts["torch"] = f"{torch.__version__} {torch.version.git_version}"
            facts["openmp"] = runtime.name if runtime else None
        return facts

    def _toolchain(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"compiler": identity(compiler())}
        if self.torch:
            library = standard_library()
            facts |= {"pybind11": _pybind11_version(), "standard library": library.name if library else None}
        return facts

    def facts(self) -> dict[str, Any]:
        return {"capabilities": {name: sorted(self.cpu_flags(name)) for name in self.capabilities}}

    def rank(self, record: dict[str, Any]) -> int | None:
        capabilities: dict[str, list[str]] = record["capabilities"]
        for rank, name in enumerate(usable_capabilities()):
            if name in capabilities and cpu_flags().issuperset(capabilities[name]):
                return rank
        return None

    def compiler(self) -> list[str]:
        return compiler()

    @property
    def targets(self) -> tuple[str, ...]:
        return self.capabilities

    @property
    def link_flags(self) -> tuple[str, ...]:
        return _LINK_FLAGS + _checking_flags()

    def cpu_flags(self, capability: str) -> dict[str, str]:
        """What the CPU must report for the kernels of ``capability``, and the compiler's flag for it."""
        extras = {flag: option for flag, option in _EXTRAS[capability].items() if flag in self.extras}
        return CAPABILITIES[capability] | extras

    @functools.cached_property
    def objects(self) -> list[Object]:
        common = _COMMON_FLAGS + _checking_flags()
        have = tuple(f"-DMASKED_OPS_HAVE_{name.upper()}=1" for name in self.capabilities)
        objects = []
        kernels = []
        joint: dict[str, list[str]] = {}
        for source, content in self.sources.items():
            folder, _, file = source.rpartition("/")
            stem, _, suffix = file.rpartition(".")
            if suffix != "cpp":
                continue
            if folder == "":
                joint.setdefault(_JOINT.get(stem.partition("_")[0], "core"), []).append(source)
            elif folder == "cpu" and b"capability: none" in content.partition(b"\n")[0]:
                objects.append(Object((source,), f"cpu.{stem}.o", (*_KERNEL_FLAGS, *common, *have), source, 0.5))
            elif folder == "cpu":
                kernels.append((source, stem))
        for group, files in joint.items():
            label = f"{group} ({len(files)} files)" if len(files) > 1 else files[0]
            flags = (*_TORCH_FLAGS, *common, *have)
            objects.append(Object(tuple(files), f"{group}.o", flags, label, _JOINT_SECONDS[group]))
        # The linker keeps the first copy of an inline function that several files define. With the lowest capability
        # first, the copy that is kept runs wherever one of its users does; std::vector built for AVX-512 would not.
        for name in reversed([name for name in CAPABILITIES if name in self.capabilities]):
            flags = (*_KERNEL_FLAGS, *common, *self.cpu_flags(name).values(), f"-DMASKED_OPS_CAPABILITY={name.upper()}")
            for source, stem in kernels:
                seconds = len(self.sources[source]) / 2500  # the longest files first, or one core waits at the end
                objects.append(Object((source,), f"cpu.{stem}.{name}.o", flags, f"{source} ({name})", seconds))
        return objects


def source_root() -> Path:
    """Where ``csrc`` is: in the installed package, or beside it in the source tree."""
    for folder in (_PACKAGE / "csrc", _PACKAGE.parent / "csrc"):
        if folder.is_dir():
            return folder
    raise BuildError(f"the C++ sources are missing: no csrc in {_PACKAGE}; install masked_ops again")


def this_process(*, ahead: bool = False) -> Recipe:
    """The recipe for this process.

    It is for the best capability, or for those in MASKED_OPS_BUILD_CAPABILITIES ("avx2,default", or "all"). A build
    ahead of time takes all of the platform, and nothing that only this machine has.
    """
    from ._version import __version__

    of_platform = list(CAPABILITIES) if platform.machine() in ("x86_64", "AMD64") else ["default"]
    chosen = os.environ.get("MASKED_OPS_BUILD_CAPABILITIES") or ("all" if ahead else "")
    if chosen == "all":
        names = of_platform
    elif chosen:
        names = [_checked(name, "MASKED_OPS_BUILD_CAPABILITIES") for name in chosen.split(",")]
    else:
        names = [capability()]
    if not ahead and not set(names) & set(usable_capabilities()):
        usable = ", ".join(usable_capabilities())
        raise BuildError(f"MASKED_OPS_BUILD_CAPABILITIES is {chosen!r}, but this process can only use {usable}")
    extras = frozenset(flag for extra in _EXTRAS.values() for flag in extra) & cpu_flags()
    ordered = tuple(name for name in CAPABILITIES if name in names)
    return Recipe(__version__, source_root(), ordered, frozenset() if ahead else extras)


# --- what the library is compiled and linked with --------------------------------------------------------------------


def compiler() -> list[str]:
    """The C++ compiler's command: CXX, or the first of g++, c++ and clang++; empty if there is none."""
    chosen = os.environ.get("CXX")
    for command in [shlex.split(chosen)] if chosen else [["g++"], ["c++"], ["clang++"]]:
        program = shutil.which(command[0]) if command else None
        if program:
            return [os.path.abspath(program), *command[1:]]  # it runs in another folder
    return []


def identity(command: list[str]) -> list[Any]:
    """What tells one compiler from another without running it: file, size and time, through all links and wrappers."""
    identity: list[Any] = []
    for word in command:
        program = shutil.which(word)
        if program is None:
            identity.append(word)
        else:
            status = os.stat(program)
            identity.append([os.path.realpath(program), status.st_size, status.st_mtime_ns])
    return identity


def _loaded_libraries(name: str) -> list[Path]:
    """The libraries in this process whose file's name begins with what the pattern ``name`` matches."""
    with contextlib.suppress(OSError), open("/proc/self/maps") as maps:
        paths = {line.split(maxsplit=5)[5].rstrip("\n") for line in maps if ".so" in line}
        return sorted(Path(path) for path in paths if re.match(name, os.path.basename(path)))
    return []


def openmp_runtime() -> Path | None:
    """The OpenMP runtime that torch has loaded.

    Wheels may carry one under a name of their own; linking another would put two thread pools into the process.
    """
    import torch

    runtimes = _loaded_libraries(r"lib(gomp|iomp5|omp)\b")
    home = os.path.dirname(torch.__file__)
    own = [path for path in runtimes if path.is_relative_to(home) or path.is_relative_to(f"{home}.libs")]
    return next(iter(own or runtimes), None)


def standard_library() -> Path | None:
    """The shared C++ standard library that torch has loaded.

    Compilers that know only the static one (told so, or where the shared one's development link is missing) would put
    a second copy into ours. The two share the ids of some of their locale facets (unique symbols) and number the others
    each for itself: in the second copy two facets get one number, and the first integer of a message is a segfault.
    """
    import torch  # noqa: F401

    return next(iter(_loaded_libraries(r"libstdc\+\+\.so[.\d]*$")), None)


def _pybind11_version() -> str | None:
    try:
        import pybind11
    except ImportError:
        return None
    return str(pybind11.__version__)
