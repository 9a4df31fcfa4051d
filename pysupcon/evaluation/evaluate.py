"""Evaluate a finished run and write its report to RUN/evaluation."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pysupcon.errors import RunError
from pysupcon.evaluation import pictures
from pysupcon.evaluation.features import resolve_device, run_features
from pysupcon.evaluators import (
    EvaluationConfig,
    FeatureSplits,
    available_evaluators,
    build_evaluators,
    unit_of,
    with_intervals,
)
from pysupcon.reports.report import Metric, Report, metrics_of
from pysupcon.trainer.files import named_disk_errors
from pysupcon.trainer.lock import FolderLock
from pysupcon.trainer.run import Run, open_run
from pysupcon.user_code import name_objects

FOLDER = "evaluation"
METRICS_FILE = "metrics.json"
REPORT_FILE = "report.md"
OUTCOMES_FILE = "outcomes.safetensors"
FILES = (*pictures.FILES, OUTCOMES_FILE, REPORT_FILE, METRICS_FILE)
"""Files of an evaluation in the order of publication. metrics.json is the last: if it exists, the evaluation
is complete."""


def evaluate_run(
    run: Run | str | Path, config: EvaluationConfig | None = None, *, evaluators: Iterable[object] = ()
) -> Report:
    """Evaluate the trained encoder of a run and write RUN/evaluation.

    The files are metrics.json, report.md, pictures, and outcomes.safetensors. The outcomes are the
    evaluators' results per test sample (for each accuracy ``correct``, bool [N], and ``predicted``, int64
    [N]; for the separation its cosines) and the labels ``labels/fine`` and ``labels/coarse``, int64 [N], in
    the order of the test split. All files are written to a temporary folder first: a failed evaluation leaves
    an earlier one unchanged.

    Args:
        run: a finished run or its folder.
        config: arguments of the evaluators; None means those of the run's config.
        evaluators: evaluators of your own in addition (:class:`pysupcon.evaluators.OwnEvaluator` tells what
            they are), or again those that were passed to ``pysupcon.train.run``. Strings are ignored.

    Returns:
        The report that was written.

    Raises:
        RunError: the folder does not exist or holds no run, the weights are missing or damaged, a split is
            too small, a feature is not finite, or a file cannot be written. The message names the file or the
            split.
        ConfigError: the run's config is not valid, ``config.device`` cannot be used, or another process
            evaluates the run.
    """
    run = open_run(run)
    with named_disk_errors(run.dir / FOLDER):
        lock = FolderLock(run.dir, f".{FOLDER}.lock")
    with lock:
        if lock.exclusive:  # what is there was left by evaluations that were killed
            for left in run.dir.glob(f".{FOLDER}-*"):
                shutil.rmtree(left, ignore_errors=True)
        config, passed = config or run.config.evaluation, name_objects(evaluators)
        new = [name for name in passed if name not in config.evaluators]
        return _evaluate(run, replace(config, evaluators=[*config.evaluators, *new]), passed)


def _evaluate(run: Run, config: EvaluationConfig, passed: Mapping[str, Any]) -> Report:
    device = resolve_device(config.device)
    evaluators = build_evaluators(config, passed)
    seconds: dict[str, float] = {}
    start = time.perf_counter()
    splits = run_features(run, config, device)
    start = _record_time(seconds, "features", start)

    results: list[tuple[str, float]] = []
    outcomes = {"labels/fine": splits.test.fine.cpu(), "labels/coarse": splits.test.coarse.cpu()}
    for evaluator in evaluators:
        for name, value in with_intervals(evaluator(splits, progress=config.progress), config.bootstrap):
            if isinstance(value, Tensor):
                outcomes[name] = value
            else:
                results.append((name, value))
        start = _record_time(seconds, evaluator.name, start)
    try:
        metrics = metrics_of(results, partial(unit_of, own=evaluators))
    except ValueError as error:
        raise RunError(f"the evaluation of {run.dir}: {error}") from error

    with named_disk_errors(run.dir / FOLDER), _temporary_folder(run.dir) as folder:
        drawn, not_drawn = pictures.draw_pictures(folder, run, splits, config, outcomes)
        _record_time(seconds, "pictures", start)
        report = Report(
            title=f"Evaluation of {run.dir.resolve().name}",
            metrics=metrics,
            metadata=_metadata(run, splits, config, device, seconds),
            warnings=_warnings(metrics) + not_drawn,
            pictures=drawn,
            confidence=config.bootstrap.confidence,
        )
        write_results(folder, report, outcomes)
        _publish(folder, run.dir / FOLDER)
    return report


@contextmanager
def _temporary_folder(run_dir: Path) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix=f".{FOLDER}-", dir=run_dir))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_results(folder: Path, report: Report, outcomes: dict[str, Tensor]) -> None:
    """Write outcomes.safetensors, report.md and, last, metrics.json into ``folder``."""
    from safetensors.torch import save

    # Entries may share memory, which safetensors does not accept: clone them.
    content = save({name: value.clone() for name, value in sorted(outcomes.items())})
    (folder / OUTCOMES_FILE).write_bytes(content)
    (folder / REPORT_FILE).write_text(report.to_markdown(), encoding="utf-8")
    (folder / METRICS_FILE).write_text(report.to_json(), encoding="utf-8")


def _record_time(seconds: dict[str, float], name: str, start: float) -> float:
    now = time.perf_counter()
    seconds[name] = round(now - start, 3)
    return now


def _warnings(metrics: dict[str, Metric]) -> list[str]:
    """Warnings about collapsed features and probes that did not converge."""
    warnings = []
    if "geometry/collapse/complete" in metrics and metrics["geometry/collapse/complete"].value:
        total = metrics["geometry/variance/total"].value
        warnings.append(f"complete collapse: the total variance of the features is only {total:.2g}")
    elif "geometry/collapse/class" in metrics and metrics["geometry/collapse/class"].value:
        share = metrics["geometry/variance/within_coarse"].value
        warnings.append(
            f"class collapse: {100 * share:.2g} % of the features' variance lies within the coarse classes"
        )
    for name, metric in metrics.items():
        if name.endswith("/converged") and not metric.value:
            probe = name.removesuffix("/converged")
            warnings.append(f"{probe}: the solver did not converge; raise max_iterations")
    return warnings


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


def _publish(folder: Path, target: Path) -> None:
    """Move the files of ``folder`` to ``target`` by atomic renames, in the order of :data:`FILES`."""
    target.mkdir(exist_ok=True)
    for name in FILES:
        if (folder / name).exists():
            os.replace(folder / name, target / name)
        else:
            (target / name).unlink(missing_ok=True)
