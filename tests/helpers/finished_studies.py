"""Studies with every file that a report reads, written without any training."""

import json
from pathlib import Path

import numpy as np
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial
from PIL import Image

from amlp_ray.config import Choice, Range, StudyConfig
from amlp_ray.config.yaml_file import write_yaml
from amlp_ray.study.storage.study_store import StudyStore

RUNGS = (25, 50, 75, 100)


SPACE = {
    "ratio.start": Range(low=0.1, high=0.6),
    "ratio.end": Range(low=0.4, high=0.9),
    "ratio.shape": Choice(choices=["linear", "power"]),
    "ratio.power": Range(low=0.5, high=3, log=True, when={"ratio.shape": "power"}),
    "selection.clusters": Range(low=2, high=6, step=1),
}


def new_study(folder: Path, **config) -> StudyStore:
    """Create an empty study: settings and environment, no trial."""
    folder.mkdir(parents=True)
    values = {
        "name": folder.name,
        "description": "Which masking ratio?",
        "space": SPACE,
        "baselines": ("scratch", "mae"),
    }
    write_yaml(StudyConfig(**{**values, **config}), folder / "study.yaml")
    environment = {
        "commit": "abc123",
        "versions": {"torch": "2.8.0", "ray": "2.60.0"},
        "hardware": {"cpus": 2, "gpus": []},
        "dataset": {
            "name": "busi",
            "fingerprint": "f00",
            "counts": {"train": 104, "val": 15},
            "size": 96,
        },
    }
    (folder / "environments.jsonl").write_text(json.dumps(environment) + "\n")
    store = StudyStore(folder)
    store.search(create=True)
    store.baselines(create=True)
    return store


def write_files(
    folder: Path,
    dsc: float,
    *,
    epochs: int = 100,
    ratio=(0.3, 0.6),
    images: int = 60,
    noise: float = 0.01,
):
    """Write the plain files of one run, as a trial leaves them.

    `noise` is the SD of per-image scores around `dsc`.
    """
    rng = np.random.default_rng(int(dsc * 1e6))
    (folder / "pictures").mkdir(parents=True)
    lines = []
    for epoch in range(1, epochs + 1):
        row = {
            "epoch": epoch,
            "loss": 1.2 * epoch**-0.2,
            "ratio": ratio[0] + (ratio[1] - ratio[0]) * epoch / 100,
        }
        if epoch in RUNGS:
            row |= {
                "dsc": dsc - 0.1 + 0.001 * epoch,
                "ap": dsc + 0.1 + 0.001 * epoch,
                "ppv": 0.5,
                "sensitivity": 0.6,
            }
        lines.append(json.dumps(row))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    values = rng.normal(0, noise, images)
    score = {
        "epoch": epochs,
        "dsc": dsc,
        "ppv": 0.55,
        "sensitivity": 0.61,
        "ap": dsc + 0.1,
        "dsc_sd": 0.02,
        "empty_correct": None,
        "images": images,
        "scoring": "val",
        "mean_mask_dsc": 0.35,
        "unit": "image",
        "per_group": {f"case{i}": float(dsc + v) for i, v in enumerate(values - values.mean())},
    }
    (folder / "score.json").write_text(json.dumps(score))
    (folder / "config.yaml").write_text("variant: amlp\nselection:\n  mode: hard\n")
    (folder / "encoder.safetensors").write_bytes(b"weights")


def add_trial(
    store: StudyStore,
    dsc: float,
    *,
    state: str = "COMPLETE",
    power: bool = False,
    values=None,
    attributes=None,
    **files,
) -> Path:
    """Add a trial of the search.

    A pruned one stops at its second rung, a running one has one rung, a failed one none.

    Args:
        values: of several objectives.
        attributes: further user attributes; `stats` are added to what every trial ends with.
    """
    number = len(store.search().trials)
    distributions = {
        "ratio.start": FloatDistribution(0.1, 0.6),
        "ratio.end": FloatDistribution(0.4, 0.9),
        "ratio.shape": CategoricalDistribution(["linear", "power"]),
        "selection.clusters": IntDistribution(2, 6),
    }
    rng = np.random.default_rng(number)
    params = {
        "ratio.start": float(np.clip(dsc, 0.1, 0.6)),
        "ratio.end": float(rng.uniform(0.4, 0.9)),
        "ratio.shape": "power" if power else "linear",
        "selection.clusters": int(rng.integers(2, 7)),
    }
    if power:
        distributions["ratio.power"] = FloatDistribution(0.5, 3, log=True)
        params["ratio.power"] = float(rng.uniform(0.5, 3))
    reached = {"COMPLETE": 4, "PRUNED": 2, "RUNNING": 1, "FAIL": 0}[state]
    rungs = {epoch: dsc - 0.1 + 0.001 * epoch for epoch in RUNGS[:reached]}
    stored = {"path": f"trials/{number}", "seed": 100 + number}
    if state == "FAIL":
        stored["reason"] = "Loss became NaN in epoch 3."
    elif state != "RUNNING":
        stored["stats"] = {"seconds": 90.0, "epochs": max(rungs), "images_per_second": 500.0}
    extra = dict(attributes or {})
    stats = {**stored.get("stats", {}), **extra.get("stats", {})}
    stored |= {**extra, "stats": stats}
    last = rungs[max(rungs)] if rungs else None
    value = {"COMPLETE": dsc, "PRUNED": last}.get(state)
    frozen = create_trial(
        state=TrialState[state],
        params=params,
        distributions=distributions,
        intermediate_values=rungs,
        values=values or (None if value is None else [value]),
        user_attrs=stored,
    )
    store.search(create=True).add_trial(frozen)
    folder = store.trial_folder(number)
    if state == "FAIL":
        folder.mkdir(parents=True)
    else:
        ratio = (params["ratio.start"], params["ratio.end"])
        write_files(folder, dsc, **{"epochs": max(rungs, default=5), "ratio": ratio, **files})
    return folder


def add_baseline(
    store: StudyStore, baseline: str, repeat: int, dsc: float, *, state: str = "COMPLETE", **files
) -> Path:
    epochs = files.pop("epochs", 0 if baseline == "scratch" else 100)
    attributes = {
        "baseline": baseline,
        "repeat": repeat,
        "path": f"baselines/{baseline}-{repeat}",
        "seed": repeat,
    }
    attributes |= {
        "uses_ground_truth": files.pop("uses_ground_truth", False),
        "stats": {"epochs": epochs},
    }
    value = dsc if state == "COMPLETE" else None
    store.baselines(create=True).add_trial(
        create_trial(state=TrialState[state], value=value, user_attrs=attributes)
    )
    folder = store.folder / "baselines" / f"{baseline}-{repeat}"
    write_files(folder, dsc, **{"epochs": epochs, "ratio": (0.75, 0.75), **files})
    return folder


def add_picture(folder: Path, name: str) -> None:
    pixels = np.linspace(0, 255, 96 * 4 * 96).reshape(96, 4 * 96).astype(np.uint8)
    Image.fromarray(pixels).save(folder / "pictures" / name)
