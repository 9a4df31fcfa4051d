"""Evaluators of frozen features, which yield (name, value) pairs.

An evaluator is a class with a ``name``, a config dataclass and a ``__call__`` (see :class:`Evaluator`). The
config may also name one of your own as ``package.module:name`` (see :class:`OwnEvaluator`). To add one to the
package, write the class, add a field of its name to :class:`EvaluationConfig` and list it in ``_CLASSES``.
The evaluators do not depend on how the features were trained. They need the label of every row:
``splits.labelled(ignore_index)`` leaves out rows whose labels are not known. scikit-learn is imported when an
evaluator runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from pysupcon.errors import ConfigError
from pysupcon.evaluators.base import Evaluator, FeatureSet, FeatureSplits, Level, LinearHead, Result
from pysupcon.evaluators.bootstrap import BootstrapConfig, with_intervals
from pysupcon.evaluators.clustering import SubgroupConfig
from pysupcon.evaluators.coarse_to_fine import CoarseToFine, CoarseToFineConfig
from pysupcon.evaluators.geometry import Geometry, GeometryConfig
from pysupcon.evaluators.group_dro import GroupDRO, HeadConfig
from pysupcon.evaluators.invariance import permutation_sensitivity
from pysupcon.evaluators.knn import KNN, KNNConfig, usable_k
from pysupcon.evaluators.linear_probe import (
    AugmentedProbeConfig,
    LinearProbe,
    LinearProbeConfig,
    ProbeConfig,
)
from pysupcon.evaluators.metrics import OF_ONE_PART, BoundMetric, bind_metric
from pysupcon.evaluators.own import OwnEvaluator, import_evaluator, names_and_objects
from pysupcon.evaluators.pairs import Pairs, PairsConfig, kl_bound, loss_floors, pair_statistics
from pysupcon.evaluators.projection import ProjectionConfig, project
from pysupcon.evaluators.separation import Separation, SeparationConfig
from pysupcon.evaluators.subgroups import Subgroups, head_losses, infer_groups, recovery
from pysupcon.evaluators.transfer import Transfer, TransferConfig
from pysupcon.evaluators.worst_group import WorstGroup, WorstGroupConfig
from pysupcon.user_code import PlainValue, is_own, is_passed, is_reference

__all__ = [
    "CHOOSES_ON_VAL",
    "KNN",
    "AugmentedProbeConfig",
    "BootstrapConfig",
    "BoundMetric",
    "CoarseToFine",
    "CoarseToFineConfig",
    "EvaluationConfig",
    "Evaluator",
    "FeatureName",
    "FeatureSet",
    "FeatureSplits",
    "Geometry",
    "GeometryConfig",
    "GroupDRO",
    "HeadConfig",
    "KNNConfig",
    "Level",
    "LinearHead",
    "LinearProbe",
    "LinearProbeConfig",
    "OwnEvaluator",
    "Pairs",
    "PairsConfig",
    "ProbeConfig",
    "ProjectionConfig",
    "Result",
    "Separation",
    "SeparationConfig",
    "SubgroupConfig",
    "Subgroups",
    "Transfer",
    "TransferConfig",
    "WorstGroup",
    "WorstGroupConfig",
    "available_evaluators",
    "bind_metric",
    "build_evaluators",
    "describe",
    "head_losses",
    "headline_of",
    "infer_groups",
    "kl_bound",
    "loss_floors",
    "names_and_objects",
    "pair_statistics",
    "permutation_sensitivity",
    "project",
    "recovery",
    "unit_of",
    "usable_k",
    "with_intervals",
]

FeatureName = Literal["embedding", "projection"]

_CLASSES: Mapping[str, type[Evaluator]] = {
    cls.name: cls for cls in (CoarseToFine, LinearProbe, KNN, Geometry, Separation, Pairs, WorstGroup)
}

CHOOSES_ON_VAL = (CoarseToFine.name, LinearProbe.name, WorstGroup.name)
"""Evaluators whose hyperparameters the validation split selects"""

# Transfer evaluates another data set than the run's, in a command of its own.
_KNOWN: Mapping[str, type[Evaluator]] = {**_CLASSES, Transfer.name: Transfer}
_TAKEN = {*_KNOWN, "lipschitz"}
"""Names that evaluators of the user cannot have; pysupcon/evaluation/lipschitz.py is not built here."""


@dataclass
class EvaluationConfig:
    """Which evaluators run on the frozen features, and their arguments."""

    evaluators: list[str] = field(
        default_factory=lambda: ["coarse_to_fine", "knn", "geometry", "separation", "pairs"]
    )
    """Names of the evaluators, in order; any of coarse_to_fine, linear_probe, knn, geometry, separation,
    pairs, worst_group, and package.module:name, a class or function of your own
    (pysupcon/evaluators/own.py)."""

    evaluator_args: dict[str, dict[str, PlainValue]] = field(default_factory=dict)
    """Keyword arguments of your own evaluators, e.g. {package.module:name: {margin: 0.1}}."""

    coarse_to_fine: CoarseToFineConfig = field(default_factory=CoarseToFineConfig)
    """Arguments of coarse-to-fine transfer."""

    linear_probe: LinearProbeConfig = field(default_factory=LinearProbeConfig)
    """Arguments of the linear probe on one level of labels."""

    knn: KNNConfig = field(default_factory=KNNConfig)
    """Arguments of weighted k-nearest-neighbour classification."""

    geometry: GeometryConfig = field(default_factory=GeometryConfig)
    """Arguments of spread, distances and collapse."""

    separation: SeparationConfig = field(default_factory=SeparationConfig)
    """Arguments of the nearest same-class and other-class cosines."""

    pairs: PairsConfig = field(default_factory=PairsConfig)
    """Arguments of the losses over all pairs: KL bound, repelled positives, lower bounds."""

    worst_group: WorstGroupConfig = field(default_factory=WorstGroupConfig)
    """Arguments of worst-group robustness."""

    bootstrap: BootstrapConfig = field(default_factory=BootstrapConfig)
    """Intervals of all metrics that have one outcome per test sample."""

    projection: ProjectionConfig = field(default_factory=ProjectionConfig)
    """The two-dimensional plot of the features."""

    pictures: bool = True
    """Draw pictures beside the report; they take most of the time of a small evaluation."""

    batch_size: int = 256
    """Images per forward pass of the encoder."""

    device: str = "auto"
    """Device of encoder and features: cpu, cuda, cuda:1, ...; auto selects an accelerator if available."""

    progress: bool = True
    """Show progress bars."""

    features: FeatureName = "embedding"
    """embedding: output of the backbone; projection: output of the projection head (model.projection), before
    it is normalised, with two encoders of the first one's head. The results of the projection are in
    RUN/evaluation-projection, those of the embedding in RUN/evaluation."""

    lipschitz: bool | None = None
    """Measure how steep the encoder is: its local Lipschitz constants at 64 validation images and, for
    small_cnn and mlp, a certified bound. None: for runs with model.spectral_norm."""

    def __post_init__(self) -> None:
        if self.features not in get_args(FeatureName):
            raise ValueError(f"features must be embedding or projection, got {self.features!r}")
        if not self.evaluators or len(set(self.evaluators)) != len(self.evaluators):
            raise ValueError(f"evaluators must name one or more evaluators, each once, got {self.evaluators}")
        unknown = [name for name in self.evaluators if name not in _CLASSES and not is_own(name)]
        if unknown:
            raise ValueError(
                f"evaluators must be among {available_evaluators()} or package.module:name, got {unknown}"
            )
        unused = [
            name for name in self.evaluator_args if not is_reference(name) or name not in self.evaluators
        ]
        if unused:
            raise ValueError(
                f"evaluator_args must hold arguments of own evaluators (package.module:name) in evaluators, "
                f"got {unused}"
            )
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")

    def check_choices(self) -> None:
        """Check that no evaluator chooses on the validation split, for data whose validation images are
        trained on (``data.train_on_val``).

        Raises:
            ConfigError: one does; the message names it.
        """
        choosing = [name for name in self.evaluators if name in CHOOSES_ON_VAL]
        if choosing:
            raise ConfigError(
                f"evaluation.evaluators: {', '.join(choosing)} chooses on validation images, which "
                "data.train_on_val trains on: choose among knn, geometry, separation and pairs, or take "
                "pysupcon transfer to another data set"
            )

    def augmented_passes(self) -> dict[str, int]:
        """The passes over augmented training images that evaluators are fitted to, by their names."""
        probes = {name: getattr(self, name, None) for name in self.evaluators}
        return {
            name: probe.augmented_passes
            for name, probe in probes.items()
            if isinstance(probe, AugmentedProbeConfig) and probe.augmented_passes > 0
        }

    def check_augmentation(self, augmentation: str) -> None:
        """Check that there is an augmentation for the evaluators that are fitted to augmented images.

        Args:
            augmentation: ``data.augmentation`` of the run.

        Raises:
            ConfigError: it is none; the message names the evaluator.
        """
        for name, passes in self.augmented_passes().items():
            if augmentation == "none":
                raise ConfigError(
                    f"evaluation.{name}.augmented_passes={passes} needs augmented training images, but "
                    "data.augmentation is none: set augmented_passes to 0"
                )


def available_evaluators() -> list[str]:
    """Valid names for ``EvaluationConfig.evaluators``, sorted."""
    return sorted(_CLASSES)


def build_evaluators(
    config: EvaluationConfig, passed: Mapping[str, Any] | None = None
) -> list[Evaluator | OwnEvaluator]:
    """The evaluators of ``config`` in order, each with its arguments.

    Args:
        config: names and arguments.
        passed: objects of the user by the names that ``config`` records for them.

    Raises:
        ConfigError: the user's own evaluator cannot be imported, its arguments do not fit, or two have one
            name.
    """
    built: list[Evaluator | OwnEvaluator] = []
    for name in config.evaluators:
        if name in _CLASSES:
            built.append(_CLASSES[name](getattr(config, name)))
        elif is_passed(name):
            if name not in (passed or {}):
                raise ConfigError(
                    f"evaluation.evaluators holds a {name}, which the config cannot rebuild: pass it again, "
                    "pysupcon.evaluation.evaluate.evaluate_run(RUN, evaluators=[EVALUATOR]), or choose "
                    "others with --evaluators"
                )
            built.append(OwnEvaluator((passed or {})[name], name))
        else:
            built.append(import_evaluator(name, config.evaluator_args.get(name, {})))
    check_names(built)
    return built


def check_names(evaluators: Sequence[Evaluator | OwnEvaluator]) -> None:
    """Check that each evaluator has a name of its own.

    Raises:
        ConfigError: two have one name, or one has that of an evaluator of pysupcon.
    """
    names = [evaluator.name for evaluator in evaluators]
    for evaluator in evaluators:
        taken = evaluator.name in _TAKEN and isinstance(evaluator, OwnEvaluator)
        if taken or names.count(evaluator.name) > 1:
            raise ConfigError(
                f"evaluation.evaluators: the name {evaluator.name} is taken: give your evaluator another "
                "attribute name"
            )


def unit_of(name: str, own: Sequence[Evaluator | OwnEvaluator] = ()) -> str:
    """Unit of the result ``name``, by the longest suffix that its evaluator lists; "" if none.

    Args:
        name: name of the result.
        own: evaluators of the user.
    """
    return describe(name, own)[0]


def describe(name: str, own: Sequence[Evaluator | OwnEvaluator] = ()) -> tuple[str, str]:
    """Unit and meaning of the result ``name``, each by the longest suffix that its evaluator lists; "" if
    none.

    Args:
        name: name of the result.
        own: evaluators of the user.
    """
    evaluator, *parts = name.split("/")
    known = {**_KNOWN, **{each.name: each for each in own}}.get(evaluator)
    if known is None:
        return "", ""
    suffixes = ["/".join(parts[start:]) for start in range(len(parts))]

    def of_longest(texts: Mapping[str, str]) -> str:
        return next((texts[suffix] for suffix in suffixes if suffix in texts), "")

    return of_longest(known.units), of_longest(known.meanings)


def headline_of(names: Sequence[str], evaluators: Sequence[Evaluator | OwnEvaluator]) -> list[str]:
    """The results that matter most, in the order of ``names``: those that an evaluator names in its
    ``headline``, else its first one. Results of single classes and groups are not among them.

    Args:
        names: names of all results.
        evaluators: those that gave them.
    """
    chosen: set[str] = set()
    for evaluator in evaluators:
        own = [
            name for name in names if name.startswith(f"{evaluator.name}/") and not OF_ONE_PART.search(name)
        ]
        patterns = [f"{evaluator.name}/{pattern}" for pattern in evaluator.headline]
        matches = [name for name in own if any(fnmatchcase(name, pattern) for pattern in patterns)]
        chosen.update(matches or own[:1])
    return [name for name in names if name in chosen]
