"""Predict and measure the time and the memory of a large batch.

    pysupcon profile --loss supcon --n 65536 --dim 128
    pysupcon profile --n 4096 --encoder resnet18 --image-size 32 --chunk 256 --output runs/profile
    pysupcon profile --n 1048576 --predict

Prints time and peak memory of the loss and, with --encoder, of a training step; the operator table of
torch.profiler; and the largest batch that fits into memory. Writes profile.json into --output and, for each
measurement, a Chrome trace (trace.json, for chrome://tracing or Perfetto), the operator table (operators.txt)
and a picture of the memory over time (memory.png). On a GPU it also writes the allocator's snapshot
(memory_snapshot.pickle, for pytorch.org/memory_viz).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from pysupcon.commands import plain_parser, program
from pysupcon.errors import ConfigError
from pysupcon.pairs.checks import BACKENDS
from pysupcon.profiling.report import Report, format_report
from pysupcon.profiling.run import ProfileRequest, profile_loss, profile_step
from pysupcon.profiling.workload import LOSSES, VIEWS

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
RESULT_FILE = "profile.json"


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    parser = plain_parser(
        prog=f"{program()} profile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--loss", choices=LOSSES, default="supcon", help="loss to profile (default %(default)s)")
    add("--n", type=int, required=True, help="number of rows N: two views of each sample")
    add("--dim", type=int, default=128, help="dimensions of a row (default %(default)s)")
    add("--classes", type=int, default=100, help="number of classes of equal size (default %(default)s)")
    add("--temperature", type=float, default=0.07, help="temperature (default %(default)s)")
    add("--dtype", choices=DTYPES, default="float32", help="dtype of the rows (default %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default %(default)s")
    add("--backend", choices=BACKENDS, default="auto", help="backend of the loss (default %(default)s)")
    add("--encoder", metavar="NAME", help="a backbone as in model.backbone: profile a training step too")
    add("--image-size", type=int, help="image size in pixels, with --encoder (default 32)")
    add("--chunk", type=int, help="images per forward pass of the encoder (GradCache), with --encoder")
    add("--predict", action="store_true", help="only predict: do not run the full size")
    add("--output", type=Path, default=Path("runs/profile"), metavar="DIR", help="default %(default)s")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report and write profile.json; return the exit status."""
    options = build_parser().parse_args(arguments)
    try:
        request = _request(options)
        report = Report(request.device, request.describe(), profile_loss(request))
        if request.encoder is not None:
            report.step = profile_step(request, report.loss)
    except ConfigError as error:
        print(f"pysupcon profile: {error}", file=sys.stderr)
        return 2
    print(format_report(report))
    options.output.mkdir(parents=True, exist_ok=True)
    stored = json.dumps(asdict(report), indent=1, default=str) + "\n"
    (options.output / RESULT_FILE).write_text(stored, encoding="utf-8")
    print(f"written: {', '.join(sorted(str(path) for path in options.output.rglob('*') if path.is_file()))}")
    return 0


def _request(options: argparse.Namespace) -> ProfileRequest:
    """Check the command line.

    Raises:
        ConfigError: an argument is not valid; the message names it.
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
        raise ConfigError("--dtype must be float32 with --encoder: the rows of an encoder are float32")
    try:
        device = torch.device(options.device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"--device {options.device} cannot be used: {str(error).splitlines()[0]}"
        ) from error
    return ProfileRequest(
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
