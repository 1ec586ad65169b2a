"""Inputs and outputs as values: what is shared, what a variant reads off its graph, and a new pass in one file."""

import pytest
import torch

import dcc
from dcc import passes
from dcc.passes.base import Correction, Look, Port, identifier
from dcc.passes.graph import nodes_by_name, output_node
from dcc.passes.insert_cache_reads import InsertCacheReads
from dcc.passes.insert_cache_writes import InsertCacheWrites
from dcc.passes.values import (
    VALUE,
    Anchor,
    Coefficients,
    Distance,
    Factor,
    Next,
    Once,
    Seen,
    State,
    Step,
    Watched,
    Write,
    declare,
    emit,
    emitted,
    input_node,
)
from dcc.variants.variant import Variant

from ..documents import ARCHITECTURE, typed_in
from ..rows import row_of
from .test_insert_cache_reads import BLOCKS, examples, residual


def test_equal_values_share_one_input(build):
    graph_module = build(residual, **examples())
    first = declare(graph_module, Anchor("h", 0, 1), torch.ones(2, 3))
    assert declare(graph_module, Anchor("h", 0, 1), torch.ones(2, 3)) is first
    assert input_node(graph_module, Anchor("h", 0, 1)) is first and input_node(graph_module, Anchor("h", 0, 2)) is None


def test_sites_whose_names_read_alike_are_kept_apart(build):
    """`x.1` and `x_1` give one identifier; they are two sites all the same."""
    assert identifier("x.1") == identifier("x_1")
    graph_module = build(residual, **examples())
    nodes = [declare(graph_module, Anchor(name, 0, 0), torch.ones(2, 3)) for name in ("x.1", "x_1")]
    assert nodes[0] is not nodes[1] and len({node.name for node in nodes}) == 2
    taken = [node.meta[VALUE].site for node in graph_module.graph.nodes if VALUE in node.meta]
    assert taken == ["x.1", "x_1"]


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Anchor("a.0/mlp", 1, 2), "anchor_a_0_mlp_1_2"),
        (Coefficients(), "coefficients"),
        (Factor(Correction("h", 1, "x", ((2, 4),)), 0), "factor_h_1_0"),
        (Once("linear_3"), "once_linear_3"),
        (State("noise"), "state_noise"),
        (State("age", "Up.0"), "state_age_up_0"),
        (Step(), "step"),
        (Seen(Port("h"), "previous"), "seen_h_itself_previous"),
        (Write("h", 0), "write_h_0"),
        (Next(State("drops")), "next_state_drops"),
        (Watched(Port("h", "x")), "watch_h_x"),
        (Distance(Look(Port("h"), "anchor", "l1")), "look_h_itself_anchor_l1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_names_are_for_readers(value, name):
    assert value.name == name


def test_what_is_emitted_is_found_again(build):
    graph_module = build(residual, **examples())
    node = emit(graph_module, Write("h", 0), nodes_by_name(graph_module)["add_tensor"])
    assert output_node(graph_module).args[0][-1] is node is emitted(graph_module, Write("h", 0))
    assert emitted(graph_module, Write("h", 1)) is None


def test_a_variant_says_what_it_takes_and_gives(stack):
    graph_module = stack.graph()
    row = row_of(computed=(BLOCKS[1],), forecast=((BLOCKS[0],),), anchors=2)
    InsertCacheWrites().run(graph_module, row)
    InsertCacheReads().run(graph_module, row)
    variant = Variant("row0", graph_module, 1)
    anchors = [value for value in variant.takes if isinstance(value, Anchor)]
    assert [(anchor.site, anchor.port, anchor.age, anchor.batched) for anchor in anchors] == [
        ("blocks.0", 0, 0, True),
        ("blocks.0", 0, 1, True),
    ]
    assert variant.gives == (Write("blocks.1", 0),) and variant.kept == (("blocks.1", (1,)),)
    assert len(variant.takes) == len(variant.inputs) and Coefficients() in variant.takes


def test_a_new_pass_with_a_new_kind_of_input_is_one_file(monkeypatch, stack):
    """Typed in as dcc/README.md shows it, added to PASSES, compiled and served; nothing else changes."""
    typed = typed_in(ARCHITECTURE, "AddTwice(Pass)")
    monkeypatch.setattr(passes, "PASSES", (*passes.PASSES[:-3], typed["AddTwice"](), *passes.PASSES[-3:]))

    def sample(net, prompt):
        x, text = torch.zeros(1, 5, 8), []
        for step in range(4):
            with torch.no_grad():
                text.append(net(x, torch.full((1,), 1 - step / 4)))
            x = x + 0.1
        return torch.stack(text)

    expected = sample(stack.module, 0)
    plain = expected + 2 * torch.arange(4.0)[:, None, None, None]
    try:
        net = dcc.compile(stack.module, [0], sample=sample, policy="interval", interval=2, backend="eager")
        found = sample(net, 0)
    finally:
        dcc.restore(net)
    assert torch.equal(found[0], plain[0])  # a computed step
    assert torch.allclose(found[2], plain[2], atol=1e-6)
    added = torch.zeros(1, 5, 8)
    for block in stack.module.blocks:  # what all blocks add at step 0, which step 1 copies
        added = block(added, torch.ones(1, 1, 1))
    with torch.no_grad():
        torch.testing.assert_close(found[1], stack.module.head(0.1 + added) + 2)
