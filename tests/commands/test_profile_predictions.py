"""The predictions of the profile command: times from injected measurements, memory against real processes."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.training_server import SEARCHED

from pysupcon.commands import profile
from pysupcon.pairs import ops
from pysupcon.pairs.backends import backends
from pysupcon.profiling import calibrate
from pysupcon.profiling.calibrate import LossModel, StepModel, calibrate_loss, first_long
from pysupcon.profiling.cost import Estimate, Line, TimeModel, Timing
from pysupcon.profiling.report import format_report
from pysupcon.profiling.request import ProfileRequest
from pysupcon.profiling.run import run_profile
from pysupcon.profiling.workspace import Problem, block_rows, worker_count

compiled = pytest.mark.skipif(not ops.compiled_for("cpu"), reason="the CPU kernels are not compiled")


def request(**changed: Any) -> ProfileRequest:
    given = ProfileRequest(
        loss="supcon",
        n=4096,
        dim=64,
        classes=100,
        temperature=0.07,
        dtype=torch.float32,
        device=torch.device("cpu"),
        backend="tiled",
        encoder=None,
        image_size=32,
        chunk=None,
        measure=False,
        output=Path("unused"),
    )
    return replace(given, **changed)


def exact(fixed: float, slope: float, small: float = 1.0, large: float = 4.0) -> TimeModel:
    """A model calibrated without noise."""
    return TimeModel(*(Timing(work, [fixed + slope * work] * 3) for work in (small, large)))


def loss_model(**changed: Any) -> LossModel:
    """Forward and backward at 1 GFLOP/s, 100 bytes of tensors per row."""
    model = exact(0.0, 1e-9, 1e9, 4e9)
    return LossModel(request(**changed), (512, 1024), model, model, model, Line(0.0, 100.0), 0.0)


def step_model(chunk: int | None, **changed: Any) -> StepModel:
    """0.5 s per forward and backward and 2 ms per image; 0.1 s and 1 ms without gradients; 0.25 s update."""
    loss = loss_model(chunk=chunk, encoder="small_cnn", **changed)
    train, encode = exact(0.5, 0.002, 16, 32), exact(0.1, 0.001, 16, 32)
    return StepModel(loss, (16, 32), train, encode, Timing(1, [0.25]), Line(1000.0, 50.0), 0.0)


def test_a_time_without_noise_is_on_the_line_with_the_least_range() -> None:
    found = exact(0.0, 2.0).at(100.0)
    assert found == pytest.approx((200.0, 170.0, 230.0))
    assert exact(0.0, 2.0).at(100.0, slower=0.5) == pytest.approx((200.0, 170.0, 300.0))
    # A fixed part that could also be noise: the proportional line is in the range.
    assert exact(10.0, 2.0).at(100.0) == pytest.approx((210.0, 178.5, 450.0))


def test_noise_widens_the_range_and_one_outlier_does_not() -> None:
    noisy = TimeModel(Timing(1, [1.0, 1.0, 1.4, 1.4, 1.4]), Timing(4, [4.0, 4.0, 4.0, 4.8, 4.8])).at(100.0)
    # From quartiles (1.4 or 1) and (4 or 4.8), the median line is through 1.4 and 4.
    assert noisy.seconds == pytest.approx(4.0 + 96 * (4.0 - 1.4) / 3)
    assert noisy.high == pytest.approx(4.8 / 4 * 100)
    assert noisy.low <= 0.85 * noisy.seconds
    steady = TimeModel(Timing(1, [1.0] * 5), Timing(4, [4.0] * 4 + [400.0])).at(100.0)
    assert steady == pytest.approx((100.0, 85.0, 115.0))


def test_estimates_add_up() -> None:
    assert Estimate(1.0, 0.5, 2.0).plus(Estimate(10.0, 9.0, 11.0)) == Estimate(11.0, 9.5, 13.0)
    assert Estimate(1.0, 0.5, 2.0).times(4) == Estimate(4.0, 2.0, 8.0)


def test_time_of_a_step_is_that_of_its_chunks() -> None:
    pairs = 4.0 * 4096**2 * 64 * 1e-9
    assert step_model(None).seconds(4096).seconds == pytest.approx(0.5 + 0.002 * 4096 + 0.25 + pairs)
    a_chunk = 0.5 + 0.002 * 128 + 0.1 + 0.001 * 128
    assert step_model(128).seconds(4096).seconds == pytest.approx(32 * a_chunk + 0.25 + pairs)
    single = 0.5 + 0.002 * 128 + 0.25 + 4.0 * 128**2 * 64 * 1e-9
    assert step_model(128).seconds(128).seconds == pytest.approx(single)  # one chunk is encoded once
    without, within = step_model(None).seconds(4096), step_model(None).seconds(16)
    assert without.high / without.seconds > 1.2 > within.high / within.seconds


def test_memory_of_a_step_is_that_of_a_chunk_and_of_all_rows() -> None:
    image, row = 12 * 32**2 + 16, 64 * 4 + 16
    assert step_model(None).needed_bytes(1000) == pytest.approx(1000 + 1000 * (50 + image))
    rows = 1000 * (100 + row + image)
    assert step_model(128).needed_bytes(1000) == pytest.approx(1000 + 50 * 128 + rows)


def test_the_first_long_step() -> None:
    assert first_long(lambda n: 0.01 * n, 256) == 8
    assert first_long(lambda n: 0.001 * n, 256) == 128
    assert first_long(lambda n: 0.0, 100) == 64
    assert first_long(lambda n: 0.0, 5) == 5


@pytest.mark.parametrize(
    ("seconds", "memory", "expected", "limit"),
    [(60.0, 2**30, int(math.sqrt(60e9 / (4 * 64))) // 2 * 2, "time"), (1e9, 372_000, 1000, "memory")],
)
def test_largest_batch_within_time_and_memory(
    seconds: float, memory: int, expected: int, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 4 N^2 D operations at 1 GFLOP/s; 100 bytes of tensors and 272 bytes of inputs per row.
    asked = request(n=None, step_seconds=seconds, memory=memory)
    model = replace(loss_model(), request=asked)
    monkeypatch.setattr("pysupcon.profiling.run.calibrate_loss", lambda given: model)
    report = run_profile(asked)
    largest = report.loss.largest
    assert largest.rows_in_limits == expected
    assert report.loss.measured is None
    low, high = largest.rows_in_time_range or (0, 0)
    assert low < (largest.rows_in_time or 0) < high
    assert low == pytest.approx((largest.rows_in_time or 0) / math.sqrt(1.15), rel=1e-3)
    output = format_report(report)
    assert f"N={expected:,}" in output
    assert f"largest batch in both: {expected:,} rows, limited by the {limit}" in output


def test_a_limit_with_n_is_searched_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--n", "256", "--predict", "--step-seconds", "60", "--memory", "0.001", "--device", "cpu"]
    assert profile.main([*arguments, "--output", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "N=256" in output
    assert "largest batch in 1.024 MiB of memory" in output
    assert "limited by the memory" in output
    found = json.loads((tmp_path / "profile.json").read_text(encoding="utf-8"))["loss"]["largest"]
    assert 0 < found["rows"] < 4096 < found["rows_in_time"]


def test_a_real_step_is_predicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "CALIBRATION_SECONDS", 0.2)
    asked = request(n=512, encoder="small_cnn", image_size=16, chunk=64, measure=True, output=tmp_path)
    step = run_profile(asked).step
    assert step is not None
    assert step.measured is not None
    assert 1 / 8 < step.measured.both / step.predicted.both < 8
    low, high = step.predicted_range
    assert low < step.predicted.both < high
    assert 1 / 3 < step.measured.peak_bytes / step.predicted.peak_bytes < 3


def test_blocks_and_workers_follow_the_kernels() -> None:
    assert [block_rows(n, 128, 4) for n in (64, 512, 1024, 2048, 65536)] == [64, 64, 128, 256, 256]
    assert block_rows(65536, 512, 4) == 96
    assert block_rows(65536, 128, 8) == 128
    assert worker_count(2048, 128, 4, 2048**2 / 2, 8) == 4  # 8 blocks: 4 pairs of blocks at a time
    assert worker_count(65536, 128, 4, 65536**2 / 2, 8) == 8
    assert worker_count(256, 4, 4, 256**2 / 2, 8) == 1  # too little work for two
    problem = Problem("supcon", 128, 100, 4, 0.07, 1, "avx512")
    assert problem.fixed
    assert not problem._replace(temperature=0.02).fixed
    assert problem._replace(temperature=0.02).scratch_bytes(4096) > 1.2 * problem.scratch_bytes(4096)
    assert problem._replace(threads=4).scratch_bytes(4096) == 4 * problem.scratch_bytes(4096)


def test_memory_of_the_dense_reference_grows_with_the_pairs() -> None:
    model = calibrate_loss(request(n=512, backend="reference"))
    assert model.peak_bytes(2048) == pytest.approx(16 * model.peak_bytes(512), rel=0.15)


def test_memory_of_tiled_pytorch_includes_its_buffers(tmp_path: Path) -> None:
    loss = run_profile(request(n=2048, backend="tiled", measure=True, output=tmp_path)).loss
    assert loss.measured is not None
    assert 2 / 3 < loss.measured.peak_bytes / loss.predicted.peak_bytes < 3 / 2


MEASURE = """
import json, os, sys
import torch
from pysupcon.profiling.memory import peak_bytes
from pysupcon.profiling.workload import LossWork, loss_function, unit_rows

def work(loss, n, dim, temperature):
    inputs = unit_rows(n, dim, 100, dtype=torch.float32, device="cpu", seed=0)
    return LossWork(loss_function(loss, temperature), inputs)

work("supcon", 64, 8, 0.1)()
for loss, n, dim, temperature in json.loads(sys.argv[1]):
    if os.fork() == 0:  # a process whose threads have little scratch
        work(loss, 64, 8, temperature)()
        print(peak_bytes(torch.device("cpu"), work(loss, n, dim, temperature), in_use=True), flush=True)
        os._exit(0)
    os.wait()
"""

CASES = [
    ("supcon", 256, 64, 0.07),
    ("supcon", 1024, 128, 0.07),
    ("supcon", 2048, 128, 0.07),
    ("supcon", 2048, 128, 0.02),
    ("supcon", 2048, 512, 0.07),
    ("supcon", 8192, 64, 0.07),
    ("sincere", 2048, 128, 0.07),
    ("sincere", 8192, 64, 0.07),
    ("spread", 2048, 64, 0.07),
    ("cnce", 2048, 128, 0.07),
    ("cnce", 16384, 64, 0.07),
    ("cnce", 65536, 64, 0.07),
    ("cnce", 65536, 16, 0.07),
]


@compiled
@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
def test_predicted_memory_is_that_of_a_new_process() -> None:
    command = [sys.executable, "-c", MEASURE, json.dumps(CASES)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": SEARCHED}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True)
    measured = [int(line) for line in done.stdout.split()]
    isa = str(backends()["cpu"]["isa"])
    for (loss, n, dim, temperature), real in zip(CASES, measured, strict=True):
        asked = request(loss=loss, n=1024, dim=dim, temperature=temperature, backend="cpu")
        kernels = Problem(loss, dim, 100, 4, temperature, 1, isa)
        predicted = calibrate_loss(asked).tensors.at(n) + kernels.values_bytes(n) + kernels.scratch_bytes(n)
        # The system counts resident pages in steps of some ten pages per core.
        assert predicted == pytest.approx(real, abs=0.12 * real + 128 * 1024), (loss, n, dim, temperature)
