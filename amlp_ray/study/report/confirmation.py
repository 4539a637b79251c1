"""Say what a confirmation shows, in words that can be "no difference shown", and tabulate it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from amlp_ray.study.confirmation.comparison import (
    FEW_GROUPS,
    Comparison,
    VerdictKind,
    few_groups_caution,
    unequal_budget_caution,
    verdict_kind,
)
from amlp_ray.study.confirmation.results import (
    PROTOCOLS,
    Confirmation,
    ConfirmedCandidate,
    Protocol,
    unequal_budgets,
)
from amlp_ray.study.confirmation.statistics import LEVEL, Correlation, effect_words
from amlp_ray.study.report.report_data import states_text
from amlp_ray.study.report.summary import Verdict
from amlp_ray.study.report.tables import (
    MISSING,
    SIZES,
    Table,
    count_words,
    interval_text,
    percent,
    text_table,
    three_digits,
    without_empty_rows,
)

# Below it, the spread of seeds is a guess.
FEW_SEEDS = 5
PROTOCOL_NAMES: dict[Protocol, str] = {"finetune": "fine-tuning", "probe": "probe"}
# The comparisons that decide a verdict.
DECISIVE = ("mae", "scratch")


@dataclass(frozen=True)
class ConfirmationSection:
    """The report's section of the confirmation."""

    state: str  # how far it is, and what the numbers below are of
    sentences: list[str]  # a comparison each, by fine-tuning; none where they stand in the verdict
    probe_sentences: list[str]  # the same by the probe
    protocols: list[str]  # noise, agreement and ties
    method: str  # how intervals and p-values are computed
    table: Table  # all candidates
    sizes: Table  # DSC by size of the lesion
    failed: list[str]  # a sentence per run that failed


def confirmation_section(confirmation: Confirmation) -> ConfirmationSection:
    """Word and tabulate a confirmation for the report."""
    by_finetuning = [] if confirmation.test_unlock else confirmation.against_baselines["finetune"]
    by_probe = confirmation.against_baselines["probe"]
    units = by_probe[0].sample.unit_words if by_probe else "images"
    return ConfirmationSection(
        state=_state(confirmation),
        sentences=_sentences(confirmation, by_finetuning, "finetune"),
        probe_sentences=_sentences(confirmation, by_probe, "probe"),
        protocols=[
            _noise(confirmation),
            _agreement(confirmation),
            *(_ties(confirmation, protocol) for protocol in PROTOCOLS),
        ],
        method=(
            f"Every candidate was trained anew with the same seeds. Intervals are 95 % and cover "
            f"seeds and {units}: a hierarchical bootstrap of paired differences, widened as few "
            f"seeds require. p is the larger of Wilcoxon's over {units} and of a t-test over seeds "
            f"and {units}, after Holm's correction for the comparisons of one list. A difference "
            f"is shown where p is below 0.05 and the interval leaves out zero; one that is shown "
            f"and below {confirmation.equivalence_margin:g} is a tie."
        ),
        table=_table(confirmation),
        sizes=_sizes(confirmation),
        failed=[f"{run} failed: {reason}" for run, reason in confirmation.failed.items()],
    )


def confirmation_sentences(confirmation: Confirmation) -> list[str]:
    """Word the comparisons by fine-tuning, the agreement of protocols, and cautions."""
    comparisons = confirmation.against_baselines["finetune"]
    return [
        _state(confirmation),
        *_sentences(confirmation, comparisons, "finetune"),
        _noise(confirmation),
        _agreement(confirmation),
        *_cautions(confirmation),
    ]


def with_confirmation(search_verdict: Verdict, confirmation: Confirmation | None) -> Verdict:
    """Return the verdict of the confirmation once test images were opened, else the search's."""
    if confirmation is None or not confirmation.test_unlock or confirmation.chosen is None:
        return search_verdict
    chosen = confirmation.chosen
    by_name = {item.baseline: item for item in confirmation.against_baselines["finetune"]}
    by_probe = [item for item in confirmation.against_baselines["probe"] if _is_decisive(item)]
    leading = [by_name[name] for name in DECISIVE if name in by_name]
    kind = _kind(leading)
    others = [item for item in by_name.values() if not _is_decisive(item)]
    if not leading:
        leading, others = others[:1], others[1:]
    headline = f"{_capitalize(chosen.title)} was confirmed, and no baseline to compare it with."
    if leading:
        first = _sentence(confirmation, leading[0], "finetune", is_first=True)
        headline = " ".join([first, *_sentences(confirmation, leading[1:], "finetune")])
    return replace(
        search_verdict,
        kind=kind,
        headline=headline,
        comparisons=[
            *_sentences(confirmation, others, "finetune"),
            *_sentences(confirmation, by_probe, "probe"),
            f"In the search before, on val: {search_verdict.headline}",
        ],
        cautions=_cautions(confirmation),
    )


def _is_decisive(item: Comparison) -> bool:
    return item.baseline in DECISIVE


def _kind(decisive: Sequence[Comparison]) -> VerdictKind:
    readings = [item.reading for item in decisive]
    has_mae = any(item.baseline == "mae" for item in decisive)
    return verdict_kind(readings) if has_mae and "not known" not in readings else "open"


def _sentences(
    confirmation: Confirmation, items: Iterable[Comparison], protocol: Protocol
) -> list[str]:
    return [_sentence(confirmation, item, protocol) for item in items]


def _sentence(
    confirmation: Confirmation,
    item: Comparison,
    protocol: Protocol,
    *,
    is_first: bool = False,
) -> str:
    """Word a comparison; the first one begins with what is compared, over which seeds and images.

    Such as "Against baseline mae (plain MAE), 0.608: +0.004 [-0.012, +0.019], p 0.55 after Holm:
    no difference shown."
    """
    by_name = {candidate.name: candidate for candidate in confirmation.candidates}
    candidate = by_name[item.candidate]
    baseline = by_name[item.baseline]
    difference = item.difference
    title = baseline.title
    if baseline.description and not baseline.ablation:
        title += f" ({baseline.description})"
    if is_first:
        seeds = count_words(difference.seeds, "seed")
        images = item.sample.describe(confirmation.split)
        text = (
            f"Over {seeds} and {images}, {candidate.title} scores "
            f"{item.candidate_mean:.3f} DSC ({PROTOCOL_NAMES[protocol]}), {title} "
        )
    else:
        is_chosen = candidate is confirmation.chosen
        text = f"against {title}, " if is_chosen else f"{candidate.title} against {title}, "
        text = f"By the probe, {text}" if protocol == "probe" else _capitalize(text)
    text += f"{item.baseline_mean:.3f}: {difference.mean:+.3f}"
    if difference.interval is not None:
        text += f" [{difference.interval[0]:+.3f}, {difference.interval[1]:+.3f}]"
    text += _conclusion(confirmation, item, baseline)
    return f"{text} {_capitalize(baseline.description)}" if baseline.ablation else text


def _conclusion(confirmation: Confirmation, item: Comparison, baseline: ConfirmedCandidate) -> str:
    if baseline.uses_ground_truth:
        return ". It sees true masks, so it is no part of the verdict."
    if item.reading == "not known":
        one = "seed" if item.difference.seeds < 2 else item.sample.unit
        return (
            f". One {one} says nothing of the noise, so this is not known to be more than chance."
        )
    text = f", p {_p_text(item.p)} after Holm"
    if (effect := item.difference.effect) is not None:
        text += f", effect {effect:.2f} ({effect_words(effect)})"
    if item.reading == "tie":
        return f"{text}: shown, but under {confirmation.equivalence_margin:g}, a tie."
    return f"{text}: {item.reading}."


def _state(confirmation: Confirmation) -> str:
    counts = states_text(confirmation.states)
    if unlock := confirmation.test_unlock:
        return (
            f"Runs: {counts}. The test images were opened once, on {unlock.when}, at commit "
            f"{unlock.commit or 'unknown'}, when these candidates were settled; nobody else is "
            f"scored on them."
        )
    return (
        f"Runs: {counts}. The test images have not been opened: numbers are of val, by which "
        f"trials were chosen, and are optimistic for these."
    )


def _noise(confirmation: Confirmation) -> str:
    parts = []
    for protocol in PROTOCOLS:
        sd = confirmation.noise(protocol)
        parts.append(f"{PROTOCOL_NAMES[protocol]} {'not known' if sd is None else f'{sd:.3f}'}")
    return f"Noise, as SD of one candidate's DSC over seeds: {', '.join(parts)}."


def _agreement(confirmation: Confirmation) -> str:
    of_all = confirmation.agreement()
    if of_all.value is None:
        return (
            f"Whether probe and fine-tuning agree is not known: {of_all.n} candidates are too few, "
            f"or all score alike."
        )
    text = (
        f"Probe and fine-tuning agree by a rank correlation of {_correlation_text(of_all)} over "
        f"the means of {of_all.n} candidates ({confirmation.split})"
    )
    without = confirmation.agreement(without="scratch")
    if without.n < of_all.n and without.value is not None:
        text += f"; {_correlation_text(without)} over {without.n} without the random encoder"
    low, high = of_all.interval or (-1.0, 1.0)
    if of_all.p is None or of_all.p >= LEVEL:
        low, high = -1.0, 1.0
    if high < 0:
        return (
            f"{text}: they rank the other way round, so the search chose by what is worse in the "
            f"end."
        )
    if low > 0.5:
        return f"{text}: the search's score ranks as fine-tuning does."
    if low > 0:
        return f"{text}: they agree, how well is open."
    return (
        f"{text}: that they agree is not shown, so the search may have chosen by what does not "
        f"matter in the end."
    )


def _correlation_text(correlation: Correlation) -> str:
    if correlation.interval is None:
        return f"{correlation.value:+.2f} (too few candidates for an interval)"
    low, high = correlation.interval
    return f"{correlation.value:+.2f} [{low:+.2f}, {high:+.2f}]"


def _ties(confirmation: Confirmation, protocol: Protocol) -> str:
    titles = {candidate.name: candidate.title for candidate in confirmation.candidates}
    pairs = []
    for item in confirmation.comparisons(protocol):
        if item.reading in ("tie", "no difference shown"):
            names = f"{titles[item.candidate]} and {titles[item.baseline]}"
            pairs.append(f"{names} ({item.difference.mean:+.3f})")
    return (
        f"Ties by {PROTOCOL_NAMES[protocol]} (no difference shown, or one under "
        f"{confirmation.equivalence_margin:g}): {'; '.join(pairs) or 'none'}."
    )


def _cautions(confirmation: Confirmation) -> list[str]:
    chosen = confirmation.chosen
    if chosen is None:
        return []
    cautions = [
        f"{_capitalize(chosen.title)} was chosen among the confirmed trials by the probe on val; "
        f"the test chose nothing."
    ]
    counted = [len(c.runs) for c in confirmation.candidates if not c.uses_ground_truth]
    seeds = min(counted, default=0)
    if seeds < FEW_SEEDS:
        cautions.append(
            f"{seeds} {'seed is' if seeds == 1 else 'seeds are'} few: how far seeds lie apart is "
            f"a guess itself, and only large differences can be shown. "
            f"confirm.seeds={FEW_SEEDS} would say more."
        )
    samples = [item.sample for item in confirmation.against_baselines["finetune"]]
    smallest = min(samples, key=lambda sample: sample.groups, default=None)
    if smallest is not None and smallest.groups < smallest.images:
        cautions.append(
            f"In comparisons each of the {smallest.groups} {smallest.unit_words} counts once, so "
            f"that means differ from those over images in the table."
        )
    if smallest is not None and smallest.groups < FEW_GROUPS:
        cautions.append(few_groups_caution(smallest, confirmation.split))
    if confirmation.failed:
        failed = ", ".join(confirmation.failed)
        cautions.append(f"Runs that failed are left out, in pairs: {failed}.")
    if names := unequal_budgets(confirmation):
        titles = [c.title for c in confirmation.candidates if c.name in names]
        best = _capitalize(chosen.title)
        cautions.append(unequal_budget_caution(best, titles, "differ in epochs or batch size"))
    return cautions


def _table(confirmation: Confirmation) -> Table:
    """Tabulate all candidates; differences are the chosen (or ablated) trial minus the row."""
    columns = ["", "Seeds"]
    for protocol in PROTOCOLS:
        columns += [f"DSC, {PROTOCOL_NAMES[protocol]}", "SD over seeds"]
        columns += ["Difference", "95 % interval", "p, Holm", "Reading"]
    rows = []
    for candidate in _ordered(confirmation):
        row = [_row_title(confirmation, candidate), str(len(candidate.runs))]
        for protocol in PROTOCOLS:
            row.append(three_digits(candidate.mean(protocol, confirmation.split)))
            row.append(three_digits(candidate.sd(protocol, confirmation.split)))
            row += _comparison_cells(confirmation, candidate, protocol)
        rows.append(row)
    return text_table(columns, rows)


def _comparison_cells(
    confirmation: Confirmation, candidate: ConfirmedCandidate, protocol: Protocol
) -> list[str]:
    for item in confirmation.comparisons(protocol):
        if item.baseline == candidate.name:
            return [
                f"{item.difference.mean:+.3f}",
                interval_text(item.difference.interval),
                _p_text(item.p),
                MISSING if item.p is None else item.reading,
            ]
    return [MISSING] * 4


def _sizes(confirmation: Confirmation) -> Table:
    """Tabulate DSC of fine-tuning by size of the lesion, and images without one beside it."""
    rows = []
    for candidate in _ordered(confirmation):
        means = [candidate.mean("finetune", confirmation.split, key) for key in SIZES]
        title = _row_title(confirmation, candidate)
        empty_correct = candidate.mean("finetune", confirmation.split, "empty_correct")
        rows.append([title, *(three_digits(mean) for mean in means), percent(empty_correct)])
    columns = ["", "Small lesions", "Medium", "Large", "Empties correct"]
    return text_table(columns, without_empty_rows(rows))


def _ordered(confirmation: Confirmation) -> list[ConfirmedCandidate]:
    """Sort candidates: the chosen trial, other trials, baselines, those that see true masks."""

    def rank(candidate: ConfirmedCandidate) -> tuple[bool, bool, bool]:
        is_chosen = candidate is confirmation.chosen
        return not is_chosen, not candidate.is_trial, candidate.uses_ground_truth

    return sorted(confirmation.candidates, key=rank)


def _row_title(confirmation: Confirmation, candidate: ConfirmedCandidate) -> str:
    if candidate is confirmation.chosen:
        return f"{candidate.title} (chosen)"
    if candidate.uses_ground_truth:
        return f"{candidate.title} (uses true masks)"
    return candidate.title


def _p_text(p: float | None) -> str:
    if p is None:
        return MISSING
    if p < 0.001:
        return "< 0.001"
    return f"{p:.2f}" if p >= 0.1 else f"{p:.3f}"


def _capitalize(text: str) -> str:
    """Capitalize the first letter and leave the others, as `str.capitalize` does not."""
    return text[0].upper() + text[1:]
