"""Confirmation: the best trials and every baseline again, over several seeds, by both protocols, and one look at test.

Trials of a search were chosen by the probe on val, so their scores there are optimistic, and each is one run of one
seed. Here candidates are trained anew over seeds that they share, repeat by repeat; they are scored on val by the probe
and by fine-tuning. Test images are opened when all runs have ended, once: what is opened is written down before it is
read, and no other candidate is scored on them afterwards. So what the test says of a candidate can have chosen nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from amlp_ray.config import ABLATIONS, PretrainConfig, SegmentConfig, StudyConfig, baseline_names
from amlp_ray.config.base import build
from amlp_ray.config.yaml_file import read_yaml
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.errors import ConfigError, DataError, StudyError
from amlp_ray.evaluation.confirmation_run import SEGMENTER
from amlp_ray.study.baselines import BaselinePlan, BySeed, baseline_plan
from amlp_ray.study.rungs import with_schedule
from amlp_ray.study.search_space.values import config_of_trial
from amlp_ray.study.seeds import derived_seed
from amlp_ray.study.storage.best_trials import keeps_limits
from amlp_ray.study.storage.budget import counts_in_budget
from amlp_ray.study.storage.provenance import commit
from amlp_ray.study.storage.study_store import StudyStore
from amlp_ray.utils.files import write_whole

OPENED = "test_opened"  # user attribute of the confirmation's Optuna study
_CONTROL = re.compile(rf"^({'|'.join(ABLATIONS)})-of-trial-(\d+)$")
_TRIAL = re.compile(r"^trial-(\d+)$")


@dataclass(frozen=True)
class Candidate:
    """What is confirmed: a trial of the search (`trial-7`), a baseline, or a control of a trial (`oracle-of-trial-7`)."""

    name: str
    about: str
    diagnosis: bool  # uses true masks: shown, and never part of a verdict
    params: Mapping[str, Any]  # what the search chose; empty for a baseline
    config: BySeed


# Choosing


def confirmation_plan(store: StudyStore, config: StudyConfig) -> list[Candidate]:
    """Who is confirmed: what was begun already, then the best trials of the search as it is now, then all baselines.

    When the test images have been opened, those that were scored on them and nobody else.

    Raises:
        StudyError: no trial is complete.
    """
    return [candidate for candidate in _plan(store, config) if isinstance(candidate, Candidate)]


def confirmation_notes(store: StudyStore, config: StudyConfig) -> list[str]:
    """Controls that a confirmation leaves out, since they would change nothing of the best trial, a sentence each."""
    return [note for note in _plan(store, config) if isinstance(note, str)]


def confirm_seed(config: StudyConfig, repeat: int) -> int:
    """Seed of a repeat, the same for all candidates, so that they are compared in pairs."""
    return derived_seed(config.seed, "confirm", repeat)


def finetuning(config: StudyConfig, repeat: int) -> SegmentConfig:
    """How a repeat is fine-tuned; its seed is the same for all candidates too."""
    seed = derived_seed(config.seed, "finetune", repeat)
    return config.confirm.finetune.model_copy(update={"seed": seed})


def top_trials(store: StudyStore, config: StudyConfig) -> list[FrozenTrial]:
    """The best `confirm.top` of the complete trials, by the study's metric on val; of equal settings the first.

    Trials within `limits` where there are any; segments of a population count at their full length only.

    Raises:
        StudyError: there is none.
    """
    full = [trial for trial in store.search().get_trials(deepcopy=False) if _is_whole(store, trial)]
    ranked = sorted(
        [trial for trial in full if keeps_limits(trial, config)] or full,
        key=lambda trial: (-_value(trial, config), trial.number),
    )
    chosen: dict[str, FrozenTrial] = {}
    for trial in ranked:
        if len(chosen) == config.confirm.top:
            break
        chosen.setdefault(_trial_settings(store, config, trial)(0).model_dump_json(), trial)
    if not chosen:
        raise StudyError(
            f"Study {config.name!r} has no trial of full length to confirm; run it on with `amlp-ray study run`."
        )
    return list(chosen.values())


def _plan(store: StudyStore, config: StudyConfig) -> list[Candidate | str]:
    trials = store.search().get_trials(deepcopy=False)
    study = store.confirmation()
    opened = study.user_attrs.get(OPENED)
    if opened is not None:
        names = list(opened["candidates"])
    else:
        begun = [trial.user_attrs["candidate"] for trial in study.get_trials(deepcopy=False)]
        top = top_trials(store, config)
        baselines = [
            f"{baseline}-of-trial-{top[0].number}" if baseline in ABLATIONS else baseline
            for baseline in baseline_names(config.baselines)
        ]
        names = list(
            dict.fromkeys([*begun, *(f"trial-{trial.number}" for trial in top), *baselines])
        )
    plan: list[Candidate | str] = []
    for name in names:
        try:
            plan.append(_candidate(store, config, trials, name))
        except ConfigError as error:
            plan.append(f"{name} is left out: {error}")
    return plan


def _candidate(
    store: StudyStore, config: StudyConfig, trials: list[FrozenTrial], name: str
) -> Candidate:
    if match := _TRIAL.match(name):
        trial = trials[int(match[1])]
        return Candidate(name, "", False, trial.params, _trial_settings(store, config, trial))
    if match := _CONTROL.match(name):
        reference = _trial_settings(store, config, trials[int(match[2])])
        return _of_arm(name, baseline_plan(config, match[1], reference))
    if name in baseline_names(config.baselines):
        return _of_arm(name, baseline_plan(config, name))
    raise ConfigError(f"baselines of {config.name} no longer names it.")


def _of_arm(name: str, plan: BaselinePlan) -> Candidate:
    return Candidate(name, plan.about, plan.diagnosis, {}, plan.config)


def _trial_settings(store: StudyStore, config: StudyConfig, trial: FrozenTrial) -> BySeed:
    """As its folder has them, so that a space that was changed since changes nothing; else from its parameters."""
    path = store.trial_folder(trial.number) / "config.yaml"
    if path.is_file():
        found = build(PretrainConfig, read_yaml(path), str(path))
    else:
        found = with_schedule(
            config.trial(config_of_trial(trial.params, config), seed=0), config.pruner
        )
    return lambda seed: found.model_copy(update={"seed": seed})


def _is_whole(store: StudyStore, trial: FrozenTrial) -> bool:
    if (
        trial.state != TrialState.COMPLETE
        or not counts_in_budget(trial)
        or not trial.intermediate_values
    ):
        return False
    if "generation" not in trial.user_attrs:
        return True
    path = (
        store.trial_folder(trial.number) / "config.yaml"
    )  # a segment of population-based training
    return path.is_file() and max(trial.intermediate_values) >= read_yaml(path)["epochs"]


def _value(trial: FrozenTrial, config: StudyConfig) -> float:
    """Its score by the study's metric."""
    if config.metric in config.objectives:
        return float(trial.values[list(config.objectives).index(config.metric)])
    return float(trial.intermediate_values[max(trial.intermediate_values)])


# Running


# Test


@dataclass(frozen=True)
class TestUnlock:
    """What the store says of the test images: when they were opened, by which code, and who was scored on them."""

    when: str
    commit: str | None
    candidates: tuple[str, ...]
    runs: dict[str, str]  # folder by name, such as `mae-2`; relative to the study's
    now: bool  # by this call


def find_test_unlock(store: StudyStore) -> TestUnlock | None:
    """What the store says; None while the test images were not opened."""
    held = store.confirmation().user_attrs.get(OPENED)
    return (
        None
        if held is None
        else TestUnlock(**{**held, "candidates": tuple(held["candidates"])}, now=False)
    )


def open_test(
    store: StudyStore,
    config: StudyConfig,
    eval_data: PatchDataset,
    *,
    notify: Callable[[str], None] = lambda line: None,
    device: str = "cpu",
) -> TestUnlock:
    """Score all confirmation runs on the test images by both protocols; `test.json` of each run holds both.

    Once: a second call opens nothing for anybody else. It finishes what a killed one left, and returns what is there.

    Args:
        labels: the data set that scores.
        notify: gets a line where there is something to tell.

    Raises:
        StudyError: runs are missing. DataError: there are no test images with a lesion.
    """
    held = find_test_unlock(store)
    if held is None:
        held = _open(store, config, eval_data)
    else:
        notify(
            f"test images were opened on {held.when} for {', '.join(held.candidates)}; nobody else is scored on them"
        )
    score = _scorer(config, eval_data, device)
    for name, path in held.runs.items():
        folder = store.folder / path
        if not (folder / "test.json").is_file():
            notify(f"{name}: scored on test")
            write_whole(folder / "test.json", json.dumps(score(folder)))
    return held


def _open(store: StudyStore, config: StudyConfig, eval_data: PatchDataset) -> TestUnlock:
    """Check that everything has ended, and write down what is opened, before anything is read."""
    study = store.confirmation()
    ended = {
        (t.user_attrs["candidate"], t.user_attrs["repeat"]): t
        for t in study.get_trials(deepcopy=False)
    }
    names = [candidate.name for candidate in confirmation_plan(store, config)]
    wanted = [(name, repeat) for name in names for repeat in range(config.confirm.seeds)]
    open_ones = [key for key in wanted if key not in ended or not ended[key].state.is_finished()]
    if open_ones:
        raise StudyError(
            f"Study {config.name!r} has {len(open_ones)} of {len(wanted)} confirmation runs left, such as "
            f"{open_ones[0][0]}-{open_ones[0][1]}; finish them with `amlp-ray study confirm` before the test is opened."
        )
    done = {
        f"{name}-{repeat}": (name, repeat)
        for name, repeat in wanted
        if _is_done(store, ended[name, repeat])
    }
    if not done:
        raise StudyError(
            f"No confirmation run of study {config.name!r} is complete; see its trials for the reasons."
        )
    _check_alike(config, [store.confirm_folder(*key) for key in done.values()])
    if not eval_data.manifest.counts["test"].lesions:
        raise DataError(
            f"{eval_data.path} has no labelled test image with a lesion, so nothing can be confirmed on it."
        )
    opening = TestUnlock(
        when=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=commit(),
        candidates=tuple(names),
        runs={
            run: str(store.confirm_folder(*key).relative_to(store.folder))
            for run, key in done.items()
        },
        now=True,
    )
    record = {name: value for name, value in asdict(opening).items() if name != "now"}
    store.confirmation(create=True).set_user_attr(OPENED, record | {"candidates": names})
    return opening


def _check_alike(config: StudyConfig, folders: list[Path]) -> None:
    """Raise StudyError where a run was fine-tuned by other settings than `confirm.finetune`: they may be changed."""
    for folder in folders:
        path = folder / SEGMENTER / "config.yaml"
        held = build(SegmentConfig, read_yaml(path), str(path))
        if held.model_copy(update={"seed": 0}) != config.confirm.finetune.model_copy(
            update={"seed": 0}
        ):
            raise StudyError(
                f"{folder} was fine-tuned with other settings than confirm.finetune has now, so it cannot be compared; "
                f"restore them as its {SEGMENTER}/config.yaml has them."
            )


def _is_done(store: StudyStore, trial: FrozenTrial) -> bool:
    folder = store.confirm_folder(trial.user_attrs["candidate"], trial.user_attrs["repeat"])
    return trial.state == TrialState.COMPLETE and (folder / "finetune.json").is_file()


def _scorer(
    config: StudyConfig, eval_data: PatchDataset, device: str
) -> Callable[[Path], dict[str, Any]]:
    """Scores of a run's folder on test: the probe's heads and the segmenter, as they were fitted on train."""
    from amlp_ray.evaluation.evaluate import score_segmenter
    from amlp_ray.evaluation.linear_probe import Probe
    from amlp_ray.training.checkpoint.export import load_encoder, read_encoder_header

    probes: dict[str, Probe] = {}  # each holds the images

    def score(folder: Path) -> dict[str, Any]:
        encoder = folder / "encoder.safetensors"
        model, spec = read_encoder_header(encoder)
        key = f"{model.patch_size} {spec.model_dump_json()}"
        if key not in probes:
            probes[key] = Probe(eval_data, config.probe, model.patch_size, spec)
        probed = probes[key].score(load_encoder(encoder).to(device), "test").as_dict()
        tuned = score_segmenter(
            eval_data, folder / SEGMENTER, "test", sizes=config.probe.sizes, device=device
        )
        return {"probe": probed, "finetune": tuned}

    return score
