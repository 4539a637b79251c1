"""Tables of settings: nothing is missing, and what they say is what is checked."""

from __future__ import annotations

import re
from typing import Any, Literal

import pytest
from pydantic import Field

from amlp_ray.config import (
    VARIANTS,
    LossConfig,
    ModelConfig,
    PrepareConfig,
    PretrainConfig,
    RatioConfig,
    SegmentConfig,
    SelectionConfig,
    StudyConfig,
)
from amlp_ray.config.base import Config, build
from amlp_ray.config.overrides import flatten, nest
from amlp_ray.config.reference import (
    Setting,
    accepted,
    field_docstrings,
    format_value,
    sections,
    variants,
)
from amlp_ray.errors import ConfigError

MODELS = (PretrainConfig, StudyConfig, SegmentConfig, PrepareConfig)
# Whole groups win over the variant, so these are the defaults without one.
DEFAULTS = flatten(
    PretrainConfig(
        model=ModelConfig(),
        ratio=RatioConfig(),
        selection=SelectionConfig(),
        loss=LossConfig(),
    )
)


def rows(model: type[Config]) -> list[Setting]:
    return [setting for section in sections(model) for setting in section.settings]


PRETRAIN = {setting.name: setting for setting in rows(PretrainConfig)}
BOUNDED = [name for name, row in PRETRAIN.items() if re.match("integer|number", row.accepts)]


def fault(name: str, value: Any) -> str:
    """What is wrong with this one value, or nothing; a rule between settings is no fault of it."""
    try:
        build(PretrainConfig, nest({name: value}), "here")
    except ConfigError as error:
        return str(error) if f"{name} is " in str(error) else ""
    return ""


def test_every_setting_of_a_run_is_there_once_with_its_default() -> None:
    assert len(rows(PretrainConfig)) == len(PRETRAIN)
    assert {name: row.default for name, row in PRETRAIN.items()} == DEFAULTS


@pytest.mark.parametrize("name", BOUNDED)
def test_the_range_of_a_number_is_the_one_that_is_checked(name: str) -> None:
    text = PRETRAIN[name].accepts
    step = 1 if text.startswith("integer") else 1e-9
    words = re.sub(r"(\S+) to (\S+)", r"at least \1, at most \2", text)
    bounds = re.findall(r"(at least|above|at most|below) ([^\s,]+)", words)
    assert bounds, "every number of a run has a range"
    for word, number in bounds:
        limit: float = 2**63 if number == "2^63" else type(step)(number)
        inward = step if word in ("at least", "above") else -step
        ends = (
            (limit, limit - inward) if word in ("at least", "at most") else (limit + inward, limit)
        )
        assert not fault(name, ends[0])
        assert fault(name, ends[1])


@pytest.mark.parametrize(
    "name", [name for name in PRETRAIN if isinstance(PRETRAIN[name].default, str)]
)
def test_the_choices_of_a_setting_are_those_that_are_checked(name: str) -> None:
    for choice in PRETRAIN[name].accepts.split(", "):
        assert not fault(name, choice)
    assert fault(name, "nothing of the kind")


@pytest.mark.parametrize("model", MODELS)
def test_every_setting_has_a_description_in_the_source(model: type[Config]) -> None:
    assert [row.name for row in rows(model) if not row.description] == []


def test_a_heading_of_a_model_starts_a_section_at_its_field() -> None:
    selection = [section for section in sections(PretrainConfig) if section.group == "selection"]
    assert [section.about.partition(",")[0] for section in selection] == [
        "MPS: which patches are masked first (see method/patch_selection.py).",
        "Clusters",
        "Scores",
        "For all modes: a black border is no tissue.",
    ]
    assert [section.settings[0].name for section in selection] == [
        "selection.mode",
        "selection.features",
        "selection.score",
        "selection.background_filter",
    ]


class Wheel(Config):
    """A wheel.

    Second paragraph.
    """

    inches: int = Field(ge=10)
    """No smaller tyre
    is made."""
    color: Literal["black", 3] | None = None

    @property
    def size(self) -> int:
        """A string that is no description of a field."""
        return self.inches


class SpareWheel(Wheel):
    """A wheel that is carried along."""

    inches: int = Field(16, ge=10)
    """Smaller than the others."""
    flat: bool = False
    """Whether it is needed itself."""


class Shaft(Config):
    """A shaft."""

    long: bool = True


class Cart(Config):
    """A cart."""

    wheels: dict[str, Wheel] = Field(default_factory=dict)
    shaft: Shaft = Shaft()
    tags: tuple[str, ...] = ("a",)
    name: str = Field("#", pattern="^#$")


def test_a_description_is_the_string_below_a_field_in_one_line() -> None:
    assert field_docstrings(Wheel) == {"inches": "No smaller tyre is made."}


def test_descriptions_are_inherited_and_overridden_with_their_fields() -> None:
    assert field_docstrings(SpareWheel) == {
        "inches": "Smaller than the others.",
        "flat": "Whether it is needed itself.",
    }


def test_models_in_models_and_in_mappings_are_followed() -> None:
    cart_sections = sections(Cart)
    assert [(section.group, section.about) for section in cart_sections] == [
        ("", "A cart."),
        ("wheels.<name>", "A wheel."),
        ("shaft", "A shaft."),
    ]
    inches, color = cart_sections[1].settings
    assert inches == Setting(
        "wheels.<name>.inches", "integer at least 10", None, True, "No smaller tyre is made."
    )
    assert (color.accepts, color.default, color.required) == ("black, 3 or null", None, False)
    assert {row.name: row.default for row in cart_sections[0].settings} == {
        "wheels": {},
        "tags": ("a",),
        "name": "#",
    }


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "boolean"}, "true, false"),
        ({"type": "number"}, "number"),
        ({"type": "integer", "minimum": 2, "maximum": 64}, "integer 2 to 64"),
        (
            {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
            "number above 0, below 1",
        ),
        (
            {"type": "integer", "minimum": 0, "exclusiveMaximum": 2**63},
            "integer at least 0, below 2^63",
        ),
        ({"type": "array", "prefixItems": [{"type": "number"}] * 2}, "[number, number]"),
        (
            {"type": "array", "items": {"enum": ["a", 1, True]}, "minItems": 1},
            "list of a, 1, true, not empty",
        ),
        ({"type": "string", "pattern": "^a$"}, "text like ^a$"),
        (
            {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "null"}]},
            "integer at least 1 or null",
        ),
    ],
)
def test_accepted_values_are_described_in_words(schema: dict[str, Any], words: str) -> None:
    assert accepted(schema) == words


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "true"),
        (None, "null"),
        (0.001, "0.001"),
        ("amlp", "amlp"),
        ("", '""'),
        ((1, 2), "[1, 2]"),
    ],
)
def test_values_are_shown_as_a_settings_file_has_them(value: Any, text: str) -> None:
    assert format_value(value) == text


def test_every_variant_is_listed_with_what_it_sets_and_what_it_is() -> None:
    rows = variants()
    assert [variant["variant"] for variant in rows] == list(VARIANTS)
    for variant in rows:
        assert variant["about"]
        resolved = flatten(PretrainConfig(variant=variant["variant"]))
        assert resolved == {**DEFAULTS, "variant": variant["variant"], **variant["sets"]}
