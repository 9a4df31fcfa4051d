"""Models: a backbone with an optional projection head and an optional linear classification head."""

from pysupcon.models.config import ModelConfig

__all__ = ["ModelConfig"]
