"""Requests to stop a training: a signal, or the end of the time budget."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Clusters send SIGUSR1 before a job's time limit (Slurm: ``--signal=USR1@120``)."""


class StopRequests:
    """Context manager that records SIGTERM and SIGUSR1 instead of ending the process.

    Args:
        budget: minutes from now until a stop is requested; None means no limit.
    """

    def __init__(self, budget: float | None) -> None:
        self._budget = budget
        self._start = time.monotonic()
        self._signal: signal.Signals | None = None
        self._previous_handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():  # other threads cannot set handlers
            self._previous_handlers = {number: signal.signal(number, self._record) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _record(self, number: int, _: FrameType | None) -> None:
        self._signal = signal.Signals(number)

    @property
    def reason(self) -> str | None:
        """The reason to stop; None if there is no request."""
        if self._signal is not None:
            return self._signal.name
        if self._budget is not None and time.monotonic() - self._start > 60 * self._budget:
            return f"the end of its {self._budget:g} minutes (trainer.time_budget)"
        return None
