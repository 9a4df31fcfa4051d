"""Environment variables that Accelerate reads: each one is used, refused by name, or harmless."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import launch as launchers

from pysupcon.config import Config, load_config, parse_args
from pysupcon.errors import ConfigError
from pysupcon.trainer import environment, loop, setup
from pysupcon.trainer.variables import VARIABLES, lookup

READERS = ("parse_flag_from_env", "parse_choice_from_env", "get_int_from_env", "getenv")
FOREIGN = (
    "KMP_AFFINITY", "KMP_BLOCKTIME", "CUDA_VISIBLE_DEVICES", "PYTHONPATH",
)  # fmt: skip
"""Variables that launchers set for other software than Accelerate."""


@pytest.fixture(autouse=True)
def _afresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Removes Accelerate's variables and resets its singletons."""
    for name in list(os.environ):
        if name.startswith("ACCELERATE_") or name in environment.PROCESSES:
            monkeypatch.delenv(name)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def config(*args: str, output_dir: Path | None = None) -> Config:
    fixed = "--data.dataset digits --data.augmentation weak --data.batch_size 128 --model.width 8"
    fixed += " --trainer.epochs 1 --trainer.threads 1 --evaluate false"
    where = [] if output_dir is None else ["--output_dir", str(output_dir)]
    made = parse_args([*fixed.split(), *where, *args])[0]
    made.resolve()
    return made


# --- the table is complete


class Reads(ast.NodeVisitor):
    """Names of the environment variables that a module reads or writes, and the expressions that are not
    names. Prefixes that the function assigns are substituted."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.unclear: set[str] = set()
        self.prefixes: dict[str, str] = {}

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        outer = self.prefixes
        assigned = (each for each in ast.walk(node) if isinstance(each, ast.Assign))
        self.prefixes = outer | {
            target.id: each.value.value
            for each in assigned
            for target in each.targets
            if isinstance(target, ast.Name)
            and isinstance(each.value, ast.Constant)
            and isinstance(each.value.value, str)
        }
        self.generic_visit(node)
        self.prefixes = outer

    def visit_Call(self, node: ast.Call) -> None:
        function = node.func
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", None)
        of_environ = isinstance(function, ast.Attribute) and ast.unparse(function.value) == "os.environ"
        if node.args and (name in READERS or (of_environ and name in ("get", "pop", "setdefault"))):
            self._add(node.args[0])
        self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        if ast.unparse(node.value) == "os.environ":
            self._add(node.slice)
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        if ast.unparse(node.comparators[-1]).startswith("os.environ"):
            self._add(node.left)
        self.generic_visit(node)

    def _add(self, key: ast.expr) -> None:
        for each in key.elts if isinstance(key, ast.List | ast.Tuple) else [key]:
            if isinstance(each, ast.Constant):
                self.names.add(str(each.value))
            elif isinstance(each, ast.BinOp) and isinstance(each.left, ast.Name):
                assert isinstance(each.right, ast.Constant)
                prefix = self.prefixes.get(each.left.id)
                self.names.add(f"{prefix}{each.right.value}") if prefix else self.unclear.add(
                    ast.unparse(key)
                )
            else:
                self.unclear.add(ast.unparse(each))


def test_every_variable_that_accelerate_reads_is_in_the_table() -> None:
    """Fails if a new version of Accelerate reads more variables: try them and add them to the table."""
    root, reads = Path(accelerate.__file__).parent, Reads()
    files = [path for path in root.rglob("*.py") if "test_utils" not in path.parts]
    for path in files:
        reads.visit(ast.parse(path.read_text(encoding="utf-8")))
    assert len(files) > 50
    assert {"ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_BACKEND", "FSDP_VERSION"} <= reads.names
    assert {name for name in reads.names if lookup(name) is None} == set()
    # Arguments of the reading functions: their callers are covered above.
    assert reads.unclear <= {"e", "key", "env_var_name", "env_var", "self.cpu_ram_efficient_loading"}


@pytest.mark.parametrize(
    "flags",
    [
        "--cpu --debug --mixed_precision bf16 --dynamo_backend inductor --dynamo_use_dynamic --gpu_ids 0",
        "--multi_gpu --num_processes 2 --debug --enable_cpu_affinity --mixed_precision fp16 --gpu_ids 0,1",
        "--use_fsdp --num_processes 2 --fsdp_version 2 --use_parallelism_config "
        "--parallelism_config_cp_size 2 --parallelism_config_sp_size 2",
        "--use_megatron_lm --num_processes 2 --megatron_lm_num_micro_batches 2",
        "--use_deepspeed --num_processes 2 --zero_stage 2 --gradient_accumulation_steps 4 "
        "--gradient_clipping 1 --offload_optimizer_device cpu --deepspeed_moe_layer_cls_names x",
    ],
)  # fmt: skip
def test_every_variable_that_the_launcher_sets_is_in_the_table(
    flags: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launchers, "is_port_in_use", lambda port: False)
    args = launch_command_parser().parse_args([*flags.split(), "train.py"])
    args.use_cpu, args.num_machines, args.num_cpu_threads_per_process = args.cpu, 1, 1
    args.mixed_precision, args.dynamo_backend = args.mixed_precision or "no", args.dynamo_backend or "no"
    args.main_process_port, args.deepspeed_fields_from_accelerate_config = 29123, ""
    if args.use_deepspeed:
        after = launchers.prepare_deepspeed_cmd_env(args)[1]
    elif args.cpu:
        after = launchers.prepare_simple_launcher_cmd_env(args)[1]
    else:
        after = launchers.prepare_multi_gpu_env(args)
    names = {name for name, value in after.items() if os.environ.get(name) != value}
    assert "ACCELERATE_MIXED_PRECISION" in names
    assert {name for name in names if lookup(name) is None and name not in FOREIGN} == set()


def test_every_entry_says_why() -> None:
    assert {variable.kind for variable in VARIABLES.values()} == {"honoured", "refused", "harmless"}
    assert all(variable.text for variable in VARIABLES.values())
    assert lookup("ACCELERATE_FP8_MARGIN") is VARIABLES["ACCELERATE_FP8_*"]
    assert lookup("ACCELERATE_FP8_BACKEND") is VARIABLES["ACCELERATE_FP8_BACKEND"]
    assert lookup("PATH") is None


# --- refused by name, before any file is written


REFUSED = [name for name, variable in VARIABLES.items() if variable.kind == "refused"]


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_named(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(name, "TE" if name.endswith("FP8_BACKEND") else "true")
    with pytest.raises(ConfigError, match=f"^{name}=(true|TE) is not supported: "):
        loop.train(config("--trainer.cpu", "true", output_dir=tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv(name, "NO" if name.endswith("FP8_BACKEND") else "false")
    environment.apply_environment(config())


DYNAMO = "ACCELERATE_DYNAMO_"
WRONG: list[tuple[dict[str, str], str, str]] = [
    ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "", r"ACCELERATE_MIXED_PRECISION=fp8 is not supported"),
    ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "--trainer.mixed_precision no", "contradicts trainer.mixed"),
    ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "--trainer.mixed_precision bf16", "MIXED_PRECISION=fp16 con"),
    ({"ACCELERATE_USE_CPU": "perhaps"}, "", "ACCELERATE_USE_CPU must be true or false, got 'perhaps'"),
    ({"ACCELERATE_TORCH_DEVICE": "meta"}, "", "ACCELERATE_TORCH_DEVICE=meta must be a "),
    ({"ACCELERATE_TORCH_DEVICE": "abacus"}, "", "ACCELERATE_TORCH_DEVICE=abacus is not a device"),
    ({"ACCELERATE_TORCH_DEVICE": "cuda"}, "--trainer.cpu true", "=cuda must be a cpu device on this"),
    ({"ACCELERATE_TORCH_DEVICE": "cpu", "WORLD_SIZE": "2"}, "", "the same device to every process"),
    ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "", r"STEPS=4 does not agree with .*_steps=1"),
    ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "x"}, "", "ACCUMULATION_STEPS=x does not"),
    ({"ACCELERATE_GRADIENT_CLIPPING": "1.0"}, "", "CLIPPING=1.0 does not agree with .*=None"),
    ({"ACCELERATE_GRADIENT_CLIPPING": "none"}, "--trainer.clip_norm 2", "=none does not agree with .*=2.0"),
    ({DYNAMO + "BACKEND": "tensorrt"}, "", "BACKEND=tensorrt is not supported: .* inductor$"),
    ({DYNAMO + "BACKEND": "eager"}, "--trainer.compile true", "=eager contradicts trainer.compile=true"),
    ({DYNAMO + "BACKEND": "inductor", DYNAMO + "MODE": "fast"}, "", "DYNAMO_MODE=fast is unknown"),
    ({DYNAMO + "BACKEND": "eager", DYNAMO + "MODE": "max-autotune"}, "", "=max-autotune has no effect with"),
    ({DYNAMO + "MODE": "max-autotune"}, "", "ACCELERATE_DYNAMO_MODE=max-autotune has no effect"),
    ({DYNAMO + "USE_FULLGRAPH": "true"}, "", "USE_FULLGRAPH has no effect without ACCELERATE_DYNAMO_BACKEND"),
    ({DYNAMO + "USE_DYNAMIC": "1"}, "", "USE_DYNAMIC has no effect without ACCELERATE_DYNAMO_BACKEND"),
    (
        {DYNAMO + "BACKEND": "inductor", DYNAMO + "MODE": "reduce-overhead"},
        "--trainer.chunk_size 8",
        "MODE=reduce-overhead uses CUDA graphs, which do not work with trainer.chunk_size",
    ),
    (
        {DYNAMO + "BACKEND": "inductor", DYNAMO + "MODE": "max-autotune"},
        "--trainer.accumulation_steps 2",
        "MODE=max-autotune uses CUDA graphs, which do not work with trainer.accumulation_steps",
    ),
    (
        {DYNAMO + "BACKEND": "eager", DYNAMO + "USE_REGIONAL_COMPILATION": "true"},
        "--model.spectral_norm true",
        "USE_REGIONAL_COMPILATION does not work with model.spectral_norm",
    ),
    (
        {DYNAMO + "BACKEND": "eager", DYNAMO + "USE_FULLGRAPH": "true", "WORLD_SIZE": "2"},
        "",
        "USE_FULLGRAPH does not work with several processes",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("variables", "args", "message"), WRONG)
def test_what_does_not_fit_is_named(
    variables: dict[str, str], args: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        environment.apply_environment(config(*args.split()))


def test_an_installed_torch_xla_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "is_torch_xla_available", lambda: True)
    with pytest.raises(ConfigError, match="XLA devices are not supported: set USE_TORCH_XLA=0"):
        environment.apply_environment(config())


def test_half_precision_is_not_for_cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate would silently train in float32."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ConfigError, match="mixed_precision=fp16 does not work on cpu"):
        loop.train(config("--trainer.cpu", "true", output_dir=tmp_path))


@pytest.mark.parametrize("name", environment.PROCESSES)
def test_processes_that_do_not_join_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an accelerator and without trainer.cpu, each process would train alone."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv(name, "2")
    with pytest.raises(ConfigError, match=rf"^{name}=2, but 1 joined: .* --trainer.cpu true"):
        setup.join_processes(cpu=False)


def test_another_rank_than_that_of_the_process_group_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ConfigError, match=r"^RANK=1, but the process joined as rank 0"):
        environment.check_processes(1, 0)
    monkeypatch.delenv("RANK")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    environment.check_processes(2, 1)
    with pytest.raises(
        ConfigError, match=r"group has 2 processes and this one is rank 1, .* has 2 and rank 0"
    ):
        environment.check_processes(2, 0)


# --- honoured


def settled(monkeypatch: pytest.MonkeyPatch, *args: str, **variables: str) -> Any:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    made = config(*args)
    environment.apply_environment(made)
    return made.trainer


def test_what_is_honoured_goes_into_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = settled(monkeypatch)
    assert (plain.mixed_precision, plain.cpu) == ("no", False)
    assert settled(monkeypatch, ACCELERATE_USE_CPU="True").cpu
    assert settled(monkeypatch, ACCELERATE_MIXED_PRECISION="BF16").mixed_precision == "bf16"
    own = settled(monkeypatch, "--trainer.mixed_precision", "bf16", ACCELERATE_MIXED_PRECISION="no")
    assert own.mixed_precision == "bf16"
    agreed = ("--trainer.accumulation_steps", "4", "--trainer.clip_norm", "1")
    variables = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4", "ACCELERATE_GRADIENT_CLIPPING": "1.0"}
    assert settled(monkeypatch, *agreed, **variables).accumulation_steps == 4


@pytest.mark.parametrize("name", environment.PROCESSES)
def test_several_processes_without_an_accelerator_train_on_the_cpu(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert not settled(monkeypatch, **{name: "2"}).cpu
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert settled(monkeypatch, **{name: "2"}).cpu
    assert not settled(monkeypatch, **{name: "1"}).cpu


def test_the_launchers_defaults_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    settled(
        monkeypatch, ACCELERATE_DYNAMO_BACKEND="NO", ACCELERATE_DYNAMO_MODE="default",
        ACCELERATE_DYNAMO_USE_FULLGRAPH="False", ACCELERATE_DYNAMO_USE_DYNAMIC="False",
        ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION="False", ACCELERATE_USE_CPU="False",
        ACCELERATE_MIXED_PRECISION="no", FSDP_VERSION="2", ACCELERATE_GRADIENT_CLIPPING="none",
    )  # fmt: skip


def test_a_training_on_what_the_launcher_chose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes join as CPU processes, in the requested precision; the run folder records it."""
    joined: list[bool] = []
    precisions: list[str] = []
    join, build = loop.join_processes, loop.build_accelerator

    def watched_join(cpu: bool) -> Any:
        joined.append(cpu)
        return join(cpu)

    def watched_build(*args: Any) -> Any:
        accelerator = build(*args)
        precisions.append(accelerator.mixed_precision)
        assert accelerator.gradient_accumulation_steps == 1  # the step divides, Accelerate does not
        return accelerator

    monkeypatch.setattr(loop, "join_processes", watched_join)
    monkeypatch.setattr(loop, "build_accelerator", watched_build)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_DEBUG_MODE", "true")
    monkeypatch.setenv("ACCELERATE_CPU_AFFINITY", "true")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    loop.train(config("--trainer.accumulation_steps", "2", output_dir=tmp_path))
    assert (joined, precisions) == ([True], ["bf16"])
    trainer = load_config(tmp_path / "config.yaml").trainer
    assert (trainer.cpu, trainer.mixed_precision, trainer.accumulation_steps) == (True, "bf16", 2)


def test_a_compiled_model_does_not_change_the_precision_of_the_losses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CUDA devices Accelerate enables TF32 for a compiled model, and thereby for all other code."""
    made = setup.Accelerator

    def accelerator(**arguments: Any) -> Any:
        torch.backends.cuda.matmul.allow_tf32 = True
        return made(**arguments)

    monkeypatch.setattr(setup, "Accelerator", accelerator)
    before = torch.get_float32_matmul_precision()
    whole = config("--trainer.cpu", "true")
    environment.apply_environment(whole)
    setup.build_accelerator(whole, tmp_path)
    assert torch.get_float32_matmul_precision() == before == "highest"


def test_an_unknown_variable_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACCELERATE_NEXT_YEAR", "1")
    environment.apply_environment(config())
    assert re.search(
        r"^ACCELERATE_NEXT_YEAR=1 is not known to pysupcon", capsys.readouterr().err, re.MULTILINE
    )
