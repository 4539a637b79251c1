"""A study on a real Tune that is cancelled, paused or taken over while its trials run."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from optuna.trial import TrialState

from amlp_ray.config import StudyConfig
from amlp_ray.config.base import build
from amlp_ray.config.yaml_file import write_yaml
from amlp_ray.errors import StudyError
from amlp_ray.study.execution.driver import run_on_tune
from amlp_ray.study.execution.stop_reason import StopReason
from amlp_ray.study.storage.study_store import StudyStore

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

DEADLINE_S = 120


def stub_trial(config: dict[str, Any]) -> dict[str, Any]:
    """Report nothing, and return only when asked to."""
    import ray

    folder = config["trial_spec"]["run"]["folder"]
    ray.get(config["stop_flags"].mark_started.remote(folder))
    Path(folder).mkdir(parents=True)
    while ray.get(config["stop_flags"].requested.remote(folder)) is None:
        time.sleep(0.1)
    return {"ended": True, "epochs": 1, "seconds": 0.1}


def deaf_trial(config: dict[str, Any]) -> dict[str, Any]:
    """Report nothing and hear nothing."""
    import ray

    folder = config["trial_spec"]["run"]["folder"]
    ray.get(config["stop_flags"].mark_started.remote(folder))
    Path(folder).mkdir(parents=True)
    time.sleep(DEADLINE_S)
    return {"ended": True}


@pytest.fixture
def store(ray_session: None, tmp_path: Path) -> StudyStore:
    values = {
        "name": "s",
        "pretrain": {"epochs": 4},
        "space": {"ratio.start": {"low": 0.1, "high": 0.6}},
        "pruner": {"name": "none", "rungs": 2},
        "budget": {"trials": 1},
        "baselines": [],
    }
    (tmp_path / "s").mkdir()
    store = StudyStore(tmp_path / "s")
    write_yaml(build(StudyConfig, values, "test"), store.folder / "study.yaml")
    return store


def run(store: StudyStore, trainable: Any, interfere: Callable[[StudyStore], None]) -> StopReason:
    """Run a study, and interfere from another thread once its trial runs."""

    def wait_and_interfere() -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not store.trial_folder(0).is_dir() and time.monotonic() < deadline:
            time.sleep(0.1)
        interfere(StudyStore(store.folder))

    with store.lock() as lease:
        threading.Thread(target=wait_and_interfere).start()
        return run_on_tune(
            store,
            store.config(),
            lease,
            data="data",
            eval_data=None,
            images=320,
            side_by_side=1,
            trainable=trainable,
        )


def test_a_study_in_a_thread_is_cancelled_without_an_interrupt_of_the_main_thread(
    store: StudyStore,
) -> None:
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(run, store, deaf_trial, lambda other: other.request("cancel"))
        try:
            reason = future.result(DEADLINE_S)
            time.sleep(0.5)  # an interrupt would come late
        except KeyboardInterrupt:
            pytest.fail("the main thread was interrupted")
    assert reason == StopReason.CANCEL


def test_a_cancelled_study_ends_at_once_though_its_trial_does_not_hear(store: StudyStore) -> None:
    started = time.monotonic()
    assert run(store, deaf_trial, lambda other: other.request("cancel")) == StopReason.CANCEL
    assert time.monotonic() - started < DEADLINE_S
    (trial,) = store.search().trials
    assert (trial.state, trial.user_attrs["reason"]) == (TrialState.FAIL, "cancelled")
    request = store.last_request()
    assert request is not None
    assert "answer" in request


def test_a_paused_study_waits_for_its_trial_and_leaves_it_running(
    store: StudyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    cleared: list[object] = []
    display = SimpleNamespace(
        HTML=str, display=print, clear_output=lambda wait: cleared.append(wait)
    )
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.setattr("ray.tune.progress_reporter.IS_NOTEBOOK", True)
    assert run(store, stub_trial, lambda other: other.request("pause")) == StopReason.PAUSE
    assert [trial.state for trial in store.search().trials] == [TrialState.RUNNING]
    assert not cleared, "what a notebook has printed is gone"


def test_a_study_whose_lease_is_gone_ends_with_an_error(
    store: StudyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("amlp_ray.study.execution.monitor.RENEW_S", 0.0)

    def take_over(other: StudyStore) -> None:
        lease = other.search().user_attrs["lease"]
        other.search().set_user_attr("lease", {**lease, "id": "other"})

    with (  # in a thread, as a notebook may
        ThreadPoolExecutor(1) as pool,
        pytest.raises(StudyError, match="was taken over by another process"),
    ):
        pool.submit(run, store, stub_trial, take_over).result(DEADLINE_S)
    assert [trial.state for trial in store.search().trials] == [TrialState.RUNNING]
