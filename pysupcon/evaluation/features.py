"""Features of a run's frozen encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pysupcon.data.augmented import AugmentedDataset
from pysupcon.data.workers import prepare_worker
from pysupcon.errors import ConfigError, RunError
from pysupcon.evaluators import EvaluationConfig, FeatureSet, FeatureSplits, LinearHead
from pysupcon.trainer.run import Run

SPLITS = ("train", "val", "test")
_MIN_SAMPLES = 2
DESCRIPTIONS = {
    "embedding": "output of the backbone, without projection head, not normalised",
    "projection": "output of the projection head, not normalised",
}
"""What the report says of ``EvaluationConfig.features``"""


def extract_features(
    encode: Callable[[Tensor], Tensor],
    dataset: Dataset[tuple[Tensor, int, int]],
    *,
    batch_size: int,
    device: torch.device,
    workers: int = 0,
    progress: bool = False,
    description: str = "features",
) -> FeatureSet:
    """Compute the features of every image of ``dataset``, in its order, without gradients.

    Args:
        encode: maps images [B, C, H, W] on ``device`` to embeddings [B, D].
        dataset: items (image, coarse label, fine label).
        batch_size: images per call of ``encode``.
        device: device of the images and of the returned features.
        workers: processes that load the images; 0 loads them in this process.
        progress: show a progress bar.
        description: label of the progress bar.

    Returns:
        Features [N, D], float32 (float64 if ``encode`` returns float64), and the labels.

    Raises:
        ValueError: ``encode`` did not return finite features [B, D].
    """
    batches: Iterable[Any] = DataLoader(
        dataset,
        batch_size=batch_size,
        num_workers=workers,
        worker_init_fn=prepare_worker if workers else None,
    )
    if progress:
        from tqdm import tqdm

        batches = tqdm(batches, desc=description, unit="batch", leave=False, delay=2, disable=None)
    features, coarse, fine = [], [], []
    with torch.inference_mode():
        for images, coarse_labels, fine_labels in batches:
            embedding = encode(images.to(device))
            features.append(embedding.to(torch.promote_types(embedding.dtype, torch.float32)))
            coarse.append(coarse_labels)
            fine.append(fine_labels)
    # Concatenating outside of inference mode gives ordinary tensors.
    return FeatureSet(torch.cat(features), torch.cat(coarse).to(device), torch.cat(fine).to(device))


def extract_split(
    encode: Callable[[Tensor], Tensor],
    dataset: Dataset[tuple[Tensor, int, int]],
    split: str,
    source: object,
    **options: Any,
) -> FeatureSet:
    """Call :func:`extract_features` for one split; ``options`` are its keywords.

    Raises:
        RunError: ``encode`` did not return finite features; the message names ``split`` and ``source``.
    """
    try:
        return extract_features(encode, dataset, **{"description": f"{split} features", **options})
    except ValueError as error:
        raise RunError(f"the {split} split of {source}: {error}") from error


def resolve_device(name: str) -> torch.device:
    """Return the device called ``name``; "auto" is the accelerator if there is one, else the CPU.

    Raises:
        ConfigError: the device does not exist or cannot be used.
    """
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator if accelerator is not None else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"device must be auto or a device of this machine, got {name!r}: {reason}"
        ) from error
    return device


def run_features(run: Run, config: EvaluationConfig, device: torch.device) -> FeatureSplits:
    """Compute the features of all splits of a run's own data, and of augmented training images if a probe is
    fitted to them.

    Raises:
        ConfigError: ``config.features`` is "projection", and the model has no projection head; or a probe
            needs augmented images, and ``data.augmentation`` is none.
        RunError: a split is too small, or a feature is not finite; the message names the split.
    """
    config.check_augmentation(run.config.data.augmentation)
    encode = run.model.to(device).encoder_of(config.features)
    datasets = run.splits()
    features = {}
    for name in SPLITS:
        size = len(datasets[name])
        if size < _MIN_SAMPLES:
            raise RunError(
                f"the {name} split of {run.dir} must hold at least {_MIN_SAMPLES} samples, got {size}"
            )
        features[name] = extract_split(
            encode, datasets[name], name, run.dir, batch_size=config.batch_size, device=device,
            workers=run.data.workers(name, config.batch_size, bytes_per_value=4), progress=config.progress,
        )  # fmt: skip
    head = trained_head(run, "coarse") if config.features == "embedding" else None
    passes = max(config.augmented_passes().values(), default=0)
    augmented = _augmented_features(run, encode, passes, config, device) if passes else None
    return FeatureSplits(**features, head=head, augmented=augmented)


def _augmented_features(
    run: Run, encode: Callable[[Tensor], Tensor], passes: int, config: EvaluationConfig, device: torch.device
) -> Tensor:
    """Features of the augmented training images, [passes, N, D] on the CPU, where the probes are fitted."""
    workers = run.data.workers("train", config.batch_size, bytes_per_value=4)
    found = torch.empty(0)
    for number in range(passes):
        features = extract_split(
            encode, AugmentedDataset(run.data, run.config.seed, number), "augmented train", run.dir,
            batch_size=config.batch_size, device=device, workers=workers, progress=config.progress,
            description=f"features of augmented images {number + 1}/{passes}",
        ).features  # fmt: skip
        if number == 0:
            found = torch.empty(passes, *features.shape, dtype=features.dtype)
        found[number] = features
    return found


def trained_head(run: Run, labels: str) -> LinearHead | None:
    """The classification head, which takes the embedding, if it was trained on ``labels``, else None."""
    head = run.model.classifier
    if head is None or run.config.data.labels != labels or run.model.embedding_dim != head.in_features:
        return None
    if run.model.joint_classifier:  # it takes both parts before they are scaled to unit length
        return None
    weight, bias = (parameter.detach().to("cpu", torch.float64) for parameter in (head.weight, head.bias))
    return LinearHead(weight, bias)
