"""Compute expressions of study files, such as `ratio.start + delta` or `ratio.start <= ratio.end`.

An expression has numbers, texts in quotes, dotted names, `+ - * / // % **`, comparisons, `and`,
`or`, `not`, and the functions `min`, `max`, `round` and `abs`. Python's parser reads it. Nothing
else is accepted, and no code of a file is ever run.
"""

from __future__ import annotations

import ast
import itertools
import math
import operator
from collections.abc import Callable
from typing import Any

# Characters of an expression: enough for any rule, too few to exhaust Python's parser.
MAX_LENGTH = 300

_ARITHMETIC: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    # Powers of integers would grow without end.
    ast.Pow: lambda base, exponent: float(base) ** float(exponent),
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
    """An expression cannot be read or computed; the message continues a sentence."""


class Expression:
    """An expression that is read once and computed often.

    >>> total = Expression("ratio.start + delta")
    >>> total.names
    ('ratio.start', 'delta')
    >>> total({"ratio.start": 0.25, "delta": 0.5}.__getitem__)
    0.75
    """

    def __init__(self, text: str) -> None:
        """Read an expression.

        Raises:
            ExpressionError: it cannot be read, or holds something that expressions do not have.
        """
        if len(text) > MAX_LENGTH:
            raise ExpressionError(f"is longer than {MAX_LENGTH} characters")
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
    def is_condition(self) -> bool:
        """Return whether the value is true or false."""
        if isinstance(self._root, ast.UnaryOp):
            return isinstance(self._root.op, ast.Not)
        return isinstance(self._root, ast.Compare | ast.BoolOp)

    def __call__(self, value_of: Callable[[str], Any]) -> Any:
        """Compute the expression.

        Args:
            value_of: gives the value of a name.

        Raises:
            ExpressionError: the values do not go together, such as text times a number, or the
                result is not finite.
        """
        try:
            value = _compute(self._root, value_of)
        except ZeroDivisionError:
            raise ExpressionError(f"{self.text!r} divides by zero") from None
        except (ArithmeticError, TypeError, RecursionError) as error:
            raise ExpressionError(f"{self.text!r} cannot be computed: {error.args[-1]}") from None
        if isinstance(value, complex) or (isinstance(value, float) and not math.isfinite(value)):
            raise ExpressionError(f"{self.text!r} gives {value}")
        return value


def _check(node: ast.AST, names: dict[str, None]) -> None:
    """Collect the names and refuse what an expression may not hold."""
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
                f"{ast.unparse(node)} is not understood; an expression has numbers, names, "
                f"+ - * / // % **, comparisons, and, or, not, min, max, round and abs"
            )
    for part in parts:
        _check(part, names)


def _dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    if isinstance(node, ast.Name):
        return node.id
    raise ExpressionError(f"{ast.unparse(node)} is no name that a dot may follow")


def _compute(node: ast.AST, value_of: Callable[[str], Any]) -> Any:
    def number(operand: ast.AST) -> float | int:
        value = _compute(operand, value_of)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{value!r} is no number")
        return value

    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name() | ast.Attribute():
            return value_of(_dotted(node))
        case ast.Call(func=ast.Name(id=name), args=args):
            return _FUNCTIONS[name](*[number(argument) for argument in args])
        case ast.BinOp(left=left, op=op, right=right):
            return _ARITHMETIC[type(op)](number(left), number(right))
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return not _compute(operand, value_of)
        case ast.UnaryOp(op=op, operand=operand):
            return -number(operand) if isinstance(op, ast.USub) else number(operand)
        case ast.BoolOp(op=op, values=values):
            decide = all if isinstance(op, ast.And) else any
            return decide(_compute(part, value_of) for part in values)
        case ast.Compare(left=left, ops=ops, comparators=others):
            operands = (_compute(part, value_of) for part in [left, *others])
            pairs = zip(ops, itertools.pairwise(operands), strict=True)
            return all(_COMPARISONS[type(op)](*pair) for op, pair in pairs)
    raise AssertionError(ast.dump(node))  # `_check` accepts nothing else
