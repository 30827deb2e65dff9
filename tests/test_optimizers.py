"""Optimizers that are not torch's own: those that work, and those that are refused."""

import pytest
import torch

from tests.experiments import experiment
from trainer.engine.optim import OptimizerSpec
from trainer.errors import ConfigError
from trainer.experiment.optimizer import check_optimizer


class Lion(torch.optim.Optimizer):
    """Signs of a moving average, with a bit of noise (Chen et al., 2023, arXiv:2302.06675)."""

    def __init__(self, params, lr=1e-3, beta=0.9, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "beta": beta, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                average.lerp_(p.grad + 1e-3 * torch.randn_like(p), 1 - group["beta"])
                p.add_(average.sign() + group["weight_decay"] * p, alpha=-group["lr"])


class Sharp(Lion):
    """As sharpness-aware minimization, it evaluates the loss."""

    def step(self, closure=None):
        assert closure is not None, "requires closure"


class Forgetful(Lion):
    """Counts its steps where no state_dict shows them."""

    steps = 0

    def step(self, closure=None):
        super().step()
        self.steps += 1
        for group in self.param_groups:
            for p in group["params"]:
                p.data.mul_(1 / self.steps)


class Unstorable(Lion):
    def step(self, closure=None):
        super().step()
        for state in self.state.values():
            state["seen"] = {1, 2}


def settings(kind, **options):
    return {"_target_": f"{__name__}.{kind.__name__}", "lr": 0.1, **options}


def test_one_of_the_users_own_is_accepted():
    groups = {"plain": {"kind": "vectors", "weight_decay": 0.0}}
    found = experiment(optimizer=settings(Lion, weight_decay=0.1, groups=groups))
    assert found.optimizer.kind is Lion


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Sharp, "Sharp cannot make a step from gradients alone: AssertionError: requires closure"),
        (Forgetful, "the state_dict of Forgetful does not hold all that it needs"),
        (Unstorable, "the state of Unstorable does not fit into a checkpoint.* a set cannot"),
    ],
)
def test_others_are_refused_before_the_start(kind, said):
    with pytest.raises(ConfigError, match=said):
        experiment(optimizer=settings(kind))


NAMES = "ASGD Adadelta Adafactor Adagrad Adam AdamW Adamax NAdam RAdam RMSprop Rprop SGD"


@pytest.mark.parametrize("name", NAMES.split())
def test_those_of_torch_would_pass(name):
    own = type(name, (getattr(torch.optim, name),), {"__module__": __name__})
    check_optimizer(OptimizerSpec(own, {"lr": 0.01}))
