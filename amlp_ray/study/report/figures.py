"""Draw what was found: history, Pareto fronts, importances and parallel coordinates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from itertools import accumulate, cycle
from typing import Any

import plotly.graph_objects as go

from amlp_ray.config import Range
from amlp_ray.study.report.comparison import Baseline
from amlp_ray.study.report.plotting import (
    ACCENT,
    BASELINE_COLORS,
    BLUE,
    LAYOUT,
    PALE,
    SCALE,
    Figure,
    empty_figure,
    hover_text,
)
from amlp_ray.study.report.report_data import TITLES, ReportData, ReportedTrial
from amlp_ray.study.storage.trial_record import finite

# Of more trials, the text under the pointer leaves parameters out: they would be most of the file.
MANY_TRIALS = 1000
# Tick of a parameter that a trial did not have.
UNUSED = "\u2013"


def history(data: ReportData, baselines: Sequence[Baseline]) -> Figure:
    """Draw the score of every trial, the best so far and the baselines' means."""
    title = "Optimization history"
    caption = (
        "Each mark is a trial in the order of its number; the line is the best complete trial so "
        "far, and dashes are means of baselines. Pruned trials stand at their last score, which "
        "is not comparable with full length."
    )
    ended = [trial for trial in data.search if trial.state_name in ("COMPLETE", "PRUNED")]
    scored = [trial for trial in ended if trial.metric_value is not None]
    if not scored:
        return Figure("history", title, caption, gap="No trial has been scored yet.")
    figure = empty_figure("trial", data.metric)
    size = 9 if len(scored) < MANY_TRIALS else 5
    for state, symbol, width, color in (
        ("PRUNED", "x-thin-open", 2, PALE),
        ("COMPLETE", "circle", 0, BLUE),
    ):
        trials = [trial for trial in scored if trial.state_name == state]
        if trials:
            line = {"width": width, "color": color}
            figure.add_scatter(
                x=[trial.number for trial in trials],
                y=[trial.metric_value for trial in trials],
                mode="markers",
                name=state.lower(),
                marker={"symbol": symbol, "size": size, "color": color, "line": line},
                text=_hover_texts(trials, len(scored)),
                hovertemplate="%{text}<extra></extra>",
            )
    complete = [trial for trial in scored if trial.is_complete and trial.is_feasible]
    if complete:
        figure.add_scatter(
            x=[trial.number for trial in complete],
            y=list(accumulate((trial.sort_value for trial in complete), max)),
            mode="lines",
            name="best so far",
            line={"shape": "hv", "color": ACCENT},
            hoverinfo="skip",
        )
    if data.config.metric == "dsc":
        numbers = [trial.number for trial in scored]
        for baseline, color in zip(baselines, cycle(BASELINE_COLORS), strict=False):
            figure.add_scatter(
                x=[min(numbers) - 0.5, max(numbers) + 0.5],
                y=[baseline.dsc] * 2,
                mode="lines",
                name=f"baseline {escape(baseline.name)}",
                line={"dash": "dash", "width": 1.5, "color": color},
            )
    return Figure("history", title, caption, figure)


def fronts(data: ReportData) -> list[Figure]:
    """Draw the metric against every other objective; nothing for a study of one objective."""
    names = list(data.config.objectives)
    if len(names) < 2:
        return []
    y_name = data.config.metric if data.config.metric in names else names[0]
    return [_front(data, x_name, y_name) for x_name in names if x_name != y_name]


def _front(data: ReportData, x_name: str, y_name: str) -> Figure:
    has_two_objectives = len(data.config.objectives) == 2
    key = f"front_{x_name}"
    title = f"{TITLES[y_name]} against {TITLES[x_name]}"
    joined = " and joined" if has_two_objectives else ""
    broken = ", and trials that break a limit are crosses" if data.config.limits else ""
    caption = (
        f"Each mark is a complete trial; those of the Pareto front, which no other beats in every "
        f"objective, are red{joined}{broken}."
    )
    complete = [trial for trial in data.search if trial.is_complete]
    trials = [trial for trial in complete if {x_name, y_name} <= trial.objectives.keys()]
    if not trials:
        return Figure(key, title, caption, gap="No complete trial has all objectives yet.")
    on_front = {trial.number for trial in data.front}
    behind = [trial for trial in trials if trial.is_feasible and trial.number not in on_front]
    infeasible = [trial for trial in trials if not trial.is_feasible]
    front = sorted(data.front, key=lambda trial: trial.objectives[x_name])
    cross = {"symbol": "x-thin-open", "size": 8, "color": PALE, "line": {"width": 2}}
    figure = empty_figure(TITLES[x_name], TITLES[y_name])
    for name, group, marker in (
        ("breaks a limit", infeasible, cross),
        ("complete", behind, {"size": 7, "color": BLUE}),
        ("Pareto front", front, {"size": 10, "color": ACCENT}),
    ):
        if not group:
            continue
        is_joined = has_two_objectives and name == "Pareto front"
        figure.add_scatter(
            x=[trial.objectives[x_name] for trial in group],
            y=[trial.objectives[y_name] for trial in group],
            mode="lines+markers" if is_joined else "markers",
            line={"color": ACCENT, "width": 1.5, "shape": _line_shape(data, x_name, y_name)},
            name=name,
            marker=marker,
            text=_hover_texts(group, len(trials)),
            hovertemplate="%{text}<br>%{x:.4g}<extra></extra>",
        )
    return Figure(key, title, caption, figure)


def _line_shape(data: ReportData, x_name: str, y_name: str) -> str:
    """Return plotly's shape of a front: steps on the side that no trial has reached."""
    directions: Mapping[Any, str] = data.config.objectives
    return "vh" if directions[x_name] == directions[y_name] else "hv"


def importances(data: ReportData) -> list[Figure]:
    """Draw the importances for each objective."""
    return [_importance(data, name) for name in data.importances]


def _importance(data: ReportData, name: str) -> Figure:
    key, title = "importances", "Importances"
    if len(data.importances) > 1:
        key, title = f"importances_{name}", f"Importances for {TITLES[name]}"
    caption = (
        "The longer the bar, the more the best trials differ from all in this parameter "
        "(PED-ANOVA, shares of 1); the bars say nothing about direction, and with tens of trials "
        "they are rough."
    )
    importance = data.importances[name]
    if not importance.shares:
        return Figure(key, title, caption, gap=importance.gap or "")
    shares = dict(reversed(importance.shares.items()))
    figure = empty_figure("share", "")
    figure.add_bar(
        x=list(shares.values()),
        y=[escape(parameter) for parameter in shares],
        orientation="h",
        marker_color=BLUE,
        hovertemplate="%{y}: %{x:.2f}<extra></extra>",
    )
    figure.update_yaxes(automargin=True, showgrid=False)
    figure.update_layout(bargap=0.4)
    return Figure(key, title, caption, figure, height=110 + 32 * len(shares))


def parallel(data: ReportData) -> Figure:
    """Draw every complete trial as a line through its parameters and its score."""
    title = "Parallel coordinates"
    caption = (
        f"Each line is a complete trial, darker for a higher {data.metric}; drag along an axis to "
        f"pick lines; the tick {UNUSED} holds trials in which a parameter had no effect and was "
        f"not sampled."
    )
    complete = [trial for trial in data.search if trial.is_full_length]
    if len(complete) > MANY_TRIALS:
        caption += f" Only the best {MANY_TRIALS} trials are drawn."
    complete.sort(key=lambda trial: trial.sort_value)  # good ones lie on top
    complete = complete[-MANY_TRIALS:]
    searched = {name for trial in complete for name in trial.params}
    names = [name for name in data.parameter_names() if name in searched]
    if not names:
        gap = "No complete trial with a searched parameter yet."
        return Figure("parallel", title, caption, gap=gap)
    values = [trial.metric_value for trial in complete]
    dimensions = [_dimension(data, data.metric, values)]
    for name in names:
        dimensions.append(_dimension(data, name, [trial.params.get(name) for trial in complete]))
    line = {"color": values, "colorscale": SCALE, "showscale": True}
    line["colorbar"] = {"title": {"text": data.metric}}
    figure = go.Figure(layout=LAYOUT)
    figure.add_parcoords(dimensions=dimensions, line=line, labelangle=-15)
    figure.update_layout(margin={"l": 60, "r": 20, "t": 90, "b": 20})
    min_width = 160 + 85 * len(names)
    return Figure("parallel", title, caption, figure, height=460, min_width=min_width)


def _dimension(data: ReportData, name: str, values: Sequence[Any]) -> dict[str, Any]:
    """Return one axis of parallel coordinates; None stands for a trial without the parameter."""
    declared = data.space.get(name)
    present = [value for value in values if value is not None]
    is_numeric = bool(present) and all(finite(value) is not None for value in present)
    if is_numeric and (declared is None or isinstance(declared, Range)):
        axis = _numeric_axis(declared, values)
    else:
        axis = _categorical_axis(values)
    return {"label": escape(name), **axis}


def _categorical_axis(values: Sequence[Any]) -> dict[str, Any]:
    """Return an axis with a tick per choice, below them one for absence."""
    ticks = sorted({str(value) for value in values if value is not None})
    if None in values:
        ticks.insert(0, UNUSED)
    return {
        "values": [ticks.index(UNUSED if value is None else str(value)) for value in values],
        "range": [-0.2, len(ticks) - 0.8],
        "tickvals": list(range(len(ticks))),
        "ticktext": ticks,
    }


def _numeric_axis(declared: Range | None, values: Sequence[Any]) -> dict[str, Any]:
    """Return an axis over the declared range, linear or logarithmic, with a tick for absence."""
    is_log = declared is not None and declared.log
    ends = [float(value) for value in values if value is not None]
    if declared is not None:
        ends += [declared.low, declared.high]
    low, high = min(ends), max(ends)
    if is_log:
        low, high = math.log10(low), math.log10(high)
        values = [None if value is None else math.log10(value) for value in values]
    if low == high:
        low, high = low - 0.5, high + 0.5
    unused = low - 0.12 * (high - low)
    positions = [unused if value is None else value for value in values]
    marks = [low + (high - low) * quarter / 4 for quarter in range(5)]
    texts = [f"{10**mark if is_log else mark:.3g}" for mark in marks]
    if None in values:
        low = unused
        marks.insert(0, unused)
        texts.insert(0, UNUSED)
    return {"values": positions, "range": [low, high], "tickvals": marks, "ticktext": texts}


def _hover_texts(trials: Sequence[ReportedTrial], drawn: int) -> list[str]:
    with_params = drawn <= MANY_TRIALS
    return [hover_text(trial, with_params=with_params) for trial in trials]
