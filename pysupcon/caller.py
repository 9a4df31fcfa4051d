"""Warnings that show the user's line."""

from __future__ import annotations

import os
import sys
import warnings

import torch

__all__ = ["warn_caller"]

_SKIPPED = tuple(os.path.dirname(os.path.abspath(file)) + os.sep for file in (__file__, torch.__file__))


def warn_caller(message: str) -> None:
    """Issues a UserWarning that shows the innermost line outside of pysupcon and torch.

    If there is none (``python -m pysupcon``), it shows the outermost line.
    """
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None:
        file = frame.f_code.co_filename
        importing = "importlib" in file and "_bootstrap" in file  # frames that stacklevel does not count
        if not importing and not file.startswith(_SKIPPED):
            break
        frame, level = frame.f_back, level + (not importing)
    warnings.warn(message, stacklevel=level)
