"""The subject of a compilation: one denoiser, recorded, captured and searched for sites. Everything begins with one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from dcc.capture.captured import Captured
from dcc.capture.export import capture
from dcc.discover.sites import Sites, find_sites
from dcc.record.call import Call
from dcc.record.fingerprint import fingerprint
from dcc.record.recorder import Recording
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
        # noise levels, streams, which inputs move; and the inputs of a batch of two
        say("recording one run")
        run, wide = record(target, prompts)

        # one functional ATen graph whose weights are inputs
        say("capturing the denoiser")
        captured = capture(target.module, wide, run.first)

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
        return find_sites(captured, captured.call, self.run, [block.path for block in self.sites.order])


def record(target: Target, prompts: Sequence[Any]) -> tuple[Recording, Call]:
    """One whole run of the first prompt, and the first call of a batch of two, which keeps the batch symbolic.

    Where the loop takes no batch, that call is the run's own first one, and another batch size is captured when it
    comes.
    """
    with recording(target) as recorder:
        target.sample(prompts[:1])
    run = recorder.result()
    if all(t.dim() == 0 or t.shape[0] > 1 for t in run.first.tensors):
        return run, run.first
    try:
        with recording(target, only_first=True) as recorder:
            target.sample([prompts[0], prompts[-1]])
    except (TypeError, ValueError, RuntimeError):  # a loop for one image at a time, or arguments that are per image
        return run, run.first
    wide = recorder.first
    return run, wide if wide is not None and wide.signature == run.first.signature else run.first
