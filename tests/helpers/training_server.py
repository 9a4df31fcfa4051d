"""Runs trainings in processes of their own without the cost of the imports.

:class:`TrainingServer` starts this file as a process. That process imports everything once, forks the
processes of one training per request (a line of JSON on stdin) and answers with their exit statuses.
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
SEARCHED = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": SEARCHED}
OK = 0


@pytest.fixture(scope="module", name="server")
def start_training_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainingServer]:
    """The fixture ``server``; test modules that use it import this function."""
    server = TrainingServer(tmp_path_factory.mktemp("training_server"))
    yield server
    server.close()


class TrainingServer:
    """Runs pysupcon/train.py with given arguments.

    Args:
        folder: where the output of the trainings is stored, see :meth:`output`.
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
        kill_at_disk_operation: int | None = None,
        kill_after: float | None = None,
        environment: dict[str, str] | None = None,
    ) -> int:
        """Run one training and wait for its end.

        Args:
            args: arguments of the command line.
            processes: number of processes; their environment is that of torchrun.
            kill_at_disk_operation: each process sends itself SIGKILL at this disk operation, counted from 1:
                in the middle of writing a file of a checkpoint, before a sync, a rename or a removal.
            kill_after: seconds after which every process gets SIGKILL.
            environment: additional environment variables.

        Returns:
            The first exit status that is not 0, negative for a signal as in ``subprocess``; else 0.
        """
        assert self.process.stdin is not None
        self.stderr.write_text("")
        for pid_file in self.stderr.parent.glob("pid_*"):
            pid_file.unlink()
        request = {
            "args": args, "stderr": str(self.stderr), "processes": processes, "kill_after": kill_after,
            "kill_at_disk_operation": kill_at_disk_operation, "environment": environment or {},
        }  # fmt: skip
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return next((status for status in self._read() if status), OK)

    def output(self) -> str:
        """Standard output and standard error of all processes of the last training."""
        return self.stderr.read_text()

    def pid(self, rank: int) -> int:
        """Process id of a rank of the training that is running."""
        return int(self.stderr.with_name(f"pid_{rank}").read_text())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def _read(self) -> list[int]:
        assert self.process.stdout is not None
        answer: list[int] = json.loads(self.process.stdout.readline())
        return answer


def after_log_lines(run_dir: Path, lines: int, act: Callable[[], object]) -> threading.Thread:
    """Call ``act`` in a thread as soon as the log of a run has at least ``lines`` lines."""

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


def kill_at_disk_operation(number: int) -> None:
    """Make this process send itself SIGKILL at disk operation ``number``, counted from 1."""
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


def run_training(request: dict[str, Any], rank: int, port: int) -> int:
    """What a forked process does. Returns the exit status of the training."""
    from pysupcon.train import main

    with open(request["stderr"], "a") as stderr:
        os.dup2(stderr.fileno(), 2)
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell ignores SIGINT
    os.environ.update(request["environment"])
    Path(request["stderr"]).with_name(f"pid_{rank}").write_text(str(os.getpid()))
    if request["processes"] > 1:
        count = str(request["processes"])
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=count, LOCAL_WORLD_SIZE=count)
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if request["kill_at_disk_operation"] is not None:
        kill_at_disk_operation(request["kill_at_disk_operation"])
    return main(request["args"])


def wait_for(pid: int, kill_after: float | None) -> int:
    """Exit status of a process, which gets SIGKILL after ``kill_after`` seconds."""
    deadline = None if kill_after is None else time.monotonic() + kill_after
    while True:
        done, status = os.waitpid(pid, 0 if deadline is None else os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if deadline is not None and time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)  # not reaped yet: the process id is still valid
            deadline = None
        time.sleep(0.005)


def serve() -> None:
    """Fork the processes of one training for each line on stdin."""
    import timm.utils  # noqa: F401
    import torch

    from pysupcon.config import parse_args
    from pysupcon.data.config import DataConfig
    from pysupcon.data.sources import read_source
    from pysupcon.trainer import loop  # noqa: F401

    torch.set_num_threads(1)
    parse_args([])  # parses the docstrings once for all forked processes
    read_source(DataConfig(dataset="digits"))
    print([OK], flush=True)
    for line in sys.stdin:
        request, port, pids = json.loads(line), free_port(), []
        for rank in range(request["processes"]):
            pid = os.fork()
            if pid == 0:
                status = 99
                try:
                    status = run_training(request, rank, port)
                except BaseException:
                    import traceback

                    traceback.print_exc()
                finally:
                    sys.stderr.flush()
                    os._exit(status)
            pids.append(pid)
        print([wait_for(pid, request["kill_after"]) for pid in pids], flush=True)
    os._exit(0)  # skips the clean-up of torch and timm


if __name__ == "__main__":
    serve()
