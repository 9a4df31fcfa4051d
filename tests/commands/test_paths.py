"""Paths that the file system refuses: one line on stderr that names the path, from every command."""

from __future__ import annotations

from pathlib import Path

import pytest

from pysupcon.__main__ import main
from pysupcon.train import main as train

LONG = "x" * 256


@pytest.mark.parametrize(
    "command",
    [
        f"evaluate {LONG}",
        f"export {LONG} --output out",
        f"compare {LONG} {LONG}",
        f"transfer {LONG} --data.dataset digits",
        f"concatenate {LONG} {LONG} --output out",
        f"infer-groups {LONG} --output out",
        f"circle --steps 1 --alphas [0.5] --temperatures [0.1] --progress false --output {LONG}",
        "circle --steps 1 --alphas [0.5] --temperatures [0.1] --progress false --output file",
        f"profile --n 64 --dim 4 --predict --output {LONG}",
    ],
)
def test_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    assert main(command.split()) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"pysupcon {command.split()[0]}: ")
    assert error.count("\n") == 1
    assert LONG in error or "file: File exists" in error


@pytest.mark.parametrize("field", ["output_dir", "data.root", "config"])
def test_a_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], field: str
) -> None:
    monkeypatch.chdir(tmp_path)
    dataset = "--data.dataset mnist" if field == "data.root" else "--data.dataset digits"
    assert train([*dataset.split(), "--trainer.cpu", "true", f"--{field}", LONG]) in (1, 2)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if LONG in line]
    assert line.startswith("train.py: error: ")
    assert "File name too long" in line
