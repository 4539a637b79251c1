"""Show how a search went: what it spent, what pruning saved, and when nothing ran."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import accumulate

from amlp_ray.study.operations.trials import STATES
from amlp_ray.study.report.plotting import (
    ACCENT,
    PALE,
    STATE_COLORS,
    Figure,
    empty_figure,
    hover_text,
)
from amlp_ray.study.report.report_data import ReportData, ReportedTrial
from amlp_ray.study.report.tables import Table, count_words, duration, text_table
from amlp_ray.utils.text import counted

LIMIT_TITLES = {
    "trials": "Trials of the search",
    "hours": "Hours run",
    "gpu_hours": "GPU-hours",
    "epochs": "Epochs",
}
# Rows of slots that make the timeline taller.
MAX_SLOT_ROWS = 16
# White edges of more bars would look like idle time.
MAX_EDGED_BARS = 500


@dataclass(frozen=True)
class TimelineBar:
    """A trial in the slot that it took, from `start` to `end`."""

    trial: ReportedTrial
    slot: int
    start: datetime
    end: datetime

    @property
    def kind(self) -> str:
        """Return the state of a trial of the search, else `baseline` or `confirmation`."""
        if self.trial.baseline:
            return "baseline"
        return "confirmation" if self.trial.candidate else self.trial.state_name


@dataclass(frozen=True)
class Timeline:
    """Trials in the fewest slots in which no two overlap."""

    bars: list[TimelineBar]  # by start
    slots: int  # number of slots
    start: datetime  # of the first trial
    end: datetime  # of the last trial
    busy: float  # share of slots times time in which a trial ran
    idle: timedelta  # time in which nothing ran

    @property
    def duration(self) -> timedelta:
        """Return the time from the first start to the last end."""
        return self.end - self.start


def timeline(data: ReportData) -> Timeline | None:
    """Lay all trials out in time; None before the first start."""
    spans = []
    for trial in (*data.search, *data.baselines, *data.confirmation):
        if trial.started and trial.last_seen:
            spans.append((trial.started, trial.last_seen, trial))
    if not spans:
        return None
    spans.sort(key=lambda span: (span[0], span[2].name))
    free_slots: list[int] = []
    taken: list[tuple[datetime, int]] = []  # by the end of each
    bars = []
    count = 0
    covered = timedelta()
    reached = spans[0][0]
    for start, end, trial in spans:
        while taken and taken[0][0] <= start:
            heapq.heappush(free_slots, heapq.heappop(taken)[1])
        slot = heapq.heappop(free_slots) if free_slots else count
        count = max(count, slot + 1)
        heapq.heappush(taken, (end, slot))
        bars.append(TimelineBar(trial, slot, start, end))
        covered += max(timedelta(), end - max(start, reached))
        reached = max(reached, end)
    total = reached - spans[0][0]
    run_time = sum((bar.end - bar.start for bar in bars), timedelta())
    busy = run_time / (total * count) if total else 1.0
    return Timeline(bars, count, spans[0][0], reached, busy, total - covered)


def gantt(timeline: Timeline | None) -> Figure:
    """Draw when trials ran, a bar each."""
    title = "When trials ran"
    if timeline is None:
        return Figure("timeline", title, "", gap="No trial has started yet.")
    unit, seconds = "minutes", 60.0
    if timeline.duration > timedelta(hours=3):
        unit, seconds = "hours", 3600.0

    def since_start(moment: datetime) -> float:
        return round((moment - timeline.start).total_seconds() / seconds, 4)

    figure = empty_figure(f"{unit} since the first start", "slot")
    edge = 0.5 if len(timeline.bars) < MAX_EDGED_BARS else 0
    for kind in (*STATES, "baseline", "confirmation"):
        bars = [bar for bar in timeline.bars if bar.kind == kind]
        if not bars:
            continue
        figure.add_bar(
            base=[since_start(bar.start) for bar in bars],
            x=[since_start(bar.end) - since_start(bar.start) for bar in bars],
            y=[bar.slot + 1 for bar in bars],
            orientation="h",
            width=0.8,
            name=kind.lower(),
            marker={"color": STATE_COLORS[kind], "line": {"width": edge, "color": "white"}},
            text=[hover_text(bar.trial, with_params=False) for bar in bars],
            textposition="none",
            hovertemplate=f"%{{text}}<br>%{{x:.2f}} {unit}<extra></extra>",
        )
    figure.update_layout(barmode="overlay")
    rows = min(timeline.slots, MAX_SLOT_ROWS)
    has_row_each = timeline.slots <= MAX_SLOT_ROWS
    figure.update_yaxes(dtick=1 if has_row_each else None, autorange="reversed", showgrid=False)
    return Figure("timeline", title, _gantt_caption(timeline), figure, height=170 + 26 * rows)


def _gantt_caption(timeline: Timeline) -> str:
    slots = "One trial ran at a time"
    if timeline.slots > 1:
        slots = f"Up to {timeline.slots} trials ran side by side"
    idle = ""
    if timeline.idle.total_seconds() >= 1:
        idle = (
            f"; nothing ran at all for {duration(timeline.idle)}, pauses between two runs of the "
            f"study included"
        )
    return (
        f"Each bar is a run, in the slot that it took; white is idle. {slots}. From the first "
        f"start to the last end, {duration(timeline.duration)}, slots were busy for "
        f"{100 * timeline.busy:.0f} % of the time{idle}. A trial that was taken over is drawn "
        f"from its first start on."
    )


def budget(data: ReportData) -> Table:
    """Show what was spent of each limit; epochs of running trials count up to their last rung."""
    used = data.usage.as_dict()
    allowed = data.config.budget.model_dump()
    rows = []
    for key, title in LIMIT_TITLES.items():
        limit, spent = allowed[key], used[key]
        if limit is None and not spent:
            continue
        spent_text = f"{spent:,.0f}" if key in ("trials", "epochs") else f"{spent:.2f}"
        limit_text = "no limit" if limit is None else f"{limit:,g}"
        share = f"{100 * spent / limit:.0f} %" if limit else "\u2013"
        rows.append([title, spent_text, limit_text, share])
    return text_table(["", "Used", "Allowed", "Share"], rows)


def outcome(data: ReportData) -> Table:
    """Show how the trials ended, and what pruning and the store saved."""
    states = Counter(trial.state_name for trial in data.search)
    rows = _ended_rows(data, states)
    if data.copies:
        copies = count_words(len(data.copies), "trial")
        epochs = count_words(sum(data.full_length(trial) for trial in data.copies), "epoch")
        text = f"{copies} of known settings, {epochs} not trained"
        rows.append(["Answered from the store", text])
    retried = sum(trial.retry_of is not None for trial in data.search)
    if states["FAIL"] or retried:
        again = f"; {count_words(retried, 'trial')} tried again what had failed" if retried else ""
        rows.append(["Failed", f"{states['FAIL']}{again}"])
    lost = [trial.lost for trial in (*data.search, *data.baselines) if trial.lost]
    if lost:
        trials = count_words(len(lost), "trial")
        text = f"{sum(lost)}, of {trials}: these are no failures, and resume from their checkpoints"
        rows.append(["Processes lost", text])
    if states["INTERRUPTED"]:
        text = "no process runs the study now, the next run takes them over"
        rows.append(["Interrupted", f"{states['INTERRUPTED']}; {text}"])
    if data.imported:
        names = [str(trial.source).partition(" trial ")[0] for trial in data.imported]
        sources = Counter(name.removeprefix("import ") for name in names)
        counts = ", ".join(f"{count} from {source}" for source, count in sources.most_common(5))
        text = "the sampler learns from them, and they count in nothing else here"
        rows.append(["Imported", f"{counts}: {text}"])
    return text_table(["", ""], rows)


def _ended_rows(data: ReportData, states: Counter[str]) -> list[list[str]]:
    """Count trials of full length, and the epochs that pruning saved."""
    ended = [trial for trial in data.search if trial.state_name in ("COMPLETE", "PRUNED")]
    if not ended:
        return []
    begun = len(data.search) - states["WAITING"]
    is_pbt = data.config.sampler.name == "pbt"
    title = "Steps of a population" if is_pbt else "Run to full length"
    rows = [[title, f"{states['COMPLETE']:,} of {begun:,}"]]
    pruned = states["PRUNED"]
    if pruned or data.config.pruner.name != "none":
        spent = sum(trial.epochs or 0 for trial in ended)
        full = sum(_unpruned_epochs(data, trial) for trial in ended)
        saved = ""
        if full > spent:
            share = f"{100 * (full - spent) / full:.0f} %"
            saved = f", which saved {full - spent:,} of {full:,} epochs ({share})"
        rows.append(["Pruned", f"{pruned:,} ({100 * pruned / begun:.0f} %){saved}"])
    return rows


def _unpruned_epochs(data: ReportData, trial: ReportedTrial) -> int:
    """Return the epochs that a trial would have run without a pruner."""
    return data.full_length(trial) if trial.state_name == "PRUNED" else trial.epochs or 0


def efficiency(data: ReportData) -> Figure:
    """Draw the best score so far against the epochs spent."""
    title = "Best score against epochs spent"
    caption = (
        f"{data.metric} of the best complete trial so far, against the epochs that all trials of "
        f"the search had run by then, in the order in which they ended."
    )
    ended = _ended_in_order(data)
    if not any(trial.is_full_length for trial in ended):
        gap = "No trial has run to full length yet."
        return Figure("efficiency", title, caption, gap=gap)
    spent = list(accumulate(trial.epochs or 0 for trial in ended))
    unpruned = list(accumulate(_unpruned_epochs(data, trial) for trial in ended))
    improvements = _improvements(ended)
    if not improvements:
        return Figure("efficiency", title, caption, gap="No complete trial keeps the limits.")
    figure = empty_figure("epochs spent", data.metric)
    points = [*improvements, -1]
    values = [ended[index].sort_value for index in improvements]
    values.append(values[-1])
    if unpruned[-1] > spent[-1]:
        caption += " The dashed line is the same search with each pruned trial at its full length."
        figure.add_scatter(
            x=[unpruned[index] for index in points],
            y=values,
            mode="lines",
            name="without pruning",
            line={"shape": "hv", "color": PALE, "dash": "dash"},
            hoverinfo="skip",
        )
    figure.add_scatter(
        x=[spent[index] for index in points],
        y=values,
        mode="lines+markers",
        name="best so far",
        line={"shape": "hv", "color": ACCENT},
        marker={"size": [7] * len(improvements) + [0]},
        text=[
            *(hover_text(ended[index]) for index in improvements),
            f"{counted(len(ended), 'trial')} ended",
        ],
        hovertemplate="%{x} epochs: %{y:.3f}<br>%{text}<extra></extra>",
    )
    figure.update_xaxes(rangemode="tozero")
    return Figure("efficiency", title, caption, figure)


def _ended_in_order(data: ReportData) -> list[ReportedTrial]:
    states = ("COMPLETE", "PRUNED", "FAIL")
    ended = [trial for trial in data.search if trial.state_name in states and trial.ended]
    return sorted(ended, key=lambda trial: (trial.ended or datetime.max, trial.number))


def _improvements(ended: list[ReportedTrial]) -> list[int]:
    """Return the indices of the trials that were better than all before them."""
    best = -math.inf
    indices = []
    for index, trial in enumerate(ended):
        if trial.is_full_length and trial.is_feasible and trial.sort_value > best:
            best = trial.sort_value
            indices.append(index)
    return indices
