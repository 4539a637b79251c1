"""Check and record what must hold before a study is run or resumed."""

from __future__ import annotations

import json
import logging
from typing import Any

from optuna.trial import TrialState

from amlp_ray.config import BudgetConfig, StudyConfig
from amlp_ray.config.overrides import flatten
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.errors import StudyError
from amlp_ray.runtime.resources import Cluster
from amlp_ray.study.execution.monitor import limits_text
from amlp_ray.study.rungs import prunable_rungs
from amlp_ray.study.storage.provenance import environment
from amlp_ray.study.storage.study_store import StudyStore
from amlp_ray.study.storage.trial_record import trial_records
from amlp_ray.utils.files import append_line, atomic_write
from amlp_ray.utils.json_files import read_json, read_json_lines, seal_json

# Settings that may change between runs of one study. Data may be moved: its fingerprint is
# compared instead of its path.
CHANGEABLE = (
    "budget.",
    "resources.",
    "fault_tolerance.",
    "confirm.",
    "baselines",
    "baseline_seeds",
    "description",
    "data",
    "eval_data",
    "equivalence_margin",
    "sampler.suggest_ahead",
    "pretrain.data",
)

logger = logging.getLogger(__name__)


def with_budget(config: StudyConfig, store: StudyStore) -> StudyConfig:
    """Apply the budget that `extend` gave, and store the budget for whoever reads the study.

    It is applied only if the study's file still says what it said when the study was extended.
    """
    search = store.search()
    extended = search.user_attrs.get("extended") or {}
    budget = config.budget.model_dump(mode="json")
    if extended and budget == extended["from"] != extended["to"]:
        new_budget = BudgetConfig.model_validate(extended["to"])
        config = config.model_copy(update={"budget": new_budget})
        logger.info("budget as extended: %s", limits_text(extended["to"]))
    search.set_user_attr("budget", config.budget.model_dump(mode="json"))
    return config


def record_environment(
    config: StudyConfig,
    store: StudyStore,
    cluster: Cluster,
    dataset: PatchDataset,
    eval_data: PatchDataset | None,
) -> None:
    """Write what this run is run with to environments.jsonl, the first also to environment.json."""
    record = environment(config, dataset, cluster, eval_data, folder=store.folder)
    first_file = store.folder / "environment.json"
    if not first_file.exists():
        atomic_write(first_file, seal_json(record))
    append_line(store.folder / "environments.jsonl", json.dumps(record))


def log_pruning_notes(config: StudyConfig, images: int) -> None:
    """Log where pruning does not fit trials that train on this number of images."""
    base = config.trial({}, seed=0)
    pruner = config.pruner
    if pruner.name == "none":
        return
    if not prunable_rungs(base, pruner, images):
        message = "note: trials are too short for anything to be pruned (pruner.min_steps=%s)"
        logger.info(message, pruner.min_steps)
    elif pruner.schedule == "fixed" and base.ratio.shape != "fixed":
        logger.info(
            "note: the masking ratio's schedule spans all epochs, so an early rung has seen its "
            "beginning only (pruner.schedule=compress runs it whole up to each rung)"
        )


def check_unchanged(
    config: StudyConfig, store: StudyStore, dataset: PatchDataset, eval_data: PatchDataset | None
) -> None:
    """Raise StudyError if a study was begun on other data, or with settings that may not change."""
    if not (store.folder / "study.yaml").is_file():
        return
    _check_same_data(config, store, "data", dataset)
    _check_same_data(config, store, "eval_data", eval_data)
    stored = store.config()
    if config.storage == stored.storage and not _has_trials(store):
        return  # nothing was run with the stored settings
    values = flatten(config)
    stored_values = flatten(stored)
    names = sorted(values.keys() | stored_values.keys())
    changed = [name for name in names if values.get(name) != stored_values.get(name)]
    refused = [name for name in changed if not name.startswith(CHANGEABLE)]
    if refused:
        name = refused[0]
        more = f" ({len(refused) - 1} more differ)" if len(refused) > 1 else ""
        advice = ""
        if "space" in name:
            advice = " `amlp-ray study extend NAME --space FILE` takes a changed space."
        raise StudyError(
            f"Study {config.name!r} in {store.folder.parent} was begun with other settings: {name} "
            f"was {stored_values.get(name)!r} and is now {values.get(name)!r}{more}; give the "
            f"study another name, or restore the setting. Budget, resources and baselines may "
            f"change.{advice}"
        )


def _check_same_data(
    config: StudyConfig, store: StudyStore, setting: str, dataset: PatchDataset | None
) -> None:
    """Raise StudyError if a dataset has another fingerprint than environment.json says."""
    files = (store.folder / "environment.json", store.folder / "environments.jsonl")
    if not any(file.is_file() for file in files):
        return
    stored = _first_environment(store).get("dataset" if setting == "data" else setting) or {}
    fingerprint = None if dataset is None else dataset.manifest.fingerprint
    if fingerprint == stored.get("fingerprint"):
        return
    now = "the study names now" if dataset is None else f"{dataset.path} holds now"
    raise StudyError(
        f"Study {config.name!r} in {store.folder.parent} was begun on other {setting} than {now}; "
        f"restore {setting}, or give the study another name."
    )


def _first_environment(store: StudyStore) -> dict[str, Any]:
    """Read what the first run was run with.

    Raises:
        StudyError: environment.json is damaged, and so is its copy in environments.jsonl.
    """
    file = store.folder / "environment.json"
    copies = read_json_lines(store.folder / "environments.jsonl", {"dataset": dict})
    first = read_json(file) or next(iter(copies), {})
    if not isinstance(first.get("dataset"), dict):
        raise StudyError(
            f"{file} is damaged and does not say what data the study was begun on; restore it "
            f"from a backup, or give the study another name."
        )
    return first


def _has_trials(store: StudyStore) -> bool:
    records = [*trial_records(store.search()), *trial_records(store.baselines())]
    return any(r.counts_in_budget or r.state == TrialState.RUNNING for r in records)
