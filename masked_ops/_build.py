"""Builds the C++ library at its first use and finds it again: capability, flags, cache key, lock, build, verify, load.

The library lives in ``<cache_root()>/<version>-<key>/`` beside a small record (size, SHA-256, what it was built for). The
key covers all that decides its bits or whether it can be loaded: sources, flags, compiler, torch, Python, machine. It is
compiled in a temporary folder under an OS lock and renamed into place, so that a reader sees a whole library or none, and
nothing is loaded before its hash was checked: a truncated library would end the process with a signal.

Finding a library that is there takes a few ms, runs no program, and needs no compiler. Importing this module is cheap;
torch is imported where its facts are needed.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.machinery
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

LIBRARY = "libmasked_ops.so"
RECORD = "library.json"
MODULE = "masked_ops._C"

_PACKAGE = Path(__file__).resolve().parent
_PREBUILT = _PACKAGE / "_prebuilt"
_WAIT_LIMIT = 30 * 60  # seconds that a process waits for another one's build


class BuildError(RuntimeError):
    """The library cannot be built or loaded; the message says why, and what to do about it."""


class _NotWritableError(Exception):
    """A cache folder that cannot be used; the next one may do."""


def _enabled(variable: str) -> bool:
    return os.environ.get(variable, "0") not in ("", "0")


# --- capability ------------------------------------------------------------------------------------------------------

# Per capability, best first: what the CPU must report (as in /proc/cpuinfo) and the compiler flag that relies on it. Never
# -march=native: GCC 12 takes a Zen 5 for a Zen 3, without AVX-512, and home folders are shared by unlike machines.
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
_EXTRAS: dict[str, dict[str, str]] = {"avx512": {"avx512_bf16": "-mavx512bf16"}}


@functools.cache
def cpu_flags() -> frozenset[str]:
    """The instruction sets that the CPU reports and the kernel allows; empty where they are unknown."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        for line in lines:
            if line.startswith("flags"):
                return frozenset(line.partition(":")[2].split())
    return frozenset()


def _checked(capability: str, variable: str) -> str:
    if capability not in CAPABILITIES:
        raise BuildError(f"{variable} must be of {', '.join(CAPABILITIES)}, got {capability!r}")
    return capability


def _allowed() -> list[str]:
    """The capabilities that may be used here, best first."""
    names = list(CAPABILITIES)
    wanted = os.environ.get("MASKED_OPS_CAPABILITY")
    if wanted:
        names = names[names.index(_checked(wanted.lower(), "MASKED_OPS_CAPABILITY")) :]
    return [name for name in names if cpu_flags().issuperset(CAPABILITIES[name])]


def capability() -> str:
    """The best capability that the CPU has: "avx512", "avx2" or "default"; MASKED_OPS_CAPABILITY lowers it."""
    return _allowed()[0]


# --- recipe ----------------------------------------------------------------------------------------------------------

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


class _Object(NamedTuple):
    source: Path
    name: str
    flags: tuple[str, ...]
    label: str
    seconds: float  # a rough guess of its compilation, for the time that is announced


@dataclass(frozen=True)
class Recipe:
    """What goes into one library.

    ``csrc/*.cpp`` sees torch and is compiled once, for any CPU of the platform. ``csrc/cpu/*.cpp`` sees no torch and is
    compiled once per capability, into a namespace of that name (``MASKED_OPS_CAPABILITY``), or once for any CPU if its
    first line says ``capability: none``. New files are found by themselves.
    """

    version: str
    source_root: Path
    capabilities: tuple[str, ...]
    extras: frozenset[str] = frozenset()
    torch: bool = True

    @functools.cached_property
    def sources(self) -> dict[str, bytes]:
        """Every source and header by its path below ``source_root``."""
        suffixes = {".cpp", ".h", ".cu", ".cuh"}
        paths = sorted(path for path in self.source_root.rglob("*") if path.suffix in suffixes)
        return {path.relative_to(self.source_root).as_posix(): path.read_bytes() for path in paths}

    @functools.cached_property
    def requirements(self) -> dict[str, Any]:
        """What a library must share with this process to be the right one; all else only decides how it was compiled."""
        digest = hashlib.sha256()
        for name, content in self.sources.items():
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
        facts: dict[str, Any] = {
            "version": self.version,
            "sources": digest.hexdigest(),
            "python": str(sysconfig.get_config_var("SOABI")),
            "machine": f"{sys.platform} {platform.machine()}",
            "sanitize": _enabled("MASKED_OPS_SANITIZE"),
        }
        if self.torch:
            import torch

            runtime = _openmp_runtime()
            facts["torch"] = f"{torch.__version__} {torch.version.git_version}"
            facts["openmp"] = runtime.name if runtime else None
        return facts

    @functools.cached_property
    def key(self) -> str:
        """Names the folder of the library: equal keys mean equal libraries."""
        facts = {
            "requirements": self.requirements,
            "objects": [(item.name, item.flags) for item in self.objects()],
            "link": _LINK_FLAGS,
            "libc": platform.libc_ver() if not hasattr(os, "confstr") else os.confstr("CS_GNU_LIBC_VERSION"),
            "compiler": _identity(_compiler()),
            "pybind11": _pybind11_version() if self.torch else None,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def folder_name(self) -> str:
        return f"{self.version}-{self.key}"

    def needed_cpu_flags(self, name: str) -> list[str]:
        return sorted({*CAPABILITIES[name], *(self.extras & set(_EXTRAS.get(name, ())))})

    def objects(self) -> list[_Object]:
        """The object files, in the order of linking."""
        common = _COMMON_FLAGS + (_SANITIZE_FLAGS if _enabled("MASKED_OPS_SANITIZE") else ())
        have = tuple(f"-DMASKED_OPS_HAVE_{name.upper()}=1" for name in self.capabilities)
        result = []
        for path in sorted(self.source_root.glob("*.cpp")):
            flags = (*_TORCH_FLAGS, *common, *have)
            result.append(_Object(path, f"{path.stem}.o", flags, path.name, 14))
        kernels = sorted(self.source_root.glob("cpu/*.cpp"))
        shared = [path for path in kernels if b"capability: none" in path.read_bytes().partition(b"\n")[0]]
        for path in shared:
            flags = (*_KERNEL_FLAGS, *common, *have)
            result.append(_Object(path, f"cpu.{path.stem}.o", flags, f"cpu/{path.name}", 2))
        # The linker keeps the first copy of an inline function that several files define. With the lowest capability first,
        # the copy that is kept runs wherever one of its users does; std::vector compiled for AVX-512 would not.
        for name in reversed([name for name in CAPABILITIES if name in self.capabilities]):
            known = CAPABILITIES[name] | _EXTRAS.get(name, {})
            flags = (*_KERNEL_FLAGS, *common, *(known[flag] for flag in known if flag in self.needed_cpu_flags(name)))
            flags += (f"-DMASKED_OPS_CAPABILITY={name.upper()}",)
            for path in kernels:
                if path not in shared:
                    result.append(_Object(path, f"cpu.{path.stem}.{name}.o", flags, f"cpu/{path.name} ({name})", 5))
        return result


def source_root() -> Path:
    """Where ``csrc`` is: in the installed package, or beside it in the source tree."""
    for folder in (_PACKAGE / "csrc", _PACKAGE.parent / "csrc"):
        if folder.is_dir():
            return folder
    raise BuildError(f"the C++ sources are missing: no csrc in {_PACKAGE}; install masked_ops again")


def this_process(*, ahead: bool = False) -> Recipe:
    """The recipe of this process: for its own capability, or for MASKED_OPS_BUILD_CAPABILITIES (a list with commas).

    A build ahead of time takes all capabilities of the platform, and nothing that only this machine has.
    """
    from masked_ops._version import __version__

    chosen = os.environ.get("MASKED_OPS_BUILD_CAPABILITIES")
    if chosen:
        names = [_checked(name.strip().lower(), "MASKED_OPS_BUILD_CAPABILITIES") for name in chosen.split(",")]
    elif ahead:
        names = list(CAPABILITIES) if platform.machine() in ("x86_64", "AMD64") else ["default"]
    else:
        names = [capability()]
    if not ahead and not set(names) & set(_allowed()):
        raise BuildError(f"MASKED_OPS_BUILD_CAPABILITIES is {chosen!r}, but this process can only use {_allowed()}")
    ordered = tuple(name for name in CAPABILITIES if name in names)
    extras = frozenset[str]() if ahead else cpu_flags() & {flag for extra in _EXTRAS.values() for flag in extra}
    return Recipe(__version__, source_root(), ordered, extras)


def _openmp_runtime() -> Path | None:
    """The OpenMP runtime that torch has loaded.

    Wheels may carry one under a name of their own; linking another would put two thread pools into the process.
    """
    import torch

    with contextlib.suppress(OSError), open("/proc/self/maps") as maps:
        paths = {Path(line.split(maxsplit=5)[5].rstrip("\n")) for line in maps if "omp" in line and ".so" in line}
        found = sorted(path for path in paths if re.match(r"lib(gomp|iomp5|omp)\b", path.name))
        home = Path(torch.__file__).parent
        own = [path for path in found if path.is_relative_to(home) or path.is_relative_to(f"{home}.libs")]
        return next(iter(own or found), None)
    return None


def _compiler() -> list[str]:
    """The C++ compiler's command; empty if there is none."""
    chosen = os.environ.get("CXX")
    for command in [shlex.split(chosen)] if chosen else [["g++"], ["c++"], ["clang++"]]:
        program = shutil.which(command[0]) if command else None
        if program:
            return [program, *command[1:]]
    return []


def _identity(command: list[str]) -> list[Any]:
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


def _pybind11_version() -> str | None:
    try:
        import pybind11
    except ImportError:
        return None
    return str(pybind11.__version__)


# --- cache -----------------------------------------------------------------------------------------------------------


class _Root(NamedTuple):
    path: Path
    private: bool  # below a folder that everybody writes to: a library in it counts only if nobody else can have put it there


def _roots() -> Iterator[_Root]:
    """Where libraries are looked for and built, best first."""
    chosen = os.environ.get("MASKED_OPS_CACHE_DIR")
    if chosen:
        yield _Root(Path(chosen).expanduser().absolute(), private=False)
        return
    caches = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    if caches.is_absolute():
        yield _Root(caches / "masked_ops", private=False)
    with contextlib.suppress(FileNotFoundError):  # no temporary folder that can be written to
        yield _Root(Path(tempfile.gettempdir()) / f"masked_ops-{os.getuid()}", private=True)


def cache_root() -> Path:
    """The folder of all built libraries: MASKED_OPS_CACHE_DIR, or masked_ops in XDG_CACHE_HOME or in ~/.cache."""
    for root in _roots():
        return root.path
    raise BuildError("there is no folder for the library; set MASKED_OPS_CACHE_DIR to one that can be written to")


def _is_private(folder: Path) -> bool:
    try:
        status = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of the library in ``folder`` if the library is whole, else None."""
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_bytes())
        content = (folder / LIBRARY).read_bytes()
        whole = record["size"] == len(content) and record["sha256"] == hashlib.sha256(content).hexdigest()
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if whole else None


def _rank(folder: Path, recipe: Recipe) -> int | None:
    """How good the library in ``folder`` is for this process (0 is best); None if there is none that it can use."""
    record = read_record(folder)
    if record is None or record.get("requirements") != recipe.requirements:
        return None
    capabilities: dict[str, list[str]] = record["capabilities"]
    for rank, name in enumerate(_allowed()):
        if name in capabilities and cpu_flags().issuperset(capabilities[name]):
            return rank
    return None


def find_library(recipe: Recipe) -> Path | None:
    """The verified library of ``recipe`` if it is there: in the package (built ahead), or in the cache.

    Where nothing can be compiled, any library that suits this process will do, whichever compiler made it.
    """
    if _rank(_PREBUILT, recipe) == 0:
        return _PREBUILT / LIBRARY
    roots = [root.path for root in _roots() if not root.private or _is_private(root.path)]
    for root in roots:
        if _rank(root / recipe.folder_name, recipe) is not None:
            return root / recipe.folder_name / LIBRARY
    if _compiler() and not _enabled("MASKED_OPS_NO_BUILD"):
        return None
    folders = [_PREBUILT, *(folder for root in roots for folder in sorted(root.glob(f"{recipe.version}-*")))]
    ranked = [(rank, folder) for folder in folders if (rank := _rank(folder, recipe)) is not None]
    return min(ranked)[1] / LIBRARY if ranked else None


# --- build -----------------------------------------------------------------------------------------------------------


def build(recipe: Recipe | None = None) -> Path:
    """The path of the library, whole and right for this process; it is built first if it is not there.

    Several processes at once make one build: the others wait for it.

    Raises:
        BuildError: if there is no library and none can be built.
    """
    if not sys.platform.startswith("linux"):
        raise BuildError(f"the kernels are built on Linux only, this is {sys.platform}")
    try:
        recipe = recipe or this_process()
        library = find_library(recipe)
        if library is not None:
            return library
        if _enabled("MASKED_OPS_NO_BUILD"):
            raise BuildError(f"MASKED_OPS_NO_BUILD is set, and there is no library for this process in {cache_root()}")
        tools = _Tools.find(recipe)
        refused = []
        for root in _roots():
            try:
                return _build_below(root, recipe, tools)
            except _NotWritableError as error:
                refused.append(str(error))
        reasons = "; ".join(refused) or "there is no temporary folder"
        raise BuildError(f"no folder to build in ({reasons}); set MASKED_OPS_CACHE_DIR to one that can be written to")
    except OSError as error:
        raise BuildError(_no_space(str(error)) or f"the kernels could not be built: {error}") from error


def library_path(recipe: Recipe | None = None) -> Path:
    """Where the library is, or where ``build`` would put it."""
    recipe = recipe or this_process()
    return find_library(recipe) or cache_root() / recipe.folder_name / LIBRARY


def cache_key() -> str:
    """The key of this process's library."""
    return this_process().key


def _build_below(root: _Root, recipe: Recipe, tools: _Tools) -> Path:
    folder = root.path / recipe.folder_name
    failure = root.path / f"{recipe.folder_name}.failed.log"
    failed_before = _stamp(failure)
    with _locked(root, recipe):
        if _rank(folder, recipe) is not None:  # another process has built it meanwhile
            return folder / LIBRARY
        if (failed_now := _stamp(failure)) and failed_now != failed_before:
            message = failure.read_text(errors="replace").partition("\n")[0]
            raise BuildError(f"{message} (tried by another process just now)")
        _sweep(root.path, recipe.folder_name)
        scratch = root.path / f"{recipe.folder_name}.tmp-{os.urandom(4).hex()}"
        scratch.mkdir()
        try:
            _compile(recipe, tools, scratch, final=folder)
            _replace(scratch, folder)
        except _CompilationError as error:
            message = str(error)
            with contextlib.suppress(OSError):
                failure.write_text(f"{message}\n\n{error.output}", errors="replace")
                message += f"; all of the compiler's output: {failure}"
            raise BuildError(message) from None
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        failure.unlink(missing_ok=True)
    return folder / LIBRARY


def _stamp(path: Path) -> tuple[int, int] | None:
    with contextlib.suppress(OSError):
        status = path.stat()
        return status.st_ino, status.st_mtime_ns
    return None


@contextlib.contextmanager
def _locked(root: _Root, recipe: Recipe) -> Iterator[None]:
    """The lock of one library. It is the operating system's: however its holder ends, it is free again."""
    import filelock

    lock = filelock.FileLock(root.path / f"{recipe.folder_name}.lock")
    try:
        if root.private:
            with contextlib.suppress(FileExistsError):
                root.path.mkdir(mode=0o700)
            if not _is_private(root.path):
                raise _NotWritableError(f"{root.path} is open to other users")
        else:
            root.path.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=2)
        except filelock.Timeout:
            _say(f"another process is building the kernels; waiting for {root.path / recipe.folder_name}")
            lock.acquire(timeout=_WAIT_LIMIT)
    except filelock.Timeout:
        raise BuildError(
            f"another process has held {lock.lock_file} for {_WAIT_LIMIT // 60} minutes; end it and try again"
        ) from None
    except OSError as error:
        raise _NotWritableError(f"{root.path}: {error.strerror or error}") from error
    try:
        # Where the file system has no flock, filelock takes a plain file for a lock, and that outlives its holder.
        if isinstance(lock, filelock.SoftFileLock):
            raise _NotWritableError(f"{root.path}: the file system has no locks")
        yield
    finally:
        lock.release()


def _sweep(root: Path, folder_name: str) -> None:
    """Remove what builds that died have left: theirs are the temporary folders whose lock is free."""
    import filelock

    for path in root.glob("*.tmp-*"):
        owner = path.name.partition(".tmp-")[0]
        if owner == folder_name:
            shutil.rmtree(path, ignore_errors=True)
            continue
        with contextlib.suppress(filelock.Timeout, OSError), filelock.FileLock(root / f"{owner}.lock", timeout=0):
            shutil.rmtree(path, ignore_errors=True)


def _replace(scratch: Path, folder: Path) -> None:
    """Put library and record of ``scratch`` in place of ``folder``, in one step for whoever looks."""
    fresh = scratch / "fresh"
    fresh.mkdir()
    for name in (LIBRARY, RECORD):
        os.rename(scratch / name, fresh / name)
    if os.path.lexists(folder):  # damaged; a process that has it open keeps it
        os.rename(folder, scratch / "damaged")
    os.rename(fresh, folder)


# --- compilation -----------------------------------------------------------------------------------------------------

_PROBE = """\
#if defined(__clang__) ? __clang_major__ < 14 : __GNUC__ < 11
#error "masked_ops needs GCC 11 or Clang 14 or newer"
#endif
#include <bit>
#include <concepts>
#include <vector>
template <std::integral T> std::vector<T> probe(T x) { return {std::bit_ceil(x)}; }
template std::vector<unsigned> probe(unsigned);
"""


class _CompilationError(Exception):
    def __init__(self, message: str, output: str) -> None:
        super().__init__(message)
        self.output = output


@dataclass(frozen=True)
class _Tools:
    """The programs and folders that a compilation needs; finding them names what is missing."""

    compiler: list[str]
    ninja: str
    includes: tuple[str, ...]
    libraries: tuple[str, ...]
    openmp: bool  # whether torch's OpenMP runtime is among the libraries

    @staticmethod
    def find(recipe: Recipe) -> _Tools:
        compiler = _compiler()
        if not compiler:
            chosen = os.environ.get("CXX")
            found = f"CXX is {chosen!r}, which is no program here" if chosen else "there is no C++ compiler"
            raise BuildError(f"{found}; install one (apt-get install g++), or name it in CXX")
        includes: list[str] = []
        libraries: list[str] = []
        runtime = None
        if recipe.torch:
            import torch

            headers = sysconfig.get_paths()["include"]
            if not os.path.exists(os.path.join(headers, "Python.h")):
                package = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
                raise BuildError(
                    f"Python.h is missing from {headers}; install Python's headers (apt-get install {package})"
                )
            try:
                import pybind11
            except ImportError:
                raise BuildError("pybind11 is missing; install it (pip install pybind11)") from None
            # torch carries a pybind11 of its own: the package's comes first.
            home = Path(torch.__file__).parent
            includes += [headers, pybind11.get_include()]
            includes += [str(home / "include"), str(home / "include/torch/csrc/api/include")]
            libraries += [str(home / "lib" / f"lib{name}.so") for name in ("torch_cpu", "torch", "torch_python", "c10")]
            runtime = _openmp_runtime()
            if runtime is not None:
                libraries.append(str(runtime))
        return _Tools(compiler, _ninja(), tuple(includes), tuple(libraries), runtime is not None)

    def openmp_flags(self, version: str) -> tuple[str, ...]:
        """Clang's OpenMP calls are served by LLVM's and Intel's runtime only; without it its code is serial."""
        gnu_runtime = self.openmp and "libgomp" in Path(self.libraries[-1]).name
        return () if "clang" in version and gnu_runtime else ("-fopenmp",)


def _ninja() -> str:
    try:
        import ninja

        found = shutil.which("ninja", path=ninja.BIN_DIR)
    except ImportError:
        found = None
    found = found or shutil.which("ninja")
    if not found:
        raise BuildError("ninja is missing; install it (pip install ninja)")
    return found


def _compile(recipe: Recipe, tools: _Tools, scratch: Path, final: Path) -> None:
    """Make library and record in the empty folder ``scratch``."""
    started = time.perf_counter()
    environment = {name: value for name, value in os.environ.items() if name not in ("LD_PRELOAD", "NINJA_STATUS")}
    # The compilers' own temporary files go with the folder, also when they are killed; messages are read below.
    environment |= {"TMPDIR": str(scratch), "LC_ALL": "C"}
    version = _try_out(recipe, tools, scratch, environment)
    _write_ninja_file(recipe, tools, scratch, tools.openmp_flags(version))

    cores = len(os.sched_getaffinity(0))
    jobs = int(os.environ.get("MAX_JOBS") or 0) or cores
    items = recipe.objects()
    expected = max(sum(item.seconds for item in items) / min(jobs, cores), max(item.seconds for item in items))
    _say(
        f"compiling {len(items)} files for {', '.join(recipe.capabilities)} into {final} "
        f"(first use only; about {max(expected, 1):.0f} s)"
    )
    _run_ninja([tools.ninja, "-j", str(jobs)], scratch, environment)

    content = (scratch / LIBRARY).read_bytes()
    if not content.startswith(b"\x7fELF"):
        raise _CompilationError(f"the linker of {tools.compiler[0]} made no library", "")
    record = {
        "size": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "requirements": recipe.requirements,
        "capabilities": {name: recipe.needed_cpu_flags(name) for name in recipe.capabilities},
        "compiler": version,
        "seconds": round(time.perf_counter() - started, 1),
    }
    (scratch / RECORD).write_text(json.dumps(record, indent=1))
    _say(f"compiled in {record['seconds']} s")


def _try_out(recipe: Recipe, tools: _Tools, scratch: Path, environment: dict[str, str]) -> str:
    """Let the compiler make a tiny library, so that one which cannot is named at once; its version."""
    (scratch / "probe.cpp").write_text(_PROBE)
    flags = {flag for item in recipe.objects() for flag in item.flags}
    command = [*tools.compiler, *sorted(flags), "-shared", "probe.cpp", "-o", "probe.so"]
    outputs = []
    for call in ([*tools.compiler, "--version"], command):
        try:
            done = subprocess.run(
                call,
                cwd=scratch,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=120,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise _CompilationError(f"the compiler {shlex.join(tools.compiler)} does not run: {error}", "") from None
        outputs.append(done.stdout + done.stderr)
    if done.returncode != 0 or not (scratch / "probe.so").exists():
        output = outputs[1].strip()
        reason = next(
            (line for line in output.splitlines() if "error" in line), output or f"exit code {done.returncode}"
        )
        raise _CompilationError(
            _no_space(output)
            or f"the compiler {shlex.join(tools.compiler)} cannot build a small C++20 library ({reason.strip()}); install "
            "g++ 11 or newer (apt-get install g++), or name another compiler in CXX",
            output,
        )
    return outputs[0].partition("\n")[0]


def _write_ninja_file(recipe: Recipe, tools: _Tools, scratch: Path, openmp: tuple[str, ...]) -> None:
    def escaped(text: str) -> str:
        return text.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    def command(words: list[str]) -> str:
        return shlex.join(words).replace("$", "$$")

    includes = [word for folder in tools.includes for word in ("-isystem", folder)]
    lines = ["rule run", "  command = $words", "  description = $label"]
    items = recipe.objects()
    for item in items:
        words = [*tools.compiler, *item.flags, *openmp, *includes, "-c", str(item.source), "-o", item.name]
        lines += [f"build {item.name}: run {escaped(str(item.source))}"]
        lines += [f"  words = {command(words)}", f"  label = {item.label}"]
    names = [item.name for item in items]
    sanitize = [flag for flag in _SANITIZE_FLAGS if _enabled("MASKED_OPS_SANITIZE")]
    # -fopenmp would add the compiler's own runtime to torch's.
    runtime = () if tools.openmp else openmp
    words = [*tools.compiler, *_LINK_FLAGS, *sanitize, "-o", LIBRARY, *names, *tools.libraries, *runtime]
    lines += [f"build {LIBRARY}: run {' '.join(names)}", f"  words = {command(words)}", "  label = linking", ""]
    (scratch / "build.ninja").write_text("\n".join(lines))


def _run_ninja(command: list[str], scratch: Path, environment: dict[str, str]) -> None:
    environment = environment | {"NINJA_STATUS": "[%f/%t] "}
    # In a session of its own, Ctrl-C reaches this process alone, which then ends the compilers in order.
    process = subprocess.Popen(
        command,
        cwd=scratch,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    output = []
    try:
        assert process.stdout is not None
        with _Progress() as progress:
            for line in process.stdout:
                if match := re.match(r"\[(\d+)/(\d+)\] (.*)", line):
                    progress.show(int(match[1]), int(match[2]), match[3])
                else:
                    output.append(line)
            status = process.wait()
    except BaseException:
        _stop(process)
        raise
    finally:
        if process.stdout is not None:
            process.stdout.close()
    if status != 0:
        text = "".join(output)
        shown = text.splitlines()
        _say("\n".join(["the compilation failed:", *shown[:60], *(["..."] if len(shown) > 60 else [])]))
        first = next((line for line in shown if "error" in line), "no message")
        raise _CompilationError(_no_space(text) or f"the kernels could not be compiled ({first.strip()})", text)


def _stop(process: subprocess.Popen[str]) -> None:
    """End ninja, which ends its compilers, each of which has a process group of its own."""
    process.terminate()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _no_space(output: str) -> str | None:
    if re.search(r"No space left on device|Disk quota exceeded|File size limit exceeded|File too large", output):
        return (
            "there is no space left for the kernels; make room, or set MASKED_OPS_CACHE_DIR to a folder that has some"
        )
    return None


class _Progress:
    """One line that is rewritten on a terminal; elsewhere a line every ten seconds."""

    def __init__(self) -> None:
        self._terminal = sys.stderr is not None and sys.stderr.isatty()
        self._said = time.monotonic()

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._terminal:
            _write("\r\033[K")

    def show(self, done: int, total: int, label: str) -> None:
        line = f"masked_ops: [{done}/{total}] {label}"
        if self._terminal:
            _write(f"\r\033[K{line}")
        elif time.monotonic() - self._said > 10:
            self._said = time.monotonic()
            _write(line + "\n")


def _say(message: str) -> None:
    _write(f"masked_ops: {message}\n")


def _write(text: str) -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or none at all
        sys.stderr.write(text)
        sys.stderr.flush()


def build_ahead(folder: Path) -> None:
    """Build for all capabilities into ``folder``, to be shipped inside the package; for setup.py."""
    made = this_process(ahead=True)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="masked_ops-") as scratch:
        try:
            _compile(made, _Tools.find(made), Path(scratch), final=folder)
        except _CompilationError as error:
            raise BuildError(f"{error}\n{error.output}") from None
        for name in (LIBRARY, RECORD):
            shutil.copy2(Path(scratch) / name, folder / name)


# --- load ------------------------------------------------------------------------------------------------------------


def load_library(path: str | os.PathLike[str]) -> ModuleType:
    """Load the library as the module ``masked_ops._C``, once in a process.

    Raises:
        BuildError: if it cannot be loaded.
    """
    loaded = sys.modules.get(MODULE)
    if loaded is not None:
        return loaded
    loader = importlib.machinery.ExtensionFileLoader(MODULE, os.fspath(path))
    spec = importlib.util.spec_from_file_location(MODULE, path, loader=loader)
    assert spec is not None
    try:
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    except ImportError as error:
        folder = os.path.dirname(os.fspath(path))
        raise BuildError(f"the library cannot be loaded ({error}); remove {folder} to have it built again") from error
    sys.modules[MODULE] = module
    return module
