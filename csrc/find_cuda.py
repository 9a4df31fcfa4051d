"""Finds a CUDA compiler without importing torch, for setup.py and for the benchmarks that compile kernels.

If the environment variable NVCC is set, only that compiler is tried. Otherwise the first nvcc that works is
used, in this order: PATH, CUDA_HOME, /usr/local/cuda, pip packages (in the order of sys.path). An nvcc works
if it is new enough, has a static runtime and compiles a small kernel with the host compiler.

pip packages of CUDA 13 share one folder, site-packages/nvidia/cu13. It is a complete toolkit if all packages
are installed and have matching versions. Some packages may be in another site-packages folder than nvcc, for
example if a virtual environment extends an installation that has torch; their headers then need extra include
flags. nvcc's profile in these packages names lib64, but the folder is lib, so linking also needs ``-L``. pip
packages of CUDA 12 cannot be used: they contain ptxas but no nvcc.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

MIN_NVCC = (12, 0)
HOMES = ("/usr/local/cuda",)
# Names every package, because cuda-toolkit 13.0.2 (torch 2.11) does not pin the packages that nvcc needs.
PIP_LINE = "pip install 'cuda-toolkit[nvcc,crt,nvvm,cudart,cccl]==13.0.*'"
# Files that the kernels need from each package: one of the alternatives must exist.
PARTS = {
    "nvidia-nvvm": ("nvvm/bin/cicc",),
    "nvidia-cuda-runtime": ("include/cuda_runtime_api.h",),
    "nvidia-cuda-crt": ("include/crt/host_config.h",),
    "nvidia-cuda-cccl": ("include/nv/target", "include/cccl/nv/target"),
}
KERNEL = "#include <cuda_bf16.h>\n#include <cuda_fp16.h>\n__global__ void empty() {}\n"


class Toolkit(NamedTuple):
    """A compiler that works, and the flags that its command lines need."""

    nvcc: str
    version: str  # "13.0"
    include_flags: list[str]  # for compiling; empty for an ordinary toolkit
    cudart: Path  # folder of libcudart_static.a: -L for linking


def find_cuda(homes: Sequence[str] = HOMES, sites: Sequence[str] | None = None) -> tuple[Toolkit | None, str]:
    """Find a toolkit that works.

    Args:
        homes: toolkit folders to try after CUDA_HOME.
        sites: folders with installed packages; default sys.path.

    Returns:
        The toolkit and "nvcc X.Y", or None and the reason why no toolkit works.
    """
    named = os.environ.get("NVCC")
    if named:
        path = shutil.which(named)
        if path is None:
            return None, f"NVCC={named} is not a program"
        candidates = [path]
    else:
        candidates = find_programs("nvcc", homes, sites)
    reasons = []
    for nvcc in candidates:
        toolkit, reason = examine(nvcc, sites)
        if toolkit:
            return toolkit, f"nvcc {toolkit.version}"
        reasons.append(reason)
    places = ", ".join(["NVCC", "PATH", "CUDA_HOME", *homes, "pip's packages"])
    return None, "; ".join(reasons) or f"no nvcc was found ({places}); to install one: {PIP_LINE}"


def find_programs(name: str, homes: Sequence[str] = HOMES, sites: Sequence[str] | None = None) -> list[str]:
    """Every program of this name (nvcc, compute-sanitizer), in the order of the module docstring."""
    tops = [Path(home) for home in (os.environ.get("CUDA_HOME"), *homes) if home]
    tops += pip_roots("cu*", sites)
    paths = [shutil.which(name), *(shutil.which(str(top / "bin" / name)) for top in tops)]
    return list(dict.fromkeys(path for path in paths if path))


def pip_roots(pattern: str, sites: Sequence[str] | None) -> Iterator[Path]:
    """Folders such as site-packages/nvidia/cu13; of one site-packages, the newest CUDA first."""
    for site in sys.path if sites is None else sites:
        found = [path for path in Path(site).glob(f"nvidia/{pattern}") if is_pip_root(path)]
        yield from sorted(found, key=lambda path: int(path.name[2:]), reverse=True)


def is_pip_root(path: Path) -> bool:
    return path.parent.name == "nvidia" and re.fullmatch(r"cu\d+", path.name) is not None


def examine(nvcc: str, sites: Sequence[str] | None = None) -> tuple[Toolkit | None, str]:
    """The toolkit of this nvcc, or None and the reason why it does not work."""
    match = re.search(r"release (\d+)\.(\d+)", output([nvcc, "--version"]))
    if match is None:
        return None, f"{nvcc} --version prints no version"
    version = f"{match[1]}.{match[2]}"
    if (int(match[1]), int(match[2])) < MIN_NVCC:
        return None, f"{nvcc} is of CUDA {version}, older than {MIN_NVCC[0]}.{MIN_NVCC[1]}"
    top = top_of(nvcc)
    roots = [top]
    remedy = ""
    if is_pip_root(top):
        roots += [root for root in pip_roots(top.name, sites) if root.resolve() != top]
        remedy = f"; to install matching packages: {PIP_LINE}"
        if reason := unfit_packages(roots, version):
            return None, f"{nvcc} cannot be used: {reason}{remedy}"
    flags = [flag for root in roots[1:] for flag in header_flags(root)]
    folders = [path for root in roots for path in (root / "lib64", root / "lib", *root.glob("targets/*/lib"))]
    cudart = next((path.resolve() for path in folders if (path / "libcudart_static.a").exists()), None)
    if cudart is None:
        return None, f"{nvcc} has no libcudart_static.a with it{remedy}"
    if reason := compile_error(nvcc, flags):
        return None, f"{nvcc} does not compile a small kernel: {reason}{remedy}"
    return Toolkit(nvcc, version, flags, cudart), ""


def top_of(nvcc: str) -> Path:
    """Folder of the toolkit, as printed by nvcc itself: ``nvcc`` may be a wrapper in another folder."""
    match = re.search(r"TOP=(.*)", output([nvcc, "--dryrun", "-x", "cu", os.devnull]))
    return (Path(match[1].strip()) if match else Path(nvcc).resolve().parent.parent).resolve()


def unfit_packages(roots: list[Path], version: str) -> str:
    """Which pip packages are missing or have another CUDA version than nvcc; "" if all packages match."""
    missing = []
    for package, files in PARTS.items():
        # nvcc looks for its own programs in its own toolkit folder only.
        places = roots[:1] if package == "nvidia-nvvm" else roots
        if not any((root / file).exists() for root in places for file in files):
            missing.append(package)
    if missing:
        return f"pip's {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"
    headers = [root / "include/cuda_runtime_api.h" for root in roots]
    text = next(path for path in headers if path.exists()).read_text(errors="replace")
    match = re.search(r"#define\s+CUDART_VERSION\s+(\d+)", text)
    runtime = f"{int(match[1]) // 1000}.{int(match[1]) % 1000 // 10}" if match else "unknown"
    return "" if runtime == version else f"nvcc is {version}, but pip's nvidia-cuda-runtime is {runtime}"


def header_flags(root: Path) -> list[str]:
    """Include flags for a folder that nvcc does not search. nvcc searches its own folders first."""
    folders = [root / "include", root / "include/cccl"]
    return [f"-isystem={folder}" for folder in folders if folder.is_dir()]


def compile_error(nvcc: str, flags: list[str]) -> str:
    """The first error of nvcc or of a program that it calls, such as the host compiler; "" without one."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "empty.cu"
        source.write_text(KERNEL)
        command = [nvcc, "-std=c++17", *flags, "-c", str(source), "-o", str(source.with_suffix(".o"))]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return ""
    lines = (done.stderr + done.stdout).strip().splitlines() or ["no message"]
    return next((line for line in lines if re.search("error|fatal", line)), lines[-1])


def output(command: list[str]) -> str:
    """Standard output and standard error of a command; "" if it cannot be started."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout + done.stderr
