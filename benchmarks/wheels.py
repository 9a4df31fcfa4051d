"""Lists and downloads the packages of the trainer that a machine without network access lacks.

    python benchmarks/wheels.py --python 3.12 --out wheels        # on a machine with network access
    pip install --no-index --no-deps --target carried wheels/*.whl        # on the other machine
    PYTHONPATH=carried make gpu-check ARGS="--minutes 25"

The trainer needs the packages of the extra "train" in pyproject.toml and all of their requirements. The
packages named by --have and their requirements are assumed to be installed on the other machine. Requirements
are read from the packages installed here (by ``make setup``), versions from constraints.txt.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
#: Packages that container images for deep learning usually include.
HAVE = (
    "torch", "numpy", "torchvision", "timm", "accelerate", "scikit-learn", "pandas", "matplotlib",
    "torchmetrics", "tensorboard", "safetensors", "pyyaml", "tqdm",
)  # fmt: skip
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def plain(name: str) -> str:
    """A package name, normalized as in PEP 503."""
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(requirements: Iterable[str], python: str, leave: frozenset[str] = frozenset()) -> dict[str, str]:
    """All direct and indirect requirements, with the versions that are installed here.

    Args:
        requirements: as in a Requires-Dist line, with extras and markers.
        python: Python version of the other machine, such as "3.12"; markers are evaluated for it.
        leave: packages to skip.

    Raises:
        LookupError: a package is not installed here.
    """
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [(Requirement(line), "") for line in requirements]
    while waiting:
        requirement, extra = waiting.pop()
        name = plain(requirement.name)
        marker = requirement.marker
        if name in leave or (marker and not marker.evaluate({**environment, "extra": extra})):
            continue
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            raise LookupError(f"{name} is not installed here: run `make setup` first") from None
        found[name] = distribution.version
        for of_extra in ("", *sorted(requirement.extras)):
            if (name, of_extra) not in seen:
                seen.add((name, of_extra))
                waiting += [(Requirement(line), of_extra) for line in distribution.requires or []]
    return found


def training_requirements() -> list[str]:
    """The requirements of the extra "train" in pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = re.search(r"^train = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    assert block is not None
    return re.findall(r'"([^"]+)"', block[1])


def missing(have: Sequence[str], python: str) -> dict[str, str]:
    """Packages that the other machine lacks, with their versions."""
    installed = frozenset(closure(have, python))
    return dict(sorted(closure(training_requirements(), python, installed).items()))


def download(packages: Sequence[str], python: str, platforms: Sequence[str], out: Path) -> int:
    """Download wheels into ``out``. Returns pip's exit status."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(out),
    ]
    command += ["--python-version", python, "--implementation", "cp", "-c", str(ROOT / "constraints.txt")]
    for platform in platforms:
        command += ["--platform", platform]
    return subprocess.run([*command, *packages]).returncode


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", default="3.12", help="Python of the other machine (default %(default)s)")
    parser.add_argument("--platform", nargs="+", default=list(PLATFORMS), help="wheel tags it supports")
    parser.add_argument(
        "--have", nargs="*", default=list(HAVE), metavar="NAME",
        help=f"packages installed on the other machine (default: {' '.join(HAVE)})",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR", help="download the wheels to this folder")
    chosen = parser.parse_args(arguments)
    try:
        wanted = missing(chosen.have, chosen.python)
    except LookupError as error:
        print(error, file=sys.stderr)
        return 2
    if not wanted:
        print("nothing is missing")
        return 0
    if chosen.out is None:
        print("\n".join(f"{name}=={version}" for name, version in wanted.items()))
        return 0
    chosen.out.mkdir(parents=True, exist_ok=True)
    before = set(chosen.out.glob("*.whl"))
    status = download(list(wanted), chosen.python, chosen.platform, chosen.out)
    if status:
        return status
    wheels = sorted(chosen.out.glob("*.whl"))
    for wheel in wheels:
        note = "" if wheel not in before else "  (already downloaded)"
        print(f"{wheel.stat().st_size / 1e6:8.2f} MB  {wheel.name}{note}")
    print(f"{sum(wheel.stat().st_size for wheel in wheels) / 1e6:8.2f} MB  in total; on the other machine:")
    print(f"    pip install --no-index --no-deps --target carried {chosen.out}/*.whl")
    print('    PYTHONPATH=carried make gpu-check ARGS="--minutes 25"')
    return 0


if __name__ == "__main__":
    sys.exit(main())
