"""Why a run of a study ends."""

from __future__ import annotations

from enum import StrEnum


class StopReason(StrEnum):
    """Why a run of a study ends, and what happens to the trials that run then.

    The values of PAUSE, STOP and CANCEL are those of the requests in the study's storage.
    """

    # Nothing is left to run.
    DONE = "done"
    # A budget other than the number of trials is used. Trials return after their next rung and
    # are stored as PRUNED.
    BUDGET = "budget"
    # Somebody asked for a pause. Trials return after their epoch, stay RUNNING, and are resumed.
    PAUSE = "pause"
    # Somebody asked for no more trials. Trials finish.
    STOP = "stop"
    # Somebody cancelled the study. Trials of the search are stored as FAIL at once. Baselines and
    # confirmation runs, which nothing replaces, stay RUNNING and are resumed.
    CANCEL = "cancel"
    # The first trials failed with the same reason. Others return after their epoch and are stored.
    IDENTICAL_FAILURES = "identical_failures"
    # The lease or the storage is lost. Trials return after their epoch, and nothing more is stored.
    LEASE_LOST = "lease_lost"
    # No trial found resources in time. Trials stay RUNNING and are resumed.
    NO_RESOURCES = "no_resources"


# After these, a trial that has not run to its end is resumed later.
RESUMABLE = frozenset({StopReason.PAUSE, StopReason.LEASE_LOST, StopReason.NO_RESOURCES})
# Another reason than a cancellation or a lost lease does not replace these.
FINAL = frozenset({StopReason.CANCEL, StopReason.IDENTICAL_FAILURES})
