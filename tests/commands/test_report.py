"""The three formats of a report have the same content, and its pictures show the given data."""

from __future__ import annotations

import base64
import json
import math

import numpy as np
import pytest

from pysupcon.reports.charts import histogram_bins
from pysupcon.reports.page import to_html
from pysupcon.reports.pictures import draw_embedding, draw_loss, smoothed
from pysupcon.reports.report import Metric, Picture, Report, metrics_of

UNITS = {"knn/k=1/accuracy": "fraction", "geometry/spread": "distance"}


def report(**changed) -> Report:
    content = {
        "title": "Evaluation of a|b",
        "metrics": {
            "knn/k=1/accuracy": Metric(0.9512345, "fraction", 0.94, 0.9625, "neighbours"),
            "geometry/spread": Metric(1.23456789, "distance"),
            "knn/k=5/accuracy": Metric(1.0, "fraction", 1.0, 1.0),
            "alone": Metric(-3.0),
        },
        "metadata": {"seconds": {"knn": 0.125}, "samples": 7, "device": "cpu"},
        "warnings": ["class collapse"],
        "pictures": [Picture("embedding.png", "Features")],
        "confidence": 0.9,
    }
    return Report(**(content | changed))


def test_results_fold_into_metrics():
    results = [
        ("knn/k=1/accuracy", 0.5),
        ("knn/k=1/accuracy/high", 0.75),
        ("geometry/spread", 2.0),
        ("knn/k=1/accuracy/low", 0.25),
    ]
    assert metrics_of(results, lambda name: (UNITS.get(name, ""), f"of {name}")) == {
        "knn/k=1/accuracy": Metric(0.5, "fraction", 0.25, 0.75, "of knn/k=1/accuracy"),
        "geometry/spread": Metric(2.0, "distance", meaning="of geometry/spread"),
    }


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ([("a", 1.0), ("a", 2.0)], "metric 'a' came twice"),
        ([("a/low", 1.0)], "metric 'a/low' is the end of an interval, but there is no 'a'"),
        ([("a", 1.0), ("a/low", 0.0)], "metric 'a': a metric needs both ends of its interval or neither"),
        ([("a", math.nan)], r"metric 'a': a metric must be finite, got \[nan\]"),
        (
            [("a", 1.0), ("a/low", 0.0), ("a/high", math.inf)],
            r"metric 'a': a metric must be finite, got .*inf",
        ),
    ],
)
def test_broken_results_are_refused_by_name(results, message):
    with pytest.raises(ValueError, match=message):
        metrics_of(results, lambda name: ("", ""))


def test_json_round_trip_is_exact_and_in_order():
    text = report().to_json()
    assert Report.from_json(text) == report()
    content = json.loads(text)
    assert list(content["metrics"]) == list(report().metrics)
    assert content["metrics"]["knn/k=1/accuracy"] == {
        "value": 0.9512345,
        "unit": "fraction",
        "low": 0.94,
        "high": 0.9625,
        "meaning": "neighbours",
    }
    assert text.endswith("}\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"schema": 2}', "a JSON object with schema 1, got 2"),
        ("[]", "a JSON object with schema 1, got 'list'"),
        ('{"schema": 1', "Expecting"),
    ],
)
def test_other_json_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Report.from_json(text)


def parse_markdown(text: str) -> dict[str, list[list[str]]]:
    """Rows of the table under each heading, escapes undone."""
    tables: dict[str, list[list[str]]] = {}
    heading = ""
    for line in text.splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
            tables[heading] = []
        elif line.startswith("|"):
            cells = line.replace("\\|", "\0").strip("|").split("|")
            tables[heading].append([cell.strip().replace("\0", "|") for cell in cells])
    return {name: rows[2:] for name, rows in tables.items()}


def test_markdown_tables_hold_every_number():
    text = report().to_markdown()
    tables = parse_markdown(text)
    assert tables["knn"] == [
        ["k=1/accuracy", "95.12", "[94.00, 96.25]", "%", "neighbours"],
        ["k=5/accuracy", "100.00", "[100.00, 100.00]", "%", ""],
    ]
    assert tables["geometry"] == [["spread", "1.235", "", "distance"]]
    assert tables["alone"] == [["alone", "-3", "", ""]]
    assert tables["Settings"] == [["seconds.knn", "0.125"], ["samples", "7"], ["device", "cpu"]]
    assert "# Evaluation of a\\|b" in text
    assert "90 % interval" in text
    assert "> **Warning:** class collapse" in text
    assert "![Features](embedding.png)" in text


def test_the_report_says_what_its_intervals_are_for(tmp_path):
    said = "this one training: they say nothing about other seeds."
    without = report(metrics={"alone": Metric(-3.0)}, pictures=[])
    assert said in report().to_markdown()
    assert said not in without.to_markdown()
    pages = [to_html(each, tmp_path) for each in (report(pictures=[]), without)]
    assert [said in page for page in pages] == [True, False]


def test_markdown_cells_with_pipes_and_breaks_stay_one_cell():
    odd = report(metrics={"knn/a|b": Metric(1.0, "x\ny")}, metadata={})
    assert parse_markdown(odd.to_markdown())["knn"] == [["a|b", "1", "", "x y"]]


def test_the_summary_is_aligned_and_shows_all_that_fits():
    lines = report(notes=["knn: k = 200 left out"]).summary().splitlines()
    assert lines[0].split() == ["Evaluation", "of", "a|b", "90", "%", "interval"]
    assert [line.split()[0] for line in lines[1:]] == [
        "knn/k=1/accuracy", "geometry/spread", "knn/k=5/accuracy", "alone", "warning:", "note:",
    ]  # fmt: skip
    first, second = lines[1], lines[3]
    assert first.split() == ["knn/k=1/accuracy", "95.12", "[94.00,", "96.25]", "%", "neighbours"]
    assert first.index("95.12") + 5 == second.index("100.00") + 6  # right-aligned
    assert first.index("%") == second.index("%")
    assert lines[-2:] == ["warning: class collapse", "note: knn: k = 200 left out"]
    assert all(line == line.rstrip() for line in lines)


def test_the_summary_of_many_metrics_is_the_headline():
    """At most so many lines, whatever the number of metrics and warnings."""
    many = {f"knn/k={k}/accuracy": Metric(k / 100) for k in range(50)}
    many |= {f"pairs/class={c}/kl_bound": Metric(c) for c in range(50)}
    chosen = ["knn/k=7/accuracy", "knn/k=30/accuracy"]
    text = report(metrics=many, headline=chosen).summary()
    assert [line.split()[0] for line in text.splitlines()[1:-1]] == chosen
    without = report(metrics=many, warnings=[f"number {i}" for i in range(9)]).summary(12).splitlines()
    assert len(without) == 12
    assert without[-1] == "note: the report has 6 more warnings and notes"
    assert not any("class=" in line for line in without)


def test_the_page_is_one_file_and_shows_text_as_it_is(tmp_path):
    """A parser finds every number, the picture's bytes and no markup from names."""
    from html.parser import HTMLParser

    content = bytes(range(256))
    (tmp_path / "embedding.png").write_bytes(content)
    odd = report(title="<script>alert(1)</script> & co", warnings=["<b>bold</b>"], notes=["kept: knn"])
    page = to_html(odd, tmp_path)

    class Reader(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.tags: list[str] = []
            self.sources: list[str] = []
            self.text: list[str] = []

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.tags.append(tag)
            self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

        def handle_data(self, data: str) -> None:
            self.text.append(data.strip())

    reader = Reader()
    reader.feed(page)
    assert not {"script", "b", "link"} & set(reader.tags)
    assert reader.tags.count("h1") == 1
    assert "<script>alert(1)</script> & co" in reader.text
    assert {"95.12", "[94.00, 96.25]", "-3", "kept: knn", "<b>bold</b>", "neighbours"} <= set(reader.text)
    (source,) = reader.sources
    kind, _, encoded = source.partition(",")
    assert kind == "data:image/png;base64"
    assert base64.b64decode(encoded) == content


def test_a_report_without_metrics_still_has_its_forms(tmp_path):
    empty = Report("nothing", {})
    assert Report.from_json(empty.to_json()) == empty
    assert empty.summary() == "nothing"
    assert empty.to_markdown().startswith("# nothing")
    assert "<h1>nothing</h1>" in to_html(empty, tmp_path)


# Pictures


def pixels(path) -> np.ndarray:
    """[H, W, 3] uint8 of a PNG file, decoded by another library than the writer's."""
    from PIL import Image

    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def count_colour(image: np.ndarray, colour: tuple[int, int, int], slack: int = 60) -> int:
    return int((np.abs(image.astype(int) - colour).max(axis=2) <= slack).sum())


def test_embedding_picture_shows_every_class(tmp_path):
    points = np.random.default_rng(0).normal(size=(120, 2)) + 8 * np.arange(120)[:, None] // 40
    fine = np.arange(120) // 40
    arguments = {"title": "Features", "axes": ("t-SNE 1", "t-SNE 2")}
    path = tmp_path / "embedding.png"
    draw_embedding(path, points, fine, fine // 2, **arguments)
    image = pixels(path)
    assert image.shape[0] > 500
    assert image.shape[1] > 800
    for colour in ((63, 144, 218), (255, 169, 14), (189, 31, 1)):
        assert count_colour(image, colour) > 300
    draw_embedding(tmp_path / "again.png", points, fine, fine // 2, **arguments)
    assert np.array_equal(pixels(tmp_path / "again.png"), image)
    # Other labels of the same points give another picture.
    draw_embedding(tmp_path / "other.png", points, fine[::-1], fine[::-1] // 2, **arguments)
    assert not np.array_equal(pixels(tmp_path / "other.png"), image)


@pytest.mark.parametrize("classes", [1, 10, 100])  # one colour, the last palette with a legend, a gradient
def test_embedding_picture_of_few_and_many_classes(tmp_path, classes):
    points = np.random.default_rng(0).normal(size=(200, 2))
    fine = np.arange(200) % classes
    path = tmp_path / "embedding.png"
    names = {label: f"name {label}" for label in range(classes)}
    draw_embedding(path, points, fine, fine // 5, title="", axes=("", ""), fine_names=names)
    assert (pixels(path) < 250).any(axis=2).mean() > 0.01


def test_embedding_picture_refuses_mismatched_labels(tmp_path):
    with pytest.raises(ValueError, match=r"got \[3, 2\], \[2\] and \[3\]"):
        draw_embedding(tmp_path / "x.png", np.zeros((3, 2)), [0, 1], [0, 0, 0], title="", axes=("", ""))
    assert not list(tmp_path.iterdir())


def test_loss_picture_shows_every_curve(tmp_path):
    steps = np.arange(300)
    curves = {"contrastive": 5 - steps / 100, "cross_entropy": np.exp(-steps / 100)}
    draw_loss(tmp_path / "a.png", steps, curves, title="Loss", chance={"contrastive": np.full(300, 5.5)})
    draw_loss(tmp_path / "b.png", steps, curves, title="Loss")
    with_chance, without = pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png")
    for image in (with_chance, without):
        assert count_colour(image, (63, 144, 218)) > 300
        assert count_colour(image, (255, 169, 14)) > 300
    assert not np.array_equal(with_chance, without)


def test_loss_picture_shows_validation(tmp_path):
    steps, curve = np.arange(40), {"loss": 5 - np.arange(40) / 10}
    draw_loss(tmp_path / "a.png", steps, curve, title="Loss")
    held_out = np.full(40, math.nan)
    held_out[[9, 19, 39]] = [4.5, 4.0, 3.5]
    draw_loss(tmp_path / "b.png", steps, curve, title="Loss", validation={"loss": held_out})
    without, with_validation = pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png")
    assert count_colour(with_validation, (63, 144, 218)) > count_colour(without, (63, 144, 218)) + 100


@pytest.mark.parametrize("scale", [1.0, 1e-2, 1e-6])  # cosines of a trained encoder lie close to 1
def test_one_outlier_does_not_press_the_histogram_into_one_bin(scale):
    values = 1 - scale * np.random.default_rng(0).random(400)
    values[7] = -1.0
    counts = np.histogram(np.maximum(values, histogram_bins(values)[0]), histogram_bins(values))[0]
    assert counts.sum() == 400
    assert counts.max() < 30
    assert len(histogram_bins(np.ones(5))) == 61  # all equal


@pytest.mark.parametrize("values", [[2.0], [2.0, math.nan, 1.0], [math.nan]])  # one step, a gap, nothing
def test_loss_picture_of_few_steps(tmp_path, values):
    draw_loss(tmp_path / "loss.png", range(len(values)), {"loss": values}, title="Loss")
    assert pixels(tmp_path / "loss.png").shape[2] == 3


def test_loss_picture_refuses_a_curve_of_another_length(tmp_path):
    with pytest.raises(ValueError, match=r"loss 'ce' must have shape \[S\]=\[3\], got \[2\]"):
        draw_loss(tmp_path / "x.png", [1, 2, 3], {"ce": [0.0, 0.0]}, title="")


def test_running_mean():
    values = np.array([1.0, 2.0, 6.0, 7.0, 9.0])
    assert smoothed(values, 3) == pytest.approx([1, 3, 5, 22 / 3, 9])
    assert smoothed(values, 1) == pytest.approx(values)
    assert smoothed(values, 99) == pytest.approx([1, 3, 5, 22 / 3, 9])  # only the middle could reach further
    assert smoothed(np.arange(50.0), 9) == pytest.approx(np.arange(50))  # a line stays a line
    assert smoothed(np.array([]), 3).shape == (0,)
