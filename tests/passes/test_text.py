"""The canonical text: stable over captures, different for different graphs."""

import re

import torch
from torch import nn

from dcc.capture.export import capture
from dcc.passes.graph import output_node
from dcc.passes.text import digest, text
from dcc.record.call import bind

aten = torch.ops.aten


class Scaled(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.scale = scale
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(x) * self.scale


def graph_of(module, batch=2):
    return capture(module, bind(module, (torch.randn(batch, 8),), {}, frozenset())).graph_module


def test_two_captures_have_one_text():
    first, second = graph_of(Scaled(0.5)), graph_of(Scaled(0.5), batch=3)
    assert text(first) == text(second)
    assert digest(first) == digest(second)
    assert re.fullmatch("[0-9a-f]{64}", digest(first))


def test_a_changed_constant_changes_it():
    first, second = graph_of(Scaled(0.5)), graph_of(Scaled(0.25))
    assert text(first) == text(second).replace("0.25", "0.5")
    assert digest(first) != digest(second)


def test_names_of_inner_nodes_do_not_matter(build):
    def function(x):
        return (aten.exp.default(aten.neg.default(x)),)

    first, second = build(function, x=torch.ones(2)), build(function, x=torch.ones(2))
    for node in second.graph.nodes:
        if node.op == "call_function":
            node.name = f"other_{node.name}"
    assert text(first) == text(second)


def test_names_of_inputs_matter(build):
    first = build(lambda x: (aten.neg.default(x),), x=torch.ones(2))
    second = build(lambda y: (aten.neg.default(y),), y=torch.ones(2))
    assert digest(first) != digest(second)


def test_shapes_dtypes_operators_and_wiring_matter(build):
    def negate(x, y):
        return (aten.neg.default(x),)

    def exponent(x, y):
        return (aten.exp.default(x),)

    def other_input(x, y):
        return (aten.neg.default(y),)

    def both(x, y):
        return (aten.neg.default(x), y)

    one = torch.ones(2)
    graphs = [build(function, x=one, y=one) for function in (negate, exponent, other_input, both)]
    graphs += [build(negate, x=torch.ones(3), y=one), build(negate, x=one.double(), y=one)]
    assert len({digest(graph_module) for graph_module in graphs}) == len(graphs)


def test_types_read_well(build):
    def function(x):
        return (
            aten._to_copy.default(x, dtype=torch.bfloat16),
            aten._to_copy.default(x, dtype=torch.int64),
            aten.gt.Scalar(x, 0),
        )

    lines = text(build(function, x=torch.ones(2, 3))).splitlines()
    assert [line.rpartition("  # ")[2] for line in lines[:-1]] == ["f32[2, 3]", "bf16[2, 3]", "i64[2, 3]", "bool[2, 3]"]


def test_lists_of_nodes_and_opaque_modules(build):
    graph_module = build(lambda x, y: (aten.cat.default([x, y], 1),), x=torch.ones(2, 3), y=torch.ones(2, 1))
    graph_module.add_submodule("eager", nn.Identity())
    output = output_node(graph_module)
    with graph_module.graph.inserting_before(output):
        output.args = ((graph_module.graph.call_module("eager", output.args[0]),),)
    assert text(graph_module).splitlines()[2:] == [
        "%2 = aten.cat.default([%0, %1], 1)  # f32[2, 4]",
        "%3 = module eager(%2)",
        "return (%3,)",
    ]
