"""Train a trial again from what its folder says, and compare its scores to the digit.

On a CPU they are the same with the same code, packages, processor and number of threads. On a GPU
kernels may sum in any order, so the last digits may differ. What differs is reported.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from amlp_ray.config import PretrainConfig, ProbeConfig, ResourceConfig, StudyConfig
from amlp_ray.config.base import build
from amlp_ray.config.yaml_file import read_record
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.errors import StudyError
from amlp_ray.launch.run_spec import RunSpec
from amlp_ray.study.operations.trials import find_trial
from amlp_ray.study.storage.provenance import (
    commit,
    hardware,
    patch_name,
    read_provenance,
    versions,
)
from amlp_ray.study.storage.study_store import StudyStore, read_metrics
from amlp_ray.study.storage.trial_record import TrialRecord
from amlp_ray.training.loggers.metrics_file import Metrics

# Of the hardware; the number of cores changes nothing.
COMPARED_HARDWARE = ("machine", "processor", "capability", "device", "gpu", "cuda")
NOT_DETERMINISTIC = " does not have a deterministic"

logger = logging.getLogger(__name__)


def replay(
    store: StudyStore,
    config: StudyConfig,
    number: int,
    *,
    data: str | None = None,
    eval_data: str | None = None,
) -> dict[str, Any]:
    """Train a trial again up to its last rung, and compare the DSC of every rung.

    It is trained in a new folder `replays/<number>-<k>`. Each epoch is logged.

    Args:
        number: of the trial.
        data, eval_data: where the datasets lie now, if they were moved.

    Returns:
        `same`; `rungs` with epoch, was, is, same; `differs`: what is not as it was, in sentences;
        and `folder`.

    Raises:
        StudyError: the trial cannot be repeated from its folder alone, or the data are others.
    """
    record = find_trial(store, number)
    folder = store.folder_of(record)
    old_scores = _scores(folder)
    if obstacle := _obstacle(record, folder, old_scores):
        raise StudyError(f"Trial {number} of {store.name!r} {obstacle}")
    config_file = folder / "config.yaml"
    trial_config = read_record(PretrainConfig, config_file)
    provenance = read_provenance(folder) or {}
    dataset = _open_same_data(provenance, "dataset", data or config.data)
    scored = _open_same_data(provenance, "eval_data", eval_data or config.eval_data)
    assert dataset is not None
    rungs = tuple(sorted(old_scores))
    target = _create_folder(store, number)
    run_spec = RunSpec(
        config=trial_config,
        data=dataset.path,
        folder=target,
        probe=_probe(provenance, config),
        rungs=rungs,
        resources=ResourceConfig(cpus_per_worker=_threads(provenance, config)),
        label=target.name,
        eval_data=None if scored is None else scored.path,
        until=rungs[-1] if 0 < rungs[-1] < trial_config.epochs else None,
    )
    notes = differences(provenance)
    with _deterministic() as not_deterministic:
        _train(run_spec)
    compared = _compare_rungs(old_scores, _scores(target))
    return {
        "trial": number,
        "same": all(rung["same"] for rung in compared),
        "rungs": compared,
        "differs": [*notes, *not_deterministic],
        "folder": str(target),
    }


def _compare_rungs(
    old_scores: Mapping[int, float], new_scores: Mapping[int, float]
) -> list[dict[str, Any]]:
    compared = []
    for epoch, was in sorted(old_scores.items()):
        now = new_scores.get(epoch)
        compared.append({"epoch": epoch, "was": was, "is": now, "same": was == now})
    return compared


def _probe(provenance: Mapping[str, Any], config: StudyConfig) -> ProbeConfig:
    if "probe" not in provenance:
        return config.probe
    return build(ProbeConfig, provenance["probe"], "provenance.json")


def _threads(provenance: Mapping[str, Any], config: StudyConfig) -> int:
    stored = (provenance.get("hardware") or {}).get("threads")
    return int(stored or config.resources.threads)


def differences(provenance: Mapping[str, Any]) -> list[str]:
    """List what is not as a trial's provenance says; each of these may change digits."""
    if not provenance:
        return ["the trial has no provenance.json: what it was trained with is not known"]
    import torch

    notes = []
    old_code = (provenance.get("commit"), provenance.get("patch"))
    new_code = (commit(), patch_name())
    if old_code != new_code:
        notes.append(f"code: {_code_name(*old_code)} then, {_code_name(*new_code)} now")
    new_versions = versions()
    for package, version in provenance.get("versions", {}).items():
        if new_versions.get(package) != version:
            notes.append(f"{package}: {version} then, {new_versions.get(package)} now")
    old_hardware = provenance.get("hardware") or {}
    new_hardware = hardware("cuda" if torch.cuda.is_available() else "cpu")
    for key in COMPARED_HARDWARE:
        was, now = old_hardware.get(key), new_hardware.get(key)
        if was != now:
            notes.append(f"{key}: {was} then, {now} now")
    workers = old_hardware.get("workers", 1)
    if workers != 1:
        notes.append(f"workers: {workers} then, 1 now; sums over workers round differently")
    if old_hardware.get("device") == "cuda":
        notes.append(
            "trained on a GPU without deterministic algorithms: its last digits are not determined"
        )
    for part in provenance.get("continued", []):
        changed = [key for key in ("commit", "patch", "versions", "hardware") if key in part]
        if changed:
            notes.append(f"resumed after epoch {part['epoch']} with other {', '.join(changed)}")
    return notes


def _code_name(commit: str | None, patch: str | None) -> str:
    if commit is None:
        return "an installed package"
    return commit[:12] + (f" with {patch}" if patch else "")


def _obstacle(record: TrialRecord, folder: Path, scores: Mapping[int, float]) -> str | None:
    """Say why a trial cannot be repeated; None where it can."""
    if record.is_imported:
        return f"was imported from {record.source}; it was never run here."
    if record.is_copy:
        return f"was answered by trial {record.copy_of}; replay that one."
    if record.parent is not None:
        parent = record.parent
        return f"continued from the weights of trial {parent}, so it cannot be repeated alone."
    if not (folder / "config.yaml").is_file():
        return f"has no config.yaml in {folder}; it never began to train."
    if not scores:
        return "has no score that a replay could be compared with."
    return None


def _scores(folder: Path) -> dict[int, float]:
    """Return the DSC by epoch of the run in a folder."""
    return {row["epoch"]: row["dsc"] for row in read_metrics(folder) if "dsc" in row}


def _open_same_data(
    provenance: Mapping[str, Any], key: str, path: str | None
) -> PatchDataset | None:
    """Open a dataset; raise StudyError if the trial was trained with another."""
    if path is None:
        return None
    dataset = PatchDataset.open(path)
    stored = (provenance.get(key) or {}).get("fingerprint")
    if stored not in (None, dataset.manifest.fingerprint):
        option = "eval-data" if key == "eval_data" else "data"
        raise StudyError(
            f"{path} holds other {key.replace('dataset', 'data')} than the trial was trained with; "
            f"name those with --{option}."
        )
    return dataset


def _create_folder(store: StudyStore, number: int) -> Path:
    replays = store.folder / "replays"
    replays.mkdir(exist_ok=True)
    attempt = 0
    while True:
        folder = replays / f"{number}-{attempt}"
        try:
            folder.mkdir()
        except FileExistsError:
            attempt += 1
        else:
            return folder


def _train(run_spec: RunSpec) -> None:
    from amlp_ray.launch.launcher import run_here
    from amlp_ray.training.pretrain import Hooks

    def report(metrics: Metrics) -> None:
        score = f", DSC {metrics['dsc']}" if "dsc" in metrics else ""
        logger.info("epoch %d of %d%s", metrics["epoch"], run_spec.rungs[-1], score)

    run_here(run_spec, Hooks(report=report))


@contextmanager
def _deterministic() -> Iterator[list[str]]:
    """Use deterministic algorithms where torch has them.

    Yields:
        A list that names at the end what torch has none for.
    """
    import torch

    notes: list[str] = []
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    threads = torch.get_num_threads()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.filterwarnings("always", message=".*deterministic.*")
            yield notes
        for message in dict.fromkeys(str(warning.message) for warning in caught):
            if NOT_DETERMINISTIC in message:
                operation = message.partition(NOT_DETERMINISTIC)[0]
                notes.append(f"{operation} has no deterministic algorithm")
    finally:
        torch.use_deterministic_algorithms(was_deterministic)
        torch.set_num_threads(threads)
