"""invariants: what no step changes, where it ends, and what of it pays."""

import torch

from dcc.capture.export import capture
from dcc.passes.costs import costs
from dcc.passes.invariants import MIN_BYTES, frontier, invariants, is_alias, is_pure, worth_hoisting
from dcc.record.call import bind

aten = torch.ops.aten
WIDE = torch.randn(2, 6, 64)


def chosen(graph_module, *values, moving=("x",), kept=()):
    return worth_hoisting(graph_module, costs(graph_module, values), moving, kept)


def test_what_takes_a_moving_input_moves(build):
    def both(x, text, w):
        key = aten.linear.default(text, w)
        return (aten.add.Tensor(aten.mul.Tensor(x, 2), key), aten.neg.default(x))

    graph_module = build(both, x=WIDE, text=WIDE, w=torch.randn(64, 64))
    assert invariants(graph_module, {"x"}) == {"text", "w", "linear_default"}
    assert frontier(graph_module, invariants(graph_module, {"x"})) == ["linear_default"]
    assert invariants(graph_module, {"x", "text"}) == {"w"}
    assert invariants(graph_module, {"x"}, {"linear_default"}) == {"text", "w"}


class Table(torch.nn.Module):
    """A table as long as the sample."""

    def forward(self, x, t):
        table = torch.arange(x.shape[1], dtype=torch.float32)[:, None].expand(-1, x.shape[2]).cos()
        return x * table + t[:, None, None]


def test_sizes_of_a_moving_input_are_fixed():
    """A graph with symbolic sizes reads them off the sample; a table made of them does not move."""
    captured = capture(Table().eval(), bind(Table(), (WIDE, torch.rand(2)), {}, frozenset()))
    assert captured.problem is None
    fixed = invariants(captured.graph_module, set(captured.inputs.values()))
    assert {"arange", "cos"} <= fixed and "mul" not in fixed
    assert [name for name in fixed if name.startswith("sym_size")]


def test_random_numbers_and_unknown_operators_move(build):
    def drawn(x, text):
        noise = aten.rand_like.default(text)
        dropped = aten.dropout.default(text, 0.5, True)
        kept = aten.dropout.default(text, 0.5, False)
        attended = aten.scaled_dot_product_attention.default(text, text, text)
        return (aten.add.Tensor(x, noise), aten.add.Tensor(x, dropped), aten.add.Tensor(x, kept), attended)

    graph_module = build(drawn, x=WIDE, text=WIDE)
    pure = {node.name: is_pure(node) for node in graph_module.graph.nodes if node.op == "call_function"}
    assert not pure["rand_like_default"] and not pure["dropout_default"]
    assert pure["dropout_default_1"] and pure["scaled_dot_product_attention_default"]
    assert {"rand_like_default", "dropout_default"}.isdisjoint(invariants(graph_module, {"x"}))


def test_views_and_casts_share_memory(build):
    def views(x):
        first, _ = aten.chunk.default(x, 2)[:2]
        return (aten.transpose.int(first, 0, 1), aten.to.dtype(x, torch.float32), aten.repeat.default(x, [2, 1, 1]))

    graph_module = build(views, x=WIDE)
    alias = {node.name: is_alias(node) for node in graph_module.graph.nodes if node.op == "call_function"}
    assert alias.pop("repeat_default") is False
    assert all(alias.values()) and len(alias) >= 4


def test_products_pay_and_are_held_as_they_are_taken(build):
    def keys(x, text, w):
        key = aten.transpose.int(aten.linear.default(text, w), 1, 2)
        return (aten.matmul.default(x, key),)

    w = torch.randn(64, 64)
    graph_module = build(keys, x=WIDE, text=WIDE, w=w)
    assert chosen(graph_module, WIDE, WIDE, w) == ("transpose_int",)
    assert chosen(graph_module, WIDE, WIDE, w, moving=("x", "text")) == ()


def test_a_product_over_few_channels_does_not_pay(build):
    def thin(x, text, w):
        return (aten.add.Tensor(x, aten.linear.default(text, w)),)

    text, w = torch.randn(2, 6, 2), torch.randn(64, 2)
    assert chosen(build(thin, x=WIDE, text=text, w=w), WIDE, text, w) == ()


def test_views_and_casts_of_inputs_do_not_pay(build):
    def plain(x, text, w):
        return (aten.matmul.default(x, aten.t.default(w)), aten.mul.Tensor(x, aten.to.dtype(text, torch.float64)))

    w = torch.randn(64, 64)
    assert chosen(build(plain, x=WIDE, text=WIDE, w=w), WIDE, WIDE, w) == ()


def test_what_only_repeats_is_left_and_what_it_repeats_is_held(build):
    def repeated(x, text, w):
        key = aten.repeat.default(aten.linear.default(text, w), [1, 8, 1])
        return (aten.add.Tensor(x, key),)

    x, w = torch.randn(2, 48, 64), torch.randn(64, 64)
    assert chosen(build(repeated, x=x, text=WIDE, w=w), x, WIDE, w) == ("linear_default",)


def test_one_cheap_pass_is_left_and_what_it_takes_is_held(build):
    """What two blocks add to one shared product is made at every step; the product is not."""

    def shared(x, text, w, bias):
        value = aten.linear.default(text, w)
        first, second = aten.exp.default(value), aten.neg.default(value)
        return (aten.mul.Tensor(x, first), aten.mul.Tensor(x, second))

    w, bias = torch.randn(64, 64), torch.randn(64)
    assert chosen(build(shared, x=WIDE, text=WIDE, w=w, bias=bias), WIDE, WIDE, w, bias) == ("linear_default",)


def test_tables_pay_where_they_are_large_and_take_several_passes(build):
    def tables(x, position):
        angle = aten.mul.Tensor(position, 2.0)
        return (aten.mul.Tensor(x, aten.cos.default(angle)),)

    large, small = torch.randn(MIN_BYTES // 8), torch.randn(MIN_BYTES // 16)
    assert chosen(build(tables, x=large, position=large), large, large) == ("cos_default",)
    assert chosen(build(tables, x=small, position=small), small, small) == ()

    def once(x, position):
        return (aten.mul.Tensor(x, aten.cos.default(position)),)

    assert chosen(build(once, x=large, position=large), large, large) == ()


def test_outputs_and_cached_values_are_never_chosen(build):
    def returned(x, text, w):
        key = aten.linear.default(text, w)
        return (aten.add.Tensor(x, key), aten.view.default(key, [2, -1]))

    w = torch.randn(64, 64)
    graph_module = build(returned, x=WIDE, text=WIDE, w=w)
    assert chosen(graph_module, WIDE, WIDE, w) == ()

    def two(x, text, w):
        return (aten.add.Tensor(x, aten.linear.default(aten.linear.default(text, w), w)),)

    graph_module = build(two, x=WIDE, text=WIDE, w=w)
    assert chosen(graph_module, WIDE, WIDE, w) == ("linear_default_1",)
    assert chosen(graph_module, WIDE, WIDE, w, kept=("linear_default_1",)) == ("linear_default",)
