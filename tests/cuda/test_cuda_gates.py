"""The gates on compiled kernels, and that they shut: nvcc is needed, for the instructions also cuobjdump.

``make cuda-check`` fetches what is missing and sets MASKED_OPS_CUDA_CHECK, with which nothing is skipped.
"""

from __future__ import annotations

import functools
import os
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gates
import pytest
from cuda_library import has_nvcc

CUOBJDUMP = gates.find_cuobjdump()
CUTLASS = gates.TOOLS / "cutlass_library" / "source" / "include"
REQUIRED = os.environ.get("MASKED_OPS_CUDA_CHECK", "0") not in ("", "0")

needs_nvcc = pytest.mark.skipif(not has_nvcc() and not REQUIRED, reason="needs nvcc")
needs_cuobjdump = pytest.mark.skipif(CUOBJDUMP is None and not REQUIRED, reason="needs cuobjdump: make cuda-check")
needs_cutlass = pytest.mark.skipif(not CUTLASS.is_dir() and not REQUIRED, reason="needs CuTe: make cuda-check")

SOURCES = sorted(gates.SOURCES.glob("*.cu"))


@functools.cache
def compiled() -> dict[tuple[str, str], gates.Compiled]:
    """All files for all architectures, as many at once as MAX_JOBS allows."""
    jobs = int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        results = {
            (source.stem, architecture): pool.submit(
                gates.compile_source, source, architecture, Path(folder), CUOBJDUMP
            )
            for source in SOURCES
            for architecture in gates.ARCHITECTURES
        }
        return {name: result.result() for name, result in results.items()}


@needs_nvcc
@pytest.mark.parametrize("architecture", gates.ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_kernels_pass(source: Path, architecture: str) -> None:
    result = compiled()[source.stem, architecture]
    assert gates.faults(result, architecture) == []
    assert source.stem == "device" or result.kernels
    if CUOBJDUMP:
        assert all(kernel.instructions for kernel in result.kernels.values())


@needs_nvcc
def test_every_rule_is_used() -> None:
    """A kernel that is renamed, or no longer there, does not slip through."""
    used = {
        gates.rule_of(kernel, architecture)
        for (_, architecture), result in compiled().items()
        for kernel in result.kernels.values()
    }
    assert [rule.kernels for rule in gates.RULES if rule not in used] == []


def faults_of(text: str, name: str, folder: Path, architecture: str = "90a") -> list[str]:
    source = folder / f"{name}.cu"
    source.write_text(text)
    return gates.faults(gates.compile_source(source, architecture, folder, CUOBJDUMP), architecture)


def changed(name: str, *changes: tuple[str, str]) -> str:
    text = (gates.SOURCES / f"{name}.cu").read_text()
    for old, new in changes:
        assert text.count(old) == 1, f"{old!r} is not once in {name}.cu"
        text = text.replace(old, new)
    return text


@needs_nvcc
def test_spill_is_found(tmp_path: Path) -> None:
    """The Hopper kernel without the registers that its producer leaves to it, so that its sums do not fit, and with a
    fence in its loop: in one go, and one kernel of the two dozen, for they take longest to compile."""
    one_of_them = (
        "g.dtype == kBFloat16 ? run<true>(g, stream) : run<false>(g, stream)",
        "run<true, kForward, 256>(g, GemmShape::of(g), 1, 1, stream)",
    )
    no_registers = ("more_registers<kRegistersTaken>();", "")
    a_fence = ("    wgmma_fence();\n", "    wgmma_fence();\n    __threadfence();\n")
    found = faults_of(changed("gemm_sm90", one_of_them, no_registers, a_fence), "gemm_sm90", tmp_path)
    assert any("bytes spilled" in fault for fault in found)
    if CUOBJDUMP:
        assert any("USETMAXREG" in fault for fault in found)
        assert any("of MEMBAR" in fault for fault in found)


@needs_nvcc
@needs_cuobjdump
def test_local_memory_is_found(tmp_path: Path) -> None:
    """An array that is indexed at run time is no spill, but lies in memory all the same."""
    text = """__global__ void pack_kernel(const float* in, float* out, int n) {
        float some[64];
        #pragma unroll
        for (int i = 0; i < 64; ++i) some[i] = in[i * 32 + threadIdx.x];
        for (int i = 0; i < n; ++i) out[i * 32 + threadIdx.x] = some[i * n % 61] + some[n - i];
    }"""
    found = faults_of(text, "planted", tmp_path)
    assert any("local memory" in fault for fault in found) and any("of stack" in fault for fault in found)


@needs_nvcc
@needs_cuobjdump
@pytest.mark.parametrize(
    ("name", "old", "new", "fault"),
    [
        (
            "mask_copy",
            "const uint4 v = *static_cast<const uint4*>(from);",
            "const uint32_t* p = static_cast<const uint32_t*>(from);"
            "const uint4 v = make_uint4(__ldcs(p), __ldcs(p + 1), __ldcs(p + 2), __ldcs(p + 3));",
            "LDG",
        ),
        ("gemm_sm80", "mask_step<kStep>(b[j], masks[j]);", "", "PRMT"),
    ],
)
def test_wrong_instructions_are_found(tmp_path: Path, name: str, old: str, new: str, fault: str) -> None:
    found = faults_of(changed(name, (old, new)), name, tmp_path)
    assert any(fault in line for line in found)


@needs_nvcc
@needs_cutlass
def test_layouts_are_those_of_cute(tmp_path: Path) -> None:
    """Fragments and swizzle against CuTe's layouts, on the CPU."""
    program = tmp_path / "cute_layouts"
    source = Path(__file__).parent / "cute_layouts.cpp"
    command = ["nvcc", "-std=c++17", "-x", "cu", "-arch=sm_90", f"-I{CUTLASS}", f"-I{gates.SOURCES}"]
    subprocess.run([*command, "-diag-suppress=20012", str(source), "-o", str(program)], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
