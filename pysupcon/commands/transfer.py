"""``python -m pysupcon transfer RUN --data.dataset NAME ...``: a finished run's encoder on another data set.

The encoder stays frozen; a linear head for the fine labels is chosen on validation samples and trained once
more on training and validation samples together. The results go to RUN/transfer/NAME.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pysupcon.commands.evaluate import (
    METRICS_FILE,
    OUTCOMES_FILE,
    REPORT_FILE,
    SPLITS,
    _device,
    _save_outcomes,
    extract_features,
    open_run,
)
from pysupcon.data.config import DataConfig
from pysupcon.errors import ConfigError, RunError
from pysupcon.evaluators import (
    BootstrapConfig,
    FeatureSplits,
    Transfer,
    TransferConfig,
    unit_of,
    with_intervals,
)
from pysupcon.reports.charts import draw_confusion
from pysupcon.reports.report import Picture, Report, metrics_of

if TYPE_CHECKING:
    from pysupcon.trainer.run import Run

FOLDER = "transfer"
CONFUSION_FILE = "confusion.png"


@dataclass
class TransferArguments:
    """Another data set for a frozen encoder."""

    data: DataConfig = field(default_factory=DataConfig)
    """The data set. Its images are resized to the size that the encoder was trained on; the head learns its
    fine labels."""

    probe: TransferConfig = field(default_factory=TransferConfig)
    """The linear head."""

    bootstrap: BootstrapConfig = field(default_factory=BootstrapConfig)
    """The interval of the accuracy."""

    batch_size: int = 256
    """Images the encoder takes at once."""

    device: str = "auto"
    """Where the encoder runs: cpu, cuda, ...; auto is an accelerator if any."""

    progress: bool = True
    """Bars for what takes seconds."""


def transfer_features(run: Run, arguments: TransferArguments) -> tuple[FeatureSplits, Any]:
    """Frozen features of the data set's three splits, and its test split.

    Raises:
        ConfigError: the data set cannot be read, or has another number of channels than the encoder takes.
        RunError: the encoder gave something that is not finite.
    """
    from pysupcon.data.datamodule import DataModule, EvaluationDataset

    config = arguments.data
    size, channels = run.data.image_size, run.data.channels
    if config.image_size not in (None, size):
        raise ConfigError(
            f"data.image_size must be that of the run, {size}, or left out, got {config.image_size}"
        )
    config.image_size = size
    config.labels = "fine"
    config.check()
    config.resolve()
    data = DataModule(config)
    if data.channels != channels and data.channels != 1:
        raise ConfigError(
            f"data.dataset={config.dataset} has {data.channels} channels, but the encoder of {run.dir} was "
            f"trained on {channels}"
        )
    device = _device(arguments.device)
    backbone = run.model.to(device).backbone

    def encode(images: Tensor) -> Tensor:
        return backbone(images.expand(-1, channels, -1, -1))  # grey images for an encoder of colours

    features: dict[str, Any] = {}
    for name in SPLITS:
        # Normalised as the encoder's own training images were, not by the new data's statistics.
        dataset = EvaluationDataset(
            data.splits[name], size, run.data.normalize, data.coarse_names, data.fine_names
        )
        try:
            features[name] = extract_features(
                encode,
                dataset,
                batch_size=arguments.batch_size,
                device=device,
                workers=config.workers,
                progress=arguments.progress,
                description=f"{name} features",
            )
        except ValueError as error:
            raise RunError(f"the {name} split of {config.dataset}: {error}") from error
    return FeatureSplits(features["train"], features["val"], features["test"]), data


def transfer_run(run: Run | str | Path, arguments: TransferArguments) -> Report:
    """Judges the run's frozen encoder on another data set and writes RUN/transfer/NAME.

    Raises:
        RunError, ConfigError: see :func:`transfer_features` and
            :func:`pysupcon.commands.evaluate.evaluate_run`.
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
    dataset = arguments.data.dataset
    folder = run.dir / FOLDER / dataset
    folder.mkdir(parents=True, exist_ok=True)
    title = f"Transfer of {run.dir.resolve().name} to {dataset}"
    draw_confusion(
        folder / CONFUSION_FILE,
        outcomes["labels/fine"].numpy(),
        outcomes["transfer/predicted"].numpy(),
        title=title,
        names=dict(enumerate(data.fine_names)),
    )
    report = Report(
        title=title,
        metrics=metrics_of(results, unit_of),
        metadata={
            "run": run.dir.resolve().name,
            "dataset": dataset,
            "samples": {split: len(features) for split, features in splits.items()},
            "feature_width": splits.test.features.shape[1],
            "seconds": round(time.perf_counter() - start, 3),
            "arguments": {"data": asdict(arguments.data), "probe": asdict(arguments.probe)},
        },
        pictures=[Picture(CONFUSION_FILE, f"Confusion of the classes of {dataset} by the linear head.")],
        confidence=arguments.bootstrap.confidence,
    )
    _save_outcomes(folder / OUTCOMES_FILE, outcomes)
    (folder / REPORT_FILE).write_text(report.to_markdown(), encoding="utf-8")
    (folder / METRICS_FILE).write_text(report.to_json(), encoding="utf-8")
    return report


def main(arguments: Sequence[str]) -> int:
    """Prints the table; returns the exit status."""
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog="python -m pysupcon transfer",
        description="Judge a finished run's frozen encoder on another data set; "
        f"the results go to RUN/{FOLDER}.",
    )
    parser.add_argument("run_dir", type=str, help="folder of the run")
    parser.add_class_arguments(TransferArguments)
    try:
        parsed = parser.instantiate(parser.parse_args(arguments))
        run = open_run(parsed.run_dir)
        chosen = TransferArguments(
            **{name: value for name, value in parsed.items() if name not in ("run_dir", "config")}
        )
        report = transfer_run(run, chosen)
    except (RunError, ConfigError, ValueError) as error:
        print(f"pysupcon transfer: {error}", file=sys.stderr)
        return 1
    print(report.table())
    print(f"\nwritten to {run.dir / FOLDER / chosen.data.dataset}")
    return 0
