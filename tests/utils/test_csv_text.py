"""CSV text holds no formulas, and says the same when it is read back."""

from __future__ import annotations

import csv
import io
import math
from typing import Any

import pytest

from amlp_ray.utils.csv_text import csv_text, escape, unescape


@pytest.mark.parametrize(
    "text",
    ["=cmd|'/C calc'!A0", "+1+1", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "\uff1d1", "=", "-"],
)
def test_text_that_a_spreadsheet_would_run_is_marked(text: str) -> None:
    ((heading,), (cell,)) = csv.reader(io.StringIO(csv_text([text], [[text]]), newline=""))
    assert (heading, cell) == (f"'{text}", f"'{text}")
    assert unescape(cell) == text


@pytest.mark.parametrize("text", ["", "'", "''", "'=1", "a=b", "1-2", "P-007", " =1", "it's"])
def test_every_text_comes_back(text: str) -> None:
    assert unescape(escape(text)) == text


@pytest.mark.parametrize(
    ("value", "cell"),
    [(-0.5, "-0.5"), (-3, "-3"), (1e-9, "1e-09"), (True, "True"), (None, ""), (math.nan, "")],
)
def test_numbers_stay_numbers(value: Any, cell: str) -> None:
    assert csv_text(["a", "b"], [[value, "x"]]) == f"a,b\r\n{cell},x\r\n"
