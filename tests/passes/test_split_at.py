"""split_at: prefix and suffix together are the graph; sizes and lists do not cross."""

import pytest
import torch

from dcc.passes.graph import nodes_by_name, output_node
from dcc.passes.split_at import ancestors, prefix, suffix
from dcc.passes.verify import verify

aten = torch.ops.aten


def graph(x, w, v):
    a, b = aten.split.Tensor(x, 2, 1)
    h = aten.linear.default(a, w)
    g = aten.gelu.default(h)
    y = aten.add.Tensor(aten.mul.Tensor(g, b), h)
    return (aten.linear.default(y, v), g)


def examples():
    return {"x": torch.randn(3, 4), "w": torch.randn(2, 2), "v": torch.randn(5, 2)}


def test_the_two_parts_are_the_whole(build, run):
    values = examples()
    whole = build(graph, **values)
    inside = ancestors(whole, ["gelu_default"])
    assert {"gelu_default", "linear_default"} <= inside and "mul_tensor" not in inside
    rest, handed = suffix(whole, inside, drop=["gelu_default"])
    first = prefix(whole, ["gelu_default", *handed])
    verify(rest, "suffix")
    verify(first, "prefix")
    assert handed == ["linear_default", "gelu_default"]  # `b` comes from the list of views, which is made again
    given = dict(zip(["seen", *handed], run(first, **values), strict=True))
    expected = run(whole, **values)
    assert torch.equal(run(rest, **values, **given)[0], expected[0])
    assert torch.equal(given["seen"], expected[1])
    assert "w" not in nodes_by_name(rest) and "v" not in nodes_by_name(first)  # each takes what it needs only


def test_a_split_at_an_input_hands_nothing_over(build, run):
    values = examples()
    whole = build(graph, **values)
    rest, handed = suffix(whole, ancestors(whole, ["x"]), drop=[])
    assert handed == []
    for ours, expected in zip(run(rest, **values), run(whole, **values), strict=True):
        assert torch.equal(ours, expected)


def test_sizes_are_read_again_after_the_split(stack):
    """A captured graph whose sizes are symbolic: the suffix serves another batch than the captured one."""
    whole = stack.graph()
    (out,) = output_node(whole).args[0]
    inside = ancestors(whole, ["add"])
    rest, handed = suffix(whole, inside, drop=[])
    first = prefix(whole, handed)
    x, t = torch.randn(7, 3, 8), torch.rand(7)
    values = stack.values(x, t)
    names = [node.name for node in first.graph.nodes if node.op == "placeholder"]
    with torch.no_grad():
        given = dict(zip(handed, first(*(values[name] for name in names)), strict=True))
        names = [node.name for node in rest.graph.nodes if node.op == "placeholder"]
        result = rest(*((values | given)[name] for name in names))[0]
        assert torch.equal(result, stack.module(x, t))
    assert all(isinstance(nodes_by_name(whole)[name].meta["val"], torch.Tensor) for name in handed)
    assert out.name not in inside


def test_ancestors_of_a_missing_node():
    with pytest.raises(KeyError):
        ancestors(torch.fx.symbolic_trace(torch.nn.Identity()), ["nowhere"])
