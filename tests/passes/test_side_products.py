"""Which products are added beside others, and what the whole of those is."""

import torch

from dcc.passes.graph import nodes_by_name
from dcc.passes.side_products import side_products

aten = torch.ops.aten
EXAMPLES = {"x": torch.ones(2, 5, 8), "w": torch.ones(8, 8), "a": torch.ones(2, 8), "b": torch.ones(8, 2)}


def beside(x, w, a, b):
    return aten.mul.Tensor(aten.linear.default(aten.linear.default(aten.dropout.default(x, 0.1, False), a), b), 0.5)


def found(build, function):
    graph_module = build(function, **EXAMPLES)
    side = side_products(graph_module)
    return {name: whole.name for name, whole in side.whole.items()}, side.at_side, side, nodes_by_name(graph_module)


def test_one_adapter(build):
    def function(x, w, a, b):
        return (aten.gelu.default(aten.add.Tensor(aten.linear.default(x, w), beside(x, w, a, b))),)

    whole, at_side, side, nodes = found(build, function)
    assert whole == {"linear_default": "add_tensor"}
    assert at_side == {"linear_default_1", "linear_default_2"}
    assert side.product(nodes["add_tensor"]) is nodes["linear_default"]
    assert side.product(nodes["gelu_default"]) is nodes["gelu_default"]


def test_several_adapters_and_a_share_of_the_product_itself(build):
    def function(x, w, a, b):
        own = aten.linear.default(x, w)
        first = aten.add.Tensor(own, beside(x, w, a, b))
        return (aten.add.Tensor(first, aten.add.Tensor(aten.mul.Tensor(own, 0.1), beside(x, w, a, b))),)

    whole, at_side, _, _ = found(build, function)
    assert whole == {"linear_default": "add_tensor_2"}
    assert at_side == {f"linear_default_{k}" for k in (1, 2, 3, 4)}


def test_residuals_and_layers_in_a_row_are_no_adapters(build):
    def mlp(x, w, a, b):
        return (aten.add.Tensor(x, aten.linear.default(aten.gelu.default(aten.linear.default(x, a)), b)),)

    def shortcut(x, w, a, b):
        inner = aten.linear.default(aten.gelu.default(aten.linear.default(x, a)), b)
        return (aten.add.Tensor(aten.linear.default(x, w), inner),)

    def other_input(x, w, a, b):
        return (aten.add.Tensor(aten.linear.default(x, w), beside(aten.neg.default(x), w, a, b)),)

    def and_the_input(x, w, a, b):
        return (aten.add.Tensor(aten.linear.default(x, w), aten.add.Tensor(x, beside(x, w, a, b))),)

    for function in (mlp, shortcut, other_input, and_the_input):
        whole, at_side, _, _ = found(build, function)
        assert not whole and not at_side, function.__name__
