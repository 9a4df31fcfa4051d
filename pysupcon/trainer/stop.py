"""Requests to stop: a signal, or the end of the time budget."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""SIGUSR1 is what clusters send before the end of a job's time (Slurm: ``--signal=USR1@120``)."""


class StopRequests:
    """Within ``with``, SIGTERM and SIGUSR1 are remembered instead of ending the process.

    Args:
        budget: minutes from now; None means no end.
    """

    def __init__(self, budget: float | None) -> None:
        self._budget = budget
        self._start = time.monotonic()
        self._signal: signal.Signals | None = None
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():  # nobody else may set handlers
            self._former = {number: signal.signal(number, self._remember) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _: FrameType | None) -> None:
        self._signal = signal.Signals(number)

    @property
    def reason(self) -> str | None:
        """Why this process wants to stop; None if it does not."""
        if self._signal is not None:
            return self._signal.name
        if self._budget is not None and time.monotonic() - self._start > 60 * self._budget:
            return f"the end of its {self._budget:g} minutes (trainer.time_budget)"
        return None
