"""The HTML report of a study: one file that needs no network and no server."""

from __future__ import annotations

from pathlib import Path

from amlp_ray.study.report.importance import Importance, importance
from amlp_ray.study.storage.budget import counts_in_budget
from amlp_ray.study.storage.study_store import StudyStore

__all__ = ["Importance", "confirmation_in_words", "importances", "write_report"]


def importances(store: StudyStore) -> dict[str, Importance]:
    """By objective, how much of the difference between the best trials and the rest each parameter explains."""
    own = [trial for trial in store.search().get_trials(deepcopy=False) if counts_in_budget(trial)]
    return importance(own, store.config().objectives)


def confirmation_in_words(store: StudyStore) -> list[str]:
    """What the confirmation shows, a sentence each; empty where there is none."""
    from amlp_ray.study.confirmation.results import confirmation_of
    from amlp_ray.study.report.confirmation import in_words

    found = confirmation_of(store)
    return [] if found is None else in_words(found)


def write_report(store: StudyStore) -> Path:
    """Write `<study>/report.html` from what the store holds now, and return its path.

    Works at any time: before the first trial, while trials run, and where files of trials are missing. A reader never
    sees half a file, since the new one takes the place of the old one in one step.

    Raises:
        ConfigError: where `study.yaml` is missing or not valid.
    """
    from amlp_ray.study.report.html import write  # plotly, jinja2 and scipy take a second to import

    return write(store)
