"""MemoryQueue: order, empty slots, state, moves, compilation and errors."""

from __future__ import annotations

import copy
from collections import deque
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode

import pysupcon
from pysupcon import MemoryQueue
from pysupcon.distributed import AllGather
from pysupcon.pairs.memory import NO_ID

DIM = 3
BUFFERS = ("rows", "labels", "instances", "position", "filled")


def _rows(count: int, start: int = 0) -> Tensor:
    """Rows that differ from one another and from zero."""
    return torch.arange(start + 1, start + count + 1).unsqueeze(1) * torch.tensor([1.0, 10.0, 100.0])


def _fill(queue: MemoryQueue, counts: list[int]) -> MemoryQueue:
    start = 0
    for count in counts:
        ids = torch.arange(start, start + count)
        queue.enqueue(_rows(count, start), ids % 3, ids)
        start += count
    return queue


def _assert_same(queue: MemoryQueue, other: MemoryQueue) -> None:
    for name in BUFFERS:
        assert torch.equal(getattr(queue, name), getattr(other, name)), name


@given(size=st.integers(1, 7), counts=st.lists(st.integers(0, 16), max_size=6))
def test_first_in_first_out(size: int, counts: list[int]) -> None:
    queue = _fill(MemoryQueue(size, DIM), counts)
    expected = deque(range(sum(counts)), maxlen=size)
    kept = queue.weights == 1
    assert int(kept.sum()) == int(queue.filled) == len(expected)
    assert sorted(queue.instances[kept].tolist()) == list(expected)
    assert torch.equal(queue.rows[kept], _rows(sum(counts))[queue.instances[kept]])
    assert torch.equal(queue.labels[kept], queue.instances[kept] % 3)
    assert (queue.rows[~kept] == 0).all()
    assert (queue.labels[~kept] == NO_ID).all()
    assert (queue.instances[~kept] == NO_ID).all()
    if len(expected) == size:  # the next slot holds the oldest row
        assert int(queue.instances[queue.position]) == expected[0]


def test_views_are_flattened_and_labels_repeated() -> None:
    queue = MemoryQueue(5, DIM)
    views = _rows(4).view(2, 2, DIM)
    queue.enqueue(views, torch.tensor([7, 8], dtype=torch.uint8), torch.tensor([1, 0], dtype=torch.int32))
    assert torch.equal(queue.rows[:4], _rows(4))
    assert queue.labels.tolist() == [7, 7, 8, 8, NO_ID]
    assert queue.instances.tolist() == [1, 1, 0, 0, NO_ID]


def test_ids_that_are_not_given() -> None:
    queue = MemoryQueue(3, DIM)
    queue.enqueue(_rows(3), torch.arange(3), torch.arange(3))
    queue.enqueue(_rows(2))
    assert queue.labels.tolist() == queue.instances.tolist() == [NO_ID, NO_ID, 2]


def test_rows_are_copied_without_gradient() -> None:
    queue, rows = MemoryQueue(4, DIM), _rows(2).requires_grad_()
    queue.enqueue(rows * 1.0)
    queue.enqueue(rows)
    with torch.inference_mode():
        inferred = _rows(1)
    queue.enqueue(inferred)
    with torch.no_grad():
        rows += 1
    assert not queue.rows.requires_grad
    assert queue.rows.grad_fn is None
    assert torch.equal(queue.rows, _rows(2).repeat(2, 1))


def test_a_backward_after_enqueue_is_refused() -> None:
    """Never a gradient of other rows than those of the forward."""
    queue, x = _fill(MemoryQueue(4, DIM), [4]), torch.randn(2, DIM, requires_grad=True)
    value = (x @ queue.rows.T).sum()
    queue.enqueue(_rows(1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


LOSSES_WITH_QUEUE = {
    "supcon": pysupcon.SupConLoss,
    "sincere": pysupcon.SINCERELoss,
    "spread": pysupcon.SpreadLoss,
    "dcl": pysupcon.DCLLoss,
    "infonce": pysupcon.InfoNCELoss,
}


def _labels(name: str) -> tuple[Tensor, ...]:
    return () if name == "infonce" else (torch.arange(4) % 3,)


@pytest.mark.parametrize("batches", [0, 1, 2, 5])
@pytest.mark.parametrize("name", LOSSES_WITH_QUEUE)
def test_empty_slots_are_no_candidates(name: str, batches: int) -> None:
    """The loss with a queue of ten rows is that with the filled rows alone; value and gradient."""
    loss, queue = LOSSES_WITH_QUEUE[name](temperature=0.5), MemoryQueue(10, DIM, dtype=torch.float64)
    x = torch.randn(4, 2, DIM, dtype=torch.float64, requires_grad=True)
    labels, instances = _labels(name), torch.arange(10, 14)
    for batch in range(batches):
        ids = torch.arange(9, 12) + batch  # some are rows of the batch's samples
        queue.enqueue(torch.randn(3, DIM), ids % 3, ids)
    filled = queue.weights > 0
    rows = {"memory": queue.rows[filled], "memory_instances": queue.instances[filled]}
    rows |= {"memory_labels": queue.labels[filled]} if labels else {}
    for exclude in (False, True):
        options = {"instances": instances, "exclude_batch_from_memory": exclude}
        value = loss(x, *labels, memory=queue, **options)
        expected = loss(x, *labels, **options, **rows) if batches else loss(x, *labels, instances=instances)
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
        gradients = (torch.autograd.grad(loss, x)[0] for loss in (value, expected))
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-13)


def test_a_training_step_compiles_to_one_graph() -> None:
    """Loss and enqueue; no graph for each step."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    loss, queue, eager = pysupcon.SupConLoss(0.5), MemoryQueue(10, DIM), MemoryQueue(10, DIM)
    labels = torch.arange(4) % 3
    compiled = torch.compile(lambda x: loss(x, labels, memory=queue), fullgraph=True, backend=counter)
    enqueue = torch.compile(queue.enqueue, fullgraph=True, backend=counter)
    for _ in range(4):
        x = torch.randn(4, DIM, requires_grad=True)
        value, expected = compiled(x), loss(x, labels, memory=eager)
        gradients = (torch.autograd.grad(loss, x)[0] for loss in (value, expected))
        torch.testing.assert_close(*gradients)
        torch.testing.assert_close(value, expected)
        enqueue(x, labels)
        eager.enqueue(x, labels)
        _assert_same(queue, eager)
    assert counter.frame_count == 2  # the loss, and enqueue


def test_enqueue_between_forward_and_backward_of_a_loss() -> None:
    queue, x = _fill(MemoryQueue(4, DIM), [4]), torch.randn(4, DIM, requires_grad=True)
    labels = torch.arange(4) % 3
    value = pysupcon.SupConLoss(0.5)(x, labels, memory=queue)
    queue.enqueue(x, labels)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_reset() -> None:
    queue = _fill(MemoryQueue(4, DIM), [3, 3])
    queue.reset()
    _assert_same(queue, MemoryQueue(4, DIM))
    _assert_same(_fill(queue, [3, 2]), _fill(MemoryQueue(4, DIM), [3, 2]))


@pytest.mark.parametrize("counts", [[], [3], [3, 3]])
def test_resumption(counts: list[int]) -> None:
    queue = _fill(MemoryQueue(4, DIM), counts)
    resumed = MemoryQueue(4, DIM)
    resumed.load_state_dict(queue.state_dict(), strict=True)
    copied = copy.deepcopy(queue)
    for other in (resumed, copied):
        _assert_same(queue, other)
    for other in (queue, resumed, copied):
        other.enqueue(_rows(2, 50), torch.arange(2), torch.arange(2))
    for other in (resumed, copied):
        _assert_same(queue, other)
        assert other.rows.data_ptr() != queue.rows.data_ptr()


def test_the_state_holds_all_buffers() -> None:
    queue = MemoryQueue(4, DIM)
    assert tuple(queue.state_dict()) == BUFFERS
    assert not list(queue.parameters())
    with pytest.raises(RuntimeError, match="size mismatch for rows"):
        queue.load_state_dict(MemoryQueue(5, DIM).state_dict())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_rows_follow_the_dtype(dtype: torch.dtype) -> None:
    queue = _fill(MemoryQueue(4, DIM), [2]).to(dtype)
    queue.enqueue(_rows(1, 2).double(), torch.tensor([2]), torch.tensor([2]))
    assert torch.equal(queue.rows, torch.cat([_rows(3), torch.zeros(1, DIM)]).to(dtype))
    assert queue.weights.dtype == dtype
    assert queue.weights.tolist() == [1, 1, 1, 0]
    assert {getattr(queue, name).dtype for name in BUFFERS[1:]} == {torch.int64}
    assert MemoryQueue(4, DIM, dtype=dtype).rows.dtype == dtype


def test_the_queue_moves_to_another_device() -> None:
    queue = MemoryQueue(4, DIM).to("meta")
    assert {buffer.device.type for buffer in queue.buffers()} == {"meta"}
    assert queue.weights.device.type == MemoryQueue(4, DIM, device="meta").rows.device.type == "meta"
    with pytest.raises(ValueError, match="rows must be on the queue's device, meta, got cpu"):
        queue.enqueue(_rows(1))


def test_nothing_waits_for_a_device() -> None:
    """Fake tensors have no values: reading one raises an error."""
    with FakeTensorMode():
        for device in ("cpu", "cuda"):
            queue = MemoryQueue(4, DIM, device=device)
            for count in (3, 3, 6, 0):
                rows, ids = torch.empty(count, DIM, device=device), torch.empty(count, device=device).long()
                queue.enqueue(rows, ids, ids)
                assert queue.weights.shape == (4,)
            queue.reset()


@pytest.mark.parametrize("dynamic", [None, True])
def test_enqueue_compiles_to_one_graph(dynamic: bool | None) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    queue, eager = MemoryQueue(5, DIM), MemoryQueue(5, DIM)

    def step(rows: Tensor, ids: Tensor) -> Tensor:
        queue.enqueue(rows, ids % 3, ids)
        return queue.weights

    compiled, start = torch.compile(step, fullgraph=True, backend=counter, dynamic=dynamic), 0
    for _ in range(6):
        ids = torch.arange(start, start + 2)
        weights = compiled(_rows(2, start), ids)
        eager.enqueue(_rows(2, start), ids % 3, ids)
        assert torch.equal(weights, eager.weights)
        _assert_same(queue, eager)
        start += 2
    assert counter.frame_count == 1


def test_enqueue_compiles_for_batches_of_changing_size() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    queue, eager = MemoryQueue(5, DIM), MemoryQueue(5, DIM)
    compiled = torch.compile(queue.enqueue, fullgraph=True, backend=counter)
    for count in (2, 3, 4, 2, 7, 8, 9, 0, 3):
        compiled(_rows(count), torch.arange(count))
        eager.enqueue(_rows(count), torch.arange(count))
        _assert_same(queue, eager)
    assert counter.frame_count <= 5  # fixed size, any size, larger than the queue, empty


def test_gather_in_one_process() -> None:
    queue = MemoryQueue(4, DIM)
    queue.enqueue(_rows(3), torch.arange(3), gather=True)
    queue.enqueue(_rows(1, 3), torch.tensor([3]), gather="ring")
    queue.enqueue(_rows(1), torch.tensor([4]), gather=AllGather())
    assert queue.labels.tolist() == [4, 1, 2, 3]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rows": [[1.0]]}, TypeError, r"rows must be a float tensor of shape \[N, D\] or \[B, V, D\], got"),
        ({"rows": torch.ones(2)}, ValueError, r"rows must be float64.*got float32 of shape \[2\]"),
        ({"rows": torch.ones(2, DIM, dtype=torch.int64)}, ValueError, "rows must be float64.*got int64"),
        ({"rows": torch.ones(2, 4)}, ValueError, r"rows must have the width D=3 of the queue, got float32"),
        ({"labels": torch.ones(2)}, ValueError, r"labels must be integers of shape \[N\]=\[2\].*float32"),
        ({"labels": torch.arange(3)}, ValueError, r"labels must be integers of shape \[N\]=\[2\].*\[3\]"),
        ({"instances": [1, 2]}, TypeError, r"instances must be integers of shape \[N\]=\[2\]"),
        ({"gather": "all"}, ValueError, "gather must be one of False, True, 'ring', got 'all'"),
        ({"gather": None}, TypeError, "gather must be an object with a method begin"),
    ],
)  # fmt: skip
def test_errors_of_enqueue(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    queue = _fill(MemoryQueue(4, DIM), [3])
    before = copy.deepcopy(queue)
    with pytest.raises(error, match=message):
        queue.enqueue(**{"rows": torch.ones(2, DIM), **arguments})
    _assert_same(queue, before)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"size": 0}, ValueError, "size must be at least 1, got 0"),
        ({"dim": -1}, ValueError, "dim must be at least 1, got -1"),
        ({"size": 4.0}, TypeError, "size must be an integer, got float 4.0"),
        ({"dim": True}, TypeError, "dim must be an integer, got True"),
        ({"dtype": torch.int64}, ValueError, "dtype must be float64, float32, bfloat16 or float16, got"),
    ],
)
def test_errors_of_the_constructor(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MemoryQueue(**{"size": 4, "dim": DIM, **arguments})


def test_repr() -> None:
    assert repr(MemoryQueue(4, DIM)) == "MemoryQueue(size=4, dim=3, dtype=torch.float32)"
