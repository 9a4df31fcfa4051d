"""Feature vectors as data: checks, standardisation and random views."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pysupcon.errors import ConfigError
from pysupcon.user_code import PlainValue

DEFAULT_NOISE, DEFAULT_DROPOUT = 0.1, 0.2
_SMALLEST_STD = 1e-6


def as_vectors(rows: Sequence[Any] | np.ndarray | Tensor, field: str) -> Tensor:
    """Convert features to a float32 tensor [N, D].

    Args:
        rows: an array [N, D], or N vectors.
        field: field of the config that names the data, for messages.

    Raises:
        ConfigError: they are no matrix of finite numbers.
    """
    try:
        if not isinstance(rows, (np.ndarray, Tensor)):
            rows = torch.stack([torch.as_tensor(row) for row in rows])
        matrix = torch.as_tensor(rows)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{field}: the features must be numbers, of one length D: {error}") from error
    if matrix.ndim != 2 or 0 in matrix.shape or matrix.is_complex():
        raise ConfigError(f"{field}: the features must have the shape [N, D], got {list(matrix.shape)}")
    matrix = matrix.to(torch.float32).contiguous()
    finite = matrix.isfinite().all(dim=1)
    if not bool(finite.all()):
        rows_ = (~finite).nonzero().flatten()
        raise ConfigError(
            f"{field}: the features must be finite, but {len(rows_)} of {len(matrix)} rows are not, "
            f"first row {int(rows_[0])}"
        )
    return matrix


class Standardize:
    """Converts vectors float32 [..., D] to zero mean and unit variance per feature.

    Args:
        features: the training split, [N, D]; its statistics are used. A constant feature becomes 0.
    """

    def __init__(self, features: Tensor) -> None:
        std, mean = torch.std_mean(features.double(), dim=0, correction=0)
        self.mean = mean.float()
        self.std = torch.where(std > _SMALLEST_STD * (1 + mean.abs()), std, torch.inf).float()

    def __call__(self, vectors: Tensor) -> Tensor:
        if self.mean.device != vectors.device:  # on the first call only
            self.mean, self.std = self.mean.to(vectors.device), self.std.to(vectors.device)
        return (vectors - self.mean) / self.std


class Unchanged:
    """Stands for the resizing of images where the data are vectors."""

    def __call__(self, vectors: Tensor) -> Tensor:
        return vectors


class VectorAugmentation:
    """Random views of feature vectors.

    Args:
        strength: "none"; "noise" or "weak": Gaussian noise; "dropout": features are replaced by their mean;
            "strong": both.
        standardize: the statistics of the features.
        arguments: ``noise``, the standard deviation of the noise relative to that of the feature (default
            0.1), and ``dropout``, the probability of a feature to be replaced (default 0.2).

    Attributes:
        num_uniforms: number of uniform random numbers per view.
        size: 0; of images it is the side of the views.

    Raises:
        ConfigError: an argument is not valid.
    """

    size = 0

    def __init__(
        self,
        strength: Literal["none", "noise", "dropout", "weak", "strong"],
        standardize: Standardize,
        arguments: dict[str, PlainValue],
    ) -> None:
        used = {
            "noise": strength in ("noise", "weak", "strong"),
            "dropout": strength in ("dropout", "strong"),
        }
        values = {"noise": DEFAULT_NOISE, "dropout": DEFAULT_DROPOUT}
        for name, value in arguments.items():
            if not used.get(name, False):
                raise ConfigError(
                    f"data.augmentation_args.{name} has no effect with data.augmentation={strength}"
                )
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not 0 < value < (1 if name == "dropout" else float("inf")):  # type: ignore[operator]
                limits = "lie in (0, 1)" if name == "dropout" else "be greater than 0"
                raise ConfigError(f"data.augmentation_args.{name} must {limits}, got {value!r}")
            values[name] = float(value)  # type: ignore[arg-type]
        self.noise = values["noise"] if used["noise"] else 0.0
        self.dropout = values["dropout"] if used["dropout"] else 0.0
        self.mean, self.std = standardize.mean.clone(), standardize.std.clone()
        self.std[self.std.isinf()] = 0
        self.dim = len(self.mean)
        self.num_uniforms = self.dim * ((self.noise > 0) + (self.dropout > 0))

    def __call__(self, vectors: Tensor, uniforms: Tensor) -> Tensor:
        """V views of every vector.

        Args:
            vectors: float32 [n, D].
            uniforms: float64 [n, V, num_uniforms] in [0, 1). A view depends only on its vector and uniforms.

        Returns:
            float32 [n, V, D].
        """
        views = vectors.unsqueeze(1).expand(-1, uniforms.shape[1], -1)
        if self.noise > 0:
            # Away from 0 and 1, where the inverse of the distribution function is infinite.
            inner = uniforms[..., : self.dim].clamp(2**-53, 1 - 2**-53)
            views = views + self.noise * self.std * torch.special.ndtri(inner).float()
        if self.dropout > 0:
            views = torch.where(uniforms[..., -self.dim :] < self.dropout, self.mean, views)
        return views
