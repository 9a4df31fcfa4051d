"""The Lipschitz constants that an evaluation reports."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pysupcon.__main__ import main
from pysupcon.config import parse_args
from pysupcon.errors import RunError
from pysupcon.evaluation.evaluate import evaluate_run
from pysupcon.evaluators import BootstrapConfig, EvaluationConfig, KNNConfig, OwnEvaluator
from pysupcon.models.lipschitz import certified_bound, local_constants
from pysupcon.pairs import arguments as arguments_of_losses
from pysupcon.reports.report import Report
from pysupcon.train import run
from pysupcon.trainer.loop import train
from pysupcon.trainer.run import load_run

CONFIG = EvaluationConfig(
    evaluators=["knn"], knn=KNNConfig(k=[1]), bootstrap=BootstrapConfig(resamples=20), pictures=False,
    progress=False,
)  # fmt: skip
NAMES = {f"lipschitz/{kind}/{which}" for kind in ("local", "raw") for which in ("median", "max")}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    arguments = (
        "--data.dataset digits --data.augmentation none --data.batch_size 128 --trainer.threads 1 "
        "--evaluate false --trainer.cpu true --model.width 4 --trainer.epochs 1 --trainer.best_by null "
        "--model.spectral_norm true --model.lipschitz 1.5"
    )
    folder = tmp_path_factory.mktemp("trained") / "run"
    arguments_of_losses._warned.discard("norms")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the rows of features")  # short rows are expected
        train(parse_args([*arguments.split(), "--output_dir", str(folder)])[0])
    return folder


def test_constants_of_a_bounded_run(run_dir: Path) -> None:
    metrics = evaluate_run(run_dir, CONFIG).metrics
    found = {name for name in metrics if name.startswith("lipschitz/")}
    assert found == NAMES | {"lipschitz/bound"}
    assert "certified upper bound" in metrics["lipschitz/bound"].meaning
    loaded = load_run(run_dir)
    validation = loaded.splits()["val"]
    images = torch.stack([validation[i][0] for i in range(len(validation))])
    every = local_constants(loaded.model.backbone, images)
    assert float(every.min()) <= metrics["lipschitz/local/median"].value <= float(every.quantile(0.75))
    # The sample holds the first and the last image.
    largest = metrics["lipschitz/local/max"].value
    assert float(every[[0, -1]].max()) * 0.999 <= largest <= float(every.max()) * 1.001
    bound = metrics["lipschitz/bound"].value
    assert bound == certified_bound(loaded.model.backbone, (1, 8, 8))
    assert metrics["lipschitz/raw/max"].value <= bound
    assert bound < 1.5**10 * 1.2**5 / 4


@pytest.mark.parametrize("encoders", ["one", "two"])
def test_constants_of_the_projection(tmp_path: Path, encoders: str) -> None:
    """The bound is that of the first backbone times that of the head."""
    torch.manual_seed(0)
    model = {
        "width": 2,
        "spectral_norm": True,
        "projection": "mlp",
        "projection_dim": 3,
        "encoders": encoders,
    }
    more = {"model": {"decoder": "plain"}, "loss": {"reconstruction_weight": 1}} if encoders == "two" else {}
    settings = {
        "data": {"dataset": "digits", "batch_size": 128},
        "trainer": {"max_steps": 2},
        "loss": more.get("loss", {}),
        "model": model | more.get("model", {}),
    }
    finished = run(
        settings, evaluation={**_fields(), "features": "projection"}, output_dir=str(tmp_path / "r")
    )
    trained = finished.run.model
    backbone = trained.backbone.parts[0] if encoders == "two" else trained.backbone
    parts = certified_bound(backbone, (1, 8, 8)), certified_bound(trained.projection, (8,))
    bound = finished.metrics["lipschitz/bound"]
    assert bound == pytest.approx(parts[0] * parts[1])
    assert 0 < finished.metrics["lipschitz/raw/max"] <= bound
    assert parts[1] == pytest.approx(1, abs=0.2)


def test_when_they_are_measured(run_dir: Path, tmp_path: Path) -> None:
    evaluate_run(run_dir, CONFIG)
    before = Report.from_json((run_dir / "evaluation/metrics.json").read_text()).metrics
    arguments = "--evaluators knn --knn.k 5 --lipschitz false --pictures false --progress false"
    assert main(["evaluate", str(run_dir), *arguments.split(), "--bootstrap.resamples", "20"]) == 0
    report = Report.from_json((run_dir / "evaluation/metrics.json").read_text())
    assert {name: report.metrics[name] for name in NAMES} == {name: before[name] for name in NAMES}
    assert "lipschitz" in report.metadata["kept"], "not measured again"

    settings = {"data": {"dataset": "digits", "batch_size": 128}, "trainer": {"epochs": 1, "max_steps": 1}}
    finished = run(settings, model={"width": 2}, evaluation=_fields(), output_dir=str(tmp_path / "plain"))
    assert not NAMES & set(finished.metrics)
    assert set(evaluate_run(finished.run, replace(CONFIG, lipschitz=True)).metrics) > NAMES


def _fields() -> dict[str, object]:
    return {"evaluators": ["knn"], "pictures": False, "progress": False, "bootstrap": {"resamples": 20}}


class _NoForwardMode(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def setup_context(ctx: object, inputs: object, output: object) -> None:
        pass

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad * 2


class _Doubled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(_NoForwardMode.apply(images.flatten(1)))


def test_a_backbone_that_cannot_be_differentiated(tmp_path: Path) -> None:
    """The error names the option, and the other results are written."""
    data = {"dataset": "digits", "batch_size": 128}
    finished = run(
        data=data, model=_Doubled(), trainer={"max_steps": 1}, evaluation=_fields(),
        output_dir=str(tmp_path / "run"),
    )  # fmt: skip
    with pytest.raises(RunError, match=r"evaluation.lipschitz needs an encoder .*--lipschitz false"):
        evaluate_run(finished.run, replace(CONFIG, lipschitz=True))
    metrics = Report.from_json((finished.dir / "evaluation/metrics.json").read_text()).metrics
    assert "knn/k=1/fine/accuracy" in metrics
    assert not NAMES & set(metrics)


def test_the_name_is_taken(run_dir: Path) -> None:
    class Mine:
        name = "lipschitz"

        def __call__(self, splits: object) -> dict[str, float]:
            return {"constant": math.pi}

    with pytest.raises(Exception, match="the name lipschitz is taken"):
        evaluate_run(run_dir, CONFIG, evaluators=[Mine()])
    assert OwnEvaluator(Mine(), "Mine").name == "lipschitz"
