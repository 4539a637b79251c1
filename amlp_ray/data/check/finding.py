"""What a check says: one finding for each thing it looks for, whether it is there or not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd

Severity = Literal["leak", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("leak", "warning", "note")
EXAMPLES = 8


@dataclass(frozen=True)
class Shown:
    """An image to look at."""

    id: str
    split: str
    row: int  # in its split
    other: bool = False  # it is in the dataset that this one is compared with


@dataclass(frozen=True)
class Example:
    """An image with what is special about it; for copies, the image that it resembles."""

    image: Shown
    value: str
    like: Shown | None = None


@dataclass(frozen=True)
class Finding:
    """One thing that was looked for.

    `count` of `of` images (or groups, see `what`) have it; 0: it is not there. `gap` says why it was not looked for.
    """

    key: str
    title: str
    severity: Severity
    meaning: str
    todo: str
    count: int = 0
    of: int = 0
    what: str = "images"
    examples: tuple[Example, ...] = field(default=())
    gap: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """The finding in plain values, for JSON."""
        return asdict(self)


def found(
    about: Finding,
    table: pd.DataFrame,
    hit: np.ndarray | pd.Series,
    *,
    badness: np.ndarray | pd.Series | None = None,
    value: Callable[[Any], str] = lambda row: "",
    of: int | None = None,
) -> Finding:
    """Complete `about` with the rows of `table` that are `hit`, (N,) bool.

    Args:
        badness: (N,), the worst are the examples; None: examples are spread over all that are hit.
        value: what to say of an example, from its row.
        of: how many rows could have been hit; None: all.
    """
    rows = np.flatnonzero(np.asarray(hit, bool))
    if badness is None:
        chosen = rows[
            np.unique(np.linspace(0, len(rows) - 1, min(EXAMPLES, len(rows))).astype(int))
        ]
    else:
        chosen = rows[np.argsort(-np.asarray(badness, float)[rows], kind="stable")[:EXAMPLES]]
    examples = tuple(Example(shown(row), value(row)) for row in table.iloc[chosen].itertuples())
    return _with(about, len(rows), len(table) if of is None else of, examples)


def counted(
    about: Finding, count: int, of: int, examples: Sequence[Example] = (), **changed: Any
) -> Finding:
    """Complete `about` with what was counted, and with other `changed` fields."""
    return _with(about, count, of, tuple(examples), **changed)


def shown(row: Any, *, other: bool = False) -> Shown:
    """Name the image of a row of a table, as `itertuples` yields them."""
    return Shown(str(row.id), str(row.split), int(row.row), other)


def _with(
    about: Finding, count: int, of: int, examples: tuple[Example, ...], **changed: Any
) -> Finding:
    values = {name: getattr(about, name) for name in about.__dataclass_fields__}
    return Finding(
        **{**values, "count": int(count), "of": int(of), "examples": examples, **changed}
    )
