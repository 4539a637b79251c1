"""Draw what happens over epochs: scores at rungs, masking ratios and losses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from amlp_ray.study.report.plotting import (
    ACCENT,
    PALE,
    Figure,
    add_color_bar,
    color_of,
    empty_figure,
    hover_text,
)
from amlp_ray.study.report.report_data import ReportData, ReportedTrial
from amlp_ray.study.storage.study_store import read_metrics
from amlp_ray.study.storage.trial_record import finite

# More are a gray carpet, and the file grows with every one.
MAX_CURVES = 60
LINE_DASHES = {"PRUNED": "dot", "COMPLETE": "solid"}

# Trials with a row of metrics for each epoch.
LoggedTrials = list[tuple[ReportedTrial, list[dict[str, Any]]]]


def curves(data: ReportData) -> tuple[Figure, list[Figure]]:
    """Draw the best trials, whatever their state; trials without a score come last.

    Returns:
        The metric at rungs, and what is logged at every epoch.
    """

    def rank(trial: ReportedTrial) -> tuple[bool, float]:
        return trial.metric_value is None, -trial.sort_value

    trials = sorted(data.search, key=rank)[:MAX_CURVES]
    logged = []
    for trial in trials:
        if rows := read_metrics(trial.path):
            logged.append((trial, rows))
    note = " The best trial is red." if data.best else ""
    if len(data.search) > MAX_CURVES:
        note += f" Only the best {MAX_CURVES} of {len(data.search)} trials are drawn."
    ratio_caption = (
        f"Share of patches that a trial masked in each epoch, darker for a higher {data.metric}: "
        f"see where dark lines gather.{note}"
    )
    ratios = _per_epoch("ratio", "Masking-ratio schedules tried", ratio_caption, logged, data)
    return _rungs(data, trials, note), [ratios, _losses(logged, data, note)]


def _rungs(data: ReportData, trials: list[ReportedTrial], note: str) -> Figure:
    title = f"{data.metric} while pretraining"
    caption = (
        f"{data.metric} at each rung, darker for a higher last score: dotted lines that end in a "
        f"cross were pruned, dashed ones still run.{note}"
    )
    trials = [trial for trial in trials if trial.rungs and trial.state_name != "FAIL"]
    if not trials:
        return Figure("rungs", title, caption, gap="No rung has been reached yet.")
    figure = empty_figure("epoch", data.metric)
    for trial, line in _with_lines(trials, data.best):
        before = len(trial.rungs) - 1
        if trial.state_name == "PRUNED":
            last_size, last_symbol = 9, "x"
        else:
            last_size, last_symbol = (4 if before else 7), "circle"
        figure.add_scatter(
            x=list(trial.rungs),
            y=list(trial.rungs.values()),
            mode="lines+markers",
            line={**line, "dash": LINE_DASHES.get(trial.state_name, "dash")},
            marker={
                "size": [4] * before + [last_size],
                "symbol": ["circle"] * before + [last_symbol],
            },
            text=hover_text(trial),
            hovertemplate="epoch %{x}: %{y:.3f}<br>%{text}<extra></extra>",
        )
    add_color_bar(figure, _values(trials), data.metric)
    return Figure("rungs", title, caption, figure)


def _losses(logged: LoggedTrials, data: ReportData, note: str) -> Figure:
    caption = (
        f"Training loss by epoch: see whether a run falls and stays finite. Losses at different "
        f"ratios are not comparable, so a lower curve is not a better encoder.{note}"
    )
    losses = _per_epoch("loss", "Pretraining loss", caption, logged, data)
    if losses.figure is not None:
        losses.figure.update_yaxes(type="log")
    return losses


def _per_epoch(
    column: str, title: str, caption: str, logged: LoggedTrials, data: ReportData
) -> Figure:
    """Draw a column of the logged metrics; its name stands on the y axis."""
    values_by_number = {}
    epochs_by_number = {}
    trials = []
    for trial, rows in logged:
        values = [finite(row.get(column)) for row in rows]
        if any(value is not None for value in values):
            trials.append(trial)
            values_by_number[trial.number] = values
            epochs_by_number[trial.number] = [row.get("epoch") for row in rows]
    if not trials:
        return Figure(column, title, caption, gap=f"No trial has logged a {column} yet.")
    figure = empty_figure("epoch", column)
    for trial, line in _with_lines(trials, data.best):
        values = values_by_number[trial.number]
        figure.add_scatter(
            x=epochs_by_number[trial.number],
            y=[None if value is None else float(f"{value:.4g}") for value in values],
            mode="lines" if len(values) > 1 else "markers",
            line=line,
            text=hover_text(trial),
            hovertemplate="epoch %{x}: %{y:.3g}<br>%{text}<extra></extra>",
        )
    add_color_bar(figure, _values(trials), data.metric)
    return Figure(column, title, caption, figure)


def _with_lines(
    trials: list[ReportedTrial], best: ReportedTrial | None
) -> Iterator[tuple[ReportedTrial, dict[str, Any]]]:
    """Yield trials with plotly's style of their line, worst first, so that good ones lie on top.

    The best trial is red and wide.
    """
    values = _values(trials)
    for trial in reversed(trials):
        if best is not None and trial.number == best.number:
            yield trial, {"color": ACCENT, "width": 3}
        elif trial.metric_value is None:
            yield trial, {"color": PALE, "width": 1}
        else:
            yield trial, {"color": color_of(trial.metric_value, values), "width": 1.5}


def _values(trials: list[ReportedTrial]) -> list[float]:
    return [trial.metric_value for trial in trials if trial.metric_value is not None]
