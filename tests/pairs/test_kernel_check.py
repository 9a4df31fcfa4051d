"""pysupcon/pairs/kernel_check.py without a GPU: on which cards a build runs, and the effect of wrong answers.

The queries of torch.cuda are monkeypatched, the "kernels" are operators for CPU tensors, and the rows of a
loss are fake CUDA tensors.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import pysupcon
from pysupcon import functional
from pysupcon.pairs import backends, kernel_check, known_answers, ops, tiled

CPU = torch.device("cpu")
FIRST = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("capability", "architectures", "ptx", "runs"),
    [
        ((8, 0), ["80", "90"], "90", True),  # the very one
        ((8, 6), ["80", "90"], "90", True),  # the same major version, an older minor one
        ((8, 9), ["80"], None, True),
        ((8, 0), ["86"], None, False),  # a newer minor one
        ((8, 0), ["86"], "86", False),
        ((9, 0), ["80"], None, False),  # machine code stays within its major version
        ((9, 0), ["80"], "80", True),  # the driver compiles PTX
        ((9, 0), ["90a"], None, True),
        ((10, 0), ["90a"], None, False),  # "a": on its own version only
        ((8, 9), ["80", "90a"], "90", True),
        ((10, 3), ["100a"], None, False),
        ((10, 3), ["100f"], None, True),  # "f": like the plain one, within its family
        ((12, 0), ["100f"], None, False),
        ((12, 1), ["80", "90"], "90", True),  # no machine code, but PTX
        ((12, 0), ["80", "90a"], "90a", False),
        ((9, 0), ["80", "90a"], "90a", True),
        ((7, 5), ["80", "90"], "90", False),  # a T4
        ((7, 0), ["80", "86", "89", "90a", "100", "120"], "120", False),  # a V100
        ((8, 6), ["90", "120"], "120", False),  # PTX is not compiled for older cards
        ((8, 0), [], None, False),
    ],
)
def test_code_for_a_card(
    capability: tuple[int, int], architectures: list[str], ptx: str | None, runs: bool
) -> None:
    why = kernel_check.missing_code(capability, architectures, ptx)
    assert (why is None) == runs


def test_missing_code_is_named() -> None:
    assert kernel_check.missing_code((7, 5), ["80", "90"], "90") == (
        "this build holds no code for compute capability 7.5 (it holds sm_80 sm_90 compute_90); "
        "the kernels need 8.0 or newer"
    )
    assert str(kernel_check.missing_code((8, 6), ["90a"], None)).endswith(
        '(it holds sm_90a); build with PYSUPCON_CUDA_ARCHS="86"'
    )


@pytest.mark.skipif(not ops.compiled_for("cuda"), reason="this build has no CUDA kernels")
def test_this_build_names_its_code() -> None:
    architectures, ptx = ops.cuda_code()
    assert architectures
    assert f"architectures {' '.join(architectures)} and PTX" in ops._C.cuda
    assert ptx == str(max(int(name.rstrip("af")) for name in architectures))


@pytest.mark.parametrize(
    ("setting", "parts"), [("highest", 3), ("high", 2), ("medium", 1)]
)  # what the glue makes of them: tests/cuda/test_known_answers.py and tests/cuda/test_cuda_glue.py
def test_parts_of_float32(setting: str, parts: int) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(setting)
        assert kernel_check.parts_of_float32() == parts
    finally:
        torch.set_float32_matmul_precision(before)


def test_parts_of_float32_by_the_newer_setting() -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert kernel_check.parts_of_float32() == 2
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        assert kernel_check.parts_of_float32() == 3
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


class Slightly:
    """The tiled operators; positive_softplus has an error of 1 % for one dtype of rows."""

    def __init__(self, wrong_for: torch.dtype | None) -> None:
        self.wrong_for = wrong_for

    def __getattr__(self, name: str) -> Any:
        return getattr(tiled, name)

    def positive_softplus(self, x: torch.Tensor, *arguments: Any) -> torch.Tensor:
        result = tiled.positive_softplus(x, *arguments)
        return result * 1.01 if x.dtype == self.wrong_for else result


class Cards:
    """A machine with CUDA cards, all of which give wrong answers for the dtype ``wrong_for``."""

    def __init__(self) -> None:
        self.capabilities = [(8, 6)]
        self.wrong_for: torch.dtype | None = None
        self.capturing = False
        self.checks: list[tuple[int | None, torch.dtype, int]] = []
        self.streams: list[str] = []
        self.within: Callable[[], None] = lambda: None

    def examine(self, operators: Any, device: torch.device, dtype: torch.dtype, parts: int) -> str | None:
        self.checks.append((device.index, dtype, parts))
        self.within()
        return _DISAGREEMENT(Slightly(self.wrong_for), CPU, dtype, parts)


def report(check: bool = False) -> dict[str, Any]:
    """Returns the CUDA entry of backends(), with the cards visible to torch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        return pysupcon.backends(check=check)["cuda"]


_DISAGREEMENT = known_answers.disagreement


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> Cards:
    made = Cards()
    build = {"with_cuda": True, "cuda": "nvcc 13.0", "cuda_code": "sm_80 sm_90 compute_90", "compiler": "g++"}
    build |= {"cpu_isa": lambda: "generic", "cpu_isas": lambda: ["generic"]}
    monkeypatch.setattr(ops, "_C", SimpleNamespace(**build), raising=False)
    monkeypatch.setattr(ops, "_problem", None)
    for name, value in {
        "is_initialized": lambda: True,
        "init": lambda: None,
        "device_count": lambda: len(made.capabilities),
        "get_device_capability": lambda index: made.capabilities[index],
        "get_device_name": lambda index: f"Card {index}",
        "current_stream": lambda device: f"the stream of {device}",
        "stream": lambda stream: made.streams.append(stream) or nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(kernel_check, "_capturing", lambda index: made.capturing)
    monkeypatch.setattr(kernel_check, "_verdicts", {})
    monkeypatch.setattr(kernel_check, "_warned", set())
    monkeypatch.setattr(known_answers, "disagreement", made.examine)
    monkeypatch.delenv("PYSUPCON_TRUST", raising=False)
    return made


def loss(backend: str = "auto", dtype: torch.dtype = torch.float32, index: int = 0, **more: Any) -> Any:
    """Computes a loss of fake CUDA tensors."""
    with FakeTensorMode():
        x = torch.empty(8, 4, dtype=dtype, device=f"cuda:{index}")
        labels = torch.empty(8, dtype=torch.int64, device=f"cuda:{index}")
        return functional.supcon(x, labels, backend=backend, **more)


def backend_of(requested: str = "auto", dtype: torch.dtype = torch.float32, index: int = 0) -> str:
    return backends.check_kernels(requested, torch.device("cuda", index), dtype)


MESSAGE = (
    "pysupcon's CUDA kernels are not used for float32 on cuda:0 (Card 0): positive_softplus (one set, D=72): "
    "the sum differs in 298 of 300 places, by 1.0e-02 of the right value at worst, where 2.0e-05 is allowed"
)


def test_wrong_answers_warn_once_and_raise_the_same_message(cards: Cards) -> None:
    cards.wrong_for = torch.float32
    with pytest.warns(UserWarning, match="pysupcon") as caught:
        assert loss().device == FIRST
    assert [str(w.message) for w in caught] == [
        f"{MESSAGE}; falling back to the slower backend='tiled' (pure PyTorch)"
    ]
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss()
        assert backend_of() == "tiled"
    with pytest.raises(RuntimeError) as error:
        loss(backend="cuda")
    assert str(error.value) == MESSAGE
    assert cards.checks == [(0, torch.float32, 3)]  # computed once


def test_an_error_first_still_warns_afterwards(cards: Cards) -> None:
    cards.wrong_for = torch.bfloat16
    with pytest.raises(RuntimeError, match="not used for bfloat16 on cuda:0"):
        backend_of("cuda", torch.bfloat16)
    with pytest.warns(UserWarning, match="not used for bfloat16 on cuda:0"):
        assert backend_of("auto", torch.bfloat16) == "tiled"


def test_right_answers_use_the_kernels(cards: Cards) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backend_of("auto") == backend_of("cuda") == "cuda"
    assert len(cards.checks) == 1
    assert cards.streams == ["the stream of cuda:0"]


def test_every_dtype_and_precision_has_its_own_verdict(cards: Cards) -> None:
    cards.wrong_for = torch.float16
    assert [backend_of("auto", dtype) for dtype in (torch.float32, torch.bfloat16)] == ["cuda", "cuda"]
    with pytest.warns(UserWarning, match="float16"):
        assert backend_of("auto", torch.float16) == "tiled"
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        backend_of()
    finally:
        torch.set_float32_matmul_precision(before)
    assert cards.checks == [
        (0, torch.float32, 3), (0, torch.bfloat16, 0), (0, torch.float16, 0), (0, torch.float32, 1),
    ]  # fmt: skip


def test_promoted_rows_are_checked_in_the_dtype_of_the_computation(cards: Cards) -> None:
    cards.wrong_for = torch.float32
    with FakeTensorMode():
        x = torch.empty(8, 4, dtype=torch.bfloat16, device=FIRST)
        queue = torch.empty(6, 4, device=FIRST)
        ids, others = (torch.empty(n, dtype=torch.int64, device=FIRST) for n in (8, 6))
        with pytest.raises(RuntimeError, match="not used for float32"):
            functional.supcon(x, ids, candidates=queue, candidate_labels=others, backend="cuda")


def test_a_mask_takes_the_tiled_path_without_a_check(cards: Cards) -> None:
    with FakeTensorMode():
        x, mask = torch.empty(8, 4, device=FIRST), torch.empty(8, 8, dtype=torch.bool, device=FIRST)
        functional.supcon(x, mask=mask)
    assert cards.checks == []


def test_two_cards_have_separate_verdicts(cards: Cards) -> None:
    cards.capabilities = [(9, 0), (7, 5)]
    assert backend_of(index=0) == "cuda"
    with pytest.warns(UserWarning, match=r"on cuda:1 \(Card 1\): this build holds no code .* capability 7.5"):
        loss(index=1)
    assert cards.checks == [(0, torch.float32, 3)]  # no test on the other card
    entry = report()
    assert entry["available"]
    assert entry["devices"]["cuda:0"] == {
        "available": True,
        "detail": "Card 0, compute capability 9.0: in use for float32",
    }
    assert not entry["devices"]["cuda:1"]["available"]
    assert "the kernels need 8.0 or newer" in entry["devices"]["cuda:1"]["detail"]


def test_backends_reports_what_is_known(cards: Cards) -> None:
    entry = report()
    assert entry["available"]
    assert entry["detail"].endswith("cuda:0: Card 0, compute capability 8.6: not tried yet")
    assert cards.checks == []
    cards.wrong_for = torch.float32
    with pytest.raises(RuntimeError):
        backend_of("cuda")
    entry = report()
    assert not entry["available"]
    assert MESSAGE in entry["detail"]
    backend_of("cuda", torch.bfloat16)
    assert report()["available"]  # for bfloat16
    assert MESSAGE in report()["detail"]


def test_backends_can_check_beforehand(cards: Cards) -> None:
    cards.capabilities = [(8, 0), (7, 0), (12, 0)]
    entry = report(check=True)
    assert [device["available"] for device in entry["devices"].values()] == [True, False, True]
    assert entry["devices"]["cuda:2"]["detail"] == (
        "Card 2, compute capability 12.0: in use for float32, bfloat16, float16, float64"
    )
    assert len(cards.checks) == 8
    backend_of(index=2)
    assert len(cards.checks) == 8


def test_all_cards_too_old(cards: Cards) -> None:
    cards.capabilities = [(7, 5)]
    entry = report()
    assert not entry["available"]
    assert "this build holds no code for compute capability 7.5" in entry["detail"]


def test_a_capture_is_not_disturbed(cards: Cards) -> None:
    cards.capturing, cards.wrong_for = True, torch.float32
    assert backend_of() == "cuda"  # trusted
    assert cards.checks == []
    cards.capturing = False
    with pytest.warns(UserWarning, match="not used"):
        assert backend_of() == "tiled"
    cards.capturing = True
    assert backend_of() == "tiled"  # the verdict holds in a capture


def test_a_capture_on_an_old_card_is_refused(cards: Cards) -> None:
    cards.capturing, cards.capabilities = True, [(7, 5)]
    with pytest.raises(RuntimeError, match="holds no code"):
        backend_of("cuda")


def test_fake_tensors_without_cuda_are_trusted(cards: Cards, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert backend_of() == "cuda"
    assert cards.checks == []


def test_trust_without_a_check(cards: Cards, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYSUPCON_TRUST", "1")
    cards.capabilities, cards.wrong_for = [(8, 0), (7, 5)], torch.float32
    assert backend_of() == "cuda"
    assert cards.checks == []
    with pytest.raises(RuntimeError, match="holds no code"):
        backend_of("cuda", index=1)


def test_a_full_device_is_checked_again(cards: Cards) -> None:
    def full() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    cards.within = full
    assert backend_of() == "cuda"
    cards.within, cards.wrong_for = lambda: None, torch.float32
    with pytest.warns(UserWarning, match="not used"):
        assert backend_of() == "tiled"


def test_threads_share_one_check_and_one_warning(cards: Cards) -> None:
    cards.wrong_for = torch.float32
    together = threading.Barrier(8)
    found: list[str] = []

    def first_use() -> None:
        together.wait()
        found.append(backend_of())

    threads = [threading.Thread(target=first_use) for _ in range(8)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == ["tiled"] * 8
    assert len(cards.checks) == 1
    assert len(caught) == 1


def test_the_check_is_isolated_from_its_caller(cards: Cards) -> None:
    """Modes of the caller do not affect the check, and the check restores all state."""
    seen: dict[str, Any] = {}

    def look() -> None:
        seen["type"] = type(torch.empty(1))
        seen["device"] = torch.empty(1).device.type
        seen["autocast"] = torch.is_autocast_enabled("cpu")
        seen["inference"] = torch.is_inference_mode_enabled()
        seen["grad"] = torch.is_grad_enabled()

    cards.within = look
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    torch.use_deterministic_algorithms(True)
    try:
        with (
            torch.inference_mode(),
            torch.autocast("cpu", torch.bfloat16),
            torch.device("meta"),
            FakeTensorMode(),
        ):
            assert backend_of() == "cuda"
            assert torch.is_autocast_enabled("cpu")
            assert torch.is_inference_mode_enabled()
            assert torch.empty(1).device.type == "meta"
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen == {
        "type": torch.Tensor,
        "device": "cpu",
        "autocast": False,
        "inference": False,
        "grad": True,
    }
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("wrong", [False, True])
def test_a_trace_checks_outside_of_its_graph(cards: Cards, wrong: bool) -> None:
    """``fullgraph=True`` refuses every graph break; the computation of the check is not in the graph."""
    cards.wrong_for = torch.float32 if wrong else None
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    def function(x: torch.Tensor) -> torch.Tensor:
        return x * (2 if backends.check_kernels("auto", FIRST, x.dtype) == "cuda" else 3)

    torch._dynamo.reset()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = torch.compile(function, fullgraph=True, backend=keep)(torch.ones(2))
    assert torch.equal(got, torch.full((2,), 3.0 if wrong else 2.0))
    assert len([w for w in caught if "not used" in str(w.message)]) == int(wrong)
    assert cards.checks == [(0, torch.float32, 3)]
    assert len(graphs) == 1
    assert [node.op for node in graphs[0].graph.nodes] == ["placeholder", "call_function", "output"]


def test_a_trace_raises_the_message(cards: Cards) -> None:
    cards.wrong_for = torch.float32

    def function(x: torch.Tensor) -> torch.Tensor:
        return x if backends.check_kernels("cuda", FIRST, x.dtype) == "cuda" else -x

    torch._dynamo.reset()
    with pytest.raises(RuntimeError) as error:
        torch.compile(function, backend="eager")(torch.ones(2))
    assert str(error.value) == MESSAGE
    torch._dynamo.reset()
    with pytest.raises(Exception, match="differs in 298 of 300 places"):
        torch.compile(function, backend="eager", fullgraph=True)(torch.ones(2))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_loss_on_the_cpu_runs_no_check(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("the CUDA check ran")

    monkeypatch.setattr(kernel_check, "unusable_reason", never)
    x, labels = torch.randn(8, 2, 4), torch.arange(8) % 3
    function = (
        torch.compile(functional.supcon, fullgraph=True, backend="eager") if compiled else functional.supcon
    )
    torch._dynamo.reset()
    assert torch.isfinite(function(x, labels))


def test_a_loss_does_not_import_the_tracer() -> None:
    code = (
        "import sys, torch, pysupcon; before = 'torch._dynamo' in sys.modules; "
        "pysupcon.SupConLoss()(torch.randn(4, 2, 3)); "
        "print(before, 'pysupcon.pairs.traced' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
