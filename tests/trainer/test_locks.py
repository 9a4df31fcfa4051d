"""Trainings do not share a folder: locks on the folder of a run, and their release."""

from __future__ import annotations

import errno
import os
import re
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.training_server import TrainingServer, after_log_lines, start_training_server  # noqa: F401

from pysupcon.config import Config, parse_args
from pysupcon.errors import RunError
from pysupcon.train import EX_TEMPFAIL, main
from pysupcon.trainer import lock
from pysupcon.trainer.folders import lock_run_dir
from pysupcon.trainer.lock import LOCK_FILE, FolderInUse, FolderLock
from pysupcon.trainer.loop import train
from pysupcon.trainer.run import CONFIG_FILE, read_log

ENDLESS = ("--trainer.epochs", "100000", "--trainer.best_by", "null")


def arguments(folder: Path | None, *more: str) -> list[str]:
    fixed = (
        "--data.dataset digits --data.augmentation none --data.batch_size 128 --trainer.threads 1 "
        "--evaluate false --trainer.cpu true --model.width 4"
    )
    return [*fixed.split(), *(("--output_dir", str(folder)) if folder else ()), *more]


def config(folder: Path | None, *more: str) -> Config:
    return parse_args(arguments(folder, *more))[0]


def in_fork(act: Callable[[], None]) -> int:
    """Run ``act``, which must not use torch, in a forked process; return the process id."""
    pid = os.fork()
    if pid == 0:
        try:
            act()
        finally:
            os._exit(99)
    return pid


def test_runs_started_at_once_get_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each process holds its folder until all have chosen, like trainings that have not yet written a
    file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/name/checkpoints").mkdir(parents=True)
    chosen = config(None)
    go_read, go_write = os.pipe()
    end_read, end_write = os.pipe()
    told_read, told_write = os.pipe()

    def choose() -> None:
        os.read(go_read, 1)
        folder = lock_run_dir(chosen, "name").folder
        os.write(told_write, f"{folder}\n".encode())
        os.read(end_read, 1)
        os._exit(0)

    pids = [in_fork(choose) for _ in range(8)]
    os.write(go_write, b"x" * len(pids))
    folders = b""
    while folders.count(b"\n") < len(pids):
        folders += os.read(told_read, 4096)
    assert sorted(folders.decode().split()) == [f"runs/name-{number}" for number in range(2, 10)]
    os.write(end_write, b"x" * len(pids))
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0] * len(pids)
    for descriptor in (go_read, go_write, end_read, end_write, told_read, told_write):
        os.close(descriptor)


@pytest.mark.parametrize("resume", ["auto", "latest", "null"])
def test_a_folder_in_use_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], resume: str) -> None:
    """One line that names the holder, exit status 2, and nothing is changed."""
    folder = tmp_path / "run"
    with FolderLock(folder):
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        assert main(arguments(folder, "--resume_from_checkpoint", resume)) == 2
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    assert re.fullmatch(
        rf"train.py: error: {folder} is in use by process {os.getpid()} on {re.escape(socket.gethostname())}"
        r", started \d{4}-\d\d-\d\d \d\d:\d\d:\d\d: wait until it ends",
        printed.strip().splitlines()[-1],
    )
    assert not folder.exists(), "the lock created it, and nothing was written"


def test_a_second_training_leaves_the_first_untouched(server: TrainingServer, tmp_path: Path) -> None:
    """A resumed training is refused, with one process or two, and the holder's files stay its own."""
    folder = tmp_path / "run"
    refused: list[str] = []

    def resume() -> None:
        try:
            for which in ("auto", str(folder / "checkpoints/step_00000010")):
                with pytest.raises(FolderInUse) as told:
                    train(config(folder, "--resume_from_checkpoint", which, "--seed", "3"))
                refused.append(str(told.value))
        finally:
            os.kill(server.pid(0), signal.SIGTERM)

    thread = after_log_lines(folder, 12, resume)
    assert server.run(arguments(folder, *ENDLESS)) == EX_TEMPFAIL, server.output()
    thread.join()
    assert len(refused) == 2
    assert f"in use by process {server.pid(0)} on " in refused[0]
    steps = [line["step"] for line in read_log(folder / "log.jsonl")]
    assert steps == list(range(1, len(steps) + 1))
    assert "seed: 0" in (folder / CONFIG_FILE).read_text()
    assert not (folder / LOCK_FILE).exists()


def test_all_processes_are_refused_together(server: TrainingServer, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with FolderLock(folder):
        assert server.run(arguments(folder, "--loss.gather", "true"), processes=2) == 2
    assert server.output().count(f"train.py: error: {folder} is in use by process {os.getpid()} on ") == 1
    assert "Traceback" not in server.output()


def test_a_killed_training_frees_its_folder(server: TrainingServer, tmp_path: Path) -> None:
    """Also the folder of a training with DataLoader workers, which outlive it for some seconds."""
    folder = tmp_path / "run"
    thread = after_log_lines(folder, 12, lambda: os.kill(server.pid(0), signal.SIGKILL))
    assert server.run(arguments(folder, *ENDLESS, "--data.workers", "2")) == -signal.SIGKILL
    thread.join()
    assert f"process {server.pid(0)} on " in (folder / LOCK_FILE).read_text()
    last = read_log(folder / "log.jsonl")[-1]["step"]
    train(config(folder, "--resume_from_checkpoint", "latest", "--trainer.epochs", str(last // 10 + 1)))
    assert not (folder / LOCK_FILE).exists()


def test_a_fork_does_not_keep_the_lock(tmp_path: Path) -> None:
    """The holder dies without a release, and its child lives on."""
    held = FolderLock(tmp_path)
    runs_read, runs_write = os.pipe()

    def live() -> None:
        os.write(runs_write, b"x")
        time.sleep(600)

    pid = in_fork(live)
    try:
        os.read(runs_read, 1)
        lock._held.discard(held._descriptor)
        os.close(held._descriptor)
        FolderLock(tmp_path).release()
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(runs_read)
        os.close(runs_write)


def test_a_lock_file_of_another_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The folder is taken over, and a line says whose it was. Control characters are not printed."""
    (tmp_path / LOCK_FILE).write_text("process 7 on \x1b[31mother, started 2020-01-01 00:00:00\nmore")
    with FolderLock(tmp_path):
        assert (tmp_path / LOCK_FILE).read_text().startswith(f"process {os.getpid()} on ")
    printed = capsys.readouterr().err
    assert f"{tmp_path} was in use by process 7 on [31mother, started 2020-01-01 00:00:00. It is" in printed
    (tmp_path / LOCK_FILE).write_bytes(b"\xff\0" * 5000)
    with FolderLock(tmp_path), pytest.raises(FolderInUse, match=f"by process {os.getpid()} on "):
        FolderLock(tmp_path)


@pytest.mark.parametrize(
    "number", [errno.ENOLCK, errno.EOPNOTSUPP, None], ids=["ENOLCK", "EOPNOTSUPP", "none"]
)
def test_without_flock_a_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int | None
) -> None:
    """The training goes on; a new folder is still created by one process only."""

    class NoLocks:
        LOCK_EX = LOCK_NB = 0

        @staticmethod
        def flock(_: int, __: int) -> None:
            assert number is not None
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(lock, "fcntl", None if number is None else NoLocks)
    monkeypatch.chdir(tmp_path)
    first, second = (lock_run_dir(config(None), "name") for _ in range(2))
    assert [str(found.folder) for found in (first, second)] == ["runs/name", "runs/name-2"]
    assert not first.exclusive
    reason = "this system has no flock" if number is None else f"flock: {os.strerror(number)}"
    assert f"runs/name cannot be locked ({reason}): make sure that no other" in capsys.readouterr().err
    first.release()
    second.release()


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    """A name of 256 characters, a file in the way, a loop of links, a null character."""
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for folder, message in (
        ("x" * 256, "File name too long"),
        ("file", "Not a directory"),
        ("file/run", "Not a directory"),
        ("loop", "Too many levels"),
        ("a\0b", "null"),
    ):
        with pytest.raises(RunError, match=f"^the folder of the run, .* cannot be used: .*{message}") as told:
            train(config(tmp_path / folder))
        assert "\n" not in str(told.value)
    with pytest.raises(RunError, match="File name too long"):
        train(config(None), name="x" * 256)


def test_a_lock_that_is_no_file(tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).mkdir()
    with pytest.raises(RunError, match=f"cannot be used: .*{LOCK_FILE}"):
        train(config(tmp_path))
