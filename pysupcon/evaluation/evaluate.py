"""Evaluate a finished run and write its report to RUN/evaluation, or RUN/evaluation-projection."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping
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
from pysupcon.evaluation.earlier import LABELS, Earlier, free_folder, read_earlier
from pysupcon.evaluation.features import DESCRIPTIONS, resolve_device, run_features
from pysupcon.evaluation.lipschitz import Lipschitz
from pysupcon.evaluators import (
    EvaluationConfig,
    Evaluator,
    FeatureSplits,
    OwnEvaluator,
    ProbeConfig,
    available_evaluators,
    build_evaluators,
    describe,
    headline_of,
    names_and_objects,
    usable_k,
    with_intervals,
)
from pysupcon.reading import one_line
from pysupcon.reports.evaluated_runs import EVALUATION, EVALUATIONS
from pysupcon.reports.page import to_html
from pysupcon.reports.report import Metric, Picture, Report, metrics_of
from pysupcon.trainer.files import named_disk_errors
from pysupcon.trainer.lock import FolderLock
from pysupcon.trainer.run import Run, open_run

_MAX_NAMES = 100
"""Classes whose names the report lists"""
METRICS_FILE = "metrics.json"
REPORT_FILE = "report.md"
PAGE_FILE = "report.html"
OUTCOMES_FILE = "outcomes.safetensors"
FILES = (*pictures.FILES, OUTCOMES_FILE, REPORT_FILE, PAGE_FILE, METRICS_FILE)
"""Files of an evaluation in the order of publication. metrics.json is the last: if it exists, the evaluation
is complete."""


def evaluate_run(
    run: Run | str | Path, config: EvaluationConfig | None = None, *, evaluators: object = ()
) -> Report:
    """Evaluate the trained encoder of a run and write RUN/evaluation, or RUN/evaluation-projection for
    ``config.features="projection"``.

    The files are metrics.json, report.md, report.html, pictures, and outcomes.safetensors. The outcomes are
    the evaluators' results per test sample (for each accuracy ``correct``, bool [N], and ``predicted``, int64
    [N]; for the separation its cosines) and the labels ``labels/fine`` and ``labels/coarse``, int64 [N], in
    the order of the test split. All files are written to a temporary folder first: a failed evaluation leaves
    an earlier one unchanged.

    Results of other evaluators from an earlier evaluation of the same weights and test samples are kept, and
    their settings stand in the report. An evaluation of other weights is moved to RUN/evaluation-1 (-2, ...).
    The evaluations of the embedding and of the projection have folders of their own, and neither changes the
    other.

    Args:
        run: a finished run or its folder.
        config: arguments of the evaluators; None means those of the run's config.
        evaluators: the evaluators that run: names, references, and objects of your own
            (:class:`pysupcon.evaluators.OwnEvaluator` tells what they are); one or several. Without any,
            those of ``config`` run.

    Returns:
        The report that was written.

    Raises:
        RunError: an evaluator of your own failed (what the others found is written), the folder does not
            exist or holds no run, the weights are missing or damaged, a split is too small, a feature is not
            finite, or a file cannot be written. The message names the evaluator, the file or the split.
        ConfigError: the run's config is not valid, ``config.device`` cannot be used, ``config.features`` is
            "projection" and the model has no projection head, a probe needs augmented images and the run has
            no augmentation, or another process evaluates the run.
    """
    run = open_run(run)
    with named_disk_errors(run.dir / EVALUATION):
        lock = FolderLock(run.dir, f".{EVALUATION}.lock")
    with lock:
        if lock.exclusive:  # what is there was left by evaluations that were killed
            for left in run.dir.glob(f".{EVALUATION}-*"):
                shutil.rmtree(left, ignore_errors=True)
        config = config or run.config.evaluation
        names, passed = names_and_objects(evaluators)
        if names:
            arguments = {name: given for name, given in config.evaluator_args.items() if name in names}
            config = replace(config, evaluators=names, evaluator_args=arguments)
        return _evaluate(run, config, passed)


def _evaluate(run: Run, config: EvaluationConfig, passed: Mapping[str, Any]) -> Report:
    device, target = resolve_device(config.device), run.dir / EVALUATIONS[config.features]
    if run.config.data.train_on_val:
        config.check_choices()
    evaluators = build_evaluators(config, passed)
    measured = run.config.model.spectral_norm if config.lipschitz is None else config.lipschitz
    if measured:
        evaluators.append(Lipschitz(run, device, config))
    seconds: dict[str, float] = {}
    start = time.perf_counter()
    splits = run_features(run, config, device)
    start = _record_time(seconds, "features", start)
    labels = dict(zip(LABELS, (splits.test.fine.cpu(), splits.test.coarse.cpu()), strict=True))
    metrics: dict[str, Metric] = {}
    found: dict[str, Tensor] = {}
    done, failures = [], []
    for evaluator in evaluators:
        try:
            of_one, outcomes_of_one = _results(evaluator, splits, config)
        except Exception as error:  # the user's code or backbone: the other evaluators' results are kept
            if not isinstance(evaluator, (OwnEvaluator, Lipschitz)) or len(evaluators) == 1:
                raise
            traceback.print_exc()
            failures.append(error)
        else:
            metrics, found = metrics | of_one, found | outcomes_of_one
            done.append(evaluator)
        start = _record_time(seconds, evaluator.name, start)
    if not done:
        raise failures[0]
    weights = run.weights_digest()
    replaced = [evaluator.name for evaluator in done]
    kept, unfit = _earlier_results(target, weights, config, labels, replaced)
    outcomes = (kept.outcomes if kept else {}) | labels | found

    with named_disk_errors(target), _temporary_folder(run.dir) as folder:
        drawn: list[Picture] = []
        not_drawn: list[str] = []
        if config.pictures:
            drawn, not_drawn = pictures.draw_pictures(folder, run, splits, config, outcomes)
            _record_time(seconds, "pictures", start)
        metadata = {"weights_sha256": weights} | _metadata(run, splits, config, device, seconds)
        notes = _notes(config, splits, done, metrics) + _augmented_notes(run, config)
        headline = headline_of(list(metrics), done)
        if kept and kept.evaluators:
            metrics = _in_order(kept.metrics(config.bootstrap) | metrics, kept.order)
            metadata["kept"] = kept.settings()
            notes += kept.notes
            notes.append(f"kept from an earlier evaluation of these weights: {', '.join(kept.evaluators)}")
        aside = free_folder(target) if unfit else None
        if aside:
            notes.append(
                f"an earlier evaluation, of other weights or by an older version, is in {aside.name}"
            )
        report = Report(
            title=f"Evaluation of {_evaluated(config)}{run.dir.resolve().name}",
            metrics=metrics,
            metadata=metadata,
            warnings=[one_line(error) for error in failures] + _warnings(metrics) + not_drawn,
            pictures=drawn,
            confidence=config.bootstrap.confidence,
            notes=notes,
            headline=headline,
        )
        write_results(folder, report, outcomes)
        _publish(folder, target, aside)
    if failures:
        raise RunError(f"{one_line(failures[0])}; the results of the other evaluators are in {target}")
    return report


def _results(
    evaluator: Evaluator | OwnEvaluator, splits: FeatureSplits, config: EvaluationConfig
) -> tuple[dict[str, Metric], dict[str, Tensor]]:
    """The metrics of an evaluator, with intervals, and its outcomes."""
    results: list[tuple[str, float]] = []
    outcomes: dict[str, Tensor] = {}
    for name, value in with_intervals(evaluator(splits, progress=config.progress), config.bootstrap):
        if isinstance(value, Tensor):
            outcomes[name] = value
        else:
            results.append((name, value))
    try:
        return metrics_of(results, partial(describe, own=[evaluator])), outcomes
    except ValueError as error:
        raise RunError(f"evaluator {evaluator.name}: {error}") from error


def _evaluated(config: EvaluationConfig) -> str:
    return "the projection head of " if config.features == "projection" else ""


def _earlier_results(
    folder: Path, weights: str, config: EvaluationConfig, labels: Mapping[str, Tensor], evaluators: list[str]
) -> tuple[Earlier | None, bool]:
    """The results of an earlier evaluation in ``folder`` that ``evaluators`` do not replace, and whether
    there is an evaluation that does not fit to the weights, features and labels of this one."""
    if not (folder / METRICS_FILE).exists():
        return None, False
    earlier = read_earlier(folder, METRICS_FILE, OUTCOMES_FILE)
    if earlier is None or not earlier.fits(weights, DESCRIPTIONS[config.features], labels):
        return None, True
    return earlier.without(evaluators), False


def _in_order(metrics: dict[str, Metric], order: list[str]) -> dict[str, Metric]:
    """Metrics by the rank of their evaluator in ``order``; those of other evaluators are last."""
    ranks = {name: rank for rank, name in enumerate(order)}
    return dict(sorted(metrics.items(), key=lambda item: ranks.get(item[0].partition("/")[0], len(ranks))))


@contextmanager
def _temporary_folder(run_dir: Path) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix=f".{EVALUATION}-", dir=run_dir))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_results(folder: Path, report: Report, outcomes: dict[str, Tensor]) -> None:
    """Write outcomes.safetensors, report.md, report.html and, last, metrics.json into ``folder``, which
    holds the pictures."""
    from safetensors.torch import save

    # Entries may share memory, which safetensors does not accept: clone them.
    content = save({name: value.clone() for name, value in sorted(outcomes.items())})
    report.metadata["outcomes_sha256"] = hashlib.sha256(content).hexdigest()
    (folder / OUTCOMES_FILE).write_bytes(content)
    (folder / REPORT_FILE).write_text(report.to_markdown(), encoding="utf-8")
    (folder / PAGE_FILE).write_text(to_html(report, folder), encoding="utf-8")
    (folder / METRICS_FILE).write_text(report.to_json(), encoding="utf-8")


def last_lines(report: Report, run_dir: Path) -> str:
    """What a terminal shows of an evaluation: at most 14 lines."""
    part = next((name for name, text in DESCRIPTIONS.items() if text == report.metadata.get("features")), "")
    page = run_dir / EVALUATIONS.get(part, EVALUATION) / PAGE_FILE
    return f"{report.summary()}\nall {len(report.metrics)} results: {page}\nrun: {run_dir}"


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
            f"class collapse: {100 * share:.2g} % of the features' variance lies within the coarse classes, "
            "so a short linear probe can hardly tell finer classes apart (SpreadLoss keeps them apart)"
        )
    for name, metric in metrics.items():
        if name.endswith("/converged") and not metric.value:
            probe = name.removesuffix("/converged")
            option = f"{probe.partition('/')[0]}.max_iterations"
            warnings.append(
                f"{probe}: the solver did not converge; pysupcon evaluate RUN --{option} 50000 gives it more "
                "iterations"
            )
    return warnings


def _notes(
    config: EvaluationConfig,
    splits: FeatureSplits,
    evaluators: list[Evaluator | OwnEvaluator],
    metrics: Mapping[str, Metric],
) -> list[str]:
    """What was left out, and choices at the end of their range."""
    notes, size = [], len(splits.train)
    left_out = sorted(set(config.knn.k) - set(usable_k(config.knn.k, size)))
    if left_out and any(evaluator.name == "knn" for evaluator in evaluators):
        numbers = ", ".join(map(str, left_out))
        notes.append(f"knn: k = {numbers} left out: above half of the {size} training samples")
    if "coarse" not in splits.levels:
        notes.append("the data have one level of labels: fine and coarse are the same classes")
    for evaluator in evaluators:
        probe = getattr(config, evaluator.name, None)
        if not isinstance(probe, ProbeConfig) or probe.solver != "logistic" or len(probe.penalties) < 2:
            continue
        least = min(probe.penalties)
        for name, metric in metrics.items():
            if name.startswith(f"{evaluator.name}/") and name.endswith("/chosen") and metric.value == least:
                notes.append(
                    f"{name.removesuffix('/chosen')}: the smallest L2 penalty, {least:g}, had the best "
                    f"validation accuracy; a smaller one in --{evaluator.name}.penalties may be better"
                )
    return notes


def _augmented_notes(run: Run, config: EvaluationConfig) -> list[str]:
    """Which evaluators were fitted to augmented images."""
    source = f"data.augmentation={run.config.data.augmentation}, seed {run.config.seed}"
    return [
        f"{name}: fitted to features of {passes} {'pass' if passes == 1 else 'passes'} over augmented "
        f"training images ({source}), not of plain ones"
        for name, passes in config.augmented_passes().items()
    ]


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
        "features": DESCRIPTIONS[config.features],
        "samples": {split: len(features) for split, features in splits.items()},
        "feature_width": splits.test.features.shape[1],
        "seconds": seconds | {"total": round(sum(seconds.values()), 3)},
        "device": name,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "versions": {"python": platform.python_version()}
        | {package: _version(package) for package in ("pysupcon", "torch", "numpy", "scikit-learn")},
        "arguments": {key: value for key, value in arguments.items() if key not in unused},
        "classes": _class_names(run),
    }


def _class_names(run: Run) -> dict[str, dict[str, str]]:
    """Names of the classes by level and label, as in class=LABEL in the names of results."""
    test = run.splits()["test"]
    names = {"fine": test.fine_names, "coarse": test.coarse_names}
    return {
        level: {str(label): str(name) for label, name in enumerate(of_level)}
        for level, of_level in names.items()
        if len(of_level) <= _MAX_NAMES
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _publish(folder: Path, target: Path, aside: Path | None) -> None:
    """Move the files of ``folder`` to ``target`` by atomic renames, in the order of :data:`FILES`.

    What is in ``target`` is renamed to ``aside`` before, if that is given, and renamed back if a file cannot
    be moved.
    """
    if aside:
        os.replace(target, aside)
    try:
        target.mkdir(exist_ok=True)
        for name in FILES:
            if (folder / name).exists():
                os.replace(folder / name, target / name)
            else:
                (target / name).unlink(missing_ok=True)
    except OSError:
        if aside:
            shutil.rmtree(target, ignore_errors=True)
            os.replace(aside, target)
        raise
