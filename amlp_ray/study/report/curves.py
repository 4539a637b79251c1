"""Figures of what happens over epochs: scores at rungs, masking ratios, losses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from amlp_ray.study.report.plotting import ACCENT, PALE, SCALE, Figure, empty, hover
from amlp_ray.study.report.report_data import ReportData, ReportedTrial, finite
from amlp_ray.study.storage.study_store import read_metrics

MAX_CURVES = 60  # more are a grey carpet, and the file grows with every one

Logged = list[tuple[ReportedTrial, list[dict[str, Any]]]]  # runs with a row for each epoch


def curves(facts: ReportData) -> tuple[Figure, list[Figure]]:
    """Draw the best trials, whatever their state; trials without a score come last.

    Returns: the metric at rungs, and what is logged at every epoch.
    """
    drawn = sorted(facts.search, key=lambda run: (run.value is None, -(run.value or 0.0)))[
        :MAX_CURVES
    ]
    logged = [(run, rows) for run in drawn if (rows := read_metrics(run.folder))]
    note = " The best trial is red." if facts.best else ""
    if len(facts.search) > MAX_CURVES:
        note += f" Only the best {MAX_CURVES} of {len(facts.search)} trials are drawn."
    return _rungs(facts, drawn, note), [
        _per_epoch(
            "ratio",
            "Masking-ratio schedules tried",
            f"Share of patches that a trial masked in each epoch, darker for a higher {facts.metric}: see where dark "
            f"lines gather.{note}",
            logged,
            facts,
        ),
        _losses(logged, facts, note),
    ]


def _rungs(facts: ReportData, drawn: list[ReportedTrial], note: str) -> Figure:
    title = f"{facts.metric} while pretraining"
    caption = (
        f"{facts.metric} at each rung, darker for a higher last score: dotted lines that end in a cross were pruned, "
        f"dashed ones still run."
    )
    runs = [run for run in drawn if run.rungs and run.state != "FAIL"]
    if not runs:
        return Figure("rungs", title, caption, gap="No rung has been reached yet.")
    figure = empty("epoch", facts.metric)
    for run, line in _colored(runs, facts.best):
        line["dash"] = {"PRUNED": "dot", "COMPLETE": "solid"}.get(run.state, "dash")
        before, pruned = len(run.rungs) - 1, run.state == "PRUNED"
        figure.add_scatter(
            x=list(run.rungs),
            y=list(run.rungs.values()),
            mode="lines+markers",
            line=line,
            marker={
                "size": [4] * before + [9 if pruned else 4 if before else 7],
                "symbol": ["circle"] * before + ["x" if pruned else "circle"],
            },
            text=hover(run),
            hovertemplate="epoch %{x}: %{y:.3f}<br>%{text}<extra></extra>",
        )
    return Figure("rungs", title, caption + note, _with_bar(figure, runs, facts.metric))


def _losses(logged: Logged, facts: ReportData, note: str) -> Figure:
    caption = (
        "Training loss by epoch: see whether a run falls and stays finite. Losses at different ratios are not "
        "comparable, so a lower curve is not a better encoder."
    )
    item = _per_epoch("loss", "Pretraining loss", caption + note, logged, facts)
    if item.figure is not None:
        item.figure.update_yaxes(type="log")
    return item


def _per_epoch(column: str, title: str, caption: str, logged: Logged, facts: ReportData) -> Figure:
    """Draw a column of the metrics that has its own name on the y axis."""
    logged = [
        (run, rows)
        for run, rows in logged
        if any(finite(row.get(column)) is not None for row in rows)
    ]
    if not logged:
        return Figure(column, title, caption, gap=f"No trial has logged a {column} yet.")
    rows_of = {run.number: rows for run, rows in logged}
    runs = [run for run, _ in logged]
    figure = empty("epoch", column)
    for run, line in _colored(runs, facts.best):
        rows = rows_of[run.number]
        values = [finite(row.get(column)) for row in rows]
        figure.add_scatter(
            x=[row.get("epoch") for row in rows],
            y=[None if value is None else float(f"{value:.4g}") for value in values],
            mode="lines" if len(rows) > 1 else "markers",
            line=line,
            text=hover(run),
            hovertemplate="epoch %{x}: %{y:.3g}<br>%{text}<extra></extra>",
        )
    return Figure(column, title, caption, _with_bar(figure, runs, facts.metric))


def _colored(
    runs: list[ReportedTrial], best: ReportedTrial | None
) -> Iterator[tuple[ReportedTrial, dict[str, Any]]]:
    """Yield runs with their line, worst first, so that good ones lie on top; the best trial is red and wide."""
    low, high = _ends(runs)
    for run in reversed(runs):
        if best is not None and run.number == best.number:
            yield run, {"color": ACCENT, "width": 3}
        elif run.value is None:
            yield run, {"color": PALE, "width": 1}
        else:
            place = (run.value - low) / (high - low) if high > low else 1.0
            yield run, {"color": sample_colorscale(SCALE, [place])[0], "width": 1.5}


def _ends(runs: list[ReportedTrial]) -> tuple[float, float]:
    values = [run.value for run in runs if run.value is not None]
    return (min(values), max(values)) if values else (0.0, 0.0)


def _with_bar(figure: go.Figure, runs: list[ReportedTrial], metric: str) -> go.Figure:
    """Add the colour bar of the metric: plotly draws one only for markers, so an unseen one carries it."""
    low, high = _ends(runs)
    if high > low:
        bar = {"title": {"text": metric}, "thickness": 14}
        marker = {
            "color": [low],
            "cmin": low,
            "cmax": high,
            "colorscale": SCALE,
            "showscale": True,
            "colorbar": bar,
        }
        figure.add_scatter(x=[None], y=[None], mode="markers", marker=marker, hoverinfo="skip")
    figure.update_layout(showlegend=False)
    return figure
