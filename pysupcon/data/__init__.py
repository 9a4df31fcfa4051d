"""Data: images with fine and coarse labels, stratified splits, multi-view augmentation, batch samplers.

Torchvision, scikit-learn and mlxtend are imported where they are needed only: ``--help`` needs the arguments
alone."""

from pysupcon.data.config import DataConfig

__all__ = ["DataConfig"]
