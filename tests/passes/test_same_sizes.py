"""Sizes are the same by arithmetic or because an operator demands it, never because they were equal once."""

import pytest
import torch
from torch import nn

from dcc.passes.graph import nodes_by_name
from dcc.passes.same_sizes import carries_batch, follows, same_shape, same_size

DYNAMIC = torch.export.Dim.AUTO


class Sums(nn.Module):
    """Sizes that are equal at capture: two that a sum ties, one that nothing does, one that is made of another."""

    def forward(self, x, y, z, w):
        doubled = torch.cat([z, z], 1)
        rounded = w[:, : w.shape[1] // 2 * 2]
        return x + y, doubled, rounded, z.flatten(0, 1)


@pytest.fixture(scope="module")
def graph():
    given = [torch.randn(4, 4, 6) for _ in range(4)]
    dynamic = tuple({0: DYNAMIC, 1: DYNAMIC} for _ in given)
    return torch.export.export(Sums(), tuple(given), dynamic_shapes=dynamic, strict=False).module(check_guards=False)


@pytest.fixture(scope="module")
def nodes(graph):
    return nodes_by_name(graph)


def test_a_sum_ties_sizes_and_equal_numbers_do_not(nodes):
    assert same_shape(nodes["x"], nodes["y"])
    assert not same_shape(nodes["x"], nodes["z"])
    assert not same_shape(nodes["z"], nodes["w"])


def test_arithmetic_is_seen_through(nodes):
    """2 n + 0 is n + n; and the first dimension of what is flattened is a product."""
    doubled = next(node for node in nodes.values() if node.name.startswith("cat"))
    n = nodes["z"].meta["val"].shape[1]
    assert same_size(doubled.graph, doubled.meta["val"].shape[1], n + n)
    assert not same_size(doubled.graph, doubled.meta["val"].shape[1], nodes["x"].meta["val"].shape[1] * 2)


def test_a_rounded_size_follows_but_is_not_the_same(nodes):
    rounded = next(node for node in nodes.values() if node.name.startswith("slice"))
    assert not same_shape(rounded, nodes["w"])
    assert follows(rounded, nodes["w"])
    assert not follows(rounded, nodes["z"])


def test_what_the_concatenation_leaves_alone_is_tied(build):
    """Fixed sizes are compared as numbers."""
    aten = torch.ops.aten
    graph_module = build(
        lambda a, b: (aten.cat.default([a, b], 1),), a=torch.ones(2, 3, 4), b=torch.ones(2, 5, 4, dtype=torch.float64)
    )
    a, b = (nodes_by_name(graph_module)[name] for name in "ab")
    assert not same_shape(a, b)
    assert same_size(a.graph, 4, 4) and not same_size(a.graph, 3, 5)


def test_the_batch_is_the_first_dimension_of_the_first_output(graph, nodes, build):
    assert carries_batch(graph, nodes["x"]) and carries_batch(graph, nodes["y"])
    assert not carries_batch(graph, nodes["z"])  # four samples of something else
    fixed = build(lambda a: (torch.ops.aten.neg.default(a),), a=torch.ones(2, 3))
    assert not carries_batch(fixed, nodes_by_name(fixed)["a"])
