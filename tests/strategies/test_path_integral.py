"""The path integral of the loss: by hand, and what it sums to."""

import pytest
import torch
from torch import nn

from lessons import CPU, one_batch, random
from permafrost.data import Batches
from permafrost.strategies import PathIntegral
from permafrost.training import TrainingConfig, cross_entropy, fit


@pytest.mark.parametrize(
    ("momentum", "expected"),
    [
        # g = 2, 1.6, 1.28 and -2, -1.8, -1.62; every move is -0.1 g.
        (0.0, [0.1 * (4 + 2.56 + 1.6384), 0.1 * (4 + 3.24 + 2.6244)]),
        # g = 2, 1.6, 1.08 moved by 2, 2.6, 2.38; and -2, -1.8, -1.52 by -2, -2.8, -2.92.
        (0.5, [0.1 * (4 + 4.16 + 2.5704), 0.1 * (4 + 5.04 + 4.4384)]),
    ],
)
def test_path_integral_of_a_parabola_by_hand(momentum, expected):
    """Of a w0² / 2 + b w1² / 2 with a = 2, b = 1, from (1, -2), in three steps of 0.1."""
    weights = nn.Parameter(torch.tensor([1.0, -2.0]))
    integral = PathIntegral({"w": weights})
    optimizer = torch.optim.SGD([weights], lr=0.1, momentum=momentum)
    for _ in range(3):
        optimizer.zero_grad()
        (torch.tensor([2.0, 1.0]) * weights.square() / 2).sum().backward()
        integral.before_step()
        optimizer.step()
        integral.after_step()
    torch.testing.assert_close(integral.tensors["w"], torch.tensor(expected))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_path_integral_sums_to_what_the_loss_has_lost(make_stirred, make_sequence, momentum):
    network, sequence = make_stirred(batch_norm=False, width=0.05), make_sequence()
    view, whole = network.view("multi", 0, 1), one_batch(sequence, 0)
    integral = PathIntegral(dict(network.named_parameters()))
    before = cross_entropy(view, whole)[0].item()
    lr = 2e-4 * (1 - momentum)
    config = TrainingConfig(epochs=40, lr=lr, momentum=momentum, batch_size=8, padding=0)
    train = Batches(sequence.tasks[0].train, sequence.normalization, CPU)
    fit(view, train, config, generator=random(), observer=integral)
    lost = before - cross_entropy(view, whole)[0].item()
    assert lost > 0.01
    total = sum(value.sum().item() for value in integral.tensors.values())
    assert total == pytest.approx(lost, rel=0.03)
    assert integral.tensors["heads.1.weight"].eq(0).all()  # not trained: it has no gradient
