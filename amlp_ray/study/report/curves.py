"""Draw what happens over epochs: scores at rungs, masking ratios and losses."""

from __future__ import annotations

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
    """Draw the best trials, whatever their state; good ones lie on top.

    Returns:
        The metric at rungs, and what is logged at every epoch.
    """
    trials = sorted(data.search, key=lambda trial: trial.rank)[:MAX_CURVES]
    logged = [(trial, read_metrics(trial.path)) for trial in trials]
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
    scores = _scores(trials)
    for trial in reversed(trials):
        before = len(trial.rungs) - 1
        if trial.state_name == "PRUNED":
            last_size, last_symbol = 9, "x"
        else:
            last_size, last_symbol = (4 if before else 7), "circle"
        dash = LINE_DASHES.get(trial.state_name, "dash")
        figure.add_scatter(
            x=list(trial.rungs),
            y=list(trial.rungs.values()),
            mode="lines+markers",
            line={**_line_style(trial, data.best, scores), "dash": dash},
            marker={
                "size": [4] * before + [last_size],
                "symbol": ["circle"] * before + [last_symbol],
            },
            text=hover_text(trial),
            hovertemplate="epoch %{x}: %{y:.3f}<br>%{text}<extra></extra>",
        )
    add_color_bar(figure, scores, data.metric)
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
    drawn = []
    for trial, rows in logged:
        values = [finite(row.get(column)) for row in rows]
        if any(value is not None for value in values):
            drawn.append((trial, [row.get("epoch") for row in rows], values))
    if not drawn:
        return Figure(column, title, caption, gap=f"No trial has logged a {column} yet.")
    figure = empty_figure("epoch", column)
    scores = _scores([trial for trial, *_ in drawn])
    for trial, epochs, values in reversed(drawn):
        figure.add_scatter(
            x=epochs,
            y=[None if value is None else float(f"{value:.4g}") for value in values],
            mode="lines" if len(values) > 1 else "markers",
            line=_line_style(trial, data.best, scores),
            text=hover_text(trial),
            hovertemplate="epoch %{x}: %{y:.3g}<br>%{text}<extra></extra>",
        )
    add_color_bar(figure, scores, data.metric)
    return Figure(column, title, caption, figure)


def _line_style(
    trial: ReportedTrial, best: ReportedTrial | None, scores: list[float]
) -> dict[str, Any]:
    """Return plotly's style of a trial's line; that of the best trial is red and wide."""
    if best is not None and trial.number == best.number:
        return {"color": ACCENT, "width": 3}
    if trial.metric_value is None:
        return {"color": PALE, "width": 1}
    return {"color": color_of(trial.metric_value, scores), "width": 1.5}


def _scores(trials: list[ReportedTrial]) -> list[float]:
    return [trial.metric_value for trial in trials if trial.metric_value is not None]
