"""Say in plain words what a search shows, and what it does not show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev, variance

from amlp_ray.config import ABLATIONS, BASELINE_DESCRIPTIONS, baseline_names
from amlp_ray.config.yaml_file import read_record_values
from amlp_ray.errors import ConfigError
from amlp_ray.study.confirmation.comparison import (
    FEW_GROUPS,
    Comparison,
    Reading,
    VerdictKind,
    few_groups_caution,
    read_size,
    unequal_budget_caution,
    verdict_kind,
)
from amlp_ray.study.confirmation.statistics import MIN_RANKED
from amlp_ray.study.report.comparison import Baseline
from amlp_ray.study.report.report_data import (
    ReportData,
    ReportedTrial,
    count_states,
    states_text,
)
from amlp_ray.study.report.rung_correlation import FirstRungCorrelation
from amlp_ray.study.report.tables import interval_text

# Trials from which a correlation is put into words: with fewer, one of 0.44 comes by chance.
MIN_READ = 20


@dataclass(frozen=True)
class Verdict:
    """What a study shows."""

    kind: VerdictKind  # colors the report's box
    headline: str  # the comparison with plain MAE and a random encoder
    comparisons: list[str]  # a sentence for each baseline and floor
    cautions: list[str]  # why not to trust the above too much
    pruning: str  # whether early scores rank trials


def summarize_search(
    data: ReportData,
    baselines: Sequence[Baseline],
    comparisons: Sequence[Comparison],
    first_rung: FirstRungCorrelation,
) -> Verdict:
    """Word the verdict of a search.

    Args:
        baselines: those that have finished.
        comparisons: of the best trial; empty where no trial or no baseline has finished.
    """
    kind, headline = _headline(data, comparisons)
    by_name = {baseline.name: baseline for baseline in baselines}
    margin = data.config.equivalence_margin
    sentences = [_comparison_sentence(item, by_name[item.baseline], margin) for item in comparisons]
    sentences += _floor_sentences(data)
    sentences += _unfinished_baselines(data, baselines)
    cautions = _cautions(data, baselines, comparisons)
    return Verdict(kind, headline, sentences, cautions, _pruning_sentence(first_rung))


def _headline(data: ReportData, comparisons: Sequence[Comparison]) -> tuple[VerdictKind, str]:
    best = data.best
    if best is None or best.dsc is None:
        return "open", _nothing_to_judge(data)
    if not comparisons:
        return "open", (
            f"The best trial, number {best.number}, scores DSC {best.dsc:.3f}. "
            f"No baseline has finished, so there is nothing to compare it with."
        )
    by_name = {item.baseline: item for item in comparisons}
    mae, scratch = by_name.get("mae"), by_name.get("scratch")
    sentences = []
    if mae:
        sentences.append(_mae_sentence(mae))
    if scratch:
        sentences.append(_scratch_sentence(scratch))
    if not mae:
        sentences.append(
            "No run of baseline mae has finished, so this study cannot say whether masking "
            "probable lesions helps."
        )
    decisive = [item for item in (mae, scratch) if item]
    kind = verdict_kind([item.reading for item in decisive])
    # One run each: the noise of seeds is not known, and the best was chosen by its luck too.
    worse = [item for item in decisive if item.reading == "worse"]
    if kind == "better" or (worse and not any(item.difference.excludes_zero for item in worse)):
        kind = "open"
    return kind, " ".join([_limits(data, best), *sentences])


def _limits(data: ReportData, best: ReportedTrial) -> str:
    """Say what the claims after it rest on: few steps, one seed, the best of several."""
    tried = _tried(data)
    text = f"Not confirmed, {f'the best of {tried} trials' if tried > 1 else 'one trial'}"
    steps = (data.steps_per_epoch(best) or 0) * (best.epochs or 0)
    floor = data.config.pruner.min_steps
    if 0 < steps < floor:
        text += f", trained for {steps} steps, and scores say little before {floor}"
    return f"{text}, with one seed."


def _tried(data: ReportData) -> int:
    return sum(trial.state_name in ("COMPLETE", "PRUNED") for trial in data.search)


def _nothing_to_judge(data: ReportData) -> str:
    states = count_states(data.search)
    if not states:
        return "No trial has started yet, so there is nothing to judge."
    counts = states_text(states)
    if set(states) == {"FAIL"}:
        return f"Every trial has failed ({counts}): the table of all trials gives the reasons."
    return f"No trial has run to full length yet ({counts}), so there is nothing to judge."


def _mae_sentence(mae: Comparison) -> str:
    difference = mae.difference
    scores = f"DSC {mae.candidate_mean:.3f} against {mae.baseline_mean:.3f}"
    if mae.reading == "tie":
        return f"AMLP is not better than plain MAE here: {scores} is a tie."
    if mae.reading == "worse":
        worse = f"it is worse by {-difference.mean:.3f}"
        return f"AMLP is not better than plain MAE here: {scores}, {worse}."
    claim = f"The best trial scores higher than plain MAE here: {scores}, {difference.mean:+.3f}."
    if difference.interval is None:
        return (
            f"{claim} Without scores of single images, no interval can say whether that is more "
            f"than chance."
        )
    if not difference.excludes_zero:
        return (
            f"{claim} The interval over {mae.sample.unit_words} includes zero, so this is not "
            f"shown to be more than chance."
        )
    return claim


def _scratch_sentence(scratch: Comparison) -> str:
    scores = f"{scratch.candidate_mean:.3f} against {scratch.baseline_mean:.3f}"
    if scratch.reading == "worse":
        return f"It is worse than a random encoder ({scores}): this pretraining did harm."
    if scratch.reading == "tie":
        return f"It ties with a random encoder ({scores}): no use of this pretraining is shown."
    return f"It scores higher than a random encoder ({scores})."


def _comparison_sentence(item: Comparison, baseline: Baseline, equivalence_margin: float) -> str:
    name = item.baseline
    title = f"baseline {name}"
    if name in BASELINE_DESCRIPTIONS and name not in ABLATIONS:
        title = f"{BASELINE_DESCRIPTIONS[name]}, {title}"
    difference = item.difference
    sentence = (
        f"Against {title} ({item.baseline_mean:.3f}, {baseline.spread}): "
        f"{difference.mean:+.3f} DSC, {_reading_words(item.reading)}"
    )
    if item.reading == "tie":
        sentence += f" (under {equivalence_margin:g} counts as noise)"
    if difference.interval is None:
        return f"{sentence}. Scores of the same single images are missing, so there is no interval."
    includes = "leaves out zero" if difference.excludes_zero else "includes zero"
    return (
        f"{sentence}. Paired over {item.sample.describe()}, the 95 % interval is "
        f"{interval_text(difference.interval)} and {includes}."
    )


def _reading_words(reading: Reading) -> str:
    return "a tie" if reading == "tie" else reading


def _floor_sentences(data: ReportData) -> list[str]:
    """Compare the best trial with the mean training mask, where that was scored."""
    best = data.best
    floor = best.measure("mean_mask_dsc") if best else None
    if best is None or best.dsc is None or floor is None:
        return []
    difference = round(best.dsc - floor, 6)
    reading = read_size(difference, data.config.equivalence_margin)
    return [
        f"Against the mean training mask, the same on every image ({floor:.3f}): "
        f"{difference:+.3f} DSC, {_reading_words(reading)}."
    ]


def _unfinished_baselines(data: ReportData, baselines: Sequence[Baseline]) -> list[str]:
    finished = {baseline.name for baseline in baselines}
    sentences = []
    for name in baseline_names(data.config.baselines):
        if name not in finished:
            runs = [run for run in data.baselines if run.baseline == name]
            counts = states_text(count_states(runs)) or "none started"
            sentences.append(f"Baseline {name} has no finished run ({counts}).")
    return sentences


def _cautions(
    data: ReportData, baselines: Sequence[Baseline], comparisons: Sequence[Comparison]
) -> list[str]:
    best = data.best
    cautions = []
    if data.has_open_trials:
        cautions.append(
            "The study is not over: trials are running or waiting, and the numbers can change."
        )
    if best is None:
        return cautions
    tried = _tried(data)
    if tried > 1:
        cautions.append(
            f"The best of {tried} trials is optimistic: it was chosen by its score on the same "
            f"images that are compared here, which the baselines were not."
        )
    cautions.append(
        "The best trial is one run with one seed, which `amlp-ray study confirm` repeats with "
        "others."
    )
    cautions += _sample_cautions(comparisons)
    compared = [item.baseline for item in comparisons]
    once = [run.name for run in baselines if run.name in compared and len(run.runs) == 1]
    if once:
        cautions.append(
            f"One run each of {', '.join(once)}: how much these vary between seeds is unknown."
        )
    if best.score_file.get("scoring") == "cross-validation":
        cautions.append(
            "Scores are cross-validated inside train and val, so encoders were pretrained on most "
            "scored images, though never on their masks; the random encoder has no such advantage."
        )
    unequal = []
    for baseline in baselines:
        is_trained = baseline.name in compared and baseline.name != "scratch"
        if is_trained and {run.epochs for run in baseline.runs} != {best.epochs}:
            unequal.append(baseline.name)
    if unequal:
        differing = "ran different numbers of epochs"
        cautions.append(unequal_budget_caution("The best trial", unequal, differing))
    if chance := _chance_caution(data, baselines):
        cautions.append(chance)
    if _masks_at_random(best):
        cautions.append(
            "The best trial masks at random, as MAE does: what it gains does not come from "
            "masking probable lesions."
        )
    return cautions


def _sample_cautions(comparisons: Sequence[Comparison]) -> list[str]:
    """Say what the intervals cover, and whether images or patients are few."""
    cautions: list[str] = []
    for item in comparisons[:1]:
        if item.difference.interval:
            cautions.append(
                f"The intervals cover the choice of {item.sample.unit_words}. They cover neither "
                f"seeds nor the choice of the best."
            )
        if item.sample.groups < item.sample.images:
            cautions.append(
                f"In comparisons each of the {item.sample.groups} {item.sample.unit_words} counts "
                f"once, so that means differ from those over images in the tables."
            )
        if item.sample.groups < FEW_GROUPS:
            cautions.append(few_groups_caution(item.sample))
    return cautions


def _chance_caution(data: ReportData, baselines: Sequence[Baseline]) -> str | None:
    """Warn where trials differ no more than runs of one and the same baseline do."""
    scores = [trial.dsc for trial in data.search if trial.is_full_length and trial.dsc is not None]
    repeats = [baseline.values for baseline in baselines if len(baseline.values) > 1]
    if len(scores) < MIN_RANKED or not repeats:
        return None
    sd_of_trials = stdev(scores)
    sd_of_seeds = fmean(variance(values) for values in repeats) ** 0.5
    if sd_of_seeds < sd_of_trials / 2:
        return None
    return (
        f"Scores of trials differ by an SD of {sd_of_trials:.3f}, those of one and the same "
        f"baseline over seeds by {sd_of_seeds:.3f}: most of the difference between trials may be "
        f"chance, and a faster search would find luck faster."
    )


def _masks_at_random(trial: ReportedTrial) -> bool:
    try:
        selection = read_record_values(trial.path / "config.yaml").get("selection")
    except ConfigError:  # a missing or broken file is a gap in the report, not its end
        return False
    return isinstance(selection, dict) and selection.get("mode") == "random"


def _pruning_sentence(first_rung: FirstRungCorrelation) -> str:
    question = "Does an early score rank trials?"
    if first_rung.trials < MIN_RANKED:
        return (
            f"{question} Not known: {first_rung.trials} complete trials have an early and a final "
            f"score, {MIN_RANKED} are needed."
        )
    rung = "the first rung that may prune" if first_rung.is_prunable else "the first rung"
    epochs = ", ".join(str(epoch) for epoch in first_rung.epochs)
    dsc = f"{_correlation_words(first_rung.dsc)} for DSC"
    ap = f"{_correlation_words(first_rung.ap)} for patch AP"
    if first_rung.trials < MIN_READ:
        reading = f"fewer than {MIN_READ} trials are too few to read it"
    else:
        reading = _ranking_words(first_rung.dsc)
    return (
        f"{question} Over {first_rung.trials} complete trials, the Spearman correlation between "
        f"{rung} (epoch {epochs}) and the last one is {dsc} and {ap}: {reading}. Pruned trials are "
        f"not in this number, which usually lowers it."
    )


def _correlation_words(value: float | None) -> str:
    return "not known" if value is None else f"{value:+.2f}"


def _ranking_words(correlation: float | None) -> str:
    if correlation is None:
        return "too little varies to say"
    if correlation < 0.3:
        return "early scores hardly rank these trials, so pruning among them is close to chance"
    if correlation < 0.6:
        return "early scores rank these trials roughly, so pruning may lose good ones"
    return "early scores rank these trials fairly well"
