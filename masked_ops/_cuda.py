"""The CUDA kernels: built when the first of them is wanted, and what there is to tell of them.

The compiled module asks ``load`` for their library at the first call that a kernel may serve, on whichever thread that
is. Which kernels may be used on a device it knows itself: see csrc/device.h.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from types import ModuleType

from . import _build
from ._cuda_recipe import CudaRecipe, cuda_recipe, cuda_switch, torch_has_cuda
from ._recipe import BuildError

_lock = threading.RLock()


def recipe() -> CudaRecipe:
    """What to build for the devices of this process; without any, for sm_80 and sm_90a.

    Raises:
        BuildError: if the kernels run on none of them.
    """
    import torch

    if not torch.cuda.is_available():
        return cuda_recipe()
    capabilities = [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]
    new_enough = [capability for capability in capabilities if capability >= (8, 0)]
    return cuda_recipe(new_enough or capabilities)


def load() -> tuple[str, str]:
    """The library's path, building it if need be, or an empty path and the reason; a failure is told in a warning."""
    if cuda_switch() is False:
        return "", "MASKED_OPS_CUDA=0 turns the CUDA kernels off"
    if not cuda_switch() and not torch_has_cuda():
        return "", "this torch was built without CUDA"
    with _lock:
        try:
            return str(_build.build(recipe())), ""
        except BuildError as error:
            reason = f"there are no CUDA kernels: {error}"
            warn(f"masked_ops runs on torch's own operations on CUDA devices: {reason}")
            return "", reason


def warn(message: str) -> None:
    """On whichever thread the library is."""
    warnings.warn(message, RuntimeWarning, stacklevel=3)


def facts(module: ModuleType) -> Iterator[tuple[str, str]]:
    """For ``python -m masked_ops``: whether there are CUDA kernels, why not, and which may be used on each device."""
    import torch

    if cuda_switch() is None and not torch_has_cuda():
        yield "CUDA kernels", "none; this torch was built without CUDA"
        return
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if cuda_switch() is not None or devices:
        reason = module.cuda_reason()
        if reason:
            yield "CUDA kernels", f"none; {reason}"
        else:
            built = recipe()
            library = _build.library_path(built)
            record = _build.read_record(library.parent, built.library) or {}
            yield "CUDA kernels", f"built for {', '.join(record.get('architectures', []))}"
            yield "", str(library)
            yield "", f"{record.get('compiler', 'unknown')} ({record.get('seconds', 0):.0f} s)"
    else:
        yield "CUDA kernels", "none; there is no CUDA device"
    for index in range(devices):
        states = module.cuda_kernels(index)
        yield f"cuda:{index}", torch.cuda.get_device_name(index)
        for reason in dict.fromkeys(state for _, state in states.values()):
            names = ", ".join(name for name, (_, state) in states.items() if state == reason)
            yield "", f"{names}: {reason}"
        unconfirmed = [name for name, (confirmed, state) in states.items() if state == "ok" and not confirmed]
        if unconfirmed:
            yield "", f"confirmed by their own checks here alone: {', '.join(unconfirmed)}"
