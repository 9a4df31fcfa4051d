"""Sections of the config for the loss, the optimizer and the training loop."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pysupcon import losses
from pysupcon.errors import ConfigError, check

LossName = Literal[losses.LossName, "none"]
NEEDS_VIEWS = tuple(
    name for name, loss in losses.LOSSES_BY_NAME.items() if loss.needs_instances or loss.self_supervised
)
"""Losses that need to know which rows are views of one sample"""
OWN = tuple(dict.fromkeys(
    field_name for name, loss in losses.LOSSES_BY_NAME.items()
    for field_name in loss.trainer_defaults[name] if field_name != "temperature"
))  # fmt: skip
"""Fields that only some losses use"""
CONTRASTIVE = (
    "temperature", "learnable_temperature", "unlabeled", "multi_label", "overlap_threshold", "contrast_mode",
    "pairing", "gather", "backend", "weight", "infonce_weight", "queue", "batch_negatives",
)  # fmt: skip
"""Fields without effect if there is no contrastive loss"""
ACCURACIES = ("accuracy", "worst_group", "worst_known_group")
"""Values of best_by that are maximised; the others are minimised."""


@dataclass
class GroupDROConfig:
    """Cross-entropy of the groups, weighted towards the worst group (Sagawa et al. 2020)."""

    eta: float = 0.01
    """Step of the groups' weights: q_g <- q_g exp(eta (loss_g + C / sqrt(n_g))), normalised."""

    adjustment: float = 0.0
    """C of that step, where n_g is the number of training samples of group g: small groups, which generalise
    less, get more weight."""

    def check(self) -> None:
        """Check the values.

        Raises:
            ConfigError: a value is not valid; the message names the field.
        """
        check(self.eta > 0, "loss.group_dro.eta", "be greater than 0", self.eta)
        check(self.adjustment >= 0, "loss.group_dro.adjustment", "be at least 0", self.adjustment)


@dataclass
class LossConfig:
    """Contrastive loss plus optional InfoNCE, cross-entropy and reconstruction terms."""

    name: LossName = "supcon"
    """Contrastive loss: cnce is class-conditional InfoNCE, spread mixes supcon or sincere with cnce, infonce
    uses no labels; README lists them all. none: cross-entropy or reconstruction alone."""

    temperature: float | None = None
    """Temperature that divides the similarities. None means 0.5 for spread and cnce, 0.07 for the others."""

    learnable_temperature: bool = False
    """Train the temperature's logarithm, starting from temperature."""

    epsilon: float | None = None
    """eps_supinfonce only: margin in units of s, the similarity divided by the temperature. None means
    0.25."""

    alpha: float | None = None
    """spread only: weight of cnce; the base has 1 - alpha. None means 0.5."""

    base: Literal["supcon", "sincere"] | None = None
    """spread only: the loss that is mixed with cnce. None means supcon."""

    unlabeled: Literal["ignore", "instance"] = "ignore"
    """Samples of data.ignore_index in the contrastive loss. ignore: they are neither anchors nor candidates;
    instance: their positives are their own views, and they are negatives of the other samples."""

    multi_label: Literal["per_label", "any", "jaccard"] | None = None
    """image_table only: positives of samples with several labels. per_label (supcon only): the mean of one
    SupCon term per label of the anchor; any: rows that share a label; jaccard (supcon only): weighted by the
    overlap of their labels. None means per_label for supcon and any for the others."""

    overlap_threshold: float | None = None
    """any and jaccard: rows whose labels overlap by more than this share are positives. None means 0."""

    contrast_mode: Literal["all", "one"] = "all"
    """Anchors: the rows of all views, or of the first view alone."""

    pairing: Literal["all", "cross"] = "all"
    """all: a row is contrasted with all other rows; cross: rows of the second view, the anchors, with rows of
    the first (needs two views), as in the paper of the spread loss."""

    gather: bool | Literal["ring"] = False
    """With several processes, true: contrast with the rows of all processes; ring: the same, but rows are
    passed from process to process and no process stores all; false: contrast with the process's own rows
    only."""

    queue: int = 0
    """Rows of earlier batches, first in, first out, that are contrasted with in addition to the batch: keys
    with model.momentum, else the projections of all views. With gather every process holds the rows of all
    processes, else its own ones. 0: no queue."""

    batch_negatives: bool = True
    """false: rows of the batch are positives only, and the negatives come from the queue, as in MoCo."""

    backend: Literal["auto", "cpu", "cuda", "tiled", "reference"] = "auto"
    """auto: the compiled kernel of the device, else tiled, pure PyTorch in O(N) memory; reference: dense."""

    weight: float = 1.0
    """Weight of the contrastive loss in the sum."""

    infonce_weight: float = 0.0
    """Weight of InfoNCE in addition to a loss that takes labels. It uses the same temperature and pairs."""

    cross_entropy_weight: float = 0.0
    """Weight of the classification head's cross-entropy in the sum (of both heads', with two encoders); needs
    model.classifier."""

    group_dro: GroupDROConfig | None = None
    """GroupDRO: the weighted cross-entropies of the groups of data.groups replace the mean over the samples;
    {} uses its defaults. Validation uses the mean. None: no GroupDRO."""

    reconstruction_weight: float = 0.0
    """Weight of the reconstruction in the sum: the mean squared error of the views, normalised as the encoder
    sees them; needs model.decoder."""

    def check(self) -> None:
        """Check the values.

        Raises:
            ConfigError: a value is not valid; the message names the field.
        """
        if self.temperature is not None:
            check(self.temperature > 0, "loss.temperature", "be greater than 0", self.temperature)
        for field_name in OWN:
            self._check_own(field_name)
        if self.alpha is not None:
            check(0 <= self.alpha <= 1, "loss.alpha", "lie in [0, 1]", self.alpha)
        check(self.weight > 0, "loss.weight", "be greater than 0", self.weight)
        for name in ("infonce_weight", "cross_entropy_weight", "reconstruction_weight"):
            check(getattr(self, name) >= 0, f"loss.{name}", "be at least 0", getattr(self, name))
        if self.name == "infonce" and self.infonce_weight > 0:
            raise ConfigError(
                "loss.infonce_weight adds InfoNCE to another loss; with loss.name=infonce use loss.weight"
            )
        if self.group_dro is not None:
            self.group_dro.check()
            weight = self.cross_entropy_weight
            check(weight > 0, "loss.cross_entropy_weight", "be greater than 0 for loss.group_dro", weight)
        if self.unlabeled == "instance" and self.name == "infonce":
            raise ConfigError("loss.unlabeled has no effect with loss.name=infonce, which uses no labels")
        if self.name == "none":
            self._refuse_contrastive()
        check(self.queue >= 0, "loss.queue", "be at least 0", self.queue)
        if not self.batch_negatives:
            check(
                self.queue > 0, "loss.queue", "be greater than 0 for loss.batch_negatives=false", self.queue
            )
        if self.pairing == "cross":
            check(self.queue == 0, "loss.queue", "be left out for loss.pairing=cross", self.queue)
            mode = self.contrast_mode
            check(mode == "all", "loss.contrast_mode", "be left out for loss.pairing=cross", mode)

    def resolve(self) -> None:
        """Replace None by the defaults of the loss."""
        if self.name == "none":
            return
        defaults = {"temperature": 0.07, **losses.LOSSES_BY_NAME[self.name].trainer_defaults[self.name]}
        for name, value in defaults.items():
            if getattr(self, name) is None:
                setattr(self, name, value)

    def resolve_multi_label(self) -> None:
        """The same for data whose samples have several labels.

        Raises:
            ConfigError: the loss does not take them in this form.
        """
        forms = () if self.name == "none" else losses.LOSSES_BY_NAME[self.name].multi_labels
        if not forms:
            for name in ("multi_label", "overlap_threshold"):
                if getattr(self, name) is not None:
                    raise ConfigError(f"loss.{name} has no effect with loss.name={self.name}: leave it out")
            return
        if self.multi_label is None:
            self.multi_label = "per_label" if "per_label" in forms else "any"
        contract = f"be {' or '.join(forms)} for loss.name={self.name}"
        check(self.multi_label in forms, "loss.multi_label", contract, self.multi_label)
        if self.overlap_threshold is None:
            self.overlap_threshold = 0.0
        check(
            0 <= self.overlap_threshold < 1, "loss.overlap_threshold", "lie in [0, 1)", self.overlap_threshold
        )
        if self.multi_label == "per_label" and self.overlap_threshold > 0:
            raise ConfigError(
                "loss.overlap_threshold has no effect with loss.multi_label=per_label: leave it out"
            )

    def _refuse_contrastive(self) -> None:
        plain = LossConfig()
        for name in CONTRASTIVE:
            if getattr(self, name) != getattr(plain, name):
                raise ConfigError(f"loss.{name} has no effect with loss.name=none: leave it out")

    def _check_own(self, field_name: str) -> None:
        having = [
            name for name, loss in losses.LOSSES_BY_NAME.items() if field_name in loss.trainer_defaults[name]
        ]
        if getattr(self, field_name) is not None and self.name not in having:
            raise ConfigError(
                f"loss.{field_name} has no effect with loss.name={self.name}, only with "
                f"{', '.join(having)}: leave it out"
            )


@dataclass
class OptimizerConfig:
    """Optimizer and learning rate."""

    name: Literal["sgd", "adamw", "lars"] = "adamw"
    """Optimizer; sgd and lars use momentum."""

    learning_rate: float = 1e-3
    """Maximum learning rate, reached at the end of the warm-up."""

    backbone_scale: float = 1.0
    """Learning rate of the backbone relative to that of the heads, greater than 0, at most 1. The log shows
    the rate of the heads."""

    weight_decay: float = 1e-4
    """Weight decay of the weights; biases and normalisation parameters are not decayed."""

    momentum: float | None = None
    """sgd and lars only; None means 0.9."""

    warmup_epochs: float = 0.0
    """Epochs of linear warm-up from warmup_start."""

    warmup_start: float = 0.0
    """Learning rate of the first warm-up step, as a fraction of learning_rate."""

    schedule: Literal["cosine", "constant", "step", "linear"] = "cosine"
    """Learning rate after the warm-up: cosine or linear decay to final at the end of the training; constant;
    or step: multiplied by gamma at each of milestones."""

    final: float = 0.0
    """cosine and linear only: learning rate at the end of the training, as a fraction of learning_rate."""

    milestones: list[float] = field(default_factory=list)
    """step only: epochs, counted from the start of the training, after which the learning rate is multiplied
    by gamma, as in torch.optim.lr_scheduler.MultiStepLR."""

    gamma: float | None = None
    """step only: factor of the learning rate at each milestone; None means 0.1."""

    cosine_epochs: float | None = None
    """cosine only: epochs from the maximum to final. After them the rate rises again for as many epochs, and
    so on, as in torch.optim.lr_scheduler.CosineAnnealingLR with T_max. None: the whole training after the
    warm-up, so that it falls once."""

    warmup_joins: bool = False
    """cosine only: the cosine counts from the start of the training, and the warm-up ends at its value, below
    learning_rate. false: the warm-up ends at learning_rate, where the cosine starts."""

    def check(self) -> None:
        """Check the values.

        Raises:
            ConfigError: a value is not valid; the message names the field.
        """
        check(self.learning_rate > 0, "optimizer.learning_rate", "be greater than 0", self.learning_rate)
        scale = self.backbone_scale
        check(0 < scale <= 1, "optimizer.backbone_scale", "be greater than 0 and at most 1", scale)
        check(self.weight_decay >= 0, "optimizer.weight_decay", "be at least 0", self.weight_decay)
        if self.momentum is not None:
            check(self.name != "adamw", "optimizer.momentum", "be left out for adamw", self.momentum)
            check(0 <= self.momentum < 1, "optimizer.momentum", "lie in [0, 1)", self.momentum)
        check(self.warmup_epochs >= 0, "optimizer.warmup_epochs", "be at least 0", self.warmup_epochs)
        check(0 <= self.warmup_start <= 1, "optimizer.warmup_start", "lie in [0, 1]", self.warmup_start)
        check(0 <= self.final <= 1, "optimizer.final", "lie in [0, 1]", self.final)
        self._check_schedule()

    def _check_schedule(self) -> None:
        without = f"optimizer.schedule={self.schedule}"
        if self.cosine_epochs is not None:
            contract = f"be left out for {without}"
            check(self.schedule == "cosine", "optimizer.cosine_epochs", contract, self.cosine_epochs)
            check(self.cosine_epochs > 0, "optimizer.cosine_epochs", "be greater than 0", self.cosine_epochs)
        if self.warmup_joins:
            check(self.schedule == "cosine", "optimizer.warmup_joins", f"be left out for {without}", True)
            contract = "be greater than 0 for optimizer.warmup_joins"
            check(self.warmup_epochs > 0, "optimizer.warmup_epochs", contract, self.warmup_epochs)
        if self.schedule in ("constant", "step"):
            check(self.final == 0, "optimizer.final", f"be left out for {without}", self.final)
        if self.schedule != "step":
            check(not self.milestones, "optimizer.milestones", f"be left out for {without}", self.milestones)
            check(self.gamma is None, "optimizer.gamma", f"be left out for {without}", self.gamma)
            return
        increasing = all(a < b for a, b in zip([0.0, *self.milestones], self.milestones, strict=False))
        contract = f"hold increasing epochs greater than 0 for {without}"
        check(bool(self.milestones) and increasing, "optimizer.milestones", contract, self.milestones)
        contract = f"start after the warm-up of {self.warmup_epochs:g} epochs"
        check(self.milestones[0] >= self.warmup_epochs, "optimizer.milestones", contract, self.milestones)
        if self.gamma is not None:
            check(self.gamma > 0, "optimizer.gamma", "be greater than 0", self.gamma)

    def resolve(self) -> None:
        """Replace None by the defaults of the optimizer and of the schedule."""
        if self.schedule == "step" and self.gamma is None:
            self.gamma = 0.1
        if self.name != "adamw" and self.momentum is None:
            self.momentum = 0.9


@dataclass
class TrainerConfig:
    """Training loop, log and checkpoints."""

    epochs: int = 10
    """Passes over the training split."""

    max_steps: int | None = None
    """Optimizer steps of the training; overrides epochs. The learning rate schedule has this length. The last
    epoch may be incomplete."""

    chunk_size: int | None = None
    """Samples, with all their views, per forward pass of a process (GradCache). Memory then depends on
    chunk_size instead of data.batch_size, at the cost of one more forward pass. The gradient is that of the
    whole batch, but BatchNorm normalises each chunk separately. None disables chunks."""

    accumulation_steps: int = 1
    """Batches of data.batch_size per optimizer step, which uses their mean gradient. Each batch is contrasted
    separately; for a larger contrastive batch use data.batch_size with chunk_size. Learning rate, log and
    checkpoints count optimizer steps. Batches at the end of an epoch that do not fill a step are skipped."""

    mixed_precision: Literal["no", "bf16", "fp16"] | None = None
    """None uses the setting of accelerate launch; fp16 does not work on CPUs."""

    clip_norm: float | None = None
    """Maximum norm of the gradient; None disables clipping."""

    compile: bool = False
    """Compile the model with torch.compile and inductor, as accelerate launch --dynamo_backend inductor does.
    That flag also sets this field."""

    dry_run: bool = False
    """Run one step, validate one batch and encode some images for the evaluators; print shapes, seconds and
    memory. No folder is created."""

    cpu: bool = False
    """Train on the CPU even if there is an accelerator."""

    sync_batch_norm: bool = False
    """Synchronise the BatchNorm statistics of all processes; CUDA only."""

    ema_decay: float | None = None
    """Decay per step of an exponential moving average of the weights, e.g. 0.999. None keeps no average."""

    final_weights: Literal["last", "best", "ema"] = "last"
    """Weights that are evaluated and exported: those of the last step, of the checkpoint that best_by
    selects, or the moving average."""

    profile_steps: list[int] = field(default_factory=list)
    """Steps, counted from 1, that torch.profiler records on the main process: a Chrome trace, a table of
    operators and a picture of the memory in RUN/profile/step-N."""

    threads: int | None = None
    """CPU threads per process; None divides the cores of the machine among its processes."""

    trackers: list[str] = field(default_factory=list)
    """Accelerate trackers in addition to log.jsonl, e.g. [tensorboard]."""

    metrics_steps: int | None = 10
    """Steps between two measurements of the contrastive features: top-1 accuracy and mean similarities of
    positives and negatives, in the log. None: none, and none in the validation."""

    checkpoint_epochs: int = 1
    """Epochs between checkpoints; the last step is always saved."""

    checkpoint_steps: int | None = None
    """Steps between checkpoints; overrides checkpoint_epochs."""

    keep_checkpoints: int = 2
    """Number of latest checkpoints to keep; the best one is kept too."""

    best_by: Literal[
        "loss", "contrastive", "cross_entropy", "reconstruction", "accuracy", "worst_group",
        "worst_known_group",
    ] | None = "loss"  # fmt: skip
    """Validation metric that selects the best checkpoint: a loss (lowest), or an accuracy of the
    classification head (highest; of the first one, with two encoders) on images that are not augmented.
    accuracy: of all samples; worst_group: in the worst of the data's own groups; worst_known_group: in the
    worst group of data.groups. Each checkpoint is validated, with the averaged weights if final_weights is
    ema. None disables validation."""

    early_stopping: int | None = None
    """End the training after this number of successive validations without a new best value of best_by.
    final_weights=best then selects the best checkpoint. None: no early stopping."""

    time_budget: float | None = None
    """Minutes after which the training writes a checkpoint and stops; it can be resumed. None: no limit.
    SIGTERM and SIGUSR1 stop it in the same way."""

    def check(self) -> None:
        """Check the values.

        Raises:
            ConfigError: a value is not valid; the message names the field.
        """
        check(self.epochs >= 1, "trainer.epochs", "be at least 1", self.epochs)
        if self.clip_norm is not None:
            check(self.clip_norm > 0, "trainer.clip_norm", "be greater than 0", self.clip_norm)
        if self.threads is not None:
            check(self.threads >= 1, "trainer.threads", "be at least 1", self.threads)
        for name in (
            "chunk_size", "accumulation_steps", "metrics_steps", "checkpoint_epochs", "checkpoint_steps",
            "max_steps", "early_stopping",
        ):  # fmt: skip
            value = getattr(self, name)
            check(value is None or value >= 1, f"trainer.{name}", "be at least 1", value)
        steps = self.profile_steps
        check(all(step >= 1 for step in steps), "trainer.profile_steps", "be at least 1 each", steps)
        if self.ema_decay is not None:
            check(0 < self.ema_decay < 1, "trainer.ema_decay", "lie in (0, 1)", self.ema_decay)
        if self.final_weights == "ema":
            check(self.ema_decay is not None, "trainer.ema_decay", "be given for final_weights=ema", None)
        if self.final_weights == "best":
            check(self.best_by is not None, "trainer.best_by", "be given for final_weights=best", None)
        if self.early_stopping is not None:
            check(self.best_by is not None, "trainer.best_by", "be given for trainer.early_stopping", None)
        if self.time_budget is not None:
            check(self.time_budget > 0, "trainer.time_budget", "be greater than 0", self.time_budget)
        check(self.keep_checkpoints >= 1, "trainer.keep_checkpoints", "be at least 1", self.keep_checkpoints)
