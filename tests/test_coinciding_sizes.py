"""Sizes that coincide in the recorded call are not taken for one: every site equals the oracle, at other sizes too.

Image tokens, text tokens, samples and channels are of one number in many ways; what tells them apart is symbols, or
data flow where all sizes are fixed.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from .oracle import Cached, History, Oracle, Tap

LEVELS = (0.9, 0.7, 0.5, 0.2)
COMPUTED = (1, 0, 1, 0)  # interval 2
TOLERANCE = 1e-5
Sizes = tuple[int, int, int]  # samples, image tokens, text tokens
SITES = sites()


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


def subject_of(net: Tokens, sizes: Sizes) -> Subject:
    """The subject of a denoiser, recorded and captured at these sizes."""
    loop = lambda module, seed: generate(lambda step, kwargs: module(**kwargs), sizes)  # noqa: E731
    return apart(net, [0], sample=loop, plan=plan(net, "output"), backend="eager").subject


@cache
def recorded(sizes: Sizes, fixed: int = 0) -> tuple[Tokens, Subject]:
    """A denoiser and its subject; captured once for all tests."""
    net = Tokens(fixed)
    return net, subject_of(net, sizes)


def compare(net: Tokens, subject: Subject, name: str, taps: tuple[Tap, ...], at_sizes: Sequence[Sizes]) -> None:
    """Compares a site with the oracle at interval 2."""
    own = plan(net, name)
    assert [port.base is not None for port in subject.sites[name].ports] == [tap.base is not None for tap in taps], name
    family = build(own, subject.sites, Observer())
    for at in at_sizes:
        compiled = dcc.CompiledDenoiser(subject, own, families=[family])
        oracle, history = Oracle(net, [Cached(taps, COMPUTED)]), History()
        ours = generate(lambda step, kwargs, compiled=compiled: compiled(**kwargs), at)
        theirs = generate(lambda step, kwargs, o=oracle, h=history: o(h, step, kwargs), at)
        for step, (mine, its) in enumerate(zip(ours, theirs, strict=True)):
            error = float((mine - its).abs().max() / its.abs().max())
            assert error <= TOLERANCE, f"{name} at {at}, step {step}: {error:.1e} from the oracle"
        counts = compiled.sessions.counts
        assert (counts.computed, counts.forecast, counts.missed) == (2, 2, 0), (name, at)


def check(name: str, sizes: Sizes, others: Sequence[Sizes], fixed: int = 0) -> None:
    """Compares a site with the oracle at the recorded sizes and at others."""
    compare(*recorded(sizes, fixed), name, SITES[name], (sizes, *others))


@pytest.mark.parametrize("name", SITES)
def test_as_many_image_tokens_as_text_tokens_as_samples_as_channels(name: str) -> None:
    """All at once: the latent has four channels."""
    check(name, (4, 4, 4), ((4, 9, 4), (3, 4, 7)))


@pytest.mark.parametrize("name", SITES)
def test_fixed_numbers_of_tokens_are_told_apart_by_data_flow(name: str) -> None:
    check(name, (2, 5, 3), ((3, 5, 4),), fixed=5)


@settings(derandomize=True, max_examples=12, deadline=None, database=None)
@given(
    st.sampled_from([(2, WIDTH, WIDTH), (3, 4, 3)]), st.sampled_from(list(SITES)), st.integers(2, 9), st.integers(2, 9)
)
def test_some_sizes_coincide(sizes: Sizes, name: str, image: int, text: int) -> None:
    """As many tokens as channels inside, or as many words as samples; then at drawn sizes."""
    check(name, sizes, ((sizes[0], image, text), (2, image, image)))


def test_sites_are_those_of_sizes_apart() -> None:
    """One module has the same sites however it is captured."""
    apart, together, fixed = (
        {site.name: (site.kind, len(site.ports)) for site in recorded(*how)[1].sites if "[" not in site.name}
        for how in (((3, 4, 3), 0), ((4, 4, 4), 0), ((2, 5, 3), 5))
    )
    assert together == apart
    assert fixed == apart


def test_passes_leave_the_symbols_of_the_captured_graph() -> None:
    """A rewrite that made two sizes one would change the graph that other plans and other sizes are served from."""
    net, subject = recorded((4, 4, 4))
    nodes = [node for node in subject.sites.graph_module.graph.nodes if node.op == "placeholder"]
    before = [str(node.meta["val"].shape) for node in nodes]
    for name in SITES:
        build(plan(net, name), subject.sites, Observer())
    assert [str(node.meta["val"].shape) for node in nodes] == before
