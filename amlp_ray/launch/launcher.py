"""Where a pretraining runs: in this process, or on the workers of a Ray Train group. Both run the same `run_job`."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from amlp_ray.config import FaultToleranceConfig, PretrainConfig, ResourceConfig, TrackingConfig
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.data.loading import image_cache
from amlp_ray.data.loading.batches import is_streamed
from amlp_ray.data.path import DataPath
from amlp_ray.launch.job import RunSpec, claim, is_finished, run_job
from amlp_ray.runtime.resources import cluster_resources, jobs_side_by_side, machine_resources
from amlp_ray.runtime.session import is_joined, ray_session
from amlp_ray.runtime.worker_group import WorkerContext, alone, run_group
from amlp_ray.training.checkpoint.export import ENCODER
from amlp_ray.training.checkpoint.manager import checkpoints
from amlp_ray.training.checkpoint.pretrained import located, starting_model
from amlp_ray.training.loggers.loggers import check_tracking
from amlp_ray.training.loggers.metrics_file import NewRows
from amlp_ray.training.pretrain import Hooks, Metrics, PretrainResult
from amlp_ray.utils.locks import only_writer

ShouldStop = Callable[[], bool]
PATIENCE_S = 5.0  # with another process that writes into the folder: one that was just killed is gone by then


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
    """Pretrain on a patch dataset's training images, without labels; return the path of the exported encoder.

    A folder `out` that holds a run of the same settings is resumed, whatever workers it had; a finished one is left as
    it is.

    Args:
        labels: another dataset of the same shape, with masks, whose images pictures and diagnosis
            show; it is not trained on.
        resources: one worker (the default, with all cores) trains in this process; more on Ray Train.
        faults: what the run bears before it gives up.
        tracking: where metrics go besides `metrics.jsonl` and TensorBoard.
        address: of the Ray cluster to run on, with one worker too; without one, several workers start Ray here.
        report: called with the metrics of every epoch.

    Raises:
        ConfigError, DataError, CheckpointError, ResourceError: in one sentence each. NonFiniteLossError: training
        diverged. WorkerLostError, StorageError: more went wrong than `faults` bears; run it again.
    """
    config, out = config or PretrainConfig(), Path(out).absolute()
    if config.weights is not None:
        config = config.model_copy(update={"weights": located(config.weights)})
    resources = resources or ResourceConfig(cpus_per_worker=os.cpu_count() or 1)
    dataset = PatchDataset.open(data)
    config.check_image(dataset.spec)
    config.check_workers(resources)
    check_tracking(tracking or TrackingConfig())
    if address is None and (resources.alone or not is_joined()):
        jobs_side_by_side(resources, machine_resources())
    if config.weights is not None and not checkpoints(out):
        starting_model(config.weights, config.model.encoder)
    run_spec = RunSpec(
        config,
        dataset.path,
        out,
        resources=resources,
        fault_tolerance=fault_tolerance or FaultToleranceConfig(),
        tracking=tracking or TrackingConfig(),
        label=out.name,
        eval_data=None if eval_data is None else str(DataPath(eval_data)),
    )
    labeled = run_spec.open_labels(
        dataset
    )  # a set that does not fit is told before anything starts
    with only_writer(out, wait_s=PATIENCE_S):
        claim(
            run_spec, dataset, labeled
        )  # before Ray is started: a folder of another run is told at once
        if resources.alone and address is None:
            # A stream needs a Ray of its own here; its tasks and this process share the machine's cores unasked.
            try:
                with (
                    ray_session(address)
                    if is_streamed(dataset, "train", config.data)
                    else nullcontext()
                ):
                    run_here(run_spec, Hooks(report=report))
            finally:
                image_cache.release()  # a notebook gets its memory back
        elif not is_finished(run_spec):  # starting Ray takes long
            with image_cache.swept(), ray_session(address):
                jobs_side_by_side(resources, cluster_resources())
                run_on_ray(run_spec, name=f"pretrain-{out.name}", report=report)
    return out / ENCODER


def run_here(run_spec: RunSpec, hooks: Hooks | None = None) -> PretrainResult:
    """Run a job in this process, on its GPU if it sees one."""
    return run_job(run_spec, hooks or Hooks(), alone())


def run_on_ray(
    run_spec: RunSpec,
    *,
    name: str,
    should_stop: ShouldStop | None = None,
    report: Callable[[Metrics], None] = lambda metrics: None,
) -> None:
    """Run a job on Ray Train workers that share each batch; Ray must be initialised.

    The job's folder must be seen by all nodes. The same folder resumes. A worker that dies restarts the group, which
    goes on from the folder's checkpoint.

    Args:
        should_stop: asked by the first worker after each epoch; must be picklable.
        report: called in this thread with the metrics of every new epoch, shortly after it ended.
    """
    # Ray Train could forward reports itself, but into a trial's queue of one from two threads, which can block.
    rows = NewRows(run_spec.folder / "metrics.jsonl", report)
    run_group(
        _Work(run_spec, should_stop),
        run_spec.resources,
        run_spec.fault_tolerance,
        name=name,
        folder=run_spec.folder,
        progress=lambda: rows.epoch,
        poll=rows.look,
    )


@dataclass(frozen=True)
class _Work:
    """What each worker of a group does."""

    run_spec: RunSpec
    should_stop: ShouldStop | None

    def __call__(self, member: WorkerContext) -> None:
        from amlp_ray.runtime.dashboard_metrics import TrialGauges

        gauges = TrialGauges(self.run_spec.study, self.run_spec.label) if member.is_first else None
        hooks = Hooks(
            report=gauges.update if gauges else lambda metrics: None,
            should_stop=self.should_stop or (lambda: False),
        )
        try:
            run_job(self.run_spec, hooks, member)
        finally:
            if gauges:
                gauges.close()
