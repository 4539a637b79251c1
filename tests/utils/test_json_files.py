"""JSON and JSON lines that are damaged, foreign or made to do harm."""

from __future__ import annotations

import json
import logging
import math
import os
from pathlib import Path

import pytest

from amlp_ray.utils import json_files
from amlp_ray.utils.json_files import (
    JsonError,
    parse_json,
    parse_json_mapping,
    read_json,
    read_json_lines,
    seal_json,
)

DEEP = "[" * 101 + "]" * 101
UNUSABLE = {
    "empty": (b"", "is empty"),
    "blank": (b" \n", "is empty"),
    "cut short": (b'{"a": 1', "is no valid JSON (Expecting ',' delimiter: line 1, column 8)"),
    "zeros": (bytes(40), "is no"),
    "Latin-1": ('{"a": "\xe4"}'.encode("latin-1"), "is no text in UTF-8 or UTF-16 (byte 7)"),
    "half of UTF-16": (b"\xff\xfe{", "is no text in UTF-8 or UTF-16 (byte 2)"),
    "deeper than the stack": (b"[" * 100_000, "nests more than 100 levels"),
    "deep": (DEEP.encode(), "nests more than 100 levels"),
    "deep keys": (b'{"a":' * 101 + b"1" + b"}" * 101, "nests more than 100 levels"),
    "key given twice": (b'{"a": 1, "b": {"c": 1, "c": 2}}', "gives the key 'c' twice"),
    "endless number": (b"1" * 5000, "has a number that cannot be read (Exceeds the limit"),
}


@pytest.mark.parametrize(("content", "problem"), UNUSABLE.values(), ids=UNUSABLE)
def test_what_is_wrong_with_json_is_a_phrase(content: bytes, problem: str) -> None:
    with pytest.raises(JsonError) as error:
        parse_json(content)
    message = str(error.value)
    assert message.startswith(problem), message
    assert "\n" not in message
    assert len(message) < 150


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_json_is_read_in_the_encodings_of_all_systems(encoding: str) -> None:
    values = {"id": "\xe4\u4e2d", "numbers": [1, 2.5, None, True]}
    text = json.dumps(values, ensure_ascii=False)
    assert parse_json(text.encode(encoding)) == values
    assert parse_json("\ufeff" + text) == values


def test_values_at_the_bounds_are_read() -> None:
    assert parse_json("[" * 100 + "]" * 100) is not None
    assert parse_json("9" * 4300) == int("9" * 4300)
    assert parse_json("[1e999, -Infinity]") == [math.inf, -math.inf]
    assert math.isnan(parse_json("NaN"))


def test_a_file_larger_than_the_bound_is_not_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_files, "MAX_BYTES", 5)
    assert parse_json("[1,2]") == [1, 2]
    with pytest.raises(JsonError, match="holds 6 bytes, but at most 5 are read"):
        parse_json("[1,2] ")


@pytest.mark.parametrize(
    ("content", "kind"), [("null", "null"), ("[1]", "a list"), ('"a"', "a str"), ("3", "a int")]
)
def test_json_of_another_type_is_no_mapping(content: str, kind: str) -> None:
    with pytest.raises(JsonError, match=f"must hold keys and values, not {kind}"):
        parse_json_mapping(content)


@pytest.mark.parametrize("content", ["", "{", "[1]", '"text"', b"\xff", DEEP], ids=str)
def test_own_json_that_is_damaged_is_taken_as_missing_with_a_warning(
    tmp_path: Path, content: str | bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "file.json"
    assert read_json(path) is None
    assert not caplog.messages
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    assert read_json(path) is None
    assert read_json(path) is None  # told once
    [message] = caplog.messages
    assert message.startswith(f"{path} ")
    assert message.endswith("; it is taken as missing.")
    path.write_text('{"a": 1}')
    assert read_json(path) == {"a": 1}


@pytest.mark.timeout(10)
def test_a_pipe_in_the_place_of_own_json_is_taken_as_missing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "score.json"
    os.mkfifo(path)
    assert read_json(path) is None
    assert read_json_lines(path) == []
    assert caplog.messages == [
        f"{path} cannot be read (it is a pipe, not a regular file) and is taken as missing."
    ]


BAD_LINES = {
    "no JSON": (b"{oops}", "is no valid JSON"),
    "a list": (b"[1]", "must hold keys and values, not a list"),
    "null": (b"null", "must hold keys and values, not null"),
    "no epoch": (b'{"loss": 1}', "has no epoch"),
    "an epoch that is text": (b'{"epoch": "2"}', "has epoch of type str instead of int"),
    "an epoch that is true": (b'{"epoch": true}', "has epoch of type bool instead of int"),
    "an epoch that is NaN": (b'{"epoch": NaN}', "has epoch of type float instead of int"),
    "no UTF-8": (b'{"epoch": 2, "a": "\xff"}', "is no text"),
    "deep": (b'{"epoch": 2, "a": ' + DEEP.encode() + b"}", "nests more than"),
    "too long": (b'{"epoch": 2, "a": "' + b"x" * 3000 + b'"}', "is longer than 1000 bytes"),
}


@pytest.mark.parametrize(("line", "problem"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_line_that_cannot_be_used_is_skipped_and_told_with_its_number(
    tmp_path: Path,
    line: bytes,
    problem: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(json_files, "MAX_LINE_BYTES", 1000)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"epoch": 1}\n' + line + b'\n\n{"epoch": 3}\n')
    with caplog.at_level(logging.WARNING):
        assert read_json_lines(path, {"epoch": int}) == [{"epoch": 1}, {"epoch": 3}]
        assert read_json_lines(path, {"epoch": int}) == [{"epoch": 1}, {"epoch": 3}]
    [message] = caplog.messages
    beginning = f"{path}: line 2 cannot be used and is skipped; line 2 {problem}"
    assert message.startswith(beginning)


def test_a_last_line_without_its_end_is_used_if_it_is_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "lines"
    path.write_text('{"a": 1}\n{"a": 2}')
    assert read_json_lines(path) == [{"a": 1}, {"a": 2}]
    path.write_text('{"a": 1}\n{"a": 2')
    assert read_json_lines(path) == [{"a": 1}]
    assert not caplog.messages


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_lines_that_a_tool_of_windows_wrote_are_read(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "lines"
    path.write_bytes('{"a": "\xe4"}\r\n{"a": 2}\r\n'.encode(encoding))
    assert read_json_lines(path) == [{"a": "\xe4"}, {"a": 2}]


def test_a_sealed_file_that_was_changed_is_taken_as_missing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "score.json"
    file.write_text(seal_json({"dsc": 0.41}))
    assert read_json(file) == {"dsc": 0.41}
    file.write_text(file.read_text().replace("0.41", "0.47"))
    assert read_json(file) is None
    assert "was changed after it was written" in caplog.text
