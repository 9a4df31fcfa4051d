"""Fixtures shared by the tests: the streaming backends that can run here, and how hypothesis searches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, settings

import pysupcon

# Derandomised: the everyday suite must say the same thing twice. `--hypothesis-profile search` looks further.
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
    """Every streaming backend that a CPU machine has."""
    entry = pysupcon.backends()[request.param]
    if not entry["available"]:
        pytest.skip(f"backend {request.param!r}: {entry['detail']}")
    return str(request.param)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
