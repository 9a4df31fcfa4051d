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
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_SKIPPED):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
