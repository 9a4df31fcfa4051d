"""Starts trainings that are to be killed: imports everything once, then forks a process for each line on stdin.

Line in: {"args": [...], "stderr": FILE, "die_at": N or null, "kill_after": SECONDS or null}; line out: its exit
status (as ``subprocess`` gives it: negative for a signal); the first line out says that all is imported. With
``die_at`` the process kills itself at its Nth dealing with the disk: in the middle of writing a file of a
checkpoint, before a sync, before a rename, before a removal.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm.utils  # noqa: F401
import torch

from pysupcon.config import parse_args
from pysupcon.data.config import DataConfig
from pysupcon.data.sources import read_source
from pysupcon.train import main
from pysupcon.trainer import checkpoint, loop  # noqa: F401


def die_at(number: int) -> None:
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


def child(line: dict[str, Any]) -> None:
    with open(line["stderr"], "a") as stderr:
        os.dup2(stderr.fileno(), 2)
    os.dup2(2, 1)
    if line["die_at"] is not None:
        die_at(line["die_at"])
    os._exit(main(line["args"]))


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


if __name__ == "__main__":
    torch.set_num_threads(1)
    parse_args([])  # reads all docstrings, once for all children
    read_source(DataConfig(dataset="digits"))
    print(0, flush=True)
    for text in sys.stdin:
        line = json.loads(text)
        pid = os.fork()
        if pid == 0:
            try:
                child(line)
            finally:
                os._exit(99)
        print(status_of(pid, line["kill_after"]), flush=True)
