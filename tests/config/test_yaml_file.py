"""Settings files that are too large, expand without end, or hold values that are none."""

from __future__ import annotations

from pathlib import Path

import pytest

from amlp_ray.config.overrides import parse_overrides
from amlp_ray.config.yaml_file import MAX_BYTES, parse_yaml, read_yaml
from amlp_ray.errors import ConfigError


def nested_aliases(depth: int) -> str:
    """Write a file of few bytes that stands for 10 to the power of `depth` values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    for level in range(1, depth):
        items = ", ".join([f"*a{level - 1}"] * 10)
        lines.append(f"a{level}: &a{level} [{items}]")
    return "\n".join(lines)


def test_aliases_that_stand_for_billions_of_values_are_refused_at_once(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(nested_aliases(12))
    # Expanded, they would take hours, and the test its time-out.
    with pytest.raises(ConfigError, match="aliases stand for more than 100000 values"):
        read_yaml(file)


def test_an_alias_of_itself_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text("space: &here {inside: *here}\n")
    with pytest.raises(ConfigError, match="aliases stand for more than"):
        read_yaml(file)


def test_aliases_of_ordinary_files_are_written_out() -> None:
    assert parse_yaml(nested_aliases(3))["a2"] == [[["x"] * 10] * 10] * 10


def test_a_file_of_a_megabyte_is_no_settings_file(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text("#" * (MAX_BYTES + 1))
    with pytest.raises(ConfigError, match=f"holds {MAX_BYTES + 1} bytes"):
        read_yaml(file)


@pytest.mark.parametrize(
    "value",
    [
        "2001-99-99",
        "!!int x",
        "!!timestamp 5",
        "!!binary x",
        "!!python/object:os.system x",
        "{{}: 1}",
        "{<<: 5}",
        "[[[",
        "[" * 5000,
        nested_aliases(12),
    ],
)
def test_a_value_that_yaml_cannot_hold_is_one_sentence(value: str) -> None:
    with pytest.raises(ConfigError, match="the value cannot be read") as refusal:
        parse_overrides([f"seed={value}"])
    assert len(str(refusal.value)) < 250
