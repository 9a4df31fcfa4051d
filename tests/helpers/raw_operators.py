"""Calls the raw operators by argument name: random valid problems, and problems with one invalid argument.

The arguments of an operator are read from its schema, so that new operators and arguments are included. This
module does not import the package, because it is also used where only a sanitized library of the operators is
loaded.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

Values = dict[str, Any]
FORMS = ["self", "candidates", "self index", "own rows"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@functools.cache
def operators(namespace: str) -> dict[str, list[str]]:
    """Argument names of the operators on pairs, without the operators that take a backend."""
    prefix = namespace + "::"
    schemas = [schema for schema in torch._C._jit_get_all_schemas() if schema.name.startswith(prefix)]
    taken = {s.name.removeprefix(prefix): [argument.name for argument in s.arguments] for s in schemas}
    return {
        name: taken[name] for name in sorted(taken) if "order" in taken[name] and "backend" not in taken[name]
    }


def call(namespace: str, name: str, values: Values) -> Any:
    operator = getattr(getattr(torch.ops, namespace), name)
    return operator(**{argument: values.get(argument) for argument in operators(namespace)[name]})


STATISTICS = ("n", "p", "grad_n", "grad_p", "grad_positive_sum", "grad_instance_sum", "grad_total")


def sort(labels: Tensor, instances: Tensor) -> Tensor:
    """The stable argsort by label, then by instance."""
    order = torch.argsort(instances, stable=True)
    return order[torch.argsort(labels[order], stable=True)]


def draw(
    rng: random.Random, form: str, dtype: torch.dtype, max_rows: int = 40, weights: bool = False
) -> Values:
    """A random valid problem with all arguments of all operators.

    ``weights``: also with those that only the CPU has: log weights and the mean of the negatives. "Own rows"
    have no ``log_weights``, which only the backward operators take.
    """
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    rows, width, classes = rng.randint(0, max_rows), rng.randint(1, 20), rng.choice([1, 3, 9, 50])

    def normal(*shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        if len(shape) == 2 and rng.random() < 0.3:
            return torch.cat([drawn, drawn], 1)[:, : shape[1]]  # strided rows
        if len(shape) == 2 and rng.random() < 0.1:
            return drawn[:1].expand(shape) if shape[0] else drawn  # an expanded row
        return drawn.T.contiguous().T if rng.random() < 0.1 else drawn

    def column(size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    def ids(size: int) -> Tensor:
        drawn = torch.randint(-classes, classes, (size,), generator=generator)
        return drawn.repeat_interleave(2)[::2] if rng.random() < 0.2 else drawn

    values: Values = {
        "scale": torch.tensor(rng.uniform(0.1, 3), dtype=torch.float64),
        "negatives": rng.random() < 0.8,
        "positives": rng.random() < 0.8,
        "epsilon": rng.choice([0.0, 0.25, -2.0]),
    }
    count = rng.randint(0, max_rows)
    if form != "self":
        values["candidates"], values["candidate_labels"] = normal(count, width), ids(count)
        values["candidate_instances"] = ids(count)
        values["candidate_order"] = sort(values["candidate_labels"], values["candidate_instances"])
    if form in ("self index", "own rows"):
        index = torch.randperm(count, generator=generator)[:rows]
        rows = len(index)
        values["x"], values["labels"] = values["candidates"][index], values["candidate_labels"][index]
        values["instances"] = values["candidate_instances"][index]
        if form == "self index":
            index[::3] = -1
        values["self_index"] = index
    else:
        values["x"], values["labels"], values["instances"] = normal(rows, width), ids(rows), ids(rows)
    values["order"] = sort(values["labels"], values["instances"])
    values |= {name: column(rows) for name in STATISTICS}
    if form == "own rows":
        values |= {f"candidate_{name}": column(count) for name in STATISTICS}
    wide = torch.promote_types(dtype, torch.float32)
    values["grad_x"] = torch.zeros(values["x"].shape, dtype=wide)
    if form in ("candidates", "self index") and rng.random() < 0.8:
        values["grad_candidates"] = torch.zeros(values["candidates"].shape, dtype=wide)
    if weights and form == "self":
        values["log_weights"] = column(rows)
    elif weights:
        values["candidate_log_weights"] = column(count)
        values["negative_mean"] = torch.zeros(values["x"].shape, dtype=wide)
    return values


class Fault(NamedTuple):
    """An invalid argument. ``change`` returns its value, or None if the problem cannot have this fault."""

    name: str
    argument: str
    change: Callable[[Values], Any]
    message: str
    on_device: bool = False
    """whether only the values of a tensor show the fault; those of GPU tensors are not checked"""


def _put(argument: str, value: float, at: int = 0) -> Callable[[Values], Any]:
    def change(values: Values) -> Any:
        tensor = values[argument].clone()
        if at >= len(tensor):
            return None
        tensor[at] = value
        return tensor

    return change


def _twice(argument: str) -> Callable[[Values], Any]:
    def change(values: Values) -> Any:
        tensor = values[argument].clone()
        if len(tensor) < 2:
            return None
        tensor[-1] = tensor[0]
        return tensor

    return change


def _unsorted(prefix: str) -> Callable[[Values], Any]:
    def change(values: Values) -> Any:
        order = values[f"{prefix}order"].flip(0)
        labels = values[f"{prefix}labels"][order]
        return order if (labels[1:] < labels[:-1]).any() else None

    return change


def _other_label(values: Values) -> Any:
    self_index = values["self_index"].clone()
    for anchor, label in enumerate(values["labels"].tolist()):
        others = (values["candidate_labels"] != label).nonzero()
        if len(others):
            self_index[anchor] = others[-1, 0]
            return self_index
    return None


def _whole(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda tensor: None if tensor.numel() == 0 else function(tensor)


def _index_faults(argument: str) -> list[Fault]:
    must = rf"{argument} must be int64 of shape \[\d+\] on cpu, got "
    return [
        Fault(f"{argument} {name}", argument, lambda values, f=f: f(values[argument]), must)
        for name, f in {
            "too long": lambda t: torch.cat([t, t.new_zeros(1)]),
            "too short": _whole(lambda t: t[1:]),
            "of two dimensions": lambda t: t.unsqueeze(1),
            "of no dimensions": lambda t: t.sum(),
            "int32": lambda t: t.int(),
            "float64": lambda t: t.double(),
        }.items()
    ]


def _order_faults(prefix: str) -> list[Fault]:
    order = f"{prefix}order"
    once = rf"{order} must hold each of 0 to \d+ once"
    far = [(value, at) for value in (-1, 10**6, 2**62, -(2**63)) for at in (0, 1)]
    return [
        *(Fault(f"{order} {value}", order, _put(order, value, at), once, True) for value, at in far),
        Fault(f"{order} with a row twice", order, _twice(order), once, True),
        Fault(
            f"{order} unsorted",
            order,
            _unsorted(prefix),
            f"{order} must be the argsort of {prefix}labels",
            True,
        ),
        *_index_faults(order),
    ]


def _column_faults(argument: str) -> list[Fault]:
    must = rf"{argument} must be floating-point of shape \[\d+\] on cpu, got "
    return [
        Fault(f"{argument} {name}", argument, lambda values, f=f: f(values[argument]), must)
        for name, f in {
            "too long": lambda t: torch.cat([t, t]) if len(t) else None,
            "too short": _whole(lambda t: t[1:]),
            "of two dimensions": lambda t: t.unsqueeze(0),
            "int64": lambda t: t.long(),
            "complex": lambda t: t.to(torch.complex64),
        }.items()
    ]


def _gradient_faults(argument: str) -> list[Fault]:
    def part_of_rows(values: Values) -> Any:
        rows = values["candidates" if argument == "grad_candidates" else "x"]
        right = rows.dtype in (torch.float32, torch.float64) and rows.is_contiguous()
        return rows if right and rows.numel() else None

    must = rf"{argument} must be a contiguous tensor of \w+ and shape"
    faults = {
        "too long": lambda t: torch.cat([t, t]) if len(t) else None,
        "of one dimension": lambda t: t.flatten(),
        "of another dtype": lambda t: t.float() if t.dtype == torch.float64 else t.double(),
        "half": lambda t: t.half(),
        "strided": lambda t: t.repeat(1, 2)[:, : t.shape[1]] if len(t) > 1 else None,
        "expanded": lambda t: t[:1].expand_as(t) if len(t) > 1 else None,
    }
    return [
        *(
            Fault(f"{argument} {name}", argument, lambda v, f=f: f(v[argument]), must)
            for name, f in faults.items()
        ),
        Fault(f"{argument} in the rows' memory", argument, part_of_rows, f"{argument} must not share memory"),
    ]


def _row_faults(argument: str) -> list[Fault]:
    must = rf"{argument} must be \[rows, D\] with D at least 1"
    return [
        Fault(f"{argument} of one dimension", argument, lambda v: v[argument].flatten(), must),
        Fault(f"{argument} of three dimensions", argument, lambda v: v[argument].unsqueeze(0), must),
        Fault(f"{argument} without columns", argument, lambda v: v[argument][:, :0], must),
    ]


def _scale(change: Callable[[Tensor], Tensor]) -> Callable[[Values], Any]:
    return lambda values: change(values["scale"])


SELF_INDEX = r"self_index must lie in \[-1, \d+\)"
NO_DIMENSIONS = "scale must be a floating-point tensor of no dimensions"
FAULTS = [
    *_order_faults(""),
    *_order_faults("candidate_"),
    *_index_faults("labels"),
    *_index_faults("candidate_labels"),
    *_index_faults("self_index"),
    *(
        Fault(f"self_index {value}", "self_index", _put("self_index", value, at), SELF_INDEX, True)
        for value, at in ((-2, 0), (10**6, 0), (2**40, 1), (-(2**63), 1))
    ),
    Fault("self_index of another label", "self_index", _other_label, "must name a candidate of the", True),
    *(fault for name in STATISTICS for fault in _column_faults(name)),
    *(fault for name in STATISTICS for fault in _column_faults(f"candidate_{name}")),
    *_index_faults("instances"),
    *_index_faults("candidate_instances"),
    *_row_faults("x"),
    *_row_faults("candidates"),
    Fault("x int32", "x", lambda v: v["x"].int(), "x must be float32, .* or float16, got Int"),
    Fault("x complex", "x", lambda v: v["x"].to(torch.complex64), "x must be float32, .* got ComplexFloat"),
    Fault(
        "candidates wider", "candidates", lambda v: v["candidates"].repeat(1, 2),
        r"candidates must be \w+ of shape \[N, \d+\] on cpu as x is, got",
    ),
    Fault(
        "candidates of another dtype", "candidates",
        lambda v: v["candidates"].to(torch.float32 if v["x"].dtype == torch.float64 else torch.float64),
        r"candidates must be \w+ of shape \[N, \d+\] on cpu as x is, got",
    ),
    Fault("candidates left out", "candidates", lambda v: "none", "go with candidates"),
    Fault("candidate_labels left out", "candidate_labels", lambda v: "none", "candidates need candidate_l"),
    Fault("candidate_order left out", "candidate_order", lambda v: "none", "candidates need candidate_l"),
    Fault("scale of one dimension", "scale", _scale(lambda s: s.view(1)), NO_DIMENSIONS),
    Fault("scale int64", "scale", _scale(lambda s: s.long() + 1), NO_DIMENSIONS),
    Fault("scale complex", "scale", _scale(lambda s: s.to(torch.complex128)), NO_DIMENSIONS),
    *(
        Fault(f"scale {x}", "scale", _scale(lambda s, x=x: s * 0 + x), "must be finite and greater", True)
        for x in (0.0, -1.0, torch.nan, torch.inf)
    ),
    Fault("epsilon NaN", "epsilon", lambda v: torch.nan, "epsilon must be finite"),
    *_gradient_faults("grad_x"),
    *_gradient_faults("grad_candidates"),
]  # fmt: skip

_WEIGHT = r"log_weights must lie between -1e14 and 1e14 or be -inf, got"
WEIGHT_FAULTS = [
    *(
        fault
        for name in ("log_weights", "candidate_log_weights")
        for fault in (
            *_column_faults(name),
            *(
                Fault(f"{name} {value}", name, _put(name, value, at), _WEIGHT, True)
                for value, at in ((torch.nan, 0), (torch.inf, 1), (1e15, 0))
            ),
        )
    ),
    *_gradient_faults("negative_mean"),
]
"""of the arguments that only the CPU has"""


def applied(fault: Fault, arguments: list[str], values: Values) -> Values | None:
    """The problem with this fault; None if the operator or the problem cannot have it."""
    if fault.argument not in arguments or values.get(fault.argument) is None:
        return None
    changed = fault.change(values)
    if changed is None:
        return None
    return {**values, fault.argument: None if isinstance(changed, str) else changed}
