"""The environment variables that Accelerate reads, and how a training treats each of them.

``accelerate launch`` passes its flags and its config file on as environment variables. Accelerate's objects
read them unless an argument overrides them. A test checks that :data:`VARIABLES` covers every variable that
the installed version reads.
"""

from __future__ import annotations

from typing import Literal, NamedTuple


class Variable(NamedTuple):
    """Treatment of a variable, or of all variables that match a pattern with a trailing ``*``.

    Attributes:
        kind: honoured: the training follows it; refused: it raises an error; harmless: it has no effect here.
        text: the effect (honoured), what to do instead (refused), or why there is no effect (harmless).
    """

    kind: Literal["honoured", "refused", "harmless"]
    text: str


def _honoured(text: str) -> Variable:
    return Variable("honoured", text)


def _refused(text: str) -> Variable:
    return Variable("refused", text)


def _harmless(text: str) -> Variable:
    return Variable("harmless", text)


_SHARDED = "models are not sharded: every process holds the whole model; for a larger batch use "
_PROCESSES = _honoured("rank and number of the processes, and the address of the first one")
_MPI = _honoured("rank and number of CPU processes started by mpirun; with a GPU they need trainer.cpu")
_TRACKER = _honoured("read by the tracker of trainer.trackers")
_XLA = _harmless("read on XLA devices, which are refused")
_NOTEBOOK = _harmless("read by Accelerate's notebook launcher")
_COMMAND = _harmless("read by Accelerate's command line before it starts the training")

VARIABLES: dict[str, Variable] = {
    "ACCELERATE_MIXED_PRECISION": _honoured("sets trainer.mixed_precision if that is None"),
    "ACCELERATE_USE_CPU": _honoured("sets trainer.cpu"),
    "ACCELERATE_TORCH_DEVICE": _honoured("the device of a single process"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": _honoured("must agree with trainer.accumulation_steps"),
    "ACCELERATE_GRADIENT_CLIPPING": _honoured("must agree with trainer.clip_norm"),
    "ACCELERATE_DYNAMO_BACKEND": _honoured("compiles the model: eager, aot_eager or inductor"),
    "ACCELERATE_DYNAMO_MODE": _honoured("mode of inductor"),
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": _honoured("fullgraph of torch.compile"),
    "ACCELERATE_DYNAMO_USE_DYNAMIC": _honoured("dynamic of torch.compile"),
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": _honoured("compiles repeated blocks separately"),
    "ACCELERATE_CPU_AFFINITY": _honoured("binds a process to the cores near its GPU; no effect without GPUs"),
    "ACCELERATE_DEBUG_MODE": _honoured("checks the shapes that the processes exchange"),
    "ACCELERATE_LOG_LEVEL": _honoured("level of Accelerate's own messages"),
    "USE_TORCH_XLA": _honoured("0 makes Accelerate ignore an installed torch_xla"),
    "RANK": _PROCESSES, "LOCAL_RANK": _PROCESSES, "WORLD_SIZE": _PROCESSES, "LOCAL_WORLD_SIZE": _PROCESSES,
    "MASTER_ADDR": _PROCESSES, "MASTER_PORT": _PROCESSES,
    "NCCL_P2P_DISABLE": _honoured("read by NCCL"), "NCCL_IB_DISABLE": _honoured("read by NCCL"),
    "CCL_WORKER_COUNT": _honoured("read by oneCCL"),
    "PMI_*": _MPI, "OMPI_COMM_WORLD_*": _MPI, "MV2_COMM_WORLD_*": _MPI, "MPI_*": _MPI,
    "CLEARML_*": _TRACKER, "MLFLOW_*": _TRACKER, "WANDB_*": _TRACKER,
    "ACCELERATE_USE_FSDP": _refused(_SHARDED + "trainer.chunk_size"),
    "ACCELERATE_USE_DEEPSPEED": _refused(_SHARDED + "trainer.chunk_size"),
    "ACCELERATE_USE_MEGATRON_LM": _refused("Megatron-LM trains language models"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": _refused(
        "only data parallelism is supported; for a loss over the rows of all processes use loss.gather"
    ),
    "ACCELERATE_USE_SAGEMAKER": _refused("start the training with torchrun instead"),
    "ACCELERATE_USE_IPEX": _refused("the Intel extension is not supported; Accelerate 1.15 dropped it"),
    "ACCELERATE_FP8_BACKEND": _refused("the precisions are no, bf16 and fp16 (trainer.mixed_precision)"),
    "ACCELERATE_FP8_*": _harmless("read for the precision fp8, which is refused"),
    "FSDP_*": _harmless("read with ACCELERATE_USE_FSDP, which is refused"),
    "ACCELERATE_DEEPSPEED_*": _harmless("read with ACCELERATE_USE_DEEPSPEED, which is refused"),
    "ACCELERATE_CONFIG_DS_FIELDS": _harmless("read with ACCELERATE_USE_DEEPSPEED, which is refused"),
    "DEEPSPEED_USE_HPU": _harmless("written, not read, by Accelerate"),
    "MEGATRON_LM_*": _harmless("read with ACCELERATE_USE_MEGATRON_LM, which is refused"),
    "PARALLELISM_CONFIG_*": _harmless("read with ACCELERATE_USE_PARALLELISM_CONFIG, which is refused"),
    "ACCELERATE_ALLOW_CP_STANDALONE": _harmless("read for context parallelism, which is refused"),
    "ACCELERATE_SAGEMAKER_*": _harmless("read with ACCELERATE_USE_SAGEMAKER, which is refused"),
    "ACCELERATE_DOWNCAST_BF16": _XLA, "XLA_*": _XLA, "TPU_NAME": _XLA, "PJRT_DEVICE": _XLA,
    "ACCELERATE_IN_TPU_POD": _XLA,
    "PT_HPU_LAZY_MODE": _harmless("read with ACCELERATE_USE_DEEPSPEED, which is refused"),
    "ACCELERATE_BYPASS_DEVICE_MAP": _harmless("the model has no device map"),
    "ACCELERATE_INIT_INCLUDE_BUFFERS": _harmless("read for models on the meta device"),
    "ACCELERATE_ENABLE_RICH": _harmless("colours error messages"),
    "PYTORCH_ENABLE_MPS_FALLBACK": _harmless("written by Accelerate, read by torch"),
    "OMP_NUM_THREADS": _harmless("trainer.threads decides; accelerate launch always sets it"),
    "FORK_LAUNCHED": _NOTEBOOK, "NPROC": _NOTEBOOK, "NODE_RANK": _NOTEBOOK, "KAGGLE*": _NOTEBOOK,
    "ACCELERATE_DEBUG_RDV_FILE": _NOTEBOOK,
    "HF_HOME": _COMMAND, "XDG_CACHE_HOME": _COMMAND, "AWS_*": _COMMAND, "systemdrive": _COMMAND,
}  # fmt: skip


def lookup(name: str) -> Variable | None:
    """Return the entry of a variable: its own, else that of the longest matching pattern, else None."""
    if name in VARIABLES:
        return VARIABLES[name]
    patterns = [key for key in VARIABLES if key.endswith("*") and name.startswith(key[:-1])]
    return VARIABLES[max(patterns, key=len)] if patterns else None
