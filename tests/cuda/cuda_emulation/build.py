"""Compiles csrc/cuda for the CPU with g++ and cuda_host_shim.h.

Builds are cached in build/cuda_emulation by the hash of their sources and flags. The workers of a test run
share them.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
KERNELS = ROOT / "csrc" / "cuda"
CACHE = ROOT / "build" / "cuda_emulation"

# Uninitialized variables get a pattern. The sanitizers use -O0, because compilation is most of their cost.
COMMON = ["-std=c++17", "-ftrivial-auto-var-init=pattern", "-Wno-unknown-pragmas", "-DCUDA_SHIM_OWN_TYPES"]
FLAGS = {
    "plain": ["-O1", "-fPIC"],  # also linked into the library of build_operators
    "asan": ["-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "tsan": ["-O0", "-g1", "-fsanitize=thread"],
}
SANITIZER_ENVIRONMENT = {"TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=0"}


def kernel_sources(kernels: Path = KERNELS) -> list[Path]:
    return sorted(kernels.glob("*.cu"))


def fingerprint(paths: list[Path], flags: list[str]) -> str:
    digest = hashlib.sha256(" ".join(flags).encode())
    for path in sorted(paths):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def compile_objects(sources: list[Path], flags: list[str], out: Path, kernels: Path, jobs: int) -> list[Path]:
    """One object per source.

    Raises:
        RuntimeError: a source does not compile; with the output of g++.
    """

    def one(source: Path) -> Path:
        target = out / (source.name + ".o")
        include = [f"-I{kernels}", f"-I{HERE}", "-include", str(HERE / "cuda_host_shim.h")]
        command = ["g++", *COMMON, *flags, *include, "-x", "c++", "-c", str(source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{source.name} does not compile for emulation:\n{done.stderr[-4000:]}")
        return target

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(one, sources))


@contextmanager
def folder_for(name: str, sources: list[Path], flags: list[str]) -> Iterator[Path]:
    """The cache folder of a build, locked by one worker at a time."""
    out = CACHE / f"{name}-{fingerprint(sources, flags)}"
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield out


def headers() -> list[Path]:
    """The headers that the kernels include."""
    shim = [HERE / name for name in ("cuda_host_shim.h", "cuda_host_types.h", "tensor_core.h")]
    return [*KERNELS.glob("*.cuh"), *KERNELS.glob("*.h"), *shim]


def kernel_objects(kind: str) -> list[Path]:
    """The kernels, compiled for the CPU."""
    flags = FLAGS[kind]
    with folder_for(f"kernels-{kind}", [*kernel_sources(), *headers()], flags) as out:
        if not (out / "done").exists():
            compile_objects(kernel_sources(), flags, out, KERNELS, jobs=2)
            (out / "done").touch()
    return [out / (source.name + ".o") for source in kernel_sources()]


def build(kind: str, driver: str = "emulate.cpp") -> Path:
    """The program of a driver and a kind ("plain", "asan", "tsan"), compiled if it is not cached."""
    sources = [*kernel_sources(), *HERE.glob("*.h"), HERE / driver]
    flags = FLAGS[kind]
    kernels = kernel_objects(kind) if driver in ("emulate.cpp", "broken.cpp") else []
    with folder_for(f"{Path(driver).stem}-{kind}", [*sources, *headers()], flags) as out:
        program = out / "program"
        if not program.exists():
            objects = compile_objects([HERE / driver], flags, out, KERNELS, jobs=1)
            partial = out / "program.partial"
            subprocess.run(["g++", *flags, *map(str, [*objects, *kernels]), "-o", str(partial)], check=True)
            partial.rename(program)
    return program


def run(
    program: Path,
    *cases: str,
    order: str = "forward",
    tensor_core: str = "h100",
    timeout: float = 1800,
) -> subprocess.CompletedProcess[str]:
    """Run a program of :func:`build`.

    Args:
        program: the program.
        cases: prefixes of the names of cases; none: all cases.
        order: order of threads and blocks: "forward", "reverse" or a seed.
        tensor_core: "h100" or "a100", see tensor_core.h.
        timeout: seconds.
    """
    settings = {"CUDA_SHIM_ORDER": order, "CUDA_SHIM_TENSOR_CORE": tensor_core}
    environment = {**os.environ, **SANITIZER_ENVIRONMENT, **settings}
    return subprocess.run(
        [str(program), *cases], capture_output=True, text=True, env=environment, timeout=timeout
    )


def build_operators() -> Path:
    """A library of torch operators ``pysupcon_emulated::*``: csrc/cuda_glue.cpp with emulated kernels."""
    import torch
    from torch.utils import cpp_extension

    texts = {name: (ROOT / "csrc" / name).read_text() for name in ("library.cpp", "cuda_glue.cpp")}
    shared = ROOT / "csrc" / "arguments.h"
    renamed = {
        "TORCH_LIBRARY(pysupcon,": "TORCH_LIBRARY(pysupcon_emulated,",
        "TORCH_LIBRARY_IMPL(pysupcon, CUDA,": "TORCH_LIBRARY_IMPL(pysupcon_emulated, CPU,",
    }
    for (name, text), (old, new) in zip(texts.items(), renamed.items(), strict=True):
        assert text.count(old) == 1, f"csrc/{name} no longer registers by {old!r}"
        texts[name] = text.replace(old, new)
    flags = [
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
        f"-DTORCH={torch.__version__}",
    ]
    sources = [*headers(), shared, *kernel_sources(), *(ROOT / "csrc" / name for name in texts)]
    objects = kernel_objects("plain")
    with folder_for("operators", sources, flags) as out:
        library = out / "operators.so"
        if not library.exists():
            partial = out / "operators.partial"
            glue = []
            for name, text in texts.items():
                (out / name).write_text(text)
                glue.append(str(out / name))
            command = ["g++", "-std=c++20", "-shared", "-O1", "-fPIC", flags[0], f"-I{ROOT / 'csrc'}"]
            command += [f"-isystem{path}" for path in cpp_extension.include_paths()]
            command += [f"-L{path}" for path in cpp_extension.library_paths()]
            command += [*glue, *map(str, objects), "-ltorch", "-ltorch_cpu", "-lc10", "-o", str(partial)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"the glue does not compile for emulation:\n{done.stderr[-4000:]}")
            partial.rename(library)
    return library
