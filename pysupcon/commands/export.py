"""``pysupcon export RUN --output DIR``: write a trained backbone in timm's layout for model hubs.

DIR gets model.safetensors, config.json and a model card, README.md. If timm can build the backbone,
``timm.create_model("local-dir:DIR", pretrained=True)`` loads it (``hf-hub:...`` after an upload). Otherwise
the card shows how to load it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pysupcon.commands import plain_parser, program
from pysupcon.errors import ConfigError, RunError
from pysupcon.reading import read_json
from pysupcon.reports.report import OF_ONE_RUN, Markdown, escape, markdown_table
from pysupcon.user_code import is_own

if TYPE_CHECKING:
    from pysupcon.models import ModelConfig
    from pysupcon.trainer.run import Run

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
METRICS = Path("evaluation") / "metrics.json"
FINAL_WEIGHTS = {
    "last": "last step",
    "best": "best checkpoint on the validation split",
    "ema": "moving average",
}


def export_run(run_dir: str | Path, output: str | Path) -> Path:
    """Write the backbone of a finished run.

    Args:
        run_dir: folder of the run.
        output: folder to create; it must not exist or must be empty.

    Returns:
        ``output``.

    Raises:
        RunError: the run is not finished or damaged, its metrics are damaged, or ``output`` is not empty.
        ConfigError: the config of the run is not valid.
    """
    from pysupcon.models.spectral import unparametrized_state_dict
    from pysupcon.trainer.checkpoint import pack_weights
    from pysupcon.trainer.files import check_new_or_empty, new_folder
    from pysupcon.trainer.run import load_run

    run, output = load_run(run_dir), Path(output)
    check_new_or_empty(output)
    weights = {
        name: value.contiguous() for name, value in unparametrized_state_dict(run.model.backbone).items()
    }
    metrics = _metrics(run)
    with new_folder(output) as folder:
        (folder / WEIGHTS).write_bytes(pack_weights(weights))
        (folder / CONFIG).write_text(json.dumps(hub_config(run), indent=2) + "\n", encoding="utf-8")
        (folder / CARD).write_text(model_card(run, metrics, output.resolve().name), encoding="utf-8")
    return output


def timm_builds(run: Run) -> bool:
    """Return whether timm.create_model can build this backbone.

    It cannot build the small CNN, the user's own backbone, one with a small stem, or several backbones.
    """
    model = run.config.model
    plain = model.backbone in ("small_cnn", "mlp") or is_own(model.backbone) or model.small_stem
    return not (plain or _has_several_backbones(run))


def _has_several_backbones(run: Run) -> bool:
    return _has_two_encoders(run.config.model) or bool(run.config.model.concatenated)


def _backbone_arguments(model: ModelConfig) -> dict[str, Any]:
    """The arguments of ModelConfig that build the backbone."""
    if model.concatenated:
        return {"concatenated": [{"model": _backbone_arguments(part)} for part in model.part_configs()]}
    default, model = type(model)(), model.without_initial_weights()
    optional = ("width", "small_stem", "timm_args", "backbone_args", "encoders")
    given = {
        name: getattr(model, name) for name in optional if getattr(model, name) != getattr(default, name)
    }
    decoder = {"decoder": model.decoder} if _has_two_encoders(model) else {}
    return {"backbone": model.backbone, **given, **decoder}


def _has_two_encoders(model: ModelConfig) -> bool:
    return model.encoders == "two"


def hub_config(run: Run) -> dict[str, Any]:
    """Return config.json in timm's hub layout; without "architecture" if timm cannot build the backbone."""
    data, model = run.data_of_model, run.config.model
    size = [data.channels, data.image_size, data.image_size]
    config: dict[str, Any] = {
        "num_classes": 0,
        "num_features": run.model.embedding_dim,
        "pretrained_cfg": {
            "num_classes": 0,
            "input_size": size,
            "fixed_input_size": False,
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": data.normalize.mean.flatten().tolist(),
            "std": data.normalize.std.flatten().tolist(),
        },
    }
    if not timm_builds(run):
        return config | {"pysupcon": _backbone_arguments(model)}
    name, _, tag = model.backbone.partition(".")
    arguments = {"in_chans": data.channels, **model.without_initial_weights().timm_args}
    # timm replaces the layers of these names for other channels or classes.
    timm_config: Any = run.model.backbone.pretrained_cfg
    layers = ("first_conv", "classifier")
    config["pretrained_cfg"] |= {key: timm_config[key] for key in layers if key in timm_config}
    return {"architecture": name, **({"tag": tag} if tag else {}), **config, "model_args": arguments}


def model_card(run: Run, metrics: dict[str, Any] | None, name: str) -> str:
    """Return README.md: usage, training and evaluation of the backbone.

    Args:
        run: the run.
        metrics: content of its metrics.json; None if the run was not evaluated.
        name: name of the model.

    Raises:
        ConfigError: an entry of model.concatenated does not describe the training of its backbone.
    """
    config, data = run.config, run.data_of_model
    head = ["---", "tags:", "- image-feature-extraction", "- contrastive-learning", "- pysupcon"]
    head += ["- timm", "library_name: timm"] if timm_builds(run) else []
    head += ["pipeline_tag: image-feature-extraction", "---", ""]
    training = {
        "data": f"{config.data.dataset}, {config.data.labels} labels ({', '.join(data.class_names[:12])}"
        + (", ...)" if len(data.class_names) > 12 else ")"),
        "loss": _by_part(run, lambda part: _loss(part["loss"])),
        "batch": f"{config.data.global_batch_size} samples, {config.data.views} views each",
        "optimiser": _by_part(
            run,
            lambda part: (
                f"{part['optimizer']['name']}, learning rate "
                f"{part['optimizer']['learning_rate']:g}, {part['epochs']} epochs"
            ),
        ),
        "weights": _by_part(run, lambda part: FINAL_WEIGHTS[part["final_weights"]]),
        "images": f"{data.channels} x {data.image_size} x {data.image_size}, scaled to [0, 1], minus "
        f"{_numbers(data.normalize.mean)}, divided by {_numbers(data.normalize.std)}",
        "embedding": f"{run.model.embedding_dim} dimensions",
    }
    lines = [
        *head,
        f"# {escape(name)}",
        "",
        f"{escape(_summary(run))}, trained by pysupcon.",
        "",
        "## Use",
        "",
        *_usage(run),
        "",
        "## Training",
        "",
        *markdown_table(("", ""), training.items()),
        "",
        "## Evaluation",
        "",
    ]
    if metrics is None:
        lines.append("The run was not evaluated; use `pysupcon evaluate RUN`.")
    else:
        lines += _table(metrics)
        if any(metric.get("low") is not None for metric in metrics["metrics"].values()):
            lines += ["", f"In brackets: intervals. {OF_ONE_RUN}"]
    return "\n".join(lines) + "\n"


def _summary(run: Run) -> str:
    model = run.config.model
    if model.concatenated:
        return "Concatenation of " + " and ".join(f"a {part.backbone}" for part in model.part_configs())
    return f"Two concatenated {model.backbone}" if _has_two_encoders(model) else f"A {model.backbone}"


def _by_part(run: Run, describe: Callable[[dict[str, Any]], str]) -> str:
    """Describe the training of the run, or of each run of a concatenation."""
    config = run.config
    if config.model.concatenated:
        parts = enumerate(config.model.concatenated, 1)
        try:
            return "; ".join(f"{describe(part)} (part {i})" for i, part in parts)
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{run.dir}: model.concatenated must describe how each backbone was trained: {error!r}"
            ) from error
    return describe(config.as_concatenated_part())


def _loss(loss: dict[str, Any]) -> str:
    learned = " (initial value, learned)" if loss["learnable_temperature"] else ""
    parts = (
        [] if loss["name"] == "none" else [f"{loss['name']}, temperature {loss['temperature']:g}{learned}"]
    )
    named = {"infonce": "InfoNCE", "cross_entropy": "cross-entropy", "reconstruction": "reconstruction"}
    weights = {words: loss[f"{name}_weight"] for name, words in named.items()}
    return ", ".join([*parts, *(f"{words} weight {weight:g}" for words, weight in weights.items() if weight)])


def _usage(run: Run) -> list[str]:
    if timm_builds(run):
        return [
            "```python",
            "import timm",
            "",
            'model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()  # folder of this file',
            "embedding = model(images)",
            "```",
        ]
    reason = "its stem is for small images" if run.config.model.small_stem else "it is part of pysupcon"
    if is_own(run.config.model.backbone):
        reason = f"it is built by {run.config.model.backbone}, a module that must be importable"
    if _has_several_backbones(run):
        reason = "it consists of two backbones"
    arguments = ", ".join(f"{key}={value!r}" for key, value in _backbone_arguments(run.config.model).items())
    return [
        f"timm.create_model cannot build this backbone: {reason}. With pysupcon installed:",
        "",
        "```python",
        "from pysupcon.models import ModelConfig",
        "from pysupcon.models.backbones import build_backbone",
        "from safetensors.torch import load_file",
        "",
        f"config = ModelConfig({arguments})",
        f"model, _ = build_backbone(config, channels={run.data_of_model.channels}, "
        f"image_size={run.data_of_model.image_size})",
        f'model.load_state_dict(load_file("{WEIGHTS}"))',
        "embedding = model.eval()(images)",
        "```",
    ]


def _metrics(run: Run) -> dict[str, Any] | None:
    path = run.dir / METRICS
    if not path.is_file():
        return None
    try:
        content: dict[str, Any] = read_json(path)
        _table(content)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise RunError(f"{path} is damaged: {error!r}") from error
    return content


def _table(content: dict[str, Any]) -> list[str]:
    """The table of metrics, without those of single classes and groups."""
    rows = []
    for name, metric in content["metrics"].items():
        if "class=" in name or "group=" in name:
            continue
        fraction = metric.get("unit") == "fraction"
        numbers = [metric["value"], *(metric[end] for end in ("low", "high") if metric.get(end) is not None)]
        shown = [f"{100 * number:.2f}" if fraction else f"{number:.4g}" for number in numbers]
        interval = f" [{shown[1]}, {shown[2]}]" if len(shown) == 3 else ""
        unit = "%" if fraction else str(metric.get("unit", ""))
        rows.append((name, Markdown(f"{shown[0]}{interval}"), unit))
    return markdown_table(("metric", "value", "unit"), rows)


def _numbers(tensor: Any) -> str:
    return ", ".join(f"{number:.4g}" for number in tensor.flatten().tolist())


def main(arguments: Sequence[str]) -> int:
    """Write the backbone; return the exit status."""
    parser = plain_parser(
        prog=f"{program()} export",
        description="Write the trained backbone of a run in timm's layout: model.safetensors, config.json "
        "and a model card.",
    )
    parser.add_argument("run_dir", help="folder of a finished run")
    parser.add_argument("--output", required=True, help="folder to create")
    given = parser.parse_args(arguments)
    try:
        output = export_run(given.run_dir, given.output)
    except (RunError, ConfigError) as error:
        print(f"pysupcon export: {error}", file=sys.stderr)
        return 1
    print(f"written to {output}: {WEIGHTS}, {CONFIG}, {CARD}")
    return 0
