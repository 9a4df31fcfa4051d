"""The typed config of a training, composed of the components' own sections."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from pysupcon import user_code
from pysupcon.data.config import DataConfig
from pysupcon.errors import ConfigError, check_all
from pysupcon.evaluators import EvaluationConfig
from pysupcon.models.config import ModelConfig
from pysupcon.trainer.config import ACCURACIES, NEEDS_VIEWS, LossConfig, OptimizerConfig, TrainerConfig


@dataclass
class Config:
    """A training run."""

    output_dir: str | None = None
    """Folder of the run. None means runs/NAME, where NAME is the name of the config file or LOSS-DATASET; a
    number is appended if that folder already holds a run."""

    seed: int = 0
    """Seed of the initial weights, the batches and the augmentation."""

    evaluate: bool = True
    """Run the evaluators after the training."""

    resume_from_checkpoint: str | None = None
    """Resume from a checkpoint: the folder of a checkpoint; latest; or auto, which is latest if there is a
    checkpoint, else a start from the beginning. Processes that torchrun restarts after a failure use auto."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def resolve(self) -> None:
        """Check the values and their combinations, and replace None by the default that it stands for.

        Raises:
            ConfigError: values are not valid; the message names their fields, one per line.
        """
        sections = (self.data, self.model, self.loss, self.optimizer, self.trainer)
        checks = [section.check for section in sections]
        if not self.model.concatenated:  # a concatenation is not trained
            checks += [
                self._check_views,
                self._check_momentum,
                self._check_loss_terms,
                self._check_backbone_scale,
                self._check_groups,
                self._check_unlabelled,
                self._check_multi_label,
                self._check_best_by,
                self._check_augmented_passes,
                self._check_spectral_norm,
            ]
        checks += [self._check_features, self._check_train_on_val]
        check_all(*checks, self._check_warmup, self._check_dry_run)
        for section in (self.data, self.model, self.loss, self.optimizer):
            section.resolve()
        if self.data.dataset == "image_table":
            self.loss.resolve_multi_label()

    def code_references(self) -> dict[str, str]:
        """Return the fields that name code of the user (see :mod:`pysupcon.user_code`), with their values."""
        fields = {
            "data.dataset": self.data.dataset,
            "data.augmentation": self.data.augmentation,
            "model.backbone": self.model.backbone,
            **{
                f"model.concatenated[{i}].model.backbone": part.backbone
                for i, part in enumerate(self.model.part_configs())
            },
            **{f"evaluation.evaluators[{i}]": name for i, name in enumerate(self.evaluation.evaluators)},
        }
        return {name: value for name, value in fields.items() if user_code.is_reference(value)}

    def as_concatenated_part(self) -> dict[str, Any]:
        """Return the entry of ``model.concatenated`` that describes this run."""
        return {
            "model": asdict(self.model),
            "loss": asdict(self.loss),
            "optimizer": asdict(self.optimizer),
            "epochs": self.trainer.epochs,
            "final_weights": self.trainer.final_weights,
        }

    def _check_dry_run(self) -> None:
        if self.trainer.dry_run and self.resume_from_checkpoint is not None:
            raise ConfigError(
                "trainer.dry_run starts from the beginning: leave out resume_from_checkpoint, got "
                f"{self.resume_from_checkpoint!r}"
            )

    def _check_warmup(self) -> None:
        if self.trainer.max_steps is None and self.optimizer.warmup_epochs > self.trainer.epochs:
            raise ConfigError(
                f"optimizer.warmup_epochs must be at most trainer.epochs={self.trainer.epochs}, "
                f"got {self.optimizer.warmup_epochs}"
            )

    def _check_views(self) -> None:
        loss, views = self.loss, self.data.views
        if loss.name in NEEDS_VIEWS and views < 2:
            raise ConfigError(
                f"data.views must be at least 2 for loss.name={loss.name}, whose positives are "
                f"the other views of a sample, got {views}"
            )
        if loss.contrast_mode == "one" and views < 2:
            raise ConfigError(f"loss.contrast_mode=one needs data.views of at least 2, got {views}")
        if loss.infonce_weight > 0 and views < 2:
            raise ConfigError(f"loss.infonce_weight needs data.views of at least 2, got {views}")
        if loss.unlabeled == "instance" and views < 2:
            raise ConfigError(
                "loss.unlabeled=instance takes the other views of a sample as its positives, so data.views "
                f"must be at least 2, got {views}"
            )
        if loss.pairing == "cross" and views != 2:
            raise ConfigError(f"loss.pairing=cross needs data.views of 2, got {views}")

    def _check_momentum(self) -> None:
        if self.model.momentum == 0:
            return
        loss, views = self.loss, self.data.views
        if loss.name == "none":
            raise ConfigError("model.momentum needs a contrastive loss, got loss.name=none")
        if views != 2:
            raise ConfigError(f"model.momentum needs data.views of 2, got {views}")
        for name, value in (("pairing", loss.pairing), ("contrast_mode", loss.contrast_mode)):
            if value != "all":
                raise ConfigError(f"loss.{name} must be left out for model.momentum, got {value}")

    def _check_loss_terms(self) -> None:
        """Every head needs a loss weight, and every weight needs a head."""
        loss, model = self.loss, self.model
        if loss.cross_entropy_weight > 0 and not model.classifier:
            raise ConfigError(
                f"loss.cross_entropy_weight is {loss.cross_entropy_weight}, but model.classifier is false: "
                "there are no logits; pass --model.classifier true"
            )
        if model.classifier and loss.cross_entropy_weight == 0:
            raise ConfigError(
                "model.classifier is true, but loss.cross_entropy_weight is 0: the head would not be trained"
            )
        if loss.reconstruction_weight > 0 and model.decoder == "none":
            raise ConfigError(
                f"loss.reconstruction_weight is {loss.reconstruction_weight}, but model.decoder is none: "
                "there is no reconstruction; pass --model.decoder plain or labelled"
            )
        if model.decoder != "none" and loss.reconstruction_weight == 0:
            raise ConfigError(
                f"model.decoder is {model.decoder}, but loss.reconstruction_weight is 0: the decoder would "
                "not be trained"
            )
        if loss.name != "none":
            return
        if not model.classifier and model.decoder == "none":
            raise ConfigError(
                "loss.name=none leaves nothing to train on: pass --model.classifier true "
                "--loss.cross_entropy_weight 1, or --model.decoder plain --loss.reconstruction_weight 1"
            )
        if model.encoders == "two":
            raise ConfigError(
                "model.encoders=two needs a contrastive loss for the first backbone, got loss.name=none"
            )
        for name, given in (("projection", model.projection != "none"), ("normalize", not model.normalize)):
            if given:
                raise ConfigError(
                    f"model.{name} has no effect with loss.name=none, which has no contrastive term: leave "
                    "it out"
                )

    def _check_backbone_scale(self) -> None:
        scale, model = self.optimizer.backbone_scale, self.model
        if scale == 1:
            return
        if model.frozen_layers == "backbone":
            raise ConfigError("optimizer.backbone_scale has no effect with model.frozen_layers=backbone")
        if model.projection == "none" and not model.classifier and model.decoder == "none":
            raise ConfigError(
                f"optimizer.backbone_scale={scale} is relative to the heads, but there is none: pass "
                "--model.projection or set optimizer.learning_rate"
            )

    def _check_groups(self) -> None:
        data, best_by = self.data, self.trainer.best_by
        if self.loss.group_dro is not None:
            if data.groups is None:
                raise ConfigError("loss.group_dro needs data.groups, got None: pass annotated or a file")
            if self.model.encoders == "two":
                raise ConfigError("loss.group_dro is for one head, but model.encoders is two: leave one out")
        elif data.groups is not None and data.sampler != "groups" and best_by != "worst_known_group":
            raise ConfigError(
                f"data.groups={data.groups} has no effect without loss.group_dro, data.sampler=groups or "
                "trainer.best_by=worst_known_group: leave it out"
            )
        if best_by == "worst_known_group" and data.groups is None:
            raise ConfigError("trainer.best_by=worst_known_group needs data.groups, got None")

    def _check_unlabelled(self) -> None:
        data, loss = self.data, self.loss
        if data.ignore_index is None:
            if loss.unlabeled != "ignore":
                raise ConfigError(f"loss.unlabeled={loss.unlabeled} has no effect without data.ignore_index")
            return
        if data.groups is not None:
            raise ConfigError(
                f"data.groups={data.groups} needs the class of every sample, but data.ignore_index is "
                f"{data.ignore_index}: leave one out"
            )
        if data.sampler != "shuffled" and loss.unlabeled == "instance":
            raise ConfigError(
                f"loss.unlabeled=instance needs data.sampler=shuffled, got {data.sampler}, whose batches "
                "hold samples of known classes only"
            )
        if data.sampler == "shuffled" and loss.gather is not False and loss.name not in ("none", "infonce"):
            raise ConfigError(
                f"loss.gather={loss.gather} needs the class of every sample, but data.ignore_index is "
                f"{data.ignore_index}: pass --data.sampler balanced or --loss.gather false"
            )
        if data.sampler == "shuffled" and self.model.decoder == "labelled":
            raise ConfigError(
                "model.decoder=labelled needs the class of every sample, but data.ignore_index is "
                f"{data.ignore_index}: pass --data.sampler balanced or --model.decoder plain"
            )

    def _check_multi_label(self) -> None:
        """Refuse what needs one label per sample."""
        loss, dataset = self.loss, self.data.dataset
        if dataset != "image_table":
            for name in ("multi_label", "overlap_threshold"):
                if getattr(loss, name) is not None:
                    raise ConfigError(
                        f"loss.{name} has no effect with data.dataset={dataset}, which has one label per "
                        "sample: leave it out"
                    )
            return
        refused = {
            "evaluate": (self.evaluate, "false"),
            "model.classifier": (self.model.classifier, "false"),
            "model.decoder": (self.model.decoder == "labelled", "none or plain"),
            "loss.gather": (loss.gather is not False, "false"),
            "loss.queue": (loss.queue > 0, "0"),
        }
        for name, (wrong, remedy) in refused.items():
            if wrong:
                raise ConfigError(
                    f"{name} must be {remedy} for data.dataset=image_table: it needs one label per sample"
                )

    def _check_train_on_val(self) -> None:
        if not self.data.train_on_val:
            return
        if self.trainer.best_by is not None:
            raise ConfigError(
                "trainer.best_by must be null for data.train_on_val, which leaves no image to choose a "
                f"checkpoint, got {self.trainer.best_by}"
            )
        if self.evaluate:
            self.evaluation.check_choices()

    def _check_augmented_passes(self) -> None:
        if self.evaluate:
            self.evaluation.check_augmentation(self.data.augmentation)

    def _check_features(self) -> None:
        if self.evaluation.features == "projection" and self.model.projection == "none":
            raise ConfigError(
                "evaluation.features=projection needs a projection head, but model.projection is none: pass "
                "--model.projection mlp, or evaluate the embedding"
            )

    def _check_spectral_norm(self) -> None:
        if self.model.spectral_norm and self.trainer.sync_batch_norm:
            raise ConfigError(
                "trainer.sync_batch_norm does not work with model.spectral_norm, which bounds BatchNorm in "
                "each process: leave one out"
            )

    def _check_best_by(self) -> None:
        best_by = self.trainer.best_by
        if best_by in ACCURACIES and not self.model.classifier:
            raise ConfigError(f"trainer.best_by={best_by} needs model.classifier, which is false")
        if best_by == "cross_entropy" and not self.model.classifier:
            raise ConfigError("trainer.best_by=cross_entropy needs model.classifier, which is false")
        if best_by == "reconstruction" and self.model.decoder == "none":
            raise ConfigError("trainer.best_by=reconstruction needs model.decoder, which is none")
        if best_by == "contrastive" and self.loss.name == "none":
            raise ConfigError("trainer.best_by=contrastive needs a contrastive loss, but loss.name is none")
