"""Compiles the pair kernels without a GPU, and computes the work that their tile loops must do."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import util
from pathlib import Path
from typing import NamedTuple

from benchmarks.gpu import sass

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "csrc"))

from find_cuda import HOMES, Toolkit, find_cuda, find_programs, top_of

KERNELS = (
    "forward_resident",
    "forward_triangular",
    "forward_streamed",
    "backward_resident",
    "backward_streamed",
)


RESIDENT_WIDTH = 128
"""kResidentWidth of csrc/cuda/plan.h"""


class ModelError(RuntimeError):
    """No prediction is possible: a tool is missing, or the code has an unexpected form."""


class Config(NamedTuple):
    """Constants of a kernel's configuration (ResidentForward, ...)."""

    BM: int
    BN: int
    CH: int
    PARTS: int
    THREADS: int
    BLOCKS: int
    """blocks that run on a multiprocessor at the same time"""
    SLICES: int
    """slices of a row that the kernel holds: of the gradient in the backward, of its rows in the forward"""

    @property
    def warps(self) -> int:
        return self.THREADS // 32

    def slices(self, dim: int) -> int:
        return -(-dim // (8 * self.CH))


class Kernel(NamedTuple):
    name: str
    base: str
    """of KERNELS"""
    config: Config
    function: sass.Function
    registers: int
    spilled: int
    stack: int

    def runs_at(self, dim: int) -> bool:
        """Whether this kernel is used for rows of ``dim`` numbers."""
        resident = not self.base.endswith("_streamed")
        return resident == (self.config.PARTS == 1 and dim <= RESIDENT_WIDTH)

    def shares(self, dim: int) -> int:
        """Number of blocks that share the gradient of the same rows."""
        return -(-self.config.slices(dim) // self.config.SLICES) if self.base == "backward_streamed" else 1


class Demand(NamedTuple):
    """The work that one warp must do for one column tile."""

    multiply_adds: int
    pairs: int
    """pairs per lane; each needs an exponential"""
    copied: int
    """bytes copied to shared memory"""
    step: int
    """minimal bytes copied between two barriers, if copies are spread over several steps"""
    trips: int


def demand(base: str, c: Config, dim: int) -> Demand:
    slices = c.slices(dim)
    products = c.PARTS * (c.PARTS + 1) // 2
    row = 16 * c.CH * c.PARTS  # bytes of a row's slice
    forward = base.startswith("forward")
    streamed_rows = base == "backward_streamed" or (base == "forward_streamed" and slices > c.SLICES)
    gradient = 0 if forward else min(c.SLICES, slices)
    copied = slices * row * (c.BN + (c.BM if streamed_rows else 0))
    step = copied // slices if base == "forward_streamed" else 0
    if base == "backward_streamed":
        copied += gradient * row * c.BN
        step = row * c.BN
    multiply_adds = products * c.BM * c.BN * 8 * c.CH * (slices + gradient)
    return Demand(
        multiply_adds // c.warps, c.BM * c.BN // c.THREADS, copied // c.warps, step // c.warps, slices
    )


def tools() -> tuple[Toolkit, list[str]]:
    """(nvcc with its flags, the disassembler's command).

    Raises:
        ModelError: one of them is missing.
    """
    toolkit, detail = find_cuda()
    if toolkit is None:
        raise ModelError(detail)
    homes = [str(top_of(toolkit.nvcc)), *HOMES]
    triton = util.find_spec("triton")
    for place in (triton.submodule_search_locations or []) if triton else []:
        homes.append(f"{place}/backends/nvidia")
    for name, flag in (("nvdisasm", "-c"), ("cuobjdump", "-sass")):
        for path in find_programs(name, homes):
            return toolkit, [path, flag]
    raise ModelError(
        "neither nvdisasm nor cuobjdump was found on PATH, beside nvcc, in CUDA_HOME, in /usr/local/cuda "
        "or in the Python package triton, which carries both"
    )


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ModelError(f"{' '.join(command)}:\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout + done.stderr


_RESOURCES = re.compile(
    r"Compiling entry function '(?P<name>\S+)'.*?(?P<stack>\d+) bytes stack frame, "
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.S,
)


def compile_kernels(folder: Path, arch: str, number_format: str = "bf16", only: str = "") -> list[Kernel]:
    """The hot kernels of one number format in ``folder``.

    Args:
        folder: folder of the .cu files.
        only: compile the files whose names contain this text, such as "forward".
    """
    toolkit, disassembler = tools()
    sources = sorted(p for p in folder.glob(f"*_{number_format}.cu") if only in p.name)
    if not sources:
        raise ModelError(f"{folder} has no *{only}*_{number_format}.cu")
    flags = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", f"-I{folder.parent}", f"-I{folder}"]
    flags += toolkit.include_flags
    with tempfile.TemporaryDirectory() as directory:
        log, parsed = "", []
        for source in sources:
            cubin = f"{directory}/{source.stem}.cubin"
            log += _run(
                toolkit.nvcc, *flags, f"-arch={arch}", "-Xptxas=-v", "-cubin", str(source), "-o", cubin
            )
            parsed += sass.parse(_run(*disassembler, cubin))
        functions = {f.name: f for f in parsed if any(base in f.name for base in KERNELS)}
        readable = dict(zip(functions, demangle(list(functions)), strict=True))
        resources = {m["name"]: m for m in _RESOURCES.finditer(log)}
        hot = {name: split_name(readable[name]) for name in functions}
        hot = {
            name: parts for name, parts in hot.items() if parts[1][-1].startswith(("Statistics", "Resident"))
        }
        configs = _configs(
            {(base, arguments[0]) for base, arguments in hot.values()}, toolkit, flags, Path(directory)
        )
    return [
        Kernel(
            short_name(base, arguments),
            base,
            configs[base, arguments[0]],
            functions[name],
            int(resources[name]["registers"]),
            int(resources[name]["stores"]) + int(resources[name]["loads"]),
            int(resources[name]["stack"]),
        )
        for name, (base, arguments) in hot.items()
    ]


def demangle(names: list[str]) -> list[str]:
    if not names:
        return []
    found = find_programs("cu++filt") + find_programs("c++filt")
    if not found:
        raise ModelError("c++filt was not found; it comes with g++ (binutils)")
    return _run(found[0], *names).splitlines()


def split_name(readable: str) -> tuple[str, list[str]]:
    """Base and template arguments: "void f<C<B, 1>, S>(P)" -> ("f", ["C<B, 1>", "S"]), f a hot kernel."""
    base = next(base for base in KERNELS if base in readable)
    arguments, depth = [""], 0
    for character in readable[readable.index(base) + len(base) + 1 :]:
        depth += (character == "<") - (character == ">")
        if depth < 0:
            break
        if character == "," and depth == 0:
            arguments.append("")
        else:
            arguments[-1] += character
    return base, [argument.strip().replace("pysupcon::cuda::", "") for argument in arguments]


def short_name(base: str, arguments: Sequence[str]) -> str:
    config = re.sub(r"^\w+<(.*)>$", r"\1", arguments[0]).replace("gpu::", "")
    return f"{base}<{', '.join([config, *arguments[1:]])}>"


def _configs(
    wanted: set[tuple[str, str]], toolkit: Toolkit, flags: Sequence[str], directory: Path
) -> dict[tuple[str, str], Config]:
    """Compiles and runs a host program that prints the configurations' constants."""
    lines = []
    for base, config in sorted(wanted):
        values = ["C::BM", "C::BN", "C::CH", "C::PARTS", "C::THREADS", "C::BLOCKS", "C::SLICES"]
        format_, casts = " ".join(["%d"] * len(values)), ", ".join(f"int({v})" for v in values)
        lines.append(f'{{ using C = {config}; printf("{base}|{config}|{format_}\\n", {casts}); }}')
    source, program = directory / "config.cu", directory / "config"
    source.write_text(
        '#include <cstddef>\n#include <cstdio>\n#include "backward.cuh"\n#include "forward.cuh"\n'
        "using namespace pysupcon::cuda;\nint main() {\n" + "\n".join(lines) + "\n}\n"
    )
    _run(toolkit.nvcc, *flags, str(source), f"-L{toolkit.cudart}", "-o", str(program))
    found = {}
    for line in _run(str(program)).splitlines():
        base, config, numbers = line.split("|")
        found[base, config] = Config(*map(int, numbers.split()))
    return found
