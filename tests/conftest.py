"""Fixtures of all tests, and the profiles of hypothesis."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, settings

import pysupcon
from pysupcon.pairs import arguments

arguments._warned.add("norms")  # most rows of the tests are not normalised
# Derandomized, so that the everyday suite is reproducible. `--hypothesis-profile search` tries more examples.
settings.register_profile(
    "everyday",
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.register_profile("search", settings.get_profile("everyday"), max_examples=1000, derandomize=False)
settings.load_profile("everyday")


@pytest.fixture(params=["cpu", "tiled"])
def backend(request: pytest.FixtureRequest) -> str:
    """The streaming backends that run on a CPU."""
    entry = pysupcon.backends()[request.param]
    if not entry["available"]:
        pytest.skip(f"backend {request.param!r}: {entry['detail']}")
    return str(request.param)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
