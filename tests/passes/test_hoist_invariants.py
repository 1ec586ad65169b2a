"""hoist_invariants: fires, refuses, numbers agree with eager, order declared."""

import pytest
import torch

from dcc.errors import PassError
from dcc.passes.base import Port, Site
from dcc.passes.hoist_invariants import HoistInvariants
from dcc.passes.split_at import prefix
from dcc.passes.text import text
from dcc.passes.verify import verify

from ..rows import ROW_PASSES as PASSES
from ..rows import once_name, row_of

aten = torch.ops.aten


def cross(x, context, wq, wk):
    key = aten.transpose.int(aten.linear.default(context, wk), 1, 2)
    scores = aten.matmul.default(aten.linear.default(x, wq), key)
    return (aten.softmax.int(scores, -1),)


@pytest.fixture
def values():
    return {
        "x": torch.randn(2, 5, 8),
        "context": torch.randn(2, 3, 16),
        "wq": torch.randn(8, 8),
        "wk": torch.randn(8, 16),
    }


def test_fires(build, values):
    graph_module = build(cross, **values)
    assert text(graph_module) == (
        "%0 = input x  # f32[2, 5, 8]\n"
        "%1 = input context  # f32[2, 3, 16]\n"
        "%2 = input wq  # f32[8, 8]\n"
        "%3 = input wk  # f32[8, 16]\n"
        "%4 = aten.linear.default(%1, %3)  # f32[2, 3, 8]\n"
        "%5 = aten.transpose.int(%4, 1, 2)  # f32[2, 8, 3]\n"
        "%6 = aten.linear.default(%0, %2)  # f32[2, 5, 8]\n"
        "%7 = aten.matmul.default(%6, %5)  # f32[2, 5, 3]\n"
        "%8 = aten.softmax.int(%7, -1)  # f32[2, 5, 3]\n"
        "return (%8,)\n"
    )
    row = row_of(hoisted=("transpose_int",))
    assert HoistInvariants().run(graph_module, row) == 1
    verify(graph_module, "test")
    assert PASSES[-1].run(graph_module, row) == 4  # the projection, its transpose, and what only they took
    assert text(graph_module) == (
        "%0 = input x  # f32[2, 5, 8]\n"
        "%1 = input wq  # f32[8, 8]\n"
        "%2 = input once_transpose_int  # f32[2, 8, 3]\n"
        "%3 = aten.linear.default(%0, %1)  # f32[2, 5, 8]\n"
        "%4 = aten.matmul.default(%3, %2)  # f32[2, 5, 3]\n"
        "%5 = aten.softmax.int(%4, -1)  # f32[2, 5, 3]\n"
        "return (%5,)\n"
    )


def test_leaves_alone_what_is_not_asked_for_and_what_nothing_takes(build, values):
    def half_dead(x, context, wq, wk):
        aten.linear.default(context, wk)
        return (aten.linear.default(x, wq),)

    for row in (row_of(), row_of(hoisted=("linear_default",))):
        graph_module = build(half_dead, **values)
        before = text(graph_module)
        assert HoistInvariants().run(graph_module, row) == 0
        assert text(graph_module) == before


def test_refuses_a_node_of_another_graph_and_one_that_is_no_tensor(build, stack, values):
    with pytest.raises(PassError, match="hoist_invariants: the graph has no node 'linear_99'"):
        HoistInvariants().run(build(cross, **values), row_of(hoisted=("linear_99",)))

    def halves(x, context, wq, wk):
        first, _ = aten.chunk.default(context, 2)[:2]
        return (aten.add.Tensor(x.sum(), first),)

    graph_module = build(halves, **values)
    with pytest.raises(PassError, match="'chunk_default' is no tensor; only tensors are held between steps"):
        HoistInvariants().run(graph_module, row_of(hoisted=("chunk_default",)))


def test_numbers_agree_with_eager(build, run, values):
    """The prologue's value in the place of the node: bit for bit the graph before."""
    graph_module = build(cross, **values)
    (expected,) = run(graph_module, **values)
    (held,) = run(prefix(graph_module, ["transpose_int"]), **values)
    HoistInvariants().run(graph_module, row_of(hoisted=("transpose_int",)))
    for _ in range(2):
        (found,) = run(graph_module, **values, once_transpose_int=held)
        assert torch.equal(found, expected)
    (other,) = run(graph_module, **values, once_transpose_int=held + 1)
    assert not torch.equal(other, expected)


def test_a_base_may_be_hoisted_and_then_serves_the_forecast(stack, run):
    """The residual's base is replaced wherever it stands: in the write of one row and the read of the other."""
    site, base = Site("stack", "residual", (Port("add_1", "add"),)), "add"
    x, t = torch.randn(3, 4, 8), torch.rand(3)
    values, outputs = stack.values(x, t), []
    (held,) = run(prefix(stack.graph(), [base]), **values)
    for hoisted in ((), (base,)):
        for row in (row_of(computed=(site,), hoisted=hoisted), row_of(forecast=((site,),), anchors=1, hoisted=hoisted)):
            graph_module = stack.graph()
            for pass_ in PASSES:
                pass_.run(graph_module, row)
                verify(graph_module, pass_.name)
            given = values | {once_name(base): held, "coefficients": torch.ones(1, 3, 1)}
            outputs.append(run(graph_module, **given, anchor_stack_0_0=torch.ones(3, 4, 8)))
    for plain, hoisted in zip(outputs[:2], outputs[2:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(plain, hoisted, strict=True))


def test_order_is_declared():
    assert HoistInvariants.after == ("insert_cache_reads", "insert_guidance", "insert_measures", "insert_forecasts")
    assert HoistInvariants.optional
    assert isinstance(PASSES[-2], HoistInvariants)
