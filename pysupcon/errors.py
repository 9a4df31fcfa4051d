"""Errors that are the user's to mend: one message, no traceback."""

from __future__ import annotations


class ConfigError(ValueError):
    """A configuration that cannot run: the message names the field, the contract and what came."""


class RunError(RuntimeError):
    """A run that cannot go on, or cannot be read: the message names the file or the step.

    Attributes:
        of_one_process: other processes do not raise it: whichever does must tell.
    """

    of_one_process = False


class Interrupted(RunError):
    """A training that stopped as it was asked to, its state saved: the message says why and how to go on."""


def check(condition: bool, field: str, contract: str, got: object) -> None:
    """Raise :class:`ConfigError` ``"<field> must <contract>, got <got>"`` unless ``condition`` holds."""
    if not condition:
        raise ConfigError(f"{field} must {contract}, got {got!r}")
