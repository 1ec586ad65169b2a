"""CompiledDenoiser: stands in for the denoiser, picks the variant of each step, and keeps state in sessions."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dcc.capture.captured import Captured
from dcc.capture.export import capture
from dcc.errors import CaptureError, PositionError
from dcc.lower.program import Program, Variant, lower
from dcc.passes.base import GUIDANCE, STEP, Site, anchor_name, next_name, write_name
from dcc.passes.forms import Constant
from dcc.passes.graph import COEFFICIENTS, nodes_by_name
from dcc.plans import mapping
from dcc.plans.forms import split
from dcc.plans.plan import Plan, is_full
from dcc.plans.predictors import newton
from dcc.record.call import Call, bind
from dcc.record.recorder import Recording
from dcc.record.seam import DenoiserProxy
from dcc.serve.guard import anchor_error, extra_step
from dcc.serve.session import Counts, Sessions, Stream
from dcc.serve.summary import Summary
from dcc.variants.correctors import Factors
from dcc.variants.guidance import check_call, forecasts_guidance
from dcc.variants.hoisted import Prologue
from dcc.variants.trigger_graphs import TriggerGraphs

TIME_TOLERANCE = 0.05  # of the smallest gap between two levels


@dataclass
class Family:
    """One captured signature: its graph, the sites of the plan in it, and a variant per distinct row."""

    captured: Captured
    selectors: tuple[tuple[Site, ...], ...]
    variants: dict[tuple[int, ...], Variant]
    graphs: TriggerGraphs | None = None  # where the plan has a trigger
    prologue: Prologue = field(default_factory=Prologue)  # of what no step changes

    @property
    def halves(self) -> bool:
        """Whether some row runs the conditional half of a guidance batch only."""
        return any(forecasts_guidance(row, self.selectors) for row in self.variants)


class CompiledDenoiser(DenoiserProxy):
    """The drop-in for `pipe.transformer` or `pipe.unet` that `dcc.compile` makes.

    Calls take and return what the original does. `build` makes the Family of a captured graph for a plan; `plan` may
    be read but not set: compile again for another plan.
    """

    def __init__(
        self,
        original: nn.Module,
        plan: Plan,
        recording: Recording,
        build: Callable[[Captured, Plan], Family],
        backend: str,
        guard: bool | dict[int, list[float]] = False,
        mode: str = "default",
    ) -> None:
        super().__init__(original)
        self.__dict__["guard"] = guard  # a dict collects errors by step instead of acting on them
        self.__dict__.update(plan=plan, backend=backend, mode=mode, sessions=Sessions(), programs={}, families=[])
        self.__dict__.update(recording=recording, _build=build, _lock=threading.RLock(), _tables={}, factors=Factors())
        self.__dict__.update(
            _session=ContextVar("session", default=None), _numbers=itertools.count(), capture_seconds=0.0
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = bind(self.original, args, kwargs, self.recording.as_tensors)
        with torch.no_grad():
            family = self.family(call)
            step, key, owners = self._locate(call)
            stream = self._stream(step, key, owners)
            if stream.step < 0 and family.halves:
                check_call(call, self.recording.varying)
            outputs = self.serve(family, call, stream, step)
            last, stream.step = stream.step, step
            if mapping.ends(self.plan, last, step) if stream.served else step == self.plan.steps - 1:
                self.sessions.close(key)
        return pytree.tree_unflatten(outputs, family.captured.out_spec)

    def serve(self, family: Family, call: Call, stream: Stream, step: float) -> list[Tensor]:
        """The denoiser's outputs for one step of one stream."""
        row, weights = self._decide(family, stream, step)
        outputs = self.run(family, call, stream, row, step, weights)
        if self.guard is not False and is_full(row) and step == int(step):
            self._watch(family, stream, int(step))
        return outputs

    def with_plan(self, plan: Plan, backend: str | None = None) -> CompiledDenoiser:
        """The same capture and recording with another plan; state, programs and counters are its own."""
        from dcc.serve.triggered import denoiser_for  # it derives from this class

        backend = backend or self.backend
        net = denoiser_for(self.original, plan, self.recording, self._build, backend, self.guard, self.mode)
        for family in self.families:
            net.families.append(self._build(family.captured, plan))
        return net

    def family(self, call: Call) -> Family:
        """The captured graph that serves this call; captures a new one for a new signature.

        The first call of every new shape is compared with the eager module: a graph captured at other sizes may have
        taken a branch that this size would not. Where they differ, the call is captured at its own sizes.
        """
        for family in self.families:
            if call.shapes in family.captured.proven and family.captured.accepts(call):
                return family
        with self._lock:
            for family in self.families:
                if family.captured.accepts(call) and family.captured.agrees(self.original, call):
                    return family
            captured = capture(self.original, call)
            captured.learn(self.recording.varying, self.recording.keys, self.recording.guided)
            self.families.append(self._build(captured, self.plan))
            captured.proven.add(call.shapes)
            return self.families[-1]

    def run(
        self,
        family: Family,
        call: Call,
        stream: Stream,
        row: tuple[int, ...],
        step: float,
        weights: tuple[tuple[float, ...], ...],
    ) -> list[Tensor]:
        """Runs one variant: binds its inputs by name, keeps its writes in `stream`, returns the denoiser's outputs.

        `weights` are the coefficients of each forecast selector.
        """
        variant = family.variants[row]
        halved = forecasts_guidance(row, family.selectors)
        if halved:  # the forecast makes the unconditional half from the conditional one
            whole = batch_of(call, self.recording)
            call = family.captured.part(call, slice(whole // 2, None))
        given = call  # the identity of the caller's own tensors tells requests apart, so only here:
        if self.backend == "inductor" and family.captured.problem is None:
            call = call.contiguous()
        values = family.captured.bindings(call)
        values |= family.prologue.bound(
            variant.inputs, given, family.captured, values, stream.once, self.sessions.weigh_hoisted
        )
        for k, sites in enumerate(family.selectors):
            for site in sites if row[k] != 1 else ():
                self._bind_anchors(values, site, stream)
                if halved and site.kind != GUIDANCE:
                    _halve(values, site, family.captured, whole)
        if COEFFICIENTS in variant.inputs:
            values[COEFFICIENTS] = self._coefficients(self._rows(row, weights), call)
        values |= {constant.name: self._constant(constant, call) for constant in variant.constants}
        values |= self.factors.bound(variant.corrections, values, call.tensors[0])
        values |= stream.states
        if STEP in variant.inputs:
            values[STEP] = self._number(step, call)
        inputs = [values[name] for name in variant.inputs]
        outputs = self.program(variant, call, inputs)(inputs)
        limit = self.plan.anchors + len(stream.extra)
        written = dict(zip(variant.writes, outputs[variant.outputs :], strict=True))
        for k, sites in enumerate(family.selectors):
            for site in sites if row[k] == 1 else ():
                names = [write_name(site, index) for index in range(len(site.ports))]
                if all(name in written for name in names):
                    stream.keep(site.name, step, tuple(written[name] for name in names), limit)
        stream.states |= {state: written[next_name(state)] for state in variant.states}
        if written:
            self.sessions.weigh()
        return outputs[: variant.outputs]

    def warm(self, call: Call, say: Callable[[str], None]) -> None:
        """Lowers and checks every variant on one recorded call, on anchors that the all-compute variant writes."""
        with torch.no_grad():
            family = self.family(call)
            stream = Stream("warm")
            for index, row in enumerate(self.plan.rows):
                say(f"lowering variant {index + 1} of {len(self.plan.rows)}")
                step = self.plan.schedule.index(row) if row in self.plan.schedule else 0
                full = is_full(row)  # what other rows write may be of half the batch, or of some tokens
                own = stream if full else replace(stream, anchors=dict(stream.anchors), states=dict(stream.states))
                self.run(family, call, own, row, step, self._planned(step, row))
        self.sessions.counts = Counts()

    def program(self, variant: Variant, call: Call, inputs: Sequence[Tensor]) -> Program:
        """The variant lowered for calls of these shapes; lowers it where it is not yet.

        Shapes of the call decide those of all inputs; one weight stands for the dtype and device of the others.
        """
        kinds = tuple((t.shape, t.stride(), t.dtype, t.device) for t in (*call.tensors, *inputs[:1]))
        key = (id(variant), kinds)
        if key not in self.programs:
            with self._lock:
                if key not in self.programs:
                    self.programs[key] = lower(variant, inputs, self.backend, self.mode)
        return self.programs[key]

    @contextlib.contextmanager
    def session(self, name: str | None = None) -> Iterator[None]:
        """Keeps the calls inside apart from all others, for what identity cannot tell apart.

        Needed only to interleave, in one thread, several generations that share the very same prompt tensors. A
        session with a name may be entered again for its next call; one without is forgotten on leaving.
        """
        owner = name if name is not None else f"session-{next(self._numbers)}"
        token = self._session.set(owner)
        try:
            yield
        finally:
            self._session.reset(token)
            if name is None:
                self.sessions.close_all(owner)

    def summary(self) -> Summary:
        """What was planned and what really happened so far; prints as a table."""
        return Summary.of(self)

    def _locate(self, call: Call) -> tuple[float, tuple[Any, ...], tuple[Tensor, ...]]:
        """The step, the stream's key and the tensors whose identity is part of that key."""
        by_name = dict(zip(call.names, call.tensors, strict=True))
        owners = tuple(by_name[name] for name in self.recording.keys if name in by_name)
        context = self.position
        key = (
            self._session.get() or threading.get_ident(),
            context.name if context else None,
            *((t.data_ptr(), tuple(t.shape)) for t in owners),
        )
        live = self.sessions.find(key)
        return self._step(by_name, live.step if live else -1), key, owners

    def _step(self, by_name: dict[str, Tensor], last: float) -> float:
        """The step of a call, from `cache_context` or the timestep value; the first fitting one after `last`.

        A whole number at the plan's own levels; between them a fractional one.
        """
        context, plan = self.position, self.plan
        if context is not None and context.step_index is not None:
            if (context.num_inference_steps or plan.steps) == plan.steps:
                if not 0 <= context.step_index < plan.steps:
                    raise PositionError(
                        f"step {context.step_index} of {context.num_inference_steps} does not fit a plan of "
                        f"{plan.steps} steps"
                    )
                return context.step_index
        time = self.recording.time
        if time is None:
            raise PositionError(
                "no input of this denoiser carries the noise level; "
                "call it inside cache_context(name, step_index=i, num_inference_steps=n)"
            )
        values = by_name[time].flatten()
        value = float(values[0])
        if values.numel() > 1 and not bool((values == values[0]).all()):
            raise PositionError(
                f"input {time!r} holds several noise levels in one batch; a static plan serves samples at one step"
            )
        gaps = [abs(a - b) for a, b in itertools.pairwise(plan.levels) if a != b]
        tolerance = TIME_TOLERANCE * min(gaps, default=max(abs(value), 1.0))
        fitting = [s for s, level in enumerate(plan.levels) if abs(level - value) <= tolerance]
        if not fitting:
            between = mapping.position(plan.levels, value)
            if between is None:
                raise PositionError(
                    f"{time}={value:.6g} is outside the plan's levels ({plan.levels[0]:.6g} to {plan.levels[-1]:.6g}): "
                    f"this run has another scheduler than the plan ({plan.scheduler}); dcc.restore the pipeline and "
                    "compile it for this run"
                )
            return between
        return next((s for s in fitting if s > last), fitting[0])

    def _stream(self, step: float, key: tuple[Any, ...], owners: tuple[Tensor, ...]) -> Stream:
        live = self.sessions.find(key)
        name = key[1] or "main"
        return self.sessions.open(key, name, owners, restart=live is not None and step <= live.step)

    def _decide(
        self, family: Family, stream: Stream, step: float
    ) -> tuple[tuple[int, ...], tuple[tuple[float, ...], ...]]:
        """The plan's row and coefficients, or the all-compute row where anchors that the plan counts on are missing."""
        if stream.served or step != int(step):
            return self._decide_between(family, stream, step)
        planned = self.plan.schedule[int(step)]
        full = (1,) * len(planned)
        if step in stream.extra:
            self.sessions.count("guarded")
            self.sessions.count("computed")
            return full, ()
        if stream.extra and is_full(planned):
            stream.forget_extra()  # later gaps are forecast from the planned anchors alone, as they were fitted
        elif stream.extra.intersection(self._kept(family, stream, 0)):  # the rest of a gap that got another anchor
            self.sessions.count("forecast")
            near = min(2, self.plan.anchors)
            return planned, tuple(
                tuple(newton(step, self._kept(family, stream, k)[:near]).tolist()) * self.plan.parts(k)
                for k, computed in enumerate(planned)
                if computed != 1
            )
        for k, computed in enumerate(planned):
            if computed != 1:
                needed = self.plan.anchor_steps(int(step), k)[: len(self.plan.weights(int(step), k)[0])]
                if any(stream.steps(site.name)[: len(needed)] != needed for site in family.selectors[k]):
                    if (
                        stream.step >= 0 and int(stream.step) < step - 1
                    ):  # a coarser run, whose levels are all the plan's
                        return self._decide_between(family, stream, step)
                    self.sessions.count("missed")
                    return full, ()
        self.sessions.count("computed" if planned == full else "forecast")
        return planned, self._planned(int(step), planned)

    def _decide_between(
        self, family: Family, stream: Stream, step: float
    ) -> tuple[tuple[int, ...], tuple[tuple[float, ...], ...]]:
        """Row and coefficients of a call at a noise level between the plan's: see mapping.py."""
        plan, last = self.plan, stream.step if stream.step >= 0 else None
        served = stream.served or [
            -1 if last is None else mapping.due(plan, k, -1, last, last) for k in range(len(plan.sites))
        ]
        reached = [mapping.due(plan, k, served[k], last, step) for k in range(len(plan.sites))]
        row = tuple(
            int(new > old or not self._kept(family, stream, k))
            for k, (new, old) in enumerate(zip(reached, served, strict=True))
        )
        planned = plan.schedule[min(max(round(step), 0), plan.steps - 1)]
        row = tuple(near if not own and near != 1 else own for own, near in zip(row, planned, strict=True))
        if row not in family.variants:
            row = (1,) * len(row)
        stream.served = reached
        self.sessions.count("mapped")
        self.sessions.count("computed" if is_full(row) else "forecast")
        return row, self._moved(family, stream, step, row)

    def _moved(
        self, family: Family, stream: Stream, step: float, row: tuple[int, ...]
    ) -> tuple[tuple[float, ...], ...]:
        """The plan's coefficients for the anchors that this run really has."""
        return tuple(
            tuple(mapping.coefficients(self.plan, k, step, self._kept(family, stream, k)))
            for k, computed in enumerate(row)
            if computed != 1
        )

    def _watch(self, family: Family, stream: Stream, step: int) -> None:
        """At an anchor: judges the forecast that it would have got, and adds a step where that is worse than ever."""
        kept = stream.anchors.get(family.selectors[0][0].name, [])
        error = anchor_error(kept) if kept and kept[0][0] == step else None
        if error is None:
            return
        if isinstance(self.guard, dict):
            self.guard.setdefault(step, []).extend(error.tolist())
        elif (extra := extra_step(self.plan, step, float(error.max()))) is not None:
            stream.extra.add(extra)

    @staticmethod
    def _kept(family: Family, stream: Stream, selector: int) -> list[float]:
        """Positions of the anchors of a selector's sites, newest first."""
        return stream.steps(family.selectors[selector][0].name)

    def _planned(self, step: int, row: tuple[int, ...]) -> tuple[tuple[float, ...], ...]:
        """The plan's coefficients of the selectors that `row` forecasts."""
        return tuple(self.plan.coefficients[step][k] for k, computed in enumerate(row) if computed != 1)

    def _rows(self, row: tuple[int, ...], weights: tuple[tuple[float, ...], ...]) -> tuple[tuple[float, ...], ...]:
        """Rows of coefficients of the selectors that `row` forecasts: as many for each as its form has parts."""
        forecast = [k for k, computed in enumerate(row) if computed != 1]
        pairs = zip(forecast, weights, strict=True)
        return tuple(part for k, values in pairs for part in split(values, self.plan.parts(k)))

    def _constant(self, constant: Constant, call: Call) -> Tensor:
        """A constant of a form on the call's device, made once."""
        key = (constant, call.tensors[0].device)
        if key not in self._tables:
            self._tables[key] = constant.make().to(call.tensors[0].device)
        return self._tables[key]

    def _bind_anchors(self, values: dict[str, Tensor], site: Site, stream: Stream) -> None:
        """Anchor inputs of a site; where fewer exist than the graph takes, the oldest stands in with coefficient 0."""
        kept = stream.anchors[site.name]
        for age in range(self.plan.anchors):
            _, tensors = kept[min(age, len(kept) - 1)]
            for index, tensor in enumerate(tensors):
                values[anchor_name(site, index, age)] = tensor

    def _number(self, step: float, call: Call) -> Tensor:
        """The number of the step [1] int64 on the call's device, made once."""
        key = (STEP, round(step), call.tensors[0].device)
        if key not in self._tables:
            self._tables[key] = torch.tensor([round(step)]).to(call.tensors[0].device)
        return self._tables[key]

    def _coefficients(self, weights: tuple[tuple[float, ...], ...], call: Call) -> Tensor:
        """Coefficients [forecast selectors, batch, J] float32 on the call's device, made once for equal weights."""
        tensor = call.tensors[0]
        batch = batch_of(call, self.recording)
        key = (weights, batch, tensor.device)
        if key not in self._tables:
            padded = [[*values, *([0.0] * (self.plan.anchors - len(values)))] for values in weights]
            table = torch.tensor(padded, dtype=torch.float64).to(torch.float32)
            self._tables[key] = table[:, None].expand(-1, batch, -1).contiguous().to(tensor.device)
        return self._tables[key]


def _halve(values: dict[str, Tensor], site: Site, captured: Captured, batch: int) -> None:
    """The conditional half of a site's anchors, of those that were kept for the whole batch."""
    nodes = nodes_by_name(captured.graph_module)
    for index, port in enumerate(site.ports):
        batched = captured.carries_batch(nodes[port.out])
        for name in [name for name in values if name.startswith(f"{anchor_name(site, index, 0)[:-1]}")]:
            if batched and len(values[name]) == batch:
                values[name] = values[name][batch // 2 :]


def batch_of(call: Call, recording: Recording) -> int:
    """First dimension of the sample: the largest tensor that moves from step to step."""
    moving = [t for n, t in zip(call.names, call.tensors, strict=True) if n in recording.varying and t.dim() > 0]
    if not moving:
        raise CaptureError("no input of this denoiser changes from step to step")
    return max(moving, key=lambda t: t.numel()).shape[0]
