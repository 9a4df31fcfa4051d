"""benchmarks/matrix.py: the pairs, the constraints of their environments and the evaluation of results."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import matrix


def test_pairs_come_from_the_project_files(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text('dependencies = ["torch>=2.11", "numpy>=1.26"]\n')
    (tmp_path / "constraints.txt").write_text("torchmetrics==1.9.0\ntorch==2.14.1\ntorchvision==0.29.1\n")
    assert matrix.torch_versions(tmp_path) == ("2.11.0", *matrix.BETWEEN, "2.14.1")
    pairs = matrix.all_pairs(tmp_path)
    assert (pairs[0], pairs[-1], len(pairs)) == ("3.10:2.11.0", "3.13:2.14.1", 4 * 3)
    (tmp_path / "constraints.txt").write_text("numpy==2.4.6\n")
    with pytest.raises(LookupError, match=r"constraints.txt torch==VERSION"):
        matrix.torch_versions(tmp_path)


def test_the_makefile_names_the_oldest_pair() -> None:
    assert f"--pairs {matrix.all_pairs()[0]} " in (matrix.ROOT / "Makefile").read_text(encoding="utf-8")


def test_what_follows_torch_is_not_constrained() -> None:
    lines = ["torch==2.14.1", "torchvision==0.29.1", "torchmetrics==1.9.0", "nvidia-cublas==13.1.1.3",
             "triton==3.8.0", 'cuda-bindings==13.5.0; python_version >= "3.11"', "pytest==9.2.0"]  # fmt: skip
    assert matrix.constraints("\n".join(lines)).split() == ["torchmetrics==1.9.0", "pytest==9.2.0"]


def test_a_missing_python_and_a_failed_step_stop_a_pair(tmp_path: Path) -> None:
    with pytest.raises(matrix.PairError, match=r"no python3\.99"):
        matrix.find_python("3.99")
    code = "import sys; print('the reason'); sys.exit(3)"
    with pytest.raises(matrix.PairError, match="build: the reason"):
        matrix.run([sys.executable, "-c", code], tmp_path / "log.txt", "build")


def test_counts_and_verdicts(tmp_path: Path) -> None:
    report = tmp_path / "tests.xml"
    report.write_text('<testsuites><testsuite tests="9" failures="1" errors="1" skipped="3"/></testsuites>')
    result = matrix.Result("3.10", "2.11.0", built=True, imported=True)
    assert not result.succeeded  # no test has passed
    matrix.count(report, result)
    assert (result.passed, result.failed, result.skipped, result.succeeded) == (4, 2, 3, False)
    result.failed = 0
    assert result.succeeded
    assert matrix.table([result]).endswith("| 3.10 | 2.11.0 | yes | yes | 4 | 0 | 3 | 0.0 |")
    result.error = "pip: no such version"
    assert not result.succeeded
    assert matrix.table([result]).endswith("0.0 (pip: no such version) |")
