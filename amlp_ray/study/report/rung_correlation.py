"""Correlate early scores with final ones, and say what that means for pruning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

from amlp_ray.study.confirmation.statistics import FloatArray, Interval, rank_correlation
from amlp_ray.study.report.plotting import ACCENT, BLUE, PALE, Figure, empty_figure
from amlp_ray.study.report.report_data import ReportData, ReportedTrial
from amlp_ray.study.report.tables import Table, text_table
from amlp_ray.study.storage.study_store import read_metrics
from amlp_ray.study.storage.trial_record import finite

# Below it, a rung explains less than a quarter of the variance of final ranks.
WEAK = 0.5


@dataclass(frozen=True)
class RungCorrelation:
    """How the scores at one rung rank complete trials, compared with their final scores."""

    position: int  # epoch, or percent of the length where trials differ in it
    trials: int  # number of trials
    correlation: float  # Spearman's
    interval: Interval  # 95 %, bootstrap over trials
    best_fifth_kept: float  # share of the final best fifth that is in the better half here
    is_prunable: bool  # whether the study lets a pruner act here


@dataclass(frozen=True)
class RungCorrelations:
    """Correlations of all rungs."""

    rungs: list[RungCorrelation]  # those at which enough trials were scored
    in_percent: bool  # whether positions are percent of the length
    trials: int  # number of complete trials with more than one rung

    def label(self, rungs: Sequence[RungCorrelation]) -> str:
        """Name some rungs: `epochs 3, 6 and 9`, or `epochs 3 to 15` for neighbors."""
        positions = [str(rung.position) for rung in rungs]
        first = self.rungs.index(rungs[0])
        if len(positions) == 1:
            listed = positions[0]
        elif len(positions) > 2 and list(rungs) == self.rungs[first : first + len(rungs)]:
            listed = f"{positions[0]} to {positions[-1]}"
        else:
            listed = f"{', '.join(positions[:-1])} and {positions[-1]}"
        if self.in_percent:
            return f"{listed} % of the length"
        return f"epoch{'s' if len(positions) > 1 else ''} {listed}"


@dataclass(frozen=True)
class FirstRungCorrelation:
    """Spearman correlations between the first prunable rung and the last one."""

    trials: int  # number of complete trials
    epochs: tuple[int, ...]  # of that first rung; more than one where the batch size was searched
    dsc: float | None  # of the study's metric; None where too few trials differ
    ap: float | None  # of patch AP
    is_prunable: bool  # False where steps are unknown, and the first rung of all stands in


def rung_correlations(data: ReportData) -> RungCorrelations:
    """Correlate the metric at every rung with that at the last one, over complete trials.

    Pruned trials have no last one. Steps of population-based training are parts of a training, and
    are not ranked either.
    """
    trials = []
    if data.config.sampler.name != "pbt":
        trials = [run for run in data.search if run.is_full_length and len(run.rungs) > 1]
    in_percent = len({max(trial.rungs) for trial in trials}) > 1
    pairs: dict[int, list[tuple[float, float]]] = {}
    prunable: set[int] = set()
    for trial in trials:
        *early, last = trial.rungs
        for epoch in early:
            position = round(100 * epoch / last) if in_percent else epoch
            pairs.setdefault(position, []).append((trial.rungs[epoch], trial.rungs[last]))
            if data.is_prunable(trial, epoch):
                prunable.add(position)
    rungs = []
    for position in sorted(pairs):
        rung = _rung_correlation(position, np.array(pairs[position]), position in prunable)
        if rung is not None:
            rungs.append(rung)
    return RungCorrelations(rungs, in_percent, len(trials))


def first_rung_correlation(data: ReportData) -> FirstRungCorrelation:
    """Correlate scores at the first rung that may prune with the final ones."""
    epochs = set()
    dsc_pairs = []
    ap_pairs = []
    for trial in data.search:
        early = [epoch for epoch in trial.rungs if data.is_prunable(trial, epoch)]
        if not trial.is_full_length or not early:
            continue
        first, last = min(early), max(trial.rungs)
        if first == last:
            continue
        epochs.add(first)
        dsc_pairs.append((trial.rungs[first], trial.rungs[last]))
        ap = _ap_by_epoch(trial)
        if first in ap and last in ap:
            ap_pairs.append((ap[first], ap[last]))
    return FirstRungCorrelation(
        trials=len(dsc_pairs),
        epochs=tuple(sorted(epochs)),
        dsc=_correlation(dsc_pairs),
        ap=_correlation(ap_pairs),
        is_prunable=all(data.steps_per_epoch(trial) is not None for trial in data.search),
    )


def figure(data: ReportData, correlations: RungCorrelations) -> Figure:
    """Draw the correlation of every rung with the final score."""
    rungs = correlations.rungs
    title = "Rank correlation of each rung with the final score"
    caption = (
        f"Spearman correlation between {data.metric} at a rung and at the end over "
        f"{correlations.trials} complete trials; bars are 95 % intervals (bootstrap over trials), "
        f"the dashed line is {WEAK}. Pruned trials have no final score and are left out, which "
        f"usually lowers it."
    )
    if not rungs:
        gap = (
            f"Not known yet: {correlations.trials} complete trials have been scored at more than "
            f"one rung; 5 that differ are needed."
        )
        return Figure("ranks", title, caption, gap=gap)
    x_title = "percent of the length" if correlations.in_percent else "epoch"
    plot = empty_figure(x_title, "rank correlation")
    plot.add_hline(y=WEAK, line={"dash": "dash", "color": PALE})
    colors = [BLUE if rung.correlation >= WEAK else ACCENT for rung in rungs]
    plot.add_scatter(
        x=[rung.position for rung in rungs],
        y=[round(rung.correlation, 3) for rung in rungs],
        error_y={
            "type": "data",
            "symmetric": False,
            "thickness": 1.5,
            "color": BLUE,
            "array": [max(0.0, rung.interval[1] - rung.correlation) for rung in rungs],
            "arrayminus": [max(0.0, rung.correlation - rung.interval[0]) for rung in rungs],
        },
        mode="lines+markers",
        line={"color": BLUE},
        marker={"size": 8, "color": colors},
        text=[f"n {rung.trials}" for rung in rungs],
        hovertemplate="%{x}: %{y:.2f}, %{text}<extra></extra>",
    )
    low = min(0.0, *(rung.interval[0] for rung in rungs))
    plot.update_yaxes(range=[max(-1.0, low - 0.05), 1.03])
    plot.update_xaxes(rangemode="tozero")
    return Figure("ranks", title, caption, plot, height=340)


def table(correlations: RungCorrelations) -> Table:
    """List every rung in numbers."""
    position = "% of length" if correlations.in_percent else "Epoch"
    columns = [position, "Trials", "Correlation", "95 % interval"]
    columns += ["Best fifth in the better half", "Pruner may act", "Pruning here"]
    rows = []
    for rung in correlations.rungs:
        low, high = rung.interval
        row = [str(rung.position), str(rung.trials), f"{rung.correlation:+.2f}"]
        row += [f"{low:+.2f} to {high:+.2f}", f"{100 * rung.best_fifth_kept:.0f} %"]
        row.append("yes" if rung.is_prunable else "no, too few steps")
        row.append("close to chance" if rung.correlation < WEAK else "follows the final order")
        rows.append(row)
    return text_table(columns, rows)


def meaning(data: ReportData, correlations: RungCorrelations) -> list[str]:
    """Say what the correlations mean for pruning, and how rungs see the ratio's schedule."""
    if data.config.sampler.name == "pbt":
        return [
            "Members of a population are compared after every step; none is pruned, so this is "
            "not asked here."
        ]
    weak = [rung for rung in correlations.rungs if rung.correlation < WEAK]
    strong = [rung for rung in correlations.rungs if rung.correlation >= WEAK]
    sentences = []
    if weak:
        sentences.append(
            f"At {correlations.label(weak)} the rank correlation with the final score is below "
            f"{WEAK}: pruning there picks little better than chance. Stopping the worse half "
            f"would have kept {_share_kept(weak)} of the trials that end in the best fifth; "
            f"chance keeps 50 %."
        )
    if strong:
        subject = "it" if weak else "the rank correlation with the final score"
        sentences.append(
            f"At {correlations.label(strong)} {subject} is {WEAK} or more: early scores rank "
            f"trials, the better the higher it is. Stopping the worse half would have kept "
            f"{_share_kept(strong)} of the trials that end in the best fifth."
        )
    prunable = [rung for rung in weak if rung.is_prunable]
    if data.config.pruner.name == "none":
        sentences.append("This study prunes nothing.")
    elif prunable:
        sentences.append(
            f"The pruner {data.config.pruner.name} may act at {correlations.label(prunable)} all "
            f"the same; a larger pruner.min_steps would keep it from that."
        )
    return [*sentences, _schedule_sentence(data)]


def _rung_correlation(
    position: int, pairs: FloatArray, is_prunable: bool
) -> RungCorrelation | None:
    """Return the correlation at one rung; None where too few trials differ."""
    correlation = rank_correlation(*pairs.T.tolist())
    if correlation.value is None or correlation.interval is None:
        return None
    count = len(pairs)
    early, final = rankdata(pairs, axis=0).T
    best_fifth = np.argsort(final)[-max(1, round(count / 5)) :]
    share_kept = float((early[best_fifth] > (count + 1) / 2).mean())
    return RungCorrelation(
        position, count, correlation.value, correlation.interval, share_kept, is_prunable
    )


def _ap_by_epoch(trial: ReportedTrial) -> dict[int, float]:
    values = {}
    for row in read_metrics(trial.path):
        if (value := finite(row.get("ap"))) is not None:
            values[row["epoch"]] = value
    return values


def _correlation(pairs: list[tuple[float, float]]) -> float | None:
    return rank_correlation([early for early, _ in pairs], [last for _, last in pairs]).value


def _share_kept(rungs: list[RungCorrelation]) -> str:
    shares = [rung.best_fifth_kept for rung in rungs]
    low, high = round(100 * min(shares)), round(100 * max(shares))
    return f"{low} %" if low == high else f"{low} to {high} %"


def _schedule_sentence(data: ReportData) -> str:
    if data.config.pruner.schedule == "compress":
        return (
            "Each rung has seen the whole masking-ratio schedule, which is run in full up to it "
            "(pruner.schedule: compress), so rungs of different trials are comparable and rungs of "
            "one trial are of different speeds."
        )
    return (
        "The masking-ratio schedule spans all epochs (pruner.schedule: fixed), so an early rung "
        "has seen the start of it only, and a ratio that rises late is judged by its low values."
    )
