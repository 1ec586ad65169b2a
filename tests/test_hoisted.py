"""What no step changes is computed once per session, of that session's prompt and weights, and changes no number."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import dcc
from dcc.text import human_bytes
from dcc.variants.build import build
from dcc.variants.hoisted import prologue
from dcc.variants.observe import Observer

from .nets import apart

STEPS = 4
CHANNELS = 32


class Block(nn.Module):
    """Cross-attention to the text, whose keys and values no step changes."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(CHANNELS, CHANNELS) for _ in range(3))
        self.mlp = nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        q, k, v = (layer(t).unflatten(-1, (2, -1)).transpose(1, 2) for layer, t in self._parts(x, text))
        x = x + nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.mlp(x)

    def _parts(self, x: Tensor, text: Tensor) -> list[tuple[nn.Linear, Tensor]]:
        return [(self.query, x), (self.key, text), (self.value, text)]


class Net(nn.Module):
    """Two blocks after an embedder of the text; every layer's weight tells in a count which layer ran."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.time = nn.Linear(48, CHANNELS), nn.Linear(1, CHANNELS)
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, sample: Tensor, time: Tensor, text: Tensor) -> Tensor:
        x, text = sample + self.time(time[:, None])[:, None], self.text(text)
        for block in self.blocks:
            x = block(x, text)
        return x


class Products(TorchDispatchMode):
    """Counts the matrix products that take each of a module's weights."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.names = {p.untyped_storage().data_ptr(): n for n, p in module.named_parameters() if p.dim() == 2}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default):
            found = (self.names.get(t.untyped_storage().data_ptr()) for t in args if isinstance(t, Tensor))
            self.counts.update(name for name in found if name)
        return func(*args, **(kwargs or {}))


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def steps(net: nn.Module, seed: int, text: Tensor, batch: int = 2) -> Iterator[Tensor]:
    """One generation, a step at a time."""
    x = draw(batch, 6, CHANNELS, seed=seed)
    for step in range(STEPS):
        with torch.no_grad():
            x = x - 0.1 * net(sample=x, time=torch.full((batch,), 1 - step / STEPS), text=text)
        yield x


def text_of(seed: int, batch: int = 2) -> Tensor:
    return draw(batch, 5, 48, seed=100 + seed)


def generate(net: nn.Module, seed: int, batch: int = 2) -> list[Tensor]:
    return list(steps(net, seed, text_of(seed, batch), batch))


@pytest.fixture
def module() -> nn.Module:
    return Net().eval().requires_grad_(False)


def compiled(module: nn.Module, sample: Any = generate, **options: Any) -> dcc.CompiledDenoiser:
    options = options or {"policy": "interval", "interval": 1}
    return apart(module, [0], sample=sample, backend="eager", **options)


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


HOISTED = {"text.weight", *(f"blocks.{i}.{layer}.weight" for i in (0, 1) for layer in ("key", "value"))}


def test_projections_of_the_prompt_run_once_a_session(module: nn.Module) -> None:
    expected, net = generate(module, 1), compiled(module)
    with Products(module) as products:
        assert_same(generate(net, 1), expected)
    once = {name for name, count in products.counts.items() if count == 1}
    assert once == HOISTED
    assert {products.counts[name] for name in products.names.values() if name not in once} == {STEPS}
    generate(net, 1)
    assert net.summary().prologues == 2


def test_forecast_steps_take_what_their_graph_still_needs(module: nn.Module) -> None:
    """A plan that forecasts the second block: the first one's keys are taken at every step, made once."""
    net = compiled(module, policy="interval", interval=2, site="blocks.1")
    plain = net.families[0]
    hoistless = build(net.plan, plain.sites, Observer(), hoist=False)
    expected = net.with_plan(net.plan)
    expected.families[:] = [hoistless]
    with Products(module) as products:
        found = generate(net, 1)
    assert_same(found, generate(expected, 1))
    assert {products.counts[name] for name in HOISTED} == {1}
    assert products.counts["blocks.0.query.weight"] == STEPS
    assert products.counts["blocks.1.query.weight"] == STEPS // 2
    assert expected.summary().prologues == 0


def test_interleaved_sessions_share_nothing(module: nn.Module) -> None:
    net = compiled(module)
    both = [steps(net, seed, text_of(seed)) for seed in (1, 2)]
    found = list(zip(*both, strict=True))
    assert_same([a for a, _ in found], generate(module, 1))
    assert_same([b for _, b in found], generate(module, 2))
    assert net.summary().prologues == 2
    assert not net.sessions.streams


@pytest.mark.parametrize("how", ["in place", "another tensor"])
@pytest.mark.parametrize("when", [0, 2], ids=["between sessions", "within one"])
def test_a_weight_swap_takes_effect(module: nn.Module, how: str, when: int) -> None:
    def swapped(net: nn.Module) -> list[Tensor]:
        """A generation that begins with one weight and, from step `when` on, has another."""
        layer = module.blocks[0].key
        layer.weight = nn.Parameter(draw(CHANNELS, CHANNELS, seed=3), requires_grad=False)
        if when == 0:
            generate(net, 1)
        generation = steps(net, 1, text)
        found = [next(generation) for _ in range(when)]
        new = draw(CHANNELS, CHANNELS, seed=4)
        if how == "in place":
            layer.weight.copy_(new)
        else:
            layer.weight = nn.Parameter(new, requires_grad=False)
        return [*found, *generation]

    text, net = text_of(1), compiled(module)
    assert_same(swapped(net), swapped(module))


def test_a_prompt_that_is_written_to_is_computed_again(module: nn.Module) -> None:
    def changed(net: nn.Module) -> list[Tensor]:
        text = text_of(1).clone()
        generation = steps(net, 1, text)
        found = [next(generation)]
        text.mul_(2)
        return [*found, *generation]

    net = compiled(module)
    assert_same(changed(net), changed(module))
    assert net.summary().prologues == 2


def test_another_batch_has_values_of_its_own(module: nn.Module) -> None:
    net = compiled(module)
    for batch in (3, 2, 1):
        assert_same(generate(net, 1, batch), generate(module, 1, batch))
    assert net.summary().prologues == 3


def test_a_prompt_made_anew_at_every_step_is_computed_at_every_step(module: nn.Module) -> None:
    """Its tensor does not say that its values stay: nothing is held that would be made again each time."""

    def anew(net: nn.Module, seed: int) -> list[Tensor]:
        x, text, found = draw(2, 6, CHANNELS, seed=seed), text_of(seed), []
        for step in range(STEPS):
            with torch.no_grad():
                x = x - 0.1 * net(sample=x, time=torch.full((2,), 1 - step / STEPS), text=text.clone())
            found.append(x)
        return found

    net = compiled(module, anew)
    assert_same(anew(net, 1), anew(module, 1))
    assert net.summary().prologues == 0
    assert not net.families[0].prologue.names


def test_half_of_a_guidance_batch_has_values_of_its_own(module: nn.Module) -> None:
    """Steps that leave out the unconditional half take keys of the other half alone."""

    def guided(net: nn.Module, seed: int) -> list[Tensor]:
        x, text, found = draw(1, 6, CHANNELS, seed=seed), text_of(seed), []
        for step in range(STEPS):
            with torch.no_grad():
                both = net(sample=x.repeat(2, 1, 1), time=torch.full((2,), 1 - step / STEPS), text=text)
            x = x - 0.1 * (3 * both[1:] - 2 * both[:1])
            found.append(x)
        return found

    net = compiled(module, guided, policy="interval", interval=2, site="uncond")
    other = net.with_plan(net.plan)
    other.families[:] = [build(net.plan, net.families[0].sites, Observer(), hoist=False)]
    assert_same(guided(net, 1), guided(other, 1))
    assert (net.summary().prologues, other.summary().prologues) == (2, 0)


def test_a_plan_with_a_trigger_computes_all_at_every_step(module: nn.Module) -> None:
    net = compiled(module, policy="teacache", threshold=0.0)
    assert_same(generate(net, 1), generate(module, 1))
    assert net.summary().prologues == 0


def test_the_pass_may_be_skipped(module: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DCC_SKIP", "hoist_invariants")
    net = compiled(module)
    assert_same(generate(net, 1), generate(module, 1))
    assert net.summary().prologues == 0


def test_the_summary_tells_held_values_from_the_cache(module: nn.Module) -> None:
    net = compiled(module, policy="interval", interval=2, site="blocks.1")
    assert (net.summary().hoisted_bytes, net.summary().prologues) == (0, 0)  # warming up is no session
    generation = steps(net, 1, text_of(1))
    next(generation)
    (stream,) = net.sessions.streams.values()
    keys = 4 * 2 * 5 * CHANNELS * 4
    assert net.summary().hoisted_bytes == keys
    assert net.summary().cache_bytes == stream.bytes() == 2 * 6 * CHANNELS * 4
    assert f"{human_bytes(keys)} at most so far, computed 1 times" in str(net.summary())
    list(generation)
    assert not net.sessions.streams
    assert net.summary().hoisted_bytes == keys


def test_no_nodes_make_no_prologue(module: nn.Module) -> None:
    net = compiled(module)
    assert prologue(net.families[0].sites, ()).names == ()
