"""``python -m pysupcon infer-groups RUN [RUN ...] --output FILE``: hidden subgroups of the classes.

The second step of Sohoni et al. 2020 (arXiv 2011.12945), with the features of one run or, as Thanos has them
(arXiv 2204.07596), of several side by side: within each class of the training split they are reduced and
clustered, and the clusters are written to a file that ``data.groups`` takes. The validation samples get the
group of their class that they fit best.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pysupcon.commands.evaluate import _device, extract_features, open_run
from pysupcon.data.group_files import Groups, fingerprint, write_groups
from pysupcon.errors import ConfigError, RunError
from pysupcon.evaluators import SubgroupConfig, infer_groups, recovery

if TYPE_CHECKING:
    from pysupcon.data.datamodule import DataModule
    from pysupcon.trainer.run import Run

SPLITS = ("train", "val")
_DATA = ("dataset", "labels", "split_seed", "val_fraction", "test_fraction", "spurious_rate")


@dataclass
class InferenceArguments:
    """How groups are inferred."""

    subgroups: SubgroupConfig = field(default_factory=SubgroupConfig)
    """Reducing and clustering the features of a class."""

    batch_size: int = 256
    """Images the encoder takes at once."""

    device: str = "auto"
    """Where the encoder runs: cpu, cuda, ...; auto is an accelerator if any."""

    progress: bool = True
    """Bars for what takes seconds."""


@dataclass(frozen=True)
class Inference:
    """What :func:`infer_from_runs` found.

    Attributes:
        groups: as a training takes them.
        truth: [N] int64, the true group of every training sample.
        class_names: of the classes, by their labels.
        group_names: class and fine label of every true group, by its number.
        silhouettes: of each class, by its label.
        f1, purity: how well the groups tell the true ones; see
            :func:`pysupcon.evaluators.recovery`.
    """

    groups: Groups
    truth: Tensor
    class_names: list[str]
    group_names: dict[int, str]
    silhouettes: dict[int, float]
    f1: float
    purity: float

    def table(self) -> str:
        """Sizes, silhouettes and recovery, as text."""
        lines = [
            f"{'group':>5}  {'samples':>7}  {'silhouette':>10}  {'pure':>6}  class; most frequent true group"
        ]
        for group, label in enumerate(self.groups.parent.tolist()):
            members = self.truth[self.groups.train == group]
            true, counts = members.unique(return_counts=True)
            most = int(counts.argmax())
            lines.append(
                f"{group:>5}  {len(members):>7}  {self.silhouettes[label]:>10.3f}  "
                f"{100 * int(counts[most]) / len(members):>5.1f}%  {self.class_names[label]}; "
                f"{self.group_names[int(true[most])]}"
            )
        lines += [
            "",
            f"recovery of the {len(self.truth.unique())} true groups: F1 {100 * self.f1:.1f} %, "
            f"purity {100 * self.purity:.1f} %",
        ]
        return "\n".join(lines)


def infer_from_runs(
    runs: Sequence[Run | str | Path], output: str | Path, arguments: InferenceArguments | None = None
) -> Inference:
    """Groups from the embeddings of finished runs, written to ``output``.

    Args:
        runs: one, or several whose embeddings are put side by side (each of unit length, if
            ``subgroups.normalize``); all trained on the same samples.
        output: the groups file.
        arguments: None means the defaults.

    Raises:
        RunError: a run is not finished or damaged, the runs have other samples, or the file cannot be
            written.
        ConfigError: a run's config is broken.
    """
    arguments = arguments or InferenceArguments()
    opened = [open_run(run) for run in runs]
    if not opened:
        raise RunError("infer-groups needs a run, got none")
    data = opened[0].data
    labels = _classes(data)
    made_for = {name: fingerprint(data.splits[name], labels[name]) for name in SPLITS}
    for run in opened[1:]:
        other, theirs = run.data, _classes(run.data)
        for name in SPLITS:
            if fingerprint(other.splits[name], theirs[name]) != made_for[name]:
                raise RunError(
                    f"the runs must have the same {name} samples and classes for their embeddings to be put "
                    f"side by side; those of {run.dir} are others than those of {opened[0].dir}"
                )
    parts = [_embeddings(run, arguments) for run in opened]
    features = {name: torch.cat([part[name] for part in parts], dim=1) for name in SPLITS}
    found = infer_groups(features["train"], labels["train"], arguments.subgroups)
    recovered = recovery(found.groups, data.true_groups["train"])
    groups = Groups(
        found.groups,
        found.predict(features["val"], labels["val"]),
        found.parent,
        made_from={
            "data": {name: getattr(data.config, name) for name in _DATA},
            "runs": [_identity(run) for run in opened],
            "subgroups": asdict(arguments.subgroups),
            "silhouettes": found.silhouettes,
            "recovery": recovered._asdict(),
            "versions": {name: metadata.version(name) for name in ("torch", "scikit-learn")},
        },
    )
    try:
        write_groups(Path(output), groups, data.splits, labels)
    except OSError as error:
        raise RunError(f"--output {output} could not be written: {error.strerror or error}") from error
    names = {}
    for name, numbers in data.true_groups.items():
        fine = data.splits[name].fine
        for number in numbers.unique().tolist():
            names[number] = data.fine_names[int(fine[numbers == number][0])]
    return Inference(
        groups,
        data.true_groups["train"],
        data.class_names,
        names,
        dict(zip(found.classes.tolist(), found.silhouettes, strict=True)),
        *recovered,
    )


def _classes(data: DataModule) -> dict[str, Tensor]:
    """The labels that are trained on, int64 [N] by split."""
    fine = data.config.labels == "fine"
    return {name: samples.fine if fine else samples.coarse for name, samples in data.splits.items()}


def _embeddings(run: Run, arguments: InferenceArguments) -> dict[str, Tensor]:
    """[N, D] fp64 on the CPU, by split."""
    device = _device(arguments.device)
    backbone, datasets = run.model.to(device).backbone, run.splits()
    features = {}
    for name in SPLITS:
        try:
            found = extract_features(
                backbone,
                datasets[name],
                batch_size=arguments.batch_size,
                device=device,
                workers=run.config.data.workers,
                progress=arguments.progress,
                description=f"{name} features of {run.dir.name}",
            )
        except ValueError as error:
            raise RunError(f"the {name} split of {run.dir}: {error}") from error
        rows = found.features.to("cpu", torch.float64)
        features[name] = F.normalize(rows, dim=1) if arguments.subgroups.normalize else rows
    return features


def _identity(run: Run) -> dict[str, Any]:
    """Name, loss and weights of a run: what tells it from others, wherever it lies."""
    from pysupcon.trainer.run import WEIGHTS_FILE

    weights = hashlib.sha256((run.dir / WEIGHTS_FILE).read_bytes()).hexdigest()
    return {
        "name": run.dir.resolve().name,
        "seed": run.config.seed,
        "loss": asdict(run.config.loss),
        "weights": weights,
    }


def main(arguments: Sequence[str]) -> int:
    """Prints the groups' table and writes the file; returns the exit status."""
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog="python -m pysupcon infer-groups",
        description="Infer subgroups of the classes from the embeddings of one or more finished runs, for "
        "training with data.groups.",
    )
    parser.add_argument("runs", type=str, nargs="+", metavar="RUN", help="folder of a finished run")
    parser.add_argument("--output", type=str, required=True, metavar="FILE", help="the groups file")
    parser.add_class_arguments(InferenceArguments)
    try:
        parsed = parser.instantiate(parser.parse_args(arguments))
        chosen = InferenceArguments(**{key: parsed[key] for key in vars(InferenceArguments())})
        found = infer_from_runs(parsed.runs, parsed.output, chosen)
    except (RunError, ConfigError, ValueError, ImportError) as error:
        print(f"pysupcon infer-groups: {error}", file=sys.stderr)
        return 1
    print(found.table())
    print(f"\nwritten to {parsed.output}; train with --data.groups {parsed.output}")
    return 0
