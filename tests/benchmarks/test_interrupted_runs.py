"""benchmarks/kernels/run.py keeps its results after failures and interruptions."""

from __future__ import annotations

import json
import os
import signal
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import fault_tolerance  # noqa: E402
from benchmarks.kernels import cases, peers, run  # noqa: E402
from pysupcon.profiling.workload import Inputs  # noqa: E402


def _run_with(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, loss: Any, *more: str
) -> tuple[int, dict[str, Any]]:
    """Exit status and JSON of run.py with ``loss`` as the implementation ``name``."""
    monkeypatch.setitem(peers.PEERS, name, replace(peers.PEERS[name], build=lambda problem: loss))
    path = tmp_path / "r.json"
    arguments = [
        "--sizes",
        "256",
        "--seconds",
        "0.05",
        "--implementations",
        "pysupcon",
        name,
        "tiled",
        *more,
        "--json",
        str(path),
    ]
    status = run.main(arguments)
    return status, json.loads(path.read_text(encoding="utf-8"))


def _rows(stored: dict[str, Any], implementation: str) -> list[dict[str, Any]]:
    return [row for row in stored["rows"] if row["implementation"] == implementation]


def test_an_implementation_that_fails_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It raises during validation, during timing, and for lack of memory."""
    right = peers.PEERS["written"].build(cases.Problem(n=256))
    for call, error, message in (
        (1, ValueError("no such shape\nsecond line"), "ValueError: no such shape"),
        (3, torch.OutOfMemoryError("tried to allocate 20 GiB"), "out of memory: tried to allocate 20 GiB"),
    ):
        calls = []

        def loss(i: Inputs, call: int = call, error: Exception = error, calls: Any = calls) -> torch.Tensor:
            calls.append(0)
            if len(calls) >= call:
                raise error
            return right(i)

        status, stored = _run_with(monkeypatch, tmp_path, "written", loss, "--cases", "small")
        assert status == 1
        assert [row["failed"] for row in _rows(stored, "written")] == [message]
        for name in ("pysupcon", "tiled"):
            assert all(row["both_s"] > 0 for row in _rows(stored, name))
        assert "ended" not in stored


@pytest.mark.parametrize(("number", "call"), [(signal.SIGINT, 1), (signal.SIGTERM, 5)])
def test_a_signal_leaves_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: signal.Signals, call: int
) -> None:
    """The signal arrives in the second of two cases: during validation (call 1) or a repetition (call 5)."""
    right = peers.PEERS["written"].build(cases.Problem(n=256))
    wide: list[int] = []

    def loss(i: Inputs) -> torch.Tensor:
        if i.features.shape[1] == 64:
            wide.append(0)
            if len(wide) == call:
                os.kill(os.getpid(), number)
        return right(i)

    status, stored = _run_with(monkeypatch, tmp_path, "written", loss, "--cases", "small", "dims")
    assert status == 130
    assert stored["ended"] == f"interrupted by {number.name}"
    done = [row for row in stored["rows"] if row["dim"] != 64]
    assert {(row["case"], row["dim"]) for row in done} == {("small", 128), ("dims", 32)}
    assert all(row["both_s"] > 0 for row in done)
    cut = [row for row in stored["rows"] if row["dim"] == 64]
    assert len(cut) == 3
    if call == 1:
        assert all(row["failed"] == f"no time: KeyboardInterrupt: {number.name}" for row in cut)
        assert "loss_error" in cut[0]
    else:
        assert all(row["repetitions"] >= 1 and row["both_s"] > 0 for row in cut)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_lost_device_ends_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """After an illegal address every later CUDA call fails, so the run cannot continue."""
    lost: list[int] = []
    right = peers.PEERS["written"].build(cases.Problem(n=256))

    def loss(i: Inputs) -> torch.Tensor:
        if i.features.shape[1] == 64:
            lost.append(0)
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return right(i)

    def check_device() -> None:
        if lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    # Emulates a lost GPU with tensors on the CPU.
    monkeypatch.setattr(fault_tolerance, "check_device", check_device)
    attempt = fault_tolerance.attempt
    monkeypatch.setattr(fault_tolerance, "attempt", lambda call, device: attempt(call, "cuda"))
    status, stored = _run_with(monkeypatch, tmp_path, "written", loss, "--cases", "dims", "small")
    assert status == 3
    assert stored["ended"].startswith("the GPU is unusable for this process: RuntimeError: CUDA")
    assert len(lost) == 1
    assert {row["dim"] for row in stored["rows"]} == {32, 64}
    assert all(row["both_s"] > 0 for row in stored["rows"] if row["dim"] == 32)
    assert all("illegal memory access" in row["failed"] for row in stored["rows"] if row["dim"] == 64)


def test_a_failed_call_holds_no_memory_when_the_device_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its frames and tensors are freed before the GPU's cache is emptied for the next implementation."""
    kept: list[weakref.ref[torch.Tensor]] = []
    alive: list[torch.Tensor | None] = []

    def call() -> None:
        tensor = torch.ones(3)
        kept.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError("tried to allocate 20 GiB")

    monkeypatch.setattr(fault_tolerance, "check_device", lambda: alive.append(kept[0]()))
    assert fault_tolerance.attempt(call, "cuda") == (None, "out of memory: tried to allocate 20 GiB")
    assert alive == [None]


def test_results_are_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "r.json"
    fault_tolerance.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        fault_tolerance.write_json(path, {"a": object()})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": 1}
    assert [p.name for p in path.parent.iterdir()] == ["r.json"]
