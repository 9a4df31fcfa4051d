"""Values that must be the same on all processes of a gathered loss: how they are sent, compared and shown.

:class:`SharedArguments` collects the values of one call of a loss. :mod:`pysupcon.distributed` sends them in
one message before any rows. If a value differs, all processes raise an error, so none waits for rows of
another.

To compare another argument, add it to ``_first`` or ``_rest`` of :class:`SharedArguments`, and update the
size of the message in the docstring of :mod:`pysupcon.distributed`. The parameters of a loss need no change
here.
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

__all__ = [
    "Code",
    "SharedArguments",
    "check_memory_rows",
    "check_norms",
    "describe_difference",
    "largest_norm",
]

_RELATIVE = 1e-6
"""Two numbers count as the same up to this relative difference. Each process may compute a schedule, and
different processors may round it differently."""
_RELATIVE_LEARNABLE = 1e-4
"""The same tolerance for a learnable temperature"""
_VALID = "whether all arguments are valid"
_UNKNOWN = math.inf
"""Sent instead of a value on a GPU: reading the value would block the host"""
_PARAMETERS = 4
"""Number of parameters of one loss that are compared. It is fixed: processes that call different losses must
send messages of the same size"""
_GIVEN = {
    "memory": "whether memory is given",
    "hard_negatives": "whether hard_negatives are given",
    "candidate_weights": "whether candidate_weights are given",
    "anchor_weights": "whether anchor_weights are given",
}
_FORMS = ("batch_negatives", "class_balance", "unlabeled")
_LARGEST_SIMILARITY = 7e14
"""Limit of |x| |y| / temperature. It is below the limit of the kernels, 7.8e14: all processes refuse the rows
before the kernels of one process do"""
_UNUSED = [(f"unused {slot}", None) for slot in range(_PARAMETERS)]
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _pack(number: float) -> int:
    """The bits of a float64 as an integer."""
    return int(struct.unpack("<q", struct.pack("<d", number))[0])


class Code(int):
    """A value encoded as an integer of 64 bits, which processes send and compare.

    A number is encoded as the bits of a float64, a text of at most 8 bytes as its bytes, and a longer text as
    its first 4 bytes and a checksum.
    """

    kind: type = int
    """type of the value"""
    learnable = False
    """whether a difference between processes is a warning instead of an error"""
    tensor: Tensor | None = None
    """the value, if it is on a GPU"""

    @classmethod
    def of(cls, value: Any, *, learnable: bool = False) -> Code:
        """Encodes a value.

        Args:
            value: bool, number, str, None, tensor of one element, or a dtype that features can have.
            learnable: see the attribute; it applies to a tensor only.
        """
        if not isinstance(value, Tensor):
            return cls._of_value(value)
        readable = value.device.type == "cpu" and is_eager(value)
        encoded = cls(_pack(value.item() if readable else _UNKNOWN))
        encoded.kind, encoded.learnable = float, learnable
        encoded.tensor = None if readable else value.detach()
        return encoded

    @classmethod
    @lru_cache(maxsize=256, typed=True)  # the time of a small loss is mostly that of its Python code
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
        """Decodes the code of another process, which has the same ``kind``, for a message.

        None and NaN both give None. A long text gives its first characters and "...".
        """
        if self.kind is str:
            text, _, rest = struct.pack("<q", code).partition(b"\0")
            return text.decode(errors="replace") + ("..." if rest.strip(b"\0") else "")
        if self.kind is float:
            value = struct.unpack("<d", struct.pack("<q", code))[0]
            return None if math.isnan(value) else value
        return _DTYPES[code] if self.kind is torch.dtype else self.kind(code)

    def same(self, codes: Sequence[int]) -> bool:
        """Returns whether the values of all processes are the same. Values that a GPU holds are left out.

        Args:
            codes: the code of each process.
        """
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
    """Returns a message: "alpha must be the same in all processes: 0.5 on rank 0, 0.7 on ranks 1-3".

    Args:
        name: name of the value.
        own: code of this process.
        codes: code of each process.
        ranks: rank of each process.
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
    """Returns the largest norm of a row.

    Args:
        features: [..., D].

    Returns:
        The norm; inf if a number is not finite; -1 for features on a GPU, which are not read.
    """
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


def check_norms(
    norms: Sequence[float],
    candidate_norms: Sequence[float] | None,
    temperatures: Sequence[float],
    ranks: Sequence[int],
) -> None:
    """Refuses rows on every process that the kernels of some processes would refuse.

    Args:
        norms: :func:`largest_norm` of the features of each process.
        candidate_norms: of the candidates; None: the features are the candidates.
        temperatures: temperature of each process.
        ranks: rank of each process.

    Raises:
        ValueError: features or candidates are not finite, or too large for their similarities.
    """
    sides = {"features": norms} | ({} if candidate_norms is None else {"candidates": candidate_norms})
    for name, values in sides.items():
        bad = [rank for rank, norm in zip(ranks, values, strict=True) if norm == math.inf]
        if bad:
            raise ValueError(f"{name} must be finite, got NaN or infinity on {_show_ranks(bad)}")
    name, values = list(sides.items())[-1]
    if max(norms) * (max(values) / min(temperatures)) > _LARGEST_SIMILARITY:
        largest = {
            side: _show_ranks([rank for rank, norm in zip(ranks, found, strict=True) if norm == max(found)])
            for side, found in sides.items()
        }
        where = " and ".join(f"{side} on {shown}" for side, shown in largest.items())
        raise ValueError(
            f"features must be small enough for their similarities; the largest |features| |{name}| / "
            f"temperature is beyond 7e14 ({where if candidate_norms else 'on ' + largest['features']})"
        )


def check_memory_rows(features: Tensor, rows: Tensor, temperature: float | Tensor) -> None:
    """Refuses a memory that the kernels of this process would refuse, before it sends anything.

    Args:
        features: of this process.
        rows: of the memory.
        temperature: number or tensor of one element.

    Raises:
        ValueError: rows are not finite, or too large for their similarities.
    """
    own, norm = largest_norm(features), largest_norm(rows)
    if norm == math.inf:
        raise ValueError("memory must be finite, got NaN or infinity")
    number = Code.of(temperature).decode(Code.of(temperature))
    if own < math.inf and own * norm / number > _LARGEST_SIMILARITY:
        raise ValueError(
            "memory must be small enough for its similarities; the largest |features| |memory| / "
            "temperature is beyond 7e14"
        )


def _comparable(value: Any) -> Any:
    """Returns a parameter of a loss, or None if its type cannot be compared."""
    if isinstance(value, Tensor):
        return value if value.numel() == 1 else None
    return value if isinstance(value, (bool, numbers.Real, str)) else None


class SharedArguments:
    """Values of one call of a loss that must be the same on all processes. It starts the communication.

    ``_first`` is compared first: a difference there is often the reason why a process refuses its arguments.
    Next the processes compare whether all arguments are valid. ``_rest`` comes last; a process that refuses
    its arguments sends zeros for it. Every loss must send the same number of values.

    Args:
        gather: sends the values.
        loss: name of the loss.
        parameters: parameters of this loss by name. The first four are compared.
        features: argument of the caller, not checked yet.
        labels: the same; None if not given.
        mask: the same; None if not given.
        options: the same: all keywords of :class:`pysupcon.options.Options`.
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
            **{_GIVEN[name]: options[name] is not None for name in _GIVEN},
        }
        assert len(parameters) <= _PARAMETERS, f"increase _PARAMETERS for {loss}"
        own = [(name, _comparable(value)) for name, value in parameters.items()]
        own += _UNUSED
        self._rest = {
            "whether labels are given": labels is not None,
            "whether instances are given": options["instances"] is not None,
            "loss": loss,
            "reduction": options["reduction"],
            "normalize": options["normalize"],
            **{name: options[name] for name in _FORMS},
            "exclude_batch_from_memory": bool(options["exclude_batch_from_memory"]),
            # The digits, because large numbers that differ by 1 are the same up to a relative difference.
            "ignore_index": str(options["ignore_index"]),
            **dict(own[:_PARAMETERS]),
        }

    def begin(
        self,
        features: Tensor,
        temperature: float | Tensor,
        candidates: Tensor | None = None,
        hard_negatives: Tensor | None = None,
    ) -> Communicator | None:
        """Sends the values after this process has checked its arguments.

        Args:
            features: [B, V, D] or [B, D].
            temperature: number or tensor of one element.
            candidates: [Bc, Vc, D] or [Bc, D]; None if not given.
            hard_negatives: [B, K, D]; None if not given.

        Returns:
            None if there is no other process.

        Raises:
            ValueError: a value differs; raised on every process.
        """
        enabled, given = torch.is_grad_enabled(), isinstance(temperature, Tensor)
        learnable = isinstance(temperature, Tensor) and temperature.requires_grad
        rows = features if candidates is None and self._first["contrast_mode"] == "one" else candidates
        of_candidates = enabled and rows is not None and rows.requires_grad
        of_own = features.requires_grad or (hard_negatives is not None and hard_negatives.requires_grad)
        gradient = of_candidates or (enabled and (of_own or learnable))
        learnable = learnable or (given and not enabled)  # in an evaluation a tensor may be learnable
        rest = {**self._rest, "normalize": bool(self._rest["normalize"])}
        code = Code.of(temperature, learnable=learnable)
        return self._send(features, True, rest, (gradient, of_candidates), code, candidates)

    def refuse(self) -> None:
        """Tells the other processes, which wait for a message, that this process refuses its arguments.

        Does nothing after :meth:`begin`.
        """
        if not self.sent:
            device = self.features.device if isinstance(self.features, Tensor) else None
            with suppress(Exception):  # this process raises its own error
                rest = dict.fromkeys(self._rest, False)
                self._send(torch.empty((0, 1), device=device), False, rest, (False, False), Code.of(1.0))

    def _send(
        self, features: Tensor, valid: bool, rest: dict[str, Any], gradients: tuple[bool, bool],
        temperature: Code, candidates: Tensor | None = None,
    ) -> Communicator | None:  # fmt: skip
        self.sent = True
        values = {
            **self._first,
            _VALID: valid,
            **rest,
            "whether a gradient is wanted": gradients[0],
            "whether a gradient of candidates is wanted": gradients[1],
            "whether temperature is learnable": temperature.learnable,
        }
        codes: dict[str, int] = {name: Code.of(value) for name, value in values.items()}
        codes["temperature"] = temperature
        if candidates is None:
            return self.gather.begin(features, codes)
        return self.gather.begin(features, codes, candidates)
