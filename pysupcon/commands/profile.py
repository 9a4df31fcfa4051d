"""``python -m pysupcon profile``: what a large batch costs, predicted and then measured.

    python -m pysupcon profile --loss supcon --n 65536 --dim 128
    python -m pysupcon profile --n 4096 --encoder resnet18 --image-size 32 --chunk 256 --output runs/profile
    python -m pysupcon profile --n 1048576 --predict

Prints time and peak memory of the loss and, with --encoder, of a training step around it; the table of
torch.profiler; the largest batch that fits. Writes into --output: profile.json, and of each thing measured a
Chrome trace (trace.json; chrome://tracing, Perfetto), the operators (operators.txt) and a picture of the
memory over time (memory.png), on a GPU also the allocator's snapshot (memory_snapshot.pickle, for
pytorch.org/memory_viz).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from pysupcon.errors import ConfigError
from pysupcon.pairs.checks import BACKENDS
from pysupcon.profiling.report import Report, text
from pysupcon.profiling.run import Asked, profile_loss, profile_step
from pysupcon.profiling.workload import LOSSES, VIEWS

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
RESULT_FILE = "profile.json"


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m pysupcon profile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("--loss", choices=LOSSES, default="supcon")
    found.add_argument("--n", type=int, required=True, help="rows: all views of all samples (two of each)")
    found.add_argument("--dim", type=int, default=128, help="dimensions of a row (default %(default)s)")
    found.add_argument("--classes", type=int, default=100, help="of equal size (default %(default)s)")
    found.add_argument("--temperature", type=float, default=0.07, help="default %(default)s")
    found.add_argument("--dtype", choices=DTYPES, default="float32", help="of the rows (default %(default)s)")
    found.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    found.add_argument(
        "--backend", choices=BACKENDS, default="auto", help="of the loss (default %(default)s)"
    )
    found.add_argument(
        "--encoder", metavar="NAME", help="small_cnn or a timm model: profile a training step too"
    )
    found.add_argument("--image-size", type=int, help="pixels, with --encoder (default 32)")
    found.add_argument(
        "--chunk", type=int, help="images per pass of the encoder, with --encoder: gradient caching"
    )
    found.add_argument("--predict", action="store_true", help="predict only: run nothing of the full size")
    found.add_argument(
        "--output", type=Path, default=Path("runs/profile"), metavar="DIR", help="default %(default)s"
    )
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        asked = _asked(options)
        report = Report(asked.device, asked.describe(), profile_loss(asked))
        if asked.encoder is not None:
            report.step = profile_step(asked, report.loss)
    except ConfigError as error:
        print(f"pysupcon profile: {error}", file=sys.stderr)
        return 2
    print(text(report))
    options.output.mkdir(parents=True, exist_ok=True)
    stored = json.dumps(asdict(report), indent=1, default=str) + "\n"
    (options.output / RESULT_FILE).write_text(stored, encoding="utf-8")
    print(f"written: {', '.join(sorted(str(path) for path in options.output.rglob('*') if path.is_file()))}")
    return 0


def _asked(options: argparse.Namespace) -> Asked:
    """Checked.

    Raises:
        ConfigError: names the argument.
    """
    for name in ("dim", "classes", "image_size", "chunk"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if options.n < 64 or options.n % (4 * VIEWS):
        raise ConfigError(f"--n must be a multiple of {4 * VIEWS} and at least 64, got {options.n}")
    if options.temperature <= 0:
        raise ConfigError(f"--temperature must be greater than 0, got {options.temperature}")
    if options.encoder is None:
        for name in ("image_size", "chunk"):
            if getattr(options, name) is not None:
                raise ConfigError(f"--{name.replace('_', '-')} needs --encoder")
    if options.encoder is not None and options.dtype != "float32":
        raise ConfigError("--dtype must be float32 with --encoder, whose rows are float32")
    try:
        device = torch.device(options.device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"--device {options.device} cannot be used: {str(error).splitlines()[0]}"
        ) from error
    return Asked(
        loss=options.loss,
        n=options.n,
        dim=options.dim,
        classes=options.classes,
        temperature=options.temperature,
        dtype=DTYPES[options.dtype],
        device=device,
        backend=options.backend,
        encoder=options.encoder,
        image_size=options.image_size or 32,
        chunk=options.chunk,
        measure=not options.predict,
        output=options.output,
    )
