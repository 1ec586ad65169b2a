"""insert_cache_writes: fires, refuses, numbers agree, order declared."""

import pytest
import torch

from dcc.errors import PassError
from dcc.passes.base import Port, Site
from dcc.passes.graph import output_node
from dcc.passes.insert_cache_writes import InsertCacheWrites
from dcc.passes.text import text
from dcc.passes.verify import verify

from ..rows import row_of, write_name

aten = torch.ops.aten
RESIDUAL = Site("h", "residual", (Port("add_tensor", "x"),))
VALUE = Site("h", "value", (Port("add_tensor"),))


def residual(x, w):
    h = aten.add.Tensor(x, aten.linear.default(x, w))
    return (aten.gelu.default(h),)


def examples(dtype=torch.float32):
    return {"x": torch.randn(2, 3, dtype=dtype), "w": torch.randn(3, 3, dtype=dtype)}


def test_fires(build):
    graph_module = build(residual, **examples())
    assert text(graph_module) == (
        "%0 = input x  # f32[2, 3]\n"
        "%1 = input w  # f32[3, 3]\n"
        "%2 = aten.linear.default(%0, %1)  # f32[2, 3]\n"
        "%3 = aten.add.Tensor(%0, %2)  # f32[2, 3]\n"
        "%4 = aten.gelu.default(%3)  # f32[2, 3]\n"
        "return (%4,)\n"
    )
    assert InsertCacheWrites().run(graph_module, row_of(computed=(RESIDUAL,))) == 1
    assert text(graph_module) == (
        "%0 = input x  # f32[2, 3]\n"
        "%1 = input w  # f32[3, 3]\n"
        "%2 = aten.linear.default(%0, %1)  # f32[2, 3]\n"
        "%3 = aten.add.Tensor(%0, %2)  # f32[2, 3]\n"
        "%4 = aten.gelu.default(%3)  # f32[2, 3]\n"
        "%5 = aten.sub.Tensor(%3, %0)  # f32[2, 3]\n"
        "%6 = aten.clone.default(%5, memory_format=torch.contiguous_format)  # f32[2, 3]\n"
        "return (%4, %6)\n"
    )
    verify(graph_module, "test")


def test_writes_are_named_by_site_and_port(build):
    two = Site("blocks.0/attn", "value", (Port("linear_default"), Port("add_tensor", "x")))
    graph_module = build(residual, **examples())
    assert InsertCacheWrites().run(graph_module, row_of(computed=(two,))) == 2
    names = [node.name for node in output_node(graph_module).args[0]]
    assert names == ["gelu_default", "write_blocks_0_attn_0", "write_blocks_0_attn_1"]
    assert names[1:] == [write_name(two, 0), write_name(two, 1)]


def test_leaves_a_row_that_computes_nothing_alone(build):
    graph_module = build(residual, **examples())
    before = text(graph_module)
    assert InsertCacheWrites().run(graph_module, row_of(forecast=((RESIDUAL,),))) == 0
    assert text(graph_module) == before


@pytest.mark.parametrize("port", [Port("nowhere"), Port("add_tensor", "nowhere")], ids=["out", "base"])
def test_refuses_a_site_that_is_not_in_the_graph(build, port):
    graph_module = build(residual, **examples())
    with pytest.raises(PassError, match=r"insert_cache_writes.*nowhere"):
        InsertCacheWrites().run(graph_module, row_of(computed=(Site("h", "value", (port,)),)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_residual_write_is_out_minus_base(build, run, dtype):
    values = examples(dtype)
    expected = residual(**values)[0]
    graph_module = build(residual, **values)
    InsertCacheWrites().run(graph_module, row_of(computed=(RESIDUAL,)))
    output, write = run(graph_module, **values)
    out = values["x"] + values["x"] @ values["w"].T
    assert torch.equal(output, expected)
    assert torch.equal(write, out - values["x"])
    assert write.dtype == dtype


def test_value_write_is_the_value(build, run):
    values = examples()
    graph_module = build(residual, **values)
    InsertCacheWrites().run(graph_module, row_of(computed=(VALUE,)))
    _, write = run(graph_module, **values)
    assert torch.equal(write, aten.add.Tensor(values["x"], aten.linear.default(values["x"], values["w"])))


def test_write_of_the_output_is_a_copy(build, run):
    values = examples()
    graph_module = build(residual, **values)
    InsertCacheWrites().run(graph_module, row_of(computed=(Site("output", "output", (Port("gelu_default"),)),)))
    output, write = run(graph_module, **values)
    assert torch.equal(output, write)
    assert output.untyped_storage().data_ptr() != write.untyped_storage().data_ptr()


def test_write_of_an_input_is_a_copy(build, run):
    values = examples()
    graph_module = build(residual, **values)
    InsertCacheWrites().run(graph_module, row_of(computed=(Site("x", "value", (Port("x"),)),)))
    _, write = run(graph_module, **values)
    assert torch.equal(write, values["x"])
    assert write.untyped_storage().data_ptr() != values["x"].untyped_storage().data_ptr()


def test_write_of_a_view_is_dense_and_keeps_no_larger_storage(build, run):
    def sliced(x):
        whole = aten.neg.default(x)
        part = aten.slice.Tensor(aten.permute.default(whole, [1, 0]), 0, 0, 2)
        return (aten.add.Tensor(part, 1),)

    x = torch.randn(6, 5)
    graph_module = build(sliced, x=x)
    InsertCacheWrites().run(graph_module, row_of(computed=(Site("part", "value", (Port("slice_tensor"),)),)))
    _, write = run(graph_module, x=x)
    assert torch.equal(write, -x.T[:2])
    assert write.is_contiguous()
    assert write.untyped_storage().nbytes() == 2 * 6 * 4


def test_base_may_be_another_written_site(stack, run):
    sites = (Site("blocks.0", "residual", (Port("add", "x"),)), Site("blocks.1", "residual", (Port("add_1", "add"),)))
    graph_module = stack.graph()
    assert InsertCacheWrites().run(graph_module, row_of(computed=sites)) == 2
    x, t = torch.randn(3, 7, 8), torch.rand(3)
    output, first, second = run(graph_module, **stack.values(x, t))
    h = stack.module.blocks[0](x, t[:, None, None])
    assert torch.equal(first, h - x)
    assert torch.equal(second, stack.module.blocks[1](h, t[:, None, None]) - h)
    assert torch.equal(output, stack.module(x, t))


def test_order_is_declared():
    assert InsertCacheWrites.after == ("drop_asserts", "insert_correctors")
    assert not InsertCacheWrites.optional  # a variant without its writes would return something else
