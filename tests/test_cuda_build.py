"""What nvcc said about the kernels: no spills on any architecture, shared memory within every chip's limit.

``python tests/test_cuda_build.py`` prints the table of registers for csrc/cuda/README.md.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
ARCHS = ["80", "86", "89", "90", "90a", "100", "120"]
# The kernels that must not spill are all of them; these are the ones whose registers are worth a table.
HOT = re.compile(r"pair_forward|backward_resident|backward_streamed")
ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for 'sm_(?P<arch>\w+)'.*?"
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.S,
)


class Kernel(NamedTuple):
    name: str
    arch: str
    registers: int
    spills: int


def readable(mangled: str) -> str:
    """backward_streamed<Bf16, 3, StatisticsWeights> from its mangled name; other kernels keep theirs."""
    hot = HOT.search(mangled)
    parts = re.search(r"3gpu\d+(Bf16|F16)ELi(\d)E", mangled)
    epilogue = re.search(r"(StatisticsWeights|SoftplusWeights|Statistics|SoftplusSum)E", mangled)
    if not (hot and parts and epilogue):
        return mangled
    return f"{hot[0]}<{parts[1]}, {parts[2]}, {epilogue[1]}>"


def kernels_of(log: str) -> list[Kernel]:
    return [
        Kernel(readable(m["name"]), m["arch"], int(m["registers"]), int(m["stores"]) + int(m["loads"]))
        for m in ENTRY.finditer(log)
    ]


def included(source: Path) -> set[Path]:
    """A source and what it includes of its own folder."""
    found, waiting = set(), [source]
    while waiting:
        path = waiting.pop()
        if path not in found and path.is_file():
            found.add(path)
            names = re.findall(r'#include "(?:cuda/)?([^"/]+)"', path.read_text())
            waiting += [source.parent / name for name in names]
    return found


def logs() -> list[Path]:
    """Reports beside the objects that are newer than their source and what it includes."""
    found = []
    for source in (ROOT / "csrc" / "cuda").glob("*.cu"):
        newest = max(path.stat().st_mtime for path in included(source))
        reports = (ROOT / "build").glob(f"ninja-*/*csrc_cuda_{source.name}*.ptxas.txt")
        found += [path for path in reports if path.stat().st_mtime >= newest]
    return sorted(found)


def compiled() -> list[Kernel]:
    return [kernel for path in logs() for kernel in kernels_of(path.read_text())]


def test_a_spill_is_seen() -> None:
    """The parser, on ptxas' own words."""
    log = (
        "ptxas info    : Compiling entry function "
        "'_ZN8pysupcon4cuda12pair_forwardINS0_13ForwardConfigIN3gpu4Bf16ELi3EEE"
        "NS0_10StatisticsEEEvNS0_5PairsENT0_4ArgsE' for 'sm_80'\n"
        "ptxas info    : Function properties for x\n"
        "    8 bytes stack frame, 16 bytes spill stores, 4 bytes spill loads\n"
        "ptxas info    : Used 255 registers, used 1 barriers\n"
    )
    assert kernels_of(log) == [Kernel("pair_forward<Bf16, 3, Statistics>", "80", 255, 20)]


@pytest.mark.parametrize("arch", ARCHS)
def test_no_kernel_spills(arch: str) -> None:
    kernels = [k for k in compiled() if k.arch == arch]
    if not kernels:
        pytest.skip(f"no up-to-date kernels for sm_{arch} here (PYSUPCON_CUDA_ARCHS={arch}, `make cuda-all`)")
    assert any(HOT.search(k.name) for k in kernels)
    assert not [k for k in kernels if k.spills]


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "86", "89", "90a", "100", "120"])
@pytest.mark.parametrize("source", sorted(p.name for p in (ROOT / "csrc" / "cuda").glob("*.cu")))
def test_every_architecture_compiles_without_spills(arch: str, source: str, tmp_path: Path) -> None:
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
    assert not [k for k in kernels if k.spills]


def test_shared_memory_fits_every_chip(tmp_path: Path) -> None:
    """sm_86, sm_89 and sm_120 give a block 99 KiB; the widest resident case of each kernel stays below."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    from cuda_emulation import build

    source = tmp_path / "sizes.cpp"
    source.write_text(
        '#include "backward.cuh"\n#include "forward.cuh"\nusing namespace pysupcon::cuda;\n'
        "template <class F, int P> void show() {\n"
        "  size_t most = 0;\n"
        "  for (int chunks = 1; chunks <= 128; ++chunks)\n"
        "    most = std::max(most, forward_shared_bytes<ForwardConfig<F, P>>(chunks));\n"
        '  printf("%zu %zu\\n", most, sizeof(StreamedShared<BackwardConfig<F, P>>));\n'
        '  if (P == 1) printf("%zu\\n", sizeof(ResidentShared<BackwardConfig<F, P>>));\n'
        "}\n"
        "int main() { show<gpu::Bf16, 1>(), show<gpu::F16, 1>();\n"
        "  show<gpu::Bf16, 2>(), show<gpu::Bf16, 3>(); }\n"
    )
    (program,) = build.compile_objects([source], ["-O0"], tmp_path, build.KERNELS, jobs=1)
    subprocess.run(["g++", str(program), "-o", str(tmp_path / "sizes")], check=True)
    out = subprocess.run([str(tmp_path / "sizes")], capture_output=True, text=True, check=True).stdout
    sizes = [int(word) for word in out.split()]
    assert len(sizes) == 10
    assert max(sizes) <= 99 * 1024


def test_the_extension_needs_no_cuda_library() -> None:
    """Linked statically: importing works where there is neither a driver nor a toolkit."""
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
        cells = {k.arch: f"{k.registers}/{k.spills}" for k in kernels if k.name == name}
        print(f"| {name} |" + "".join(f" {cells.get(a, '-')} |" for a in archs))
    others = [k for k in kernels if not HOT.search(k.name)]
    print(f"| {len({k.name for k in others})} others, at most |", end="")
    for arch in archs:
        there = [k for k in others if k.arch == arch]
        print(f" {max(k.registers for k in there)}/{max(k.spills for k in there)} |", end="")
    print()


if __name__ == "__main__":
    main()
