"""The HTML report of a study: one file that needs no network and no server."""

from __future__ import annotations

from pathlib import Path

from amlp_ray.study.report.importance import Importance, importance
from amlp_ray.study.storage.study_store import StudyStore
from amlp_ray.study.storage.trial_record import trial_records
from amlp_ray.utils.files import local_path

__all__ = ["Importance", "confirmation_in_words", "importances", "write_report"]


def importances(store: StudyStore) -> dict[str, Importance]:
    """Work out by objective how much each parameter explains of the best trials' lead."""
    trials = [record.frozen for record in trial_records(store.search()) if record.counts_in_budget]
    return importance(trials, store.config().objectives)


def confirmation_in_words(store: StudyStore) -> list[str]:
    """Say what the confirmation shows, a sentence each; empty where there is none."""
    from amlp_ray.study.confirmation.results import read_confirmation
    from amlp_ray.study.report.confirmation import confirmation_sentences

    confirmation = read_confirmation(store)
    return [] if confirmation is None else confirmation_sentences(confirmation)


def write_report(store: StudyStore, out: str | Path | None = None) -> Path:
    """Write a report from what the store holds now, and return its path.

    Works at any time: before the first trial, while trials run, and where files of trials are
    missing. The new file replaces the old one in one step, so that a reader never sees half a file.

    Args:
        out: the file; by default `report.html` in the study's folder, which may be read-only.

    Raises:
        ConfigError: `study.yaml` is missing or not valid.
    """
    # plotly, jinja2 and scipy take a second to import.
    from amlp_ray.study.report.html import write

    return write(store, local_path(out) if out else store.folder / "report.html")
