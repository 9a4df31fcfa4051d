"""``pysupcon.train.run``: trainings from Python, with modules and evaluators that a config cannot name."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from helpers.training_server import ENVIRONMENT
from safetensors.torch import load_file, save_file
from torch import nn

from pysupcon.__main__ import main
from pysupcon.config import config_of
from pysupcon.errors import ConfigError, Interrupted
from pysupcon.evaluation.evaluate import evaluate_run
from pysupcon.evaluators import FeatureSplits
from pysupcon.train import run
from pysupcon.trainer.run import load_run, read_log

FIELDS = {
    "data": {"dataset": "digits", "batch_size": 256, "augmentation": "none"},
    "trainer": {"epochs": 1, "cpu": True, "threads": 1},
}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8))


class Width:
    """The width of the embedding."""

    units = {"dimensions": "count"}  # noqa: RUF012

    def __init__(self, factor: int) -> None:
        self.factor = factor

    def __call__(self, splits: FeatureSplits) -> dict[str, int]:
        return {"dimensions": self.factor * splits.test.features.shape[1]}


@pytest.fixture(autouse=True)
def _afresh() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_a_module_and_an_evaluator(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, module = tmp_path / "run", net()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    finished = run(FIELDS, model=module, evaluators=["knn", Width(2)], output_dir=folder)
    assert finished.dir == folder
    assert finished.metrics["Width/dimensions"] == 16
    assert finished.metrics["knn/k=1/fine/accuracy"] > 0.5
    weights = load_file(folder / "model.safetensors")
    assert weights.keys() == {f"backbone.{name}" for name in before}
    assert not torch.equal(weights["backbone.1.weight"], before["1.weight"])
    images = torch.rand(3, 1, 8, 8)
    assert torch.equal(finished.run.model.backbone(images), module.eval()(images))

    assert main(["evaluate", str(folder)]) == 1
    assert "evaluation.evaluators holds a passed object" in capsys.readouterr().err
    for command in (
        ["evaluate", str(folder), "--evaluators", "knn"],
        ["export", str(folder), "--output", "x"],
    ):
        assert main(command) == 1
        message = capsys.readouterr().err
        assert "model.backbone is a passed object torch.nn.modules.container.Sequential" in message
        assert "pass the module again" in message
    other = evaluate_run(load_run(folder, model=net()), evaluators=[Width(1)])
    assert other.metrics["Width/dimensions"].value == 8
    assert other.metrics["knn/k=1/fine/accuracy"].value == finished.metrics["knn/k=1/fine/accuracy"]


def test_resuming_with_the_same_objects(tmp_path: Path) -> None:
    """The resumed run ends with the weights of an uninterrupted one."""
    options = {"evaluate": False, "trainer.checkpoint_steps": 2}
    run(FIELDS, model=net(), output_dir=tmp_path / "whole", **options)
    with pytest.raises(Interrupted):
        run(FIELDS, model=net(), output_dir=tmp_path / "cut", **{"trainer.time_budget": 1e-6}, **options)
    again = {"output_dir": tmp_path / "cut", "resume_from_checkpoint": "latest", **options}
    with pytest.raises(ConfigError, match=r"model\.backbone, .* must be as in the checkpoint"):
        run(FIELDS, **again)
    run(FIELDS, model=net(), **again)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_two_trainings_in_one_process(tmp_path: Path) -> None:
    for precision in ("no", "bf16"):
        folder = tmp_path / precision
        run(FIELDS, model=net(), evaluate=False, output_dir=folder, **{"trainer.mixed_precision": precision})
        assert len(read_log(folder / "log.jsonl")) == 5


def test_a_dry_run(tmp_path: Path) -> None:
    finished = run(FIELDS, model=net(), output_dir=tmp_path / "run", **{"trainer.dry_run": True})
    assert finished.metrics == {}
    assert not (tmp_path / "run").exists()


def test_configs_in_python(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("loss: {name: sincere}\ndata: {dataset: digits}\n")
    from_file = config_of(file, {"trainer.epochs": 3, "trainer": {"cpu": True}, "output_dir": tmp_path})
    assert (from_file.loss.name, from_file.trainer.epochs, from_file.trainer.cpu) == ("sincere", 3, True)
    assert config_of(from_file, {"seed": 4}).loss.name == "sincere"
    with pytest.raises(ConfigError, match="tau"):
        config_of(None, {"loss": {"tau": 1}})
    with pytest.raises(ConfigError, match=r"optimizer\.learning_rate must be"):
        config_of({"optimizer": {"learning_rate": "fast"}}, {})


@pytest.mark.parametrize(
    ("module", "fields", "message"),
    [
        (nn.Conv2d(1, 2, 3), {}, r"map images \[2, 1, 8, 8\] to embeddings .* shape \[2, 2, 6, 6\]"),
        (nn.Flatten(), {}, "model must have a parameter that is trained"),
        (net(), {"model.width": 3}, "model.width must be left out for passed object"),
        (
            net(),
            {"model.encoders": "two", "model.decoder": "plain", "loss.reconstruction_weight": 1.0},
            "model.encoders=two builds two backbones",
        ),
    ],
)
def test_modules_that_are_refused(
    tmp_path: Path, module: nn.Module, fields: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(FIELDS, model=module, output_dir=tmp_path / "run", evaluate=False, **fields)


def test_the_import_starts_nothing() -> None:
    code = (
        "import sys, pysupcon.train; print([m for m in ('accelerate', 'jsonargparse') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True, timeout=300
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


SCRIPT = """
import sys
import torch
from torch import nn
from pysupcon.train import run

torch.manual_seed(0)
module = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 8))
finished = run(
    {"data.dataset": "digits", "data.batch_size": 256, "data.augmentation": "none", "loss.gather": True},
    model=module, evaluators=["knn"], output_dir=sys.argv[1],
    trainer={"epochs": 1, "cpu": True, "threads": 1},
)
print("knn" if finished.metrics else "no metrics", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_script_under_a_launcher(tmp_path: Path, processes: int) -> None:
    """Two processes train what one trains; the first of them evaluates."""
    (tmp_path / "script.py").write_text(SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    expected: Callable[[str], list[str]] = lambda said: sorted(  # noqa: E731
        line for line in said.splitlines() if line in ("knn", "no metrics")
    )
    for number in {1, processes}:
        done = subprocess.run(
            [*launcher, str(number), "script.py", str(number)], cwd=tmp_path, env=ENVIRONMENT,
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert expected(done.stdout) == ["knn", "no metrics"][:number]
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("1", str(processes)))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=2e-4)


class Rows(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """Vectors whose class is their sign."""

    def __init__(self, count: int = 200) -> None:
        generator = torch.Generator().manual_seed(0)
        self.targets = [index % 2 for index in range(count)]
        self.rows = torch.randn(count, 6, generator=generator) + 3 * torch.tensor(self.targets)[:, None]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.rows[index], self.targets[index]


ROW_FIELDS = {
    "data": {"batch_size": 32, "augmentation": "noise"},
    "model": {"backbone": "mlp", "width": 16},
    "evaluation": {"evaluators": ["knn", "linear_probe"], "progress": False},
    "trainer": {"epochs": 3, "cpu": True, "threads": 1},
}


def test_a_passed_data_set(tmp_path: Path) -> None:
    """Trained, resumed and evaluated with the object; a message asks for it where it is not passed."""
    folder = tmp_path / "run"
    finished = run(ROW_FIELDS, dataset=Rows(), output_dir=folder)
    assert finished.metrics["knn/k=1/fine/accuracy"] > 0.95
    assert finished.run.config.data.dataset == f"passed object {Rows.__module__}.Rows"
    again = load_run(folder, dataset=Rows())
    assert evaluate_run(again).metrics["knn/k=1/fine/accuracy"].value > 0.95
    with pytest.raises(ConfigError, match="an object that was passed to"):
        _ = load_run(folder).data


def test_a_named_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The run's config holds reference and arguments; evaluate needs --allow_code in a new process."""
    folder = tmp_path / "run"
    fields = {**ROW_FIELDS, "data": {**ROW_FIELDS["data"], "dataset": f"{__name__}:Rows",
                                     "dataset_args": {"count": 120}}}  # fmt: skip
    finished = run(fields, output_dir=folder, evaluate=False)
    assert sum(map(len, finished.run.data.splits.values())) == 120
    text = (folder / "config.yaml").read_text()
    assert f"dataset: {__name__}:Rows" in text
    assert main(["evaluate", str(folder), "--allow_code", "--evaluators", "knn", "--progress", "false"]) == 0
    assert "k=1/fine/accuracy" in capsys.readouterr().out


def test_images_need_another_backbone(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.backbone must be small_cnn or a timm model, .* got 'mlp'"):
        run(FIELDS, output_dir=tmp_path / "a", model=None, **{"model.backbone": "mlp"})
    with pytest.raises(ConfigError, match=r"model.backbone must be mlp, .* got 'small_cnn'"):
        run({**ROW_FIELDS, "model": {}}, dataset=Rows(), output_dir=tmp_path / "b")


def test_names_instead_of_objects(tmp_path: Path) -> None:
    """A str is the value of the field."""
    finished = run(FIELDS, dataset="digits", model="small_cnn", evaluate=False, output_dir=tmp_path / "run")
    assert (finished.run.config.data.dataset, finished.run.config.model.backbone) == ("digits", "small_cnn")


def test_vectors_are_transferred_to_vectors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    for name, width in (("same", 6), ("other", 5)):
        rows = torch.randn(90, width, generator=torch.Generator().manual_seed(1))
        save_file({"features": rows, "label": torch.arange(90) % 3}, tmp_path / f"{name}.safetensors")
    run(ROW_FIELDS, dataset="arrays", output_dir=folder, evaluate=False, **{
        "data.root": tmp_path / "same.safetensors"})  # fmt: skip
    arguments = ["transfer", str(folder), "--progress", "false", "--data.dataset"]
    assert main([*arguments, "arrays", "--data.root", str(tmp_path / "same.safetensors")]) == 0
    assert "accuracy" in capsys.readouterr().out
    assert main([*arguments, "arrays", "--data.root", str(tmp_path / "other.safetensors")]) == 1
    assert "has vectors of 5 features, but the encoder of" in capsys.readouterr().err
    assert main([*arguments, "digits"]) == 1
    assert "has images, but the encoder of" in capsys.readouterr().err
