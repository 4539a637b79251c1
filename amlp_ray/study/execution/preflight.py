"""Check and record what must hold before a study is run or resumed."""

from __future__ import annotations

import json
import logging

from amlp_ray.config import StudyConfig
from amlp_ray.config.overrides import flatten
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.errors import StudyError
from amlp_ray.runtime.resources import Cluster
from amlp_ray.study.execution.monitor import limits_text
from amlp_ray.study.rungs import prunable_rungs
from amlp_ray.study.storage.provenance import environment
from amlp_ray.study.storage.study_store import StudyStore
from amlp_ray.study.storage.trial_record import trial_records
from amlp_ray.utils.files import atomic_write

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
        config = config.model_copy(
            update={"budget": type(config.budget).model_validate(extended["to"])}
        )
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
        atomic_write(first_file, json.dumps(record, indent=1))
    with (store.folder / "environments.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")


def log_pruning_notes(config: StudyConfig, images: int) -> None:
    """Log where pruning does not fit the trials.

    Args:
        config: of the study.
        images: number of images that a trial trains on.
    """
    base = config.trial({}, seed=0)
    pruner = config.pruner
    if pruner.name == "none":
        return
    if not prunable_rungs(base, pruner, images):
        logger.info(
            "note: trials are too short for anything to be pruned (pruner.min_steps=%s)",
            pruner.min_steps,
        )
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
    _check_same_data(config, store, "data", "dataset", dataset)
    _check_same_data(config, store, "eval_data", "eval_data", eval_data)
    stored = store.config()
    if config.storage == stored.storage and not _has_trials(store):
        return  # nothing was run with the stored settings
    values = flatten(config)
    stored_values = flatten(stored)
    changed = []
    for name in sorted(values.keys() | stored_values.keys()):
        if values.get(name) != stored_values.get(name) and not name.startswith(CHANGEABLE):
            changed.append(name)
    if changed:
        name = changed[0]
        more = f" ({len(changed) - 1} more differ)" if len(changed) > 1 else ""
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
    config: StudyConfig,
    store: StudyStore,
    setting: str,
    key: str,
    dataset: PatchDataset | None,
) -> None:
    """Compare the fingerprint of a dataset with that in environment.json.

    Args:
        config: of the study.
        store: of the study.
        setting: the study's setting that names the dataset.
        key: of the dataset in environment.json.
        dataset: as it is now; None if the study has none.
    """
    file = store.folder / "environment.json"
    if not file.is_file():
        return
    stored = json.loads(file.read_text()).get(key) or {}
    fingerprint = None if dataset is None else dataset.manifest.fingerprint
    if fingerprint == stored.get("fingerprint"):
        return
    now = "the study names now" if dataset is None else f"{dataset.path} holds now"
    raise StudyError(
        f"Study {config.name!r} in {store.folder.parent} was begun on other {setting} than {now}; "
        f"restore {setting}, or give the study another name."
    )


def _has_trials(store: StudyStore) -> bool:
    for study in (store.search(), store.baselines()):
        if any(record.counts_in_budget for record in trial_records(study)):
            return True
    return False
