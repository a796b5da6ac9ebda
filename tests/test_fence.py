"""The fence of ``make fence`` stops masked loads of one element too many, which AddressSanitizer does not see."""

from __future__ import annotations

import itertools
import os
import platform
import shlex
import shutil
import signal
import subprocess
from pathlib import Path

import builds
import pytest
from generators import run_each_in_a_process
from paths import ROOT, RunPython

from masked_ops import _recipe

CC = shlex.split(os.environ.get("CC", "cc"))
SIZES = {"tensor": 5, "scratch": 16}  # scratch is aligned to 64 bytes
X86 = platform.machine() in ("x86_64", "AMD64")

# The sum of ``count`` floats; lanes of the vector beyond them are masked.
PROBE = """
#include "cpu/api.h"
#define PROBE(isa) extern "C" __attribute__((target(#isa))) float isa##_probe(const float* p, int count)
#if defined(__x86_64__)
#include <immintrin.h>
PROBE(avx512f) { return _mm512_reduce_add_ps(_mm512_maskz_loadu_ps(__mmask16((1 << count) - 1), p)); }
PROBE(avx2) {
  const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  float sums[8], sum = 0;
  _mm256_storeu_ps(sums, _mm256_maskload_ps(p, mask));
  for (float x : sums) sum += x;
  return sum;
}
#endif
extern "C" float plain_probe(const float* p, int count) { return count ? plain_probe(p + 1, count - 1) + *p : 0; }
extern "C" void* probe_scratch(size_t bytes) { return masked_ops::cpu::scratch(masked_ops::cpu::Slot::kTable, bytes); }
"""

LOAD = """
import ctypes, torch
library = ctypes.CDLL("{library}")
library.probe_scratch.restype = ctypes.c_void_p
library.{probe}_probe.restype = ctypes.c_float
x = torch.ones({size})
start = x.data_ptr() if "{where}" == "tensor" else library.probe_scratch({size} * 4)
ctypes.memmove(start, x.data_ptr(), {size} * 4)
assert library.{probe}_probe(ctypes.c_void_p(start + ({first}) * 4), 5) == 5
"""
WRITE = "import ctypes, torch; x = torch.ones(5); ctypes.memset(x.data_ptr() + ({byte}), 0, 1); del x"


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The fence, and the probes with the library's scratch as ``make fence`` has it, under the library's name."""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("the fence takes the place of glibc's functions")
    if not shutil.which(CC[0]) or not shutil.which(builds.compiler()[0]):
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("fence")
    probe = folder / "probe.cpp"
    probe.write_text(PROBE)
    fence, library = folder / "fence.so", folder / "libmasked_ops.so"
    shared = ("-O1", "-shared", "-fPIC", "-o")
    subprocess.run([*CC, "-std=c11", *shared, fence, ROOT / "tests" / "fence.c"], check=True)
    root = _recipe.source_root()
    flags = (*_recipe._FENCE_FLAGS, "-std=c++20", f"-I{root}", *shared)
    subprocess.run([*builds.compiler(), *flags, library, root / "cpu" / "dispatch.cpp", probe], check=True)
    return fence, library


@pytest.mark.parametrize("end", ["back", "front"])
def test_what_is_outside_is_stopped(
    libraries: tuple[Path, Path], run_python: RunPython, tmp_path: Path, end: str
) -> None:
    fence, library = libraries
    code = {f"write {byte}": WRITE.format(byte=byte) for byte in (-1, 0, 19, 20)}
    probes = ["plain", *(name for name in ("avx2", "avx512f") if X86 and name in _recipe.cpu_flags())]
    for probe, (where, size) in itertools.product(probes, SIZES.items()):
        inside, outside = (size - 5, size - 4) if end == "back" else (0, -1)
        for place, first in ("inside", inside), ("outside", outside):
            code[f"{probe} {place} {where}"] = LOAD.format(
                library=library, probe=probe, where=where, size=size, first=first
            )
    results = run_each_in_a_process(code, run_python, tmp_path, LD_PRELOAD=fence, FENCE=end)
    for name, (status, output) in results.items():
        if "outside" in name:
            assert status == -signal.SIGSEGV, (name, output)
            assert "outside of an allocation" in output and str(library) in output, (name, output)
        elif "inside" in name:
            assert status == 0, (name, output)
    # A write is found at once on one side, and when the memory is freed on the other.
    before, behind = (signal.SIGABRT, signal.SIGSEGV) if end == "back" else (signal.SIGSEGV, signal.SIGABRT)
    statuses = [results[f"write {byte}"][0] for byte in (-1, 0, 19, 20)]
    assert statuses == [-before, 0, 0, -behind], results
