"""Check the lines of a study's journal: each is whole, and no trial has another one's number.

Optuna numbers studies and trials by the order of the lines that create them, so that one lost line
would give every later trial the scores of its neighbor. Lines that this package writes therefore
carry a checksum and their own number, and those that create something carry the number that it
got. Plain Optuna ignores all three, and its own lines are read without them.
"""

from __future__ import annotations

import json
import re
import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from optuna.distributions import json_to_distribution
from optuna.study import StudyDirection
from optuna.trial import TrialState

from amlp_ray.study.storage.optuna_internals import JournalOperation
from amlp_ray.utils.json_files import JsonError, parse_json_mapping
from amlp_ray.utils.text import counted

Log = dict[str, Any]

CHECKSUM = b',"crc32":"'
LINE = "line"  # number of the line in the file, from 1
NEW_STUDY = "new_study"  # the id that a new study got
NEW_TRIAL = "new_trial"  # the id that a new trial got, and its number within its study
TOKEN = "token"  # system attribute of a new trial, by which it is found after a lost answer
DAMAGED = "damaged"  # user attribute of a trial whose first line cannot be read
DAMAGED_TEXT = "the journal's line with its parameters cannot be read"

_TRIAL_FIELDS: dict[str, type | tuple[type, ...]] = {"trial_id": int}
_STUDY_FIELDS: dict[str, type | tuple[type, ...]] = {"study_id": int}
_NUMBER = (int, float)
FIELDS: dict[int, dict[str, type | tuple[type, ...]]] = {
    JournalOperation.CREATE_STUDY: {"study_name": str, "directions": list},
    JournalOperation.DELETE_STUDY: _STUDY_FIELDS,
    JournalOperation.SET_STUDY_USER_ATTR: {**_STUDY_FIELDS, "user_attr": dict},
    JournalOperation.SET_STUDY_SYSTEM_ATTR: {**_STUDY_FIELDS, "system_attr": dict},
    JournalOperation.CREATE_TRIAL: _STUDY_FIELDS,
    JournalOperation.SET_TRIAL_PARAM: {
        **_TRIAL_FIELDS,
        "param_name": str,
        "param_value_internal": _NUMBER,
        "distribution": str,
    },
    JournalOperation.SET_TRIAL_STATE_VALUES: {**_TRIAL_FIELDS, "state": int},
    JournalOperation.SET_TRIAL_INTERMEDIATE_VALUE: {
        **_TRIAL_FIELDS,
        "step": int,
        "intermediate_value": _NUMBER,
    },
    JournalOperation.SET_TRIAL_USER_ATTR: {**_TRIAL_FIELDS, "user_attr": dict},
    JournalOperation.SET_TRIAL_SYSTEM_ATTR: {**_TRIAL_FIELDS, "system_attr": dict},
    JournalOperation.DISCARD_TRIALS: {},
}


def encode(log: Mapping[str, Any]) -> bytes:
    """Return the line of a log, with its checksum."""
    body = json.dumps(log, separators=(",", ":")).encode()
    return body[:-1] + CHECKSUM + b'%08x"}\n' % zlib.crc32(body)


def decode(line: bytes) -> Log:
    """Return the log of a line.

    Raises:
        JsonError: it cannot be used; the message says why.
    """
    log = parse_json_mapping(line)
    body, mark, checksum = line.rstrip().rpartition(CHECKSUM)
    has_checksum = bool(mark) and checksum.endswith(b'"}')
    if has_checksum:
        if checksum != b'%08x"}' % zlib.crc32(body + b"}"):
            raise JsonError("differs from its checksum")
        return log
    if "crc32" in log or NEW_STUDY in log or NEW_TRIAL in log:
        raise JsonError("has lost its checksum")
    _check_log(log)
    return log


def _check_log(log: Log) -> None:
    """Raise JsonError if Optuna could not apply a log, which nobody vouches for."""
    operation = log.get("op_code")
    fields = FIELDS.get(operation) if type(operation) is int else None
    if fields is None or not isinstance(log.get("worker_id"), str):
        raise JsonError("is no operation of Optuna")
    for name, kind in fields.items():
        value = log.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise JsonError(f"has {name}: {str(value)[:40]!r}")
    if any(len(log[name]) != 1 for name in ("user_attr", "system_attr") if name in log):
        raise JsonError("does not name one attribute")
    try:
        _check_values(log)
    except (TypeError, ValueError, KeyError, AttributeError, LookupError) as error:
        raise JsonError(f"has a value that Optuna cannot read ({type(error).__name__})") from None


def _check_values(log: Log) -> None:
    """Convert what Optuna converts."""
    for direction in log.get("directions", ()):
        StudyDirection(direction)
    if "state" in log:
        TrialState(log["state"])
    for name in ("datetime_start", "datetime_complete"):
        if log.get(name) is not None:
            datetime.fromisoformat(log[name])
    for value in log.get("values") or ():
        float(value)
    if "distribution" in log:
        json_to_distribution(log["distribution"]).to_external_repr(log["param_value_internal"])
    distributions = {
        name: json_to_distribution(text) for name, text in log.get("distributions", {}).items()
    }
    for name, value in log.get("params", {}).items():
        distributions[name].to_external_repr(value)
    for name in ("user_attrs", "system_attrs"):
        dict(log.get(name, {}))
    for step, value in log.get("intermediate_values", {}).items():
        int(step)
        float(value)
    if log["op_code"] == JournalOperation.SET_TRIAL_STATE_VALUES:
        _ = log["values"]
        state = TrialState(log["state"])
        if state.is_finished():
            datetime.fromisoformat(log["datetime_complete"])
        elif state == TrialState.RUNNING:
            datetime.fromisoformat(log["datetime_start"])
    if log["op_code"] == JournalOperation.CREATE_TRIAL:
        _ = log["datetime_start"]


@dataclass
class LineProblem:
    """A line of a journal that is not used as it stands."""

    number: int  # of the line, from 1
    reason: str


@dataclass
class JournalReader:
    """Turns lines into logs for Optuna, in order, and keeps every study and trial at its number.

    Attributes:
        problems: lines that were skipped.
        lost_trials: how many trials were created by lines that cannot be read. A placeholder
            stands for each, which later lines fill in.
        disorder: why numbers cannot be trusted any more; empty if they can.
    """

    problems: list[LineProblem] = field(default_factory=list)
    lost_trials: int = 0
    disorder: str = ""
    n_lines: int = 0
    _seen: set[int] = field(default_factory=set)  # numbers that lines gave themselves
    n_missing: int = 0  # lines that are gone from the file, less those that it holds twice
    _names: list[str] = field(default_factory=list)  # of the studies, by id
    _deleted: set[int] = field(default_factory=set)
    _n_trials: int = 0
    _counts: Counter[int] = field(default_factory=Counter)  # trials by the id of their study
    _tokens: set[tuple[int, str]] = field(default_factory=set)
    # The study of each line that cannot be read and may have created a trial; None if unknown.
    _suspects: list[int | None] = field(default_factory=list)

    def read(self, line: bytes) -> list[Log]:
        """Return what Optuna is to apply of a line: its log, after placeholders for lost ones."""
        self.n_lines += 1
        if not line.strip():
            return []
        try:
            log = decode(line)
            self._check_position(log)
            return self._place(log)
        except JsonError as error:
            self.problems.append(LineProblem(self.n_lines, str(error)))
            return self._replace_unreadable(line) if not _is_repetition(error) else []

    def _check_position(self, log: Log) -> None:
        """Notice lines that are gone, and refuse one that stands in the file before.

        Raises:
            JsonError: the line repeats an earlier one.
        """
        number = log.get(LINE)
        if not isinstance(number, int):
            return
        if number in self._seen:
            self.n_missing -= 1
            raise _Repetition(f"repeats line {number}")
        self._seen.add(number)
        n_missing = number - self.n_lines
        if n_missing > self.n_missing:
            lines = counted(n_missing - self.n_missing, "missing line")
            self.problems.append(LineProblem(self.n_lines, f"comes after {lines}"))
        self.n_missing = n_missing  # fewer where a line was inserted, which is skipped by itself

    def number(self, log: Log) -> Log:
        """Return a new log with the number that what it creates will get."""
        operation = log["op_code"]
        if operation == JournalOperation.CREATE_STUDY and log["study_name"] not in self._live_names:
            return {**log, NEW_STUDY: len(self._names)}
        if operation == JournalOperation.CREATE_TRIAL and self._is_live(log["study_id"]):
            return {**log, NEW_TRIAL: [self._n_trials, self._counts[log["study_id"]]]}
        return log

    @property
    def _live_names(self) -> list[str]:
        return [name for index, name in enumerate(self._names) if index not in self._deleted]

    def _is_live(self, study_id: int) -> bool:
        return 0 <= study_id < len(self._names) and study_id not in self._deleted

    def _place(self, log: Log) -> list[Log]:
        operation = log["op_code"]
        if operation == JournalOperation.CREATE_STUDY:
            return self._place_study(log)
        if operation == JournalOperation.CREATE_TRIAL:
            return self._place_trial(log)
        if "trial_id" in log:
            return [*self._lost_before(log["trial_id"]), log]
        study_id = log.get("study_id", 0)
        self._check_study(study_id)
        if operation == JournalOperation.DELETE_STUDY:
            self._deleted.add(study_id)
        return [log]

    def _place_study(self, log: Log) -> list[Log]:
        if log["study_name"] in self._live_names:
            return [log]  # Optuna ignores it, and tells its writer
        if log.get(NEW_STUDY, len(self._names)) != len(self._names):
            self.disorder = "a study's first line is lost"
        self._names.append(log["study_name"])
        return [log]

    def _place_trial(self, log: Log) -> list[Log]:
        study_id = log["study_id"]
        token = log.get("system_attrs", {}).get(TOKEN)
        if token is not None and (study_id, token) in self._tokens:
            raise _Repetition("repeats a line that creates a trial")
        self._check_study(study_id)
        lost: list[Log] = []
        if NEW_TRIAL in log:
            trial_id, number = log[NEW_TRIAL]
            lost = self._lost_before(trial_id - 1, study_id, number)
            if (self._n_trials, self._counts[study_id]) != (trial_id, number):
                self.disorder = "trials are not in their order"
        elif self._suspects:
            self.disorder = "a line that may have created a trial cannot be read"
        if token is not None:
            self._tokens.add((study_id, token))
        if self._is_live(study_id):
            self._count(study_id)
            self._suspects.clear()
        return [*lost, log]

    def _check_study(self, study_id: int) -> None:
        """Notice that the line which created a study is lost.

        Otherwise somebody meant a study that there never was: Optuna tells the writer, and ignores
        the line.
        """
        if study_id >= len(self._names) and self._suspects:
            self.disorder = "a study's first line is lost"

    def _lost_before(
        self, trial_id: int, study_id: int | None = None, number: int | None = None
    ) -> list[Log]:
        """Return placeholders for trials up to an id, whose lines are lost.

        Args:
            study_id: a study that has `number` trials before the next one.
        """
        n_lost = trial_id + 1 - self._n_trials
        if n_lost <= 0:
            return []
        if study_id is None and n_lost > len(self._suspects):
            return []  # Optuna ignores the line, as one of a trial that there never was
        placeholders = []
        for _ in range(n_lost):
            suspected = self._suspects.pop(0) if self._suspects else None
            suspected = suspected or 0
            if study_id is not None and number is not None:
                is_in_study = self._counts[study_id] < number
                suspected = study_id if is_in_study else self._other_than(study_id, suspected)
            placeholders.append(self._placeholder(suspected))
        return placeholders

    def _other_than(self, study_id: int, suspected: int) -> int:
        """Return the suspected study, or another one if it is `study_id`, which lacks no trial."""
        if suspected != study_id:
            return suspected
        return next((index for index in range(len(self._names)) if index != study_id), study_id)

    def _count(self, study_id: int) -> None:
        self._n_trials += 1
        self._counts[study_id] += 1

    def _replace_unreadable(self, line: bytes) -> list[Log]:
        """Return a placeholder for the trial that a line seems to have created."""
        if b'"directions"' in line and b'"study_name"' in line:
            return self._replace_study(line)
        match = re.search(rb'"study_id":(\d{1,6})\D', line)
        study_id = int(match[1]) if match else None
        is_creation = b'"datetime_start"' in line and b'"study_id"' in line
        if is_creation and study_id is not None and self._is_live(study_id):
            position = re.search(rb'"new_trial":\[(\d+),', line)
            if position and int(position[1]) < self._n_trials:
                return []  # a damaged repetition
            return [self._placeholder(study_id)]
        is_other = any(name in line for name in (b'"trial_id"', b'"user_attr":', b'"system_attr":'))
        if not is_other:
            self._suspects.append(study_id)
        return []

    def _replace_study(self, line: bytes) -> list[Log]:
        name = re.search(rb'"study_name":"([\w.-]+)"', line)
        directions = re.search(rb'"directions":\[([12](?:,[12])*)\]', line)
        if name is None or directions is None:
            self.disorder = "a study's first line cannot be read"
            return []
        log = {
            "op_code": int(JournalOperation.CREATE_STUDY),
            "worker_id": "",
            "study_name": name[1].decode(),
            "directions": [int(text) for text in directions[1].split(b",")],
        }
        return self._place_study(log)

    def _placeholder(self, study_id: int) -> Log:
        self.lost_trials += 1
        self._count(study_id)
        return {
            "op_code": int(JournalOperation.CREATE_TRIAL),
            "worker_id": "",
            "study_id": study_id,
            "datetime_start": None,
            "state": int(TrialState.RUNNING),
            "user_attrs": {DAMAGED: DAMAGED_TEXT},
            "system_attrs": {},
        }


class _Repetition(JsonError):
    """A line was written before."""


def _is_repetition(error: JsonError) -> bool:
    return isinstance(error, _Repetition)
