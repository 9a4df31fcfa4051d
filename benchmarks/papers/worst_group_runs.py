"""Jobs of the study of worst groups: a training, or an inference of groups, with what it records."""

from __future__ import annotations

import shutil
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.papers.study import ROOT, pack_bits

CONFIGS = ROOT / "configs" / "worst_group"
DATA = {"coloured_mnist5k": "digits whose colour is spurious", "rare_mnist5k": "digits of which two are rare"}
ENCODERS = ("supcon", "supcon_cnce", "ce_autoencoder")
CLASSIFIERS = {
    "erm": "ERM",
    "group_dro_erm": "GroupDRO, groups of ERM",
    "group_dro_supcon": "GroupDRO, groups of SupCon",
    "group_dro_thanos": "GroupDRO, groups of Thanos",
    "group_dro_annotated": "GroupDRO, true groups",
}
SOURCES = {
    "erm": ("ERM", ("erm",)),
    "supcon": ("SupCon", ("supcon",)),
    "supcon_cnce": ("SupCon + cNCE", ("supcon_cnce",)),
    "ce_autoencoder": ("cross-entropy + autoencoder", ("ce_autoencoder",)),
    "thanos": ("Thanos: SupCon + cNCE beside autoencoder", ("supcon_cnce", "ce_autoencoder")),
}
"""Source of groups -> its title and the runs whose embeddings are concatenated."""
OVERCLUSTER = 5


def name_of(data: str, what: str, seed: int) -> str:
    """Name of a job and of its folder."""
    return f"{data}_{what}_seed{seed}"


def parts_of(name: str) -> tuple[str, str, int]:
    """Data set, what and seed of a job."""
    rest, _, seed = name.rpartition("_seed")
    data = next(data for data in DATA if rest.startswith(f"{data}_"))
    return data, rest.removeprefix(f"{data}_"), int(seed)


def train(data: str, what: str, seed: int, folder: Path) -> dict[str, Any]:
    """Train a classifier or an encoder; the record of a classifier has both selections."""
    from pysupcon.config import parse_args
    from pysupcon.trainer.loop import train as train_run

    target = folder / name_of(data, what, seed)
    arguments = [
        "--config", str(CONFIGS / f"{data}_{what}.yaml"), "--seed", str(seed), "--output_dir", str(target),
        "--trainer.threads", "1", "--trainer.cpu", "true", "--evaluate", "false",
        "--trainer.keep_checkpoints", "1000",
    ]  # fmt: skip
    source = what.removeprefix("group_dro_")
    if what != "erm" and source in SOURCES and what != source:
        groups = folder / name_of(data, f"groups_{source}", seed) / "groups.safetensors"
        arguments += ["--data.groups", str(groups)]
    config, _ = parse_args(arguments)
    train_run(config)
    record = _selected(target) if what in CLASSIFIERS else {}
    shutil.rmtree(target / "checkpoints")
    return record


def _selected(target: Path) -> dict[str, Any]:
    """Epoch, validation value and correct test images of both selections."""
    from pysupcon.trainer.checkpoint import checkpoints, read_checkpoint
    from pysupcon.trainer.run import load_run

    run = load_run(target)
    metric = {"known": run.config.trainer.best_by, "true": "worst_group"}
    read = [read_checkpoint(path) for path in sorted(checkpoints(target), key=_step)]
    test = run.splits()["test"]
    images = torch.stack([test[index][0] for index in range(len(test))])
    samples = run.data.splits["test"]
    record: dict[str, Any] = {"groups": "".join(map(str, run.data.true_groups["test"].tolist()))}
    for selection, name in metric.items():
        best = max(read, key=lambda checkpoint: checkpoint.metrics[name])  # the first of equal ones
        run.model.load_state_dict(best.weights)
        with torch.inference_mode():
            logits = run.model.eval()(images).logits
        record[selection] = {
            "metric": name,
            "epoch": read.index(best) + 1,
            "validation": best.metrics[name],
            "correct": pack_bits(logits.argmax(dim=1) == samples.coarse),
        }
    return record


def _step(path: Path) -> int:
    from pysupcon.trainer.manifest import step_of

    return step_of(path)


def infer(data: str, source: str, seed: int, folder: Path) -> dict[str, Any]:
    """Infer groups; the record tells how well they match the true ones."""
    from pysupcon.commands.infer_groups import InferenceArguments, infer_from_runs
    from pysupcon.evaluators import SubgroupConfig

    arguments = InferenceArguments(SubgroupConfig(overcluster=OVERCLUSTER), device="cpu", progress=False)
    found = infer_from_runs(
        [folder / name_of(data, run, seed) for run in SOURCES[source][1]],
        folder / name_of(data, f"groups_{source}", seed) / "groups.safetensors",
        arguments,
    )
    return {
        "f1": found.f1,
        "purity": found.purity,
        "silhouette": mean(found.silhouettes.values()),
        "counts": found.groups.counts.tolist(),
    }
