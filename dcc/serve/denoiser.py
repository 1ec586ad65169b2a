"""CompiledDenoiser: runs in the denoiser's place, finds each call's step and stream, and keeps state in sessions."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dcc import arguments
from dcc.capture.captured import Captured
from dcc.capture.export import capture, keep, refresh
from dcc.capture.settings import replaceable
from dcc.capture.watch import State, Watch
from dcc.discover.sites import Sites
from dcc.discover.subject import Subject
from dcc.errors import CaptureError, PassError, PlanError, PositionError, SiteError
from dcc.lower.program import Programs
from dcc.plans import mapping
from dcc.plans.plan import Plan
from dcc.record.call import SERVED, Call, Served, bind
from dcc.record.seam import Handler
from dcc.serve.guard import Errors, Guard
from dcc.serve.position import Positions
from dcc.serve.session import Counts, Sessions, Stream
from dcc.serve.static import StaticRunner
from dcc.serve.summary import Summary
from dcc.serve.triggered import TriggeredRunner
from dcc.torch_internals import plain_call, pytree
from dcc.variants.build import Family, build

logger = logging.getLogger("dcc")
MOST_STATES = 16  # states of a module that are captured; in others, the original runs
MOST_IN_A_RUN = 4  # the same where the state changes within runs


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
        self._served: dict[Any, Family | str] = {}
        ignored = frozenset().union(*(family.captured.ignored for family in self.families))
        self.watch = Watch(self.module, ignored, functools.partial(refresh, self.module))
        self._refused: set[frozenset[str]] = set()  # attributes whose floats cannot be inputs
        self.restless = subject.run.restless  # whether the module's state changes within runs
        self.notes: Counter[str] = Counter()  # what did not go as planned, and how often
        self._lock = threading.RLock()
        self._session: ContextVar[str | None] = ContextVar("session", default=None)
        self._numbers = itertools.count()

    def call(self, *args: Any, **kwargs: Any) -> Any:
        if asks_gradients(self.module, args, kwargs):
            return self._original("gradients were asked for; call it within torch.no_grad()", args, kwargs)
        try:
            call = bind(self.module, args, kwargs, self.recording.as_tensors)
        except CaptureError as error:  # arguments that the recorded run did not have
            return self._original(str(error), args, kwargs)
        try:
            step, key, owners = self._locate(call)
        except PositionError as error:
            if self.recording.time is None:  # so it is at every call: whoever compiles it is told at once
                raise
            return self._original(str(error), args, kwargs)
        stream = self._stream(step, key, owners)
        if stream.step is None or self.restless:
            self.watch.look()
        family = self.family(call)
        if isinstance(family, str):
            result = self._original(family, args, kwargs)
        else:
            result = self._serve(family, call, stream, step, (args, kwargs))
        last, stream.step = stream.step, step
        if mapping.ends(self.plan, last, step) if stream.served else step >= self.plan.steps - 1:
            self.sessions.close(key)
            self._look_back()
        return result

    def _serve(self, family: Family, call: Call, stream: Stream, step: float, given: Any) -> Any:
        out_spec = family.captured.out_spec
        if not family.captured.problem:
            with torch.no_grad(), call.without_autocast():
                return pytree.tree_unflatten(self.runner.serve(family, call, stream, step), out_spec)
        served = Served(call, given)  # the module runs as the caller wants it to, and its answer is what it returns
        token = SERVED.set(served)
        try:
            outputs = self.runner.serve(family, call, stream, step)
        finally:
            SERVED.reset(token)
        return pytree.tree_unflatten(outputs, out_spec) if served.result is None else served.result

    def _original(self, reason: str, args: Any, kwargs: Any) -> Any:
        """What the module itself returns, with the reason noted."""
        self.note(f"the original ran: {reason}")
        self.sessions.count("originals")
        return plain_call(self.module)(*args, **kwargs)

    def note(self, said: str) -> None:
        """Keeps, for the summary, something that did not go as planned, and logs it the first time."""
        if said not in self.notes:
            logger.warning("%s: %s", type(self.module).__name__, said)
        self.notes[said] += 1

    def _look_back(self) -> None:
        """After a run: has the module changed in the middle of it? From then on it is looked at at every call."""
        if self.restless or self.watch.holds():
            return
        before, now = self.watch.state, self.watch.look()
        if not any(family.captured.fits(before) and family.captured.fits(now) for family in self.families):
            self.restless = True
            self.note("the denoiser changed in the middle of a run, whose later steps took no notice of that")

    def with_plan(self, plan: Plan, backend: str | None = None) -> CompiledDenoiser:
        """A denoiser for another plan, with the same captured graphs and recording, but its own state and programs."""
        families = [build(plan, family.sites, self.programs.observer) for family in self.families]
        guard = Guard(plan) if isinstance(self.guard, Guard) else self.guard
        return CompiledDenoiser(
            self.subject, plan, backend=backend or self.backend, mode=self.mode, guard=guard, families=families
        )

    def family(self, call: Call) -> Family | str:
        """The captured graph that serves this call in the state that the module is in, or why there is none.

        A new signature, or a new state, is captured anew. The first call of every new shape is compared with the eager
        module: a graph captured at other sizes may have taken a branch that this size would not. Where they differ, the
        call is captured at its own sizes.
        """
        key = self.watch.state.digest, call.signature, call.layout, torch.is_grad_enabled()
        found = self._served.get(key)
        if found is None:
            with self._lock:
                found = self._served.get(key) or self._fitting(call)
                if isinstance(found, Family) and found.captured.keeps:
                    found = self._settled(found, call)
                self._served[self.watch.state.digest, *key[1:]] = found
        return found

    def _settled(self, family: Family, call: Call) -> Family:
        """The same for the state that a first call of the module itself leaves, because it makes a table, say."""
        with torch.no_grad():
            call.twin().run(self.module)
        state = self.watch.look()
        return family if family.captured.fits(state) else self._alias(family, state)

    def _alias(self, family: Family, state: State) -> Family:
        """The same, for another state in which the module computes the same."""
        family = replace(family, captured=replace(family.captured, state=state))
        keep(self.module, family.captured)
        family.captured.read_from(self.module)
        self.families.append(family)
        return family

    def _fitting(self, call: Call) -> Family | str:
        state = self.watch.state
        here = [family for family in self.families if family.captured.fits(state)]
        here.sort(key=lambda family: -len(family.captured.settings.attributes))
        for family in here:
            if family.captured.accepts(call) and family.captured.agrees(self.module, call):
                return family
        if state.hooks is not None:  # trying it out would run them, and they may be others at the next call
            return f"it has {state.hooks}"
        most = MOST_IN_A_RUN if self.restless else MOST_STATES
        if len({family.captured.state.digest for family in self.families}) >= most:
            return f"it has been in more than {most} states, each of which would be captured"
        try:
            captured = self._capture(call)
        except CaptureError as error:
            return str(error)
        self.watch.ignore(captured.ignored)
        if twin := next((family for family in self.families if family.captured.is_like(captured)), None):
            return self._alias(twin, captured.state)
        try:
            family = self.runner.build(self.subject.sites_of(captured))
        except (SiteError, PlanError, PassError) as error:
            return captured.problem or f"as it is now, the plan does not fit it: {error}"
        self.families.append(family)
        return family

    def _capture(self, call: Call) -> Captured:
        """The module in the state that it is in; floats that have been others before are inputs where they can be."""
        state = self.watch.state
        changed = (family.captured.state.changed(state) for family in self.families)
        settings = replaceable(self.module, state.floats, frozenset().union(*filter(None, changed)))
        if settings and settings not in self._refused:
            try:
                return capture(self.module, call, ignored=self.watch.ignored, settings=settings)
            except CaptureError:
                self._refused.add(settings)
        return capture(self.module, call, ignored=self.watch.ignored)

    def entries(self) -> dict[str, Any]:
        """What the module shows of this denoiser."""
        return {"plan": self.plan, "summary": self.summary, "session": self.session}

    def warm(self, call: Call, say: Callable[[str], None] = lambda line: None) -> None:
        """Lowers and checks on one recorded call what will be served; counts nothing."""
        with torch.no_grad():
            family = self.family(call)
            if isinstance(family, str):
                raise CaptureError(f"the denoiser is not as it was in the recorded run: {family}")
            self.runner.warm(family, call, say)
        self.sessions.counts = Counts()
        self._served.clear()

    @contextlib.contextmanager
    def session(self, name: str | None = None) -> Iterator[None]:
        """Keeps the state of the calls inside apart from that of all others, where identity cannot tell them apart.

        Needed only to interleave, in one thread, several generations that share the very same prompt tensors. A
        session with a name may be entered again for its next call; one without is forgotten on leaving.
        """
        if name is not None:
            arguments.text("name", name, "request-1")
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
        done = Summary.of(self.plan, self.sessions.counts, captures, self.programs.values(), self.backend, self.notes)
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
        return self.positions.of(by_name, context, live.step if live else None), key, owners

    def _stream(self, step: float, key: tuple[Any, ...], owners: tuple[Tensor, ...]) -> Stream:
        live = self.sessions.find(key)
        name = key[1] or "main"
        restart = live is not None and live.step is not None and step <= live.step
        return self.sessions.open(key, name, owners, restart)


def asks_gradients(module: nn.Module, args: Any, kwargs: Any) -> bool:
    """Whether the caller wants gradients: they are enabled, and an input or a parameter requires them."""
    if not torch.is_grad_enabled():
        return False
    leaves = pytree.tree_leaves((args, kwargs))
    wanted = (leaf.requires_grad for leaf in (*leaves, *module.parameters()) if isinstance(leaf, Tensor))
    return any(wanted)
