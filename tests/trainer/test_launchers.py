"""Trainings under real launchers: torchrun restarts after a process died; two machines train together."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from helpers.training_server import ENVIRONMENT, REPOSITORY, after_log_lines, free_port
from safetensors.torch import load_file

from pysupcon.train import EX_TEMPFAIL
from pysupcon.trainer.checkpoint import checkpoints, read_manifest
from pysupcon.trainer.run import read_log

TRAIN = str(REPOSITORY / "pysupcon" / "train.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
VIT = "{img_size: 8, patch_size: 4, embed_dim: 16, depth: 1, num_heads: 2, proj_drop_rate: 0.2}"
pytestmark = pytest.mark.slow


def arguments(folder: Path, *more: str) -> list[str]:
    fixed = (
        "--data.dataset digits --data.augmentation weak --data.batch_size 128 --trainer.epochs 3 "
        "--trainer.threads 1 --evaluate false --trainer.cpu true --model.backbone vit_tiny_patch16_224 "
        "--loss.gather true --loss.learnable_temperature true --trainer.checkpoint_steps 2 "
        "--optimizer.learning_rate 0.01"
    )
    return [TRAIN, *fixed.split(), "--model.timm_args", VIT, "--output_dir", str(folder), *more]


def start(command: list[str], folder: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, cwd=folder, env={**ENVIRONMENT, **environment}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> str:
    try:
        said, _ = process.communicate(timeout=240)
    finally:
        process.kill()
    return said


def workers(launcher: int) -> dict[int, int]:
    """Rank -> number of the processes that a launcher has started."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((place / "stat").read_text().rpartition(")")[2].split()[1])
            variables = (place / "environ").read_bytes().split(b"\0")
        except (OSError, ValueError):
            continue
        ranks = [int(entry[5:]) for entry in variables if entry.startswith(b"RANK=")]
        if parent == launcher and ranks:
            found[ranks[0]] = int(place.name)
    return found


def equal_to_the_bit(one: Path, other: Path) -> None:
    first, second = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert all(torch.equal(first[name], value) for name, value in second.items())
    losses = [[line["loss"] for line in read_log(run / "log.jsonl")] for run in (one, other)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 30


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two processes that torchrun started."""
    folder = tmp_path_factory.mktemp("undisturbed")
    command = [*TORCHRUN, "--standalone", "--nproc_per_node", "2", *arguments(folder / "run")]
    process = start(command, folder)
    said = finish(process)
    assert process.returncode == 0, said
    return folder / "run"


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds torchrun's processes in /proc")
def test_torchrun_starts_again(undisturbed: Path, tmp_path: Path) -> None:
    """After the death of the main process, which writes log and checkpoints."""
    folder = tmp_path / "run"
    command = [*TORCHRUN, "--standalone", "--nproc_per_node", "2", "--max-restarts", "2"]
    process = start([*command, *arguments(folder)], tmp_path)
    killer = after_log_lines(folder, 7, lambda: os.kill(workers(process.pid)[0], signal.SIGKILL))
    said = finish(process)
    killer.join(timeout=1)
    assert process.returncode == 0, said
    assert said.count("train.py: starting") == 2
    assert "resuming from " in said
    assert len(read_log(folder / "log.jsonl")) == 30
    equal_to_the_bit(folder, undisturbed)


def test_torchrun_passes_sigterm_on(undisturbed: Path, tmp_path: Path) -> None:
    """As when a cluster ends a job: the processes save and stop; the next job resumes."""
    folder = tmp_path / "run"
    command = [*TORCHRUN, "--standalone", "--nproc_per_node", "2"]
    process = start([*command, *arguments(folder)], tmp_path)
    stopper = after_log_lines(folder, 5, lambda: process.send_signal(signal.SIGTERM))
    said = finish(process)
    stopper.join(timeout=1)
    assert process.returncode != 0
    assert "train.py: stopped by SIGTERM after step" in said
    steps = len(read_log(folder / "log.jsonl"))
    assert 5 <= steps < 30
    assert read_manifest(checkpoints(folder)[-1])["step"] == steps
    again = start([*command, *arguments(folder, "--resume_from_checkpoint", "latest")], tmp_path)
    said = finish(again)
    assert again.returncode == 0, said
    equal_to_the_bit(folder, undisturbed)


def test_ctrl_c_under_torchrun(tmp_path: Path) -> None:
    """The terminal sends SIGINT to all processes, and torchrun sends a second one: it must not end them."""
    folder = tmp_path / "run"
    command = [*TORCHRUN, "--standalone", "--nproc_per_node", "2", *arguments(folder)]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    stopper = after_log_lines(folder, 3, lambda: os.killpg(process.pid, signal.SIGINT))
    said = finish(process)
    stopper.join(timeout=1)
    assert "train.py: stopped by Ctrl-C (SIGINT) after step" in said
    steps = len(read_log(folder / "log.jsonl"))
    assert 3 <= steps < 30
    assert read_manifest(checkpoints(folder)[-1])["step"] == steps


def test_the_readme_starts_two_cpu_processes(tmp_path: Path) -> None:
    """The line as it stands in the README, which does not name trainer.cpu."""
    text = (REPOSITORY / "pysupcon" / "trainer" / "README.md").read_text(encoding="utf-8")
    (line,) = (line.split() for line in text.splitlines() if line.startswith("    torchrun --standalone"))
    folder = tmp_path / "run"
    more = ["--output_dir", str(folder), "--evaluate", "false", "--trainer.epochs", "1"]
    process = start([*TORCHRUN, *line[1:], *more], REPOSITORY, CUDA_VISIBLE_DEVICES="")
    said = finish(process)
    assert process.returncode == 0, said
    assert len(read_log(folder / "log.jsonl")) == 10  # 1,295 training images in global batches of 128


def test_accelerate_launch(tmp_path: Path) -> None:
    """One process, stopped by its time budget."""
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu"]
    more = ("--trainer.time_budget", "1e-6")
    process = start([*command, "--num_processes", "1", *arguments(folder, *more)], tmp_path)
    said = finish(process)
    assert f"exit status {EX_TEMPFAIL}" in said
    assert "stopped by the end of its 1e-06 minutes (trainer.time_budget) after step 1 of 30" in said


@dataclass
class Machine:
    """A simulated machine: prefix of its commands, its address and network interface."""

    prefix: list[str] = field(default_factory=list)
    address: str = "127.0.0.1"
    interface: str = "lo"


@pytest.fixture(scope="module")
def namespaces() -> Iterator[list[Machine] | str]:
    """Two network namespaces, joined by a virtual Ethernet pair, without a common address; or the reason why
    they cannot be created."""
    ip = shutil.which("ip")
    if ip is None or os.geteuid() != 0:
        yield "network namespaces need root and iproute2"
        return
    names = [f"psc{os.getpid() % 100_000}{end}" for end in "ab"]
    commands = [f"netns add {names[0]}", f"netns add {names[1]}"]
    commands += [f"link add v{names[0]} netns {names[0]} type veth peer name v{names[1]} netns {names[1]}"]
    for number, name in enumerate(names, start=1):
        commands += [f"-n {name} addr add 10.213.77.{number}/24 dev v{name}"]
        commands += [f"-n {name} link set v{name} up", f"-n {name} link set lo up"]
    trouble = None
    try:
        for command in commands:
            done = subprocess.run([ip, *command.split()], capture_output=True, text=True)
            if done.returncode != 0:
                trouble = f"network namespaces cannot be made here: ip {command}: {done.stderr.strip()}"
                break
        yield trouble or [
            Machine([ip, "netns", "exec", name], f"10.213.77.{number}", f"v{name}")
            for number, name in enumerate(names, start=1)
        ]
    finally:
        for name in names:
            subprocess.run([ip, "netns", "delete", name], capture_output=True)


@pytest.fixture(params=["network namespaces", "loopback"])
def machines(request: pytest.FixtureRequest, namespaces: list[Machine] | str) -> list[Machine]:
    """Two network namespaces, or loopback if they cannot be created."""
    if request.param == "loopback":
        if not isinstance(namespaces, str):
            pytest.skip("runs where network namespaces cannot be made")
        return [Machine(), Machine()]
    if isinstance(namespaces, str):
        pytest.skip(namespaces)
    return namespaces


def test_two_machines(undisturbed: Path, tmp_path: Path, machines: list[Machine]) -> None:
    """Each machine has its own launcher and folder; the result equals that of two processes on one machine.

    They stop after a few steps and resume from the checkpoint, which only the first machine has.
    """
    folders = [tmp_path / name / "run" for name in "ab"]
    port = free_port()

    def launch(*more: str) -> list[tuple[int, str]]:
        processes = []
        for rank, (machine, folder) in enumerate(zip(machines, folders, strict=True)):
            folder.parent.mkdir(exist_ok=True)
            command = [*TORCHRUN, "--nnodes", "2", "--nproc_per_node", "1", "--node_rank", str(rank)]
            command += ["--master_addr", machines[0].address, "--master_port", str(port)]
            script = arguments(folder, *more)
            processes.append(
                start(
                    [*machine.prefix, *command, *script], folder.parent, GLOO_SOCKET_IFNAME=machine.interface
                )
            )
        said = [finish(process) for process in processes]
        return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]

    (_, said), _ = launch("--trainer.time_budget", "1e-6")
    assert "stopped by the end of its 1e-06 minutes (trainer.time_budget) after step 1 of 30" in said
    done = launch("--resume_from_checkpoint", "latest")
    assert [status for status, _ in done] == [0, 0], done
    assert "resuming from " in done[0][1]
    assert "resuming from " not in done[1][1]
    assert not (folders[1] / "checkpoints").exists()
    assert not (folders[1] / "log.jsonl").exists()
    equal_to_the_bit(folders[0], undisturbed)
