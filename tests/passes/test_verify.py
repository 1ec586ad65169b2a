"""Each invariant of passes/verify.py, broken by hand."""

import pytest
import torch
from torch import nn

from dcc.errors import PassError
from dcc.passes.graph import insert_call, nodes_by_name, output_node
from dcc.passes.verify import is_mutation, returns_nothing, verify

aten = torch.ops.aten


@pytest.fixture
def graph_module(build):
    def function(x, y):
        a = aten.neg.default(x)
        return (aten.add.Tensor(a, y),)

    return build(function, x=torch.ones(2), y=torch.ones(2))


def test_a_valid_graph_passes(graph_module, stack):
    verify(graph_module, "here")
    verify(stack.graph(), "here")


def test_an_assertion_needs_no_value(graph_module):
    with graph_module.graph.inserting_before(output_node(graph_module)):
        insert_call(graph_module, aten._assert_async.msg, nodes_by_name(graph_module)["x"], "message")
    del nodes_by_name(graph_module)["_assert_async_msg"].meta["val"]
    verify(graph_module, "here")


def test_order(graph_module):
    nodes = nodes_by_name(graph_module)
    nodes["add_tensor"].append(nodes["neg_default"])
    with pytest.raises(PassError, match=r"here: .*neg_default"):
        verify(graph_module, "here")


def test_names(graph_module):
    nodes = nodes_by_name(graph_module)
    nodes["neg_default"].name = "add_tensor"
    with pytest.raises(PassError, match=r"here: .*add_tensor"):
        verify(graph_module, "here")


def test_foreign_node(graph_module, build):
    other = build(lambda x: (aten.neg.default(x),), x=torch.ones(2))
    nodes_by_name(graph_module)["add_tensor"].args = (nodes_by_name(other)["x"], nodes_by_name(graph_module)["y"])
    with pytest.raises(PassError, match=r"here: "):
        verify(graph_module, "here")


def test_missing_module(graph_module):
    graph_module.add_submodule("eager", nn.Identity())
    with graph_module.graph.inserting_before(output_node(graph_module)):
        node = graph_module.graph.call_module("eager", (nodes_by_name(graph_module)["x"],))
    node.meta["val"] = torch.ones(2)
    verify(graph_module, "here")
    del graph_module.eager
    with pytest.raises(PassError, match=r"here: .*eager"):
        verify(graph_module, "here")


def test_attribute_read(graph_module):
    graph_module.register_parameter("weight", nn.Parameter(torch.ones(2)))
    with graph_module.graph.inserting_before(output_node(graph_module)):
        graph_module.graph.get_attr("weight")
    with pytest.raises(PassError, match=r"here: node 'weight' .*get_attr.*call_function"):
        verify(graph_module, "here")


def test_method_call(graph_module):
    with graph_module.graph.inserting_before(output_node(graph_module)):
        graph_module.graph.call_method("neg", (nodes_by_name(graph_module)["x"],))
    with pytest.raises(PassError, match=r"here: node 'neg' .*call_method"):
        verify(graph_module, "here")


def test_mutation(graph_module):
    with graph_module.graph.inserting_before(output_node(graph_module)):
        insert_call(graph_module, aten.add_.Tensor, nodes_by_name(graph_module)["neg_default"], 1)
    with pytest.raises(PassError, match=r"here: node 'add__tensor' .*mutates"):
        verify(graph_module, "here")


@pytest.mark.parametrize("name", ["x", "neg_default"])
def test_missing_value(graph_module, name):
    del nodes_by_name(graph_module)[name].meta["val"]
    with pytest.raises(PassError, match=rf"here: node '{name}' .*meta\['val'\]"):
        verify(graph_module, "here")


@pytest.mark.parametrize(
    "outputs",
    [
        lambda node: node,
        lambda node: [node],
        lambda node: (node, (node,)),
        lambda node: (node, None),
        lambda node: (node, 1),
        lambda node: {"out": node},
    ],
    ids=["bare", "list", "nested", "none", "number", "dict"],
)
def test_output_is_a_flat_tuple(graph_module, outputs):
    output_node(graph_module).args = (outputs(nodes_by_name(graph_module)["add_tensor"]),)
    with pytest.raises(PassError, match=r"here: .*flat tuple.*add_tensor"):
        verify(graph_module, "here")


def test_missing_output(graph_module):
    graph_module.graph.erase_node(output_node(graph_module))
    with pytest.raises(PassError, match=r"here: .*output"):
        verify(graph_module, "here")


def test_predicates(graph_module):
    nodes = nodes_by_name(graph_module)
    assert not is_mutation(nodes["neg_default"])
    assert not is_mutation(nodes["x"])
    assert not returns_nothing(nodes["neg_default"])
    with graph_module.graph.inserting_before(output_node(graph_module)):
        assert is_mutation(graph_module.graph.call_function(aten.relu_.default, (nodes["x"],)))
        assert returns_nothing(graph_module.graph.call_function(aten._assert_async.msg, (nodes["x"], "message")))
