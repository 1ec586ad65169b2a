"""Outlining: what shares a body, what does not, the view that Inductor misreads, and the numbers."""

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from dcc.capture.export import capture
from dcc.lower.program import lower
from dcc.passes.graph import insert_call, nodes_by_name, output_node
from dcc.passes.outline_blocks import outline_blocks, twins
from dcc.passes.specialize import specialize
from dcc.record.call import bind
from dcc.variants.variant import Variant

aten = torch.ops.aten


class Block(nn.Module):
    """Width 8; `tail` returns the last four of five tokens more, a view with an offset."""

    def __init__(self, hidden=16, tail=False):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, hidden), nn.Linear(hidden, 8)
        self.tail = tail

    def forward(self, x):
        if self.tail:
            x = torch.cat([x[:, :1], x], 1)
        x = x + self.down(torch.tanh(self.up(self.norm(x))).sigmoid().relu() * 2)
        return x[:, 1:] if self.tail else x


class Net(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.blocks, self.head = nn.ModuleList(blocks), nn.Linear(8, 8)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Nested(nn.Module):
    """Two levels of other widths, each with blocks of its own: only the inner ones have twins."""

    def __init__(self):
        super().__init__()
        inner = [nn.ModuleList([Block(16), Block(16)]), nn.ModuleList([Block(24), Block(24)])]
        self.levels = nn.ModuleList(inner)

    def forward(self, x):
        for level in self.levels:
            for block in level:
                x = block(x)
        return x


def fixed(module, shape=(2, 5, 8)):
    """The module's graph at this shape, its variant and real inputs."""
    torch.manual_seed(0)
    module.eval().requires_grad_(False)
    captured = capture(module, bind(module, (torch.randn(shape),), {}, frozenset()))
    values = captured.inputs_of(captured.call)
    mode = FakeTensorMode(shape_env=ShapeEnv())
    with mode:
        graph_module = specialize(captured.graph_module, [mode.from_tensor(v, static_shapes=True) for v in values])
    return graph_module, Variant("full", captured.graph_module, 1), values


def calls(graph_module):
    return [n.args[1] for n in graph_module.graph.nodes if n.target is torch.ops.higher_order.invoke_subgraph]


def test_twins_share_one_body():
    graph_module, variant, values = fixed(Net(Block(), Block(), Block()))
    assert outline_blocks(graph_module) == (1, 3)
    assert calls(graph_module) == ["body_0"] * 3
    body = [node.name for node in graph_module.body_0.graph.nodes]
    assert "layer_norm" in body and "linear_1" in body
    assert not [node for node in graph_module.graph.nodes if "layer_norm" in node.name]
    assert torch.equal(graph_module(*values)[0], variant.graph_module(*values)[0])


def test_the_number_of_bodies_does_not_depend_on_depth():
    for depth in (2, 9):
        graph_module, _, _ = fixed(Net(*[Block(16) for _ in range(depth)], *[Block(24) for _ in range(depth)]))
        assert outline_blocks(graph_module) == (2, 2 * depth)


def test_blocks_without_a_twin_stay():
    graph_module, _, _ = fixed(Net(Block(16), Block(24), Block(32)))
    before = len(graph_module.graph.nodes)
    assert outline_blocks(graph_module) == (0, 0)
    assert len(graph_module.graph.nodes) == before


def test_twins_are_looked_for_inside_blocks_that_have_none():
    graph_module, variant, values = fixed(Nested())
    assert outline_blocks(graph_module) == (2, 4)
    assert torch.equal(graph_module(*values)[0], variant.graph_module(*values)[0])


def test_other_strides_are_other_bodies():
    class Turned(Net):
        def forward(self, x):
            return self.blocks[1](self.blocks[0](x).mT.contiguous().mT)

    graph_module, _, _ = fixed(Turned(Block(), Block()))
    assert outline_blocks(graph_module) == (0, 0)


def test_a_view_at_the_end_stays_outside():
    graph_module, variant, values = fixed(Net(*[Block(tail=True) for _ in range(4)]))
    bodies, outlined = outline_blocks(graph_module)
    assert bodies == 1 and outlined >= 3
    returned = output_node(graph_module.body_0).args[0]
    assert all(node.meta["val"].storage_offset() == 0 for node in returned)
    assert torch.equal(graph_module(*values)[0], variant.graph_module(*values)[0])


def test_a_view_that_is_used_inside_too_is_copied():
    class Both(Block):
        def forward(self, x):
            tail = super().forward(torch.cat([x[:, :1], x], 1))[:, 1:]
            return tail, tail * 2

    class Sum(Net):
        def forward(self, x):
            for block in self.blocks:
                a, b = block(x)
                x = (a + b).contiguous()
            return x

    graph_module, variant, values = fixed(Sum(Both(), Both()))
    assert outline_blocks(graph_module) == (1, 2)
    assert [node.target for node in output_node(graph_module.body_0).args[0]].count(aten.clone.default) == 1
    assert torch.equal(graph_module(*values)[0], variant.graph_module(*values)[0])


def test_what_lies_between_a_blocks_nodes_goes_with_them():
    graph_module, _, values = fixed(Net(Block(), Block()))
    for name in ("tanh", "tanh_1"):
        node = nodes_by_name(graph_module)[name]
        with graph_module.graph.inserting_after(node):
            new = insert_call(graph_module, aten.neg.default, node)
        node.replace_all_uses_with(new, delete_user_cb=lambda user, new=new: user is not new)
    graph_module.recompile()
    expected = graph_module(*values)[0]
    assert outline_blocks(graph_module) == (1, 2)
    assert "neg" in str(graph_module.body_0.graph)
    assert torch.equal(graph_module(*values)[0], expected)


def test_refuses_a_block_in_the_middle_of_another():
    graph_module, _, _ = fixed(Net(Block(), Block()))
    first, second = (nodes_by_name(graph_module)[name] for name in ("tanh", "tanh_1"))
    between = nodes_by_name(graph_module)["relu"]
    with graph_module.graph.inserting_before(between):
        mixed = insert_call(graph_module, aten.neg.default, first)
    mixed.meta["nn_module_stack"] = second.meta["nn_module_stack"]  # a node of the second inside the first
    between.replace_input_with(between.args[0], mixed)
    assert twins(graph_module) == []


@pytest.mark.slow
def test_lowered_numbers_agree_and_views_are_read_where_they_are():
    """Findings: a body that returned the slice itself would be off by its offset."""
    _, variant, values = fixed(Net(*[Block(tail=True) for _ in range(4)]))
    program = lower(variant, values, "inductor")
    assert (program.backend, program.problem, program.bodies) == ("inductor", None, 1)
    assert torch.allclose(program(values)[0], variant.graph_module(*values)[0], atol=1e-5)
    again = [*values[:-1], torch.randn_like(values[-1])]
    assert torch.allclose(program(again)[0], variant.graph_module(*again)[0], atol=1e-5)
