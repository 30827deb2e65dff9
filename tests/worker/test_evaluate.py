"""Evaluation on the test set, also with NaN and infinity."""

import math

import pytest
import torch

from tests.test_resume import config
from trainer.data.split import Splits, TensorSplit
from trainer.engine.world import World
from trainer.errors import RunError
from trainer.messages import Evaluated
from trainer.store.serialization import to_bytes
from trainer.worker.evaluate import evaluate_models

WORLD = World.single(torch.device("cpu"))


def spoiled(seed: int) -> Splits:
    """Images of which one in the test data is NaN."""
    images = torch.zeros(20, 1, 28, 28)
    wrong = images.clone()
    wrong[7] = math.nan
    targets = torch.arange(20) % 10
    right = TensorSplit(images, targets)
    return Splits(right, right, TensorSplit(wrong, targets))


def test_an_input_that_is_not_finite_is_named() -> None:
    cfg = config(data={"_target_": f"{__name__}.spoiled", "batch_size": 16})
    weights = to_bytes(cfg.build_model().state_dict())
    with pytest.raises(RunError, match=r"input of test sample 7 is NaN"):
        list(evaluate_models(WORLD, cfg, {"model": weights}))


def test_weights_that_give_no_finite_loss_are_refused() -> None:
    cfg = config()
    state = cfg.build_model().state_dict()
    (measured,) = evaluate_models(WORLD, cfg, {"model": to_bytes(state)})
    assert isinstance(measured, Evaluated)
    for value in state.values():
        if value.is_floating_point():
            value.fill_(math.nan)
    with pytest.raises(RunError, match="the test loss of the model model is nan"):
        list(evaluate_models(WORLD, cfg, {"model": to_bytes(state)}))
