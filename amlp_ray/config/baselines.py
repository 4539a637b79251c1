"""Baselines of a study by name: variants, ablations of the searched method, and their groups."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from amlp_ray.config.base import build, nearest_name
from amlp_ray.config.pretrain import MAE_RATIO, PLAIN_LOSS, VARIANTS, PretrainConfig

_FOLDER_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_.+-]*$")
# A confirmation names its trials like this, beside the baselines.
_TRIAL_NAME = re.compile(r"^trial-\d+$")
# Equal in all runs of a study: they make runs comparable, and the seed pairs them.
_STUDY_SETTINGS = ("epochs", "batch_size", "seed")

# The searched method with one thing changed: of the study's own `pretrain`; in a confirmation, of
# its best trial. The ratio of `equal-mean` is the mean of the schedule.
ABLATIONS: dict[str, dict[str, Any]] = {
    "equal-mean": {"ratio": {"shape": "fixed"}},
    "random-ratio": {"ratio": {"shape": "random"}},
    "random-cluster": {"selection": {"rule": "random"}},
    # The teacher's feedback changes what counts as lesion, which is the oracle's part here.
    "oracle": {
        "selection": {"mode": "hard", "hard_by": "cluster", "rule": "oracle", "feedback": 0.0}
    },
}

# Baselines between MAE and AMLP, each as changes of variant amlp or mae.
ABLATION_STEPS: dict[str, dict[str, Any]] = {
    "mae+mps": {"variant": "amlp", "ratio": MAE_RATIO, "loss": PLAIN_LOSS},
    "mae+amr": {"variant": "amlp", "selection": {"mode": "random"}, "loss": PLAIN_LOSS},
    "mae+rrl": {"variant": "mae", "loss": {"weighting": "rrl"}},
    "mae+mps+amr": {"variant": "amlp", "loss": PLAIN_LOSS},
    "amlp-mps": {"variant": "amlp", "selection": {"mode": "random"}},
    "amlp-amr": {"variant": "amlp", "ratio": MAE_RATIO},
    "amlp-rrl": {"variant": "amlp", "loss": {"weighting": "none"}},
    "amlp-ccl": {"variant": "amlp", "loss": {"ccl_weight": 0.0}},
}

# One word for several baselines. The last rungs of the ladder are AMLP without one of its losses,
# so both groups contain these two.
BASELINE_GROUPS: dict[str, tuple[str, ...]] = {
    "ladder": (
        "mae",
        "mae+mps",
        "mae+amr",
        "mae+rrl",
        "mae+mps+amr",
        "amlp-ccl",
        "amlp-rrl",
        "amlp",
    ),
    "leave-one-out": ("amlp", "amlp-mps", "amlp-amr", "amlp-rrl", "amlp-ccl"),
}

# What each baseline is, for readers; baselines of the user's own have none.
BASELINE_DESCRIPTIONS = {
    "amlp": "AMLP with its default settings",
    "amlp-soft": "AMLP with soft masks",
    "mps-ams": "AMLP's predecessor",
    "mae": "plain MAE",
    "simmim": "SimMIM",
    "hpm": "masks by predicted difficulty",
    "attmask": "masks by attention",
    "semmae": "masks by parts",
    "simsiam": "SimSiam",
    "scratch": "a random encoder",
    "mae+mps": "MAE with lesion masks",
    "mae+amr": "MAE with a rising ratio",
    "mae+rrl": "MAE with weighted hard patches",
    "mae+mps+amr": "AMLP with the plain loss",
    "amlp-mps": "AMLP with random masks",
    "amlp-amr": "AMLP at a fixed ratio",
    "amlp-rrl": "AMLP without weighted hard patches",
    "amlp-ccl": "AMLP without its category loss",
    "equal-mean": "does the ratio have to change, or is its mean enough?",
    "random-ratio": "does its order matter, or only its range?",
    "random-cluster": "does the cluster have to be the lesion's?",
    "oracle": "what would the truest cluster be worth?",
}


def baseline_names(
    baselines: Sequence[str | Mapping[str, Any]],
) -> dict[str, Mapping[str, Any] | None]:
    """Return each baseline of a study once, in order, with groups expanded.

    The value is the settings of a baseline of the user's own, and None for a known one.

    >>> list(baseline_names(["scratch", "leave-one-out", "amlp"]))
    ['scratch', 'amlp', 'amlp-mps', 'amlp-amr', 'amlp-rrl', 'amlp-ccl']
    """
    names: dict[str, Mapping[str, Any] | None] = {}
    for baseline in baselines:
        if isinstance(baseline, str):
            for name in BASELINE_GROUPS.get(baseline, (baseline,)):
                names.setdefault(name, None)
        else:
            for name, config in baseline.items():
                names.setdefault(name, config)
    return names


def check_baseline(name: str, config: Mapping[str, Any] | None = None) -> None:
    """Check a baseline or group of a study; one of the user's own has a `config`.

    Raises:
        ValueError: there is no such baseline, or a baseline of the user's own cannot have the name.
        ConfigError: its settings are invalid.
    """
    known = [*VARIANTS, *ABLATIONS, *ABLATION_STEPS, *BASELINE_GROUPS]
    if config is not None:
        _check_own_baseline(name, config, known)
    elif name not in known:
        near = nearest_name(name, known)
        hint = f"the nearest is {near}" if near else ", ".join(known)
        raise ValueError(f"there is no baseline {name!r}; {hint}")


def _check_own_baseline(name: str, config: Mapping[str, Any], known: Sequence[str]) -> None:
    if name in known:
        raise ValueError(f"{name!r} is a baseline already; give settings of your own another name")
    if not _FOLDER_NAME.match(name) or _TRIAL_NAME.match(name):
        raise ValueError(
            f"baseline {name!r} names a folder: use letters, digits, '.', '_', '+' and '-', "
            f"and no name such as trial-7"
        )
    for key in _STUDY_SETTINGS:
        if key in config:
            raise ValueError(
                f"baseline {name!r} sets {key}, but baselines are trained as trials are; "
                f"set it in pretrain"
            )
    build(PretrainConfig, config, f"baseline {name}")
