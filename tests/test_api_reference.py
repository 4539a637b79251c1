"""docs/api.md is what `make docs` writes from the docstrings of today."""

from __future__ import annotations

import runpy
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def test_the_reference_of_the_python_api_is_up_to_date() -> None:
    page = runpy.run_path(str(DOCS / "api.py"))["page"]
    assert (DOCS / "api.md").read_text() == page(), "run `make docs`"
