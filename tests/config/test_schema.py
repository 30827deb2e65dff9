"""The schema: valid settings become dataclasses; messages about invalid ones name the key."""

import pytest

from trainer.config import ClusterConfig, Config, FitConfig, to_dataclass
from trainer.errors import ConfigError

MINIMAL = {
    "name": "test",
    "model": {"_target_": "trainer.models.LeNet5"},
    "data": {"_target_": "trainer.data.mnist", "batch_size": 64},
    "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1},
    "phases": {},
}


def test_plain_settings_become_nested_dataclasses():
    cfg = to_dataclass(Config, {**MINIMAL, "cluster": {"workers": 3}})
    assert cfg.cluster == ClusterConfig(workers=3)
    assert cfg.phases == {}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": "x"}, ["seed=x: it must be a whole number"]),
        ({"sed": 1}, ["sed", "known keys", "seed"]),
        ({"cluster": {"wokers": 1}}, ["cluster.wokers", "known keys", "workers"]),
        ({"cluster": {"workers": 0}}, ["cluster.workers=0", "at least 1"]),
        ({"cluster": {"workers": 2, "backend": "inline"}}, ["cluster.workers=2", "inline"]),
        ({"cluster": {"working_dir": "/no/where"}}, ["cluster.working_dir", "/no/where"]),
        ({"cluster": {"device": "cuda", "gpus_per_worker": 0.5}}, ["cluster.gpus_per_worker=0.5"]),
        ({"cluster": {"gpus_per_worker": 2}}, ["cluster.gpus_per_worker=2", "one GPU"]),
        ({"cluster": {"min_workers": 0}}, ["cluster.min_workers=0: it must be at least 1"]),
        ({"cluster": {"workers": 2, "min_workers": 3}}, ["cluster.min_workers=3", "workers=2"]),
        ({"cluster": {"min_workers": 1, "replay": "m.jsonl"}}, ["cluster.replay=m.jsonl with"]),
        (
            {"cluster": {"workers": 1, "backend": "inline", "min_workers": 1}},
            ["cluster.min_workers=1 with cluster.backend=inline"],
        ),
        (
            {
                "cluster": {"min_workers": 1},
                "sweep": {"params": {"seed": "range(2)"}, "objectives": {"accuracy": "maximize"}},
            },
            ["cluster.min_workers=1", "in a sweep"],
        ),
        ({"phases": {"a/b": {}}}, ["phases='a/b'"]),
        ({"phases": {"a": None}}, ["phases.a=null: it must have a value"]),
        ({"seed": None}, ["seed=null: it must have a value"]),
        ({"seed": 2**63}, ["seed="]),
        ({"cluster": {"nice": 20}}, ["cluster.nice=20", "between 0 and 19"]),
        ({"cluster": {"hang_timeout_s": float("nan")}}, ["cluster.hang_timeout_s=nan"]),
        ({"precision": "fp8"}, ["precision=fp8", "fp32, bf16, fp16"]),
        ({"allreduce": {"wire": "int4"}}, ["allreduce.wire=int4", "fp32", "int8"]),
        ({"allreduce": {"error_feedback": True}}, ["error_feedback=true", "wire=fp32"]),
        (
            {"allreduce": {"wire": "int8", "algorithm": "native"}},
            ["allreduce.wire=int8", "allreduce.algorithm=ring"],
        ),
        ({"allreduce": {"compression": "zip"}}, ["compression=zip", "powersgd, topk"]),
        ({"allreduce": {"rank": 0}}, ["allreduce.rank=0", "at least 1"]),
        ({"allreduce": {"fraction": 0.0}}, ["allreduce.fraction=0.0", "above 0"]),
        (
            {"allreduce": {"compression": "topk", "wire": "int8"}},
            ["allreduce.wire=int8", "allreduce.compression=topk"],
        ),
        (
            {"allreduce": {"compression": "topk", "algorithm": "native"}},
            ["allreduce.compression=topk", "allreduce.algorithm=ring"],
        ),
        ({"allreduce": {"local_steps": 0}}, ["allreduce.local_steps=0", "at least 1"]),
        ({"allreduce": {"outer_momentum": 1.0}}, ["allreduce.outer_momentum=1.0", "below 1"]),
        (
            {"allreduce": {"local_steps": 2}, "precision": "fp16"},
            ["allreduce.local_steps=2", "precision=fp16", "bf16"],
        ),
        (
            {"allreduce": {"local_steps": 2}, "sync_batchnorm": True},
            ["allreduce.local_steps=2", "sync_batchnorm=true"],
        ),
        (
            {"allreduce": {"local_steps": 2}, "cluster": {"min_workers": 1}},
            ["allreduce.local_steps=2", "cluster.min_workers"],
        ),
        ({"name": "../up"}, ["name='../up'"]),
        ({"phases": [1]}, ["list"]),
        ({"model": 3}, ["model"]),
        ({"data": {"batch_size": 0}}, ["data.batch_size=0", "above 0"]),
        ({"data": {"batch_size": "32"}}, ["data.batch_size='32'", "whole number"]),
        ({"data": {"batch_size": 1}}, ["data.batch_size=1", "cluster.workers=2"]),
    ],
)
def test_a_wrong_value_is_named(change, said):
    with pytest.raises(ConfigError) as error:
        to_dataclass(Config, {**MINIMAL, **change})
    for part in said:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"epochs": -1}, "phases.train.fit.epochs=-1"),
        ({"lr": 0}, "fit.lr=0"),
        ({"lr": -0.1}, "fit.lr=-0.1"),
        ({"schedule": "cosin"}, "fit.schedule=cosin"),
        ({"accumulate": 0}, "fit.accumulate=0"),
        ({"clip": float("inf")}, "fit.clip=inf"),
        ({"epocs": 1}, "phases.train.epocs"),
    ],
)
def test_a_wrong_fit_is_named_with_its_phase(settings, said):
    with pytest.raises(ConfigError, match=said.replace(".", r"\.")):
        to_dataclass(FitConfig, settings, "phases.train")


def test_a_missing_mandatory_key_is_named():
    with pytest.raises(ConfigError, match="name"):
        to_dataclass(Config, {key: value for key, value in MINIMAL.items() if key != "name"})


def test_what_is_no_number_is_refused():
    with pytest.raises(ConfigError, match=r"fit.lr='1e-3': it must be a number"):
        FitConfig(lr="1e-3")


def test_a_setting_that_is_missing_is_named():
    with pytest.raises(ConfigError, match=r"^model is missing$"):
        to_dataclass(Config, {key: value for key, value in MINIMAL.items() if key != "model"})
