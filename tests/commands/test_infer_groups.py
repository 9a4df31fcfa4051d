"""The command ``infer-groups``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.group_training import coloured_digits, tiny_config, train_erm, train_group_dro  # noqa: F401

from pysupcon.__main__ import main as command
from pysupcon.commands.infer_groups import InferenceArguments, infer_from_runs
from pysupcon.errors import RunError
from pysupcon.evaluators import SubgroupConfig, infer_groups
from pysupcon.trainer.loop import train
from pysupcon.trainer.run import load_run

QUIET = InferenceArguments(SubgroupConfig(k_max=3), device="cpu", progress=False)


def test_infer_groups_writes_a_file_for_training(
    erm_run: Path, group_dro_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "groups.safetensors"
    arguments = [
        str(erm_run),
        str(group_dro_run),
        "--output",
        str(file),
        "--device",
        "cpu",
        "--progress",
        "false",
    ]
    assert command(["infer-groups", *arguments, "--subgroups.k_max", "4", "--subgroups.seed", "3"]) == 0
    output = capsys.readouterr().out
    assert "class; most frequent true group" in output
    assert "below five; below five, red" in output
    assert "recovery of the 4 true groups: F1 " in output
    assert f"train with --data.groups {file}" in output
    groups = coloured_digits(groups=str(file)).groups
    assert groups is not None
    train_labels = coloured_digits().splits["train"].coarse
    assert torch.equal(groups.parent[groups.train], train_labels)
    assert torch.equal(groups.parent[groups.val], coloured_digits().splits["val"].coarse)
    made_from = groups.made_from
    assert [run["name"] for run in made_from["runs"]] == ["run", "run"]
    assert made_from["runs"][0]["weights"] != made_from["runs"][1]["weights"]
    assert (made_from["subgroups"]["k_max"], made_from["subgroups"]["seed"]) == (4, 3)
    assert made_from["data"]["dataset"] == "coloured_digits"
    assert f"{100 * made_from['recovery']['f1']:.1f} %" in output
    assert str(tmp_path) not in json.dumps(made_from), "the file must not tell where it was made"
    run = train(
        tiny_config(tmp_path / "run", f"--data.groups {file} --loss.group_dro {{}} --data.sampler groups")
    )
    assert f"group={len(groups.parent) - 1}/weight" in load_run(run).log()[-1]


def test_embeddings_of_several_runs_are_concatenated(
    erm_run: Path, group_dro_run: Path, tmp_path: Path
) -> None:
    """Groups inferred from two runs are those of one embedding, the concatenation of both."""
    both = infer_from_runs([erm_run, group_dro_run], tmp_path / "both", QUIET)
    rows = []
    for folder in (erm_run, group_dro_run):
        run = load_run(folder)
        dataset = run.splits()["train"]
        images = torch.stack([dataset[i][0] for i in range(len(dataset))])
        with torch.no_grad():
            rows.append(F.normalize(run.model.backbone(images).double(), dim=1))
    expected = infer_groups(
        torch.cat(rows, dim=1), load_run(erm_run).data.splits["train"].coarse, QUIET.subgroups
    )
    assert torch.equal(both.groups.train, expected.groups)
    one = infer_from_runs([erm_run], tmp_path / "one", QUIET)
    assert not torch.equal(one.groups.train, both.groups.train)
    assert 0 < both.f1 <= 1
    assert 0 < both.purity <= 1


def test_parts_of_clusters_are_judged_by_the_losses_of_the_trained_heads(
    erm_run: Path, group_dro_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The inference gets the mean loss of both heads, on unscaled features, and the validation samples."""
    from pysupcon.commands import infer_groups as module

    given: dict = {}

    def recording(features: torch.Tensor, labels: torch.Tensor, config: SubgroupConfig, **more: Any) -> Any:
        given.update(more)
        return infer_groups(features, labels, config, **more)

    monkeypatch.setattr(module, "infer_groups", recording)
    infer_from_runs([erm_run, group_dro_run], tmp_path / "both", QUIET)
    losses, val = [], []
    for folder in (erm_run, group_dro_run):
        run = load_run(folder)
        images = {
            name: torch.stack([run.splits()[name][i][0] for i in range(len(run.splits()[name]))])
            for name in ("train", "val")
        }
        labels = run.data.splits["train"].coarse
        with torch.no_grad():
            losses.append(F.cross_entropy(run.model(images["train"]).logits, labels, reduction="none"))
            val.append(F.normalize(run.model.backbone(images["val"]).double()))
    assert torch.allclose(given["losses"].float(), (losses[0] + losses[1]) / 2, atol=1e-5)
    assert not torch.allclose(given["losses"].float(), losses[0], atol=1e-3)
    assert torch.equal(given["validation"][0], torch.cat(val, dim=1))


def test_infer_groups_refuses_mismatched_runs(
    erm_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = train(
        tiny_config(tmp_path / "other", "--data.split_seed 5 --trainer.epochs 1 --trainer.best_by null")
    )
    with pytest.raises(RunError, match="the runs must have the same train samples and classes"):
        infer_from_runs([erm_run, other], tmp_path / "file", QUIET)
    assert not (tmp_path / "file").exists()
    with pytest.raises(RunError, match=r"--output .* could not be written"):
        infer_from_runs([erm_run], tmp_path, QUIET)
    assert command(["infer-groups", str(tmp_path / "nothing"), "--output", str(tmp_path / "file")]) == 1
    assert "must be the folder of a run" in capsys.readouterr().err
    assert command(["infer-groups", str(erm_run), "--output", "x", "--subgroups.k_min", "1"]) == 1
    assert "must be 2 <= k_min <= k_max" in capsys.readouterr().err
