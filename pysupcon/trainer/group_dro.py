"""Groups in the training: the GroupDRO loss over all processes, and group accuracies on the validation
split."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from pysupcon.config import Config
from pysupcon.data.datamodule import DataModule
from pysupcon.data.workers import prepare_worker
from pysupcon.evaluators import GroupDRO
from pysupcon.models.model import memory_format


def build_group_dro(config: Config, data: DataModule, accelerator: Accelerator) -> GroupDRO | None:
    """Build the GroupDRO loss of ``loss.group_dro`` over the groups of ``data.groups``.

    Returns:
        The loss, or None if ``loss.group_dro`` is None.
    """
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
    """Accuracy of the classification head on the validation split: mean and worst group.

    The images are not augmented and are divided among the processes. No random state changes.

    Args:
        accelerator: the Accelerate object of this process.
        config: resolved config.
        data: the data of the config.
    """

    def __init__(self, accelerator: Accelerator, config: Config, data: DataModule) -> None:
        self.accelerator, self.fine = accelerator, config.data.labels == "fine"
        self.memory_format = memory_format(config.model)
        mine = torch.arange(accelerator.process_index, len(data.splits["val"]), accelerator.num_processes)
        self.groups = {"worst_group": data.true_groups["val"][mine]}
        self.sizes = {"worst_group": int(data.true_groups["val"].max()) + 1}
        if data.groups is not None:
            self.groups["worst_known_group"] = data.groups.val[mine]
            self.sizes["worst_known_group"] = len(data.groups.parent)
        plain: Dataset[Any] = data.evaluation_dataset("val")
        batch = max(config.data.global_batch_size // accelerator.num_processes, 1)
        workers = data.workers("val", config.trainer.chunk_size or batch, bytes_per_value=4)
        self.loader: DataLoader[tuple[Tensor, Tensor, Tensor]] = DataLoader(
            Subset(plain, mine.tolist()),
            batch_size=config.trainer.chunk_size or batch,
            num_workers=workers,
            worker_init_fn=prepare_worker if workers else None,
            generator=torch.Generator(),  # without it each pass draws a seed from the global generator
        )

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Compute the accuracies.

        Args:
            model: the model in eval mode, without Accelerate's wrappers.

        Returns:
            ``accuracy``; ``worst_group``, the lowest accuracy of a true group; and ``worst_known_group``, the
            lowest of a group of ``data.groups``, if given.
        """
        device = self.accelerator.device
        hits = []
        for images, coarse, fine in self.loader:
            labels = (fine if self.fine else coarse).to(device)
            with self.accelerator.autocast():
                logits = model(images.to(device).contiguous(memory_format=self.memory_format), labels).logits
            hits.append(logits.argmax(dim=1) == labels)
        correct = torch.cat(hits).to("cpu", torch.float64) if hits else torch.zeros(0, dtype=torch.float64)
        counts = [correct.new_tensor([correct.sum().item(), len(correct)])]
        for name, groups in self.groups.items():
            known = groups >= 0
            for values in (correct, torch.ones_like(correct)):
                counts.append(
                    torch.zeros(self.sizes[name], dtype=torch.float64).index_add(
                        0, groups[known], values[known]
                    )
                )
        sizes = [len(part) for part in counts]
        total: Tensor = self.accelerator.reduce(torch.cat(counts).to(device), "sum")
        (right, samples), *by_group = total.cpu().split(sizes)
        accuracies = {"accuracy": float(right / samples)}
        for name, right, samples in zip(self.groups, by_group[::2], by_group[1::2], strict=True):
            accuracies[name] = float((right[samples > 0] / samples[samples > 0]).min())
        return accuracies
