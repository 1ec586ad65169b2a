"""Odd modules that keep something between their calls: caches, counters, statistics, answers, lists."""

from __future__ import annotations

import collections
import functools
import threading
import types
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from .odd_modules import LEVELS, Net, Prompt, See, first_of, level, odd


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
