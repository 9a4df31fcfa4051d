"""Mathematical properties of the losses, on inputs drawn by hypothesis."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from helpers.cases import LOSSES, NEEDS_INSTANCES
from helpers.tolerances import assert_gradient_close, assert_loss_close, largest_similarity
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pysupcon import functional


class Batch(NamedTuple):
    features: Tensor
    labels: Tensor
    temperature: float


@st.composite
def batches(draw: st.DrawFn, smallest: int = 0, views: int | None = None) -> Batch:
    """[B, V, D] float32 with labels of every kind: distinct, one class, few, with gaps and negative
    numbers."""
    samples = draw(st.integers(smallest, 40), label="samples")
    views = views or draw(st.integers(1, 3), label="views")
    width = draw(st.sampled_from([1, 2, 3, 7, 8, 16, 33, 64]), label="width")
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31), label="seed"))
    rows = torch.randn(samples, views, width, generator=generator)
    kind = draw(
        st.sampled_from(["unit", "plain", "duplicates", "clustered", "tiny", "strided"]), label="rows"
    )
    if kind != "plain":
        rows = torch.nn.functional.normalize(rows, dim=-1)
    if kind == "duplicates" and samples:
        rows = rows[torch.randint(0, max(samples // 3, 1), (samples,), generator=generator)]
    if kind == "clustered" and samples:
        rows = torch.nn.functional.normalize(rows * 0.05 + rows[:1, :1], dim=-1)
    if kind == "tiny":
        rows = rows * 1e-4
    if kind == "strided":
        rows = rows.transpose(0, 1).contiguous().transpose(0, 1)
    classes = draw(st.sampled_from(["few", "one", "distinct", "skewed", "gaps"]), label="classes")
    labels = {
        "few": lambda: torch.randint(0, 4, (samples,), generator=generator),
        "one": lambda: torch.full((samples,), 3),
        "distinct": lambda: torch.randperm(samples, generator=generator),
        "skewed": lambda: (torch.rand(samples, generator=generator) < 0.1).long(),
        "gaps": lambda: torch.randint(-3, 3, (samples,), generator=generator) * 2**40,
    }[classes]()
    temperature = math.exp(draw(st.floats(math.log(0.005), math.log(10)), label="log temperature"))
    return Batch(rows, labels, temperature)


def _value_and_gradient(name: str, batch: Batch, dtype: torch.dtype, backend: str) -> tuple[Tensor, Tensor]:
    x = batch.features.to(dtype).requires_grad_()
    instances = torch.arange(x.shape[0])
    loss = LOSSES[name](
        x, batch.labels, temperature=batch.temperature, instances=instances, backend=backend, reduction="sum"
    )
    (grad,) = torch.autograd.grad(loss, x)
    return loss.detach(), grad


@pytest.mark.filterwarnings("ignore:no anchor of this batch has a positive")
@pytest.mark.parametrize("name", LOSSES)
@given(batch=batches())
def test_against_the_float64_reference(name: str, backend: str, batch: Batch) -> None:
    loss, grad = _value_and_gradient(name, batch, torch.float32, backend)
    truth, true_grad = _value_and_gradient(name, batch, torch.float64, "reference")
    similarity = largest_similarity(batch.features, None, batch.temperature)
    rows = max(batch.features.shape[0] * batch.features.shape[1], 1)
    # Errors of single anchors add up in the sum.
    assert_loss_close(loss / rows, truth / rows, torch.float32, similarity)
    top = max(batch.features.norm(dim=-1).max().item(), 1e-30) if batch.features.numel() else 0.0
    assert_gradient_close(grad, true_grad, torch.float32, similarity, pull=top / batch.temperature)


@pytest.mark.filterwarnings("ignore:no anchor of this batch has a positive")
@pytest.mark.parametrize("name", LOSSES)
@given(batch=batches(smallest=2), seed=st.integers(0, 2**31))
def test_order_of_the_samples_does_not_matter(name: str, backend: str, batch: Batch, seed: int) -> None:
    order = torch.randperm(len(batch.labels), generator=torch.Generator().manual_seed(seed))
    moved = Batch(batch.features[order], batch.labels[order], batch.temperature)
    loss, grad = _value_and_gradient(name, batch, torch.float64, backend)
    other, moved_grad = _value_and_gradient(name, moved, torch.float64, backend)
    torch.testing.assert_close(loss, other, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(grad[order], moved_grad, rtol=1e-7, atol=1e-7 / batch.temperature)


@pytest.mark.filterwarnings("ignore:no anchor of this batch has a positive")
@given(batch=batches(smallest=1))
def test_sincere_is_at_most_supcon(backend: str, batch: Batch) -> None:
    x = batch.features.double()
    options = {"temperature": batch.temperature, "backend": backend, "reduction": "none"}
    first = functional.sincere(x, batch.labels, **options)
    assert (first >= 0).all()
    assert (first <= functional.supcon(x, batch.labels, **options) + 1e-9 / batch.temperature).all()


@given(batch=batches(smallest=1, views=2))
def test_two_views_without_labels_are_supcon_sincere_and_info_nce(backend: str, batch: Batch) -> None:
    x = batch.features.double()
    options = {"temperature": batch.temperature, "backend": backend, "reduction": "none"}
    ids = torch.arange(len(x))
    info_nce = functional.info_nce(x, **options)
    for other in (
        functional.supcon(x, **options),
        functional.supcon(x, ids, **options),
        functional.sincere(x, ids, **options),  # one positive per anchor
        functional.sincere(x, ids, epsilon=0.0, **options),
    ):
        torch.testing.assert_close(info_nce, other, rtol=1e-9, atol=1e-9)


@given(batch=batches(smallest=1, views=2))
def test_one_class_has_no_negatives(backend: str, batch: Batch) -> None:
    """SINCERE gives 0, epsilon-SupInfoNCE -epsilon, SupCon and cNCE p_i - mean."""
    x = batch.features.double()
    labels = torch.zeros(len(x), dtype=torch.int64)
    options = {"temperature": batch.temperature, "backend": backend, "reduction": "none"}
    assert (functional.sincere(x, labels, **options) == 0).all()
    torch.testing.assert_close(
        functional.sincere(x, labels, epsilon=0.25, **options), torch.full(x.shape[:2], -0.25).double()
    )
    stats = functional.pair_statistics(x, labels, temperature=batch.temperature, backend=backend)
    want = (stats.positive_logsumexp - stats.positive_mean).view(x.shape[:2])
    torch.testing.assert_close(functional.supcon(x, labels, **options), want)


@given(batch=batches(smallest=2))
def test_positive_pairs_never_repel_under_sincere(backend: str, batch: Batch) -> None:
    """dL_i/ds_ip <= 0: with the positives as separate candidates, moving one towards the anchor lowers the
    loss."""
    anchor = torch.nn.functional.normalize(batch.features[:1, 0].double() + 1e-3, dim=-1)
    others = batch.features[:, 0].double().clone().requires_grad_()
    labels = (torch.arange(len(others)) % 2).long()
    loss = functional.sincere(
        anchor,
        torch.tensor([0]),
        candidates=others,
        candidate_labels=labels,
        temperature=batch.temperature,
        backend=backend,
        reduction="sum",
    )
    (grad,) = torch.autograd.grad(loss, others)
    along = (grad * anchor).sum(1)
    assert (along[labels == 0] <= 1e-12).all()
    assert (along[labels == 1] >= -1e-12).all()


@given(batch=batches(smallest=1, views=2), alpha=st.floats(0, 1), base=st.sampled_from(["supcon", "sincere"]))
def test_spread_is_the_weighted_sum(backend: str, batch: Batch, alpha: float, base: str) -> None:
    x = batch.features.double()
    options = {"temperature": batch.temperature, "backend": backend}
    first = getattr(functional, base)(x, batch.labels, **options)
    second = functional.class_conditional_info_nce(x, batch.labels, **options)
    got = functional.spread(x, batch.labels, alpha=alpha, base=base, **options)
    torch.testing.assert_close(got, (1 - alpha) * first + alpha * second, rtol=1e-9, atol=1e-9)


@given(batch=batches(smallest=1, views=2))
def test_instances_say_what_views_say(backend: str, batch: Batch) -> None:
    x = batch.features.double()
    flat, ids = x.reshape(-1, x.shape[-1]), torch.arange(len(x)).repeat_interleave(2)
    for name, loss in LOSSES.items():
        views = loss(x, batch.labels, temperature=batch.temperature, backend=backend)
        rows = loss(
            flat,
            batch.labels.repeat_interleave(2),
            instances=ids,
            temperature=batch.temperature,
            backend=backend,
        )
        torch.testing.assert_close(views, rows, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.filterwarnings("ignore:no anchor of this batch has a positive")
@given(batch=batches(smallest=1))
def test_a_mask_of_labels_is_labels(batch: Batch) -> None:
    x = batch.features.double()
    mask = batch.labels[:, None] == batch.labels[None, :]
    ids = torch.arange(len(x))
    for name, loss in LOSSES.items():
        options = {"temperature": batch.temperature, "instances": ids, "backend": "tiled"}
        torch.testing.assert_close(
            loss(x, mask=mask, **options), loss(x, batch.labels, **options), rtol=1e-9, atol=1e-9, msg=name
        )


@pytest.mark.parametrize("name", LOSSES)
def test_within_class_permutation(name: str, backend: str) -> None:
    """Only losses that use instances, such as cNCE, distinguish the samples of a class."""
    labels = torch.tensor([0, 1, 0, 1, 0, 2])
    x = torch.randn(6, 2, 5, dtype=torch.float64)
    moved = x.clone()
    moved[[0, 2, 4], 1] = x[[2, 4, 0], 1]  # second views change places within class 0
    same = torch.isclose(
        LOSSES[name](x, labels, backend=backend), LOSSES[name](moved, labels, backend=backend)
    )
    assert bool(same) is (name not in NEEDS_INSTANCES)
