"""Calls the raw operators of a sanitized library with valid and with invalid arguments.

    python fuzz.py LIBRARY NAMESPACE CALLS SEED

Fails if a valid problem is refused, if an invalid one is accepted, or if an error is not raised by a check of
the library. The sanitizers end the process at an invalid memory access. Prints the number of accepted and of
refused calls.
"""

from __future__ import annotations

import random
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from helpers.raw_operators import (  # fmt: skip
    DTYPES,
    FAULTS,
    FORMS,
    WEIGHT_FAULTS,
    Values,
    applied,
    call,
    draw,
    operators,
)

WEIGHTS = "log_weights", "candidate_log_weights"
SIZES = [1, 3, 40, 40, 40, 140]


def put_extreme_value(rng: random.Random, values: Values) -> bool:
    """Sometimes replace a number by NaN, infinity or 1e30, which may be accepted or refused."""
    if rng.random() < 0.8:
        return False
    name = rng.choice(
        [name for name in ("x", "candidates", "n", "p", "grad_n", "epsilon", *WEIGHTS) if name in values]
    )
    bad = rng.choice([float("nan"), float("inf"), -float("inf"), 1e30])
    if name == "epsilon":
        values[name] = 1e30
        return True
    values[name] = values[name].clone(memory_format=torch.contiguous_format)
    if values[name].numel():
        values[name].view(-1)[rng.randrange(values[name].numel())] = bad
    return True


def order_by_class(namespace: str, rng: random.Random) -> None:
    """Check order_by_class with random ids, and that invalid arguments are refused."""
    operator = getattr(torch.ops, namespace).order_by_class
    count, views = rng.choice(SIZES), rng.choice([1, 2, 3])
    ids = torch.tensor([rng.randint(-(2 ** rng.choice([2, 8, 63])), 2) for _ in range(count)])
    order, others = operator(ids, views)
    rows = ids.repeat_interleave(views)
    assert torch.equal(order, torch.argsort(rows, stable=True))
    assert torch.equal(others, (rows[:, None] == rows).sum(1) - 1)
    for wrong in ((ids.int(), views), (ids[None], views), (ids, -views), (ids, 2**40)):
        try:
            operator(*wrong)
        except ValueError as error:
            if not str(error).startswith("pysupcon: "):
                raise
        else:
            raise AssertionError(f"accepted: {wrong}")


def main(library: str, namespace: str, calls: str, seed: str) -> None:
    torch.ops.load_library(library)
    torch.set_num_threads(2)
    rng, refused, accepted, accepted_extreme = random.Random(int(seed)), Counter[str](), 0, 0
    taken = operators(namespace)
    for number in range(int(calls)):
        name = rng.choice(list(taken))
        size, weights = rng.choice(SIZES), rng.random() < 0.5
        values = draw(rng, rng.choice(FORMS), rng.choice(DTYPES), size, weights)
        extreme = put_extreme_value(rng, values)
        wrong: dict[str, Any] = {}
        faults = []
        for fault in rng.sample([*FAULTS, *WEIGHT_FAULTS], rng.choice([0, 8])):
            changed = applied(fault, taken[name], values)
            if changed is not None and fault.argument not in wrong and len(faults) < 1 + (number % 8 == 0):
                wrong[fault.argument] = changed[fault.argument]
                faults.append(fault)
        values |= wrong
        if number % 100 == 0:
            order_by_class(namespace, rng)
        try:
            call(namespace, name, values)
        except ValueError as error:
            message = str(error).split("\n")[0]
            if not message.startswith(("pysupcon: ", "features must be ")):
                raise
            if not faults and not extreme:
                raise
            if len(faults) == 1 and not extreme and not re.search(faults[0].message, message):
                raise
            refused[re.sub(r"-?\d+", "#", message.split(", got")[0])] += 1
        else:
            if faults:
                raise AssertionError(f"{name} accepted {[fault.name for fault in faults]}")
            accepted += 1
            accepted_extreme += extreme
    print(
        f"{calls} calls: {accepted} accepted ({accepted_extreme} with extreme values), "
        f"{refused.total()} refused"
    )
    for message, count in refused.most_common():
        print(f"{count:6} {message}")


if __name__ == "__main__":
    main(*sys.argv[1:])
