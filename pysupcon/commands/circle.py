"""``python -m pysupcon circle``: how far a class spreads when points on a circle minimise L_spread.

The setting of Thanos's geometry (arXiv 2204.07596) in the smallest dimension: every sample is one point of
the unit circle, free to move, both of its views at the same place. SupCon and SINCERE pull a class to a
point; class-conditional InfoNCE pushes its samples apart; alpha and the temperature say who wins.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pysupcon import functional

JSON_FILE = "circle.json"
PICTURE_FILE = "circle.png"


@dataclass
class CircleConfig:
    """Points on a circle under (1 - alpha) * base + alpha * class-conditional InfoNCE."""

    alphas: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.65, 0.8, 0.95])
    """Weights of cNCE, in [0, 1]."""

    temperatures: list[float] = field(default_factory=lambda: [0.1, 0.25, 0.5])
    """Temperatures, > 0."""

    base: Literal["sincere", "supcon"] = "sincere"
    """The other loss."""

    classes: int = 3
    """Number of classes, 2 or more."""

    samples: int = 12
    """Samples of each class, 2 or more."""

    steps: int = 400
    """Steps of Adam; the rate falls along a cosine."""

    learning_rate: float = 0.05
    """Of the angles, in radians."""

    seed: int = 0
    """Of the first angles."""

    output: str = "circle"
    """Folder of circle.json and circle.png."""

    progress: bool = True
    """A bar."""

    def __post_init__(self) -> None:
        if not self.alphas or any(not 0 <= alpha <= 1 for alpha in self.alphas):
            raise ValueError(f"alphas must be one or more numbers in [0, 1], got {self.alphas}")
        if not self.temperatures or any(not value > 0 for value in self.temperatures):
            raise ValueError(f"temperatures must be one or more positive numbers, got {self.temperatures}")
        for name, least in (("classes", 2), ("samples", 2), ("steps", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be > 0, got {self.learning_rate}")


@dataclass(frozen=True)
class Circle:
    """The points that one alpha and one temperature lead to.

    Attributes:
        alpha, temperature: of the loss.
        loss: at the end.
        spread: mean distance of a sample to the mean of its class, from 0 (a point) to 1.
        separation: smallest angle between two class means, degrees.
        points: [N, 2], samples of a class together.
        labels: [N].
    """

    alpha: float
    temperature: float
    loss: float
    spread: float
    separation: float
    points: list[list[float]]
    labels: list[int]


def on_circle(angles: Tensor) -> Tensor:
    """[N] angles to points [N, 2]."""
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def _starts(config: CircleConfig) -> list[Tensor]:
    """First angles [N]: all mixed over the whole circle, and each class near its own place. A low temperature
    knows local minima."""
    generator = torch.Generator().manual_seed(config.seed)
    count = config.classes * config.samples
    mixed = 2 * torch.pi * torch.rand(count, generator=generator, dtype=torch.float64)
    places = 2 * torch.pi * torch.arange(config.classes).double() / config.classes
    noise = torch.randn(count, generator=generator, dtype=torch.float64) / config.classes
    return [mixed, places.repeat_interleave(config.samples) + noise]


def settle(config: CircleConfig, alpha: float, temperature: float) -> Circle:
    """Minimises the loss from seeded random angles; of two starts the one that ends lower is kept."""
    labels = torch.arange(config.classes).repeat_interleave(config.samples)

    def loss(angles: Tensor) -> Tensor:
        views = on_circle(angles)[:, None].expand(-1, 2, -1)
        return functional.spread(
            views, labels, temperature=temperature, alpha=alpha, base=config.base, backend="reference"
        )

    ends = []
    for start in _starts(config):
        angles = start.requires_grad_()
        optimizer = torch.optim.Adam([angles], config.learning_rate)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
        for _ in range(config.steps):
            optimizer.zero_grad()
            loss(angles).backward()
            optimizer.step()
            scheduler.step()
        with torch.no_grad():
            ends.append((loss(angles).item(), on_circle(angles)))
    value, points = min(ends, key=lambda end: end[0])
    grouped = points.view(config.classes, config.samples, 2)
    means = grouped.mean(dim=1)
    spread = (grouped - means[:, None]).norm(dim=2).mean().item()
    directions = torch.nn.functional.normalize(means, dim=1)
    cosines = (directions @ directions.T).clamp(-1, 1)
    pairs = torch.ones_like(cosines).triu(1).bool()
    separation = torch.rad2deg(cosines[pairs].acos().min()).item()
    return Circle(alpha, temperature, value, spread, separation, points.tolist(), labels.tolist())


def settle_all(config: CircleConfig) -> list[Circle]:
    """Every temperature with every alpha."""
    grid = [(alpha, temperature) for temperature in config.temperatures for alpha in config.alphas]
    steps: Any = grid
    if config.progress:
        from tqdm import tqdm

        steps = tqdm(grid, desc="circle", leave=False, delay=2)
    return [settle(config, alpha, temperature) for alpha, temperature in steps]


def draw(path: Path, circles: Sequence[Circle], config: CircleConfig) -> None:
    """A circle for every alpha (columns) and temperature (rows), and the spread against alpha."""
    import numpy as np
    from matplotlib.figure import Figure

    from pysupcon.reports.charts import scatter_circle
    from pysupcon.reports.pictures import _colours

    rows, columns = len(config.temperatures), len(config.alphas)
    figure = Figure(figsize=(1.9 * columns + 4.2, max(2.1 * rows + 0.6, 3.6)), dpi=120, layout="constrained")
    grid = figure.add_gridspec(rows, columns + 2)
    for index, circle in enumerate(circles):
        row, column = divmod(index, columns)
        title = f"alpha {circle.alpha:g}, t {circle.temperature:g}\nspread {circle.spread:.2f}"
        plot = figure.add_subplot(grid[row, column])
        scatter_circle(plot, np.array(circle.points), np.array(circle.labels), title=title)
    plot = figure.add_subplot(grid[:, columns:])
    for rank, (colour, temperature) in enumerate(zip(_colours(rows), config.temperatures, strict=True)):
        spreads = [circle.spread for circle in circles[rank * columns : (rank + 1) * columns]]
        marker = "o^sDvP*X<>"[rank % 10]
        plot.plot(config.alphas, spreads, color=colour, marker=marker, label=f"temperature {temperature:g}")
    plot.set(xlabel="alpha, the weight of cNCE", ylabel="spread within a class", ylim=(-0.03, 1.03))
    plot.grid(alpha=0.25)
    plot.spines[["top", "right"]].set_visible(False)
    plot.legend(frameon=False)
    figure.suptitle(f"{config.classes} classes on the circle, base {config.base}")
    figure.savefig(path, format="png")


def main(arguments: Sequence[str]) -> int:
    """Prints a table; writes circle.json and circle.png; returns the exit status."""
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog="python -m pysupcon circle",
        description="Points on a circle minimise L_spread: how a class spreads with alpha and temperature.",
    )
    parser.add_class_arguments(CircleConfig)
    try:
        config = CircleConfig(**vars(parser.instantiate(parser.parse_args(arguments))))
    except ValueError as error:
        print(f"pysupcon circle: {error}", file=sys.stderr)
        return 1
    circles = settle_all(config)
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    content = {"schema": 1, "config": asdict(config), "circles": [asdict(circle) for circle in circles]}
    (folder / JSON_FILE).write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    draw(folder / PICTURE_FILE, circles, config)
    print(f"{'temperature':>11}  {'alpha':>5}  {'loss':>8}  {'spread':>6}  {'separation (degrees)'}")
    for circle in circles:
        print(
            f"{circle.temperature:11g}  {circle.alpha:5g}  {circle.loss:8.4f}  {circle.spread:6.3f}  "
            f"{circle.separation:.1f}"
        )
    print(f"\nwritten to {folder}")
    return 0
