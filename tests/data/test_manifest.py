"""The manifest of a dataset that was changed or damaged, and parts that are not what it says."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.datasets import change_manifest, write_dataset

from amlp_ray.data.dataset import PatchDataset
from amlp_ray.errors import DataError

Values = dict[str, Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dataset of 14 and 6 images of 16 x 32 pixels."""
    images = np.random.default_rng(0).integers(0, 4000, (20, 1, 16, 32)).astype(np.uint16)
    masks = [None if i % 3 == 0 else np.ones((16, 32)) * (i % 2) for i in range(20)]
    write_dataset(tmp_path / "set", images, masks, split=["train"] * 14 + ["val"] * 6)
    return tmp_path / "set"


UNREADABLE = {
    "cut short": (b'{"format_version": 4', "is no valid JSON"),
    "a list": (b"[]", "must hold keys and values, not a list"),
    "null": (b"null", "must hold keys and values, not null"),
    "zeros": (bytes(100), "is no valid JSON"),
    "deep": (b"[" * 100_000, "nests more than 100 levels"),
    "given twice": (b'{"format_version": 4, "format_version": 4}', "gives the key"),
}


@pytest.mark.parametrize(("content", "problem"), UNREADABLE.values(), ids=UNREADABLE)
def test_a_file_that_is_no_manifest_is_told_with_the_reason(
    folder: Path, content: bytes, problem: str
) -> None:
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(DataError) as error:
        PatchDataset.open(folder)
    message = str(error.value)
    assert message.startswith(f"{folder}/manifest.json is not the manifest of a patch dataset")
    assert f"({problem}" in message
    assert message.endswith("; prepare the dataset again with `amlp-ray data prepare`.")


@pytest.mark.timeout(10)
def test_a_pipe_in_the_place_of_a_manifest_is_no_dataset(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    os.mkfifo(folder / "manifest.json")
    with pytest.raises(DataError, match="has no manifest"):
        PatchDataset.open(folder)


@pytest.mark.parametrize("version", [1, 3, "4", None])
def test_an_older_format_asks_to_prepare_again(folder: Path, version: object) -> None:
    change_manifest(folder, lambda values: values | {"format_version": version})
    expected = (
        rf"has format version {version}, but this amlp_ray reads 4; prepare the dataset again"
    )
    with pytest.raises(DataError, match=expected):
        PatchDataset.open(folder)


def test_a_newer_format_asks_for_an_update(folder: Path) -> None:
    change_manifest(folder, lambda values: values | {"format_version": 5, "future": True})
    expected = r"has format version 5, but this amlp_ray reads 4; update amlp_ray\.$"
    with pytest.raises(DataError, match=expected):
        PatchDataset.open(folder)


def edited(*keys: str | int, value: Any) -> Callable[[Values], Values]:
    """Return a function that sets one value inside a manifest."""

    def change(values: Values) -> Values:
        inner: Any = values
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
        return values

    return change


EDITS = {
    "mean": edited("mean", value=[1.0]),
    "counts": edited("counts", "train", "lesions", value=7),
    "dtype": edited("dtype", value="int16"),
    "height": edited("height", value=32),
    "a rule": edited("group_rule", value="patient, as the layout tells"),
    "fingerprint": edited("fingerprint", value="other"),
    "config": edited("config", "min_foreground", value=0.5),
    "no digest": lambda values: {key: values[key] for key in values if key != "sha256"},
    "a misspelt digest": lambda values: {
        key.replace("sha256", "sha255"): value for key, value in values.items()
    },
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_a_manifest_that_was_changed_by_hand_is_refused(
    folder: Path, edit: Callable[[Values], Values]
) -> None:
    file = folder / "manifest.json"
    file.write_text(json.dumps(edit(json.loads(file.read_text()))))
    with pytest.raises(DataError) as error:
        PatchDataset.open(folder)
    message = str(error.value)
    assert message.startswith((f"{file} was changed after", f"{file} has no digest of itself"))
    assert message.endswith(
        "restore it, or prepare the dataset again with `amlp-ray data prepare`."
    )


def test_another_order_of_keys_and_other_spaces_are_the_same_manifest(folder: Path) -> None:
    file = folder / "manifest.json"
    before = PatchDataset.open(folder).manifest
    file.write_text(json.dumps(json.loads(file.read_text()), sort_keys=True))
    assert PatchDataset.open(folder).manifest == before


# What nobody but the author of a dataset can do: the digest is that of the changed values.
CONTRADICTIONS = {
    "an unknown key": (edited("future", value=1), "unknown setting 'future'"),
    "an unknown dtype": (edited("dtype", value="int8"), "dtype is 'int8'"),
    "a file elsewhere": (
        edited("parts", "train", 0, "file", value="../other/part-00000.parquet"),
        "parts.train.0.file is",
    ),
    "counts of more images": (
        edited("counts", "train", "images", value=15),
        "counts of train are 15 images, but its parts hold 14",
    ),
    "no split": (
        lambda values: values | {"counts": {"train": values["counts"]["train"]}},
        "counts must be of train, val, test",
    ),
    "a negative size": (edited("height", value=-16), "height is -16"),
    "row groups of nothing": (edited("group_rows", value=0), "group_rows is 0"),
    "two means": (edited("mean", value=[1.0, 2.0]), "mean must have a number for each of 1"),
    "no spread": (edited("std", value=[0.0]), "std must be greater than 0"),
    "a mean that is no number": (edited("mean", value=[float("nan")]), "mean.0 is nan"),
}


@pytest.mark.parametrize(("edit", "problem"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_a_manifest_that_contradicts_itself_is_refused(
    folder: Path, edit: Callable[[Values], Values], problem: str
) -> None:
    change_manifest(folder, edit)
    with pytest.raises(DataError) as error:
        PatchDataset.open(folder)
    assert problem in str(error.value)
    assert "repare the dataset again" in str(error.value)


OTHER_PARTS = {
    "height and width": (
        lambda values: values | {"height": 32, "width": 16},
        "holds 1x16x32 uint16 images or other columns, but the manifest says 1x32x16 uint16",
    ),
    "smaller images": (edited("height", value=8), "but the manifest says 1x8x32 uint16"),
    "another dtype of one size": (edited("dtype", value="int16"), "says 1x16x32 int16"),
    "row groups": (edited("group_rows", value=5), "it has 1 row groups instead of 3"),
    "another footer": (
        edited("parts", "train", 0, "footer", value="0" * 64),
        "its footer is not the one that was written",
    ),
}


@pytest.mark.parametrize(("edit", "problem"), OTHER_PARTS.values(), ids=OTHER_PARTS)
@pytest.mark.parametrize(
    "read",
    [
        lambda dataset: dataset.load("train"),
        lambda dataset: dataset.load("train", np.array([3])),
        lambda dataset: dataset.table("train"),
        lambda dataset: dataset[0],
    ],
    ids=["load", "rows", "table", "sample"],
)
def test_parts_that_are_not_what_the_manifest_says_are_refused_by_every_reader(
    folder: Path,
    edit: Callable[[Values], Values],
    problem: str,
    read: Callable[[PatchDataset], Any],
) -> None:
    change_manifest(folder, edit)
    dataset = PatchDataset.open(folder)
    with pytest.raises(DataError) as error:
        read(dataset)
    assert problem in str(error.value)
    assert str(error.value).startswith(f"{folder}/train/part-00000.parquet ")


def test_parts_with_other_numbers_of_rows_are_refused(folder: Path) -> None:
    def change(values: Values) -> Values:
        values["counts"]["train"]["images"] = values["parts"]["train"][0]["rows"] = 15
        return values

    change_manifest(folder, change)
    with pytest.raises(DataError, match="is damaged: it has 14 rows instead of 15"):
        PatchDataset.open(folder).load("train")


def test_missing_and_cut_parts_are_found_when_opened(folder: Path) -> None:
    part = folder / "val" / "part-00000.parquet"
    part.write_bytes(part.read_bytes()[:-10])
    expected = r"val/part-00000\.parquet is damaged: it has \d+ bytes instead of"
    with pytest.raises(DataError, match=expected):
        PatchDataset.open(folder)
    part.unlink()
    with pytest.raises(DataError, match=r"val/part-00000\.parquet is missing"):
        PatchDataset.open(folder)


def test_no_flipped_bit_of_a_part_changes_what_is_read(folder: Path) -> None:
    part = folder / "val" / "part-00000.parquet"
    content = part.read_bytes()
    dataset = PatchDataset.open(folder)
    expected = dataset.load("val")
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    places = [*range(4, footer, 97), *range(footer, len(content), 11)]
    reported = 0
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        part.write_bytes(damaged)
        try:
            split = dataset.load("val")
        except DataError:
            reported += 1
            continue
        # a bit that no reader looks at
        assert split.ids == expected.ids
        np.testing.assert_array_equal(split.images, expected.images)
        np.testing.assert_array_equal(split.masks, expected.masks)
    assert reported > 0.9 * len(places)
