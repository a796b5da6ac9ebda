"""What can be said of a compiled kernel without a GPU: registers, spills, and the instructions that it consists of.

``python tests/cuda/gates.py`` prints a table of all kernels.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
SOURCES = ROOT / "csrc" / "cuda"
TOOLS = ROOT / ".cache" / "cuda-tools"
ARCHITECTURES = ("80", "90a")
FLAGS = ("-std=c++17", "-O3", "-DNDEBUG", "-Xcompiler=-Wall", "-Xptxas=-v")


def find_cuobjdump() -> str | None:
    """The toolkit's, or the one that ``make cuda-check`` has fetched."""
    return shutil.which("cuobjdump") or next(map(str, TOOLS.glob("triton/backends/nvidia/bin/cuobjdump")), None)


@dataclass
class Kernel:
    name: str  # without namespaces, such as mask_copy_kernel<1, 8, 64>
    registers: int = 0
    stack: int = 0
    spilled: int = 0
    instructions: list[str] = field(default_factory=list)

    def count(self, pattern: str) -> int:
        return sum(re.search(pattern, line) is not None for line in self.instructions)


@dataclass
class Compiled:
    kernels: dict[str, Kernel]
    warnings: list[str]


def compile_source(source: Path, architecture: str, folder: Path, cuobjdump: str | None) -> Compiled:
    """Compile one file for one architecture, and read what came out."""
    cubin = folder / f"{source.stem}.{architecture}.cubin"
    code = f"arch=compute_{architecture},code=sm_{architecture}"
    done = subprocess.run(
        ["nvcc", *FLAGS, f"-I{SOURCES}", "-gencode", code, "-cubin", str(source), "-o", str(cubin)],
        capture_output=True,
        text=True,
    )
    log = done.stdout + done.stderr
    if done.returncode:
        raise RuntimeError(f"{source.name} does not compile for sm_{architecture}:\n{log}")
    compiled = Compiled(_resources(log), [line for line in log.splitlines() if re.search(r"warning|C7\d{3}", line)])
    if cuobjdump:
        listing = subprocess.run([cuobjdump, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
        for name, instructions in _instructions(listing).items():
            compiled.kernels[name].instructions = instructions
    return compiled


def _names(mangled: list[str]) -> dict[str, str]:
    """Readable names: no namespaces, types of constants or parameters."""
    done = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True)
    names = {}
    for symbol, name in zip(mangled, done.stdout.splitlines(), strict=True):
        name = name.replace("(anonymous namespace)::", "").replace("masked_ops::cuda::", "").removeprefix("void ")
        name = re.sub(r"\((?:bool|int|unsigned short|CopyKind|GemmMode)\)", "", name)
        names[symbol] = name.partition("(")[0]
    return names


def _resources(log: str) -> dict[str, Kernel]:
    parts = re.split(r"Compiling entry function '(\w+)'", log)[1:]
    names = _names(parts[::2])
    kernels = {}
    for symbol, text in zip(parts[::2], parts[1::2], strict=True):
        stack, stores, loads = map(int, re.search(r"(\d+) bytes stack.*?(\d+) bytes.*?(\d+) bytes", text).groups())
        registers = int(re.search(r"Used (\d+) registers", text)[1])
        kernels[names[symbol]] = Kernel(names[symbol], registers, stack, stores + loads)
    return kernels


def _instructions(listing: str) -> dict[str, list[str]]:
    parts = re.split(r"Function : (\w+)", listing)[1:]
    names = _names(parts[::2])
    find = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", re.MULTILINE)
    return {names[symbol]: find.findall(text) for symbol, text in zip(parts[::2], parts[1::2], strict=True)}


# --- rules -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Rule:
    """For kernels whose name matches: a cap on registers, and instructions that must be there at least so many times,
    or at most."""

    kernels: str
    registers: int
    wanted: dict[str, int] = field(default_factory=dict)
    unwanted: dict[str, int] = field(default_factory=dict)
    architecture: str = ""  # of one only


# A kernel that no rule names must not use more registers than leave room for 1,024 threads, or for those it asks for.
RULES = (
    # Chunks of 16 bytes, four loads under way. kCopy1 has sixteen elements a chunk, kCopy16 one.
    Rule(r"mask_copy_kernel<(0, 16|1, 8|2, 4|3, 2|4, 1), (1|64)>$", 64, {r"LDG\.E\S*\.128": 4, r"STG\.E\S*\.128": 4}),
    Rule(r"mask_copy_kernel<[56], 4, (1|64)>$", 64, {r"LDG\.E\S*\.128": 4, r"STG\.E\S*\.64": 4, r"F2FP": 8}),
    Rule(r"mask_copy_kernel<[78], 4, (1|64)>$", 64, {r"LDG\.E\S*\.64": 4, r"STG\.E\S*\.128": 4}),
    Rule(r"mask_copy_kernel", 64),
    Rule(r"(pack|pack_bits|live|row_counts|fragments)_kernel", 64),
    Rule(r"scan_kernel", 64),  # 1,024 threads
    Rule(r"(compress|expand|decode_index)_kernel", 40),  # six blocks of 256
    Rule(r"decode_gather_kernel", 64, {r"LDG": 4, r"FFMA": 4}),  # 1,024 threads in one block or two
    Rule(r"decode_mma_kernel", 168, {r"HMMA\.16816\.F32": 4, r"LDSM\.16\.M88\.4": 4, r"STS\.128": 16}),
    # A lookup of one value is one prmt and one load; 512 threads, two blocks or one.
    Rule(
        r"decode_sliced_kernel<\d, [12]>$",
        64,
        {r"LDG\.E\S*\.128": 5, r"LDG\.E\S*\.64": 4, r"PRMT": 16, r"LDS": 24, r"FFMA": 24},
    ),
    Rule(
        r"decode_sliced_kernel<\d, 4>$",
        128,
        {r"LDG\.E\S*\.128": 5, r"LDG\.E\S*\.64": 4, r"PRMT": 32, r"LDS\S*\.128": 32, r"FFMA": 128},
    ),
    Rule(r"(slice|fill_slices)_kernel", 64),
    Rule(r"(gather|fill_gathered)_kernel", 80),
    # Of a step, or of two with eight rows of input, one ldmatrix, whose address is a prmt; of a word of operand A a
    # prmt and an AND. Four bodies of eight steps: of groups of two and of four steps, twice. 512 threads.
    Rule(
        r"decode_gathered_kernel<\d, 16, \w+>$",
        128,
        {
            r"LDSM\.16\.MT88\.4": 32,
            r"HMMA\.16816\.F32": 64,
            r"PRMT": 160,
            r"LDG\.E\S*\.128": 14,
            r"STSM\.16\.MT88\.4": 8,
        },
        architecture="90a",
    ),
    Rule(
        r"decode_gathered_kernel<\d, 8, \w+>$",
        128,
        {
            r"LDSM\.16\.MT88\.4": 16,
            r"HMMA\.16816\.F32": 32,
            r"PRMT": 144,
            r"LDG\.E\S*\.128": 14,
            r"STSM\.16\.MT88\.4": 8,
        },
        architecture="90a",
    ),
    Rule(r"decode_gathered_kernel", 32, architecture="80"),  # empty
    Rule(r"split_sum_kernel", 64),
    Rule(
        r"gemm_sm80_kernel", 255, {r"HMMA\.16816\.F32": 32, r"LDGSTS\.E\S*\.128": 12, r"LDSM\.16\.M": 16, r"PRMT": 32}
    ),
    # Operand A in a register and B in shared memory; two steps of four products, in a loop. The sums of a split
    # contraction are read 16 bytes at a time. One fence for each role's barrier of the cluster, and none in the loop.
    Rule(
        r"gemm_sm90_kernel<\w+, [01], \d+>$",
        168,
        {
            r"HGMMA\.64x\d+x16\.F32\S* R\d+, R\d+, gdesc\[UR\d+\],": 8,
            r"LDSM": 12,
            r"PRMT": 32,
            r"UTMALDG": 3,
            r"UBLKCP": 1,
            r"STSM|MATRIX": 1,
            r"\bLD\.E\.128": 8,
            r"USETMAXREG": 2,
        },
        {r"MEMBAR\.\w+\.GPU": 2},
        architecture="90a",
    ),
    # grad_weight: no mask on the way in, operand B stored along the contraction.
    Rule(
        r"gemm_sm90_kernel<\w+, 2, \d+>$",
        168,
        {
            r"HGMMA\.64x\d+x16\.F32\S* R\d+, R\d+, gdesc\[UR\d+\]\.tnspB": 8,
            r"LDSM\.16\.MT88": 12,
            r"UTMALDG": 3,
            r"STSM|MATRIX": 1,
            r"\bLD\.E\.128": 8,
            r"STG\.E\S*\.128": 8,
            r"USETMAXREG": 2,
        },
        {r"MEMBAR\.\w+\.GPU": 2, r"UBLKCP": 0},
        architecture="90a",
    ),
    Rule(r"gemm_sm90_kernel", 32, architecture="80"),  # empty
)


def rule_of(kernel: Kernel, architecture: str) -> Rule:
    for rule in RULES:
        if re.match(rule.kernels, kernel.name) and rule.architecture in ("", architecture):
            return rule
    raise LookupError(f"no rule for {kernel.name}: add one to {__file__}")


def faults(compiled: Compiled, architecture: str) -> list[str]:
    """Everything that is wrong with a file, in words."""
    found = list(compiled.warnings)
    for kernel in compiled.kernels.values():
        rule, name = rule_of(kernel, architecture), f"{kernel.name} (sm_{architecture})"
        if kernel.spilled or kernel.stack:
            found.append(f"{name}: {kernel.spilled} bytes spilled, {kernel.stack} bytes of stack")
        if kernel.registers > rule.registers:
            found.append(f"{name}: {kernel.registers} registers, at most {rule.registers} wanted")
        if kernel.instructions:
            if local := kernel.count(r"\b(LDL|STL)\b"):
                found.append(f"{name}: {local} accesses to local memory")
            for pattern, count in rule.wanted.items():
                if (got := kernel.count(pattern)) < count:
                    found.append(f"{name}: {got} of {pattern}, at least {count} wanted")
            for pattern, count in rule.unwanted.items():
                if (got := kernel.count(pattern)) > count:
                    found.append(f"{name}: {got} of {pattern}, at most {count} wanted")
            if (wrong := kernel.count(r"HGMMA")) != kernel.count(r"HGMMA\S* R\d+, R\d+, gdesc"):
                found.append(f"{name}: not all of {wrong} HGMMA take operand A from registers")
    return found


def main() -> int:
    bad = []
    cuobjdump = find_cuobjdump()
    with tempfile.TemporaryDirectory() as folder:
        for source in sorted(SOURCES.glob("*.cu")):
            for architecture in ARCHITECTURES:
                compiled = compile_source(source, architecture, Path(folder), cuobjdump)
                bad += faults(compiled, architecture)
                for kernel in compiled.kernels.values():
                    size = len(kernel.instructions) or "?"
                    print(f"sm_{architecture:4}{kernel.name:42}{kernel.registers:4} registers {size:>6} instructions")
    print("\n".join(bad) or "no faults")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
