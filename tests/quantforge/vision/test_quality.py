import math
import statistics

import pytest
import torch

from quantforge.search.budget import Budget
from quantforge.targets import bound
from quantforge.vision.quality import compare, logits_of


def test_agreement_kl_and_accuracy_of_known_predictions() -> None:
    reference = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0], [0.0, 0.0]]).log_softmax(-1)
    logits = reference.clone()
    logits[1] = torch.tensor([1.0, 0.0])
    made = compare(logits, reference, pictures="four", labels=torch.tensor([0, 1, 1, 0]))
    share = 1 / (1 + math.exp(-1.0))
    expected = share * 1.0 + (1 - share) * -1.0  # log-odds +1 against −1
    assert made.picture_kl == pytest.approx([0.0, expected, 0.0, 0.0], abs=1e-7)
    assert made.kl == pytest.approx(expected / 4)
    assert made.agreement == 0.75
    assert made.reference_accuracy == 0.75
    assert made.accuracy == 0.5
    assert made.drop == 0.25
    assert compare(logits, reference, pictures="four").drop == 0.25


def test_logits_do_not_depend_on_the_batch() -> None:
    x = torch.randn(5, 3, 4, 4)

    def network(part: torch.Tensor) -> torch.Tensor:
        return part.mean((2, 3)).double()

    assert torch.equal(logits_of(network, x, batch=2), x.mean((2, 3)))


def test_a_target_of_accuracy_bounds_the_paired_loss_of_right_pictures() -> None:
    reference = torch.eye(4).repeat(25, 1)
    labels = reference.argmax(-1)
    logits = reference.clone()
    logits[:3] = logits[:3].roll(1, -1)  # three of a hundred are wrong now
    made = compare(logits, reference, pictures="a hundred", labels=labels)
    found = bound(Budget.parse("acc:-5%").targets[0], made, [1.0] * 100)
    assert found.mean == pytest.approx(0.03)
    spread = statistics.stdev([1.0] * 3 + [0.0] * 97)
    assert found.stderr == pytest.approx(spread / 10)
    assert found.upper == pytest.approx(0.03 + 1.66039 * spread / 10, rel=1e-5)
