"""Compiles the kernels and their drivers (tests/cuda/cuda_emulation) with nvcc, without torch.

    python benchmarks/gpu/gpu_driver.py ARCH FOLDER

The programs are FOLDER/driver (checks against the oracle) and FOLDER/broken (broken operands). ARCH is 80, 90
and so on. csrc/find_cuda.py finds nvcc. The compilers run in parallel; their output is printed. Exit status 1
if nvcc is not found or a compilation fails.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EMULATION = ROOT / "tests" / "cuda" / "cuda_emulation"
sys.path.insert(0, str(ROOT / "csrc"))

from find_cuda import Toolkit, find_cuda  # noqa: E402

PROGRAMS = {"driver": "emulate.cpp", "broken": "broken.cpp"}


def commands(toolkit: Toolkit, arch: str, out: Path) -> tuple[list[list[str]], list[list[str]]]:
    """The nvcc commands that compile the objects (in any order), and those that link the programs."""
    kernels = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    sources = [*kernels, *(EMULATION / name for name in PROGRAMS.values())]
    flags = [
        "-std=c++17",
        "-O3",
        "-lineinfo",
        f"-arch=sm_{arch}",
        f"-I{ROOT / 'csrc' / 'cuda'}",
        f"-I{EMULATION}",
        *toolkit.include_flags,
    ]
    objects = [out / (source.name + ".o") for source in sources]
    compile_ = [
        [toolkit.nvcc, *flags, "-x", "cu", "-c", str(source), "-o", str(target)]
        for source, target in zip(sources, objects, strict=True)
    ]
    link = [toolkit.nvcc, f"-arch=sm_{arch}", f"-L{toolkit.cudart}", *map(str, objects[: len(kernels)])]
    return compile_, [
        [*link, str(out / f"{source}.o"), "-o", str(out / program)] for program, source in PROGRAMS.items()
    ]


def call(command: list[str]) -> bool:
    """Run a compiler and print its output. Returns whether it succeeded."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        print(f"{command[-3]}: exit status {done.returncode}")
    if done.stdout:
        print(done.stdout[-3000:], flush=True)
    return done.returncode == 0


def main(arch: str, folder: str) -> int:
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    for program in PROGRAMS:
        (out / program).unlink(missing_ok=True)
    toolkit, detail = find_cuda()
    if toolkit is None:
        print(detail)
        return 1
    compile_, links = commands(toolkit, arch, out)
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) // 2)) as pool:
        done = list(pool.map(call, compile_))
    return 0 if all(done) and all(map(call, links)) else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
