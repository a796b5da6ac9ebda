"""The CUDA kernels, once emulated and, where there is a GPU, once more on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cuda_library import Library, build_emulated, build_native, has_nvcc

NAMES = ["emulated", "cuda"] if torch.cuda.is_available() and has_nvcc() else ["emulated"]


@pytest.fixture(scope="session")
def libraries() -> dict[str, Library]:
    return {}


@pytest.fixture(params=NAMES)
def cuda(
    request: pytest.FixtureRequest, libraries: dict[str, Library], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Library]:
    name = request.param
    if name not in libraries:
        folder: Path = tmp_path_factory.mktemp(name)
        emulated = name == "emulated"
        libraries[name] = Library((build_emulated if emulated else build_native)(folder), "cpu" if emulated else "cuda")
    library = libraries[name]
    library.set_mode(lazy=False, order=0)
    library.set_device()
    yield library
    library.free()
