"""Compiles the kernels and their own driver (tests/cuda_emulation) with nvcc, without torch.

    python benchmarks/gpu_driver.py NVCC ARCH FOLDER

The program is FOLDER/driver; ARCH is 80, 90, ... Compilers run side by side; each one's words are printed.
Exit status 1 if one of them failed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EMULATION = ROOT / "tests" / "cuda_emulation"


def commands(nvcc: str, arch: str, out: Path) -> tuple[list[list[str]], list[str]]:
    """nvcc calls for the objects (they may run side by side), and the one that links them."""
    sources = [*sorted((ROOT / "csrc" / "cuda").glob("*.cu")), EMULATION / "emulate.cpp"]
    flags = [
        "-std=c++17",
        "-O3",
        "-lineinfo",
        f"-arch=sm_{arch}",
        f"-I{ROOT / 'csrc' / 'cuda'}",
        f"-I{EMULATION}",
    ]
    objects = [out / (source.name + ".o") for source in sources]
    compile_ = [
        [nvcc, *flags, "-x", "cu", "-c", str(source), "-o", str(target)]
        for source, target in zip(sources, objects, strict=True)
    ]
    return compile_, [nvcc, f"-arch=sm_{arch}", *map(str, objects), "-o", str(out / "driver")]


def call(command: list[str]) -> bool:
    """Whether the compiler succeeded."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        print(f"{command[-3]}: exit status {done.returncode}")
    if done.stdout:
        print(done.stdout[-3000:], flush=True)
    return done.returncode == 0


def main(nvcc: str, arch: str, folder: str) -> int:
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    (out / "driver").unlink(missing_ok=True)
    compile_, link = commands(nvcc, arch, out)
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) // 2)) as pool:
        done = list(pool.map(call, compile_))
    return 0 if all(done) and call(link) else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
