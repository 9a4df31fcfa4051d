"""A dry run: one batch through all parts of a training, to find errors and memory before a long run."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pysupcon.models.model import ModelOutput
from pysupcon.trainer.log import peak_memory
from pysupcon.trainer.setup import check_trackers
from pysupcon.trainer.state import TrainingState
from pysupcon.trainer.step import TrainingStep
from pysupcon.trainer.validation import Validation

IMAGES = 64
"""Images of the test split that are encoded as for the evaluators."""


def dry_run(
    step: TrainingStep,
    state: TrainingState,
    validate: Validation | None,
    loader: Iterable[Sequence[Tensor]],
    steps: int,
) -> None:
    """Run one optimizer step, validate one batch, write a checkpoint and encode some test images.

    The main process prints shapes, losses, seconds and memory. Every process calls this.

    Args:
        step, state, validate, loader: parts of a new trainer. The ``run_dir`` of the state is a temporary
            folder.
        steps: number of steps of the training.

    Raises:
        RunError, ConfigError: as in a training.
    """
    accelerator, config, network = step.accelerator, step.config, step.network
    check_trackers(accelerator, config)
    per_step, device = config.trainer.accumulation_steps, accelerator.device
    outputs: list[ModelOutput] = []
    hook = step.objective.register_forward_pre_hook(lambda _, arguments: outputs.append(arguments[0]))
    network.train()
    batches = list(islice(loader, per_step))
    start = time.perf_counter()
    values, _ = step(batches, config.trainer.metrics_steps or 1, False)
    seconds = time.perf_counter() - start
    hook.remove()
    if state.ema is not None:
        state.ema.update(network, 1)
    metrics = {} if validate is None else validate(network, max_batches=1)
    checkpoint = state.save(metrics)
    features = _encode(step) if config.evaluate else None
    if not accelerator.is_main_process:
        return
    parameters = list(network.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    views, labels = batches[0][:2]
    print(
        f"dry run of {config.model.backbone} on {device}, {accelerator.num_processes} process(es)\n"
        f"parameters   {sum(p.numel() for p in parameters):,}, {trained:,} of them trained\n"
        f"batch        views {_shape(views)}, labels {_shape(labels)} per process; "
        f"{per_step} batch(es) per step\n"
        f"model        {_named_shapes(outputs[0])}\n"
        f"step         {_named_values(values)}; {seconds:.2f} s (the first step is slower than later ones)"
    )
    if validate is not None:
        print(f"validation   {_named_values(metrics)}, of one batch")
    if features is not None:
        kind = f"{config.evaluation.features}s"
        print(f"evaluators   {', '.join(config.evaluation.evaluators)}: {kind} {_shape(features)}")
    print(
        f"checkpoint   {_size(checkpoint):.1f} MiB\n"
        f"memory       peak {peak_memory(device):,.0f} MiB of the main process\n"
        f"training     {steps:,} steps, {state.steps_per_epoch:,} per epoch; nothing was written"
    )


@torch.no_grad()
def _encode(step: TrainingStep) -> Tensor:
    dataset = step.data.evaluation_dataset("test")
    images = torch.stack([dataset[i][0] for i in range(min(IMAGES, len(dataset)))])
    network: Any = step.network
    network.eval()
    encode = network.encoder_of(step.config.evaluation.features)
    features: Tensor = encode(images.to(step.accelerator.device))
    network.train()
    return features


def _shape(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _named_shapes(outputs: ModelOutput) -> str:
    named = outputs._asdict().items()
    return ", ".join(f"{name} {_shape(value)}" for name, value in named if value is not None)


def _named_values(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items())


def _size(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.iterdir()) / 2**20
