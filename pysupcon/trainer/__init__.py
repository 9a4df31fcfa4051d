"""The trainer: one Accelerate loop with its optimiser, log, checkpoints, and the reader of finished runs.

Accelerate, timm and torchvision are imported by the modules that use them, not here: ``--help`` needs none of
them."""

from pysupcon.trainer.config import LossConfig, OptimizerConfig, TrainerConfig

__all__ = ["LossConfig", "OptimizerConfig", "TrainerConfig"]
