"""Floats of a module as inputs of its graph: where they may hang, what refuses them, and that they are read live."""

from __future__ import annotations

import types
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import dcc
from dcc.capture.captured import Captured
from dcc.capture.export import capture
from dcc.capture.settings import Settings, replaceable
from dcc.capture.watch import State
from dcc.errors import CaptureError
from dcc.record.call import Call, bind

from .truth.adapters import load
from .truth.loops import BUILD, LEVELS, Loop

PLACES = {"gain": 1, "table": 2, "items": 1, "box": 1}  # how many floats each has


class Scaled(nn.Module):
    """x -> 2 x + gain x + table["a"] x^2 + items[0] + box.by, then as `extra` says."""

    def __init__(self, extra: Callable[[Scaled, Tensor], Tensor] = lambda net, y: y) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0), requires_grad=False)
        self.gain, self.table, self.items, self.box = 0.5, {"a": 0.25, "b": 9.0}, [2.0], types.SimpleNamespace(by=3.0)
        self.pair, self.extra = (1.0, 2.0), extra

    def forward(self, x: Tensor) -> Tensor:
        y = self.weight * x + self.gain * x + x * x * self.table["a"] + self.items[0] + self.box.by
        return self.extra(self, y)


X = torch.linspace(-2, 2, 12).reshape(3, 4)


def called(net: nn.Module) -> Call:
    return bind(net, (), {"x": X}, frozenset())


def answer(captured: Captured) -> Tensor:
    return captured.graph_module(*captured.inputs_of(called(Scaled())))[0]


def test_one_graph_serves_all_values():
    net = Scaled()
    captured = capture(net, called(net), settings=frozenset(PLACES))
    assert captured.problem is None
    assert len(captured.settings.names) == sum(PLACES.values())
    assert net.gain == 0.5 and net.table == {"a": 0.25, "b": 9.0} and "forward" not in vars(net)
    torch.testing.assert_close(answer(captured), 2 * X + 0.5 * X + 0.25 * X**2 + 5)
    net.gain, net.table["a"], net.items[0], net.box.by = -1.5, 0.125, 7.0, 0.5
    torch.testing.assert_close(answer(captured), 0.5 * X + 0.125 * X**2 + 7.5)
    assert captured.gives(called(net), [net(X)])  # bit for bit


def test_a_graph_reads_them_where_the_module_has_them_now():
    net = Scaled()
    captured = capture(net, called(net), settings=frozenset({"table"}))
    net.table, net.items = {"a": 4.0, "b": 1.0}, [2.0]
    assert captured.fits(State.of(net))
    captured.read_from(net)
    torch.testing.assert_close(answer(captured), 2.5 * X + 4 * X**2 + 5)


def test_which_states_a_graph_fits():
    net = Scaled()
    captured = capture(net, called(net), settings=frozenset({"gain"}))
    net.gain = 100.0
    assert captured.fits(State.of(net))
    net.table["a"] = 1.0
    assert not captured.fits(State.of(net))  # another number
    net.table["a"], net.gain = 0.25, 100
    assert not captured.fits(State.of(net))  # of another type
    net.gain, net.whole = 0.5, 1
    assert not captured.fits(State.of(net))  # one attribute more


def test_floats_that_cannot_be_replaced():
    net = Scaled()
    floats = State.of(net).floats
    assert replaceable(net, floats, [*PLACES, "pair"]) == set(PLACES)
    net.parts = [Scaled()]  # no submodule
    assert replaceable(net, State.of(net).floats, ["parts.gain"]) == frozenset()


def branches(net: Scaled, y: Tensor) -> Tensor:
    return y + 1 if net.gain > 0.4 else y


def asks_for_the_type(net: Scaled, y: Tensor) -> Tensor:
    return y + 1 if isinstance(net.gain, float) else y


def rounds(net: Scaled, y: Tensor) -> Tensor:
    return y * round(net.gain)


def gives_it_to_an_operator(net: Scaled, y: Tensor) -> Tensor:
    return nn.functional.leaky_relu(y, net.gain)


@pytest.mark.parametrize("extra", [branches, asks_for_the_type, rounds, gives_it_to_an_operator])
def test_code_that_does_more_than_compute_with_a_number_is_refused(extra):
    net = Scaled(extra)
    with pytest.raises(CaptureError, match="the numbers on gain"):
        capture(net, called(net), settings=frozenset({"gain"}))
    assert net.gain == 0.5 and "forward" not in vars(net)
    assert capture(net, called(net)).problem is None


def test_tensors_are_made_anew_for_new_numbers_only():
    net = Scaled()
    settings = Settings.of(net, ["table"])
    first = settings.tensors()
    assert all(again is tensor for again, tensor in zip(settings.tensors(), first, strict=True))
    assert [(float(t), t.dtype, t.dim()) for t in first] == [(0.25, torch.float64, 0), (9.0, torch.float64, 0)]
    net.table["b"] = -1.0
    again = settings.tensors()
    assert [float(t) for t in again] == [0.25, -1.0] and again[0] is first[0]


@pytest.mark.parametrize("model", list(BUILD))
def test_the_sites_are_those_of_a_graph_with_the_numbers_in_it(model):
    pytest.importorskip("peft")
    loop = Loop(BUILD[model]())
    load(loop, "a", 1)
    loop.compile(policy="interval", interval=2, site="output")
    denoiser = dcc.compiled(loop.net)
    loop.net.set_adapters(["a"], [0.3])
    loop()
    plain, with_settings = (family.sites for family in denoiser.families)
    assert with_settings.captured.settings.names
    described = [[(s.name, s.kind, s.shapes, s.flops) for s in sites] for sites in (plain, with_settings)]
    assert described[0] == described[1]


@pytest.mark.slow
def test_a_scale_under_inductor():
    """Lowered once for all values, and as near to the original as a graph with the number in it."""
    pytest.importorskip("peft")
    ours, right = Loop(BUILD["dit"]()), Loop(BUILD["dit"]())
    for loop in (ours, right):
        load(loop, "a", 1)
    dcc.compile(ours.net, [0], sample=lambda net, prompt: ours()[0], backend="inductor", policy="interval", interval=1)
    programs = []
    for value in (0.3, 0.7, 0.1):
        for loop in (ours, right):
            loop.net.set_adapters(["a"], [value])
        torch.testing.assert_close(ours()[0], right()[0], rtol=1e-4, atol=1e-4)
        programs.append(dcc.summary(ours.net).programs)
    assert programs[0] == programs[-1] == 2
    assert dcc.summary(ours.net).originals == 0 and len(LEVELS) == 4
