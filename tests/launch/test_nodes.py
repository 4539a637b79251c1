"""Runs on several nodes: real raylets, killed and added."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from amlp_ray.data.dataset import PatchDataset
from amlp_ray.training.checkpoint.manager import checkpoints, is_intact
from amlp_ray.training.loggers.metrics_file import read_rows
from amlp_ray.utils.event_log import count_events, read_events

EPOCHS = 70


@pytest.mark.ray
@pytest.mark.long
def test_a_node_is_killed_and_one_is_added_and_every_epoch_is_done_once(
    phantom_dataset: PatchDataset, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    command = [
        sys.executable,
        str(Path(__file__).parents[1] / "helpers" / "ray_cluster.py"),
        phantom_dataset.path,
        str(out),
        str(EPOCHS),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = read_rows(out / "metrics.jsonl")
    assert [row["epoch"] for row in rows] == list(range(1, EPOCHS + 1))
    used = Counter(row["workers"] for row in rows)
    assert used[2] > 0
    assert [row["workers"] for row in rows][-1] == 3
    starts = [event for event in read_events(out) if event["event"] == "started"]
    assert [start["workers"] for start in starts] == [3, 2, 3]
    assert all(start["repeated"] <= 1 for start in starts)
    assert starts[1]["text"].endswith("with 2 workers instead of 3.")
    assert count_events(out)["node lost"] == 1
    assert checkpoints(out)
    assert all(map(is_intact, checkpoints(out)))
