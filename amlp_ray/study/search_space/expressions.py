"""Arithmetic in settings files: `ratio.start + delta`, `ratio.start <= ratio.end`. Nothing of a file is ever run.

An expression has numbers, texts in quotes, dotted names, `+ - * / // % **`, comparisons, `and`, `or`, `not`, and the
functions `min`, `max`, `round` and `abs`. Python's parser reads it; what it may hold is listed here, and no more.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from typing import Any

LONGEST = 300  # characters: enough for any rule of settings, too few to exhaust Python's parser

_ARITHMETIC: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: lambda base, exponent: (
        float(base) ** float(exponent)
    ),  # whole numbers would grow without end
}
_COMPARISONS: dict[type[ast.AST], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {"min": min, "max": max, "round": round, "abs": abs}


class ExpressionError(ValueError):
    """An expression cannot be read, or not be computed from the values at hand; the message is half a sentence."""


class Expression:
    """One expression, read once and computed as often as wanted.

    >>> rule = Expression("ratio.start + delta")
    >>> rule.names
    ('ratio.start', 'delta')
    >>> rule({"ratio.start": 0.25, "delta": 0.5}.__getitem__)
    0.75

    Raises:
        ExpressionError: it is no expression, or holds something else than those have.
    """

    def __init__(self, text: str) -> None:
        if len(text) > LONGEST:
            raise ExpressionError(f"is longer than {LONGEST} characters")
        try:
            tree = ast.parse(text.strip(), mode="eval")
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise ExpressionError(
                f"{text!r} cannot be read; write arithmetic or a comparison of names and numbers"
            ) from None
        self.text = text
        self._root = tree.body
        names: dict[str, None] = {}
        _check(self._root, names)
        self.names = tuple(names)

    @property
    def decides(self) -> bool:
        """Whether the answer is yes or no."""
        return isinstance(self._root, ast.Compare | ast.BoolOp) or (
            isinstance(self._root, ast.UnaryOp) and isinstance(self._root.op, ast.Not)
        )

    def __call__(self, look: Callable[[str], Any]) -> Any:
        """Compute it. `look` gives the value of a name.

        Raises:
            ExpressionError: the values do not go together, such as text times number, or the result is no number.
        """
        try:
            value = _compute(self._root, look)
        except ZeroDivisionError:
            raise ExpressionError(f"{self.text!r} divides by zero") from None
        except (ArithmeticError, TypeError, RecursionError) as error:
            raise ExpressionError(f"{self.text!r} cannot be computed: {error.args[-1]}") from None
        if isinstance(value, complex) or (isinstance(value, float) and not math.isfinite(value)):
            raise ExpressionError(f"{self.text!r} gives {value}")
        return value


def _check(node: ast.AST, names: dict[str, None]) -> None:
    """Collect the names; refuse what an expression may not hold."""
    match node:
        case ast.Constant(value=bool() | int() | float() | str()):
            return
        case ast.Name() | ast.Attribute():
            names[_dotted(node)] = None
            return
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if (
            name in _FUNCTIONS and args
        ):
            parts: list[ast.expr] = args
        case ast.Call(func=func):
            raise ExpressionError(
                f"{ast.unparse(func)}() is none of min, max, round and abs of some values"
            )
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
            parts = [left, right]
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() | ast.Not(), operand=operand):
            parts = [operand]
        case ast.BoolOp(values=values):
            parts = values
        case ast.Compare(left=left, ops=ops, comparators=others) if all(
            type(op) in _COMPARISONS for op in ops
        ):
            parts = [left, *others]
        case _:
            raise ExpressionError(
                f"{ast.unparse(node)} is not understood; an expression has numbers, names, + - * / // % **, "
                f"comparisons, and, or, not, min, max, round and abs"
            )
    for part in parts:
        _check(part, names)


def _dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    if isinstance(node, ast.Name):
        return node.id
    raise ExpressionError(f"{ast.unparse(node)} is no name that a dot may follow")


def _compute(node: ast.AST, look: Callable[[str], Any]) -> Any:
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name() | ast.Attribute():
            return look(_dotted(node))
        case ast.Call(func=ast.Name(id=name), args=args):
            return _FUNCTIONS[name](*[_number(_compute(arg, look)) for arg in args])
        case ast.BinOp(left=left, op=op, right=right):
            return _ARITHMETIC[type(op)](
                _number(_compute(left, look)), _number(_compute(right, look))
            )
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return not _compute(operand, look)
        case ast.UnaryOp(op=op, operand=operand):
            value = _number(_compute(operand, look))
            return -value if isinstance(op, ast.USub) else value
        case ast.BoolOp(op=op, values=values):
            found = (bool(_compute(value, look)) for value in values)
            return all(found) if isinstance(op, ast.And) else any(found)
        case ast.Compare(left=left, ops=ops, comparators=others):
            below = _compute(left, look)
            for comparison, other in zip(ops, others, strict=True):
                above = _compute(other, look)
                if not _COMPARISONS[type(comparison)](below, above):
                    return False
                below = above
            return True
    raise AssertionError(ast.dump(node))  # `_check` lets nothing else through


def _number(value: Any) -> float | int:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r} is no number")
    return value
