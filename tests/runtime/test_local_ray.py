"""A Ray of this machine that cannot start: another folder, another attempt, or one sentence."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from amlp_ray.errors import ResourceError
from amlp_ray.runtime import local_ray
from amlp_ray.runtime.local_ray import RAY_FOLDER, TEMP_FOLDER, choose_temp_folder, start_local_ray

LONG = "job_scratch_of_a_long_project_name" * 3


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Yield the folder that stands for /tmp; pytest's own is too long for sockets."""
    folder = Path(tempfile.mkdtemp(prefix="s", dir="/tmp"))
    monkeypatch.setattr(local_ray, "DEFAULT_FOLDERS", (folder,))
    monkeypatch.setenv(RAY_FOLDER, "")
    monkeypatch.setenv(TEMP_FOLDER, str(folder))
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("variable", [RAY_FOLDER, TEMP_FOLDER])
@pytest.mark.parametrize(
    ("name", "problem"),
    [
        (LONG, "is longer than the 37 bytes that sockets leave"),
        ("Fälle" * 8, "is longer than the 37 bytes that sockets leave"),
        ("file/x", "cannot be written to (Not a directory)"),
    ],
)
def test_a_folder_that_ray_cannot_use_is_replaced_and_named(
    variable: str,
    name: str,
    problem: str,
    system: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (system / "file").touch()
    monkeypatch.setenv(variable, str(system / name))
    caplog.set_level("INFO", logger="amlp_ray")
    assert choose_temp_folder() == system
    assert caplog.messages == [
        f"Ray keeps its temporary files in {system}: {system / name} {problem}"
    ]


def test_a_folder_that_ray_can_use_is_used_without_a_word(
    system: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(RAY_FOLDER, str(system / "r"))
    caplog.set_level("INFO", logger="amlp_ray")
    assert choose_temp_folder() == system / "r"
    assert caplog.messages == []


def test_a_full_disk_is_one_sentence(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2_000_000))
    with pytest.raises(ResourceError) as error:
        choose_temp_folder()
    assert str(error.value) == (
        f"Ray has no folder for its temporary files: {system} has only 2 MB of free space; free "
        f"space there, or set RAY_TMPDIR to a writable folder with a short path."
    )


def test_processes_of_ray_get_a_folder_for_their_sockets_too(
    system: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TEMP_FOLDER, str(system / LONG))
    environments: list[tuple[str | None, str | None]] = []

    def init() -> str:
        environments.append(tuple(map(local_ray.os.environ.get, (RAY_FOLDER, TEMP_FOLDER))))
        return "context"

    monkeypatch.setattr(local_ray, "_init_ray", init)
    assert start_local_ray() == "context"
    assert environments == [(str(system), str(system))]


TIMEOUT = Exception("The current node timed out during startup. This could happen because ...")


@pytest.mark.parametrize(
    ("failures", "attempts", "message"),
    [
        ([TIMEOUT], 2, None),
        ([RuntimeError("Failed to start GCS.")], 2, None),
        ([ConnectionError("no answer")], 2, None),
        (
            [TIMEOUT, TIMEOUT],
            2,
            r"did not start on this machine in two attempts \(The current node",
        ),
        ([OSError(28, "No space left on device")], 1, r"cannot start .*No space left on device"),
        ([ValueError("CPU must be positive")], 1, r"cannot start .*CPU must be positive"),
    ],
    ids=str,
)
def test_ray_is_started_again_after_a_time_out_only(
    failures: list[Exception],
    attempts: int,
    message: str | None,
    system: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[int] = []

    def init() -> str:
        calls.append(1)
        if len(calls) <= len(failures):
            raise failures[len(calls) - 1]
        return "context"

    monkeypatch.setattr(local_ray, "_init_ray", init)
    monkeypatch.setattr("ray.shutdown", lambda: None)
    if message is None:
        assert start_local_ray() == "context"
    else:
        with pytest.raises(ResourceError, match=message) as error:
            start_local_ray()
        assert "--address" in str(error.value)
        assert error.value.exit_code == 2
    assert len(calls) == attempts
