"""Files in the folders of runs that say what the storage should know of them.

`trial.json` is the trial as it was stored last: at each rung and at its end. It is read only to
rebuild a storage that was lost or damaged.
"""

from __future__ import annotations

from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from optuna.distributions import distribution_to_json, json_to_distribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from amlp_ray.errors import StudyError
from amlp_ray.study.storage.journal_lines import decode, encode
from amlp_ray.utils.files import atomic_write
from amlp_ray.utils.json_files import JsonError

TRIAL_FILE = "trial.json"
# A run whose folder holds one of these has begun.
BEGUN = ("config.yaml", "provenance.json", "metrics.jsonl", "score.json", TRIAL_FILE)


def begun_trials(study_folder: Path) -> list[int]:
    """List the numbers of the trials of the search that have left files."""
    numbers = []
    for folder in _begun(study_folder / "trials"):
        if folder.name.isdecimal():
            numbers.append(int(folder.name))
    return sorted(numbers)


def begun_folders(study_folder: Path) -> list[str]:
    """List the folders of baselines and confirmation runs, such as `baselines/mae-0`."""
    folders = []
    for kind in ("baselines", "confirm"):
        for folder in _begun(study_folder / kind):
            if folder.name.rpartition("-")[2].isdecimal():
                folders.append(f"{kind}/{folder.name}")
    return folders


def check_not_orphaned(study_folder: Path) -> None:
    """Refuse a folder with trials and no study.yaml: what they were run with is unknown.

    Raises:
        StudyError: it is one.
    """
    if (study_folder / "study.yaml").is_file():
        return
    if begun_trials(study_folder) or begun_folders(study_folder):
        raise StudyError(
            f"{study_folder} holds trials, but no study.yaml; put the study's file back there, or "
            f"move the folder away to begin anew."
        )


def _begun(parent: Path) -> list[Path]:
    folders = []
    with suppress(OSError):
        folders = sorted(path for path in parent.iterdir() if path.is_dir())
    return [path for path in folders if any((path / name).exists() for name in BEGUN)]


def write_trial_file(folder: Path, trial: FrozenTrial) -> None:
    """Write `trial.json`; nothing if the folder is not there, or its disk takes no file."""
    if not folder.is_dir():
        return
    distributions = {
        name: distribution_to_json(distribution)
        for name, distribution in trial.distributions.items()
    }
    values = {
        "number": trial.number,
        "state": trial.state.name,
        "values": trial.values,
        "params": trial.params,
        "distributions": distributions,
        "rungs": trial.intermediate_values,
        "user_attrs": trial.user_attrs,
        "system_attrs": trial.system_attrs,
        "started": _text(trial.datetime_start),
        "ended": _text(trial.datetime_complete),
    }
    with suppress(OSError):
        atomic_write(folder / TRIAL_FILE, encode(values))


def read_trial_file(folder: Path) -> FrozenTrial | None:
    """Read `trial.json`; None if it is missing or was changed since it was written."""
    try:
        content = (folder / TRIAL_FILE).read_bytes()
        if not content.endswith(b'"}\n'):
            return None
        return _trial(decode(content))
    except (OSError, JsonError, KeyError, TypeError, ValueError):
        return None


def has_ended(folder: Path) -> bool:
    """Return whether the trial in a folder had ended when it was stored last."""
    trial = read_trial_file(folder)
    return trial is not None and trial.state.is_finished()


def _trial(values: dict[str, Any]) -> FrozenTrial:
    trial = create_trial(
        state=TrialState[values["state"]],
        values=values["values"],
        params=values["params"],
        distributions={
            name: json_to_distribution(text) for name, text in values["distributions"].items()
        },
        user_attrs=values["user_attrs"],
        system_attrs=values["system_attrs"],
        intermediate_values={int(epoch): value for epoch, value in values["rungs"].items()},
    )
    trial.number = values["number"]
    trial.datetime_start = _time(values["started"])
    trial.datetime_complete = _time(values["ended"])
    return trial


def _text(time: datetime | None) -> str | None:
    return None if time is None else time.isoformat()


def _time(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text)
