"""Read what a confirmation found: candidates, paired differences, noise and agreement of protocols.

Before the test images are opened the numbers are those of val, by which candidates were chosen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

import numpy as np

from amlp_ray.config import BASELINE_DESCRIPTIONS
from amlp_ray.config.yaml_file import read_record_values
from amlp_ray.errors import ConfigError
from amlp_ray.study.confirmation.comparison import Comparison, Sample, read_difference
from amlp_ray.study.confirmation.confirm import TRIAL_NAME, TestUnlock, find_test_unlock
from amlp_ray.study.confirmation.statistics import (
    Correlation,
    FloatArray,
    compare,
    correlate_candidates,
    holm,
    seed_noise,
)
from amlp_ray.study.storage.study_store import StudyStore
from amlp_ray.study.storage.trial_record import TrialRecord, trial_records
from amlp_ray.utils.json_files import read_json

Protocol = Literal["finetune", "probe"]
SplitName = Literal["val", "test"]

# The one that verdicts go by comes first.
PROTOCOLS: tuple[Protocol, ...] = ("finetune", "probe")


@dataclass(frozen=True)
class ConfirmationRun:
    """One finished run of a candidate."""

    repeat: int  # which seed it was trained from
    folder: Path  # its files
    scores: Mapping[tuple[Protocol, SplitName], Mapping[str, Any]]  # each as in `score.json`


@dataclass(frozen=True)
class ConfirmedCandidate:
    """A candidate and its finished runs."""

    name: str
    uses_ground_truth: bool
    runs: tuple[ConfirmationRun, ...]

    @property
    def title(self) -> str:
        """Return its name in a sentence: `trial 7`, `baseline mae`, `equal-mean of trial 7`."""
        if self.is_trial:
            return self.name.replace("-", " ")
        if self.reference:
            return f"{self.ablation} of {self.reference.replace('-', ' ')}"
        return f"baseline {self.name}"

    @property
    def description(self) -> str:
        """Return a phrase such as `plain MAE`; empty where there is none."""
        return BASELINE_DESCRIPTIONS.get(self.ablation or self.name, "")

    @property
    def is_trial(self) -> bool:
        """Return whether it is a trial of the search."""
        return TRIAL_NAME.fullmatch(self.name) is not None and not self.ablation

    @property
    def ablation(self) -> str | None:
        """Return which ablation of a trial it is; None for any other candidate."""
        match = TRIAL_NAME.fullmatch(self.name)
        return match[1] if match else None

    @property
    def reference(self) -> str | None:
        """Return the trial that it is an ablation of."""
        match = TRIAL_NAME.fullmatch(self.name)
        return match[2] if match and match[1] else None

    def values(self, protocol: Protocol, split: SplitName, key: str = "dsc") -> dict[int, float]:
        """Return a number of each run that has it, by repeat."""
        values = {run.repeat: run.scores[protocol, split].get(key) for run in self.runs}
        return {repeat: float(value) for repeat, value in values.items() if value is not None}

    def mean(self, protocol: Protocol, split: SplitName, key: str = "dsc") -> float | None:
        """Return the mean of a number over seeds; None where no run has it."""
        values = self.values(protocol, split, key)
        return fmean(values.values()) if values else None

    def sd(self, protocol: Protocol, split: SplitName) -> float | None:
        """Return the SD of DSC over seeds; None below two."""
        values = list(self.values(protocol, split).values())
        return stdev(values) if len(values) > 1 else None

    def per_group(self, protocol: Protocol, split: SplitName) -> dict[int, dict[str, float]]:
        """Return the DSC of every group, by repeat; runs without any are left out."""
        scores = {run.repeat: run.scores[protocol, split].get("per_group") for run in self.runs}
        return {repeat: values for repeat, values in scores.items() if values}


@dataclass(frozen=True)
class Confirmation:
    """Everything a confirmation found so far."""

    candidates: tuple[ConfirmedCandidate, ...]  # in the order in which they were begun
    states: dict[str, int]  # how many runs are in each state
    failed: dict[str, str]  # reason of each run that failed, by its name
    # What the store holds of the test images; None while they are closed.
    test_unlock: TestUnlock | None
    metric: str  # the study's
    equivalence_margin: float  # DSC below which a difference is a tie

    @property
    def split(self) -> SplitName:
        """Return whose images the numbers are of."""
        return "test" if self.test_unlock else "val"

    @cached_property
    def chosen(self) -> ConfirmedCandidate | None:
        """The trial that is judged: the best over these seeds by the probe on val, not by test."""
        best: ConfirmedCandidate | None = None
        best_score = -np.inf
        for candidate in self.candidates:
            score = candidate.mean("probe", "val", self.metric) if candidate.is_trial else None
            if score is not None and score > best_score:
                best, best_score = candidate, score
        return best

    @cached_property
    def against_baselines(self) -> dict[Protocol, list[Comparison]]:
        """Comparisons by protocol, corrected together.

        The chosen trial is compared with every baseline, and the trial of each ablation with it.
        One that uses true masks is compared too, and neither corrected nor counted.
        """
        by_name = {candidate.name: candidate for candidate in self.candidates}
        pairs = []
        for other in self.candidates:
            trial = by_name.get(other.reference) if other.reference else self.chosen
            if not other.is_trial and trial is not None:
                pairs.append((trial, other))
        return {protocol: self._compare(protocol, pairs) for protocol in PROTOCOLS}

    @cached_property
    def against_trials(self) -> dict[Protocol, list[Comparison]]:
        """Comparisons of the chosen trial with the other trials by protocol, corrected together."""
        chosen = self.chosen
        pairs = []
        for other in self.candidates:
            if chosen is not None and other.is_trial and other is not chosen:
                pairs.append((chosen, other))
        return {protocol: self._compare(protocol, pairs) for protocol in PROTOCOLS}

    def comparisons(self, protocol: Protocol) -> list[Comparison]:
        """Return the comparisons with other trials, then those with baselines."""
        return self.against_trials[protocol] + self.against_baselines[protocol]

    def noise(self, protocol: Protocol) -> float | None:
        """Return the SD over seeds of a run's mean DSC, pooled over candidates."""
        return seed_noise([list(c.values(protocol, self.split).values()) for c in self.candidates])

    def agreement(self, *, without: str | None = None) -> Correlation:
        """Correlate the protocols' ranks of candidates, over the seeds that all of them have.

        Args:
            without: a candidate to leave out, such as a random encoder, which both put last.
        """
        scores: list[dict[int, tuple[float, ...]]] = []
        for candidate in self.candidates:
            by_protocol = [candidate.values(protocol, self.split) for protocol in PROTOCOLS]
            repeats = set.intersection(*map(set, by_protocol))
            if candidate.name != without and repeats:
                scores.append({r: tuple(values[r] for values in by_protocol) for r in repeats})
        common = sorted(set.intersection(*map(set, scores))) if scores else []
        table = np.array([[by_repeat[r] for r in common] for by_repeat in scores], float)
        finetune, probe = table.reshape(len(scores), len(common), 2).transpose(2, 0, 1)
        return correlate_candidates(finetune, probe)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values: candidates, comparisons by protocol, noise and agreement."""
        return {
            "split": self.split,
            "test_unlocked": asdict(self.test_unlock) if self.test_unlock else None,
            "runs": self.states,
            "failed": self.failed,
            "chosen": self.chosen.name if self.chosen else None,
            "candidates": [self._candidate_row(candidate) for candidate in self.candidates],
            "against_baselines": _plain(self.against_baselines),
            "against_trials": _plain(self.against_trials),
            "noise": {protocol: self.noise(protocol) for protocol in PROTOCOLS},
            "agreement": asdict(self.agreement()),
        }

    def _candidate_row(self, candidate: ConfirmedCandidate) -> dict[str, Any]:
        return {
            "candidate": candidate.name,
            "description": candidate.description,
            "uses_ground_truth": candidate.uses_ground_truth,
            "seeds": len(candidate.runs),
            **{f"{name}_dsc": candidate.mean(name, self.split) for name in PROTOCOLS},
            **{f"{name}_sd": candidate.sd(name, self.split) for name in PROTOCOLS},
        }

    def _compare(
        self, protocol: Protocol, pairs: list[tuple[ConfirmedCandidate, ConfirmedCandidate]]
    ) -> list[Comparison]:
        """Compare pairs of candidates, and correct their p-values together."""
        compared = []
        p_values = []
        for candidate, baseline in pairs:
            scores = _paired_scores(candidate, baseline, protocol, self.split)
            if not scores.size:
                continue
            difference = compare(scores[0], scores[1])
            counts = not baseline.uses_ground_truth and difference.seeds > 1
            p_values.append(difference.p if counts else None)
            compared.append((candidate, baseline, scores, difference))
        comparisons = []
        for (candidate, baseline, scores, difference), p in zip(
            compared, holm(p_values), strict=True
        ):
            comparisons.append(
                Comparison(
                    candidate=candidate.name,
                    baseline=baseline.name,
                    candidate_mean=float(scores[0].mean()),
                    baseline_mean=float(scores[1].mean()),
                    difference=difference,
                    p=p,
                    reading=read_difference(difference, p, self.equivalence_margin),
                    sample=Sample.from_score(
                        candidate.runs[0].scores[protocol, self.split], difference.groups
                    ),
                )
            )
        return comparisons


def read_confirmation(store: StudyStore) -> Confirmation | None:
    """Read the confirmation of a study; None where none was begun."""
    config = store.config()
    records = trial_records(store.confirmation())
    if not records:
        return None
    test_unlock = find_test_unlock(store)
    by_candidate: dict[str, list[TrialRecord]] = {}
    failed = {}
    for record in records:
        name = record.attributes["candidate"]
        if test_unlock and name not in test_unlock.candidates:
            continue
        by_candidate.setdefault(name, []).append(record)
        if record.state.name == "FAIL":
            failed[f"{name}-{record.repeat}"] = str(record.reason or "no reason is known")
    candidates = []
    for name, repeats in by_candidate.items():
        complete = [record.repeat for record in repeats if record.is_complete]
        runs = tuple(_read_run(store, name, repeat) for repeat in sorted(complete))
        candidates.append(ConfirmedCandidate(name, repeats[0].uses_ground_truth, runs))
    return Confirmation(
        candidates=tuple(candidates),
        states=dict(Counter(record.state.name for record in records)),
        failed=failed,
        test_unlock=test_unlock,
        metric=config.metric,
        equivalence_margin=config.equivalence_margin,
    )


def unequal_budgets(confirmation: Confirmation) -> list[str]:
    """Name candidates that train for other epochs or in other batches than the chosen one."""
    budgets = {}
    for candidate in confirmation.candidates:
        for run in candidate.runs[:1]:
            try:
                config = read_record_values(run.folder / "config.yaml")
            except ConfigError:  # a missing or broken file is a gap in the report, not its end
                continue
            if config.get("objective") != "none":
                budgets[candidate.name] = (config.get("epochs"), config.get("batch_size"))
    chosen = confirmation.chosen
    if chosen is None or chosen.name not in budgets:
        return []
    return [name for name, budget in budgets.items() if budget != budgets[chosen.name]]


def _paired_scores(
    candidate: ConfirmedCandidate,
    baseline: ConfirmedCandidate,
    protocol: Protocol,
    split: SplitName,
) -> FloatArray:
    """Return the DSC (2, S, G) of both, over the seeds and groups that both have."""
    both = candidate.per_group(protocol, split), baseline.per_group(protocol, split)
    repeats = sorted(both[0].keys() & both[1].keys())
    scored = [scores[repeat] for scores in both for repeat in repeats]
    groups = sorted(set.intersection(*map(set, scored))) if scored else []
    rows = [[scores[group] for group in groups] for scores in scored]
    return np.array(rows, float).reshape(2, len(repeats), len(groups))


def _read_run(store: StudyStore, name: str, repeat: int) -> ConfirmationRun:
    """Read all scores of a run; those of missing or broken files are empty."""
    folder = store.confirm_folder(name, repeat)
    test = read_json(folder / "test.json") or {}
    scores: dict[tuple[Protocol, SplitName], Any] = {
        ("probe", "val"): read_json(folder / "score.json") or {},
        ("finetune", "val"): read_json(folder / "finetune.json") or {},
        ("probe", "test"): test.get("probe"),
        ("finetune", "test"): test.get("finetune"),
    }
    tables = {key: score if isinstance(score, dict) else {} for key, score in scores.items()}
    return ConfirmationRun(repeat, folder, tables)


def _plain(comparisons: Mapping[Protocol, list[Comparison]]) -> dict[str, list[dict[str, Any]]]:
    return {protocol: [asdict(item) for item in items] for protocol, items in comparisons.items()}
