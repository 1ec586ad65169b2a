"""Which value rides on which, and the branches in between."""

import pytest
import torch

from dcc.passes.graph import nodes_by_name, op_name
from dcc.passes.residual_stream import base_of, branches, stream_sources

aten = torch.ops.aten


def gated(x, w, gate, context, kernel):
    h = aten.add.Tensor(x, aten.mul.Tensor(gate, aten.linear.default(x, w)))
    inner = aten.gelu.default(aten.linear.default(h, w))
    return (aten.add.Tensor(h, aten.mul.Tensor(aten.linear.default(inner, w), gate)),)


def examples(**changes):
    return {
        "x": torch.ones(2, 5, 4),
        "w": torch.ones(4, 4),
        "gate": torch.ones(2, 1, 4),
        "context": torch.ones(2, 3, 4),
        "kernel": torch.ones(5, 5, 1),
    } | changes


def facts(build, function, **changes):
    """The graph's nodes by name, and the last value."""
    graph_module = build(function, **examples(**changes))
    nodes = nodes_by_name(graph_module)
    return nodes, graph_module.graph.output_node().args[0][0]


def found(nodes, last, stop=("x",)):
    inside = frozenset(nodes) - {"x", "w", "gate", "context", "kernel", "output", *stop}
    return [(b.value.name, b.addition.name, b.kind) for b in branches(last, set(stop), inside)]


def test_value_rides_on_the_stream(build):
    nodes, last = facts(build, gated)
    assert stream_sources(last, {"x", "gate", "w"}) == {"x"}
    assert base_of(last, [nodes["gate"], nodes["x"]]) is nodes["x"]


def test_branches_are_taken_before_their_gates_in_execution_order(build):
    nodes, last = facts(build, gated)
    assert found(nodes, last) == [
        ("linear_default", "add_tensor", "mlp"),
        ("linear_default_2", "add_tensor_1", "mlp"),
    ]


def test_a_gate_as_large_as_the_branch_is_kept(build):
    nodes, last = facts(build, gated, gate=torch.ones(2, 5, 4))
    assert [value for value, _, _ in found(nodes, last)] == ["mul_tensor", "mul_tensor_1"]


def test_a_product_with_the_stream_is_no_residual(build):
    nodes, last = facts(build, lambda x, w, gate, context, kernel: (aten.mul.Tensor(x, aten.linear.default(x, w)),))
    assert stream_sources(last, {"x"}) == set()
    assert base_of(last, [nodes["x"]]) is None
    assert found(nodes, last) == []


def test_another_shape_or_dtype_is_no_base(build):
    """The walk goes on through slices and casts, and so finds the stream, but it is no base."""

    def shorter(x, w, gate, context, kernel):
        return (aten.slice.Tensor(aten.add.Tensor(x, x), 1, 0, 3),)

    def cast(x, w, gate, context, kernel):
        return (aten._to_copy.default(aten.add.Tensor(x, x), dtype=torch.bfloat16),)

    for function in (shorter, cast):
        nodes, last = facts(build, function)
        assert stream_sources(last, {"x"}) == {"x"}
        assert base_of(last, [nodes["x"]]) is None


def test_joined_and_split_streams_keep_their_bases(build):
    def joint(x, w, gate, context, kernel):
        both = aten.cat.default([context, x], 1)
        both = aten.add.Tensor(both, aten.linear.default(both, w))
        return aten.slice.Tensor(both, 1, 3, 8), aten.slice.Tensor(both, 1, 0, 3)

    nodes, last = facts(build, joint)
    entering = [nodes["x"], nodes["context"]]
    assert base_of(last, entering) is nodes["x"]
    assert base_of(nodes["slice_tensor_1"], entering) is nodes["context"]


def test_subtracted_and_scaled_streams_are_followed(build):
    def function(x, w, gate, context, kernel):
        return (aten.sub.Tensor(aten.mul.Tensor(x, 0.5), aten.linear.default(x, w)),)

    nodes, last = facts(build, function)
    assert base_of(last, [nodes["x"]]) is nodes["x"]
    assert found(nodes, last) == [("linear_default", "sub_tensor", "mlp")]


def test_walk_stops_where_it_is_told(build):
    nodes, last = facts(build, gated)
    assert base_of(last, [nodes["x"], nodes["add_tensor"]]) is nodes["add_tensor"]
    assert found(nodes, last, stop=("x", "add_tensor")) == [("linear_default_2", "add_tensor_1", "mlp")]


def test_additions_outside_the_region_are_no_branches(build):
    _, last = facts(build, gated)
    inside = frozenset({"add_tensor_1", "mul_tensor_1", "linear_default_2", "gelu_default", "linear_default_1"})
    assert [b.addition.name for b in branches(last, {"x"}, inside)] == ["add_tensor_1"]


def attention(x, w, keys):
    return aten.scaled_dot_product_attention.default(aten.linear.default(x, w), keys, keys)


def wide(x, w):
    return aten.linear.default(aten.silu.default(aten.linear.default(x, w)), w)


@pytest.mark.parametrize(
    ("branch", "kind"),
    [
        (lambda x, w, context, kernel: attention(x, w, x), "attn"),
        (lambda x, w, context, kernel: attention(x, w, context), "cross"),
        (lambda x, w, context, kernel: wide(x, w), "mlp"),
        (lambda x, w, context, kernel: aten.add.Tensor(attention(x, w, x), wide(x, w)), "attn+mlp"),
        (lambda x, w, context, kernel: aten.conv1d.default(x, kernel), "conv"),
        (lambda x, w, context, kernel: aten.sin.default(x), "other"),
    ],
    ids=["attn", "cross", "mlp", "attn+mlp", "conv", "other"],
)
def test_kinds(build, branch, kind):
    def function(x, w, gate, context, kernel):
        return (aten.add.Tensor(x, branch(x, w, context, kernel)),)

    nodes, last = facts(build, function)
    assert [k for _, _, k in found(nodes, last)] == [kind]


def test_operator_names(build):
    nodes, _ = facts(build, gated)
    assert op_name(nodes["add_tensor"]) == "add"
    assert op_name(nodes["gelu_default"]) == "gelu"
    assert op_name(nodes["x"]) == ""
    assert op_name(nodes["output"]) == ""
