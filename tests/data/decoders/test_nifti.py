from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from helpers.volumes import turned, write_nifti

from amlp_ray.config import PrepareConfig
from amlp_ray.data.decoders.frame import Frame
from amlp_ray.data.decoders.nifti import read_nifti
from amlp_ray.data.layouts.decathlon import find_decathlon
from amlp_ray.data.layouts.item import Listing, SourceImage
from amlp_ray.data.layouts.nifti import find_nifti
from amlp_ray.data.path import DataPath, read_bytes
from amlp_ray.errors import DataError

KEEP = PrepareConfig()
SHARED = {
    "t1/t1w": "t1/t1w_seg-manual",
    "t2/t2": "t2/t2_seg-manual",
    "t2s/t2s": "t2s/t2s_gmseg_manual",
    "example4d/example4d": None,
}
AFFINE = np.array([[2.0, 0, 0, -9], [0, 3, 0, 5], [0, 0, 4, 7], [0, 0, 0, 1]])


def item_of(*images: Path, masks: tuple[Path, ...] = ()) -> SourceImage:
    return SourceImage("i", "nifti", tuple(map(str, images)), tuple(map(str, masks)), "i")


def frames_of(item: SourceImage, **config: Any) -> list[Frame]:
    return list(read_nifti(item, PrepareConfig(**config), read_bytes))


def volume_of(item: SourceImage, **config: Any) -> np.ndarray:
    """All slices, (slices, H, W, C)."""
    return np.stack([frame.image for frame in frames_of(item, **config)])


def touch(folder: Path, *names: str) -> DataPath:
    """Empty files: listing opens none."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return DataPath(folder)


def table(listing: Listing, folder: Path) -> dict[str, tuple[list[str], list[str], str]]:
    """Items as id -> (images, masks, group), with relative names."""

    def names(paths: tuple[str, ...]) -> list[str]:
        return [Path(path).relative_to(folder).as_posix() for path in paths]

    return {item.id: (names(item.images), names(item.masks), item.group) for item in listing.items}


def looked_up(path: Path, axis: str) -> np.ndarray:
    """Return slices (slices, H, W, C) of a file, looked up voxel by voxel.

    Each pixel asks the affine where in the file its place in space is. The code under test turns
    arrays instead.
    """
    image = nib.load(path)
    data = np.asanyarray(image.dataobj)
    data = data.reshape(*data.shape[:3], -1)
    # Which file axis runs along left-right, posterior-anterior, inferior-superior, and which way.
    codes = nib.aff2axcodes(image.affine)
    along = [next(i for i, code in enumerate(codes) if code in pair) for pair in ("LR", "PA", "IS")]
    rising = [codes[i] == up for i, up in zip(along, "RAS", strict=True)]

    def voxel(right: int, front: int, top: int) -> np.ndarray:
        index = [0, 0, 0]
        for position, axis_of_file, up in zip((right, front, top), along, rising, strict=True):
            index[axis_of_file] = position if up else data.shape[axis_of_file] - 1 - position
        return data[tuple(index)]

    x, y, z = (data.shape[i] for i in along)
    picture: Callable[[int, int, int], np.ndarray]
    if axis == "axial":
        shape, picture = (z, y, x), lambda s, r, c: voxel(c, y - 1 - r, s)
    elif axis == "coronal":
        shape, picture = (y, z, x), lambda s, r, c: voxel(c, s, z - 1 - r)
    else:
        shape, picture = (x, z, y), lambda s, r, c: voxel(s, c, z - 1 - r)
    out = np.empty((*shape, data.shape[3]), data.dtype)
    for index in np.ndindex(shape):
        out[index] = picture(*index)
    return out


@pytest.mark.parametrize("axis", ["axial", "coronal", "sagittal"])
@pytest.mark.parametrize("name", SHARED)
def test_shared_volumes_and_labels_are_read_voxel_by_voxel(
    name: str, axis: str, real_data: Path
) -> None:
    folder = real_data / "nifti"
    path, label = folder / f"{name}.nii.gz", SHARED[name]
    masks = (folder / f"{label}.nii.gz",) if label else ()
    frames = frames_of(item_of(path, masks=masks), axis=axis)
    np.testing.assert_array_equal(
        np.stack([frame.image for frame in frames]), looked_up(path, axis)
    )
    assert frames[0].image.dtype == nib.load(path).get_data_dtype()
    if label:
        want = looked_up(masks[0], axis)[..., 0] > 0
        assert want.any()
        np.testing.assert_array_equal(np.stack([frame.mask for frame in frames]), want)
    else:
        assert frames[0].mask is None


def test_shared_folder_is_listed_with_its_labels(real_data: Path) -> None:
    folder = real_data / "nifti"
    listing = find_nifti(DataPath(folder), KEEP)
    masks_of = {images[0]: masks for images, masks, _ in table(listing, folder).values()}
    assert masks_of == {
        f"{image}.nii.gz": [f"{label}.nii.gz"] if label else [] for image, label in SHARED.items()
    }
    assert listing.rejected == []


@pytest.mark.parametrize("codes", ["RAS", "LAS", "LPS", "PSR", "IAL", "SRP"])
@pytest.mark.parametrize("axis", ["axial", "coronal", "sagittal"])
def test_slices_do_not_depend_on_how_axes_are_stored(codes: str, axis: str, tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(-99, 99, (4, 5, 6)).astype(np.int16)
    labels = (values > 50).astype(np.uint8)
    image = write_nifti(tmp_path / "i.nii.gz", *turned(values, AFFINE, codes))
    label = write_nifti(tmp_path / "i_seg.nii.gz", *turned(labels, AFFINE, codes))
    frames = frames_of(item_of(image, masks=(label,)), axis=axis)
    # Left to right is x, back to front y, up z: rows run from the front, or from the top.
    pictures = {
        "axial": (values[:, ::-1].transpose(2, 1, 0), (3.0, 2.0)),
        "coronal": (values[:, :, ::-1].transpose(1, 2, 0), (4.0, 2.0)),
        "sagittal": (values[:, :, ::-1].transpose(0, 2, 1), (4.0, 3.0)),
    }
    want, spacing = pictures[axis]
    np.testing.assert_array_equal(np.stack([frame.image[..., 0] for frame in frames]), want)
    np.testing.assert_array_equal(np.stack([frame.mask for frame in frames]), want > 50)
    assert {frame.spacing for frame in frames} == {spacing}
    assert [frame.number for frame in frames] == list(range(len(want)))


@pytest.mark.parametrize(
    ("stored", "header", "dtype"),
    [
        (np.uint8, {}, "uint8"),
        (np.int16, {}, "int16"),
        (np.uint16, {}, "uint16"),
        (np.int8, {}, "uint8"),
        (np.int32, {}, "uint8"),
        (np.float32, {}, "float32"),
        (np.float64, {}, "float32"),
        (np.int16, {"scl_slope": 0.5, "scl_inter": -3.0}, "float32"),
        (">i2", {}, "int16"),
    ],
)
def test_type_is_that_of_the_file_or_the_smallest_that_is_exact(
    stored: Any, header: dict[str, float], dtype: str, tmp_path: Path
) -> None:
    values = np.random.default_rng(1).integers(0, 100, (4, 5, 6)).astype(stored)
    if str(stored) == ">i2":
        header_there = nib.Nifti1Header(endianness=">")
        header_there.set_data_dtype(values.dtype)
        image = nib.Nifti1Image(values, np.eye(4), header_there)
        nib.save(image, tmp_path / "i.nii")
    else:
        write_nifti(tmp_path / "i.nii", values, **header)
    actual = volume_of(item_of(tmp_path / "i.nii"))[..., 0]
    want = nib.load(tmp_path / "i.nii").get_fdata()[:, ::-1].transpose(2, 1, 0)
    assert actual.dtype == dtype
    np.testing.assert_array_equal(actual, want)


def test_wide_whole_numbers_become_float32_and_mixed_types_a_common_one(tmp_path: Path) -> None:
    wide = write_nifti(tmp_path / "wide.nii", np.array([[[0, 70000]]], np.int32))
    assert volume_of(item_of(wide)).dtype == np.float32
    kinds = {
        kind: write_nifti(tmp_path / f"{kind}.nii", np.ones((1, 1, 2), kind))
        for kind in ("uint8", "uint16", "int16")
    }
    assert volume_of(item_of(kinds["uint8"], kinds["int16"])).dtype == np.int16
    assert volume_of(item_of(kinds["uint8"], kinds["uint16"])).dtype == np.uint16
    assert volume_of(item_of(kinds["uint16"], kinds["int16"])).dtype == np.float32


def test_modalities_and_fourth_axis_are_channels_in_order(tmp_path: Path) -> None:
    values = np.random.default_rng(2).integers(0, 100, (3, 4, 5, 2)).astype(np.uint8)
    first = write_nifti(tmp_path / "a.nii.gz", values, AFFINE)
    second = write_nifti(tmp_path / "b.nii.gz", values[..., 0] + 100, AFFINE)
    actual = volume_of(item_of(first, second))
    want = np.concatenate([values, values[..., :1] + 100], axis=3)
    np.testing.assert_array_equal(actual, want[:, ::-1].transpose(2, 1, 0, 3))


def test_window_and_percentiles_give_bytes(tmp_path: Path) -> None:
    values = np.random.default_rng(3).integers(1, 1000, (4, 5, 6, 2)).astype(np.int16)
    values[:2] = -1000
    path = write_nifti(tmp_path / "i.nii.gz", values)
    turn = values[:, ::-1].transpose(2, 1, 0, 3).astype(float)
    actual = volume_of(item_of(path), values="window", window=(-160, 240))
    assert actual.dtype == np.uint8
    np.testing.assert_array_equal(actual, np.rint(np.clip((turn + 160) / 400, 0, 1) * 255))
    actual = volume_of(item_of(path), values="percentile")
    for c in range(2):
        low, high = np.percentile(values[2:, ..., c], (0.5, 99.5))
        want = np.rint(np.clip((turn[..., c] - low) / (high - low), 0, 1) * 255)
        np.testing.assert_array_equal(actual[..., c], want)
    flat = write_nifti(tmp_path / "flat.nii", np.full((2, 2, 2), 7, np.int16))
    assert not volume_of(item_of(flat), values="percentile").any()


def test_labels_of_several_files_are_united_and_may_be_floats(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    image = write_nifti(tmp_path / "i.nii", rng.random((4, 5, 6)).astype(np.float32))
    one, two = (rng.integers(0, 3, (4, 5, 6)) for _ in range(2))
    masks = (
        write_nifti(tmp_path / "one.nii", one.astype(np.float32)),
        write_nifti(tmp_path / "two.nii.gz", two.astype(np.uint8)[..., None]),
    )
    frames = frames_of(item_of(image, masks=masks))
    want = ((one > 0) | (two > 0))[:, ::-1].transpose(2, 1, 0)
    np.testing.assert_array_equal(np.stack([frame.mask for frame in frames]), want)
    frames = frames_of(item_of(image, masks=masks), lesion_labels=(2,))
    want = ((one == 2) | (two == 2))[:, ::-1].transpose(2, 1, 0)
    np.testing.assert_array_equal(np.stack([frame.mask for frame in frames]), want)
    assert not any(frame.notes for frame in frames)
    frames = frames_of(item_of(image, masks=masks[:1]), lesion_labels=(9,))
    assert "lesion_labels are 9" in frames[0].notes[0]
    assert not np.stack([frame.mask for frame in frames]).any()


def test_names_of_zipped_files_do_not_matter(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "a.nii", np.ones((2, 3, 4), np.uint8))
    content = path.read_bytes()
    (tmp_path / "b.nii").write_bytes(gzip.compress(content))
    (tmp_path / "c.nii.gz").write_bytes(content)
    assert (
        volume_of(item_of(tmp_path / "b.nii")).shape
        == volume_of(item_of(tmp_path / "c.nii.gz")).shape
        == (4, 3, 2, 1)
    )


def test_meters_become_millimeters_and_nifti2_is_read(tmp_path: Path) -> None:
    image = nib.Nifti2Image(np.ones((2, 3, 4), np.uint8), np.diag([0.001, 0.002, 0.003, 1]))
    image.header.set_xyzt_units("meter")
    nib.save(image, tmp_path / "i.nii")
    assert frames_of(item_of(tmp_path / "i.nii"))[0].spacing == pytest.approx((2, 1))


def test_volumes_in_an_object_store_are_read_like_those_here(
    s3_bucket: str, tmp_path: Path
) -> None:
    remote_folder = DataPath(s3_bucket) / "nifti"
    values = np.random.default_rng(5).integers(0, 9, (4, 5, 6)).astype(np.uint8)
    for name, stored in (
        ("imagesTr/a_0000", values),
        ("imagesTr/a_0001", values + 1),
        ("labelsTr/a", values),
    ):
        path = write_nifti(tmp_path / f"{name}.nii.gz", stored)
        target = remote_folder / f"{name}.nii.gz"
        with target.filesystem.open_output_stream(
            target.path, compression=None
        ) as file:  # else zipped once more
            file.write(path.read_bytes())
    (item,) = find_nifti(remote_folder, KEEP).items
    (local,) = find_nifti(DataPath(tmp_path), KEEP).items
    np.testing.assert_array_equal(volume_of(item), volume_of(local))
    np.testing.assert_array_equal(
        [f.mask for f in frames_of(item)], [f.mask for f in frames_of(local)]
    )


# Bad files


def _broken_gz(folder: Path) -> SourceImage:
    path = write_nifti(folder / "bad.nii.gz", np.random.default_rng(0).random((8, 8, 8)))
    path.write_bytes(path.read_bytes()[:-500])
    return item_of(path)


def _not_gz(folder: Path) -> SourceImage:
    (folder / "bad.nii.gz").write_bytes(b"\x1f\x8bgarbage that is no deflate stream")
    return item_of(folder / "bad.nii.gz")


def _short(folder: Path) -> SourceImage:
    path = write_nifti(folder / "bad.nii", np.ones((8, 8, 8), np.uint8))
    path.write_bytes(path.read_bytes()[:-10])
    return item_of(path)


def _text(folder: Path) -> SourceImage:
    (folder / "bad.nii").write_text("version https://git-lfs\n" * 40)
    return item_of(folder / "bad.nii")


def _image(values: np.ndarray, **header: Any) -> Callable[[Path], SourceImage]:
    return lambda folder: item_of(write_nifti(folder / "bad.nii.gz", values, **header))


def _label(
    image: np.ndarray, label: np.ndarray, affine: np.ndarray | None = None
) -> Callable[[Path], SourceImage]:
    def make(folder: Path) -> SourceImage:
        path = write_nifti(folder / "i.nii.gz", image)
        return item_of(path, masks=(write_nifti(folder / "bad.nii.gz", label, affine),))

    return make


def _modality(folder: Path) -> SourceImage:
    first = write_nifti(folder / "a.nii.gz", np.ones((2, 3, 4), np.uint8))
    return item_of(first, write_nifti(folder / "bad.nii.gz", np.ones((2, 3, 5), np.uint8)))


def _damaged_header(folder: Path) -> SourceImage:
    path = write_nifti(folder / "bad.nii", np.ones((2, 3, 4), np.uint8))
    content = bytearray(path.read_bytes())
    content[70:72] = b"\xff\x7f"  # the number of the data type
    path.write_bytes(bytes(content))
    return item_of(path)


def _no_affine(folder: Path) -> SourceImage:
    image = nib.Nifti1Image(np.ones((2, 3, 4), np.uint8), None)
    image.set_sform(np.diag([1.0, 0, 0, 1]), 1)
    nib.save(image, folder / "bad.nii")
    return item_of(folder / "bad.nii")


NAN = np.where(np.arange(24).reshape(2, 3, 4) == 5, np.nan, 1)
RGB = np.zeros((2, 3, 4), [("R", "u1"), ("G", "u1"), ("B", "u1")])


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (_broken_gz, r"bad\.nii\.gz cannot be unzipped \(.*end-of-stream"),
        (_not_gz, r"bad\.nii\.gz cannot be unzipped"),
        (_short, r"bad\.nii ends too early \(502 bytes of values where its header claims 512\)"),
        (_text, r"bad\.nii does not begin as NIfTI files do"),
        (lambda folder: item_of(folder / "bad.nii"), r"bad\.nii cannot be read \(No such file"),
        (_damaged_header, r"bad\.nii has a damaged NIfTI header"),
        (_no_affine, r"bad\.nii has an affine that gives no direction"),
        (_image(NAN), r"bad\.nii\.gz holds 1 values that are NaN"),
        (_image(np.full((2, 2, 2), 1e300)), r"bad\.nii\.gz holds 8 values .* too large"),
        (_image(RGB), r"bad\.nii\.gz holds values of kind color \(RGB\)"),
        (_image(np.zeros((2, 2, 2), np.complex64)), r"bad\.nii\.gz holds values of kind complex64"),
        (
            _image(np.zeros((2, 2, 2, 17), np.uint8)),
            r"bad\.nii\.gz has 17 volumes along its fourth axis, but at most 16",
        ),
        (_image(np.zeros((2, 2, 2, 3, 2), np.uint8)), r"bad\.nii\.gz has 2x2x2x3x2 values"),
        (
            _label(np.zeros((4, 5), np.uint8), np.zeros((4, 5, 6), np.uint8)),
            r"bad\.nii\.gz has 4x5x6 voxels and .*4x5x1",
        ),
        (
            _label(np.zeros((4, 5, 6), np.uint8), np.zeros((4, 5, 6, 2), np.uint8)),
            r"bad\.nii\.gz is a label volume with 2",
        ),
        (
            _label(
                np.zeros((4, 5, 6), np.uint8),
                np.zeros((4, 5, 6), np.uint8),
                np.diag([1, 1, 1.1, 1]),
            ),
            r"bad\.nii\.gz lies elsewhere than .*i\.nii\.gz \(their affines differ by up to 0\.1\)",
        ),
        (
            _modality,
            r"bad\.nii\.gz has 2x3x5 voxels and .*a\.nii\.gz 2x3x4, but the modalities of a case",
        ),
    ],
)
def test_bad_file_is_named_in_one_sentence(
    make: Callable[[Path], SourceImage],
    sentence: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(DataError, match=sentence) as caught:
        frames_of(make(tmp_path))
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)
    assert not capfd.readouterr().err


def test_window_must_be_given(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "i.nii", np.ones((2, 2, 2), np.uint8))
    with pytest.raises(
        DataError, match=r"i\.nii is a NIfTI volume, which names no window.*--window"
    ):
        frames_of(item_of(path), values="window")


# Listing


def test_flat_folder_matches_labels_by_their_ending(tmp_path: Path) -> None:
    endings = (
        "_seg",
        "_mask",
        "_label",
        "-label",
        "_gt",
        "_Lesion_Mask",
        "_mask_1",
        "_gmseg-manual",
    )
    names = [
        name
        for i, ending in enumerate(endings)
        for name in (f"c{i}.nii.gz", f"c{i}{ending}.nii.gz")
    ]
    folder = touch(
        tmp_path,
        *names,
        "alone.nii",
        "notes.txt",
        "c0_brain_mask.nii.gz",
        "stray_seg.nii",
        "x.hdr",
        "x.img",
    )
    listing = find_nifti(folder, KEEP)
    cases = table(listing, tmp_path)
    assert cases == {
        "alone": (["alone.nii"], [], "alone"),
        **{
            f"c{i}": ([f"c{i}.nii.gz"], [f"c{i}{ending}.nii.gz"], f"c{i}")
            for i, ending in enumerate(endings)
        },
    }
    assert [(fault.file, fault.reason.split(";")[0]) for fault in listing.rejected] == [
        ("stray_seg.nii", "is a label volume without an image"),
        ("x.img", "is one half of a pair (.hdr and .img)"),
    ]
    assert "1 brain mask left out" in listing.summary


def test_longer_names_keep_their_labels(tmp_path: Path) -> None:
    folder = touch(tmp_path, "a.nii", "a_2.nii", "a_seg.nii", "a_2_seg.nii", "a_2_post_seg.nii")
    cases = table(find_nifti(folder, KEEP), tmp_path)
    assert cases["a"][1] == ["a_seg.nii"]
    assert cases["a_2"][1] == ["a_2_post_seg.nii", "a_2_seg.nii"]


@pytest.mark.parametrize(
    ("images", "labels"), [("images", "labels"), ("images", "masks"), ("imagesTr", "labelsTr")]
)
def test_labels_in_a_folder_of_their_own_are_named_like_images(
    images: str, labels: str, tmp_path: Path
) -> None:
    names = [
        f"{images}/a_1.nii.gz",
        f"{images}/a_2.nii.gz",
        f"{labels}/a_1.nii.gz",
        f"{labels}/b.nii.gz",
    ]
    listing = find_nifti(touch(tmp_path, *names, "imagesTs/a_9.nii.gz"), KEEP)
    cases = table(listing, tmp_path)
    assert cases["a_1"][1] == [f"{labels}/a_1.nii.gz"]
    assert cases["a_2"][1] == []
    assert "a_9" in cases
    assert [fault.file for fault in listing.rejected] == [f"{labels}/b.nii.gz"]


def test_nnunet_endings_are_channels(tmp_path: Path) -> None:
    images = [
        f"imagesTr/case_{i}_{c:04d}.nii.gz" for i in range(4) for c in range(3) if (i, c) != (2, 1)
    ]
    folder = touch(
        tmp_path, *images, *(f"labelsTr/case_{i}.nii.gz" for i in range(4)), "dataset.json"
    )
    listing = find_nifti(folder, KEEP)
    cases = table(listing, tmp_path)
    assert sorted(cases) == ["case_0", "case_1", "case_3"]
    assert cases["case_1"] == (
        [f"imagesTr/case_1_{c:04d}.nii.gz" for c in range(3)],
        ["labelsTr/case_1.nii.gz"],
        "case_1",
    )
    assert [fault.file for fault in listing.rejected] == [
        "imagesTr/case_2_0000.nii.gz",
        "imagesTr/case_2_0002.nii.gz",
        "labelsTr/case_2.nii.gz",
    ]
    assert "lacks 0001" in listing.rejected[0].reason
    assert "belongs to a case that is rejected" in listing.rejected[2].reason


def test_numbers_that_are_no_channels_stay_names(tmp_path: Path) -> None:
    folder = touch(tmp_path, *(f"imagesTr/scan_{i:04d}.nii.gz" for i in (1, 2, 30)))
    assert sorted(table(find_nifti(folder, KEEP), tmp_path)) == [
        "scan_0001",
        "scan_0002",
        "scan_0030",
    ]


def test_brats_modalities_are_channels_in_one_order(tmp_path: Path) -> None:
    old = [
        f"HGG/B_{i}/B_{i}_{m}.nii.gz"
        for i in range(3)
        for m in ("flair", "t1", "t1ce", "t2", "seg")
    ]
    new = [f"BraTS-GLI-0000{p}-00{t}" for p, t in ((5, 0), (5, 1), (6, 0))]
    new_files = [
        f"{case}/{case}-{m}.nii.gz" for case in new for m in ("t2f", "t1n", "t1c", "t2w", "seg")
    ]
    lacking = ["HGG/B_9/B_9_t1.nii.gz", "HGG/B_9/B_9_t2.nii.gz", "HGG/B_9/B_9_seg.nii.gz"]
    listing = find_nifti(touch(tmp_path, *old, *new_files, *lacking), KEEP)
    cases = table(listing, tmp_path)
    assert len(cases) == 6
    assert cases["B_1"] == (
        [f"HGG/B_1/B_1_{m}.nii.gz" for m in ("t1", "t1ce", "t2", "flair")],
        ["HGG/B_1/B_1_seg.nii.gz"],
        "B_1",
    )
    images, masks, group = cases[new[0]]
    assert [Path(image).name.removeprefix(new[0]) for image in images] == [
        f"-{m}.nii.gz" for m in ("t1n", "t1c", "t2w", "t2f")
    ]
    assert masks == [f"{new[0]}/{new[0]}-seg.nii.gz"]
    assert cases[new[1]][2] == group == "BraTS-GLI-00005"  # two times of one patient
    assert [fault.file for fault in listing.rejected] == sorted(lacking)
    assert "lacks t1ce, flair, which most cases have" in listing.rejected[1].reason


def test_sessions_of_a_bids_subject_share_a_group(tmp_path: Path) -> None:
    names = [
        f"sub-0{s}/ses-{t}/anat/sub-0{s}_ses-{t}_{kind}.nii.gz"
        for s in (1, 2)
        for t in (1, 2)
        for kind in ("T1w", "FLAIR", "FLAIR_label-lesion_mask")
    ]
    derived = "derivatives/labels/sub-01/ses-1/anat/sub-01_ses-1_T1w_seg.nii.gz"
    listing = find_nifti(touch(tmp_path, *names, derived), KEEP)
    cases = table(listing, tmp_path)
    assert len(cases) == 8  # scans of a subject lie on grids of their own: no channels
    assert {group for _, _, group in cases.values()} == {"sub-01", "sub-02"}
    assert cases["sub-02_ses-1_FLAIR"][1] == [
        names[8].replace("FLAIR.nii", "FLAIR_label-lesion_mask.nii")
    ]
    assert cases["sub-01_ses-1_T1w"][1] == [derived]
    assert listing.rejected == []


def test_case_folders_give_ids_and_groups(tmp_path: Path) -> None:
    names = [f"case_{i}/{kind}.nii.gz" for i in range(3) for kind in ("imaging", "segmentation")]
    cases = table(find_nifti(touch(tmp_path, *names), KEEP), tmp_path)
    assert cases["case_1/imaging"] == (
        ["case_1/imaging.nii.gz"],
        ["case_1/segmentation.nii.gz"],
        "case_1",
    )
    assert len(cases) == 3
    names = [f"p{i}/{visit}/scan.nii.gz" for i in range(2) for visit in ("visit1", "20240131")]
    cases = table(find_nifti(touch(tmp_path / "visits", *names), KEEP), tmp_path / "visits")
    assert {group for _, _, group in cases.values()} == {"p0", "p1"}


def test_folder_without_volumes_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="2 files, no NIfTI among them"):
        find_nifti(touch(tmp_path / "a", "x.png", "y.txt"), KEEP)
    with pytest.raises(DataError, match="holds 1 label volume"):
        find_nifti(touch(tmp_path / "b", "labels/y.nii"), KEEP)


# Decathlon


def _index(folder: Path, **content: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset.json").write_text(json.dumps(content))


def test_decathlon_lists_what_its_index_names(tmp_path: Path) -> None:
    files = [
        "imagesTr/la_003.nii.gz",
        "labelsTr/la_003.nii.gz",
        "imagesTr/la_004.nii.gz",
        "imagesTs/la_009.nii.gz",
    ]
    folder = touch(
        tmp_path, *files, "imagesTr/n_0000.nii.gz", "imagesTr/n_0001.nii.gz", "labelsTr/n.nii.gz"
    )
    _index(
        tmp_path,
        modality={"0": "FLAIR", "1": "T1w"},
        training=[
            {"image": "./imagesTr/la_003.nii.gz", "label": "./labelsTr/la_003.nii.gz"},
            {"image": "./imagesTr/la_004.nii.gz", "label": "./labelsTr/la_004.nii.gz"},
            {"image": "./imagesTr/gone.nii.gz", "label": "./labelsTr/gone.nii.gz"},
            {"image": "./imagesTr/n.nii.gz", "label": "./labelsTr/n.nii.gz"},
            {"image": "../elsewhere.nii.gz"},
            {"label": "./labelsTr/la_003.nii.gz"},
            7,
        ],
        test=["./imagesTs/la_009.nii.gz", "./imagesTr/la_003.nii.gz", "x.mha"],
    )
    listing = find_decathlon(folder, KEEP)
    assert table(listing, tmp_path) == {
        "la_003": (["imagesTr/la_003.nii.gz"], ["labelsTr/la_003.nii.gz"], "la_003"),
        "la_009": (["imagesTs/la_009.nii.gz"], [], "la_009"),
        "n": (["imagesTr/n_0000.nii.gz", "imagesTr/n_0001.nii.gz"], ["labelsTr/n.nii.gz"], "n"),
    }
    reasons = sorted((fault.file, fault.reason) for fault in listing.rejected)
    assert [file for file, _ in reasons] == [
        "../elsewhere.nii.gz",
        "dataset.json",
        "dataset.json",
        "imagesTr/gone.nii.gz",
        "imagesTr/la_003.nii.gz",
        "labelsTr/la_004.nii.gz",
        "x.mha",
    ]
    assert reasons[3][1] == "is named in dataset.json and not there"
    assert "of FLAIR, T1w" in listing.summary
    assert "3 volumes, 2 with labels" in listing.summary


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, r"holds no dataset\.json"),
        ("{", r"dataset\.json is no valid JSON"),
        (
            '{"channel_names": {"0": "CT"}, "numTraining": 3}',
            r"has none of the lists training, validation, test",
        ),
        ("[1]", r"has none of the lists"),
        (
            '{"training": [{"image": "a.nii"}]}',
            r"names no volume that is there \(such as a\.nii, which is named",
        ),
    ],
)
def test_index_that_cannot_be_used_is_an_error(
    content: str | None, sentence: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(DataError, match=sentence):
        find_decathlon(DataPath(tmp_path), KEEP)


@pytest.mark.parametrize(
    ("labels", "wanted", "known"),
    [
        ({"0": "background", "1": "liver", "2": "cancer"}, (3,), r"1 \(liver\), 2 \(cancer\)"),
        ({"background": 0, "liver": "1", "cancer": [2.0, 1]}, (1, 3), r"3 is no label of"),
    ],
)
def test_a_wanted_label_that_the_index_does_not_know_is_an_error(
    labels: dict[str, Any], wanted: tuple[int, ...], known: str, tmp_path: Path
) -> None:
    root = touch(tmp_path, "imagesTr/a.nii.gz", "labelsTr/a.nii.gz")
    training = [{"image": "imagesTr/a.nii.gz", "label": "labelsTr/a.nii.gz"}]
    index = {"labels": labels, "training": training, "test": 5, "modality": 7}
    (tmp_path / "dataset.json").write_text(json.dumps(index), encoding="utf-16")
    with pytest.raises(DataError, match=known):
        find_decathlon(root, PrepareConfig(lesion_labels=wanted))
    assert len(find_decathlon(root, PrepareConfig(lesion_labels=(2,))).items) == 1
    summary = find_decathlon(root, PrepareConfig()).summary
    assert "names 1 volume, 1 with labels" in summary
    assert "all labels are taken as lesion, 1 (liver), 2 (cancer)" in summary
