"""Run or confirm a study from its lock to its end: check, record, start Ray, run the trials."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from amlp_ray.config import StudyConfig
from amlp_ray.config.yaml_file import write_yaml
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.errors import InterruptedStudyError, StudyError
from amlp_ray.runtime.resources import cluster_resources, jobs_side_by_side, machine_resources
from amlp_ray.runtime.session import ray_session
from amlp_ray.study.confirmation.confirm import confirmation_notes, find_test_unlock, open_test
from amlp_ray.study.execution.driver import INTERRUPTED, run_on_tune
from amlp_ray.study.execution.plan import check_study
from amlp_ray.study.execution.preflight import (
    check_unchanged,
    log_pruning_notes,
    record_environment,
    with_budget,
)
from amlp_ray.study.execution.stop_reason import StopReason
from amlp_ray.study.execution.study_log import log_events
from amlp_ray.study.execution.trial_queue import Phase
from amlp_ray.study.storage.lease import Lease
from amlp_ray.study.storage.study_store import StudyStore

# Other reasons to stop raise an error.
END_MESSAGES = {
    StopReason.DONE: "study {name} is done",
    StopReason.BUDGET: (
        "study {name} has used its budget; `amlp-ray study extend {name}` gives it more"
    ),
    StopReason.PAUSE: "study {name} is paused; `amlp-ray study resume {name}` resumes it",
    StopReason.STOP: "study {name} is stopped; `amlp-ray study resume {name}` resumes it",
    StopReason.CANCEL: (
        "study {name} is cancelled; `amlp-ray study resume {name}` resumes it without the trials "
        "that ran"
    ),
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StudyInputs:
    """What a study runs with."""

    config: StudyConfig
    store: StudyStore
    dataset: PatchDataset  # trials pretrain on it
    eval_data: PatchDataset | None  # scores them; None if `dataset` does
    address: str | None  # of a Ray cluster; None starts Ray on this machine


def run_study(inputs: StudyInputs, phase: Phase = "search") -> tuple[StudyConfig, StopReason]:
    """Run the trials of a study until none is left or somebody stops it.

    Returns:
        The settings, whose budget may have been extended, and why it ended.

    Raises:
        StudyError: another process runs this study, or it was begun with other settings.
        ResourceError: no node can hold a trial, or no resources came free.
        FailedStudyError: the first trials failed for the same reason.
        InterruptedStudyError: Ctrl-C or SIGTERM.
        StorageError, ClusterLostError: the trials' disk or the cluster is lost for too long.
    """
    try:
        return _run_locked(inputs, phase)
    except KeyboardInterrupt:  # before or after the trials; while they run Tune is interrupted
        raise InterruptedStudyError(INTERRUPTED.format(name=inputs.config.name)) from None


def _run_locked(inputs: StudyInputs, phase: Phase) -> tuple[StudyConfig, StopReason]:
    """Check and record a study, take its lock, and run its trials."""
    config, store = inputs.config, inputs.store
    _check(inputs)
    with store.transaction(config):
        pass  # the study is there from now on
    store.storage(retry_seconds=config.fault_tolerance.storage_minutes * 60)
    with log_events(store.folder), store.lock(counted=phase == "search") as lease:
        with store.transaction():
            # Another process may have run or extended it until the lock was free.
            check_unchanged(config, store, inputs.dataset, inputs.eval_data)
            config = with_budget(config, store)
            write_yaml(config, store.folder / "study.yaml")
        reason = _run_trials(inputs, config, lease, phase)
    return config, reason


def confirm_study(inputs: StudyInputs) -> tuple[StudyConfig, StopReason]:
    """Repeat the best trials and all baselines, then open the test images once.

    Returns:
        As `run_study`.

    Raises:
        StudyError: no trial is complete, or as `run_study`.
        ResourceError, FailedStudyError, InterruptedStudyError: as `run_study`.
    """
    config, store = inputs.config, inputs.store
    reason = StopReason.DONE
    # More runs could never be scored on test images that are open.
    if find_test_unlock(store) is None:
        notes = confirmation_notes(store, config)
        with log_events(store.folder):
            for note in notes:
                logger.info("note: %s", note)
        config, reason = run_study(inputs, "confirm")
    if reason == StopReason.DONE:
        with log_events(store.folder):
            open_test(store, config, inputs.eval_data or inputs.dataset)
    return config, reason


def _check(inputs: StudyInputs) -> None:
    """Raise for what can be seen before a cluster is started and a file is written."""
    config, store = inputs.config, inputs.store
    check_unchanged(config, store, inputs.dataset, inputs.eval_data)
    if (store.folder / "run.lock").is_file() and (holder := store.holder()):
        raise StudyError(
            f"Study {config.name!r} is already run by {holder}; wait for it, or end it."
        )
    check_study(config, inputs.dataset, inputs.eval_data)
    if inputs.address is None:
        jobs_side_by_side(config.resources, machine_resources())


def _run_trials(inputs: StudyInputs, config: StudyConfig, lease: Lease, phase: Phase) -> StopReason:
    store = inputs.store
    images = inputs.dataset.count("train")
    with ray_session(inputs.address) as dashboard:
        cluster = cluster_resources()
        side_by_side = jobs_side_by_side(config.resources, cluster)
        record_environment(config, store, cluster, inputs.dataset, inputs.eval_data)
        logger.info(
            "study %s: %d trials side by side, folder %s", config.name, side_by_side, store.folder
        )
        if phase == "search":
            log_pruning_notes(config, images)
        if dashboard:
            logger.info("Ray dashboard: %s", dashboard)
        reason = run_on_tune(
            store,
            config,
            lease,
            data=inputs.dataset.path,
            eval_data=None if inputs.eval_data is None else inputs.eval_data.path,
            images=images,
            side_by_side=side_by_side,
            phase=phase,
        )
        logger.info(END_MESSAGES[reason].format(name=config.name))
    return reason
