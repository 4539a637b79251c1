"""Word sentences that hold numbers."""

from __future__ import annotations


def counted(count: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun, in the singular for one; `plural` is the noun with s.

    >>> counted(1, "volume"), counted(0, "volume"), counted(2, "copy", "copies")
    ('1 volume', '0 volumes', '2 copies')
    """
    return f"{count} {noun if count == 1 else plural or f'{noun}s'}"
