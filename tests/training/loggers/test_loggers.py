"""Figures read back from what TensorBoardX, MLflow and W&B have really written."""

from __future__ import annotations

import logging
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from amlp_ray.config import TrackingConfig
from amlp_ray.config.base import build
from amlp_ray.errors import ConfigError
from amlp_ray.training.loggers import loggers, remote
from amlp_ray.training.loggers.loggers import open_loggers
from amlp_ray.training.loggers.remote import RemoteLogger

TENSORBOARD_ONLY = TrackingConfig()
PARAMETERS = {
    "epochs": 6,
    "ratio.start": 0.25,
    "model.encoder": None,
    **{f"more.{i}": i for i in range(120)},
}


def epoch(number: int, loss: float | None = None) -> dict[str, Any]:
    return {"epoch": number, "loss": 1 / number if loss is None else loss, "lr": 1e-3}


def follow(
    folder: Path, config: TrackingConfig, epochs: range, *, resumed: int = 0, **more: Any
) -> list[str]:
    """Log some epochs of a run; return the warnings meanwhile."""
    warnings = WarningList()
    logging.getLogger("amlp_ray").addHandler(warnings)
    failed = more.pop("failed", False)
    tracker = open_loggers(
        folder,
        config,
        name="run-a",
        parameters=PARAMETERS,
        group="study-b",
        resumed_epoch=resumed,
    )
    for number in epochs:
        tracker.log(epoch(number, **more))
    tracker.close(failed)
    logging.getLogger("amlp_ray").removeHandler(warnings)
    return warnings.messages


class WarningList(logging.Handler):
    """The messages of warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def events(folder: Path) -> Iterator[Any]:
    from tensorboardX.proto.event_pb2 import Event

    for file in sorted(folder.iterdir()):  # as TensorBoard orders them
        data = file.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            yield Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]


def points(folder: Path, tag: str) -> dict[int, float]:
    """What TensorBoard shows.

    A session that starts at a step throws away what older files have from that step on.
    """
    from tensorboardX.proto.event_pb2 import SessionLog

    result: list[tuple[int, float]] = []
    for event in events(folder / "tensorboard"):
        if event.HasField("session_log") and event.session_log.status == SessionLog.START:
            result = [(step, value) for step, value in result if step < event.step]
        result += [
            (event.step, value.simple_value) for value in event.summary.value if value.tag == tag
        ]
    assert len(dict(result)) == len(result), "a point is there twice"
    return dict(result)


def test_tensorboard_is_written_unasked_and_nothing_else_is(tmp_path: Path) -> None:
    assert follow(tmp_path, TENSORBOARD_ONLY, range(1, 4)) == []
    assert points(tmp_path, "loss") == pytest.approx({1: 1, 2: 1 / 2, 3: 1 / 3})
    assert [path.name for path in tmp_path.iterdir()] == ["tensorboard"]


def test_only_finite_numbers_are_shown(tmp_path: Path) -> None:
    tracker = open_loggers(tmp_path, TENSORBOARD_ONLY, name="run", parameters={})
    tracker.log(
        {
            "epoch": 1,
            "loss": float("nan"),
            "note": "a word",
            "inherited": True,
            "mfu": None,
            "dsc": 0.5,
        }
    )
    tracker.close()
    assert [
        value.tag for event in events(tmp_path / "tensorboard") for value in event.summary.value
    ] == ["dsc"]


def test_epochs_that_are_done_again_are_not_shown_twice(tmp_path: Path) -> None:
    follow(tmp_path, TENSORBOARD_ONLY, range(1, 6))
    follow(tmp_path, TENSORBOARD_ONLY, range(4, 7), resumed=3, loss=9.0)
    assert points(tmp_path, "loss") == pytest.approx({1: 1, 2: 1 / 2, 3: 1 / 3, 4: 9, 5: 9, 6: 9})


def test_a_disk_that_is_full_is_told_once_and_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "tensorboard").write_text("in the way")
    tracker = open_loggers(tmp_path, TENSORBOARD_ONLY, name="run", parameters={})
    tracker.log(epoch(1))
    tracker.log(epoch(2))
    (tmp_path / "tensorboard").unlink()  # there is room again
    tracker.log(epoch(3))
    tracker.close()
    assert len(caplog.messages) == 1
    assert "cannot be written" in caplog.messages[0]
    assert list(points(tmp_path, "loss")) == [3]


def test_mlflow_has_one_run_over_a_resume(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    config = TrackingConfig(mlflow=f"sqlite:///{tmp_path}/mlflow.db", experiment="breast")
    assert follow(tmp_path, config, range(1, 6), failed=True) == []
    client = MlflowClient(config.mlflow)
    experiment = client.get_experiment_by_name("breast")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FAILED"

    assert follow(tmp_path, config, range(4, 7), resumed=3) == []
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status, run.data.tags["group"]) == (
        "run-a",
        "FINISHED",
        "study-b",
    )
    assert run.data.params == {key: str(value) for key, value in PARAMETERS.items()}
    losses = client.get_metric_history(run.info.run_id, "loss")
    assert {point.step: point.value for point in losses} == pytest.approx(
        {k: 1 / k for k in range(1, 7)}
    )
    assert len(losses) == 6
    assert set(run.data.metrics) == {"loss", "lr"}


def test_wandb_has_one_run_over_a_resume_and_is_told_nothing_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(socket, "gethostname", lambda: "name-of-the-machine")
    config = TrackingConfig(wandb="our-lab/lesions")
    assert follow(tmp_path, config, range(1, 6)) == []
    assert follow(tmp_path, config, range(4, 7), resumed=3, failed=True) == []
    files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2

    result = wait_for_exits(files)
    runs = [record.run for record in result if record.HasField("run")]
    assert len({run.run_id for run in runs}) == 1
    assert {(run.entity, run.project, run.display_name, run.run_group) for run in runs} == {
        ("our-lab", "lesions", "run-a", "study-b")
    }
    config = {item.key: item.value_json for item in runs[0].config.update}
    assert config["ratio.start"] == "0.25"
    assert config["model.encoder"] == "null"

    steps = {
        record.history.step.num: values_of(record.history)
        for record in result
        if record.HasField("history")
    }
    assert {step: values["loss"] for step, values in steps.items()} == pytest.approx(
        {k: 1 / k for k in range(1, 7)}
    )
    assert sum(record.HasField("history") for record in result) == 6
    assert [record.exit.exit_code for record in result if record.HasField("exit")] == [0, 1]

    kinds = {record.WhichOneof("record_type") for record in result}
    assert not kinds & {"files", "stats", "output", "output_raw", "environment", "artifact"}
    sent = b"".join(file.read_bytes() for file in files)
    assert not [run.host for run in runs if run.host]
    assert b"name-of-the-machine" not in sent
    assert str(tmp_path).encode() not in sent


def wait_for_exits(files: list[Path]) -> list[Any]:
    """Return the records of offline runs, once W&B's own process has written the end of each."""
    deadline = time.monotonic() + 20
    while True:
        result = [record for file in files for record in wandb_records(file)]
        ends = sum(record.HasField("exit") for record in result)
        if ends == len(files) or time.monotonic() > deadline:
            return result
        time.sleep(0.2)


def wandb_records(file: Path) -> Iterator[Any]:
    """Records of an offline run.

    LevelDB's log format, blocks of 32 KiB after seven bytes of W&B's own.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, record = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(record)
            record = b""


def values_of(history: Any) -> dict[str, float]:
    return {item.key or item.nested_key[0]: float(item.value_json) for item in history.item}


def test_a_server_that_is_gone_stops_nothing_and_is_told_once(tmp_path: Path) -> None:
    started = time.monotonic()
    message = follow(tmp_path, TrackingConfig(mlflow="http://127.0.0.1:9"), range(1, 4))
    assert time.monotonic() - started < remote.CLOSE_S
    assert len(message) == 1
    assert message[0].startswith("MLflow cannot be reached (")
    assert len(points(tmp_path, "loss")) == 3


class Shaky:
    """A service that cannot be reached at the calls of these numbers."""

    name = "Shaky"

    def __init__(self, gone: set[int]) -> None:
        self._gone, self.calls = gone, 0
        self.sent: list[int] = []
        self.ended: bool | None = None

    def _reach(self) -> None:
        self.calls += 1
        if self.calls in self._gone:
            raise ConnectionError("no route")

    def open(self) -> None:
        self._reach()

    def send(self, epoch: int, values: Mapping[str, float]) -> None:
        self._reach()
        self.sent.append(epoch)

    def end(self, failed: bool) -> None:
        self._reach()
        self.ended = failed


@pytest.mark.parametrize("gone", [set(), {1}, {1, 2}, {2}, {3, 4}, {2, 4, 5}])
def test_what_could_not_be_sent_is_sent_when_the_server_is_back(
    gone: set[int], caplog: pytest.LogCaptureFixture
) -> None:
    service = Shaky(gone)
    sender = RemoteLogger(service)
    for number in range(1, 7):
        before = service.calls
        sender.log(number, {})
        while service.calls == before:  # an epoch takes longer than a call
            time.sleep(0.001)
    sender.close()
    assert service.sent == [1, 2, 3, 4, 5, 6]
    assert service.ended is False
    assert len(caplog.messages) == bool(gone)


def test_a_server_that_does_not_answer_holds_up_neither_an_epoch_nor_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Deaf(Shaky):
        def send(self, epoch: int, values: Mapping[str, float]) -> None:
            time.sleep(3)

    monkeypatch.setattr(remote, "CLOSE_S", 0.1)
    started = time.monotonic()
    sender = RemoteLogger(Deaf(set()))
    for number in range(1, 100):
        sender.log(number, {})
    sender.close()
    assert time.monotonic() - started < 2.5


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_package_that_is_missing_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(loggers, "find_spec", lambda package: None)
    config = TrackingConfig(**{name: "http://server" if name == "mlflow" else "lesions"})
    with pytest.raises(ConfigError) as error:
        open_loggers(tmp_path, config, name="run", parameters={})
    assert (
        str(error.value)
        == f"tracking.{name} is set, but {name} is not installed; pip install 'amlp-ray[{name}]'."
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "uri",
    [
        "http://mlflow:5000",
        "https://mlflow.example/path",
        "sqlite:////data/mlflow.db",
        "postgresql://reader@db/mlflow",
        "databricks",
    ],
)
def test_addresses_of_mlflow_that_are_taken(uri: str) -> None:
    assert TrackingConfig(mlflow=uri).mlflow == uri


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        ({"mlflow": "http://me:hunter2@mlflow:5000"}, "MLFLOW_TRACKING_PASSWORD"),
        ({"mlflow": "http://hunter2@mlflow:5000"}, "MLFLOW_TRACKING_TOKEN"),
        ({"mlflow": "postgresql://db/mlflow?password=hunter2"}, "in the environment"),
        ({"mlflow": "mlruns"}, "sqlite:////data/mlflow.db"),
        ({"mlflow": "file:///data/mlruns"}, "no longer writes plain folders"),
        ({"mlflow": "sqlite:///mlflow.db"}, "four strokes"),
        ({"wandb": "our lab/lesions"}, "no project"),
        ({"experiment": ""}, "experiment is ''"),
    ],
)
def test_addresses_that_are_refused_say_why_and_show_no_password(
    overrides: dict[str, str], why: str
) -> None:
    with pytest.raises(ConfigError) as error:
        build(TrackingConfig, overrides, "tracking")
    assert why in str(error.value)
    assert "hunter2" not in str(error.value)
