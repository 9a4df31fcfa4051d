"""The compiled operators agree with the tiled ones in pure PyTorch, on problems drawn by hypothesis."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.gradients import added
from hypothesis import given
from hypothesis import strategies as st

import pysupcon
from pysupcon.pairs import ops, pairing, tiled

CPU = pysupcon.backends()["cpu"]
pytestmark = pytest.mark.skipif(not CPU["available"], reason=CPU["detail"])

FORMS = ["self", "candidates", "self index", "own rows"]


@st.composite
def problems(draw: st.DrawFn) -> tuple[tuple[Any, ...], dict[str, torch.Tensor], str]:
    """Returns the first twelve arguments of pair_stats, one column per statistic, and the form."""
    form = draw(st.sampled_from(FORMS), label="form")
    width = draw(st.sampled_from([1, 3, 8, 15, 16, 17, 40, 129]), label="width")
    total = draw(st.integers(0, 150), label="candidates")
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31), label="seed"))
    classes = draw(st.sampled_from([1, 2, 7, 200]), label="classes")
    candidates = torch.randn(total, width, generator=generator, dtype=torch.float64)
    labels = torch.randint(-classes, classes, (total,), generator=generator)
    scale = torch.tensor(draw(st.floats(0.1, 20.0), label="scale"), dtype=torch.float64)
    if draw(st.booleans(), label="strided"):
        candidates = torch.cat([candidates, candidates], dim=1)[:, :width]
    names = ("u", "v", "w", "a", "g")
    columns = {name: torch.randn(total, generator=generator, dtype=torch.float64) for name in names}
    many = draw(st.sampled_from([1, 3, 50]), label="instances")
    instances = torch.randint(0, many, (total,), generator=generator)
    order = _order(labels, instances)
    if form == "self":
        return (
            (candidates, labels, order, scale, None, None, None, None, instances, *(None,) * 3),
            columns,
            form,
        )
    if form == "candidates":
        count = draw(st.integers(0, 90), label="anchors")
        x = torch.randn(count, width, generator=generator, dtype=torch.float64)
        own = torch.randint(-classes, classes, (count,), generator=generator)
        own_instances = torch.randint(0, many, (count,), generator=generator)
        index = None
        columns = {name: torch.randn(count, generator=generator, dtype=torch.float64) for name in columns}
    else:
        index = torch.randperm(total, generator=generator)[: draw(st.integers(0, total), label="anchors")]
        x, own, own_instances = candidates[index].clone(), labels[index], instances[index]
        if form == "self index":
            index[::3] = -1
            columns = {name: column[: len(index)] for name, column in columns.items()}
    rows = (x, own, _order(own, own_instances), scale, candidates, labels, order, index)
    return (*rows, own_instances, instances, None, None), columns, form


def _order(labels: torch.Tensor, instances: torch.Tensor | None = None) -> torch.Tensor:
    """Returns the argsort by label and then by instance."""
    if instances is None:
        return torch.argsort(labels, stable=True)
    order = torch.argsort(instances, stable=True)
    return order[torch.argsort(labels[order], stable=True)]


def _same(name: str, *arguments: Any, **wanted: bool) -> Any:
    got, want = (
        added(getattr(twin, name), *arguments, **wanted) if wanted else getattr(twin, name)(*arguments)
        for twin in (ops, tiled)
    )
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    return got


@given(
    problem=problems(),
    epsilon=st.sampled_from([0.0, 0.25, -3.0]),
    flags=st.sampled_from([(1, 1), (1, 0), (0, 1)]),
    sums=st.sampled_from(["", "w", "a", "wa"]),
)
def test_compiled_operators_equal_their_twins(
    problem: Any, epsilon: float, flags: tuple[int, int], sums: str
) -> None:
    pairs, columns, form = problem
    rows, weights = pairs[:8], pairs[10:]
    wanted = bool(flags[0]), bool(flags[1])
    both = _same("pair_stats", *pairs, True, True)[:2]
    n, p = (
        torch.where(torch.tensor(keep), column, -torch.inf) for keep, column in zip(wanted, both, strict=True)
    )
    softplus_n = both[0]
    _same("positive_softplus", *rows, *weights, softplus_n, epsilon)
    need = form in ("candidates", "self index")
    candidate_columns: dict[str, Any] = {}
    own = columns
    if form == "own rows":  # each candidate is an anchor of some process, with known statistics
        whole = (*rows[4:7], rows[3], *(None,) * 8)
        all_n, all_p, *_ = tiled.pair_stats(*whole, *wanted)
        candidate_columns = {
            "n": all_n,
            "p": all_p,
            **{name: column for name, column in columns.items() if name not in "wa" or name in sums},
            "softplus_n": tiled.pair_stats(*whole, True, False)[0],
        }
        own = {name: column[rows[7]] for name, column in columns.items()}
    own_sums = [own[name] if name in sums else None for name in "wa"]
    candidate_stats = [candidate_columns.get(name) for name in ("n", "p", "u", "v", "w", "a")]
    arguments = *pairs, n, p, own["u"], own["v"], *own_sums, *candidate_stats, *wanted
    _same("pair_stats_backward", *arguments, candidates=need)
    _same(
        "positive_softplus_backward", *rows, *weights, softplus_n, epsilon, own["g"],
        candidate_columns.get("softplus_n"), candidate_columns.get("g"), candidates=need,
    )  # fmt: skip


@given(problem=problems())
def test_statistics_that_are_not_requested(problem: Any) -> None:
    (*rows, instances, other_instances, _, _), _, _ = problem
    weights = None, None
    _, p, *sums = _same("pair_stats", *rows, instances, other_instances, *weights, True, False)
    assert (p == -torch.inf).all()
    assert not torch.cat(sums).any()
    n, _, _, instance_sum = _same("pair_stats", *rows, None, None, *weights, False, True)
    assert (n == -torch.inf).all()
    assert not instance_sum.any()


@pytest.mark.parametrize("count", [4100, pytest.param(16_450, marks=pytest.mark.slow)])
def test_sets_of_blocks(count: int) -> None:
    """Blocks of 64 rows, paired in sets of two and of four; the last block is partly filled."""
    generator = torch.Generator().manual_seed(count)
    x = torch.nn.functional.normalize(
        torch.randn(count, 300, generator=generator, dtype=torch.float64), dim=1
    )
    labels = torch.randint(0, 40, (count,), generator=generator)
    scale = torch.tensor(10.0, dtype=torch.float64)
    instances = torch.arange(count) // 2
    rows = (x, labels, _order(labels), scale, None, None, None, None, instances, *(None,) * 3)
    stats = _same("pair_stats", *rows, True, True)
    u, v, w, a = torch.randn(4, count, generator=generator, dtype=torch.float64)
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            arguments = (*rows, *stats[:2], u, v, w, a, *(None,) * 6, True, True)
            found.append(added(ops.pair_stats_backward, *arguments)[0])
            assert all(
                torch.equal(got, want)
                for got, want in zip(ops.pair_stats(*rows, True, True), stats, strict=True)
            )
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    want = added(tiled.pair_stats_backward, *arguments)[0]
    torch.testing.assert_close(found[0], want, rtol=1e-9, atol=1e-9)


@given(
    ids=st.one_of(
        st.lists(st.integers(-5, 5), max_size=60),
        st.lists(st.integers(-(2**63), 2**63 - 1), max_size=60),
        st.lists(st.sampled_from([-(2**63), 0, 2**63 - 1]), max_size=9),
    ),
    views=st.integers(1, 3),
)
def test_order_by_class(ids: list[int], views: int) -> None:
    rows = [value for value in ids for _ in range(views)]
    order, count = ops.order_by_class(torch.tensor(ids, dtype=torch.int64), views)
    assert order.tolist() == sorted(range(len(rows)), key=rows.__getitem__)  # stable
    assert count.tolist() == [rows.count(value) - 1 for value in rows]


@pytest.mark.parametrize("classes", [3, 2**62])
def test_order_and_count_without_the_extension(classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(-classes, classes, (500,), generator=torch.Generator().manual_seed(0))
    compiled = [pairing.order_and_count(ids, views) for views in (1, 2)]
    monkeypatch.setattr(ops, "_problem", "no extension")
    for views, (order, count) in zip((1, 2), compiled, strict=True):
        plain_order, plain_count = pairing.order_and_count(ids, views)
        torch.testing.assert_close(order, plain_order, rtol=0, atol=0)
        torch.testing.assert_close(count, plain_count, rtol=0, atol=0)
