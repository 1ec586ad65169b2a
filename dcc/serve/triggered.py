"""Runs a plan whose trigger decides at run time, for every sample of a batch on its own.

A step runs at most two regions and reads the device at most once: the prefix with its numbers, then the suffix of the
row that the numbers ask for. Where the samples of a batch want different rows, each row runs for its samples only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dcc.decisions import Decision
from dcc.discover.sites import Sites
from dcc.lower.program import Programs
from dcc.passes.base import Port
from dcc.passes.values import Distance, Output, Watched
from dcc.plans import mapping
from dcc.plans.plan import Plan, is_full
from dcc.plans.triggers import Memory
from dcc.record.call import Call
from dcc.record.recorder import Recording
from dcc.serve.binding import Binding, Tables
from dcc.serve.session import Sessions, Stream
from dcc.variants.build import Family, build
from dcc.variants.trigger_graphs import TriggerGraphs
from dcc.variants.variant import Variant

Chosen = Tensor | None  # indices of the samples a region runs for; None for all


@dataclass
class Ring:
    """Past values of a site or a port, newest first; samples have steps of their own: `steps[i]` are sample i's."""

    values: list[tuple[Tensor, ...]] = field(default_factory=list)
    steps: list[list[float]] = field(default_factory=list)

    def keep(self, step: float, values: tuple[Tensor, ...], chosen: Chosen, batch: int, limit: int) -> None:
        """Adds the values of the chosen samples; the values of the others stay as they are."""
        self.steps = self.steps or [[] for _ in range(batch)]
        for i in range(batch) if chosen is None else chosen.tolist():
            self.steps[i] = [step, *self.steps[i]][:limit]
        if chosen is None:
            self.values = [values, *self.values][:limit]
            return
        depth = max(map(len, self.steps))
        shifted = []
        for age in range(depth):
            old = self.values[min(age, len(self.values) - 1)]
            new = values if age == 0 else tuple(t[chosen] for t in self.values[min(age - 1, len(self.values) - 1)])
            shifted.append(tuple(o.index_copy(0, chosen, n) for o, n in zip(old, new, strict=True)))
        self.values = shifted

    def at(self, age: int) -> tuple[Tensor, ...]:
        """The values of this age, 0 being the newest; where fewer are there, the oldest."""
        return self.values[min(age, len(self.values) - 1)]

    def bytes(self) -> int:
        """Bytes held."""
        return sum(t.numel() * t.element_size() for values in self.values for t in values)


@dataclass
class Over:
    """A step that is over but not yet told to the trigger: its numbers may still be on the device."""

    step: int
    computed: list[bool]
    known: list[dict[str, float]]
    unread: dict[str, Tensor]


@dataclass
class Watch:
    """What a stream keeps for its trigger and its forecasts."""

    memories: list[Memory]
    rings: dict[str, Ring] = field(default_factory=dict)  # values of the cached sites
    seen: dict[Port, Ring] = field(default_factory=dict)  # values of the watched ports, at computed steps
    previous: dict[Port, Tensor] = field(default_factory=dict)
    over: list[Over] = field(default_factory=list)

    def bytes(self) -> int:
        """Bytes held."""
        rings = sum(ring.bytes() for ring in [*self.rings.values(), *self.seen.values()])
        return rings + sum(t.numel() * t.element_size() for t in self.previous.values())


class TriggeredRunner:
    """Serves steps as a trigger decides; the first call of a stream computes everything."""

    def __init__(self, plan: Plan, run: Recording, programs: Programs, sessions: Sessions, guard: Any = None) -> None:
        self.plan, self.recording, self.programs, self.sessions = plan, run, programs, sessions
        self.tables = Tables()
        assert plan.trigger is not None
        self.trigger = plan.trigger
        self.predictors = plan.predictors

    def build(self, sites: Sites) -> Family:
        """The graphs of the plan for one captured graph."""
        return build(self.plan, sites, self.programs.observer)

    def warm(self, family: Family, call: Call, say: Callable[[str], None]) -> None:
        """Lowers and checks the start, the prefix, a row that computes and one that forecasts."""
        stream, full = Stream("warm"), _graphs(family).full
        for index, row in enumerate((None, full, self.trigger.sample_row(len(full)))):
            say(f"lowering variant {index + 1} of 3")
            self._step_through(family, call, stream, index, row)

    def serve(self, family: Family, call: Call, stream: Stream, step: float) -> list[Tensor]:
        """The denoiser's outputs for one step of one stream."""
        if not mapping.is_planned(self.plan, step):  # the trigger decides there as it does at the plan's own levels
            stream.served = stream.served or [0]
            self.sessions.count("mapped")
        return self._step_through(family, call, stream, step, None)

    def _step_through(
        self, family: Family, call: Call, stream: Stream, step: float, forced: tuple[int, ...] | None
    ) -> list[Tensor]:
        """One call of one stream; `forced` is a row to run whatever the trigger says."""
        if self.programs.backend == "inductor":
            call = call.contiguous()
        graphs, batch = _graphs(family), self.recording.batch_of(call)
        if stream.watch is None or len(stream.watch.memories) != batch:
            stream.watch = Watch([Memory(self.plan.steps) for _ in range(batch)])
            outputs = self._run(graphs, graphs.start, call, stream.watch, step, graphs.full, None, {})
            stream.watch.over.append(Over(int(step), [True] * batch, [{} for _ in range(batch)], {}))
            self._count([graphs.full] * batch, graphs)
            return outputs
        watch = stream.watch
        handed, numbers = self._look(graphs, call, watch)
        if forced is None and is_full(self.plan.schedule[mapping.nearest(self.plan, step)]):
            forced = graphs.full
        if forced is not None:
            rows, values, weights = [forced] * batch, [{} for _ in range(batch)], [None] * batch
        else:
            rows, values, weights = self._decide_all(graphs, watch, step, numbers)
            numbers = {}
            if len(set(rows)) > 1 and not graphs.separable:
                rows = [graphs.full] * batch
        with self.programs.lock:
            rows = [graphs.known(row) for row in rows]
        if any(name not in handed for name in graphs.head[1]):  # a new row takes more from the prefix than those so far
            handed, _ = self._look(graphs, call, watch)
        outputs: list[Tensor] = []
        for row in dict.fromkeys(rows):
            chosen = [i for i, own in enumerate(rows) if own == row]
            who = None if len(chosen) == batch else torch.tensor(chosen, device=call.tensors[0].device)
            given = [weights[i] for i in chosen]
            own = self._run(graphs, graphs.rows[row], call, watch, step, row, who, handed, given, numbers)
            if who is None:
                outputs = own
            else:
                outputs = outputs or [t.new_empty((batch, *t.shape[1:])) for t in own]
                outputs = [whole.index_copy(0, who, part) for whole, part in zip(outputs, own, strict=True)]
        watch.over.append(Over(int(step), [is_full(row) for row in rows], values, numbers))
        self._count(rows, graphs)
        return outputs

    def _decide_all(self, graphs: TriggerGraphs, watch: Watch, step: float, numbers: dict[str, Tensor]):
        """Rows, numbers and own coefficients of every sample, after telling the trigger of the steps that are over."""
        batch = len(watch.memories)
        unread = [tensor for over in watch.over for tensor in over.unread.values()] + list(numbers.values())
        read = torch.stack(unread).tolist() if unread else []  # the one host synchronisation of a step
        self.sessions.add(syncs=int(bool(unread)))
        columns = iter(read)
        for over in watch.over:
            for name in over.unread:
                for known, value in zip(over.known, next(columns), strict=True):
                    known |= {name: value} if value == value else {}  # NaN: not measured for this sample
            for memory, computed, known in zip(watch.memories, over.computed, over.known, strict=True):
                self.trigger.observe(memory, over.step, computed, known)
        watch.over.clear()
        values: list[dict[str, float]] = [{} for _ in range(batch)]
        for name in numbers:
            for known, value in zip(values, next(columns), strict=True):
                known[name] = value
        rows, weights = [], []
        for memory, known in zip(watch.memories, values, strict=True):
            decided = self.trigger.decide(memory, int(step), known)
            rows.append(decided if isinstance(decided, tuple) else (int(decided),) * len(graphs.full))
            weights.append(self.trigger.weights(memory, int(step), known))
        return rows, values, weights

    def _look(self, graphs: TriggerGraphs, call: Call, watch: Watch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Runs the prefix; returns the tensors that it hands over, and its numbers by measure."""
        prefix, handed = graphs.head
        if prefix is None:
            return {}, {}
        binding = Binding(self.tables, graphs.captured, call, 0, watch=watch)
        results = self._call(prefix, call, binding)
        for port in graphs.watched(None):
            watch.previous[port] = results[Watched(port)]
        numbers = {measure.name: results[Distance(graphs.look(measure))] for measure in graphs.looks(None)}
        return {name: results[name] for name in handed}, numbers

    def _run(
        self,
        graphs: TriggerGraphs,
        variant: Variant,
        call: Call,
        watch: Watch,
        step: float,
        row: tuple[int, ...],
        who: Chosen,
        handed: dict[str, Tensor],
        given: Sequence[Sequence[float] | None] = (),
        numbers: dict[str, Tensor] | None = None,
    ) -> list[Tensor]:
        """Runs a region for the chosen samples; keeps what it writes and the values watched at computed steps."""
        batch = len(watch.memories)
        part = call if who is None else _part(graphs, call, who)
        samples = range(batch) if who is None else who.tolist()
        device = call.tensors[0].device
        binding = Binding(
            self.tables,
            graphs.captured,
            part,
            step,
            watch.rings,
            coefficients=lambda: self._weigh(graphs, watch, step, row, samples, given, device),
            watch=watch,
            handed=handed,
            chosen=who,
        )
        results = self._call(variant, part, binding)
        for site, places in variant.kept:
            written = tuple(results[place] for place in places)
            watch.rings.setdefault(site, Ring()).keep(step, written, who, batch, self.plan.anchors)
        if is_full(row):
            for port in [*graphs.watched(None), *graphs.watched(row)]:
                value = results.get(Watched(port))
                value = _pick(watch.previous[port], who) if value is None else value
                depth = max(2, self.plan.anchors)
                watch.seen.setdefault(port, Ring()).keep(step, (value,), who, batch, depth)
                if variant is graphs.start:
                    watch.previous[port] = value
        if numbers is not None:
            for measure in graphs.looks(row):
                number = results[Distance(graphs.look(measure))]
                if who is not None:
                    known = numbers.get(measure.name, number.new_full((batch,), torch.nan))
                    number = known.index_copy(0, who, number)
                numbers[measure.name] = number
        self.sessions.weigh()
        return [results[index] for index in range(variant.outputs)]

    def _weigh(
        self,
        graphs: TriggerGraphs,
        watch: Watch,
        step: float,
        row: tuple[int, ...],
        samples: Sequence[int],
        given: Sequence[Sequence[float] | None],
        device: torch.device,
    ) -> Tensor:
        """Coefficients [groups, samples, J] float32 from each sample's own anchors, or given by the trigger."""
        rings = [
            (watch.rings[group[0].name], predictor)
            for group, predictor, d in zip(graphs.selected, self.predictors, row, strict=True)
            if d == Decision.FORECAST
        ]
        drafted = [watch.seen[graphs.ports[m]] for m in graphs.looks(row) if m.against == "forecast"]
        rings += [(ring, self.predictors[0]) for ring in drafted]
        table = torch.zeros(len(rings), len(samples), self.plan.anchors, dtype=torch.float64)
        for k, (ring, predictor) in enumerate(rings):
            for i, sample in enumerate(samples):
                own = given[i] if given else None
                weights = own if own is not None else predictor.coefficients(step, ring.steps[sample])
                table[k, i, : len(weights)] = torch.tensor(weights, dtype=torch.float64)
        return table.float().to(device)

    def _call(self, variant: Variant, call: Call, binding: Binding) -> dict[Output | str | int, Tensor]:
        """Runs a region; returns all outputs by their index, those after the denoiser's own also by what they are."""
        inputs = binding.of(variant.takes)
        self.sessions.add(regions=1)
        outputs = self.programs.of(variant, call, inputs)(inputs)
        return dict(enumerate(outputs)) | dict(zip(variant.gives, outputs[variant.outputs :], strict=True))

    def _count(self, rows: Sequence[tuple[int, ...]], graphs: TriggerGraphs) -> None:
        self.sessions.count("computed" if all(map(is_full, rows)) else "forecast")
        spent = sum(graphs.flops[row] for row in rows) // len(rows)
        self.sessions.add(flops=spent, flops_uncached=graphs.sites.flops)


def _graphs(family: Family) -> TriggerGraphs:
    assert family.graphs is not None  # built for a plan that has a trigger
    return family.graphs


def _pick(tensor: Tensor, who: Chosen, batched: bool = True) -> Tensor:
    return tensor if who is None or not batched else tensor[who]


def _part(graphs: TriggerGraphs, call: Call, who: Tensor) -> Call:
    """`call` for the chosen samples."""
    inputs = graphs.captured.inputs
    pairs = zip(call.names, call.tensors, strict=True)
    return replace(call, tensors=tuple(_pick(t, who, graphs.batched(inputs[name])) for name, t in pairs))
