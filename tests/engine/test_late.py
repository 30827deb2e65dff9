"""Losses that are read one step late, as on a single GPU; and the arithmetic of fp32 on one."""

import pytest
import torch
from torch import Tensor

from tests.engine import bodies
from trainer.config import FitConfig
from trainer.engine import loop
from trainer.engine.late import LateValue, reads_late
from trainer.engine.loop import fit
from trainer.engine.precision import set_tf32
from trainer.engine.world import World
from trainer.errors import Diverged

ALONE = World.single(torch.device("cpu"))


def test_a_single_gpu_reads_late() -> None:
    assert reads_late(torch.device("cuda"), 1)
    assert not reads_late(torch.device("cuda"), 2)
    assert not reads_late(torch.device("cpu"), 1)


def test_a_value_may_be_overwritten_before_it_is_read() -> None:
    value = torch.tensor(3.0)
    late = LateValue(value)
    value.fill_(5.0)
    assert late() == 3.0


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Losses are read late; what happens to them, in order."""
    events: list[str] = []
    numbers = iter(range(1, 100))

    class Recorded(LateValue):
        def __init__(self, value: Tensor) -> None:
            super().__init__(value)
            self._number = next(numbers)
            events.append(f"launched {self._number}")

        def __call__(self) -> float:
            events.append(f"read {self._number}")
            return super().__call__()

    monkeypatch.setattr(loop, "reads_late", lambda device, ranks: True)
    monkeypatch.setattr(loop, "LateValue", Recorded)
    return events


def test_a_step_is_launched_before_the_loss_of_the_last_one_is_read(late: list[str]) -> None:
    split, model = bodies.problem(samples=64)
    for _ in fit(model, split, FitConfig(epochs=2, max_steps=6), bodies.runtime(ALONE)):
        pass
    first = ["launched 1", "launched 2", "read 1", "launched 3", "read 2", "launched 4", "read 3"]
    assert late == [*first, "read 4", "launched 5", "launched 6", "read 5", "read 6"]


@pytest.mark.parametrize("problem", [bodies.problem, bodies.sentences])
def test_weights_and_losses_are_the_same_bits(
    problem: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> tuple[dict[str, Tensor], list[float]]:
        ((weights, losses, *_),) = bodies.train(ALONE, {"epochs": 2}, problem=problem)
        return weights, losses

    weights, losses = run()
    monkeypatch.setattr(loop, "reads_late", lambda device, ranks: True)
    found, late_losses = run()
    assert late_losses == losses
    assert all(torch.equal(value, found[name]) for name, value in weights.items())


@pytest.mark.parametrize("checkpoint", [False, True])
def test_divergence_is_found_a_step_later_or_before_the_state_is_saved(
    late: list[str], checkpoint: bool
) -> None:
    split, model = bodies.problem()
    steps = fit(model, split, FitConfig(epochs=1), bodies.runtime(ALONE))
    next(steps).state()
    model[0].weight.data.fill_(torch.nan)
    step = next(steps)
    with pytest.raises(Diverged, match=r"the loss is nan in step 2 \(epoch 1\)"):
        step.state() if checkpoint else next(steps)


def test_tf32_is_set_for_products_and_convolutions_alike() -> None:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    try:
        for enabled in (True, False):
            set_tf32(enabled)
            assert (matmul.allow_tf32, cudnn.allow_tf32) == (enabled, enabled)
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
