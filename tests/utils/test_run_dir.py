"""A folder holds one run, and says which."""

from __future__ import annotations

import errno
import fcntl
import json
from pathlib import Path
from typing import Any

import pytest

from amlp_ray.errors import CheckpointError
from amlp_ray.utils.run_dir import OtherRunError, RunDir


def test_a_run_takes_a_folder_once_and_resumes_in_it(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    assert run_dir.read_identity() is None
    assert not run_dir.claim({"seed": 1})
    assert run_dir.claim({"seed": 1})
    assert json.loads((tmp_path / "run.json").read_text()) == {"seed": 1}


def test_another_run_is_refused_by_the_keys_that_differ(tmp_path: Path) -> None:
    RunDir(tmp_path).claim({"seed": 1, "data": "a", "epochs": 3})
    with pytest.raises(OtherRunError) as caught:
        RunDir(tmp_path).claim({"seed": 2, "data": "a", "epochs": 4})
    assert caught.value.changed == ("seed", "epochs")
    assert RunDir(tmp_path).claim({"seed": 1, "data": "a", "epochs": 3})


def test_a_damaged_identity_is_another_run(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(OtherRunError):
        RunDir(tmp_path).claim({"seed": 1})


def test_a_run_without_results_gives_way_to_another(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path, results=("checkpoint/*.pt",))
    run_dir.claim({"seed": 1})
    assert not run_dir.claim({"seed": 2})
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "1.pt").touch()
    with pytest.raises(OtherRunError):
        run_dir.claim({"seed": 3})
    assert run_dir.read_identity() == {"seed": 2}


def test_a_second_writer_is_refused_and_the_next_may_begin(tmp_path: Path) -> None:
    run_dir, message = RunDir(tmp_path / "run"), "is written by another process"
    with run_dir.lock(), pytest.raises(CheckpointError, match=message), run_dir.lock(wait_s=0):
        pass
    with run_dir.lock(wait_s=0):
        pass


def test_a_file_system_without_locks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*arguments: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    message = r"a file system without locks \(No locks available\)"
    with pytest.raises(CheckpointError, match=message), RunDir(tmp_path / "run").lock():
        pass
