"""How steep a run's encoder is: local Lipschitz constants, and a certified bound."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import torch

from pysupcon.errors import RunError
from pysupcon.evaluators import EvaluationConfig, FeatureSplits, Result
from pysupcon.models.concatenation import Concatenation
from pysupcon.models.lipschitz import certified_bound, local_constants
from pysupcon.reading import one_line
from pysupcon.trainer.run import Run

IMAGES = 64
"""Images of the validation split whose local constants are measured."""


class Lipschitz:
    """Evaluator of a run's encoder and images, which the other evaluators do not see.

    The constants relate changes of the features to changes of the model's input, which is normalised, in
    Euclidean norm. The images are spread evenly over the validation split.

    Args:
        run: the run.
        device: device of the encoder.
        config: ``features`` and ``batch_size``, the images that are differentiated at a time.
    """

    name: ClassVar[str] = "lipschitz"
    units: ClassVar[Mapping[str, str]] = {}
    meanings: ClassVar[Mapping[str, str]] = {
        "local/median": "local Lipschitz constant of the unit-length features, median of up to "
        f"{IMAGES} validation images",
        "local/max": "largest local Lipschitz constant of the unit-length features among these images",
        "raw/median": "local Lipschitz constant of the features as they are, median of these images",
        "raw/max": "largest local Lipschitz constant of the features as they are among these images",
        "bound": "certified upper bound for the features as they are, at every image: product over layers",
    }
    headline: ClassVar[Sequence[str]] = ("local/median",)

    def __init__(self, run: Run, device: torch.device, config: EvaluationConfig) -> None:
        self.run, self.device, self.config = run, device, config

    def __call__(self, splits: FeatureSplits, *, progress: bool = False) -> Iterator[Result]:
        """Yield the results of :meth:`measure`; the features are not needed."""
        return self.measure()

    def measure(self) -> Iterator[Result]:
        """Yield the results.

        Raises:
            RunError: the user's backbone has no forward-mode derivative.
        """
        dataset = self.run.splits()["val"]
        chosen = torch.linspace(0, len(dataset) - 1, min(IMAGES, len(dataset))).round().long().tolist()
        images = torch.stack([image for image, *_ in dataset.__getitems__(chosen)]).to(self.device)
        model = self.run.model.to(self.device)
        encode, size = model.encoder_of(self.config.features), self.config.batch_size
        for kind, unit in (("local", True), ("raw", False)):
            try:
                parts = [local_constants(encode, part, unit=unit) for part in images.split(size)]
            except (RuntimeError, NotImplementedError) as error:
                raise RunError(
                    "evaluation.lipschitz needs an encoder that torch.func.jvp and vjp can differentiate "
                    f"({one_line(error)}): leave it out with --lipschitz false"
                ) from error
            constants = torch.cat(parts)
            yield f"{self.name}/{kind}/median", float(constants.median())
            yield f"{self.name}/{kind}/max", float(constants.max())
        bound = self._bound(images.shape[1:])
        if bound is not None:
            yield f"{self.name}/bound", bound

    def _bound(self, shape: Sequence[int]) -> float | None:
        """The certified bound of what is evaluated; None if a part of the network has none."""
        model, backbone = self.run.model, self.run.model.backbone
        if self.config.features == "embedding":
            return certified_bound(backbone, shape)
        width = model.embedding_dim
        if model.two_encoders:  # the head takes the features of the first part
            assert isinstance(backbone, Concatenation)
            width = backbone.widths[0]
            backbone = backbone.parts[0]
        of_backbone, of_head = certified_bound(backbone, shape), certified_bound(model.projection, (width,))
        return None if of_backbone is None or of_head is None else of_backbone * of_head
