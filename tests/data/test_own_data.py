"""Data of the user: datasets by package.module:name or as objects, arrays in files, own transforms."""

from __future__ import annotations

import csv
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from pysupcon import user_code
from pysupcon.config import Config, load_config, to_yaml
from pysupcon.data.config import DataConfig
from pysupcon.data.datamodule import DataModule, load_data
from pysupcon.data.own import to_pixels
from pysupcon.errors import ConfigError, ImageError

HERE = __name__
RNG = np.random.default_rng(0)


class Own(Dataset[Any]):
    """Images [8, 8] of three classes; the value of every pixel of image i is i."""

    def __init__(self, form: str = "pil", count: int = 30, labels: str = "int") -> None:
        self.form, self.count, self.labels = form, count, labels

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        if index >= self.count:
            raise IndexError
        pixels = np.full((8, 8), index, dtype=np.uint8)
        image: Any = {
            "pil": Image.fromarray(pixels),
            "array": pixels,
            "tensor": torch.from_numpy(pixels)[None],
            "float": torch.from_numpy(pixels)[None] / 255,
            "colour": np.stack([pixels] * 3, axis=-1),
            "vector": np.full(5, index, dtype=np.float64),
        }[self.form]
        label = index % 3
        if self.labels == "dict":
            return {"image": image, "label": label}
        if self.labels == "levels":
            return image, "even" if index % 2 == 0 else "odd", label
        return image, {"int": label, "text": f"class {label}", "tensor": torch.tensor(label)}[self.labels]


def splits(count: int = 30) -> dict[str, Own]:
    return {"train": Own(count=count), "validation": Own(count=9), "test": Own(count=6)}


def config(**changes: Any) -> DataConfig:
    made = DataConfig(**{"dataset": f"{HERE}:Own", "batch_size": 6, "augmentation": "none", **changes})
    made.check()
    made.resolve()
    return made


@pytest.mark.parametrize("form", ["pil", "array", "tensor", "float", "colour"])
def test_images_of_every_form(form: str) -> None:
    data = load_data(config(dataset_args={"form": form}))
    assert (data.channels, data.image_size) == (3 if form == "colour" else 1, 8)
    views, labels = next(iter(data.loader(data.batch_sampler(seed=0, steps=1))))
    assert views.dtype == torch.uint8
    assert views.shape == (6, 2, data.channels, 8, 8)
    assert (views.flatten(1) == views.flatten(1)[:, :1]).all()
    assert torch.equal(views[:, 0, 0, 0, 0].long() % 3, labels)  # the image of each label


@pytest.mark.parametrize("labels", ["int", "text", "tensor", "dict"])
def test_labels_of_every_form(labels: str) -> None:
    data = load_data(config(dataset_args={"labels": labels}))
    assert data.fine_names == ([f"class {k}" for k in range(3)] if labels == "text" else ["0", "1", "2"])
    assert data.coarse_names == data.fine_names
    assert sum(len(part) for part in data.splits.values()) == 30


def test_coarse_and_fine() -> None:
    data = load_data(config(dataset_args={"labels": "levels"}))
    assert (data.coarse_names, data.fine_names) == (["even", "odd"], ["0", "1", "2"])
    items = [data.evaluation_dataset("train")[i] for i in range(len(data.splits["train"]))]
    pixel = [round(float(image[0, 0, 0] * 0.25 + 0.5) * 255) for image, _, _ in items]
    assert [value % 2 for value in pixel] == [coarse for _, coarse, _ in items]
    assert [value % 3 for value in pixel] == [fine for _, _, fine in items]


def test_given_splits() -> None:
    data = load_data(config(dataset=f"{HERE}:splits"))
    assert {name: len(part) for name, part in data.splits.items()} == {"train": 30, "val": 9, "test": 6}
    with pytest.raises(ConfigError, match=r"data.test_fraction has no effect: the data set has a test split"):
        load_data(config(dataset=f"{HERE}:splits", test_fraction=0.2))


def test_listed_labels_are_used_without_reading_images() -> None:
    class Listed(Own):
        targets = [index % 3 for index in range(30)]  # noqa: RUF012
        classes = ["a", "b", "c", "d"]  # noqa: RUF012
        read = 0

        def __getitem__(self, index: int) -> Any:
            Listed.read += 1
            return super().__getitem__(index)

    data = DataModule(config(dataset="passed object Listed"), Listed())
    assert Listed.read <= 2
    assert data.fine_names == ["a", "b", "c", "d"]


def test_an_object_must_be_passed_again() -> None:
    with pytest.raises(ConfigError, match=r"an object that was passed to .*: pass it again"):
        load_data(config(dataset="passed object tests.Own"))


class Bad(Own):
    def __init__(self, item: Any = None, count: int = 30) -> None:
        super().__init__(count=count)
        self.item = item

    def __getitem__(self, index: int) -> Any:
        return self.item


PIXELS = np.zeros((4, 4), np.uint8)


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        (Bad(item=3), "the first item is int"),
        ([(PIXELS, 0)] * 5 + [None], "item 5 is NoneType"),
        ([(PIXELS, 0, 1)] * 4 + [(PIXELS, 1)], r"item 4 is a tuple of \(.*int\)"),
        ([{"image": PIXELS, "label": 0}] * 3 + [{"image": PIXELS}], "item 3 is a dict of image"),
        (Bad(item=("a", 1)), "the image is of type str"),
        (Bad(item=(torch.zeros(1, 4, 4) + 2, 0)), r"floats from 2 to 2, outside \[0, 1\]"),
        (Bad(item=(torch.zeros(4, 4, 7), 0)), r"the shape \[4, 4, 7\]"),
        (Bad(item=(torch.zeros(1, 4, 4, dtype=torch.int32), 0)), "is of torch.int32"),
        (Bad(item=(np.zeros((4, 4), np.uint8), [1, 2])), "label of item 0 must be a label"),
        (Bad(item={"picture": 1}), "the first item is a dict of picture: int"),
        (Bad(item=(np.array([1.0, np.nan]), 0)), "must be finite, but 30 of 30 rows are not, first row 0"),
        (Bad(count=0), "the train split has no item"),
        (iter([1]), "map-style dataset"),
        ({"training": Own()}, "a mapping must have train"),
        ({"train": Own(), "val": Own(), "validation": Own()}, "name each split once"),
        ({"train": Own(count=2), "test": Own()}, "the test split has the class '2', which training has not"),
    ],
)
def test_refused_datasets(dataset: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        DataModule(config(dataset="passed object x"), dataset)


def test_refused_arguments() -> None:
    with pytest.raises(ConfigError, match=r"data.dataset_args {'sides': 2} do not fit"):
        load_data(config(dataset_args={"sides": 2}))
    with pytest.raises(ConfigError, match="has no parameter root"):
        load_data(config(root="."))
    with pytest.raises(ConfigError, match=r"data.dataset=missing_module:x cannot be imported: Module"):
        load_data(config(dataset="missing_module:x"))
    with pytest.raises(ConfigError, match=r"data.dataset must be one of .* got 'minst' .similar: mnist"):
        config(dataset="minst")
    with pytest.raises(ConfigError, match=r"data.augmentation=noise or dropout"):
        load_data(config(augmentation="noise"))


def test_a_broken_item_is_named() -> None:
    class Broken(Own):
        targets = [index % 3 for index in range(30)]  # noqa: RUF012

        def __getitem__(self, index: int) -> Any:
            if index == 7:
                raise OSError("no such disk")
            return super().__getitem__(index)

    data = DataModule(config(dataset="passed object Broken", val_fraction=0.1), Broken())

    def read() -> None:
        for name, part in data.splits.items():
            data.evaluation_dataset(name).__getitems__(list(range(len(part))))

    with pytest.raises(ImageError, match="item 7 of the data set cannot be read: no such disk"):
        read()


def test_pixels_of_pil_modes() -> None:
    """16 bits are scaled, transparent pixels become white, and other modes are converted."""
    grey16 = Image.fromarray(np.full((4, 4), 32_639, dtype=np.uint16))
    assert to_pixels(grey16).unique().tolist() == [127]
    clear = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    assert to_pixels(clear).unique().tolist() == [255]
    assert to_pixels(Image.new("RGBA", (4, 4), (10, 20, 30, 255)))[:, 0, 0].tolist() == [10, 20, 30]
    assert to_pixels(Image.new("LA", (4, 4), (7, 255)))[:, 0, 0].tolist() == [7, 7, 7]
    palette = Image.new("RGB", (4, 4), (255, 0, 0)).convert("P")
    assert to_pixels(palette)[:, 0, 0].tolist() == [255, 0, 0]
    assert to_pixels(Image.new("CMYK", (4, 4), (0, 0, 0, 0)))[:, 0, 0].tolist() == [255] * 3
    assert to_pixels(Image.new("1", (4, 4), 1)).unique().tolist() == [255]
    with pytest.raises(ValueError, match="mode F lie in"):
        to_pixels(Image.new("F", (4, 4), 3.0))


# ------------------------------------------------------------------------------------------------ vectors
FEATURES = RNG.normal(size=(60, 4)) * [1, 10, 0.1, 1] + [0, 5, 0, 0]
FINE = [index % 6 for index in range(60)]


@pytest.fixture(params=["npz", "npy", "safetensors", "csv"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / f"data.{request.param}"
    fine = np.array(FINE)
    if request.param == "npz":
        np.savez(path, features=FEATURES, coarse=fine // 2, fine=fine)
    elif request.param == "npy":
        np.save(path, FEATURES)
        np.save(tmp_path / "coarse.npy", fine // 2)
        np.save(tmp_path / "fine.npy", fine)
    elif request.param == "safetensors":
        from safetensors.torch import save_file

        save_file({"features": torch.tensor(FEATURES), "coarse": torch.tensor(fine // 2),
                   "fine": torch.tensor(fine)}, path)  # fmt: skip
    else:
        with path.open("w", newline="") as opened:
            rows = [[*map(repr, map(float, row)), k // 2, k] for row, k in zip(FEATURES, FINE, strict=True)]
            csv.writer(opened).writerows([["a", "b", "c", "d", "coarse", "fine"], *rows])
    return path


def arrays_config(path: Path, **changes: Any) -> DataConfig:
    return config(dataset="arrays", root=str(path), **changes)


def test_arrays_of_every_format(file: Path) -> None:
    data = load_data(arrays_config(file))
    assert (data.channels, data.image_size) == (4, 0)
    assert (data.coarse_names, data.fine_names) == (["0", "1", "2"], [str(k) for k in range(6)])
    by_row = {tuple(row): k for row, k in zip(torch.tensor(FEATURES).float().tolist(), FINE, strict=True)}
    for part in data.splits.values():
        assert isinstance(part.images, Tensor)
        assert [by_row[tuple(row)] for row in part.images.tolist()] == part.fine.tolist()
        assert torch.equal(part.fine // 2, part.coarse)
    train = torch.stack([image for image, _, _ in data.evaluation_dataset("train").__getitems__(
        list(range(len(data.splits["train"]))))])  # fmt: skip
    assert train.mean(0).abs().max() < 1e-5  # float32, of numbers up to 40
    assert (train.std(0, correction=0) - 1).abs().max() < 1e-5


def test_a_table_with_names_splits_and_groups(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    lines = ["x0,x1,species,place,part,note"]
    lines += [f"{i},{-i},{'cat' if i % 2 else 'dog'},{'in' if i % 3 else 'out'},{p},{i}"
              for i in range(40) for p in [("train", "val", "test")[i // 20 if i < 39 else 2]]]  # fmt: skip
    path.write_text("\n".join(lines))
    columns = {"features": "x", "label": "species", "group": "place", "split": "part"}
    data = load_data(arrays_config(path, columns=columns))
    assert data.coarse_names == ["cat", "dog"]
    assert data.fine_names == ["cat, in", "cat, out", "dog, in", "dog, out"]
    assert {name: len(part) for name, part in data.splits.items()} == {"train": 20, "val": 19, "test": 1}
    with pytest.raises(
        ConfigError,
        match=r"line 2, column species must be a number.* '{label: place, split: part, ignore: \[species\]}'",
    ):
        load_data(arrays_config(path, columns={"label": "place", "split": "part"}))
    with pytest.raises(ConfigError, match=r"has no 'kind', which data.columns names as label"):
        load_data(arrays_config(path, columns={"features": "x", "label": "kind"}))


def test_refused_arrays(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    np.savez(path, features=FEATURES, label=FINE[:-1])
    with pytest.raises(ConfigError, match="60 rows of features, but 59 of label"):
        load_data(arrays_config(path))
    np.savez(path, features=FEATURES)
    with pytest.raises(ConfigError, match="has no labels: name them"):
        load_data(arrays_config(path))
    path.write_bytes(b"PK")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_data(arrays_config(path))
    with pytest.raises(ConfigError, match=r"must be a file \.npz"):
        load_data(arrays_config(tmp_path / "data.xls"))
    with pytest.raises(ConfigError, match=r"data.image_size must be left out for arrays"):
        arrays_config(path, image_size=8)
    with pytest.raises(ConfigError, match=r"data.columns has no effect"):
        config(columns={"label": "x"})


def test_arrays_of_python_objects(tmp_path: Path) -> None:
    names = np.array(["cat", "dog"] * 30, dtype=object)
    np.savez(tmp_path / "data.npz", features=FEATURES, label=names)
    message = r"{} must hold numbers or text, it holds Python objects .*: save text with .astype\(str\)"
    with pytest.raises(ConfigError, match=message.format("data.npz: the array label")):
        load_data(arrays_config(tmp_path / "data.npz"))
    np.savez(tmp_path / "data.npz", features=FEATURES, label=names.astype(str))
    assert load_data(arrays_config(tmp_path / "data.npz")).fine_names == ["cat", "dog"]
    np.save(tmp_path / "data.npy", FEATURES)
    np.save(tmp_path / "label.npy", names)
    with pytest.raises(ConfigError, match=message.format(r"data.npy: the array in label.npy")):
        load_data(arrays_config(tmp_path / "data.npy"))


def test_ignored_columns(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    rows = [f"{50 + i},{i},{-i},http://{i},me,{i % 2},{i % 4}" for i in range(40)]
    path.write_text("\n".join(["id,e0,e1,url,author,coarse,fine", *rows]))
    columns = {"ignore": ["id", "url", "author"]}
    data = load_data(arrays_config(path, columns=columns))
    assert (data.feature_names, data.notes) == (["e0", "e1"], [])
    assert data.label_columns == {"coarse": "coarse", "fine": "fine"}
    with pytest.raises(ConfigError, match=r"line 2, column url .*'\{ignore: \[id, url, author\]\}'"):
        load_data(arrays_config(path, columns={"ignore": "id"}))
    with pytest.raises(ConfigError, match=r"has no 'uri', which data.columns names as ignore: it has id, e0"):
        load_data(arrays_config(path, columns={"ignore": ["uri"]}))
    data = load_data(arrays_config(path, columns={"ignore": [*columns["ignore"], "fine"]}))
    assert data.fine_names == ["0", "1"]


def test_the_index_of_pandas(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    for order in (list(range(40)), list(range(39, -1, -1))):
        path.write_text("\n".join([",e0,e1,label", *(f"{k},{i},{-i},{i % 2}" for i, k in enumerate(order))]))
        data = load_data(arrays_config(path))
        assert data.feature_names == ["e0", "e1"]
        (note,) = data.notes
        assert "table.csv: the first column, without a name, numbers the rows" in note
    path.write_text("\n".join([",e0,e1,label", *(f"0.5,{i},{-i},{i % 2}" for i in range(40))]))
    data = load_data(arrays_config(path))
    assert (data.feature_names, data.notes) == (["", "e0", "e1"], [])


def test_ignored_arrays(file: Path) -> None:
    data = load_data(arrays_config(file, columns={"ignore": "coarse"}))
    assert data.coarse_names == data.fine_names == [str(k) for k in range(6)]
    with pytest.raises(ConfigError, match=r"has no 'x', which data.columns names as ignore: it has "):
        load_data(arrays_config(file, columns={"ignore": "x"}))


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "table.parquet"
    stored = {"id": list("abcdefgh"), "e0": range(8), "e1": range(8), "label": [0, 1] * 4}
    parquet.write_table(pyarrow.table({**stored, "__index_level_0__": range(8)}), path)
    with pytest.raises(
        ConfigError, match=r"parquet, column id must be a number, got 'a'.*\{ignore: \[id\]\}"
    ):
        load_data(arrays_config(path, batch_size=2))
    data = load_data(arrays_config(path, batch_size=2, columns={"ignore": ["id"]}))
    assert data.feature_names == ["e0", "e1"]
    assert "__index_level_0__, the index of a pandas DataFrame, is left out" in data.notes[0]


def test_unknown_labels_by_their_value(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    np.savez(path, features=FEATURES, label=[-1 if index < 6 else index % 3 for index in range(60)])
    data = load_data(arrays_config(path, ignore_index=-1))
    assert data.class_names == ["0", "1", "2"]
    assert data.unlabelled is not None
    assert len(data.unlabelled) == 6


def test_views_of_vectors(tmp_path: Path) -> None:
    """Noise has the given scale, dropout the given share, and both depend on sample and draw alone."""
    path = tmp_path / "data.npz"
    features = RNG.normal(size=(4000, 4)) * [1, 10, 0.1, 0] + [0, 5, 0, 3]
    np.savez(path, features=features, label=np.arange(4000) % 2)

    def views(**changes: Any) -> tuple[DataModule, Tensor]:
        data = load_data(arrays_config(path, batch_size=2000, **changes))
        found, _ = next(iter(data.loader(data.batch_sampler(seed=3, steps=1))))
        assert found.shape == (2000, 2, 4)
        return data, found

    _, plain = views()
    assert torch.equal(plain[:, 0], plain[:, 1])
    data, noisy = views(augmentation="noise", augmentation_args={"noise": 0.5})
    scale = ((noisy - plain) / torch.tensor([1, 10, 0.1, 1])).std(dim=(0, 1))
    # 4,000 draws: the standard error of a standard deviation is 1.1 %, the feature's own 0.8 %.
    assert torch.allclose(scale[:3], torch.tensor(0.5), rtol=0.06)
    assert torch.equal(noisy[..., 3], plain[..., 3])  # a constant feature has no noise
    assert not torch.equal(noisy[:, 0], noisy[:, 1])
    _, dropped = views(augmentation="dropout", augmentation_args={"dropout": 0.3})
    replaced = dropped[..., :3] != plain[..., :3]
    assert abs(replaced.float().mean() - 0.3) < 0.02  # 24,000 draws: the standard error is 0.003
    assert torch.allclose(dropped[..., :3][replaced].unique(), data.normalize.mean[:3].sort().values)  # type: ignore[union-attr]
    assert torch.equal(views(augmentation="strong")[1], views(augmentation="strong")[1])
    with pytest.raises(ConfigError, match=r"augmentation_args\.dropout must lie in \(0, 1\), got 2"):
        views(augmentation="dropout", augmentation_args={"dropout": 2})
    with pytest.raises(ConfigError, match=r"dropout has no effect with data.augmentation=noise"):
        views(augmentation="noise", augmentation_args={"dropout": 0.1})


# ------------------------------------------------------------------------------------------------ transforms
def jitter(image: Tensor, amount: int) -> Tensor:
    return image + torch.randint(amount, (1,)).byte() + random.randrange(amount) + np.random.randint(amount)  # noqa: NPY002


@pytest.mark.parametrize(
    ("reference", "arguments"),
    [(f"{HERE}:jitter", {"amount": 50}), ("torchvision.transforms.v2:RandomRotation", {"degrees": 90})],
)
def test_own_transforms(reference: str, arguments: dict[str, Any]) -> None:
    """Views depend on sample and draw alone, and the global random states stay."""
    changes: dict[str, Any] = {"dataset": "digits", "augmentation": reference, "augmentation_args": arguments}
    state = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[union-attr]  # noqa: NPY002
    batches = []
    for steps in ((0, 2), (1, 2)):
        data = load_data(config(**changes))
        sampler = data.batch_sampler(seed=1, steps=steps[1], start=steps[0])
        batches.append([views for views, _ in data.loader(sampler)])
    assert torch.equal(batches[0][1], batches[1][0])  # a resumed run
    assert not torch.equal(batches[0][0][:, 0], batches[0][0][:, 1])
    assert random.getstate() == state[0]
    assert torch.equal(torch.get_rng_state(), state[1])
    assert (np.random.get_state()[1] == state[2]).all()  # type: ignore[union-attr]  # noqa: NPY002


def test_wrong_transforms() -> None:
    with pytest.raises(ConfigError, match=r"data.augmentation_args {'degree': 1} do not fit"):
        load_data(config(dataset="digits", augmentation="torchvision.transforms.v2:RandomRotation",
                         augmentation_args={"degree": 1}))  # fmt: skip
    data = load_data(config(dataset="digits", augmentation="builtins:len"))
    with pytest.raises(ImageError, match=r"data.augmentation=builtins:len failed: the image is of type int"):
        next(iter(data.loader(data.batch_sampler(seed=0, steps=1))))


# ------------------------------------------------------------------------------------------------ configs
def test_a_run_config_holds_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = arrays_config(Path("data.npz"))
    assert made.root == str(tmp_path / "data.npz")
    made = config(dataset="digits", groups="groups.safetensors", sampler="groups")
    assert made.groups == str(tmp_path / "groups.safetensors")
    assert config(dataset="coloured_digits", groups="annotated", sampler="groups").groups == "annotated"


@pytest.mark.parametrize("field", ["dataset", "augmentation"])
def test_the_code_of_a_foreign_run_needs_a_flag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    """The module is not imported before the flag is given."""
    monkeypatch.setitem(user_code._state, "allowed", False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "foreign_module.py").write_text("open('imported', 'w').close()\ndef make(): return None\n")
    path = tmp_path / "config.yaml"
    made = Config()
    setattr(made.data, field, "foreign_module:make")
    path.write_text(to_yaml(made))
    with pytest.raises(ConfigError, match=rf"names Python code .data\.{field}=foreign_module:make., which"):
        load_config(path)
    assert not (tmp_path / "imported").exists()
    monkeypatch.setitem(user_code._state, "allowed", True)
    assert getattr(load_config(path).data, field) == "foreign_module:make"
