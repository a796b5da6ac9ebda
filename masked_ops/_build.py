"""Finds the C++ library or builds it: cache, lock, verification, loading.

A library lives in ``<cache_root()>/<version>-<key>/`` beside a record of its size, its SHA-256 and what it was built
for. The key covers all that decides its bits or whether it can be loaded: sources, flags, compiler, torch, Python,
machine. It is compiled in a temporary folder under an OS lock and renamed into place, so that whoever looks sees a
whole library or none. It is hashed before it is loaded, since a truncated library would end the process with a signal.

Finding a library that is there takes a few ms, runs no program, and needs no compiler.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.machinery
import importlib.util
import json
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from ._compile import RECORD, CompilationError, Tools, compile_library, find_tools, no_space, say
from ._cuda_recipe import cuda_recipe, cuda_switch, torch_has_cuda
from ._recipe import BuildError, LibraryRecipe, Recipe, capability, enabled, this_process, usable_capabilities

__all__ = [
    "BuildError",
    "build",
    "build_ahead",
    "cache_key",
    "cache_root",
    "capability",
    "capability_of",
    "find_library",
    "library_path",
    "load_library",
    "read_record",
    "this_process",
    "usable_capabilities",
]

_MODULE = "masked_ops._C"
_PREBUILT = Path(__file__).resolve().parent / "_prebuilt"
_QUIET_WAIT = 2  # seconds that a process waits for the build of another before it says so
_WAIT_LIMIT = 30 * 60  # and before it gives up


class _NotWritableError(Exception):
    """Nothing can be built below this folder; another one may do."""


# --- cache -----------------------------------------------------------------------------------------------------------


class _Root(NamedTuple):
    path: Path
    private: bool  # lies in a folder that everybody writes to, and is used only if nobody else can write to it


def _roots() -> Iterator[_Root]:
    """Where libraries are looked for and built, best first."""
    chosen = os.environ.get("MASKED_OPS_CACHE_DIR")
    if chosen:
        try:
            folder = Path(chosen).expanduser().absolute()
        except RuntimeError:  # nobody's home
            raise BuildError(f"MASKED_OPS_CACHE_DIR is {chosen!r}, and there is no such home") from None
        yield _Root(folder, private=False)
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


def read_record(folder: Path, library: str = Recipe.library) -> dict[str, Any] | None:
    """The record of the library in ``folder`` if the library is whole, else None."""
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_bytes())
        content = (folder / library).read_bytes()
        whole = record["size"] == len(content) and record["sha256"] == hashlib.sha256(content).hexdigest()
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if whole else None


def _rank(folder: Path, recipe: LibraryRecipe) -> int | None:
    """How good the library in ``folder`` is for this process (0 is best); None if there is none that it can use."""
    record = read_record(folder, recipe.library)
    if record is None or record.get("requirements") != recipe.requirements:
        return None
    return recipe.rank(record)


def find_library(recipe: LibraryRecipe) -> Path | None:
    """The verified library of ``recipe`` if it is there: in the package (built ahead), or in the cache.

    Where nothing can be compiled, any library that suits this process will do, whichever compiler made it.
    """
    prebuilt = _PREBUILT / recipe.prebuilt
    if _rank(prebuilt, recipe) == 0:
        return prebuilt / recipe.library
    roots = [root.path for root in _roots() if not root.private or _is_private(root.path)]
    for root in roots:
        if _rank(root / recipe.folder_name, recipe) is not None:
            return root / recipe.folder_name / recipe.library
    if recipe.compiler() and not enabled("MASKED_OPS_NO_BUILD"):
        return None
    folders = [prebuilt, *(folder for root in roots for folder in sorted(root.glob(f"{recipe.version}-*")))]
    ranked = [(rank, folder) for folder in folders if (rank := _rank(folder, recipe)) is not None]
    return min(ranked)[1] / recipe.library if ranked else None


def capability_of(library: Path) -> str:
    """Of what a library was built for that was found for this process: the best that the CPU has all of.

    Its kernels may need more than their capability's name says.
    """
    record = json.loads((library.parent / RECORD).read_bytes())
    return usable_capabilities()[this_process().rank(record) or 0]


# --- build -----------------------------------------------------------------------------------------------------------


def build(recipe: LibraryRecipe | None = None) -> Path:
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
        if enabled("MASKED_OPS_NO_BUILD"):
            raise BuildError(
                f"MASKED_OPS_NO_BUILD is set, and {cache_root()} has no library for this process; unset it"
            )
        tools = find_tools(recipe)
        refused = []
        for root in _roots():
            try:
                return _build_below(root, recipe, tools)
            except _NotWritableError as error:
                refused.append(str(error))
        reasons = "; ".join(refused) or "there is no temporary folder"
        raise BuildError(f"no folder to build in ({reasons}); set MASKED_OPS_CACHE_DIR to one that can be written to")
    except (OSError, ValueError) as error:
        raise BuildError(no_space(str(error)) or f"the kernels could not be built: {error}") from error


def library_path(recipe: LibraryRecipe | None = None) -> Path:
    """Where the library is, or where ``build`` would put it."""
    recipe = recipe or this_process()
    return find_library(recipe) or cache_root() / recipe.folder_name / recipe.library


def cache_key() -> str:
    """The key of this process's library."""
    return this_process().key


def _build_below(root: _Root, recipe: LibraryRecipe, tools: Tools) -> Path:
    folder = root.path / recipe.folder_name
    failure = root.path / f"{recipe.folder_name}.failed.log"
    failed_before = _stamp(failure)
    with _locked(root, recipe):
        if _rank(folder, recipe) is not None:  # another process has built it meanwhile
            return folder / recipe.library
        if (failed_now := _stamp(failure)) and failed_now != failed_before:
            message = failure.read_text(errors="replace").partition("\n")[0]
            raise BuildError(f"{message} (tried by another process just now)")
        _sweep(root.path, recipe.folder_name)
        scratch = root.path / f"{recipe.folder_name}.tmp-{os.urandom(4).hex()}"
        try:
            scratch.mkdir()
        except OSError as error:
            raise _NotWritableError(f"{root.path}: {error.strerror}") from error
        try:
            compile_library(recipe, tools, scratch, folder)
            _replace(scratch, folder, recipe.library)
        except CompilationError as error:
            message = str(error)
            with contextlib.suppress(OSError):
                failure.write_text(f"{message}\n\n{error.output}", errors="replace")
                message += f"; all of the compiler's output: {failure}"
            raise BuildError(message) from None
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        failure.unlink(missing_ok=True)
    return folder / recipe.library


def _stamp(path: Path) -> tuple[int, int] | None:
    with contextlib.suppress(OSError):
        status = path.stat()
        return status.st_ino, status.st_mtime_ns
    return None


@contextlib.contextmanager
def _locked(root: _Root, recipe: LibraryRecipe) -> Iterator[None]:
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
            lock.acquire(timeout=_QUIET_WAIT)
        except filelock.Timeout:
            say(f"another process is building the kernels; waiting for {root.path / recipe.folder_name}")
            lock.acquire(timeout=_WAIT_LIMIT)
    except filelock.Timeout:
        raise BuildError(
            f"another process has held {lock.lock_file} for {_WAIT_LIMIT / 60:.0f} minutes; end it and try again"
        ) from None
    except OSError as error:
        raise _NotWritableError(f"{root.path}: {error.strerror or error}") from error
    except NotImplementedError as error:  # no flock on this file system
        raise _NotWritableError(f"{root.path}: {error}") from error
    try:
        # Newer versions of filelock then take a plain file for a lock, and that outlives its holder.
        if isinstance(lock, filelock.SoftFileLock):
            raise _NotWritableError(f"{root.path}: the file system has no locks")
        yield
    finally:
        lock.release()


def _sweep(root: Path, folder_name: str) -> None:
    """Remove what builds that died have left: theirs are the temporary folders whose lock is free.

    The folder may be one that others keep things in, under names that are nearly ours.
    """
    import filelock

    for path in root.glob("*.tmp-*"):
        name = re.fullmatch(r"(.+-[0-9a-f]{16})\.tmp-[0-9a-f]{8}", path.name)
        if name is None:
            continue
        owner = name[1]
        if owner == folder_name:
            shutil.rmtree(path, ignore_errors=True)
            continue
        with contextlib.suppress(filelock.Timeout, OSError), filelock.FileLock(root / f"{owner}.lock", timeout=0):
            shutil.rmtree(path, ignore_errors=True)


def _replace(scratch: Path, folder: Path, library: str) -> None:
    """Put library and record of ``scratch`` in place of ``folder``, in one step for whoever looks."""
    fresh = scratch / "fresh"
    fresh.mkdir()
    for name in (library, RECORD):
        os.rename(scratch / name, fresh / name)
    if os.path.lexists(folder):  # damaged; a process that has it open keeps it
        os.rename(folder, scratch / "damaged")
    os.rename(fresh, folder)


def build_ahead(folder: Path) -> None:
    """Build for all capabilities into ``folder``, to be shipped inside the package; for setup.py.

    The CUDA kernels too, where they are wanted and there is an nvcc.
    """
    recipes: list[LibraryRecipe] = [this_process(ahead=True)]
    if cuda_switch() is not False:
        cuda = cuda_recipe(ahead=True)
        if cuda_switch() or (cuda.compiler() and torch_has_cuda()):
            recipes.append(cuda)
    for recipe in recipes:
        target = folder / recipe.prebuilt
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="masked_ops-") as scratch:
            try:
                compile_library(recipe, find_tools(recipe), Path(scratch), target)
            except CompilationError as error:
                raise BuildError(f"{error}\n{error.output}") from None
            for name in (recipe.library, RECORD):
                shutil.copy2(Path(scratch) / name, target / name)


# --- load ------------------------------------------------------------------------------------------------------------


def load_library(path: str | os.PathLike[str]) -> ModuleType:
    """Load the library as the module ``masked_ops._C``, once in a process.

    Raises:
        BuildError: if it cannot be loaded.
    """
    loaded = sys.modules.get(_MODULE)
    if loaded is not None:
        return loaded
    loader = importlib.machinery.ExtensionFileLoader(_MODULE, os.fspath(path))
    spec = importlib.util.spec_from_file_location(_MODULE, path, loader=loader)
    assert spec is not None
    try:
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    except ImportError as error:
        folder = os.path.dirname(os.fspath(path))
        raise BuildError(f"the library cannot be loaded ({error}); remove {folder} to have it built again") from error
    sys.modules[_MODULE] = module
    return module
