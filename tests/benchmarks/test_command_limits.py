"""benchmarks/processes.py: commands and all of their processes end at the time limit."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
from helpers.stubborn_processes import STUBBORN_CHILDREN, is_running, printed_pids

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import processes  # noqa: E402

PYTHON = sys.executable


def _command(tmp_path: Path, seconds: float, program: str) -> processes.Command:
    return processes.Command([PYTHON, "-u", "-c", program], seconds, tmp_path / "log.txt", {})


def _run(tmp_path: Path, seconds: float, program: str) -> processes.Finished:
    (ended,) = processes.run([_command(tmp_path, seconds, program)], tmp_path)
    return ended


def test_a_command_that_ends_by_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = _run(tmp_path, 60, "print('hello')")
    assert (good.exit_status, good.timed_out, good.tail) == (0, False, "hello\n")
    assert capsys.readouterr().out == "hello\n"
    bad = _run(tmp_path, 60, "raise SystemExit(3)")
    assert (bad.exit_status, bad.timed_out) == (3, False)
    missing = processes.run([processes.Command(["/no/such/program"], 9, tmp_path / "log", {})], tmp_path)[0]
    assert missing.exit_status is None
    assert "FileNotFoundError" in missing.tail


def test_a_limit_interrupts_first(tmp_path: Path) -> None:
    program = "import time\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('saved')"
    ended = _run(tmp_path, 10, program)  # time enough for Python to start on a busy machine
    assert ended.timed_out
    assert ended.exit_status == 0
    assert ended.tail == "saved\n"
    assert ended.seconds < 10


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
@pytest.mark.parametrize("hangs", [True, False], ids=["at the limit", "left behind"])
def test_no_grandchild_survives(tmp_path: Path, hangs: bool) -> None:
    ended = _run(tmp_path, 4 if hangs else 60, STUBBORN_CHILDREN + ("time.sleep(600)" if hangs else ""))
    assert ended.timed_out is hangs
    assert ended.seconds < 6
    left = printed_pids(ended.tail)
    assert len(left) == 2
    time.sleep(0.2)
    assert not [pid for pid in left if is_running(pid)]


def test_commands_run_beside_each_other(tmp_path: Path) -> None:
    program = "import time; time.sleep(2)"
    commands = [_command(tmp_path / str(i), 60, program) for i in range(3)]
    start = time.monotonic()
    assert [e.exit_status for e in processes.run(commands, tmp_path)] == [0, 0, 0]
    assert time.monotonic() - start < 5
