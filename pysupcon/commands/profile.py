"""Predict and measure the time and the memory of a large batch.

    pysupcon profile --loss supcon --n 65536 --dim 128
    pysupcon profile --n 4096 --encoder resnet18 --image-size 32 --chunk 256 --output runs/profile
    pysupcon profile --n 1048576 --predict
    pysupcon profile --step-seconds 60 --memory 16 --encoder resnet18 --chunk 256

Prints time and peak memory of the loss and, with --encoder, of a training step; the operator table of
torch.profiler; and the largest batch that fits into memory and, with --step-seconds, into a time.

Predictions are calibrated on the device with small runs: about a second for the loss and one to two for an
encoder, on an idle machine. After a run of the full size the ratio of measured to predicted is printed,
otherwise the range of the predicted time: what the calibration cannot tell apart. Other work that starts
later is not part of it. Memory of the loss includes the scratch that the threads of the CPU kernels keep.

Writes profile.json into --output and, for each measurement, a Chrome trace (trace.json, for chrome://tracing
or Perfetto), the operator table (operators.txt) and a picture of the memory over time (memory.png). On a GPU
it also writes the allocator's snapshot (memory_snapshot.pickle, for pytorch.org/memory_viz).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from pysupcon.commands import plain_parser, program
from pysupcon.errors import ConfigError
from pysupcon.pairs.checks import BACKENDS
from pysupcon.profiling.report import format_report
from pysupcon.profiling.request import ProfileRequest
from pysupcon.profiling.run import LEAST_ROWS, run_profile
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
    add(
        "--n",
        type=int,
        help="number of rows N: two views of each sample; without it, only predict the largest N within "
        "--step-seconds and --memory",
    )
    add("--dim", type=int, default=128, help="dimensions of a row (default %(default)s)")
    add("--classes", type=int, default=100, help="number of classes of equal size (default %(default)s)")
    add("--temperature", type=float, default=0.07, help="temperature (default %(default)s)")
    add("--dtype", choices=DTYPES, default="float32", help="dtype of the rows (default %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default %(default)s")
    add("--backend", choices=BACKENDS, default="auto", help="backend of the loss (default %(default)s)")
    add("--encoder", metavar="NAME", help="a backbone as in model.backbone: profile a training step too")
    add("--image-size", type=int, help="image size in pixels, with --encoder (default 32)")
    add("--chunk", type=int, help="images per forward pass of the encoder (GradCache), with --encoder")
    add(
        "--step-seconds",
        type=float,
        metavar="S",
        help="print the largest batch whose step (without --encoder: forward and backward of the loss) takes "
        "at most S seconds",
    )
    add(
        "--memory",
        type=float,
        metavar="GIB",
        help="print the largest batch in this memory, inputs included (default: the free memory)",
    )
    add("--predict", action="store_true", help="only predict: do not run the full size")
    add("--output", type=Path, default=Path("runs/profile"), metavar="DIR", help="default %(default)s")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report and write profile.json; return the exit status."""
    options = build_parser().parse_args(arguments)
    try:
        request = _request(options)
        report = run_profile(request)
    except ConfigError as error:
        print(f"pysupcon profile: {error}", file=sys.stderr)
        return 2
    print(format_report(report))
    options.output.mkdir(parents=True, exist_ok=True)
    stored = json.dumps(asdict(report), indent=1, default=str) + "\n"
    result = options.output / RESULT_FILE
    result.write_text(stored, encoding="utf-8")
    print(f"written: {', '.join(sorted(str(path) for path in (result, *report.files)))}")
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
    for name in ("step_seconds", "memory"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"--{name.replace('_', '-')} must be finite and greater than 0, got {value}")
    if options.n is None and options.step_seconds is None and options.memory is None:
        raise ConfigError("--n must be given, or a limit to search it: --step-seconds, --memory, or both")
    if options.n is not None and (options.n < LEAST_ROWS or options.n % (4 * VIEWS)):
        raise ConfigError(f"--n must be a multiple of {4 * VIEWS} and at least {LEAST_ROWS}, got {options.n}")
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
            f"--device {options.device} cannot be used, and predictions are calibrated on the device: "
            f"{str(error).splitlines()[0]}"
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
        measure=not options.predict and options.n is not None,
        output=options.output,
        step_seconds=options.step_seconds,
        memory=None if options.memory is None else int(options.memory * 2**30),
    )
