"""CompiledDenoiser: runs in the denoiser's place, finds each call's step and stream, and keeps state in sessions."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from dcc.capture.export import capture
from dcc.discover.sites import Sites
from dcc.discover.subject import Subject
from dcc.lower.program import Programs
from dcc.plans import mapping
from dcc.plans.plan import Plan
from dcc.record.call import Call, bind
from dcc.record.seam import Handler
from dcc.serve.guard import Errors, Guard
from dcc.serve.position import Positions
from dcc.serve.session import Counts, Sessions, Stream
from dcc.serve.static import StaticRunner
from dcc.serve.summary import Summary
from dcc.serve.triggered import TriggeredRunner
from dcc.torch_internals import pytree
from dcc.variants.build import Family, build


class Runner(Protocol):
    """Serves steps: by a static schedule, as a trigger decides, or for a calibration."""

    def build(self, sites: Sites) -> Family:
        """The graphs that it runs, for one captured graph."""
        ...

    def serve(self, family: Family, call: Call, stream: Stream, step: float) -> list[Tensor]:
        """The denoiser's outputs for one step of one stream."""
        ...

    def warm(self, family: Family, call: Call, say: Callable[[str], None]) -> None:
        """Lowers and checks on one recorded call what will be served."""
        ...


class CompiledDenoiser(Handler):
    """What `dcc.compile` sets on `pipe.transformer` or `pipe.unet`: it runs where they would.

    Calls take and return what the original does. It is composed of: `positions` (which step a call is at), `sessions`
    (state per request), `families` (the variants of each captured graph), `programs` (the lowered ones), and a `runner`
    that decides and runs. `plan` may be read but not set: compile again for another plan.
    """

    def __init__(
        self,
        subject: Subject,
        plan: Plan,
        *,
        backend: str = "eager",
        mode: str = "default",
        guard: Guard | Errors | None = None,
        families: list[Family] | None = None,
        programs: Programs | None = None,
        runner: Runner | None = None,
    ) -> None:
        super().__init__(subject.module)
        self.subject, self.plan, self.backend, self.mode, self.guard = subject, plan, backend, mode, guard
        self.recording = subject.run
        self.sessions = Sessions()
        self.programs = Programs(backend, mode) if programs is None else programs
        self.positions = Positions(plan, subject.run.time)
        if runner is None:
            kind = TriggeredRunner if plan.trigger else StaticRunner
            runner = kind(plan, subject.run, self.programs, self.sessions, guard)
        self.runner = runner
        self.families = [runner.build(subject.sites)] if families is None else families
        self.compile_seconds = 0.0  # spent before the variants were lowered
        self._served: dict[Any, Family] = {}
        self._lock = threading.RLock()
        self._session: ContextVar[str | None] = ContextVar("session", default=None)
        self._numbers = itertools.count()

    def call(self, *args: Any, **kwargs: Any) -> Any:
        call = bind(self.module, args, kwargs, self.recording.as_tensors)
        with torch.no_grad():
            family = self.family(call)
            step, key, owners = self._locate(call)
            stream = self._stream(step, key, owners)
            outputs = self.runner.serve(family, call, stream, step)
            last, stream.step = stream.step, step
            if mapping.ends(self.plan, last, step) if stream.served else step == self.plan.steps - 1:
                self.sessions.close(key)
        return pytree.tree_unflatten(outputs, family.captured.out_spec)

    def with_plan(self, plan: Plan, backend: str | None = None) -> CompiledDenoiser:
        """A denoiser for another plan, with the same captured graphs and recording, but its own state and programs."""
        families = [build(plan, family.sites, self.programs.observer) for family in self.families]
        guard = Guard(plan) if isinstance(self.guard, Guard) else self.guard
        return CompiledDenoiser(
            self.subject, plan, backend=backend or self.backend, mode=self.mode, guard=guard, families=families
        )

    def family(self, call: Call) -> Family:
        """The captured graph that serves this call; captures a new one for a new signature.

        The first call of every new shape is compared with the eager module: a graph captured at other sizes may have
        taken a branch that this size would not. Where they differ, the call is captured at its own sizes.
        """
        key = call.signature, call.shapes
        found = self._served.get(key)
        if found is None or not any(found is family for family in self.families):
            with self._lock:
                found = self._served[key] = self._fitting(call)
        return found

    def _fitting(self, call: Call) -> Family:
        for family in self.families:
            if family.captured.accepts(call) and family.captured.agrees(self.module, call):
                return family
        captured = capture(self.module, call)
        self.families.append(self.runner.build(self.subject.sites_of(captured)))
        captured.proven.add(call.shapes)
        return self.families[-1]

    def entries(self) -> dict[str, Any]:
        """What the module shows of this denoiser."""
        return {"plan": self.plan, "summary": self.summary, "session": self.session}

    def warm(self, call: Call, say: Callable[[str], None] = lambda line: None) -> None:
        """Lowers and checks on one recorded call what will be served; counts nothing."""
        with torch.no_grad():
            self.runner.warm(self.family(call), call, say)
        self.sessions.counts = Counts()

    @contextlib.contextmanager
    def session(self, name: str | None = None) -> Iterator[None]:
        """Keeps the state of the calls inside apart from that of all others, where identity cannot tell them apart.

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
        captures = [family.captured for family in self.families]
        done = Summary.of(self.plan, self.sessions.counts, captures, self.programs.values(), self.backend)
        return replace(done, compile_seconds=done.compile_seconds + self.compile_seconds)

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
        return self.positions.of(by_name, context, live.step if live else -1), key, owners

    def _stream(self, step: float, key: tuple[Any, ...], owners: tuple[Tensor, ...]) -> Stream:
        live = self.sessions.find(key)
        name = key[1] or "main"
        return self.sessions.open(key, name, owners, restart=live is not None and step <= live.step)
