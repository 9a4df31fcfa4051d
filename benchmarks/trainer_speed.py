"""Samples per second of pysupcon's trainer beside a plain training loop (plain_loop.py).

    python benchmarks/trainer_speed.py [--threads 2] [--rounds 5] [--json FILE]

Start it on an idle machine; it takes a few minutes. Data: 5,000 MNIST images in memory, and JPEG files that
it writes into a temporary folder. Both train the same network with the same loss, optimizer, batch size and
augmentations on the same images, in turns, each in a process of its own. Each turn builds its loader anew,
runs some steps to warm up, and times the next steps, at least one epoch. "data only" makes the same batches
without a model.

The trainer runs as users run it, with its log and its metrics, but without validation, and the checkpoint at
its end is not timed. A trial before the first turn chooses the fastest loader of each: 0 or 2 workers, and
for the plain loop transforms of tensors or of PIL images.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, redirect_stderr
from copy import deepcopy
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import pysupcon
from benchmarks import machine, plain_loop, table
from benchmarks.jpeg_files import write_images
from benchmarks.kernels.peers import written_supcon
from pysupcon.config import Config, config_of
from pysupcon.data.datamodule import DataModule, load_data
from pysupcon.data.samples import FileImages
from pysupcon.models.model import memory_format
from pysupcon.trainer.loop import Trainer
from pysupcon.trainer.run import build_model
from pysupcon.trainer.setup import own_accelerator_state
from pysupcon.trainer.stop import StopRequests

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "trainer_speed_cpu.json"
WARMUP = 3
TEMPERATURE, LEARNING_RATE, WEIGHT_DECAY = 0.1, 3e-3, 1e-4
BARS = {"memory": 1.5, "files": 1.0}
"""The trainer's speed in training relative to the plain loop should be at least this."""
OURS, PLAIN, DENSE = "pysupcon's trainer", "plain loop", "plain loop, dense loss"
TITLES = {"memory": "MNIST in memory", "files": "JPEG files"}


def make_config(source: str, threads: int, folder: Path) -> Config:
    """Config of the training on "memory" or "files"."""
    section: dict[str, Any] = {"dataset": "mnist5k", "batch_size": 256}
    if source == "files":
        section = {"dataset": "image_folder", "root": str(folder), "image_size": 64, "batch_size": 64}
    config = config_of(
        {
            "data": section,
            "model": {"backbone": "small_cnn", "width": 16},
            "loss": {"name": "supcon", "temperature": TEMPERATURE},
            "optimizer": {"learning_rate": LEARNING_RATE, "weight_decay": WEIGHT_DECAY},
            "trainer": {"cpu": True, "threads": threads, "best_by": None},
            "evaluate": False,
        },
        {},
    )
    config.resolve()
    return config


class Clock:
    """Iterates over batches; notes when the first one after the warm-up and the last one are asked for."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches = batches
        self.start = self.end = 0.0

    def __iter__(self) -> Iterator[Any]:
        iterator, number = iter(self.batches), 0
        while True:
            self.end = time.perf_counter()
            if number == WARMUP:
                self.start = self.end
            yield next(iterator)
            number += 1


def timed(steps: Iterator[Any], count: int) -> float:
    """Seconds of ``count`` steps, after the warm-up."""
    for _ in range(WARMUP):
        next(steps)
    start = time.perf_counter()
    for _ in range(count):
        next(steps)
    return time.perf_counter() - start


class Contest:
    """The contestants on one source of data.

    Args:
        source: "memory" or "files".
        threads: threads of torch.
        steps: timed steps of a turn; None: whole epochs, at least 12 steps.
        folder: holds the image files.
    """

    def __init__(self, source: str, threads: int, steps: int | None, folder: Path) -> None:
        torch.set_num_threads(threads)
        self.config = make_config(source, threads, folder)
        self.data: DataModule = load_data(self.config.data)
        self.batch_size = self.config.data.global_batch_size
        epoch = len(self.data.training) // self.batch_size
        self.steps = steps or epoch * math.ceil(12 / epoch)
        self.memory_format = memory_format(self.config.model)

    def train_ours(self, workers: int) -> float:
        """The trainer. Its last step ends with a checkpoint, so one more step follows the timed ones."""
        self.config.data.workers = workers
        config = deepcopy(self.config)
        config.trainer.max_steps = config.trainer.checkpoint_steps = WARMUP + self.steps + 1
        silence = io.StringIO()
        with (
            tempfile.TemporaryDirectory() as folder, own_accelerator_state(), redirect_stderr(silence),
            StopRequests(None) as stop,
        ):  # fmt: skip
            trainer = Trainer(config, self.data, Path(folder))
            clock: Any = Clock(trainer.loader)
            trainer.loader = clock
            trainer.fit(stop)
        return float(clock.end - clock.start)

    def load_ours(self, workers: int) -> float:
        """The trainer's batches, normalised as its step does."""
        self.config.data.workers = workers
        sampler = self.data.batch_sampler(seed=0, steps=WARMUP + self.steps + 1)

        def batches() -> Iterator[Any]:
            for views, _ in self.data.loader(sampler):
                images = self.data.normalize(views).flatten(0, 1)
                yield images.contiguous(memory_format=self.memory_format)

        return timed(batches(), self.steps)

    def _plain_loader(self, form: plain_loop.Form) -> Any:
        samples, normalize = self.data.training, self.data.normalize
        images = samples.images.paths if isinstance(samples.images, FileImages) else samples.images
        transform = plain_loop.strong_transform(
            self.data._family, self.data.image_size, normalize.mean.flatten().tolist(),
            normalize.std.flatten().tolist(), form.pil,
        )  # fmt: skip
        dataset = plain_loop.TwoViews(images, samples.coarse, transform, form.pil)
        return plain_loop.loader(dataset, self.batch_size, form.workers)

    def train_plain(self, form: plain_loop.Form, dense: bool = False) -> float:
        """The plain loop with pysupcon's loss, or with the dense loss."""
        torch.manual_seed(0)
        network = build_model(self.config, self.data).to(memory_format=self.memory_format)
        optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        criterion = pysupcon.SupConLoss(temperature=TEMPERATURE)

        def loss(outputs: Any, labels: torch.Tensor) -> torch.Tensor:
            if dense:
                return written_supcon(outputs.projection, labels, TEMPERATURE)
            return criterion(outputs.projection, labels)

        loader = self._plain_loader(form)
        return timed(plain_loop.training(loader, network, loss, optimizer, self.memory_format), self.steps)

    def load_plain(self, form: plain_loop.Form) -> float:
        """The batches of the plain loop."""
        return timed(plain_loop.batches(self._plain_loader(form), self.memory_format), self.steps)


_contest: Contest


def _open(*arguments: Any) -> None:
    """Prepare the process of a contestant."""
    global _contest
    _contest = Contest(*arguments)


def _turn(method: str, *arguments: Any) -> float:
    """Samples per second of a method of :class:`Contest`."""
    return _contest.steps * _contest.batch_size / float(getattr(_contest, method)(*arguments))


def _facts() -> dict[str, Any]:
    facts = {"batch_size": _contest.batch_size, "image_size": _contest.data.image_size}
    return {"samples": len(_contest.data.training), **facts, "steps": _contest.steps}


def measure(source: str, threads: int, steps: int | None, folder: Path, rounds: int) -> dict[str, Any]:
    """Samples per second of each turn, round by round.

    Each contestant has a process of its own, which waits while the other runs: the trainer changes settings
    of its process, such as those of malloc.
    """
    spawn = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        ours, plain = (
            stack.enter_context(
                ProcessPoolExecutor(1, spawn, initializer=_open, initargs=(source, threads, steps, folder))
            )
            for _ in range(2)
        )

        def turn(pool: ProcessPoolExecutor, method: str, *arguments: Any) -> float:
            return pool.submit(_turn, method, *arguments).result()

        of_workers = {each: turn(ours, "train_ours", each) for each in plain_loop.WORKERS}
        of_forms = {each: turn(plain, "train_plain", each) for each in plain_loop.FORMS}
        workers = max(of_workers, key=lambda each: of_workers[each])
        form = max(of_forms, key=lambda each: of_forms[each])
        turns: dict[tuple[str, str], tuple[Any, ...]] = {
            ("training", OURS): (ours, "train_ours", workers),
            ("training", PLAIN): (plain, "train_plain", form),
            ("training", DENSE): (plain, "train_plain", form, True),
            ("data only", OURS): (ours, "load_ours", workers),
            ("data only", PLAIN): (plain, "load_plain", form),
        }
        speeds: dict[tuple[str, str], list[float]] = {key: [] for key in turns}
        for _ in range(rounds):
            for key, arguments in turns.items():
                speeds[key].append(turn(*arguments))
        facts = plain.submit(_facts).result()
    return {
        "source": source,
        **facts,
        "loaders": {OURS: f"{workers} workers", PLAIN: str(form)},
        "trial": {
            OURS: {f"{each} workers": speed for each, speed in of_workers.items()},
            PLAIN: {str(each): speed for each, speed in of_forms.items()},
        },
        "rows": [
            {"work": work, "contestant": who, "samples_per_second": found}
            for (work, who), found in speeds.items()
        ],
    }


def ratios(contest: dict[str, Any], work: str, contestant: str) -> list[float]:
    """How many times the speed of ``contestant`` the trainer has, round by round."""
    speeds = {(row["work"], row["contestant"]): row["samples_per_second"] for row in contest["rows"]}
    return [ours / other for ours, other in zip(speeds[work, OURS], speeds[work, contestant], strict=True)]


def met(contest: dict[str, Any]) -> bool:
    """Whether the trainer meets its bar."""
    return statistics.median(ratios(contest, "training", PLAIN)) >= BARS[contest["source"]]


def lines(contests: Iterable[dict[str, Any]]) -> list[list[str]]:
    """The table: one line for each source, work and contestant."""
    found = [["data", "work", "", "samples/s: median [range]", "views/s", "trainer / this"]]
    for contest in contests:
        for row in contest["rows"]:
            speeds, who = row["samples_per_second"], row["contestant"]
            ratio = ""
            if who != OURS:
                times = ratios(contest, row["work"], who)
                ratio = f"{statistics.median(times):.2f} [{min(times):.2f}, {max(times):.2f}]"
            median = statistics.median(speeds)
            shown = f"{median:,.0f} [{min(speeds):,.0f}, {max(speeds):,.0f}]"
            found.append([TITLES[contest["source"]], row["work"], who, shown, f"{2 * median:,.0f}", ratio])
    return found


def section(stored: dict[str, Any]) -> str:
    """The measurement in Markdown, for benchmarks/README.md."""
    contests = stored["contests"]
    loaders = "; ".join(
        f"{TITLES[contest['source']]}: "
        + " and ".join(f"{chosen} ({who})" for who, chosen in contest["loaders"].items())
        for contest in contests
    )
    bars = ", ".join(
        f"{TITLES[contest['source']]} >= {BARS[contest['source']]:g} x: {'met' if met(contest) else 'MISSED'}"
        for contest in contests
    )
    return "\n\n".join(
        [
            f"{table.heading(stored['machine'])}. {stored['rounds']} rounds.",
            table.markdown(lines(contests)),
            f"Loaders: {loaders}.",
            f"Targets (training, trainer / plain loop): {bars}.",
        ]
    )


def describe() -> dict[str, Any]:
    """The machine, and the versions of the packages that load data and train."""
    about = machine.describe("cpu")
    for package in ("torchvision", "pillow", "accelerate"):
        about["versions"][package] = metadata.version(package)
    return about


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", nargs="+", choices=list(BARS), default=list(BARS), help="sources of data")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="timed steps of a turn (default: 12 or more)")
    parser.add_argument("--files", type=int, default=600, help="number of JPEG files (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    stored: dict[str, Any] = {"machine": describe(), "rounds": options.rounds, "contests": []}
    with tempfile.TemporaryDirectory() as temporary:
        for source in options.data:
            if source == "files":
                write_images(Path(temporary), options.files)
            measured = measure(source, options.threads, options.steps, Path(temporary), options.rounds)
            stored["contests"].append(measured)
    print(section(stored))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
