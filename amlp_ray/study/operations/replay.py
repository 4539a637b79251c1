"""A trial again, from what its folder says of it: does it give the same scores, to the digit?

On a CPU it does, with the same code, packages, processor and number of threads. On a GPU kernels may sum in any order,
so a trial that was trained without deterministic algorithms may differ in its last digits; what differs is told.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial

from amlp_ray.config import PretrainConfig, ProbeConfig, ResourceConfig, StudyConfig
from amlp_ray.config.base import build
from amlp_ray.config.yaml_file import read_yaml
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.errors import StudyError
from amlp_ray.study.operations.trials import find_trial, folder_of
from amlp_ray.study.storage.provenance import (
    commit,
    hardware,
    patch_name,
    read_provenance,
    versions,
)
from amlp_ray.study.storage.study_store import StudyStore
from amlp_ray.training.loggers.metrics_file import Metrics, read_rows

COMPARED = (
    "machine",
    "processor",
    "capability",
    "device",
    "gpu",
    "cuda",
)  # of the hardware; cores as such change nothing


def replay(
    store: StudyStore,
    config: StudyConfig,
    number: int,
    *,
    data: str | None = None,
    eval_data: str | None = None,
    notify: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Train a trial again up to its last rung, in a new folder `replays/<number>-<k>`, and compare every rung's DSC.

    Args:
        data, labels: where these lie now, if not where they were.
        notify: gets a line per epoch.

    Returns:
        `same`, `rungs` (epoch, was, is, same), `differs`: what is not as it was, in sentences, and `folder`.

    Raises:
        StudyError: the trial cannot be repeated from its folder alone, and why; or the data are others.
    """
    trial = find_trial(store, number)
    folder = folder_of(store, trial)
    _check_repeatable(store, trial, folder)
    own = build(PretrainConfig, read_yaml(folder / "config.yaml"), str(folder / "config.yaml"))
    was = _scores(folder)
    if not was:
        raise StudyError(
            f"Trial {number} of {store.name!r} has no score that a replay could be compared with."
        )
    about = read_provenance(folder) or {}
    dataset = _same_data(about, "dataset", data or config.data)
    label_set = _same_data(about, "eval_data", eval_data or config.eval_data)
    assert dataset is not None
    threads = int(
        (about.get("hardware") or {}).get("threads")
        or max(1, int(config.resources.cpus_per_worker))
    )
    probe = (
        build(ProbeConfig, about["probe"], "provenance.json") if "probe" in about else config.probe
    )
    target = _next_folder(store, number)
    notes = differences(about, threads=threads)
    with _deterministic() as undetermined:
        _train(own, dataset, label_set, target, probe, tuple(sorted(was)), threads, notify)
    now = _scores(target)
    rungs = [
        {"epoch": e, "was": v, "is": now.get(e), "same": v == now.get(e)}
        for e, v in sorted(was.items())
    ]
    return {
        "trial": number,
        "same": all(rung["same"] for rung in rungs),
        "rungs": rungs,
        "differs": [*notes, *undetermined],
        "folder": str(target),
    }


def differences(about: Mapping[str, Any], *, threads: int) -> list[str]:
    """What is not now as a trial's provenance says that it was; each of these may change digits."""
    if not about:
        return ["the trial has no provenance.json: what it was trained with is not known"]
    import torch

    told = []
    if (about.get("commit"), about.get("patch")) != (commit(), patch_name()):
        told.append(
            f"code: {_code(about.get('commit'), about.get('patch'))} then, {_code(commit(), patch_name())} now"
        )
    here = versions()
    told += [
        f"{k}: {v} then, {here.get(k)} now"
        for k, v in about.get("versions", {}).items()
        if here.get(k) != v
    ]
    then = about.get("hardware") or {}
    machine = hardware("cuda" if torch.cuda.is_available() else "cpu")
    told += [
        f"{k}: {then.get(k)} then, {machine.get(k)} now"
        for k in COMPARED
        if then.get(k) != machine.get(k)
    ]
    if then.get("workers", 1) > 1:
        told.append(f"workers: {then['workers']} then, 1 now; sums over workers round differently")
    if then.get("device") == "cuda":
        told.append(
            "trained on a GPU without deterministic algorithms: its last digits are not determined"
        )
    for part in about.get("continued", []):
        other = [key for key in ("commit", "patch", "versions", "hardware") if key in part]
        if other:
            told.append(f"went on after epoch {part['epoch']} with other {', '.join(other)}")
    return told


def _code(name: str | None, patch: str | None) -> str:
    return (
        "an installed package" if name is None else name[:12] + (f" with {patch}" if patch else "")
    )


def _check_repeatable(store: StudyStore, trial: FrozenTrial, folder: Path) -> None:
    about, number = trial.user_attrs, trial.number
    if "source" in about:
        raise StudyError(
            f"Trial {number} of {store.name!r} was imported from {about['source']}; it was never run here."
        )
    if "copy_of" in about:
        raise StudyError(
            f"Trial {number} of {store.name!r} was answered by trial {about['copy_of']}; replay that one."
        )
    if about.get("parent") is not None:
        raise StudyError(
            f"Trial {number} of {store.name!r} went on from the weights of trial {about['parent']}, so it cannot be "
            f"repeated alone."
        )
    if not (folder / "config.yaml").is_file():
        raise StudyError(
            f"Trial {number} of {store.name!r} has no config.yaml in {folder}; it never began to train."
        )


def _scores(folder: Path) -> dict[int, float]:
    """DSC by epoch, as trained in this folder."""
    return {row["epoch"]: row["dsc"] for row in read_rows(folder / "metrics.jsonl") if "dsc" in row}


def _same_data(about: Mapping[str, Any], which: str, path: str | None) -> PatchDataset | None:
    if path is None:
        return None
    found = PatchDataset.open(path)
    then = (about.get(which) or {}).get("fingerprint")
    if then not in (None, found.manifest.fingerprint):
        what = "eval_data" if which == "eval_data" else "data"
        raise StudyError(
            f"{path} holds other {what} than the trial was trained with; name those with --{what}."
        )
    return found


def _next_folder(store: StudyStore, number: int) -> Path:
    replays = store.folder / "replays"
    replays.mkdir(exist_ok=True)
    k = 0
    while True:
        try:
            (folder := replays / f"{number}-{k}").mkdir()
        except FileExistsError:
            k += 1
        else:
            return folder


def _train(
    config: PretrainConfig,
    dataset: PatchDataset,
    eval_data: PatchDataset | None,
    folder: Path,
    probe: ProbeConfig,
    rungs: tuple[int, ...],
    threads: int,
    notify: Callable[[str], None],
) -> None:
    from amlp_ray.launch.job import RunSpec
    from amlp_ray.launch.launcher import run_here
    from amlp_ray.training.pretrain import Hooks

    def report(metrics: Metrics) -> None:
        scored = f", DSC {metrics['dsc']}" if "dsc" in metrics else ""
        notify(f"epoch {metrics['epoch']} of {rungs[-1]}{scored}")

    run_spec = RunSpec(
        config,
        dataset.path,
        folder,
        probe,
        rungs,
        resources=ResourceConfig(cpus_per_worker=threads),
        label=folder.name,
        eval_data=None if eval_data is None else eval_data.path,
        until=rungs[-1] if 0 < rungs[-1] < config.epochs else None,
    )
    run_here(run_spec, Hooks(report=report))


@contextmanager
def _deterministic() -> Iterator[list[str]]:
    """Only deterministic algorithms, where torch has them; yields what it has none for, filled in at the end."""
    import torch

    told: list[str] = []
    before, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.filterwarnings("always", message=".*deterministic.*")
            yield told
        lacking = " does not have a deterministic"
        messages = dict.fromkeys(str(warning.message) for warning in caught)
        told += [
            f"{m.partition(lacking)[0]} has no deterministic algorithm"
            for m in messages
            if lacking in m
        ]
    finally:
        torch.use_deterministic_algorithms(before)
        torch.set_num_threads(threads)
