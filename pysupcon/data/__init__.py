"""Data: images with fine and coarse labels, stratified splits, multi-view augmentation, batch samplers.

torchvision, scikit-learn and mlxtend are imported on first use, because ``--help`` needs only the config.
"""

from pysupcon.data.config import DataConfig

__all__ = ["DataConfig"]
