"""Write tables as CSV text in which no cell runs as a formula of a spreadsheet."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

# Spreadsheets take a cell that begins so for a formula; names of files and patients may.
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")  # noqa: RUF001
MARK = "'"  # spreadsheets show what follows as text


def csv_text(columns: Iterable[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table as CSV text.

    Text that a spreadsheet would take for a formula gets `MARK` in front, and so does text that
    begins with `MARK`, so that `unescape` restores both. Numbers stay as they are; None and NaN
    are empty cells.

    >>> csv_text(["id", "dsc"], [("=1+1", -0.5), ("a", None)])
    "id,dsc\\r\\n'=1+1,-0.5\\r\\na,\\r\\n"
    """
    text = io.StringIO(newline="")
    table = csv.writer(text)
    table.writerow([escape(name) for name in columns])
    for row in rows:
        table.writerow([_cell(value) for value in row])
    return text.getvalue()


def escape(text: str) -> str:
    """Put `MARK` before a text that a spreadsheet would run, or that begins with `MARK`."""
    return MARK + text if text.startswith((*FORMULA_STARTS, MARK)) else text


def unescape(text: str) -> str:
    """Return the text that `escape` was given.

    >>> [unescape(escape(text)) for text in ("=A1", "'quoted'", "'=A1", "plain")]
    ['=A1', "'quoted'", "'=A1", 'plain']
    """
    is_escaped = text.startswith(MARK) and text[1:].startswith((*FORMULA_STARTS, MARK))
    return text[1:] if is_escaped else text


def _cell(value: Any) -> Any:
    if isinstance(value, str):
        return escape(value)
    is_nan = isinstance(value, float) and value != value
    return None if is_nan else value
