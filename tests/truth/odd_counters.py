"""Odd modules that count, collect statistics or feed their answers back: what they do depends on the calls before."""

from __future__ import annotations

import collections
import itertools
import weakref
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .odd_modules import LEVELS, Net, odd
from .odd_state import clear

TOTALS = {"calls": 0}


@odd("counters")
class CountsCalls(Net):
    """Counts its calls and makes nothing of the number."""

    calls = 0

    def forward(self, x, t, ctx):
        self.calls += 1
        return super().forward(x, t, ctx)


@odd("counters", uncacheable=True)
class ScalesByItsCount(Net):
    """Counts its calls, and the number changes the answer."""

    calls = 0

    def forward(self, x, t, ctx):
        self.calls += 1
        return super().forward(x, t, ctx) * (1 + 0.1 * self.calls)


@odd("counters", uncacheable=True)
class SkipsEveryThird(Net):
    """A counter decides what is computed."""

    turn = 0

    def forward(self, x, t, ctx):
        self.turn = (self.turn + 1) % 3
        h = self.hidden(x, t, ctx)
        return self.out(h if self.turn else h.sin())


@odd("counters", uncacheable=True)
class CountsInABuffer(Net):
    """The counter is a buffer, written in place, and the answer depends on it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x, t, ctx):
        self.count.add_(1)
        return super().forward(x, t, ctx) / self.count


@odd("counters")
class ReplacesABuffer(Net):
    """Sets a buffer to a new tensor at every call, for its user to look at."""

    def __init__(self):
        super().__init__()
        self.register_buffer("norm", torch.zeros(()))

    def forward(self, x, t, ctx):
        h = self.hidden(x, t, ctx)
        self.norm = h.norm()
        return self.out(h)


@odd("counters", between=clear, uncacheable=True)
class FeedsItsAnswerBack(Net):
    """Half of the last answer is in the next one."""

    last: Tensor | None = None

    def clear(self):
        self.last = None

    def forward(self, x, t, ctx):
        out = super().forward(x, t, ctx)
        self.last = out if self.last is None else 0.5 * out + 0.5 * self.last
        return self.last


@odd("counters", uncacheable=True)
class RunningStatistics(Net):
    """Normalises by a mean that every call moves."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x, t, ctx):
        h = self.hidden(x, t, ctx)
        self.mean.mul_(0.9).add_(0.1 * h.mean((0, 1)))
        return self.out(h - self.mean)


@odd("counters", between=clear, uncacheable=True)
class AppendsKeys(Net):
    """Attends to the keys of all calls since `clear()`."""

    def __init__(self):
        super().__init__()
        self.keys = []

    def clear(self):
        self.keys.clear()

    def forward(self, x, t, ctx):
        h = self.hidden(x, t, ctx)
        self.keys.append(h)
        keys = torch.cat(self.keys, 1)
        return self.out((h @ keys.transpose(1, 2)).softmax(-1) @ keys)


@odd("counters")
class WritesALog(Net):
    """A list of numbers read from the device, one a call."""

    def __init__(self):
        super().__init__()
        self.log = []

    def forward(self, x, t, ctx):
        out = super().forward(x, t, ctx)
        self.log.append(round(out.mean().item(), 6))
        return out


class Meter:
    """An object with slots that counts."""

    __slots__ = ("most", "number")

    def __init__(self):
        self.number, self.most = 0, torch.zeros(())


@odd("counters")
class NestedMeter(Net):
    """Numbers and tensors in an object in a dict in a list."""

    def __init__(self):
        super().__init__()
        self.meters = [{"main": Meter()}]

    def forward(self, x, t, ctx):
        out = super().forward(x, t, ctx)
        meter = self.meters[0]["main"]
        meter.number, meter.most = meter.number + len(x), torch.maximum(meter.most, out.max())
        return out


@odd("counters", uncacheable=True, outside=True, start=lambda net: net.restart())
class CountsInAClosure(Net):
    """The counter is a variable of the function that made it."""

    def __init__(self):
        super().__init__()
        number = 0

        def count():
            nonlocal number
            number += 1
            return number

        def restart():
            nonlocal number
            number = 0

        self.count, self.restart = count, restart

    def forward(self, x, t, ctx):
        return super().forward(x, t, ctx) / self.count()


@odd("counters", uncacheable=True, outside=True, start=lambda net: TOTALS.update(calls=0), watched=lambda: TOTALS)
class CountsInAGlobal(Net):
    """The counter is a global of its file."""

    def forward(self, x, t, ctx):
        TOTALS["calls"] += 1
        return super().forward(x, t, ctx) / TOTALS["calls"]


def forget_all(net: Any) -> None:
    """Sets the counter of a class back."""
    type(net).calls = 0


@odd("counters", uncacheable=True, outside=True, start=forget_all, by_hand=False)
class CountsInItsClass(Net):
    """The counter belongs to the class."""

    calls: ClassVar[int] = 0

    def forward(self, x, t, ctx):
        type(self).calls += 1
        return super().forward(x, t, ctx) / type(self).calls


class Counting(nn.Linear):
    """A layer that counts."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


@odd("counters")
class HiddenLayers(Net):
    """Layers in a plain list, of which torch knows nothing, and they count."""

    def __init__(self):
        super().__init__()
        self.layers = [Counting(8, 8), Counting(8, 8)]

    def forward(self, x, t, ctx):
        h = self.hidden(x, t, ctx)
        for layer in self.layers:
            h = h + layer(h).tanh()
        return self.out(h)


class Remembers:
    """Anything that can be held weakly."""

    kept = None


@odd("counters", between=clear)
class WeakMemory(Net):
    """What it remembers is held by someone else, and it has a weak reference."""

    def __init__(self):
        super().__init__()
        self.owners = [Remembers()]
        self.memory = weakref.ref(self.owners[0])

    def clear(self):
        self.memory().kept = None

    def forward(self, x, t, ctx):
        memory = self.memory()
        if memory.kept is None:
            memory.kept = self.text(ctx).mean(1, keepdim=True)
        return self.out((self.into(x) + memory.kept + t[:, None, None].sin()).tanh())


@odd("counters", between=clear, uncacheable=True)
class MeanOfTheLastThree(Net):
    """The mean of its last answers, from a queue that drops the oldest."""

    def __init__(self):
        super().__init__()
        self.recent = collections.deque(maxlen=3)

    def clear(self):
        self.recent.clear()

    def forward(self, x, t, ctx):
        self.recent.append(super().forward(x, t, ctx))
        return sum(self.recent) / len(self.recent)


@odd("counters", between=clear, uncacheable=True)
class FirstTimeAtALevel(Net):
    """Answers otherwise at a level that it has not seen."""

    def __init__(self):
        super().__init__()
        self.levels = {round(LEVELS[0], 3)}

    def clear(self):
        self.levels = set(list(self.levels)[:2])

    def forward(self, x, t, ctx):
        out, value = super().forward(x, t, ctx), round(t[0].item(), 3)
        if value not in self.levels:
            self.levels.add(value)
            out = out * 2
        return out


@odd("counters", uncacheable=True)
class CachesInsideItself(Net):
    """Has a cache of its own: computes when the level has moved enough, else it gives its last answer."""

    last, at = None, None

    def forward(self, x, t, ctx):
        value = t[0].item()
        if self.at is None or abs(self.at - value) > 0.3 or self.last.shape != x.shape:
            self.at, self.last = value, super().forward(x, t, ctx)
        return self.last


@odd("counters", uncacheable=True)
class MovesItsWeights(Net):
    """Every call moves a parameter."""

    def forward(self, x, t, ctx):
        with torch.no_grad():
            self.out.bias.add_(0.01)
        return super().forward(x, t, ctx)


@odd("counters", uncacheable=True)
class TakesTurns(Net):
    """Two layers that change places at every call."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, t, ctx):
        self.one, self.two = self.two, self.one
        return self.out(self.one(self.hidden(x, t, ctx)).tanh())


@odd("counters", uncacheable=True, refused="iterator")
class DrawsFromAnIterator(Net):
    """The number of the call comes from an iterator."""

    def __init__(self):
        super().__init__()
        self.numbers = itertools.count(1)

    def forward(self, x, t, ctx):
        return super().forward(x, t, ctx) / next(self.numbers)


def begin(net: Any) -> None:
    """A generator of its own for every module."""
    net.numbers = (1 / n for n in itertools.count(1))


@odd("counters", uncacheable=True, outside=True, start=begin, refused="generator")
class DrawsFromAGenerator(Net):
    """The same from a Python generator, which can be neither looked into nor set back."""

    def __init__(self):
        super().__init__()
        begin(self)

    def forward(self, x, t, ctx):
        return super().forward(x, t, ctx) * next(self.numbers)
