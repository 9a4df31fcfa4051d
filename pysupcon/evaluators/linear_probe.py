"""Linear classification of frozen features.

There are three solvers. Validation accuracy selects the hyperparameter of each:

logistic    multinomial logistic regression (scikit-learn, L-BFGS) over a grid of L2 penalties. Exact, without
            a learning rate; recommended up to some ten thousand samples.
sgd         SGD with momentum 0.9, learning rate times 0.2 at 60, 75 and 90 % of the epochs (SINCERE, arXiv
            2309.14277).
adamw       AdamW 1e-3 with a cosine schedule to zero, batch 128, 100 epochs (Thanos, arXiv 2204.07596).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pysupcon.evaluators.base import FeatureSet, FeatureSplits, Level, Result, accuracy_results, class_index
from pysupcon.evaluators.passes import Passes, standardization

Solver = Literal["logistic", "sgd", "adamw"]
_MULTITHREADING_SIZE = 1 << 26
# Largest entry of the gradient at the end of a logistic fit. For MNIST's pixels and the features of a small
# network, fits to 1e-6 in fp64 give the same test accuracies within 0.1 points, in up to six times the steps.
_TOLERANCE = 1e-4
_DEFAULT_LEARNING_RATES = {"sgd": (0.1,), "adamw": (1e-3,)}


@dataclass
class ProbeConfig:
    """How a linear classifier is fitted to frozen features."""

    solver: Solver = "logistic"
    """logistic, sgd or adamw."""

    standardize: bool = True
    """Standardise every feature by the mean and standard deviation of the training split. Penalties and
    learning rates then do not depend on the scale of the features. The papers' protocols of sgd and adamw use
    false."""

    penalties: list[float] = field(default_factory=lambda: [1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
    """logistic only: L2 penalties to try, lambda of mean cross-entropy + lambda / 2 ||W||^2 (scikit-learn's
    C = 1 / (lambda N)). A tie goes to the largest. Features of collapsed classes need small ones."""

    max_iterations: int = 5000
    """logistic only: maximum number of L-BFGS iterations per penalty. A fit usually ends earlier, where no
    entry of the gradient of the mean cross-entropy is above 1e-4; a result that reached the maximum is marked
    as not converged."""

    learning_rates: list[float] = field(default_factory=list)
    """sgd and adamw: learning rates to try; empty means 0.1 for sgd and 1e-3 for adamw."""

    epochs: int = 100
    """sgd and adamw: passes over the training features; the best validation accuracy after a pass selects the
    weights."""

    steps: int | None = None
    """sgd and adamw: number of steps instead of epochs, which the schedule then follows, too. The last pass
    may be incomplete. Thanos's probe has 35,200 (100 epochs of CIFAR's 45,000 images); 100 epochs of a small
    set are far fewer."""

    batch_size: int = 128
    """sgd and adamw: samples per step."""

    weight_decay: float = 0.0
    """sgd and adamw: weight decay of weights and bias."""

    seed: int = 0
    """sgd and adamw: seed of the initial weights and of the order of the samples."""

    def __post_init__(self) -> None:
        if self.solver not in ("logistic", "sgd", "adamw"):
            raise ValueError(f'solver must be "logistic", "sgd" or "adamw", got {self.solver!r}')
        for name in ("max_iterations", "epochs", "steps", "batch_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.penalties or any(not value > 0 for value in self.penalties):
            raise ValueError(f"penalties must be one or more positive numbers, got {self.penalties}")
        if any(not value > 0 for value in self.learning_rates):
            raise ValueError(f"learning_rates must be positive, got {self.learning_rates}")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay must be >= 0, got {self.weight_decay}")


class FittedProbe(NamedTuple):
    """A linear classifier of features that are not standardised.

    Attributes:
        weight: [C, D] fp64 on the CPU.
        bias: [C] fp64.
        classes: [C] int64, the labels in ascending order.
        val_accuracy: validation accuracy of the chosen hyperparameter, in [0, 1].
        chosen: the chosen penalty or learning rate.
        converged: False if the logistic solver reached ``max_iterations``; True for "sgd" and "adamw".
    """

    weight: Tensor
    bias: Tensor
    classes: Tensor
    val_accuracy: float
    chosen: float
    converged: bool

    def logits(self, features: Tensor) -> Tensor:
        """Logits [N, C], fp64, of ``features`` [N, D]."""
        return torch.addmm(self.bias, features.to("cpu", torch.float64), self.weight.T)

    def predict(self, features: Tensor) -> Tensor:
        """Predicted labels [N] int64 of ``features`` [N, D]."""
        return self.classes[self.logits(features).argmax(dim=1)]


def fit_probe(
    train: FeatureSet,
    val: FeatureSet,
    level: Level,
    config: ProbeConfig,
    *,
    augmented: Tensor | None = None,
    progress: bool = False,
) -> FittedProbe:
    """Fit on ``train`` and select on ``val``. Validation classes absent from training count as errors.

    Args:
        train, val: features and labels.
        level: the labels.
        config: how to fit.
        augmented: features [R, N, D] of R passes over augmented training images, in the order of ``train``.
            The classifier is fitted, and standardised, by them instead of the features of ``train``: logistic
            takes all of them at once; an epoch of sgd and adamw is one pass, and the passes take turns.
        progress: show a progress bar.
    """
    labels, val_labels = train.labels(level).cpu(), val.labels(level).cpu()
    classes = labels.unique()
    features = train.features[None] if augmented is None else augmented
    x_val = val.features.to("cpu", torch.float64)
    mean, std = x_val.new_zeros(x_val.shape[1]), x_val.new_ones(x_val.shape[1])
    if config.standardize:
        mean, std = standardization(features)
    y, y_val = class_index(labels, classes), class_index(val_labels, classes)
    data = (Passes(features, mean, std), y, (x_val - mean) / std, y_val)
    if len(classes) == 1:
        zeros = x_val.new_zeros(1, x_val.shape[1])
        return FittedProbe(zeros, zeros[:, 0], classes, (y_val == 0).double().mean().item(), 0.0, True)
    fit = _fit_logistic if config.solver == "logistic" else _fit_gradient_descent
    weight, bias, val_accuracy, chosen, converged = fit(*data, len(classes), config, progress)
    weight = weight / std
    return FittedProbe(weight, bias - weight @ mean, classes, val_accuracy, chosen, converged)


_Fit = tuple[Tensor, Tensor, float, float, bool]


def _accuracy(weight: Tensor, bias: Tensor, x: Tensor, y: Tensor) -> float:
    return (torch.addmm(bias, x, weight.T).argmax(dim=1) == y).double().mean().item()


def _fit_logistic(
    x: Passes, y: Tensor, x_val: Tensor, y_val: Tensor, classes: int, config: ProbeConfig, progress: bool
) -> _Fit:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    # fp32 halves the time of the fit. The tolerance of the gradient is far above the rounding error.
    features, targets = x.all().numpy(), y.repeat(len(x)).numpy()
    # Small matrix products do not benefit from threads and are up to ten times slower on a busy machine.
    threads = 1 if features.size * classes < _MULTITHREADING_SIZE else None
    model = LogisticRegression(max_iter=config.max_iterations, tol=_TOLERANCE, warm_start=True)
    best: _Fit | None = None
    # From the strongest penalty down: each solution starts the next fit, and a tie keeps the stronger
    # penalty.
    for penalty in progress_bar(sorted(set(config.penalties), reverse=True), progress):
        model.set_params(C=1 / (penalty * len(targets)))
        with threadpool_limits(threads), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.fit(features, targets)
        converged = not any(issubclass(w.category, ConvergenceWarning) for w in caught)
        weight, bias = (torch.from_numpy(a).double() for a in (model.coef_, model.intercept_))
        if classes == 2:  # scikit-learn returns the difference of the two logits only
            weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
        val_accuracy = _accuracy(weight, bias, x_val, y_val)
        if best is None or val_accuracy > best[2]:
            best = (weight, bias, val_accuracy, penalty, converged)
    assert best is not None
    return best


def _fit_gradient_descent(
    x: Passes, y: Tensor, x_val: Tensor, y_val: Tensor, classes: int, config: ProbeConfig, progress: bool
) -> _Fit:
    features, n = x[0], len(y)
    per_epoch = -(-n // config.batch_size)
    steps = config.epochs * per_epoch if config.steps is None else config.steps
    best: _Fit | None = None
    rates = sorted(set(config.learning_rates or _DEFAULT_LEARNING_RATES[config.solver]))
    for rate in rates:
        generator = torch.Generator().manual_seed(config.seed)
        head = nn.utils.skip_init(
            nn.Linear, features.shape[1], classes
        )  # does not use the global random state
        nn.init.normal_(head.weight, std=0.01, generator=generator)
        nn.init.zeros_(head.bias)
        optimizer, scheduler = _optimizer(head, rate, config, steps, per_epoch)
        for done in progress_bar(range(0, steps, per_epoch), progress):
            if len(x) > 1:
                features = x[int(done) // per_epoch % len(x)]
            batches = torch.randperm(n, generator=generator).split(config.batch_size)
            for rows in batches[: steps - int(done)]:
                optimizer.zero_grad()
                F.cross_entropy(head(features[rows]), y[rows]).backward()
                optimizer.step()
                scheduler.step()
            weight, bias = head.weight.detach().double(), head.bias.detach().double()
            val_accuracy = _accuracy(weight, bias, x_val, y_val)
            # A tie goes to the later pass, whose margin is wider, and to the smaller learning rate.
            if best is None or val_accuracy > best[2] or (val_accuracy, rate) == (best[2], best[3]):
                best = (weight, bias, val_accuracy, rate, True)
    assert best is not None
    return best


def _optimizer(
    head: nn.Linear, rate: float, config: ProbeConfig, steps: int, per_epoch: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    optimizer: torch.optim.Optimizer
    if config.solver == "sgd":
        optimizer = torch.optim.SGD(head.parameters(), rate, momentum=0.9, weight_decay=config.weight_decay)
        unit = per_epoch if config.steps is None else 1  # rounded up to whole epochs, or to whole steps
        milestones = [-(-(steps // unit) * percent // 100) * unit for percent in (60, 75, 90)]
        return optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.2)
    optimizer = torch.optim.AdamW(head.parameters(), rate, weight_decay=config.weight_decay)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


def progress_bar(
    items: list[float] | range, progress: bool, description: str = "linear probe"
) -> Iterator[float]:
    if progress:
        from tqdm import tqdm

        yield from tqdm(items, desc=description, leave=False, delay=2, disable=None)
    else:
        yield from items


@dataclass
class AugmentedProbeConfig(ProbeConfig):
    """A probe that can be fitted to features of augmented images."""

    augmented_passes: int = 0
    """0: the probe is fitted to features of the training images as they are. R >= 1: to features of R passes
    over augmented training images (data.augmentation and seed of the run); validation and test images stay as
    they are. logistic takes all R passes at once; an epoch of sgd and adamw takes one, in turn. Thanos's
    public code draws anew in each epoch: as many passes as epochs. The features of the passes are kept in
    memory."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.augmented_passes < 0:
            raise ValueError(f"augmented_passes must be at least 0, got {self.augmented_passes}")
        if self.solver != "logistic" and self.steps is None and self.augmented_passes > self.epochs:
            raise ValueError(
                f"augmented_passes must be at most epochs={self.epochs}, as an epoch takes one pass, got "
                f"{self.augmented_passes}"
            )


@dataclass
class LinearProbeConfig(AugmentedProbeConfig):
    """A linear probe on one level of labels."""

    level: Level = "coarse"
    """"coarse" or "fine"."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.level not in ("coarse", "fine"):
            raise ValueError(f'level must be "coarse" or "fine", got {self.level!r}')


CHOICE_MEANINGS: Mapping[str, str] = {
    "chance": "always the most frequent training class",
    "val_accuracy": "validation accuracy of the chosen probe",
    "chosen": "L2 penalty (logistic) or learning rate (sgd, adamw) of the best validation accuracy",
    "converged": "whether the solver converged",
}
"""How a probe was chosen, by the last part of a result's name."""


class LinearProbe:
    """Yields ``linear_probe/{level}/accuracy`` and how the classifier was chosen."""

    name: ClassVar[str] = "linear_probe"
    units: ClassVar[Mapping[str, str]] = {
        "accuracy": "fraction",
        "val_accuracy": "fraction",
        "chosen": "penalty or learning rate",
        "converged": "1 or 0",
    }

    meanings: ClassVar[Mapping[str, str]] = {"accuracy": "linear probe", **CHOICE_MEANINGS}
    headline: ClassVar[Sequence[str]] = ("*/accuracy",)

    def __init__(self, config: LinearProbeConfig | None = None) -> None:
        self.config = config or LinearProbeConfig()

    def __call__(self, splits: FeatureSplits, *, progress: bool = False) -> Iterator[Result]:
        config, prefix = self.config, f"linear_probe/{self.config.level}"
        augmented = splits.augmented_passes(config.augmented_passes)
        probe = fit_probe(
            splits.train, splits.val, config.level, config, augmented=augmented, progress=progress
        )
        truth = splits.test.labels(config.level)
        yield from accuracy_results(prefix, probe.predict(splits.test.features), truth)
        yield f"{prefix}/val_accuracy", probe.val_accuracy
        yield f"{prefix}/chosen", probe.chosen
        yield f"{prefix}/converged", float(probe.converged)
