"""Coalescing: what is joined, what is not, the bytes it saves, and the numbers of random plans."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dcc.capture.export import capture
from dcc.discover.sites import find_sites
from dcc.passes.base import GUIDANCE, Port, Site
from dcc.passes.coalesce_forecasts import coalesced
from dcc.record.call import bind

from ..nets import apart

STEPS = 7


class Block(nn.Module):
    """Attention and MLP on a plain residual stream, or added to it through gates that move with the time."""

    def __init__(self, gated: bool) -> None:
        super().__init__()
        self.norm, self.qkv, self.mlp = (
            nn.LayerNorm(8),
            nn.Linear(8, 24),
            nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)),
        )
        self.gate = nn.Linear(1, 8) if gated else None

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        branch = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + (branch if self.gate is None else branch * self.gate(t)[:, None])
        branch = self.mlp(self.norm(x))
        return x + (branch if self.gate is None else branch * self.gate(t)[:, None])


class Net(nn.Module):
    """Four blocks; `looked` also gives the value after the second to the head."""

    def __init__(self, gated: bool = False, looked: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(gated) for _ in range(4)])
        self.head, self.looked = nn.Linear(8, 8), looked

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        seen = x
        x = x + timestep[:, None, None]
        for index, block in enumerate(self.blocks):
            x = block(x, timestep[:, None])
            seen = x if index == 1 else seen
        return self.head(x + seen if self.looked else x)


def net(**kinds: bool) -> nn.Module:
    torch.manual_seed(0)
    return Net(**kinds).eval().requires_grad_(False)


def sites_of(module: nn.Module) -> Any:
    call = bind(module, (torch.randn(2, 5, 8), torch.rand(2)), {}, frozenset())
    return find_sites(capture(module, call), call)


def sample(module: nn.Module, prompt: int) -> Tensor:
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(prompt))
    for step in range(STEPS):
        x = x - module(x, torch.full((2,), 1 - step / STEPS)) / STEPS
    return x


def names(group: tuple[Site, ...]) -> list[str]:
    return [site.name for site in group]


def test_blocks_become_one_residual() -> None:
    sites = sites_of(net())
    (site,) = coalesced(sites.select("blocks"), sites)
    assert site.name == "blocks.0..blocks.3"
    assert (
        site.ports == sites["stack"].ports and site.bytes == sites["stack"].bytes and site.flops == sites["stack"].flops
    )


def test_branches_without_gates_become_one_residual() -> None:
    sites = sites_of(net())
    (site,) = coalesced(sites.select("branches"), sites)
    assert site.name == "blocks.0/attn..blocks.3/mlp" and site.ports == sites["stack"].ports


def test_gated_branches_stay() -> None:
    sites = sites_of(net(gated=True))
    branches = sites.select("branches")
    assert coalesced(branches, sites) == branches
    assert len(coalesced(sites.select("blocks"), sites)) == 1


def test_a_value_that_something_else_takes_ends_a_run() -> None:
    sites = sites_of(net(looked=True))
    assert names(coalesced(sites.select("blocks"), sites)) == ["blocks.0..blocks.1", "blocks.2..blocks.3"]


def test_a_value_of_another_selector_ends_a_run() -> None:
    sites = sites_of(net())
    found = coalesced(sites.select("blocks"), sites, [sites["after:0"]])
    assert names(found) == ["blocks.1..blocks.3", "blocks.0"]


def test_two_streams_are_two_sites_and_what_cannot_be_joined_is_left() -> None:
    sites = sites_of(net())
    a, b = sites["blocks.0"], sites["blocks.1"]
    odd = Site("odd", "residual", (*a.ports, Port(sites["after:3"].ports[0].out)), (a.shapes[0],) * 2, 2 * a.bytes)
    found = coalesced((odd, b), sites)
    assert names(found) == ["odd..blocks.1", "odd"]
    assert found[1].ports == odd.ports[1:] and len(found[1].shapes) == 1


def test_one_site_and_guidance_stay() -> None:
    sites = sites_of(net())
    one = sites.select("stack")
    assert coalesced(one, sites) == one
    half = Site("uncond", GUIDANCE, one[0].ports)
    assert coalesced((half, *one), sites) == (half, *one)


@pytest.mark.parametrize("kinds", [{}, {"gated": True}, {"looked": True}], ids=["plain", "gated", "looked"])
@pytest.mark.parametrize("site", ["blocks", "branches"])
def test_random_plans_give_the_same_samples(kinds: dict[str, bool], site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(f"{kinds} {site}")
    module = net(**kinds)
    for _ in range(4):
        mask = [1, 1, *(draw.randint(0, 1) for _ in range(STEPS - 2))]
        policy = {"policy": "taylorseer", "steps_mask": mask, "order": draw.randint(1, 2), "site": site}
        joined = apart(module, [0], sample=sample, backend="eager", **policy)
        with monkeypatch.context() as patch:
            patch.setattr("dcc.passes.coalesce_forecasts.coalesced", lambda group, *_: tuple(group))
            separate = apart(module, [0], sample=sample, backend="eager", **policy)
            expected = sample(separate, 3)
        assert torch.allclose(sample(joined, 3), expected, rtol=1e-4, atol=1e-5)
        assert joined.plan.flops == separate.plan.flops and joined.plan.cache_bytes <= separate.plan.cache_bytes
        assert joined.summary().cache_bytes <= separate.summary().cache_bytes
        assert joined.summary().cache_bytes <= joined.plan.cache_bytes


def test_the_plan_and_the_cache_say_the_bytes_of_one_tensor_a_stream() -> None:
    module = net()
    one = 2 * 5 * 8 * 4  # batch, tokens, channels, float32
    compiled = apart(
        module, [0], sample=sample, policy="taylorseer", interval=3, order=1, site="branches", backend="eager"
    )
    sample(compiled, 0)
    assert compiled.plan.cache_bytes == compiled.summary().cache_bytes == 2 * one
