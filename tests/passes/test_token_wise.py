"""token_wise: what acts on each token alone, where that ends, and why other values do not."""

import pytest
import torch

from dcc.passes.graph import nodes_by_name
from dcc.passes.token_wise import Region, residual_ends, token_region

aten = torch.ops.aten


def feed_forward(x, shift, w, v, norm):
    h = aten.layer_norm.default(x, [4], norm, None)
    h = aten.add.Tensor(h, aten.unsqueeze.default(shift, 1))
    a, b = aten.chunk.default(aten.linear.default(h, w), 2, -1)
    h = aten.linear.default(aten.mul.Tensor(a, aten.gelu.default(b)), v)
    return (aten.add.Tensor(x, h),)


EXAMPLES = {
    "x": torch.randn(2, 5, 4),
    "shift": torch.randn(2, 4),
    "w": torch.randn(12, 4),
    "v": torch.randn(4, 6),
    "norm": torch.randn(4),
}


def test_the_region_of_an_mlp_ends_at_its_stream(build):
    nodes = nodes_by_name(build(feed_forward, **EXAMPLES))
    region = token_region(nodes["linear_default_1"], {"x"})
    assert region == Region(
        (
            "layer_norm_default",
            "add_tensor",
            "linear_default",
            "chunk_default",
            "getitem",
            "getitem_1",
            "gelu_default",
            "mul_tensor",
            "linear_default_1",
        ),
        frozenset({"x"}),
    )
    assert "unsqueeze_default" not in region.nodes  # the same for all tokens: used as it is


def test_the_ends_of_a_branch(build):
    nodes = nodes_by_name(build(feed_forward, **EXAMPLES))
    assert residual_ends(nodes["linear_default_1"]) == ({"x"}, nodes["add_tensor_1"])


def test_the_ends_lie_after_the_gate_and_on_all_of_the_stream(build):
    def gated(x, y, gate, w):
        stream = aten.add.Tensor(x, y)
        return (aten.add.Tensor(stream, aten.mul.Tensor(gate, aten.linear.default(stream, w))),)

    value = torch.randn(2, 5, 4)
    nodes = nodes_by_name(build(gated, x=value, y=value, gate=torch.randn(2, 1, 4), w=torch.randn(4, 4)))
    assert residual_ends(nodes["linear_default"]) == ({"add_tensor", "x", "y"}, nodes["add_tensor_1"])


def test_a_value_that_joins_no_stream_has_no_ends(build):
    nodes = nodes_by_name(build(feed_forward, **EXAMPLES))
    assert residual_ends(nodes["linear_default"]) == (set(), None)


def test_a_captured_transformer(transformer):
    nodes = nodes_by_name(transformer.captured.graph_module)
    mlps = [node for name, node in nodes.items() if name.startswith("linear") and "mlp_2" in str(node.args[1])]
    assert len(mlps) == 2
    for value in mlps:
        ends, _ = residual_ends(value)
        region = token_region(value, ends)
        assert isinstance(region, Region) and len(region.ends) == 1 and len(region.nodes) == 4


def _mean(x):
    return (aten.add.Tensor(x, aten.sub.Tensor(x, aten.mean.dim(x, [1], True))),)


def _softmax(x):
    return (aten.softmax.int(x, 1),)


def _norm(x):
    return (aten.layer_norm.default(x, [5, 4]),)


def _view(x):
    return (aten.gelu.default(aten.view.default(x, [2, 5, 2, 2])),)


def _swapped(x):
    return (aten.transpose.int(aten.exp.default(aten.transpose.int(x, 1, 2)), 1, 2),)


def _flipped(x):
    return (aten.slice.Tensor(aten.cat.default([x, x], 1), 1, 2, 7),)


def _attention(x):
    return (aten.matmul.default(aten.matmul.default(x, aten.transpose.int(x, 1, 2)), x),)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (_softmax, "softmax_int (softmax): works along the tokens or the batch"),
        (_norm, "layer_norm_default (layer_norm): normalises over tokens"),
        (_view, "view_default (view): mixes tokens, or is not known to leave them apart"),
        (_swapped, "transpose_int_1 (transpose): moves the token dimension"),
        (_flipped, "slice_tensor (slice): works along the tokens or the batch"),
        (_attention, "matmul_default_1 (matmul): is no product of tokens with one matrix"),
    ],
)
def test_says_why_not(build, function, reason):
    graph_module = build(function, x=torch.randn(2, 5, 4))
    value = list(graph_module.graph.nodes)[-1].args[0][0]
    assert token_region(value, {"x"}) == reason


def test_a_mean_over_tokens_is_the_same_for_all_of_them(build):
    nodes = nodes_by_name(build(_mean, x=torch.randn(2, 5, 4)))
    region = token_region(nodes["sub_tensor"], {"x"})
    assert region == Region(("sub_tensor",), frozenset({"x"}))  # the mean itself stays outside, over all tokens


def test_a_table_of_tokens_without_batch_is_refused(build):
    def position(x, table):
        return (aten.add.Tensor(x, table),)

    nodes = nodes_by_name(build(position, x=torch.randn(2, 5, 4), table=torch.randn(5, 4)))
    assert token_region(nodes["add_tensor"], set()) == "add_tensor (add): table has a row per token, but no batch"


@pytest.mark.parametrize("shape", [(2, 4), (2, 1, 4)], ids=str)
def test_a_value_without_tokens_is_refused(build, shape):
    nodes = nodes_by_name(build(lambda x: (aten.exp.default(x),), x=torch.randn(shape)))
    assert token_region(nodes["exp_default"], set()).endswith("with two or more tokens")


def test_random_dropout_is_refused(build):
    nodes = nodes_by_name(build(lambda x: (aten.dropout.default(x, 0.5, True),), x=torch.randn(2, 5, 4)))
    assert token_region(nodes["dropout_default"], set()) == "dropout_default (dropout): is random"
