"""Errors that the user can fix. The command line prints their message without a traceback."""

from __future__ import annotations


class ConfigError(ValueError):
    """The config is not valid. The message names the field, the requirement and the value."""


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
    """Check one requirement of a config field.

    Args:
        condition: whether the requirement holds.
        field: name of the field.
        contract: the requirement, e.g. "be greater than 0".
        got: value of the field.

    Raises:
        ConfigError: ``condition`` is false; the message is "<field> must <contract>, got <got>".
    """
    if not condition:
        raise ConfigError(f"{field} must {contract}, got {got!r}")
