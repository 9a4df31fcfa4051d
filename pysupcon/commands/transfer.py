"""``pysupcon transfer RUN --data.dataset NAME``: evaluate a finished run's encoder on another data set.

The encoder stays frozen. The hyperparameters of a linear head for the fine labels are chosen on the
validation samples; the head is then trained on the training and validation samples together. The results are
written to RUN/transfer/NAME.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import Tensor

from pysupcon.commands import config_parser, program
from pysupcon.data.config import DATASETS_WITH_TEST_SPLIT, DataConfig
from pysupcon.data.datamodule import DataModule, EvaluationDataset
from pysupcon.data.unreadable import describe_skipped
from pysupcon.errors import ConfigError, RunError
from pysupcon.evaluation.evaluate import write_results
from pysupcon.evaluation.features import SPLITS, extract_split, resolve_device
from pysupcon.evaluators import (
    BootstrapConfig,
    FeatureSet,
    FeatureSplits,
    Transfer,
    TransferConfig,
    describe,
    headline_of,
    with_intervals,
)
from pysupcon.reading import join_lists, list_options
from pysupcon.reports.charts import draw_confusion
from pysupcon.reports.report import Picture, Report, metrics_of
from pysupcon.trainer.files import named_disk_errors
from pysupcon.trainer.progress import print_line
from pysupcon.trainer.run import SKIPPED_FILE, Run, open_run, pack_skipped

FOLDER = "transfer"
CONFUSION_FILE = "confusion.png"


@dataclass
class TransferArguments:
    """Arguments of the transfer to another data set."""

    data: DataConfig = field(default_factory=DataConfig)
    """The data set. Its images are resized to the image size of the run; the head is trained on its fine
    labels."""

    probe: TransferConfig = field(default_factory=TransferConfig)
    """The linear head."""

    bootstrap: BootstrapConfig = field(default_factory=BootstrapConfig)
    """The confidence interval of the accuracy."""

    pictures: bool = True
    """Draw the confusion matrix."""

    batch_size: int = 256
    """Images per forward pass of the encoder."""

    device: str = "auto"
    """Device of the encoder: cpu, cuda, ...; auto is the accelerator if there is one, else the CPU."""

    progress: bool = True
    """Show progress bars."""


def transfer_features(run: Run, arguments: TransferArguments) -> tuple[FeatureSplits, DataModule]:
    """Compute the frozen features of another data set.

    Args:
        run: the run of the encoder.
        arguments: the data set, batch size and device.

    Returns:
        Features of the three splits, and the data.

    Raises:
        ConfigError: the data set cannot be read, or its number of channels does not fit the encoder.
        RunError: a feature is not finite.
    """
    config = arguments.data
    size, channels = run.data_of_model.image_size, run.data_of_model.channels
    if config.image_size not in (None, size):
        raise ConfigError(
            f"data.image_size must be that of the run, {size}, or left out, got {config.image_size}"
        )
    vectors = size == 0
    config.image_size = None if vectors else size
    config.labels = "fine"
    for name, unset in (("train_on_val", False), ("view_partners", "own")):
        if getattr(config, name) != unset:
            why = "validation images choose the probe" if name == "train_on_val" else "it has no effect here"
            raise ConfigError(f"data.{name} must be left out for transfer: {why}")
    config.check()
    config.resolve()
    data = DataModule(config)
    if data.skipped:
        print_line(describe_skipped(data.skipped))
    if (data.image_size == 0) != vectors or (vectors and data.channels != channels):
        here, there = (
            "images" if shape[1] else f"vectors of {shape[0]} features"
            for shape in ((data.channels, data.image_size), (channels, size))
        )
        raise ConfigError(
            f"data.dataset={config.dataset} has {here}, but the encoder of {run.dir} was trained on {there}"
        )
    if data.channels != channels and data.channels != 1:
        raise ConfigError(
            f"data.dataset={config.dataset} has {data.channels} channels, but the encoder of {run.dir} was "
            f"trained on {channels}"
        )
    device = resolve_device(arguments.device)
    backbone = run.model.to(device).backbone

    def encode(images: Tensor) -> Tensor:
        inputs = images if vectors else images.expand(-1, channels, -1, -1)  # greyscale to RGB
        embedding: Tensor = backbone(inputs)
        return embedding

    features: dict[str, FeatureSet] = {}
    for name in SPLITS:
        # The images are normalised by the statistics of the run's training images, not by their own.
        dataset = EvaluationDataset(
            data.splits[name], size, run.data_of_model.normalize, data.coarse_names, data.fine_names
        )
        features[name] = extract_split(
            encode, dataset, name, config.dataset, batch_size=arguments.batch_size, device=device,
            workers=data.workers(name, arguments.batch_size, bytes_per_value=4),
            progress=arguments.progress,
        )  # fmt: skip
    return FeatureSplits(features["train"], features["val"], features["test"]), data


def transfer_run(run: Run | str | Path, arguments: TransferArguments) -> Report:
    """Evaluate the run's frozen encoder on another data set and write RUN/transfer/NAME.

    Args:
        run: a finished run or its folder.
        arguments: the data set and the linear head.

    Returns:
        The report that was written.

    Raises:
        RunError, ConfigError: see :func:`transfer_features` and
            :func:`pysupcon.evaluation.evaluate.evaluate_run`.
    """
    run = open_run(run)
    start = time.perf_counter()
    splits, data = transfer_features(run, arguments)
    results: list[tuple[str, float]] = []
    outcomes = {"labels/fine": splits.test.fine.cpu(), "labels/coarse": splits.test.coarse.cpu()}
    evaluator = Transfer(arguments.probe)
    for name, value in with_intervals(evaluator(splits, progress=arguments.progress), arguments.bootstrap):
        if isinstance(value, Tensor):
            outcomes[name] = value
        else:
            results.append((name, value))
    metrics = metrics_of(results, describe)
    dataset = arguments.data.dataset
    folder = run.dir / FOLDER / dataset
    title = f"Transfer of {run.dir.resolve().name} to {dataset}"
    pictures = []
    with named_disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFUSION_FILE).unlink(missing_ok=True)
        if arguments.pictures:
            draw_confusion(
                folder / CONFUSION_FILE,
                outcomes["labels/fine"].numpy(),
                outcomes["transfer/predicted"].numpy(),
                title=title,
                names=dict(enumerate(data.fine_names)),
            )
            pictures.append(Picture(CONFUSION_FILE, f"Confusion matrix of the linear head on {dataset}."))
    report = Report(
        title=title,
        metrics=metrics,
        metadata={
            "run": run.dir.resolve().name,
            "dataset": dataset,
            "samples": {split: len(features) for split, features in splits.items()},
            "feature_width": splits.test.features.shape[1],
            "seconds": round(time.perf_counter() - start, 3),
            "arguments": {"data": asdict(arguments.data), "probe": asdict(arguments.probe)},
        },
        warnings=_seen_in_training(run, arguments.data),
        pictures=pictures,
        confidence=arguments.bootstrap.confidence,
        headline=headline_of(list(metrics), [evaluator]),
    )
    with named_disk_errors(folder):
        if data.skipped is not None:
            (folder / SKIPPED_FILE).write_bytes(pack_skipped(data.skipped))
        write_results(folder, report, outcomes)
    return report


def _seen_in_training(run: Run, config: DataConfig) -> list[str]:
    """A warning if test images may be training images of the encoder."""
    own = run.config.data
    if (config.dataset, config.root) != (own.dataset, own.root):
        return []
    return [
        f"data.{name} is {getattr(config, name)}, but {getattr(own, name)} in the training of the encoder on "
        "the same data: test images may be its training images"
        for name in ("test_fraction", "split_seed")
        if getattr(config, name) != getattr(own, name) and config.dataset not in DATASETS_WITH_TEST_SPLIT
    ]


def main(arguments: Sequence[str]) -> int:
    """Print the table of results; return the exit status."""
    parser = config_parser(
        prog=f"{program()} transfer",
        description="Evaluate a finished run's frozen encoder on another data set and write the results to "
        f"RUN/{FOLDER}/NAME.",
    )
    parser.add_argument("run_dir", type=str, help="folder of the run")
    parser.add_class_arguments(TransferArguments)
    arguments = join_lists(arguments, list_options(TransferArguments))
    try:
        if parser.parse_args(arguments, defaults=False).get("data.dataset") is None:
            raise ConfigError("data.dataset must be given: the name of the data set to transfer to")
        parsed = parser.instantiate(parser.parse_args(arguments))
        run = open_run(parsed.run_dir)
        chosen = TransferArguments(
            **{name: value for name, value in parsed.items() if name not in ("run_dir", "config")}
        )
        report = transfer_run(run, chosen)
    except (RunError, ConfigError, ValueError) as error:
        print(f"pysupcon transfer: {error}", file=sys.stderr)
        return 1
    print(report.summary())
    print(f"written to {run.dir / FOLDER / chosen.data.dataset}")
    return 0
