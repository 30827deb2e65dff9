"""Results of a run: sizes of its stages, counted by parameters."""

import pytest
import safetensors.torch
import torch
from torch import nn

from tests.models.test_models import SMALL
from trainer import artifact
from trainer.compress.codebooks import cluster
from trainer.compress.counts import counts
from trainer.driver.result import FinalModels
from trainer.engine.world import World
from trainer.experiment import Experiment
from trainer.messages import Evaluated, PhaseRecord
from trainer.models import ResNetCifar
from trainer.report.published import published
from trainer.store.serialization import to_bytes
from trainer.worker.evaluate import evaluate_models

SHARED = {
    "train": {"_target_": "trainer.phases.Train", "fit": {"epochs": 0}},
    "share": {"_target_": "trainer.phases.Share", "bits": 2, "fit": {"epochs": 0}},
}
MNIST = {"_target_": "trainer.data.mnist", "batch_size": 16, "root": None}


def config(**changes):
    settings = {
        "name": "test",
        "model": {"_target_": "trainer.models.LeNet300"},
        "data": MNIST,
        "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1},
        "phases": SHARED,
        "artifact": {"make": True, "coder": "huffman"},
        "cluster": {"workers": 1, "backend": "inline", "threads": 1},
    }
    return Experiment.from_config({**settings, **changes})


def record(name):
    return PhaseRecord(name, name, 1.0, 0, None, {"accuracy": 0.9}, 0.3, 1, 1, 1, 0.0, 0, None)


def names(model):
    return tuple(name for name, _ in model.named_parameters())


def share(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                book = cluster(parameter, 4)
                parameter.copy_(torch.cat((torch.zeros(1), book.values))[book.codes])


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.slow
def test_the_dense_stage_is_the_measure_of_all_ratios(name):
    """Tied weights, buffers, batch norm, a padded embedding: 4 bytes per parameter."""
    torch.manual_seed(0)
    model = SMALL[name].build()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                module.weight[0] = 0  # as for a padding index
    ends = [to_bytes(model.state_dict())]
    size = artifact.published_size(model.state_dict(), names(model))
    parameters = counts(model).parameters
    assert size.plain == size.coded == 4 * parameters
    share(model)
    ends.append(to_bytes(model.state_dict()))
    result = FinalModels(config(), ends.__getitem__, record("share"))
    tested = {
        "dense": Evaluated("dense", {"accuracy": 0.9}, 0.3, names(model)),
        "S": Evaluated("S", {"accuracy": 0.89}, 0.31, names(model)),
        "artifact": Evaluated("artifact", {"accuracy": 0.88}, 0.32, names(model)),
    }
    facts = result.facts(tested)
    found = facts["artifact"]
    assert found["dense_bytes"] == 4 * parameters
    stages = {stage["name"]: stage for stage in found["stages"]}
    assert list(stages) == ["dense", "S", "S+H (Han's format)", "model.dcz"]
    assert stages["dense"]["ratio"] == 1.0
    assert stages["S"]["bytes"] < 4 * parameters
    assert (facts["baseline_loss"], found["baseline_loss"], found["loss"]) == (0.3, 0.3, 0.32)
    assert [stage["loss"] for stage in stages.values()] == [0.3, 0.31, 0.31, 0.32]
    rows = sum(layer["bytes"] for layer in found["layers"])
    assert rows + found["frame_bytes"] == found["bytes"] == len(result.artifact)


def test_shared_weights_without_zeros_take_indices_and_a_codebook():
    weights = {"fc.weight": torch.tensor([1.0, 2.0, 3.0, 4.0]).repeat(50, 2)}
    size = artifact.published_size(weights, ["fc.weight"])
    assert size.plain == 400 * 2 / 8 + 4 * 4
    assert size.coded == size.plain + 4  # the lengths of four codes


def test_what_is_tied_or_no_parameter_is_not_counted():
    weights = torch.randn(20, 30)
    state = {
        "encoder.weight": weights,
        "decoder.weight": weights,
        "norm.running_mean": torch.randn(30),
        "norm.num_batches_tracked": torch.tensor(3),
        "window": torch.randn(5, 5),
        "empty": torch.empty(0, 4),
    }
    assert artifact.published_size(state, ["encoder.weight", "empty"]).plain == 4 * 600


def test_gaps_are_not_used_where_they_cost_more():
    weights = torch.randn(20, 30)
    weights[0] = 0
    assert artifact.published_size({"w": weights}, ["w"]).plain == 4 * 600
    weights[1:] *= torch.rand(19, 30) < 0.1
    assert artifact.published_size({"w": weights}, ["w"]).plain < 4 * 600 / 5


def test_the_test_set_is_measured_with_the_names_of_the_parameters():
    """Those of the model as it was rebuilt; buffers are none."""
    model = {"_target_": "trainer.models.ResNetCifar", "depth": 8, "in_channels": 1}
    cfg = config(model=model, data={**MNIST, "train": 10, "validation": 10, "test": 10})
    built = ResNetCifar(8, in_channels=1)
    content = safetensors.torch.save(built.state_dict())
    (found,) = evaluate_models(World.single(torch.device("cpu")), cfg, {"dense": content})
    assert found.parameters == names(built)
    assert any("running_mean" in name for name in built.state_dict())


@pytest.mark.parametrize(
    ("model", "data", "known"),
    [
        ({"_target_": "trainer.models.LeNet5"}, MNIST, True),
        ({"_target_": "trainer.models.lenet5.LeNet5", "classes": 10}, MNIST, True),
        ({"_target_": "mycode.LeNet5"}, MNIST, False),
        ({"_target_": "LeNet5"}, MNIST, False),
        ({"_target_": "trainer.models.LeNet5", "classes": 26}, MNIST, False),
        ({"_target_": "trainer.models.LeNet5"}, {**MNIST, "root": "fashion"}, False),
        ({"_target_": "trainer.models.LeNet5"}, {"_target_": "my.data"}, False),
        ({"_target_": "trainer.models.AlexNet", "classes": 1000}, {"_target_": "my.data"}, True),
        ({"_target_": "trainer.models.AlexNet", "classes": 10}, {"_target_": "my.data"}, False),
        ({"_target_": "mycode.VGG16"}, {"_target_": "my.data"}, False),
        ({"_target_": "trainer.models.ConvNet"}, MNIST, False),
    ],
)
def test_published_figures_are_those_of_the_same_net_and_data(model, data, known):
    found = published(model, data)
    assert bool(found) == known
    assert "P" not in found  # published as a count of weights, not bytes
