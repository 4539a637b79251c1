"""What a confirmation found, in numbers: candidates, differences over seeds and images, noise, and how protocols agree.

Read from the store and the runs' files alone, at any time. Before the test images are opened the numbers are those of
val, by which candidates were chosen, and say so.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

import numpy as np

from amlp_ray.config import ABLATIONS, ABOUT
from amlp_ray.config.yaml_file import read_yaml
from amlp_ray.errors import ConfigError
from amlp_ray.study.confirmation.confirm import OPENED
from amlp_ray.study.confirmation.statistics import (
    LEVEL,
    Correlation,
    Difference,
    compare,
    holm,
    rank_correlation,
    seed_noise,
)
from amlp_ray.study.storage.study_store import StudyStore

Protocol = Literal["finetune", "probe"]
SplitName = Literal["val", "test"]
Reading = Literal["better", "worse", "equivalence_margin", "no difference shown", "not known"]

PROTOCOLS: tuple[Protocol, ...] = ("finetune", "probe")  # the one that verdicts go by, first


@dataclass(frozen=True)
class Scored:
    """One finished run of a candidate: its scores by (protocol, split), each as in `score.json`."""

    repeat: int
    folder: Path
    scores: Mapping[tuple[Protocol, SplitName], dict[str, Any]]


@dataclass(frozen=True)
class Confirmed:
    """A candidate and its finished runs."""

    name: str
    diagnosis: bool
    params: dict[str, Any]
    runs: tuple[Scored, ...]

    @property
    def title(self) -> str:
        """In a sentence: `trial 7`, `baseline mae`, `equal-mean of trial 7`."""
        if self.is_trial:
            return self.name.replace("-", " ")
        return (
            f"{self.control} of {self.reference.replace('-', ' ')}"
            if self.reference
            else f"baseline {self.name}"
        )

    @property
    def about(self) -> str:
        return ABOUT.get(self.control or self.name, "")

    @property
    def is_trial(self) -> bool:
        return bool(re.fullmatch(r"trial-\d+", self.name))

    @property
    def control(self) -> str | None:
        """Which control of a trial it is, if it is one."""
        name, of, _ = self.name.partition("-of-")
        return name if of and name in ABLATIONS else None

    @property
    def reference(self) -> str | None:
        """The trial that it is a control of."""
        return self.name.partition("-of-")[2] if self.control else None

    def values(self, protocol: Protocol, split: SplitName, key: str = "dsc") -> dict[int, float]:
        """A number of each run, by repeat."""
        found = {run.repeat: run.scores.get((protocol, split), {}).get(key) for run in self.runs}
        return {repeat: float(value) for repeat, value in found.items() if value is not None}

    def mean(self, protocol: Protocol, split: SplitName, key: str = "dsc") -> float | None:
        values = self.values(protocol, split, key)
        return fmean(values.values()) if values else None

    def sd(self, protocol: Protocol, split: SplitName) -> float | None:
        """SD over seeds; None below two."""
        values = list(self.values(protocol, split).values())
        return stdev(values) if len(values) > 1 else None


@dataclass(frozen=True)
class Against:
    """One comparison: `ours` is a trial, `theirs` a baseline, a control or another trial; means are over shared seeds."""

    ours: str
    theirs: str
    our_mean: float
    their_mean: float
    difference: Difference
    p: float | None  # after Holm's correction; None where there is none, or theirs is a diagnosis
    reading: Reading


@dataclass(frozen=True)
class Confirmation:
    """Everything a confirmation found so far."""

    candidates: tuple[Confirmed, ...]
    states: dict[str, int]  # of its runs
    failed: dict[str, str]  # run by name: its reason
    opened: dict[str, Any] | None  # what the store says of the test images
    metric: str
    equivalence_margin: float

    @property
    def split(self) -> SplitName:
        """Whose images the numbers below are of."""
        return "test" if self.opened else "val"

    @cached_property
    def chosen(self) -> Confirmed | None:
        """The trial that is judged: the best over these seeds by the probe on val, never by test."""
        scored = [(c.mean("probe", "val", self.metric), c) for c in self.candidates if c.is_trial]
        known = [(value, c) for value, c in scored if value is not None]
        return max(known, key=lambda pair: pair[0])[1] if known else None

    @cached_property
    def against_arms(self) -> dict[Protocol, list[Against]]:
        """By protocol: the chosen trial against every baseline, and each control against its own trial, corrected together.

        A diagnosis is compared too, and neither corrected nor counted.
        """
        by_name = {c.name: c for c in self.candidates}
        pairs = []
        for other in self.candidates:
            ours = by_name.get(other.reference) if other.reference else self.chosen
            if not other.is_trial and ours is not None:
                pairs.append((ours, other))
        return {protocol: self._compared(protocol, pairs) for protocol in PROTOCOLS}

    @cached_property
    def against_trials(self) -> dict[Protocol, list[Against]]:
        """By protocol: the chosen trial against the others that were confirmed, corrected together."""
        chosen = self.chosen
        pairs = (
            [(chosen, c) for c in self.candidates if c.is_trial and c is not chosen]
            if chosen
            else []
        )
        return {protocol: self._compared(protocol, pairs) for protocol in PROTOCOLS}

    def noise(self, protocol: Protocol) -> float | None:
        """SD over seeds of a run's mean DSC, pooled over candidates."""
        return seed_noise([list(c.values(protocol, self.split).values()) for c in self.candidates])

    def agreement(self, *, without: str | None = None) -> Correlation:
        """Rank correlation of the protocols over all runs; seeds of one candidate are drawn together.

        Args:
            without: a candidate to leave out, such as a random encoder, which any protocol puts last.
        """
        runs = [(c, run) for c in self.candidates if c.name != without for run in c.runs]
        x, y = (
            [run.scores.get((p, self.split), {}).get("dsc", np.nan) for _, run in runs]
            for p in PROTOCOLS
        )
        return rank_correlation(x, y, [c.name for c, _ in runs])

    def as_dict(self) -> dict[str, Any]:
        """Plain values: a row per candidate, comparisons by protocol, noise and agreement."""
        rows = [
            {
                "candidate": c.name,
                "about": c.about,
                "diagnosis": c.diagnosis,
                "seeds": len(c.runs),
                **{f"{p}_dsc": c.mean(p, self.split) for p in PROTOCOLS},
                **{f"{p}_sd": c.sd(p, self.split) for p in PROTOCOLS},
            }
            for c in self.candidates
        ]
        return {
            "split": self.split,
            "test_opened": self.opened,
            "runs": self.states,
            "failed": self.failed,
            "chosen": self.chosen.name if self.chosen else None,
            "candidates": rows,
            "against_arms": {
                p: [asdict(item) for item in items] for p, items in self.against_arms.items()
            },
            "against_trials": {
                p: [asdict(item) for item in items] for p, items in self.against_trials.items()
            },
            "noise": {p: self.noise(p) for p in PROTOCOLS},
            "agreement": asdict(self.agreement()),
        }

    def _compared(
        self, protocol: Protocol, pairs: list[tuple[Confirmed, Confirmed]]
    ) -> list[Against]:
        found = [
            (ours, theirs, *_paired(ours, theirs, protocol, self.split)) for ours, theirs in pairs
        ]
        found = [item for item in found if item[2].size]
        differences = [compare(a, b) for _, _, a, b in found]
        counted = [
            None if theirs.diagnosis or d.seeds < 2 else d.p
            for (_, theirs, _, _), d in zip(found, differences, strict=True)
        ]
        return [
            Against(
                ours.name,
                theirs.name,
                float(a.mean()),
                float(b.mean()),
                d,
                p,
                read(d, p, self.equivalence_margin),
            )
            for (ours, theirs, a, b), d, p in zip(found, differences, holm(counted), strict=True)
        ]


def read(difference: Difference, p: float | None, equivalence_margin: float) -> Reading:
    """What a difference says; `p` after correction.

    It is shown where it would be rare without one, the interval leaves out zero, and seeds were repeated. What is shown
    and smaller than `tie` is a tie all the same.
    """
    if p is None or difference.interval is None:
        return "not known"
    low, high = difference.interval
    if p >= LEVEL or low <= 0 <= high:
        return "no difference shown"
    if abs(difference.mean) < equivalence_margin:
        return "equivalence_margin"
    return "better" if difference.mean > 0 else "worse"


def confirmation_of(store: StudyStore) -> Confirmation | None:
    """What is known of a study's confirmation; None where none was begun."""
    study, config = store.confirmation(), store.config()
    trials = study.get_trials(deepcopy=False)
    if not trials:
        return None
    opened = study.user_attrs.get(OPENED)
    runs: dict[str, list[Scored]] = {}
    about: dict[str, tuple[bool, dict[str, Any]]] = {}
    failed: dict[str, str] = {}
    for trial in trials:
        name, repeat = trial.user_attrs["candidate"], trial.user_attrs["repeat"]
        if opened and name not in opened["candidates"]:
            continue
        about.setdefault(
            name, (bool(trial.user_attrs.get("diagnosis")), trial.user_attrs.get("params") or {})
        )
        of = runs.setdefault(name, [])
        if trial.state.name == "COMPLETE":
            folder = store.confirm_folder(name, repeat)
            of.append(Scored(repeat, folder, _scores(folder)))
        elif trial.state.name == "FAIL":
            failed[f"{name}-{repeat}"] = str(trial.user_attrs.get("reason", "no reason is known"))
    return Confirmation(
        candidates=tuple(
            Confirmed(name, *about[name], tuple(sorted(of, key=lambda run: run.repeat)))
            for name, of in runs.items()
        ),
        states=dict(Counter(trial.state.name for trial in trials)),
        failed=failed,
        opened=opened,
        metric=config.metric,
        equivalence_margin=config.equivalence_margin,
    )


def unequal(confirmation: Confirmation) -> list[str]:
    """Names of candidates that are trained for another number of epochs, or in other batches, than the chosen one."""
    lengths: dict[str, tuple[Any, Any]] = {}
    for candidate in confirmation.candidates:
        for run in candidate.runs[:1]:
            try:
                given = read_yaml(run.folder / "config.yaml")
            except ConfigError:  # a missing or broken file is a gap in the report, not its end
                continue
            if given.get("objective") != "none":
                lengths[candidate.name] = given.get("epochs"), given.get("batch_size")
    chosen = lengths.get(confirmation.chosen.name) if confirmation.chosen else None
    return [name for name, length in lengths.items() if chosen is not None and length != chosen]


def _paired(
    ours: Confirmed, theirs: Confirmed, protocol: Protocol, split: SplitName
) -> tuple[np.ndarray, np.ndarray]:
    """DSC (S, I) of both, over the seeds and images that both have."""
    at = protocol, split
    images = [
        {run.repeat: run.scores.get(at, {}).get("per_image", {}) for run in c.runs}
        for c in (ours, theirs)
    ]
    repeats = sorted(
        r for r in images[0].keys() & images[1].keys() if images[0][r] and images[1][r]
    )
    every = [one[r] for one in images for r in repeats]
    common = sorted(set.intersection(*(set(scores) for scores in every))) if every else []
    a, b = (np.array([[one[r][i] for i in common] for r in repeats], float) for one in images)
    return a, b


def _scores(folder: Path) -> dict[tuple[Protocol, SplitName], dict[str, Any]]:
    test = _read(folder / "test.json")
    found: dict[tuple[Protocol, SplitName], dict[str, Any]] = {
        ("probe", "val"): _read(folder / "score.json"),
        ("finetune", "val"): _read(folder / "finetune.json"),
        ("probe", "test"): test.get("probe", {}),
        ("finetune", "test"): test.get("finetune", {}),
    }
    return {at: score for at, score in found.items() if score}


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
