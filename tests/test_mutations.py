"""Damaged files of every kind that the product writes: a sentence, or the same result."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "mutations.py"
COUNT = 300


@pytest.fixture(scope="module")
def mutations() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mutations", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_no_mutation_gives_a_traceback_a_hang_or_another_result_in_silence(
    mutations: ModuleType, ray_session: None, tmp_path: Path
) -> None:
    root = tmp_path / "subject"
    mutations.make_subject(root)
    outcomes = mutations.run_mutations(root, COUNT, seed=16)
    counts = Counter(outcome.outcome for outcome in outcomes)
    faults = [outcome for outcome in outcomes if outcome.outcome in mutations.FAULTS]
    assert not faults, faults[:3]
    assert len(outcomes) == COUNT
    # Damage is noticed, and what nobody reads is not refused.
    assert counts["refused"] + counts["told"] > COUNT / 5
    assert counts["same"] > COUNT / 5


def test_the_outcomes_are_told_apart(mutations: ModuleType, tmp_path: Path) -> None:
    """The judge itself: each outcome comes from a reader that deserves it."""
    from amlp_ray.errors import DataError

    def silent(folder: Path) -> dict[str, int]:
        return {"value": len((folder / "file").read_bytes())}

    def refuses(folder: Path) -> dict[str, int]:
        raise DataError("file is damaged; prepare it again.")

    def fails(folder: Path) -> dict[str, int]:
        raise KeyError("value")

    def hangs(folder: Path) -> dict[str, int]:
        while True:
            pass

    mutations.LIMIT_S = 0.2
    (tmp_path / "file").write_bytes(b"1234")
    expected = mutations._plain({"value": 4}, tmp_path)
    assert mutations._run(silent, tmp_path, expected) == ("same", "")
    assert mutations._run(refuses, tmp_path, expected)[0] == "refused"
    assert mutations._run(fails, tmp_path, expected)[0] == "traceback"
    assert mutations._run(hangs, tmp_path, expected)[0] == "hang"
    (tmp_path / "file").write_bytes(b"12")
    assert mutations._run(silent, tmp_path, expected)[0] == "silent"


def test_mutations_are_seeded_and_of_every_kind(mutations: ModuleType) -> None:
    content = b'{"epoch": 1, "dsc": 0.4}\n' * 4
    first = [mutations.mutate(content, np.random.default_rng([1, i])) for i in range(400)]
    again = [mutations.mutate(content, np.random.default_rng([1, i])) for i in range(400)]
    assert first == again
    kinds = {name for name, _ in first}
    assert kinds == {*mutations.BINARY_MUTATIONS, *mutations.TEXT_MUTATIONS}
