from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from amlp_ray.cli import main
from amlp_ray.config import PretrainConfig
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.launch.job import run_job
from amlp_ray.launch.run_spec import RunSpec
from amlp_ray.training.pretrain import Hooks


@pytest.fixture(scope="module")
def run_folder(phantom_dataset: PatchDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs."""
    folder = tmp_path_factory.mktemp("inspected") / "run"
    model = {"width": 24, "depth": 1, "heads": 2, "decoder_width": 16}
    config = PretrainConfig.model_validate({"epochs": 2, "batch_size": 12, "model": model})
    run_job(RunSpec(config=config, data=str(phantom_dataset.path), folder=folder), Hooks())
    return folder


def inspect(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Exit code of `amlp-ray inspect`."""
    monkeypatch.setattr(sys, "argv", ["amlp-ray", "inspect", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


def test_a_table_of_images_and_of_the_run_s_figures_is_printed_with_the_path(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert inspect(monkeypatch, run_folder, "--count", 2) == 0
    lines = capsys.readouterr().out.splitlines()
    inspection = json.loads((run_folder / "inspect" / "inspection.json").read_text())
    for row in inspection["images"]:
        assert any(line.split()[0] == row["id"] for line in lines if line.strip())
    mean = next(line.split() for line in lines if line.split()[:1] == ["mean"])
    assert f"{inspection['mean']['recall']:.4g}" in mean
    loss = next(line.split() for line in lines if line.split()[:1] == ["loss_reference"])
    assert loss[1:] == [
        f"{inspection['metrics']['loss_reference'][at]:.4g}" for at in ("first", "last")
    ]
    assert lines[-1] == f"pictures: {run_folder / 'inspect' / 'sheet.png'}"
    assert not any("not the data of the run" in line for line in lines)


def test_json_is_what_the_folder_holds_and_where_the_sheet_is(
    run_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert (
        inspect(
            monkeypatch, run_folder, "--json", "--out", tmp_path / "out", "--epoch", 1, "--seed", 3
        )
        == 0
    )
    printed = json.loads(capsys.readouterr().out)
    assert Path(printed.pop("sheet")).is_file()
    assert printed == json.loads((tmp_path / "out" / "inspection.json").read_text())
    assert printed["epoch"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--count", 0], "count is 0"),
        (["--epoch", 3], "epochs 1 to 2"),
        (["--data", "absent"], "absent"),
        (["--out", "taken"], "taken"),
    ],
)
def test_bad_input_gets_one_sentence_and_exit_code_2(
    run_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[object],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("a file")
    assert inspect(monkeypatch, run_folder, *arguments) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("amlp-ray: ")
    assert err.count("\n") == 1
    assert message in err
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_missing_run_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert inspect(monkeypatch, tmp_path / "absent") == 2
    assert "absent does not exist" in capsys.readouterr().err
