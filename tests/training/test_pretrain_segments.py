"""A run cut into segments, each going on from the checkpoint of another.

Nothing is lost by it, and nothing gained.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from amlp_ray.config import PretrainConfig, ResourceConfig
from amlp_ray.config.overrides import merge
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.errors import CheckpointError, ConfigError
from amlp_ray.launch.job import run_job
from amlp_ray.launch.run_spec import RunSpec
from amlp_ray.training.checkpoint.export import load_encoder
from amlp_ray.training.checkpoint.manager import checkpoints, latest
from amlp_ray.training.checkpoint.restore import fork_checkpoint
from amlp_ray.training.loggers.metrics_file import own_rows, read_rows
from amlp_ray.training.pretrain import Hooks, PretrainResult

MEASURED = {
    "images_per_second",
    "images_per_second_per_worker",
    "wait_share",
    "seconds",
    "evaluate_seconds",
    "mfu",
    "memory",
    "workers",
}
TINY = {"width": 24, "depth": 1, "heads": 2, "decoder_width": 16, "decoder_heads": 2}
POINTS = [
    [0.0, 0.3],
    [1 / 3, 0.3],
    [2 / 3, 0.6],
    [1.0, 0.4],
]  # ends of segments of two epochs of six


def tiny(points: list[list[float]] = POINTS, **overrides: Any) -> PretrainConfig:
    under = {
        "epochs": 6,
        "batch_size": 12,
        "model": TINY,
        "ratio": {"shape": "points", "points": points},
    }
    return PretrainConfig.model_validate(merge(under, overrides))


def go(
    dataset: PatchDataset,
    folder: Path,
    config: PretrainConfig,
    *,
    fork: Path | None = None,
    until: int | None = None,
    killed_at: int | None = None,
) -> PretrainResult:
    """A run up to `until`; `killed_at` an epoch whose report is the last thing it does."""

    def report(metrics: dict[str, Any]) -> None:
        if metrics["epoch"] == killed_at:
            raise KeyboardInterrupt

    return run_job(
        RunSpec(config=config, data=str(dataset.path), folder=folder, until=until, fork=fork),
        Hooks(report=report),
    )


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def saved(folder: Path) -> dict[str, Any]:
    checkpoint = latest(folder)
    assert checkpoint is not None
    return checkpoint[0]


def figures(folder: Path) -> list[dict[str, Any]]:
    rows = read_rows(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in MEASURED | {"inherited"}} for row in rows]


LOOKS = {"analysis_interval": 3}  # so that forks fall between two analyses of whole images
CUT: dict[str, dict[str, Any]] = {
    "amlp": {"variant": "amlp", "selection": LOOKS, "loss": {"warmup": 0.0}},
    "soft, step by step": {
        "variant": "amlp-soft",
        "selection": LOOKS,
        "ratio": {"update_per": "step"},
    },
    "mae": {"variant": "mae"},
    "clusters of the dataset": {"selection": {**LOOKS, "scope": "dataset", "clusters": 4}},
    "teacher": {
        "selection": {**LOOKS, "features": "tokens", "rule": "hardest"},
        "loss": {"warmup": 0.0},
    },
    "ranking": {"variant": "hpm"},
}


@pytest.mark.parametrize("overrides", CUT.values(), ids=CUT.keys())
def test_segments_one_after_another_equal_one_run_of_the_whole_schedule_to_the_bit(
    phantom_dataset: PatchDataset, tmp_path: Path, overrides: dict[str, Any]
) -> None:
    go(phantom_dataset, tmp_path / "whole", tiny(**overrides))
    fork = None
    for i in range(3):
        torch.manual_seed(i)  # nothing may hang on torch's own generator
        folder = tmp_path / str(i)
        config = tiny(POINTS[: i + 2], **overrides)
        if i == 1:  # killed inside the segment, and begun again
            with pytest.raises(KeyboardInterrupt):
                go(phantom_dataset, folder, config, fork=fork, until=2 * i + 2, killed_at=3)
        result = go(phantom_dataset, folder, config, fork=fork, until=2 * i + 2)
        assert result.epochs == 2 * i + 2
        assert not result.stopped_early
        fork = folder
    assert figures(tmp_path / "2") == figures(tmp_path / "whole")
    assert equal(saved(tmp_path / "2"), saved(tmp_path / "whole"))
    encoders = [
        load_encoder(tmp_path / name / "encoder.safetensors").state_dict()
        for name in ("2", "whole")
    ]
    assert equal(*encoders)


CHANGES: dict[str, dict[str, Any]] = {
    "lr": {"lr": 3e-3},
    "clip_grad": {"clip_grad": 0.01},
    "intensity_jitter": {"intensity_jitter": 0.5},
    "loss.gamma": {"loss": {"gamma": 2.0}},
    "loss.ccl_weight": {"loss": {"ccl_weight": 0.9}},
    "selection.strength": {"selection": {"strength": 3.0}},
    "selection.lesion_share": {"selection": {"lesion_share": 0.3}},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_fork_trains_on_with_its_changed_value_and_a_kill_inside_it_changes_nothing(
    phantom_dataset: PatchDataset, tmp_path: Path, change: dict[str, Any]
) -> None:
    mode = "soft" if "strength" in change.get("selection", {}) else "hard"
    base: dict[str, Any] = {"selection": {**LOOKS, "mode": mode}, "loss": {"warmup": 0.0}}
    go(phantom_dataset, tmp_path / "parent", tiny(**base), until=2)
    changed = tiny(**merge(base, change))
    go(phantom_dataset, tmp_path / "kept", tiny(**base), fork=tmp_path / "parent", until=5)
    go(phantom_dataset, tmp_path / "changed", changed, fork=tmp_path / "parent", until=5)
    with pytest.raises(KeyboardInterrupt):
        go(
            phantom_dataset,
            tmp_path / "killed",
            changed,
            fork=tmp_path / "parent",
            until=5,
            killed_at=3,
        )
    go(phantom_dataset, tmp_path / "killed", changed, fork=tmp_path / "parent", until=5)
    uninterrupted, other, killed = (
        saved(tmp_path / name) for name in ("kept", "changed", "killed")
    )
    assert not equal(other["model"], uninterrupted["model"])
    assert equal(killed, other)
    assert other["config"] == changed.model_dump(mode="json")


REFUSED: dict[str, dict[str, Any]] = {
    "model.width": {"model": {"width": 32}},
    "epochs": {"epochs": 8},
    "batch_size": {"batch_size": 6},
    "seed": {"seed": 1},
    "weight_decay": {"weight_decay": 0.1},
    "loss.warmup": {"loss": {"warmup": 0.5}},
    "selection.analysis_interval": {"selection": {"analysis_interval": 1}},
    "loss.ccl_weight": {"loss": {"ccl_weight": 0.0}},
    "loss.ranking_weight": {"loss": {"ranking_weight": 1.0}},
}


@pytest.mark.parametrize("change", REFUSED.values(), ids=REFUSED.keys())
def test_a_fork_of_what_no_running_model_can_change_is_refused_by_name_and_leaves_nothing(
    phantom_dataset: PatchDataset,
    tmp_path: Path,
    change: dict[str, Any],
    request: pytest.FixtureRequest,
) -> None:
    go(phantom_dataset, tmp_path / "parent", tiny(), until=1)
    name = request.node.callspec.id
    with pytest.raises(
        CheckpointError, match=rf"cannot continue with another {name}[:,] .*run of its own"
    ):
        fork_checkpoint(tmp_path / "parent", tmp_path / "child", tiny(**change))
    assert not (tmp_path / "child").exists()


def test_inherited_epochs_are_marked_so_that_their_seconds_count_once_and_the_parent_is_left_alone(
    phantom_dataset: PatchDataset, tmp_path: Path
) -> None:
    go(phantom_dataset, tmp_path / "parent", tiny(), until=2)
    before = {
        path: path.read_bytes() for path in (tmp_path / "parent").rglob("*") if path.is_file()
    }
    go(phantom_dataset, tmp_path / "child", tiny(), fork=tmp_path / "parent", until=4)
    go(phantom_dataset, tmp_path / "grandchild", tiny(), fork=tmp_path / "child", until=5)
    assert {
        path: path.read_bytes() for path in (tmp_path / "parent").rglob("*") if path.is_file()
    } == before
    rows = read_rows(tmp_path / "grandchild" / "metrics.jsonl")
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["epoch"] for row in own_rows(rows)] == [5]
    assert rows[0] == read_rows(tmp_path / "parent" / "metrics.jsonl")[0] | {"inherited": True}
    assert own_rows(read_rows(tmp_path / "parent" / "metrics.jsonl")) == read_rows(
        tmp_path / "parent/metrics.jsonl"
    )


def test_a_fork_that_was_killed_before_its_checkpoint_was_there_is_made_again(
    phantom_dataset: PatchDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go(phantom_dataset, tmp_path / "parent", tiny(), until=2)
    go(phantom_dataset, tmp_path / "whole", tiny(), fork=tmp_path / "parent", until=3)

    def killed(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("amlp_ray.training.checkpoint.restore.write_checkpoint", killed)
        with pytest.raises(KeyboardInterrupt):
            go(phantom_dataset, tmp_path / "cut", tiny(), fork=tmp_path / "parent", until=3)
    assert not checkpoints(tmp_path / "cut")
    go(phantom_dataset, tmp_path / "cut", tiny(), fork=tmp_path / "parent", until=3)
    assert equal(saved(tmp_path / "cut"), saved(tmp_path / "whole"))
    assert figures(tmp_path / "cut") == figures(tmp_path / "whole")


def test_a_parent_that_is_gone_is_asked_for_only_where_the_fork_has_no_checkpoint_yet(
    phantom_dataset: PatchDataset, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"parent has no checkpoint to fork; run it first"):
        go(phantom_dataset, tmp_path / "child", tiny(), fork=tmp_path / "parent")
    go(phantom_dataset, tmp_path / "parent", tiny(), until=2)
    go(phantom_dataset, tmp_path / "child", tiny(), fork=tmp_path / "parent", until=3)
    (tmp_path / "parent").rename(tmp_path / "moved")
    assert (
        go(phantom_dataset, tmp_path / "child", tiny(), fork=tmp_path / "parent", until=4).epochs
        == 4
    )


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-500])


def replace_by_text(path: Path) -> None:
    path.write_text(json.dumps({"epoch": 1}))


@pytest.mark.parametrize("damage", [cut, replace_by_text])
def test_a_damaged_parent_is_refused_in_one_sentence(
    phantom_dataset: PatchDataset, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    go(phantom_dataset, tmp_path / "parent", tiny(), until=1)
    damage(checkpoints(tmp_path / "parent")[0])
    with pytest.raises(
        CheckpointError,
        match=r"All checkpoints in .*parent/checkpoint are damaged .*; delete the folder",
    ):
        go(phantom_dataset, tmp_path / "child", tiny(), fork=tmp_path / "parent")


def test_a_segment_up_to_the_last_epoch_is_the_whole_run(
    phantom_dataset: PatchDataset, tmp_path: Path
) -> None:
    go(phantom_dataset, tmp_path / "whole", tiny())
    go(phantom_dataset, tmp_path / "until", tiny(), until=6)
    assert equal(saved(tmp_path / "until"), saved(tmp_path / "whole"))


@pytest.mark.parametrize("until", [0, -1, 7])
def test_an_end_that_is_no_epoch_of_the_run_is_refused(
    phantom_dataset: PatchDataset, tmp_path: Path, until: int
) -> None:
    with pytest.raises(ConfigError, match=rf"until {until} is no epoch of a run of epochs=6"):
        go(phantom_dataset, tmp_path, tiny(), until=until)


def test_a_folder_that_is_beyond_the_end_already_is_refused(
    phantom_dataset: PatchDataset, tmp_path: Path
) -> None:
    go(phantom_dataset, tmp_path, tiny(), until=3)
    with pytest.raises(CheckpointError, match="is at epoch 3 already, beyond until=2"):
        go(phantom_dataset, tmp_path, tiny(), until=2)


def test_a_segment_that_is_asked_to_return_says_so_and_goes_on(
    phantom_dataset: PatchDataset, tmp_path: Path
) -> None:
    run_spec = RunSpec(
        config=tiny(), data=str(phantom_dataset.path), folder=tmp_path / "cut", until=3
    )
    part = run_job(run_spec, Hooks(should_stop=lambda: True))
    assert (part.epochs, part.stopped_early) == (1, True)
    whole = go(phantom_dataset, tmp_path / "whole", tiny(), until=3)
    assert not run_job(run_spec, Hooks()).stopped_early
    assert equal(saved(tmp_path / "cut")["model"], whole.model.state_dict())


@pytest.mark.ray
@pytest.mark.timeout(180)
def test_a_group_of_workers_goes_on_from_a_parent_and_reports_its_own_epochs(
    phantom_dataset: PatchDataset, tmp_path: Path
) -> None:
    from amlp_ray.launch.launcher import run_on_ray

    go(phantom_dataset, tmp_path / "parent", tiny(), until=2)
    go(phantom_dataset, tmp_path / "alone", tiny(), fork=tmp_path / "parent", until=4)
    resources = ResourceConfig(workers=2, cpus_per_worker=0.9)
    run_spec = RunSpec(
        config=tiny(),
        data=str(phantom_dataset.path),
        folder=tmp_path / "group",
        resources=resources,
        until=4,
        fork=tmp_path / "parent",
    )
    reported: list[int] = []
    run_on_ray(run_spec, name="group", report=lambda metrics: reported.append(metrics["epoch"]))
    assert reported == [3, 4]
    alone, group = (figures(tmp_path / name) for name in ("alone", "group"))
    assert [row["loss"] for row in group] == pytest.approx([row["loss"] for row in alone], rel=1e-4)
