"""Build the tables of a report: rows of texts, with numbers to sort them by."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain
from typing import Any

from amlp_ray.study.confirmation.comparison import Comparison, read_size
from amlp_ray.study.report.comparison import Baseline
from amlp_ray.study.report.report_data import TITLES, ReportData, ReportedTrial
from amlp_ray.study.storage.trial_record import finite

MISSING = "\u2013"
# Of each kind of trial; a browser sorts more only slowly.
MAX_ROWS = 500
MAX_FRONT = 100
MEASURES = ("ppv", "sensitivity", "ap")
SIZES = ("dsc_small", "dsc_medium", "dsc_large")


@dataclass(frozen=True)
class Cell:
    """A cell of a table; `order` sorts it where the text would not."""

    text: str
    order: float | None = None


@dataclass(frozen=True)
class Table:
    """A table with titles of its columns."""

    columns: list[str]
    rows: list[list[Cell]]


def text_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Return a table of texts alone."""
    return Table(list(columns), [[Cell(text) for text in row] for row in rows])


def scores(
    data: ReportData, baselines: Sequence[Baseline], comparisons: Sequence[Comparison]
) -> Table:
    """Show the best trial, baselines and floors side by side."""
    columns = ["", "DSC", "Spread", *(TITLES[key] for key in MEASURES), "Empties correct"]
    columns += ["Best minus this", "95 % interval", "Best is"]
    rows = []
    best = data.best
    if best is not None:
        subsets = best.measure("dsc_sd")
        spread = "one run"
        if subsets is not None:
            spread += f", SD {subsets:.3f} over label subsets"
        title = f"Best trial ({best.number})"
        rows.append([title, three_digits(best.dsc), spread, *_measures(best), *[MISSING] * 3])
    by_name = {item.baseline: item for item in comparisons}
    for baseline in baselines:
        row = [_baseline_title(baseline), three_digits(baseline.dsc), baseline.spread]
        rows.append([*row, *_measures(baseline), *_comparison_cells(by_name.get(baseline.name))])
    if (floor := _mean_mask_dsc(data, baselines)) is not None:
        versus = [MISSING] * 3
        if best and best.dsc is not None:
            difference = round(best.dsc - floor, 6)
            reading = read_size(difference, data.config.equivalence_margin)
            versus = [f"{difference:+.3f}", MISSING, reading]
        title = "mean training mask on every image"
        rows.append([title, three_digits(floor), *[MISSING] * 5, *versus])
    return text_table(columns, rows)


def sizes(data: ReportData, baselines: Sequence[Baseline]) -> Table:
    """Show DSC by size of the lesion; no rows where no run has been scored by size."""
    low, high = (f"{100 * share:g} %" for share in data.config.probe.sizes)
    columns = ["", f"Small (below {low} of the image)"]
    columns += [f"Medium ({low} to {high})", f"Large (above {high})"]
    rows = []
    if data.best:
        rows.append([f"Best trial ({data.best.number})", *_size_texts(data.best)])
    for baseline in baselines:
        rows.append([_baseline_title(baseline), *_size_texts(baseline)])
    return text_table(columns, without_empty_rows(rows))


def front(data: ReportData) -> Table:
    """Show the Pareto front, the best by the metric first; no rows for one objective."""
    objectives = list(data.config.objectives)
    if len(objectives) < 2:
        return Table([], [])
    names = data.parameter_names()
    ranked = sorted(data.front, key=lambda trial: (trial.rank, trial.number))
    rows = []
    for position, trial in enumerate(ranked[:MAX_FRONT]):
        row = [Cell(trial.name, position)]
        row += [_value_cell(trial.objectives[name]) for name in objectives]
        rows.append(row + _parameter_cells(trial, names))
    return Table(["Run", *(TITLES[name] for name in objectives), *names], rows)


def lineage(rows: Sequence[dict[str, Any]]) -> Table:
    """Show the steps of population-based training."""
    columns = ["Trial", "Generation", "Member", "Continues", "Epochs", "Ratio", "Score", "State"]
    table_rows = []
    for row in rows[:MAX_ROWS]:
        cells = [_value_cell(row[key]) for key in ("trial", "generation", "member", "parent")]
        cells += [
            Cell(f"{row['from_epoch']} to {row['to_epoch']}", row["to_epoch"]),
            Cell(f"{row['ratio_from']:.3f} to {row['ratio_to']:.3f}", row["ratio_to"]),
            _score_cell(row["score"]),
            Cell(row["state"]),
            Cell("yes" if row["best"] else MISSING),
        ]
        table_rows.append(cells)
    return Table([*columns, "Learned schedule"], table_rows)


def trials(data: ReportData) -> Table:
    """Show trials of the search, then baselines, then imported trials; the best where many."""
    names = data.parameter_names()
    metric = data.config.metric
    objectives = [name for name in data.config.objectives if name != metric]
    measures = [key for key in MEASURES if key not in (metric, *objectives)]
    columns = ["Run", "State", data.metric, *(TITLES[name] for name in [*objectives, *measures])]
    columns += [*names, "Epochs", "Seconds", "Seed", "Notes"]
    rows = []
    for position, trial in enumerate(chain(*map(_best_of, _trial_groups(data)))):
        seconds = trial.cost("seconds")
        row = [
            Cell(trial.name, position),
            Cell("imported" if trial.is_imported else trial.state_name),
            _score_cell(trial.metric_value),
        ]
        row += [_value_cell(trial.objectives.get(name)) for name in objectives]
        row += [_score_cell(trial.measure(key)) for key in measures]
        row += _parameter_cells(trial, names)
        row += [
            Cell(show(trial.epochs), trial.epochs),
            Cell(MISSING if seconds is None else f"{seconds:.0f}", seconds),
            _value_cell(trial.attributes.get("seed")),
            Cell(notes(trial)),
        ]
        rows.append(row)
    return Table(columns, rows)


def left_out(data: ReportData) -> int:
    """Count the trials that the table of all trials leaves out."""
    return sum(max(0, len(group) - MAX_ROWS) for group in _trial_groups(data))


def parameters(trial: ReportedTrial) -> Table:
    """Show the parameters of one trial."""
    rows = [[name, show(value)] for name, value in trial.params.items()]
    return text_table(["Parameter", "Value"], rows)


def notes(trial: ReportedTrial) -> str:
    """Say where a trial comes from, what happened to it, and why it failed."""
    parts = []
    if trial.reason and trial.state_name in ("FAIL", "PRUNED"):
        parts.append(show(trial.reason))
    if trial.note:
        parts.append(trial.note)
    if trial.lost:
        times = {1: "once", 2: "twice"}.get(trial.lost, f"{trial.lost} times")
        parts.append(f"its process was lost {times}")
    if trial.uses_ground_truth:
        parts.append("uses true masks, compared with nothing")
    if trial.is_full_length and not trial.is_feasible:
        parts.append("beyond the limits")
    return "; ".join(parts) or MISSING


def count_words(count: int, noun: str) -> str:
    """Return a count with its noun, in the plural unless it is one."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def duration(time: timedelta) -> str:
    """Return a time in hours and minutes, or in minutes and seconds."""
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


def three_digits(value: float | None) -> str:
    """Show a score with three digits."""
    return MISSING if value is None else f"{value:.3f}"


def percent(share: float | None) -> str:
    """Show a share as a whole percentage."""
    return MISSING if share is None else f"{100 * share:.0f} %"


def interval_text(interval: tuple[float, float] | None) -> str:
    """Show an interval of differences."""
    return MISSING if interval is None else f"{interval[0]:+.3f} to {interval[1]:+.3f}"


def without_empty_rows(rows: Iterable[list[str]]) -> list[list[str]]:
    """Leave out rows that have a title and no value."""
    return [row for row in rows if set(row[1:]) != {MISSING}]


def _trial_groups(data: ReportData) -> list[list[ReportedTrial]]:
    search = sorted([*data.search, *data.copies], key=lambda trial: trial.number)
    return [search, data.baselines, data.imported]


def _best_of(trials: list[ReportedTrial]) -> list[ReportedTrial]:
    """Return the best trials in the order of their numbers, at most MAX_ROWS."""
    if len(trials) <= MAX_ROWS:
        return trials
    ranked = sorted(trials, key=lambda trial: (not trial.is_complete, trial.rank))
    return sorted(ranked[:MAX_ROWS], key=lambda trial: trial.number)


def _mean_mask_dsc(data: ReportData, baselines: Sequence[Baseline]) -> float | None:
    """Return the DSC of the mean training mask, which any scored run holds."""
    scored = [data.best] if data.best else []
    for baseline in baselines:
        scored += baseline.runs
    values = (trial.measure("mean_mask_dsc") for trial in scored)
    return next((value for value in values if value is not None), None)


def _comparison_cells(item: Comparison | None) -> list[str]:
    if item is None:
        return [MISSING] * 3
    difference = item.difference
    return [f"{difference.mean:+.3f}", interval_text(difference.interval), item.reading]


def _parameter_cells(trial: ReportedTrial, names: Iterable[str]) -> list[Cell]:
    return [_value_cell(trial.params.get(name)) for name in names]


def _value_cell(value: Any) -> Cell:
    return Cell(show(value), finite(value))


def _score_cell(value: float | None) -> Cell:
    return Cell(three_digits(value), value)


def _baseline_title(baseline: Baseline) -> str:
    if baseline.uses_ground_truth:
        return f"baseline {baseline.name} (uses true masks, compared with nothing)"
    if baseline.name == "scratch":
        return "baseline scratch (random frozen encoder)"
    return f"baseline {baseline.name}"


def _size_texts(scored: ReportedTrial | Baseline) -> list[str]:
    return [three_digits(scored.measure(key)) for key in SIZES]


def _measures(scored: ReportedTrial | Baseline) -> list[str]:
    texts = [three_digits(scored.measure(key)) for key in MEASURES]
    texts.append(percent(scored.measure("empty_correct")))
    return texts
