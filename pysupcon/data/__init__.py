"""Data: images with fine and coarse labels, stratified splits, multi-view augmentation, batch samplers.

torchvision, scikit-learn and mlxtend are imported on first use, because ``--help`` needs only the config.

:class:`PerClassBatches` is the ``batch_sampler`` of any DataLoader:

>>> import torch
>>> from torch.utils.data import DataLoader, TensorDataset
>>> from pysupcon.data import PerClassBatches
>>> dataset = TensorDataset(torch.rand(100, 3), torch.arange(100) % 10)
>>> batches = PerClassBatches(dataset.tensors[1], classes_per_batch=4, samples_per_class=2)
>>> loader = DataLoader(dataset, batch_sampler=batches)
>>> len(loader)
13
>>> rows, labels = next(iter(loader))
>>> rows.shape, labels.unique(return_counts=True)[1]
(torch.Size([8, 3]), tensor([2, 2, 2, 2]))
"""

from pysupcon.data.config import DataConfig
from pysupcon.data.per_class import PerClassBatches

__all__ = ["DataConfig", "PerClassBatches"]
