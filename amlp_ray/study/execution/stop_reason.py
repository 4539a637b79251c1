"""Why a run of a study ends."""

from __future__ import annotations

from enum import StrEnum


class StopReason(StrEnum):
    """Why a run of a study ends, and what happens to the trials that run then.

    The values of PAUSE, STOP and CANCEL are those of the requests in the study's storage.
    """

    DONE = "done"
    """Nothing is left to run."""
    BUDGET = "budget"
    """A budget other than the number of trials is used. Trials return after their next rung and are
    stored as PRUNED."""
    PAUSE = "pause"
    """Somebody asked for a pause. Trials return after their epoch, stay RUNNING, and are
    resumed."""
    STOP = "stop"
    """Somebody asked for no more trials. Trials finish."""
    CANCEL = "cancel"
    """Somebody canceled the study. Trials of the search are stored as FAIL at once. Baselines and
    confirmation runs, which nothing replaces, stay RUNNING and are resumed."""
    IDENTICAL_FAILURES = "identical_failures"
    """The first trials failed with the same reason. Others return after their epoch and are
    stored."""
    LEASE_LOST = "lease_lost"
    """The lease, the storage or the Ray cluster is lost. Trials return after their epoch, and
    nothing more is stored."""
    NO_RESOURCES = "no_resources"
    """No trial found resources in time. Trials stay RUNNING and are resumed."""
    NO_STORAGE = "no_storage"
    """Trials could not write their folders for too long. They stay RUNNING and are resumed."""


# After these, a trial that has not run to its end is resumed later.
RESUMABLE = frozenset(
    {
        StopReason.PAUSE,
        StopReason.LEASE_LOST,
        StopReason.NO_RESOURCES,
        StopReason.NO_STORAGE,
    }
)
# Another reason than a cancellation or a lost lease does not replace these.
FINAL = frozenset({StopReason.CANCEL, StopReason.IDENTICAL_FAILURES})
