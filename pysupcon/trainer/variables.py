"""What Accelerate reads from the environment: honoured, refused by its name, or harmless.

``accelerate launch`` passes its flags and its config file on as environment variables, and Accelerate's
objects read them wherever their arguments do not say otherwise. A test looks for every one of them that the
installed version reads in :data:`VARIABLES`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple


class Variable(NamedTuple):
    """What becomes of a variable, or of all whose names a pattern with ``*`` at its end stands for.

    Attributes:
        kind: harmless: without effect on a training here, as ``text`` explains.
        text: what it does (honoured), what to do instead (refused), or why it has no effect (harmless).
    """

    kind: Literal["honoured", "refused", "harmless"]
    text: str


def _honoured(text: str) -> Variable:
    return Variable("honoured", text)


def _refused(text: str) -> Variable:
    return Variable("refused", text)


def _harmless(text: str) -> Variable:
    return Variable("harmless", text)


_SHARDED = "a model is not sharded here: every process holds all of it; for a larger batch use "
_PROCESSES = _honoured("numbers the processes and finds the first of them")
_MPI = _honoured("numbers the processes on CPUs that mpirun starts; needs trainer.cpu")
_TRACKER = _honoured("names what the tracker of trainer.trackers writes")
_XLA = _harmless("read on XLA devices, which are refused")
_NOTEBOOK = _harmless("read by Accelerate's launchers for notebooks")
_COMMAND = _harmless("read by Accelerate's command line, before it starts the training")

VARIABLES: dict[str, Variable] = {
    "ACCELERATE_MIXED_PRECISION": _honoured("trainer.mixed_precision, where that is None; no else"),
    "ACCELERATE_USE_CPU": _honoured("trainer.cpu"),
    "ACCELERATE_TORCH_DEVICE": _honoured("the device of the only process"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": _honoured("has to agree with trainer.accumulation_steps"),
    "ACCELERATE_GRADIENT_CLIPPING": _honoured("has to agree with trainer.clip_norm"),
    "ACCELERATE_DYNAMO_BACKEND": _honoured("compiles the model: eager, aot_eager or inductor"),
    "ACCELERATE_DYNAMO_MODE": _honoured("of inductor"),
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": _honoured("fullgraph of torch.compile"),
    "ACCELERATE_DYNAMO_USE_DYNAMIC": _honoured("dynamic of torch.compile"),
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": _honoured("compiles repeated blocks one by one"),
    "ACCELERATE_CPU_AFFINITY": _honoured("binds a process to the cores near its GPU; nothing without GPUs"),
    "ACCELERATE_DEBUG_MODE": _honoured("compares what the processes exchange"),
    "ACCELERATE_LOG_LEVEL": _honoured("of Accelerate's own messages"),
    "USE_TORCH_XLA": _honoured("0 has Accelerate pass over an installed torch_xla"),
    "RANK": _PROCESSES, "LOCAL_RANK": _PROCESSES, "WORLD_SIZE": _PROCESSES, "LOCAL_WORLD_SIZE": _PROCESSES,
    "MASTER_ADDR": _PROCESSES, "MASTER_PORT": _PROCESSES,
    "NCCL_P2P_DISABLE": _honoured("by NCCL"), "NCCL_IB_DISABLE": _honoured("by NCCL"),
    "CCL_WORKER_COUNT": _honoured("by oneCCL"),
    "PMI_*": _MPI, "OMPI_COMM_WORLD_*": _MPI, "MV2_COMM_WORLD_*": _MPI, "MPI_*": _MPI,
    "CLEARML_*": _TRACKER, "MLFLOW_*": _TRACKER, "WANDB_*": _TRACKER,
    "ACCELERATE_USE_FSDP": _refused(_SHARDED + "trainer.chunk_size"),
    "ACCELERATE_USE_DEEPSPEED": _refused(_SHARDED + "trainer.chunk_size"),
    "ACCELERATE_USE_MEGATRON_LM": _refused("Megatron-LM trains language models"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": _refused(
        "the only parallelism here is that of the data; for a loss over all processes' rows use loss.gather"
    ),
    "ACCELERATE_USE_SAGEMAKER": _refused("start it there with torchrun"),
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
    "ACCELERATE_INIT_INCLUDE_BUFFERS": _harmless("read for models that are built without memory"),
    "ACCELERATE_ENABLE_RICH": _harmless("colours error messages"),
    "PYTORCH_ENABLE_MPS_FALLBACK": _harmless("written by Accelerate, read by torch"),
    "OMP_NUM_THREADS": _harmless("trainer.threads decides; accelerate launch always sets it"),
    "FORK_LAUNCHED": _NOTEBOOK, "NPROC": _NOTEBOOK, "NODE_RANK": _NOTEBOOK, "KAGGLE*": _NOTEBOOK,
    "ACCELERATE_DEBUG_RDV_FILE": _NOTEBOOK,
    "HF_HOME": _COMMAND, "XDG_CACHE_HOME": _COMMAND, "AWS_*": _COMMAND, "systemdrive": _COMMAND,
}  # fmt: skip


def find(name: str) -> Variable | None:
    """The entry of a variable: its own, else that of the longest pattern that fits."""
    if name in VARIABLES:
        return VARIABLES[name]
    patterns = [key for key in VARIABLES if key.endswith("*") and name.startswith(key[:-1])]
    return VARIABLES[max(patterns, key=len)] if patterns else None
