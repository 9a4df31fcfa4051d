"""Inputs of a model in GradCache: copies of a chunk's samples, equal in both passes, in any container."""

from __future__ import annotations

import weakref
from collections import OrderedDict, UserDict, UserList, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pysupcon
from pysupcon.gradcache import GradCache

SAMPLES = 11
LABELS = torch.arange(SAMPLES) % 3


def _images() -> Tensor:
    return torch.randn(SAMPLES, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def _criterion(z: Tensor) -> Tensor:
    return pysupcon.functional.supcon(z, LABELS, temperature=0.3, normalize=True)


class Encoder(nn.Module):
    """An encoder; ``read`` returns the images of an input."""

    def __init__(self, read: Callable[[Any], Tensor] = lambda inputs: inputs) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.read = read
        self.linear = nn.Linear(6, 8).double()

    def forward(self, inputs: Any) -> Tensor:
        return self.linear(self.read(inputs)).tanh()


def _gradient(model: nn.Module) -> Tensor:
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    model.zero_grad()
    return gradient


def _assert_as_the_whole_batch(
    model: nn.Module,
    inputs: Callable[[], Any],
    *,
    plain: Any = None,
    forward: Callable[[Any, Any], Tensor] | None = None,
) -> Any:
    """Compares the gradients of three chunks, and of one, with those of the model; returns the inputs."""
    whole = inputs() if plain is None else plain
    _criterion(model(whole) if forward is None else forward(model, whole)).backward()
    wanted = _gradient(model)
    assert wanted.abs().max() > 1e-3, "nothing to compare"
    given = None
    for chunk_size in (SAMPLES, 4):
        given = inputs()
        GradCache(model, chunk_size, forward=forward)(given, _criterion)
        torch.testing.assert_close(_gradient(model), wanted, rtol=1e-10, atol=1e-12)
    return given


def _subtracts(inputs: Tensor) -> Tensor:
    return inputs.sub_(1.0)


def _normalises(inputs: Tensor) -> Tensor:
    """Like torchvision's normalize(inplace=True)."""
    return inputs.sub_(torch.tensor([0.5] * 6, dtype=inputs.dtype)).div_(0.25)


def _writes_into_data(inputs: Tensor) -> Tensor:
    inputs.data.div_(255.0).add_(0.3)  # no new version, so autograd does not detect it
    return inputs


def _corrupts_a_view(inputs: Tensor) -> Tensor:
    inputs.view(-1, 2, 3)[:, 0] *= 0.1
    return inputs


@pytest.mark.parametrize("read", [_subtracts, _normalises, _writes_into_data, _corrupts_a_view])
@pytest.mark.parametrize("chunk_size", [4, SAMPLES, 100])
def test_a_model_that_changes_a_tensor_in_place(read: Any, chunk_size: int) -> None:
    model, images = Encoder(read), _images()
    _criterion(model(images.clone())).backward()
    wanted = _gradient(model)
    for _ in range(2):  # the second step has the same inputs
        version = images._version
        GradCache(model, chunk_size)(images, _criterion)
        torch.testing.assert_close(_gradient(model), wanted, rtol=1e-10, atol=1e-12)
        assert torch.equal(images, _images())
        assert images._version == version


class Images(NamedTuple):
    images: Tensor
    factor: float


@dataclass
class Sample:
    images: Tensor
    note: str = "stays"
    kind: str = field(default="not an argument", init=False)
    times: int = 0

    def __post_init__(self) -> None:
        self.times += 1


@dataclass(frozen=True)
class Frozen:
    images: Tensor


class Encoding(UserDict):
    """Like transformers.BatchEncoding: made from a dict, entries as attributes, an encoding per sample."""

    def __init__(self, data: dict[str, Any] | None = None, encoding: list[str] | None = None) -> None:
        super().__init__(data)
        self._encodings = encoding

    def __getattr__(self, name: str) -> Any:
        try:
            return self.data[name]
        except KeyError:
            raise AttributeError(name) from None

    def __getstate__(self) -> dict[str, Any]:
        return {"data": self.data, "encodings": self._encodings}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.data, self._encodings = state["data"], state["encodings"]

    def to(self, device: str) -> Encoding:
        self.data = {name: value.to(device) for name, value in self.data.items()}
        return self


class Attributes(dict):
    """The usual recipe for entries that are attributes."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.__dict__ = self


class Table(Mapping):
    """A mapping that is neither dict nor UserDict, and whose shallow copy shares its entries."""

    def __init__(self, entries: Mapping[str, Any]) -> None:
        self._entries = dict(entries)

    def __getitem__(self, name: str) -> Any:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def _by_name(inputs: Any) -> Tensor:
    return inputs["images"].sub_(1.0)


def _by_attribute(inputs: Any) -> Tensor:
    return inputs.images.sub_(1.0)


def _popped(inputs: Any) -> Tensor:
    return inputs.pop("images").sub_(1.0)


CONTAINERS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "tuple": (lambda x: (x, 2), lambda inputs: inputs[0].sub_(1.0)),
    "list": (lambda x: [2, x], lambda inputs: inputs[1].sub_(1.0)),
    "list, emptied": (lambda x: [x], lambda inputs: inputs.pop().sub_(1.0)),
    "UserList": (lambda x: UserList([x, 2]), lambda inputs: inputs[0].sub_(1.0)),
    "named tuple": (lambda x: Images(x, 2.0), _by_attribute),
    "dict": (lambda x: {"images": x, "none": None}, _by_name),
    "dict, emptied": (lambda x: {"images": x}, _popped),
    "OrderedDict": (lambda x: OrderedDict(images=x), _by_name),
    "defaultdict": (lambda x: defaultdict(list, images=x), _by_name),
    "dict of attributes": (lambda x: Attributes(images=x), _by_attribute),
    "UserDict": (lambda x: UserDict(images=x), _by_name),
    "UserDict, emptied": (lambda x: UserDict(images=x), _popped),
    "as BatchEncoding": (lambda x: Encoding({"images": x}), lambda inputs: _by_attribute(inputs.to("cpu"))),
    "mapping": (lambda x: Table({"images": x}), _by_name),
    "mapping proxy": (lambda x: MappingProxyType({"images": x}), _by_name),
    "dataclass": (Sample, _by_attribute),
    "frozen dataclass": (Frozen, _by_attribute),
    "nested": (
        lambda x: {"a": [UserDict(images=x), Sample(x.clone())], "b": (x.clone(),)},
        lambda inputs: inputs["a"][0]["images"].sub_(1.0) + inputs["a"][1].images.mul_(2.0) + inputs["b"][0],
    ),
    "the same tensor twice": (
        lambda x: {"images": x, "again": [x]},
        lambda inputs: inputs["images"].sub_(1.0) + 0.0 * inputs["again"][0] + inputs["again"][0].mul_(2.0),
    ),
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_any_container_of_tensors_changed_in_place(container: str) -> None:
    make, read = CONTAINERS[container]
    images = _images()
    given = _assert_as_the_whole_batch(Encoder(read), lambda: make(images), plain=make(_images()))
    assert torch.equal(images, _images())
    if isinstance(given, (Mapping, list)):
        assert len(given) == len(make(images)), "the model emptied its own container, not the caller's"


@pytest.mark.parametrize("container", ["dict", "UserDict", "as BatchEncoding", "mapping"])
def test_keyword_arguments(container: str) -> None:
    class Keywords(Encoder):
        def forward(self, images: Tensor, **rest: Any) -> Tensor:  # type: ignore[override]
            assert set(rest) <= {"none"}
            return self.linear(images.sub_(1.0)).tanh()

    make, _ = CONTAINERS[container]
    images = _images()
    _assert_as_the_whole_batch(
        Keywords(), lambda: make(images), plain=make(_images()), forward=lambda model, batch: model(**batch)
    )
    assert torch.equal(images, _images())


def test_a_container_keeps_its_type_and_other_entries() -> None:
    names = [f"sample {at}" for at in range(SAMPLES)]
    seen: list[Any] = []

    def read(inputs: Any) -> Tensor:
        seen.append(inputs)
        return inputs["sample"].images

    batch = defaultdict(
        list, sample=Sample(_images()), encoding=Encoding({"ids": torch.arange(SAMPLES)}, names), size=(2, 3)
    )
    GradCache(Encoder(read), 4)(batch, _criterion)
    assert [len(chunk["sample"].images) for chunk in seen] == [4, 4, 3] * 2
    for chunk, rows in zip(seen, [slice(0, 4), slice(4, 8), slice(8, 11)] * 2, strict=True):
        assert type(chunk) is defaultdict
        assert chunk.default_factory is list
        assert chunk["size"] == (2, 3)
        assert (chunk["sample"].note, chunk["sample"].kind) == ("stays", "not an argument")
        assert chunk["sample"].times == 1, "__post_init__ ran again"
        assert type(chunk["encoding"]) is Encoding
        assert chunk["encoding"]._encodings == names[rows]
        assert torch.equal(chunk["encoding"].ids, torch.arange(SAMPLES)[rows])
    assert batch["encoding"]._encodings == names


@dataclass
class Outputs:
    z: Tensor
    more: Any


@pytest.mark.parametrize(
    "make", [lambda z: UserDict(z=z), lambda z: Table({"z": z}), lambda z: {"z": Outputs(z, [z])}]
)
def test_mappings_as_outputs(make: Any) -> None:
    class Wrapping(Encoder):
        def forward(self, inputs: Any) -> Any:
            return make(super().forward(inputs))

    model, images, found = Wrapping(), _images(), []

    def loss(outputs: Any) -> Tensor:
        found.append(type(outputs))
        return _criterion(outputs["z"].z + outputs["z"].more[0] if type(outputs) is dict else outputs["z"])

    loss(model(images)).backward()
    wanted = _gradient(model)
    GradCache(model, 4)(images, loss)
    torch.testing.assert_close(_gradient(model), wanted, rtol=1e-10, atol=1e-12)
    assert found[0] is found[1]


def test_memory_of_one_chunk() -> None:
    """When a model gets a chunk, no copy of another chunk is alive."""
    alive: list[weakref.ref[Any]] = []
    counts: list[int] = []

    def read(inputs: Tensor) -> Tensor:
        counts.append(sum(reference() is not None for reference in alive))
        assert inputs.untyped_storage().nbytes() == inputs.nbytes, "the copy is of the chunk alone"
        alive.append(weakref.ref(inputs.untyped_storage()))
        return inputs * 1.0

    images = _images()
    GradCache(Encoder(read), 4)(images, _criterion)
    assert counts == [0] * 6


def test_channels_last_stays() -> None:
    strides: list[tuple[int, ...]] = []

    def read(inputs: Tensor) -> Tensor:
        strides.append(inputs.stride())
        return inputs.flatten(1)

    images = _images().view(SAMPLES, 3, 2, 1).contiguous(memory_format=torch.channels_last)
    GradCache(Encoder(read), 4)(images, _criterion)
    assert set(strides) == {images.stride()}


@pytest.mark.parametrize("chunk_size", [4, 100])
def test_inputs_that_require_a_gradient(chunk_size: int) -> None:
    images, other = _images().requires_grad_(), _images().requires_grad_()
    model = Encoder(lambda inputs: (inputs * 1.0).sub_(1.0))
    _criterion(model(other)).backward()
    GradCache(model, chunk_size)(images, _criterion)
    torch.testing.assert_close(images.grad, other.grad, rtol=1e-10, atol=1e-12)


class Picture:
    """Like a PIL image: no sequence, no array."""

    def __init__(self, values: Tensor) -> None:
        self.values = values


def _words() -> list[str]:
    return [" ".join(str(value) for value in row) for row in _images().tolist()]


def _parsed(texts: Any) -> Tensor:
    return torch.tensor([[float(word) for word in text.split()] for text in texts], dtype=torch.float64)


def _arrays(inputs: np.ndarray[Any, Any]) -> Tensor:
    inputs -= 1.0
    return torch.from_numpy(inputs)


class Pair(NamedTuple):
    texts: list[str]
    language: str


# Inputs with one entry per sample, alone and with tensors, and the function that reads them.
COLUMNS: dict[str, tuple[Callable[[], Any], Callable[[Any], Tensor]]] = {
    "strings": (_words, _parsed),
    "tuple of strings": (lambda: tuple(_words()), _parsed),
    "UserList of strings": (lambda: UserList(_words()), _parsed),
    "strings in a dict": (
        lambda: {"text": _words(), "language": "en"},
        lambda inputs: _parsed(inputs["text"]),
    ),
    "strings in a UserDict": (lambda: UserDict(text=_words()), lambda inputs: _parsed(inputs["text"])),
    "strings in a named tuple": (lambda: Pair(_words(), "en"), lambda inputs: _parsed(inputs.texts)),
    "strings, emptied": (_words, lambda inputs: _parsed([inputs.pop(0) for _ in range(len(inputs))])),
    "dicts": (
        lambda: [{"text": text, "length": len(text)} for text in _words()],
        lambda inputs: _parsed([entry.pop("text") for entry in inputs]),
    ),
    "pictures": (
        lambda: [Picture(row) for row in _images()],
        lambda inputs: torch.stack([picture.values for picture in inputs]),
    ),
    "numbers": (
        lambda: _images()[:, 0].tolist(),
        lambda inputs: torch.tensor(inputs, dtype=torch.float64)[:, None].expand(-1, 6),
    ),
    "array": (lambda: _images().numpy(), _arrays),
    "array of strings": (lambda: np.array(_words()), lambda inputs: _parsed(inputs.tolist())),
    "array of objects": (
        lambda: np.array([*[row.tolist() for row in _images()], None], dtype=object)[:-1],
        lambda inputs: torch.tensor(inputs.tolist(), dtype=torch.float64),
    ),
    "lists beside a tensor": (
        lambda: [_images(), [text.split() for text in _words()], "abcdefghijk"],
        lambda inputs: inputs[0].sub_(1.0) + _parsed([" ".join(words) for words in inputs[1]]),
    ),
    "lists of lists in a tuple beside a tensor": (
        lambda: ((_words(), _words()), _images()),
        lambda inputs: inputs[1].sub_(1.0) + _parsed(inputs[0][0]) + _parsed(inputs[0][1]),
    ),
    "samples and pairs beside a tensor": (
        lambda: {"pairs": list(zip(_words(), _words(), strict=True)), "images": _images()},
        lambda inputs: inputs["images"] + _parsed([pair[1] for pair in inputs["pairs"]]),
    ),
    "array beside a tensor": (
        lambda: {"array": _images().numpy(), "images": _images(), "scale": torch.tensor(2.0)},
        lambda inputs: _arrays(inputs["array"]) + inputs["images"] * inputs["scale"].add_(1.0),
    ),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_entries_of_single_samples_are_split(name: str) -> None:
    make, read = COLUMNS[name]
    lengths: list[int] = []

    def counted(inputs: Any) -> Tensor:
        images = read(inputs)
        lengths.append(len(images))
        return images

    _assert_as_the_whole_batch(Encoder(counted), make)
    assert lengths == [SAMPLES, SAMPLES, 4, 4, 3, 4, 4, 3]


def test_pil_images() -> None:
    image = pytest.importorskip("PIL.Image")
    pixels = torch.randint(
        0, 256, (SAMPLES, 2, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8
    )
    pictures = [image.fromarray(page.numpy()) for page in pixels]

    def read(inputs: Any) -> Tensor:
        return torch.stack([torch.from_numpy(np.array(page)).flatten() for page in inputs]).double().div_(255)

    _assert_as_the_whole_batch(Encoder(read), lambda: pictures)
    _assert_as_the_whole_batch(
        Encoder(lambda inputs: read(inputs["pictures"])), lambda: {"pictures": pictures, "labels": LABELS}
    )


def test_other_values_go_to_every_chunk() -> None:
    constants = {
        "size": (224, 224),
        "name": "x" * SAMPLES,
        "module": nn.Sequential(*[nn.Identity()] * SAMPLES),
    }

    def read(inputs: Any) -> Tensor:
        assert {name: inputs[name] for name in constants} == constants
        return inputs["images"]

    _assert_as_the_whole_batch(Encoder(read), lambda: {"images": _images(), **constants})


def test_data_of_another_form_is_looked_up_by_sample() -> None:
    ragged = [row[: 3 + at % 4] for at, row in enumerate(_images())]

    def forward(model: nn.Module, samples: Tensor) -> Tensor:
        return model(torch.stack([F.pad(ragged[at], (0, 6 - len(ragged[at]))) for at in samples.tolist()]))

    _assert_as_the_whole_batch(Encoder(), lambda: torch.arange(SAMPLES), forward=forward)


SHAPES = r"one and the same first dimension \(the samples\), got shapes "
LENGTHS = (
    "or, without these, lists of one and the same length, alone or in a dict and without lists inside; got "
)
SQUARE = [["a"] * SAMPLES] * SAMPLES
REFUSED: dict[str, tuple[Any, str]] = {
    "string": ("images", LENGTHS + r"lists of lengths \[\] in str"),
    "nothing": ({}, LENGTHS + r"lists of lengths \[\] in dict"),
    "scalar": (torch.tensor(1.0), LENGTHS + r"lists of lengths \[\] in Tensor"),
    "lists of several lengths": (
        {"a": ["x"] * 3, "b": ["x"] * 4},
        LENGTHS + r"lists of lengths \[3, 4\] in dict",
    ),
    "samples or columns": ([("q", "p")] * SAMPLES, LENGTHS + r"lists of lengths \[\] in list"),
    "columns or samples": ((["q"] * 5, ["p"] * 5), LENGTHS + r"lists of lengths \[\] in tuple"),
    "tensors of several lengths": ((torch.zeros(4, 6), torch.zeros(3)), SHAPES + r"\[\[4, 6\], \[3\]\]"),
    "array and tensor": ((torch.zeros(4, 6), np.zeros(3)), SHAPES + r"\[\[4, 6\], \[3\]\]"),
    "a tensor per sample": (
        [torch.zeros(2 + at) for at in range(12)],
        SHAPES
        + r"\[\[2\], \[3\], \[4\], \[5\], \[6\], \[7\], \[8\], \[9\], \.\.\.\]; what does not belong to",
    ),
    "square": (
        {"images": _images(), "texts": SQUARE},
        "inputs hold a list of 11 lists of 11 entries for a batch of 11 samples: it is not clear which count",
    ),
    "deque": (
        {"images": _images(), "texts": deque(["a"] * SAMPLES)},
        "inputs hold a deque of 11 entries, as many as the batch has samples; GradCache does not know how",
    ),
    "set": ([_images(), set(range(SAMPLES))], "inputs hold a set of 11 entries"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    inputs, text = REFUSED[name]
    with pytest.raises(ValueError, match=text):
        GradCache(Encoder(), 2)(inputs, _criterion)


@pytest.mark.parametrize("name", ["square", "deque", "set"])
def test_one_chunk_needs_no_split(name: str) -> None:
    inputs, _ = REFUSED[name]
    images = (lambda given: given["images"]) if isinstance(inputs, dict) else (lambda given: given[0])
    GradCache(Encoder(images), SAMPLES)(inputs, _criterion)
