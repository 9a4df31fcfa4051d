"""Files of a run that are malformed, although their checksums are right: one line that names them."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.training_server import TrainingServer, start_training_server  # noqa: F401

from pysupcon.config import Config, parse_args
from pysupcon.errors import RunError
from pysupcon.profiling.recorder import StepRecorder
from pysupcon.train import main
from pysupcon.trainer import log
from pysupcon.trainer.checkpoint import checkpoints, read_checkpoint, read_manifest
from pysupcon.trainer.files import check_new_or_empty, write_file
from pysupcon.trainer.loop import train
from pysupcon.trainer.manifest import digest
from pysupcon.trainer.run import load_run, open_run, read_log

Damage = Callable[[dict[str, Any]], object]


def arguments(folder: Path, *more: str) -> list[str]:
    """Ten steps an epoch, one checkpoint per epoch."""
    fixed = (
        "--data.dataset digits --data.augmentation none --data.batch_size 128 --trainer.threads 1 "
        "--evaluate false --trainer.cpu true --model.width 4 --trainer.epochs 2 --trainer.best_by loss "
        "--trainer.keep_checkpoints 2"
    )
    return [*fixed.split(), "--output_dir", str(folder), *more]


def config(folder: Path, *more: str) -> Config:
    return parse_args(arguments(folder, *more))[0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(config(tmp_path_factory.mktemp("whole") / "run"))


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to damage."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


@pytest.fixture
def last(folder: Path) -> Path:
    return folder / "checkpoints/step_00000020"


def sign(path: Path, manifest: Any) -> None:
    """Write a manifest with a right checksum."""
    if isinstance(manifest, dict):
        manifest["sha256"] = digest(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def replace_state(path: Path, name: str, change: Callable[[Any], Any]) -> None:
    """Change training.pt or random.pt, with right checksums."""
    state = torch.load(path / name, weights_only=True)
    changed, buffer = change(state), io.BytesIO()
    torch.save(state if changed is None else changed, buffer)
    manifest = read_manifest(path)
    sha256 = write_file(path / name, buffer.getvalue())
    manifest["files"][name] = {"bytes": len(buffer.getvalue()), "sha256": sha256}
    sign(path, manifest)


def drop(mapping: dict[str, Any], name: str) -> None:
    del mapping[name]


def refusal(folder: Path, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    """The last line of the error of a training that must fail with one line and leave the run as it was."""
    before = {path.name: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert main(arguments(folder, *more)) == 1
    assert {path.name: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    lines = [line for line in printed.splitlines() if line.startswith("train.py: error: ")]
    assert len(lines) == 1
    assert printed.strip().endswith(lines[0]), "the message has one line"
    return lines[0]


MANIFESTS: dict[str, tuple[Damage, str]] = {
    "no files": (lambda m: m.pop("files"), "files must hold an entry for each file, got None"),
    "a list of files": (lambda m: m.update(files=["a"]), "files must hold an entry for each file"),
    "a file without size": (lambda m: m["files"]["training.pt"].pop("bytes"), "must hold bytes and sha256"),
    "a file as a number": (lambda m: m["files"].update(a=3), "must hold bytes and sha256 of 'a', got 3"),
    "a missing file": (lambda m: m["files"].pop("random.pt"), "it lists no random.pt"),
    "a parent folder": (
        lambda m: m["files"].update({"../config.yaml": m["files"]["config.yaml"]}),
        "files must be names within the folder, got '../config.yaml'",
    ),
    "an absolute name": (
        lambda m: m["files"].update({"/etc/passwd": {}}),
        "files must be names within the folder, got '/etc/passwd'",
    ),
    "the folder": (lambda m: m["files"].update({"..": {}}), "files must be names within the folder"),
    "another step": (
        lambda m: m.update(step=10),
        "step is 10, but the name of its folder is step_00000020",
    ),
    "a step as text": (lambda m: m.update(step="20"), "step must be a number of steps, got '20'"),
    "a negative step": (lambda m: m.update(step=-20), "step must be a number of steps, got -20"),
    "no sampler": (lambda m: m.pop("sampler"), "sampler must hold numbers by name, got None"),
    "metrics as text": (lambda m: m.update(metrics={"loss": "x"}), "metrics must hold numbers by name"),
}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_a_malformed_manifest(
    last: Path, folder: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    damage, message = MANIFESTS[kind]
    manifest = read_manifest(last)
    damage(manifest)
    sign(last, manifest)
    said = refusal(folder, capsys, "--resume_from_checkpoint", str(last))
    assert f"{last / 'manifest.json'} is malformed: " in said
    assert message in said
    assert "an earlier checkpoint exists: --resume_from_checkpoint" in said


@pytest.mark.parametrize(
    "content",
    ["[" * 100_000, '{"a":' * 100_000, "[]", "3", "null", '{"step": ' + "9" * 5000 + "}", "\0", ""],
    ids=["deep list", "deep mapping", "list", "number", "null", "long number", "zeros", "empty"],
)
def test_a_manifest_that_is_no_manifest(
    last: Path, folder: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    """The training resumes from the checkpoint before it."""
    (last / "manifest.json").write_text(content)
    assert re.search(
        rf"{last}/manifest.json is missing or damaged: .+",
        refusal(folder, capsys, "--resume_from_checkpoint", str(last)),
    )
    train(config(folder, "--resume_from_checkpoint", "latest", "--trainer.epochs", "2"))
    assert f"rejected: {last}/manifest.json is missing or damaged: " in capsys.readouterr().err
    assert read_checkpoint(last).step == 20


STATES: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "no random states": ("random.pt", lambda s: [], "a list with content was expected"),
    "a mapping of random states": ("random.pt", lambda s: {"a": 1}, "a list with content was expected"),
    "an empty random state": ("random.pt", lambda s: [{}], "KeyError: 'python'"),
    "a random state as a number": ("random.pt", lambda s: [3], "TypeError: "),
    "a short random state": ("random.pt", lambda s: s[0].update(torch=torch.zeros(3)), "does not fit: .+"),
    "Python's random state": ("random.pt", lambda s: s[0].update(python=[3, [1, 2], None]), "state vector"),
    "NumPy's random state": ("random.pt", lambda s: s[0].update(numpy=["MT19937"]), "not enough values"),
    "a list of states": ("training.pt", lambda s: [s], "a dict with content was expected"),
    "no optimizer": ("training.pt", lambda s: {"a": 1}, "KeyError: 'optimizer'"),
    "an empty optimizer": ("training.pt", lambda s: s.update(optimizer={}), "KeyError: 'param_groups'"),
    "an optimizer as text": ("training.pt", lambda s: s.update(optimizer="x"), "does not fit: .+"),
    "no learning rate": (
        "training.pt", lambda s: drop(s["optimizer"]["param_groups"][0], "lr"), "KeyError: 'lr'"
    ),
    "a learning rate as text": (
        "training.pt",
        lambda s: s["optimizer"]["param_groups"][0].update(lr="x"),
        "optimizer/0/lr must be a number, got 'x'",
    ),
    "a state of another shape": (
        "training.pt",
        lambda s: next(iter(s["optimizer"]["state"].values())).update(exp_avg=torch.ones(2, 3, 5, 7)),
        "optimizer state exp_avg of shape .2, 3, 5, 7. does not fit a parameter of shape",
    ),
    "no scheduler": ("training.pt", lambda s: s.update(scheduler=None), "does not fit: .+"),
    "a scheduler without steps": (
        "training.pt", lambda s: drop(s["scheduler"], "last_epoch"), "KeyError: 'last_epoch'"
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", STATES)
def test_a_malformed_state(last: Path, folder: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    name, change, message = STATES[kind]
    replace_state(last, name, change)
    said = refusal(folder, capsys, "--resume_from_checkpoint", str(last))
    assert re.search(f"checkpoint {last} .*{message}", said)


def test_a_malformed_state_of_one_process(
    server: TrainingServer, last: Path, folder: Path, whole: Path
) -> None:
    """All processes end together with one message, although only the second cannot set its state."""
    replace_state(last, "random.pt", lambda states: [*states, {"python": 3}])
    more = ("--resume_from_checkpoint", str(last), "--trainer.epochs", "3")
    assert server.run(arguments(folder, *more), processes=2) == 1
    assert server.output().count(f"train.py: error: checkpoint {last} does not fit: TypeError") == 1
    assert "Traceback" not in server.output()


# --- a checkpoint that is no folder


@pytest.mark.parametrize("kind", ["file", "loop", "link to nothing"])
def test_a_checkpoint_that_is_no_folder(
    last: Path, folder: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """It is refused by name, does not count as a checkpoint, and gives way to the checkpoint of its step."""
    shutil.rmtree(last)
    place = {"file": None, "loop": last, "link to nothing": folder / "nothing"}[kind]
    if place is None:
        last.write_text("")
    else:
        last.symlink_to(place)
    for which in (str(last), str(last / "manifest.json"), "x" * 256, "x/" * 3000):
        said = refusal(folder, capsys, "--resume_from_checkpoint", which)
        assert f"resume_from_checkpoint: {which} is no checkpoint: there is no manifest.json in it" in said
    (folder / "checkpoints/writing_step_00000020").write_text("")
    train(config(folder, "--resume_from_checkpoint", "latest", "--trainer.keep_checkpoints", "1"))
    assert "resuming from" in capsys.readouterr().err
    assert last.is_dir()
    assert not last.is_symlink()
    assert read_checkpoint(last).step == 20
    assert last in checkpoints(folder)
    assert not list(folder.rglob("writing_*"))


def test_a_pipe_does_not_block(last: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("training.pt", "manifest.json"):
        (last / name).unlink()
        os.mkfifo(last / name)
        said = refusal(folder, capsys, "--resume_from_checkpoint", str(last))
        assert str(last) in said
    assert read_checkpoint(folder / "checkpoints/step_00000010").step == 10
    (folder / "log.jsonl").unlink()
    os.mkfifo(folder / "log.jsonl")
    with pytest.raises(RunError, match=r"log.jsonl is missing"):
        load_run(folder).log()


# --- the log


@pytest.mark.parametrize(
    "end",
    [b'{"step": 21, "lo', b'{"step": 21, "lo\n', b"\xff\xfe\n", b"\0" * 100, b"3\n", b"{}\n", b"[" * 100_000],
    ids=["cut", "cut, with a newline", "not UTF-8", "zeros", "a number", "no step", "deep"],
)
def test_the_last_line_of_a_log_does_not_block(folder: Path, whole: Path, end: bytes) -> None:
    path = folder / "log.jsonl"
    path.write_bytes(path.read_bytes() + end)
    train(config(folder, "--resume_from_checkpoint", "latest", "--trainer.epochs", "3"))
    log_ = read_log(path)
    assert [line["step"] for line in log_] == list(range(1, 31))
    assert log_[:20] == read_log(whole / "log.jsonl")


@pytest.mark.parametrize("line", [b"{", b"\xff", b"3", b"[" * 100_000, b'{"step": "a"}'])
def test_a_damaged_line_in_a_log_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str], line: bytes
) -> None:
    path = folder / "log.jsonl"
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([*lines[:4], line, *lines[5:]]) + b"\n")
    said = refusal(folder, capsys, "--resume_from_checkpoint", "latest", "--trainer.epochs", "3")
    assert f"{path}, line 5, is " in said
    if line != b'{"step": "a"}':
        with pytest.raises(RunError, match=rf"^{path}, line 5, is not JSON: .*$"):
            read_log(path)


# --- a disk that is full or read-only


@pytest.mark.parametrize(
    ("place", "number"),
    [
        ("config.yaml", errno.EDQUOT),
        ("log.jsonl", errno.EROFS),
        ("a line", errno.ENOSPC),
        ("model.safetensors", errno.ENOSPC),
    ],
)
def test_a_disk_that_cannot_be_written(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    place: str,
    number: int,
) -> None:
    """At each file that a training writes, apart from checkpoints."""
    fault = OSError(number, os.strerror(number))
    replace, write_line, opened = os.replace, log.StepLog.write, Path.open

    def failing_replace(source: Path, target: Path) -> None:
        if Path(target).parent == tmp_path / "run" and Path(target).name == place:
            raise fault
        replace(source, target)

    def failing_open(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path.name == place == "log.jsonl":
            raise fault
        return opened(path, *args, **kwargs)

    def failing_line(self: log.StepLog, values: dict[str, Any]) -> None:
        if place == "a line" and values["step"] == 4:
            self._file.close()
            self._file = opened(Path("/dev/full"), "a")
        write_line(self, values)

    monkeypatch.setattr(os, "replace", failing_replace)
    monkeypatch.setattr(Path, "open", failing_open)
    monkeypatch.setattr(log.StepLog, "write", failing_line)
    assert main(arguments(tmp_path / "run")) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    reason = os.strerror(number)
    assert said.startswith("train.py: error: ")
    assert str(tmp_path / "run") in said
    assert reason in said
    assert not (tmp_path / "run/.lock").exists()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_log_that_cannot_grow(tmp_path: Path, server: TrainingServer, processes: int) -> None:
    """The disk of the log is full between two checkpoints: all processes end together."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("a small file system needs root and mount")
    made = subprocess.run([mount, "-t", "tmpfs", "-o", "size=32k", "tmpfs", str(place)], capture_output=True)
    if made.returncode != 0:
        pytest.skip("a small file system cannot be mounted here")
    try:
        endless = ("--trainer.epochs", "1000", "--trainer.checkpoint_epochs", "1000", "--loss.gather", "true")
        endless += ("--data.batch_size", "4")  # the disk is full before the first epoch ends
        assert server.run(arguments(place / "run", *endless), processes=processes) == 1
        said = server.output()
    finally:
        subprocess.run(["umount", str(place)], check=True)
    message = f"train.py: error: {place}/run/log.jsonl could not be written: No space left on device\n"
    assert said.count(message) == 1
    assert "Traceback" not in said


def test_a_profile_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "profile").write_text("")
    recorder = StepRecorder([1], tmp_path / "profile", torch.device("cpu"))
    with (
        pytest.raises(RunError, match=rf"^{tmp_path}/profile/step-1 could not be written: .*Not a directory"),
        recorder.step(1),
    ):
        torch.ones(2).sum()


# --- names


def test_names_of_256_characters(tmp_path: Path) -> None:
    name = tmp_path / ("x" * 256)
    for opening in (open_run, load_run):
        with pytest.raises(RunError, match=r"x{256} (must be the folder of a run|holds no run)"):
            opening(name)
    with pytest.raises(RunError, match=r"x{256} cannot be used: File name too long"):
        check_new_or_empty(name)
