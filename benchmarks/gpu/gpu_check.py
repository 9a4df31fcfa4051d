"""Runs all checks and measurements that need a GPU, within eight minutes and without network access.

    python benchmarks/gpu/gpu_check.py [--minutes 8] [--json FILE]      # make gpu-check ARGS="--minutes 25"
    python benchmarks/gpu/gpu_check.py --minutes 9 --steps counters launches pairs   # a part of the long form

1. Build the extension in place for this GPU and, in parallel, the drivers of the kernels, with the nvcc that
   csrc/find_cuda.py finds.
2. Run the driver (tests/cuda/cuda_emulation: the kernels against a float64 oracle) on a few cases.
3. Measure pysupcon's kernels (benchmarks/kernels/run.py --device cuda).
4. Run the driver on all cases, one process per format; the cases of broken operands;
   tests/cuda/test_cuda_gpu.py, one process per group; the driver under compute-sanitizer's memcheck and
   racecheck.
5. Measure dense losses and torch.compile for comparison.

With more than eight minutes also: memcheck of broken operands, kernel launches per step, ncu's counters of
the hot kernels, a short training, and the complete measurements, with those fused losses of other packages
(inf_cl, memeff) that are installed.

Every step runs even if others failed, except for steps that need a build that failed. Each step has a time
limit; all limits together are the minutes. The JSON file (default benchmarks/results/<device>.json) is
rewritten after each step. It has the device, driver, versions and commit; the measured rows; and the verdict,
duration and end of the output of each step. Logs: build/gpu-check-sm_*/.

Exit status: 0: success; 1: a step failed; 2: nothing to check (no GPU, no nvcc, torch too old, or --steps
matches no step); 130: interrupted. A step that is skipped because a tool is not installed has not failed; the
last lines name it. Requires torch, nvcc, ninja, pybind11, setuptools and pytest.
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

from benchmarks import fault_tolerance, processes  # noqa: E402
from benchmarks.gpu import counters  # noqa: E402
from benchmarks.gpu.gpu_steps import QUICK_MINUTES, Step, Tools, limits, select_steps, stages  # noqa: E402

MINIMUM_TORCH = (2, 11)
SCHEMA = 1
#: Two measured rows are of the same point if these fields are equal.
POINT = ("case", "implementation", "loss", "n", "dim", "classes", "dtype", "temperature")


def find_tools(toolkit: Toolkit) -> Tools:
    """nvcc and the optional programs of the toolkit; ncu can also be installed separately."""
    homes = [str(top_of(toolkit.nvcc)), *HOMES]
    sanitizers = find_programs("compute-sanitizer", homes)
    profilers = find_programs("ncu", homes)
    profilers += map(str, sorted(Path("/opt/nvidia/nsight-compute").glob("*/ncu"), reverse=True))
    return Tools(toolkit.nvcc, next(iter(sanitizers), None), next(iter(profilers), None))


def unsupported_reason(torch_version: str, has_gpu: bool) -> str | None:
    """The reason why nothing can be checked, or None."""
    match = re.match(r"(\d+)\.(\d+)", torch_version)
    if match is None or (int(match[1]), int(match[2])) < MINIMUM_TORCH:
        return f"torch {MINIMUM_TORCH[0]}.{MINIMUM_TORCH[1]} or newer is needed, this is {torch_version}"
    return None if has_gpu else "torch sees no CUDA device"


def file_name(device: str) -> str:
    """'NVIDIA H100 80GB HBM3' -> 'nvidia-h100-80gb-hbm3.json'."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


def describe_machine(log: Path) -> tuple[dict[str, Any], str]:
    """The output of machine.py and "", or {} and the error.

    machine.py runs in another process: this one must load neither CUDA nor the extension that is rebuilt.
    """
    command = [sys.executable, "benchmarks/machine.py", "cuda"]
    (done,) = processes.run([processes.Command(command, 60, log, {})], ROOT, echo=False)
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
        return json.loads(text[text.index('{"device"') :]), ""
    except ValueError:
        return {}, done.tail.strip()[-500:] or f"exit status {done.exit_status}"


class Record:
    """The results so far; the file is rewritten after each change."""

    def __init__(self, path: Path, machine: dict[str, Any]) -> None:
        self.path = path
        self.content: dict[str, Any] = {"schema": SCHEMA, "machine": machine, "rows": [], "steps": []}

    def save(self) -> None:
        fault_tolerance.write_json(self.path, self.content)

    def add(self, step: Step, verdict: str, seconds: float = 0.0, reason: str = "", tail: str = "") -> None:
        """A step's verdict ("passed", "FAILED", "skipped") and its results."""
        entry = {"name": step.name, "verdict": verdict, "seconds": round(seconds, 1), "reason": reason}
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
            # A later, longer measurement of a point replaces the first one.
            better = {_point(row) for row in new if "both_s" in row or "peak_bytes" in row}
            kept[:] = [row for row in kept if _point(row) not in better]
        kept += new

    def verdicts(self) -> list[str]:
        """One line per step."""
        return [
            f"{step['verdict']:8} {step['seconds']:6.0f} s  {step['name']}  {step['reason']}".rstrip()
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
    """Run the steps of a stage in parallel, each within the limit, and record them."""
    begun: list[Step] = []
    for step in stage:
        if step.missing:
            record.add(step, "skipped", reason=step.missing)
        elif step.needs and not record.passed(f"build the {step.needs}"):
            record.add(step, "FAILED", reason=f"not started: the {step.needs} was not built")
        elif limit < 1:
            record.add(step, "FAILED", reason="not started: no time left")
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
            record.add(step, "FAILED", reason="interrupted", tail=tail)
        raise
    for step, end in zip(begun, ended, strict=True):
        reason = f"exit status {end.exit_status}" if end.exit_status != 0 else ""
        if end.timed_out:
            reason = f"timed out after {end.seconds:.0f} s"
        if step.stored_as == "counters" and not reason and not counters_in(step):
            reason = "ncu wrote no counters (are they restricted to root?)"
        record.add(step, "FAILED" if reason else "passed", end.seconds, reason, end.tail)


def counters_in(step: Step) -> bool:
    """Whether the output of ncu has at least one kernel."""
    path = step.result
    return path is not None and path.exists() and bool(counters.parse(path.read_text(encoding="utf-8")))


def main(arguments: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument(
        "--minutes", type=float, default=QUICK_MINUTES, help="total time limit (default %(default)s)"
    )
    options.add_argument(
        "--json", type=Path, metavar="FILE", help="default: benchmarks/results/<device>.json"
    )
    options.add_argument(
        "--steps", nargs="+", default=[], metavar="WORD", help="only steps whose names contain a WORD"
    )
    wanted = options.parse_args(arguments)
    start = time.monotonic()
    with fault_tolerance.interruptible():
        try:
            return check(wanted.minutes, wanted.json, wanted.steps, start)
        except KeyboardInterrupt as error:
            print(f"\ngpu-check: interrupted ({error or 'SIGINT'})", file=sys.stderr)
            return 130


def check(minutes: float, path: Path | None, names: Sequence[str], start: float) -> int:
    """Run the check. Returns the exit status."""
    machine, problem = describe_machine(ROOT / "build" / "gpu-check-machine.txt")
    if not machine:
        print(f"gpu-check: nothing can be checked here: {problem}", file=sys.stderr)
        return 2
    reason = unsupported_reason(machine["versions"].get("torch", "?"), "gpu" in machine)
    toolkit, detail = find_cuda()
    if reason or toolkit is None:
        print(f"gpu-check: nothing can be checked here: {reason or detail}", file=sys.stderr)
        return 2
    out = ROOT / "build" / f"gpu-check-sm_{machine['arch']}"
    every = stages(find_tools(toolkit), machine["arch"], out, minutes)
    unknown = [name for name in names if not any(name in step.name for stage in every for step in stage)]
    if unknown:
        print(
            f"gpu-check: no step of {minutes:g} minutes is named {', '.join(unknown)}; the steps are:",
            *(step.name for stage in every for step in stage),
            sep="\n  ",
            file=sys.stderr,
        )
        return 2
    plan = select_steps(every, names)
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
            # A stage may use the time that earlier stages left, but not the time reserved for later ones.
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
