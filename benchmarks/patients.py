"""Compare pretraining on patients with many alike slices: verdicts by slice and by patient.

    python benchmarks/patients.py            # some minutes on two cores

Phantoms of patients are prepared, and baselines are pretrained with three seeds each and scored by
the probe. Every pair of baselines is then compared twice with the same code and the same scores:
once with each slice as the unit, as if slices were independent, and once with each patient. Slices
of a patient are alike, so the first interval is too narrow: it claims differences that other
patients would not show.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from amlp_ray.config import PrepareConfig
from amlp_ray.data.phantom_patients import write_phantom_patients
from amlp_ray.data.prepare.pipeline import prepare
from amlp_ray.study.confirmation.statistics import Difference, compare
from amlp_ray.study.study import Study

BASELINES = ("scratch", "mae", "equal-mean", "random-ratio")
SEEDS = 3
STUDY: dict[str, Any] = {
    "name": "patients",
    "seed": 1,
    "pretrain": {"epochs": 30, "batch_size": 32, "model": {"width": 48, "depth": 3, "heads": 3}},
    "space": {"ratio.start": {"low": 0.2, "high": 0.5}},
    "pruner": {"name": "none", "rungs": 1},
    "budget": {"trials": 1},
    "baselines": list(BASELINES),
    "baseline_seeds": SEEDS,
}


def run_study(root: Path, images: int, slices: int) -> Path:
    """Prepare phantoms, half of whose patients are scored, and run a study; return its folder."""
    source = write_phantom_patients(
        root / "source", kind="ultrasound", count=images, slices=slices, size=64, seed=2
    )
    config = PrepareConfig(size=64, fractions=(0.45, 0.45, 0.1))
    dataset = prepare(source, root / "dataset", config)
    Study.create(runs=root / "runs", data=dataset.path, **STUDY).run()
    return root / "runs/patients"


def scores_of(study: Path, baseline: str, unit: str) -> np.ndarray:
    """Return the DSC of a baseline, (seeds, units)."""
    rows = []
    for repeat in range(SEEDS):
        score = json.loads((study / f"baselines/{baseline}-{repeat}/score.json").read_text())
        values = score[unit]
        rows.append([values[name] for name in sorted(values)])
    return np.array(rows)


def describe(difference: Difference) -> str:
    """Return a difference with its interval, and what it would be read as."""
    assert difference.interval is not None
    low, high = difference.interval
    reading = "not shown"
    if difference.excludes_zero and difference.p is not None and difference.p < 0.05:
        reading = "better" if difference.mean > 0 else "worse"
    return f"{difference.mean:+.3f} [{low:+.3f}, {high:+.3f}] {reading}"


def main() -> int:
    """Run the study and print both verdicts of every pair."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--slices", type=int, default=24, help="Mean number of a patient's slices.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="patients-") as folder:
        study = run_study(Path(folder), arguments.images, arguments.slices)
        counts = {
            unit: scores_of(study, "mae", unit).shape[1] for unit in ("per_image", "per_group")
        }
        print(f"{counts['per_image']} slices of {counts['per_group']} patients, {SEEDS} seeds")
        print(f"{'pair':<28} {'by slice':<38} by patient")
        for first, second in combinations(BASELINES, 2):
            texts = []
            for unit in ("per_image", "per_group"):
                pair = (scores_of(study, second, unit), scores_of(study, first, unit))
                texts.append(describe(compare(*pair)))
            print(f"{second + ' - ' + first:<28} {texts[0]:<38} {texts[1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
