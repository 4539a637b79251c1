"""Do early scores rank trials as the last one does? What that means for pruning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

from amlp_ray.study.confirmation.statistics import MIN_RANKED, spearman
from amlp_ray.study.report.plotting import ACCENT, PALE, Figure, empty
from amlp_ray.study.report.report_data import ReportData
from amlp_ray.study.report.tables import Cell, Table

WEAK = 0.5  # below it, a rung explains less than a quarter of the variance of final ranks
VALUES = 500_000  # drawn at a rung: fewer resamples of many trials, whose interval is narrow


@dataclass(frozen=True)
class Rung:
    """How the scores at one rung go with the final ones, over complete trials."""

    at: int  # epoch, or percent of the length where trials differ in it
    trials: int
    rho: float  # Spearman
    interval: tuple[float, float]  # 95 %, bootstrap over trials
    kept: float  # share of the final best fifth that is in the better half here
    prunable: bool  # whether the study lets a pruner act here


@dataclass(frozen=True)
class Ranks:
    rungs: list[Rung]
    percent: bool  # `at` is no epoch
    trials: int  # complete ones with more than one rung

    def label(self, rungs: Sequence[Rung]) -> str:
        """Name some of the rungs: `epochs 3, 6 and 9`, or `epochs 3 to 15` where they are neighbours."""
        told = [str(rung.at) for rung in rungs]
        first = self.rungs.index(rungs[0])
        if len(told) > 2 and list(rungs) == self.rungs[first : first + len(rungs)]:
            listed = f"{told[0]} to {told[-1]}"
        else:
            listed = told[0] if len(told) == 1 else f"{', '.join(told[:-1])} and {told[-1]}"
        return (
            f"{listed} % of the length"
            if self.percent
            else f"epoch{'s' if len(told) > 1 else ''} {listed}"
        )


def ranks(facts: ReportData) -> Ranks:
    """Correlate the metric at every rung with that at the last one; pruned trials have none, and are left out."""
    whole = facts.config.sampler.name != "pbt"  # whose trials are parts of a training
    runs = [run for run in facts.search if whole and run.finished and len(run.rungs) > 1]
    lengths = {max(run.rungs) for run in runs}
    percent = len(lengths) > 1
    pairs: dict[int, list[tuple[float, float]]] = {}
    prunable: set[int] = set()
    for run in runs:
        last, steps = max(run.rungs), facts.steps_per_epoch(run)
        for epoch, value in run.rungs.items():
            if epoch < last:
                at = round(100 * epoch / last) if percent else epoch
                pairs.setdefault(at, []).append((value, run.rungs[last]))
                if steps is None or epoch * steps >= facts.config.pruner.min_steps:
                    prunable.add(at)
    rungs = [
        _rung(at, np.array(pairs[at]), at in prunable) for at in sorted(pairs) if _varies(pairs[at])
    ]
    return Ranks(rungs, percent, len(runs))


def _varies(pairs: list[tuple[float, float]]) -> bool:
    return len(pairs) >= MIN_RANKED and all(len(set(side)) > 1 for side in zip(*pairs, strict=True))


def _rung(at: int, pairs: np.ndarray, prunable: bool) -> Rung:
    count = len(pairs)
    draws = np.random.default_rng(0).integers(
        0, count, (max(200, min(1000, VALUES // count)), count)
    )
    rhos = spearman(pairs[draws])
    low, high = np.percentile(rhos[np.isfinite(rhos)], [2.5, 97.5])
    early, final = rankdata(pairs, axis=0).T
    best = np.argsort(final)[-max(1, round(count / 5)) :]
    kept = float((early[best] > (count + 1) / 2).mean())
    return Rung(at, count, float(spearman(pairs)), (float(low), float(high)), kept, prunable)


def figure(facts: ReportData, told: Ranks) -> Figure:
    title = "Rank correlation of each rung with the final score"
    caption = (
        f"Spearman correlation between {facts.metric} at a rung and at the end over {told.trials} complete trials; "
        f"bars are 95 % intervals (bootstrap over trials), the dashed line is {WEAK}. Pruned trials have no final "
        f"score and are left out, which usually lowers it."
    )
    if not told.rungs:
        few = f"{told.trials} complete trials have been scored at more than one rung; {MIN_RANKED} that differ are needed"
        return Figure("ranks", title, caption, gap=f"Not known yet: {few}.")
    drawn = empty("percent of the length" if told.percent else "epoch", "rank correlation")
    drawn.add_hline(y=WEAK, line={"dash": "dash", "color": PALE})
    drawn.add_scatter(
        x=[rung.at for rung in told.rungs],
        y=[round(rung.rho, 3) for rung in told.rungs],
        error_y={
            "type": "data", "symmetric": False, "thickness": 1.5, "color": "#3a8fb7",
            "array": [max(0.0, rung.interval[1] - rung.rho) for rung in told.rungs],
            "arrayminus": [max(0.0, rung.rho - rung.interval[0]) for rung in told.rungs],
        },
        mode="lines+markers",
        line={"color": "#3a8fb7"},
        marker={"size": 8, "color": ["#3a8fb7" if rung.rho >= WEAK else ACCENT for rung in told.rungs]},
        text=[f"n {rung.trials}" for rung in told.rungs],
        hovertemplate="%{x}: %{y:.2f}, %{text}<extra></extra>",
    )  # fmt: skip
    low = min(0.0, *(rung.interval[0] for rung in told.rungs))
    drawn.update_yaxes(range=[max(-1.0, low - 0.05), 1.03])
    drawn.update_xaxes(rangemode="tozero")
    return Figure("ranks", title, caption, drawn, height=340)


def table(told: Ranks) -> Table:
    columns = ["% of length" if told.percent else "Epoch", "Trials", "Correlation", "95 % interval"]
    columns += ["Best fifth in the better half", "Pruner may act", "Pruning here"]
    rows = []
    for rung in told.rungs:
        low, high = rung.interval
        rows.append([
            str(rung.at), str(rung.trials), f"{rung.rho:+.2f}", f"{low:+.2f} to {high:+.2f}",
            f"{100 * rung.kept:.0f} %",
            "yes" if rung.prunable else "no, too few steps",
            "close to chance" if rung.rho < WEAK else "follows the final order",
        ])  # fmt: skip
    return Table(columns, [[Cell(text) for text in row] for row in rows])


def meaning(facts: ReportData, told: Ranks) -> list[str]:
    """Say what the correlations mean for pruning in this study, and how it treats the ratio's schedule."""
    weak = [rung for rung in told.rungs if rung.rho < WEAK]
    firm = [rung for rung in told.rungs if rung.rho >= WEAK]
    sentences = []
    if facts.config.sampler.name == "pbt":
        return [
            "Members of a population are compared after every segment; none is pruned, so this is not asked here."
        ]
    if weak:
        sentences.append(
            f"At {told.label(weak)} the rank correlation with the final score is below {WEAK}: pruning there picks "
            f"little better than chance. Stopping the worse half would have kept {_kept(weak)} of the trials that end "
            f"in the best fifth; chance keeps 50 %."
        )
    if firm:
        sentences.append(
            f"At {told.label(firm)} {'it' if weak else 'the rank correlation with the final score'} is {WEAK} or more: "
            f"early scores rank trials, the better the higher it is. Stopping the worse half would have kept "
            f"{_kept(firm)} of the trials that end in the best fifth."
        )
    acted = [rung for rung in weak if rung.prunable]
    if facts.config.pruner.name == "none":
        sentences.append("This study prunes nothing.")
    elif acted:
        sentences.append(
            f"The pruner {facts.config.pruner.name} may act at {told.label(acted)} all the same; a larger "
            f"pruner.min_steps would keep it from that."
        )
    return [*sentences, schedule(facts)]


def _kept(rungs: list[Rung]) -> str:
    low, high = (round(100 * end(rung.kept for rung in rungs)) for end in (min, max))
    return f"{low} %" if low == high else f"{low} to {high} %"


def schedule(facts: ReportData) -> str:
    if facts.config.pruner.schedule == "compress":
        return (
            "Each rung has seen the whole masking-ratio schedule, which is run in full up to it (pruner.schedule: "
            "compress), so rungs of different trials are comparable and rungs of one trial are of different speeds."
        )
    return (
        "The masking-ratio schedule spans all epochs (pruner.schedule: fixed), so an early rung has seen the start of "
        "it only, and a ratio that rises late is judged by its low values."
    )
