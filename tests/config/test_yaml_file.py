"""Settings files that are too large, expand without end, or hold values that are none."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from amlp_ray.config import PretrainConfig
from amlp_ray.config.base import build
from amlp_ray.config.overrides import build_with_overrides, parse_overrides
from amlp_ray.config.yaml_file import (
    MAX_BYTES,
    parse_yaml,
    read_record,
    read_yaml,
    write_record,
)
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


LOOK_ALIKES = {
    "010": 10,
    "1_000": 1000,
    "0x10": 16,
    "1e3": 1000,
    "0": 0,
}


@pytest.mark.parametrize(("text", "number"), LOOK_ALIKES.items())
def test_a_number_is_what_it_looks_like(text: str, number: int) -> None:
    assert build_with_overrides(PretrainConfig, {}, [f"seed={text}"]).seed == number


NO_NUMBERS = ["2001-99-99", "2024-05-01", "1:30", "12:30:45", "0o8", "08x", ".inf", ".nan", "~"]


@pytest.mark.parametrize("text", NO_NUMBERS)
@pytest.mark.parametrize("name", ["seed", "ratio.start", "model", "data"])
def test_a_value_of_another_type_is_one_sentence_about_its_setting(name: str, text: str) -> None:
    with pytest.raises(ConfigError, match=rf"^--set: {name} is ") as refusal:
        build_with_overrides(PretrainConfig, {}, [f"{name}={text}"])
    assert len(refusal.value.messages) == 1
    assert "datetime" not in str(refusal.value)


@pytest.mark.parametrize("key", ["no.such.group", "2001-12-14t21:59:43.10", "a.b", ".", "ratio."])
def test_an_unknown_key_with_dots_is_one_sentence(tmp_path: Path, key: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"'{key}': 1\n")
    with pytest.raises(ConfigError, match=rf"config\.yaml:1: unknown setting '{re.escape(key)}'"):
        build(PretrainConfig, read_yaml(file), "file")


def test_a_date_is_a_name(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text("name: 2024-05-01\n")
    assert read_yaml(file) == {"name": "2024-05-01"}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_files_of_windows_are_read(tmp_path: Path, encoding: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_bytes("weights: \xe4.pth\r\n".encode(encoding))
    assert read_yaml(file) == {"weights": "\xe4.pth"}
    file.write_bytes("weights: \xe4.pth\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"is not text in UTF-8 or UTF-16 \(byte 9\); save it"):
        read_yaml(file)


def test_a_record_that_was_changed_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "config.yaml"
    config = PretrainConfig(epochs=7, weights="/\xe4.pth")
    write_record(config, file)
    assert read_record(PretrainConfig, file) == config
    assert read_yaml(file)["epochs"] == 7  # as a file of settings for another run
    content = file.read_text(encoding="utf-8")
    for changed in (content.replace("epochs: 7", "epochs: 9"), content.replace("epochs", "epocks")):
        file.write_text(changed, encoding="utf-8")
        with pytest.raises(ConfigError, match="was changed after it was written"):
            read_record(PretrainConfig, file)
    assert not caplog.messages
    file.write_text("epochs: 9\n")
    assert read_record(PretrainConfig, file).epochs == 9
    assert caplog.messages == [f"{file} has no digest, so it is not known whether it was changed."]
