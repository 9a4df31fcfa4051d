"""``pysupcon circle``: how much a class spreads when points on a circle minimise L_spread.

This is the setting of Thanos's geometry (arXiv 2204.07596) in two dimensions: every sample is a free point on
the unit circle, and both of its views are equal. SupCon and SINCERE contract a class to a point, and
class-conditional InfoNCE separates its samples. Alpha and the temperature control the balance.
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
from pysupcon.commands import config_parser, program
from pysupcon.reading import join_lists, list_options

JSON_FILE = "circle.json"
PICTURE_FILE = "circle.png"


@dataclass
class CircleConfig:
    """Points on a circle that minimise (1 - alpha) * base + alpha * class-conditional InfoNCE."""

    alphas: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.65, 0.8, 0.95])
    """Weights of class-conditional InfoNCE, in [0, 1]."""

    temperatures: list[float] = field(default_factory=lambda: [0.1, 0.25, 0.5])
    """Temperatures, greater than 0."""

    base: Literal["sincere", "supcon"] = "sincere"
    """The base loss, with weight 1 - alpha."""

    classes: int = 3
    """Number of classes, 2 or more."""

    samples: int = 12
    """Samples of each class, 2 or more."""

    steps: int = 400
    """Steps of Adam, with cosine decay of the learning rate."""

    learning_rate: float = 0.05
    """Learning rate of the angles, in radians."""

    seed: int = 0
    """Seed of the initial angles."""

    output: str = "circle"
    """Folder of circle.json and circle.png."""

    progress: bool = True
    """Show a progress bar."""

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
    """The optimised points for one alpha and one temperature.

    Attributes:
        alpha, temperature: parameters of the loss.
        loss: final loss.
        spread: mean distance of a sample to its class mean, from 0 (a point) to 1.
        separation: smallest angle between two class means, in degrees.
        points: [N, 2], ordered by class.
        labels: [N] classes.
    """

    alpha: float
    temperature: float
    loss: float
    spread: float
    separation: float
    points: list[list[float]]
    labels: list[int]


def on_circle(angles: Tensor) -> Tensor:
    """Convert angles [N] to points [N, 2]."""
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def _starts(config: CircleConfig) -> list[Tensor]:
    """Two sets of initial angles [N], because of local minima at low temperatures: uniform, and classes
    apart."""
    generator = torch.Generator().manual_seed(config.seed)
    count = config.classes * config.samples
    uniform = 2 * torch.pi * torch.rand(count, generator=generator, dtype=torch.float64)
    centres = 2 * torch.pi * torch.arange(config.classes).double() / config.classes
    noise = torch.randn(count, generator=generator, dtype=torch.float64) / config.classes
    return [uniform, centres.repeat_interleave(config.samples) + noise]


def minimise(config: CircleConfig, alpha: float, temperature: float) -> Circle:
    """Minimise the loss from two seeded initial positions and return the result with the lower loss."""
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


def minimise_all(config: CircleConfig) -> list[Circle]:
    """Minimise the loss for every temperature and every alpha."""
    grid = [(alpha, temperature) for temperature in config.temperatures for alpha in config.alphas]
    steps: Any = grid
    if config.progress:
        from tqdm import tqdm

        steps = tqdm(grid, desc="circle", leave=False, delay=2, disable=None)
    return [minimise(config, alpha, temperature) for alpha, temperature in steps]


def draw(path: Path, circles: Sequence[Circle], config: CircleConfig) -> None:
    """Draw a circle for every alpha (columns) and temperature (rows), and the spread against alpha."""
    import numpy as np
    from matplotlib.figure import Figure

    from pysupcon.reports.charts import scatter_circle
    from pysupcon.reports.pictures import palette, save_figure

    rows, columns = len(config.temperatures), len(config.alphas)
    figure = Figure(figsize=(1.9 * columns + 4.2, max(2.1 * rows + 0.6, 3.6)), dpi=120, layout="constrained")
    grid = figure.add_gridspec(rows, columns + 2)
    for index, circle in enumerate(circles):
        row, column = divmod(index, columns)
        title = f"alpha {circle.alpha:g}, t {circle.temperature:g}\nspread {circle.spread:.2f}"
        plot = figure.add_subplot(grid[row, column])
        scatter_circle(plot, np.array(circle.points), np.array(circle.labels), title=title)
    plot = figure.add_subplot(grid[:, columns:])
    for rank, (colour, temperature) in enumerate(zip(palette(rows), config.temperatures, strict=True)):
        spreads = [circle.spread for circle in circles[rank * columns : (rank + 1) * columns]]
        marker = "o^sDvP*X<>"[rank % 10]
        plot.plot(config.alphas, spreads, color=colour, marker=marker, label=f"temperature {temperature:g}")
    plot.set(xlabel="alpha, the weight of cNCE", ylabel="spread within a class", ylim=(-0.03, 1.03))
    plot.grid(alpha=0.25)
    plot.spines[["top", "right"]].set_visible(False)
    plot.legend(frameon=False)
    figure.suptitle(f"{config.classes} classes on the circle, base {config.base}")
    save_figure(figure, path)


def main(arguments: Sequence[str]) -> int:
    """Print a table and write circle.json and circle.png; return the exit status."""
    parser = config_parser(
        prog=f"{program()} circle",
        description="Minimise L_spread over points on a circle and show how class spread depends on alpha "
        "and temperature.",
    )
    parser.add_class_arguments(CircleConfig)
    arguments = join_lists(arguments, list_options(CircleConfig))
    try:
        config = CircleConfig(**vars(parser.instantiate(parser.parse_args(arguments))))
    except ValueError as error:
        print(f"pysupcon circle: {error}", file=sys.stderr)
        return 1
    circles = minimise_all(config)
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
