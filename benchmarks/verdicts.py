"""Count false claims and missed truths of confirmations, over simulated studies.

    python benchmarks/verdicts.py                 # 1,000 studies of each kind, in 15 minutes
    python benchmarks/verdicts.py --studies 100   # in two minutes

A study has five candidates (two trials and three baselines), which are scored by fine-tuning and by
the probe over the same seeds and images. Images belong to patients of unequal size. Three effects
are noise: that of a seed on all candidates (of opposite sign for the two protocols), that of a run,
and that of a patient on a candidate. Every study goes through the code that words a report.

Without any difference, a verdict "better" or "worse" is false, and so is a sentence that the
protocols agree or disagree. With a planted difference, the interval should cover it.
README.md beside this file says what came out.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from amlp_ray.study.confirmation.confirm import TestUnlock
from amlp_ray.study.confirmation.results import (
    PROTOCOLS,
    Confirmation,
    ConfirmationRun,
    ConfirmedCandidate,
    Protocol,
    SplitName,
)
from amlp_ray.study.report.confirmation import confirmation_section, with_confirmation
from amlp_ray.study.report.summary import Verdict

NAMES = ("trial-0", "trial-1", "mae", "scratch", "amlp")
PLANTED = 0.03  # of both trials over all baselines
SEED_SD = 0.02
RUN_SD = 0.012
PATIENT_SD = 0.06  # of a patient's DSC between two candidates
IMAGE_SD = 0.08
# Sentences of a report that claim something about the two protocols.
AGREEMENT_CLAIMS = (
    "they rank the other way round",
    "ranks as fine-tuning does",
    "they agree, how well is open",
)

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


def patient_sizes(rng: np.random.Generator, patients: int) -> IntArray:
    """Draw how many images each patient has: a few have many."""
    return np.maximum(1, rng.lognormal(2.3, 0.8, patients)).astype(np.int64)


def simulate(
    rng: np.random.Generator, *, seeds: int, patients: int, planted: float
) -> Confirmation:
    """Draw a confirmed study whose trials are better than its baselines by `planted`."""
    sizes = patient_sizes(rng, patients)
    of_seed = rng.normal(0, SEED_SD, seeds)
    level = rng.normal(0.5, 0.15, patients)
    candidates = []
    for name in NAMES:
        gain = planted if name.startswith("trial") else 0.0
        of_patient = {protocol: rng.normal(0, PATIENT_SD, patients) for protocol in PROTOCOLS}
        runs = []
        for repeat in range(seeds):
            scores = {}
            for protocol, sign in zip(PROTOCOLS, (1, -1), strict=True):
                run = gain + sign * of_seed[repeat] + rng.normal(0, RUN_SD)
                means = level + run + of_patient[protocol]
                means = means + rng.normal(0, IMAGE_SD / np.sqrt(sizes))
                scores[protocol] = _score(means, sizes)
            runs.append(_run(repeat, scores))
        candidates.append(ConfirmedCandidate(name, False, tuple(runs)))
    unlock = TestUnlock(when="now", commit=None, candidates=list(NAMES), runs={})
    return Confirmation(tuple(candidates), {"COMPLETE": seeds}, {}, unlock, "dsc", 0.0)


def _score(means: FloatArray, sizes: IntArray) -> dict[str, object]:
    by_patient = {f"p{i}": float(mean) for i, mean in enumerate(means)}
    dsc = float(np.average(means, weights=sizes))
    return {"dsc": dsc, "images": int(sizes.sum()), "unit": "patient", "per_group": by_patient}


def _run(repeat: int, scores: dict[Protocol, dict[str, object]]) -> ConfirmationRun:
    by_split: dict[tuple[Protocol, SplitName], dict[str, object]] = {}
    for protocol, score in scores.items():
        by_split[protocol, "test"] = score
        by_split[protocol, "val"] = score
    return ConfirmationRun(repeat, Path(), by_split)


def claims(confirmation: Confirmation) -> list[str]:
    """Return what a report of the study claims."""
    verdict = with_confirmation(Verdict("open", "", [], [], ""), confirmation)
    claimed: list[str] = [verdict.kind] if verdict.kind in ("better", "worse") else []
    agreement = confirmation_section(confirmation).protocols[1]
    if any(words in agreement for words in AGREEMENT_CLAIMS):
        claimed.append("agreement")
    return claimed


def covers(confirmation: Confirmation, truth: float) -> list[bool]:
    """Return whether each interval against a baseline covers the true difference."""
    covered = []
    for item in confirmation.against_baselines["finetune"]:
        interval = item.difference.interval
        covered.append(interval is not None and interval[0] <= truth <= interval[1])
    return covered


def main() -> int:
    args = _arguments()
    print(
        "| seeds | patients | better | worse | agree or disagree | covered, no difference "
        f"| covered, {PLANTED:+g} | better, {PLANTED:+g} |\n|---|---|---|---|---|---|---|---|"
    )
    is_right = True
    for seeds in args.seeds:
        for patients in args.patients:
            rng = np.random.default_rng([args.seed, seeds, patients])
            claimed: Counter[str] = Counter()
            true_claims: Counter[str] = Counter()
            covered: dict[float, list[bool]] = {0.0: [], PLANTED: []}
            for _ in range(args.studies):
                study = simulate(rng, seeds=seeds, patients=patients, planted=0.0)
                claimed.update(claims(study))
                covered[0.0] += covers(study, 0.0)
                study = simulate(rng, seeds=seeds, patients=patients, planted=PLANTED)
                true_claims.update(claims(study))
                covered[PLANTED] += covers(study, PLANTED)
            rates = [claimed[name] / args.studies for name in ("better", "worse", "agreement")]
            shares = [float(np.mean(values)) for values in covered.values()]
            cells = [*rates, *shares, true_claims["better"] / args.studies]
            print(f"| {seeds} | {patients} | {' | '.join(f'{x:.1%}' for x in cells)} |", flush=True)
            is_right &= max(rates[0] + rates[1], rates[2]) <= 0.05
            is_right &= all(0.93 <= share <= 0.97 for share in shares)
    return 0 if is_right else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--studies", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[3, 5])
    parser.add_argument("--patients", type=int, nargs="+", default=[12, 30, 60])
    parser.add_argument("--seed", type=int, default=0, help="of the simulation")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
