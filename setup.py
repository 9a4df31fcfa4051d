"""Builds pysupcon's extension with one ninja file.

Each source has its own flags. The CPU kernels are compiled once per instruction set. nvcc compiles the CUDA
kernels without torch headers, so that both CPU and CUDA builds of torch work. Only the glue includes torch.

Environment
    PYSUPCON_CUDA=0|1        0: build without the CUDA kernels; 1: fail if they cannot be built
                             (default: build them if csrc/find_cuda.py finds nvcc)
    PYSUPCON_CUDA_ARCHS      e.g. "80;90a" or "all"; default "80;90"; PTX of the newest is always added
    CXX, NVCC, MAX_JOBS      C++ compiler, CUDA compiler and the number of parallel jobs
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).resolve().with_name("csrc")))
from find_cuda import Toolkit, find_cuda

ROOT = Path(__file__).resolve().parent
NO_ISOLATION = "pip install --no-build-isolation ."
ALL_CUDA_ARCHS = ["80", "86", "89", "90a", "100", "120"]
DEFAULT_CUDA_ARCHS = ["80", "90"]

# CPU instruction sets: name -> flags. "generic" is the compiler's baseline (SSE2 on x86-64, NEON on
# aarch64).
X86_ISAS = {
    "generic": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": [
        "-mavx512f",
        "-mavx512bw",
        "-mavx512dq",
        "-mavx512vl",
        "-mfma",
        "-mf16c",
        "-mprefer-vector-width=512",
    ],
}


def fail(message: str) -> NoReturn:
    sys.exit(f"\npysupcon: {message}\n")


def require_torch() -> ModuleType:
    """The torch that the extension is compiled against; it must be the torch that it will run with."""
    try:
        import torch
    except ImportError:
        fail(
            "torch is not installed in the build environment. The extension must be compiled against the "
            "torch that it will run with, so an isolated build cannot work. Install torch first, then run\n"
            f"    pip install 'setuptools>=77' wheel pybind11 ninja && {NO_ISOLATION}"
        )
    return torch


def find_ninja() -> str:
    beside_python = Path(sys.executable).with_name("ninja")
    found = str(beside_python) if beside_python.exists() else shutil.which("ninja")
    return found or fail("ninja is not installed: run `pip install ninja` and build again")


def find_toolkit() -> tuple[Toolkit | None, str]:
    """The CUDA toolkit, or None for a CPU-only build; and the description for pysupcon.backends()."""
    requested = os.environ.get("PYSUPCON_CUDA", "")
    if requested not in ("", "0", "1"):
        fail(f"PYSUPCON_CUDA must be 0, 1 or unset, got {requested!r}")
    if requested == "0":
        return None, "PYSUPCON_CUDA=0 at build time"
    if not list((ROOT / "csrc/cuda").glob("*.cu")):
        return None, "this source tree has no CUDA kernels"
    toolkit, detail = find_cuda()
    if toolkit is None and requested == "1":
        fail(f"PYSUPCON_CUDA=1, but {detail}")
    return toolkit, detail if toolkit else f"at build time, {detail}"


def cuda_archs(nvcc: str) -> list[str]:
    text = os.environ.get("PYSUPCON_CUDA_ARCHS", "")
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
    if not text:
        return DEFAULT_CUDA_ARCHS
    if text == "all":
        return [a for a in ALL_CUDA_ARCHS if f"compute_{a.rstrip('a')}" in known]
    archs = [a.strip().replace(".", "") for a in re.split(r"[;,\s]+", text) if a.strip()]
    for arch in archs:
        if f"compute_{arch.rstrip('af')}" not in known:
            fail(f"PYSUPCON_CUDA_ARCHS: {nvcc} does not support {arch!r}, only {' '.join(known.split())}")
    return archs


def gencode(archs: list[str]) -> list[str]:
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    # PTX of a target with a suffix ("90a") runs on that architecture only; newer ones need the plain form.
    newest = max(int(a.rstrip("af")) for a in archs)
    return [*flags, f"-gencode=arch=compute_{newest},code=compute_{newest}"]


class NinjaFile:
    """Collects the build statements of a ninja file. Each object has its own flags."""

    def __init__(self, build_dir: Path) -> None:
        self.dir = build_dir
        self.text = ["ninja_required_version = 1.5", f"builddir = {build_dir}"]
        self.objects: list[str] = []

    def rule(self, name: str, command: str, description: str, depfile: bool = True) -> None:
        self.text += [f"rule {name}", f"  command = {command}", f"  description = {description}"]
        if depfile:
            self.text += ["  depfile = $out.d", "  deps = gcc"]

    def compile(self, rule: str, source: str, flags: list[str], tag: str = "") -> None:
        out = self.dir / (source.replace("/", "_") + tag + ".o")
        quoted = " ".join(flags).replace("$", "$$")
        self.text += [f"build {out}: {rule} {ROOT / source}", f"  flags = {quoted}"]
        self.objects.append(str(out))

    def link(self, target: Path, flags: list[str]) -> None:
        self.text += [f"build {target}: link {' '.join(self.objects)}", f"  flags = {' '.join(flags)}"]
        self.text += [f"default {target}"]

    def run(self, ninja: str) -> None:
        self.dir.mkdir(parents=True, exist_ok=True)
        path = self.dir / "build.ninja"
        text = "\n".join(self.text) + "\n"
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        if subprocess.run([ninja, "-f", str(path), *jobs]).returncode:
            fail("the extension did not compile; see the compiler's output above")


class NinjaBuildExt(build_ext):
    """The build_ext command of setuptools, with ninja as the build tool."""

    def build_extension(self, ext: Extension) -> None:
        torch = require_torch()
        from torch.utils import cpp_extension

        try:
            import pybind11

            pybind_include = pybind11.get_include()
        except ImportError:
            fail(f"pybind11 is not installed: run `pip install pybind11` and then `{NO_ISOLATION}`")

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        toolkit, cuda_detail = find_toolkit()
        archs = cuda_archs(toolkit.nvcc) if toolkit else []
        tag = f"{sys.implementation.cache_tag}-torch{torch.__version__}"
        tag += "-cuda" + "-".join(archs) if toolkit else "-cpu"
        ninja = NinjaFile(ROOT / "build" / f"ninja-{tag}")
        cxx = os.environ.get("CXX", "g++")
        ninja.rule("cxx", f"{cxx} -MMD -MF $out.d $flags -c $in -o $out", "c++ $out")
        ninja.rule("link", f"{cxx} -shared $in $flags -o $out", "link $out", depfile=False)

        base = ["-fPIC", "-O3", "-Wall", "-Wextra", "-fvisibility=hidden"]
        # Contraction to fused multiply-add only; never -ffast-math (masks rely on infinities).
        kernel = [*base, "-std=c++17", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
        kernel += [f"-I{ROOT / 'csrc'}"]
        isas = X86_ISAS if platform.machine() in ("x86_64", "AMD64") else {"generic": []}
        for isa, flags in isas.items():
            ninja.compile(
                "cxx", "csrc/cpu/kernels.cpp", [*kernel, *flags, f"-DPYSUPCON_ISA={isa}"], f".{isa}"
            )
        have = [f"-DPYSUPCON_HAVE_{isa.upper()}" for isa in isas]
        for source in ("select", "driver"):
            ninja.compile("cxx", f"csrc/cpu/{source}.cpp", [*kernel, *have])

        if toolkit:
            self.add_cuda(ninja, toolkit, archs)
            cuda_detail = f"{cuda_detail}, architectures {' '.join(archs)} and PTX"
        else:
            print(f"pysupcon: CPU only: {cuda_detail}", flush=True)

        includes = [*cpp_extension.include_paths(), pybind_include, sysconfig.get_paths()["include"]]
        glue = [*base, "-std=c++20", "-fopenmp", "-Wno-unused-parameter", f"-I{ROOT / 'csrc'}"]
        glue += [f"-isystem{path}" for path in includes]
        glue += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"]
        facts = {"TORCH_VERSION": torch.__version__, "CUDA_DETAIL": cuda_detail, "COMPILER": Path(cxx).name}
        facts["CUDA_CODE"] = " ".join(re.findall(r",code=(\w+)", " ".join(gencode(archs)))) if toolkit else ""
        for source in ("csrc/library.cpp", "csrc/cpu_glue.cpp"):
            ninja.compile("cxx", source, glue)
        if toolkit:
            ninja.compile("cxx", "csrc/cuda_glue.cpp", glue)
        strings = {name: value.replace("\\", "/").replace('"', "'") for name, value in facts.items()}
        defines = [shlex.quote(f'-DPYSUPCON_{name}="{value}"') for name, value in strings.items()]
        defines += ["-DPYSUPCON_WITH_CUDA"] if toolkit else []
        ninja.compile("cxx", "csrc/bindings.cpp", [*glue, *defines])

        link = [f"-L{path}" for path in cpp_extension.library_paths()]
        link += ["-fopenmp", "-ltorch", "-ltorch_cpu", "-ltorch_python", "-lc10", "-Wl,--as-needed"]
        if toolkit:
            link += [f"-L{toolkit.cudart}", "-lcudart_static", "-lrt", "-ldl", "-lpthread"]
        ninja.link(target, link)
        ninja.run(find_ninja())

    def add_cuda(self, ninja: NinjaFile, toolkit: Toolkit, archs: list[str]) -> None:
        """One nvcc call per kernel file. ptxas' report of registers and spills is stored with the object."""
        report = "$out.ptxas.txt"
        command = (
            f"{toolkit.nvcc} -MD -MF $out.d $flags -c $in -o $out > {report} 2>&1 || (cat {report}; exit 1)"
        )
        ninja.rule("nvcc", command, "nvcc $out")
        flags = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-v"]
        flags += ["--expt-relaxed-constexpr", f"-I{ROOT / 'csrc'}", *toolkit.include_flags]
        flags += gencode(archs)
        for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
            ninja.compile("nvcc", str(source.relative_to(ROOT)), flags)


# ninja compiles the sources. As dependencies of the extension they become part of the source distribution.
SOURCES = [path for path in sorted((ROOT / "csrc").rglob("*")) if path.is_file() and path.suffix != ".pyc"]

setup(
    ext_modules=[
        Extension("pysupcon._C", sources=[], depends=[str(path.relative_to(ROOT)) for path in SOURCES])
    ],
    cmdclass={"build_ext": NinjaBuildExt},
)
