"""Names of classes, runs and metrics with markup, math and bytes that are not UTF-8: shown as they are."""

from __future__ import annotations

import html
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.data_files import write_image_folder
from matplotlib.figure import Figure
from matplotlib.text import Text

from pysupcon.commands.compare import compare, to_markdown, write
from pysupcon.commands.export import export_run
from pysupcon.config import parse_args, to_yaml
from pysupcon.data.datamodule import load_data
from pysupcon.errors import ConfigError
from pysupcon.evaluation.evaluate import evaluate_run
from pysupcon.evaluators import BootstrapConfig
from pysupcon.reports.charts import (
    draw_confusion,
    draw_curves,
    draw_differences,
    draw_groups,
    draw_separation,
)
from pysupcon.reports.evaluated_runs import read_run
from pysupcon.reports.pictures import draw_embedding, draw_loss
from pysupcon.reports.report import Markdown, Metric, Report, escape, markdown_table
from pysupcon.trainer.checkpoint import save_weights
from pysupcon.trainer.run import build_model

NAMES = [
    r"$\frac$",
    "$$",
    "a|b",
    "<img src=x onerror=alert(1)>",
    "two\nlines",
    "_hidden",
    "\udcff\udc80",
    "*b*",
]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("worst_group/k=1, 5 %", "worst_group/k=1, 5 %"),
        ("a|b\\", r"a\|b\\"),
        ("# one\r\ntwo\x85three\u2028four", r"\# one two three four"),
        ("<b>&amp;</b>", "&lt;b&gt;&amp;amp;&lt;/b&gt;"),
        ("*a* _b_ __c__ `d` ~e~ $f$", r"\*a\* \_b\_ \_\_c\_\_ \`d\` \~e\~ \$f\$"),
        ("![x](https://host/y) www.host", r"!\[x\](https\://host/y) www\.host"),
        ("\udcff", "?"),
    ],
)
def test_escape(text: str, shown: str) -> None:
    assert escape(text) == shown
    undone = html.unescape(re.sub(r"\\(\W|_)", r"\1", shown))
    assert undone == " ".join(text.encode("utf-8", "replace").decode().split())


def test_markdown_is_not_escaped_twice() -> None:
    assert markdown_table(("*",), [("*",), (Markdown("**1**"),)])[0::2] == [r"| \* |", r"| \* |"]
    assert markdown_table(("x",), [(Markdown("**1**"),)])[2] == "| **1** |"
    metric = Metric(0.5, "fraction", 0.25, 0.75)
    assert "| a | 50.00 | [25.00, 75.00] | % |" in Report("t", {"g/a": metric}).to_markdown()


@pytest.mark.filterwarnings("ignore:Glyph")
def test_pictures_show_the_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[list[str]] = []
    save = Figure.savefig

    def savefig(figure: Figure, *args: object, **kwargs: object) -> None:
        save(figure, *args, **kwargs)
        texts = figure.findobj(Text)
        assert not any(text.get_parse_math() for text in texts)
        legends = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
        ticks = [text.get_text() for axes in figure.axes for text in axes.get_xticklabels()]
        ticks += [text.get_text() for axes in figure.axes for text in axes.get_yticklabels()]
        shown.append([text.strip() for text in legends + ticks])

    monkeypatch.setattr(Figure, "savefig", savefig)
    labels, names, title = np.arange(16) % 8, dict(enumerate(NAMES)), NAMES[0]
    cosines, path = np.linspace(0, 1, 16), tmp_path / "x.png"
    points = np.stack([cosines, cosines], axis=1)
    draw_embedding(path, points, labels, labels, title=title, axes=("x", "y"), fine_names=names)
    draw_curves(path, cosines, 1 - cosines, labels, title=title, names=names)
    draw_confusion(path, labels, labels, title=title, names=names)
    draw_groups(path, {"erm": labels == 0}, labels, title=title, names=names)
    rows = [(name, name, 0.0, -1.0, 1.0) for name in NAMES]
    draw_differences(path, rows, title=title, unit="u", note=title)
    for texts in shown:
        for name in NAMES:
            visible = name.encode("utf-8", "replace").decode()
            assert any(text.startswith(visible) for text in texts), name
    draw_separation(path, cosines, cosines, title=title)
    draw_loss(path, [1, 2], {"loss": [1.0, 2.0]}, title=title)
    assert len(shown) == 7


@pytest.fixture(scope="module")
def odd_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained run on an image folder with odd names."""
    folder = tmp_path_factory.mktemp("odd")
    write_image_folder(folder / "images", NAMES[:4], 6)
    for name in NAMES[4:]:
        shutil.copytree(folder / "images" / NAMES[0], folder / "images" / name)
    arguments = (
        f"--data.dataset image_folder --data.root {folder / 'images'} --data.labels fine --data.image_size 8 "
        "--data.batch_size 8 --model.width 2 --evaluation.evaluators [knn,geometry] --evaluation.knn.k [1] "
        "--evaluation.projection.method pca --evaluation.progress false --evaluation.bootstrap.resamples 20"
    )
    config = parse_args(arguments.split())[0]
    run = folder / "<run>$x$|_"
    run.mkdir()
    (run / "config.yaml").write_text(to_yaml(config))
    (run / "log.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0}) + "\n")
    save_weights(build_model(config, load_data(config.data)).state_dict(), run / "model.safetensors")
    return run


@pytest.mark.filterwarnings("ignore:Glyph")
def test_an_evaluation_its_report_and_its_card(odd_run: Path, tmp_path: Path) -> None:
    evaluate_run(odd_run)
    report = (odd_run / "evaluation/report.md").read_text()
    assert report.startswith("# Evaluation of &lt;run&gt;\\$x\\$\\|\\_\n")
    metrics = json.loads((odd_run / "evaluation/metrics.json").read_text())
    metrics["metrics"]["<b>|`x`"] = {"value": 1.0, "unit": "<i>|"}
    (odd_run / "evaluation/metrics.json").write_text(json.dumps(metrics))
    output = export_run(odd_run, tmp_path / "<card> *x*")
    card = (output / "README.md").read_text()
    assert "# &lt;card&gt; \\*x\\*" in card
    assert "| &lt;b&gt;\\|\\`x\\` | 1 | &lt;i&gt;\\| |" in card
    for text in (report, card):
        assert not re.search(r"<(run|img|card|i|b)\b", text)
    (line,) = [line for line in card.splitlines() if line.startswith("| data |")]
    assert len(re.findall(r"(?<!\\)\|", line)) == 3
    assert all(escape(name) in line for name in NAMES)


@pytest.mark.filterwarnings("ignore:Glyph")
def test_a_comparison(odd_run: Path, tmp_path: Path) -> None:
    if not (odd_run / "evaluation").exists():
        evaluate_run(odd_run)
    runs = [Path(shutil.copytree(odd_run, tmp_path / name)) for name in ("$\\frac$", "<b>|")]
    text = runs[1].joinpath("config.yaml").read_text()
    runs[1].joinpath("config.yaml").write_text(text.replace("batch_size: 8", "batch_size: 9"))
    found = compare([read_run(run) for run in runs], bootstrap=BootstrapConfig(resamples=20))
    table = to_markdown(found)
    assert "| metric | \\$\\\\frac\\$ | &lt;b&gt;\\| - \\$\\\\frac\\$ |" in table
    assert "<b>" not in table
    assert len(write(found, tmp_path / "out")) > 2


def test_an_entry_of_a_concatenation_without_its_training(odd_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(odd_run, tmp_path / "run", ignore=shutil.ignore_patterns("evaluation")))
    config = parse_args(["--data.dataset", "digits"])[0]
    config.model = type(config.model)(concatenated=[{"model": {"width": 2}}])
    config.resolve()
    (run / "config.yaml").write_text(to_yaml(config))
    save_weights(build_model(config, load_data(config.data)).state_dict(), run / "model.safetensors")
    with pytest.raises(ConfigError, match=r"model.concatenated must describe how each backbone was trained"):
        export_run(run, tmp_path / "out")
