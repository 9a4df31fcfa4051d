"""``pysupcon infer-groups RUN [RUN ...] --output FILE``: infer hidden subgroups of the classes.

This is the second step of Sohoni et al. 2020 (arXiv 2011.12945). The features come from one run, or from
several runs whose features are concatenated, as in Thanos (arXiv 2204.07596). The features of each class of
the training split are reduced and clustered, and the clusters are written to a file for ``data.groups``. Each
validation sample is assigned to the best-fitting group of its class.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pysupcon.commands import config_parser, program
from pysupcon.data.datamodule import DataModule
from pysupcon.data.group_files import Groups, fingerprint, write_groups
from pysupcon.errors import ConfigError, RunError
from pysupcon.evaluation.features import extract_split, resolve_device, trained_head
from pysupcon.evaluators import SubgroupConfig, head_losses, infer_groups, recovery
from pysupcon.reading import join_lists, list_options, one_line
from pysupcon.trainer.run import WEIGHTS_FILE, Run, open_run

SPLITS = ("train", "val")
_RECORDED_DATA_FIELDS = (
    "dataset", "labels", "split_seed", "val_fraction", "test_fraction", "spurious_rate", "train_fractions"
)  # fmt: skip


@dataclass
class InferenceArguments:
    """Arguments of the inference of groups."""

    subgroups: SubgroupConfig = field(default_factory=SubgroupConfig)
    """Reduction and clustering of the features of a class."""

    batch_size: int = 256
    """Images per forward pass of the encoder."""

    device: str = "auto"
    """Device of the encoder: cpu, cuda, ...; auto is the accelerator if there is one, else the CPU."""

    progress: bool = True
    """Show progress bars."""


@dataclass(frozen=True)
class Inference:
    """Result of :func:`infer_from_runs`.

    Attributes:
        groups: the inferred groups.
        truth: [N] int64, the true group of every training sample.
        class_names: names of the classes by label.
        group_names: class and fine label of every true group by its number.
        silhouettes: silhouette score of each class by label.
        f1, purity: agreement with the true groups; see :func:`pysupcon.evaluators.recovery`.
    """

    groups: Groups
    truth: Tensor
    class_names: list[str]
    group_names: dict[int, str]
    silhouettes: dict[int, float]
    f1: float
    purity: float

    def table(self) -> str:
        """Return sizes, silhouettes and recovery as text."""
        lines = [
            f"{'group':>5}  {'samples':>7}  {'silhouette':>10}  {'pure':>6}  class; most frequent true group"
        ]
        for group, label in enumerate(self.groups.parent.tolist()):
            members = self.truth[self.groups.train == group]
            true, counts = members.unique(return_counts=True)
            largest = int(counts.argmax())
            lines.append(
                f"{group:>5}  {len(members):>7}  {self.silhouettes[label]:>10.3f}  "
                f"{100 * int(counts[largest]) / len(members):>5.1f}%  {self.class_names[label]}; "
                f"{self.group_names[int(true[largest])]}"
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
    """Infer groups from the embeddings of finished runs and write them to ``output``.

    Args:
        runs: one or more runs, all trained on the same samples. The embeddings of several runs are
            concatenated, each scaled to unit length if ``subgroups.normalize``. The losses of their
            classification heads, if they have any, are averaged for ``subgroups.overcluster``.
        output: path of the groups file.
        arguments: None means the defaults.

    Returns:
        The groups and their agreement with the true groups.

    Raises:
        RunError: a run is not finished or damaged, the runs have different samples, or the file cannot be
            written.
        ConfigError: a run's config is not valid.
    """
    arguments = arguments or InferenceArguments()
    opened = [open_run(run) for run in runs]
    if not opened:
        raise RunError("infer-groups needs a run, got none")
    data = opened[0].data
    labels = _training_labels(data)
    made_for = {name: fingerprint(data.splits[name], labels[name]) for name in SPLITS}
    for run in opened[1:]:
        other, other_labels = run.data, _training_labels(run.data)
        for name in SPLITS:
            if fingerprint(other.splits[name], other_labels[name]) != made_for[name]:
                raise RunError(
                    f"the runs must have the same {name} samples and classes to concatenate their "
                    f"embeddings; those of {run.dir} differ from those of {opened[0].dir}"
                )
    parts = [_embeddings(run, arguments) for run in opened]
    losses = [
        head_losses(head, part["train"], labels["train"])
        for run, part in zip(opened, parts, strict=True)
        if (head := trained_head(run, data.config.labels)) is not None
    ]
    if arguments.subgroups.normalize:
        parts = [{name: F.normalize(rows, dim=1) for name, rows in part.items()} for part in parts]
    features = {name: torch.cat([part[name] for part in parts], dim=1) for name in SPLITS}
    found = infer_groups(
        features["train"], labels["train"], arguments.subgroups,
        losses=torch.stack(losses).mean(dim=0) if losses else None,
        validation=(features["val"], labels["val"]),
    )  # fmt: skip
    recovered = recovery(found.groups, data.true_groups["train"])
    groups = Groups(
        found.groups,
        found.predict(features["val"], labels["val"]),
        found.parent,
        made_from={
            "data": {name: getattr(data.config, name) for name in _RECORDED_DATA_FIELDS},
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
        raise RunError(f"--output {output} could not be written: {one_line(error)}") from error
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


def _training_labels(data: DataModule) -> dict[str, Tensor]:
    """The labels that the run was trained on, int64 [N] by split."""
    fine = data.config.labels == "fine"
    return {name: samples.fine if fine else samples.coarse for name, samples in data.splits.items()}


def _embeddings(run: Run, arguments: InferenceArguments) -> dict[str, Tensor]:
    """Embeddings [N, D] by split, float64 on the CPU."""
    device = resolve_device(arguments.device)
    backbone, datasets = run.model.to(device).backbone, run.splits()
    features = {}
    for name in SPLITS:
        found = extract_split(
            backbone, datasets[name], name, run.dir, batch_size=arguments.batch_size, device=device,
            workers=run.data.workers(name, arguments.batch_size, bytes_per_value=4),
            progress=arguments.progress,
            description=f"{name} features of {run.dir.name}",
        )  # fmt: skip
        features[name] = found.features.to("cpu", torch.float64)
    return features


def _identity(run: Run) -> dict[str, Any]:
    """Name, seed, loss and weights checksum: they identify a run independently of its path."""
    weights = hashlib.sha256((run.dir / WEIGHTS_FILE).read_bytes()).hexdigest()
    return {
        "name": run.dir.resolve().name,
        "seed": run.config.seed,
        "loss": asdict(run.config.loss),
        "weights": weights,
    }


def main(arguments: Sequence[str]) -> int:
    """Write the groups file and print its table; return the exit status."""
    parser = config_parser(
        prog=f"{program()} infer-groups",
        description="Infer subgroups of the classes from the embeddings of one or more finished runs, for "
        "training with data.groups.",
    )
    parser.add_argument("runs", type=str, nargs="+", metavar="RUN", help="folder of a finished run")
    parser.add_argument("--output", type=str, required=True, metavar="FILE", help="groups file to write")
    parser.add_class_arguments(InferenceArguments)
    arguments = join_lists(arguments, list_options(InferenceArguments))
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
