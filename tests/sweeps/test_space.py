"""The space of a sweep: drawn values, conditions, and refused texts."""

import numpy as np
import optuna
import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from trainer.config import SweepConfig
from trainer.errors import ConfigError
from trainer.sweeps.ranges import parse_range, range_text
from trainer.sweeps.space import parse_space
from trainer.sweeps.study import SweepStudy

CONVNET = {
    "model.depth": "range(1,4)",
    "model.kernel_size": "choice(3,5)",
    "optimizer": {"lr": "tag(log, interval(1e-4,1e-1))"},
}


def space(params, defaults=None, **settings):
    cfg = SweepConfig(params=params, objectives={"accuracy": "maximize"}, **settings)
    return parse_space(cfg, defaults or {})


@pytest.mark.parametrize(
    ("text", "ends", "values"),
    [
        ("range(1,5)", [1, 4], [1, 2, 3, 4]),
        ("range(5)", [0, 4], [0, 1, 2, 3, 4]),
        ("range(1,8,3)", [1, 7], [1, 4, 7]),
        ("range(5,1,-2)", [3, 5], [3, 5]),
        ("range(0.1,0.5,0.1)", [0.1, 0.4], [0.1, 0.2, 0.3, 0.4]),
        ("range(0.1,0.4,0.1)", [0.1, 0.3], [0.1, 0.2, 0.3]),  # binary floats would reach 0.4
        ("range(0.1,0.6,0.1)", [0.1, 0.5], [0.1, 0.2, 0.3, 0.4, 0.5]),
        ("range(0,1,0.25)", [0.0, 0.75], [0.0, 0.25, 0.5, 0.75]),
        ("range(0.5,0.1,-0.1)", [0.2, 0.5], [0.2, 0.3, 0.4, 0.5]),
        ("range(-0.2,0.2,0.1)", [-0.2, 0.1], [-0.2, -0.1, 0.0, 0.1]),
        ("range(1e-3,4e-3,1e-3)", [1e-3, 3e-3], [1e-3, 2e-3, 3e-3]),
        ("choice(3,5,7)", [3, 5, 7], [3, 5, 7]),
        ("3,5", [3, 5], [3, 5]),
        ("choice(true,false,abc,'a b')", [True, False, "abc", "a b"], [True, False, "abc", "a b"]),
        ("interval(0,1)", [0.0, 1.0], None),
        ("range(0,10,3)", [0, 9], [0, 3, 6, 9]),
        ("tag(log, interval(1e-4,1e-1))", [1e-4, 1e-1], None),
        ("tag(log, int(interval(8,10)))", [8, 10], [8, 9, 10]),
        ("int(interval(8,10))", [8, 10], [8, 9, 10]),
        ("choice([3,3],[5])", ["[3, 3]", "[5]"], ["[3, 3]", "[5]"]),
    ],
)
def test_ranges(text, ends, values):
    found = parse_range("key", text)
    assert found.ends() == ends
    assert found.all() == values
    assert getattr(found.distribution, "log", False) == ("log" in text)


@pytest.mark.parametrize(
    "given",
    [
        IntDistribution(8, 128, log=True),
        IntDistribution(1, 5),
        IntDistribution(1, 7, step=3),
        IntDistribution(-4, -4),
        FloatDistribution(1e-5, 1e-1, log=True),
        FloatDistribution(0, 1),
        FloatDistribution(0.1, 0.4, step=0.1),
        FloatDistribution(-0.3, 0.7, step=0.25),
        FloatDistribution(0.5, 0.5),
        CategoricalDistribution([True, None, 2, 0.5, "a, b", "null"]),
    ],
)
def test_a_distribution_of_optuna_is_the_range_of_its_text(given):
    found = parse_range("key", range_text("key", given)).distribution
    if given.single():
        assert found == CategoricalDistribution([given.low])
    else:
        assert found == given


def test_a_list_of_python_is_a_choice():
    found = parse_range("key", range_text("key", [(3, 3), [5], {"a": 1.0}, "x"]))
    assert [found.value(stored) for stored in found.all()] == [[3, 3], [5], {"a": 1.0}, "x"]
    assert range_text("key", "choice(1,2)") == "choice(1,2)"
    assert range_text("key", range(3)) == "0,1,2"
    assert range_text("key", list(np.array([0.5, 2.0]))) == "0.5,2.0"
    assert range_text("optimizer", {"lr": (1, 2)}) == {"lr": "1,2"}
    with pytest.raises(ConfigError, match=r"sweep\.params\.m\.act: .*ReLU.*choose among numbers"):
        range_text("m", {"act": [torch.nn.ReLU]})
    with pytest.raises(ConfigError, match=r"sweep\.params\.key"):
        parse_range("key", range_text("key", []))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("range(5,5)", "empty"),
        ("range(5,1)", "write range(5,1,-1)"),
        ("range(0.5,0.1,0.1)", "write range(0.5,0.1,-0.1)"),
        ("range(0.1,0.1,0.1)", "the end is not part"),
        ("range(0,inf,0.5)", "finite"),
        ("interval(0,inf)", "finite"),
        ("choice(a,'a')", "a is there twice"),
        ("choice([1],[1])", "[1] is there twice"),
        ("range(1,5,0)", ""),
        ("range(1.5,5,0)", "step"),
        ("range(0,2,0.000001)", "more than 1,000,000 values"),
        ("interval(3,1)", "nothing between 3.0 and 1.0"),
        ("choice()", "empty choice"),
        ("choice(3,3)", "twice"),
        ("tag(log, interval(0,1))", "low"),
        ("tag(log, choice(1,2))", "log"),
        ("tag(log, range(1,9,2))", "log"),
        ("tag(big, choice(1,2))", "big"),
        ("shuffle(choice(1,2))", "shuffle"),
        ("glob(*)", "choice(...)"),
        ("5", "choice(...)"),
        (5, "text such as"),
        ("range(1", "sweep.params.key=range(1"),
    ],
)
def test_invalid_ranges_are_refused(text, said):
    with pytest.raises(ConfigError) as error:
        parse_range("key", text)
    assert f"sweep.params.key={text}" in str(error.value)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


EQUAL = ["1,true", "true,1", "0,false", "1,1.0", "1.0,1,true,'1','true','1.0'", "0.0,-0.0",
         "[1],'[1]'", "1,true,[1],[true]"]  # fmt: skip


@pytest.mark.parametrize("items", EQUAL)
@pytest.mark.parametrize("sampler", ["tpe", "grid"])
@pytest.mark.slow
def test_choices_that_python_considers_equal_stay_apart(items, sampler, tmp_path):
    searched = space({"a": f"choice({items})"})
    cfg = SweepConfig(
        params={"a": f"choice({items})"}, sampler=sampler, objectives={"accuracy": "maximize"}
    )
    study = SweepStudy(cfg, searched, "test", 0, tmp_path, 1)
    study.record_settings({})
    wanted = {repr(value) for value in _values(f"[{items}]")}
    drawn = {}
    for _ in range(24):
        number = study.new_trial()
        if number is None:
            break
        drawn[number] = searched.settings(study.start(number))["a"]
    assert {repr(value) for value in drawn.values()} == wanted
    stored = {trial.number: searched.settings(trial.params)["a"] for trial in study.trials()}
    assert {n: repr(value) for n, value in stored.items()} == {
        n: repr(value) for n, value in drawn.items()
    }
    study.close()


def _values(text):
    return OverridesParser.create().parse_override(f"x={text}").value()


@pytest.mark.parametrize("sampler", ["tpe", "random", "grid"])
@pytest.mark.slow
def test_floats_of_a_range_are_those_that_it_lists(sampler, tmp_path):
    params = {"a": "range(0.1,0.6,0.1)", "b": "choice(1,2)"}
    searched = space(params, conditions={"b": "a <= 0.3"})
    cfg = SweepConfig(params=params, sampler=sampler, objectives={"accuracy": "maximize"})
    study = SweepStudy(cfg, searched, "test", 0, tmp_path, 1)
    study.record_settings({})
    seen = set()
    for number in iter(study.new_trial, None):
        drawn = study.start(number)
        value = searched.settings(drawn)["a"]
        assert value in (0.1, 0.2, 0.3, 0.4, 0.5)
        assert ("b" in drawn) == (value <= 0.3)
        assert searched.settings(study.trial(number).params) == searched.settings(drawn)
        seen.add(value)
        if number == 30:
            break
    assert seen == {0.1, 0.2, 0.3, 0.4, 0.5}
    study.close()


def test_a_condition_tells_true_from_one():
    searched = space({"a": "choice(1,true)", "b": "choice(x,y)"}, conditions={"b": "a == true"})
    assert searched.grid(9) == [{"a": "1"}, {"a": "true", "b": "x"}, {"a": "true", "b": "y"}]
    assert [searched.settings(drawn)["a"] for drawn in searched.grid(9)] == [1, True, True]


def test_long_ranges_of_whole_numbers_reach_their_end():
    found = parse_range("seed", "range(0,3000000000,7)")
    assert found.ends() == [0, 2_999_999_996]
    assert found.count() == 428_571_429
    with pytest.raises(ConfigError, match="more than 5 combinations"):
        space({"seed": "range(0,3000000000)"}).grid(5)


def test_nested_and_dotted_keys_are_the_same():
    assert [p.name for p in space(CONVNET).parameters] == [
        "model.depth", "model.kernel_size", "optimizer.lr"
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=r"model\.depth is given twice"):
        space({"model.depth": "3,5", "model": {"depth": "3,5"}})


def test_null_takes_a_parameter_away():
    assert [p.name for p in space({**CONVNET, "model.depth": None}).parameters] == [
        "model.kernel_size", "optimizer.lr"
    ]  # fmt: skip


def test_a_list_has_an_element_for_each_layer_that_there_is():
    layers = space(CONVNET, lengths={"model.kernel_size": "model.depth"})
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    depths = set()
    for _ in range(20):
        drawn = layers.suggest(study.ask())
        settings = layers.settings(drawn)
        assert len(settings["model.kernel_size"]) == settings["model.depth"]
        assert set(settings) == {"model.depth", "model.kernel_size", "optimizer.lr"}
        depths.add(settings["model.depth"])
    assert depths == {1, 2, 3}


def test_a_list_whose_length_is_not_drawn_leaves_its_key_alone():
    deep = space(
        {"kind": "choice(a,b)", "depth": "range(0,3)", "width": "choice(3,5)"},
        lengths={"width": "depth"},
        conditions={"depth": "kind == a"},
    )
    assert deep.settings({"kind": "b"}) == {"kind": "b"}
    assert deep.settings({"kind": "a", "depth": 0}) == {"kind": "a", "depth": 0, "width": []}
    drawn = {"kind": "a", "depth": 1, "width.0": 5}
    assert deep.settings(drawn) == {"kind": "a", "depth": 1, "width": [5]}


def test_lengths_may_be_numbers_or_keys_that_are_not_searched():
    for length in (2, "model.depth"):
        fixed = space({"model.width": "3,5"}, {"model.depth": 2}, lengths={"model.width": length})
        assert fixed.settings({"model.width.0": 3, "model.width.1": 5}) == {"model.width": [3, 5]}
        assert not fixed.conditional


def test_a_condition_decides_whether_a_parameter_is_drawn():
    searched = space(
        {"b": "choice(1,2)", "a": "choice(x,[1,2])", "c": "range(3)"},
        conditions={"b": "a == x", "c": "b >= 2 and a == x"},
    )
    assert [p.name for p in searched.parameters] == ["a", "b", "c"]
    assert searched.grid(100) == [
        {"a": "x", "b": 1},
        {"a": "x", "b": 2, "c": 0},
        {"a": "x", "b": 2, "c": 1},
        {"a": "x", "b": 2, "c": 2},
        {"a": "[1, 2]"},
    ]
    assert searched.settings({"a": "[1, 2]"}) == {"a": [1, 2]}


def test_every_end_of_every_range_is_tried_where_it_can_occur():
    layers = space(CONVNET, lengths={"model.kernel_size": "model.depth"})
    tried = [drawn for _, drawn in layers.ends()]
    for name, ends in {
        "model.depth": [1, 3],
        "model.kernel_size.0": [3, 5],
        "model.kernel_size.2": [3, 5],
        "optimizer.lr": [1e-4, 1e-1],
    }.items():
        assert {drawn[name] for drawn in tried if name in drawn} == set(ends)
    assert all(("model.kernel_size.2" in drawn) == (drawn["model.depth"] == 3) for drawn in tried)


@pytest.mark.parametrize(
    ("range_", "condition"),
    [
        ("range(1,9)", "a == 4"),
        ("range(1,9)", "a > 3 and a < 5"),
        ("range(1,9,2)", "a > 3.5 and a < 5.5"),
        ("interval(0,1)", "a > 0.4 and a < 0.6"),
        ("range(0.1,1.0,0.1)", "a > 0.25 and a <= 0.3"),
        ("range(1,9)", "a != 1 and a != 8"),
        ("choice(x,y,z)", "a == y"),
    ],
)
def test_ends_are_tried_also_where_a_condition_holds_only_in_the_middle(range_, condition):
    searched = space({"a": range_, "b": "range(1,4)"}, conditions={"b": condition})
    assert {drawn["b"] for _, drawn in searched.ends() if "b" in drawn} == {1, 3}


def test_ends_are_tried_along_a_chain_of_conditions():
    searched = space(
        {"a": "range(1,9)", "b": "range(1,9)", "c": "range(1,9)"},
        conditions={"b": "a == 3", "c": "b == 5"},
    )
    tried = [drawn for _, drawn in searched.ends() if "c" in drawn]
    assert [(drawn["a"], drawn["b"], drawn["c"]) for drawn in tried] == [(3, 5, 1), (3, 5, 8)]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lengths": {"model.width": "model.depth"}}, "sweep.lengths.model.width"),
        ({"lengths": {"model.kernel_size": "optimizer.lr"}}, "whole numbers"),
        ({"lengths": {"model.kernel_size": 0}}, "above 0"),
        ({"lengths": {"model.kernel_size": "model.layers"}}, "above 0"),
        ({"conditions": {"model.kernel_size": "model.size > 2"}}, "model.size is not a parameter"),
        ({"conditions": {"model.kernel_size": "often"}}, "KEY >= VALUE"),
        ({"conditions": {"model.kernel_size": "model.depth > big"}}, "cannot be ordered"),
        ({"conditions": {"model.width": "model.depth > 2"}}, "does not search it"),
        (
            {
                "conditions": {
                    "model.kernel_size": "model.depth > 2",
                    "model.depth": "model.kernel_size > 3",
                }
            },
            "depend on each other",
        ),
    ],
)
def test_invalid_spaces_are_refused(settings, said):
    with pytest.raises(ConfigError, match="sweep") as error:
        space(CONVNET, **settings)
    assert said in str(error.value)


def test_a_grid_must_end():
    with pytest.raises(ConfigError, match=r"optimizer\.lr.*infinitely many"):
        space(CONVNET).grid(100)
    with pytest.raises(ConfigError, match="more than 5 combinations"):
        space({"a": "range(3)", "b": "range(3)"}).grid(5)
