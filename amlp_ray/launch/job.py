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
    FaultSettings,
    PretrainSettings,
    ProbeSettings,
    ResourceSettings,
    TrackingSettings,
)
from amlp_ray.config.base import build
from amlp_ray.config.overrides import flat
from amlp_ray.config.yaml_file import read_yaml, write_yaml
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.data.loading.batches import open_batches
from amlp_ray.errors import CheckpointError
from amlp_ray.evaluation.diagnostics import Diagnosis, held_out, true_lesions
from amlp_ray.evaluation.labels import check_fits
from amlp_ray.evaluation.metrics import Score
from amlp_ray.method.autoencoder import MaskedAutoencoder
from amlp_ray.method.visualization import picture_strips
from amlp_ray.runtime.worker_group import ALONE, Member
from amlp_ray.training.checkpoint.export import ENCODER, export_encoder, is_encoder
from amlp_ray.training.checkpoint.manager import checkpoints, epoch_of
from amlp_ray.training.checkpoint.pretrained import ONLINE
from amlp_ray.training.checkpoint.restore import fork_checkpoint
from amlp_ray.training.loggers.loggers import Tracker, check_tracking, open_trackers
from amlp_ray.training.objectives import Model
from amlp_ray.training.pretrain import Hooks, Metrics, PretrainResult, pretrain
from amlp_ray.training.train_state import new_model
from amlp_ray.utils.event_log import EventLog
from amlp_ray.utils.files import write_whole
from amlp_ray.utils.retry import Patience

IN_METRICS = ("dsc", "ppv", "sensitivity", "ap", "dsc_small", "dsc_medium", "dsc_large")
PICTURES = "pictures"  # folder of a run's strips, in the folder of the run
STRIPS = 4  # per run: enough to judge by, small enough to keep for every trial


@dataclass(frozen=True)
class Job:
    """Settings, the patch dataset's path or URI, the run's folder, and at which epochs (`rungs`) the probe scores it.

    `labels` is a data set apart, whose images the probe, the diagnosis and the pictures show instead. A segment of a
    longer run returns after epoch `until`, and goes on from the run in folder `fork` until it has a checkpoint itself.
    """

    settings: PretrainSettings
    data: str
    folder: Path
    probe: ProbeSettings | None = None
    rungs: tuple[int, ...] = ()
    resources: ResourceSettings = field(default_factory=ResourceSettings)
    faults: FaultSettings = field(default_factory=FaultSettings)
    tracking: TrackingSettings = field(default_factory=TrackingSettings)
    study: str = ""  # names of study and trial, for metrics and logs
    label: str = ""
    labels: str | None = None
    until: int | None = None
    fork: Path | None = None

    @property
    def threads(self) -> int:
        """CPU threads of each worker."""
        return max(1, int(self.resources.cpus_per_worker))

    def open_labels(self, dataset: PatchDataset) -> PatchDataset:
        """The labelled data set, which is `dataset` where there is none apart.

        Raises:
            DataError: there is none. SettingsError: its images differ in shape or scale.
        """
        if self.labels is None:
            return dataset
        labels = PatchDataset.open(self.labels)
        check_fits(labels, dataset.spec, f"{dataset.path} holds")
        return labels


def run_job(job: Job, hooks: Hooks, member: Member = ALONE) -> PretrainResult:
    """Run a job as this member of its group, or go on where its folder says it stopped.

    Raises:
        CheckpointError: where the folder holds a run of other settings.
    """
    torch.set_num_threads(job.threads)
    dataset = PatchDataset.open(job.data)
    labels = job.open_labels(dataset)
    if job.settings.objective == "none":
        return _score_untrained(job, hooks, dataset, labels, is_first=member.is_first)
    batches = open_batches(
        dataset,
        batch_size=job.settings.batch_size,
        seed=job.settings.seed,
        mode=job.settings.data,
        rank=member.rank,
        world=member.world,
        epochs=job.settings.epochs if job.until is None else job.until,
    )
    truth = true_lesions(dataset, job.settings)
    tracked = _Tracked(job, hooks.report)
    if member.is_first:
        claim(job, dataset, labels)
        if not is_finished(job):
            _drop_ends(job.folder)
        if job.fork is not None and not checkpoints(job.folder):
            fork_checkpoint(job.fork, job.folder, job.settings)
        hooks = replace(hooks, evaluate=_evaluation(job, dataset, labels), report=tracked)
    if job.fork is not None and member.world > 1:
        dist.barrier()  # the others load what the first has copied
    try:
        result = pretrain(
            job.settings,
            batches,
            job.folder,
            hooks=hooks,
            device=member.device,
            truth=truth,
            until=job.until,
            resources=job.resources,
            faults=job.faults,
        )
    except BaseException:
        tracked.close(failed=True)
        raise
    tracked.close()
    if member.is_first and isinstance(result.model, MaskedAutoencoder):
        _draw(job, labels, result.model, max(1, result.epochs))
    return result


logger = logging.getLogger("amlp_ray")


class _Tracked:
    """Tells trackers of each epoch, then the runner. They are opened with the first, whose number is known then."""

    def __init__(self, job: Job, report: Callable[[Metrics], None]) -> None:
        check_tracking(job.tracking)
        self.job, self.report = job, report
        self.tracker: Tracker | None = None

    def __call__(self, metrics: Metrics) -> None:
        if self.tracker is None:
            self.tracker = open_trackers(
                self.job.folder,
                self.job.tracking,
                name=self.job.label or self.job.folder.name,
                parameters=_parameters(self.job.settings),
                group=self.job.study,
                resumed_epoch=max(0, metrics["epoch"] - 1),
                say=logger.warning,
            )
        self.tracker.log(metrics)
        self.report(metrics)

    def close(self, failed: bool = False) -> None:
        if self.tracker is not None:
            self.tracker.close(failed)


def _parameters(settings: PretrainSettings) -> dict[str, Any]:
    """Settings by dotted name, for servers; of a file of weights its name alone, since paths may tell of patients."""
    values = flat(settings.model_dump(mode="json"))
    if settings.weights is not None and not settings.weights.startswith(ONLINE):
        values["weights"] = Path(settings.weights).name
    return values


def claim(job: Job, dataset: PatchDataset, labels: PatchDataset | None = None) -> None:
    """Write the resolved settings and what data they apply to; refuse a folder that holds a run of others.

    A run that never came to its first epoch, such as for want of weights, holds nothing: its settings are replaced.

    Args:
        labels: where they are a data set apart.

    Raises:
        CheckpointError: the folder's run has other settings or other data.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    path, about = job.folder / "settings.yaml", job.folder / "data.json"
    begun = checkpoints(job.folder) or any(
        (job.folder / name).is_file() for name in ("metrics.jsonl", ENCODER)
    )
    if (
        begun
        and path.is_file()
        and _decisive(build(PretrainSettings, read_yaml(path), str(path)))
        != _decisive(job.settings)
    ):
        raise CheckpointError(
            f"{job.folder} holds a run with other settings (see its settings.yaml); use another folder or delete it."
        )
    data = _described(dataset) | {"image": dataset.spec.model_dump()}
    if labels is not None and labels is not dataset:
        data["labels"] = _described(labels)
    if begun and about.is_file():
        held = json.loads(about.read_text())
        # One of them may be missing in the other: a run scored by labels of its own is not one that was not.
        for ours, theirs in ((data, held), (data.get("labels", {}), held.get("labels", {}))):
            if ours.get("fingerprint") != theirs.get("fingerprint"):
                raise CheckpointError(
                    f"{job.folder} holds a run on other data ({theirs.get('path', 'no labels apart')}, prepared "
                    f"differently); use another folder."
                )
    write_yaml(job.settings, path)
    write_whole(about, json.dumps(data, indent=1))


def is_finished(job: Job) -> bool:
    """Whether the folder of the job holds all that it makes; in doubt, no."""
    objective, found = job.settings.objective, checkpoints(job.folder)
    last = job.settings.epochs if job.until is None else job.until
    trained = objective == "none" or (bool(found) and epoch_of(found[0]) == last)
    drawn = objective != "reconstruction" or (job.folder / PICTURES).is_dir()
    return trained and drawn and is_encoder(job.folder / ENCODER)


def _drop_ends(folder: Path) -> None:
    """Drop what a run made as it stopped early: killed after its last epoch, it would pass for what it has learnt."""
    (folder / ENCODER).unlink(missing_ok=True)
    shutil.rmtree(folder / PICTURES, ignore_errors=True)


def _decisive(settings: PretrainSettings) -> PretrainSettings:
    """What a run's result follows from: not how its images are read, which a smaller machine may do in another way."""
    return settings.model_copy(update={"data": "auto"})


def _described(dataset: PatchDataset) -> dict[str, Any]:
    return {"name": dataset.name, "path": dataset.path, "fingerprint": dataset.manifest.fingerprint}


def _evaluation(
    job: Job, dataset: PatchDataset, labels: PatchDataset
) -> Callable[[Model, int], Metrics]:
    """Diagnosis after every epoch and, at rungs, the probe's score."""
    patience = Patience.of(job.folder, job.faults, EventLog(job.folder))
    diagnosis = Diagnosis(labels, job.settings)
    probe = None
    if job.probe:
        from amlp_ray.evaluation.linear_probe import (
            Probe,  # takes a second to import, of which most runs have no use
        )

        probe = Probe(labels, job.probe, job.settings.model.patch_size, dataset.spec)

    def evaluate(model: Model, epoch: int) -> Metrics:
        seen = diagnosis(model, epoch) if epoch else {}
        if probe is None or epoch not in job.rungs:
            return seen
        score = probe.score(model.encoder)
        return seen | patience(
            lambda: _keep(job.folder, score, epoch), f"the score of epoch {epoch}"
        )

    return evaluate


def _keep(folder: Path, score: Score, epoch: int) -> Metrics:
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
    job: Job, hooks: Hooks, dataset: PatchDataset, labels: PatchDataset, *, is_first: bool
) -> PretrainResult:
    """The variant `scratch`: reported once, as epoch 0. With `weights`, it is these that nothing was added to."""
    model = new_model(job.settings, dataset.spec)[0].eval()
    encoder = job.folder / ENCODER
    metrics: Metrics = {"epoch": 0}
    if is_first:
        claim(job, dataset, labels)
        metrics |= _evaluation(job, dataset, labels)(model, 0)
        export_encoder(model.encoder, encoder, job.settings.model, dataset.spec)
    hooks.report(metrics)
    return PretrainResult(0, False, metrics, model, encoder)


def _draw(job: Job, dataset: PatchDataset, model: MaskedAutoencoder, epoch: int) -> None:
    """Draw images the model has not been trained on, with lesions where masks are known."""
    chosen = held_out(dataset, STRIPS)
    strips = picture_strips(
        model,
        torch.from_numpy(chosen.images),
        torch.from_numpy(chosen.keys),
        chosen.masks if chosen.labelled.all() else None,
        job.settings,
        epoch,
    )
    partial, folder = job.folder / f"{PICTURES}.partial", job.folder / PICTURES

    def write() -> None:
        partial.mkdir(exist_ok=True)
        for i, (name, strip) in enumerate(zip(chosen.ids, strips, strict=True)):
            strip.save(partial / f"{i}-{re.sub(r'[^A-Za-z0-9.-]+', '_', name)}.png")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)

    Patience.of(job.folder, job.faults, EventLog(job.folder))(write, "pictures")
