"""What an evaluation writes: one at a time, also after a killed one, and on a disk that is full."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.quick_run import train_quickly

from pysupcon.__main__ import main
from pysupcon.errors import ConfigError, RunError
from pysupcon.evaluation import evaluate
from pysupcon.evaluation.evaluate import evaluate_run
from pysupcon.evaluation.pictures import loss_curves
from pysupcon.evaluators import EvaluationConfig, KNNConfig, ProjectionConfig
from pysupcon.trainer.lock import FolderLock

LOCK = ".evaluation.lock"
QUICK = EvaluationConfig(
    evaluators=["knn"], knn=KNNConfig(k=[1]), projection=ProjectionConfig(method="pca"), progress=False
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_quickly(tmp_path_factory.mktemp("trained") / "run")


@pytest.fixture
def run_dir(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def test_a_killed_evaluation_is_cleaned_up(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its temporary folder and its lock are gone after the next evaluation."""

    def die(*_: object) -> None:
        with evaluate._temporary_folder(run_dir) as folder:
            (folder / "report.md").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

    pid = os.fork()
    if pid == 0:
        monkeypatch.setattr(evaluate, "_evaluate", die)
        try:
            evaluate_run(run_dir, QUICK)
        finally:
            os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    left = hidden(run_dir)
    assert len(left) == 2
    assert left[0].startswith(".evaluation-")
    assert left[1] == LOCK
    evaluate_run(run_dir, QUICK)
    assert hidden(run_dir) == []
    assert (run_dir / "evaluation/metrics.json").exists()


def test_two_evaluations_do_not_mix(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second is refused before it computes, and leaves the temporary folder of the first."""
    with FolderLock(run_dir, LOCK), evaluate._temporary_folder(run_dir) as folder:
        assert main(["evaluate", str(run_dir)]) == 1
        holder = f"{run_dir} is in use by process {os.getpid()} on {socket.gethostname()}, started "
        assert capsys.readouterr().err.startswith(f"pysupcon evaluate: {holder}")
        assert folder.is_dir()
        with pytest.raises(ConfigError, match="is in use by"):
            evaluate_run(run_dir)
    assert hidden(run_dir) == []


def test_an_evaluation_does_not_disturb_a_training(run_dir: Path) -> None:
    """A resumed training holds another lock; the weights and the config are only read."""
    before = {path.name: path.read_bytes() for path in run_dir.iterdir() if path.is_file()}
    with FolderLock(run_dir):
        evaluate_run(run_dir, QUICK)
    assert {path.name: path.read_bytes() for path in run_dir.iterdir() if path.is_file()} == before


@pytest.mark.parametrize(
    ("file", "number"),
    [("embedding.png", errno.EROFS), ("report.md", errno.EDQUOT), ("metrics.json", errno.ENOSPC)],
)
def test_a_disk_that_cannot_be_written(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], file: str, number: int
) -> None:
    """One line, and the earlier evaluation stays. It would be put aside: it does not tell its weights."""
    (run_dir / "evaluation").mkdir()
    (run_dir / "evaluation/metrics.json").write_text("earlier")
    fault, replace = OSError(number, os.strerror(number)), os.replace

    def failing(source: Path, target: Path) -> None:
        if Path(target).name == file:
            raise fault
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    arguments = "--evaluators [knn] --projection.method pca --progress false"
    assert main(["evaluate", str(run_dir), *arguments.split()]) == 1
    said = f"pysupcon evaluate: {run_dir}/evaluation could not be written: {os.strerror(number)}\n"
    assert capsys.readouterr().err == said
    assert hidden(run_dir) == []
    assert (run_dir / "evaluation/metrics.json").read_text() == "earlier"
    assert not list(run_dir.glob("evaluation-*"))


@pytest.mark.parametrize("limit", [0, 1000])
def test_a_limit_of_file_sizes(run_dir: Path, limit: int) -> None:
    """The operating system refuses to write: nothing at all, or 1,000 bytes of a picture."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        with pytest.raises(RunError, match=rf"^{run_dir}/evaluation could not be written: File too large$"):
            evaluate_run(run_dir, QUICK)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert hidden(run_dir) == []


def test_a_file_in_the_way(run_dir: Path) -> None:
    (run_dir / "evaluation").write_text("")
    with pytest.raises(RunError, match=rf"^{run_dir}/evaluation could not be written: File exists$"):
        evaluate_run(run_dir, QUICK)
    assert hidden(run_dir) == []


@pytest.mark.parametrize("value", ["x", None, [1], {}])
@pytest.mark.parametrize("name", ["step", "loss", "chance"])
def test_a_log_with_a_value_that_is_no_number(name: str, value: object) -> None:
    line = {"step": 1, "loss": 1.0, "contrastive": 1.0, "chance": 1.0} | {name: value}
    if name == "loss":
        line["cross_entropy"] = 1.0  # with a single term the loss is not shown
    with pytest.raises(RunError, match="the log holds a value that is not a number: "):
        loss_curves([line])


@pytest.mark.parametrize("command", ["train", "transfer"])
def test_a_missing_optional_package_is_one_line(command):
    code = (
        "import sys; sys.modules['jsonargparse'] = None; from pysupcon.__main__ import main; "
        f"sys.exit(main([{command!r}, 'run']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "pip install 'pysupcon[train]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1
