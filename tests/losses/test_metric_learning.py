"""compat.MetricLearningSupConLoss in the wrappers of pytorch-metric-learning, and with listed pairs."""

from __future__ import annotations

import copy
import importlib.util
import pickle
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pysupcon import compat
from pysupcon.compat import listed_pairs as pairs_module
from pysupcon.compat import metric_learning as ours_module

losses = pytest.importorskip("pytorch_metric_learning.losses")
miners = pytest.importorskip("pytorch_metric_learning.miners")
distributed = pytest.importorskip("pytorch_metric_learning.utils.distributed")
pair_utils = pytest.importorskip("pytorch_metric_learning.utils.loss_and_miner_utils")

LABELS = torch.tensor([0, 1, 0, 2, 1, 1, 0, 5, 2])


def _rows(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _check(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], *given: Tensor) -> float:
    """Equal values, which are returned, and equal gradients of all ``given``, float64."""
    results = []
    for loss in (ours, theirs):
        leaves = [x.clone().requires_grad_() for x in given]
        value = loss(*leaves)
        results.append((value, torch.autograd.grad(value, leaves)))
    (got, got_grads), (want, want_grads) = results
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    for a, b in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    return got.item()


def _batches() -> list[tuple[Tensor, Tensor]]:
    """Batches of several sizes and labels that fill a memory of 20 rows more than twice."""
    sizes = [9, 6, 9, 4, 9, 9]
    return [
        (_rows(size, 6, seed=k), torch.randint(4, (size,), generator=torch.Generator().manual_seed(k)))
        for k, size in enumerate(sizes)
    ]


@pytest.fixture
def no_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Tensor:
        raise AssertionError("the N x M matrix was computed")

    monkeypatch.setattr(ours_module, "similarity", refuse)


@pytest.mark.parametrize("backend", ["auto", "tiled", "reference"])
@pytest.mark.usefixtures("no_matrix")
def test_cross_batch_memory(backend: str) -> None:
    got = losses.CrossBatchMemory(compat.MetricLearningSupConLoss(0.2, backend=backend), 6, memory_size=20)
    want = losses.CrossBatchMemory(losses.SupConLoss(0.2), 6, memory_size=20)
    _check_batches(got, want)


def _check_batches(got: Any, want: Any, **options: Callable[[Tensor], Any]) -> None:
    """A sequence of batches in two memories; ``options`` are functions of the labels of a batch."""
    values = []
    for x, labels in _batches():
        given = {name: option(labels) for name, option in options.items()}
        first = _check(
            lambda x, labels=labels, given=given: got(x, labels, **given),
            lambda x, labels=labels, given=given: want(x, labels, **given),
            x,
        )
        values.append(first)
        assert torch.equal(got.embedding_memory, want.embedding_memory)
    assert min(values[1:]) > 0.01


@pytest.mark.usefixtures("no_matrix")
def test_cross_batch_memory_with_its_enqueue_mask() -> None:
    """Rows that are not enqueued are the anchors; the memory does not hold them."""
    got = losses.CrossBatchMemory(compat.MetricLearningSupConLoss(), 6, memory_size=20)
    want = losses.CrossBatchMemory(losses.SupConLoss(), 6, memory_size=20)
    _check_batches(got, want, enqueue_mask=lambda labels: torch.arange(len(labels)) >= len(labels) // 2)


@pytest.mark.parametrize(
    "miner",
    [
        miners.MultiSimilarityMiner(epsilon=0.4),
        miners.BatchHardMiner(),
        miners.TripletMarginMiner(margin=0.5),
    ],
    ids=["pairs", "hard triplets", "triplets"],
)
def test_miners(miner: Any) -> None:
    got = losses.CrossBatchMemory(compat.MetricLearningSupConLoss(), 6, memory_size=20, miner=miner)
    want = losses.CrossBatchMemory(losses.SupConLoss(), 6, memory_size=20, miner=miner)
    _check_batches(got, want)
    for x, labels in _batches():
        pairs = miner(x, labels)
        for given in ((labels,), (None,)):  # labels may be None with pairs
            _check(
                lambda x, given=given, pairs=pairs: compat.MetricLearningSupConLoss()(x, *given, pairs),
                lambda x, given=given, pairs=pairs: losses.SupConLoss()(x, *given, pairs),
                x,
            )


def test_cross_batch_memory_with_further_pairs() -> None:
    """The wrapper joins them with its own, so pairs are listed twice."""
    x, labels = _batches()[0]
    pairs = miners.MultiSimilarityMiner()(x, labels)
    got, want = (
        losses.CrossBatchMemory(loss, 6, memory_size=20)
        for loss in (compat.MetricLearningSupConLoss(), losses.SupConLoss())
    )
    assert _check(lambda x: got(x, labels, pairs), lambda x: want(x, labels, pairs), x) > 0.1


@pytest.mark.parametrize("symmetric", [True, False])
def test_self_supervised_loss(symmetric: bool) -> None:
    got = losses.SelfSupervisedLoss(compat.MetricLearningSupConLoss(0.2), symmetric=symmetric)
    want = losses.SelfSupervisedLoss(losses.SupConLoss(0.2), symmetric=symmetric)
    assert _check(got, want, _rows(7, 6, seed=0), _rows(7, 6, seed=1)) > 0.1


def test_multiple_losses() -> None:
    other = losses.ContrastiveLoss()
    got = losses.MultipleLosses([compat.MetricLearningSupConLoss(), other], weights=[1, 0.5])
    want = losses.MultipleLosses([losses.SupConLoss(), other], weights=[1, 0.5])
    _check(lambda x: got(x, LABELS), lambda x: want(x, LABELS), _rows(9, 6, seed=0))


@pytest.fixture
def second_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wrapper sees two processes; its all_gather returns the rows of the other one."""
    other_labels = torch.tensor([1, 0, 2, 2, 3, 1, 0, 4, 4])
    answers = {torch.float64: _rows(9, 6, seed=5), torch.int64: other_labels}
    monkeypatch.setattr(distributed, "is_distributed", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_gather", lambda x: answers[x.dtype].to(x.dtype))


@pytest.mark.usefixtures("second_process", "no_matrix")
@pytest.mark.parametrize("efficient", [False, True])
def test_distributed_loss_wrapper(efficient: bool) -> None:
    got, want = (
        distributed.DistributedLossWrapper(loss, efficient=efficient)
        for loss in (compat.MetricLearningSupConLoss(0.2), losses.SupConLoss(0.2))
    )
    _check(lambda x: got(x, LABELS), lambda x: want(x, LABELS), _rows(9, 6, seed=0))
    pair = [_rows(9, 6, seed=0), _rows(9, 6, seed=1)]
    _check(
        lambda x, y: got(x, LABELS, None, y, LABELS.clone()),
        lambda x, y: want(x, LABELS, None, y, LABELS.clone()),
        *pair,
    )


@pytest.mark.usefixtures("second_process", "no_matrix")
def test_distributed_loss_wrapper_of_a_memory() -> None:
    got, want = (
        distributed.DistributedLossWrapper(losses.CrossBatchMemory(loss, 6, memory_size=40))
        for loss in (compat.MetricLearningSupConLoss(0.2), losses.SupConLoss(0.2))
    )
    for seed in range(4):
        _check(lambda x: got(x, LABELS), lambda x: want(x, LABELS), _rows(9, 6, seed=seed))


@pytest.mark.usefixtures("no_matrix")
def test_all_pairs_are_recognised() -> None:
    x, labels = _rows(9, 6, seed=0), LABELS
    pairs = pair_utils.get_all_pairs_indices(labels)
    _check(
        lambda x: compat.MetricLearningSupConLoss()(x, labels, pairs),
        lambda x: losses.SupConLoss()(x, labels, pairs),
        x,
    )


@pytest.mark.parametrize("chunk", [1, 1 << 20])
@pytest.mark.parametrize(
    "change", ["fewer positives", "fewer negatives", "swapped", "twice", "two left out", "order"]
)
def test_other_pairs_are_not_mistaken_for_all(
    change: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairs_module, "_CHUNK", chunk)
    references, labels = _rows(9, 6, seed=1), torch.arange(9) % 3
    a, p, b, n = pair_utils.get_all_pairs_indices(labels, labels.clone())
    if change == "fewer positives":
        a, p = a[1:], p[1:]
    elif change == "fewer negatives":
        b, n = b[1:], n[1:]
    elif change == "swapped":  # all numbers of pairs are right, but (0, 0) is a negative, (0, 1) a positive
        p, n = p.clone(), n.clone()
        p[0], n[0] = 1, 0
    elif change == "twice":  # a positive is listed twice, in place of another one of that anchor
        p = p.clone()
        p[1] = p[0]
    elif change == "two left out":
        keep = torch.ones_like(a, dtype=torch.bool)
        keep.view(9, 3)[:, :2] = False
        a, p = a[keep], p[keep]
    else:
        a, p, b, n = (x.flip(0) for x in (a, p, b, n))
    pairs = (a, p, b, n)
    _check(
        lambda x, y: compat.MetricLearningSupConLoss()(x, labels, pairs, y, labels.clone()),
        lambda x, y: losses.SupConLoss()(x, labels, pairs, y, labels.clone()),
        _rows(9, 6, seed=0),
        references,
    )


@pytest.mark.usefixtures("no_matrix")
def test_chunks_of_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs_module, "_CHUNK", 7)
    got = losses.CrossBatchMemory(compat.MetricLearningSupConLoss(), 6, memory_size=20)
    want = losses.CrossBatchMemory(losses.SupConLoss(), 6, memory_size=20)
    _check_batches(got, want)


@pytest.mark.parametrize("backend", ["auto", "tiled"])
def test_gradcheck_of_pairs(backend: str) -> None:
    labels, others = torch.arange(5) % 2, torch.arange(8) % 2
    a, p, b, n = pair_utils.get_all_pairs_indices(labels, others)
    keep = a != p  # row i of the references is the anchor itself
    loss = compat.MetricLearningSupConLoss(0.5, backend=backend)
    for pairs in ((a[keep], p[keep], b, n), (a[1:], p[1:], b[2:], n[2:])):
        assert torch.autograd.gradcheck(
            lambda x, y, pairs=pairs: loss(x, labels, pairs, y, others),
            (_rows(5, 3, seed=0).requires_grad_(), _rows(8, 3, seed=1).requires_grad_()),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype: torch.dtype) -> None:
    """The rounding of the rows is the only difference: eps times 1 / temperature, and a few terms."""
    x, labels = _rows(9, 6, seed=0), LABELS
    a, p, b, n = pair_utils.get_all_pairs_indices(labels)
    want = losses.SupConLoss(0.2)(x.to(dtype).double(), labels, (a[2:], p[2:], b, n))
    got = compat.MetricLearningSupConLoss(0.2)(x.to(dtype), labels, (a[2:], p[2:], b, n))
    assert got.dtype == torch.float32
    assert abs(got - want) < 20 * torch.finfo(dtype).eps


ZERO, FAR, FLOAT = torch.tensor([0]), torch.tensor([9]), torch.tensor([0.5])


@pytest.mark.parametrize(
    ("pairs", "error", "text"),
    [
        (3, TypeError, "indices_tuple must be 4 tensors .* or 3 .*, got int 3"),
        ((ZERO, ZERO), TypeError, "indices_tuple must be 4 tensors"),
        ((ZERO, ZERO, FLOAT), TypeError, "of integers, got"),
        ((ZERO, ZERO, [0]), TypeError, "each of indices_tuple must be a tensor"),
        ((ZERO, ZERO, ZERO, FAR), ValueError, "numbers from 0 to 8, got 9 to 9"),
        ((ZERO, -FAR, ZERO, ZERO), ValueError, "numbers from 0 to 8, got -9 to -9"),
        ((ZERO, ZERO, ZERO, ZERO[:0]), ValueError, r"equal length, got lengths \[1, 1, 1, 0\]"),
        ((ZERO, ZERO, ZERO), ValueError, "must not list a pair as positive and as negative"),
    ],
)
def test_bad_pairs(pairs: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        compat.MetricLearningSupConLoss()(_rows(9, 6, seed=0), LABELS, pairs)


def test_bad_rows_with_pairs() -> None:
    x, pairs, loss = (
        _rows(9, 6, seed=0),
        pair_utils.get_all_pairs_indices(LABELS),
        compat.MetricLearningSupConLoss(),
    )
    with pytest.raises(ValueError, match="labels must be integers of shape"):
        loss(x, LABELS[:5], pairs)
    with pytest.raises(ValueError, match=r"ref_emb must be of shape \[M, D\], got \[9, 1, 6\]"):
        loss(x, LABELS, pairs, x[:, None], LABELS.clone())
    with pytest.raises(ValueError, match="ref_emb must have the width D=6"):
        loss(x, LABELS, pairs, x[:, :3], LABELS.clone())


def test_no_pairs() -> None:
    """A miner may find nothing."""
    none = torch.empty(0, dtype=torch.int64)
    x = _rows(9, 6, seed=0).requires_grad_()
    for pairs in ((none,) * 4, (none,) * 3, (torch.empty(0),) * 4, (none, none, ZERO, ZERO + 1)):
        loss = compat.MetricLearningSupConLoss()(x, LABELS, pairs)
        (grad,) = torch.autograd.grad(loss, x)
        assert loss == 0
        assert (grad == 0).all()
    assert compat.MetricLearningSupConLoss()(x[:0], LABELS[:0], (none,) * 4) == 0


def test_is_one_of_the_packages_losses() -> None:
    loss = compat.MetricLearningSupConLoss(0.3)
    assert isinstance(loss, losses.BaseMetricLossFunction)
    assert loss.sub_loss_names() == ["loss"]
    assert type(loss.distance).__name__ == "CosineSimilarity"
    assert loss.state_dict() == {}
    for again in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert type(again) is compat.MetricLearningSupConLoss
        assert again.temperature == 0.3


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pytorch_metric_learning", "pytorch_metric_learning.losses"):
        monkeypatch.setitem(sys.modules, name, None)
    spec = importlib.util.spec_from_file_location("metric_learning_alone", ours_module.__file__)
    assert spec is not None
    assert spec.loader is not None
    alone = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(alone)
    assert alone.MetricLearningSupConLoss.__bases__ == (torch.nn.Module,)
    x = _rows(9, 6, seed=0)
    for arguments in ((LABELS,), (LABELS, pair_utils.get_all_pairs_indices(LABELS, LABELS.clone()))):
        loss = alone.MetricLearningSupConLoss(0.3)(x, *arguments)
        assert torch.equal(loss, compat.MetricLearningSupConLoss(0.3)(x, *arguments))
