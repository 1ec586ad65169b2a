"""One block of each kind is traced: the graph is that of a whole trace, and what is no repeat is not taken for one."""

import threading
import warnings
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

import dcc.capture.export
from dcc.capture.export import capture
from dcc.capture.purity import examine
from dcc.capture.repeats import REPEAT, one_of_each_kind, write_out
from dcc.passes.blocks import paths
from dcc.passes.graph import carries_tensors
from dcc.record.call import bind

from .denoisers import CASES

NONE = frozenset()


class Block(nn.Module):
    """A branch on a stream, small but no smaller than what counts as a block."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)
        self.scale = scale

    def forward(self, x, context=None, keep=None):
        y = self.down(self.up(self.norm(x)).tanh()) * self.scale
        return x + (y if context is None else y * context), keep


class Stack(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.into, self.blocks = nn.Linear(8, 8), nn.ModuleList(blocks)

    def forward(self, x):
        x = self.into(x)  # whose size is known before the first block
        for block in self.blocks:
            x, _ = block(x)
        return x


@pytest.fixture
def repeats(monkeypatch, tmp_path):
    """The paths of the blocks that were not traced, as exports go on."""
    found = []

    def spy(graph, module, weights):
        found.extend(node.args[1] for node in graph.nodes if node.target is REPEAT)
        write_out(graph, module, weights)

    monkeypatch.setattr(dcc.capture.export, "write_out", spy)
    monkeypatch.setenv("DCC_CACHE_DIR", "")
    return found


def captured_from(module, *args):
    """The capture, which gives the module's outputs bit for bit; the module is as it was."""
    module.eval().requires_grad_(False)
    call = bind(module, args, {}, NONE)
    captured = capture(module, call)
    assert captured.problem is None and captured.agrees(module, call)
    assert not any("forward" in vars(part) for part in module.modules())
    return captured


def described(captured):
    """What every tensor of the graph is made by and of, where, and how large it is; sizes as numbers."""
    index = {node: position for position, node in enumerate(filter(carries_tensors, captured.graph_module.graph.nodes))}

    def argument(node):
        return f"%{index[node]}" if node in index else int(node.meta["val"])

    def layout(val):
        return tuple(map(int, val.shape)), tuple(map(int, val.stride())), val.dtype

    return [
        (
            node.name if node.op == "placeholder" else node.target,
            map_arg((node.args, dict(node.kwargs)), argument),
            [layout(val) for val in pytree.tree_leaves(node.meta["val"])],
            paths(node),
        )
        for node in index
    ]


@pytest.mark.parametrize("name", ["flux", "wan", "unet-sdxl", "audioldm2"])
def test_the_graph_is_that_of_a_whole_trace(name, repeats, monkeypatch):
    (case,) = (case for case in CASES if case.name == name)
    if case.warns:
        warnings.filterwarnings("ignore", message=case.warns)
    net = case.build()
    call = bind(net, (), case.inputs(batch=2), NONE)
    evidence = examine(net, call)
    short = dcc.capture.export._first_that_exports(net, call, evidence, evidence.answers)
    assert repeats and short.problem is None
    monkeypatch.setattr(dcc.capture.export, "one_of_each_kind", lambda module: nullcontext(False))
    whole = dcc.capture.export._first_that_exports(net, call, evidence, evidence.answers)
    assert described(short) == described(whole)
    assert short.weights.keys() == whole.weights.keys() and short._symbols == whole._symbols


def test_weights_of_repeated_blocks_are_their_own(repeats):
    module, x = Stack(*(Block() for _ in range(5))), torch.randn(2, 3, 8)
    captured = captured_from(module, x)
    assert repeats == [f"blocks.{index}" for index in (1, 2, 3, 4)]
    module.blocks[3].up.weight.data.mul_(2)
    assert captured.agrees(module, captured.call)


def test_settings_make_kinds(repeats):
    captured_from(Stack(Block(), Block(2.0), Block(), Block(2.0), Block(3.0)), torch.randn(2, 3, 8))
    assert repeats == ["blocks.2", "blocks.3"]


def test_a_difference_that_no_setting_shows_is_noticed(repeats):
    class Hidden(Block):
        def forward(self, x, context=None, keep=None):
            x, keep = super().forward(x, context, keep)
            return x * FACTORS[id(self)], keep

    blocks = [Hidden() for _ in range(3)]
    FACTORS = {id(block): 1.0 + index for index, block in enumerate(blocks)}
    captured_from(Stack(*blocks), torch.randn(2, 3, 8))
    assert repeats == ["blocks.1", "blocks.2"]  # of the first try; the second one traces all


def test_blocks_that_share_weights(repeats):
    blocks = [Block() for _ in range(3)]
    blocks[2].up = blocks[0].up
    captured_from(Stack(*blocks), torch.randn(2, 3, 8))
    assert repeats == ["blocks.1", "blocks.2"]


def test_a_block_that_shares_weights_in_itself_is_another_kind():
    class Tied(Block):
        def __init__(self):
            super().__init__()
            self.up, self.down, self.over = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x, context=None, keep=None):
            return self.over(super().forward(x, context, keep)[0]), keep

    blocks = [Tied() for _ in range(3)]
    blocks[0].over.weight = blocks[0].up.weight
    captured_from(Stack(*blocks), torch.randn(2, 3, 8))


def test_arguments_of_every_sort(repeats):
    class Sorts(Stack):
        def forward(self, x):
            x = self.into(x)
            context = x.mean(1, keepdim=True)
            for index, block in enumerate(self.blocks):
                x, kept = block(x, context=x if index % 2 else context, keep={"at": index // 4, "none": None})
                assert kept == {"at": index // 4, "none": None}
            return x

    captured_from(Sorts(*(Block() for _ in range(6))), torch.randn(2, 3, 8))
    assert repeats == ["blocks.2", "blocks.3"]  # the same tensor twice is another call, and so is another constant


def test_other_shapes_are_traced(repeats):
    class Pyramid(Stack):
        def forward(self, x):
            x = self.into(x)
            for block in self.blocks:
                x = torch.cat([block(x)[0]] * 2, 1)
            return x

    captured_from(Pyramid(*(Block() for _ in range(3))), torch.randn(2, 3, 8))
    assert repeats == []


def test_blocks_in_blocks(repeats):
    class Outer(Stack):
        def forward(self, x, context=None, keep=None):
            return super().forward(x), keep

    module = Stack(*(Outer(Block(), Block()) for _ in range(3)))
    captured = captured_from(module, torch.randn(2, 3, 8))
    assert repeats == ["blocks.0.blocks.1", "blocks.1", "blocks.2"]
    last = [node for node in captured.graph_module.graph.nodes if node.target is torch.ops.aten.tanh.default][-1]
    assert paths(last) == ["blocks.2", "blocks.2.blocks.1"]


def test_blocks_in_other_lists(repeats):
    class Branches(Stack):
        def forward(self, x, context=None, keep=None):
            return super().forward(x), keep

    module = Stack(Branches(Block(), Block(2.0)), Block(), Branches(Block(), Block(), Block(2.0)))
    captured = captured_from(module, torch.randn(2, 3, 8))
    assert repeats == ["blocks.1", *(f"blocks.2.blocks.{index}" for index in range(3))]
    made = [paths(node) for node in captured.graph_module.graph.nodes if node.target is torch.ops.aten.tanh.default]
    assert made == [
        ["blocks.0", "blocks.0.blocks.0"],
        ["blocks.0", "blocks.0.blocks.1"],
        ["blocks.1"],
        *(["blocks.2", f"blocks.2.blocks.{index}"] for index in range(3)),
    ]


def test_a_block_that_writes_to_its_input(repeats):
    class Writes(Block):
        def forward(self, x, context=None, keep=None):
            x.mul_(0.5)
            return super().forward(x, context, keep)

    class Both(Stack):
        def forward(self, x):
            x, seen = self.into(x), 0.0
            for block in self.blocks:
                y, _ = block(x)
                x, seen = y, seen + x
            return seen

    captured_from(Both(*(Writes() for _ in range(3))), torch.randn(2, 3, 8))
    assert repeats  # which gave other values


def test_a_block_that_is_called_twice(repeats):
    class Twice(Stack):
        def forward(self, x):
            return super().forward(super().forward(x))

    captured_from(Twice(*(Block() for _ in range(2))), torch.randn(2, 3, 8))
    assert repeats == ["blocks.1", "blocks.1"]


def test_another_thread_runs_the_real_blocks():
    module, x, found = Stack(*(Block() for _ in range(3))).eval(), torch.randn(2, 3, 8), []
    with torch.no_grad(), one_of_each_kind(module) as any_repeats:
        expected = [module.blocks[1].down(module.blocks[1].up(module.blocks[1].norm(x)).tanh()) + x]
        thread = threading.Thread(target=lambda: found.append(module.blocks[1](x)[0].detach()))
        thread.start()
        thread.join()
    assert any_repeats and torch.equal(found[0], expected[0])


def test_a_replaced_forward_stays(repeats):
    module = Stack(*(Block() for _ in range(3)))
    for block in module.blocks:
        block.forward = lambda x, own=block: (Block.forward(own, x)[0] * 2, None)
    module.eval().requires_grad_(False)
    call = bind(module, (torch.randn(2, 3, 8),), {}, NONE)
    assert capture(module, call).agrees(module, call)
    assert repeats == [] and all("forward" in vars(block) for block in module.blocks)
