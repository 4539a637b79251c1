from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from amlp_ray.config import PrepareConfig
from amlp_ray.data.layouts import find_items
from amlp_ray.data.phantoms import EMPTY_SHARE, Kind, draw_phantom, is_empty, write_phantoms
from amlp_ray.errors import ConfigError

KINDS: tuple[Kind, ...] = ("ultrasound", "mri", "pet")


@pytest.mark.parametrize("kind", KINDS)
def test_lesions_cover_1_to_15_percent_and_normals_nothing(kind: Kind) -> None:
    for i in range(12):
        for size in (48, 96):
            lesion = not is_empty(i, EMPTY_SHARE)
            image, mask = draw_phantom(kind, size, np.random.default_rng([0, i]), lesion=lesion)
            assert image.shape == mask.shape == (size, size)
            assert image.dtype == mask.dtype == np.uint8
            assert 0.01 <= mask.mean() <= 0.15 if lesion else not mask.any()


@pytest.mark.parametrize(("kind", "sign"), [("ultrasound", -1), ("mri", 1), ("pet", 1)])
def test_lesions_are_dark_in_ultrasound_and_bright_elsewhere(kind: Kind, sign: int) -> None:
    for i in range(1, 6):
        image, mask = draw_phantom(kind, 96, np.random.default_rng([0, i]), lesion=True)
        inside = image[mask == 1].mean()
        rows = np.flatnonzero(mask.any(axis=1))
        beside = image[rows][mask[rows] == 0]
        assert sign * (inside - beside.mean()) > 20


def test_ultrasound_darkens_with_depth_and_mri_has_a_black_border() -> None:
    deep, shallow, border = [], [], []
    for i in range(6):
        image, _ = draw_phantom("ultrasound", 96, np.random.default_rng([0, i]), lesion=False)
        shallow.append(image[30:50].mean())
        deep.append(image[-12:].mean())
        border.append(
            draw_phantom("mri", 96, np.random.default_rng([0, i]), lesion=False)[0][:3].mean()
        )
    assert np.mean(deep) < np.mean(shallow) - 30
    assert max(border) < 5


@pytest.mark.parametrize("kind", KINDS)
def test_written_folder_is_a_paired_set_that_repeats(kind: Kind, tmp_path: Path) -> None:
    few = write_phantoms(tmp_path / "few", kind=kind, count=4, size=40, seed=3)
    many = write_phantoms(tmp_path / "many", kind=kind, count=7, size=40, seed=3)
    other = write_phantoms(tmp_path / "other", kind=kind, count=1, size=40, seed=4)
    items = find_items(PrepareConfig(layout="paired"), few).items
    assert [len(item.masks) for item in items] == [1] * 4
    for item in items:
        assert Path(item.images[0]).read_bytes() == (many / item.source).read_bytes()
    assert Path(items[0].images[0]).read_bytes() != (other / items[0].source).read_bytes()
    with Image.open(items[1].masks[0]) as mask:
        assert set(np.unique(np.asarray(mask))) == {0, 255}


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.5, 0.65, 1.0])
def test_any_beginning_of_a_set_has_its_share_without_a_lesion(share: float) -> None:
    empty = np.cumsum([is_empty(i, share) for i in range(500)])
    np.testing.assert_array_less(np.abs(empty - share * np.arange(1, 501)), 1 + 1e-9)


def test_a_sixth_is_without_a_lesion_unless_a_share_is_given(tmp_path: Path) -> None:
    def empty_images(folder: Path) -> list[int]:
        paths = sorted((folder / "masks").iterdir())
        return [i for i, path in enumerate(paths) if not np.asarray(Image.open(path)).any()]

    assert empty_images(write_phantoms(tmp_path / "a", count=14, size=32)) == [0, 6, 12]
    half = write_phantoms(tmp_path / "b", count=6, size=32, empty_share=0.5)
    assert empty_images(half) == [0, 2, 4]
    # The share changes which images have a lesion, and no other image.
    for i in (1, 3, 5):
        name = f"images/ultrasound_{i:05d}.png"
        assert (half / name).read_bytes() == (tmp_path / "a" / name).read_bytes()


def test_wrong_requests_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="kind 'ct'; known are ultrasound, mri, pet"):
        write_phantoms(tmp_path, kind="ct", count=1)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="not 0 and 128"):
        write_phantoms(tmp_path, count=0)
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(ConfigError, match=f"from 0 to 1, not {share}"):
            write_phantoms(tmp_path / "none", count=1, empty_share=share)
    assert not (tmp_path / "none").exists()
