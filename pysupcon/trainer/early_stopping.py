"""Early stopping: the end of a training whose validation metric no longer improves."""

from __future__ import annotations

import math
from typing import Any

from pysupcon.trainer.config import ACCURACIES


class EarlyStopping:
    """Count the validations since the best value of a metric. The state is part of a checkpoint.

    Attributes:
        best: best value so far; None before the first validation with a finite value.
        best_step: step of ``best``.
        without_improvement: number of validations after ``best_step``.

    Args:
        metric: name of the validation metric (``trainer.best_by``); accuracies are maximised, losses
            minimised.
        patience: number of successive validations without improvement that ends the training.
    """

    def __init__(self, metric: str, patience: int) -> None:
        self.metric, self.patience = metric, patience
        self.best: float | None = None
        self.best_step = 0
        self.without_improvement = 0

    def update(self, value: float | None, step: int) -> None:
        """Record a validation. A value that is missing or not finite is no improvement.

        Args:
            value: the metric.
            step: number of finished steps.
        """
        if value is not None and math.isfinite(value) and (self.best is None or self._better(value)):
            self.best, self.best_step, self.without_improvement = value, step, 0
        else:
            self.without_improvement += 1

    @property
    def finished(self) -> bool:
        """Whether the training must end."""
        return self.without_improvement >= self.patience

    def describe(self) -> str:
        """Return the reason for the end, for a message."""
        best = "" if self.best is None else f"; the best is {self.best:.4g} at step {self.best_step}"
        return f"val_{self.metric} has not improved for {self.without_improvement} validations{best}"

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {
            "metric": self.metric,
            "best": self.best,
            "best_step": self.best_step,
            "without_improvement": self.without_improvement,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state. The state of another metric is ignored, because its values cannot be compared.

        Raises:
            TypeError: a value is not a number.
        """
        if state["metric"] != self.metric:
            return
        best, numbers = state["best"], (state["best_step"], state["without_improvement"])
        if not (best is None or type(best) is float) or any(type(number) is not int for number in numbers):
            raise TypeError(f"early_stopping must hold numbers, got {state!r:.120}")
        self.best, (self.best_step, self.without_improvement) = best, numbers

    def _better(self, value: float) -> bool:
        assert self.best is not None
        return value > self.best if self.metric in ACCURACIES else value < self.best
