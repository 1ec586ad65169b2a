"""Odd modules that keep something between their calls: caches, counters, statistics, answers, lists."""

from __future__ import annotations

import collections
import functools
import itertools
import threading
import types
import weakref
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .odd_modules import LEVELS, Net, Prompt, See, first_of, level, odd

TOTALS = {"calls": 0}


def clear(net: Any) -> None:
    """What the authors of such modules ask their users to do between two generations."""
    net.clear()


@odd("state", between=clear)
class KeepsText(Net):
    """Keeps what it made of the text until `clear()`, as speech models do."""

    kept: Tensor | None = None

    def clear(self):
        self.kept = None

    def forward(self, x, t, ctx):
        if self.kept is None:
            self.kept = self.text(ctx).mean(1, keepdim=True)
        return self.out((self.into(x) + self.kept + t[:, None, None].sin()).tanh())


@odd("state", between=clear)
class KeepsTextInAnObject(Net):
    """The same, one object deeper."""

    def __init__(self):
        super().__init__()
        self.memory = types.SimpleNamespace(values={})

    def clear(self):
        self.memory.values.clear()

    def forward(self, x, t, ctx):
        kept = self.memory.values.setdefault("text", self.text(ctx).mean(1, keepdim=True))
        return self.out((self.into(x) + kept + t[:, None, None].sin()).tanh())


@odd("state")
class TablesByShape(Net):
    """Positions by the number of tokens, each made once."""

    def __init__(self):
        super().__init__()
        self.tables = {}

    def forward(self, x, t, ctx):
        tokens = x.shape[1]
        if tokens not in self.tables:
            self.tables[tokens] = torch.arange(tokens).float()[:, None].cos()
        return self.out(self.hidden(x, t, ctx) + self.tables[tokens])


@odd("state")
class KeepsByIdentity(Net):
    """What it made of a text, for as long as it is given the very same tensor."""

    known = kept = None

    def forward(self, x, t, ctx):
        if self.known is not ctx:
            self.known, self.kept = ctx, self.text(ctx).mean(1, keepdim=True)
        return self.out((self.into(x) + self.kept + t[:, None, None].sin()).tanh())


@odd("state")
class KeepsByWeakIdentity(Net):
    """The same by a weak reference, which holds no text that its user has given up."""

    def __init__(self):
        super().__init__()
        self.known, self.kept = lambda: None, None

    def forward(self, x, t, ctx):
        if self.known() is not ctx:
            self.known, self.kept = weakref.ref(ctx), self.text(ctx).mean(1, keepdim=True)
        return self.out((self.into(x) + self.kept + t[:, None, None].sin()).tanh())


@odd("state")
class KeepsByValue(Net):
    """What it made of a text, for as long as the text has the same values."""

    key = kept = None

    def forward(self, x, t, ctx):
        if self.key is None or self.key.shape != ctx.shape or not torch.equal(self.key, ctx):
            self.key, self.kept = ctx.clone(), self.text(ctx).mean(1, keepdim=True)
        return self.out((self.into(x) + self.kept + t[:, None, None].sin()).tanh())


@odd("state")
class KeepsTheNewestTables(Net):
    """At most two tables, the least lately used one goes first."""

    def __init__(self):
        super().__init__()
        self.tables = collections.OrderedDict()

    def forward(self, x, t, ctx):
        key = (x.shape[1], ctx.shape[1])
        self.tables[key] = self.tables.pop(key, None) if key in self.tables else torch.ones(key).softmax(-1)
        while len(self.tables) > 2:
            self.tables.popitem(last=False)
        return self.out(self.into(x) + self.tables[key] @ self.text(ctx) + t[:, None, None])


@odd("state")
class CountsCalls(Net):
    """Counts its calls and makes nothing of the number."""

    calls = 0

    def forward(self, x, t, ctx):
        self.calls += 1
        return super().forward(x, t, ctx)


@odd("state", uncacheable=True)
class ScalesByItsCount(Net):
    """Counts its calls, and the number changes the answer."""

    calls = 0

    def forward(self, x, t, ctx):
        self.calls += 1
        return super().forward(x, t, ctx) * (1 + 0.1 * self.calls)


@odd("state", uncacheable=True)
class SkipsEveryThird(Net):
    """A counter decides what is computed."""

    turn = 0

    def forward(self, x, t, ctx):
        self.turn = (self.turn + 1) % 3
        h = self.hidden(x, t, ctx)
        return self.out(h if self.turn else h.sin())


@odd("state", uncacheable=True)
class CountsInABuffer(Net):
    """The counter is a buffer, written in place, and the answer depends on it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x, t, ctx):
        self.count.add_(1)
        return super().forward(x, t, ctx) / self.count


@odd("state")
class ReplacesABuffer(Net):
    """Sets a buffer to a new tensor at every call, for its user to look at."""

    def __init__(self):
        super().__init__()
        self.register_buffer("norm", torch.zeros(()))

    def forward(self, x, t, ctx):
        h = self.hidden(x, t, ctx)
        self.norm = h.norm()
        return self.out(h)


@odd("state", between=clear, uncacheable=True)
class FeedsItsAnswerBack(Net):
    """Half of the last answer is in the next one."""

    last: Tensor | None = None

    def clear(self):
        self.last = None

    def forward(self, x, t, ctx):
        out = super().forward(x, t, ctx)
        self.last = out if self.last is None else 0.5 * out + 0.5 * self.last
        return self.last


@odd("state", uncacheable=True)
class RunningStatistics(Net):
    """Normalises by a mean that every call moves."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x, t, ctx):
        h = self.hidden(x, t, ctx)
        self.mean.mul_(0.9).add_(0.1 * h.mean((0, 1)))
        return self.out(h - self.mean)


@odd("state", between=clear, uncacheable=True)
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


@odd("state")
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


@odd("state")
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


@odd("state", uncacheable=True, outside=True)
class CountsInAClosure(Net):
    """The counter is a variable of the function that made it."""

    def __init__(self):
        super().__init__()
        number = 0

        def count():
            nonlocal number
            number = (number + 1) % 5  # compiling and serving both make whole runs of five
            return number

        self.count = count

    def forward(self, x, t, ctx):
        return super().forward(x, t, ctx) + self.count()


@odd("state", uncacheable=True, outside=True, start=lambda net: TOTALS.update(calls=0), watched=lambda: TOTALS)
class CountsInAGlobal(Net):
    """The counter is a global of its file."""

    def forward(self, x, t, ctx):
        TOTALS["calls"] += 1
        return super().forward(x, t, ctx) / TOTALS["calls"]


def forget_all(net: Any) -> None:
    """Sets the counter of a class back."""
    type(net).calls = 0


@odd("state", uncacheable=True, outside=True, start=forget_all)
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


@odd("state")
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


@odd("state", between=clear)
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


@odd("state", between=clear, uncacheable=True)
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


@odd("state", between=clear, uncacheable=True)
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


@odd("state")
class BuildsALayerWhenCalled(Net):
    """Its layer is there only after the first call."""

    def __init__(self):
        super().__init__()
        self.extra = None

    def forward(self, x, t, ctx):
        if self.extra is None:
            self.extra = nn.Linear(8, 8)
            nn.init.eye_(self.extra.weight)
        return self.out(self.extra(self.hidden(x, t, ctx)))


@odd("state", refused="lazy")
class LazyLayer(Net):
    """torch's own lazy layer, never run: it takes its size, and another class, from the first call."""

    def __init__(self):
        super().__init__()
        self.out = nn.LazyLinear(4)


@odd("state", outside=True)
class CachedTable(Net):
    """A method with `lru_cache`, called with a size."""

    @functools.lru_cache(maxsize=8)  # noqa: B019
    def table(self, tokens):
        return torch.arange(int(tokens)).float()[:, None].cos()

    def forward(self, x, t, ctx):
        return self.out(self.hidden(x, t, ctx) + self.table(x.shape[1]))


@odd("state")
class CachedProperty(Net):
    """Frequencies that are made when they are first asked for."""

    @functools.cached_property
    def frequencies(self):
        return torch.arange(8).float().exp() / 1000

    def forward(self, x, t, ctx):
        return self.out(self.hidden(x, t, ctx) + (t[:, None, None] * self.frequencies).sin())


def looks_at_it(net: Any, prompt: Prompt, see: See) -> Tensor:
    """A loop whose user reads what the module keeps for him after every call."""
    x = prompt.x
    with torch.no_grad():
        for value in LEVELS:
            out = net(x, level(x, value), prompt.ctx)
            see(out, getattr(net, "net", net).features)
            x = x - 0.1 * first_of(out)
    return x


@odd("state", loop=looks_at_it)
class ShowsItsFeatures(Net):
    """Keeps its newest features where its user reads them after every call."""

    features: Tensor | None = None

    def forward(self, x, t, ctx):
        self.features = self.hidden(x, t, ctx)
        return self.out(self.features)


@odd("state", uncacheable=True)
class CachesInsideItself(Net):
    """Has a cache of its own: computes when the level has moved enough, else it gives its last answer."""

    last, at = None, None

    def forward(self, x, t, ctx):
        value = t[0].item()
        if self.at is None or abs(self.at - value) > 0.3 or self.last.shape != x.shape:
            self.at, self.last = value, super().forward(x, t, ctx)
        return self.last


@odd("state", uncacheable=True)
class MovesItsWeights(Net):
    """Every call moves a parameter."""

    def forward(self, x, t, ctx):
        with torch.no_grad():
            self.out.bias.add_(0.01)
        return super().forward(x, t, ctx)


@odd("state", uncacheable=True)
class TakesTurns(Net):
    """Two layers that change places at every call."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, t, ctx):
        self.one, self.two = self.two, self.one
        return self.out(self.one(self.hidden(x, t, ctx)).tanh())


@odd("state")
class RegistersABuffer(Net):
    """Registers a buffer of the size it needs, and another at another size."""

    def forward(self, x, t, ctx):
        if getattr(self, "positions", None) is None or self.positions.shape[0] != x.shape[1]:
            self.register_buffer("positions", torch.arange(x.shape[1]).float()[:, None].cos(), persistent=False)
        return self.out(self.hidden(x, t, ctx) + self.positions)


@odd("state")
class HoldsALock(Net):
    """Counts under a lock, which cannot be copied."""

    def __init__(self):
        super().__init__()
        self.lock, self.calls = threading.Lock(), collections.Counter()

    def forward(self, x, t, ctx):
        with self.lock:
            self.calls[x.shape[1]] += 1
        return super().forward(x, t, ctx)


@odd("state", uncacheable=True)
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


@odd("state", uncacheable=True, outside=True, start=begin, refused="generator")
class DrawsFromAGenerator(Net):
    """The same from a Python generator, which can be neither looked into nor set back."""

    def __init__(self):
        super().__init__()
        begin(self)

    def forward(self, x, t, ctx):
        return super().forward(x, t, ctx) * next(self.numbers)
