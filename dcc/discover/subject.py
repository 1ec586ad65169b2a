"""The subject of a compilation: one denoiser, recorded, captured and searched for sites. Everything begins with one."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from dcc.capture.captured import Captured
from dcc.capture.export import capture
from dcc.capture.preserve import preserved
from dcc.capture.state import Mark
from dcc.discover.sites import Sites, find_sites
from dcc.errors import CaptureError
from dcc.record.call import Call
from dcc.record.fingerprint import fingerprint
from dcc.record.recorder import Recorder, Recording
from dcc.record.target import Target, recording


@dataclass(frozen=True)
class Subject:
    """What is compiled, planned or calibrated: where the denoiser runs, what a run showed, its graph and its sites.

    `variants.cost.planned` makes plans for it, `serve.denoiser.CompiledDenoiser` runs one, and
    `measure.calibrate.measure` makes its profile.
    """

    target: Target
    run: Recording
    captured: Captured
    sites: Sites

    @classmethod
    def of(cls, target: Target, prompts: Sequence[Any], say: Callable[[str], None] = lambda line: None) -> Subject:
        """Records a run of the first prompt, captures the denoiser and finds its sites; `say` gets a line per stage."""
        # noise levels, streams, which inputs move
        say("recording one run")
        with preserved(target.module):
            run = record(target, prompts)

        # one functional ATen graph whose weights are inputs, taken inside a call: pipelines set things up for a run
        say("capturing the denoiser")
        with preserved(target.module):
            captured = capture_inside(target, prompts, run)

        # every value that may be cached, with what it costs and saves
        return cls(target, run, captured, find_sites(captured, run.first, run))

    @property
    def module(self) -> nn.Module:
        """The denoiser itself."""
        return self.target.module

    @functools.cached_property
    def model(self) -> str:
        """The fingerprint of the denoiser's structure."""
        return fingerprint(self.module)

    @property
    def steps(self) -> int:
        """Number of sampler steps of the recorded run."""
        return len(self.run.levels)

    def sites_of(self, captured: Captured) -> Sites:
        """The sites of another graph of the same denoiser, captured in another state or for another signature."""
        return find_sites(captured, captured.call, self.run, self.sites)


def record(target: Target, prompts: Sequence[Any]) -> Recording:
    """One whole run of the first prompt."""
    marks, moved = [], []

    def at_call() -> None:
        if not marks:
            marks.append(Mark(target.module))
        elif not moved and not marks[0].holds():
            moved.append(True)

    def run(gradients: bool) -> Recording:
        calls: Counter[str] = Counter()
        with recording(target, Recorder(target.module, at_call=at_call), gradients) as recorder, ExitStack() as hooks:
            for name, part in target.others.items():
                hooks.callback(part.register_forward_pre_hook(functools.partial(_count, calls, name)).remove)
            target.sample(prompts[:1])
        others = tuple(f"{name} ({count} calls)" for name, count in calls.items())
        return replace(recorder.result(), restless=bool(moved), gradients=gradients, others=others)

    try:
        return run(gradients=False)
    except RuntimeError as error:
        if "grad" not in str(error):
            raise
    return run(gradients=True)  # a loop that differentiates through the denoiser


def _count(calls: Counter[str], name: str, *_: Any) -> None:
    calls[name] += 1


def capture_inside(target: Target, prompts: Sequence[Any], run: Recording) -> Captured:
    """The denoiser, captured at the first call of a run of two prompts, which keeps the batch symbolic.

    Where the loop takes no batch, that call is the one of a run of one prompt, and another batch size is captured when
    it comes.
    """
    found: list[Captured] = []

    def at_first(call: Call) -> None:
        if len(some) == 1 or call.signature == run.first.signature:
            found.append(capture(target.module, call, run.first))

    batched = any(tensor.dim() > 0 and len(tensor) == 1 for tensor in run.first.tensors)
    for some in ([prompts[0], prompts[-1]], prompts[:1]) if batched else (prompts[:1],):
        try:
            with recording(target, Recorder(target.module, at_first, run.as_tensors), run.gradients):
                target.sample(some)
        except (TypeError, ValueError, RuntimeError):  # a loop for one image at a time, or arguments that are per image
            if len(some) == 1:
                raise
        if found:
            return found[0]
    raise CaptureError(f"a second run of the same prompt never called the denoiser ({type(target.module).__name__})")
