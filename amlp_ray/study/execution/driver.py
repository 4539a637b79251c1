"""Run a study with Ray Tune and poll the store for pause, stop and extend requests."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ray.tune.schedulers import FIFOScheduler

from amlp_ray.config import StudyConfig
from amlp_ray.errors import FailedStudyError, InterruptedStudyError, StorageError
from amlp_ray.runtime.cluster_health import ClusterHealth, driver_node_options
from amlp_ray.runtime.ray_internals import keep_cloud_keys_out_of_runtime_env
from amlp_ray.runtime.resources import DRIVER_CPU, worker_bundle
from amlp_ray.runtime.worker_group import death_cause
from amlp_ray.study.execution.interrupt import interrupt_on_signals
from amlp_ray.study.execution.monitor import StudyMonitor
from amlp_ray.study.execution.stop_flags import StopFlags
from amlp_ray.study.execution.stop_reason import StopReason
from amlp_ray.study.execution.trial import amlp_trial
from amlp_ray.study.execution.trial_queue import Phase, TrialQueue
from amlp_ray.study.execution.tune_searcher import StudySearcher
from amlp_ray.study.storage.lease import Lease
from amlp_ray.study.storage.study_store import StudyStore
from amlp_ray.utils.temporary_folder import temporary_folder

INTERRUPTED = "Study {name!r} was interrupted; the same command resumes it."
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
        StorageError, ClusterLostError: the trials' disk or the cluster is lost for too long.
    """
    import ray

    stop_flags = ray.remote(StopFlags).options(num_cpus=0, **driver_node_options()).remote()
    ahead = config.sampler.suggest_ahead
    if ahead is None:
        ahead = 1 if side_by_side > 1 else 0
    queue = TrialQueue(
        store, config, data=data, eval_data=eval_data, suggest_ahead=ahead, phase=phase
    )
    searcher = StudySearcher(
        store, config, queue, images=images, stop_flags=stop_flags, seconds=lambda: lease.seconds
    )
    health = ClusterHealth.of_joined_cluster()
    monitor = StudyMonitor(store, config, searcher, stop_flags, lease, health)
    monitor.start()
    try:
        with temporary_folder() as scratch, interrupt_on_signals(searcher.interrupt):
            _run_tune(config, searcher, scratch, side_by_side, trainable)
    except Exception as error:
        # Tune raises an error of its own where the searcher raised one of ours.
        searcher.record_failure(error)
    finally:
        monitor.close()
        queue.close()
        with suppress(ray.exceptions.RayError):
            ray.kill(stop_flags)
    if searcher.failure is not None:
        raise searcher.failure
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
    if not searcher.has_finished:
        raise InterruptedStudyError(INTERRUPTED.format(name=config.name))
    return reason or StopReason.DONE


def _run_tune(
    config: StudyConfig,
    searcher: StudySearcher,
    scratch: Path,
    side_by_side: int,
    trainable: Trainable,
) -> None:
    from ray import tune
    from ray.tune.trainable import wrap_function

    keep_cloud_keys_out_of_runtime_env()
    bundle = {"CPU": DRIVER_CPU}
    if config.resources.is_single_worker:
        bundle = worker_bundle(config.resources)
    placement = tune.PlacementGroupFactory([bundle])
    wrapped = wrap_function(tune.with_resources(trainable, placement))
    # The name of processes and actors in the dashboard.
    wrapped.__name__ = wrapped.__qualname__ = "AmlpTrial"
    tune_config = tune.TuneConfig(
        search_alg=searcher,
        scheduler=DeathReporter(searcher.note_death),
        num_samples=-1,  # the searcher ends the study
        max_concurrent_trials=side_by_side,
        reuse_actors=True,  # importing torch anew costs seconds per trial
        trial_name_creator=_trial_name,
        trial_dirname_creator=_trial_name,
    )
    run_config = tune.RunConfig(
        name=config.name,
        # Tune's own records; the store has everything that matters.
        storage_path=str(scratch),
        verbose=0,
        stop=searcher.interrupt,
        # In a notebook Tune's default would clear what was printed before it.
        progress_reporter=tune.CLIReporter(),
    )
    try:
        tune.Tuner(wrapped, tune_config=tune_config, run_config=run_config).fit()
    except OSError as error:
        raise StorageError(
            f"Tune could not write to its temporary folder {scratch} "
            f"({error.strerror or error}); make room there or set TMPDIR to another folder, and "
            f"the same command resumes the study."
        ) from error


class DeathReporter(FIFOScheduler):
    """Runs trials in order, and passes on why the process of one died."""

    def __init__(self, report: Callable[[str, str], None]) -> None:
        """Create it; `report` is called with Tune's name of a trial and the cause."""
        super().__init__()
        self._report = report

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Read what Tune has written about the error, just before it tells the searcher."""
        text = ""
        with suppress(OSError, TypeError):  # Tune has written nothing
            text = Path(trial.error_file).read_text()
        self._report(trial.trial_id, death_cause(text))


def _trial_name(trial: Any) -> str:
    run = trial.config["trial_spec"]["run"]
    return f"{run['study']}-{run['label'].replace(' ', '-')}"
