"""Every finding on small datasets where the answer is known, and none of them on a clean one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers.datasets import write_dataset
from PIL import Image, ImageDraw, ImageFont

import amlp_ray.data.check.measure as measure
from amlp_ray.data.check import Finding, Report, check_dataset
from amlp_ray.data.check.burned_in_text import text_scores
from amlp_ray.data.check.contact_sheet import draw_examples, draw_picture
from amlp_ray.data.check.duplicates import unusual_distance
from amlp_ray.data.check.html import write_page, write_report
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.data.manifest import GROUP_RULES
from amlp_ray.data.prepare.near_duplicates import perceptual_hash
from amlp_ray.errors import DataError

SIZE = 64
COUNT = 60
SPLITS = ["train"] * 36 + ["val"] * 12 + ["test"] * 12


def tissue(seed: int, size: int = SIZE) -> np.ndarray:
    """A smooth gray image (H, W) uint8 of usual brightness that looks like no other."""
    coarse = np.random.default_rng(seed).normal(110, 30, (8, 8)).clip(20, 200).astype(np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC))


def disc(radius: float = 10, y: float = 30, x: float = 32, size: int = SIZE) -> np.ndarray:
    rows, columns = np.mgrid[:size, :size]
    return (np.hypot(rows - y, columns - x) < radius).astype(np.uint8)


class Clean:
    """What a dataset without any finding is made of, to be spoilt in one way by a test."""

    def __init__(self) -> None:
        self.images = np.stack([tissue(seed) for seed in range(COUNT)])[:, None]
        self.masks: list[np.ndarray | None] = [disc() for _ in range(COUNT)]
        self.columns: dict[str, Any] = {"split": list(SPLITS), "background": 0.0}

    def check(self, folder: Path, **options: Any) -> Report:
        return check_dataset(self.make(folder), **options)

    def make(self, folder: Path) -> PatchDataset:
        return write_dataset(folder, self.images, self.masks, rows_per_part=10, **self.columns)


@pytest.fixture
def clean() -> Clean:
    return Clean()


def keys(report: Report) -> list[str]:
    return [finding.key for finding in report.findings]


def finding(report: Report, key: str) -> Finding:
    return next(f for f in report.findings if f.key == key)


def ids(finding: Finding) -> set[str]:
    return {example.image.id for example in finding.examples}


def test_a_clean_dataset_has_no_finding(clean: Clean, tmp_path: Path) -> None:
    report = clean.check(tmp_path / "d")
    assert keys(report) == []
    assert report.clean
    assert {f.key for f in report.gaps} == {"burned-in-text", "mixed-spacing", "uneven-classes"}
    assert len(report.clear) + len(report.gaps) == len(report.checks)


def spoil_nan(data: Clean) -> None:
    data.images = data.images.astype(np.float32)
    data.images[3, 0, 5, 5:7] = np.nan


def spoil_constant(data: Clean) -> None:
    data.images[3] = 90
    data.images[4] = 90
    data.images[4, 0, 0, 0] = 91


def spoil_brightness(data: Clean) -> None:
    data.images[3] = 255 - data.images[3] // 16


def spoil_saturated(data: Clean) -> None:
    data.images[3] = data.images[3].clip(0, np.percentile(data.images[3], 90))


def spoil_sizes(data: Clean) -> None:
    data.columns |= {"height": [600] * COUNT, "width": [800] * COUNT}
    data.columns["height"][3], data.columns["width"][3] = 200, 800
    data.columns["height"][4], data.columns["width"][4] = 3000, 4000


def spoil_enlarged(data: Clean) -> None:
    data.columns |= {"height": [64] * COUNT, "width": [64] * COUNT}
    data.columns["height"][3] = data.columns["width"][3] = 40


def spoil_spacing(data: Clean) -> None:
    data.columns |= {"spacing_y": [0.5] * COUNT, "spacing_x": [0.5] * COUNT}
    data.columns["spacing_y"][3] = data.columns["spacing_x"][3] = 0.7


def spoil_background(data: Clean) -> None:
    data.columns["background"] = [0.95 if i == 3 else 0.5 for i in range(COUNT)]


def spoil_masks(mask: np.ndarray | None) -> Callable[[Clean], None]:
    def spoil(data: Clean) -> None:
        data.masks[3] = mask

    return spoil


def spoil_group(data: Clean) -> None:
    data.columns["groups"] = [f"g{i}" for i in range(COUNT)]
    data.columns["groups"][40] = "g3"


def spoil_copy(to: int, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Clean], None]:
    def spoil(data: Clean) -> None:
        data.images[to] = change(data.images[3])

    return spoil


@pytest.mark.parametrize(
    ("spoil", "key", "severity", "expected"),
    [
        (spoil_nan, "not-finite", "warning", {"image 3"}),
        (spoil_constant, "constant", "warning", {"image 3", "image 4"}),
        (spoil_brightness, "brightness", "note", {"image 3"}),
        (spoil_saturated, "saturated", "note", {"image 3"}),
        (spoil_sizes, "odd-sizes", "note", {"image 3", "image 4"}),
        (spoil_enlarged, "enlarged", "note", {"image 3"}),
        (spoil_spacing, "mixed-spacing", "note", {"image 3"}),
        (spoil_background, "background", "note", {"image 3"}),
        (spoil_masks(None), "unlabeled", "note", {"image 3"}),
        (spoil_masks(np.zeros((SIZE, SIZE), np.uint8)), "empty-masks", "note", {"image 3"}),
        (spoil_masks(disc(4)), "tiny-lesions", "warning", {"image 3"}),
        (spoil_masks(disc(10, y=3)), "lesions-at-border", "note", {"image 3"}),
        (spoil_masks(disc(10, x=60)), "lesions-at-border", "note", {"image 3"}),
        (spoil_masks(1 - disc(6) * (disc() > 0)), "large-masks", "warning", {"image 3"}),
        (spoil_group, "groups-across-splits", "leak", {"image 3"}),
        (
            spoil_copy(50, lambda image: image // 2 + 60),
            "copies-across-splits",
            "leak",
            {"image 50"},
        ),
        (spoil_copy(50, lambda image: image), "copies-across-splits", "leak", {"image 50"}),
        (spoil_copy(7, lambda image: image // 2 + 60), "near-copies", "note", {"image 7"}),
        (spoil_copy(7, lambda image: image), "exact-copies", "warning", {"image 7"}),
    ],
)
def test_each_finding_names_its_images(
    spoil: Callable[[Clean], None],
    key: str,
    severity: str,
    expected: set[str],
    clean: Clean,
    tmp_path: Path,
) -> None:
    spoil(clean)
    report = clean.check(tmp_path / "d")
    actual = finding(report, key)
    assert (actual.severity, actual.count) == (severity, len(expected))
    assert ids(actual) == expected
    consequences = {
        "exact-copies",
        "near-copies",
        "brightness",
        "lesions-at-border",
        "copies-across-splits",
    }
    assert set(keys(report)) - consequences <= {key}


def test_a_copy_is_shown_with_what_it_resembles(clean: Clean, tmp_path: Path) -> None:
    clean.images[50] = clean.images[3]
    clean.masks[50] = disc(12)
    report = clean.check(tmp_path / "d")
    across, exact = finding(report, "copies-across-splits"), finding(report, "exact-copies")
    assert across.of == 24
    (example,) = across.examples
    assert (example.image.split, example.image.row, example.value) == ("test", 2, "equal hash")
    assert example.like is not None
    assert (example.like.id, example.like.split, example.like.row) == ("image 3", "train", 3)
    assert exact.examples[0].value == "identical, but other mask"
    assert exact.meaning.endswith("another mask or folder than the first: 1.")


def test_copies_in_different_class_folders_are_told(clean: Clean, tmp_path: Path) -> None:
    clean.images[9] = clean.images[3]
    clean.columns["source"] = [
        f"{'benign' if i % 2 else 'malignant'}/{i}.png" for i in range(COUNT)
    ]
    clean.columns["source"][9] = "malignant/9.png"
    copies = finding(clean.check(tmp_path / "d"), "exact-copies")
    assert copies.examples[0].value == "identical, but malignant and benign"


def test_a_pretraining_set_that_holds_test_images_is_a_leak(clean: Clean, tmp_path: Path) -> None:
    pretraining = Clean()
    pretraining.masks = [None] * COUNT
    pretraining.images = np.stack([tissue(1000 + i) for i in range(COUNT)])[:, None]
    pretraining.columns["split"] = "train"
    pretraining.images[5] = clean.images[55] // 2 + 50  # of test
    pretraining.images[6] = clean.images[0] // 2 + 50  # of train
    report = pretraining.check(tmp_path / "p", against=clean.make(tmp_path / "d"))
    leak, shared = finding(report, "copies-in-other"), finding(report, "shared-with-other")
    assert (leak.severity, leak.count, ids(leak)) == ("leak", 1, {"image 5"})
    assert (shared.severity, shared.count, ids(shared)) == ("note", 1, {"image 6"})
    like = leak.examples[0].like
    assert like is not None
    assert (like.id, like.split, like.row, like.other) == ("image 55", "test", 7, True)
    write_report(report, tmp_path / "out")

    back = check_dataset(tmp_path / "d", against=str(tmp_path / "p"))
    assert ids(finding(back, "copies-in-other")) == {"image 55"}
    with pytest.raises(DataError, match="cannot be compared with itself"):
        check_dataset(tmp_path / "d", against=tmp_path / "d")


def test_one_chain_of_most_images_is_a_warning(clean: Clean, tmp_path: Path) -> None:
    clean.images[:30] = clean.images[0]
    clean.images[:30, 0, 0, 0] = np.arange(30)
    report = clean.check(tmp_path / "d")
    assert finding(report, "one-chain").count == 30
    assert finding(report, "near-copies").count == 29
    clean.columns["groups"] = ["volume 1"] * 30 + [f"g{i}" for i in range(30, COUNT)]
    assert not {"one-chain", "near-copies"} & set(keys(clean.check(tmp_path / "v")))


def test_a_patient_under_two_names_is_a_note_where_patients_do_not_look_alike(
    clean: Clean, tmp_path: Path
) -> None:
    clean.images[50] = clean.images[3]  # of test and of train
    assert "copies-across-splits" in keys(clean.check(tmp_path / "unknown"))
    clean.columns |= {"group_rule": GROUP_RULES["patient"]}
    report = clean.check(tmp_path / "patients")
    alike = finding(report, "look-alikes-across-splits")
    assert (alike.severity, alike.count, ids(alike)) == ("note", 1, {"image 50"})
    assert "copies-across-splits" not in keys(report)
    assert "near-duplicates" not in alike.todo
    assert "at most 8 of 64 bits, as found on this set" in alike.meaning


def test_where_patients_look_alike_likeness_is_no_finding_and_no_reason_to_join_them(
    clean: Clean, tmp_path: Path
) -> None:
    clean.images[:30] = clean.images[0]  # training images of different patients
    clean.images[50] = clean.images[3]
    assert {"copies-across-splits", "one-chain"} <= set(keys(clean.check(tmp_path / "unknown")))
    clean.columns |= {"group_rule": GROUP_RULES["patient"]}
    found = set(keys(clean.check(tmp_path / "patients")))
    assert not {"copies-across-splits", "look-alikes-across-splits", "one-chain"} & found
    assert "near-copies" not in found


def test_the_threshold_lies_below_what_training_patients_show() -> None:
    """Of 200 training images, one pair in fifty of other patients differs in 5 bits."""
    rng = np.random.default_rng(0)
    hashes = rng.integers(1, 2**63, 240, dtype=np.uint64)
    for i in range(0, 8, 2):
        hashes[i + 1] = hashes[i] ^ np.uint64(0b11111)
    split = np.array(["train"] * 200 + ["test"] * 40)
    groups = np.array([f"P{i}" for i in range(240)])
    table = pd.DataFrame({"split": split, "group": groups})
    assert unusual_distance(table, hashes) == 4
    table["group"] = groups.copy()
    table.loc[range(8), "group"] = [f"Q{i // 2}" for i in range(8)]  # each pair of one patient
    assert unusual_distance(table, hashes) == 8


def test_a_group_in_several_chains_counts_once(clean: Clean, tmp_path: Path) -> None:
    """Two groups of three images each, alike image by image: one of two groups is a copy."""
    clean.images[3:6] = clean.images[:3] // 2 + 60
    clean.columns["groups"] = ["a"] * 3 + ["b"] * 3 + [f"g{i}" for i in range(6, COUNT)]
    near_copies = finding(clean.check(tmp_path / "d"), "near-copies")
    assert (near_copies.count, near_copies.of) == (1, COUNT - 4)


def test_uneven_splits_are_told(clean: Clean, tmp_path: Path) -> None:
    for i in range(48, 58):
        clean.masks[i] = np.zeros((SIZE, SIZE), np.uint8)
    clean.columns["source"] = ["a/x.png"] * 30 + ["b/x.png"] * 30
    clean.columns["groups"] = [f"g{i}" for i in range(48)] + ["h1", "h2"] * 6
    report = clean.check(tmp_path / "d")
    assert "lesion 17% of test against 83% of all" in finding(report, "uneven-lesions").meaning
    assert "a 83% of train against 50% of all" in finding(report, "uneven-classes").meaning
    assert finding(report, "few-groups").meaning.endswith("Here: test 2.")


def test_an_unlabeled_dataset_of_one_split_and_an_empty_one_can_be_checked(tmp_path: Path) -> None:
    images = np.stack([tissue(i) for i in range(12)])[:, None]
    report = check_dataset(write_dataset(tmp_path / "u", images, background=0.0))
    assert keys(report) == ["unlabeled"]
    assert {f.key for f in report.gaps} > {
        "empty-masks",
        "tiny-lesions",
        "large-masks",
        "uneven-lesions",
    }
    assert keys(check_dataset(write_dataset(tmp_path / "e", images[:0]))) == []


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
@pytest.mark.parametrize("channels", [1, 2, 3])  # 2: any number that is neither gray nor color
def test_every_type_and_number_of_channels_is_measured_and_drawn(
    dtype: str, channels: int, tmp_path: Path
) -> None:
    scale = {"uint8": 1.0, "uint16": 200.0, "int16": 20.0, "float32": 1 / 255}[dtype]
    images = np.stack(
        [np.stack([tissue(i + 50 * c, 128) for c in range(channels)]) for i in range(12)]
    )
    images = (images * scale).astype(dtype)
    images[1] = images[0]
    table = measure.measure_dataset(data := write_dataset(tmp_path / "d", images))
    assert table["mean"].to_numpy() == pytest.approx(
        images.mean(axis=(1, 2, 3), dtype=float), rel=1e-4
    )
    assert table["sd"].to_numpy() == pytest.approx(
        images.std(axis=(1, 2, 3), dtype=float), rel=1e-3
    )
    assert (table["text"] == 0).all()
    assert table["digest"].nunique() == 11
    report = check_dataset(data)
    assert finding(report, "exact-copies").count == 1
    page, sheet = write_report(report, tmp_path / "out")
    assert page.stat().st_size > 10_000
    assert Image.open(sheet).width > 500


def test_pieces_and_row_groups_change_nothing(
    clean: Clean, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = clean.make(tmp_path / "d")
    whole = measure.measure_dataset(data)
    monkeypatch.setattr(measure, "CHUNK_VALUES", 3 * SIZE * SIZE)
    monkeypatch.setattr(measure, "THREADS", 1)
    pieces = measure.measure_dataset(data)
    assert whole.equals(pieces)
    assert whole["id"].tolist() == data.table()["id"].tolist()
    assert whole["row"].tolist() == [*range(36), *range(12), *range(12)]


def speckle(seed: int, size: int = 256) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (tissue(seed, size) * rng.uniform(0.5, 1.2, (size, size))).clip(0, 200).astype(np.uint8)


def with_text(
    image: np.ndarray, text: str, at: tuple[int, int] = (40, 180), height: int = 12
) -> np.ndarray:
    picture = Image.fromarray(image)
    ImageDraw.Draw(picture).text(at, text, fill=255, font=ImageFont.load_default(height))
    return np.asarray(picture)


def test_letters_are_counted_where_there_are_any() -> None:
    dark = np.stack([speckle(i) // 3 for i in range(6)])
    assert text_scores(dark).tolist() == [0] * 6
    written = np.stack([with_text(image, "L E F T  4 7 1") for image in dark])
    assert (text_scores(written) >= 5).all()
    turned = np.ascontiguousarray(written.transpose(0, 2, 1))
    assert (text_scores(turned) >= 5).all()
    mixed = np.stack([dark[0], written[1], dark[2]])
    assert (text_scores(mixed) > 0).tolist() == [False, True, False]
    assert text_scores(np.zeros((2, 128, 128), np.uint8)).tolist() == [0, 0]
    assert text_scores(np.zeros((0, 128, 128), np.uint8)).tolist() == []


def test_burned_in_text_is_a_warning(tmp_path: Path) -> None:
    images = np.stack([speckle(i) // 3 for i in range(12)])
    images[4] = with_text(images[4], "D O E  J O H N")
    burned_in = finding(
        check_dataset(write_dataset(tmp_path / "d", images[:, None])), "burned-in-text"
    )
    assert (burned_in.severity, burned_in.count, ids(burned_in)) == ("warning", 1, {"image 4"})


def test_a_lesion_is_outlined_whatever_its_size() -> None:
    image = tissue(0)[None]
    for radius in (1, 10, 28):
        pixels = np.asarray(draw_picture(image, disc(radius)))
        colored = (pixels != pixels[..., :1]).any(axis=2)
        assert colored.any()
        assert colored.mean() < 0.1
    large = np.zeros((1000, 1000), np.uint8)
    large[500, 500] = 1
    assert np.asarray(draw_picture(tissue(0, 1000)[None], large)).std(axis=2).any()


def test_json_page_and_sheet_tell_the_same(clean: Clean, tmp_path: Path) -> None:
    spoil_masks(disc(4))(clean)
    clean.images[50] = clean.images[5]
    clean.columns["id"] = [f"case <b>{i}</b> & 'co'" for i in range(COUNT)]
    report = clean.check(tmp_path / "d")
    values = json.loads(json.dumps(report.as_dict()))
    assert [f["key"] for f in values["findings"]] == [
        "copies-across-splits",
        "exact-copies",
        "tiny-lesions",
    ]
    assert values["clean"] is False
    assert values["findings"][2]["examples"][0]["image"]["id"] == "case <b>3</b> & 'co'"
    page, sheet = write_report(report, tmp_path / "out")
    text = page.read_text()
    assert "<b>" not in text
    assert "case &lt;b&gt;3&lt;/b&gt; &amp; &#39;co&#39;" in text
    assert not re.findall(r'(?:src|href)="(?!data:image/png;base64,|#)', text)
    assert "http" not in text
    assert text.count('<article class="finding"') == 3
    assert text.count("<img ") == 5
    picture = Image.open(sheet)
    assert picture.height > 3 * 160
    orange = (np.asarray(picture.convert("RGB")) == (255, 176, 0)).all(axis=2)
    assert orange.any()


def test_a_clean_report_is_written_too(clean: Clean, tmp_path: Path) -> None:
    page, sheet = write_report(clean.check(tmp_path / "d"), tmp_path / "out")
    assert "Nothing was found." in page.read_text()
    assert sheet.is_file()


CHROMIUM = next(
    (
        path
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (path := shutil.which(name))
    ),
    None,
)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome on this machine")
def test_a_browser_shows_every_picture(clean: Clean, tmp_path: Path) -> None:
    clean.images[50] = clean.images[5]
    report = clean.check(tmp_path / "d")
    page = write_page(report, draw_examples(report), tmp_path / "check.html")
    count = """<script>onload = () => { const all = [...document.images];
      const loaded = all.filter(i => i.complete && i.naturalWidth === 160).length;
      document.title = loaded + "/" + all.length + " wide "
        + (document.documentElement.scrollWidth <= innerWidth); };</script></body>"""
    page.write_text(page.read_text().replace('loading="lazy"', "").replace("</body>", count))
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--virtual-time-budget=5000",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom",
        page.as_uri(),
    ]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert "<title>4/4 wide true</title>" in dom


@pytest.mark.real
def test_real_ultrasound_shows_its_letters_and_dermoscopy_has_none(
    real_data: Path, tmp_path: Path
) -> None:
    def read(files: list[Path]) -> np.ndarray:
        return np.stack(
            [np.asarray(Image.open(file).convert("L").resize((256, 256), 3)) for file in files]
        )

    written = [
        "benign (1)",
        "benign (3)",
        "benign (4)",
        "normal (31)",
        "malignant (12)",
        "malignant (13)",
    ]
    folder = real_data / "busi" / "Dataset_BUSI_with_GT"
    files = [
        file for name in written if (file := folder / name.split()[0] / f"{name}.png").is_file()
    ]
    assert len(files) >= 4
    assert (text_scores(read(files)) >= 5).all()
    assert not text_scores(read(sorted((real_data / "isic2017" / "images").glob("*.jpg")))).any()
    assert perceptual_hash(read(files[:1])[0][..., None])
