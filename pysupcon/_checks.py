"""Checks of what a caller hands in. Every message names the argument, the contract and what came."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch
from torch import Tensor

from . import _ops, _trust
from ._modes import runs_plainly

__all__ = [
    "BACKENDS",
    "check_choice",
    "check_features",
    "check_ids",
    "check_kernels",
    "check_mask",
    "check_number",
    "check_temperature",
    "resolve_backend",
]

BACKENDS = ("auto", "cpu", "cuda", "tiled", "reference")
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_warned: set[str] = set()


def describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {list(value.shape)}"
    return f"{type(value).__name__} {value!r}"


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_number(name: str, value: Any, low: float, high: float) -> None:
    """A finite number of [low, high]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {describe(value)}")
    if not low <= value <= high:  # NaN is in no range; math.isfinite takes no symbolic number
        raise ValueError(f"{name} must be finite and between {low} and {high}, got {value}")


def check_temperature(name: str, value: Any) -> None:
    """A positive finite number or a tensor of no dimensions; a tensor's value is looked at only on a CPU."""
    if isinstance(value, Tensor):
        if value.dim() != 0 or not value.is_floating_point():
            raise TypeError(
                f"{name} must be a number or a float tensor of no dimensions, got {describe(value)}"
            )
        if value.device.type != "cpu" or not runs_plainly(value):
            return
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number or a float tensor of no dimensions, got {describe(value)}")
    if not 0 < value <= sys.float_info.max:  # a symbolic number is taken to be less than infinity
        raise ValueError(f"{name} must be finite and greater than 0, got {value}")


def check_features(name: str, value: Any, like: Tensor | None = None) -> None:
    """Embeddings [N, D] or [B, V, D]; ``like``: they must lie on its device and share its D."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a float tensor of shape [N, D] or [B, V, D], got {describe(value)}")
    if value.dtype not in _FLOATS or value.dim() not in (2, 3) or 0 in value.shape[1:]:
        raise ValueError(
            f"{name} must be float64, float32, bfloat16 or float16 of shape [N, D] or [B, V, D] with "
            "D and V at "
            f"least 1, got {describe(value)}"
        )
    if like is not None and value.shape[-1] != like.shape[-1]:
        raise ValueError(
            f"{name} must have the width D={like.shape[-1]} of features, got {describe(value)}",
        )
    if like is not None and value.device != like.device:
        raise ValueError(f"{name} must be on the device of features, {like.device}, got {value.device}")


def check_ids(name: str, value: Any, features: Tensor) -> Tensor:
    """One integer per sample; returned as int64."""
    count = features.shape[0]

    def contract() -> str:
        axis = "B" if features.dim() == 3 else "N"
        return f"{name} must be int64 of shape [{axis}]=[{count}] (one per sample)"

    if not isinstance(value, Tensor):
        raise TypeError(f"{contract()}, got {describe(value)}")
    if value.dtype not in _INTEGERS or value.shape != (count,):
        raise ValueError(f"{contract()}, got {describe(value)}")
    if value.device != features.device:
        raise ValueError(f"{contract()} on {features.device}, got it on {value.device}")
    return value if value.dtype == torch.int64 and value.is_contiguous() else value.long().contiguous()


def check_mask(value: Any, features: Tensor, candidates: Tensor) -> None:
    shape = [features.shape[0], candidates.shape[0]]
    contract = f"mask must be bool of shape {shape} (samples of features x samples of candidates)"
    if not isinstance(value, Tensor):
        raise TypeError(f"{contract}, got {describe(value)}")
    if value.dtype != torch.bool or list(value.shape) != shape:
        raise ValueError(f"{contract}, got {describe(value)}")
    if value.device != features.device:
        raise ValueError(f"{contract} on {features.device}, got it on {value.device}")


def _why_not(backend: str) -> str:
    return str(_ops.backends().get(backend, {}).get("detail", "no kernel is written for it"))


def resolve_backend(backend: str, device: torch.device, masked: bool) -> str:
    """The backend that will run: "cpu", "cuda", "tiled" or "reference"."""
    check_choice("backend", backend, BACKENDS)
    if backend == "auto":
        if masked:
            return "tiled"
        if _ops.compiled_for(device.type):
            return device.type
        if device.type not in (*_warned, "meta") and not torch.compiler.is_compiling():
            _warned.add(device.type)
            warnings.warn(
                f"pysupcon has no compiled kernel for {device.type} tensors "
                f"({_why_not(device.type)}); "
                "the slower pure-PyTorch path, backend='tiled', takes its place",
                stacklevel=4,
            )
        return "tiled"
    if backend in ("tiled", "reference"):
        return backend
    if backend != device.type:
        raise ValueError(f"backend={backend!r} needs {backend} tensors, but features are on {device}")
    if masked:
        raise ValueError(
            f"backend={backend!r} knows positives by label only, not by mask; mask needs "
            "backend='tiled' or 'auto'"
        )
    if not _ops.compiled_for(backend):
        raise RuntimeError(f"backend={backend!r} is not compiled: {_why_not(backend)}")
    return backend


def check_kernels(wish: str, device: torch.device, dtype: torch.dtype) -> str:
    """ "cuda" if its kernels may be used for rows of ``dtype`` (see :mod:`pysupcon._trust`); otherwise
    "tiled", or an error where ``wish`` names the backend."""
    if torch.compiler.is_compiling():
        from . import _traced

        why = _traced.told_obstacle(device, dtype, wish == "auto")
    else:
        why = _trust.told_obstacle(device, dtype, wish == "auto")
    if why is None:
        return "cuda"
    if wish == "auto":
        return "tiled"
    raise RuntimeError(why)
