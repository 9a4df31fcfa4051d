"""Errors that the user can fix. The command line prints their message without a traceback."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar

_failures: ContextVar[list[str] | None] = ContextVar("failures", default=None)
"""Messages that :func:`check` collects within :func:`check_all`"""


class ConfigError(ValueError):
    """The config is not valid. The message names the field, the requirement and the value.

    Attributes:
        on_one_process: not all processes raise the error, so each that does must print it.
    """

    on_one_process = False


class RunError(RuntimeError):
    """A run cannot continue or cannot be read. The message names the file or the step.

    Attributes:
        on_one_process: only one process raises the error, so that process must print it.
    """

    on_one_process = False


class ImageError(RunError):
    """An image file cannot be read. The message names the file and is one line.

    A worker of a DataLoader raises the error in its own process. The DataLoader then calls the class with the
    text of the worker's traceback, whose last line holds the message.
    """

    on_one_process = True

    def __init__(self, message: str) -> None:
        if message.startswith("Caught ImageError in DataLoader worker"):
            message = message.rpartition("pysupcon.errors.ImageError: ")[2].strip()
        super().__init__(message)


class Interrupted(RunError):
    """The training was asked to stop and has saved a checkpoint. The message says why and how to resume."""


def check(condition: bool, field: str, contract: str, got: object) -> None:
    """Check one requirement of a config field. Within :func:`check_all` the error is raised at the end.

    Args:
        condition: whether the requirement holds.
        field: name of the field.
        contract: the requirement, e.g. "be greater than 0".
        got: value of the field.

    Raises:
        ConfigError: ``condition`` is false; the message is "<field> must <contract>, got <got>".
    """
    if condition:
        return
    message, failures = f"{field} must {contract}, got {got!r}", _failures.get()
    if failures is None:
        raise ConfigError(message)
    failures.append(message)


def check_all(*checks: Callable[[], object]) -> None:
    """Run all checks and report everything that failed.

    Args:
        checks: functions that call :func:`check` or raise a :class:`ConfigError`, which ends one function. A
            function may fail with another error after a failed :func:`check`.

    Raises:
        ConfigError: a check failed; the message has one line per failure, in the order of the checks.
    """
    failures: list[str] = []
    token = _failures.set(failures)
    try:
        for run in checks:
            before = len(failures)
            try:
                run()
            except ConfigError as error:
                failures += str(error).splitlines()
            except Exception:
                if len(failures) == before:
                    raise
    finally:
        _failures.reset(token)
    if failures:
        raise ConfigError("\n".join(dict.fromkeys(failures)))


TRAIN_PACKAGES = frozenset(
    (
        "accelerate",
        "jinja2",
        "jsonargparse",
        "matplotlib",
        "yaml",
        "safetensors",
        "sklearn",
        "threadpoolctl",
        "timm",
        "torchmetrics",
        "torchvision",
        "tqdm",
        "mlxtend",
        "tensorboard",
    )
)
"""Modules of the packages in the extra ``train``."""


def missing_extra(error: ModuleNotFoundError) -> str | None:
    """Return a message that names the extra to install, or None if no package of it is missing."""
    package = (error.name or "").partition(".")[0]
    if package not in TRAIN_PACKAGES:
        return None
    return f"the package {package} is not installed: pip install 'pysupcon[train]'"
