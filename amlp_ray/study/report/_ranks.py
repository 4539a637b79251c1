"""Do early scores rank trials as the last one does? What that means for pruning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

from amlp_ray.study.report._facts import Facts
from amlp_ray.study.report._plot import ACCENT, PALE, Figure, empty
from amlp_ray.study.report._tables import Cell, Table

MIN_TRIALS = 5  # a rank correlation of fewer is close to a coin toss
WEAK = 0.5  # below it, a rung explains less than a quarter of the variance of final ranks
RESAMPLES = 1000


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
        told = [str(rung.at) for rung in rungs]
        listed = told[0] if len(told) == 1 else f"{', '.join(told[:-1])} and {told[-1]}"
        if self.percent:
            return f"{listed} % of the length"
        return f"epoch{'s' if len(told) > 1 else ''} {listed}"


def ranks(facts: Facts) -> Ranks:
    """Correlate the metric at every rung with that at the last one. Pruned trials have no last one, and are left out."""
    runs = [run for run in facts.search if run.finished and len(run.rungs) > 1]
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
                if steps is None or epoch * steps >= facts.settings.pruner.min_steps:
                    prunable.add(at)
    rungs = [_rung(at, np.array(pairs[at]), at in prunable) for at in sorted(pairs) if _varies(pairs[at])]
    return Ranks(rungs, percent, len(runs))


def _varies(pairs: list[tuple[float, float]]) -> bool:
    return len(pairs) >= MIN_TRIALS and all(len(set(side)) > 1 for side in zip(*pairs, strict=True))


def _rung(at: int, pairs: np.ndarray, prunable: bool) -> Rung:
    early, final = rankdata(pairs, axis=0).T
    weights = np.random.default_rng(0).multinomial(len(pairs), np.full(len(pairs), 1 / len(pairs)), RESAMPLES)
    resampled = _weighted(early, final, weights)  # ranks stay those of all trials, which is fast and hardly differs
    low, high = np.percentile(resampled[np.isfinite(resampled)], [2.5, 97.5])
    best = np.argsort(final)[-max(1, round(len(pairs) / 5)) :]
    kept = float((early[best] > (len(pairs) + 1) / 2).mean())
    rho = float(_weighted(early, final, np.ones((1, len(pairs))))[0])
    return Rung(at, len(pairs), rho, (float(low), float(high)), kept, prunable)


def _weighted(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the correlation of x and y under each row of weights; NaN where one does not vary."""
    share = weights / weights.sum(axis=1, keepdims=True)
    x, y = x - x.mean(), y - y.mean()
    mx, my = share @ x, share @ y
    with np.errstate(invalid="ignore", divide="ignore"):
        return (share @ (x * y) - mx * my) / np.sqrt((share @ (x * x) - mx**2) * (share @ (y * y) - my**2))


def figure(facts: Facts, told: Ranks) -> Figure:
    title = "Rank correlation of each rung with the final score"
    caption = (
        f"Spearman correlation between {facts.metric} at a rung and at the end over {told.trials} complete trials; bars "
        f"are 95 % intervals (bootstrap over trials), the dashed line is {WEAK}. Pruned trials have no final score and "
        f"are left out, which usually lowers it."
    )
    if not told.rungs:
        few = f"{told.trials} complete trials have been scored at more than one rung; {MIN_TRIALS} that differ are needed"
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
    columns += ["Of the final best fifth, in the better half here", "Pruner may act", "Pruning here"]
    rows = []
    for rung in told.rungs:
        low, high = rung.interval
        rows.append([
            str(rung.at), str(rung.trials), f"{rung.rho:+.2f}", f"{low:+.2f} to {high:+.2f}", f"{100 * rung.kept:.0f} %",
            "yes" if rung.prunable else "no, too few steps",
            "picks little better than chance" if rung.rho < WEAK else "keeps most of what ends well",
        ])  # fmt: skip
    return Table(columns, [[Cell(text) for text in row] for row in rows])


def meaning(facts: Facts, told: Ranks) -> list[str]:
    """Say what the correlations mean for pruning in this study, and how it treats the ratio's schedule."""
    weak = [rung for rung in told.rungs if rung.rho < WEAK]
    firm = [rung for rung in told.rungs if rung.rho >= WEAK]
    sentences = []
    if weak:
        at = told.label(weak)
        sentences.append(f"At {at} the correlation is below {WEAK}: pruning there picks little better than by chance.")
    if firm:
        at = told.label(firm)
        sentences.append(f"At {at} it is {WEAK} or more: pruning there keeps most of what ends well.")
    acted = [rung for rung in weak if rung.prunable]
    if facts.settings.pruner.name == "none":
        sentences.append("This study prunes nothing.")
    elif acted:
        sentences.append(
            f"The pruner {facts.settings.pruner.name} may act at {told.label(acted)} all the same; a larger "
            f"pruner.min_steps would keep it from that."
        )
    return [*sentences, schedule(facts)]


def schedule(facts: Facts) -> str:
    if facts.settings.pruner.schedule == "compress":
        return (
            "Each rung has seen the whole masking-ratio schedule, which is run in full up to it (pruner.schedule: "
            "compress), so rungs of different trials are comparable and rungs of one trial are of different speeds."
        )
    return (
        "The masking-ratio schedule spans all epochs (pruner.schedule: fixed), so an early rung has seen the start of it "
        "only, and a ratio that rises late is judged by its low values."
    )
