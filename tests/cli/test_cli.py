"""The command line: bad input gets one sentence and exit code 2, and help imports nothing heavy."""

from __future__ import annotations

import inspect
import json
import logging
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from amlp_ray.cli import main
from amlp_ray.cli.data import prepare
from amlp_ray.cli.output import log_to_stderr
from amlp_ray.cli.run_options import DEFAULT_MAX_FAILURES
from amlp_ray.config import FaultToleranceConfig, PrepareConfig
from amlp_ray.data.dataset import PatchDataset


def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object
) -> tuple[int, str, str]:
    """Exit code, standard output, and standard error of a command."""
    monkeypatch.setattr(sys, "argv", ["amlp-ray", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    out = capsys.readouterr()
    return int(end.value.code or 0), out.out, out.err


@pytest.fixture
def paired(tmp_path: Path) -> Path:
    """Two good images with masks."""
    for folder in ("images", "masks"):
        (tmp_path / "source" / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        Image.fromarray(rng.integers(0, 255, (40, 40), dtype=np.uint8)).save(
            tmp_path / f"source/images/{name}.png"
        )
        Image.fromarray(np.eye(40, dtype=np.uint8) * 255).save(
            tmp_path / f"source/masks/{name}.png"
        )
    return tmp_path / "source"


def no_folder(source: Path) -> tuple[Path, str]:
    return source / "missing", "missing"


def no_images(source: Path) -> tuple[Path, str]:
    for file in source.rglob("*.png"):
        file.unlink()
    return source, "source"


def unreadable_image(source: Path) -> tuple[Path, str]:
    (source / "images/a.png").write_bytes(b"no image")
    return source, "a.png"


def mask_without_image(source: Path) -> tuple[Path, str]:
    (source / "images/a.png").unlink()
    return source, "a.png"


def mask_of_other_size(source: Path) -> tuple[Path, str]:
    Image.fromarray(np.eye(39, dtype=np.uint8) * 255).save(source / "masks/a.png")
    return source, "a.png"


@pytest.mark.ray
@pytest.mark.parametrize(
    "spoil", [no_folder, no_images, unreadable_image, mask_without_image, mask_of_other_size]
)
def test_bad_images_get_one_sentence_and_nothing_is_written(
    paired: Path,
    tmp_path: Path,
    ray_session: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    spoil: object,
) -> None:
    source, named = spoil(paired)  # type: ignore[operator]
    arguments = (source, tmp_path / "out", "--layout", "paired", "--size", 32)
    splits = ("--group-by", "image", "--fractions", "0.5,0.5,0", "--strict")
    code, _, err = run(capsys, monkeypatch, "data", "prepare", *arguments, *splits)
    assert code == 2, err
    *progress, sentence = err.splitlines()
    assert sentence.startswith("amlp-ray: ")
    assert all(line.startswith("Scanning ") for line in progress), "one sentence on one line"
    assert named in sentence
    assert not (tmp_path / "out").exists()


@pytest.mark.ray
@pytest.mark.parametrize("spoil", [unreadable_image, mask_without_image, mask_of_other_size])
def test_without_strict_the_rest_is_prepared_and_the_list_is_named(
    paired: Path,
    tmp_path: Path,
    ray_session: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    spoil: object,
) -> None:
    source, named = spoil(paired)  # type: ignore[operator]
    arguments = (source, tmp_path / "out", "--size", 32, "--fractions", "1,0,0")
    code, _, err = run(capsys, monkeypatch, "data", "prepare", *arguments)
    assert code == 0
    assert "paired: " in err, "the detected layout"
    assert f"1 file rejected and 0 repaired, see {tmp_path}/out.rejects.csv" in err
    assert named in (tmp_path / "out.rejects.csv").read_text()
    assert PatchDataset.open(tmp_path / "out").load("train").ids == ["b"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layout", "busy"], "layout is 'busy'"),
        (["--lesion-labels", "1;2"], "--lesion-labels is '1;2', but numbers between commas"),
        (["--lesion-labels", "0"], "lesion_labels must be whole numbers from 1"),
        (["--window", "5,1", "--values", "window"], "window must be a low and a higher value"),
        (["--window", "1,5"], "window needs values=window"),
        (["--overlap", "0.5"], "overlap and scale need fit=tiles"),
        (["--fractions", "1,1,1"], "fractions must be"),
        (["--size", "3"], "size is 3"),
        (["--channels", "many"], "--channels is 'many', but one number must be given"),
        (["--fractions", "1,2"], "--fractions is '1,2', but 3 numbers"),
        (["--file-list", "x", "--layout", "dicom"], "file_list needs layout=flat"),
    ],
)
def test_bad_preparations_get_one_sentence_before_ray_starts(
    paired: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    code, _, err = run(capsys, monkeypatch, "data", "prepare", paired, tmp_path / "out", *arguments)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "epohs=3"], "did you mean epochs"),
        (["--set", "selection.clusters=1"], "selection.clusters is 1"),
        (["--set", "ratio.end=1.2"], "ratio.end is 1.2"),
        (["--set", "epochs"], "name=value"),
        (["--set", "variant=mea"], "variant is 'mea'"),
        (["--gpus-per-worker", "64"], "gpus_per_worker=64"),
        (
            ["--workers", "17", "--cpus-per-worker", "0.1"],
            "batch_size 16 is less than resources.workers 17",
        ),
        (["--config", "absent.yaml"], "absent.yaml"),
        (["--workers", "0"], "workers: a number from 1 on"),
        (
            ["--workers", "8-2"],
            "or the least and the most, such as 2-8 ([2, 8] in a file), not 8-2",
        ),
        (["--workers", "many"], "neither a number, such as 4, nor a range"),
        (["--cpus-per-worker", "0"], "cpus_per_worker is 0"),
    ],
)
def test_bad_settings_get_one_sentence_and_nothing_is_written(
    phantom_dataset: PatchDataset,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    out = tmp_path / "out"
    code, _, err = run(
        capsys, monkeypatch, "pretrain", phantom_dataset.path, "--out", out, *arguments
    )
    sentence = next(line for line in err.splitlines() if line.startswith("amlp-ray: "))
    assert code == 2
    assert message in sentence
    assert "Traceback" not in err
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data", "show", "nowhere"], "nowhere"),
        (["pretrain", "nowhere", "--out", "out"], "nowhere"),
        (["study", "status", "nothing"], "nothing"),
        (["study", "plan", "absent.yaml", "--data", "x"], "absent.yaml"),
        (["study", "report", "nothing"], "nothing"),
    ],
)
def test_what_is_not_there_is_named(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, monkeypatch, *arguments)
    assert code == 2
    assert message in err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_the_main_job_from_the_command_line(
    phantom_dataset: PatchDataset,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code, out, _ = run(capsys, monkeypatch, "data", "show", phantom_dataset.path, "--json")
    assert code == 0
    assert json.loads(out)["splits"]["train"]["images"] == 36
    model = [
        "model.width=24",
        "model.depth=1",
        "model.heads=2",
        "model.decoder_width=16",
        "epochs=2",
    ]
    parse_overrides = [part for setting in model for part in ("--set", setting)]
    code, out, err = run(
        capsys,
        monkeypatch,
        "pretrain",
        phantom_dataset.path,
        "--out",
        tmp_path / "pre",
        *parse_overrides,
    )
    assert code == 0, err
    assert "loss" in err, "the progress bar"
    encoder = tmp_path / "pre" / "encoder.safetensors"
    command = ["segment", phantom_dataset.path, "--encoder", encoder, "--set", "epochs=1", "--json"]
    for name, more in (("own", []), ("scratch", ["--from-scratch"])):
        code, out, err = run(capsys, monkeypatch, *command, "--out", tmp_path / name, *more)
        assert code == 0, err
        assert {"dsc", "ppv", "sensitivity"} <= json.loads(out).keys()
        assert (tmp_path / name / "segmenter.safetensors").is_file()


def test_the_version_is_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(capsys, monkeypatch, "--version") == (0, f"amlp-ray {version('amlp-ray')}\n", "")


def test_defaults_of_options_are_those_of_the_settings() -> None:
    assert FaultToleranceConfig().max_failures == DEFAULT_MAX_FAILURES
    defaults = {name: p.default for name, p in inspect.signature(prepare).parameters.items()}
    config = PrepareConfig().model_dump()
    assert {name: defaults[name] for name in config} == config | {
        "fractions": ",".join(map(str, config["fractions"])),
        "lesion_labels": None,
        "balance_columns": None,
    }


def test_every_setting_of_a_dataset_is_an_option_and_every_other_option_is_named_here() -> None:
    options = inspect.signature(prepare).parameters.keys()
    others = {"context", "source", "out", "strict", "address"}
    assert options == {*PrepareConfig.model_fields, *others}


def test_messages_are_printed_on_stderr_as_bare_text_while_a_command_runs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logger = logging.getLogger("amlp_ray.some.module")
    with log_to_stderr():
        logger.debug("nothing for users")
        logger.info("Found 3 images.")
        logger.warning("One is damaged.")
    logger.info("nobody listens")
    assert capsys.readouterr() == ("", "Found 3 images.\nOne is damaged.\n")


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from amlp_ray.cli import app\n"
        "for words in ([], ['study'], ['data', 'prepare'], ['pretrain'], ['segment']):\n"
        "    assert CliRunner().invoke(app, [*words, '--help']).exit_code == 0\n"
        "heavy = 'torch ray optuna monai timm pandas plotly sklearn yaml'.split()\n"
        "print([m for m in heavy if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_out_that_is_a_file_gets_one_sentence(
    phantom_dataset: PatchDataset,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        code, _, err = run(
            capsys, monkeypatch, "pretrain", phantom_dataset.path, "--out", out, "--set", "epochs=1"
        )
        assert code == 2
        assert err.startswith("amlp-ray: ")
        assert str(tmp_path / "file") in err
        assert err.count("\n") == 1
    assert (tmp_path / "file").read_text() == "mine"


def test_a_segmenter_does_not_overwrite_a_pretraining_run(
    phantom_dataset: PatchDataset,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small = [
        part
        for s in ("model.width=24", "model.depth=1", "model.heads=2", "epochs=1")
        for part in ("--set", s)
    ]
    pre = tmp_path / "pre"
    assert run(capsys, monkeypatch, "pretrain", phantom_dataset.path, "--out", pre, *small)[0] == 0
    before = (pre / "config.yaml").read_text()
    command = [
        "segment",
        phantom_dataset.path,
        "--encoder",
        pre / "encoder.safetensors",
        "--out",
        pre,
    ]
    code, _, err = run(capsys, monkeypatch, *command)
    assert code == 2
    assert "holds a pretraining run" in err
    assert (pre / "config.yaml").read_text() == before
    readable = (pre / "encoder.safetensors").stat().st_mode & 0o777
    assert readable == (pre / "config.yaml").stat().st_mode & 0o777, (
        "readable for colleagues as any other file"
    )


def test_a_fault_of_a_file_is_told_as_the_files(
    phantom_dataset: PatchDataset,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("epoch: 3\n")
    code, _, err = run(
        capsys,
        monkeypatch,
        "pretrain",
        phantom_dataset.path,
        "--out",
        tmp_path / "o",
        "--config",
        config,
    )
    assert code == 2
    assert err.startswith(f"amlp-ray: {config}:1: unknown setting 'epoch'")


def test_the_random_encoder_is_no_training_and_no_error(
    phantom_dataset: PatchDataset,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "scratch"
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "amlp-ray",
            "pretrain",
            phantom_dataset.path,
            "--out",
            str(out),
            "--set",
            "variant=scratch",
        ],
    )
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    assert (out / "encoder.safetensors").is_file()
    assert "pictures" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "command",
    [
        ["pretrain", "{data}", "--out", "s3://bucket/run"],
        ["segment", "{data}", "--encoder", "e.safetensors", "--out", "s3://bucket/run"],
        ["data", "phantoms", "s3://bucket/images"],
        ["data", "check", "{data}", "--out", "s3://bucket/check"],
        ["method", "bench", "{data}", "--out", "s3://bucket/rules.csv"],
        ["inspect", "s3://bucket/run"],
        ["study", "init", "mine", "--folder", "s3://bucket/studies"],
        ["study", "plan", "{study}", "--data", "{data}", "--runs", "s3://bucket/runs"],
        ["study", "run", "{study}", "--data", "{data}", "--runs", "s3://bucket/runs"],
        ["study", "status", "s", "--runs", "s3://bucket/runs"],
        ["study", "list", "--runs", "s3://bucket/runs"],
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_a_uri_where_a_path_is_needed_gets_one_sentence_and_makes_no_folder(
    command: list[str],
    phantom_dataset: PatchDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "study.yaml").write_text("name: s\n")
    places = {"data": phantom_dataset.path, "study": "study.yaml"}
    code, _, err = run(capsys, monkeypatch, *(word.format(**places) for word in command))
    assert code == 2
    assert "s3://bucket/" in err
    assert "is a URI, but this must be a path of a file system" in err
    assert [path.name for path in tmp_path.iterdir()] == ["study.yaml"]
