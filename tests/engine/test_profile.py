"""Measuring the steps of a fit: what is counted, what is traced, and that nothing else changes."""

import gzip
import json
from types import SimpleNamespace

import pytest
import torch

from tests.engine import bodies
from trainer.config import FitConfig
from trainer.engine import profile as profiles
from trainer.engine.loop import fit
from trainer.engine.objective import Supervised
from trainer.engine.profile import (
    Profile,
    ProfiledObjective,
    ProfiledRuntime,
    ProfiledSplit,
    all_profiles,
)
from trainer.engine.world import World


def measured(world, **options):
    """Weights, sent bytes and profiles of ten steps, with and without measuring them."""
    found = []
    for profile in (None, Profile(world.device)):
        split, model = bodies.problem()
        run = bodies.runtime(world, **options)
        objective = Supervised(run.task)
        if profile is not None:
            split, run = ProfiledSplit(split, profile), ProfiledRuntime.of(run, profile)
            objective = ProfiledObjective(objective, profile)
        steps = list(fit(model, split, FitConfig(epochs=2), run, objective=objective))
        found.append((model.state_dict(), steps[-1].sent_bytes))
    profile.close()
    return found, profile


def assert_same(found):
    (weights, sent), (again, sent_again) = found
    assert sent == sent_again
    assert all(torch.equal(weights[key], again[key]) for key in weights)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_profile_changes_no_bit_and_traces_five_steps(precision):
    world = World.single(torch.device("cpu"))
    found, profile = measured(world, precision=precision)
    assert_same(found)
    assert profile.steps == 10 - 1 - profiles.TRACED
    times = profile.milliseconds()
    assert times["forward"] > 0
    assert times["exposed_communication"] >= times["hidden_communication"] == 0
    added = sum(times.values()) - times["step"] - times["hidden_communication"]
    assert added == pytest.approx(times["step"])
    events = json.loads(gzip.decompress(profile.trace))["traceEvents"]
    for name in profiles.SECTIONS:
        names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
        assert names.count(name) >= profiles.TRACED
    record, traces = all_profiles(profile, world)
    assert (record["steps"], len(record["ranks"]), traces) == (4, 1, [profile.trace])


def test_communication_during_backward_is_hidden_and_the_rest_is_exposed(ranks, monkeypatch):
    monkeypatch.setattr(profiles, "FIRST_TRACED", 0)  # one process has one profiler

    def body(world):
        found, profile = measured(world, bucket_mb=0.0001)
        assert_same(found)
        return all_profiles(profile, world), profile._seconds

    results = ranks(2, body)
    for ((record, traces), seconds), count in zip(results, (2, 0), strict=True):
        assert (record["steps"], len(record["ranks"]), traces) == (9, count, [])
        assert seconds["all-reduce"] > 0
        assert seconds["communication"] > 0


def test_rank_0_gets_the_profiles_and_the_traces_of_all(ranks):
    """A rank may have no trace, if its steps were too few."""

    def body(world):
        profile = Profile(world.device)
        profile._seconds["step"] = 1.0 + world.rank
        profile.steps = 2
        profile.trace = b"trace" * world.rank
        return all_profiles(profile, world)

    (record, traces), (nothing, none) = ranks(2, body)
    assert record["steps"] == 2
    assert [times["step"] for times in record["ranks"]] == [500, 1000]
    assert traces == [b"trace"]
    assert nothing == {"steps": 2, "ranks": []}
    assert none == []


def test_hidden_is_what_the_all_reduce_takes_beyond_the_wait(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(profiles, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    profile = Profile(torch.device("cpu"))
    for _ in range(2):  # the first step is not counted
        profile.add("data", 9.0)  # between two steps
        profile.begin_step()
        for name, seconds in [("forward", 1.0), ("backward", 2.0), ("communication", 0.5)]:
            with profile.section(name):
                now[0] += seconds
        profile.add("all-reduce", 1.5)
        now[0] += 0.25
        profile.end_step()
    assert profile.milliseconds() == {
        "step": 3750,
        "data": 0,
        "forward": 1000,
        "backward": 2000,
        "optimizer": 0,
        "exposed_communication": 500,
        "hidden_communication": 1000,
        "rest": 250,
    }
