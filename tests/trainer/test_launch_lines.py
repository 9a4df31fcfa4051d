"""The launch lines of the trainer's page that one machine without a GPU can run, as typed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.training_server import ENVIRONMENT, REPOSITORY

PAGE = (REPOSITORY / "pysupcon" / "trainer" / "README.md").read_text(encoding="utf-8")
_TYPED = re.findall(r"^    ((?:accelerate launch|torchrun) .*configs/.*)$", PAGE, re.MULTILINE)
# The others need several GPUs or other data.
LINES = [line for line in _TYPED if "--multi_gpu" not in line and "cifar10" not in line]


def test_the_lines_are_found() -> None:
    assert [line.split()[0] for line in LINES] == ["accelerate", "torchrun"]


@pytest.mark.slow
@pytest.mark.parametrize("line", LINES)
def test_a_launch_line_trains(line: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    more = f"--trainer.max_steps 1 --optimizer.warmup_epochs 0 --evaluate false --output_dir {folder}"
    bin_folder = str(Path(sys.executable).parent)
    environment = {**ENVIRONMENT, "PATH": os.pathsep.join([bin_folder, os.environ.get("PATH", "")])}
    done = subprocess.run(
        f"{line} {more}", shell=True, cwd=REPOSITORY, env=environment, text=True, timeout=300,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert (folder / "model.safetensors").exists()
    (start,) = json.loads((folder / "environment.json").read_text())
    assert start["processes"] == (2 if line.startswith("torchrun") else 1)


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "1"}, "RANK=1, but the process joined as rank 0: unset the variable"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "has WORLD_SIZE=2, RANK=0, and lacks .*MASTER_ADDR.*torchrun"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "has WORLD_SIZE=2, RANK=1, and lacks .*MASTER_ADDR"),
        ({"WORLD_SIZE": "2"}, "has WORLD_SIZE=2, and lacks RANK, "),
        ({"WORLD_SIZE": "x"}, "has WORLD_SIZE=x, and lacks RANK, "),
        ({"LOCAL_RANK": "0"}, "has LOCAL_RANK=0, and lacks WORLD_SIZE, RANK, "),
    ],
)
def test_variables_of_no_launcher_are_one_line(variables: dict[str, str], words: str, tmp_path: Path) -> None:
    """Without a traceback, and not silently: other tools set RANK or WORLD_SIZE, too."""
    unset = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in ENVIRONMENT.items() if name not in unset} | variables
    command = [
        sys.executable,
        "pysupcon/train.py",
        "--config",
        "digits_smoke",
        "--output_dir",
        str(tmp_path / "run"),
    ]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, text=True, timeout=300, capture_output=True
    )
    assert done.returncode == 2
    assert re.search(words, done.stderr.splitlines()[-1])
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_no_process_on_this_machine_counts_as_one(tmp_path: Path) -> None:
    """LOCAL_WORLD_SIZE=0 of another tool: the cores are divided by the processes that Accelerate knows."""
    environment = {**ENVIRONMENT, "LOCAL_WORLD_SIZE": "0"}
    command = [sys.executable, "pysupcon/train.py", "--config", "digits_smoke", "--trainer.dry_run", "true"]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, text=True, timeout=300, capture_output=True
    )
    assert done.returncode == 0, done.stderr
