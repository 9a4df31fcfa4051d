"""The steps of gpu_check.py: their commands, order and time limits."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.gpu import counters

ROOT = Path(__file__).resolve().parents[2]
QUICK_MINUTES = 8.0
"""Time limit of the short form."""
FORMATS = ("bf16", "f16", "f32x1", "f32x2", "f32x3", "f64")
#: One small case of every kind, checked before anything is measured.
QUICK_CASES = ("bf16-tiles", "bf16-triangle-300", "bf16-long", "f16-candidates", "f32x3-own", "f64-tiles")
# The smallest cases that launch every kernel; a sanitizer makes a kernel some hundred times slower.
SANITIZED = (
    "bf16-tiles",
    "bf16-triangle-300",
    "bf16-candidates",
    "bf16-long",
    "f16-own",
    "f32x3-own",
    "f32x2-own",
    "f64-own",
)
SANITIZED_BROKEN = ("f64-own", "f32x2")
#: Groups of tests/cuda/test_cuda_gpu.py as -k expressions. Each group runs in its own process, and so do all
#: other tests together.
TESTS = {
    "losses, bfloat16": "agree_with_float64 and torch.bfloat16",
    "losses, float16": "agree_with_float64 and torch.float16",
    "losses, float32": "agree_with_float64 and torch.float32",
    "losses, float64": "agree_with_float64 and torch.float64",
    "sums": "many or wide_rows or large_batch or half_of",
    "memory": "memory or offsets",
    "graphs and threads": "graph or capture or streams or threads or compile",
    "errors": "failed",
}
#: Imports of `accelerate launch pysupcon/train.py` that may not be installed; see benchmarks/wheels.py.
TRAINING = (
    "accelerate",
    "jsonargparse",
    "docstring_parser",
    "typeshed_client",
    "sklearn",
    "yaml",
    "safetensors",
)


@dataclass(frozen=True)
class Step:
    name: str
    command: Sequence[str]
    seconds: float
    """time limit"""
    needs: str = ""
    """"extension" or "driver": the step that builds it must have passed"""
    missing: str = ""
    """reason why the step is skipped, or "" """
    environment: dict[str, str] = field(default_factory=dict)
    result: Path | None = None
    """output file of the step: JSON with rows, or the CSV of ncu"""
    stored_as: str = ""
    """key of the result in gpu_check's JSON: "rows", "launches" or "counters" """


@dataclass(frozen=True)
class Tools:
    """Paths of CUDA tools; None: not installed."""

    nvcc: str
    sanitizer: str | None
    ncu: str | None


def stages(tools: Tools, arch: str, out: Path, minutes: float) -> list[list[Step]]:
    """The stages in order; the steps of one stage run in parallel. The long form has more stages."""
    found = [
        _build(tools.nvcc, arch, out),
        [_driver("quick look at the kernels", out, QUICK_CASES, 12)],
        [_measured("ours", out, 40, "0.3", ["pysupcon"], *_OURS)],
        *([_driver(f"kernels against the oracle, {name}", out, [name], 7)] for name in FORMATS),
        [_driver("broken operands", out, [], 8, "broken")],
        *([step] for step in _tests()),
        *([step] for step in _sanitizers(tools.sanitizer, out)[:2]),
        [_measured("dense", out, 35, "0.3", _DENSE, "small", "speed", "memory")],
        [_measured("compiled", out, 35, "0.3", _COMPILED, "speed", sizes=["16384"])],
    ]
    if minutes > QUICK_MINUTES:
        found += [
            *([step] for step in _sanitizers(tools.sanitizer, out)[2:]),
            [_launches(out)],
            *([step] for step in _counters(tools.ncu, out)),
            [_training(out)],
            [_measured("pairs", out, 200, "1", [], "pairs")],
            [_measured("the whole table", out, 380, "1", _OTHERS, *_TABLE)],
            [_measured("compiled, more sizes", out, 110, "1", _COMPILED, *_MORE, sizes=["1024", "65536"])],
        ]
    return found


_OURS = ("speed", "losses", "memory", "blocks", "dtypes", "dims")
_DENSE = ("pysupcon", "tiled", "dense", "written")
#: torch.compile takes half a minute per size, so only a few sizes are measured.
_COMPILED = ("pysupcon", "compiled")
_MORE = ("speed", "memory")
_OTHERS = ("pysupcon", "tiled", "dense", "written", "metric-learning")
_TABLE = ("small", "speed", "losses", "blocks", "dims", "dtypes", "classes", "temperatures", "memory")


def select_steps(plan: Sequence[Sequence[Step]], names: Sequence[str]) -> list[list[Step]]:
    """The builds and the steps whose names contain one of ``names``; all steps if ``names`` is empty."""
    kept = [
        [s for s in stage if not names or s.name.startswith("build") or any(n in s.name for n in names)]
        for stage in plan
    ]
    return [stage for stage in kept if stage]


def limits(plan: Sequence[Sequence[Step]], seconds: float) -> list[float]:
    """Time limit of each stage, in total at most ``seconds``; 0 for a stage whose steps are skipped."""
    wanted = [max(0.0 if step.missing else step.seconds for step in stage) for stage in plan]
    shrink = min(1.0, seconds / sum(wanted))
    return [shrink * limit for limit in wanted]


def _python_path() -> dict[str, str]:
    """This checkout first, then the caller's PYTHONPATH."""
    return {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}


def _build(nvcc: str, arch: str, out: Path) -> list[Step]:
    environment = {"PYSUPCON_CUDA": "1", "PYSUPCON_CUDA_ARCHS": arch}
    extension = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    driver = [sys.executable, "benchmarks/gpu/gpu_driver.py", arch, str(out)]
    return [
        Step("build the extension", extension, 85, environment={**environment, "NVCC": nvcc}),
        Step("build the driver", driver, 85, environment={"NVCC": nvcc}),
    ]


def _driver(name: str, out: Path, cases: Sequence[str], seconds: float, program: str = "driver") -> Step:
    return Step(name, [str(out / program), *cases], seconds, needs="driver")


def _tests() -> list[Step]:
    groups = {**TESTS, "all others": f"not ({' or '.join(f'({group})' for group in TESTS.values())})"}
    return [
        Step(
            f"tests on the GPU: {name}", _pytest(expression), seconds, "extension", environment=_python_path()
        )
        for (name, expression), seconds in zip(
            groups.items(), (12, 12, 12, 12, 20, 20, 28, 20, 20), strict=True
        )
    ]


def _pytest(expression: str) -> list[str]:
    options = ["-v", "--tb=short", "--noconftest", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=10"]
    return [sys.executable, "-m", "pytest", *options, "-k", expression, "tests/cuda/test_cuda_gpu.py"]


def _sanitizers(sanitizer: str | None, out: Path) -> list[Step]:
    missing = "" if sanitizer else "compute-sanitizer is not installed"

    def step(name: str, program: str, cases: Sequence[str], seconds: float) -> Step:
        command = [str(sanitizer), f"--tool={name.split()[0]}", "--error-exitcode=9"]
        command += [str(out / program), *cases]
        return Step(f"compute-sanitizer {name}", command, seconds, "driver", missing)

    return [
        step("memcheck", "driver", SANITIZED, 25),
        step("racecheck", "driver", SANITIZED, 25),
        step("memcheck of broken operands", "broken", SANITIZED_BROKEN, 15),
    ]


def _measured(
    name: str,
    out: Path,
    limit: float,
    seconds: str,
    implementations: Sequence[str],
    *cases: str,
    sizes: Sequence[str] = (),
) -> Step:
    """A run of run.py with time limit ``limit``; ``seconds`` and empty ``implementations`` as in run.py."""
    result = out / f"{re.sub(r'[^a-z]+', '-', name)}.json"
    command = [sys.executable, "benchmarks/kernels/run.py", "--device", "cuda", "--seconds", seconds]
    command += ["--json", str(result), "--cases", *cases]
    if implementations:
        command += ["--implementations", *implementations]
    if sizes:
        command += ["--sizes", *sizes]
    return Step(
        f"measurements: {name}", command, limit, "extension", environment=_python_path(), result=result,
        stored_as="rows",
    )  # fmt: skip


def _launches(out: Path) -> Step:
    result = out / "launches.json"
    command = [
        sys.executable,
        "benchmarks/kernels/one_step.py",
        "--n",
        "1024",
        "16384",
        "--launches",
        str(result),
    ]
    return Step(
        "launches a step", command, 45, "extension", environment=_python_path(), result=result,
        stored_as="launches",
    )  # fmt: skip


def _counters(ncu: str | None, out: Path) -> list[Step]:
    found = []
    for n, dim, dtype in ((65_536, 128, "bfloat16"), (16_384, 768, "bfloat16"), (16_384, 128, "float32")):
        name = f"counters, N={n} D={dim} {dtype}"
        log = out / f"ncu-{n}-{dim}-{dtype}.csv"
        program = [sys.executable, "benchmarks/kernels/one_step.py", "--n", str(n), "--dim", str(dim)]
        program += ["--dtype", dtype]
        found.append(
            Step(
                name,
                counters.command(str(ncu), log, program, kernels=8),
                50,
                "extension",
                "" if ncu else "ncu is not installed",
                # Profile only the kernels of the step, without the self-test against known answers.
                {**_python_path(), "PYSUPCON_TRUST": "1"},
                log,
                "counters",
            )
        )
    return found


def _training(out: Path) -> Step:
    absent = [name for name in TRAINING if importlib.util.find_spec(name) is None]
    missing = f"not installed: {', '.join(absent)}; see benchmarks/wheels.py" if absent else ""
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--num_processes",
        "1",
        "pysupcon/train.py",
    ]
    command += [
        "--config",
        "configs/digits_smoke.yaml",
        "--output_dir",
        str(out / time.strftime("digits-%H%M%S")),
    ]
    return Step("train the digits recipe", command, 120, "extension", missing, environment=_python_path())
