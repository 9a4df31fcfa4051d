"""Runs the benchmark scripts at tiny sizes and checks their results, validation and comparisons."""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.kernels import (  # noqa: E402
    bars,
    busy,
    cases,
    compare,
    forms,
    measure,
    oracle,
    peers,
    render_tables,
    run,
    suite,
)
from pysupcon import functional  # noqa: E402
from pysupcon.profiling.workload import Inputs  # noqa: E402

TINY = ["--sizes", "256", "--seconds", "0.05"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("results")
    arguments = ["--cases", "small", "losses", "threads", "rate", "--json", str(folder / "r.json")]
    implementations = ["--implementations", "pysupcon", "tiled", "written", "metric-learning"]
    assert run.main([*arguments, *TINY, *implementations, "--plot", str(folder)]) == 0
    return folder, json.loads((folder / "r.json").read_text(encoding="utf-8"))


def test_every_row_is_validated_and_timed(results: tuple[Path, dict[str, Any]]) -> None:
    _, stored = results
    measured = [row for row in stored["rows"] if "skipped" not in row]
    assert {row["loss"] for row in measured} == set(cases.LOSSES)
    for row in measured:
        assert row["validated_n"] == 256
        assert row["loss_error"] < 1e-4
        assert row["gradient_error"] < 1e-3
        assert row["forward_s"] > 0
        assert row["backward_s"] > 0
        assert row["repetitions"] >= 3
        assert row["quartiles_s"][0] <= row["both_s"] <= row["quartiles_s"][1]


def test_results_name_the_machine_and_the_commit(results: tuple[Path, dict[str, Any]]) -> None:
    machine = results[1]["machine"]
    assert machine["versions"]["torch"] == torch.__version__.split("+")[0] or "+" in torch.__version__
    assert machine["cores"] >= 1
    assert machine["threads"] == torch.get_num_threads()
    assert machine["processor"]
    assert machine["commit"] is None or len(machine["commit"].rstrip("+")) == 12


def test_unsupported_losses_are_skipped(results: tuple[Path, dict[str, Any]]) -> None:
    found = {
        (row["implementation"], row["loss"]): row.get("skipped")
        for row in results[1]["rows"]
        if row["case"] == "losses"
    }
    assert found["metric-learning", "spread"] == "no spread"
    assert found["metric-learning", "supcon"] is None
    assert found["tiled", "cnce"] is None
    problem = cases.Problem(loss="clip", n=64)
    assert peers.PEERS["inf-cl"].missing(problem, 2**30) == "no float32"
    assert peers.PEERS["memeff"].missing(replace(problem, dtype="bfloat16"), 2**30) == "no cpu"


def test_bits_do_not_depend_on_threads(results: tuple[Path, dict[str, Any]]) -> None:
    rows = [r for r in results[1]["rows"] if r["case"] == "threads" and r["implementation"] == "pysupcon"]
    assert {row["threads"] for row in rows} == {1, 2}
    for loss in ("supcon", "sincere"):
        assert len({row["bits"] for row in rows if row["loss"] == loss}) == 1
    assert len({row["bits"] for row in rows}) == 2


def test_rate_follows_the_formula(results: tuple[Path, dict[str, Any]]) -> None:
    (row,) = [r for r in results[1]["rows"] if "rate_ratio" in r]
    assert row["case"] == "rate"
    assert row["rate_ratio"] == pytest.approx(row["rate_flops"] / row["mm_flops"])
    assert cases.Problem(n=256, dim=128).flops == 4 * 256 * 256 * 128


def test_pictures_are_drawn(results: tuple[Path, dict[str, Any]]) -> None:
    picture = (results[0] / "time.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000


def test_a_wrong_loss_is_caught(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def almost(problem: cases.Problem) -> peers.Implementation:
        def loss(i: Inputs) -> torch.Tensor:
            right = functional.supcon(i.features, i.labels, temperature=problem.temperature)
            return right + 1e-3 * right.detach() * (1 + i.features.sum() - i.features.detach().sum())

        return loss

    monkeypatch.setitem(peers.PEERS, "pysupcon", replace(peers.PEERS["pysupcon"], build=almost))
    arguments = ["--cases", "small", *TINY, "--implementations", "pysupcon"]
    assert run.main(arguments) == 1
    output = capsys.readouterr().out
    assert "FAILED: loss error 1.0e-03 > 2e-06" in output
    assert "gradient error" in output


def test_nan_is_never_within_tolerance() -> None:
    nan = float("nan")
    problem = cases.Problem(n=256)
    expected = oracle.Truth(3.0, torch.ones(256, 128, dtype=torch.float64))
    for implementation, errors, message in (
        ("pysupcon", oracle.Errors(nan, 0.0), "loss error nan > 2e-06"),
        ("written", oracle.Errors(0.0, nan), "gradient error nan > 1e-03"),
        ("pysupcon", oracle.Errors(1e-6, 1e-6), None),
    ):
        assert suite.out_of_tolerance(implementation, problem, expected, errors) == message


def test_a_gradient_that_vanishes_has_an_absolute_bar() -> None:
    """One sample of two views: SupCon's loss and gradient are 0, the computed ones almost 0."""
    problem = cases.Problem(n=2, dim=8, classes=1)
    expected = oracle.Truth(0.0, torch.zeros(2, 8, dtype=torch.float64))
    close = oracle.errors(torch.tensor(1e-8), torch.full((2, 8), 1e-7), expected)
    assert suite.out_of_tolerance("pysupcon", problem, expected, close) is None
    far = oracle.errors(torch.tensor(1e-8), torch.full((2, 8), 1e-4), expected)
    assert "gradient error 4.0e-04" in str(suite.out_of_tolerance("pysupcon", problem, expected, far))


def test_wide_rows_of_16_bits_are_within_two_roundings() -> None:
    """Rounding the weights and the result to bfloat16 has an error of 4.2e-3 at D = 768, 100 classes."""
    problem = cases.Problem(n=1024, dim=768, dtype="bfloat16")
    inputs = cases.make_inputs(problem, seed=0)
    x, expected = inputs.features.detach().double(), oracle.truth(problem, inputs)
    s = (x @ x.T / problem.temperature).fill_diagonal_(-torch.inf)
    weights = (s.softmax(1) + s.softmax(1).T) / problem.n
    rounded = weights.mul(2.0**20).to(torch.bfloat16).double().div(2.0**20)
    gradient = expected.gradient + (rounded - weights) @ x / problem.temperature
    found = oracle.errors(torch.tensor(expected.loss), gradient.to(torch.bfloat16), expected)
    assert found.gradient > 2e-3
    assert suite.out_of_tolerance("pysupcon", problem, expected, found) is None
    doubled = found._replace(gradient=4 * found.gradient)
    assert suite.out_of_tolerance("pysupcon", problem, expected, doubled) is not None


@pytest.mark.parametrize("loss", cases.LOSSES + cases.TWO_SETS)
def test_the_truth_in_chunks_is_the_dense_loss(loss: str) -> None:
    problem = cases.Problem(loss=loss, n=58, dim=9, classes=5, dtype="float64", temperature=0.3)
    inputs = cases.make_inputs(problem, seed=3)
    expected = measure.evaluate(peers.PEERS["dense"].build(problem), inputs)
    found = oracle.truth(problem, inputs, anchors=7)  # 58 = 8 * 7 + 2
    assert found.loss == pytest.approx(expected.loss.item(), rel=1e-12)
    torch.testing.assert_close(found.gradient, expected.gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("loss", ["supcon", "sincere", *cases.TWO_SETS])
def test_written_losses_are_correct(loss: str) -> None:
    problem = cases.Problem(loss=loss, n=60, dim=8, classes=6, dtype="float64")
    inputs = cases.make_inputs(problem, seed=0)
    found = measure.evaluate(peers.PEERS["written"].build(problem), inputs)
    errors = oracle.errors(*found, oracle.truth(problem, inputs))
    assert errors.loss < 1e-12
    assert errors.gradient < 1e-12


def test_inputs_are_random_unit_rows_of_two_views() -> None:
    problem = cases.Problem(n=400, dim=64, classes=10)
    first, second = cases.make_inputs(problem, 0), cases.make_inputs(problem, 1)
    assert not torch.equal(first.features, second.features)
    assert torch.equal(first.features, cases.make_inputs(problem, 0).features)
    torch.testing.assert_close(first.features.norm(dim=1), torch.ones(400))
    assert first.labels.bincount().tolist() == [40] * 10
    assert first.instances.bincount().tolist() == [2] * 200
    assert torch.equal(first.labels[0::2], first.labels[1::2])
    assert first.labels[::2].tolist() != sorted(first.labels[::2].tolist())


def test_functions_are_timed_in_turns() -> None:
    problem = cases.Problem(n=4, dim=2, classes=1)
    inputs = [cases.make_inputs(problem, seed) for seed in range(2)]
    calls: list[tuple[str, int]] = []

    def make(name: str) -> peers.Implementation:
        def loss(i: Inputs) -> torch.Tensor:
            calls.append((name, 0 if i is inputs[0] else 1))
            return i.features.sum()

        return loss

    found, _ = measure.interleaved({"a": make("a"), "b": make("b")}, inputs, seconds=0.0, least=3)
    assert calls == [("a", 0), ("a", 1), ("b", 0), ("b", 1), *[(n, k % 2) for k in range(3) for n in "ab"]]
    assert all(len(timing.both) == 3 for timing in found.values())


def test_peak_memory_of_fresh_processes() -> None:
    """The dense loss holds as many matrices as declared; pysupcon needs less than one."""
    problem = cases.Problem(n=2048, dim=64)
    matrix = 4 * problem.n**2
    peaks = {
        name: measure.peak_memory(name, peers.PEERS[name].build(problem), problem)
        for name in ("pysupcon", "written")
    }
    assert peaks["pysupcon"] < matrix / 2
    # The peak includes at least the gradient.
    assert peaks["pysupcon"] > problem.input_bytes / 2
    assert peaks["written"] == pytest.approx(peers.PEERS["written"].matrices * matrix, rel=0.15)


def test_a_row_needs_at_most_80_bytes_besides_its_gradient() -> None:
    """Measured from 32k to 96k rows: order, n, p, the gradients of both and of the mean, the weights.

    A peak varies by some 200 KiB from run to run, which is 3 bytes a row here.
    """
    problem = cases.Problem(n=98_304, dim=2, classes=1000)
    smaller = problem.smaller(problem.n // 3)
    ours = peers.PEERS["pysupcon"]
    found: dict[int, int] = {}
    for _ in range(3):  # a busy machine adds some pages to a peak: the smallest of up to three
        for p in (problem, smaller):
            peak = measure.peak_memory("pysupcon", ours.build(p), p)
            found[p.n] = min(peak, found.get(p.n, peak))
        a_row = (found[problem.n] - found[smaller.n]) / (problem.n - smaller.n) - 8
        if a_row <= 80:
            break
    assert a_row <= 80


def test_a_process_that_dies_is_reported() -> None:
    with pytest.raises(MemoryError, match="nobody"):
        measure.peak_memory("nobody", lambda i: i.features.sum(), cases.Problem(n=4, dim=2))


def test_implementations_that_do_not_fit_are_skipped() -> None:
    problem = cases.Problem(n=65_536)
    assert peers.PEERS["written"].missing(problem, 100 * 2**30) == "needs 146 GiB"
    assert peers.PEERS["written"].missing(problem, 150 * 2**30) is None
    assert peers.PEERS["pysupcon"].missing(problem, 2**20) is None


def _row(**changes: Any) -> dict[str, Any]:
    row = {**cases.Problem(n=16_384).to_dict(), "case": "speed", "implementation": "pysupcon", "threads": 2}
    return row | changes


def _stored(*rows: dict[str, Any], processor: str = "a") -> dict[str, Any]:
    return {"machine": {"processor": processor}, "rows": list(rows)}


@pytest.mark.parametrize(
    ("implementation", "measure_name", "new", "slower"),
    [
        ("pysupcon", "both_s", 1.3, True),
        ("pysupcon", "both_s", 1.2, False),
        ("pysupcon", "peak_bytes", 1.3, True),
        ("written", "both_s", 2.0, False),  # other implementations cannot regress
    ],
)
def test_compare(implementation: str, measure_name: str, new: float, slower: bool) -> None:
    old_row = _row(implementation=implementation, **{measure_name: 1.0})
    new_row = _row(implementation=implementation, **{measure_name: new})
    found = compare.regressions(_stored(old_row), _stored(new_row))
    assert found.slower is slower
    assert ("REGRESSED" in found.text) is slower
    assert f"{new:.2f}" in found.text


def test_compare_uses_equal_points_only() -> None:
    found = compare.regressions(_stored(_row(both_s=1.0)), _stored(_row(both_s=9.0, n=8192)))
    assert not found.slower
    assert "have no point in common" in found.text
    other = compare.regressions(_stored(_row(both_s=1.0), processor="b"), _stored(_row(both_s=1.0)))
    assert "another machine (b)" in other.text


def test_run_fails_on_a_regression(results: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    stored = json.loads(json.dumps(results[1]))
    for row in stored["rows"]:
        if "both_s" in row:
            row["both_s"] /= 1000
    old = tmp_path / "old.json"
    old.write_text(json.dumps(stored), encoding="utf-8")
    arguments = ["--cases", "small", *TINY, "--implementations", "pysupcon", "--compare", str(old)]
    assert run.main(arguments) == 1
    assert run.main([*arguments, "--tolerance", "1e9"]) == 0


def test_invalid_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--compare", str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err
    assert run.main(["--sizes", "255"]) == 2
    assert "n must be even" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert run.main(["--device", "cuda"]) == 2
        assert "no CUDA device" in capsys.readouterr().err


def test_bars() -> None:
    rows = [
        _row(both_s=1.0),
        _row(implementation="written", both_s=30.0),
        _row(implementation="compiled", both_s=4.0),
        _row(case="memory", peak_bytes=2.0**20),
        _row(case="memory", implementation="written", peak_bytes=2.0**27),
        _row(case="memory65k", n=65_536, peak_bytes=2.0**20, bytes_a_row=100.0),
        _row(case="threads", bits="a", threads=1),
        _row(case="threads", bits="b", threads=2),
    ]
    found = {bar.name: bar for bar in bars.measured(rows)}
    met = [bar.met for bar in found.values()]
    assert [bar.value for bar in found.values()] == [30.0, 4.0, 128.0, 2.0**20, 100.0, 1.0]
    assert met == [True, False, True, True, False, False]
    assert bars.lines(list(found.values()))[2][-1] == "MISSED"
    assert bars.measured([_row(device="cuda", both_s=1.0)]) == []


def test_render_tables(results: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{render_tables.BEGIN}\nold\n{render_tables.END}\nafter\n", encoding="utf-8")
    arguments = [str(results[0] / "r.json"), "--page", str(readme)]
    assert render_tables.main([*arguments, "--check"]) == 1
    assert "old" in readme.read_text(encoding="utf-8")
    assert render_tables.main(arguments) == 0
    text = readme.read_text(encoding="utf-8")
    assert text.startswith(f"before\n{render_tables.BEGIN}\n")
    assert text.endswith(f"{render_tables.END}\nafter\n")
    assert "| **pysupcon** |" in text
    assert "N = 256" in text
    assert results[1]["machine"]["processor"] in text
    assert render_tables.main([*arguments, "--check"]) == 0
    readme.write_text("no markers", encoding="utf-8")
    assert render_tables.main(arguments) == 2


def test_the_readme_shows_the_stored_results() -> None:
    stored = [json.loads(path.read_text(encoding="utf-8")) for path in render_tables.RESULTS.glob("*.json")]
    assert any("schema" in results for results in stored)
    assert render_tables.main(["--check"]) == 0


@pytest.mark.slow
def test_every_implementation_and_case_at_a_small_size(tmp_path: Path) -> None:
    arguments = ["--sizes", "512", "--seconds", "0.05", "--json", str(tmp_path / "r.json")]
    assert run.main([*arguments, "--plot", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["rows"]
    compiled = [row for row in rows if row["implementation"] == "compiled" and row["case"] == "small"]
    assert compiled
    assert all(row["both_s"] > 0 for row in compiled)
    assert (tmp_path / "memory.png").exists()


def test_busy_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored = tmp_path / "busy.json"
    threads = torch.get_num_threads()
    try:
        assert busy.main(["--threads", "2", "--n", "64", "96", "--seconds", "0", "--json", str(stored)]) == 0
    finally:
        torch.set_num_threads(threads)
    rows = json.loads(stored.read_text(encoding="utf-8"))["rows"]
    assert {(r["busy"], r["n"], r["work"], r["threads"]) for r in rows} == set(
        itertools.product(busy.BUSY, (64, 96), ("loss", "torch.mm"), (1, 2))
    )
    assert all(0 < r["seconds"] < 60 and r["processor_seconds"] > 0 for r in rows)
    output, page = capsys.readouterr().out.strip().split("\n\nFor benchmarks/README.md:\n\n")
    assert len(page.splitlines()) == 2 + 2
    assert len(output.splitlines()) == 2 + 2 + 2 * len(busy.BUSY)
    with pytest.raises(SystemExit):
        busy.main(["--threads", "1"])
    assert "--threads must be at least 2" in capsys.readouterr().err


def test_the_page_shows_the_stored_times_of_a_busy_machine() -> None:
    stored = json.loads((ROOT / "benchmarks" / "results" / "busy_cpu.json").read_text(encoding="utf-8"))
    shown = "\n".join(busy.page_lines(stored["rows"], stored["machine"]["threads"]))
    assert shown in (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")


def test_forms_of_contrast(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored = tmp_path / "forms.json"
    small = ["--n", "64", "--dim", "8", "--rounds", "1", "--threads", "1", "--json", str(stored)]
    assert forms.main(small) == 0
    found = json.loads(stored.read_text(encoding="utf-8"))["forms"]
    assert {"SupCon", "memory of 64 rows", "20 labels, per_label"} <= set(found)
    assert all(one["seconds"] > 0 and one["bytes"] > 0 for one in found.values())
    assert "20 labels, jaccard" in capsys.readouterr().out


def test_the_page_shows_the_stored_forms_of_contrast() -> None:
    stored = json.loads((ROOT / "benchmarks/results/forms_cpu.json").read_text(encoding="utf-8"))
    page = (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")
    for cells in forms.lines(stored["forms"]):
        assert f"| {' | '.join(cells)} |" in page
