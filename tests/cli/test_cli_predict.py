"""amlp-ray predict: what it writes and says, and one sentence for every bad input."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from amlp_ray.cli import main
from amlp_ray.config import ImageSpec, ModelConfig, PrepareConfig, SegmentConfig
from amlp_ray.evaluation.segmenter import Segmenter, save_segmenter
from amlp_ray.method.encoder import build_encoder


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A segmenter of 32 x 32 gray pixels, as it was drawn."""
    folder = tmp_path_factory.mktemp("segmenter")
    torch.manual_seed(1)
    encoder = ModelConfig(patch_size=8, width=24, depth=1, heads=2, decoder_width=16)
    config = SegmentConfig(decoder_width=8)
    spec = ImageSpec(channels=1, height=32, width=32, mean=(90,), std=(40,))
    model = Segmenter(build_encoder(encoder, spec), spec, config)
    save_segmenter(
        model,
        folder,
        encoder=encoder,
        spec=spec,
        prepare=PrepareConfig(size=32),
        config=config,
    )
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 200, (33, 47), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object
) -> tuple[int, str, str]:
    """Exit code, standard output, and standard error of a command."""
    monkeypatch.setattr(sys, "argv", ["amlp-ray", "predict", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    out = capsys.readouterr()
    return int(end.value.code or 0), out.out, out.err


def test_it_says_what_it_wrote_and_goes_on(
    images: Path,
    segmenter: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (images / "broken.png").write_bytes(b"")
    arguments = (images, "--segmenter", segmenter, "--out", tmp_path / "masks", "--overlay")
    code, out, _ = run(capsys, monkeypatch, *arguments)
    assert code == 0
    assert f"Wrote {tmp_path / 'masks'}: 2 predicted." in out
    assert f"1 file rejected, see {tmp_path / 'masks.rejects.csv'}." in out
    assert Image.open(tmp_path / "masks" / "1.png").size == (47, 33)
    assert Image.open(tmp_path / "masks.overlay" / "1.png").size == (47, 33)
    code, out, _ = run(capsys, monkeypatch, *arguments)
    assert (code, "0 predicted; 2 were there from before." in out) == (0, True)
    code, out, _ = run(
        capsys, monkeypatch, *arguments, "--json", "--overwrite", "--set", "flip_tta=true"
    )
    assert (code, json.loads(out)["predicted"]) == (0, 2)


@pytest.mark.parametrize("tiling", ["on", "off", "auto"])
def test_tiling_is_switched_as_yaml_reads_it(
    tiling: str,
    images: Path,
    segmenter: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = (
        images,
        "--segmenter",
        segmenter,
        "--out",
        tmp_path / "masks",
        "--set",
        f"tiling={tiling}",
    )
    assert run(capsys, monkeypatch, *arguments)[0] == 0
    assert (
        json.loads((tmp_path / "masks" / "predict.json").read_text())["config"]["tiling"] == tiling
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"images": "nowhere"}, "nowhere; check the path."),
        ({"--segmenter": "nowhere"}, "There is no nowhere/segmenter.safetensors"),
        ({"--set": "tiling=maybe"}, "tiling is 'maybe', but must be 'auto', 'off' or 'on'"),
        ({"--set": "overlap=1"}, "overlap is 1"),
        ({"--set": "tile=on"}, "unknown setting 'tile'"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(
    change: dict[str, str],
    sentence: str,
    images: Path,
    segmenter: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = {"images": images, "--segmenter": segmenter, "--out": tmp_path / "masks"} | change
    options = [
        text for name, value in arguments.items() if name != "images" for text in (name, value)
    ]
    code, out, err = run(capsys, monkeypatch, arguments["images"], *options)
    assert (code, out) == (2, "")
    assert sentence in err
    assert err.count("\n") == 1
    assert not (tmp_path / "masks").exists()
