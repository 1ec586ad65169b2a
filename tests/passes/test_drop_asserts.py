"""drop_asserts: fires, leaves alone, numbers agree, order declared."""

import torch
from torch import nn

from dcc.capture.export import capture
from dcc.passes.drop_asserts import ASSERTIONS, DropAsserts, is_assertion
from dcc.passes.text import text
from dcc.passes.verify import verify
from dcc.record.call import bind

from ..rows import ROW_PASSES as PASSES
from ..rows import row_of

aten = torch.ops.aten


def asserting(x, w):
    h = aten.linear.default(x, w)
    aten._assert_tensor_metadata.default(h, None, None, torch.float32)
    return (aten.gelu.default(h),)


def plain(x, w):
    return (aten.gelu.default(aten.linear.default(x, w)),)


def test_fires(build):
    graph_module = build(asserting, x=torch.ones(2, 3), w=torch.ones(4, 3))
    assert text(graph_module) == (
        "%0 = input x  # f32[2, 3]\n"
        "%1 = input w  # f32[4, 3]\n"
        "%2 = aten.linear.default(%0, %1)  # f32[2, 4]\n"
        "%3 = aten._assert_tensor_metadata.default(%2, None, None, torch.float32)\n"
        "%4 = aten.gelu.default(%2)  # f32[2, 4]\n"
        "return (%4,)\n"
    )
    assert DropAsserts().run(graph_module, row_of()) == 1
    assert text(graph_module) == (
        "%0 = input x  # f32[2, 3]\n"
        "%1 = input w  # f32[4, 3]\n"
        "%2 = aten.linear.default(%0, %1)  # f32[2, 4]\n"
        "%3 = aten.gelu.default(%2)  # f32[2, 4]\n"
        "return (%3,)\n"
    )
    verify(graph_module, "test")


def test_fires_on_every_assertion(build):
    def several(x):
        for _ in range(3):
            aten._assert_tensor_metadata.default(x, None, None, torch.float32)
        aten._assert_async.msg(aten.all.default(x), "all")
        return (aten.neg.default(x),)

    graph_module = build(several, x=torch.ones(2))
    assert DropAsserts().run(graph_module, row_of()) == 4
    assert not any(node.target in ASSERTIONS for node in graph_module.graph.nodes)


def test_leaves_a_graph_without_assertions_alone(build):
    graph_module = build(plain, x=torch.ones(2, 3), w=torch.ones(4, 3))
    before = text(graph_module)
    assert DropAsserts().run(graph_module, row_of()) == 0
    assert text(graph_module) == before


def test_is_assertion_wants_an_assertion_without_users(build):
    graph_module = build(asserting, x=torch.ones(2, 3), w=torch.ones(4, 3))
    assert [node.name for node in graph_module.graph.nodes if is_assertion(node)] == ["_assert_tensor_metadata_default"]


def test_numbers_agree_with_eager(run):
    class Cast(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            return self.linear(x).to(torch.float64).sin().to(torch.float32)

    module = Cast()
    call = bind(module, (torch.randn(2, 8),), {}, frozenset())
    captured = capture(module, call)
    assert DropAsserts().run(captured.graph_module, row_of()) > 0  # torch.export asserts the dtype before each cast
    assert not any(node.target in ASSERTIONS for node in captured.graph_module.graph.nodes)
    (output,) = run(captured.graph_module, **captured.bindings(call))
    assert torch.equal(output, module(*call.tensors))


def test_order_is_declared():
    assert DropAsserts.after == ()
    assert isinstance(PASSES[0], DropAsserts)
