"""Who went on from whom in population-based training: the masking ratio of every member over epochs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from optuna.trial import FrozenTrial
from plotly.colors import sample_colorscale

from amlp_ray.config import StudyConfig
from amlp_ray.study.report.plotting import ACCENT, PALE, SCALE, Figure, empty
from amlp_ray.study.search.pbt import Population, leader, lineage, members, score_of
from amlp_ray.study.search_space.validate import PBT_RATIO

KEY, TITLE = "lineage", "Masking-ratio schedules of the population"
CAPTION = (
    "Each line is a segment of one member, from the ratio that its lineage had reached to the one it moves to, darker "
    "for a higher score at its end. A dotted drop or rise is a poor member that went on from a better one's checkpoint "
    "and left its own behind. The thick red line is the lineage of the best: the learnt schedule."
)


def lineage_rows(config: StudyConfig, trials: Sequence[FrozenTrial]) -> list[dict[str, Any]]:
    """One row per segment, for the table and for JSON, in the order of numbers.

    `ratio_from` is where its lineage had got to, `left` the number of the member's own trial where it went on from
    another's, `best` whether the learnt schedule runs through it; `score` is null until it has ended.
    """
    population, best = Population(config), leader(trials)
    line = lineage(trials, best.number) if best is not None else []
    own: dict[tuple[int, int], int] = {}
    rows = []
    for trial in members(trials):
        generation, member, parent = (
            trial.user_attrs[name] for name in ("generation", "member", "parent")
        )
        before = own.get((generation - 1, member))
        points = population.segment(trials, trial.number).values[PBT_RATIO]
        rows.append(
            {
                "trial": trial.number,
                "generation": generation,
                "member": member,
                "parent": parent,
                "left": before if before != parent else None,
                "from_epoch": population.until(generation - 1) if generation else 0,
                "to_epoch": population.until(generation),
                "ratio_from": points[-2][1],
                "ratio_to": points[-1][1],
                "state": trial.state.name,
                "score": score_of(trial),
                "best": trial.number in line,
            }
        )
        own[generation, member] = trial.number
    return rows


def lineage_figure(config: StudyConfig, trials: Sequence[FrozenTrial]) -> Figure:
    """Draw all members; a study without any, one that was searched otherwise or has just begun, has a gap."""
    rows = lineage_rows(config, trials) if config.sampler.name == "pbt" else []
    if not rows:
        return Figure(KEY, TITLE, CAPTION, gap="No segment of a population has begun yet.")
    figure = empty("epoch", "masking ratio")
    by_number = {row["trial"]: row for row in rows}
    scores = [row["score"] for row in rows if row["score"] is not None]
    for row in sorted(
        rows, key=lambda row: (row["score"] is not None, row["score"])
    ):  # good ones lie on top
        if row["left"] is not None:
            _draw_jump(figure, by_number[row["left"]], row)
        _draw_segment(figure, row, scores, config.metric)
    _draw_best(figure, [row for row in rows if row["best"]])
    if scores and max(scores) > min(scores):
        bar = {"title": {"text": config.metric}, "thickness": 14}
        marker = {
            "color": [min(scores)],
            "cmin": min(scores),
            "cmax": max(scores),
            "colorscale": SCALE,
        }
        marker |= {"showscale": True, "colorbar": bar}
        figure.add_scatter(x=[None], y=[None], mode="markers", marker=marker, hoverinfo="skip")
    figure.update_layout(showlegend=False)
    return Figure(KEY, TITLE, CAPTION, figure)


def _draw_segment(figure: go.Figure, row: dict[str, Any], scores: list[float], metric: str) -> None:
    score = row["score"]
    line: dict[str, Any] = {"color": PALE, "width": 1, "dash": "dash"}  # runs, or failed
    if score is not None:
        low, high = min(scores), max(scores)
        place = (score - low) / (high - low) if high > low else 1.0
        line = {"color": sample_colorscale(SCALE, [place])[0], "width": 1.5}
    told = f"{metric} {score:.3f}" if score is not None else row["state"]
    source = "" if row["parent"] is None else f" from trial {row['parent']}"
    figure.add_scatter(
        x=[row["from_epoch"], row["to_epoch"]],
        y=[row["ratio_from"], row["ratio_to"]],
        mode="lines",
        line=line,
        name=f"trial {row['trial']}",
        text=f"trial {row['trial']}, member {row['member']}{source}<br>{told}",
        hovertemplate="epoch %{x}: ratio %{y:.3f}<br>%{text}<extra></extra>",
    )


def _draw_jump(figure: go.Figure, left: dict[str, Any], row: dict[str, Any]) -> None:
    figure.add_scatter(
        x=[left["to_epoch"], row["from_epoch"]],
        y=[left["ratio_to"], row["ratio_from"]],
        mode="lines",
        line={"color": PALE, "width": 1, "dash": "dot"},
        name=f"trial {left['trial']} to {row['parent']}",
        text=f"member {row['member']} left trial {left['trial']} and went on from trial {row['parent']}",
        hovertemplate="%{text}<extra></extra>",
    )


def _draw_best(figure: go.Figure, line: list[dict[str, Any]]) -> None:
    if not line:
        return
    figure.add_scatter(
        x=[line[0]["from_epoch"], *(row["to_epoch"] for row in line)],
        y=[line[0]["ratio_from"], *(row["ratio_to"] for row in line)],
        mode="lines+markers",
        line={"color": ACCENT, "width": 4},
        marker={"size": 6},
        name="learnt schedule",
        text=[f"trial {row['trial']}" for row in [line[0], *line]],
        hovertemplate="epoch %{x}: ratio %{y:.3f}, %{text}<extra></extra>",
    )
