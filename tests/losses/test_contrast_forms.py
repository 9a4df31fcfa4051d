"""Memory, own hard negatives, weights, ignored labels and class balance, against the definition by pair."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.cases import CASES, LOSSES, naive
from helpers.contrast_forms import MEMORY, OPTIONS, TEMPERATURE, B, D, K, V, build, differentiable
from helpers.tolerances import GRADCHECK
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import pysupcon
from pysupcon import functional
from pysupcon.profiling.recorder import allocated_peak

MEMORY_OF_THREE = {"memory": torch.ones(3, D), "memory_labels": torch.zeros(3, dtype=torch.int64)}


def cases() -> Iterator[Any]:
    """Every loss with every form that it takes: cNCE has no negatives."""
    for name in LOSSES:
        for option, parts in OPTIONS.items():
            if name != "cnce" or "hard" not in parts:
                yield pytest.param(name, option, id=f"{name}-{option}")


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("name", "option"), list(cases()))
def test_value_and_gradient(name: str, option: str, reduction: str, backend: str) -> None:
    """Float64, against the definition: 1e-10, some 1e6 roundings of numbers of size 1 to 10."""
    x, given = build(OPTIONS[option])
    leaves = [leaf.requires_grad_() for leaf in differentiable(x, given)]
    upstream = torch.rand(()) if reduction == "mean" else None
    results = []
    for loss in (LOSSES[name], lambda *a, **k: naive(name, *a, **k)):
        extra = {} if loss is not LOSSES[name] else {"backend": backend}
        value = loss(x, temperature=TEMPERATURE, reduction=reduction, **given, **extra)
        if upstream is None:
            upstream = torch.rand(value.shape, dtype=torch.float64)
        grads = torch.autograd.grad((value * upstream).sum(), leaves)
        results.append([value, *grads])
    for got, truth in zip(*results, strict=True):
        torch.testing.assert_close(got, truth, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("option", ["everything", "unlabelled and memory", "keys"])
@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"cnce"}))
def test_gradcheck(name: str, option: str, backend: str) -> None:
    x, given = build(OPTIONS[option])
    temperature = torch.tensor(TEMPERATURE, dtype=torch.float64, requires_grad=True)

    def loss(temperature: Tensor, *leaves: Tensor) -> Tensor:
        rows, *rest = leaves
        names = [name for name in ("candidates", "hard_negatives") if name in given]
        arguments = {**given, **dict(zip(names, rest, strict=True))}
        return LOSSES[name](rows, temperature=temperature, backend=backend, **arguments)

    leaves = [leaf.requires_grad_() for leaf in differentiable(x, given)]
    assert torch.autograd.gradcheck(loss, (temperature, *leaves), **GRADCHECK)


@pytest.mark.parametrize("name", ["supcon", "sincere"])
def test_ignored_rows_have_no_gradient(name: str, backend: str) -> None:
    x, given = build(("ignored",))
    LOSSES[name](x.requires_grad_(), temperature=TEMPERATURE, backend=backend, **given).backward()
    assert x.grad is not None
    ignored = given["labels"] == -1
    assert (x.grad[ignored] == 0).all()
    assert (x.grad[~ignored] != 0).any(-1).all()


def test_statistics_of_ignored_rows(backend: str) -> None:
    x, given = build(("ignored",))
    s = functional.pair_statistics(x, backend=backend, **given)
    ignored = (given["labels"] == -1).repeat_interleave(V)
    assert (s.positive_logsumexp[ignored] == -torch.inf).all()
    assert not s.positive_mean[ignored].any()
    assert not s.positive_count[ignored].any()


def test_weights_of_one_change_nothing(backend: str) -> None:
    """1e-15 is four roundings: a weight of 1 has the logarithm 0."""
    x, given = build(("memory",))
    plain = functional.supcon(x, backend=backend, **given)
    ones = {"candidate_weights": torch.ones(B), "memory_weights": torch.ones(MEMORY)}
    torch.testing.assert_close(
        functional.supcon(x, backend=backend, **given, **ones), plain, rtol=1e-15, atol=0
    )
    weights = {"anchor_weights": torch.full((B,), 3.0)}
    torch.testing.assert_close(functional.supcon(x, backend=backend, **given, **weights), plain)


def test_whole_weights_repeat_a_candidate(backend: str) -> None:
    """A candidate of weight 3 counts as three candidates in every sum."""
    x, queue = torch.randn(5, D, dtype=torch.float64), torch.randn(4, D, dtype=torch.float64)
    labels, queue_labels = torch.tensor([0, 1, 0, 1, 1]), torch.tensor([1, 1, 2, 2])
    weights = torch.tensor([1.0, 1.0, 3.0, 2.0])
    repeats = weights.long()
    arguments = {"temperature": TEMPERATURE, "backend": backend}
    once = functional.supcon(
        x, labels, memory=queue, memory_labels=queue_labels, memory_weights=weights, **arguments
    )
    repeated = functional.supcon(
        x, labels, memory=queue.repeat_interleave(repeats, 0),
        memory_labels=queue_labels.repeat_interleave(repeats), **arguments,
    )  # fmt: skip
    torch.testing.assert_close(once, repeated)


@pytest.mark.parametrize("name", CASES)
def test_empty_slots_belong_to_no_class(name: str, backend: str) -> None:
    """Their class is neither one of the anchors nor one of the candidates (-2 here), which class_balance
    counts."""
    x, given = build(("class_balance", "candidates", "memory"))
    given["candidate_labels"] = torch.tensor([-2, -2, 1, 0])
    arguments = {"temperature": TEMPERATURE, "backend": backend}
    truth = LOSSES[name](x, **given, **arguments)
    for key, padding in (("memory", torch.zeros(3, D)), ("memory_labels", torch.full((3,), 1))):
        given[key] = torch.cat([given[key], padding.to(given[key])])
    given["memory_instances"] = torch.cat([given["memory_instances"], torch.full((3,), 5)])
    weights = torch.cat([torch.ones(MEMORY), torch.zeros(3)])
    got = LOSSES[name](x, memory_weights=weights, **given, **arguments)
    torch.testing.assert_close(got, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_memory_of_a_queue(name: str, backend: str) -> None:
    """Empty slots of a queue are no candidates."""
    loss, own = CASES[name]
    queue = pysupcon.MemoryQueue(20, D, dtype=torch.float64)
    x, given = build(("memory",))
    instances = torch.arange(10, 16)
    queue.enqueue(given["memory"], given["memory_labels"], torch.arange(MEMORY))
    module = loss(temperature=TEMPERATURE, backend=backend, **own)
    got = module(x, given["labels"], instances=instances, memory=queue)
    given.pop("labels")
    truth = module(
        x,
        torch.tensor([1, 0, 1, -1, 0, -1]),
        instances=instances,
        memory_instances=torch.arange(MEMORY),
        **given,
    )
    torch.testing.assert_close(got, truth, rtol=1e-12, atol=1e-12)


def test_moco(backend: str) -> None:
    """MoCo (He et al. 2020): the positive is the own key, the negatives are the queue."""
    queries, keys = torch.randn(5, D, dtype=torch.float64), torch.randn(5, D, dtype=torch.float64)
    queue = torch.randn(11, D, dtype=torch.float64)
    loss = pysupcon.InfoNCELoss(TEMPERATURE, batch_negatives=False, backend=backend)
    logits = torch.cat([(queries * keys).sum(1, keepdim=True), queries @ queue.T], 1) / TEMPERATURE
    truth = torch.nn.functional.cross_entropy(logits, torch.zeros(5, dtype=torch.int64))
    torch.testing.assert_close(loss(queries, candidates=keys, memory=queue), truth, rtol=1e-12, atol=0)


def test_unlabelled_rows_equal_rows_of_single_classes(backend: str) -> None:
    x, given = build(("unlabelled",))
    single = torch.tensor([1, 0, 1, 7, 0, 8])
    got = functional.supcon(x, backend=backend, **given)
    torch.testing.assert_close(got, functional.supcon(x, single, backend=backend))


@pytest.mark.parametrize("low", [-(2**63), -5])
def test_labels_at_the_ends_of_int64(low: int, backend: str) -> None:
    """A memory row of weight 0 needs a class that no anchor has, also where the smallest label is used."""
    x = torch.randn(4, D, dtype=torch.float64)
    labels = torch.tensor([low, 2**63 - 1, low, low + 1])
    memory = torch.randn(3, D, dtype=torch.float64)
    arguments = {
        "memory": memory,
        "memory_labels": labels[:3],
        "temperature": TEMPERATURE,
        "backend": backend,
    }
    got = functional.supcon(x, labels, memory_weights=torch.tensor([1.0, 0.0, 1.0]), **arguments)
    keep = [0, 2]
    arguments |= {"memory": memory[keep], "memory_labels": labels[keep]}
    torch.testing.assert_close(got, functional.supcon(x, labels, **arguments), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["supcon", "sincere", "spread"])
def test_other_dtypes(name: str, dtype: torch.dtype, backend: str) -> None:
    """Against the float64 value of the same rounded rows; 1e-5 is about 100 roundings of float32."""
    x, given = build(OPTIONS["everything"], dtype)
    got = LOSSES[name](x.requires_grad_(), temperature=TEMPERATURE, backend=backend, **given)
    got.backward()
    assert got.dtype == torch.float32
    assert x.grad is not None
    assert x.grad.dtype == dtype
    torch.testing.assert_close(
        got.double(), naive(name, x, temperature=TEMPERATURE, **given), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("name", ["supcon", "sincere"])
def test_compile(name: str) -> None:
    """One graph for every size of the batch and of the memory."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(LOSSES[name], fullgraph=True, backend=counter, dynamic=True)
    for rows in (7, 11, 13):
        x = torch.randn(rows, V, D, dtype=torch.float64)
        labels = torch.arange(rows) % 3 - 1
        given: dict[str, Any] = {
            "memory": torch.randn(2 * rows, D, dtype=torch.float64),
            "memory_labels": torch.arange(2 * rows) % 3 - 1,
            "hard_negatives": torch.randn(rows, K, D, dtype=torch.float64),
            "candidate_weights": torch.rand(rows) + 0.1,
            "ignore_index": -1,
            "class_balance": True,
        }
        results = []
        for loss in (compiled, LOSSES[name]):
            leaf = x.clone().requires_grad_()
            value = loss(leaf, labels, temperature=TEMPERATURE, **given)
            value.backward()
            results.append((value, leaf.grad))
        for got, truth in zip(*results, strict=True):
            torch.testing.assert_close(got, truth)
    assert counter.frame_count <= 2  # torch compiles once more for the number temperature


def test_memory_is_linear() -> None:
    """What torch allocates for the loss grows with the rows, not with their product."""

    def peak(rows: int) -> int:
        x = torch.randn(rows, 8, requires_grad=True)
        labels = torch.arange(rows) % 10
        memory = torch.randn(rows, 8)

        def step() -> None:
            functional.supcon(x, labels, memory=memory, memory_labels=labels).backward()

        step()
        return allocated_peak(torch.device("cpu"), step)

    small, large = peak(1024), peak(4096)
    assert large < 4.5 * small


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"memory_labels": torch.zeros(2)}, "memory_labels needs memory"),
        ({"memory_weights": torch.ones(2)}, "memory_weights and exclude_batch_from_memory need memory"),
        ({"memory": torch.randn(3, D)}, "memory_labels must be given when labels and memory are"),
        ({"memory": torch.randn(3, 5)}, "memory must have the width D=4 of features"),
        ({"memory": torch.randn(3, 1, D)}, "memory must be rows of shape"),
        (
            {**MEMORY_OF_THREE, "memory": torch.randn(3, D, requires_grad=True)},
            "memory gets no gradient",
        ),
        (
            {
                "memory": torch.randn(3, D),
                "memory_labels": torch.zeros(3).long(),
                "memory_weights": -torch.ones(3),
            },
            "memory_weights must be finite floating-point numbers of shape",
        ),
        (
            {
                "memory": torch.randn(3, D),
                "memory_labels": torch.zeros(3).long(),
                "exclude_batch_from_memory": True,
            },
            "exclude_batch_from_memory needs instances and memory_instances",
        ),
        ({"hard_negatives": torch.randn(B, D)}, "hard_negatives must be floating-point of shape"),
        ({"hard_negatives": torch.full((B, 1, D), torch.nan)}, "hard_negatives must be finite"),
        ({"candidate_weights": torch.zeros(B)}, "candidate_weights must be finite .* greater than 0, got 0"),
        ({"candidate_weights": torch.ones(B + 1)}, "candidate_weights must be finite"),
        ({"anchor_weights": torch.full((B,), torch.nan)}, "anchor_weights must be finite"),
        ({"anchor_weights": torch.ones(B, requires_grad=True)}, "anchor_weights is not differentiable"),
        ({"labels": None, "mask": torch.eye(B).bool(), "memory": torch.randn(3, D)}, "not a mask"),
        ({"batch_negatives": False}, "batch_negatives=False leaves no negatives"),
        ({"unlabeled": "instance"}, "needs ignore_index"),
        ({"ignore_index": 0.5}, "ignore_index must be an integer or None"),
        ({"class_balance": 1}, "class_balance must be True or False"),
        ({"labels": None, "ignore_index": -1}, "ignore_index needs labels"),
        ({"labels": None, "class_balance": True}, "class_balance needs labels"),
    ],
)
def test_errors(arguments: dict[str, Any], message: str) -> None:
    given = {"labels": torch.zeros(B, dtype=torch.int64), **arguments}
    with pytest.raises((ValueError, TypeError), match=message):
        functional.supcon(torch.randn(B, V, D), **given)


def test_a_loss_without_negatives_refuses_hard_negatives() -> None:
    with pytest.raises(ValueError, match="contrasts with positives only: hard_negatives must be None"):
        functional.class_conditional_info_nce(
            torch.randn(B, V, D), torch.zeros(B, dtype=torch.int64), hard_negatives=torch.randn(B, K, D)
        )


def test_self_supervised_modules_refuse_options_of_labels() -> None:
    with pytest.raises(ValueError, match="class_balance and ignore_index need a loss with labels"):
        pysupcon.InfoNCELoss(ignore_index=-1)
    with pytest.raises(ValueError, match="labels, mask, candidate_labels and memory_labels"):
        pysupcon.InfoNCELoss()(
            torch.randn(B, V, D), memory=torch.randn(3, D), memory_labels=torch.zeros(3, dtype=torch.int64)
        )
