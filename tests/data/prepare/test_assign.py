"""Groups and splits of scanned items: what is balanced, and what of it is counted."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from amlp_ray.config import PrepareConfig
from amlp_ray.data.layouts import SourceImage
from amlp_ray.data.manifest import SPLITS
from amlp_ray.data.prepare.assign import UserFiles, assign, split_rule
from amlp_ray.data.prepare.crop import Crop
from amlp_ray.data.prepare.scan import FrameScan, ItemScan, ScannedItem
from amlp_ray.errors import DataError

PATIENTS = 60


def scanned_items(site_in_names: bool = False) -> list[ScannedItem]:
    """Two images of each patient; those of every third patient hold a lesion."""
    scanned = []
    for i in range(2 * PATIENTS):
        patient = i // 2
        crop = Crop(0, 0, 0.0, 1.0, lesion=patient % 3 == 0)
        item = SourceImage(
            id=f"image {i}",
            format="picture",
            images=(f"{i}.png",),
            masks=(f"{i}_mask.png",),
            source=f"{i}.png",
            group=f"P{patient}",
            site="AB"[patient % 2] if site_in_names else "",
        )
        frame = FrameScan(0, 8, 8, None, i + 1, (crop,))
        scanned.append(ScannedItem(item, ItemScan(frames=(frame,))))
    return scanned


def group_table(folder: Path) -> str:
    """Write a table of patients, a fifth of whom come from site north."""
    path = folder / "cases.csv"
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "patient", "site"])
        for patient in range(PATIENTS):
            table.writerow([f"P{patient}", f"P{patient}", "north" if patient % 5 == 0 else "south"])
    return str(path)


def counted(config: PrepareConfig, scanned: list[ScannedItem]) -> Any:
    user_files = UserFiles.from_config(config, [item for item, _ in scanned])
    return assign(scanned, user_files, config).counts


def test_columns_of_the_group_file_are_balanced_and_counted(tmp_path: Path) -> None:
    config = PrepareConfig(
        group_file=group_table(tmp_path), group_column="patient", balance_columns=("site",)
    )
    scanned = scanned_items()
    for seed in range(20):
        counts = counted(config.model_copy(update={"seed": seed}), scanned)
        for split, fraction in zip(SPLITS, config.fractions, strict=True):
            split_counts = counts[split]
            assert split_counts.images == pytest.approx(fraction * 120, abs=6)
            assert split_counts.groups == split_counts.images // 2
            assert split_counts.kinds["site north"] == pytest.approx(fraction * 24, abs=4)
            assert split_counts.lesions == pytest.approx(fraction * 40, abs=6)
        totals = [counts[split].kinds["site south"] for split in SPLITS]
        assert sum(totals) == 96
    rule = split_rule(config, counts["train"])
    assert rule == "0.7/0.1/0.2 by group, balanced in images, lesions, site, seed 0"


def test_sites_of_the_layout_are_balanced() -> None:
    counts = counted(PrepareConfig(), scanned_items(site_in_names=True))
    for split, fraction in zip(SPLITS, (0.7, 0.1, 0.2), strict=True):
        assert counts[split].kinds["site A"] == pytest.approx(fraction * 60, abs=6)


def test_a_set_without_classes_names_none() -> None:
    counts = counted(PrepareConfig(), scanned_items())
    assert counts["train"].kinds == {}
    rule = split_rule(PrepareConfig(), counts["train"])
    assert rule == "0.7/0.1/0.2 by group, balanced in images, lesions, seed 0"


def test_columns_to_balance_need_a_group_file_that_holds_them(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="balance_columns needs a group_file"):
        PrepareConfig(balance_columns=("site",))
    config = PrepareConfig(
        group_file=group_table(tmp_path), group_column="patient", balance_columns=("scanner",)
    )
    with pytest.raises(DataError, match="one id and one scanner are needed"):
        counted(config, scanned_items())
