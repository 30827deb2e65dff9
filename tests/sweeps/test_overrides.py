"""Arguments that reproduce a trial, read back by Hydra's own parser."""

import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.experiments import printed
from trainer.sweeps.overrides import hydra_text, override

TEXTS = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0"), max_size=8)
AWKWARD = st.sampled_from(
    ["true", "null", "NaN", "1", "1e5", "", " a ", "it's", 'a "b"', "\\", "a\\'", "a=b", "a,b",
     "x: 1", "${seed}", "choice(1,2)", "größe", "[1]", "{a:1}", "-", "~", "a.b", "inf", "0x1",
     "1_000"]
)  # fmt: skip
LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS | AWKWARD
)  # fmt: skip
KEYS = st.text("abcXYZ_ =:,()[]{}\\./*$%@?|+-", min_size=1, max_size=6) | st.integers(0, 9)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(VALUES)
def test_any_value_is_read_back_as_itself(value):
    written = override("a.b", value)
    assert written is not None
    (argument,) = shlex.split(shlex.join([written]))
    parsed = OverridesParser.create().parse_override(argument)
    assert parsed.key_or_group == "a.b"
    assert repr(parsed.value()) == repr(value)


@settings(max_examples=40, deadline=None)
@given(st.lists(LEAVES | st.lists(LEAVES, max_size=2), max_size=4))
def test_values_of_different_types_have_different_texts(values):
    distinct = {repr(value) for value in values}
    assert len({hydra_text(value) for value in values}) == len(distinct)


@pytest.mark.parametrize(
    ("key", "value", "written"),
    [
        ("model.depth", 3, "model.depth=3"),
        ("name", "true", "name='true'"),
        ("phases.prune.overrides.conv*", 0.5, "phases.prune.overrides={conv*:0.5}"),
        ("phases.prune.overrides.a=b", 0.5, "phases.prune.overrides={a\\=b:0.5}"),
        ("model.1.x", None, "model.1.x=null"),
        ("model", {"größe": 1}, None),  # no key of a mapping in Hydra's grammar
        ("model", {"true": 1}, None),  # it would be a bool
        ("größe.a", 1, None),
    ],
)
def test_keys(key, value, written):
    assert override(key, value) == written


@pytest.mark.slow
def test_the_command_line_takes_awkward_values():
    text = 'it\'s "größe" = 1, true \\'
    shown = printed("+experiment=lenet300", override("data.root", text))
    assert shown["data"]["root"] == text
