"""The typed config of a training. It is composed of the components' own sections and is read from YAML files
and the command line."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from pysupcon import named_configs, user_code
from pysupcon.caller import warn_caller
from pysupcon.data.config import DataConfig
from pysupcon.errors import ConfigError, check_all
from pysupcon.evaluators import EvaluationConfig
from pysupcon.models.config import ModelConfig
from pysupcon.reading import (
    check_yaml,
    did_you_mean,
    join_lists,
    list_options,
    one_line,
    parse_yaml,
    read_yaml,
)
from pysupcon.trainer.config import GROUP_ACCURACIES, NEEDS_VIEWS, LossConfig, OptimizerConfig, TrainerConfig


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
            ]
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

    def _check_best_by(self) -> None:
        best_by = self.trainer.best_by
        if best_by in GROUP_ACCURACIES and not self.model.classifier:
            raise ConfigError(f"trainer.best_by={best_by} needs model.classifier, which is false")
        if best_by == "cross_entropy" and not self.model.classifier:
            raise ConfigError("trainer.best_by=cross_entropy needs model.classifier, which is false")
        if best_by == "reconstruction" and self.model.decoder == "none":
            raise ConfigError("trainer.best_by=reconstruction needs model.decoder, which is none")
        if best_by == "contrastive" and self.loss.name == "none":
            raise ConfigError("trainer.best_by=contrastive needs a contrastive loss, but loss.name is none")


def parse_args(args: Sequence[str] | None = None, program: str = "train.py") -> tuple[Config, str]:
    """Read the command line: ``--config FILE_OR_NAME`` (see :func:`compose`) and ``--FIELD VALUE``.

    Args:
        args: the arguments; None means ``sys.argv[1:]``. ``--help`` and ``--print_config`` print and exit.
        program: name of the program in the help text.

    Returns:
        The resolved config, and the name of the run: the stem of the config file, or loss-dataset.

    Raises:
        ConfigError: a field is unknown, a type is wrong, a file cannot be read, or values contradict each
            other.
    """
    parser = _parser()
    parser.prog = program
    words = join_lists(sys.argv[1:] if args is None else args, list_options(Config))
    config, parsed = _instantiate(parser, lambda: parser.parse_args(words))
    if config.model.concatenated:
        raise ConfigError("model.concatenated describes backbones that are frozen: they cannot be trained")
    files = parsed.get("config") or []
    name = Path(str(files[-1])).stem if files else f"{config.loss.name}-{config.data.dataset}"
    return config, name


def config_of(source: Config | Mapping[str, Any] | str | Path | None, fields: Mapping[str, Any]) -> Config:
    """Build a config in Python.

    Args:
        source: a config, a mapping of its fields, a YAML file or the name of an example config (see
            :mod:`pysupcon.named_configs`), or None for the defaults.
        fields: fields that override those of ``source``: sections, e.g. ``{"trainer": {"epochs": 3}}``, or
            single fields, e.g. ``{"trainer.epochs": 3}``.

    Raises:
        ConfigError: as :func:`parse_args`.
    """
    values: dict[str, Any] = {}
    if isinstance(source, Config):
        values = asdict(source)
    elif isinstance(source, (str, Path)):
        values = compose(source)
    elif source is not None:
        _merge(values, _nested(source))
    _merge(values, _nested(fields))
    parser = _parser()
    config = _instantiate(parser, lambda: parser.parse_object(values))[0]
    if config.model.concatenated:
        raise ConfigError("model.concatenated describes backbones that are frozen: they cannot be trained")
    return config


_PLAIN = ("coarse_map", "columns", "dataset_args", "augmentation_args", "backbone_args", "evaluator_args")
"""Fields that are mappings, whose keys may have dots"""


def _nested(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Expand names with dots, recursively, and convert paths to strings."""
    nested: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, Path):
            value = str(value)
        elif is_dataclass(value) and not isinstance(value, type):
            value = asdict(value)
        elif isinstance(value, Mapping) and name not in _PLAIN:
            value = _nested(value)
        for part in reversed(name.split(".")[1:]):
            value = {part: value}
        _merge(nested, {name.split(".")[0]: value})
    return nested


def compose(path: str | Path) -> dict[str, Any]:
    """Read a config file and the files that it extends.

    A file extends others with ``config: FILE`` or ``config: [FILE, FILE]``, with paths relative to the file.
    The extended files are merged in order, then the file's own fields. Sections are merged recursively; for
    other fields the last value wins. Extended files may extend files in turn. Instead of a file, a name of
    :mod:`pysupcon.named_configs` may be given.

    Raises:
        ConfigError: a file is missing, is not YAML, is not a mapping, or extends itself; the message names
            it.
    """
    return _compose(path, Path(), ())


def _compose(given: str | Path, beside: Path, extending: tuple[Path, ...]) -> dict[str, Any]:
    from jsonargparse import get_loader

    named_by = f" (named by {extending[-1]})" if extending else ""
    try:
        path = named_configs.find(given, beside)
    except ValueError as error:
        raise ConfigError(f"{beside / given}{named_by} cannot be read: {error}") from None
    resolved = Path(os.path.realpath(path))  # unlike Path.resolve, it accepts a loop of links
    if resolved in extending:
        raise ConfigError(f"{path}: config must not lead back to the file itself")
    try:
        own = parse_yaml(path.read_text(encoding="utf-8"), get_loader("yaml"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}{named_by} cannot be read as YAML: {one_line(error)}") from error
    own = {} if own is None else own
    if not isinstance(own, dict):
        raise ConfigError(f"{path} must hold a mapping of config fields, got {type(own).__name__}")
    _check_sections(path, own)
    named = own.pop("config", [])
    named = [named] if isinstance(named, str) else named
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise ConfigError(f"{path}: config must be a file or a list of files, got {named!r}")
    fields: dict[str, Any] = {}
    for name in named:
        _merge(fields, _compose(name, path.parent, (*extending, resolved)))
    _merge(fields, own)
    return fields


def _check_sections(path: Path, fields: dict[str, Any]) -> None:
    """Check that the sections hold fields.

    jsonargparse would read a file that a section names, and import the module that a ``class_path`` names.
    """
    for name in set(fields) & {"data", "model", "loss", "optimizer", "trainer"}:
        section = fields[name]
        if not isinstance(section, dict) or "class_path" in section:
            raise ConfigError(f"{path}: {name} must be a mapping of fields, got {section!r}")


def _merge(fields: dict[str, Any], overrides: dict[str, Any]) -> None:
    for key, value in overrides.items():
        if isinstance(value, dict) and isinstance(fields.get(key), dict):
            _merge(fields[key], value)
        else:
            fields[key] = value


def load_config(path: str | Path) -> Config:
    """Read the config of a run, and refuse references to the user's code unless they are allowed.

    The run may be older or newer than the evaluators. Unknown fields of its evaluation section are ignored
    with a warning; a section that is still not valid is replaced by the defaults with a warning. The run may
    also come from somebody else: the limits of :mod:`pysupcon.reading` apply, and no class is instantiated.

    Raises:
        ConfigError: the file is missing, is not YAML or not a valid config; the message names file and field.
    """
    path = Path(path)
    config = _load_config(path)
    references = config.code_references()
    if references and not user_code.is_allowed():
        named = ", ".join(f"{name}={value}" for name, value in references.items())
        raise ConfigError(
            f"{path} names Python code ({named}), which is imported only with --allow_code (in Python: "
            "pysupcon.user_code.allow()). Pass it if you trust the run"
        )
    return config


def _load_config(path: Path) -> Config:
    try:
        text = read_yaml(path)
        _check_strings(text)
    except ValueError as error:
        raise ConfigError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(text, dict):
        raise ConfigError(f"{path} must hold a mapping of config fields, got {type(text).__name__}")
    _check_sections(path, text)
    if "config" in text:  # jsonargparse asserts that a file named there has been read already
        raise ConfigError(f"{path}: config must be left out: a run's config is complete")
    evaluation = text.get("evaluation", {})
    if not isinstance(evaluation, dict):
        warn_caller(f"{path}: the defaults are used for evaluation: it is no mapping")
        del text["evaluation"]
    else:
        unknown = _drop_unknown(EvaluationConfig, evaluation, "evaluation")
        if unknown:
            warn_caller(f"{path}: {', '.join(unknown)} is unknown and ignored")
    parser = _parser()
    try:
        return _instantiate(parser, lambda: parser.parse_object(text))[0]
    except ConfigError as error:
        if "evaluation" not in str(error) or not text.pop("evaluation", None):
            raise ConfigError(f"{path}: {error}") from error
        config = _instantiate(parser, lambda: parser.parse_object(text))[0]
        warn_caller(f"{path}: the defaults are used for evaluation: {error}")
        return config


def to_yaml(config: Config) -> str:
    """Return the config as YAML with all defaults, for :func:`load_config`."""
    return yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True)


def _check_strings(value: Any) -> None:
    """Check the strings in the values of a config: jsonargparse parses some of them as YAML.

    Raises:
        ValueError: a string exceeds the limits of YAML documents.
    """
    if isinstance(value, str):
        if len(value) > 100:  # a shorter one cannot exceed the limits
            with suppress(yaml.YAMLError):
                check_yaml(value)
    elif isinstance(value, dict):
        for key, entry in value.items():
            _check_strings(key)
            _check_strings(entry)
    elif isinstance(value, list):
        for entry in value:
            _check_strings(entry)


def _drop_unknown(kind: type, values: dict[str, Any], name: str) -> list[str]:
    """Remove keys that are not fields of the dataclass ``kind``, recursively; return their names."""
    types = get_type_hints(kind)
    unknown = [key for key in values if key not in types]
    for key in unknown:
        del values[key]
    dropped = [f"{name}.{key}" for key in unknown]
    for key, value in values.items():
        if isinstance(value, dict) and is_dataclass(types[key]):
            dropped += _drop_unknown(types[key], value, f"{name}.{key}")
    return dropped


@lru_cache(maxsize=1)  # parsing the docstrings is slow
def _parser() -> Any:
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        allow_abbrev=False,
        prog="train.py", exit_on_error=False,
        description="Train a representation with a contrastive loss. --config FILE.yaml sets the fields; "
        "later arguments override the file, e.g. --loss.temperature 0.1.",
    )  # fmt: skip

    class ComposedFile(jsonargparse.ActionConfigFile):
        """Like jsonargparse's own action, but a file may extend several files, and sections are merged."""

        def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
            self.apply_config(parser, cfg, self.dest, yaml.safe_dump(compose(values), sort_keys=False))
            cfg[self.dest][-1] = values

    parser.add_argument(
        "--config", action=ComposedFile,
        help="YAML file with any of the fields below, or the name of an example config, such as "
        "mnist_coarse_spread. Its field config names the files that it extends.",
    )  # fmt: skip
    parser.add_class_arguments(Config)
    return parser


def _instantiate(parser: Any, parse: Any) -> tuple[Config, Any]:
    import argparse

    try:
        parsed = parse()
        config = Config(
            **{name: value for name, value in parser.instantiate(parsed).items() if name != "config"}
        )
    except ConfigError:
        raise
    except (argparse.ArgumentError, TypeError, KeyError, yaml.YAMLError) as error:
        raise ConfigError(did_you_mean(_one_line(error), parser)) from error
    except ValueError as error:  # only the evaluators raise ValueError
        raise ConfigError(f"evaluation: {_one_line(error)}") from error
    config.resolve()
    return config, parsed


def _one_line(error: Exception) -> str:
    """Return the message on one line; type errors of jsonargparse become "FIELD must be TYPE, got VALUE"."""
    text = one_line(error)
    match = re.match(r'Parser key "(?P<field>[^"]+)": (?P<rest>.*)', text)
    if match is None:
        return text
    expected = re.findall(r"Expected an? (.+?)(?= - |\. Got| Given|$)", match["rest"])
    got = re.search(r"(?:Got|Given) value: (.*)", match["rest"])
    if not expected or got is None:
        return f"{match['field']}: {match['rest']}"
    names = [re.sub(r"<class '(\w+)'>|typing\.", r"\1", name) for name in expected]
    return f"{match['field']} must be {' or '.join(names)}, got {got[1]!r}"
