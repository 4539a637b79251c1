"""One pretraining job: what a runner starts, in a process of its own or on several workers.

A job is plain values, so that it travels to a Ray worker as it is.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from amlp_ray.config import (
    FaultToleranceConfig,
    PretrainConfig,
    ProbeConfig,
    ResourceConfig,
    TrackingConfig,
)
from amlp_ray.config.base import build
from amlp_ray.config.overrides import flat
from amlp_ray.config.yaml_file import read_yaml, write_yaml
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.data.loading.batches import open_batches
from amlp_ray.errors import CheckpointError
from amlp_ray.evaluation.diagnostics import Diagnostics, held_out, true_lesions
from amlp_ray.evaluation.labels import check_fits
from amlp_ray.evaluation.metrics import ProbeScore
from amlp_ray.method.autoencoder import MaskedAutoencoder
from amlp_ray.method.visualization import picture_strips
from amlp_ray.runtime.worker_group import SINGLE_WORKER, WorkerContext
from amlp_ray.training.checkpoint.export import ENCODER, export_encoder, is_encoder
from amlp_ray.training.checkpoint.manager import checkpoints, epoch_of
from amlp_ray.training.checkpoint.pretrained import ONLINE
from amlp_ray.training.checkpoint.restore import fork_checkpoint
from amlp_ray.training.loggers.loggers import Logger, check_tracking, open_trackers
from amlp_ray.training.objectives import Model
from amlp_ray.training.pretrain import Hooks, Metrics, PretrainResult, pretrain
from amlp_ray.training.train_state import new_model
from amlp_ray.utils.event_log import EventLog
from amlp_ray.utils.files import write_whole
from amlp_ray.utils.retry import RetryPolicy

IN_METRICS = ("dsc", "ppv", "sensitivity", "ap", "dsc_small", "dsc_medium", "dsc_large")
PICTURES = "pictures"  # folder of a run's strips, in the folder of the run
STRIPS = 4  # per run: enough to judge by, small enough to keep for every trial


@dataclass(frozen=True)
class RunSpec:
    """Settings, the patch dataset's path or URI, the run's folder, and at which epochs (`rungs`) the probe scores it.

    `labels` is a data set apart, whose images the probe, the diagnosis and the pictures show instead. A segment of a
    longer run returns after epoch `until`, and goes on from the run in folder `fork` until it has a checkpoint itself.
    """

    config: PretrainConfig
    data: str
    folder: Path
    probe: ProbeConfig | None = None
    rungs: tuple[int, ...] = ()
    resources: ResourceConfig = field(default_factory=ResourceConfig)
    fault_tolerance: FaultToleranceConfig = field(default_factory=FaultToleranceConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    study: str = ""  # names of study and trial, for metrics and logs
    label: str = ""
    eval_data: str | None = None
    until: int | None = None
    fork: Path | None = None

    @property
    def threads(self) -> int:
        """CPU threads of each worker."""
        return max(1, int(self.resources.cpus_per_worker))

    def open_labels(self, dataset: PatchDataset) -> PatchDataset:
        """The labelled data set, which is `dataset` where there is none apart.

        Raises:
            DataError: there is none. ConfigError: its images differ in shape or scale.
        """
        if self.eval_data is None:
            return dataset
        eval_data = PatchDataset.open(self.eval_data)
        check_fits(eval_data, dataset.spec, f"{dataset.path} holds")
        return eval_data


def run_job(
    run_spec: RunSpec, hooks: Hooks, member: WorkerContext = SINGLE_WORKER
) -> PretrainResult:
    """Run a job as this member of its group, or go on where its folder says it stopped.

    Raises:
        CheckpointError: where the folder holds a run of other settings.
    """
    torch.set_num_threads(run_spec.threads)
    dataset = PatchDataset.open(run_spec.data)
    eval_data = run_spec.open_labels(dataset)
    if run_spec.config.objective == "none":
        return _score_untrained(run_spec, hooks, dataset, eval_data, is_first=member.is_first)
    batches = open_batches(
        dataset,
        batch_size=run_spec.config.batch_size,
        seed=run_spec.config.seed,
        mode=run_spec.config.data,
        rank=member.rank,
        world=member.world,
        epochs=run_spec.config.epochs if run_spec.until is None else run_spec.until,
    )
    truth = true_lesions(dataset, run_spec.config)
    tracked = _Tracked(run_spec, hooks.report)
    if member.is_first:
        claim(run_spec, dataset, eval_data)
        if not is_finished(run_spec):
            _drop_ends(run_spec.folder)
        if run_spec.fork is not None and not checkpoints(run_spec.folder):
            fork_checkpoint(run_spec.fork, run_spec.folder, run_spec.config)
        hooks = replace(hooks, evaluate=_evaluation(run_spec, dataset, eval_data), report=tracked)
    if run_spec.fork is not None and member.world > 1:
        dist.barrier()  # the others load what the first has copied
    try:
        result = pretrain(
            run_spec.config,
            batches,
            run_spec.folder,
            hooks=hooks,
            device=member.device,
            truth=truth,
            until=run_spec.until,
            resources=run_spec.resources,
            fault_tolerance=run_spec.fault_tolerance,
        )
    except BaseException:
        tracked.close(failed=True)
        raise
    tracked.close()
    if member.is_first and isinstance(result.model, MaskedAutoencoder):
        _draw(run_spec, eval_data, result.model, max(1, result.epochs))
    return result


logger = logging.getLogger("amlp_ray")


class _Tracked:
    """Tells trackers of each epoch, then the runner. They are opened with the first, whose number is known then."""

    def __init__(self, run_spec: RunSpec, report: Callable[[Metrics], None]) -> None:
        check_tracking(run_spec.tracking)
        self.run_spec, self.report = run_spec, report
        self.tracker: Logger | None = None

    def __call__(self, metrics: Metrics) -> None:
        if self.tracker is None:
            self.tracker = open_trackers(
                self.run_spec.folder,
                self.run_spec.tracking,
                name=self.run_spec.label or self.run_spec.folder.name,
                parameters=_parameters(self.run_spec.config),
                group=self.run_spec.study,
                resumed_epoch=max(0, metrics["epoch"] - 1),
                say=logger.warning,
            )
        self.tracker.log(metrics)
        self.report(metrics)

    def close(self, failed: bool = False) -> None:
        if self.tracker is not None:
            self.tracker.close(failed)


def _parameters(config: PretrainConfig) -> dict[str, Any]:
    """Settings by dotted name, for servers; of a file of weights its name alone, since paths may tell of patients."""
    values = flat(config.model_dump(mode="json"))
    if config.weights is not None and not config.weights.startswith(ONLINE):
        values["weights"] = Path(config.weights).name
    return values


def claim(run_spec: RunSpec, dataset: PatchDataset, eval_data: PatchDataset | None = None) -> None:
    """Write the resolved settings and what data they apply to; refuse a folder that holds a run of others.

    A run that never came to its first epoch, such as for want of weights, holds nothing: its settings are replaced.

    Args:
        labels: where they are a data set apart.

    Raises:
        CheckpointError: the folder's run has other settings or other data.
    """
    run_spec.folder.mkdir(parents=True, exist_ok=True)
    path, about = run_spec.folder / "config.yaml", run_spec.folder / "data.json"
    begun = checkpoints(run_spec.folder) or any(
        (run_spec.folder / name).is_file() for name in ("metrics.jsonl", ENCODER)
    )
    if (
        begun
        and path.is_file()
        and _decisive(build(PretrainConfig, read_yaml(path), str(path)))
        != _decisive(run_spec.config)
    ):
        raise CheckpointError(
            f"{run_spec.folder} holds a run with other settings (see its config.yaml); use another folder or delete it."
        )
    data = _described(dataset) | {"image": dataset.spec.model_dump()}
    if eval_data is not None and eval_data is not dataset:
        data["eval_data"] = _described(eval_data)
    if begun and about.is_file():
        held = json.loads(about.read_text())
        # One of them may be missing in the other: a run scored by labels of its own is not one that was not.
        for ours, theirs in ((data, held), (data.get("eval_data", {}), held.get("eval_data", {}))):
            if ours.get("fingerprint") != theirs.get("fingerprint"):
                raise CheckpointError(
                    f"{run_spec.folder} holds a run on other data ({theirs.get('path', 'no labels apart')}, prepared "
                    f"differently); use another folder."
                )
    write_yaml(run_spec.config, path)
    write_whole(about, json.dumps(data, indent=1))


def is_finished(run_spec: RunSpec) -> bool:
    """Whether the folder of the job holds all that it makes; in doubt, no."""
    objective, found = run_spec.config.objective, checkpoints(run_spec.folder)
    last = run_spec.config.epochs if run_spec.until is None else run_spec.until
    trained = objective == "none" or (bool(found) and epoch_of(found[0]) == last)
    drawn = objective != "reconstruction" or (run_spec.folder / PICTURES).is_dir()
    return trained and drawn and is_encoder(run_spec.folder / ENCODER)


def _drop_ends(folder: Path) -> None:
    """Drop what a run made as it stopped early: killed after its last epoch, it would pass for what it has learnt."""
    (folder / ENCODER).unlink(missing_ok=True)
    shutil.rmtree(folder / PICTURES, ignore_errors=True)


def _decisive(config: PretrainConfig) -> PretrainConfig:
    """What a run's result follows from: not how its images are read, which a smaller machine may do in another way."""
    return config.model_copy(update={"data": "auto"})


def _described(dataset: PatchDataset) -> dict[str, Any]:
    return {"name": dataset.name, "path": dataset.path, "fingerprint": dataset.manifest.fingerprint}


def _evaluation(
    run_spec: RunSpec, dataset: PatchDataset, eval_data: PatchDataset
) -> Callable[[Model, int], Metrics]:
    """Diagnosis after every epoch and, at rungs, the probe's score."""
    patience = RetryPolicy.of(run_spec.folder, run_spec.fault_tolerance, EventLog(run_spec.folder))
    diagnosis = Diagnostics(eval_data, run_spec.config)
    probe = None
    if run_spec.probe:
        from amlp_ray.evaluation.linear_probe import (
            Probe,  # takes a second to import, of which most runs have no use
        )

        probe = Probe(eval_data, run_spec.probe, run_spec.config.model.patch_size, dataset.spec)

    def evaluate(model: Model, epoch: int) -> Metrics:
        seen = diagnosis(model, epoch) if epoch else {}
        if probe is None or epoch not in run_spec.rungs:
            return seen
        score = probe.score(model.encoder)
        return seen | patience(
            lambda: _keep(run_spec.folder, score, epoch), f"the score of epoch {epoch}"
        )

    return evaluate


def _keep(folder: Path, score: ProbeScore, epoch: int) -> Metrics:
    """Write `rungs/<epoch>.json` and, the same, `score.json`; return what of it goes into the epoch's metrics.

    A size of lesions that no scored image has is left out there.
    """
    text = json.dumps({"epoch": epoch, **score.as_dict()})
    (folder / "rungs").mkdir(exist_ok=True)
    write_whole(folder / "rungs" / f"{epoch}.json", text)
    write_whole(folder / "score.json", text)
    values = {name: getattr(score, name) for name in IN_METRICS}
    return {name: value for name, value in values.items() if value is not None}


def _score_untrained(
    run_spec: RunSpec,
    hooks: Hooks,
    dataset: PatchDataset,
    eval_data: PatchDataset,
    *,
    is_first: bool,
) -> PretrainResult:
    """The variant `scratch`: reported once, as epoch 0. With `weights`, it is these that nothing was added to."""
    model = new_model(run_spec.config, dataset.spec)[0].eval()
    encoder = run_spec.folder / ENCODER
    metrics: Metrics = {"epoch": 0}
    if is_first:
        claim(run_spec, dataset, eval_data)
        metrics |= _evaluation(run_spec, dataset, eval_data)(model, 0)
        export_encoder(model.encoder, encoder, run_spec.config.model, dataset.spec)
    hooks.report(metrics)
    return PretrainResult(0, False, metrics, model, encoder)


def _draw(run_spec: RunSpec, dataset: PatchDataset, model: MaskedAutoencoder, epoch: int) -> None:
    """Draw images the model has not been trained on, with lesions where masks are known."""
    chosen = held_out(dataset, STRIPS)
    strips = picture_strips(
        model,
        torch.from_numpy(chosen.images),
        torch.from_numpy(chosen.keys),
        chosen.masks if chosen.labeled.all() else None,
        run_spec.config,
        epoch,
    )
    partial, folder = run_spec.folder / f"{PICTURES}.partial", run_spec.folder / PICTURES

    def write() -> None:
        partial.mkdir(exist_ok=True)
        for i, (name, strip) in enumerate(zip(chosen.ids, strips, strict=True)):
            strip.save(partial / f"{i}-{re.sub(r'[^A-Za-z0-9.-]+', '_', name)}.png")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)

    RetryPolicy.of(run_spec.folder, run_spec.fault_tolerance, EventLog(run_spec.folder))(
        write, "pictures"
    )
