"""Training on mixed samples, on any number of workers."""

import pytest
import torch

from tests.engine import bodies
from tests.engine.conftest import run_ranks
from tests.worker.test_selection import ALONE, experiment, messages, of, weights
from trainer.config import DistillConfig, FitConfig
from trainer.data.mixed import Mix
from trainer.data.split import Splits, TensorSplit
from trainer.engine.objective import Mixed, Supervised
from trainer.errors import ConfigError
from trainer.experiment import Experiment, initial_weights
from trainer.messages import Checkpoint, PhaseEnded
from trainer.phases import Prune, Retrain, Train
from trainer.tasks import Classification, Regression
from trainer.worker.preflight import check_compatible
from trainer.worker.run import Start


def test_the_loss_is_that_of_mixed_labels():
    model = torch.nn.Linear(3, 4)
    inputs = torch.randn(5, 3)
    targets = torch.tensor([0, 3, 1, 2, 2])
    partners = torch.tensor([1, 0, 3, 2])  # of the first four samples; the last one is a partner
    batch = {"inputs": inputs, "targets": targets, "partners": partners, "mix": Mix(0.3, None)}
    found = Supervised(Mixed(Classification()))(model, batch, targets[:4], 4)
    labels = torch.nn.functional.one_hot(targets, 4).float()
    mixed = 0.3 * labels[:4] + 0.7 * labels[partners]
    outputs = model(0.3 * inputs[:4] + 0.7 * inputs[partners])
    torch.testing.assert_close(found, torch.nn.functional.cross_entropy(outputs, mixed))


def test_workers_train_as_one_does():
    fit = FitConfig(epochs=2, mixup=0.4)
    taught = FitConfig(epochs=1, mixup=0.4, accumulate=2, distill=DistillConfig(weight=0.5))
    cfg = experiment(Train(fit=fit), Prune(0.5), Retrain(fit=taught))
    alone = messages(cfg)
    together = run_ranks(3, lambda world: messages(cfg, world))[0]
    for one, other in zip(weights(alone), weights(together), strict=True):
        for name, value in one.items():
            torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-5)
    plain = messages(experiment(Train(epochs=2)))
    losses = [of(PhaseEnded, found)[0].record.train_loss for found in (alone, plain)]
    assert losses[0] != losses[1]


def test_a_resumed_phase_ends_in_the_same_bits():
    cfg = experiment(Train(fit=FitConfig(epochs=2, mixup=0.4)))
    undisturbed = messages(cfg)
    (end,), (checkpoint, *_) = of(PhaseEnded, undisturbed), of(Checkpoint, undisturbed)[2:]
    start = Start(0, initial_weights(cfg, None), checkpoint.content)
    assert of(PhaseEnded, messages(cfg, start=start))[0].weights == end.weights


def test_what_cannot_be_mixed_is_refused_before_the_start():
    cutmix = FitConfig(epochs=1, cutmix=1.0)
    with pytest.raises(ConfigError, match=r"fit\.cutmix=1: it mixes images .* samples are \[6\]"):
        messages(experiment(Train(fit=cutmix)))
    split, model = bodies.problem()
    splits = Splits(split, split, split)
    with pytest.raises(ConfigError, match=r"phases\.train\.fit\.cutmix=1: .* Regression does not"):
        Experiment(model=model, data=splits, task=Regression(), phases=[Train(fit=cutmix)])
    run, mixup = bodies.runtime(ALONE), [FitConfig(epochs=1, mixup=1)]
    words, network = bodies.sentences()
    with pytest.raises(ConfigError, match=r"fit\.mixup=1: it mixes inputs .* have int64 \[5\]"):
        check_compatible(network, Splits(words, words, words), run, mixup)
    pairs = TensorSplit((split.inputs, split.inputs), split.targets)
    with pytest.raises(ConfigError, match=r"fit\.mixup=1: it mixes inputs that are one tensor"):
        check_compatible(torch.nn.Bilinear(6, 6, 3), Splits(pairs, pairs, pairs), run, mixup)
