"""Where a study ran: every run of it, and trials that ran with other code than the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from amlp_ray.config.overrides import flat
from amlp_ray.study.report.report_data import ReportData, ReportedTrial
from amlp_ray.study.report.tables import Cell, Table, show
from amlp_ray.utils.files import read_json

MAX_RUNS = 50  # of the study; the rest is in environments.jsonl
MAX_CHANGES = 6  # told of one run


def runs(facts: ReportData) -> Table:
    """Each time that the study was run, and what had changed since the time before."""
    rows, before = [], None
    for environment in facts.environments:
        now = {key: value for key, value in flat(environment).items() if key != "started"}
        started = show(environment.get("started")).replace("T", " ").replace("+00:00", " UTC")
        rows.append([started, _short(environment.get("commit")), _changes(before, now)])
        before = now
    return Table(
        ["Started", "Commit", "Changed since"],
        [[Cell(text) for text in row] for row in rows[-MAX_RUNS:]],
    )


def latest(facts: ReportData) -> Table:
    """Everything that is known of the latest run by its dotted name, after the seeds that the settings hold."""
    config = facts.config
    rows = [
        ("seed of the study", config.seed),
        ("seed of the probe's label subsets and folds", config.probe.seed),
        (
            "seeds of the baselines",
            sorted(
                {run.attributes["seed"] for run in facts.baselines if "seed" in run.attributes},
                key=str,
            ),
        ),
        *flat(facts.environment).items(),
    ]
    return Table(["", ""], [[Cell(name), Cell(show(value))] for name, value in rows])


def commits(facts: ReportData) -> str | None:
    """Say which runs were made by which code; None where all were made by the same, or none says."""
    groups: dict[str, list[ReportedTrial]] = {}
    changed = []
    for run in (*facts.search, *facts.baselines, *facts.confirmation):
        origin = read_json(run.folder / "provenance.json") or {}
        if origin.get("commit") is not None:
            groups.setdefault(_code(origin), []).append(run)
        later = origin.get("continued")
        if any(
            key in part
            for part in (later if isinstance(later, list) else [])
            for key in ("commit", "patch")
        ):
            changed.append(run)
    sentences = []
    if len(groups) > 1:
        told = "; ".join(f"{code}: {_named(members)}" for code, members in groups.items())
        sentences.append(
            f"Runs were made by {len(groups)} states of the code, so scores may differ for that reason alone. {told}."
        )
    if changed:
        sentences.append(
            f"Begun by one state of the code and continued by another: {_named(changed)}."
        )
    return " ".join(sentences) or None


def _code(origin: dict[str, Any]) -> str:
    return _short(origin.get("commit")) + (
        f" with {origin['patch']}" if origin.get("patch") else ""
    )


def _changes(before: dict[str, Any] | None, now: dict[str, Any]) -> str:
    if before is None:
        return "the first run"
    changed = [key for key in dict.fromkeys([*before, *now]) if before.get(key) != now.get(key)]
    told = [
        f"{key}: {_short(before.get(key))} \u2192 {_short(now.get(key))}"
        for key in changed[:MAX_CHANGES]
    ]
    more = [f"{len(changed) - MAX_CHANGES} more"] if len(changed) > MAX_CHANGES else []
    return "; ".join(told + more) or "nothing"


def _short(value: Any) -> str:
    """Show a commit by its first digits, and anything else as it is, cut where it is long."""
    text = show(value)
    commit, plus, changes = text.partition("+")
    if len(commit) == 40 and all(digit in "0123456789abcdef" for digit in commit):
        return commit[:10] + plus + changes
    return text if len(text) <= 40 else text[:39] + "\u2026"


def _named(members: Sequence[ReportedTrial]) -> str:
    """Name runs, neighbouring trial numbers as ranges."""
    numbers = sorted(run.number for run in members if run.name.startswith("trial "))
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    told = [f"{low}" if low == high else f"{low}\u2013{high}" for low, high in ranges]
    shown = ", ".join(told[:8]) + (f" and {len(told) - 8} more ranges" if len(told) > 8 else "")
    others = [run.name for run in members if not run.name.startswith("trial ")]
    parts = [f"trials {shown}"] if told else []
    return ", ".join(
        parts
        + (
            others
            if len(others) <= 8
            else [f"{len(others)} runs of baselines or of the confirmation"]
        )
    )
