"""A launcher started several processes, but none of them initialised torch.distributed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

LOSS = """
import sys, warnings
import torch, pysupcon
if sys.argv[1] == "group":
    torch.distributed.init_process_group("gloo")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        rows = torch.nn.functional.normalize(torch.randn(8, 4), dim=1)
        pysupcon.SupConLoss(gather=True)(rows, torch.arange(8) % 2)
print("\\n".join(f"{warning.filename}: {warning.message}" for warning in caught))
"""


@pytest.mark.parametrize(("group", "variables", "expected"), [
    ("none", {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, True),
    ("none", {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}, False),
    ("none", {"WORLD_SIZE": "2"}, False),  # of another tool: torchrun sets LOCAL_RANK, too
    ("none", {}, False),
])  # fmt: skip
def test_gather_without_a_group_is_warned_of_once(
    group: str, variables: dict[str, str], expected: bool, tmp_path: Path
) -> None:
    script = tmp_path / "own_training.py"
    script.write_text(LOSS)
    unset = ("WORLD_SIZE", "RANK", "LOCAL_RANK")
    environment = {name: value for name, value in os.environ.items() if name not in unset} | variables
    done = subprocess.run(
        [sys.executable, str(script), group], capture_output=True, text=True, env=environment, check=True
    )
    said = [line for line in done.stdout.splitlines() if "torch.distributed is not initialised" in line]
    assert len(said) == (1 if expected else 0)
    if expected:
        assert said[0].startswith(str(script))
        assert "started 2 processes" in said[0]


@pytest.mark.slow
def test_torchrun_with_a_group_warns_of_nothing(tmp_path: Path) -> None:
    script = tmp_path / "own_training.py"
    script.write_text(LOSS)
    launched = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    found = {}
    for group in ("group", "none"):
        done = subprocess.run([*launched, str(script), group], capture_output=True, text=True, check=True)
        found[group] = done.stdout.count("torch.distributed is not initialised")
    assert found == {"group": 0, "none": 2}
