"""Baseline baselines of a study by name: variants, controls of the searched method, and the steps of an ablation."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from amlp_ray.config.base import build
from amlp_ray.config.pretrain import VARIANTS, PretrainConfig

NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_.+-]*$")  # of folders
_TAKEN = re.compile(r"^trial-\d+$")  # names of trials among the candidates of a confirmation
_STUDYS = ("epochs", "batch_size", "seed")  # what makes runs last equally long, and pairs them

_PLAIN = {"weighting": "none", "ccl_weight": 0.0}
_FIXED = {"start": 0.75, "end": 0.75}  # MAE's ratio, which a rising one ends at


@dataclass(frozen=True)
class Ablation:
    """A baseline that is the searched method with one thing changed: its question, and the change."""

    about: str
    change: Mapping[str, Any]
    diagnosis: bool = False  # uses true masks: shown, and never part of a verdict


# Of the study's own `pretrain`; in a confirmation, of its best trial. `equal-mean` is worked out from the schedule.
ABLATIONS: dict[str, Ablation] = {
    "equal-mean": Ablation(
        "does the ratio have to change, or is its mean enough?", {"ratio": {"shape": "fixed"}}
    ),
    "random-ratio": Ablation(
        "does its order matter, or only its range?", {"ratio": {"shape": "random"}}
    ),
    "random-cluster": Ablation(
        "does the cluster have to be the lesion's?", {"selection": {"rule": "random"}}
    ),
    # The teacher's feedback moves what counts as lesion, so with it the aim were not the oracle's.
    "oracle": Ablation(
        "what would the truest cluster be worth?",
        {"selection": {"mode": "hard", "hard_by": "cluster", "rule": "oracle", "feedback": 0.0}},
        diagnosis=True,
    ),
}

# Baselines of settings of their own, each laid over variant amlp or mae.
STEPS: dict[str, dict[str, Any]] = {
    "mae+mps": {"variant": "amlp", "ratio": _FIXED, "loss": _PLAIN},
    "mae+amr": {"variant": "amlp", "selection": {"mode": "random"}, "loss": _PLAIN},
    "mae+rrl": {"variant": "mae", "loss": {"weighting": "rrl"}},
    "mae+mps+amr": {"variant": "amlp", "loss": _PLAIN},
    "amlp-mps": {"variant": "amlp", "selection": {"mode": "random"}},
    "amlp-amr": {"variant": "amlp", "ratio": _FIXED},
    "amlp-rrl": {"variant": "amlp", "loss": {"weighting": "none"}},
    "amlp-ccl": {"variant": "amlp", "loss": {"ccl_weight": 0.0}},
}

# One word for several baselines. The last rungs of the ladder are AMLP less one loss, so both groups name the same two baselines.
GROUPS: dict[str, tuple[str, ...]] = {
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

# What a baseline is, for readers; those of one's own are known by their names alone.
ABOUT = {
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
    **{name: control.about for name, control in ABLATIONS.items()},
    "mae+mps": "MAE with aimed masks",
    "mae+amr": "MAE with a rising ratio",
    "mae+rrl": "MAE with weighted hard patches",
    "mae+mps+amr": "AMLP with the plain loss",
    "amlp-mps": "AMLP with random masks",
    "amlp-amr": "AMLP at a fixed ratio",
    "amlp-rrl": "AMLP without weighted hard patches",
    "amlp-ccl": "AMLP without its category loss",
}


def baseline_names(
    baselines: Sequence[str | Mapping[str, Any]],
) -> dict[str, Mapping[str, Any] | None]:
    """Each baseline of a study once, in order, groups spelt out; with its settings where it is one of the study's own.

    >>> list(baseline_names(["scratch", "leave-one-out", "amlp"]))
    ['scratch', 'amlp', 'amlp-mps', 'amlp-amr', 'amlp-rrl', 'amlp-ccl']
    """
    given: dict[str, Mapping[str, Any] | None] = {}
    for baseline in baselines:
        for name in [baseline] if isinstance(baseline, str) else baseline:
            for each in GROUPS.get(name, (name,)):
                given.setdefault(each, None if isinstance(baseline, str) else baseline[name])
    return given


def check_arm(name: str, config: Mapping[str, Any] | None = None) -> None:
    """Raise ValueError for a name that means nothing, or ConfigError for settings of a baseline of one's own."""
    known = [*VARIANTS, *ABLATIONS, *STEPS, *GROUPS]
    if config is not None:
        if name in known:
            raise ValueError(
                f"{name!r} is a baseline already; give settings of your own another name"
            )
        if not NAME.match(name) or _TAKEN.match(name):
            raise ValueError(
                f"baseline {name!r} names a folder: letters, digits, '.', '_', '+' and '-', and no trial-7"
            )
        if taken := [key for key in _STUDYS if key in config]:
            raise ValueError(
                f"baseline {name!r} sets {taken[0]}, but baselines are trained as trials are; set it in pretrain"
            )
        build(PretrainConfig, config, f"baseline {name}")
    elif name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        raise ValueError(
            f"there is no baseline {name!r}; "
            + (f"the nearest is {near[0]}" if near else ", ".join(known))
        )
