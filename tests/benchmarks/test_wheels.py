"""benchmarks/wheels.py: the packages of the trainer that another machine lacks."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import wheels  # noqa: E402


class _Distribution:
    def __init__(self, version: str, *requires: str) -> None:
        self.version, self.requires = version, list(requires)


def _install(monkeypatch: pytest.MonkeyPatch, **packages: _Distribution) -> None:
    def distribution(name: str) -> _Distribution:
        if name not in packages:
            raise metadata.PackageNotFoundError(name)
        return packages[name]

    monkeypatch.setattr(wheels.metadata, "distribution", distribution)


def test_closure_follows_extras_and_markers(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(
        monkeypatch,
        a=_Distribution("1", "B[fast]>=2", "old; python_version < '3.11'", "never; extra == 'other'"),
        b=_Distribution("2", "c", "d; extra == 'fast'"),
        c=_Distribution("3", "a"),  # a circle
        d=_Distribution("4", "e"),
        e=_Distribution("5"),
        old=_Distribution("6"),
    )
    assert wheels.closure(["a"], "3.12") == {"a": "1", "b": "2", "c": "3", "d": "4", "e": "5"}
    assert "old" in wheels.closure(["a"], "3.10")
    assert wheels.closure(["a"], "3.12", frozenset({"b"})) == {"a": "1"}
    with pytest.raises(LookupError, match="f is not installed here"):
        wheels.closure(["f"], "3.12")


def test_the_trainers_own_requirements() -> None:
    names = {wheels.plain(wheels.Requirement(line).name) for line in wheels.training_requirements()}
    assert {"jsonargparse", "accelerate", "timm", "mlxtend"} <= names
    try:
        found = wheels.missing(wheels.HAVE, "3.12")
    except LookupError as error:
        pytest.skip(str(error))
    assert {"jsonargparse", "docstring-parser", "typeshed-client", "mlxtend"} <= set(found)
    assert not {"torch", "numpy", "scipy", "accelerate", "huggingface-hub"} & set(found)
    bare = wheels.missing(["torch", "numpy"], "3.12")
    assert {"accelerate", "scikit-learn", *found} <= set(bare)
    assert not {"torch", "numpy", "sympy"} & set(bare)


def test_download_names_sizes_and_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commands: list[Sequence[str]] = []

    def pip(command: Sequence[str]) -> Any:
        commands.append(command)
        (tmp_path / "jsonargparse-4.53.0-py3-none-any.whl").write_bytes(b"x" * 180_000)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(wheels, "missing", lambda have, python: {"jsonargparse": "4.53.0"})
    monkeypatch.setattr(wheels.subprocess, "run", pip)
    assert wheels.main(["--python", "3.12", "--out", str(tmp_path)]) == 0
    (command,) = commands
    assert list(command[1:6]) == ["-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    assert command[command.index("--python-version") + 1] == "3.12"
    assert command[-1] == "jsonargparse"
    printed = capsys.readouterr().out
    assert "0.18 MB  jsonargparse-4.53.0-py3-none-any.whl" in printed
    assert f"pip install --no-index --no-deps --target carried {tmp_path}/*.whl" in printed


def test_nothing_is_downloaded_without_a_folder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(wheels, "download", lambda *_: pytest.fail("downloaded"))
    monkeypatch.setattr(wheels, "missing", lambda have, python: {"a": "1.0"} if "torch" in have else {})
    assert wheels.main([]) == 0
    assert wheels.main(["--have"]) == 0
    assert capsys.readouterr().out == "a==1.0\nnothing is missing\n"
