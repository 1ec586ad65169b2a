"""Blocks from module paths, and what enters and leaves them."""

import torch
from torch import nn

from dcc.capture.export import capture
from dcc.passes.blocks import entering, is_inside, leaving, numbered_blocks, outermost_blocks, paths, region
from dcc.passes.costs import costs
from dcc.passes.graph import nodes_by_name
from dcc.record.call import bind


def blocks_of(captured, call):
    return outermost_blocks(captured.graph_module, costs(captured.graph_module, captured.inputs_of(call)))


def captured_call(module, *arguments):
    call = bind(module, arguments, {}, frozenset())
    return capture(module, call), call


def test_outermost_blocks_in_execution_order(transformer):
    blocks = blocks_of(transformer.captured, transformer.call)
    assert [block.path for block in blocks] == ["blocks.0", "blocks.1"]
    assert {block.stack for block in blocks} == {"blocks"}


def test_numbered_blocks_at_any_depth(transformer):
    found = list(numbered_blocks(transformer.captured.graph_module))
    assert found[:5] == ["time.0", "blocks.0", "blocks.0.mlp.0", "blocks.0.mlp.1", "blocks.0.mlp.2"]
    assert len(found) == 9


def test_a_stack_of_little_work_is_left_out(transformer):
    facts = costs(transformer.captured.graph_module, transformer.captured.inputs_of(transformer.call))
    time = numbered_blocks(transformer.captured.graph_module)["time.0"]
    assert 0 < sum(facts[name].flops for name in time.nodes) < 0.02 * sum(cost.flops for cost in facts.values())


def test_order_is_that_of_execution():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.late = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
            self.early = nn.ModuleList([nn.Linear(8, 8)])

        def forward(self, x):
            return self.late[0](self.late[1](self.early[0](x)))

    blocks = blocks_of(*captured_call(Backwards(), torch.ones(2, 8)))
    assert [block.path for block in blocks] == ["early.0", "late.1", "late.0"]
    assert [block.stack for block in blocks] == ["early", "late", "late"]


def test_a_block_called_twice_is_one_block():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(8, 8)])

        def forward(self, x):
            return self.blocks[0](self.blocks[0](x).sin())

    (block,) = blocks_of(*captured_call(Twice(), torch.ones(2, 8)))
    assert block.path == "blocks.0"
    assert len(block.nodes) == 2


def test_a_module_without_numbers_has_no_blocks():
    assert blocks_of(*captured_call(nn.Linear(8, 8), torch.ones(2, 8))) == []


def test_entering_and_leaving_values(transformer):
    nodes = nodes_by_name(transformer.captured.graph_module)
    first, second = blocks_of(transformer.captured, transformer.call)
    moving = set(nodes)
    out = {block.path: [node.name for node in leaving(nodes, set(block.nodes), moving)] for block in (first, second)}
    assert [len(names) for names in out.values()] == [1, 1]
    (between,), (last,) = out.values()
    enters = [node.name for node in entering(nodes, set(second.nodes)) if not node.name.startswith("p_")]
    assert enters == ["linear_1", between]  # the time embedding, and the stream
    both = region([first, second])
    assert both == first.nodes | second.nodes
    assert [node.name for node in leaving(nodes, both, moving)] == [last]


def test_what_no_step_changes_does_not_leave(transformer):
    nodes = nodes_by_name(transformer.captured.graph_module)
    first, _ = blocks_of(transformer.captured, transformer.call)
    assert leaving(nodes, set(first.nodes), set()) == []


def test_paths_run_from_the_outside_in(transformer):
    node = nodes_by_name(transformer.captured.graph_module)["gelu"]
    assert paths(node) == ["blocks.0", "blocks.0.mlp", "blocks.0.mlp.1"]


def test_is_inside_compares_whole_names():
    assert is_inside("blocks.1", "blocks.1")
    assert is_inside("blocks.1.mlp", "blocks.1")
    assert not is_inside("blocks.10", "blocks.1")
