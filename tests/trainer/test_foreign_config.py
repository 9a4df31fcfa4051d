"""The config of a run that comes from somebody else: it runs no code, opens no other file, and is limited."""

from __future__ import annotations

import json
import pickle
from contextlib import suppress
from pathlib import Path

import pytest
import timm
import torch
import yaml

from pysupcon import reading
from pysupcon.config import compose, load_config, parse_args, to_yaml
from pysupcon.data.config import DataConfig
from pysupcon.data.datamodule import load_data
from pysupcon.errors import ConfigError
from pysupcon.models import ModelConfig
from pysupcon.trainer.checkpoint import save_weights
from pysupcon.trainer.run import build_model, load_run


def bomb(levels: int, width: int = 9) -> str:
    """A YAML mapping of ``levels`` lines whose last value holds width ** levels numbers."""
    lines = [f"a0: &a0 [{', '.join(['1'] * width)}]"]
    for level in range(1, levels):
        lines.append(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * width)}]")
    return "\n".join(lines)


REFUSED = {
    "aliases": (bomb(9), "at most 200000 values, aliases expanded"),
    "aliases in a string": (f"model: {{backbone: {json.dumps(bomb(9))}}}", "at most 200000 values"),
    "an alias of its parent": ("model: &a {backbone: [*a]}", r"the alias \*a must not refer to a part that"),
    "an unknown alias": ("model: *a", "undefined alias"),
    "nested": (f"model: {'[' * 100_000}", "at most 50 nested levels"),
    "a long file": ("#" + "x" * reading.MAX_YAML_BYTES, "at most 4194304 bytes"),
    "a long number": (f"seed: 1{':59' * 400_000}", "a number must have at most 1000 characters"),
    "a tagged number": (f"seed: !!int '_1{':59' * 400_000}'", "a number must have at most 1000 characters"),
    "a tag that does not fit": ("seed: !!bool x", "'x'"),
    "a float that is too large": (f"seed: 1{':59' * 300}.0", "int too large to convert to float"),
    "a date that does not exist": ("seed: 2001-99-99", "month must be in"),
    "not UTF-8": ("seed: \udc80", "can't decode byte 0x80"),
    "files that it extends": ("config: other.yaml", "config must be left out: a run's config is complete"),
    "an option of the command line": ("print_config: true", "print_config"),
    "a section that names a file": ("data: other.yaml", "data must be a mapping of fields, got 'other.yaml'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_are_one_line_that_names_the_file(tmp_path: Path, case: str) -> None:
    text, message = REFUSED[case]
    path = tmp_path / "config.yaml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", ["aliases", "an alias of its parent", "nested", "a long number"])
def test_a_config_on_the_command_line_has_the_same_limits(tmp_path: Path, case: str) -> None:
    text, message = REFUSED[case]
    (tmp_path / "broken.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        compose(tmp_path / "broken.yaml")


def test_links_that_lead_to_themselves(tmp_path: Path) -> None:
    (tmp_path / "loop.yaml").symlink_to(tmp_path / "loop.yaml")
    with pytest.raises(ConfigError, match=r"loop.yaml cannot be read as YAML: Too many levels"):
        compose(tmp_path / "loop.yaml")


def test_aliases_within_the_limits_are_read() -> None:
    text = "a: &a {x: 1}\nb: [*a, *a]\nc: {<<: *a, y: 2}\nd: &d 3\ne: *d"
    expected = {"a": {"x": 1}, "b": [{"x": 1}] * 2, "c": {"x": 1, "y": 2}, "d": 3, "e": 3}
    assert reading.parse_yaml(text) == expected
    assert len(json.dumps(reading.parse_yaml(bomb(4)))) > 9**4


def test_json_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.json"
    for text, message in (("[" * 100_000, "nested too deeply"), ("{", "Expecting property name")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            reading.read_json(path)
    monkeypatch.setattr(reading, "MAX_JSON_BYTES", 10)
    path.write_text('"0123456789"')
    with pytest.raises(ValueError, match="at most 10 bytes"):
        reading.read_json(path)


EVIL = {"class_path": "os.system", "init_args": {"command": "touch called"}}


@pytest.mark.parametrize(
    "model",
    [
        {"backbone": "resnet10t", "timm_args": {"x": EVIL}},
        {"backbone": "resnet10t", "timm_args": EVIL},
        {"backbone": "resnet10t", "timm_args": {"x": [EVIL]}},
        {"backbone": "resnet10t", "timm_args": {"x": str(EVIL)}},
        {"backbone": "resnet10t", "timm_args": str({"x": EVIL})},
        {"concatenated": [{"model": {"timm_args": EVIL}}]},
        {"concatenated": [{"model": EVIL}]},
        EVIL,
        {"class_path": "imported.Name"},
    ],
)
def test_no_config_imports_or_calls_what_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: dict[str, object]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "imported.py").write_text("open('called', 'w')")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"model": model}))
    for read in (lambda: load_config(path), lambda: parse_args(["--config", str(path)])):
        with suppress(ConfigError):
            read()
        assert not (tmp_path / "called").exists()


class Evil:
    """Creates the file "called" if it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return open, ("called", "w")  # type: ignore[return-value]


@pytest.mark.parametrize(
    "arguments",
    [
        {"pretrained": True},
        {"checkpoint_path": "evil.pth"},
        {"pretrained": True, "pretrained_cfg": {"file": "evil.pth", "num_classes": 0}},
        {"pretrained": True, "pretrained_cfg_overlay": {"file": "evil.pth"}},
        {"pretrained": True, "pretrained_cfg": {"source": "local-dir", "file": "."}},
        {"pretrained": True, "pretrained_cfg_overlay": {"url": "file:evil.pth", "custom_load": True}},
    ],
)
def test_a_finished_run_reads_its_own_weights_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, object]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("evil.pth").write_bytes(pickle.dumps(Evil()))
    config = parse_args(["--data.dataset", "digits", "--model.backbone", "resnet10t"])[0]
    plain = build_model(config, load_data(DataConfig(dataset="digits")))
    config.model.timm_args = arguments  # type: ignore[assignment]
    Path("run").mkdir()
    Path("run/config.yaml").write_text(to_yaml(config))
    save_weights(plain.state_dict(), Path("run/model.safetensors"))

    def unexpected(*args: object, **kwargs: object) -> None:
        raise AssertionError("timm must not read weights")

    readers = "load_state_dict load_state_dict_from_hf load_state_dict_from_url download_cached_file"
    for name in readers.split():
        monkeypatch.setattr(timm.models._builder, name, unexpected)
    monkeypatch.setattr(timm.models._factory, "load_checkpoint", unexpected)
    run = load_run("run")
    assert run.config.model.timm_args == arguments  # a resumed training compares them
    images = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(run.model.backbone(images), plain.eval().backbone(images))
    assert not Path("called").exists()


def test_parts_of_a_concatenation_have_no_initial_weights() -> None:
    part = {"model": {"backbone": "resnet10t", "timm_args": {"checkpoint_path": "evil.pth", "stem_width": 8}}}
    assert [part.timm_args for part in ModelConfig(concatenated=[part]).part_configs()] == [{"stem_width": 8}]


def test_a_training_names_the_weights_that_it_cannot_read(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.pth")
    config = parse_args(["--data.dataset", "digits", "--model.backbone", "resnet10t"])[0]
    config.model.timm_args = {"checkpoint_path": missing}
    with pytest.raises(ConfigError, match=r"model.timm_args .*missing.pth.* do not fit resnet10t") as caught:
        build_model(config, load_data(DataConfig(dataset="digits")))
    assert "\n" not in str(caught.value)
