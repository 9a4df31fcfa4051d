"""Values and gradients of the drop-in classes against dense transcriptions of the originals."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pysupcon import compat, functional

metric_learning = pytest.importorskip("pytorch_metric_learning.losses")


def hobbit_long(
    features: Tensor,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 0.07,
    mode: str = "all",
    base_temperature: float = 0.07,
) -> Tensor:
    """SupContrast's current loss: view-major rows, mean over all anchors, 0 where there is no
    positive."""
    samples, views = features.shape[:2]
    rows = torch.cat([features[:, v].flatten(1) for v in range(views)])
    if mask is None:
        ids = torch.arange(samples) if labels is None else labels.reshape(-1)
        mask = ids[:, None] == ids[None, :]
    anchors = samples if mode == "one" else samples * views
    logits = rows[:anchors] @ rows.T / temperature
    keep = 1 - torch.eye(anchors, samples * views, dtype=logits.dtype)
    positives = mask.to(logits.dtype).repeat(anchors // samples, views) * keep
    logits = logits - logits.max(dim=1, keepdim=True).values.detach()
    log_probability = logits - (logits.exp() * keep).sum(1, keepdim=True).log()
    count = positives.sum(1)
    mean = (positives * log_probability).sum(1) / torch.where(count < 1e-6, 1.0, count)
    return (-(temperature / base_temperature) * mean).mean()


def tufts(embeds: Tensor, labels: Tensor, temperature: float = 0.07, epsilon: float = 0.0) -> Tensor:
    """The authors' SINCERE: cross-entropy of each positive pair against the negatives, averaged twice."""
    logits = embeds @ embeds.T / temperature
    same = labels[:, None] == labels[None, :]
    negatives = logits.masked_fill(same, -math.inf).logsumexp(1, keepdim=True).expand_as(logits)
    positives = same & ~torch.eye(len(labels), dtype=torch.bool)
    denominator = torch.stack([logits - epsilon, negatives]).logsumexp(0)
    pairs = torch.where(positives, denominator - logits, 0.0)
    return (pairs.sum(1) / positives.sum(1)).mean()


def _check(ours: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], Tensor], x: Tensor) -> None:
    for dtype, bar in ((torch.float64, 1e-10), (torch.float32, 2e-5)):
        got, want = (x.to(dtype).clone().requires_grad_() for _ in range(2))
        first, second = ours(got), theirs(want)
        torch.testing.assert_close(first, second, rtol=bar, atol=bar)
        a, b = torch.autograd.grad(first, got)[0], torch.autograd.grad(second, want)[0]
        assert (a - b).norm() <= bar * (1 + b.norm())


def _unit(*shape: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


LABELS = torch.tensor([0, 1, 0, 2, 1, 1, 0, 5, 2])


@pytest.mark.parametrize("mode", ["all", "one"])
@pytest.mark.parametrize("positives", ["labels", "column", "float labels", "none", "mask", "asymmetric mask"])
@pytest.mark.parametrize("views", [1, 2, 3])
def test_hobbit_long(mode: str, positives: str, views: int) -> None:
    options: dict[str, Any] = {
        "labels": {"labels": LABELS},
        "column": {"labels": LABELS[:, None]},
        "float labels": {"labels": LABELS / 2},
        "none": {},
        "mask": {"mask": (LABELS[:, None] == LABELS).float()},
        "asymmetric mask": {"mask": (torch.rand(9, 9) < 0.4).float()},
    }[positives]
    loss = compat.SupConLoss(0.2, mode, 0.1)
    if views == 1 and positives == "none":
        with pytest.warns(UserWarning, match="no anchor of this batch has a positive"):
            assert loss(_unit(9, 1, 6)) == 0
        return
    _check(
        lambda x: loss(x, **options),
        lambda x: hobbit_long(x, **options, temperature=0.2, mode=mode, base_temperature=0.1),
        _unit(9, views, 6),
    )


def test_hobbit_long_flattens_and_defaults() -> None:
    x = torch.nn.functional.normalize(_unit(9, 2, 12), dim=-1).view(9, 2, 3, 4)
    _check(lambda x: compat.SupConLoss()(x, LABELS), lambda x: hobbit_long(x, LABELS), x)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: compat.SupConLoss()(_unit(4, 3)), "at least 3 dimensions are required, got shape [4, 3]"),
        (lambda: compat.SupConLoss()(_unit(4, 2, 3), LABELS), "Num of labels does not match num of features"),
        (lambda: compat.SupConLoss()(_unit(9, 2, 3), LABELS, torch.eye(9)), "Cannot define both `labels`"),
        (lambda: compat.SupConLoss(contrast_mode="some")(_unit(4, 2, 3)), "Unknown mode: some"),
        (lambda: compat.SupConLoss()(_unit(2, 2, 3), mask=torch.eye(2) / 2), "must hold zeros and ones"),
        (lambda: compat.SINCERELoss()(_unit(9, 2, 3), LABELS), "embeds must be of shape [B, D], got [9, 2"),
        (lambda: compat.MultiviewSINCERELoss()(_unit(4, 3), LABELS), "embeds must be of shape [B, V, D]"),
        (lambda: compat.MetricLearningSupConLoss()(_unit(4, 3)), "labels must be given"),
        (
            lambda: compat.MetricLearningSupConLoss()(_unit(4, 3), LABELS[:4], ref_emb=_unit(5, 3)),
            "ref_labels must be given with ref_emb",
        ),
        (lambda: compat.SINCERELoss(backend="gpu"), "backend must be one of"),
    ],
)  # fmt: skip
def test_bad_input(call: Callable[[], Tensor], text: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        call()
    assert text in str(caught.value)


PAIRED = torch.tensor([0, 1, 0, 2, 1, 1, 0, 2, 2])


def test_tufts_sincere() -> None:
    _check(lambda x: compat.SINCERELoss(0.2)(x, PAIRED), lambda x: tufts(x, PAIRED, 0.2), _unit(9, 6))
    _check(lambda x: compat.SINCERELoss()(x, PAIRED), lambda x: tufts(x, PAIRED), _unit(9, 6))


def test_tufts_epsilon() -> None:
    _check(
        lambda x: compat.EpsSupInfoNCELoss(0.2, 0.4)(x, PAIRED),
        lambda x: tufts(x, PAIRED, 0.2, 0.4),
        _unit(9, 6),
    )
    assert compat.EpsSupInfoNCELoss().epsilon == 0.25


@pytest.mark.parametrize("views", [2, 3])
def test_tufts_multiview(views: int) -> None:
    labels = LABELS.repeat_interleave(views)
    x = _unit(9, views, 6)
    _check(
        lambda x: compat.MultiviewSINCERELoss(0.2)(x, LABELS),
        lambda x: tufts(x.flatten(0, 1), labels, 0.2),
        x,
    )
    _check(
        lambda x: compat.MultiviewEpsSupInfoNCELoss(0.2, 0.3)(x, LABELS),
        lambda x: tufts(x.flatten(0, 1), labels, 0.2, 0.3),
        x,
    )
    samples = torch.arange(9).repeat_interleave(views)
    _check(lambda x: compat.InfoNCELoss(0.2)(x), lambda x: tufts(x.flatten(0, 1), samples, 0.2), x)


def test_tufts_without_positives_is_the_mean_of_the_rest() -> None:
    """In the original one anchor without a positive makes the whole loss NaN."""
    x = _unit(9, 6)
    assert torch.isnan(tufts(x, LABELS))
    keep = LABELS != 5
    rest = torch.stack([compat.SINCERELoss(0.2)(x, LABELS) * keep.sum()])
    s, same = x @ x.T / 0.2, LABELS[:, None] == LABELS
    negatives = s.masked_fill(same, -math.inf).logsumexp(1)
    same.fill_diagonal_(False)
    pairs = torch.nn.functional.softplus(negatives[:, None] - s)
    want = (torch.where(same, pairs, 0.0).sum(1) / same.sum(1).clamp(min=1))[keep].sum()
    torch.testing.assert_close(rest[0], want)


@pytest.mark.parametrize("labels", [LABELS, PAIRED, PAIRED.float()])
def test_metric_learning(labels: Tensor) -> None:
    _check(
        lambda x: compat.MetricLearningSupConLoss(0.2)(x, labels),
        lambda x: metric_learning.SupConLoss(0.2)(x, labels),
        torch.randn(9, 6, dtype=torch.float64) * 3,  # it normalises
    )
    _check(
        lambda x: compat.MetricLearningSupConLoss()(x, labels, ref_emb=x, ref_labels=labels),
        lambda x: metric_learning.SupConLoss()(x, labels, ref_emb=x, ref_labels=labels),
        torch.randn(9, 6, dtype=torch.float64),
    )


def test_metric_learning_references() -> None:
    references = torch.randn(7, 6, dtype=torch.float64)
    reference_labels = torch.tensor([1, 1, 0, 2, 9, 0, 2])
    _check(
        lambda x: compat.MetricLearningSupConLoss()(x, LABELS, None, references.to(x), reference_labels),
        lambda x: metric_learning.SupConLoss()(x, LABELS, None, references.to(x), reference_labels),
        torch.randn(9, 6, dtype=torch.float64),
    )
    x = torch.randn(9, 6, dtype=torch.float64)
    _check(
        lambda c: compat.MetricLearningSupConLoss()(x.to(c), LABELS, None, c, reference_labels),
        lambda c: metric_learning.SupConLoss()(x.to(c), LABELS, None, c, reference_labels),
        references,
    )


@pytest.mark.filterwarnings("ignore:no anchor of this batch has a positive")
@pytest.mark.parametrize("labels", [torch.arange(6), torch.zeros(6, dtype=torch.int64)])
def test_metric_learning_without_positives_or_negatives(labels: Tensor) -> None:
    x = torch.randn(6, 4, requires_grad=True)
    loss = compat.MetricLearningSupConLoss()(x, labels)
    assert loss == metric_learning.SupConLoss()(x, labels) == 0
    loss.backward()
    assert x.grad is not None
    assert (x.grad == 0).all()


def _converged(seed: int) -> tuple[Tensor, Tensor]:
    """Two views per class that nearly agree, except in two classes: most losses round to 0 in float32."""
    torch.manual_seed(seed)
    first = _unit(32, 64)
    second = first + 0.02 * torch.randn_like(first)
    second[:2] = torch.randn(2, 64, dtype=torch.float64)
    return torch.cat([first, second]), torch.arange(32).repeat(2)


def test_metric_learning_counts_the_anchors_that_have_a_positive(backend: str) -> None:
    """Anchors whose loss rounds to 0 count in the mean too."""
    for seed in range(5):
        x, labels = _converged(seed)
        loss = compat.MetricLearningSupConLoss(0.05, backend=backend)
        want = metric_learning.SupConLoss(0.05)(x, labels).item()  # float64: no loss rounds to 0
        assert loss(x, labels).item() == pytest.approx(want, rel=1e-9)
        assert loss(x.float(), labels).item() == pytest.approx(want, rel=1e-5)
    # Classes whose two rows are equal: the original drops them even in float64.
    same = torch.cat([x[2:4], x[2:4], x[:2], x[32:34]])
    labels = torch.tensor([8, 9, 8, 9, 0, 1, 0, 1])
    want = functional.supcon(same, labels, temperature=0.01, normalize=True, backend="reference").item()
    assert metric_learning.SupConLoss(0.01)(same, labels).item() == pytest.approx(2 * want)
    assert compat.MetricLearningSupConLoss(0.01, backend=backend)(same, labels).item() == pytest.approx(want)


@pytest.mark.filterwarnings("ignore:no anchor of this batch has a positive")
def test_metric_learning_exact_zeros() -> None:
    """The loss is 0 for an anchor whose single candidate is its positive."""
    x, one = _unit(3, 6), _unit(1, 6)
    for labels in (torch.tensor([0, 1, 0]), torch.tensor([0, 0, 0]), torch.tensor([1, 1, 1])):
        for ours, theirs in (
            (compat.MetricLearningSupConLoss(), metric_learning.SupConLoss()),
            (compat.MetricLearningSupConLoss(0.01), metric_learning.SupConLoss(0.01)),
        ):
            got = ours(x, labels, ref_emb=one, ref_labels=torch.tensor([0]))
            assert got == theirs(x, labels, ref_emb=one, ref_labels=torch.tensor([0])) == 0
    two = torch.tensor([0, 0])
    assert compat.MetricLearningSupConLoss()(x[:2], two) == metric_learning.SupConLoss()(x[:2], two) == 0


def test_metric_learning_takes_its_defaults_by_name() -> None:
    from pytorch_metric_learning import distances, reducers, regularizers

    defaults = {
        "distance": distances.CosineSimilarity(),
        "reducer": reducers.AvgNonZeroReducer(),
        "embedding_regularizer": None,
        "embedding_reg_weight": 1,
        "collect_stats": False,
    }
    x = torch.randn(9, 6, dtype=torch.float64)
    for names in ([*defaults], *([name] for name in defaults)):
        given = {name: defaults[name] for name in names}
        want = metric_learning.SupConLoss(0.2, **given)(x, LABELS)
        torch.testing.assert_close(compat.MetricLearningSupConLoss(0.2, **given)(x, LABELS), want)
    refused: list[tuple[dict[str, Any], str]] = [
        (
            {"distance": distances.LpDistance()},
            "distance must be the default of SupConLoss, CosineSimilarity",
        ),
        ({"distance": distances.CosineSimilarity(p=1)}, "got CosineSimilarity with p=1"),
        ({"distance": distances.CosineSimilarity(power=2)}, "got CosineSimilarity with power=2"),
        (
            {"distance": distances.DotProductSimilarity(normalize_embeddings=False)},
            "got DotProductSimilarity",
        ),
        ({"distance": distances.CosineSimilarity(collect_stats=True)}, "with collect_stats=True"),
        (
            {"distance": torch.nn.CosineSimilarity()},
            "got a CosineSimilarity without normalize_embeddings",
        ),
        ({"reducer": reducers.MeanReducer()}, "reducer must be the default of SupConLoss, AvgNonZeroReducer"),
        ({"reducer": reducers.ThresholdReducer(low=0.1)}, "got ThresholdReducer"),
        ({"embedding_regularizer": regularizers.LpRegularizer()}, "embedding_regularizer is not supported"),
        ({"collect_stats": True}, "collect_stats is not supported, got True"),
    ]
    for options, text in refused:
        with pytest.raises(NotImplementedError) as caught:
            compat.MetricLearningSupConLoss(**options)
        assert text in str(caught.value)
    with pytest.raises(TypeError, match="unexpected keyword argument 'margin'"):
        compat.MetricLearningSupConLoss(margin=0.1)  # type: ignore[call-arg]


def test_metric_learning_refuses_what_it_does_not_do() -> None:
    x = _unit(9, 6)
    with pytest.raises(NotImplementedError, match="the same object as labels"):
        compat.MetricLearningSupConLoss()(x, LABELS, ref_emb=_unit(9, 6), ref_labels=LABELS)
