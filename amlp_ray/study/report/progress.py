"""How a search went: what it spent against what it may, what it saved, and when its slots stood idle."""

from __future__ import annotations

import heapq
from collections import Counter
from dataclasses import dataclass
from datetime import datetime, timedelta
from html import escape

from amlp_ray.study.report.plotting import ACCENT, PALE, STATE_COLOURS, Figure, empty, hover
from amlp_ray.study.report.report_data import STATES, ReportData, ReportedTrial
from amlp_ray.study.report.tables import Cell, Table, counted, duration


@dataclass(frozen=True)
class Timeline:
    """Runs in the slots that they must have had: the fewest in which no two overlap."""

    runs: list[ReportedTrial]  # by start
    slots: list[int]  # of each run, from 0
    start: datetime
    end: datetime
    busy: float  # share of slots times time in which a run was going on
    idle: timedelta  # in which nothing ran

    @property
    def count(self) -> int:
        return max(self.slots) + 1


def timeline(facts: ReportData) -> Timeline | None:
    """Lay all runs out in time; None before the first start."""
    spans = [
        (run.started, run.until, run)
        for run in (*facts.search, *facts.baselines, *facts.confirmation)
        if run.started and run.until
    ]
    if not spans:
        return None
    spans.sort(key=lambda item: (item[0], item[2].name))
    free: list[int] = []  # slots, lowest first
    taken: list[tuple[datetime, int]] = []
    slots, count = [], 0
    covered, reached = timedelta(), spans[0][0]
    for start, end, _ in spans:
        while taken and taken[0][0] <= start:
            heapq.heappush(free, heapq.heappop(taken)[1])
        slot = heapq.heappop(free) if free else count
        count = max(count, slot + 1)
        heapq.heappush(taken, (end, slot))
        slots.append(slot)
        covered += max(timedelta(), end - max(start, reached))
        reached = max(reached, end)
    first, last = spans[0][0], reached
    held = sum(((end - start) for start, end, _ in spans), timedelta())
    share = held / ((last - first) * count) if last > first else 1.0
    return Timeline([run for _, _, run in spans], slots, first, last, share, last - first - covered)


def gantt(told: Timeline | None) -> Figure:
    title = "When trials ran"
    if told is None:
        return Figure("timeline", title, "", gap="No trial has started yet.")
    slots = (
        "One trial ran at a time"
        if told.count == 1
        else f"Up to {told.count} trials ran side by side"
    )
    idle = f"; nothing ran at all for {duration(told.idle)}, pauses between two runs of the study included"
    caption = (
        f"Each bar is a run, in the slot that it took; white is idle. {slots}. From the first start to the last end, "
        f"{duration(told.end - told.start)}, slots were busy for {100 * told.busy:.0f} % of the time"
        + (idle if told.idle.total_seconds() >= 1 else "")
        + ". A trial that was taken over is drawn from its first start on."
    )
    unit, seconds = (
        ("hours", 3600.0) if told.end - told.start > timedelta(hours=3) else ("minutes", 60.0)
    )
    figure = empty(f"{unit} since the first start", "slot")
    edge = 0.5 if len(told.runs) < 500 else 0  # white edges of many bars would look like idle time
    groups: dict[str, list[int]] = {}
    for i, run in enumerate(told.runs):
        kind = (
            "baseline"
            if run.baseline
            else "confirmation"
            if "candidate" in run.attributes
            else run.state
        )
        groups.setdefault(kind, []).append(i)
    for kind in (*STATES, "baseline", "confirmation"):
        places = groups.get(kind, [])
        if not places:
            continue
        runs = [told.runs[i] for i in places]
        figure.add_bar(
            base=[_since(run.started, told, seconds) for run in runs],
            x=[
                _since(run.until, told, seconds) - _since(run.started, told, seconds)
                for run in runs
            ],
            y=[told.slots[i] + 1 for i in places],
            orientation="h",
            width=0.8,
            name=kind.lower(),
            marker={"color": STATE_COLOURS[kind], "line": {"width": edge, "color": "white"}},
            text=[hover(run, short=True) for run in runs],
            textposition="none",
            hovertemplate=f"%{{text}}<br>%{{x:.2f}} {unit}<extra></extra>",
        )
    figure.update_layout(barmode="overlay")
    figure.update_yaxes(dtick=1 if told.count <= 16 else None, autorange="reversed", showgrid=False)
    return Figure("timeline", title, caption, figure, height=170 + 26 * min(told.count, 16))


def _since(moment: datetime | None, told: Timeline, seconds: float) -> float:
    return 0.0 if moment is None else round((moment - told.start).total_seconds() / seconds, 4)


def budget(facts: ReportData) -> Table:
    """What was spent of each limit. Epochs of running trials count up to their last rung."""
    used, allowed = facts.spent.as_dict(), facts.config.budget.model_dump()
    names = {
        "trials": "Trials of the search",
        "hours": "Hours run",
        "gpu_hours": "GPU-hours",
        "epochs": "Epochs",
    }
    rows = []
    for key, title in names.items():
        limit, spent = allowed[key], used[key]
        if limit is None and not spent:
            continue
        shown = f"{spent:,.0f}" if key in ("trials", "epochs") else f"{spent:.2f}"
        share = f"{100 * spent / limit:.0f} %" if limit else "\u2013"
        rows.append([title, shown, "no limit" if limit is None else f"{limit:,g}", share])
    return Table(["", "Used", "Allowed", "Share"], [[Cell(text) for text in row] for row in rows])


def outcome(facts: ReportData) -> Table:
    """What became of the trials, and what pruning and the store saved."""
    counts, rows = Counter(run.state for run in facts.search), []
    begun = sum(number for state, number in counts.items() if state != "WAITING")
    ended = [run for run in facts.search if run.state in ("COMPLETE", "PRUNED")]
    if ended:
        whole = (
            "Segments of a population"
            if facts.config.sampler.name == "pbt"
            else "Run to full length"
        )
        rows.append((whole, f"{counts['COMPLETE']:,} of {begun:,}"))
        spent = sum(run.epochs or 0 for run in ended)
        full = sum(
            facts.full_length(run) if run.state == "PRUNED" else run.epochs or 0 for run in ended
        )
        saved = f"{counts['PRUNED']:,} ({100 * counts['PRUNED'] / begun:.0f} %)"
        if full > spent:
            saved += f", which saved {full - spent:,} of {full:,} epochs ({100 * (full - spent) / full:.0f} %)"
        if counts["PRUNED"] or facts.config.pruner.name != "none":
            rows.append(("Pruned", saved))
    if facts.copies:
        epochs = sum(facts.full_length(run) for run in facts.copies)
        rows.append(
            (
                "Answered from the store",
                f"{counted(len(facts.copies), 'trial')} of known settings, {counted(epochs, 'epoch')} not trained",
            )
        )
    retried = sum("retry_of" in run.attributes for run in facts.search)
    if counts["FAIL"] or retried:
        told = f"; {counted(retried, 'trial')} tried again what had failed" if retried else ""
        rows.append(("Failed", f"{counts['FAIL']}{told}"))
    lost = [
        int(run.attributes["lost"])
        for run in (*facts.search, *facts.baselines)
        if run.attributes.get("lost")
    ]
    if lost:
        told = f"{sum(lost)}, of {counted(len(lost), 'trial')}: these are no failures, and go on from their checkpoints"
        rows.append(("Processes lost", told))
    if counts["INTERRUPTED"]:
        told = (
            f"{counts['INTERRUPTED']}; no process runs the study now, the next run takes them over"
        )
        rows.append(("Interrupted", told))
    if facts.imported:
        sources = Counter(
            str(run.attributes["source"]).partition(" trial ")[0].removeprefix("import ")
            for run in facts.imported
        )
        told = ", ".join(f"{count} from {source}" for source, count in sources.most_common(5))
        rows.append(("Imported", f"{told}: they teach the sampler, and count in nothing else here"))
    return Table(["", ""], [[Cell(text) for text in row] for row in rows])


def efficiency(facts: ReportData) -> Figure:
    """Best value so far against epochs spent."""
    title = "Best score against epochs spent"
    caption = (
        f"{facts.metric} of the best complete trial so far, against the epochs that all trials of the search had run "
        f"by then, in the order in which they ended."
    )
    ended = [
        run for run in facts.search if run.state in ("COMPLETE", "PRUNED", "FAIL") and run.ended
    ]
    ended.sort(key=lambda run: (run.ended or datetime.max, run.number))
    if not any(run.finished for run in ended):
        return Figure("efficiency", title, caption, gap="No trial has run to full length yet.")
    spent, unpruned, best = 0, 0, None
    steps: list[tuple[int, int, float, ReportedTrial]] = []
    for run in ended:
        spent += run.epochs or 0
        unpruned += facts.full_length(run) if run.state == "PRUNED" else run.epochs or 0
        if run.finished and run.feasible and (best is None or (run.value or 0.0) > best):
            best = run.value or 0.0
            steps.append((spent, unpruned, best, run))
    if best is None:
        return Figure("efficiency", title, caption, gap="No complete trial keeps the limits.")
    figure = empty("epochs spent", facts.metric)
    values = [value for _, _, value, _ in steps] + [best]
    if unpruned > spent:
        caption += " The dashed line is the same search with each pruned trial at its full length."
        figure.add_scatter(
            x=[at for _, at, _, _ in steps] + [unpruned], y=values, mode="lines", name="without pruning",
            line={"shape": "hv", "color": PALE, "dash": "dash"}, hoverinfo="skip",
        )  # fmt: skip
    figure.add_scatter(
        x=[at for at, _, _, _ in steps] + [spent],
        y=values,
        mode="lines+markers",
        name="best so far",
        line={"shape": "hv", "color": ACCENT},
        marker={"size": [7] * len(steps) + [0]},
        text=[hover(run) for *_, run in steps] + [escape(f"{len(ended)} trials ended")],
        hovertemplate="%{x} epochs: %{y:.3f}<br>%{text}<extra></extra>",
    )
    figure.update_xaxes(rangemode="tozero")
    return Figure("efficiency", title, caption, figure)
