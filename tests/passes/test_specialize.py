"""Fixing sizes: what becomes a number, what stays, and the numbers."""

import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from dcc.capture.export import capture
from dcc.passes.specialize import specialize
from dcc.passes.text import text
from dcc.record.call import bind


class Folded(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = x.shape
        return x.reshape(batch * tokens, -1).softmax(0).view(batch, tokens, -1)


def fixed(shape):
    module, x = Folded(), torch.randn(2, 5, 6)
    captured = capture(module, bind(module, (x,), {}, frozenset()))
    mode = FakeTensorMode(shape_env=ShapeEnv())
    real = torch.randn(shape)
    with mode:
        after = specialize(captured.graph_module, [mode.from_tensor(real, static_shapes=True)])
    return captured.graph_module, after, real


def test_sizes_become_numbers_and_leave_the_graph():
    before, after, _ = fixed((3, 7, 4))
    assert "sym_size" in text(before) and "sym_size" not in text(after)
    assert "[21, -1]" in text(after) and "f32[3, 7, 4]" in text(after)
    assert {node.op for node in after.graph.nodes} == {"placeholder", "call_function", "output"}
    assert len(after.graph.nodes) < len(before.graph.nodes)


def test_a_graph_without_sizes_stays_as_it_is(stack):
    graph_module = stack.graph()
    values = [node.meta["val"] for node in graph_module.graph.nodes if node.op == "placeholder"]
    after = specialize(graph_module, values)
    assert [(n.op, n.name) for n in after.graph.nodes] == [(n.op, n.name) for n in graph_module.graph.nodes]


def test_numbers_agree_with_eager():
    before, after, real = fixed((3, 7, 4))
    assert torch.equal(after(real)[0], before(real)[0])
    assert torch.equal(after(real)[0], Folded()(real))
