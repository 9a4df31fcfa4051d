"""Peak resident memory of one training step on a large batch: GradCache and the whole batch in one graph.

    python benchmarks/kernels/gradcache_memory.py --batch 4096 --chunk 64 --limit-gib 12 --json results.json

The model is timm's ResNet-18 with a stem for small images (3x3, stride 1, no pooling), 32x32 images, a
projection to 128 dimensions and SupCon, in float32 on the CPU. Every step runs in a new process with a memory
limit. If the whole batch does not fit into the limit, half of it is tried, and so on. Prints a table; --json
also writes it to a file, with a description of the machine.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pysupcon
from benchmarks import machine
from pysupcon.gradcache import GradCache

GIB = 2**30
CLASSES = 100


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = timm.create_model("resnet18", num_classes=0)
        self.backbone.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.backbone.maxpool = nn.Identity()
        self.projection = nn.Linear(self.backbone.num_features, 128)

    def forward(self, images: Tensor) -> Tensor:
        return F.normalize(self.projection(self.backbone(images)), dim=-1)


def step(model: nn.Module, images: Tensor, labels: Tensor, chunk: int | None) -> float:
    """One forward and backward. Returns the loss."""
    criterion = pysupcon.SupConLoss(0.1)
    if chunk is not None:
        return float(GradCache(model, chunk)(images, lambda embeddings: criterion(embeddings, labels)))
    loss = criterion(model(images), labels)
    loss.backward()
    return loss.item()


def _private() -> int:
    """Bytes of private writable memory, the memory that RLIMIT_DATA limits."""
    found = re.search(r"^VmData:\s+(\d+) kB$", Path("/proc/self/status").read_text("ascii"), re.MULTILINE)
    if found is None:
        raise OSError("/proc/self/status has no VmData")
    return int(found.group(1)) * 1024


def peak() -> int:
    """Peak resident set size of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(batch: int, chunk: int | None, limit: float) -> dict[str, Any]:
    """Run one step in this process. ``limit``: bytes of memory in addition to the model and the images."""
    torch.manual_seed(0)
    model, images = Encoder(), torch.randn(batch, 3, 32, 32)
    labels = torch.arange(batch) % CLASSES
    # The warm-up loads libraries, starts threads and allocates .grad.
    step(model, images[:4], labels[:4] % 2, None if chunk is None else 2)
    maximum = int(_private() + limit)
    resource.setrlimit(resource.RLIMIT_DATA, (maximum, maximum))
    before, start = peak(), time.perf_counter()
    try:
        loss = step(model, images, labels, chunk)
    except (RuntimeError, MemoryError) as error:
        if "memory" not in str(error).lower() and not isinstance(error, MemoryError):
            raise
        return {"fits": False}
    return {
        "fits": True,
        "seconds": round(time.perf_counter() - start, 1),
        "before_bytes": before,
        "peak_bytes": peak(),
        "loss": loss,
    }


def in_fresh_process(batch: int, chunk: int | None, limit: float, threads: int) -> dict[str, Any]:
    command = [
        sys.executable,
        __file__,
        "--batch",
        str(batch),
        "--limit-gib",
        str(limit / GIB),
        "--threads",
        str(threads),
    ]
    command += ["--measure"] + ([] if chunk is None else ["--chunk", str(chunk)])
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the step ended with status {done.returncode}:\n{done.stderr}")
    return {"batch": batch, "chunk": chunk, **json.loads(done.stdout.splitlines()[-1])}


def show(row: dict[str, Any]) -> None:
    how = "one graph" if row["chunk"] is None else f"chunks of {row['chunk']}"
    if not row["fits"]:
        print(f"batch {row['batch']:>6}  {how:<15} does not fit", flush=True)
        return
    above = (row["peak_bytes"] - row["before_bytes"]) / GIB
    print(
        f"batch {row['batch']:>6}  {how:<15} peak {row['peak_bytes'] / GIB:6.2f} GiB resident "
        f"({above:6.2f} above model and images)  {row['seconds']:7.1f} s",
        flush=True,
    )


def save(path: Path, rows: list[dict[str, Any]], limit: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {"limit_bytes": int(limit), "rows": rows, "machine": machine.describe("cpu")}
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--chunk", type=int, help="images per chunk of GradCache (default 64)")
    parser.add_argument("--limit-gib", type=float, default=12.0, help="memory limit of a step")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    limit = arguments.limit_gib * GIB
    if arguments.measure:
        print(json.dumps(measure(arguments.batch, arguments.chunk, limit)))
        return

    chunk, rows = arguments.chunk or 64, []

    def run(batch: int, size: int | None) -> dict[str, Any]:
        rows.append(in_fresh_process(batch, size, limit, arguments.threads))
        show(rows[-1])
        if arguments.json is not None:  # after every row, because a step can take minutes
            save(arguments.json, rows, limit)
        return rows[-1]

    run(arguments.batch, chunk)
    batch = arguments.batch
    while not run(batch, None)["fits"]:
        batch //= 2
        if not batch:
            raise SystemExit("not even one image fits: raise --limit-gib")
    if batch < arguments.batch:
        run(batch, chunk)


if __name__ == "__main__":
    main()
