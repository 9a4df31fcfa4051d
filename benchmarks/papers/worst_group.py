"""Worst-group accuracy on coloured digits: ERM, and GroupDRO over groups that were inferred from embeddings.

    nice -n 5 python benchmarks/papers/worst_group.py  # train the missing runs, print the table
    python benchmarks/papers/worst_group.py --collect  # train nothing; store and print the finished runs
    python benchmarks/papers/worst_group.py --print  # print the table of the stored results

For each seed, the script trains ERM, SupCon and Thanos's two encoders, infers groups from each of them and
from Thanos's concatenated embeddings, and trains GroupDRO over the true groups and over those of ERM, SupCon
and Thanos. The configs are configs/worst_group/coloured_mnist5k_*.yaml. Trainings run one after the other on
one thread, in runs/worst_group; finished ones are not repeated. ERM and GroupDRO keep the epoch with the best
accuracy of the worst true group of the validation set.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from benchmarks import machine
from pysupcon.evaluation.evaluate import METRICS_FILE
from pysupcon.evaluators import BootstrapConfig, bind_metric
from pysupcon.evaluators.bootstrap import percentile_interval, seed_and_sample_values
from pysupcon.reports.evaluated_runs import EVALUATION, read_run

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs" / "worst_group"
DATA = "coloured_mnist5k"
RESULTS = ROOT / "benchmarks" / "results" / "worst_group.json"
RUNS = ROOT / "runs" / "worst_group"
SEEDS = (0, 1, 2)
COST = "seconds.json"

ENCODERS = ("supcon", "supcon_cnce", "ce_autoencoder")
GROUPS: dict[str, tuple[str, ...]] = {
    "erm": ("erm",),
    "supcon": ("supcon",),
    "supcon_cnce": ("supcon_cnce",),
    "ce_autoencoder": ("ce_autoencoder",),
    "thanos": ("supcon_cnce", "ce_autoencoder"),
}
"""Name of the groups -> runs whose concatenated embeddings they are inferred from."""
CLASSIFIERS = {
    "erm": "ERM",
    "group_dro_erm": "GroupDRO, groups of ERM",
    "group_dro_supcon": "GroupDRO, groups of SupCon",
    "group_dro_thanos": "GroupDRO, groups of Thanos",
    "group_dro_annotated": "GroupDRO, true groups",
}
SOURCES = {
    "erm": "ERM",
    "supcon": "SupCon",
    "supcon_cnce": "SupCon + cNCE",
    "ce_autoencoder": "autoencoder",
    "thanos": "Thanos: SupCon + cNCE beside autoencoder",
}
FIGURES = ("accuracy", "worst_group_accuracy")


def run_seed(seed: int, runs: Path) -> None:
    """Train the missing runs of one seed and infer the missing groups."""
    for name in ("erm", *ENCODERS, "group_dro_annotated"):
        _train(name, seed, runs)
    for source, encoders in GROUPS.items():
        _infer(source, encoders, seed, runs)
    for source in ("erm", "supcon", "thanos"):
        groups = str(_folder(f"groups_{source}", seed, runs) / "groups.safetensors")
        _train(f"group_dro_{source}", seed, runs, "--data.groups", groups)


def _folder(name: str, seed: int, runs: Path) -> Path:
    return runs / f"{name}_seed{seed}"


def _train(name: str, seed: int, runs: Path, *more: str) -> None:
    from pysupcon.config import parse_args
    from pysupcon.evaluation.evaluate import evaluate_run
    from pysupcon.evaluators import EvaluationConfig, ProjectionConfig, WorstGroupConfig
    from pysupcon.trainer.loop import train

    folder = _folder(name, seed, runs)
    if (folder / COST).exists():
        return
    print(f"{name}, seed {seed}", file=sys.stderr, flush=True)
    start = time.process_time()
    config, _ = parse_args(
        [
            "--config", str(CONFIGS / f"{DATA}_{name}.yaml"), "--seed", str(seed),
            "--output_dir", str(folder), "--trainer.threads", "1", "--trainer.cpu", "true",
            "--resume_from_checkpoint", "auto", *more,
        ]
    )  # fmt: skip
    train(config)
    trained = time.process_time() - start
    if name in CLASSIFIERS:
        own = EvaluationConfig(evaluators=["worst_group"], device="cpu", progress=False)
        own.worst_group = WorstGroupConfig(methods=["trained"])
        own.projection = ProjectionConfig(method="pca")
        evaluate_run(folder, own)
    _write(folder / COST, {"train": round(trained, 1), "all": round(time.process_time() - start, 1)})


def _infer(source: str, encoders: Sequence[str], seed: int, runs: Path) -> None:
    from pysupcon.commands.infer_groups import InferenceArguments, infer_from_runs

    folder = _folder(f"groups_{source}", seed, runs)
    if (folder / COST).exists():
        return
    start = time.process_time()
    arguments = InferenceArguments(device="cpu", progress=False)
    found = infer_from_runs(
        [_folder(name, seed, runs) for name in encoders], folder / "groups.safetensors", arguments
    )
    record = {
        "f1": found.f1,
        "purity": found.purity,
        "silhouette": mean(found.silhouettes.values()),
        "counts": found.groups.counts.tolist(),
        "seconds": round(time.process_time() - start, 1),
    }
    _write(folder / "found.json", record)
    _write(folder / COST, {"all": record["seconds"]})


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def collect(seeds: Sequence[int], runs: Path) -> dict[str, Any]:
    """All metrics of finished runs; mean, deviation and intervals per classifier.

    The intervals resample seeds and test images; with one seed, test images only.
    """
    bootstrap = BootstrapConfig()
    classifiers: dict[str, Any] = {}
    drawn: dict[tuple[str, str], torch.Tensor] = {}
    for name, title in CLASSIFIERS.items():
        entry: dict[str, Any] = {"title": title, "seeds": {}}
        found = [read_run(_folder(name, seed, runs)) for seed in seeds]
        for seed, run in zip(seeds, found, strict=True):
            entry["seeds"][str(seed)] = _one(run.dir)
        for figure in FIGURES:
            outcomes = []
            for run in found:
                outcome = bind_metric(f"worst_group/trained/{figure}", run.outcomes)
                assert outcome is not None, f"{run.dir} has no {figure}"
                outcomes.append(outcome)
            drawn[name, figure] = seed_and_sample_values(outcomes, bootstrap, seeds=seeds)
            values = [entry["seeds"][str(seed)][figure] for seed in seeds]
            interval = percentile_interval(drawn[name, figure], bootstrap.confidence)
            entry[figure] = _summary(values, interval)
            change = drawn[name, figure] - drawn["erm", figure]
            low, high = percentile_interval(change, bootstrap.confidence)
            value = entry[figure]["mean"] - classifiers.get("erm", entry)[figure]["mean"]
            entry[figure]["above_erm"] = {"value": value, "low": low, "high": high}
        classifiers[name] = entry
    inference = {}
    for source, title in SOURCES.items():
        records = {
            str(seed): json.loads((_folder(f"groups_{source}", seed, runs) / "found.json").read_text())
            for seed in seeds
        }
        inference[source] = {"title": title, "seeds": records} | {
            name: _summary([record[name] for record in records.values()])
            for name in ("f1", "purity", "silhouette")
        }
    costs = [json.loads(path.read_text())["all"] for path in runs.glob(f"*/{COST}")]
    return {
        "machine": machine.describe("cpu"),
        "data": DATA,
        "confidence": bootstrap.confidence,
        "resampled": "seeds and test images" if len(seeds) > 1 else "test images",
        "core_seconds": round(sum(costs), 1),
        "classifiers": classifiers,
        "inference": inference,
    }


def _one(folder: Path) -> dict[str, Any]:
    """The metrics of one classifier, also by true group, and the selected epoch."""
    from pysupcon.trainer.run import read_log

    prefix = "worst_group/trained/"
    metrics = json.loads((folder / EVALUATION / METRICS_FILE).read_text())["metrics"]
    figures = {
        name.removeprefix(prefix): metric["value"] for name, metric in metrics.items() if prefix in name
    }
    checked = [line for line in read_log(folder / "log.jsonl") if "val_worst_group" in line]
    best = max(checked, key=lambda line: line["val_worst_group"])  # the first, if several are equal
    kept = {
        name: best[name] for name in ("epoch", "val_worst_group", "val_worst_known_group") if name in best
    }
    return figures | kept | {"seconds": json.loads((folder / COST).read_text())["train"]}


def _summary(values: Sequence[float], interval: tuple[float, float] | None = None) -> dict[str, Any]:
    found: dict[str, Any] = {"mean": mean(values), "spread": stdev(values) if len(values) > 1 else None}
    return found if interval is None else found | {"low": interval[0], "high": interval[1]}


def table(results: dict[str, Any]) -> str:
    """The Markdown tables of the classifiers and of the agreement of inferred with true groups."""
    seeds = list(results["classifiers"]["erm"]["seeds"])
    rows = [
        ("training", "accuracy, %", "worst group, %", "worst group above ERM, points", "by seed"),
        ("---",) * 5,
    ]
    for name, entry in results["classifiers"].items():
        worst, change = entry["worst_group_accuracy"], entry["worst_group_accuracy"]["above_erm"]
        above = "" if name == "erm" else f"{_show(change['value'], True)} {_interval(change, True)}"
        by_seed = ", ".join(_show(entry["seeds"][seed]["worst_group_accuracy"]) for seed in seeds)
        rows.append((entry["title"], _cell(entry["accuracy"]), _cell(worst), above, by_seed))
    lines = _markdown(rows)
    resampled = results.get("resampled", "test images")  # results stored before seeds were resampled
    lines += [
        "",
        f"{results['data']}, 1,000 test images of four groups, {len(seeds)} seeds: mean of the seeds ± their "
        f"standard deviation [{100 * results['confidence']:g} % interval over the {resampled}, paired for "
        "the difference].",
        "",
    ]
    if len(seeds) == 1:
        lines += ["One seed: the interval says nothing about other seeds.", ""]
    rows = [("groups from", "F1, %", "purity, %", "silhouette", "groups by seed"), ("---",) * 5]
    for entry in results["inference"].values():
        counts = ", ".join(str(len(entry["seeds"][seed]["counts"])) for seed in seeds)
        rows.append(
            (
                entry["title"], _cell(entry["f1"]), _cell(entry["purity"]),
                f"{entry['silhouette']['mean']:.2f}", counts,
            )
        )  # fmt: skip
    lines += _markdown(rows)
    place = machine.name(results["machine"])
    lines += [
        "",
        f"{place}; commit {results['machine']['commit']}; {results['core_seconds']:.0f} core seconds.",
    ]
    return "\n".join(lines)


def _markdown(rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in rows]


def _show(value: float, sign: bool = False) -> str:
    return f"{100 * value:{'+' if sign else ''}.1f}"


def _interval(entry: dict[str, Any], sign: bool = False) -> str:
    return f"[{_show(entry['low'], sign)}, {_show(entry['high'], sign)}]"


def _cell(entry: dict[str, Any]) -> str:
    text = _show(entry["mean"]) + ("" if entry["spread"] is None else f" ± {_show(entry['spread'])}")
    return f"{text} {_interval(entry)}" if "low" in entry else text


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the missing runs, store the results and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument(
        "--runs", type=Path, default=RUNS, help="folder of the runs (default: runs/worst_group)"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSON file of the results")
    parser.add_argument("--collect", action="store_true", help="train nothing, store the finished runs")
    parser.add_argument(
        "--print", action="store_true", help="train and store nothing, print the stored table"
    )
    chosen = parser.parse_args(arguments)
    if not chosen.print:
        torch.set_num_threads(1)
        if not chosen.collect:
            for seed in chosen.seeds:
                run_seed(seed, chosen.runs)
        results = collect(chosen.seeds, chosen.runs)
        chosen.output.parent.mkdir(parents=True, exist_ok=True)
        _write(chosen.output, results)
    print(table(json.loads(chosen.output.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
