"""Files that are whole or not there, on disks that are full or away."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from amlp_ray.errors import ConfigError
from amlp_ray.utils.files import append_line, atomic_write, local_path, open_regular
from amlp_ray.utils.retry import retry

# A limit on the size of files is a disk that is full, for this process alone and without being
# root.
FULL = """
import json, resource, sys, threading, time
from pathlib import Path
from amlp_ray.utils.files import append_line, atomic_write
from amlp_ray.utils.retry import retry

def allow(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

def attempt(work):
    try:
        work()
    except OSError:
        return path.read_text()

path, seen, errors = Path(sys.argv[1]) / "lines", {}, []
append_line(path, "first")
allow(10)  # bytes: four are left
seen["cut"] = attempt(lambda: append_line(path, "second"))
allow(6)
seen["none"] = attempt(lambda: append_line(path, "second"))
seen["replaced"] = attempt(lambda: atomic_write(path, "something longer"))
threading.Timer(0.7, allow, [resource.RLIM_INFINITY]).start()
retry(lambda: append_line(path, "second"), 30, lambda error: errors.append(type(error).__name__))
seen["in the end"] = path.read_text()
print(json.dumps({"seen": seen, "errors": errors}))
"""


def test_a_full_disk_takes_a_line_whole_or_not_at_all_and_is_waited_for(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    content = "first\n"
    assert result["seen"] == {
        "cut": content,
        "none": content,
        "replaced": content,
        "in the end": "first\nsecond\n",
    }
    assert result["errors"] == ["OSError"]
    assert [path.name for path in tmp_path.iterdir()] == ["lines"]


def test_lines_are_added_and_content_replaced_with_nothing_left_beside(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for line in ("one", "zwei ä", "3"):
        append_line(path, line)
    assert path.read_text().splitlines() == ["one", "zwei ä", "3"]
    atomic_write(path, "text")
    assert path.read_text() == "text"
    atomic_write(path, b"\x00\x01")
    assert path.read_bytes() == b"\x00\x01"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_away_is_waited_for_and_told_once(tmp_path: Path) -> None:
    tries: list[int] = []
    message: list[OSError] = []

    def work() -> str:
        tries.append(1)
        if len(tries) == 2:
            (tmp_path / "folder").mkdir()
        atomic_write(tmp_path / "folder" / "file", "text")
        return "done"

    assert retry(work, 10, message.append) == "done"
    assert len(tries) == 2
    assert [type(error) for error in message] == [FileNotFoundError]


def test_patience_ends_with_the_error_itself(tmp_path: Path) -> None:
    message: list[OSError] = []
    with pytest.raises(FileNotFoundError, match="absent"):
        retry(lambda: atomic_write(tmp_path / "absent" / "file", ""), 0.1, message.append)
    assert len(message) == 1


def test_what_is_no_trouble_of_a_disk_is_not_tried_again() -> None:
    tries: list[int] = []

    def work() -> None:
        tries.append(1)
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        retry(work, 10, lambda error: None)
    assert len(tries) == 1


def test_a_line_after_one_that_a_power_cut_left_without_its_end_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b'first\n{"cut')
    append_line(path, "second")
    assert path.read_text().splitlines() == ["first", '{"cut', "second"]


@pytest.mark.timeout(10)  # reading would wait for a writer, or never end
def test_pipes_sockets_devices_and_folders_are_no_files_to_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "socket", "device", "folder"):
        with pytest.raises(OSError, match=f"it is a {name}"):
            open_regular(tmp_path / name)
    (tmp_path / "file").write_bytes(b"content")
    with open_regular(tmp_path / "file") as file:
        assert file.read() == b"content"


@pytest.mark.parametrize("uri", ["s3://bucket/runs", Path("s3://bucket/runs"), "gs:/bucket/runs"])
def test_a_uri_is_no_path_of_this_machine(uri: str | Path) -> None:
    with pytest.raises(ConfigError, match=r"(s3|gs)://bucket/runs is a URI, but this must be"):
        local_path(uri)


@pytest.mark.parametrize("name", ["runs", "a:b", "C:/runs", "deep/s3:/x"])
def test_other_names_are_paths(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert local_path(name) == tmp_path / name
