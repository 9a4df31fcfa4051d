"""Models: one backbone or two, and as wanted a projection head, classification heads, a decoder."""

from pysupcon.models.config import ModelConfig

__all__ = ["ModelConfig"]
