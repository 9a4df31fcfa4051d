"""At which alpha a class starts to spread: L_spread = (1 - alpha) * base + alpha * cNCE.

Derivation. In the collapsed configuration all rows of class c are at a point m_c of the unit sphere, with
m_c . m_d = 1 - g for c != d (a simplex has g = C / (C - 1)). A class has n samples with V >= 2 equal views,
so an anchor has P = V n - 1 positives, its own other views included, and N negatives; s = cosine / t.

Move sample i to m_c sqrt(1 - |v_i|^2) + v_i. Take v_i orthogonal to all class means (possible for D >= C) and
with sum 0 in each class, so that the means do not move to first order. Let q be the mean of |v_i|^2. To
second order, averaged over the anchors,

    own views       d s = 0
    all positives   d s = -(1 + 1/P) q / t         (|v_i - v_j|^2 / 2, mean over P)
    all negatives   d s = +(g - 1) q / t           (the v_i . v_j of two classes cancel in the mean)

All first-order changes are 0, so a logsumexp changes by the weighted mean of these. With r the weight of the
negatives, r = N e^(-g/t) / (B + N e^(-g/t)), B = P for SupCon and B = 1 for SINCERE,

    d base = r (d s_negatives - d s_positives) = r (g + 1/P) q / t     the base pulls the class together
    d cNCE = d s_positives - d s_own           = -(1 + 1/P) q / t      cNCE pushes it apart

The collapsed point is stable while (1 - alpha) d base + alpha d cNCE > 0, that is for alpha < alpha*,

    alpha* = k / (1 + k),    k = r (P g + 1) / (P + 1),

which tends to k = r C / (C - 1) for many positives and a simplex. Directions within the span of the means add
the variance of first-order terms to the base and nothing to cNCE, so they are stabler; D = C - 1 dimensions
have only these, and their threshold is higher.

Assumptions: equal views (no augmentation), equal class sizes in every batch, one gap g, no other loss, and a
network that can move the images of a class one by one. It is a statement on local stability.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.papers import small_training
from benchmarks.papers.study import QUICK_SEEDS, SEEDS, Claim, Job, Records, Verdict
from benchmarks.table import markdown
from pysupcon import functional

NAME = "threshold"
TITLE = "The threshold of alpha: where a class starts to spread"
BASES = ("supcon", "sincere")
TEMPERATURES = (0.1, 0.25, 0.5)
FREE_RATIOS = (0.5, 0.8, 0.9, 1.0, 1.1, 1.25, 2.0)
NETWORK_RATIOS = (0.8, 1.2, 2.0, 4.0)
CLASSES, SAMPLES, DIM = 10, 6, 16
"""Of the free points."""
COLLAPSED = 1e-3
"""Spread (mean distance to the class mean) below which free points are collapsed."""
NETWORK_IMAGES, NETWORK_BATCH = 300, 75
"""Images of each coarse class that a network trains on, and that a batch has."""


def alpha_star(
    samples: int, classes: int, temperature: float, base: str, *, gap: float | None = None, views: int = 2
) -> float:
    """Smallest alpha above which classes of a batch spread (module docstring), in (0, 1).

    Args:
        samples: samples of each class in a batch, at least 2.
        classes: at least 2.
        temperature: of the base and of cNCE.
        base: "supcon" or "sincere".
        gap: 1 minus the cosine of two class means; None means that of a simplex, C / (C - 1). Features after
            a ReLU have cosines of at least 0 and reach 1.
        views: equal views of each sample, at least 2.
    """
    if samples < 2 or classes < 2 or views < 2:
        raise ValueError(
            f"samples, classes and views must be at least 2, got {samples}, {classes} and {views}"
        )
    if base not in BASES or not temperature > 0:
        raise ValueError(f"base must be one of {BASES} and temperature > 0, got {base!r} and {temperature}")
    g = classes / (classes - 1) if gap is None else gap
    positives, negatives = views * samples - 1, views * samples * (classes - 1)
    pull = negatives * math.exp(-g / temperature)
    k = pull / ((positives if base == "supcon" else 1) + pull) * (positives * g + 1) / (positives + 1)
    return k / (1 + k)


def spread_and_gap(features: Tensor, labels: Tensor) -> tuple[float, float]:
    """Mean distance of unit ``features`` [N, D] to their class means, and the smallest gap of two means."""
    means = torch.stack([features[labels == label].mean(dim=0) for label in labels.unique()])
    index = labels.unique(return_inverse=True)[1]
    directions = F.normalize(means, dim=1)
    cosines = (directions @ directions.T).fill_diagonal_(-1)
    return (features - means[index]).norm(dim=1).mean().item(), 1 - cosines.max().item()


def l_spread(features: Tensor, labels: Tensor, alpha: float, temperature: float, base: str) -> Tensor:
    """L_spread of ``features`` [B, D] with two equal views."""
    views = features[:, None].expand(-1, 2, -1)
    return functional.spread(views, labels, temperature=temperature, alpha=alpha, base=base)


def free_points(alpha: float, temperature: float, base: str, seed: int, steps: int = 1000) -> Tensor:
    """Points [C n, D] of unit length that minimise L_spread, from a simplex with noise (spread about 0.3)."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.eye(CLASSES, DIM, dtype=torch.float64)
    corners = F.normalize(corners - corners.mean(dim=0), dim=1).repeat_interleave(SAMPLES, dim=0)
    noise = torch.randn(corners.shape, generator=generator, dtype=torch.float64)
    points = (corners + 0.3 / DIM**0.5 * noise).requires_grad_()
    labels = torch.arange(CLASSES).repeat_interleave(SAMPLES)
    # At low temperatures all forces are of the size of alpha. Adam must neither drown them in its epsilon nor
    # remember the larger forces of its start.
    optimizer = torch.optim.Adam([points], 0.05, betas=(0.9, 0.95), eps=1e-12)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        (l_spread(F.normalize(points, dim=1), labels, alpha, temperature, base) / alpha).backward()
        optimizer.step()
        schedule.step()
    return F.normalize(points.detach(), dim=1)


def ratios_below_one(ratios: tuple[float, ...], star: float) -> list[float]:
    """The multiples of alpha* that are weights, at most 1."""
    return [ratio for ratio in ratios if ratio * star <= 1]


def missing() -> str:
    """Nothing: the data come with Python packages."""
    return ""


def jobs(quick: bool) -> list[Job]:
    """One job for each kind, base, temperature and seed."""
    minutes = {"free": 0.2, "network": 0.36}
    return [
        Job(f"{kind}_{base}_t{temperature}_seed{seed}", minutes[kind])
        for kind in minutes
        for base in BASES
        for temperature in (TEMPERATURES[1:] if quick else TEMPERATURES)
        for seed in (QUICK_SEEDS if quick else SEEDS)
    ]


def run(job: Job, folder: Path) -> dict[str, Any]:
    """The spread at several multiples of alpha*."""
    kind, base, temperature, seed = job.name.split("_")
    tau, number = float(temperature[1:]), int(seed.removeprefix("seed"))
    points = (_run_free if kind == "free" else _run_network)(base, tau, number)
    return {
        "kind": kind,
        "base": base,
        "temperature": tau,
        "points": points,
    }


def _run_free(base: str, tau: float, seed: int) -> list[dict[str, float]]:
    star = alpha_star(SAMPLES, CLASSES, tau, base)
    labels = torch.arange(CLASSES).repeat_interleave(SAMPLES)
    found = []
    for ratio in ratios_below_one(FREE_RATIOS, star):
        spread, gap = spread_and_gap(free_points(ratio * star, tau, base, seed), labels)
        found.append({"ratio": ratio, "alpha": ratio * star, "spread": spread, "gap": gap})
    return found


def train_network(
    alpha: float, temperature: float, base: str, seed: int, steps: int = 300
) -> dict[str, float]:
    """Train on "below five or not"; the spread and the gap of the training images."""
    images, fine = small_training.digits()
    coarse = (fine >= 5).long()
    chosen = small_training.per_class(coarse, NETWORK_IMAGES, torch.Generator().manual_seed(seed))
    images, coarse = images[chosen], coarse[chosen]
    model = small_training.network(seed)
    small_training.train(
        model,
        images,
        coarse,
        lambda rows, labels: l_spread(rows, labels, alpha, temperature, base),
        count=NETWORK_BATCH,
        steps=steps,
        seed=seed,
    )
    spread, gap = spread_and_gap(small_training.unit_features(model, images), coarse)
    return {"alpha": alpha, "spread": spread, "gap": gap}


def _run_network(base: str, tau: float, seed: int) -> list[dict[str, float]]:
    # The features of small_cnn follow a ReLU: cosines are at least 0, and the gap is at most 1.
    star = alpha_star(NETWORK_BATCH, 2, tau, base, gap=1.0)
    ratios = [0.0, *ratios_below_one(NETWORK_RATIOS, star)]
    return [{"ratio": ratio, **train_network(ratio * star, tau, base, seed)} for ratio in ratios]


def values(records: Records, kind: str, base: str, tau: float) -> dict[float, list[float]]:
    """The spreads by seed for each multiple of alpha*."""
    found: dict[float, list[float]] = {}
    for record in records.values():
        if (record["kind"], record["base"], record["temperature"]) == (kind, base, tau):
            for point in record["points"]:
                found.setdefault(point["ratio"], []).append(point["spread"])
    return dict(sorted(found.items()))


def _settings(records: Records, kind: str) -> list[tuple[str, float]]:
    return [(base, tau) for base in BASES for tau in TEMPERATURES if values(records, kind, base, tau)]


def tables(records: Records) -> str:
    """The mean spread over the seeds against alpha / alpha*, one table for each kind."""
    parts = []
    for kind, title in (
        ("free", f"Free points, {CLASSES} classes of {SAMPLES} samples in {DIM} dimensions"),
        ("network", f"Networks, MNIST-coarse, {NETWORK_BATCH} images of each class in a batch, gap 1"),
    ):
        settings = _settings(records, kind)
        if not settings:
            continue
        ratios = sorted({ratio for setting in settings for ratio in values(records, kind, *setting)})
        lines = [["base", "temperature", "alpha*", *(f"{ratio:g} alpha*" for ratio in ratios)]]
        for base, tau in settings:
            found = values(records, kind, base, tau)
            cells = [
                f"{sum(found[r]) / len(found[r]):.3f} [{min(found[r]):.3f}, {max(found[r]):.3f}]"
                if r in found
                else "above 1"
                for r in ratios
            ]
            lines.append([base, f"{tau:g}", f"{_star(kind, base, tau):.3g}", *cells])
        seeds = max(len(v) for setting in settings for v in values(records, kind, *setting).values())
        parts.append(f"**{title}** ({seeds} seeds): mean spread [smallest, largest].\n\n{markdown(lines)}")
    return "\n\n".join(parts)


def _star(kind: str, base: str, tau: float) -> float:
    if kind == "free":
        return alpha_star(SAMPLES, CLASSES, tau, base)
    return alpha_star(NETWORK_BATCH, 2, tau, base, gap=1.0)


def draw(records: Records, folder: Path) -> list[str]:
    """Spread against alpha / alpha*, free points on the left, networks on the right."""
    if not records:
        return []
    from pysupcon.reports.pictures import MARKERS, new_figure, palette, save_figure

    figure, first = new_figure(10.0, 4.2)
    figure.delaxes(first)
    for column, kind in enumerate(("free", "network")):
        plot = figure.add_subplot(1, 2, column + 1)
        for (base, tau), colour, marker in zip(_settings(records, kind), palette(6), MARKERS, strict=False):
            found = {r: v for r, v in values(records, kind, base, tau).items() if r > 0}
            means = [sum(v) / len(v) for v in found.values()]
            ends = [
                [m - min(v) for m, v in zip(means, found.values(), strict=True)],
                [max(v) - m for m, v in zip(means, found.values(), strict=True)],
            ]
            label = f"{base}, temperature {tau:g}"
            plot.errorbar(list(found), means, ends, label=label, color=colour, marker=marker, capsize=2)
        plot.axvline(1, color="black", linestyle="--", linewidth=1)
        title = "free points" if kind == "free" else "networks (alpha* at gap 1)"
        plot.set(xlabel="alpha / alpha*", ylabel="spread within a class", title=title, xscale="log")
        plot.set_xticks([0.5, 1, 2, 4], ["0.5", "1", "2", "4"])
        plot.minorticks_off()
        plot.grid(alpha=0.25)
        if plot.get_legend_handles_labels()[1]:
            plot.legend(frameon=False, fontsize=7)
    save_figure(figure, folder / "paper_threshold.png")
    return ["paper_threshold.png"]


def claims(records: Records) -> list[Claim]:
    """Whether classes collapse below and spread above alpha*."""
    found = []
    settings = _settings(records, "free")
    if settings:
        by_setting = [values(records, "free", *setting) for setting in settings]
        below = max(max(v) for s in by_setting for r, v in s.items() if r <= 0.9)
        above = min(min(v) for s in by_setting for r, v in s.items() if r >= 1.1)
        seeds = min(len(v) for s in by_setting for v in s.values())
        outcome: Verdict = "shown" if below < COLLAPSED < above else "not shown"
        found.append(
            Claim(
                "cNCE controls the spread: free points collapse up to 0.9 alpha* and spread from 1.1 alpha*",
                "control",
                f"{len(settings)} settings, {seeds} seeds: spread at most {below:.2g} below and at least "
                f"{above:.2g} above",
                outcome,
                headline=True,
            )
        )
    settings = _settings(records, "network")
    if settings:
        from pysupcon.evaluators.bootstrap import mean_interval

        rises, seeds = [], 0
        for setting in settings:
            spreads = values(records, "network", *setting)
            if 0.8 in spreads and 1.2 in spreads and len(spreads[0.8]) > 1:
                pairs = zip(spreads[0.8], spreads[1.2], strict=True)
                rises.append(mean_interval([b - a for a, b in pairs], 0.95))
                seeds = len(spreads[0.8])
        count = sum(low > 0 for low, _ in rises)
        if rises:
            found.append(
                Claim(
                    "Networks on MNIST-coarse spread more at 1.2 than at 0.8 alpha*: a rise, no threshold",
                    "control",
                    f"{count} of {len(rises)} settings have an interval above 0 ({seeds} seeds)",
                    "shown" if count == len(rises) else "not shown",
                )
            )
    return found
