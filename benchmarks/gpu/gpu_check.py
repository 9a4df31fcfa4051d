"""Everything that only a GPU can say, within eight minutes and without a network.

    python benchmarks/gpu/gpu_check.py [--minutes 8] [--json FILE]      # make gpu-check ARGS="--minutes 25"
    python benchmarks/gpu/gpu_check.py --minutes 9 --steps counters launches pairs   # a part of the long form

1. builds the extension in place for this GPU, and beside it the kernels' own drivers, with the nvcc that
   csrc/find_cuda.py finds
2. a quick look: the driver (tests/cuda/cuda_emulation: the kernels against a float64 oracle) on a few cases
3. first measurements of our kernels (benchmarks/kernels/run.py --device cuda)
4. the driver on all cases, one format a process; broken operands; tests/cuda/test_cuda_gpu.py, one group a
   process; the driver under compute-sanitizer's memcheck and racecheck
5. measurements beside dense losses and torch.compile

With more than eight minutes also: memcheck of broken operands, launches a step, ncu's counters of the hot
kernels, a short training, and the whole table of measurements with the fused losses of other packages
(inf_cl, memeff) that are installed.

Every step is tried, whatever became of the others; only what needs a build that failed is not begun. A step
has a limit, at which all its processes end; the limits together are the minutes. The JSON (default
benchmarks/results/<device>.json) is written anew after each step: device, driver, versions and commit; the
measured rows; of each step its verdict, its seconds and the end of its output. Logs: build/gpu-check-sm_*/.

Exit status: 0; 1 if a step failed; 2 where there is nothing to check (no GPU, no nvcc, torch too old,
a WORD that no step of so many minutes has); 130
after an interruption. A step that was left out because a tool is not installed has not failed; it is named in
the last lines. Needed beside torch and nvcc: ninja, pybind11, setuptools, pytest.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "csrc")]

from find_cuda import HOMES, Toolkit, find_cuda, find_programs, top_of  # noqa: E402

from benchmarks import guard, processes  # noqa: E402
from benchmarks.gpu import counters  # noqa: E402
from benchmarks.gpu.gpu_steps import QUICK_MINUTES, Step, Tools, chosen, limits, stages  # noqa: E402

MINIMUM_TORCH = (2, 11)
SCHEMA = 1
#: What makes two measured rows the same point.
POINT = ("case", "implementation", "loss", "n", "dim", "classes", "dtype", "temperature")


def find_tools(toolkit: Toolkit) -> Tools:
    """nvcc, and the programs of the toolkit that may be missing; ncu is also installed on its own."""
    homes = [str(top_of(toolkit.nvcc)), *HOMES]
    sanitizers = find_programs("compute-sanitizer", homes)
    profilers = find_programs("ncu", homes)
    profilers += map(str, sorted(Path("/opt/nvidia/nsight-compute").glob("*/ncu"), reverse=True))
    return Tools(toolkit.nvcc, next(iter(sanitizers), None), next(iter(profilers), None))


def obstacle(torch_version: str, has_gpu: bool) -> str | None:
    """Why there is nothing to check, or None."""
    match = re.match(r"(\d+)\.(\d+)", torch_version)
    if match is None or (int(match[1]), int(match[2])) < MINIMUM_TORCH:
        return f"torch {MINIMUM_TORCH[0]}.{MINIMUM_TORCH[1]} or newer is needed, this is {torch_version}"
    return None if has_gpu else "torch sees no CUDA device"


def file_name(device: str) -> str:
    """'NVIDIA H100 80GB HBM3' -> 'nvidia-h100-80gb-hbm3.json'."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


def describe_machine(log: Path) -> tuple[dict[str, Any], str]:
    """machine.py's record, made elsewhere: this process loads no CUDA, and no extension that is rebuilt."""
    command = [sys.executable, "benchmarks/machine.py", "cuda"]
    (done,) = processes.run([processes.Command(command, 60, log, {})], ROOT, echo=False)
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
        return json.loads(text[text.index('{"device"') :]), ""
    except ValueError:
        return {}, done.tail.strip()[-500:] or f"exit status {done.code}"


class Record:
    """What is known so far; its file is replaced whole whenever there is more."""

    def __init__(self, path: Path, machine: dict[str, Any]) -> None:
        self.path = path
        self.content: dict[str, Any] = {"schema": SCHEMA, "machine": machine, "rows": [], "steps": []}

    def save(self) -> None:
        guard.write_json(self.path, self.content)

    def add(self, step: Step, verdict: str, seconds: float = 0.0, word: str = "", tail: str = "") -> None:
        """A step's verdict ("passed", "FAILED", "left out") and whatever it wrote."""
        entry = {"name": step.name, "verdict": verdict, "seconds": round(seconds, 1), "word": word}
        self.content["steps"].append({**entry, "command": list(step.command), "tail": tail})
        if step.result is not None and step.result.exists():
            try:
                self._store(step, step.result.read_text(encoding="utf-8"))
            except (ValueError, KeyError, OSError) as error:
                self.content["steps"][-1]["unreadable"] = f"{type(error).__name__}: {error}"
        self.save()

    def _store(self, step: Step, text: str) -> None:
        if step.stored_as == "counters":
            new = [{"step": step.name, **row} for row in counters.parse(text)]
        else:
            stored = json.loads(text)
            new = stored["rows"]
            if "ended" in stored:
                self.content["steps"][-1]["ended"] = stored["ended"]
        kept = self.content.setdefault(step.stored_as, [])
        if step.stored_as == "rows":
            # A point that is measured again, for longer, replaces the first look at it.
            better = {_point(row) for row in new if "both_s" in row or "peak_bytes" in row}
            kept[:] = [row for row in kept if _point(row) not in better]
        kept += new

    def verdicts(self) -> list[str]:
        """Lines of text."""
        return [
            f"{step['verdict']:8} {step['seconds']:6.0f} s  {step['name']}  {step['word']}".rstrip()
            for step in self.content["steps"]
        ]

    @property
    def failed(self) -> bool:
        return any(step["verdict"] == "FAILED" for step in self.content["steps"])

    def passed(self, name: str) -> bool:
        return any(s["name"] == name and s["verdict"] == "passed" for s in self.content["steps"])


def _point(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in POINT)


def run_stage(stage: Sequence[Step], limit: float, record: Record, out: Path) -> None:
    """Runs the steps of a stage beside each other, each within the limit, and records them."""
    begun: list[Step] = []
    for step in stage:
        if step.missing:
            record.add(step, "left out", word=step.missing)
        elif step.needs and not record.passed(f"build the {step.needs}"):
            record.add(step, "FAILED", word=f"not begun: the {step.needs} was not built")
        elif limit < 1:
            record.add(step, "FAILED", word="not begun: the time was up")
        else:
            begun.append(step)
            if step.result is not None:
                step.result.unlink(missing_ok=True)
    if not begun:
        return
    print(f"\n== {' and '.join(step.name for step in begun)}: at most {limit:.0f} s ==", flush=True)
    logs = out / "logs"
    count = len(record.content["steps"])
    commands = [
        processes.Command(step.command, limit, logs / f"{count + i:02}.txt", step.environment)
        for i, step in enumerate(begun)
    ]
    try:
        ended = processes.run(commands, ROOT)
    except KeyboardInterrupt:
        for step, command in zip(begun, commands, strict=True):
            tail = command.log.read_text(encoding="utf-8", errors="replace")[-processes.TAIL :]
            record.add(step, "FAILED", word="interrupted", tail=tail)
        raise
    for step, end in zip(begun, ended, strict=True):
        word = f"exit status {end.code}" if end.code != 0 else ""
        if end.cut:
            word = f"cut short after {end.seconds:.0f} s"
        if step.stored_as == "counters" and not word and not counters_in(step):
            word = "ncu wrote no counters (is it allowed to read them?)"
        record.add(step, "FAILED" if word else "passed", end.seconds, word, end.tail)


def counters_in(step: Step) -> bool:
    """Whether ncu's file has a kernel in it."""
    path = step.result
    return path is not None and path.exists() and bool(counters.parse(path.read_text(encoding="utf-8")))


def main(arguments: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument(
        "--minutes", type=float, default=QUICK_MINUTES, help="for everything (default %(default)s)"
    )
    options.add_argument("--json", type=Path, metavar="FILE", help="default: results/<device>.json")
    options.add_argument(
        "--steps", nargs="+", default=[], metavar="WORD", help="only steps whose names hold one of the words"
    )
    wanted = options.parse_args(arguments)
    start = time.monotonic()
    with guard.interruptible():
        try:
            return check(wanted.minutes, wanted.json, wanted.steps, start)
        except KeyboardInterrupt as error:
            print(f"\ngpu-check: interrupted ({error or 'SIGINT'})", file=sys.stderr)
            return 130


def check(minutes: float, path: Path | None, words: Sequence[str], start: float) -> int:
    """Everything; exit status."""
    machine, problem = describe_machine(ROOT / "build" / "gpu-check-machine.txt")
    if not machine:
        print(f"gpu-check: nothing can be checked here: {problem}", file=sys.stderr)
        return 2
    reason = obstacle(machine["versions"].get("torch", "?"), "gpu" in machine)
    toolkit, word = find_cuda()
    if reason or toolkit is None:
        print(f"gpu-check: nothing can be checked here: {reason or word}", file=sys.stderr)
        return 2
    out = ROOT / "build" / f"gpu-check-sm_{machine['arch']}"
    every = stages(find_tools(toolkit), machine["arch"], out, minutes)
    unknown = [name for name in words if not any(name in step.name for stage in every for step in stage)]
    if unknown:
        print(
            f"gpu-check: no step of {minutes:g} minutes is named {', '.join(unknown)}; the steps are:",
            *(step.name for stage in every for step in stage),
            sep="\n  ",
            file=sys.stderr,
        )
        return 2
    plan = chosen(every, words)
    record = Record(path or ROOT / "benchmarks" / "results" / file_name(machine["gpu"]), machine)
    try:
        record.path.parent.mkdir(parents=True, exist_ok=True)
        record.save()
    except OSError as error:
        print(f"gpu-check: the results cannot be written: {error}", file=sys.stderr)
        return 2
    promised = limits(plan, 60 * minutes - (time.monotonic() - start))
    try:
        for at, stage in enumerate(plan):
            # What earlier stages left over may be used, what later ones are promised may not.
            left = 60 * minutes - (time.monotonic() - start)
            run_stage(stage, left - sum(promised[at + 1 :]), record, out)
            if at == 0:
                built, _ = describe_machine(out / "logs" / "machine.txt")
                record.content["machine"] = built or machine
                record.save()
    finally:
        where = f"{machine['gpu']}, driver {machine['driver']}, torch {machine['versions']['torch']}"
        print(f"\n{where}, commit {machine['commit']}, {time.monotonic() - start:.0f} s")
        print("\n".join([*record.verdicts(), f"wrote {record.path}"]), flush=True)
    return 1 if record.failed else 0


if __name__ == "__main__":
    sys.exit(main())
