"""Everything that only a GPU can say, in at most eight minutes and without a network.

    python benchmarks/gpu_check.py [--minutes 8] [--json FILE]

1. builds the extension in place for this GPU, and the kernels' own driver with nvcc
2. runs that driver (tests/cuda_emulation: the kernels against a float64 oracle), then at small sizes under
   compute-sanitizer's memcheck and racecheck
3. runs tests/test_cuda_gpu.py: losses against float64, gradcheck, wrappers, graphs, streams, memory, large N
4. measures (benchmarks/run.py --device cuda) and writes benchmarks/results/<device>.json

Exit status: 0; 1 if a step failed; 2 where there is nothing to check (no GPU, no nvcc, torch too old). Each
step ends with the minutes; one that was cut short or never begun is named in the last lines and has failed.
Needed beside torch and nvcc: ninja, pybind11, setuptools, pytest.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
EMULATION = ROOT / "tests" / "cuda_emulation"
MINIMUM_TORCH = (2, 11)
# The smallest cases that start every kernel; a sanitizer makes a kernel some hundred times slower.
SANITIZED = ("bf16-candidates", "bf16-long", "f16-own", "f32x3-own", "f32x2-own", "f64-own")


class Step(NamedTuple):
    name: str
    command: list[str]
    environment: dict[str, str]
    seconds: float  # at most


class Outcome(NamedTuple):
    name: str
    passed: bool
    seconds: float
    word: str


def find_tool(name: str) -> str | None:
    """A program of the CUDA toolkit: on PATH, or under CUDA_HOME or /usr/local/cuda."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    places = [shutil.which(name), *(f"{home}/bin/{name}" for home in homes if home)]
    return next((place for place in places if place and Path(place).exists()), None)


def obstacle(torch_version: str, has_gpu: bool, nvcc: str | None) -> str | None:
    """Why there is nothing to check, or None."""
    match = re.match(r"(\d+)\.(\d+)", torch_version)
    if match is None or (int(match[1]), int(match[2])) < MINIMUM_TORCH:
        return f"torch {MINIMUM_TORCH[0]}.{MINIMUM_TORCH[1]} or newer is needed, this is {torch_version}"
    if not has_gpu:
        return "torch sees no CUDA device"
    return None if nvcc else "nvcc was not found on PATH, in CUDA_HOME or in /usr/local/cuda"


def file_name(device: str) -> str:
    """'NVIDIA H100 80GB HBM3' -> 'nvidia-h100-80gb-hbm3.json'."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


def driver_commands(nvcc: str, arch: str, out: Path) -> tuple[list[list[str]], list[str]]:
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


def steps(device: str, arch: str, sanitizer: str | None, driver: Path, results: Path) -> list[Step]:
    """What follows the build, in order of what a failure would say."""
    python = sys.executable
    found = [Step("kernels against the oracle", [str(driver)], {}, 60.0)]
    if sanitizer:
        for tool in ("memcheck", "racecheck"):
            command = [sanitizer, f"--tool={tool}", "--error-exitcode=9", str(driver), *SANITIZED]
            found.append(Step(f"compute-sanitizer {tool}", command, {}, 60.0))
    tests = [python, "-m", "pytest", "-q", "--noconftest", "tests/test_cuda_gpu.py"]
    found.append(Step("tests on the GPU", tests, {"PYTHONPATH": str(ROOT)}, 180.0))
    measure = [python, "benchmarks/run.py", "--device", "cuda", "--seconds", "0.5", "--json", str(results)]
    measure += ["--cases", "speed", "small", "losses", "dims", "dtypes", "memory"]
    found.append(Step(f"measurements on {device}", measure, {}, 240.0))
    return found


def run(step: Step, left: float) -> Outcome:
    """The step's exit status within its own time and what is left of all."""
    limit = min(step.seconds, left)
    if limit <= 0:
        return Outcome(step.name, False, 0.0, "not begun: the time was up")
    print(f"\n== {step.name} ==", flush=True)
    start = time.monotonic()
    try:
        code = subprocess.run(
            step.command, cwd=ROOT, env={**os.environ, **step.environment}, timeout=limit
        ).returncode
        word = "" if code == 0 else f"exit status {code}"
    except subprocess.TimeoutExpired:
        word = f"cut short after {limit:.0f} s"
    return Outcome(step.name, not word, time.monotonic() - start, word)


def build(nvcc: str, arch: str, out: Path, left: float) -> list[Outcome]:
    """The extension for this GPU only, and the driver beside it."""
    out.mkdir(parents=True, exist_ok=True)
    extension = Step(
        "build the extension",
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        {"PYSUPCON_CUDA": "1", "PYSUPCON_CUDA_ARCHS": arch, "NVCC": nvcc},
        240.0,
    )
    objects, link = driver_commands(nvcc, arch, out)
    start = time.monotonic()
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) // 2)) as pool:
        compiled = [
            pool.submit(run, Step("compile the driver", command, {}, 240.0), left) for command in objects
        ]
        outcomes = [run(extension, left), *(future.result() for future in compiled)]
    failed = [o for o in outcomes if not o.passed]
    return failed or [
        outcomes[0],
        run(Step("link the driver", link, {}, 60.0), left - (time.monotonic() - start)),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--minutes", type=float, default=8.0, help="for everything (default %(default)s)")
    options.add_argument(
        "--json", type=Path, metavar="FILE", help="the measurements (default: results/<device>.json)"
    )
    chosen = options.parse_args(arguments)
    start = time.monotonic()
    try:
        import torch
    except ImportError:
        print("gpu-check: torch is not installed", file=sys.stderr)
        return 2
    nvcc = find_tool("nvcc")
    reason = obstacle(torch.__version__, torch.cuda.is_available(), nvcc)
    if reason or nvcc is None:
        print(f"gpu-check: nothing can be checked here: {reason}", file=sys.stderr)
        return 2

    def left() -> float:
        return 60 * chosen.minutes - (time.monotonic() - start)

    device = torch.cuda.get_device_name()
    arch = "{}{}".format(*torch.cuda.get_device_capability())
    sanitizer = find_tool("compute-sanitizer")
    results = chosen.json or ROOT / "benchmarks" / "results" / file_name(device)
    out = ROOT / "build" / f"gpu-check-sm_{arch}"
    outcomes = build(nvcc, arch, out, left())
    if all(o.passed for o in outcomes):
        for step in steps(device, arch, sanitizer, out / "driver", results):
            outcomes.append(run(step, left()))
    if sanitizer is None:
        outcomes.append(Outcome("compute-sanitizer", False, 0.0, "not installed beside nvcc"))
    print(f"\n{device}, torch {torch.__version__}, {time.monotonic() - start:.0f} s")
    for outcome in outcomes:
        verdict = "passed" if outcome.passed else "FAILED"
        print(f"{verdict} {outcome.seconds:6.0f} s  {outcome.name}  {outcome.word}")
    return 0 if all(o.passed for o in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
