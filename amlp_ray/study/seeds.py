"""Derive the seeds of trials and baselines from the seed of a study."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def derived_seed(*parts: Any) -> int:
    """Return a seed of 31 bits that follows from its parts, such as (study seed, trial number)."""
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def baseline_seed(study_seed: int, repeat: int) -> int:
    """Return the seed of a repeat of every baseline, which pairs the baselines.

    The word "arm" is part of the seed. Another word would give every baseline another run.
    """
    return derived_seed(study_seed, "arm", repeat)
