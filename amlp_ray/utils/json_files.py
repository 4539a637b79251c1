"""Read JSON and JSON lines that may be damaged, foreign or made to do harm.

All JSON of the package is read here, so that every file is bounded in size and depth, and that what
is wrong with one is a phrase for a sentence. NaN and infinity are read as Python writes them:
whoever uses a number checks it.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from amlp_ray.utils.files import open_regular
from amlp_ray.utils.text import UTF16_MARKS

# The annotations of LVIS, the largest in public, have 1.1 GB.
MAX_BYTES = 4 << 30
MAX_LINE_BYTES = 64 << 20
# COCO files nest 5 levels, our own 8. Deeper ones would exhaust the stack of whoever walks them.
MAX_DEPTH = 100

MAX_TORN_BYTES = 65536  # of a last line without its end that a writer may have left
DIGEST = "sha256"  # key of the digest in sealed JSON

logger = logging.getLogger(__name__)


class JsonError(ValueError):
    """A file is no usable JSON. The message continues a sentence that begins with its name."""


class JsonLine(NamedTuple):
    """A line of a file of JSON lines."""

    number: int  # from 1
    value: dict[str, Any]  # empty if there is a problem
    problem: str  # why the line cannot be used, as in `JsonError`; empty if it can


def parse_json(content: bytes | str) -> Any:
    """Parse a JSON text in UTF-8, UTF-16 or UTF-32, with or without a byte-order mark.

    Raises:
        JsonError: it is no JSON, too large, too deep, or gives a key twice.

    >>> parse_json(b'{"epochs": 5}')
    {'epochs': 5}
    >>> parse_json('{"epochs": 5, "epochs": 7}')
    Traceback (most recent call last):
    amlp_ray.utils.json_files.JsonError: gives the key 'epochs' twice
    """
    if len(content) > MAX_BYTES:
        raise JsonError(f"holds {len(content)} bytes, but at most {MAX_BYTES} are read")
    if not content.strip():
        raise JsonError("is empty")
    if isinstance(content, str):
        content = content.removeprefix("\ufeff")
    try:
        # Bytes tell their encoding: tools of Windows write marks, or UTF-16.
        value = json.loads(content, object_pairs_hook=_mapping)
    except JsonError:
        raise
    except json.JSONDecodeError as error:
        position = f"line {error.lineno}, column {error.colno}"
        raise JsonError(f"is no valid JSON ({error.msg}: {position})") from None
    except UnicodeDecodeError as error:
        raise JsonError(f"is no text in UTF-8 or UTF-16 (byte {error.start})") from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:  # an integer of thousands of digits
        raise JsonError(f"has a number that cannot be read ({str(error).split(';')[0]})") from None
    _check_depth(value)
    return value


def parse_json_mapping(content: bytes | str) -> dict[str, Any]:
    """Parse a JSON text that must hold keys and values.

    Raises:
        JsonError: it holds something else; see `parse_json`.
    """
    value = parse_json(content)
    if not isinstance(value, dict):
        kind = "null" if value is None else f"a {type(value).__name__}"
        raise JsonError(f"must hold keys and values, not {kind}")
    return value


def seal_json(values: Mapping[str, Any]) -> str:
    """Return values as a JSON text with a digest of themselves, which `unseal` verifies."""
    plain = json.loads(json.dumps(values))
    return json.dumps({**plain, DIGEST: _digest(plain)}, indent=1) + "\n"


def unseal(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of `seal_json` without their digest.

    Raises:
        JsonError: they are not those that were written.

    >>> unseal(parse_json(seal_json({"rows": 5})))
    {'rows': 5}
    """
    if DIGEST not in values:
        raise JsonError("has no digest of itself: it was changed, or an older version wrote it")
    plain = {key: value for key, value in values.items() if key != DIGEST}
    if values.get(DIGEST) != _digest(plain):
        raise JsonError("was changed after it was written: its digest does not fit")
    return plain


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON mapping that the package wrote; return None if there is none.

    One that cannot be used, or that was changed after it was sealed, is taken as missing, with a
    warning.
    """
    try:
        with open_regular(path) as file:
            values = parse_json_mapping(file.read(MAX_BYTES + 1))
        return unseal(values) if DIGEST in values else values
    except FileNotFoundError:
        return None
    except OSError as error:
        _warn_once(f"{path} cannot be read ({error.strerror or error}) and is taken as missing.")
    except JsonError as error:
        _warn_once(f"{path} {error}; it is taken as missing.")
    return None


def read_json_lines(path: Path, fields: Mapping[str, type] | None = None) -> list[dict[str, Any]]:
    """Read the mappings in a file of JSON lines that the package wrote; [] if there is none.

    Lines that cannot be used are skipped, with a warning. There is none for a last line without
    its end: it is being written, or a kill cut it short.

    Args:
        path: of the file.
        fields: keys that every line must have, with the types of their values.

    Raises:
        OSError: the file cannot be read.
    """
    values = []
    skipped = []
    for line in iter_json_lines(path, fields):
        if line.problem:
            skipped.append(line)
        else:
            values.append(line.value)
    if skipped:
        numbers = ", ".join(str(line.number) for line in skipped[:10])
        more = f" and {len(skipped) - 10} more" if len(skipped) > 10 else ""
        noun = "line" if len(skipped) == 1 else "lines"
        _warn_once(
            f"{path}: {noun} {numbers}{more} cannot be used and "
            f"{'is' if len(skipped) == 1 else 'are'} skipped; line {skipped[0].number} "
            f"{skipped[0].problem}."
        )
    return values


def iter_json_lines(path: Path, fields: Mapping[str, type] | None = None) -> Iterator[JsonLine]:
    """Yield the lines of a file of JSON lines, without blank ones; see `read_json_lines`.

    Raises:
        OSError: the file cannot be read.
    """
    if not path.is_file():
        return
    for number, raw in _raw_lines(path):
        try:
            if len(raw) > MAX_LINE_BYTES:
                raise JsonError(f"is longer than {MAX_LINE_BYTES} bytes")
            value = parse_json_mapping(raw)
            _check_fields(value, fields or {})
        except JsonError as error:
            if raw.endswith(b"\n") or len(raw) > MAX_TORN_BYTES:
                yield JsonLine(number, {}, str(error))
        else:
            yield JsonLine(number, value, "")


def _raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the number and bytes of each line that is not blank, too long ones cut short."""
    with open_regular(path) as opened:
        mark = opened.read(2)
        opened.seek(0)
        file = opened
        if mark in UTF16_MARKS:
            text = opened.read(MAX_BYTES).decode("utf-16", errors="replace")
            file = io.BytesIO(text.encode())
        number = 0
        while raw := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            rest = raw
            while rest and not rest.endswith(b"\n"):
                rest = file.readline(MAX_LINE_BYTES)
            if rest is not raw:
                raw += rest[-1:]
            if raw.strip():
                yield number, raw


def _check_fields(value: Mapping[str, Any], fields: Mapping[str, type]) -> None:
    for name, kind in fields.items():
        if name not in value:
            raise JsonError(f"has no {name}")
        if type(value[name]) is not kind:
            raise JsonError(
                f"has {name} of type {type(value[name]).__name__} instead of {kind.__name__}"
            )


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise JsonError(f"gives the key {counts.most_common(1)[0][0]!r} twice")
    return mapping


def _check_depth(value: Any) -> None:
    """Raise JsonError if values are nested too deep; no recursion, which would fail for them."""
    level = [value]
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for container in level:
            if isinstance(container, dict):
                inner += [item for item in container.values() if isinstance(item, dict | list)]
            elif isinstance(container, list):
                inner += [item for item in container if isinstance(item, dict | list)]
        if not inner:
            return
        level = inner
    raise _too_deep()


def _too_deep() -> JsonError:
    return JsonError(f"nests more than {MAX_DEPTH} levels of lists and keys")


@cache  # files are read again and again while a study is watched
def _warn_once(message: str) -> None:
    logger.warning(message)
