"""Running a study on Tune: from its lock to its end, with an ear for those who want it paused, stopped or extended."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from typing import Any, Literal

from amlp_ray.config import StudyConfig
from amlp_ray.errors import FailedStudyError, InterruptedStudyError
from amlp_ray.runtime.resources import DRIVER_CPU, worker_bundle
from amlp_ray.study.execution.monitor import EventLog, StudyMonitor
from amlp_ray.study.execution.stop_flags import StopFlags
from amlp_ray.study.execution.trial import amlp_trial
from amlp_ray.study.execution.trial_queue import Phase, TrialQueue
from amlp_ray.study.execution.tune_searcher import StudySearcher
from amlp_ray.study.storage.lease import Lease
from amlp_ray.study.storage.study_store import StudyStore

StopReason = Literal["done", "budget", "paused", "stopped", "cancelled"]


def run_on_tune(
    store: StudyStore,
    config: StudyConfig,
    lease: Lease,
    log: EventLog,
    *,
    data: str,
    eval_data: str | None,
    images: int,
    side_by_side: int,
    phase: Phase = "search",
    trainable: Callable[[dict[str, Any]], dict[str, Any]] = amlp_trial,
) -> StopReason:
    """Run what the study's queue holds until it is empty or somebody ends it; Ray is initialised, the lock held.

    Args:
        trainable: what Tune runs for each piece of work.

    Raises:
        InterruptedStudyError: Ctrl-C. FailedStudyError: the first trials failed alike. ResourceError: no room came
            free. StudyError: the storage is gone, or another process took the study over.
    """
    import ray

    stop_flags = ray.remote(StopFlags).options(num_cpus=0).remote()
    ahead = config.sampler.suggest_ahead
    queue = TrialQueue(
        store,
        config,
        data=data,
        eval_data=eval_data,
        suggest_ahead=(1 if side_by_side > 1 else 0) if ahead is None else ahead,
        phase=phase,
        notify=log,
    )
    searcher = StudySearcher(
        store,
        config,
        queue,
        images=images,
        stop_flags=stop_flags,
        seconds=lambda: lease.seconds,
        notify=log,
    )
    watch = StudyMonitor(store, config, searcher, stop_flags, lease, log)
    watch.start()
    try:
        _fit(config, searcher, side_by_side, trainable)
    except Exception:
        if (
            watch.failure is None and searcher.failure is None
        ):  # Tune wraps what its searcher raised in its own words
            raise
    finally:
        watch.close()
        queue.close()
        ray.kill(stop_flags)
    if failure := watch.failure or searcher.failure:
        raise failure
    if searcher.ending == "max_identical_failures":
        raise FailedStudyError(
            f"The first {config.fault_tolerance.max_identical_failures} trials of {config.name!r} failed alike, so the study was stopped: "
            f"{searcher.ending_reason}"
        )
    if searcher.ending == "pause":
        return "paused"
    if searcher.ending == "cancel":
        return "cancelled"
    if searcher.unfinished():  # Tune takes Ctrl-C for itself and returns as if all were done
        raise InterruptedStudyError(
            f"Study {config.name!r} was interrupted; the same command goes on where it stopped."
        )
    return {"stop": "stopped", "budget": "budget"}.get(searcher.ending or "", "done")  # type: ignore[return-value]


def _fit(
    config: StudyConfig,
    searcher: StudySearcher,
    side_by_side: int,
    trainable: Callable[[dict[str, Any]], dict[str, Any]],
) -> None:
    from ray import tune
    from ray.tune.trainable import wrap_function

    alone = config.resources.alone
    bundle = worker_bundle(config.resources) if alone else {"CPU": DRIVER_CPU}
    scratch = tempfile.mkdtemp(
        prefix="amlp-ray-"
    )  # Tune's own records; the store has everything that matters
    wrapped = wrap_function(tune.with_resources(trainable, tune.PlacementGroupFactory([bundle])))
    wrapped.__name__ = wrapped.__qualname__ = (
        "AmlpTrial"  # what processes and actors are called in the dashboard
    )
    try:
        tune.Tuner(
            wrapped,
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                num_samples=-1,  # the searcher ends the study
                max_concurrent_trials=side_by_side,
                reuse_actors=True,  # importing torch anew costs seconds per trial
                trial_name_creator=lambda trial: _trial_name(trial.config),
                trial_dirname_creator=lambda trial: _trial_name(trial.config),
            ),
            run_config=tune.RunConfig(name=config.name, storage_path=scratch, verbose=0),
        ).fit()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _trial_name(config: dict[str, Any]) -> str:
    trial_spec = config["trial_spec"]
    return f"{trial_spec['study']}-{trial_spec['label'].replace(' ', '-')}"
