"""The CUDA kernels, once emulated and, where there is a GPU, once more on it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cuda_library import Library, emulated, has_nvcc, native

NAMES = ["emulated", "cuda"] if torch.cuda.is_available() and has_nvcc() else ["emulated"]


@pytest.fixture(scope="session")
def libraries() -> dict[str, Library]:
    return {}


@pytest.fixture(params=NAMES)
def cuda(request: pytest.FixtureRequest, libraries: dict[str, Library]) -> Iterator[Library]:
    name = request.param
    if name not in libraries:
        libraries[name] = Library(emulated(), "cpu") if name == "emulated" else Library(native(), "cuda")
    library = libraries[name]
    library.set_mode(lazy=False, order=0)
    library.set_device()
    yield library
    library.free()
