"""Small trainings that every rank of a group executes."""

import copy
import threading

import torch
from torch import nn

from trainer.config import AllReduceConfig, FitConfig
from trainer.data.split import TensorSplit
from trainer.engine.evaluate import evaluate
from trainer.engine.loop import fit
from trainer.engine.optim import parse_optimizer
from trainer.engine.runtime import Runtime
from trainer.tasks import Classification

BUILDING = threading.Lock()  # ranks that are threads share torch's random state


def problem(samples=70, features=6, classes=3):
    """A split whose last batch is short, and a net without batch norm and dropout."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(samples, features, generator=generator)
    targets = (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0.5).long()
    with BUILDING:
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(features, 8), nn.Tanh(), nn.Linear(8, classes))
    return TensorSplit(inputs, targets), model


def sentences(samples=70, length=5, vocabulary=7):
    """A split of padded token sequences, and a network with an output at each position.

    Padding and some whole batches' worth of samples have the target -100.
    """
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randint(vocabulary, (samples, length), generator=generator)
    targets = (inputs * 3 + 1) % vocabulary
    lengths = torch.randint(length + 1, (samples, 1), generator=generator)
    targets[torch.arange(length) >= lengths] = -100
    with BUILDING:
        torch.manual_seed(2)
        model = nn.Sequential(nn.Embedding(vocabulary, 8), nn.Tanh(), nn.Linear(8, vocabulary))
    return TensorSplit(inputs, targets), model


def runtime(
    world,
    batch_size=16,
    precision="fp32",
    optimizer=None,
    sync_batchnorm=False,
    channels_last=False,
    task=None,
    **allreduce,
):
    return Runtime(
        world=world,
        precision=precision,
        allreduce=AllReduceConfig(**allreduce),
        optimizer=parse_optimizer(
            optimizer or {"_target_": "torch.optim.SGD", "lr": 0.2, "momentum": 0.9}
        ),
        batch_size=batch_size,
        seed=5,
        sync_batchnorm=sync_batchnorm,
        channels_last=channels_last,
        task=task or Classification(),
    )


def train(world, settings, problem=problem, **options):
    """Fit, then yield (weights, losses, bytes sent, metrics)."""
    split, model = problem()
    run = runtime(world, **options)
    losses, sent = [], 0
    for step in fit(model, split, FitConfig(**settings), run):
        losses.append(step.loss)
        sent = step.sent_bytes
    metrics = evaluate(model, split, run)
    yield copy.deepcopy(model.state_dict()), losses, sent, metrics
