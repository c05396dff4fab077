"""Tests how configurations read YAML: the types of plain scalars, repeated keys, anchors, and limits on size and depth."""

import math
import time
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_dist.config.yaml_text import MAX_DEPTH, MAX_REPEATED, MAX_VALUES, MAX_YAML_BYTES, dump_yaml, load_yaml
from tests.support.cover import rest_full


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"), ("on", "on"), ("true", True), ("null", None), ("1e-4", 1e-4), ("1e6", 1e6), ("1.", 1.0),
        (".inf", math.inf), ("1_000_000", 1_000_000), ("010", "010"), ("0x10", "0x10"), ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"), ("'1e-4'", "1e-4"), ("[a, 1, no]", ["a", 1, "no"]),
    ],
)  # fmt: skip
def test_scalars(text: str, value: object) -> None:
    read, problems = load_yaml(text)
    assert (read, problems) == (value, [])
    assert type(read) is type(value)


def test_keys_are_text() -> None:
    assert load_yaml("on: 1\n2: a\nnull: b\n1e5: c")[0] == {"on": 1, "2": "a", "null": "b", "1e5": "c"}


def test_every_repeated_key_is_named() -> None:
    _, problems = load_yaml("a: 1\nb: {c: 1, c: 2}\na: 3\n")
    assert len(problems) == 2
    assert any("'a' is in line 1 and again in line 3" in fault for fault in problems)
    assert any("'c' is in line 2 and again in line 2" in fault for fault in problems)


def test_anchors_and_merges_work() -> None:
    assert load_yaml("a: &x {k: 1, j: 2}\nb: {<<: *x, k: 3}")[0]["b"] == {"k": 3, "j": 2}


def bomb(first: str, again: str, lines: int) -> str:
    """Returns YAML lines. Each line expands to ten times as many values as the line before."""
    return f"a0: &a0 {first}\n" + "".join(f"a{n}: &a{n} {again.replace('*', f'*a{n - 1}')}\n" for n in range(1, lines))


@pytest.mark.parametrize(
    "text",
    [
        bomb("[x,x,x,x,x,x,x,x,x,x]", f"[{','.join('*' * 10)}]", 9),
        bomb("{x: 1}", f"{{<<: [{','.join('*' * 10)}]}}", 9),
        bomb("[x]", "[*,*,*,*,*,*,*,*,*,*]", 2_000),
        bomb("[x]", "[*]", 20_000),
        "a: &a [*a]",
        "[" * 100_000,
    ],
    ids=["lists", "merges", "a number of a thousand digits", "deep", "itself", "brackets"],
)
@pytest.mark.slow
def test_aliases_that_stand_for_too_many_values_are_refused_at_once(text: str) -> None:
    began = time.process_time()
    value, problems = load_yaml(text)
    assert value is None
    assert len(problems) == 1
    assert time.process_time() - began < (1.0 if len(text) < 10_000 else 60.0), "the next test counts the steps"


ENTRIES = ["x,", "?,", "a: b,", "[],", "{},", "!!str x,", "a:b,", "*a,", '"x",']
LINES = ["- a\n", "- []\n", "a: 1\n", "? a\n", "%A b\n", "#\n", "--- a\n", "a: {<<: *a}\n", "b\n ", "- &a x\n"]
NESTED = ["[", "- ", "{a: ", "? ", "[[x],", "a: [", "&a [", "!!seq [", "- - x\n"]


@pytest.mark.parametrize("unit", rest_full([*LINES, *ENTRIES, *NESTED]), ids=repr)
def test_a_text_of_the_largest_size_costs_a_bounded_number_of_steps(unit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts PyYAML's steps: the tokens that it scans and the nodes and values that it makes. A step takes up to 30 us."""
    steps = dict.fromkeys(("fetch_more_tokens", "compose_node", "construct_object"), 0)

    def counted(name: str, real: Any) -> Any:
        def step(self: object, *arguments: Any, **options: Any) -> Any:
            steps[name] += 1
            return real(self, *arguments, **options)

        return step

    for name in steps:
        monkeypatch.setattr(yaml.SafeLoader, name, counted(name, getattr(yaml.SafeLoader, name)))
    begin = "[&a x," if unit in ENTRIES else "k: &a {x: 1}\n" if "<<" in unit else ""
    _, problems = load_yaml((begin + unit * MAX_YAML_BYTES)[:MAX_YAML_BYTES])
    assert len(problems) <= MAX_REPEATED
    assert steps["compose_node"] <= MAX_VALUES
    assert steps["construct_object"] <= MAX_VALUES
    assert steps["fetch_more_tokens"] <= 4 * MAX_VALUES


@pytest.mark.slow
def test_a_value_may_nest_as_deep_as_the_limit() -> None:
    levels = MAX_DEPTH - 1
    assert load_yaml("[" * levels + "x" + "]" * levels)[1] == []
    assert load_yaml("[" * MAX_DEPTH + "x" + "]" * MAX_DEPTH)[1] == [f"values are nested more than {MAX_DEPTH} deep"]
    assert len(load_yaml(f"[{'x,' * (MAX_VALUES - 1)}]")[0]) == MAX_VALUES - 1
    assert load_yaml(f"[{'x,' * MAX_VALUES}]")[1] == [f"more than {MAX_VALUES:,} values"]


@pytest.mark.parametrize(
    "text", ["!!python/name:os.system", "!!set {a}", "!!binary aGk=", "!!timestamp 2024-01-01", "? [a]\n: 1"]
)
def test_nothing_but_plain_values(text: str) -> None:
    value, problems = load_yaml(text)
    assert value is None
    assert len(problems) == 1


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=50)
@given(VALUES)
def test_what_is_written_is_read_back(value: object) -> None:
    assert load_yaml(dump_yaml(value)) == (value, [])
