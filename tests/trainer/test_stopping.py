"""Ctrl-C, and starts that fail: what is printed, and what stays on disk."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.training_server import TrainingServer, after_log_lines, start_training_server  # noqa: F401

from pysupcon import config as config_module
from pysupcon import train
from pysupcon.config import Config, parse_args
from pysupcon.errors import ConfigError, RunError
from pysupcon.evaluation import evaluate
from pysupcon.trainer import loop, stop
from pysupcon.trainer.checkpoint import checkpoints, read_manifest
from pysupcon.trainer.run import read_log
from pysupcon.trainer.stop import StopRequests


def arguments(output_dir: Path | None, *more: str) -> list[str]:
    fixed = "--data.dataset digits --data.augmentation weak --data.batch_size 128 --model.width 8"
    fixed += " --trainer.epochs 1 --trainer.threads 1 --evaluate false --trainer.cpu true"
    where = [] if output_dir is None else ["--output_dir", str(output_dir)]
    return [*fixed.split(), *where, *more]


def tiny(output_dir: Path | None, *more: str) -> Config:
    return parse_args(arguments(output_dir, *more))[0]


# --- Ctrl-C


def test_ctrl_c_saves_and_stops(tmp_path: Path, server: TrainingServer) -> None:
    folder = tmp_path / "run"
    sender = after_log_lines(folder, 3, lambda: os.kill(server.pid(0), signal.SIGINT))
    status = server.run(arguments(folder, "--trainer.epochs", "1000"))
    sender.join()
    said = server.output()
    assert status == train.EX_TEMPFAIL, said
    assert "Traceback" not in said
    (line,) = [line for line in said.splitlines() if "train.py:" in line]
    step = read_manifest(checkpoints(folder)[-1])["step"]
    assert f"train.py: stopped by Ctrl-C (SIGINT) after step {step} of 10000; checkpoint" in line
    assert line.endswith(f"resume with --resume_from_checkpoint latest --output_dir {folder}")
    assert len(read_log(folder / "log.jsonl")) == step >= 3


def in_child(action: Callable[[], None]) -> int:
    """Exit status of a forked process that calls ``action``; negative for a signal."""
    pid = os.fork()
    if pid == 0:
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            action()
            os._exit(0)
        finally:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize(("repeated", "status"), [(-1.0, -signal.SIGINT), (1e9, 0)])
def test_a_second_ctrl_c_ends_the_process(
    monkeypatch: pytest.MonkeyPatch, repeated: float, status: int
) -> None:
    """Unless it arrives so soon that a launcher has repeated the first one."""
    monkeypatch.setattr(stop, "REPEATED", repeated)

    def interrupt_twice() -> None:
        with StopRequests(None) as requests:
            os.kill(os.getpid(), signal.SIGINT)
            assert requests.reason == "Ctrl-C (SIGINT)"
            os.kill(os.getpid(), signal.SIGINT)

    assert in_child(interrupt_twice) == status


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    def interrupt() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with StopRequests(None) as requests:
            os.kill(os.getpid(), signal.SIGINT)
            assert requests.reason is None

    assert in_child(interrupt) == 0


def test_a_slow_step_is_announced(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stop, "DELAY", 0.0)
    requests = StopRequests(None)
    requests._record(signal.SIGINT, None)
    assert requests._notice is not None
    requests._notice.join()
    assert "a second Ctrl-C stops at once" in capsys.readouterr().err


def raise_interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_ctrl_c_outside_of_the_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the first step and in the evaluation: one line, and no folder without a step."""
    with monkeypatch.context() as patch:
        patch.setattr(loop, "build_model", raise_interrupt)
        assert train.main(arguments(tmp_path / "run")) == train.EX_INTERRUPTED
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == "train.py: stopped by Ctrl-C (SIGINT) before the first step"
    assert not [line for line in said[:-1] if "train.py" in line or "Traceback" in line]
    assert not (tmp_path / "run").exists()
    with monkeypatch.context() as patch:
        patch.setattr(config_module, "parse_args", lambda *_: (tiny(tmp_path, "--evaluate", "true"), "run"))
        patch.setattr(loop, "train", lambda *_: Path("runs/x"))
        patch.setattr(evaluate, "evaluate_run", raise_interrupt)
        assert train.main([]) == train.EX_INTERRUPTED
    assert "the training is done (runs/x), its evaluation was stopped by Ctrl-C" in capsys.readouterr().err


# --- starts that fail


@pytest.mark.filterwarnings("ignore:.log_with=")
def test_a_missing_tracker_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for trackers in ("[wandb]", "[tensorboard, wandb]"):
        with pytest.raises(ConfigError, match=r"trainer.trackers: wandb is not installed: install it"):
            loop.train(tiny(None, "--trainer.trackers", trackers))
    assert not list((tmp_path / "runs").iterdir())


def test_a_tracker_that_does_not_start_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Any, *_: Any, **__: Any) -> None:
        (tmp_path / "run/tracker").mkdir()
        raise ConnectionError("no\nserver")

    monkeypatch.setattr(loop.Trainer, "_loop", refuse)  # is not reached
    monkeypatch.setattr("accelerate.Accelerator.init_trackers", refuse)
    with pytest.raises(ConfigError, match=r"trainer.trackers: tensorboard does not start: no server"):
        loop.train(tiny(tmp_path / "run", "--trainer.trackers", "[tensorboard]"))
    assert not (tmp_path / "run").exists()


def test_a_model_that_fails_leaves_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in a new folder nor in one that existed before, whose other files stay."""
    build = loop.build_model

    def build_broken(*args: Any) -> Any:
        model = build(*args)

        def fail(*_: Any) -> None:
            raise RunError("shapes do not fit")

        model.register_forward_hook(fail)
        return model

    existing = tmp_path / "existing"
    existing.mkdir()
    (existing / "notes.txt").write_text("mine")
    for folder in (tmp_path / "new", existing):
        with monkeypatch.context() as patch:
            patch.setattr(loop, "build_model", build_broken)
            with pytest.raises(RunError, match="shapes do not fit"):
                loop.train(tiny(folder))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["existing", "notes.txt"]
    loop.train(tiny(existing))
    assert len(read_log(existing / "log.jsonl")) == 10
