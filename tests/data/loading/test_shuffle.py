"""The order of images: today's for small splits, lanes and windows for large ones."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from amlp_ray.data.loading.shuffle import (
    Order,
    RowGroup,
    num_lanes,
    reads_to_start,
)


def row_groups(*rows: int) -> tuple[RowGroup, ...]:
    starts = np.cumsum([0, *rows])
    return tuple(
        RowGroup(0, i, int(start), count)
        for i, (start, count) in enumerate(zip(starts, rows, strict=False))
    )


def large(
    rows: int = 4000, *, batch_size: int = 16, world: int = 1, window: int = 50, seed: int = 3
) -> Order:
    sizes = [64] * (rows // 64) + ([rows % 64] if rows % 64 else [])
    return Order(row_groups(*sizes), batch_size, world, num_lanes(batch_size), window, seed)


def test_a_small_split_is_permuted_as_it_always_was() -> None:
    order = Order(row_groups(10, 10, 3), 4, world=1, lanes=0, window=1, seed=5).epoch_rows(2)
    assert order.ravel().tolist() == np.random.default_rng([5, 2]).permutation(23)[:20].tolist()
    short = Order(row_groups(3), 8, world=1, lanes=0, window=1, seed=5).epoch_rows(2)
    assert short.shape == (1, 8)
    assert (
        short.ravel().tolist()
        == np.resize(np.random.default_rng([5, 2]).permutation(3), 8).tolist()
    )


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    batch_size=st.sampled_from([1, 2, 6, 8, 12, 16]),
    world=st.sampled_from([1, 2, 3, 5]),
    window=st.integers(1, 70),
    epoch=st.integers(1, 5),
)
def test_lanes_give_every_image_at_most_once_and_few_are_dropped(
    sizes: list[int], batch_size: int, world: int, window: int, epoch: int
) -> None:
    count = sum(sizes)
    if count <= batch_size or world > batch_size:
        return
    order = Order(row_groups(*sizes), batch_size, world, num_lanes(batch_size), window, 7)
    rows = order.epoch_rows(epoch)
    assert rows.shape == (count // batch_size, batch_size) == (order.steps, batch_size)
    assert len(np.unique(rows)) == rows.size
    assert rows.min() >= 0
    assert rows.max() < count
    shares = [order.worker_rows(epoch, rank) for rank in range(world)]
    assert np.array_equal(np.concatenate(shares, axis=1), rows)
    assert max(share.shape[1] for share in shares) - min(share.shape[1] for share in shares) <= 1


@pytest.mark.parametrize(("batch_size", "lanes"), [(256, 8), (12, 6), (24, 8), (7, 7), (11, 1)])
def test_number_of_lanes(batch_size: int, lanes: int) -> None:
    assert num_lanes(batch_size) == lanes
    assert batch_size % lanes == 0


@pytest.mark.parametrize("world", [2, 3, 4, 8, 16])
def test_any_number_of_workers_sees_the_batches_of_one(world: int) -> None:
    whole, shared = large(), large(world=world)
    assert np.array_equal(whole.epoch_rows(2), shared.epoch_rows(2))
    assert not np.array_equal(whole.epoch_rows(2), whole.epoch_rows(3))
    assert not np.array_equal(whole.epoch_rows(2), large(seed=4).epoch_rows(2))


def test_a_worker_needs_few_units_at_once_and_each_of_them_for_one_stretch() -> None:
    order = large(64 * 400)
    for world in (1, 4):
        shared = large(64 * 400, world=world)
        rows = shared.worker_rows(1, 0).ravel()
        needed, first, last = order.plan_reads(order.group_of(rows), 16 // world)
        assert len(needed) == pytest.approx(400 / world, abs=8)
        assert (np.diff(first) >= 0).all()
        changes = np.zeros(last.max() + 2, int)
        np.add.at(changes, first, 1)
        np.add.at(changes, last + 1, -1)
        assert (
            changes.cumsum().max() <= 4 * 8 / world
        )  # a window of 50 rows touches three units at most, and a next one


def test_a_batch_of_a_large_split_comes_from_many_units() -> None:
    order = large(64 * 400)
    rows = order.epoch_rows(1)
    spread = [len(np.unique(order.group_of(batch))) for batch in rows]
    assert np.mean(spread) > 7
    neighbors = np.abs(np.diff(rows[:, 0]))  # in the same lane, one batch after the other
    assert np.median(neighbors) > 8


def test_units_come_into_sight_before_they_are_needed() -> None:
    needed = np.array([0, 0, 1, 4, 4, 9])
    started = [list(range(6))[some] for some in reads_to_start(needed, 10, 2)]
    assert started[0] == [0, 1, 2, 3]
    assert [number for some in started for number in some] == list(range(6))
    for number, step in enumerate(needed):
        assert any(number in some for some in started[: step + 1])
