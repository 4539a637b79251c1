"""State of an unfinished preparation that was damaged: it is told, and what it said made anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.datasets import write_dataset

from amlp_ray.data.path import DataPath
from amlp_ray.data.prepare.resume import FLUSH_JOBS, PreparationState
from amlp_ray.errors import DataError

SCANS = {number: [["", [], f"digest {number}"]] for number in range(2 * FLUSH_JOBS)}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An unfinished dataset: two files of scans, and one complete part."""
    dataset = write_dataset(tmp_path / "out", np.zeros((4, 1, 8, 8), np.uint8))
    part = dataset.manifest.parts["train"][0]
    (tmp_path / "out" / "manifest.json").unlink()
    state = PreparationState(DataPath(tmp_path / "out"), "key")
    assert state.begin() == {}
    for number, result in SCANS.items():
        state.add_scans(number, result)
    state.add_part("train-00000", part.model_dump())
    return tmp_path / "out"


def resumed(out: Path) -> tuple[dict[int, Any], dict[str, Any] | None]:
    state = PreparationState(DataPath(out), "key")
    return state.begin(), state.part("train-00000")


def test_the_state_comes_back(out: Path) -> None:
    scans, part = resumed(out)
    assert scans == SCANS
    assert part is not None
    assert part["file"] == "train/part-00000.parquet"
    with pytest.raises(DataError, match="holds an unfinished dataset of other files or settings"):
        PreparationState(DataPath(out), "another key").begin()


DAMAGE = {
    "cut short": lambda content: content[:-20],
    "emptied": lambda content: b"",
    "null": lambda content: b"null",
    "no UTF-8": lambda content: b"\xff" + content,
    "a changed digit": lambda content: content.replace(b"digest 3", b"digest 4"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_images_of_a_damaged_file_are_scanned_again(
    out: Path, damage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    file = out / ".preparing" / "scanned-00000.json"
    file.write_bytes(damage(file.read_bytes()))
    scans, part = resumed(out)
    assert scans == {number: SCANS[number] for number in range(FLUSH_JOBS, 2 * FLUSH_JOBS)}
    assert part is not None
    [message] = caplog.messages
    assert message.startswith(f"{file} ")
    assert message.endswith("; its images are scanned again.")
    state = PreparationState(DataPath(out), "key")
    state.begin()
    state.add_scans(0, "anew")
    state.flush()
    assert (out / ".preparing" / "scanned-00002.json").is_file()  # no file is overwritten


def test_a_part_is_written_again_if_its_note_or_itself_is_damaged(
    out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    note = out / ".preparing" / "train-00000.json"
    content = note.read_text()
    note.write_text(content.replace('"rows": 4', '"rows": 5'))
    assert resumed(out)[1] is None
    note.write_text(content)
    part = out / "train" / "part-00000.parquet"
    part.write_bytes(part.read_bytes()[:-30] + bytes(30))
    assert resumed(out)[1] is None
    part.unlink()
    assert resumed(out)[1] is None
    assert caplog.messages == [
        f"{note} was changed after it was written: its digest does not fit; its part is written "
        f"again.",
        f"{part} is damaged; it is written again.",
        f"{part} is damaged; it is written again.",
    ]


def test_all_is_made_anew_where_nobody_knows_what_it_belongs_to(
    out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan = out / ".preparing" / "plan.json"
    plan.write_text(plan.read_text().replace("key", "kez"))
    scans, part = resumed(out)
    assert scans == {}
    assert part is None
    assert not list(out.glob("*/*.parquet"))
    assert caplog.messages == [
        f"{plan} was changed after it was written: its digest does not fit; the dataset is made "
        f"anew."
    ]
    assert resumed(out) == ({}, None)
