"""The profile command, the profiler ranges of the package, and the recorded steps of a training."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pysupcon import __main__, functional
from pysupcon.commands import profile
from pysupcon.errors import ConfigError
from pysupcon.profiling.cost import MOST_ROWS, Line, largest_dense_rows, largest_rows, loss_flops
from pysupcon.profiling.memory import available_bytes, peak_bytes, resident_bytes
from pysupcon.profiling.picture import draw_memory, read_allocated
from pysupcon.profiling.recorder import allocated_peak, recorded, write_record
from pysupcon.profiling.workload import LOSSES, LossWork, loss_function, unit_rows
from pysupcon.ranges import named, region

CPU = torch.device("cpu")
MIB = 2**20


def profiled(folder: Path, *arguments: str) -> dict[str, Any]:
    assert profile.main([*arguments, "--device", "cpu", "--output", str(folder)]) == 0
    found: dict[str, Any] = json.loads((folder / profile.RESULT_FILE).read_text(encoding="utf-8"))
    return found


def names_in(trace: Path) -> set[str]:
    return {event.get("name", "") for event in json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]}


def test_profile_of_a_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["profile", "--n", "2048", "--dim", "64", "--device", "cpu", "--output", str(tmp_path)]
    assert __main__.main(arguments) == 0
    output = capsys.readouterr().out
    for word in (
        "supcon, N=2,048, D=64",
        "predicted",
        "measured",
        "peak memory",
        "pysupcon::pair_stats_backward",
    ):
        assert word in output
    found = json.loads((tmp_path / "profile.json").read_text(encoding="utf-8"))["loss"]
    gradient = 2048 * 64 * 4
    for cost in (found["predicted"], found["measured"]):
        assert 0 < cost["forward"] < 60
        assert gradient / 2 < cost["peak_bytes"] < 20 * gradient
    assert {"pysupcon::loss", "pysupcon::pair_stats"} <= names_in(tmp_path / "loss" / "trace.json")
    assert (tmp_path / "loss" / "memory.png").read_bytes().startswith(b"\x89PNG")
    assert "pysupcon::pair_stats" in (tmp_path / "loss" / "operators.txt").read_text(encoding="utf-8")
    largest = found["largest"]
    assert largest["rows"] > largest["dense_rows"] > 2048
    # A row's memory includes its label and sample id; the dense loss stores several float32 matrices.
    assert largest["bytes_a_row"] > 64 * 4 + 16
    assert 8 < largest["dense_bytes_a_pair"] < 100
    assert f"{largest['rows']:,} rows" in output


@pytest.mark.parametrize("chunk", [None, "8"])
def test_profile_of_a_step(tmp_path: Path, chunk: str | None) -> None:
    arguments = [
        "--n",
        "128",
        "--dim",
        "16",
        "--encoder",
        "small_cnn",
        "--image-size",
        "8",
        "--loss",
        "spread",
    ]
    chunks = [] if chunk is None else ["--chunk", chunk]
    found = profiled(tmp_path, *arguments, *chunks)["step"]
    assert 0 < found["measured"]["both"] < 60
    assert found["measured"]["peak_bytes"] > 0
    assert found["recorded_rows"] == (128 if chunk is None else 64)
    names = names_in(tmp_path / "step" / "trace.json")
    assert {"encoder", "optimizer", "pysupcon::loss"} <= names
    events = json.loads((tmp_path / "step" / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    passes = sum(event.get("name") == "encoder" and event.get("cat") == "user_annotation" for event in events)
    assert passes == (1 if chunk is None else 2 * 64 // 8)
    assert (tmp_path / "step" / "memory.png").exists()


def test_predicting_runs_nothing_large(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = profiled(tmp_path, "--n", str(2**34), "--predict", "--loss", "cnce", "--classes", "1000")["loss"]
    assert found["measured"] is None
    assert not (tmp_path / "loss").exists()
    gradient = 2**34 * 128 * 4
    assert gradient < found["predicted"]["peak_bytes"] < 1.5 * gradient
    assert found["calibrated_rows"] == [2048, 4096]
    low, high = found["predicted_range"]
    assert 0 < low <= 0.85 * found["predicted"]["both"] < 1.15 * found["predicted"]["both"] <= high
    output = capsys.readouterr().out
    assert "range" in output
    assert "calibrated on this device with 2,048 and 4,096 rows" in output


def test_only_files_of_this_run_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def listed(*arguments: str) -> set[Path]:
        profiled(tmp_path, "--n", "256", "--dim", "8", *arguments)
        last = capsys.readouterr().out.strip().splitlines()[-1]
        return {Path(name) for name in last.removeprefix("written: ").split(", ")}

    every = {path for path in listed() if path.is_file()}
    assert every == {path for path in tmp_path.rglob("*") if path.is_file()}
    assert len(every) == 4
    assert listed("--predict") == {tmp_path / profile.RESULT_FILE}


def test_problems_that_do_not_fit_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--n", str(2**34), "--device", "cpu", "--output", str(tmp_path)]
    assert profile.main(arguments) == 2
    assert "GiB by prediction" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--n", "63"], "--n must be a multiple of 8 and at least 64, got 63"),
        (["--n", "64", "--dim", "0"], "--dim must be at least 1, got 0"),
        (["--n", "64", "--chunk", "8"], "--chunk needs --encoder"),
        (["--n", "64", "--image-size", "8"], "--image-size needs --encoder"),
        (["--n", "64", "--temperature", "0"], "--temperature must be greater than 0, got 0.0"),
        (["--n", "64", "--encoder", "small_cnn", "--dtype", "bfloat16"], "--dtype must be float32"),
        (["--n", "64", "--device", "nowhere"], "--device nowhere cannot be used"),
        (["--n", "64", "--encoder", "resnot18"], "model.backbone must be small_cnn, a timm model"),
        (["--n", "64", "--encoder", "small_cnn", "--chunk", "65"], "--chunk must be at most --n=64, got 65"),
        (["--predict"], "--n must be given, or a limit to search it: --step-seconds, --memory, or both"),
        (["--step-seconds", "0"], "--step-seconds must be finite and greater than 0, got 0.0"),
        (["--n", "64", "--memory", "inf"], "--memory must be finite and greater than 0, got inf"),
        (["--step-seconds", "1e-9"], "no batch of 64 rows fits within --step-seconds 1e-09 and"),
    ],
)
def test_invalid_arguments(
    arguments: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    device = [] if "--device" in arguments else ["--device", "cpu"]
    assert profile.main([*arguments, *device, "--output", str(tmp_path)]) == 2
    assert text in capsys.readouterr().err


def test_backend_has_an_effect(tmp_path: Path) -> None:
    profiled(tmp_path, "--n", "256", "--backend", "tiled")
    names = names_in(tmp_path / "loss" / "trace.json")
    assert "pysupcon::loss" in names
    assert "pysupcon::pair_stats" not in names


def test_peak_of_work_is_what_it_allocates() -> None:
    def work() -> None:
        torch.ones(64 * MIB, dtype=torch.uint8)
        torch.ones(48 * MIB, dtype=torch.uint8)

    assert peak_bytes(CPU, work) == pytest.approx(64 * MIB, rel=0.1)
    assert peak_bytes(CPU, work) == pytest.approx(64 * MIB, rel=0.1)  # the freed blocks are counted again
    assert peak_bytes(CPU, lambda: None) < MIB
    assert resident_bytes("VmHWM") >= resident_bytes() > MIB
    assert available_bytes(CPU) > MIB


def test_peak_without_a_mark_to_reset(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("pysupcon.profiling.memory._REFERENCES", tmp_path)  # a folder cannot be written to

    def work() -> None:
        block = torch.ones(16 * MIB)
        for _ in range(4):
            block.sum()

    assert peak_bytes(CPU, work) == pytest.approx(64 * MIB, rel=0.1)


def test_allocated_peak_is_exact_where_resident_memory_is_not() -> None:
    def work() -> None:
        first = torch.ones(300_000, dtype=torch.uint8)
        torch.ones(100_000, dtype=torch.uint8)
        del first
        torch.ones(200_000, dtype=torch.uint8)

    assert allocated_peak(CPU, work) == pytest.approx(400_000, abs=1000)


def _no_growth(device: torch.device, work: Callable[[], object], *, in_use: bool = False) -> int:
    work()
    return 0


def test_a_measured_peak_is_never_below_what_torch_allocates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pysupcon.profiling.run.peak_bytes", _no_growth)
    found = profiled(tmp_path, "--n", "2048", "--dim", "64", "--backend", "tiled")["loss"]
    inputs = unit_rows(2048, 64, 100, dtype=torch.float32, device=CPU, seed=0)
    allocated = allocated_peak(CPU, LossWork(loss_function("supcon", 0.07, "tiled"), inputs))
    assert found["measured"]["peak_bytes"] == pytest.approx(allocated, rel=0.05)


def test_lines() -> None:
    assert Line.through((1, 5), (3, 9)) == (3.0, 2.0)
    assert Line.through((1, 5), (3, 9)).at(10) == 23.0
    assert Line.through((1, 1), (2, 3)) == (0.0, 1.5)  # not below 0 at 0
    assert Line.through((1, 4), (2, 3)) == (0.0, 1.5)  # noise must not fall with size
    assert largest_rows(1000.0, Line(100.0, 9.0).at) == 100
    assert largest_rows(1000.0, Line(100.0, 9.0).at, 8) == 96
    assert largest_rows(50.0, Line(100.0, 6.0).at) == 0
    assert largest_rows(1.0, lambda n: 0.0) == MOST_ROWS
    assert largest_dense_rows(4.0 * 100**2, 4.0) == 100


def test_work_of_the_losses() -> None:
    whole = 4.0 * 1000**2 * 64
    assert loss_flops("supcon", 1000, 64, 10) == whole
    assert loss_flops("cnce", 1000, 64, 10) == pytest.approx(whole / 10)
    assert loss_flops("sincere", 1000, 64, 10) == pytest.approx(whole * 1.1)
    assert loss_flops("eps_supinfonce", 1000, 64, 10) == pytest.approx(whole * 1.1)
    assert loss_flops("spread", 1000, 64, 10) == loss_flops("dcl", 1000, 64, 10) == whole


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_can_be_profiled(loss: str) -> None:
    inputs = unit_rows(64, 8, 4, dtype=torch.float64, device="cpu", seed=0)
    ours = loss_function(loss, 0.1)(inputs)
    dense = loss_function(loss, 0.1, "reference")(inputs)
    torch.testing.assert_close(ours, dense)
    seconds = LossWork(loss_function(loss, 0.1), inputs).seconds(0.0)
    assert 0 < seconds.forward < seconds.both
    assert math.isclose(seconds.forward + seconds.backward, seconds.both)
    assert inputs.features.grad is None


def test_ranges_are_seen_by_the_profiler() -> None:
    x = torch.randn(16, 4, requires_grad=True)
    with recorded(CPU) as found:
        functional.supcon(x, torch.arange(16) % 3)
        with region("encoder"):
            x.exp()

        @named("optimizer")
        def update(amount: float) -> float:
            """Doc."""
            return amount

        assert update(2.0) == 2.0
        assert update.__doc__ == "Doc."
    keys = [event.key for event in found.key_averages()]
    assert keys.count("pysupcon::loss") == 1
    assert {"encoder", "optimizer"} <= set(keys)


def test_a_range_ends_with_an_error() -> None:
    with recorded(CPU) as found:
        with pytest.raises(ValueError, match="features"):
            functional.supcon(torch.randn(4), torch.zeros(4, dtype=torch.int64))
        torch.ones(3).exp()
    spans = {e.name: e.time_range for e in found.events() if e.name in ("pysupcon::loss", "aten::exp")}
    assert spans["pysupcon::loss"].end <= spans["aten::exp"].start


def test_allocated_memory_is_read_from_a_trace(tmp_path: Path) -> None:
    with recorded(CPU) as found:
        first = torch.empty(4 * MIB, dtype=torch.uint8)
        second = torch.empty(2 * MIB, dtype=torch.uint8)
        del first
        torch.empty(MIB, dtype=torch.uint8)
        del second
    write_record(found, CPU, tmp_path)
    allocated = read_allocated(tmp_path / "trace.json", "cpu")
    large = [round(value / MIB) for value in allocated.bytes if value >= MIB]
    assert large == [4, 6, 2, 3, 2]
    assert allocated.bytes[-1] < MIB
    assert allocated.seconds == sorted(allocated.seconds)
    assert not draw_memory(tmp_path / "trace.json", tmp_path / "none.png", "cuda")
    assert not (tmp_path / "none.png").exists()


def test_training_records_the_requested_steps(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from pysupcon.config import parse_args
    from pysupcon.trainer import loop

    run = tmp_path / "run"
    fixed = "--data.dataset digits --data.augmentation weak --data.batch_size 256 --model.width 8"
    fixed += " --trainer.epochs 1 --trainer.threads 1 --evaluate false --trainer.cpu true"
    config, _ = parse_args([*fixed.split(), "--trainer.profile_steps", "[2]", "--output_dir", str(run)])
    loop.train(config)
    assert [path.name for path in (run / "profile").iterdir()] == ["step-2"]
    names = names_in(run / "profile" / "step-2" / "trace.json")
    assert {"encoder", "optimizer", "pysupcon::loss"} <= names
    late = parse_args(
        [*fixed.split(), "--trainer.profile_steps", "[999]", "--output_dir", str(tmp_path / "b")]
    )
    with pytest.raises(ConfigError, match=r"trainer.profile_steps must end by \d+, got \[999\]"):
        loop.train(late[0])
    assert not (tmp_path / "b").exists()
