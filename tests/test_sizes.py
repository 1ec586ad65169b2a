"""Sizes as data: trees that come back as the same expressions, and trees that are refused before they take long."""

import json
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dcc.capture.sizes import DEEPEST, MOST_IN_ALL, MOST_PARTS, SizeReader, SizeWriter
from dcc.errors import CaptureError
from dcc.torch_internals import expression, number_at_capture

SYMBOLS = {"s0": 12, "s1": 5}


def read(tree, kind="int"):
    reader = SizeReader(SYMBOLS, [[kind, tree]])
    return reader.read({"size": 0})


@pytest.mark.parametrize(
    ("tree", "kind", "value"),
    [
        (["Add", "s0", ["Mul", 2, "s1"], -1], "int", 21),
        (["FloorDiv", ["Add", "s0", -1], 4], "int", 2),
        (["Mod", "s0", "s1"], "int", 2),
        (["PowByNatural", "s1", 3], "int", 125),
        (["Max", "s0", ["Mul", "s1", 3]], "int", 15),
        (["TruncToInt", ["IntTrueDiv", "s0", "s1"]], "int", 2),
        (["Mul", ["ToFloat", "s1"], 0.5], "float", 2.5),
        (["StrictLessThan", "s1", "s0"], "bool", True),
        (["And", ["StrictLessThan", "s1", "s0"], ["Unequality", "s1", 5]], "bool", False),
        (["Mul", 2, 3], "int", 6),
    ],
    ids=str,
)
def test_a_tree_is_the_arithmetic_it_says(tree, kind, value):
    size = read(tree, kind)
    assert number_at_capture(size) == value and type(number_at_capture(size)) is type(value)


def test_sizes_of_a_capture_come_back_as_the_same_arithmetic():
    class Halves(nn.Module):
        def forward(self, x):
            return x[:, : x.shape[1] // 2 + 1].repeat(2, 3)

    any_size = torch.export.Dim.AUTO
    sizes = {"x": {0: any_size, 1: any_size}}
    program = torch.export.export(Halves(), (torch.ones(4, 9),), dynamic_shapes=sizes, strict=False)
    values = [node.meta["val"] for node in program.graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    writer = SizeWriter()
    written = json.loads(json.dumps([[writer.write(size) for size in value.shape] for value in values]))
    reader = SizeReader(writer.hints(), json.loads(json.dumps(writer.table)))
    assert writer.hints() == dict(zip(map(str, (expression(s) for s in values[0].shape)), (4, 9), strict=True))
    renamed = {
        str(expression(reader.read(new))): str(expression(old))
        for new, old in zip(written[0], values[0].shape, strict=True)
    }
    for new_sizes, value in zip(written, values, strict=True):
        for new, old in zip(new_sizes, value.shape, strict=True):
            found = reader.read(new)
            assert number_at_capture(found) == number_at_capture(old)
            if not isinstance(old, int):
                symbols = {
                    symbol: next(s for s in expression(old).free_symbols if str(s) == renamed[str(symbol)])
                    for symbol in expression(found).free_symbols
                }
                assert expression(found).xreplace(symbols) == expression(old)


deep, wide = "s0", ["Add", *["s0"] * (MOST_PARTS + 1)]
for _ in range(DEEPEST + 1):
    deep = ["Add", deep, 1]
REFUSED = {
    "a power beyond 64 bits": ["PowByNatural", "s0", 64],
    "a power of a power": ["PowByNatural", ["PowByNatural", "s0", 16], 64],
    "a huge exponent": ["Pow", 2, 10**18],
    "a negative exponent": ["Pow", "s0", -1],
    "a huge number": ["Mul", 10**30, "s0"],
    "numbers whose product is huge": ["Mul", *[10**9] * 3],
    "a division by zero": ["FloorDiv", "s0", ["Add", "s0", -12]],
    "text": ["Add", "s0", "().__class__"],
    "a symbol that is not there": ["Add", "s0", "s9"],
    "an unknown function": ["__import__", "os"],
    "a function of torch": ["Where", True, 1, 2],
    "too deep": deep,
    "too wide": wide,
    "no arguments": ["Add"],
    "an empty list": [],
    "an object": {"Add": 1},
    "null": None,
    "NaN": ["Mul", float("nan"), "s0"],
    "infinity": ["Mul", float("inf"), "s0"],
    "a float": ["Mul", 0.5, "s0"],
    "a bool": ["Equality", "s0", 1],
    "one argument too many": ["FloorDiv", "s0", 2, 3],
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_trees_are_refused_at_once(name):
    begun = time.perf_counter()
    with pytest.raises(CaptureError):
        read(REFUSED[name])
    assert time.perf_counter() - begun < 1


def test_all_sizes_together_are_bounded():
    tree = ["Add", *["s0"] * (MOST_PARTS - 2)]
    with pytest.raises(CaptureError, match=f"all have more than {MOST_IN_ALL}"):
        SizeReader(SYMBOLS, [["int", tree]] * (MOST_IN_ALL // MOST_PARTS + 2))


@pytest.mark.parametrize(
    "symbols", [{"s0": 1}, {"s0": True}, {"s0": 2.0}, {"s0": 2**70}, {"S": 3}, {"s0; x": 3}, {"": 3}, [], None], ids=str
)
def test_other_symbols_are_refused(symbols):
    with pytest.raises(CaptureError, match="symbol"):
        SizeReader(symbols, [])


leaves = st.one_of(
    st.sampled_from(["s0", "s1"]), st.integers(-9, 2**70), st.floats(), st.booleans(), st.none(), st.text()
)
names = st.sampled_from(
    ["Add", "Mul", "Pow", "FloorDiv", "Mod", "Max", "Min", "CeilDiv", "ModularIndexing", "And", "Not"]
)
trees = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=4).flatmap(lambda parts: names.map(lambda n: [n, *parts]))
)


@given(trees, st.sampled_from(["int", "float", "bool"]))
def test_any_tree_is_a_size_or_refused_within_a_second(tree, kind):
    begun = time.perf_counter()
    try:
        number_at_capture(read(tree, kind))
    except CaptureError:
        pass
    assert time.perf_counter() - begun < 1
