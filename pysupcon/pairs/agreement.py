"""Values that must be the same on all processes of a gathered loss: how they are sent, compared and shown.

:class:`Terms` collects them for one call of a loss. :mod:`pysupcon.distributed` sends them in the one message
that precedes the exchange of rows, so all processes refuse a difference, and none waits for the others.
"""

from __future__ import annotations

import math
import numbers
import struct
import sys
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from pysupcon.pairs.global_batch import Communicator, Gather
from pysupcon.pairs.modes import is_eager

__all__ = ["Code", "Terms", "check_norms", "describe_difference", "largest_norm"]

_RELATIVE = 1e-6
"""Relative difference up to which two numbers count as the same: a schedule that every process computes for
itself may differ in its last bits on different processors."""
_RELATIVE_LEARNABLE = 1e-4
"""The same for a learnable temperature"""
_VALID = "whether all arguments are valid"
_UNKNOWN = math.inf
"""Stands for a value on a GPU, which is not read"""
_PARAMETERS = 4
"""Number of parameters of one loss that are compared, fixed because the messages of all losses must have the
same size"""
_LARGEST_SIMILARITY = 7e14
"""Below the limit of the kernels, 7.8e14, so that no process reaches that limit alone"""
_UNUSED = [(f"unused {slot}", None) for slot in range(_PARAMETERS)]
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _pack(number: float) -> int:
    """The bits of a float64 as an integer."""
    return int(struct.unpack("<q", struct.pack("<d", number))[0])


class Code(int):
    """A value as an integer of 64 bits, the form in which processes compare it.

    Numbers are sent as the bits of a float64, texts as up to 8 bytes; a longer text is sent as 4 bytes and a
    checksum.
    """

    kind: type = int
    learnable = False
    tensor: Tensor | None = None
    """the value, if it is on a GPU"""

    @classmethod
    def of(cls, value: Any, *, learnable: bool = False) -> Code:
        """Encodes a bool, number, text, dtype of features, None or tensor of one element.

        Args:
            value: what must be the same.
            learnable: whether the value is a tensor whose difference is no error.
        """
        if not isinstance(value, Tensor):
            return cls._of_value(value)
        readable = value.device.type == "cpu" and is_eager(value)
        encoded = cls(_pack(value.item() if readable else _UNKNOWN))
        encoded.kind, encoded.learnable = float, learnable
        encoded.tensor = None if readable else value.detach()
        return encoded

    @classmethod
    @lru_cache(maxsize=256, typed=True)  # a small loss in one process takes as long as its Python code
    def _of_value(cls, value: Any) -> Code:
        kind: type = float
        if isinstance(value, bool):
            code, kind = int(value), bool
        elif isinstance(value, torch.dtype):
            code, kind = _DTYPES.index(value), torch.dtype
        elif isinstance(value, str):
            data = value.encode(errors="replace")
            if len(data) > 8:
                data = data[:4] + b"\0" + struct.pack("<I", zlib.crc32(data))[:3]
            code, kind = struct.unpack("<q", data.ljust(8, b"\0"))[0], str
        else:
            code = _pack(math.nan if value is None else value)
        encoded = cls(code)
        encoded.kind = kind
        return encoded

    def decode(self, code: int) -> Any:
        """Returns the value of another process, of the same kind, in the form in which messages show it."""
        if self.kind is str:
            text, _, rest = struct.pack("<q", code).partition(b"\0")
            return text.decode(errors="replace") + ("..." if rest.strip(b"\0") else "")
        if self.kind is float:
            value = struct.unpack("<d", struct.pack("<q", code))[0]
            return None if math.isnan(value) else value
        return _DTYPES[code] if self.kind is torch.dtype else self.kind(code)

    def same(self, codes: Sequence[int]) -> bool:
        """Whether the values of all processes are the same."""
        if len(set(codes)) == 1:
            return True
        if self.kind is not float:
            return False
        values = [value for value in map(self.decode, codes) if value != _UNKNOWN]
        numbers = [value for value in values if value is not None]
        if len(numbers) < len(values):
            return not numbers
        tolerance = _RELATIVE_LEARNABLE if self.learnable else _RELATIVE
        return not numbers or max(numbers) - min(numbers) <= tolerance * max(map(abs, numbers))


def describe_difference(name: str, own: Code, codes: Sequence[int], ranks: Sequence[int]) -> str:
    """Tells the value of every process: "alpha must be the same in all processes: 0.5 on rank 0, ...".

    Args:
        name: of the value.
        own: of this process.
        codes: of all processes.
        ranks: of these processes.
    """
    if name == _VALID:
        refused = [rank for rank, code in zip(ranks, codes, strict=True) if not code]
        return f"the arguments of the loss were refused on {_show_ranks(refused)}; the error there says why"
    shown: dict[str, list[int]] = {}
    for rank, value in zip(ranks, map(own.decode, codes), strict=True):
        text = f"{value:.8g}" if isinstance(value, float) else str(value)
        shown.setdefault("unknown (on a GPU)" if value == _UNKNOWN else text, []).append(rank)
    parts = ", ".join(f"{text} on {_show_ranks(found)}" for text, found in shown.items())
    return f"{name} must be the same in all processes: {parts}"


def _show_ranks(ranks: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> "ranks 0-2 and 5"."""
    runs = []
    for _, group in groupby(enumerate(ranks), lambda pair: pair[1] - pair[0]):
        run = [rank for _, rank in group]
        runs.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    text = " and ".join(filter(None, [", ".join(runs[:-1]), runs[-1]]))
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"


def largest_norm(features: Tensor) -> float:
    """The largest norm of a row; inf if a number is not finite, -1 on a GPU, where it is not read."""
    if features.device.type != "cpu" or not is_eager(features):
        return -1.0
    if not features.numel():
        return 0.0
    rows = features.detach()
    dtype = torch.promote_types(rows.dtype, torch.float32)
    largest = float(torch.linalg.vector_norm(rows, dim=-1, dtype=dtype).max())
    if math.isfinite(largest):
        return largest
    return sys.float_info.max if rows.isfinite().all() else math.inf


def check_norms(norms: Sequence[float], temperatures: Sequence[float], ranks: Sequence[int]) -> None:
    """Checks on every process what the kernels check on the processes that see the rows.

    Args:
        norms: :func:`largest_norm` of each process.
        temperatures: of each process.
        ranks: of these processes.

    Raises:
        ValueError: features are not finite, or too large for their similarities.
    """
    bad = [rank for rank, norm in zip(ranks, norms, strict=True) if norm == math.inf]
    if bad:
        raise ValueError(f"features must be finite, got NaN or infinity on {_show_ranks(bad)}")
    largest, temperature = max(norms), min(temperatures)
    if largest * (largest / temperature) > _LARGEST_SIMILARITY:
        ranks = [rank for rank, norm in zip(ranks, norms, strict=True) if norm == largest]
        raise ValueError(
            "features must be small enough for their similarities; the largest |features| |features| / "
            f"temperature is beyond 7e14 (on {_show_ranks(ranks)})"
        )


def _comparable(value: Any) -> Any:
    """A parameter of a loss; None if it is of a kind that cannot be compared."""
    if isinstance(value, Tensor):
        return value if value.numel() == 1 else None
    return value if isinstance(value, (bool, numbers.Real, str)) else None


class Terms:
    """What the processes of one call of a loss must share, and the start of their communication.

    Args:
        gather: which communicates.
        loss: name.
        parameters: of this loss only, by name.
        features: as the caller gave them, like all following arguments.
        labels: or None.
        mask: or None.
        options: ``contrast_mode``, ``candidates``, ``instances``, ``reduction`` and ``normalize``.
    """

    def __init__(
        self, gather: Gather, loss: str, parameters: Mapping[str, Any], features: Any, labels: Any, mask: Any,
        options: Mapping[str, Any],
    ) -> None:  # fmt: skip
        self.gather, self.features = gather, features
        self.sent = False
        mode = options["contrast_mode"]
        self._first = {
            "contrast_mode": mode if isinstance(mode, str) else "invalid",
            "whether candidates are given": options["candidates"] is not None,
            "whether a mask is given": mask is not None,
        }
        own = [(name, _comparable(value)) for name, value in parameters.items()]
        own += _UNUSED
        self._rest = {
            "whether labels are given": labels is not None,
            "whether instances are given": options["instances"] is not None,
            "loss": loss,
            "reduction": options["reduction"],
            "normalize": options["normalize"],
            **dict(own[:_PARAMETERS]),
        }

    def begin(self, features: Tensor, temperature: float | Tensor) -> Communicator | None:
        """Sends the checked arguments; see :meth:`pysupcon.pairs.global_batch.Gather.begin`."""
        enabled, given = torch.is_grad_enabled(), isinstance(temperature, Tensor)
        learnable = isinstance(temperature, Tensor) and temperature.requires_grad
        gradient = enabled and (features.requires_grad or learnable)
        learnable = learnable or (given and not enabled)  # in an evaluation a tensor may be learnable
        rest = {**self._rest, "normalize": bool(self._rest["normalize"])}
        return self._send(features, True, rest, gradient, Code.of(temperature, learnable=learnable))

    def refuse(self) -> None:
        """Sends that this process refuses its arguments, unless :meth:`begin` was called: the other processes
        wait for its message."""
        if not self.sent:
            device = self.features.device if isinstance(self.features, Tensor) else None
            with suppress(Exception):  # this process raises its own error
                rest = dict.fromkeys(self._rest, False)
                self._send(torch.empty((0, 1), device=device), False, rest, False, Code.of(1.0))

    def _send(
        self, features: Tensor, valid: bool, rest: dict[str, Any], gradient: bool, temperature: Code
    ) -> Communicator | None:
        self.sent = True
        values = {
            **self._first,
            _VALID: valid,
            **rest,
            "whether a gradient is wanted": gradient,
            "whether temperature is learnable": temperature.learnable,
        }
        codes: dict[str, int] = {name: Code.of(value) for name, value in values.items()}
        return self.gather.begin(features, {**codes, "temperature": temperature})
