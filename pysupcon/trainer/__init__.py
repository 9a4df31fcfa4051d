"""Training: the Accelerate loop with its optimizer, log and checkpoints, and the reader of finished runs.

This module does not import Accelerate, timm or torchvision, so that ``--help`` works without them."""

from pysupcon.trainer.config import LossConfig, OptimizerConfig, TrainerConfig

__all__ = ["LossConfig", "OptimizerConfig", "TrainerConfig"]
