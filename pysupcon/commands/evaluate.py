"""From a finished run to its report: frozen features, evaluators, then files in RUN_DIR/evaluation."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pysupcon.errors import ConfigError, RunError
from pysupcon.evaluators import (
    EvaluationConfig,
    FeatureSet,
    FeatureSplits,
    LinearHead,
    available_evaluators,
    build_evaluators,
    project,
    unit_of,
    with_intervals,
)
from pysupcon.reports.charts import OUTCOME_FILES, draw_outcomes
from pysupcon.reports.report import Metric, Picture, Report, metrics_of

if TYPE_CHECKING:
    from pysupcon.trainer.run import Run

FOLDER = "evaluation"
METRICS_FILE = "metrics.json"
REPORT_FILE = "report.md"
OUTCOMES_FILE = "outcomes.safetensors"
EMBEDDING_FILE = "embedding.png"
LOSS_FILE = "loss.png"
#: metrics.json comes last: wherever it is, the other files of its evaluation are.
FILES = (EMBEDDING_FILE, LOSS_FILE, *OUTCOME_FILES, OUTCOMES_FILE, REPORT_FILE, METRICS_FILE)
SPLITS = ("train", "val", "test")
PARTS_OF_THE_LOSS = (
    "contrastive", "infonce", "cross_entropy", "second_cross_entropy", "reconstruction",
)  # fmt: skip
_MIN_SAMPLES = 2


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
    """Features of every image of ``dataset``, in its order, without a graph.

    Args:
        encode: images [B, C, H, W] to embeddings [B, D], on ``device``.
        dataset: items (image, coarse label, fine label).
        batch_size: images a call of ``encode`` takes.
        device: where ``encode`` wants its images; the features stay there, fp32 (fp64 if ``encode`` gives
            that).
        workers: processes that read the images; 0 reads them here.
        progress: show a bar.
        description: of the bar.

    Raises:
        ValueError: ``encode`` gave something else than finite features [B, D].
    """
    batches: Iterable[Any] = DataLoader(dataset, batch_size=batch_size, num_workers=workers)
    if progress:
        from tqdm import tqdm

        batches = tqdm(batches, desc=description, unit="batch", leave=False, delay=2)
    features, coarse, fine = [], [], []
    with torch.inference_mode():
        for images, coarse_labels, fine_labels in batches:
            embedding = encode(images.to(device))
            features.append(embedding.to(torch.promote_types(embedding.dtype, torch.float32)))
            coarse.append(coarse_labels)
            fine.append(fine_labels)
    # Outside of inference mode, so that the result is an ordinary tensor.
    return FeatureSet(torch.cat(features), torch.cat(coarse).to(device), torch.cat(fine).to(device))


def evaluate_run(run: Run | str | Path, config: EvaluationConfig | None = None) -> Report:
    """Judges the trained encoder of a run and writes RUN_DIR/evaluation.

    The files are metrics.json, report.md, pictures, and outcomes.safetensors: what the evaluators found of
    each test sample (for every accuracy whether it was classified rightly, [N] bool, and as what, [N] int64;
    for the separation its cosines), and the samples' ``labels/fine`` and ``labels/coarse``, [N] int64, in the
    order of the test split. All are written whole before the first of an
    earlier evaluation is replaced; one that fails leaves the earlier one as it was.

    Args:
        run: a finished run or its folder.
        config: arguments; None means those that the run was configured with.

    Raises:
        RunError: there is no such folder, it holds no run, its weights are missing or damaged, a split is too
        small,
            or a feature is not finite. The message names the file or the split.
        ConfigError: the run's config is broken.
    """
    run = open_run(run)
    config = config or run.config.evaluation
    device = _device(config.device)
    seconds: dict[str, float] = {}
    start = time.perf_counter()
    splits = _run_features(run, config, device)
    start = _lap(seconds, "features", start)

    results: list[tuple[str, float]] = []
    outcomes = {"labels/fine": splits.test.fine.cpu(), "labels/coarse": splits.test.coarse.cpu()}
    for evaluator in build_evaluators(config):
        for name, value in with_intervals(evaluator(splits, progress=config.progress), config.bootstrap):
            if isinstance(value, Tensor):
                outcomes[name] = value
            else:
                results.append((name, value))
        start = _lap(seconds, evaluator.name, start)
    metrics = metrics_of(results, unit_of)

    folder = Path(tempfile.mkdtemp(prefix=f".{FOLDER}-", dir=run.dir))
    try:
        pictures, warnings = _draw(folder, run, splits, config, outcomes)
        _lap(seconds, "pictures", start)
        report = Report(
            title=f"Evaluation of {run.dir.resolve().name}",
            metrics=metrics,
            metadata=_metadata(run, splits, config, device, seconds),
            warnings=_alarms(metrics) + warnings,
            pictures=pictures,
            confidence=config.bootstrap.confidence,
        )
        _save_outcomes(folder / OUTCOMES_FILE, outcomes)
        (folder / REPORT_FILE).write_text(report.to_markdown(), encoding="utf-8")
        (folder / METRICS_FILE).write_text(report.to_json(), encoding="utf-8")
        _publish(folder, run.dir / FOLDER)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return report


def open_run(run: Run | str | Path) -> Run:
    """A run from its folder; a run is passed on.

    Raises:
        RunError: there is no such folder, or it holds no run.
    """
    if not isinstance(run, (str, Path)):
        return run
    from pysupcon.trainer.run import load_run

    if not Path(run).is_dir():
        raise RunError(f"{run} must be the folder of a run, but there is no such folder")
    return load_run(run)


def _device(name: str) -> torch.device:
    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return found if found is not None else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"device must be auto or a device of this machine, got {name!r}: {reason}"
        ) from error
    return device


def _lap(seconds: dict[str, float], name: str, start: float) -> float:
    now = time.perf_counter()
    seconds[name] = round(now - start, 3)
    return now


def _run_features(run: Run, config: EvaluationConfig, device: torch.device) -> FeatureSplits:
    model = run.model.to(device)
    datasets = run.splits()
    features = {}
    for name in SPLITS:
        size = len(datasets[name])
        if size < _MIN_SAMPLES:
            raise RunError(
                f"the {name} split of {run.dir} must hold at least {_MIN_SAMPLES} samples, got {size}"
            )
        try:
            features[name] = extract_features(
                model.backbone,
                datasets[name],
                batch_size=config.batch_size,
                device=device,
                workers=run.config.data.workers,
                progress=config.progress,
                description=f"{name} features",
            )
        except ValueError as error:
            raise RunError(f"the {name} split of {run.dir}: {error}") from error
    return FeatureSplits(**features, head=_trained_head(run))


def _trained_head(run: Run) -> LinearHead | None:
    """The classification head of a run that was trained on coarse labels, if it reads the embedding."""
    head = run.model.classifier
    if head is None or run.config.data.labels != "coarse" or run.model.embedding_dim != head.in_features:
        return None
    weight, bias = (parameter.detach().to("cpu", torch.float64) for parameter in (head.weight, head.bias))
    return LinearHead(weight, bias)


def _alarms(metrics: dict[str, Metric]) -> list[str]:
    """Sentences for what nobody should overlook."""
    found = []
    if "geometry/collapse/complete" in metrics and metrics["geometry/collapse/complete"].value:
        total = metrics["geometry/variance/total"].value
        found.append(f"complete collapse: all features are one point but for a variance of {total:.2g}")
    elif "geometry/collapse/class" in metrics and metrics["geometry/collapse/class"].value:
        share = metrics["geometry/variance/within_coarse"].value
        found.append(
            f"class collapse: {100 * share:.2g} % of the features' variance lies within the coarse classes"
        )
    for name, metric in metrics.items():
        if name.endswith("/converged") and not metric.value:
            probe = name.removesuffix("/converged")
            found.append(f"{probe}: the solver stopped at its last iteration; raise max_iterations")
    return found


def _draw(
    folder: Path, run: Run, splits: FeatureSplits, config: EvaluationConfig, outcomes: dict[str, Tensor]
) -> tuple[list[Picture], list[str]]:
    """Pictures of the test features, of the outcomes and of the loss, and why one is missing."""
    from pysupcon.reports.pictures import draw_embedding, draw_loss

    points, rows = project(splits.test.features, config.projection)
    rows = rows.to(splits.test.fine.device)
    method = {"tsne": "t-SNE", "pca": "PCA"}[config.projection.method]
    test = run.splits()["test"]
    names = {"fine": dict(enumerate(test.fine_names)), "coarse": dict(enumerate(test.coarse_names))}
    draw_embedding(
        folder / EMBEDDING_FILE,
        points.numpy(),
        splits.test.fine[rows].cpu().numpy(),
        splits.test.coarse[rows].cpu().numpy(),
        title=f"Test features of {run.dir.resolve().name}, {method}",
        axes=(f"{method} 1", f"{method} 2"),
        fine_names=names["fine"],
        coarse_names=names["coarse"],
    )
    shown = "all" if len(points) == len(splits.test) else f"{len(points)} of the"
    caption = f"Frozen features of {shown} {len(splits.test)} test images in two dimensions ({method})."
    pictures = [Picture(EMBEDDING_FILE, caption)]
    pictures += draw_outcomes(folder, {name: values.numpy() for name, values in outcomes.items()}, names)
    if run.config.model.concatenated:  # of frozen parts: it was never trained itself
        return pictures, []
    try:
        steps, losses, chance = loss_curves(run.log())
    except RunError as error:
        return pictures, [f"no loss curve: {error}"]
    draw_loss(folder / LOSS_FILE, steps, losses, chance=chance, title=f"Loss of {run.dir.resolve().name}")
    dashed = "; dashed: the level of an encoder that knows nothing" if chance else ""
    pictures.append(Picture(LOSS_FILE, f"Training loss, and its running mean{dashed}."))
    return pictures, []


def loss_curves(
    log: list[dict[str, Any]],
) -> tuple[list[int], dict[str, list[float]], dict[str, list[float]]]:
    """Steps, losses and chance levels by name, from the lines of a training log.

    A loss that has one part only is shown as that part. ``chance`` is the level of the contrastive part.

    Raises:
        RunError: no line holds a step and a loss.
    """
    lines = [line for line in log if "step" in line and "loss" in line]
    if not lines:
        raise RunError("the log holds no line with a step and a loss")

    def column(key: str) -> list[float]:
        return [float(line.get(key, "nan")) for line in lines]

    parts = [name for name in PARTS_OF_THE_LOSS if any(name in line for line in lines)]
    names = parts if len(parts) == 1 else ["loss", *parts]
    chance = {"contrastive": column("chance")} if any("chance" in line for line in lines) else {}
    return [int(line["step"]) for line in lines], {name: column(name) for name in names}, chance


def _metadata(
    run: Run,
    splits: FeatureSplits,
    config: EvaluationConfig,
    device: torch.device,
    seconds: dict[str, float],
) -> dict[str, Any]:
    arguments = asdict(config)
    unused = set(available_evaluators()) - set(config.evaluators)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "run": run.dir.resolve().name,
        "samples": {split: len(features) for split, features in splits.items()},
        "feature_width": splits.test.features.shape[1],
        "seconds": seconds | {"total": round(sum(seconds.values()), 3)},
        "device": name,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "versions": {"python": platform.python_version()}
        | {package: _version(package) for package in ("pysupcon", "torch", "numpy", "scikit-learn")},
        "arguments": {key: value for key, value in arguments.items() if key not in unused},
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _save_outcomes(path: Path, outcomes: dict[str, Tensor]) -> None:
    from safetensors.torch import save

    # Clones: two entries may share memory, which the format refuses.
    path.write_bytes(save({name: value.clone() for name, value in sorted(outcomes.items())}))


def _publish(folder: Path, target: Path) -> None:
    """Moves the finished files from ``folder`` to ``target``, metrics.json last, each by an atomic rename."""
    target.mkdir(exist_ok=True)
    for name in FILES:
        if (folder / name).exists():
            os.replace(folder / name, target / name)
        else:
            (target / name).unlink(missing_ok=True)


def main(arguments: Sequence[str]) -> int:
    """``python -m pysupcon evaluate RUN_DIR [--options]``: prints the table; returns the exit status."""
    try:
        run, config = _parse(arguments)
        report = evaluate_run(run, config)
    except (RunError, ConfigError) as error:
        print(f"pysupcon evaluate: {error}", file=sys.stderr)
        return 1
    print(report.table())
    print(f"\nwritten to {run.dir / FOLDER}")
    return 0


def _parse(arguments: Sequence[str]) -> tuple[Run, EvaluationConfig]:
    """The run, and the arguments it was configured with, overridden by the command line's."""
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog="python -m pysupcon evaluate",
        usage="%(prog)s RUN_DIR [--FIELD VALUE ...]",
        description=f"Run the evaluators on a finished run; the results go to RUN_DIR/{FOLDER}. "
        "The defaults are the arguments that the run was configured with.",
    )
    parser.add_argument("run_dir", type=str, help="folder of the run")
    parser.add_class_arguments(EvaluationConfig)
    run = open_run(parser.parse_args(arguments).run_dir)
    parser.set_defaults(asdict(run.config.evaluation))
    try:
        parsed = parser.instantiate(parser.parse_args(arguments))
        return run, EvaluationConfig(**{name: value for name, value in parsed.items() if name != "run_dir"})
    except ValueError as error:
        raise ConfigError(str(error)) from error
