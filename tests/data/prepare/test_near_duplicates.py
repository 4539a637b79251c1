from __future__ import annotations

import csv
import io
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import amlp_ray.data.prepare.near_duplicates as grouping
from amlp_ray.data.prepare.near_duplicates import (
    FLAT,
    MAX_DISTANCE,
    find_chains,
    near_pairs,
    perceptual_hash,
    read_group_file,
)
from amlp_ray.data.prepare.splits import find_cut_groups, read_split_file
from amlp_ray.errors import DataError


def near_duplicate_groups(
    ids: Sequence[str], hashes: np.ndarray, *, distance: int = MAX_DISTANCE
) -> list[str]:
    """The first name of each chain, in the order of `ids`."""
    return [ids[first] for first in find_chains(hashes, distance)]


def tissue(seed: int, height: int = 120, width: int = 150) -> np.ndarray:
    """A smooth gray image (H, W) uint8 that looks like no other."""
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 11), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def bits(a: int, b: int) -> int:
    return (a ^ b).bit_count()


def jpeg(image: np.ndarray) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=40)
    return np.asarray(Image.open(file))


@pytest.mark.parametrize(
    "changed",
    [
        lambda image: image // 2 + 40,
        jpeg,
        lambda image: np.asarray(Image.fromarray(image).resize((75, 60), Image.Resampling.BICUBIC)),
        lambda image: np.asarray(Image.fromarray(image).resize((96, 96), Image.Resampling.BICUBIC)),
        lambda image: image.astype(np.uint16) * 200 + 500,
        lambda image: image.astype(np.int16) * 20 - 1000,
        lambda image: image.astype(np.float32) / 255,
    ],
    ids=["darker", "jpeg", "smaller", "square", "uint16", "int16", "float32"],
)
@pytest.mark.parametrize("seed", range(8))
def test_a_hash_survives_what_a_copy_goes_through(
    changed: Callable[[np.ndarray], np.ndarray], seed: int
) -> None:
    image = tissue(seed)
    assert (
        bits(perceptual_hash(image[..., None]), perceptual_hash(changed(image)[..., None]))
        <= MAX_DISTANCE - 2
    )


def test_different_images_have_distant_hashes() -> None:
    hashes = np.array([perceptual_hash(tissue(seed)[..., None]) for seed in range(150)], np.uint64)
    assert not list(near_pairs(hashes, MAX_DISTANCE))
    assert len(set(near_duplicate_groups([str(i) for i in range(150)], hashes))) == 150


def test_gray_and_color_of_the_same_gray_have_one_hash() -> None:
    image = tissue(3)
    gray = perceptual_hash(image[..., None])
    assert perceptual_hash(np.stack([image] * 3, axis=2)) == gray
    assert bits(perceptual_hash(np.stack([image] * 2, axis=2)), gray) <= 2
    assert 0 <= gray < 2**64


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_a_constant_image_has_the_hash_that_is_linked_to_nothing(dtype: str, channels: int) -> None:
    assert perceptual_hash(np.full((30, 40, channels), 7, dtype)) == FLAT
    assert near_duplicate_groups(["a", "b"], np.array([FLAT, FLAT], np.uint64)) == ["a", "b"]


def test_what_is_no_number_does_not_break_a_hash() -> None:
    image = (tissue(1) / 255).astype(np.float32)[..., None]
    holed = image.copy()
    holed[5:9, 5:9] = np.nan
    assert bits(perceptual_hash(image), perceptual_hash(holed)) <= MAX_DISTANCE
    assert perceptual_hash(np.full((20, 20, 1), np.nan, np.float32)) == FLAT


def test_near_copies_are_chained_into_groups_named_after_their_first() -> None:
    near = 0b11111111  # 8 bits from zero bits
    far = 0b11111111111100  # 8 from near, 12 from the first
    first, other = 1 << 63, 0xF0F0F0F0F0F0F0F0
    hashes = np.array([other, first, FLAT, first ^ far, other, first ^ near, FLAT], np.uint64)
    ids = ["b", "a", "flat", "far", "b2", "near", "flat2"]
    assert (bits(near, far), bits(0, far)) == (8, 12)
    assert near_duplicate_groups(ids, hashes, distance=8) == [
        "b",
        "a",
        "flat",
        "a",
        "b",
        "a",
        "flat2",
    ]
    assert near_duplicate_groups(ids, hashes, distance=6) == [
        "b",
        "a",
        "flat",
        "far",
        "b",
        "near",
        "flat2",
    ]
    assert near_duplicate_groups([], np.zeros(0, np.uint64)) == []


def brute_pairs(left: np.ndarray, right: np.ndarray, distance: int) -> set[tuple[int, int]]:
    near = np.bitwise_count(left[:, None] ^ right[None]) <= distance
    near &= (left != FLAT)[:, None] & (right != FLAT)[None]
    return set(zip(*(axis.tolist() for axis in np.nonzero(near)), strict=True))


def some_hashes(count: int, seed: int = 0, centers: int = 40, flips: int = 5) -> np.ndarray:
    """Hashes around few centers, so that many are near, with some flat ones and some equal ones."""
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 2**64, centers, dtype=np.uint64)[rng.integers(0, centers, count)]
    for _ in range(flips):
        hashes ^= np.uint64(1) << rng.integers(0, 64, count).astype(np.uint64)
    hashes[rng.integers(0, count, count // 20)] = FLAT
    return hashes


@pytest.mark.parametrize("distance", [0, 2, 8, 15, 16, 30])
def test_pairs_are_those_of_all_comparisons_each_once(
    distance: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashes, other = some_hashes(400), some_hashes(300, seed=0, flips=3)
    for block in (grouping.BLOCK_PAIRS, 1000):
        monkeypatch.setattr(grouping, "BLOCK_PAIRS", block)
        pairs = [
            pair
            for a, b in near_pairs(hashes, distance)
            for pair in zip(a.tolist(), b.tolist(), strict=True)
        ]
        assert len(pairs) == len(set(pairs))
        assert set(pairs) == {(a, b) for a, b in brute_pairs(hashes, hashes, distance) if a < b}
        between = [
            p
            for a, b in near_pairs(hashes, distance, other)
            for p in zip(a.tolist(), b.tolist(), strict=True)
        ]
        assert len(between) == len(set(between))
        assert set(between) == brute_pairs(hashes, other, distance)


def test_bands_and_all_comparisons_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    hashes = np.concatenate([rng.integers(0, 2**64, 3000, dtype=np.uint64), some_hashes(300)])
    assert len(grouping._bands(hashes, hashes, 8)) == 9
    banded = grouping.find_chains(hashes)
    monkeypatch.setattr(grouping, "_bands", lambda *_: [np.uint64(0)])
    monkeypatch.setattr(grouping, "MERGE_PAIRS", 10)
    assert np.array_equal(grouping.find_chains(hashes), banded)


def test_a_hundred_thousand_hashes_take_seconds() -> None:
    hashes = np.random.default_rng(0).integers(0, 2**64, 100_000, dtype=np.uint64)
    hashes[50_000:50_100] = hashes[:100] ^ np.uint64(0b10110)
    start = time.process_time()
    first = grouping.find_chains(hashes)
    assert time.process_time() - start < 30  # measured: 3; all with all: 15
    assert np.array_equal(first[50_000:50_100], first[:100])
    assert 99_800 < len(np.unique(first)) <= 99_900  # 1.4 links by chance


def _csv(path: Path, lines: list[list[str]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(lines)
    return path


def test_group_file_may_hold_more_columns_and_ids(tmp_path: Path) -> None:
    path = _csv(
        tmp_path / "g.csv",
        [["class", "id", "group"], ["b", "x (1)", "7"], ["b", "y", "7"], ["b", "z", "8"]],
    )
    assert read_group_file(path) == {"x (1)": "7", "y": "7", "z": "8"}


def test_space_around_a_group_makes_no_other_group(tmp_path: Path) -> None:
    path = _csv(tmp_path / "g.csv", [["id", "group"], [" x", "g0 "], ["y", "g0"]])
    assert read_group_file(path) == {"x": "g0", "y": "g0"}


def test_a_group_file_may_name_its_column(tmp_path: Path) -> None:
    path = _csv(
        tmp_path / "g.csv", [["id", "group", "patient"], ["x", "1", "P7"], ["y", "2", "P7"]]
    )
    assert read_group_file(path, "patient") == {"x": "P7", "y": "P7"}
    with pytest.raises(
        DataError,
        match=r"columns id, group, patient, but one id and one study are needed; .*group_column",
    ):
        read_group_file(path, "study")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_group_file_of_windows_is_read(encoding: str, separator: str, tmp_path: Path) -> None:
    lines = ["id,group,size", "Müller,1,'3'", '"a, b; c",2,4']
    text = "\r\n".join(line.replace(",", separator) for line in lines[:2])
    path = tmp_path / "g.csv"
    path.write_bytes(
        f"{text}\r\n{lines[2].replace(',2,', f'{separator}2{separator}')}".encode(encoding)
    )
    assert read_group_file(path) == {"Müller": "1", "a, b; c": "2"}


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        (
            [["name", "group"], ["x", "1"]],
            r"g\.csv has the columns name, group, but one id and one group are needed",
        ),
        ([], r"g\.csv has the columns none"),
        (
            [["id", "group", "group"], ["x", "1", "2"]],
            r"columns id, group, group, but one id and one group",
        ),
        ([["id", "group"], ["x", "1"], ["x", "2"]], r"g\.csv gives 'x' two groups"),
        ([["id", "group"], ["x"]], r"g\.csv line 2 lacks an id or a group"),
    ],
)
def test_wrong_group_file_is_named(lines: list[list[str]], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=sentence):
        read_group_file(_csv(tmp_path / "g.csv", lines))


def test_missing_group_and_split_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no group file .*gone\.csv"):
        read_group_file(tmp_path / "gone.csv")
    with pytest.raises(DataError, match=r"no split file .*gone\.json"):
        read_split_file(tmp_path / "gone.json", ["x"])


def test_split_file_names_the_split_of_listed_ids(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    path.write_text(json.dumps({"train": ["x"], "test": ["y"]}))
    assert read_split_file(path, ["x", "y", "z"]) == {"x": "train", "y": "test"}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_split_file_of_windows_is_read(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    path.write_text(json.dumps({"train": ["x"], "test": ["y"]}), encoding=encoding)
    assert read_split_file(path, ["x", "y"]) == {"x": "train", "y": "test"}


def test_a_split_file_that_is_nested_without_end_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    path.write_text("[" * 200_000)
    with pytest.raises(DataError, match="nests more than 100 levels"):
        read_split_file(path, ["x"])


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", r"s\.json is no valid JSON"),
        ("[1]", r"s\.json must hold \{\"train\""),
        ('{"train": "x"}', r"s\.json must hold \{\"train\""),
        ('{"train": ["x"], "dev": ["y"]}', r"s\.json has a split named 'dev'"),
        ('{"val": ["x"]}', r"s\.json lists no images for train"),
        ('{"train": ["x"], "val": ["x"]}', r"s\.json lists 'x' in train and in val"),
        (
            '{"train": ["x", "q.png"]}',
            r"s\.json lists 1 image that the source does not have, such as 'q\.png'",
        ),
    ],
)
def test_wrong_split_file_is_named(content: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text(content)
    with pytest.raises(DataError, match=sentence):
        read_split_file(tmp_path / "s.json", ["x", "y"])


@pytest.mark.real
@pytest.mark.parametrize("name", ["busi", "busi_large"])
def test_shared_splits_cut_no_shared_group(name: str, real_data: Path) -> None:
    split_of = {
        image: split
        for split, ids in json.loads((real_data / "splits" / f"{name}.json").read_text()).items()
        for image in ids
    }
    named = read_group_file(real_data / name / "groups.csv")
    assert not find_cut_groups(split_of, {image: named[image] for image in split_of})


@pytest.mark.real
def test_near_copies_of_real_ultrasound_are_those_that_thumbnails_show(real_data: Path) -> None:
    named = read_group_file(real_data / "busi_large" / "groups.csv")
    ids, groups = list(named), list(named.values())
    folder = real_data / "busi_large" / "Dataset_BUSI_with_GT"
    files = [folder / name.split()[0] / f"{name}.png" for name in ids]
    hashes = np.array(
        [perceptual_hash(np.asarray(Image.open(file).convert("RGB"))) for file in files], np.uint64
    )
    pairs = [
        pair
        for a, b in near_pairs(hashes, MAX_DISTANCE)
        for pair in zip(a.tolist(), b.tolist(), strict=True)
    ]
    agreeing = sum(groups[a] == groups[b] for a, b in pairs)
    assert len(pairs) == 106
    assert agreeing == 105  # and the one beyond is a copy that was shifted
    assert Counter(near_duplicate_groups(ids, hashes)).most_common(1)[0][1] == 4
