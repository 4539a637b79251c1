"""Repeat the best trials and every baseline over several seeds, then score them on the test images.

Trials of a search were chosen by the probe on val, so their scores there are optimistic. Here all
candidates are trained anew from the same seeds. Test images are read once, when all runs have
ended: which runs are scored is stored before an image is read, and no other candidate is scored on
them afterwards. So the test images cannot have chosen a candidate.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

from amlp_ray.config import ABLATIONS, PretrainConfig, SegmentConfig, StudyConfig, baseline_names
from amlp_ray.config.yaml_file import read_record, read_record_values
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.errors import ConfigError, DataError, StudyError
from amlp_ray.evaluation.confirmation_run import SEGMENTER
from amlp_ray.study.baselines import BySeed, baseline_plan
from amlp_ray.study.rungs import with_schedule
from amlp_ray.study.search_space.space import SearchSpace
from amlp_ray.study.seeds import derived_seed
from amlp_ray.study.storage.best_trials import keeps_limits
from amlp_ray.study.storage.provenance import commit
from amlp_ray.study.storage.study_store import StudyStore
from amlp_ray.study.storage.trial_record import TrialRecord, trial_records
from amlp_ray.utils.files import atomic_write
from amlp_ray.utils.json_files import seal_json

logger = logging.getLogger(__name__)

# User attribute of the confirmation's Optuna study.
TEST_UNLOCKED = "test_unlocked"
# Names of trials and of their ablations: `trial-7`, `oracle-of-trial-7`.
TRIAL_NAME = re.compile(rf"(?:({'|'.join(ABLATIONS)})-of-)?(trial-(\d+))")


@dataclass(frozen=True)
class Candidate:
    """A candidate of the confirmation."""

    name: str  # such as `trial-7`, the baseline `mae`, or the ablation `oracle-of-trial-7`
    uses_ground_truth: bool  # whether it sees true masks. It is shown then, and never compared with
    params: Mapping[str, Any]  # what the search chose; empty for a baseline
    config: BySeed  # returns its settings for a seed


def confirmation_plan(store: StudyStore, config: StudyConfig) -> list[Candidate]:
    """List the candidates: those begun already, then the best trials, then all baselines.

    Once the test images have been opened, the candidates that were scored on them and no others.

    Raises:
        StudyError: no trial is complete.
    """
    return _plan(store, config)[0]


def confirmation_notes(store: StudyStore, config: StudyConfig) -> list[str]:
    """Say which ablations are left out since they would change nothing, a sentence each."""
    return _plan(store, config)[1]


def confirm_seed(config: StudyConfig, repeat: int) -> int:
    """Derive the seed of a repeat, the same for all candidates, so that these are paired."""
    return derived_seed(config.seed, "confirm", repeat)


def finetuning(config: StudyConfig, repeat: int) -> SegmentConfig:
    """Return the settings that a repeat is fine-tuned by; all candidates share its seed."""
    seed = derived_seed(config.seed, "finetune", repeat)
    return config.confirm.finetune.model_copy(update={"seed": seed})


def top_trials(store: StudyStore, config: StudyConfig) -> list[TrialRecord]:
    """Return the best `confirm.top` complete trials by the study's metric on val.

    Trials within `limits` where there are any. Of trials with equal settings the better one, and
    of population-based training only steps of full length.

    Raises:
        StudyError: there is none.
    """
    full = [record for record in trial_records(store.search()) if _is_full_length(store, record)]
    eligible = [record for record in full if keeps_limits(record, config)] or full
    ranked = sorted(eligible, key=lambda record: (-_final_score(record, config), record.number))
    chosen: dict[str, TrialRecord] = {}
    for record in ranked:
        if len(chosen) == config.confirm.top:
            break
        settings = _trial_config(store, config, record)(0).model_dump_json()
        chosen.setdefault(settings, record)
    if not chosen:
        raise StudyError(
            f"Study {config.name!r} has no trial of full length to confirm; "
            f"resume it with `amlp-ray study run`."
        )
    return list(chosen.values())


def _plan(store: StudyStore, config: StudyConfig) -> tuple[list[Candidate], list[str]]:
    """Return the candidates, and why others are left out."""
    records = trial_records(store.search())
    candidates = []
    notes = []
    for name in _candidate_names(store, config):
        try:
            candidates.append(_candidate(store, config, records, name))
        except ConfigError as error:
            notes.append(f"{name} is left out: {error}")
    return candidates, notes


def _candidate_names(store: StudyStore, config: StudyConfig) -> list[str]:
    if unlock := find_test_unlock(store):
        return unlock.candidates
    begun = [record.attributes["candidate"] for record in trial_records(store.confirmation())]
    top = top_trials(store, config)
    names = [*begun, *(f"trial-{record.number}" for record in top)]
    for baseline in baseline_names(config.baselines):
        is_ablation = baseline in ABLATIONS
        names.append(f"{baseline}-of-trial-{top[0].number}" if is_ablation else baseline)
    return list(dict.fromkeys(names))


def _candidate(
    store: StudyStore, config: StudyConfig, records: list[TrialRecord], name: str
) -> Candidate:
    if match := TRIAL_NAME.fullmatch(name):
        ablation, _, number = match.groups()
        record = records[int(number)]
        trial_config = _trial_config(store, config, record)
        if ablation is None:
            return Candidate(name, False, record.params, trial_config)
        plan = baseline_plan(config, ablation, trial_config)
    elif name in baseline_names(config.baselines):
        plan = baseline_plan(config, name)
    else:
        raise ConfigError(f"baselines of {config.name} no longer names it.")
    return Candidate(name, plan.uses_ground_truth, {}, plan.config)


def _trial_config(store: StudyStore, config: StudyConfig, record: TrialRecord) -> BySeed:
    """Read a trial's settings as it had them, or rebuild them where its folder is gone."""
    path = store.trial_folder(record.number) / "config.yaml"
    if path.is_file():
        trial_config = read_record(PretrainConfig, path)
    else:
        settings = SearchSpace(config).config_of(record.params)
        trial_config = with_schedule(config.trial(settings, seed=0), config.pruner)
    return lambda seed: trial_config.model_copy(update={"seed": seed})


def _is_full_length(store: StudyStore, record: TrialRecord) -> bool:
    if not record.is_complete or not record.counts_in_budget or not record.rungs:
        return False
    if not record.is_pbt_step:
        return True
    path = store.trial_folder(record.number) / "config.yaml"
    return path.is_file() and max(record.rungs) >= read_record(PretrainConfig, path).epochs


def _final_score(record: TrialRecord, config: StudyConfig) -> float:
    if config.metric in config.objectives:
        return record.objective_values(config)[config.metric]
    return record.rungs[max(record.rungs)]


# Test images


@dataclass(frozen=True)
class TestUnlock:
    """Record of when the test images were opened, and for which runs."""

    __test__ = False  # pytest takes a class of this name for a test

    when: str  # time, ISO 8601
    commit: str | None  # of the code; None where it is unknown
    candidates: list[str]  # names of all that were scored on them
    runs: dict[str, str]  # folder of each run, such as `mae-2`, relative to the study's


def find_test_unlock(store: StudyStore) -> TestUnlock | None:
    """Read when the test images were opened; None while they are closed."""
    stored = store.confirmation().user_attrs.get(TEST_UNLOCKED)
    return None if stored is None else TestUnlock(**stored)


def open_test(
    store: StudyStore, config: StudyConfig, eval_data: PatchDataset, *, device: str = "cpu"
) -> TestUnlock:
    """Score all confirmation runs on the test images by both protocols, into their `test.json`.

    They are opened once. A second call scores nobody else: it finishes what a killed one left, and
    returns what is stored.

    Raises:
        StudyError: runs are missing.
        DataError: there are no test images with a lesion.
    """
    with store.transaction():
        unlock = find_test_unlock(store)
        is_first = unlock is None
        if unlock is None:
            unlock = _unlock_test(store, config, eval_data)
    if not is_first:
        logger.info(
            "test images were opened on %s for %s; nobody else is scored on them",
            unlock.when,
            ", ".join(unlock.candidates),
        )
    score = _test_scorer(config, eval_data, device)
    for name, path in unlock.runs.items():
        folder = store.folder / path
        if not (folder / "test.json").is_file():
            logger.info("%s: scored on test", name)
            atomic_write(folder / "test.json", seal_json(score(folder)))
    return unlock


def _unlock_test(store: StudyStore, config: StudyConfig, eval_data: PatchDataset) -> TestUnlock:
    """Check that all runs have ended, and store which ones are scored before an image is read."""
    candidates = [candidate.name for candidate in confirmation_plan(store, config)]
    folders = _finished_runs(store, config, candidates)
    _check_equal_finetuning(config, list(folders.values()))
    if not eval_data.manifest.counts["test"].lesions:
        raise DataError(
            f"{eval_data.path} has no labeled test image with a lesion, "
            f"so nothing can be confirmed on it."
        )
    unlock = TestUnlock(
        when=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=commit(),
        candidates=candidates,
        runs={name: str(folder.relative_to(store.folder)) for name, folder in folders.items()},
    )
    store.confirmation(create=True).set_user_attr(TEST_UNLOCKED, asdict(unlock))
    return unlock


def _finished_runs(
    store: StudyStore, config: StudyConfig, candidates: Sequence[str]
) -> dict[str, Path]:
    """Return the folders of complete runs by name, such as `mae-2`."""
    records = {(run.candidate, run.repeat): run for run in trial_records(store.confirmation())}
    folders = {}
    missing = []
    for name, repeat in product(candidates, range(config.confirm.seeds)):
        record = records.get((name, repeat))
        folder = store.confirm_folder(name, repeat)
        if record is None or not record.is_finished:
            missing.append(f"{name}-{repeat}")
        elif record.is_complete and (folder / "finetune.json").is_file():
            folders[f"{name}-{repeat}"] = folder
    if missing:
        count = len(candidates) * config.confirm.seeds
        raise StudyError(
            f"Study {config.name!r} has {len(missing)} of {count} confirmation runs left, "
            f"such as {missing[0]}; finish them with `amlp-ray study confirm` "
            f"before the test is opened."
        )
    if not folders:
        raise StudyError(
            f"No confirmation run of study {config.name!r} is complete; "
            f"see its trials for the reasons."
        )
    return folders


def _check_equal_finetuning(config: StudyConfig, folders: list[Path]) -> None:
    """Raise StudyError where a run was fine-tuned by other settings than `confirm.finetune`."""
    expected = config.confirm.finetune.model_dump(mode="json") | {"seed": 0}
    for folder in folders:
        # As it was written: a setting that is newer than the run must not get its default of today.
        if read_record_values(folder / SEGMENTER / "config.yaml") | {"seed": 0} != expected:
            raise StudyError(
                f"{folder} was fine-tuned with other settings than confirm.finetune has now, "
                f"so it cannot be compared; restore them as its {SEGMENTER}/config.yaml has them."
            )


def _test_scorer(
    config: StudyConfig, eval_data: PatchDataset, device: str
) -> Callable[[Path], dict[str, Any]]:
    """Return a function that scores the probe and the segmenter of a run's folder on test."""
    from amlp_ray.evaluation.evaluate import score_segmenter
    from amlp_ray.evaluation.linear_probe import Probe
    from amlp_ray.training.checkpoint.export import load_encoder, read_encoder_header

    # Each probe holds the images, so that runs of equal shape share one.
    probes: dict[str, Probe] = {}

    def score(folder: Path) -> dict[str, Any]:
        encoder_path = folder / "encoder.safetensors"
        model, spec = read_encoder_header(encoder_path)
        key = f"{model.patch_size} {spec.model_dump_json()}"
        if key not in probes:
            probes[key] = Probe(eval_data, config.probe, model.patch_size, spec)
        encoder = load_encoder(encoder_path).to(device)
        probe = probes[key].score(encoder, "test")
        finetune = score_segmenter(
            eval_data, folder / SEGMENTER, "test", sizes=config.probe.sizes, device=device
        )
        return {"probe": asdict(probe), "finetune": finetune}

    return score
