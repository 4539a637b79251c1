"""Studies as a driver leaves them, written with plain Optuna: no training, no Ray."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
import yaml
from optuna.trial import TrialState, create_trial

from amlp_ray.config import PretrainConfig, ProbeConfig, ResourceConfig, StudyConfig
from amlp_ray.config.base import build
from amlp_ray.config.yaml_file import write_yaml
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.launch.run_spec import RunSpec
from amlp_ray.study.storage.study_store import StudyStore
from helpers.tiny_study import TINY

RATIO = optuna.distributions.FloatDistribution(0.2, 0.5)
MODE = optuna.distributions.CategoricalDistribution(["hard", "soft"])
BEGUN = datetime(2026, 3, 1, 12)


def make_store(runs: Path, name: str = "tiny", **changes: Any) -> StudyStore:
    """A study that has begun and has no trial."""
    config = build(StudyConfig, {**TINY, "name": name, **changes}, "test")
    store = StudyStore(runs / name)
    store.folder.mkdir(parents=True)
    write_yaml(config, store.folder / "study.yaml")
    store.search(create=True)
    store.baselines(create=True)
    return store


def add(
    store: StudyStore,
    params: Mapping[str, Any] | None = None,
    values: float | Sequence[float] | None = 0.5,
    *,
    state: TrialState = TrialState.COMPLETE,
    rungs: Mapping[int, float] | None = None,
    study: optuna.Study | None = None,
    distributions: Mapping[str, Any] | None = None,
    **attributes: Any,
) -> int:
    """Store a trial and return its number; a finished one took ten seconds and four epochs."""
    study = study or store.search()
    params = {"ratio.start": 0.3, "selection.mode": "hard"} if params is None else dict(params)
    ranges = {"ratio.start": RATIO, "selection.mode": MODE, **(distributions or {})}
    scores = [values] if isinstance(values, float) else list(values or [])
    score = scores[0] if scores else None
    has_values = state.is_finished() and state != TrialState.FAIL
    if state.is_finished() and "stats" not in attributes and "source" not in attributes:
        attributes["stats"] = {
            "seconds": 10.0,
            "gpu_seconds": 36.0,
            "memory": 0.5,
            "epochs": 4,
            "scores": {"dsc": score},
        }
    if rungs is None and isinstance(score, float):
        rungs = {2: score - 0.1, 4: score}
    trial = create_trial(
        state=state,
        values=(scores or None) if has_values else None,
        params=params,
        distributions={name: ranges[name] for name in params},
        user_attrs=attributes,
        intermediate_values=dict(rungs or {}),
    )
    begun = BEGUN + timedelta(minutes=len(study.get_trials(deepcopy=False)))
    trial.datetime_start = begun
    if state.is_finished():
        trial.datetime_complete = begun + timedelta(seconds=10)
    return store.add_trial(study, trial).number


def add_baseline(store: StudyStore, baseline: str, repeat: int, value: float) -> None:
    attributes = {
        "baseline": baseline,
        "repeat": repeat,
        "uses_ground_truth": False,
        "path": f"baselines/{baseline}-{repeat}",
    }
    add(store, {}, value, study=store.baselines(), **attributes)


def note_data(store: StudyStore, fingerprint: str) -> None:
    """Say what data the study was begun on."""
    environment = {
        "started": "2026-03-01T12:00:00+00:00",
        "dataset": {"fingerprint": fingerprint},
        "eval_data": None,
    }
    (store.folder / "environment.json").write_text(json.dumps(environment))


def write_study(file: Path, **changes: Any) -> Path:
    """A study file."""
    file.write_text(yaml.safe_dump(TINY | changes))
    return file


def run_spec_of(folder: Path, dataset: PatchDataset, *, seed: int = 5, cpus: float = 1) -> RunSpec:
    """What a driver tells trial 0 of a study in this folder."""
    return RunSpec(
        study="tiny",
        label="trial 0",
        folder=folder / "trials" / "0",
        data=dataset.path,
        config=PretrainConfig.model_validate({**TINY["pretrain"], "seed": seed}),
        probe=ProbeConfig.model_validate(TINY["probe"]),
        resources=ResourceConfig(cpus_per_worker=cpus),
        rungs=(2, 4),
    )
