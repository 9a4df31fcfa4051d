"""Mistyped options of the commands."""

from __future__ import annotations

import pytest

from pysupcon.__main__ import main
from pysupcon.config import parse_args
from pysupcon.errors import ConfigError


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        ("evaluate RUN --knn.temperatur 1", "knn.temperature"),
        ("transfer RUN --data.datase mnist5k", "data.dataset"),
        ("infer-groups RUN --output x --bandwidt 1", None),
        ("circle --seeed 1", "seed"),
        ("compare RUN RUN --baselin x", "baseline"),
        ("concatenate RUN RUN --outpu x --output x", "output"),
        ("export RUN --outpu x --output x", "output"),
        ("profile --n 64 --encode x", "encoder"),
        ("evaluate RUN --evaluation.pictures false", "pictures"),
        ("transfer RUN --dataset mnist5k", "data.dataset"),
    ],
)
def test_a_mistyped_option_is_refused_with_the_right_one(
    arguments: str, meant: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also one that is the beginning of an option: it would be taken as its abbreviation."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments.split())
    assert stopped.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "unrecognized arguments: --" in last
    assert last.endswith(f"; did you mean {meant}?") if meant else "did you mean" not in last


def test_an_abbreviated_field_of_the_trainer_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--loss.temperatur 1; did you mean loss.temperature\?$"):
        parse_args(["--loss.temperatur", "1"])
