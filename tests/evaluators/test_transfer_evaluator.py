"""The transfer evaluator: a new linear head on features of another data set."""

from __future__ import annotations

import pytest
import torch
from helpers.feature_cases import numbers, splits

from pysupcon.evaluators import FeatureSet, FeatureSplits, Transfer, TransferConfig
from pysupcon.evaluators.linear_probe import fit_probe
from pysupcon.evaluators.transfer import concatenate, fit_transfer_head


def test_the_head_is_chosen_on_validation_and_trained_on_both():
    data = splits(distance=0.7)
    config = TransferConfig(penalties=[10.0, 0.03, 1e-6])
    chosen = fit_probe(data.train, data.val, "fine", config)
    found = fit_transfer_head(data, config)
    assert found.chosen == chosen.chosen
    assert found.val_accuracy == chosen.val_accuracy
    both = concatenate(data.train, data.val)
    expected = fit_probe(both, data.val, "fine", TransferConfig(penalties=[chosen.chosen]))
    assert torch.equal(found.weight, expected.weight)
    assert not torch.allclose(found.weight, chosen.weight)
    alone = fit_transfer_head(data, TransferConfig(penalties=[10.0, 0.03, 1e-6], refit=False))
    assert torch.equal(alone.weight, chosen.weight)


def test_validation_samples_of_a_class_that_training_lacks_are_learnt():
    data = splits(distance=4.0)
    keep = data.train.fine != 5
    train = FeatureSet(data.train.features[keep], data.train.coarse[keep], data.train.fine[keep])
    lacking = FeatureSplits(train, data.val, data.test)
    with_both, without = (dict(Transfer(TransferConfig(refit=refit))(lacking)) for refit in (True, False))
    assert with_both["transfer/accuracy"] > 0.95
    assert without["transfer/accuracy"] < 0.85


def test_the_last_training_ends_with_its_last_epoch():
    data = splits(distance=0.3)
    config = TransferConfig(
        solver="sgd", epochs=6, learning_rates=[3.0], standardize=False, batch_size=16, seed=2
    )
    found = fit_transfer_head(data, config)
    both = concatenate(data.train, data.val)
    generator = torch.Generator().manual_seed(2)
    head = torch.nn.Linear(both.features.shape[1], 6)
    torch.nn.init.normal_(head.weight, std=0.01, generator=generator)
    torch.nn.init.zeros_(head.bias)
    optimizer = torch.optim.SGD(head.parameters(), 3.0, momentum=0.9)
    accuracies = []
    for epoch in range(6):
        for group in optimizer.param_groups:  # x 0.2 at 60, 75 and 90 % of six epochs
            group["lr"] = 3.0 * 0.2 ** sum(epoch >= start for start in (4, 5, 6))
        for rows in torch.randperm(len(both), generator=generator).split(16):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(head(both.features[rows].float()), both.fine[rows]).backward()
            optimizer.step()
        predicted = head(data.val.features.float()).argmax(1)
        accuracies.append((predicted == data.val.fine).double().mean().item())
    torch.testing.assert_close(found.weight, head.weight.detach().double(), rtol=1e-4, atol=1e-4)
    assert max(accuracies) > accuracies[-1]  # another epoch is better on what was validated


def test_transfer_names_its_figures_and_sweeps_learning_rates():
    data = splits(distance=1.5)
    found = numbers(Transfer(TransferConfig(solver="sgd", epochs=5, learning_rates=[1e-6, 0.1]))(data))
    assert found["transfer/chosen"] == 0.1
    assert found["transfer/chance"] == pytest.approx(1 / 6)
    assert set(found) == {
        f"transfer/{k}" for k in ("accuracy", "chance", "val_accuracy", "chosen", "converged")
    }
