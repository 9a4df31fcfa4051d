"""The bound of SINCERE (arXiv 2309.14277), log|N| - L <= J, against a J that is known.

Let p+ be the distribution of the embeddings of the anchor's class and p- that of the others. For an anchor,
one positive z+ from p+ and N negatives from p-, and a critic f that depends on the anchor and one embedding,

    L(f) = E log(1 + sum_n e^{f(z_n) - f(z+)}) >= log N + E_{p-} f - E_{p+} f        (Jensen)

The loss is smallest for f* = log p+ / p-, for which the right side is log N - J with
J = KL(p+ || p-) + KL(p- || p+). So log N - E L(f) <= log N - E L(f*) <= J for every critic, also for the
cosine to the anchor divided by a temperature. It holds for the expected loss; one batch scatters around it.

The bound cannot reach J. With g = log((N + 1) e^{f(z+)} / (e^{f(z+)} + sum_n e^{f(z_n)})), the mean of e^g
over N + 1 independent samples of p- is 1 by symmetry, so (Donsker and Varadhan) E g <= KL(p+ || p-), that is
log(N + 1) - L(f) <= KL(p+ || p-). This is a part of J, and half of it for classes that mirror each other.

Here two classes are von Mises-Fisher distributions on the sphere of D dimensions with opposite means +-m and
concentration kappa. Then f*(z) = +-2 kappa m . z and

    J = 4 kappa A_D(kappa),    A_D(kappa) = E m . z = I_{D/2}(kappa) / I_{D/2 - 1}(kappa).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.papers.cells import with_interval
from benchmarks.papers.study import QUICK_SEEDS, SEEDS, Claim, Job, Records, Verdict
from benchmarks.table import markdown
from pysupcon.evaluators.bootstrap import mean_interval
from pysupcon.evaluators.pairs import kl_bound, pair_statistics

NAME = "kl_bound"
TITLE = "The bound on the divergence of own-class and other-class embeddings"
DIMENSIONS = (3, 16, 128)
TRUTHS = (0.5, 2.0, 8.0, 32.0)
"""J in nats, reached by the choice of kappa."""
NEGATIVES = (8, 64, 256, 1024)
COSINE_TEMPERATURES = (0.1, 0.5)
CRITICS = ("optimal", *(f"cosine, temperature {tau:g}" for tau in COSINE_TEMPERATURES))
_ANCHORS = 2048
"""At least so many anchors for each value."""


def mean_cosine(dim: int, kappa: float) -> float:
    """E m . z = I_{D/2}(kappa) / I_{D/2-1}(kappa), by the continued fraction of Gauss.

    The Bessel functions themselves underflow for many dimensions and a small kappa.
    """
    found = 0.0
    for term in range(int(kappa) + 200, -1, -1):
        found = 1 / ((dim + 2 * term) / kappa + found)
    return found


def divergence(dim: int, kappa: float) -> float:
    """J in nats of two von Mises-Fisher classes with opposite means."""
    return 4 * kappa * mean_cosine(dim, kappa)


def concentration(dim: int, truth: float) -> float:
    """The kappa with ``divergence(dim, kappa) == truth``."""
    from scipy.optimize import brentq

    return float(brentq(lambda kappa: divergence(dim, kappa) - truth, 1e-6, 1e4, xtol=1e-10))


def sample(dim: int, kappa: float, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """``count`` rows of each of the two classes, [2 count, D], and their labels."""
    from scipy.stats import vonmises_fisher

    pole = [1.0] + [0.0] * (dim - 1)
    rows = torch.from_numpy(vonmises_fisher(pole, kappa).rvs(2 * count, random_state=seed))
    labels = torch.arange(2).repeat_interleave(count)
    return rows * (1 - 2 * labels)[:, None], labels


def optimal_losses(rows: Tensor, labels: Tensor, kappa: float) -> Tensor:
    """SINCERE loss of every anchor [N] with the critic log p+ / p-."""
    losses = torch.empty(len(rows), dtype=torch.float64)
    for label, sign in ((0, 1.0), (1, -1.0)):
        own = labels == label
        critic = sign * 2 * kappa * rows[:, 0]
        away = F.softplus(critic[~own].logsumexp(dim=0) - critic[own])
        losses[own] = (away.sum() - away) / (own.sum() - 1)
    return losses


def missing() -> str:
    """Nothing: the data come with Python packages."""
    return ""


def jobs(quick: bool) -> list[Job]:
    """One job for each dimension and seed."""
    return [
        Job(f"d{dim}_seed{seed}", 0.1)
        for dim in (DIMENSIONS[:2] if quick else DIMENSIONS)
        for seed in (QUICK_SEEDS if quick else SEEDS)
    ]


def run(job: Job, folder: Path) -> dict[str, Any]:
    """The bound for every J, number of negatives and critic."""
    dimension, number = job.name.split("_")
    dim, seed = int(dimension[1:]), int(number.removeprefix("seed"))
    rows = []
    for truth in TRUTHS:
        kappa = concentration(dim, truth)
        for negatives in NEGATIVES:
            batches = max(1, _ANCHORS // (2 * negatives))
            bounds = dict.fromkeys(CRITICS, 0.0)
            points, labels = sample(dim, kappa, negatives * batches, seed)
            halves = points.view(2, batches, negatives, dim)
            own = labels.view(2, batches, negatives)[:, 0].reshape(-1)
            counts = torch.full((2 * negatives,), negatives)
            for batch in range(batches):
                part = halves[:, batch].reshape(-1, dim)
                losses = [optimal_losses(part, own, kappa)]
                losses += [pair_statistics(part, own, tau).sincere for tau in COSINE_TEMPERATURES]
                for critic, loss in zip(CRITICS, losses, strict=True):
                    bounds[critic] += kl_bound(loss, counts).mean().item() / batches
            rows.append({"truth": truth, "negatives": negatives, "bounds": bounds})
    return {"dim": dim, "rows": rows}


def values(records: Records, dim: int, truth: float, negatives: int, critic: str) -> list[float]:
    """The bound by seed."""
    return [
        row["bounds"][critic]
        for record in records.values()
        if record["dim"] == dim
        for row in record["rows"]
        if (row["truth"], row["negatives"]) == (truth, negatives)
    ]


def tables(records: Records) -> str:
    """Mean bounds over the seeds."""
    lines = [["dimensions", "truth J", "critic", *(f"N = {n} (log {math.log(n):.2f})" for n in NEGATIVES)]]
    seeds = 0
    for dim in DIMENSIONS:
        for truth in TRUTHS:
            for critic in CRITICS:
                cells = [with_interval(values(records, dim, truth, n, critic)) for n in NEGATIVES]
                if any(cells):
                    seeds = max(seeds, len(values(records, dim, truth, NEGATIVES[0], critic)))
                    lines.append([str(dim), f"{truth:g}", critic, *cells])
    if not seeds:
        return ""
    return (
        f"**{TITLE}** (two von Mises-Fisher classes, {seeds} seeds): log N - L in nats [95 % interval over "
        f"the seeds].\n\n"
        f"{markdown(lines)}"
    )


def draw(records: Records, folder: Path) -> list[str]:
    """Bound against truth for the smallest and the largest number of negatives."""
    if not records:
        return []
    from pysupcon.reports.pictures import MARKERS, new_figure, palette, save_figure

    figure, first = new_figure(10.0, 4.0)
    figure.delaxes(first)
    for column, critic in enumerate((CRITICS[0], CRITICS[1])):
        plot = figure.add_subplot(1, 2, column + 1)
        for count, colour in zip(NEGATIVES, palette(len(NEGATIVES)), strict=True):
            for dim, marker in zip(DIMENSIONS, MARKERS, strict=False):
                known = [(t, values(records, dim, t, count, critic)) for t in TRUTHS]
                means = [(t, sum(v) / len(v)) for t, v in known if v]
                if means:
                    label = f"N {count}" if dim == DIMENSIONS[0] else None
                    plot.plot(*zip(*means, strict=True), label=label, color=colour, marker=marker)
            plot.axhline(math.log(count), color=colour, linestyle=":", linewidth=1)
        plot.plot(TRUTHS, TRUTHS, color="black", linestyle="--", label="truth")
        plot.set(xlabel="truth J, nats", ylabel="log N - L, nats", xscale="log", ylim=(-4, 10))
        plot.set_xticks(TRUTHS, [f"{truth:g}" for truth in TRUTHS])
        plot.minorticks_off()
        plot.set_title(f"critic: {critic}; dotted: log N", fontsize=9)
        plot.grid(alpha=0.25)
        plot.legend(frameon=False, fontsize=7)
    save_figure(figure, folder / "paper_kl_bound.png")
    return ["paper_kl_bound.png"]


def claims(records: Records) -> list[Claim]:
    """Whether the bound holds in every setting, and how far from the truth it ends."""
    settings = [
        (dim, truth, count, critic)
        for dim in DIMENSIONS
        for truth in TRUTHS
        for count in NEGATIVES
        for critic in CRITICS
        if len(values(records, dim, truth, count, critic)) > 1
    ]
    if not settings:
        return []
    above, above_half, seeds = 0, 0, 0
    for setting in settings:
        found = values(records, *setting)
        seeds = max(seeds, len(found))
        # Many settings are compared at once, so the confidence is corrected for their number (Bonferroni).
        low = mean_interval(found, 1 - 0.05 / len(settings))[0]
        above += low > setting[1]
        above_half += low > setting[1] / 2
    outcome: Verdict = "shown" if above == 0 else "contradicted"
    full = [
        sum(v) / len(v) / math.log(n)
        for dim in DIMENSIONS
        for n in NEGATIVES
        if (v := values(records, dim, TRUTHS[-1], n, CRITICS[0]))
    ]
    return [
        Claim(
            "log N - L is a lower bound of the symmetrised KL divergence",
            "SINCERE",
            f"significantly above the truth in {above} of {len(settings)} settings, {seeds} seeds",
            outcome,
        ),
        Claim(
            "log N - L stays below half of the symmetrised KL divergence if the classes mirror each other (a "
            "theorem; this checks the code)",
            "control",
            f"significantly above it in {above_half} of {len(settings)} settings, {seeds} seeds",
            "contradicted" if above_half else "shown",
        ),
        Claim(
            f"The bound saturates at log N: J = {TRUTHS[-1]:g} nats, optimal critic",
            "SINCERE",
            f"between {100 * min(full):.1f} and {100 * max(full):.1f} % of log N",
            "shown" if min(full) > 0.95 and max(full) <= 1 else "not shown",
        ),
    ]
