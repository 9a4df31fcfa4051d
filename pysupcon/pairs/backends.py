"""Which implementation computes a loss: the compiled kernels, tiled PyTorch or the dense reference.

The choice depends on what is compiled (:mod:`pysupcon.pairs.ops`), on the device of the features and, for
CUDA, on the verdict of :mod:`pysupcon.pairs.kernel_check`.
"""

from __future__ import annotations

from typing import Any

import torch

from pysupcon.caller import warn_caller
from pysupcon.pairs import kernel_check, ops
from pysupcon.pairs.checks import BACKENDS, check_choice

__all__ = ["backends", "check_kernels", "resolve_backend"]

_warned: set[str] = set()
if ops.broken:  # now, because a loss that is compiled by torch.compile cannot warn
    warn_caller(
        f"pysupcon: {ops.compiled_backends()['cpu']['detail']}. Until then the losses use the slower "
        "backend='tiled' (pure PyTorch)"
    )
    _warned.update(("cpu", "cuda"))


def backends(*, check: bool = False) -> dict[str, dict[str, Any]]:
    """Reports which backends can compute the losses here, and why others cannot.

    Args:
        check: run the known-answer test of the CUDA kernels now, on every device and in every dtype. The
            verdicts hold for the rest of the process. By default the first loss on a device runs the test,
            and only the verdicts so far are reported: a test on every device takes hundreds of MiB on each,
            which a process that uses one device should not take.

    Returns:
        One entry per backend ("cpu", "cuda", "tiled", "reference"), each with ``available`` (bool) and
        ``detail`` (a sentence). "cpu" also has ``isa``, the instruction set in use. "cuda" also has
        ``devices``, if there are any: ``available`` and ``detail`` of each ("cuda:0", ...). A device is
        available if the build contains code for it and at least one tested dtype passed, or none was tested
        yet. "cuda" is available if one of its devices is.
    """
    report = ops.compiled_backends()
    cuda = report["cuda"]
    if cuda["available"]:
        devices = kernel_check.report(check)
        details = "; ".join(f"{name}: {entry['detail']}" for name, entry in devices.items())
        report["cuda"] = {
            "available": any(entry["available"] for entry in devices.values()),
            "detail": f"{cuda['detail']}; {details}",
            "devices": devices,
        }
    report["tiled"] = {"available": True, "detail": "pure PyTorch in tiles, O(N) memory, any device"}
    report["reference"] = {"available": True, "detail": "dense PyTorch, O(N^2) memory, for tests"}
    return report


def _unavailable_reason(backend: str) -> str:
    return str(backends().get(backend, {}).get("detail", "no kernel is written for it"))


def resolve_backend(backend: str, device: torch.device, tiled_only: str | None) -> str:
    """Chooses the backend of a loss and checks that it is compiled.

    Args:
        backend: of :data:`BACKENDS`.
        device: of the features.
        tiled_only: an argument that the compiled kernels do not support; None: there is none.

    Returns:
        "cpu", "cuda", "tiled" or "reference".

    Raises:
        ValueError: the backend does not support the device or a mask.
        RuntimeError: the backend is not compiled.
    """
    check_choice("backend", backend, BACKENDS)
    if backend == "auto":
        if tiled_only is not None:
            return "tiled"
        if ops.compiled_for(device.type):
            return device.type
        if device.type not in (*_warned, "meta") and not torch.compiler.is_compiling():
            _warned.add(device.type)
            warn_caller(
                f"pysupcon has no compiled kernel for {device.type} tensors "
                f"({_unavailable_reason(device.type)}); "
                "falling back to the slower backend='tiled' (pure PyTorch)"
            )
        return "tiled"
    if backend in ("tiled", "reference"):
        return backend
    if backend != device.type:
        raise ValueError(f"backend={backend!r} needs {backend} tensors, but features are on {device}")
    if tiled_only is not None:
        raise ValueError(
            f"backend={backend!r} supports positives by label only, not by {tiled_only}; {tiled_only} needs "
            "backend='tiled' or 'auto'"
        )
    if not ops.compiled_for(backend):
        raise RuntimeError(f"backend={backend!r} is not compiled: {_unavailable_reason(backend)}")
    return backend


def check_kernels(requested: str, device: torch.device, dtype: torch.dtype) -> str:
    """Decides between the CUDA kernels and tiled PyTorch (see :mod:`pysupcon.pairs.kernel_check`).

    Args:
        requested: the backend that the caller gave, "auto" or "cuda".
        device: a CUDA device.
        dtype: of the rows.

    Returns:
        "cuda" or, with a warning once, "tiled".

    Raises:
        RuntimeError: ``requested`` is "cuda" but its kernels cannot be used.
    """
    if torch.compiler.is_compiling():
        from pysupcon.pairs import traced

        reason = traced.check_device(device, dtype, requested == "auto")
    else:
        reason = kernel_check.check_device(device, dtype, requested == "auto")
    if reason is None:
        return "cuda"
    if requested == "auto":
        return "tiled"
    raise RuntimeError(reason)
