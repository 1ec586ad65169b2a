"""Cache state: one `Stream` per request and chain of denoiser calls, found by identity, shared with no other."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from dcc.passes.values import State
from dcc.variants.hoisted import Held, held_bytes

MAX_STREAMS = 64  # abandoned generations beyond this many are forgotten, the oldest first


class Anchors:
    """The anchors of one site, newest first, and the steps that computed them."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.values: list[tuple[Tensor, ...]] = []

    def keep(self, step: float, values: tuple[Tensor, ...], limit: int) -> None:
        """Adds the newest anchor and drops what exceeds `limit`."""
        self.steps = [step, *self.steps][:limit]
        self.values = [values, *self.values][:limit]

    def forget(self, steps: set[int]) -> None:
        """Drops the anchors of these steps."""
        kept = [(step, values) for step, values in zip(self.steps, self.values, strict=True) if step not in steps]
        self.steps, self.values = [step for step, _ in kept], [values for _, values in kept]


@dataclass
class Stream:
    """State of one stream of one request: the last step seen and, per site, the anchors with their steps."""

    name: str
    owners: tuple[Tensor, ...] = ()  # held so that their addresses, which identify the request, are not given again
    step: float | None = None  # the position of its last call
    served: list[int] = field(default_factory=list)  # per selector, at other noise levels than the plan's (mapping.due)
    extra: set[int] = field(default_factory=set)  # steps that the guard has computed besides the planned ones
    anchors: dict[str, Anchors] = field(default_factory=dict)  # by site
    states: dict[State, Tensor] = field(default_factory=dict)  # states of token selection
    once: dict[Any, Held] = field(default_factory=dict)  # what no step changes, by the shapes of the call
    watch: Any = None  # a triggered.Watch, where the plan has a trigger

    def keep(self, site: str, step: float, values: tuple[Tensor, ...], limit: int) -> None:
        """Adds an anchor, newest first, and drops what exceeds `limit`."""
        anchors = self.anchors.get(site)
        if anchors is None:
            anchors = self.anchors[site] = Anchors()
        anchors.keep(step, values, limit)

    def copy(self) -> Stream:
        """A stream of its own that begins with the same anchors and states."""
        twin = replace(self, anchors={}, states=dict(self.states))
        for site, anchors in self.anchors.items():
            twin.anchors[site] = Anchors()
            twin.anchors[site].steps, twin.anchors[site].values = anchors.steps, anchors.values
        return twin

    def forget_extra(self) -> None:
        """Drops the anchors that the guard added."""
        for anchors in self.anchors.values():
            anchors.forget(self.extra)
        self.extra.clear()

    def steps(self, site: str) -> list[float]:
        """Steps of the site's anchors, newest first."""
        anchors = self.anchors.get(site)
        return anchors.steps if anchors is not None else []

    def bytes(self) -> int:
        """Bytes of all anchors held."""
        watched = self.watch.bytes() if self.watch is not None else 0
        kept = [tensor for anchors in self.anchors.values() for values in anchors.values for tensor in values]
        kept += self.states.values()
        return watched + sum(tensor.numel() * tensor.element_size() for tensor in kept)


@dataclass
class Counts:
    """What really happened, over all sessions: denoiser calls per kind."""

    computed: int = 0
    forecast: int = 0
    originals: int = 0  # answered by the module itself, outside of the plan
    missed: int = 0  # the plan says forecast, but the anchors it needs were not there
    sessions: int = 0
    guarded: int = 0  # computed because a prompt was harder than those the plan was made for
    mapped: int = 0  # calls at other noise levels than the plan's
    forgotten: int = 0  # streams dropped because there were more than MAX_STREAMS
    peak_bytes: int = 0
    peak_hoisted: int = 0  # bytes of what no step changes, apart from the anchors' peak_bytes
    prologues: int = 0  # how often what no step changes was computed
    regions: int = 0  # compiled regions entered, under a trigger
    syncs: int = 0  # times a trigger read the device
    flops: int = 0  # spent under a trigger, per sample, and what the same calls take uncached
    flops_uncached: int = 0


class Sessions:
    """All live streams of one compiled denoiser. Thread-safe."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.streams: OrderedDict[Hashable, Stream] = OrderedDict()
        self.counts = Counts()

    def open(self, key: Hashable, name: str, owners: Sequence[Tensor], restart: bool) -> Stream:
        """The stream of this key; a fresh one where there is none or where the run starts over."""
        with self.lock:
            if restart:
                self.streams.pop(key, None)
            if key not in self.streams:
                self.streams[key] = Stream(name, tuple(owners))
                self.counts.sessions += 1
                while len(self.streams) > MAX_STREAMS:
                    self.streams.popitem(last=False)
                    self.counts.forgotten += 1
            self.streams.move_to_end(key)
            return self.streams[key]

    def find(self, key: Hashable) -> Stream | None:
        """The live stream of this key, if any."""
        with self.lock:
            return self.streams.get(key)

    def close(self, key: Hashable) -> None:
        """Forgets a finished stream, and with it its anchors."""
        with self.lock:
            self.streams.pop(key, None)

    def close_all(self, owner: Hashable) -> None:
        """Forgets the streams of an explicit session, finished or not."""
        with self.lock:
            for key in [key for key in self.streams if isinstance(key, tuple) and key[0] == owner]:
                del self.streams[key]

    def count(self, *kinds: str) -> None:
        """Adds one call of each kind: computed, forecast, missed, mapped or guarded."""
        with self.lock:
            for kind in kinds:
                setattr(self.counts, kind, getattr(self.counts, kind) + 1)

    def add(self, **amounts: int) -> None:
        """Adds to counters by name."""
        with self.lock:
            for name, amount in amounts.items():
                setattr(self.counts, name, getattr(self.counts, name) + amount)

    def weigh(self) -> None:
        """Notes the bytes held now; called after anchors were added."""
        with self.lock:
            self.counts.peak_bytes = max(self.counts.peak_bytes, sum(s.bytes() for s in self.streams.values()))

    def weigh_hoisted(self) -> None:
        """Notes a prologue, and the bytes held of what no step changes; called after one has run."""
        with self.lock:
            held = sum(held_bytes(stream.once) for stream in self.streams.values())
            self.counts.peak_hoisted = max(self.counts.peak_hoisted, held)
            self.counts.prologues += 1
