"""The bench of data against a model: a row for each way to read."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.runs import discs, write

from amlp_ray.analysis.throughput import bench_reading
from amlp_ray.config import PretrainConfig
from amlp_ray.config.base import build
from amlp_ray.data.dataset import PatchDataset

TINY = {
    "variant": "mae",
    "epochs": 1,
    "batch_size": 12,
    "model": {"width": 24, "depth": 1, "heads": 2, "decoder_width": 16, "decoder_heads": 2},
}


@pytest.mark.ray
def test_each_way_to_read_has_a_row(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AMLP_RAY_CACHE", str(tmp_path / "cache"))
    dataset = write(tmp_path / "discs", {"train": discs(37)})
    rows = bench_reading(dataset, build(PretrainConfig, TINY, "test"), seconds=0.1, device="cpu")
    assert [row["mode"] for row in rows] == ["mapped", "stream"]
    assert [row["auto"] for row in rows] == ["x", ""]
    for row in rows:
        assert row["failed"] is None
        assert row["images_per_second"] > 0
        assert row["model_images_per_second"] > 0
        assert row["first_batch_seconds"] > 0
        assert 0 <= row["waiting"] < 1


def test_a_way_that_has_no_room_says_so(
    phantom_dataset: PatchDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("AMLP_RAY_CACHE", str(tmp_path / "file" / "cache"))
    config = build(PretrainConfig, TINY, "test")
    (row,) = bench_reading(
        phantom_dataset, config, batch_size=6, seconds=0.1, device="cpu", modes=("mapped",)
    )
    assert "set AMLP_RAY_CACHE to a folder" in row["failed"]
