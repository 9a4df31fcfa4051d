"""Commands with a time limit, of which no process is left when they have ended.

A command gets a session of its own. Shortly before its limit its whole process group gets SIGINT (Python then
says where it was, pytest sums up, run.py saves), then SIGTERM, and at the limit SIGKILL. Processes that left
the group are found by a mark in their environment and treated alike: one that holds a GPU would disturb
whatever comes next.
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
PATIENCE = 6.0
"""seconds before its limit at which a command gets SIGINT, at most; half of that for a SIGTERM"""
TAIL = 4000
"""characters of the output that are kept"""
_count = itertools.count()


class Command(NamedTuple):
    words: Sequence[str]
    seconds: float
    """at most, with everything that ending it takes"""
    log: Path
    """gets stdout and stderr"""
    environment: Mapping[str, str]
    """added to this process's own"""


class Ended(NamedTuple):
    code: int | None
    """exit status, negative for a signal; None if the command could not be started or ended"""
    seconds: float
    cut: bool
    """the limit ended it"""
    tail: str


def run(commands: Sequence[Command], cwd: Path, echo: bool = True) -> list[Ended]:
    """Runs commands beside each other and waits for all.

    Their output is copied to stdout as it comes, if ``echo``.

    An exception (KeyboardInterrupt, say) ends them all before it is passed on.
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
            with suppress(KeyboardInterrupt):  # a second one changes nothing: the end is near
                time.sleep(0.05)
                ended = all([one.step() for one in running])
        raise
    return [one.ended for one in running]


@dataclass
class _Running:
    """One command, from its start to its last output."""

    command: Command
    cwd: Path
    echo: bool
    start: float = field(default_factory=time.monotonic)
    sent: int = 0
    """how many of the signals of :meth:`_due`"""

    def __post_init__(self) -> None:
        self.mark = f"{os.getpid()}.{next(_count)}"
        self.ended = Ended(None, 0.0, False, "")
        self.process: subprocess.Popen[bytes] | None = None
        limit = self.command.seconds
        patience = min(PATIENCE, limit / 5)
        self.due = [self.start + limit - patience, self.start + limit - patience / 2, self.start + limit]
        self.command.log.parent.mkdir(parents=True, exist_ok=True)
        self.shown: BinaryIO = self.command.log.open("w+b")
        environment = {**os.environ, **self.command.environment, MARK: self.mark}
        try:
            with self.command.log.open("ab") as output:
                self.process = subprocess.Popen(
                    list(self.command.words), cwd=self.cwd, env=environment, stdin=subprocess.DEVNULL,
                    stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                )  # fmt: skip
        except OSError as error:
            self.shown.close()
            self.ended = self.ended._replace(tail=f"{type(error).__name__}: {error}")

    def step(self) -> bool:
        """Looks after the command; True once it has ended."""
        if self.process is None:
            return True
        self._show()
        now = time.monotonic()
        code = self.process.poll()
        if code is None:
            while self.sent < 3 and now >= self.due[self.sent]:
                self._signal((signal.SIGINT, signal.SIGTERM, signal.SIGKILL)[self.sent])
                self.sent += 1
            if now < self.due[2] + PATIENCE:  # beyond that not even SIGKILL could end it
                return False
        self._signal(signal.SIGKILL)  # of what the command left behind
        self._show()
        self.shown.close()
        self.process = None
        text = self.command.log.read_bytes()[-4 * TAIL :].decode("utf-8", "replace")
        self.ended = Ended(code, time.monotonic() - self.start, self.sent > 0, text[-TAIL:])
        return True

    def interrupt(self) -> None:
        """Makes now the time of the first signal."""
        now = time.monotonic()
        if self.process is not None and self.sent == 0:
            self.due = [now, now + PATIENCE / 2, now + PATIENCE]

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
    """Processes whose environment bears the mark, wherever they went; none where there is no /proc."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:
            continue
    return found
