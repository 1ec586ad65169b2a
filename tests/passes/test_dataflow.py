"""Dataflow on a graph small enough to count by hand, and against what the passes really leave."""

import random

import networkx as nx
import pytest
import torch

from dcc.passes import PASSES
from dcc.passes.base import Port, Site
from dcc.passes.costs import Cost, costs
from dcc.passes.dataflow import Dataflow

from ..rows import row_of

aten = torch.ops.aten


def diamond(x, y):
    a = aten.neg.default(x)  # neg_default
    b = aten.exp.default(a)  # exp_default
    c = aten.sin.default(a)  # sin_default
    d = aten.add.Tensor(b, c)  # add_tensor
    return (aten.mul.Tensor(d, y),)  # mul_tensor


COSTS = {
    "x": Cost(0, 8, (2,)),
    "y": Cost(0, 8, (2,)),
    "neg_default": Cost(1, 100, (25,)),
    "exp_default": Cost(10, 30, (5,)),
    "sin_default": Cost(100, 40, (5,)),
    "add_tensor": Cost(1000, 80, (5,)),
    "mul_tensor": Cost(10000, 80, (5,)),
}
ALL = {*COSTS, "output"}


@pytest.fixture
def flow(build):
    return Dataflow(build(diamond, x=torch.ones(2), y=torch.ones(2)))


def test_everything_is_needed_without_forecasts(flow):
    assert flow.needed() == ALL
    assert flow.flops(COSTS) == 11111


def test_a_forecast_value_is_not_needed(flow):
    assert flow.needed([Port("add_tensor")]) == {"y", "mul_tensor", "output"}
    assert flow.flops(COSTS, [Port("add_tensor")]) == 10000


def test_what_another_path_uses_stays(flow):
    assert flow.needed([Port("exp_default")]) == ALL - {"exp_default"}
    assert flow.flops(COSTS, [Port("exp_default")]) == 11101
    assert flow.flops(COSTS, [Port("exp_default"), Port("sin_default")]) == 11000


def test_a_residual_needs_its_base(flow):
    assert flow.needed([Port("add_tensor", "neg_default")]) == ALL - {"exp_default", "sin_default", "add_tensor"}
    assert flow.flops(COSTS, [Port("add_tensor", "neg_default")]) == 10001


def test_what_is_spared_is_what_is_not_needed(transformer):
    graph_module = transformer.captured.graph_module
    flow, draw = Dataflow(graph_module), random.Random(0)
    names = [node.name for node in graph_module.graph.nodes if node.op != "output"]
    sizes = set()
    for _ in range(300):
        ports = {}
        for out in draw.sample(range(1, len(names)), k=draw.randint(1, 4)):
            above = sorted(nx.ancestors(flow.digraph, names[out]) & flow.needed())
            ports[names[out]] = Port(names[out], draw.choice([None, *above]))
        spared = flow.spared(ports.values())
        assert spared == flow.needed() - flow.needed(ports.values())
        sizes.add(len(spared))
    assert len(sizes) > 20


def test_questions_leave_the_graph_as_it_was(flow):
    flow.needed([Port("add_tensor", "x")])
    assert flow.needed() == ALL


def test_a_base_that_is_itself_forecast_is_not_computed(flow):
    ports = [Port("neg_default"), Port("add_tensor", "neg_default")]
    assert flow.needed(ports) == {"y", "mul_tensor", "output"}


@pytest.mark.parametrize(
    "ports",
    [
        [Port("add", "x")],
        [Port("add_1", "x")],
        [Port("add_1", "add")],
        [Port("add", "x"), Port("add_1", "add")],
        [Port("mul"), Port("mul_1")],
        [Port("linear_2")],
    ],
    ids=["block 0", "stack", "block 1", "both blocks", "branches", "output"],
)
def test_needed_is_what_the_passes_leave(stack, ports):
    needed = Dataflow(stack.captured.graph_module).needed(ports)
    graph_module = stack.graph()
    original = {node.name for node in graph_module.graph.nodes}
    row = row_of(forecast=(tuple(Site(f"site{k}", "value", (port,)) for k, port in enumerate(ports)),))
    for pass_ in PASSES:
        pass_.run(graph_module, row)
    assert needed == {node.name for node in graph_module.graph.nodes} & original


def test_depends_on(flow):
    assert flow.depends_on(["y"]) == {"y", "mul_tensor", "output"}
    assert flow.depends_on(["exp_default", "sin_default"]) == ALL - {"x", "y", "neg_default"}
    assert flow.depends_on([]) == set()


def test_dominators_come_from_the_output_side(flow):
    assert flow.dominators("x") == ["mul_tensor", "add_tensor", "neg_default"]
    assert flow.dominators("exp_default") == ["mul_tensor", "add_tensor"]
    assert flow.dominators("mul_tensor") == []


def test_dominators_of_an_unused_input(build):
    flow = Dataflow(build(lambda x, y: (aten.neg.default(x),), x=torch.ones(2), y=torch.ones(2)))
    assert flow.dominators("y") == []


def test_cheapest_cut_takes_two_small_values_before_a_large_one(flow):
    assert set(flow.cheapest_cut(["neg_default"], ["mul_tensor"], COSTS)) == {"exp_default", "sin_default"}


def test_cheapest_cut_goes_by_bytes(flow):
    narrow = COSTS | {"add_tensor": Cost(1000, 60, (5,))}
    assert flow.cheapest_cut(["neg_default"], ["mul_tensor"], narrow) == ["add_tensor"]
    narrow |= {"neg_default": Cost(1, 50, (25,))}
    assert flow.cheapest_cut(["neg_default"], ["mul_tensor"], narrow) == ["neg_default"]


def test_cheapest_cut_never_takes_what_is_no_tensor(flow):
    sizeless = COSTS | {"exp_default": Cost(10, 0, ()), "add_tensor": Cost(1000, 0, ())}
    assert flow.cheapest_cut(["neg_default"], ["mul_tensor"], sizeless) == ["neg_default"]


def test_cheapest_cut_is_empty_where_nothing_separates(flow):
    sizeless = {name: Cost(1, 0, ()) for name in COSTS}
    assert flow.cheapest_cut(["neg_default"], ["mul_tensor"], sizeless) == []


def test_cheapest_cut_separates(flow):
    cut = flow.cheapest_cut(["x"], ["mul_tensor"], COSTS)
    assert cut == ["x"]
    assert "x" not in flow.needed([Port(name) for name in cut]) - {"x"}


def test_flops_with_real_costs(stack):
    values = stack.captured.inputs_of(stack.call)
    real = costs(stack.captured.graph_module, values)
    flow = Dataflow(stack.captured.graph_module)
    linear = 2 * 2 * 5 * 8 * 8
    assert flow.flops(real) == 3 * linear
    assert flow.flops(real, [Port("add_1", "x")]) == linear
