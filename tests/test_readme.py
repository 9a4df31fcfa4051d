"""The documents: their Python examples run, their links resolve, their numbers are those of the results."""

from __future__ import annotations

import doctest
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("benchmarks", "configs", "csrc", "pysupcon", "tests")
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
EXAMPLE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
PUBLIC = (
    "pysupcon",
    "pysupcon.compat",
    "pysupcon.data",
    "pysupcon.distributed",
    "pysupcon.functional",
    "pysupcon.gradcache",
    "pysupcon.losses",
)
"""Modules that users import; their docstring examples are run."""


def without_code(text: str) -> str:
    """The page without fenced and indented code, where brackets are not links."""
    return re.sub(r"^```.*?^```$|^    .*?$|`[^`\n]*`", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes from the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_pages_are_found() -> None:
    wanted = {"README.md", "CONTRIBUTING.md", "benchmarks/README.md", "benchmarks/papers/README.md"}
    assert wanted | {"pysupcon/trainer/README.md", "csrc/README.md"} <= set(NAMES)


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("name", NAMES)
def test_links_resolve(name: str) -> None:
    page = ROOT / name
    for link in LINK.findall(without_code(page.read_text(encoding="utf-8"))):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_relative_to(ROOT), f"{name}: {link} leaves the repository"
        assert target.exists(), f"{name}: {link} does not exist"
        assert not anchor or anchor in anchors(target), f"{name}: {link} names no heading"


def with_examples() -> list[str]:
    return [name for name in NAMES if EXAMPLE.search((ROOT / name).read_text(encoding="utf-8"))]


@pytest.mark.parametrize("name", with_examples())
def test_python_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of one page run in order and share their names."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    for source in EXAMPLE.findall((ROOT / name).read_text(encoding="utf-8")):
        exec(compile(source, name, "exec"), namespace)


def test_readme_example_trains(capsys: pytest.CaptureFixture[str]) -> None:
    """The first example prints a finite loss and gives every parameter a gradient."""
    namespace: dict[str, Any] = {}
    exec(EXAMPLE.findall((ROOT / "README.md").read_text(encoding="utf-8"))[0], namespace)
    assert re.fullmatch(r"loss \d+\.\d+\n", capsys.readouterr().out)
    gradients = [parameter.grad for parameter in namespace["model"].parameters()]
    assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in gradients)


def docstring_examples() -> Iterator[Any]:
    finder = doctest.DocTestFinder(exclude_empty=True)
    for name in PUBLIC:
        for example in finder.find(importlib.import_module(name), name):
            if example.examples:
                yield pytest.param(example, id=example.name)


@pytest.mark.parametrize("example", list(docstring_examples()))
def test_docstring_examples_run(example: doctest.DocTest) -> None:
    failures: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    runner.run(example, out=failures.append)
    assert not failures, "".join(failures)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_modules_have_an_example(name: str) -> None:
    assert ">>> " in (importlib.import_module(name).__doc__ or "")


def rows_of(section: str) -> list[list[str]]:
    """The cells of the table in a section of README, without the header."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    body = text.split(f"\n## {section}\n")[1].split("\n## ")[0]
    table = next(part for part in body.split("\n\n") if part.lstrip().startswith("|"))
    lines = table.strip().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_results_stand_in_the_linked_pages() -> None:
    """Every number of a result that README quotes stands in the page that the row links to."""
    rows = rows_of("Results")
    assert len(rows) == 3
    for _, ours, others, link in rows:
        page = (ROOT / LINK.findall(link)[0].partition("#")[0]).read_text(encoding="utf-8")
        numbers = re.findall(r"\d[\d.,]*\d(?: ± \d\.\d| ms| s\b| MiB| GiB| samples/s)", f"{ours}; {others}")
        assert len(numbers) >= 2
        for number in numbers:
            assert number.removesuffix(" samples/s") in page, number


def test_losses_of_the_table_exist() -> None:
    import pysupcon

    named = {name for row in rows_of("Losses") for name in re.findall(r"`(\w+)`", row[-1])}
    assert named == {name for name in pysupcon.__all__ if name.endswith("Loss")}


def project_metadata() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11 and newer
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return found


def test_metadata_agree() -> None:
    project = project_metadata()
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\nversion: {project['version']}\n" in citation
    assert f"\n## {project['version']}\n" in changelog
    assert project["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")


def test_console_command(capsys: pytest.CaptureFixture[str]) -> None:
    module, function = project_metadata()["scripts"]["pysupcon"].split(":")
    assert getattr(importlib.import_module(module), function)(["--help"]) == 0
    assert "COMMAND" in capsys.readouterr().out


def test_citation_is_yaml() -> None:
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "title", "authors", "message"} <= set(citation)


MY_PACKAGE = """
from torch import nn
from torchvision.datasets import FakeData

def dataset():
    return FakeData(48, (3, 16, 16), 4)

def build():
    return nn.Sequential(nn.Flatten(), nn.Linear(768, 8))
"""


def test_commands_for_own_data_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """README's lines as typed, with files of the names that they use."""
    import sys

    import numpy as np
    from PIL import Image
    from safetensors.torch import save_file

    from pysupcon.__main__ import main

    random = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (tmp_path / "FOLDER" / label).mkdir(parents=True)
        for i in range(12):
            pixels = random.integers(0, 256, (70, 80, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "FOLDER" / label / f"{i}.jpg")
    rows = "".join(f"{i % 2},{x:.3f},{y:.3f}\n" for i, (x, y) in enumerate(random.normal(size=(40, 2))))
    (tmp_path / "features.csv").write_text("label,x,y\n" + rows)
    (tmp_path / "my_package.py").write_text(MY_PACKAGE)
    save_file({"1.weight": torch.randn(8, 768), "1.bias": torch.zeros(8)}, tmp_path / "weights.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_package", raising=False)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^    pysupcon (train .*?)(?:  +#.*)?$", text, re.MULTILINE)
    assert len(commands) == 3
    for number, command in enumerate(commands):
        further = f"--data.batch_size 8 --trainer.max_steps 1 --evaluate false --output_dir run{number}"
        assert main([*command.split(), *further.split()]) == 0
        assert (tmp_path / f"run{number}" / "model.safetensors").exists()
