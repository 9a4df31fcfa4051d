"""Models: one or two backbones with optional projection head, classification heads and decoder."""

from pysupcon.models.config import ModelConfig

__all__ = ["ModelConfig"]
