"""Runs commands with a time limit and ends all of their processes.

Each command runs in its own session. Shortly before its limit its process group gets SIGINT (Python prints a
traceback, pytest a summary, run.py saves its results), then SIGTERM, and SIGKILL at the limit. Processes that
left the group are found by a mark in their environment and get the same signals: a process that still uses
the GPU would disturb the next measurement.
"""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

MARK = "GPU_CHECK_COMMAND"
GRACE = 6.0
"""A command gets SIGINT at most so many seconds before its limit, and SIGTERM after half of that time."""
TAIL = 4000
"""Number of characters of the output that are kept."""
_count = itertools.count()


class Command(NamedTuple):
    arguments: Sequence[str]
    seconds: float
    """time limit, including the time to end the command"""
    log: Path
    """file for stdout and stderr"""
    environment: Mapping[str, str]
    """additional environment variables"""


class Finished(NamedTuple):
    exit_status: int | None
    """exit status, negative for a signal; None if the command could not be started or ended"""
    seconds: float
    timed_out: bool
    """whether the limit ended the command"""
    tail: str


def run(commands: Sequence[Command], cwd: Path, echo: bool = True) -> list[Finished]:
    """Run commands in parallel and wait for all.

    An exception such as KeyboardInterrupt ends all commands before it is raised again.

    Args:
        commands: the commands.
        cwd: working directory.
        echo: whether to copy their output to stdout while they run.
    """
    running = [_Running(command, cwd, echo) for command in commands]
    try:
        while not all([one.step() for one in running]):
            time.sleep(0.05)
    except BaseException:
        for one in running:
            one.interrupt()
        ended = False
        while not ended:
            with suppress(KeyboardInterrupt):  # ignore a second interruption
                time.sleep(0.05)
                ended = all([one.step() for one in running])
        raise
    return [one.ended for one in running]


@dataclass
class _Running:
    """A command that was started."""

    command: Command
    cwd: Path
    echo: bool
    start: float = field(default_factory=time.monotonic)
    sent: int = 0
    """number of signals sent so far: SIGINT, SIGTERM, SIGKILL"""

    def __post_init__(self) -> None:
        self.mark = f"{os.getpid()}.{next(_count)}"
        self.ended = Finished(None, 0.0, False, "")
        self.process: subprocess.Popen[bytes] | None = None
        limit = self.command.seconds
        grace = min(GRACE, limit / 5)
        self.due = [self.start + limit - grace, self.start + limit - grace / 2, self.start + limit]
        self.command.log.parent.mkdir(parents=True, exist_ok=True)
        self.shown: BinaryIO = self.command.log.open("w+b")
        environment = {**os.environ, **self.command.environment, MARK: self.mark}
        try:
            with self.command.log.open("ab") as output:
                self.process = subprocess.Popen(
                    list(self.command.arguments), cwd=self.cwd, env=environment, stdin=subprocess.DEVNULL,
                    stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                )  # fmt: skip
        except OSError as error:
            self.shown.close()
            self.ended = self.ended._replace(tail=f"{type(error).__name__}: {error}")

    def step(self) -> bool:
        """Copy new output and send signals that are due. Returns True once the command has ended."""
        if self.process is None:
            return True
        self._show()
        now = time.monotonic()
        code = self.process.poll()
        if code is None:
            while self.sent < 3 and now >= self.due[self.sent]:
                self._signal((signal.SIGINT, signal.SIGTERM, signal.SIGKILL)[self.sent])
                self.sent += 1
            if now < self.due[2] + GRACE:  # give up if even SIGKILL does not end it
                return False
        self._signal(signal.SIGKILL)  # processes that the command left behind
        self._show()
        self.shown.close()
        self.process = None
        text = self.command.log.read_bytes()[-4 * TAIL :].decode("utf-8", "replace")
        self.ended = Finished(code, time.monotonic() - self.start, self.sent > 0, text[-TAIL:])
        return True

    def interrupt(self) -> None:
        """Send the first signal at the next step."""
        now = time.monotonic()
        if self.process is not None and self.sent == 0:
            self.due = [now, now + GRACE / 2, now + GRACE]

    def _show(self) -> None:
        text = self.shown.read().decode("utf-8", "replace")
        if self.echo and text:
            sys.stdout.write(text)
            sys.stdout.flush()

    def _signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        group = self.process.pid
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(group, number)
        for pid in marked(self.mark):
            with suppress(ProcessLookupError, PermissionError):
                if os.getpgid(pid) != group:
                    os.kill(pid, number)


def marked(mark: str) -> list[int]:
    """Ids of the processes whose environment has the mark; none if there is no /proc."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:
            continue
    return found
