"""Going on from checkpoints, taking the model out of them: whatever state they are in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from amlp_ray.config import ImageSpec, PretrainConfig
from amlp_ray.errors import CheckpointError
from amlp_ray.training.checkpoint.manager import checkpoints, write_checkpoint
from amlp_ray.training.checkpoint.restore import load_model
from amlp_ray.training.train_state import State, TrainState
from amlp_ray.utils import distributed
from amlp_ray.utils.event_log import EventLog, count_events

SPEC = ImageSpec(channels=1, height=32, width=32, mean=(9.0,), std=(3.0,))


def settings_of(**overrides: object) -> PretrainConfig:
    model = {"patch_size": 8, "width": 24, "depth": 2, "heads": 2, "decoder_width": 16}
    return PretrainConfig.model_validate({"model": model, **overrides})


SETTINGS = settings_of()


def make_state(config: PretrainConfig = SETTINGS, spec: ImageSpec = SPEC) -> TrainState:
    return TrainState(config, spec, "cpu")


def stepped(train_state: TrainState, steps: int = 1) -> TrainState:
    """The same after some steps, each with a gradient for every weight."""
    for step in range(steps):
        for number, weight in enumerate(
            p for p in train_state.model.parameters() if p.requires_grad
        ):
            weight.grad = torch.randn(
                weight.shape, generator=torch.Generator().manual_seed(1000 * step + number)
            )
        train_state.step()
    return train_state


def write(folder: Path, train_state: TrainState, epoch: int) -> Path:
    folder.mkdir(exist_ok=True)
    state = train_state.gather_state() | {"epoch": epoch}
    return write_checkpoint(folder, state, epoch, keep=2)


def same(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[key]) for key, value in a.items())


@pytest.mark.parametrize("weight_ema", [0.0, 0.9])
def test_a_resumed_train_state_takes_the_next_step_to_the_bit(
    tmp_path: Path, weight_ema: float
) -> None:
    config = settings_of(weight_ema=weight_ema)
    original = stepped(make_state(config), 3)
    write(tmp_path, original, 7)
    resumed = make_state(config)
    assert not same(resumed.model.state_dict(), original.model.state_dict())
    assert resumed.resume(tmp_path, EventLog(tmp_path)) == 7
    for one in (original, resumed):
        stepped(one)
    assert same(resumed.model.state_dict(), original.model.state_dict())
    assert same(resumed.eval_model.state_dict(), original.eval_model.state_dict())
    assert same(resumed.eval_model.state_dict(), resumed.model.state_dict()) == (weight_ema == 0)


def test_nothing_is_there_to_go_on_from_in_a_new_folder(tmp_path: Path) -> None:
    train_state = make_state()
    before = {key: value.clone() for key, value in train_state.model.state_dict().items()}
    assert train_state.resume(tmp_path / "new", EventLog(tmp_path)) == 0
    assert same(train_state.model.state_dict(), before)


def test_a_damaged_newest_is_passed_over_and_that_is_noted(tmp_path: Path) -> None:
    older = stepped(make_state())
    write(tmp_path, older, 1)
    expected = {key: value.clone() for key, value in older.model.state_dict().items()}
    newest = write(tmp_path, stepped(older), 2)
    newest.write_bytes(newest.read_bytes()[:-1])
    train_state = make_state()
    assert train_state.resume(tmp_path, EventLog(tmp_path)) == 1
    assert same(train_state.model.state_dict(), expected)
    assert count_events(tmp_path) == {"damaged checkpoint": 1}


@pytest.mark.parametrize(
    ("change", "named"),
    [({"lr": 0.5}, "lr"), ({"seed": 3, "weight_ema": 0.5}, "weight_ema, seed")],
    ids=["one", "two"],
)
def test_a_checkpoint_of_other_settings_is_refused_by_their_names(
    tmp_path: Path, change: dict[str, object], named: str
) -> None:
    write(tmp_path, make_state(), 1)
    other = settings_of(**change)
    with pytest.raises(CheckpointError, match=rf"epoch-1\..*other settings \({named}\)"):
        make_state(other).resume(tmp_path, EventLog(tmp_path))


def test_a_worker_that_does_not_see_what_the_first_goes_on_from_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "shared", make_state(), 3)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    monkeypatch.setattr(distributed, "broadcast_from_rank0", lambda value, device: 3)
    assert make_state().resume(tmp_path / "shared", EventLog(tmp_path)) == 3
    with pytest.raises(
        CheckpointError,
        match="own has a checkpoint of epoch 3 on the first worker's node, but not on this",
    ):
        make_state().resume(tmp_path / "own", EventLog(tmp_path))


def test_how_images_are_read_may_change(tmp_path: Path) -> None:
    write(tmp_path, make_state(), 4)
    other = settings_of(data="mapped")
    assert make_state(other).resume(tmp_path, EventLog(tmp_path)) == 4


def test_a_checkpoint_of_other_images_is_refused(tmp_path: Path) -> None:
    write(tmp_path, make_state(), 1)
    wider = SPEC.model_copy(update={"width": 64})
    with pytest.raises(CheckpointError, match="images of another size or number of channels"):
        make_state(spec=wider).resume(tmp_path, EventLog(tmp_path))
    with pytest.raises(CheckpointError, match="images of another size or number of channels"):
        load_model(tmp_path, SETTINGS, wider)


@pytest.mark.parametrize("weight_ema", [0.0, 0.9])
def test_the_model_that_is_looked_at_is_the_one_that_would_be_exported(
    tmp_path: Path, weight_ema: float
) -> None:
    config = settings_of(weight_ema=weight_ema)
    train_state = stepped(make_state(config), 2)
    write(tmp_path, train_state, 5)
    model, epoch = load_model(tmp_path, config, SPEC)
    assert epoch == 5
    assert not model.training
    assert same(model.state_dict(), train_state.eval_model.state_dict())


def test_a_model_is_taken_out_of_the_newest_that_is_whole(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"has no checkpoint: the run has not finished an epoch"
    ):
        load_model(tmp_path, SETTINGS, SPEC)
    for epoch in (1, 2):
        write(tmp_path, make_state(), epoch)
    newest, before = checkpoints(tmp_path)
    newest.write_bytes(b"")
    assert load_model(tmp_path, SETTINGS, SPEC)[1] == 1
    before.write_bytes(b"")
    with pytest.raises(CheckpointError, match=rf"are damaged \({newest.name}, {before.name}\)"):
        load_model(tmp_path, SETTINGS, SPEC)
