"""Derive the seeds of trials and baselines from the seed of a study."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def derived_seed(*parts: Any) -> int:
    """A 31-bit seed that follows from its parts, such as (study seed, trial number)."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:4], "big") >> 1
