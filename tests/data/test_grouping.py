from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import amlp_ray.data.grouping as grouping
from amlp_ray.data.dataset import SPLITS
from amlp_ray.data.grouping import near_duplicate_groups, read_group_file
from amlp_ray.data.splitting import groups_cut, read_split_file, split_by_group
from amlp_ray.errors import DataError


def test_near_copies_are_chained_into_groups_named_after_their_first(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 48 * 48))
    flat = np.full(48 * 48, 7.0)
    near = a + 0.4 * rng.normal(size=a.shape)  # correlates 0.93 with a
    far = near + 0.45 * rng.normal(size=a.shape)  # with near, but not with a
    thumbnails = np.stack([b, a, flat, far, 2 * b + 5, near, flat])
    assert np.corrcoef(a, far)[0, 1] < 0.90 < np.corrcoef(near, far)[0, 1]
    ids = ["b", "a", "flat", "far", "b2", "near", "flat2"]
    expected = ["b", "a", "flat", "a", "b", "a", "flat2"]
    assert near_duplicate_groups(ids, thumbnails) == expected
    monkeypatch.setattr(grouping, "CHUNK_VALUES", 14)  # two rows at a time
    assert near_duplicate_groups(ids, thumbnails) == expected


fractions = st.tuples(st.integers(1, 10), st.integers(0, 5), st.integers(0, 5)).map(
    lambda parts: tuple(part / sum(parts) for part in parts)
)


@given(
    members=st.lists(st.tuples(st.integers(0, 30), st.sampled_from("xyz")), min_size=1, max_size=150),
    fractions=fractions,
    seed=st.integers(0, 5),
)
def test_no_group_is_ever_cut(members: list[tuple[int, str]], fractions: tuple[float, float, float], seed: int) -> None:
    groups = [str(group) for group, _ in members]
    strata = [stratum for _, stratum in members]
    try:
        splits = split_by_group(groups, strata, fractions, seed)
    except DataError:
        largest = Counter(groups).most_common(1)[0][1]
        assert largest * 2 > len(groups) or len(groups) * fractions[0] < largest
        return
    assert splits == split_by_group(groups, strata, fractions, seed)
    assert not groups_cut(dict(enumerate(splits)), dict(enumerate(groups)))
    largest = Counter(groups).most_common(1)[0][1]
    for split, fraction in zip(SPLITS, fractions, strict=True):
        found = splits.count(split)
        assert found == 0 or fraction > 0
        assert abs(found - fraction * len(groups)) <= 2 * largest


def test_fractions_are_met_within_each_class() -> None:
    groups = [str(i) for i in range(200)]
    strata = ["benign"] * 120 + ["malignant"] * 80
    splits = split_by_group(groups, strata, (0.7, 0.1, 0.2), seed=3)
    assert Counter(splits[:120]) == {"train": 84, "val": 12, "test": 24}
    assert Counter(splits[120:]) == {"train": 56, "val": 8, "test": 16}
    assert splits != split_by_group(groups, strata, (0.7, 0.1, 0.2), seed=4)


def test_a_group_of_nearly_everything_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(DataError, match=r"'slice' holds 9 of 10 images .* set group_by to image"):
        split_by_group(["slice"] * 9 + ["other"], ["x"] * 10, (0.7, 0.1, 0.2), seed=0)


def _csv(path: Path, lines: list[list[str]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(lines)
    return path


def test_group_file_may_hold_more_columns_and_ids(tmp_path: Path) -> None:
    path = _csv(tmp_path / "g.csv", [["class", "id", "group"], ["b", "x (1)", "7"], ["b", "y", "7"], ["b", "z", "8"]])
    assert read_group_file(path, ["y", "x (1)"]) == ["7", "7"]


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ([["name", "group"], ["x", "1"]], r"g\.csv has the columns name, group, but id and group are needed"),
        ([], r"g\.csv has the columns none"),
        ([["id", "group"], ["y", "1"]], r"g\.csv has no group for 1 of 1 images, such as 'x'"),
        ([["id", "group"], ["x", "1"], ["x", "2"]], r"g\.csv gives 'x' two groups"),
        ([["id", "group"], ["x"]], r"g\.csv line 2 lacks an id or a group"),
    ],
)
def test_wrong_group_file_is_named(lines: list[list[str]], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=sentence):
        read_group_file(_csv(tmp_path / "g.csv", lines), ["x"])


def test_missing_group_and_split_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no group file .*gone\.csv"):
        read_group_file(tmp_path / "gone.csv", ["x"])
    with pytest.raises(DataError, match=r"no split file .*gone\.json"):
        read_split_file(tmp_path / "gone.json", ["x"])


def test_split_file_names_the_split_of_listed_ids(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    path.write_text(json.dumps({"train": ["x"], "test": ["y"]}))
    assert read_split_file(path, ["x", "y", "z"]) == {"x": "train", "y": "test"}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", r"s\.json is not valid JSON"),
        ("[1]", r"s\.json must hold \{\"train\""),
        ('{"train": "x"}', r"s\.json must hold \{\"train\""),
        ('{"train": ["x"], "dev": ["y"]}', r"s\.json has a split named 'dev'"),
        ('{"val": ["x"]}', r"s\.json lists no images for train"),
        ('{"train": ["x"], "val": ["x"]}', r"s\.json lists 'x' in train and in val"),
        ('{"train": ["x", "q.png"]}', r"s\.json lists 1 images that the source does not have, such as 'q\.png'"),
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
    groups = read_group_file(real_data / name / "groups.csv", list(split_of))
    assert not groups_cut(split_of, dict(zip(split_of, groups, strict=True)))
