"""The builder and its faults, on a stand-in of a few lines of C++: quick to build, and right or wrong in one number."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import io
import json
import os
import platform
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import filelock
import pytest
import torch
from generators import run_each_in_a_process
from paths import ROOT, RunPython

import masked_ops
from masked_ops import _build, _compile, _recipe
from masked_ops._build import BuildError
from masked_ops._recipe import Recipe

SOURCES = {
    "cpu/answer.h": "constexpr int kAnswer = 42;\n",
    "cpu/answer.cpp": """\
// capability: none
#include "answer.h"
extern "C" __attribute__((visibility("default"))) int answer() { return kAnswer; }
""",
    "cpu/kernel.cpp": "namespace MASKED_OPS_CAPABILITY { int kernel() { return 1; } }\n",
}

SETTINGS = (
    "CXX",
    "LD_PRELOAD",
    "MASKED_OPS_BUILD_CAPABILITIES",
    "MASKED_OPS_CACHE_DIR",
    "MASKED_OPS_CAPABILITY",
    "MASKED_OPS_FENCE",
    "MASKED_OPS_NO_BUILD",
    "MASKED_OPS_REQUIRE_BUILD",
    "MASKED_OPS_SANITIZE",
    "MAX_JOBS",
    "XDG_CACHE_HOME",
)


def make_recipe(
    folder: Path, sources: dict[str, str] = SOURCES, capabilities: tuple[str, ...] = ("default",)
) -> Recipe:
    for name, content in sources.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return Recipe("0", folder, capabilities, torch=False)


def answer(library: Path) -> int:
    return int(ctypes.CDLL(str(library)).answer())


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the outside's settings, and nothing left outside."""
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(_build, "_PREBUILT", tmp_path / "no prebuilt library")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "a cache"
    monkeypatch.setenv("MASKED_OPS_CACHE_DIR", str(path))
    return path


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return make_recipe(tmp_path / "csrc $HOME")


# A compiler that writes down each file that it compiles, and first waits for as long as there is a file "hold".
COMPILER = """\
#!/bin/sh
case " $* " in
*" -c "*)
    echo $$ >>"{folder}/compiled"
    echo "$TMPDIR" >>"{folder}/temporary"
    while [ -e "{folder}/hold" ]; do sleep 0.02; done
    {compile}
    ;;
esac
exec g++ "$@"
"""


class Compiler:
    def __init__(self, folder: Path, compile: str = "") -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.path = folder / "g++ wrapped"
        self.path.write_text(COMPILER.format(folder=folder, compile=compile))
        self.path.chmod(0o755)

    def hold(self) -> None:
        (self.folder / "hold").touch()

    def release(self) -> None:
        (self.folder / "hold").unlink(missing_ok=True)

    @property
    def processes(self) -> list[int]:
        """One for each file compiled so far."""
        with contextlib.suppress(FileNotFoundError):
            return [int(line) for line in (self.folder / "compiled").read_text().split()]
        return []


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Compiler]:
    made = Compiler(tmp_path / "compiler")
    monkeypatch.setenv("CXX", f"'{made.path}'")
    yield made
    made.release()


# Builds as a fresh process does, without the second that torch's import takes.
PROCESS = """
import sys, types
from pathlib import Path
package = types.ModuleType("masked_ops")
package.__path__ = [sys.argv[1]]
sys.modules["masked_ops"] = package
from masked_ops import _build
from masked_ops._recipe import Recipe
{before}
try:
    print(_build.build(Recipe("0", Path(sys.argv[2]), ("default",), torch=False)))
except _build.BuildError as error:
    sys.exit(f"BuildError: {{error}}")
"""


class Process(subprocess.Popen[str]):
    """A build in a process of its own."""

    def __init__(self, recipe: Recipe, before: str = "") -> None:
        package = Path(_build.__file__).parent
        super().__init__(
            [sys.executable, "-c", PROCESS.format(before=before), str(package), str(recipe.source_root)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # Ctrl-C is ignored in what a shell runs in the background, and would be in the children of that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def finish(self) -> tuple[str, str]:
        out, err = self.communicate(timeout=60)
        return out.strip(), err


def wait_for(condition: Callable[[], object]) -> None:
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("waited for 30 s in vain")


def is_alive(process: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def leftovers(cache: Path) -> list[Path]:
    return [path for path in cache.iterdir() if ".tmp-" in path.name]


# --- what is built and where -----------------------------------------------------------------------------------------


def test_a_library_is_built_once(cache: Path, recipe: Recipe, compiler: Compiler) -> None:
    library = _build.build(recipe)
    assert library == cache / f"0-{recipe.key}" / "libmasked_ops.so"
    assert answer(library) == 42
    assert len(compiler.processes) == 2
    assert _build.build(replace(recipe)) == library
    assert _build.library_path(recipe) == library
    assert len(compiler.processes) == 2
    record = _build.read_record(library.parent)
    # What a compiler that is killed leaves behind goes with the folder of the build.
    temporary = (compiler.folder / "temporary").read_text().splitlines()
    assert all(folder.startswith(f"{cache}/0-{recipe.key}.tmp-") for folder in temporary)
    assert record is not None and record["capabilities"] == {"default": []} and "g++" in record["compiler"].lower()
    assert not leftovers(cache)


def test_headers_and_sources_and_version_are_in_the_key(tmp_path: Path) -> None:
    key = make_recipe(tmp_path / "a").key
    assert make_recipe(tmp_path / "elsewhere").key == key
    for name, content in SOURCES.items():
        assert make_recipe(tmp_path / name, SOURCES | {name: content + "//\n"}).key != key
    assert make_recipe(tmp_path / "more", SOURCES | {"cpu/new.h": ""}).key != key
    assert Recipe("1", tmp_path / "a", ("default",), torch=False).key != key


@pytest.mark.parametrize(
    "change",
    [
        lambda patch: patch.setattr(_recipe, "_KERNEL_FLAGS", ("-O1",)),
        lambda patch: patch.setattr(_recipe, "_COMMON_FLAGS", ("-std=c++23",)),
        lambda patch: patch.setattr(_recipe, "_LINK_FLAGS", ("-shared",)),
        lambda patch: patch.setenv("MASKED_OPS_SANITIZE", "1"),
        lambda patch: patch.setenv("MASKED_OPS_FENCE", "1"),
        lambda patch: patch.setattr("sysconfig.get_config_var", lambda name: "cpython-399"),
        lambda patch: patch.setattr("platform.machine", lambda: "riscv64"),
        lambda patch: patch.setattr(torch, "__version__", "2.99"),
        lambda patch: patch.setattr(torch.version, "git_version", "0123456"),
        lambda patch: patch.setattr(_recipe, "openmp_runtime", lambda: Path("/usr/lib/libiomp5.so")),
        lambda patch: patch.setattr(_recipe, "_pybind11_version", lambda: "99"),
        lambda patch: patch.setattr(_recipe, "standard_library", lambda: None),
    ],
    ids=[
        "kernel",
        "common",
        "link",
        "sanitize",
        "fence",
        "python",
        "machine",
        "torch",
        "git",
        "openmp",
        "pybind11",
        "standard",
    ],
)
def test_flags_and_versions_are_in_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[pytest.MonkeyPatch], None]
) -> None:
    make_recipe(tmp_path)

    def key() -> str:
        return Recipe("0", tmp_path, ("default",)).key

    before = key()
    assert key() == before
    change(monkeypatch)
    assert key() != before


def test_capabilities_are_in_the_key(tmp_path: Path) -> None:
    make_recipe(tmp_path)
    chosen = [("default",), ("avx2",), ("avx2", "default"), ("avx512",)]
    keys = {Recipe("0", tmp_path, names, torch=False).key for names in chosen}
    keys.add(Recipe("0", tmp_path, ("avx512",), frozenset({"avx512_bf16"}), torch=False).key)
    assert len(keys) == 5


def test_the_compiler_is_in_the_key(tmp_path: Path, compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    key = make_recipe(tmp_path / "csrc").key
    os.utime(compiler.path, (0, 0))
    other = make_recipe(tmp_path / "csrc").key
    assert other != key
    link = tmp_path / "c++"
    link.symlink_to(compiler.path)
    monkeypatch.setenv("CXX", str(link))
    assert make_recipe(tmp_path / "csrc").key == other


def test_what_is_compiled_is_what_was_hashed(cache: Path, recipe: Recipe) -> None:
    assert recipe.sources
    (recipe.source_root / "cpu/answer.h").write_text("constexpr int kAnswer = 0;\n")
    assert answer(_build.build(recipe)) == 42


def test_the_default_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _build.cache_root() == tmp_path / "home/.cache/masked_ops"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert _build.cache_root() == tmp_path / "xdg/masked_ops"
    monkeypatch.setenv("MASKED_OPS_CACHE_DIR", str(tmp_path / "own"))
    assert _build.cache_root() == tmp_path / "own"


def test_the_sources_are_found() -> None:
    assert (_recipe.source_root() / "cpu/api.h").exists()


def test_missing_sources_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_recipe, "_PACKAGE", tmp_path / "masked_ops")
    with pytest.raises(BuildError, match=r"no csrc in .*install masked_ops again"):
        _build.build()


# --- capability ------------------------------------------------------------------------------------------------------


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[set[str]], None]:
    def set_flags(flags: set[str]) -> None:
        monkeypatch.setattr(_recipe, "cpu_flags", lambda: frozenset(flags))

    return set_flags


def test_capability_is_the_best_that_the_cpu_has(
    cpu: Callable[[set[str]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    avx512 = set(_recipe.CAPABILITIES["avx512"])
    cpu(avx512 | {"sse4_1"})
    assert _build.capability() == "avx512"
    monkeypatch.setenv("MASKED_OPS_CAPABILITY", "AVX2")
    assert _build.capability() == "avx2"
    cpu(avx512 - {"avx512dq"})
    assert _build.capability() == "avx2"
    monkeypatch.setenv("MASKED_OPS_CAPABILITY", "avx512")
    assert _build.capability() == "avx2"
    cpu(avx512 - {"fma"})
    assert _build.capability() == "default"
    monkeypatch.setenv("MASKED_OPS_CAPABILITY", "sse9")
    with pytest.raises(BuildError, match=r"MASKED_OPS_CAPABILITY takes avx512, avx2, default, got 'sse9'"):
        _build.capability()


def test_capability_agrees_with_torch() -> None:
    theirs = torch.backends.cpu.get_cpu_capability()
    if "ATEN_CPU_CAPABILITY" not in os.environ and theirs in ("AVX512", "AVX2"):
        assert _build.capability() == theirs.lower()


def test_which_capabilities_are_built(cpu: Callable[[set[str]], None], monkeypatch: pytest.MonkeyPatch) -> None:
    cpu({*_recipe.CAPABILITIES["avx512"], "avx512_bf16"})
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert _build.this_process().capabilities == ("avx512",)
    assert "-mavx512bf16" in _build.this_process().cpu_flags("avx512").values()
    monkeypatch.setenv("MASKED_OPS_BUILD_CAPABILITIES", "")
    ahead = _build.this_process(ahead=True)
    assert ahead.capabilities == ("avx512", "avx2", "default")
    assert "-mavx512bf16" not in ahead.cpu_flags("avx512").values()
    monkeypatch.setenv("MASKED_OPS_BUILD_CAPABILITIES", "default, avx2")
    assert _build.this_process().capabilities == ("avx2", "default")
    monkeypatch.setenv("MASKED_OPS_BUILD_CAPABILITIES", "all")
    assert _build.this_process().capabilities == ("avx512", "avx2", "default")
    cpu(set())
    monkeypatch.setenv("MASKED_OPS_BUILD_CAPABILITIES", "avx512,avx2")
    with pytest.raises(BuildError, match="this process can only use default"):
        _build.this_process()
    monkeypatch.setenv("MASKED_OPS_BUILD_CAPABILITIES", "avx513")
    with pytest.raises(BuildError, match=r"MASKED_OPS_BUILD_CAPABILITIES takes .* got 'avx513'"):
        _build.this_process()
    monkeypatch.delenv("MASKED_OPS_BUILD_CAPABILITIES")
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert _build.this_process(ahead=True).capabilities == ("default",)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="has one capability only")
def test_several_capabilities_in_one_library(cache: Path, tmp_path: Path) -> None:
    # shared() is one function to the linker, compiled differently in each file: the lowest capability's copy must stay.
    header = """\
inline __attribute__((noinline)) int shared() {
#if defined(__AVX512F__)
  return 512;
#elif defined(__AVX2__)
  return 256;
#else
  return 128;
#endif
}
"""
    kernel = """\
#include "shared.h"
namespace MASKED_OPS_CAPABILITY {
int width() {
#if defined(__AVX512F__)
  return 512 + 0 * shared();
#elif defined(__AVX2__)
  return 256 + 0 * shared();
#else
  return 128 + 0 * shared();
#endif
}
int shared_width() { return shared(); }
}
"""
    table = """\
// capability: none
#if !MASKED_OPS_HAVE_AVX512 || !MASKED_OPS_HAVE_AVX2 || !MASKED_OPS_HAVE_DEFAULT || defined(__AVX__)
#error "the table is compiled once, for any CPU, and knows what is linked"
#endif
#define EXPORT extern "C" __attribute__((visibility("default"))) int
namespace AVX512 { int width(); int shared_width(); }
namespace AVX2 { int width(); int shared_width(); }
namespace DEFAULT { int width(); int shared_width(); }
EXPORT avx512() { return AVX512::width(); }
EXPORT avx2() { return AVX2::width(); }
EXPORT plain() { return DEFAULT::width(); }
EXPORT shared_by_avx512() { return AVX512::shared_width(); }
EXPORT shared_by_plain() { return DEFAULT::shared_width(); }
"""
    sources = {"cpu/shared.h": header, "cpu/kernel.cpp": kernel, "cpu/a_table.cpp": table}
    library = ctypes.CDLL(str(_build.build(make_recipe(tmp_path / "csrc", sources, ("avx512", "avx2", "default")))))
    assert (library.avx512(), library.avx2(), library.plain()) == (512, 256, 128)
    assert (library.shared_by_avx512(), library.shared_by_plain()) == (128, 128)


# --- damaged and foreign libraries -----------------------------------------------------------------------------------


def truncate(library: Path) -> None:
    with library.open("r+b") as file:
        file.truncate(library.stat().st_size // 2)


def overwrite(library: Path) -> None:
    with library.open("r+b") as file:
        file.seek(2000)
        file.write(b"damaged")


def replace_folder_by_file(library: Path) -> None:
    shutil.rmtree(library.parent)
    library.parent.touch()


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        overwrite,
        lambda library: library.write_bytes(b""),
        lambda library: library.unlink(),
        lambda library: (library.parent / "library.json").unlink(),
        lambda library: (library.parent / "library.json").write_text("{"),
        lambda library: (library.parent / "library.json").write_text("[1]"),
        replace_folder_by_file,
    ],
    ids=["truncated", "overwritten", "empty", "no library", "no record", "half a record", "no dictionary", "a file"],
)
def test_a_damaged_library_is_built_again(cache: Path, recipe: Recipe, damage: Callable[[Path], None]) -> None:
    library = _build.build(recipe)
    damage(library)
    assert _build.find_library(recipe) is None
    assert _build.build(recipe) == library
    assert answer(library) == 42
    assert not leftovers(cache)


def test_a_library_for_something_else_is_not_used(cache: Path, recipe: Recipe) -> None:
    record = _build.build(recipe).parent / "library.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"requirements": {}}))
    assert _build.find_library(recipe) is None


def test_a_library_that_needs_more_than_the_cpu_has_is_not_used(
    cache: Path, recipe: Recipe, cpu: Callable[[set[str]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = _build.build(recipe).parent / "library.json"
    capabilities = {"avx512": [*_recipe.CAPABILITIES["avx512"], "avx512_bf16"]}
    record.write_text(json.dumps(json.loads(record.read_text()) | {"capabilities": capabilities}))
    cpu(set(_recipe.CAPABILITIES["avx512"]))
    assert _build.find_library(recipe) is None
    cpu({*_recipe.CAPABILITIES["avx512"], "avx512_bf16"})
    assert _build.find_library(recipe) is not None
    monkeypatch.setenv("MASKED_OPS_CAPABILITY", "avx2")
    assert _build.find_library(recipe) is None


def test_of_several_capabilities_one_is_used_of_which_the_cpu_has_all(
    cache: Path, recipe: Recipe, cpu: Callable[[set[str]], None]
) -> None:
    library = _build.build(recipe)
    record = library.parent / "library.json"
    avx512, avx2 = ([*_recipe.CAPABILITIES[name]] for name in ("avx512", "avx2"))
    capabilities = {"avx512": [*avx512, "avx512_bf16"], "avx2": avx2}
    record.write_text(json.dumps(json.loads(record.read_text()) | {"capabilities": capabilities}))
    cpu({*avx512, "avx512_bf16"})
    assert _build.capability_of(library) == "avx512"
    cpu(set(avx512))
    assert _build.find_library(recipe) == library
    assert _build.capability_of(library) == "avx2"


def test_a_library_built_ahead_is_used_first(
    cache: Path, tmp_path: Path, recipe: Recipe, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    prebuilt = tmp_path / "package/_prebuilt"
    monkeypatch.setattr(_build, "_PREBUILT", prebuilt)
    monkeypatch.setenv("MASKED_OPS_CAPABILITY", "default")
    shutil.copytree(_build.build(recipe).parent, prebuilt)
    assert _build.build(recipe) == prebuilt / "libmasked_ops.so"
    shutil.rmtree(cache)
    compiled = len(compiler.processes)
    assert _build.build(recipe) == prebuilt / "libmasked_ops.so"
    assert len(compiler.processes) == compiled
    if platform.machine() == "x86_64":  # it is not used in place of a better one that can be built
        monkeypatch.setattr(_recipe, "cpu_flags", lambda: frozenset(_recipe.CAPABILITIES["avx2"]))
        monkeypatch.delenv("MASKED_OPS_CAPABILITY")
        assert _build.find_library(recipe) is None
        monkeypatch.setenv("MASKED_OPS_CAPABILITY", "default")
    truncate(prebuilt / "libmasked_ops.so")
    assert _build.build(recipe).is_relative_to(cache)
    changed = make_recipe(tmp_path / "changed", SOURCES | {"cpu/answer.h": "constexpr int kAnswer = 43;\n"})
    assert answer(_build.build(changed)) == 43


def test_a_library_that_is_there_needs_no_compiler(
    cache: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = _build.build(recipe)
    monkeypatch.setenv("MASKED_OPS_NO_BUILD", "1")
    assert _build.build(replace(recipe)) == library
    monkeypatch.setenv("PATH", "")
    assert _build.build(replace(recipe)) == library
    monkeypatch.delenv("MASKED_OPS_NO_BUILD")
    assert _build.build(replace(recipe)) == library


def test_no_build(cache: Path, recipe: Recipe, compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKED_OPS_NO_BUILD", "1")
    with pytest.raises(BuildError, match="MASKED_OPS_NO_BUILD is set"):
        _build.build(recipe)
    assert not compiler.processes


# --- missing and broken tools ----------------------------------------------------------------------------------------


@pytest.fixture
def bare_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH on which nothing is."""
    path = tmp_path / "bin"
    path.mkdir()
    monkeypatch.setenv("PATH", str(path))
    return path


@pytest.mark.usefixtures("cache", "bare_path")
def test_no_compiler(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BuildError, match=r"there is no C\+\+ compiler; install one \(apt-get install g\+\+\)"):
        _build.build(recipe)
    monkeypatch.setenv("CXX", "/nowhere/g++")
    with pytest.raises(BuildError, match=r"CXX is '/nowhere/g\+\+', which is no program here"):
        _build.build(recipe)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("exit 1", "exit code 1 and no message"),
        ("exit 0", "cannot build a small C\\+\\+20 library"),
        (
            "echo 'g++: error: unrecognized command line option -std=c++20' >&2; exit 1",
            "unrecognized command line option -std=c\\+\\+20; install g\\+\\+ 11 or newer",
        ),
        ('exec g++ -D__GNUC__=9 "$@"', "masked_ops needs GCC 11"),
        ("kill -9 $$", "cannot build a small"),
        ("echo 'ld: final link failed: No space left on device'; exit 1", "there is no space left"),
    ],
)
def test_a_broken_compiler_is_named(
    cache: Path, tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, script: str, message: str
) -> None:
    broken = tmp_path / "broken"
    broken.write_text(f"#!/bin/sh\n{script}\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(BuildError, match=message):
        _build.build(recipe)
    assert not leftovers(cache)


@pytest.mark.usefixtures("cache")
def test_a_compiler_that_does_not_run(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "g++"
    program.write_bytes(b"\x7fELF for another machine")
    program.chmod(0o755)
    monkeypatch.setenv("CXX", str(program))
    with pytest.raises(BuildError, match="does not run"):
        _build.build(recipe)


@pytest.mark.usefixtures("cache")
def test_an_unbalanced_quote_in_cxx(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "'g++")
    with pytest.raises(BuildError, match="No closing quotation"):
        _build.build(recipe)


def test_a_compiler_with_arguments(cache: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "env g++ -Wall")
    assert answer(_build.build(recipe)) == 42


def test_a_compiler_by_a_relative_path(cache: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(shutil.which("g++") or "g++").parent)
    monkeypatch.setenv("CXX", "./g++")
    assert answer(_build.build(recipe)) == 42


def test_an_error_in_the_sources(
    cache: Path, tmp_path: Path, recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = make_recipe(tmp_path / "broken", SOURCES | {"cpu/kernel.cpp": "int kernel() { return nothing; }\n"})
    with pytest.raises(BuildError, match=r"csrc/cpu/kernel.cpp:1:.*nothing.*all of the compiler's output: ") as error:
        _build.build(broken)
    log = Path(str(error.value).rpartition(": ")[2])
    assert log.parent == cache and "return nothing;" in log.read_text()
    assert "return nothing;" in capsys.readouterr().err
    assert not leftovers(cache)
    # Mended, it is built; and the log goes with the library.
    log.rename(cache / f"{recipe.folder_name}.failed.log")
    assert answer(_build.build(recipe)) == 42
    assert not list(cache.glob("*.log"))


def test_missing_python_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_recipe(tmp_path)
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(tmp_path)})
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    with pytest.raises(BuildError, match=f"Python.h is missing from .*apt-get install {version}-dev"):
        _compile.find_tools(Recipe("0", tmp_path, ("default",)))


@pytest.mark.parametrize("name", ["ninja", "pybind11"])
def test_missing_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiler: Compiler, bare_path: Path, name: str
) -> None:
    make_recipe(tmp_path)
    monkeypatch.setitem(sys.modules, name, None)
    recipe = Recipe("0", tmp_path, ("default",))
    assert recipe.key
    with pytest.raises(BuildError, match=f"{name} is missing; install it \\(pip install {name}\\)"):
        _compile.find_tools(recipe)


@pytest.mark.usefixtures("cache")
def test_another_platform(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(BuildError, match="built on Linux only, this is win32"):
        _build.build(recipe)


def test_max_jobs(
    cache: Path, tmp_path: Path, recipe: Recipe, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two compilers at once would meet in the folder "busy".
    Compiler(compiler.folder, f"mkdir '{tmp_path}/busy' || exit 1; sleep 0.2; rmdir '{tmp_path}/busy'")
    monkeypatch.setenv("MAX_JOBS", "1")
    assert answer(_build.build(recipe)) == 42
    shutil.rmtree(cache)
    monkeypatch.setenv("MAX_JOBS", "2")
    with pytest.raises(BuildError, match=r"File exists|cannot create directory"):
        _build.build(recipe)
    monkeypatch.setenv("MAX_JOBS", "many")
    with pytest.raises(BuildError, match=r"MAX_JOBS takes a number .*got 'many'"):
        _build.build(recipe)


def test_torchs_openmp_runtime_is_linked(tmp_path: Path, recipe: Recipe) -> None:
    runtime = "/site/torch.libs/libgomp-a34b3233.so.1"
    tools = _compile.Tools(["g++"], "ninja", 1, [], ["/site/torch/lib/libc10.so"], Path(runtime))
    _compile._write_ninja_file(recipe, tools, tmp_path, ["-fopenmp"])
    *compilations, link = re.findall("words = (.*)", (tmp_path / "build.ninja").read_text())
    assert all("-fopenmp" in words for words in compilations)
    assert runtime in link and "-fopenmp" not in link  # that would add the compiler's own


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("shared", ["hidden from the linker", "refused"])
def test_torchs_standard_library_is_linked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_python: RunPython, shared: str
) -> None:
    """A message with a number, from a library whose compiler only has a static standard library to offer."""
    if shutil.which("g++") is None:
        pytest.skip("other compilers name the static library otherwise")
    command = ["g++", "-print-file-name=libstdc++.a"]
    archive = Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    if not archive.is_absolute():
        pytest.skip("there is no static standard library")
    if shared == "refused":
        monkeypatch.setenv("CXX", "g++ -static-libstdc++")
    else:
        (tmp_path / "lib").mkdir()
        (tmp_path / "lib/libstdc++.a").symlink_to(archive)
        monkeypatch.setenv("CXX", f"g++ '-L{tmp_path}/lib'")
    message = """\
// capability: none
#include <cstring>
#include <sstream>
extern "C" __attribute__((visibility("default"))) void message(char* out, long number) {
  std::ostringstream text;
  text << "got " << number;
  std::strcpy(out, text.str().c_str());
}
"""
    make_recipe(tmp_path / "csrc", {"cpu/message.cpp": message})
    library = _build.build(Recipe("0", tmp_path / "csrc", ("default",)))
    code = """
import ctypes, sys, torch
text = ctypes.create_string_buffer(99)
ctypes.CDLL(sys.argv[1]).message(text, ctypes.c_long(-1))
print(text.value.decode())
"""
    done = run_python(code, library)
    assert (done.returncode, done.stdout) == (0, "got -1\n"), done.stderr


def test_clang_gets_no_second_openmp_runtime(capsys: pytest.CaptureFixture[str]) -> None:
    gnu = _compile.Tools(["clang++"], "ninja", 1, [], [], Path("/torch/lib/libgomp.so.1"))
    assert _compile._openmp_flags(gnu, "g++ (Debian) 12") == ["-fopenmp"]
    assert capsys.readouterr().err == ""
    assert _compile._openmp_flags(gnu, "Debian clang version 14") == []
    assert "one thread" in capsys.readouterr().err
    intel = replace(gnu, openmp_runtime=Path("/env/lib/libiomp5.so"))
    assert _compile._openmp_flags(intel, "Debian clang version 14") == ["-fopenmp"]


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("fault", ["address", "undefined"])
def test_sanitizers_see_faults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_python: RunPython, fault: str
) -> None:
    faults = """\
// capability: none
#define EXPORT extern "C" __attribute__((visibility("default"))) int
__attribute__((noinline)) static int read(const int* p, int i) { return p[i]; }
EXPORT address(int i) { int* p = new int[4](); int x = read(p, i); delete[] p; return x; }
EXPORT undefined(int i) { return i + 0x7ffffff0; }
"""
    if shutil.which("g++") is None:
        pytest.skip("other compilers name the runtime otherwise")
    monkeypatch.setenv("CXX", "g++")
    monkeypatch.setenv("MASKED_OPS_SANITIZE", "1")
    library = _build.build(make_recipe(tmp_path / "csrc", {"cpu/faults.cpp": faults}))
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    preload = {"LD_PRELOAD": runtime.stdout.strip(), "ASAN_OPTIONS": "detect_leaks=0"}
    code = "import ctypes, sys; print(getattr(ctypes.CDLL(sys.argv[1]), sys.argv[2])(int(sys.argv[3])))"
    assert run_python(code, library, fault, 3, **preload).returncode == 0
    done = run_python(code, library, fault, 4 if fault == "address" else 16, **preload)
    assert done.returncode != 0
    assert ("heap-buffer-overflow" if fault == "address" else "signed integer overflow") in done.stderr


# --- folders ---------------------------------------------------------------------------------------------------------


def test_a_cache_that_cannot_be_written_is_named(
    tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()  # root may write to any folder, but not below a file
    monkeypatch.setenv("MASKED_OPS_CACHE_DIR", str(tmp_path / "file/cache"))
    with pytest.raises(BuildError, match=r"no folder to build in .*file/cache.*set MASKED_OPS_CACHE_DIR to one"):
        _build.build(recipe)
    monkeypatch.setenv("MASKED_OPS_CACHE_DIR", "/proc/masked_ops")
    with pytest.raises(BuildError, match="no folder to build in"):
        _build.build(recipe)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that takes the library where there is no home to take it."""
    (tmp_path / "home").touch()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path / "tmp" / f"masked_ops-{os.getuid()}"


def test_without_a_home_the_library_goes_to_a_private_folder(temporary: Path, recipe: Recipe) -> None:
    library = _build.build(recipe)
    assert library.is_relative_to(temporary) and answer(library) == 42
    assert stat.S_IMODE(temporary.stat().st_mode) == 0o700
    assert _build.find_library(replace(recipe)) == library


@pytest.mark.parametrize("hostile", ["writable", "link", "owner"])
def test_a_temporary_folder_of_others_is_not_used(
    temporary: Path, tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, hostile: str
) -> None:
    _build.build(recipe)
    if hostile == "writable":
        temporary.chmod(0o777)
    elif hostile == "link":
        temporary.rename(tmp_path / "elsewhere")
        temporary.symlink_to(tmp_path / "elsewhere")
    elif os.getuid() == 0:
        os.chown(temporary, 12345, 12345)
    else:
        monkeypatch.setattr(os, "getuid", lambda: 12345)
        temporary.rename(temporary.parent / "masked_ops-12345")
    assert _build.find_library(recipe) is None
    with pytest.raises(BuildError, match="is open to other users"):
        _build.build(recipe)


def test_the_home_of_nobody(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKED_OPS_CACHE_DIR", "~nobody of this name/cache")
    with pytest.raises(BuildError, match="MASKED_OPS_CACHE_DIR is '~nobody of this name/cache', and there is no"):
        _build.build(recipe)


def test_no_space(cache: Path, recipe: Recipe, compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    # No file may grow beyond 4 KB: the compiler's first object is the first to need more.
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))"
    process = Process(recipe, limit)
    _, err = process.finish()
    assert process.returncode == 1
    assert "BuildError: there is no space left for the kernels; make room, or set MASKED_OPS_CACHE_DIR" in err
    assert not leftovers(cache)

    Compiler(compiler.folder, "echo 'fatal error: No space left on device' >&2; exit 1")
    with pytest.raises(BuildError, match="there is no space left"):
        _build.build(recipe)
    assert not leftovers(cache)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(_build, "compile_library", full)
    with pytest.raises(BuildError, match="there is no space left"):
        _build.build(recipe)


# --- several processes, and processes that die -----------------------------------------------------------------------


def test_eight_processes_make_one_build(cache: Path, recipe: Recipe, compiler: Compiler) -> None:
    processes = [Process(recipe) for _ in range(8)]
    results = [process.finish()[0] for process in processes]
    assert set(results) == {str(_build.library_path(recipe))}
    assert len(compiler.processes) == 2
    assert answer(Path(results[0])) == 42


def test_a_killed_build_leaves_nothing_in_the_way(cache: Path, recipe: Recipe, compiler: Compiler) -> None:
    compiler.hold()
    process = Process(recipe)
    wait_for(lambda: compiler.processes)
    waiting = Process(recipe)
    killed = compiler.processes
    process.send_signal(signal.SIGKILL)
    process.finish()
    if shutil.which("setpriv"):
        wait_for(lambda: not any(map(is_alive, killed)))
    compiler.release()
    library, _ = waiting.finish()
    assert answer(Path(library)) == 42
    assert _build.build(recipe) == Path(library)
    assert not leftovers(cache)


def test_left_overs_are_removed(cache: Path, recipe: Recipe) -> None:
    for name in (recipe.folder_name, "0-0123456789abcdef", "0-fedcba9876543210"):
        (cache / f"{name}.tmp-12345678").mkdir(parents=True)
        (cache / f"{name}.tmp-12345678/half.o").touch()
        (cache / f"{name}.lock").touch()
    others = cache / "photos.tmp-12345678/2026"  # of somebody who shares the folder
    others.mkdir(parents=True)
    with filelock.FileLock(cache / "0-fedcba9876543210.lock"):
        assert answer(_build.build(recipe)) == 42
    assert {path.name for path in leftovers(cache)} == {"0-fedcba9876543210.tmp-12345678", others.parent.name}
    assert others.exists()


def test_interrupt(cache: Path, recipe: Recipe, compiler: Compiler) -> None:
    compiler.hold()
    process = Process(recipe)
    wait_for(lambda: compiler.processes)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, err = process.finish()
    assert process.returncode == -signal.SIGINT
    assert "KeyboardInterrupt" in err and "BuildError" not in err
    assert not leftovers(cache)
    assert not list(cache.glob("*.log"))
    wait_for(lambda: not any(map(is_alive, compiler.processes)))
    compiler.release()
    assert answer(_build.build(recipe)) == 42


def test_who_waits_for_a_build_that_fails_does_not_repeat_it(cache: Path, recipe: Recipe, compiler: Compiler) -> None:
    Compiler(compiler.folder, "echo 'error: bad luck' >&2; exit 1")
    compiler.hold()
    first = Process(recipe)
    wait_for(lambda: compiler.processes)
    second = Process(recipe, "from masked_ops import _build; _build._QUIET_WAIT = 0")
    assert second.stderr is not None
    assert "another process is building the kernels; waiting for" in second.stderr.readline()
    before = len(compiler.processes)
    compiler.release()
    assert "BuildError: the kernels cannot be compiled: error: bad luck" in first.finish()[1]
    assert "BuildError: the kernels cannot be compiled: error: bad luck (tried by another" in second.finish()[1]
    assert len(compiler.processes) == before
    # Who comes later tries anew.
    Compiler(compiler.folder)
    assert answer(_build.build(replace(recipe))) == 42


def test_threads_make_one_build(cache: Path, recipe: Recipe, compiler: Compiler) -> None:
    results: list[Path] = []
    threads = [threading.Thread(target=lambda: results.append(_build.build(replace(recipe)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == [_build.library_path(recipe)] * 4
    assert len(compiler.processes) == 2


def test_waiting_has_an_end(cache: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_build, "_QUIET_WAIT", 0.05)
    monkeypatch.setattr(_build, "_WAIT_LIMIT", 0.05)
    cache.mkdir()
    with filelock.FileLock(cache / f"{recipe.folder_name}.lock"), pytest.raises(BuildError) as error:
        thread_error: list[BaseException] = []

        def build() -> None:
            try:
                _build.build(recipe)
            except BuildError as error:
                thread_error.append(error)

        thread = threading.Thread(target=build)
        thread.start()
        thread.join(60)
        raise thread_error[0]
    assert "another process has held" in str(error.value)


def test_a_child_forked_during_a_build(cache: Path, recipe: Recipe, compiler: Compiler) -> None:
    compiler.hold()
    fork = """
import os, threading
builder = threading.Thread(target=lambda: _build.build(Recipe("0", Path(sys.argv[2]), ("default",), torch=False)))
builder.start()
while not os.path.exists(sys.argv[3]):
    pass
child = os.fork()
if child == 0:
    os.unlink(sys.argv[4])
"""
    arguments = [str(compiler.folder / "compiled"), str(compiler.folder / "hold")]
    code = PROCESS.format(before=fork) + "if child != 0:\n    builder.join(); assert os.waitpid(child, 0)[1] == 0\n"
    package = str(Path(_build.__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", code, package, str(recipe.source_root), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(str(_build.library_path(recipe))) == 2
    assert len(compiler.processes) == 2


# --- what the user sees ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("cache")
def test_output(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    library = _build.build(recipe)
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith(f"masked_ops: compiling 2 files for default into {library.parent} (first use only, about ")
    assert last.startswith("masked_ops: compiled in ")
    _build.build(recipe)
    assert capsys.readouterr() == ("", "")


@pytest.mark.usefixtures("cache")
def test_no_file_is_left_open(cache: Path, recipe: Recipe) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ResourceWarning)
        assert answer(_build.build(recipe)) == 42
        gc.collect()
    assert not caught, caught[0].message


def test_output_on_a_terminal(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    _build.build(recipe)
    steps = terminal.getvalue().split("\r\033[K")
    assert [step[:17] for step in steps[1:4]] == ["masked_ops: [1/3]", "masked_ops: [2/3]", "masked_ops: [3/3]"]
    assert steps[4].startswith("masked_ops: compiled in ")


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("stderr", [None, "closed"])
def test_output_without_stderr(recipe: Recipe, monkeypatch: pytest.MonkeyPatch, stderr: str | None) -> None:
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", closed if stderr else None)
    assert answer(_build.build(recipe)) == 42


FIRST_USE = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch, masked_ops
    from masked_ops import functional
    weight, mask = torch.ones(3, 2), torch.tensor([[1, 0], [0, 1], [1, 1]])
    for _ in range(3):
        y = functional.masked_linear(torch.ones(1, 2), weight, mask)
ours = [str(item.message) for item in caught if "masked_ops" in str(item.message)]
assert torch.equal(y, torch.tensor([[1.0, 1.0, 2.0]])), y
assert masked_ops.is_available() is False
print(len(ours), ours[0])
"""


# What is set, and what the warning then advises.
FAULTS = {
    "no compiler": ({"CXX": "/nowhere/g++"}, "install one (apt-get install g++)"),
    "broken compiler": ({"CXX": "false"}, "install g++ 11 or newer"),
    "no cache": (
        {"MASKED_OPS_CACHE_DIR": "/proc/masked_ops"},
        "set MASKED_OPS_CACHE_DIR to one that can be written to",
    ),
    "no build": ({"MASKED_OPS_NO_BUILD": "1"}, "unset it"),
}


def test_without_a_library_plain_torch_serves_with_one_warning(
    cache: Path, run_python: RunPython, tmp_path: Path
) -> None:
    code = {name: f"import os; os.environ.update({fault})\n{FIRST_USE}" for name, (fault, _) in FAULTS.items()}
    needed = {"CXX": "/nowhere/g++", "MASKED_OPS_REQUIRE_BUILD": "1"}
    code["needed"] = f"import os; os.environ.update({needed})\n{FIRST_USE}"
    results = run_each_in_a_process(code, run_python, tmp_path, MASKED_OPS_CACHE_DIR=cache)
    status, output = results.pop("needed")
    assert status == 1 and "BuildError: CXX is '/nowhere/g++', which is no program here" in output
    for name, (status, output) in results.items():
        assert status == 0, (name, output)
        assert "1 masked_ops runs on plain torch" in output and FAULTS[name][1] in output, (name, output)


def test_import_builds_nothing_and_loads_little(cache: Path, run_python: RunPython, compiler: Compiler) -> None:
    code = """
import sys, torch
before = set(sys.modules)
import masked_ops
loaded = set(sys.modules) - before
print(*sorted({name.partition(".")[0] for name in loaded} - {"masked_ops", "torch"} - set(sys.stdlib_module_names)))
print(*sorted(loaded & {"masked_ops._C", "torch._dynamo", "torch._inductor", "torch.utils.cpp_extension"}))
"""
    done = run_python(code, MASKED_OPS_CACHE_DIR=cache)
    assert done.stdout == "\n\n", done
    assert not compiler.processes and not cache.exists()


# --- the real library ------------------------------------------------------------------------------------------------


def test_the_library_brings_no_second_openmp_runtime(run_python: RunPython, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the suite's own library, built or to be built
    code = """
import re, torch
def runtimes():
    return set(re.findall(r"\\S*/lib(?:g|i)?omp5?[-.]\\S*", open("/proc/self/maps").read()))
torch.ones(1000, 1000) @ torch.ones(1000, 1000)
before = runtimes()
from masked_ops import _build
path = _build.build()
module = _build.load_library(path)
assert _build.load_library(path) is module
assert len(before) == 1 and runtimes() == before, (before, runtimes())
print(module.__name__, module.__file__ == str(path))
"""
    done = run_python(code, timeout=600)
    assert done.stdout == "masked_ops._C True\n", done.stderr


@pytest.mark.parametrize("capability", ["default", None])
def test_the_capability_is_chosen_at_run_time(
    run_python: RunPython, monkeypatch: pytest.MonkeyPatch, capability: str | None
) -> None:
    monkeypatch.undo()
    code = "import masked_ops; masked_ops.is_available(); print(masked_ops._ops._module.capability())"
    done = run_python(code, timeout=600, MASKED_OPS_CAPABILITY=capability)
    assert done.stdout == f"{capability or _build.capability()}\n".upper(), done.stderr


def test_what_is_no_library_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "masked_ops._C", raising=False)
    (tmp_path / "libmasked_ops.so").write_text("no library")
    with pytest.raises(BuildError, match=r"cannot be loaded \(.*\); remove .* to have it built again"):
        _build.load_library(tmp_path / "libmasked_ops.so")
    assert "masked_ops._C" not in sys.modules


@pytest.mark.parametrize("build", ["1", "0"])
def test_the_main_module_tells_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_python: RunPython, build: str
) -> None:
    code = "import runpy, sys; sys.argv[1:] = []; runpy.run_module('masked_ops', run_name='__main__')"
    if build == "1":
        monkeypatch.undo()
        done = run_python(code, timeout=600)
        assert "compiled; " in done.stdout and "libmasked_ops.so (" in done.stdout and "CUDA kernels" in done.stdout
        rates = "(converted|dot products|matrix units)"
        assert re.search(f"torch's GEMM +bfloat16: {rates}, float16: {rates}\n", done.stdout)
    else:
        done = run_python(code, MASKED_OPS_CACHE_DIR=tmp_path / "cache", CXX="/nowhere/g++")
        assert "plain torch serves" in done.stdout and "CXX is '/nowhere/g++'" in done.stdout
        assert done.stderr == ""
    assert f"masked_ops {masked_ops.__version__}, torch {torch.__version__}" in done.stdout
    assert " checks passed in " in done.stdout
    assert done.returncode == 0


def test_the_main_module_fails_with_the_self_test(cache: Path, run_python: RunPython) -> None:
    code = """
import runpy, sys
from masked_ops import functional
right = functional.masked_linear
functional.masked_linear = lambda input, weight, mask, bias: right(input, weight, mask, bias) + (len(input) == 1)
functional.masked_conv3d = lambda *_: 1 / 0
sys.argv[1:] = []
runpy.run_module("masked_ops", run_name="__main__")
"""
    done = run_python(code, MASKED_OPS_CACHE_DIR=cache, MASKED_OPS_NO_BUILD="1")
    assert done.returncode == 1
    assert "linear, float32, binary mask, 1 rows: wrong result" in done.stdout
    assert "conv3d: ZeroDivisionError: division by zero" in done.stdout
    assert " FAILED in " in done.stdout
    done = run_python(code, MASKED_OPS_CACHE_DIR=cache, MASKED_OPS_NO_BUILD="1", MASKED_OPS_REQUIRE_BUILD="1")
    assert done.returncode == 1 and "MASKED_OPS_REQUIRE_BUILD is set" in done.stdout


# --- the package -----------------------------------------------------------------------------------------------------


REGISTER = """\
#include <c10/core/ScalarType.h>
#include <pybind11/pybind11.h>
PYBIND11_MODULE(_C, m) { m.def("answer", [] { return c10::elementSize(c10::kLong) == 8 ? 42 : 0; }); }
"""


def install(tmp_path: Path, **environment: str) -> Path:
    """The package as pip installs it, with the stand-in for its sources."""
    project = tmp_path / "project"
    shutil.copytree(ROOT / "masked_ops", project / "masked_ops", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE"):
        shutil.copy(ROOT / name, project / name)
    (project / "README.md").touch()
    make_recipe(project / "csrc", SOURCES | {"register.cpp": REGISTER})
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-compile"]
    done = subprocess.run(
        [*command, "--target", str(tmp_path / "site"), str(project)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return tmp_path / "site"


USE = """
import sys
sys.dont_write_bytecode = True
sys.path.insert(0, sys.argv[1])
from masked_ops import _build
path = _build.build()
print(path, _build.load_library(path).answer())
"""


def test_installation(tmp_path: Path, cache: Path, run_python: RunPython) -> None:
    site = install(tmp_path)
    assert (site / "masked_ops/py.typed").exists()
    before = sorted(site.rglob("*"))
    assert not [path for path in before if path.suffix == ".so"]
    done = run_python(USE, site, PYTHONPATH=None, MASKED_OPS_CACHE_DIR=cache)
    assert done.stdout == f"{next(cache.glob('*/libmasked_ops.so'))} 42\n", done.stderr
    assert sorted(site.rglob("*")) == before  # nothing is written into the package


def test_installation_with_a_library_built_ahead(tmp_path: Path, cache: Path, run_python: RunPython) -> None:
    site = install(tmp_path, MASKED_OPS_PREBUILD="1")
    record = json.loads((site / "masked_ops/_prebuilt/library.json").read_text())
    assert list(record["capabilities"]) == list(_build.this_process(ahead=True).capabilities)
    wheel = next(site.glob("masked_ops-*.dist-info/WHEEL")).read_text()
    assert "Root-Is-Purelib: false" in wheel and "none-any" not in wheel
    done = run_python(USE, site, PYTHONPATH=None, MASKED_OPS_CACHE_DIR=cache, CXX="/nowhere/g++")
    assert done.stdout == f"{site / 'masked_ops/_prebuilt/libmasked_ops.so'} 42\n", done.stderr
    assert not cache.exists()
