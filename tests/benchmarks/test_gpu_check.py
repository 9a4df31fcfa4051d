"""benchmarks/gpu/gpu_check.py without a GPU: its steps, and its results when steps fail, hang, leave
processes behind or are interrupted."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.stubborn_processes import STUBBORN_CHILDREN, is_running, printed_pids

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "csrc")]

from find_cuda import Toolkit  # noqa: E402

from benchmarks import table  # noqa: E402
from benchmarks.gpu import counters, gpu_check, gpu_driver, gpu_steps  # noqa: E402
from benchmarks.gpu.gpu_steps import Step, Tools  # noqa: E402

PYTHON = sys.executable
TOOLS = Tools("nvcc", "compute-sanitizer", "ncu")
MACHINE = {"gpu": "Fake", "arch": "90", "driver": "1.2", "commit": "abc", "versions": {"torch": "2.11.0"}}
TOOLKIT = Toolkit("/usr/bin/nvcc", "13.0", ["-isystem=/elsewhere/include"], Path("/elsewhere/lib"))


def fake_toolkit(top: Path, fails: str = "") -> Toolkit:
    """An nvcc that writes its command into its target. ``fails``: shell commands that run before."""
    nvcc = top / "bin" / "nvcc"
    (top / "lib64").mkdir()
    (top / "lib64" / "libcudart_static.a").touch()
    nvcc.parent.mkdir()
    nvcc.write_text(
        "#!/bin/sh\n"
        'if [ "$1" = --version ]; then echo "Cuda compilation tools, release 13.0, V13.0.88"; exit; fi\n'
        f'if [ "$1" = --dryrun ]; then echo "#\\$ TOP={top}" >&2; exit; fi\n'
        f'{fails}\nfor last; do :; done\necho "$@" > "$last"\n'
    )
    nvcc.chmod(0o755)
    return Toolkit(str(nvcc), "13.0", [], top / "lib64")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to check")
def test_says_why_there_is_nothing_to_check() -> None:
    done = subprocess.run(
        [PYTHON, "benchmarks/gpu/gpu_check.py"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert "nothing can be checked here: torch sees no CUDA device" in done.stderr


def test_obstacles() -> None:
    assert gpu_check.unsupported_reason("2.11.0+cu130", True) is None
    assert "torch 2.11 or newer is needed, this is 2.10.1" in str(
        gpu_check.unsupported_reason("2.10.1", True)
    )
    assert gpu_check.unsupported_reason("2.12.0", False) == "torch sees no CUDA device"


def test_a_missing_nvcc_is_explained(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_check, "describe_machine", lambda log: (dict(MACHINE), ""))
    monkeypatch.setenv("NVCC", str(tmp_path / "gone"))
    assert gpu_check.main(["--json", str(tmp_path / "r.json")]) == 2
    assert (
        f"nothing can be checked here: NVCC={tmp_path / 'gone'} is not a program" in capsys.readouterr().err
    )


def test_the_programs_beside_nvcc_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """compute-sanitizer is found in a toolkit that only NVCC names."""
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setattr(gpu_check, "HOMES", ())
    toolkit = fake_toolkit(tmp_path)
    assert gpu_check.find_tools(toolkit).nvcc == toolkit.nvcc
    if gpu_check.find_tools(toolkit).sanitizer is None:  # unless this machine has another one
        sanitizer = tmp_path / "bin" / "compute-sanitizer"
        sanitizer.write_text("")
        sanitizer.chmod(0o755)
        assert gpu_check.find_tools(toolkit).sanitizer == str(sanitizer)


def test_numbers_name_the_device_and_its_driver() -> None:
    about = {"device": "cuda", "gpu": "X", "driver": "580.1", "cuda": "13.0", "commit": "abc", "load": 0.1}
    heading = table.heading({**about, "versions": {"torch": "2.11.0"}})
    assert heading == "X, driver 580.1, CUDA 13.0; torch 2.11.0; commit abc; load 0.1"


def test_results_are_named_after_the_device() -> None:
    assert gpu_check.file_name("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3.json"


def test_the_drivers_are_made_of_every_kernel_source(tmp_path: Path) -> None:
    compile_, links = gpu_driver.commands(TOOLKIT, "90", tmp_path)
    kernels = {p.name for p in (ROOT / "csrc" / "cuda").glob("*.cu")}
    assert all(Path(command[-3]).is_file() for command in compile_)
    objects = {Path(command[-3]).name: command[-1] for command in compile_}
    assert set(objects) == kernels | {"emulate.cpp", "broken.cpp"}
    for link, program, source in zip(links, ("driver", "broken"), ("emulate.cpp", "broken.cpp"), strict=True):
        assert set(objects.values()) & set(link) == {objects[name] for name in kernels | {source}}
        assert link[-1] == str(tmp_path / program)
        assert "-L/elsewhere/lib" in link
    assert {command[0] for command in [*compile_, *links]} == {TOOLKIT.nvcc}
    assert all("-isystem=/elsewhere/include" in command for command in compile_)


@pytest.mark.parametrize("broken", [False, True])
def test_the_drivers_are_built_by_whatever_nvcc_is_named(tmp_path: Path, broken: bool) -> None:
    """A compiler that writes its target, and one that does not compile one of the sources."""
    fails = 'case "$*" in *emulate.cpp*) echo "no such intrinsic"; exit 3;; esac' if broken else ""
    toolkit = fake_toolkit(tmp_path, fails)
    done = subprocess.run(
        [PYTHON, "benchmarks/gpu/gpu_driver.py", "90", str(tmp_path / "out")],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NVCC": toolkit.nvcc},
    )  # fmt: skip
    assert done.returncode == int(broken)
    assert (tmp_path / "out" / "driver").exists() is not broken
    assert (tmp_path / "out" / "broken").exists() is not broken
    assert ("no such intrinsic" in done.stdout) is broken


@pytest.mark.parametrize("minutes", [8.0, 25.0])
def test_the_limits_are_what_is_promised(tmp_path: Path, minutes: float) -> None:
    plan = gpu_steps.stages(TOOLS, "90", tmp_path, minutes)
    wanted = sum(max(step.seconds for step in stage) for stage in plan)
    assert wanted <= 60 * minutes - 15  # what this script itself takes
    assert sum(gpu_steps.limits(plan, 60 * minutes)) == pytest.approx(wanted)
    assert sum(gpu_steps.limits(plan, 100)) == pytest.approx(100)


def test_every_step_names_things_that_exist(tmp_path: Path) -> None:
    from benchmarks.kernels.cases import build_cases
    from benchmarks.kernels.run import parser

    steps = [step for stage in gpu_steps.stages(TOOLS, "90", tmp_path, 25) for step in stage]
    names = [step.name for step in steps]
    assert len(set(names)) == len(names)
    # Measurements start as soon as the extension is built and the kernels have passed a first check.
    assert names[2:4] == ["quick look at the kernels", "measurements: ours"]
    for step in steps:
        assert step.needs in ("", "driver", "extension")
        assert not step.needs or f"build the {step.needs}" in names
        for word in step.command:
            if word.startswith(("tests/", "benchmarks/", "configs/", "pysupcon/")):
                assert (ROOT / word).exists()
        if "benchmarks/kernels/run.py" in step.command:
            options = parser().parse_args(list(step.command[2:]))
            assert options.device == "cuda"
            assert set(options.cases) <= set(build_cases("cuda"))
            assert options.json == step.result
    results = [step.result for step in steps if step.result]
    assert len(set(results)) == len(results)
    # torch.compile of a loss takes longest, so only few sizes are measured.
    compiled = [s for s in steps if "compiled" in s.command]
    sizes = [s.command[s.command.index("--sizes") + 1 :] for s in compiled]
    assert sizes == [["16384"], ["1024", "65536"]]


def test_steps_can_be_chosen(tmp_path: Path) -> None:
    plan = gpu_steps.stages(TOOLS, "90", tmp_path, 25)
    assert gpu_steps.select_steps(plan, []) == plan
    names = [
        [step.name for step in stage] for stage in gpu_steps.select_steps(plan, ["launches", "memcheck"])
    ]
    assert names == [
        ["build the extension", "build the driver"],
        ["compute-sanitizer memcheck"],
        ["compute-sanitizer memcheck of broken operands"],
        ["launches a step"],
    ]


def test_shapes_of_the_broken_operands_exist() -> None:
    shapes = (ROOT / "tests/cuda/cuda_emulation/broken.cpp").read_text()
    for name in gpu_steps.SANITIZED_BROKEN:
        assert f'{{"{name}", Dtype' in shapes


def test_cases_of_the_driver_exist() -> None:
    cases = (ROOT / "tests/cuda/cuda_emulation/cases.h").read_text()
    for prefix in (*gpu_steps.SANITIZED, *gpu_steps.QUICK_CASES):
        kind, name = prefix.split("-", 1)
        assert f'{{"{kind}", Dtype' in cases
        assert f'add("{name}' in cases or f'"{name.removesuffix("300")}" + std::to_string(rows)' in cases
    formats = set(re.findall(r'\{"(\w+)", Dtype', cases))
    assert formats == set(gpu_steps.FORMATS)


def test_groups_of_tests_hold_every_test() -> None:
    """The last group has all tests that no other group has; every other group must match a test."""
    text = (ROOT / "tests/cuda/test_cuda_gpu.py").read_text()
    names = re.findall(r"^def (test_\w+)", text, re.MULTILINE)
    for words in gpu_steps.TESTS.values():
        plain = [w for w in re.split(r" or | and ", words) if not w.startswith("torch.")]
        for word in plain:
            assert any(word in name for name in names), word
    *_, rest = [s for stage in gpu_steps.stages(TOOLS, "90", ROOT, 8) for s in stage if "-k" in s.command]
    expression = rest.command[rest.command.index("-k") + 1]
    assert all(f"({words})" in expression for words in gpu_steps.TESTS.values())


def test_missing_tools_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_steps, "TRAINING", ("torch", "no_such_package"))
    steps = [s for stage in gpu_steps.stages(Tools("nvcc", None, None), "90", tmp_path, 25) for s in stage]
    missing = {step.name: step.missing for step in steps if step.missing}
    assert missing["compute-sanitizer memcheck"] == "compute-sanitizer is not installed"
    assert sum(word == "ncu is not installed" for word in missing.values()) == 3
    assert missing["train the digits recipe"] == "not installed: no_such_package; see benchmarks/wheels.py"
    assert len(missing) == 7


# --- steps and their record


def _step(name: str, program: str, **more: Any) -> Step:
    return Step(name, [PYTHON, "-u", "-c", program], more.pop("seconds", 3.0), **more)


def _check(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, plan: list[list[Step]], minutes: float
) -> tuple[int, dict[str, Any]]:
    """Exit status and JSON of a check with these steps."""
    monkeypatch.setattr(gpu_check, "describe_machine", lambda log: (dict(MACHINE), ""))
    monkeypatch.setattr(gpu_check, "find_cuda", lambda: (TOOLKIT, "nvcc 13.0"))
    monkeypatch.setattr(gpu_check, "stages", lambda *_: plan)
    path = tmp_path / "r.json"
    status = gpu_check.main(["--minutes", str(minutes), "--json", str(path)])
    return status, json.loads(path.read_text(encoding="utf-8"))


def _writes(path: Path, rows: list[dict[str, Any]], then: str = "") -> str:
    return f"import json, time; open({str(path)!r}, 'w').write(json.dumps({{'rows': {rows}}})); {then}"


def test_a_step_that_fails_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    a, b = {"case": "speed", "n": 1, "both_s": 2.0}, {"case": "speed", "n": 2, "both_s": 3.0}
    longer = {"case": "speed", "n": 1, "both_s": 1.5}
    plan = [
        [_step("build the extension", "print('built')"), _step("build the driver", "raise SystemExit(1)")],
        [_step("quick look at the kernels", "", needs="driver")],
        [
            _step(
                "measurements: ours", _writes(first, [a, b], "time.sleep(60)"), needs="extension",
                result=first, stored_as="rows", seconds=6.0,
            )
        ],
        [_step("tests", "raise SystemExit('assertion failed')", needs="extension")],
        [_step("compute-sanitizer", "", missing="compute-sanitizer is not installed")],
        [
            _step(
                "measurements: more", _writes(second, [longer]), needs="extension", result=second,
                stored_as="rows",
            )
        ],
    ]  # fmt: skip
    second.write_text('{"rows": [{"case": "stale"}]}')
    status, stored = _check(monkeypatch, tmp_path, plan, 0.3)
    assert status == 1
    assert stored["machine"]["driver"] == "1.2"
    assert stored["machine"]["commit"] == "abc"
    verdicts = {step["name"]: (step["verdict"], step["reason"]) for step in stored["steps"]}
    assert verdicts["build the extension"] == ("passed", "")
    assert verdicts["build the driver"] == ("FAILED", "exit status 1")
    assert verdicts["quick look at the kernels"] == ("FAILED", "not started: the driver was not built")
    assert verdicts["compute-sanitizer"][0] == "skipped"
    assert verdicts["measurements: ours"][1].startswith("timed out after")
    assert verdicts["tests"] == ("FAILED", "exit status 1")
    assert verdicts["measurements: more"] == ("passed", "")
    assert stored["rows"] == [b, longer]
    assert "assertion failed" in next(s["tail"] for s in stored["steps"] if s["name"] == "tests")
    printed = capsys.readouterr().out
    assert "FAILED" in printed
    assert "Fake, driver 1.2, torch 2.11.0, commit abc" in printed


def test_a_word_that_names_no_step_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Otherwise only the builds would run and pass: "pairs" is a step of the long form."""
    machine = {"arch": "90", "gpu": "none", "driver": "1", "commit": "x", "versions": {"torch": "2.11.0"}}
    monkeypatch.setattr(gpu_check, "describe_machine", lambda log: (dict(machine), ""))
    toolkit = gpu_check.Toolkit("/usr/bin/nvcc", "13.0", [], Path("/usr/lib"))
    monkeypatch.setattr(gpu_check, "find_cuda", lambda: (toolkit, "nvcc 13.0"))
    result = tmp_path / "result.json"
    arguments = ["--minutes", "8", "--json", str(result), "--steps", "launches", "pairs", "quick"]
    assert gpu_check.main(arguments) == 2
    assert "no step of 8 minutes is named launches, pairs;" in capsys.readouterr().err
    assert not result.exists()


def test_time_that_is_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A first step that uses all of its time leaves the reserved time to the others."""
    plan = [[_step("slow", "import time; time.sleep(60)", seconds=3.0)], [_step("quick", "", seconds=3.0)]]
    _, stored = _check(monkeypatch, tmp_path, plan, 0.1)
    assert [step["verdict"] for step in stored["steps"]] == ["FAILED", "passed"]
    assert stored["steps"][0]["seconds"] < 3.5


INTERRUPTED = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from benchmarks.gpu import gpu_check
from benchmarks.gpu.gpu_steps import Step
machine = dict(gpu="Fake", arch="90", driver="1.2", commit="abc", versions=dict(torch="2.11.0"))
gpu_check.describe_machine = lambda log: (machine, "")
gpu_check.find_cuda = lambda: (gpu_check.Toolkit("nvcc", "13.0", [], Path("lib")), "nvcc 13.0")
result = Path({result!r})
gpu_check.stages = lambda *_: [
    [Step("build", [sys.executable, "-c", "print('built')"], 100)],
    [Step("measurements", [sys.executable, "-u", "-c", {program!r}], 100, result=result, stored_as="rows")],
    [Step("never", [sys.executable, "-c", ""], 100)],
]
sys.exit(gpu_check.main(["--minutes", "8", "--json", {path!r}]))
"""


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_leaves_the_numbers_and_no_process(tmp_path: Path, number: signal.Signals) -> None:
    result, path = tmp_path / "rows.json", tmp_path / "r.json"
    program = _writes(result, [{"case": "speed", "both_s": 1.0}]) + STUBBORN_CHILDREN + "time.sleep(600)"
    text = INTERRUPTED.format(root=str(ROOT), result=str(result), program=program, path=str(path))
    check = subprocess.Popen(
        [PYTHON, "-u", "-c", text], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert check.stdout is not None
    printed = ""
    while len(printed_pids(printed)) < 2:
        line = check.stdout.readline()
        assert line, printed
        printed += line
    before = json.loads(path.read_text(encoding="utf-8"))
    assert [(step["name"], step["verdict"]) for step in before["steps"]] == [("build", "passed")]
    os.kill(check.pid, number)
    rest, _ = check.communicate(timeout=60)
    assert check.returncode == 130
    assert f"gpu-check: interrupted ({number.name})" in rest
    stored = json.loads(path.read_text(encoding="utf-8"))
    assert stored["rows"] == [{"case": "speed", "both_s": 1.0}]
    assert [(step["name"], step["reason"]) for step in stored["steps"]][1:] == [
        ("measurements", "interrupted")
    ]
    assert not [pid for pid in printed_pids(printed) if is_running(pid)]


# --- counters

_NAMES = (
    "ID", "Process ID", "Kernel Name", "Block Size", "Grid Size", "Device", "CC",
    "launch__registers_per_thread", "sm__inst_executed_pipe_xu.sum", "gpu__time_duration.sum",
    "smsp__cycles_active.avg",
)  # fmt: skip
_LINES = (
    ("", "", "", "", "", "", "", "register/thread", "inst", "us", "cycle"),
    (
        "0",
        "7",
        "forward_resident",
        "(256, 1, 1)",
        "(512, 1, 1)",
        "0",
        "9.0",
        "232",
        "1,234,567",
        "2900.5",
        "5",
    ),
    ("1", "7", "backward_resident", "(256, 1, 1)", "(512, 1, 1)", "0", "9.0", "224", "n/a", "6500", "5"),
)
#: What ncu writes with --csv --page raw.
NCU = "\n".join(
    [
        "==PROF== Connected to process 7",
        '==PROF== Profiling "forward_resident": 0%....50%....100% - 31 passes',
        *(",".join(f'"{cell}"' for cell in line) for line in (_NAMES, *_LINES)),
    ]
)


def test_the_hot_kernels_are_profiled() -> None:
    """ncu's pattern matches exactly the kernels that compute pairs on tensor cores."""
    words, pattern = counters.KERNELS.split(":")
    assert words == "regex"
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "csrc" / "cuda").glob("*.cuh")):
        signature = r"__global__ void (?:__launch_bounds__\([^)]*\)\s*)?(\w+)\("
        found[path.name] = re.findall(signature, path.read_text())
    files = ("forward.cuh", "triangular.cuh", "backward.cuh")
    hot = [name for file in files for name in found.pop(file)]
    assert len(hot) >= 5
    assert [name for name in hot if not re.search(pattern, name)] == []
    others = [name for names in found.values() for name in names]
    assert len(others) >= 6
    assert [name for name in others if re.search(pattern, name)] == []


def test_counters_are_read_from_the_raw_page() -> None:
    forward, backward = counters.parse(NCU)
    assert forward["Kernel Name"] == "forward_resident"
    assert forward["launch__registers_per_thread [register/thread]"] == 232
    assert forward["sm__inst_executed_pipe_xu.sum [inst]"] == 1_234_567
    assert forward["gpu__time_duration.sum [us]"] == 2900.5
    assert not [name for name in forward if "cycles_active" in name]
    assert backward["sm__inst_executed_pipe_xu.sum [inst]"] == "n/a"
    assert counters.parse("==ERROR== ERR_NVGPUCTRPERM - no permission") == []
    assert counters.parse(NCU.split('"0","7"')[0]) == []


def test_counters_are_stored_and_their_absence_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    log = tmp_path / "ncu.csv"
    ncu = tmp_path / "ncu"
    for text, verdict in ((NCU, "passed"), ("==ERROR== ERR_NVGPUCTRPERM", "FAILED")):
        (tmp_path / "text").write_text(text)
        ncu.write_text(
            f'#!/bin/sh\nwhile [ "$1" != --log-file ]; do shift; done\ncp {tmp_path / "text"} "$2"\n'
        )
        ncu.chmod(0o755)
        command = counters.command(str(ncu), log, [PYTHON, "-c", ""], kernels=2)
        step = Step("counters", command, 9, result=log, stored_as="counters")
        _, stored = _check(monkeypatch, tmp_path, [[step]], 1)
        assert stored["steps"][0]["verdict"] == verdict
        names = [(row["step"], row["Kernel Name"]) for row in stored["counters"]]
        wanted = [("counters", "forward_resident"), ("counters", "backward_resident")]
        assert names == (wanted if verdict == "passed" else [])
