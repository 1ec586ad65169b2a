"""The state of a module: what a mark notices, when two states are one, and that a module is left as it was."""

from __future__ import annotations

import collections
import random
import types

import numpy as np
import pytest
import torch
from torch import nn

from dcc.capture.preserve import preserved
from dcc.capture.purity import examine
from dcc.capture.state import Mark
from dcc.capture.watch import State, Watch, lasting_digest
from dcc.record import seam
from dcc.record.call import bind


class Processor:
    def __init__(self) -> None:
        self.scale = [1.0]


class Slotted:
    __slots__ = ("value",)


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        nn.init.constant_(self.linear.weight, 0.5)
        nn.init.constant_(self.linear.bias, 0.25)
        self.register_buffer("table", torch.ones(3))
        self.processor, self.slotted = Processor(), Slotted()
        self.slotted.value = 1
        self.number, self.text, self.nothing, self.items, self.named = 2.5, "a", None, [1, [2]], {"x": {"y": 1}}
        self.loose, self.queue, self.bag = torch.zeros(2), collections.deque([1]), {1}
        self.whole = 2
        self.pair, self.space = ([1], 2), types.SimpleNamespace(a=1)
        count = 0

        def counter():
            nonlocal count
            count += 1
            return count

        self.counter = counter

    def forward(self, x):
        return self.linear(x) * self.number


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([Part(), Part()])
        self.unregistered = [Part()]

    def forward(self, x):
        for part in self.parts:
            x = part(x)
        return x


def _set(path, name, value):
    def change(net):
        owner = eval(f"net.{path}") if path else net
        before = getattr(owner, name)
        setattr(owner, name, value() if callable(value) else value)
        return lambda: setattr(owner, name, before)

    return change


def _do(action, undo):
    def change(net):
        action(net)
        return lambda: undo(net)

    return change


def _hook(net):
    return net.parts[1].register_forward_hook(lambda *_: None).remove


def _closure(net):
    net.parts[0].counter()


def _class(net):
    net.parts[0].__class__ = type("Other", (Part,), {"forward": lambda self, x: x})
    return lambda: setattr(net.parts[0], "__class__", Part)


def _patched(net):
    before = Part.forward
    Part.forward = lambda self, x: x
    return lambda: setattr(Part, "forward", before)


def _replaced(net):
    before, net.parts[0].linear = net.parts[0].linear, nn.Linear(3, 3, bias=False)
    return lambda: setattr(net.parts[0], "linear", before)


def _cast(net):
    net.parts[0].half()
    return lambda: net.parts[0].float()


def _emptied(net):
    weight = net.parts[0].linear.weight
    before, weight.data = weight.data, torch.empty(0)
    return lambda: setattr(weight, "data", before)


CHANGES = {
    "a number": _set("parts[0]", "number", 3.5),
    "a number of another type": _set("parts[0]", "whole", 2.0),
    "all submodules": _set("parts[1]", "_modules", lambda: {"linear": nn.Linear(3, 3, bias=False)}),
    "a text": _set("parts[0]", "text", "b"),
    "nothing": _set("parts[0]", "nothing", 1),
    "a new attribute": _do(lambda n: setattr(n.parts[0], "new", 1), lambda n: delattr(n.parts[0], "new")),
    "on the module itself": _do(lambda n: setattr(n, "new", 1), lambda n: delattr(n, "new")),
    "a list": _do(lambda n: n.parts[0].items.append(3), lambda n: n.parts[0].items.pop()),
    "a list in a list": _do(lambda n: n.parts[0].items[1].append(3), lambda n: n.parts[0].items[1].pop()),
    "a list in a tuple": _do(lambda n: n.parts[0].pair[0].append(3), lambda n: n.parts[0].pair[0].pop()),
    "a dict in a dict": _do(lambda n: n.parts[0].named["x"].update(y=2), lambda n: n.parts[0].named["x"].update(y=1)),
    "a key": _do(lambda n: n.parts[0].named.update(z=0), lambda n: n.parts[0].named.pop("z")),
    "a deque": _do(lambda n: n.parts[0].queue.append(3), lambda n: n.parts[0].queue.pop()),
    "a set": _do(lambda n: n.parts[0].bag.add(3), lambda n: n.parts[0].bag.remove(3)),
    "a processor's list": _set("parts[1].processor", "scale", lambda: [2.0]),
    "an item of it": _do(
        lambda n: n.parts[1].processor.scale.__setitem__(0, 2.0),
        lambda n: n.parts[1].processor.scale.__setitem__(0, 1.0),
    ),
    "another processor": _set("parts[1]", "processor", types.SimpleNamespace),
    "a slot": _set("parts[0].slotted", "value", 2),
    "a namespace": _set("parts[0].space", "a", 2),
    "a closure": _closure,
    "a hook": _hook,
    "a class": _class,
    "a patched class": _patched,
    "a submodule": _replaced,
    "a module in a list": _set("unregistered[0]", "number", 9.0),
    "a training flag": _do(lambda n: n.parts[0].train(), lambda n: n.parts[0].eval()),
    "a dtype": _cast,
    "an empty weight": _emptied,
    "a missing weight": _set("parts[0].linear", "bias", None),
    "a missing buffer": _set("parts[0]", "table", None),
    "a tensor": _set("parts[0]", "loose", lambda: torch.ones(2)),
    "a tensor's values": _do(lambda n: n.parts[0].loose.add_(1), lambda n: None),
    "a layout": _do(
        lambda n: setattr(n.parts[0].linear.weight, "data", n.parts[0].linear.weight.data.t().contiguous().t()),
        lambda n: setattr(n.parts[0].linear.weight, "data", n.parts[0].linear.weight.data.contiguous()),
    ),
    "a default dtype": _do(
        lambda n: torch.set_default_dtype(torch.float64), lambda n: torch.set_default_dtype(torch.float32)
    ),
}
FOR_GOOD = ("a closure", "a tensor's values")


@pytest.fixture
def net():
    return Whole().eval().requires_grad_(False)


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_noticed_and_undoing_it_gives_the_same_state(net, name):
    mark, before = Mark(net), State.of(net)
    assert mark.holds() and State.of(net) == before
    undo = CHANGES[name](net)
    try:
        assert not mark.holds() and State.of(net) != before
    finally:
        if undo is not None:
            undo()
    assert (State.of(net) == before) == (name not in FOR_GOOD)


def test_values_of_weights_are_no_part_of_a_state(net):
    mark, before = Mark(net), State.of(net)
    with torch.no_grad():
        net.parts[0].linear.weight.mul_(2)
        net.parts[0].table.zero_()
    assert mark.holds()
    net.parts[0].linear.weight = nn.Parameter(torch.zeros(3, 3), requires_grad=False)  # another of the same shape
    assert not mark.holds() and State.of(net) == before


def test_what_is_called_in_the_place_of_the_module_is_no_part_of_its_state(net):
    """Counters and profilers wrap it, and what they hold changes at every call; of a part it is another matter."""
    before, mark, counts = State.of(net), Mark(net), iter([1, 2])
    net._compiled_call_impl = lambda x: (next(counts), net._call_impl(x))[1]
    assert State.of(net) == before and mark.holds()
    with preserved(net):  # which would refuse the iterator of an attribute
        pass
    net.parts[0]._compiled_call_impl = lambda x: x
    assert State.of(net) != before and not mark.holds()


def test_a_state_is_the_same_under_the_seam_and_without(net):
    before, mark = State.of(net), Mark(net)
    seam.install(net, seam.Handler(net))
    assert State.of(net) == before and mark.holds()
    net.forward = lambda x: x  # what takes the handler's place is the module's own
    assert State.of(net) != before and not mark.holds()
    del net.forward
    seam.remove(net)
    assert State.of(net) == before


def test_a_watch_looks_only_where_the_mark_does_not_hold(net):
    moved = []
    watch = Watch(net, frozenset(), moved.append)
    first = watch.look()
    assert watch.look() is first and len(moved) == 1
    net.parts[0].number = 7.0
    second = watch.look()
    assert second != first and len(moved) == 2
    net.parts[0].number = 2.5
    assert watch.look() == first
    watch.ignore(frozenset({"parts.0.number"}))
    here = watch.look()
    net.parts[0].number = 8.0
    assert watch.holds() and watch.look() is here


def test_a_state_says_which_hooks_there_are(net):
    assert State.of(net).hooks is None
    handle = net.parts[1].linear.register_forward_pre_hook(lambda *_: None)
    assert State.of(net).hooks == "forward pre hooks on parts.1.linear"
    handle.remove()
    assert State.of(net).hooks is None


def test_the_lasting_digest_is_of_values_and_names():
    assert lasting_digest(Whole()) == lasting_digest(Whole())
    other = Whole()
    other.parts[0].processor.scale[0] = 3.0
    assert lasting_digest(other) != lasting_digest(Whole())


@pytest.mark.parametrize("name", [name for name in CHANGES if name not in ("a patched class", "a default dtype")])
def test_preserved_puts_everything_back(net, name):
    before, values = Mark(net), {k: v.clone() for k, v in net.state_dict().items()}
    numbers = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    with preserved(net):
        undo = CHANGES[name](net)
        if name in ("a class", "a dtype", "an empty weight", "a layout", "a hook"):  # not of the module's own making
            undo()
        if net.parts[0].table is not None:
            net.parts[0].table.add_(1)
        torch.rand(1), random.random(), np.random.rand()
    if name not in ("a tensor's values", "a class", "a dtype", "an empty weight", "a layout", "a closure"):
        assert before.holds()
    assert all(torch.equal(v, values[k]) for k, v in net.state_dict().items())
    assert torch.equal(net.parts[0].loose, torch.zeros(2))
    assert torch.equal(numbers[0], torch.get_rng_state()) and numbers[1] == random.getstate()
    assert numbers[2] == np.random.get_state()[1].tolist()


class Impure(nn.Module):
    """A net whose forward does what a test says."""

    def __init__(self, act) -> None:
        super().__init__()
        self.weight, self.act = nn.Parameter(torch.ones(2), requires_grad=False), act
        self.calls, self.kept, self.log, self.sizes = 0, None, [], {}
        self.register_buffer("seen", torch.zeros(2))

    def forward(self, x, t, extra=None):
        return self.act(self, x, t, extra) * self.weight


def _count(net, x, t, extra):
    net.calls += 1
    return x + t


def _keep_text(net, x, t, extra):
    if net.kept is None:
        net.kept = t * 2
    return x + net.kept


def _keep_table(net, x, t, extra):
    if len(x) not in net.sizes:
        net.sizes[len(x)] = torch.arange(float(len(x)))
    return x + t + net.sizes[len(x)][:, None]


def _log(net, x, t, extra):
    net.log.append(1)
    return x + t


def _statistics(net, x, t, extra):
    net.seen.mul_(0.9)
    return x + t


def _noise(net, x, t, extra):
    return x + torch.rand(2) * 0 + t


def _layer_drop(net, x, t, extra):
    return x + t if random.random() < 2 else x


def _write(net, x, t, extra):
    return x.add_(1) + t


def _pop(net, x, t, extra):
    extra.pop("more")
    return x + t


FINDINGS = {
    _count: "its calls change `calls`",
    _keep_text: "it keeps `kept` of the inputs of a call",
    _keep_table: None,
    _log: "its calls change `log`",
    _statistics: "its calls change `seen`",
    _noise: "it draws random numbers",
    _layer_drop: "it draws random numbers",
    _write: "it writes to its argument `x`",
    _pop: "it writes to its arguments",
}


@pytest.mark.parametrize("act", FINDINGS, ids=lambda act: act.__name__.strip("_"))
def test_what_a_module_does_besides_answering_is_found(act):
    net = Impure(act).eval()
    x, t = torch.rand(3, 2), torch.rand(3, 1)
    call, given = bind(net, (x, t, {"more": torch.ones(1)}), {}, frozenset()), x.clone()
    mark = Mark(net)
    with torch.no_grad(), preserved(net):
        evidence = examine(net, call)
    assert evidence.finding == FINDINGS[act]
    assert mark.holds() and not net.seen.any() and torch.equal(x, given)
    first = evidence.answers[0]
    assert first[0] is call and torch.equal(first[1][0], net(x.clone(), t, {"more": 1}))
