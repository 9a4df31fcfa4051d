"""``--config NAME``: example configs by name. tests/commands/test_packaging.py tries an installed wheel."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pysupcon import named_configs, train
from pysupcon.config import compose, config_of, parse_args
from pysupcon.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No config lies in the working directory."""
    monkeypatch.chdir(tmp_path)


def test_every_config_has_a_name() -> None:
    names = named_configs.names()
    assert {CONFIGS / f"{name}.yaml" for name in names} == set(CONFIGS.rglob("*.yaml"))
    for name in names:
        assert named_configs.find(name) == CONFIGS / f"{name}.yaml"
    assert "mnist_coarse_spread" in names


@pytest.mark.parametrize(
    "given",
    [
        "coarse/mnist_coarse_thanos",
        "coarse/mnist_coarse_thanos.yaml",
        "configs/coarse/mnist_coarse_thanos.yaml",
        "mnist_coarse_thanos",
        "mnist_coarse_thanos.yaml",
        Path("coarse") / "mnist_coarse_thanos",
    ],
)
def test_forms_of_a_name(given: str | Path) -> None:
    expected = compose(CONFIGS / "coarse/mnist_coarse_thanos.yaml")
    assert compose(given) == expected
    config, name = parse_args(["--config", str(given), "--data.root", "data"])
    assert (name, config.model.encoders) == ("mnist_coarse_thanos", "two")


def test_a_file_comes_before_a_name(tmp_path: Path) -> None:
    (tmp_path / "digits_smoke").mkdir()  # such as the folder of a run
    assert compose("digits_smoke") == compose(CONFIGS / "digits_smoke.yaml")
    (tmp_path / "digits_smoke.yaml").write_text("seed: 7")
    assert compose("digits_smoke.yaml") == {"seed": 7}
    assert compose("digits_smoke")["data"]["dataset"] == "digits"


def test_python_and_own_files_take_names(tmp_path: Path) -> None:
    assert config_of("digits_smoke", {}).data.dataset == "digits"
    own = tmp_path / "own" / "run.yaml"
    own.parent.mkdir()
    own.write_text("config: [beside.yaml, parts/method/infonce, digits_smoke]\nseed: 3")
    (own.parent / "beside.yaml").write_text("trainer: {clip_norm: 0.5}")
    fields = compose(own)
    assert fields["trainer"]["clip_norm"] == 0.5
    assert (fields["seed"], fields["data"]["dataset"]) == (3, "digits")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("mnist_coarse_sprad", "no example config of this name; similar names: mnist_coarse_spread, "),
        ("coarse/mnist_thanos", r"similar names: (\S+, )*coarse/mnist_coarse_thanos"),
        ("supcon", "no example config of this name"),  # parts/method/supcon is a part of configs
        ("0000", "no example config of this name; the example configs are in .*configs$"),
        ("runs", "it is a folder, and there is no example config of this name"),
        (
            "/none/digits_smoke",
            "no such file and no example config of this name; similar names: digits_smoke",
        ),
        ("../configs/digits_smoke.yaml", "no such file and no example config of this name"),
    ],
)
def test_a_wrong_name(tmp_path: Path, given: str, message: str) -> None:
    (tmp_path / "runs").mkdir()
    with pytest.raises(ConfigError, match=message) as caught:
        parse_args(["--config", given])
    assert str(caught.value).startswith(f"{given} cannot be read: ")
    assert "\n" not in str(caught.value)


def test_a_wrong_name_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("config: digits_smok")
    with pytest.raises(ConfigError, match=r"digits_smok \(named by .*run.yaml\) .* names: digits_smoke"):
        compose("run.yaml")


def test_a_pipe_is_read(tmp_path: Path) -> None:
    """``--config <(command)`` of a shell."""
    read, write = os.pipe()
    os.write(write, b"seed: 5")
    os.close(write)
    try:
        assert compose(f"/dev/fd/{read}") == {"seed": 5}
    finally:
        os.close(read)


def test_only_the_folder_of_the_package_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder configs in site-packages may belong to another package."""
    site = tmp_path / "site"
    (site / "pysupcon").mkdir(parents=True)
    (site / "configs").mkdir()
    (site / "configs" / "foreign.yaml").write_text("seed: 1")
    monkeypatch.setattr(named_configs, "PACKAGE", site / "pysupcon")
    assert (named_configs.folder(), named_configs.names()) == (None, [])
    with pytest.raises(ConfigError, match="foreign cannot be read as YAML: No such file"):
        compose("foreign")
    (site / "setup.py").touch()
    assert named_configs.names() == ["foreign"]
    (site / "pysupcon" / "configs").mkdir()
    (site / "pysupcon" / "configs" / "own.yaml").write_text("seed: 2")
    assert named_configs.names() == ["own"]
    for folder in ("a", "b", "parts"):
        (site / "pysupcon" / "configs" / folder).mkdir()
        (site / "pysupcon" / "configs" / folder / "same.yaml").write_text("seed: 3")
    with pytest.raises(ConfigError, match=r"several .* have this name: pass a/same or b/same$"):
        compose("same")
    assert compose("parts/same") == {"seed": 3}


@pytest.mark.slow
def test_the_launched_script_takes_a_name(tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "-q", str(train.__file__)]
    done = subprocess.run(
        [*launch, "--config", "digits_smoke", "--trainer.dry_run", "true"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []
