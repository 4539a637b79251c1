"""Describe what a check looks for: one finding each, whether it is there or not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd

Severity = Literal["leak", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("leak", "warning", "note")
MAX_EXAMPLES = 8


@dataclass(frozen=True)
class ImageRef:
    """An image of a dataset."""

    id: str
    split: str
    row: int
    """Position in its split."""
    other: bool = False
    """Whether it is in the dataset that this one is compared with."""


@dataclass(frozen=True)
class Example:
    """An image and what is special about it."""

    image: ImageRef
    value: str
    like: ImageRef | None = None
    """The image that it resembles, if it is a copy."""


@dataclass(frozen=True)
class Finding:
    """One check, and how often it found something."""

    key: str
    title: str
    severity: Severity
    meaning: str
    todo: str
    count: int = 0
    """How many have it."""
    of: int = 0
    """How many could have it."""
    what: str = "images"
    """What is counted."""
    examples: tuple[Example, ...] = ()
    gap: str | None = None
    """Why it was not checked."""

    def with_rows(
        self,
        table: pd.DataFrame,
        is_hit: np.ndarray | pd.Series,
        *,
        badness: np.ndarray | pd.Series | None = None,
        describe: Callable[[Any], str] = lambda row: "",
        of: int | None = None,
    ) -> Finding:
        """Add the rows of a table that have it.

        Args:
            table: a row per image.
            is_hit: (N,) bool, the rows that have it.
            badness: (N,), the worst rows become examples; None: examples are spread over all.
            describe: says what is special about a row.
            of: how many rows could have it; None: all.
        """
        rows = np.flatnonzero(np.asarray(is_hit, bool))
        if badness is None:
            chosen = spread(rows, MAX_EXAMPLES)
        else:
            worst_first = np.argsort(-np.asarray(badness, float)[rows], kind="stable")
            chosen = rows[worst_first[:MAX_EXAMPLES]]
        examples = []
        for position, row in zip(chosen, table.iloc[chosen].itertuples(), strict=True):
            examples.append(Example(image_ref(table, position), describe(row)))
        return self.with_count(len(rows), len(table) if of is None else of, examples)

    def with_count(
        self, count: int, of: int, examples: Sequence[Example] = (), **changes: Any
    ) -> Finding:
        """Add a count, examples, and other changed fields."""
        return replace(self, count=int(count), of=int(of), examples=tuple(examples), **changes)

    def with_gap(self, reason: str) -> Finding:
        """Say why it was not checked."""
        return replace(self, gap=reason)


def spread(rows: np.ndarray, count: int) -> np.ndarray:
    """Choose up to `count` of `rows`, evenly from first to last."""
    positions = np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)
    return rows[np.unique(positions)]


def image_ref(table: pd.DataFrame, position: int, *, other: bool = False) -> ImageRef:
    """Name the image at a position of a table; `other`: of the other dataset."""
    row = table.iloc[position]
    return ImageRef(str(row["id"]), str(row["split"]), int(row["row"]), other)
