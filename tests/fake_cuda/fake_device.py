"""A CUDA device for a torch without one (fake_device.cpp), to test the host side of the CUDA kernels on.

It changes torch for the whole process, so that test_cuda_host.py runs the tests that use it in processes of their own.
There this file is a plugin of pytest, and MASKED_OPS_TEST_FAKE_CUDA names the folder of the two libraries: the device
has to be there before torch asks for the first time whether there is one.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

DEVICE, KERNELS = "libfake_device.so", "libfake_kernels.so"
FOLDER = os.environ.get("MASKED_OPS_TEST_FAKE_CUDA")
_device = ctypes.CDLL(f"{FOLDER}/{DEVICE}") if FOLDER else None


def install() -> None:
    """Let torch's Python side and masked_ops take the device for a real one."""
    import torch

    from masked_ops import _cuda, _ops

    torch.cuda._lazy_init = lambda: None  # type: ignore[assignment]
    assert _ops.load() and _ops._module is not None
    library = os.environ.get("MASKED_OPS_TEST_EMULATED") or f"{FOLDER}/{KERNELS}"
    _ops._module.set_cuda_loader(lambda: (library, ""), _cuda.warn)


class FakeCuda:
    """What a test tells the device, and what it learns from it."""

    def __init__(self) -> None:
        assert FOLDER is not None and _device is not None
        self._device = _device
        self.kernels = Path(FOLDER, KERNELS)
        self._kernels = ctypes.CDLL(str(self.kernels))
        for name in ("synchronisations", "waits_of_streams", "recorded_on_streams", "allocated", "freed"):
            getattr(self._device, f"fake_{name}").restype = ctypes.c_int64

    def __getattr__(self, name: str) -> int:
        if name not in (
            "synchronisations",
            "waits_of_streams",
            "recorded_on_streams",
            "allocated",
            "freed",
            "current_device",
        ):
            raise AttributeError(name)
        return int(getattr(self._device, f"fake_{name}")())

    @contextlib.contextmanager
    def capture(self, stream: int = 7) -> Iterator[None]:
        """A graph is captured on this stream of device 0."""
        with self.stream(stream):
            self._device.fake_capture(ctypes.c_int64(stream))
            try:
                yield
            finally:
                self._device.fake_capture(ctypes.c_int64(-1))

    @contextlib.contextmanager
    def stream(self, stream: int, device: int = 0) -> Iterator[None]:
        self._device.fake_set_stream(device, ctypes.c_int64(stream))
        try:
            yield
        finally:
            self._device.fake_set_stream(device, ctypes.c_int64(0))

    @contextlib.contextmanager
    def late_events(self) -> Iterator[None]:
        """No event is over, as if the device had not come to it."""
        self._device.fake_late_events(1)
        try:
            yield
        finally:
            self._device.fake_late_events(0)

    @contextlib.contextmanager
    def memory(self, largest: int) -> Iterator[None]:
        """No allocation of more than this many bytes succeeds."""
        self._device.fake_limit_allocations(ctypes.c_int64(largest))
        try:
            yield
        finally:
            self._device.fake_limit_allocations(ctypes.c_int64(-1))

    @contextlib.contextmanager
    def no_memory_once(self, number: int) -> Iterator[None]:
        """The allocation of this number from here on fails, and no other."""
        self._device.fake_fail_allocation(ctypes.c_int64(number))
        try:
            yield
        finally:
            self._device.fake_fail_allocation(ctypes.c_int64(0))

    @contextlib.contextmanager
    def failing(self, function: str, error: int) -> Iterator[None]:
        """The kernels' C function of this name returns ``error``; 0: it computes, but wrongly."""
        self._kernels.fake_fail(function.encode(), error)
        try:
            yield
        finally:
            self._kernels.fake_fail(b"", 0)

    def calls(self, function: str) -> int:
        return int(self._kernels.fake_calls(function.encode()))


@pytest.fixture(scope="session")
def the_device() -> FakeCuda:
    from masked_ops import _ops

    device = FakeCuda()
    assert _ops._module is not None
    # Their own checks would count in some tests; emulated they take ten seconds, on either device the same ones.
    for index in range(1 if "MASKED_OPS_TEST_EMULATED" in os.environ else 2):
        _ops._module.cuda_kernels(index)
    return device


@pytest.fixture
def cuda(the_device: FakeCuda) -> Iterator[FakeCuda]:
    """The device, with nothing remembered of masks."""
    import masked_ops

    masked_ops.clear_cache()
    yield the_device
    assert the_device.current_device == 0  # every guard has put it back
