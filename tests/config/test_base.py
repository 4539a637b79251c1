from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from amlp_ray.config.base import Config, ConfigValues, build, rejection_reason
from amlp_ray.config.overrides import build_with_overrides, flatten, merge, nest, parse_overrides
from amlp_ray.config.yaml_file import read_yaml, write_yaml
from amlp_ray.errors import ConfigError


class Engine(Config):
    power: float = Field(90.0, gt=0, le=500)
    cylinders: int = Field(4, ge=1)


class Car(Config):
    name: str
    doors: int = Field(5, ge=2)
    engine: Engine = Engine()


name = st.text(st.characters(whitelist_categories=("Ll", "Nd")), min_size=1, max_size=4)
value = st.one_of(
    st.integers(),
    st.booleans(),
    st.none(),
    st.text(max_size=5),
    st.lists(st.integers(), max_size=2),
)
tree = st.recursive(
    st.dictionaries(name, value, min_size=1, max_size=4),
    lambda inner: st.dictionaries(name, st.one_of(value, inner), min_size=1, max_size=4),
    max_leaves=12,
)


@given(tree)
def test_nested_undoes_flat(values: dict[str, Any]) -> None:
    dotted = flatten(values)
    assert not any(isinstance(v, dict) for v in dotted.values())
    assert nest(dotted) == values
    assert flatten(nest(dotted)) == dotted


def test_flat_of_a_model_names_every_setting() -> None:
    assert flatten(Car(name="a")) == {
        "name": "a",
        "doors": 5,
        "engine.power": 90.0,
        "engine.cylinders": 4,
    }


@given(tree, tree)
def test_merged_has_every_value_of_the_upper_one_and_changes_neither(
    under: dict[str, Any], over: dict[str, Any]
) -> None:
    before = repr((under, over))
    out = flatten(merge(under, over))
    assert repr((under, over)) == before
    assert flatten(over).items() <= out.items()
    above = flatten(over)
    hidden = {
        k
        for k in flatten(under)
        if any(k == a or k.startswith(a + ".") or a.startswith(k + ".") for a in above)
    }
    assert {k: v for k, v in flatten(under).items() if k not in hidden}.items() <= out.items()


def test_merged_takes_models_for_mappings() -> None:
    assert merge({"engine": {"power": 1, "extra": 2}}, {"engine": Engine(power=3)})["engine"] == {
        "power": 3,
        "cylinders": 4,
        "extra": 2,
    }


def sentence(values: dict[str, Any], source: str = "car.yaml") -> str:
    with pytest.raises(ConfigError) as caught:
        build(Car, values, source)
    return str(caught.value)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"name": "a", "dors": 4}, "car.yaml: unknown setting 'dors'; did you mean doors?"),
        (
            {"name": "a", "engine": {"powr": 4}},
            "car.yaml: unknown setting 'engine.powr'; did you mean engine.power?",
        ),
        (
            {"name": "a", "zzzzzzzz": 4},
            "car.yaml: unknown setting 'zzzzzzzz'; known here: name, doors, engine.",
        ),
        ({}, "car.yaml: name is missing."),
        (
            {"name": "a", "doors": 1},
            "car.yaml: doors is 1, but must be greater than or equal to 2.",
        ),
        (
            {"name": "a", "engine": {"power": 501}},
            "car.yaml: engine.power is 501, but must be less than or equal to 500.",
        ),
        ({"name": "a", "doors": 2.5}, "car.yaml: doors is 2.5, but must be a valid integer"),
        (
            {"name": "a", "engine": {"power": math.nan}},
            "car.yaml: engine.power is nan, but must be",
        ),
        (
            {"name": "a", "engine": {"power": math.inf}},
            "car.yaml: engine.power is inf, but must be",
        ),
        ({"name": "a", "engine": 5}, "car.yaml: engine is 5, but must be a valid dictionary"),
    ],
)
def test_a_fault_is_one_sentence_with_source_key_value_and_what_is_accepted(
    values: dict[str, Any], expected: str
) -> None:
    assert sentence(values).startswith(expected)


def test_all_faults_are_told_at_once() -> None:
    text = sentence({"doors": 0, "color": "red", "engine": {"power": -1, "cylinders": 0}})
    for part in (
        "name is missing",
        "doors is 0",
        "'color'",
        "engine.power is -1",
        "engine.cylinders is 0",
    ):
        assert part in text


def test_settings_cannot_be_changed_after_checking() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Car(name="a").doors = 3  # type: ignore[misc]


def test_assignments_are_read_as_yaml_and_laid_on_top() -> None:
    base = {"name": "a", "engine": {"power": 10, "cylinders": 8}}
    car = build_with_overrides(Car, base, ["engine.power=1e2", "doors=3", "name=b=c"])
    assert car == Car(name="b=c", doors=3, engine=Engine(power=100, cylinders=8))
    assert parse_overrides(["a=true", "b=[1, 2]", "c=", "d= x"]) == {
        "a": True,
        "b": [1, 2],
        "c": None,
        "d": "x",
    }


@pytest.mark.parametrize("text", ["doors", "=3", ""])
def test_an_assignment_without_a_name_or_value_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--set .* is not of the form name=value"):
        parse_overrides([text])


def test_an_assignment_that_is_no_yaml_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'doors=\[1' ?: the value cannot be read"):
        parse_overrides(["doors=[1"])


@pytest.mark.parametrize("texts", [["engine=4", "engine.power=5"], ["engine.power=5", "engine=4"]])
def test_a_group_and_a_value_inside_it_contradict_each_other_in_either_order(
    texts: list[str],
) -> None:
    with pytest.raises(ConfigError, match="both a group and a value inside it: "):
        parse_overrides(texts)


def test_a_fault_in_an_assignment_names_where_it_was_given() -> None:
    with pytest.raises(ConfigError, match="--set: doors is 1, but"):
        build_with_overrides(Car, {"name": "a"}, ["doors=1"])


def test_yaml_keeps_settings_in_full(tmp_path: Path) -> None:
    path = tmp_path / "car.yaml"
    write_yaml(Car(name="é", engine=Engine(power=0.1)), path)
    assert (
        read_yaml(path)["doors"] == 5
    )  # a default, written so that its change does not change an old run
    assert build(Car, read_yaml(path), "x") == Car(name="é", engine=Engine(power=0.1))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (None, "There is no settings file"),
        (b"a: [1", "is not valid YAML"),
        (b"\xff\x00bad", "is not text in UTF-8 or UTF-16"),
        (b"- 1\n- 2", "must hold keys and values, not list"),
        (b"", "must hold keys and values, not NoneType"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused_in_one_sentence(
    tmp_path: Path, content: bytes | None, match: str
) -> None:
    path = tmp_path / "car.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=match) as caught:
        read_yaml(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_yaml_never_runs_code(tmp_path: Path) -> None:
    path = tmp_path / "car.yaml"
    path.write_text(f"name: !!python/object/apply:pathlib.Path.touch [{tmp_path / 'ran'}]")
    with pytest.raises(ConfigError):
        read_yaml(path)
    assert not (tmp_path / "ran").exists()


FILE = """\
name: a
engine:
  power: 501
  cylinders: &few 0
doors: *few
engine: {powr: 1e2}
spare:
- {doors: 3}
"""


def read(folder: Path, text: str = FILE) -> ConfigValues:
    path = folder / "car.yaml"
    path.write_text(text)
    return read_yaml(path)


def test_faults_of_a_file_are_told_with_their_lines_and_in_their_order(tmp_path: Path) -> None:
    values = read(tmp_path)
    with pytest.raises(ConfigError) as caught:
        build(Car, values, "not told: the file knows its name")
    faults = [fault.removeprefix(f"{tmp_path}/car.yaml:") for fault in caught.value.messages]
    assert faults == [
        "5: doors is 0, but must be greater than or equal to 2.",
        "6: engine is given twice, in lines 2 and 6; keep one.",
        "6: unknown setting 'engine.powr'; did you mean engine.power?",
        "7: unknown setting 'spare'; known here: name, doors, engine.",
    ]
    assert str(caught.value) == " ".join(caught.value.messages)
    assert values.source.line("spare.0.doors") == 8
    assert values.source.line("engine.power.unit") == 3, "of the group that it is in"


def test_faults_of_a_file_come_before_those_of_what_is_laid_on_top(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"car\.yaml:2: doors is 0"):
        build_with_overrides(Car, read(tmp_path, "name: a\ndoors: 0\n"), ["doors=3"])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E5", 1e5),
        ("-2e+1", -20.0),
        ("1_0e1", 100.0),
        ("e3", "e3"),
        ("1e", "1e"),
        ("'1e3'", "1e3"),
    ],
)
def test_powers_of_ten_are_numbers_in_a_file(tmp_path: Path, text: str, value: object) -> None:
    actual = read(tmp_path, f"a: {text}\n")["a"]
    assert (actual, type(actual)) == (value, type(value))


@pytest.mark.parametrize(
    "text",
    ["a: !!int x", "a: !!bool x", "a: !!timestamp x", "[" * 5000, "a: 1\n---\nb: 2", "a: *b"],
)
def test_a_file_that_yaml_stumbles_over_is_refused_in_one_sentence(
    tmp_path: Path, text: str
) -> None:
    with pytest.raises(ConfigError, match=r"car\.yaml(:\d+)? is not valid YAML: ") as caught:
        read(tmp_path, text)
    assert len(caught.value.messages) == 1


def test_what_one_setting_refuses_is_told_whatever_the_others_are() -> None:
    assert (
        rejection_reason(Car, "engine.power", 501)
        == "engine.power is 501, but must be less than or equal to 500."
    )
    assert rejection_reason(Car, "engine.power", 499) is None
    assert rejection_reason(Car, "name", 3) == "name is 3, but must be a valid string."


def test_errors_reach_another_process_whole() -> None:
    error = pickle.loads(
        pickle.dumps(ConfigError("One is bad.", "Two is worse.", keys=["one", "two"]))
    )
    assert error.messages == ("One is bad.", "Two is worse.")
    assert error.keys == ("one", "two")
    assert str(error) == "One is bad. Two is worse."
