"""Show where a study ran: each time it was run, and trials that ran with other code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from amlp_ray.config.overrides import flatten
from amlp_ray.study.report.report_data import ReportData, ReportedTrial
from amlp_ray.study.report.tables import Table, show, text_table
from amlp_ray.study.storage.provenance import read_provenance
from amlp_ray.utils.text import counted

# Runs of the study that are listed; the rest is in environments.jsonl.
MAX_RUNS = 50
# Changes that are listed of one run.
MAX_CHANGES = 6
# Names or ranges of trials in one sentence.
MAX_NAMES = 8
# Characters of a value that is not a commit.
MAX_VALUE = 40


def runs(data: ReportData) -> Table:
    """List each time the study was run, and what had changed since the time before."""
    rows = []
    previous = None
    for environment in data.environments:
        current = flatten(environment)
        current.pop("started", None)
        started = show(environment.get("started")).replace("T", " ").replace("+00:00", " UTC")
        rows.append([started, _short(environment.get("commit")), _changes(previous, current)])
        previous = current
    return text_table(["Started", "Commit", "Changed since"], rows[-MAX_RUNS:])


def latest(data: ReportData) -> Table:
    """List all that is known of the latest run by its dotted name, after the seeds."""
    seeds = {run.attributes["seed"] for run in data.baselines if "seed" in run.attributes}
    rows = {
        "seed of the study": data.config.seed,
        "seed of the probe's label subsets and folds": data.config.probe.seed,
        "seeds of the baselines": sorted(seeds, key=str),
        **flatten(data.environment),
    }
    return text_table(["", ""], [[name, show(value)] for name, value in rows.items()])


def commits(data: ReportData) -> str | None:
    """Say which trials were made by which code; None where all were made by the same."""
    by_code: dict[str, list[ReportedTrial]] = {}
    changed = []
    for trial in (*data.search, *data.baselines, *data.confirmation):
        provenance = read_provenance(trial.path) or {}
        if provenance.get("commit") is not None:
            by_code.setdefault(_code(provenance), []).append(trial)
        if _has_changed_code(provenance):
            changed.append(trial)
    sentences = []
    if len(by_code) > 1:
        groups = "; ".join(f"{code}: {_names(trials)}" for code, trials in by_code.items())
        sentences.append(
            f"Runs were made by {len(by_code)} states of the code, so scores may differ for that "
            f"reason alone. {groups}."
        )
    if changed:
        sentences.append(
            f"Begun by one state of the code and continued by another: {_names(changed)}."
        )
    return " ".join(sentences) or None


def _has_changed_code(provenance: dict[str, Any]) -> bool:
    continued = provenance.get("continued")
    if not isinstance(continued, list):
        return False
    return any("commit" in part or "patch" in part for part in continued)


def _code(provenance: dict[str, Any]) -> str:
    code = _short(provenance.get("commit"))
    return f"{code} with {provenance['patch']}" if provenance.get("patch") else code


def _changes(previous: dict[str, Any] | None, current: dict[str, Any]) -> str:
    if previous is None:
        return "the first run"
    changes = []
    for key in dict.fromkeys([*previous, *current]):
        before, after = previous.get(key), current.get(key)
        if before != after:
            changes.append(f"{key}: {_short(before)} \u2192 {_short(after)}")
    if len(changes) > MAX_CHANGES:
        changes[MAX_CHANGES:] = [f"{len(changes) - MAX_CHANGES} more"]
    return "; ".join(changes) or "nothing"


def _short(value: Any) -> str:
    """Show a commit by its first digits, and any other value cut where it is long."""
    text = show(value)
    commit, plus, changes = text.partition("+")
    if len(commit) == 40 and all(digit in "0123456789abcdef" for digit in commit):
        return commit[:10] + plus + changes
    return text if len(text) <= MAX_VALUE else text[: MAX_VALUE - 1] + "\u2026"


def _names(trials: Sequence[ReportedTrial]) -> str:
    """Name trials, neighboring numbers as ranges, then runs of baselines or the confirmation."""
    numbers = [trial.number for trial in trials if trial.name.startswith("trial ")]
    others = [trial.name for trial in trials if not trial.name.startswith("trial ")]
    if len(others) > MAX_NAMES:
        others = [f"{counted(len(others), 'run')} of baselines or of the confirmation"]
    if not numbers:
        return ", ".join(others)
    ranges = _ranges(sorted(numbers))
    listed = ", ".join(ranges[:MAX_NAMES])
    if len(ranges) > MAX_NAMES:
        listed += f" and {len(ranges) - MAX_NAMES} more ranges"
    return ", ".join([f"trials {listed}", *others])


def _ranges(numbers: list[int]) -> list[str]:
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return [f"{low}" if low == high else f"{low}\u2013{high}" for low, high in ranges]
