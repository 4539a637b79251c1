"""Expressions compute what Python would, and hold nothing that could run."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amlp_ray.study.search_space.expressions import Expression, ExpressionError

VALUES: dict[str, Any] = {
    "ratio.start": 0.25,
    "delta": 0.5,
    "k": 3.0,
    "shape": "power",
    "on": True,
    "zero": 0,
}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("ratio.start + delta", 0.75),
        ("-(k - 1) ** 2 / 4", -1.0),
        ("7 // k + 7 % k", 3.0),
        ("min(ratio.start, delta, 0.1) + max(k, 1)", 3.1),
        ("round(k / 2.4) + abs(-1)", 2),
        ("round(ratio.start, 1)", 0.2),
        ("ratio.start < delta <= 0.5", True),
        ("ratio.start < delta < 0.5", False),
        ("shape == 'power' and not k > 3", True),
        ("shape != 'power' or on", True),
        ("zero != 0 and 1 / zero > 1", False),
    ],
)
def test_an_expression_computes_what_it_says(text: str, value: Any) -> None:
    actual = Expression(text)(VALUES.__getitem__)
    assert actual == value
    assert type(actual) is type(value)


numbers = st.one_of(st.integers(-50, 50), st.floats(-50, 50, allow_subnormal=False))
leaf = st.one_of(numbers.map(lambda n: f"({n!r})"), st.sampled_from(["a", "b"]))
texts = st.recursive(
    leaf,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from("+-*"), inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
        st.tuples(st.sampled_from(["min", "max"]), inner, inner).map(
            lambda t: f"{t[0]}({t[1]}, {t[2]})"
        ),
        inner.map(lambda t: f"abs({t})"),
    ),
    max_leaves=8,
)


@given(texts, numbers, numbers)
def test_arithmetic_agrees_with_python(text: str, a: float, b: float) -> None:
    if len(text) <= 300:
        actual = Expression(text)({"a": a, "b": b}.__getitem__)
        assert actual == eval(text, {"min": min, "max": max, "abs": abs, "a": a, "b": b})


def test_names_stand_in_their_order_and_once() -> None:
    assert Expression("delta + ratio.start * min(k, delta)").names == ("delta", "ratio.start", "k")


@pytest.mark.parametrize(
    ("text", "is_condition"),
    [("a < b", True), ("not a", True), ("a and b", True), ("a + b", False)],
)
def test_a_condition_is_told_from_a_number(text: str, is_condition: bool) -> None:
    assert Expression(text).is_condition is is_condition


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ratio.start +", "cannot be read"),
        ("a = 1", "cannot be read"),
        ("", "cannot be read"),
        ("__import__('os').system('true')", "is none of min, max, round and abs"),
        ("open('x')", "is none of min, max, round and abs"),
        ("a.lower()", "is none of min, max, round and abs"),
        ("round(a, ndigits=1)", "is none of min, max, round and abs"),
        ("min()", "is none of min, max, round and abs"),
        ("'text'.join", "is no name that a dot may follow"),
        ("a[0]", "is not understood"),
        ("lambda: 1", "is not understood"),
        ("[x for x in a]", "is not understood"),
        ("a if b else c", "is not understood"),
        ("f'{a}'", "is not understood"),
        ("(a := 1)", "is not understood"),
        ("a @ b", "is not understood"),
        ("a << 9", "is not understood"),
        ("a is b", "is not understood"),
        ("1j", "is not understood"),
        ("min(*a)", "is not understood"),
        ("(" * 160 + "1" + ")" * 160, "longer than 300"),
    ],
)
def test_what_is_no_expression_is_refused_when_it_is_read(text: str, message: str) -> None:
    with pytest.raises(ExpressionError, match=message):
        Expression(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("k / zero", "divides by zero"),
        ("9 ** 9 ** 9", "cannot be computed"),
        ("1e300 * 1e300", "gives inf"),
        ("(-k) ** 0.5", "gives"),
        ("shape * 2", "'power' is no number"),
        ("on + 1", "True is no number"),
        ("shape < 1", "cannot be computed"),
        ("round(k, 0.5)", "cannot be computed"),
    ],
)
def test_values_that_do_not_go_together_are_refused(text: str, message: str) -> None:
    with pytest.raises(ExpressionError, match=message):
        Expression(text)(VALUES.__getitem__)


def test_no_attribute_of_a_value_is_reached() -> None:
    names: list[str] = []

    def value_of(name: str) -> float:
        names.append(name)
        return 1.0

    assert Expression("delta.__class__.__base__ + 1")(value_of) == 2.0
    assert names == ["delta.__class__.__base__"]
