"""Labels [B, C]: one SupCon term per label, positives that share a label, and weights by overlap."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.cases import LOSSES, naive
from helpers.tolerances import GRADCHECK, assert_gradient_close, assert_loss_close, largest_similarity
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import pysupcon
from pysupcon import functional
from pysupcon.distributed import AllGather
from pysupcon.profiling.recorder import allocated_peak

FORMS: list[dict[str, Any]] = [
    {"multi_label": "per_label"},
    {"multi_label": "any"},
    {"multi_label": "any", "overlap_threshold": 0.4},
    {"multi_label": "jaccard"},
    {"multi_label": "jaccard", "overlap_threshold": 0.4},
]
IDS = ["per_label", "any", "any above 0.4", "jaccard", "jaccard above 0.4"]
forms = pytest.mark.parametrize("form", FORMS, ids=IDS)

LABELS = torch.tensor([
    [1, 0, 1, 0], [0, 1, 1, 0], [1, 1, 0, 0], [0, 1, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0],
])  # fmt: skip
OTHERS = torch.tensor([[0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0]])


def oracle(
    features: Tensor, labels: Tensor, form: dict[str, Any], *, temperature: float = 0.1,
    reduction: str = "mean", contrast_mode: str = "all", candidates: Tensor | None = None,
    candidate_labels: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """SupCon by the definition in float64, one anchor and one label or pair at a time."""

    def rows(tensor: Tensor, of_samples: Tensor) -> list[tuple[Tensor, set[int]]]:
        views = tensor.unsqueeze(1) if tensor.dim() == 2 else tensor
        sets = [set(row.nonzero().flatten().tolist()) for row in of_samples]
        return [(view, sets[b]) for b, sample in enumerate(views.double()) for view in sample]

    anchors = rows(features, labels)
    others = anchors if candidates is None else rows(candidates, candidate_labels)  # type: ignore[arg-type]
    step = features.shape[1] if features.dim() == 3 and contrast_mode == "one" else 1
    threshold = form.get("overlap_threshold", 0.0)
    losses, valid = [], []
    for i in range(0, len(anchors), step):
        x, mine = anchors[i]
        pairs = [
            (x @ c / temperature, y) for j, (c, y) in enumerate(others) if candidates is not None or j != i
        ]
        denominator = torch.stack([s for s, _ in pairs]).logsumexp(0)
        if form["multi_label"] == "per_label":
            sharing = [[s for s, y in pairs if label in y] for label in sorted(mine)]
            terms = [denominator - torch.stack(found).mean() for found in sharing if found]
        else:
            overlaps = [(s, len(mine & y) / max(len(mine | y), 1)) for s, y in pairs]
            weights = [(s, 1.0 if form["multi_label"] == "any" else o) for s, o in overlaps if o > threshold]
            total = sum(w for _, w in weights)
            terms = [denominator - sum(s * w for s, w in weights) / total] if weights else []
        valid.append(bool(terms))
        losses.append(torch.stack(terms).mean() if terms else denominator * 0)
    result = torch.stack(losses)
    if reduction == "none":
        return result.view(features.shape[:1] if step > 1 else features.shape[:-1])
    return result.sum() / (max(sum(valid), 1) if reduction == "mean" else 1)


@pytest.mark.parametrize(
    ("form", "value"), [("per_label", 4.210130816971), ("any", 4.319757139384), ("jaccard", 4.154851864543)]
)
def test_known_values(form: str, value: float) -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.nn.functional.normalize(torch.randn(8, 16, generator=generator, dtype=torch.float64), dim=-1)
    labels = torch.cat([LABELS, torch.ones(1, 4, dtype=torch.int64)])
    got = functional.supcon(z, labels, temperature=0.1, multi_label=form)
    torch.testing.assert_close(got.item(), value, rtol=0, atol=1e-10)


OPTIONS: list[dict[str, Any]] = [
    {"reduction": "mean"},
    {"reduction": "sum"},
    {"reduction": "none"},
    {"contrast_mode": "one"},
    {"contrast_mode": "one", "reduction": "none"},
    {"candidates": True},
]


def _inputs(options: dict[str, Any], views: int | None) -> tuple[Tensor, dict[str, Any]]:
    shape = (len(LABELS), 6) if views is None else (len(LABELS), views, 6)
    x = torch.nn.functional.normalize(torch.randn(shape, dtype=torch.float64), dim=-1)
    if "candidates" not in options:
        return x, options
    return x, {"candidates": torch.randn(len(OTHERS), 2, 6).double(), "candidate_labels": OTHERS}


@forms
@pytest.mark.parametrize("views", [None, 1, 3])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_supcon(form: dict[str, Any], views: int | None, options: dict[str, Any], backend: str) -> None:
    if form["multi_label"] == "any":
        backend = "tiled"
    x, given_options = _inputs(options, views)
    for which in (backend, "reference"):
        got = functional.supcon(x, LABELS, temperature=0.1, backend=which, **form, **given_options)
        want = oracle(x, LABELS, form, **given_options)
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@forms
@pytest.mark.parametrize(
    "options",
    [{}, {"normalize": True}, {"contrast_mode": "one"}, {"reduction": "none"}, {"candidates": True}],
    ids=str,
)
def test_gradients(form: dict[str, Any], options: dict[str, Any], backend: str) -> None:
    """Features, candidates and temperature."""
    if form["multi_label"] == "any":
        backend = "tiled"
    x, given_options = _inputs(options, 2)
    x = x[..., :3].contiguous()
    if "candidates" in given_options:
        given_options["candidates"] = given_options["candidates"][..., :3].contiguous()
    inputs = [x.requires_grad_(), torch.tensor(0.6, dtype=torch.float64, requires_grad=True)]
    if "candidates" in given_options:
        inputs.append(given_options.pop("candidates").requires_grad_())

    def loss(x: Tensor, temperature: Tensor, *candidates: Tensor) -> Tensor:
        further = {"candidates": candidates[0]} if candidates else {}
        return functional.supcon(
            x, LABELS, temperature=temperature, backend=backend, **form, **further, **given_options
        )

    assert torch.autograd.gradcheck(loss, inputs, **GRADCHECK)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("candidates", [False, True])
def test_every_loss_takes_any(name: str, candidates: bool) -> None:
    """Positives that share a label are a mask; rows of one sample are its views."""
    x = torch.randn(len(LABELS), 2, 3, dtype=torch.float64)
    options: dict[str, Any] = {"temperature": 0.5}
    other = LABELS
    if candidates:
        other = OTHERS
        instances = torch.arange(len(LABELS)), torch.tensor([0, 2, 9, 3, 1])
        options |= {"candidates": torch.randn(len(OTHERS), 3).double()}
        options |= {"instances": instances[0], "candidate_instances": instances[1]}
    for threshold in (0.0, 0.4):
        shared = LABELS @ other.T
        union = LABELS.sum(1)[:, None] + other.sum(1) - shared
        mask = shared / union.clamp(min=1) > threshold
        want = naive(name, x, mask=mask, **options)
        rows = {"candidate_labels": OTHERS.bool()} if candidates else {}
        many = {"multi_label": "any", "overlap_threshold": threshold}
        for backend in ("auto", "reference"):
            got = LOSSES[name](x, LABELS.bool(), backend=backend, **many, **rows, **options)
            torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    y = x.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda y: LOSSES[name](y, LABELS, multi_label="any", **rows, **options), (y,), **GRADCHECK
    )


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, Tensor, float]:
    samples, classes = draw(st.integers(2, 40)), draw(st.integers(2, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    width = draw(st.sampled_from([1, 3, 8, 33]))
    x = torch.randn(samples, draw(st.integers(1, 3)), width, generator=generator)
    share = draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    labels = torch.rand(samples, classes, generator=generator) < share
    return torch.nn.functional.normalize(x, dim=-1), labels, draw(st.sampled_from([0.05, 0.3, 2.0]))


@pytest.mark.filterwarnings("ignore:no anchor of this batch has a positive")
@forms
@settings(max_examples=15)
@given(batch=batches())
def test_float32_against_the_float64_reference(
    form: dict[str, Any], backend: str, batch: tuple[Tensor, Tensor, float]
) -> None:
    features, labels, temperature = batch
    if form["multi_label"] == "any":
        backend = "tiled"
    results = []
    for dtype, which in ((torch.float32, backend), (torch.float64, "reference")):
        x = features.to(dtype).requires_grad_()
        loss = functional.supcon(
            x, labels, temperature=temperature, backend=which, reduction="sum", **form
        )  # fmt: skip
        results.append((loss.detach(), *torch.autograd.grad(loss, x)))
    (loss, grad), (truth, true_grad) = results
    similarity = largest_similarity(features, None, temperature)
    rows = features.shape[0] * features.shape[1]
    assert_loss_close(loss / rows, truth / rows, torch.float32, similarity)
    assert_gradient_close(grad, true_grad, torch.float32, similarity, pull=1 / temperature)


@pytest.mark.filterwarnings("ignore:no anchor of this batch has a positive")
@forms
@settings(max_examples=15)
@given(batch=batches(), seed=st.integers(0, 2**31))
def test_order_of_samples_and_labels_does_not_matter(
    form: dict[str, Any], batch: tuple[Tensor, Tensor, float], seed: int
) -> None:
    features, labels, temperature = batch
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    columns = torch.randperm(labels.shape[1], generator=generator)
    x = features.double()
    want = functional.supcon(x, labels, temperature=temperature, reduction="none", **form)
    moved = labels[order][:, columns]
    got = functional.supcon(x[order], moved, temperature=temperature, reduction="none", **form)
    torch.testing.assert_close(got, want[order], rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore:no anchor of this batch has a positive")
@settings(max_examples=15)
@given(batch=batches(), seed=st.integers(0, 2**31))
def test_one_label_per_row_is_supcon(batch: tuple[Tensor, Tensor, float], seed: int) -> None:
    features, labels, temperature = batch
    ids = torch.randint(labels.shape[1], (len(labels),), generator=torch.Generator().manual_seed(seed))
    one_hot = torch.nn.functional.one_hot(ids, labels.shape[1])
    options = {"temperature": temperature, "reduction": "none"}
    want = functional.supcon(features.double(), ids, **options)
    for form in FORMS:
        got = functional.supcon(features.double(), one_hot, **form, **options)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
        # Labels [B] do not depend on the form.
        torch.testing.assert_close(functional.supcon(features.double(), ids, **form, **options), want)


@forms
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(form: dict[str, Any], dtype: torch.dtype) -> None:
    """The gradient is rounded once."""
    x = torch.nn.functional.normalize(torch.randn(40, 2, 16), dim=-1).to(dtype).requires_grad_()
    labels = torch.rand(40, 5) < 0.3
    loss = functional.supcon(x, labels, temperature=0.2, **form)
    truth = x.detach().double().requires_grad_()
    want = functional.supcon(truth, labels, temperature=0.2, backend="reference", **form)
    loss.backward()
    want.backward()
    similarity = largest_similarity(x, None, 0.2)
    assert loss.dtype == torch.float32
    assert_loss_close(loss, want.detach(), dtype, similarity)
    assert_gradient_close(x.grad, truth.grad, dtype, similarity, pull=1 / (0.2 * 80))


@forms
def test_compile_without_a_graph_break(form: dict[str, Any]) -> None:
    """Other batch sizes share one graph beside the first."""
    torch._dynamo.reset()
    loss = pysupcon.SupConLoss(temperature=0.2, learnable_temperature=True, **form)

    def step(x: Tensor, labels: Tensor) -> Tensor:
        return loss(x, labels)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for rows in (12, 9, 15):
        x, labels = torch.randn(rows, 2, 5), torch.rand(rows, 4) < 0.4
        results = []
        for function in (step, compiled):
            y = x.clone().requires_grad_()
            loss.zero_grad()
            value = function(y, labels)
            value.backward()
            results.append((value.detach(), y.grad, loss.log_temperature.grad.clone()))
        torch.testing.assert_close(*results)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("candidates", [False, True])
def test_the_operators_keep_the_dispatcher_contract(candidates: bool) -> None:
    x, scale = torch.randn(7, 5, requires_grad=True), torch.tensor(2.0).double().requires_grad_()
    own, threshold = LABELS.to(torch.uint8), torch.tensor(0.25).double()
    queue = torch.randn(5, 5, requires_grad=True) if candidates else None
    others = OTHERS.to(torch.uint8) if candidates else None
    factors = torch.rand(1, 7).double()
    for weighted in (True, False):
        torch.library.opcheck(torch.ops.pysupcon.overlap_totals.default, (own, others, threshold, weighted))
    for form, class_weights in (("per_label", torch.rand(4).double()), ("jaccard", None)):
        arguments = x, queue, scale, form, own, others, None, factors, class_weights, threshold
        torch.library.opcheck(torch.ops.pysupcon.positive_means.default, arguments)


@forms
def test_functional_transforms(form: dict[str, Any]) -> None:
    x, labels = torch.randn(3, 8, 5, dtype=torch.float64), torch.rand(8, 4) < 0.5

    def loss(x: Tensor, labels: Tensor = labels) -> Tensor:
        return functional.supcon(x, labels, temperature=0.5, **form)

    values = torch.stack([loss(one) for one in x])
    torch.testing.assert_close(torch.func.vmap(loss)(x), values)
    per_batch = (torch.rand(3, 8, 4) < 0.5).to(torch.int32)
    if form["multi_label"] != "any":
        want = torch.stack([loss(one, of) for one, of in zip(x, per_batch, strict=True)])
        torch.testing.assert_close(torch.func.vmap(loss)(x, per_batch), want)
    grads = []
    for one in x:
        y = one.clone().requires_grad_()
        grads.append(*torch.autograd.grad(loss(y), y))
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(x), torch.stack(grads))
    y = x[0].clone().requires_grad_()
    each = functional.supcon(y, labels, temperature=0.5, reduction="none", **form)
    (batched,) = torch.autograd.grad(each, y, torch.eye(8).double(), is_grads_batched=True, retain_graph=True)
    for i in range(8):
        torch.testing.assert_close(batched[i], *torch.autograd.grad(each[i], y, retain_graph=True))


def test_differentiated_once_only() -> None:
    x = torch.randn(7, 5, requires_grad=True)
    loss = functional.supcon(x, LABELS)
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once only"):
        grad.sum().backward()
    y = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    for form in FORMS:
        assert torch.autograd.gradgradcheck(
            lambda y, form=form: functional.supcon(
                y, LABELS[:5], backend="reference", temperature=0.6, **form
            ),
            (y,),
            **GRADCHECK,
        )


def test_pair_statistics_take_any() -> None:
    x = torch.randn(7, 5, dtype=torch.float64)
    got = functional.pair_statistics(x, LABELS, multi_label="any")
    want = functional.pair_statistics(x, mask=(LABELS @ LABELS.T) > 0)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)


def test_base_temperature_and_modules() -> None:
    x = torch.randn(7, 5, dtype=torch.float64)
    want = 2 * functional.supcon(x, LABELS, temperature=0.2)
    torch.testing.assert_close(pysupcon.SupConLoss(0.2, base_temperature=0.1)(x, LABELS), want)
    loss = pysupcon.SupConLoss(0.2, multi_label="jaccard", overlap_threshold=0.25)
    want = functional.supcon(x, LABELS, temperature=0.2, multi_label="jaccard", overlap_threshold=0.25)
    torch.testing.assert_close(loss(x, LABELS), want)
    assert "multi_label='jaccard'" in repr(loss)
    assert "overlap_threshold=0.25" in repr(loss)
    assert "multi_label" not in repr(pysupcon.SupConLoss())


def test_rows_without_a_label_are_negatives_only() -> None:
    x = torch.randn(7, 2, 5, dtype=torch.float64, requires_grad=True)
    for form in FORMS:
        rows = functional.supcon(x, LABELS, reduction="none", **form)
        assert (rows[5] == 0).all()
        assert (rows[:5] > 0).all()
        (grad,) = torch.autograd.grad(rows.sum(), x)
        assert (grad[5] != 0).any()
        with pytest.warns(UserWarning, match="no anchor of this batch has a positive"):
            assert functional.supcon(x, torch.zeros_like(LABELS), **form) == 0


X = torch.randn(7, 5)


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (LABELS.float(), {}, r"labels must be bool, or integers that are 0 or 1, of shape \[B, C\]=\[7, C\], "
                             r"got float32 of shape \[7, 4\] \(weights of labels are not supported\)"),
        (LABELS + 1, {}, r"labels must be .*, got values from 1 to 2"),
        (LABELS[:6], {}, r"labels must be .* \[B, C\]=\[7, C\], got int64 of shape \[6, 4\]"),
        (LABELS[:, :1], {}, r"with C at least 2, got int64 of shape \[7, 1\] \(one label per sample: labels "
                            r"of shape \[B\]\)"),
        (LABELS, {"candidates": X}, "candidate_labels must be given when labels and candidates are"),
        (LABELS, {"candidates": X, "candidate_labels": LABELS[:, :3]},
         r"candidate_labels must be .* \[B, C\]=\[7, 4\], got int64 of shape \[7, 3\]"),
        (LABELS, {"candidates": X, "candidate_labels": LABELS[:, 0]}, "candidate_labels must be .*, got"),
        (LABELS[:, 0], {"candidates": X, "candidate_labels": LABELS}, "candidate_labels must be integers of"),
        (LABELS, {"multi_label": "all"}, "multi_label must be one of 'per_label', 'any', 'jaccard', got"),
        (LABELS, {"overlap_threshold": 0.5}, "overlap_threshold goes with multi_label='any' or 'jaccard'"),
        (LABELS, {"multi_label": "any", "overlap_threshold": 1.0}, "overlap_threshold must be less than 1"),
        (LABELS, {"multi_label": "any", "overlap_threshold": -0.1}, "overlap_threshold must be from 0 to 1"),
        (LABELS, {"multi_label": "any", "backend": "cpu"}, "by label only, not by multi_label=\"any\""),
        (LABELS, {"mask": torch.eye(7).bool()}, "labels and mask both define the positives"),
        (LABELS, {"gather": AllGather()}, r"gather takes one integer label per sample, got labels int64 of "
                                          r"shape \[7, 4\]"),
    ],
)  # fmt: skip
def test_errors(labels: Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        functional.supcon(X, labels, **options)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "supcon"])
@pytest.mark.parametrize("form", ["per_label", "jaccard"])
def test_losses_say_what_they_take(name: str, form: str) -> None:
    with pytest.raises(
        ValueError,
        match=rf"takes labels .* multi_label='any' only, got multi_label='{form}': pass multi_label='any'",
    ):
        LOSSES[name](X, LABELS, instances=torch.arange(7), multi_label=form)


def test_modules_refuse_what_their_loss_does_not_take() -> None:
    with pytest.raises(ValueError, match=r"DCLLoss takes labels .* multi_label='any' only, got .*'jaccard'"):
        pysupcon.DCLLoss(multi_label="jaccard")
    with pytest.raises(ValueError, match=r"InfoNCELoss does not take labels of shape \[B, C\], got"):
        pysupcon.InfoNCELoss(multi_label="any")
    with pytest.raises(ValueError, match="overlap_threshold goes with"):
        pysupcon.SupConLoss(overlap_threshold=0.5)
    with pytest.raises(TypeError, match="unexpected keyword argument 'multi_label'"):
        functional.info_nce(X.unsqueeze(1), multi_label="any")


@pytest.mark.parametrize("form", [FORMS[0], FORMS[2], FORMS[4]], ids=[IDS[0], IDS[2], IDS[4]])
def test_memory_grows_with_rows_not_pairs(form: dict[str, Any]) -> None:
    """What torch allocates. A bool for each pair would add 3 MiB from N = 1024 to 2048."""

    def peak(rows: int) -> int:
        x, labels = torch.randn(rows, 8, requires_grad=True), torch.rand(rows, 6) < 0.3

        def work() -> None:
            functional.supcon(x, labels, **form).backward()

        return allocated_peak(torch.device("cpu"), work)

    assert peak(2048) < peak(1024) + 2**20
