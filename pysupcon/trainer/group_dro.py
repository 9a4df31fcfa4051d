"""Groups in the training: GroupDRO's loss among all processes, and accuracy by group on the validation
split."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from pysupcon.config import Config
from pysupcon.data.datamodule import DataModule
from pysupcon.evaluators import GroupDRO


def build_group_dro(config: Config, data: DataModule, accelerator: Accelerator) -> GroupDRO | None:
    """The robust loss of ``loss.group_dro`` over the groups of ``data.groups``; None without it."""
    options = config.loss.group_dro
    if options is None:
        return None
    assert data.groups is not None, "Config.resolve() first"

    def all_reduce_sum(tensor: Tensor) -> Tensor:
        total: Tensor = accelerator.reduce(tensor, "sum")
        return total

    return GroupDRO(
        data.groups.counts,
        eta=options.eta,
        adjustment=options.adjustment,
        all_reduce_sum=all_reduce_sum if accelerator.num_processes > 1 else None,
    )


class GroupAccuracy:
    """How often the classification head is right, in the worst group of the validation split and on average.

    All images of the split, without augmentation, every process its share. No random state moves.
    """

    def __init__(self, accelerator: Accelerator, config: Config, data: DataModule) -> None:
        self.accelerator, self.fine = accelerator, config.data.labels == "fine"
        mine = torch.arange(accelerator.process_index, len(data.splits["val"]), accelerator.num_processes)
        self.groups = {"worst_group": data.true_groups["val"][mine]}
        self.sizes = {"worst_group": int(data.true_groups["val"].max()) + 1}
        if data.groups is not None:
            self.groups["worst_known_group"] = data.groups.val[mine]
            self.sizes["worst_known_group"] = len(data.groups.parent)
        plain: Dataset[Any] = data.evaluation_dataset("val")
        batch = max(config.data.batch_size // accelerator.num_processes, 1)
        self.loader: DataLoader[tuple[Tensor, Tensor, Tensor]] = DataLoader(
            Subset(plain, mine.tolist()),
            batch_size=config.trainer.chunk_size or batch,
            num_workers=config.data.workers,
            generator=torch.Generator(),  # or each pass would draw a seed from the global one
        )

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> dict[str, float]:
        """``accuracy``; ``worst_group``, of the true groups; and ``worst_known_group``, of those of
        ``data.groups``, if any.

        Args:
            model: not wrapped, in eval mode.
        """
        device = self.accelerator.device
        found = []
        for images, coarse, fine in self.loader:
            labels = (fine if self.fine else coarse).to(device)
            with self.accelerator.autocast():
                logits = model(images.to(device).contiguous(memory_format=torch.channels_last), labels).logits
            found.append(logits.argmax(dim=1) == labels)
        correct = torch.cat(found).to("cpu", torch.float64) if found else torch.zeros(0, dtype=torch.float64)
        counted = [correct.new_tensor([correct.sum().item(), len(correct)])]
        for name, groups in self.groups.items():
            known = groups >= 0
            for values in (correct, torch.ones_like(correct)):
                counted.append(
                    torch.zeros(self.sizes[name], dtype=torch.float64).index_add(
                        0, groups[known], values[known]
                    )
                )
        sizes = [len(part) for part in counted]
        total: Tensor = self.accelerator.reduce(torch.cat(counted).to(device), "sum")
        (right, samples), *by_group = total.cpu().split(sizes)
        figures = {"accuracy": float(right / samples)}
        for name, part, whole in zip(self.groups, by_group[::2], by_group[1::2], strict=True):
            figures[name] = float((part[whole > 0] / whole[whole > 0]).min())
        return figures
