"""Libraries of the tests' own: built once for all processes, and kept while what they are made of stays the same."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

import filelock
import torch
from paths import ROOT

CACHE = ROOT / ".cache" / "tests"


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "g++"))


def built(name: str, sources: Iterable[Path], build: Callable[[Path], object]) -> Path:
    """The folder that ``build`` has filled from these files; the Python file with its commands is one of them."""
    version = subprocess.run([*compiler(), "--version"], capture_output=True, check=True).stdout
    digest = hashlib.sha256(f"{compiler()} {torch.__version__}".encode() + version)
    for source in sorted(sources):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    folder = CACHE / f"{name}-{digest.hexdigest()[:16]}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(CACHE / f"{name}.lock"):
        if not folder.exists():
            for old in CACHE.glob(f"{name}-*"):
                shutil.rmtree(old)
            fresh = CACHE / f"{name}-new"
            fresh.mkdir()
            build(fresh)
            fresh.rename(folder)
    return folder
