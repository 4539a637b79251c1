"""Read ids and numbers of JSON files, which tools write as numbers, as text, or as floats."""

from __future__ import annotations

import re
from typing import Any

WHOLE = re.compile(r"\s*0*(\d+)(\.0*)?\s*")


def id_key(value: Any) -> str | None:
    """Return an id as text that is equal for 1, "1" and 1.0; None if it is no text or number.

    >>> id_key(7), id_key(7.0), id_key(" 007"), id_key("a7"), id_key(True)
    ('7', '7', '7', 'a7', None)
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    text = str(value)
    whole = WHOLE.fullmatch(text)
    return whole[1] if whole else text.strip() or None


def whole_number(value: Any) -> int | None:
    """Return a size that may be written as text or float; None if it is no whole number."""
    whole = WHOLE.fullmatch(str(value))
    return int(whole[1]) if whole else None
