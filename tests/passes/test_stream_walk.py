"""A slice of a concatenation comes from the pieces at its place, however many they are and whatever is between."""

import pytest
import torch

from dcc.passes.graph import nodes_by_name
from dcc.passes.stream_walk import walk

aten = torch.ops.aten
WHOLE = 2**63 - 1


def sources(build, function, **sizes):
    """Names of the inputs that the function's value is a sum of."""
    given = {"a": torch.ones(2, 4, 6), "b": torch.ones(2, 4, 6), "c": torch.ones(2, 4, 6)} | sizes
    graph_module = build(function, **given)
    (last,) = graph_module.graph.output_node().args[0]
    return {node.name for node in walk(last, nodes_by_name(graph_module).keys() & set(given)) if node.name in given}


def joined(a, b, c):
    return aten.add.Tensor(aten.cat.default([a, b], 1), aten.cat.default([c, c], 1))


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [(0, 4, {"a", "c"}), (4, WHOLE, {"b", "c"}), (4, 8, {"b", "c"}), (-4, WHOLE, {"b", "c"}), (3, 5, {"a", "b", "c"})],
)
def test_a_slice_comes_from_its_piece(build, start, end, expected):
    assert sources(build, lambda a, b, c: (aten.slice.Tensor(joined(a, b, c), 1, start, end),)) == expected


def test_a_slice_of_a_slice_counts_from_its_start(build):
    def function(a, b, c):
        middle = aten.slice.Tensor(aten.cat.default([a, b, c], 1), 1, 2, 10)
        return (aten.slice.Tensor(middle, 1, 2, 6),)

    assert sources(build, function) == {"b"}


def test_items_of_a_split_and_of_chunks(build):
    for split in (lambda x: aten.split.Tensor(x, 4, 1), lambda x: aten.chunk.default(x, 2, 1)):
        for index, expected in enumerate(("a", "b")):
            assert sources(build, lambda a, b, c, i=index, s=split: (s(aten.cat.default([a, b], 1))[i],)) == {expected}


def test_permuted_and_viewed_tokens_stay_where_they_are(build):
    def permuted(a, b, c):
        both = aten.permute.default(aten.cat.default([a, b], 1), [1, 0, 2])
        return (aten.slice.Tensor(both, 0, 4, WHOLE),)

    def viewed(a, b, c):
        both = aten.view.default(aten.cat.default([a, b], 1), [2, 8, 3, 2])
        return (aten.slice.Tensor(both, 1, 0, 4),)

    assert sources(build, permuted) == {"b"}
    assert sources(build, viewed) == {"a"}


def test_a_view_that_mixes_tokens_says_nothing(build):
    def function(a, b, c):
        both = aten.view.default(aten.cat.default([a, b], 1), [2, 6, 8])
        return (aten.slice.Tensor(both, 1, 0, 3),)

    assert sources(build, function) == {"a", "b"}


def test_a_square_is_no_multiple(build):
    assert sources(build, lambda a, b, c: (aten.mul.Tensor(a, 2.0),)) == {"a"}
    assert sources(build, lambda a, b, c: (aten.mul.Tensor(a, a),)) == set()
