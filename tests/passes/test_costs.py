"""FLOPs and bytes against their closed forms."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dcc.capture.export import capture
from dcc.passes.costs import Cost, costs
from dcc.record.call import bind

aten = torch.ops.aten


def cost_of(build, function, **examples):
    """Cost of the graph's last node before its output."""
    graph_module = build(function, **examples)
    return costs(graph_module, list(examples.values()))[list(graph_module.graph.nodes)[-2].name]


def test_linear(build):
    cost = cost_of(
        build,
        lambda x, w, b: (aten.linear.default(x, w, b),),
        x=torch.ones(3, 5, 7),
        w=torch.ones(11, 7),
        b=torch.ones(11),
    )
    assert cost == Cost(flops=2 * 3 * 5 * 7 * 11, bytes=3 * 5 * 11 * 4, shape=(3, 5, 11))


@pytest.mark.parametrize("stride", [1, 2])
def test_convolution(build, stride):
    cost = cost_of(
        build,
        lambda x, w: (aten.conv2d.default(x, w, None, [stride, stride], [1, 1]),),
        x=torch.ones(2, 3, 8, 6),
        w=torch.ones(5, 3, 3, 3),
    )
    height, width = 8 // stride, 6 // stride
    assert cost == Cost(2 * 2 * height * width * 5 * 3 * 9, 2 * 5 * height * width * 4, (2, 5, height, width))


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_attention(masked):
    class Attention(nn.Module):
        def forward(self, query, key, value, mask):
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    mask = torch.ones(2, 1, 5, 7, dtype=torch.bool) if masked else None
    call = bind(
        Attention(), (torch.ones(2, 3, 5, 16), torch.ones(2, 3, 7, 16), torch.ones(2, 3, 7, 16), mask), {}, frozenset()
    )
    captured = capture(Attention(), call)
    found = costs(captured.graph_module, captured.inputs_of(call))
    assert sum(cost.flops for cost in found.values()) == 2 * 2 * 3 * 5 * 7 * (16 + 16)


def test_elementwise_work_is_free_but_its_bytes_count(build):
    cost = cost_of(build, lambda x: (aten.gelu.default(x),), x=torch.ones(2, 3, dtype=torch.bfloat16))
    assert cost == Cost(0, 2 * 3 * 2, (2, 3))


def test_every_node_has_a_cost(stack):
    found = costs(stack.captured.graph_module, stack.captured.inputs_of(stack.call))
    assert set(found) == {node.name for node in stack.captured.graph_module.graph.nodes}
    assert found["x"] == Cost(0, 2 * 5 * 8 * 4, (2, 5, 8))


def test_costs_follow_the_concrete_inputs(stack):
    call = bind(stack.module, (torch.ones(3, 9, 8), torch.ones(3)), {}, frozenset())
    found = costs(stack.captured.graph_module, stack.captured.inputs_of(call))
    assert found["linear"] == Cost(2 * 3 * 9 * 8 * 8, 3 * 9 * 8 * 4, (3, 9, 8))


def test_nothing_is_computed(build):
    """A product of 2**60 elements can only be estimated."""
    x, w = torch.empty(1).expand(2**30, 4), torch.empty(1).expand(2**30, 4)
    graph_module = build(lambda x, w: (aten.mm.default(x, aten.t.default(w)),), x=torch.ones(3, 4), w=torch.ones(5, 4))
    assert costs(graph_module, [x, w])["mm_default"].flops == 2 * 4 * 2**60
