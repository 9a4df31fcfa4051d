"""Tables that could be read in a way that their author did not mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.data_files import write_grey_image, write_text

from pysupcon.data.config import DataConfig
from pysupcon.data.datamodule import DataModule, load_data
from pysupcon.errors import ConfigError


def numbers(path: Path, text: str, **changes: Any) -> DataModule:
    """The data set arrays of a CSV file."""
    write_text(path / "data.csv", text)
    fields = {"batch_size": 4, "augmentation": "none", **changes}
    return load_data(DataConfig("arrays", root=str(path / "data.csv"), **fields))


def pictures(
    path: Path, text: str, files: tuple[str, ...] = (), dataset: Any = "image_folder", **changes: Any
) -> DataModule:
    """An image folder with a table."""
    for file in files:
        write_grey_image(path / file, 1, (8, 8))
    write_text(path / "labels.csv", text)
    fields = {"image_size": 8, "batch_size": 4, "augmentation": "none", "table": "labels.csv", **changes}
    return load_data(DataConfig(dataset, root=str(path), **fields))


ROWS = "".join(f"{row},{-row},{'ab'[row % 2]}\n" for row in range(30))


def test_a_repeated_column(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.csv must name each column once, it has 'a' more than once"):
        numbers(tmp_path, "a,a,label\n" + ROWS)


def test_an_empty_label(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.csv, line 32, column label must not be empty"):
        numbers(tmp_path, "a,b,label\n" + ROWS + "1,2, \n")
    with pytest.raises(ConfigError, match=r"line 3, column kind must not be empty"):
        numbers(tmp_path, "a,b,label,kind\n1,2,x,p\n1,2,x,\n", columns={"group": "kind"})
    labels = np.array(["a", "b", ""] * 10)
    np.savez(tmp_path / "data.npz", features=np.ones((30, 2)), label=labels)
    with pytest.raises(ConfigError, match=r"label of row 2 must be a label, an int or str, got str ''"):
        load_data(DataConfig("arrays", root=str(tmp_path / "data.npz"), batch_size=4))


def test_leading_zeros(tmp_path: Path) -> None:
    names = ["1", "01", "2", "10"]
    text = "a,label\n" + "".join(f"{row},{names[row % 4]}\n" for row in range(60))
    assert numbers(tmp_path, text).fine_names == ["01", "1", "10", "2"]
    assert numbers(tmp_path, text.replace("01", "3")).fine_names == ["1", "2", "3", "10"]
    files = tuple(f"{row}.png" for row in range(60))
    table = "file,label\n" + "".join(f"{row}.png,{names[row % 4]}\n" for row in range(60))
    assert pictures(tmp_path, table, files).fine_names == ["01", "1", "10", "2"]


def test_blank_lines(tmp_path: Path) -> None:
    assert len(numbers(tmp_path, "\na,b,label\n\n" + ROWS + "\n  \n,,\n").training) > 20
    # Lines are counted as an editor counts them, also after blank lines and line breaks in quotes.
    with pytest.raises(ConfigError, match=r"line 7, column b must be a number, got 'x'"):
        numbers(tmp_path, '\na,b,label\n\n1,2,"c\nd"\n\n1,x,a\n')
    with pytest.raises(ConfigError, match=r"line 5, must have 3 fields, got 2"):
        numbers(tmp_path, "a,b,label\n1,2,a\n\n1,2,a\n1,2\n")


@pytest.mark.parametrize(
    ("separator", "name"), [(";", "semicolons"), ("\t", "tabs"), ("|", "vertical bars"), (" ", "spaces")]
)
def test_another_separator(tmp_path: Path, separator: str, name: str) -> None:
    message = rf"data.csv must separate its columns by commas, its first line has {name}: 'a"
    with pytest.raises(ConfigError, match=message):
        numbers(tmp_path, ("a,b,label\n" + ROWS).replace(",", separator))
    # Decimal commas are no separators.
    with pytest.raises(ConfigError, match=message):
        numbers(tmp_path, f"a{separator}label\n" + f"1,5{separator}x\n" * 20)


def test_upper_and_lower_case(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"labels.csv has a column 'File': did you mean file\? Upper and lower case count. Rename it, "
        r"or use --data.columns '\{file: File\}'$",
    ):
        pictures(tmp_path, "File,Label\n0.png,a\n")
    # A split column of numbers would be a feature.
    split = "".join(f"{row},{-row},{'ab'[row % 2]},{int(row > 20)}\n" for row in range(30))
    with pytest.raises(ConfigError, match=r"has a column 'Split': did you mean split\?"):
        numbers(tmp_path, "a,b,label,Split\n" + split)
    named = numbers(tmp_path, "a,b,label,Split\n" + split, columns={"split": "Split"})
    assert (named.feature_names, len(named.splits["val"])) == (["a", "b"], 9)
    left_out = numbers(tmp_path, "a,b,label,Split\n" + split, columns={"ignore": "Split"})
    assert left_out.feature_names == ["a", "b"]
    named = numbers(tmp_path, "a,b,Label,Fine\n" + split, columns={"coarse": "Label", "fine": "Fine"})
    assert named.coarse_names == ["a", "b"]
    np.savez(tmp_path / "data.npz", features=np.ones((4, 2)), label=np.arange(4), Split=np.arange(4))
    with pytest.raises(ConfigError, match=r"has a column 'Split': did you mean split\?"):
        load_data(DataConfig("arrays", root=str(tmp_path / "data.npz"), batch_size=4))
    with pytest.raises(
        ConfigError, match=r"labels.csv has a column 'Split': did you mean split\?.*Rename it$"
    ):
        pictures(tmp_path, "f,a,b,Split\n0.png,0,1,train\n", dataset="image_table", sampler="shuffled")


@pytest.mark.parametrize("dataset", ["image_folder", "image_table"])
@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("./cat/0.png", r"line 3, names the file of line 2 again: './cat/0.png'"),
        ("cat/../cat//0.png", r"line 3, names the file of line 2 again"),
        ("ROOT/cat/0.png", r"line 3, names the file of line 2 again"),
        ("../0.png", r"line 3, must name a file in data.root '.*', got '../0.png'"),
        ("cat/../../0.png", r"line 3, must name a file in data.root"),
        ("/0.png", r"line 3, must name a file in data.root"),
    ],
)
def test_the_same_file_in_another_spelling(tmp_path: Path, dataset: str, file: str, message: str) -> None:
    root = tmp_path / "images"
    file = file.replace("ROOT", str(root))
    table = {
        "image_folder": f"file,label\ncat/0.png,a\n{file},b\n",
        "image_table": f"file,a,b\ncat/0.png,0,1\n{file},1,0\n",
    }
    sampler = "balanced" if dataset == "image_folder" else "shuffled"
    with pytest.raises(ConfigError, match=message):
        pictures(root, table[dataset], ("cat/0.png", "../0.png"), dataset, sampler=sampler)


def test_other_spellings_of_different_files(tmp_path: Path) -> None:
    files = tuple(f"{row}..png" for row in range(30))
    spelled = [f"./{file}" if row % 3 else str(tmp_path / file) for row, file in enumerate(files)]
    table = "file,label\n" + "".join(f"{file},{'ab'[row % 2]}\n" for row, file in enumerate(spelled))
    data = pictures(tmp_path, table, files)
    paths = [path for part in data.splits.values() for path in part.images.paths]  # type: ignore[union-attr]
    assert set(paths) == {tmp_path / file for file in files}


def test_groups_with_the_same_name(tmp_path: Path) -> None:
    pairs = ['"a, b",c', 'a,"b, c"', "d,c"]
    text = "x,label,group\n" + "".join(f"{row},{pairs[row % 3]}\n" for row in range(30))
    with pytest.raises(ConfigError, match="two pairs of label and group have the same name"):
        numbers(tmp_path, text)
    assert len(numbers(tmp_path, text.replace("b, c", "b")).fine_names) == 3
