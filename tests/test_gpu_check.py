"""benchmarks/gpu_check.py as far as it goes without a GPU: what it would run, and how it reports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import gpu_check  # noqa: E402


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to check")
def test_says_why_there_is_nothing_to_check() -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu_check.py"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert "nothing can be checked here: torch sees no CUDA device" in done.stderr


def test_obstacles() -> None:
    assert gpu_check.obstacle("2.11.0+cu130", True, "/nvcc") is None
    assert "torch 2.11 or newer is needed, this is 2.10.1" in str(gpu_check.obstacle("2.10.1", True, "/nvcc"))
    assert "nvcc was not found" in str(gpu_check.obstacle("2.12.0", True, None))


def test_results_are_named_after_the_device() -> None:
    assert gpu_check.file_name("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3.json"


def test_the_driver_is_made_of_every_kernel_source(tmp_path: Path) -> None:
    compile_, link = gpu_check.driver_commands("nvcc", "90", tmp_path)
    sources = {Path(command[-3]).name for command in compile_}
    assert sources == {p.name for p in (ROOT / "csrc" / "cuda").glob("*.cu")} | {"emulate.cpp"}
    assert all(command[-1] in link for command in compile_)


def test_every_step_names_things_that_exist(tmp_path: Path) -> None:
    steps = gpu_check.steps("X", "90", "compute-sanitizer", tmp_path / "driver", tmp_path / "out.json")
    first_words = [step.name.split()[0] for step in steps]
    sanitizers = ["compute-sanitizer"] * 2
    assert first_words == ["kernels", *sanitizers, "tests", "measurements"]
    for step in steps:
        for word in step.command:
            if word.startswith(("tests/", "benchmarks/")):
                assert (ROOT / word).exists()
    measure = steps[-1].command
    from benchmarks.cases import build_cases
    from benchmarks.run import parser

    options = parser().parse_args(measure[2:])
    assert options.device == "cuda"
    assert set(options.cases) <= set(build_cases("cuda"))
    cases = (ROOT / "tests/cuda_emulation/cases.h").read_text()
    for prefix in gpu_check.SANITIZED:
        kind, name = prefix.split("-", 1)
        assert f'{{"{kind}", Dtype' in cases
        assert f'add("{name}' in cases


def test_a_step_that_fails_or_is_cut_short_is_reported() -> None:
    python = sys.executable
    assert gpu_check.run(gpu_check.Step("good", [python, "-c", ""], {}, 60), 60).passed
    bad = gpu_check.run(gpu_check.Step("bad", [python, "-c", "raise SystemExit(3)"], {}, 60), 60)
    assert (bad.passed, bad.word) == (False, "exit status 3")
    long = gpu_check.run(gpu_check.Step("long", [python, "-c", "import time; time.sleep(60)"], {}, 0.3), 60)
    assert not long.passed
    assert long.word.startswith("cut short")
    assert gpu_check.run(gpu_check.Step("late", [python, "-c", ""], {}, 60), -1).word.startswith("not begun")
