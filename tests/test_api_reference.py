"""docs/api.md is what `make docs` writes from the docstrings of today."""

from __future__ import annotations

import runpy
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def test_the_reference_of_the_python_api_is_up_to_date() -> None:
    page = runpy.run_path(str(DOCS / "api.py"))["page"]
    assert (DOCS / "api.md").read_text() == page(), "run `make docs`"


def test_results_of_functions_are_described_field_by_field() -> None:
    text = (DOCS / "api.md").read_text()
    results = text.partition("## Result types\n")[2].partition("## Configs\n")[0]
    for name in ("Plan", "Predictions", "Imported", "Migration", "Report", "Split"):
        assert f"### `{name}`\n" in results
    assert "- `rungs: tuple[int, ...]`: Epochs at which a trial is scored.\n" in results
    assert "- `out: str`: Folder of the masks.\n" in results
    assert "**Attributes**\n\n- `config`: settings of the study.\n" in text
