"""What a confirmation shows, in words that can be "no difference shown", and its table."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from amlp_ray.study.confirmation.results import (
    PROTOCOLS,
    Against,
    Confirmation,
    Confirmed,
    Protocol,
    unequal,
)
from amlp_ray.study.confirmation.statistics import Correlation, effect_words
from amlp_ray.study.report.summary import FEW_IMAGES, Verdict
from amlp_ray.study.report.tables import MISSING, Cell, Table

FEW_SEEDS = 5  # below it, the spread of seeds is a guess
NAMES: dict[Protocol, str] = {"finetune": "fine-tuning", "probe": "probe"}
SHOWN = {
    "better": "better",
    "worse": "worse",
    "equivalence_margin": "a tie",
    "not known": "not known",
}


@dataclass(frozen=True)
class Section:
    """The report's section of the confirmation."""

    state: str  # how far it is, and what the numbers below are of
    sentences: list[str]  # a comparison each, by fine-tuning; none where they stand in the verdict
    beside: list[str]  # the same by the probe
    protocols: list[str]  # noise, agreement, ties
    method: str
    table: Table
    sizes: Table
    failed: list[str]


def section(found: Confirmation) -> Section:
    against = found.against_arms["finetune"]
    return Section(
        state=_state(found),
        sentences=[_sentence(found, item, "finetune") for item in against if not found.opened],
        beside=[_sentence(found, item, "probe") for item in found.against_arms["probe"]],
        protocols=[
            _noise(found),
            _agreement(found),
            *(_ties(found, protocol) for protocol in PROTOCOLS),
        ],
        method=(
            "Every candidate was trained anew with the same seeds. Intervals are 95 % and cover seeds and images: a "
            "hierarchical bootstrap of paired differences, widened as few seeds require. p is the larger of "
            "Wilcoxon's over images and of a t-test over seeds and images, after Holm's correction for the "
            "comparisons of one list. A difference is shown where p is below 0.05 and the interval leaves out zero; "
            f"one that is shown and below {found.equivalence_margin:g} is a tie."
        ),
        table=_table(found),
        sizes=_sizes(found),
        failed=[f"{name} failed: {reason}" for name, reason in found.failed.items()],
    )


def in_words(found: Confirmation) -> list[str]:
    """The comparisons by fine-tuning, what the two protocols agree on, and cautions, a sentence each."""
    compared = [_sentence(found, item, "finetune") for item in found.against_arms["finetune"]]
    return [_state(found), *compared, _noise(found), _agreement(found), *_cautions(found)]


def with_confirmation(searched: Verdict, found: Confirmation | None) -> Verdict:
    """The verdict of a study: that of the confirmation, once test images were opened, and of the search until then."""
    if found is None or not found.opened or found.chosen is None:
        return searched
    items = {item.theirs: item for item in found.against_arms["finetune"]}
    first = [items[name] for name in ("mae", "scratch") if name in items]
    rest = [item for item in items.values() if item not in first]
    beside = [item for item in found.against_arms["probe"] if item.theirs in ("mae", "scratch")]
    shown = first or rest[:1]
    told = [_sentence(found, item, "finetune", whole=item is shown[0]) for item in shown]
    if not told:
        told = [
            f"{_capital(found.chosen.title)} was confirmed, and no baseline to compare it with."
        ]
    return replace(
        searched,
        kind=_kind(items),
        headline=" ".join(told),
        comparisons=[
            *(_sentence(found, item, "finetune") for item in rest if item not in shown),
            *(_sentence(found, item, "probe") for item in beside),
            f"In the search before, on val: {searched.headline}",
        ],
        cautions=_cautions(found),
    )


def _kind(items: dict[str, Against]) -> Literal["better", "equivalence_margin", "worse", "open"]:
    readings = [items[name].reading for name in ("mae", "scratch") if name in items]
    if "mae" not in items or "not known" in readings:
        return "open"
    if "worse" in readings:
        return "worse"
    return "better" if set(readings) == {"better"} else "equivalence_margin"


def _sentence(
    found: Confirmation, item: Against, protocol: Protocol, *, whole: bool = False
) -> str:
    """Such as: Against baseline mae (plain MAE), 0.608: +0.004 [-0.012, +0.019], p 0.55 after Holm: no difference shown.

    Args:
        whole: begin with who is compared, over what: Over 3 seeds and 87 test images, trial 7 scores 0.612 DSC ...
    """
    by_name = {candidate.name: candidate for candidate in found.candidates}
    ours, theirs, d = by_name[item.ours], by_name[item.theirs], item.difference
    named = (
        f"{theirs.title} ({theirs.about})" if theirs.about and not theirs.control else theirs.title
    )
    if whole:
        text = (
            f"Over {d.seeds} {'seed' if d.seeds == 1 else 'seeds'} and {d.images} {found.split} images, {ours.title} "
            f"scores {item.our_mean:.3f} DSC ({NAMES[protocol]}), {named} {item.their_mean:.3f}: {d.mean:+.3f}"
        )
    else:
        who = "against" if ours is found.chosen else f"{ours.title} against"
        text = f"{who} {named}, {item.their_mean:.3f}: {d.mean:+.3f}"
        text = f"By the probe, {text}" if protocol == "probe" else _capital(text)
    if d.interval is not None:
        text += f" [{d.interval[0]:+.3f}, {d.interval[1]:+.3f}]"
    asked = f" {_capital(theirs.about)}" if theirs.control else ""
    if theirs.diagnosis:
        return text + f". It sees true masks: a diagnosis, and no part of the verdict.{asked}"
    if item.reading == "not known":
        return (
            text
            + ". One seed says nothing of the noise, so this is not known to be more than chance."
            + asked
        )
    effect = f", effect {d.effect:.2f} ({effect_words(d.effect)})" if d.effect is not None else ""
    return text + f", p {_p(item.p)} after Holm{effect}: {_reading(found, item)}.{asked}"


def _reading(found: Confirmation, item: Against) -> str:
    if item.reading == "equivalence_margin":
        return f"shown, but under {found.equivalence_margin:g}, a tie"
    return SHOWN.get(item.reading, item.reading)


def _state(found: Confirmation) -> str:
    told = ", ".join(f"{count} {state}" for state, count in found.states.items())
    if found.opened:
        return (
            f"Runs: {told}. The test images were opened once, on {found.opened['when']}, at commit "
            f"{found.opened['commit'] or 'unknown'}, when these candidates were settled; nobody else is scored on them."
        )
    return (
        f"Runs: {told}. The test images have not been opened: numbers are of val, by which trials were chosen, and are "
        f"optimistic for these."
    )


def _noise(found: Confirmation) -> str:
    parts = []
    for protocol in PROTOCOLS:
        sd = found.noise(protocol)
        parts.append(f"{NAMES[protocol]} {'not known' if sd is None else f'{sd:.3f}'}")
    return f"Noise, as SD of one candidate's DSC over seeds: {', '.join(parts)}."


def _agreement(found: Confirmation) -> str:
    every, without = found.agreement(), found.agreement(without="scratch")
    if every.value is None:
        return f"Whether probe and fine-tuning agree is not known: {every.n} runs are too few, or all score alike."
    text = f"Probe and fine-tuning agree by a rank correlation of {_rho(every)} over {every.n} runs ({found.split})"
    if without.n < every.n and without.value is not None:
        text += f"; {_rho(without)} over {without.n} without the random encoder"
    low, high = every.interval or (-1.0, 1.0)
    if high < 0:
        return (
            text
            + ": they rank the other way round, so the search chose by what is worse in the end."
        )
    if low > 0.5:
        return text + ": the search's score ranks as fine-tuning does."
    if low > 0:
        return text + ": they agree, how well is open."
    return (
        text
        + ": that they agree is not shown, so the search may have chosen by what does not matter in the end."
    )


def _rho(found: Correlation) -> str:
    if found.interval is None:
        return f"{found.value:+.2f} (too few candidates for an interval)"
    return f"{found.value:+.2f} [{found.interval[0]:+.2f}, {found.interval[1]:+.2f}]"


def _ties(found: Confirmation, protocol: Protocol) -> str:
    titles = {candidate.name: candidate.title for candidate in found.candidates}
    items = [*found.against_trials[protocol], *found.against_arms[protocol]]
    tied = [item for item in items if item.reading in ("equivalence_margin", "no difference shown")]
    pairs = "; ".join(
        f"{titles[item.ours]} and {titles[item.theirs]} ({item.difference.mean:+.3f})"
        for item in tied
    )
    return f"Ties by {NAMES[protocol]} (no difference shown, or one under {found.equivalence_margin:g}): {pairs or 'none'}."


def _cautions(found: Confirmation) -> list[str]:
    chosen = found.chosen
    assert chosen is not None
    cautions = [
        f"{_capital(chosen.title)} was chosen among the confirmed trials by the probe on val; the test chose nothing."
    ]
    seeds = min((len(c.runs) for c in found.candidates if not c.diagnosis), default=0)
    if seeds < FEW_SEEDS:
        cautions.append(
            f"{seeds} {'seed is' if seeds == 1 else 'seeds are'} few: how far seeds lie apart is a guess itself, and "
            f"only large differences can be shown. confirm.seeds={FEW_SEEDS} would say more."
        )
    images = {item.difference.images for item in found.against_arms["finetune"]}
    if images and min(images) < FEW_IMAGES:
        cautions.append(
            f"Only {min(images)} test images with a lesion are scored; each of them weighs heavily."
        )
    if found.failed:
        cautions.append(f"Runs that failed are left out, in pairs: {', '.join(found.failed)}.")
    if others := unequal(found):
        titles = {c.name: c.title for c in found.candidates}
        cautions.append(
            f"{_capital(chosen.title)} and {', '.join(titles[name] for name in others)} differ in epochs or batch "
            f"size: not the same budget."
        )
    return cautions


def _table(found: Confirmation) -> Table:
    """All candidates, the chosen one first; differences are the chosen trial (or a control's own trial) minus this."""
    columns = ["", "Seeds"]
    for protocol in PROTOCOLS:
        columns += [
            f"DSC, {NAMES[protocol]}",
            "SD over seeds",
            "Difference",
            "95 % interval",
            "p, Holm",
            "Reading",
        ]
    items = {
        p: {a.theirs: a for a in [*found.against_trials[p], *found.against_arms[p]]}
        for p in PROTOCOLS
    }
    rows = []
    for candidate in _ordered(found):
        row = [_named(found, candidate), str(len(candidate.runs))]
        for protocol in PROTOCOLS:
            row += [
                _three(candidate.mean(protocol, found.split)),
                _three(candidate.sd(protocol, found.split)),
            ]
            row += _compared(items[protocol].get(candidate.name))
        rows.append([Cell(text) for text in row])
    return Table(columns, rows)


def _compared(item: Against | None) -> list[str]:
    if item is None:
        return [MISSING] * 4
    low, high = item.difference.interval or (None, None)
    interval = MISSING if low is None or high is None else f"{low:+.3f} to {high:+.3f}"
    p = MISSING if item.p is None else _p(item.p)
    return [
        f"{item.difference.mean:+.3f}",
        interval,
        p,
        MISSING if item.p is None else item.reading,
    ]


def _sizes(found: Confirmation) -> Table:
    """DSC of fine-tuning by size of the lesion."""
    keys = ("dsc_small", "dsc_medium", "dsc_large")
    rows = [
        [_named(found, c), *(_three(c.mean("finetune", found.split, key)) for key in keys)]
        for c in _ordered(found)
    ]
    known = [row for row in rows if set(row[1:]) != {MISSING}]
    return Table(
        ["", "Small lesions", "Medium", "Large"], [[Cell(text) for text in row] for row in known]
    )


def _ordered(found: Confirmation) -> list[Confirmed]:
    return sorted(
        found.candidates, key=lambda c: (c is not found.chosen, not c.is_trial, c.diagnosis)
    )


def _named(found: Confirmation, candidate: Confirmed) -> str:
    if candidate is found.chosen:
        return f"{candidate.title} (chosen)"
    return f"{candidate.title} (diagnosis)" if candidate.diagnosis else candidate.title


def _three(value: float | None) -> str:
    return MISSING if value is None else f"{value:.3f}"


def _p(value: float | None) -> str:
    if value is None:
        return MISSING
    return "< 0.001" if value < 0.001 else f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
