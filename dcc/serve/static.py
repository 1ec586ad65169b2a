"""Runs a plan whose schedule is fixed beforehand: one variant per call."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from dcc.discover.sites import Sites
from dcc.lower.program import Programs
from dcc.passes.values import Next
from dcc.plans import mapping
from dcc.plans.plan import Plan, is_full
from dcc.record.call import Call
from dcc.record.recorder import Recording
from dcc.serve.binding import Binding, Tables
from dcc.serve.guard import Errors, Guard
from dcc.serve.schedule import Schedule, Turn
from dcc.serve.session import Sessions, Stream
from dcc.variants.build import Family, build
from dcc.variants.guidance import check_call, forecasts_guidance


class StaticRunner:
    """Serves steps by the schedule: decides, binds, runs the row's program and keeps what it writes."""

    def __init__(
        self, plan: Plan, run: Recording, programs: Programs, sessions: Sessions, guard: Guard | Errors | None
    ) -> None:
        self.plan, self.recording, self.programs, self.sessions, self.guard = plan, run, programs, sessions, guard
        self.schedule, self.tables = Schedule(plan, sessions), Tables()

    def build(self, sites: Sites) -> Family:
        """The variants of the plan for one captured graph."""
        return build(self.plan, sites, self.programs.observer)

    def serve(self, family: Family, call: Call, stream: Stream, step: float) -> list[Tensor]:
        """The denoiser's outputs for one step of one stream."""
        if stream.step is None and family.halves:
            check_call(call, self.recording.varying)
        turn = self.schedule.decide(family, stream, step)
        outputs = self.run(family, call, stream, step, turn)
        if self.guard is not None and is_full(turn.row) and mapping.is_planned(self.plan, step):
            self.guard.watch(stream.anchors.get(family.selectors[0][0].name), stream, int(step))
        return outputs

    def warm(self, family: Family, call: Call, say: Callable[[str], None]) -> None:
        """Lowers and checks every variant on one call, on anchors that the all-compute variant writes."""
        stream = Stream("warm")
        for index, row in enumerate(self.plan.rows):
            say(f"lowering variant {index + 1} of {len(self.plan.rows)}")
            step = self.plan.schedule.index(row) if row in self.plan.schedule else 0
            turn = self.schedule.planned(step)
            # what other rows write may have half the batch, or some tokens only
            own = stream if is_full(row) else stream.copy()
            self.run(family, call, own, step, turn if turn.row == row else Turn(row))

    def run(self, family: Family, call: Call, stream: Stream, step: float, turn: Turn) -> list[Tensor]:
        """Runs one variant, keeps its writes in `stream`, returns the denoiser's outputs."""
        variant, whole = family.variants[turn.row], None
        if family.halves and forecasts_guidance(turn.row, family.selectors):
            whole = self.recording.batch_of(call)  # the forecast makes the unconditional half from the conditional one
            call = family.captured.part(call, slice(whole // 2, None))
        dense = call if family.captured.problem or self.programs.backend != "inductor" else call.contiguous()
        binding = Binding(
            self.tables,
            family.captured,
            dense,
            step,
            stream.anchors,
            coefficients=lambda: self._coefficients(turn, dense),
            states=stream.states,
            # the identity of the caller's own tensors tells requests apart, not that of dense copies
            once=lambda served: family.prologue.values(served, call, stream.once, self.sessions.weigh_hoisted),
            halved=whole,
        )
        inputs = binding.of(variant.takes)
        outputs = self.programs.of(variant, dense, inputs)(inputs)
        limit = self.plan.anchors + len(stream.extra)
        for site, places in variant.kept:
            stream.keep(site, step, tuple(outputs[place] for place in places), limit)
        for place, given in enumerate(variant.gives, start=variant.outputs):
            if isinstance(given, Next):
                stream.states[given.state] = outputs[place]
        if variant.gives:
            self.sessions.weigh()
        return outputs[: variant.outputs]

    def _coefficients(self, turn: Turn, call: Call) -> Tensor:
        """The table [rows, batch, J] float32 that weighs a turn's anchors."""
        batch = self.recording.batch_of(call)
        return self.tables.coefficients(
            turn.key, lambda: self.schedule.rows(turn), batch, self.plan.anchors, call.tensors[0].device
        )
