"""Checkpoints: whole or not there, whatever is done to their disk."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from amlp_ray.errors import CheckpointError, StorageError
from amlp_ray.training.checkpoint import manager as module
from amlp_ray.training.checkpoint.manager import (
    CheckpointManager,
    checkpoints,
    epoch_of,
    is_intact,
    latest,
    read_checkpoint,
    write_checkpoint,
)
from amlp_ray.utils.event_log import EventLog, read_events
from amlp_ray.utils.retry import RetryPolicy


def state_of(epoch: int, size: int = 100) -> dict[str, Any]:
    return {
        "model": {"weights": torch.full((size,), float(epoch))},
        "config": {"lr": 1e-3, "name": "x"},
        "epoch": epoch,
    }


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoint").iterdir())


def epochs(folder: Path) -> list[int]:
    return [epoch_of(path) for path in checkpoints(folder)]


def manager_of(folder: Path, *, seconds: float = 60, keep: int = 2) -> CheckpointManager:
    """Create a manager that retries for some seconds."""
    return CheckpointManager(folder, RetryPolicy(folder, minutes=seconds / 60), keep=keep)


def run_script(script: str, *arguments: object) -> Any:
    """What a process of its own prints as JSON."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# What is kept


def test_a_name_ends_with_the_digest_of_the_content_and_gives_back_what_was_saved(
    tmp_path: Path,
) -> None:
    path = write_checkpoint(tmp_path, state_of(12), 12)
    assert path.name == f"epoch-12.{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}.pt"
    assert names(tmp_path) == [path.name]
    result = latest(tmp_path)
    assert result is not None
    state, read = result
    assert read == path
    assert state["config"] == state_of(12)["config"]
    assert torch.equal(state["model"]["weights"], state_of(12)["model"]["weights"])


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_last_few_are_kept(tmp_path: Path, keep: int) -> None:
    checkpoint_manager = manager_of(tmp_path, keep=keep)
    for epoch in (8, 9, 10, 11):  # by number: 9 is before 10
        checkpoint_manager.save(state_of(epoch), epoch)
    checkpoint_manager.wait()
    assert epochs(tmp_path) == [11, 10, 9, 8][:keep]
    assert len(names(tmp_path)) == keep


def test_an_epoch_that_is_done_again_is_written_again(tmp_path: Path) -> None:
    for _ in range(2):
        write_checkpoint(tmp_path, state_of(3), 3, keep=2)
    assert epochs(tmp_path) == [3]


# What is read


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def exchange(path: Path) -> None:
    """A whole checkpoint, but not the one of that name."""
    torch.save(state_of(1), path)


@pytest.mark.parametrize("damage", [cut, flip, empty, exchange])
def test_a_damaged_newest_is_told_of_and_the_one_before_is_taken(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    for epoch in (1, 2):
        write_checkpoint(tmp_path, state_of(epoch), epoch, keep=2)
    newest, before = checkpoints(tmp_path)
    assert is_intact(newest)
    damage(newest)
    assert not is_intact(newest)
    result = latest(tmp_path, EventLog(tmp_path))
    assert result is not None
    assert (result[0]["epoch"], result[1]) == (1, before)
    message = f"{newest} is damaged and skipped; the checkpoint before it is used, if any."
    assert [event["text"] for event in read_events(tmp_path)] == [message]
    damage(before) if damage is not exchange else empty(before)
    with pytest.raises(
        CheckpointError, match=rf"are damaged \({newest.name}, {before.name}\); delete the folder"
    ):
        latest(tmp_path)


def test_files_of_other_names_are_neither_read_nor_dropped(tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    others = [
        "latest.pt",
        "epoch-9.pt",
        f"epoch-9.{'x' * 16}.pt",
        f"epoch-9.{'a' * 15}.pt",
        "epoch-9.partial",
        "notes.txt",
    ]
    (tmp_path / "checkpoint").mkdir()
    for name in others:
        torch.save(state_of(9), tmp_path / "checkpoint" / name)
    assert latest(tmp_path) is None
    path = write_checkpoint(tmp_path, state_of(1), 1, keep=1)
    assert checkpoints(tmp_path) == [path]
    assert set(names(tmp_path)) == {*others, path.name}


def test_a_checkpoint_never_runs_code(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    path = write_checkpoint(tmp_path, {"epoch": Attack()}, 1)
    assert is_intact(path)
    for read in (lambda: latest(tmp_path), lambda: read_checkpoint(path)):
        with pytest.raises(
            CheckpointError,
            match=r"epoch-1\.\w+\.pt cannot be read as a checkpoint \(UnpicklingError\)",
        ):
            read()
    assert not (tmp_path / "ran").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "ran").exists(), "the attack works where code may run"


# Beside training


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Writing begins when it is set."""
    event, write = threading.Event(), module.write_checkpoint

    def wait_and_write(*args: Any, **kwargs: Any) -> Path:
        assert event.wait(30)
        return write(*args, **kwargs)

    monkeypatch.setattr(module, "write_checkpoint", wait_and_write)
    yield event
    event.set()


def test_a_save_returns_at_once_and_writes_what_was_there_then(
    tmp_path: Path, gate: threading.Event
) -> None:
    checkpoint_manager, state = (
        manager_of(tmp_path),
        state_of(1) | {"list": [torch.zeros(2), {"step": torch.tensor(4.0)}]},
    )
    checkpoint_manager.save(state, 1)
    assert checkpoints(tmp_path) == []
    state["model"]["weights"].fill_(-1)
    state["list"][1]["step"].add_(1)
    state["config"]["lr"] = 0.0
    state["list"].clear()
    gate.set()
    checkpoint_manager.wait()
    result = latest(tmp_path)
    assert result is not None
    assert torch.equal(result[0]["model"]["weights"], torch.ones(100))
    assert result[0]["list"][1]["step"] == 4
    assert result[0]["config"]["lr"] == 1e-3


def test_a_save_waits_for_the_write_before(tmp_path: Path, gate: threading.Event) -> None:
    checkpoint_manager = manager_of(tmp_path)
    checkpoint_manager.save(state_of(1), 1)
    second = threading.Thread(target=checkpoint_manager.save, args=(state_of(2), 2))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    gate.set()
    second.join(30)
    assert epochs(tmp_path)[-1] == 1
    checkpoint_manager.wait()
    assert epochs(tmp_path) == [2, 1]


@pytest.mark.parametrize("ask", ["save", "wait"])
def test_what_could_not_be_written_is_raised_once_at_the_next_call(
    tmp_path: Path, ask: str
) -> None:
    (tmp_path / "checkpoint").write_text("a file in its place")
    checkpoint_manager = manager_of(tmp_path, seconds=0.1)
    checkpoint_manager.save(state_of(1), 1)
    with pytest.raises(StorageError, match="Could not write the checkpoint of epoch 1"):
        checkpoint_manager.wait() if ask == "wait" else checkpoint_manager.save(state_of(2), 2)
    checkpoint_manager.wait()
    (tmp_path / "checkpoint").unlink()
    checkpoint_manager.save(state_of(2), 2)
    checkpoint_manager.wait()
    assert epochs(tmp_path) == [2]


# A disk that is full, away, or cut off


FULL = """
import json, resource, sys, time
from pathlib import Path
import torch
from amlp_ray.errors import StorageError
from amlp_ray.training.checkpoint.manager import CheckpointManager
from amlp_ray.utils.event_log import read_events
from amlp_ray.utils.retry import RetryPolicy

def allow(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

def files():
    paths = (folder / "checkpoint").iterdir()
    return sorted(path.name.partition(".")[0] + path.suffix for path in paths)

def messages():
    return [event["text"] for event in read_events(folder)]

folder, seen = Path(sys.argv[1]), {}
state = {"weights": torch.rand(50_000)}
manager = CheckpointManager(folder, RetryPolicy(folder, minutes=0.002))
manager.save(state, 1)
manager.wait()
allow(100_000)  # bytes of a file, and half a checkpoint
manager.save(state, 2)
try:
    manager.wait()
except StorageError as error:
    seen["error"] = type(error.__cause__).__name__, error.__cause__.errno
seen["given up"] = files(), len(messages())
manager = CheckpointManager(folder, RetryPolicy(folder, minutes=1))
manager.save(state, 2)
while len(messages()) < 2:
    time.sleep(0.01)
seen["waiting"] = files(), len(messages())
allow(resource.RLIM_INFINITY)
manager.wait()
seen["in the end"] = files(), len(messages())
print(json.dumps({"seen": seen, "messages": messages()}))
"""


def test_a_full_disk_leaves_the_checkpoint_before_whole_and_is_written_when_there_is_room(
    tmp_path: Path,
) -> None:
    import errno

    result = run_script(FULL, tmp_path)
    assert result["seen"] == {
        "error": ["OSError", errno.EFBIG],
        "given up": [["epoch-1.pt"], 1],
        "waiting": [["epoch-1.pt"], 2],
        "in the end": [["epoch-1.pt", "epoch-2.pt"], 2],
    }
    assert result["messages"][1] == (
        f"Cannot write the checkpoint of epoch 2 to {tmp_path} (File too large); retrying for 1 "
        f"minutes."
    )
    assert all(is_intact(path) for path in checkpoints(tmp_path))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if mount is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip(
            "no disk may be mounted here: that needs root; a limit on files stands in for it above"
        )
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_real_full_disk(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint_manager = manager_of(small_disk)
    checkpoint_manager.save(state_of(1, 80_000), 1)  # 320 kB
    checkpoint_manager.wait()
    (small_disk / "ballast").write_bytes(bytes(500_000))
    checkpoint_manager.save(state_of(2, 80_000), 2)
    until(lambda: bool(caplog.messages))
    assert caplog.messages == [
        f"Cannot write the checkpoint of epoch 2 to {small_disk} (No space left on device); "
        f"retrying for 1 minutes."
    ]
    (whole,) = checkpoints(small_disk)
    assert is_intact(whole)
    assert names(small_disk) == [whole.name]
    (small_disk / "ballast").unlink()
    checkpoint_manager.wait()
    assert epochs(small_disk) == [2, 1]
    assert all(is_intact(path) for path in checkpoints(small_disk))


def test_a_folder_that_is_away_is_waited_for_and_not_made_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, away = tmp_path / "run", tmp_path / "away"
    run.mkdir()
    checkpoint_manager = manager_of(run, seconds=30)
    checkpoint_manager.save(state_of(1), 1)
    checkpoint_manager.wait()
    run.rename(away)
    checkpoint_manager.save(state_of(2), 2)
    until(lambda: bool(caplog.messages))
    away.rename(run)
    checkpoint_manager.wait()
    assert epochs(run) == [2, 1]
    assert len(caplog.messages) == 1


def until(true: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# The writer is forked off a process that has loaded torch already, so that one start serves many
# kills.
KILLED = """
import json, os, random, signal, sys, time
from itertools import count
from pathlib import Path
import torch
from amlp_ray.training.checkpoint.manager import checkpoints, epoch_of, is_intact, write_checkpoint

folder, seen, delay = Path(sys.argv[1]), [], random.Random(0)
torch.set_num_threads(1)
state = {"weights": torch.rand(500_000)}
write_checkpoint(folder, state, 1, keep=2)
for _ in range(12):
    last = epoch_of(checkpoints(folder)[0])
    writer = os.fork()
    if writer == 0:
        for epoch in count(last + 1):
            write_checkpoint(folder, state | {"epoch": epoch}, epoch, keep=2)
    time.sleep(delay.uniform(0.02, 0.1))
    os.kill(writer, signal.SIGKILL)
    os.waitpid(writer, 0)
    partial = [path.stat().st_size for path in folder.rglob("*.partial")]
    seen.append({"whole": [is_intact(path) for path in checkpoints(folder)], "partial": partial})
print(json.dumps({"seen": seen, "epoch": epoch_of(checkpoints(folder)[0])}))
"""


def test_a_kill_at_any_moment_leaves_every_checkpoint_whole(tmp_path: Path) -> None:
    result = run_script(KILLED, tmp_path)
    assert all(all(kill["whole"]) and len(kill["whole"]) in (1, 2, 3) for kill in result["seen"])
    assert result["epoch"] > 12, "it has written in between"
    assert any(kill["partial"] for kill in result["seen"]), "some kills have met a write"
