"""What a study shows, in plain words, and what it does not show."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean, stdev, variance
from typing import Literal

from amlp_ray.config import ABLATIONS, ABOUT, baseline_names
from amlp_ray.config.yaml_file import read_yaml
from amlp_ray.errors import ConfigError
from amlp_ray.study.confirmation.statistics import MIN_RANKED
from amlp_ray.study.report.comparison import (
    Agreement,
    Baseline,
    Comparison,
    finished_baselines,
    read,
)
from amlp_ray.study.report.report_data import ReportData, ReportedTrial, count_states

FEW_IMAGES = 40  # below this the scores of single images rule the mean


@dataclass(frozen=True)
class Verdict:
    kind: Literal["better", "equivalence_margin", "worse", "open"]
    headline: str
    comparisons: list[str]  # a sentence for each baseline and floor
    cautions: list[str]  # why not to trust the above too much
    pruning: str  # whether early scores rank trials


def summarize_search(
    facts: ReportData,
    baselines: list[Baseline],
    comparisons: list[Comparison],
    agreement: Agreement,
) -> Verdict:
    """Word the verdict of a study; `comparisons` is empty where no trial or no baseline has finished."""
    kind, headline = _headline(facts, comparisons)
    equivalence_margin = facts.config.equivalence_margin
    sentences = [_against(item, equivalence_margin) for item in comparisons]
    best = facts.best
    floor = best.measure("mean_mask_dsc") if best else None
    if best and best.dsc is not None and floor is not None:
        difference = round(best.dsc - floor, 6)
        sentences.append(
            f"Against the mean training mask, drawn on every image without a look at it ({floor:.3f}): "
            f"{difference:+.3f} DSC, {_reading(read(difference, equivalence_margin))}."
        )
    sentences += _unfinished(facts, baselines)
    return Verdict(kind, headline, sentences, _cautions(facts, comparisons), _pruning(agreement))


def spread(baseline: Baseline) -> str:
    """Say how far the repeats of a baseline lie apart."""
    if len(baseline.runs) == 1:
        return "one run"
    sd = f"SD {baseline.sd:.3f}, " if baseline.sd is not None else ""
    return f"mean of {len(baseline.runs)} runs, {sd}range {min(baseline.values):.3f} to {max(baseline.values):.3f}"


def _headline(
    facts: ReportData, comparisons: list[Comparison]
) -> tuple[Literal["better", "equivalence_margin", "worse", "open"], str]:
    best = facts.best
    if best is None or best.dsc is None:
        return "open", _nothing_yet(facts)
    if not comparisons:
        return "open", (
            f"The best trial, number {best.number}, scores DSC {best.dsc:.3f}. "
            f"No baseline has finished, so there is nothing to compare it with."
        )
    by_name = {item.baseline.name: item for item in comparisons}
    mae, scratch = by_name.get("mae"), by_name.get("scratch")
    parts = [_about_mae(best, mae)] if mae else []
    if scratch:
        parts.append(_about_scratch(best, scratch))
    if not mae:
        parts.append(
            "No run of baseline mae has finished, so this study cannot say whether aimed masks help."
        )
    readings = [item.reading for item in (mae, scratch) if item]
    if "worse" in readings:
        return "worse", " ".join(parts)
    if "equivalence_margin" in readings:
        return "equivalence_margin", " ".join(parts)
    return ("better" if mae and mae.clear else "open"), " ".join(parts)


def _nothing_yet(facts: ReportData) -> str:
    states = count_states(facts.search)
    if not states:
        return "No trial has started yet, so there is nothing to judge."
    told = ", ".join(f"{count} {state}" for state, count in states.items())
    if set(states) == {"FAIL"}:
        return f"Every trial has failed ({told}): the table of all trials gives the reasons."
    return f"No trial has run to full length yet ({told}), so there is nothing to judge."


def _about_mae(best: ReportedTrial, mae: Comparison) -> str:
    scores = f"DSC {best.dsc:.3f} against {mae.baseline.dsc:.3f}"
    if mae.reading == "equivalence_margin":
        return f"AMLP is not better than plain MAE here: {scores} is a tie."
    if mae.reading == "worse":
        return f"AMLP is not better than plain MAE here: {scores}, it is worse by {-mae.difference:.3f}."
    claim = f"The best trial scores higher than plain MAE here: {scores}, {mae.difference:+.3f}."
    if mae.interval is None:
        return (
            claim
            + " Without scores of single images, no interval can say whether that is more than chance."
        )
    if not mae.clear:
        return (
            claim
            + " The interval over images includes zero, so this is not shown to be more than chance."
        )
    return claim


def _about_scratch(best: ReportedTrial, scratch: Comparison) -> str:
    scores = f"{best.dsc:.3f} against {scratch.baseline.dsc:.3f}"
    if scratch.reading == "worse":
        return f"It is worse than a random encoder ({scores}): this pretraining did harm."
    if scratch.reading == "equivalence_margin":
        return f"It ties with a random encoder ({scores}): no use of this pretraining is shown."
    return f"It scores higher than a random encoder ({scores})."


def _against(item: Comparison, equivalence_margin: float) -> str:
    name = item.baseline.name
    known = (
        f"{ABOUT[name]}, baseline {name}"
        if name in ABOUT and name not in ABLATIONS
        else f"baseline {name}"
    )
    said = f"Against {known} ({item.baseline.dsc:.3f}, {spread(item.baseline)}): "
    said += f"{item.difference:+.3f} DSC, {_reading(item.reading)}"
    if item.reading == "equivalence_margin":
        said += f" (under {equivalence_margin:g} counts as noise)"
    if item.interval is None:
        return said + ". Scores of the same single images are missing, so there is no interval."
    low, high = item.interval
    includes = "leaves out zero" if item.clear else "includes zero"
    return (
        said
        + f". Paired over {item.images} images, the 95 % interval is {low:+.3f} to {high:+.3f} and {includes}."
    )


def _reading(reading: str) -> str:
    return "a tie" if reading == "equivalence_margin" else reading


def _unfinished(facts: ReportData, baselines: list[Baseline]) -> list[str]:
    sentences = []
    for name in baseline_names(facts.config.baselines):
        if all(baseline.name != name for baseline in baselines):
            states = count_states(run for run in facts.baselines if run.baseline == name)
            told = (
                ", ".join(f"{count} {state}" for state, count in states.items()) or "none started"
            )
            sentences.append(f"Baseline {name} has no finished run ({told}).")
    return sentences


def _cautions(facts: ReportData, comparisons: list[Comparison]) -> list[str]:
    best, cautions = facts.best, []
    if facts.running:
        cautions.append(
            "The study is not over: trials are running or waiting, and the numbers can change."
        )
    if best is None:
        return cautions
    tried = sum(run.state in ("COMPLETE", "PRUNED") for run in facts.search)
    if tried > 1:
        cautions.append(
            f"The best of {tried} trials is optimistic: it was chosen by its score on the same images that are "
            f"compared here, which the baselines were not."
        )
    cautions.append(
        "The best trial is one run with one seed, which `amlp-ray study confirm` repeats with others."
    )
    if any(item.interval for item in comparisons):
        cautions.append(
            "The intervals cover the choice of images. They cover neither seeds nor the choice of the best."
        )
    once = [item.baseline.name for item in comparisons if len(item.baseline.runs) == 1]
    if once:
        cautions.append(
            f"One run each of {', '.join(once)}: how much these vary between seeds is unknown."
        )
    images = best.measure("images")
    if images is not None and images < FEW_IMAGES:
        cautions.append(
            f"Only {images:.0f} images with a lesion are scored; each of them weighs heavily."
        )
    if best.score.get("scoring") == "cross-validation":
        cautions.append(
            "Scores are cross-validated inside train and val, so encoders were pretrained on most scored images, "
            "though never on their masks; the random encoder has no such advantage."
        )
    longer = [
        item.baseline.name
        for item in comparisons
        if item.baseline.name != "scratch"
        and {run.epochs for run in item.baseline.runs} != {best.epochs}
    ]
    if longer:
        cautions.append(
            f"The best trial and {', '.join(longer)} ran different numbers of epochs: not the same budget."
        )
    if chance := _chance(facts):
        cautions.append(chance)
    if _masks_at_random(best):
        cautions.append(
            "The best trial masks at random, as MAE does: what it gains does not come from aimed masks."
        )
    return cautions


def _chance(facts: ReportData) -> str | None:
    """A warning where trials differ no more than runs of one and the same baseline do."""
    trials = [run.dsc for run in facts.search if run.finished and run.dsc is not None]
    repeats = [
        baseline.values for baseline in finished_baselines(facts) if len(baseline.values) > 1
    ]
    if len(trials) < MIN_RANKED or not repeats:
        return None
    own, seeds = stdev(trials), fmean(variance(values) for values in repeats) ** 0.5
    if seeds < own / 2:
        return None
    return (
        f"Scores of trials differ by an SD of {own:.3f}, those of one and the same baseline over seeds by {seeds:.3f}: most "
        f"of what sets trials apart here may be chance, and a faster search would find luck faster."
    )


def _masks_at_random(run: ReportedTrial) -> bool:
    try:
        selection = read_yaml(run.folder / "config.yaml").get("selection")
    except ConfigError:  # a missing or broken file is a gap in the report, not its end
        return False
    return isinstance(selection, dict) and selection.get("mode") == "random"


def _pruning(agreement: Agreement) -> str:
    question = "Does an early score rank trials?"
    if agreement.trials < MIN_RANKED:
        return (
            f"{question} Not known: {agreement.trials} complete trials have an early and a final score, "
            f"{MIN_RANKED} are needed."
        )
    rung = "the first rung that may prune" if agreement.prunable else "the first rung"
    at = ", ".join(str(epoch) for epoch in agreement.epochs)
    values = [f"{_rho(agreement.dsc)} for DSC", f"{_rho(agreement.ap)} for patch AP"]
    return (
        f"{question} Over {agreement.trials} complete trials, the Spearman correlation between {rung} (epoch {at}) and "
        f"the last one is {' and '.join(values)}: {_ranking(agreement.dsc)}. Pruned trials are not in this "
        f"number, which usually lowers it"
        + ("; with so few trials it is also uncertain." if agreement.trials < 20 else ".")
    )


def _rho(value: float | None) -> str:
    return "not known" if value is None else f"{value:+.2f}"


def _ranking(rho: float | None) -> str:
    if rho is None:
        return "too little varies to say"
    if rho < 0.3:
        return "early scores hardly rank these trials, so pruning among them is close to chance"
    if rho < 0.6:
        return "early scores rank these trials roughly, so pruning may lose good ones"
    return "early scores rank these trials fairly well"
