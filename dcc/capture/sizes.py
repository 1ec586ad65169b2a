"""Sizes as data: symbolic arithmetic as nested lists, `["Add", "s0", ["Mul", 2, "s1"]]`, written and rebuilt.

Whoever reads one computes it first with the sizes at capture, in bounded numbers; only what stays within the bounds
becomes an expression. So no tree, however it was made, takes long.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any

import torch

from dcc.errors import CaptureError
from dcc.torch_internals import SIZE_EXPRESSIONS, SizeEnvironment, expression, fixed_size, number_at_capture

SYMBOL = re.compile(r"[a-z]{1,4}\d{1,9}")
SYMBOLIC = {torch.SymInt: "int", torch.SymFloat: "float", torch.SymBool: "bool"}
KINDS = {"int": int, "float": float, "bool": bool}
MOST_PARTS, MOST_IN_ALL, DEEPEST = 200, 10_000, 24
LARGEST = 2**63 - 1  # of every number on the way
LARGEST_POWER = 64


def _product(*numbers: Any) -> Any:
    return reduce(operator.mul, numbers)


def _sum(*numbers: Any) -> Any:
    return reduce(operator.add, numbers)


def power(base: Any, exponent: Any) -> Any:
    """`base ** exponent` for exponents that a size may have. Raises CaptureError for others."""
    if not 0 <= exponent <= LARGEST_POWER:
        raise CaptureError(f"{exponent} is no power that a size may have")
    return base**exponent


OPERATIONS: Mapping[str, Callable[..., Any]] = {  # what each function of SIZE_EXPRESSIONS does to numbers
    "Add": _sum,
    "Mul": _product,
    "Pow": power,
    "PowByNatural": power,
    "FloatPow": power,
    "FloorDiv": operator.floordiv,
    "CleanDiv": operator.floordiv,
    "CeilDiv": lambda a, b: -(-a // b),
    "IntTrueDiv": operator.truediv,
    "FloatTrueDiv": operator.truediv,
    "Mod": operator.mod,
    "PythonMod": operator.mod,
    "ModularIndexing": lambda base, divisor, modulus: base // divisor % modulus,
    "Max": max,
    "Min": min,
    "ToFloat": float,
    "CeilToInt": math.ceil,
    "FloorToInt": math.floor,
    "TruncToInt": math.trunc,
    "RoundToInt": round,
    "Equality": operator.eq,
    "Unequality": operator.ne,
    "StrictLessThan": operator.lt,
    "LessThan": operator.le,
    "StrictGreaterThan": operator.gt,
    "GreaterThan": operator.ge,
    "And": lambda *values: all(values),
    "Or": lambda *values: any(values),
    "Not": operator.not_,
}


class SizeWriter:
    """Sizes as indices into a table of trees, in which each stands once; and the symbols' values at capture."""

    def __init__(self) -> None:
        self.trees: dict[str, int] = {}
        self.table: list[Any] = []
        self.known: dict[str, int] = {}
        self.used: set[str] = set()

    def write(self, size: Any) -> Any:
        """A number as it is, a symbolic size as `{"size": index}`. Raises CaptureError for what has no spelling."""
        if size is None or isinstance(size, bool | int | float):
            return size
        kind = SYMBOLIC.get(type(size))
        if kind is None:
            raise CaptureError(f"a file cannot hold a value of type {type(size).__name__}")
        fixed = fixed_size(size) if kind == "int" else None
        if fixed is not None:
            return fixed
        formula = expression(size)
        if formula.is_Symbol:
            value: Any = number_at_capture(size)
            if value is None:
                raise CaptureError(f"the size {formula} is known only when the graph runs")
            self.known[str(formula)] = value
        text = str(formula)
        if text not in self.trees:
            self.trees[text] = len(self.table)
            self.table.append([kind, self.tree(formula)])
        return {"size": self.trees[text]}

    def tree(self, formula: Any) -> Any:
        """A sympy expression as nested lists."""
        if formula.is_Symbol:
            self.used.add(str(formula))
            return str(formula)
        for known, plain in (("is_Boolean", bool), ("is_Integer", int), ("is_Float", float)):
            if getattr(formula, known, False) and not formula.args:
                return plain(formula)
        name = formula.func.__name__
        if SIZE_EXPRESSIONS.get(name) is not formula.func:
            raise CaptureError(f"a file cannot hold the size {formula}")
        return [name, *(self.tree(argument) for argument in formula.args)]

    def hints(self) -> dict[str, int]:
        """The size of every symbol at capture. Raises CaptureError where no value has a symbol's size alone."""
        if missing := self.used - set(self.known):
            raise CaptureError(f"no value of the graph has the size {', '.join(sorted(missing))} alone")
        return self.known


class SizeReader:
    """Sizes from the table of a SizeWriter, in a shape environment of their own. Raises CaptureError for another."""

    def __init__(self, symbols: Any, table: Any) -> None:
        if not isinstance(symbols, dict) or not isinstance(table, list):
            raise CaptureError("symbols and sizes must be an object and a list")
        for name, value in symbols.items():
            if not SYMBOL.fullmatch(name) or type(value) is not int or not 2 <= value <= LARGEST:
                raise CaptureError(f"the symbol {name!r:.40} of the size {value!r:.40} is none")
        self.symbols, self.parts = symbols, 0
        self.environment = SizeEnvironment(symbols)
        self.sizes = [self._size(entry) for entry in table]

    def read(self, size: Any) -> Any:
        """What SizeWriter.write was given."""
        if isinstance(size, dict) and set(size) == {"size"} and type(size["size"]) is int:
            if not 0 <= size["size"] < len(self.sizes):
                raise CaptureError(f"there is no size {size['size']}")
            return self.sizes[size["size"]]
        if size is None or isinstance(size, bool | float) or (type(size) is int and abs(size) <= LARGEST):
            return size
        raise CaptureError(f"{size!r:.40} is no size")

    def _size(self, entry: Any) -> Any:
        if not isinstance(entry, list) or len(entry) != 2 or entry[0] not in list(KINDS):
            raise CaptureError(f"{entry!r:.40} is no size")
        kind, tree = entry
        before = self.parts
        value = self._number(tree, before, 0)
        if isinstance(value, bool) != (kind == "bool") or (kind == "int" and not isinstance(value, int)):
            raise CaptureError(f"a size of kind {kind} is {value!r:.40}")
        return self.environment.size(kind, self._formula(tree), KINDS[kind](value))

    def _number(self, tree: Any, before: int, depth: int) -> Any:
        """The tree's value at capture; every number on the way is checked, and its parts are counted."""
        self.parts += 1
        if self.parts - before > MOST_PARTS or self.parts > MOST_IN_ALL or depth > DEEPEST:
            raise CaptureError(f"a size has more than {MOST_PARTS} parts, or all have more than {MOST_IN_ALL}")
        if isinstance(tree, str):
            if tree not in self.symbols:
                raise CaptureError(f"{tree!r:.40} is no symbol of this graph")
            return self.symbols[tree]
        if isinstance(tree, list):
            name = tree[0] if tree else None
            if not isinstance(name, str) or name not in OPERATIONS or len(tree) < 2:
                raise CaptureError(f"{name!r:.40} is no arithmetic on sizes; there are: {', '.join(OPERATIONS)}")
            arguments = [self._number(part, before, depth + 1) for part in tree[1:]]
            try:
                value = OPERATIONS[name](*arguments)
            except (TypeError, ValueError, ArithmeticError) as error:
                raise CaptureError(f"a size cannot be computed: {name} of {arguments}: {error}") from error
        else:
            value = tree
        if not isinstance(value, bool | int | float) or not abs(value) <= LARGEST:
            raise CaptureError(f"a size has the part {value!r:.40}, which is no number within 64 bits")
        return value

    def _formula(self, tree: Any) -> Any:
        if isinstance(tree, list):
            return SIZE_EXPRESSIONS[tree[0]](*map(self._formula, tree[1:]))
        return self.environment.atom(tree)
