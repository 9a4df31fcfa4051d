"""Facts that pyproject.toml and the code both hold."""

from __future__ import annotations

import re
from pathlib import Path

import pysupcon
from pysupcon.errors import TRAIN_PACKAGES

PROJECT = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
MODULES = {"pyyaml": "yaml", "scikit-learn": "sklearn"}


def test_version() -> None:
    assert re.findall(r'^version = "(.+)"$', PROJECT, re.MULTILINE) == [pysupcon.__version__]


def test_packages_of_the_extra() -> None:
    (listed,) = re.findall(r"^train = \[\n(.*?)^\]", PROJECT, re.MULTILINE | re.DOTALL)
    packages = re.findall(r'"([\w-]+)', listed)
    assert {MODULES.get(package, package) for package in packages} == TRAIN_PACKAGES
