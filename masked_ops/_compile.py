"""Compiles a recipe into a folder: finds the tools, writes a ninja file, shows progress, and says what went wrong.

A ninja file of our own, because ``torch.utils.cpp_extension`` cannot compile one source several times.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from ._cuda_recipe import CudaRecipe
from ._recipe import BuildError, LibraryRecipe, Recipe, openmp_runtime, standard_library

RECORD = "library.json"


class CompilationError(Exception):
    """The tools are there and failed; ``output`` is all that they said."""

    def __init__(self, message: str, output: str) -> None:
        super().__init__(message)
        self.output = output


# --- tools -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tools:
    """The programs, headers and libraries that a compilation needs."""

    compiler: list[str]
    ninja: str
    jobs: int
    includes: list[str]
    libraries: list[str]
    openmp_runtime: Path | None


def find_tools(recipe: LibraryRecipe) -> Tools:
    """Find what ``recipe`` needs.

    Raises:
        BuildError: naming what is missing.
    """
    command = recipe.compiler()
    if not command:
        if isinstance(recipe, CudaRecipe):
            raise BuildError(f"there is no nvcc; {recipe.advice}")
        chosen = os.environ.get("CXX")
        found = f"CXX is {chosen!r}, which is no program here" if chosen else "there is no C++ compiler"
        raise BuildError(f"{found}; install one (apt-get install g++), or name it in CXX")
    includes: list[str] = []
    libraries: list[str] = []
    runtime = None
    if isinstance(recipe, Recipe) and recipe.torch:
        import torch

        # torch carries a pybind11 of its own: the package's comes first.
        home = os.path.dirname(torch.__file__)
        includes = [_python_headers(), _pybind11_headers(), f"{home}/include", f"{home}/include/torch/csrc/api/include"]
        libraries = [f"{home}/lib/lib{name}.so" for name in ("torch_cpu", "torch", "torch_python", "c10")]
        # Named, and so found before the compiler's own, which may be static.
        if library := standard_library():
            libraries.append(str(library))
        runtime = openmp_runtime()
    return Tools(command, _ninja(), _jobs(), includes, libraries, runtime)


def _python_headers() -> str:
    headers = sysconfig.get_paths()["include"]
    if not os.path.exists(os.path.join(headers, "Python.h")):
        package = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
        raise BuildError(f"Python.h is missing from {headers}; install Python's headers (apt-get install {package})")
    return headers


def _pybind11_headers() -> str:
    try:
        import pybind11
    except ImportError:
        raise BuildError("pybind11 is missing; install it (pip install pybind11)") from None
    return pybind11.get_include()


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


def _jobs() -> int:
    chosen = os.environ.get("MAX_JOBS")
    if not chosen:
        return len(os.sched_getaffinity(0))
    if not chosen.isdecimal() or int(chosen) == 0:
        raise BuildError(f"MAX_JOBS takes a number of compilers to run at once, got {chosen!r}")
    return int(chosen)


# --- compilation -----------------------------------------------------------------------------------------------------


def compile_library(recipe: LibraryRecipe, tools: Tools, scratch: Path, destination: Path) -> None:
    """Make the library and its record in the empty folder ``scratch``; ``destination`` is told to the user.

    Raises:
        CompilationError: with the compiler's output.
    """
    started = time.perf_counter()
    # A copy: what is compiled is what was hashed, though a file be edited meanwhile.
    for name, content in recipe.sources.items():
        path = scratch / "csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    # Temporary files of compilers that are killed go with the folder, and their messages can be read below.
    environment |= {"TMPDIR": str(scratch), "LC_ALL": "C", "NINJA_STATUS": "[%f/%t] "}
    version = _try_compiler(recipe, tools, scratch, environment)
    openmp = _openmp_flags(tools, version) if isinstance(recipe, Recipe) else []
    _write_ninja_file(recipe, tools, scratch, openmp)

    seconds = [item.seconds for item in recipe.objects]
    expected = max(sum(seconds) / min(tools.jobs, len(os.sched_getaffinity(0))), *seconds)
    say(
        f"compiling {len(seconds)} files for {', '.join(recipe.targets)} into {destination} "
        f"(first use only, about {expected:.0f} s)"
    )
    _run_ninja(tools, scratch, environment)

    content = (scratch / recipe.library).read_bytes()
    elapsed = round(time.perf_counter() - started, 1)
    record = {
        "size": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "requirements": recipe.requirements,
        **recipe.facts(),
        "compiler": version,
        "seconds": elapsed,
    }
    (scratch / RECORD).write_text(json.dumps(record, indent=1))
    say(f"compiled in {elapsed} s")


def _try_compiler(recipe: LibraryRecipe, tools: Tools, scratch: Path, environment: dict[str, str]) -> str:
    """Have a tiny library made with all flags, so that a compiler which cannot is named at once; its version."""
    suffix = "cu" if isinstance(recipe, CudaRecipe) else "cpp"
    (scratch / f"probe.{suffix}").write_text(recipe.probe)
    flags = list(dict.fromkeys(flag for item in recipe.objects for flag in item.flags))
    name = shlex.join(tools.compiler)

    def run(*arguments: str) -> tuple[int, str]:
        # Into a file, whose end no child that is forked meanwhile can hold open.
        with (scratch / "probe.output").open("w+", errors="replace") as output:
            try:
                done = subprocess.run(
                    [*tools.compiler, *arguments],
                    cwd=scratch,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    check=False,
                    timeout=120,
                )
            except (OSError, subprocess.TimeoutExpired) as error:
                raise CompilationError(f"the compiler {name} does not run: {error}", "") from None
            output.seek(0)
            return done.returncode, output.read()

    _, version = run("--version")
    status, output = run(*flags, "-shared", f"probe.{suffix}", "-o", "probe.so")
    if status != 0 or not (scratch / "probe.so").exists():
        reason = _first_error(output) or f"exit code {status} and no message"
        raise CompilationError(
            no_space(output) or f"the compiler {name} cannot build a small C++20 library: {reason}; {recipe.advice}",
            output,
        )
    return recipe.version_line(version)


def _openmp_flags(tools: Tools, compiler_version: str) -> list[str]:
    """Clang's OpenMP code needs LLVM's or Intel's runtime, and beside GNU's they would be a second one."""
    runtime = tools.openmp_runtime
    if "clang" in compiler_version and runtime is not None and runtime.name.startswith("libgomp"):
        say(f"Clang cannot use torch's {runtime.name}: the kernels will run on one thread; g++ makes parallel ones")
        return []
    return ["-fopenmp"]


def _write_ninja_file(recipe: LibraryRecipe, tools: Tools, scratch: Path, openmp: list[str]) -> None:
    includes = [word for folder in tools.includes for word in ("-isystem", folder)]

    def step(output: str, inputs: list[str], words: list[str], label: str) -> str:
        command = shlex.join([*tools.compiler, *words, "-o", output]).replace("$", "$$")
        return f"build {output}: run {' '.join(inputs)}\n  words = {command}\n  label = {label}\n"

    steps = ["rule run\n  command = $words\n  description = $label\n"]
    # Longest first, so that no core waits for one that was begun late.
    for item in sorted(recipe.objects, key=lambda item: -item.seconds):
        source = f"csrc/{item.sources[0]}"
        if len(item.sources) > 1:
            source = f"csrc/joint_{item.name}.cpp"
            (scratch / source).write_text("".join(f'#include "{name}"\n' for name in item.sources))
        steps.append(step(item.name, [source], [*item.flags, *openmp, *includes, "-c", source], item.label))
    # At linking, -fopenmp would add the compiler's own runtime to torch's.
    libraries = [*tools.libraries, *([str(tools.openmp_runtime)] if tools.openmp_runtime else openmp)]
    names = [item.name for item in recipe.objects]
    steps.append(step(recipe.library, names, [*recipe.link_flags, *names, *libraries], "linking"))
    (scratch / "build.ninja").write_text("".join(steps))


# No fork while a pipe is being made: a child would keep its writing end, and who reads would wait for the child, which
# may wait for the library.
_piping = threading.Lock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_piping.acquire, after_in_parent=_piping.release, after_in_child=_piping.release)


def _run_ninja(tools: Tools, scratch: Path, environment: dict[str, str]) -> None:
    # In a session of its own, so that Ctrl-C reaches this process alone, which then ends the compilers in order. If
    # this one is killed, the kernel ends them.
    with_parent = ["setpriv", "--pdeathsig", "TERM"] if shutil.which("setpriv") else []
    with _piping:
        process = subprocess.Popen(
            [*with_parent, tools.ninja, "-j", str(tools.jobs)],
            cwd=scratch,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    lines = []
    progress = _Progress()
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if match := re.match(r"\[(\d+/\d+)\] (.*)", line):
                progress.show(f"[{match[1]}] {match[2]}")
            else:
                lines.append(line)
        status = process.wait()
    except BaseException:
        _stop(process)
        raise
    finally:
        progress.clear()
        if process.stdout is not None:
            process.stdout.close()
    if status != 0:
        output = "".join(lines)
        # What the compilers said, without the commands and what ninja adds.
        commands = ("FAILED: ", "ninja: ", shlex.join(tools.compiler))
        said = [line for line in lines if not line.startswith(commands)]
        more = [f"({len(said) - 60} more lines)\n"] if len(said) > 60 else []
        say("the compilation failed:\n" + "".join(said[:60] + more).rstrip())
        reason = _first_error("".join(said)) or f"{tools.compiler[0]} says nothing"
        raise CompilationError(no_space(output) or f"the kernels cannot be compiled: {reason}", output)


def _stop(process: subprocess.Popen[str]) -> None:
    """End ninja, which ends its compilers; each of them leads a process group of its own."""
    process.terminate()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _first_error(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower()), lines[0] if lines else "")


def no_space(output: str) -> str | None:
    """What to do if ``output`` tells of a full disk, else None."""
    if re.search(r"No space left on device|Disk quota exceeded|File size limit exceeded|File too large", output):
        return "there is no space left for the kernels; make room, or set MASKED_OPS_CACHE_DIR to a folder with space"
    return None


# --- progress --------------------------------------------------------------------------------------------------------


class _Progress:
    """One line that is rewritten on a terminal; elsewhere a line every ten seconds."""

    def __init__(self) -> None:
        self._terminal = False
        with contextlib.suppress(ValueError, AttributeError):  # stderr is closed, or there is none
            self._terminal = sys.stderr.isatty()
        self._last = time.monotonic()

    def show(self, line: str) -> None:
        if self._terminal:
            _write(f"\r\033[Kmasked_ops: {line}")
        elif time.monotonic() - self._last > 10:
            self._last = time.monotonic()
            say(line)

    def clear(self) -> None:
        if self._terminal:
            _write("\r\033[K")


def say(message: str) -> None:
    """Tell the user on stderr."""
    _write(f"masked_ops: {message}\n")


def _write(text: str) -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(text)
        sys.stderr.flush()
