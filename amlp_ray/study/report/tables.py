"""The tables of a report: rows of texts, and of numbers to sort them by."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from amlp_ray.study.report.comparison import Baseline, Comparison, read
from amlp_ray.study.report.report_data import TITLES, ReportData, ReportedTrial, finite
from amlp_ray.study.report.summary import spread

MISSING = "\u2013"
MAX_ROWS = 500  # of each kind of run; a browser sorts more only slowly
MAX_FRONT = 100
MEASURES = (("ppv", "PPV"), ("sensitivity", "Sensitivity"), ("ap", "Patch AP"))


@dataclass(frozen=True)
class Cell:
    text: str
    order: float | None = None  # sorts before the text does


@dataclass(frozen=True)
class Table:
    columns: list[str]
    rows: list[list[Cell]]


def scores(facts: ReportData, baselines: list[Baseline], comparisons: list[Comparison]) -> Table:
    """Best trial, baselines and floors side by side."""
    columns = ["", "DSC", "Spread", *(title for _, title in MEASURES), "Empties correct"]
    columns += ["Best minus this", "95 % interval", "Best is"]
    rows, best, compared = [], facts.best, {item.baseline.name: item for item in comparisons}
    if best is not None:
        subsets = best.measure("dsc_sd")
        noise = "one run" + ("" if subsets is None else f", SD {subsets:.3f} over label subsets")
        rows.append(
            [
                f"Best trial ({best.number})",
                _three(best.dsc),
                noise,
                *_measured(best),
                *[MISSING] * 3,
            ]
        )
    for baseline in baselines:
        item = compared.get(baseline.name)
        interval = (
            f"{item.interval[0]:+.3f} to {item.interval[1]:+.3f}"
            if item and item.interval
            else MISSING
        )
        versus = [f"{item.difference:+.3f}", interval, item.reading] if item else [MISSING] * 3
        rows.append(
            [
                _arm_title(baseline),
                f"{baseline.dsc:.3f}",
                spread(baseline),
                *_measured(baseline),
                *versus,
            ]
        )
    scored = [*([best] if best else []), *(run for baseline in baselines for run in baseline.runs)]
    floor = next(
        (value for run in scored if (value := run.measure("mean_mask_dsc")) is not None), None
    )
    if floor is not None:
        versus = [MISSING] * 3
        if best and best.dsc is not None:
            difference = round(best.dsc - floor, 6)
            versus = [
                f"{difference:+.3f}",
                MISSING,
                read(difference, facts.config.equivalence_margin),
            ]
        rows.append(["mean training mask on every image", _three(floor), *[MISSING] * 5, *versus])
    return Table(columns, [[Cell(text) for text in row] for row in rows])


def sizes(facts: ReportData, baselines: list[Baseline]) -> Table:
    """DSC by size of the lesion, for the best trial and the baselines; no rows where no run has been scored by size."""
    low, high = (f"{100 * share:g} %" for share in facts.config.probe.sizes)
    columns = [
        "",
        f"Small (below {low} of the image)",
        f"Medium ({low} to {high})",
        f"Large (above {high})",
    ]
    scored: list[tuple[str, ReportedTrial | Baseline]] = [
        (_arm_title(baseline), baseline) for baseline in baselines
    ]
    if facts.best:
        scored.insert(0, (f"Best trial ({facts.best.number})", facts.best))
    rows = [
        [name, *(_three(item.measure(key)) for key in ("dsc_small", "dsc_medium", "dsc_large"))]
        for name, item in scored
    ]
    return Table(
        columns, [[Cell(text) for text in row] for row in rows if set(row[1:]) != {MISSING}]
    )


def front(facts: ReportData) -> Table:
    """The Pareto front, the best by the metric first; no rows for a study of one objective."""
    if len(facts.config.objectives) < 2:
        return Table([], [])
    objectives, names = list(facts.config.objectives), facts.parameters()
    rows = []
    members = sorted(facts.front, key=lambda run: (-(run.value or 0.0), run.number))
    for place, run in enumerate(members[:MAX_FRONT]):
        rows.append([
            Cell(run.name, place),
            *(_value(run.values[name]) for name in objectives),
            *(_value(run.params[name]) if name in run.params else Cell(MISSING) for name in names),
        ])  # fmt: skip
    return Table(["Run", *(TITLES[name] for name in objectives), *names], rows)


def lineage(rows: list[dict[str, Any]]) -> Table:
    """The segments of a population."""
    shown = rows[:MAX_ROWS]
    columns = [
        "Trial",
        "Generation",
        "Member",
        "Goes on from",
        "Epochs",
        "Ratio",
        "Score",
        "State",
        "Learnt schedule",
    ]
    return Table(columns, [
        [
            *(_value(row[key]) for key in ("trial", "generation", "member", "parent")),
            Cell(f"{row['from_epoch']} to {row['to_epoch']}", row["to_epoch"]),
            Cell(f"{row['ratio_from']:.3f} to {row['ratio_to']:.3f}", row["ratio_to"]),
            Cell(_three(row["score"]), row["score"]),
            Cell(row["state"]),
            Cell("yes" if row["best"] else MISSING),
        ]
        for row in shown
    ])  # fmt: skip


def trials(facts: ReportData) -> Table:
    """Trials of the search, then runs of the baselines, then what was imported; the best of each where they are many."""
    names, metric = facts.parameters(), facts.config.metric
    objectives = [name for name in facts.config.objectives if name != metric]
    measures = [(key, title) for key, title in MEASURES if key not in (metric, *objectives)]
    columns = [
        "Run",
        "State",
        facts.metric,
        *(TITLES[name] for name in objectives),
        *(title for _, title in measures),
    ]
    columns += [*names, "Epochs", "Seconds", "Seed", "Notes"]
    own = sorted([*facts.search, *facts.copies], key=lambda run: run.number)
    rows = []
    for place, run in enumerate([*_kept(own), *_kept(facts.baselines), *_kept(facts.imported)]):
        seconds = run.cost("seconds")
        rows.append([
            Cell(run.name, place),
            Cell("imported" if "source" in run.attributes else run.state),
            Cell(_three(run.value), run.value),
            *(_value(run.values.get(name)) for name in objectives),
            *(Cell(_three(run.measure(key)), run.measure(key)) for key, _ in measures),
            *(_value(run.params[name]) if name in run.params else Cell(MISSING) for name in names),
            Cell(show(run.epochs), run.epochs),
            Cell(MISSING if seconds is None else f"{seconds:.0f}", seconds),
            _value(run.attributes.get("seed")),
            Cell(notes(facts, run)),
        ])  # fmt: skip
    return Table(columns, rows)


def left_out(facts: ReportData) -> int:
    """Count the runs that the table of all trials leaves out."""
    groups = [[*facts.search, *facts.copies], facts.baselines, facts.imported]
    return sum(max(0, len(group) - MAX_ROWS) for group in groups)


def _kept(runs: list[ReportedTrial]) -> list[ReportedTrial]:
    if len(runs) <= MAX_ROWS:
        return runs
    best = sorted(
        runs, key=lambda run: (run.state != "COMPLETE", run.value is None, -(run.value or 0.0))
    )
    return sorted(best[:MAX_ROWS], key=lambda run: run.number)


def notes(facts: ReportData, run: ReportedTrial) -> str:
    """Say where a run comes from, what happened to it, and why it failed."""
    about = run.attributes
    told = [
        show(about.get("reason"))
        if about.get("reason") and run.state in ("FAIL", "PRUNED")
        else None,
        run.note,
        f"its process was lost {_times(about['lost'])}" if about.get("lost") else None,
        "diagnosis: sees true masks, compared with nothing" if run.diagnosis else None,
        "beyond the limits" if run.finished and not run.feasible else None,
    ]
    return "; ".join(filter(None, told)) or MISSING


def counted(count: int, thing: str) -> str:
    return f"{count:,} {thing}" + ("" if count == 1 else "s")


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def parameters(run: ReportedTrial) -> Table:
    rows = [[Cell(name), Cell(show(value))] for name, value in run.params.items()]
    return Table(["Parameter", "Value"], rows)


def duration(time: timedelta) -> str:
    minutes, seconds = divmod(round(time.total_seconds()), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def show(value: Any) -> str:
    """Show a value as it is written in YAML, with four digits and without line breaks."""
    if value is None or value == "":
        return MISSING
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(show(item) for item in value) or MISSING
    if isinstance(value, Mapping):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)


def _value(value: Any) -> Cell:
    return Cell(show(value), finite(value))


def _arm_title(baseline: Baseline) -> str:
    if any(run.diagnosis for run in baseline.runs):
        return f"baseline {baseline.name} (diagnosis: sees true masks, compared with nothing)"
    return (
        "baseline scratch (random frozen encoder)"
        if baseline.name == "scratch"
        else f"baseline {baseline.name}"
    )


def _measured(scored: ReportedTrial | Baseline) -> list[str]:
    return [
        *(_three(scored.measure(key)) for key, _ in MEASURES),
        _share(scored.measure("empty_correct")),
    ]


def _three(value: float | None) -> str:
    return MISSING if value is None else f"{value:.3f}"


def _share(value: float | None) -> str:
    return MISSING if value is None else f"{100 * value:.0f} %"
