"""Draw which member of population-based training continued which: the masking ratio over epochs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from optuna.trial import FrozenTrial

from amlp_ray.config import StudyConfig
from amlp_ray.study.report.plotting import (
    ACCENT,
    PALE,
    Figure,
    add_color_bar,
    color_of,
    empty_figure,
)
from amlp_ray.study.search.pbt import Population, leader, lineage, members
from amlp_ray.study.search_space.validate import PBT_RATIO

KEY = "lineage"
TITLE = "Masking-ratio schedules of the population"
CAPTION = (
    "Each line is a step of one member, from the ratio that its lineage had reached to the one it "
    "moves to, darker for a higher score at its end. A dotted drop or rise is a poor member that "
    "continued a better one's checkpoint and left its own behind. The thick red line is the "
    "lineage of the best: the learned schedule."
)


def lineage_rows(config: StudyConfig, trials: Sequence[FrozenTrial]) -> list[dict[str, Any]]:
    """Return one row per step in the order of trial numbers; none without a population.

    `ratio_from` is the ratio that the step's lineage had reached. `left` is the number of the
    member's own trial where it continued another's. `best` says whether the learned schedule runs
    through the step. `score` is None until it has ended.
    """
    if config.sampler.name != "pbt":
        return []
    population = Population(config)
    best = leader(trials)
    best_line = lineage(trials, best.number) if best is not None else []
    trial_of_member: dict[tuple[int, int], int] = {}
    rows = []
    for trial in members(trials):
        generation = trial.generation
        previous = trial_of_member.get((generation - 1, trial.member))
        trial_of_member[generation, trial.member] = trial.number
        points = population.step_of(trials, trial.number).values[PBT_RATIO]
        rows.append(
            {
                "trial": trial.number,
                "generation": generation,
                "member": trial.member,
                "parent": trial.parent,
                "left": previous if previous != trial.parent else None,
                "from_epoch": population.last_epoch(generation - 1) if generation else 0,
                "to_epoch": population.last_epoch(generation),
                "ratio_from": points[-2][1],
                "ratio_to": points[-1][1],
                "state": trial.state.name,
                "score": trial.value,
                "best": trial.number in best_line,
            }
        )
    return rows


def lineage_figure(rows: Sequence[dict[str, Any]], metric: str) -> Figure:
    """Draw the rows of `lineage_rows`; there is a gap where there are none."""
    if not rows:
        return Figure(KEY, TITLE, CAPTION, gap="No step of a population has begun yet.")
    figure = empty_figure("epoch", "masking ratio")
    by_number = {row["trial"]: row for row in rows}
    scores = [row["score"] for row in rows if row["score"] is not None]
    # Good ones lie on top.
    for row in sorted(rows, key=lambda row: (row["score"] is not None, row["score"])):
        if row["left"] is not None:
            _draw_jump(figure, by_number[row["left"]], row)
        _draw_step(figure, row, scores, metric)
    if best_rows := [row for row in rows if row["best"]]:
        _draw_best(figure, best_rows)
    add_color_bar(figure, scores, metric)
    return Figure(KEY, TITLE, CAPTION, figure)


def _draw_step(figure: go.Figure, row: dict[str, Any], scores: list[float], metric: str) -> None:
    score = row["score"]
    if score is None:
        line = {"color": PALE, "width": 1, "dash": "dash"}
        result = row["state"]
    else:
        line = {"color": color_of(score, scores), "width": 1.5}
        result = f"{metric} {score:.3f}"
    source = "" if row["parent"] is None else f" from trial {row['parent']}"
    figure.add_scatter(
        x=[row["from_epoch"], row["to_epoch"]],
        y=[row["ratio_from"], row["ratio_to"]],
        mode="lines",
        line=line,
        name=f"trial {row['trial']}",
        text=f"trial {row['trial']}, member {row['member']}{source}<br>{result}",
        hovertemplate="epoch %{x}: ratio %{y:.3f}<br>%{text}<extra></extra>",
    )


def _draw_jump(figure: go.Figure, left: dict[str, Any], row: dict[str, Any]) -> None:
    figure.add_scatter(
        x=[left["to_epoch"], row["from_epoch"]],
        y=[left["ratio_to"], row["ratio_from"]],
        mode="lines",
        line={"color": PALE, "width": 1, "dash": "dot"},
        name=f"trial {row['left']} to {row['parent']}",
        text=f"member {row['member']} left trial {row['left']} and continued trial {row['parent']}",
        hovertemplate="%{text}<extra></extra>",
    )


def _draw_best(figure: go.Figure, rows: list[dict[str, Any]]) -> None:
    first = rows[0]
    figure.add_scatter(
        x=[first["from_epoch"], *(row["to_epoch"] for row in rows)],
        y=[first["ratio_from"], *(row["ratio_to"] for row in rows)],
        mode="lines+markers",
        line={"color": ACCENT, "width": 4},
        marker={"size": 6},
        name="learned schedule",
        text=[f"trial {row['trial']}" for row in [first, *rows]],
        hovertemplate="epoch %{x}: ratio %{y:.3f}, %{text}<extra></extra>",
    )
