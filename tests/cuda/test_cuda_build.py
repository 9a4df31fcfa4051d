"""Checks the reports of nvcc: no spills and no stack on any architecture, shared memory within all limits.

``python tests/cuda/test_cuda_build.py [LOG...]`` prints the table "registers/spilled bytes/bytes of stack"
for csrc/cuda/README.md.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
ARCHS = ["80", "86", "89", "90", "90a", "100", "120"]
# No kernel may spill or have a stack; the registers of these kernels are printed.
HOT = re.compile(r"forward_resident|forward_streamed|forward_triangular|backward_resident|backward_streamed")
# Allowed static shared memory of a kernel that also has dynamic shared memory.
STATIC_SHARED = 448
ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for 'sm_(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?:[^\n]*?(?P<shared>\d+) bytes smem)?",
    re.S,
)


class Kernel(NamedTuple):
    name: str
    arch: str
    registers: int
    spills: int
    stack: int
    shared: int = 0
    """bytes of static shared memory"""

    def __str__(self) -> str:
        return f"{self.registers}/{self.spills}/{self.stack}"


def readable(mangled: str) -> str:
    """backward_resident<Bf16, 4 warps, StatisticsWeights> from its mangled name; others do not change."""
    hot = HOT.search(mangled)
    config = re.search(r"3gpu\d+(Bf16|F16)E(?:Li(\d)E)?", mangled)
    if not (hot and config):
        return mangled
    epilogue = re.search(
        r"\d(StatisticsWeights|PositiveWeights|SoftplusWeights|PositiveStatistics|Statistics|SoftplusSum)E",
        mangled,
    )
    number = config[2] and config[2] + " warps" * (hot[0] == "backward_resident")
    words = [config[1], number, epilogue and epilogue[1]]
    return f"{hot[0]}<{', '.join(word for word in words if word)}>"


def kernels_of(log: str) -> list[Kernel]:
    return [
        Kernel(
            readable(m["name"]),
            m["arch"],
            int(m["registers"]),
            int(m["stores"]) + int(m["loads"]),
            int(m["stack"]),
            int(m["shared"] or 0),
        )
        for m in ENTRY.finditer(log)
    ]


def in_local_memory(kernels: list[Kernel]) -> list[str]:
    """Kernels that spill, have a stack or declare too much shared memory."""
    return [
        f"{k.name} on sm_{k.arch}: {k}"
        for k in kernels
        if k.spills or k.stack or (HOT.search(k.name) and k.shared > STATIC_SHARED)
    ]


def included(source: Path) -> set[Path]:
    """A source and the headers of its own folder that it includes."""
    found, waiting = set(), [source]
    while waiting:
        path = waiting.pop()
        if path not in found and path.is_file():
            found.add(path)
            names = re.findall(r'#include "(?:cuda/)?([^"/]+)"', path.read_text())
            waiting += [source.parent / name for name in names]
    return found


def logs() -> list[Path]:
    """Reports of ptxas that are newer than their source and its headers."""
    found = []
    for source in (ROOT / "csrc" / "cuda").glob("*.cu"):
        newest = max(path.stat().st_mtime for path in included(source))
        reports = (ROOT / "build").glob(f"ninja-*/*csrc_cuda_{source.name}*.ptxas.txt")
        found += [path for path in reports if path.stat().st_mtime >= newest]
    return sorted(found)


def compiled() -> list[Kernel]:
    return [kernel for path in logs() for kernel in kernels_of(path.read_text())]


PREFIX = "_ZN8pysupcon4cuda"
NAMES = {
    "16forward_residentINS0_15ResidentForwardIN3gpu4Bf16EEENS0_11SoftplusSumEEEvNS0_5PairsE": (
        "forward_resident<Bf16, SoftplusSum>"
    ),
    "16forward_streamedINS0_15StreamedForwardIN3gpu4Bf16ELi2EEENS0_10StatisticsEEEvNS0_5PairsE": (
        "forward_streamed<Bf16, 2, Statistics>"
    ),
    "17backward_residentINS0_16ResidentBackwardIN3gpu3F16ELi4EEENS0_17StatisticsWeightsEEEvNS0_5PairsE": (
        "backward_resident<F16, 4 warps, StatisticsWeights>"
    ),
    "17backward_streamedINS0_16StreamedBackwardIN3gpu4Bf16ELi3EEENS0_15SoftplusWeightsEEEvNS0_5PairsE": (
        "backward_streamed<Bf16, 3, SoftplusWeights>"
    ),
    "17backward_streamedINS0_16StreamedBackwardIN3gpu4Bf16ELi2EEENS0_15PositiveWeightsEEEvNS0_5PairsE": (
        "backward_streamed<Bf16, 2, PositiveWeights>"
    ),
    "16forward_residentINS0_15ResidentForwardIN3gpu3F16EEENS0_18PositiveStatisticsEEEvNS0_5PairsE": (
        "forward_resident<F16, PositiveStatistics>"
    ),
    "7prepareI13__nv_bfloat16N3gpu4Bf16ELi1EEEvNS0_11PreparationE": "",
}


@pytest.mark.parametrize(("mangled", "name"), NAMES.items())
def test_names_are_readable(mangled: str, name: str) -> None:
    assert readable(PREFIX + mangled) == (name or PREFIX + mangled)


@pytest.mark.parametrize(("stack", "stores", "loads"), [(8, 16, 4), (8, 0, 0), (0, 0, 4), (0, 0, 0)])
def test_spills_and_stack_frames_are_seen(stack: int, stores: int, loads: int) -> None:
    """The parser, on the output of ptxas for three kernels."""

    def entry(name: str, stack: int, stores: int, loads: int, shared: str = "") -> str:
        return (
            f"ptxas info    : Compiling entry function '{name}' for 'sm_80'\n"
            "ptxas info    : Function properties for x\n"
            f"    {stack} bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads\n"
            f"ptxas info    : Used 255 registers, used 1 barriers{shared}\n"
        )

    log = entry("first", 0, 0, 0) + entry(PREFIX + next(iter(NAMES)), stack, stores, loads)
    kernels = kernels_of(log + entry("last", 0, 0, 0))
    assert kernels[1] == ("forward_resident<Bf16, SoftplusSum>", "80", 255, stores + loads, stack, 0)
    assert [k.name for k in kernels] == ["first", kernels[1].name, "last"]
    seen = f"{kernels[1].name} on sm_80: 255/{stores + loads}/{stack}"
    assert in_local_memory(kernels) == ([seen] if stack or stores or loads else [])
    (static,) = kernels_of(entry(PREFIX + next(iter(NAMES)), 0, 0, 0, ", 640 bytes smem, 16 bytes cmem[2]"))
    assert static.shared == 640
    assert in_local_memory([static])


@pytest.mark.parametrize("arch", ARCHS)
def test_no_kernel_spills_or_has_a_stack(arch: str) -> None:
    kernels = [k for k in compiled() if k.arch == arch]
    if not kernels:
        pytest.skip(f"no up-to-date kernels for sm_{arch} here (PYSUPCON_CUDA_ARCHS={arch}, `make cuda-all`)")
    assert any(HOT.search(k.name) for k in kernels)
    assert not in_local_memory(kernels)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "86", "89", "90a", "100", "120"])
@pytest.mark.parametrize("source", sorted(p.name for p in (ROOT / "csrc" / "cuda").glob("*.cu")))
def test_every_architecture_compiles_without_spills_and_stack(arch: str, source: str, tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on PATH")
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
    if f"compute_{arch.rstrip('a')}" not in known:
        pytest.skip(f"this nvcc does not know sm_{arch}")
    flags = ["-std=c++17", "-O3", "-Xptxas=-v", f"-gencode=arch=compute_{arch},code=sm_{arch}"]
    command = [nvcc, *flags, "-c", str(ROOT / "csrc" / "cuda" / source), "-o", str(tmp_path / "kernel.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = kernels_of(done.stdout + done.stderr)
    assert kernels
    assert not in_local_memory(kernels)


def test_shared_memory_fits_every_chip(tmp_path: Path) -> None:
    """On sm_86, sm_89 and sm_120 a block has at most 99 KiB; no kernel needs more at any width of rows.

    If two blocks run at the same time, each leaves 1 KiB to the driver.
    """
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    from cuda_emulation import build

    source = tmp_path / "sizes.cpp"
    source.write_text(
        '#include "backward.cuh"\n#include "forward.cuh"\n#include "positive.cuh"\n'
        "using namespace pysupcon::cuda;\n"
        "template <class F, int P> void streamed() {\n"
        "  size_t most = 0;\n"
        "  for (int slices = 1; slices <= 128; ++slices) {\n"
        "    most = std::max(most, forward_shared_bytes<StreamedForward<F, P>, Statistics>(slices));\n"
        "    using Streamed = StreamedForward<F, P>;\n"
        "    most = std::max(most, forward_shared_bytes<Streamed, PositiveStatistics>(slices));\n"
        "  }\n"
        '  printf("1 %zu\\n1 %zu\\n", most, sizeof(StreamedBackwardShared<StreamedBackward<F, P>>));\n'
        "}\n"
        "template <class F> void resident() {\n"
        "  using Positives = ResidentForwardShared<ResidentForward<F>, PositiveStatistics>;\n"
        "  using Negatives = ResidentForwardShared<ResidentForward<F>, Statistics>;\n"
        '  printf("2 %zu\\n", std::max(sizeof(Positives), sizeof(Negatives)));\n'
        '  printf("2 %zu\\n", sizeof(ResidentBackwardShared<ResidentBackward<F, 4>>));\n'
        '  printf("1 %zu\\n", sizeof(ResidentBackwardShared<ResidentBackward<F, 8>>));\n'
        "}\n"
        "int main() { streamed<gpu::Bf16, 1>(), streamed<gpu::F16, 1>(), streamed<gpu::Bf16, 2>();\n"
        "  streamed<gpu::Bf16, 3>(), resident<gpu::Bf16>(), resident<gpu::F16>();\n"
        '  printf("0 %d\\n", kMostDynamic); }\n'
    )
    (program,) = build.compile_objects([source], ["-O0"], tmp_path, build.KERNELS, jobs=1)
    subprocess.run(["g++", str(program), "-o", str(tmp_path / "sizes")], check=True)
    out = subprocess.run([str(tmp_path / "sizes")], capture_output=True, text=True, check=True).stdout
    *sizes, (_, most) = [tuple(map(int, line.split())) for line in out.splitlines()]
    assert len(sizes) == 8 + 6
    # Static shared memory is included; launch() requests more than the dynamic part.
    assert max(size for _, size in sizes) <= most <= (99 << 10) - STATIC_SHARED
    # Two blocks of the forward fit what sm_86 has, 100 KiB; of the backward, what plan.h asks for.
    forward, backward, *again = (2 * (size + 1024) for blocks, size in sizes if blocks == 2)
    assert again == [forward, backward]
    assert forward <= 100 << 10 < backward <= 136 << 10


def test_the_extension_needs_no_cuda_library() -> None:
    """The runtime is linked statically, so that importing needs neither a driver nor a toolkit."""
    libraries = list((ROOT / "pysupcon").glob("_C*.so"))
    if not libraries or shutil.which("readelf") is None:
        pytest.skip("no extension built in place, or no readelf")
    text = subprocess.run(
        ["readelf", "-d", str(libraries[0])], capture_output=True, text=True, check=True
    ).stdout
    assert not re.search(r"NEEDED.*lib(cuda|cudart|nvrtc)", text)


def main() -> None:
    paths = [Path(a) for a in sys.argv[1:]] or logs()
    kernels = [k for path in paths for k in kernels_of(path.read_text())]
    archs = [a for a in ARCHS if any(k.arch == a for k in kernels)]
    print("| kernel |" + "".join(f" sm_{a} |" for a in archs))
    print("| --- |" + " --- |" * len(archs))
    for name in sorted({k.name for k in kernels if HOT.search(k.name)}):
        cells = {k.arch: str(k) for k in kernels if k.name == name}
        print(f"| `{name}` |" + "".join(f" {cells.get(a, '-')} |" for a in archs))
    others = [k for k in kernels if not HOT.search(k.name)]
    print(f"| {len({k.name for k in others})} others, at most |", end="")
    for arch in archs:
        there = [k for k in others if k.arch == arch]
        most = (max(values) for values in zip(*(k[2:5] for k in there), strict=True))
        print(f" {'/'.join(map(str, most)) or '-'} |", end="")
    print()


if __name__ == "__main__":
    main()
