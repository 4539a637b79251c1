from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from amlp_ray.method import counter_rng
from amlp_ray.method.counter_rng import CROP, MASK, uniform

KEYS = torch.arange(64) * 1_000_003 + 17
key = st.integers(0, 2**63 - 1)
PURPOSES = [
    value
    for name, value in vars(counter_rng).items()
    if name.isupper() and not name.startswith("_")
]


@given(st.lists(key, min_size=1, max_size=8), st.integers(0, 2**40), st.integers(0, 10**6))
def test_numbers_lie_strictly_between_0_and_1_for_any_key_seed_and_epoch(
    keys: list[int], seed: int, epoch: int
) -> None:
    u = uniform(torch.tensor(keys), 50, seed=seed, epoch=epoch, stream=MASK)
    assert u.shape == (len(keys), 50)
    assert u.dtype == torch.float32
    assert float(u.min()) > 0
    assert float(u.max()) < 1


@given(st.permutations(range(12)), st.integers(1, 12))
def test_a_row_depends_on_its_own_key_and_not_on_the_batch(order: list[int], size: int) -> None:
    keys = KEYS[:12]
    whole = uniform(keys, 20, seed=3, epoch=5, stream=MASK)
    part = torch.tensor(order[:size])
    assert torch.equal(uniform(keys[part], 20, seed=3, epoch=5, stream=MASK), whole[part])


def test_more_numbers_begin_with_the_fewer() -> None:
    few, many = (uniform(KEYS, n, seed=0, epoch=1, stream=CROP) for n in (5, 50))
    assert torch.equal(many[:, :5], few)


def test_a_call_repeats_and_leaves_torch_s_own_generator_alone() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = uniform(KEYS, 9, seed=0, epoch=1, stream=MASK)
    assert torch.equal(first, uniform(KEYS, 9, seed=0, epoch=1, stream=MASK))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("change", [{"seed": 1}, {"epoch": 2}, {"stream": CROP}])
def test_seed_epoch_and_purpose_each_give_other_numbers(change: dict[str, int]) -> None:
    base = {"seed": 0, "epoch": 1, "stream": MASK}
    u, v = uniform(KEYS, 100, **base), uniform(KEYS, 100, **{**base, **change})
    assert not (u == v).all(1).any()
    assert abs(_correlation(u, v)) < 0.05  # 6,400 pairs: SD 0.0125


def test_every_purpose_has_a_number_of_its_own() -> None:
    assert len(set(PURPOSES)) == len(PURPOSES) == 9


def test_seed_epoch_and_purpose_do_not_stand_in_for_each_other() -> None:
    drawn = {
        tuple(uniform(KEYS[:1], 4, seed=s, epoch=e, stream=p)[0].tolist())
        for s in range(6)
        for e in range(6)
        for p in PURPOSES
    }
    assert len(drawn) == 6 * 6 * len(PURPOSES)


def test_numbers_are_uniform_and_uncorrelated_between_images_positions_and_epochs() -> None:
    u = uniform(torch.arange(1000), 200, seed=0, epoch=1, stream=MASK)
    counts = torch.histc(u, 50, 0, 1)
    chi_squared = float(((counts - 4000).square() / 4000).sum())
    assert 20 < chi_squared < 100  # 49 degrees of freedom: 99.99 % lie within 20-100
    assert abs(_correlation(u[1:], u[:-1])) < 0.01
    assert abs(_correlation(u[:, 1:], u[:, :-1])) < 0.01
    assert (
        abs(_correlation(u, uniform(torch.arange(1000), 200, seed=0, epoch=2, stream=MASK))) < 0.01
    )
    assert abs(float(u.mean(0).std()) - (1 / 12 / 1000) ** 0.5) < 0.002  # no position is preferred
    assert len(u.unique()) > 0.97 * u.numel()  # 23 bits, 200,000 numbers: 1.2 % coincide by chance


def test_the_lowest_bit_of_a_key_changes_every_number() -> None:
    u = uniform(torch.tensor([0, 1, 2, 2**62, 2**62 + 1]), 500, seed=0, epoch=1, stream=MASK)
    for i in range(5):
        for j in range(i):
            assert int((u[i] == u[j]).sum()) <= 1


def test_gumbel_of_the_noise_keeps_its_order_strictly_over_every_value_that_can_occur() -> None:
    """So soft selection of strength 0 is random masking to the bit: all 2^23 values are tried."""
    u = (torch.arange(2**23).float() + 0.5) / 2**23
    gumbel = -torch.log(-torch.log(u))
    assert bool(gumbel.isfinite().all())
    assert bool((gumbel.diff() > 0).all())


def _correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])
