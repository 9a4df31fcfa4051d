"""Trainings in processes of their own, for the price of a fork: :class:`Nursery` starts this file, which
imports everything once, then forks for each line on stdin and answers with the exit statuses.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
OK = 0


@pytest.fixture(scope="module", name="nursery")
def start_nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    """To be imported by the modules that use it."""
    made = Nursery(tmp_path_factory.mktemp("nursery"))
    yield made
    made.close()


class Nursery:
    """Runs pysupcon/train.py with given arguments.

    Args:
        folder: for what the trainings say, ``said()``.
    """

    def __init__(self, folder: Path) -> None:
        self.stderr = folder / "stderr.txt"
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=ENVIRONMENT,
        )  # fmt: skip
        assert self._read() == [OK]

    def run(
        self,
        args: list[str],
        *,
        processes: int = 1,
        die_at: int | None = None,
        kill_after: float | None = None,
        environment: dict[str, str] | None = None,
    ) -> int:
        """Exit status, as ``subprocess`` gives it (negative for a signal); the first that is not 0.

        Args:
            args: of the command line.
            processes: of the training, numbered as torchrun does.
            die_at: kill oneself at this dealing with the disk: in the middle of writing a file of a
                checkpoint, before a sync, a rename, a removal.
            kill_after: seconds after which to be killed from outside.
            environment: additions.
        """
        assert self.process.stdin is not None
        self.stderr.write_text("")
        for former in self.stderr.parent.glob("pid_*"):
            former.unlink()
        line = {
            "args": args, "stderr": str(self.stderr), "processes": processes, "die_at": die_at,
            "kill_after": kill_after, "environment": environment or {},
        }  # fmt: skip
        self.process.stdin.write(json.dumps(line) + "\n")
        self.process.stdin.flush()
        return next((status for status in self._read() if status), OK)

    def said(self) -> str:
        """What the last training's processes wrote."""
        return self.stderr.read_text()

    def pid(self, rank: int) -> int:
        """Number of a process of the training that is running."""
        return int(self.stderr.with_name(f"pid_{rank}").read_text())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def _read(self) -> list[int]:
        assert self.process.stdout is not None
        answer: list[int] = json.loads(self.process.stdout.readline())
        return answer


def when_logged(run_dir: Path, lines: int, act: Callable[[], object]) -> threading.Thread:
    """Act as soon as the log of a run has so many lines."""

    def watch() -> None:
        log = run_dir / "log.jsonl"
        while not log.exists() or len(log.read_text().splitlines()) < lines:
            time.sleep(0.005)
        act()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def die_at(number: int) -> None:
    from pysupcon.trainer import checkpoint

    done = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal done
            done += 1
            if done == number:
                if function is write:
                    path, content = args
                    Path(path).write_bytes(content[: len(content) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    write = checkpoint.write_file
    checkpoint.write_file = counted(write)
    os.fsync, os.replace, shutil.rmtree = counted(os.fsync), counted(os.replace), counted(shutil.rmtree)


def child(line: dict[str, Any], rank: int, port: int) -> int:
    from pysupcon.train import main

    with open(line["stderr"], "a") as stderr:
        os.dup2(stderr.fileno(), 2)
    os.dup2(2, 1)
    os.environ.update(line["environment"])
    Path(line["stderr"]).with_name(f"pid_{rank}").write_text(str(os.getpid()))
    if line["processes"] > 1:
        count = str(line["processes"])
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=count, LOCAL_WORLD_SIZE=count)
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if line["die_at"] is not None:
        die_at(line["die_at"])
    return main(line["args"])


def status_of(pid: int, kill_after: float | None) -> int:
    deadline = None if kill_after is None else time.monotonic() + kill_after
    while True:
        done, status = os.waitpid(pid, 0 if deadline is None else os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if deadline is not None and time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)  # not waited for yet: the number is still its own
            deadline = None
        time.sleep(0.005)


def serve() -> None:
    import timm.utils  # noqa: F401
    import torch

    from pysupcon.config import parse_args
    from pysupcon.data.config import DataConfig
    from pysupcon.data.sources import read_source
    from pysupcon.trainer import loop  # noqa: F401

    torch.set_num_threads(1)
    parse_args([])  # reads all docstrings, once for all children
    read_source(DataConfig(dataset="digits"))
    print([OK], flush=True)
    for text in sys.stdin:
        line, port, pids = json.loads(text), free_port(), []
        for rank in range(line["processes"]):
            pid = os.fork()
            if pid == 0:
                status = 99
                try:
                    status = child(line, rank, port)
                except BaseException:
                    import traceback

                    traceback.print_exc()
                finally:
                    sys.stderr.flush()
                    os._exit(status)
            pids.append(pid)
        print([status_of(pid, line["kill_after"]) for pid in pids], flush=True)
    os._exit(0)  # nothing to tidy up


if __name__ == "__main__":
    serve()
