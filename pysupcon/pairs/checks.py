"""Checks of the arguments that users pass to losses.

Every error message names the argument, the contract and the value received.
"""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor

from pysupcon.pairs.modes import is_eager

__all__ = [
    "BACKENDS",
    "TEMPERATURE_RANGE",
    "check_choice",
    "check_epsilon",
    "check_features",
    "check_gather",
    "check_hard_negatives",
    "check_ids",
    "check_labelling",
    "check_mask",
    "check_number",
    "check_row_weights",
    "check_temperature",
    "describe",
]

BACKENDS = ("auto", "cpu", "cuda", "tiled", "reference")
TEMPERATURE_RANGE = 1e-12, 1e12
"""Smallest and largest temperature. 1 / temperature and its square, which occurs in the gradient of a
temperature, are then far from the limits of float32."""
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_INTEGERS = (
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8,
)  # fmt: skip
_SHOWN = 60  # characters of a value that a message quotes


def shorten(text: str, length: int = _SHOWN) -> str:
    """Shortens a text to one line of at most ``length`` characters."""
    text = " ".join(text[: 2 * length].split())
    return text if len(text) <= length else f"{text[: length - 3]}..."


def describe(value: Any, depth: int = 2) -> str:
    """Describes a value by type, length, dtype and shape. Only a number or a short text is quoted.

    Args:
        value: any object.
        depth: of nested containers to describe.
    """
    kind = shorten(type(value).__name__)
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {list(value.shape)}"
    if value is None or isinstance(value, bool):
        return repr(value)
    if isinstance(value, (str, bytes)):
        length = f" of length {len(value)}," if len(value) > _SHOWN else ""
        return f"{kind}{length} {shorten(repr(value[:_SHOWN]))}"
    if isinstance(value, (list, tuple, set, frozenset, dict)):
        return f"{kind} of length {len(value)}{_first_element(value, depth)}"
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple) and shape and hasattr(value, "dtype"):  # of NumPy, pandas, JAX
        return f"{kind} of {shorten(str(value.dtype))}, shape {shorten(str(list(shape)))}"
    if isinstance(value, int) and abs(value) >= 10**_SHOWN:
        return f"{kind} of {value.bit_length()} bits"
    return f"{kind} {shorten(repr(value))}"


def describe_no_tensor(value: Any) -> str:
    """Describes what was passed in place of a tensor, and how to convert it."""
    if type(value).__name__ == "ndarray":
        return f"{describe(value)}: convert it with torch.from_numpy"
    if (
        isinstance(value, (list, tuple))
        and value
        and all(isinstance(each, (bool, int, float)) for each in value)
    ):
        return f"{describe(value)}: convert it with torch.tensor"
    return describe(value)


def _first_element(values: Any, depth: int) -> str:
    if not values or not depth:
        return ""
    first = next(iter(values))
    nested = isinstance(first, (list, tuple, dict)) or hasattr(first, "shape")
    return f" (first element: {describe(first, depth - 1) if nested else shorten(type(first).__name__)})"


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Checks that a value is one of some strings or bools; raises a ValueError otherwise."""
    if not isinstance(value, (str, bool)) or value not in choices:
        got = repr(value) if isinstance(value, str) and len(value) <= _SHOWN else describe(value)
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {got}")


def _is_real(dtype: torch.dtype) -> bool:
    return dtype != torch.bool and not dtype.is_complex


def _as_tensor_in_trace(value: Any) -> Any:
    """Converts a NumPy number, which torch.compile traces as an array, to a tensor."""
    if not torch.compiler.is_compiling() or isinstance(value, (Tensor, int, float, str)):
        return value
    return torch.as_tensor(value) if hasattr(value, "shape") else value


def _number(value: Any) -> Any:
    """Converts a number of Python or NumPy or a tensor of one element to a Python number; None otherwise."""
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 and _is_real(value.dtype) else None
    if type(value) in (float, int):
        return value
    return float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else None


def _check_range(name: str, value: Any, low: float, high: float) -> None:
    if not low <= value <= high:  # also refuses NaN
        got = describe(value) if isinstance(value, int) else value
        raise ValueError(f"{name} must be from {low:g} to {high:g}, got {got}")


def check_number(name: str, value: Any, low: float, high: float) -> float:
    """Checks a number, or a tensor of one element without gradient, and returns it as a number.

    Raises:
        TypeError: not a number, or a tensor that requires a gradient.
        ValueError: not in [low, high].
    """
    value = _as_tensor_in_trace(value)
    if isinstance(value, Tensor) and value.requires_grad:
        raise TypeError(f"{name} is not differentiable: pass {name}.detach()")
    number = _number(value)
    if number is None:
        raise TypeError(f"{name} must be a number or a tensor of one element, got {describe(value)}")
    _check_range(name, number, low, high)
    return number


def check_epsilon(value: Any) -> float:
    """Checks a number from -1e4 to 1e4 as :func:`check_number` does.

    It is added to n_i, in float32 for 32-bit rows, where 1e4 causes a rounding error of 1e-3.
    """
    return check_number("epsilon", value, -1e4, 1e4)  # literals, because graphs take globals as inputs


def check_temperature(name: str, value: Any) -> float | Tensor:
    """Checks a number of :data:`TEMPERATURE_RANGE`, or a tensor of one element.

    For functions; modules, whose temperature is a number, call :func:`check_number`. The value of a tensor is
    checked only on a CPU in eager mode.

    Returns:
        A number, or a tensor of no dimensions.

    Raises:
        TypeError: neither a number nor a tensor of one element.
        ValueError: out of range.
    """
    value = _as_tensor_in_trace(value)
    if isinstance(value, Tensor) and value.numel() == 1 and _is_real(value.dtype):
        if value.device.type == "cpu" and is_eager(value):
            low, high = TEMPERATURE_RANGE  # as rounded to the tensor's dtype
            slack = torch.finfo(value.dtype).eps if value.is_floating_point() else 0.0
            _check_range(name, value.item(), low * (1 - slack), high * (1 + slack))
        return value.reshape(())
    number = None if isinstance(value, Tensor) else _number(value)
    if number is None:
        raise TypeError(f"{name} must be a number or a tensor of one element, got {describe(value)}")
    _check_range(name, number, *TEMPERATURE_RANGE)
    return number


def check_features(name: str, value: Any, like: Tensor | None = None) -> None:
    """Checks embeddings [N, D] or [B, V, D].

    Args:
        name: of the argument.
        value: the embeddings.
        like: features whose device and D the embeddings must have; None: any.

    Raises:
        TypeError: not a tensor.
        ValueError: wrong dtype, shape or device.
    """
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name} must be a float tensor of shape [N, D] or [B, V, D], got {describe_no_tensor(value)}"
        )
    if value.dtype not in _FLOATS or value.dim() not in (2, 3) or 0 in value.shape[1:]:
        raise ValueError(
            f"{name} must be float64, float32, bfloat16 or float16 of shape [N, D] or [B, V, D] with "
            f"D and V at least 1, got {describe(value)}"
        )
    if like is not None and value.shape[-1] != like.shape[-1]:
        raise ValueError(
            f"{name} must have the width D={like.shape[-1]} of features, got {describe(value)}",
        )
    if like is not None and value.device != like.device:
        raise ValueError(f"{name} must be on the device of features, {like.device}, got {value.device}")


def _savable(value: Tensor) -> Tensor:
    """Copies a tensor of torch.inference_mode, which autograd cannot save for a backward."""
    return value.clone() if not torch.compiler.is_compiling() and value.is_inference() else value


def check_ids(name: str, value: Any, features: Tensor) -> Tensor:
    """Checks one integer per sample of ``features`` and returns them as int64.

    Raises:
        TypeError: not a tensor.
        ValueError: wrong dtype, shape or device.
    """
    count = features.shape[0]

    def contract() -> str:
        axis = "B" if features.dim() == 3 else "N"
        return f"{name} must be integers of shape [{axis}]=[{count}] (one per sample)"

    if not isinstance(value, Tensor):
        raise TypeError(f"{contract()}, got {describe_no_tensor(value)}")
    if value.dtype not in _INTEGERS or value.shape != (count,):
        raise ValueError(f"{contract()}, got {describe(value)}")
    if value.device != features.device:
        raise ValueError(f"{contract()} on {features.device}, got it on {value.device}")
    return _savable(value if value.dtype == torch.int64 else value.long()).contiguous()


def check_row_weights(name: str, value: Any, features: Tensor, *, zero: bool) -> Tensor:
    """Checks weights of samples or rows, and returns one weight for each row, without gradient.

    Args:
        name: of the argument.
        value: [B], one weight per sample, or [B, V] for features [B, V, D].
        features: [N, D] or [B, V, D].
        zero: whether a weight may be 0. Values are checked only on a CPU in eager mode.

    Returns:
        [N], or [B * V] in the order of the rows; floating-point, at least float32.

    Raises:
        TypeError: not a tensor, or a tensor that requires a gradient.
        ValueError: wrong dtype, shape, device or value.
    """
    count, views = features.shape[0], features.shape[1] if features.dim() == 3 else 1

    def contract() -> str:
        several = f"[B]=[{count}] or [B, V]=[{count}, {views}]"
        shape = several if features.dim() == 3 else f"[N]=[{count}]"
        least = "at least 0" if zero else "greater than 0"
        return f"{name} must be finite floating-point numbers of shape {shape}, {least}"

    if not isinstance(value, Tensor):
        raise TypeError(f"{contract()}, got {describe_no_tensor(value)}")
    if value.requires_grad:
        raise TypeError(f"{name} is not differentiable: pass {name}.detach()")
    per_row = features.dim() == 3 and value.dim() == 2 and value.shape[1] == views
    if not value.is_floating_point() or not (per_row or value.dim() == 1) or value.shape[0] != count:
        raise ValueError(f"{contract()}, got {describe(value)}")
    if value.device != features.device:
        raise ValueError(f"{contract()} on {features.device}, got it on {value.device}")
    weights = value.to(torch.promote_types(value.dtype, torch.float32))
    if value.device.type == "cpu" and is_eager(value) and value.numel():
        low, high = torch.aminmax(weights)
        if not (low >= 0 if zero else low > 0) or not high < torch.inf:
            shown = float(low) if not low > 0 else float(high)
            raise ValueError(f"{contract()}, got {shown:g}")
    weights = weights.reshape(-1) if per_row else weights.repeat_interleave(views) if views > 1 else weights
    return _savable(weights)


def check_hard_negatives(value: Any, features: Tensor) -> None:
    """Checks negatives of single samples, [B, K, D] for the features of B samples.

    Raises:
        TypeError: not a tensor.
        ValueError: wrong dtype, shape or device, or not finite (checked only on a CPU in eager mode).
    """
    count, width = features.shape[0], features.shape[-1]

    def contract() -> str:
        return f"hard_negatives must be floating-point of shape [B, K, D]=[{count}, K, {width}]"

    if not isinstance(value, Tensor):
        raise TypeError(f"{contract()}, got {describe_no_tensor(value)}")
    right = value.dim() == 3 and value.shape[0] == count and value.shape[2] == width
    if value.dtype not in _FLOATS or not right:
        raise ValueError(f"{contract()}, got {describe(value)}")
    if value.device != features.device:
        raise ValueError(f"{contract()} on {features.device}, got it on {value.device}")
    if value.device.type == "cpu" and is_eager(value) and not value.isfinite().all():
        raise ValueError("hard_negatives must be finite, got NaN or infinity")


def check_labelling(class_balance: Any, batch_negatives: Any, ignore_index: Any, unlabeled: Any) -> None:
    """Checks the options that say which rows are candidates.

    Raises:
        TypeError: an option has the wrong type.
        ValueError: an option has a wrong value, or options do not fit together.
    """
    for name, value in (("class_balance", class_balance), ("batch_negatives", batch_negatives)):
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {describe(value)}")
    check_choice("unlabeled", unlabeled, ("ignore", "instance"))
    if ignore_index is not None:
        if isinstance(ignore_index, bool) or not isinstance(ignore_index, numbers.Integral):
            raise TypeError(f"ignore_index must be an integer or None, got {describe(ignore_index)}")
        if not -(2**63) <= int(ignore_index) < 2**63:
            raise ValueError(f"ignore_index must be an integer of 64 bits, got {describe(ignore_index)}")
    if unlabeled != "ignore" and ignore_index is None:
        raise ValueError(f"unlabeled={unlabeled!r} needs ignore_index, the label of the unlabelled rows")


def check_mask(value: Any, features: Tensor, candidates: Tensor) -> Tensor:
    """Checks a mask of positives and returns it in a form that autograd can save.

    Raises:
        TypeError: not a tensor.
        ValueError: wrong dtype, shape or device.
    """
    rows, columns = features.shape[0], candidates.shape[0]

    def contract() -> str:
        return f"mask must be bool of shape [{rows}, {columns}] (samples of features x samples of candidates)"

    if not isinstance(value, Tensor):
        raise TypeError(f"{contract()}, got {describe_no_tensor(value)}")
    if value.dtype != torch.bool or value.dim() != 2 or value.shape[0] != rows or value.shape[1] != columns:
        raise ValueError(f"{contract()}, got {describe(value)}")
    if value.device != features.device:
        raise ValueError(f"{contract()} on {features.device}, got it on {value.device}")
    return _savable(value)


def check_gather(value: Any) -> None:
    """Checks that an object implements :class:`pysupcon.functional.Gather`; raises a TypeError otherwise."""
    if not callable(getattr(value, "begin", None)):
        raise TypeError(
            "gather must be an object with a method begin (pysupcon.functional.Gather; of a module also "
            f"False, True or 'ring'), got {describe(value)}"
        )
