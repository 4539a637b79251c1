"""amlp-ray method: a table for people, CSV and JSON for programs, one sentence for bad input."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.datasets import write_dataset

from amlp_ray.analysis.localization_candidates import DEFAULT_RULE, all_candidates
from amlp_ray.cli import main
from amlp_ray.data.phantoms import draw_phantom


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """6 ultrasound phantoms of 32 pixels with lesions, all in train, written without Ray."""
    drawn = [
        draw_phantom("ultrasound", 32, np.random.default_rng(i), lesion=True) for i in range(6)
    ]
    images = np.stack([image for image, _ in drawn]).astype(np.uint8)[:, None]
    folder = tmp_path_factory.mktemp("prepared") / "phantoms"
    write_dataset(folder, images, [mask > 0 for _, mask in drawn])
    return folder


def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object
) -> tuple[int, str, str]:
    """Exit code, standard output, and standard error of `amlp-ray method bench`."""
    monkeypatch.setattr(sys, "argv", ["amlp-ray", "method", "bench", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    out = capsys.readouterr()
    return int(end.value.code or 0), out.out, out.err


def test_the_table_is_sorted_by_f1_in_each_block_and_csv_and_json_hold_every_row(
    prepared: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    few = [
        c
        for c in all_candidates()
        if c.selection is None
        or c == DEFAULT_RULE
        or (c.selection.features, c.selection.clusters) == ("raw", 3)
    ]
    monkeypatch.setattr(
        "amlp_ray.analysis.localization.all_candidates", lambda **_: few
    )  # all of them take seconds
    file = tmp_path / "all.csv"
    code, out, err = run(capsys, monkeypatch, prepared, "--seeds", 1, "--top", 3, "--out", file)
    assert code == 0, err
    blocks = [block.splitlines() for block in out.split("\n\n")]
    block = next(lines for lines in blocks if lines[0] == "clusters of an image")
    assert len(block) == 2 + 3, "title, head, and three rows"
    with file.open() as text:
        rows = list(csv.DictReader(text))
    best = sorted(
        (float(row["f1"]) for row in rows if row["block"] == "clusters of an image"), reverse=True
    )[:3]
    f1 = [float(line.split()[-7]) for line in block[2:]]
    assert f1 == pytest.approx(best, abs=6e-4)
    assert "tuning on labels" in out.splitlines()[-2]
    assert blocks[-2][0].startswith("These labels would choose ")

    code, out, _ = run(capsys, monkeypatch, prepared, "--seeds", 1, "--json")
    assert code == 0
    printed = json.loads(out)
    assert [row["name"] for row in printed["rows"]] == [row["name"] for row in rows]
    assert printed["choice"]["name"] in {row["name"] for row in rows}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--split", "test"], "last look"),
        (["--split", "tset"], "tset"),
        (["--split", "val"], "No image of val"),
        (["--patch-size", "5"], "--patch-size 5 does not divide the images of 32x32"),
        (["--encoder", "absent.safetensors"], "absent.safetensors"),
        (["--out", "absent/all.csv"], "absent"),
    ],
)
def test_bad_input_gets_one_sentence(
    prepared: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    code, out, err = run(capsys, monkeypatch, prepared, *arguments)
    assert code == 2, err
    assert out == ""
    assert err.startswith("amlp-ray: ")
    assert err.count("\n") == 1
    assert message in err
