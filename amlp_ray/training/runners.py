"""Where a job runs: in this process, or on the workers of a Ray Train group. Both run the same `run_job`."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from amlp_ray.config import PretrainSettings, ResourceSettings
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.data.place import Place
from amlp_ray.data.reading import cache
from amlp_ray.data.reading.stream import is_streamed
from amlp_ray.errors import AmlpError
from amlp_ray.runtime.capacity import cluster_resources, jobs_side_by_side, machine_resources, worker_bundle
from amlp_ray.runtime.ray_session import ray_session
from amlp_ray.training.job import Job, claim, run_job
from amlp_ray.training.metrics import own_rows, read_rows
from amlp_ray.training.pretrain import Hooks, Metrics, PretrainResult

ShouldStop = Callable[[], bool]
FOLLOW_S = 0.5  # seconds between looks at the metrics of a group on other processes


def pretrain_dataset(
    data: str | Path,
    out: str | Path,
    settings: PretrainSettings | None = None,
    *,
    labels: str | Path | None = None,
    resources: ResourceSettings | None = None,
    address: str | None = None,
    report: Callable[[Metrics], None] = lambda metrics: None,
) -> Path:
    """Pretrain on a patch dataset's training images, without labels; return the path of the exported encoder.

    A folder `out` that holds a run of the same settings is resumed; a finished one is left as it is.

    Args:
        labels: another dataset of the same shape, with masks, whose images pictures and diagnosis
            show; it is not trained on.
        resources: one worker (the default, with all cores) trains in this process; more on Ray Train.
        address: of the Ray cluster to join, with several workers; without one, Ray is started here.
        report: called with the metrics of every epoch.

    Raises:
        SettingsError, DataError, CheckpointError, ResourceError: in one sentence each. NonFiniteLossError: training
        diverged.
    """
    settings, out = settings or PretrainSettings(), Path(out).absolute()
    resources = resources or ResourceSettings(cpus_per_worker=os.cpu_count() or 1)
    dataset = PatchDataset.open(data)
    settings.check_image(dataset.spec)
    settings.check_workers(resources.workers)
    if address is None:
        jobs_side_by_side(resources, machine_resources())
    job = Job(
        settings,
        dataset.path,
        out,
        threads=max(1, int(resources.cpus_per_worker)),
        label=out.name,
        labels=None if labels is None else str(Place(labels)),
    )
    labelled = job.open_labels(dataset)  # a set that does not fit is told before anything starts
    if resources.workers == 1:
        # A stream needs a Ray of its own here; its tasks and this process share the machine's cores unasked.
        try:
            with ray_session(address) if is_streamed(dataset, "train", settings.data) else nullcontext():
                run_here(job, Hooks(report=lambda metrics, checkpoint: report(metrics)))
        finally:
            cache.release()  # a notebook gets its memory back
    else:
        claim(job, dataset, labelled)  # before Ray is started: a folder of another run is told at once
        with cache.swept(), ray_session(address):
            jobs_side_by_side(resources, cluster_resources())
            run_on_ray(job, resources, name=f"pretrain-{out.name}", storage=out / "ray_train", report=report)
    return out / "encoder.safetensors"


def run_here(job: Job, hooks: Hooks | None = None) -> PretrainResult:
    """Run a job in this process, on its GPU if it sees one."""
    return run_job(job, hooks or Hooks(), device="cuda" if torch.cuda.is_available() else "cpu")


def run_on_ray(
    job: Job,
    resources: ResourceSettings,
    *,
    name: str,
    storage: Path,
    should_stop: ShouldStop | None = None,
    report: Callable[[Metrics], None] = lambda metrics: None,
    reported: int = 0,
) -> None:
    """Run a job on `resources.workers` Ray Train workers that share each batch; Ray must be initialised.

    The job's folder must be seen by all nodes. The same `name` resumes. A worker that dies restarts the group, which
    goes on from the folder's checkpoint.

    Args:
        storage: Ray Train's own folder, for its bookkeeping.
        should_stop: asked by the first worker after each report; must be picklable.
        report: called in this thread with the metrics of every epoch after `reported`, shortly after it ended.
    """
    from ray import train
    from ray.train.torch import TorchTrainer

    own_job = replace(job, threads=max(1, int(resources.cpus_per_worker)))
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"job": own_job, "should_stop": should_stop},
        scaling_config=train.ScalingConfig(
            num_workers=resources.workers,
            use_gpu=resources.gpus_per_worker > 0,
            resources_per_worker=worker_bundle(resources),
        ),
        run_config=train.RunConfig(
            name=name,
            storage_path=str(storage),
            failure_config=train.FailureConfig(max_failures=2, controller_failure_limit=3),
        ),
    )
    _follow(trainer.fit, job.folder / "metrics.jsonl", report, reported)


def _follow(work: Callable[[], object], file: Path, report: Callable[[Metrics], None], reported: int) -> None:
    """Do `work` in a thread of its own and report the epochs that it appends to `file`, from this thread.

    Ray Train could forward reports itself, but into a trial's queue of one from two threads, which can block for ever.
    """
    failure: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # handed on below
            failure.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while True:
        thread.join(FOLLOW_S)
        ended = not thread.is_alive()
        for row in own_rows(read_rows(file)):
            if row["epoch"] > reported:
                report(row)
                reported = row["epoch"]
        if ended:
            break
    if failure:
        raise _own_error(failure[0]) from failure[0]


def _worker(config: dict[str, Any]) -> None:
    from ray import train
    from ray.train.torch import get_device

    from amlp_ray.runtime.metrics import TrialGauges

    context = train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()

    job: Job = config["job"]
    gauges = TrialGauges(job.study, job.label) if rank == 0 else None

    def report(metrics: Metrics, checkpoint: Path) -> None:
        if gauges:
            gauges.update(metrics)
        train.report(metrics)  # a barrier: every worker reports every epoch

    hooks = Hooks(report=report, should_stop=config["should_stop"] or (lambda: False))
    run_job(job, hooks, rank=rank, world=world, device=str(get_device()))


def _own_error(error: BaseException) -> BaseException:
    """The error a worker raised on purpose, if that is what made Ray Train give up."""
    for failure in getattr(error, "worker_failures", {}).values():
        cause = getattr(failure, "_base_exc", failure)  # Ray Train wraps what user code raised
        if isinstance(cause, AmlpError):
            return cause
    return error
