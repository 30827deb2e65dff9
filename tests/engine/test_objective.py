"""The loss with a teacher, compared with its formula."""

import copy

import pytest
import torch
from torch import nn

from tests.engine import bodies
from trainer.config import DistillConfig, FitConfig
from trainer.engine.objective import Distilled, Supervised
from trainer.errors import ConfigError
from trainer.tasks import Classification

TASK = Classification()
SUPERVISED = Supervised(TASK)


class Table(nn.Module):
    """Logits that do not depend on the input."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, x):
        return self.logits


@pytest.fixture
def pair():
    torch.manual_seed(0)
    return Table(3 * torch.randn(7, 4)), Table(3 * torch.randn(7, 4))


TARGETS = torch.tensor([0, 1, 2, 3, 0, 1, 2])


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_formula_of_hinton(pair, weight, temperature):
    teacher, student = pair
    loss = Distilled(TASK, teacher, weight, temperature)(student, None, TARGETS, 7)
    p = (teacher.logits / temperature).softmax(1)
    q = (student.logits / temperature).softmax(1)
    divergence = (p * (p / q).log()).sum(1).mean()
    hard = -student.logits.softmax(1)[range(7), TARGETS].log().mean()
    expected = (1 - weight) * hard + weight * temperature**2 * divergence
    torch.testing.assert_close(loss, expected)
    assert loss.shape == ()


def test_its_ends(pair):
    teacher, student = pair
    labels = Distilled(TASK, teacher, 0.0, 4.0)(student, None, TARGETS, 7)
    assert torch.equal(labels, SUPERVISED(student, None, TARGETS, 7))
    same = Distilled(TASK, teacher, 1.0, 4.0)(copy.deepcopy(teacher), None, TARGETS, 7)
    assert same.item() == pytest.approx(0, abs=1e-6)


def test_a_high_temperature_keeps_the_scale_of_the_gradient(pair):
    """Towards infinity, the gradient is that of half the squared difference of centred logits."""
    teacher, student = pair
    Distilled(TASK, teacher, 1.0, 1000.0)(student, None, TARGETS, 7).backward()
    centred = [m.logits.detach() - m.logits.detach().mean(1, keepdim=True) for m in pair]
    torch.testing.assert_close(
        student.logits.grad, (centred[1] - centred[0]) / (7 * 4), rtol=0.02, atol=1e-3
    )


def test_a_language_model_counts_every_position_alike():
    torch.manual_seed(0)
    teacher, student = Table(torch.randn(3, 5, 4)), Table(torch.randn(3, 5, 4))
    targets = torch.randint(4, (3, 5))
    flat = [Table(m.logits.detach().flatten(0, 1)) for m in (teacher, student)]
    loss = Distilled(TASK, teacher, 0.5, 2.0)(student, None, targets, 15)
    flat_loss = Distilled(TASK, flat[0], 0.5, 2.0)(flat[1], None, targets.flatten(), 15)
    torch.testing.assert_close(loss, flat_loss)
    torch.testing.assert_close(
        TASK.mean_loss(student.logits, targets, 15),
        nn.functional.cross_entropy(student.logits.transpose(1, 2), targets),
    )


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_ignored_targets_have_no_say(pair, weight):
    """Neither in the loss nor in its gradient: the others count as if they were alone."""
    teacher, student = pair
    keep = torch.tensor([0, 2, 3, 6])
    targets = torch.full_like(TARGETS, -100)
    targets[keep] = TARGETS[keep]
    objective = Distilled(TASK, teacher, weight, 2.0) if weight else SUPERVISED
    loss = objective(student, None, targets, TASK.units(targets))
    loss.backward()
    fewer = Table(student.logits.detach()[keep])
    alone = (
        Distilled(TASK, Table(teacher.logits[keep].detach()), weight, 2.0) if weight else SUPERVISED
    )
    expected = alone(fewer, None, TARGETS[keep], 4)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(student.logits.grad[keep], fewer.logits.grad)
    assert student.logits.grad[[1, 4, 5]].eq(0).all()


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_a_batch_without_any_counted_target_has_no_loss(pair, weight):
    teacher, student = pair
    objective = Distilled(TASK, teacher, weight, 2.0) if weight else SUPERVISED
    loss = objective(student, None, torch.full_like(TARGETS, -100), 0)
    loss.backward()
    assert loss.item() == 0
    assert student.logits.grad.eq(0).all()


def test_the_teacher_stays_as_it_is():
    teacher = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.9), nn.Linear(8, 3))
    before = copy.deepcopy(teacher.state_dict())
    split, student = bodies.problem()
    objective = Distilled(TASK, teacher.train(), 0.7, 4.0)
    losses = [objective(student, split.inputs, split.targets, len(split)) for _ in range(2)]
    losses[0].backward()
    assert torch.equal(*losses)  # no dropout, no new running statistics
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in student.parameters())
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("setting", [{"weight": -0.1}, {"weight": 1.1}, {"temperature": 0.0}])
def test_wrong_settings(setting):
    (key,) = setting
    with pytest.raises(ConfigError, match=f"{key}="):
        FitConfig(distill=DistillConfig(**setting))
