"""Start a pretraining in this process, or on the workers of a Ray Train group."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

from amlp_ray.config import FaultToleranceConfig, PretrainConfig, ResourceConfig, TrackingConfig
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.data.loading.batches import resolve_mode
from amlp_ray.data.path import DataPath
from amlp_ray.launch.job import claim, is_finished, open_eval_data, run_job
from amlp_ray.launch.run_spec import RunSpec
from amlp_ray.runtime.resources import check_machine, cluster_resources, jobs_side_by_side
from amlp_ray.runtime.session import ray_session
from amlp_ray.runtime.worker_context import WorkerContext
from amlp_ray.runtime.worker_group import run_group, this_process
from amlp_ray.training.checkpoint.export import ENCODER
from amlp_ray.training.checkpoint.manager import checkpoints
from amlp_ray.training.checkpoint.pretrained import read_pretrained_config, resolve_weights
from amlp_ray.training.loggers.loggers import check_tracking
from amlp_ray.training.loggers.metrics_file import RowTail
from amlp_ray.training.pretrain import Hooks, Metrics, PretrainResult
from amlp_ray.utils.files import local_path
from amlp_ray.utils.run_dir import RunDir

ShouldStop = Callable[[], bool]
LOCK_WAIT_S = 5.0  # a process that was just killed has released the folder by then


def pretrain_dataset(
    data: str | Path,
    out: str | Path,
    config: PretrainConfig | None = None,
    *,
    eval_data: str | Path | None = None,
    resources: ResourceConfig | None = None,
    fault_tolerance: FaultToleranceConfig | None = None,
    tracking: TrackingConfig | None = None,
    address: str | None = None,
    report: Callable[[Metrics], None] = lambda metrics: None,
) -> Path:
    """Pretrain on a patch dataset's training images, without labels; resume a run in `out`.

    Args:
        data: path or URI of the patch dataset.
        out: the run's folder.
        eval_data: another dataset of the same shape, with masks, for pictures and diagnostics.
        resources: one worker with all cores, the default, trains here; several train on Ray.
        fault_tolerance: losses and outages that the run survives.
        tracking: where metrics go besides `metrics.jsonl` and TensorBoard.
        address: of a Ray cluster to run on. Without it, several workers start Ray here.
        report: called with the metrics of every epoch.

    Returns:
        The path of the exported encoder.

    Raises:
        ConfigError, DataError, CheckpointError, ResourceError: the run cannot start.
        NonFiniteLossError: training diverged.
        WorkerLostError, StorageError: more went wrong than `fault_tolerance` allows; run it again.
    """
    out = local_path(out)
    dataset = PatchDataset.open(data)
    config = config or PretrainConfig()
    if config.weights is not None:
        config = config.model_copy(update={"weights": resolve_weights(config.weights)})
    run_spec = RunSpec(
        config=config,
        data=dataset.path,
        folder=out,
        resources=resources or ResourceConfig(cpus_per_worker=os.cpu_count() or 1),
        fault_tolerance=fault_tolerance or FaultToleranceConfig(),
        tracking=tracking or TrackingConfig(),
        label=out.name,
        eval_data=None if eval_data is None else str(DataPath(eval_data)),
    )
    _check(run_spec, dataset, address)
    opened_eval_data = open_eval_data(run_spec, dataset)
    with RunDir(out).lock(wait_s=LOCK_WAIT_S):
        # Before Ray starts: a folder of another run is refused at once.
        claim(run_spec, dataset, opened_eval_data)
        _run(run_spec, dataset, address, report)
    return out / ENCODER


def _run(
    run_spec: RunSpec,
    dataset: PatchDataset,
    address: str | None,
    report: Callable[[Metrics], None],
) -> None:
    """Run in this process where one worker is enough, otherwise on Ray."""
    if run_spec.resources.is_single_worker and address is None:
        # A stream needs Ray. Its reading tasks share the machine's cores with this process.
        mode = resolve_mode(dataset, "train", run_spec.config.data)
        with ray_session() if mode == "stream" else nullcontext():
            run_here(run_spec, Hooks(report=report))
    elif not is_finished(run_spec):
        with ray_session(address):
            jobs_side_by_side(run_spec.resources, cluster_resources())
            run_on_ray(run_spec, name=f"pretrain-{run_spec.folder.name}", report=report)


def _check(run_spec: RunSpec, dataset: PatchDataset, address: str | None) -> None:
    """Raise for what would fail only later: image size, workers, trackers, weights, room."""
    config = run_spec.config
    resources = run_spec.resources
    config.check_image(dataset.spec)
    config.check_workers(resources)
    check_tracking(run_spec.tracking)
    check_machine(resources, address)
    if config.weights is not None and not checkpoints(run_spec.folder):
        read_pretrained_config(config.weights, config.model.encoder)


def run_here(run_spec: RunSpec, hooks: Hooks | None = None) -> PretrainResult:
    """Run a pretraining in this process, on its GPU if it has one."""
    return run_job(run_spec, hooks or Hooks(), this_process())


def run_on_ray(
    run_spec: RunSpec,
    *,
    name: str,
    should_stop: ShouldStop | None = None,
    report: Callable[[Metrics], None] = lambda metrics: None,
    on_start: Callable[[], None] | None = None,
) -> None:
    """Run a pretraining on Ray Train workers that share each batch; Ray must be initialized.

    All nodes must see the run's folder. The same folder resumes. A worker that dies restarts the
    group, which continues from the folder's checkpoint.

    Args:
        name: of the group, for Ray's dashboard.
        should_stop: asked by the first worker after each epoch; must be picklable.
        report: called in this thread with the metrics of every new epoch, shortly after it ended.
        on_start: called by the first worker, once the group has its resources; must be picklable.
    """
    # Ray Train could forward reports itself, but into a trial's queue of one from two threads,
    # which can block.
    rows = RowTail(run_spec.folder / "metrics.jsonl", report)
    run_group(
        partial(_run_worker, run_spec, should_stop, on_start),
        run_spec.resources,
        run_spec.fault_tolerance,
        name=name,
        folder=run_spec.folder,
        progress=lambda: rows.epoch,
        poll=rows.poll,
    )


def _run_worker(
    run_spec: RunSpec,
    should_stop: ShouldStop | None,
    on_start: Callable[[], None] | None,
    worker: WorkerContext,
) -> None:
    """Run one worker's part; the first worker shows its metrics in Ray's dashboard."""
    from amlp_ray.runtime.dashboard_metrics import TrialGauges

    hooks = Hooks(should_stop=should_stop) if should_stop else Hooks()
    if not worker.is_first:
        run_job(run_spec, hooks, worker)
        return
    if on_start is not None:
        on_start()
    with closing(TrialGauges(run_spec.study, run_spec.label)) as gauges:
        run_job(run_spec, replace(hooks, report=gauges.update), worker)
