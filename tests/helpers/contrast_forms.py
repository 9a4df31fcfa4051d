"""Arguments of losses: memory, hard negatives, weights, ignored labels, in the combinations of the tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

B, V, D, K, MEMORY = 6, 2, 4, 3, 9
TEMPERATURE = 0.4
OPTIONS: dict[str, tuple[str, ...]] = {
    "memory": ("memory",),
    "memory with weights": ("memory", "memory_weights"),
    "memory that holds the batch": ("memory", "instances", "exclude"),
    "memory with instances": ("memory", "instances", "candidates"),
    "memory, one": ("memory", "one", "instances"),
    "hard negatives": ("hard",),
    "hard negatives, one": ("hard", "one"),
    "memory and hard negatives": ("memory", "hard", "candidate_weights"),
    "own negatives only": ("memory", "hard", "batch_positives"),
    "keys": ("memory", "candidates", "batch_positives"),
    "candidate weights": ("candidate_weights",),
    "candidate weights by row": ("row_weights",),
    "candidate weights, one": ("candidate_weights", "one"),
    "weights of candidates": ("candidate_weights", "candidates"),
    "anchor weights": ("anchor_weights",),
    "anchor weights, one": ("anchor_weights", "one"),
    "class balance": ("class_balance",),
    "class balance and memory": ("class_balance", "memory", "memory_weights", "candidates"),
    "ignored": ("ignored",),
    "ignored and memory": ("ignored", "memory", "memory_weights"),
    "ignored, one": ("ignored", "one"),
    "ignored candidates": ("ignored", "candidates", "candidate_weights"),
    "unlabelled": ("unlabelled",),
    "unlabelled and memory": ("unlabelled", "memory", "instances"),
    "everything": (
        "memory", "memory_weights", "instances", "exclude", "hard", "candidate_weights", "anchor_weights",
        "class_balance", "ignored",
    ),
}  # fmt: skip


def build(parts: tuple[str, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, dict[str, Any]]:
    """Random features and the arguments of a loss."""
    labels = torch.tensor([1, 0, 1, -1, 0, -1])
    x = torch.randn(B, V, D, dtype=dtype)
    given: dict[str, Any] = {"labels": labels}
    if "one" in parts:
        given["contrast_mode"] = "one"
    if "instances" in parts:
        given["instances"] = torch.tensor([0, 3, 0, 5, 4, 5])
    if "candidates" in parts:
        given["candidates"] = torch.randn(4, D, dtype=dtype)
        given["candidate_labels"] = torch.tensor([-1, 0, 1, 1])
        given["candidate_instances"] = torch.tensor([5, 3, 0, 2])
        given.setdefault("instances", torch.tensor([0, 3, 0, 5, 4, 5]))
    if "memory" in parts:
        given["memory"] = torch.randn(MEMORY, D, dtype=dtype)
        given["memory_labels"] = torch.tensor([0, 1, -1, 2, 0, 1, -1, 0, 2])
        if "instances" in given:
            given["memory_instances"] = torch.tensor([3, 0, 5, 8, 7, 0, 9, 4, 2])
    if "memory_weights" in parts:
        given["memory_weights"] = torch.tensor([1.0, 0.5, 2.0, 0.0, 0.0, 3.0, 1.0, 1.0, 0.25])
    if "exclude" in parts:
        given["exclude_batch_from_memory"] = True
    if "hard" in parts:
        given["hard_negatives"] = torch.randn(B, K, D, dtype=dtype)
    size = 4 if "candidates" in parts else B
    if "candidate_weights" in parts:
        given["candidate_weights"] = torch.rand(size, dtype=torch.float64) + 0.1
    if "row_weights" in parts:
        given["candidate_weights"] = torch.rand(B, V, dtype=torch.float64) + 0.1
    if "anchor_weights" in parts:
        given["anchor_weights"] = torch.tensor([[1.0, 2.0], [0.0, 1.0], [0.5, 1], [3, 1], [1, 1], [2, 0.1]])
    if "batch_positives" in parts:
        given["batch_negatives"] = False
    if "class_balance" in parts:
        given["class_balance"] = True
    if "ignored" in parts or "unlabelled" in parts:
        given["ignore_index"] = -1
    if "unlabelled" in parts:
        given["unlabeled"] = "instance"
    return x, given


def differentiable(x: Tensor, given: dict[str, Any]) -> list[Tensor]:
    """The arguments that get a gradient."""
    return [x, *(given[name] for name in ("candidates", "hard_negatives") if name in given)]
