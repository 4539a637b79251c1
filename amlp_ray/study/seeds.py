"""Derive the seeds of trials and baselines from the seed of a study."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def derived_seed(*parts: Any) -> int:
    """Return a seed of 31 bits that follows from its parts, such as (study seed, trial number)."""
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
