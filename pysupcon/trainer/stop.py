"""Requests to stop a training: a signal, or the end of the time budget."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

from pysupcon.trainer.progress import DELAY, print_line

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""Clusters send SIGUSR1 before a job's time limit (Slurm: ``--signal=USR1@120``). Ctrl-C sends SIGINT."""

REPEATED = 1.0
"""Seconds in which a further SIGINT counts as the same Ctrl-C. The terminal sends SIGINT to all processes,
and torchrun also sends its own one to them."""


class StopRequests:
    """Context manager that records SIGTERM, SIGUSR1 and SIGINT instead of ending the process.

    A second SIGINT ends the process at once. A SIGINT that is ignored at the start, as in the background jobs
    of a shell, stays ignored.

    Args:
        budget: minutes from now until a stop is requested; None means no limit.
    """

    def __init__(self, budget: float | None) -> None:
        self._budget = budget
        self._start = time.monotonic()
        self._signal: signal.Signals | None = None
        self._interrupted_at: float | None = None
        self._notice: threading.Timer | None = None
        self._process = os.getpid()
        self._previous_handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():  # other threads cannot set handlers
            for number in SIGNALS:
                if number != signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous_handlers[number] = signal.signal(number, self._record)
        return self

    def __exit__(self, *_: object) -> None:
        if self._notice is not None:
            self._notice.cancel()
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _record(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked worker of a DataLoader: the main process ends it
            return
        self._signal = signal.Signals(number)
        if number != signal.SIGINT:
            return
        now = time.monotonic()
        if self._interrupted_at is None:
            self._interrupted_at = now
            text = "stopping after this step with a checkpoint; a second Ctrl-C stops at once"
            self._notice = threading.Timer(DELAY, print_line, (text,))
            self._notice.daemon = True
            self._notice.start()
        elif now - self._interrupted_at > REPEATED:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(self._process, signal.SIGINT)

    @property
    def reason(self) -> str | None:
        """The reason to stop; None if there is no request."""
        if self._signal is not None:
            return "Ctrl-C (SIGINT)" if self._signal == signal.SIGINT else self._signal.name
        if self._budget is not None and time.monotonic() - self._start > 60 * self._budget:
            return f"the end of its {self._budget:g} minutes (trainer.time_budget)"
        return None
