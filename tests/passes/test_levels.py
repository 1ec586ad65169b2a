"""Levels and cuts of a U-Net with three resolutions, written by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dcc.capture.export import capture
from dcc.discover.sites import find_sites
from dcc.passes.base import Port
from dcc.passes.costs import Cost, costs
from dcc.passes.dataflow import Dataflow
from dcc.passes.graph import nodes_by_name
from dcc.passes.levels import level_cut, levels, skip_pairs
from dcc.record.call import bind
from dcc.torch_internals import hint


def convolution(inputs, outputs, stride=1):
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1)


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.leave = convolution(4, 8), convolution(8, 4)
        self.down1, self.inner1 = convolution(8, 8, 2), convolution(8, 8)
        self.down2, self.inner2 = convolution(8, 8, 2), convolution(8, 8)
        self.up1, self.up0 = convolution(16, 8), convolution(16, 8)

    def forward(self, x, t):
        fine = self.enter(x) + t[:, None, None, None]
        middle = self.inner1(F.silu(self.down1(fine)))
        coarse = self.inner2(F.silu(self.down2(middle)))
        middle = F.silu(self.up1(torch.cat([F.interpolate(coarse, scale_factor=2.0), middle], 1)))
        fine = F.silu(self.up0(torch.cat([F.interpolate(middle, scale_factor=2.0), fine], 1)))
        return self.leave(fine)


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    module = UNet().requires_grad_(False)
    call = bind(module, (torch.randn(2, 4, 16, 16), torch.rand(2)), {}, frozenset())
    return capture(module, call), call


@pytest.fixture(scope="module")
def facts(unet):
    captured, call = unet
    found = costs(captured.graph_module, captured.inputs_of(call))
    return captured.graph_module, found, levels(captured.graph_module, found), Dataflow(captured.graph_module)


def owners(graph_module, names):
    nodes = nodes_by_name(graph_module)
    return sorted(list(nodes[name].meta["nn_module_stack"].values())[-1][0] for name in names)


def test_levels_by_size(facts):
    graph_module, _, all_levels, _ = facts
    assert [owners(graph_module, level) for level in all_levels] == [
        ["enter", "leave", "up0"],
        ["down1", "inner1", "up1"],
        ["down2", "inner2"],
    ]


@pytest.mark.parametrize(("level", "owner", "side"), [(1, "up1", 8), (2, "inner2", 4)])
def test_cut_is_the_cheap_value_of_low_resolution(facts, level, owner, side):
    graph_module, found, all_levels, flow = facts
    (name,) = level_cut(level, all_levels, flow, found)
    assert found[name].shape == (2, 8, side, side)
    ancestors = {n for n in flow.digraph if name in flow.depends_on([n])}
    convolutions = set().union(*all_levels) & ancestors
    assert owner in owners(graph_module, convolutions)


@pytest.mark.parametrize("level", [1, 2])
def test_a_forecast_of_the_cut_saves_all_deeper_work(facts, level):
    _, found, all_levels, flow = facts
    needed = flow.needed([Port(name) for name in level_cut(level, all_levels, flow, found)])
    assert needed & set().union(*all_levels[level:]) == set()
    after = {name for name in all_levels[0] if name in needed}
    assert after == all_levels[0]


def test_no_cut_without_a_finer_level_after(facts):
    _, found, all_levels, flow = facts
    assert level_cut(3, all_levels, flow, found) == []
    assert level_cut(1, [all_levels[2], all_levels[0]], flow, found) != []


def test_a_network_of_one_size_has_one_level():
    module = nn.Sequential(convolution(4, 4), convolution(4, 4))
    call = bind(module, (torch.randn(2, 4, 8, 8),), {}, frozenset())
    captured = capture(module, call)
    found = costs(captured.graph_module, captured.inputs_of(call))
    assert [len(level) for level in levels(captured.graph_module, found)] == [2]


def test_skip_cuts_are_the_newer_operands_outermost_first(facts):
    graph_module, found, _, flow = facts
    names = [newer for newer, _ in skip_pairs(graph_module, flow)]
    assert [found[name].shape for name in names] == [(2, 8, 16, 16), (2, 8, 8, 8)]
    nodes = nodes_by_name(graph_module)
    assert all("upsample" in str(nodes[name].target) for name in names)


def test_a_concatenation_of_strangers_is_no_skip(build):
    graph_module = build(lambda x, y: (torch.ops.aten.cat.default([x, y], 1),), x=torch.ones(2, 3), y=torch.ones(2, 3))
    assert skip_pairs(graph_module, Dataflow(graph_module)) == []


def test_cuts_are_sites(unet):
    captured, call = unet
    sites = find_sites(captured, call)
    cuts = {site.name: site.shapes for site in sites if site.kind == "cut"}
    assert cuts["cut:0"] == ((2, 8, 16, 16),)
    assert cuts["level:1"] == ((2, 8, 8, 8),)
    assert cuts["level:2"] == ((2, 8, 4, 4),)
    assert sites["level:1"].flops == sites["cut:0"].flops > sites["level:2"].flops > 0


def test_sizes_that_coincide_are_no_level():
    """Two pictures of one size in this call; and what is halved and doubled again is back at its level."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.down, self.up, self.other = (nn.Conv2d(1, 1, 3, padding=1, stride=s) for s in (1, 2, 1, 1))

        def forward(self, x, y):
            coarse = self.down(self.first(x))
            return self.up(coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)), self.other(y)

    given = torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8)
    dynamic = {0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    graph_module = torch.export.export(Two(), given, dynamic_shapes=(dynamic, dynamic), strict=False).graph_module
    values = {n.name: n.meta.get("val") for n in graph_module.graph.nodes}
    known = {name: Cost(0, 0, tuple(map(hint, v.shape))) for name, v in values.items() if isinstance(v, torch.Tensor)}
    found = [len(level) for level in levels(graph_module, known)]
    assert sorted(found[:2]) == [1, 2] and found[2:] == [1]
