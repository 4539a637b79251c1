"""Run a study with Ray Tune and poll the store for pause, stop and extend requests."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from typing import Any

from amlp_ray.config import StudyConfig
from amlp_ray.errors import FailedStudyError, InterruptedStudyError
from amlp_ray.runtime.ray_internals import keep_cloud_keys_out_of_runtime_env
from amlp_ray.runtime.resources import DRIVER_CPU, worker_bundle
from amlp_ray.study.execution.monitor import StudyMonitor
from amlp_ray.study.execution.stop_flags import StopFlags
from amlp_ray.study.execution.stop_reason import StopReason
from amlp_ray.study.execution.trial import amlp_trial
from amlp_ray.study.execution.trial_queue import Phase, TrialQueue
from amlp_ray.study.execution.tune_searcher import InterruptTune, StudySearcher
from amlp_ray.study.storage.lease import Lease
from amlp_ray.study.storage.study_store import StudyStore

Trainable = Callable[[dict[str, Any]], dict[str, Any]]


def run_on_tune(
    store: StudyStore,
    config: StudyConfig,
    lease: Lease,
    *,
    data: str,
    eval_data: str | None,
    images: int,
    side_by_side: int,
    phase: Phase = "search",
    trainable: Trainable = amlp_trial,
) -> StopReason:
    """Run a study's trials until none is left or somebody stops it; Ray must be initialized.

    Args:
        store: of the study, whose lock is held.
        lease: held by this process.
        data: patch dataset that trials train on.
        eval_data: another one that scores them.
        images: number of images that a trial trains on.
        side_by_side: how many trials run at the same time.
        trainable: what Tune runs for each trial.

    Returns:
        Why it ended: DONE, BUDGET, PAUSE, STOP or CANCEL.

    Raises:
        InterruptedStudyError, FailedStudyError, ResourceError: as `run_study`.
        StudyError: the storage is lost, or another process took the study over.
    """
    import ray

    stop_flags = ray.remote(StopFlags).options(num_cpus=0).remote()
    ahead = config.sampler.suggest_ahead
    if ahead is None:
        ahead = 1 if side_by_side > 1 else 0
    queue = TrialQueue(
        store, config, data=data, eval_data=eval_data, suggest_ahead=ahead, phase=phase
    )
    searcher = StudySearcher(
        store, config, queue, images=images, stop_flags=stop_flags, seconds=lambda: lease.seconds
    )
    interrupt = InterruptTune()
    monitor = StudyMonitor(store, config, searcher, interrupt, stop_flags, lease)
    monitor.start()
    try:
        _run_tune(config, searcher, interrupt, side_by_side, trainable)
    except Exception:
        # Tune raises an error of its own where the searcher raised one of ours.
        if monitor.failure is None and searcher.failure is None:
            raise
    finally:
        monitor.close()
        queue.close()
        ray.kill(stop_flags)
    if failure := monitor.failure or searcher.failure:
        raise failure
    return _stop_reason(config, searcher)


def _stop_reason(config: StudyConfig, searcher: StudySearcher) -> StopReason:
    """Return why the searcher stopped; raise if that is an error."""
    reason = searcher.stop_reason
    if reason == StopReason.IDENTICAL_FAILURES:
        raise FailedStudyError(
            f"The first {config.fault_tolerance.max_identical_failures} trials of "
            f"{config.name!r} failed alike, so the study was stopped: {searcher.stop_details}"
        )
    if reason in (StopReason.PAUSE, StopReason.CANCEL):
        return reason
    if searcher.has_unfinished_trials():
        # Tune handles Ctrl-C itself and returns as if all were done.
        raise InterruptedStudyError(
            f"Study {config.name!r} was interrupted; the same command resumes it."
        )
    return reason or StopReason.DONE


def _run_tune(
    config: StudyConfig,
    searcher: StudySearcher,
    interrupt: InterruptTune,
    side_by_side: int,
    trainable: Trainable,
) -> None:
    from ray import tune
    from ray.tune.trainable import wrap_function

    keep_cloud_keys_out_of_runtime_env()
    bundle = {"CPU": DRIVER_CPU}
    if config.resources.is_single_worker:
        bundle = worker_bundle(config.resources)
    # Tune's own records; the store has everything that matters.
    scratch = tempfile.mkdtemp(prefix="amlp-ray-")
    placement = tune.PlacementGroupFactory([bundle])
    wrapped = wrap_function(tune.with_resources(trainable, placement))
    # The name of processes and actors in the dashboard.
    wrapped.__name__ = wrapped.__qualname__ = "AmlpTrial"
    tune_config = tune.TuneConfig(
        search_alg=searcher,
        num_samples=-1,  # the searcher ends the study
        max_concurrent_trials=side_by_side,
        reuse_actors=True,  # importing torch anew costs seconds per trial
        trial_name_creator=_trial_name,
        trial_dirname_creator=_trial_name,
    )
    run_config = tune.RunConfig(name=config.name, storage_path=scratch, verbose=0, stop=interrupt)
    try:
        tune.Tuner(wrapped, tune_config=tune_config, run_config=run_config).fit()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _trial_name(trial: Any) -> str:
    run = trial.config["trial_spec"]["run"]
    return f"{run['study']}-{run['label'].replace(' ', '-')}"
