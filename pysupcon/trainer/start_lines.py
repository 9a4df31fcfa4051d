"""What is printed before the first step: the data that were found, the training, and whether it is short."""

from __future__ import annotations

import math
from pathlib import Path

from pysupcon.config import Config
from pysupcon.data.datamodule import DataModule
from pysupcon.losses import LOSSES_BY_NAME

LEFT_OUT = 0.25
"""Share of the samples that an epoch leaves out from which on a line says so. The batch size that is chosen
for few samples leaves out less."""
WASTED = 0.1
"""Share of the samples that an epoch may leave out with the batch size that the line names."""
FEW_STEPS = 50
"""Steps of a training below which a line says so."""


def start_lines(
    config: Config, data: DataModule, *, steps: int, steps_per_epoch: int, processes: int
) -> list[str]:
    """Lines for the user at the start of a training or a dry run.

    Args:
        config: resolved config.
        data: its data.
        steps, steps_per_epoch: optimizer steps.
        processes: number of processes.
    """
    epoch = f"{_count(steps_per_epoch, 'step')} an epoch, {_count(steps, 'step')}"
    return [
        *data.notes,
        _describe_data(config, data),
        f"{_describe_labels(config, data)}: {_describe_batches(config, processes)}; {epoch}",
        f"{config.model.backbone}, {_describe_loss(config)}, "
        f"{config.optimizer.name} with learning rate {config.optimizer.learning_rate:g}",
        *_length_notes(config, len(data.training), steps, steps_per_epoch, processes),
    ]


def _count(number: int, noun: str) -> str:
    plural = noun + ("es" if noun.endswith(("s", "ch")) else "s")
    return f"{number:,} {noun if number == 1 else plural}"


def _describe_data(config: Config, data: DataModule) -> str:
    name = config.data.dataset + (f" {Path(config.data.root).name}" if config.data.root else "")
    unlabelled = 0 if data.unlabelled is None else len(data.unlabelled)
    total = sum(len(samples) for samples in data.splits.values()) + unlabelled
    vectors, features = data.image_size == 0, data.feature_names
    found = _count(total, "vector" if vectors else "image")
    if vectors:
        found += f" of {_count(data.channels, 'feature')}"
        if features:
            found += f" {features[0]}" + (f" ... {features[-1]}" if len(features) > 1 else "")
    fine, coarse = len(data.fine_names), len(data.coarse_names)
    if data.training.fine.dim() > 1:
        found += f", {_count(fine, 'label')} per image"
    elif _one_level(data):
        found += f", {_count(fine, 'class')}"
    else:
        found += f", {fine:,} fine and {coarse:,} coarse classes"
    if unlabelled:
        found += f", {unlabelled:,} of unknown class"
    parts = ", ".join(f"{split} {len(samples):,}" for split, samples in data.splits.items())
    return f"{name}: {found}; {parts}"


def _one_level(data: DataModule) -> bool:
    """Whether coarse and fine labels are the same."""
    return data.coarse_names == data.fine_names


def _describe_labels(config: Config, data: DataModule) -> str:
    loss, level = config.loss, config.data.labels
    of_labels = loss.name != "none" and not LOSSES_BY_NAME[loss.name].self_supervised
    if not (of_labels or loss.cross_entropy_weight > 0 or config.model.decoder == "labelled"):
        return "training without labels"
    column = data.label_columns.get(level)
    if data.training.fine.dim() > 1 or _one_level(data):
        named = f"{column}: " if column else ""
        noun = "label" if data.training.fine.dim() > 1 else "class"
        return f"training on the labels ({named}{_count(len(data.class_names), noun)})"
    other, names = ("fine", data.fine_names) if level == "coarse" else ("coarse", data.coarse_names)
    named, named_other = (f"{data.label_columns[key]}, " if column else "" for key in (level, other))
    return (
        f"training on the {level} labels ({named}{_count(len(data.class_names), 'class')}; data.labels "
        f"{other}: {named_other}{_count(len(names), 'class')})"
    )


def _describe_batches(config: Config, processes: int) -> str:
    data = config.data
    size = f"{data.global_batch_size:,}" + (f" over {processes} processes" if processes > 1 else "")
    if data.sampler == "per_class":
        assert data.samples_per_class is not None, "call DataConfig.check() first"
        classes = data.global_batch_size // data.samples_per_class
        size += f" ({data.samples_per_class} of each of {classes} classes)"
    kind = {"groups": "group-balanced ", "per_class": ""}.get(data.sampler, f"{data.sampler} ")
    accumulated = config.trainer.accumulation_steps
    per_step = f"{accumulated} a step, " if accumulated > 1 else ""
    own = "" if data.augmentation.count(":") == 0 else "augmentation "
    augmentation = f"{own}{data.augmentation}" if own else f"{data.augmentation} augmentation"
    views = _count(data.views, "view") + (" of images of a class" if data.view_partners == "class" else "")
    return f"{kind}batches of {size}, {per_step}{views}, {augmentation}"


def _describe_loss(config: Config) -> str:
    loss = config.loss
    terms = []
    if loss.name != "none":
        name = LOSSES_BY_NAME[loss.name].__name__.removesuffix("Loss")
        terms.append((loss.weight, f"{name} at temperature {loss.temperature:g}"))
    terms += [
        (loss.infonce_weight, "InfoNCE"),
        (loss.cross_entropy_weight, "GroupDRO" if loss.group_dro is not None else "cross-entropy"),
        (loss.reconstruction_weight, "reconstruction"),
    ]
    return " + ".join((f"{weight:g} x " if weight != 1 else "") + term for weight, term in terms if weight)


def _length_notes(config: Config, count: int, steps: int, steps_per_epoch: int, processes: int) -> list[str]:
    size, accumulated = config.data.global_batch_size, config.trainer.accumulation_steps
    multiple = processes * (config.data.samples_per_class or 1)

    def left_out(size: int) -> int:
        return count - count // size // accumulated * accumulated * size

    lines = []
    if left_out(size) >= LEFT_OUT * count:
        fitting = next(
            (smaller for smaller in range(size - size % multiple, 1, -multiple)
             if left_out(smaller) <= WASTED * count), None,
        )  # fmt: skip
        batches = _count(steps_per_epoch * accumulated, "batch")
        lines.append(
            f"an epoch is {batches} of {size:,} samples: it leaves out {left_out(size) / count:.0%} of the "
            f"{count:,} training samples, others in each epoch. To change this, lower data.batch_size"
            + (f", e.g. to {fitting}" if fitting else "")
        )
    if steps < FEW_STEPS and config.trainer.max_steps is None:
        epochs = math.ceil(FEW_STEPS / steps_per_epoch)
        lines.append(
            f"{_count(steps, 'step')} are few to learn from: raise trainer.epochs ({epochs:,} give "
            f"{epochs * steps_per_epoch:,} steps), or lower data.batch_size"
        )
    return lines
