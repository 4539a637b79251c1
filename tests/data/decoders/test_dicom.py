from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
import pydicom
import pytest
from helpers.volumes import CAPTURE, ct_series, dicom, save, segmentation
from pydicom import Dataset, dcmread
from pydicom.pixels import apply_color_lut, apply_rescale, apply_windowing
from pydicom.sequence import Sequence
from pydicom.uid import RLELossless, generate_uid

from amlp_ray.config import PrepareConfig
from amlp_ray.data.decoders.dicom import read_dicom
from amlp_ray.data.decoders.frame import DTYPES, Frame
from amlp_ray.data.layouts.dicom import find_dicom
from amlp_ray.data.layouts.item import Listing, SourceImage
from amlp_ray.data.path import DataPath, read_bytes
from amlp_ray.errors import DataError

EXAMPLES = Path(pydicom.__file__).parent / "data" / "test_files"
KEEP = PrepareConfig()
# Files of pydicom that hold an image; the rest are plans, reports, and broken on purpose.
BROKEN = {"JPEG2000-embedded-sequence-delimiter.dcm", "JPEG-lossy.dcm"}
PATTERNS = (
    "*_small*.dcm",
    "SC_*.dcm",
    "JPEG*.dcm",
    "693_J2KI.dcm",
    "J2K_*.dcm",
    "GDCM*.dcm",
    "examples_*.dcm",
)
IMAGES = [
    *sorted(
        {
            path.name
            for pattern in PATTERNS
            for path in EXAMPLES.glob(pattern)
            if "32bit" not in path.name
        }
        - BROKEN
    ),
    "ExplVR_BigEnd.dcm",
    "image_dfl.dcm",
]


@pytest.fixture(autouse=True)
def _salt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMLP_RAY_SALT", "a secret of the tests")


def find(folder: Path) -> Listing:
    return find_dicom(DataPath(folder), KEEP)


def item_of(*paths: Path, masks: tuple[Path, ...] = ()) -> SourceImage:
    return SourceImage("i", "dicom", tuple(map(str, paths)), tuple(map(str, masks)), "i")


def frames_of(item: SourceImage, **config: Any) -> list[Frame]:
    return list(read_dicom(item, PrepareConfig(**config), read_bytes))


def image_of(dataset: Dataset, folder: Path, **config: Any) -> np.ndarray:
    """What is read of one written object: (H, W) of one frame, or (F, H, W)."""
    frames = frames_of(item_of(save(dataset, folder / "one.dcm")), **config)
    images = [frame.image[..., 0] if frame.image.shape[2] == 1 else frame.image for frame in frames]
    return images[0] if len(images) == 1 else np.stack(images)


def expected(path: Path) -> np.ndarray:
    """The frames of a file by pydicom's own means, (F, H, W, C)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = dcmread(path)
        pixels = dataset.pixel_array
        if dataset.PhotometricInterpretation == "PALETTE COLOR":
            pixels = apply_color_lut(pixels, dataset) >> 8  # 8 bits in the upper byte of 16
        elif dataset.PhotometricInterpretation == "MONOCHROME2":
            pixels = apply_rescale(pixels, dataset)
            if "PixelPaddingValue" in dataset:
                outside = dataset.pixel_array == dataset.PixelPaddingValue
                pixels = np.where(outside, pixels[~outside].min(), pixels)
    frames = int(dataset.get("NumberOfFrames") or 1)
    return pixels.reshape(frames, dataset.Rows, dataset.Columns, -1)


@pytest.mark.parametrize("name", IMAGES)
def test_every_kind_of_image_is_read_as_pydicom_reads_it(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "image").symlink_to(EXAMPLES / name)  # without a suffix
    (item,) = find(tmp_path).items
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frames = frames_of(item)
    want = expected(EXAMPLES / name)
    assert [frame.number for frame in frames] == list(range(len(want)))
    for frame, pixels in zip(frames, want, strict=True):
        assert frame.image.dtype.name in DTYPES
        assert frame.mask is None
        np.testing.assert_array_equal(frame.image, pixels)
    assert "WARN" not in capfd.readouterr().err.upper()


@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
def test_examples_hold_all_kinds_that_matter() -> None:
    syntaxes = {
        dcmread(EXAMPLES / name, stop_before_pixels=True).file_meta.TransferSyntaxUID.name
        for name in IMAGES
    }
    for kind in (
        "RLE",
        "JPEG Baseline",
        "JPEG Lossless",
        "JPEG-LS",
        "JPEG 2000",
        "Deflated",
        "Big",
    ):
        assert any(kind in syntax for syntax in syntaxes), kind


def test_jpeg_of_12_bits_is_read_in_silence(capfd: pytest.CaptureFixture[str]) -> None:
    (frame,) = frames_of(item_of(EXAMPLES / "JPGExtended.dcm"))
    assert (frame.image.dtype, frame.image.shape) == (np.uint16, (1024, 256, 1))
    assert (frame.image[420, 140, 0], frame.image[230, 120, 0]) == (
        244,
        95,
    )  # as other decoders have it
    assert not capfd.readouterr().err


@pytest.mark.parametrize("name", ["CT_small.dcm", "MR_small.dcm", "MR_small_RLE.dcm"])
def test_shared_images_are_read_pixel_by_pixel(name: str, real_data: Path) -> None:
    path = real_data / "dicom" / name
    (frame,) = frames_of(item_of(path))
    np.testing.assert_array_equal(frame.image, expected(path)[0])
    assert frame.image.dtype == np.int16
    assert frame.spacing == tuple(dcmread(path).PixelSpacing)


def test_shared_folder_lists_two_series_and_tells_why_not_more(real_data: Path) -> None:
    listing = find(real_data / "dicom")
    assert sorted(item.stratum for item in listing.items) == ["CT", "MR"]
    assert {fault.file: fault.reason for fault in listing.rejected} == {
        "MR_small_RLE.dcm": "is a second copy of MR_small.dcm, which is kept",
        "liver_1frame.dcm": "is a segmentation that refers to a series that is not here",
    }


def test_shared_segmentation_is_a_mask_of_the_slices_it_names(
    real_data: Path, tmp_path: Path
) -> None:
    seg = real_data / "dicom" / "liver_1frame.dcm"
    want = dcmread(seg)
    frame = want.PerFrameFunctionalGroupsSequence[0]  # it describes three frames and holds one
    named = frame.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
    position = frame.PlanePositionSequence[0].ImagePositionPatient
    series = want.ReferencedSeriesSequence[0].SeriesInstanceUID
    for z, uid in ((0, named), (1, generate_uid())):
        geometry = {
            "ImagePositionPatient": [*position[:2], position[2] + 5 * z],
            "SeriesInstanceUID": series,
        }
        elements = geometry | {
            "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
            "PixelSpacing": [0.810547, 0.810547],
        }
        save(
            dicom(np.zeros((512, 512), np.int16), SOPInstanceUID=uid, **elements),
            tmp_path / f"{z}.dcm",
        )
    (tmp_path / "seg.dcm").write_bytes(seg.read_bytes())
    (item,) = find(tmp_path).items
    first, second = frames_of(item)
    np.testing.assert_array_equal(first.mask, want.pixel_array)
    assert second.mask is not None
    assert not second.mask.any()


def test_slices_are_ordered_by_place_and_not_by_name_or_number(tmp_path: Path) -> None:
    volume = np.arange(6, dtype=np.int16)[:, None, None] * np.ones((6, 8, 8), np.int16)
    ct_series(tmp_path, volume)  # numbers run downwards, names at random
    (item,) = find(tmp_path).items
    assert [frame.image[0, 0, 0] for frame in frames_of(item)] == [0, 1, 2, 3, 4, 5]
    assert frames_of(item)[0].spacing == (0.5, 0.75)


def test_slices_without_place_are_ordered_by_number_then_by_name(tmp_path: Path) -> None:
    volume = np.arange(12, dtype=np.int16)[:, None, None] * np.ones((12, 8, 8), np.int16)
    names = [f"s{z}" for z in range(12)]
    ct_series(tmp_path / "a", volume, names=names, ImagePositionPatient=None)
    (item,) = find(tmp_path / "a").items
    assert [frame.image[0, 0, 0] for frame in frames_of(item)] == list(range(12))[::-1]
    ct_series(tmp_path / "b", volume, names=names, ImagePositionPatient=None, InstanceNumber=None)
    (item,) = find(tmp_path / "b").items
    assert [frame.image[0, 0, 0] for frame in frames_of(item)] == list(range(12))


def test_oblique_slices_are_ordered_along_their_normal(tmp_path: Path) -> None:
    tilt = [1.0, 0.0, 0.0, 0.0, 0.6, -0.8]
    series = generate_uid()
    for z, name in ((0, "c"), (1, "a"), (2, "b")):
        position = {
            "ImageOrientationPatient": tilt,
            "ImagePositionPatient": [0, 0.8 * 3 * z, 0.6 * 3 * z],
        }
        pixels = np.full((8, 8), z, np.int16)
        save(
            dicom(pixels, SeriesInstanceUID=series, InstanceNumber=5 - z, **position),
            tmp_path / name,
        )
    (item,) = find(tmp_path).items
    assert [frame.image[0, 0, 0] for frame in frames_of(item)] == [0, 1, 2]


def test_series_falls_apart_by_shape_and_direction(tmp_path: Path) -> None:
    shared = {"SeriesInstanceUID": "1.2.3", "StudyInstanceUID": "1.2.4", "patient": "p"}
    ct_series(tmp_path / "a", np.zeros((3, 8, 8), np.int16), **shared)
    ct_series(tmp_path / "b", np.zeros((2, 8, 9), np.int16), **shared)
    save(
        dicom(np.zeros((8, 8), np.int16), ImageOrientationPatient=[0, 1, 0, 0, 0, -1], **shared),
        tmp_path / "c",
    )
    save(dicom(np.zeros((4, 8, 8), np.int16), **shared), tmp_path / "d")
    listing = find(tmp_path)
    assert sorted(len(item.images) for item in listing.items) == [1, 1, 2, 3]
    first = listing.items[0].id.partition("-")[0]
    assert sorted(item.id for item in listing.items) == [f"{first}-{n}" for n in (1, 2, 3, 4)]
    assert len({item.group for item in listing.items}) == 1
    moved = tmp_path / "z" / "q"
    moved.parent.mkdir()
    (tmp_path / "c").rename(moved)  # names decide nothing
    assert {item.id: len(item.images) for item in find(tmp_path).items} == {
        item.id: len(item.images) for item in listing.items
    }


def test_other_objects_are_counted_and_other_files_ignored(tmp_path: Path) -> None:
    ct_series(tmp_path, np.zeros((2, 8, 8), np.int16))
    for name in ("test-SR.dcm", "rtplan.dcm", "rtdose.dcm", "waveform_ecg.dcm"):
        (tmp_path / name).write_bytes((EXAMPLES / name).read_bytes())
    (tmp_path / "README").write_text("not DICOM")
    (tmp_path / "DICOMDIR").write_bytes((EXAMPLES / "test-SR.dcm").read_bytes())
    (tmp_path / "notes.dcm").write_text("named like one")
    listing = find(tmp_path)
    assert len(listing.items) == 1
    assert listing.rejected == [("notes.dcm", "rejected", "is named like a DICOM file and is none")]
    assert "4 other objects left out" in listing.summary
    assert "1 RT Plan Storage" in listing.summary


@pytest.mark.parametrize("name", ["image_dfl.dcm", "JPEG2000.dcm", "ExplVR_BigEnd.dcm"])
def test_file_without_preamble_is_read_by_its_meta_header(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.dcm").write_bytes((EXAMPLES / name).read_bytes()[132:])
    (item,) = find(tmp_path).items
    frames = np.stack([frame.image for frame in frames_of(item)])
    np.testing.assert_array_equal(frames, expected(EXAMPLES / name))


def test_file_without_preamble_is_read_where_its_name_says_dicom(tmp_path: Path) -> None:
    pixels = np.arange(64, dtype=np.int16).reshape(8, 8)
    path = save(dicom(pixels), tmp_path / "a.ima")
    content = path.read_bytes()
    path.write_bytes(
        content[132 + 12 + int.from_bytes(content[140:144], "little") :]
    )  # without its meta header too
    (item,) = find(tmp_path).items
    np.testing.assert_array_equal(frames_of(item)[0].image[..., 0], pixels)


@pytest.mark.parametrize(
    ("stored", "elements", "dtype"),
    [
        (np.uint8, {}, "uint8"),
        (np.uint16, {}, "uint16"),
        (
            np.uint16,
            {"BitsStored": 12, "HighBit": 11, "RescaleSlope": 1, "RescaleIntercept": -1024},
            "int16",
        ),
        (
            np.uint16,
            {"RescaleSlope": 1, "RescaleIntercept": -1024},
            "int16",
        ),  # as the values allow it
        (np.int16, {"RescaleSlope": 2, "RescaleIntercept": -5}, "int16"),
        (np.uint16, {"BitsStored": 8, "HighBit": 7}, "uint8"),
        (np.int16, {"RescaleSlope": 0.5, "RescaleIntercept": 0}, "float32"),
    ],
)
def test_type_is_the_smallest_that_is_exact(
    stored: Any, elements: dict[str, Any], dtype: str, tmp_path: Path
) -> None:
    pixels = np.random.default_rng(1).integers(0, 250, (9, 7)).astype(stored)
    image = image_of(dicom(pixels, **elements), tmp_path)
    want = pixels.astype(float) * elements.get("RescaleSlope", 1) + elements.get(
        "RescaleIntercept", 0
    )
    assert image.dtype == dtype
    np.testing.assert_array_equal(image, want)


def test_monochrome1_is_turned_round_in_the_range_of_its_header(tmp_path: Path) -> None:
    pixels = np.random.default_rng(2).integers(0, 4096, (8, 8)).astype(np.uint16)
    elements = {"PhotometricInterpretation": "MONOCHROME1", "BitsStored": 12, "HighBit": 11}
    np.testing.assert_array_equal(image_of(dicom(pixels, **elements), tmp_path), 4095 - pixels)
    rescaled = elements | {"RescaleSlope": 2, "RescaleIntercept": -1000}
    image = image_of(dicom(pixels, **rescaled), tmp_path)
    np.testing.assert_array_equal(image, (4095 - pixels.astype(int)) * 2 - 1000)
    image = image_of(dicom(pixels, **elements), tmp_path, values="window", window=(0, 4095))
    np.testing.assert_array_equal(image, 255 - np.rint(pixels / 4095 * 255))


def test_padding_becomes_the_least_valid_value(tmp_path: Path) -> None:
    pixels = np.random.default_rng(3).integers(-900, 900, (8, 8)).astype(np.int16)
    pixels[:2] = -2000
    pixels[2] = -1990
    image = image_of(dicom(pixels, PixelPaddingValue=-2000), tmp_path)
    assert image.min() == -1990
    assert (image[:2] == -1990).all()
    ranged = image_of(
        dicom(pixels, PixelPaddingValue=-2000, PixelPaddingRangeLimit=-1990), tmp_path
    )
    assert ranged.min() == pixels[3:].min()
    np.testing.assert_array_equal(ranged[3:], pixels[3:])


def test_colors_become_rgb_of_8_bits(tmp_path: Path) -> None:
    pixels = np.random.default_rng(4).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    capture = dicom(pixels, SOPClassUID=CAPTURE)
    np.testing.assert_array_equal(image_of(capture, tmp_path), pixels)
    for values in ("window", "percentile"):  # color is meant to be shown as it is
        np.testing.assert_array_equal(image_of(capture, tmp_path, values=values), pixels)
    indices = np.arange(64, dtype=np.uint8).reshape(8, 8)
    table = np.random.default_rng(5).integers(0, 256, (3, 64)).astype(np.uint16)
    palette = dicom(indices, PhotometricInterpretation="PALETTE COLOR")
    for name, color in zip(("Red", "Green", "Blue"), table, strict=True):
        setattr(palette, f"{name}PaletteColorLookupTableDescriptor", [64, 0, 16])
        setattr(palette, f"{name}PaletteColorLookupTableData", (color * 257).tobytes())
    np.testing.assert_array_equal(image_of(palette, tmp_path), table.T[indices])


@pytest.mark.parametrize("function", [None, "LINEAR_EXACT", "SIGMOID"])
def test_window_of_the_header_is_that_of_pydicom(function: str | None, tmp_path: Path) -> None:
    pixels = np.random.default_rng(6).integers(-1000, 1000, (16, 16)).astype(np.int16)
    dataset = dicom(pixels, WindowCenter=[40, 7], WindowWidth=[400, 9], VOILUTFunction=function)
    windowed = apply_windowing(pixels, dataset)
    low, high = -(2**15), 2**15 - 1
    np.testing.assert_allclose(
        image_of(dataset, tmp_path, values="window"),
        (windowed - low) / (high - low) * 255,
        atol=0.501,
    )


def test_window_table_of_the_header_is_used(tmp_path: Path) -> None:
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    table = Dataset()
    table.LUTDescriptor = [64, 0, 8]
    table.LUTData = np.arange(255, 191, -1, dtype=np.uint16).tobytes()
    dataset = dicom(pixels, VOILUTSequence=Sequence([table]), WindowCenter=1, WindowWidth=2)
    np.testing.assert_array_equal(image_of(dataset, tmp_path, values="window"), 255 - pixels)


def test_given_window_and_none_at_all(tmp_path: Path) -> None:
    pixels = np.array([[-2000, -160], [39, 240]], np.int16)
    image = image_of(
        dicom(pixels, WindowCenter=0, WindowWidth=1), tmp_path, values="window", window=(-160, 240)
    )
    np.testing.assert_array_equal(image, [[0, 0], [127, 255]])
    with pytest.raises(DataError, match=r"one\.dcm names no window .* add --window"):
        image_of(dicom(pixels), tmp_path, values="window")


def test_percentiles_are_those_of_the_series_above_its_air(tmp_path: Path) -> None:
    volume = np.random.default_rng(7).integers(0, 3000, (5, 16, 16)).astype(np.int16)
    volume[:, :8] = -1000
    ct_series(tmp_path, volume)
    (item,) = find(tmp_path).items
    low, high = np.percentile(volume[volume > -1000], (0.5, 99.5))
    want = np.rint(np.clip((volume - low) / (high - low), 0, 1) * 255)
    actual = np.stack([frame.image[..., 0] for frame in frames_of(item, values="percentile")])
    assert actual.dtype == np.uint8
    np.testing.assert_array_equal(actual, want)


def test_frames_of_an_enhanced_object_have_their_own_units_and_spacing(tmp_path: Path) -> None:
    pixels = np.random.default_rng(8).integers(0, 100, (3, 8, 8)).astype(np.uint16)
    groups = []
    for z in range(3):
        group, rescale = Dataset(), Dataset()
        rescale.RescaleSlope, rescale.RescaleIntercept, rescale.RescaleType = z + 1, -z, "US"
        group.PixelValueTransformationSequence = Sequence([rescale])
        groups.append(group)
    shared, measures = Dataset(), Dataset()
    measures.PixelSpacing = [1.5, 2.5]
    shared.PixelMeasuresSequence = Sequence([measures])
    dataset = dicom(
        pixels,
        PixelSpacing=None,
        SharedFunctionalGroupsSequence=Sequence([shared]),
        PerFrameFunctionalGroupsSequence=Sequence(groups),
    )
    frames = frames_of(item_of(save(dataset, tmp_path / "e.dcm")))
    for z, frame in enumerate(frames):
        np.testing.assert_array_equal(frame.image[..., 0], pixels[z].astype(int) * (z + 1) - z)
        assert frame.spacing == (1.5, 2.5)


def test_only_one_file_is_read_at_a_time(tmp_path: Path) -> None:
    ct_series(tmp_path, np.zeros((5, 8, 8), np.int16))
    (item,) = find(tmp_path).items
    read: list[str] = []

    def reading(path: str) -> bytes:
        read.append(path)
        return read_bytes(path)

    frames = read_dicom(item, KEEP, reading)
    next(frames)
    assert len(read) == 1
    next(frames)
    assert read == list(item.images[:2])


# Segmentations


def _masks(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    return (np.random.default_rng(seed).random(shape) > 0.6).astype(np.uint8)


def test_masks_lie_on_the_slices_they_were_drawn_on(tmp_path: Path) -> None:
    volume = np.random.default_rng(9).integers(0, 100, (6, 16, 12)).astype(np.int16)
    slices = ct_series(tmp_path, volume)
    masks = _masks(10, (6, 16, 12))
    masks[[0, 4]] = 0  # frames that are left out of the object
    seg = segmentation(slices[::-1], masks[::-1])
    save(seg, tmp_path / "seg.dcm")
    (item,) = find(tmp_path).items
    assert len(item.masks) == 1
    frames = frames_of(item)
    np.testing.assert_array_equal(np.stack([frame.image[..., 0] for frame in frames]), volume)
    np.testing.assert_array_equal(np.stack([frame.mask for frame in frames]), masks)
    other_way = hd.seg.segread(tmp_path / "seg.dcm").get_pixels_by_source_instance(
        [s.SOPInstanceUID for s in slices],
        assert_missing_frames_are_empty=True,
        ignore_spatial_locations=True,
    )
    np.testing.assert_array_equal(np.stack([frame.mask for frame in frames]), other_way[..., 0])


@pytest.mark.parametrize("kind", ["BINARY", "LABELMAP", "FRACTIONAL"])
def test_wanted_segments_of_several_objects_are_united(kind: str, tmp_path: Path) -> None:
    slices = ct_series(tmp_path, np.zeros((3, 8, 8), np.int16))
    labels = np.random.default_rng(11).integers(0, 4, (3, 8, 8)).astype(np.uint8)
    more = _masks(12, (3, 8, 8))
    options: dict[str, Any] = {"segmentation_type": kind}
    if kind == "FRACTIONAL":
        options["fractional_type"] = "PROBABILITY"
    save(segmentation(slices, labels, **options), tmp_path / "one.dcm")
    save(segmentation(slices, more), tmp_path / "two.dcm")
    (item,) = find(tmp_path).items
    assert len(item.masks) == 2
    everything = np.stack([frame.mask for frame in frames_of(item)])
    np.testing.assert_array_equal(everything, (labels > 0) | (more > 0))
    chosen = np.stack([frame.mask for frame in frames_of(item, lesion_labels=(2, 3))])
    np.testing.assert_array_equal(chosen, labels >= 2)
    nothing = frames_of(item, lesion_labels=(7,))
    assert not np.stack([frame.mask for frame in nothing]).any()
    assert [len(frame.notes) for frame in nothing] == [1, 0, 0]


def _described(seg: Dataset, number: int, label: str, code: str = "") -> None:
    """Name a segment, and its type by a code of DCM."""
    for one in seg.SegmentSequence:
        if one.SegmentNumber == number:
            one.SegmentLabel = label
            types = one.SegmentedPropertyTypeCodeSequence
            types[0].CodeValue = code or "108369006"
            types[0].CodingSchemeDesignator = "DCM" if code else "SCT"
            one.SegmentedPropertyCategoryCodeSequence[0].CodeValue = "49755003"
            one.SegmentedPropertyCategoryCodeSequence[0].CodingSchemeDesignator = "SCT"


def _background_by_number(seg: Dataset) -> None:
    del seg.PixelPaddingValue
    _described(seg, 0, "rest")


def _background_by_padding(seg: Dataset) -> None:
    seg.PixelPaddingValue = 2
    _described(seg, 0, "cyst")


def _background_by_type(seg: Dataset) -> None:
    if "PixelPaddingValue" in seg:
        del seg.PixelPaddingValue
    _described(seg, 0, "cyst")
    _described(seg, 2, "rest", code="125040")


def _background_by_label(seg: Dataset) -> None:
    if "PixelPaddingValue" in seg:
        del seg.PixelPaddingValue
    _described(seg, 0, "cyst")
    _described(seg, 2, "BACKGROUND ")


@pytest.mark.parametrize(
    ("kind", "change", "background", "note"),
    [
        ("LABELMAP", lambda seg: None, {0}, ()),
        (
            "LABELMAP",
            _background_by_number,
            {0},
            ("names no background, so segment 0 is counted as no lesion",),
        ),
        ("LABELMAP", _background_by_padding, {2}, ()),
        ("LABELMAP", _background_by_type, {2}, ()),
        (
            "LABELMAP",
            _background_by_label,
            {2},
            ("names segment 2 'BACKGROUND' without its code: counted as no lesion",),
        ),
        ("BINARY", _background_by_type, {0, 2}, ()),
        (
            "BINARY",
            _background_by_label,
            {0, 2},
            ("names segment 2 'BACKGROUND' without its code: counted as no lesion",),
        ),
    ],
)
def test_background_segment_is_no_lesion_unless_asked_for(
    kind: str, change: Any, background: set[int], note: tuple[str, ...], tmp_path: Path
) -> None:
    slices = ct_series(tmp_path, np.zeros((2, 8, 8), np.int16))
    labels = np.random.default_rng(13).integers(0, 4, (2, 8, 8)).astype(np.uint8)
    seg = segmentation(slices, labels, segmentation_type=kind)
    change(seg)
    save(seg, tmp_path / "seg.dcm")
    (item,) = find(tmp_path).items
    frames = frames_of(item)
    masks = np.stack([frame.mask for frame in frames])
    np.testing.assert_array_equal(masks, ~np.isin(labels, sorted(background)))
    assert frames[0].notes == note
    chosen = np.stack([frame.mask for frame in frames_of(item, lesion_labels=(2,))])
    np.testing.assert_array_equal(chosen, labels == 2)


def test_fractions_from_a_half_are_lesion(tmp_path: Path) -> None:
    slices = ct_series(tmp_path, np.zeros((1, 4, 4), np.int16))
    shares = np.linspace(0, 1, 16).reshape(1, 4, 4)
    options = {
        "segmentation_type": "FRACTIONAL",
        "fractional_type": "OCCUPANCY",
        "max_fractional_value": 200,
    }
    save(segmentation(slices, shares, **options), tmp_path / "seg.dcm")
    (item,) = find(tmp_path).items
    np.testing.assert_array_equal(frames_of(item)[0].mask, shares[0] >= 0.5)


def test_segmentation_of_a_multi_frame_object_is_found_by_frame(tmp_path: Path) -> None:
    groups = []
    for z in range(4):
        group, position = Dataset(), Dataset()
        position.ImagePositionPatient = [0, 0, 3.0 * z]
        group.PlanePositionSequence = Sequence([position])
        groups.append(group)
    shared, turn, measures = Dataset(), Dataset(), Dataset()
    turn.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    measures.PixelSpacing, measures.SliceThickness = [1, 1], 3
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = (
        Sequence([turn]),
        Sequence([measures]),
    )
    source = dicom(
        np.zeros((4, 8, 8), np.uint16),
        SOPClassUID="1.2.840.10008.5.1.4.1.1.2.1",
        SharedFunctionalGroupsSequence=Sequence([shared]),
        PerFrameFunctionalGroupsSequence=Sequence(groups),
    )
    save(source, tmp_path / "enhanced.dcm")
    masks = _masks(13, (4, 8, 8))
    save(segmentation([source], masks), tmp_path / "seg.dcm")
    (item,) = find(tmp_path).items
    frames = frames_of(item)
    np.testing.assert_array_equal(np.stack([frame.mask for frame in frames]), masks)
    other_way = hd.seg.segread(tmp_path / "seg.dcm").get_pixels_by_source_frame(
        source.SOPInstanceUID,
        [1, 2, 3, 4],
        assert_missing_frames_are_empty=True,
        ignore_spatial_locations=True,
    )
    np.testing.assert_array_equal(np.stack([frame.mask for frame in frames]), other_way[..., 0])


def _without_references(seg: Dataset) -> None:
    for frame in seg.PerFrameFunctionalGroupsSequence:
        del frame.DerivationImageSequence


def _all_references(seg: Dataset) -> None:
    images = [
        frame.DerivationImageSequence[0].SourceImageSequence[0]
        for frame in seg.PerFrameFunctionalGroupsSequence
    ]
    for frame in seg.PerFrameFunctionalGroupsSequence:
        frame.DerivationImageSequence[0].SourceImageSequence = Sequence(images)


def _without_series(seg: Dataset) -> None:
    del seg.ReferencedSeriesSequence


@pytest.mark.parametrize("spoil", [_without_references, _all_references, _without_series])
def test_frames_are_found_by_place_where_references_are_poor(
    spoil: Callable[[Dataset], None], tmp_path: Path
) -> None:
    slices = ct_series(tmp_path, np.zeros((4, 8, 8), np.int16))
    masks = _masks(14, (4, 8, 8))
    seg = segmentation(slices, masks)
    spoil(seg)
    save(seg, tmp_path / "seg.dcm")
    (item,) = find(tmp_path).items
    np.testing.assert_array_equal(np.stack([frame.mask for frame in frames_of(item)]), masks)


def _moved(seg: Dataset) -> None:
    for frame in seg.PerFrameFunctionalGroupsSequence:
        frame.PlanePositionSequence[0].ImagePositionPatient[2] += 1.0


def _astray(seg: Dataset) -> None:
    _without_references(seg)
    _moved(seg)


def _flipped(seg: Dataset) -> None:
    seg.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0].ImageOrientationPatient = [
        -1,
        0,
        0,
        0,
        1,
        0,
    ]


def _coarser(seg: Dataset) -> None:
    seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing = [1, 1]


def _smaller(seg: Dataset) -> None:
    seg.Rows, seg.Columns = 4, 16


def _without_segments(seg: Dataset) -> None:
    del seg.SegmentSequence


def _undescribed(seg: Dataset) -> None:
    seg.SegmentationType = "LABELMAP"
    seg.BitsAllocated = seg.BitsStored = 8
    seg.HighBit = 7
    seg.PixelData = bytes([7]) * (3 * 8 * 8)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (
            _moved,
            r"seg\.dcm is a segmentation that starts elsewhere than the slice .* same place; "
            r"export it",
        ),
        (
            _astray,
            r"seg\.dcm is a segmentation none of whose 3 frames lies on a slice of its series",
        ),
        (_flipped, r"seg\.dcm is a segmentation that runs in another direction"),
        (_coarser, r"seg\.dcm is a segmentation that has another pixel spacing"),
        (_smaller, r"seg\.dcm is a segmentation that has 16x4 pixels and its image 8x8"),
        (_without_segments, r"seg\.dcm cannot be read as a DICOM segmentation"),
        (_undescribed, r"holds the value 7, but describes no such segment; export it again"),
    ],
)
def test_segmentation_that_does_not_fit_is_named(spoil: Any, sentence: str, tmp_path: Path) -> None:
    slices = ct_series(tmp_path, np.zeros((3, 8, 8), np.int16))
    seg = segmentation(slices, np.ones((3, 8, 8), np.uint8))
    spoil(seg)
    save(seg, tmp_path / "seg.dcm")
    (item,) = find(tmp_path).items
    with pytest.raises(DataError, match=sentence):
        frames_of(item)


# An object store


def test_series_in_an_object_store_are_read_like_those_here(s3_bucket: str, tmp_path: Path) -> None:
    volume = np.random.default_rng(15).integers(0, 100, (3, 8, 8)).astype(np.int16)
    slices = ct_series(tmp_path, volume)
    save(segmentation(slices, _masks(16, (3, 8, 8))), tmp_path / "seg.dcm")
    large = dicom(np.zeros((2, 600, 600), np.uint8))
    large.add_new(
        0x00091010, "OB", bytes(1 << 19)
    )  # its header is longer than what is fetched first
    save(large, tmp_path / "large.dcm")
    (tmp_path / "bare.dcm").write_bytes((tmp_path / "large.dcm").read_bytes()[: 1 << 18])
    (tmp_path / "README").write_text("x" * (1 << 19))
    remote_folder = DataPath(s3_bucket) / "series"
    for path in tmp_path.iterdir():
        (remote_folder / path.name).atomic_write(path.read_bytes())
    local, remote = find(tmp_path), find_dicom(remote_folder, KEEP)
    assert [item.id for item in remote.items] == [item.id for item in local.items]
    assert remote.rejected == local.rejected
    assert [fault.file for fault in local.rejected] == ["bare.dcm"]
    for local_item, remote_item in zip(local.items, remote.items, strict=True):
        for frame, remote_frame in zip(frames_of(local_item), frames_of(remote_item), strict=True):
            np.testing.assert_array_equal(frame.image, remote_frame.image)
            assert (frame.mask is None) == (remote_frame.mask is None)
            assert frame.mask is None or np.array_equal(frame.mask, remote_frame.mask)


# Bad files


def test_folder_without_images_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x.dcm").write_bytes(b"")
    with pytest.raises(
        DataError, match=r"holds no DICOM image \(1 files .* x\.dcm is named like a DICOM file"
    ):
        find(tmp_path)
    with pytest.raises(DataError, match="no folder"):
        find(tmp_path / "gone")


def test_headers_that_cannot_be_used_are_faults_and_the_rest_is_kept(tmp_path: Path) -> None:
    ct_series(tmp_path / "good", np.zeros((2, 8, 8), np.int16))
    bare = dicom(np.zeros((8, 8), np.int16))
    del bare.PixelData
    save(bare, tmp_path / "bare.dcm")
    whole = save(dicom(np.zeros((8, 8), np.int16)), tmp_path / "cut.dcm")
    whole.write_bytes(whole.read_bytes()[:600])
    copy = next((tmp_path / "good").iterdir())
    (tmp_path / "copy").write_bytes(copy.read_bytes())
    seg = segmentation(
        ct_series(tmp_path.parent / "other", np.zeros((2, 8, 8), np.int16)),
        np.ones((2, 8, 8), np.uint8),
    )
    save(seg, tmp_path / "seg")
    listing = find(tmp_path)
    assert [len(item.images) for item in listing.items] == [2]
    reasons = {fault.file: fault.reason for fault in listing.rejected}
    assert reasons["bare.dcm"] == "claims to be a CT Image and holds no pixels"
    assert "cut.dcm" in reasons
    assert reasons["seg"] == "is a segmentation that refers to a series that is not here"
    assert sum(reason.startswith("is a second copy of ") for reason in reasons.values()) == 1


def _compressed(folder: Path) -> Path:
    dataset = dicom(np.random.default_rng(0).integers(0, 99, (8, 8)).astype(np.int16))
    dataset.compress(RLELossless)
    path = save(dataset, folder / "bad.dcm")
    path.write_bytes(path.read_bytes()[:-60])
    return path


def _cut(folder: Path) -> Path:
    path = save(dicom(np.zeros((8, 8), np.int16)), folder / "bad.dcm")
    path.write_bytes(path.read_bytes()[:-20])
    return path


def _unknown(folder: Path) -> Path:
    dataset = dicom(np.zeros((8, 8), np.int16))
    path = save(dataset, folder / "bad.dcm")
    path.write_bytes(path.read_bytes().replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.9\0"))
    return path


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (_cut, r"bad\.dcm cannot be decoded \(Explicit VR Little Endian: The number of bytes"),
        (_compressed, r"bad\.dcm holds no pixels, or ends before they do"),
        (_unknown, r"bad\.dcm cannot be decoded"),
        (lambda folder: folder / "bad.dcm", r"bad\.dcm cannot be read \(No such file"),
        (
            lambda folder: save(dicom(np.zeros((8, 8), np.int16), Rows=0), folder / "bad.dcm"),
            r"claims 8x0 pixels",
        ),
        (
            lambda folder: save(
                dicom(np.zeros((8, 8), np.int16), RescaleSlope=0), folder / "bad.dcm"
            ),
            r"bad\.dcm cannot be decoded .*rescale slope is 0",
        ),
        (
            lambda folder: save(
                dicom(np.zeros((8, 8, 3), np.uint8), PhotometricInterpretation="HSV"),
                folder / "bad.dcm",
            ),
            r"bad\.dcm cannot be decoded .*colors are of kind HSV",
        ),
    ],
)
def test_bad_file_is_named_in_one_sentence(
    make: Callable[[Path], Path], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=sentence) as caught:
        frames_of(item_of(make(tmp_path)))
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)
