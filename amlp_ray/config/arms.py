"""Baseline arms of a study by name: variants, controls of the searched method, and the steps of an ablation."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from amlp_ray.config.pretrain import VARIANTS, PretrainSettings
from amlp_ray.settings import build

_PLAIN = {"weighting": "none", "ccl_weight": 0.0}
_FIXED = {"start": 0.75, "end": 0.75}  # MAE's ratio, which a rising one ends at


@dataclass(frozen=True)
class Control:
    """An arm that is the searched method with one thing changed: its question, and the change."""

    about: str
    change: Mapping[str, Any]
    diagnosis: bool = False  # uses true masks: shown, and never part of a verdict


# Of the study's own `pretrain`; in a confirmation, of its best trial. `equal-mean` is worked out from the schedule.
CONTROLS: dict[str, Control] = {
    "equal-mean": Control("does the ratio have to change, or is its mean enough?", {"ratio": {"shape": "fixed"}}),
    "random-ratio": Control("does its order matter, or only its range?", {"ratio": {"shape": "random"}}),
    "random-cluster": Control("does the cluster have to be the lesion's?", {"selection": {"rule": "random"}}),
    "oracle": Control(
        "what would perfect aim be worth?", {"selection": {"mode": "hard", "rule": "oracle"}}, diagnosis=True
    ),
}

# Arms of settings of their own, each laid over variant amlp or mae.
STEPS: dict[str, dict[str, Any]] = {
    "mae+mps": {"variant": "amlp", "ratio": _FIXED, "loss": _PLAIN},
    "mae+amr": {"variant": "amlp", "selection": {"mode": "random"}, "loss": _PLAIN},
    "mae+rrl": {"variant": "mae", "loss": {"weighting": "rrl"}},
    "mae+mps+amr": {"variant": "amlp", "loss": _PLAIN},
    "mae+mps+amr+rrl": {"variant": "amlp", "loss": {"ccl_weight": 0.0}},
    "mae+mps+amr+ccl": {"variant": "amlp", "loss": {"weighting": "none"}},
    "amlp-mps": {"variant": "amlp", "selection": {"mode": "random"}},
    "amlp-amr": {"variant": "amlp", "ratio": _FIXED},
    "amlp-rrl": {"variant": "amlp", "loss": {"weighting": "none"}},
    "amlp-ccl": {"variant": "amlp", "loss": {"ccl_weight": 0.0}},
}

# One word for several arms.
GROUPS: dict[str, tuple[str, ...]] = {
    "ladder": ("mae", "mae+mps", "mae+amr", "mae+rrl", "mae+mps+amr", "mae+mps+amr+rrl", "mae+mps+amr+ccl", "amlp"),
    "leave-one-out": ("amlp", "amlp-mps", "amlp-amr", "amlp-rrl", "amlp-ccl"),
}


def check_arm(name: str, settings: Mapping[str, Any] | None = None) -> None:
    """Raise ValueError for a name that means nothing, or SettingsError for settings of an arm of one's own."""
    known = [*VARIANTS, *CONTROLS, *STEPS, *GROUPS]
    if settings is not None:
        if name in known:
            raise ValueError(f"{name!r} is an arm already; give settings of your own another name")
        build(PretrainSettings, settings, f"arm {name}")
    elif name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        raise ValueError(f"there is no arm {name!r}; " + (f"did you mean {near[0]}?" if near else ", ".join(known)))
