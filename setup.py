"""Builds pysupcon's extension with one ninja file.

Each source has its own flags. The CPU kernels are compiled once per instruction set. nvcc compiles the CUDA
kernels without torch headers, so that both CPU and CUDA builds of torch work. Only the glue includes torch.

Environment
    PYSUPCON_CUDA=0|1        0: build without the CUDA kernels; 1: fail if they cannot be built
                             (default: build them if csrc/find_cuda.py finds nvcc)
    PYSUPCON_CUDA_ARCHS      e.g. "80;90a", "sm_90", "9.0+PTX", "native" or "all"; default "80;90"; PTX of the
                             newest is always added
    PYSUPCON_EXTENSION=0|1   0: install the Python package without the compiled extension (default 1)
    CXX, NVCC, MAX_JOBS      C++ compiler, CUDA compiler and the number of parallel jobs
"""

import atexit
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).resolve().with_name("csrc")))
from cuda_archs import choose_archs, gencode, known_archs
from find_cuda import Toolkit, find_cuda
from host_compiler import check_compiler, clang_version, mangling_flags

ROOT = Path(__file__).resolve().parent
NO_ISOLATION = "pip install --no-build-isolation ."

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


def read_only() -> bool:
    """Whether the checkout cannot hold the folder build/."""
    return not os.access(ROOT / "build" if (ROOT / "build").exists() else ROOT, os.W_OK)


def build_folder() -> Path:
    """build/ of the checkout, or the user's cache folder if the checkout is read-only."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "pysupcon" if read_only() else ROOT / "build"


def options_of_setuptools() -> dict[str, dict[str, str]]:
    """A temporary folder for the files of a wheel if the checkout is read-only.

    The cache folder would not do: setuptools would pack what an earlier build of another version left there.
    """
    if not read_only():
        return {}
    folder = tempfile.mkdtemp(prefix="pysupcon-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return {"build": {"build_base": folder}, "egg_info": {"egg_base": folder}}


def escape(path: object) -> str:
    """A path of a build statement: ninja reads "$", " " and ":" as syntax."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def quote(words: list[str]) -> str:
    """Words of a command line, quoted for the shell and for ninja."""
    return shlex.join(words).replace("$", "$$")


def variant(torch_version: str, archs: list[str]) -> str:
    """Name of the folder of a build: each Python, torch and choice of architectures has its own."""
    device = "-cuda" + "-".join(archs) if archs else "-cpu"
    return f"ninja-{sys.implementation.cache_tag}-torch{torch_version}{device}"


class NinjaFile:
    """Collects the build statements of a ninja file. Each object has its own flags."""

    def __init__(self, build_dir: Path) -> None:
        self.dir = build_dir
        self.text = ["ninja_required_version = 1.5", f"builddir = {str(build_dir).replace('$', '$$')}"]
        self.objects: list[str] = []

    def rule(self, name: str, command: str, description: str, depfile: bool = True) -> None:
        self.text += [f"rule {name}", f"  command = {command}", f"  description = {description}"]
        if depfile:
            self.text += ["  depfile = $out.d", "  deps = gcc"]

    def compile(self, rule: str, source: str, flags: list[str], tag: str = "") -> None:
        out = self.dir / (source.replace("/", "_") + tag + ".o")
        self.text += [f"build {escape(out)}: {rule} {escape(ROOT / source)}", f"  flags = {quote(flags)}"]
        self.objects.append(escape(out))

    def link(self, target: Path, flags: list[str]) -> None:
        self.text += [f"build {escape(target)}: link {' '.join(self.objects)}", f"  flags = {quote(flags)}"]
        self.text += [f"default {escape(target)}"]

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
        cxx = os.environ.get("CXX", "g++")
        try:
            requested = os.environ.get("PYSUPCON_CUDA_ARCHS", "")
            archs = choose_archs(requested, known_archs(toolkit.nvcc)) if toolkit else []
            check_compiler(cxx)
        except ValueError as error:
            fail(str(error))
        ninja = NinjaFile(build_folder() / variant(torch.__version__, archs))
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
        glue += mangling_flags(clang_version(cxx), torch.__config__.show())
        glue += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"]
        facts = {"TORCH_VERSION": torch.__version__, "CUDA_DETAIL": cuda_detail, "COMPILER": Path(cxx).name}
        facts["CUDA_CODE"] = " ".join(re.findall(r",code=(\w+)", " ".join(gencode(archs)))) if toolkit else ""
        for source in ("csrc/library.cpp", "csrc/cpu_glue.cpp"):
            ninja.compile("cxx", source, glue)
        if toolkit:
            ninja.compile("cxx", "csrc/cuda_glue.cpp", glue)
        strings = {name: value.replace("\\", "/").replace('"', "'") for name, value in facts.items()}
        defines = [f'-DPYSUPCON_{name}="{value}"' for name, value in strings.items()]
        defines += ["-DPYSUPCON_WITH_CUDA"] if toolkit else []
        ninja.compile("cxx", "csrc/bindings.cpp", [*glue, *defines])

        link = [f"-L{path}" for path in cpp_extension.library_paths()]
        link += ["-fopenmp", "-ltorch", "-ltorch_cpu", "-ltorch_python", "-lc10", "-Wl,--as-needed"]
        if toolkit:
            link += [f"-L{toolkit.cudart}", "-lcudart_static", "-lrt", "-ldl", "-lpthread"]
        # Each variant has a library of its own: with one target for all, ninja would not link again after a
        # build of another variant.
        library = ninja.dir / target.name
        ninja.link(library, link)
        ninja.run(find_ninja())
        # A new file, because a process may have the old one mapped.
        target.unlink(missing_ok=True)
        shutil.copy(library, target)

    def add_cuda(self, ninja: NinjaFile, toolkit: Toolkit, archs: list[str]) -> None:
        """One nvcc call per kernel file. ptxas' report of registers and spills is stored with the object."""
        report = "$out.ptxas.txt"
        command = f"{quote([toolkit.nvcc])} -MD -MF $out.d $flags -c $in -o $out"
        command += f" > {report} 2>&1 || (cat {report}; exit 1)"
        ninja.rule("nvcc", command, "nvcc $out")
        flags = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-v"]
        flags += ["--expt-relaxed-constexpr", f"-I{ROOT / 'csrc'}", *toolkit.include_flags]
        flags += gencode(archs)
        for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
            ninja.compile("nvcc", str(source.relative_to(ROOT)), flags)


# ninja compiles the sources. As dependencies of the extension they become part of the source distribution.
SOURCES = [path for path in sorted((ROOT / "csrc").rglob("*")) if path.is_file() and path.suffix != ".pyc"]

EXTENSION = Extension("pysupcon._C", sources=[], depends=[str(path.relative_to(ROOT)) for path in SOURCES])

# The wheel holds the example configs as pysupcon/configs, so that `--config NAME` finds them.
CONFIGS = [ROOT / "configs", *sorted(path for path in (ROOT / "configs").rglob("*") if path.is_dir())]
CONFIG_PACKAGES = [".".join(("pysupcon", *path.relative_to(ROOT).parts)) for path in CONFIGS]

requested = os.environ.get("PYSUPCON_EXTENSION", "1")
if requested not in ("0", "1"):
    fail(f"PYSUPCON_EXTENSION must be 0, 1 or unset, got {requested!r}")
setup(
    packages=[*find_packages(include=["pysupcon*"]), *CONFIG_PACKAGES],
    package_dir={"pysupcon.configs": "configs"},
    package_data={"pysupcon": ["py.typed"], **{name: ["*.yaml"] for name in CONFIG_PACKAGES}},
    ext_modules=[EXTENSION] if requested == "1" else [],
    cmdclass={"build_ext": NinjaBuildExt},
    options=options_of_setuptools(),
)
