"""Builds, imports and tests the losses with each supported pair of a Python and a torch version.

    python benchmarks/matrix.py                          # all pairs, one after the other
    python benchmarks/matrix.py --pairs 3.10:2.11.0      # only this pair (separate several by spaces)
    python benchmarks/matrix.py --slow --keep            # also the slow tests; keep the environments

For each pair, the script creates a virtual environment with that torch version, builds the extension without
CUDA, imports it and runs the tests named by --tests. An environment takes about 5 GB and is removed when its
pair is finished; pip downloads the packages. The oldest torch is the minimum in pyproject.toml, the newest is
the version in constraints.txt. Python interpreters are searched on PATH and in pyenv; a pair without an
interpreter fails.

Prints a Markdown table. Exit status 1 if a pair failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
BETWEEN = ("2.12.1",)
TESTS = ("values", "contract", "operators", "gradcheck", "errors", "compile", "transforms")
TOOLS = ("numpy", "setuptools>=77", "wheel", "pybind11", "ninja", "pytest", "pytest-xdist", "hypothesis",
         "expecttest")  # fmt: skip
#: Packages whose versions depend on torch's; constraints.txt is not used for them.
FOLLOW_TORCH = re.compile(r"torch(vision)?=|triton=|nvidia-|cuda-|setuptools=|sympy=|networkx=|fsspec=")


@dataclass
class Result:
    """The result of one pair."""

    python: str
    torch: str
    built: bool = False
    imported: bool = False
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    minutes: float = 0.0
    error: str = ""
    """The error that stopped the pair, or ""."""

    @property
    def succeeded(self) -> bool:
        return self.imported and self.passed > 0 and not self.failed and not self.error


class PairError(Exception):
    """A step of a pair failed."""


def torch_versions(root: Path = ROOT) -> tuple[str, ...]:
    """The oldest supported version, versions in between, the newest version."""
    oldest = re.search(r'"torch>=([\d.]+)"', (root / "pyproject.toml").read_text(encoding="utf-8"))
    newest = re.search(r"^torch==([\d.]+)", (root / "constraints.txt").read_text(encoding="utf-8"), re.M)
    if oldest is None or newest is None:
        raise LookupError("pyproject.toml must name torch>=VERSION and constraints.txt torch==VERSION")
    first = oldest[1] + ".0" * (2 - oldest[1].count("."))
    return first, *BETWEEN, newest[1]


def all_pairs(root: Path = ROOT) -> list[str]:
    """All pairs as "PYTHON:TORCH", the oldest torch first."""
    return [f"{python}:{torch}" for torch in torch_versions(root) for python in PYTHONS]


def constraints(text: str) -> str:
    """The lines of constraints.txt that hold for any torch version."""
    return "\n".join(line for line in text.splitlines() if not FOLLOW_TORCH.match(line)) + "\n"


def find_python(version: str) -> str:
    """Path of a Python interpreter of this version that has the module venv."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    tried = [shutil.which(f"python{version}"), *map(str, sorted(pyenv.glob(f"{version}.*/bin/python3")))]
    code = f"import sys, venv; sys.exit(sys.version_info[:2] != {tuple(map(int, version.split('.')))})"
    for path in tried:
        if path and not subprocess.run([path, "-c", code], capture_output=True).returncode:
            return path
    raise PairError(f"no python{version} on PATH or in pyenv")


def run(command: Sequence[str], log: Path, step: str, **options: object) -> None:
    """Run a command and append its output to the log. If it fails, the error holds the last line."""
    with log.open("a", encoding="utf-8") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, **options)  # type: ignore[call-overload]
    if done.returncode:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-15:]
        print("\n".join(lines), flush=True)
        raise PairError(f"{step}: {lines[-1][:200] if lines else 'failed'}")


def count(report: Path, result: Result) -> None:
    """Add the counts of a JUnit report to ``result``."""
    for suite in ElementTree.parse(report).getroot().iter("testsuite"):
        failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
        skipped = int(suite.get("skipped", 0))
        result.failed += failed
        result.skipped += skipped
        result.passed += int(suite.get("tests", 0)) - failed - skipped


def check_pair(result: Result, folder: Path, tests: Sequence[str], slow: bool, workers: str) -> None:
    """Build, import and test one pair in its own folder, and fill ``result``."""
    log, environment, package = folder / "log.txt", folder / "environment", folder / "package"
    run([find_python(result.python), "-m", "venv", str(environment)], log, "venv")
    python = str(environment / "bin" / "python")
    limits = folder / "constraints.txt"
    limits.write_text(constraints((ROOT / "constraints.txt").read_text(encoding="utf-8")), encoding="utf-8")
    run([python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "-c", str(limits),
         f"torch=={result.torch}", *TOOLS], log, "pip")  # fmt: skip

    # A copy, because the tests must not import an extension that was built in the checkout.
    shutil.copytree(
        ROOT / "pysupcon", package / "pysupcon", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    variables = {**os.environ, "PYSUPCON_CUDA": "0", "OMP_NUM_THREADS": "1"}
    variables.pop("PYTHONPATH", None)
    build = [python, "setup.py", "-q", "build_ext", "--build-lib", str(package)]
    run(build, log, "build", cwd=ROOT, env=variables)
    result.built = True
    code = (
        "import pysupcon; entry = pysupcon.backends()['cpu']; print(pysupcon.__file__, entry['detail']); "
        "assert entry['available'], entry['detail']"
    )
    run([python, "-c", code], log, "import", cwd=package, env=variables)
    result.imported = True
    report = folder / "tests.xml"
    files = [str(path) for name in tests for path in ROOT.glob(f"tests/*/test_{name}.py")]
    options = ["-q", "-n", workers, "-p", "no:cacheprovider", *([] if slow else ["-m", "not slow"])]
    options += [f"--rootdir={ROOT}", "-c", str(ROOT / "pyproject.toml"), f"--junitxml={report}"]
    try:
        run([python, "-m", "pytest", *options, *files], log, "tests", cwd=package, env=variables)
    finally:
        if report.exists():
            count(report, result)


def table(results: Sequence[Result]) -> str:
    """The results as a Markdown table."""
    lines = ["| Python | torch | built | imported | passed | failed | skipped | minutes |",
             "| --- | --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for r in results:
        error = f" ({r.error})" if r.error and not r.failed else ""
        yes = ["yes" if value else "no" for value in (r.built, r.imported)]
        cells = [r.python, r.torch, *yes, r.passed, r.failed, r.skipped, f"{r.minutes:.1f}{error}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", nargs="+", default=all_pairs(), metavar="PYTHON:TORCH")
    parser.add_argument(
        "--tests", nargs="+", default=list(TESTS), metavar="NAME", help="run tests/*/test_NAME.py"
    )
    parser.add_argument("--slow", action="store_true", help="also run the slow tests")
    parser.add_argument("--workers", default=str(os.cpu_count() or 1), help="number of test processes")
    parser.add_argument(
        "--folder", type=Path, help="folder for environments and logs (default: a temporary folder)"
    )
    parser.add_argument("--keep", action="store_true", help="keep the environments")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    options = parser.parse_args(arguments)
    if wrong := [pair for pair in options.pairs if not re.fullmatch(r"\d+\.\d+:\d[\w.+]*", pair)]:
        parser.error(f"--pairs: a pair must be PYTHON:TORCH, such as {all_pairs()[0]}, got {wrong[0]!r}")
    folder = (options.folder or Path(tempfile.mkdtemp(prefix="matrix-"))).resolve()
    results = []
    for pair in options.pairs:
        result, own, start = Result(*pair.split(":")), folder / pair.replace(":", "-torch"), time.monotonic()
        shutil.rmtree(own, ignore_errors=True)
        own.mkdir(parents=True)
        print(f"python {result.python}, torch {result.torch}: {own / 'log.txt'}", flush=True)
        try:
            check_pair(result, own, options.tests, options.slow, options.workers)
        except PairError as error:
            result.error = str(error)
        result.minutes = round((time.monotonic() - start) / 60, 1)
        results.append(result)
        if not options.keep:
            shutil.rmtree(own / "environment", ignore_errors=True)
        print(table([result]).splitlines()[-1], flush=True)
        if options.json:
            options.json.write_text(
                json.dumps([asdict(r) for r in results], indent=1) + "\n", encoding="utf-8"
            )
    print("\n" + table(results))
    return 0 if all(result.succeeded for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
