"""Run one pretraining as one worker of a group, or alone: train, score at rungs, draw pictures."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from amlp_ray.config import PretrainConfig
from amlp_ray.config.overrides import flatten
from amlp_ray.config.yaml_file import read_record, write_record
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.data.loading.batches import open_batches
from amlp_ray.errors import CheckpointError
from amlp_ray.evaluation.diagnostics import Diagnostics, held_out, true_lesions
from amlp_ray.evaluation.labels import check_fits
from amlp_ray.launch.run_spec import RunSpec
from amlp_ray.method.autoencoder import MaskedAutoencoder
from amlp_ray.method.visualization import picture_strips
from amlp_ray.runtime.worker_context import SINGLE_WORKER, WorkerContext
from amlp_ray.training.checkpoint.export import ENCODER, export_encoder, is_encoder
from amlp_ray.training.checkpoint.manager import checkpoints, epoch_of
from amlp_ray.training.checkpoint.pretrained import ONLINE
from amlp_ray.training.checkpoint.restore import fork_checkpoint
from amlp_ray.training.loggers.loggers import LoggerGroup, check_tracking, open_loggers
from amlp_ray.training.objectives import Model
from amlp_ray.training.pretrain import Hooks, Metrics, PretrainResult, pretrain
from amlp_ray.training.train_state import new_model
from amlp_ray.utils.distributed import barrier
from amlp_ray.utils.files import atomic_write
from amlp_ray.utils.json_files import JsonError, parse_json_mapping, seal_json, unseal
from amlp_ray.utils.retry import RetryPolicy
from amlp_ray.utils.run_dir import RunDir

LOGGED_SCORES = ("dsc", "ppv", "sensitivity", "ap", "dsc_small", "dsc_medium", "dsc_large")
RESULTS = ("checkpoint/epoch-*.pt", "metrics.jsonl", ENCODER)  # of a run that has begun
PICTURES = "pictures"  # folder inside the run's folder
NUM_PICTURES = 4  # enough to judge by, small enough to keep for every trial


def run_job(
    run_spec: RunSpec, hooks: Hooks, worker: WorkerContext = SINGLE_WORKER
) -> PretrainResult:
    """Run a pretraining as this worker, or resume it where its folder says it stopped.

    Args:
        hooks: `report` and `should_stop` of the caller; `evaluate` is replaced.

    Raises:
        CheckpointError: the folder holds a run of another config or on other data.
    """
    torch.set_num_threads(run_spec.resources.threads)
    dataset = PatchDataset.open(run_spec.data)
    eval_data = open_eval_data(run_spec, dataset)
    if run_spec.config.objective == "none":
        return _score_untrained(run_spec, hooks, dataset, eval_data, worker.is_first)
    batches = open_batches(
        dataset,
        batch_size=run_spec.config.batch_size,
        seed=run_spec.config.seed,
        mode=run_spec.config.data,
        rank=worker.rank,
        world=worker.world,
        epochs=run_spec.last_epoch,
    )
    report = _TrackedReport(run_spec, hooks.report)
    if worker.is_first:
        _prepare_folder(run_spec, dataset, eval_data)
        evaluate = _make_evaluate(run_spec, dataset, eval_data)
        hooks = replace(hooks, evaluate=evaluate, report=report)
    if run_spec.fork is not None and worker.world > 1:
        # The others load what the first worker has copied, so they wait for it.
        barrier()
    try:
        result = pretrain(
            run_spec.config,
            batches,
            run_spec.folder,
            hooks=hooks,
            device=worker.device,
            truth=true_lesions(dataset, run_spec.config),
            until=run_spec.until,
            resources=run_spec.resources,
            fault_tolerance=run_spec.fault_tolerance,
        )
    except BaseException:
        report.close(failed=True)
        raise
    report.close()
    if worker.is_first and isinstance(result.model, MaskedAutoencoder):
        _draw_pictures(run_spec, eval_data, result.model, max(1, result.epochs))
    return result


def open_eval_data(run_spec: RunSpec, dataset: PatchDataset) -> PatchDataset:
    """Open the dataset that scores the run; without `eval_data` it is `dataset`.

    Raises:
        DataError: there is no such dataset. ConfigError: its images differ in shape or scale.
    """
    if run_spec.eval_data is None:
        return dataset
    eval_data = PatchDataset.open(run_spec.eval_data)
    check_fits(eval_data, dataset.spec, f"{dataset.path} holds")
    return eval_data


def _prepare_folder(run_spec: RunSpec, dataset: PatchDataset, eval_data: PatchDataset) -> None:
    claim(run_spec, dataset, eval_data)
    if not is_finished(run_spec):
        # Exported when the run was stopped early. If it is killed right after its last epoch, they
        # would pass for its results.
        (run_spec.folder / ENCODER).unlink(missing_ok=True)
        shutil.rmtree(run_spec.folder / PICTURES, ignore_errors=True)
    if run_spec.fork is not None and not checkpoints(run_spec.folder):
        fork_checkpoint(run_spec.fork, run_spec.folder, run_spec.config)


class _TrackedReport:
    """Log each epoch to the trackers, then report it.

    Trackers are opened with the first epoch, because only then its number is known.
    """

    def __init__(self, run_spec: RunSpec, report: Callable[[Metrics], None]) -> None:
        check_tracking(run_spec.tracking)
        self._run_spec = run_spec
        self._report = report
        self._tracker: LoggerGroup | None = None

    def __call__(self, metrics: Metrics) -> None:
        if self._tracker is None:
            run_spec = self._run_spec
            self._tracker = open_loggers(
                run_spec.folder,
                run_spec.tracking,
                name=run_spec.label or run_spec.folder.name,
                parameters=_logged_parameters(run_spec.config),
                group=run_spec.study,
                resumed_epoch=max(0, metrics["epoch"] - 1),
            )
        self._tracker.log(metrics)
        self._report(metrics)

    def close(self, failed: bool = False) -> None:
        """Close the trackers, if any were opened."""
        if self._tracker is not None:
            self._tracker.close(failed)


def _logged_parameters(config: PretrainConfig) -> dict[str, Any]:
    """Return settings by dotted name for servers; of a weights file only its name.

    Folder names may tell of patients.
    """
    values = flatten(config.model_dump(mode="json"))
    if config.weights is not None and not config.weights.startswith(ONLINE):
        values["weights"] = Path(config.weights).name
    return values


def claim(run_spec: RunSpec, dataset: PatchDataset, eval_data: PatchDataset | None = None) -> None:
    """Write the config and what data it applies to; refuse a folder that holds another run.

    A run that never reached its first epoch, for instance because its weights were missing, has
    produced nothing. Its config is replaced.

    Raises:
        CheckpointError: the folder's run has another config or other data.
    """
    folder = run_spec.folder
    folder.mkdir(parents=True, exist_ok=True)
    config_file = folder / "config.yaml"
    data_file = folder / "data.json"
    data = _describe(dataset) | {"image": dataset.spec.model_dump()}
    if eval_data is not None and eval_data is not dataset:
        data["eval_data"] = _describe(eval_data)
    if RunDir(folder, results=RESULTS).has_results:
        if config_file.is_file():
            _check_same_config(run_spec, config_file)
        if data_file.is_file():
            stored = _read_data_file(data_file)
            _check_same_data(folder, data, stored)
            # Either may lack it: a run scored by other images is not the run that was not.
            _check_same_data(folder, data.get("eval_data", {}), stored.get("eval_data", {}))
    write_record(run_spec.config, config_file)
    atomic_write(data_file, seal_json(data))


def _check_same_config(run_spec: RunSpec, config_file: Path) -> None:
    stored = read_record(PretrainConfig, config_file)
    # How images are read does not change the result, and a smaller machine may read otherwise.
    ignored = {"data": "auto"}
    if stored.model_copy(update=ignored) != run_spec.config.model_copy(update=ignored):
        raise CheckpointError(
            f"{run_spec.folder} holds a run with other settings (see its config.yaml); "
            f"use another folder or delete it."
        )


def _read_data_file(file: Path) -> dict[str, Any]:
    try:
        return unseal(parse_json_mapping(file.read_bytes()))
    except JsonError as error:
        raise CheckpointError(
            f"{file} {error}, so the data of the run are not known; restore it, or delete it if "
            f"they are those of this command."
        ) from None


def _check_same_data(folder: Path, data: dict[str, Any], stored: dict[str, Any]) -> None:
    if data.get("fingerprint") != stored.get("fingerprint"):
        raise CheckpointError(
            f"{folder} holds a run on other data ({stored.get('path', 'no eval_data')}, "
            f"prepared differently); use another folder."
        )


def _describe(dataset: PatchDataset) -> dict[str, Any]:
    fingerprint = dataset.manifest.fingerprint
    return {"name": dataset.name, "path": dataset.path, "fingerprint": fingerprint}


def is_finished(run_spec: RunSpec) -> bool:
    """Whether the run's folder holds everything that the run makes; in doubt, no."""
    folder = run_spec.folder
    if not is_encoder(folder / ENCODER):
        return False
    objective = run_spec.config.objective
    if objective == "none":
        return True
    newest = next(iter(checkpoints(folder)), None)
    if newest is None or epoch_of(newest) != run_spec.last_epoch:
        return False
    return objective != "reconstruction" or (folder / PICTURES).is_dir()


def _make_evaluate(
    run_spec: RunSpec, dataset: PatchDataset, eval_data: PatchDataset
) -> Callable[[Model, int], Metrics]:
    """Return a function that computes diagnostics every epoch and the probe's score at rungs."""
    minutes = run_spec.fault_tolerance.storage_minutes
    retries = RetryPolicy(run_spec.folder, minutes=minutes)
    diagnostics = Diagnostics(eval_data, run_spec.config)
    probe = None
    if run_spec.probe:
        # Importing it takes a second, and most runs have no probe.
        from amlp_ray.evaluation.linear_probe import Probe

        probe = Probe(eval_data, run_spec.probe, run_spec.config.model.patch_size, dataset.spec)

    def evaluate(model: Model, epoch: int) -> Metrics:
        metrics = diagnostics(model, epoch) if epoch else {}
        if probe is None or epoch not in run_spec.rungs:
            return metrics
        score = asdict(probe.score(model.encoder))
        text = seal_json({"epoch": epoch, **score})

        def write() -> None:
            rungs = run_spec.folder / "rungs"
            rungs.mkdir(exist_ok=True)
            atomic_write(rungs / f"{epoch}.json", text)
            atomic_write(run_spec.folder / "score.json", text)

        retries.run(write, f"the score of epoch {epoch}")
        # Sizes of lesions that no image has are None.
        return metrics | {name: score[name] for name in LOGGED_SCORES if score[name] is not None}

    return evaluate


def _score_untrained(
    run_spec: RunSpec, hooks: Hooks, dataset: PatchDataset, eval_data: PatchDataset, is_first: bool
) -> PretrainResult:
    """Score the variant `scratch`, which is reported once, as epoch 0.

    With `weights` these are scored as they are.
    """
    model = new_model(run_spec.config, dataset.spec)[0].eval()
    encoder_file = run_spec.folder / ENCODER
    metrics: Metrics = {"epoch": 0}
    if is_first:
        claim(run_spec, dataset, eval_data)
        metrics |= _make_evaluate(run_spec, dataset, eval_data)(model, 0)
        export_encoder(model.encoder, encoder_file, run_spec.config.model, dataset.spec)
    hooks.report(metrics)
    return PretrainResult(0, False, metrics, model, encoder_file)


def _draw_pictures(
    run_spec: RunSpec, dataset: PatchDataset, model: MaskedAutoencoder, epoch: int
) -> None:
    """Draw images that the model was not trained on, with lesions where masks are known."""
    images = held_out(dataset, NUM_PICTURES)
    strips = picture_strips(
        model,
        torch.from_numpy(images.images),
        torch.from_numpy(images.keys),
        images.masks if images.labeled.all() else None,
        run_spec.config,
        epoch,
    )
    folder = run_spec.folder / PICTURES
    partial = run_spec.folder / f"{PICTURES}.partial"

    def write() -> None:
        partial.mkdir(exist_ok=True)
        for i, (name, strip) in enumerate(zip(images.ids, strips, strict=True)):
            file_name = re.sub(r"[^A-Za-z0-9.-]+", "_", name)
            strip.save(partial / f"{i}-{file_name}.png")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)

    minutes = run_spec.fault_tolerance.storage_minutes
    RetryPolicy(run_spec.folder, minutes=minutes).run(write, "pictures")
