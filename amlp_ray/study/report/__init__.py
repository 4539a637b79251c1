"""The HTML report of a study: one file that needs no network and no server."""

from __future__ import annotations

from pathlib import Path

from amlp_ray.study.store import StudyStore

__all__ = ["write_report"]


def write_report(store: StudyStore) -> Path:
    """Write `<study>/report.html` from what the store holds now, and return its path.

    Works at any time: before the first trial, while trials run, and where files of trials are missing. A reader never
    sees half a file, since the new one takes the place of the old one in one step.

    Raises:
        SettingsError: where `study.yaml` is missing or not valid.
    """
    from amlp_ray.study.report._page import write  # plotly, jinja2 and scipy take a second to import

    return write(store)
