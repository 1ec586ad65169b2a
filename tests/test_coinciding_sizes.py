"""Sizes that coincide in the recorded call are not taken for one: every site equals the oracle, at other sizes too.

Image tokens, text tokens, samples and channels are of one number in many ways; what tells them apart is symbols, or
data flow where all sizes are fixed.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import dcc
from dcc.discover.subject import Subject
from dcc.plans.plan import Plan, make_plan
from dcc.plans.predictors import Predictor
from dcc.record.fingerprint import fingerprint
from dcc.variants.build import build
from dcc.variants.observe import Observer

from .joint_nets import LATENT, TEXT, WIDTH, Tokens, sites
from .nets import apart
from .oracle import Cached, History, Oracle

LEVELS = (0.9, 0.7, 0.5, 0.2)
COMPUTED = (1, 0, 1, 0)  # interval 2
TOLERANCE = 1e-5
Sizes = tuple[int, int, int]  # samples, image tokens, text tokens
APART: Sizes = (2, 5, 3)
OTHERS: tuple[Sizes, ...] = ((2, 9, 4), (3, 4, 7))


def start(sizes: Sizes) -> tuple[Tensor, Tensor]:
    """The latent and the prompt of a generation."""
    torch.manual_seed(sum(sizes))
    return torch.randn(sizes[0], sizes[1], LATENT), torch.randn(sizes[0], sizes[2], TEXT)


def generate(call, sizes: Sizes) -> list[Tensor]:
    """One generation: the output of every step; `call(step, kwargs)` is the denoiser."""
    sample, prompt = start(sizes)
    outputs = []
    with torch.no_grad():
        for step, level in enumerate(LEVELS):
            outputs.append(call(step, dict(sample=sample, prompt=prompt, time=torch.full((sizes[0],), level))))
            sample = sample - 0.3 * outputs[-1]
    return outputs


def plan(net: Tokens, name: str) -> Plan:
    return make_plan(
        model=fingerprint(net),
        scheduler="sample",
        levels=LEVELS,
        sites=[name],
        schedule=[(computed,) for computed in COMPUTED],
        predictors=[Predictor("copy")],
        policy="test",
        parameters={},
    )


@cache
def recorded(sizes: Sizes, fixed: int = 0) -> tuple[Tokens, Subject]:
    """A denoiser and its subject, recorded and captured at these sizes."""
    net = Tokens(fixed)
    loop = lambda module, seed: generate(lambda step, kwargs: module(**kwargs), sizes)  # noqa: E731
    made = apart(net, [0], sample=loop, plan=plan(net, "output"), backend="eager")
    return net, made.subject


def check(sizes: Sizes, others: tuple[Sizes, ...], fixed: int = 0) -> None:
    """Compares every site with the oracle at interval 2, at the recorded sizes and at others."""
    net, subject = recorded(sizes, fixed)
    for name, taps in sites().items():
        found = subject.sites[name]
        assert [port.base is not None for port in found.ports] == [tap.base is not None for tap in taps], name
        own = plan(net, name)
        family = build(own, subject.sites, Observer())
        for at in (sizes, *others):
            compiled = dcc.CompiledDenoiser(subject, own, families=[family])
            oracle, history = Oracle(net, [Cached(taps, COMPUTED)]), History()
            ours = generate(lambda step, kwargs, compiled=compiled: compiled(**kwargs), at)
            theirs = generate(lambda step, kwargs, o=oracle, h=history: o(h, step, kwargs), at)
            for step, (mine, its) in enumerate(zip(ours, theirs, strict=True)):
                error = float((mine - its).abs().max() / its.abs().max())
                assert error <= TOLERANCE, f"{name} at {at}, step {step}: {error:.1e} from the oracle"
            counts = compiled.sessions.counts
            assert (counts.computed, counts.forecast, counts.missed) == (2, 2, 0), (name, at)


def test_sizes_apart() -> None:
    check(APART, OTHERS)


@settings(derandomize=True, max_examples=4, deadline=None, database=None)
@given(st.tuples(st.sampled_from((2, 4)), st.sampled_from((2, 4, WIDTH)), st.booleans()))
def test_as_many_image_tokens_as_text_tokens(drawn: tuple[int, int, bool]) -> None:
    """Also as many as samples, as channels of the latent, or as channels inside."""
    samples, tokens, alone = drawn
    check((samples, tokens, TEXT if alone else tokens), (*OTHERS, (samples, tokens + 1, tokens)))


def test_fixed_sizes_are_told_apart_by_data_flow() -> None:
    check((2, 4, 3), ((3, 4, 5),), fixed=4)


@pytest.mark.parametrize("fixed", [0, 5])
def test_sites_are_those_of_sizes_apart(fixed: int) -> None:
    """One module has the same sites however it is captured."""
    expected = recorded(APART)[1].sites
    found = recorded((2, 5, 5), fixed)[1].sites
    assert {site.name: (site.kind, len(site.ports)) for site in found} == {
        site.name: (site.kind, len(site.ports)) for site in expected
    }


def test_passes_leave_the_symbols_of_the_captured_graph() -> None:
    """A rewrite that made two sizes one would change the graph that other plans and other sizes are served from."""
    net, subject = recorded((2, 4, 4))
    nodes = [node for node in subject.sites.graph_module.graph.nodes if node.op == "placeholder"]
    before = [str(node.meta["val"].shape) for node in nodes]
    for name in sites():
        build(plan(net, name), subject.sites, Observer())
    assert [str(node.meta["val"].shape) for node in nodes] == before
