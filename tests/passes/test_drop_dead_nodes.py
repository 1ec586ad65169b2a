"""drop_dead_nodes: fires, leaves alone, numbers agree, order declared; and the whole pipeline of passes."""

import pytest
import torch

from dcc.passes.base import Port, Site
from dcc.passes.drop_dead_nodes import DropDeadNodes
from dcc.passes.graph import nodes_by_name
from dcc.passes.text import text
from dcc.passes.verify import verify

from ..rows import ROW_PASSES as PASSES
from ..rows import row_of

aten = torch.ops.aten
STACK = Site("stack", "residual", (Port("add_1", "x"),))


def half_dead(x, w, unused):
    dead = aten.linear.default(x, w)
    aten.gelu.default(dead)
    return (aten.exp.default(x),)


def alive(x, w):
    return (aten.gelu.default(aten.linear.default(x, w)),)


def test_fires(build):
    graph_module = build(half_dead, x=torch.ones(2, 3), w=torch.ones(4, 3), unused=torch.ones(2))
    assert text(graph_module) == (
        "%0 = input x  # f32[2, 3]\n"
        "%1 = input w  # f32[4, 3]\n"
        "%2 = input unused  # f32[2]\n"
        "%3 = aten.linear.default(%0, %1)  # f32[2, 4]\n"
        "%4 = aten.gelu.default(%3)  # f32[2, 4]\n"
        "%5 = aten.exp.default(%0)  # f32[2, 3]\n"
        "return (%5,)\n"
    )
    assert DropDeadNodes().run(graph_module, row_of()) == 4
    assert text(graph_module) == ("%0 = input x  # f32[2, 3]\n%1 = aten.exp.default(%0)  # f32[2, 3]\nreturn (%1,)\n")
    verify(graph_module, "test")


def test_leaves_a_live_graph_alone(build):
    graph_module = build(alive, x=torch.ones(2, 3), w=torch.ones(4, 3))
    before = text(graph_module)
    assert DropDeadNodes().run(graph_module, row_of()) == 0
    assert text(graph_module) == before


def test_never_drops_an_output(build):
    def passed_on(x, y):
        return (y, aten.neg.default(x))

    graph_module = build(passed_on, x=torch.ones(2), y=torch.ones(2))
    assert DropDeadNodes().run(graph_module, row_of()) == 0


def test_a_second_run_finds_nothing(build):
    graph_module = build(half_dead, x=torch.ones(2, 3), w=torch.ones(4, 3), unused=torch.ones(2))
    DropDeadNodes().run(graph_module, row_of())
    assert DropDeadNodes().run(graph_module, row_of()) == 0


def test_numbers_agree_with_eager(build, run):
    values = {"x": torch.randn(2, 3), "w": torch.randn(4, 3), "unused": torch.randn(2)}
    graph_module = build(half_dead, **values)
    DropDeadNodes().run(graph_module, row_of())
    assert torch.equal(run(graph_module, **values)[0], values["x"].exp())


def test_all_passes_leave_the_work_after_the_forecast_only(stack):
    graph_module = stack.graph()
    for pass_ in PASSES:
        pass_.run(graph_module, row_of(forecast=((STACK,),), anchors=2))
        verify(graph_module, pass_.name)
    inputs = {node.name for node in graph_module.graph.nodes if node.op == "placeholder"}
    assert inputs == {"p_head_weight", "p_head_bias", "x", "coefficients", "anchor_stack_0_0", "anchor_stack_0_1"}
    assert sum(node.target is aten.linear.default for node in graph_module.graph.nodes) == 1
    assert "mul" not in nodes_by_name(graph_module)


@pytest.mark.parametrize("batch", [2, 3])
def test_all_passes_of_an_all_compute_row_keep_the_output_bit_for_bit(stack, run, batch):
    graph_module = stack.graph()
    for pass_ in PASSES:
        pass_.run(graph_module, row_of(computed=(STACK,)))
    x, t = torch.randn(batch, 4, 8), torch.rand(batch)
    output, write = run(graph_module, **stack.values(x, t))
    assert torch.equal(output, stack.module(x, t))
    assert write.shape == x.shape


def test_order_is_declared():
    assert DropDeadNodes.after == ("drop_asserts", "insert_cache_writes", "insert_cache_reads")
    assert isinstance(PASSES[-1], DropDeadNodes)
