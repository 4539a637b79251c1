"""What must hold, and what is noted, before a study is run or gone on with."""

from __future__ import annotations

import json
from collections.abc import Callable

from amlp_ray.config import StudyConfig
from amlp_ray.config.overrides import flat
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.errors import StudyError
from amlp_ray.runtime.resources import Cluster
from amlp_ray.study.rungs import prunable_rungs
from amlp_ray.study.storage.budget import counts_in_budget
from amlp_ray.study.storage.provenance import environment
from amlp_ray.study.storage.study_store import StudyStore
from amlp_ray.utils.files import write_whole

Notify = Callable[[str], None]

# What may change between runs of one study; data may be moved, and its fingerprint is compared instead of its path.
CHANGEABLE = (
    "budget.", "resources.", "faults.", "confirm.", "baselines", "baseline_seeds", "description", "data", "num_labeled", "equivalence_margin",
    "sampler.suggest_ahead", "pretrain.data",
)  # fmt: skip


def with_budget(config: StudyConfig, store: StudyStore, log: Notify) -> StudyConfig:
    """The settings with what `extend` gave, where the study's file still says what it said then; told to the store."""
    search = store.search()
    extended = search.user_attrs.get("extended") or {}
    asked = config.budget.model_dump(mode="json")
    if extended and asked == extended["from"] != extended["to"]:
        budget = type(config.budget).model_validate(extended["to"])
        config = config.model_copy(update={"budget": budget})
        log(
            "budget as extended: "
            + ", ".join(f"{k} {v:g}" for k, v in extended["to"].items() if v is not None)
        )
    search.set_user_attr("budget", config.budget.model_dump(mode="json"))
    return config


def note_environment(
    config: StudyConfig,
    store: StudyStore,
    cluster: Cluster,
    dataset: PatchDataset,
    eval_data: PatchDataset | None,
) -> None:
    """Keep what this run is run with: of the first in environment.json, of all in environments.jsonl."""
    found = environment(config, dataset, cluster, eval_data, folder=store.folder)
    first = store.folder / "environment.json"
    if not first.exists():
        write_whole(first, json.dumps(found, indent=1))
    with (store.folder / "environments.jsonl").open("a") as file:
        file.write(json.dumps(found) + "\n")


def note_pruning(config: StudyConfig, images: int, log: Notify) -> None:
    """Say how pruning and the masking ratio's schedule go together. Args: images: that a trial trains on."""
    base, pruner = config.trial({}, seed=0), config.pruner
    if pruner.name == "none":
        return
    if not prunable_rungs(base, pruner, images):
        log(
            f"note: trials are too short for anything to be pruned (pruner.min_steps={pruner.min_steps})"
        )
    elif pruner.schedule == "fixed" and base.ratio.shape != "fixed":
        log(
            "note: the masking ratio's schedule spans all epochs, so an early rung has seen its beginning only "
            "(pruner.schedule=compress runs it whole up to each rung)"
        )


def check_unchanged(
    config: StudyConfig, store: StudyStore, dataset: PatchDataset, eval_data: PatchDataset | None
) -> None:
    """Raise StudyError where a study was begun on other data, or with settings that may not change."""
    if not (store.folder / "study.yaml").is_file():
        return
    about = store.folder / "environment.json"
    if about.is_file():
        held = json.loads(about.read_text())
        for name, now in (("dataset", dataset), ("num_labeled", eval_data)):
            fingerprint = None if now is None else now.manifest.fingerprint
            if fingerprint != (held.get(name) or {}).get("fingerprint"):
                what = "num_labeled" if name == "num_labeled" else "data"
                raise StudyError(
                    f"Study {config.name!r} in {store.folder.parent} was begun on other {what} than "
                    + (f"{dataset.path} has of its own" if now is None else f"{now.path} holds now")
                    + f"; restore the {what}, or give the study another name."
                )
    if config.storage == store.config().storage and not any(
        counts_in_budget(trial)
        for study in (store.search(), store.baselines())
        for trial in study.get_trials(deepcopy=False)
    ):
        return  # nothing was run by the settings that are held
    ours, theirs = flat(config), flat(store.config())
    changed = sorted(
        name
        for name in ours.keys() | theirs.keys()
        if ours.get(name) != theirs.get(name) and not name.startswith(CHANGEABLE)
    )
    if changed:
        name = changed[0]
        space = (
            " A changed space goes on by `amlp-ray study extend NAME --space FILE`."
            if "space" in name
            else ""
        )
        raise StudyError(
            f"Study {config.name!r} in {store.folder.parent} was begun with other settings: {name} was "
            f"{theirs.get(name)!r} and is now {ours.get(name)!r}"
            + (f" ({len(changed) - 1} more differ)" if len(changed) > 1 else "")
            + "; give the study another name, or restore the setting. Budget, resources and baselines may change."
            + space
        )
