"""The command ``circle``: points on a circle that minimise the losses."""

from __future__ import annotations

import json
import math

import pytest
import torch

from pysupcon.__main__ import main
from pysupcon.commands import circle
from pysupcon.commands.circle import CircleConfig, minimise, on_circle


def test_alpha_and_temperature_decide_on_collapse_or_spread():
    config = CircleConfig(classes=2, samples=4, steps=150)
    collapsed, spread = (minimise(config, alpha, 0.5) for alpha in (0.0, 0.95))
    assert collapsed.spread < 0.02
    assert collapsed.separation == pytest.approx(180, abs=2)
    # SINCERE's floor: all positives together, all negatives opposite. Both views of a sample count.
    assert collapsed.loss == pytest.approx(math.log1p(8 * math.exp(-2 / 0.5)), rel=1e-2)
    assert spread.spread == pytest.approx(1.0, abs=0.02)  # the class mean is the centre
    # cNCE alone spreads a class of four evenly: neighbours a quarter of a turn apart.
    alone = minimise(config, 1.0, 0.5)
    points = torch.tensor(alone.points[:4], dtype=torch.float64)
    turned = points[torch.atan2(points[:, 1], points[:, 0]).argsort()]
    steps = (turned * turned.roll(1, dims=0)).sum(dim=1)
    assert steps.abs().max() < 0.05
    assert minimise(config, 0.0, 0.5) == collapsed


def test_the_better_of_both_starts_is_kept(monkeypatch):
    config = CircleConfig(classes=2, samples=2, steps=1, learning_rate=1e-9)
    good, bad = torch.tensor([0, 0, torch.pi, torch.pi]), torch.tensor([0, torch.pi, 0, torch.pi])
    for starts in ([good, bad], [bad, good]):
        monkeypatch.setattr(circle, "_starts", lambda _, s=starts: [a.double().clone() for a in s])
        kept = minimise(config, 0.0, 0.5)
        torch.testing.assert_close(
            torch.tensor(kept.points), on_circle(good.double()).float(), atol=1e-5, rtol=0
        )


def test_the_command_writes_numbers_and_picture(tmp_path, capsys):
    arguments = ["--alphas", "[0.0, 0.9]", "--temperatures", "[0.5]", "--steps", "20", "--samples", "3"]
    assert main(["circle", *arguments, "--output", str(tmp_path / "out"), "--progress", "false"]) == 0
    content = json.loads((tmp_path / "out" / "circle.json").read_text())
    assert [entry["alpha"] for entry in content["circles"]] == [0.0, 0.9]
    assert content["config"]["steps"] == 20
    assert all(math.hypot(*point) == pytest.approx(1) for point in content["circles"][0]["points"])
    assert (tmp_path / "out" / "circle.png").read_bytes()[:4] == b"\x89PNG"
    assert "separation" in capsys.readouterr().out
    assert main(["circle", "--alphas", "[2.0]", "--output", str(tmp_path / "no")]) == 1
    assert "alphas must be one or more numbers in [0, 1], got [2.0]" in capsys.readouterr().err
