"""The sites of a plan are found again in other states of the module: with adapters, several, scaled, idle and fused."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn

from dcc.capture.export import capture
from dcc.discover.sites import Sites, find_sites
from dcc.discover.subject import Subject
from dcc.passes.blocks import Block
from dcc.record.call import bind

from .adapters import Adapted, adapt, fuse
from .joint_nets import Tokens
from .test_coinciding_sizes import SITES, compare, subject_of

LAYERS = ("qkv", "proj", "mlp.0", "mlp.2", "up")
STATES = ("one adapter", "two adapters", "scaled", "idle", "fused", "named by numbers")
SIZES = (2, 5, 4)


def in_state(state: str) -> Tokens:
    """The denoiser in a state."""
    net = Tokens()
    if state == "plain":
        return net
    torch.manual_seed(2)
    names = {"two adapters": ("a", "b"), "named by numbers": ("0", "1")}.get(state, ("a",))
    layers = adapt(net, LAYERS, names, scaled=state == "scaled")
    if state == "idle":
        for layer in layers:
            layer.active = []
    if state == "fused":
        fuse(net)
    assert layers
    return net


@cache
def subject(state: str) -> tuple[Tokens, Subject]:
    net = in_state(state)
    return net, subject_of(net, SIZES)


def facts(sites: Sites) -> dict[str, tuple[str, tuple[tuple[int, ...], ...], tuple[bool, ...]]]:
    """What each site is, by name, in words that hold for every capture; those that are named when asked for too."""
    named = [*(s for s in sites if "[" not in s.name), *(sites[f"blocks[{k}:{k + 2}]"] for k in range(3))]
    named += [*sites.select("linears"), *sites.select("heads")]
    return {s.name: (s.kind, s.shapes, tuple(port.base is not None for port in s.ports)) for s in named}


@pytest.mark.parametrize("state", STATES)
def test_sites_and_groups_are_the_same_in_every_state(state: str) -> None:
    plain, other = subject("plain")[1].sites, subject(state)[1].sites
    assert facts(other) == facts(plain)
    assert [block.path for block in other.order] == [block.path for block in plain.order]
    for group in ("blocks", "branches", "attn", "mlp", "joint", "heads", "linears"):
        assert [s.name for s in other.select(group)] == [s.name for s in plain.select(group)], group


@pytest.mark.parametrize("state", STATES)
def test_each_site_is_the_same_value_in_every_state(state: str) -> None:
    """Hooks on the modules that a site's name says give what the compiled denoiser gives."""
    net, own = subject(state)
    for name, taps in SITES.items():
        compare(net, own, name, taps, (SIZES,))


@pytest.mark.parametrize("state", ["one adapter", "scaled"])
def test_adapters_change_the_output(state: str) -> None:
    """The comparisons above are of states that differ."""
    given = dict(sample=torch.ones(2, 5, 4), prompt=torch.ones(2, 4, 6), time=torch.ones(2))
    assert not torch.allclose(subject("plain")[0](**given), subject(state)[0](**given), rtol=1e-2)


class Tail(nn.Module):
    """Blocks, then a list of small layers that take less than a fiftieth of the work: a head, no stack of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(64, 64) for _ in range(2))
        self.head = nn.ModuleList([nn.Linear(64, 1), nn.Linear(1, 64)])
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + torch.nn.functional.gelu(block(x))
        return x + self.head[1](self.head[0](x))


def sites_of(net: Tail, like: Sites | None = None) -> Sites:
    call = bind(net, (torch.randn(2, 3, 64),), {}, frozenset())
    return find_sites(capture(net, call), call, like=like)


def order(net: Tail, like: Sites | None = None) -> list[str]:
    """Paths of the blocks that a capture of the module has."""
    return [block.path for block in sites_of(net, like).order]


def test_an_adapter_makes_no_block_of_a_head() -> None:
    net = Tail()
    expected = order(net)
    adapted = adapt(net, ("head.0", "head.1"))
    assert len(adapted) == 2 and all(isinstance(layer, Adapted) for layer in net.head)
    assert order(net) == expected == ["blocks.0", "blocks.1"]


def test_blocks_of_another_capture_are_taken_over() -> None:
    """What a stack of blocks is may depend on sizes; a plan's `blocks[a:b]` must not."""
    net = Tail()
    like = sites_of(net)
    like.order.append(Block("head.0", frozenset()))
    assert order(net, like) == ["blocks.0", "blocks.1", "head.0"]
    like.order.append(Block("blocks.2", frozenset()))
    assert order(net, like) == ["blocks.0", "blocks.1"]  # one is not there


def test_a_block_that_was_not_there_makes_another_stack() -> None:
    net = Tail()
    like = sites_of(net)
    net.blocks.append(nn.Linear(64, 64).requires_grad_(False))
    assert order(net, like) == ["blocks.0", "blocks.1", "blocks.2"]
